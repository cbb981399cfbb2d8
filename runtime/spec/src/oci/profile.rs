//! Seccomp profiles of the node, in the JSON form of the OCI runtime specification or in
//! Docker's, which adds architecture maps and rules that depend on capabilities.

use std::collections::HashSet;

use oci_spec::runtime::{Capability, LinuxSeccomp};
use serde::Deserialize;
use serde_json::{Map, Value};

/// The architecture of guests, as libseccomp and as Go name it.
const ARCHITECTURE: (&str, &str) = ("SCMP_ARCH_X86_64", "amd64");
/// The version of the guest's kernel, for rules that need one.
const KERNEL: (u32, u32) = (6, 12);
const NOTIFY: &str = "SCMP_ACT_NOTIFY";

/// A profile whose rules are not chosen yet.
#[derive(Debug, Clone, PartialEq)]
pub struct ProfileFile(Map<String, Value>);

/// When a rule of Docker's form holds.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Condition {
    caps: Vec<String>,
    arches: Vec<String>,
    min_kernel: String,
}

/// An entry of Docker's `archMap`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Architectures {
    architecture: String,
    #[serde(default)]
    sub_architectures: Vec<String>,
}

impl ProfileFile {
    /// Reads a profile; the error says what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let profile: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if !profile.get("defaultAction").is_some_and(Value::is_string) {
            return Err("it has no defaultAction".into());
        }
        let file = Self(profile);
        // What doesn't depend on the container is told before there is one.
        file.resolve(&HashSet::new())?;
        Ok(file)
    }

    /// Chooses the rules for a container with these capabilities.
    pub fn resolve(&self, capabilities: &HashSet<Capability>) -> Result<LinuxSeccomp, String> {
        let mut profile = self.0.clone();
        if let Some(map) = profile.remove("archMap") {
            let map: Vec<Architectures> =
                serde_json::from_value(map).map_err(|e| format!("archMap: {e}"))?;
            let native = map
                .into_iter()
                .find(|entry| entry.architecture == ARCHITECTURE.0);
            if let Some(native) = native {
                let all: Vec<Value> = std::iter::once(native.architecture)
                    .chain(native.sub_architectures)
                    .map(Value::from)
                    .collect();
                profile.entry("architectures").or_insert(all.into());
            }
        }
        let rules = match profile.remove("syscalls") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(rules)) => rules,
            Some(_) => return Err("syscalls is no list".into()),
        };
        let mut chosen = Vec::with_capacity(rules.len());
        for rule in rules {
            chosen.extend(self::rule(rule, capabilities)?);
        }
        let notifies = |action: Option<&Value>| action.is_some_and(|action| action == NOTIFY);
        if notifies(profile.get("defaultAction"))
            || chosen.iter().any(|rule| notifies(rule.get("action")))
        {
            return Err(format!(
                "{NOTIFY} is not possible: no process of the node can answer a guest"
            ));
        }
        profile.remove("listenerPath");
        profile.remove("listenerMetadata");
        profile.insert("syscalls".into(), chosen.into());
        serde_json::from_value(Value::Object(profile)).map_err(|e| e.to_string())
    }
}

/// A rule in the OCI form; none when it does not hold for the container.
fn rule(rule: Value, capabilities: &HashSet<Capability>) -> Result<Option<Value>, String> {
    let Value::Object(mut rule) = rule else {
        return Err("a rule of syscalls is no object".into());
    };
    let mut condition = |key: &str| match rule.remove(key) {
        None | Some(Value::Null) => Ok(Condition::default()),
        Some(value) => {
            serde_json::from_value::<Condition>(value).map_err(|e| format!("{key}: {e}"))
        }
    };
    let (includes, excludes) = (condition("includes")?, condition("excludes")?);
    rule.remove("comment");
    let has = |name: &String| {
        let bare = name.strip_prefix("CAP_").unwrap_or(name);
        bare.parse::<Capability>()
            .is_ok_and(|capability| capabilities.contains(&capability))
    };
    let here = |arches: &[String]| arches.iter().any(|arch| arch == ARCHITECTURE.1);
    let kernel = |version: &str| at_least(version);
    let included = includes.caps.iter().all(has)
        && (includes.arches.is_empty() || here(&includes.arches))
        && (includes.min_kernel.is_empty() || kernel(&includes.min_kernel)?);
    let excluded = excludes.caps.iter().any(has)
        || here(&excludes.arches)
        || (!excludes.min_kernel.is_empty() && kernel(&excludes.min_kernel)?);
    if !included || excluded {
        return Ok(None);
    }
    // Docker's older form has one name a rule.
    if let Some(name) = rule.remove("name")
        && !rule.get("names").is_some_and(Value::is_array)
    {
        rule.insert("names".into(), vec![name].into());
    }
    if rule.get("args").is_some_and(Value::is_null) {
        rule.remove("args");
    }
    Ok(Some(Value::Object(rule)))
}

/// Whether the guest's kernel is of this version, `4.8`, or a later one.
fn at_least(version: &str) -> Result<bool, String> {
    let parsed = version
        .split_once('.')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let wanted: (u32, u32) =
        parsed.ok_or_else(|| format!("minKernel {version:?} is no version"))?;
    Ok(KERNEL >= wanted)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn resolved(profile: &Value, capabilities: &[Capability]) -> Result<Value, String> {
        let file = ProfileFile::parse(profile.to_string().as_bytes())?;
        let resolved = file.resolve(&capabilities.iter().copied().collect())?;
        Ok(serde_json::to_value(resolved).unwrap())
    }

    #[test]
    fn the_oci_form_is_taken_as_it_is() {
        let profile = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
                "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]}],
        });
        assert_eq!(resolved(&profile, &[]).unwrap(), profile);
        let bare = json!({"defaultAction": "SCMP_ACT_ALLOW"});
        assert_eq!(
            resolved(&bare, &[]).unwrap(),
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []})
        );
    }

    #[test]
    fn dockers_rules_depend_on_capabilities_and_architecture() {
        let profile = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 1,
            "archMap": [
                {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
                {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
            ],
            "syscalls": [
                {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": null, "comment": "x",
                    "includes": {}, "excludes": {}},
                {"name": "write", "action": "SCMP_ACT_ALLOW"},
                {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
                {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
                {"names": ["arm"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
                {"names": ["amd"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["amd64"]}},
                {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
                {"names": ["future"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "99.1"}},
            ],
        });
        let names = |capabilities: &[Capability]| {
            let resolved = resolved(&profile, capabilities).unwrap();
            assert_eq!(
                resolved["architectures"],
                json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"])
            );
            let rules = resolved["syscalls"].as_array().unwrap().clone();
            rules
                .iter()
                .map(|rule| rule["names"][0].as_str().unwrap().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(&[]), ["read", "write", "clone", "amd", "ptrace"]);
        assert_eq!(
            names(&[Capability::SysAdmin]),
            ["read", "write", "mount", "amd", "ptrace"]
        );
    }

    #[test]
    fn what_is_no_profile_is_refused_with_its_reason() {
        for (text, reason) in [
            ("", "EOF"),
            ("[]", "map"),
            ("{}", "defaultAction"),
            (r#"{"defaultAction": "NO"}"#, "NO"),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": 1}"#,
                "syscalls",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [1]}"#,
                "syscalls",
            ),
            (r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#, "NOTIFY"),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["x"],
                    "action": "SCMP_ACT_NOTIFY"}]}"#,
                "NOTIFY",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["x"],
                    "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "x"}}]}"#,
                "minKernel",
            ),
        ] {
            let error = ProfileFile::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}

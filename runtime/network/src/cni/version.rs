//! Versions of the CNI specification: which exist, and which a plugin speaks.

use std::{
    collections::HashMap,
    fmt, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
};

use hull_base::blocking;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::exec::{ExecError, Invocation};

/// A version of the specification that is known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum SpecVersion {
    /// The first one, and that of a configuration that names none.
    #[serde(rename = "0.1.0")]
    V0_1_0,
    /// With the command VERSION.
    #[serde(rename = "0.2.0")]
    V0_2_0,
    /// With chains and `prevResult`.
    #[serde(rename = "0.3.0")]
    V0_3_0,
    /// As 0.3.0.
    #[serde(rename = "0.3.1")]
    V0_3_1,
    /// With CHECK, and `prevResult` in DEL.
    #[serde(rename = "0.4.0")]
    V0_4_0,
    /// Without the single configuration.
    #[serde(rename = "1.0.0")]
    V1_0_0,
    /// With GC and STATUS.
    #[serde(rename = "1.1.0")]
    V1_1_0,
}

impl SpecVersion {
    /// All of them, the newest last.
    pub const ALL: [Self; 7] = [
        Self::V0_1_0,
        Self::V0_2_0,
        Self::V0_3_0,
        Self::V0_3_1,
        Self::V0_4_0,
        Self::V1_0_0,
        Self::V1_1_0,
    ];

    /// The version as configurations write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_1_0 => "0.1.0",
            Self::V0_2_0 => "0.2.0",
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }
}

impl fmt::Display for SpecVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for SpecVersion {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let known = Self::ALL.into_iter().find(|v| v.as_str() == text);
        known.ok_or(())
    }
}

/// What tells one installation of a plugin from the next.
type FileId = (u64, u64, i64, i64, u64);

/// What plugins answered to VERSION, until their files change.
#[derive(Debug, Clone, Default)]
pub struct Versions(Arc<Mutex<HashMap<PathBuf, (FileId, Spoken)>>>);

/// Versions that a plugin speaks; none when it does not say.
type Spoken = Option<Vec<SpecVersion>>;

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "supportedVersions")]
    supported: Vec<String>,
}

impl Versions {
    /// Asks a plugin which versions it speaks. A plugin that refuses the question (it came with
    /// 0.2.0) or does not answer it as it should gives `None`: what it does speak shows later.
    ///
    /// # Errors
    /// When it can't be run at all, or does not end.
    pub async fn of(&self, invocation: Invocation<'_>) -> Result<Spoken, ExecError> {
        let program = invocation.program;
        let file = program.to_owned();
        let id = blocking(move || file_id(&file)).await;
        if let Some(id) = id
            && let Some((known, spoken)) = self.lock().get(program)
            && *known == id
        {
            return Ok(spoken.clone());
        }
        let conf = json!({ "cniVersion": SpecVersion::V1_1_0 });
        let asked = Invocation {
            command: "VERSION",
            conf: &conf,
            ..invocation
        };
        let spoken = match asked.run().await {
            Ok(output) => serde_json::from_slice::<Answer>(&output)
                .ok()
                .map(|a| a.supported.iter().filter_map(|v| v.parse().ok()).collect()),
            Err(ExecError::Failed { .. }) => None,
            Err(error) => return Err(error),
        };
        if let Some(id) = id {
            let entry = (id, spoken.clone());
            self.lock().insert(program.to_owned(), entry);
        }
        Ok(spoken)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, (FileId, Spoken)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn file_id(program: &Path) -> Option<FileId> {
    let meta = fs::metadata(program).ok()?;
    let changed = (meta.mtime(), meta.mtime_nsec());
    Some((meta.dev(), meta.ino(), changed.0, changed.1, meta.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_and_written_as_they_are_read() {
        assert!(SpecVersion::ALL.is_sorted());
        for version in SpecVersion::ALL {
            assert_eq!(version.as_str().parse(), Ok(version));
            assert_eq!(json!(version), json!(version.as_str()));
        }
        assert!("1.2.0".parse::<SpecVersion>().is_err());
        assert!("1.0".parse::<SpecVersion>().is_err());
    }
}

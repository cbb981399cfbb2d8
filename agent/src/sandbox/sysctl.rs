//! Kernel parameters that a pod asks for.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Why a parameter was not set.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SysctlError {
    #[error("{0:?} is no sysctl name")]
    Name(String),
    #[error("sysctl {name}={value}")]
    Write {
        name: String,
        value: String,
        #[source]
        source: io::Error,
    },
}

/// Sets the parameter `name`, in dots ("net.core.somaxconn") or slashes.
pub(crate) fn set(name: &str, value: &str) -> Result<(), SysctlError> {
    let path = path(name).ok_or_else(|| SysctlError::Name(name.to_owned()))?;
    fs::write(path, value).map_err(|source| SysctlError::Write {
        name: name.to_owned(),
        value: value.to_owned(),
        source,
    })
}

/// Whether the parameter belongs to an IPC namespace, whose own root alone may set it.
pub(crate) fn is_ipc(name: &str) -> bool {
    let name = name.replace('/', ".");
    ["kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

/// Returns the file below `/proc/sys`. As in sysctl(8), the separator that comes first decides, and the
/// other one stands for a dot of a name ("net/ipv4/conf/eth0.1/x", "net.ipv4.conf.eth0/1.x").
fn path(name: &str) -> Option<PathBuf> {
    let slashes = name
        .find(['.', '/'])
        .is_some_and(|i| name[i..].starts_with('/'));
    let parts: Vec<String> = if slashes {
        name.split('/').map(str::to_owned).collect()
    } else {
        name.split('.').map(|part| part.replace('/', ".")).collect()
    };
    let plain = |part: &String| {
        !part.is_empty()
            && !matches!(part.as_str(), "." | "..")
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_-.:@*".contains(&b))
    };
    if parts.len() < 2 || !parts.iter().all(plain) {
        return None;
    }
    Some(Path::new("/proc/sys").join(parts.join("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_name_the_same_file() {
        let file = Path::new("/proc/sys/net/core/somaxconn");
        assert_eq!(path("net.core.somaxconn").unwrap(), file);
        assert_eq!(path("net/core/somaxconn").unwrap(), file);
        let file = Path::new("/proc/sys/net/ipv4/conf/eth0.1/forwarding");
        assert_eq!(path("net/ipv4/conf/eth0.1/forwarding").unwrap(), file);
        assert_eq!(path("net.ipv4.conf.eth0/1.forwarding").unwrap(), file);
    }

    #[test]
    fn nothing_outside_of_proc_sys_can_be_named() {
        for bad in [
            "",
            "x",
            ".",
            "..",
            "a..b",
            "a/../../x",
            "../x/y",
            "/etc/x",
            "a/./b",
            "a.b\0c",
            "a.b c",
            "net.core.",
            "a.//",
        ] {
            assert_eq!(path(bad), None, "{bad}");
        }
    }
}

//! Device nodes: /dev/kvm and /dev/net/tun.

use std::{fs::OpenOptions, io, path::Path};

use super::finding::Finding;

/// Whether /dev/kvm is there and may be opened. Whether it works is the probe's question.
pub(super) fn kvm(path: &Path) -> Finding {
    match open(path) {
        Ok(()) => Finding::Good(format!("{} can be opened", path.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Finding::bad(
            format!("there is no {}", path.display()),
            "switch on virtualization (VT-x, AMD-V) in the firmware, or nested virtualization \
             in the host of this VM, then `modprobe kvm_intel` or `modprobe kvm_amd`",
        ),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Finding::bad(
            format!("no permission to open {}", path.display()),
            "run as root",
        ),
        Err(error) => Finding::bad(
            format!("open {}: {error}", path.display()),
            "check that the kvm module is loaded (`lsmod | grep kvm`)",
        ),
    }
}

/// Whether taps can be made.
pub(super) fn tun(path: &Path) -> Finding {
    match open(path) {
        Ok(()) => Finding::Good(format!("{} can be opened", path.display())),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Finding::bad(
            format!("no permission to open {}", path.display()),
            "run as root",
        ),
        Err(error) => Finding::bad(
            format!("open {}: {error}", path.display()),
            "`modprobe tun`; in a container, give it the device",
        ),
    }
}

fn open(path: &Path) -> io::Result<()> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_absent_is_told_apart() {
        let absent = Path::new("/nonexistent/kvm");
        let Finding::Bad { detail, advice } = kvm(absent) else {
            panic!("absent device is good");
        };
        assert_eq!(detail, "there is no /nonexistent/kvm");
        assert!(advice.contains("firmware"));
        assert!(!tun(absent).is_good());
        assert!(kvm(Path::new("/dev/null")).is_good());
    }
}

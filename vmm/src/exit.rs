//! The exit report: why the VM ended.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use hull_proto_vmm::{ExitReason, ExitReport};

use crate::kvm::vcpu::End;

/// Makes a report of how the guest ended.
#[must_use]
pub fn report(end: End, panic: Option<String>) -> ExitReport {
    let (reason, message) = match (end, panic) {
        (End::Kvm(details), _) => (ExitReason::KvmError, details),
        (End::Shutdown(_), Some(message)) => (
            ExitReason::GuestPanic,
            format!("guest kernel panic: {message}"),
        ),
        (End::Shutdown(how), None) => (ExitReason::GuestShutdown, how.to_owned()),
    };
    ExitReport { reason, message }
}

/// Makes an empty file for the report, which the process can't do any more when it is locked in.
/// A reader takes an empty one for none.
///
/// # Errors
/// When the directory can't be written.
pub fn create(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.custom_flags(libc::O_NOFOLLOW).open(path)
}

/// Writes the report, at once.
///
/// # Errors
/// When the file can't be written.
pub fn write(report: &ExitReport, file: &mut File) -> io::Result<()> {
    file.write_all(&serde_json::to_vec(report)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_names_the_reason() {
        let panic = report(End::Shutdown("reset"), Some("no init".into()));
        assert_eq!(
            (panic.reason, panic.message.as_str()),
            (ExitReason::GuestPanic, "guest kernel panic: no init")
        );
        assert_eq!(
            report(End::Shutdown("reset"), None).reason,
            ExitReason::GuestShutdown
        );
        assert_eq!(
            report(End::Kvm("x".into()), Some("y".into())).reason,
            ExitReason::KvmError
        );
    }

    #[test]
    fn the_report_is_written_to_a_file_that_was_made_before() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("exit.json");
        std::fs::write(
            &path,
            "of an earlier process, and longer than the report that follows: {}{}{}",
        )
        .unwrap();
        let written = ExitReport {
            reason: ExitReason::Stopped,
            message: "as asked".into(),
        };
        let mut file = create(&path).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 0);
        write(&written, &mut file).unwrap();
        let read: ExitReport = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(read, written);
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        create(&link).unwrap_err();
    }
}

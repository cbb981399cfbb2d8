//! The only place where an error becomes a gRPC status.

use error_reporter::Report;
use hull_base::printable::one_line;
use hull_image::{PullError, StoreError};
use hull_spec::error::{ErrorKind, PodError};
use hull_streaming::RequestError;
use tonic::{Code, Status};

use super::{error::CriError, field::path};

/// Most characters of a text: it ends in one line of an event or of a terminal.
const LONGEST: usize = 400;
/// The key of an exit code in the metadata of a status.
pub(crate) const EXIT_CODE: &str = "hull-exit-code";

/// That code where the certificate of a registry is not trusted (sysexits.h: protocol).
pub(crate) const UNTRUSTED: u8 = 76;

/// The status that a client gets: code by kind of error, text with all causes in one line. `hull` itself
/// finds in its metadata the exit code of what it could not tell apart otherwise: a command that could not be
/// executed, and a certificate.
pub(crate) fn status(error: &CriError) -> Status {
    let mut status = Status::new(code(error), one_line(&text(error), LONGEST));
    if let Some(code) = exit_code(error) {
        status
            .metadata_mut()
            .insert(EXIT_CODE, u16::from(code).into());
    }
    status
}

fn exit_code(error: &CriError) -> Option<u8> {
    match error {
        CriError::Pod(error) => error.exit_code(),
        CriError::Pull(PullError::Untrusted { .. }) => Some(UNTRUSTED),
        CriError::About { source, .. } => exit_code(source),
        _ => None,
    }
}

/// The error with its causes; a field of a pod or container is told by its path in the request.
fn text(error: &CriError) -> String {
    match error {
        CriError::Pod(error) => of_pod(error),
        CriError::About { what, source } => format!("{what}: {}", text(source)),
        error => Report::new(error).to_string(),
    }
}

fn of_pod(error: &PodError) -> String {
    match error {
        PodError::InvalidArgument { field, reason }
        | PodError::Unimplemented { field, reason }
        | PodError::Unsatisfiable { field, reason } => format!("{}: {reason}", path(*field)),
        PodError::Undo { failure, undo } => {
            format!(
                "{}; and undoing it failed: {}",
                of_pod(failure),
                of_pod(undo)
            )
        }
        error => Report::new(error).to_string(),
    }
}

fn code(error: &CriError) -> Code {
    match error {
        CriError::Invalid { .. } => Code::InvalidArgument,
        CriError::Unsupported { .. } => Code::Unimplemented,
        CriError::Pod(error) => of_kind(error.kind()),
        CriError::About { source, .. } => code(source),
        CriError::Pull(error) => of_pull(error),
        CriError::Store(error) => of_store(error),
        CriError::Stream(RequestError::TooMany(_)) => Code::ResourceExhausted,
        CriError::Stream(RequestError::Missing(_) | RequestError::Invalid { .. }) => {
            Code::InvalidArgument
        }
        CriError::Task { .. } | CriError::Panicked | CriError::Stream(RequestError::Random(_)) => {
            Code::Internal
        }
    }
}

fn of_kind(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::InvalidArgument => Code::InvalidArgument,
        ErrorKind::Unimplemented => Code::Unimplemented,
        ErrorKind::FailedPrecondition => Code::FailedPrecondition,
        ErrorKind::ResourceExhausted => Code::ResourceExhausted,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::DeadlineExceeded => Code::DeadlineExceeded,
        ErrorKind::Internal => Code::Internal,
    }
}

fn of_pull(error: &PullError) -> Code {
    match error {
        PullError::InvalidReference { .. } => Code::InvalidArgument,
        PullError::NotFound { .. } => Code::NotFound,
        PullError::Unauthorized { .. } => Code::PermissionDenied,
        PullError::DigestMismatch { .. } | PullError::CorruptLayer { .. } => Code::DataLoss,
        PullError::Unsupported { .. }
        | PullError::RegistryConfig { .. }
        | PullError::Untrusted { .. }
        | PullError::Misled { .. } => Code::FailedPrecondition,
        PullError::TooLarge { .. } => Code::ResourceExhausted,
        PullError::RegistryUnavailable { .. } => Code::Unavailable,
        PullError::Timeout { .. } => Code::DeadlineExceeded,
        PullError::Store(error) => of_store(error),
        _ => Code::Internal,
    }
}

fn of_store(error: &StoreError) -> Code {
    match error {
        StoreError::NotFound(_) => Code::NotFound,
        StoreError::NoSpace { .. } => Code::ResourceExhausted,
        _ => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Arc};

    use hull_spec::{
        error::ObjectKind,
        field::{Field, Limit, MountField},
    };

    use super::*;

    #[test]
    fn the_clients_code_follows_the_kind_of_error() {
        let not_found = PodError::NotFound {
            object: ObjectKind::Sandbox,
            id: "abc".into(),
        };
        let undo = PodError::Undo {
            failure: Box::new(not_found.clone()),
            undo: Box::new(PodError::Internal {
                action: "remove directory".into(),
                source: Arc::new(io::Error::other("busy")),
            }),
        };
        let cases: [(CriError, Code); 9] = [
            (CriError::missing("config.metadata"), Code::InvalidArgument),
            (CriError::unsupported("Exec", "later"), Code::Unimplemented),
            (not_found.into(), Code::NotFound),
            (undo.into(), Code::NotFound),
            (
                PodError::DeadlineExceeded {
                    action: "exec".into(),
                    seconds: 1,
                }
                .into(),
                Code::DeadlineExceeded,
            ),
            (
                PullError::DigestMismatch {
                    what: "layer".into(),
                    expected: "a".into(),
                    actual: "b".into(),
                }
                .into(),
                Code::DataLoss,
            ),
            (
                PullError::RegistryUnavailable {
                    what: "blob".into(),
                    registry: "r".into(),
                    message: "reset".into(),
                }
                .into(),
                Code::Unavailable,
            ),
            (
                PullError::Store(StoreError::NoSpace {
                    action: "write".into(),
                })
                .into(),
                Code::ResourceExhausted,
            ),
            (StoreError::NotFound("x".into()).into(), Code::NotFound),
        ];
        for (error, expected) in cases {
            assert_eq!(status(&error).code(), expected, "{error:?}");
        }
    }

    #[test]
    fn a_command_that_could_not_be_executed_has_its_exit_code_beside_the_status() {
        let not_executed = PodError::NotExecuted {
            action: "start".into(),
            exit_code: 127,
            reason: "exec nope: not found".into(),
        };
        let undone = not_executed
            .clone()
            .after_undo(Err(PodError::precondition("undo it", "late")));
        for error in [not_executed, undone] {
            let status = status(&CriError::from(error).about("container web".into()));
            assert_eq!(status.code(), Code::FailedPrecondition);
            assert!(status.message().contains("start: exec nope: not found"));
            assert_eq!(status.metadata().get(EXIT_CODE).unwrap(), "127");
        }
        let other = status(&CriError::missing("config"));
        assert!(other.metadata().is_empty());
    }

    #[test]
    fn a_field_is_told_by_its_path_in_the_request() {
        let told = |error: PodError| status(&error.into()).message().to_owned();
        let mount = Field::Mount(3, MountField::Owners);
        assert_eq!(
            told(PodError::invalid(mount, "no")),
            "config.mounts[3].uidMappings: no"
        );
        let new = PodError::unsatisfiable(Field::NewLimit(Limit::Memory), "less");
        assert_eq!(told(new.clone()), "linux.memory_limit_in_bytes: less");
        let undone = new.after_undo(Err(PodError::precondition("undo it", "late")));
        assert_eq!(
            told(undone),
            "linux.memory_limit_in_bytes: less; and undoing it failed: undo it: late"
        );
        for (field, path) in [
            (
                Field::Limit(Limit::CpuQuota),
                "config.linux.resources.cpu_quota",
            ),
            (
                Field::Privileged,
                "config.linux.security_context.privileged",
            ),
            (
                Field::TargetContainer,
                "config.linux.security_context.namespace_options.target_id",
            ),
            (Field::ExecCommand, "cmd"),
        ] {
            assert_eq!(
                told(PodError::unimplemented(field, "no")),
                format!("{path}: no")
            );
        }
    }

    #[test]
    fn a_page_becomes_a_line_that_tells_what_and_why() {
        let page = format!("first\n\tsecond\u{7}\n{}", "and so on\n".repeat(1000));
        let error = CriError::from(PodError::Unavailable {
            action: page,
            source: Arc::new(io::Error::other("the reason\n")),
        });
        let status = status(&error.about("container web".into()));
        let text = status.message();
        assert_eq!(status.code(), Code::Unavailable);
        assert!(
            text.starts_with("container web: first second\u{fffd} and so on "),
            "{text}"
        );
        assert!(text.ends_with("and so on : the reason"), "{text}");
        assert_eq!(text.chars().count(), LONGEST);
    }

    #[test]
    fn the_text_tells_all_causes_once() {
        let error = CriError::from(PodError::Unavailable {
            action: "connect to the agent".into(),
            source: Arc::new(io::Error::other("connection reset")),
        });
        assert_eq!(
            status(&error).message(),
            "connect to the agent: connection reset"
        );
    }
}

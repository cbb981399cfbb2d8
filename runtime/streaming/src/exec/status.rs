//! How a command ended, as the client reads it: Kubernetes' `Status`, or plain text.

use serde::{Deserialize, Serialize};

use crate::backend::BackendError;

/// The reason in a status for an exit code that is not 0.
const NON_ZERO: &str = "NonZeroExitCode";
/// The cause that holds the code.
const EXIT_CODE: &str = "ExitCode";

/// How a command ended.
#[derive(Debug, Clone)]
pub(super) enum Outcome {
    Success,
    /// Its code is not 0.
    Code(u8),
    /// It did not run, or nobody knows how it ended.
    Failure(BackendError),
}

impl Outcome {
    pub(super) fn of_code(code: i32) -> Self {
        match code {
            0 => Self::Success,
            // Clients read one byte.
            code => Self::Code(u8::try_from(code).unwrap_or(u8::MAX)),
        }
    }
}

/// `metav1.Status`, as far as it is used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    metadata: serde_json::Map<String, serde_json::Value>,
    /// `Success` or `Failure`.
    pub status: String,
    /// What happened, for a person.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// What happened, for a program.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// More about the reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub details: Option<Details>,
    /// As of HTTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<u16>,
}

/// More about a reason.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Details {
    /// The causes.
    pub causes: Vec<Cause>,
}

impl Details {
    fn of_code(code: u8) -> Self {
        Self {
            causes: vec![Cause {
                reason: EXIT_CODE.into(),
                message: code.to_string(),
            }],
        }
    }
}

/// One cause.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cause {
    /// Its kind.
    pub reason: String,
    /// Its value.
    pub message: String,
}

impl Status {
    pub(super) fn new(outcome: Outcome) -> Self {
        let failure = Self {
            status: "Failure".into(),
            ..Self::default()
        };
        match outcome {
            Outcome::Success => Self {
                status: "Success".into(),
                ..Self::default()
            },
            Outcome::Code(code) => Self {
                message: format!("command terminated with non-zero exit code: {code}"),
                reason: NON_ZERO.into(),
                details: Some(Details::of_code(code)),
                ..failure
            },
            // Kubernetes' clients print the message, and look for no code beside this reason.
            Outcome::Failure(error) => Self {
                message: error.message,
                reason: "InternalError".into(),
                details: error.exit_code.map(Details::of_code),
                code: Some(500),
                ..failure
            },
        }
    }

    /// What goes over the error stream.
    pub(super) fn text(&self, json: bool) -> Vec<u8> {
        if json {
            // Texts and numbers: nothing that could fail.
            return serde_json::to_vec(self).unwrap_or_default();
        }
        self.message.clone().into_bytes()
    }

    /// The exit code, when the command ran to its end.
    #[cfg(any(test, feature = "client"))]
    #[must_use]
    pub fn exit_code(&self) -> Option<u8> {
        if self.status == "Success" {
            return Some(0);
        }
        self.cause().filter(|_| self.reason == NON_ZERO)
    }

    /// What a shell would end with, when the command could not be executed.
    #[cfg(any(test, feature = "client"))]
    #[must_use]
    pub fn not_executed(&self) -> Option<u8> {
        self.cause().filter(|_| self.reason != NON_ZERO)
    }

    #[cfg(any(test, feature = "client"))]
    fn cause(&self) -> Option<u8> {
        let causes = &self.details.as_ref()?.causes;
        let cause = causes.iter().find(|cause| cause.reason == EXIT_CODE)?;
        cause.message.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(outcome: Outcome) -> serde_json::Value {
        serde_json::from_slice(&Status::new(outcome).text(true)).unwrap()
    }

    #[test]
    fn a_status_is_what_kubernetes_clients_read() {
        assert_eq!(
            json(Outcome::Success),
            serde_json::json!({"metadata": {}, "status": "Success"})
        );
        assert_eq!(
            json(Outcome::of_code(3)),
            serde_json::json!({
                "metadata": {},
                "status": "Failure",
                "reason": "NonZeroExitCode",
                "message": "command terminated with non-zero exit code: 3",
                "details": {"causes": [{"reason": "ExitCode", "message": "3"}]},
            })
        );
        assert_eq!(
            json(Outcome::Failure(BackendError::new("no such container"))),
            serde_json::json!({
                "metadata": {},
                "status": "Failure",
                "reason": "InternalError",
                "message": "no such container",
                "code": 500,
            })
        );
    }

    #[test]
    fn a_command_that_could_not_be_executed_is_a_failure_with_a_code() {
        let failure = BackendError {
            exit_code: Some(127),
            ..BackendError::new("exec nope: not found")
        };
        let status = Status::new(Outcome::Failure(failure));
        assert_eq!(
            (status.exit_code(), status.not_executed()),
            (None, Some(127))
        );
        assert_eq!(status.text(false), b"exec nope: not found");
        let told: Status = serde_json::from_slice(&status.text(true)).unwrap();
        assert_eq!(
            (told.reason.as_str(), told.code),
            ("InternalError", Some(500))
        );
        assert_eq!(told, status);
        let ended = Status::new(Outcome::Code(127));
        assert_eq!((ended.exit_code(), ended.not_executed()), (Some(127), None));
    }

    #[test]
    fn old_clients_read_text_of_failures_only() {
        assert!(Status::new(Outcome::Success).text(false).is_empty());
        let text = Status::new(Outcome::Code(3)).text(false);
        assert_eq!(text, b"command terminated with non-zero exit code: 3");
    }

    #[test]
    fn a_code_that_is_no_byte_is_the_largest() {
        for code in [300, -1] {
            assert_eq!(Status::new(Outcome::of_code(code)).exit_code(), Some(255));
        }
    }
}

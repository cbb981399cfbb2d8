//! How a command ended, as the client reads it: Kubernetes' `Status`, or plain text.

use serde::{Deserialize, Serialize};

/// The reason in a status for an exit code that is not 0.
const NON_ZERO: &str = "NonZeroExitCode";
/// The cause that holds the code.
const EXIT_CODE: &str = "ExitCode";

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    Success,
    /// Its code is not 0.
    Code(u8),
    /// It did not run, or nobody knows how it ended.
    Failure(String),
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
                details: Some(Details {
                    causes: vec![Cause {
                        reason: EXIT_CODE.into(),
                        message: code.to_string(),
                    }],
                }),
                ..failure
            },
            Outcome::Failure(message) => Self {
                message,
                reason: "InternalError".into(),
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
            json(Outcome::Failure("no such container".into())),
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
    fn old_clients_read_text_of_failures_only() {
        assert!(Status::new(Outcome::Success).text(false).is_empty());
        let text = Status::new(Outcome::Code(3)).text(false);
        assert_eq!(text, b"command terminated with non-zero exit code: 3");
    }

    #[test]
    fn a_code_that_is_no_byte_is_the_largest() {
        assert_eq!(Outcome::of_code(300), Outcome::Code(255));
        assert_eq!(Outcome::of_code(-1), Outcome::Code(255));
    }
}

//! Why a command could not be executed, as a shell's exit code: the detail of a status.

use protobuf::Message;
use ttrpc::proto::{Any, Status};

use crate::agent::NotExecuted;

/// A shell's exit codes for what is no program, and for what is not there.
const CODES: std::ops::RangeInclusive<u32> = 126..=127;

/// Adds the exit code to the status of a failure, if it is one of them.
pub fn tell(status: &mut Status, exit_code: i32) {
    let code = u32::try_from(exit_code).ok();
    let Some(exit_code) = code.filter(|code| CODES.contains(code)) else {
        return;
    };
    let detail = NotExecuted {
        exit_code,
        ..NotExecuted::default()
    };
    // A number can be encoded.
    if let Ok(value) = detail.write_to_bytes() {
        status.details.push(Any {
            type_url: NotExecuted::NAME.to_owned(),
            value,
            ..Any::default()
        });
    }
}

/// The exit code in a status, if it has one of them.
#[must_use]
pub fn exit_code(status: &Status) -> Option<u8> {
    let mut details = status.details.iter();
    let detail = details.find(|detail| detail.type_url == NotExecuted::NAME)?;
    let code = NotExecuted::parse_from_bytes(&detail.value).ok()?.exit_code;
    CODES.contains(&code).then(|| u8::try_from(code).ok())?
}

#[cfg(test)]
mod tests {
    use ttrpc::{Code, get_status};

    use super::*;

    #[test]
    fn a_status_has_the_codes_of_a_shell_and_no_others() {
        for (told, heard) in [
            (126, Some(126)),
            (127, Some(127)),
            (128, None),
            (0, None),
            (-1, None),
        ] {
            let mut status = get_status(Code::FAILED_PRECONDITION, "exec x");
            tell(&mut status, told);
            assert_eq!(exit_code(&status), heard, "{told}");
        }
        let mut status = get_status(Code::FAILED_PRECONDITION, "exec x");
        tell(&mut status, 126);
        // A hostile guest's.
        status.details[0].value = vec![8, 3];
        assert_eq!(exit_code(&status), None);
        status.details[0].value = vec![0xff; 9];
        assert_eq!(exit_code(&status), None);
    }
}

//! A container's processes as its guest tells them, made safe: the list is cut, text is printable, numbers are
//! those that there can be.

use hull_proto_agent::agent::{self as message, ProcessesResponse};

use hull_base::printable::one_line;
use hull_spec::stats::{ProcessInfo, Processes};

/// Most processes that are kept.
const LIST: usize = 1024;
/// Longest command that is kept, in characters.
const COMMAND: usize = 512;
/// What no guest reaches, in pids, milliseconds and bytes.
const MOST: u64 = 1 << 53;

/// Checks an answer.
pub(super) fn checked(response: &ProcessesResponse) -> Processes {
    let told = response.processes.len();
    let more = u64::try_from(told.saturating_sub(LIST)).unwrap_or(MOST);
    Processes {
        processes: response.processes.iter().take(LIST).map(process).collect(),
        left_out: response.left_out.min(MOST).saturating_add(more),
    }
}

fn process(told: &message::ProcessInfo) -> ProcessInfo {
    let state = told.state.chars().next();
    ProcessInfo {
        pid: told.pid,
        parent: told.parent,
        uid: told.uid,
        state: state.filter(char::is_ascii_alphabetic).unwrap_or('?'),
        cpu_ms: told.cpu_ms.min(MOST),
        memory_bytes: told.memory_bytes.min(MOST),
        age_ms: told.age_ms.min(MOST),
        command: one_line(&told.command, COMMAND),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_makes_up_is_cut_and_tame() {
        let lie = message::ProcessInfo {
            state: "\u{1b}".into(),
            cpu_ms: u64::MAX,
            memory_bytes: u64::MAX,
            age_ms: u64::MAX,
            command: "a\n\u{1b}[2J".repeat(1000),
            ..message::ProcessInfo::default()
        };
        let told = checked(&ProcessesResponse {
            processes: vec![lie; LIST + 3],
            left_out: u64::MAX,
            ..ProcessesResponse::default()
        });
        assert_eq!((told.processes.len(), told.left_out), (LIST, MOST + 3));
        let process = &told.processes[0];
        assert_eq!((process.state, process.cpu_ms), ('?', MOST));
        assert!(process.command.chars().count() <= COMMAND);
        assert!(!process.command.contains(char::is_control));
    }
}

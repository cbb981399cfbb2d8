//! Exit codes, for scripts and the service manager: those of sysexits.h where one fits.

use std::io;

use hull_streaming::StartError;
use tonic::Code;

use crate::{
    app::AppError,
    client::{NoDaemon, Refusal},
    config::ConfigError,
    containers::NotToBeEntered,
    cri::UNTRUSTED,
    host::HostIncomplete,
    socket::SocketError,
};

/// Of what has no code of its own.
pub(crate) const FAILURE: u8 = 1;
/// We failed, where other codes are the container's or command's (as docker-run(1) has it).
const OWN_FAILURE: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NO_COMMAND: u8 = 127;
/// Nobody reads our output any more: as if SIGPIPE had ended us.
const NO_READER: u8 = 141;

const NO_DAEMON: u8 = 69;
const HOST_INCOMPLETE: u8 = 71;
const NO_NETWORK: u8 = 72;
const STORES: u8 = 74;
const TAKEN: u8 = 75;
const NOT_LET_IN: u8 = 77;
const CONFIGURATION: u8 = 78;

/// All exit codes, with what they say.
pub const EXIT_CODES: &[(u8, &str)] = &[
    (0, "Done. hull check: this host can run microVMs."),
    (FAILURE, "It failed in another way than those below."),
    (2, "The command line makes no sense."),
    (
        NO_DAEMON,
        "No daemon serves the socket, and the command needs one.",
    ),
    (
        HOST_INCOMPLETE,
        "hull check: this host lacks something, or something of it.",
    ),
    (
        NO_NETWORK,
        "hull check: this host lacks a network for pods (CNI), and nothing else.",
    ),
    (
        STORES,
        "hull serve: the records of images or pods can't be opened.",
    ),
    (
        TAKEN,
        "hull serve: another process has the directories, the socket or the streaming port.",
    ),
    (
        NOT_LET_IN,
        "hull pull and login: the registry does not let this user in.",
    ),
    (
        UNTRUSTED,
        "hull pull and login: the registry's certificate is not trusted, as when it expired.",
    ),
    (
        CONFIGURATION,
        "The configuration is wrong. hull debug: the pod was started without vm.debug.",
    ),
    (
        OWN_FAILURE,
        "hull run, exec and attach: it failed before the container or command did; other codes are theirs.",
    ),
    (
        NOT_EXECUTABLE,
        "hull run and exec: the command can't be executed.",
    ),
    (NO_COMMAND, "hull run and exec: there is no such command."),
    (NO_READER, "Nobody reads the output any more."),
];

/// The code of an error.
pub(crate) fn code(error: &anyhow::Error) -> u8 {
    if lost_reader(error) {
        return NO_READER;
    }
    if error.is::<NoDaemon>() {
        return NO_DAEMON;
    }
    let codes = error.chain().find_map(|cause| {
        if cause.is::<ConfigError>() || cause.is::<NotToBeEntered>() {
            return Some(CONFIGURATION);
        }
        if let Some(incomplete) = cause.downcast_ref::<HostIncomplete>() {
            let code = if incomplete.network_alone {
                NO_NETWORK
            } else {
                HOST_INCOMPLETE
            };
            return Some(code);
        }
        if let Some(refusal) = cause.downcast_ref::<Refusal>() {
            return match refusal.code {
                Code::PermissionDenied => Some(NOT_LET_IN),
                _ => refusal.exit_code.filter(|code| *code == UNTRUSTED),
            };
        }
        of_start(cause.downcast_ref::<AppError>()?)
    });
    codes.unwrap_or(FAILURE)
}

/// The code of an error where others are the container's or command's.
pub(crate) fn code_of_command(error: &anyhow::Error) -> u8 {
    if lost_reader(error) {
        return NO_READER;
    }
    let mut causes = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<Refusal>());
    let code = causes.find_map(|refusal| refusal.exit_code);
    let of_command = code.filter(|code| [NOT_EXECUTABLE, NO_COMMAND].contains(code));
    of_command.unwrap_or(OWN_FAILURE)
}

fn of_start(error: &AppError) -> Option<u8> {
    match error {
        AppError::Socket(SocketError::Locked { .. } | SocketError::Served(_))
        | AppError::Streaming(StartError::Listen { .. })
        | AppError::Metrics(_) => Some(TAKEN),
        AppError::Images(_) | AppError::Pods(_) => Some(STORES),
        AppError::Streaming(StartError::Tls(_)) | AppError::Traces(_) => Some(CONFIGURATION),
        AppError::Socket(_) | AppError::Serve(_) => None,
    }
}

/// Whether the error is that nobody reads our output.
pub(crate) fn lost_reader(error: &anyhow::Error) -> bool {
    let mut causes = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use anyhow::Context;
    use tonic::Status;

    use super::*;
    use crate::client::refused;

    #[test]
    fn a_command_that_could_not_be_executed_has_a_shells_code() {
        let refusal = |exit_code| Refusal {
            message: "start".into(),
            code: Code::FailedPrecondition,
            exit_code,
        };
        for (error, wanted) in [
            (refusal(Some(126)).into(), NOT_EXECUTABLE),
            (
                anyhow::Error::new(refusal(Some(127))).context("also"),
                NO_COMMAND,
            ),
            (refusal(None).into(), OWN_FAILURE),
            (refusal(Some(UNTRUSTED)).into(), OWN_FAILURE),
            (anyhow::anyhow!("else"), OWN_FAILURE),
            (io::Error::from(io::ErrorKind::BrokenPipe).into(), NO_READER),
        ] {
            assert_eq!(code_of_command(&error), wanted, "{error:#}");
            assert!(EXIT_CODES.iter().any(|(listed, _)| *listed == wanted));
        }
    }

    #[test]
    fn errors_have_codes_that_are_listed() {
        let locked = AppError::Socket(SocketError::Locked {
            path: "/x".into(),
            pid: "1".into(),
        });
        let no_daemon = Err::<(), _>(anyhow::anyhow!("connect")).context(NoDaemon("/x".into()));
        for (error, wanted) in [
            (anyhow::Error::new(locked).context("start"), TAKEN),
            (no_daemon.unwrap_err(), NO_DAEMON),
            (anyhow::anyhow!("else"), FAILURE),
            (refused("pull")(Status::permission_denied("no")), NOT_LET_IN),
            (refused("pull")(Status::not_found("no")), FAILURE),
            (io::Error::from(io::ErrorKind::BrokenPipe).into(), NO_READER),
        ] {
            assert_eq!(code(&error), wanted, "{error:#}");
            assert!(EXIT_CODES.iter().any(|(listed, _)| *listed == wanted));
        }
    }
}

//! What goes into a container that is waited for, and what comes out.
//!
//! Without a terminal its output is read from its log, which loses nothing however slowly we are read.
//! With one it comes by a connection, as does the input in both cases. That is made before the container
//! starts, so that nothing is missed.

use std::{fs::File, io, os::fd::AsFd, os::unix::fs::FileTypeExt};

use hull_streaming::client::Wants;

use super::{arguments::RunArgs, request::Input};

/// Whether our input is the container's: when that is asked for, and when it was made for it.
pub(super) fn passes_input(arguments: &RunArgs) -> bool {
    !arguments.detach && (arguments.interactive || (!arguments.tty && is_made_for_it()))
}

/// Whether standard input is a pipe or a file.
fn is_made_for_it() -> bool {
    let stdin = io::stdin().as_fd().try_clone_to_owned().map(File::from);
    let kind = stdin.and_then(|stdin| stdin.metadata());
    kind.is_ok_and(|kind| kind.is_file() || kind.file_type().is_fifo())
}

/// The container's input.
pub(super) fn input(arguments: &RunArgs, passes: bool) -> Input {
    match (passes, arguments.tty) {
        (true, false) => Input::Once,
        // It may be detached from and attached to again.
        (true, true) => Input::Kept,
        (false, _) if arguments.interactive => Input::Kept,
        (false, _) => Input::None,
    }
}

/// What a connection is needed for; none if for nothing.
pub(super) fn wants(arguments: &RunArgs, passes: bool) -> Option<Wants> {
    let needed = !arguments.detach && (arguments.tty || passes);
    needed.then_some(Wants {
        stdin: passes,
        stdout: arguments.tty,
        stderr: false,
        tty: arguments.tty,
    })
}

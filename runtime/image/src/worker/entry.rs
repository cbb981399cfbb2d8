//! The main function of a worker's process.

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::process::ExitCode;

use super::control::Control;
use super::jail::{self, Bounds};
use super::job::Failure;
use super::serve::serve;

/// The first argument of such a process; not for people.
pub(crate) const COMMAND: &str = "image-worker";

/// Is the process that the image store starts for what strangers chose; `None` in any other.
///
/// It has to be called before there is a second thread: it locks the calling one in. The job comes by
/// the socket that is the standard input.
pub fn worker(arguments: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let mut arguments = arguments.into_iter().skip(1);
    if arguments.next()? != COMMAND {
        return None;
    }
    // Nobody reads it, and what it prints may take calls that are not allowed.
    std::panic::set_hook(Box::new(|_| ()));
    Some(match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    })
}

fn run(mut arguments: impl Iterator<Item = OsString>) -> io::Result<()> {
    let name = arguments.next().unwrap_or_default();
    let mut number = || {
        let number = arguments.next().and_then(|text| text.into_string().ok());
        number.and_then(|text| text.parse::<u64>().ok())
    };
    let bounds = Bounds {
        user: number().and_then(|user| user.try_into().ok()).unwrap_or(0),
        memory: number().unwrap_or(0),
        file_size: number().unwrap_or(0),
    };
    hull_jail::close_others().map_err(io::Error::other)?;
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    if let Err(error) = jail::enter(&name, &bounds) {
        let reason = error_reporter::Report::new(error).to_string();
        let failure = Failure::NotLockedIn(reason).shown();
        let answer = postcard::to_stdvec(&Err::<(), _>(failure)).map_err(io::Error::other)?;
        return Control::new(socket).answer(&answer);
    }
    serve(socket)
}

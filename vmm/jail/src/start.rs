//! Processes that are alone in a pid namespace.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::process::{Child, Command};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// Starts a process that is the first in a new pid namespace: it sees, and can signal, no other, and
/// all that it starts ends with it. The caller may have other threads.
///
/// # Errors
/// When the process, or the namespace, can't be made.
pub fn start_apart(command: &mut Command) -> io::Result<Child> {
    // What children get is the thread's own matter, and is put back, for its further children.
    let before = File::open("/proc/thread-self/ns/pid_for_children")?;
    // SAFETY: the table of file descriptors is not unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }?;
    let started = command.spawn();
    let back = move_into_link_name_space(before.as_fd(), Some(LinkNameSpaceType::ProcessID));
    match (started, back) {
        (started, Ok(())) => started,
        (started, Err(error)) => {
            if let Ok(mut child) = started {
                child.kill()?;
                child.wait()?;
            }
            // The thread can start neither threads nor processes of the daemon's now.
            Err(error.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    #[test]
    fn a_process_is_alone_and_its_starter_stays_where_it_was() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: make a pid namespace: run as root");
            return;
        }
        let pid = |start: fn(&mut Command) -> io::Result<Child>| {
            let mut command = Command::new("sh");
            let child = start(command.args(["-c", "echo $$"]).stdout(Stdio::piped()));
            let output = child.unwrap().wait_with_output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        for _ in 0..3 {
            assert_eq!(pid(start_apart), "1\n");
            assert_ne!(pid(Command::spawn), "1\n");
            // A thread can't be made for another pid namespace.
            std::thread::spawn(|| ()).join().unwrap();
        }
    }
}

//! Locks of files: flock(2), fcntl(2).

use std::{
    env,
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    path::Path,
    process::{Child, Command, Stdio},
};

use nix::{
    fcntl::{FcntlArg, Flock, FlockArg, fcntl},
    libc,
};
use rustix::io::Errno;

use crate::place::Place;

/// A process that holds a lock.
#[derive(Debug)]
pub struct Holder(Child);

impl Holder {
    /// Has it let go.
    pub fn end(&mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().unwrap().success());
    }
}

/// Starts `program`, this one, to hold a lock on a file.
pub fn holder(program: &Path, file: &Path) -> Holder {
    let mut command = Command::new(program);
    command.arg("hold").arg(file);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    let output = child.stdout.as_mut().unwrap();
    BufReader::new(output).read_line(&mut line).unwrap();
    assert_eq!(line, "held\n");
    Holder(child)
}

/// What it does.
pub fn hold(path: &Path) {
    let file = open(path);
    fcntl(&file, FcntlArg::F_SETLK(&range(libc::F_WRLCK, 0, 0))).unwrap();
    println!("held");
    io::stdout().flush().unwrap();
    io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

fn open(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).open(path).unwrap()
}

fn range(kind: libc::c_int, start: i64, length: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: length,
        l_pid: 0,
    }
}

fn raw(error: nix::Error) -> i32 {
    error as i32
}

pub fn whole_file_locks_exclude(place: &Place) {
    let path = place.file("f", "");
    let lock = |how| {
        let locked = Flock::lock(open(&path), how);
        locked.map_err(|(_, error)| raw(error))
    };
    let busy = Some(Errno::WOULDBLOCK.raw_os_error());
    let first = lock(FlockArg::LockSharedNonblock).unwrap();
    let second = lock(FlockArg::LockSharedNonblock).unwrap();
    assert_eq!(lock(FlockArg::LockExclusiveNonblock).err(), busy);
    drop(second);
    // The one that holds it may have more of it.
    let file = first.unlock().unwrap();
    let exclusive = Flock::lock(file, FlockArg::LockExclusiveNonblock);
    let exclusive = exclusive.map_err(|(_, error)| error).unwrap();
    assert_eq!(lock(FlockArg::LockSharedNonblock).err(), busy);
    // They are apart from those of processes.
    let whole = range(libc::F_WRLCK, 0, 0);
    fcntl(open(&path), FcntlArg::F_SETLK(&whole)).unwrap();
    drop(exclusive);
    lock(FlockArg::LockExclusiveNonblock).unwrap();
}

pub fn process_locks_exclude_other_processes(place: &Place) {
    let path = place.file("f", "text");
    let file = open(&path);
    let mut other = holder(&env::current_exe().unwrap(), &path);
    let refused = fcntl(&file, FcntlArg::F_SETLK(&range(libc::F_RDLCK, 1, 1)));
    assert_eq!(refused.map_err(raw), Err(Errno::WOULDBLOCK.raw_os_error()));
    let mut who = range(libc::F_WRLCK, 0, 0);
    fcntl(&file, FcntlArg::F_GETLK(&mut who)).unwrap();
    assert_eq!(i32::from(who.l_type), libc::F_WRLCK);
    assert_eq!(who.l_pid.cast_unsigned(), other.0.id());
    // Advisory: reading goes on.
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "text");
    other.end();
    fcntl(&file, FcntlArg::F_SETLK(&range(libc::F_WRLCK, 0, 0))).unwrap();
}

pub fn process_locks_go_with_any_descriptor(place: &Place) {
    let path = place.file("f", "");
    let file = open(&path);
    let mine = range(libc::F_WRLCK, 0, 0);
    fcntl(&file, FcntlArg::F_SETLK(&mine)).unwrap();
    drop(open(&path));
    holder(&env::current_exe().unwrap(), &path).end();
}

pub fn description_locks_exclude_by_range(place: &Place) {
    let path = place.file("f", "0123456789");
    let (one, two) = (open(&path), open(&path));
    let set = |file: &File, lock: libc::flock| fcntl(file, FcntlArg::F_OFD_SETLK(&lock));
    let busy = Err(Errno::WOULDBLOCK.raw_os_error());
    set(&one, range(libc::F_WRLCK, 0, 4)).unwrap();
    set(&two, range(libc::F_WRLCK, 4, 4)).unwrap();
    let overlapping = range(libc::F_RDLCK, 3, 2);
    assert_eq!(set(&two, overlapping).map_err(raw), busy);
    set(&one, range(libc::F_UNLCK, 2, 2)).unwrap();
    set(&two, overlapping).unwrap();
    let mut who = range(libc::F_WRLCK, 0, 0);
    fcntl(&two, FcntlArg::F_OFD_GETLK(&mut who)).unwrap();
    assert_eq!((who.l_start, who.l_len, who.l_pid), (0, 2, -1));
    drop(one);
    set(&two, range(libc::F_WRLCK, 0, 0)).unwrap();
}

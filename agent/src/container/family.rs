//! What a command started. A command has no cgroup that would tell, since it runs in its container's, as
//! commands expect: limits and controllers that it looks for are those of the container.
//!
//! A process is of a command's family when its parent is, or when its session began in the family, so that a
//! child is found whose parent has ended. A daemon that began a session of its own and whose parents have ended
//! has left the family, as it would with any runtime.

use std::{
    collections::{HashMap, HashSet},
    io,
};

use nix::unistd::Pid;

use super::cgroup::Cgroup;
use crate::pidfd::{Process, Stat};

/// Kills the family of `first`; `cgroup` is their container's.
pub(super) fn kill(first: &Process, cgroup: &Cgroup) -> io::Result<()> {
    // So nobody starts processes faster than they are found. Whoever is killed dies frozen or not.
    cgroup.freeze(true)?;
    let killed = kill_all(first, cgroup);
    let thawed = cgroup.freeze(false);
    killed.and(thawed)
}

fn kill_all(first: &Process, cgroup: &Cgroup) -> io::Result<()> {
    let mut family = Family::of(first);
    let mut killed = HashSet::new();
    // Who was in the middle of a fork has one more child, and can't have another.
    loop {
        let mut more = false;
        for (process, stat) in relatives(&mut family, first, cgroup)? {
            more |= killed.insert((process.pid(), stat.started));
            process.signal(libc::SIGKILL)?;
        }
        if !more {
            return Ok(());
        }
    }
}

/// Sends `signal` to the family of `first`, as [`kill`] has it.
pub(super) fn signal(first: &Process, cgroup: &Cgroup, signal: i32) -> io::Result<()> {
    if signal == libc::SIGKILL {
        return kill(first, cgroup);
    }
    for (process, _) in relatives(&mut Family::of(first), first, cgroup)? {
        process.signal(signal)?;
    }
    Ok(())
}

/// The processes of a container that are of the family of `first`.
fn relatives(
    family: &mut Family,
    first: &Process,
    cgroup: &Cgroup,
) -> io::Result<Vec<(Process, Stat)>> {
    let all = cgroup.members()?.into_iter();
    // Who is gone meanwhile is none.
    let mut known: Vec<_> = all.filter_map(|p| p.stat().ok().map(|s| (p, s))).collect();
    let stats: HashMap<_, _> = known.iter().map(|(p, stat)| (p.pid(), *stat)).collect();
    if stats.contains_key(&first.pid()) && !first.is_there() {
        // Its pid is another's, which it would not be if a session still had it.
        return Ok(Vec::new());
    }
    let members = family.members(&stats);
    known.retain(|(process, _)| members.contains_key(&process.pid()));
    Ok(known)
}

struct Family {
    first: Pid,
    /// Those that began in it.
    sessions: HashSet<Pid>,
}

impl Family {
    fn of(first: &Process) -> Self {
        Self {
            first: first.pid(),
            // A command begins with a session of its own.
            sessions: HashSet::from([first.pid()]),
        }
    }

    /// Returns who of `all` is in it, and learns of its sessions.
    fn members(&mut self, all: &HashMap<Pid, Stat>) -> HashMap<Pid, Stat> {
        let mut members = HashMap::new();
        loop {
            let before = members.len();
            for (pid, stat) in all {
                let is_member = *pid == self.first
                    || members.contains_key(&stat.parent)
                    || self.sessions.contains(&stat.session);
                if is_member && members.insert(*pid, *stat).is_none() && stat.session == *pid {
                    self.sessions.insert(*pid);
                }
            }
            if members.len() == before {
                return members;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_and_sessions_make_a_family() {
        let process = |pid, parent, session| {
            let stat = Stat {
                parent: Pid::from_raw(parent),
                session: Pid::from_raw(session),
                started: 0,
                state: 'S',
                used: 0,
                pages: 0,
            };
            (Pid::from_raw(pid), stat)
        };
        let mut family = Family {
            first: Pid::from_raw(10),
            sessions: HashSet::from([Pid::from_raw(10)]),
        };
        let mut members = |all: &[_]| {
            let found = family.members(&all.iter().copied().collect());
            let mut pids: Vec<_> = found.keys().map(|pid| pid.as_raw()).collect();
            pids.sort_unstable();
            pids
        };
        let all = [
            process(1, 0, 1),
            process(2, 1, 1),
            process(10, 1, 10),
            process(13, 12, 12),
            process(12, 11, 12),
            process(11, 10, 10),
            // Their parents have ended.
            process(14, 1, 10),
            process(15, 1, 12),
            // A daemon.
            process(16, 1, 16),
        ];
        assert_eq!(members(&all), [10, 11, 12, 13, 14, 15]);
        // What began in it stays known when all that told of it is gone.
        assert_eq!(members(&[process(1, 0, 1), process(15, 1, 12)]), [15]);
    }
}

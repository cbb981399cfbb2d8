//! What making a process costs the guest, as the kernel's trace events tell: processes, programs, system calls.

use std::{fs, path::Path};

use crate::{
    agent_tests,
    harness::{Agent, container_with, spec, unable},
};

/// Where the kernel's events are.
const TRACING: &str = "/sys/kernel/tracing";

/// Events of one process and of all that come from it; they end with it.
struct Trace;

impl Trace {
    /// Says why there is none.
    fn of(pid: i32) -> Result<Self, String> {
        let write = |file: &str, text: &str| {
            let written = fs::write(Path::new(TRACING).join(file), text);
            written.map_err(|e| format!("{TRACING}/{file}: {e}"))
        };
        let trace = Self;
        write("tracing_on", "0")?;
        write("buffer_size_kb", "16384")?;
        write("options/event-fork", "1")?;
        // The threads that the agent has; it has the events of those to come.
        let threads = fs::read_dir(format!("/proc/{pid}/task")).map_err(|e| e.to_string())?;
        let threads = threads.flatten().map(|t| t.file_name().into_string());
        let threads: Vec<_> = threads.flatten().collect();
        write("set_event_pid", &threads.join(" "))?;
        for event in Self::EVENTS {
            write(&format!("events/{event}/enable"), "1")?;
        }
        Ok(trace)
    }

    const EVENTS: [&str; 3] = [
        "task/task_newtask",
        "sched/sched_process_exec",
        "raw_syscalls/sys_enter",
    ];

    fn begin(&self) {
        fs::write(Path::new(TRACING).join("trace"), "").unwrap();
        fs::write(Path::new(TRACING).join("tracing_on"), "1").unwrap();
    }

    fn end(&self) -> Cost {
        fs::write(Path::new(TRACING).join("tracing_on"), "0").unwrap();
        let text = fs::read_to_string(Path::new(TRACING).join("trace")).unwrap();
        Cost::of(&text)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let write = |file: &str, text: &str| fs::write(Path::new(TRACING).join(file), text);
        for event in Self::EVENTS {
            let _ = write(&format!("events/{event}/enable"), "0");
        }
        let _ = write("options/event-fork", "0");
        let _ = write("set_event_pid", "");
        let _ = write("trace", "");
        let _ = write("tracing_on", "1");
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct Cost {
    forks: usize,
    execs: usize,
    /// All until the container's program has ended.
    calls: usize,
}

impl Cost {
    fn of(text: &str) -> Self {
        const THREAD: u64 = 0x10000;
        let mut cost = Self::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if line.contains(": sys_enter: ") {
                cost.calls += 1;
            } else if line.contains(": sched_process_exec: ") {
                cost.execs += 1;
            } else if let Some((_, flags)) = line.split_once("clone_flags=") {
                let flags = flags.split(' ').next().unwrap();
                let flags = u64::from_str_radix(flags, 16).unwrap();
                cost.forks += usize::from(flags & THREAD == 0);
            }
        }
        cost
    }
}

fn middle(mut costs: Vec<Cost>) -> Cost {
    costs.sort_by_key(|cost| cost.calls);
    costs[costs.len() / 2]
}

agent_tests! {
    /// A helper that makes the process, and the process; each executes one program.
    async fn a_process_takes_two_forks_and_two_programs(agent) {
        let trace = match Trace::of(agent.init()) {
            Ok(trace) => trace,
            Err(why) => {
                println!("SKIPPED: a_process_takes_two_forks_and_two_programs: {why}");
                return;
            }
        };
        let mut starts = Vec::new();
        for n in 0..5 {
            let id = format!("s{n}");
            trace.begin();
            agent.create(&container_with(&id, &spec(&["true"]))).await;
            agent.start_container(&id).await.unwrap();
            agent.exited(&id, "").await;
            starts.push(trace.end());
            agent.delete(&id).await;
        }
        agent.run("c1", "sleep 1000").await;
        let mut execs = Vec::new();
        for n in 0..5 {
            trace.begin();
            let (output, _) = agent.exec_sync("c1", &format!("e{n}"), "echo x").await;
            execs.push(trace.end());
            assert_eq!(output, "x\n");
        }
        agent.delete("c1").await;
        let (start, exec) = (middle(starts), middle(execs));
        println!("COST: a container's start: {start:?}; an exec: {exec:?}");
        assert_eq!((start.forks, start.execs), (2, 2));
        assert_eq!((exec.forks, exec.execs), (2, 2));
    }
}

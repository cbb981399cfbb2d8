//! Something that runs by itself: the daemon, a VM, kubelet. Each has a runtime of its own, and so a clock,
//! timers and descriptors; all are driven by one thread, some polls at a time.

use std::{future::poll_fn, task::Poll, time::Duration};

use tokio::runtime::{Builder, Handle, Runtime};

use crate::kernel::{self, Who};

/// What a slice has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ran {
    /// How many tasks were polled, about: looking for events counts too.
    pub polls: u64,
    /// Whether nothing can go on before time passes or another host does something.
    pub is_idle: bool,
}

/// One of those that run.
#[derive(Debug)]
pub struct Host {
    runtime: Runtime,
    who: Who,
}

impl Host {
    pub fn new(who: Who) -> Self {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            // The kernel is asked for events after each poll of a task, and there counts them.
            .event_interval(1)
            .on_thread_park(kernel::idle)
            .build();
        Self {
            runtime: runtime.unwrap(),
            who,
        }
    }

    pub fn handle(&self) -> &Handle {
        self.runtime.handle()
    }

    /// Runs for at most so many polls.
    pub fn run(&self, polls: u64) -> Ran {
        self.slice(polls, Duration::ZERO)
    }

    /// Lets time pass.
    pub fn advance(&self, time: Duration) {
        self.slice(1, time);
    }

    fn slice(&self, polls: u64, time: Duration) -> Ran {
        kernel::run_as(self.who, || {
            kernel::begin_slice(polls);
            self.runtime.block_on(async {
                if !time.is_zero() {
                    // It yields, which is the one poll.
                    tokio::time::advance(time).await;
                }
                poll_fn(|context| match kernel::is_slice_over(context.waker()) {
                    true => Poll::Ready(()),
                    false => Poll::Pending,
                })
                .await;
            });
            let (left, is_idle) = kernel::end_slice();
            Ran {
                polls: polls.saturating_sub(left),
                is_idle,
            }
        })
    }

    /// Ends it as SIGKILL does: its tasks are dropped where they are.
    pub fn kill(self) {
        let Self { runtime, who } = self;
        kernel::run_as(who, || drop(runtime));
    }
}

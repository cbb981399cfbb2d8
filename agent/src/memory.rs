//! The guest's memory: how much of it containers may use, and how much of it there is.
//!
//! All containers together may use all but a reserve (`memory.max` of the cgroup above them), as there is memory
//! at the moment. A guest that may grow has `memory.high` some way below, where the kernel makes who allocates
//! wait instead of killing somebody, and tells. The agent then asks the VMM for more, by asking for a vsock
//! connection to a port whose number says how much ([`MEMORY_PORT`]): no daemon has to be there for it. The
//! VMM refuses the connection in any case, and gives as much as the host allows; it shows in `MemTotal`.
//!
//! ```text
//! little is available ─▶ twice as much is wanted ─▶ it comes ─▶ again, while little is available
//!                                                └▶ it does not: `memory.high` goes for a while, and the
//!                                                   kernel kills at `memory.max`, as at any limit
//! much is available for a while ─▶ less is wanted
//! ```
//! Nothing runs while nothing changes and the guest has no more than it began with.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hull_proto_agent::MEMORY_PORT;
use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink, recv, socket_with,
};
use tokio::{
    io::Interest,
    sync::Notify,
    time::{Instant, sleep, timeout},
};
use tokio_vsock::{VsockAddr, VsockStream};
use tracing::{info, warn};

use crate::{boot, sys};

const MIB: u64 = 1 << 20;
/// What the guest's kernel adds and removes at a time.
const BLOCK: u64 = 128 * MIB;
/// Memory that containers cannot take from the agent and the kernel, of which memory that is added takes some.
const RESERVE: u64 = 24 * MIB;
/// How far below their limit containers are made to wait.
const HEADROOM: u64 = 32 * MIB;
/// Little is available: a quarter of the memory, within these.
const MARGIN: (u64, u64) = (48 * MIB, 256 * MIB);
/// How long memory that is wanted may take to come.
const COMES: Duration = Duration::from_secs(2);
/// How long none is asked for after it did not, at first and at most: twice as long each time.
const REFUSED: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));
/// How often the memory is looked at while it changes.
const QUICK: Duration = Duration::from_millis(50);
/// How often it is looked at while the guest has more than it began with.
const SLOW: Duration = Duration::from_secs(5);
/// How long much is available before some is given back.
const CALM: Duration = Duration::from_secs(10);
/// How long a refusal may take.
const TELL: Duration = Duration::from_secs(1);
/// The kernel's group of netlink for events of devices.
const UEVENTS: u32 = 1;

/// What `/proc/meminfo` tells, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Look {
    total: u64,
    available: u64,
    /// In huge pages, which limits of memory don't count.
    huge: u64,
}

impl Look {
    fn parse(text: &str) -> Option<Self> {
        Some(Self {
            total: boot::meminfo(text, "MemTotal")?,
            available: boot::meminfo(text, "MemAvailable")?,
            huge: boot::meminfo(text, "Hugetlb").unwrap_or(0),
        })
    }

    fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/meminfo").ok()?)
    }

    /// Returns how much is to be available.
    fn margin(&self) -> u64 {
        (self.total / 4).clamp(MARGIN.0, MARGIN.1)
    }

    /// Returns the most that containers may use, and where they are made to wait.
    fn limits(&self) -> (u64, u64) {
        let reserve = RESERVE.min(self.total / 4) + self.huge;
        let headroom = HEADROOM.min(self.total / 8);
        let most = self.total.saturating_sub(reserve);
        (most, most.saturating_sub(headroom))
    }
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Step {
    /// So many bytes beside those of the start are to be asked for.
    ask: Option<u64>,
    /// Containers are to wait when they come near their limit.
    throttle: bool,
    /// When to look again; none: when something happens.
    again: Option<Duration>,
}

/// Memory that was asked for and did not come.
#[derive(Debug, Clone, Copy)]
struct Refusal {
    /// Until when none is asked for.
    until: Instant,
    /// How long that is.
    pause: Duration,
    /// How much there was.
    total: u64,
}

/// Decides how much memory the guest wants.
#[derive(Debug)]
struct Growth {
    /// How much there was at the start, in bytes.
    first: u64,
    /// What was asked for last, beside that.
    wanted: u64,
    /// How much there was when last seen.
    total: u64,
    /// When that changed, or more was asked for.
    moved: Instant,
    /// Set when none came.
    refused: Option<Refusal>,
    /// Since when much is available.
    calm: Option<Instant>,
}

impl Growth {
    fn new(first: u64, now: Instant) -> Self {
        Self {
            first,
            wanted: 0,
            total: first,
            moved: now,
            refused: None,
            calm: None,
        }
    }

    fn step(&mut self, look: Look, now: Instant) -> Step {
        if look.total != self.total {
            (self.total, self.moved) = (look.total, now);
        }
        let grown = |refusal: &Refusal| look.total > refusal.total + BLOCK / 2;
        self.refused = self.refused.filter(|refusal| !grown(refusal));
        let pause = self.refused.filter(|refusal| now < refusal.until);
        let plugged = look.total.saturating_sub(self.first);
        let on_its_way = plugged + BLOCK / 2 < self.wanted;
        let quiet = Step {
            ask: None,
            throttle: pause.is_none(),
            again: (plugged >= BLOCK / 2 || self.wanted > 0).then_some(SLOW),
        };
        if look.available >= look.margin() {
            return self.shrink(look, plugged, now).unwrap_or(quiet);
        }
        self.calm = None;
        if on_its_way && now.duration_since(self.moved) < COMES {
            return Step {
                again: Some(QUICK),
                ..quiet
            };
        }
        if on_its_way {
            let last = self.refused.map_or(REFUSED.0 / 2, |last| last.pause);
            let pause = (2 * last).min(REFUSED.1);
            self.refused = Some(Refusal {
                until: now + pause,
                pause,
                total: look.total,
            });
            // What does not come is not waited for.
            return Step {
                throttle: false,
                again: Some(pause),
                ..self.ask(plugged.next_multiple_of(BLOCK), now)
            };
        }
        if let Some(pause) = pause {
            return Step {
                again: Some(pause.until - now),
                ..quiet
            };
        }
        let more = match self.refused {
            Some(_) => BLOCK,
            None => look.total.next_multiple_of(BLOCK),
        };
        self.ask(plugged.next_multiple_of(BLOCK) + more, now)
    }

    fn ask(&mut self, wanted: u64, now: Instant) -> Step {
        (self.wanted, self.moved) = (wanted, now);
        Step {
            ask: Some(wanted),
            throttle: true,
            again: Some(QUICK),
        }
    }

    /// Gives back what was available for a while.
    fn shrink(&mut self, look: Look, plugged: u64, now: Instant) -> Option<Step> {
        let used = look.total.saturating_sub(look.available);
        let enough = used + 2 * MARGIN.0.max(used / 4).min(MARGIN.1);
        let wanted = enough.saturating_sub(self.first).next_multiple_of(BLOCK);
        if wanted >= plugged.max(self.wanted) {
            self.calm = None;
            return None;
        }
        let since = *self.calm.get_or_insert(now);
        if now.duration_since(since) < CALM {
            return None;
        }
        self.calm = None;
        Some(self.ask(wanted, now))
    }
}

/// The guest's memory.
#[derive(Debug)]
pub(crate) struct Memory {
    /// The cgroup above all containers.
    pod: PathBuf,
    /// Context id of the host.
    host: u32,
    /// Told when the guest may grow.
    grows: Notify,
}

impl Memory {
    /// Begins to follow how much memory there is. `host` is the context id of the host; none: this is no guest.
    pub(crate) fn follow(pod: &Path, host: Option<u32>) -> Arc<Self> {
        let memory = Arc::new(Self {
            pod: pod.to_owned(),
            host: host.unwrap_or_default(),
            grows: Notify::new(),
        });
        if host.is_some() {
            let following = Arc::clone(&memory);
            tokio::spawn(async move {
                if let Err(error) = following.run().await {
                    warn!(error = &error as &dyn std::error::Error, "follow memory");
                }
            });
        }
        memory
    }

    /// Lets the guest ask for more memory when it needs some.
    pub(crate) fn grow(&self) {
        self.grows.notify_one();
    }

    async fn run(&self) -> io::Result<()> {
        let events = File::open(self.pod.join("memory.events"))?;
        // The kernel marks the file as exceptional when it changed (poll(2)).
        let events = sys::register(events.into(), Interest::PRIORITY)?;
        let blocks = sys::register(uevents()?, Interest::READABLE)?;
        let mut growth = None;
        let mut again: Option<Duration> = None;
        let Some(mut seen) = Look::now() else {
            return Ok(());
        };
        loop {
            tokio::select! {
                () = self.grows.notified() => {
                    growth.get_or_insert_with(|| Growth::new(seen.total, Instant::now()));
                }
                ready = events.ready(Interest::PRIORITY) => ready?.clear_ready(),
                ready = blocks.ready(Interest::READABLE) => {
                    drain(blocks.get_ref());
                    ready?.clear_ready();
                }
                () = sleep(again.unwrap_or_default()), if again.is_some() => {}
            }
            let Some(look) = Look::now() else { continue };
            let mut step = None;
            if let Some(growth) = &mut growth {
                step = Some(growth.step(look, Instant::now()));
            }
            self.limit(look, seen, step);
            seen = look;
            if let Some(wanted) = step.and_then(|step| step.ask) {
                info!(
                    wanted = wanted / MIB,
                    total = look.total / MIB,
                    available = look.available / MIB,
                    "ask for memory in MiB"
                );
                self.ask(wanted).await;
            }
            again = step.and_then(|step| step.again);
            // An event comes as often as somebody allocates.
            sleep(QUICK).await;
        }
    }

    /// Sets what containers may use; `before` is what was seen last.
    fn limit(&self, look: Look, before: Look, step: Option<Step>) {
        let (max, high) = look.limits();
        // A guest that never had another size keeps what it has from its start. Less than what is used would
        // be a reason to kill: it waits until that is less, too.
        let used = self.number("memory.current");
        if (step.is_some() || look.total != before.total)
            && used.is_some_and(|used| used + HEADROOM / 2 <= max)
        {
            self.set("memory.max", max.to_string());
        }
        if let Some(step) = step {
            let high = if step.throttle {
                high.to_string()
            } else {
                "max".to_owned()
            };
            self.set("memory.high", high);
        }
    }

    fn number(&self, file: &str) -> Option<u64> {
        let text = fs::read_to_string(self.pod.join(file)).ok()?;
        text.trim().parse().ok()
    }

    /// Writes a limit, unless it is that already.
    fn set(&self, file: &str, value: String) {
        let path = self.pod.join(file);
        let now = fs::read_to_string(&path).unwrap_or_default();
        if now.trim() != value
            && let Err(error) = fs::write(&path, value)
        {
            warn!(
                file,
                error = &error as &dyn std::error::Error,
                "limit memory"
            );
        }
    }

    /// Tells the VMM how much is wanted beside what there was at the start.
    async fn ask(&self, wanted: u64) {
        let mib = u32::try_from(wanted / MIB).unwrap_or(u32::MAX) & (MEMORY_PORT - 1);
        let port = VsockAddr::new(self.host, MEMORY_PORT | mib);
        // It is heard, and refused.
        let _ = timeout(TELL, VsockStream::connect(port)).await;
    }
}

/// Opens the kernel's events of devices, of which memory that comes and goes are some.
fn uevents() -> io::Result<std::os::fd::OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let protocol = Some(netlink::KOBJECT_UEVENT);
    let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, protocol)?;
    bind(&socket, &netlink::SocketAddrNetlink::new(0, UEVENTS))?;
    Ok(socket)
}

/// Reads what events there are: what they are does not matter.
fn drain(socket: &impl std::os::fd::AsFd) {
    let mut event = [0; 512];
    while recv(socket, &mut event, RecvFlags::empty()).is_ok() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(total: u64, available: u64) -> Look {
        Look {
            total: total * MIB,
            available: available * MIB,
            huge: 0,
        }
    }

    /// A guest that began with 225 MiB.
    struct Guest {
        growth: Growth,
        now: Instant,
    }

    impl Guest {
        fn new() -> Self {
            let now = Instant::now();
            Self {
                growth: Growth::new(225 * MIB, now),
                now,
            }
        }

        /// What is done some milliseconds later.
        fn after(&mut self, millis: u64, total: u64, available: u64) -> Step {
            self.now += Duration::from_millis(millis);
            self.growth.step(look(total, available), self.now)
        }

        fn asked(&mut self, millis: u64, total: u64, available: u64) -> Option<u64> {
            self.after(millis, total, available).ask.map(|b| b / MIB)
        }
    }

    #[test]
    fn limits_leave_the_agent_room_and_do_not_count_huge_pages() {
        assert_eq!(look(256, 0).limits(), (232 * MIB, 200 * MIB));
        let huge = Look {
            huge: 64 * MIB,
            ..look(256, 0)
        };
        assert_eq!(huge.limits(), (168 * MIB, 136 * MIB));
        assert_eq!(look(40, 0).limits(), (30 * MIB, 25 * MIB));
        assert_eq!(
            Look::parse("MemTotal: 1024 kB\nMemAvailable: 512 kB\nHugetlb: 4 kB\n"),
            Some(Look {
                total: MIB,
                available: MIB / 2,
                huge: 4096
            })
        );
        assert_eq!(Look::parse("MemTotal: 1 kB\n"), None);
    }

    #[test]
    fn a_guest_in_need_grows_in_steps_that_double() {
        let mut guest = Guest::new();
        let calm = guest.after(0, 225, 180);
        assert_eq!((calm.ask, calm.again), (None, None));
        assert_eq!(guest.asked(1000, 225, 50), Some(256));
        let waits = guest.after(50, 225, 30);
        assert_eq!(
            (waits.ask, waits.again, waits.throttle),
            (None, Some(QUICK), true)
        );
        // The rest is on its way.
        assert_eq!(guest.asked(50, 353, 40), None);
        assert_eq!(guest.asked(50, 481, 60), Some(768));
        assert_eq!(guest.asked(50, 993, 300), None);
        assert_eq!(guest.asked(5000, 993, 100), Some(768 + 1024));
    }

    #[test]
    fn a_guest_that_gets_no_more_is_not_throttled_and_asks_again_later() {
        let mut guest = Guest::new();
        assert_eq!(guest.asked(0, 225, 20), Some(256));
        assert!(guest.after(1000, 225, 20).throttle);
        let refused = guest.after(1100, 225, 20);
        assert_eq!((refused.throttle, refused.ask), (false, Some(0)));
        let later = guest.after(4000, 225, 20);
        assert_eq!((later.throttle, later.ask), (false, None));
        assert_eq!(guest.asked(1100, 225, 20), Some(128));
        // It came, so it goes on; a part of what is wanted then is all that there is.
        assert_eq!(guest.asked(100, 353, 20), Some(128 + 384));
        assert_eq!(guest.asked(100, 481, 20), None);
        let refused = guest.after(2100, 481, 20);
        assert_eq!((refused.throttle, refused.ask), (false, Some(256 * MIB)));
        assert!(!guest.after(10, 481, 200).throttle);
        assert!(guest.after(5000, 481, 200).throttle, "it may ask again");
    }

    #[test]
    fn pauses_between_refusals_grow() {
        let mut guest = Guest::new();
        let mut pauses = Vec::new();
        for _ in 0..7 {
            let mut step = guest.after(0, 225, 20);
            while step.throttle {
                step = guest.after(100, 225, 20);
            }
            let again = step.again.unwrap();
            pauses.push(again.as_secs());
            guest.now += again;
        }
        assert_eq!(pauses, [5, 10, 20, 40, 60, 60, 60]);
    }

    #[test]
    fn what_is_available_for_a_while_is_given_back() {
        let mut guest = Guest::new();
        assert_eq!(guest.asked(0, 225, 20), Some(256));
        assert_eq!(guest.asked(0, 481, 60), Some(768));
        assert_eq!(guest.asked(100, 993, 800), None);
        assert_eq!(guest.asked(5000, 993, 800), None);
        // 193 MiB are in use, and 96 more are to be there.
        assert_eq!(guest.asked(5000, 993, 800), Some(128));
        assert_eq!(guest.asked(100, 500, 310), None, "it is on its way");
        assert_eq!(guest.asked(100, 353, 160), None);
        assert_eq!(guest.after(5000, 353, 160).again, Some(SLOW));
        assert_eq!(guest.asked(5000, 353, 300), None);
        assert_eq!(guest.asked(10000, 353, 300), Some(0));
        assert_eq!(
            guest.after(100, 225, 180).again,
            None,
            "nothing runs any more"
        );
    }

    #[test]
    fn a_short_calm_gives_nothing_back() {
        let mut guest = Guest::new();
        assert_eq!(guest.asked(0, 225, 20), Some(256));
        for _ in 0..10 {
            assert_eq!(guest.asked(5000, 481, 400), None);
            assert_eq!(guest.asked(4000, 481, 130), None);
        }
    }
}

//! Follows what changes in a pod's namespace after CNI ADD.
//!
//! A change is told by netlink; what it is, is not read there: all is read anew. That costs the
//! daemon something for each pod, and a pod may have its network change all the time: its plugins
//! can, and some of what a guest's driver does is a change of its tap. So what is told is thrown away
//! at a bounded rate, and all is read only so many times in a row and now and then after that.

use std::{
    fs::File,
    future::{Future, poll_fn},
    io,
    os::fd::AsRawFd,
    path::Path,
    time::Duration,
};

use rtnetlink::{
    Handle, MulticastGroup, new_connection,
    sys::{AsyncSocket, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use crate::{
    guest::GuestNetwork,
    netlink::{self, LinkError},
    netns, view,
};

/// All that [`view`] reads.
const GROUPS: [MulticastGroup; 8] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
];
/// Changes come in bunches: it is looked again when nothing came for so long.
const QUIET: Duration = Duration::from_millis(50);
/// But at the latest so long after the first of them.
const LATEST: Duration = Duration::from_secs(1);
/// How many times in a row it is looked like that.
const LOOKS: u32 = 16;
/// Then it is looked so often; and so long without a look makes up for one.
const INTERVAL: Duration = Duration::from_secs(8);
/// Messages that are thrown away at a time, more than a socket holds by default.
const MESSAGES: usize = 1024;

/// Starts to follow a namespace; the first value is what it is now. Only interfaces of the names in
/// `joined` lead into the guest; empty: all of them.
///
/// It ends with its last receiver, and until then keeps the namespace alive.
///
/// # Errors
/// The namespace can't be entered or read.
pub(crate) async fn start(
    netns: &Path,
    primary: &'static str,
    joined: Vec<String>,
) -> Result<watch::Receiver<GuestNetwork>, LinkError> {
    let runtime = tokio::runtime::Handle::current();
    // A socket belongs to the namespace that it was opened in, whoever uses it.
    let opened = netns::within(netns.to_owned(), move || {
        let _runtime = runtime.enter();
        let messages = Messages::open().map_err(LinkError::Open)?;
        let namespace = File::open("/proc/thread-self/ns/net").map_err(LinkError::Open)?;
        Ok::<_, LinkError>((messages, namespace))
    });
    let (messages, namespace) = opened.await?;
    let now = look(&namespace, primary, &joined).await?;
    let (sender, receiver) = watch::channel(now);
    let netns = netns.to_owned();
    tokio::spawn(async move {
        // It is looked now and then, and takes more room than waiting for that.
        let look = || Box::pin(tell(&namespace, &netns, primary, &joined, &sender));
        tokio::select! {
            error = follow(messages, look) => {
                tracing::warn!(netns = %netns.display(), %error, "follow a pod's network");
            }
            () = sender.closed() => {}
        }
    });
    Ok(receiver)
}

/// Tells that something changes.
trait Changes {
    /// Waits until something has changed.
    fn wait(&mut self) -> impl Future<Output = io::Result<()>> + Send;

    /// Tells whether something has changed of which neither has told.
    fn take(&mut self) -> bool;
}

/// Looks when something has changed. Returns when that can't be told any more.
async fn follow<L: Future<Output = ()>>(
    mut changes: impl Changes,
    mut look: impl FnMut() -> L,
) -> io::Error {
    // When all looks until now are made up for.
    let mut free = Instant::now();
    loop {
        if let Err(error) = changes.wait().await {
            return error;
        }
        let latest = Instant::now() + LATEST;
        loop {
            // What comes meanwhile waits in the kernel, or is lost there: no work of ours.
            sleep(QUIET).await;
            if !changes.take() || Instant::now() >= latest {
                break;
            }
        }
        let debt = free.saturating_duration_since(Instant::now());
        let excess = debt.saturating_sub(INTERVAL * (LOOKS - 1));
        if !excess.is_zero() {
            sleep(excess).await;
            changes.take();
        }
        free = free.max(Instant::now()) + INTERVAL;
        look().await;
    }
}

/// The kernel's messages on changes in a namespace.
struct Messages(TokioSocket);

impl Messages {
    /// Listens in the namespace of this thread, within a runtime.
    fn open() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        // netlink(7): a bit for each group.
        let groups = GROUPS.map(|group| 1_u32 << (group as u32 - 1));
        let groups = groups.into_iter().fold(0, |all, group| all | group);
        socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
        Ok(Self(socket))
    }

    /// Whether it has told of a change. It did also if there were more than it holds.
    fn told(received: io::Result<()>) -> io::Result<()> {
        received.or_else(|error| match error.raw_os_error() {
            Some(nix::libc::ENOBUFS) => Ok(()),
            _ => Err(error),
        })
    }
}

impl Changes for Messages {
    async fn wait(&mut self) -> io::Result<()> {
        // A message is taken whole, whatever there is room for.
        let received = poll_fn(|context| self.0.poll_recv(context, &mut &mut [0; 1][..]));
        Self::told(received.await)
    }

    fn take(&mut self) -> bool {
        let receive = |_: &usize| {
            let received = self.0.socket_ref().recv(&mut &mut [0; 1][..], 0);
            Self::told(received.map(drop)).is_ok()
        };
        (0..MESSAGES).take_while(receive).count() > 0
    }
}

/// Reads a namespace again and tells of it what is new.
async fn tell(
    namespace: &File,
    netns: &Path,
    primary: &str,
    joined: &[String],
    sender: &watch::Sender<GuestNetwork>,
) {
    match look(namespace, primary, joined).await {
        Ok(now) => {
            sender.send_if_modified(|known| {
                let is_new = *known != now;
                let unsupported = now.unsupported.iter();
                unsupported
                    .filter(|what| !known.unsupported.contains(what))
                    .for_each(|what| warn_unsupported(netns, what));
                *known = now;
                is_new
            });
        }
        // A plugin is about to delete it, or takes its time between two steps.
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::debug!(error, "read a pod's network again");
        }
    }
}

/// Says that a namespace has what guests can't be told of.
pub(crate) fn warn_unsupported(netns: &Path, what: &str) {
    tracing::warn!(netns = %netns.display(), what, "the guest's network lacks what the pod's has");
}

/// Reads a namespace by a connection to the kernel that lives as long as that takes: it has buffers of
/// 72 KiB, and pods are many.
async fn look(
    namespace: &File,
    primary: &str,
    joined: &[String],
) -> Result<GuestNetwork, LinkError> {
    let runtime = tokio::runtime::Handle::current();
    // Not by its name, which may be gone by now.
    let path = format!("/proc/self/fd/{}", namespace.as_raw_fd());
    let opened = netns::within(path.into(), move || {
        let _runtime = runtime.enter();
        new_connection().map_err(LinkError::Open)
    });
    let (connection, handle, _) = opened.await?;
    tokio::select! {
        network = read(&handle, primary, joined) => network,
        () = connection => Err(LinkError::Open(io::ErrorKind::ConnectionAborted.into())),
    }
}

async fn read(
    handle: &Handle,
    primary: &str,
    joined: &[String],
) -> Result<GuestNetwork, LinkError> {
    let links = view::interfaces(handle, primary).await?;
    let is_joined = |name: &String| joined.is_empty() || joined.contains(name);
    let (links, others): (Vec<_>, Vec<_>) = links.into_iter().partition(|l| is_joined(&l.name));
    let mut network = view::read(handle, &links).await?;
    for name in joined {
        // One that is down only is not among them either.
        if !links.iter().any(|link| link.name == *name) {
            match netlink::find(handle, name).await {
                Ok(_) => {}
                Err(LinkError::Missing(name)) => network.missing.push(name),
                Err(error) => return Err(error),
            }
        }
    }
    network.unjoined = others.into_iter().map(|link| link.name).collect();
    Ok(network)
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    /// Changes of a test.
    struct Told(mpsc::UnboundedReceiver<()>);

    impl Changes for Told {
        async fn wait(&mut self) -> io::Result<()> {
            let change = self.0.recv().await;
            change.ok_or_else(|| io::ErrorKind::BrokenPipe.into())
        }

        fn take(&mut self) -> bool {
            let mut any = false;
            while self.0.try_recv().is_ok() {
                any = true;
            }
            any
        }
    }

    /// Has something change `count` times, `interval` apart, then nothing for a minute. Returns when it
    /// was looked, since the start.
    async fn looks(count: u32, interval: Duration) -> Vec<Duration> {
        let start = Instant::now();
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            for _ in 0..count {
                let _ = sender.send(());
                sleep(interval).await;
            }
            sleep(Duration::from_secs(60)).await;
        });
        let mut looks = Vec::new();
        let end = follow(Told(receiver), || {
            looks.push(start.elapsed());
            // A dump takes its time, in which more changes.
            sleep(Duration::from_millis(20))
        });
        assert_eq!(end.await.kind(), io::ErrorKind::BrokenPipe);
        looks
    }

    #[tokio::test(start_paused = true)]
    async fn a_bunch_of_changes_is_looked_at_once_it_is_over() {
        for count in [1, 8] {
            let looks = looks(count, Duration::from_millis(10)).await;
            let [look] = looks[..] else {
                panic!("{looks:?}");
            };
            assert!(look <= Duration::from_millis(200), "{look:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn changes_without_end_are_looked_at_now_and_then() {
        let long = Duration::from_secs(600);
        let most = LOOKS as usize + 1 + long.div_duration_f64(INTERVAL) as usize;
        for interval in [5, 40, 200, 700, 7000].map(Duration::from_millis) {
            let count = long.as_nanos() / interval.as_nanos();
            let looks = looks(count as u32, interval).await;
            assert!(looks.len() <= most, "{} at {interval:?}", looks.len());
            // The last change is seen all the same, and not much later.
            let last = interval * (count as u32 - 1);
            let seen = looks[looks.len() - 1];
            assert!(seen > last && seen < last + INTERVAL + LATEST, "{seen:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn some_changes_are_looked_at_as_they_come() {
        let interval = Duration::from_secs(1);
        let looks = looks(LOOKS, interval).await;
        assert_eq!(looks.len(), LOOKS as usize);
        for (look, at) in looks.iter().zip(0..) {
            let after = *look - interval * at;
            assert!(after < Duration::from_millis(200), "{after:?}");
        }
    }

    /// Runs `ip` for a line of arguments.
    fn ip(arguments: &str) {
        let mut command = std::process::Command::new("ip");
        let done = command.args(arguments.split(' ')).status();
        assert!(done.is_ok_and(|status| status.success()), "{arguments}");
    }

    #[test]
    fn the_kernel_tells_of_changes_in_the_namespace_and_they_are_taken_at_once() {
        if let Err(error) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
            println!("SKIPPED: watch: no network namespace of our own: {error}");
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_all().build().unwrap();
        runtime.block_on(async {
            let mut messages = Messages::open().unwrap();
            let soon = Duration::from_secs(5);
            for change in [
                "link set lo up",
                "addr add 10.0.0.1/24 dev lo",
                "route add 10.1.0.0/16 dev lo",
                "neigh add 10.0.0.3 lladdr 02:00:00:00:00:03 dev lo",
                "rule add table 100 priority 5",
                "-6 rule add table 100 priority 5",
            ] {
                ip(change);
                let told = tokio::time::timeout(soon, messages.wait()).await;
                assert!(told.is_ok_and(|told| told.is_ok()), "{change}");
                messages.take();
            }
            // More than the socket holds.
            for _ in 0..150 {
                let toggle = ["link set lo mtu 1400", "link set lo mtu 1500"];
                toggle.into_iter().for_each(ip);
            }
            assert!(messages.take());
            assert!(!messages.take());
            let quiet = tokio::time::timeout(QUIET, messages.wait()).await;
            assert!(quiet.is_err());
        });
    }
}

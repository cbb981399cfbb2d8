//! The virtio devices and what they share.
//!
//! Read in this order: [`device`] (the trait that each device implements, and
//! which thread calls what), [`queue`] and [`buffers`] (how a device reaches
//! guest memory), [`interrupt`], [`watch`], then a device folder; [`rng`] is
//! the smallest.
//!
//! A device knows nothing of its transport, its slot's address or KVM.
//!
//! What a guest can have the host do over and over, and what limits it. All of it is done by threads of
//! this process or of the file server, in the pod's cgroup; none is done ahead or for two at a time.
//!
//! | what | limit |
//! |---|---|
//! | TUNSETOFFLOAD (a driver that starts), TUNSETQUEUE (pairs of queues): RTNL | only if it is a change; `net::rate_limit` |
//! | TUNSETVNETHDRSZ, TUNGETIFF: RTNL | when the daemon attaches a card, not by the guest |
//! | frames to a tap | turns of 128 frames; checked headers ([`net::header`]); the tap's queues |
//! | fdatasync, holes, writes of disks | one thread for all disks; a flush or a request for holes is a turn; 16 holes of 1 GiB a request; the disk's size |
//! | connections to the host by vsock | none: each is answered with a reset, 256 of which may wait; one may say how much memory is wanted |
//! | bytes to clients of vsock | 64 KiB a connection, 1023 connections, all opened by the host |
//! | packets to the file server | 256 at a time, and its socket's buffer; files by `hull_fs::held` |
//! | memory that is plugged or unplugged, free pages | 16 requests a turn; 32 ranges a request; a call of the host's each |
//! | random bytes | 4 KiB a request, turns of 32 |
//! | flushes of persistent memory | nothing is done |
//! | epoll registrations (reset and start) | this process alone; no file descriptor is made |
//! | lines on standard error | [`crate::log`]: 20 a minute, 2000 in all, 500 bytes each |
//! | bytes on the console | 16 MiB, if they are kept at all |
//! | the exit report | 200 bytes of the guest's |

pub(crate) mod balloon;
pub(crate) mod block;
pub(crate) mod buffers;
pub(crate) mod counters;
pub(crate) mod device;
pub(crate) mod fs;
pub(crate) mod interrupt;
pub(crate) mod mem;
pub(crate) mod mmio;
pub(crate) mod net;
pub(crate) mod pmem;
pub(crate) mod queue;
pub(crate) mod registers;
pub(crate) mod rng;
pub(crate) mod state;
#[cfg(any(test, fuzzing))]
pub(crate) mod test_driver;
pub(crate) mod vsock;
pub(crate) mod watch;

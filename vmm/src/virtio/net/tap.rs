//! The host's end of the cable.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::ioctl_fionbio;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
};
use vm_memory::VolatileSlice;

use super::header::HEADER_SIZE;

/// Frames with a header of [`HEADER_SIZE`] go in and out of a file that does not block.
pub trait Port: Debug + Send {
    /// Returns the file; a read or write is one frame.
    fn file(&self) -> &File;

    /// Says which frames may come out of it (`TUN_F_*`).
    ///
    /// # Errors
    /// When the host can't.
    fn set_offloads(&self, offloads: u32) -> io::Result<()>;

    /// Has frames come out of it, as from the start, or not: then they come out of others on the same
    /// cable, and those that were in it are lost. What is written goes in either way. Not called if it
    /// already is so.
    ///
    /// # Errors
    /// When the host can't; nothing changed then.
    fn switch(&self, on: bool) -> io::Result<()>;
}

/// Why a descriptor is no tap for us.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Not a tap.
    #[error("query tap")]
    Query(#[source] io::Error),
    /// A tap that was opened with other flags.
    #[error("tap flags {0:#x} are not IFF_TAP | IFF_NO_PI | IFF_VNET_HDR")]
    Flags(i32),
    /// Descriptors that are not the queues of one tap.
    #[error("descriptors are not queues of one tap that was opened with IFF_MULTI_QUEUE")]
    Queues,
    /// The tap refuses our kind of header.
    #[error("set size of tap header")]
    HeaderSize(#[source] io::Error),
    /// The descriptor can't be made non-blocking.
    #[error("make tap non-blocking")]
    NonBlocking(#[source] io::Error),
}

/// An `ifreq` whose union is the flags, as a tap's requests have it.
#[derive(Debug, Default)]
#[repr(C)]
struct InterfaceRequest {
    name: [libc::c_char; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

/// A tap device (linux/Documentation/networking/tuntap.rst).
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Takes over a tap that was opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, once, or with
    /// `IFF_MULTI_QUEUE` too as often as it is to have queues.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn all(fds: Vec<OwnedFd>) -> Result<Vec<Self>, TapError> {
        let taps: Result<Vec<_>, _> = fds.into_iter().map(Self::new).collect();
        let taps = taps?;
        if let [first, others @ ..] = &taps[..] {
            let (name, _) = first.interface().map_err(TapError::Query)?;
            for other in others {
                let (other_name, flags) = other.interface().map_err(TapError::Query)?;
                if other_name != name || flags & libc::IFF_MULTI_QUEUE == 0 {
                    return Err(TapError::Queues);
                }
            }
        }
        Ok(taps)
    }

    /// Takes over a tap, or a queue of it.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn new(fd: OwnedFd) -> Result<Self, TapError> {
        let tap = Self {
            file: File::from(fd),
        };
        let (_, flags) = tap.interface().map_err(TapError::Query)?;
        let kinds = libc::IFF_TUN | libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & kinds != libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR {
            return Err(TapError::Flags(flags));
        }
        let size = HEADER_SIZE as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
        check(unsafe { libc::ioctl(tap.file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) })
            .map_err(TapError::HeaderSize)?;
        ioctl_fionbio(&tap.file, true).map_err(|error| TapError::NonBlocking(error.into()))?;
        Ok(tap)
    }

    /// Returns its name and its flags.
    fn interface(&self) -> io::Result<([libc::c_char; libc::IFNAMSIZ], i32)> {
        let mut request = InterfaceRequest::default();
        // SAFETY: TUNGETIFF writes one ifreq, which outlives the call.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
        Ok((request.name, i32::from(request.flags)))
    }
}

impl Port for Tap {
    fn file(&self) -> &File {
        &self.file
    }

    fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        let fd = self.file.as_raw_fd();
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(fd, libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })
    }

    fn switch(&self, on: bool) -> io::Result<()> {
        let flag = if on {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        let request = InterfaceRequest {
            flags: flag as libc::c_short,
            ..InterfaceRequest::default()
        };
        // SAFETY: TUNSETQUEUE reads one ifreq, which outlives the call.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) })
    }
}

/// The end of a cable that leads nowhere, for a card whose link is down.
#[derive(Debug)]
pub struct Unplugged {
    /// Nothing is read from it or written to it.
    file: File,
}

impl Unplugged {
    /// Makes one.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new() -> io::Result<Self> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        Ok(Self {
            file: eventfd(0, flags)?.into(),
        })
    }
}

impl Port for Unplugged {
    fn file(&self) -> &File {
        &self.file
    }

    fn set_offloads(&self, _: u32) -> io::Result<()> {
        Ok(())
    }

    fn switch(&self, _: bool) -> io::Result<()> {
        Ok(())
    }
}

/// Returns what a tap may hand to a driver that accepted `features`. A tap
/// knows segmentation only together with checksums.
#[must_use]
pub fn offloads(features: u64) -> u32 {
    let has = |feature: u32| features & (1 << feature) != 0;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut offloads = libc::TUN_F_CSUM;
    let tso4 = has(VIRTIO_NET_F_GUEST_TSO4);
    let tso6 = has(VIRTIO_NET_F_GUEST_TSO6);
    if tso4 {
        offloads |= libc::TUN_F_TSO4;
    }
    if tso6 {
        offloads |= libc::TUN_F_TSO6;
    }
    if (tso4 || tso6) && has(VIRTIO_NET_F_GUEST_ECN) {
        offloads |= libc::TUN_F_TSO_ECN;
    }
    offloads
}

/// Writes a frame whose body is in guest memory.
///
/// # Errors
/// What the file says; `WouldBlock` when it is full.
pub fn write_frame(
    file: &File,
    header: &[u8; HEADER_SIZE],
    body: &[VolatileSlice<'_>],
) -> io::Result<()> {
    let guards: Vec<_> = body.iter().map(VolatileSlice::ptr_guard).collect();
    let head = libc::iovec {
        iov_base: header.as_ptr().cast_mut().cast(),
        iov_len: header.len(),
    };
    let pieces: Vec<libc::iovec> = std::iter::once(head)
        .chain(guards.iter().zip(body).map(|(guard, slice)| libc::iovec {
            iov_base: guard.as_ptr().cast_mut().cast(),
            iov_len: slice.len(),
        }))
        .collect();
    let count = libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX);
    loop {
        // SAFETY: `pieces` has `count` entries. The first is `header`; the others are
        // guest memory that `body` borrows and `guards` keep mapped. The kernel only
        // reads them; that the guest may write meanwhile changes what is sent, no more.
        let written = unsafe { libc::writev(file.as_raw_fd(), pieces.as_ptr(), count) };
        if written >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Reads a frame: its header, then into guest memory, then what `rest` has room for. Returns the
/// number of bytes of all.
///
/// # Errors
/// What the file says; `WouldBlock` when there is no frame.
pub fn read_frame(
    file: &File,
    header: &mut [u8],
    body: &[VolatileSlice<'_>],
    rest: &mut [u8],
) -> io::Result<usize> {
    let guards: Vec<_> = body.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let own = |bytes: &mut [u8]| libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let pieces: Vec<libc::iovec> = std::iter::once(own(header))
        .chain(guards.iter().zip(body).map(|(guard, slice)| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: slice.len(),
        }))
        .chain(std::iter::once(own(rest)))
        .collect();
    let count = libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX);
    loop {
        // SAFETY: `pieces` has `count` entries. The first and the last are borrowed mutably; the
        // others are guest memory that `body` borrows and `guards` keep mapped, which no reference
        // points to and anybody may change at any time.
        let read = unsafe { libc::readv(file.as_raw_fd(), pieces.as_ptr(), count) };
        if let Ok(count) = usize::try_from(read) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

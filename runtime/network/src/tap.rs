//! Opens a tap device. The one place with `unsafe` in this crate: no crate that
//! we use wraps `TUNSETIFF` safely.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsRawFd, OwnedFd},
    os::unix::fs::OpenOptionsExt,
};

/// Prefix of the names of taps.
pub(crate) const TAP_PREFIX: &str = "hulltap";

/// Makes a tap named `name` in the calling thread's network namespace and opens
/// it for whole Ethernet frames with a virtio-net header (`IFF_TAP | IFF_NO_PI |
/// IFF_VNET_HDR`, linux/Documentation/networking/tuntap.rst), not blocking; for
/// several queues (`IFF_MULTI_QUEUE`) once for each. It lives as long as one of
/// the files is open.
///
/// # Errors
/// When /dev/net/tun is missing or refuses.
pub fn open(name: &str, queues: u8) -> io::Result<Vec<OwnedFd>> {
    if queues > 1 {
        open_queues(name, queues)
    } else {
        Ok(vec![open_queue(name, FLAGS)?])
    }
}

/// Opens a tap that exists, in the same way. One that was made for a single queue is opened once.
///
/// # Errors
/// As [`open`]; also when another has it open.
pub(crate) fn attach(name: &str, queues: u8) -> io::Result<Vec<OwnedFd>> {
    match open_queue(name, FLAGS) {
        // It was made for several queues, which must be said of each.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => open_queues(name, queues),
        result => Ok(vec![result?]),
    }
}

const FLAGS: nix::libc::c_int = nix::libc::IFF_TAP | nix::libc::IFF_NO_PI | nix::libc::IFF_VNET_HDR;

fn open_queues(name: &str, queues: u8) -> io::Result<Vec<OwnedFd>> {
    let flags = FLAGS | nix::libc::IFF_MULTI_QUEUE;
    (0..queues.max(1))
        .map(|_| open_queue(name, flags))
        .collect()
}

fn open_queue(name: &str, flags: nix::libc::c_int) -> io::Result<OwnedFd> {
    let file = open_tun()?;
    set_interface(&file, name, flags)?;
    Ok(file.into())
}

fn open_tun() -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_CLOEXEC | nix::libc::O_NONBLOCK)
        .open("/dev/net/tun")
}

#[expect(unsafe_code, reason = "the TUNSETIFF ioctl")]
fn set_interface(file: &File, name: &str, flags: nix::libc::c_int) -> io::Result<()> {
    nix::ioctl_write_ptr_bad!(
        tunsetiff,
        nix::request_code_write!(b'T', 202, size_of::<nix::libc::c_int>()),
        nix::libc::ifreq
    );

    if name.is_empty() || name.len() >= nix::libc::IFNAMSIZ {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "interface name too long",
        ));
    }
    // SAFETY: ifreq is plain old data, for which all zeroes is a valid value.
    let mut request: nix::libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags as nix::libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is, and it
    // outlives the call; the descriptor is open for as long as `file` is borrowed.
    unsafe { tunsetiff(file.as_raw_fd(), &raw const request) }?;
    Ok(())
}

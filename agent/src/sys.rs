//! The few system calls that no crate wraps safely.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use tokio::io::{Interest, unix::AsyncFd};

/// Most entropy that one call credits, in bytes.
const ENTROPY_MAX: usize = 512;

/// `struct rand_pool_info` of `linux/random.h` with room for its data.
#[repr(C)]
struct PoolInfo {
    entropy_bits: libc::c_int,
    length: libc::c_int,
    bytes: [u8; ENTROPY_MAX],
}

nix::ioctl_write_ptr_bad!(
    rnd_add_entropy,
    nix::request_code_write!(b'R', 0x03, 2 * size_of::<libc::c_int>()),
    PoolInfo
);
nix::ioctl_none!(rnd_reseed_crng, b'R', 0x07);

/// Adds `bytes` to the kernel's pool through `random` (`/dev/random`) and
/// credits all of their bits (random(4), `RNDADDENTROPY`).
pub(crate) fn add_entropy(random: &File, bytes: &[u8]) -> io::Result<()> {
    for chunk in bytes.chunks(ENTROPY_MAX) {
        let length = libc::c_int::try_from(chunk.len()).map_err(io::Error::other)?;
        let mut info = PoolInfo {
            entropy_bits: length * 8,
            length,
            bytes: [0; ENTROPY_MAX],
        };
        info.bytes[..chunk.len()].copy_from_slice(chunk);
        // SAFETY: the fd is open; the kernel reads the two integers and then
        // `length` bytes, which lie inside `info`, and keeps no pointer.
        unsafe { rnd_add_entropy(random.as_raw_fd(), &raw const info) }?;
    }
    Ok(())
}

/// Makes the kernel's generator take a new key from its pool now
/// (random(4), `RNDRESEEDCRNG`), so that clones of one memory image part.
pub(crate) fn reseed(random: &File) -> io::Result<()> {
    // SAFETY: the fd is open and the call has no argument.
    unsafe { rnd_reseed_crng(random.as_raw_fd()) }?;
    Ok(())
}

/// Gives SIGPIPE its default action back, which Rust's start-up code takes away
/// and execve(2) would hand on to the program.
pub(crate) fn default_sigpipe() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: no handler is installed, so none can run in a bad place; the
    // caller is single-threaded and about to call execve.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
}

/// Sends `signal`, real-time ones too, to the process behind `pidfd`
/// (pidfd_send_signal(2)).
pub(crate) fn send_signal(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open during the call; a null siginfo is allowed
    // and makes the kernel fill it in as kill(2) does; no memory is touched.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Registers `fd` with the event loop.
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open, stays so until it is dropped, and always
    // gives the same number; the `AsyncFd` owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

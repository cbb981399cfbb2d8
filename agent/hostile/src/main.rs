//! Attacks on what is around a container, as a program in it.
//!
//! ```text
//! hull-hostile attack   tries everything, and prints `NAME done` or `NAME ERRNO` for each
//! hull-hostile crowd    starts threads until there can be no more, says how many, and waits
//! hull-hostile hoard    takes memory of the kernel that no limit of a container counts, for ever
//! hull-hostile flood ADDRESS   sends datagrams there, as fast as it can
//! hull-hostile wake     has timers fire, as fast as they can
//! ```
//!
//! An attack is as small as shows that a larger one would work, and harms nothing: a file is opened
//! for writing and not written. So it can be run where everything is allowed, to show that it sees
//! what it looks for.

mod attack;

use std::{env, io, net::UdpSocket, os::fd::AsRawFd, process::ExitCode, thread, time::Duration};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair},
};

fn main() -> ExitCode {
    match env::args().nth(1).as_deref() {
        Some("attack") => {
            for (name, try_it) in attack::ALL {
                match try_it() {
                    Ok(()) => println!("{name} done"),
                    Err(error) => println!("{name} {}", word(&error)),
                }
            }
            ExitCode::SUCCESS
        }
        Some("crowd") => crowd(),
        Some("hoard") => hoard(),
        Some("flood") => flood(&env::args().nth(2).unwrap_or_default()),
        Some("wake") => wake(),
        _ => {
            eprintln!("usage: hull-hostile attack | crowd | hoard | flood ADDRESS:PORT | wake");
            ExitCode::FAILURE
        }
    }
}

/// The name of an error, `EPERM`.
fn word(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => format!("{:?}", Errno::from_raw(errno)),
        None => format!("({error})"),
    }
}

fn crowd() -> ! {
    let wait = || thread::sleep(Duration::from_secs(1000));
    let mut threads = 1;
    loop {
        match thread::Builder::new().stack_size(16 << 10).spawn(wait) {
            Ok(_) => threads += 1,
            Err(error) => {
                println!("{threads} threads: {}", word(&error));
                wait();
            }
        }
    }
}

/// Fills sockets that nobody reads, each as far as it goes.
fn hoard() -> ! {
    let mut kept = Vec::new();
    loop {
        let pair = socketpair(
            AddressFamily::Unix,
            SockType::Stream,
            None,
            SockFlag::SOCK_NONBLOCK,
        );
        match pair {
            Ok((one, other)) => {
                while send(one.as_raw_fd(), &[1; 65536], MsgFlags::empty()).is_ok() {}
                kept.push((one, other));
            }
            Err(error) => {
                println!("{} pairs: {error:?}", kept.len());
                thread::sleep(Duration::from_secs(1000));
            }
        }
    }
}

fn flood(address: &str) -> ExitCode {
    let socket = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect(address)?;
        Ok(socket)
    });
    match socket {
        // Whether anybody is there does not matter.
        Ok(socket) => loop {
            let _ = socket.send(&[0; 64]);
        },
        Err(error) => {
            eprintln!("hull-hostile: {address}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Each sleep of each thread is an interrupt of the guest's timer.
fn wake() -> ! {
    for _ in 1..8 {
        thread::spawn(|| {
            loop {
                thread::sleep(Duration::from_micros(1));
            }
        });
    }
    loop {
        thread::sleep(Duration::from_micros(1));
    }
}

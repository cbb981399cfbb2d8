//! Talks to a running `hull-vmm` by hand.
//!
//! ```text
//! vmmctl SOCKET hello | metrics | pause | resume | stop
//! vmmctl SOCKET attach-disk SLOT FILE[:ro] | attach-tap SLOT INTERFACE | detach SLOT
//! ```

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use hull_proto_vmm::{
    DeviceConfig, Extent, FdIndex, Request, Response, VERSION, body_length, decode, encode,
};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (socket, command) = words.split_first().ok_or("usage: see the source")?;
    let mut stream = UnixStream::connect(socket)?;
    let hello = ask(&mut stream, &Request::Hello { version: VERSION }, &[])?;
    let (request, file) = match command {
        ["hello"] => {
            println!("{hello:?}");
            return Ok(());
        }
        ["metrics"] => (Request::Metrics, None),
        ["pause"] => (Request::Pause, None),
        ["resume"] => (Request::Resume, None),
        ["stop"] => (Request::Stop, None),
        ["attach-disk", slot, spec] => {
            let (path, readonly) = spec
                .strip_suffix(":ro")
                .map_or((*spec, false), |path| (path, true));
            let file = File::options().read(true).write(!readonly).open(path)?;
            let extents = vec![Extent {
                file: FdIndex(0),
                offset: 0,
                length: file.metadata()?.len(),
            }];
            let device = DeviceConfig::Block {
                serial: "vmmctl".into(),
                readonly,
                extents,
            };
            (
                Request::Attach {
                    slot: slot.parse()?,
                    device,
                },
                Some(file),
            )
        }
        ["attach-tap", slot, interface] => {
            let device = DeviceConfig::Net {
                taps: vec![FdIndex(0)],
                mac: MAC,
                mtu: None,
            };
            (
                Request::Attach {
                    slot: slot.parse()?,
                    device,
                },
                Some(open_tap(interface)?),
            )
        }
        ["detach", slot] => (
            Request::Detach {
                slot: slot.parse()?,
            },
            None,
        ),
        _ => return Err("usage: see the source".into()),
    };
    let fds: Vec<i32> = file.iter().map(AsRawFd::as_raw_fd).collect();
    match ask(&mut stream, &request, &fds)? {
        Response::Error { kind, message } => Err(format!("{kind:?}: {message}").into()),
        response => {
            println!("{response:#?}");
            Ok(())
        }
    }
}

fn ask(
    stream: &mut UnixStream,
    request: &Request,
    fds: &[i32],
) -> Result<Response, Box<dyn Error>> {
    let frame = encode(request)?;
    stream.send_with_fds(&[frame.as_slice()], fds)?;
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix)?;
    let mut body = vec![0; body_length(prefix)?];
    stream.read_exact(&mut body)?;
    Ok(decode(&body)?)
}

/// Opens a tap that exists, or makes one that lasts as long as the VM.
fn open_tap(interface: &str) -> Result<File, Box<dyn Error>> {
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut request = [0u8; 40];
    request[..interface.len()].copy_from_slice(interface.as_bytes());
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
    request[16..18].copy_from_slice(&flags.to_le_bytes());
    // SAFETY: `request` is a `struct ifreq` of 40 bytes: a zero-terminated name, then the flags.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    if result != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(tun)
}

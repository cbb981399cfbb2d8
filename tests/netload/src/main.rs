//! Loads a network and measures what it carries, for the benchmark.
//!
//! ```text
//! hull-netload serve                           in the pod: does what a client asks for
//! hull-netload measure ADDRESS SECONDS [NAME]  outside: one line `NAME FIGURE` for each measurement
//! ```
//!
//! All clocks are the client's; a server only sends, receives and counts.

#![forbid(unsafe_code)]

use std::{
    env, io,
    io::{Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

/// Where a server listens, for both protocols.
const PORT: u16 = 5201;
/// How much is written or read at once, bytes.
const BLOCK: usize = 128 << 10;
/// A small packet, bytes.
const SMALL: usize = 64;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// The first byte of a connection: what the server does on it.
mod mode {
    /// Reads to the end and answers with the number of bytes.
    pub const SINK: u8 = b'S';
    /// Writes until the other side has enough.
    pub const SOURCE: u8 = b'G';
    /// Answers each byte with one.
    pub const ECHO: u8 = b'E';
}

/// The first byte of a datagram: what the server does with it.
mod packet {
    /// It is counted.
    pub const COUNT: u8 = b'C';
    /// The answer is the number of those counted so far.
    pub const TOTAL: u8 = b'T';
    /// The answer is as many datagrams as fit into the time of the second byte, in tenths of a second.
    pub const FLOOD: u8 = b'F';
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve"] => serve(),
        ["measure", address, seconds, ref names @ ..] if names.len() < 2 => {
            match (address.parse(), seconds.parse()) {
                (Ok(address), Ok(seconds)) => {
                    let only = names.first().copied();
                    measure(address, Duration::from_secs(seconds), only)
                }
                _ => Err(io::Error::other(
                    "ADDRESS is an IP address, SECONDS a number",
                )),
            }
        }
        _ => Err(io::Error::other("serve | measure ADDRESS SECONDS [NAME]")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hull-netload: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    let everywhere = (Ipv6Addr::UNSPECIFIED, PORT);
    let (tcp, udp) = (TcpListener::bind(everywhere)?, UdpSocket::bind(everywhere)?);
    thread::spawn(move || answer_datagrams(&udp));
    for stream in tcp.incoming() {
        let stream = stream?;
        // A client that goes away ends its connection, not the server.
        thread::spawn(move || answer(stream));
    }
    Ok(())
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut mode = [0];
    stream.read_exact(&mut mode)?;
    let mut block = vec![0; BLOCK];
    match mode[0] {
        mode::SINK => {
            let mut total = 0_u64;
            loop {
                match stream.read(&mut block)? {
                    0 => return stream.write_all(&total.to_be_bytes()),
                    count => total += count as u64,
                }
            }
        }
        mode::SOURCE => loop {
            stream.write_all(&block)?;
        },
        mode::ECHO => loop {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            stream.write_all(&byte)?;
        },
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn answer_datagrams(socket: &UdpSocket) -> io::Result<()> {
    let mut counted = 0_u64;
    let mut buffer = [0; SMALL];
    loop {
        let (length, from) = socket.recv_from(&mut buffer)?;
        match buffer[..length] {
            [packet::COUNT, ..] => counted += 1,
            [packet::TOTAL, ..] => drop(socket.send_to(&counted.to_be_bytes(), from)),
            [packet::FLOOD, tenths, ..] => {
                let end = Instant::now() + Duration::from_millis(100 * u64::from(tenths));
                while Instant::now() < end {
                    // A full queue is what is measured.
                    let _ = socket.send_to(&[0; SMALL], from);
                }
            }
            _ => {}
        }
    }
}

/// Takes all measurements, or only that of this name.
fn measure(address: IpAddr, time: Duration, only: Option<&str>) -> io::Result<()> {
    let server = SocketAddr::new(address, PORT);
    let wanted = |name| only.is_none_or(|only| only == name);
    if wanted("tcp-to-pod") {
        println!("tcp-to-pod {:.2}", tcp_to_pod(server, time)?);
    }
    if wanted("tcp-from-pod") {
        println!("tcp-from-pod {:.2}", tcp_from_pod(server, time)?);
    }
    if wanted("requests") {
        let requests = requests(server, time)?;
        println!("requests {:.1}", requests.len() as f64 / time.as_secs_f64());
        println!("latency {:.1}", median(requests).as_secs_f64() * 1e6);
    }
    if wanted("packets-to-pod") {
        println!("packets-to-pod {:.0}", packets_to_pod(server, time)?);
    }
    if wanted("packets-from-pod") {
        println!("packets-from-pod {:.0}", packets_from_pod(server, time)?);
    }
    Ok(())
}

fn connect(server: SocketAddr, mode: u8) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&[mode])?;
    Ok(stream)
}

/// Megabytes (10^6) a second.
fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / 1e6 / time.as_secs_f64()
}

fn tcp_to_pod(server: SocketAddr, time: Duration) -> io::Result<f64> {
    let mut stream = connect(server, mode::SINK)?;
    let block = vec![0; BLOCK];
    let begin = Instant::now();
    while begin.elapsed() < time {
        stream.write_all(&block)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut total = [0; 8];
    stream.read_exact(&mut total)?;
    // With what was on the way, which may be much.
    Ok(rate(u64::from_be_bytes(total), begin.elapsed()))
}

fn tcp_from_pod(server: SocketAddr, time: Duration) -> io::Result<f64> {
    let mut stream = connect(server, mode::SOURCE)?;
    let mut block = vec![0; BLOCK];
    let (begin, mut total) = (Instant::now(), 0);
    while begin.elapsed() < time {
        total += stream.read(&mut block)? as u64;
    }
    Ok(rate(total, begin.elapsed()))
}

/// The time of each request, one after the other.
fn requests(server: SocketAddr, time: Duration) -> io::Result<Vec<Duration>> {
    let mut stream = connect(server, mode::ECHO)?;
    let (begin, mut times) = (Instant::now(), Vec::new());
    while begin.elapsed() < time {
        let asked = Instant::now();
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
        times.push(asked.elapsed());
    }
    Ok(times)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn socket(server: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = if server.is_ipv4() {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    Ok(socket)
}

/// Asks until there is an answer: it or the question may be lost.
fn ask(socket: &UdpSocket, what: u8) -> io::Result<u64> {
    let begin = Instant::now();
    let mut answer = [0; 8];
    while begin.elapsed() < PATIENCE {
        socket.send(&[what, 0])?;
        match socket.recv(&mut answer) {
            Ok(8) => return Ok(u64::from_be_bytes(answer)),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Datagrams a second that the server received.
fn packets_to_pod(server: SocketAddr, time: Duration) -> io::Result<f64> {
    let socket = socket(server)?;
    let before = ask(&socket, packet::TOTAL)?;
    let begin = Instant::now();
    while begin.elapsed() < time {
        // A full queue is what is measured.
        let _ = socket.send(&[packet::COUNT; SMALL]);
    }
    let taken = begin.elapsed();
    let after = ask(&socket, packet::TOTAL)?;
    Ok((after - before) as f64 / taken.as_secs_f64())
}

/// Datagrams a second that arrive here.
fn packets_from_pod(server: SocketAddr, time: Duration) -> io::Result<f64> {
    let socket = socket(server)?;
    let tenths = u8::try_from(time.as_millis() / 100).unwrap_or(u8::MAX);
    socket.send(&[packet::FLOOD, tenths])?;
    let (mut buffer, mut count) = ([0; SMALL], 0_u64);
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.recv(&mut buffer)?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let begin = Instant::now();
    let mut last = begin;
    // Until nothing comes any more.
    while socket.recv(&mut buffer).is_ok() {
        count += 1;
        last = Instant::now();
    }
    Ok(count as f64 / (last - begin).as_secs_f64().max(1e-3))
}

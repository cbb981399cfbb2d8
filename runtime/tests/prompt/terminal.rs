//! At a pseudo-terminal.

use std::{
    ffi::OsStr,
    fs::File,
    io::{Read, Write},
    os::unix::ffi::OsStrExt,
    process::Child,
    sync::mpsc,
    time::{Duration, Instant},
};

use rustix::{
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize},
};

use super::Node;

const PATIENCE: Duration = Duration::from_secs(60);

/// A terminal and what was seen at it.
struct Terminal {
    master: File,
    slave: File,
    pieces: mpsc::Receiver<Vec<u8>>,
    seen: String,
}

impl Terminal {
    fn open() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let name = OsStr::from_bytes(name.as_bytes());
        let slave = File::options().read(true).write(true).open(name).unwrap();
        let master = File::from(master);
        let mut reader = master.try_clone().unwrap();
        let (sender, pieces) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length) = reader.read(&mut buffer) {
                if sender.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            master,
            slave,
            pieces,
            seen: String::new(),
        }
    }

    fn resize(&self, columns: u16, rows: u16) {
        let size = Winsize {
            ws_col: columns,
            ws_row: rows,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.master, size).unwrap();
    }

    /// Runs it with this as its terminal.
    fn start(&self, node: &Node, arguments: &[&str]) -> Child {
        // A session of its own, so that it hears of changes.
        let mut command = node.command(&["setsid", "-c", "-w"], arguments);
        let end = || self.slave.try_clone().unwrap();
        command.stdin(end()).stdout(end()).stderr(end());
        command.spawn().unwrap()
    }

    fn send(&mut self, bytes: &[u8]) {
        self.master.write_all(bytes).unwrap();
    }

    /// Waits until it is seen, and forgets it with what was before it.
    fn expect(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let piece = self.pieces.recv_timeout(left);
            let piece = piece.unwrap_or_else(|_| panic!("no {text:?} in {:?}", self.seen));
            self.seen.push_str(&String::from_utf8_lossy(&piece));
        }
    }

    fn settings(&self) -> Termios {
        tcgetattr(&self.slave).unwrap()
    }

    fn is_raw(&self) -> bool {
        let modes = self.settings().local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    fn assert_restored(&self, before: &Termios) {
        let now = self.settings();
        assert_eq!(now.local_modes, before.local_modes);
        assert_eq!(now.input_modes, before.input_modes);
        assert_eq!(now.output_modes, before.output_modes);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminal_is_lent_to_a_container_and_given_back() {
    let Some(node) = Node::start().await else {
        return;
    };
    let mut terminal = Terminal::open();
    let before = terminal.settings();
    terminal.resize(80, 24);

    // A container that is left with keys.
    let mut child = terminal.start(&node, &["run", "-it", "--name", "shell", "IMAGE", "cat"]);
    terminal.expect("80x24");
    assert!(terminal.is_raw());
    terminal.resize(100, 30);
    terminal.expect("100x30");
    // Ctrl-C is the container's, and Ctrl-P too unless the other key follows.
    terminal.send(b"typed\x03\x10x");
    terminal.expect("typed\x03\x10x");
    terminal.send(b"\x10\x11");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    terminal.expect("hull: shell goes on");
    terminal.assert_restored(&before);
    assert_eq!(node.json(&["ps", "-o", "json"])[0]["name"], "shell");

    // One that ends while a client is attached to it.
    let mut child = terminal.start(&node, &["attach", "shell"]);
    terminal.expect("100x30");
    terminal.send(b"again");
    terminal.expect("again");
    assert!(terminal.is_raw());
    assert_eq!(node.told(&["stop", "-t", "0", "shell"]), "shell\n");
    assert_eq!(child.wait().unwrap().code(), Some(137));
    terminal.assert_restored(&before);
    assert_eq!(node.told(&["rm", "shell"]), "shell\n");

    // One whose client is told to end.
    node.told(&["run", "-q", "-d", "--name", "other", "IMAGE", "wait"]);
    let mut child = terminal.start(&node, &["exec", "-it", "other", "out:ready", "wait"]);
    terminal.expect("ready");
    assert!(terminal.is_raw());
    let pid = client(child.id());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    terminal.assert_restored(&before);
    assert_eq!(node.told(&["rm", "-f", "other"]), "other\n");

    // The guest itself.
    node.told(&["run", "-q", "-d", "--name", "box", "IMAGE", "wait"]);
    node.bring_shell("box");
    terminal.resize(90, 20);
    let mut child = terminal.start(&node, &["debug", "box"]);
    terminal.expect("90x20");
    assert!(terminal.is_raw());
    terminal.send(b"typed\x03");
    terminal.expect("typed\x03");
    terminal.send(b"\x10\x11");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    terminal.assert_restored(&before);
    assert_eq!(node.told(&["rm", "-f", "box"]), "box\n");

    // One that ends by itself.
    let mut child = terminal.start(&node, &["run", "-q", "-it", "IMAGE", "out:bye", "exit:7"]);
    assert_eq!(child.wait().unwrap().code(), Some(7));
    terminal.expect("bye");
    terminal.assert_restored(&before);
    node.daemon.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_is_asked_for_and_not_shown() {
    let Some(node) = Node::start().await else {
        return;
    };
    let registry = node.registry();
    let mut terminal = Terminal::open();
    let before = terminal.settings();
    let mut child = terminal.start(&node, &["login", registry]);
    terminal.expect("user: ");
    terminal.send(b"user\n");
    terminal.expect("user\r\npassword: ");
    terminal.send(b"password\n");
    terminal.expect(&format!("\r\nlogged in to {registry}"));
    assert!(!terminal.seen.contains("password"), "{}", terminal.seen);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    terminal.assert_restored(&before);

    // Somebody thinks better of it.
    let mut child = terminal.start(&node, &["login", "-u", "user", registry]);
    terminal.expect("password: ");
    terminal.send(b"\x03");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    terminal.assert_restored(&before);
    node.told(&["logout", registry]);
}

/// The process behind setsid, which has become `hull`.
fn client(setsid: u32) -> i32 {
    let path = format!("/proc/{setsid}/task/{setsid}/children");
    let children = std::fs::read_to_string(path).unwrap();
    match children.split_whitespace().next() {
        Some(child) => child.parse().unwrap(),
        // It did not need a child.
        None => i32::try_from(setsid).unwrap(),
    }
}

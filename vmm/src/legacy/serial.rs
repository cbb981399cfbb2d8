//! COM1, for a kernel's console: output only.
//!
//! It is there even when nobody wants to see it, because a kernel's last words are in it.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unreachable
    )
)]

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, OnceLock};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{Error, NoEvents};
use vm_superio::{Serial, SerialState, Trigger};

use crate::sync::lock;

const PANIC: &[u8] = b"Kernel panic - not syncing: ";
/// How much of a line is kept.
const LINE: usize = 200;
/// How much a regular file gets: a guest must not fill the host's disk.
const FILE_LIMIT: u64 = 16 << 20;

/// The registers, as saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Baud rate divisor.
    pub divisor: [u8; 2],
    /// Interrupt enable.
    pub interrupt_enable: u8,
    /// Interrupt identification.
    pub interrupt_identification: u8,
    /// Line control.
    pub line_control: u8,
    /// Line status.
    pub line_status: u8,
    /// Modem control.
    pub modem_control: u8,
    /// Modem status.
    pub modem_status: u8,
    /// Scratch.
    pub scratch: u8,
    /// What a guest that tries the port out has sent to itself.
    pub received: Vec<u8>,
}

/// COM1.
#[derive(Debug)]
pub struct Com1<T: Trigger> {
    serial: Mutex<Serial<T, NoEvents, Console>>,
    panic: Arc<OnceLock<String>>,
}

impl<T: Trigger> Com1<T> {
    /// Creates the port; output goes to `file` or nowhere.
    pub fn new(interrupt: T, file: Option<File>) -> Self {
        let console = Console::new(file);
        Self {
            panic: Arc::clone(&console.panic),
            serial: Mutex::new(Serial::new(interrupt, console)),
        }
    }

    /// Creates the port from what was saved; output goes to `file` or nowhere.
    ///
    /// # Errors
    /// When more was received than there is room for, or an interrupt can't be raised.
    pub fn restore(state: &State, interrupt: T, file: Option<File>) -> Result<Self, Error<T::E>> {
        let console = Console::new(file);
        let panic = Arc::clone(&console.panic);
        let state = SerialState {
            baud_divisor_low: state.divisor[0],
            baud_divisor_high: state.divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received.clone(),
        };
        let serial = Serial::from_state(&state, interrupt, NoEvents, console)?;
        Ok(Self {
            serial: Mutex::new(serial),
            panic,
        })
    }

    /// Returns what is to be saved.
    pub fn state(&self) -> State {
        let state = lock(&self.serial).state();
        State {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }

    /// Reads the register at `offset` from the first port.
    pub fn read(&self, offset: u8) -> u8 {
        lock(&self.serial).read(offset)
    }

    /// Writes the register at `offset` from the first port.
    pub fn write(&self, offset: u8, value: u8) {
        // Output that the host can't take is lost, as on a cable that nobody holds.
        let _ = lock(&self.serial).write(offset, value);
    }

    /// Returns what the kernel said when it panicked. Does not wait for output that the host is slow to
    /// take.
    pub fn panic_message(&self) -> Option<String> {
        self.panic.get().cloned()
    }
}

/// Where output goes.
#[derive(Debug)]
struct Console {
    file: Option<File>,
    /// Bytes that the file still takes.
    left: u64,
    line: Vec<u8>,
    panic: Arc<OnceLock<String>>,
}

impl Console {
    fn new(file: Option<File>) -> Self {
        let is_regular = |file: &File| file.metadata().is_ok_and(|metadata| metadata.is_file());
        Self {
            left: if file.as_ref().is_some_and(is_regular) {
                FILE_LIMIT
            } else {
                u64::MAX
            },
            file,
            line: Vec::with_capacity(LINE),
            panic: Arc::default(),
        }
    }

    fn watch(&mut self, byte: u8) {
        if byte != b'\n' {
            if self.line.len() < LINE {
                self.line.push(byte);
            }
            return;
        }
        if self.panic.get().is_none()
            && let Some(at) = self
                .line
                .windows(PANIC.len())
                .position(|window| window == PANIC)
        {
            let reason = self.line.get(at.saturating_add(PANIC.len())..);
            let reason = String::from_utf8_lossy(reason.unwrap_or_default());
            self.panic.get_or_init(|| reason.trim().to_owned());
        }
        self.line.clear();
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.watch(*byte);
        }
        if let Some(file) = &mut self.file
            && let Some(left) = self.left.checked_sub(bytes.len() as u64)
        {
            file.write_all(bytes)?;
            self.left = left;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};
    use std::os::fd::OwnedFd;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::sync::try_lock;

    struct Nothing;

    impl Trigger for Nothing {
        type E = io::Error;
        fn trigger(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn print(com1: &Com1<Nothing>, text: &str) {
        for byte in text.bytes() {
            assert_ne!(com1.read(5) & 0x20, 0, "transmitter is empty");
            com1.write(0, byte);
        }
    }

    #[test]
    fn output_reaches_the_file() {
        let mut file = tempfile::tempfile().unwrap();
        let com1 = Com1::new(Nothing, Some(file.try_clone().unwrap()));
        print(&com1, "hello\n");
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello\n");
        assert_eq!(com1.panic_message(), None);
    }

    #[test]
    fn a_panic_is_noticed_without_a_file() {
        let com1 = Com1::new(Nothing, None);
        print(
            &com1,
            "[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs\r\nnext\n",
        );
        assert_eq!(
            com1.panic_message().unwrap(),
            "VFS: Unable to mount root fs"
        );
    }

    /// A vCPU that prints to a file that takes nothing has the port for as long as that lasts.
    #[test]
    fn what_a_kernel_said_is_known_while_its_output_is_stuck() {
        let (reader, writer) = io::pipe().unwrap();
        let file = File::from(OwnedFd::from(writer));
        let com1 = Com1::new(Nothing, Some(file.try_clone().unwrap()));
        print(&com1, "Kernel panic - not syncing: no init\n");
        rustix::io::ioctl_fionbio(&file, true).unwrap();
        while (&file).write(&[0; 4096]).is_ok() {}
        rustix::io::ioctl_fionbio(&file, false).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| com1.write(0, b'x'));
            while try_lock(&com1.serial).is_some() {
                thread::yield_now();
            }
            let (answers, answer) = mpsc::channel();
            let com1 = &com1;
            scope.spawn(move || answers.send(com1.panic_message()));
            let message = answer.recv_timeout(Duration::from_secs(10));
            // Ends the write.
            drop(reader);
            assert_eq!(message.expect("it waits").unwrap(), "no init");
        });
    }

    #[test]
    fn a_file_takes_only_so_much() {
        let file = tempfile::tempfile().unwrap();
        let mut console = Console::new(Some(file.try_clone().unwrap()));
        console.left = 4;
        for byte in b"abcdef" {
            console.write_all(&[*byte]).unwrap();
        }
        assert_eq!(file.metadata().unwrap().len(), 4);
        assert_eq!(
            Console::new(Some(File::open("/dev/null").unwrap())).left,
            u64::MAX
        );
    }

    #[test]
    fn an_endless_line_takes_no_memory() {
        let com1 = Com1::new(Nothing, None);
        print(&com1, &"x".repeat(100_000));
        assert!(lock(&com1.serial).writer().line.capacity() <= LINE);
    }
}

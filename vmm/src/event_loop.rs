//! The main thread: the control socket and all device I/O but that of disks and network cards.
//!
//! Devices have an epoll set of their own inside of the loop's. Pausing takes it out, so that a paused
//! VM does no I/O, and the control socket goes on.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use error_reporter::Report;
use hull_jail::JailError;
use hull_proto_vmm::{
    CopiedMemory, ErrorKind, ExitReason, ExitReport, FdIndex, Metrics, Request, Response,
    RestoreConfig, VERSION, VmConfig, VmState,
};
use nix::sys::signalfd::SignalFd;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::control::answer::refusal;
use crate::control::connection::{Connection, ConnectionError, Incoming};
use crate::fds::Fds;
use crate::kvm::device::KvmDevice;
use crate::machine::{Machine, MachineError};
use crate::seccomp::CONTROL;
use crate::service;
use crate::{epolls, exit, log};

/// Connections at a time; the daemon needs one, a person debugging another.
const MAX_CONNECTIONS: usize = 8;

/// Requests of a connection that are answered before devices have their turn.
const TURN: usize = 16;
/// How long no connections are accepted when the process has no descriptor for one, in milliseconds.
const ACCEPT_PAUSE_MS: i32 = 100;

const LISTENER: u64 = 0;
const SIGNAL: u64 = 1;
const ENDED: u64 = 2;
const DEVICES: u64 = 3;
const FIRST_CONNECTION: u64 = 16;

/// The event loop could not do its part.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// The host has no more descriptors, or epoll is broken.
    #[error("wait for events")]
    Epoll(#[source] io::Error),
    /// The configuration of a VM without a daemon is not right.
    #[error("start virtual machine")]
    Machine(#[from] MachineError),
    /// The host has no way to take system calls away.
    #[error("limit the main thread")]
    Jail(#[from] JailError),
}

/// The VMM of one VM.
#[derive(Debug)]
pub struct EventLoop {
    epoll: Epoll,
    devices: Arc<Epoll>,
    listener: Option<UnixListener>,
    /// Whether no connections are accepted for a while.
    accept_paused: bool,
    /// Stays open as long as it is watched.
    signal: Option<SignalFd>,
    connections: HashMap<u64, Connection>,
    next_connection: u64,
    kvm: KvmDevice,
    machine: Option<Machine>,
    state: VmState,
    start: Instant,
    /// How long it took to lock the process in.
    jail: Duration,
}

impl EventLoop {
    /// Creates a loop without a VM. `start` is when the process started, `jail` how long it took to lock
    /// it in.
    ///
    /// # Errors
    /// [`LoopError::Epoll`]
    pub fn new(start: Instant, jail: Duration, kvm: KvmDevice) -> Result<Self, LoopError> {
        let new = Self {
            epoll: Epoll::new().map_err(LoopError::Epoll)?,
            devices: Arc::new(Epoll::new().map_err(LoopError::Epoll)?),
            listener: None,
            accept_paused: false,
            signal: None,
            connections: HashMap::new(),
            next_connection: FIRST_CONNECTION,
            kvm,
            machine: None,
            state: VmState::Empty,
            start,
            jail,
        };
        new.watch(new.devices.as_raw_fd(), DEVICES, EventSet::IN)?;
        Ok(new)
    }

    /// Takes control connections from `listener`.
    ///
    /// # Errors
    /// [`LoopError::Epoll`]
    pub fn listen(&mut self, listener: UnixListener) -> Result<(), LoopError> {
        listener.set_nonblocking(true).map_err(LoopError::Epoll)?;
        self.watch(listener.as_raw_fd(), LISTENER, EventSet::IN)?;
        self.listener = Some(listener);
        Ok(())
    }

    /// Stops when `signal` becomes readable.
    ///
    /// # Errors
    /// [`LoopError::Epoll`]
    pub fn stop_on(&mut self, signal: SignalFd) -> Result<(), LoopError> {
        self.watch(signal.as_raw_fd(), SIGNAL, EventSet::IN)?;
        self.signal = Some(signal);
        Ok(())
    }

    /// Builds and starts a VM without being asked by a daemon.
    ///
    /// # Errors
    /// [`LoopError`]
    pub fn boot(&mut self, config: &VmConfig, fds: &Fds) -> Result<(), LoopError> {
        let mut machine = Machine::build(config, fds, &self.kvm, &self.devices)?;
        machine.start()?;
        self.started(machine)
    }

    /// Returns the counters.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        let Some(machine) = &self.machine else {
            return Metrics::default();
        };
        let mut metrics = machine.metrics(self.start);
        let jail = u64::try_from(self.jail.as_nanos()).unwrap_or(u64::MAX);
        metrics.start_ns.insert(0, ("jail".to_owned(), jail));
        metrics
    }

    /// Runs until the VM ends, one way or another; the vCPUs have stopped then.
    ///
    /// # Errors
    /// [`LoopError`]
    pub fn run(&mut self) -> Result<ExitReport, LoopError> {
        let report = self.run_until_end()?;
        if let Some(vcpus) = self.machine.as_ref().and_then(Machine::vcpus)
            && !vcpus.stop()
        {
            log::note("vCPUs do not leave the guest");
        }
        Ok(report)
    }

    /// Closes the connections, after their last answers were sent.
    pub fn close(&mut self) {
        for (_, connection) in self.connections.drain() {
            connection.close();
        }
    }

    fn run_until_end(&mut self) -> Result<ExitReport, LoopError> {
        let mut events = [EpollEvent::default(); 16];
        loop {
            let timeout = if self.accept_paused {
                ACCEPT_PAUSE_MS
            } else {
                -1
            };
            let count =
                epolls::wait(&self.epoll, timeout, &mut events).map_err(LoopError::Epoll)?;
            if self.accept_paused {
                self.pause_accept(false);
            }
            for event in events.iter().take(count) {
                let report = match event.data() {
                    LISTENER => {
                        self.accept();
                        None
                    }
                    SIGNAL => Some(stopped("by a signal")),
                    ENDED => self.ended(),
                    DEVICES => {
                        if let Some(machine) = &self.machine {
                            service::serve_ready(machine.slots(), &self.devices)
                                .map_err(LoopError::Epoll)?;
                        }
                        None
                    }
                    id => self.serve_connection(id),
                };
                if let Some(report) = report {
                    return Ok(report);
                }
            }
        }
    }

    fn ended(&self) -> Option<ExitReport> {
        let (end, panic) = self.machine.as_ref()?.end()?;
        Some(exit::report(end, panic))
    }

    fn accept(&mut self) {
        let stream = match self.listener.as_ref().map(UnixListener::accept) {
            Some(Ok((stream, _))) => stream,
            Some(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => {
                log::note(&format!("accept control connection: {error}"));
                self.pause_accept(true);
                return;
            }
            _ => return,
        };
        if self.connections.len() == MAX_CONNECTIONS {
            log::note("too many control connections");
            return;
        }
        let id = self.next_connection;
        let connection = Connection::new(stream).and_then(|connection| {
            let event = EpollEvent::new(EventSet::IN, id);
            self.epoll
                .ctl(ControlOperation::Add, connection.fd(), event)?;
            Ok(connection)
        });
        match connection {
            Ok(connection) => {
                self.next_connection += 1;
                self.connections.insert(id, connection);
            }
            Err(error) => log::note(&format!("accept control connection: {error}")),
        }
    }

    /// Stops or goes on accepting connections. They wait meanwhile.
    fn pause_accept(&mut self, pause: bool) {
        let Some(listener) = &self.listener else {
            return;
        };
        let events = if pause {
            EventSet::empty()
        } else {
            EventSet::IN
        };
        let event = EpollEvent::new(events, LISTENER);
        if let Err(error) = self
            .epoll
            .ctl(ControlOperation::Modify, listener.as_raw_fd(), event)
        {
            log::note(&format!("watch control socket: {error}"));
        }
        self.accept_paused = pause;
    }

    fn serve_connection(&mut self, id: u64) -> Option<ExitReport> {
        let mut connection = self.connections.remove(&id)?;
        match self.handle_requests(&mut connection) {
            Ok(report) => {
                // A peer that reads no answers gets to ask nothing more.
                let events = if connection.is_congested() {
                    EventSet::OUT
                } else {
                    EventSet::IN
                };
                let event = EpollEvent::new(events, id);
                if self
                    .epoll
                    .ctl(ControlOperation::Modify, connection.fd(), event)
                    .is_ok()
                {
                    self.connections.insert(id, connection);
                }
                report
            }
            Err(ConnectionError::Closed) => None,
            Err(error) => {
                let message = Report::new(&error).to_string();
                log::note(&message);
                let _ = connection.send(&Response::Error {
                    kind: ErrorKind::Invalid,
                    message,
                });
                None
            }
        }
    }

    /// Answers requests until no more are there, others must have their turn, or the VM is to end.
    fn handle_requests(
        &mut self,
        connection: &mut Connection,
    ) -> Result<Option<ExitReport>, ConnectionError> {
        connection.flush()?;
        for _ in 0..TURN {
            if connection.is_congested() {
                break;
            }
            match connection.receive()? {
                None => break,
                Some(Incoming::Garbage(error)) => {
                    let message = Report::new(&error).to_string();
                    connection.send(&Response::Error {
                        kind: ErrorKind::Invalid,
                        message,
                    })?;
                }
                Some(Incoming::Request(request, fds)) => {
                    if matches!(*request, Request::Hello { .. }) {
                        connection.greeted = true;
                    } else if !connection.greeted {
                        let message = "the first request of a connection is hello".to_owned();
                        connection.send(&Response::Error {
                            kind: ErrorKind::Invalid,
                            message,
                        })?;
                        continue;
                    }
                    let response = self.answer(&request, &fds);
                    // What the VM does not need is closed when the daemon reads the answer.
                    drop(fds);
                    connection.send(&response)?;
                    if matches!(*request, Request::Stop) {
                        return Ok(Some(stopped("as asked")));
                    }
                }
            }
        }
        Ok(None)
    }

    fn answer(&mut self, request: &Request, fds: &Fds) -> Response {
        let done = match request {
            Request::Hello { .. } => {
                return Response::Hello {
                    version: VERSION,
                    state: self.state,
                };
            }
            Request::Metrics => return Response::Metrics(Box::new(self.metrics())),
            Request::Stop => Ok(()),
            Request::Configure(config) => match self.state {
                VmState::Empty => self.configure(config, fds),
                _ => return self.wrong_state("configure"),
            },
            Request::Restore(config) => match self.state {
                VmState::Empty => self.restore(config, fds),
                _ => return self.wrong_state("restore"),
            },
            Request::Start => match self.state {
                VmState::Configured => self.start(),
                _ => return self.wrong_state("start"),
            },
            Request::Pause => match self.state {
                VmState::Running => self.pause(),
                VmState::Paused => Ok(()),
                _ => return self.wrong_state("pause"),
            },
            Request::Resume => match self.state {
                VmState::Paused => self.resume(),
                VmState::Running => Ok(()),
                _ => return self.wrong_state("resume"),
            },
            Request::Copy { memory } => match (self.state, &self.machine) {
                (VmState::Running, Some(machine)) => match copy(machine, *memory, fds) {
                    Ok(parts) => return Response::Copied(parts),
                    Err(error) => Err(error),
                },
                _ => return self.wrong_state("copy the memory of"),
            },
            Request::Save {
                label,
                state,
                memory,
                changed,
            } => match (self.state, &self.machine) {
                (VmState::Paused, Some(machine)) => {
                    save(machine, label, [*state, *memory], changed.as_deref(), fds)
                }
                _ => return self.wrong_state("save"),
            },
            Request::Attach { slot, device } => match &self.machine {
                Some(machine) => machine.attach(*slot, device, fds).map_err(LoopError::from),
                None => return self.wrong_state("attach a device to"),
            },
            Request::Plug {
                least_mib,
                most_mib,
            } => match &self.machine {
                Some(machine) => {
                    machine.plug(*least_mib, *most_mib);
                    Ok(())
                }
                None => return self.wrong_state("plug memory into"),
            },
            Request::Detach { slot } => match &self.machine {
                Some(machine) => machine.detach(*slot).map_err(LoopError::from),
                None => return self.wrong_state("detach a device from"),
            },
        };
        match done {
            Ok(()) => Response::Ok,
            Err(LoopError::Machine(error)) => refusal(&error),
            Err(error @ (LoopError::Epoll(_) | LoopError::Jail(_))) => Response::Error {
                kind: ErrorKind::Internal,
                message: Report::new(&error).to_string(),
            },
        }
    }

    fn wrong_state(&self, verb: &str) -> Response {
        let message = format!("can't {verb} a VM that is {:?}", self.state).to_lowercase();
        Response::Error {
            kind: ErrorKind::State,
            message,
        }
    }

    fn configure(&mut self, config: &VmConfig, fds: &Fds) -> Result<(), LoopError> {
        self.machine = Some(Machine::build(config, fds, &self.kvm, &self.devices)?);
        self.state = VmState::Configured;
        Ok(())
    }

    fn restore(&mut self, config: &RestoreConfig, fds: &Fds) -> Result<(), LoopError> {
        self.machine = Some(Machine::restore(config, fds, &self.kvm, &self.devices)?);
        self.state = VmState::Configured;
        Ok(())
    }

    fn start(&mut self) -> Result<(), LoopError> {
        let Some(mut machine) = self.machine.take() else {
            return Ok(());
        };
        self.state = VmState::Empty;
        machine.start()?;
        self.started(machine)
    }

    fn started(&mut self, machine: Machine) -> Result<(), LoopError> {
        self.kvm.close();
        if let Some(vcpus) = machine.vcpus() {
            self.watch(vcpus.ended().as_raw_fd(), ENDED, EventSet::IN)?;
        }
        CONTROL.apply_by_name()?;
        self.machine = Some(machine);
        self.state = VmState::Running;
        Ok(())
    }

    fn pause(&mut self) -> Result<(), LoopError> {
        let Some(machine) = &self.machine else {
            return Ok(());
        };
        if let Err(error) = machine.pause() {
            machine.resume();
            return Err(error.into());
        }
        self.epoll
            .ctl(
                ControlOperation::Delete,
                self.devices.as_raw_fd(),
                EpollEvent::default(),
            )
            .map_err(LoopError::Epoll)?;
        self.state = VmState::Paused;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), LoopError> {
        self.watch(self.devices.as_raw_fd(), DEVICES, EventSet::IN)?;
        if let Some(machine) = &self.machine {
            machine.resume();
        }
        self.state = VmState::Running;
        Ok(())
    }

    fn watch(&self, fd: RawFd, token: u64, events: EventSet) -> Result<(), LoopError> {
        self.epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
            .map_err(LoopError::Epoll)
    }
}

fn copy(machine: &Machine, memory: FdIndex, fds: &Fds) -> Result<Vec<CopiedMemory>, LoopError> {
    let file = fds.file(memory).map_err(MachineError::from)?;
    Ok(machine.copy(&file)?)
}

fn save(
    machine: &Machine,
    label: &str,
    [state, memory]: [FdIndex; 2],
    changed: Option<&[Range<u64>]>,
    fds: &Fds,
) -> Result<(), LoopError> {
    let file = |index| fds.file(index).map_err(MachineError::from);
    Ok(machine.save(label, &file(state)?, &file(memory)?, changed)?)
}

fn stopped(how: &str) -> ExitReport {
    ExitReport {
        reason: ExitReason::Stopped,
        message: format!("stopped {how}"),
    }
}

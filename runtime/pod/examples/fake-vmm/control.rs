//! The control socket.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs::File,
    io::{IoSliceMut, Read},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    os::unix::{fs::FileExt, net::UnixListener as StdListener},
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use hull_proto_vmm::{
    DeviceConfig, DeviceMetrics, ErrorKind, ExitReason, FdIndex, Metrics, Request, Response,
    VERSION, VmConfig, VmState,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
};

use crate::{
    agent,
    guest::{Guest, SavedGuest},
    report::end,
    script::Script,
};

/// What is written of a VM.
type Saved = (String, Script, Vec<u8>, SavedGuest);

#[derive(Default)]
struct Vm {
    script: Script,
    listener: Option<StdListener>,
    state: Option<VmState>,
    /// What is behind them.
    slots: BTreeMap<u8, &'static str>,
    /// How much memory there is beside that of the start, at least and at most.
    plugged: (u64, u64),
    guest: Option<Arc<Guest>>,
    /// Of the guest that it is restored from.
    saved: Option<SavedGuest>,
    /// The end of the file server's socket.
    files: Vec<OwnedFd>,
}

/// Serves any number of connections, one after another or side by side. SIGUSR1 kills the guest's agent.
pub async fn serve(socket: &Path, report: &Path) {
    let listener = UnixListener::bind(socket).unwrap();
    let mut killed = signal(SignalKind::user_defined1()).unwrap();
    let place = report.to_owned();
    tokio::spawn(async move {
        killed.recv().await;
        end(&place, ExitReason::GuestPanic, "Attempted to kill init!");
    });
    let vm = Arc::new(Mutex::new(Vm::default()));
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        tokio::spawn(connection(stream, Arc::clone(&vm), report.to_owned()));
    }
}

async fn connection(mut stream: UnixStream, vm: Arc<Mutex<Vm>>, report: std::path::PathBuf) {
    while let Some((request, fds)) = receive(&stream).await {
        let stop = request == Request::Stop;
        let configures = matches!(request, Request::Configure(_));
        let pauses = request == Request::Pause;
        let response = handle(&vm, request, fds);
        if pauses && std::mem::take(&mut vm.lock().unwrap().script.lose_pause) {
            std::future::pending::<()>().await;
        }
        if configures {
            // A test may change the script for the next VM now.
            std::fs::write(report.with_file_name("configured"), "").unwrap();
        }
        let frame = hull_proto_vmm::encode(&response).unwrap();
        if stream.write_all(&frame).await.is_err() {
            return;
        }
        if stop {
            end(&report, ExitReason::Stopped, "asked to");
        }
        let (listener, script) = {
            let mut vm = vm.lock().unwrap();
            let running = vm.state == Some(VmState::Running);
            let listener = if running { vm.listener.take() } else { None };
            (listener, vm.script.clone())
        };
        if let Some(listener) = listener {
            if script.die_at_start {
                end(&report, ExitReason::GuestPanic, "no init found");
            }
            let mut vm = vm.lock().unwrap();
            let saved = vm.saved.take();
            vm.guest = Some(agent::serve(listener, script, report.clone(), saved));
        }
    }
}

fn handle(vm: &Mutex<Vm>, request: Request, fds: Vec<OwnedFd>) -> Response {
    let mut vm = vm.lock().unwrap();
    let refuse = |kind: ErrorKind| Response::Error {
        kind,
        message: "as the script says".into(),
    };
    match request {
        Request::Hello { .. } => Response::Hello {
            version: VERSION,
            state: vm.state.unwrap_or(VmState::Empty),
        },
        Request::Configure(config) => {
            configure(&mut vm, &config, fds);
            match vm.script.refuse_configure {
                Some(kind) => refuse(kind),
                None => Response::Ok,
            }
        }
        Request::Start => match vm.script.refuse_start {
            Some(kind) => refuse(kind),
            None => {
                vm.state = Some(VmState::Running);
                Response::Ok
            }
        },
        Request::Attach { slot, device } => {
            match &device {
                DeviceConfig::Block { extents, .. } | DeviceConfig::Pmem { extents } => {
                    assert!(extents.iter().all(|e| (e.file.0 as usize) < fds.len()));
                }
                DeviceConfig::Fs { .. } => vm.files = fds,
                DeviceConfig::Net { taps, .. } => {
                    assert!(!taps.is_empty());
                    assert!(taps.iter().all(|tap| (tap.0 as usize) < fds.len()));
                }
                DeviceConfig::Memory => {}
                _ => return refuse(ErrorKind::Invalid),
            }
            if let Some(kind) = vm.script.refuse_attach {
                return refuse(kind);
            }
            match vm.slots.entry(slot) {
                Entry::Vacant(place) => {
                    place.insert(kind(&device));
                    Response::Ok
                }
                Entry::Occupied(_) => refuse(ErrorKind::Busy),
            }
        }
        Request::Detach { slot } => match vm.slots.remove(&slot) {
            Some(kind) => {
                if kind == "fs" {
                    vm.files.clear();
                }
                Response::Ok
            }
            None => refuse(ErrorKind::Invalid),
        },
        Request::Metrics => Response::Metrics(Box::new(Metrics {
            // But for what each VM has for its memory.
            exits: vec![(
                "attached".into(),
                vm.slots
                    .keys()
                    .filter(|slot| ![6, 7].contains(*slot))
                    .count() as u64,
            )],
            start_ns: [
                ("jail", u64::MAX),
                ("memory", 2000),
                ("devices", u64::MAX),
                ("else", 1),
            ]
            .map(|(phase, ns)| (phase.to_owned(), ns))
            .into(),
            plugged_mib: vm.plugged,
            devices: vm
                .slots
                .iter()
                .map(|(slot, kind)| DeviceMetrics {
                    slot: *slot,
                    kind: (*kind).to_owned(),
                    ..DeviceMetrics::default()
                })
                .collect(),
        })),
        Request::Copy { memory } => {
            if let Some(kind) = vm.script.refuse_copy {
                return refuse(kind);
            }
            note(&vm, "copy");
            // Other than it is saved.
            file(&fds, memory).write_all_at(b"copied", 0).unwrap();
            Response::Copied(Vec::new())
        }
        Request::Save {
            label,
            state,
            memory,
            changed,
        } => {
            if let Some(kind) = vm.script.refuse_save {
                return refuse(kind);
            }
            if vm.script.hang_save {
                // It is killed before that.
                std::thread::sleep(Duration::from_secs(600));
            }
            assert_eq!(vm.state, Some(VmState::Paused));
            note(&vm, "save");
            // The script goes on with the clones.
            let guest = vm.guest.as_ref().map(|guest| guest.saved());
            let slots = Vec::from_iter(vm.slots.keys().copied());
            let saved: Saved = (label, vm.script.clone(), slots, guest.unwrap_or_default());
            let saved = serde_json::to_vec(&saved).unwrap();
            file(&fds, state).write_all_at(&saved, 0).unwrap();
            let memory = file(&fds, memory);
            let written = if changed.is_some() { 6 } else { 0 };
            assert_eq!(memory.metadata().unwrap().len(), written);
            memory.write_all_at(b"memory", 0).unwrap();
            Response::Ok
        }
        Request::Restore(config) => {
            let mut memory = [0; 6];
            file(&fds, config.memory)
                .read_exact_at(&mut memory, 0)
                .unwrap();
            assert_eq!(&memory, b"memory");
            let state = file(&fds, config.state);
            let mut bytes = vec![0; state.metadata().unwrap().len() as usize];
            state.read_exact_at(&mut bytes, 0).unwrap();
            let (label, script, slots, guest): Saved = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(label, config.label);
            vm.saved = Some(guest);
            let apparmor = script.apparmor;
            vm.script = match script.clone {
                Some(clone) => *clone,
                None => script,
            };
            vm.script.asleep = true;
            vm.script.apparmor = apparmor;
            if let Some(kind) = vm.script.refuse_configure {
                return refuse(kind);
            }
            plug(&mut vm, &config.devices, fds);
            assert_eq!(Vec::from_iter(vm.slots.keys().copied()), slots);
            Response::Ok
        }
        Request::Plug {
            least_mib,
            most_mib,
        } => {
            if let Some(kind) = vm.script.refuse_plug {
                return refuse(kind);
            }
            vm.plugged = (least_mib, most_mib);
            Response::Ok
        }
        Request::Pause => match vm.script.refuse_pause {
            Some(kind) => refuse(kind),
            None => {
                note(&vm, "pause");
                vm.state = Some(VmState::Paused);
                Response::Ok
            }
        },
        Request::Resume => match vm.script.refuse_resume.take() {
            Some(kind) => refuse(kind),
            None => {
                note(&vm, "resume");
                vm.state = Some(VmState::Running);
                Response::Ok
            }
        },
        Request::Stop => Response::Ok,
    }
}

/// Leaves a line among the guest's calls.
fn note(vm: &Vm, line: &str) {
    if let Some(guest) = &vm.guest {
        guest.note("calls", line);
    }
}

fn configure(vm: &mut Vm, config: &VmConfig, fds: Vec<OwnedFd>) {
    let mut text = String::new();
    let kernel = fds[config.kernel.0 as usize].try_clone().unwrap();
    File::from(kernel).read_to_string(&mut text).unwrap();
    if !text.is_empty() {
        vm.script = serde_json::from_str(&text).unwrap();
    }
    vm.script.apparmor = config.cmdline.contains("apparmor");
    plug(vm, &config.devices, fds);
    let slots = Vec::from_iter(vm.slots.keys().copied());
    // A template has neither scratch disk nor card.
    let known: [&[u8]; 3] = [&[0, 1, 2, 3, 4, 7], &[0, 1, 2, 3, 4, 6, 7], &[0, 1, 2, 7]];
    assert!(known.contains(&&slots[..]), "{slots:?}");
    assert_eq!(slots.contains(&6), config.pluggable.is_some());
}

fn plug(vm: &mut Vm, devices: &[(u8, DeviceConfig)], mut fds: Vec<OwnedFd>) {
    let vsock = devices.iter().find_map(|(_, device)| match device {
        DeviceConfig::Vsock { listener, .. } => Some(listener.0 as usize),
        _ => None,
    });
    vm.slots = devices
        .iter()
        .map(|(slot, device)| (*slot, kind(device)))
        .collect();
    let files = devices.iter().filter_map(|(_, device)| match device {
        DeviceConfig::Fs { socket, .. } => Some(fds[socket.0 as usize].try_clone().unwrap()),
        _ => None,
    });
    vm.files = files.collect();
    vm.listener = Some(StdListener::from(fds.swap_remove(vsock.unwrap())));
}

fn file(fds: &[OwnedFd], index: FdIndex) -> File {
    fds[index.0 as usize].try_clone().unwrap().into()
}

fn kind(device: &DeviceConfig) -> &'static str {
    match device {
        DeviceConfig::Block { .. } => "block",
        DeviceConfig::Net { .. } => "net",
        DeviceConfig::Rng => "rng",
        DeviceConfig::Memory => "memory",
        DeviceConfig::Balloon => "balloon",
        DeviceConfig::Vsock { .. } => "vsock",
        DeviceConfig::Fs { .. } => "fs",
        DeviceConfig::Pmem { .. } => "pmem",
    }
}

async fn receive(stream: &UnixStream) -> Option<(Request, Vec<OwnedFd>)> {
    let mut bytes: Vec<u8> = Vec::new();
    let mut fds = Vec::new();
    loop {
        let mut buffer = vec![0; 65_536];
        let (length, got) = stream
            .async_io(Interest::READABLE, || read_with_fds(stream, &mut buffer))
            .await
            .ok()?;
        if length == 0 {
            return None;
        }
        fds.extend(got);
        bytes.extend_from_slice(&buffer[..length]);
        if bytes.len() >= 4 {
            let body = hull_proto_vmm::body_length(bytes[..4].try_into().unwrap()).unwrap();
            if bytes.len() >= 4 + body {
                return Some((hull_proto_vmm::decode(&bytes[4..]).unwrap(), fds));
            }
        }
    }
}

fn read_with_fds(stream: &UnixStream, buffer: &mut [u8]) -> std::io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(buffer)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let message = recvmsg(stream, &mut slices, &mut control, flags)?;
    let mut fds = Vec::new();
    for control in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = control {
            fds.extend(rights);
        }
    }
    Ok((message.bytes, fds))
}

//! The VMs of the node: each a fake VMM with its guest, on a host of its own.

use std::{
    cell::RefCell,
    fmt, fs, io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, atomic::AtomicBool, atomic::Ordering},
    time::Duration,
};

use hull_pod::PodProcesses;
use hull_spec::{config::PodsConfig, error::PodError, id::PodId};
use hull_vm::{
    cgroup::PodCgroup,
    identity::Identity,
    process::{Found, Hold, Process},
    rundir::{Role, RunDir},
};
use tokio::sync::watch;

use crate::{
    control, dice,
    host::{Host, Ran},
    kernel::{self, Who},
    script::Script,
    trace::{fault, trace},
};

/// Longest time that a VM stands still without any harm to its pod.
const HARMLESS: u64 = 800;

thread_local! {
    static VMS: RefCell<Vec<Vm>> = const { RefCell::new(Vec::new()) };
}

/// The process of a VM.
struct Vm {
    pid: u32,
    user: u32,
    pod: String,
    run: PathBuf,
    report: PathBuf,
    socket: PathBuf,
    /// None: it has not run yet, or has ended.
    host: Option<Host>,
    state: Arc<State>,
    /// It stands still until then.
    frozen_until: Duration,
    /// Something was done to it that may end it.
    is_harmed: bool,
}

#[derive(Debug)]
struct State {
    ended: watch::Sender<bool>,
    is_killed: AtomicBool,
}

/// How the daemon holds a VM.
struct Held {
    pid: u32,
    state: Arc<State>,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VM {}", self.pid)
    }
}

impl Hold for Held {
    fn has_ended(&self) -> bool {
        *self.state.ended.borrow()
    }

    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let mut ended = self.state.ended.subscribe();
        Box::pin(async move {
            // The sender is in `self`.
            let _ = ended.wait_for(|ended| *ended).await;
        })
    }

    fn kill(&self) -> io::Result<()> {
        if !kernel::is_dead() {
            trace(format_args!("the daemon kills VM {}", self.pid));
            self.state.is_killed.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The processes as the daemon sees them.
#[derive(Debug)]
pub struct Processes {
    /// Where VMs read what goes wrong in them.
    pub kernel: PathBuf,
}

/// The identity of a process that has this number here.
fn identity(pid: u32) -> Identity {
    let mut identity = Identity::of(std::process::id()).unwrap();
    (identity.pid, identity.start_ticks) = (pid, pid.into());
    identity
}

fn held(vm: &Vm) -> Process {
    let held = Held {
        pid: vm.pid,
        state: Arc::clone(&vm.state),
    };
    Process::held(identity(vm.pid), Arc::new(held))
}

impl PodProcesses for Processes {
    fn spawn_vmm(
        &self,
        _: &Path,
        pod: &PodId,
        user: u32,
        run: &RunDir,
        _: Option<&PodCgroup>,
    ) -> Result<Process, PodError> {
        if kernel::is_dead() || dice::fault_in(30) {
            let error = io::Error::from_raw_os_error(libc::EAGAIN);
            return Err(PodError::internal("start the VMM", error));
        }
        let script = kernel::run_as(Who::Nobody, || {
            let script = script();
            fs::write(&self.kernel, serde_json::to_vec(&script).unwrap()).unwrap();
            script
        });
        Ok(VMS.with_borrow_mut(|vms| {
            let pid = 1000 + vms.len() as u32;
            if let Some(other) = vms.iter().find(|vm| vm.user == user && vm.lives()) {
                fault(format!("VM {pid} has the user of VM {}", other.pid));
            }
            trace(format_args!(
                "VM {pid} of {} starts, {script:?}",
                pod.short()
            ));
            vms.push(Vm {
                pid,
                user,
                pod: pod.to_string(),
                run: run.path().to_owned(),
                report: run.exit_report(),
                socket: run.control_socket(),
                host: None,
                state: Arc::new(State {
                    ended: watch::channel(false).0,
                    is_killed: AtomicBool::new(false),
                }),
                frozen_until: Duration::ZERO,
                is_harmed: false,
            });
            held(vms.last().unwrap())
        }))
    }

    fn find(&self, identity: Identity) -> Option<Process> {
        VMS.with_borrow(|vms| {
            let vm = vms.iter().find(|vm| vm.pid == identity.pid && vm.lives())?;
            Some(held(vm))
        })
    }

    fn find_all(&self, _: &PodsConfig) -> Vec<Found> {
        VMS.with_borrow(|vms| {
            let living = vms.iter().filter(|vm| vm.lives());
            living
                .map(|vm| Found {
                    run: vm.run.clone(),
                    role: Role::Vmm,
                    process: held(vm),
                })
                .collect()
        })
    }
}

/// What goes wrong in the next VM.
fn script() -> Script {
    use hull_proto_vmm::ErrorKind;
    let mut script = Script::default();
    if !dice::fault_in(4) {
        return script;
    }
    let calls = ["create", "start", "attach_storage", "configure"];
    match dice::within(0..9) {
        0 => script.refuse_configure = Some(ErrorKind::Invalid),
        1 => script.refuse_start = Some(ErrorKind::Internal),
        2 => script.die_at_start = true,
        3 => script.no_agent = true,
        4 | 5 => script.attempts = dice::within(1..20) as u32,
        6 => script.refuse = vec![dice::pick(&calls).into()],
        7 => script.hang_once = vec![dice::pick(&["create", "attach_storage"]).into()],
        _ => script.refuse_attach = Some(ErrorKind::Internal),
    }
    script
}

impl Vm {
    fn lives(&self) -> bool {
        !*self.state.ended.borrow()
    }

    /// Runs on, or ends.
    fn run(&mut self, polls: u64) -> Ran {
        let nothing = Ran {
            polls: 1,
            is_idle: true,
        };
        if !self.lives() {
            return nothing;
        }
        if self.state.is_killed.load(Ordering::Relaxed) || kernel::has_exited(self.pid) {
            if let Some(host) = self.host.take() {
                host.kill();
            }
            trace(format_args!("VM {} has ended", self.pid));
            self.state.ended.send_replace(true);
            return Ran {
                polls,
                is_idle: false,
            };
        }
        if kernel::now() < self.frozen_until {
            return nothing;
        }
        let host = self.host.get_or_insert_with(|| {
            let host = Host::new(Who::Vm(self.pid));
            let (socket, report) = (self.socket.clone(), self.report.clone());
            host.handle()
                .spawn(async move { control::serve(&socket, &report).await });
            host
        });
        host.run(polls)
    }
}

/// How many there are, dead or alive.
pub fn count() -> usize {
    VMS.with_borrow(Vec::len)
}

/// Runs one of them.
pub fn run(index: usize, polls: u64) -> Ran {
    let mut vm = VMS.with_borrow_mut(|vms| vms[index].take_out());
    let ran = vm.run(polls);
    VMS.with_borrow_mut(|vms| vms[index].put_back(vm));
    ran
}

impl Vm {
    /// The part that runs: what it runs may look at the VMs.
    fn take_out(&mut self) -> Self {
        Self {
            pid: self.pid,
            user: self.user,
            pod: self.pod.clone(),
            run: self.run.clone(),
            report: self.report.clone(),
            socket: self.socket.clone(),
            host: self.host.take(),
            state: Arc::clone(&self.state),
            frozen_until: self.frozen_until,
            is_harmed: self.is_harmed,
        }
    }

    fn put_back(&mut self, other: Self) {
        self.host = other.host;
    }
}

/// Lets time pass for all.
pub fn advance(time: Duration) {
    for index in 0..count() {
        let vm = VMS.with_borrow_mut(|vms| vms[index].take_out());
        if kernel::now() >= vm.frozen_until
            && let Some(host) = &vm.host
        {
            host.advance(time);
        }
        VMS.with_borrow_mut(|vms| vms[index].put_back(vm));
    }
}

/// Something happens to a VM: it is killed, stands still, or loses a connection.
pub fn disturb() {
    VMS.with_borrow_mut(|vms| {
        let living: Vec<usize> = (0..vms.len()).filter(|i| vms[*i].lives()).collect();
        if living.is_empty() {
            return;
        }
        let vm = &mut vms[dice::pick(&living)];
        match dice::within(0..8) {
            0 => {
                trace(format_args!("VM {} is killed", vm.pid));
                vm.is_harmed = true;
                vm.state.is_killed.store(true, Ordering::Relaxed);
            }
            1 => {
                let time = dice::ms(1000..60_000);
                trace(format_args!("VM {} stands still for {time:?}", vm.pid));
                vm.is_harmed = true;
                vm.frozen_until = kernel::now() + time;
            }
            2 | 3 => {
                vm.frozen_until = kernel::now() + dice::ms(1..HARMLESS);
                trace(format_args!("VM {} stands still for a moment", vm.pid));
            }
            _ => {
                let connections = kernel::connections(vm.pid);
                if !connections.is_empty() {
                    let cut = dice::within(0..connections.len() as u64);
                    trace(format_args!("VM {} loses connection {cut}", vm.pid));
                    kernel::cut(connections[cut as usize]);
                }
            }
        }
    });
}

/// Lets those that stand still go on.
pub fn thaw() {
    VMS.with_borrow_mut(|vms| {
        vms.iter_mut()
            .for_each(|vm| vm.frozen_until = Duration::ZERO)
    });
}

/// Whether something was done to a pod's VM that may have ended it.
pub fn is_harmed(pod: &str) -> bool {
    VMS.with_borrow(|vms| vms.iter().any(|vm| vm.pod == pod && vm.is_harmed))
}

/// Whether a pod has a VM that lives.
pub fn lives(pod: &str) -> bool {
    VMS.with_borrow(|vms| vms.iter().any(|vm| vm.pod == pod && vm.lives()))
}

/// The VMs that live.
pub fn living() -> Vec<String> {
    VMS.with_borrow(|vms| {
        let living = vms.iter().filter(|vm| vm.lives());
        living
            .map(|vm| format!("VM {} of {}", vm.pid, vm.pod))
            .collect()
    })
}

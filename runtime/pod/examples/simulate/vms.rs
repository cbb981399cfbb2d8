//! The processes of pods: VMs, each a fake VMM with its guest, and file servers, each on a host of its own.

use std::{
    cell::{Cell, RefCell},
    fmt, fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    pin::Pin,
    rc::Rc,
    sync::{Arc, atomic::AtomicBool, atomic::Ordering},
    time::{Duration, UNIX_EPOCH},
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
    control, dice, files,
    host::{Host, Ran},
    kernel::{self, Who},
    script::Script,
    trace::{fault, trace},
};

/// Longest time that a process stands still without any harm to its pod.
const HARMLESS: u64 = 800;
/// Bytes of a kernel: more than a script has.
const KERNEL: usize = 4096;

thread_local! {
    static VMS: RefCell<Vec<Rc<Vm>>> = const { RefCell::new(Vec::new()) };
}

/// A process of a pod.
struct Vm {
    pid: u32,
    role: Role,
    user: u32,
    pod: String,
    run: RunDir,
    state: Arc<State>,
    body: RefCell<Body>,
    /// It stands still until then.
    frozen_until: Cell<Duration>,
    /// Something was done to it that may end it.
    is_harmed: Cell<bool>,
}

/// What runs.
enum Body {
    /// Nothing yet; a file server has its end of the VM's socket.
    New(Option<OwnedFd>),
    Runs(Host),
    Ended,
}

#[derive(Debug)]
struct State {
    ended: watch::Sender<bool>,
    is_killed: AtomicBool,
}

/// How the daemon holds a process.
struct Held {
    pid: u32,
    state: Arc<State>,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.pid)
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
            trace(format_args!("the daemon kills process {}", self.pid));
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
    /// Whether VMs may be clones.
    pub are_clones: bool,
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
        may_start("start the VMM")?;
        let script = kernel::run_as(Who::Nobody, || {
            let script = Script {
                clone: self.are_clones.then(|| Box::new(script())),
                ..script()
            };
            let mut kernel = serde_json::to_vec(&script).unwrap();
            kernel.resize(KERNEL, b' ');
            fs::write(&self.kernel, kernel).unwrap();
            // It is the same kernel for the daemon, whatever goes wrong with it.
            let kernel = fs::File::options().write(true).open(&self.kernel);
            kernel.unwrap().set_modified(UNIX_EPOCH).unwrap();
            script
        });
        trace(format_args!("VM of {} has {script:?}", pod.short()));
        Ok(start(Role::Vmm, pod, user, run, None))
    }

    fn spawn_file_server(
        &self,
        _: &Path,
        pod: &PodId,
        run: &RunDir,
        _: Option<&PodCgroup>,
        fuse: OwnedFd,
    ) -> Result<Process, PodError> {
        may_start("start the file server")?;
        Ok(start(Role::FileServer, pod, 0, run, Some(fuse)))
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
                    run: vm.run.path().to_owned(),
                    role: vm.role,
                    process: held(vm),
                })
                .collect()
        })
    }
}

fn may_start(action: &str) -> Result<(), PodError> {
    if kernel::is_dead() || dice::fault_in(30) {
        let error = io::Error::from_raw_os_error(libc::EAGAIN);
        return Err(PodError::internal(action, error));
    }
    Ok(())
}

fn start(role: Role, pod: &PodId, user: u32, run: &RunDir, fuse: Option<OwnedFd>) -> Process {
    VMS.with_borrow_mut(|vms| {
        let pid = 1000 + vms.len() as u32;
        let mut same = vms.iter().filter(|vm| vm.role == role && vm.lives());
        let other = same.find(|vm| match role {
            Role::Vmm => vm.user == user,
            Role::FileServer => vm.pod == pod.as_str(),
        });
        if let Some(other) = other {
            let pid_of_other = other.pid;
            fault(format!(
                "{role:?} {pid} has what {pid_of_other} has: {user}"
            ));
        }
        trace(format_args!("{role:?} {pid} of {} starts", pod.short()));
        vms.push(Rc::new(Vm {
            pid,
            role,
            user,
            pod: pod.to_string(),
            run: run.clone(),
            state: Arc::new(State {
                ended: watch::channel(false).0,
                is_killed: AtomicBool::new(false),
            }),
            body: RefCell::new(Body::New(fuse)),
            frozen_until: Cell::default(),
            is_harmed: Cell::default(),
        }));
        held(&vms[vms.len() - 1])
    })
}

/// What goes wrong in the next VM.
fn script() -> Script {
    use hull_proto_vmm::ErrorKind;
    let mut script = Script::default();
    if dice::fault_in(4) {
        script.slow_ms = dice::within(1..500);
    }
    if !dice::fault_in(3) {
        return script;
    }
    let refused = [
        "create",
        "start",
        "attach_storage",
        "configure",
        "exec",
        "update",
    ];
    let calls = [
        "configure",
        "attach_storage",
        "detach_storage",
        "create",
        "start",
        "signal",
        "delete",
        "exec",
        "update",
        "attach_device",
        "detach_device",
        "update_network",
        "shutdown",
    ];
    match dice::within(0..12) {
        0 => script.refuse_configure = Some(ErrorKind::Invalid),
        1 => script.refuse_start = Some(ErrorKind::Internal),
        2 => script.die_at_start = true,
        3 => script.no_agent = true,
        4 | 5 => script.attempts = dice::within(1..20) as u32,
        6 => script.refuse = vec![dice::pick(&refused).into()],
        7 => script.refuse_attach = Some(ErrorKind::Internal),
        8 => script.refuse_plug = Some(ErrorKind::Internal),
        9 => script.hang_once = vec![dice::pick(&calls).into()],
        _ => script.lose_once = vec![dice::pick(&calls).into(), dice::pick(&calls).into()],
    }
    script
}

impl Vm {
    fn lives(&self) -> bool {
        !*self.state.ended.borrow()
    }

    fn is_frozen(&self) -> bool {
        kernel::now() < self.frozen_until.get()
    }

    /// Runs on, or ends.
    fn run(&self, polls: u64) -> Ran {
        let nothing = Ran {
            polls: 1,
            is_idle: true,
        };
        if !self.lives() {
            return nothing;
        }
        if self.state.is_killed.load(Ordering::Relaxed) || kernel::has_exited(self.pid) {
            if let Body::Runs(host) = self.body.replace(Body::Ended) {
                host.kill();
            }
            trace(format_args!("process {} has ended", self.pid));
            self.state.ended.send_replace(true);
            return Ran {
                polls,
                is_idle: false,
            };
        }
        if self.is_frozen() {
            return nothing;
        }
        let mut body = self.body.borrow_mut();
        if let Body::New(fuse) = &mut *body {
            let fuse = fuse.take();
            *body = Body::Runs(self.begin(fuse));
        }
        match &*body {
            Body::Runs(host) => host.run(polls),
            _ => nothing,
        }
    }

    fn begin(&self, fuse: Option<OwnedFd>) -> Host {
        let host = Host::new(Who::Process(self.pid));
        let (run, pid) = (self.run.clone(), self.pid);
        match fuse {
            None => host.handle().spawn(async move {
                control::serve(&run.control_socket(), &run.exit_report()).await
            }),
            Some(fuse) => host
                .handle()
                .spawn(async move { files::serve(pid, &run.files_socket(), fuse).await }),
        };
        host
    }

    fn advance(&self, time: Duration) {
        if let Body::Runs(host) = &*self.body.borrow()
            && !self.is_frozen()
        {
            host.advance(time);
        }
    }
}

/// How many there are, dead or alive.
pub fn count() -> usize {
    VMS.with_borrow(Vec::len)
}

/// The numbers of those that live.
pub fn numbers() -> Vec<usize> {
    VMS.with_borrow(|vms| (0..vms.len()).filter(|n| vms[*n].lives()).collect())
}

/// One of them, apart from the others: what it runs may look at all of them.
fn get(number: usize) -> Rc<Vm> {
    VMS.with_borrow(|vms| Rc::clone(&vms[number]))
}

/// Runs one of them.
pub fn run(number: usize, polls: u64) -> Ran {
    get(number).run(polls)
}

/// Lets time pass for all.
pub fn advance(time: Duration) {
    for number in numbers() {
        get(number).advance(time);
    }
}

/// Something happens to a process: it is killed, stands still, or loses a connection.
pub fn disturb() {
    let living = numbers();
    if living.is_empty() {
        return;
    }
    let vm = get(dice::pick(&living));
    let (role, pid) = (vm.role, vm.pid);
    match dice::within(0..8) {
        0 => {
            trace(format_args!("{role:?} {pid} is killed"));
            vm.is_harmed.set(true);
            vm.state.is_killed.store(true, Ordering::Relaxed);
        }
        1 => {
            let time = dice::ms(1000..60_000);
            trace(format_args!("{role:?} {pid} stands still for {time:?}"));
            vm.is_harmed.set(true);
            vm.frozen_until.set(kernel::now() + time);
        }
        2 | 3 => {
            vm.frozen_until.set(kernel::now() + dice::ms(1..HARMLESS));
            trace(format_args!("{role:?} {pid} stands still for a moment"));
        }
        _ => {
            let connections = kernel::connections(pid);
            if !connections.is_empty() {
                let cut = dice::within(0..connections.len() as u64);
                trace(format_args!("{role:?} {pid} loses connection {cut}"));
                kernel::cut(connections[cut as usize]);
            }
        }
    }
}

/// Lets those that stand still go on.
pub fn thaw() {
    VMS.with_borrow(|vms| {
        vms.iter()
            .for_each(|vm| vm.frozen_until.set(Duration::ZERO))
    });
}

/// The processes of a pod with this role.
fn of_pod<T>(pod: &str, role: Role, tell: impl Fn(&Vm) -> Option<T>) -> Option<T> {
    VMS.with_borrow(|vms| {
        let mut all = vms.iter().filter(|vm| vm.role == role && vm.pod == pod);
        all.find_map(|vm| tell(vm))
    })
}

/// Whether something was done to a pod's VM that may have ended it.
pub fn is_harmed(pod: &str) -> bool {
    of_pod(pod, Role::Vmm, |vm| vm.is_harmed.get().then_some(())).is_some()
}

/// Whether a pod has a VM that lives.
pub fn lives(pod: &str) -> bool {
    of_pod(pod, Role::Vmm, |vm| vm.lives().then_some(())).is_some()
}

/// Whether the process of a container runs, as its guest noted.
pub fn runs(pod: &str, container: &str) -> bool {
    let began_last = |vm: &Vm| {
        let notes = fs::read_to_string(vm.run.path().join("runs")).ok()?;
        let last = notes.lines().rfind(|line| &line[1..] == container)?;
        (vm.lives() && last.starts_with('+')).then_some(())
    };
    of_pod(pod, Role::Vmm, began_last).is_some()
}

/// The file server of a pod, if it lives.
pub fn file_server(pod: &str) -> Option<u32> {
    of_pod(pod, Role::FileServer, |vm| vm.lives().then_some(vm.pid))
}

/// The processes that live.
pub fn living() -> Vec<String> {
    let living = numbers().into_iter().map(get);
    living
        .map(|vm| format!("{:?} {} of {}", vm.role, vm.pid, vm.pod))
        .collect()
}

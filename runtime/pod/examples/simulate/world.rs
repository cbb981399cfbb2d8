//! One run: a node, and what happens on it.

use std::{
    fs, panic,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use hull_spec::config::{PodsConfig, TemplateScope};

use crate::{
    common::{images::FakeImages, network::FakeNetwork},
    daemon::Daemon,
    dice,
    host::{Host, Ran},
    kernel::{self, Who},
    kubelet::{self, Kubelet, TEMPLATE_BYTES},
    node::{Images, Networks},
    trace::{self, fault, trace},
    vms,
};

/// Longest step of time.
const STEP: Duration = Duration::from_secs(1);
/// How long things may go wrong.
const CHAOS_MS: u64 = 60_000;
/// How long everything may take after that.
const QUIET: Duration = Duration::from_secs(900);
/// Bytes of a scratch disk.
const SCRATCH: u64 = 1 << 20;

/// What stands for those of whom there is one, among the numbers of processes of pods.
const KUBELET: usize = usize::MAX;
const DAEMON: usize = usize::MAX - 1;

/// A run.
struct World {
    dir: PathBuf,
    daemon: Daemon,
    kubelet: Host,
    client: Kubelet,
    step: Duration,
    quiet_at: Duration,
}

/// Runs a seed, and shows what happens.
pub fn run(seed: u64, is_shown: bool) -> ExitCode {
    kernel::simulate(seed);
    dice::seed(seed);
    hull_base::block_in_place();
    if is_shown {
        trace::show();
    }
    panic::set_hook(Box::new(|info| {
        fault(format!("{:?} panicked: {info}", kernel::who()));
    }));
    // Short, because sockets are below it, and always of one length.
    let dir = PathBuf::from(format!("/dev/shm/hs-{:07}", std::process::id()));
    trace::leave_out(&dir);
    let mut world = World::new(&dir, seed);
    world.live();
    let Daemon {
        polls,
        starts,
        kills,
        ..
    } = world.daemon;
    let took = kernel::now().as_secs();
    drop(world);
    let sum = trace::sum();
    let told = format!(
        "seed {seed}: {polls} polls, {starts} starts, {kills} kills, {} processes, {took} s, sum {sum:016x}",
        vms::count()
    );
    match trace::found() {
        None => {
            println!("{told}: ok");
            ExitCode::SUCCESS
        }
        Some(what) => {
            eprintln!("{told}: {what}");
            ExitCode::FAILURE
        }
    }
}

impl World {
    fn new(dir: &Path, seed: u64) -> Self {
        let _ = fs::remove_dir_all(dir);
        let (root, state, assets) = (dir.join("r"), dir.join("s"), dir.join("a"));
        for path in [&root, &assets] {
            fs::create_dir_all(path).unwrap();
        }
        for name in ["vmlinux", "root.erofs", "hull-vmm"] {
            fs::write(assets.join(name), vec![0; 512]).unwrap();
        }
        // As if disks had been formatted before: mkfs.ext4 is a process of its own.
        for kind in ["scratch", "volume"] {
            let template = root.join(format!("{kind}-{SCRATCH}.template"));
            fs::write(template, vec![1; TEMPLATE_BYTES as usize]).unwrap();
        }
        let config = PodsConfig {
            scratch_bytes: SCRATCH,
            memory_mib: 16,
            max_memory_mib: 16 + 256,
            guest_overhead_mib: 1,
            boot_timeout: Duration::from_secs(20),
            agent_timeout: Duration::from_secs(20),
            // Every other seed: what others do stays what it was.
            template: match seed % 2 {
                0 => TemplateScope::Node,
                _ => TemplateScope::Off,
            },
            ..PodsConfig::new(root, state, assets)
        };
        let images = FakeImages::new(&dir.join("i"));
        let networks = Networks::new(FakeNetwork::new(&dir.join("n")));
        let logs = dir.join("logs");
        let daemon = Daemon::new(config, Images::new(images), networks, logs.clone());
        let client = Kubelet {
            socket: daemon.socket.clone(),
            logs,
            dir: dir.join("k"),
        };
        Self {
            dir: dir.to_owned(),
            daemon,
            kubelet: Host::new(Who::Nobody),
            client,
            step: Duration::from_millis(1),
            quiet_at: dice::ms(1000..CHAOS_MS),
        }
    }

    fn live(&mut self) {
        let pods: Vec<_> = (0..1 + dice::within(0..3))
            .map(|n| {
                let client = self.client.clone();
                self.kubelet.handle().spawn(client.pod(format!("p{n}")))
            })
            .collect();
        if !self.until(|| pods.iter().all(|pod| pod.is_finished())) {
            return;
        }
        self.be_quiet();
        let probe = self
            .kubelet
            .handle()
            .spawn(kubelet::probe(self.client.clone()));
        // A template may be in the making: a VM that is no pod's, with a directory.
        let runs = self.daemon.config.state.join("pods");
        let is_none_left = || fs::read_dir(&runs).is_ok_and(|mut runs| runs.next().is_none());
        if !self.until(|| probe.is_finished() && vms::living().is_empty() && is_none_left()) {
            return;
        }
        self.check_left(false);
        // What the next daemon finds is nothing too.
        self.daemon.kill();
        self.check_left(true);
    }

    /// Looks for what is left of pods that are gone. What the store of images or a copy of a record
    /// refused to give up is for the next daemon's start.
    fn check_left(&mut self, is_new: bool) {
        let client = self.client.clone();
        let listed = self.kubelet.handle().spawn(async move {
            for what in client.left().await {
                fault(format!("left: {what}"));
            }
        });
        self.until(|| listed.is_finished());
        let mut left = vms::living();
        let Daemon {
            config,
            images,
            networks,
            ..
        } = &self.daemon;
        let mut directories = vec![config.state.join("pods"), config.root.join("pods")];
        if is_new {
            directories.push(config.state.join("records"));
        }
        let leases = images.leases().into_iter();
        left.extend(leases.map(|owner| format!("lease {owner}")));
        for entry in directories
            .iter()
            .flat_map(fs::read_dir)
            .flatten()
            .flatten()
        {
            left.push(entry.path().display().to_string());
        }
        let networks_up = networks.up().into_iter();
        left.extend(networks_up.map(|pod| format!("network {pod}")));
        let owed = networks.without_removal().into_iter();
        left.extend(owed.map(|pod| format!("network {pod} was never removed")));
        for what in left {
            fault(format!("left: {what}"));
        }
    }

    /// Runs everything until something is so. False: it never is, or a fault was found.
    fn until(&mut self, is_done: impl Fn() -> bool) -> bool {
        let mut quiet_rounds = 0;
        while !is_done() {
            if trace::found().is_some() {
                return false;
            }
            if kernel::now() > self.quiet_at + QUIET {
                fault(format!("it never ends, with {:?}", vms::living()));
                return false;
            }
            if dice::is_chaos() {
                self.disturb();
            }
            if self.round() {
                quiet_rounds += 1;
            } else {
                quiet_rounds = 0;
                self.step = Duration::from_millis(1);
            }
            // Looking for events may have brought some.
            if quiet_rounds >= 2 {
                self.advance();
            }
        }
        true
    }

    /// Runs everything a bit, in any order; tells whether nothing went on.
    fn round(&mut self) -> bool {
        let mut order = vms::numbers();
        order.extend([KUBELET, DAEMON]);
        let mut is_quiet = true;
        while !order.is_empty() {
            let number = order.swap_remove(dice::within(0..order.len() as u64) as usize);
            let polls = 1 + dice::within(0..16);
            let ran = match number {
                KUBELET => self.kubelet.run(polls),
                DAEMON => self.daemon.run(polls),
                vm => vms::run(vm, polls),
            };
            is_quiet &= ran
                == Ran {
                    polls: 1,
                    is_idle: true,
                };
            trace::add(&[number as u8, ran.polls as u8, u8::from(ran.is_idle)]);
        }
        is_quiet
    }

    fn advance(&mut self) {
        kernel::advance(self.step);
        self.kubelet.advance(self.step);
        self.daemon.advance(self.step);
        vms::advance(self.step);
        self.step = (self.step * 2).min(STEP);
        if dice::is_chaos() && kernel::now() > self.quiet_at {
            self.be_quiet();
        }
    }

    fn disturb(&mut self) {
        match dice::within(0..4000) {
            0..10 => vms::disturb(),
            10 => self.daemon.break_disk(),
            11 => {
                let seconds = dice::within(0..20_000) as i64 - 10_000;
                trace(format_args!("the clock jumps by {seconds} s"));
                kernel::jump(seconds * 1_000_000_000);
            }
            12 => self.daemon.networks.change_links(),
            _ => {}
        }
    }

    /// Nothing goes wrong any more.
    fn be_quiet(&mut self) {
        if dice::is_chaos() {
            trace(format_args!("from here on nothing goes wrong"));
            self.quiet_at = self.quiet_at.min(kernel::now());
            dice::be_quiet();
            vms::thaw();
            self.daemon.mend();
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.daemon.kill();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

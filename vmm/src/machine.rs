//! The virtual machine as a whole: built from a configuration, then run, changed and stopped.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hull_proto_vmm::{CopiedMemory, DeviceConfig, Metrics, RestoreConfig, VmConfig};
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemoryError;
use vm_memory::mmap::MmapRegionError;
use vm_superio::Trigger;
use vmm_sys_util::epoll::Epoll;

use crate::areas::Areas;
use crate::boot::cmdline::{self, CmdlineError};
use crate::boot::kernel::{self, KernelError};
use crate::boot::mptable::{self, MpTableError};
use crate::boot::params::{self, ParamsError};
use crate::devices::{self, DeviceConfigError};
use crate::epolls::Epolls;
use crate::fds::{FdError, Fds};
use crate::file_regions::FileRegions;
use crate::kvm::device::KvmDevice;
use crate::kvm::state::{MsrList, VcpuState, VcpuStateError};
use crate::kvm::vcpu::{Bus, End, Vcpus};
use crate::kvm::vm::Vm;
use crate::kvm::{KvmError, cpuid, msr, registers};
use crate::layout::{COM1_PIN, IOAPIC, IOAPIC_END, SLOT_BASE, SLOT_END};
use crate::legacy::ioapic::Ioapic;
use crate::legacy::ports::{self, Effect};
use crate::legacy::serial::Com1;
use crate::memory::Memory;
use crate::memory::{self, Backing, MemoryError};
use crate::pluggable::Pluggable;
use crate::seccomp::{DISKS, NETWORK};
use crate::service::Worker;
use crate::slots::{SlotError, Slots};
use crate::snapshot::{self, MachineState, SnapshotError};
use crate::virtio::mem;
use crate::virtio::mmio;
use crate::virtio::state::{DeviceState, MemoryState};

/// Clocks of processors that differ by less than one in so many are the same one, measured twice.
const TSC_TOLERANCE: u32 = 4000;
/// How long devices that are served by threads may take to finish their I/O before a pause.
const IO_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a machine was not built or changed.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The numbers of CPUs make no sense.
    #[error("{boot} of {total} vCPUs at boot is not possible")]
    Vcpus {
        /// Online at boot.
        boot: u8,
        /// All.
        total: u8,
    },
    /// A descriptor is missing.
    #[error("take file descriptor")]
    Fd(#[from] FdError),
    /// No guest memory.
    #[error("create guest memory")]
    Memory(#[from] MemoryError),
    /// No addresses for file regions.
    #[error("reserve addresses for file regions")]
    FileRegions(#[from] MmapRegionError),
    /// No memory for registers.
    #[error("allocate registers of slots")]
    Registers(#[source] MmapRegionError),
    /// KVM refuses.
    #[error("set up virtual machine")]
    Kvm(#[from] KvmError),
    /// The kernel can't be loaded.
    #[error("load guest kernel")]
    Kernel(#[from] KernelError),
    /// The command line is not right.
    #[error("compose kernel command line")]
    Cmdline(#[from] CmdlineError),
    /// The CPU table does not fit.
    #[error("describe CPUs to the guest")]
    MpTable(#[from] MpTableError),
    /// The boot parameters were not written.
    #[error("describe machine to the guest")]
    Params(#[from] ParamsError),
    /// Page tables were not written.
    #[error("write page tables")]
    Tables(#[source] GuestMemoryError),
    /// A device is not right.
    #[error("create device for slot {slot}")]
    Device {
        /// The slot.
        slot: u8,
        /// Why.
        #[source]
        source: DeviceConfigError,
    },
    /// A slot is not free, or not taken.
    #[error("use slot")]
    Slot(#[from] SlotError),
    /// No threads.
    #[error("start threads")]
    Start(#[source] io::Error),
    /// The snapshot can't be read or written.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The snapshot is of another kind of processor, or of one with other features.
    #[error("the snapshot is of another processor: {saved}; this one is {actual}")]
    Processor {
        /// The snapshot's.
        saved: String,
        /// This host's.
        actual: String,
    },
    /// The devices given are not those of the snapshot.
    #[error("the snapshot has devices in slots {saved:?}, and {given:?} are given")]
    Devices {
        /// Slots in the snapshot.
        saved: Vec<u8>,
        /// Slots in the configuration.
        given: Vec<u8>,
    },
    /// The snapshot has no such vCPU.
    #[error("restore vCPU {id}")]
    Vcpu {
        /// Its id.
        id: u8,
        /// Why.
        #[source]
        source: VcpuStateError,
    },
    /// The serial port's state is not possible.
    #[error("restore the serial port")]
    Serial,
    /// The memory beside RAM is not that of the snapshot.
    #[error("the snapshot has {saved} MiB of pluggable memory, and {given} MiB are given")]
    Pluggable {
        /// In the snapshot.
        saved: u64,
        /// In the configuration.
        given: u64,
    },
    /// A vCPU does not stop.
    #[error("vCPUs do not leave the guest")]
    Stuck,
    /// A device is in the middle of I/O that takes its time.
    #[error("devices do not finish their I/O")]
    Busy,
}

/// The interrupt of the serial port.
#[derive(Debug)]
struct Com1Line(Arc<Ioapic<Arc<Vm>>>);

impl Trigger for Com1Line {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.raise(COM1_PIN);
        Ok(())
    }
}

/// The devices that the guest's accesses reach.
#[derive(Debug)]
struct Hardware {
    ioapic: Arc<Ioapic<Arc<Vm>>>,
    com1: Com1<Com1Line>,
    slots: Arc<Slots>,
}

impl Bus for Hardware {
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match address {
            IOAPIC..IOAPIC_END => self.ioapic.read(address - IOAPIC, data),
            _ => data.fill(0xff),
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        match address {
            SLOT_BASE..SLOT_END => self.slots.write(address, data),
            IOAPIC..IOAPIC_END => self.ioapic.write(address - IOAPIC, data),
            _ => {}
        }
    }

    fn pio_read(&self, port: u16, data: &mut [u8]) {
        ports::read(&self.com1, port, data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) -> bool {
        ports::write(&self.com1, port, data) == Effect::Reset
    }
}

/// How long the phases of the start took.
#[derive(Debug, Default)]
struct Phases(Vec<(&'static str, Duration)>);

impl Phases {
    fn time<T>(&mut self, phase: &'static str, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        self.0.push((phase, start.elapsed()));
        result
    }
}

/// What the host's processors and KVM can do.
#[derive(Debug)]
struct Platform {
    cpuid: cpuid::Template,
    msrs: MsrList,
}

/// The processors: before the start, or their threads.
#[derive(Debug)]
enum Processors {
    Ready(Vec<VcpuFd>),
    Started(Vcpus),
}

/// A machine.
#[derive(Debug)]
pub struct Machine {
    vm: Arc<Vm>,
    memory_mib: u64,
    platform: Platform,
    /// RAM, pluggable memory and file regions.
    memory: Memory,
    areas: Areas,
    hardware: Arc<Hardware>,
    processors: Processors,
    /// Serve disks and network cards; there from the start on.
    workers: Vec<Worker>,
    epolls: Epolls,
    phases: Phases,
}

impl Machine {
    /// Builds a machine that is ready to start. Devices without a thread are watched through `epoll`.
    ///
    /// # Errors
    /// [`MachineError`]; nothing is left.
    pub fn build(
        config: &VmConfig,
        fds: &Fds,
        kvm: &KvmDevice,
        epoll: &Arc<Epoll>,
    ) -> Result<Self, MachineError> {
        let (boot, total) = (config.boot_vcpus, config.vcpus);
        if boot == 0 || boot > total || total == u8::MAX {
            return Err(MachineError::Vcpus { boot, total });
        }
        let serial = config.serial.map(|index| fds.file(index)).transpose()?;
        let cmdline = cmdline::compose(&config.cmdline, boot, serial.is_some())?;
        let epolls = Epolls::new(Arc::clone(epoll), total).map_err(MachineError::Start)?;
        let mut phases = Phases::default();

        let memory = phases.time("memory", || memory::allocate(config.memory_mib))?;
        let (all, pluggable) = add_pluggable(&memory, config.pluggable, Backing::Own)?;
        let (vm, vcpus, platform) = phases.time("kvm", || create(kvm, &all, total))?;
        phases.time("kernel_load", || {
            load(config, fds, &memory, &vcpus, &cmdline)
        })?;
        let (memory, areas) = add_files(&all, &platform, &vm, Backing::Own, pluggable)?;
        let hardware = phases.time("devices", || {
            populate(config, fds, &memory, &areas, &vm, &epolls, serial)
        })?;
        Ok(Self {
            vm,
            memory_mib: config.memory_mib,
            platform,
            memory,
            areas,
            hardware,
            processors: Processors::Ready(vcpus),
            workers: Vec::new(),
            epolls,
            phases,
        })
    }

    /// Builds a machine from a snapshot. It is ready to go on. Devices without a thread are watched through
    /// `epoll`.
    ///
    /// # Errors
    /// [`MachineError`]; nothing is left.
    pub fn restore(
        config: &RestoreConfig,
        fds: &Fds,
        kvm: &KvmDevice,
        epoll: &Arc<Epoll>,
    ) -> Result<Self, MachineError> {
        let mut phases = Phases::default();
        let state = phases.time("state", || {
            Ok::<_, MachineError>(snapshot::read(&config.label, &fds.file(config.state)?)?)
        })?;
        let total = u8::try_from(state.vcpus.len()).unwrap_or(u8::MAX);
        if total == 0 || total == u8::MAX {
            return Err(MachineError::Vcpus { boot: total, total });
        }
        let slots = |devices: &mut dyn Iterator<Item = u8>| {
            let mut slots: Vec<u8> = devices.collect();
            slots.sort_unstable();
            slots
        };
        let saved = slots(&mut state.slots.iter().map(|(slot, _)| *slot));
        let given = slots(&mut config.devices.iter().map(|(slot, _)| *slot));
        if saved != given {
            return Err(MachineError::Devices { saved, given });
        }
        let serial = config.serial.map(|index| fds.file(index)).transpose()?;
        let epolls = Epolls::new(Arc::clone(epoll), total).map_err(MachineError::Start)?;
        let beside_mib = state.pluggable_mib;
        let given = config.pluggable.map_or(0, |pluggable| pluggable.mib);
        if beside_mib > 0 && beside_mib != given {
            let saved = beside_mib;
            return Err(MachineError::Pluggable { saved, given });
        }
        let (all, pluggable) = phases.time("memory", || {
            let file = fds.file(config.memory)?;
            let memory = memory::restore(state.memory_mib, beside_mib, &file, &config.written)?;
            let (all, pluggable) = add_pluggable(&memory, config.pluggable, Backing::Snapshot)?;
            if let (Some(pluggable), Some(saved)) = (&pluggable, plugged(&state.slots)) {
                let end = pluggable.length();
                let parts: Vec<_> = mem::parts(&saved.plugged);
                // Else the device is refused later.
                if parts.iter().all(|part| part.end <= end) {
                    pluggable.restore(&parts, &file, state.memory_mib << 20)?;
                }
            }
            Ok::<_, MachineError>((all, pluggable))
        })?;
        let (vm, vcpus, platform) = phases.time("kvm", || create(kvm, &all, total))?;
        phases.time("vcpus", || restore_vcpus(&state, &vm, &vcpus, &platform))?;
        let (memory, areas) = add_files(&all, &platform, &vm, Backing::Snapshot, pluggable)?;
        let hardware = phases.time("devices", || {
            repopulate(config, &state, fds, &memory, &areas, &vm, &epolls, serial)
        })?;
        Ok(Self {
            vm,
            memory_mib: state.memory_mib,
            platform,
            memory,
            areas,
            hardware,
            processors: Processors::Ready(vcpus),
            workers: Vec::new(),
            epolls,
            phases,
        })
    }

    /// Writes the memory of the machine, which goes on, to an empty file. Returns where it stands.
    ///
    /// # Errors
    /// [`MachineError::Memory`]; the file is of no use then.
    pub fn copy(&self, file: &File) -> Result<Vec<CopiedMemory>, MachineError> {
        let beside = self.beside(&self.hardware.slots.states());
        memory::save(&self.memory, self.memory_mib, &beside, file, None)?;
        Ok(memory::copied(&self.memory, self.memory_mib, &beside)?)
    }

    /// Pluggable memory that is a snapshot's, by the states of devices.
    fn beside(&self, slots: &[(u8, mmio::State)]) -> memory::Beside {
        match (&self.areas.pluggable, plugged(slots)) {
            (Some(pluggable), Some(state)) => memory::Beside {
                start: pluggable.start(),
                mib: pluggable.length() >> 20,
                parts: mem::parts(&state.plugged),
            },
            // Without its device the guest never had any.
            _ => memory::Beside::default(),
        }
    }

    /// Writes a snapshot of the machine, which is paused. Of its memory only what has `changed` is written, if
    /// [`Machine::copy`] wrote the file.
    ///
    /// # Errors
    /// [`MachineError`]; the files are of no use then.
    pub fn save(
        &self,
        label: &str,
        state: &File,
        memory: &File,
        changed: Option<&[Range<u64>]>,
    ) -> Result<(), MachineError> {
        let vcpus = self.vcpus().ok_or(MachineError::Stuck)?;
        // What was in flight at the pause may have been answered since.
        if !self.hardware.slots.drain() {
            return Err(MachineError::Busy);
        }
        let stuck = |error: Option<KvmError>| error.map_or(MachineError::Stuck, Into::into);
        let saved = vcpus.look_at(|vcpu| {
            let state = VcpuState::of(vcpu, &self.platform.msrs)?;
            Ok((state, cpuid::tsc_khz(vcpu)))
        });
        let saved = saved.map_err(stuck)?;
        let slots = self.hardware.slots.states();
        let beside = self.beside(&slots);
        let machine = MachineState {
            memory_mib: self.memory_mib,
            pluggable_mib: beside.mib,
            cpuid: self.platform.cpuid.saved(),
            tsc_khz: saved.first().map_or(0, |(_, khz)| *khz),
            clock: self.vm.clock()?,
            vcpus: saved.into_iter().map(|(state, _)| state).collect(),
            ioapic: self.hardware.ioapic.state(),
            com1: self.hardware.com1.state(),
            slots,
        };
        snapshot::write(&machine, label, state)?;
        Ok(memory::save(
            &self.memory,
            self.memory_mib,
            &beside,
            memory,
            changed,
        )?)
    }

    /// Starts the processors. Nothing happens if they are.
    ///
    /// # Errors
    /// [`MachineError::Start`]: the machine is of no more use.
    pub fn start(&mut self) -> Result<(), MachineError> {
        if let Processors::Ready(fds) = &mut self.processors {
            let fds = std::mem::take(fds);
            // The devices stay as long as the process: whichever thread were to let go of them last, it
            // might not do what taking them apart takes.
            std::mem::forget(Arc::clone(&self.hardware));
            for (name, list, epolls) in [
                ("disks", &DISKS, &self.epolls.disks),
                ("network", &NETWORK, &self.epolls.network),
            ] {
                for (number, epoll) in (1..).zip(epolls.iter()) {
                    let name = match number {
                        1 => name.to_owned(),
                        _ => format!("{name}{number}"),
                    };
                    let slots = Arc::clone(&self.hardware.slots);
                    let worker = Worker::start(name, list, slots, Arc::clone(epoll));
                    self.workers.push(worker.map_err(MachineError::Start)?);
                }
            }
            let vcpus =
                Vcpus::start(fds, &self.hardware, &self.memory).map_err(MachineError::Start)?;
            self.processors = Processors::Started(vcpus);
        }
        Ok(())
    }

    /// Returns the processors, once started.
    #[must_use]
    pub fn vcpus(&self) -> Option<&Vcpus> {
        match &self.processors {
            Processors::Started(vcpus) => Some(vcpus),
            Processors::Ready(_) => None,
        }
    }

    /// Returns the slots.
    #[must_use]
    pub fn slots(&self) -> &Slots {
        &self.hardware.slots
    }

    /// Puts a device behind a slot.
    ///
    /// # Errors
    /// [`MachineError::Device`], [`MachineError::Slot`]; nothing changed.
    pub fn attach(&self, slot: u8, config: &DeviceConfig, fds: &Fds) -> Result<(), MachineError> {
        let slots = &self.hardware.slots;
        attach(slots, &self.areas, &self.vm, slot, config, fds)
    }

    /// Takes a device out of its slot.
    ///
    /// # Errors
    /// [`MachineError::Slot`]
    pub fn detach(&self, slot: u8) -> Result<(), MachineError> {
        Ok(self.hardware.slots.detach(slot, &*self.vm)?)
    }

    /// Bounds the pluggable memory that the guest has, in MiB.
    pub fn plug(&self, least_mib: u64, most_mib: u64) {
        if let Some(pluggable) = &self.areas.pluggable {
            pluggable.bound(least_mib, most_mib);
        }
    }

    /// Stops the vCPUs, then completes all I/O.
    ///
    /// # Errors
    /// [`MachineError::Stuck`], [`MachineError::Busy`]: what was paused stays so until [`Machine::resume`].
    pub fn pause(&self) -> Result<(), MachineError> {
        if !self.vcpus().is_none_or(Vcpus::pause) {
            return Err(MachineError::Stuck);
        }
        let deadline = Instant::now() + IO_TIMEOUT;
        if !self.workers.iter().all(|worker| worker.pause(deadline)) {
            return Err(MachineError::Busy);
        }
        self.hardware.slots.drain();
        Ok(())
    }

    /// Lets the vCPUs run again.
    pub fn resume(&self) {
        self.workers.iter().for_each(Worker::resume);
        if let Some(vcpus) = self.vcpus() {
            vcpus.resume();
        }
    }

    /// Returns why the guest ended, if it has, and its kernel's last words, if it panicked.
    #[must_use]
    pub fn end(&self) -> Option<(End, Option<String>)> {
        let end = self.vcpus()?.end()?;
        Some((end, self.hardware.com1.panic_message()))
    }

    /// Returns the counters; times count from `process_start`.
    #[must_use]
    pub fn metrics(&self, process_start: Instant) -> Metrics {
        let mut start_ns: Vec<(String, u64)> = self
            .phases
            .0
            .iter()
            .map(|(name, time)| ((*name).to_owned(), nanoseconds(*time)))
            .collect();
        if let Some(entry) = self.vcpus().and_then(Vcpus::first_entry) {
            start_ns.push((
                "total".to_owned(),
                nanoseconds(entry.duration_since(process_start)),
            ));
        }
        Metrics {
            exits: self.vcpus().map(Vcpus::exits).unwrap_or_default(),
            start_ns,
            plugged_mib: self
                .areas
                .pluggable
                .as_ref()
                .map_or((0, 0), |it| it.metrics()),
            devices: self.hardware.slots.metrics(),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(vcpus) = self.vcpus() {
            vcpus.stop();
        }
    }
}

/// Creates the VM and its vCPUs, in the order that KVM is quickest with.
fn create(
    kvm: &KvmDevice,
    memory: &Memory,
    vcpus: u8,
) -> Result<(Arc<Vm>, Vec<VcpuFd>, Platform), MachineError> {
    let kvm = kvm.check()?;
    let vm = Arc::new(Vm::new(kvm, memory)?);
    let platform = Platform {
        cpuid: cpuid::Template::new(kvm, vcpus)?,
        msrs: MsrList::new(kvm)?,
    };
    let mut fds = Vec::with_capacity(usize::from(vcpus));
    for id in 0..vcpus {
        let fd = vm.create_vcpu(id)?;
        platform.cpuid.apply(&fd, id)?;
        msr::set_boot_msrs(&fd)?;
        registers::set_fpu(&fd)?;
        fds.push(fd);
    }
    Ok((vm, fds, platform))
}

/// Gives vCPUs their saved states, if this host's processors are like those they were saved on.
fn restore_vcpus(
    state: &MachineState,
    vm: &Vm,
    vcpus: &[VcpuFd],
    platform: &Platform,
) -> Result<(), MachineError> {
    let cpuid = platform.cpuid.saved();
    let tsc_khz = vcpus.first().map_or(0, cpuid::tsc_khz);
    if state.cpuid != cpuid || state.tsc_khz.abs_diff(tsc_khz) > state.tsc_khz / TSC_TOLERANCE {
        return Err(MachineError::Processor {
            saved: describe(&state.cpuid, state.tsc_khz),
            actual: describe(&cpuid, tsc_khz),
        });
    }
    for ((id, saved), vcpu) in (0..).zip(&state.vcpus).zip(vcpus) {
        saved
            .apply(vcpu, &platform.msrs, id == 0)
            .map_err(|source| MachineError::Vcpu { id, source })?;
    }
    // After the counters that it is told by.
    Ok(vm.set_clock(state.clock)?)
}

/// Describes a processor: its name, its clock, and a number that differs where features do.
fn describe(cpuid: &[kvm_cpuid_entry2], tsc_khz: u32) -> String {
    let mut features = crc32fast::Hasher::new();
    for entry in cpuid {
        let words = [
            entry.function,
            entry.index,
            entry.eax,
            entry.ebx,
            entry.ecx,
            entry.edx,
        ];
        features.update(words.map(u32::to_le_bytes).as_flattened());
    }
    let (name, features) = (cpuid::processor(cpuid), features.finalize());
    format!("{name:?}, {tsc_khz} kHz, features {features:08x}")
}

/// Returns what was saved of the device of pluggable memory, if there is one.
fn plugged(slots: &[(u8, mmio::State)]) -> Option<&MemoryState> {
    slots.iter().find_map(|(_, saved)| match &saved.device {
        DeviceState::Memory(state) => Some(state),
        _ => None,
    })
}

/// Returns RAM and what may be plugged beside it, if there is anything.
fn add_pluggable(
    ram: &Memory,
    config: Option<hull_proto_vmm::Pluggable>,
    backing: Backing,
) -> Result<(Memory, Option<Arc<Pluggable>>), MemoryError> {
    let Some(config) = config else {
        return Ok((ram.clone(), None));
    };
    let (memory, pluggable) = Pluggable::new(ram, config, backing)?;
    Ok((memory, Some(pluggable)))
}

/// Sets addresses aside for file regions behind all other memory; returns all that devices can reach.
fn add_files(
    memory: &Memory,
    platform: &Platform,
    vm: &Arc<Vm>,
    backing: Backing,
    pluggable: Option<Arc<Pluggable>>,
) -> Result<(Memory, Areas), MachineError> {
    let bits = platform.cpuid.address_bits();
    let files = Arc::new(FileRegions::new(memory, bits, Arc::clone(vm) as _)?);
    let areas = Areas {
        backing,
        pluggable,
        files,
    };
    Ok((areas.files.join(memory), areas))
}

/// Fills guest memory and points the first vCPU at the kernel. The others wait for it to wake them.
fn load(
    config: &VmConfig,
    fds: &Fds,
    memory: &Memory,
    vcpus: &[VcpuFd],
    cmdline: &str,
) -> Result<(), MachineError> {
    let mut kernel = fds.file(config.kernel)?;
    let mut initrd = config.initrd.map(|index| fds.file(index)).transpose()?;
    let loaded = kernel::load(memory, &mut kernel, initrd.as_mut())?;
    params::write(memory, &loaded, cmdline)?;
    mptable::write(memory, config.vcpus)?;
    registers::write_tables(memory).map_err(MachineError::Tables)?;
    if let Some(first) = vcpus.first() {
        registers::set_boot_registers(first, loaded.entry)?;
    }
    Ok(())
}

fn populate(
    config: &VmConfig,
    fds: &Fds,
    memory: &Memory,
    areas: &Areas,
    vm: &Arc<Vm>,
    epolls: &Epolls,
    serial: Option<File>,
) -> Result<Arc<Hardware>, MachineError> {
    let ioapic = Arc::new(Ioapic::new(Arc::clone(vm)));
    let slots = Slots::new(&ioapic, memory.clone(), epolls.clone());
    let slots = Arc::new(slots.map_err(MachineError::Registers)?);
    for (slot, device) in &config.devices {
        attach(&slots, areas, vm, *slot, device, fds)?;
    }
    let com1 = Com1::new(Com1Line(Arc::clone(&ioapic)), serial);
    finish(vm, ioapic, com1, slots)
}

/// As [`populate`], with what was saved.
#[expect(clippy::too_many_arguments, reason = "all that a machine is made of")]
fn repopulate(
    config: &RestoreConfig,
    state: &MachineState,
    fds: &Fds,
    memory: &Memory,
    areas: &Areas,
    vm: &Arc<Vm>,
    epolls: &Epolls,
    serial: Option<File>,
) -> Result<Arc<Hardware>, MachineError> {
    let ioapic = Arc::new(Ioapic::restore(Arc::clone(vm), state.ioapic.clone()));
    let slots = Slots::new(&ioapic, memory.clone(), epolls.clone());
    let slots = Arc::new(slots.map_err(MachineError::Registers)?);
    let com1 = Com1::restore(&state.com1, Com1Line(Arc::clone(&ioapic)), serial)
        .map_err(|_| MachineError::Serial)?;
    // Files that are memory get their places in this order.
    let mut states: Vec<_> = state.slots.iter().collect();
    states.sort_by_key(|(_, saved)| match &saved.device {
        DeviceState::Pmem(pmem) => pmem.start,
        _ => 0,
    });
    let restored = states.into_iter().try_for_each(|(slot, saved)| {
        let device = config.devices.iter().find(|(given, _)| given == slot);
        // There is one for each, or the machine were refused before.
        let Some((slot, device)) = device else {
            return Ok(());
        };
        let device = devices::restore(device, &saved.device, fds, areas).map_err(|source| {
            MachineError::Device {
                slot: *slot,
                source,
            }
        })?;
        Ok(slots.attach_saved(*slot, device, saved, &**vm)?)
    });
    if restored.is_err() {
        // Those that are in use watch descriptors that others have, too.
        for (slot, _) in &state.slots {
            let _ = slots.detach(*slot, &**vm);
        }
    }
    restored.and_then(|()| finish(vm, ioapic, com1, slots))
}

fn finish(
    vm: &Vm,
    ioapic: Arc<Ioapic<Arc<Vm>>>,
    com1: Com1<Com1Line>,
    slots: Arc<Slots>,
) -> Result<Arc<Hardware>, MachineError> {
    let hardware = Hardware {
        ioapic,
        com1,
        slots,
    };
    // SAFETY: the registers are the slots', which vCPUs hold as their bus's.
    unsafe { vm.show_registers(hardware.slots.registers()) }?;
    Ok(Arc::new(hardware))
}

fn attach(
    slots: &Slots,
    areas: &Areas,
    vm: &Vm,
    slot: u8,
    config: &DeviceConfig,
    fds: &Fds,
) -> Result<(), MachineError> {
    let device = devices::create(config, fds, areas)
        .map_err(|source| MachineError::Device { slot, source })?;
    Ok(slots.attach(slot, device, vm)?)
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

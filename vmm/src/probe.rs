//! Finds out whether /dev/kvm can really run a kernel, by running a small 64-bit guest.
//!
//! Flags don't tell: a paravirtual /dev/kvm without hardware behind it opens, answers and runs simple
//! code, and gives up at an instruction that it can't emulate (`XRSTOR`, which every kernel uses).

use std::io;
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::kvm::device::KvmDevice;
use crate::kvm::vcpu::{Bus, End, Vcpus};
use crate::kvm::vm::Vm;
use crate::kvm::{KvmError, cpuid, msr, registers};
use crate::layout::HIGH_RAM;
use crate::memory::{self, MIN_MIB, MemoryError};
use crate::sync::lock;

const PORT: u16 = 0x3f8;
const DONE: u8 = b'K';
const TIMEOUT_MS: i32 = 30_000;

/// What a kernel does first, as far as it takes hardware. Ends in a triple fault.
const GUEST: [u8; 74] = [
    0xb8, 0x01, 0x00, 0x00, 0x00, //       mov eax, 1
    0x0f, 0xa2, //                         cpuid
    0x0f, 0xba, 0xe1, 0x1a, //             bt ecx, 26 (XSAVE)
    0x73, 0x2a, //                         jnc wait
    0x0f, 0x20, 0xe0, //                   mov rax, cr4
    0x0d, 0x00, 0x06, 0x04, 0x00, //       or eax, OSXSAVE | OSFXSR | OSXMMEXCPT
    0x0f, 0x22, 0xe0, //                   mov cr4, rax
    0x31, 0xc9, //                         xor ecx, ecx
    0x31, 0xd2, //                         xor edx, edx
    0xb8, 0x03, 0x00, 0x00, 0x00, //       mov eax, 3 (x87 and SSE)
    0x0f, 0x01, 0xd1, //                   xsetbv
    0xbf, 0x00, 0x00, 0x20, 0x00, //       mov edi, 0x200000
    0x83, 0xca, 0xff, //                   or edx, -1
    0x83, 0xc8, 0xff, //                   or eax, -1
    0x48, 0x0f, 0xae, 0x27, //             xsave64 [rdi]
    0x48, 0x0f, 0xae, 0x2f, //             xrstor64 [rdi]
    //                                wait:
    0xb9, 0xa0, 0x86, 0x01, 0x00, //       mov ecx, 100000
    0xff, 0xc9, //                    spin: dec ecx
    0x75, 0xfc, //                         jnz spin
    0xba, 0xf8, 0x03, 0x00, 0x00, //       mov edx, PORT
    0xb0, DONE, //                         mov al, DONE
    0xee, //                               out dx, al
    0x0f, 0x0b, //                         ud2
];

/// Why no VM can run here. The message is for a person.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// No /dev/kvm.
    #[error(
        "there is no /dev/kvm: the kernel has no KVM, or the machine no hardware virtualization"
    )]
    Absent,
    /// Not allowed.
    #[error("no permission to use /dev/kvm")]
    Permission,
    /// KVM is there and refuses to set a VM up.
    #[error("/dev/kvm can't set up a virtual machine")]
    SetUp(#[source] KvmError),
    /// KVM set the VM up and can't run it.
    #[error("no hardware virtualization behind /dev/kvm: it gave up on a small guest ({0})")]
    NoHardware(String),
    /// The guest did not come to its end.
    #[error("a small guest did not finish within {} s", TIMEOUT_MS / 1000)]
    Timeout,
    /// The guest ended before its work was done.
    #[error("a small guest died before it was done")]
    Died,
    /// The host has no memory for the guest.
    #[error("allocate memory for a small guest")]
    Memory(#[from] MemoryError),
    /// Does not happen: memory too small.
    #[error("prepare a small guest")]
    Prepare(#[from] GuestMemoryError),
    /// No threads or descriptors.
    #[error("start a small guest")]
    Start(#[source] io::Error),
}

impl From<KvmError> for ProbeError {
    fn from(error: KvmError) -> Self {
        match &error {
            KvmError::Open(source) if source.kind() == io::ErrorKind::NotFound => Self::Absent,
            KvmError::Open(source) if source.kind() == io::ErrorKind::PermissionDenied => {
                Self::Permission
            }
            // ENXIO, ENODEV: the device node is there, the driver isn't.
            KvmError::Open(source)
                if [Some(libc::ENXIO), Some(libc::ENODEV)].contains(&source.raw_os_error()) =>
            {
                Self::Absent
            }
            _ => Self::SetUp(error),
        }
    }
}

/// The guest's only device.
#[derive(Debug, Default)]
struct Port(Mutex<Vec<u8>>);

impl Bus for Port {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&self, _: u64, _: &[u8]) {}

    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn pio_write(&self, port: u16, data: &[u8]) -> bool {
        if port == PORT {
            lock(&self.0).extend_from_slice(data);
        }
        false
    }
}

/// Runs the guest.
///
/// # Errors
/// [`ProbeError`]
pub fn run() -> Result<(), ProbeError> {
    let device = KvmDevice::open();
    let kvm = device.check()?;
    let memory = memory::allocate(MIN_MIB)?;
    let vm = Vm::new(kvm, &memory)?;
    let vcpu = vm.create_vcpu(0)?;
    cpuid::Template::new(kvm, 1)?.apply(&vcpu, 0)?;
    msr::set_boot_msrs(&vcpu)?;
    registers::set_fpu(&vcpu)?;
    registers::write_tables(&memory)?;
    memory.write_slice(&GUEST, GuestAddress(HIGH_RAM))?;
    registers::set_boot_registers(&vcpu, HIGH_RAM)?;

    let port = Arc::new(Port::default());
    let vcpus = Vcpus::start(vec![vcpu], &port, &memory).map_err(ProbeError::Start)?;
    let ended = wait(&vcpus).map_err(ProbeError::Start)?;
    vcpus.stop();
    match vcpus.end() {
        _ if !ended => Err(ProbeError::Timeout),
        Some(End::Shutdown(_)) if *lock(&port.0) == [DONE] => Ok(()),
        Some(End::Kvm(details)) => Err(ProbeError::NoHardware(details)),
        _ => Err(ProbeError::Died),
    }
}

fn wait(vcpus: &Vcpus) -> io::Result<bool> {
    use std::os::fd::AsRawFd;
    let epoll = Epoll::new()?;
    epoll.ctl(
        ControlOperation::Add,
        vcpus.ended().as_raw_fd(),
        EpollEvent::new(EventSet::IN, 0),
    )?;
    Ok(epoll.wait(TIMEOUT_MS, &mut [EpollEvent::default()])? == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_clear() {
        match run() {
            Ok(()) => println!("this host runs microVMs"),
            Err(error) => {
                println!("{}", error_reporter::Report::new(&error));
                assert!(!matches!(
                    error,
                    ProbeError::Timeout | ProbeError::Died | ProbeError::Prepare(_)
                ));
            }
        }
    }
}

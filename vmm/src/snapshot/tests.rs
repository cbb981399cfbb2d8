use std::path::Path;

use kvm_bindings::{kvm_mp_state, kvm_xcr};
use proptest::prelude::*;

use super::*;
use crate::virtio::counters::Counters;
use crate::virtio::queue::QueueRecord;
use crate::virtio::state::{
    BlockState, DeviceState, FsState, MemoryState, NetState, PmemState, RngState, VsockState,
};

/// A state that has a value in each field. All of them are named, so that this does not compile when there is
/// another one: raise [`VERSION`] then, and have the test below write its file again.
fn example(seed: u64) -> MachineState {
    let byte = seed as u8;
    let counters = Counters {
        notifications: seed,
        requests: seed ^ 1,
        bytes_out: seed ^ 2,
        bytes_in: seed ^ 3,
        errors: seed ^ 4,
    };
    let queue = QueueRecord {
        max_size: 256,
        size: 16,
        ready: true,
        descriptors: (seed & !0xfff) ^ 0x1000,
        avail: (seed & !0xfff) ^ 0x2000,
        used: (seed & !0xfff) ^ 0x3000,
        next_avail: seed as u16,
        next_used: seed as u16 ^ 1,
        event_idx: true,
    };
    let devices = [
        (
            DeviceState::Block(BlockState {
                serial: format!("disk {seed}"),
                readonly: true,
                length: seed,
                counters,
            }),
            1,
        ),
        (
            DeviceState::Net(NetState {
                mac: [2, 0, 0, 0, 0, byte],
                mtu: Some(1500),
                pairs: 2,
                used_pairs: 1,
            }),
            2,
        ),
        (DeviceState::Rng(RngState { counters }), 1),
        (
            DeviceState::Vsock(VsockState {
                cid: 3,
                last_port: seed as u32,
            }),
            3,
        ),
        (
            DeviceState::Fs(FsState {
                tag: "shares".into(),
                counters,
            }),
            2,
        ),
        (
            DeviceState::Pmem(PmemState {
                start: seed,
                length: seed ^ 0xfff,
                counters,
            }),
            1,
        ),
        (
            DeviceState::Memory(MemoryState {
                plugged: vec![true, false, seed & 1 == 0],
                requested: seed,
                bounds: (1, 2, 3),
                counters,
            }),
            1,
        ),
    ];
    let slot = |(device, queues)| mmio::State {
        status: 15,
        needs_reset: false,
        interrupt: 1,
        generation: 2,
        device_features_select: 1,
        driver_features_select: 1,
        // VIRTIO_F_VERSION_1, as each driver accepts.
        driver_features: 1 << 32,
        queue_select: 3,
        queues: vec![queue; queues],
        device,
    };
    let mut ioapic = ioapic::State {
        select: byte,
        id: 1,
        ..ioapic::State::default()
    };
    ioapic.entries[5] = seed;
    ioapic.pending[5] = true;
    MachineState {
        memory_mib: 64,
        pluggable_mib: 128,
        cpuid: vec![kvm_cpuid_entry2 {
            function: 1,
            index: 2,
            flags: 1,
            eax: seed as u32,
            ebx: 4,
            ecx: 5,
            edx: 6,
            ..Default::default()
        }],
        tsc_khz: 2_500_000,
        clock: seed,
        vcpus: vec![vcpu(seed)],
        ioapic,
        com1: serial::State {
            divisor: [1, 2],
            interrupt_enable: 3,
            interrupt_identification: 4,
            line_control: 5,
            line_status: 6,
            modem_control: 7,
            modem_status: 8,
            scratch: byte,
            received: vec![byte],
        },
        slots: (0..).zip(devices.map(slot)).collect(),
    }
}

fn vcpu(seed: u64) -> VcpuState {
    let mut vcpu = VcpuState {
        mp_state: kvm_mp_state { mp_state: 3 },
        general: Default::default(),
        special: Default::default(),
        xsave: Default::default(),
        xcrs: Default::default(),
        debug: Default::default(),
        lapic: Default::default(),
        msrs: vec![(0x10, seed), (0x6e0, seed ^ 1)],
        events: Default::default(),
    };
    vcpu.general.rip = seed;
    vcpu.special.cr3 = seed;
    vcpu.xsave.region[7] = seed as u32;
    vcpu.xcrs.xcrs[0] = kvm_xcr {
        xcr: 0,
        reserved: 0,
        value: seed,
    };
    vcpu.debug.dr7 = seed;
    vcpu.lapic.regs[9] = seed as i8;
    vcpu.events.nmi.pending = 1;
    vcpu
}

/// The state as JSON, to be compared.
fn told(state: &MachineState) -> serde_json::Value {
    serde_json::to_value(state).unwrap()
}

#[test]
fn what_is_saved_is_what_this_version_saved_ever_since() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The fuzzer's is short, so that most of its mutations are of devices.
    let without_vcpus = MachineState {
        vcpus: Vec::new(),
        ..example(1)
    };
    for (path, label, state) in [
        (
            format!("tests/data/state-{VERSION}"),
            "label",
            example(0x0123_4567_89ab_cdef),
        ),
        (
            "../tests/fuzz/corpus/vmm-snapshot/devices".into(),
            fuzz::LABEL,
            without_vcpus,
        ),
        (
            "../tests/fuzz/corpus/vmm-snapshot/vcpu".into(),
            fuzz::LABEL,
            example(1),
        ),
    ] {
        let path = package.join(path);
        let written = postcard::to_allocvec(&(label, state)).unwrap();
        if std::env::var_os("HULL_WRITE_STATE").is_some() {
            std::fs::write(&path, &written).unwrap();
        }
        assert!(
            std::fs::read(&path).unwrap() == written,
            "the form of a state changed: raise VERSION, and run this test with HULL_WRITE_STATE=1"
        );
    }
}

proptest! {
    #[test]
    fn a_state_is_read_as_it_was_written(seed: u64, label in "[a-z ]{0,20}") {
        let state = example(seed);
        let read = decode(&encode(&state, &label).unwrap(), &label).unwrap();
        prop_assert_eq!(told(&read), told(&state));
    }

    #[test]
    fn no_part_of_a_state_is_a_state(cut in any::<prop::sample::Index>(), flip in any::<prop::sample::Index>()) {
        let whole = encode(&example(7), "label").unwrap();
        let part = &whole[..cut.index(whole.len())];
        prop_assert!(decode(part, "label").is_err());
        let longer = [whole.as_slice(), &[0]].concat();
        prop_assert!(decode(&longer, "label").is_err());
        let mut changed = whole.clone();
        changed[flip.index(whole.len())] ^= 0x10;
        prop_assert!(decode(&changed, "label").is_err());
    }
}

#[test]
fn a_refusal_is_one_line_that_says_what_is_other() {
    let told = |bytes: &[u8], label: &str| decode(bytes, label).unwrap_err().to_string();
    let whole = encode(&example(1), "kernel a").unwrap();
    assert_eq!(
        told(&whole, "kernel b"),
        r#"the snapshot is of "kernel a", not of "kernel b""#
    );
    let mut other = whole.clone();
    other[12..28].copy_from_slice(b"0123456789abcde\n");
    assert_eq!(
        told(&other, "kernel a"),
        format!(
            "the snapshot is of another build of the VMM: format {VERSION}, build 0123456789abcde\\n; \
             this one is {VERSION}, {BUILD}"
        )
    );
    other[8] = 99;
    assert!(told(&other, "kernel a").contains("format 99"));
    let damaged = "this is no snapshot, or not a whole one";
    assert_eq!(told(b"", "x"), damaged);
    assert_eq!(told(&whole[..whole.len() - 1], "kernel a"), damaged);
    assert_eq!(told(&[0; 100], "x"), damaged);
}

#[test]
fn files_are_written_once_and_read_up_to_a_bound() {
    let file = tempfile::tempfile().unwrap();
    let state = example(3);
    let long = "x".repeat(MAX_LABEL + 1);
    assert!(matches!(
        write(&state, &long, &file),
        Err(SnapshotError::Label(_))
    ));
    write(&state, "label", &file).unwrap();
    assert!(matches!(
        write(&state, "label", &file),
        Err(SnapshotError::NotEmpty)
    ));
    assert_eq!(told(&read("label", &file).unwrap()), told(&state));
    file.set_len(MAX_STATE + 1).unwrap();
    assert!(matches!(read("label", &file), Err(SnapshotError::Damaged)));
}

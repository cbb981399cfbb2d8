//! The IOAPIC, in user space (Intel 82093AA; KVM keeps only the local APICs).
//!
//! Every pin is edge-triggered, as our MPTable says: each signal is a message of its own, and a signal of
//! a masked pin is kept until it is unmasked. Pins are shared by slots. A device sets its interrupt
//! status and its rings before it signals, so an interrupt handler that asks all devices on the line
//! sees every signal: if the message comes before the handler reads, it is read; if later, the handler
//! runs again. No exit for the end of an interrupt is needed. A guest that chooses level-triggered mode
//! gets edges all the same.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::layout::{IOAPIC_PINS, LOCAL_APIC};
use crate::sync::lock;

const PINS: usize = IOAPIC_PINS as usize;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

const REGISTER_ID: u8 = 0;
const REGISTER_VERSION: u8 = 1;
const REGISTER_ARBITRATION: u8 = 2;
const FIRST_ENTRY: u8 = 0x10;

/// Version 0x11 (has no end-of-interrupt register), and the number of the last pin.
const VERSION: u32 = (IOAPIC_PINS as u32 - 1) << 16 | 0x11;

const DELIVERY_MODE: u64 = 7 << 8;
const LOGICAL: u64 = 1 << 11;
const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const MASKED: u64 = 1 << 16;
/// Bits of an entry that the guest can't write.
const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;

/// A message-signalled interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Low half of the address; the high one is 0.
    pub address: u32,
    /// Data.
    pub data: u32,
}

/// Where interrupts go: KVM's local APICs.
pub trait MessageSink: std::fmt::Debug + Send + Sync {
    /// Delivers a message.
    fn send(&self, message: Message);
}

impl<S: MessageSink + ?Sized> MessageSink for std::sync::Arc<S> {
    fn send(&self, message: Message) {
        (**self).send(message);
    }
}

/// The registers and lines, as saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Selected register.
    pub select: u8,
    /// Identification.
    pub id: u8,
    /// Redirection table.
    pub entries: [u64; PINS],
    /// Pins with an edge that came while masked.
    pub pending: [bool; PINS],
}

/// The IOAPIC.
#[derive(Debug)]
pub struct Ioapic<S> {
    sink: S,
    state: Mutex<State>,
}

impl<S: MessageSink> Ioapic<S> {
    /// Creates an IOAPIC after a reset: all pins are masked.
    pub fn new(sink: S) -> Self {
        Self {
            sink,
            state: Mutex::new(State {
                entries: [MASKED; PINS],
                ..State::default()
            }),
        }
    }

    /// Creates an IOAPIC from what was saved.
    pub fn restore(sink: S, state: State) -> Self {
        Self {
            sink,
            state: Mutex::new(state),
        }
    }

    /// Returns what is to be saved.
    pub fn state(&self) -> State {
        lock(&self.state).clone()
    }

    /// Signals an interrupt on `pin`.
    pub fn raise(&self, pin: u8) {
        let mut state = lock(&self.state);
        let Some(entry) = state.entries.get(usize::from(pin)).copied() else {
            return;
        };
        if entry & MASKED != 0 {
            state.pending[usize::from(pin)] = true;
        } else {
            self.deliver(entry);
        }
    }

    /// Reads a register.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        let value = match offset {
            SELECT => u32::from(state.select),
            WINDOW => state.read_selected(),
            _ => u32::MAX,
        };
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    /// Writes a register.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let Some(value) = data.first_chunk().map(|value| u32::from_le_bytes(*value)) else {
            return;
        };
        match offset {
            SELECT => lock(&self.state).select = value as u8,
            WINDOW => self.write_selected(value),
            _ => {}
        }
    }

    fn write_selected(&self, value: u32) {
        let mut state = lock(&self.state);
        match state.select {
            REGISTER_ID => state.id = (value >> 24) as u8 & 0xf,
            select => {
                let Some((pin, high)) = entry_of(select) else {
                    return;
                };
                let index = usize::from(pin);
                let old = state.entries[index];
                let new = if high {
                    old & 0xffff_ffff | u64::from(value) << 32
                } else {
                    old & !0xffff_ffff | u64::from(value) & !READ_ONLY
                };
                state.entries[index] = new;
                if new & MASKED == 0 && std::mem::take(&mut state.pending[index]) {
                    self.deliver(new);
                }
            }
        }
    }

    fn deliver(&self, entry: u64) {
        if let Some(message) = message(entry) {
            self.sink.send(message);
        }
    }
}

impl State {
    fn read_selected(&self) -> u32 {
        match self.select {
            REGISTER_ID | REGISTER_ARBITRATION => u32::from(self.id) << 24,
            REGISTER_VERSION => VERSION,
            select => match entry_of(select) {
                Some((pin, true)) => (self.entries[usize::from(pin)] >> 32) as u32,
                Some((pin, false)) => self.entries[usize::from(pin)] as u32,
                None => u32::MAX,
            },
        }
    }
}

/// Returns the pin whose entry a register holds, and whether it is the high half.
fn entry_of(register: u8) -> Option<(u8, bool)> {
    let offset = register.checked_sub(FIRST_ENTRY)?;
    (offset / 2 < IOAPIC_PINS).then_some((offset / 2, offset % 2 == 1))
}

/// Returns the message of an entry, if it has a delivery mode and a vector that devices may use.
fn message(entry: u64) -> Option<Message> {
    let vector = (entry & 0xff) as u32;
    let mode = (entry & DELIVERY_MODE) as u32;
    // Fixed and lowest priority; the others (SMI, NMI, INIT, ExtINT) come from no device.
    if vector < 16 || mode > 1 << 8 {
        return None;
    }
    let destination = (entry >> 56) as u32;
    let logical = u32::from(entry & LOGICAL != 0) << 2;
    let hint = u32::from(mode != 0) << 3;
    Some(Message {
        address: LOCAL_APIC as u32 | destination << 12 | hint | logical,
        data: mode | vector,
    })
}

#[cfg(any(test, fuzzing))]
#[path = "ioapic/fuzz.rs"]
pub(crate) mod fuzz;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Default)]
    struct Sent {
        messages: Mutex<Vec<Message>>,
    }

    impl MessageSink for Sent {
        fn send(&self, message: Message) {
            lock(&self.messages).push(message);
        }
    }

    impl Sent {
        fn take(&self) -> usize {
            std::mem::take(&mut *lock(&self.messages)).len()
        }
    }

    fn ioapic() -> (Ioapic<Arc<Sent>>, Arc<Sent>) {
        let sent = Arc::new(Sent::default());
        (Ioapic::new(Arc::clone(&sent)), sent)
    }

    fn write_register(ioapic: &Ioapic<Arc<Sent>>, register: u8, value: u32) {
        ioapic.write(SELECT, &[register, 0, 0, 0]);
        ioapic.write(WINDOW, &value.to_le_bytes());
    }

    fn read_register(ioapic: &Ioapic<Arc<Sent>>, register: u8) -> u32 {
        ioapic.write(SELECT, &[register, 0, 0, 0]);
        let mut data = [0; 4];
        ioapic.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    fn program(ioapic: &Ioapic<Arc<Sent>>, pin: u8, low: u32) {
        write_register(ioapic, FIRST_ENTRY + pin * 2 + 1, 1 << 24);
        write_register(ioapic, FIRST_ENTRY + pin * 2, low);
    }

    #[test]
    fn an_edge_becomes_a_message_to_the_programmed_cpu() {
        let (ioapic, sent) = ioapic();
        program(&ioapic, 5, 0x41);
        ioapic.raise(5);
        assert_eq!(
            *lock(&sent.messages),
            [Message {
                address: 0xfee0_1000,
                data: 0x41
            }]
        );
    }

    #[test]
    fn every_signal_on_a_shared_edge_line_is_a_message() {
        let (ioapic, sent) = ioapic();
        program(&ioapic, 5, 0x41);
        ioapic.raise(5);
        ioapic.raise(5);
        ioapic.raise(5);
        assert_eq!(sent.take(), 3);
    }

    #[test]
    fn an_edge_on_a_masked_pin_waits_for_the_unmasking() {
        let (ioapic, sent) = ioapic();
        program(&ioapic, 5, 0x1_0041);
        ioapic.raise(5);
        ioapic.raise(5);
        assert_eq!(sent.take(), 0);
        program(&ioapic, 5, 0x41);
        assert_eq!(sent.take(), 1);
        program(&ioapic, 5, 0x41);
        assert_eq!(sent.take(), 0);
    }

    #[test]
    fn level_triggered_pins_send_edges_too() {
        let (ioapic, sent) = ioapic();
        program(&ioapic, 5, 0x8041);
        ioapic.raise(5);
        ioapic.raise(5);
        assert_eq!(sent.take(), 2);
        assert_eq!(read_register(&ioapic, FIRST_ENTRY + 10), 0x8041);
    }

    #[test]
    fn modes_that_no_device_may_use_are_not_delivered() {
        let (ioapic, sent) = ioapic();
        for low in [0x0000, 0x000f, 0x0241, 0x0441, 0x0541, 0x0741] {
            program(&ioapic, 9, low);
            ioapic.raise(9);
        }
        assert_eq!(sent.take(), 0);
    }

    #[test]
    fn registers_beyond_the_last_and_odd_widths_do_no_harm() {
        let (ioapic, sent) = ioapic();
        assert_eq!(read_register(&ioapic, REGISTER_VERSION), 0x0017_0011);
        for register in [3, 0x0f, FIRST_ENTRY + 48, 0xff] {
            write_register(&ioapic, register, 0);
            assert_eq!(read_register(&ioapic, register), u32::MAX);
        }
        ioapic.write(WINDOW, &[1]);
        let mut wide = [0xaa; 8];
        ioapic.read(0x20, &mut wide);
        assert_eq!(wide, [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
        ioapic.raise(200);
        assert_eq!(sent.take(), 0);
    }

    #[test]
    fn a_restored_ioapic_goes_on_where_it_was() {
        let (ioapic, _) = ioapic();
        program(&ioapic, 6, 0x1_0042);
        ioapic.raise(6);
        let json = serde_json::to_string(&ioapic.state()).unwrap();
        let sent = Arc::new(Sent::default());
        let restored = Ioapic::restore(Arc::clone(&sent), serde_json::from_str(&json).unwrap());
        assert_eq!(restored.state(), ioapic.state());
        program(&restored, 6, 0x42);
        assert_eq!(sent.take(), 1);
    }

    /// All orders of what can happen to two pins, up to five in a row.
    #[test]
    fn each_order_of_writes_and_interrupts_does_what_the_model_does() {
        #[derive(Debug, Clone, Copy)]
        enum Step {
            Raise(u8),
            Write(u8, u32),
        }
        let (first, second) = (FIRST_ENTRY + 2 * 5, FIRST_ENTRY + 2 * 6);
        let steps = [
            Step::Raise(5),
            Step::Raise(6),
            // Open, masked, with a vector that devices may not use, level-triggered with read-only bits.
            Step::Write(first, 0x41),
            Step::Write(first, 0x1_0041),
            Step::Write(first, 0x0f),
            Step::Write(first, 0xd1_42),
            Step::Write(first + 1, 0x0200_0000),
            Step::Write(second, 0x43),
            Step::Write(second, 0x1_0043),
        ];
        let mut order = [0; 5];
        loop {
            let (ioapic, sent) = ioapic();
            let mut model = fuzz::Model::new();
            for step in order.map(|at| steps[at]) {
                let delivered = match step {
                    Step::Raise(pin) => {
                        ioapic.raise(pin);
                        model.raise(pin)
                    }
                    Step::Write(register, value) => {
                        write_register(&ioapic, register, value);
                        model.write(SELECT, register.into());
                        model.write(WINDOW, value)
                    }
                };
                let sent = std::mem::take(&mut *lock(&sent.messages));
                assert_eq!(sent, Vec::from_iter(delivered), "{order:?}");
            }
            for register in [first, first + 1, second] {
                model.write(SELECT, register.into());
                assert_eq!(
                    read_register(&ioapic, register),
                    model.read(WINDOW),
                    "{order:?}"
                );
            }
            let Some(digit) = order.iter().position(|at| at + 1 < steps.len()) else {
                break;
            };
            order[digit] += 1;
            order[..digit].fill(0);
        }
    }

    proptest! {
        /// Whatever happens before: a signal is followed by a message once the pin is open.
        #[test]
        fn no_interrupt_is_lost(steps in prop::collection::vec(prop::option::of(any::<bool>()), 0..60)) {
            let (ioapic, sent) = ioapic();
            let set_mask = |masked: bool| program(&ioapic, 5, u32::from(masked) << 16 | 0x41);
            set_mask(false);
            let mut unseen = false;
            for step in steps {
                match step {
                    None => {
                        unseen = true;
                        ioapic.raise(5);
                    }
                    Some(masked) => set_mask(masked),
                }
                unseen &= sent.take() == 0;
            }
            set_mask(false);
            prop_assert!(!unseen || sent.take() > 0);
        }
    }
}

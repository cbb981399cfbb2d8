//! The IOAPIC, in user space (Intel 82093AA; KVM keeps only the local APICs).
//!
//! Lines are shared: a pin has up to 64 sources, and its level is the OR of them. What a pin does
//! with them is the guest's choice:
//!
//! - *Edge* (what our MPTable says): each signal of a source is a message of its own, also while the
//!   others are active, and a signal of a masked pin is kept until it is unmasked. A device sets its
//!   interrupt status before it signals, so an interrupt handler that asks all devices on the line
//!   sees every signal: if the message comes before the handler reads, it is read; if later, the
//!   handler runs again. No exit for the end of the interrupt is needed.
//! - *Level*: one message when the line rises, and again at the end of interrupt while it is still
//!   high. KVM is told of these pins, so that it reports the ends.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use crate::layout::{IOAPIC_PINS, LOCAL_APIC};
use crate::lock;

const PINS: usize = IOAPIC_PINS as usize;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const END_OF_INTERRUPT: u64 = 0x40;

const REGISTER_ID: u8 = 0;
const REGISTER_VERSION: u8 = 1;
const REGISTER_ARBITRATION: u8 = 2;
const FIRST_ENTRY: u8 = 0x10;

/// Version 0x20 (has the end-of-interrupt register), and the number of the last pin.
const VERSION: u32 = (IOAPIC_PINS as u32 - 1) << 16 | 0x20;

const DELIVERY_MODE: u64 = 7 << 8;
const LOGICAL: u64 = 1 << 11;
const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
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
    /// Says which pins are level-triggered and what they send, whenever that changes.
    fn announce_level(&self, pins: &[(u8, Message)]);
}

impl<S: MessageSink + ?Sized> MessageSink for std::sync::Arc<S> {
    fn send(&self, message: Message) {
        (**self).send(message);
    }

    fn announce_level(&self, pins: &[(u8, Message)]) {
        (**self).announce_level(pins);
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
    /// Sources that are active, by pin.
    pub active: [u64; PINS],
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
        sink.announce_level(&level_pins(&state));
        Self {
            sink,
            state: Mutex::new(state),
        }
    }

    /// Returns what is to be saved.
    pub fn state(&self) -> State {
        lock(&self.state).clone()
    }

    /// Signals an interrupt of `source` on `pin`. `status` is nonzero while the source is active; it
    /// is read under the lock, so that concurrent calls leave the line as the last status says.
    pub fn raise(&self, pin: u8, source: u8, status: &AtomicU32) {
        let mut state = lock(&self.state);
        let high = state.update(pin, source, status);
        let Some(entry) = state.entry(pin) else {
            return;
        };
        if entry & LEVEL != 0 {
            if high {
                self.assert(&mut state, pin);
            }
        } else if entry & MASKED != 0 {
            state.pending[usize::from(pin)] = true;
        } else {
            self.deliver(entry);
        }
    }

    /// Signals an edge on a pin whose source has no status.
    pub fn pulse(&self, pin: u8) {
        self.raise(pin, 0, &AtomicU32::new(0));
    }

    /// Tells that `status` may have become zero.
    pub fn lower(&self, pin: u8, source: u8, status: &AtomicU32) {
        lock(&self.state).update(pin, source, status);
    }

    /// Handles the end of a level-triggered interrupt.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut state = lock(&self.state);
        for pin in 0..IOAPIC_PINS {
            let entry = &mut state.entries[usize::from(pin)];
            if *entry & LEVEL != 0 && *entry & REMOTE_IRR != 0 && *entry & 0xff == u64::from(vector)
            {
                *entry &= !REMOTE_IRR;
                if state.active[usize::from(pin)] != 0 {
                    self.assert(&mut state, pin);
                }
            }
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
            END_OF_INTERRUPT => self.end_of_interrupt(value as u8),
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
                let before = level_pins(&state);
                let index = usize::from(pin);
                let old = state.entries[index];
                let mut new = if high {
                    old & 0xffff_ffff | u64::from(value) << 32
                } else {
                    old & !0xffff_ffff & !READ_ONLY
                        | u64::from(value) & !READ_ONLY
                        | old & READ_ONLY
                };
                if new & LEVEL == 0 {
                    new &= !REMOTE_IRR;
                }
                state.entries[index] = new;
                let after = level_pins(&state);
                if after != before {
                    self.sink.announce_level(&after);
                }
                if new & MASKED != 0 {
                    return;
                }
                if new & LEVEL != 0 {
                    state.pending[index] = false;
                    if state.active[index] != 0 {
                        self.assert(&mut state, pin);
                    }
                } else if std::mem::take(&mut state.pending[index]) {
                    self.deliver(new);
                }
            }
        }
    }

    /// Sends the message of a level-triggered pin whose line is high, unless one is under way.
    fn assert(&self, state: &mut State, pin: u8) {
        let entry = &mut state.entries[usize::from(pin)];
        if *entry & (MASKED | REMOTE_IRR) == 0 && self.deliver(*entry) {
            *entry |= REMOTE_IRR;
        }
    }

    fn deliver(&self, entry: u64) -> bool {
        let message = message(entry);
        if let Some(message) = message {
            self.sink.send(message);
        }
        message.is_some()
    }
}

impl State {
    fn update(&mut self, pin: u8, source: u8, status: &AtomicU32) -> bool {
        let Some(active) = self.active.get_mut(usize::from(pin)) else {
            return false;
        };
        let bit = 1 << (source & 63);
        if status.load(Ordering::SeqCst) != 0 {
            *active |= bit;
        } else {
            *active &= !bit;
        }
        *active != 0
    }

    fn entry(&self, pin: u8) -> Option<u64> {
        self.entries.get(usize::from(pin)).copied()
    }

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
    let trigger = if entry & LEVEL == 0 {
        0
    } else {
        1 << 15 | 1 << 14
    };
    Some(Message {
        address: LOCAL_APIC as u32 | destination << 12 | hint | logical,
        data: trigger | mode | vector,
    })
}

/// Returns the level-triggered pins, masked ones too: an interrupt of theirs may be in service.
fn level_pins(state: &State) -> Vec<(u8, Message)> {
    (0..IOAPIC_PINS)
        .zip(state.entries)
        .filter(|(_, entry)| entry & LEVEL != 0)
        .filter_map(|(pin, entry)| Some((pin, message(entry)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Default)]
    struct Sent {
        messages: Mutex<Vec<Message>>,
        level: Mutex<Vec<(u8, Message)>>,
    }

    impl MessageSink for Sent {
        fn send(&self, message: Message) {
            lock(&self.messages).push(message);
        }

        fn announce_level(&self, pins: &[(u8, Message)]) {
            *lock(&self.level) = pins.to_vec();
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

    static ON: AtomicU32 = AtomicU32::new(1);
    static OFF: AtomicU32 = AtomicU32::new(0);

    #[test]
    fn an_edge_becomes_a_message_to_the_programmed_cpu() {
        let (ioapic, sent) = ioapic();
        program(&ioapic, 5, 0x41);
        ioapic.raise(5, 0, &ON);
        assert_eq!(
            *lock(&sent.messages),
            [Message {
                address: 0xfee0_1000,
                data: 0x41
            }]
        );
        assert!(lock(&sent.level).is_empty());
    }

    #[test]
    fn every_signal_on_a_shared_edge_line_is_a_message() {
        let (ioapic, sent) = ioapic();
        program(&ioapic, 5, 0x41);
        ioapic.raise(5, 0, &ON);
        ioapic.raise(5, 19, &ON);
        ioapic.lower(5, 0, &OFF);
        ioapic.raise(5, 0, &ON);
        assert_eq!(sent.take(), 3);
    }

    #[test]
    fn an_edge_on_a_masked_pin_waits_for_the_unmasking() {
        let (ioapic, sent) = ioapic();
        program(&ioapic, 5, 0x1_0041);
        ioapic.raise(5, 0, &ON);
        ioapic.raise(5, 19, &ON);
        assert_eq!(sent.take(), 0);
        program(&ioapic, 5, 0x41);
        assert_eq!(sent.take(), 1);
        program(&ioapic, 5, 0x41);
        assert_eq!(sent.take(), 0);
    }

    #[test]
    fn a_level_line_is_high_until_all_its_sources_are_served() {
        let (ioapic, sent) = ioapic();
        program(&ioapic, 5, 0x8041);
        assert_eq!(lock(&sent.level).len(), 1);
        ioapic.raise(5, 0, &ON);
        ioapic.raise(5, 19, &ON);
        assert_eq!(sent.take(), 1);
        assert_ne!(
            read_register(&ioapic, FIRST_ENTRY + 10) & REMOTE_IRR as u32,
            0
        );
        // The handler serves source 0 only.
        ioapic.lower(5, 0, &OFF);
        ioapic.end_of_interrupt(0x41);
        assert_eq!(sent.take(), 1);
        ioapic.lower(5, 19, &OFF);
        ioapic.end_of_interrupt(0x41);
        assert_eq!(sent.take(), 0);
        assert_eq!(
            read_register(&ioapic, FIRST_ENTRY + 10) & REMOTE_IRR as u32,
            0
        );
    }

    #[test]
    fn a_level_line_that_rose_while_masked_is_delivered_at_unmasking() {
        let (ioapic, sent) = ioapic();
        program(&ioapic, 7, 0x1_8050);
        ioapic.raise(7, 2, &ON);
        assert_eq!(sent.take(), 0);
        program(&ioapic, 7, 0x8050);
        assert_eq!(sent.take(), 1);
    }

    #[test]
    fn a_late_raise_does_not_leave_the_line_high() {
        // The guest acknowledged between the device's status and its signal.
        let (ioapic, sent) = ioapic();
        program(&ioapic, 7, 0x8050);
        ioapic.raise(7, 2, &OFF);
        assert_eq!(sent.take(), 0);
        assert_eq!(ioapic.state().active[7], 0);
    }

    #[test]
    fn making_a_pin_edge_triggered_clears_its_remote_irr() {
        let (ioapic, _sent) = ioapic();
        program(&ioapic, 7, 0x8050);
        ioapic.raise(7, 2, &ON);
        program(&ioapic, 7, 0x1_0050);
        assert_eq!(read_register(&ioapic, FIRST_ENTRY + 14), 0x1_0050);
    }

    #[test]
    fn modes_that_no_device_may_use_are_not_delivered() {
        let (ioapic, sent) = ioapic();
        for low in [0x0000, 0x000f, 0x0241, 0x0441, 0x0541, 0x0741] {
            program(&ioapic, 9, low);
            ioapic.raise(9, 0, &ON);
        }
        assert_eq!(sent.take(), 0);
    }

    #[test]
    fn registers_beyond_the_last_and_odd_widths_do_no_harm() {
        let (ioapic, sent) = ioapic();
        assert_eq!(read_register(&ioapic, REGISTER_VERSION), 0x0017_0020);
        for register in [3, 0x0f, FIRST_ENTRY + 48, 0xff] {
            write_register(&ioapic, register, 0);
            assert_eq!(read_register(&ioapic, register), u32::MAX);
        }
        ioapic.write(WINDOW, &[1]);
        let mut wide = [0xaa; 8];
        ioapic.read(0x20, &mut wide);
        assert_eq!(wide, [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
        ioapic.raise(200, 0, &ON);
        ioapic.lower(200, 0, &ON);
        assert_eq!(sent.take(), 0);
    }

    #[test]
    fn a_restored_ioapic_goes_on_where_it_was() {
        let (ioapic, _) = ioapic();
        program(&ioapic, 5, 0x8041);
        program(&ioapic, 6, 0x1_0042);
        ioapic.raise(5, 0, &ON);
        ioapic.raise(6, 1, &ON);
        let json = serde_json::to_string(&ioapic.state()).unwrap();
        let sent = Arc::new(Sent::default());
        let restored = Ioapic::restore(Arc::clone(&sent), serde_json::from_str(&json).unwrap());
        assert_eq!(restored.state(), ioapic.state());
        assert_eq!(lock(&sent.level).len(), 1);
        restored.end_of_interrupt(0x41);
        assert_eq!(sent.take(), 1);
    }

    /// What sources and a guest can do to a pin.
    #[derive(Debug, Clone, Copy)]
    enum Step {
        Raise(u8),
        Serve(u8),
        Mask(bool),
        EndOfInterrupt,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u8..3).prop_map(Step::Raise),
            (0u8..3).prop_map(Step::Serve),
            any::<bool>().prop_map(Step::Mask),
            Just(Step::EndOfInterrupt),
        ]
    }

    proptest! {
        /// In either mode, whatever happens before: a source that signals is followed by a message
        /// once the pin is open and earlier interrupts have ended.
        #[test]
        fn no_interrupt_is_lost(level in any::<bool>(), steps in prop::collection::vec(step(), 0..60)) {
            let (ioapic, sent) = ioapic();
            let mode = if level { 0x8000 } else { 0 };
            let status = [const { AtomicU32::new(0) }; 3];
            let set_mask = |masked: bool| program(&ioapic, 5, mode | u32::from(masked) << 16 | 0x41);
            set_mask(false);
            // What a handler would find if it ran for the messages sent so far.
            let mut unseen = 0u32;
            for step in steps {
                match step {
                    Step::Raise(source) => {
                        status[usize::from(source)].store(1, Ordering::SeqCst);
                        unseen |= 1 << source;
                        ioapic.raise(5, source, &status[usize::from(source)]);
                    }
                    Step::Serve(source) => {
                        status[usize::from(source)].store(0, Ordering::SeqCst);
                        unseen &= !(1 << source);
                        ioapic.lower(5, source, &status[usize::from(source)]);
                    }
                    Step::Mask(masked) => set_mask(masked),
                    Step::EndOfInterrupt => ioapic.end_of_interrupt(0x41),
                }
                if sent.take() > 0 {
                    unseen = 0;
                }
            }
            set_mask(false);
            if level {
                // The handler for the last message ends; what is still active must come again.
                sent.take();
                ioapic.end_of_interrupt(0x41);
                let active = status.iter().any(|status| status.load(Ordering::SeqCst) != 0);
                prop_assert_eq!(sent.take() > 0 || read_register(&ioapic, FIRST_ENTRY + 10) & REMOTE_IRR as u32 != 0, active);
            } else {
                prop_assert!(unseen == 0 || sent.take() > 0);
            }
        }
    }
}

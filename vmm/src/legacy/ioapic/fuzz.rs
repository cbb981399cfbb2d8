//! Register accesses and interrupts, against a model that keeps everything as it is written.

use std::sync::Arc;

use arbitrary::{Result, Unstructured};

use super::*;

const STEPS: usize = 400;

/// What was delivered.
#[derive(Debug, Default)]
struct Sent(Mutex<Vec<Message>>);

impl MessageSink for Sent {
    fn send(&self, message: Message) {
        lock(&self.0).push(message);
    }
}

/// The pins as a person would write them down from the data sheet.
#[derive(Debug, Clone, Default)]
pub(super) struct Model {
    select: u8,
    id: u32,
    /// Low and high half of each entry.
    entries: Vec<(u32, u32)>,
    waiting: Vec<bool>,
}

impl Model {
    pub(super) fn new() -> Self {
        Self {
            entries: vec![(1 << 16, 0); 24],
            waiting: vec![false; 24],
            ..Self::default()
        }
    }

    fn entry(&self) -> Option<(usize, bool)> {
        (0x10..0x40)
            .contains(&self.select)
            .then(|| (usize::from(self.select - 0x10) / 2, self.select % 2 == 1))
    }

    fn message(&self, pin: usize) -> Option<Message> {
        let (low, high) = self.entries[pin];
        let (vector, mode, logical) = (low & 0xff, low >> 8 & 7, low >> 11 & 1);
        let destination = high >> 24;
        (vector >= 16 && mode <= 1).then_some(Message {
            address: 0xfee0_0000 | destination << 12 | mode << 3 | logical << 2,
            data: mode << 8 | vector,
        })
    }

    /// Returns what is delivered.
    pub(super) fn write(&mut self, offset: u64, value: u32) -> Option<Message> {
        match (offset, self.select, self.entry()) {
            (0, ..) => self.select = value as u8,
            (0x10, 0, _) => self.id = value & 0x0f00_0000,
            (0x10, _, Some((pin, true))) => self.entries[pin].1 = value,
            (0x10, _, Some((pin, false))) => {
                // Delivery status and remote IRR are read-only.
                self.entries[pin].0 = value & !0x5000;
                if value & 1 << 16 == 0 && std::mem::take(&mut self.waiting[pin]) {
                    return self.message(pin);
                }
            }
            _ => {}
        }
        None
    }

    /// Returns what is delivered.
    pub(super) fn raise(&mut self, pin: u8) -> Option<Message> {
        let pin = usize::from(pin);
        let (low, _) = self.entries.get(pin)?;
        if low & 1 << 16 != 0 {
            self.waiting[pin] = true;
            return None;
        }
        self.message(pin)
    }

    pub(super) fn read(&self, offset: u64) -> u32 {
        match (offset, self.select, self.entry()) {
            (0, select, _) => select.into(),
            (0x10, 0 | 2, _) => self.id,
            (0x10, 1, _) => 0x0017_0011,
            (0x10, _, Some((pin, true))) => self.entries[pin].1,
            (0x10, _, Some((pin, false))) => self.entries[pin].0,
            _ => u32::MAX,
        }
    }
}

/// Accesses and interrupts do what the model does.
pub(crate) fn registers(input: &[u8]) {
    // An input that ends is at its end.
    let _ = steps(&mut Unstructured::new(input));
}

fn steps(input: &mut Unstructured<'_>) -> Result<()> {
    let sent = Arc::new(Sent::default());
    let mut ioapic = Ioapic::new(Arc::clone(&sent));
    let mut model = Model::new();
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let expected = match input.int_in_range(0..=7)? {
            0 | 1 => {
                let pin = input.int_in_range(0..=25)?;
                ioapic.raise(pin);
                model.raise(pin)
            }
            2 => {
                let value: u32 = input.arbitrary()?;
                let offset = *input.choose(&[0x10, 0, 4, 0x20, 0xffc])?;
                ioapic.write(offset, &value.to_le_bytes());
                model.write(offset, value)
            }
            3 => {
                let mut data = [0xaa; 8];
                let offset = *input.choose(&[0, 0x10, 0x20])?;
                let width = input.int_in_range(0..=8)?;
                ioapic.read(offset, &mut data[..width]);
                let mut wanted = [0xaa; 8];
                wanted[..width].fill(0);
                let value = model.read(offset).to_le_bytes();
                let known = width.min(4);
                wanted[..known].copy_from_slice(&value[..known]);
                assert_eq!(data, wanted);
                None
            }
            4 => {
                // What is shorter than a register is not written.
                let width = input.int_in_range(0..=3)?;
                ioapic.write(0x10, &[0xff; 3][..width]);
                None
            }
            5 => {
                let state = ioapic.state();
                ioapic = Ioapic::restore(Arc::clone(&sent), state);
                None
            }
            // An entry, as a driver writes it.
            _ => {
                let register = 0x10 + input.int_in_range(0..=47_u8)?;
                let value: u32 = input.arbitrary()?;
                let value = if input.arbitrary()? {
                    value & 0x1_00ff
                } else {
                    value
                };
                ioapic.write(0, &u32::from(register).to_le_bytes());
                ioapic.write(0x10, &value.to_le_bytes());
                model.write(0, register.into());
                model.write(0x10, value)
            }
        };
        let delivered = std::mem::take(&mut *lock(&sent.0));
        assert_eq!(delivered, Vec::from_iter(expected));
    }
    Ok(())
}

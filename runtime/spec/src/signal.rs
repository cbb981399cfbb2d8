//! Signals by name and number (signal(7)), with the real-time ones as images name them:
//! `SIGRTMIN+3` is 37 for every program, whatever its C library keeps for itself.

use std::{fmt, str::FromStr};

use nix::sys::signal::Signal as Standard;
use serde::{Deserialize, Serialize};

const RT_MIN: i32 = 34;
const RT_MAX: i32 = 64;
/// Above this, names count down from `SIGRTMAX`.
const RT_MIDDLE: i32 = RT_MIN + 15;

/// A signal that may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Signal(i32);

impl Signal {
    /// Asks a process to end.
    pub const TERM: Self = Self(Standard::SIGTERM as i32);
    /// Ends a process.
    pub const KILL: Self = Self(Standard::SIGKILL as i32);

    /// What the configuration of an image says: SIGTERM unless it names another.
    ///
    /// # Errors
    /// When it is not the name or number of a signal.
    pub fn of_image(text: &str) -> Result<Self, Unknown> {
        match text.trim() {
            "" => Ok(Self::TERM),
            text => text.parse(),
        }
    }

    /// Its number.
    pub fn number(self) -> u32 {
        self.0.unsigned_abs()
    }

    fn of(number: i32) -> Option<Self> {
        let known = Standard::try_from(number).is_ok() || (RT_MIN..=RT_MAX).contains(&number);
        known.then_some(Self(number))
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            RT_MIN => f.write_str("SIGRTMIN"),
            RT_MAX => f.write_str("SIGRTMAX"),
            n if (RT_MIN..=RT_MIDDLE).contains(&n) => write!(f, "SIGRTMIN+{}", n - RT_MIN),
            n if (RT_MIN..=RT_MAX).contains(&n) => write!(f, "SIGRTMAX-{}", RT_MAX - n),
            n => match Standard::try_from(n) {
                Ok(signal) => f.write_str(signal.as_str()),
                Err(_) => write!(f, "{n}"),
            },
        }
    }
}

/// No such signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unknown;

/// `SIGTERM`, `term`, `15`, `SIGRTMIN+3`.
impl FromStr for Signal {
    type Err = Unknown;

    fn from_str(text: &str) -> Result<Self, Unknown> {
        let upper = text.trim().to_ascii_uppercase();
        if let Ok(number) = upper.parse() {
            return Self::of(number).ok_or(Unknown);
        }
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        let offset = |text: &str| -> Result<i32, Unknown> {
            match text.parse() {
                Ok(n @ 0..=30) => Ok(n),
                _ => Err(Unknown),
            }
        };
        if name == "RTMIN" {
            return Ok(Self(RT_MIN));
        }
        if name == "RTMAX" {
            return Ok(Self(RT_MAX));
        }
        if let Some(above) = name.strip_prefix("RTMIN+") {
            return Self::of(RT_MIN + offset(above)?).ok_or(Unknown);
        }
        if let Some(below) = name.strip_prefix("RTMAX-") {
            return Self::of(RT_MAX - offset(below)?).ok_or(Unknown);
        }
        let signal: Standard = format!("SIG{name}").parse().map_err(|_| Unknown)?;
        Ok(Self(signal as i32))
    }
}

/// The form of a signal in records: its name, or nothing.
pub(crate) mod optional_name {
    use serde::{Deserialize, Deserializer, Serializer, de};

    use super::{Signal, Unknown};

    pub(crate) fn serialize<S: Serializer>(
        signal: &Option<Signal>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match signal {
            Some(signal) => serializer.collect_str(signal),
            None => serializer.serialize_str(""),
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Signal>, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.trim().is_empty() {
            return Ok(None);
        }
        let unknown = |Unknown| de::Error::custom(format!("{text:?} is no signal"));
        text.parse().map(Some).map_err(unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_its_name_or_nothing() {
        #[derive(Serialize, Deserialize)]
        struct Record(#[serde(with = "optional_name")] Option<Signal>);
        let read = |text: &str| serde_json::from_str::<Record>(text).map(|record| record.0);
        for (signal, text) in [(None, "\"\""), (Some(Signal(37)), "\"SIGRTMIN+3\"")] {
            assert_eq!(serde_json::to_string(&Record(signal)).unwrap(), text);
            assert_eq!(read(text).unwrap(), signal);
        }
        assert_eq!(read("\"quit\"").unwrap(), Some(Signal(3)));
        assert!(read("\"SIGNOPE\"").is_err());
    }

    #[test]
    fn every_signal_has_a_name_that_names_it() {
        for number in 1..=64 {
            let Some(signal) = Signal::of(number) else {
                assert!((32..34).contains(&number), "{number}");
                continue;
            };
            assert_eq!(signal.to_string().parse(), Ok(signal));
            assert_eq!(number.to_string().parse(), Ok(signal));
        }
        for (text, number) in [
            ("SIGTERM", 15),
            (" kill ", 9),
            ("SIGRTMIN+3", 37),
            ("rtmax-1", 63),
            ("SIGRTMIN", 34),
        ] {
            assert_eq!(text.parse(), Ok(Signal(number)), "{text}");
        }
        assert_eq!(Signal::of_image(" "), Ok(Signal::TERM));
        assert_eq!(Signal::of_image("SIGQUIT"), Ok(Signal(3)));
        assert_eq!(Signal::of_image("SIGNOPE"), Err(Unknown));
        for text in ["", "0", "32", "65", "SIGNOPE", "RTMIN+31", "RTMIN+-1", "-9"] {
            assert_eq!(text.parse::<Signal>(), Err(Unknown), "{text}");
        }
    }
}

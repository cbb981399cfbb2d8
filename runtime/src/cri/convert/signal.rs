//! Stop signals, both ways. CRI's enum has their names as kill(1) does: `SIGTERM`, `SIGRTMIN+3`.

use hull_proto_cri::v1;
use hull_spec::signal::{Signal, Unknown};

use crate::cri::error::CriError;

/// The signal; none for the runtime's default.
pub(crate) fn from_cri(signal: v1::Signal) -> Result<Option<Signal>, CriError> {
    if signal == v1::Signal::RuntimeDefault {
        return Ok(None);
    }
    let name = signal.as_str_name();
    let unknown = |Unknown| CriError::invalid("config.stop_signal", format!("{name} is no signal"));
    name.trim_start_matches("SIGNAL_")
        .replace("PLUS", "+")
        .replace("MINUS", "-")
        .parse()
        .map(Some)
        .map_err(unknown)
}

/// The enum; the runtime's default for what it has no value for.
pub(crate) fn to_cri(signal: Signal) -> v1::Signal {
    let name = signal
        .to_string()
        .replace('+', "PLUS")
        .replace('-', "MINUS");
    v1::Signal::from_str_name(&format!("SIGNAL_{name}")).unwrap_or(v1::Signal::RuntimeDefault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_survives_both_ways() {
        for number in 1..=65 {
            let signal = v1::Signal::try_from(number).unwrap();
            match from_cri(signal) {
                Ok(ours) => assert_eq!(to_cri(ours.unwrap()), signal, "{signal:?}"),
                // Second names of ABRT, CHLD and IO.
                Err(_) => assert!(
                    matches!(
                        signal,
                        v1::Signal::Sigiot | v1::Signal::Sigcld | v1::Signal::Sigpoll
                    ),
                    "{signal:?}"
                ),
            }
        }
        let number = |signal| from_cri(signal).unwrap().map(Signal::number);
        assert_eq!(number(v1::Signal::RuntimeDefault), None);
        assert_eq!(number(v1::Signal::Sigrtminplus3), Some(37));
        assert_eq!(number(v1::Signal::Sigrtmaxminus1), Some(63));
    }
}

//! Stop signals, both ways. CRI names a signal by an enum, the rest of Hull by
//! its name as in kill(1): `SIGTERM`, `SIGRTMIN+3`.

use hull_proto_cri::v1::Signal;

/// The name; empty for the runtime's default.
pub(crate) fn from_cri(signal: Signal) -> String {
    if signal == Signal::RuntimeDefault {
        return String::new();
    }
    signal
        .as_str_name()
        .trim_start_matches("SIGNAL_")
        .replace("PLUS", "+")
        .replace("MINUS", "-")
}

/// The enum; the runtime's default for what it has no value for.
pub(crate) fn to_cri(name: &str) -> Signal {
    let name = name.to_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let name = name.replace('+', "PLUS").replace('-', "MINUS");
    Signal::from_str_name(&format!("SIGNAL_SIG{name}")).unwrap_or(Signal::RuntimeDefault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_survives_both_ways() {
        for number in 0..=65 {
            let signal = Signal::try_from(number).unwrap();
            assert_eq!(to_cri(&from_cri(signal)), signal, "{signal:?}");
        }
        assert_eq!(from_cri(Signal::Sigrtminplus3), "SIGRTMIN+3");
        assert_eq!(from_cri(Signal::Sigrtmaxminus1), "SIGRTMAX-1");
        assert_eq!(to_cri("quit"), Signal::Sigquit);
        assert_eq!(to_cri("nonsense"), Signal::RuntimeDefault);
    }
}

//! Pressure stall information: `cpu.pressure` and its like.

use hull_proto_agent::agent::{Pressure, Stall};
use protobuf::MessageField;

/// Reads such a file; none when it is empty, as in a kernel without PSI.
pub(super) fn parse(text: &str) -> Option<Pressure> {
    let line = |kind| {
        let rest = text.lines().find_map(|line| line.strip_prefix(kind));
        MessageField(rest.and_then(stall).map(Box::new))
    };
    let pressure = Pressure {
        some: line("some "),
        full: line("full "),
        ..Pressure::default()
    };
    (pressure.some.is_some() || pressure.full.is_some()).then_some(pressure)
}

fn stall(fields: &str) -> Option<Stall> {
    let field = |name: &str| {
        let mut fields = fields.split_ascii_whitespace();
        fields.find_map(|field| field.strip_prefix(name)?.strip_prefix('='))
    };
    Some(Stall {
        avg10: field("avg10")?.parse().ok()?,
        avg60: field("avg60")?.parse().ok()?,
        avg300: field("avg300")?.parse().ok()?,
        total_us: field("total")?.parse().ok()?,
        ..Stall::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_lines_are_read() {
        let text = "some avg10=0.22 avg60=0.17 avg300=1.11 total=58761459\n\
                    full avg10=0.20 avg60=0.10 avg300=0.00 total=27\n";
        let pressure = parse(text).unwrap();
        assert_eq!(pressure.some.avg300, 1.11);
        assert_eq!(pressure.some.total_us, 58_761_459);
        assert_eq!((pressure.full.avg10, pressure.full.total_us), (0.20, 27));
    }

    #[test]
    fn what_is_not_there_is_not_told() {
        assert_eq!(parse(""), None);
        assert_eq!(parse("some avg10=x avg60=0 avg300=0 total=1\n"), None);
        let some = parse("some avg10=0.00 avg60=0.00 avg300=0.00 total=5\n").unwrap();
        assert!(some.full.is_none());
    }
}

//! What is asked for on the command line.

use std::str::FromStr;

/// What `hull run` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct RunArgs {
    /// Image name
    pub(crate) image: String,
    /// Command with its arguments, in place of the image's
    #[arg(last = true)]
    pub(crate) command: Vec<String>,
    /// Set an environment variable; may be repeated
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<Variable>,
    /// Memory limit: bytes, or with K, M or G
    #[arg(short, long, value_name = "SIZE")]
    pub(crate) memory: Option<Bytes>,
    /// CPU limit, e.g. 0.5
    #[arg(long, value_name = "NUMBER", value_parser = parse_cpus)]
    pub(crate) cpus: Option<f64>,
    /// Runtime handler
    #[arg(long, value_name = "NAME", default_value = "")]
    pub(crate) handler: String,
    /// Say nothing but what the container says
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// A size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) i64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let upper = text.to_uppercase();
        let upper = upper.trim_end_matches("IB").trim_end_matches('B');
        let digits = upper.trim_end_matches(['K', 'M', 'G']);
        let shift = match &upper[digits.len()..] {
            "" => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            _ => return Err(format!("{text:?} is no size")),
        };
        digits
            .parse::<i64>()
            .ok()
            .filter(|&number| number > 0)
            .and_then(|number| number.checked_mul(1 << shift))
            .map(Self)
            .ok_or_else(|| format!("{text:?} is no size"))
    }
}

/// An environment variable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Variable {
    pub(super) name: String,
    pub(super) value: String,
}

impl FromStr for Variable {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok(Self {
                name: name.to_owned(),
                value: value.to_owned(),
            }),
            _ => Err(format!("{text:?} is not NAME=VALUE")),
        }
    }
}

/// A number of CPUs.
pub(super) fn parse_cpus(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|cpus| (0.01..=255.0).contains(cpus))
        .ok_or_else(|| format!("{text:?} is no number from 0.01 to 255"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("1048576", 1 << 20),
            ("64M", 64 << 20),
            ("64m", 64 << 20),
            ("64MiB", 64 << 20),
            ("2g", 2 << 30),
            ("8kb", 8 << 10),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for bad in ["", "M", "0", "-1", "1T", "9999999999999G", "1.5G", "1KM"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad}");
        }
    }

    #[test]
    fn cpus_are_a_number() {
        assert_eq!(parse_cpus("1.5"), Ok(1.5));
        assert!(parse_cpus("0").is_err());
        assert!(parse_cpus("NaN").is_err());
    }
}

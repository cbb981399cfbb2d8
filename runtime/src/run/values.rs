//! The forms that values have on the command line.

use std::{net::IpAddr, str::FromStr};

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
    /// None: as it is here, if it is.
    pub(super) value: Option<String>,
}

impl FromStr for Variable {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (text, None),
        };
        if name.is_empty() {
            return Err(format!("{text:?} is not NAME=VALUE"));
        }
        Ok(Self {
            name: name.to_owned(),
            value,
        })
    }
}

/// A port of the host that leads to one of the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Port {
    /// None: all addresses.
    pub(super) address: Option<IpAddr>,
    pub(super) host: u16,
    pub(super) container: u16,
    pub(super) protocol: Protocol,
}

/// What is spoken at a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

impl FromStr for Port {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (ports, protocol) = match text.split_once('/') {
                None => (text, Protocol::Tcp),
                Some((ports, "tcp")) => (ports, Protocol::Tcp),
                Some((ports, "udp")) => (ports, Protocol::Udp),
                Some(_) => return None,
            };
            let (host, container) = ports.rsplit_once(':')?;
            let (address, host) = match host.rsplit_once(':') {
                Some((address, host)) => {
                    let bare = address.strip_prefix('[').and_then(|a| a.strip_suffix(']'));
                    (Some(bare.unwrap_or(address).parse().ok()?), host)
                }
                None => (None, host),
            };
            let port = |text: &str| text.parse().ok().filter(|&port| port != 0);
            Some(Self {
                address,
                host: port(host)?,
                container: port(container)?,
                protocol,
            })
        };
        parse().ok_or_else(|| format!("{text:?} is not [IP:]HOST:CONTAINER[/udp]"))
    }
}

/// Who the container's process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(super) user: Account,
    pub(super) group: Option<u32>,
}

/// A user of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Account {
    Id(u32),
    Name(String),
}

impl FromStr for User {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || format!("{text:?} is not USER or UID, or that with :GID");
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group.parse().map_err(|_| form())?)),
            None => (text, None),
        };
        let user = match user.parse() {
            Ok(id) => Account::Id(id),
            Err(_) if user.is_empty() => return Err(form()),
            Err(_) => Account::Name(user.to_owned()),
        };
        Ok(Self { user, group })
    }
}

/// A number of CPUs.
pub(super) fn cpus(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|cpus| (0.01..=255.0).contains(cpus))
        .ok_or_else(|| format!("{text:?} is no number from 0.01 to 255"))
}

/// A name of a container, in docker's form; it is a directory's too, and the host's in the guest.
pub(super) fn name(text: &str) -> Result<String, String> {
    let good = text.len() <= 63
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
    if good {
        return Ok(text.to_owned());
    }
    Err("a name is a letter or digit, then letters, digits, _, . and -, 63 at most".to_owned())
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
        assert_eq!(cpus("1.5"), Ok(1.5));
        assert!(cpus("0").is_err());
        assert!(cpus("NaN").is_err());
    }

    #[test]
    fn variables_have_a_value_or_that_which_they_have_here() {
        let variable = |name: &str, value: Option<&str>| {
            Ok(Variable {
                name: name.to_owned(),
                value: value.map(str::to_owned),
            })
        };
        assert_eq!("A=b=c".parse(), variable("A", Some("b=c")));
        assert_eq!("A=".parse(), variable("A", Some("")));
        assert_eq!("A".parse(), variable("A", None));
        for bad in ["", "=", "=x"] {
            assert!(bad.parse::<Variable>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_may_have_an_address_and_a_protocol() {
        let port = |address: Option<&str>, host, container, protocol| {
            Ok(Port {
                address: address.map(|address| address.parse().unwrap()),
                host,
                container,
                protocol,
            })
        };
        let (tcp, udp) = (Protocol::Tcp, Protocol::Udp);
        assert_eq!("8080:80".parse(), port(None, 8080, 80, tcp));
        assert_eq!("53:53/udp".parse(), port(None, 53, 53, udp));
        assert_eq!(
            "10.0.0.1:1:2/tcp".parse(),
            port(Some("10.0.0.1"), 1, 2, tcp)
        );
        assert_eq!("[::1]:1:2".parse(), port(Some("::1"), 1, 2, tcp));
        for bad in [
            "", "80", ":80", "80:", "0:1", "1:0", "1:65536", "1:2/icmp", "x:1:2", "1:2:3",
        ] {
            assert!(bad.parse::<Port>().is_err(), "{bad}");
        }
    }

    #[test]
    fn users_have_a_name_or_number_and_groups_a_number() {
        let user = |user, group| Ok(User { user, group });
        assert_eq!("7".parse(), user(Account::Id(7), None));
        assert_eq!("7:8".parse(), user(Account::Id(7), Some(8)));
        assert_eq!("www:8".parse(), user(Account::Name("www".into()), Some(8)));
        for bad in ["", ":8", "7:", "7:wheel", "7:8:9"] {
            assert!(bad.parse::<User>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_those_of_docker() {
        assert!(name("a").is_ok() && name("0_x.y-Z").is_ok());
        for bad in ["", "-a", ".", "a/b", "a b", "ä", &"a".repeat(64)] {
            assert!(name(bad).is_err(), "{bad}");
        }
    }
}

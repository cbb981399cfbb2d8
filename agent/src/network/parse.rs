//! Addresses and names in words.

use std::net::IpAddr;

use super::error::{NetworkError, Result};

pub(super) fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let bad = || NetworkError::Mac(text.to_owned());
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2).ok_or_else(bad)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
    }
    if parts.next().is_some() {
        return Err(bad());
    }
    Ok(mac)
}

pub(super) fn format_mac(mac: &[u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

/// Names as the kernel allows them (`dev_valid_name`).
pub(super) fn parse_name(text: &str) -> Result<String> {
    let fits = (1..=15).contains(&text.len())
        && !matches!(text, "." | "..")
        && text
            .bytes()
            .all(|b| b.is_ascii_graphic() && !b"/:".contains(&b));
    if fits {
        Ok(text.to_owned())
    } else {
        Err(NetworkError::Name(text.to_owned()))
    }
}

pub(super) fn parse_address(text: &str) -> Result<IpAddr> {
    text.parse()
        .map_err(|_| NetworkError::Address(text.to_owned()))
}

pub(super) fn parse_optional(text: &str) -> Result<Option<IpAddr>> {
    let address = (!text.is_empty()).then(|| parse_address(text));
    address.transpose()
}

pub(super) fn parse_cidr(text: &str) -> Result<(IpAddr, u8)> {
    let parse = || {
        let (address, prefix) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let prefix: u8 = prefix.parse().ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        (prefix <= most).then_some((address, prefix))
    };
    parse().ok_or_else(|| NetworkError::Cidr(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_are_six_bytes_of_two_digits() {
        assert_eq!(
            parse_mac("02:00:00:aB:cd:0f").unwrap()[3..],
            [0xab, 0xcd, 0x0f]
        );
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "2:0:0:0:0:0",
            "02:00:00:00:00:zz",
        ] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
        assert_eq!(format_mac(&[2, 0, 0, 1, 0, 255]), "02:00:00:01:00:ff");
    }

    #[test]
    fn prefixes_fit_their_family() {
        assert_eq!(
            parse_cidr("10.0.0.5/16").unwrap(),
            ("10.0.0.5".parse().unwrap(), 16)
        );
        assert_eq!(parse_cidr("::/0").unwrap().1, 0);
        for bad in [
            "10.0.0.5",
            "10.0.0.5/33",
            "fd00::/129",
            "x/8",
            "10.0.0.5/-1",
        ] {
            assert!(parse_cidr(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn interface_names_are_the_kernels() {
        assert!(parse_name("eth0").is_ok());
        for bad in ["", "..", "a/b", "a:b", "a b", "0123456789abcdef"] {
            assert!(parse_name(bad).is_err(), "{bad}");
        }
    }
}

//! One 512-byte tar header and the PAX records that may precede it (POSIX.1-2017 pax, "ustar
//! Interchange Format"; GNU extensions: base-256 numbers and its own magic).

use std::collections::BTreeMap;
use std::io;

pub(super) const BLOCK: usize = 512;

/// Why a tar stream cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    #[error("read tar stream")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Malformed(String),
}

impl TarError {
    pub(super) fn malformed(reason: impl Into<String>) -> Self {
        Self::Malformed(reason.into())
    }
}

/// The fields of one header, undecorated.
#[derive(Debug)]
pub(super) struct RawHeader {
    pub(super) type_flag: u8,
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) size: u64,
    pub(super) mtime: i64,
    pub(super) major: u64,
    pub(super) minor: u64,
}

impl RawHeader {
    /// Checks the checksum and takes the fields.
    pub(super) fn parse(block: &[u8; BLOCK]) -> Result<Self, TarError> {
        verify_checksum(block)?;
        let posix = &block[257..263] == b"ustar\0";
        let gnu = &block[257..265] == b"ustar  \0";
        let mut path = until_nul(&block[0..100]).to_vec();
        if posix {
            // "tar\0" at the end marks star's format, whose prefix field is shorter.
            let prefix_end = if &block[508..512] == b"tar\0" {
                476
            } else {
                500
            };
            let prefix = until_nul(&block[345..prefix_end]);
            if !prefix.is_empty() {
                path = [prefix, b"/", &path].concat();
            }
        }
        let positive = |name, range: std::ops::Range<usize>| {
            u64::try_from(number(name, &block[range])?)
                .map_err(|_| TarError::malformed(format!("header field {name} is negative")))
        };
        let has_devices = posix || gnu;
        Ok(Self {
            type_flag: block[156],
            path,
            link: until_nul(&block[157..257]).to_vec(),
            // The type bits that old writers put here are not the type.
            mode: u32::try_from(positive("mode", 100..108)? & 0o7777).unwrap_or(0),
            uid: positive("uid", 108..116)?,
            gid: positive("gid", 116..124)?,
            size: positive("size", 124..136)?,
            mtime: number("mtime", &block[136..148])?,
            major: if has_devices {
                positive("devmajor", 329..337)?
            } else {
                0
            },
            minor: if has_devices {
                positive("devminor", 337..345)?
            } else {
                0
            },
        })
    }
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

fn verify_checksum(block: &[u8; BLOCK]) -> Result<(), TarError> {
    let stored = number("checksum", &block[148..156])?;
    let bytes = |i: usize| {
        if (148..156).contains(&i) {
            b' '
        } else {
            block[i]
        }
    };
    let unsigned: i64 = (0..BLOCK).map(|i| i64::from(bytes(i))).sum();
    // Some old writers summed signed bytes.
    let signed: i64 = (0..BLOCK).map(|i| i64::from(bytes(i).cast_signed())).sum();
    if stored == unsigned || stored == signed {
        Ok(())
    } else {
        Err(TarError::malformed("header checksum does not match"))
    }
}

/// A number in octal digits, or in base 256 when its first bit is set.
pub(super) fn number(name: &str, field: &[u8]) -> Result<i64, TarError> {
    let bad = || TarError::malformed(format!("header field {name} is not a number"));
    let Some((&first, rest)) = field.split_first() else {
        return Err(bad());
    };
    if first & 0x80 != 0 {
        let mut value = if first & 0x40 != 0 {
            i128::from(first) - 0x100
        } else {
            i128::from(first & 0x3f)
        };
        for &byte in rest {
            value = (value << 8) | i128::from(byte);
            if i64::try_from(value).is_err() {
                return Err(bad());
            }
        }
        return i64::try_from(value).map_err(|_| bad());
    }
    let text = until_nul(field).trim_ascii();
    if text.is_empty() {
        return Ok(0);
    }
    let text = std::str::from_utf8(text).map_err(|_| bad())?;
    if text.starts_with('+') {
        return Err(bad());
    }
    i64::from_str_radix(text, 8).map_err(|_| bad())
}

/// What PAX records, GNU long names and sparse records say about the next member.
#[derive(Debug, Default)]
pub(super) struct Extensions {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) sparse: PaxSparse,
}

/// The `GNU.sparse.*` records, formats 0.0, 0.1 and 1.0.
#[derive(Debug, Default)]
pub(super) struct PaxSparse {
    pub(super) major: Option<u64>,
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    /// Offsets and lengths in turn.
    pub(super) map: Vec<u64>,
}

impl PaxSparse {
    pub(super) fn is_used(&self) -> bool {
        self.major.is_some() || self.real_size.is_some() || !self.map.is_empty()
    }
}

impl Extensions {
    /// Takes the records of one extended header: `LENGTH KEY=VALUE\n` each.
    pub(super) fn read_pax(&mut self, mut records: &[u8]) -> Result<(), TarError> {
        while !records.is_empty() {
            let (record, rest) = split_record(records)
                .ok_or_else(|| TarError::malformed("extended header has a broken record"))?;
            records = rest;
            let Some(equals) = record.iter().position(|b| *b == b'=') else {
                return Err(TarError::malformed(
                    "extended header has a record without =",
                ));
            };
            self.take(&record[..equals], &record[equals + 1..])?;
        }
        Ok(())
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        const XATTR: &[u8] = b"SCHILY.xattr.";
        if let Some(name) = key.strip_prefix(XATTR) {
            self.xattrs.insert(name.to_vec(), value.to_vec());
            return Ok(());
        }
        // An empty value takes back what a record before it said.
        let text = || (!value.is_empty()).then(|| value.to_vec());
        let decimal = || match value {
            [] => Ok(None),
            _ => decimal(value).map(Some),
        };
        match key {
            b"path" => self.path = without_nul(text())?,
            b"linkpath" => self.link = without_nul(text())?,
            b"size" => self.size = decimal()?,
            b"uid" => self.uid = decimal()?,
            b"gid" => self.gid = decimal()?,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(pax_time(value)?),
            b"GNU.sparse.major" => self.sparse.major = decimal()?,
            b"GNU.sparse.name" => self.sparse.name = without_nul(text())?,
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => self.sparse.real_size = decimal()?,
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                self.sparse.map.extend(decimal()?);
            }
            b"GNU.sparse.map" => {
                self.sparse.map = value
                    .split(|b| *b == b',')
                    .map(self::decimal)
                    .collect::<Result<_, _>>()?;
            }
            _ => {}
        }
        Ok(())
    }
}

fn without_nul(text: Option<Vec<u8>>) -> Result<Option<Vec<u8>>, TarError> {
    match text {
        Some(text) if text.contains(&0) => Err(TarError::malformed(
            "extended header has a name with a zero byte",
        )),
        text => Ok(text),
    }
}

fn split_record(records: &[u8]) -> Option<(&[u8], &[u8])> {
    let space = records.iter().take(20).position(|b| *b == b' ')?;
    let length = usize::try_from(decimal(&records[..space]).ok()?).ok()?;
    let (record, rest) = records.split_at_checked(length)?;
    let body = record.get(space + 1..)?.strip_suffix(b"\n")?;
    Some((body, rest))
}

pub(super) fn decimal(text: &[u8]) -> Result<u64, TarError> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text)
        .ok()
        .filter(|_| digits)
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| TarError::malformed("extended header has a value that is not a number"))
}

/// Seconds with an optional fraction, possibly before 1970, as seconds and 0..10⁹ nanoseconds.
fn pax_time(text: &[u8]) -> Result<(i64, u32), TarError> {
    let bad = || TarError::malformed("extended header has a time that is not a number");
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(text) => (true, text),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |b| *b == b'.');
    let whole = decimal(parts.next().unwrap_or_default()).map_err(|_| bad())?;
    let mut seconds = i64::try_from(whole).map_err(|_| bad())?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(bad());
    }
    let mut nanoseconds = 0u32;
    for position in 0..9 {
        let digit = fraction.get(position).map_or(0, |b| b - b'0');
        nanoseconds = nanoseconds * 10 + u32::from(digit);
    }
    if negative {
        seconds = -seconds;
        if nanoseconds > 0 {
            seconds -= 1;
            nanoseconds = 1_000_000_000 - nanoseconds;
        }
    }
    Ok((seconds, nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        assert_eq!(number("n", b"0000644\0").unwrap(), 0o644);
        assert_eq!(number("n", b" 644 \0\0\0").unwrap(), 0o644);
        assert_eq!(number("n", b"\0\0\0\0\0\0\0\0").unwrap(), 0);
        assert_eq!(number("n", b"\x80\0\0\0\0\0\x01\0").unwrap(), 256);
        assert_eq!(
            number("n", b"\xff\xff\xff\xff\xff\xff\xff\xfe").unwrap(),
            -2
        );
        assert!(number("n", b"00x\0").is_err());
        assert!(number("n", b"-12").is_err() || number("n", b"-12").unwrap() == -10);
        assert!(
            number(
                "n",
                &[0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]
            )
            .is_err()
        );
    }

    #[test]
    fn times_have_fractions_and_may_be_before_the_epoch() {
        assert_eq!(pax_time(b"12").unwrap(), (12, 0));
        assert_eq!(pax_time(b"12.5").unwrap(), (12, 500_000_000));
        assert_eq!(pax_time(b"12.1234567899").unwrap(), (12, 123_456_789));
        assert_eq!(pax_time(b"-1.25").unwrap(), (-2, 750_000_000));
        assert!(pax_time(b"1e9").is_err());
        assert!(pax_time(b"").is_err());
    }

    #[test]
    fn broken_records_are_refused() {
        for bad in [
            &b"5 a=b"[..],
            b"999 path=x\n",
            b"0 a=b\n",
            b"path=x\n",
            b"9 pathxx\n",
            b"12 path=a\0bc\n",
            b"18446744073709551616 a=b\n",
            b"10 size=1x\n",
        ] {
            let mut extensions = Extensions::default();
            assert!(extensions.read_pax(bad).is_err(), "{}", bad.escape_ascii());
        }
        let mut extensions = Extensions::default();
        extensions
            .read_pax(b"12 path=a=\n\n28 SCHILY.xattr.user.k=\0\xff\nv\n")
            .unwrap();
        assert_eq!(extensions.path.as_deref(), Some(&b"a=\n"[..]));
        assert_eq!(
            extensions.xattrs,
            [(b"user.k".to_vec(), b"\0\xff\nv".to_vec())].into()
        );
        extensions.read_pax(b"8 path=\n").unwrap();
        assert_eq!(extensions.path, None);
    }
}

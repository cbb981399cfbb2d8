//! `io.stat`: what went to and from each block device.

use std::{fs, path::Path};

use hull_proto_agent::agent::DeviceIo;

/// Reads the lines that count something. A device that did nothing has an empty one.
pub(super) fn devices(text: &str) -> Vec<DeviceIo> {
    text.lines().filter_map(device).collect()
}

fn device(line: &str) -> Option<DeviceIo> {
    let (number, counters) = line.split_once(' ')?;
    let (major, minor) = number.split_once(':')?;
    let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
    let counter = |name: &str| -> Option<u64> {
        let mut fields = counters.split_ascii_whitespace();
        let value = fields.find_map(|field| field.strip_prefix(name)?.strip_prefix('='))?;
        value.parse().ok()
    };
    Some(DeviceIo {
        major,
        minor,
        device: name(number),
        read_bytes: counter("rbytes")?,
        write_bytes: counter("wbytes")?,
        reads: counter("rios")?,
        writes: counter("wios")?,
        ..DeviceIo::default()
    })
}

/// The device's name in /dev.
fn name(number: &str) -> String {
    let link = fs::read_link(Path::new("/sys/dev/block").join(number));
    let name = link.ok().and_then(|path| {
        let name = path.file_name()?;
        Some(name.to_string_lossy().into_owned())
    });
    name.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_told_apart() {
        let text = "999:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n\
                    999:16 \n\
                    999:32 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6 cost.usage=7\n\
                    nonsense\n";
        let all = devices(text);
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].major, all[0].minor), (999, 0));
        assert_eq!((all[0].read_bytes, all[0].write_bytes), (4096, 8192));
        assert_eq!((all[1].reads, all[1].writes), (3, 4));
        assert_eq!(all[1].device, "");
    }
}

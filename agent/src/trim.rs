//! Gives the space of deleted files back to the host.
//!
//! The file system could tell its disk of every block that it frees (mount option `discard`), but
//! without a journal it then waits for the disk at each file that is deleted. So the whole file
//! system is trimmed (fstrim(8)) some time after something was written: before that the host has
//! nothing to get back. Groups of blocks in which nothing was freed since the last time are passed
//! over by the kernel.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::{blocking::blocking, sys};

/// How often the disk is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(15);
/// Where `/sys/class/block/*/stat` has the sectors written
/// (Documentation/admin-guide/iostats.rst, field 7).
const SECTORS_WRITTEN: usize = 6;

/// Trims the file system of `device` at `root` whenever it was written to, until it is gone.
pub(crate) async fn keep_trimmed(device: PathBuf, root: PathBuf) {
    let name = device.file_name().unwrap_or_default();
    let counters = Path::new("/sys/class/block").join(name).join("stat");
    let mut last = None;
    loop {
        sleep(LOOK_EVERY).await;
        // The device goes when the storage is detached.
        let Ok(text) = fs::read_to_string(&counters) else {
            return;
        };
        let written = sectors_written(&text);
        if written == last {
            continue;
        }
        let path = root.clone();
        // Opened anew each time: an open file would keep it from being unmounted.
        match blocking(move || sys::trim(&File::open(path)?)).await {
            Ok(bytes) => debug!(bytes, "trimmed the scratch disk"),
            Err(error) if is_final(&error) => {
                return info!(%error, "the scratch disk gives no space back");
            }
            Err(error) => warn!(%error, "trim the scratch disk"),
        }
        last = written;
    }
}

fn sectors_written(counters: &str) -> Option<u64> {
    counters
        .split_ascii_whitespace()
        .nth(SECTORS_WRITTEN)?
        .parse()
        .ok()
}

/// No later attempt can do better: not a file system that trims, or a disk that can't.
fn is_final(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EPERM | libc::ENOENT)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_the_seventh_number() {
        let counters = "  2064  12  61986  733  5678  1901  98304  42  0 740 775 3 0 8 0 0 0\n";
        assert_eq!(sectors_written(counters), Some(98304));
        assert_eq!(sectors_written("1 2 3"), None);
    }
}

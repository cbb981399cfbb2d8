//! Huge pages: the guest's kernel keeps as many ready as its containers may use.
//!
//! They come out of the pod's memory, of which the containers then have less. Pages that somebody in
//! the guest had reserved (`vm.nr_hugepages`) are theirs: only differences are written.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use oci_spec::runtime::LinuxHugepageLimit;

use crate::{boot, ident::Id};

/// Why there are not as many huge pages as a container may use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HugePageError {
    #[error("{0:?} is no size of huge pages")]
    Size(String),
    #[error("the pod's memory has room for {found} more huge pages of {size}, not for {wanted}")]
    Room {
        size: String,
        wanted: u64,
        found: u64,
    },
    #[error("{action} huge pages by {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The huge pages that containers have.
#[derive(Debug)]
pub(crate) struct HugePages {
    /// Has a directory for each size.
    pools: PathBuf,
    /// The limit of what is not in huge pages.
    memory_max: PathBuf,
    /// How many of which size each container has. Locked while there are more or fewer.
    held: Mutex<HashMap<Id, BTreeMap<String, u64>>>,
}

impl HugePages {
    /// No container has any. `pod_cgroup` is above all of theirs.
    pub(crate) fn new(pod_cgroup: &Path) -> Self {
        Self::of("/sys/kernel/mm/hugepages".into(), pod_cgroup)
    }

    fn of(pools: PathBuf, pod_cgroup: &Path) -> Self {
        Self {
            pools,
            memory_max: pod_cgroup.join("memory.max"),
            held: Mutex::default(),
        }
    }

    /// Gives a container as many huge pages as `limits` says, those of other sizes stay; its `cgroup` then
    /// keeps it from reserving more. When they are not there, all is as before but for smaller sizes.
    /// Blocks.
    pub(crate) fn set(
        &self,
        id: &Id,
        cgroup: &Path,
        limits: &[LinuxHugepageLimit],
    ) -> Result<(), HugePageError> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        for limit in limits {
            let size = limit.page_size();
            let bytes = page_bytes(size).ok_or_else(|| HugePageError::Size(size.clone()))?;
            let limit = u64::try_from(limit.limit()).unwrap_or(0);
            let of_container = held.get(id).and_then(|sizes| sizes.get(size)).copied();
            let (had, wanted) = (of_container.unwrap_or(0), limit / bytes);
            self.change(size, bytes, had, wanted)?;
            if wanted > 0 {
                let sizes = held.entry(id.clone()).or_default();
                sizes.insert(size.clone(), wanted);
            } else if let Some(sizes) = held.get_mut(id) {
                sizes.remove(size);
            }
            // Else it is told by a signal at the first use that there are no more.
            let file = cgroup.join(format!("hugetlb.{size}.rsvd.max"));
            match fs::write(&file, limit.to_string()) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("limit", &file)(e));
                }
                _ => {}
            }
        }
        held.retain(|_, sizes| !sizes.is_empty());
        Ok(())
    }

    /// Takes a container's huge pages away; those in use go when they are not any more. Blocks.
    pub(crate) fn release(&self, id: &Id) -> Result<(), HugePageError> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        for (size, pages) in held.remove(id).unwrap_or_default() {
            let bytes = page_bytes(&size).unwrap_or(0);
            self.change(&size, bytes, pages, 0)?;
        }
        Ok(())
    }

    /// Whether a container has some.
    pub(crate) fn has(&self, id: &Id) -> bool {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.contains_key(id)
    }

    /// Makes `had` of the pages of a size `wanted`.
    fn change(&self, size: &str, bytes: u64, had: u64, wanted: u64) -> Result<(), HugePageError> {
        if had == wanted {
            return Ok(());
        }
        let dir = self.pools.join(format!("hugepages-{}kB", bytes >> 10));
        let pool = dir.join("nr_hugepages");
        let before = number(&pool).map_err(failed("count", &pool))?;
        let target = before.saturating_sub(had).saturating_add(wanted);
        let room = |found: u64| HugePageError::Room {
            size: size.to_owned(),
            wanted: wanted - had,
            found,
        };
        // The kernel would take all that there is before it gives up.
        let most = available() / bytes;
        if wanted.saturating_sub(had) > most {
            return Err(room(most));
        }
        let write = |pages: u64| fs::write(&pool, pages.to_string());
        write(target).map_err(failed("reserve", &pool))?;
        let after = number(&pool).map_err(failed("count", &pool))?;
        if wanted > had && after < target {
            write(before).map_err(failed("give back", &pool))?;
            return Err(room(after.saturating_sub(before)));
        }
        // "max": a guest too small for a limit, or a machine that is none.
        if let Ok(most) = number(&self.memory_max) {
            let most = most.saturating_add(had.saturating_mul(bytes));
            let most = most.saturating_sub(wanted.saturating_mul(bytes));
            fs::write(&self.memory_max, most.to_string())
                .map_err(failed("leave room for", &self.memory_max))?;
        }
        Ok(())
    }
}

/// Returns the size of a page that runtimes call so ("2MB", "1GB"), in bytes.
fn page_bytes(size: &str) -> Option<u64> {
    let digits = size.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match size.get(digits.len()..)? {
        "KB" => 10,
        "MB" => 20,
        "GB" => 30,
        _ => return None,
    };
    let bytes = digits.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    (bytes >= 1 << 10).then_some(bytes)
}

/// Returns how much memory programs could get now, in bytes.
fn available() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    boot::meminfo(&text, "MemAvailable").unwrap_or(u64::MAX)
}

fn number(path: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    text.trim().parse().map_err(io::Error::other)
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HugePageError {
    let path = path.to_owned();
    move |source| HugePageError::File {
        action,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn limits(of: &[(&str, u64)]) -> Vec<LinuxHugepageLimit> {
        let limits = of
            .iter()
            .map(|(size, limit)| serde_json::json!({"pageSize": size, "limit": limit}));
        serde_json::from_value(limits.collect()).unwrap()
    }

    #[test]
    fn containers_have_what_they_may_use_and_the_rest_of_the_pod_less() {
        let dir = tempfile::tempdir().unwrap();
        let (pool, memory) = (
            dir.path().join("hugepages-2048kB/nr_hugepages"),
            dir.path().join("memory.max"),
        );
        fs::create_dir(pool.parent().unwrap()).unwrap();
        // Three are somebody else's.
        fs::write(&pool, "3\n").unwrap();
        fs::write(&memory, (256 * MIB).to_string()).unwrap();
        let counts = || (number(&pool).unwrap(), number(&memory).unwrap() / MIB);
        let pages = HugePages::of(dir.path().to_owned(), dir.path());
        let [one, other] = ["one", "other"].map(|id| Id::parse("container id", id).unwrap());

        let set = |id, of: &[_]| pages.set(id, dir.path(), &limits(of));
        set(&one, &[("2MB", 9 * MIB), ("1GB", 0)]).unwrap();
        assert_eq!(counts(), (7, 248));
        set(&other, &[("2MB", 2 * MIB)]).unwrap();
        assert_eq!(counts(), (8, 246));
        set(&one, &[("2MB", 4 * MIB)]).unwrap();
        assert_eq!(counts(), (6, 250));
        set(&other, &[("2MB", 0)]).unwrap();
        assert!(!pages.has(&other) && pages.has(&one));
        pages.release(&one).unwrap();
        pages.release(&one).unwrap();
        assert_eq!(counts(), (3, 256));
        assert!(set(&one, &[("2MiB", MIB)]).is_err());
        assert!(set(&one, &[("1GB", 1 << 30)]).is_err());
    }

    #[test]
    fn sizes_are_called_as_runtimes_call_them() {
        assert_eq!(page_bytes("2MB"), Some(2 << 20));
        assert_eq!(page_bytes("1GB"), Some(1 << 30));
        assert_eq!(page_bytes("64KB"), Some(64 << 10));
        for wrong in ["", "2", "MB", "2MiB", "2M", "0MB", "99999999999999999999GB"] {
            assert_eq!(page_bytes(wrong), None, "{wrong}");
        }
    }
}

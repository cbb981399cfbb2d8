//! The pod's cgroup on the host: its VMM, and so the threads that are its vCPUs, run below the
//! parent that kubelet names, where kubelet's accounting and limits see them.
//!
//! Hull sets no limit there; it makes one cgroup below the parent and removes it with the VM.
//! On a host without cgroup v2 a pod that names no parent has none.

use std::{
    fs::{self, File, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use rustix::io::pread;
use serde::{Deserialize, Serialize};
use tokio::{io::Interest, time::timeout};

use hull_base::{
    faults::{self, Point},
    readiness::register,
};
use hull_spec::{error::PodError, field::Field, id::PodId, size::Room};

/// The CRI field.
/// Where pods are that name no parent.
const DEFAULT: &str = "hull";
/// How long killed processes may take to leave a cgroup.
const LEAVE: Duration = Duration::from_secs(5);
/// Threads of a VMM (254 vCPUs, and those of devices) and of a file server.
const PIDS_MAX: &str = "640";
/// How often a cgroup is tried to be made, when another pod's end removes a directory above it.
const TRIES: u32 = 5;

/// A pod's cgroup, which is recorded before it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodCgroup {
    path: PathBuf,
    /// The uppermost directory that was not there before: removed with `path` when it is empty.
    made_from: PathBuf,
}

impl PodCgroup {
    /// Decides where a pod's cgroup will be, below the mount point `root`; none on a host without
    /// cgroup v2.
    ///
    /// # Errors
    /// When `parent` is no place in the hierarchy, or there is no hierarchy to be in.
    pub fn plan(root: &Path, parent: &str, pod: &PodId) -> Result<Option<Self>, PodError> {
        let below = parse(parent).map_err(|why| PodError::invalid(Field::CgroupParent, why))?;
        let mounted = statfs(root).is_ok_and(|s| s.filesystem_type() == CGROUP2_SUPER_MAGIC);
        if !mounted {
            if parent.is_empty() {
                tracing::debug!(%pod, "no cgroup v2 on {}: its VM is in none", root.display());
                return Ok(None);
            }
            let reason = format!("it is set, but cgroup v2 is not on {}", root.display());
            return Err(PodError::unsatisfiable(Field::CgroupParent, reason));
        }
        let path = match below {
            Some(below) => root.join(below).join(format!("hull-{pod}")),
            None => root.join(DEFAULT).join(pod.as_str()),
        };
        let absent = path.ancestors().take_while(|dir| !dir.exists());
        let mut made_from = absent.last().unwrap_or(&path).to_owned();
        if below_default(root, &path) {
            // The directory is the daemon's alone: the last pod that leaves it removes it.
            made_from = root.join(DEFAULT);
        }
        Ok(Some(Self { path, made_from }))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the cgroup, with every controller that the cgroups above it allow.
    ///
    /// # Errors
    /// When a directory can't be made.
    pub fn make(&self, root: &Path) -> Result<(), PodError> {
        let failed =
            |source| PodError::internal(format!("make the cgroup {}", self.path.display()), source);
        for _ in 1..TRIES {
            match self.try_make(root) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => {
                    faults::point(Point::CgroupMade);
                    return other.map_err(failed);
                }
            }
        }
        self.try_make(root).map_err(failed)
    }

    fn try_make(&self, root: &Path) -> io::Result<()> {
        let mut above: Vec<&Path> = self.path.ancestors().collect();
        above.retain(|dir| dir.starts_with(root));
        above.reverse();
        for pair in above.windows(2) {
            let &[parent, dir] = pair else { continue };
            let available = fs::read_to_string(parent.join("cgroup.controllers"));
            for controller in available.unwrap_or_default().split_ascii_whitespace() {
                // One by one, because one that is refused would refuse all; without it less is counted.
                let control = parent.join("cgroup.subtree_control");
                let _ = fs::write(control, format!("+{controller}"));
            }
            match fs::create_dir(dir) {
                // Others may read what is counted there, whatever the daemon's mask is.
                Ok(()) => fs::set_permissions(dir, Permissions::from_mode(0o755))?,
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                Err(_) => {}
            }
        }
        let limit = self.path.join("pids.max");
        // Absent without the controller.
        if limit.exists() {
            fs::write(limit, PIDS_MAX)?;
        }
        Ok(())
    }

    /// The least CPU limit of this cgroup and those above it, in thousandths of a CPU; none: there is
    /// no limit.
    #[must_use]
    pub fn millicpus(&self, root: &Path) -> Option<u32> {
        let least = self.least(root, "cpu.max", |text| {
            let (quota, period) = text.split_once(' ')?;
            let (quota, period): (u64, u64) = (quota.parse().ok()?, period.parse().ok()?);
            quota.saturating_mul(1000).checked_div(period)
        })?;
        Some(u32::try_from(least).unwrap_or(u32::MAX))
    }

    /// How much memory the pod may have, by the least limit of this cgroup and those above it. It may be planned
    /// only.
    fn room(&self, root: &Path) -> Room {
        if below_default(root, &self.path) {
            return Room::Unknown;
        }
        let least = self.least(root, "memory.max", |text| text.parse().ok());
        least.map_or(Room::Unlimited, |bytes| Room::Mib(bytes >> 20))
    }

    /// The least limit that a file of this cgroup and those above it has.
    fn least(&self, root: &Path, file: &str, limit: impl Fn(&str) -> Option<u64>) -> Option<u64> {
        let dirs = self.path.ancestors().take_while(|dir| *dir != root);
        // Absent without the controller; "max" is no limit.
        dirs.filter_map(|dir| limit(fs::read_to_string(dir.join(file)).ok()?.trim()))
            .min()
    }

    /// Moves a process into the cgroup.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add(&self, pid: u32) -> Result<(), PodError> {
        let procs = self.path.join("cgroup.procs");
        fs::write(&procs, pid.to_string())
            .map_err(|e| PodError::internal(format!("move {pid} to {}", procs.display()), e))
    }

    /// Kills the processes in the cgroup and removes it; no effect when it is absent.
    ///
    /// # Errors
    /// When processes do not leave.
    pub async fn remove(&self) -> Result<(), PodError> {
        remove(&self.path).await?;
        faults::point(Point::CgroupRemoved);
        let mut dir = self.path.as_path();
        while dir != self.made_from {
            let Some(parent) = dir.parent() else { break };
            dir = parent;
            // A failure means that another pod's cgroup is in it.
            if fs::remove_dir(dir).is_err() {
                break;
            }
        }
        Ok(())
    }
}

/// How much memory a pod may have that is in this cgroup, or in none.
#[must_use]
pub fn room(root: &Path, cgroup: Option<&PodCgroup>) -> Room {
    cgroup.map_or(Room::Unknown, |cgroup| cgroup.room(root))
}

/// Removes the cgroup of a VMM that has no record, when it has the name of a pod's.
pub async fn remove_orphan(root: &Path, path: &Path, pod: &str) {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let ours = name == pod && below_default(root, path) || name == format!("hull-{pod}");
    if ours && let Err(error) = remove(path).await {
        tracing::error!(%error, cgroup = %path.display(), "remove a cgroup that nobody owns");
    }
}

/// The cgroup that a process is in; none: it has ended, or is in none.
#[must_use]
pub fn of_process(root: &Path, pid: u32) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(root.join(path))
}

fn below_default(root: &Path, path: &Path) -> bool {
    path.parent() == Some(&root.join(DEFAULT))
}

async fn remove(path: &Path) -> Result<(), PodError> {
    let remove = || match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    let mut removed = remove();
    if let Err(error) = &removed
        && error.kind() == io::ErrorKind::ResourceBusy
    {
        // Only the pod's own processes are ever in its cgroup. Failing, here and with the wait, shows
        // in the second attempt.
        let _ = fs::write(path.join("cgroup.kill"), "1");
        let _ = timeout(LEAVE, left(path)).await;
        removed = remove();
    }
    removed.map_err(|e| PodError::internal(format!("remove the cgroup {}", path.display()), e))
}

/// Waits until no process is in a cgroup and those below it. The kernel tells of each change of
/// `cgroup.events` as of priority data (cgroups(7)).
async fn left(path: &Path) -> io::Result<()> {
    let events = File::open(path.join("cgroup.events"))?;
    let events = register(events.into(), Interest::PRIORITY)?;
    loop {
        let mut text = [0; 256];
        let length = pread(events.get_ref(), &mut text, 0)?;
        let mut lines = text
            .get(..length)
            .unwrap_or_default()
            .split(|b| *b == b'\n');
        if lines.any(|line| line == b"populated 0") {
            return Ok(());
        }
        events.ready(Interest::PRIORITY).await?.clear_ready();
    }
}

/// A cgroup parent as a path below the root; none when it is empty.
///
/// A single name that ends with `.slice` is systemd's: each dash in it is a level of its own
/// (systemd.slice(5)).
fn parse(parent: &str) -> Result<Option<PathBuf>, String> {
    if parent.is_empty() {
        return Ok(None);
    }
    let refuse = |why: &str| Err(format!("{parent:?} {why}"));
    if parent.contains('\0') || parent.len() > 4096 {
        return refuse("is not a path");
    }
    if !parent.contains('/')
        && let Some(name) = parent.strip_suffix(".slice")
    {
        if name == "-" {
            return Ok(Some(PathBuf::new()));
        }
        let mut path = PathBuf::new();
        let mut prefix = String::new();
        for part in name.split('-') {
            if part.is_empty() {
                return refuse("is not the name of a slice");
            }
            prefix.push_str(part);
            path.push(format!("{prefix}.slice"));
            prefix.push('-');
        }
        return Ok(Some(path));
    }
    let mut path = PathBuf::new();
    for part in Path::new(parent).components() {
        match part {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => path.push(name),
            _ => return refuse("leads out of the hierarchy"),
        }
    }
    Ok(Some(path))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        process::{Command, Stdio},
    };

    use super::*;

    fn parsed(parent: &str) -> Option<PathBuf> {
        parse(parent).unwrap()
    }

    #[test]
    fn parents_have_two_forms() {
        assert_eq!(parsed(""), None);
        assert_eq!(parsed("/"), Some("".into()));
        assert_eq!(
            parsed("/kubepods/burstable/podx"),
            Some("kubepods/burstable/podx".into())
        );
        assert_eq!(parsed("a/./b//c"), Some("a/b/c".into()));
        assert_eq!(
            parsed("kubepods-burstable-pod1_2.slice"),
            Some("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice".into())
        );
        assert_eq!(parsed("system.slice"), Some("system.slice".into()));
        assert_eq!(parsed("-.slice"), Some("".into()));
        // With a slash it is a whole path already.
        assert_eq!(
            parsed("/a.slice/a-b.slice"),
            Some("a.slice/a-b.slice".into())
        );
    }

    #[test]
    fn what_leads_elsewhere_is_refused() {
        for wrong in [
            "../x",
            "/a/../../x",
            "..",
            "a--b.slice",
            "-a.slice",
            ".slice",
            "a\0b",
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_parent_without_a_hierarchy_is_refused_and_none_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        let pod = PodId::random();
        let named = PodCgroup::plan(dir.path(), "/a", &pod).unwrap_err();
        assert!(named.to_string().contains("cgroup parent"), "{named}");
        assert_eq!(PodCgroup::plan(dir.path(), "", &pod).unwrap(), None);
        let outside = PodCgroup::plan(dir.path(), "/../a", &pod).unwrap_err();
        assert!(matches!(outside, PodError::InvalidArgument { .. }));
    }

    #[test]
    fn the_least_limit_counts() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("pods/pod/hull-1");
        fs::create_dir_all(&path).unwrap();
        let cgroup = PodCgroup {
            path: path.clone(),
            made_from: path,
        };
        let set = |dir: &str, limit: &str| {
            fs::write(root.path().join(dir).join("cpu.max"), limit).unwrap();
        };
        assert_eq!(cgroup.millicpus(root.path()), None);
        set("pods/pod/hull-1", "max 100000\n");
        set("pods", "400000 100000\n");
        set("", "1 100000\n");
        assert_eq!(cgroup.millicpus(root.path()), Some(4000));
        set("pods/pod", "1000 100000\n");
        assert_eq!(cgroup.millicpus(root.path()), Some(10));
        set("pods/pod", "1000 0\n");
        assert_eq!(cgroup.millicpus(root.path()), Some(4000));

        let set = |dir: &str, limit: &str| {
            fs::write(root.path().join(dir).join("memory.max"), limit).unwrap();
        };
        assert_eq!(cgroup.room(root.path()), Room::Unlimited);
        set("pods/pod/hull-1", "max\n");
        set("pods", "1073741824\n");
        set("", "4096\n");
        assert_eq!(cgroup.room(root.path()), Room::Mib(1024));
        set("pods/pod", "201326592\n");
        assert_eq!(cgroup.room(root.path()), Room::Mib(192));
        let default = PodCgroup {
            path: root.path().join("hull/1"),
            made_from: root.path().join("hull"),
        };
        assert_eq!(default.room(root.path()), Room::Unknown);
    }

    #[tokio::test]
    async fn processes_in_a_cgroup_are_ended_with_it() {
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
        let is_hierarchy =
            |root: &&Path| statfs(*root).is_ok_and(|s| s.filesystem_type() == CGROUP2_SUPER_MAGIC);
        let Some(root) = roots.into_iter().find(is_hierarchy) else {
            println!("SKIPPED: processes in a cgroup: no cgroup v2");
            return;
        };
        let path = root.join(format!("hull-test-{}", std::process::id()));
        let cgroup = PodCgroup {
            path: path.clone(),
            made_from: path.clone(),
        };
        if let Err(error) = fs::create_dir(&path) {
            println!("SKIPPED: processes in a cgroup: {error}");
            return;
        }
        let script = "read go; for i in $(seq 200); do sleep 1000 & done; echo there; wait";
        let mut shell = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        cgroup.add(shell.id()).unwrap();
        shell.stdin.take().unwrap().write_all(b"go\n").unwrap();
        let mut there = [0; 6];
        let mut output = shell.stdout.take().unwrap();
        output.read_exact(&mut there).unwrap();
        let removed = timeout(LEAVE, cgroup.remove()).await;
        removed.unwrap().unwrap();
        assert!(!path.exists());
        shell.wait().unwrap();
        // All of them had its other end.
        assert_eq!(output.read(&mut there).unwrap(), 0);
    }

    // Directories are enough to see what is made and removed.
    #[tokio::test]
    async fn only_what_was_made_is_removed_and_only_when_it_is_empty() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        let cgroup = |path: &str, made_from: &str| PodCgroup {
            path: at(path),
            made_from: at(made_from),
        };
        fs::create_dir(at("kubelet")).unwrap();
        let one = cgroup("kubelet/a/b/hull-1", "kubelet/a");
        let two = cgroup("kubelet/a/hull-2", "kubelet/a/hull-2");
        for cgroup in [&one, &two] {
            cgroup.make(root.path()).unwrap();
            cgroup.make(root.path()).unwrap();
        }
        one.remove().await.unwrap();
        assert!(!at("kubelet/a/b").exists() && two.path().exists());
        two.remove().await.unwrap();
        two.remove().await.unwrap();
        assert!(at("kubelet/a").exists());

        let last = cgroup("hull/x", "hull");
        last.make(root.path()).unwrap();
        last.remove().await.unwrap();
        assert!(!at("hull").exists() && at("kubelet").exists());
    }
}

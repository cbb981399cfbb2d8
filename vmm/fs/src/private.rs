//! Volumes that no other pod has: of those a guest may believe what it was told for longer, see
//! [`crate::life`].
//!
//! The manager finds out which those are and tells the server. A file system is one if all of these hold:
//!
//! - A share is where kubelet mounts volumes for this pod (`KUBELET/pods/UID/volumes/PLUGIN/NAME`), on a
//!   mount of its own.
//! - The file system is on a block device, so that no other machine changes it.
//! - The host has it mounted nowhere else but where kubelet keeps it for the pod's mount
//!   (`KUBELET/plugins`): in no other pod, for no part of it (`volume-subpaths`), and for no program.
//! - The guest sees it by one share. By two it would be two file systems to the guest, and each would
//!   believe too long what the other changes.
//!
//! A volume that is mounted elsewhere later ceases to be one. The guest is told nothing of that, but what
//! it believes until then ends by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use rustix::fs::makedev;

use crate::share::{Identity, MountLine};

/// File systems of one machine, as proc_pid_mountinfo(5) names them.
const LOCAL: [&[u8]; 6] = [b"btrfs", b"ext2", b"ext3", b"ext4", b"f2fs", b"xfs"];

/// Finds the devices, as `MAJOR:MINOR`, of volumes that only the pod of this uid has. `table` are the
/// host's mounts, as proc_pid_mountinfo(5) tells them; `shares` are all that the guest has.
pub fn devices<'a>(
    table: &[u8],
    uid: &str,
    shares: impl Iterator<Item = &'a Identity>,
) -> BTreeSet<String> {
    let mut seen_by: BTreeMap<&[u8], Vec<&Identity>> = BTreeMap::new();
    for share in shares {
        for mount in share.mounts().filter_map(MountLine::parse) {
            let shares = seen_by.entry(mount.device).or_default();
            if !shares.contains(&share) {
                shares.push(share);
            }
        }
    }
    let alone = seen_by.into_iter().filter_map(|(device, shares)| {
        let [share] = shares[..] else {
            return None;
        };
        let mount = MountLine::parse(share.mount()?)?;
        let is_alone = mount.device == device
            && !share.follows_host()
            && LOCAL.contains(&mount.kind)
            && is_mounted_for(table, device, &Kubelet::of(&mount.point, uid)?);
        is_alone.then(|| String::from_utf8_lossy(device).into_owned())
    });
    alone.collect()
}

/// Where kubelet keeps a pod's volumes.
#[derive(Debug)]
struct Kubelet {
    volumes: PathBuf,
    plugins: PathBuf,
}

impl Kubelet {
    /// By where a volume of the pod is mounted; none if that is no volume of this pod.
    fn of(point: &Path, uid: &str) -> Option<Self> {
        let end = Path::new(uid).join("volumes");
        let volumes = point.ancestors().find(|path| path.ends_with(&end))?;
        let inside = point.strip_prefix(volumes).ok()?;
        let plugin = inside.components().next()?.as_os_str();
        let pods = volumes.parent()?.parent()?;
        let is_kubelets = !uid.is_empty()
            && pods.file_name()? == "pods"
            && plugin.as_encoded_bytes().starts_with(b"kubernetes.io~");
        is_kubelets.then(|| Self {
            volumes: volumes.to_owned(),
            plugins: pods.with_file_name("plugins"),
        })
    }
}

/// Whether a device is mounted, and for one pod only.
fn is_mounted_for(table: &[u8], device: &[u8], kubelet: &Kubelet) -> bool {
    let lines = table.split(|byte| *byte == b'\n');
    let mounts = lines.filter_map(MountLine::parse);
    let is_kept = |mount: MountLine<'_>| {
        mount.point.starts_with(&kubelet.volumes) || mount.point.starts_with(&kubelet.plugins)
    };
    let mut points = mounts
        .filter(|mount| mount.device == device)
        .map(is_kept)
        .peekable();
    points.peek().is_some() && points.all(|is_kept| is_kept)
}

/// The devices, as the server is told of them.
#[derive(Debug, Default)]
pub struct Devices(RwLock<Vec<u64>>);

impl Devices {
    /// Takes what the manager says, `MAJOR:MINOR` of each, in place of what it said before.
    ///
    /// # Errors
    /// The word that is none.
    pub fn set(&self, told: &str) -> Result<(), String> {
        let number = |word: &str| {
            let (major, minor) = word.split_once(':')?;
            Some(makedev(major.parse().ok()?, minor.parse().ok()?))
        };
        let words = told.split_ascii_whitespace();
        let numbers =
            words.map(|word| number(word).ok_or_else(|| format!("{word:?} is no device")));
        let numbers = numbers.collect::<Result<Vec<_>, _>>()?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = numbers;
        Ok(())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        let devices = self.0.read().unwrap_or_else(PoisonError::into_inner);
        devices.is_empty()
    }

    /// Whether a file of this device (`st_dev`) is of a volume that no other pod has.
    pub fn has(&self, device: u64) -> bool {
        let devices = self.0.read().unwrap_or_else(PoisonError::into_inner);
        devices.contains(&device)
    }
}

#[cfg(test)]
mod tests {
    use hull_proto_vmm::fs::{Access, Propagation};

    use super::*;

    const UID: &str = "0b6e1c9e-4f5a";
    const VOLUME: &str = "/k/pods/0b6e1c9e-4f5a/volumes/kubernetes.io~csi/pv/mount";
    const STAGED: &str = "/k/plugins/kubernetes.io/csi/driver/hash/globalmount";

    fn line(id: u32, device: &str, point: &str, kind: &str) -> String {
        format!("{id} 25 {device} / {point} rw,relatime shared:9 - {kind} /dev/sdb rw\n")
    }

    fn share(lines: &str, access: Access, propagation: Propagation) -> Identity {
        let mounts = lines.lines().map(|line| line.as_bytes().to_vec());
        Identity::new((1, 2), access, propagation, mounts.collect(), 0)
    }

    fn plain(lines: &str) -> Identity {
        share(lines, Access::ReadWrite, Propagation::Private)
    }

    #[test]
    fn a_volume_that_one_pod_has_is_its_own() {
        let volume = line(40, "8:16", VOLUME, "ext4");
        let staged = line(39, "8:16", STAGED, "ext4");
        let root = line(25, "8:1", "/", "ext4");
        let table = [&*root, &*staged, &*volume].concat();
        let alone = |table: &str, uid, shares: &[Identity]| {
            let found = devices(table.as_bytes(), uid, shares.iter());
            found.into_iter().collect::<Vec<_>>()
        };
        let share_of_root = plain(&root);
        assert_eq!(alone(&table, UID, &[plain(&volume)]), ["8:16"]);
        let both = [plain(&volume), share_of_root];
        assert_eq!(alone(&table, UID, &both), ["8:16"]);
        for uid in ["other", "", "pods"] {
            assert_eq!(alone(&table, uid, &both), [""; 0], "{uid}");
        }
        for elsewhere in [
            "/k/pods/other/volumes/kubernetes.io~csi/pv/mount",
            "/k/pods/0b6e1c9e-4f5a/volume-subpaths/pv/main/0",
            "/mnt/looked/at",
            "/k/pods/0b6e1c9e-4f5a/volumes-2/kubernetes.io~csi/pv/mount",
        ] {
            let table = table.clone() + &line(50, "8:16", elsewhere, "ext4");
            assert_eq!(alone(&table, UID, &both), [""; 0], "{elsewhere}");
            let table = table.replace("50 25 8:16", "50 25 8:17");
            assert_eq!(alone(&table, UID, &both), ["8:16"]);
        }
        assert_eq!(alone("", UID, &both), [""; 0], "mounts that can't be read");
        let network = volume.replace("ext4", "nfs4");
        assert_eq!(alone(&network, UID, &[plain(&network)]), [""; 0]);
    }

    #[test]
    fn what_a_guest_sees_twice_is_not_believed_for_long() {
        let volume = line(40, "8:16", VOLUME, "xfs");
        let found = |shares: &[Identity]| devices(volume.as_bytes(), UID, shares.iter()).len();
        let read_only = share(&volume, Access::ReadOnly, Propagation::Private);
        let follows = share(&volume, Access::ReadWrite, Propagation::Slave);
        let above = plain(&(line(25, "8:1", "/", "ext4") + &volume));
        assert_eq!(found(&[plain(&volume), plain(&volume)]), 1);
        assert_eq!(found(std::slice::from_ref(&read_only)), 1);
        assert_eq!(found(&[plain(&volume), read_only]), 0);
        assert_eq!(found(&[follows]), 0);
        assert_eq!(found(&[plain(&volume), above]), 0);
    }

    #[test]
    fn kubelet_is_found_by_where_it_mounts() {
        let found =
            |point: &str| Kubelet::of(Path::new(point), "uid").map(|kubelet| kubelet.plugins);
        let plugins = |path: &str| Some(PathBuf::from(path));
        assert_eq!(
            found("/var/lib/kubelet/pods/uid/volumes/kubernetes.io~csi/pv/mount"),
            plugins("/var/lib/kubelet/plugins")
        );
        assert_eq!(
            found("/pods/uid/volumes/kubernetes.io~local-volume/pv"),
            plugins("/plugins")
        );
        for point in [
            "/k/pods/uid/volumes",
            "/k/pods/uid/volumes/mine/pv",
            "/k/pots/uid/volumes/kubernetes.io~csi/pv",
            "/uid/volumes/kubernetes.io~csi/pv",
            "/k/pods/uid/kubernetes.io~csi/pv",
            "/",
        ] {
            assert_eq!(found(point), None, "{point}");
        }
    }

    #[test]
    fn devices_are_told_in_one_line() {
        let devices = Devices::default();
        devices.set("8:16 259:3").unwrap();
        assert!(devices.has(makedev(8, 16)) && devices.has(makedev(259, 3)));
        assert!(!devices.has(makedev(8, 17)) && !devices.is_empty());
        for wrong in ["8", "8:", "8:x", "8:1 :"] {
            assert!(devices.set(wrong).is_err(), "{wrong}");
        }
        devices.set("").unwrap();
        assert!(devices.is_empty());
    }
}

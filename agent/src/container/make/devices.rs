//! What is in a container's /dev beyond what is mounted there (OCI runtime specification, "Default
//! Devices", "Devices", "Dev symbolic links").

use std::{
    ffi::OsStr,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::{
    fs::{
        AtFlags, CWD, Dev, FileType, Gid, Mode, Uid, chmodat, chownat, fstat, makedev, mknodat,
        symlinkat,
    },
    io::Errno,
};

use super::{
    error::{StepError, doing_to},
    mounts::{copy_of, open_path, put},
    root::{Kind, Root},
};
use crate::sys::{MountAttr, change_mount};

/// What every container has: names, minor and major numbers.
const DEFAULT: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Links that every container has.
const LINKS: [(&str, &str); 6] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("/proc/kcore", "core"),
    ("pts/ptmx", "ptmx"),
];

/// A node that a container is to have.
#[derive(Debug)]
struct Node {
    path: PathBuf,
    kind: FileType,
    device: Dev,
    mode: Mode,
    uid: u32,
    gid: u32,
    /// A node of the guest's to bind, in place of one that is made.
    bound: Option<OwnedFd>,
}

/// What a container is to have in its /dev.
#[derive(Debug)]
pub(super) struct Devices {
    nodes: Vec<Node>,
    links: &'static [(&'static str, &'static str)],
}

impl Devices {
    /// The default nodes and links, and `asked`.
    pub(super) fn new(asked: &[LinuxDevice]) -> Result<Self, StepError> {
        let default = DEFAULT.iter().map(|&(path, major, minor)| Node {
            path: path.into(),
            kind: FileType::CharacterDevice,
            device: makedev(major, minor),
            mode: Mode::from_raw_mode(0o666),
            uid: 0,
            gid: 0,
            bound: None,
        });
        let mut nodes: Vec<Node> = default.collect();
        for device in asked {
            nodes.retain(|node| node.path != *device.path());
            nodes.push(node(device)?);
        }
        Ok(Self {
            nodes,
            links: &LINKS,
        })
    }

    /// `asked` alone, for a /dev that has the others.
    pub(super) fn more(asked: &[LinuxDevice]) -> Result<Self, StepError> {
        let nodes = asked.iter().map(node).collect::<Result<_, _>>()?;
        Ok(Self { nodes, links: &[] })
    }

    /// Makes those that no default one is in `dir`, a directory of the guest's, and holds all to be bound:
    /// in a user namespace none can be made, and in a /dev of others it would be there for them too. `ids`
    /// are of the guest for ids of the container.
    pub(super) fn hold(
        &mut self,
        dir: &Path,
        ids: impl Fn(u32, u32) -> (u32, u32),
    ) -> Result<(), StepError> {
        for (index, node) in self.nodes.iter_mut().enumerate() {
            let hold = |node: &Node| -> io::Result<OwnedFd> {
                let guests = DEFAULT
                    .iter()
                    .find(|(path, ..)| Path::new(path) == node.path);
                let at = match guests {
                    Some((path, ..)) => PathBuf::from(path),
                    None => {
                        let at = dir.join(format!("device-{index}"));
                        mknodat(CWD, &at, node.kind, Mode::empty(), node.device)?;
                        chmodat(CWD, &at, node.mode, AtFlags::empty())?;
                        let (uid, gid) = ids(node.uid, node.gid);
                        own(CWD, at.as_os_str(), uid, gid)?;
                        at
                    }
                };
                let file = open_path(&at)?;
                if !node.is_behind(&file)? {
                    return Err(io::Error::other("it is another device"));
                }
                let tree = copy_of(file, false)?;
                let mut devices = MountAttr::default();
                devices.clear(super::options::NODEV);
                change_mount(&tree, devices, false)?;
                Ok(tree)
            };
            node.bound = Some(hold(node).map_err(doing_to("bind device", &node.path))?);
        }
        Ok(())
    }

    /// Makes nodes and links below `root`.
    pub(super) fn make(self, root: &Root) -> Result<(), StepError> {
        for node in &self.nodes {
            node.make(root)
                .map_err(doing_to("make device", &node.path))?;
        }
        let path = Path::new("/dev");
        let link = || -> io::Result<()> {
            let dev = root.find_or_make(path, Kind::Directory)?;
            for (target, name) in self.links {
                match symlinkat(*target, &dev, *name) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(e) => return Err(e.into()),
                }
            }
            Ok(())
        };
        link().map_err(doing_to("make the links in", path))
    }
}

fn node(device: &LinuxDevice) -> Result<Node, StepError> {
    let path = device.path().clone();
    let kind = match device.typ() {
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::A => {
            return Err(StepError::Refused(format!(
                "device {} has no type",
                path.display()
            )));
        }
    };
    let number = |number: i64| {
        u32::try_from(number).map_err(|_| {
            StepError::Refused(format!("device {} has a wrong number", path.display()))
        })
    };
    let device_number = match kind {
        FileType::Fifo => 0,
        _ => makedev(number(device.major())?, number(device.minor())?),
    };
    Ok(Node {
        kind,
        device: device_number,
        mode: Mode::from_raw_mode(device.file_mode().unwrap_or(0o666) & 0o7777),
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
        bound: None,
        path,
    })
}

impl Node {
    fn is_behind(&self, file: &OwnedFd) -> io::Result<bool> {
        let found = fstat(file)?;
        Ok(FileType::from_raw_mode(found.st_mode) == self.kind && found.st_rdev == self.device)
    }

    fn make(&self, root: &Root) -> io::Result<()> {
        if let Some(bound) = &self.bound {
            let target = root.find_or_make_itself(&self.path, Kind::File)?;
            return put(bound, target);
        }
        let (Some(parent), Some(name)) = (self.path.parent(), self.path.file_name()) else {
            return Err(Errno::INVAL.into());
        };
        let dir = root.find_or_make(parent, Kind::Directory)?;
        match mknodat(&dir, name, self.kind, Mode::empty(), self.device) {
            // Something that is mounted there.
            Err(Errno::EXIST) => return Ok(()),
            made => made?,
        }
        // Whatever the umask is.
        chmodat(&dir, name, self.mode, AtFlags::empty())?;
        own(&dir, name, self.uid, self.gid)
    }
}

fn own(dir: impl AsFd, name: &OsStr, uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    Ok(chownat(
        dir,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// Opens the guest's /dev/null, which is that and nothing else.
pub(super) fn null() -> io::Result<OwnedFd> {
    let file = open_path(Path::new("/dev/null"))?;
    let found = fstat(&file)?;
    let is_device = FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice;
    if is_device && found.st_rdev == makedev(1, 3) {
        return Ok(file);
    }
    Err(io::Error::other("it is another device"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_takes_the_place_of_a_default() {
        let mut null = LinuxDevice::default();
        null.set_path("/dev/null".into());
        null.set_typ(LinuxDeviceType::C);
        null.set_major(1);
        null.set_minor(3);
        null.set_file_mode(Some(0o600));
        let devices = Devices::new(&[null]).unwrap();
        assert_eq!(devices.nodes.len(), DEFAULT.len());
        let null = devices
            .nodes
            .iter()
            .find(|node| node.path == Path::new("/dev/null"))
            .unwrap();
        assert_eq!(null.mode, Mode::from_raw_mode(0o600));
    }

    #[test]
    fn numbers_that_can_not_be_are_refused() {
        let mut device = LinuxDevice::default();
        device.set_path("/dev/x".into());
        device.set_typ(LinuxDeviceType::C);
        device.set_major(-1);
        assert!(Devices::new(&[device]).is_err());
    }
}

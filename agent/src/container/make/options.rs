//! Options of mounts (OCI runtime specification, "Linux mount options").

use rustix::mount::MountPropagationFlags as Propagation;

use crate::sys::MountAttr;

/// What the options of a mount ask for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// Of something that is there; `true`: with what is mounted below it.
    pub(super) bind: Option<bool>,
    /// Of the mount alone.
    pub(super) own: MountAttr,
    /// Of it and all below it.
    pub(super) all: MountAttr,
    /// `true`: of it and all below it.
    pub(super) propagation: Option<(u64, bool)>,
    /// What is for the file system itself: names, and values of some.
    pub(super) data: Vec<(String, Option<String>)>,
}

/// `MOUNT_ATTR_*` of `linux/mount.h`.
pub(super) const RDONLY: u64 = 0x1;
pub(super) const NOSUID: u64 = 0x2;
pub(super) const NODEV: u64 = 0x4;
pub(super) const NOEXEC: u64 = 0x8;
const ATIME: u64 = 0x70;
const RELATIME: u64 = 0x0;
const NOATIME: u64 = 0x10;
const STRICTATIME: u64 = 0x20;
const NODIRATIME: u64 = 0x80;
const NOSYMFOLLOW: u64 = 0x20_0000;

impl Options {
    /// Reads options. What is not known is for the file system, which refuses it then.
    pub(super) fn parse(options: &[String]) -> Self {
        let mut parsed = Self::default();
        for option in options {
            parsed.add(option);
        }
        parsed
    }

    fn add(&mut self, option: &str) {
        let on = |attr: &mut MountAttr, flag: u64| attr.add(flag);
        let off = |attr: &mut MountAttr, flag: u64| attr.remove(flag);
        match option {
            "bind" => self.bind = Some(self.bind.unwrap_or(false)),
            "rbind" => self.bind = Some(true),
            "ro" => on(&mut self.own, RDONLY),
            "rw" => off(&mut self.own, RDONLY),
            "nosuid" => on(&mut self.own, NOSUID),
            "suid" => off(&mut self.own, NOSUID),
            "nodev" => on(&mut self.own, NODEV),
            "dev" => off(&mut self.own, NODEV),
            "noexec" => on(&mut self.own, NOEXEC),
            "exec" => off(&mut self.own, NOEXEC),
            "nodiratime" => on(&mut self.own, NODIRATIME),
            "diratime" => off(&mut self.own, NODIRATIME),
            "nosymfollow" => on(&mut self.own, NOSYMFOLLOW),
            "symfollow" => off(&mut self.own, NOSYMFOLLOW),
            "relatime" | "atime" | "norelatime" | "nostrictatime" => {
                self.own.choose(ATIME, RELATIME);
            }
            "noatime" => self.own.choose(ATIME, NOATIME),
            "strictatime" => self.own.choose(ATIME, STRICTATIME),
            "rro" => on(&mut self.all, RDONLY),
            "rrw" => self.all.clear(RDONLY),
            "rnosuid" => on(&mut self.all, NOSUID),
            "rsuid" => self.all.clear(NOSUID),
            "rnodev" => on(&mut self.all, NODEV),
            "rdev" => self.all.clear(NODEV),
            "rnoexec" => on(&mut self.all, NOEXEC),
            "rexec" => self.all.clear(NOEXEC),
            "rnodiratime" => on(&mut self.all, NODIRATIME),
            "rdiratime" => self.all.clear(NODIRATIME),
            "rnosymfollow" => on(&mut self.all, NOSYMFOLLOW),
            "rsymfollow" => self.all.clear(NOSYMFOLLOW),
            "rrelatime" | "ratime" | "rnorelatime" | "rnostrictatime" => {
                self.all.choose(ATIME, RELATIME);
            }
            "rnoatime" => self.all.choose(ATIME, NOATIME),
            "rstrictatime" => self.all.choose(ATIME, STRICTATIME),
            // What a mount is without, and "silent", which quiets what is not said here anyway; "remount"
            // comes from tables of file systems; an "idmap" is made before by what has the namespace.
            "" | "defaults" | "async" | "nomand" | "loud" | "silent" | "noiversion"
            | "nolazytime" | "remount" | "idmap" | "ridmap" => {}
            other => match propagation(other) {
                Some(propagation) => self.propagation = Some(propagation),
                None => self.data.push(match other.split_once('=') {
                    Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                    None => (other.to_owned(), None),
                }),
            },
        }
    }

    /// Whether the file system is told `name`.
    pub(super) fn has(&self, name: &str) -> bool {
        self.data.iter().any(|(known, _)| known == name)
    }
}

/// The propagation that an option names; `true`: of all mounts below, too.
pub(super) fn propagation(option: &str) -> Option<(u64, bool)> {
    let kind = |option: &str| match option {
        "private" => Some(Propagation::PRIVATE),
        "shared" => Some(Propagation::SHARED),
        "slave" => Some(Propagation::DOWNSTREAM),
        "unbindable" => Some(Propagation::UNBINDABLE),
        _ => None,
    };
    let (flags, all) = match kind(option) {
        Some(flags) => (flags, false),
        None => (kind(option.strip_prefix('r')?)?, true),
    };
    Some((u64::from(flags.bits()), all))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Options {
        let options: Vec<String> = options.iter().map(|o| (*o).to_owned()).collect();
        Options::parse(&options)
    }

    #[test]
    fn the_last_word_on_a_flag_counts() {
        let parsed = parse(&["rbind", "ro", "nosuid", "rw", "nodev"]);
        assert_eq!(parsed.bind, Some(true));
        assert_eq!((parsed.own.set, parsed.own.clear), (NOSUID | NODEV, 0));
        assert_eq!(parse(&["bind", "rbind", "bind"]).bind, Some(true));
        assert_eq!(parse(&["ro"]).bind, None);
    }

    #[test]
    fn access_times_are_one_choice() {
        let parsed = parse(&["noatime", "strictatime"]);
        assert_eq!((parsed.own.set, parsed.own.clear), (STRICTATIME, ATIME));
        let parsed = parse(&["noatime", "relatime"]);
        assert_eq!((parsed.own.set, parsed.own.clear), (RELATIME, ATIME));
    }

    /// All that the specification says must be supported.
    #[test]
    fn every_option_of_the_specification_is_known() {
        let of_the_mount = "async atime bind defaults dev diratime exec loud noatime nodev nodiratime noexec \
            noiversion nolazytime norelatime nostrictatime nosuid nosymfollow private ratime rbind rdev rdiratime \
            relatime remount rexec rnoatime rnodiratime rnoexec rnorelatime rnostrictatime rnosuid rnosymfollow ro \
            rprivate rrelatime rro rrw rshared rslave rstrictatime rsuid rsymfollow runbindable rw shared silent \
            slave strictatime suid symfollow unbindable idmap ridmap";
        for option in of_the_mount.split_whitespace() {
            assert_eq!(parse(&[option]).data, [], "{option}");
        }
        // The kernel reads these of any file system (fsconfig(2)).
        for option in ["dirsync", "lazytime", "sync"] {
            assert_eq!(parse(&[option]).data, [(option.to_owned(), None)]);
        }
    }

    #[test]
    fn recursive_flags_are_apart() {
        let parsed = parse(&["rbind", "ro", "rro", "rexec"]);
        assert_eq!((parsed.own.set, parsed.own.clear), (RDONLY, 0));
        assert_eq!((parsed.all.set, parsed.all.clear), (RDONLY, NOEXEC));
    }

    #[test]
    fn propagation_is_the_last_that_is_named() {
        let shared = u64::from(Propagation::SHARED.bits());
        assert_eq!(
            parse(&["rprivate", "shared"]).propagation,
            Some((shared, false))
        );
        assert_eq!(parse(&["rshared"]).propagation, Some((shared, true)));
        assert_eq!(parse(&["bind"]).propagation, None);
    }

    #[test]
    fn the_rest_is_for_the_file_system() {
        let parsed = parse(&[
            "nosuid",
            "mode=1777",
            "size=64k",
            "newinstance",
            "context=a=b",
        ]);
        let data: Vec<_> = parsed
            .data
            .iter()
            .map(|(n, v)| (n.as_str(), v.as_deref()))
            .collect();
        assert_eq!(
            data,
            [
                ("mode", Some("1777")),
                ("size", Some("64k")),
                ("newinstance", None),
                ("context", Some("a=b"))
            ]
        );
        assert!(parsed.has("mode") && !parsed.has("uid"));
    }
}

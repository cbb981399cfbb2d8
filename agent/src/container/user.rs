//! Who a container's process runs as, by its own `/etc/passwd` and `/etc/group`.
//!
//! The rules are those of the image specification (`config.User`) and of CRI's
//! `run_as_user`, `run_as_group`, `supplemental_groups` and
//! `supplemental_groups_policy`.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use hull_proto_agent::agent::User as Request;
use pathrs::{Root, error::ErrorKind, flags::OpenFlags};

/// Largest user database that is read, in bytes.
const MAX_FILE: u64 = 4 << 20;

/// A resolved user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// All groups of the process, the primary one first.
    pub(crate) groups: Vec<u32>,
    /// Home directory; `/` when nothing says otherwise.
    pub(crate) home: String,
}

/// Why a user could not be resolved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UserError {
    #[error("no user {0:?} in the container's /etc/passwd")]
    NoUser(String),
    #[error("no group {0:?} in the container's /etc/group")]
    NoGroup(String),
    #[error("read {file} of the container")]
    Read {
        file: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Resolves `request` in the root file system `rootfs`.
///
/// Links in it are followed as if `rootfs` was `/`: they cannot lead outside.
pub(crate) fn resolve(rootfs: &Path, request: &Request) -> Result<User, UserError> {
    let passwd = read(rootfs, "/etc/passwd")?;
    let group = read(rootfs, "/etc/group")?;
    resolve_in(&passwd, &group, request)
}

/// Returns the text of a file of the container; empty when there is none.
fn read(rootfs: &Path, file: &'static str) -> Result<String, UserError> {
    let error = |source| UserError::Read { file, source };
    let open = || -> Result<File, pathrs::error::Error> {
        // Never block on a FIFO that an image put there.
        Root::open(rootfs)?.open_subpath(file, OpenFlags::O_RDONLY | OpenFlags::O_NONBLOCK)
    };
    let opened = match open() {
        Ok(opened) => opened,
        Err(e) => {
            return match e.kind() {
                ErrorKind::OsError(Some(libc::ENOENT | libc::ENOTDIR)) => Ok(String::new()),
                _ => Err(error(io::Error::other(e))),
            };
        }
    };
    if !opened.metadata().map_err(error)?.is_file() {
        return Ok(String::new());
    }
    let mut bytes = Vec::new();
    opened
        .take(MAX_FILE)
        .read_to_end(&mut bytes)
        .map_err(error)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Parses an id. The largest number is none: for setresuid(2) it says that nothing is changed, which would
/// be root's.
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|&id| id != u32::MAX)
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = id(fields.nth(1)?)?;
        let gid = id(fields.next()?)?;
        let home = fields.nth(1).unwrap_or("");
        Some(Account {
            name,
            uid,
            gid,
            home,
        })
    })
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = id(fields.nth(1)?)?;
        let members = fields.next().unwrap_or("");
        Some(Group { name, gid, members })
    })
}

fn resolve_in(passwd: &str, group: &str, request: &Request) -> Result<User, UserError> {
    let (user_part, group_part) = match request.user.split_once(':') {
        Some((user, group)) => (user, group),
        None => (request.user.as_str(), ""),
    };
    // An overriding uid replaces the image's whole setting, its group too.
    let (by_uid, by_name, group_part) = match (request.uid, user_part) {
        (Some(uid), _) => (Some(uid), None, ""),
        (None, "") => (Some(0), None, group_part),
        (None, name) => (id(name), Some(name), group_part),
    };
    // A name wins over a number: "1000" may be somebody's name.
    let account = by_name
        .and_then(|name| accounts(passwd).find(|a| a.name == name))
        .or_else(|| by_uid.and_then(|uid| accounts(passwd).find(|a| a.uid == uid)));
    let uid = match (&account, by_uid) {
        (Some(account), _) => account.uid,
        (None, Some(uid)) => uid,
        (None, None) => return Err(UserError::NoUser(user_part.to_owned())),
    };
    let gid = match (request.gid, group_part) {
        (Some(gid), _) => gid,
        (None, "") => account.as_ref().map_or(0, |a| a.gid),
        (None, name) => groups(group)
            .find(|g| g.name == name)
            .map(|g| g.gid)
            .or_else(|| id(name))
            .ok_or_else(|| UserError::NoGroup(name.to_owned()))?,
    };
    let mut all = vec![gid];
    if !request.strict_groups
        && let Some(account) = &account
    {
        let listed = groups(group)
            .filter(|g| g.members.split(',').any(|m| m == account.name))
            .map(|g| g.gid);
        all.extend(listed);
    }
    all.extend(&request.supplemental_groups);
    let mut seen = std::collections::HashSet::new();
    all.retain(|gid| seen.insert(*gid));
    let home = account
        .map(|a| a.home)
        .filter(|home| home.starts_with('/'))
        .unwrap_or("/");
    Ok(User {
        uid,
        gid,
        groups: all,
        home: home.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
        broken line\n\
        www:x:33:33::/var/www:/bin/false\n\
        1000:x:7:8::/seven:\n\
        app:x:1000:50::/home/app:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nwww:x:33:\nstaff:x:50:www\ndata:x:60:app,www\nnone\n";

    fn ask(user: &str) -> Request {
        Request {
            user: user.to_owned(),
            ..Request::default()
        }
    }

    fn ids(request: &Request) -> (u32, u32, Vec<u32>) {
        let user = resolve_in(PASSWD, GROUP, request).unwrap();
        (user.uid, user.gid, user.groups)
    }

    #[test]
    fn the_image_syntax_is_understood() {
        assert_eq!(ids(&ask("")), (0, 0, vec![0]));
        assert_eq!(ids(&ask("www")), (33, 33, vec![33, 50, 60]));
        assert_eq!(ids(&ask("33")), (33, 33, vec![33, 50, 60]));
        assert_eq!(ids(&ask("www:data")), (33, 60, vec![60, 50]));
        assert_eq!(ids(&ask("www:77")), (33, 77, vec![77, 50, 60]));
        assert_eq!(ids(&ask("4711")), (4711, 0, vec![0]));
        assert_eq!(ids(&ask("4711:4712")), (4711, 4712, vec![4712]));
        assert_eq!(ids(&ask(":staff")), (0, 50, vec![50]));
    }

    #[test]
    fn a_name_wins_over_a_number() {
        assert_eq!(ids(&ask("1000")), (7, 8, vec![8]));
    }

    #[test]
    fn overrides_replace_the_images_user_and_group() {
        let request = Request {
            uid: Some(1000),
            ..ask("www:33")
        };
        assert_eq!(ids(&request), (1000, 50, vec![50, 60]));
        let request = Request {
            gid: Some(99),
            supplemental_groups: vec![5, 99, 6, 5],
            ..request
        };
        assert_eq!(ids(&request), (1000, 99, vec![99, 60, 5, 6]));
        let request = Request {
            strict_groups: true,
            ..request
        };
        assert_eq!(ids(&request), (1000, 99, vec![99, 5, 6]));
    }

    #[test]
    fn homes_come_from_passwd() {
        let home = |user: &str| resolve_in(PASSWD, GROUP, &ask(user)).unwrap().home;
        assert_eq!(home(""), "/root");
        assert_eq!(home("app"), "/home/app");
        assert_eq!(home("4711"), "/");
    }

    #[test]
    fn unknown_names_are_errors() {
        assert!(matches!(
            resolve_in(PASSWD, GROUP, &ask("nobody")),
            Err(UserError::NoUser(name)) if name == "nobody"
        ));
        assert!(matches!(
            resolve_in(PASSWD, GROUP, &ask("www:wheel")),
            Err(UserError::NoGroup(name)) if name == "wheel"
        ));
        assert!(resolve_in("", "", &ask("www")).is_err());
        assert_eq!(resolve_in("", "", &ask("5")).unwrap().uid, 5);
    }

    #[test]
    fn the_number_that_changes_nothing_is_no_id() {
        let passwd = "none:x:4294967295:5::/:\ngroup:x:5:4294967295::/:\n";
        let group = "none:x:4294967295:\n";
        for user in ["4294967295", "none", "group", "0:4294967295", "0:none"] {
            assert!(resolve_in(passwd, group, &ask(user)).is_err(), "{user}");
        }
        let largest = resolve_in(passwd, group, &ask("4294967294")).unwrap();
        assert_eq!(largest.uid, 4_294_967_294);
    }

    #[test]
    fn links_stay_inside_the_container() {
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc");
        std::fs::create_dir(&etc).unwrap();
        // Outside, this is the build machine's file, which has a "daemon".
        symlink("/etc/passwd.real", etc.join("passwd")).unwrap();
        assert!(resolve(root.path(), &ask("daemon")).is_err());
        std::fs::write(etc.join("passwd.real"), "daemon:x:123:1:::\n").unwrap();
        assert_eq!(resolve(root.path(), &ask("daemon")).unwrap().uid, 123);
        symlink("../../../../etc/group", etc.join("group")).unwrap();
        assert!(resolve(root.path(), &ask("daemon")).is_err());
    }

    #[test]
    fn a_fifo_in_place_of_passwd_does_not_hang() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        nix::unistd::mkfifo(
            &root.path().join("etc/passwd"),
            nix::sys::stat::Mode::S_IRWXU,
        )
        .unwrap();
        assert_eq!(resolve(root.path(), &ask("")).unwrap().uid, 0);
    }
}

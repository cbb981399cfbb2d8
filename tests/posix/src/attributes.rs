//! Times, sizes, extended attributes.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink},
    path::Path,
    thread,
    time::Duration,
};

use rustix::{
    fs::{
        AtFlags, CWD, Mode, Timespec, Timestamps, XattrFlags, getxattr, getxattr_query, listxattr,
        lsetxattr, removexattr, setxattr, statvfs, utimensat,
    },
    io::Errno,
    process::umask,
};

use crate::{owners::stranger, place::Place};

type Times = [(i64, i64); 3];

/// Access, modification, change.
fn times(path: &Path) -> Times {
    let meta = fs::symlink_metadata(path).unwrap();
    [
        (meta.atime(), meta.atime_nsec()),
        (meta.mtime(), meta.mtime_nsec()),
        (meta.ctime(), meta.ctime_nsec()),
    ]
}

/// What of modification and change `work` makes later.
fn later(path: &Path, work: impl FnOnce()) -> (bool, bool) {
    let before = times(path);
    // More than a tick of the coarsest clock.
    thread::sleep(Duration::from_millis(25));
    work();
    let after = times(path);
    (after[1] > before[1], after[2] > before[2])
}

pub fn writing_changes_times(place: &Place) {
    let path = place.file("f", "text");
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let both = (true, true);
    assert_eq!(later(&path, || file.write_all_at(b"x", 0).unwrap()), both);
    assert_eq!(later(&path, || file.set_len(2).unwrap()), both);
    assert_eq!(later(&path, || drop(File::create(&path).unwrap())), both);
    let nothing = later(&path, || drop(fs::read(&path).unwrap()));
    assert_eq!(nothing, (false, false));
}

pub fn changes_of_attributes_change_ctime_alone(place: &Place) {
    let path = place.file("f", "text");
    let alone = (false, true);
    let mode = || fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    assert_eq!(later(&path, mode), alone);
    let owner = || chown(&path, Some(5), None).unwrap();
    assert_eq!(later(&path, owner), alone);
    let link = || fs::hard_link(&path, place.at("g")).unwrap();
    assert_eq!(later(&path, link), alone);
    let unlink = || fs::remove_file(place.at("g")).unwrap();
    assert_eq!(later(&path, unlink), alone);
    let attribute = || setxattr(&path, "user.a", b"b", XattrFlags::empty()).unwrap();
    assert_eq!(later(&path, attribute), alone);
    let before = times(&path);
    thread::sleep(Duration::from_millis(25));
    fs::rename(&path, place.at("h")).unwrap();
    assert_eq!(times(&place.at("h"))[1], before[1]);
}

pub fn directories_change_with_their_entries(place: &Place) {
    let dir = place.at("d");
    fs::create_dir(&dir).unwrap();
    let both = (true, true);
    assert_eq!(later(&dir, || fs::write(dir.join("f"), "").unwrap()), both);
    let rename = || fs::rename(dir.join("f"), dir.join("g")).unwrap();
    assert_eq!(later(&dir, rename), both);
    let inside = later(&dir, || fs::write(dir.join("g"), "text").unwrap());
    assert_eq!(inside, (false, false));
    assert_eq!(
        later(&dir, || fs::remove_file(dir.join("g")).unwrap()),
        both
    );
    let sub = dir.join("sub");
    assert_eq!(later(&dir, || fs::create_dir(&sub).unwrap()), both);
    assert_eq!(later(&dir, || fs::remove_dir(&sub).unwrap()), both);
}

fn set_times(path: &Path, access: (i64, i64), modification: (i64, i64)) {
    let spec = |(tv_sec, tv_nsec)| Timespec { tv_sec, tv_nsec };
    let times = Timestamps {
        last_access: spec(access),
        last_modification: spec(modification),
    };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

pub fn times_have_nanoseconds_and_any_year(place: &Place) {
    let path = place.file("f", "");
    for at in [
        (1_000_000_000, 123_456_789),
        (-1_000_000_000, 1),
        (0, 0),
        (5_000_000_000, 999_999_999),
    ] {
        set_times(&path, at, (at.0 + 1, at.1));
        let [access, modification, _] = times(&path);
        assert_eq!((access, modification), (at, (at.0 + 1, at.1)));
    }
    // UTIME_OMIT and UTIME_NOW.
    let before = times(&path);
    set_times(
        &path,
        (0, rustix::fs::UTIME_OMIT),
        (0, rustix::fs::UTIME_NOW),
    );
    let after = times(&path);
    assert_eq!(after[0], before[0]);
    assert_ne!(after[1], before[1]);
}

pub fn times_of_a_symlink_are_its_own(place: &Place) {
    let target = place.file("target", "");
    let link = place.at("link");
    symlink("target", &link).unwrap();
    let before = times(&target);
    set_times(&link, (1, 2), (3, 4));
    let [access, modification, _] = times(&link);
    assert_eq!((access, modification), ((1, 2), (3, 4)));
    assert_eq!(times(&target)[1], before[1]);
    std::os::unix::fs::lchown(&link, Some(5), Some(6)).unwrap();
    assert_eq!(fs::symlink_metadata(&link).unwrap().uid(), 5);
    assert_eq!(fs::metadata(&link).unwrap().uid(), 0);
}

fn value(path: &Path, name: &str) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0; 65_536];
    let length = getxattr(path, name, &mut value[..])?;
    value.truncate(length);
    Ok(value)
}

/// Those of users; others are the system's.
fn names(path: &Path) -> Vec<String> {
    let mut list = vec![0; 65_536];
    let length = listxattr(path, &mut list[..]).unwrap();
    let names = list[..length].split(|byte| *byte == 0);
    let names = names.map(|name| String::from_utf8(name.to_vec()).unwrap());
    let mut names: Vec<_> = names.filter(|name| name.starts_with("user.")).collect();
    names.sort();
    names
}

fn set(path: &Path, name: &str, value: &[u8]) -> Result<(), Errno> {
    setxattr(path, name, value, XattrFlags::empty())
}

pub fn extended_attributes_are_kept(place: &Place) {
    let path = place.file("f", "");
    let dir = place.at("d");
    fs::create_dir(&dir).unwrap();
    for path in [&path, &dir] {
        set(path, "user.one", b"1").unwrap();
        set(path, "user.empty", b"").unwrap();
        set(path, "user.binary", b"\0\xff\n").unwrap();
        assert_eq!(value(path, "user.one").unwrap(), b"1");
        assert_eq!(value(path, "user.empty").unwrap(), b"");
        assert_eq!(value(path, "user.binary").unwrap(), b"\0\xff\n");
        assert_eq!(names(path), ["user.binary", "user.empty", "user.one"]);
        removexattr(path, "user.one").unwrap();
        assert_eq!(value(path, "user.one"), Err(Errno::NODATA));
        assert_eq!(removexattr(path, "user.one"), Err(Errno::NODATA));
        assert_eq!(names(path), ["user.binary", "user.empty"]);
    }
    fs::rename(&path, place.at("g")).unwrap();
    assert_eq!(value(&place.at("g"), "user.binary").unwrap(), b"\0\xff\n");
}

pub fn extended_attributes_are_made_or_replaced(place: &Place) {
    let path = place.file("f", "");
    let replace = |text: &[u8]| setxattr(&path, "user.a", text, XattrFlags::REPLACE);
    let create = |text: &[u8]| setxattr(&path, "user.a", text, XattrFlags::CREATE);
    assert_eq!(replace(b"1"), Err(Errno::NODATA));
    create(b"2").unwrap();
    assert_eq!(create(b"3"), Err(Errno::EXIST));
    replace(b"4").unwrap();
    assert_eq!(value(&path, "user.a").unwrap(), b"4");
}

pub fn extended_attributes_have_sizes(place: &Place) {
    let path = place.file("f", "");
    let large = vec![b'v'; 3000];
    set(&path, "user.large", &large).unwrap();
    assert_eq!(value(&path, "user.large").unwrap(), large);
    assert_eq!(getxattr_query(&path, "user.large"), Ok(3000));
    let mut short = [0; 2999];
    let read = getxattr(&path, "user.large", &mut short[..]);
    assert_eq!(read, Err(Errno::RANGE));
    let mut short = [0; 3];
    assert_eq!(listxattr(&path, &mut short[..]), Err(Errno::RANGE));
    let long = format!("user.{}", "n".repeat(251));
    assert_eq!(set(&path, &long, b""), Err(Errno::RANGE));
    set(&path, &long[..255], b"").unwrap();
    assert_eq!(set(&path, "unknown.a", b""), Err(Errno::OPNOTSUPP));
    let huge = vec![0; 65_537];
    assert_eq!(set(&path, "user.huge", &huge), Err(Errno::TOOBIG));
}

pub fn extended_attributes_of_others_are_refused(place: &Place) {
    let path = place.file("f", "");
    set(&path, "user.a", b"1").unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    stranger(|| {
        assert_eq!(value(&path, "user.a").unwrap(), b"1");
        assert_eq!(set(&path, "user.a", b"2"), Err(Errno::ACCESS));
        assert_eq!(removexattr(&path, "user.a"), Err(Errno::ACCESS));
    });
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    stranger(|| assert_eq!(value(&path, "user.a"), Err(Errno::ACCESS)));
    // Symbolic links have none.
    symlink("f", place.at("link")).unwrap();
    let refused = lsetxattr(place.at("link"), "user.a", b"1", XattrFlags::empty());
    assert_eq!(refused, Err(Errno::PERM));
}

pub fn trusted_attributes_are_roots(place: &Place) {
    let path = place.file("f", "");
    fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
    stranger(|| assert_eq!(set(&path, "trusted.a", b"1"), Err(Errno::PERM)));
    set(&path, "trusted.a", b"1").unwrap();
    assert_eq!(value(&path, "trusted.a").unwrap(), b"1");
}

/// Also of a file that is known by another name or descriptor.
pub fn sizes_and_links_are_current(place: &Place) {
    let path = place.file("f", "");
    fs::hard_link(&path, place.at("g")).unwrap();
    let reader = File::open(place.at("g")).unwrap();
    let writer = OpenOptions::new().append(true).open(&path).unwrap();
    for length in 1..20_u64 {
        std::io::Write::write_all(&mut &writer, b"x").unwrap();
        assert_eq!(reader.metadata().unwrap().len(), length);
        assert_eq!(fs::metadata(place.at("g")).unwrap().len(), length);
    }
    for number in 0..5 {
        fs::hard_link(&path, place.at(&format!("l{number}"))).unwrap();
        assert_eq!(reader.metadata().unwrap().nlink(), 3 + number);
    }
    let dir = place.at("d");
    fs::create_dir(&dir).unwrap();
    assert_eq!(fs::metadata(&dir).unwrap().nlink(), 2);
    fs::create_dir(dir.join("sub")).unwrap();
    assert_eq!(fs::metadata(&dir).unwrap().nlink(), 3);
}

pub fn the_file_system_tells_its_size(place: &Place) {
    let stat = statvfs(&place.dir).unwrap();
    assert!(stat.f_blocks > 0 && stat.f_bavail <= stat.f_blocks);
    assert!(stat.f_bsize > 0 && stat.f_frsize > 0);
    assert_eq!(stat.f_namemax, 255);
    let file = rustix::fs::fstatvfs(File::open(place.file("f", "")).unwrap()).unwrap();
    assert_eq!(file.f_blocks, stat.f_blocks);
}

/// A list of access control (acl(5)): what the owner, user 3000, the group, all but the owner at
/// most, and others may.
fn acl(owner: u16, user: u16, group: u16, most: u16, others: u16) -> Vec<u8> {
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1_u16, owner, u32::MAX),
        (2, user, 3000),
        (4, group, u32::MAX),
        (16, most, u32::MAX),
        (32, others, u32::MAX),
    ] {
        list.extend_from_slice(&tag.to_le_bytes());
        list.extend_from_slice(&permissions.to_le_bytes());
        list.extend_from_slice(&id.to_le_bytes());
    }
    list
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o777
}

pub fn acls_grant_and_deny(place: &Place) {
    let path = place.file("f", "text");
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    stranger(|| assert!(fs::read(&path).is_err()));
    let list = acl(6, 4, 0, 4, 0);
    set(&path, "system.posix_acl_access", &list).unwrap();
    assert_eq!(value(&path, "system.posix_acl_access").unwrap(), list);
    assert_eq!(mode(&path), 0o640);
    stranger(|| assert_eq!(fs::read_to_string(&path).unwrap(), "text"));
    // What the mode shows of a group is the most that anybody may.
    set(&path, "system.posix_acl_access", &acl(6, 0, 4, 6, 4)).unwrap();
    assert_eq!(mode(&path), 0o664);
    stranger(|| assert!(fs::read(&path).is_err()));
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    let list = value(&path, "system.posix_acl_access").unwrap();
    assert_eq!(list, acl(6, 0, 4, 0, 0));
    removexattr(&path, "system.posix_acl_access").unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o604)).unwrap();
    stranger(|| assert_eq!(fs::read_to_string(&path).unwrap(), "text"));
}

pub fn acls_are_inherited_in_place_of_the_mask(place: &Place) {
    let dir = place.at("d");
    fs::create_dir(&dir).unwrap();
    let list = acl(7, 7, 5, 7, 0);
    set(&dir, "system.posix_acl_default", &list).unwrap();
    let old = umask(Mode::from_raw_mode(0o077));
    let sub = dir.join("sub");
    fs::write(dir.join("f"), "text").unwrap();
    fs::create_dir(&sub).unwrap();
    fs::write(place.at("beside"), "").unwrap();
    umask(old);
    assert_eq!(mode(&dir.join("f")), 0o660);
    let made = value(&dir.join("f"), "system.posix_acl_access").unwrap();
    assert_eq!(made, acl(6, 7, 5, 6, 0));
    assert_eq!(mode(&sub), 0o770);
    assert_eq!(value(&sub, "system.posix_acl_default").unwrap(), list);
    assert_eq!(mode(&place.at("beside")), 0o600);
    stranger(|| fs::write(sub.join("f"), "theirs").unwrap());
}

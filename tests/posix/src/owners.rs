//! Who may do what, and to whom it belongs.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::Write,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown},
    path::Path,
    thread,
};

use rustix::{
    fs::{CWD, FallocateFlags, FileType, Mode, fallocate, mknodat},
    io::Errno,
    process::{Gid, Uid, umask},
    thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

use crate::place::Place;

/// Does something as another user, who has no powers.
fn user<T: Send>(uid: u32, gid: u32, groups: &[u32], work: impl FnOnce() -> T + Send) -> T {
    let groups: Vec<_> = groups.iter().copied().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    thread::scope(|scope| {
        let thread = scope.spawn(move || {
            set_thread_groups(&groups).unwrap();
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

/// Does something as somebody whom no file here knows.
pub fn stranger<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    user(3000, 3000, &[], work)
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn owner(path: &Path) -> (u32, u32) {
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.uid(), meta.gid())
}

fn is(error: &std::io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

/// Whether all bits are gone that a stranger's write takes away.
fn taken_away(place: &Place, change: impl Fn(&Path) + Sync) {
    for (before, after) in [
        (0o6777, 0o777),
        (0o4777, 0o777),
        (0o2777, 0o777),
        (0o1777, 0o1777),
    ] {
        let path = place.file("f", "some text");
        set_mode(&path, before);
        stranger(|| change(&path));
        assert_eq!(mode(&path), after, "{before:o} became {:o}", mode(&path));
        fs::remove_file(path).unwrap();
    }
}

fn open_to_write(path: &Path) -> File {
    OpenOptions::new().write(true).open(path).unwrap()
}

pub fn writing_takes_the_set_id_bits_away(place: &Place) {
    taken_away(place, |path| {
        open_to_write(path).write_all_at(b"x", 2).unwrap();
    });
}

pub fn truncating_takes_the_set_id_bits_away(place: &Place) {
    taken_away(place, |path| open_to_write(path).set_len(1).unwrap());
}

pub fn opening_to_truncate_takes_the_set_id_bits_away(place: &Place) {
    taken_away(place, |path| drop(File::create(path).unwrap()));
}

pub fn reserving_takes_the_set_id_bits_away(place: &Place) {
    taken_away(place, |path| {
        let file = open_to_write(path);
        fallocate(&file, FallocateFlags::empty(), 0, 4096).unwrap();
    });
}

pub fn a_new_owner_takes_the_set_id_bits_away(place: &Place) {
    let path = place.file("f", "");
    for (before, after) in [(0o6755, 0o755), (0o2745, 0o2745)] {
        set_mode(&path, before);
        chown(&path, Some(7), Some(8)).unwrap();
        assert_eq!(mode(&path), after);
    }
    let dir = place.at("d");
    fs::create_dir(&dir).unwrap();
    set_mode(&dir, 0o6755);
    chown(&dir, Some(7), Some(8)).unwrap();
    assert_eq!(mode(&dir), 0o6755);
}

/// A set-group-id bit of what the group can't execute, which once was for locks.
pub fn writing_takes_marks_of_mandatory_locks_away(place: &Place) {
    let path = place.file("f", "some text");
    set_mode(&path, 0o2767);
    stranger(|| open_to_write(&path).write_all_at(b"x", 2).unwrap());
    assert_eq!(mode(&path), 0o767);
}

pub fn root_keeps_the_set_id_bits(place: &Place) {
    let path = place.file("f", "some text");
    set_mode(&path, 0o6777);
    open_to_write(&path).write_all_at(b"x", 2).unwrap();
    open_to_write(&path).set_len(1).unwrap();
    assert_eq!(mode(&path), 0o6777);
}

pub fn groups_are_inherited(place: &Place) {
    let dir = place.at("d");
    fs::create_dir(&dir).unwrap();
    chown(&dir, None, Some(500)).unwrap();
    set_mode(&dir, 0o2777);
    user(3000, 3000, &[], || {
        File::create(dir.join("f")).unwrap();
        fs::create_dir(dir.join("sub")).unwrap();
        std::os::unix::fs::symlink("x", dir.join("link")).unwrap();
        mknodat(CWD, dir.join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        // Of a group that one is not in, the bit is not to be had.
        set_mode(&dir.join("f"), 0o2755);
    });
    for name in ["f", "sub", "link", "fifo"] {
        assert_eq!(owner(&dir.join(name)), (3000, 500), "{name}");
    }
    assert_eq!(mode(&dir.join("sub")) & 0o2000, 0o2000);
    assert_eq!(mode(&dir.join("f")), 0o755);
}

pub fn supplementary_groups_count(place: &Place) {
    let dir = place.at("d");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("f"), "text").unwrap();
    for (path, mode) in [(&dir, 0o770), (&dir.join("f"), 0o660)] {
        chown(path, Some(0), Some(700)).unwrap();
        set_mode(path, mode);
    }
    user(3000, 3000, &[600, 700], || {
        assert_eq!(fs::read_to_string(dir.join("f")).unwrap(), "text");
        fs::write(dir.join("f"), "more").unwrap();
        fs::write(dir.join("new"), "new").unwrap();
        // To a group of one's own, and no other.
        chown(dir.join("new"), None, Some(600)).unwrap();
        let error = chown(dir.join("new"), None, Some(601)).unwrap_err();
        assert!(is(&error, Errno::PERM), "{error}");
    });
    assert_eq!(owner(&dir.join("new")), (3000, 600));
    stranger(|| {
        let error = fs::read_to_string(dir.join("f")).unwrap_err();
        assert!(is(&error, Errno::ACCESS), "{error}");
    });
}

pub fn the_mask_applies(place: &Place) {
    for (mask, file, dir) in [
        (0o000, 0o666, 0o777),
        (0o027, 0o640, 0o750),
        (0o777, 0o000, 0o000),
    ] {
        let name = |kind: &str| place.at(&format!("{kind}{mask:o}"));
        let old = umask(Mode::from_raw_mode(mask));
        File::create(name("file")).unwrap();
        fs::create_dir(name("dir")).unwrap();
        let all = Mode::from_raw_mode(0o666);
        mknodat(CWD, name("fifo"), FileType::Fifo, all, 0).unwrap();
        umask(old);
        assert_eq!(mode(&name("file")), file);
        assert_eq!(mode(&name("fifo")), file);
        assert_eq!(mode(&name("dir")), dir);
    }
}

pub fn modes_bind_others(place: &Place) {
    let path = place.file("f", "text");
    let dir = place.at("d");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("in"), "in").unwrap();
    chown(&path, Some(1000), Some(2000)).unwrap();
    // The first that one is counts: owner, group, others.
    for (uid, gid, mode, readable) in [
        (1000, 2000, 0o077, false),
        (1000, 9, 0o400, true),
        (3000, 2000, 0o707, false),
        (3000, 2000, 0o040, true),
        (3000, 3000, 0o770, false),
        (3000, 3000, 0o004, true),
    ] {
        set_mode(&path, mode);
        let read = user(uid, gid, &[], || fs::read_to_string(&path));
        assert_eq!(read.is_ok(), readable, "{uid}:{gid} {mode:o}");
    }
    // A directory without x leads nowhere, one without r is not listed.
    for (mode, listed, walked) in [
        (0o755, true, true),
        (0o744, true, false),
        (0o711, false, true),
    ] {
        set_mode(&dir, mode);
        stranger(|| {
            assert_eq!(fs::read_dir(&dir).is_ok(), listed, "{mode:o}");
            assert_eq!(fs::read(dir.join("in")).is_ok(), walked, "{mode:o}");
            let error = File::create(dir.join("new")).unwrap_err();
            assert!(is(&error, Errno::ACCESS), "{error}");
        });
    }
    // Root may all the same.
    set_mode(&path, 0);
    assert_eq!(fs::read_to_string(&path).unwrap(), "text");
}

pub fn sticky_directories_protect(place: &Place) {
    let dir = place.at("d");
    fs::create_dir(&dir).unwrap();
    set_mode(&dir, 0o1777);
    user(1000, 1000, &[], || {
        fs::write(dir.join("theirs"), "").unwrap()
    });
    stranger(|| {
        fs::write(dir.join("mine"), "").unwrap();
        for refused in [
            fs::remove_file(dir.join("theirs")),
            fs::rename(dir.join("theirs"), dir.join("other")),
            fs::rename(dir.join("mine"), dir.join("theirs")),
        ] {
            let error = refused.unwrap_err();
            assert!(is(&error, Errno::PERM), "{error}");
        }
        fs::remove_file(dir.join("mine")).unwrap();
    });
    user(1000, 1000, &[], || {
        fs::remove_file(dir.join("theirs")).unwrap();
    });
}

pub fn an_open_file_needs_no_permission(place: &Place) {
    let dir = place.at("d");
    fs::create_dir(&dir).unwrap();
    set_mode(&dir, 0o777);
    let path = dir.join("f");
    stranger(|| {
        let mut file = File::create(&path).unwrap();
        set_mode(&path, 0);
        file.write_all(b"written").unwrap();
        file.set_len(4).unwrap();
        file.sync_all().unwrap();
        let error = File::open(&path).unwrap_err();
        assert!(is(&error, Errno::ACCESS), "{error}");
    });
    assert_eq!(fs::read_to_string(&path).unwrap(), "writ");
    // Also one that was made without any permission.
    let made = dir.join("made");
    stranger(|| {
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o000);
        options.open(&made).unwrap().write_all(b"text").unwrap();
    });
    assert_eq!(
        (mode(&made), fs::read_to_string(&made).unwrap()),
        (0, "text".into())
    );
}

pub fn files_belong_to_who_makes_them(place: &Place) {
    set_mode(&place.dir, 0o777);
    user(1234, 5678, &[9], || {
        fs::write(place.at("f"), "").unwrap();
        fs::create_dir(place.at("d")).unwrap();
        std::os::unix::fs::symlink("x", place.at("l")).unwrap();
        let error = chown(place.at("f"), Some(3000), None).unwrap_err();
        assert!(is(&error, Errno::PERM), "{error}");
    });
    for name in ["f", "d", "l"] {
        assert_eq!(owner(&place.at(name)), (1234, 5678), "{name}");
    }
    chown(place.at("f"), Some(u32::MAX - 1), Some(4_000_000_000)).unwrap();
    assert_eq!(owner(&place.at("f")), (u32::MAX - 1, 4_000_000_000));
}

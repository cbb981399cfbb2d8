//! Directories and what is in them.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt, PermissionsExt, symlink},
        },
    },
    path::{Path, PathBuf},
    thread,
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, fchmod,
        fchown, futimens, linkat, openat, renameat_with, statat,
    },
    io::Errno,
    process::{Gid, Uid},
};

use crate::place::Place;

fn read_write(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).open(path).unwrap()
}

fn text(file: &mut File) -> String {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

fn list(dir: &Path) -> BTreeSet<OsString> {
    let entries = fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name()).collect()
}

/// Renames below one directory.
fn rename(place: &Place, old: &str, new: &str, flags: RenameFlags) -> Result<(), Errno> {
    renameat_with(CWD, place.at(old), CWD, place.at(new), flags)
}

pub fn an_unlinked_file_lives_while_it_is_open(place: &Place) {
    let path = place.file("f", "before");
    let mut file = read_write(&path);
    fs::remove_file(&path).unwrap();
    assert!(list(&place.dir).is_empty());
    assert!(!path.exists());
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    assert_eq!(text(&mut file), "before");
    file.write_all_at(b"AFTER and more", 0).unwrap();
    assert_eq!(text(&mut file), "AFTER and more");
    // Another of that name is another.
    place.file("f", "second");
    assert_ne!(
        file.metadata().unwrap().ino(),
        fs::metadata(&path).unwrap().ino()
    );
    assert_eq!(text(&mut file), "AFTER and more");
    assert_eq!(fs::read_to_string(&path).unwrap(), "second");
}

pub fn an_unlinked_file_is_changed_through_its_descriptor(place: &Place) {
    let path = place.file("f", "0123456789");
    let file = read_write(&path);
    fs::remove_file(&path).unwrap();
    file.set_len(4).unwrap();
    fchmod(&file, Mode::from_raw_mode(0o4711)).unwrap();
    let meta = file.metadata().unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o7777), (4, 0o4711));
    fchown(&file, Some(Uid::from_raw(5)), Some(Gid::from_raw(6))).unwrap();
    let at = Timespec {
        tv_sec: 1_000_000_000,
        tv_nsec: 5,
    };
    let times = Timestamps {
        last_access: at,
        last_modification: at,
    };
    futimens(&file, &times).unwrap();
    let meta = file.metadata().unwrap();
    assert_eq!((meta.uid(), meta.gid()), (5, 6));
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (1_000_000_000, 5));
    rustix::fs::fsetxattr(&file, "user.x", b"y", rustix::fs::XattrFlags::empty()).unwrap();
    let mut value = [0; 8];
    let length = rustix::fs::fgetxattr(&file, "user.x", &mut value).unwrap();
    assert_eq!(&value[..length], b"y");
    file.sync_all().unwrap();
}

pub fn an_unlinked_file_is_opened_again_and_not_linked(place: &Place) {
    let path = place.file("f", "text");
    let file = read_write(&path);
    fs::remove_file(&path).unwrap();
    let through = format!("/proc/self/fd/{}", file.as_raw_fd());
    assert_eq!(fs::read_to_string(&through).unwrap(), "text");
    let target = place.at("again");
    let linked = linkat(CWD, &through, CWD, &target, AtFlags::SYMLINK_FOLLOW);
    assert_eq!(linked, Err(Errno::NOENT));
    let linked = linkat(&file, "", CWD, &target, AtFlags::EMPTY_PATH);
    assert_eq!(linked, Err(Errno::NOENT));
    assert!(list(&place.dir).is_empty());
}

pub fn a_file_that_is_replaced_lives_while_it_is_open(place: &Place) {
    let old = place.file("old", "old");
    let new = place.file("new", "new");
    let mut open = read_write(&old);
    fs::rename(&new, &old).unwrap();
    assert_eq!(open.metadata().unwrap().nlink(), 0);
    assert_eq!(text(&mut open), "old");
    open.set_len(1).unwrap();
    assert_eq!(text(&mut open), "o");
    assert_eq!(fs::read_to_string(&old).unwrap(), "new");
    assert_eq!(list(&place.dir).len(), 1);
}

pub fn a_removed_directory_is_empty_and_takes_nothing(place: &Place) {
    let path = place.at("d");
    fs::create_dir(&path).unwrap();
    let dir = File::open(&path).unwrap();
    fs::remove_dir(&path).unwrap();
    let entries = Dir::read_from(&dir).unwrap().flatten();
    let entries: Vec<_> = entries
        .filter(|entry| !entry.file_name().to_bytes().starts_with(b"."))
        .collect();
    assert!(entries.is_empty(), "{entries:?}");
    let made = openat(&dir, "f", OFlags::CREATE | OFlags::WRONLY, Mode::RWXU);
    assert_eq!(made.map(drop), Err(Errno::NOENT));
    assert_eq!(
        rustix::fs::mkdirat(&dir, "d", Mode::RWXU),
        Err(Errno::NOENT)
    );
}

fn fill(place: &Place, count: usize) -> BTreeSet<OsString> {
    let names = (0..count).map(|number| format!("{number:05}-a-name-that-takes-some-room"));
    names
        .map(|name| {
            File::create(place.at(&name)).unwrap();
            OsString::from(name)
        })
        .collect()
}

pub fn a_large_directory_is_listed_whole_and_once(place: &Place) {
    let names = fill(place, 150);
    let listed: Vec<_> = fs::read_dir(&place.dir).unwrap().collect();
    assert_eq!(listed.len(), names.len(), "some are missing or double");
    assert_eq!(list(&place.dir), names);
}

pub fn a_directory_is_emptied_while_it_is_listed(place: &Place) {
    fill(place, 80);
    // As rm -r does.
    for entry in fs::read_dir(&place.dir).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    assert!(list(&place.dir).is_empty());
    fs::remove_dir(&place.dir).unwrap();
}

pub fn a_directory_grows_while_it_is_listed(place: &Place) {
    let names = fill(place, 80);
    let mut seen = Vec::new();
    for (number, entry) in fs::read_dir(&place.dir).unwrap().enumerate() {
        // Not for ever, if what is new is always listed.
        if number < 80 {
            File::create(place.at(&format!("new{number}"))).unwrap();
        }
        seen.push(entry.unwrap().file_name());
    }
    let once: BTreeSet<_> = seen.iter().cloned().collect();
    assert_eq!(once.len(), seen.len(), "some are listed twice");
    assert!(names.is_subset(&once), "some are missing");
}

pub fn a_listing_goes_back_to_where_it_was(place: &Place) {
    fill(place, 130);
    let mut dir = Dir::read_from(File::open(&place.dir).unwrap()).unwrap();
    let mut first = Vec::new();
    let mut offset = 0;
    for (number, entry) in dir.by_ref().enumerate() {
        let entry = entry.unwrap();
        first.push(entry.file_name().to_owned());
        if number == 99 {
            offset = entry.offset();
        }
    }
    dir.rewind();
    let again: Vec<_> = dir
        .by_ref()
        .map(|e| e.unwrap().file_name().to_owned())
        .collect();
    assert_eq!(again, first);
    dir.seek(offset).unwrap();
    let rest: Vec<_> = dir.map(|e| e.unwrap().file_name().to_owned()).collect();
    assert_eq!(rest, first[100..]);
}

pub fn a_listing_tells_types_and_inodes(place: &Place) {
    place.file("file", "");
    fs::create_dir(place.at("dir")).unwrap();
    symlink("nowhere", place.at("link")).unwrap();
    rustix::fs::mknodat(CWD, place.at("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    rustix::fs::mknodat(CWD, place.at("socket"), FileType::Socket, Mode::RWXU, 0).unwrap();
    let dir = File::open(&place.dir).unwrap();
    for entry in Dir::read_from(&dir).unwrap().flatten() {
        let expected = match entry.file_name().to_bytes() {
            b"file" => FileType::RegularFile,
            b"link" => FileType::Symlink,
            b"fifo" => FileType::Fifo,
            b"socket" => FileType::Socket,
            b".." => continue,
            _ => FileType::Directory,
        };
        assert_eq!(entry.file_type(), expected, "{entry:?}");
        let stat = statat(&dir, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW).unwrap();
        assert_eq!(entry.ino(), stat.st_ino, "{entry:?}");
    }
}

pub fn a_listing_has_dot_and_dot_dot(place: &Place) {
    let dir = Dir::read_from(File::open(&place.dir).unwrap()).unwrap();
    let names: BTreeSet<_> = dir.map(|e| e.unwrap().file_name().to_owned()).collect();
    assert_eq!(names, BTreeSet::from([c".".to_owned(), c"..".to_owned()]));
}

pub fn names_are_any_bytes(place: &Place) {
    let long = vec![b'x'; 255];
    let names = [
        &b"\xff\xfe"[..],
        b"new\nline",
        b" ",
        b"..data",
        b"...",
        "ü€😀".as_bytes(),
        &long,
    ];
    for name in names {
        let path = place.dir.join(OsStr::from_bytes(name));
        fs::write(&path, name).unwrap();
        assert_eq!(fs::read(&path).unwrap(), name);
    }
    let expected = names.map(|name| OsStr::from_bytes(name).to_owned());
    assert_eq!(list(&place.dir), BTreeSet::from(expected));
    let error = File::create(place.at(&"y".repeat(256))).unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(Errno::NAMETOOLONG.raw_os_error())
    );
}

pub fn hard_links_are_one_file(place: &Place) {
    let first = place.file("first", "one");
    let second = place.at("second");
    fs::hard_link(&first, &second).unwrap();
    let inode = |path: &PathBuf| {
        let meta = fs::metadata(path).unwrap();
        (meta.ino(), meta.nlink(), meta.len())
    };
    assert_eq!(inode(&first), inode(&second));
    assert_eq!(inode(&first).1, 2);
    fs::write(&second, "longer").unwrap();
    assert_eq!(fs::read_to_string(&first).unwrap(), "longer");
    fs::set_permissions(&first, fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(fs::metadata(&second).unwrap().mode() & 0o777, 0o600);
    // Both names are of one file: nothing happens.
    fs::rename(&first, &second).unwrap();
    assert_eq!(list(&place.dir).len(), 2);
    fs::remove_file(&first).unwrap();
    assert_eq!(inode(&second).1, 1);
    assert_eq!(fs::read_to_string(&second).unwrap(), "longer");
}

pub fn a_link_of_a_symlink_is_a_symlink(place: &Place) {
    symlink("target", place.at("link")).unwrap();
    linkat(
        CWD,
        place.at("link"),
        CWD,
        place.at("hard"),
        AtFlags::empty(),
    )
    .unwrap();
    assert_eq!(
        fs::read_link(place.at("hard")).unwrap(),
        Path::new("target")
    );
    assert_eq!(fs::symlink_metadata(place.at("link")).unwrap().nlink(), 2);
    let target = place.at("x");
    let followed = linkat(CWD, place.at("link"), CWD, &target, AtFlags::SYMLINK_FOLLOW);
    assert_eq!(followed, Err(Errno::NOENT));
}

pub fn nothing_is_linked_or_renamed_to_another_file_system(place: &Place) {
    let here = place.file("here", "x");
    let there = place.other.join("hull-posix-there");
    let error = fs::hard_link(&here, &there).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::XDEV.raw_os_error()));
    let error = fs::rename(&here, &there).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::XDEV.raw_os_error()));
    assert!(here.exists() && !there.exists());
}

pub fn renames_refuse_to_replace(place: &Place) {
    place.file("a", "a");
    place.file("b", "b");
    let refused = rename(place, "a", "b", RenameFlags::NOREPLACE);
    assert_eq!(refused, Err(Errno::EXIST));
    rename(place, "a", "c", RenameFlags::NOREPLACE).unwrap();
    assert_eq!(list(&place.dir), BTreeSet::from(["b".into(), "c".into()]));
}

pub fn renames_exchange(place: &Place) {
    place.file("a", "file");
    fs::create_dir(place.at("b")).unwrap();
    place.file("b/in", "in");
    rename(place, "a", "b", RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::read_to_string(place.at("b")).unwrap(), "file");
    assert_eq!(fs::read_to_string(place.at("a/in")).unwrap(), "in");
    let refused = rename(place, "a", "absent", RenameFlags::EXCHANGE);
    assert_eq!(refused, Err(Errno::NOENT));
}

/// For overlay file systems: a character device 0:0 stays behind.
pub fn renames_leave_whiteouts(place: &Place) {
    place.file("a", "text");
    let done = rename(place, "a", "b", RenameFlags::WHITEOUT);
    if done.is_err() {
        // Refused, it does nothing.
        assert_eq!(fs::read_to_string(place.at("a")).unwrap(), "text");
        assert!(!place.at("b").exists());
    }
    assert_eq!(done, Ok(()));
    let left = fs::symlink_metadata(place.at("a")).unwrap();
    assert_eq!((left.mode() & 0o170_000, left.rdev()), (0o020_000, 0));
}

pub fn links_have_targets_of_any_length(place: &Place) {
    for length in [1, 59, 60, 255, 256, 4095] {
        let target = "t".repeat(length);
        let link = place.at(&format!("link{length}"));
        symlink(&target, &link).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), Path::new(&target));
        let meta = fs::symlink_metadata(&link).unwrap();
        assert_eq!(meta.len(), length as u64);
    }
}

pub fn threads_make_and_remove_the_same_names(place: &Place) {
    let harmless = |result: Result<(), std::io::Error>| match result {
        Ok(()) => {}
        Err(error) => {
            let fine = [Errno::NOENT, Errno::EXIST].map(|errno| Some(errno.raw_os_error()));
            assert!(fine.contains(&error.raw_os_error()), "{error}");
        }
    };
    thread::scope(|scope| {
        for thread in 0..4_usize {
            scope.spawn(move || {
                for round in 0..12_usize {
                    let one = place.at(&format!("n{}", (thread + round) % 5));
                    let two = place.at(&format!("n{}", (thread * 3 + round * 2) % 5));
                    harmless(fs::write(&one, "x"));
                    harmless(fs::rename(&one, &two));
                    harmless(fs::hard_link(&two, &one));
                    harmless(fs::read_to_string(&one).map(drop));
                    harmless(fs::remove_file(&two));
                }
            });
        }
    });
    for name in list(&place.dir) {
        fs::remove_file(place.dir.join(name)).unwrap();
    }
    fs::remove_dir(&place.dir).unwrap();
}

pub fn deep_directories_are_walked_and_moved(place: &Place) {
    let deep = "d/".repeat(40);
    fs::create_dir_all(place.at(&deep)).unwrap();
    let inner = File::open(place.at(&deep)).unwrap();
    fs::rename(place.at("d"), place.at("moved")).unwrap();
    let file = openat(
        &inner,
        "f",
        OFlags::CREATE | OFlags::WRONLY,
        Mode::RUSR | Mode::WUSR,
    );
    File::from(file.unwrap()).write_all(b"deep").unwrap();
    // Up again, by what each directory says is above it.
    let up = openat(&inner, "../".repeat(40), OFlags::RDONLY, Mode::empty()).unwrap();
    let top = fs::metadata(&place.dir).unwrap();
    assert_eq!(rustix::fs::fstat(&up).unwrap().st_ino, top.ino());
    let path = place.at(&format!("moved/{}f", &deep[2..]));
    assert_eq!(fs::read_to_string(path).unwrap(), "deep");
    fs::remove_dir_all(place.at("moved")).unwrap();
    assert!(list(&place.dir).is_empty());
}

/// O_TMPFILE.
pub fn files_without_names(place: &Place) {
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    let file = openat(CWD, &place.dir, flags, Mode::RUSR | Mode::WUSR).unwrap();
    let mut file = File::from(file);
    file.write_all(b"secret").unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    assert!(list(&place.dir).is_empty());
    let through = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(
        CWD,
        through,
        CWD,
        place.at("named"),
        AtFlags::SYMLINK_FOLLOW,
    )
    .unwrap();
    assert_eq!(fs::read_to_string(place.at("named")).unwrap(), "secret");
}

pub fn descriptors_of_paths_alone(place: &Place) {
    symlink("nowhere", place.at("link")).unwrap();
    place.file("f", "text");
    let open = |name, flags| openat(CWD, place.at(name), flags, Mode::empty());
    let link = open("link", OFlags::PATH | OFlags::NOFOLLOW).unwrap();
    let target = rustix::fs::readlinkat(&link, "", Vec::new()).unwrap();
    assert_eq!(target.to_bytes(), b"nowhere");
    assert_eq!(
        open("link", OFlags::NOFOLLOW).map(drop).unwrap_err(),
        Errno::LOOP
    );
    let path = open("f", OFlags::PATH).unwrap();
    let mut byte = [0];
    assert_eq!(rustix::io::read(&path, &mut byte), Err(Errno::BADF));
    let through = format!("/proc/self/fd/{}", path.as_fd().as_raw_fd());
    assert_eq!(fs::read_to_string(through).unwrap(), "text");
    assert_eq!(
        open("f", OFlags::DIRECTORY).map(drop).unwrap_err(),
        Errno::NOTDIR
    );
}

//! The real server, with a client that says FUSE to it. Needs root; each test has a mount
//! namespace of its own.
#![expect(clippy::unwrap_used, reason = "a test")]

mod client;
mod resume;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use client::*;
use hull_proto_vmm::fs::{Access, ErrorKind, MAX_DATA, Propagation, Request, Response};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// A directory that is a mount of its own, of which others hear when `shared`.
fn host(shared: bool) -> tempfile::TempDir {
    // SAFETY: the table of file descriptors is not unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.expect("these tests need root");
    let all = MountPropagationFlags::REC;
    mount_change("/", MountPropagationFlags::PRIVATE | all).unwrap();
    let dir = tempfile::tempdir().unwrap();
    mount_bind(dir.path(), dir.path()).unwrap();
    if shared {
        mount_change(dir.path(), MountPropagationFlags::SHARED | all).unwrap();
    }
    dir
}

/// Mounts a new ext4, in a file, at a path that is made.
fn ext4(image: &Path, point: &Path) {
    let run = |name: &str, arguments: &[&Path]| {
        let status = std::process::Command::new(name).args(arguments).status();
        assert!(status.unwrap().success(), "{name}");
    };
    fs::File::create(image).unwrap().set_len(16 << 20).unwrap();
    fs::create_dir_all(point).unwrap();
    run("mkfs.ext4", &[Path::new("-q"), image]);
    run("mount", &[Path::new("-oloop"), image, point]);
}

fn tmpfs(path: &Path) {
    mount("tmpfs", path, "tmpfs", MountFlags::empty(), c"").unwrap();
}

#[test]
fn files_are_read_and_written_as_the_guests_users() {
    let host = host(false);
    fs::write(host.path().join("in"), "from the host").unwrap();
    fs::set_permissions(host.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut server = Server::start();
    let root = server.share(host.path());
    assert_eq!(server.cat(root, "in").unwrap(), "from the host");
    assert_eq!(server.names(root), ["in"]);

    (server.uid, server.gid) = (1234, 5678);
    // The guest's kernel has checked that its groups let it write here.
    let (node, handle) = server.create(root, "out", 0o100_666).unwrap();
    server.write(node, handle, 0, b"from the guest").unwrap();
    let path = host.path().join("out");
    assert_eq!(fs::read_to_string(&path).unwrap(), "from the guest");
    let meta = fs::metadata(&path).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (1234, 5678));
    assert_eq!(meta.mode() & 0o7777, 0o666, "the server has no umask");
    assert_eq!(
        server.attributes(root, "out").unwrap(),
        (0o100_666, 1234, 5678)
    );
    server.call(UNLINK, root, &text("in")).unwrap();
    assert!(!host.path().join("in").exists());
    // Files of others, of any mode.
    fs::write(host.path().join("secret"), "s").unwrap();
    fs::set_permissions(
        host.path().join("secret"),
        fs::Permissions::from_mode(0o000),
    )
    .unwrap();
    assert_eq!(server.cat(root, "secret").unwrap(), "s");
}

#[test]
fn a_server_takes_the_place_of_one_that_was_killed() {
    let host = host(false);
    fs::write(host.path().join("in"), "from the host").unwrap();
    let mut server = Server::start_after_a_killed_one();
    let root = server.share(host.path());
    assert_eq!(server.cat(root, "in").unwrap(), "from the host");
}

#[test]
fn large_transfers_keep_their_bytes_and_larger_ones_are_refused() {
    let host = host(false);
    let mut server = Server::start();
    let root = server.share(host.path());
    let (node, handle) = server.create(root, "big", 0o100_600).unwrap();
    let data: Vec<u8> = (0..MAX_DATA).map(|at| (at % 251) as u8).collect();
    server.write(node, handle, 5, &data).unwrap();
    let back = server.read(node, handle, 5, MAX_DATA as u32).unwrap();
    assert!(back == data);
    let too_much = server.read(node, handle, 0, MAX_DATA as u32 + 1);
    assert_eq!(too_much, Err(libc::EINVAL));
}

#[test]
fn a_file_and_a_symlink_to_a_directory_are_shared() {
    let host = host(false);
    fs::create_dir(host.path().join("dir")).unwrap();
    fs::write(host.path().join("dir/file"), "content").unwrap();
    symlink("dir", host.path().join("link")).unwrap();
    let mut server = Server::start();
    let (file, link) = (host.path().join("dir/file"), host.path().join("link"));
    let share = |path| -> (&Path, _, _) { (path, Access::ReadWrite, Propagation::Private) };
    let added = server.add("o", &[share(&file), share(&link)]);
    let expected = Response::Added {
        directories: vec![false, true],
        places: vec!["o/0".into(), "o/1".into()],
    };
    assert_eq!(added, expected);
    let owner = server.lookup(ROOT, "o").unwrap();
    assert_eq!(server.cat(owner, "0").unwrap(), "content");
    let linked = server.lookup(owner, "1").unwrap();
    assert_eq!(server.cat(linked, "file").unwrap(), "content");
}

#[test]
fn nothing_leads_out_of_a_share() {
    let host = host(false);
    fs::create_dir_all(host.path().join("share/sub")).unwrap();
    fs::create_dir(host.path().join("elsewhere")).unwrap();
    fs::write(host.path().join("outside"), "no").unwrap();
    symlink("../outside", host.path().join("share/up")).unwrap();
    symlink("/etc/passwd", host.path().join("share/absolute")).unwrap();
    let mut server = Server::start();
    let root = server.share(&host.path().join("share"));
    let sub = server.lookup(root, "sub").unwrap();
    for node in [ROOT, root, sub] {
        for name in ["..", ".", "../outside", "../../o", "/etc", ""] {
            assert_eq!(server.lookup(node, name), Err(libc::EINVAL), "{name}");
        }
    }
    // Links are the guest's to follow, in its own tree.
    for name in ["up", "absolute"] {
        let node = server.lookup(root, name).unwrap();
        assert!(server.open(OPEN, node, libc::O_RDONLY).is_err(), "{name}");
        let target = server.call(READLINK, node, &[]).unwrap();
        assert!(target == b"../outside" || target == b"/etc/passwd");
    }
    // A directory that the host moves away stays what it is, and no way out.
    fs::rename(
        host.path().join("share/sub"),
        host.path().join("elsewhere/sub"),
    )
    .unwrap();
    assert_eq!(server.lookup(sub, ".."), Err(libc::EINVAL));
    let mut target = root.to_le_bytes().to_vec();
    target.extend_from_slice(b"sub\0../escaped\0");
    assert!(server.call(RENAME, root, &target).is_err());
    // The server's own root has mount points of owners, and the guest does not see it.
    assert_eq!(server.names(ROOT), ["o"]);
    assert_eq!(server.lookup(ROOT, "proc"), Err(libc::ENOENT));
    let mut link = text("x");
    link.extend_from_slice(&text("/target"));
    assert!(server.call(SYMLINK, ROOT, &link).is_err());
}

#[test]
fn devices_are_neither_made_nor_opened_nor_shared() {
    let host = host(false);
    let mut server = Server::start();
    let root = server.share(host.path());
    // Of no kind there is nothing.
    for kind in [libc::S_IFCHR, libc::S_IFBLK, 0] {
        let mut body = Vec::new();
        for word in [kind | 0o666, libc::makedev(1, 3) as u32, 0, 0] {
            body.extend_from_slice(&word.to_le_bytes());
        }
        body.extend_from_slice(&text("node"));
        assert_eq!(server.call(MKNOD, root, &body), Err(libc::EPERM));
    }
    assert!(!host.path().join("node").exists());
    let status = std::process::Command::new("mknod")
        .arg(host.path().join("null"))
        .args(["c", "1", "3"])
        .status();
    assert!(status.unwrap().success());
    let _listener = UnixListener::bind(host.path().join("socket")).unwrap();
    for (name, arguments) in [("disk", "b 7 0"), ("fifo", "p")] {
        let mut mknod = std::process::Command::new("mknod");
        mknod.arg(host.path().join(name)).args(arguments.split(' '));
        assert!(mknod.status().unwrap().success());
    }
    for name in ["null", "disk", "fifo", "socket"] {
        let node = server.lookup(root, name).unwrap();
        for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_WRONLY | libc::O_TRUNC] {
            let opened = server.open(OPEN, node, flags);
            assert_eq!(opened, Err(libc::EBADF), "{name}");
        }
        let opened = server.create(root, name, 0o100_600);
        assert_eq!(opened, Err(libc::EBADF), "{name}");
        // To truncate it is to open it.
        let mut body = vec![0; 88];
        body[0] = 8;
        assert_eq!(
            server.call(SETATTR, node, &body),
            Err(libc::EBADF),
            "{name}"
        );
    }
    // Not by the way of a rename either, which would leave one behind.
    fs::write(host.path().join("file"), "").unwrap();
    for (flags, expected) in [
        (libc::RENAME_WHITEOUT, Err(libc::EINVAL)),
        (libc::RENAME_NOREPLACE, Ok(vec![])),
    ] {
        let mut body = [root, u64::from(flags)].map(u64::to_le_bytes).concat();
        body.extend_from_slice(b"file\0moved\0");
        assert_eq!(server.call(RENAME2, root, &body), expected);
    }
    assert!(!host.path().join("file").exists() && host.path().join("moved").exists());

    symlink("/dev", host.path().join("devices")).unwrap();
    for (name, kind) in [
        ("/dev/null", ErrorKind::Special),
        (
            host.path().join("devices").to_str().unwrap(),
            ErrorKind::Special,
        ),
        (
            host.path().join("socket").to_str().unwrap(),
            ErrorKind::Special,
        ),
        (
            host.path().join("absent").to_str().unwrap(),
            ErrorKind::NotFound,
        ),
        ("relative", ErrorKind::Invalid),
    ] {
        let good = (host.path(), Access::ReadWrite, Propagation::Private);
        let bad = (Path::new(name), Access::ReadWrite, Propagation::Private);
        let refused = server.add("p", &[good, bad]);
        let Response::Error {
            kind: found,
            share,
            message,
        } = refused
        else {
            panic!("{refused:?}")
        };
        assert_eq!((found, share), (kind, Some(1)), "{message}");
        assert!(message.contains(name), "{message}");
        assert_eq!(server.lookup(ROOT, "p"), Err(libc::ENOENT));
    }
}

#[test]
fn special_powers_are_not_there() {
    let host = host(false);
    // As a daemon under systemd has it. It takes CAP_SYS_RESOURCE, which root of a container lacks.
    let _ = fs::write("/proc/self/oom_score_adj", "-500");
    fs::write(host.path().join("f"), "").unwrap();
    let mut server = Server::start();
    let root = server.share(host.path());
    let node = server.lookup(root, "f").unwrap();
    for name in ["security.capability", "trusted.x"] {
        let mut body = [4_u32.to_le_bytes(), [0; 4]].concat();
        body.extend_from_slice(&text(name));
        body.extend_from_slice(&[1, 0, 0, 2]);
        assert!(server.call(SETXATTR, node, &body).is_err(), "{name}");
    }
    assert_eq!(server.call(IOCTL, node, &[0; 32]), Err(libc::ENOSYS));
    // What the process itself is: alone in its namespaces, without powers beyond files.
    let pid = server.process.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let child = children.trim();
    let field_of = |pid: &str, name: &str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_ascii_whitespace().last().unwrap().to_owned()
    };
    let field = |name: &str| field_of(child, name);
    // The manager can mount, and find what is to be mounted.
    let manager = pid.to_string();
    let mounts: u64 = 1 << 21 | 1 << 18 | 0b110;
    for (pid, kept) in [(child, 0b1101_1111), (manager.as_str(), mounts)] {
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            assert_eq!(field_of(pid, set), format!("{kept:016x}"), "{set} of {pid}");
        }
        assert_eq!(field_of(pid, "CapInh"), "0000000000000000");
        assert_eq!(field_of(pid, "NoNewPrivs"), "1");
        let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        assert_eq!(score.trim(), "0", "OOM score of {pid}");
        for namespace in ["net", "ipc", "uts"] {
            let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
            assert_ne!(of(pid), of("self"), "{namespace} of {pid}");
        }
    }
    // A filter of system calls, over all threads: no opening by handle.
    assert_eq!(field("Seccomp:"), "2");
    assert_eq!(field("NSpid"), "1");
    for namespace in ["mnt", "net", "ipc", "pid"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(child), of("self"), "{namespace}");
    }
    let mounts = fs::read_to_string(format!("/proc/{child}/mounts")).unwrap();
    assert_eq!(mounts.lines().count(), 3, "{mounts}");
}

#[test]
fn files_are_linked_whoever_opened_them() {
    let host = host(false);
    let mut server = Server::start();
    let root = server.share(host.path());
    fs::set_permissions(host.path(), fs::Permissions::from_mode(0o777)).unwrap();
    // Each of the server's threads has been somebody else before.
    for (n, uid) in [1000, 0, 7, 1000, 0, 1000, 7, 0].into_iter().enumerate() {
        (server.uid, server.gid) = (uid, uid);
        let (name, link) = (format!("f{n}"), format!("l{n}"));
        let (node, _) = server.create(root, &name, 0o100_600).unwrap();
        for other in [0, 1000, 7] {
            (server.uid, server.gid) = (other, other);
            let body = [
                &node.to_le_bytes()[..],
                format!("{link}{other}\0").as_bytes(),
            ]
            .concat();
            server.call(LINK, root, &body).unwrap();
        }
        assert_eq!(fs::metadata(host.path().join(&name)).unwrap().nlink(), 4);
    }
}

#[test]
fn holes_are_found_and_handles_of_others_are_not() {
    const MIB: u64 = 1 << 20;
    let host = host(false);
    let file = fs::File::create(host.path().join("f")).unwrap();
    file.set_len(4 * MIB).unwrap();
    file.write_all_at(b"data", 2 * MIB).unwrap();
    let mut server = Server::start();
    let root = server.share(host.path());
    let node = server.lookup(root, "f").unwrap();
    let handle = server.open(OPEN, node, libc::O_RDONLY).unwrap();
    for (offset, whence, expected) in [
        (0, libc::SEEK_DATA, Ok(2 * MIB)),
        (0, libc::SEEK_HOLE, Ok(0)),
        (3 * MIB, libc::SEEK_DATA, Err(libc::ENXIO)),
        (4 * MIB, libc::SEEK_HOLE, Err(libc::ENXIO)),
        (u64::MAX, libc::SEEK_DATA, Err(libc::ENXIO)),
        // A kernel asks for nothing else.
        (1, libc::SEEK_SET, Err(libc::EINVAL)),
        (1, -1, Err(libc::EINVAL)),
    ] {
        let found = server.seek(node, handle, offset, whence);
        assert_eq!(found, expected, "{offset} {whence}");
    }
    // Never ENOSYS: then the guest's kernel would not ask again.
    let other = server.lookup(ROOT, "o").unwrap();
    for (node, handle) in [
        (node, handle + 1),
        (root, handle),
        (other, handle),
        (ROOT, handle),
        (node ^ 1 << 63, handle),
        (0, 0),
        (u64::MAX, u64::MAX),
    ] {
        let found = server.seek(node, handle, 0, libc::SEEK_DATA);
        assert_eq!(found, Err(libc::EBADF), "{node:x} {handle}");
    }
    assert_eq!(server.call(LSEEK, node, &[0; 16]), Err(libc::EINVAL));
    // Of an owner that is gone.
    let remove = Request::Remove { owner: "o".into() };
    assert_eq!(server.ask(&remove), Response::Ok);
    let found = server.seek(node, handle, 0, libc::SEEK_DATA);
    assert_eq!(found, Err(libc::EBADF));
}

#[test]
fn reserving_space_takes_the_set_id_bits_away() {
    let host = host(false);
    let path = host.path().join("f");
    fs::write(&path, "text").unwrap();
    let mut server = Server::start();
    let root = server.share(host.path());
    let node = server.lookup(root, "f").unwrap();
    let handle = server.open(OPEN, node, libc::O_RDWR).unwrap();
    // Each of the server's threads, several times over. That root's stay shows that the power is
    // given back.
    for _ in 0..8 {
        for (uid, left) in [(1000, 0o777), (u32::MAX, 0o777), (0, 0o6777)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
            server.uid = uid;
            let body = [handle, 0, 100, 0].map(u64::to_le_bytes).concat();
            server.call(FALLOCATE, node, &body).unwrap();
            let mode = fs::metadata(&path).unwrap().mode() & 0o7777;
            assert_eq!(mode, left, "{uid}");
        }
    }
    assert_eq!(fs::metadata(&path).unwrap().len(), 100);
}

#[test]
fn masks_are_applied_and_default_acls_in_their_place() {
    let host = host(false);
    let acl = host.path().join("acl");
    fs::create_dir(&acl).unwrap();
    // Owner rwx, group rwx, others none.
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions) in [(1_u16, 7_u16), (4, 7), (32, 0)] {
        list.extend_from_slice(&tag.to_le_bytes());
        list.extend_from_slice(&permissions.to_le_bytes());
        list.extend_from_slice(&u32::MAX.to_le_bytes());
    }
    let name = "system.posix_acl_default";
    rustix::fs::setxattr(&acl, name, &list, rustix::fs::XattrFlags::empty()).unwrap();
    let mut server = Server::start();
    let root = server.share(host.path());
    // FUSE_DONT_MASK, FUSE_POSIX_ACL.
    let answer = server.init(0).unwrap();
    let flags = u32::from_le_bytes(answer[12..16].try_into().unwrap());
    assert_eq!(flags & (1 << 6 | 1 << 20), 1 << 6 | 1 << 20);
    let owner = server.lookup(ROOT, "o").unwrap();
    assert_ne!(owner, root);
    let root = server.lookup(owner, "0").unwrap();
    let with_acl = server.lookup(root, "acl").unwrap();
    for (at, parent, mask, modes) in [
        (host.path(), root, 0, [0o666, 0o666, 0o777]),
        (host.path(), root, 0o027, [0o640, 0o640, 0o750]),
        (&acl, with_acl, 0o077, [0o660, 0o660, 0o770]),
        (host.path(), root, 0o777, [0, 0, 0]),
        (&acl, with_acl, 0, [0o660, 0o660, 0o770]),
    ] {
        let made = server.create_masked(parent, "f", 0o100_666, mask);
        made.unwrap();
        let mut body = [libc::S_IFIFO | 0o666, 0, mask, 0]
            .map(u32::to_le_bytes)
            .concat();
        body.extend_from_slice(b"p\0");
        server.call(MKNOD, parent, &body).unwrap();
        let mut body = [0o777, mask].map(u32::to_le_bytes).concat();
        body.extend_from_slice(b"d\0");
        server.call(MKDIR, parent, &body).unwrap();
        for (name, expected) in ["f", "p", "d"].into_iter().zip(modes) {
            let mode = fs::metadata(at.join(name)).unwrap().mode() & 0o7777;
            assert_eq!(mode, expected, "{name} {mask:o}");
        }
        fs::remove_file(at.join("f")).unwrap();
        fs::remove_file(at.join("p")).unwrap();
        fs::remove_dir(at.join("d")).unwrap();
    }
}

#[test]
fn a_file_system_without_acls_has_files_without_them() {
    let host = host(false);
    let plain = host.path().join("plain");
    fs::create_dir(&plain).unwrap();
    mount("none", &plain, "ramfs", MountFlags::empty(), c"").unwrap();
    let mut server = Server::start();
    let root = server.share(host.path());
    let plain = server.lookup(root, "plain").unwrap();
    for (node, name, expected) in [
        (root, "system.posix_acl_access", libc::ENODATA),
        (root, "user.a", libc::ENODATA),
        (plain, "system.posix_acl_access", libc::ENODATA),
        (plain, "system.posix_acl_default", libc::ENODATA),
        (plain, "user.a", libc::EOPNOTSUPP),
    ] {
        let body = [&[0, 16, 0, 0, 0, 0, 0, 0][..], &text(name)].concat();
        let asked = server.call(GETXATTR, node, &body);
        assert_eq!(asked, Err(expected), "{name}");
    }
}

#[test]
fn read_only_is_so_by_the_host_and_below_mounts_when_asked() {
    let host = host(false);
    fs::write(host.path().join("f"), "x").unwrap();
    fs::create_dir(host.path().join("below")).unwrap();
    tmpfs(&host.path().join("below"));
    let mut server = Server::start();
    for (access, top, below) in [
        (Access::ReadWrite, true, true),
        (Access::ReadOnly, false, true),
        (Access::RecursiveReadOnly, false, false),
    ] {
        let root = server.share_as(host.path(), access, Propagation::Private);
        let sub = server.lookup(root, "below").unwrap();
        let results = [root, sub].map(|node| server.create(node, "new", 0o100_600));
        for (result, allowed) in results.into_iter().zip([top, below]) {
            match result {
                Ok(_) => assert!(allowed, "{access:?}"),
                Err(error) => assert!(!allowed && error == libc::EROFS, "{access:?} {error}"),
            }
        }
        let node = server.lookup(root, "f").unwrap();
        let opened = server.open(OPEN, node, libc::O_RDWR);
        assert_eq!(opened.is_ok(), top, "{access:?}");
        assert_eq!(server.cat(root, "f").unwrap(), "x");
        for path in ["new", "below/new"] {
            let _ = fs::remove_file(host.path().join(path));
        }
    }
}

#[test]
fn mounts_made_later_appear_in_a_slave_alone() {
    for (propagation, appears) in [(Propagation::Private, false), (Propagation::Slave, true)] {
        let host = host(true);
        fs::create_dir(host.path().join("point")).unwrap();
        fs::create_dir(host.path().join("early")).unwrap();
        tmpfs(&host.path().join("early"));
        fs::write(host.path().join("early/f"), "early").unwrap();
        let mut server = Server::start();
        let root = server.share_as(host.path(), Access::ReadWrite, propagation);
        let point = server.lookup(root, "point").unwrap();
        assert_eq!(server.names(point), [""; 0]);
        tmpfs(&host.path().join("point"));
        fs::write(host.path().join("point/f"), "late").unwrap();
        let point = server.lookup(root, "point").unwrap();
        assert_eq!(server.cat(point, "f").is_ok(), appears, "{propagation:?}");
        let early = server.lookup(root, "early").unwrap();
        assert_eq!(server.cat(early, "f").unwrap(), "early");
        // Nothing of the server is mounted on the host.
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        assert!(!mounts.contains("hull-fs"), "{mounts}");
        unmount(host.path().join("point"), UnmountFlags::DETACH).unwrap();
        unmount(host.path().join("early"), UnmountFlags::DETACH).unwrap();
    }
}

/// A second, in nanoseconds.
const SECOND: u64 = 1_000_000_000;

#[test]
fn changes_of_the_host_are_seen_within_a_second() {
    let host = host(false);
    for (dir, text) in [("v1", "one"), ("v2", "two")] {
        fs::create_dir(host.path().join(dir)).unwrap();
        fs::write(host.path().join(dir).join("key"), text).unwrap();
    }
    symlink("v1", host.path().join("..data")).unwrap();
    let mut server = Server::start();
    let root = server.share(host.path());
    let data = server.lookup(root, "..data").unwrap();
    assert_eq!(server.call(READLINK, data, &[]).unwrap(), b"v1");
    symlink("v2", host.path().join("..tmp")).unwrap();
    fs::rename(host.path().join("..tmp"), host.path().join("..data")).unwrap();
    let data = server.lookup(root, "..data").unwrap();
    assert_eq!(server.call(READLINK, data, &[]).unwrap(), b"v2");

    // What is there may be believed for a second, and nothing for longer. That nothing is there is an
    // error, which is not believed at all.
    for name in ["v1", "..data"] {
        let entry = server.entry(root, name).unwrap();
        assert_eq!((entry.lives, entry.generation), ([SECOND; 2], 0), "{name}");
    }
    let v1 = server.lookup(root, "v1").unwrap();
    let key = server.entry(v1, "key").unwrap();
    assert_eq!((key.lives, key.size), ([SECOND; 2], 3));
    assert_eq!(server.entry(root, "later"), Err(libc::ENOENT));
    let attributes = server.call(GETATTR, root, &[0; 16]).unwrap();
    assert_eq!(attributes[..12], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let (node, _) = server.create(v1, "new", 0o100_600).unwrap();
    let body = [&node.to_le_bytes()[..], b"link\0"].concat();
    let linked = server.call(LINK, v1, &body).unwrap();
    assert_eq!(Entry::read(&linked).lives, [SECOND; 2]);
    // A listing tells of each file as a lookup does, and is not cached itself.
    let opened = server.call(OPENDIR, v1, &[0; 8]).unwrap();
    assert_eq!(opened[8..12], [0; 4], "FOPEN_CACHE_DIR or FOPEN_KEEP_CACHE");
    let handle = u64::from_le_bytes(opened[..8].try_into().unwrap());
    let listed = server
        .call(READDIRPLUS, v1, &transfer(handle, 0, 4096))
        .unwrap();
    assert_eq!(Entry::read(&listed).lives, [SECOND; 2]);
    // Owners come and go, and so do their shares.
    let owner = server.entry(ROOT, "o").unwrap();
    assert_eq!(owner.lives, [0, SECOND]);
    assert_eq!(server.entry(owner.node, "0").unwrap().lives, [0, SECOND]);
}

#[test]
fn what_a_volume_has_is_believed_while_no_other_pod_has_it() {
    let host = host(false);
    let kubelet = host.path().join("kubelet");
    let volume = |uid| {
        let volumes = kubelet.join("pods").join(uid).join("volumes");
        volumes.join("kubernetes.io~csi/pv/mount")
    };
    let [ours, theirs] = ["uid", "other"].map(volume);
    ext4(&host.path().join("image"), &ours);
    fs::write(ours.join("file"), "one").unwrap();
    let mut server = Server::start();
    let plain = server.share(&ours);
    assert_eq!(server.entry(plain, "file").unwrap().lives, [SECOND; 2]);
    server.ask(&Request::Remove { owner: "o".into() });
    server.pod_uid = "uid".into();
    let root = server.share(&ours);

    let long = [60 * SECOND; 2];
    assert_eq!(server.entry(root, "file").unwrap().lives, long);
    let absent = server.entry(root, "absent").unwrap();
    assert_eq!((absent.node, absent.lives[0]), (0, long[0]));
    let (file, opened) = server.make(root, "absent").unwrap();
    assert_eq!(file.lives, long);
    assert_eq!(opened.flags & 1 << 3, 0, "of listings alone");
    // What was read stays, listings too.
    let keep_cache = 1 << 1;
    for (opcode, node, flags) in [
        (OPEN, file.node, keep_cache),
        (OPENDIR, root, keep_cache | 1 << 3),
    ] {
        let opened = server.opened(opcode, node, libc::O_RDONLY).unwrap();
        assert_eq!(opened.flags & flags, flags, "{opcode}");
    }
    // What another makes of a file all the same is seen when it is opened.
    let told = server.entry(root, "file").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    fs::write(ours.join("file"), "another").unwrap();
    let opened = server.opened(OPEN, told.node, libc::O_RDONLY);
    assert_eq!(opened.unwrap_err(), libc::ESTALE);
    assert_eq!(server.entry(root, "file").unwrap().size, 7);
    let opened = server.opened(OPEN, told.node, libc::O_RDONLY).unwrap();
    assert_eq!(opened.flags & keep_cache, 0);

    // A second pod gets the volume.
    fs::create_dir_all(&theirs).unwrap();
    mount_bind(&ours, &theirs).unwrap();
    let begin = std::time::Instant::now();
    while server.entry(root, "file").unwrap().lives != [SECOND; 2] {
        assert!(begin.elapsed().as_secs() < 30, "it is believed still");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(server.entry(root, "nothing"), Err(libc::ENOENT));
    let attributes = server.call(GETATTR, file.node, &[0; 16]).unwrap();
    assert_eq!(attributes[..8], 1_u64.to_le_bytes());
    drop(server);
    unmount(&theirs, UnmountFlags::DETACH).unwrap();
    unmount(&ours, UnmountFlags::DETACH).unwrap();
}

#[test]
fn only_what_may_be_of_another_machine_is_flushed_when_it_is_closed() {
    let host = host(true);
    fs::write(host.path().join("file"), "").unwrap();
    let no_flush = 1 << 5;
    // What the host mounts later below a slave may be of any kind.
    for (propagation, flushed) in [(Propagation::Private, false), (Propagation::Slave, true)] {
        let mut server = Server::start();
        let root = server.share_as(host.path(), Access::ReadWrite, propagation);
        let node = server.lookup(root, "file").unwrap();
        let mut flushes = |flags| {
            let opened = server.opened(OPEN, node, flags).unwrap();
            opened.flags & no_flush == 0
        };
        assert_eq!(flushes(libc::O_RDWR), flushed, "{propagation:?}");
        assert!(!flushes(libc::O_RDONLY));
        let name = format!("{propagation:?}");
        let (_, opened) = server.make(root, &name).unwrap();
        assert_eq!(opened.flags & no_flush == 0, flushed, "{propagation:?}");
    }
}

#[test]
fn who_opens_a_file_sees_what_the_host_made_of_it() {
    let host = host(false);
    let path = host.path().join("file");
    fs::write(&path, "old").unwrap();
    let mut server = Server::start();
    let root = server.share(host.path());
    let stale = Err(libc::ESTALE);
    let node = server.lookup(root, "file").unwrap();
    let read = |server: &mut Server| server.open(OPEN, node, libc::O_RDONLY);
    read(&mut server).unwrap();
    // For a moment, who looked is who opens.
    let wait = || std::thread::sleep(std::time::Duration::from_millis(30));
    wait();
    // The guest believes in three bytes, and is to ask.
    fs::write(&path, "new and longer").unwrap();
    assert_eq!(read(&mut server), stale);
    let entry = server.entry(root, "file").unwrap();
    assert_eq!((entry.node, entry.size), (node, 14));
    read(&mut server).unwrap();
    // Who comes back is not refused again, though the host changed it once more.
    wait();
    fs::write(&path, "newer").unwrap();
    assert_eq!(read(&mut server), stale);
    server.entry(root, "file").unwrap();
    wait();
    fs::write(&path, "newest").unwrap();
    let handle = read(&mut server).unwrap();
    assert_eq!(server.read(node, handle, 0, 99).unwrap(), b"newest");
    assert_eq!(read(&mut server), stale, "this one was not here before");

    // What the guest did itself is no news to it.
    let (node, handle) = server.create(root, "own", 0o100_600).unwrap();
    let read = |server: &mut Server| server.open(OPEN, node, libc::O_RDONLY);
    wait();
    server.write(node, handle, 0, b"by the guest").unwrap();
    read(&mut server).unwrap();
    let mut size = vec![0; 88];
    size[0] = 8;
    server.call(SETATTR, node, &size).unwrap();
    wait();
    read(&mut server).unwrap();
    let body = [&[1, 0, 0, 0, 0, 0, 0, 0][..], b"user.a\0x"].concat();
    server.call(SETXATTR, node, &body).unwrap();
    read(&mut server).unwrap();
    server.call(GETATTR, node, &[0; 16]).unwrap();
    wait();
    let flags = libc::O_WRONLY | libc::O_TRUNC;
    server.open(OPEN, node, flags).unwrap();
    read(&mut server).unwrap();

    // Another file in its place, and none.
    server.call(GETATTR, node, &[0; 16]).unwrap();
    fs::write(host.path().join("other"), "another").unwrap();
    fs::rename(host.path().join("other"), host.path().join("own")).unwrap();
    wait();
    assert_eq!(read(&mut server), stale);
    let other = server.entry(root, "own").unwrap();
    assert!(other.node != node && other.size == 7, "{other:?}");
    fs::remove_file(host.path().join("own")).unwrap();
    wait();
    assert_eq!(server.open(OPEN, other.node, libc::O_RDONLY), stale);
    assert_eq!(server.entry(root, "own"), Err(libc::ENOENT));
}

#[test]
fn what_the_host_deletes_is_let_go_of_while_the_guest_remembers_it() {
    let host = host(false);
    let disk = host.path().join("disk");
    fs::create_dir_all(&disk).unwrap();
    tmpfs(&disk);
    for name in ["a", "linked", "open", "share", "b (deleted)"] {
        fs::write(disk.join(name), vec![b'x'; 1 << 20]).unwrap();
    }
    fs::hard_link(disk.join("linked"), disk.join("link")).unwrap();
    fs::create_dir(disk.join("dir")).unwrap();
    symlink("a", disk.join("symlink")).unwrap();
    let mut server = Server::start();
    let way = |path| (path, Access::ReadWrite, Propagation::Private);
    let share = disk.join("share");
    server.add("o", &[way(disk.as_path()), way(share.as_path())]);
    let owner = server.lookup(ROOT, "o").unwrap();
    let root = server.lookup(owner, "0").unwrap();
    let mounted = server.lookup(owner, "1").unwrap();
    let names = ["a", "linked", "open", "b (deleted)", "dir", "symlink"];
    let nodes = names.map(|name| server.lookup(root, name).unwrap());
    let [a, linked, open, suffixed, dir, link] = nodes;
    server.lookup(root, "a").unwrap();
    let handle = server.open(OPEN, open, libc::O_RDWR).unwrap();
    for name in ["a", "linked", "open", "share", "symlink"] {
        fs::remove_file(disk.join(name)).unwrap();
    }
    fs::remove_dir(disk.join("dir")).unwrap();

    // The sweep comes by itself.
    let pages = |disk: &Path| rustix::fs::statvfs(disk).map(|fs| fs.f_blocks - fs.f_bfree);
    let before = pages(&disk).unwrap();
    let begin = std::time::Instant::now();
    while server.call(GETATTR, a, &[0; 16]) != Err(libc::ESTALE) {
        assert!(begin.elapsed().as_secs() < 30, "it is not let go of");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let begin = std::time::Instant::now();
    while server.call(GETATTR, link, &[0; 16]) != Err(libc::ESTALE) {
        assert!(begin.elapsed().as_secs() < 1, "in the same sweep");
    }
    assert!(pages(&disk).unwrap() + 200 < before, "the space is there");
    let stale = Err(libc::ESTALE);
    assert_eq!(server.open(OPEN, a, libc::O_RDONLY).map(drop), stale);
    assert_eq!(server.call(READLINK, link, &[]).map(drop), stale);
    for opcode in [SETATTR, GETXATTR] {
        let body = [&[0; 88][..], b"user.a\0"].concat();
        let at = if opcode == SETATTR { 0 } else { 80 };
        assert_eq!(server.call(opcode, a, &body[at..]).map(drop), stale);
    }
    // What is in use, has another name, is only called so, or is a share, is as it was.
    assert_eq!(server.read(open, handle, 0, 1).unwrap(), b"x");
    for node in [open, linked, suffixed, dir, mounted] {
        server.call(GETATTR, node, &[0; 16]).unwrap();
    }
    let handle = server.open(OPEN, mounted, libc::O_RDONLY).unwrap();
    assert_eq!(server.read(mounted, handle, 0, 1).unwrap(), b"x");
    // The guest forgets what it knew twice.
    server.forget(&[(a, 1), (a, 1)]);
    let begin = std::time::Instant::now();
    while server.call(GETATTR, a, &[0; 16]) != Err(libc::EBADF) {
        assert!(begin.elapsed().as_secs() < 10, "nobody knows it");
    }
}

#[test]
fn a_number_that_the_host_uses_again_is_another_file() {
    let host = host(false);
    // In an ext4, the next file gets the number of the last that was deleted.
    let disk = host.path().join("disk");
    ext4(&host.path().join("image"), &disk);
    let file = disk.join("file");
    fs::write(&file, "first").unwrap();
    let mut server = Server::start();
    let root = server.share(&disk);
    let first = server.entry(root, "file").unwrap();
    fs::remove_file(&file).unwrap();
    let begin = std::time::Instant::now();
    while server.call(GETATTR, first.node, &[0; 16]) != Err(libc::ESTALE) {
        assert!(begin.elapsed().as_secs() < 30, "it is not let go of");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    fs::write(&file, "second").unwrap();
    let second = server.entry(root, "file").unwrap();
    assert_eq!((second.node, second.size), (first.node, 6), "so it is");
    assert_eq!([first.generation, second.generation], [0, 1]);
    // The guest forgets the first.
    server.forget(&[(first.node, 1)]);
    assert_eq!(server.cat(root, "file").unwrap(), "second");
    assert_eq!(server.entry(root, "file").unwrap().generation, 1);
    drop(server);
    unmount(&disk, UnmountFlags::DETACH).unwrap();
}

#[test]
fn a_guest_keeps_what_it_has_of_a_file_that_did_not_change() {
    let host = host(false);
    let path = host.path().join("file");
    fs::write(&path, "old").unwrap();
    let times = fs::FileTimes::new().set_modified(fs::metadata(&path).unwrap().modified().unwrap());
    let mut server = Server::start();
    let root = server.share(host.path());
    let node = server.lookup(root, "file").unwrap();
    let mut keeps = |flags: i32| {
        let body = [(flags as u32).to_le_bytes(), [0; 4]].concat();
        let opened = server.call(OPEN, node, &body).unwrap();
        opened[8] & 1 << 1 != 0
    };
    // A file system's clock has ticks.
    let settle = || std::thread::sleep(std::time::Duration::from_millis(3100));
    assert_eq!([keeps(libc::O_RDONLY), keeps(libc::O_RDONLY)], [false; 2]);
    settle();
    assert!(!keeps(libc::O_RDONLY), "it was too new the last time");
    assert!(keeps(libc::O_RDWR));
    // As many bytes, and the same time of modification.
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(b"new", 0).unwrap();
    file.set_times(times).unwrap();
    settle();
    assert!(!keeps(libc::O_RDONLY));
    assert!(keeps(libc::O_RDONLY));
    assert!(!keeps(libc::O_WRONLY | libc::O_TRUNC));
    assert_eq!(fs::read(&path).unwrap(), b"");
}

#[test]
fn what_the_kernel_makes_when_it_is_read_is_read_whatever_its_size() {
    let host = host(false);
    fs::write(host.path().join("empty"), "").unwrap();
    let is_direct = |share: &Path, name: &str| {
        let mut server = Server::start();
        let root = server.share(share);
        let node = server.lookup(root, name).unwrap();
        let opened = server.call(OPEN, node, &[0; 8]).unwrap();
        let text = server.cat(root, name).unwrap();
        assert_eq!(text, fs::read_to_string(share.join(name)).unwrap());
        opened[8] & 1 != 0
    };
    assert!(is_direct(Path::new("/proc"), "version"));
    let why = "it may be mapped once it is not";
    assert!(!is_direct(host.path(), "empty"), "{why}");
}

#[test]
fn owners_meet_in_what_they_share_in_the_same_way() {
    let host = host(false);
    let dir = host.path().join("dir");
    fs::create_dir_all(dir.join("sub")).unwrap();
    fs::write(dir.join("f"), "x").unwrap();
    let mut server = Server::start();
    let writable = (dir.as_path(), Access::ReadWrite, Propagation::Private);
    let readonly = (dir.as_path(), Access::ReadOnly, Propagation::Private);
    let places = |added| match added {
        Response::Added { places, .. } => places,
        other => panic!("{other:?}"),
    };
    assert_eq!(places(server.add("a", &[writable])), ["a/0"]);
    let both = server.add("b", &[readonly, writable]);
    assert_eq!(places(both), ["b/0", "a/0"]);
    assert_eq!(places(server.add("c", &[writable])), ["a/0"]);
    assert_eq!(
        server.lookup(ROOT, "c"),
        Err(libc::ENOENT),
        "nothing of its own"
    );

    // It stays until the last of them is gone.
    let end = |owner: &str| Request::Remove {
        owner: owner.into(),
    };
    for owner in ["a", "a", "b"] {
        assert_eq!(server.ask(&end(owner)), Response::Ok);
    }
    let owners = vec!["c".to_owned()];
    let hello = server.ask(&Request::Hello { version: 1 });
    assert_eq!(hello, Response::Hello { version: 1, owners });
    assert_eq!(server.lookup(ROOT, "b"), Err(libc::ENOENT));
    let owner = server.lookup(ROOT, "a").unwrap();
    let root = server.lookup(owner, "0").unwrap();
    assert_eq!(server.cat(root, "f").unwrap(), "x");
    assert!(matches!(
        server.add("a", &[writable]),
        Response::Error {
            kind: ErrorKind::Invalid,
            ..
        }
    ));
    assert_eq!(server.ask(&end("c")), Response::Ok);
    assert_eq!(server.lookup(ROOT, "a"), Err(libc::ENOENT));
    let pid = server.process.id();
    let child = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let mounts = fs::read_to_string(format!("/proc/{}/mounts", child.trim())).unwrap();
    assert!(!mounts.contains("/a/0"), "{mounts}");

    // What is there now is what is shared: another directory, and other mounts.
    assert_eq!(places(server.add("a", &[writable])), ["a/0"]);
    tmpfs(&dir.join("sub"));
    assert_eq!(places(server.add("b", &[writable])), ["b/0"]);
    unmount(dir.join("sub"), UnmountFlags::empty()).unwrap();
    fs::rename(&dir, host.path().join("old")).unwrap();
    fs::create_dir(&dir).unwrap();
    assert_eq!(places(server.add("c", &[writable])), ["c/0"]);
    assert_eq!(places(server.add("d", &[writable])), ["c/0"]);
}

#[test]
fn an_owners_shares_end_with_all_that_the_guest_holds_of_them() {
    let host = host(false);
    let disk = host.path().join("disk");
    fs::create_dir(&disk).unwrap();
    tmpfs(&disk);
    fs::write(disk.join("f"), "x").unwrap();
    let mut server = Server::start();
    let root = server.share(&disk);
    let node = server.lookup(root, "f").unwrap();
    let handle = server.open(OPEN, node, libc::O_RDWR).unwrap();
    let owner = |name: &str| Request::Remove { owner: name.into() };
    let other = server.add(
        "p",
        &[(host.path(), Access::ReadOnly, Propagation::Private)],
    );
    assert!(matches!(other, Response::Added { .. }));
    let hello = server.ask(&Request::Hello { version: 1 });
    let owners = vec!["o".to_owned(), "p".to_owned()];
    assert_eq!(hello, Response::Hello { version: 1, owners });
    for _ in 0..2 {
        assert_eq!(server.ask(&owner("o")), Response::Ok);
    }
    assert_eq!(server.ask(&owner("unknown")), Response::Ok);
    assert!(server.read(node, handle, 0, 1).is_err());
    assert!(server.cat(root, "f").is_err());
    assert_eq!(server.lookup(ROOT, "o"), Err(libc::ENOENT));
    assert!(server.lookup(ROOT, "p").is_ok());
    // No descriptor holds the mount.
    let pid = server.process.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    for pid in [pid.to_string().as_str(), children.trim()] {
        for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
            let target = fs::read_link(fd.path()).unwrap_or_default();
            assert!(!target.ends_with("f"), "{}", target.display());
        }
    }
    // The name may be used again.
    assert_eq!(server.ask(&owner("p")), Response::Ok);
    let root = server.share(&disk);
    assert_eq!(server.cat(root, "f").unwrap(), "x");
}

#[test]
fn nothing_is_left_of_files_that_were_forgotten() {
    let host = host(false);
    // Where each new file has a number that no other had.
    tmpfs(host.path());
    let mut server = Server::start();
    let root = server.share(host.path());
    let file = [&0o100_600_u32.to_le_bytes()[..], &[0; 12], b"f\0"].concat();
    let mut churn = |count: u64| {
        for _ in 0..count {
            let entry = server.call(MKNOD, root, &file).unwrap();
            server.call(UNLINK, root, &text("f")).unwrap();
            server.forget(&[(u64::from_le_bytes(entry[..8].try_into().unwrap()), 1)]);
        }
        server.memory()
    };
    let before = churn(5_000);
    let after = churn(25_000);
    assert!(after < before + 512, "{before} KiB became {after} KiB");
}

#[test]
fn threads_have_no_memory_that_they_could_not_give_back() {
    let host = host(false);
    let mut server = Server::start();
    let root = server.share(host.path());
    for at in 0..100 {
        server.create(root, &format!("f{at}"), 0o100_600).unwrap();
    }
    // Of a thread's own arena, the C library reserves a heap of 64 MiB.
    let maps = fs::read_to_string(format!("/proc/{}/maps", server.serving())).unwrap();
    let reserved = maps.lines().filter(|line| {
        let (range, rest) = line.split_once(' ').unwrap();
        let (begin, end) = range.split_once('-').unwrap();
        let address = |text| u64::from_str_radix(text, 16).unwrap();
        rest.starts_with("---p") && address(end) - address(begin) > 32 << 20
    });
    assert_eq!(reserved.count(), 0, "{maps}");
}

#[test]
fn a_share_whose_files_are_never_forgotten_leaves_room_for_others() {
    let host = host(false);
    for name in ["a", "b"] {
        fs::create_dir(host.path().join(name)).unwrap();
        fs::write(host.path().join(name).join("file"), "x").unwrap();
    }
    let mut server = Server::start_with_descriptors(4096);
    let root = server.share(&host.path().join("a"));
    let other = host.path().join("b");
    server.add("p", &[(&other, Access::ReadWrite, Propagation::Private)]);
    let second = server.lookup(ROOT, "p").unwrap();
    let other = server.lookup(second, "0").unwrap();
    let fine = |server: &mut Server| {
        assert_eq!(server.cat(other, "file").unwrap(), "x");
        assert_eq!(server.names(other), ["file"]);
        let (node, handle) = server.create(other, "new", 0o100_600).unwrap();
        server.write(node, handle, 0, b"y").unwrap();
        server.release(RELEASE, node, handle).unwrap();
        server.call(UNLINK, other, &text("new")).unwrap();
    };

    // Each way to be told of a file.
    let directory = |at: u64| [&0o755_u64.to_le_bytes()[..], &text(&format!("d{at}"))].concat();
    let mut known = Vec::new();
    let mut living = 0;
    let refused = loop {
        match server.call(MKDIR, root, &directory(known.len() as u64)) {
            Ok(entry) => {
                let entry = Entry::read(&entry);
                known.push((entry.node, 1));
                living += entry.lives[0] / SECOND;
            }
            Err(error) => break error,
        }
        assert!(known.len() < 5000);
    };
    assert_eq!(refused, libc::ENFILE);
    assert!(known.len() > 1000, "{}", known.len());
    // A guest keeps what may be believed, and does not go on to keep more.
    let part = (4096 - 1024) / 4;
    assert!(
        (part - 10..=part).contains(&living),
        "{living} of {}",
        known.len()
    );
    let more = format!("d{}", known.len());
    assert!(
        !host.path().join("a").join(&more).exists(),
        "made, and not told"
    );
    let (node, _) = known[0];
    let enfile = Err(libc::ENFILE);
    let link = [&node.to_le_bytes()[..], b"link\0"].concat();
    assert_eq!(server.lookup(root, "file"), enfile);
    assert_eq!(
        server.create(root, "new", 0o100_600).map(drop),
        Err(libc::ENFILE)
    );
    for (opcode, body) in [
        (SYMLINK, &b"link\0to\0"[..]),
        (LINK, &link),
        (
            MKNOD,
            &[&libc::S_IFREG.to_le_bytes()[..], &[0; 12], b"n\0"].concat(),
        ),
    ] {
        assert_eq!(
            server.call(opcode, root, body).map(drop),
            Err(libc::ENFILE),
            "{opcode}"
        );
    }
    assert_eq!(server.open(OPENDIR, node, libc::O_RDONLY), enfile);
    // What is known goes on.
    server.call(GETATTR, node, &[0; 16]).unwrap();
    fine(&mut server);

    // Forgotten in part, and listed with all that there is to know.
    let some = known.split_off(known.len() - 200);
    server.forget(&some);
    // Another thread may be faster than that which forgets.
    let opened = (0..1000).find_map(|_| server.open(OPENDIR, root, libc::O_RDONLY).ok());
    let handle = opened.expect("there is room again");
    let mut at = 0;
    let refused = loop {
        match server.call(READDIRPLUS, root, &transfer(handle, at, 8192)) {
            Ok(entries) => at = last_offset(&entries).expect("the directory does not end here"),
            Err(error) => break error,
        }
    };
    assert_eq!(refused, libc::ENFILE);
    fine(&mut server);
    server.release(RELEASEDIR, root, handle).unwrap();

    // A new session holds nothing; then it is files that are never closed.
    server.init(0).unwrap();
    let owner = server.lookup(ROOT, "o").unwrap();
    let root = server.lookup(owner, "0").unwrap();
    let node = server.lookup(root, "file").unwrap();
    let mut open = Vec::new();
    let refused = loop {
        match server.open(OPEN, node, libc::O_RDONLY) {
            Ok(handle) => open.push(handle),
            Err(error) => break error,
        }
        assert!(open.len() < 5000);
    };
    assert_eq!(refused, libc::ENFILE);
    let second = server.lookup(ROOT, "p").unwrap();
    let other = server.lookup(second, "0").unwrap();
    assert_eq!(server.cat(other, "file").unwrap(), "x");
    for handle in open {
        server.release(RELEASE, node, handle).unwrap();
    }
    assert_eq!(server.cat_node(node).unwrap(), "x");
}

#[test]
fn forgetting_too_much_harms_nobody() {
    let host = host(false);
    fs::write(host.path().join("file"), "x").unwrap();
    let mut server = Server::start();
    let root = server.share(host.path());
    let before = server.descriptors();
    for _ in 0..20 {
        let node = server.lookup(root, "file").unwrap();
        let flood: Vec<_> = (0..4000).map(|at| (node + at, u64::MAX - at)).collect();
        server.forget(&flood);
        server.forget(&[(node, 0), (node, u64::MAX), (root, 0), (ROOT, 7)]);
        server.forget(&[(u64::MAX, 1)]);
    }
    let begin = std::time::Instant::now();
    while server.descriptors() > before {
        assert!(begin.elapsed().as_secs() < 10, "the file is held");
    }
    // Another thread may be faster than those that still forget.
    let read = (0..1000).find_map(|_| server.cat(root, "file").ok());
    assert_eq!(read.as_deref(), Some("x"));
}

#[test]
fn names_are_any_bytes_and_as_long_as_the_hosts() {
    let host = host(false);
    let mut server = Server::start();
    let root = server.share(host.path());
    let file = [libc::S_IFREG | 0o600, 0, 0, 0]
        .map(u32::to_le_bytes)
        .concat();
    let make = |name: &[u8]| [&file[..], name, &[0]].concat();
    let long = [0xff; 255];
    let made = server.call(MKNOD, root, &make(&long)).unwrap();
    let found = server.call(LOOKUP, root, &[&long[..], &[0]].concat());
    assert_eq!(Entry::read(&found.unwrap()), Entry::read(&made));
    let longer = server.call(MKNOD, root, &make(&[b'x'; 256]));
    assert_eq!(longer, Err(libc::ENAMETOOLONG));
    let names: Vec<_> = fs::read_dir(host.path()).unwrap().flatten().collect();
    let names: Vec<_> = names.iter().map(|entry| entry.file_name()).collect();
    assert_eq!(names[0].as_encoded_bytes(), long);
    // 100 directories in each other.
    let mut parent = root;
    for _ in 0..100 {
        let made = server.call(MKDIR, parent, b"\xed\x01\0\0\0\0\0\0d\0");
        parent = Entry::read(&made.unwrap()).node;
    }
    server.create(parent, "deep", 0o100_600).unwrap();
    assert!(host.path().join("d/".repeat(100)).join("deep").exists());
}

#[test]
fn a_file_that_can_not_be_opened_is_not_held() {
    let host = host(false);
    fs::create_dir(host.path().join("dir")).unwrap();
    fs::write(host.path().join("file"), "old").unwrap();
    let mut server = Server::start();
    let root = server.share(host.path());
    let before = server.descriptors();
    assert_eq!(server.create(root, "dir", 0o100_600), Err(libc::EISDIR));
    assert_eq!(server.descriptors(), before);
    // One that exists and can is what it was.
    let (node, handle) = server.create(root, "file", 0o100_600).unwrap();
    assert_eq!(server.read(node, handle, 0, 9).unwrap(), b"old");
    assert_eq!(server.lookup(root, "file"), Ok(node));
}

#[test]
fn many_owners_come_and_go() {
    let host = host(false);
    fs::write(host.path().join("f"), "x").unwrap();
    let mut server = Server::start();
    for _ in 0..300 {
        let root = server.share(host.path());
        assert_eq!(server.cat(root, "f").unwrap(), "x");
        let remove = Request::Remove { owner: "o".into() };
        assert_eq!(server.ask(&remove), Response::Ok);
    }
}

#[test]
fn malformed_messages_harm_nobody() {
    let host = host(false);
    fs::write(host.path().join("f"), "x").unwrap();
    let mut server = Server::start();
    let root = server.share(host.path());
    for owner in ["", "..", "a/b", "proc", "a b"] {
        let refused = server.add(owner, &[]);
        assert!(matches!(
            refused,
            Response::Error {
                kind: ErrorKind::Invalid,
                ..
            }
        ));
    }
    // Bodies of any length for every opcode: an answer or none, never an end.
    for opcode in (0..60).filter(|code| ![2, 36, 42, DESTROY].contains(code)) {
        for length in [0, 1, 8, 40, 200] {
            let _ = server.call(opcode, root, &vec![0xff; length]);
        }
    }
    // A session begins anew, whether the one before was ended or not.
    for end in [false, true] {
        if end {
            server.call(DESTROY, 0, &[]).unwrap();
        }
        server.init(0).unwrap();
        let owner = server.lookup(ROOT, "o").unwrap();
        let root = server.lookup(owner, "0").unwrap();
        assert_eq!(server.cat(root, "f").unwrap(), "x");
    }
}

#[test]
fn a_kernel_may_map_owners_and_then_says_whose_only_new_files_are() {
    let host = host(false);
    fs::write(host.path().join("f"), "text").unwrap();
    chown(host.path().join("f"), Some(1000), Some(1000)).unwrap();
    let mut server = Server::start();
    let upper = |answer: Vec<u8>| u32::from_le_bytes(answer[32..36].try_into().unwrap());
    let flags = |answer: &[u8]| u32::from_le_bytes(answer[12..16].try_into().unwrap());
    // FUSE_INIT_EXT and FUSE_ALLOW_IDMAP, if both are offered.
    let plain = server.init(!(1 << 8)).unwrap();
    assert_eq!((flags(&plain) & 1 << 30, upper(plain)), (0, 0));
    let mapping = server.init(u32::MAX).unwrap();
    assert_eq!(
        (flags(&mapping) & 1 << 30, upper(mapping)),
        (1 << 30, 1 << 8)
    );

    let root = server.share(host.path());
    (server.uid, server.gid) = (u32::MAX, u32::MAX);
    let node = server.lookup(root, "f").unwrap();
    let handle = server.open(OPEN, node, libc::O_RDWR).unwrap();
    server.write(node, handle, 0, b"TEXT").unwrap();
    assert_eq!(server.cat(root, "f").unwrap(), "TEXT");
    assert_eq!(server.names(root), ["f"]);
    assert_eq!(
        server.attributes(root, "f").unwrap(),
        (0o100_644, 1000, 1000)
    );
    // Mode, size, user and group.
    let mut body = vec![0; 88];
    body[..4].copy_from_slice(&(1_u32 | 2 | 4 | 8).to_le_bytes());
    body[16] = 2;
    body[68..72].copy_from_slice(&0o100_600_u32.to_le_bytes());
    body[76..80].copy_from_slice(&5_u32.to_le_bytes());
    body[80..84].copy_from_slice(&6_u32.to_le_bytes());
    server.call(SETATTR, node, &body).unwrap();
    let meta = fs::metadata(host.path().join("f")).unwrap();
    let found = (meta.uid(), meta.gid(), meta.mode(), meta.len());
    assert_eq!(found, (5, 6, 0o100_600, 2));
    let body = [&node.to_le_bytes()[..], b"hard\0"].concat();
    server.call(LINK, root, &body).unwrap();
    let body = [&root.to_le_bytes()[..], b"hard\0moved\0"].concat();
    server.call(RENAME, root, &body).unwrap();
    server.call(UNLINK, root, &text("f")).unwrap();
    assert_eq!(server.names(root), ["moved"]);

    let overflow = Err(libc::EOVERFLOW);
    let directory = [&0o755_u64.to_le_bytes()[..], b"d\0"].concat();
    for half in [false, true] {
        server.gid = if half { 0 } else { u32::MAX };
        assert_eq!(server.create(root, "new", 0o100_600).map(drop), overflow);
        assert_eq!(server.call(MKDIR, root, &directory).map(drop), overflow);
    }
    assert_eq!(server.names(root), ["moved"]);
    (server.uid, server.gid) = (0, 7);
    server.call(MKDIR, root, &directory).unwrap();
    let meta = fs::metadata(host.path().join("d")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (0, 7));
}

#[test]
fn it_ends_with_its_vm() {
    let host = host(false);
    let mut server = Server::start();
    server.share(host.path());
    let pid = server.process.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    server.vm = None;
    assert!(server.ended());
    assert!(!server.socket().exists());
    assert!(!Path::new("/proc").join(children.trim()).exists());
}

#[test]
fn the_server_ends_with_its_manager() {
    let _host = host(false);
    let mut server = Server::start();
    let pid = server.process.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let child = Path::new("/proc").join(children.trim());
    assert!(child.exists());
    server.process.kill().unwrap();
    server.process.wait().unwrap();
    let gone = (0..1000).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        !child.join("exe").exists()
    });
    assert!(gone);
}

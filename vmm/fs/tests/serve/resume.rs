//! A guest that goes on from a checkpoint, with another server.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hull_proto_vmm::fs::{Access, ErrorKind, Propagation, Response};

use crate::client::*;
use crate::host;

/// Directories of two pods, with the same files of other content.
fn pods() -> tempfile::TempDir {
    let host = host(false);
    for pod in ["old", "new"] {
        let at = host.path().join(pod);
        fs::create_dir_all(at.join("volume/sub/deep")).unwrap();
        for name in [
            "hosts",
            "volume/file",
            "volume/sub/deep/file",
            "volume/kept",
        ] {
            fs::write(at.join(name), format!("{pod} {name}")).unwrap();
        }
    }
    host
}

/// Shares a volume and a file of the old pod.
fn share(server: &mut Server, host: &Path) -> [u64; 2] {
    let (volume, hosts) = (host.join("old/volume"), host.join("old/hosts"));
    let shares = [volume, hosts];
    let shares = shares
        .each_ref()
        .map(|path| -> (&Path, _, _) { (path, Access::ReadWrite, Propagation::Private) });
    assert!(matches!(server.add("o", &shares), Response::Added { .. }));
    // Another container has the same.
    assert!(matches!(
        server.add("p", &shares[1..]),
        Response::Added { .. }
    ));
    let owner = server.lookup(ROOT, "o").unwrap();
    ["0", "1"].map(|name| server.lookup(owner, name).unwrap())
}

/// The path of the new pod.
fn of_new(path: &Path) -> PathBuf {
    path.to_str().unwrap().replace("/old/", "/new/").into()
}

#[test]
fn a_guest_goes_on_with_the_same_paths_of_another_pod() {
    let host = pods();
    let mut server = Server::start();
    let [volume, hosts] = share(&mut server, host.path());
    let file = server.lookup(volume, "file").unwrap();
    let handle = server
        .open(OPEN, file, libc::O_RDWR | libc::O_TRUNC)
        .unwrap();
    let list = server.open(OPENDIR, volume, libc::O_RDONLY).unwrap();
    let sub = server.lookup(volume, "sub").unwrap();
    let deep = server.lookup(sub, "deep").unwrap();
    let inner = server.entry(deep, "file").unwrap();
    // Only what is in it is known.
    server.forget(&[(sub, 1)]);
    let (made, at_made) = server.make(volume, "made").unwrap();
    fs::write(host.path().join("new/volume/made"), "new made").unwrap();
    let kept = server.lookup(volume, "kept").unwrap();
    let at_kept = server.open(OPEN, kept, libc::O_RDONLY).unwrap();
    fs::remove_file(host.path().join("old/volume/kept")).unwrap();
    let absent = server.lookup(deep, "file").unwrap();
    assert_eq!(absent, inner.node);
    // Of this the new pod has something else, under a number that the guest knows as another file's.
    let linked = host.path().join("new/volume/linked");
    fs::hard_link(host.path().join("old/volume/file"), linked).unwrap();

    let saved = server.save();
    let names: Vec<_> = saved.owners.iter().map(|owner| &*owner.name).collect();
    assert_eq!(names, ["o", "p"]);
    drop(server);
    let (mut server, answer) = Server::resume(&saved, of_new);
    // What was deleted is not counted, its open file is.
    assert_eq!(answer, Response::Resumed { lost: 1 });
    for _ in 0..2 {
        assert_eq!(server.cat_node(hosts).unwrap(), "new hosts");
        assert_eq!(
            server.cat_node(inner.node).unwrap(),
            "new volume/sub/deep/file"
        );
        assert_eq!(
            server.read(file, handle, 0, 99).unwrap(),
            b"new volume/file"
        );
    }
    assert_eq!(server.entry(deep, "file").unwrap(), inner);
    assert_eq!(server.cat(volume, "kept").unwrap(), "new volume/kept");
    for gone in [
        server.cat_node(kept).map(drop),
        server.read(kept, at_kept, 0, 9).map(drop),
    ] {
        assert_eq!(gone, Err(libc::ESTALE));
    }
    let other = server.lookup(volume, "linked").unwrap();
    assert_ne!(other, file);
    let at_other = server.open(OPEN, other, libc::O_RDONLY).unwrap();
    assert_ne!(at_other, handle);
    assert_eq!(server.read(other, at_other, 0, 99).unwrap(), b"");
    // Numbers are asked for in all ways.
    server.write(file, handle, 0, b"NEW").unwrap();
    server.write(made.node, at_made.handle, 0, b"NEW").unwrap();
    for (name, text) in [("file", "NEW volume/file"), ("made", "NEW made")] {
        let path = host.path().join("new/volume").join(name);
        assert_eq!(fs::read_to_string(path).unwrap(), text);
    }
    let listed = server
        .call(READDIR, volume, &transfer(list, 0, 8192))
        .unwrap();
    assert!(!listed.is_empty());
    assert_eq!(server.seek(file, handle, 0, libc::SEEK_HOLE), Ok(15));
    let renamed = [&deep.to_le_bytes()[..], &text("linked"), &text("moved")].concat();
    server.call(RENAME, volume, &renamed).unwrap();
    assert!(host.path().join("new/volume/sub/deep/moved").exists());
    assert_eq!(server.lookup(deep, "moved").unwrap(), other);
    let link = [&other.to_le_bytes()[..], &text("again")].concat();
    let entry = server.call(LINK, volume, &link).unwrap();
    assert_eq!(Entry::read(&entry).node, other);

    // And once more, from what is there now.
    let saved = server.save();
    drop(server);
    let (mut server, answer) = Server::resume(&saved, Path::to_owned);
    assert_eq!(answer, Response::Resumed { lost: 0 });
    assert_eq!(server.read(file, handle, 0, 3).unwrap(), b"NEW");
    assert_eq!(server.read(other, at_other, 0, 9).unwrap(), b"");
    assert_eq!(server.lookup(volume, "again").unwrap(), other);
    let new = server.open(OPEN, other, libc::O_RDONLY).unwrap();
    assert!(![handle, at_other].contains(&new));
    assert_eq!(server.cat_node(hosts).unwrap(), "new hosts");
}

#[test]
fn what_goes_on_is_let_go_of_as_what_was_there_from_the_start() {
    let host = pods();
    let mut server = Server::start();
    let [volume, _] = share(&mut server, host.path());
    let plain = server.descriptors();
    let mut files = Vec::new();
    for number in 0..50 {
        let name = format!("{number}");
        fs::write(host.path().join("old/volume").join(&name), "").unwrap();
        fs::write(host.path().join("new/volume").join(&name), "").unwrap();
        let node = server.lookup(volume, &name).unwrap();
        assert_eq!(server.lookup(volume, &name), Ok(node));
        files.push((node, server.open(OPEN, node, libc::O_RDONLY).unwrap()));
    }
    let (mut server, answer) = Server::resume(&server.save(), of_new);
    assert_eq!(answer, Response::Resumed { lost: 0 });
    assert!(server.descriptors() >= plain + 100);
    for (node, handle) in &files {
        assert_eq!(server.lookup(volume, "0"), Ok(files[0].0));
        server.release(RELEASE, *node, *handle).unwrap();
    }
    let all: Vec<_> = files.iter().map(|(node, _)| (*node, 2)).collect();
    server.forget(&all);
    server.forget(&[(files[0].0, 50)]);
    assert_eq!(server.lookup(files[1].0, "x"), Err(libc::ESTALE));
    // Nothing tells when that is done.
    let deadline = Instant::now() + Duration::from_secs(30);
    while server.descriptors() > plain + 2 {
        assert!(Instant::now() < deadline, "{}", server.descriptors());
        std::thread::sleep(Duration::from_millis(5));
    }
    // An owner's end is the same, too.
    let end = |owner: &str| hull_proto_vmm::fs::Request::Remove {
        owner: owner.into(),
    };
    assert_eq!(server.ask(&end("o")), Response::Ok);
    assert_eq!(server.ask(&end("p")), Response::Ok);
    assert!(server.lookup(volume, "1").is_err());
    // What comes later is as in any server.
    let later = server.share(&host.path().join("new/volume"));
    assert_eq!(server.cat(later, "file").unwrap(), "new volume/file");
    // A kernel that begins anew has the server's numbers.
    assert!(server.init(0).is_ok());
    let owner = server.lookup(ROOT, "o").unwrap();
    let again = server.lookup(owner, "0").unwrap();
    assert_eq!(server.cat(again, "file").unwrap(), "new volume/file");
}

#[test]
fn what_can_not_go_on_is_refused() {
    let host = pods();
    let mut server = Server::start();
    let [volume, hosts] = share(&mut server, host.path());
    let saved = server.save();
    let told = |answer| match answer {
        Response::Error { kind, message, .. } => (kind, message),
        other => panic!("{other:?}"),
    };
    let (_, absent) = Server::resume(&saved, |path| path.join("nowhere"));
    assert_eq!(told(absent).0, ErrorKind::NotFound);
    let (_, other) = Server::resume(&saved, |_| host.path().join("new/hosts"));
    let (_, message) = told(other);
    assert!(message.contains("o/0 is not what it was"), "{message}");
    for wrong in [
        &b""[..],
        b"\x02\0\0\0",
        &[0xff; 100],
        &saved.state[..saved.state.len() - 1],
    ] {
        let owners = saved.owners.clone();
        let state = wrong.to_vec();
        let (mut server, answer) = Server::resume(&Saved { owners, state }, of_new);
        assert_eq!(told(answer).0, ErrorKind::Internal);
        // It is one that was just started.
        assert!(server.init(0).is_ok());
    }
    // A share that is left out is stale, and the next has the number that it had.
    let mut part = Saved {
        owners: saved.owners.clone(),
        state: saved.state.clone(),
    };
    part.owners[0].shares.remove(0);
    let (mut less, answer) = Server::resume(&part, of_new);
    assert_eq!(answer, Response::Resumed { lost: 1 });
    assert_eq!(less.cat_node(volume), Err(libc::ESTALE));
    assert_eq!(less.cat_node(hosts).unwrap(), "new hosts");
    let (server, _) = Server::resume(&saved, of_new);
    assert!(
        matches!(server.resumed(&saved), Response::Error { .. }),
        "it has shares"
    );
}

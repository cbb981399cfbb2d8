//! What a share of the host is as a file system: suites of checks run in a container, over the host's
//! files and over the guest's own, and the results are compared.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
        net::UnixListener,
    },
    path::Path,
    process::Command,
};

use hull_proto_cri::v1::{
    Capability, ContainerConfig, LinuxContainerConfig, LinuxContainerSecurityContext, Mount,
    SecurityProfile, security_profile::ProfileType,
};

use crate::{
    harness::{Node, Pod},
    volumes::{HostDir, end, fails, host, idle, mount, readonly, run},
};

/// Of a file system that is checked, in bytes.
const SIZE: u64 = 1 << 30;

/// What a check came to: `ok`, `FAILED` or `skipped`, and why, where it is told.
type Results = BTreeMap<String, (String, String)>;

/// Where a share is not as a file system of the guest's own would be.
const OVER_FUSE: &[(&str, &str)] = &[
    (
        "a_listing_has_dot_and_dot_dot",
        "the file server leaves them out, as POSIX allows",
    ),
    (
        "renames_leave_whiteouts",
        "refused: a whiteout is a device node",
    ),
    (
        "files_without_names",
        "O_TMPFILE: the file server's protocol has no such request; programs make a name instead",
    ),
    (
        "writing_takes_marks_of_mandatory_locks_away",
        "the host judges by the file server's groups; Linux has had no such locks since 5.15",
    ),
    (
        "trusted_attributes_are_roots",
        "refused: on the host, they are for its root",
    ),
];
/// Where the guest's tmpfs is not as the host's file system is.
const OVER_TMPFS: &[(&str, &str)] = &[
    ("ranges_are_zeroed", "tmpfs has no FALLOC_FL_ZERO_RANGE"),
    ("programs_are_run", "/dev/shm is noexec"),
    ("a_running_program_is_not_written", "/dev/shm is noexec"),
];

/// pjdfstest's checks of files of all types are named after the type; a device node is refused.
fn makes_device(name: &str) -> bool {
    name.ends_with("::char") || name.ends_with("::block")
}

/// Errors that the guest's kernel finds by itself on its way along a path. To check them takes more
/// requests than all else (directories 30 deep, for one), and each takes its time in an emulated host.
fn is_the_kernels(name: &str) -> bool {
    const FOUND: [&str; 7] = [
        "::efault",
        "::eloop",
        "::enametoolong",
        "::enoent",
        "::enotdir",
        "::etxtbsy",
        "::exdev",
    ];
    FOUND.iter().any(|error| name.contains(error))
}

/// The suites' programs, and what they read.
fn tools(node: &Node) -> HostDir {
    let built = std::env::var_os("HULL_POSIX").expect("HULL_POSIX is set");
    let dir = HostDir::new(node, "tools");
    for program in ["pjdfstest", "fsx", "hull-posix"] {
        fs::copy(Path::new(&built).join(program), dir.path(program)).unwrap();
    }
    dir.write(
        "pjdfstest.toml",
        "[features]\nposix_fallocate = {}\nrename_ctime = {}\nutime_now = {}\nutimensat = {}\n\
         [settings]\nnaptime = 0.03\n\
         [dummy_auth]\nentries = [[\"one\", \"one\"], [\"two\", \"two\"]]\n",
    );
    dir.write(
        "fsx.toml",
        "[weights]\nclose_open = 1.0\ninvalidate = 1.0\nmapread = 10.0\nmapwrite = 10.0\n\
         read = 10.0\nwrite = 10.0\ntruncate = 5.0\nfsync = 1.0\nfdatasync = 1.0\n\
         posix_fallocate = 5.0\npunch_hole = 5.0\nsendfile = 5.0\nposix_fadvise = 1.0\n\
         copy_file_range = 5.0\n",
    );
    // Mappings of a file of some MiB alone.
    dir.write(
        "large.toml",
        "flen = 8388608\n[opsize]\nmax = 1048576\n[weights]\nmapread = 10.0\nmapwrite = 10.0\n\
         read = 1.0\nwrite = 1.0\ntruncate = 1.0\ninvalidate = 1.0\nclose_open = 1.0\n",
    );
    dir.write(
        "passwd",
        "root:x:0:0::/:/bin/sh\none:x:2001:2001::/:/bin/sh\ntwo:x:2002:2002::/:/bin/sh\n",
    );
    dir.write("group", "root:x:0:\none:x:2001:\ntwo:x:2002:\n");
    dir
}

/// A container with the tools, which may do all to files that root may.
async fn checker(node: &Node, pod: &Pod, tools: &HostDir, mut mounts: Vec<Mount>) -> String {
    mounts.push(readonly(mount("/tools", &tools.0), false));
    mounts.push(readonly(mount("/etc/passwd", &tools.path("passwd")), false));
    mounts.push(readonly(mount("/etc/group", &tools.path("group")), false));
    let config = ContainerConfig {
        mounts,
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                capabilities: Some(Capability {
                    add_capabilities: vec!["SYS_ADMIN".into(), "MKNOD".into()],
                    ..Default::default()
                }),
                // The default one denies mounts.
                apparmor: Some(SecurityProfile {
                    profile_type: ProfileType::Unconfined.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..node.script("checker", "sleep 100000")
    };
    let id = node.create(pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    id
}

/// Runs a suite in a directory; `other` is of another file system.
async fn suite(node: &Node, id: &str, script: &str) -> String {
    let done = node.exec(id, script).await;
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    let command = script.chars().take(100).collect::<String>();
    println!("{command}: exit code {}", done.exit_code);
    if done.exit_code != 0 {
        print!("{}", String::from_utf8_lossy(&done.stderr));
    }
    text
}

/// Runs pjdfstest, with these checks or all.
async fn pjdfstest(node: &Node, id: &str, at: &str, other: &str, names: &[&String]) -> Results {
    let tests = names
        .iter()
        .map(|name| format!(" pjdfstest::tests::{name}"));
    let tests: String = tests.collect();
    let exact = if names.is_empty() { "" } else { "--exact" };
    let script =
        format!("/tools/pjdfstest -c /tools/pjdfstest.toml {exact} -p {at} -s {other}{tests} 2>&1");
    pjdfstest_results(&suite(node, id, &script).await)
}

/// Of lines `ok NAME`, `FAILED NAME: WHY`.
fn own_results(text: &str) -> Results {
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines
        .map(|(outcome, rest)| {
            let (name, why) = rest.split_once(": ").unwrap_or((rest, ""));
            (name.to_owned(), (outcome.to_owned(), why.to_owned()))
        })
        .collect()
}

/// Of lines `NAME   OUTCOME`, each followed by indented ones that say why.
fn pjdfstest_results(text: &str) -> Results {
    let mut results = Results::new();
    let mut last = None;
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next(), words.next()) {
            _ if line.starts_with('\t') => {
                if let Some((_, why)) = last.as_ref().and_then(|name| results.get_mut(name)) {
                    why.push_str(line.trim());
                }
            }
            (Some(name), Some(outcome @ ("ok" | "FAILED" | "skipped")), None) => {
                last = Some(name.to_owned());
                results.insert(name.to_owned(), (outcome.to_owned(), String::new()));
            }
            _ => last = None,
        }
    }
    results
}

/// Fails unless all is as expected: the guest's own file system passes all, but for what is listed of
/// it, and so does the share. What is listed must not pass.
fn compare(
    guests: &Results,
    shared: &Results,
    over_tmpfs: impl Fn(&str) -> bool,
    over_fuse: impl Fn(&str) -> bool,
) {
    let names: BTreeSet<_> = guests.keys().chain(shared.keys()).collect();
    let mut surprises = Vec::new();
    let mut counts = BTreeMap::<_, u32>::new();
    for name in names {
        for (place, results, listed) in [
            ("tmpfs", guests, over_tmpfs(name)),
            ("share", shared, over_fuse(name)),
        ] {
            let Some((outcome, why)) = results.get(name) else {
                surprises.push(format!("{place}: {name} did not run"));
                continue;
            };
            *counts.entry((place, outcome.as_str())).or_default() += 1;
            // Skipped everywhere: it needs what no container has.
            let nowhere = outcome == "skipped"
                && guests.get(name).map(|(outcome, _)| outcome) == Some(outcome);
            match (outcome == "ok" || nowhere, listed) {
                (true, false) | (false, true) => {}
                (true, true) => surprises.push(format!("{place}: {name} passes, and is listed")),
                (false, false) => surprises.push(format!("{place}: {name} {outcome}: {why}")),
            }
        }
    }
    println!("{counts:?}");
    assert!(surprises.is_empty(), "{surprises:#?}");
}

fn listed(list: &[(&str, &str)], name: &str) -> bool {
    list.iter().any(|(known, _)| *known == name)
}

#[tokio::test]
async fn names_modes_and_owners_of_a_share_are_posix() {
    let node = Node::start().await;
    let tools = tools(&node);
    // What the guest believes for longest.
    let disk = HostDir::volume(&node, "posix", SIZE);
    let pod = node.pod("posix").await;
    let id = checker(&node, &pod, &tools, vec![mount("/data", &disk.0)]).await;

    let mut guests = pjdfstest(&node, &id, "/dev/shm", "/data", &[]).await;
    assert!(guests.len() >= 390, "{} checks ran", guests.len());
    guests.retain(|name, _| !is_the_kernels(name));
    let names: Vec<_> = guests.keys().collect();
    let shared = pjdfstest(&node, &id, "/data", "/dev/shm", &names).await;
    for (name, (_, why)) in shared.iter().filter(|(name, _)| makes_device(name)) {
        assert!(
            why.contains("EPERM") || why.contains("mknod"),
            "{name}: {why}"
        );
    }
    compare(&guests, &shared, |_| false, makes_device);
    disk.unmount();
    end(node, pod).await;
}

#[tokio::test]
async fn content_locks_and_attributes_of_a_share_are_posix() {
    let node = Node::start().await;
    let tools = tools(&node);
    // Of the second, the guest believes for longer what it was told.
    let disks = [
        ("/data", HostDir::disk(&node, "disk", SIZE)),
        ("/volume", HostDir::volume(&node, "posix", SIZE)),
    ];
    let pod = node.pod("posix").await;
    let mounts = disks.iter().map(|(at, disk)| mount(at, &disk.0));
    let id = checker(&node, &pod, &tools, mounts.collect()).await;

    let own = |at, other| format!("mkdir {at}/own && /tools/hull-posix run {at}/own {other}");
    let guests = own_results(&suite(&node, &id, &own("/dev/shm", "/data")).await);
    assert!(guests.len() >= 70, "{} checks ran", guests.len());
    check_content(&node, &id, "/dev/shm").await;
    for (at, disk) in &disks {
        let shared = suite(&node, &id, &own(at, "/dev/shm")).await;
        compare(
            &guests,
            &own_results(&shared),
            |name| listed(OVER_TMPFS, name),
            |name| listed(OVER_FUSE, name),
        );
        check_content(&node, &id, at).await;

        // The host sees what the guest sees: names, modes, owners, times, content, attributes.
        let seen = run(&node, &id, &format!("/tools/hull-posix list {at}")).await;
        let mut list = Command::new(tools.path("hull-posix"));
        let there = list.arg("list").arg(&disk.0).output().unwrap();
        assert!(there.status.success());
        let there = String::from_utf8(there.stdout).unwrap();
        assert!(seen.lines().count() > 300, "{}", seen.lines().count());
        println!("{} files are the same", seen.lines().count());
        for (guest, host) in seen.lines().zip(there.lines()) {
            assert_eq!(guest, host);
        }
        assert_eq!(seen.lines().count(), there.lines().count());
        disk.unmount();
    }
    end(node, pod).await;
}

/// Writes, maps and cuts files at random, and compares what is in them.
async fn check_content(node: &Node, id: &str, at: &str) {
    let script = format!(
        "/tools/fsx -f /tools/fsx.toml -N 400 -S 7 -P /tmp {at}/small 2>&1 && \
         /tools/fsx -f /tools/large.toml -N 40 -S 8 -P /tmp {at}/large 2>&1"
    );
    let done = run(node, id, &script).await;
    assert_eq!(done.matches("A-OK").count(), 2, "{done}");
}

#[tokio::test]
async fn nothing_of_a_share_leads_to_the_host() {
    let node = Node::start().await;
    let dir = HostDir::new(&node, "data");
    let outside = HostDir::new(&node, "outside");
    outside.write("secret", "of the host\n");
    let secret = outside.path("secret");
    symlink(&secret, dir.path("absolute")).unwrap();
    symlink("../outside/secret", dir.path("up")).unwrap();
    symlink("../".repeat(30) + "etc/versions", dir.path("far")).unwrap();
    symlink("/etc/versions", dir.path("own")).unwrap();
    symlink("/proc/1/root", dir.path("root")).unwrap();
    symlink("/proc/self/fd", dir.path("fds")).unwrap();
    symlink(&outside.0, dir.path("directory")).unwrap();
    for (name, arguments) in [("null", "c 1 3"), ("mem", "c 1 1"), ("loop", "b 7 0")] {
        let path = dir.path(name);
        let arguments: Vec<_> = arguments.split(' ').collect();
        host(
            "mknod",
            &[&[path.to_str().unwrap()], &arguments[..]].concat(),
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    }
    let _socket = UnixListener::bind(dir.path("socket")).unwrap();
    host("mkfifo", &[dir.path("fifo").to_str().unwrap()]);

    let pod = node.pod("paths").await;
    let id = idle(&node, &pod, "main", vec![mount("/data", &dir.0)]).await;
    let own = run(&node, &id, "cat /etc/versions").await;
    assert!(own.contains("busybox"), "{own}");
    for link in ["own", "far"] {
        assert_eq!(run(&node, &id, &format!("cat /data/{link}")).await, own);
    }
    for link in ["absolute", "up", "directory/secret"] {
        let error = fails(&node, &id, &format!("cat /data/{link}")).await;
        assert!(error.contains("No such file"), "{link}: {error}");
    }
    // The guest's processes are the guest's, whoever made the link.
    fails(&node, &id, &format!("cat /data/root{}", secret.display())).await;
    run(&node, &id, "ls /data/fds/").await;
    // What is written through a link stays in the container, too.
    let through = "mkdir -p $(dirname $(readlink /data/absolute)) && echo guest > /data/absolute";
    run(&node, &id, through).await;
    assert_eq!(outside.read("secret"), "of the host\n");
    assert_eq!(run(&node, &id, "cat /data/absolute").await, "guest\n");

    // Device nodes, of the host and of the guest; a socket whose other end is on the host.
    for name in ["null", "mem", "loop"] {
        for script in [
            format!("cat /data/{name}"),
            format!("echo x > /data/{name}"),
        ] {
            let error = fails(&node, &id, &script).await;
            assert!(error.contains("denied"), "{script}: {error}");
        }
    }
    for kind in ["c 1 3", "b 7 0", "c 0 0"] {
        let error = fails(&node, &id, &format!("mknod /data/made {kind}")).await;
        assert!(error.contains("not permitted"), "{error}");
    }
    // Made elsewhere, it does not move in either.
    let moved = "mknod /made c 1 3 && mv /made /data/made";
    fails(&node, &id, moved).await;
    assert!(!dir.path("made").exists());
    // A pipe of the host's is one of the guest's, with both ends there.
    let said = "(echo through > /data/fifo &); cat /data/fifo";
    assert_eq!(run(&node, &id, said).await, "through\n");
    run(
        &node,
        &id,
        "rm -r /data/null /data/mem /data/loop /data/socket /data/fifo",
    )
    .await;
    for entry in fs::read_dir(&dir.0).unwrap() {
        let kind = entry.unwrap().file_type().unwrap();
        assert!(!kind.is_char_device() && !kind.is_block_device());
    }
    end(node, pod).await;
}

#[tokio::test]
async fn many_volumes_are_mounted_in_any_order() {
    const MANY: usize = 40;
    const FEW: usize = 10;
    let node = Node::start().await;
    let dir = HostDir::new(&node, "volumes");
    let pod = node.pod("many").await;
    let mut mounts = Vec::new();
    for number in 0..MANY {
        let name = format!("v{number}");
        fs::create_dir(dir.path(&name)).unwrap();
        dir.write(&format!("{name}/is"), &name);
        mounts.push(mount(&format!("/v/{number}"), &dir.path(&name)));
    }
    // Parents after their children, and both of them by no order of names.
    for (at, name) in [
        ("/nest/b/c/d", "v3"),
        ("/nest/b", "v1"),
        ("/nest/b/c", "v2"),
        ("/nest", "v0"),
        ("/nest/a", "v4"),
    ] {
        mounts.push(mount(at, &dir.path(name)));
    }
    // Single files: below a volume, in the image's directories, of which one is there.
    for (at, name) in [
        ("/nest/b/c/file", "v5/is"),
        ("/etc/replaced", "v6/is"),
        ("/etc/new.conf", "v7/is"),
        ("/deep/er/file", "v8/is"),
    ] {
        mounts.push(readonly(mount(at, &dir.path(name)), false));
    }
    let count = mounts.len();
    let many = idle(&node, &pod, "many", mounts.clone()).await;
    let few = idle(&node, &pod, "few", mounts[..FEW].to_vec()).await;
    let status = node.client.container_status(&many).await.unwrap();
    assert_eq!(status.mounts, mounts);

    let script = format!(
        "for i in $(seq 0 {}); do cat /v/$i/is; echo; done",
        MANY - 1
    );
    let expected: String = (0..MANY).map(|number| format!("v{number}\n")).collect();
    assert_eq!(run(&node, &many, &script).await, expected);
    let script = "cd /nest; for f in is b/is b/c/is b/c/d/is a/is b/c/file /etc/replaced \
                  /etc/new.conf /deep/er/file; do cat $f; echo; done";
    let expected = "v0\nv1\nv2\nv3\nv4\nv5\nv6\nv7\nv8\n";
    assert_eq!(run(&node, &many, script).await, expected);
    // Each is a mount of its own.
    let lines = "grep -c ' virtiofs ' /proc/self/mounts";
    assert_eq!(run(&node, &many, lines).await, format!("{count}\n"));
    assert_eq!(run(&node, &few, lines).await, format!("{FEW}\n"));

    // All are written, and meet in what both have.
    let script = format!(
        "for i in $(seq 0 {}); do echo many$i > /v/$i/made; done",
        MANY - 1
    );
    run(&node, &many, &script).await;
    for number in 0..MANY {
        assert_eq!(
            dir.read(&format!("v{number}/made")),
            format!("many{number}\n")
        );
    }
    let script = "cat /v/9/made; ls /v | wc -l";
    assert_eq!(run(&node, &few, script).await, "many9\n10\n");
    for script in ["echo x > /etc/replaced", "echo x > /nest/b/c/file"] {
        let error = fails(&node, &many, script).await;
        assert!(error.contains("Read-only file system"), "{error}");
    }
    // What is below one volume is not in it.
    assert!(!dir.path("v1/c/d").join("is").exists());
    assert_eq!(fs::metadata(dir.path("v1/c")).unwrap().nlink(), 2);

    // The first ends, the other keeps what it has.
    node.stop_container(&many, 0).await.unwrap();
    node.remove_container(&many).await.unwrap();
    let script = format!(
        "for i in $(seq 0 {}); do cat /v/$i/made; done | wc -l",
        FEW - 1
    );
    assert_eq!(run(&node, &few, &script).await, "10\n");
    let again = idle(&node, &pod, "again", mounts).await;
    assert_eq!(
        run(&node, &again, "cat /v/39/made /nest/b/c/d/made").await,
        "many39\nmany3\n"
    );
    end(node, pod).await;
}

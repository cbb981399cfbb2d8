//! Images, volumes and processes that attack what makes containers: the known holes of container
//! runtimes. That a container is refused is as good as that the attack has no effect; each probe
//! is shown to see the effect where there is one.

use std::{collections::BTreeSet, fs, os::unix::fs::symlink, path::Path};

use hull_proto_agent::{agent as proto, stream::StreamKind};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use crate::{
    agent_tests,
    harness::{Agent, container, container_with, context, exec_request, spec, unable},
};

fn app() -> Option<proto::User> {
    Some(proto::User {
        user: "app".to_owned(),
        ..Default::default()
    })
}

/// The mount on `destination`.
fn mount<'a>(spec: &'a mut Value, destination: &str) -> &'a mut Value {
    let mut mounts = spec["mounts"].as_array_mut().unwrap().iter_mut();
    mounts
        .find(|mount| mount["destination"] == destination)
        .unwrap()
}

fn bind(source: &Path, destination: &str) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind", "rw"]})
}

/// What a container's first process says on standard output; `None`: the container is refused.
/// The container is gone afterwards.
async fn said(agent: &Agent, request: &proto::CreateRequest) -> Option<String> {
    let id = &request.container_id;
    if let Err(refusal) = agent.client.create(context(), request).await {
        println!("{id}: {refusal}");
        return None;
    }
    let started = agent.start_container(id).await;
    let output = agent.output(StreamKind::Stdout, id, "").await;
    agent.delete(id).await;
    started.ok().map(|_| output)
}

/// Descriptors and what they lead to.
fn open_files(proc: &str) -> Vec<(String, String)> {
    let files = fs::read_dir(format!("{proc}/fd")).unwrap();
    let files = files.map(|file| file.unwrap());
    let named = files.filter_map(|file| {
        let target = fs::read_link(file.path()).ok()?;
        let name = file.file_name().into_string().unwrap();
        Some((name, target.to_string_lossy().into_owned()))
    });
    named.collect()
}

agent_tests! {
    async fn a_terminal_is_given_to_its_user_and_nothing_else_is(agent) {
        let own = "busybox stat -c '%u %a' $(busybox tty); echo opened > $(busybox tty)";
        let mut with_tty = spec(&["sh", "-c", own]);
        with_tty["process"]["terminal"] = json!(true);
        let mut request = container_with("c1", &with_tty);
        request.user = app().into();
        request.tty = true;
        assert_eq!(said(&agent, &request).await.unwrap(), "1000 620\r\nopened\r\n");

        let mut request = container("c2", "sleep 1000");
        request.user = app().into();
        agent.create(&request).await;
        agent.start_container("c2").await.unwrap();
        let exec = async |name: &str, script: &str| {
            let mut exec = exec_request("c2", name, script);
            exec.tty = true;
            agent.client.exec(context(), &exec).await.unwrap();
        };
        exec("own", own).await;
        assert_eq!(agent.output(StreamKind::Stdout, "c2", "own").await, "1000 620\r\nopened\r\n");
        // At once a file of root's is where its terminal was.
        for n in 0..12 {
            exec(&format!("e{n}"), "exec 0</etc/passwd; sleep 1000").await;
        }
        let (owner, _) = agent.exec_sync("c2", "owner", "busybox stat -c %u /etc/passwd").await;
        assert_eq!(owner, "0\n");
        agent.delete("c2").await;
        agent.assert_clean();
    }

    async fn a_process_is_out_of_reach_before_its_command(agent) {
        let shared = |id: &str, user: Option<proto::User>, capability: &str| {
            let mut able = spec(&["sleep", "1000"]);
            for set in ["bounding", "effective", "permitted"] {
                able["process"]["capabilities"][set].as_array_mut().unwrap().push(json!(capability));
            }
            let mut request = container_with(id, &able);
            request.pid = proto::PidNamespace::POD.into();
            request.user = user.into();
            request
        };
        let proc = |pid: u32| format!("/proc/{}/root/proc/{pid}", agent.init());
        for (waits, looks, user) in [("c1", "c2", app()), ("c3", "c4", None)] {
            let made = agent.create(&shared(waits, user.clone(), "CAP_CHOWN")).await;
            agent.create(&shared(looks, user, "CAP_CHOWN")).await;
            agent.start_container(looks).await.unwrap();
            let status = fs::read_to_string(proc(made.pid) + "/status").unwrap();
            let inner = status.lines().find_map(|l| l.strip_prefix("NSpid:")).unwrap();
            let inner = inner.split_whitespace().last().unwrap();
            let probe = format!("cd /proc/{inner}; for f in exe root cwd fd/0 ns/mnt; do busybox readlink $f; done; cat environ maps auxv | wc -c");
            let (seen, _) = agent.exec_sync(looks, "before", &probe).await;
            assert_eq!(seen, "0\n", "{waits}");
            // Nor has it anything of the agent's, beyond its streams.
            let own = open_files(&format!("/proc/{}", agent.init()));
            let own: BTreeSet<_> = own.into_iter().map(|(_, target)| target).collect();
            let shares: Vec<_> = open_files(&proc(made.pid)).into_iter()
                .filter(|(name, file)| own.contains(file) && !["0", "1", "2"].contains(&name.as_str()))
                .collect();
            assert!(shares.is_empty(), "{waits}: {shares:?}");
            agent.start_container(waits).await.unwrap();
            let (seen, _) = agent.exec_sync(looks, "after", &probe).await;
            assert!(seen.starts_with("/bin/busybox\n/\n/\n") && seen.lines().count() == 6, "{waits}: {seen}");
            assert!(!seen.ends_with("\n0\n"), "{waits}: {seen}");
        }
        // Who may trace others sees their roots; that of the pod's first process is no way to the guest's.
        agent.create(&shared("c5", None, "CAP_SYS_PTRACE")).await;
        agent.start_container("c5").await.unwrap();
        let (roots, _) = agent.exec_sync("c5", "e1", "for p in /proc/[0-9]*; do echo $p: $(ls $p/root/); done").await;
        assert!(roots.contains("home"), "{roots}");
        let first = roots.lines().find(|l| l.starts_with("/proc/1:")).unwrap();
        assert_eq!(first, "/proc/1: 0 1 2", "{roots}");
        for id in ["c1", "c2", "c3", "c4", "c5"] { agent.delete(id).await; }
        agent.assert_clean();
    }

    /// CVE-2019-5736: a container gets hold of the runtime's program, here of that of the pod's first
    /// process. Its file system is read-only, as it is in a guest.
    async fn the_agents_program_can_not_be_changed(agent) {
        let mut able = spec(&["sleep", "1000"]);
        for set in ["bounding", "effective", "permitted"] {
            able["process"]["capabilities"][set].as_array_mut().unwrap().push(json!("CAP_SYS_PTRACE"));
        }
        let mut request = container_with("c1", &able);
        request.pid = proto::PidNamespace::POD.into();
        agent.create(&request).await;
        agent.start_container("c1").await.unwrap();
        let changes = "chmod 777 $f || echo refused; echo x 2>/dev/null >>$f || echo refused; chmod 700 $f || echo refused";
        let script = format!("cat /proc/1/exe >/tmp/copy; head -c 4 /tmp/copy | tail -c 3; echo; f=/proc/1/exe; {changes}; f=/tmp/copy; {changes}");
        let (output, _) = agent.exec_sync("c1", "e1", &script).await;
        assert_eq!(output, "ELF\nrefused\nrefused\nrefused\n");
        agent.delete("c1").await;
        agent.assert_clean();
    }

    /// CVE-2025-27612, and CVE-2022-29162 before it. (The agent of these tests has inheritable
    /// capabilities, which one in a guest has not.)
    async fn capabilities_are_never_inherited(agent) {
        let own = fs::read_to_string(format!("/proc/{}/status", agent.init())).unwrap();
        assert!(!own.contains("CapInh:\t0000000000000000"), "{own}");
        for (id, user) in [("c1", None), ("c2", app())] {
            let mut request = container(id, "sleep 1000");
            request.user = user.into();
            agent.create(&request).await;
            agent.start_container(id).await.unwrap();
            let (first, _) = agent.exec_sync(id, "e1", "grep Cap /proc/1/status").await;
            let (exec, _) = agent.exec_sync(id, "e2", "grep Cap /proc/self/status").await;
            assert_eq!(first, exec, "{id}");
            for set in ["CapInh", "CapAmb"] {
                assert!(exec.contains(&format!("{set}:\t0000000000000000")), "{id}: {exec}");
            }
            agent.delete(id).await;
        }
    }

    /// CVE-2024-21626: a working directory that is a descriptor of the runtime's.
    async fn a_working_directory_is_in_the_container(agent) {
        // What only the agent's root has, from wherever in it.
        let probe = "d=.; for n in 1 2 3 4 5 6 7 8; do [ -e $d/run/hull-agent-test ] && echo outside; d=$d/..; done; true";
        let in_directory = |cwd: &str, script: &str| {
            let mut at = spec(&["sh", "-c", script]);
            at["process"]["cwd"] = json!(cwd);
            at
        };
        let mut outside = in_directory("/data/etc", probe);
        outside["mounts"].as_array_mut().unwrap().push(bind(Path::new("/"), "/data"));
        assert_eq!(said(&agent, &container_with("outside", &outside)).await.unwrap(), "outside\n");

        let waits = agent.create(&container("waits", "true")).await;
        let mut numbers: Vec<u32> = open_files(&format!("/proc/{}/root/proc/{}", agent.init(), waits.pid))
            .into_iter().map(|(name, _)| name.parse().unwrap()).collect();
        numbers.sort_unstable();
        let highest = numbers.last().unwrap() + 4;
        agent.delete("waits").await;
        for number in 3..=highest {
            let id = format!("c{number}");
            let request = container_with(&id, &in_directory(&format!("/proc/self/fd/{number}"), probe));
            if let Some(output) = said(&agent, &request).await {
                assert_eq!(output, "", "{number}");
            }
        }
        // A running container makes its working directory a link for the next exec.
        let links = "cd /; while read n; do rm -rf /tmp/cwd; ln -s /proc/self/fd/$n /tmp/cwd; echo; done";
        let mut request = container_with("late", &in_directory("/tmp/cwd", links));
        request.stdin = true;
        agent.create(&request).await;
        agent.start_container("late").await.unwrap();
        let mut stdin = agent.stream(StreamKind::Stdin, "late", "").await.unwrap();
        let (mut stdout, _) = agent.open_output(StreamKind::Stdout, "late", "", 0).await.unwrap();
        for number in 3..=highest {
            stdin.write_all(format!("{number}\n").as_bytes()).await.unwrap();
            assert_eq!(stdout.read_exact(1).await, b"\n");
            let attack = exec_request("late", &format!("e{number}"), probe);
            if agent.client.exec(context(), &attack).await.is_ok() {
                let output = agent.output(StreamKind::Stdout, "late", &format!("e{number}")).await;
                assert_eq!(output, "", "{number}");
            }
        }
        agent.delete("late").await;
        agent.assert_clean();
    }

    /// CVE-2025-31133 and CVE-2025-62161: what stands in for masked paths, /dev/null, is a link.
    /// CVE-2025-52565: a terminal's mount point, /dev/console, is a link.
    async fn devices_of_a_volume_are_not_believed(agent) {
        let extra = agent.dir.join("extra");
        fs::create_dir_all(extra.join("data")).unwrap();
        fs::write(extra.join("data/secret"), "secret\n").unwrap();
        agent.bind("extra", &extra).await;
        let volume = agent.dir.join("volume");
        fs::create_dir(&volume).unwrap();
        // What is made in a volume is there for the next container.
        let fresh = |name: &str| {
            let devices = volume.join(name);
            fs::create_dir_all(&devices).unwrap();
            devices
        };
        let with = |id: &str, script: &str, devices: Option<&Path>, masked: bool| {
            let mut wanted = spec(&["sh", "-c", script]);
            if let Some(devices) = devices {
                *mount(&mut wanted, "/dev") = bind(devices, "/dev");
            }
            if masked {
                wanted["linux"]["maskedPaths"] = json!(["/data/secret"]);
            }
            wanted["mounts"].as_array_mut().unwrap().push(bind(&volume, "/volume"));
            let mut request = container_with(id, &wanted);
            request.lower.push("extra".to_owned());
            request
        };
        let reads = "cat /data/secret | head -c 5";
        assert_eq!(said(&agent, &with("c1", reads, None, false)).await.unwrap(), "secre");
        assert_eq!(said(&agent, &with("c2", reads, None, true)).await.unwrap(), "");
        // A volume by itself does not keep a container from being.
        assert_eq!(said(&agent, &with("c3", reads, Some(&fresh("plain")), true)).await.unwrap(), "");
        for (n, target) in ["/etc/passwd", "/proc/sys/kernel/core_pattern", "/dev/zero"].into_iter().enumerate() {
            let devices = fresh(&format!("link{n}"));
            symlink(target, devices.join("null")).unwrap();
            if let Some(output) = said(&agent, &with(&format!("null{n}"), reads, Some(&devices), true)).await {
                assert_eq!(output, "", "{target}");
            }
        }
        let devices = fresh("file");
        fs::write(devices.join("null"), "evil\n").unwrap();
        if let Some(output) = said(&agent, &with("c4", reads, Some(&devices), true)).await {
            assert_eq!(output, "");
        }

        let (devices, created) = (fresh("console"), volume.join("created"));
        symlink("/volume/created", devices.join("console")).unwrap();
        let mut with_tty = with("c5", "", Some(&devices), false);
        let mut wanted: Value = serde_json::from_slice(&with_tty.spec).unwrap();
        wanted["process"]["terminal"] = json!(true);
        wanted["process"]["args"][2] = json!("echo x; grep -c /volume/ /proc/self/mountinfo");
        with_tty.spec = wanted.to_string().into_bytes();
        with_tty.tty = true;
        if let Some(output) = said(&agent, &with_tty).await {
            assert_eq!(output, "x\r\n0\r\n");
        }
        assert!(!created.exists());
        // It does lead there.
        let mut leads = spec(&["sh", "-c", "echo x > /data/console; echo done"]);
        leads["mounts"].as_array_mut().unwrap().extend([bind(&devices, "/data"), bind(&volume, "/volume")]);
        assert_eq!(said(&agent, &container_with("c6", &leads)).await.unwrap(), "done\n");
        assert_eq!(fs::read_to_string(&created).unwrap(), "x\n");
        agent.assert_clean();
    }

    /// CVE-2025-52881 and CVE-2025-62596: what the runtime writes to /proc is led elsewhere.
    /// CVE-2025-54867: /proc and /sys of the image are links.
    async fn file_systems_of_the_kernel_are_not_led_elsewhere(agent) {
        let volume = agent.dir.join("volume");
        let (victim, fake) = (volume.join("victim"), volume.join("proc"));
        let files = ["sys/net/ipv4/ip_unprivileged_port_start", "self/attr/exec", "self/attr/apparmor/exec",
            "thread-self/attr/exec", "thread-self/attr/apparmor/exec", "self/setgroups", "self/oom_score_adj"];
        for file in files {
            let file = fake.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            symlink("/volume/victim", file).unwrap();
        }
        let with = |script: &str| {
            let mut wanted = spec(&["sh", "-c", script]);
            wanted["mounts"].as_array_mut().unwrap().push(bind(&volume, "/volume"));
            wanted["linux"].as_object_mut().unwrap().remove("readonlyPaths");
            wanted["linux"].as_object_mut().unwrap().remove("maskedPaths");
            wanted
        };
        let attacked = |id: &str, over: &str, how: &str| {
            let mut wanted = with("true");
            match over {
                "/proc" => *mount(&mut wanted, "/proc") = bind(&fake, "/proc"),
                _ => wanted["mounts"].as_array_mut().unwrap().push(bind(&fake.join(&over[6..]), over)),
            }
            match how {
                "" => {}
                "sysctl" => wanted["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "77"}),
                _ => wanted["process"]["apparmorProfile"] = json!("evil"),
            }
            container_with(id, &wanted)
        };
        fs::write(&victim, "untouched").unwrap();
        for (n, (over, how)) in [
            ("/proc", ""), ("/proc", "sysctl"), ("/proc", "label"),
            ("/proc/sys", ""), ("/proc/sys", "sysctl"), ("/proc/self", ""), ("/proc/self/attr", "label"),
        ].into_iter().enumerate() {
            said(&agent, &attacked(&format!("c{n}"), over, how)).await;
            assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched", "{over}: {how}");
        }
        let leads = with("echo touched > /volume/proc/self/attr/exec");
        said(&agent, &container_with("leads", &leads)).await.unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "touched\n");

        let bait = agent.dir.join("bait");
        fs::create_dir(&bait).unwrap();
        let targets = [Path::new("/data"), &bait, Path::new("../../../../../../../..")];
        for (n, (name, target)) in ["proc", "sys"].into_iter().flat_map(|name| targets.map(|t| (name, t))).enumerate() {
            let layer = agent.dir.join(format!("layer{n}"));
            fs::create_dir(&layer).unwrap();
            symlink(target, layer.join(name)).unwrap();
            agent.bind(&format!("layer{n}"), &layer).await;
            let script = format!("[ -d /{name} ] && [ ! -L /{name} ] && grep -c ' / /{name} ' /proc/self/mountinfo");
            let mut request = container(&format!("link{n}"), &script);
            request.lower.push(format!("layer{n}"));
            if let Some(output) = said(&agent, &request).await {
                assert_eq!(output, "1\n", "{name} is a link to {target:?}");
            }
        }
        let (plain, sound) = ("[ -d /sys ] && [ ! -L /sys ] && grep -c ' / /sys ' /proc/self/mountinfo", "1\n");
        assert_eq!(said(&agent, &container("plain", plain)).await.unwrap(), sound);
        agent.assert_clean();
    }
}

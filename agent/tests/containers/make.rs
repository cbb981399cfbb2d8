//! What a container is made of: mount points that the image lacks or has as links, environments,
//! filters.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown, symlink},
    time::Duration,
};

use hull_proto_agent::{agent::StatsRequest, stream::StreamKind};
use serde_json::json;

use crate::{
    agent_tests,
    harness::{Agent, LIMIT, container_with, context, spec, unable},
    message,
};

agent_tests! {
    async fn mounts_are_where_links_of_the_image_lead(agent) {
        let layer = agent.dir.join("links");
        fs::create_dir_all(layer.join("etc")).unwrap();
        fs::create_dir_all(layer.join("var")).unwrap();
        for (link, target) in [
            ("etc/localtime", "/usr/share/zoneinfo/Etc/UTC"),
            ("etc/resolv.conf", "../run/resolve/stub-resolv.conf"),
            ("var/run", "/run"),
            ("up", "../../../../../../outside"),
            ("real", "etc"),
        ] {
            symlink(target, layer.join(link)).unwrap();
        }
        agent.bind("links", &layer).await;
        let (file, dir) = (agent.dir.join("file"), agent.dir.join("volume"));
        fs::write(&file, "of the host\n").unwrap();
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("x"), "in the volume\n").unwrap();
        let mut targets = [
            ("/etc/localtime", &file), ("/etc/resolv.conf", &file), ("/var/run/app", &dir), ("/run", &dir),
            ("/up/here", &dir), ("/real/new/file", &file),
        ];
        let script = "cat /usr/share/zoneinfo/Etc/UTC /run/resolve/stub-resolv.conf /etc/localtime /etc/resolv.conf \
            /run/app/x /run/x /outside/here/x /etc/new/file 2>&1; ls /dev/fd/ >/dev/null && cat /dev/stdin </etc/localtime";
        for (id, reversed) in [("c1", false), ("c2", true)] {
            if reversed {
                targets.reverse();
            }
            let mut wanted = spec(&["sh", "-c", script]);
            wanted["mounts"].as_array_mut().unwrap().extend(targets.iter().map(|(at, source)| {
                json!({"destination": at, "type": "bind", "source": source, "options": ["rbind", "rprivate", "rw"]})
            }));
            let mut request = container_with(id, &wanted);
            request.lower.push("links".to_owned());
            agent.create(&request).await;
            agent.start_container(id).await.unwrap();
            let output = agent.output(StreamKind::Stdout, id, "").await;
            let found = output.lines().filter(|line| ["of the host", "in the volume"].contains(line)).count();
            // A volume at /run hides what was mounted below it before.
            assert!(found >= if reversed { 9 } else { 6 }, "{id}: {output}");
            agent.delete(id).await;
        }
        assert!(!agent.dir.join("outside").exists());
        agent.assert_clean();
    }

    async fn a_target_of_another_kind_is_told_in_one_line(agent) {
        let (file, dir) = (agent.dir.join("file"), agent.dir.join("volume"));
        fs::write(&file, "").unwrap();
        fs::create_dir(&dir).unwrap();
        for (at, source, why) in [
            ("/etc", &file, "mount a file on /etc: it is a directory"),
            ("/etc/passwd", &dir, "mount a directory on /etc/passwd: it, or something on the way, is a file"),
            ("/etc/passwd/x", &dir, "mount a directory on /etc/passwd/x: it, or something on the way, is a file"),
            ("/proc/1", &dir, "nothing can be mounted on /proc/1: it is the kernel's"),
            ("/etc/..", &dir, "nothing can be mounted on /etc/..: it is the container's root"),
        ] {
            let mut wanted = spec(&["true"]);
            wanted["mounts"].as_array_mut().unwrap().push(
                json!({"destination": at, "type": "bind", "source": source, "options": ["rbind"]}));
            let (_, text) = message(agent.client.create(context(), &container_with("c1", &wanted)).await);
            assert_eq!(text, format!("make the container's first process: {why}"));
        }
        let mut wanted = spec(&["true"]);
        wanted["mounts"].as_array_mut().unwrap().push(
            json!({"destination": "/x", "type": "tmpfs", "source": "tmpfs", "options": ["sise=1m"]}));
        let (_, text) = message(agent.client.create(context(), &container_with("c1", &wanted)).await);
        assert!(text.contains("mount tmpfs on /x: ") && text.contains("sise") && text.lines().count() == 1, "{text}");
        agent.assert_clean();
    }

    async fn what_keeps_a_process_from_being_made_is_told(agent) {
        let mut small = spec(&["true"]);
        small["linux"]["resources"]["memory"] = json!({"limit": 102_400, "swap": 102_400});
        let mut silent = spec(&["true"]);
        silent["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["exit"], "action": "SCMP_ACT_ALLOW"}]
        });
        for (wanted, why) in [(small, "for lack of memory"), (silent, "does its seccomp profile allow too little?")] {
            let (_, text) = message(agent.client.create(context(), &container_with("c1", &wanted)).await);
            assert!(text.starts_with("make the container's first process: ") && text.contains(why), "{text}");
            assert_eq!(text.lines().count(), 1);
        }
        agent.assert_clean();
    }

    async fn an_environment_is_kept_or_refused_by_the_entry(agent) {
        let mut wanted = spec(&["true"]);
        wanted["process"]["env"] = json!(["PATH=/bin", "=nameless"]);
        let (_, text) = message(agent.client.create(context(), &container_with("c1", &wanted)).await);
        assert_eq!(text, "environment: \"=nameless\" has no name, or a zero byte");
        let mut wanted = spec(&["env"]);
        wanted["process"]["env"] = json!(["PATH=/bin", "A=1", "B=x=y", "NO_VALUE", "", "A=2", "a b=c", "HOME=", "EMPTY="]);
        agent.create(&container_with("c1", &wanted)).await;
        agent.start_container("c1").await.unwrap();
        let output = agent.output(StreamKind::Stdout, "c1", "").await;
        let mut lines: Vec<_> = output.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["A=2", "B=x=y", "EMPTY=", "HOME=/root", "PATH=/bin", "a b=c"]);
        agent.delete("c1").await;
        agent.assert_clean();
    }

    /// OCI runtime specification, "Seccomp": `value` is the mask of SCMP_CMP_MASKED_EQ.
    async fn arguments_are_masked_before_they_are_compared(agent) {
        let mut filtered = spec(&["sh", "-c", "kill -0 $$ || echo refused; kill -CONT $$ && echo sent"]);
        filtered["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["kill"], "action": "SCMP_ACT_ERRNO",
                "args": [{"index": 1, "value": 255, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]}]
        });
        agent.create(&container_with("c1", &filtered)).await;
        agent.start_container("c1").await.unwrap();
        assert_eq!(agent.output(StreamKind::Stdout, "c1", "").await, "refused\nsent\n");
        agent.delete("c1").await;
        agent.assert_clean();
    }

    async fn what_nobody_does_here_is_refused(agent) {
        let mut hooks = spec(&["true"]);
        hooks["hooks"] = json!({"createRuntime": [{"path": "/bin/true"}]});
        let mut sysctls = spec(&["true"]);
        sysctls["linux"]["sysctl"] = json!({"net.core.somaxconn": "1"});
        let with = |of: &str, name: &str, value| {
            let mut wanted = spec(&["true"]);
            wanted[of][name] = value;
            wanted
        };
        let seccomp = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"});
        for (wanted, what) in [
            (hooks, "hooks"), (sysctls, "sysctls"),
            (with("process", "selinuxLabel", json!("label")), "SELinux"),
            (with("process", "scheduler", json!({"policy": "SCHED_BATCH"})), "scheduling"),
            (with("process", "ioPriority", json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0})), "I/O"),
            (with("linux", "personality", json!({"domain": "LINUX32"})), "personalities"),
            (with("linux", "intelRdt", json!({"closID": "x"})), "cache"),
            (with("linux", "timeOffsets", json!({"monotonic": {"secs": 1, "nanosecs": 0}})), "clocks"),
            (with("linux", "seccomp", seccomp), "listeners"),
        ] {
            let (_, text) = message(agent.client.create(context(), &container_with("c1", &wanted)).await);
            assert!(text.starts_with(&format!("make the container's first process: there are no {what}")), "{text}");
        }
        let limit = json!({"type": "RLIMIT_CORE", "soft": 0, "hard": 0});
        for (wanted, why) in [
            (with("process", "rlimits", json!([limit, limit])), "make the container's first process: RLIMIT_CORE is set twice"),
            (with("linux", "namespaces", json!([{"type": "pid"}, {"type": "mount"}, {"type": "pid"}])),
                "the OCI specification has two namespaces of the type pid"),
            // That of the machine is not the agent's to use.
            (with("process", "apparmorProfile", json!("p")),
                "AppArmor is off in the guest's kernel: there is no profile p"),
        ] {
            let (_, text) = message(agent.client.create(context(), &container_with("c1", &wanted)).await);
            assert_eq!(text, why);
        }
        agent.assert_clean();
    }

    async fn volumes_of_an_image_are_the_containers_own(agent) {
        let layer = agent.dir.join("declaring");
        for dir in ["data/d", "run", "etc", "covered", "links"] {
            fs::create_dir_all(layer.join(dir)).unwrap();
        }
        for (file, text) in [("data/seed", "seed\n"), ("data/d/file", ""), ("covered/image", ""), ("file", "")] {
            fs::write(layer.join(file), text).unwrap();
        }
        for (path, mode) in [("data", 0o1750), ("data/d/file", 0o4711)] {
            chown(layer.join(path), Some(1000), Some(2000)).unwrap();
            fs::set_permissions(layer.join(path), fs::Permissions::from_mode(mode)).unwrap();
        }
        for (link, target) in [
            ("links/lost", "/far/away"), ("links/run", "/run"), ("links/up", "../../../../data"), ("links/top", "/"),
        ] {
            symlink(target, layer.join(link)).unwrap();
        }
        agent.bind("declaring", &layer).await;
        let volume = agent.dir.join("volume");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("of-the-pod"), "").unwrap();
        let with = |id: &str, script: &str, volumes: &[&str]| {
            let mut wanted = spec(&["sh", "-c", script]);
            wanted["root"]["readonly"] = json!(true);
            wanted["mounts"].as_array_mut().unwrap().push(
                json!({"destination": "/covered", "type": "bind", "source": volume, "options": ["rbind", "rprivate"]}));
            let mut request = container_with(id, &wanted);
            request.lower.push("declaring".to_owned());
            request.volumes = volumes.iter().map(|path| (*path).to_owned()).collect();
            request
        };
        let script = "touch /x 2>/dev/null || echo read-only; cat /data/seed; echo x >/data/new; ls /data /covered /run
            stat -c '%n %u:%g %a' /data /data/d/file /new/vol /far/away; touch /new/vol/x /far/away/x /run/app/x
            for at in / /data; do grep \" $at \" /proc/self/mounts | cut -d ' ' -f 3; done; echo end; dd if=/dev/zero of=/data/big bs=64k count=32 2>/dev/null; sleep 1000";
        let volumes = ["/data", "/new/vol", "/links/lost", "/links/run/app", "/links/top", "/covered"];
        let mut says = Vec::new();
        for id in ["c1", "c2"] {
            agent.create(&with(id, script, &volumes)).await;
            agent.start_container(id).await.unwrap();
            let (mut output, _) = agent.open_output(StreamKind::Stdout, id, "", 0).await.unwrap();
            let mut said = String::new();
            while !said.contains("end\n") {
                said.push_str(&String::from_utf8_lossy(&output.read().await));
            }
            says.push(said);
        }
        // The second sees nothing of the first.
        assert_eq!(says[0], says[1]);
        let expected = "read-only\nseed\n/covered:\nof-the-pod\n\n/data:\nd\nnew\nseed\n\n/run:\napp\n\
            /data 1000:2000 1750\n/data/d/file 1000:2000 4711\n/new/vol 0:0 755\n/far/away 0:0 755\n";
        let (found, kinds) = says[0].split_at(expected.len());
        assert_eq!(found, expected);
        assert!(kinds.starts_with("overlay\n") && !kinds.contains("\noverlay\n"), "{kinds}");
        // What it writes there is its own.
        let counted = async {
            loop {
                let stats = agent.client.stats(context(), &StatsRequest::default()).await.unwrap();
                let of = stats.containers.iter().find(|stats| stats.container_id == "c1").unwrap();
                if of.writable.used_bytes >= 2 << 20 {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(LIMIT, counted).await.unwrap();
        for id in ["c1", "c2"] {
            agent.delete(id).await;
        }
        for (path, why) in [
            ("/file", "the image's volume /file is no directory in the image"),
            ("/file/x", "the image's volume /file/x is no directory in the image"),
        ] {
            let (code, text) = message(agent.client.create(context(), &with("c1", "true", &["/data", path])).await);
            assert_eq!((code, text.as_str()), (ttrpc::Code::INVALID_ARGUMENT, why));
        }
        assert_eq!(fs::read_dir(layer.join("data")).unwrap().count(), 2);
        agent.assert_clean();
    }

    /// OCI runtime specification, "Process", "Default Devices", "Dev symbolic links", "Masked Paths".
    async fn a_process_has_what_its_specification_says(agent) {
        let script = "ulimit -Sc; ulimit -Hc; ulimit -Sn; ulimit -Hn; umask; cat /proc/self/oom_score_adj
            for name in null zero full random urandom tty; do stat -c '%n %F %t:%T %a %u:%g' /dev/$name; done
            for name in fd stdin stdout stderr ptmx; do ls -l /dev/$name | tr -s ' ' | cut -d ' ' -f 9-; done
            cat /proc/kcore | wc -c; ls -A /sys/firmware | wc -l; (echo 1 >/proc/sys/kernel/printk) 2>/dev/null || echo read-only
            grep ' /relative/to/root ' /proc/self/mounts | cut -d ' ' -f 3,4 | cut -d , -f 1-4; cat /proc/self/cgroup";
        let mut wanted = spec(&["sh", "-c", script]);
        wanted["process"]["rlimits"] = json!([
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 512}, {"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}]);
        wanted["process"]["user"]["umask"] = json!(0o027);
        wanted["process"]["oomScoreAdj"] = json!(321);
        wanted["mounts"].as_array_mut().unwrap().push(json!({
            "destination": "relative/to/root", "type": "tmpfs", "source": "x", "options": ["nosuid", "nodev", "noexec", "size=64k"]}));
        agent.create(&container_with("c1", &wanted)).await;
        agent.start_container("c1").await.unwrap();
        let said = agent.output(StreamKind::Stdout, "c1", "").await;
        let node = |name, numbers| format!("/dev/{name} character special file {numbers} 666 0:0\n");
        let expected = [
            "0\n1\n77\n88\n0027\n321\n".to_owned(),
            node("null", "1:3"), node("zero", "1:5"), node("full", "1:7"), node("random", "1:8"),
            node("urandom", "1:9"), node("tty", "5:0"),
            "/dev/fd -> /proc/self/fd\n/dev/stdin -> /proc/self/fd/0\n/dev/stdout -> /proc/self/fd/1\n\
             /dev/stderr -> /proc/self/fd/2\n/dev/ptmx -> pts/ptmx\n".to_owned(),
            "0\n0\nread-only\ntmpfs rw,nosuid,nodev,noexec\n0::/\n".to_owned(),
        ];
        assert_eq!(said, expected.concat());
        agent.delete("c1").await;
        agent.assert_clean();
    }
}

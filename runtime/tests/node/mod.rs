//! The daemon as a service of its node, and what scripts see of it.

use std::{
    fs::Permissions,
    os::unix::{fs::PermissionsExt, net::UnixDatagram},
    process::{Command, Output},
    time::{Duration, Instant},
};

use nix::{sys::signal::Signal, unistd::Pid};

use super::Daemon;

fn hull(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hull"));
    command.args(arguments).env_remove("HULL_ASSETS");
    command.output().unwrap()
}

/// The next words to the service manager, none after a second.
fn next(manager: &UnixDatagram) -> Option<String> {
    let mut bytes = [0; 256];
    let length = manager.recv(&mut bytes).ok()?;
    Some(String::from_utf8(bytes[..length].to_vec()).unwrap())
}

#[tokio::test]
async fn the_service_manager_hears_of_a_daemon_that_is_ready_well_or_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("manager");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let variables = [
        ("NOTIFY_SOCKET", path.to_str().unwrap()),
        ("WATCHDOG_USEC", "400000"),
    ];
    let Some(daemon) = Daemon::start_under("", &variables).await else {
        return;
    };
    assert_eq!(next(&manager).as_deref(), Some("READY=1\n"));
    assert_eq!(next(&manager).as_deref(), Some("WATCHDOG=1\n"));
    assert_eq!(next(&manager).as_deref(), Some("WATCHDOG=1\n"));
    // Ten calls are missed in a second without a word.
    std::fs::remove_file(daemon.dir.path().join("state/hull.sock")).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while let Some(said) = next(&manager) {
        assert_eq!(said, "WATCHDOG=1\n");
        assert!(
            Instant::now() < deadline,
            "a daemon that nobody reaches is well"
        );
    }
    let pid = Pid::from_raw(daemon.child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
    let said = std::iter::repeat_with(|| next(&manager))
        .take(30)
        .flatten()
        .next();
    assert_eq!(said.as_deref(), Some("STOPPING=1\n"));
}

#[tokio::test]
async fn a_reset_ends_all_pods_and_only_when_it_is_meant() {
    let Some(daemon) = Daemon::start().await else {
        return;
    };
    let config = daemon.dir.path().join("hull.toml");
    let config = config.to_str().unwrap();
    daemon.run("one", None).await;
    daemon.run("two", None).await;
    let output = hull(&["--config", config, "reset"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let mut told: Vec<_> = output.stdout.split(|b| *b == b'\n').collect();
    told.sort_unstable();
    assert_eq!(told, [&b""[..], b"default/one", b"default/two"]);
    assert_eq!(daemon.vmms().len(), 2);
    let output = hull(&["--config", config, "reset", "--force"]);
    assert!(output.status.success(), "{output:?}");
    daemon.assert_nothing_left();
    assert!(hull(&["--config", config, "reset"]).status.success());
}

#[tokio::test]
async fn what_keeps_a_command_from_its_work_has_an_exit_code_and_one_line() {
    let Some(daemon) = Daemon::start().await else {
        return;
    };
    let dir = daemon.dir.path();
    let config = dir.join("hull.toml");
    let wrong = dir.join("wrong.toml");
    std::fs::write(&wrong, "[vm]\nmemory_mb = 1\n").unwrap();
    let elsewhere = dir.join("elsewhere");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    // Another daemon's directories, with one thing in them that can't be.
    let other = |name: &str, settings: &str| {
        let own = dir.join(name);
        std::fs::create_dir(&own).unwrap();
        let text = format!(
            "{settings}\nroot = \"{0}/root\"\nstate = \"{0}/state\"\ncni.conf_dir = \"{1}/net.d\"\n",
            own.display(),
            dir.display()
        );
        std::fs::write(own.join("hull.toml"), text).unwrap();
        own.join("hull.toml")
    };
    let streaming = other("s", &format!("streaming.address = \"{taken}\""));
    let metrics = other("m", &format!("metrics.address = \"{taken}\""));
    std::fs::write(dir.join("no.pem"), "no certificate\n").unwrap();
    let pem = dir.join("no.pem").display().to_string();
    let tls = other(
        "t",
        &format!("streaming.tls_cert = \"{pem}\"\nstreaming.tls_key = \"{pem}\""),
    );
    let records = other("r", "");
    std::fs::create_dir_all(dir.join("r/root/hull.redb")).unwrap();
    std::fs::set_permissions(dir.join("r/root"), Permissions::from_mode(0o700)).unwrap();
    for (file, arguments, code, said) in [
        (&streaming, &["serve"][..], 75, &*taken.to_string()),
        (&metrics, &["serve"], 75, &*taken.to_string()),
        (&tls, &["serve"], 78, "no.pem"),
        (&records, &["serve"], 74, "hull.redb"),
        (&config, &["serve"], 75, "another hull"),
        (&wrong, &["serve"], 78, "did you mean vm.memory_mib?"),
        (
            &wrong,
            &["config", "check"],
            78,
            "did you mean vm.memory_mib?",
        ),
        (
            &config,
            &["ps", "--state", elsewhere.to_str().unwrap()],
            69,
            "systemctl start hull",
        ),
        (
            &config,
            &["exec", "--state", elsewhere.to_str().unwrap(), "x", "id"],
            125,
            "no daemon",
        ),
        (&config, &["check"], 71, "this host is not ready"),
    ] {
        let mut all = vec!["--config", file.to_str().unwrap()];
        all.extend(arguments);
        let output = hull(&all);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{arguments:?}: {output:?}"
        );
        let text = String::from_utf8(output.stderr).unwrap();
        // A daemon that starts logs there too.
        let told: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("hull: "))
            .collect();
        assert!(matches!(told[..], [line] if line.contains(said)), "{text}");
        let logged = text
            .lines()
            .all(|line| line.starts_with("hull: ") || line.starts_with("20"));
        assert!(logged, "{text}");
    }
    // What a person would begin with.
    let default = hull(&["config", "default"]).stdout;
    std::fs::write(&wrong, default).unwrap();
    let output = hull(&["--config", wrong.to_str().unwrap(), "config", "check"]);
    assert!(output.status.success(), "{output:?}");
}

//! The daemon as a service of its node, and what scripts see of it.

use std::{
    os::unix::net::UnixDatagram,
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
    for (file, arguments, code, said) in [
        (&config, &["serve"][..], 75, "another hull"),
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
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.starts_with("hull: ") && text.contains(said), "{text}");
    }
}

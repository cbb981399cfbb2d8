//! Whether /dev/kvm can really run a guest: found out by running one.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{process::Command, sync::Mutex, time::Instant};

use super::{devices, finding::Finding};

/// The guest is tiny; only an emulated CPU needs more than a few milliseconds.
const LIMIT: Duration = Duration::from_secs(30);
/// A host that could not run VMs is asked again after this time.
const AGAIN: Duration = Duration::from_secs(30);

/// Whether this host can run VMs, for the daemon: success is remembered.
#[derive(Debug)]
pub(crate) struct Probe {
    vmm: PathBuf,
    needed: Vec<PathBuf>,
    last: Mutex<Option<(Instant, Finding)>>,
}

impl Probe {
    /// Nothing is run before it is asked for.
    pub(crate) fn new(vmm: PathBuf, needed: Vec<PathBuf>) -> Self {
        Self {
            vmm,
            needed,
            last: Mutex::new(None),
        }
    }

    /// Tells whether VMs can be run, or why not.
    pub(crate) async fn ready(&self) -> Result<(), String> {
        for path in &self.needed {
            if let Err(error) = std::fs::metadata(path) {
                return Err(format!("open {}: {error}", path.display()));
            }
        }
        let finding = match devices::kvm(Path::new("/dev/kvm")) {
            Finding::Good(_) => self.probed().await,
            bad @ Finding::Bad { .. } => bad,
        };
        match finding {
            Finding::Good(_) => Ok(()),
            Finding::Bad { detail, .. } => Err(detail),
        }
    }

    async fn probed(&self) -> Finding {
        let mut last = self.last.lock().await;
        if let Some((when, finding)) = &*last
            && (finding.is_good() || when.elapsed() < AGAIN)
        {
            return finding.clone();
        }
        let finding = run(&self.vmm).await;
        *last = Some((Instant::now(), finding.clone()));
        finding
    }
}

/// Runs `hull-vmm probe`, which prints in plain words why a guest can't run.
pub(super) async fn run(vmm: &Path) -> Finding {
    const ADVICE: &str = "use a machine with hardware virtualization; in a VM, switch on nested \
                          virtualization in its host";
    let output = Command::new(vmm)
        .arg("probe")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let started = Instant::now();
    match tokio::time::timeout(LIMIT, output).await {
        Ok(Ok(output)) if output.status.success() => Finding::Good(format!(
            "a small guest ran ({} ms)",
            started.elapsed().as_millis()
        )),
        Ok(Ok(output)) => {
            let mut text = String::from_utf8_lossy(&output.stderr).into_owned();
            text.push_str(&String::from_utf8_lossy(&output.stdout));
            let line = text.lines().map(str::trim).rfind(|line| !line.is_empty());
            let line = line.map_or_else(|| output.status.to_string(), ToOwned::to_owned);
            let detail = line.trim_start_matches("hull-vmm: ");
            Finding::bad(format!("a small guest did not run: {detail}"), ADVICE)
        }
        Ok(Err(error)) => Finding::bad(
            format!("run {}: {error}", vmm.display()),
            "install hull-vmm, or name its directory with --assets",
        ),
        Err(_) => Finding::bad(
            format!("a small guest did not end within {} s", LIMIT.as_secs()),
            ADVICE,
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn vmm(directory: &Path, script: &str) -> PathBuf {
        let path = directory.join("hull-vmm");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn the_vmms_words_are_passed_on() {
        let directory = tempfile::tempdir().unwrap();
        assert!(run(&vmm(directory.path(), "exit 0")).await.is_good());
        let script = "echo 'no hardware virtualization behind /dev/kvm' >&2; exit 1";
        let Finding::Bad { detail, .. } = run(&vmm(directory.path(), script)).await else {
            panic!("a probe that fails is good");
        };
        assert_eq!(
            detail,
            "a small guest did not run: no hardware virtualization behind /dev/kvm"
        );
        assert!(!run(Path::new("/nonexistent/hull-vmm")).await.is_good());
    }

    #[tokio::test]
    async fn missing_assets_make_the_node_not_ready() {
        let probe = Probe::new("/nonexistent/a".into(), vec!["/nonexistent/b".into()]);
        let error = probe.ready().await.unwrap_err();
        assert!(error.starts_with("open /nonexistent/b: "), "{error}");
    }
}

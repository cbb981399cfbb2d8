//! The processes that handle what registries and archives chose: what they can do, and what becomes
//! of those that die or are given up.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::faulty::{Answer, Faulty};
use common::worker;
use common::{Flavor, Packing, TestImage, layer, noise};
use hull_image::{ImageStore, PullError, PullProgress};
use tokio::sync::watch;

const ROOT: &str = "HULL_TEST_WORKERS_ROOT";
const IMAGE: &str = "HULL_TEST_WORKERS_IMAGE";

/// A store whose workers are told from all others by their program's name.
struct Place {
    directory: tempfile::TempDir,
    store: ImageStore,
}

/// A worker, by its pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pid(u32);

impl Place {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        symlink(worker::program(), directory.path().join("worker")).unwrap();
        Self::with(directory).await
    }

    /// With a worker for this job that is a script; the others are honest.
    async fn with_script(job: &str, script: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("worker");
        let honest = worker::program();
        let script = format!(
            "#!/bin/sh\ncase $2 in\n{job}) {script};;\n*) exec {} \"$@\";;\nesac\n",
            honest.display()
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Self::with(directory).await
    }

    async fn with(directory: tempfile::TempDir) -> Self {
        let mut config = worker::store(directory.path().join("images"));
        config.workers.program = directory.path().join("worker");
        let store = ImageStore::open(config).await.unwrap();
        Self { directory, store }
    }

    /// The workers that there are, by their jobs.
    fn workers(&self) -> BTreeMap<String, Pid> {
        workers_of(&self.directory.path().join("worker"))
    }

    /// Waits until a worker has this job and has locked itself in.
    async fn worker(&self, job: &str) -> Pid {
        until(|| {
            let pid = *self.workers().get(job)?;
            (pid.status("Seccomp")? == "2").then_some(pid)
        })
        .await
    }

    fn left(&self) -> usize {
        let root = self.directory.path().join("images");
        let count = |name: &str| fs::read_dir(root.join(name)).unwrap().count();
        ["layers", "images", "tmp"].map(count).iter().sum()
    }
}

fn workers_of(program: &Path) -> BTreeMap<String, Pid> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let Ok(pid) = name.parse() else { continue };
        let command = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        let mut words = command.split('\0');
        if words.next().map(Path::new) == Some(program) && words.next() == Some("image-worker") {
            found.insert(words.next().unwrap_or_default().to_owned(), Pid(pid));
        }
    }
    found
}

async fn until<T>(mut found: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "nothing came of it"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

impl Pid {
    fn signal(self, signal: &str) {
        let sent = Command::new("kill")
            .args([signal, &self.0.to_string()])
            .status();
        assert!(sent.unwrap().success());
    }

    fn path(self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.0.to_string()).join(name)
    }

    fn read(self, name: &str) -> Option<String> {
        fs::read_to_string(self.path(name)).ok()
    }

    fn status(self, field: &str) -> Option<String> {
        let status = self.read("status")?;
        let mut lines = status.lines();
        let value = lines.find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
        Some(value.split_whitespace().collect::<Vec<_>>().join(" "))
    }

    fn limit(self, name: &str) -> String {
        let limits = self.read("limits").unwrap();
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        let words: Vec<&str> = line[name.len()..].split_whitespace().collect();
        assert_eq!(words[0], words[1], "{line}");
        words[0].to_owned()
    }

    /// What kinds of files it has open.
    fn open(self) -> Vec<String> {
        let mut open: Vec<String> = fs::read_dir(self.path("fd"))
            .unwrap()
            .map(|fd| {
                let target = fs::read_link(fd.unwrap().path()).unwrap();
                let target = target.to_string_lossy();
                let kind = target.split(':').next().unwrap();
                kind.rsplit('/').next().unwrap().to_owned()
            })
            .collect();
        open.sort();
        open
    }

    /// Asserts that the worker has nothing but what its job needs; prints what it has.
    fn has_no_power(self, job: &str, files: &[&str]) {
        let id = "1879048192";
        let field = |name: &str| self.status(name).unwrap();
        let ids = [id; 4].join(" ");
        assert_eq!((field("Uid"), field("Gid")), (ids.clone(), ids));
        assert_eq!(field("Groups"), "");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(set), "0000000000000000", "{set}");
        }
        assert_eq!(field("NoNewPrivs"), "1");
        assert_eq!(field("Threads"), "1");
        assert_eq!(field("NSpid").split(' ').next_back(), Some("1"));
        for namespace in ["mnt", "pid", "net", "ipc", "uts"] {
            let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
            assert_ne!(of(&self.0.to_string()), of("self"), "{namespace}");
        }
        let mounts = self.read("mountinfo").unwrap();
        assert_eq!(mounts.lines().count(), 1, "{mounts}");
        assert!(mounts.contains(" / / ro,nosuid,nodev,noexec"), "{mounts}");
        assert_eq!(fs::read_dir(self.path("root")).unwrap().count(), 0);
        assert_eq!(self.read("environ").unwrap(), "");
        // A process that can be looked into has files of its own user there.
        assert_eq!(fs::metadata(self.path("maps")).unwrap().uid(), 0);
        let limits = ["Max open files", "Max processes", "Max core file size"];
        assert_eq!(limits.map(|limit| self.limit(limit)), ["16", "0", "0"]);
        let data: u64 = self.limit("Max data size").parse().unwrap();
        assert!(data <= 160 << 20, "{data}");
        let size: u64 = self.limit("Max file size").parse().unwrap();
        assert!(size < 1 << 40, "{size}");
        let mut expected = [&["null", "null", "socket", "socket"], files].concat();
        expected.sort_unstable();
        assert_eq!(self.open(), expected, "{job}");
        println!(
            "| {job} | user {id}, no groups | none | 1 | {} | mnt pid net ipc uts | empty, ro | {} | data {} MiB, files {size} B, 16 fds |",
            field("Seccomp"),
            expected.join(" "),
            data >> 20
        );
    }
}

fn image(packing: Packing, seed: u64) -> TestImage {
    TestImage::new(
        Flavor::Oci,
        &[(layer(&[("a", &noise(400_000, seed))]), packing)],
    )
}

/// Serves the image, its layer slowly: for several seconds.
fn serve_slowly(registry: &Faulty, image: &TestImage) -> String {
    registry.put("a/b", "t", image);
    let blob = &image.layers[0];
    let path = format!("/v2/a/b/blobs/{}", blob.digest());
    let slow = Answer::Slow(blob.bytes.clone(), 10_000, Duration::from_millis(100));
    registry.set(&path, vec![slow]);
    format!("{}/a/b:t", registry.address())
}

/// Ends when its sender does.
struct Waiting(mpsc::Receiver<Vec<u8>>, Vec<u8>);

impl Read for Waiting {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.1.is_empty() {
            self.1 = self.0.recv().unwrap_or_default();
        }
        let count = self.1.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.1[..count]);
        self.1.drain(..count);
        Ok(count)
    }
}

/// Takes nothing until its sender is gone.
struct Stuck(mpsc::Receiver<()>);

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.recv();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_have_nothing_but_their_job() {
    let (place, registry) = (Place::new().await, Faulty::start().await);
    let name = serve_slowly(&registry, &image(Packing::Zstd, 1));
    let pull = tokio::spawn({
        let (store, name) = (place.store.clone(), name.clone());
        async move { store.pull(&name, None).await }
    });
    println!(
        "| job | user | capabilities | no_new_privs | seccomp | namespaces | root | descriptors | limits |"
    );
    place
        .worker("inflate")
        .await
        .has_no_power("inflate", &["pipe", "pipe"]);
    let files = ["pipe", "data", "tree", "recipe"];
    place.worker("unpack").await.has_no_power("unpack", &files);
    pull.await.unwrap().unwrap();

    let (stuck, waits) = mpsc::channel();
    let export = tokio::spawn({
        let (store, names) = (place.store.clone(), vec![name]);
        async move { store.export(&names, Stuck(waits)).await }
    });
    let (more, archive) = mpsc::channel();
    more.send(vec![0x1f]).unwrap();
    let import = tokio::spawn({
        let store = place.store.clone();
        let archive = Waiting(archive, Vec::new());
        async move {
            store
                .import(archive, None, &watch::Sender::<PullProgress>::default())
                .await
        }
    });
    place
        .worker("spool")
        .await
        .has_no_power("spool", &["pipe", "archive"]);
    // The first bytes that are written are those of a file before the layers.
    stuck.send(()).unwrap();
    drop((stuck, more));
    import.await.unwrap().unwrap_err();
    export.await.unwrap().unwrap();
    assert_eq!(place.workers().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_fails_its_pull_alone_and_nothing_is_left() {
    let registry = Faulty::start().await;
    let place = Place::new().await;
    for (job, packing) in [
        ("inflate", Packing::Gzip),
        ("unpack", Packing::Zstd),
        ("unpack", Packing::Plain),
    ] {
        let name = serve_slowly(&registry, &image(packing, 2));
        let other = image(Packing::Gzip, 3);
        registry.put("other", "t", &other);
        let pull = tokio::spawn({
            let store = place.store.clone();
            async move { store.pull(&name, None).await }
        });
        let pid = place.worker(job).await;
        // Others go on meanwhile.
        let other = format!("{}/other:t", registry.address());
        place.store.pull(&other, None).await.unwrap();
        place.store.remove(&other).await.unwrap();
        pid.signal("-9");
        let error = pull.await.unwrap().unwrap_err();
        assert!(matches!(error, PullError::Worker { .. }), "{error:?}");
        assert!(error.to_string().contains("signal: 9 (SIGKILL)"), "{error}");
        assert_eq!((place.workers().len(), place.left()), (0, 0), "{job}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_is_given_up_ends_its_workers() {
    let (place, registry) = (Place::new().await, Faulty::start().await);
    let image = image(Packing::Gzip, 4);
    let name = serve_slowly(&registry, &image);
    // Stops the worker too: one that does nothing is ended as well.
    for stop in [false, true] {
        let pull = tokio::spawn({
            let (store, name) = (place.store.clone(), name.clone());
            async move { store.pull(&name, None).await }
        });
        let pid = place.worker("inflate").await;
        if stop {
            pid.signal("-STOP");
        }
        pull.abort();
        pull.await.unwrap_err();
        let start = Instant::now();
        until(|| (place.workers().is_empty() && place.left() == 0).then_some(())).await;
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    // The merge, which has nothing to wait for but its worker.
    let place = Place::with_script("merge", "exec sleep 1000").await;
    registry.put("a/b", "t", &image);
    let pull = tokio::spawn({
        let store = place.store.clone();
        async move { store.pull(&name, None).await }
    });
    until(|| (place.left() == 2).then_some(())).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    pull.abort();
    pull.await.unwrap_err();
    until(|| (place.left() == 0).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_worker_makes_up_fails_its_pull_and_nothing_is_left() {
    let registry = Faulty::start().await;
    let image = image(Packing::Gzip, 5);
    registry.put("a/b", "t", &image);
    let name = format!("{}/a/b:t", registry.address());
    for (job, script, reason) in [
        // A disk of 4096 bytes with the data of layer 5.
        (
            "merge",
            r"printf '\005\000\000\000\000\200\040\001\005' >&0",
            "another length",
        ),
        ("merge", "exit 1", "exit status: 1"),
        ("unpack", "exit 1", "exit status: 1"),
    ] {
        let place = Place::with_script(job, script).await;
        let error = place.store.pull(&name, None).await.unwrap_err();
        assert!(matches!(error, PullError::Worker { .. }), "{error:?}");
        assert!(error.to_string().contains(reason), "{job}: {error}");
        assert_eq!(place.left(), 0);
    }
    let place = Place::with_script("remake", "exit 1").await;
    place.store.pull(&name, None).await.unwrap();
    let error = place.store.export(&[name], io::sink()).await.unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("exit status: 1"), "{source}");
    // One file of a byte that the archive does not have.
    let lie = r"printf '\006\000\000\000\000\001\001\141\000\000\001' >&0";
    for (script, reason) in [
        (lie, "answered what can't be"),
        ("exit 1", "exit status: 1"),
    ] {
        let place = Place::with_script("spool", script).await;
        let archive = io::Cursor::new(layer(&[("a", b"x")]));
        let progress = watch::Sender::default();
        let error = place
            .store
            .import(archive, None, &progress)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("the archive: "), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
        assert_eq!(place.left(), 0);
    }
}

/// Not a test of its own: the process that the next test kills.
#[tokio::test(flavor = "multi_thread")]
async fn victim() {
    let (Ok(root), Ok(image)) = (std::env::var(ROOT), std::env::var(IMAGE)) else {
        return;
    };
    let root = PathBuf::from(root);
    let mut config = worker::store(root.join("images"));
    config.workers.program = root.join("worker");
    let store = ImageStore::open(config).await.unwrap();
    store.pull(&image, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_end_with_the_daemon() {
    let (place, registry) = (Place::new().await, Faulty::start().await);
    let name = serve_slowly(&registry, &image(Packing::Gzip, 6));
    // Those that are stopped don't see that their pipes are closed.
    for stop in [false, true] {
        let root = tempfile::tempdir().unwrap();
        let program = root.path().join("worker");
        symlink(worker::program(), &program).unwrap();
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "victim"])
            .env(ROOT, root.path())
            .env(IMAGE, &name)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let locked_in = |pid: &Pid| pid.status("Seccomp").is_some_and(|mode| mode == "2");
        let workers = until(|| {
            let workers = workers_of(&program);
            (workers.len() == 2 && workers.values().all(locked_in)).then_some(workers)
        })
        .await;
        if stop {
            for pid in workers.values() {
                pid.signal("-STOP");
            }
        }
        victim.kill().unwrap();
        victim.wait().unwrap();
        until(|| workers_of(&program).is_empty().then_some(())).await;
    }
    assert_eq!(place.left(), 0);
}

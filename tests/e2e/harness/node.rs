//! A node: daemon, registry, network and directories of one test.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    ops::Deref,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use hull_proto_cri::v1::{
    ContainerConfig, ContainerMetadata, ExecSyncResponse, PodSandboxConfig, PodSandboxMetadata,
    PodSandboxStatusRequest,
};
use hull_tests::client::{Client, Pod, image};
use tonic::Status;

use super::{
    leftovers::{self, Leftovers},
    registry::{BUSYBOX, Registry},
    wait::PATIENCE,
};

/// A node with a running daemon.
pub struct Node {
    /// The daemon; replaced when a test kills it.
    pub daemon: Daemon,
    /// A client connected to it.
    pub client: Client,
    /// The registry behind `registry.test`.
    _registry: Registry,
    /// Everything of this node.
    pub dir: PathBuf,
    before: Leftovers,
    /// Removes the directory at the end.
    _keep: tempfile::TempDir,
}

/// A `hull serve` process; killed when dropped.
pub struct Daemon {
    child: Child,
    config: PathBuf,
    socket: PathBuf,
    netns: Option<String>,
}

/// Where on the test's machine a node is.
#[derive(Debug, Clone)]
pub struct Place {
    /// The name of its network namespace; none: the machine's own.
    pub netns: Option<String>,
    /// The address at which it finds its registry.
    pub registry: IpAddr,
}

impl Default for Place {
    fn default() -> Self {
        Self {
            netns: None,
            registry: Ipv4Addr::LOCALHOST.into(),
        }
    }
}

impl Daemon {
    /// Starts one with the configuration file, in a network namespace; it writes its log beside
    /// the file.
    pub fn start(config: &Path, socket: &Path, netns: Option<&str>) -> Self {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(config.with_extension("log"))
            .unwrap();
        let mut command = match netns {
            // Not `ip netns exec`, which mounts another /sys.
            Some(name) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/run/netns/{name}")).arg("hull");
                command
            }
            None => Command::new("hull"),
        };
        let child = command
            .args(["--config", config.to_str().unwrap(), "serve"])
            // The file says where they are.
            .env_remove("HULL_ASSETS")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("hull is in PATH");
        Self {
            child,
            config: config.to_owned(),
            socket: socket.to_owned(),
            netns: netns.map(str::to_owned),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it (SIGKILL) and starts it again; returns a new client.
    pub async fn kill_and_restart(&mut self) -> Client {
        self.kill();
        self.restart().await
    }

    /// Starts it again after [`Daemon::kill`]; returns a new client.
    pub async fn restart(&mut self) -> Client {
        *self = Self::start(&self.config, &self.socket, self.netns.as_deref());
        self.connect().await
    }

    /// Kills it (SIGKILL).
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    async fn connect(&mut self) -> Client {
        let endpoint = self.socket.to_str().unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Client::connect_to_new(endpoint).await {
                Ok(client) => return client,
                Err(_) if Instant::now() < deadline && self.child.try_wait().unwrap().is_none() => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(error) => {
                    let log = fs::read_to_string(self.config.with_extension("log"));
                    panic!("{error:#}; its log: {}", log.unwrap_or_default());
                }
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Node {
    /// Starts a node with the default configuration.
    pub async fn start() -> Self {
        Self::start_with(|text| text).await
    }

    /// Starts a node whose configuration (TOML) `change` has edited.
    pub async fn start_with(change: impl FnOnce(String) -> String) -> Self {
        Self::start_at(Place::default(), change).await
    }

    /// As [`Node::start_with`], at a place of the machine's network.
    pub async fn start_at(place: Place, change: impl FnOnce(String) -> String) -> Self {
        let keep = tempfile::Builder::new()
            .prefix("hull-e2e-")
            .tempdir()
            .unwrap();
        let dir = keep.path().to_owned();
        let images = std::env::var_os("HULL_TEST_IMAGES").expect("HULL_TEST_IMAGES is set");
        let registry = Registry::start(Path::new(&images), &dir, place.registry);
        mirror(&dir, "registry.test", &registry.address.to_string());
        let net = dir.join("net.d");
        fs::create_dir(&net).unwrap();
        configure_network(&dir, NETWORK);
        fs::create_dir(dir.join("logs")).unwrap();
        let file = dir.join("hull.toml");
        fs::write(&file, change(config(&dir))).unwrap();

        let netns = place.netns.as_deref();
        let mut daemon = Daemon::start(&file, &dir.join("hull.sock"), netns);
        let client = daemon.connect().await;
        let before = Leftovers::list(&pod_dirs(&dir));
        Self {
            daemon,
            client,
            _registry: registry,
            dir,
            before,
            _keep: keep,
        }
    }

    /// Replaces the CNI configuration, in which LEASES stands for the directory of leases.
    pub fn configure_network(&self, conflist: &str) {
        configure_network(&self.dir, conflist);
    }

    /// The network namespace of a pod, as a file.
    pub fn netns(&self, pod: &Pod) -> PathBuf {
        self.dir
            .join("state/netns")
            .join(format!("hull-{}", pod.id))
    }

    /// Serves `host` from a registry at `address`.
    pub fn mirror(&self, host: &str, address: &str) {
        mirror(&self.dir, host, address);
    }

    /// The configuration of a sandbox.
    pub fn sandbox(&self, name: &str) -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.into(),
                uid: format!("{name}-uid"),
                namespace: "e2e".into(),
                attempt: 0,
            }),
            log_directory: self.dir.join("logs").to_string_lossy().into_owned(),
            ..Default::default()
        }
    }

    /// Pulls busybox and runs a sandbox.
    pub async fn pod(&self, name: &str) -> Pod {
        self.client.pull(BUSYBOX).await.unwrap();
        self.run_sandbox(self.sandbox(name)).await.unwrap()
    }

    /// The configuration of a busybox container that runs a shell script.
    pub fn script(&self, name: &str, script: &str) -> ContainerConfig {
        ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: Some(image(BUSYBOX)),
            command: ["/bin/sh", "-c", script].map(String::from).to_vec(),
            log_path: format!("{name}.log"),
            ..Default::default()
        }
    }

    /// Creates and starts a container that runs a shell script.
    pub async fn run_script(&self, pod: &Pod, name: &str, script: &str) -> String {
        let id = self.create(pod, self.script(name, script)).await.unwrap();
        self.start_container(&id).await.unwrap();
        id
    }

    /// Runs a shell script in a container by ExecSync.
    pub async fn exec(&self, id: &str, script: &str) -> ExecSyncResponse {
        self.exec_for(id, script, 0).await.unwrap()
    }

    /// As [`Node::exec`], for at most so many seconds.
    pub async fn exec_for(
        &self,
        id: &str,
        script: &str,
        timeout: i64,
    ) -> Result<ExecSyncResponse, Status> {
        let command = ["/bin/sh", "-c", script].map(String::from).to_vec();
        self.exec_sync(id, command, timeout).await
    }

    /// What a verbose status of a pod warns of.
    pub async fn warning(&self, pod: &Pod) -> String {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: true,
        };
        let mut client = self.client.runtime.clone();
        let answer = client.pod_sandbox_status(request).await.unwrap();
        let info: serde_json::Value =
            serde_json::from_str(&answer.into_inner().info["info"]).unwrap();
        info["vm"]["warning"].as_str().unwrap().to_owned()
    }

    /// The text of a container's log file, without times and tags.
    pub fn log(&self, name: &str) -> String {
        let file = self.dir.join("logs").join(format!("{name}.log"));
        let text = fs::read_to_string(file).unwrap();
        let lines = text.lines().map(|l| l.splitn(4, ' ').nth(3).unwrap());
        lines.map(|l| format!("{l}\n")).collect()
    }

    /// Waits until a container's log holds this text and no other.
    pub async fn wait_log(&self, name: &str, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.log(name) != text {
            assert!(Instant::now() < deadline, "log {:?}", self.log(name));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The process ids of this node's VMMs that run now.
    pub fn vmms(&self) -> Vec<u32> {
        let mut vmms = vmms(&self.dir);
        vmms.sort_unstable();
        vmms
    }

    /// Ends the test: nothing of any pod may be left while the daemon still runs, and
    /// nothing of the daemon after it.
    pub async fn finish(mut self) {
        self.assert_no_pod_left();
        self.daemon.kill();
        assert_eq!(self.vmms(), Vec::<u32>::new());
    }

    /// Fails unless the host is as it was before the first pod.
    pub fn assert_no_pod_left(&self) {
        leftovers::assert_none(&self.before, &pod_dirs(&self.dir));
        let leases = fs::read_dir(self.dir.join("leases/test"));
        let leases: Vec<_> = leases
            .into_iter()
            .flatten()
            .flatten()
            .filter(|l| {
                let name = l.file_name();
                name != "lock" && !name.to_string_lossy().starts_with("last_reserved")
            })
            .collect();
        assert!(leases.is_empty(), "addresses still leased: {leases:?}");
    }
}

/// Its client's calls.
impl Deref for Node {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

/// Also after a failure: what one test leaves must not disturb the next.
impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            print_complaints(&self.dir);
        }
        self.daemon.kill();
        for pid in vmms(&self.dir) {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        for name in fs::read_dir(self.dir.join("state/netns"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let _ = Command::new("umount").arg("-l").arg(name.path()).status();
        }
    }
}

/// Shows, for a test that failed, what the daemon warned of and what it did last.
fn print_complaints(dir: &Path) {
    const LAST: usize = 25;
    let log = fs::read_to_string(dir.join("hull.log")).unwrap_or_default();
    let lines: Vec<_> = log.lines().collect();
    let last = lines.len().saturating_sub(LAST);
    println!("the daemon's warnings and last {LAST} lines:");
    for (number, line) in lines.iter().enumerate() {
        if number >= last || line.contains(" WARN ") || line.contains(" ERROR ") {
            println!("  {line}");
        }
    }
}

/// The process ids of the VMMs of the node in `dir`.
fn vmms(dir: &Path) -> Vec<u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|process| {
            let command = fs::read_to_string(process.path().join("cmdline")).ok()?;
            let ours = command.contains("/vmm.sock\0") && command.contains(dir.to_str()?);
            ours.then(|| process.file_name().to_str()?.parse().ok())?
        })
        .collect()
}

/// The directories of a daemon that hold what belongs to pods.
fn pod_dirs(dir: &Path) -> Vec<PathBuf> {
    ["state/pods", "state/netns", "root/pods"]
        .map(|name| dir.join(name))
        .to_vec()
}

/// The configuration file of a node in `dir`.
fn config(dir: &Path) -> String {
    let assets = std::env::var("HULL_ASSETS").expect("HULL_ASSETS is set");
    let dir = dir.display();
    format!(
        "root = '{dir}/root'\nstate = '{dir}/state'\nlisten = '{dir}/hull.sock'\n\
         assets = '{assets}'\nlog = 'debug'\n\
         [cni]\nconf_dir = '{dir}/net.d'\nbin_dirs = ['/usr/lib/cni']\n\
         [registries]\nconfig_dir = '{dir}/certs.d'\n"
    )
}

const NETWORK: &str = r#"{"cniVersion":"1.0.0","name":"test","plugins":[
    {"type":"bridge","bridge":"hull-e2e0","isGateway":true,"ipMasq":false,
     "ipam":{"type":"host-local","dataDir":"LEASES",
             "ranges":[[{"subnet":"10.86.0.0/16"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
    {"type":"portmap","capabilities":{"portMappings":true}}]}"#;

fn configure_network(dir: &Path, conflist: &str) {
    let conflist = conflist.replace("LEASES", dir.join("leases").to_str().unwrap());
    fs::write(dir.join("net.d/10-test.conflist"), conflist).unwrap();
}

fn mirror(dir: &Path, host: &str, address: &str) {
    let hosts = dir.join("certs.d").join(host);
    fs::create_dir_all(&hosts).unwrap();
    let text = format!("[host.\"http://{address}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
    fs::write(hosts.join("hosts.toml"), text).unwrap();
}

//! The guest's agent.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::unix::net::UnixListener as StdListener,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use hull_proto_agent::{
    APPARMOR, RPC_PORT, VERSION,
    agent::{self as message, Empty, Event, Exited, event::Kind},
    rpc::{Agent, create_agent},
};
use hull_proto_vmm::ExitReason;
use protobuf::MessageField;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::mpsc,
};
use ttrpc::{
    asynchronous::{Server, ServerStreamSender, TtrpcContext, transport::Listener},
    proto::Code,
};

use crate::{
    guest::{Container, Guest, SavedGuest, not_executed, refusal},
    process::{End, Process},
    report,
    script::Script,
    streams, wire,
};

/// Serves the guest behind a vsock listener.
pub fn serve(
    listener: StdListener,
    script: Script,
    report: PathBuf,
    saved: Option<SavedGuest>,
) -> Arc<Guest> {
    let guest = Arc::new(Guest::new(script, report));
    if let Some(saved) = saved {
        guest.restore(saved);
    }
    let served = Arc::clone(&guest);
    listener.set_nonblocking(true).unwrap();
    let listener = UnixListener::from_std(listener).unwrap();
    tokio::spawn(async move {
        let (connections, receiver) = mpsc::channel::<std::io::Result<UnixStream>>(8);
        let incoming = futures::stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|stream| (stream, receiver))
        });
        let service = create_agent(Arc::new(Rpc(Arc::clone(&guest))));
        let mut server = Server::new()
            .add_listener(Listener::new(incoming))
            .register_service(service);
        server.start().await.unwrap();
        let mut attempts = 0;
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            attempts += 1;
            if guest.script.no_agent || attempts <= guest.script.attempts {
                continue;
            }
            let mut line = Vec::new();
            while let Ok(byte) = stream.read_u8().await {
                if byte == b'\n' {
                    break;
                }
                line.push(byte);
            }
            // A daemon may be killed at any point.
            let line = String::from_utf8(line).unwrap();
            let Some(port) = line.strip_prefix("CONNECT ") else {
                continue;
            };
            let port: u32 = port.parse().unwrap();
            if stream.write_all(b"OK 5000\n").await.is_err() {
                continue;
            }
            if port == RPC_PORT {
                let stream = match guest.script.astray {
                    true => wire::relayed(stream, &guest),
                    false => stream,
                };
                connections.send(Ok(stream)).await.unwrap();
            } else {
                tokio::spawn(streams::serve(stream, Arc::clone(&guest)));
            }
        }
    });
    served
}

/// All the numbers that there are, of everything.
fn endless(containers: impl Iterator<Item = String>) -> message::StatsResponse {
    let all = u64::MAX;
    let stall = || {
        MessageField::some(message::Stall {
            avg10: f64::INFINITY,
            avg60: f64::NAN,
            avg300: -f64::MAX,
            total_us: all,
            ..message::Stall::default()
        })
    };
    let pressure = || {
        MessageField::some(message::Pressure {
            some: stall(),
            full: stall(),
            ..message::Pressure::default()
        })
    };
    let usage = message::CgroupStats {
        cpu_usage_ns: all,
        cpu_user_ns: all,
        cpu_system_ns: all,
        cpu_periods: all,
        cpu_throttled_periods: all,
        cpu_throttled_ns: all,
        cpu_pressure: pressure(),
        memory_usage_bytes: all,
        memory_working_set_bytes: all,
        memory_rss_bytes: all,
        memory_cache_bytes: all,
        memory_limit_bytes: all,
        memory_pressure: pressure(),
        swap_usage_bytes: all,
        swap_limit_bytes: all,
        processes: all,
        pids: all,
        pids_limit: all,
        file_descriptors: all,
        sockets: all,
        io: (0..1000)
            .map(|n| message::DeviceIo {
                device: format!("\u{1b}vd{n}"),
                major: u32::MAX,
                minor: n,
                read_bytes: all,
                write_bytes: all,
                reads: all,
                writes: all,
                ..message::DeviceIo::default()
            })
            .collect(),
        ..message::CgroupStats::default()
    };
    let disk = || {
        MessageField::some(message::FilesystemStats {
            age_ms: all,
            used_bytes: all,
            used_inodes: all,
            capacity_bytes: all,
            ..message::FilesystemStats::default()
        })
    };
    let of = |id: String| message::ContainerStats {
        container_id: id,
        cgroup: MessageField::some(usage.clone()),
        writable: disk(),
        ..message::ContainerStats::default()
    };
    let containers = containers.chain(std::iter::repeat_n("f".repeat(64), 10));
    message::StatsResponse {
        at_ns: all,
        containers: containers.map(of).collect(),
        sandbox: MessageField::some(usage.clone()),
        scratch: disk(),
        ..message::StatsResponse::default()
    }
}

/// Events without end: the same again (`known`), of a kind that needs no answer (`oom`), of containers that
/// there are not (`strangers`).
async fn endless_events(
    kind: &str,
    last: u64,
    sender: &ServerStreamSender<Event>,
) -> ttrpc::Result<()> {
    let mut event = Event {
        seq: last,
        ..Event::default()
    };
    match kind {
        "oom" => event.kind = Some(Kind::Oom(message::Oom::default())),
        _ => {
            event.kind = Some(Kind::Exited(Exited {
                container_id: "f".repeat(64),
                ..Exited::default()
            }));
        }
    }
    loop {
        if kind != "known" {
            event.seq += 1;
        }
        sender.send(&event).await?;
    }
}

struct Rpc(Arc<Guest>);

#[async_trait]
impl Agent for Rpc {
    async fn hello(
        &self,
        _: &TtrpcContext,
        _: message::HelloRequest,
    ) -> ttrpc::Result<message::HelloResponse> {
        self.0.begin("hello").await?;
        Ok(message::HelloResponse {
            version: self.0.script.version.unwrap_or(VERSION),
            agent_version: "fake".into(),
            kernel_release: "6.0-fake".into(),
            features: match self.0.script.apparmor {
                true => vec![APPARMOR.into()],
                false => Vec::new(),
            },
            ..message::HelloResponse::default()
        })
    }

    async fn wake(&self, _: &TtrpcContext, request: message::WakeRequest) -> ttrpc::Result<Empty> {
        assert!(request.entropy.len() >= 32 && request.realtime_ns > 0);
        self.0.begin("wake").await?;
        self.0.done("wake").await
    }

    async fn freeze(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.0.begin("freeze").await?;
        self.0.note("calls", "freeze");
        self.0.hold(true);
        self.0.done("freeze").await
    }

    async fn thaw(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.0.begin("thaw").await?;
        self.0.note("calls", "thaw");
        self.0.hold(false);
        self.0.done("thaw").await
    }

    async fn configure(
        &self,
        _: &TtrpcContext,
        request: message::ConfigureRequest,
    ) -> ttrpc::Result<Empty> {
        assert!(request.hosts.contains(&request.hostname));
        assert!(request.entropy.len() >= 32);
        self.0.begin("configure").await?;
        self.0.done("configure").await
    }

    /// Leaves by how much it was set, a line for each call, beside the exit report.
    async fn adjust_clock(
        &self,
        _: &TtrpcContext,
        request: message::AdjustClockRequest,
    ) -> ttrpc::Result<message::AdjustClockResponse> {
        self.0.begin("adjust_clock").await?;
        if request.by_ns != 0 {
            self.0.note("clock", &request.by_ns.to_string());
        }
        let ahead_ns = self
            .0
            .clock_ahead_ns
            .fetch_add(request.by_ns, Ordering::Relaxed);
        let ahead_ns = ahead_ns.saturating_add(request.by_ns);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        Ok(message::AdjustClockResponse {
            realtime_ns: (now.as_nanos() as u64).saturating_add_signed(ahead_ns),
            ..message::AdjustClockResponse::default()
        })
    }

    /// Leaves the destinations of all routes, a line for each call, beside the exit report.
    async fn update_network(
        &self,
        _: &TtrpcContext,
        request: message::UpdateNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.begin("update_network").await?;
        let routes = request.routes.iter().map(|r| r.destination.as_str());
        let line = routes.collect::<Vec<_>>().join(" ");
        self.0.note("network", &line);
        self.0.done("update_network").await
    }

    /// Leaves a line for each call beside the exit report.
    async fn attach_device(
        &self,
        _: &TtrpcContext,
        request: message::AttachDeviceRequest,
    ) -> ttrpc::Result<message::AttachDeviceResponse> {
        self.0.note("links", &format!("in {}", request.slot));
        self.0.begin("attach_device").await?;
        self.0.done("attach_device").await?;
        Ok(message::AttachDeviceResponse::new())
    }

    async fn detach_device(
        &self,
        _: &TtrpcContext,
        request: message::DetachDeviceRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.begin("detach_device").await?;
        self.0.note("links", &format!("out {}", request.slot));
        self.0.done("detach_device").await
    }

    async fn attach_storage(
        &self,
        _: &TtrpcContext,
        request: message::AttachStorageRequest,
    ) -> ttrpc::Result<message::AttachStorageResponse> {
        // The scratch disk's is a part of the start, and not of a container.
        let call = if request.scratch {
            "attach_scratch"
        } else {
            "attach_storage"
        };
        self.0.begin(call).await?;
        let (id, slot) = (request.id, request.slot);
        let other = *self.0.storage.lock().unwrap().entry(id).or_insert(slot);
        if other != slot {
            let message = "it is attached with other settings";
            return Err(refusal(Code::ALREADY_EXISTS, message));
        }
        self.0.done(call).await?;
        Ok(message::AttachStorageResponse::new())
    }

    async fn detach_storage(
        &self,
        _: &TtrpcContext,
        request: message::DetachStorageRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.begin("detach_storage").await?;
        {
            let mut storage = self.0.storage.lock().unwrap();
            if request.id.is_empty() {
                storage.retain(|_, slot| *slot != request.slot);
            } else {
                // One that is gone already is no error: an earlier daemon may have been killed behind this.
                storage.remove(&request.id);
            }
        }
        self.0.done("detach_storage").await
    }

    /// Leaves what the volumes of containers are now, a line for each call, beside the exit report.
    /// One of a version that is called "large" is refused.
    async fn refresh_volumes(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        let containers = self.0.containers.lock().unwrap();
        let volumes = containers
            .values()
            .flat_map(|container| &container.atomic_volumes);
        let versions: BTreeSet<_> = volumes
            .map(|path| fs::read_link(PathBuf::from(path).join("..data")).unwrap())
            .map(|version| version.to_str().unwrap().to_owned())
            .collect();
        let line = Vec::from_iter(versions).join(" ");
        let path = self.0.report.with_file_name("volumes");
        let mut text = fs::read_to_string(&path).unwrap_or_default();
        text.push_str(&format!("{line}\n"));
        fs::write(path, text).unwrap();
        if line.contains("large") {
            return Err(refusal(Code::INTERNAL, "it is too large"));
        }
        Ok(Empty::new())
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: message::CreateRequest,
    ) -> ttrpc::Result<message::CreateResponse> {
        self.0.begin("create").await?;
        {
            let storage = self.0.storage.lock().unwrap();
            assert!(request.lower.iter().all(|id| storage.contains_key(id)));
            let mut mounts = request.storage_mounts.iter();
            assert!(mounts.all(|mount| storage.contains_key(&mount.storage)));
        }
        let spec: serde_json::Value = serde_json::from_slice(&request.spec).unwrap();
        if let Some(profile) = spec["process"]["apparmorProfile"].as_str() {
            assert!(self.0.script.apparmor);
            let policy = String::from_utf8_lossy(&request.apparmor_policy);
            self.0.note("apparmor", &format!("{profile} {policy}"));
        }
        let args = spec["process"]["args"].as_array().unwrap();
        let args = args.iter().map(|a| a.as_str().unwrap().to_owned());
        let container = Container {
            init: if request.stdin {
                Process::with_input(args.collect(), request.stdin_once)
            } else {
                Process::new(args.collect())
            },
            start: None,
            execs: HashMap::new(),
            restored: false,
            atomic_volumes: request
                .storage_mounts
                .into_iter()
                .map(|mount| mount.atomic_volume)
                .filter(|name| !name.is_empty())
                .collect(),
        };
        let id = request.container_id;
        self.0.containers.lock().unwrap().insert(id, container);
        self.0.done("create").await?;
        Ok(message::CreateResponse {
            pid: 7,
            uid: request.user.uid.unwrap_or_default(),
            groups: vec![0],
            ..message::CreateResponse::default()
        })
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: message::StartRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.begin("start").await?;
        let id = request.container_id;
        let process = {
            let mut containers = self.0.containers.lock().unwrap();
            let container = containers
                .get_mut(&id)
                .ok_or_else(|| refusal(Code::NOT_FOUND, "no such container"))?;
            container.init.held.send_replace(false);
            let goes_on = std::mem::take(&mut container.restored);
            match container.start {
                Some(true) if goes_on => {}
                Some(true) => return Ok(Empty::new()),
                Some(false) => {
                    return Err(refusal(
                        Code::FAILED_PRECONDITION,
                        "it is stopped, not created",
                    ));
                }
                None => container.start = Some(true),
            }
            Arc::clone(&container.init)
        };
        if process.args.iter().any(|a| a == "cannot-start") {
            // As the real agent: the end is told before the start is answered.
            let end = End {
                code: 127,
                signal: 0,
                oom: false,
            };
            self.0.exited(&id, "", &process, end, false);
            tokio::time::sleep(Duration::from_millis(100)).await;
            return Err(not_executed());
        }
        for other in process.lies().filter_map(|lie| lie.strip_prefix("exited:")) {
            self.0.tell(Exited {
                container_id: other.into(),
                code: 1,
                at_ns: u64::MAX,
                ..Exited::default()
            });
        }
        let guest = Arc::clone(&self.0);
        guest.note("runs", &format!("+{id}"));
        tokio::spawn(async move {
            let end = process.run(&process).await;
            guest.note("runs", &format!("-{id}"));
            guest.exited(&id, "", &process, end, false);
        });
        self.0.done("start").await
    }

    async fn signal(
        &self,
        _: &TtrpcContext,
        request: message::SignalRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.begin("signal").await?;
        match self.0.process(&request.container_id, &request.exec_id) {
            Some(process) => {
                let is_new = request.once.is_empty()
                    || process.once.lock().unwrap().insert(request.once.clone());
                if is_new {
                    process.signal(request.signal);
                }
                // What waits to be started is a process too.
                if request.signal == 9
                    && request.exec_id.is_empty()
                    && self.0.never_starts(&request.container_id)
                {
                    let end = End {
                        code: 137,
                        signal: 9,
                        oom: false,
                    };
                    process.stdout.end();
                    process.stderr.end();
                    self.0
                        .exited(&request.container_id, "", &process, end, false);
                }
            }
            None => return Err(refusal(Code::NOT_FOUND, "no such process")),
        }
        self.0.done("signal").await
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: message::DeleteRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.begin("delete").await?;
        let removed = self
            .0
            .containers
            .lock()
            .unwrap()
            .remove(&request.container_id);
        removed.ok_or_else(|| refusal(Code::NOT_FOUND, "no such container"))?;
        self.0.done("delete").await
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: message::ExecRequest,
    ) -> ttrpc::Result<message::ExecResponse> {
        self.0.begin("exec").await?;
        if request.args.iter().any(|a| a == "cannot-start") {
            return Err(not_executed());
        }
        let process = if request.stdin {
            Process::with_input(request.args, true)
        } else {
            Process::new(request.args)
        };
        let owner = {
            let mut containers = self.0.containers.lock().unwrap();
            let container = containers
                .get_mut(&request.container_id)
                .ok_or_else(|| refusal(Code::NOT_FOUND, "no such container"))?;
            let exec = Arc::clone(&process);
            container.execs.insert(request.exec_id.clone(), exec);
            Arc::clone(&container.init)
        };
        let guest = Arc::clone(&self.0);
        let limit = match request.timeout_ms {
            0 => Duration::from_secs(3600),
            ms => Duration::from_millis(ms),
        };
        tokio::spawn(async move {
            let timer = async {
                tokio::time::sleep(limit).await;
                process.signal(9);
                std::future::pending::<()>().await;
            };
            let begin = tokio::time::Instant::now();
            let end = tokio::select! {
                end = process.run(&owner) => end,
                () = timer => return,
            };
            let late = begin.elapsed() >= limit;
            guest.exited(&request.container_id, &request.exec_id, &process, end, late);
        });
        self.0.note("calls", "exec");
        self.0.done("exec").await?;
        Ok(message::ExecResponse::new())
    }

    /// A weight of 13 is refused, after it was noted.
    async fn update(
        &self,
        _: &TtrpcContext,
        request: message::UpdateRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.begin("update").await?;
        let process = self.0.process(&request.container_id, "");
        let process = process.ok_or_else(|| refusal(Code::NOT_FOUND, "no such container"))?;
        let limits: serde_json::Value = serde_json::from_slice(&request.resources).unwrap();
        let adjustment = request.oom_score_adj;
        let note = format!("{} {} {adjustment:?}", limits["cpu"], limits["memory"]);
        process.limits.lock().unwrap().push(note);
        if limits["cpu"]["shares"] == 13 {
            return Err(refusal(Code::INTERNAL, "an unlucky number"));
        }
        self.0.done("update").await
    }

    async fn resize_tty(
        &self,
        _: &TtrpcContext,
        request: message::ResizeTtyRequest,
    ) -> ttrpc::Result<Empty> {
        let (id, exec) = (&request.container_id, &request.exec_id);
        let process = self.0.process(id, exec);
        let process = process.ok_or_else(|| refusal(Code::NOT_FOUND, "no such process"))?;
        let size = format!("{}x{}\n", request.columns, request.rows);
        process.stdout.write(size.as_bytes());
        Ok(Empty::new())
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        _: message::StatsRequest,
    ) -> ttrpc::Result<message::StatsResponse> {
        // Each answer tells of another millisecond of CPU time.
        let asked = self.0.asked.fetch_add(1, Ordering::Relaxed) + 1;
        let usage = message::CgroupStats {
            cpu_usage_ns: asked * 1_000_000,
            memory_usage_bytes: 1 << 20,
            ..message::CgroupStats::default()
        };
        let containers = self.0.containers.lock().unwrap();
        let mut inits = containers.values().map(|container| &container.init);
        if inits.any(|init| init.lies().any(|lie| lie == "stats")) {
            return Ok(endless(containers.keys().cloned()));
        }
        let of = |id: &String| message::ContainerStats {
            container_id: id.clone(),
            cgroup: MessageField::some(usage.clone()),
            ..message::ContainerStats::default()
        };
        Ok(message::StatsResponse {
            containers: containers.keys().map(of).collect(),
            sandbox: MessageField::some(usage.clone()),
            ..message::StatsResponse::default()
        })
    }

    async fn processes(
        &self,
        _: &TtrpcContext,
        request: message::ProcessesRequest,
    ) -> ttrpc::Result<message::ProcessesResponse> {
        let containers = self.0.containers.lock().unwrap();
        let container = containers.get(&request.container_id);
        let container = container.ok_or_else(|| refusal(Code::NOT_FOUND, "no such container"))?;
        let init = message::ProcessInfo {
            pid: 1,
            state: "S".into(),
            cpu_ms: 61_000,
            memory_bytes: 3 << 20,
            age_ms: 7_000,
            command: container.init.args.join(" "),
            ..message::ProcessInfo::default()
        };
        Ok(message::ProcessesResponse {
            processes: vec![init],
            ..message::ProcessesResponse::default()
        })
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        request: message::EventsRequest,
        sender: ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        let mut events = self.0.events.subscribe();
        let mut sent = request.since_seq as usize;
        loop {
            for lie in self.0.lies() {
                if let Some(kind) = lie.strip_prefix("events:") {
                    return endless_events(kind, sent as u64, &sender).await;
                }
            }
            let new = events.borrow_and_update()[sent..].to_vec();
            sent += new.len();
            for event in new {
                sender.send(&event).await?;
            }
            if events.changed().await.is_err() {
                return Ok(());
            }
        }
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.0.begin("shutdown").await?;
        report::end(&self.0.report, ExitReason::GuestShutdown, "powered off");
    }
}

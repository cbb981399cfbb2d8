//! The ttrpc service: checks requests, hands them on, turns errors into
//! statuses ([`status`]). There is no behaviour here.

mod status;

use std::{future::Future, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use hull_proto_agent::{APPARMOR, VERSION, agent as proto, rpc};
use tokio::sync::Notify;
use tracing::debug;
use ttrpc::r#async::{ServerStreamSender, TtrpcContext};

use self::status::{Refusal, invalid, status};
use crate::{
    blocking::blocking,
    container::{Change, Containers, Context, Sending},
    ident::Id,
    memory::Memory,
    mmio::Slots,
    sandbox::{self, Sandbox},
    shutdown,
    stats::{self, Stats},
    time,
};

/// What this agent can do beyond the first contract version.
const FEATURES: &[&str] = &["exec_cgroup", "exec_seccomp", "oom_events", "stream_replay"];

/// The agent, as the host sees it.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) context: Arc<Context>,
    pub(crate) containers: Arc<Containers>,
    pub(crate) sandbox: Arc<Sandbox>,
    pub(crate) stats: Arc<Stats>,
    pub(crate) memory: Arc<Memory>,
    /// When `main` was entered.
    pub(crate) kernel_ns: u64,
    /// When the socket was listening.
    pub(crate) ready_ns: u64,
    /// Told when the host asked for the end.
    pub(crate) stop: Arc<Notify>,
}

/// Runs a request to its end also when its connection breaks: ttrpc drops the
/// handlers of a lost connection, and half a mount is worse than none.
async fn complete<T: Send + 'static>(
    work: impl Future<Output = Result<T, Refusal>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => result.map_err(|refusal| {
            debug!(?refusal, "request failed");
            refusal.into()
        }),
        Err(e) => Err(ttrpc::Error::Others(e.to_string())),
    }
}

#[async_trait]
impl rpc::Agent for Service {
    async fn hello(
        &self,
        _: &TtrpcContext,
        request: proto::HelloRequest,
    ) -> ttrpc::Result<proto::HelloResponse> {
        debug!(host = request.version, "hello");
        let kernel = nix::sys::utsname::uname();
        let apparmor = self.context.apparmor.is_on().then_some(&APPARMOR);
        let features = FEATURES.iter().chain(apparmor);
        Ok(proto::HelloResponse {
            version: VERSION,
            features: features.map(|f| (*f).to_owned()).collect(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: kernel.map_or_else(
                |_| String::new(),
                |k| k.release().to_string_lossy().into_owned(),
            ),
            kernel_ns: self.kernel_ns,
            ready_ns: self.ready_ns,
            ..proto::HelloResponse::default()
        })
    }

    async fn wake(
        &self,
        _: &TtrpcContext,
        request: proto::WakeRequest,
    ) -> ttrpc::Result<proto::Empty> {
        let (sandbox, containers) = (Arc::clone(&self.sandbox), Arc::clone(&self.containers));
        complete(async move {
            let woken = sandbox::wake(&request);
            if woken.is_ok() && request.restored {
                containers.restored().await;
                sandbox.forget().await;
            }
            done(woken)
        })
        .await
    }

    async fn freeze(&self, _: &TtrpcContext, _: proto::Empty) -> ttrpc::Result<proto::Empty> {
        let containers = Arc::clone(&self.containers);
        complete(async move { done(containers.freeze().await) }).await
    }

    async fn thaw(&self, _: &TtrpcContext, _: proto::Empty) -> ttrpc::Result<proto::Empty> {
        let containers = Arc::clone(&self.containers);
        complete(async move { done(containers.thaw().await) }).await
    }

    async fn configure(
        &self,
        _: &TtrpcContext,
        request: proto::ConfigureRequest,
    ) -> ttrpc::Result<proto::Empty> {
        let (sandbox, memory) = (Arc::clone(&self.sandbox), Arc::clone(&self.memory));
        complete(async move {
            let configured = sandbox.configure(&request).await;
            if configured.is_ok() && request.memory_grows {
                memory.grow();
            }
            done(configured)
        })
        .await
    }

    async fn adjust_clock(
        &self,
        _: &TtrpcContext,
        request: proto::AdjustClockRequest,
    ) -> ttrpc::Result<proto::AdjustClockResponse> {
        // At once, and not in a task of its own: what it takes counts as way.
        if let Err(error) = time::adjust_real(request.by_ns) {
            return Err(invalid(format!("set the clock: {error}")).into());
        }
        Ok(proto::AdjustClockResponse {
            realtime_ns: time::real_ns(),
            ..proto::AdjustClockResponse::default()
        })
    }

    async fn update_network(
        &self,
        _: &TtrpcContext,
        request: proto::UpdateNetworkRequest,
    ) -> ttrpc::Result<proto::Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        complete(async move { done(sandbox.update_network(&request).await) }).await
    }

    async fn attach_storage(
        &self,
        _: &TtrpcContext,
        request: proto::AttachStorageRequest,
    ) -> ttrpc::Result<proto::AttachStorageResponse> {
        let storages = Arc::clone(&self.context.storages);
        complete(async move {
            let storage = storages.attach(request).await.map_err(|e| status(&e))?;
            let path = |p: PathBuf| p.to_string_lossy().into_owned();
            Ok(proto::AttachStorageResponse {
                device: storage.device,
                mount_point: storage.mount_point.map(path).unwrap_or_default(),
                ..proto::AttachStorageResponse::default()
            })
        })
        .await
    }

    async fn detach_storage(
        &self,
        _: &TtrpcContext,
        request: proto::DetachStorageRequest,
    ) -> ttrpc::Result<proto::Empty> {
        let storages = Arc::clone(&self.context.storages);
        complete(async move {
            done(if request.id.is_empty() {
                storages.vacate(request.slot).await
            } else {
                storages.detach(&request.id).await
            })
        })
        .await
    }

    async fn attach_device(
        &self,
        _: &TtrpcContext,
        request: proto::AttachDeviceRequest,
    ) -> ttrpc::Result<proto::AttachDeviceResponse> {
        complete(blocking(move || {
            let slot = Slots::default().slot(request.slot);
            let slot = slot.map_err(|e| status(&e))?;
            slot.probe().map_err(|e| status(&e))?;
            let driver = slot.driver().unwrap_or_default();
            let name = if driver == "virtio_net" {
                slot.link().map_err(|e| status(&e))?
            } else {
                String::new()
            };
            Ok(proto::AttachDeviceResponse {
                driver,
                name,
                ..proto::AttachDeviceResponse::default()
            })
        }))
        .await
    }

    async fn detach_device(
        &self,
        _: &TtrpcContext,
        request: proto::DetachDeviceRequest,
    ) -> ttrpc::Result<proto::Empty> {
        complete(blocking(move || {
            let slot = Slots::default().slot(request.slot);
            done(slot.and_then(|slot| slot.release()))
        }))
        .await
    }

    async fn refresh_volumes(
        &self,
        _: &TtrpcContext,
        _: proto::Empty,
    ) -> ttrpc::Result<proto::Empty> {
        let volumes = Arc::clone(&self.context.atomic_volumes);
        complete(blocking(move || done(volumes.refresh()))).await
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: proto::CreateRequest,
    ) -> ttrpc::Result<proto::CreateResponse> {
        let containers = Arc::clone(&self.containers);
        complete(async move {
            let made = containers.create(request).await.map_err(|e| status(&e))?;
            Ok(proto::CreateResponse {
                pid: u32::try_from(made.init.pid().as_raw()).unwrap_or(0),
                uid: made.user.uid,
                gid: made.user.gid,
                groups: made.user.groups,
                ..proto::CreateResponse::default()
            })
        })
        .await
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: proto::StartRequest,
    ) -> ttrpc::Result<proto::Empty> {
        let containers = Arc::clone(&self.containers);
        complete(async move { done(containers.start(&request.container_id).await) }).await
    }

    async fn signal(
        &self,
        _: &TtrpcContext,
        request: proto::SignalRequest,
    ) -> ttrpc::Result<proto::Empty> {
        let containers = Arc::clone(&self.containers);
        complete(async move {
            let signal = i32::try_from(request.signal)
                .ok()
                .filter(|s| (0..=64).contains(s))
                .ok_or_else(|| invalid(format!("no signal {}", request.signal)))?;
            let exec = match request.exec_id.as_str() {
                "" => None,
                exec => Some(Id::parse("exec id", exec).map_err(|e| status(&e))?),
            };
            done(
                containers
                    .signal(
                        &request.container_id,
                        Sending {
                            exec,
                            signal,
                            all: request.all,
                            once: request.once,
                        },
                    )
                    .await,
            )
        })
        .await
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: proto::DeleteRequest,
    ) -> ttrpc::Result<proto::Empty> {
        let containers = Arc::clone(&self.containers);
        complete(async move {
            done(
                containers
                    .delete(&request.container_id, request.force)
                    .await,
            )
        })
        .await
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: proto::ExecRequest,
    ) -> ttrpc::Result<proto::ExecResponse> {
        let containers = Arc::clone(&self.containers);
        complete(async move {
            let pid = containers.exec(request).await.map_err(|e| status(&e))?;
            Ok(proto::ExecResponse {
                pid: u32::try_from(pid).unwrap_or(0),
                ..proto::ExecResponse::default()
            })
        })
        .await
    }

    async fn resize_tty(
        &self,
        _: &TtrpcContext,
        request: proto::ResizeTtyRequest,
    ) -> ttrpc::Result<proto::Empty> {
        let size = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let (rows, columns) = (size(request.rows), size(request.columns));
        let containers = Arc::clone(&self.containers);
        complete(async move {
            done(containers.resize(&request.container_id, &request.exec_id, rows, columns))
        })
        .await
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: proto::UpdateRequest,
    ) -> ttrpc::Result<proto::Empty> {
        let containers = Arc::clone(&self.containers);
        complete(async move {
            let resources = serde_json::from_slice(&request.resources)
                .map_err(|e| invalid(format!("read the OCI resources: {e}")))?;
            let change = Change {
                resources,
                oom_score_adj: request.oom_score_adj,
            };
            done(containers.update(&request.container_id, change).await)
        })
        .await
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: proto::StatsRequest,
    ) -> ttrpc::Result<proto::StatsResponse> {
        let stats = Arc::clone(&self.stats);
        let wanted = self.containers.made(&request.container_ids);
        let all = self.containers.made(&[]);
        let pod = self.context.layout.pod_cgroup();
        let scratch = self.context.storages.scratch();
        complete(blocking(move || {
            Ok(stats.collect(&wanted, &all, &pod, scratch.as_deref()))
        }))
        .await
    }

    async fn processes(
        &self,
        _: &TtrpcContext,
        request: proto::ProcessesRequest,
    ) -> ttrpc::Result<proto::ProcessesResponse> {
        let made = self.containers.one_made(&request.container_id);
        let pod = self.context.pod.user();
        let first_uid = pod.and_then(|pod| pod.uid(0)).unwrap_or(0);
        complete(blocking(move || {
            let made = made.map_err(|error| status(&error))?;
            Ok(stats::processes(&made.init, &made.cgroup, first_uid))
        }))
        .await
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        request: proto::EventsRequest,
        sender: ServerStreamSender<proto::Event>,
    ) -> ttrpc::Result<()> {
        // Not completed beyond its connection: it has no effects.
        let mut reader = self.context.events.reader(request.since_seq);
        loop {
            for event in reader.next().await {
                sender.send(&event).await?;
            }
        }
    }

    async fn shutdown(&self, _: &TtrpcContext, _: proto::Empty) -> ttrpc::Result<proto::Empty> {
        let (context, containers) = (Arc::clone(&self.context), Arc::clone(&self.containers));
        let stop = Arc::clone(&self.stop);
        complete(async move {
            shutdown::prepare(&context.layout, &containers, &context.storages).await;
            stop.notify_one();
            Ok(proto::Empty::default())
        })
        .await
    }
}

/// Turns the result of a request without an answer into one.
fn done<E: status::Classified>(result: Result<(), E>) -> Result<proto::Empty, Refusal> {
    match result {
        Ok(()) => Ok(proto::Empty::default()),
        Err(e) => Err(status(&e)),
    }
}

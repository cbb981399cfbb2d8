//! The runtime service for all runtimes of the node: every RPC.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, stream, stream::SelectAll};
use hull_proto_cri::v1::{runtime_service_server::RuntimeService, *};
use serde_json::json;
use tokio::time::sleep;
use tonic::{Code, Request, Response, Status, async_trait};
use tracing::{debug, info};

use super::{
    images::for_default_handler,
    peer::{Delegate, PATIENCE},
    router::Router,
};
use crate::cri::{
    node::runtime_config::cgroup_driver,
    stream::{Answer, batches},
};

/// How long another runtime may take to tell its status, which is asked for every few seconds.
const STATUS: Duration = Duration::from_secs(2);
/// How long after the end of another runtime's events they are asked for again.
const AGAIN: Duration = Duration::from_secs(1);

/// Passes a call on to who has what it is about.
macro_rules! pass {
    ($self:ident, $call:ident, $request:ident, $holder:expr) => {
        match $holder {
            None => $self.own.$call($request).await,
            Some(delegate) => delegate.answer(delegate.runtime().$call($request).await),
        }
    };
}

/// Passes a call on to who has the pod.
macro_rules! to_pod {
    ($self:ident, $call:ident, $request:ident) => {
        pass!($self, $call, $request, {
            $self.of_pod(&$request.get_ref().pod_sandbox_id).await?
        })
    };
}

/// Passes a call on to who has the container.
macro_rules! to_container {
    ($self:ident, $call:ident, $request:ident) => {
        pass!($self, $call, $request, {
            $self.of_container(&$request.get_ref().container_id).await?
        })
    };
}

/// Where a pod is to be that is none of Hull's.
struct Place {
    delegate: Arc<Delegate>,
    /// There.
    handler: String,
    /// It is there because it asks for namespaces of the host.
    is_host_pod: bool,
}

impl Router {
    /// Which other runtime is to have a pod; none: Hull, which refuses one whose handler is not there.
    fn of_new_pod(&self, request: &RunPodSandboxRequest) -> Option<Place> {
        let handlers = self.own.0.handlers.borrow();
        let name = &request.runtime_handler;
        let led = handlers
            .leads_to(name)
            .map(|(socket, handler)| (socket, handler, false));
        let (socket, handler, is_host_pod) = led.or_else(|| {
            handlers.get(name)?;
            let socket = handlers.host_pods()?;
            wants_host(request).then_some((socket, "", true))
        })?;
        let (socket, handler) = (socket.to_owned(), handler.to_owned());
        drop(handlers);
        Some(Place {
            delegate: self.delegate(&socket)?,
            handler,
            is_host_pod,
        })
    }

    /// Tells of the others what Hull can't know.
    async fn tell_of_delegates(&self, verbose: bool, status: &mut StatusResponse) {
        let mut faults = Vec::new();
        let mut told = Vec::new();
        for delegate in self.delegates() {
            let socket = delegate.socket().display().to_string();
            let request = StatusRequest { verbose: false };
            let asked = async {
                let mut runtime = delegate.runtime();
                let status = runtime.status(request).await?.into_inner();
                let config = runtime.runtime_config(RuntimeConfigRequest {}).await;
                Ok((status, config.map(Response::into_inner).ok()))
            };
            let answer = delegate.within(STATUS, asked).await;
            let (handlers, fault) = match answer {
                Ok((theirs, config)) => {
                    // What kubelet asks of the node, a pod of each runtime must get.
                    let features = theirs.features.unwrap_or_default();
                    if let Some(node) = &mut status.features {
                        node.supplemental_groups_policy &= features.supplemental_groups_policy;
                        node.user_namespaces_host_network &= features.user_namespaces_host_network;
                        node.mount_options &= features.mount_options;
                    }
                    let fault = fault(theirs.status).or_else(|| other_driver(config));
                    (theirs.runtime_handlers, fault)
                }
                Err(status) => (Vec::new(), Some(status.message().to_owned())),
            };
            let default = handlers.iter().find(|handler| handler.name.is_empty());
            let features = default
                .and_then(|handler| handler.features)
                .unwrap_or_default();
            {
                let known = self.own.0.handlers.borrow();
                let leads_here = |name: &str| {
                    known
                        .leads_to(name)
                        .is_some_and(|(to, _)| to == delegate.socket())
                };
                for handler in &mut status.runtime_handlers {
                    if leads_here(&handler.name) {
                        handler.features = Some(features);
                    }
                }
                let others = handlers
                    .into_iter()
                    .filter(|handler| known.get(&handler.name).is_none());
                let others = others.filter(|handler| leads_here(&handler.name));
                status.runtime_handlers.extend(others);
            }
            told.push(json!({"socket": socket, "handler": delegate.handler(), "fault": fault}));
            faults.extend(fault.map(|fault| format!("{}: {fault}", delegate.handler())));
        }
        if let Some(conditions) = status.status.as_mut().map(|status| &mut status.conditions)
            && !told.is_empty()
        {
            // Not one that kubelet acts on: VMs go on without them.
            conditions.push(RuntimeCondition {
                r#type: "DelegatesReady".to_owned(),
                status: faults.is_empty(),
                reason: if faults.is_empty() {
                    ""
                } else {
                    "DelegateNotReady"
                }
                .to_owned(),
                message: faults.join("; "),
            });
        }
        if verbose {
            status
                .info
                .insert("delegates".to_owned(), json!(told).to_string());
        }
    }
}

/// What keeps another runtime from its pods, if anything does.
fn fault(status: Option<RuntimeStatus>) -> Option<String> {
    let conditions = status.unwrap_or_default().conditions;
    let fault = conditions.into_iter().find(|condition| {
        // Others may be what their makers want, and true when something is wrong.
        !condition.status && ["RuntimeReady", "NetworkReady"].contains(&condition.r#type.as_str())
    })?;
    Some(format!("{}: {}", fault.r#type, fault.message))
}

/// What is wrong with its cgroups: kubelet makes those of all pods as Hull says. An older one does not tell.
fn other_driver(config: Option<RuntimeConfigResponse>) -> Option<String> {
    let (other, told) = (config?.linux?.cgroup_driver(), cgroup_driver());
    let (other_name, told_name) = (other.as_str_name(), told.as_str_name());
    (other != told).then(|| {
        format!(
            "its cgroup driver is {other_name}, and kubelet is told {told_name} for all of the node"
        )
    })
}

fn wants_host(request: &RunPodSandboxRequest) -> bool {
    let linux = request
        .config
        .as_ref()
        .and_then(|config| config.linux.as_ref());
    let security = linux.and_then(|linux| linux.security_context.as_ref());
    security
        .and_then(|security| security.namespace_options.as_ref())
        .is_some_and(|namespaces| {
            [namespaces.network(), namespaces.pid(), namespaces.ipc()]
                .contains(&NamespaceMode::Node)
        })
}

/// The pod that a request makes.
fn made(id: &str, handler: String, config: Option<PodSandboxConfig>) -> PodSandbox {
    let config = config.unwrap_or_default();
    PodSandbox {
        id: id.to_owned(),
        metadata: config.metadata,
        state: PodSandboxState::SandboxReady.into(),
        labels: config.labels,
        annotations: config.annotations,
        runtime_handler: handler,
        created_at: hull_base::clock::now_ns(),
    }
}

/// Another runtime's events for as long as they are wanted, whenever it is there.
fn events(delegate: Arc<Delegate>) -> Answer<ContainerEventResponse> {
    let first: Option<tonic::Streaming<ContainerEventResponse>> = None;
    stream::unfold((delegate, first), |(delegate, mut events)| async move {
        loop {
            if let Some(open) = &mut events {
                match open.message().await {
                    Ok(Some(mut event)) => {
                        if let Some(status) = &mut event.pod_sandbox_status {
                            delegate.name_handler(&mut status.runtime_handler);
                        }
                        return Some((Ok(event), (delegate, events)));
                    }
                    Ok(None) => {}
                    Err(status) => debug!(error = status.message(), "another runtime's events"),
                }
                events = None;
                sleep(AGAIN).await;
            }
            let mut runtime = delegate.runtime();
            match runtime.get_container_events(GetEventsRequest {}).await {
                Ok(open) => events = Some(open.into_inner()),
                // An older one has none.
                Err(status) if status.code() == Code::Unimplemented => return None,
                Err(_) => sleep(AGAIN).await,
            }
        }
    })
    .boxed()
}

#[async_trait]
impl RuntimeService for Router {
    async fn version(
        &self,
        request: Request<VersionRequest>,
    ) -> Result<Response<VersionResponse>, Status> {
        self.own.version(request).await
    }

    async fn status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        let verbose = request.get_ref().verbose;
        let mut answer = self.own.status(request).await?;
        self.tell_of_delegates(verbose, answer.get_mut()).await;
        Ok(answer)
    }

    async fn runtime_config(
        &self,
        request: Request<RuntimeConfigRequest>,
    ) -> Result<Response<RuntimeConfigResponse>, Status> {
        self.own.runtime_config(request).await
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<RunPodSandboxRequest>,
    ) -> Result<Response<RunPodSandboxResponse>, Status> {
        let Some(place) = self.of_new_pod(request.get_ref()) else {
            return self.own.run_pod_sandbox(request).await;
        };
        let delegate = place.delegate;
        let mut request = request;
        let config = request.get_ref().config.clone();
        if place.is_host_pod {
            let metadata = config.as_ref().and_then(|config| config.metadata.as_ref());
            let pod = metadata.map(|meta| format!("{}/{}", meta.namespace, meta.name));
            let (pod, socket) = (pod.unwrap_or_default(), delegate.socket().display());
            info!(pod, %socket, "it asks for namespaces of the host, and is no VM");
        }
        let mut handler = place.handler;
        request.get_mut().runtime_handler.clone_from(&handler);
        let answer = delegate.answer(delegate.runtime().run_pod_sandbox(request).await)?;
        let id = &answer.get_ref().pod_sandbox_id;
        delegate.name_handler(&mut handler);
        delegate.note(made(id, handler, config));
        Ok(answer)
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<StopPodSandboxRequest>,
    ) -> Result<Response<StopPodSandboxResponse>, Status> {
        to_pod!(self, stop_pod_sandbox, request)
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<RemovePodSandboxRequest>,
    ) -> Result<Response<RemovePodSandboxResponse>, Status> {
        to_pod!(self, remove_pod_sandbox, request)
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<PodSandboxStatusRequest>,
    ) -> Result<Response<PodSandboxStatusResponse>, Status> {
        let Some(delegate) = self.of_pod(&request.get_ref().pod_sandbox_id).await? else {
            return self.own.pod_sandbox_status(request).await;
        };
        let verbose = request.get_ref().verbose;
        let answer = delegate.runtime().pod_sandbox_status(request).await;
        let mut answer = delegate.answer(answer)?;
        let told = answer.get_mut();
        if let Some(status) = &mut told.status {
            delegate.name_handler(&mut status.runtime_handler);
        }
        if verbose {
            let socket = delegate.socket().display().to_string();
            told.info
                .insert("delegate".to_owned(), json!(socket).to_string());
        }
        Ok(answer)
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<ListPodSandboxRequest>,
    ) -> Result<Response<ListPodSandboxResponse>, Status> {
        let filter = request.get_ref().filter.clone();
        let mut answer = self.own.list_pod_sandbox(request).await?;
        answer.get_mut().items.extend(self.pods(filter).await);
        Ok(answer)
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Result<Response<CreateContainerResponse>, Status> {
        let mut request = request;
        let holder = self.of_pod(&request.get_ref().pod_sandbox_id).await?;
        let asked = request.get_mut();
        let pod = asked.sandbox_config.clone();
        self.have_image(&holder, asked.config.as_mut(), pod).await?;
        if let (Some(_), Some(config)) = (&holder, &mut asked.config) {
            config.image = for_default_handler(config.image.take());
        }
        pass!(self, create_container, request, holder)
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Result<Response<StartContainerResponse>, Status> {
        to_container!(self, start_container, request)
    }

    async fn stop_container(
        &self,
        request: Request<StopContainerRequest>,
    ) -> Result<Response<StopContainerResponse>, Status> {
        to_container!(self, stop_container, request)
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Result<Response<RemoveContainerResponse>, Status> {
        to_container!(self, remove_container, request)
    }

    async fn container_status(
        &self,
        request: Request<ContainerStatusRequest>,
    ) -> Result<Response<ContainerStatusResponse>, Status> {
        to_container!(self, container_status, request)
    }

    async fn list_containers(
        &self,
        request: Request<ListContainersRequest>,
    ) -> Result<Response<ListContainersResponse>, Status> {
        let filter = request.get_ref().filter.clone();
        let mut answer = self.own.list_containers(request).await?;
        let more = self.containers(filter).await;
        answer.get_mut().containers.extend(more);
        Ok(answer)
    }

    async fn exec_sync(
        &self,
        request: Request<ExecSyncRequest>,
    ) -> Result<Response<ExecSyncResponse>, Status> {
        to_container!(self, exec_sync, request)
    }

    async fn reopen_container_log(
        &self,
        request: Request<ReopenContainerLogRequest>,
    ) -> Result<Response<ReopenContainerLogResponse>, Status> {
        to_container!(self, reopen_container_log, request)
    }

    // Answered with the URL of who has the pod, which kubelet connects to.

    async fn exec(&self, request: Request<ExecRequest>) -> Result<Response<ExecResponse>, Status> {
        to_container!(self, exec, request)
    }

    async fn attach(
        &self,
        request: Request<AttachRequest>,
    ) -> Result<Response<AttachResponse>, Status> {
        to_container!(self, attach, request)
    }

    async fn port_forward(
        &self,
        request: Request<PortForwardRequest>,
    ) -> Result<Response<PortForwardResponse>, Status> {
        to_pod!(self, port_forward, request)
    }

    async fn update_container_resources(
        &self,
        request: Request<UpdateContainerResourcesRequest>,
    ) -> Result<Response<UpdateContainerResourcesResponse>, Status> {
        to_container!(self, update_container_resources, request)
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<UpdatePodSandboxResourcesRequest>,
    ) -> Result<Response<UpdatePodSandboxResourcesResponse>, Status> {
        to_pod!(self, update_pod_sandbox_resources, request)
    }

    async fn update_runtime_config(
        &self,
        request: Request<UpdateRuntimeConfigRequest>,
    ) -> Result<Response<UpdateRuntimeConfigResponse>, Status> {
        let asked = request.get_ref().clone();
        let answer = self.own.update_runtime_config(request).await?;
        for delegate in self.delegates() {
            let runtime = &mut delegate.runtime();
            let updated = runtime.update_runtime_config(asked.clone());
            let updated = delegate.within(PATIENCE, updated).await;
            if let Err(status) = updated {
                debug!(error = status.message(), "another runtime's configuration");
            }
        }
        Ok(answer)
    }

    async fn container_stats(
        &self,
        request: Request<ContainerStatsRequest>,
    ) -> Result<Response<ContainerStatsResponse>, Status> {
        to_container!(self, container_stats, request)
    }

    async fn list_container_stats(
        &self,
        request: Request<ListContainerStatsRequest>,
    ) -> Result<Response<ListContainerStatsResponse>, Status> {
        let more = self.container_stats_of_others(request.get_ref().filter.clone());
        let (answer, more) = tokio::join!(self.own.list_container_stats(request), more);
        let mut answer = answer?;
        answer.get_mut().stats.extend(more);
        Ok(answer)
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<PodSandboxStatsRequest>,
    ) -> Result<Response<PodSandboxStatsResponse>, Status> {
        to_pod!(self, pod_sandbox_stats, request)
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<ListPodSandboxStatsRequest>,
    ) -> Result<Response<ListPodSandboxStatsResponse>, Status> {
        let more = self.pod_stats_of_others(request.get_ref().filter.clone());
        let (answer, more) = tokio::join!(self.own.list_pod_sandbox_stats(request), more);
        let mut answer = answer?;
        answer.get_mut().stats.extend(more);
        Ok(answer)
    }

    async fn list_metric_descriptors(
        &self,
        request: Request<ListMetricDescriptorsRequest>,
    ) -> Result<Response<ListMetricDescriptorsResponse>, Status> {
        let mut answer = self.own.list_metric_descriptors(request).await?;
        let ask = |delegate: Arc<Delegate>| async move {
            let request = ListMetricDescriptorsRequest {};
            delegate.runtime().list_metric_descriptors(request).await
        };
        let more: Vec<ListMetricDescriptorsResponse> = self.gather(ask).await;
        let all = &mut answer.get_mut().descriptors;
        for descriptor in more.into_iter().flat_map(|answer| answer.descriptors) {
            if all.iter().all(|known| known.name != descriptor.name) {
                all.push(descriptor);
            }
        }
        Ok(answer)
    }

    async fn list_pod_sandbox_metrics(
        &self,
        request: Request<ListPodSandboxMetricsRequest>,
    ) -> Result<Response<ListPodSandboxMetricsResponse>, Status> {
        let mut answer = self.own.list_pod_sandbox_metrics(request).await?;
        let more = self.metrics_of_others().await;
        answer.get_mut().pod_metrics.extend(more);
        Ok(answer)
    }

    async fn checkpoint_container(
        &self,
        request: Request<CheckpointContainerRequest>,
    ) -> Result<Response<CheckpointContainerResponse>, Status> {
        to_container!(self, checkpoint_container, request)
    }

    async fn checkpoint_pod(
        &self,
        request: Request<CheckpointPodRequest>,
    ) -> Result<Response<CheckpointPodResponse>, Status> {
        to_pod!(self, checkpoint_pod, request)
    }

    async fn restore_pod(
        &self,
        request: Request<RestorePodRequest>,
    ) -> Result<Response<RestorePodResponse>, Status> {
        self.own.restore_pod(request).await
    }

    // In parts.

    type StreamPodSandboxesStream = Answer<StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<StreamPodSandboxesRequest>,
    ) -> Result<Response<Self::StreamPodSandboxesStream>, Status> {
        let filter = request.get_ref().filter.clone();
        let own = self.own.stream_pod_sandboxes(request).await?;
        let more = self.pods(filter).await;
        let more = batches(more, |pod_sandboxes| StreamPodSandboxesResponse {
            pod_sandboxes,
        });
        Ok(own.map(|own| own.chain(more).boxed()))
    }

    type StreamContainersStream = Answer<StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<StreamContainersRequest>,
    ) -> Result<Response<Self::StreamContainersStream>, Status> {
        let filter = request.get_ref().filter.clone();
        let own = self.own.stream_containers(request).await?;
        let more = self.containers(filter).await;
        let more = batches(more, |containers| StreamContainersResponse { containers });
        Ok(own.map(|own| own.chain(more).boxed()))
    }

    type StreamContainerStatsStream = Answer<StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<StreamContainerStatsRequest>,
    ) -> Result<Response<Self::StreamContainerStatsStream>, Status> {
        let filter = request.get_ref().filter.clone();
        let own = self.own.stream_container_stats(request).await?;
        let more = self.container_stats_of_others(filter).await;
        let more = batches(more, |container_stats| StreamContainerStatsResponse {
            container_stats,
        });
        Ok(own.map(|own| own.chain(more).boxed()))
    }

    type StreamPodSandboxStatsStream = Answer<StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<StreamPodSandboxStatsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxStatsStream>, Status> {
        let filter = request.get_ref().filter.clone();
        let own = self.own.stream_pod_sandbox_stats(request).await?;
        let more = self.pod_stats_of_others(filter).await;
        let more = batches(more, |pod_sandbox_stats| StreamPodSandboxStatsResponse {
            pod_sandbox_stats,
        });
        Ok(own.map(|own| own.chain(more).boxed()))
    }

    type StreamPodSandboxMetricsStream = Answer<StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        request: Request<StreamPodSandboxMetricsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxMetricsStream>, Status> {
        let own = self.own.stream_pod_sandbox_metrics(request).await?;
        let more = self.metrics_of_others().await;
        let more = batches(more, |pod_sandbox_metrics| {
            StreamPodSandboxMetricsResponse {
                pod_sandbox_metrics,
            }
        });
        Ok(own.map(|own| own.chain(more).boxed()))
    }

    type GetContainerEventsStream = Answer<ContainerEventResponse>;

    async fn get_container_events(
        &self,
        request: Request<GetEventsRequest>,
    ) -> Result<Response<Self::GetContainerEventsStream>, Status> {
        let own = self.own.get_container_events(request).await?;
        let others: SelectAll<_> = self.delegates().into_iter().map(events).collect();
        // The end of Hull's own is the end.
        Ok(own.map(|own| {
            let own = own.map(Some).chain(stream::iter([None]));
            let others = others.map(Some).chain(stream::pending());
            stream::select(own, others)
                .scan((), |(), event| std::future::ready(event))
                .boxed()
        }))
    }
}

impl Router {
    async fn container_stats_of_others(
        &self,
        filter: Option<ContainerStatsFilter>,
    ) -> Vec<ContainerStats> {
        let ask = |delegate: Arc<Delegate>| {
            let filter = filter.clone();
            async move {
                let request = ListContainerStatsRequest { filter };
                delegate.runtime().list_container_stats(request).await
            }
        };
        let all: Vec<ListContainerStatsResponse> = self.gather(ask).await;
        all.into_iter().flat_map(|answer| answer.stats).collect()
    }

    async fn pod_stats_of_others(
        &self,
        filter: Option<PodSandboxStatsFilter>,
    ) -> Vec<PodSandboxStats> {
        let ask = |delegate: Arc<Delegate>| {
            let filter = filter.clone();
            async move {
                let request = ListPodSandboxStatsRequest { filter };
                delegate.runtime().list_pod_sandbox_stats(request).await
            }
        };
        let all: Vec<ListPodSandboxStatsResponse> = self.gather(ask).await;
        all.into_iter().flat_map(|answer| answer.stats).collect()
    }

    async fn metrics_of_others(&self) -> Vec<PodSandboxMetrics> {
        let ask = |delegate: Arc<Delegate>| async move {
            let request = ListPodSandboxMetricsRequest {};
            delegate.runtime().list_pod_sandbox_metrics(request).await
        };
        let all: Vec<ListPodSandboxMetricsResponse> = self.gather(ask).await;
        all.into_iter()
            .flat_map(|answer| answer.pod_metrics)
            .collect()
    }
}

//! The runtime service: every RPC with its span. One is not served and says so.

use std::future::ready;

use hull_proto_cri::v1::{runtime_service_server::RuntimeService, *};
use tonic::{Request, Response, Status, async_trait};
use tracing::{Span, field, info_span};

use super::{Cri, answer, container, error::CriError, node, pod, stream::Answer};

/// The answer of an RPC that is not served.
async fn refuse<T>(rpc: &'static str, reason: &'static str) -> Result<Response<T>, Status> {
    let span = info_span!("refuse", rpc);
    answer(span, ready(Err(CriError::unsupported(rpc, reason)))).await
}

fn run_span(request: &RunPodSandboxRequest) -> Span {
    let metadata = request.config.as_ref().and_then(|c| c.metadata.as_ref());
    info_span!(
        "RunPodSandbox",
        namespace = metadata.map(|m| m.namespace.as_str()),
        name = metadata.map(|m| m.name.as_str()),
        handler = request.runtime_handler,
        pod = field::Empty,
    )
}

fn create_span(request: &CreateContainerRequest) -> Span {
    let metadata = request.config.as_ref().and_then(|c| c.metadata.as_ref());
    info_span!(
        "CreateContainer",
        pod = request.pod_sandbox_id,
        name = metadata.map(|m| m.name.as_str()),
        container = field::Empty,
    )
}

#[async_trait]
impl RuntimeService for Cri {
    async fn version(
        &self,
        request: Request<VersionRequest>,
    ) -> Result<Response<VersionResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("Version");
        answer(span, ready(node::version::version(&request))).await
    }

    async fn status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("Status");
        answer(span, node::status::status(&self.0, request)).await
    }

    async fn runtime_config(
        &self,
        _: Request<RuntimeConfigRequest>,
    ) -> Result<Response<RuntimeConfigResponse>, Status> {
        let span = info_span!("RuntimeConfig");
        answer(span, ready(node::runtime_config::runtime_config())).await
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<RunPodSandboxRequest>,
    ) -> Result<Response<RunPodSandboxResponse>, Status> {
        let request = request.into_inner();
        let span = run_span(&request);
        answer(span, pod::run::run(&self.0, request)).await
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<StopPodSandboxRequest>,
    ) -> Result<Response<StopPodSandboxResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("StopPodSandbox", pod = request.pod_sandbox_id);
        answer(span, pod::stop::stop(&self.0, request)).await
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<RemovePodSandboxRequest>,
    ) -> Result<Response<RemovePodSandboxResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("RemovePodSandbox", pod = request.pod_sandbox_id);
        answer(span, pod::remove::remove(&self.0, request)).await
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<PodSandboxStatusRequest>,
    ) -> Result<Response<PodSandboxStatusResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("PodSandboxStatus", pod = request.pod_sandbox_id);
        answer(span, pod::status::status(&self.0, request)).await
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<ListPodSandboxRequest>,
    ) -> Result<Response<ListPodSandboxResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("ListPodSandbox");
        answer(span, pod::list::list(&self.0, request)).await
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Result<Response<CreateContainerResponse>, Status> {
        let request = request.into_inner();
        let span = create_span(&request);
        answer(span, container::create::create(&self.0, request)).await
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Result<Response<StartContainerResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("StartContainer", container = request.container_id);
        answer(span, container::start::start(&self.0, request)).await
    }

    async fn stop_container(
        &self,
        request: Request<StopContainerRequest>,
    ) -> Result<Response<StopContainerResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("StopContainer", container = request.container_id);
        answer(span, container::stop::stop(&self.0, request)).await
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Result<Response<RemoveContainerResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("RemoveContainer", container = request.container_id);
        answer(span, container::remove::remove(&self.0, request)).await
    }

    async fn container_status(
        &self,
        request: Request<ContainerStatusRequest>,
    ) -> Result<Response<ContainerStatusResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("ContainerStatus", container = request.container_id);
        answer(span, container::status::status(&self.0, request)).await
    }

    async fn list_containers(
        &self,
        request: Request<ListContainersRequest>,
    ) -> Result<Response<ListContainersResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("ListContainers");
        answer(span, container::list::list(&self.0, request)).await
    }

    async fn exec_sync(
        &self,
        request: Request<ExecSyncRequest>,
    ) -> Result<Response<ExecSyncResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("ExecSync", container = request.container_id);
        answer(span, container::exec_sync::exec_sync(&self.0, request)).await
    }

    async fn reopen_container_log(
        &self,
        request: Request<ReopenContainerLogRequest>,
    ) -> Result<Response<ReopenContainerLogResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("ReopenContainerLog", container = request.container_id);
        answer(span, container::reopen_log::reopen_log(&self.0, request)).await
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Result<Response<ExecResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("Exec", container = request.container_id);
        answer(span, container::exec::exec(&self.0, request)).await
    }

    async fn attach(
        &self,
        request: Request<AttachRequest>,
    ) -> Result<Response<AttachResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("Attach", container = request.container_id);
        answer(span, container::attach::attach(&self.0, request)).await
    }

    async fn port_forward(
        &self,
        request: Request<PortForwardRequest>,
    ) -> Result<Response<PortForwardResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("PortForward", pod = request.pod_sandbox_id);
        answer(span, pod::port_forward::port_forward(&self.0, request)).await
    }

    async fn update_container_resources(
        &self,
        request: Request<UpdateContainerResourcesRequest>,
    ) -> Result<Response<UpdateContainerResourcesResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("UpdateContainerResources", container = request.container_id);
        answer(span, container::update::update(&self.0, request)).await
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<UpdatePodSandboxResourcesRequest>,
    ) -> Result<Response<UpdatePodSandboxResourcesResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("UpdatePodSandboxResources", pod = request.pod_sandbox_id);
        answer(span, pod::update::update(&self.0, request)).await
    }

    async fn update_runtime_config(
        &self,
        request: Request<UpdateRuntimeConfigRequest>,
    ) -> Result<Response<UpdateRuntimeConfigResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("UpdateRuntimeConfig");
        answer(span, ready(node::update_config::update(request))).await
    }

    async fn container_stats(
        &self,
        request: Request<ContainerStatsRequest>,
    ) -> Result<Response<ContainerStatsResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("ContainerStats", container = request.container_id);
        answer(span, container::stats::stats(&self.0, request)).await
    }

    async fn list_container_stats(
        &self,
        request: Request<ListContainerStatsRequest>,
    ) -> Result<Response<ListContainerStatsResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("ListContainerStats");
        answer(span, container::stats::list(&self.0, request)).await
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<PodSandboxStatsRequest>,
    ) -> Result<Response<PodSandboxStatsResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("PodSandboxStats", pod = request.pod_sandbox_id);
        answer(span, pod::stats::stats(&self.0, request)).await
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<ListPodSandboxStatsRequest>,
    ) -> Result<Response<ListPodSandboxStatsResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("ListPodSandboxStats");
        answer(span, pod::stats::list(&self.0, request)).await
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<ListMetricDescriptorsRequest>,
    ) -> Result<Response<ListMetricDescriptorsResponse>, Status> {
        let span = info_span!("ListMetricDescriptors");
        answer(span, ready(Ok(pod::metrics::descriptors()))).await
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<ListPodSandboxMetricsRequest>,
    ) -> Result<Response<ListPodSandboxMetricsResponse>, Status> {
        let span = info_span!("ListPodSandboxMetrics");
        answer(span, pod::metrics::list(&self.0)).await
    }

    async fn checkpoint_pod(
        &self,
        request: Request<CheckpointPodRequest>,
    ) -> Result<Response<CheckpointPodResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("CheckpointPod", pod = request.pod_sandbox_id);
        answer(span, pod::checkpoint::checkpoint(&self.0, request)).await
    }

    async fn restore_pod(
        &self,
        request: Request<RestorePodRequest>,
    ) -> Result<Response<RestorePodResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!(
            "RestorePod",
            checkpoint = request.checkpoint_path,
            handler = request.runtime_handler,
            pod = field::Empty,
        );
        answer(span, pod::checkpoint::restore(&self.0, request)).await
    }

    async fn checkpoint_container(
        &self,
        _: Request<CheckpointContainerRequest>,
    ) -> Result<Response<CheckpointContainerResponse>, Status> {
        refuse(
            "CheckpointContainer",
            "a checkpoint is of a VM, and so of a whole pod: CheckpointPod makes one",
        )
        .await
    }

    type StreamPodSandboxesStream = Answer<StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<StreamPodSandboxesRequest>,
    ) -> Result<Response<Self::StreamPodSandboxesStream>, Status> {
        let request = request.into_inner();
        let span = info_span!("StreamPodSandboxes");
        answer(span, pod::list::stream(&self.0, request)).await
    }

    type StreamContainersStream = Answer<StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<StreamContainersRequest>,
    ) -> Result<Response<Self::StreamContainersStream>, Status> {
        let request = request.into_inner();
        let span = info_span!("StreamContainers");
        answer(span, container::list::stream(&self.0, request)).await
    }

    type StreamContainerStatsStream = Answer<StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<StreamContainerStatsRequest>,
    ) -> Result<Response<Self::StreamContainerStatsStream>, Status> {
        let request = request.into_inner();
        let span = info_span!("StreamContainerStats");
        answer(span, container::stats::stream(&self.0, request)).await
    }

    type StreamPodSandboxStatsStream = Answer<StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<StreamPodSandboxStatsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxStatsStream>, Status> {
        let request = request.into_inner();
        let span = info_span!("StreamPodSandboxStats");
        answer(span, pod::stats::stream(&self.0, request)).await
    }

    type StreamPodSandboxMetricsStream = Answer<StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<StreamPodSandboxMetricsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxMetricsStream>, Status> {
        let span = info_span!("StreamPodSandboxMetrics");
        answer(span, pod::metrics::stream(&self.0)).await
    }

    type GetContainerEventsStream = Answer<ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _: Request<GetEventsRequest>,
    ) -> Result<Response<Self::GetContainerEventsStream>, Status> {
        let span = info_span!("GetContainerEvents");
        answer(span, ready(container::events::events(&self.0))).await
    }
}

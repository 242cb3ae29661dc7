//! The CRI: gRPC in, our words through, gRPC out. Nothing is decided here.

mod admin;
mod checkpoint;
mod convert;
mod image_admin;
mod images;
mod metrics;
mod stats;
mod status;
mod streams;

use std::{sync::Arc, time::Duration};

use holdfast_protos::cri::{self, runtime_service_server::RuntimeService};
use holdfast_streaming::{AttachRequest, ExecRequest, PortForwardRequest, Server};
use tonic::{Request, Response, Status};

use crate::{
    error::{Kinded, chain, status as to_status},
    pod::{self, ContainerView, Pod, PodView, Pods, state::PodState},
};

/// The CRI services and our Admin service.
#[derive(Clone)]
pub struct Service {
    pods: Pods,
    stats: Arc<crate::stats::Stats>,
    streaming: Arc<Server>,
}

impl Service {
    /// Over these pods; exec, attach and port-forward are sent to that server.
    pub fn new(pods: Pods, streaming: Arc<Server>) -> Self {
        let stats = Arc::new(crate::stats::Stats::new(pods.services().clone()));
        Self { pods, stats, streaming }
    }

    fn running(&self, container: String) -> Result<(Pod, Arc<ContainerView>), Status> {
        let id = id("container_id", container)?;
        self.pods.find_running(&id).map_err(|e| to_status(&e))
    }

    fn select_pods(&self, filter: cri::PodSandboxFilter) -> Vec<Arc<PodView>> {
        let mut pods = self.pods.list();
        pods.retain(|pod| convert::pod_matches(pod, &filter));
        pods
    }

    fn select_containers(&self, filter: cri::ContainerFilter) -> Vec<Arc<ContainerView>> {
        let pods = self.pods.list();
        let containers = pods.iter().flat_map(|pod| pod.containers.values());
        containers.filter(|c| convert::container_matches(c, &filter)).cloned().collect()
    }

    /// Those that have usage to report.
    fn select_running(&self, filter: cri::ContainerStatsFilter) -> Vec<Arc<ContainerView>> {
        self.stats.retain(|id| self.pods.has_pod(id), |id| self.pods.has_container(id));
        self.select_containers(cri::ContainerFilter {
            id: filter.id,
            state: Some(cri::ContainerStateValue {
                state: cri::ContainerState::ContainerRunning as i32,
            }),
            pod_sandbox_id: filter.pod_sandbox_id,
            label_selector: filter.label_selector,
        })
    }

    fn select_ready(&self, filter: cri::PodSandboxStatsFilter) -> Vec<Arc<PodView>> {
        self.stats.retain(|id| self.pods.has_pod(id), |id| self.pods.has_container(id));
        self.select_pods(cri::PodSandboxFilter {
            id: filter.id,
            state: Some(cri::PodSandboxStateValue {
                state: cri::PodSandboxState::SandboxReady as i32,
            }),
            label_selector: filter.label_selector,
        })
    }
}

type Answer<T> = Result<Response<T>, Status>;

fn failed(error: Arc<pod::Error>) -> Status {
    Status::new(error.kind().code(), chain(&*error))
}

/// Why there is no URL to stream at.
fn no_url(error: &holdfast_streaming::Error) -> Status {
    let code = match error {
        holdfast_streaming::Error::Invalid(_) => tonic::Code::InvalidArgument,
        holdfast_streaming::Error::TooMany { .. } => tonic::Code::ResourceExhausted,
        _ => tonic::Code::Internal,
    };
    Status::new(code, chain(error))
}

fn id(field: &str, id: String) -> Result<String, Status> {
    match id.is_empty() {
        true => Err(Status::invalid_argument(format!("{field}: it is required"))),
        false => Ok(id),
    }
}

/// A timeout in seconds as the CRI has it; 0: none.
fn seconds(field: &str, seconds: i64) -> Result<Option<Duration>, Status> {
    match u64::try_from(seconds) {
        Ok(0) => Ok(None),
        // A century is as good as any larger number, and does not overflow a clock.
        Ok(seconds) => Ok(Some(Duration::from_secs(seconds.min(100 * 365 * 86_400)))),
        Err(_) => Err(Status::invalid_argument(format!("{field}: {seconds} is negative"))),
    }
}

#[tonic::async_trait]
impl RuntimeService for Service {
    async fn version(&self, _: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
        Ok(Response::new(cri::VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "holdfast".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            runtime_api_version: "v1".into(),
        }))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Answer<cri::RunPodSandboxResponse> {
        let request = request.into_inner();
        let config =
            request.config.ok_or_else(|| Status::invalid_argument("config: it is required"))?;
        let config = convert::pod_config(config)?;
        let id = self.pods.run(config, &request.runtime_handler).await.map_err(failed)?;
        Ok(Response::new(cri::RunPodSandboxResponse { pod_sandbox_id: id.to_string() }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Answer<cri::StopPodSandboxResponse> {
        let id = id("pod_sandbox_id", request.into_inner().pod_sandbox_id)?;
        self.pods.stop_pod(&id).await.map_err(failed)?;
        Ok(Response::new(cri::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Answer<cri::RemovePodSandboxResponse> {
        let id = id("pod_sandbox_id", request.into_inner().pod_sandbox_id)?;
        self.pods.remove_pod(&id).await.map_err(failed)?;
        Ok(Response::new(cri::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Answer<cri::PodSandboxStatusResponse> {
        let request = request.into_inner();
        let id = id("pod_sandbox_id", request.pod_sandbox_id)?;
        // Before looking: the kubelet takes no event that is older than a status, so a status must not
        // claim to know what happened while it was put together.
        let at = std::time::SystemTime::now();
        let view = self.pods.find(&id).map_err(|e| to_status(&e))?.view();
        Ok(Response::new(cri::PodSandboxStatusResponse {
            status: Some(convert::pod_status(&view)),
            info: match request.verbose {
                true => status::pod_info(&view),
                false => Default::default(),
            },
            containers_statuses: convert::container_statuses(&view),
            timestamp: convert::nanos(at),
        }))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        let pods = self.select_pods(request.into_inner().filter.unwrap_or_default());
        let items = pods.iter().map(|pod| convert::pod_item(pod)).collect();
        Ok(Response::new(cri::ListPodSandboxResponse { items }))
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        let request = request.into_inner();
        let pod = id("pod_sandbox_id", request.pod_sandbox_id)?;
        let config =
            request.config.ok_or_else(|| Status::invalid_argument("config: it is required"))?;
        let config = convert::container_config(config)?;
        let again = config.attempt > 0;
        let id = self.pods.create(&pod, config).await.map_err(failed)?;
        if again {
            crate::metrics::counts().container_restarts.inc();
        }
        Ok(Response::new(cri::CreateContainerResponse { container_id: id.to_string() }))
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Answer<cri::StartContainerResponse> {
        let id = id("container_id", request.into_inner().container_id)?;
        self.pods.start(&id).await.map_err(failed)?;
        Ok(Response::new(cri::StartContainerResponse {}))
    }

    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Answer<cri::StopContainerResponse> {
        let request = request.into_inner();
        let id = id("container_id", request.container_id)?;
        let grace = seconds("timeout", request.timeout.max(0))?.unwrap_or_default();
        self.pods.stop(&id, grace).await.map_err(failed)?;
        Ok(Response::new(cri::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Answer<cri::RemoveContainerResponse> {
        let id = id("container_id", request.into_inner().container_id)?;
        self.pods.remove(&id).await.map_err(failed)?;
        Ok(Response::new(cri::RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Answer<cri::ListContainersResponse> {
        let containers = self.select_containers(request.into_inner().filter.unwrap_or_default());
        let containers = containers.iter().map(|c| convert::container_item(c)).collect();
        Ok(Response::new(cri::ListContainersResponse { containers }))
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Answer<cri::ContainerStatusResponse> {
        let request = request.into_inner();
        let id = id("container_id", request.container_id)?;
        let (pod, container) = self.pods.find_container(&id).map_err(|e| to_status(&e))?;
        Ok(Response::new(cri::ContainerStatusResponse {
            status: Some(convert::container_status(&container)),
            info: match request.verbose {
                true => status::container_info(self.pods.services(), &pod.view(), &container),
                false => Default::default(),
            },
        }))
    }

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Answer<cri::UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        let id = id("container_id", request.container_id)?;
        let linux =
            request.linux.ok_or_else(|| Status::invalid_argument("linux: it is required"))?;
        self.pods.update(&id, convert::resources(linux)).await.map_err(failed)?;
        Ok(Response::new(cri::UpdateContainerResourcesResponse {}))
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Answer<cri::ReopenContainerLogResponse> {
        let id = id("container_id", request.into_inner().container_id)?;
        self.pods.reopen_log(&id).await.map_err(|e| to_status(&e))?;
        Ok(Response::new(cri::ReopenContainerLogResponse {}))
    }

    async fn exec_sync(
        &self,
        request: Request<cri::ExecSyncRequest>,
    ) -> Answer<cri::ExecSyncResponse> {
        let request = request.into_inner();
        let id = id("container_id", request.container_id)?;
        if request.cmd.is_empty() {
            return Err(Status::invalid_argument("cmd: it is required"));
        }
        if request.cmd.iter().any(|arg| arg.contains('\0')) {
            return Err(Status::invalid_argument("cmd: an argument has a NUL character"));
        }
        let timeout = seconds("timeout", request.timeout)?;
        let output = self.pods.exec_sync(&id, request.cmd, timeout).await;
        let output = output.map_err(|e| to_status(&e))?;
        Ok(Response::new(cri::ExecSyncResponse {
            stdout: output.stdout,
            stderr: output.stderr,
            exit_code: output.code,
        }))
    }

    async fn exec(&self, request: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
        let request = request.into_inner();
        let (_, container) = self.running(request.container_id)?;
        let url = self.streaming.exec_url(ExecRequest {
            container: container.record.id.to_string(),
            command: request.cmd,
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        });
        Ok(Response::new(cri::ExecResponse { url: url.map_err(|e| no_url(&e))? }))
    }

    async fn attach(&self, request: Request<cri::AttachRequest>) -> Answer<cri::AttachResponse> {
        let request = request.into_inner();
        let id = id("container_id", request.container_id)?;
        let (_, container) = self.pods.find_attachable(&id).map_err(|e| to_status(&e))?;
        let url = self.streaming.attach_url(AttachRequest {
            container: container.record.id.to_string(),
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        });
        Ok(Response::new(cri::AttachResponse { url: url.map_err(|e| no_url(&e))? }))
    }

    async fn port_forward(
        &self,
        request: Request<cri::PortForwardRequest>,
    ) -> Answer<cri::PortForwardResponse> {
        let request = request.into_inner();
        let id = id("pod_sandbox_id", request.pod_sandbox_id)?;
        let pod = self.pods.find(&id).map_err(|e| to_status(&e))?;
        if pod.view().record.state != PodState::Ready {
            return Err(to_status(&pod::Error::PodNotReady(pod.id().clone())));
        }
        let port = |port: i32| {
            u16::try_from(port)
                .map_err(|_| Status::invalid_argument(format!("port: {port} is not a port")))
        };
        let url = self.streaming.port_forward_url(PortForwardRequest {
            pod: pod.id().to_string(),
            ports: request.port.into_iter().map(port).collect::<Result<_, _>>()?,
        });
        Ok(Response::new(cri::PortForwardResponse { url: url.map_err(|e| no_url(&e))? }))
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Answer<cri::ContainerStatsResponse> {
        let id = id("container_id", request.into_inner().container_id)?;
        let (_, container) = self.pods.find_container(&id).map_err(|e| to_status(&e))?;
        let stats = stats::containers(&self.stats, vec![container]).await?.pop();
        Ok(Response::new(cri::ContainerStatsResponse { stats }))
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Answer<cri::ListContainerStatsResponse> {
        let containers = self.select_running(request.into_inner().filter.unwrap_or_default());
        let stats = stats::containers(&self.stats, containers).await?;
        Ok(Response::new(cri::ListContainerStatsResponse { stats }))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<cri::PodSandboxStatsRequest>,
    ) -> Answer<cri::PodSandboxStatsResponse> {
        let id = id("pod_sandbox_id", request.into_inner().pod_sandbox_id)?;
        let view = self.pods.find(&id).map_err(|e| to_status(&e))?.view();
        let stats = stats::pods(&self.stats, vec![view]).await?.pop();
        Ok(Response::new(cri::PodSandboxStatsResponse { stats }))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Answer<cri::ListPodSandboxStatsResponse> {
        let pods = self.select_ready(request.into_inner().filter.unwrap_or_default());
        let stats = stats::pods(&self.stats, pods).await?;
        Ok(Response::new(cri::ListPodSandboxStatsResponse { stats }))
    }

    async fn update_runtime_config(
        &self,
        _: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Answer<cri::UpdateRuntimeConfigResponse> {
        // The pod CIDR is for runtimes that write the network configuration; ours is a file.
        Ok(Response::new(cri::UpdateRuntimeConfigResponse {}))
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        let verbose = request.into_inner().verbose;
        Ok(Response::new(status::status(&self.pods, verbose).await))
    }

    async fn runtime_config(
        &self,
        _: Request<cri::RuntimeConfigRequest>,
    ) -> Answer<cri::RuntimeConfigResponse> {
        let driver = match self.pods.services().config.runtime.cgroup_driver {
            crate::config::CgroupDriver::Systemd => cri::CgroupDriver::Systemd,
            crate::config::CgroupDriver::Cgroupfs => cri::CgroupDriver::Cgroupfs,
        };
        let linux = cri::LinuxRuntimeConfiguration { cgroup_driver: driver as i32 };
        Ok(Response::new(cri::RuntimeConfigResponse { linux: Some(linux) }))
    }

    async fn checkpoint_container(
        &self,
        request: Request<cri::CheckpointContainerRequest>,
    ) -> Answer<cri::CheckpointContainerResponse> {
        checkpoint::container(self, request).await
    }

    async fn checkpoint_pod(
        &self,
        request: Request<cri::CheckpointPodRequest>,
    ) -> Answer<cri::CheckpointPodResponse> {
        checkpoint::pod(self, request).await
    }

    async fn restore_pod(
        &self,
        request: Request<cri::RestorePodRequest>,
    ) -> Answer<cri::RestorePodResponse> {
        checkpoint::restore(self, request).await
    }

    type GetContainerEventsStream = streams::Answers<cri::ContainerEventResponse>;
    async fn get_container_events(
        &self,
        request: Request<cri::GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        let _ = request;
        let events = &self.pods.services().events;
        Ok(Response::new(streams::events(events, self.pods.clone())))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Answer<cri::ListMetricDescriptorsResponse> {
        let descriptors = metrics::descriptors();
        Ok(Response::new(cri::ListMetricDescriptorsResponse { descriptors }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Answer<cri::ListPodSandboxMetricsResponse> {
        let pods = self.select_ready(Default::default());
        let pod_metrics = metrics::pods(&self.stats, pods).await?;
        let answer = cri::ListPodSandboxMetricsResponse { pod_metrics };
        metrics::fits(&answer)?;
        Ok(Response::new(answer))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<cri::UpdatePodSandboxResourcesResponse> {
        let request = request.into_inner();
        let id = id("pod_sandbox_id", request.pod_sandbox_id)?;
        let overhead = request.overhead.map(convert::resources);
        let resources = request.resources.map(convert::resources);
        self.pods.update_pod(&id, overhead, resources).await.map_err(failed)?;
        Ok(Response::new(cri::UpdatePodSandboxResourcesResponse {}))
    }

    type StreamPodSandboxesStream = streams::Answers<cri::StreamPodSandboxesResponse>;
    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let pods = self.select_pods(request.into_inner().filter.unwrap_or_default());
        let message = |pod_sandboxes| cri::StreamPodSandboxesResponse { pod_sandboxes };
        Ok(Response::new(streams::list(pods, |pod| convert::pod_item(pod), message)))
    }

    type StreamContainersStream = streams::Answers<cri::StreamContainersResponse>;
    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let containers = self.select_containers(request.into_inner().filter.unwrap_or_default());
        let message = |containers| cri::StreamContainersResponse { containers };
        Ok(Response::new(streams::list(containers, |c| convert::container_item(c), message)))
    }

    type StreamContainerStatsStream = streams::Answers<cri::StreamContainerStatsResponse>;
    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let containers = self.select_running(request.into_inner().filter.unwrap_or_default());
        Ok(Response::new(streams::container_stats(self.stats.clone(), containers)))
    }

    type StreamPodSandboxStatsStream = streams::Answers<cri::StreamPodSandboxStatsResponse>;
    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let pods = self.select_ready(request.into_inner().filter.unwrap_or_default());
        Ok(Response::new(streams::pod_stats(self.stats.clone(), pods)))
    }

    type StreamPodSandboxMetricsStream = streams::Answers<cri::StreamPodSandboxMetricsResponse>;
    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let pods = self.select_ready(Default::default());
        Ok(Response::new(streams::pod_metrics(self.stats.clone(), pods)))
    }
}

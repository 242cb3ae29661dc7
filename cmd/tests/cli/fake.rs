//! A CRI server on a temporary socket, with just enough memory to be asked things: what a pod or
//! container is given is kept, each call is noted, and any call can be made to fail.

use std::{
    collections::{HashMap, VecDeque},
    fs,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};

use holdfast_protos::{
    admin::{
        self,
        admin_server::{Admin, AdminServer},
    },
    cri::{
        self,
        image_service_server::{ImageService, ImageServiceServer},
        runtime_service_server::{RuntimeService, RuntimeServiceServer},
    },
};
use tokio::net::UnixListener;
use tokio_stream::{Stream, StreamExt as _, wrappers::UnixListenerStream};
use tonic::{Code, Request, Response, Status, Streaming, transport::Server};

type Answer<T> = Result<Response<T>, Status>;
type Items<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the server knows and what it was asked.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) pods: Vec<cri::PodSandbox>,
    pub(crate) containers: Vec<cri::Container>,
    pub(crate) status: HashMap<String, cri::ContainerStatus>,
    pub(crate) images: Vec<cri::Image>,
    pub(crate) stats: VecDeque<Vec<cri::ContainerStats>>,
    pub(crate) exec: cri::ExecSyncResponse,
    /// What StartContainer writes to the container's log.
    pub(crate) log: String,
    /// The exit code a started container has at once; `None`: it goes on running.
    pub(crate) exits: Option<i32>,
    /// By name of the call.
    pub(crate) failures: HashMap<&'static str, (Code, &'static str)>,
    /// Names of the calls that change something, with their object.
    pub(crate) calls: Vec<String>,
    pub(crate) pod_configs: Vec<cri::PodSandboxConfig>,
    pub(crate) container_configs: Vec<cri::ContainerConfig>,
    pub(crate) pulls: Vec<admin::PullImageRequest>,
    pub(crate) imported: Vec<u8>,
    pub(crate) import_name: String,
    pub(crate) not_ready: bool,
    /// RunPodSandbox makes the pod and does not answer.
    pub(crate) mute: bool,
    pub(crate) has_admin: bool,
    /// What makes the URLs of Exec, Attach and PortForward.
    pub(crate) streaming: Option<Arc<holdfast_streaming::Server>>,
    pub(crate) container_info: String,
}

/// The server.
#[derive(Clone)]
pub(crate) struct Fake {
    state: Arc<Mutex<State>>,
    pub(crate) socket: PathBuf,
}

impl Fake {
    /// Serves on `DIR/cri.sock` until the test's runtime ends.
    pub(crate) fn serve(dir: &Path, state: State) -> Self {
        let socket = dir.join("cri.sock");
        let fake = Self { state: Arc::new(Mutex::new(state)), socket };
        let listener = UnixListener::bind(&fake.socket).unwrap();
        let server = Server::builder()
            .add_service(RuntimeServiceServer::new(fake.clone()))
            .add_service(ImageServiceServer::new(fake.clone()));
        let server = if fake.state().has_admin {
            server.add_service(AdminServer::new(fake.clone()))
        } else {
            server
        };
        tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        fake
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Notes a call; fails it if it was told to.
    fn call(&self, name: &'static str, object: &str) -> Result<MutexGuard<'_, State>, Status> {
        let mut state = self.state();
        state.calls.push(format!("{name} {object}").trim_end().to_owned());
        match state.failures.get(name) {
            Some((code, message)) => Err(Status::new(*code, *message)),
            None => Ok(state),
        }
    }
}

fn value(value: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value })
}

macro_rules! not_asked {
    ($($name:ident($request:ident) -> $response:ty;)*) => {
        $(fn $name<'a, 'b>(
            &'a self,
            _: Request<cri::$request>,
        ) -> Pin<Box<dyn Future<Output = Answer<$response>> + Send + 'b>>
        where
            'a: 'b,
            Self: 'b,
        {
            Box::pin(async { Err(Status::unimplemented(stringify!($name))) })
        })*
    };
}

#[tonic::async_trait]
impl RuntimeService for Fake {
    type StreamPodSandboxesStream = Items<cri::StreamPodSandboxesResponse>;
    type StreamContainersStream = Items<cri::StreamContainersResponse>;
    type StreamContainerStatsStream = Items<cri::StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = Items<cri::StreamPodSandboxStatsResponse>;
    type GetContainerEventsStream = Items<cri::ContainerEventResponse>;
    type StreamPodSandboxMetricsStream = Items<cri::StreamPodSandboxMetricsResponse>;

    async fn version(&self, _: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
        Ok(Response::new(cri::VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "fake".into(),
            runtime_version: "1.2.3".into(),
            runtime_api_version: "v1".into(),
        }))
    }

    async fn status(&self, _: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        let ready = cri::RuntimeCondition {
            r#type: "RuntimeReady".into(),
            status: true,
            ..Default::default()
        };
        let network = cri::RuntimeCondition {
            r#type: "NetworkReady".into(),
            status: !self.state().not_ready,
            reason: "NoNetworkConfig".into(),
            message: "no file in /etc/cni/net.d".into(),
        };
        Ok(Response::new(cri::StatusResponse {
            status: Some(cri::RuntimeStatus { conditions: vec![ready, network] }),
            info: [("config".to_owned(), "{\"root\":\"/x\"}".to_owned())].into(),
            runtime_handlers: ["runc", "", "crun"]
                .map(|name| cri::RuntimeHandler { name: name.into(), features: None })
                .into(),
            features: None,
        }))
    }

    async fn runtime_config(
        &self,
        _: Request<cri::RuntimeConfigRequest>,
    ) -> Answer<cri::RuntimeConfigResponse> {
        let linux =
            cri::LinuxRuntimeConfiguration { cgroup_driver: cri::CgroupDriver::Cgroupfs.into() };
        Ok(Response::new(cri::RuntimeConfigResponse { linux: Some(linux) }))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let mut items = self.state().pods.clone();
        items.retain(|p| filter.state.is_none_or(|s| s.state == p.state));
        items.retain(|p| filter.label_selector.iter().all(|(k, v)| p.labels.get(k) == Some(v)));
        Ok(Response::new(cri::ListPodSandboxResponse { items }))
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Answer<cri::ListContainersResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let mut containers = self.state().containers.clone();
        containers.retain(|c| filter.state.is_none_or(|s| s.state == c.state));
        let pod = &filter.pod_sandbox_id;
        containers.retain(|c| pod.is_empty() || c.pod_sandbox_id == *pod);
        Ok(Response::new(cri::ListContainersResponse { containers }))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Answer<cri::PodSandboxStatusResponse> {
        let request = request.into_inner();
        let state = self.state();
        let pod = state.pods.iter().find(|p| p.id == request.pod_sandbox_id);
        let pod = pod.ok_or_else(|| Status::not_found("no such pod"))?;
        let status = cri::PodSandboxStatus {
            id: pod.id.clone(),
            metadata: pod.metadata.clone(),
            state: pod.state,
            ..Default::default()
        };
        Ok(Response::new(cri::PodSandboxStatusResponse {
            status: Some(status),
            info: [("shim".to_owned(), "{\"pid\":7}".to_owned())].into(),
            ..Default::default()
        }))
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Answer<cri::ContainerStatusResponse> {
        let id = request.into_inner().container_id;
        let state = self.state();
        if let Some((code, message)) = state.failures.get("ContainerStatus") {
            return Err(Status::new(*code, *message));
        }
        let status = state.status.get(&id).cloned();
        let status = status.ok_or_else(|| Status::not_found("no such container"))?;
        Ok(Response::new(cri::ContainerStatusResponse {
            status: Some(status),
            info: [("info".to_owned(), state.container_info.clone())].into(),
        }))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Answer<cri::RunPodSandboxResponse> {
        let request = request.into_inner();
        let (pod_sandbox_id, mute) = {
            let config = request.config.unwrap();
            let mut state = self.call("RunPodSandbox", &request.runtime_handler)?;
            let id = format!("{:0>64}", state.pods.len() + 0xa0);
            state.pods.push(cri::PodSandbox {
                id: id.clone(),
                metadata: config.metadata.clone(),
                annotations: config.annotations.clone(),
                labels: config.labels.clone(),
                ..Default::default()
            });
            state.pod_configs.push(config);
            (id, state.mute)
        };
        if mute {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(cri::RunPodSandboxResponse { pod_sandbox_id }))
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        let request = request.into_inner();
        let config = request.config.unwrap();
        let mut state = self.call("CreateContainer", "")?;
        let id = format!("{:0>64}", state.containers.len() + 0xc0);
        let log = PathBuf::from(request.sandbox_config.unwrap().log_directory);
        state.containers.push(cri::Container {
            id: id.clone(),
            pod_sandbox_id: request.pod_sandbox_id,
            metadata: config.metadata.clone(),
            ..Default::default()
        });
        let status = cri::ContainerStatus {
            id: id.clone(),
            log_path: log.join(&config.log_path).to_string_lossy().into_owned(),
            ..Default::default()
        };
        state.status.insert(id.clone(), status);
        state.container_configs.push(config);
        Ok(Response::new(cri::CreateContainerResponse { container_id: id }))
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Answer<cri::StartContainerResponse> {
        let id = request.into_inner().container_id;
        let mut state = self.call("StartContainer", "")?;
        let (log, exits) = (state.log.clone(), state.exits);
        let status = state.status.get_mut(&id).unwrap();
        fs::write(&status.log_path, log).unwrap();
        status.state = cri::ContainerState::ContainerRunning.into();
        if let Some(code) = exits {
            status.state = cri::ContainerState::ContainerExited.into();
            status.exit_code = code;
        }
        let now = status.state;
        state.containers.iter_mut().find(|c| c.id == id).unwrap().state = now;
        Ok(Response::new(cri::StartContainerResponse {}))
    }

    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Answer<cri::StopContainerResponse> {
        let request = request.into_inner();
        let object = format!("{} {}", request.container_id, request.timeout);
        let mut state = self.call("StopContainer", &object)?;
        if let Some(status) = state.status.get_mut(&request.container_id) {
            status.state = cri::ContainerState::ContainerExited.into();
            status.exit_code = 143;
        }
        Ok(Response::new(cri::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Answer<cri::RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        self.call("RemoveContainer", &id)?.containers.retain(|c| c.id != id);
        Ok(Response::new(cri::RemoveContainerResponse {}))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Answer<cri::StopPodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        let mut state = self.call("StopPodSandbox", &id)?;
        for pod in state.pods.iter_mut().filter(|p| p.id == id) {
            pod.state = cri::PodSandboxState::SandboxNotready.into();
        }
        Ok(Response::new(cri::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Answer<cri::RemovePodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        self.call("RemovePodSandbox", &id)?.pods.retain(|p| p.id != id);
        Ok(Response::new(cri::RemovePodSandboxResponse {}))
    }

    async fn exec_sync(
        &self,
        request: Request<cri::ExecSyncRequest>,
    ) -> Answer<cri::ExecSyncResponse> {
        let request = request.into_inner();
        let object =
            format!("{} {} {}", request.container_id, request.timeout, request.cmd.join(" "));
        let state = self.call("ExecSync", &object)?;
        Ok(Response::new(state.exec.clone()))
    }

    async fn exec(&self, request: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
        let request = request.into_inner();
        let state = self.call("Exec", &request.cmd.join(" "))?;
        let url = state.streaming.as_ref().unwrap().exec_url(holdfast_streaming::ExecRequest {
            container: request.container_id,
            command: request.cmd,
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        });
        Ok(Response::new(cri::ExecResponse { url: url.unwrap() }))
    }

    async fn attach(&self, request: Request<cri::AttachRequest>) -> Answer<cri::AttachResponse> {
        let request = request.into_inner();
        let state = self.call("Attach", "")?;
        let url = state.streaming.as_ref().unwrap().attach_url(holdfast_streaming::AttachRequest {
            container: request.container_id,
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        });
        Ok(Response::new(cri::AttachResponse { url: url.unwrap() }))
    }

    async fn port_forward(
        &self,
        request: Request<cri::PortForwardRequest>,
    ) -> Answer<cri::PortForwardResponse> {
        let request = request.into_inner();
        let state = self.call("PortForward", "")?;
        let url = state.streaming.as_ref().unwrap().port_forward_url(
            holdfast_streaming::PortForwardRequest {
                pod: request.pod_sandbox_id,
                ports: request.port.into_iter().map(|port| port as u16).collect(),
            },
        );
        Ok(Response::new(cri::PortForwardResponse { url: url.unwrap() }))
    }

    async fn list_container_stats(
        &self,
        _: Request<cri::ListContainerStatsRequest>,
    ) -> Answer<cri::ListContainerStatsResponse> {
        let stats = self.state().stats.pop_front().unwrap_or_default();
        Ok(Response::new(cri::ListContainerStatsResponse { stats }))
    }

    not_asked! {
        stream_pod_sandboxes(StreamPodSandboxesRequest) -> Self::StreamPodSandboxesStream;
        stream_containers(StreamContainersRequest) -> Self::StreamContainersStream;
        stream_container_stats(StreamContainerStatsRequest) -> Self::StreamContainerStatsStream;
        stream_pod_sandbox_stats(StreamPodSandboxStatsRequest) -> Self::StreamPodSandboxStatsStream;
        get_container_events(GetEventsRequest) -> Self::GetContainerEventsStream;
        stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest)
            -> Self::StreamPodSandboxMetricsStream;
        update_container_resources(UpdateContainerResourcesRequest)
            -> cri::UpdateContainerResourcesResponse;
        reopen_container_log(ReopenContainerLogRequest) -> cri::ReopenContainerLogResponse;
        container_stats(ContainerStatsRequest) -> cri::ContainerStatsResponse;
        pod_sandbox_stats(PodSandboxStatsRequest) -> cri::PodSandboxStatsResponse;
        list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> cri::ListPodSandboxStatsResponse;
        update_runtime_config(UpdateRuntimeConfigRequest) -> cri::UpdateRuntimeConfigResponse;
        checkpoint_container(CheckpointContainerRequest) -> cri::CheckpointContainerResponse;
        checkpoint_pod(CheckpointPodRequest) -> cri::CheckpointPodResponse;
        restore_pod(RestorePodRequest) -> cri::RestorePodResponse;
        list_metric_descriptors(ListMetricDescriptorsRequest) -> cri::ListMetricDescriptorsResponse;
        list_pod_sandbox_metrics(ListPodSandboxMetricsRequest)
            -> cri::ListPodSandboxMetricsResponse;
        update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest)
            -> cri::UpdatePodSandboxResourcesResponse;
    }
}

#[tonic::async_trait]
impl ImageService for Fake {
    type StreamImagesStream = Items<cri::StreamImagesResponse>;

    async fn list_images(
        &self,
        _: Request<cri::ListImagesRequest>,
    ) -> Answer<cri::ListImagesResponse> {
        Ok(Response::new(cri::ListImagesResponse { images: self.state().images.clone() }))
    }

    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Answer<cri::ImageStatusResponse> {
        let name = request.into_inner().image.unwrap().image;
        let images = &self.state().images;
        let image = images.iter().find(|i| i.id == name || i.repo_tags.contains(&name)).cloned();
        Ok(Response::new(cri::ImageStatusResponse { image, info: HashMap::new() }))
    }

    async fn pull_image(
        &self,
        request: Request<cri::PullImageRequest>,
    ) -> Answer<cri::PullImageResponse> {
        let image = request.into_inner().image.unwrap().image;
        drop(self.call("CriPullImage", &image)?);
        Ok(Response::new(cri::PullImageResponse { image_ref: "sha256:c41".into() }))
    }

    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Answer<cri::RemoveImageResponse> {
        drop(self.call("RemoveImage", &request.into_inner().image.unwrap().image)?);
        Ok(Response::new(cri::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _: Request<cri::ImageFsInfoRequest>,
    ) -> Answer<cri::ImageFsInfoResponse> {
        let fs = cri::FilesystemUsage {
            fs_id: Some(cri::FilesystemIdentifier { mountpoint: "/var/lib/holdfast".into() }),
            used_bytes: value(3 << 20),
            ..Default::default()
        };
        Ok(Response::new(cri::ImageFsInfoResponse {
            image_filesystems: vec![fs],
            container_filesystems: Vec::new(),
        }))
    }

    not_asked! {
        stream_images(StreamImagesRequest) -> Self::StreamImagesStream;
    }
}

#[tonic::async_trait]
impl Admin for Fake {
    type PullImageStream = Items<admin::PullProgress>;

    async fn pull_image(
        &self,
        request: Request<admin::PullImageRequest>,
    ) -> Answer<Self::PullImageStream> {
        let request = request.into_inner();
        let mut state = self.call("PullImage", &request.reference)?;
        let id = "sha256:9011ed".to_owned();
        state.images.push(cri::Image {
            id: id.clone(),
            repo_tags: vec![request.reference.clone()],
            ..Default::default()
        });
        state.pulls.push(request);
        let layer = |phase: admin::layer_progress::Phase, received_bytes| admin::LayerProgress {
            digest: "sha256:1a7e12".into(),
            phase: phase.into(),
            received_bytes,
            total_bytes: 2048,
            ..Default::default()
        };
        use admin::layer_progress::Phase;
        let steps = [
            admin::PullProgress { layers: vec![layer(Phase::Pulling, 5)], ..Default::default() },
            admin::PullProgress { layers: vec![layer(Phase::Done, 2048)], ..Default::default() },
            admin::PullProgress { layers: Vec::new(), image_ref: id },
        ];
        Ok(Response::new(Box::pin(tokio_stream::iter(steps.map(Ok)))))
    }

    async fn upgrade_shims(
        &self,
        request: Request<admin::UpgradeShimsRequest>,
    ) -> Result<Response<admin::UpgradeShimsResponse>, Status> {
        use admin::upgraded_shim::Outcome;
        let request = request.into_inner();
        let shim = |name: &str, outcome: Outcome, error: &str| admin::UpgradedShim {
            pod_id: "ab".repeat(32),
            pod_namespace: "default".into(),
            pod_name: name.into(),
            outcome: outcome as i32,
            error: error.into(),
        };
        let mut shims = vec![shim("web", Outcome::Upgraded, "")];
        if !request.force {
            shims.push(shim("db", Outcome::Current, ""));
        }
        if request.binary == "/bad" {
            shims.push(shim("old", Outcome::Kept, "it is busy"));
        }
        Ok(Response::new(admin::UpgradeShimsResponse { shims }))
    }

    async fn import_image(
        &self,
        request: Request<Streaming<admin::ImportImageRequest>>,
    ) -> Answer<admin::ImportImageResponse> {
        let mut pieces = request.into_inner();
        let (mut data, mut name) = (Vec::new(), String::new());
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            assert!(piece.data.len() <= 1 << 20, "a piece has at most 1 MiB");
            data.extend(piece.data);
            name.push_str(&piece.reference);
        }
        let mut state = self.call("ImportImage", &name)?;
        state.imported = data;
        state.import_name = name.clone();
        let names = if name.is_empty() { Vec::new() } else { vec![name] };
        let image = admin::ImportedImage { id: "sha256:13".into(), names };
        Ok(Response::new(admin::ImportImageResponse { images: vec![image] }))
    }
}

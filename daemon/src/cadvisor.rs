//! What the kubelet's built-in cAdvisor asks of a runtime that it takes for containerd: with
//! `kubelet --containerd=<our socket>` its /metrics/cadvisor has pods' labels, and its /stats/summary
//! pods' network traffic.
//!
//! cAdvisor watches cgroups. For one whose name ends in an id it asks [`Containers`] who that is, and
//! [`Tasks`] for a process, in whose network namespace it counts a pod's traffic. containerd has a
//! pause container's cgroup and process for that; we have none, so `marks` provides what it looks for
//! once somebody asks.
//!
//! Nothing in here changes a pod or a container.

mod marks;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use holdfast_protos::containerd::{
    services::{
        containers::v1::{
            Container, GetContainerRequest, GetContainerResponse,
            container::Runtime,
            containers_server::{Containers, ContainersServer},
        },
        tasks::v1::{
            GetRequest, GetResponse,
            tasks_server::{Tasks, TasksServer},
        },
        version::v1::{
            VersionResponse,
            version_server::{Version, VersionServer},
        },
    },
    v1::types::{Process, Status as State},
};
use prost_types::{Any, Timestamp};
use serde_json::json;
use tonic::{Request, Response, Status, service::Routes};

pub use self::marks::Marks;
pub(crate) use self::marks::remove as remove_mark;
use crate::{
    id::ContainerId,
    pod::{
        ContainerView, PodView, Pods,
        state::{ContainerState, PodState},
    },
    shims::NAMESPACE,
};

/// What the label says by which cAdvisor tells a pod from a container.
const KIND: &str = "io.cri-containerd.kind";

/// The type of an OCI runtime spec in JSON.
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// How long a container that is being made is waited for: cAdvisor waits for two seconds.
const PATIENCE: Duration = Duration::from_millis(1800);

/// How often it is looked for.
const AGAIN: Duration = Duration::from_millis(20);

/// The services.
#[derive(Clone)]
pub struct Service {
    pods: Pods,
    marks: Arc<Marks>,
}

/// A pod or a container.
enum Found {
    Pod(Arc<PodView>),
    Container(Arc<PodView>, Arc<ContainerView>),
}

impl Service {
    /// Over these pods.
    pub fn new(pods: Pods, marks: Arc<Marks>) -> Self {
        Self { pods, marks }
    }

    /// Adds the services to those that are served.
    pub fn serve_with(self, routes: Routes) -> Routes {
        routes
            .add_service(VersionServer::new(self.clone()))
            .add_service(ContainersServer::new(self.clone()))
            .add_service(TasksServer::new(self))
    }

    /// By the whole id, in the namespace that everything of ours is in. A container that is being made
    /// is waited for: its cgroup can be seen already, and who is told that it is not there does not
    /// ask again.
    async fn find<T>(&self, request: &Request<T>, id: &str) -> Result<Found, Status> {
        self.marks.wanted();
        let missing = || Status::not_found(format!("container {id:?}: not found"));
        match request.metadata().get("containerd-namespace").map(|name| name.as_bytes()) {
            Some(name) if name == NAMESPACE.as_bytes() => {}
            Some(_) => return Err(missing()),
            None => {
                return Err(Status::failed_precondition(format!(
                    "containerd-namespace: it is required; everything here is in {NAMESPACE}"
                )));
            }
        }
        if let Ok(pod) = self.pods.find(id)
            && pod.id().as_str() == id
        {
            return Ok(Found::Pod(pod.view()));
        }
        let whole: ContainerId = id.parse().map_err(|_| missing())?;
        let by = Instant::now() + PATIENCE;
        loop {
            match self.pods.find_container(id) {
                Ok((pod, container)) => return Ok(Found::Container(pod.view(), container)),
                Err(_) if self.pods.has_container(&whole) && Instant::now() < by => {
                    tokio::time::sleep(AGAIN).await;
                }
                Err(_) => return Err(missing()),
            }
        }
    }
}

#[tonic::async_trait]
impl Version for Service {
    async fn version(&self, _: Request<()>) -> Result<Response<VersionResponse>, Status> {
        self.marks.wanted();
        Ok(Response::new(VersionResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: String::new(),
        }))
    }
}

#[tonic::async_trait]
impl Containers for Service {
    async fn get(
        &self,
        request: Request<GetContainerRequest>,
    ) -> Result<Response<GetContainerResponse>, Status> {
        let id = request.get_ref().id.clone();
        let container = match self.find(&request, &id).await? {
            Found::Pod(pod) => of_pod(&pod),
            Found::Container(pod, view) => {
                let bundle = self.pods.services().shims.container_bundle(&view.record.id);
                let spec = tokio::fs::read(bundle.config()).await;
                of_container(&pod, &view, spec.unwrap_or_else(|_| no_spec()))
            }
        };
        Ok(Response::new(GetContainerResponse { container: Some(container) }))
    }
}

#[tonic::async_trait]
impl Tasks for Service {
    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let id = request.get_ref().container_id.clone();
        if !request.get_ref().exec_id.is_empty() {
            return Err(Status::unimplemented("exec_id: only first processes are told here"));
        }
        let process = match self.find(&request, &id).await? {
            Found::Pod(pod) => {
                let running = pod.record.state == PodState::Ready;
                let pid = running.then(|| self.marks.process_of(&pod.record.id)).flatten();
                // cAdvisor takes what it gets for good: better none than one that is not the pod's.
                let pid = pid.ok_or_else(|| {
                    Status::not_found(format!("task {id:?}: the pod has no process now"))
                })?;
                Process { id, pid, status: State::Running as i32, ..Process::default() }
            }
            Found::Container(_, view) => process(&view),
        };
        Ok(Response::new(GetResponse { process: Some(process) }))
    }
}

fn timestamp(at: SystemTime) -> Option<Timestamp> {
    Some(Timestamp::from(at))
}

fn labels(given: &crate::pod::config::Map, kind: &str) -> HashMap<String, String> {
    let mut labels: HashMap<_, _> = given.clone().into_iter().collect();
    labels.insert(KIND.to_owned(), kind.to_owned());
    labels
}

/// What is left of a spec that is not there any more: its form.
fn no_spec() -> Vec<u8> {
    json!({ "ociVersion": "1.0.2", "process": { "args": [], "cwd": "/", "env": [] } })
        .to_string()
        .into_bytes()
}

fn of_pod(pod: &PodView) -> Container {
    let record = &pod.record;
    let spec = json!({
        "ociVersion": "1.0.2",
        "process": { "args": [], "cwd": "/", "env": [] },
        "annotations": record.config.annotations,
    });
    Container {
        id: record.id.to_string(),
        labels: labels(&record.config.labels, "sandbox"),
        image: String::new(),
        runtime: Some(runtime()),
        spec: Some(Any { type_url: SPEC.to_owned(), value: spec.to_string().into_bytes() }),
        created_at: timestamp(record.created_at),
        updated_at: timestamp(record.created_at),
        sandbox: record.id.to_string(),
        ..Container::default()
    }
}

fn of_container(pod: &PodView, view: &ContainerView, spec: Vec<u8>) -> Container {
    let record = &view.record;
    let config = &record.config;
    Container {
        id: record.id.to_string(),
        labels: labels(&config.labels, "container"),
        image: config.asked_image().to_owned(),
        runtime: Some(runtime()),
        spec: Some(Any { type_url: SPEC.to_owned(), value: spec }),
        snapshotter: "overlayfs".to_owned(),
        snapshot_key: record.id.to_string(),
        created_at: timestamp(record.created_at),
        updated_at: timestamp(record.created_at),
        sandbox: pod.record.id.to_string(),
        ..Container::default()
    }
}

fn runtime() -> Runtime {
    Runtime { name: "io.containerd.holdfast.v2".to_owned(), options: None }
}

fn process(view: &ContainerView) -> Process {
    let record = &view.record;
    let mut process =
        Process { id: record.id.to_string(), terminal: record.config.tty, ..Process::default() };
    match &record.state {
        ContainerState::Creating => {}
        ContainerState::Created { pid } => {
            (process.pid, process.status) = (pid.unwrap_or_default(), State::Created as i32);
        }
        ContainerState::Running { pid, .. } => {
            (process.pid, process.status) = (*pid, State::Running as i32);
        }
        ContainerState::Exited { finished_at, how, .. } => {
            process.status = State::Stopped as i32;
            process.exit_status = u32::try_from(how.code()).unwrap_or_default();
            process.exited_at = timestamp(*finished_at);
        }
    }
    process
}

//! What the daemon tells of itself, and what the kubelet's cAdvisor asks it: metrics over HTTP, the
//! dashboard and alerts made from them, containerd's services.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{Node, ground::cgroup_mounts, node::on, wait::Look};
use holdfast_protos::{
    containerd::{
        services::{
            containers::v1::{GetContainerRequest, containers_client::ContainersClient},
            tasks::v1::{GetRequest, tasks_client::TasksClient},
            version::v1::version_client::VersionClient,
        },
        v1::types,
    },
    cri,
};
use http_body_util::{BodyExt as _, Empty};
use hyper::{Method, Request, StatusCode, body::Bytes};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tonic::Code;

/// A port that nobody listens on now.
fn free_address() -> Result<String> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    Ok(listener.local_addr()?.to_string())
}

async fn http(method: Method, url: &str) -> Result<(StatusCode, String, String)> {
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let request = Request::builder().method(method).uri(url).body(Empty::new())?;
    let answer = client.request(request).await?;
    let format = answer.headers().get("content-type").map(|v| v.to_str().map(str::to_owned));
    let format = format.transpose()?.unwrap_or_default();
    let status = answer.status();
    let body = answer.into_body().collect().await?.to_bytes();
    Ok((status, format, String::from_utf8(body.to_vec())?))
}

/// Samples by name and labels as they are written.
struct Scrape(BTreeMap<String, f64>);

impl Scrape {
    async fn of(address: &str) -> Result<Self> {
        let (status, format, text) =
            http(Method::GET, &format!("http://{address}/metrics")).await?;
        ensure!(status == StatusCode::OK, "{status}: {text}");
        ensure!(format.starts_with("application/openmetrics-text"), "{format}");
        ensure!(text.ends_with("# EOF\n"), "it is cut off: {text}");
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let parse = |line: &str| -> Result<_> {
            let (name, value) = line.rsplit_once(' ').with_context(|| format!("{line:?}"))?;
            Ok((name.to_owned(), value.parse().with_context(|| format!("{line:?}"))?))
        };
        Ok(Self(samples.map(parse).collect::<Result<_>>()?))
    }

    /// The sum of a metric's samples that have all these labels.
    fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let of = |sample: &&str| sample.split('{').next() == Some(name);
        let samples = self.0.iter().filter(|(sample, _)| of(&sample.as_str()));
        samples
            .filter(|(sample, _)| labels.iter().all(|label| sample.contains(label)))
            .map(|(_, value)| value)
            .sum()
    }

    fn names(&self) -> BTreeSet<&str> {
        self.0.keys().filter_map(|sample| sample.split('{').next()).collect()
    }
}

/// The words in an expression that are names of our metrics.
fn metrics_in(expression: &str) -> BTreeSet<String> {
    let word = |c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':';
    let ours = |word: &&str| {
        ["holdfast_", "process_", "container_"].iter().any(|prefix| word.starts_with(prefix))
    };
    expression.split(word).filter(ours).map(str::to_owned).collect()
}

fn deploy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/observability").join(name)
}

/// Every value of these keys, anywhere in a document.
fn values<'a>(document: &'a serde_json::Value, keys: &[&str], found: &mut Vec<&'a str>) {
    match document {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                match value.as_str() {
                    Some(text) if keys.contains(&key.as_str()) => found.push(text),
                    _ => values(value, keys, found),
                }
            }
        }
        serde_json::Value::Array(list) => list.iter().for_each(|v| values(v, keys, found)),
        _ => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_endpoint_counts_what_is_done() -> Result<()> {
    let address = free_address()?;
    let mut node =
        Node::builder().config(&format!("[metrics]\naddress = {address:?}\n")).start().await?;
    let before = Scrape::of(&address).await?;
    assert_eq!(before.sum("holdfast_pods", &[]), 0.0);
    let image = node.busybox().await?;
    let pod = node.pod("a").run().await?;
    pod.container(&image).name("runs").sh("exec sleep 1000").start().await?;
    let ended = pod.container(&image).name("ended").sh("exit 3").start().await?;
    ended.wait().await?;
    pod.container(&image).name("ended").attempt(1).sh("exec sleep 1000").create().await?;
    let missing = cri::ContainerStatusRequest { container_id: "f".repeat(64), verbose: false };
    let missing = node.cri().runtime().container_status(missing).await;
    assert_eq!(missing.unwrap_err().code(), Code::NotFound);
    let refused = node.pull("127.0.0.1:1/no/such:1").await.unwrap_err();
    ensure!(refused.code() != Code::Ok);
    let _events = node.cri().runtime().get_container_events(cri::GetEventsRequest {}).await?;

    let after = Scrape::of(&address).await?;
    let runtime = "service=\"runtime.v1.RuntimeService\"";
    let ok = |method: &str| {
        let method = format!("method={method:?}");
        after.sum("holdfast_grpc_requests_total", &[runtime, &method, "code=\"OK\""])
    };
    assert_eq!(ok("RunPodSandbox"), 1.0);
    assert_eq!(ok("CreateContainer"), 3.0);
    assert_eq!(ok("StartContainer"), 2.0);
    let labels = ["method=\"ContainerStatus\"", "code=\"NOT_FOUND\""];
    assert_eq!(after.sum("holdfast_grpc_requests_total", &labels), 1.0);
    let labels = ["method=\"RunPodSandbox\""];
    assert_eq!(after.sum("holdfast_grpc_request_duration_seconds_count", &labels), 1.0);
    ensure!(after.sum("holdfast_grpc_request_duration_seconds_sum", &labels) > 0.001);
    let labels = ["method=\"GetContainerEvents\""];
    assert_eq!(after.sum("holdfast_grpc_requests_in_flight", &labels), 1.0);
    assert_eq!(after.sum("holdfast_event_subscribers", &[]), 1.0);
    assert_eq!(after.sum("holdfast_pods", &["state=\"ready\""]), 1.0);
    assert_eq!(after.sum("holdfast_containers", &["state=\"running\""]), 1.0);
    assert_eq!(after.sum("holdfast_containers", &["state=\"exited\""]), 1.0);
    assert_eq!(after.sum("holdfast_containers", &["state=\"created\""]), 1.0);
    assert_eq!(after.sum("holdfast_shims", &["state=\"connected\""]), 1.0);
    assert_eq!(after.sum("holdfast_shim_starts_total", &["result=\"ok\""]), 1.0);
    assert_eq!(after.sum("holdfast_container_exits_total", &["reason=\"Error\""]), 1.0);
    assert_eq!(after.sum("holdfast_container_restarts_total", &[]), 1.0);
    assert_eq!(after.sum("holdfast_image_pulls_total", &["result=\"ok\""]), 1.0);
    ensure!(after.sum("holdfast_image_pulls_total", &[]) >= 2.0, "a pull that failed is counted");
    ensure!(after.sum("holdfast_image_pull_received_bytes_total", &[]) > 100_000.0);
    assert_eq!(after.sum("holdfast_images", &[]), 1.0);
    let labels = ["operation=\"attach\"", "result=\"ok\""];
    assert_eq!(after.sum("holdfast_network_operations_total", &labels), 1.0);
    ensure!(after.sum("holdfast_store_commits_total", &[]) > 3.0);
    ensure!(
        after.sum("holdfast_store_jobs_total", &[])
            >= after.sum("holdfast_store_commits_total", &[])
    );
    assert_eq!(after.sum("holdfast_store_commit_failures_total", &[]), 0.0);
    ensure!(after.sum("holdfast_shim_calls_total", &["result=\"ok\""]) >= 4.0);
    let resident = fs::read_to_string(format!("/proc/{}/status", node.daemon_pid()))?;
    let resident =
        resident.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    let resident: f64 = resident.trim().trim_end_matches("kB").trim().parse::<f64>()? * 1024.0;
    let told = after.sum("process_resident_memory_bytes", &[]);
    ensure!((told - resident).abs() < 32e6, "{told} told, {resident} resident");

    // What dashboards and alerts look for is there: each metric by the name that they write.
    let (names, mut looked_for) = (after.names(), Vec::new());
    let dashboard = fs::read_to_string(deploy("grafana-dashboard.json"))?;
    let dashboard: serde_json::Value = serde_json::from_str(&dashboard)?;
    values(&dashboard, &["expr", "query"], &mut looked_for);
    let alerts = fs::read_to_string(deploy("prometheus-alerts.yaml"))?;
    let looked_for: BTreeSet<String> =
        looked_for.into_iter().chain([alerts.as_str()]).flat_map(metrics_in).collect();
    ensure!(looked_for.len() > 25, "the test finds too little in them: {looked_for:?}");
    // A family has no sample before its first event: those are known by their descriptions.
    let (_, _, text) = http(Method::GET, &format!("http://{address}/metrics")).await?;
    for name in looked_for {
        let family = ["_total", "_bucket", "_count", "_sum"]
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix))
            .unwrap_or(&name);
        ensure!(
            names.contains(name.as_str()) || text.contains(&format!("# TYPE {family} ")),
            "{name} is looked for, and is not told"
        );
    }
    // The guide lists all there are, and no other.
    let guide = fs::read_to_string(deploy("../../docs/observability.md"))?;
    let cells = guide.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    let listed = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    let listed: BTreeSet<&str> = listed
        .filter(|name| name.starts_with("holdfast_"))
        .map(|name| name.strip_suffix("_total").unwrap_or(name))
        .collect();
    let families = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let told: BTreeSet<&str> = families.filter(|name| name.starts_with("holdfast_")).collect();
    assert_eq!(listed, told);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_endpoint_refuses_what_it_does_not_have() -> Result<()> {
    let address = free_address()?;
    let mut node =
        Node::builder().config(&format!("[metrics]\naddress = {address:?}\n")).start().await?;
    let (status, _, text) = http(Method::GET, &format!("http://{address}/")).await?;
    ensure!(status == StatusCode::NOT_FOUND && text.contains("/metrics"), "{status} {text}");
    let (status, ..) = http(Method::POST, &format!("http://{address}/metrics")).await?;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
    // Clients that say nothing keep nobody else out.
    let idle: Vec<_> =
        (0..8).map(|_| std::net::TcpStream::connect(&address)).collect::<Result<_, _>>()?;
    Scrape::of(&address).await?;
    drop(idle);

    // An address that is taken is told by name, and the daemon leaves no socket behind.
    node.terminate()?;
    let taken = std::net::TcpListener::bind(&address)?;
    let output = std::process::Command::new(&node.binaries().daemon)
        .arg("--config")
        .arg(node.config())
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "{text}");
    ensure!(text.contains(&address) && text.contains("metrics.address"), "{text}");
    ensure!(!node.cri().socket().exists());
    drop(taken);
    node.restart().await?;
    node.finish().await
}

/// A request as cAdvisor sends it.
fn asked<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("containerd-namespace", "k8s.io".parse().expect("ascii"));
    request
}

/// A container's first process.
async fn pid_of(node: &Node, id: &str) -> Result<u32> {
    let request = cri::ContainerStatusRequest { container_id: id.into(), verbose: true };
    let info = node.cri().runtime().container_status(request).await?.into_inner().info;
    let info: serde_json::Value = serde_json::from_str(info.get("info").context("info")?)?;
    Ok(info["pid"].as_u64().context("pid")? as u32)
}

/// Whether a cgroup of this name is below that parent, in any hierarchy.
fn mark(parent: &str, id: &str) -> Option<PathBuf> {
    let relative = parent.trim_start_matches('/');
    cgroup_mounts().into_iter().map(|m| m.join(relative).join(id)).find(|path| path.is_dir())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubelets_cadvisor_is_answered() -> Result<()> {
    let address = free_address()?;
    let mut node =
        Node::builder().config(&format!("[metrics]\naddress = {address:?}\n")).start().await?;
    let image = node.busybox().await?;
    let pod = node
        .pod("a")
        .label("io.kubernetes.pod.name", "a")
        .label("io.kubernetes.pod.namespace", "test")
        .run()
        .await?;
    let parent = pod.config().linux.clone().unwrap_or_default().cgroup_parent;
    let first = pod
        .container(&image)
        .name("first")
        .label("io.kubernetes.container.name", "first")
        .env("SECRET", "of the container")
        .sh("exec sleep 1000")
        .start()
        .await?;
    // Nobody has asked: there is nothing of it yet.
    ensure!(mark(&parent, &pod.id).is_none());

    let channel = node.cri().channel();
    let version = VersionClient::new(channel.clone()).version(()).await?.into_inner();
    ensure!(!version.version.is_empty());
    let mut containers = ContainersClient::new(channel.clone());
    let get = |id: &str| asked(GetContainerRequest { id: id.into() });
    let told = containers.get(get(&first.id)).await?.into_inner().container.context("container")?;
    assert_eq!(told.id, first.id);
    assert_eq!(told.labels["io.kubernetes.container.name"], "first");
    assert_eq!(told.labels["io.cri-containerd.kind"], "container");
    assert_eq!(told.image, image);
    let spec: serde_json::Value = serde_json::from_slice(&told.spec.context("spec")?.value)?;
    ensure!(spec["process"]["env"].to_string().contains("SECRET=of the container"), "{spec}");
    let told = containers.get(get(&pod.id)).await?.into_inner().container.context("pod")?;
    assert_eq!(told.labels["io.kubernetes.pod.name"], "a");
    assert_eq!(told.labels["io.cri-containerd.kind"], "sandbox");
    let spec: serde_json::Value = serde_json::from_slice(&told.spec.context("spec")?.value)?;
    ensure!(spec["process"]["env"].is_array(), "{spec}");

    // A whole id in the right namespace, or nothing.
    for id in [&first.id[..12], &"f".repeat(64), ""] {
        assert_eq!(containers.get(get(id)).await.unwrap_err().code(), Code::NotFound, "{id:?}");
    }
    let mut elsewhere = tonic::Request::new(GetContainerRequest { id: first.id.clone() });
    elsewhere.metadata_mut().insert("containerd-namespace", "moby".parse()?);
    assert_eq!(containers.get(elsewhere).await.unwrap_err().code(), Code::NotFound);
    let nowhere = tonic::Request::new(GetContainerRequest { id: first.id.clone() });
    assert_eq!(containers.get(nowhere).await.unwrap_err().code(), Code::FailedPrecondition);

    let tasks = TasksClient::new(channel);
    let task = async |id: &str| {
        let request = GetRequest { container_id: id.into(), exec_id: String::new() };
        let answer = tasks.clone().get(asked(request)).await?;
        Ok::<_, tonic::Status>(answer.into_inner().process.unwrap_or_default())
    };
    let process = task(&first.id).await?;
    assert_eq!(
        (process.pid, process.status()),
        (pid_of(&node, &first.id).await?, types::Status::Running)
    );
    let exec = GetRequest { container_id: first.id.clone(), exec_id: "x".into() };
    assert_eq!(tasks.clone().get(asked(exec)).await.unwrap_err().code(), Code::Unimplemented);

    // The pod's process is one in its network namespace; its cgroup is there to be seen.
    let limit = Duration::from_secs(20);
    let settled = async |pid: Option<u32>| {
        on(&node, limit, "the pod's mark", async || {
            let told = task(&pod.id).await.ok().map(|process| process.pid);
            let there = mark(&parent, &pod.id).is_some();
            Ok(Look::when(told == pid && there == pid.is_some(), || format!("{told:?} {there}")))
        })
        .await
    };
    settled(Some(pid_of(&node, &first.id).await?)).await?;
    // A second container changes nothing; it takes over when the first has ended.
    let second = pod.container(&image).name("second").sh("exec sleep 1000").start().await?;
    settled(Some(pid_of(&node, &first.id).await?)).await?;
    let before = fs::metadata(mark(&parent, &pod.id).context("mark")?)?;
    first.stop(0).await?;
    settled(Some(pid_of(&node, &second.id).await?)).await?;
    let after = fs::metadata(mark(&parent, &pod.id).context("mark")?)?;
    use std::os::unix::fs::MetadataExt as _;
    ensure!(before.ino() != after.ino(), "who watches cgroups does not see that it is another");
    let process = task(&first.id).await?;
    assert_eq!((process.pid, process.status()), (0, types::Status::Stopped));

    // The daemon watches for its own part here; nobody else does.
    assert_eq!(Scrape::of(&address).await?.sum("holdfast_event_subscribers", &[]), 0.0);

    // A daemon that dies leaves it behind; the next one knows it as soon as it is asked, and takes it
    // away with the pod.
    node.kill9()?;
    node.restart().await?;
    let mut tasks = TasksClient::new(node.cri().channel());
    let request = || GetRequest { container_id: pod.id.clone(), exec_id: String::new() };
    let told = on(&node, limit, "the pod's process", async || {
        Ok(match tasks.get(asked(request())).await {
            Ok(answer) => Look::Done(answer.into_inner().process.context("process")?.pid),
            Err(error) => Look::Not(error.to_string()),
        })
    })
    .await?;
    assert_eq!(told, pid_of(&node, &second.id).await?);
    let host = node.pod("host").host_network().run().await?;
    host.container(&image).sh("exec sleep 1000").start().await?;
    let of_host = GetRequest { container_id: host.id.clone(), exec_id: String::new() };
    assert_eq!(tasks.get(asked(of_host)).await.unwrap_err().code(), Code::NotFound);
    pod.stop().await?;
    ensure!(mark(&parent, &pod.id).is_none(), "a cgroup is left");
    node.finish().await
}

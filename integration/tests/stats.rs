//! Usage and metrics: what the CRI tells is what the kernel's files say.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use futures::StreamExt as _;
use holdfast_integration::{
    Container, Node, Pod,
    wait::{Look, eventually},
    with_each_runtime,
};
use holdfast_protos::cri;

with_each_runtime! {
    usage_is_what_the_kernel_says
    metrics_are_what_the_kernel_says
}

/// Something to count: memory, files, a socket, threads of their own, CPU time.
const BUSY: &str = "head -c 3000000 /dev/zero > /data; cat /data > /dev/null; nc -lp 7777 & \
                    i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo ready; \
                    exec tail -f /dev/null";

/// The value of a file of the container's cgroup, by its name on version 1 or on version 2.
fn kernel(node: &Node, id: &str, v1: &str, v2: &str) -> Result<String> {
    let dirs = node.ground().cgroups();
    let mine = dirs.iter().filter(|dir| dir.ends_with(id));
    for dir in mine {
        for name in [v1, v2] {
            if let Ok(text) = fs::read_to_string(dir.join(name)) {
                return Ok(text.trim().into());
            }
        }
    }
    anyhow::bail!("neither {v1} nor {v2} of {id}")
}

/// A key of a file of `key value` lines.
fn keyed(text: &str, key: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    Ok(line.with_context(|| format!("no {key} in {text:?}"))?.trim().parse()?)
}

fn near(what: &str, told: u64, kernel: u64, by: u64) -> Result<()> {
    ensure!(told.abs_diff(kernel) <= by, "{what}: told {told}, the kernel says {kernel}");
    Ok(())
}

fn number(value: &Option<cri::UInt64Value>) -> Result<u64> {
    Ok(value.as_ref().context("it is not told")?.value)
}

async fn first_pid(node: &Node, container: &Container) -> Result<u32> {
    let request = cri::ContainerStatusRequest { container_id: container.id.clone(), verbose: true };
    let info = node.cri().runtime().container_status(request).await?.into_inner().info;
    let info: serde_json::Value = serde_json::from_str(info.get("info").context("no info")?)?;
    Ok(info["pid"].as_u64().context("no pid")? as u32)
}

async fn busy(node: &mut Node) -> Result<(Pod, Container)> {
    let image = node.busybox().await?;
    let pod = node.pod("busy").run().await?;
    let container = pod
        .container(&image)
        .sh(BUSY)
        .resources(|r| {
            r.cpu_period = 100_000;
            r.cpu_quota = 50_000;
            r.cpu_shares = 512;
            r.memory_limit_in_bytes = 64 << 20;
        })
        .start()
        .await?;
    container.wait_for_log("ready").await?;
    Ok((pod, container))
}

async fn usage_is_what_the_kernel_says(runtime: &str) -> Result<()> {
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    let (pod, container) = busy(&mut node).await?;
    let stats = eventually(Duration::from_secs(20), "a rate", async || {
        let stats = container.stats().await?;
        let told = stats.cpu.as_ref().is_some_and(|cpu| cpu.usage_nano_cores.is_some());
        Ok(if told { Look::Done(stats) } else { Look::Not(format!("{:?}", stats.cpu)) })
    })
    .await?;
    let cpu = stats.cpu.context("cpu")?;
    let v1 = kernel(&node, &container.id, "cpuacct.usage", "");
    let used = match v1 {
        Ok(text) => text.parse()?,
        Err(_) => keyed(&kernel(&node, &container.id, "", "cpu.stat")?, "usage_usec")? * 1000,
    };
    near("cpu", number(&cpu.usage_core_nano_seconds)?, used, 200_000_000)?;
    ensure!(cpu.timestamp > 0);

    let memory = stats.memory.context("memory")?;
    let used = kernel(&node, &container.id, "memory.usage_in_bytes", "memory.current")?.parse()?;
    near("memory", number(&memory.usage_bytes)?, used, 1 << 20)?;
    let stat = kernel(&node, &container.id, "memory.stat", "memory.stat")?;
    let inactive =
        keyed(&stat, "total_inactive_file").or_else(|_| keyed(&stat, "inactive_file"))?;
    near(
        "working set",
        number(&memory.working_set_bytes)?,
        used.saturating_sub(inactive),
        1 << 20,
    )?;
    let left = (64 << 20) - number(&memory.working_set_bytes)?;
    near("memory that is left", number(&memory.available_bytes)?, left, 0)?;

    let layer = stats.writable_layer.context("the writable layer")?;
    let bytes = number(&layer.used_bytes)?;
    ensure!((3_000_000..3_200_000).contains(&bytes), "{bytes} in the layer");
    // What the runtime mounts at is in the layer too.
    let upper = node.path().join("root/snapshots").join(&container.id).join("upper");
    near("inodes", number(&layer.inodes_used)?, inodes(&upper)?, 0)?;

    let request = cri::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let of_pod = node.cri().runtime().pod_sandbox_stats(request).await?.into_inner();
    let linux = of_pod.stats.context("stats")?.linux.context("linux")?;
    let processes = processes_of(&node, &container.id)?.len() as u64;
    near("processes", number(&linux.process.context("process")?.process_count)?, processes, 0)?;
    let told = linux.network.context("network")?.default_interface.context("eth0")?;
    let dev = fs::read_to_string(format!("/proc/{}/net/dev", first_pid(&node, &container).await?))?;
    let counters =
        dev.lines().find_map(|line| line.trim().strip_prefix("eth0:")).context("eth0")?;
    let counters: Vec<u64> =
        counters.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    near("received", number(&told.rx_bytes)?, counters[0], 10_000)?;
    near("sent", number(&told.tx_bytes)?, counters[8], 10_000)?;
    assert_eq!(linux.containers.len(), 1);
    let of_pod = number(&linux.memory.context("memory")?.usage_bytes)?;
    ensure!(of_pod >= used / 2, "the pod has {of_pod}, its container {used}");
    node.finish().await
}

fn inodes(dir: &Path) -> Result<u64> {
    let mut count = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        count += 1;
        if entry.file_type()?.is_dir() {
            count += inodes(&entry.path())?;
        }
    }
    Ok(count)
}

fn processes_of(node: &Node, id: &str) -> Result<Vec<u32>> {
    let list = kernel(node, id, "cgroup.procs", "cgroup.procs")?;
    list.lines().map(|line| Ok(line.parse()?)).collect()
}

type Told = BTreeMap<(String, Vec<String>), (u64, cri::MetricType)>;

/// By name and by the labels that not every metric has.
fn told(metrics: &[cri::Metric]) -> Told {
    let entry = |m: &cri::Metric| {
        let labels = m.label_values.get(6..).unwrap_or_default().to_vec();
        ((m.name.clone(), labels), (m.value.unwrap_or_default().value, m.metric_type()))
    };
    metrics.iter().map(entry).collect()
}

async fn metrics_are_what_the_kernel_says(runtime: &str) -> Result<()> {
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    let (pod, container) = busy(&mut node).await?;
    let mut client = node.cri().runtime();
    let request = cri::ListMetricDescriptorsRequest {};
    let descriptors = client.list_metric_descriptors(request).await?.into_inner().descriptors;
    let labels: BTreeMap<_, _> =
        descriptors.iter().map(|d| (d.name.clone(), d.label_keys.clone())).collect();
    let request = cri::ListPodSandboxMetricsRequest {};
    let answer = client.list_pod_sandbox_metrics(request).await?.into_inner().pod_metrics;
    ensure!(answer.len() == 1 && answer[0].pod_sandbox_id == pod.id, "{answer:?}");
    let of_pod = &answer[0].metrics;
    let of_container = &answer[0].container_metrics[0].metrics;
    for metric in of_pod.iter().chain(of_container) {
        let keys = labels.get(&metric.name).with_context(|| format!("{} has none", metric.name))?;
        assert_eq!(keys.len(), metric.label_values.len(), "{}", metric.name);
        let counter = metric.metric_type() == cri::MetricType::Counter;
        assert_eq!(counter, counts(&metric.name), "{}", metric.name);
    }
    // What says whose a metric is.
    let keys = &labels["container_memory_rss"];
    assert_eq!(keys, &["container", "id", "image", "name", "namespace", "pod"]);
    let pid = first_pid(&node, &container).await?;
    let proc_cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let values = &of_container[0].label_values;
    ensure!(
        proc_cgroup.lines().any(|line| line.ends_with(&format!(":{}", values[1]))),
        "{values:?}"
    );
    assert_eq!(values[3], container.id);
    assert_eq!((&*values[5], &*of_pod[0].label_values[5]), ("busy", "busy"));
    assert_eq!((&*of_pod[0].label_values[0], &*of_pod[0].label_values[2]), ("", ""));
    ensure!([0, 2, 4].iter().all(|at| !values[*at].is_empty()), "{values:?}");

    let values = told(of_container);
    let one = |name: &str| -> Result<u64> {
        let found = values.iter().find(|((key, _), _)| key == name);
        Ok(found.with_context(|| format!("no {name}"))?.1.0)
    };
    let with = |name: &str, label: &str| -> Result<u64> {
        let key = (name.to_owned(), vec![label.to_owned()]);
        Ok(values.get(&key).with_context(|| format!("no {name} of {label}"))?.0)
    };
    let file = |v1: &str, v2: &str| kernel(&node, &container.id, v1, v2);
    let used: u64 = file("memory.usage_in_bytes", "memory.current")?.parse()?;
    near("memory", one("container_memory_usage_bytes")?, used, 1 << 20)?;
    let stat = file("memory.stat", "memory.stat")?;
    for (metric, v1, v2) in [
        ("container_memory_rss", "total_rss", "anon"),
        ("container_memory_cache", "total_cache", "file"),
        ("container_memory_mapped_file", "total_mapped_file", "file_mapped"),
        ("container_memory_total_inactive_file_bytes", "total_inactive_file", "inactive_file"),
    ] {
        let kernel = keyed(&stat, v1).or_else(|_| keyed(&stat, v2))?;
        near(metric, one(metric)?, kernel, 1 << 20)?;
    }
    near("limit", one("container_spec_memory_limit_bytes")?, 64 << 20, 0)?;
    near("period", one("container_spec_cpu_period")?, 100_000, 0)?;
    near("quota", one("container_spec_cpu_quota")?, 50_000, 0)?;
    if let Ok(shares) = file("cpu.shares", "") {
        near("shares", one("container_spec_cpu_shares")?, shares.parse()?, 0)?;
    }
    near("threads", one("container_threads")?, file("pids.current", "pids.current")?.parse()?, 0)?;
    let cpu = with("container_cpu_usage_seconds_total", "total")?;
    let used = match file("cpuacct.usage", "") {
        Ok(text) => text.parse::<u64>()? / 1_000_000_000,
        Err(_) => keyed(&file("", "cpu.stat")?, "usage_usec")? / 1_000_000,
    };
    near("cpu", cpu, used, 1)?;
    let throttling = file("cpu.stat", "cpu.stat")?;
    let periods = keyed(&throttling, "nr_periods")?;
    near("periods", one("container_cpu_cfs_periods_total")?, periods, 20)?;
    ensure!(periods > 0, "a container with a quota was never scheduled by it");

    let processes = processes_of(&node, &container.id)?;
    near("processes", one("container_processes")?, processes.len() as u64, 0)?;
    let (mut open, mut sockets) = (0, 0);
    for pid in &processes {
        for descriptor in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            open += 1;
            sockets += u64::from(socket(&fs::read_link(descriptor.path()).unwrap_or_default()));
        }
    }
    near("descriptors", one("container_file_descriptors")?, open, 0)?;
    near("sockets", one("container_sockets")?, sockets, 0)?;
    ensure!(sockets > 0, "nc listens");
    let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let soft = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let soft = soft.and_then(|line| line.split_whitespace().next()).context("no limit")?;
    near("open files", with("container_ulimits_soft", "max_open_files")?, soft.parse()?, 0)?;

    let layer = one("container_fs_usage_bytes")?;
    ensure!((3_000_000..3_200_000).contains(&layer), "{layer}");
    let stat = nix::sys::statvfs::statvfs(node.path())?;
    let capacity = stat.blocks() * stat.fragment_size();
    near("capacity", one("container_fs_limit_bytes")?, capacity, 0)?;
    near("inodes", one("container_fs_inodes_total")?, stat.files(), 0)?;

    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    near("last seen", one("container_last_seen")?, now, 10)?;
    let started = container.status().await?.started_at as u64 / 1_000_000_000;
    near("start", one("container_start_time_seconds")?, started, 0)?;
    if Path::new("/proc/pressure/cpu").exists() && pressure_file(&node, &container.id).is_some() {
        for what in ["cpu", "memory", "io"] {
            for how in ["waiting", "stalled"] {
                one(&format!("container_pressure_{what}_{how}_seconds_total"))?;
            }
        }
    }

    let values = told(of_pod);
    let eth0 = |name: &str| -> Result<u64> {
        let key = (name.to_owned(), vec!["eth0".to_owned()]);
        Ok(values.get(&key).with_context(|| format!("no {name}"))?.0)
    };
    let dev = fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
    let counters =
        dev.lines().find_map(|line| line.trim().strip_prefix("eth0:")).context("eth0")?;
    let counters: Vec<u64> =
        counters.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    near("received", eth0("container_network_receive_bytes_total")?, counters[0], 10_000)?;
    near("packets in", eth0("container_network_receive_packets_total")?, counters[1], 100)?;
    near("sent", eth0("container_network_transmit_bytes_total")?, counters[8], 10_000)?;
    near("packets out", eth0("container_network_transmit_packets_total")?, counters[9], 100)?;
    ensure!(!values.keys().any(|(_, labels)| labels.iter().any(|l| l == "lo")), "{values:?}");

    // The stream tells the same.
    let request = cri::StreamPodSandboxMetricsRequest {};
    let mut stream = client.stream_pod_sandbox_metrics(request).await?.into_inner();
    let mut streamed = Vec::new();
    while let Some(message) = stream.next().await {
        streamed.extend(message?.pod_sandbox_metrics);
    }
    assert_eq!(streamed.len(), 1);
    let names = |metrics: &[cri::Metric]| -> Vec<_> { told(metrics).into_keys().collect() };
    assert_eq!(names(&streamed[0].container_metrics[0].metrics), names(of_container));
    node.finish().await
}

/// Whether a name is one of a counter: Prometheus' rule, and cAdvisor's exceptions to it.
fn counts(name: &str) -> bool {
    let gauge = name == "container_fs_inodes_total";
    (name.ends_with("_total") && !gauge) || name == "container_memory_failcnt"
}

fn socket(target: &Path) -> bool {
    target.to_string_lossy().starts_with("socket:")
}

fn pressure_file(node: &Node, id: &str) -> Option<PathBuf> {
    let dirs = node.ground().cgroups();
    dirs.iter()
        .filter(|dir| dir.ends_with(id))
        .map(|dir| dir.join("cpu.pressure"))
        .find(|p| p.exists())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_ended_has_no_usage_and_disturbs_nobody() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let runs = pod.container(&image).name("runs").sh("exec sleep 1000").start().await?;
    let ended = pod.container(&image).name("ended").sh("true").start().await?;
    ended.wait().await?;
    let stats = ended.stats().await?;
    ensure!(stats.attributes.context("attributes")?.id == ended.id);
    ensure!(stats.cpu.is_none_or(|cpu| cpu.usage_core_nano_seconds.is_none()));
    let mut client = node.cri().runtime();
    let all = client.list_container_stats(cri::ListContainerStatsRequest::default()).await?;
    let ids: Vec<_> =
        all.into_inner().stats.into_iter().map(|s| s.attributes.unwrap_or_default().id).collect();
    assert_eq!(ids, [&*runs.id]);
    let request = cri::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let linux = client.pod_sandbox_stats(request).await?.into_inner().stats.context("stats")?.linux;
    // The node's interfaces are not the pod's.
    ensure!(linux.context("linux")?.network.is_none());
    pod.stop().await?;
    let request = cri::ListPodSandboxMetricsRequest {};
    assert_eq!(client.list_pod_sandbox_metrics(request).await?.into_inner().pod_metrics.len(), 0);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn each_pod_is_told_its_own_interfaces() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let quiet = node.pod("quiet").run().await?;
    let loud = node.pod("loud").run().await?;
    quiet.container(&image).sh("exec sleep 1000").start().await?;
    let container = loud.container(&image).sh("exec sleep 1000").start().await?;
    let sent =
        format!("for i in 1 2 3 4 5; do ping -c 1 -s 9000 {} || true; done", quiet.ip().await?);
    container.sh(&sent).await?;
    let request = cri::ListPodSandboxStatsRequest::default();
    let stats = node.cri().runtime().list_pod_sandbox_stats(request).await?.into_inner().stats;
    let sent = |id: &str| -> Result<u64> {
        let pod = stats.iter().find(|s| s.attributes.as_ref().is_some_and(|a| a.id == id));
        let linux = pod.and_then(|pod| pod.linux.clone()).context("linux")?;
        let eth0 = linux.network.and_then(|n| n.default_interface).context("eth0")?;
        number(&eth0.tx_bytes)
    };
    let (of_loud, of_quiet) = (sent(&loud.id)?, sent(&quiet.id)?);
    ensure!(of_loud > 40_000, "{of_loud} sent");
    ensure!(of_quiet > 40_000, "{of_quiet} sent back");
    // Two namespaces have not the same counters.
    ensure!(of_loud != of_quiet || loud.ip().await? != quiet.ip().await?);
    node.finish().await
}

/// Kibibytes of the daemon that are resident.
fn resident(node: &Node) -> Result<u64> {
    status_of(node, "VmRSS:")
}

/// Kibibytes in a line of the daemon's proc_pid_status(5).
fn status_of(node: &Node, key: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{}/status", node.daemon_pid()))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)).context("no such line")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}

/// Reads one message, leaves the rest alone for a while, and then reads on, slowly. Gives what was
/// told, its size, and by how many kibibytes the daemon grew meanwhile.
async fn read_slowly<M: prost::Message>(
    node: &Node,
    mut stream: tonic::Streaming<M>,
    count: impl Fn(&M) -> usize,
) -> Result<(usize, usize, u64)> {
    let before = resident(node)?;
    let (mut told, mut bytes, mut messages, mut most) = (0, 0, 0, before);
    while let Some(message) = stream.next().await {
        let message = message?;
        told += count(&message);
        bytes += message.encoded_len();
        messages += 1;
        // What is buffered is buffered while nobody reads.
        let pause = if messages == 1 { 2000 } else { 20 };
        tokio::time::sleep(Duration::from_millis(pause)).await;
        most = most.max(resident(node)?);
    }
    ensure!(messages > 4, "{messages} messages are not a stream");
    Ok((told, bytes, most - before))
}

/// A thousand running containers of which the daemon has the records, and whose shims hang: nothing
/// in lists, statistics and metrics may wait for those.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_containers_are_streamed_to_a_client_that_reads_slowly() -> Result<()> {
    const PODS: usize = 10;
    const EACH: usize = 100;
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    for number in 0..PODS {
        let pod = node.pod(&format!("p{number}")).host_network().run().await?;
        pod.container(&image).name("real").sh("exec sleep 1000").start().await?;
    }
    node.terminate()?;
    let shims: Vec<i32> = node
        .ground()
        .processes()
        .into_iter()
        .filter(|pid| {
            let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            exe.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("containerd-shim"))
        })
        .collect();
    assert_eq!(shims.len(), PODS);
    let signal = |signal| {
        for shim in &shims {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*shim), signal);
        }
    };
    signal(nix::sys::signal::Signal::SIGSTOP);
    let seeded = seed(&node.path().join("root/holdfast.db"), EACH).await;
    let watched = match seeded {
        Ok(()) => watch_thousand(&mut node, PODS * EACH).await,
        Err(error) => Err(error),
    };
    // In any case: a shim that is stopped cannot be ended.
    signal(nix::sys::signal::Signal::SIGCONT);
    watched?;
    eventually(Duration::from_secs(60), "the shims' word on those that never were", async || {
        // Not a list: all of them are more than a message may have.
        let request = cri::StreamContainersRequest::default();
        let mut stream = node.cri().runtime().stream_containers(request).await?.into_inner();
        let mut running = 0;
        while let Some(message) = stream.next().await {
            let states = message?.containers.into_iter().map(|container| container.state());
            running += states.filter(|s| *s == cri::ContainerState::ContainerRunning).count();
        }
        Ok(Look::when(running == PODS, || format!("{running} run")))
    })
    .await?;
    node.finish().await
}

/// Writes further records beside the one container that each pod has.
async fn seed(path: &Path, each: usize) -> Result<()> {
    use holdfast_daemon::{id::ContainerId, store::Store};
    let store = Store::open(path)?;
    let (_, real) = store.load().await?;
    for record in real {
        for number in 1..each {
            let mut record = record.clone();
            record.id = ContainerId::random();
            record.config.name = format!("c{number}");
            record.config.annotations.insert("large".into(), "x".repeat(20_000));
            store.put_container(&record).await?;
        }
    }
    Ok(())
}

async fn watch_thousand(node: &mut Node, all: usize) -> Result<()> {
    node.restart().await?;
    let mut client = node.cri().deadline(Duration::from_secs(120)).runtime();
    let small = |what: &str, (told, bytes, grown): (usize, usize, u64), all: usize| -> Result<()> {
        ensure!(told == all, "{what}: {told} of {all}");
        println!("{what}: {bytes} bytes cost the daemon {grown} KiB");
        // Some of it is on the way; most must not have been made.
        ensure!(grown * 1024 < 6 << 20, "{what}: {bytes} bytes cost the daemon {grown} KiB");
        ensure!(bytes > 9 << 20, "{what}: {bytes} bytes show nothing");
        Ok(())
    };
    let count = |m: &cri::StreamPodSandboxMetricsResponse| {
        m.pod_sandbox_metrics.iter().map(|pod| pod.container_metrics.len()).sum()
    };
    // What the first request of a kind allocates for good is not what this is about.
    let warm = async |node: &Node| -> Result<(usize, usize, u64)> {
        let mut client = node.cri().deadline(Duration::from_secs(120)).runtime();
        let request = cri::StreamContainerStatsRequest::default();
        let stream = client.stream_container_stats(request).await?.into_inner();
        read_slowly(node, stream, |m| m.container_stats.len()).await
    };
    // What it costs to make all metrics at once, and hold them, for a daemon that has made none yet.
    warm(node).await?;
    let list = cri::ListPodSandboxMetricsRequest {};
    let before = resident(node)?;
    fs::write(format!("/proc/{}/clear_refs", node.daemon_pid()), "5")?;
    client.list_pod_sandbox_metrics(list).await?;
    let at_once = status_of(node, "VmHWM:")?.saturating_sub(before);
    node.terminate()?;
    node.restart().await?;
    let mut client = node.cri().deadline(Duration::from_secs(120)).runtime();

    warm(node).await?;
    let stream =
        client.stream_containers(cri::StreamContainersRequest::default()).await?.into_inner();
    small("containers", read_slowly(node, stream, |m| m.containers.len()).await?, all)?;
    small("stats", warm(node).await?, all)?;
    // A message has at least a pod; here one has a hundred containers, whose metrics are some megabytes
    // in memory, and each thread that makes such a message keeps as much to make the next one of.
    let stream = client
        .stream_pod_sandbox_metrics(cri::StreamPodSandboxMetricsRequest {})
        .await?
        .into_inner();
    let (told, bytes, grown) = read_slowly(node, stream, count).await?;
    println!("metrics: {bytes} bytes cost the daemon {grown} KiB, and {at_once} KiB at once");
    ensure!(told == all, "metrics: {told} of {all}");
    ensure!(at_once * 1024 > 3 * (9 << 20), "{at_once} KiB at once show nothing");
    ensure!(grown < at_once / 3, "metrics cost {grown} KiB, and {at_once} KiB at once");
    Ok(())
}

//! What the node's survival costs. The daemon is killed with a hundred pods while a container writes 50 MB
//! in a second: how soon everything is listed again, how soon every shim is reached again, what the writer
//! notices. And what anybody else notices of a shim that is stopped, of an OCI runtime that never returns
//! and of a process that hangs in the kernel.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use futures::future::try_join_all;
use holdfast_protos::cri as api;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Bytes;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    Plan, RESTART_LIMIT, SETTLE, Side, millis, progress,
    samples::{
        HOLDFAST, KILL_LINKS, KILL_LIST, KILL_LOST, KILL_STALL, STUCK_EXEC, STUCK_LISTS,
        STUCK_STATS, STUCK_STATUS, Samples,
    },
};
use crate::{
    Node, Pod,
    fuse::DeadServer,
    wait::{Look, eventually},
};

/// Pods when the daemon is killed; the writer's is one of them.
const PODS: usize = 100;
/// Megabytes that the writer writes in a second.
const RATE: &str = "50";
/// For how many seconds, and after how many of them the daemon is killed.
const SECONDS: &str = "5";
const KILLED_AFTER: Duration = Duration::from_millis(1500);

/// Kills, with a writer in each round.
pub(super) async fn run(
    plan: &Plan,
    metrics: &str,
    samples: &mut Samples,
    sides: &mut [Side],
) -> Result<()> {
    let (pods, rounds) = (PODS, if plan.quick { 2 } else { 5 });
    for side in sides.iter_mut() {
        progress(format!("{pods} pods for {}", side.column));
        for _ in 1..pods {
            side.idle_pod().await?;
        }
        let (pod, config) = side.run_pod().await?;
        for round in 0..rounds {
            progress(format!("kill {}/{rounds} of {}", round + 1, side.column));
            let writer = side.start_writer(&pod, config.as_ref(), round).await?;
            tokio::time::sleep(KILLED_AFTER).await;
            // The idle ones and the writer.
            let started = side.kill_and_list(pods).await?;
            samples.add(KILL_LIST, side.column, millis(started));
            if side.column == HOLDFAST {
                until_linked(metrics, pods, started).await?;
                samples.add(KILL_LINKS, side.column, millis(started));
            }
            let (lost, longest) = side.end_of_writer(writer).await?;
            samples.add(KILL_LOST, side.column, lost as f64);
            samples.add(KILL_STALL, side.column, longest.as_secs_f64() * 1000.0);
        }
        side.clear().await?;
    }
    Ok(())
}

/// Waits until the daemon is connected to so many shims, as its metrics say.
async fn until_linked(metrics: &str, pods: usize, started: Instant) -> Result<()> {
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    loop {
        let text = async {
            let answer = client.get(format!("http://{metrics}/metrics").parse()?).await?;
            let bytes = answer.into_body().collect().await?.to_bytes();
            Ok::<_, anyhow::Error>(String::from_utf8_lossy(&bytes).into_owned())
        };
        let text = text.await.unwrap_or_default();
        let connected = text
            .lines()
            .find_map(|line| line.strip_prefix("holdfast_shims{state=\"connected\"} "))
            .and_then(|count| count.parse::<f64>().ok());
        if connected == Some(pods as f64) {
            return Ok(());
        }
        if started.elapsed() > RESTART_LIMIT {
            let shims = text.lines().filter(|line| line.starts_with("holdfast_shims{"));
            bail!("not {pods} shims are connected: {:?}", shims.collect::<Vec<_>>());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A container that writes, and its log.
struct Writer {
    id: String,
    log: PathBuf,
}

impl Side {
    async fn start_writer(
        &mut self,
        pod: &str,
        config: Option<&api::PodSandboxConfig>,
        round: usize,
    ) -> Result<Writer> {
        let program = std::env::current_exe()?.with_file_name("holdfast-testwriter");
        ensure!(program.is_file(), "{} is missing: run 'make bench'", program.display());
        let name = format!("writer{round}");
        let argv = ["/writer", RATE, SECONDS];
        let mut request = self.container_request(pod, config, &name, &argv);
        let container = request.config.as_mut().context("a request has a configuration")?;
        // It is linked with the libraries of this machine, and busybox is not.
        let mut mount = |host: &Path, inside: &str| {
            container.mounts.push(api::Mount {
                host_path: host.display().to_string(),
                container_path: inside.into(),
                readonly: true,
                ..Default::default()
            });
        };
        mount(&program, "/writer");
        for dir in ["/lib", "/lib64", "/usr/lib"] {
            if let Ok(real) = Path::new(dir).canonicalize() {
                mount(&real, dir);
            }
        }
        let log = config.map(|config| config.log_directory.clone()).unwrap_or_default();
        let log = PathBuf::from(log).join(format!("{name}.log"));
        let id = self.runtime.create_container(request).await?.into_inner().container_id;
        let request = api::StartContainerRequest { container_id: id.clone() };
        self.runtime.start_container(request).await?;
        Ok(Writer { id, log })
    }

    /// Lines that the writer has written and its log does not have, and its longest write.
    async fn end_of_writer(&mut self, writer: Writer) -> Result<(u64, Duration)> {
        let Writer { id, log } = writer;
        let mut runtime = self.runtime.clone();
        eventually(Duration::from_secs(120), "the writer to end", async || {
            let request = api::ContainerStatusRequest { container_id: id.clone(), verbose: false };
            let status = runtime.container_status(request).await?.into_inner().status;
            let state = status.unwrap_or_default().state();
            Ok(Look::when(state == api::ContainerState::ContainerExited, || format!("{state:?}")))
        })
        .await?;
        let found = read(&log)?;
        let (lines, longest) = found.said.with_context(|| {
            format!("the writer says nothing in {} ({} lines)", log.display(), found.lines)
        })?;
        fs::remove_file(&log)?;
        let request = api::RemoveContainerRequest { container_id: id };
        self.runtime.remove_container(request).await?;
        Ok((lines.saturating_sub(found.lines), longest))
    }
}

/// What a writer's log has.
struct Found {
    lines: u64,
    /// What the writer says: lines, and its longest write.
    said: Option<(u64, Duration)>,
}

fn read(log: &Path) -> Result<Found> {
    let file = File::open(log).with_context(|| format!("open {}", log.display()))?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut found = Found { lines: 0, said: None };
    let (mut line, mut last) = (Vec::new(), 0);
    while reader.read_until(b'\n', &mut line)? > 0 {
        // After time, stream and tag. The time has no fixed length: containerd leaves out zeros at its end.
        let text = std::str::from_utf8(&line)?.splitn(4, ' ').nth(3).unwrap_or_default().trim();
        if let Some(number) = text.strip_prefix("line ") {
            let number: u64 = number.parse().with_context(|| format!("a number in {text:?}"))?;
            ensure!(number > last, "after line {last} comes line {number}");
            last = number;
            found.lines += 1;
        } else if let Some((lines, longest)) =
            text.strip_prefix("lines ").and_then(|text| text.split_once(" longest "))
        {
            found.said = Some((lines.parse()?, Duration::from_micros(longest.parse()?)));
        } else {
            // What our shim writes where lines are missing; what is lost is counted by what is there.
            ensure!(text.starts_with("holdfast: "), "{text:?} in the log of the writer");
        }
        line.clear();
    }
    Ok(found)
}

/// What others notice, on a node of its own, of what never answers. Three pods are stuck: the shim of one
/// is stopped, with an exec and a stop that wait for it; the OCI runtime of one does not return from
/// `create`; a process of one hangs in the kernel, and its stop waits for that. Seven are not.
pub(super) async fn stuck(plan: &Plan, samples: &mut Samples) -> Result<()> {
    let mut node = Node::builder().gated_runtime().env("RUST_LOG", "info").start().await?;
    let image = node.busybox().await?;
    let go = node.path().join("go");
    fs::create_dir(&go)?;
    let server = DeadServer::mount(&node.path().join("volume"))?;
    let mut healthy = Vec::new();
    for number in 0..7 {
        let pod = node.pod(&format!("healthy{number}")).host_network().run().await?;
        healthy.push(pod.container(&image).sh("exec sleep 100000").start().await?);
    }
    let stopped = node.pod("stopped").host_network().run().await?;
    let of_stopped = stopped.container(&image).sh("exec sleep 100000").start().await?;
    let in_kernel = node.pod("kernel").host_network().run().await?;
    let hangs = in_kernel
        .container(&image)
        .sh("while [ ! -e /go/now ]; do sleep 0.05; done; exec cat /volume/file /volume/other")
        .mount(&node.path().join("volume"), "/volume", |_| {})
        .mount(&go, "/go", |_| {})
        .start()
        .await?;
    let creating = node.pod("creating").host_network().run().await?;
    tokio::time::sleep(SETTLE).await;

    let shim = Pid::from_raw(node.pid_file(&stopped.id, "shim.pid")?);
    server.die();
    fs::write(go.join("now"), "")?;
    node.gated_runtime().hang("create")?;
    kill(shim, Signal::SIGSTOP)?;
    let waiting = tokio::spawn({
        let (exec, stop, hangs) = (of_stopped.clone(), of_stopped.clone(), hangs.clone());
        let create = creating.container(&image).sh("exec sleep 100000");
        async move {
            tokio::join!(
                async { exec.exec_sync(&["true"], 0).await.map(drop) },
                stop.stop(1000),
                hangs.stop(0),
                async { create.create().await.map(drop) },
            )
        }
    });
    let gate = node.gated_runtime();
    eventually(Duration::from_secs(20), "the runtime to be called", async || {
        Ok(Look::when(gate.hung("create") == 1, || "it was not".into()))
    })
    .await?;
    let measured = ask(plan, &node, &healthy, samples).await;
    let all_wait = !waiting.is_finished();

    // Everything goes on, also after an error.
    server.abort();
    kill(shim, Signal::SIGCONT)?;
    node.gated_runtime().release()?;
    let _ = waiting.await;
    measured?;
    ensure!(all_wait, "what was to be stuck was not");
    try_join_all(healthy.iter().map(|container| container.stop(0))).await?;
    node.remove_all().await?;
    drop(server);
    node.finish().await
}

async fn ask(
    plan: &Plan,
    node: &Node,
    healthy: &[crate::Container],
    samples: &mut Samples,
) -> Result<()> {
    let cri = node.cri();
    let (mut runtime, mut images) = (cri.runtime(), cri.images());
    let pods = node.pods().await?;
    let containers = node.containers().await?;
    for _ in 0..if plan.quick { 20 } else { 200 } {
        let begun = Instant::now();
        runtime.list_pod_sandbox(api::ListPodSandboxRequest::default()).await?;
        runtime.list_containers(api::ListContainersRequest::default()).await?;
        images.list_images(api::ListImagesRequest::default()).await?;
        samples.add(STUCK_LISTS, HOLDFAST, millis(begun));
        // Of those that are stuck, too.
        for pod in &pods {
            let begun = Instant::now();
            Pod::existing(cri, &pod.id).status().await?;
            samples.add(STUCK_STATUS, HOLDFAST, millis(begun));
        }
        for container in &containers {
            let begun = Instant::now();
            crate::Container::existing(cri, &container.id).status().await?;
            samples.add(STUCK_STATUS, HOLDFAST, millis(begun));
        }
        let begun = Instant::now();
        runtime.status(api::StatusRequest { verbose: true }).await?;
        samples.add(STUCK_STATUS, HOLDFAST, millis(begun));
        let begun = Instant::now();
        runtime.list_pod_sandbox_stats(api::ListPodSandboxStatsRequest::default()).await?;
        runtime.list_container_stats(api::ListContainerStatsRequest::default()).await?;
        samples.add(STUCK_STATS, HOLDFAST, millis(begun));
        for container in healthy.iter().take(1) {
            let begun = Instant::now();
            ensure!(container.exec_sync(&["true"], 30).await?.exit_code == 0);
            samples.add(STUCK_EXEC, HOLDFAST, millis(begun));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_are_missing_from_a_log_are_counted() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let log = |texts: &[&str]| {
            let record = |text: &&str| format!("2026-01-02T03:04:05.000000006Z stdout F {text}\n");
            fs::write(file.path(), texts.iter().map(record).collect::<String>()).unwrap();
            read(file.path())
        };
        let found = log(&["line 1   ", "line 2", "line 4", "lines 4 longest 1500"]).unwrap();
        assert_eq!((found.lines, found.said), (3, Some((4, Duration::from_micros(1500)))));
        assert!(log(&["line 2", "line 1"]).is_err());
        assert!(log(&["line 1", "something else"]).is_err());
        assert_eq!(log(&["line 1", "holdfast: 3 log records are missing"]).unwrap().lines, 1);
        assert!(log(&["line 1"]).unwrap().said.is_none());
    }
}

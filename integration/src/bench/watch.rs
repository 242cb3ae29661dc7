//! What it costs to watch a node with many running containers: lists, statuses, statistics and metrics,
//! as a kubelet and a scraper ask for them; with the processor time that the daemon needs.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use holdfast_protos::cri as api;

use super::{
    Plan, Side, WIDTH, cpu, millis, progress,
    samples::{
        CONTAINERD, Samples, WATCH_CPU, WATCH_LIST, WATCH_METRICS, WATCH_POD_STATS, WATCH_STATS,
        WATCH_STATUS,
    },
};

/// Rounds of each question.
const ROUNDS: usize = 40;

/// Which question a figure is about.
#[derive(Clone, Copy, Debug)]
enum Question {
    List,
    Status,
    Stats,
    PodStats,
    Metrics,
}

impl Question {
    const ALL: [Self; 5] = [Self::List, Self::Status, Self::Stats, Self::PodStats, Self::Metrics];

    /// Names of the time that it takes, and of the processor time of the daemon.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::List => (WATCH_LIST, WATCH_CPU[0]),
            Self::Status => (WATCH_STATUS, WATCH_CPU[1]),
            Self::Stats => (WATCH_STATS, WATCH_CPU[2]),
            Self::PodStats => (WATCH_POD_STATS, WATCH_CPU[3]),
            Self::Metrics => (WATCH_METRICS, WATCH_CPU[4]),
        }
    }
}

/// 500 running containers in 10 pods (with `quick` 50 in 5).
pub(super) async fn watch(plan: &Plan, samples: &mut Samples, sides: &mut [Side]) -> Result<()> {
    let (pods, each) = if plan.quick { (5, 10) } else { (10, 50) };
    for side in sides.iter_mut() {
        progress(format!("{} running containers for {}", pods * each, side.column));
        side.fill(pods, each, &["/bin/sleep", "100000"]).await?;
        side.start_all().await?;
        ensure!(side.ask(Question::Stats).await? == pods * each, "some are not told of");
    }
    let rounds = if plan.quick { 10 } else { ROUNDS };
    for question in Question::ALL {
        progress(format!("{question:?}"));
        let (time, cpu_time) = question.names();
        for side in sides.iter_mut() {
            // Not every runtime has metrics.
            if side.column == CONTAINERD && matches!(question, Question::Metrics) {
                continue;
            }
            let before = cpu(side.daemon.pid())?;
            for _ in 0..rounds {
                let started = Instant::now();
                let found = side.ask(question).await?;
                samples.add(time, side.column, millis(started));
                ensure!(found > 0, "{question:?}: nothing is told");
            }
            // The kernel counts in hundredths of a second: only many calls together say something.
            let used = (cpu(side.daemon.pid())? - before).as_secs_f64() * 1000.0;
            samples.add(cpu_time, side.column, used / rounds as f64);
        }
    }
    for side in sides.iter_mut() {
        side.clear().await?;
    }
    Ok(())
}

impl Side {
    /// Starts every container there is.
    async fn start_all(&mut self) -> Result<()> {
        let containers = self.containers().await?;
        stream::iter(containers)
            .map(|container| {
                let mut runtime = self.runtime.clone();
                async move {
                    let request = api::StartContainerRequest { container_id: container.id };
                    runtime.start_container(request).await
                }
            })
            .buffer_unordered(WIDTH)
            .try_collect::<Vec<_>>()
            .await?;
        Ok(())
    }

    /// Asks, and gives how many things were told.
    async fn ask(&mut self, question: Question) -> Result<usize> {
        let runtime = &mut self.runtime;
        Ok(match question {
            Question::List => {
                let request = api::ListContainersRequest::default();
                runtime.list_containers(request).await?.into_inner().containers.len()
            }
            Question::Status => {
                let request = api::StatusRequest::default();
                let status = runtime.status(request).await?.into_inner().status;
                status.context("no status")?.conditions.len()
            }
            Question::Stats => {
                let request = api::ListContainerStatsRequest::default();
                runtime.list_container_stats(request).await?.into_inner().stats.len()
            }
            Question::PodStats => {
                let request = api::ListPodSandboxStatsRequest::default();
                runtime.list_pod_sandbox_stats(request).await?.into_inner().stats.len()
            }
            Question::Metrics => {
                let mut stream = runtime
                    .stream_pod_sandbox_metrics(api::StreamPodSandboxMetricsRequest {})
                    .await?
                    .into_inner();
                let mut told = 0;
                while let Some(message) = stream.next().await {
                    told += message?.pod_sandbox_metrics.len();
                }
                told
            }
        })
    }
}

//! What subscribers of GetContainerEvents cost: CPU time of the daemon for each event, with none and
//! with ten of them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Result, bail, ensure};
use holdfast_protos::cri as api;

use super::{
    Plan, Side, cpu, progress,
    samples::{EVENT, EVENT_TEN, Samples},
};
use crate::wait::{Look, eventually};

/// Subscribers where there are any.
const SUBSCRIBERS: usize = 10;
/// Containers whose lives are the events of a round.
const CONTAINERS: usize = 40;
/// How long a runtime has to take subscriptions.
const SUBSCRIBED: Duration = Duration::from_secs(1);
/// Created, started, stopped, deleted.
const EACH: usize = 4;

pub(super) async fn run(plan: &Plan, samples: &mut Samples, sides: &mut [Side]) -> Result<()> {
    let mut pods = Vec::new();
    for side in sides.iter_mut() {
        pods.push(side.run_pod().await?);
    }
    let rounds = if plan.quick { 2 } else { 7 };
    for round in 0..rounds {
        progress(format!("events {}/{rounds}", round + 1));
        for (side, (pod, config)) in sides.iter_mut().zip(&pods) {
            for (metric, subscribers) in [(EVENT, 0), (EVENT_TEN, SUBSCRIBERS)] {
                // Before containerd 1.7 there are none to subscribe to.
                if let Some(micros) = one(side, pod, config.as_ref(), subscribers).await? {
                    samples.add(metric, side.column, micros);
                }
            }
        }
    }
    for side in sides.iter_mut() {
        side.clear().await?;
    }
    Ok(())
}

/// Microseconds of the daemon's CPU for each event, and for what it did that the event tells; `None`: it
/// has no events.
async fn one(
    side: &mut Side,
    pod: &str,
    config: Option<&api::PodSandboxConfig>,
    subscribers: usize,
) -> Result<Option<f64>> {
    let told = Arc::new(AtomicUsize::new(0));
    let mut readers = tokio::task::JoinSet::new();
    for _ in 0..subscribers {
        // A connection each, as different programs have; it must have no deadline.
        let mut client = side.daemon.cri().deadline(Duration::from_secs(3600)).runtime();
        let told = told.clone();
        readers.spawn(async move {
            // containerd answers with its first event.
            let stream = client.get_container_events(api::GetEventsRequest {}).await?;
            let mut stream = stream.into_inner();
            while stream.message().await?.is_some() {
                told.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<_, tonic::Status>(())
        });
    }
    if subscribers > 0 {
        // One that has no events says so at once; one that has them has taken the subscriptions by then.
        match tokio::time::timeout(SUBSCRIBED, readers.join_next()).await {
            Err(_) => {}
            Ok(Some(Ok(Err(status)))) if status.code() == tonic::Code::Unimplemented => {
                return Ok(None);
            }
            Ok(ended) => bail!("a subscription ended: {ended:?}"),
        }
    }
    let pid = side.daemon.pid();
    let before = cpu(pid)?;
    for number in 0..CONTAINERS {
        let argv = ["/bin/sleep", "100000"];
        let request = side.container_request(pod, config, &format!("e{number}"), &argv);
        let id = side.runtime.create_container(request).await?.into_inner().container_id;
        let request = api::StartContainerRequest { container_id: id.clone() };
        side.runtime.start_container(request).await?;
        let request = api::StopContainerRequest { container_id: id.clone(), timeout: 0 };
        side.runtime.stop_container(request).await?;
        side.runtime.remove_container(api::RemoveContainerRequest { container_id: id }).await?;
    }
    let events = CONTAINERS * EACH;
    eventually(Duration::from_secs(30), "every subscriber to be told all", async || {
        let told = told.load(Ordering::Relaxed);
        Ok(Look::when(told >= events * subscribers, || format!("{told} events")))
    })
    .await?;
    let spent = cpu(pid)?.saturating_sub(before);
    ensure!(readers.try_join_next().is_none(), "a subscription ended");
    readers.abort_all();
    Ok(Some(spent.as_secs_f64() * 1e6 / events as f64))
}

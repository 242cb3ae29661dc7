//! The CRI's server streams. Each sends as it goes: what is not yet read by the client is not yet
//! made, so a slow client costs a list of references and one message.

use std::{pin::Pin, sync::Arc};

use futures::{Stream, StreamExt, stream};
use holdfast_protos::cri;
use tonic::Status;

use super::{convert, metrics, stats};
use crate::{
    events::{Event, Events, Kind},
    pod::{ContainerView, PodView, Pods},
    stats::Stats,
};

/// Most items in one message: some hundred kilobytes, well below every client's limit.
const CHUNK: usize = 100;

/// A stream of answers.
pub(super) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send + 'static>>;

fn chunks<T: Send + 'static>(items: Vec<T>) -> impl Stream<Item = Vec<T>> + Send + 'static {
    let mut items = items.into_iter();
    stream::iter(std::iter::from_fn(move || {
        let chunk: Vec<T> = items.by_ref().take(CHUNK).collect();
        (!chunk.is_empty()).then_some(chunk)
    }))
}

/// Messages of up to [`CHUNK`] items, made one by one as they are read.
pub(super) fn list<T, M>(
    items: Vec<T>,
    message: impl Fn(Vec<T>) -> M + Send + 'static,
) -> Answers<M>
where
    T: Send + 'static,
    M: Send + 'static,
{
    Box::pin(chunks(items).map(move |chunk| Ok(message(chunk))))
}

/// Usage of containers, read as it is sent.
pub(super) fn container_stats(
    stats: Arc<Stats>,
    views: Vec<Arc<ContainerView>>,
) -> Answers<cri::StreamContainerStatsResponse> {
    Box::pin(chunks(views).then(move |chunk| {
        let stats = stats.clone();
        async move {
            let container_stats = stats::containers(&stats, chunk).await?;
            Ok(cri::StreamContainerStatsResponse { container_stats })
        }
    }))
}

/// Usage of pods, read as it is sent.
pub(super) fn pod_stats(
    stats: Arc<Stats>,
    views: Vec<Arc<PodView>>,
) -> Answers<cri::StreamPodSandboxStatsResponse> {
    Box::pin(chunks(views).then(move |chunk| {
        let stats = stats.clone();
        async move {
            let pod_sandbox_stats = stats::pods(&stats, chunk).await?;
            Ok(cri::StreamPodSandboxStatsResponse { pod_sandbox_stats })
        }
    }))
}

/// Metrics of pods, read as they are sent.
pub(super) fn pod_metrics(
    stats: Arc<Stats>,
    views: Vec<Arc<PodView>>,
) -> Answers<cri::StreamPodSandboxMetricsResponse> {
    Box::pin(stream::try_unfold(views.into_iter(), move |mut rest| {
        let stats = stats.clone();
        async move {
            let message = metrics::next(&stats, &mut rest).await?;
            Ok(message.map(|pod_sandbox_metrics| {
                (cri::StreamPodSandboxMetricsResponse { pod_sandbox_metrics }, rest)
            }))
        }
    }))
}

/// Changes, from now on.
pub(super) fn events(events: &Events, pods: Pods) -> Answers<cri::ContainerEventResponse> {
    let subscription = events.subscribe(move || pods.list());
    Box::pin(stream::unfold(subscription, |mut subscription| async {
        let event = subscription.next().await?;
        Some((Ok(event_response(&event)), subscription))
    }))
}

fn event_response(event: &Event) -> cri::ContainerEventResponse {
    let kind = match event.kind {
        Kind::Created => cri::ContainerEventType::ContainerCreatedEvent,
        Kind::Started => cri::ContainerEventType::ContainerStartedEvent,
        Kind::Stopped => cri::ContainerEventType::ContainerStoppedEvent,
        Kind::Deleted => cri::ContainerEventType::ContainerDeletedEvent,
    };
    cri::ContainerEventResponse {
        container_id: event.id.clone(),
        container_event_type: kind as i32,
        created_at: convert::nanos(event.at),
        pod_sandbox_status: Some(convert::pod_status(&event.pod)),
        containers_statuses: event
            .pod
            .containers
            .values()
            .map(|container| convert::container_status(container))
            .collect(),
    }
}

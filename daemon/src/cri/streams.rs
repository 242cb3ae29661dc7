//! The CRI's server streams. Each sends as it goes: what is not yet read by the client is not yet
//! made, so a slow client costs a list of references and one message.

use std::{collections::BTreeMap, pin::Pin, sync::Arc};

use futures::{Stream, StreamExt, stream};
use holdfast_protos::cri;
use tonic::Status;

use super::{convert, metrics, stats};
use crate::{
    events::{Event, Events, Kind},
    metrics::Watching,
    pod::{ContainerView, PodView, Pods},
    stats::Stats,
};

/// Most items that are read for one message of usage.
const CHUNK: usize = 25;

/// A message is sent when it has this many bytes: annotations may make a single item that large, and no
/// client takes more than some megabytes.
const BYTES: usize = 512 << 10;

/// A stream of answers.
pub(super) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send + 'static>>;

/// What goes into one message each, by what an item will at least have of bytes.
fn chunks<T: Send + 'static>(
    items: Vec<T>,
    bytes: impl Fn(&T) -> usize + Send + 'static,
) -> impl Stream<Item = Vec<T>> + Send + 'static {
    let mut items = items.into_iter();
    stream::iter(std::iter::from_fn(move || {
        let (mut chunk, mut size) = (Vec::new(), 0);
        while chunk.len() < CHUNK
            && size < BYTES
            && let Some(item) = items.next()
        {
            size += bytes(&item);
            chunk.push(item);
        }
        (!chunk.is_empty()).then_some(chunk)
    }))
}

/// Labels and annotations: what a user can make as large as they like.
fn attributes<'a>(maps: impl IntoIterator<Item = &'a BTreeMap<String, String>>) -> usize {
    maps.into_iter().flatten().map(|(key, value)| key.len() + value.len()).sum()
}

fn container_bytes(view: &ContainerView) -> usize {
    let config = &view.record.config;
    attributes([&config.labels, &config.annotations])
}

/// What is listed, made `item` by item and `message` by message as the client reads them.
pub(super) fn list<T, I, M>(
    all: Vec<T>,
    item: impl Fn(&T) -> I + Send + 'static,
    message: impl Fn(Vec<I>) -> M + Send + 'static,
) -> Answers<M>
where
    T: Send + 'static,
    I: prost::Message,
    M: Send + 'static,
{
    let mut rest = all.into_iter();
    Box::pin(stream::iter(std::iter::from_fn(move || {
        let (mut items, mut bytes) = (Vec::new(), 0);
        while bytes < BYTES
            && let Some(next) = rest.next()
        {
            let next = item(&next);
            bytes += next.encoded_len();
            items.push(next);
        }
        (!items.is_empty()).then(|| Ok(message(items)))
    })))
}

/// Usage of containers, read as it is sent.
pub(super) fn container_stats(
    stats: Arc<Stats>,
    views: Vec<Arc<ContainerView>>,
) -> Answers<cri::StreamContainerStatsResponse> {
    Box::pin(chunks(views, |view| container_bytes(view)).then(move |chunk| {
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
    let bytes = |view: &Arc<PodView>| {
        let config = &view.record.config;
        let containers = view.containers.values().map(|container| container_bytes(container));
        attributes([&config.labels, &config.annotations]) + containers.sum::<usize>()
    };
    Box::pin(chunks(views, bytes).then(move |chunk| {
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
    let client = (subscription, Watching::begin());
    Box::pin(stream::unfold(client, |(mut subscription, watching)| async {
        let event = subscription.next().await?;
        Some((Ok(event_response(&event)), (subscription, watching)))
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
        containers_statuses: convert::container_statuses(&event.pod),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lists_messages_are_of_bounded_size_and_made_as_they_are_read() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let made = Arc::new(AtomicUsize::new(0));
        let counted = made.clone();
        let item = move |size: &usize| {
            counted.fetch_add(1, Ordering::Relaxed);
            cri::Container { id: "x".repeat(*size), ..Default::default() }
        };
        let sizes = vec![BYTES / 2, BYTES / 2, 1, BYTES * 3, 1, 1];
        let mut messages = list(sizes, item, |containers| containers.len());
        assert_eq!(made.load(Ordering::Relaxed), 0);
        assert_eq!(messages.next().await.unwrap().unwrap(), 2);
        assert_eq!(made.load(Ordering::Relaxed), 2);
        let rest: Vec<_> = messages.map(Result::unwrap).collect().await;
        assert_eq!(rest, [2, 2]);
        assert_eq!(list(Vec::new(), |()| cri::Container::default(), |c| c.len()).count().await, 0);
    }

    #[tokio::test]
    async fn usage_is_read_for_as_many_as_a_message_holds() {
        let lengths = |sizes: Vec<usize>| async {
            chunks(sizes, |size| *size).map(|chunk| chunk.len()).collect::<Vec<_>>().await
        };
        assert_eq!(lengths(vec![1; 2 * CHUNK + 1]).await, [CHUNK, CHUNK, 1]);
        assert_eq!(lengths(vec![BYTES / 2, BYTES / 2, 1, BYTES * 3, 1]).await, [2, 2, 1]);
        assert_eq!(lengths(Vec::new()).await, [0; 0]);
    }
}

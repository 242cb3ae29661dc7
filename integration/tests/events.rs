//! GetContainerEvents: any number of subscribers; a slow one holds nobody up and misses no final state.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use holdfast_integration::{Node, Pod, cri::Cri, eventually, node::on, wait::Look};
use holdfast_protos::cri::{self, ContainerEventType as Type};
use tonic::Streaming;

type Events = Streaming<cri::ContainerEventResponse>;

async fn subscribe(node: &Node) -> Result<Events> {
    subscribe_at(node.cri()).await
}

async fn subscribe_at(cri: &Cri) -> Result<Events> {
    // A subscription has no end: its connection must have no deadline.
    let mut client = cri.deadline(Duration::from_secs(3600)).runtime();
    Ok(client.get_container_events(cri::GetEventsRequest {}).await?.into_inner())
}

/// The window that HTTP/2 begins with and that the kubelet's client keeps until it has measured more.
const WINDOW: u32 = 65_535;

/// How often a subscriber was brought up to date because it was too slow.
fn resyncs(metrics: &str) -> Result<u64> {
    let mut stream = TcpStream::connect(metrics).context("metrics")?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let line = text.lines().find_map(|line| line.strip_prefix("holdfast_event_resyncs_total "));
    Ok(line.with_context(|| format!("no such metric in {text}"))?.trim().parse()?)
}

/// What a subscriber knows, by what it was told.
#[derive(Debug, Default)]
struct Known {
    /// Containers and pods that are not gone, and the last that was told of them.
    last: BTreeMap<String, Type>,
    /// What each was told to be, in order.
    told: BTreeMap<String, Vec<Type>>,
    events: usize,
}

impl Known {
    fn learn(&mut self, event: &cri::ContainerEventResponse) -> Result<()> {
        let kind = event.container_event_type();
        let id = event.container_id.clone();
        self.events += 1;
        self.told.entry(id.clone()).or_default().push(kind);
        ensure!(event.created_at > 0, "an event without a time: {event:?}");
        // What the kubelet's evented PLEG reads: the pod, and all of its containers.
        let pod = event.pod_sandbox_status.as_ref().context("no pod in an event")?;
        ensure!(!pod.id.is_empty() && pod.metadata.is_some(), "{pod:?}");
        if pod.id != id && kind != Type::ContainerDeletedEvent {
            let status = event.containers_statuses.iter().find(|status| status.id == id);
            let status = status.with_context(|| format!("no status of {id} in its event"))?;
            let fits = match status.state() {
                cri::ContainerState::ContainerCreated => kind == Type::ContainerCreatedEvent,
                cri::ContainerState::ContainerRunning => kind == Type::ContainerStartedEvent,
                cri::ContainerState::ContainerExited => kind == Type::ContainerStoppedEvent,
                cri::ContainerState::ContainerUnknown => false,
            };
            ensure!(fits, "{kind:?} with {:?}", status.state());
        }
        if kind == Type::ContainerDeletedEvent {
            self.last.remove(&id);
        } else {
            self.last.insert(id, kind);
        }
        Ok(())
    }
}

/// What is there, in the words of events.
async fn listed(node: &Node) -> Result<BTreeMap<String, Type>> {
    let mut all = BTreeMap::new();
    for pod in node.pods().await? {
        let ready = pod.state() == cri::PodSandboxState::SandboxReady;
        let kind = if ready { Type::ContainerStartedEvent } else { Type::ContainerStoppedEvent };
        all.insert(pod.id, kind);
    }
    for container in node.containers().await? {
        let kind = match container.state() {
            cri::ContainerState::ContainerCreated => Type::ContainerCreatedEvent,
            cri::ContainerState::ContainerRunning => Type::ContainerStartedEvent,
            cri::ContainerState::ContainerExited => Type::ContainerStoppedEvent,
            cri::ContainerState::ContainerUnknown => bail!("nobody knows {}", container.id),
        };
        all.insert(container.id, kind);
    }
    Ok(all)
}

/// Reads until it knows what is listed.
async fn reads_up_to(
    stream: &mut Events,
    known: &mut Known,
    listed: &BTreeMap<String, Type>,
) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(60);
    while known.last != *listed {
        let event = tokio::time::timeout(Duration::from_secs(10), stream.message()).await;
        let Ok(event) = event else {
            bail!("no more events; it knows\n{:#?}\nand there is\n{listed:#?}", known.last)
        };
        known.learn(&event?.context("the stream ended")?)?;
        ensure!(Instant::now() < end, "it never gets there");
    }
    Ok(())
}

/// Makes containers come and go; every fifth ends by itself, every seventh stays.
async fn come_and_go(pod: &Pod, image: &str, count: u32) -> Result<()> {
    for number in 0..count {
        let ends = number % 5 == 0;
        let script = if ends { "exit 3" } else { "exec sleep 1000" };
        let container = pod.container(image).name(&format!("c{number}")).sh(script).start().await?;
        if ends {
            container.wait().await?;
        }
        if number % 7 != 0 {
            container.stop(0).await?;
            container.remove().await?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_subscribers_are_told_everything_in_order() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let mut streams = Vec::new();
    for _ in 0..10 {
        streams.push((subscribe(&node).await?, Known::default()));
    }
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh("exec sleep 1000").start().await?;
    container.stop(0).await?;
    let short = pod.container(&image).name("short").sh("exit 3").start().await?;
    short.wait().await?;
    container.remove().await?;
    let listed = listed(&node).await?;
    use Type::{
        ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted,
        ContainerStartedEvent as Started, ContainerStoppedEvent as Stopped,
    };
    for (stream, known) in &mut streams {
        reads_up_to(stream, known, &listed).await?;
        assert_eq!(known.told[&pod.id], [Started]);
        assert_eq!(known.told[&container.id], [Created, Started, Stopped, Deleted]);
        // One that ends at once may be told as ended when it is told as started.
        let short = &known.told[&short.id];
        ensure!(short.first() == Some(&Created) && short.last() == Some(&Stopped), "{short:?}");
    }
    // One that goes away, whole pod and all.
    drop(streams.pop());
    pod.stop().await?;
    pod.remove().await?;
    for (stream, known) in &mut streams {
        reads_up_to(stream, known, &BTreeMap::new()).await?;
        assert_eq!(known.told[&pod.id], [Started, Stopped, Deleted]);
        assert_eq!(known.told[&short.id].last(), Some(&Deleted));
    }
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_that_stalls_holds_nobody_up_and_misses_no_final_state() -> Result<()> {
    let metrics = holdfast_integration::registry::free_address()?.to_string();
    let mut node =
        Node::builder().config(&format!("[metrics]\naddress = {metrics:?}\n")).start().await?;
    let image = node.busybox().await?;
    // One reads as it goes. The other does not until all is over: its window is full long before, for
    // each event carries a whole pod, and then what the daemon keeps for the slow is too.
    let narrow = node.cri().window(WINDOW);
    let mut stalled = subscribe_at(&narrow).await?;
    let mut reader = subscribe_at(&narrow).await?;
    let pods =
        [node.pod("a").host_network().run().await?, node.pod("b").host_network().run().await?];
    let (end, mut ended) = tokio::sync::oneshot::channel::<()>();
    let reading = tokio::spawn(async move {
        let mut known = Known::default();
        loop {
            tokio::select! {
                event = reader.message() => known.learn(&event?.context("the stream ended")?)?,
                _ = &mut ended => return Ok::<_, anyhow::Error>((reader, known)),
            }
        }
    });
    let begun = Instant::now();
    let (one, two) =
        tokio::join!(come_and_go(&pods[0], &image, 100), come_and_go(&pods[1], &image, 100));
    one?;
    two?;
    // A minute of not reading, whatever the machine made of the rest.
    let minute = Duration::from_secs(60).saturating_sub(begun.elapsed());
    tokio::time::sleep(minute).await;
    // The daemon has not waited: the other subscriber knows everything.
    let all = listed(&node).await?;
    let _ = end.send(());
    let (mut reader, mut known) = reading.await??;
    reads_up_to(&mut reader, &mut known, &all).await?;
    let complete = known.events;
    ensure!(complete >= 200 * 3, "only {complete} events: the load was no load");
    assert_eq!(resyncs(&metrics)?, 0, "who reads is never behind");
    // More happens, then the one that stalled wakes up.
    let late = pods[0].container(&image).name("late").sh("exit 7").start().await?;
    late.wait().await?;
    pods[1].stop().await?;
    let all = listed(&node).await?;
    let mut slow = Known::default();
    reads_up_to(&mut stalled, &mut slow, &all).await?;
    assert_eq!(resyncs(&metrics)?, 1, "{} events of {complete}", slow.events);
    ensure!(slow.events < complete, "it was told all {complete} events");
    assert_eq!(slow.last.get(&late.id), Some(&Type::ContainerStoppedEvent));
    // And from there on it is told what happens as anybody is.
    pods[0].container(&image).name("later").sh("true").start().await?.wait().await?;
    let all = listed(&node).await?;
    reads_up_to(&mut stalled, &mut slow, &all).await?;
    reads_up_to(&mut reader, &mut known, &all).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_status_has_its_containers_and_a_time() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let runs = pod.container(&image).sh("exec sleep 1000").start().await?;
    let ended = pod.container(&image).name("ended").sh("exit 3").start().await?;
    ended.wait().await?;
    let ask = async || {
        let request =
            cri::PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
        anyhow::Ok(node.cri().runtime().pod_sandbox_status(request).await?.into_inner())
    };
    // The newest first, of several that have one name too: the kubelet goes by the first.
    let mut wanted = vec![ended.id.clone(), runs.id.clone()];
    for attempt in 1..4 {
        let again = pod.container(&image).name("ended").attempt(attempt).sh("exit 3");
        wanted.insert(0, again.start().await?.id);
    }
    let first = ask().await?;
    let ids: Vec<_> = first.containers_statuses.iter().map(|c| c.id.clone()).collect();
    assert_eq!(ids, wanted);
    for status in first.containers_statuses.iter().skip(3) {
        let alone = holdfast_integration::pod::Container::existing(node.cri(), &status.id);
        assert_eq!(*status, alone.status().await?, "the same as ContainerStatus");
    }
    // The kubelet compares it with what it has cached: it must grow, in nanoseconds.
    ensure!(first.timestamp > 1_600_000_000_000_000_000, "{}", first.timestamp);
    eventually(Duration::from_secs(5), "a later time", async || {
        let later = ask().await?.timestamp;
        Ok(Look::when(later > first.timestamp, || later.to_string()))
    })
    .await?;
    node.finish().await
}

/// The kubelet drops an event that is older than the status it has: one that is not in that status would
/// be lost, and a pod stand still until the next relist.
#[tokio::test(flavor = "multi_thread")]
async fn a_status_knows_every_event_that_is_older() -> Result<()> {
    const CONTAINERS: usize = 30;
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let mut events = subscribe(&node).await?;
    let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let askers = (0..4).map(|_| {
        let (mut client, id, done) = (node.cri().runtime(), pod.id.clone(), done.clone());
        tokio::spawn(async move {
            let mut told = Vec::new();
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let request =
                    cri::PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: false };
                let status = client.pod_sandbox_status(request).await?.into_inner();
                let states: BTreeMap<_, _> =
                    status.containers_statuses.iter().map(|c| (c.id.clone(), c.state())).collect();
                told.push((status.timestamp, states));
            }
            Ok::<_, tonic::Status>(told)
        })
    });
    let askers: Vec<_> = askers.collect();
    for number in 0..CONTAINERS {
        let container = pod.container(&image).name(&format!("c{number}")).sh("true");
        container.start().await?.wait().await?;
    }
    done.store(true, std::sync::atomic::Ordering::Relaxed);
    let mut happened = Vec::new();
    let mut stopped = 0;
    while stopped < CONTAINERS {
        let event = tokio::time::timeout(Duration::from_secs(10), events.message()).await??;
        let event = event.context("the stream ended")?;
        stopped += usize::from(event.container_event_type() == Type::ContainerStoppedEvent);
        happened.push((event.created_at, event.container_id.clone(), event.container_event_type()));
    }
    for asker in askers {
        let told = asker.await??;
        ensure!(told.len() > CONTAINERS, "{} questions are none", told.len());
        for (at, states) in told {
            for (_, id, kind) in happened.iter().filter(|(then, id, _)| *then < at && *id != pod.id)
            {
                let state = states.get(id).with_context(|| format!("{id} is not told of"))?;
                ensure!(
                    *kind != Type::ContainerStoppedEvent
                        || *state == cri::ContainerState::ContainerExited,
                    "a status of {at} says {state:?} of {id}, and that was told to have ended before"
                );
            }
        }
    }
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_ends_with_the_daemon_and_leaves_nothing() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let mut streams = Vec::new();
    for _ in 0..50 {
        streams.push(subscribe(&node).await?);
    }
    let threads =
        |pid: i32| Ok::<_, std::io::Error>(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count());
    let with = threads(node.daemon_pid())?;
    // Those that go away are let go, whether or not anything happens.
    drop(streams);
    on(&node, Duration::from_secs(20), "the connections to be closed", async || {
        let now = threads(node.daemon_pid())?;
        Ok(Look::when(now + 45 <= with, || format!("{now} descriptors of {with}")))
    })
    .await?;
    let mut stays = subscribe(&node).await?;
    node.terminate()?;
    let end = tokio::time::timeout(Duration::from_secs(10), stays.message()).await?;
    ensure!(!matches!(end, Ok(Some(_))), "{end:?}");
    node.restart().await?;
    // A new one is told of what happens from then on.
    let mut again = subscribe(&node).await?;
    let container = pod.container(&image).sh("exec sleep 1000").create().await?;
    let event = tokio::time::timeout(Duration::from_secs(10), again.message()).await??;
    assert_eq!(event.context("the stream ended")?.container_id, container.id);
    node.finish().await
}

//! A pod's owner: the task that alone changes the pod.
//!
//! The owner never waits for anything outside. Work that does runs as an operation beside it and
//! comes back as an [`Effect`], which the owner applies: record, then memory, then reply.
//!
//! - A request for an operation that is under way joins it.
//! - A request that must not overlap with one under way is put off until that has ended.
//! - What is told by the shim (exits) is taken at any time.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    future::Future,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, SystemTime},
};

use holdfast_shim::{
    client::{Client, Endpoint},
    crash,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{Id, JoinError, JoinSet},
};
use tracing::{Instrument, Span, info, warn};

use super::{
    ContainerView, Error, Pod, PodView, Pods, Shared, checkpoint,
    config::{ContainerConfig, Resources},
    container, foreign,
    nri::Change as Limits,
    recover, run,
    state::{Change, End, Exit, PodState},
};
use crate::{
    config::Sandboxing,
    error::chain,
    events::Kind,
    id::ContainerId,
    shims::Link,
    store::pods::{ContainerRecord, PodRecord},
    trace::TARGET,
};

/// How long operations may still take when the daemon is asked to end. What is not done by then is
/// finished or undone at the next start.
const DRAIN: Duration = Duration::from_secs(15);

/// When an exit that could not be recorded is taken again.
const RETRY: Duration = Duration::from_secs(1);

/// What may be asked of a pod.
pub(super) enum Request {
    Run,
    StopPod,
    RemovePod,
    Create {
        config: Box<ContainerConfig>,
    },
    Start {
        id: ContainerId,
    },
    Remove {
        id: ContainerId,
    },
    Update {
        id: ContainerId,
        change: Box<Limits>,
    },
    Checkpoint {
        what: checkpoint::What,
        limit: Duration,
    },
    /// Replace the shim's code.
    Upgrade {
        binary: std::path::PathBuf,
    },
    /// New overhead and new sum of the containers' resources; `None`: as it was.
    UpdatePod {
        change: Box<(Option<Resources>, Option<Resources>)>,
    },
}

/// What a request is answered with.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    Done,
    Container(ContainerId),
}

pub(super) type Reply = oneshot::Sender<Shared<Answer>>;

/// What the owner is told.
pub(super) enum Command {
    Request {
        request: Request,
        reply: Reply,
        /// What it is traced below.
        cause: Span,
    },
    /// A container's first process ended. `taken` is answered when the record of it is written.
    Exited { id: ContainerId, end: End, taken: oneshot::Sender<()> },
}

/// An operation: what a second request can join, and what others must not overlap with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Op {
    Run,
    StopPod,
    RemovePod,
    Create(String, u32),
    Start(ContainerId),
    Remove(ContainerId),
    Update(ContainerId),
    UpdatePod,
    Checkpoint(checkpoint::What),
    /// Resumes what a checkpoint of an earlier daemon had paused.
    Mend,
    Upgrade,
    /// Frees what the runtime holds of an ended container.
    Reap(ContainerId),
    /// Takes away a container, or the pod, that a crash left half made.
    Discard(Option<ContainerId>),
    /// Reaches the shim again.
    Link,
    /// Waits for the connection's end.
    Watch,
    /// Waits for the end of a container that a foreign shim runs; `None`: of the pod's own.
    Ends(Option<ContainerId>),
}

impl Op {
    /// Whether the operation touches that container.
    fn touches(&self, id: &ContainerId) -> bool {
        match self {
            Op::Start(of) | Op::Remove(of) | Op::Update(of) | Op::Reap(of) => of == id,
            Op::Discard(of) => of.as_ref() == Some(id),
            Op::Checkpoint(what) => what.containers.contains(id),
            Op::Run
            | Op::StopPod
            | Op::RemovePod
            | Op::UpdatePod
            | Op::Upgrade
            | Op::Create(..)
            | Op::Mend
            | Op::Link
            | Op::Watch
            | Op::Ends(_) => false,
        }
    }

    /// Its name in a trace; what nobody asks for is in none.
    fn name(&self) -> Option<&'static str> {
        match self {
            Op::Run => Some("run pod"),
            Op::StopPod => Some("stop pod"),
            Op::RemovePod => Some("remove pod"),
            Op::Create(..) => Some("create container"),
            Op::Start(_) => Some("start container"),
            Op::Remove(_) => Some("remove container"),
            Op::Update(_) => Some("update container"),
            Op::UpdatePod => Some("update pod"),
            Op::Checkpoint(_) => Some("checkpoint"),
            Op::Upgrade => Some("upgrade shim"),
            Op::Mend | Op::Ends(_) | Op::Reap(_) | Op::Discard(_) | Op::Link | Op::Watch => None,
        }
    }

    /// Whether a pod's removal must wait for it.
    fn holds_the_pod(&self) -> bool {
        match self {
            Op::Run
            | Op::StopPod
            | Op::RemovePod
            | Op::Create(..)
            | Op::Start(_)
            | Op::Remove(_)
            | Op::Update(_)
            | Op::UpdatePod
            | Op::Checkpoint(_)
            | Op::Upgrade
            | Op::Reap(_)
            | Op::Discard(_) => true,
            Op::Mend | Op::Link | Op::Watch | Op::Ends(_) => false,
        }
    }
}

/// What an operation that went well changes.
pub(super) enum Effect {
    Up(run::Up),
    Stopped,
    Gone,
    Created(Box<ContainerRecord>),
    Started {
        id: ContainerId,
        at: SystemTime,
        pid: u32,
    },
    Removed(ContainerId),
    Updated {
        id: ContainerId,
        resources: Box<Resources>,
    },
    PodUpdated(Box<(Option<Resources>, Option<Resources>)>),
    /// Nothing of the pod.
    Done,
    Linked {
        client: Client,
        /// It is a new shim.
        endpoint: Option<Endpoint>,
        started: Vec<(ContainerId, u32)>,
        exits: Vec<recover::Seen>,
    },
    Dead {
        exits: Vec<recover::Seen>,
    },
    /// The machine was started again.
    Rebooted {
        exits: Vec<recover::Seen>,
    },
    Closed,
    Ended(recover::Seen),
    SandboxEnded,
}

struct Container {
    view: Arc<ContainerView>,
}

impl Container {
    fn new(record: ContainerRecord) -> Self {
        let asked_to_stop = Arc::new(AtomicBool::new(false));
        Self { view: Arc::new(ContainerView { record, asked_to_stop }) }
    }
    fn set(&mut self, record: ContainerRecord) {
        let asked_to_stop = self.view.asked_to_stop.clone();
        self.view = Arc::new(ContainerView { record, asked_to_stop });
    }
}

/// See the module.
pub(super) struct Owner {
    pods: Pods,
    pod: Pod,
    record: Arc<PodRecord>,
    containers: BTreeMap<ContainerId, Container>,
    half_made: Vec<ContainerRecord>,
    /// Containers that are being made.
    making: HashMap<Op, ContainerId>,
    /// Exits of containers whose making has not come back yet.
    early: HashMap<ContainerId, End>,
    stopping: bool,
    gone: bool,
    ops: JoinSet<Result<Effect, Error>>,
    running: HashMap<Id, Op>,
    joined: HashMap<Op, Vec<Reply>>,
    put_off: VecDeque<(Request, Reply)>,
    commands: mpsc::Receiver<Command>,
    view: watch::Sender<Arc<PodView>>,
    link: watch::Sender<Link>,
    /// By which the log knows the pod.
    span: Span,
}

impl Owner {
    pub(super) fn new(
        pods: Pods,
        record: PodRecord,
        containers: Vec<ContainerRecord>,
        link: Link,
        queue: usize,
    ) -> (Pod, Self) {
        let (half_made, made): (Vec<_>, Vec<_>) =
            containers.into_iter().partition(|c| c.state == super::state::ContainerState::Creating);
        let containers: BTreeMap<_, _> =
            made.into_iter().map(|c| (c.id.clone(), Container::new(c))).collect();
        let record = Arc::new(record);
        let first = view_of(&record, &containers, false);
        let (view, view_rx) = watch::channel(first);
        let (link, link_rx) = watch::channel(link);
        let (tx, commands) = mpsc::channel(queue);
        let pod = Pod { id: record.id.clone(), commands: tx, view: view_rx, link: link_rx };
        let owner = Self {
            pods,
            pod: pod.clone(),
            record,
            containers,
            half_made,
            making: HashMap::new(),
            early: HashMap::new(),
            stopping: false,
            gone: false,
            ops: JoinSet::new(),
            running: HashMap::new(),
            joined: HashMap::new(),
            put_off: VecDeque::new(),
            commands,
            view,
            link,
            span: Span::none(),
        };
        (pod, owner)
    }

    pub(super) async fn run(mut self) {
        let span = tracing::info_span!("pod", id = self.pod.id.short());
        self.span = span.clone();
        async {
            self.serve().await;
            self.drain().await;
        }
        .instrument(span)
        .await;
    }

    async fn serve(&mut self) {
        self.resume();
        let stop = self.pods.stop.clone();
        while !self.gone {
            tokio::select! {
                // Ends of operations first: they answer who waits and let in what was put off.
                // Then commands; the order to end last, so that nothing accepted is left unread.
                biased;
                Some(ended) = self.ops.join_next_with_id() => self.ended(ended).await,
                Some(command) = self.commands.recv() => self.command(command).await,
                () = stop.cancelled() => break,
            }
        }
    }

    /// What is to be done first for a pod from the records.
    fn resume(&mut self) {
        let services = self.pods.services.clone();
        for record in std::mem::take(&mut self.half_made) {
            let (pod, services) = (self.pod.clone(), services.clone());
            let op = Op::Discard(Some(record.id.clone()));
            self.spawn(op, container::discard(services, pod, record));
        }
        match (self.record.state, &self.record.endpoint) {
            (PodState::Ready, _) => self.reach(),
            // A new pod has nobody to undo for yet; its `Run` is the first command.
            (PodState::Starting, _) if matches!(*self.link.borrow(), Link::Pending) => {}
            (PodState::Starting, _) => {
                let record = self.record.clone();
                self.spawn(Op::Discard(None), run::discard(services, record));
            }
            (PodState::NotReady, _) => {}
        }
    }

    /// Lets operations end for a while; their effects count. Those that only wait are dropped.
    async fn drain(&mut self) {
        let deadline = tokio::time::sleep(DRAIN);
        tokio::pin!(deadline);
        while self.running.values().any(Op::holds_the_pod) {
            tokio::select! {
                // Whatever has ended by the deadline still counts.
                biased;
                Some(ended) = self.ops.join_next_with_id() => self.ended(ended).await,
                () = &mut deadline => {
                    warn!(operations = ?self.running.values(), "left unfinished at shutdown");
                    self.ops.detach_all();
                    break;
                }
            }
        }
    }

    fn spawn(
        &mut self,
        op: Op,
        work: impl Future<Output = Result<Effect, Error>> + Send + 'static,
    ) {
        // The log knows it by the pod, a trace by the request.
        let traced = match op.name() {
            Some(name) => tracing::info_span!(target: TARGET, "pod", otel.name = name),
            None => Span::none(),
        };
        let handle = self.ops.spawn(work.instrument(traced).instrument(self.span.clone()));
        self.running.insert(handle.id(), op);
    }

    fn is_running(&self, op: &Op) -> bool {
        self.running.values().any(|o| o == op)
    }

    /// Starts an operation, or joins it if it is under way.
    fn join<F>(&mut self, op: Op, reply: Reply, work: F)
    where
        F: Future<Output = Result<Effect, Error>> + Send + 'static,
    {
        if !self.is_running(&op) {
            self.spawn(op.clone(), work);
        }
        self.joined.entry(op).or_default().push(reply);
    }

    async fn command(&mut self, command: Command) {
        match command {
            Command::Request { request, reply, cause } => {
                let _below = cause.enter();
                self.request(request, reply);
            }
            Command::Exited { id, end, taken } => {
                if self.exited(&id, end).await {
                    // Nobody waits if the connection to the shim went meanwhile: it tells again.
                    let _ = taken.send(());
                }
            }
        }
    }

    fn request(&mut self, request: Request, reply: Reply) {
        if self.must_wait(&request) {
            self.put_off.push_back((request, reply));
            return;
        }
        if let Err((error, reply)) = self.admit(request, reply) {
            let _ = reply.send(Err(Arc::new(error)));
        }
    }

    /// Whether something under way must end before the request can be looked at.
    fn must_wait(&self, request: &Request) -> bool {
        let mut running = self.running.values();
        // Its connections break, and what came on them in between would not be done.
        if self.is_running(&Op::Upgrade) && !matches!(request, Request::Upgrade { .. }) {
            return true;
        }
        match request {
            Request::Upgrade { .. } => {
                running.any(|op| op.holds_the_pod() && !matches!(op, Op::Upgrade))
            }
            // What a crash left of it goes first; then there is no such pod, and a new one is made.
            Request::Run => running.any(|op| *op == Op::Discard(None)),
            Request::Create { .. } => running.any(|op| *op == Op::Discard(None)),
            Request::Start { id } | Request::Update { id, .. } => running.any(|op| {
                op.touches(id) && !matches!(op, Op::Start(_)) || matches!(op, Op::RemovePod)
            }),
            // What is paused by one is not captured by another.
            Request::Checkpoint { what, .. } => running.any(|op| {
                let same = matches!(op, Op::Checkpoint(other) if other == what);
                !same && what.containers.iter().any(|id| op.touches(id))
                    || matches!(op, Op::Mend | Op::StopPod | Op::RemovePod)
            }),
            Request::Remove { id } => running.any(|op| {
                op.touches(id) && !matches!(op, Op::Remove(_)) || matches!(op, Op::RemovePod)
            }),
            Request::UpdatePod { .. } => running.any(|op| {
                matches!(op, Op::Run | Op::UpdatePod | Op::RemovePod | Op::Discard(None))
            }),
            // A shim does not go before its last container, known or not.
            Request::StopPod => {
                running.any(|op| matches!(op, Op::Run | Op::RemovePod | Op::Discard(_)))
            }
            Request::RemovePod => {
                running.any(|op| op.holds_the_pod() && !matches!(op, Op::RemovePod))
            }
        }
    }

    fn admit(&mut self, request: Request, reply: Reply) -> Result<(), (Error, Reply)> {
        let services = self.pods.services.clone();
        let pod = self.pod.clone();
        match request {
            Request::Run => match self.record.state {
                PodState::Ready => drop(reply.send(Ok(Answer::Done))),
                PodState::NotReady => return Err((Error::PodNotReady(pod.id), reply)),
                PodState::Starting => {
                    let work = run::bring_up(services, self.record.clone());
                    self.join(Op::Run, reply, work);
                }
            },
            Request::Create { config } => {
                if self.record.state != PodState::Ready || self.stopping {
                    return Err((Error::PodNotReady(pod.id), reply));
                }
                let same = |c: &&Container| {
                    let config_of = &c.view.record.config;
                    (&config_of.name, config_of.attempt) == (&config.name, config.attempt)
                };
                if let Some(found) = self.containers.values().find(same) {
                    let found = &found.view.record;
                    let retry = found.is_of(&config)
                        && matches!(found.state, super::state::ContainerState::Created { .. });
                    if retry {
                        let _ = reply.send(Ok(Answer::Container(found.id.clone())));
                        return Ok(());
                    }
                    let error = Error::ContainerExists {
                        name: config.name.clone(),
                        attempt: config.attempt,
                        id: found.id.clone(),
                        state: found.state.name(),
                    };
                    return Err((error, reply));
                }
                let op = Op::Create(config.name.clone(), config.attempt);
                if self.is_running(&op) {
                    self.joined.entry(op).or_default().push(reply);
                } else {
                    let id = ContainerId::random();
                    // Known before it exists: its exit may be told before its making comes back.
                    self.pods.index_mut().containers.insert(id.clone(), pod.id.clone());
                    self.making.insert(op.clone(), id.clone());
                    let work = container::create(services, pod, id, *config);
                    self.join(op, reply, work);
                }
            }
            Request::Start { id } => {
                let view = match self.containers.get(&id) {
                    Some(container) => container.view.clone(),
                    None => return Err((Error::NoContainer(id.to_string()), reply)),
                };
                use super::state::ContainerState as S;
                match &view.record.state {
                    S::Running { .. } => drop(reply.send(Ok(Answer::Done))),
                    S::Created { .. } if self.record.state == PodState::Ready && !self.stopping => {
                        self.join(
                            Op::Start(id.clone()),
                            reply,
                            container::start(services, pod, id),
                        );
                    }
                    S::Created { .. } => return Err((Error::PodNotReady(pod.id), reply)),
                    state @ (S::Creating | S::Exited { .. }) => {
                        let what = "only a created container can be started";
                        return Err((Error::Wrong { id, state: state.name(), what }, reply));
                    }
                }
            }
            Request::Remove { id } => {
                if !self.containers.contains_key(&id) {
                    return Err((Error::NoContainer(id.to_string()), reply));
                }
                self.join(Op::Remove(id.clone()), reply, container::remove(services, pod, id));
            }
            Request::Update { id, change } => {
                let Some(container) = self.containers.get(&id) else {
                    return Err((Error::NoContainer(id.to_string()), reply));
                };
                let record = container.view.record.clone();
                let op = Op::Update(id);
                self.join(op, reply, container::update(services, pod, record, change));
            }
            Request::Checkpoint { what, limit } => {
                let stop = self.pods.stop.clone();
                let work = checkpoint::write(services, pod, what.clone(), limit, stop);
                self.join(Op::Checkpoint(what), reply, work);
            }
            Request::Upgrade { binary } => {
                if self.record.state != PodState::Ready {
                    return Err((Error::PodNotReady(pod.id), reply));
                }
                self.join(Op::Upgrade, reply, super::upgrade::upgrade(services, pod, binary));
            }
            // Nothing outside is to be done; it goes the way of all changes.
            Request::UpdatePod { change } => {
                self.join(Op::UpdatePod, reply, async { Ok(Effect::PodUpdated(change)) });
            }
            Request::StopPod => {
                if self.record.state == PodState::NotReady
                    && self.containers.values().all(|c| c.view.record.state.is_exited())
                    && matches!(*self.link.borrow(), Link::Down)
                    && !services.network.attachments().contains(&pod.id)
                {
                    let _ = reply.send(Ok(Answer::Done));
                    return Ok(());
                }
                self.stopping = true;
                self.join(Op::StopPod, reply, run::stop(services, pod));
            }
            Request::RemovePod => {
                self.stopping = true;
                self.join(Op::RemovePod, reply, run::remove(services, pod));
            }
        }
        Ok(())
    }

    async fn ended(&mut self, ended: Result<(Id, Result<Effect, Error>), JoinError>) {
        let (id, result) = match ended {
            Ok((id, result)) => (id, result),
            Err(error) => {
                let id = error.id();
                warn!(%error, "an operation broke off");
                (id, Err(Error::Panicked))
            }
        };
        let Some(op) = self.running.remove(&id) else { return };
        let answer = match result {
            Ok(effect) => self.apply(&op, effect).await,
            Err(error) => {
                self.failed(&op, &error).await;
                Err(error)
            }
        };
        let answer = answer.map_err(Arc::new);
        match (&answer, self.joined.remove(&op)) {
            (_, Some(replies)) => {
                for reply in replies {
                    // Who asked may be gone; the work is done all the same.
                    let _ = reply.send(answer.clone());
                }
            }
            (Err(error), None) => warn!(operation = ?op, error = %chain(&**error), "not done"),
            (Ok(_), None) => {}
        }
        // In the order they came; each may be put off again.
        for (request, reply) in std::mem::take(&mut self.put_off) {
            match self.gone {
                true => drop(reply.send(Err(Arc::new(Error::NoPod(self.pod.id.to_string()))))),
                false => self.request(request, reply),
            }
        }
    }

    /// Record, then memory.
    async fn save_pod(&mut self, record: PodRecord) -> Result<(), Error> {
        self.pods.services.store.put_pod(&record).await?;
        self.record = Arc::new(record);
        Ok(())
    }

    /// Shows the new state to everybody, then tells what happened.
    fn publish(&self, id: impl Into<String>, kind: Kind) {
        let view = view_of(&self.record, &self.containers, self.gone);
        self.view.send_replace(view.clone());
        self.pods.services.events.send(id, kind, view);
    }

    async fn apply(&mut self, op: &Op, effect: Effect) -> Result<Answer, Error> {
        let services = self.pods.services.clone();
        match effect {
            Effect::Up(up) => {
                let mut record = (*self.record).clone();
                record.state = PodState::Ready;
                record.endpoint = Some(up.endpoint);
                record.ips = up.ips;
                if let Err(error) = self.save_pod(record).await {
                    // Up, but not on record: taken down again.
                    let work = run::discard(services, self.record.clone());
                    self.spawn(Op::Discard(None), work);
                    return Err(error);
                }
                crash::point("daemon.pod.ready-recorded");
                self.connected(up.client);
                self.publish(self.pod.id.clone(), Kind::Started);
                services.nri.listed(self.pod.id.as_str());
                info!(
                    name = %self.record.config.name,
                    namespace = %self.record.config.namespace,
                    ips = ?self.record.ips,
                    "pod is ready"
                );
            }
            Effect::Stopped => {
                let mut record = (*self.record).clone();
                record.state = PodState::NotReady;
                self.save_pod(record).await?;
                crash::point("daemon.stop-pod.recorded");
                self.link.send_replace(Link::Down);
                services.shims.let_go(&self.pod.id);
                self.stopping = false;
                self.publish(self.pod.id.clone(), Kind::Stopped);
                info!("pod is stopped");
            }
            Effect::Gone => {
                services.store.delete_pod(&self.pod.id).await?;
                crash::point("daemon.remove-pod.forgotten");
                self.forget();
            }
            Effect::Created(record) => {
                let id = record.id.clone();
                if let Err(error) = services.store.put_container(&record).await {
                    // Made, but not on record: taken away again.
                    let work = container::discard(services, self.pod.clone(), *record);
                    self.spawn(Op::Discard(Some(id)), work);
                    return Err(error.into());
                }
                crash::point("daemon.create.recorded");
                self.making.remove(op);
                self.containers.insert(id.clone(), Container::new(*record));
                self.watch_foreign(&id, Duration::ZERO);
                self.publish(id.clone(), Kind::Created);
                services.nri.listed(id.as_str());
                if let Some(end) = self.early.remove(&id) {
                    self.exited(&id, end).await;
                }
                return Ok(Answer::Container(id));
            }
            Effect::Started { id, at, pid } => {
                self.change(&id, Change::Started { at, pid }).await?;
                if let Some(container) = self.containers.get(&id) {
                    self.pods.announce_start(&self.view.borrow(), &container.view);
                }
            }
            Effect::Removed(id) => {
                services.store.delete_container(&id).await?;
                crash::point("daemon.remove.forgotten");
                self.containers.remove(&id);
                self.early.remove(&id);
                self.pods.index_mut().containers.remove(&id);
                self.publish(id, Kind::Deleted);
            }
            Effect::Updated { id, resources } => {
                if let Some(container) = self.containers.get_mut(&id) {
                    let mut record = container.view.record.clone();
                    record.config.resources = *resources;
                    services.store.put_container(&record).await?;
                    crash::point("daemon.update.recorded");
                    container.set(record);
                    // The CRI has no event for it: nothing began or ended.
                    self.view.send_replace(view_of(&self.record, &self.containers, self.gone));
                }
            }
            Effect::PodUpdated(change) => {
                let (overhead, resources) = *change;
                let mut record = (*self.record).clone();
                record.config.overhead = overhead.or(record.config.overhead);
                record.config.resources = resources.or(record.config.resources);
                self.save_pod(record).await?;
                crash::point("daemon.update-pod.recorded");
                self.view.send_replace(view_of(&self.record, &self.containers, self.gone));
            }
            Effect::Done => {}
            Effect::Linked { client, endpoint, started, exits } => {
                if endpoint.is_some() && endpoint != self.record.endpoint {
                    let record = PodRecord { endpoint, ..(*self.record).clone() };
                    self.save_pod(record).await?;
                }
                self.connected(client);
                for (id, pid) in started {
                    self.change(&id, Change::Started { at: SystemTime::now(), pid }).await?;
                }
                let ours = |broken: &checkpoint::BrokenOff| broken.pod() == Some(&self.pod.id);
                for broken in self.pods.take_broken_off(ours) {
                    self.spawn(Op::Mend, checkpoint::mend(self.pod.clone(), broken));
                }
                for seen in exits {
                    self.exited(&seen.id, seen.end).await;
                }
                let ended: Vec<_> = self
                    .containers
                    .iter()
                    .filter(|(_, c)| c.view.record.state.is_exited())
                    .map(|(id, _)| id.clone())
                    .collect();
                for id in ended {
                    self.reap(id);
                }
            }
            Effect::Dead { exits } => {
                warn!("the pod's shim is dead");
                crate::metrics::counts().shims_lost.inc();
                self.link.send_replace(Link::Down);
                services.shims.let_go(&self.pod.id);
                for seen in exits {
                    self.exited(&seen.id, seen.end).await;
                }
                let mut record = (*self.record).clone();
                record.state = PodState::NotReady;
                self.save_pod(record).await?;
                self.publish(self.pod.id.clone(), Kind::Stopped);
            }
            Effect::Rebooted { exits } => {
                self.link.send_replace(Link::Down);
                for seen in exits {
                    if seen.end.how == Exit::Lost
                        && let Some(container) = self.containers.get_mut(&seen.id)
                    {
                        let mut record = container.view.record.clone();
                        record.rebooted = true;
                        container.set(record);
                    }
                    self.exited(&seen.id, seen.end).await;
                }
                let mut record = (*self.record).clone();
                record.state = PodState::NotReady;
                record.ips.clear();
                self.save_pod(record).await?;
                self.publish(self.pod.id.clone(), Kind::Stopped);
            }
            Effect::Closed => {
                // A shim that is, or was, shut down closes; anything else is looked into.
                let ending = (self.is_running(&Op::StopPod) || self.is_running(&Op::RemovePod))
                    // It goes with a shim that was shut down.
                    && !services.shims.pod_bundle(&self.pod.id).shim_state().exists();
                if !ending && matches!(*self.link.borrow(), Link::Up(_)) {
                    self.link.send_replace(Link::Pending);
                    self.reach();
                }
            }
            Effect::Ended(seen) => {
                if !self.exited(&seen.id, seen.end).await {
                    // The exit record keeps it meanwhile.
                    self.watch_foreign(&seen.id, RETRY);
                }
            }
            Effect::SandboxEnded => {
                let ending = self.is_running(&Op::StopPod) || self.is_running(&Op::RemovePod);
                if !ending && self.record.state == PodState::Ready {
                    warn!("the pod's sandbox container has ended");
                    let mut record = (*self.record).clone();
                    record.state = PodState::NotReady;
                    self.save_pod(record).await?;
                    self.publish(self.pod.id.clone(), Kind::Stopped);
                }
            }
        }
        debug_assert!(!matches!(op, Op::Create(..)), "a creation answers with its id");
        Ok(Answer::Done)
    }

    /// What a failed operation changes all the same.
    async fn failed(&mut self, op: &Op, error: &Error) {
        match op {
            // Undone already, records and all.
            Op::Run | Op::Discard(None) => self.forget(),
            Op::Start(id) => {
                let how = Exit::NotStarted {
                    code: container::start_failure_code(error),
                    message: chain(error),
                };
                self.exited(&id.clone(), End::new(SystemTime::now(), how)).await;
            }
            Op::Create(..) => {
                if let Some(id) = self.making.remove(op) {
                    self.pods.index_mut().containers.remove(&id);
                    self.early.remove(&id);
                }
            }
            Op::StopPod | Op::RemovePod => {
                self.stopping &= *op != Op::StopPod;
                // What went during it was not looked into, for that might have been its end.
                let lost = matches!(&*self.link.borrow(), Link::Up(client) if client.is_closed());
                if lost {
                    self.link.send_replace(Link::Pending);
                    self.reach();
                }
            }
            Op::Remove(_)
            | Op::Update(_)
            | Op::UpdatePod
            | Op::Checkpoint(_)
            | Op::Mend
            | Op::Upgrade
            | Op::Reap(_)
            | Op::Discard(Some(_))
            | Op::Link
            | Op::Watch
            | Op::Ends(_) => {}
        }
    }

    fn forget(&mut self) {
        self.gone = true;
        self.pods.services.shims.let_go(&self.pod.id);
        let last = self.view.borrow().clone();
        for id in last.containers.keys() {
            self.pods.services.events.send(id.clone(), Kind::Deleted, last.clone());
        }
        self.publish(self.pod.id.clone(), Kind::Deleted);
        self.pods.index_mut().forget(&self.pod.id);
    }

    fn connected(&mut self, client: Client) {
        let (watched, shims) = (client.clone(), self.pods.services.shims.clone());
        let id = self.pod.id.clone();
        self.link.send_replace(Link::Up(client));
        self.spawn(Op::Watch, async move {
            shims.hold(&id, &watched).await;
            Ok(Effect::Closed)
        });
        let Some(handler) = &self.record.foreign else { return };
        if handler.sandbox == Sandboxing::Container && !self.is_running(&Op::Ends(None)) {
            let services = self.pods.services.clone();
            self.spawn(Op::Ends(None), foreign::watch_sandbox(services, self.pod.clone()));
        }
        for id in self.containers.keys().cloned().collect::<Vec<_>>() {
            self.watch_foreign(&id, Duration::ZERO);
        }
    }

    /// Waits for the end of a container that a foreign shim runs.
    fn watch_foreign(&mut self, id: &ContainerId, delay: Duration) {
        let op = Op::Ends(Some(id.clone()));
        let Some(container) = self.containers.get(id) else { return };
        let record = container.view.record.clone();
        if self.record.foreign.is_none()
            || !foreign::is_watched(&record.state)
            || self.is_running(&op)
        {
            return;
        }
        let services = self.pods.services.clone();
        let pod = self.pod.clone();
        self.spawn(op, async move {
            tokio::time::sleep(delay).await;
            foreign::watch(services, pod, record).await
        });
    }

    /// Reaches the shim, for as long as it takes, or learns that it is dead.
    fn reach(&mut self) {
        if self.is_running(&Op::Link) {
            return;
        }
        let live: Vec<_> = self.containers.values().map(|c| c.view.record.clone()).collect();
        let work = recover::reach(self.pods.services.clone(), self.record.clone(), live);
        self.spawn(Op::Link, work);
    }

    async fn change(&mut self, id: &ContainerId, change: Change) -> Result<(), Error> {
        let Some(container) = self.containers.get_mut(id) else { return Ok(()) };
        let mut record = container.view.record.clone();
        match record.state.clone().apply(change) {
            Ok(state) => record.state = state,
            // Seen twice, settled once.
            Err(_) => return Ok(()),
        }
        let kind = match record.state.is_exited() {
            true => Kind::Stopped,
            false => Kind::Started,
        };
        self.pods.services.store.put_container(&record).await?;
        match kind {
            Kind::Stopped => crash::point("daemon.exit.recorded"),
            _ => crash::point("daemon.start.recorded"),
        }
        container.set(record);
        self.publish(id.clone(), kind);
        Ok(())
    }

    /// Takes an exit. False: it could not be recorded and must be told again.
    async fn exited(&mut self, id: &ContainerId, end: End) -> bool {
        let Some(container) = self.containers.get(id) else {
            if self.making.values().any(|making| making == id) {
                self.early.insert(id.clone(), end);
            }
            return true;
        };
        if container.view.record.state.is_exited() {
            return true;
        }
        let name = container.view.record.config.name.clone();
        let (code, reason) = (end.how.code(), end.how.reason());
        match self.change(id, Change::Exited(end)).await {
            Ok(()) => {
                info!(container = id.short(), name, code, "container ended");
                let exits = &crate::metrics::counts().container_exits;
                exits.get_or_create(&[("reason", reason.into())]).inc();
                if let Some(container) = self.containers.get(id) {
                    self.pods.announce_exit(&self.view.borrow(), &container.view);
                }
                self.reap(id.clone());
                true
            }
            Err(error) => {
                warn!(container = id.short(), error = %chain(&error), "exit is not recorded yet");
                false
            }
        }
    }

    fn reap(&mut self, id: ContainerId) {
        let op = Op::Reap(id.clone());
        if !self.is_running(&op) {
            self.spawn(op, container::reap(self.pods.services.clone(), self.pod.clone(), id));
        }
    }
}

fn view_of(
    record: &Arc<PodRecord>,
    containers: &BTreeMap<ContainerId, Container>,
    gone: bool,
) -> Arc<PodView> {
    let containers = containers.iter().map(|(id, c)| (id.clone(), c.view.clone())).collect();
    Arc::new(PodView { record: record.clone(), containers, gone })
}

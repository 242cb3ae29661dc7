//! Pods and their containers. Each pod has one owner, a task that alone changes it; everybody else
//! reads an immutable view that the owner publishes.
//!
//! - [`config`]: what is asked for.
//! - [`state`]: what is legal.
//! - `task`: the owner. Work that takes time runs beside it, one future per operation; a second
//!   request for the same operation joins the first.
//! - `run`: bringing a pod up and taking it down.
//! - `container`: making, starting, stopping and removing containers.
//! - `exec`: ExecSync.
//! - `checkpoint`, `restore`: to and from archives.
//! - `foreign`: containers that somebody else's shim runs.
//! - `nri`: what NRI plugins are told, and what they want.
//! - `recover`: what is done at start-up.

mod checkpoint;
pub mod config;
mod container;
pub(crate) mod exec;
mod extras;
pub(crate) mod foreign;
mod leftover;
mod nri;
mod readback;
mod recover;
mod restore;
mod run;
pub mod state;
mod task;
pub(crate) mod upgrade;
mod volumes;

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, RwLock, atomic::AtomicBool},
    time::{Duration, SystemTime},
};

use holdfast_shim::{client, control::Control};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use exec::ExecOutput;

use crate::{
    cdi, classes,
    config::{Config, Handler},
    error::{Kind, Kinded},
    id::{ContainerId, PodId},
    image::{self, Images},
    label,
    network::{self, Network},
    node::{self, Node},
    pod::{
        config::{ContainerConfig, PodConfig, Resources},
        state::{ContainerState, PodState},
    },
    shims::{self, Link, Shims},
    spec,
    store::{
        self, Store,
        pods::{ContainerRecord, PodRecord, Unread},
    },
};

/// Commands that wait for a pod's owner. A full queue makes callers of that pod wait, nobody else.
const COMMANDS: usize = 64;

/// How long a call waits for a shim that is being reached again after a restart of ours.
const RECONNECT: Duration = Duration::from_secs(20);

/// Why something about a pod or container was not done. Shared by everybody who joined.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each message is its documentation")]
pub enum Error {
    #[error("no pod {0:?}")]
    NoPod(String),
    #[error("no container {0:?}")]
    NoContainer(String),
    #[error("{0:?} is the beginning of more than one id: give more of it")]
    Ambiguous(String),
    #[error("pod {0} is not ready: it was stopped, or its shim died; make a new one")]
    PodNotReady(PodId),
    #[error(
        "pod {namespace}/{name} attempt {attempt} exists as {id} and is stopped: remove it first"
    )]
    PodExists { namespace: String, name: String, attempt: u32, id: PodId },
    #[error(
        "container {name:?} attempt {attempt} exists in the pod as {id} and is {state}: remove it first"
    )]
    ContainerExists { name: String, attempt: u32, id: ContainerId, state: &'static str },
    #[error("container {id} is {state}: {what}")]
    Wrong { id: ContainerId, state: &'static str, what: &'static str },
    #[error("no runtime handler {name:?}: this node has {known}")]
    NoHandler { name: String, known: String },
    #[error("shim {} is not installed: install it, or set the handler's `shim`", .0.display())]
    NoShimBinary(PathBuf),
    #[error("the shim of container {0} is dead: it and what it ran are being cleaned up")]
    NoForeignShim(ContainerId),
    #[error(
        "the shim of pod {0} is of a release that cannot be upgraded while it runs: its pod has to be made anew"
    )]
    OldShim(PodId),
    #[error("image {0:?} is not on this node: pull it first")]
    NoImage(String),
    #[error("the shim of pod {0} does not answer: it is being reached again, try once more")]
    Unreachable(PodId),
    #[error(
        "container {id} still runs {after:?} after SIGKILL: a process may hang in the kernel (see state D in ps)"
    )]
    StillRuns { id: ContainerId, after: Duration },
    #[error("{what} of container {id} did not end within {after:?}")]
    Timeout { what: &'static str, id: ContainerId, after: Duration },
    #[error("{what} of pod {id}")]
    Shim { what: &'static str, id: PodId, source: client::Error },
    #[error("{what} container {id}")]
    Task { what: &'static str, id: ContainerId, source: client::Error },
    #[error("mounts[{index}].image_sub_path: {path:?} of image {image:?}")]
    SubPath { index: usize, path: String, image: String, source: io::Error },
    #[error("volume {path:?} that the image declares")]
    Volume { path: String, source: io::Error },
    #[error(
        "pod {id}: user namespaces need Linux 5.19 for id-mapped layers, this node has {major}.{minor}"
    )]
    NoMappedLayers { id: PodId, major: u32, minor: u32 },
    #[error(transparent)]
    Criu(#[from] crate::checkpoint::criu::Error),
    #[error(transparent)]
    Archive(#[from] crate::checkpoint::archive::Error),
    #[error("checkpoint container {id}{criu}")]
    Checkpoint { id: ContainerId, criu: String, source: client::Error },
    #[error("restore container {id}{criu}")]
    Restore { id: ContainerId, criu: String, source: client::Error },
    #[error("the checkpoint was not done in the time it was given")]
    Late,
    #[error(
        "container {id} cannot be resumed after its checkpoint: stop it, or restart holdfastd, which \
         tries again"
    )]
    Frozen { id: ContainerId, source: client::Error },
    #[error("a checkpoint cannot be written to {path}: {reason}")]
    Target { path: PathBuf, reason: &'static str },
    #[error("checkpoint of a pod at {path}: {reason}")]
    PodCheckpoint { path: PathBuf, reason: String },
    #[error("container {name:?} cannot be restored: {reason}")]
    Unfit { name: String, reason: String },
    #[error(
        "pod {id} has a user namespace, into which no OCI runtime can restore processes: restore in a \
         pod without (hostUsers: true)"
    )]
    RestoreUsers { id: PodId },
    #[error("container_ids: {reason}")]
    Unselected { reason: String },
    #[error("there is nothing to checkpoint: {reason}")]
    NothingRuns { reason: String },
    #[error(
        "runtime handler {handler:?} is a foreign shim: only containers of a handler with an OCI \
         runtime can be checkpointed and restored"
    )]
    ForeignCheckpoint { handler: String },
    #[error("put the checkpoint's changes into the root file system")]
    Changes { source: image::Error },
    #[error(
        "image {reference:?}, which the checkpoint was made on, is not on this node, and the \
         checkpoint has no name to pull it by: pull it first"
    )]
    NoBase { reference: String },
    #[error("image {name:?}, which the checkpoint was made on")]
    Base { name: String, source: image::Error },
    #[error(
        "image {name:?} is {found} now, but the checkpoint was made on {wanted}: pull that one by its \
         digest"
    )]
    OtherBase { name: String, found: String, wanted: String },
    #[error("container {name:?} with command {command:?} cannot be made")]
    Create { name: String, command: String, source: client::Error },
    #[error("network of pod {id}")]
    Network { id: PodId, source: network::Error },
    #[error("image of container {name:?}")]
    Image { name: String, source: image::Error },
    #[error("container {name:?}")]
    Spec { name: String, source: spec::Error },
    #[error("container {name:?}")]
    Host { name: String, source: node::Error },
    #[error("container {name:?}")]
    Cdi { name: String, source: cdi::Error },
    #[error("container {name:?}")]
    Class { name: String, source: classes::Error },
    #[error("container {name:?}")]
    Label { name: String, source: label::Error },
    #[error("{what}")]
    Nri { what: String, source: Box<crate::nri::Error> },
    #[error("container {name:?}: what NRI plugins made of it is not an OCI spec")]
    NotASpec { name: String, source: serde_json::Error },
    #[error("{what} {path}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("record of pod")]
    Store(#[from] store::Error),
    #[error("the pod's owner is gone: the daemon is shutting down")]
    Closed,
    #[error("an operation on the pod ended without an answer; this is a defect, see the log")]
    Panicked,
}

/// Makes an error of the operating system one that says what was done to which path.
fn io_at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::NoPod(_) | Error::NoContainer(_) | Error::NoImage(_) => Kind::NotFound,
            Error::Ambiguous(_) | Error::NoHandler { .. } => Kind::Invalid,
            Error::PodExists { .. } | Error::ContainerExists { .. } => Kind::AlreadyExists,
            Error::PodNotReady(_) | Error::Wrong { .. } => Kind::Precondition,
            Error::NoShimBinary(_) | Error::NoForeignShim(_) | Error::OldShim(_) => {
                Kind::Precondition
            }
            Error::Unreachable(_) | Error::Closed => Kind::Unavailable,
            Error::StillRuns { .. } | Error::Timeout { .. } => Kind::Deadline,
            Error::Shim { source, .. }
            | Error::Task { source, .. }
            | Error::Create { source, .. } => shim_kind(source),
            Error::Network { source, .. } => source.kind(),
            Error::Image { source, .. } => source.kind(),
            Error::Spec { source, .. } => source.kind(),
            Error::Host { source, .. } => source.kind(),
            Error::Cdi { source, .. } => source.kind(),
            Error::Class { source, .. } => source.kind(),
            Error::Label { source, .. } => source.kind(),
            Error::Nri { source, .. } => source.kind(),
            Error::NotASpec { .. } => Kind::Precondition,
            Error::NoMappedLayers { .. }
            | Error::RestoreUsers { .. }
            | Error::NothingRuns { .. }
            | Error::ForeignCheckpoint { .. }
            | Error::NoBase { .. }
            | Error::OtherBase { .. } => Kind::Precondition,
            Error::Criu(source) => source.kind(),
            Error::Archive(source) => source.kind(),
            Error::Checkpoint { source, .. } | Error::Restore { source, .. } => shim_kind(source),
            Error::Base { source, .. } | Error::Changes { source } => source.kind(),
            Error::Late => Kind::Deadline,
            Error::Frozen { .. } => Kind::Internal,
            Error::Target { .. }
            | Error::PodCheckpoint { .. }
            | Error::Unselected { .. }
            | Error::Unfit { .. } => Kind::Invalid,
            Error::SubPath { source, .. } | Error::Volume { source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::InvalidInput
                        | io::ErrorKind::NotADirectory
                ) =>
            {
                Kind::Invalid
            }
            Error::SubPath { source, .. }
            | Error::Volume { source, .. }
            | Error::Io { source, .. }
                if source.kind() == io::ErrorKind::StorageFull =>
            {
                Kind::Exhausted
            }
            Error::SubPath { .. } | Error::Volume { .. } | Error::Io { .. } | Error::Panicked => {
                Kind::Internal
            }
            Error::Store(source) => source.kind(),
        }
    }
}

fn shim_kind(error: &client::Error) -> Kind {
    match error.kind() {
        client::ErrorKind::NotFound => Kind::NotFound,
        client::ErrorKind::AlreadyExists => Kind::AlreadyExists,
        client::ErrorKind::Precondition => Kind::Precondition,
        client::ErrorKind::Invalid => Kind::Invalid,
        client::ErrorKind::Unimplemented => Kind::Unsupported,
        client::ErrorKind::Deadline => Kind::Deadline,
        client::ErrorKind::Exhausted => Kind::Exhausted,
        client::ErrorKind::Closed => Kind::Unavailable,
        client::ErrorKind::Other => Kind::Internal,
    }
}

/// A result that several callers share.
pub type Shared<T> = Result<T, Arc<Error>>;

/// What pods are made from: shared by all of them.
pub struct Services {
    /// The configuration.
    pub config: Config,
    /// Records.
    pub store: Store,
    /// Images and root file systems.
    pub images: Images,
    /// CNI.
    pub network: Network,
    /// Shims.
    pub shims: Arc<Shims>,
    /// Facts of this node.
    pub node: Node,
    /// Who watches.
    pub events: crate::events::Events,
    /// What each OCI runtime can do, by its path.
    pub features: crate::features::Features,
    /// CDI devices of the node.
    pub cdi: cdi::Devices,
    /// Classes of block I/O.
    pub blockio: classes::BlockIo,
    /// NRI plugins.
    pub nri: crate::nri::Nri,
    /// What became of the default AppArmor profile.
    pub apparmor: crate::apparmor::State,
}

/// A pod as it is now.
#[derive(Clone, Debug)]
pub struct PodView {
    /// Everything of its record.
    pub record: Arc<PodRecord>,
    /// Its containers, without those that are only intended.
    pub containers: BTreeMap<ContainerId, Arc<ContainerView>>,
    /// Being removed: gone for everybody who lists.
    pub gone: bool,
}

/// A container as it is now.
#[derive(Clone, Debug)]
pub struct ContainerView {
    /// Everything of its record.
    pub record: ContainerRecord,
    /// SIGTERM (or the like) was sent: it is not sent twice.
    asked_to_stop: Arc<AtomicBool>,
}

/// A handle to a pod.
#[derive(Clone)]
pub struct Pod {
    id: PodId,
    commands: mpsc::Sender<task::Command>,
    view: watch::Receiver<Arc<PodView>>,
    link: watch::Receiver<Link>,
}

impl Pod {
    /// Its id.
    pub fn id(&self) -> &PodId {
        &self.id
    }

    /// As it is now. Never waits.
    pub fn view(&self) -> Arc<PodView> {
        self.view.borrow().clone()
    }

    fn container(&self, id: &ContainerId) -> Result<Arc<ContainerView>, Error> {
        let view = self.view();
        let found = view.containers.get(id).cloned();
        found.ok_or_else(|| Error::NoContainer(id.to_string()))
    }

    /// The shim, if it is connected now.
    fn connected(&self) -> Option<client::Client> {
        match &*self.link.borrow() {
            Link::Up(client) => Some(client.clone()),
            Link::Pending | Link::Down => None,
        }
    }

    /// The shim; waits while it is being reached.
    async fn client(&self) -> Result<client::Client, Error> {
        let mut link = self.link.clone();
        match shims::connected(&mut link, RECONNECT).await {
            Some(client) => Ok(client),
            None if matches!(*link.borrow(), Link::Down) => {
                Err(Error::PodNotReady(self.id.clone()))
            }
            None => Err(Error::Unreachable(self.id.clone())),
        }
    }

    /// The same; `None`: it is dead, or was found dead while it was being reached, and there is nothing to
    /// ask it.
    async fn shim(&self) -> Result<Option<client::Client>, Error> {
        match self.client().await {
            Ok(client) => Ok(Some(client)),
            Err(Error::PodNotReady(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The shim after this connection to it broke: the same one, or one that took over.
    async fn client_after(&self, broken: &client::Client) -> Result<client::Client, Error> {
        if self.view().record.foreign.is_some() {
            // Its containers' shims are others', and nobody takes over from those.
            return Err(Error::PodNotReady(self.id.clone()));
        }
        self.client_of(broken).await
    }

    /// The pod's own shim after this connection to it broke.
    async fn client_of(&self, broken: &client::Client) -> Result<client::Client, Error> {
        let mut link = self.link.clone();
        let other = link.wait_for(|link| match link {
            Link::Up(client) => !client.is(broken),
            Link::Pending => false,
            Link::Down => true,
        });
        match tokio::time::timeout(RECONNECT, other).await {
            Ok(Ok(link)) => match &*link {
                Link::Up(client) => Ok(client.clone()),
                Link::Pending | Link::Down => Err(Error::PodNotReady(self.id.clone())),
            },
            Ok(Err(_)) => Err(Error::Closed),
            Err(_) => Err(Error::Unreachable(self.id.clone())),
        }
    }

    /// Hands an operation to the owner and waits for its end. Dropping this future ends only the
    /// waiting.
    async fn ask(&self, request: task::Request) -> Shared<task::Answer> {
        answered(self.order(request).await?).await
    }

    /// Puts an operation in line at the owner, behind those that were put there before. [`answered`]
    /// waits for its end.
    async fn order(
        &self,
        request: task::Request,
    ) -> Shared<oneshot::Receiver<Shared<task::Answer>>> {
        let (reply, answer) = oneshot::channel();
        let command = task::Command::Request { request, reply, cause: tracing::Span::current() };
        self.commands.send(command).await.map_err(|_| Arc::new(Error::Closed))?;
        Ok(answer)
    }
}

/// The end of an operation that was put in line.
async fn answered(order: oneshot::Receiver<Shared<task::Answer>>) -> Shared<task::Answer> {
    order.await.map_err(|_| Arc::new(Error::Closed))?
}

/// All pods.
#[derive(Clone)]
pub struct Pods {
    services: Arc<Services>,
    index: Arc<RwLock<Index>>,
    /// Checkpoints that an earlier daemon had under way.
    broken_off: Arc<Mutex<Vec<checkpoint::BrokenOff>>>,
    tracker: TaskTracker,
    stop: CancellationToken,
}

#[derive(Default)]
struct Index {
    pods: BTreeMap<PodId, Pod>,
    /// (namespace, name, uid, attempt): what the kubelet means by "the same pod".
    keys: HashMap<Key, PodId>,
    containers: BTreeMap<ContainerId, PodId>,
    /// Pods and containers whose records this release cannot read: they are let alone.
    unread: BTreeMap<String, Unread>,
}

type Key = (String, String, String, u32);

fn key(config: &PodConfig) -> Key {
    (config.namespace.clone(), config.name.clone(), config.uid.clone(), config.attempt)
}

impl Index {
    fn forget(&mut self, id: &PodId) {
        if let Some(pod) = self.pods.remove(id) {
            let key = key(&pod.view().record.config);
            if self.keys.get(&key) == Some(id) {
                self.keys.remove(&key);
            }
        }
        self.containers.retain(|_, pod| pod != id);
    }
}

/// The one entry whose id is `text`, or begins with it.
fn by_prefix<'a, K, V>(
    map: &'a BTreeMap<K, V>,
    text: &str,
    missing: fn(String) -> Error,
) -> Result<(&'a K, &'a V), Error>
where
    K: std::borrow::Borrow<str> + Ord,
{
    use std::ops::Bound;
    if text.is_empty() {
        return Err(missing(String::new()));
    }
    let mut found = map
        .range::<str, _>((Bound::Included(text), Bound::Unbounded))
        .take_while(|(id, _)| (*id).borrow().starts_with(text));
    match (found.next(), found.next()) {
        (None, _) => Err(missing(text.to_owned())),
        (Some(one), None) => Ok(one),
        (Some(first), Some(_)) if first.0.borrow() == text => Ok(first),
        (Some(_), Some(_)) => Err(Error::Ambiguous(text.to_owned())),
    }
}

impl Pods {
    /// No pods yet; see [`Pods::recover`].
    pub fn new(services: Arc<Services>) -> Self {
        Self {
            services,
            index: Arc::default(),
            broken_off: Arc::default(),
            tracker: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    /// What pods are made from.
    pub fn services(&self) -> &Arc<Services> {
        &self.services
    }

    fn index(&self) -> std::sync::RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(|e| e.into_inner())
    }

    fn set_broken_off(&self, broken: Vec<checkpoint::BrokenOff>) {
        *self.broken_off.lock().unwrap_or_else(|e| e.into_inner()) = broken;
    }

    /// Those that `of` says are to be dealt with now.
    fn take_broken_off(
        &self,
        of: impl Fn(&checkpoint::BrokenOff) -> bool,
    ) -> Vec<checkpoint::BrokenOff> {
        let mut all = self.broken_off.lock().unwrap_or_else(|e| e.into_inner());
        all.extract_if(.., |broken| of(broken)).collect()
    }

    fn index_mut(&self) -> std::sync::RwLockWriteGuard<'_, Index> {
        self.index.write().unwrap_or_else(|e| e.into_inner())
    }

    /// Every pod as it is now. Never waits for an owner.
    pub fn list(&self) -> Vec<Arc<PodView>> {
        let views = self.index().pods.values().map(Pod::view).collect::<Vec<_>>();
        views
            .into_iter()
            .filter(|view| !view.gone && view.record.state != PodState::Starting)
            .collect()
    }

    /// By id, or by a beginning that only one id has.
    pub fn find(&self, id: &str) -> Result<Pod, Error> {
        let pod = by_prefix(&self.index().pods, id, Error::NoPod).map(|(_, pod)| pod.clone())?;
        let view = pod.view();
        match view.gone || view.record.state == PodState::Starting {
            true => Err(Error::NoPod(id.to_owned())),
            false => Ok(pod),
        }
    }

    /// A container and its pod, by id or by a beginning that only one id has.
    pub fn find_container(&self, id: &str) -> Result<(Pod, Arc<ContainerView>), Error> {
        let index = self.index();
        let (full, pod) = by_prefix(&index.containers, id, Error::NoContainer)?;
        let pod = index.pods.get(pod).ok_or_else(|| Error::NoContainer(id.to_owned()))?;
        let view = pod.container(full)?;
        Ok((pod.clone(), view))
    }

    /// Connections to the shims of ready pods by their state, and commands that wait for owners.
    pub(crate) fn load(&self) -> (BTreeMap<&'static str, u64>, u64) {
        let mut shims = BTreeMap::from([("connected", 0), ("pending", 0), ("down", 0)]);
        let mut queued = 0;
        for pod in self.index().pods.values() {
            queued += (pod.commands.max_capacity() - pod.commands.capacity()) as u64;
            if pod.view.borrow().record.state == PodState::Ready {
                let state = match &*pod.link.borrow() {
                    Link::Up(_) => "connected",
                    Link::Pending => "pending",
                    Link::Down => "down",
                };
                *shims.entry(state).or_default() += 1;
            }
        }
        (shims, queued)
    }

    /// Whether there is such a pod.
    pub fn has_pod(&self, id: &PodId) -> bool {
        self.index().pods.contains_key(id)
    }

    /// A container and its pod, by its whole id.
    fn find_container_exactly(&self, id: &str) -> Result<(Pod, Arc<ContainerView>), Error> {
        let pod = self.pod_of(id).ok_or_else(|| Error::NoContainer(id.to_owned()))?;
        let view = pod.container(&id.parse().map_err(|_| Error::NoContainer(id.to_owned()))?)?;
        Ok((pod, view))
    }

    /// Whose a container is, by its whole id.
    fn pod_of(&self, container: &str) -> Option<Pod> {
        let index = self.index();
        index.containers.get(container).and_then(|pod| index.pods.get(pod)).cloned()
    }

    /// Whether there is such a container.
    pub fn has_container(&self, id: &ContainerId) -> bool {
        self.index().containers.contains_key(id)
    }

    fn handler(&self, name: &str) -> Result<&Handler, Error> {
        let runtime = &self.services.config.runtime;
        let name = if name.is_empty() { &runtime.default } else { name };
        match runtime.handlers.get(name) {
            Some(handler) => Ok(handler),
            None => Err(Error::NoHandler {
                name: name.to_owned(),
                known: runtime.handlers.keys().cloned().collect::<Vec<_>>().join(", "),
            }),
        }
    }

    /// Makes a pod and brings it up. A second call for the same pod joins the first, or finds what
    /// it made.
    pub async fn run(&self, config: PodConfig, handler: &str) -> Shared<PodId> {
        let driver = self.handler(handler).map_err(Arc::new)?;
        loop {
            let pod = self.reserve(config.clone(), handler, driver).map_err(Arc::new)?;
            match pod.ask(task::Request::Run).await {
                Ok(_) => return Ok(pod.id),
                // It was what a crash left of this pod, and is taken away now.
                Err(error) if matches!(*error, Error::NoPod(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The pod of that key; a new one if there is none.
    fn reserve(&self, config: PodConfig, handler: &str, driver: &Handler) -> Result<Pod, Error> {
        let mut index = self.index_mut();
        let key = key(&config);
        if let Some(pod) = index.keys.get(&key).and_then(|id| index.pods.get(id)) {
            let view = pod.view();
            if view.record.state != PodState::NotReady {
                return Ok(pod.clone());
            }
            return Err(Error::PodExists {
                namespace: key.0,
                name: key.1,
                attempt: key.3,
                id: pod.id.clone(),
            });
        }
        let record = PodRecord {
            id: PodId::random(),
            config,
            handler: handler.to_owned(),
            runtime: driver.runtime().to_owned(),
            foreign: match driver {
                Handler::Oci { .. } => None,
                Handler::Foreign(foreign) => Some(foreign.clone()),
            },
            created_at: SystemTime::now(),
            state: PodState::Starting,
            endpoint: None,
            ips: Vec::new(),
            boot: crate::boot::id().to_owned(),
            unknown: Default::default(),
        };
        let pod = self.adopt(&mut index, record, Vec::new(), Link::Pending);
        Ok(pod)
    }

    /// Gives a pod its owner.
    fn adopt(
        &self,
        index: &mut Index,
        record: PodRecord,
        containers: Vec<ContainerRecord>,
        link: Link,
    ) -> Pod {
        let id = record.id.clone();
        index.keys.insert(key(&record.config), id.clone());
        for container in &containers {
            index.containers.insert(container.id.clone(), id.clone());
        }
        let (pod, owner) = task::Owner::new(self.clone(), record, containers, link, COMMANDS);
        self.tracker.spawn(owner.run());
        index.pods.insert(id, pod.clone());
        pod
    }

    /// Makes a container in a pod.
    pub async fn create(&self, pod: &str, config: ContainerConfig) -> Shared<ContainerId> {
        let pod = self.find(pod).map_err(Arc::new)?;
        let config = Box::new(config);
        match pod.ask(task::Request::Create { config }).await? {
            task::Answer::Container(id) => Ok(id),
            task::Answer::Done => Err(Arc::new(Error::Panicked)),
        }
    }

    /// Starts a container.
    pub async fn start(&self, id: &str) -> Shared<()> {
        let (pod, container) = self.find_container(id).map_err(Arc::new)?;
        let id = container.record.id.clone();
        pod.ask(task::Request::Start { id }).await.map(drop)
    }

    /// Stops a container: its stop signal, then SIGKILL after `grace`. Fine if it has ended or is
    /// not there.
    pub async fn stop(&self, id: &str, grace: Duration) -> Shared<()> {
        match self.find_container(id) {
            Ok((pod, container)) => {
                let id = container.record.id.clone();
                container::stop(&self.services, pod, id, grace).await.map_err(Arc::new)
            }
            Err(Error::NoContainer(_)) => Ok(()),
            Err(e) => Err(Arc::new(e)),
        }
    }

    /// Removes a container, killing it first if it runs. Fine if it is not there.
    pub async fn remove(&self, id: &str) -> Shared<()> {
        match self.find_container(id) {
            Ok((pod, container)) => {
                let id = container.record.id.clone();
                let removed = pod.ask(task::Request::Remove { id: id.clone() }).await;
                match removed {
                    Err(e) if matches!(*e, Error::NoContainer(_)) => Ok(()),
                    other => other.map(drop),
                }
            }
            Err(Error::NoContainer(_)) => Ok(()),
            Err(e) => Err(Arc::new(e)),
        }
    }

    /// Changes a container's resources.
    pub async fn update(&self, id: &str, resources: Resources) -> Shared<()> {
        let (pod, container) = self.find_container(id).map_err(Arc::new)?;
        let id = container.record.id.clone();
        // Its own task: what plugins were asked is carried through, whoever goes.
        let update = self.clone().update_with_plugins(pod, id, resources);
        self.tracker.spawn(update).await.unwrap_or(Err(Arc::new(Error::Panicked)))
    }

    /// Keeps a pod's new overhead and the new sum of its containers' resources. The pod's cgroup is
    /// the kubelet's, which has set it already.
    pub async fn update_pod(
        &self,
        id: &str,
        overhead: Option<Resources>,
        resources: Option<Resources>,
    ) -> Shared<()> {
        let pod = self.find(id).map_err(Arc::new)?;
        let update = self.clone().update_pod_with_plugins(pod, overhead, resources);
        self.tracker.spawn(update).await.unwrap_or(Err(Arc::new(Error::Panicked)))
    }

    /// Stops a pod: kills its containers, takes its network away. Fine if it is stopped or not
    /// there.
    pub async fn stop_pod(&self, id: &str) -> Shared<()> {
        self.on_pod(id, task::Request::StopPod).await
    }

    /// Removes a pod, stopping it first. Fine if it is not there.
    pub async fn remove_pod(&self, id: &str) -> Shared<()> {
        self.on_pod(id, task::Request::RemovePod).await
    }

    async fn on_pod(&self, id: &str, request: task::Request) -> Shared<()> {
        match self.find(id) {
            Ok(pod) => match pod.ask(request).await {
                // It went while we asked.
                Err(e) if matches!(*e, Error::Closed) && self.find(id).is_err() => Ok(()),
                other => other.map(drop),
            },
            Err(Error::NoPod(_)) => Ok(()),
            Err(e) => Err(Arc::new(e)),
        }
    }

    /// Writes a checkpoint of a container that runs to an archive; it runs on. `limit`: how long it
    /// may take.
    pub async fn checkpoint(&self, id: &str, to: PathBuf, limit: Option<Duration>) -> Shared<()> {
        let (pod, container) = self.find_container(id).map_err(Arc::new)?;
        let containers = vec![container.record.id.clone()];
        let what = checkpoint::What { containers, to: checkpoint::Target::Archive(to) };
        let limit = limit.unwrap_or(checkpoint::LIMIT);
        pod.ask(task::Request::Checkpoint { what, limit }).await.map(drop)
    }

    /// Writes a checkpoint of these containers of a pod, or of all that run, to a directory; they are
    /// paused together and run on together.
    pub async fn checkpoint_pod(
        &self,
        id: &str,
        containers: Vec<String>,
        to: PathBuf,
        limit: Option<Duration>,
    ) -> Shared<()> {
        let pod = self.find(id).map_err(Arc::new)?;
        let view = pod.view();
        let mut ids = Vec::new();
        for id in &containers {
            let (_, container) = self.find_container(id).map_err(Arc::new)?;
            if container.record.pod != pod.id {
                let reason = format!("container {id} is not in pod {}", pod.id);
                return Err(Arc::new(Error::Unselected { reason }));
            }
            ids.push(container.record.id.clone());
        }
        if containers.is_empty() {
            let runs =
                |c: &&Arc<ContainerView>| matches!(c.record.state, ContainerState::Running { .. });
            ids.extend(view.containers.values().filter(runs).map(|c| c.record.id.clone()));
        }
        ids.sort();
        ids.dedup();
        if ids.is_empty() {
            let reason = format!("no container of pod {} runs", pod.id);
            return Err(Arc::new(Error::NothingRuns { reason }));
        }
        let mut names = ids.iter().filter_map(|id| view.containers.get(id));
        let mut seen = std::collections::BTreeSet::new();
        if let Some(twice) = names.find(|c| !seen.insert(c.record.config.name.clone())) {
            let name = &twice.record.config.name;
            let reason = format!("more than one of them is named {name:?}: give one of them");
            return Err(Arc::new(Error::Unselected { reason }));
        }
        let what = checkpoint::What { containers: ids, to: checkpoint::Target::Directory(to) };
        let limit = limit.unwrap_or(checkpoint::LIMIT);
        pod.ask(task::Request::Checkpoint { what, limit }).await.map(drop)
    }

    /// Makes the shim open a container's log file anew, after a rotation.
    pub async fn reopen_log(&self, id: &str) -> Result<(), Error> {
        let (pod, container) = self.find_container(id)?;
        let record = &container.record;
        if !matches!(record.state, ContainerState::Running { .. } | ContainerState::Created { .. })
        {
            return Err(Error::Wrong {
                id: record.id.clone(),
                state: record.state.name(),
                what: "it writes no log",
            });
        }
        let bundle = self.services.shims.pod_bundle(&pod.id);
        Control::new(&bundle).reopen_log(record.id.as_str(), Duration::from_secs(10)).await.map_err(
            |source| Error::Task { what: "reopen the log of", id: record.id.clone(), source },
        )
    }

    /// Runs a command in a container and waits for its end.
    pub async fn exec_sync(
        &self,
        id: &str,
        command: Vec<String>,
        timeout: Option<Duration>,
    ) -> Result<ExecOutput, Error> {
        let (pod, container) = self.find_container(id)?;
        // The work is its own task: whoever asked may go, the exec is still reaped.
        let services = self.services.clone();
        self.tracker
            .spawn(exec::sync(services, pod, container, command, timeout))
            .await
            .unwrap_or(Err(Error::Panicked))
    }

    /// The container, which must run, and its pod.
    pub(crate) fn find_running(&self, id: &str) -> Result<(Pod, Arc<ContainerView>), Error> {
        let (pod, container) = self.find_container(id)?;
        match &container.record.state {
            ContainerState::Running { .. } => Ok((pod, container)),
            state => Err(Error::Wrong {
                id: container.record.id.clone(),
                state: state.name(),
                what: "it must run for that",
            }),
        }
    }

    /// The container, whose streams the shim has: one that runs, or that is created. Who attaches to
    /// it before it is started misses nothing of what it prints.
    pub(crate) fn find_attachable(&self, id: &str) -> Result<(Pod, Arc<ContainerView>), Error> {
        let (pod, container) = self.find_container(id)?;
        match &container.record.state {
            ContainerState::Created { .. } | ContainerState::Running { .. } => Ok((pod, container)),
            state => Err(Error::Wrong {
                id: container.record.id.clone(),
                state: state.name(),
                what: "only one that is created or runs can be attached to",
            }),
        }
    }

    /// Pods and containers whose records cannot be read.
    pub(crate) fn unread(&self) -> Vec<Unread> {
        self.index().unread.values().cloned().collect()
    }

    /// Verifies layers if that is due, and brings images that were found incomplete back.
    pub async fn verify_images(&self) {
        let services = &self.services;
        services.images.pull_lost().await;
        if services.store.opening().verify
            && services.images.verify().await
            && let Err(error) = services.store.verified().await
        {
            tracing::warn!(error = %crate::error::chain(&error), "layers are verified again at the next start");
        }
    }

    /// Ends every owner; pods and containers stay as they are.
    pub async fn close(&self) {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

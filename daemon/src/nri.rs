//! NRI, the Node Resource Interface: plugins that are told of pods and containers, that adjust containers
//! before they are made, and that change the limits of others (github.com/containerd/nri, v1alpha1).
//!
//! - `wire`, `connection`: ttrpc in both directions over one connection.
//! - `plugin`, `launch`: how a connection, or a program that we start, becomes a plugin.
//! - `turn`: asking them, one request at a time.
//! - `adjust`, `limits`, `owners`: what adjustments make of an OCI spec, and who set what.
//! - `validate`: what the configuration forbids and requires.
//! - `message`: what is told of a container.
//!
//! This module owns the plugins and the order of everything. It knows pods and containers as messages
//! only; `pod/nri.rs` makes these and carries out what plugins want.
//!
//! # Order
//! Plugins are asked one request at a time, in one line for the whole node ([`Nri::line`]): what they want
//! of other containers is put in line at those containers' owners before the next request is asked, so
//! it takes effect in the order in which it was decided. Whoever has the turn waits for plugins, each
//! within its time, and for nothing else: not for a pod's owner, not for an OCI runtime. So work under
//! way may wait for the turn, and a plugin that hangs costs its timeout, once: it is dropped.
//!
//! A plugin that joins is synchronised in its turn. What it is told then and what it is told later do
//! not overlap and leave nothing out: each pod and container that is being made is in `Making` from
//! the turn in which plugins were asked about it until it is listed.

pub mod adjust;
mod connection;
mod launch;
pub mod limits;
pub mod message;
mod owners;
mod plugin;
mod turn;
mod validate;
pub mod wire;

use std::{
    collections::{BTreeMap, HashSet},
    future::Future,
    path::PathBuf,
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use holdfast_protos::nri::{
    Container, ContainerEviction, ContainerUpdate, PodSandbox, UpdateContainersRequest,
    UpdateContainersResponse,
};
use prost::Message as _;
use serde_json::{Value, json};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

pub use self::turn::{Created, Turn, Updated};
use self::{
    connection::Incoming,
    owners::Conflict,
    plugin::{Launched, Plugin},
    turn::report,
    wire::Response,
};
use crate::{
    config,
    error::{Kind, Kinded, chain},
};

/// Connections that have not registered yet. One more waits until another has, or has run out of time.
const REGISTERING: usize = 16;

/// What a plugin has at shutdown for its own.
const GOODBYE: Duration = Duration::from_millis(500);

/// Pause after a failed accept: out of descriptors, mostly.
const AGAIN: Duration = Duration::from_millis(100);

/// Why plugins keep something from being done.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each message is its documentation")]
pub enum Error {
    #[error("NRI plugin {plugin:?} refuses {what}")]
    Refused { plugin: String, what: &'static str, source: connection::Error },
    #[error("NRI plugin {plugin:?} rejects what other plugins made of the container: {reason}")]
    Rejected { plugin: String, reason: String },
    #[error("NRI plugin {plugin:?}, a validator, does not answer: the container is not made")]
    NoVerdict { plugin: String, source: connection::Error },
    #[error(transparent)]
    Adjust(#[from] adjust::Error),
    #[error(transparent)]
    Conflict(#[from] Conflict),
    #[error(transparent)]
    Validate(#[from] validate::Error),
    #[error("NRI plugin {plugin:?} wants to update container {container}, which is being created")]
    UpdatesItself { plugin: String, container: String },
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Validate(validate::Error::Annotation { .. }) => Kind::Invalid,
            // One that went away may come again.
            Error::Validate(validate::Error::Missing { .. }) | Error::NoVerdict { .. } => {
                Kind::Unavailable
            }
            Error::Refused { .. }
            | Error::Rejected { .. }
            | Error::Adjust(_)
            | Error::Conflict(_)
            | Error::Validate(validate::Error::Forbidden { .. })
            | Error::UpdatesItself { .. } => Kind::Precondition,
        }
    }
}

/// The pods and containers of the node, as far as this module needs them.
#[async_trait::async_trait]
pub trait World: Send + Sync {
    /// Everything that is listed now. Never waits for a pod.
    async fn state(&self) -> State;

    /// Puts updates and evictions in line at the containers' owners, in this order. What comes back
    /// waits until they are done, and gives those that could not be.
    async fn order(
        &self,
        updates: Vec<ContainerUpdate>,
        evictions: Vec<ContainerEviction>,
        plugin: String,
    ) -> Ordered;
}

/// See [`World::order`].
pub type Ordered = BoxFuture<'static, Vec<ContainerUpdate>>;

/// See [`World::state`].
#[derive(Debug, Default)]
pub struct State {
    /// Pods, ready and stopped.
    pub pods: Vec<PodSandbox>,
    /// Containers that have not ended.
    pub containers: Vec<Container>,
    /// Ids of containers that have ended and of pods that are stopped.
    pub ended: Vec<String>,
}

/// What is being made: the message of it, made when it is wanted.
enum Making {
    Pod(Box<dyn Fn() -> PodSandbox + Send>),
    Container(Box<dyn Fn() -> Container + Send>),
}

/// What only who has the turn may touch.
#[derive(Default)]
struct Line {
    /// In the order in which they are asked.
    plugins: Vec<Arc<Plugin>>,
    /// Pods and containers whose end was told.
    ended: HashSet<String>,
}

struct Core {
    config: config::Nri,
    line: Arc<tokio::sync::Mutex<Line>>,
    making: Mutex<BTreeMap<String, Making>>,
    /// The same as in the line, for who must not wait.
    shown: RwLock<Vec<Arc<Plugin>>>,
    world: RwLock<Option<Arc<dyn World>>>,
    /// There is a socket to connect to.
    listens: AtomicBool,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// Plugins. With `nri.enabled = false` there are none, and nothing here costs anything.
#[derive(Clone)]
pub struct Nri {
    core: Option<Arc<Core>>,
}

impl Nri {
    /// None yet; see [`Nri::start`].
    pub fn new(config: config::Nri) -> Self {
        let core = config.enabled.then(|| {
            Arc::new(Core {
                config,
                line: Arc::default(),
                making: Mutex::default(),
                shown: RwLock::default(),
                world: RwLock::default(),
                listens: AtomicBool::new(false),
                stop: CancellationToken::new(),
                tasks: TaskTracker::new(),
            })
        });
        Self { core }
    }

    /// Starts the programs of the plugin directory, and takes connections from `listener`. Returns at
    /// once, with the turn taken for those programs: until they are there, or have run out of time,
    /// nothing passes them.
    pub async fn start(&self, world: Arc<dyn World>, listener: Option<UnixListener>) {
        let Some(core) = self.core.clone() else { return };
        *core.world.write().unwrap_or_else(|e| e.into_inner()) = Some(world);
        core.listens.store(listener.is_some(), Ordering::Relaxed);
        let turn = self.line().await;
        core.tasks.spawn(core.clone().begin(turn, listener));
    }

    /// Says goodbye to all plugins, and ends those that were started here.
    pub async fn stop(&self) {
        let Some(core) = &self.core else { return };
        core.stop.cancel();
        let plugins = core.shown().clone();
        let goodbyes = plugins.iter().map(|plugin| plugin.shut_down(GOODBYE));
        futures::future::join_all(goodbyes).await;
        core.tasks.close();
        let _ = tokio::time::timeout(GOODBYE, core.tasks.wait()).await;
        *core.world.write().unwrap_or_else(|e| e.into_inner()) = None;
        if core.listens.load(Ordering::Relaxed)
            && let Err(error) = std::fs::remove_file(&core.config.socket)
        {
            warn!(%error, "the socket file of NRI plugins stays");
        }
    }

    /// Who is there now, for people. Never waits.
    pub fn info(&self) -> Value {
        let Some(core) = &self.core else { return json!({ "enabled": false }) };
        let socket = core.listens.load(Ordering::Relaxed).then_some(&core.config.socket);
        let shown = core.shown();
        let plugins = shown.iter().filter(|plugin| !plugin.is_closed()).map(|plugin| {
            json!({
                "name": plugin.full_name(),
                "pid": plugin.pid(),
                "startedByUs": plugin.is_launched(),
                "events": plugin.events(),
                "requestTimeout": format!("{:?}", plugin.limit()),
            })
        });
        json!({ "enabled": true, "socket": socket, "plugins": plugins.collect::<Vec<_>>() })
    }

    /// Whether there is anything to wait for.
    pub fn is_enabled(&self) -> bool {
        self.core.is_some()
    }

    /// Waits for the turn. The place in the line is taken when this is called, not when it is awaited.
    pub fn line(&self) -> impl Future<Output = Turn> + Send + 'static {
        let waiting = self.core.clone().map(|core| {
            let mut place = Box::pin(core.line.clone().lock_owned());
            // The first poll takes the place.
            let now = place.as_mut().now_or_never();
            (core, place, now)
        });
        async move {
            let Some((core, place, now)) = waiting else { return Turn { held: None } };
            let mut line = match now {
                Some(line) => line,
                None => place.await,
            };
            line.plugins.retain(|plugin| !plugin.is_closed());
            Turn { held: Some((core, line)) }
        }
    }

    /// A pod or container that was being made is listed.
    pub fn listed(&self, id: &str) {
        if let Some(core) = &self.core {
            core.making().remove(id);
        }
    }

    /// Whether it is being made, and plugins were asked about it.
    pub fn is_making(&self, id: &str) -> bool {
        self.core.as_ref().is_some_and(|core| core.making().contains_key(id))
    }
}

impl Core {
    fn making(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Making>> {
        self.making.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn shown(&self) -> std::sync::RwLockReadGuard<'_, Vec<Arc<Plugin>>> {
        self.shown.read().unwrap_or_else(|e| e.into_inner())
    }

    fn show(&self, plugins: Vec<Arc<Plugin>>) {
        *self.shown.write().unwrap_or_else(|e| e.into_inner()) = plugins;
    }

    fn world(&self) -> Option<Arc<dyn World>> {
        self.world.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    fn all_in_the_making(&self) -> (Vec<PodSandbox>, Vec<Container>) {
        let (mut pods, mut containers) = (Vec::new(), Vec::new());
        for making in self.making().values() {
            match making {
                Making::Pod(message) => pods.push(message()),
                Making::Container(message) => containers.push(message()),
            }
        }
        (pods, containers)
    }

    async fn begin(self: Arc<Self>, turn: Turn, listener: Option<UnixListener>) {
        let (dir, conf) = (self.config.plugin_dir.clone(), self.config.conf_dir.clone());
        let found = tokio::task::spawn_blocking(move || launch::find(&dir, &conf)).await;
        let starts = found.unwrap_or_default().into_iter().map(|found| self.launch(found));
        let mut turn = turn;
        for (plugin, calls) in futures::future::join_all(starts).await.into_iter().flatten() {
            self.join(&mut turn, plugin, calls).await;
        }
        drop(turn);
        if let Some(listener) = listener {
            self.accept(listener).await;
        }
    }

    async fn launch(&self, found: launch::Found) -> Option<(Plugin, Calls)> {
        let path: PathBuf = found.path.clone();
        let started = async {
            let (process, stream) = launch::Process::start(&found).await?;
            let launch::Found { index, name, config, .. } = found;
            let launched = Launched { index, name, config, process };
            Plugin::register(stream, Some(launched), &self.config).await
        };
        match started.await {
            Ok(plugin) => Some(plugin),
            Err(error) => {
                let error = chain(&error);
                warn!(path = %path.display(), error, "an NRI plugin is not there: it did not start");
                None
            }
        }
    }

    async fn accept(self: Arc<Self>, listener: UnixListener) {
        let places = Arc::new(Semaphore::new(REGISTERING));
        loop {
            let accepted = async {
                let place = places.clone().acquire_owned().await;
                (listener.accept().await, place)
            };
            let (accepted, place) = tokio::select! {
                // The end first: a busy listener must not put it off.
                biased;
                () = self.stop.cancelled() => return,
                accepted = accepted => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let core = self.clone();
                    self.tasks.spawn(async move {
                        let stop = core.stop.clone();
                        tokio::select! {
                            () = stop.cancelled() => {}
                            () = core.connected(stream) => {}
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    warn!(%error, "accept an NRI plugin");
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }

    async fn connected(self: Arc<Self>, stream: UnixStream) {
        match Plugin::register(stream, None, &self.config).await {
            Ok((plugin, calls)) => {
                let mut turn = Nri { core: Some(self.clone()) }.line().await;
                self.join(&mut turn, plugin, calls).await;
            }
            Err(error) => warn!(error = chain(&error), "an NRI plugin did not register"),
        }
    }

    /// Tells a plugin everything; from then on it is one of those that are asked.
    async fn join(self: &Arc<Self>, turn: &mut Turn, plugin: Plugin, calls: Calls) {
        let (Some((_, line)), Some(world)) = (&mut turn.held, self.world()) else { return };
        let plugin = Arc::new(plugin);
        let name = plugin.full_name().to_owned();
        // Calls of its own may come any time now, and be what its answer waits for.
        self.tasks.spawn(self.clone().serve(plugin.clone(), calls));
        // Those first that are being made: what is listed meanwhile is then in both, not in none.
        let (mut pods, mut containers) = self.all_in_the_making();
        let state = world.state().await;
        if line.plugins.is_empty() {
            // Nobody was told of these ends, and nobody need be.
            line.ended = state.ended.into_iter().collect();
        }
        let making: HashSet<String> = pods.iter().map(|pod| pod.id.clone()).collect();
        pods.extend(state.pods.into_iter().filter(|pod| !making.contains(&pod.id)));
        let making: HashSet<String> = containers.iter().map(|c| c.id.clone()).collect();
        containers.extend(state.containers.into_iter().filter(|c| !making.contains(&c.id)));
        let (pod_count, container_count) = (pods.len(), containers.len());
        let answer = match plugin.synchronize(pods, containers).await {
            Ok(answer) => answer,
            Err(error) => {
                warn!(plugin = name, error = chain(&error), "an NRI plugin is not there");
                plugin.close();
                return;
            }
        };
        line.plugins.push(plugin);
        line.plugins.sort_by(|a, b| a.order().cmp(&b.order()));
        self.show(line.plugins.clone());
        info!(plugin = name, pods = pod_count, containers = container_count, "NRI plugin is there");
        let done = world.order(answer.update, Vec::new(), name).await;
        self.tasks.spawn(async move { report(done.await, "after its synchronisation") });
    }

    /// Answers what a plugin calls, until it is gone.
    async fn serve(self: Arc<Self>, plugin: Arc<Plugin>, mut calls: Calls) {
        loop {
            let call = tokio::select! {
                biased;
                () = plugin.closed() => break,
                call = calls.recv() => call,
            };
            let Some(call) = call else { break };
            if call.method != "UpdateContainers" {
                let text = format!("{} is not for a plugin that is registered", call.method);
                call.answer(Response::failed(tonic::Code::FailedPrecondition, text)).await;
                continue;
            }
            let request = match UpdateContainersRequest::decode(&call.payload[..]) {
                Ok(request) => request,
                Err(error) => {
                    let text = error.to_string();
                    call.answer(Response::failed(tonic::Code::InvalidArgument, text)).await;
                    continue;
                }
            };
            let Some(world) = self.world() else { break };
            // Not in its turn: it may call this while it is being asked something.
            let done =
                world.order(request.update, request.evict, plugin.full_name().to_owned()).await;
            self.tasks.spawn(async move {
                let failed = done.await;
                call.answer(Response::of(&UpdateContainersResponse { failed })).await;
            });
        }
        plugin.close();
        let mut plugins = self.shown().clone();
        plugins.retain(|known| !Arc::ptr_eq(known, &plugin));
        self.show(plugins);
        if !self.stop.is_cancelled() {
            warn!(plugin = plugin.full_name(), "NRI plugin is gone");
        }
    }
}

type Calls = tokio::sync::mpsc::Receiver<Incoming>;

//! Pod networks: a CNI runtime (docs/adr/0004-own-cni-runtime.md).
//!
//! Owns the choice of the network configuration, the execution of plugins and the records of
//! attachments. Leaves to others: making and pinning network namespaces, bringing up `lo` in them
//! (the shim does both), and deciding which pods have a network.
//!
//! ```text
//! attach: record ── ADD a ── ADD b ── result ──> Attached
//!                     │        │
//!                     └────────┴─ failed: DEL b, DEL a ── record removed
//! detach: DEL b ── DEL a ── record removed         (a failure keeps the record; DEL is tried again)
//! ```
//!
//! Invariant: no plugin is asked to ADD before a record of the attachment is on stable storage, and
//! no record goes before every plugin has answered DEL. What a daemon leaves behind when it dies is
//! therefore always found by the next one.
//!
//! Operations of one pod run one after the other; those of different pods never wait for each
//! other. Work that was begun is finished when its caller goes away.

mod args;
mod config;
mod orphan;
mod plugin;
mod record;
mod result;

use std::{
    collections::{BTreeSet, HashMap},
    future::Future,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use futures::StreamExt;
use holdfast_shim::crash;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::{
    sync::{OnceCell, OwnedMutexGuard, RwLock},
    time::{Instant, sleep},
};
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use self::{
    args::Target,
    config::{Chosen, List, Snapshot, Version},
    plugin::{Plugins, Program, Speaks},
    record::{Found, Record, Records},
};
pub use self::{
    plugin::{Failure, Verb},
    result::Flaw,
};
use crate::{
    error::{Kind, Kinded, chain},
    id::PodId,
    metrics::{counts, outcome},
    pod::config::{Dns, Map as Labels, PortMapping},
};

/// The pod's interface. Kubernetes knows only this name.
const INTERFACE: &str = "eth0";
/// How long an answer to "is the network ready?" is good for: the kubelet asks every few seconds.
const STATUS_FRESH: Duration = Duration::from_secs(3);
/// Longest that STATUS may take: the kubelet waits for the answer.
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);
/// Stale attachments that are taken away at a time.
const GC_PARALLEL: usize = 4;
/// CNI: the container is unknown, so there is nothing to take away.
const CODE_UNKNOWN_CONTAINER: u64 = 3;
/// CNI: try again later; plugin not available; the same, and pods may be cut off.
const CODES_UNAVAILABLE: [u64; 3] = [11, 50, 51];

/// Why a pod's network is not as asked for.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// There is no configuration to use.
    #[error("no network configuration in {}: {reason}", dir.display())]
    NoConfig {
        /// Where it was looked for.
        dir: PathBuf,
        /// Every file that was skipped and why; or that there is none.
        reason: String,
    },
    /// A plugin that the configuration names is not there.
    #[error(
        "network {network}: plugin {plugin} is not installed; looked in {}",
        dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    PluginMissing {
        /// Name of the network.
        network: String,
        /// Type of the plugin.
        plugin: String,
        /// Where it was looked for.
        dirs: Vec<PathBuf>,
    },
    /// A plugin speaks none of the versions that the configuration may be used with.
    #[error(
        "network {network}: plugin {plugin} speaks CNI {speaks}, the configuration asks for {asked}"
    )]
    Versions {
        /// Name of the network.
        network: String,
        /// Type of the plugin.
        plugin: String,
        /// Versions that it speaks.
        speaks: String,
        /// Versions of the configuration.
        asked: String,
    },
    /// A plugin failed.
    #[error("network {network}: plugin {plugin}: {verb}")]
    Plugin {
        /// Name of the network.
        network: String,
        /// Type of the plugin.
        plugin: String,
        /// What it was asked to do.
        verb: Verb,
        /// How it failed.
        #[source]
        failure: Failure,
    },
    /// Something the pod asks for makes no sense.
    #[error("{what} {value:?} is not valid: {rule}")]
    Argument {
        /// Name of the field or annotation.
        what: String,
        /// Its value, shortened.
        value: String,
        /// What it must be.
        rule: &'static str,
    },
    /// The pod's namespace is not one.
    #[error("{} is not a network namespace", .0.display())]
    Namespace(PathBuf),
    /// A record cannot be read or written.
    #[error("network attachment {}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Arc<io::Error>,
    },
    /// A record is damaged, and there is no configuration to take the attachment away with.
    #[error(
        "network attachment {} is damaged ({reason}) and no network is configured; configure the \
         network it was made with, or remove the file and free the pod's addresses by hand",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The configuration's version has no such verb.
    #[error("network {network}: CNI {version} has no {verb}")]
    Unsupported {
        /// Name of the network.
        network: String,
        /// Version in use.
        version: &'static str,
        /// What was to be done.
        verb: Verb,
    },
    /// The pod has no network, or the result of its ADD is not known.
    #[error("pod {0} has no known network attachment")]
    NotAttached(PodId),
    /// Pods are being attached all the time, so the plugins cannot collect garbage.
    #[error("pods are being attached; garbage is collected when none is")]
    Busy,
    /// The daemon is shutting down.
    #[error("the daemon is shutting down")]
    Stopped,
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::NoConfig { .. }
            | Error::PluginMissing { .. }
            | Error::Versions { .. }
            | Error::Namespace(_) => Kind::Precondition,
            Error::Plugin { failure, .. } => match failure {
                Failure::Deadline { .. } => Kind::Deadline,
                Failure::Refused { code, .. } if CODES_UNAVAILABLE.contains(code) => {
                    Kind::Unavailable
                }
                Failure::Refused { .. }
                | Failure::Start { .. }
                | Failure::Exited { .. }
                | Failure::TooMuchOutput
                | Failure::Answer(_)
                | Failure::Wait(_) => Kind::Internal,
            },
            Error::Argument { .. } => Kind::Invalid,
            Error::Record { source, .. } => Kind::of_disk(source),
            Error::Damaged { .. } => Kind::Internal,
            Error::Unsupported { .. } => Kind::Unsupported,
            Error::NotAttached(_) => Kind::NotFound,
            Error::Busy | Error::Stopped => Kind::Unavailable,
        }
    }
}

/// A pod that is to have a network.
#[derive(Clone, Debug)]
pub struct Attach {
    /// The pod; its id is the CNI container id.
    pub pod: PodId,
    /// Kubernetes name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes uid.
    pub uid: String,
    /// Path of the pinned network namespace.
    pub netns: PathBuf,
    /// Host ports; those with host port 0 are left out.
    pub port_mappings: Vec<PortMapping>,
    /// For plugins that configure DNS.
    pub dns: Option<Dns>,
    /// Annotations: bandwidth, and the `cni.holdfast/` ones.
    pub annotations: Labels,
    /// Labels.
    pub labels: Labels,
    /// cgroup parent, for plugins that ask for it.
    pub cgroup_parent: String,
}

/// A pod's network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attached {
    /// Addresses of the pod's interface as the plugins ordered them; never empty, the first is the
    /// pod's primary one.
    pub ips: Vec<IpAddr>,
    /// Name of the interface in the pod.
    pub interface: String,
    /// Its hardware address, if it has one.
    pub mac: Option<String>,
    /// DNS settings of the network, if it has any.
    pub dns: Option<Dns>,
    /// The whole CNI result.
    pub result: Value,
}

/// The networks of this node. Clones share it.
#[derive(Clone)]
pub struct Network(Arc<Inner>);

impl Network {
    /// Opens the records of attachments in `attachments_dir`, which must outlive a boot. A missing
    /// or wrong network configuration is no error here: see [`Network::status`].
    pub fn open(
        config: crate::config::Network,
        attachments_dir: PathBuf,
    ) -> Result<Network, Error> {
        let records = Records::open(attachments_dir)?;
        let inherited = records.pods();
        Ok(Network(Arc::new(Inner {
            conf_dir: config.conf_dir,
            timeout: config.timeout,
            plugins: Plugins::new(config.bin_dirs),
            records: Arc::new(records),
            inherited: Mutex::new(inherited),
            orphans: OnceCell::new(),
            claimed: Mutex::default(),
            locks: Mutex::default(),
            collecting: RwLock::new(()),
            snapshot: Mutex::default(),
            status: tokio::sync::Mutex::default(),
            tasks: TaskTracker::new(),
        })))
    }

    /// Whether pods can be attached now: there is a configuration, its plugins are installed and
    /// speak its version, and (from 1.1.0 on) answer STATUS. The error is the reason for the node's
    /// NetworkReady condition. An answer may be 3 s old.
    pub async fn status(&self) -> Result<(), Error> {
        self.work(|inner| async move { inner.status().await }).await
    }

    /// Attaches a pod to the network: writes the record, then runs ADD. On failure everything is
    /// undone; if that fails too, the record stays for [`Network::gc`].
    ///
    /// A caller that goes away does not stop the work: a second call for the same pod and namespace
    /// waits for it and returns its result. Takes at most twice the configured timeout, and longer
    /// only if an earlier operation on the same pod is still running.
    pub async fn attach(&self, pod: &Attach) -> Result<Attached, Error> {
        let (pod, since) = (pod.clone(), std::time::Instant::now());
        let attached = self.work(|inner| async move { inner.attach(pod).await }).await;
        counts().network("attach", since, outcome(&attached, Kinded::kind));
        attached
    }

    /// Takes a pod's attachment away: DEL by its record. `Ok` if there is none. The namespace may
    /// be gone already. The record goes only when every plugin has succeeded, so call again after a
    /// failure.
    pub async fn detach(&self, pod: &PodId) -> Result<(), Error> {
        let (pod, since) = (pod.clone(), std::time::Instant::now());
        let detached = self.work(|inner| async move { inner.detach(&pod).await }).await;
        counts().network("detach", since, outcome(&detached, Kinded::kind));
        detached
    }

    /// Asks the plugins whether a pod's attachment is as they made it. `Ok` without asking if the
    /// configuration says `disableCheck`.
    pub async fn check(&self, pod: &PodId) -> Result<(), Error> {
        let pod = pod.clone();
        self.work(|inner| async move { inner.check(&pod).await }).await
    }

    /// The pods that have an attachment, or had one when a daemon died.
    pub fn attachments(&self) -> Vec<PodId> {
        self.0.records.pods().into_iter().collect()
    }

    /// Takes away the attachments of pods that are not in `valid`, then has the plugins collect
    /// their garbage (GC, from 1.1.0 on). Attachments made by this daemon and not detached are left
    /// alone even if `valid`, being older, lacks them. Every step is tried; the first error is
    /// returned, the others are logged.
    pub async fn gc(&self, valid: &[PodId]) -> Result<(), Error> {
        let valid = valid.iter().cloned().collect();
        self.work(|inner| async move { inner.gc(valid).await }).await
    }

    /// What is configured, for `Status` with `verbose` and for support.
    pub fn config_info(&self) -> Value {
        self.0.config_info()
    }

    /// Waits for operations whose callers have gone. Call it once, at shutdown.
    pub async fn drain(&self) {
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }

    /// Runs work to its end even if the caller goes away.
    async fn work<T, F>(&self, work: impl FnOnce(Arc<Inner>) -> F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let task = self.0.tasks.spawn(work(Arc::clone(&self.0)).in_current_span());
        flatten(task.await)
    }
}

/// The result of a task; its panic is ours.
fn flatten<T>(joined: Result<Result<T, Error>, tokio::task::JoinError>) -> Result<T, Error> {
    match joined {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(Error::Stopped),
    }
}

type Orphans = Mutex<HashMap<PodId, Vec<orphan::Orphan>>>;

struct Inner {
    conf_dir: PathBuf,
    /// Of one verb, over all plugins of a list.
    timeout: Duration,
    plugins: Plugins,
    records: Arc<Records>,
    /// Pods with a record of an earlier daemon that we have not touched yet.
    inherited: Mutex<BTreeSet<PodId>>,
    /// Plugins of an earlier daemon that were running when the first inherited pod was touched.
    orphans: OnceCell<Orphans>,
    /// Pods that this daemon is attaching or has attached.
    claimed: Mutex<BTreeSet<PodId>>,
    /// One lock per pod that is being worked on.
    locks: Mutex<HashMap<PodId, Weak<tokio::sync::Mutex<()>>>>,
    /// Written by GC, read by ADD: a plugin that collects garbage must not see half an ADD.
    collecting: RwLock<()>,
    snapshot: Mutex<Option<Arc<Snapshot>>>,
    status: tokio::sync::Mutex<Option<Known>>,
    tasks: TaskTracker,
}

/// The last answer to "is the network ready?".
struct Known {
    at: Instant,
    of: Arc<Chosen>,
    answer: Result<(), Error>,
}

/// A list with its plugins found and its version chosen.
struct Ready<'a> {
    list: &'a List,
    programs: Vec<Program>,
    version: Version,
}

impl Inner {
    async fn blocking<T: Send + 'static>(
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        flatten(tokio::task::spawn_blocking(work).await)
    }

    /// The operations of a pod, one after the other.
    async fn lock(&self, pod: &PodId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().expect("nothing panics with it");
            locks.retain(|_, lock| lock.strong_count() > 0);
            match locks.get(pod).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(tokio::sync::Mutex::new(()));
                    locks.insert(pod.clone(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }

    /// Lets plugins of an earlier daemon finish with this pod.
    async fn settle_orphans(&self, pod: &PodId) {
        if !self.inherited.lock().expect("nothing panics with it").remove(pod) {
            return;
        }
        let orphans = self
            .orphans
            .get_or_init(|| async {
                let found = tokio::task::spawn_blocking(orphan::scan).await;
                Mutex::new(found.unwrap_or_default())
            })
            .await;
        let processes = orphans.lock().expect("nothing panics with it").remove(pod);
        if let Some(processes) = processes {
            tracing::info!(%pod, "waiting for network plugins that an earlier daemon started");
            orphan::settle(processes, Instant::now() + self.timeout).await;
        }
    }

    /// The configuration directory as it is now.
    fn look(&self) -> Arc<Snapshot> {
        // Held while reading: callers that come together read a changed directory once.
        let mut last = self.snapshot.lock().expect("nothing panics with it");
        let now = config::refresh(&self.conf_dir, last.as_ref());
        if !last.as_ref().is_some_and(|last| Arc::ptr_eq(last, &now)) {
            let same_words = last.as_ref().is_some_and(|last| {
                last.skipped == now.skipped && last.unreadable == now.unreadable
            });
            if !same_words {
                for skipped in &now.skipped {
                    let file = skipped.file.display();
                    tracing::warn!(%file, reason = skipped.reason, "network configuration skipped");
                }
            }
            if let Some(chosen) = &now.chosen {
                let file = chosen.file.display();
                tracing::info!(%file, network = chosen.list.name, "network configuration read");
            }
            *last = Some(Arc::clone(&now));
        }
        now
    }

    fn choose(&self) -> Result<Arc<Chosen>, Error> {
        let snapshot = self.look();
        if let Some(chosen) = &snapshot.chosen {
            return Ok(Arc::clone(chosen));
        }
        let reason = match &snapshot.unreadable {
            Some(reason) => reason.clone(),
            None if snapshot.skipped.is_empty() => {
                "it has no .conf, .conflist or .json file; a network plugin's installation puts one \
                 there"
                    .into()
            }
            None => {
                let all: Vec<_> = snapshot.skipped.iter().map(ToString::to_string).collect();
                all.join("; ")
            }
        };
        Err(Error::NoConfig { dir: self.conf_dir.clone(), reason })
    }

    async fn current(self: &Arc<Self>) -> Result<Arc<Chosen>, Error> {
        let inner = Arc::clone(self);
        Self::blocking(move || inner.choose()).await
    }

    fn find(&self, list: &List, kind: &str) -> Result<Program, Error> {
        self.plugins.find(kind).ok_or_else(|| Error::PluginMissing {
            network: list.name.clone(),
            plugin: kind.to_owned(),
            dirs: self.plugins.dirs().to_owned(),
        })
    }

    /// Finds the plugins of a list and the newest version that all of them speak. With one version
    /// to choose from nobody is asked, unless `ask`: a plugin refuses a version that it does not
    /// speak, and an ADD should not wait for VERSION.
    async fn prepare<'a>(&self, list: &'a List, ask: bool) -> Result<Ready<'a>, Error> {
        let programs = list
            .plugins
            .iter()
            .map(|plugin| self.find(list, &plugin.kind))
            .collect::<Result<Vec<_>, _>>()?;
        if let ([version], false) = (&*list.versions, ask) {
            return Ok(Ready { list, programs, version: *version });
        }
        let spoken =
            futures::future::join_all(programs.iter().map(|p| self.plugins.versions(p))).await;
        let suits = |version: &&Version| spoken.iter().all(|speaks| speaks.includes(**version));
        if let Some(version) = list.versions.iter().find(suits) {
            return Ok(Ready { list, programs, version: *version });
        }
        // Either one plugin speaks none of them, or no two agree: the first that lacks the newest.
        let none = |speaks: &Speaks| !list.versions.iter().any(|version| speaks.includes(*version));
        let culprit = spoken
            .iter()
            .position(none)
            .or_else(|| spoken.iter().position(|speaks| !speaks.includes(list.versions[0])))
            .unwrap_or_default();
        let names = |versions: &[Version]| {
            let names: Vec<_> = versions.iter().map(|version| version.as_str()).collect();
            if names.is_empty() { "no version that is known".into() } else { names.join(", ") }
        };
        Err(Error::Versions {
            network: list.name.clone(),
            plugin: list.plugins[culprit].kind.clone(),
            speaks: match &spoken[culprit] {
                Speaks::These(versions) => names(versions),
                Speaks::Unknown => names(&[]),
            },
            asked: names(&list.versions),
        })
    }

    async fn status(self: &Arc<Self>) -> Result<(), Error> {
        // Held while asking: callers that come together ask once.
        let mut known = self.status.lock().await;
        let chosen = self.current().await?;
        if let Some(known) = &*known
            && known.at.elapsed() < STATUS_FRESH
            && Arc::ptr_eq(&known.of, &chosen)
        {
            return known.answer.clone();
        }
        let answer = self.ask_status(&chosen.list).await;
        *known = Some(Known { at: Instant::now(), of: chosen, answer: answer.clone() });
        answer
    }

    async fn ask_status(&self, list: &List) -> Result<(), Error> {
        let ready = self.prepare(list, true).await?;
        if !ready.version.has_status_and_gc() {
            return Ok(());
        }
        let deadline = Instant::now() + self.timeout.min(STATUS_TIMEOUT);
        for (plugin, program) in list.plugins.iter().zip(&ready.programs) {
            let config = call_config(list, ready.version, plugin, None, None);
            let ran = self.plugins.run(program, Verb::Status, None, &config, deadline).await;
            ran.map_err(plugin_failed(list, plugin, Verb::Status))?;
        }
        Ok(())
    }

    async fn attach(self: &Arc<Self>, pod: Attach) -> Result<Attached, Error> {
        let args = args::cni_args(&pod)?;
        let capabilities = args::capabilities(&pod)?;
        let _pod = self.lock(&pod.pod).await;
        self.claimed.lock().expect("nothing panics with it").insert(pod.pod.clone());
        let attached = self.attach_claimed(&pod, args, capabilities).await;
        if attached.is_err() {
            // What could not be undone is left to the garbage collection.
            self.claimed.lock().expect("nothing panics with it").remove(&pod.pod);
        }
        attached
    }

    async fn attach_claimed(
        self: &Arc<Self>,
        pod: &Attach,
        args: String,
        capabilities: Map<String, Value>,
    ) -> Result<Attached, Error> {
        if self.records.contains(&pod.pod) {
            self.settle_orphans(&pod.pod).await;
            if let Some(attached) = self.earlier(pod).await? {
                return Ok(attached);
            }
            self.take_away(&pod.pod).await?;
        }
        let _not_collecting = self.collecting.read().await;
        let chosen = self.current().await?;
        let ready = self.prepare(&chosen.list, false).await?;
        let mut record = Record {
            file: chosen.file.clone(),
            config: chosen.list.to_value(ready.version),
            netns: pod.netns.clone(),
            netns_inode: None,
            boot: String::new(),
            interface: INTERFACE.into(),
            args,
            capabilities,
            labels: args::labels(pod),
        };
        let (records, id) = (Arc::clone(&self.records), pod.pod.clone());
        let record = Self::blocking(move || {
            if !is_namespace(&record.netns) {
                return Err(Error::Namespace(record.netns));
            }
            record.netns_inode = record::inode(&record.netns);
            record.boot = crate::boot::id().to_owned();
            records.write(&id, &record)?;
            crash::point("daemon.network.intent-recorded");
            Ok(record)
        })
        .await?;

        match self.add(&pod.pod, &record, &ready).await {
            Ok(attached) => {
                let (records, id) = (Arc::clone(&self.records), pod.pod.clone());
                let result = attached.result.clone();
                let kept = Self::blocking(move || records.write_result(&id, &result)).await;
                crash::point("daemon.network.result-kept");
                if let Err(error) = kept {
                    // DEL goes without it, as it must after a power cut.
                    tracing::warn!(pod = %pod.pod, error = chain(&error), "result of ADD not kept");
                }
                Ok(attached)
            }
            Err(error) => {
                if let Err(undo) = self.take_away(&pod.pod).await {
                    tracing::warn!(
                        pod = %pod.pod, error = chain(&undo),
                        "a failed ADD could not be undone; it is tried again with the next garbage \
                         collection"
                    );
                }
                Err(error)
            }
        }
    }

    /// What an earlier call for the same pod and namespace has already done.
    async fn earlier(self: &Arc<Self>, pod: &Attach) -> Result<Option<Attached>, Error> {
        let (records, id, netns) = (Arc::clone(&self.records), pod.pod.clone(), pod.netns.clone());
        Self::blocking(move || {
            let Found::Record(record) = records.read(&id)? else { return Ok(None) };
            if !record.is_for(&netns) {
                return Ok(None);
            }
            let result = records.read_result(&id);
            Ok(result.and_then(|result| result::attached(&result, &record.interface).ok()))
        })
        .await
    }

    async fn add(
        &self,
        pod: &PodId,
        record: &Record,
        ready: &Ready<'_>,
    ) -> Result<Attached, Error> {
        let deadline = Instant::now() + self.timeout;
        let list = ready.list;
        let target = target(pod, record, Some(&record.netns));
        let mut result = None;
        for (plugin, program) in list.plugins.iter().zip(&ready.programs) {
            let config = call_config(list, ready.version, plugin, Some(record), result.as_ref());
            let ran = self.plugins.run(program, Verb::Add, Some(target), &config, deadline).await;
            crash::point("daemon.network.plugin-added");
            let answer = ran.and_then(|output| Ok(result::parse(&output, ready.version)?));
            result = Some(answer.map_err(plugin_failed(list, plugin, Verb::Add))?);
        }
        let last = list.plugins.last().expect("a list has a plugin");
        result::attached(&result.unwrap_or_default(), &record.interface)
            .map_err(Failure::from)
            .map_err(plugin_failed(list, last, Verb::Add))
    }

    async fn detach(self: &Arc<Self>, pod: &PodId) -> Result<(), Error> {
        let _pod = self.lock(pod).await;
        self.claimed.lock().expect("nothing panics with it").remove(pod);
        if !self.records.contains(pod) {
            return Ok(());
        }
        self.settle_orphans(pod).await;
        self.take_away(pod).await
    }

    /// DEL by the record, then the record. The pod's lock is held.
    async fn take_away(self: &Arc<Self>, pod: &PodId) -> Result<(), Error> {
        let (records, id) = (Arc::clone(&self.records), pod.clone());
        let (found, result, netns_is_there) = Self::blocking(move || {
            let found = records.read(&id)?;
            let there = matches!(&found, Found::Record(record) if record.netns_inode.is_some()
                && record.netns_inode == record::inode(&record.netns)
                && is_namespace(&record.netns));
            Ok((found, records.read_result(&id), there))
        })
        .await?;
        match found {
            Found::Nothing => {}
            Found::Record(record) => {
                let list = List::parse(record.config.clone()).map_err(|flaw| Error::Damaged {
                    path: self.records.path(pod),
                    reason: flaw.to_string(),
                })?;
                let netns = netns_is_there.then_some(&*record.netns);
                self.delete(pod, &list, &record, netns, result.as_ref()).await?;
            }
            Found::Damaged(error) => {
                // Plugins find an attachment by network, pod and interface, so the configuration
                // that is current frees it unless the network was another.
                let path = self.records.path(pod);
                let reason = error.to_string();
                tracing::warn!(%pod, file = %path.display(), reason, "network attachment damaged");
                let chosen = match self.current().await {
                    Ok(chosen) => chosen,
                    Err(Error::NoConfig { .. }) => return Err(Error::Damaged { path, reason }),
                    Err(error) => return Err(error),
                };
                let ready = self.prepare(&chosen.list, false).await?;
                let record = Record {
                    file: chosen.file.clone(),
                    config: chosen.list.to_value(ready.version),
                    netns: PathBuf::new(),
                    netns_inode: None,
                    boot: String::new(),
                    interface: INTERFACE.into(),
                    args: format!("IgnoreUnknown=1;K8S_POD_INFRA_CONTAINER_ID={pod}"),
                    capabilities: Map::new(),
                    labels: Vec::new(),
                };
                let list = List { versions: vec![ready.version], ..chosen.list.clone() };
                self.delete(pod, &list, &record, None, None).await?;
            }
        }
        let (records, id) = (Arc::clone(&self.records), pod.clone());
        Self::blocking(move || records.remove(&id)).await?;
        crash::point("daemon.network.forgotten");
        Ok(())
    }

    async fn delete(
        &self,
        pod: &PodId,
        list: &List,
        record: &Record,
        netns: Option<&Path>,
        result: Option<&Value>,
    ) -> Result<(), Error> {
        let deadline = Instant::now() + self.timeout;
        let version = list.versions[0];
        let target = target(pod, record, netns);
        let result = result.filter(|_| version.has_check());
        // A failure stops the list (specification, section 3): an address must not be freed while
        // rules that an earlier plugin failed to remove still lead to it.
        for plugin in list.plugins.iter().rev() {
            let program = self.find(list, &plugin.kind)?;
            let config = call_config(list, version, plugin, Some(record), result);
            let ran = self.plugins.run(&program, Verb::Del, Some(target), &config, deadline).await;
            crash::point("daemon.network.plugin-deleted");
            match ran {
                Ok(_) | Err(Failure::Refused { code: CODE_UNKNOWN_CONTAINER, .. }) => {}
                Err(failure) => return Err(plugin_failed(list, plugin, Verb::Del)(failure)),
            }
        }
        Ok(())
    }

    async fn check(self: &Arc<Self>, pod: &PodId) -> Result<(), Error> {
        let _pod = self.lock(pod).await;
        let (records, id) = (Arc::clone(&self.records), pod.clone());
        let found = Self::blocking(move || {
            let Found::Record(record) = records.read(&id)? else { return Ok(None) };
            Ok(records.read_result(&id).map(|result| (record, result)))
        })
        .await?;
        let (record, result) = found.ok_or_else(|| Error::NotAttached(pod.clone()))?;
        let list = List::parse(record.config.clone()).map_err(|flaw| Error::Damaged {
            path: self.records.path(pod),
            reason: flaw.to_string(),
        })?;
        let version = list.versions[0];
        if list.disable_check {
            return Ok(());
        }
        if !version.has_check() {
            return Err(Error::Unsupported {
                network: list.name,
                version: version.as_str(),
                verb: Verb::Check,
            });
        }
        let deadline = Instant::now() + self.timeout;
        let target = target(pod, &record, Some(&record.netns));
        for plugin in &list.plugins {
            let program = self.find(&list, &plugin.kind)?;
            let config = call_config(&list, version, plugin, Some(&record), Some(&result));
            let ran =
                self.plugins.run(&program, Verb::Check, Some(target), &config, deadline).await;
            ran.map_err(plugin_failed(&list, plugin, Verb::Check))?;
        }
        Ok(())
    }

    async fn gc(self: &Arc<Self>, mut valid: BTreeSet<PodId>) -> Result<(), Error> {
        valid.extend(self.claimed.lock().expect("nothing panics with it").iter().cloned());
        let stale: Vec<_> = self.records.pods().difference(&valid).cloned().collect();
        let mut failures = Vec::new();
        let mut detaching = futures::stream::iter(stale)
            .map(|pod| async move {
                tracing::info!(%pod, "taking away the network attachment of a pod that is gone");
                self.detach(&pod).await
            })
            .buffer_unordered(GC_PARALLEL);
        while let Some(detached) = detaching.next().await {
            failures.extend(detached.err());
        }
        drop(detaching);
        failures.extend(self.collect(&valid).await);
        let mut failures = failures.into_iter();
        let first = failures.next();
        for error in failures {
            tracing::warn!(error = chain(&error), "collect network garbage");
        }
        first.map_or(Ok(()), Err)
    }

    /// The verb GC, on every plugin of the configured network.
    async fn collect(self: &Arc<Self>, valid: &BTreeSet<PodId>) -> Vec<Error> {
        let chosen = match self.current().await {
            Ok(chosen) => chosen,
            // Nothing is configured, so nobody has garbage that we could name.
            Err(Error::NoConfig { .. }) => return Vec::new(),
            Err(error) => return vec![error],
        };
        let list = &chosen.list;
        if list.disable_gc || !list.versions[0].has_status_and_gc() {
            return Vec::new();
        }
        let ready = match self.prepare(list, true).await {
            Ok(ready) => ready,
            Err(error) => return vec![error],
        };
        if !ready.version.has_status_and_gc() {
            return Vec::new();
        }
        // Not `write()`: it would make every ADD behind it wait for the slowest ADD before it.
        let deadline = Instant::now() + self.timeout;
        let _collecting = loop {
            match self.collecting.try_write() {
                Ok(guard) => break guard,
                Err(_) if Instant::now() >= deadline => return vec![Error::Busy],
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        };
        let mut keep = valid.clone();
        keep.extend(self.claimed.lock().expect("nothing panics with it").iter().cloned());
        let keep: Vec<_> = self
            .records
            .pods()
            .intersection(&keep)
            .map(|pod| json!({"containerID": pod, "ifname": INTERFACE}))
            .collect();
        let deadline = Instant::now() + self.timeout;
        let mut failures = Vec::new();
        for (plugin, program) in list.plugins.iter().zip(&ready.programs) {
            let mut config = config_object(list, ready.version, plugin, None, None);
            config.insert("cni.dev/valid-attachments".into(), keep.clone().into());
            // The name that 1.1.0's text first had; plugins of that time read only this one.
            config.insert("cni.dev/attachments".into(), keep.clone().into());
            let config = Value::Object(config).to_string();
            let ran = self.plugins.run(program, Verb::Gc, None, config.as_bytes(), deadline).await;
            failures.extend(ran.err().map(plugin_failed(list, plugin, Verb::Gc)));
        }
        failures
    }

    fn config_info(&self) -> Value {
        let snapshot = self.look();
        let network = snapshot.chosen.as_ref().map(|chosen| {
            let plugins: Vec<_> = chosen
                .list
                .plugins
                .iter()
                .map(|plugin| {
                    let program = self.plugins.find(&plugin.kind);
                    let speaks = program.as_ref().and_then(|p| self.plugins.known_versions(p));
                    json!({
                        "type": plugin.kind,
                        "path": program.map(|program| program.path),
                        "versions": match speaks {
                            Some(Speaks::These(versions)) => {
                                versions.iter().map(|v| v.as_str()).collect::<Value>()
                            }
                            Some(Speaks::Unknown) | None => Value::Null,
                        },
                        "config": plugin.config,
                    })
                })
                .collect();
            json!({
                "name": chosen.list.name,
                "file": chosen.file,
                "cniVersions": chosen.list.versions.iter().map(|v| v.as_str()).collect::<Value>(),
                "plugins": plugins,
            })
        });
        let skipped: Vec<_> = snapshot
            .skipped
            .iter()
            .map(|skipped| json!({"file": skipped.file, "reason": skipped.reason}))
            .collect();
        json!({
            "confDir": self.conf_dir,
            "binDirs": self.plugins.dirs(),
            "timeoutSeconds": self.timeout.as_secs_f64(),
            "network": network,
            "skipped": skipped,
            "unreadable": snapshot.unreadable,
            "attachments": self.records.pods().len(),
        })
    }
}

fn plugin_failed<'a>(
    list: &'a List,
    plugin: &'a config::Plugin,
    verb: Verb,
) -> impl Fn(Failure) -> Error + use<'a> {
    move |failure| Error::Plugin {
        network: list.name.clone(),
        plugin: plugin.kind.clone(),
        verb,
        failure,
    }
}

fn target<'a>(pod: &'a PodId, record: &'a Record, netns: Option<&'a Path>) -> Target<'a> {
    Target { container: pod.as_str(), netns, interface: &record.interface, args: &record.args }
}

/// What a plugin reads from stdin (specification, section 3, "Deriving execution configuration").
fn call_config(
    list: &List,
    version: Version,
    plugin: &config::Plugin,
    record: Option<&Record>,
    result: Option<&Value>,
) -> Vec<u8> {
    let config = config_object(list, version, plugin, record, result);
    serde_json::to_vec(&config).expect("a JSON value can be written")
}

fn config_object(
    list: &List,
    version: Version,
    plugin: &config::Plugin,
    record: Option<&Record>,
    result: Option<&Value>,
) -> Map<String, Value> {
    let mut config = plugin.config.clone();
    config.insert("name".into(), list.name.as_str().into());
    config.insert("cniVersion".into(), version.as_str().into());
    if let Some(record) = record {
        let wanted: Map<_, _> = record
            .capabilities
            .iter()
            .filter(|(capability, _)| plugin.wants(capability))
            .map(|(capability, value)| (capability.clone(), value.clone()))
            .collect();
        if !wanted.is_empty() {
            config.insert("runtimeConfig".into(), wanted.into());
        }
        if !record.labels.is_empty() {
            // A convention (CONVENTIONS.md, "args in network config"). What the administrator
            // wrote there stays, of whatever type it is.
            let args = config.entry("args").or_insert_with(|| json!({}));
            if let Value::Object(args) = args
                && let Value::Object(cni) = args.entry("cni").or_insert_with(|| json!({}))
            {
                cni.entry("labels").or_insert_with(|| record.labels.clone().into());
            }
        }
    }
    if let Some(result) = result {
        config.insert("prevResult".into(), result.clone());
    }
    config
}

/// Whether a path is a namespace's file, not merely the place where one was pinned before.
fn is_namespace(path: &Path) -> bool {
    const NSFS_MAGIC: i64 = 0x6e73_6673;
    rustix::fs::statfs(path).is_ok_and(|fs| fs.f_type == NSFS_MAGIC)
}

#[cfg(test)]
mod tests;

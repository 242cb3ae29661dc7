//! The pod: its namespaces, its containers and their processes. Owns all state of the shim.
//!
//! ```text
//! process   New --start--> (init: Created --start-->) Running --exit--> Ended
//! ```
//! No lock is held across a runtime call, so that containers do not wait for each other. Two things
//! wait on purpose: a process' exit is told only after its start has been (`Process::order`), and a
//! container's exit only after those of its execs.

mod adopt;
mod saved;

pub(crate) use saved::{Saved, VERSION as STATE_VERSION, end_container};

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use holdfast_protos::shim::{api, events::task as event, topics};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use crate::{
    bundle::{Bundle, Exit, ExitRecord, replace},
    cgroup::Cgroup,
    crash, criu,
    handover::{AttachedClient, Busy, Origin},
    kubernetes, mounts, namespaces,
    options::PodOptions,
    process::{Owned, Reaper, lock, report},
    publish::Events,
    relay::Relays,
    runtime::{self, Checkpoint, Place, Reason, Runtime},
    server::timestamp,
    stat::stat_of,
    stdio::{self, Io, Sink, Source},
};

/// How long an exit waits for the last output: a process in the background may hold it open.
const DRAIN: Duration = Duration::from_secs(2);

/// How long a container's exit waits for those of its execs.
const EXECS: Duration = Duration::from_secs(2);

/// How long the pod's init has between SIGTERM and SIGKILL.
const INIT_GRACE: Duration = Duration::from_secs(1);

/// Longest id of a container, exec or pod, in bytes: it becomes a file name.
const ID_MAX: usize = 128;

/// Why a call is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0}: not found")]
    NotFound(String),
    #[error("the pod's shim has died, and this one has not taken over yet")]
    Orphaned,
    #[error("{0}: exists already")]
    AlreadyExists(String),
    #[error("{0}")]
    Precondition(String),
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Unsupported(String),
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    #[error(transparent)]
    Namespaces(#[from] namespaces::Error),
    #[error("{what}")]
    Io { what: String, source: io::Error },
}

type Called<T> = Result<T, Error>;

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |source| Error::Io { what, source }
}

/// How a process ended, as the wire tells it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    pub(crate) pid: u32,
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stage {
    New,
    Created { pid: u32 },
    Running { pid: u32 },
    Ended(Ended),
}

impl Stage {
    pub(crate) fn pid(self) -> u32 {
        match self {
            Stage::New => 0,
            Stage::Created { pid } | Stage::Running { pid } => pid,
            Stage::Ended(ended) => ended.pid,
        }
    }
}

/// The stdio URIs of a process, as they were given.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Uris {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

impl Uris {
    fn parse(&self) -> Called<(Source, Sink, Sink)> {
        Ok((
            Source::parse(&self.stdin).map_err(Error::Invalid)?,
            Sink::parse(&self.stdout).map_err(Error::Invalid)?,
            Sink::parse(&self.stderr).map_err(Error::Invalid)?,
        ))
    }
}

/// A container's first process, or an exec.
pub(crate) struct Process {
    pub(crate) uris: Uris,
    /// The OCI `Process` of an exec.
    spec: Vec<u8>,
    stage: watch::Sender<Stage>,
    /// The start is told before the exit.
    order: tokio::sync::Mutex<()>,
    io: Mutex<Option<Io>>,
    owned: Mutex<Option<Arc<Owned>>>,
    /// When it began, in clock ticks after the boot; 0: not yet.
    began: AtomicU64,
    stdin_closed: AtomicBool,
}

impl Process {
    fn new(uris: Uris, spec: Vec<u8>) -> Self {
        Self {
            uris,
            spec,
            stage: watch::Sender::new(Stage::New),
            order: tokio::sync::Mutex::new(()),
            io: Mutex::default(),
            owned: Mutex::default(),
            began: AtomicU64::new(0),
            stdin_closed: AtomicBool::new(false),
        }
    }

    fn own(&self, owned: &Arc<Owned>) {
        let began = stat_of(owned.pid()).map_or(0, |stat| stat.began);
        self.began.store(began, Ordering::Relaxed);
        *lock(&self.owned) = Some(owned.clone());
    }

    pub(crate) fn stage(&self) -> Stage {
        *self.stage.borrow()
    }

    /// Waits for its end.
    pub(crate) async fn ended(&self) -> Ended {
        let mut stage = self.stage.subscribe();
        loop {
            if let Stage::Ended(ended) = *stage.borrow_and_update() {
                return ended;
            }
            if stage.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Runs `f` with the streams, when they are open.
    pub(crate) fn with_io<T>(&self, f: impl FnOnce(&mut Io) -> T) -> Option<T> {
        lock(&self.io).as_mut().map(f)
    }

    /// Lets go of the write side of its standard input.
    pub(crate) fn close_stdin(&self) {
        self.stdin_closed.store(true, Ordering::Relaxed);
        self.with_io(Io::close_stdin);
    }

    async fn drain(&self) {
        let Some(pumps) = self.with_io(|io| std::mem::take(io.pumps())) else { return };
        let left = stdio::drain(pumps, DRAIN).await;
        self.with_io(|io| io.pumps().extend(left));
    }

    fn signal(&self, name: &str, signal: i32) -> Called<()> {
        let owned = lock(&self.owned).clone();
        let owned = owned.ok_or_else(|| Error::NotFound(format!("{name}: process has ended")))?;
        match owned.signal(signal) {
            Ok(()) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                Err(Error::NotFound(format!("{name}: process has ended")))
            }
            Err(error) => Err(io_error(format!("signal {name}"))(error)),
        }
    }
}

/// A container.
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) bundle: Bundle,
    runtime: Runtime,
    pub(crate) init: Process,
    execs: Mutex<BTreeMap<String, Arc<Process>>>,
    cgroup: OnceLock<Cgroup>,
    /// OOM kills that were counted before it began.
    oom_kills_before: OnceLock<u64>,
    /// Its PID namespace has other processes too, so the kernel does not end them all with init.
    shares_pids: bool,
    pub(crate) paused: AtomicBool,
    /// The runtime could not be made to forget it after it was not made.
    undeleted: AtomicBool,
    /// Held while it is paused, resumed or checkpointed: a resume that comes while one of the other two
    /// is at work must be the last word.
    turn: tokio::sync::Mutex<()>,
    /// A checkpoint under way is to be given up.
    give_up: Notify,
    /// The checkpoint it is to be restored from.
    restore: Option<PathBuf>,
    mounted: bool,
    /// Of its user namespace; empty: it has none.
    ids: IdMaps,
    /// Held while the runtime deletes it: a second `delete` at the same time meets a frozen cgroup.
    deleting: tokio::sync::Mutex<()>,
}

impl Container {
    /// The container's first process (`exec` empty) or an exec.
    pub(crate) fn process(&self, exec: &str) -> Called<ProcessRef<'_>> {
        if exec.is_empty() {
            return Ok(ProcessRef::Init(&self.init));
        }
        let found = lock(&self.execs).get(exec).cloned();
        found
            .map(ProcessRef::Exec)
            .ok_or_else(|| Error::NotFound(format!("exec {exec} of container {}", self.id)))
    }

    pub(crate) fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.get()
    }

    fn name(&self, exec: &str) -> String {
        if exec.is_empty() {
            format!("container {}", self.id)
        } else {
            format!("exec {exec} of container {}", self.id)
        }
    }

    fn running(&self, what: &str) -> Called<u32> {
        match self.init.stage() {
            Stage::Running { pid } => Ok(pid),
            Stage::New | Stage::Created { .. } => {
                Err(Error::Precondition(format!("{what}: container {} is not started", self.id)))
            }
            Stage::Ended(_) => {
                Err(Error::Precondition(format!("{what}: container {} has ended", self.id)))
            }
        }
    }

    /// Execs by the pid they have now.
    pub(crate) fn exec_pids(&self) -> BTreeMap<u32, String> {
        lock(&self.execs)
            .iter()
            .filter_map(|(name, process)| match process.stage() {
                Stage::Running { pid } => Some((pid, name.clone())),
                _ => None,
            })
            .collect()
    }
}

/// A process, wherever it is kept.
pub(crate) enum ProcessRef<'a> {
    Init(&'a Process),
    Exec(Arc<Process>),
}

impl std::ops::Deref for ProcessRef<'_> {
    type Target = Process;
    fn deref(&self) -> &Process {
        match self {
            ProcessRef::Init(process) => process,
            ProcessRef::Exec(process) => process,
        }
    }
}

enum Slot {
    /// Being created.
    Taken,
    Made(Arc<Container>),
}

/// The pod's own part: what the Sandbox service speaks about.
pub(crate) struct Sandbox {
    pub(crate) id: String,
    pub(crate) bundle: Bundle,
    options: PodOptions,
    netns: Option<PathBuf>,
    pub(crate) created_at: Option<SystemTime>,
    starting: bool,
    /// With when it began, in clock ticks after the boot.
    init: Option<(Arc<Owned>, u64)>,
    pub(crate) ended: watch::Sender<Option<Ended>>,
}

impl Sandbox {
    pub(crate) fn pid(&self) -> u32 {
        self.init.as_ref().map_or(0, |(init, _)| init.pid())
    }

    /// Where all its processes are, if it has such a place.
    pub(crate) fn cgroup(&self) -> Option<&str> {
        self.options.cgroup.as_deref()
    }
}

/// What a container is to be made of.
pub(crate) struct Create {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) uris: Uris,
    pub(crate) rootfs: Vec<holdfast_protos::shim::types::mount::Mount>,
    pub(crate) runtime: Runtime,
    pub(crate) checkpoint: String,
}

/// Everything this shim owns.
pub(crate) struct Pod {
    /// containerd namespace.
    namespace: String,
    pub(crate) bundle: Bundle,
    pub(crate) reaper: Arc<Reaper>,
    pub(crate) events: Events,
    /// Where OCI runtime and its state are when the options do not say.
    pub(crate) runtime: Runtime,
    /// Streams of containers that other shims run here.
    pub(crate) relays: Relays,
    containers: Mutex<BTreeMap<String, Slot>>,
    pub(crate) sandbox: Mutex<Option<Sandbox>>,
    /// A container that was being made is made, or not.
    made: Notify,
    /// Somebody asked the shim to exit, or its reason to be may have gone.
    pub(crate) leave: Notify,
    pub(crate) leaving: AtomicBool,
    calls: AtomicUsize,
    /// What is lent to the daemon may have changed.
    pub(crate) lent: Notify,
    /// Another shim has died here, and what it had is not taken over yet.
    orphan: Mutex<bool>,
    /// How this process was started.
    pub(crate) origin: OnceLock<Origin>,
    /// Clients of attach, by their descriptor.
    pub(crate) attached: Mutex<BTreeMap<i32, (AttachedClient, Arc<stdio::Attached>)>>,
}

#[derive(Deserialize, Default)]
struct Spec {
    #[serde(default)]
    linux: Linux,
    #[serde(default)]
    process: SpecProcess,
}

/// The OCI `Process`, of a container or of an exec, as far as its streams need it.
#[derive(Deserialize, Default)]
struct SpecProcess {
    #[serde(default)]
    user: SpecUser,
}

#[derive(Deserialize, Default, Clone, Copy)]
#[serde(default)]
struct SpecUser {
    uid: u32,
    gid: u32,
}

/// Who the ids of a container's user namespace are on the node.
#[derive(Serialize, Deserialize, Debug, Default, Clone)]
#[serde(default)]
pub(crate) struct IdMaps {
    #[serde(rename = "uidMappings")]
    uids: Vec<SpecIds>,
    #[serde(rename = "gidMappings")]
    gids: Vec<SpecIds>,
}

#[derive(Serialize, Deserialize, Debug, Clone, Copy)]
struct SpecIds {
    #[serde(rename = "containerID")]
    container: u32,
    #[serde(rename = "hostID")]
    host: u32,
    size: u32,
}

impl IdMaps {
    /// The user and group on the node; `None` if there are no mappings, or they have no such ids.
    fn on_node(&self, user: SpecUser) -> Option<(u32, u32)> {
        let find = |maps: &[SpecIds], id: u32| {
            maps.iter().find_map(|map| {
                let offset = id.checked_sub(map.container).filter(|offset| *offset < map.size)?;
                map.host.checked_add(offset)
            })
        };
        Some((find(&self.uids, user.uid)?, find(&self.gids, user.gid)?))
    }
}

#[derive(Deserialize, Default)]
struct Linux {
    #[serde(default)]
    namespaces: Vec<SpecNamespace>,
    #[serde(flatten)]
    ids: IdMaps,
}

#[derive(Deserialize)]
struct SpecNamespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}

fn valid_id(what: &str, id: &str) -> Called<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte);
    if id.is_empty() || id.len() > ID_MAX || !id.bytes().all(plain) || id.starts_with('.') {
        return Err(Error::Invalid(format!(
            "{what} id {id:?}: an id has 1 to {ID_MAX} letters, digits, _ . + or -"
        )));
    }
    Ok(())
}

impl Pod {
    pub(crate) fn new(
        namespace: String,
        bundle: Bundle,
        events: Events,
        runtime: Runtime,
    ) -> Arc<Self> {
        Arc::new(Self {
            namespace,
            bundle,
            reaper: Arc::default(),
            events,
            runtime,
            relays: Relays::default(),
            containers: Mutex::default(),
            sandbox: Mutex::default(),
            made: Notify::new(),
            leave: Notify::new(),
            leaving: AtomicBool::new(false),
            calls: AtomicUsize::new(0),
            lent: Notify::new(),
            orphan: Mutex::default(),
            origin: OnceLock::new(),
            attached: Mutex::default(),
        })
    }

    /// The container of this id.
    pub(crate) fn container(&self, id: &str) -> Called<Arc<Container>> {
        if self.orphan_is_waiting() {
            return Err(Error::Orphaned);
        }
        match lock(&self.containers).get(id) {
            Some(Slot::Made(container)) => Ok(container.clone()),
            Some(Slot::Taken) | None => Err(Error::NotFound(format!("container {id}"))),
        }
    }

    /// The same, once it is made if it is being made: whoever takes away what a daemon that was killed
    /// had begun must not miss it.
    async fn settled(&self, id: &str) -> Called<Arc<Container>> {
        loop {
            // Before the look, so that no change after it is missed.
            let changed = self.made.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if !matches!(lock(&self.containers).get(id), Some(Slot::Taken)) {
                return self.container(id);
            }
            changed.await;
        }
    }

    fn all(&self) -> Vec<Arc<Container>> {
        lock(&self.containers)
            .values()
            .filter_map(|slot| match slot {
                Slot::Made(container) => Some(container.clone()),
                Slot::Taken => None,
            })
            .collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.containers).is_empty()
    }

    /// OCI create.
    pub(crate) async fn create(self: &Arc<Self>, create: Create) -> Called<u32> {
        valid_id("container", &create.id)?;
        if self.orphan_is_waiting() {
            return Err(Error::Orphaned);
        }
        let streams = create.uris.parse()?;
        let spec = Bundle::new(&create.bundle).config();
        self.give_files(&spec)?;
        let spec: Spec = fs::read(&spec)
            .and_then(|bytes| Ok(serde_json::from_slice(&bytes)?))
            .map_err(|error| Error::Invalid(format!("{}: {error}", spec.display())))?;
        {
            let mut containers = lock(&self.containers);
            if containers.contains_key(&create.id) {
                return Err(Error::AlreadyExists(format!("container {}", create.id)));
            }
            containers.insert(create.id.clone(), Slot::Taken);
        }
        let id = create.id.clone();
        let made = self.make(create, streams, &spec).await;
        if made.is_err() {
            lock(&self.containers).remove(&id);
            self.leave.notify_one();
        }
        self.made.notify_waiters();
        made
    }

    /// The pod's files to a container of this configuration, where they are ours to give.
    fn give_files(&self, config: &Path) -> Called<()> {
        let sandbox = lock(&self.sandbox);
        let Some(sandbox) = sandbox.as_ref().filter(|sandbox| sandbox.options.files.is_some())
        else {
            return Ok(());
        };
        kubernetes::give_files(&sandbox.bundle, &sandbox.options, config)
            .map_err(|error| Error::Invalid(format!("{}: {error}", config.display())))
    }

    async fn make(
        self: &Arc<Self>,
        create: Create,
        (stdin, stdout, stderr): (Source, Sink, Sink),
        spec: &Spec,
    ) -> Called<u32> {
        let bundle = Bundle::new(&create.bundle);
        // A record is of this container's life, not of one that had its place before.
        match fs::remove_file(bundle.exit_record()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("remove an old exit record")(error));
            }
            _ => {}
        }
        let kept = serde_json::to_vec(&create.runtime).map_err(io::Error::from);
        kept.and_then(|kept| replace(&bundle.options(), &kept, false))
            .map_err(io_error("keep the runtime options"))?;
        crash::point("shim.create.options-kept");
        ExitRecord::reserve(bundle.exit_record())
            .map_err(io_error("take space for the exit record"))?;
        let own_pids = spec.linux.namespaces.iter().any(|n| n.kind == "pid" && n.path.is_empty());
        mounts::mount_all(&create.rootfs, &bundle.rootfs())
            .map_err(io_error("mount the root file system"))?;
        let container = Arc::new(Container {
            id: create.id.clone(),
            bundle,
            runtime: create.runtime,
            init: Process::new(create.uris, Vec::new()),
            execs: Mutex::default(),
            cgroup: OnceLock::new(),
            oom_kills_before: OnceLock::new(),
            shares_pids: !own_pids,
            paused: AtomicBool::new(false),
            undeleted: AtomicBool::new(false),
            turn: tokio::sync::Mutex::new(()),
            give_up: Notify::new(),
            deleting: tokio::sync::Mutex::new(()),
            restore: (!create.checkpoint.is_empty()).then(|| create.checkpoint.clone().into()),
            mounted: !create.rootfs.is_empty(),
            ids: spec.linux.ids.clone(),
        });
        let pid =
            match self.launch_init(&container, &stdin, &stdout, &stderr, spec.process.user).await {
                Ok(pid) => pid,
                Err(error) => {
                    if container.mounted {
                        let _ = mounts::unmount(&container.bundle.rootfs());
                    }
                    // How the runtime was called is what a later `delete` goes by.
                    if !container.undeleted.load(Ordering::Relaxed) {
                        let _ = fs::remove_file(container.bundle.options());
                    }
                    return Err(error);
                }
            };
        lock(&self.containers).insert(create.id.clone(), Slot::Made(container.clone()));
        self.changed();

        let mut told = event::TaskCreate::new();
        told.container_id = create.id;
        told.bundle = create.bundle.display().to_string();
        told.rootfs = create.rootfs;
        let uris = &container.init.uris;
        told.io = Some(event::TaskIO {
            stdin: uris.stdin.clone(),
            stdout: uris.stdout.clone(),
            stderr: uris.stderr.clone(),
            terminal: uris.terminal,
            ..Default::default()
        })
        .into();
        told.checkpoint = create.checkpoint;
        told.pid = pid;
        self.events.send(topics::TASK_CREATE_EVENT_TOPIC, "TaskCreate", &told);
        Ok(pid)
    }

    /// Opens the streams and lets the runtime create the container; a container that is to be
    /// restored gets only its streams.
    async fn launch_init(
        self: &Arc<Self>,
        container: &Arc<Container>,
        stdin: &Source,
        stdout: &Sink,
        stderr: &Sink,
        user: SpecUser,
    ) -> Called<u32> {
        let mut io = self.open_io(container, &container.init, stdin, stdout, stderr, false).await?;
        io.give_to(container.ids.on_node(user)).map_err(io_error("give the streams away"))?;
        if container.restore.is_some() {
            *lock(&container.init.io) = Some(io);
            return Ok(0);
        }
        let console = io.console();
        let given = io.take_given();
        crash::point("shim.create.streams-open");
        let pid_file = container.bundle.init_pid();
        let _ = fs::remove_file(&pid_file);
        let launch = self.reaper.launch();
        let created = container
            .runtime
            .create(
                &self.reaper,
                &container.id,
                Place {
                    bundle: container.bundle.dir(),
                    pid_file: &pid_file,
                    console: console.as_deref(),
                    streams: given,
                },
            )
            .await;
        crash::point("shim.create.runtime-created");
        let adopted = match created {
            Ok(()) => self.adopt(container, &mut io, &pid_file).await,
            Err(error) => {
                io.close();
                // One that was there before belongs to somebody else.
                if error.reason() != Reason::AlreadyExists
                    && !matches!(error, runtime::Error::Spawn { .. })
                {
                    self.delete_by_force(container).await;
                }
                return Err(error.into());
            }
        };
        drop(launch);
        let owned = match adopted {
            Ok(owned) => owned,
            Err(error) => {
                io.close();
                self.delete_by_force(container).await;
                return Err(error);
            }
        };
        let pid = owned.pid();
        *lock(&container.init.io) = Some(io);
        container.init.stage.send_replace(Stage::Created { pid });
        self.watch_init(container.clone(), owned);
        crash::point("shim.create.adopted");
        Ok(pid)
    }

    async fn delete_by_force(&self, container: &Container) {
        if let Err(error) = container.runtime.delete(&self.reaper, &container.id, true).await {
            report!("container {}: it is not made, and not deleted: {error}", container.id);
            container.undeleted.store(true, Ordering::Relaxed);
        }
        crash::point("shim.create.undone");
    }

    /// Takes over the process that the runtime has made: its pidfd, its cgroup, its output.
    async fn adopt(
        &self,
        container: &Container,
        io: &mut Io,
        pid_file: &Path,
    ) -> Called<Arc<Owned>> {
        let pid = read_pid(pid_file)?;
        let owned = self.reaper.own(pid).map_err(io_error(format!("open process {pid}")))?;
        if let Ok(cgroup) = Cgroup::of_container(pid) {
            let _ = container.oom_kills_before.set(cgroup.oom_kills().unwrap_or_default());
            let _ = container.cgroup.set(cgroup);
        }
        io.launched().await.map_err(io_error("pass on the output"))?;
        let owned = Arc::new(owned);
        container.init.own(&owned);
        Ok(owned)
    }

    async fn open_io(
        &self,
        container: &Container,
        process: &Process,
        stdin: &Source,
        stdout: &Sink,
        stderr: &Sink,
        exec: bool,
    ) -> Called<Io> {
        let request = stdio::Request {
            bundle: &container.bundle,
            namespace: &self.namespace,
            container: &container.id,
            terminal: process.uris.terminal,
            stdin,
            stdout,
            stderr,
            exec,
        };
        Io::open(request, &self.reaper).await.map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput | io::ErrorKind::NotFound => {
                Error::Invalid(format!("open streams: {error}"))
            }
            _ => io_error("open streams")(error),
        })
    }

    /// Starts a container or an exec.
    pub(crate) async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Called<u32> {
        let container = self.container(id)?;
        if exec.is_empty() {
            self.start_init(&container).await
        } else {
            let process = match container.process(exec)? {
                ProcessRef::Exec(process) => process,
                ProcessRef::Init(_) => return Err(Error::Invalid("no exec id".into())),
            };
            self.start_exec(&container, exec, process).await
        }
    }

    async fn start_init(self: &Arc<Self>, container: &Arc<Container>) -> Called<u32> {
        let _order = container.init.order.lock().await;
        let mut told = event::TaskStart::new();
        told.container_id = container.id.clone();
        let pid = match container.init.stage() {
            Stage::Created { pid } => {
                container.runtime.start(&self.reaper, &container.id).await?;
                crash::point("shim.start.runtime-started");
                pid
            }
            Stage::New => self.restore(container).await?,
            Stage::Running { .. } => {
                return Err(Error::Precondition(format!("container {} is running", container.id)));
            }
            Stage::Ended(_) => {
                return Err(Error::Precondition(format!("container {} has ended", container.id)));
            }
        };
        told.pid = pid;
        // An exit that came meanwhile waits for `order`, so the stage is still the one of before.
        container.init.stage.send_replace(Stage::Running { pid });
        self.changed();
        self.events.send(topics::TASK_START_EVENT_TOPIC, "TaskStart", &told);
        Ok(pid)
    }

    async fn restore(self: &Arc<Self>, container: &Arc<Container>) -> Called<u32> {
        let images = container
            .restore
            .clone()
            .ok_or_else(|| Error::Precondition("there is no checkpoint to restore".into()))?;
        let mut io = lock(&container.init.io)
            .take()
            .ok_or_else(|| Error::Precondition("the restore failed before".into()))?;
        let runtime = &container.runtime;
        if let Err(error) = criu::before_restore(&container.bundle, &images, &runtime.name()) {
            io.close();
            return Err(io_error("prepare the restore")(error));
        }
        let console = io.console();
        let given = io.take_given();
        let pid_file = container.bundle.init_pid();
        let _ = fs::remove_file(&pid_file);
        let launch = self.reaper.launch();
        let restored = container
            .runtime
            .restore(
                &self.reaper,
                &container.id,
                Place {
                    bundle: container.bundle.dir(),
                    pid_file: &pid_file,
                    console: console.as_deref(),
                    streams: given,
                },
                &images,
            )
            .await;
        if let Err(error) = restored {
            io.close();
            if error.reason() != Reason::AlreadyExists
                && !matches!(error, runtime::Error::Spawn { .. })
            {
                self.delete_by_force(container).await;
            }
            return Err(error.into());
        }
        let adopted = self.adopt(container, &mut io, &pid_file).await;
        drop(launch);
        let owned = match adopted {
            Ok(owned) => owned,
            Err(error) => {
                io.close();
                self.delete_by_force(container).await;
                return Err(error);
            }
        };
        // It was paused when its checkpoint was made, and criu restores that too.
        if let Some(cgroup) = container.cgroup()
            && cgroup.is_frozen()
            && let Err(error) = cgroup.freeze(false)
        {
            report!("container {}: thaw it after its restore: {error}", container.id);
        }
        let pid = owned.pid();
        *lock(&container.init.io) = Some(io);
        self.watch_init(container.clone(), owned);
        Ok(pid)
    }

    /// Follows the container's first process to its end.
    fn watch_init(self: &Arc<Self>, container: Arc<Container>, owned: Arc<Owned>) {
        let pod = self.clone();
        tokio::spawn(async move {
            let End { exit, at, busy: _busy } = end_of(&owned).await;
            pod.settle(&container, owned.pid(), exit, at).await;
        });
    }

    /// The container has ended: everything that must be read, ended, written and told, in order.
    async fn settle(
        &self,
        container: &Container,
        pid: u32,
        exit: io::Result<Exit>,
        at: SystemTime,
    ) {
        let lost = exit.is_err();
        let exit = exit.unwrap_or_else(|error| {
            report!("container {}: its exit code is lost: {error}", container.id);
            Exit::Code(255)
        });
        // The counter goes with the cgroup.
        let before = container.oom_kills_before.get().copied().unwrap_or_default();
        let kills = container.cgroup().and_then(Cgroup::oom_kills).unwrap_or_default();
        let oom_killed = kills > before && exit != Exit::Code(0) && !lost;
        if container.shares_pids
            && let Some(cgroup) = container.cgroup()
            && let Err(error) = cgroup.kill()
        {
            report!("container {}: kill what is left: {error}", container.id);
        }
        let _order = container.init.order.lock().await;
        *lock(&container.init.owned) = None;
        let execs: Vec<_> = lock(&container.execs).values().cloned().collect();
        let _ = tokio::time::timeout(EXECS, async {
            for exec in execs {
                if let Stage::Running { .. } = exec.stage() {
                    exec.ended().await;
                }
            }
        })
        .await;
        container.init.drain().await;
        crash::point("shim.exit.drained");

        let record = ExitRecord { pid, status: exit, at, oom_killed, lost };
        if let Err(error) = record.store(container.bundle.exit_record()) {
            report!("container {}: write its exit record: {error}", container.id);
        }
        crash::point("shim.exit.recorded");
        if kills > before {
            let mut told = event::TaskOOM::new();
            told.container_id = container.id.clone();
            self.events.send(topics::TASK_OOM_EVENT_TOPIC, "TaskOOM", &told);
        }
        let ended = Ended { pid, status: exit.wire_status(), at };
        self.tell_exit(&container.id, &container.id, ended);
        crash::point("shim.exit.told");
        container.init.stage.send_replace(Stage::Ended(ended));
        self.changed();
        self.leave.notify_one();
    }

    fn tell_exit(&self, container: &str, id: &str, ended: Ended) {
        let mut told = event::TaskExit::new();
        told.container_id = container.to_owned();
        told.id = id.to_owned();
        told.pid = ended.pid;
        told.exit_status = ended.status;
        told.exited_at = timestamp(ended.at);
        self.events.send(topics::TASK_EXIT_EVENT_TOPIC, "TaskExit", &told);
    }

    /// Registers an exec.
    pub(crate) fn exec(&self, id: &str, exec: &str, uris: Uris, spec: Vec<u8>) -> Called<()> {
        valid_id("exec", exec)?;
        let container = self.container(id)?;
        container.running("exec")?;
        uris.parse()?;
        serde_json::from_slice::<serde::de::IgnoredAny>(&spec).map_err(|error| {
            Error::Invalid(format!("the process of the exec is no JSON: {error}"))
        })?;
        {
            let mut execs = lock(&container.execs);
            if execs.contains_key(exec) {
                return Err(Error::AlreadyExists(container.name(exec)));
            }
            execs.insert(exec.to_owned(), Arc::new(Process::new(uris, spec)));
        }
        let mut told = event::TaskExecAdded::new();
        told.container_id = id.to_owned();
        told.exec_id = exec.to_owned();
        self.events.send(topics::TASK_EXEC_ADDED_EVENT_TOPIC, "TaskExecAdded", &told);
        Ok(())
    }

    async fn start_exec(
        self: &Arc<Self>,
        container: &Arc<Container>,
        exec: &str,
        process: Arc<Process>,
    ) -> Called<u32> {
        let _order = process.order.lock().await;
        if !matches!(process.stage(), Stage::New) {
            return Err(Error::Precondition(format!("{} was started", container.name(exec))));
        }
        container.running("exec")?;
        let (stdin, stdout, stderr) = process.uris.parse()?;
        let mut io = self.open_io(container, &process, &stdin, &stdout, &stderr, true).await?;
        // What is no process the runtime refuses itself, in its own words.
        let user = serde_json::from_slice::<SpecProcess>(&process.spec).unwrap_or_default().user;
        io.give_to(container.ids.on_node(user)).map_err(io_error("give the streams away"))?;
        let console = io.console();
        let given = io.take_given();
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let pid_file = container.bundle.dir().join(format!("exec{number}.pid"));
        let launch = self.reaper.launch();
        let started = container
            .runtime
            .exec(
                &self.reaper,
                &container.id,
                &process.spec,
                Place {
                    bundle: container.bundle.dir(),
                    pid_file: &pid_file,
                    console: console.as_deref(),
                    streams: given,
                },
            )
            .await;
        crash::point("shim.exec.runtime-started");
        let pid = read_pid(&pid_file);
        let _ = fs::remove_file(&pid_file);
        if let Err(error) = started {
            io.close();
            return Err(error.into());
        }
        // It may have ended by now; nobody has reaped it.
        let pid = pid?;
        let owned = self.reaper.own(pid).map_err(io_error(format!("open process {pid}")))?;
        drop(launch);
        if let Err(error) = io.launched().await {
            let _ = owned.signal(libc::SIGKILL);
            return Err(io_error("pass on the output")(error));
        }
        let owned = Arc::new(owned);
        *lock(&process.io) = Some(io);
        process.own(&owned);
        process.stage.send_replace(Stage::Running { pid });
        self.changed();
        crash::point("shim.exec.adopted");

        let mut told = event::TaskExecStarted::new();
        told.container_id = container.id.clone();
        told.exec_id = exec.to_owned();
        told.pid = pid;
        self.events.send(topics::TASK_EXEC_STARTED_EVENT_TOPIC, "TaskExecStarted", &told);

        self.watch_exec(container, exec, process.clone(), owned);
        Ok(pid)
    }

    /// Follows an exec to its end.
    fn watch_exec(
        self: &Arc<Self>,
        container: &Container,
        exec: &str,
        process: Arc<Process>,
        owned: Arc<Owned>,
    ) {
        let (pod, container, exec) = (self.clone(), container.id.clone(), exec.to_owned());
        tokio::spawn(async move {
            let End { exit, at, busy: _busy } = end_of(&owned).await;
            let exit = exit.unwrap_or_else(|error| {
                report!("exec {exec} of {container}: its exit code is lost: {error}");
                Exit::Code(255)
            });
            let _order = process.order.lock().await;
            *lock(&process.owned) = None;
            process.drain().await;
            let ended = Ended { pid: owned.pid(), status: exit.wire_status(), at };
            pod.tell_exit(&container, &exec, ended);
            crash::point("shim.exec.ended");
            process.stage.send_replace(Stage::Ended(ended));
            pod.changed();
        });
    }

    /// Removes a container that has ended (or never began), or an exec.
    pub(crate) async fn delete(self: &Arc<Self>, id: &str, exec: &str) -> Called<Ended> {
        let container = self.settled(id).await?;
        let never = || Ended { pid: 0, status: 0, at: SystemTime::now() };
        if !exec.is_empty() {
            let ended = match container.process(exec)?.stage() {
                Stage::Ended(ended) => ended,
                Stage::New => never(),
                Stage::Created { .. } | Stage::Running { .. } => {
                    return Err(Error::Precondition(format!(
                        "{} is running",
                        container.name(exec)
                    )));
                }
            };
            let removed = lock(&container.execs).remove(exec);
            if let Some(io) = removed.and_then(|process| lock(&process.io).take()) {
                io.close();
            }
            self.changed();
            return Ok(ended);
        }
        let _turn = container.deleting.lock().await;
        // Whoever had the turn before may have done it.
        self.container(id)?;
        let ended = match container.init.stage() {
            Stage::Ended(ended) => ended,
            Stage::New => never(),
            Stage::Running { .. } => {
                return Err(Error::Precondition(format!("container {id} is running")));
            }
            Stage::Created { .. } => {
                // Killed and waited for first: `delete --force` of something alive sleeps.
                match container.init.signal(&container.name(""), libc::SIGKILL) {
                    // Dead already, and about to be settled.
                    Ok(()) | Err(Error::NotFound(_)) => container.init.ended().await,
                    Err(error) => return Err(error),
                }
            }
        };
        if let Err(error) = container.runtime.delete(&self.reaper, id, false).await {
            // Its first process is dead, whatever the runtime thinks: crun takes a frozen cgroup
            // for a paused container.
            if let Some(cgroup) = container.cgroup() {
                let _ = cgroup.freeze(false);
            }
            if error.reason() != Reason::NotRunning {
                return Err(error.into());
            }
            container.runtime.delete(&self.reaper, id, true).await?;
        }
        crash::point("shim.delete.runtime-deleted");
        if let Some(cgroup) = container.cgroup() {
            // The runtime removes what it made; a nested cgroup of the container's own is left.
            let _ = cgroup.kill();
            let _ = cgroup.remove();
        }
        if container.mounted {
            mounts::unmount(&container.bundle.rootfs())
                .map_err(io_error("unmount the root file system"))?;
        }
        if let Some(io) = lock(&container.init.io).take() {
            io.close();
        }
        for process in std::mem::take(&mut *lock(&container.execs)).into_values() {
            if let Some(io) = lock(&process.io).take() {
                io.close();
            }
        }
        lock(&self.containers).remove(id);
        self.changed();
        crash::point("shim.delete.forgotten");

        let mut told = event::TaskDelete::new();
        told.container_id = id.to_owned();
        told.pid = ended.pid;
        told.exit_status = ended.status;
        told.exited_at = timestamp(ended.at);
        told.id = id.to_owned();
        self.events.send(topics::TASK_DELETE_EVENT_TOPIC, "TaskDelete", &told);
        self.leave.notify_one();
        Ok(ended)
    }

    /// Signals a process, or all of a container.
    pub(crate) async fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> Called<()> {
        let signal = i32::try_from(signal)
            .ok()
            .filter(|signal| (1..=64).contains(signal))
            .ok_or_else(|| Error::Invalid(format!("signal {signal}: there are 1 to 64")))?;
        let container = self.settled(id).await?;
        let name = container.name(exec);
        let process = container.process(exec)?;
        if let Stage::Ended(_) = process.stage() {
            // With `all`, the container's other processes may live on.
            if !(all && exec.is_empty()) {
                return Err(Error::NotFound(format!("{name}: process has ended")));
            }
        }
        if !exec.is_empty() {
            if matches!(process.stage(), Stage::New) {
                return Err(Error::Precondition(format!("{name} is not started")));
            }
            let pid = process.stage().pid();
            let cgroup = container.cgroup().filter(|_| signal == libc::SIGKILL);
            // Looked for before its leader dies, for then those that left its session are nobody's
            // descendants any more; killed after it, so that it does not see its children die and
            // go on.
            let doomed = cgroup.map(|cgroup| session(cgroup, &[pid].into()));
            let sent = process.signal(&name, signal);
            if let (Some(cgroup), Some(doomed)) = (cgroup, doomed) {
                kill_session(cgroup, pid, doomed);
            }
            return sent;
        }
        if !container.runtime.signals_directly() {
            return Ok(container.runtime.kill(&self.reaper, id, signal, all).await?);
        }
        let sent = match (all, container.cgroup()) {
            (true, Some(cgroup)) if signal == libc::SIGKILL => {
                cgroup.kill().map_err(io_error(format!("kill all of {name}")))
            }
            (true, Some(cgroup)) => {
                cgroup.signal(signal).map(drop).map_err(io_error(format!("signal all of {name}")))
            }
            _ => process.signal(&name, signal),
        };
        if sent.is_ok()
            && signal == libc::SIGKILL
            && let Some(cgroup) = container.cgroup()
            && (container.paused.load(Ordering::Relaxed) || cgroup.is_frozen())
        {
            // What is frozen does not die (v1).
            let _ = cgroup.freeze(false);
            container.paused.store(false, Ordering::Relaxed);
        }
        crash::point("shim.kill.sent");
        sent
    }

    pub(crate) async fn pause(&self, id: &str) -> Called<()> {
        let container = self.container(id)?;
        let _turn = container.turn.lock().await;
        container.running("pause")?;
        container.runtime.pause(&self.reaper, id).await?;
        container.paused.store(true, Ordering::Relaxed);
        self.changed();
        let mut told = event::TaskPaused::new();
        told.container_id = id.to_owned();
        self.events.send(topics::TASK_PAUSED_EVENT_TOPIC, "TaskPaused", &told);
        Ok(())
    }

    /// Lets a container run on. A checkpoint of it that is under way is given up: whoever asked for
    /// that wants it no more, or is a daemon that is gone.
    pub(crate) async fn resume(&self, id: &str) -> Called<()> {
        let container = self.container(id)?;
        container.give_up.notify_waiters();
        let _turn = container.turn.lock().await;
        container.running("resume")?;
        container.runtime.resume(&self.reaper, id).await?;
        container.paused.store(false, Ordering::Relaxed);
        self.changed();
        let mut told = event::TaskResumed::new();
        told.container_id = id.to_owned();
        self.events.send(topics::TASK_RESUMED_EVENT_TOPIC, "TaskResumed", &told);
        Ok(())
    }

    pub(crate) async fn update(&self, id: &str, resources: &[u8]) -> Called<()> {
        let container = self.container(id)?;
        serde_json::from_slice::<serde::de::IgnoredAny>(resources)
            .map_err(|error| Error::Invalid(format!("the resources are no JSON: {error}")))?;
        let updated = container.runtime.update(&self.reaper, id, resources).await;
        crash::point("shim.update.runtime-updated");
        Ok(updated?)
    }

    /// Writes the images of a container's processes. `within`: what the caller gives it; else the
    /// deadline of any call.
    pub(crate) async fn checkpoint(
        &self,
        id: &str,
        mut how: Checkpoint,
        within: Option<Duration>,
    ) -> Called<()> {
        let container = self.container(id)?;
        let _turn = container.turn.lock().await;
        container.running("checkpoint")?;
        let runtime = &container.runtime;
        if how.work.as_os_str().is_empty() {
            how.work.clone_from(&runtime.criu_work);
        }
        criu::before_checkpoint(&container.bundle, &how.images, &runtime.name())
            .map_err(io_error("prepare the checkpoint"))?;
        let within = within.unwrap_or_else(|| runtime.deadline());
        let written = runtime.checkpoint(&self.reaper, id, &how, within, &container.give_up).await;
        if let Err(error) = written {
            // A criu that was killed leaves frozen what it froze.
            if !container.paused.load(Ordering::Relaxed)
                && let Some(cgroup) = container.cgroup()
                && cgroup.is_frozen()
                && let Err(error) = cgroup.freeze(false)
            {
                report!("container {id}: thaw it after a failed checkpoint: {error}");
            }
            return Err(error.into());
        }
        let mut told = event::TaskCheckpointed::new();
        told.container_id = id.to_owned();
        told.checkpoint = how.images.display().to_string();
        self.events.send(topics::TASK_CHECKPOINTED_EVENT_TOPIC, "TaskCheckpointed", &told);
        Ok(())
    }

    /// Host pids of a container's processes.
    pub(crate) async fn pids(&self, id: &str) -> Called<Vec<u32>> {
        let container = self.container(id)?;
        match container.cgroup() {
            Some(cgroup) if container.runtime.signals_directly() => {
                cgroup.pids().map_err(io_error("read the container's processes"))
            }
            _ if matches!(container.init.stage(), Stage::Running { .. }) => {
                Ok(container.runtime.ps(&self.reaper, id).await?)
            }
            _ => Ok(Vec::new()),
        }
    }

    /// Notes what the pod is to be.
    pub(crate) fn create_sandbox(
        &self,
        id: &str,
        bundle: PathBuf,
        options: PodOptions,
        netns: Option<PathBuf>,
    ) -> Called<()> {
        valid_id("pod", id)?;
        namespaces::validate(&options, netns.is_some())?;
        if !bundle.is_dir() {
            return Err(Error::Invalid(format!("bundle {} is no directory", bundle.display())));
        }
        if self.orphan_is_waiting() {
            return Err(Error::Orphaned);
        }
        let mut sandbox = lock(&self.sandbox);
        if let Some(other) = &*sandbox {
            return Err(Error::AlreadyExists(format!("pod {}", other.id)));
        }
        *sandbox = Some(Sandbox {
            id: id.to_owned(),
            bundle: Bundle::new(bundle),
            options,
            netns,
            created_at: None,
            starting: false,
            init: None,
            ended: watch::Sender::new(None),
        });
        Ok(())
    }

    /// Runs `f` with the pod of this id.
    pub(crate) fn with_sandbox<T>(
        &self,
        id: &str,
        f: impl FnOnce(&mut Sandbox) -> Called<T>,
    ) -> Called<T> {
        if self.orphan_is_waiting() {
            return Err(Error::Orphaned);
        }
        match &mut *lock(&self.sandbox) {
            Some(sandbox) if sandbox.id == id => f(sandbox),
            _ => Err(Error::NotFound(format!("pod {id}"))),
        }
    }

    /// Makes and pins the pod's namespaces; gives the pid of its init and when.
    pub(crate) async fn start_sandbox(self: &Arc<Self>, id: &str) -> Called<(u32, SystemTime)> {
        let (bundle, options, netns) = self.with_sandbox(id, |sandbox| {
            if sandbox.created_at.is_some() || sandbox.starting {
                return Err(Error::Precondition(format!("pod {id} was started")));
            }
            sandbox.starting = true;
            Ok((sandbox.bundle.clone(), sandbox.options.clone(), sandbox.netns.clone()))
        })?;
        let made = match kubernetes::make_files(&bundle, &options) {
            Ok(()) => namespaces::create(&bundle, &options, netns.as_deref(), &self.reaper).await,
            Err(source) => Err(namespaces::Error::Io { what: "make the pod's files", source }),
        };
        if made.is_err() {
            kubernetes::remove_files(&bundle, &options);
        }
        crash::point("shim.sandbox.namespaces-pinned");
        let at = SystemTime::now();
        let started = self.with_sandbox(id, |sandbox| {
            sandbox.starting = false;
            let made = made?;
            sandbox.created_at = Some(at);
            if let Some(init) = made.init {
                let began = stat_of(init.pid()).map_or(0, |stat| stat.began);
                let init = Arc::new(init);
                sandbox.init = Some((init.clone(), began));
                self.watch_pod_init(id.to_owned(), init);
            }
            Ok((sandbox.pid(), at))
        });
        self.changed();
        started
    }

    /// Follows the pod's init to its end.
    fn watch_pod_init(self: &Arc<Self>, id: String, init: Arc<Owned>) {
        let pod = self.clone();
        tokio::spawn(async move {
            let End { exit, at, busy: _busy } = end_of(&init).await;
            let exit = exit.unwrap_or(Exit::Code(255));
            let ended = Ended { pid: init.pid(), status: exit.wire_status(), at };
            let _ = pod.with_sandbox(&id, |sandbox| {
                sandbox.init = None;
                sandbox.ended.send_replace(Some(ended));
                Ok(())
            });
            pod.changed();
        });
    }

    /// Ends every process of the pod: SIGTERM, SIGKILL after `grace`, the init last.
    pub(crate) async fn stop_sandbox(&self, id: &str, grace: Duration) -> Called<()> {
        self.with_sandbox(id, |_| Ok(()))?;
        let alive: Vec<_> = self
            .all()
            .into_iter()
            .filter(|c| !matches!(c.init.stage(), Stage::Ended(_) | Stage::New))
            .collect();
        if !grace.is_zero() {
            for container in &alive {
                let _ = self.kill(&container.id, "", libc::SIGTERM as u32, false).await;
            }
            let _ = tokio::time::timeout(grace, async {
                for container in &alive {
                    container.init.ended().await;
                }
            })
            .await;
        }
        for container in &alive {
            if !matches!(container.init.stage(), Stage::Ended(_)) {
                let killed = self.kill(&container.id, "", libc::SIGKILL as u32, true).await;
                if let Err(error) = killed {
                    report!("container {}: {error}", container.id);
                }
            }
        }
        for container in &alive {
            container.init.ended().await;
        }
        let init = self.with_sandbox(id, |sandbox| Ok(sandbox.init.clone()))?;
        if let Some((init, _)) = init {
            let mut ended = self.with_sandbox(id, |sandbox| Ok(sandbox.ended.subscribe()))?;
            let _ = init.signal(libc::SIGTERM);
            if tokio::time::timeout(INIT_GRACE, ended.wait_for(Option::is_some)).await.is_err() {
                let _ = init.signal(libc::SIGKILL);
                let _ = ended.wait_for(Option::is_some).await;
            }
        }
        self.with_sandbox(id, |sandbox| {
            if let Some(cgroup) = &sandbox.options.cgroup
                && let Ok(cgroup) = Cgroup::at(Path::new(cgroup).join(namespaces::INIT_CGROUP))
            {
                let _ = cgroup.remove();
            }
            sandbox.ended.send_if_modified(|ended| {
                let first = ended.is_none();
                if first {
                    *ended = Some(Ended { pid: 0, status: 0, at: SystemTime::now() });
                }
                first
            });
            Ok(())
        })
    }

    /// Unpins the pod's namespaces and lets the shim go.
    pub(crate) async fn shutdown_sandbox(&self, id: &str) -> Called<()> {
        self.with_sandbox(id, |_| Ok(()))?;
        if !self.is_empty() {
            return Err(Error::Precondition(format!("pod {id} has containers")));
        }
        self.stop_sandbox(id, Duration::ZERO).await?;
        crash::point("shim.shutdown.stopped");
        let (bundle, options) =
            self.with_sandbox(id, |sandbox| Ok((sandbox.bundle.clone(), sandbox.options.clone())))?;
        namespaces::remove(&bundle);
        kubernetes::remove_files(&bundle, &options);
        crash::point("shim.shutdown.namespaces-gone");
        // Before the answer: after it nobody looks for what a shim leaves that dies on its way out.
        if let Ok(address) = fs::read_to_string(bundle.address())
            && let Some(socket) = address.trim().strip_prefix("unix://")
        {
            let _ = fs::remove_file(socket);
        }
        crash::point("shim.shutdown.socket-gone");
        *lock(&self.sandbox) = None;
        let _ = fs::remove_file(self.bundle.shim_state());
        self.exit();
        Ok(())
    }

    /// Lets the shim go, once the answer is out.
    pub(crate) fn exit(&self) {
        self.leaving.store(true, Ordering::Relaxed);
        self.leave.notify_one();
    }

    /// Whether nothing is left that needs this shim.
    pub(crate) fn is_done(&self) -> bool {
        if self.leaving.load(Ordering::Relaxed) {
            return true;
        }
        // The daemon removed the bundle: nobody will ever ask for us again.
        let alive = self
            .all()
            .iter()
            .any(|c| matches!(c.init.stage(), Stage::Created { .. } | Stage::Running { .. }));
        let creating = lock(&self.containers).values().any(|slot| matches!(slot, Slot::Taken));
        !alive && !creating && !self.bundle.dir().exists()
    }

    /// What there is, for the shim's log.
    pub(crate) fn describe(&self) -> String {
        let mut text = format!("pod in {}", self.bundle.dir().display());
        for container in self.all() {
            text.push_str(&format!("; container {} {:?}", container.id, container.init.stage()));
            for (name, process) in &*lock(&container.execs) {
                text.push_str(&format!("; exec {name} {:?}", process.stage()));
            }
        }
        text
    }

    /// Connect: the pid of a container, 0 when there is none.
    pub(crate) fn task_pid(&self, id: &str) -> u32 {
        self.container(id).map_or(0, |container| container.init.stage().pid())
    }

    pub(crate) fn state(&self, id: &str, exec: &str) -> Called<api::StateResponse> {
        use holdfast_protos::shim::types::task::Status;
        let container = self.container(id)?;
        let process = container.process(exec)?;
        let mut state = api::StateResponse::new();
        state.id = id.to_owned();
        state.exec_id = exec.to_owned();
        state.bundle = container.bundle.dir().display().to_string();
        state.stdin = process.uris.stdin.clone();
        state.stdout = process.uris.stdout.clone();
        state.stderr = process.uris.stderr.clone();
        state.terminal = process.uris.terminal;
        let stage = process.stage();
        state.pid = stage.pid();
        let status = match stage {
            Stage::New | Stage::Created { .. } => Status::CREATED,
            Stage::Running { .. }
                if exec.is_empty() && container.paused.load(Ordering::Relaxed) =>
            {
                Status::PAUSED
            }
            Stage::Running { .. } => Status::RUNNING,
            Stage::Ended(ended) => {
                state.exit_status = ended.status;
                state.exited_at = timestamp(ended.at);
                Status::STOPPED
            }
        };
        state.status = status.into();
        Ok(state)
    }
}

/// How a process ended that was followed.
struct End {
    exit: io::Result<Exit>,
    at: SystemTime,
    /// What follows from the end is in our hands until this is dropped.
    busy: Busy,
}

/// Waits for a process' end.
async fn end_of(owned: &Owned) -> End {
    let ended = owned.ended().await;
    let busy = Busy::begin();
    let exit = match ended {
        Ok(()) => owned.exit().await,
        Err(error) => Err(error),
    };
    End { exit, at: SystemTime::now(), busy }
}

fn read_pid(path: &Path) -> Called<u32> {
    let text = fs::read_to_string(path).map_err(io_error("read the pid the runtime wrote"))?;
    text.trim().parse().map_err(|_| {
        let text = format!("the runtime wrote no pid: {text:?}");
        io_error("read the pid the runtime wrote")(io::Error::new(io::ErrorKind::InvalidData, text))
    })
}

/// The processes of a container that are in the session of one of `leaders`, or descend from one.
fn session(cgroup: &Cgroup, leaders: &BTreeSet<u32>) -> BTreeSet<u32> {
    let table: BTreeMap<u32, (u32, u32)> = cgroup
        .pids()
        .unwrap_or_default()
        .into_iter()
        .filter_map(|pid| stat_of(pid).map(|stat| (pid, (stat.parent, stat.session))))
        .collect();
    let belongs = |pid: &u32| {
        let (mut ancestor, session) = table[pid];
        if leaders.contains(pid) || leaders.contains(&session) {
            return true;
        }
        // As many steps as there are processes, so that a changing table cannot loop.
        for _ in 0..table.len() {
            if leaders.contains(&ancestor) {
                return true;
            }
            match table.get(&ancestor) {
                Some((parent, _)) => ancestor = *parent,
                None => return false,
            }
        }
        false
    };
    table.keys().copied().filter(belongs).collect()
}

/// Kills what an exec has started: a few rounds, for it may fork meanwhile.
#[expect(unsafe_code, reason = "kill(2)")]
fn kill_session(cgroup: &Cgroup, leader: u32, mut doomed: BTreeSet<u32>) {
    doomed.insert(leader);
    for _ in 0..4 {
        let left = session(cgroup, &doomed);
        if left.is_empty() {
            return;
        }
        for pid in &left {
            // SAFETY: no memory is involved. The pid was in the container's cgroup just now.
            unsafe { libc::kill(pid.cast_signed(), libc::SIGKILL) };
        }
        doomed.extend(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_belong_to_whom_the_process_is_on_the_node() {
        let owner = |spec: &str| {
            let spec: Spec = serde_json::from_str(spec).unwrap();
            spec.linux.ids.on_node(spec.process.user)
        };
        let maps = r#""linux":{"uidMappings":[{"containerID":0,"hostID":1000,"size":10},
                       {"containerID":10,"hostID":5000,"size":10}],
                       "gidMappings":[{"containerID":0,"hostID":2000,"size":20}]}"#;
        assert_eq!(owner(&format!("{{{maps}}}")), Some((1000, 2000)));
        let with = |uid: u32, gid: u32| {
            owner(&format!(r#"{{"process":{{"user":{{"uid":{uid},"gid":{gid}}}}},{maps}}}"#))
        };
        assert_eq!(with(12, 19), Some((5002, 2019)));
        assert_eq!(with(20, 0), None);
        assert_eq!(with(0, u32::MAX), None);
        assert_eq!(owner(r#"{"process":{"user":{"uid":5}}}"#), None);
    }

    #[test]
    fn an_id_cannot_leave_its_directory() {
        assert!(valid_id("container", "a-b_c.1+2").is_ok());
        for id in ["", "..", ".a", "a/b", "a b", "a\n", &"a".repeat(129)] {
            assert!(valid_id("container", id).is_err(), "{id:?}");
        }
    }
}

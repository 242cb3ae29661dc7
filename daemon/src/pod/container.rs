//! Making, starting, stopping and removing containers. Runs beside the owner; what it changes comes
//! back as an effect.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use holdfast_shim::{
    bundle::{Bundle, Namespace},
    cgroup::Cgroup,
    client::{Client, CreateTask, ErrorKind, TaskStatus},
    crash, options,
};
use oci_spec::runtime::Spec;
use tracing::warn;

use super::{
    Error, Pod, PodView, Services,
    config::{ContainerConfig, PidMode, PodNamespaces, PodRef, Resources, User},
    extras, foreign, io_at, leftover,
    nri::{self, Change as Limits},
    readback, recover,
    restore::{self, Restore},
    run::{remove_dir, unmount},
    state::{Change, ContainerState, End, Exit},
    task::Effect,
    volumes,
};
use crate::{
    config::CgroupDriver,
    error::chain,
    id::ContainerId,
    image::{Image, Mounted, Owners},
    shims::private_dir,
    spec::{self, NamespacePaths, PidNamespace, PodFiles},
    store::pods::{ContainerRecord, PodRecord},
};

/// How long a container may still show itself after SIGKILL.
const AFTER_KILL: Duration = Duration::from_secs(30);

/// How often the shim is asked, should its event not come.
const ASK: Duration = Duration::from_secs(2);

/// Largest /etc/passwd and /etc/group of an image that is read.
const ACCOUNTS_LIMIT: usize = 4 << 20;

/// Makes a container. Intent first; on failure everything is undone, the intent last.
pub(super) async fn create(
    services: Arc<Services>,
    pod: Pod,
    id: ContainerId,
    mut config: ContainerConfig,
) -> Result<Effect, Error> {
    let view = pod.view();
    let volumes = volumes::find(&services, &mut config)?;
    let restore = restore::prepare(&services, &view, &id, &config).await?;
    let image = match &restore {
        Some(restore) => restore.base.clone(),
        None => {
            let image = services.images.find(&config.image);
            image.ok_or_else(|| Error::NoImage(config.image.clone()))?
        }
    };
    let stop_signal = spec::args::stop_signal(&config, &image.defaults);
    let log = match config.log_path.as_os_str().is_empty() {
        true => PathBuf::new(),
        false => view.record.config.log_directory.join(&config.log_path),
    };
    let mut record = ContainerRecord {
        id: id.clone(),
        pod: pod.id.clone(),
        image_id: image.id.to_string(),
        image_ref: image.digests.first().cloned().unwrap_or_else(|| image.id.to_string()),
        image: image.defaults.clone(),
        user: User::default(),
        stop_signal,
        log,
        created_at: SystemTime::now(),
        state: ContainerState::Creating,
        config,
        asked_resources: None,
        rebooted: false,
        unknown: Default::default(),
    };
    services.store.put_container(&record).await?;
    crash::point("daemon.create.intent-recorded");
    let client = pod.client().await?;
    let made = make(&services, &view, &client, &mut record, &image, &volumes, restore).await;
    // The pod may have been stopped while the runtime was at work.
    let made = match made {
        Ok(_) if pod.view().record.state != super::state::PodState::Ready => {
            Err(Error::PodNotReady(pod.id.clone()))
        }
        other => other,
    };
    match made {
        Ok(pid) => {
            // From `Creating` nothing but this can follow.
            if let Ok(state) = record.state.clone().apply(Change::Created { pid }) {
                record.state = state;
            }
            nri::post_create(&services, &view.record, &record).await;
            Ok(Effect::Created(Box::new(record)))
        }
        Err(error) => {
            nri::undo_create(&services, &view.record, &record).await;
            let client = match lost_shim(&error) {
                false => Some(client),
                true => {
                    // The runtime may have made it, and no shim knows.
                    let deleted = services.shims.delete_dead(&id, &view.record.runtime).await;
                    if let Err(error) = deleted {
                        warn!(container = id.short(), error = %chain(&error), "clean up after it");
                    }
                    pod.client_after(&client).await.ok()
                }
            };
            let record = Arc::new(record);
            let undo = move || {
                let (services, pod) = (services.clone(), pod.clone());
                let (client, record) = (client.clone(), record.clone());
                async move { undo(&services, &pod, client, &record).await }
            };
            if let Err(error) = undo().await {
                leftover::later("a container that was not made", &error, undo);
            }
            Err(error)
        }
    }
}

/// Takes away a container that was not made, its record last. May be repeated.
async fn undo(
    services: &Services,
    pod: &Pod,
    client: Option<Client>,
    record: &ContainerRecord,
) -> Result<(), Error> {
    let id = &record.id;
    let of = pod.view().record.clone();
    let undone = async {
        forget(services, &of, client.as_ref(), id).await?;
        let shim = client.map(|client| (pod, client));
        take_away(services, shim.as_ref(), record).await
    };
    let undone = undone.await;
    crash::point("daemon.create.undone");
    remove_cgroup(services, &of, id).await;
    undone?;
    services.store.delete_container(id).await?;
    crash::point("daemon.create.undone-and-forgotten");
    Ok(())
}

/// Makes the OCI runtime forget a container that the shim does not know, but was about to make: it
/// could not undo it itself, or died while it did.
async fn forget(
    services: &Services,
    pod: &PodRecord,
    client: Option<&Client>,
    id: &ContainerId,
) -> Result<(), Error> {
    // How the runtime was called; a shim removes it when nothing is left to be deleted.
    if !services.shims.container_bundle(id).options().exists() {
        return Ok(());
    }
    if let Some(client) = client {
        // It waits there for a creation that is under way; only then does the state tell.
        match client.kill(id.as_str(), "", libc::SIGKILL as u32, true).await {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Closed) => {}
            _ => return Ok(()),
        }
        let state = client.state(id.as_str(), "").await;
        if !state.is_err_and(|e| matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Closed)) {
            return Ok(());
        }
    }
    if !services.shims.container_bundle(id).options().exists() {
        return Ok(());
    }
    let deleted = services.shims.delete_dead(id, &pod.runtime).await;
    deleted.map_err(|source| Error::Task { what: "delete", id: id.clone(), source }).map(drop)
}

async fn make(
    services: &Arc<Services>,
    view: &PodView,
    client: &Client,
    record: &mut ContainerRecord,
    image: &Image,
    volumes: &[volumes::Asked],
    restore: Option<Restore>,
) -> Result<Option<u32>, Error> {
    let name = record.config.name.clone();
    let command = spec::args::arguments(&record.config, &record.image).unwrap_or_default();
    let command = command.into_iter().next().unwrap_or_default();
    let runtime = view.record.runtime.clone();
    let image_error = |source| Error::Image { name: name.clone(), source };
    let snapshot = services.images.create_snapshot(&record.id, image).await.map_err(image_error)?;
    crash::point("daemon.create.snapshot-made");
    let held = volumes::hold(services, &record.id, volumes).await.map_err(image_error)?;

    let bundle = services.shims.container_bundle(&record.id);
    let namespaces = namespaces(services, view, record)?;
    let (shared, pod, draft) = (services.clone(), view.record.clone(), record.clone());
    let image = image.clone();
    let at = bundle.clone();
    let checkpoint = restore.as_ref().map(|restore| (restore.images(), restore.work()));
    // Mounts, look-ups in the image and small writes: all of it may sleep in the kernel.
    let prepared = tokio::task::spawn_blocking(move || {
        prepare(&shared, &pod, draft, &image, &snapshot, &held, &namespaces, &at, restore)
    })
    .await
    .unwrap_or(Err(Error::Panicked))?;
    record.user = prepared.user;
    let json = nri::create(services, &view.record, record, prepared.spec).await?;
    let (draft, at) = (record.clone(), bundle.clone());
    let (mounted, made_dirs) = (prepared.mounted, prepared.made_dirs);
    tokio::task::spawn_blocking(move || fill(&draft, &at, &json, mounted, made_dirs))
        .await
        .unwrap_or(Err(Error::Panicked))?;
    crash::point("daemon.create.prepared");

    if let Some(handler) = &view.record.foreign {
        let created = foreign::create(services, &view.record, handler, record, &bundle).await;
        return created.map(Some).map_err(|source| Error::Create { name, command, source });
    }
    let log = match record.log.as_os_str().is_empty() {
        // No file; attach works all the same.
        true => format!("{}?attach", options::CRI_LOG),
        false => format!("{}{}", options::CRI_LOG, record.log.display()),
    };
    let config = &record.config;
    let task = CreateTask {
        id: record.id.to_string(),
        bundle: bundle.dir().to_owned(),
        terminal: config.tty,
        stdin: match (config.stdin, config.stdin_once) {
            (false, _) => String::new(),
            (true, false) => options::HELD_STDIN.into(),
            (true, true) => options::HELD_STDIN_ONCE.into(),
        },
        stdout: log.clone(),
        stderr: if config.tty { String::new() } else { log },
        rootfs: Vec::new(),
        options: Some(match &checkpoint {
            Some((_, work)) => services.shims.restore_options(&runtime, work),
            None => services.shims.runtime_options(&runtime),
        }),
        checkpoint: match &checkpoint {
            Some((images, _)) => images.display().to_string(),
            None => String::new(),
        },
    };
    // The runtimes look for the command here already; not all of them name it.
    let created = client.create(task).await;
    crash::point("daemon.create.task-created");
    let pid = created.map_err(|source| Error::Create { name, command, source })?;
    // One that will be restored has no process before that.
    Ok((pid != 0).then_some(pid))
}

/// A container but for its bundle.
struct Prepared {
    user: User,
    spec: Spec,
    mounted: Mounted,
    made_dirs: MadeDirs,
}

#[expect(clippy::too_many_arguments, reason = "one step, cut out for its thread")]
/// Root file system, account, OCI spec: all that the runtime is given.
fn prepare(
    services: &Services,
    pod: &crate::store::pods::PodRecord,
    record: ContainerRecord,
    image: &Image,
    snapshot: &crate::image::Snapshot,
    held: &[volumes::Held],
    namespaces: &NamespacePaths,
    bundle: &Bundle,
    restore: Option<Restore>,
) -> Result<Prepared, Error> {
    let name = &record.config.name;
    let image_error = |source| Error::Image { name: name.clone(), source };
    let spec_error = |source| Error::Spec { name: name.clone(), source };
    let driver = services.config.runtime.cgroup_driver;
    let pod_ref = PodRef { id: &pod.id, config: &pod.config };
    // Before anything is made on the node for it.
    spec::check(&pod_ref, &record.config, driver).map_err(spec_error)?;
    let user_namespace = pod.config.namespaces.user.as_ref();
    let owners = match (user_namespace, &namespaces.user) {
        (Some(user), Some(path)) => {
            let owners = Owners::open(path, &user.uids, &user.gids);
            Some(owners.map_err(io_at("open the pod's user namespace", path))?)
        }
        _ => None,
    };
    let owners = owners.as_ref();
    if let Some(restore) = &restore {
        restore.fill(&record.id, snapshot)?;
    }
    let mounted = snapshot.mount_for(false, owners).map_err(image_error)?;
    if let Some(restore) = &restore {
        restore.prune(&mounted)?;
    }
    let account = |path: &str| {
        let read = mounted.read(path, ACCOUNTS_LIMIT);
        read.map(Option::unwrap_or_default).map_err(io_at("read the image's", Path::new(path)))
    };
    let user = spec::user::resolve(
        &account("etc/passwd")?,
        &account("etc/group")?,
        &record.config.security,
        &image.defaults.user,
    )
    .map_err(spec_error)?;

    let localhost = match &record.config.security.seccomp {
        Some(super::config::Profile::Localhost(path)) => {
            let path = Path::new(path);
            Some(std::fs::read(path).map_err(io_at("read seccomp profile", path))?)
        }
        _ => None,
    };
    let mut facts = crate::node::gather(&record.config)
        .map_err(|source| Error::Host { name: name.clone(), source })?;
    let made_dirs = MadeDirs(facts.created.clone());
    extras::devices(services, pod, &record.config, &mut facts);
    volumes::owned_dir(bundle.dir(), user_namespace)?;
    for (index, source) in volumes::mount(bundle, &record.config, held, owners)? {
        facts.mounts[index].source = Some(source);
    }
    let user_pair = user_namespace.zip(owners);
    let image_volumes = volumes::declared(
        services,
        &record.id,
        &image.defaults,
        &record.config,
        &mounted,
        user_pair,
    )?;
    let pod_bundle = services.shims.pod_bundle(&pod.id);
    let files = PodFiles {
        hostname: Some(pod_bundle.hostname()),
        hosts: Some(pod_bundle.hosts()),
        resolv_conf: Some(pod_bundle.resolv_conf()),
        shm: (!pod.config.namespaces.host_ipc).then(|| pod_bundle.shm()),
    };
    let features = services.features.of(&pod.runtime);
    let input = spec::Input {
        pod: pod_ref,
        container_id: &record.id,
        container: &record.config,
        image: &image.defaults,
        image_name: &record.config.image,
        user: &user,
        namespaces,
        files: &files,
        node: &services.node,
        cgroup_driver: driver,
        features: &features,
        image_volumes: &image_volumes,
        pids_limit: services.config.runtime.pids_limit,
        host: &facts,
        seccomp_localhost: localhost.as_deref(),
    };
    let mut spec = spec::generate(&input).map_err(spec_error)?;
    extras::amend(services, pod, &record.config, &facts, &mut spec)?;
    foreign::apart(pod, &mut spec);
    // Ours, whatever the request says: criu would do what the file says, as root of the node.
    let criu_config = (options::CRIU_CONFIG.to_owned(), bundle.criu_config().display().to_string());
    spec.annotations_mut().get_or_insert_default().extend([criu_config]);
    if let Some(restore) = &restore {
        restore.fits(name, &spec)?;
        if let Some(shm) = &files.shm {
            restore.fill_shm(shm)?;
        }
    }
    Ok(Prepared { user, spec, mounted, made_dirs })
}

/// Its bundle: the spec, and the root file system in its place.
fn fill(
    record: &ContainerRecord,
    bundle: &Bundle,
    json: &[u8],
    mounted: Mounted,
    made_dirs: MadeDirs,
) -> Result<(), Error> {
    let rootfs = bundle.rootfs();
    private_dir(&rootfs).map_err(io_at("make", &rootfs))?;
    std::fs::write(bundle.config(), json).map_err(io_at("write", &bundle.config()))?;
    crash::point("daemon.create.spec-written");
    if let Some(dir) = record.log.parent().filter(|d| !d.as_os_str().is_empty()) {
        std::fs::create_dir_all(dir).map_err(io_at("make log directory", dir))?;
    }
    let image_error = |source| Error::Image { name: record.config.name.clone(), source };
    mounted.attach(&rootfs).map_err(image_error)?;
    crash::point("daemon.create.root-mounted");
    made_dirs.keep();
    Ok(())
}

/// Directories that were made on the node for a container; removed again if it is not made.
struct MadeDirs(Vec<PathBuf>);

impl MadeDirs {
    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for MadeDirs {
    fn drop(&mut self) {
        crate::node::remove_created(&self.0);
    }
}

/// Which namespaces the container joins.
fn namespaces(
    services: &Services,
    view: &PodView,
    record: &ContainerRecord,
) -> Result<NamespacePaths, Error> {
    let pod = &view.record.config.namespaces;
    let bundle = services.shims.pod_bundle(&view.record.id);
    let pid = match &record.config.security.pid {
        PidMode::Container => PidNamespace::New,
        PidMode::Node => PidNamespace::Host,
        PidMode::Pod if pod.pid == PidMode::Pod => {
            PidNamespace::Path(bundle.namespace(Namespace::Pid))
        }
        // The pod was made without one to share.
        PidMode::Pod => PidNamespace::New,
        PidMode::Target(target) => {
            let found = view.containers.values().find(|c| c.record.id.as_str() == target);
            let found = found.ok_or_else(|| Error::NoContainer(target.clone()))?;
            let pid = found.record.state.pid().ok_or_else(|| Error::Wrong {
                id: found.record.id.clone(),
                state: found.record.state.name(),
                what: "its PID namespace cannot be joined",
            })?;
            PidNamespace::Path(format!("/proc/{pid}/ns/pid").into())
        }
    };
    Ok(pinned(pod, &bundle, pid))
}

/// The pod's namespaces, as its shim has pinned them; of PIDs this one.
pub(super) fn pinned(pod: &PodNamespaces, bundle: &Bundle, pid: PidNamespace) -> NamespacePaths {
    let pinned = |host: bool, kind| (!host).then(|| bundle.namespace(kind));
    NamespacePaths {
        net: pinned(pod.host_network, Namespace::Net),
        ipc: pinned(pod.host_ipc, Namespace::Ipc),
        uts: pinned(pod.host_network, Namespace::Uts),
        user: pinned(pod.user.is_none(), Namespace::User),
        pid,
    }
}

/// The shim went while it was at it.
fn lost_shim(error: &Error) -> bool {
    match error {
        Error::Create { source, .. } | Error::Task { source, .. } => {
            source.kind() == ErrorKind::Closed
        }
        _ => false,
    }
}

/// Starts a created container.
pub(super) async fn start(
    services: Arc<Services>,
    pod: Pod,
    id: ContainerId,
) -> Result<Effect, Error> {
    let mut client = foreign::tasks(&services, &pod, &id).await?;
    let restored = restore::waits(&services, &id);
    nri::start(&services, &pod, &id).await?;
    // Taken before, so that it cannot be later than an exit the shim saw.
    let at = SystemTime::now();
    let pid = loop {
        let source = match client.start(id.as_str(), "").await {
            Ok(pid) => break pid,
            Err(source) => source,
        };
        if source.kind() == ErrorKind::Closed {
            client = pod.client_after(&client).await?;
            continue;
        }
        match runs(&client, &id).await {
            // A daemon that was killed, or a shim that died, had it started and could not say so.
            Some(pid) if source.kind() == ErrorKind::Precondition => break pid,
            _ if restored => return Err(restore::failed(&services, id, source)),
            _ => return Err(Error::Task { what: "start", id, source }),
        }
    };
    if restored && let Err(error) = restore::forget(&services, &id).await {
        warn!(container = id.short(), error = %chain(&error), "its checkpoint is left on disk");
    }
    crash::point("daemon.start.task-started");
    Ok(Effect::Started { id, at, pid })
}

/// Its pid, if it runs.
pub(super) async fn runs(client: &Client, id: &ContainerId) -> Option<u32> {
    let state = client.state(id.as_str(), "").await.ok()?;
    (state.status == TaskStatus::Running).then_some(state.pid)
}

/// The exit code of a container whose start was refused: as a shell has it for what the runtime
/// says, 128 if it says something else.
pub(super) fn start_failure_code(error: &Error) -> u8 {
    let text = chain(error);
    if text.contains("executable file not found") || text.contains("no such file or directory") {
        127
    } else if text.contains("permission denied") {
        126
    } else {
        128
    }
}

/// Stops a container: its stop signal, SIGKILL after `grace`. Runs outside the owner, so any number
/// may wait at once; the shortest grace wins.
pub(super) async fn stop(
    services: &Services,
    pod: Pod,
    id: ContainerId,
    grace: Duration,
) -> Result<(), Error> {
    let container = pod.container(&id)?;
    if container.record.state.is_exited() {
        return Ok(());
    }
    let client = match foreign::tasks(services, &pod, &id).await {
        Ok(client) => client,
        // A dead shim's containers were killed and recorded; look again.
        Err(error) => {
            let ended = pod.container(&id).is_ok_and(|c| c.record.state.is_exited());
            return if ended { Ok(()) } else { Err(error) };
        }
    };
    let created = matches!(container.record.state, ContainerState::Created { pid: None });
    if created && restore::waits(services, &id) {
        // It was to be restored: there is no process whose end anybody would tell.
        let how = Exit::NotStarted { code: 128, message: "stopped before it was restored".into() };
        let (taken, answer) = tokio::sync::oneshot::channel();
        let end = End::new(SystemTime::now(), how);
        let command = super::task::Command::Exited { id, end, taken };
        pod.commands.send(command).await.map_err(|_| Error::Closed)?;
        return answer.await.map_err(|_| Error::Closed);
    }
    let runs = matches!(container.record.state, ContainerState::Running { .. });
    if runs && !grace.is_zero() {
        // Asked once: to some programs a second SIGTERM means "at once".
        if !container.asked_to_stop.swap(true, Ordering::Relaxed) {
            insist(&pod, client.clone(), &id, container.record.stop_signal, false).await?;
            crash::point("daemon.stop.asked");
        }
        if ended(services, &pod, &id, grace).await? {
            return Ok(());
        }
    }
    insist(&pod, client, &id, libc::SIGKILL, true).await?;
    crash::point("daemon.stop.killed");
    match ended(services, &pod, &id, AFTER_KILL).await? {
        true => Ok(()),
        false => Err(Error::StillRuns { id, after: AFTER_KILL }),
    }
}

/// Signals a container, by the shim that there is when the first one goes.
async fn insist(
    pod: &Pod,
    mut client: Client,
    id: &ContainerId,
    signal: i32,
    all: bool,
) -> Result<(), Error> {
    loop {
        match client.kill(id.as_str(), "", signal as u32, all).await {
            Err(error) if error.kind() == ErrorKind::Closed => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(Error::Task { what: "signal", id: id.clone(), source }),
            Ok(()) => return Ok(()),
        }
        client = match pod.client_after(&client).await {
            Ok(client) => client,
            // What a shim leaves that cannot be replaced is killed.
            Err(Error::PodNotReady(_)) => return Ok(()),
            Err(error) => return Err(error),
        };
    }
}

/// Waits for the end of a container, by its view; asks the shim too, should an event be late.
async fn ended(
    services: &Services,
    pod: &Pod,
    id: &ContainerId,
    within: Duration,
) -> Result<bool, Error> {
    let mut view = pod.view.clone();
    let gone = view.wait_for(|view| {
        view.containers.get(id).is_none_or(|container| container.record.state.is_exited())
    });
    let told = async {
        if pod.view().record.foreign.is_some() {
            // Asked already, and for as long as it takes.
            std::future::pending::<()>().await;
        }
        loop {
            tokio::time::sleep(ASK).await;
            let Some(client) = pod.connected() else { continue };
            let state = client.state(id.as_str(), "").await;
            let stopped = match state {
                Ok(state) => state.exit.map(|exit| (exit.status, exit.at)),
                Err(_) => None,
            };
            if let Some((status, at)) = stopped {
                let record = services.shims.container_bundle(id).exit_record();
                let end = recover::how_ended(&record, Some((at, status)));
                let (taken, _) = tokio::sync::oneshot::channel();
                let command = super::task::Command::Exited { id: id.clone(), end, taken };
                let _ = pod.commands.send(command).await;
            }
        }
    };
    tokio::select! {
        // The view is what counts; the asking only feeds it.
        biased;
        _ = gone => Ok(true),
        () = tokio::time::sleep(within) => Ok(false),
        () = told => Ok(false),
    }
}

/// Frees what the runtime holds of an ended container: its task and its root's mount.
pub(super) async fn reap(
    services: Arc<Services>,
    pod: Pod,
    id: ContainerId,
) -> Result<Effect, Error> {
    free(&services, reached(&pod).await?.as_ref(), &id).await?;
    Ok(Effect::Done)
}

/// A pod, and its shim as far as we know.
pub(super) type Shim<'a> = (&'a Pod, Client);

/// The same, once the shim is reached: a container's end may be told before that, and the shim must not
/// keep what is taken away then. `None`: there is no shim.
async fn reached(pod: &Pod) -> Result<Option<Shim<'_>>, Error> {
    Ok(pod.shim().await?.map(|client| (pod, client)))
}

/// See [`reap`]. May be repeated.
pub(super) async fn free(
    services: &Services,
    shim: Option<&Shim<'_>>,
    id: &ContainerId,
) -> Result<(), Error> {
    let bundle = services.shims.container_bundle(id);
    let ended = services.shims.end_foreign(id.as_str(), &bundle).await;
    ended.map_err(|source| Error::Task { what: "delete", id: id.clone(), source })?;
    if let Some((pod, client)) = shim {
        let mut client = client.clone();
        loop {
            match client.delete(id.as_str(), "").await {
                Ok(_) => break,
                Err(e) if e.kind() == ErrorKind::NotFound => break,
                Err(e) if e.kind() == ErrorKind::Closed => {}
                Err(source) => return Err(Error::Task { what: "delete", id: id.clone(), source }),
            }
            // The next shim has what the dead one had.
            client = match pod.client_after(&client).await {
                Ok(client) => client,
                Err(Error::PodNotReady(_)) => break,
                Err(error) => return Err(error),
            };
        }
        crash::point("daemon.free.task-deleted");
    }
    let unmounted = tokio::task::spawn_blocking(move || {
        unmount(&bundle.rootfs())?;
        volumes::unmount_images(&bundle)
    });
    let unmounted = unmounted.await.unwrap_or(Err(Error::Panicked));
    crash::point("daemon.free.root-unmounted");
    unmounted
}

/// Removes a container, killing it first if it runs.
pub(super) async fn remove(
    services: Arc<Services>,
    pod: Pod,
    id: ContainerId,
) -> Result<Effect, Error> {
    let container = pod.container(&id)?;
    stop(&services, pod.clone(), id.clone(), Duration::ZERO).await?;
    nri::remove(&services, &pod, &id).await;
    take_away(&services, reached(&pod).await?.as_ref(), &container.record).await?;
    Ok(Effect::Removed(id))
}

/// Takes away all that a container is made of, whatever of it there is. May be repeated.
pub(super) async fn take_away(
    services: &Services,
    shim: Option<&Shim<'_>>,
    record: &ContainerRecord,
) -> Result<(), Error> {
    let id = &record.id;
    if let Some((pod, client)) = shim {
        // Half made or running: the shim kills it first.
        insist(pod, client.clone(), id, libc::SIGKILL, true).await.or_else(
            |error| match &error {
                Error::Task { source, .. } if source.kind() == ErrorKind::Precondition => Ok(()),
                _ => Err(error),
            },
        )?;
    }
    free(services, shim, id).await?;
    let image = services.images.remove_snapshot(id).await;
    image.map_err(|source| Error::Image { name: record.config.name.clone(), source })?;
    crash::point("daemon.remove.snapshot-gone");
    volumes::remove(services, id).await?;
    crash::point("daemon.remove.volumes-gone");
    restore::forget(services, id).await?;
    remove_dir(services.shims.container_bundle(id).dir()).await?;
    crash::point("daemon.remove.bundle-gone");
    Ok(())
}

/// Removes the cgroup of a container that was not made. crun leaves it when a limit is refused, and
/// then knows no container that could be deleted. With systemd its slice goes when it is empty.
async fn remove_cgroup(services: &Services, pod: &PodRecord, id: &ContainerId) {
    if services.config.runtime.cgroup_driver != CgroupDriver::Cgroupfs {
        return;
    }
    let path = spec::cgroups_path(&pod.config.cgroup_parent, &pod.id, id, CgroupDriver::Cgroupfs);
    let work = move || {
        let cgroup = Cgroup::at(&path)?;
        if cgroup.exists() {
            cgroup.kill()?;
            cgroup.remove()?;
        }
        Ok::<_, io::Error>(())
    };
    if let Ok(Err(error)) = tokio::task::spawn_blocking(work).await {
        warn!(container = id.short(), %error, "a cgroup is left");
    }
}

/// Takes away a container that a crash left half made.
pub(super) async fn discard(
    services: Arc<Services>,
    pod: Pod,
    record: ContainerRecord,
) -> Result<Effect, Error> {
    nri::undo_create(&services, &pod.view().record, &record).await;
    let undone = discard_once(&services, &pod, &record).await;
    if let Err(error) = undone {
        let record = record.clone();
        leftover::later("a container that a crash left", &error, move || {
            let (services, pod, record) = (services.clone(), pod.clone(), record.clone());
            async move {
                discard_once(&services, &pod, &record).await?;
                Ok(services.store.delete_container(&record.id).await?)
            }
        });
        return Err(error);
    }
    crash::point("daemon.discard.done");
    Ok(Effect::Removed(record.id))
}

async fn discard_once(
    services: &Services,
    pod: &Pod,
    record: &ContainerRecord,
) -> Result<(), Error> {
    // One that is only not reached may be at work on the container: it is tried again later.
    let client = pod.shim().await?;
    if client.is_none() {
        let bundle = services.shims.container_bundle(&record.id);
        if bundle.dir().exists() {
            let runtime = pod.view().record.runtime.clone();
            let deleted = services.shims.delete_dead(&record.id, &runtime).await;
            deleted.map_err(|source| Error::Task {
                what: "clean up after",
                id: record.id.clone(),
                source,
            })?;
        }
    }
    let of = pod.view().record.clone();
    if client.is_some() {
        forget(services, &of, client.as_ref(), &record.id).await?;
    }
    let shim = client.map(|client| (pod, client));
    take_away(services, shim.as_ref(), record).await?;
    remove_cgroup(services, &of, &record.id).await;
    Ok(())
}

/// Takes the CPU quota of a process's cgroup away, on version 1. Whether that was done.
async fn remove_quota(pid: Option<u32>) -> bool {
    let Some(pid) = pid else { return false };
    let work = move || {
        let cgroup = Cgroup::from_pid(pid).ok()?;
        let dir = cgroup.controller("cpu")?;
        std::fs::write(dir.join("cpu.cfs_quota_us"), "-1").ok()
    };
    tokio::task::spawn_blocking(work).await.is_ok_and(|done| done.is_some())
}

/// Changes a container's resources, in the kernel and in its record.
pub(super) async fn update(
    services: Arc<Services>,
    pod: Pod,
    record: ContainerRecord,
    change: Box<Limits>,
) -> Result<Effect, Error> {
    let id = record.id;
    let Limits { resources, more } = *change;
    let mut merged = record.config.resources.merged(resources);
    if !record.state.is_exited() {
        let client = foreign::tasks(&services, &pod, &id).await?;
        let linux = spec::update(&merged, &services.node)
            .map_err(|source| Error::Spec { name: record.config.name.clone(), source })?;
        let json = Limits::json(more.as_deref(), &linux);
        let mut updated = client.update(id.as_str(), json).await;
        // crun 1.8 cannot take a quota away on cgroup v1: it writes -1 as an unsigned number.
        if updated.is_err() && merged.cpu_quota == -1 && remove_quota(record.state.pid()).await {
            let rest = Resources { cpu_quota: 0, ..merged.clone() };
            let linux = spec::update(&rest, &services.node)
                .map_err(|source| Error::Spec { name: record.config.name.clone(), source })?;
            let json = Limits::json(more.as_deref(), &linux);
            updated = client.update(id.as_str(), json).await;
        }
        updated.map_err(|source| Error::Task { what: "update", id: id.clone(), source })?;
        crash::point("daemon.update.task-updated");
        if let Some(pid) = record.state.pid() {
            // It may end any time: then what was asked is all there is to say.
            let asked = merged.clone();
            let seen = tokio::task::spawn_blocking(move || match Cgroup::from_pid(pid) {
                Ok(cgroup) => readback::observed(asked, &cgroup),
                Err(_) => asked,
            });
            merged = seen.await.map_err(|_| Error::Panicked)?;
        }
    }
    Ok(Effect::Updated { id, resources: Box::new(merged) })
}

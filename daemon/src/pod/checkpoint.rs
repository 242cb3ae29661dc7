//! Checkpoints of running containers: all of them are paused, each is captured, all are resumed,
//! whatever happened; then what was captured is packed and gets its final name in one step.
//!
//! ```text
//! <root>/checkpoints/<n>/intent.json   whom it pauses, and what it writes where: before it does
//!                        <container>/  criu's images and logs, the changes of the root
//! <to's directory>/.<name>.<n>.partial the archive, until it is whole
//! ```
//! A daemon that is killed in between finds the intent at its next start: it resumes the containers
//! and takes the rest away.

use std::{
    collections::HashMap,
    fs, io,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use futures::FutureExt;
use holdfast_protos::shim::{
    oci::CheckpointOptions,
    protobuf::{Message as _, well_known_types::any::Any},
};
use holdfast_shim::client::{self, Client, ErrorKind};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    Error, Pod, PodView, Services, io_at, run::remove_dir, state::ContainerState, task::Effect,
};
use crate::{
    checkpoint::{
        archive::{self, BindMount, ConfigDump, Parts},
        criu,
    },
    error::chain,
    id::{ContainerId, PodId},
    image::diff::{self, Ids},
    shims::private_dir,
    store::pods::ContainerRecord,
};

/// How long a checkpoint may take if nobody says: all of a container's memory is written.
pub(super) const LIMIT: Duration = Duration::from_secs(600);

/// Attempts to resume a container, a second apart, before it is left to the next start.
const RESUMES: u32 = 30;

/// Version of the layout of a pod's checkpoint.
const POD_VERSION: u32 = 1;

/// Which containers of a pod a checkpoint names, by their names, and in which files they are.
pub(super) const POD_OPTIONS: &str = "pod.options";

/// The pod's configuration.
const POD_DUMP: &str = "pod.dump";

/// Where a checkpoint is written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Target {
    /// Of one container.
    Archive(PathBuf),
    /// Of a pod: an archive for each container, and [`POD_OPTIONS`].
    Directory(PathBuf),
}

impl Target {
    fn path(&self) -> &Path {
        match self {
            Target::Archive(path) | Target::Directory(path) => path,
        }
    }
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct What {
    /// Of one pod, sorted.
    pub(super) containers: Vec<ContainerId>,
    pub(super) to: Target,
}

/// The description of a pod's checkpoint (checkpointctl's `CheckpointedPodOptions`).
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct PodOptions {
    pub(super) version: u32,
    /// Container name to the name of its archive, without ".tar".
    pub(super) containers: HashMap<String, String>,
    pub(super) annotations: HashMap<String, String>,
}

/// What is written down before anything is paused.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Intent {
    pod: PodId,
    containers: Vec<ContainerId>,
    partial: PathBuf,
}

/// A checkpoint that an earlier daemon had under way.
#[derive(Debug)]
pub(super) struct BrokenOff {
    dir: PathBuf,
    intent: Option<Intent>,
}

impl BrokenOff {
    /// The pod whose containers may be paused.
    pub(super) fn pod(&self) -> Option<&PodId> {
        self.intent.as_ref().map(|intent| &intent.pod)
    }

    /// Takes away what it had written.
    pub(super) async fn remove(self) -> Result<(), Error> {
        if let Some(intent) = &self.intent {
            remove_partial(&intent.partial).await?;
        }
        remove_dir(&self.dir).await
    }
}

fn stages(services: &Services) -> PathBuf {
    services.config.root.join("checkpoints")
}

/// What earlier daemons had under way.
pub(super) fn broken_off(services: &Services) -> Vec<BrokenOff> {
    // Not there: nobody ever made a checkpoint.
    let Ok(entries) = fs::read_dir(stages(services)) else { return Vec::new() };
    let found = entries.flatten().map(|entry| {
        let dir = entry.path();
        // Without an intent it paused nobody.
        let intent = fs::read(dir.join("intent.json")).ok();
        let intent = intent.and_then(|json| serde_json::from_slice(&json).ok());
        BrokenOff { dir, intent }
    });
    found.collect()
}

/// Resumes what a checkpoint that was broken off had paused, then takes its files away.
pub(super) async fn mend(pod: Pod, broken: BrokenOff) -> Result<Effect, Error> {
    for id in broken.intent.iter().flat_map(|intent| &intent.containers) {
        loop {
            let alive = pod.container(id).is_ok_and(|c| !c.record.state.is_exited());
            // A pod that is down has nobody to resume.
            let (true, Ok(client)) = (alive, pod.client().await) else { break };
            match resume_once(&client, id).await {
                Ok(true) => {
                    info!(container = id.short(), "resumed: a checkpoint of it was broken off");
                    break;
                }
                Ok(false) => break,
                Err(error) => {
                    warn!(container = id.short(), error = %chain(&error), "it is not resumed yet");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }
    broken.remove().await?;
    Ok(Effect::Done)
}

/// Whether it was paused and runs now.
async fn resume_once(client: &Client, id: &ContainerId) -> Result<bool, client::Error> {
    match client.resume(id.as_str()).await {
        Ok(()) => Ok(true),
        // Not paused, ended, or gone.
        Err(e) if matches!(e.kind(), ErrorKind::Precondition | ErrorKind::NotFound) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Makes a checkpoint. Runs beside the owner; nothing of the pod changes.
pub(super) async fn write(
    services: Arc<Services>,
    pod: Pod,
    what: What,
    limit: Duration,
    stop: CancellationToken,
) -> Result<Effect, Error> {
    let deadline = Instant::now() + limit;
    let view = pod.view();
    let records = running(&view, &what.containers)?;
    let client = pod.client().await?;
    if view.record.foreign.is_some() {
        return Err(Error::ForeignCheckpoint { handler: view.record.handler.clone() });
    }
    check_target(&what.to)?;
    let runtime = &view.record.runtime;
    criu::check(runtime, &services.features.of(runtime), services.node.cgroup.mode).await?;

    let stage = Stage::begin(&services, &pod.id, &what).await?;
    let begun = std::time::Instant::now();
    let captured = capture(&services, &view, &client, &records, &stage, deadline, &stop).await;
    let paused = begun.elapsed();
    let written = match captured {
        Ok(()) => {
            let ended = ended_by(deadline, Arc::default());
            let (stage, to, view) = (stage.clone(), what.to.clone(), view.clone());
            // Looks at the node's volumes too: any of that may sleep in the kernel.
            let packed = tokio::task::spawn_blocking(move || {
                let parts = parts(&services, &view, &records, &stage)?;
                publish(&stage, &to, &view, &records, parts, &ended)
            });
            packed.await.unwrap_or(Err(Error::Panicked))
        }
        Err(error) => Err(error),
    };
    let cleaned = stage.end(&written).await;
    if written.is_ok() {
        info!(to = %what.to.path().display(), ?paused, "checkpoint is written");
    }
    written.and(cleaned)?;
    Ok(Effect::Done)
}

/// The records of containers that must run.
fn running(view: &PodView, ids: &[ContainerId]) -> Result<Vec<ContainerRecord>, Error> {
    let find = |id: &ContainerId| {
        let found = view.containers.get(id).ok_or_else(|| Error::NoContainer(id.to_string()))?;
        match &found.record.state {
            ContainerState::Running { .. } => Ok(found.record.clone()),
            state => Err(Error::Wrong {
                id: id.clone(),
                state: state.name(),
                what: "only one that runs can be checkpointed",
            }),
        }
    };
    ids.iter().map(find).collect()
}

/// Whether something can be written there.
fn check_target(to: &Target) -> Result<(), Error> {
    let path = to.path();
    let wrong = |reason: &'static str| Err(Error::Target { path: path.to_owned(), reason });
    if !path.is_absolute() {
        return wrong("an absolute path is needed");
    }
    let (Some(parent), Some(_)) = (path.parent(), path.file_name()) else {
        return wrong("it names no file");
    };
    if !parent.is_dir() {
        return wrong("its directory does not exist: make it first");
    }
    match (to, fs::symlink_metadata(path)) {
        (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        (_, Err(error)) => Err(io_at("look at", path)(error)),
        (Target::Archive(_), Ok(there)) if there.is_file() => Ok(()),
        (Target::Archive(_), Ok(_)) => wrong("there is something else than a file"),
        (Target::Directory(_), Ok(there)) if !there.is_dir() => wrong("there is a file"),
        (Target::Directory(_), Ok(_)) => {
            let mut entries = fs::read_dir(path).map_err(io_at("read", path))?;
            match entries.next() {
                None => Ok(()),
                Some(_) => wrong("the directory is not empty: give another, or empty it"),
            }
        }
    }
}

/// What ends work that blocks: the deadline, or a flag.
fn ended_by(
    deadline: Instant,
    flag: Arc<AtomicBool>,
) -> impl Fn() -> io::Result<()> + Send + 'static {
    move || match flag.load(Ordering::Relaxed) || Instant::now() >= deadline {
        true => Err(io::Error::new(io::ErrorKind::TimedOut, "the checkpoint took too long")),
        false => Ok(()),
    }
}

/// The places of a checkpoint under way.
#[derive(Clone)]
struct Stage {
    dir: PathBuf,
    partial: PathBuf,
}

impl Stage {
    /// Makes the directory, with the intent in it, on disk.
    async fn begin(services: &Services, pod: &PodId, what: &What) -> Result<Self, Error> {
        let number = ContainerId::random();
        let stages = stages(services);
        let to = what.to.path();
        let name = to.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let partial = to.with_file_name(format!(".{name}.{}.partial", number.short()));
        let dir = stages.join(number.as_str());
        let stage = Self { dir: dir.clone(), partial: partial.clone() };
        let intent = Intent { pod: pod.clone(), containers: what.containers.clone(), partial };
        tokio::task::spawn_blocking(move || {
            private_dir(&dir).map_err(io_at("make", &dir))?;
            let json = serde_json::to_vec(&intent).expect("plain data has a JSON form");
            let path = dir.join("intent.json");
            let written = fs::write(&path, json).and_then(|()| sync(&path)).and_then(|()| {
                sync(&dir)?;
                sync(&stages)
            });
            if written.is_err() {
                let _ = fs::remove_dir_all(&dir);
            }
            written.map_err(io_at("write", &path))
        })
        .await
        .unwrap_or(Err(Error::Panicked))?;
        Ok(stage)
    }

    fn container(&self, id: &ContainerId) -> PathBuf {
        self.dir.join(id)
    }

    /// Takes away what is not needed any more. While a container may still be paused the intent stays.
    async fn end(&self, result: &Result<(), Error>) -> Result<(), Error> {
        remove_partial(&self.partial).await?;
        if matches!(result, Err(Error::Frozen { .. })) {
            return Ok(());
        }
        remove_dir(&self.dir).await
    }
}

fn sync(path: &Path) -> io::Result<()> {
    fs::File::open(path)?.sync_all()
}

/// A file or a directory.
async fn remove_partial(path: &Path) -> Result<(), Error> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || {
        match fs::symlink_metadata(&path) {
            Ok(there) if there.is_dir() => fs::remove_dir_all(&path),
            Ok(_) => fs::remove_file(&path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
        .map_err(io_at("remove", &path))
    })
    .await
    .unwrap_or(Err(Error::Panicked))
}

/// Pauses all, captures each, resumes all.
async fn capture(
    services: &Arc<Services>,
    view: &Arc<PodView>,
    client: &Client,
    records: &[ContainerRecord],
    stage: &Stage,
    deadline: Instant,
    stop: &CancellationToken,
) -> Result<(), Error> {
    let flag = Arc::new(AtomicBool::new(false));
    let work = async {
        let pauses = records.iter().map(|record| async {
            let paused = client.pause(record.id.as_str()).await;
            let id = record.id.clone();
            paused.map_err(|source| Error::Task { what: "pause", id, source })
        });
        futures::future::join_all(pauses).await.into_iter().collect::<Result<(), Error>>()?;
        let captures = records
            .iter()
            .map(|record| capture_one(services, view, client, record, stage, deadline, &flag));
        futures::future::join_all(captures).await.into_iter().collect::<Result<(), Error>>()
    };
    let captured = tokio::select! {
        // What has ended counts, at the deadline too.
        biased;
        done = AssertUnwindSafe(work).catch_unwind() => done.unwrap_or(Err(Error::Panicked)),
        () = stop.cancelled() => Err(Error::Closed),
        () = tokio::time::sleep_until(deadline) => Err(Error::Late),
    };
    flag.store(true, Ordering::Relaxed);
    // Whoever was not paused is not harmed; whoever may have been must run again.
    let resumes = records.iter().map(|record| resume(client, &record.id));
    let resumed: Result<(), Error> = futures::future::join_all(resumes).await.into_iter().collect();
    if let (Err(first), Err(_)) = (&captured, &resumed) {
        warn!(error = %chain(first), "the checkpoint had failed before");
    }
    resumed.and(captured)
}

async fn resume(client: &Client, id: &ContainerId) -> Result<(), Error> {
    let mut attempt = 1;
    loop {
        match resume_once(client, id).await {
            Ok(_) => return Ok(()),
            // Its shim died, and it with it.
            Err(error) if error.kind() == ErrorKind::Closed => return Ok(()),
            Err(source) if attempt == RESUMES => {
                return Err(Error::Frozen { id: id.clone(), source });
            }
            Err(error) => {
                warn!(container = id.short(), error = %chain(&error), "it is not resumed yet");
                tokio::time::sleep(Duration::from_secs(1)).await;
                attempt += 1;
            }
        }
    }
}

/// Everything of a container that changes while it runs.
async fn capture_one(
    services: &Arc<Services>,
    view: &Arc<PodView>,
    client: &Client,
    record: &ContainerRecord,
    stage: &Stage,
    deadline: Instant,
    flag: &Arc<AtomicBool>,
) -> Result<(), Error> {
    let id = &record.id;
    let dir = stage.container(id);
    let (images, work) = (dir.join(archive::IMAGES), dir.join("work"));
    for path in [&dir, &images, &work] {
        private_dir(path).map_err(io_at("make", path))?;
    }
    let options = CheckpointOptions {
        work_path: work.display().to_string(),
        // Its terminal's other end is not in the container.
        terminal: record.config.tty,
        ..Default::default()
    };
    let options = Any {
        type_url: "containerd.runc.v1.CheckpointOptions".into(),
        value: options.write_to_bytes().expect("a message without required fields"),
        ..Default::default()
    };
    let patient = client.clone().with_deadline(deadline - Instant::now());
    patient.checkpoint(id.as_str(), &images, Some(options)).await.map_err(|source| {
        let criu = criu::said_in(&work.join(archive::DUMP_LOG));
        Error::Checkpoint { id: id.clone(), criu, source }
    })?;
    let snapshot =
        services.images.snapshot(id).ok_or_else(|| Error::NoContainer(id.to_string()))?;
    let user = view.record.config.namespaces.user.clone().unwrap_or_default();
    let ids = Ids { uids: user.uids, gids: user.gids };
    let shm = services.shims.pod_bundle(&view.record.id).shm();
    let shm = (!view.record.config.namespaces.host_ipc).then_some(shm);
    let go_on = ended_by(deadline, flag.clone());
    tokio::task::spawn_blocking(move || {
        let new = |name: &str| {
            let path = dir.join(name);
            let file = fs::File::create_new(&path).map_err(io_at("make", &path));
            file.map(|file| (io::BufWriter::new(file), path))
        };
        let (file, path) = new(archive::ROOTFS_DIFF)?;
        let deleted = snapshot.write_changes(file, &ids, &go_on).map_err(io_at("write", &path))?;
        if !deleted.is_empty() {
            let (file, path) = new(archive::DELETED)?;
            serde_json::to_writer(file, &deleted).map_err(|e| io_at("write", &path)(e.into()))?;
        }
        let shm = shm.filter(|shm| fs::read_dir(shm).is_ok_and(|mut all| all.next().is_some()));
        if let Some(shm) = shm {
            let (file, path) = new(archive::SHM)?;
            diff::write_tree(&shm, file, &ids, &go_on).map_err(io_at("write", &path))?;
        }
        Ok(())
    })
    .await
    .unwrap_or(Err(Error::Panicked))
}

/// What goes into each container's archive.
fn parts(
    services: &Services,
    view: &PodView,
    records: &[ContainerRecord],
    stage: &Stage,
) -> Result<Vec<Parts>, Error> {
    let now = archive::rfc3339(SystemTime::now());
    let one = |record: &ContainerRecord| {
        let dir = stage.container(&record.id);
        let bundle = services.shims.container_bundle(&record.id);
        let spec = fs::read(bundle.config()).map_err(io_at("read", &bundle.config()))?;
        let config = ConfigDump {
            id: record.id.to_string(),
            name: record.config.name.clone(),
            rootfs_image: record.config.asked_image().to_owned(),
            rootfs_image_ref: record.image_id.clone(),
            rootfs_image_name: pullable(record),
            runtime: view.record.runtime.file_name().unwrap_or_default().to_string_lossy().into(),
            created_time: archive::rfc3339(record.created_at),
            checkpointed_time: now.clone(),
            restored_time: archive::NEVER.into(),
            restored: false,
        };
        let json = |value| serde_json::to_vec_pretty(&value).expect("plain data has a JSON form");
        let mut descriptions = vec![
            (archive::CONFIG, json(serde_json::to_value(config).expect("plain data"))),
            (archive::SPEC, spec),
            (archive::STATUS, json(status(record))),
            (archive::BIND_MOUNTS, json(json!(bind_mounts(record)))),
        ];
        if let Ok(deleted) = fs::read(dir.join(archive::DELETED)) {
            descriptions.push((archive::DELETED, deleted));
        }
        let log = (!record.log.as_os_str().is_empty()).then(|| record.log.clone());
        Ok(Parts { descriptions, work: dir.join("work"), dir, log })
    };
    records.iter().map(one).collect()
}

/// A name that another node can pull the image by.
fn pullable(record: &ContainerRecord) -> String {
    let by_digest = record.image_ref.contains('@');
    if by_digest { &record.image_ref } else { record.config.asked_image() }.to_owned()
}

/// The CRI's ContainerStatus as Go's JSON has it, for those who look into archives.
fn status(record: &ContainerRecord) -> serde_json::Value {
    let nanos = |at: SystemTime| {
        at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_nanos())
    };
    let started = match &record.state {
        ContainerState::Running { started_at, .. } => nanos(*started_at),
        _ => 0,
    };
    json!({
        "id": record.id,
        "metadata": { "name": record.config.name, "attempt": record.config.attempt },
        // CONTAINER_RUNNING
        "state": 1,
        "created_at": nanos(record.created_at) as u64,
        "started_at": started as u64,
        "image": {
            "image": record.config.image,
            "user_specified_image": record.config.user_specified_image,
        },
        "image_ref": record.image_ref,
        "image_id": record.image_id,
        "labels": record.config.labels,
        "annotations": record.config.annotations,
        "log_path": record.log,
    })
}

/// What the container has of the node.
fn bind_mounts(record: &ContainerRecord) -> Vec<BindMount> {
    use std::os::unix::fs::MetadataExt;
    let mounts = record.config.mounts.iter().filter(|mount| mount.image.is_none());
    let look = |mount: &super::config::Mount| {
        let there = fs::metadata(&mount.host_path).ok()?;
        Some(BindMount {
            source: mount.host_path.clone(),
            destination: mount.container_path.clone(),
            file_type: if there.is_dir() { "directory" } else { "file" }.into(),
            permissions: there.mode() & 0o7777,
        })
    };
    mounts.filter_map(look).collect()
}

/// Packs the archives and gives them their name. Blocks.
fn publish(
    stage: &Stage,
    to: &Target,
    view: &PodView,
    records: &[ContainerRecord],
    parts: Vec<Parts>,
    go_on: &dyn Fn() -> io::Result<()>,
) -> Result<(), Error> {
    let partial = &stage.partial;
    let path = to.path();
    match to {
        Target::Archive(_) => {
            for parts in &parts {
                archive::pack(partial, parts, go_on)?;
            }
        }
        Target::Directory(_) => {
            private_dir(partial).map_err(io_at("make", partial))?;
            for (record, parts) in records.iter().zip(&parts) {
                archive::pack(&partial.join(format!("{}.tar", record.id)), parts, go_on)?;
            }
            let config = &view.record.config;
            let annotation =
                |key: &str, value: &str| (format!("org.criu.checkpoint.{key}"), value.to_owned());
            let options = PodOptions {
                version: POD_VERSION,
                containers: records
                    .iter()
                    .map(|record| (record.config.name.clone(), record.id.to_string()))
                    .collect(),
                annotations: HashMap::from([
                    annotation("engine.name", "holdfast"),
                    annotation("engine.version", env!("CARGO_PKG_VERSION")),
                    annotation("pod.name", &config.name),
                    annotation("pod.namespace", &config.namespace),
                    annotation("pod.uid", &config.uid),
                    annotation("pod.id", view.record.id.as_str()),
                ]),
            };
            for (name, json) in [
                (POD_DUMP, serde_json::to_vec_pretty(config)),
                (POD_OPTIONS, serde_json::to_vec_pretty(&options)),
            ] {
                let path = partial.join(name);
                let json = json.expect("plain data has a JSON form");
                fs::write(&path, json).and_then(|()| sync(&path)).map_err(io_at("write", &path))?;
            }
            sync(partial).map_err(io_at("sync", partial))?;
        }
    }
    fs::rename(partial, path).map_err(io_at("give the checkpoint its name", path))?;
    let parent = path.parent().unwrap_or(Path::new("/"));
    sync(parent).map_err(io_at("sync", parent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_new_or_one_that_may_be_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "").unwrap();
        fs::create_dir_all(at("full/inside")).unwrap();
        fs::create_dir(at("empty")).unwrap();
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        let archive = |name: &str| check_target(&Target::Archive(at(name)));
        let directory = |name: &str| check_target(&Target::Directory(at(name)));
        archive("new").unwrap();
        archive("file").unwrap();
        directory("new").unwrap();
        directory("empty").unwrap();
        for (result, says) in [
            (archive("empty"), "something else than a file"),
            // The rename would replace the link, which nobody means.
            (archive("link"), "something else than a file"),
            (archive("no/such"), "make it first"),
            (archive("file/below"), "make it first"),
            (directory("full"), "not empty"),
            (directory("file"), "there is a file"),
            (check_target(&Target::Archive("relative".into())), "absolute"),
            (check_target(&Target::Archive("/".into())), "names no file"),
        ] {
            let error = result.unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn work_that_blocks_ends_at_the_deadline_or_by_the_flag() {
        let flag = Arc::new(AtomicBool::new(false));
        let go_on = ended_by(Instant::now() + Duration::from_secs(600), flag.clone());
        go_on().unwrap();
        flag.store(true, Ordering::Relaxed);
        assert_eq!(go_on().unwrap_err().kind(), io::ErrorKind::TimedOut);
        let late = ended_by(Instant::now(), Arc::default());
        assert_eq!(late().unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}

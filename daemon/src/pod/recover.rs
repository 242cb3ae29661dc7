//! After a start of the daemon: records become pods again, shims are reached again, and what no
//! record names is taken away.
//!
//! Records say what should be, shims what is. A shim that does not answer is asked again for as
//! long as it takes; only proof of its death ends its containers' records.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use holdfast_shim::{
    bundle::ExitRecord,
    client::{Client, Endpoint, ErrorKind, TaskStatus},
    control::Control,
    crash,
};
use tokio::time::Instant;
use tracing::{Instrument as _, error, info, warn};

use super::{
    Error, Pods, Services,
    run::{remove_dir, unmount},
    state::{ContainerState, Exit, PodState},
    task::{Command, Effect},
};
use crate::{
    error::chain,
    id::{ContainerId, PodId},
    shims::Link,
    store::pods::{ContainerRecord, Loaded, PodRecord, Unread},
};

/// How long a shim may take to say who it is.
const HELLO: Duration = Duration::from_secs(10);

/// How often a new shim is started in place of a dead one before its pod is given up, and how long to
/// wait in between.
const REVIVALS: u32 = 3;
const REVIVAL: Duration = Duration::from_secs(1);

/// First and last pause between attempts to reach a shim.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(5));

/// An exit that was found out, rather than told.
pub(super) struct Seen {
    pub(super) id: ContainerId,
    pub(super) at: SystemTime,
    pub(super) how: Exit,
}

impl super::Index {
    /// Whether there is such a container, or something that is to be left alone.
    fn has(&self, id: &str) -> bool {
        self.containers.contains_key(id) || self.unread.contains_key(id)
    }
}

impl Pods {
    /// Makes a pod of every record. Returns at once with everything listed; each pod reaches its
    /// shim beside it.
    pub async fn recover(&self) -> Result<(), Error> {
        // FIFOs of execs that nobody waits for any more.
        remove_dir(&self.services.config.state.join("exec")).await?;
        self.set_broken_off(super::checkpoint::broken_off(&self.services));
        let Loaded { pods, containers, unread } = self.services.store.load_all().await?;
        crash::point("daemon.recover.records-read");
        let mut by_pod: BTreeMap<PodId, Vec<ContainerRecord>> = BTreeMap::new();
        for container in containers {
            by_pod.entry(container.pod.clone()).or_default().push(container);
        }
        let count = pods.len();
        {
            let mut index = self.index_mut();
            for record in unread {
                error!(
                    id = record.id,
                    error = record.error,
                    "a record cannot be read, perhaps a later release wrote it: what it is of is left alone"
                );
                index.unread.insert(record.id.clone(), record);
            }
            for record in pods {
                let containers = by_pod.remove(&record.id).unwrap_or_default();
                let link = match record.state {
                    PodState::Ready => Link::Pending,
                    // Down marks a `Starting` pod as one that a crash left.
                    PodState::Starting | PodState::NotReady => Link::Down,
                };
                self.adopt(&mut index, record, containers, link);
            }
        }
        // Of pods that cannot be read, and with them to be left alone.
        let mut index = self.index_mut();
        for record in by_pod.into_values().flatten() {
            if index.unread.contains_key(record.pod.as_str()) {
                let (id, pod) = (record.id.to_string(), Some(record.pod.to_string()));
                let error = "the record of its pod cannot be read".to_owned();
                index.unread.insert(id.clone(), Unread { id, pod, error });
            }
        }
        drop(index);
        info!(pods = count, "records are read");
        Ok(())
    }

    /// Takes away what no record names: bundles, shims, mounts, snapshots, attachments. Slow, so it
    /// runs beside serving.
    pub async fn sweep(&self) {
        if let Err(error) = self.sweep_bundles().await {
            warn!(error = %chain(&error), "not all leftovers could be looked for");
        }
        for id in self.services.images.snapshots() {
            if !self.index().has(id.as_str()) {
                info!(container = id.short(), "removing a snapshot that no container has");
                if let Err(error) = self.services.images.remove_snapshot(&id).await {
                    warn!(container = id.short(), error = %chain(&error), "it stays");
                }
            }
        }
        let known = |id: &ContainerId| self.index().has(id.as_str());
        super::volumes::sweep(&self.services, known).await;
        super::restore::sweep(&self.services, known).await;
        self.sweep_checkpoints().await;
        let valid: Vec<PodId> = {
            let index = self.index();
            let unread = index.unread.keys().filter_map(|id| id.parse().ok());
            index.pods.keys().cloned().chain(unread).collect()
        };
        if let Err(error) = self.services.network.gc(&valid).await {
            warn!(error = %chain(&error), "network leftovers stay until the next start");
        }
    }

    /// What checkpoints that were broken off left, where there is nobody to resume: the owners of
    /// pods that are up see to theirs.
    async fn sweep_checkpoints(&self) {
        let down = |pod: Option<&PodId>| {
            let pod = pod.and_then(|pod| self.find(pod.as_str()).ok());
            pod.is_none_or(|pod| pod.view().record.state != PodState::Ready)
        };
        for broken in self.take_broken_off(|broken| down(broken.pod())) {
            if let Err(error) = broken.remove().await {
                warn!(error = %chain(&error), "what a broken off checkpoint left stays");
            }
        }
    }

    async fn sweep_bundles(&self) -> Result<(), Error> {
        let bundles = self.services.shims.bundles().to_owned();
        let mut stray = BTreeSet::new();
        let read = |e: io::Error| Error::Io { what: "read", path: bundles.clone(), source: e };
        for entry in fs::read_dir(&bundles).map_err(read)? {
            let name = entry.map_err(read)?.file_name();
            let Some(name) = name.to_str() else { continue };
            let index = self.index();
            let known = index.pods.contains_key(name) || index.has(name);
            if !known && name.parse::<ContainerId>().is_ok() {
                stray.insert(name.to_owned());
            }
        }
        for name in stray {
            info!(id = name, "removing a bundle that no record names");
            if let Err(error) = self.sweep_bundle(&name).await {
                warn!(id = name, error = %chain(&error), "it stays until the next start");
            }
        }
        Ok(())
    }

    async fn sweep_bundle(&self, name: &str) -> Result<(), Error> {
        let Ok(id) = name.parse::<ContainerId>() else { return Ok(()) };
        let Ok(pod) = name.parse::<PodId>() else { return Ok(()) };
        let bundle = self.services.shims.container_bundle(&id);
        if bundle.config().exists() {
            // A container: its runtime is not known any more, the default one is as good as any.
            let runtime =
                self.handler("").map_or("runc".into(), |handler| handler.runtime().to_owned());
            let deleted = self.services.shims.delete_dead(&id, &runtime).await;
            deleted.map_err(|source| Error::Task {
                what: "clean up after",
                id: id.clone(),
                source,
            })?;
        } else {
            let deleted = self.services.shims.delete_dead_pod(&pod).await;
            deleted.map_err(|source| Error::Shim {
                what: "clean up after the shim",
                id: pod,
                source,
            })?;
        }
        let at = bundle.clone();
        let unmounted = tokio::task::spawn_blocking(move || {
            unmount(&at.rootfs())?;
            super::volumes::unmount_images(&at)?;
            unmount(&at.shm())
        });
        unmounted.await.unwrap_or(Err(Error::Panicked))?;
        crash::point("daemon.sweep.unmounted");
        remove_dir(bundle.dir()).await?;
        crash::point("daemon.sweep.bundle-gone");
        Ok(())
    }

    /// Takes it that the kernel killed a process of a container for want of memory.
    pub fn oom(&self, container: &str) {
        if let Ok(id) = container.parse::<ContainerId>() {
            super::foreign::note_oom(&self.services, &id);
        }
    }

    /// Takes an exit that a shim tells. True: it is recorded, or nobody's; false: tell it again.
    pub async fn exited(&self, container: &str, at: SystemTime, status: u32) -> bool {
        let (Some(pod), Ok(id)) = (self.pod_of(container), container.parse::<ContainerId>()) else {
            return true;
        };
        // Those of a foreign shim are waited for: it may drop its events.
        if pod.view().record.foreign.is_some() {
            return true;
        }
        let record = self.services.shims.container_bundle(&id).exit_record();
        let (at, how) = how_ended(&record, Some((at, status)));
        let (taken, answer) = tokio::sync::oneshot::channel();
        let command = Command::Exited { id, at, how, taken };
        pod.commands.send(command).await.is_ok() && answer.await.is_ok()
    }
}

fn recorded(path: &Path) -> Option<ExitRecord> {
    match ExitRecord::load(path) {
        Ok(record) => record,
        Err(error) => {
            warn!(path = %path.display(), %error, "an exit record cannot be read");
            None
        }
    }
}

/// When and how a container ended: by its record, which alone knows of the OOM killer, else by what
/// its shim says, else nobody knows.
pub(super) fn how_ended(record: &Path, told: Option<(SystemTime, u32)>) -> (SystemTime, Exit) {
    match (recorded(record), told) {
        (Some(record), _) => (record.at, exit_of(&record)),
        (None, Some((at, status))) => (at, Exit::from_status(status, false)),
        (None, None) => (SystemTime::now(), Exit::Lost),
    }
}

fn exit_of(record: &ExitRecord) -> Exit {
    if record.lost {
        return Exit::Lost;
    }
    Exit::from_status(record.wire_status(), record.oom_killed)
}

/// Reaches a pod's shim, for as long as it takes, and finds out what happened meanwhile.
pub(super) async fn reach(
    services: Arc<Services>,
    record: Arc<PodRecord>,
    live: Vec<ContainerRecord>,
) -> Result<Effect, Error> {
    if !crate::boot::is_now(&record.boot) {
        return Ok(after_boot(&services, &record, &live));
    }
    let mut pause = PAUSES.0;
    while let Some(endpoint) = &record.endpoint {
        match services.shims.connect(endpoint).await {
            Ok(client) => match found(&services, &record, client, &live).await {
                Ok(effect) => return Ok(effect),
                Err(error) => warn!(error = %chain(&error), "the shim did not say all"),
            },
            Err(error) if is_dead(&services, &record.id) => {
                info!(error = %chain(&error), "the shim is gone");
                match revive(&services, &record, &live).await {
                    Some(effect) => return Ok(effect),
                    None => break,
                }
            }
            // It may only be slow: stopped, or short of CPU.
            Err(error) => warn!(error = %chain(&error), "the shim does not answer, trying again"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
    let exits = bury(&services, &record, &live).await;
    Ok(Effect::Dead { exits })
}

/// What became of a pod of an earlier boot: all of it is gone. How its containers ended is known where their
/// exit records are on a disk, or were taken before; of the others only that it was not after the boot.
fn after_boot(services: &Services, record: &PodRecord, live: &[ContainerRecord]) -> Effect {
    info!("the machine was started again since the pod was made: it is gone");
    let at = crate::boot::time().unwrap_or_else(SystemTime::now);
    let mut exits = Vec::new();
    for container in live.iter().filter(|c| !c.state.is_exited()) {
        let id = &container.id;
        let (at, how) = match recorded(&services.shims.container_bundle(id).exit_record()) {
            Some(record) => (record.at, exit_of(&record)),
            None => (at, Exit::Lost),
        };
        exits.push(Seen { id: id.clone(), at, how });
    }
    // Its address is nobody's any more. Should this fail, stopping the pod does it. Nobody waits for it: the
    // pod is gone now.
    let (network, id) = (services.network.clone(), record.id.clone());
    let detach = async move {
        if let Err(error) = network.detach(&id).await {
            warn!(error = %chain(&error), "the network attachment of a pod of an earlier boot stays for now");
        }
    };
    tokio::spawn(detach.in_current_span());
    Effect::Rebooted { exits }
}

/// A shim that runs: either the pod's, or one that was started in place of a dead one by a daemon that
/// was killed before it could say what to take over.
async fn found(
    services: &Arc<Services>,
    record: &PodRecord,
    client: Client,
    live: &[ContainerRecord],
) -> Result<Effect, holdfast_shim::client::Error> {
    let control = Control::new(&services.shims.pod_bundle(&record.id));
    let orphaned = match control.hello(HELLO).await {
        Ok(hello) => hello.orphaned,
        // A shim without a control socket cannot be an orphan of ours.
        Err(error) if error.kind() == ErrorKind::Closed => false,
        Err(error) => return Err(error),
    };
    if orphaned {
        return revived(services, record, live).await;
    }
    let Missed { started, exits } = look(services, &client, live, None).await?;
    crash::point("daemon.recover.shim-reached");
    Ok(Effect::Linked { client, endpoint: None, started, exits })
}

/// A new shim in place of one that is dead, and what happened meanwhile.
async fn revived(
    services: &Arc<Services>,
    record: &PodRecord,
    live: &[ContainerRecord],
) -> Result<Effect, holdfast_shim::client::Error> {
    let (endpoint, client) = services.shims.revive(&record.id).await?;
    let Missed { started, exits } = look(services, &client, live, Some(record)).await?;
    Ok(Effect::Linked { client, endpoint: Some(endpoint), started, exits })
}

/// Starts a new shim in place of one that is dead, a few times. `None`: the pod cannot be saved.
async fn revive(
    services: &Arc<Services>,
    record: &PodRecord,
    live: &[ContainerRecord],
) -> Option<Effect> {
    let bundle = services.shims.pod_bundle(&record.id);
    if !bundle.shim_state().exists() {
        // After a boot, or a shim from before there was one.
        return None;
    }
    for attempt in 1..=REVIVALS {
        let begun = Instant::now();
        match revived(services, record, live).await {
            Ok(effect) => {
                warn!(took = ?begun.elapsed(), "the pod's shim had died; a new one has taken over");
                return Some(effect);
            }
            Err(error) => {
                warn!(attempt, error = %chain(&error), "a new shim could not take the pod over");
            }
        }
        if attempt < REVIVALS {
            tokio::time::sleep(REVIVAL).await;
        }
    }
    // One that runs, and has taken nothing over, is not to stand in the way of what comes now.
    let address = fs::read_to_string(bundle.address()).unwrap_or_default();
    let endpoint = Endpoint { address: address.trim().to_owned(), version: 3 };
    if let Ok(client) = services.shims.connect(&endpoint).await {
        let _ = client.shutdown(record.id.as_str(), true).await;
    }
    None
}

/// What happened while nobody listened.
#[derive(Default)]
struct Missed {
    /// Running, and on record as created: the daemon that had them started was killed before it knew.
    started: Vec<(ContainerId, u32)>,
    exits: Vec<Seen>,
}

/// What the shim knows of each container that we do not. A shim that has taken over, and does not know
/// one, leaves it to us.
async fn look(
    services: &Services,
    client: &Client,
    live: &[ContainerRecord],
    revived: Option<&PodRecord>,
) -> Result<Missed, holdfast_shim::client::Error> {
    let mut missed = Missed::default();
    for container in live.iter().filter(|c| !c.state.is_exited()) {
        let id = &container.id;
        if services.shims.is_foreign(id) {
            // Its end is waited for apart.
            let created = matches!(container.state, ContainerState::Created { .. });
            let pid = container.state.pid().unwrap_or_default();
            if created && super::foreign::was_started(services, id).await {
                missed.started.push((id.clone(), pid));
            }
            continue;
        }
        let exited = match client.state(id.as_str(), "").await {
            Ok(state) if state.status == TaskStatus::Stopped => state.exit,
            Ok(state) => {
                let created = matches!(container.state, ContainerState::Created { .. });
                if created && state.status == TaskStatus::Running {
                    missed.started.push((id.clone(), state.pid));
                }
                continue;
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                if let Some(pod) = revived {
                    // It runs, perhaps, and has no shim any more.
                    services.shims.delete_dead(id, &pod.runtime).await?;
                }
                None
            }
            Err(error) => return Err(error),
        };
        let record = services.shims.container_bundle(id).exit_record();
        let (at, how) = how_ended(&record, exited.map(|exited| (exited.at, exited.status)));
        missed.exits.push(Seen { id: id.clone(), at, how });
    }
    Ok(missed)
}

/// Proof that a pod's shim is dead: the process of its pid file is gone, or is somebody else.
fn is_dead(services: &Services, id: &PodId) -> bool {
    let path = services.shims.pod_bundle(id).shim_pid();
    let Ok(pid) = fs::read_to_string(path) else {
        // Never written, or a boot has emptied the state directory: no shim can be.
        return true;
    };
    let cmdline = fs::read(format!("/proc/{}/cmdline", pid.trim())).unwrap_or_default();
    let zombie = cmdline.is_empty();
    zombie || !String::from_utf8_lossy(&cmdline).contains(id.as_str())
}

/// Ends what a dead shim left running, and finds out how each container ended.
async fn bury(services: &Services, record: &PodRecord, live: &[ContainerRecord]) -> Vec<Seen> {
    let mut exits = Vec::new();
    for container in live.iter().filter(|c| !c.state.is_exited()) {
        let id = &container.id;
        let path = services.shims.container_bundle(id).exit_record();
        let before = Before::look(container, &path);
        // Not after a boot, which has emptied the state directory.
        if services.shims.container_bundle(id).dir().exists()
            && let Err(error) = services.shims.delete_dead(id, &record.runtime).await
        {
            warn!(container = id.short(), error = %chain(&error), "clean up after a dead shim");
        }
        crash::point("daemon.bury.cleaned-up");
        let (at, how) = before.verdict(Some(&path));
        exits.push(Seen { id: id.clone(), at, how });
    }
    exits
}

/// What is known of a container before what is left of it is ended.
pub(super) struct Before {
    record: Option<ExitRecord>,
    alive: bool,
}

impl Before {
    pub(super) fn look(container: &ContainerRecord, record: &Path) -> Self {
        let is_alive = |pid| Path::new(&format!("/proc/{pid}")).exists();
        let alive = container.state.pid().is_some_and(is_alive);
        Self { record: recorded(record), alive }
    }

    /// When and how it ended, now that it has; `record`: where its end may have been written meanwhile.
    pub(super) fn verdict(self, record: Option<&Path>) -> (SystemTime, Exit) {
        match self.record.or_else(|| record.and_then(recorded)) {
            Some(record) => (record.at, exit_of(&record)),
            // Nobody else was there to kill it.
            None if self.alive => (SystemTime::now(), Exit::Signal(libc::SIGKILL as u8)),
            None => (SystemTime::now(), Exit::Lost),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_counts_before_what_the_shim_says_for_it_knows_of_the_oom_killer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exit.json");
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(how_ended(&path, None).1, Exit::Lost);
        assert_eq!(how_ended(&path, Some((at(9), 137))), (at(9), Exit::Signal(9)));
        let status = holdfast_shim::bundle::Exit::Signal(9);
        ExitRecord { pid: 7, status, at: at(8), oom_killed: true, lost: false }
            .store(&path)
            .unwrap();
        let killed = (at(8), Exit::OomKilled { status: 137 });
        assert_eq!(how_ended(&path, Some((at(9), 137))), killed);
        assert_eq!(how_ended(&path, None), killed);
        // It ended while its shim was dead, and nobody knows how.
        ExitRecord { pid: 7, status, at: at(8), oom_killed: false, lost: true }
            .store(&path)
            .unwrap();
        assert_eq!(how_ended(&path, Some((at(9), 255))), (at(8), Exit::Lost));
    }
}

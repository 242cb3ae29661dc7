//! An empty cgroup per pod, by the name that cAdvisor looks for: the pod's id, below the pod's cgroup.
//!
//! cAdvisor asks for a pod's process once, when it sees the cgroup appear, and then counts the traffic
//! of that process' network namespace for as long as the cgroup is there. A pod has no process of its
//! own, so its oldest running container lends one; when that ends, the mark is taken away and made
//! again for another. A mark has no processes and no limits. On version 1 it is in one hierarchy that
//! costs next to nothing.
//!
//! There are no marks until somebody asks for them, and none for pods with the node's network, or
//! without a cgroup that the kubelet made. A mark is found again by the pod's record, and goes with the
//! pod: see [`remove`].

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use holdfast_shim::cgroup::{Cgroup, Version};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::{
    error::chain,
    id::PodId,
    pod::{
        PodView, Pods,
        state::{ContainerState, PodState},
    },
    spec,
    store::pods::PodRecord,
};

/// Hierarchies of version 1 that cAdvisor looks into, the cheapest first. Not `pids`: it is watched, but
/// missing when cAdvisor lists all cgroups once a minute, and what is not listed is forgotten.
const HIERARCHIES: [&str; 3] = ["devices", "cpu", "memory"];

/// How long a mark is away before it comes again for another process, and how long a container must
/// have run to lend its own.
const REST: Duration = Duration::from_secs(1);

/// Marks of pods, and which process each stands for.
#[derive(Debug, Default)]
pub struct Marks {
    asked: AtomicBool,
    wake: Notify,
    /// One pod at a time.
    settling: tokio::sync::Mutex<()>,
    processes: Mutex<HashMap<PodId, u32>>,
}

impl Marks {
    /// Somebody asks: from now on there are marks.
    pub(super) fn wanted(&self) {
        if !self.asked.swap(true, Ordering::Relaxed) {
            self.wake.notify_one();
        }
    }

    fn processes(&self) -> MutexGuard<'_, HashMap<PodId, u32>> {
        self.processes.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A process in a pod's network namespace, of those pods that have a mark.
    pub(super) fn process_of(&self, pod: &PodId) -> Option<u32> {
        self.processes().get(pod).copied()
    }

    /// Keeps marks as pods are, once they are wanted, until `stop`.
    pub async fn keep(self: Arc<Self>, pods: Pods, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => return,
            () = self.wake.notified() => {}
        }
        info!("a client of containerd's services is here: pods get a cgroup by their id");
        // Subscribed first, so that no change falls between.
        let list = pods.clone();
        let mut changes = pods.services().events.subscribe(move || list.list());
        for pod in pods.list() {
            self.settle(&pods, &pod.record.id).await;
        }
        loop {
            let change = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                change = changes.next() => change,
            };
            let Some(change) = change else { return };
            self.settle(&pods, &change.pod.record.id).await;
        }
    }

    /// Brings a pod's mark in line with the pod as it is now.
    async fn settle(self: &Arc<Self>, pods: &Pods, id: &PodId) {
        let _alone = self.settling.lock().await;
        let pod = pods.find(id.as_str()).ok().map(|pod| pod.view());
        let had = self.process_of(id);
        let wanted = pod.as_ref().and_then(|pod| lender(pod, had));
        let Some(pod) = pod else {
            // Its mark went with it.
            self.processes().remove(id);
            return;
        };
        match (had, wanted) {
            (None, None) => {}
            (Some(had), Some((_, pid))) if had == pid => {}
            (Some(_), _) => {
                self.processes().remove(id);
                on_disk(&pod, |record| remove(record).map(|_| ())).await;
                // Who watches cgroups has to see that it was gone.
                if wanted.is_some() {
                    self.later(pods, id);
                }
            }
            // Init containers come and go: it is not worth it for them.
            (None, Some((started_at, _))) if started_at.elapsed().is_ok_and(|age| age < REST) => {
                self.later(pods, id);
            }
            (None, Some((_, pid))) => {
                // Known before the mark can be seen.
                self.processes().insert(id.clone(), pid);
                let made = on_disk(&pod, |record| match remove(record)? {
                    // One that an earlier daemon made, for nobody knows which process.
                    true => Ok(false),
                    false => make(record).map(|()| true),
                });
                match made.await {
                    Some(true) => debug!(pod = id.short(), pid, "mark"),
                    Some(false) => {
                        self.processes().remove(id);
                        self.later(pods, id);
                    }
                    None => drop(self.processes().remove(id)),
                }
            }
        }
    }

    /// Looks at the pod again, soon.
    fn later(self: &Arc<Self>, pods: &Pods, id: &PodId) {
        let (marks, pods, id) = (self.clone(), pods.clone(), id.clone());
        tokio::spawn(async move {
            tokio::time::sleep(REST).await;
            marks.settle(&pods, &id).await;
        });
    }
}

/// Does it where it may block; what goes wrong is told, and is `None`.
async fn on_disk<T: Send + 'static>(
    pod: &PodView,
    work: impl FnOnce(&PodRecord) -> io::Result<T> + Send + 'static,
) -> Option<T> {
    let record = pod.record.clone();
    match tokio::task::spawn_blocking(move || work(&record)).await.ok()? {
        Ok(done) => Some(done),
        // Its cgroup is being removed: so is the pod.
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            let pod = pod.record.id.short();
            warn!(pod, error = %chain(&error), "no traffic for cAdvisor");
            None
        }
    }
}

/// The process that stands for a pod: the one that did, while it runs, else that of the container
/// which has run for longest.
fn lender(pod: &PodView, had: Option<u32>) -> Option<(SystemTime, u32)> {
    let config = &pod.record.config;
    if pod.gone
        || pod.record.state != PodState::Ready
        || config.namespaces.host_network
        || config.cgroup_parent.is_empty()
    {
        return None;
    }
    let running = pod.containers.values().filter_map(|c| match c.record.state {
        ContainerState::Running { pid, started_at } if pid > 0 => Some((started_at, pid)),
        _ => None,
    });
    let mut running: Vec<_> = running.collect();
    running.sort_unstable();
    let had = running.iter().find(|(_, pid)| Some(*pid) == had);
    had.or(running.first()).copied()
}

/// Where a pod's mark is: below its cgroup, which must be there.
fn path(record: &PodRecord) -> io::Result<Option<PathBuf>> {
    let Some(parent) = spec::pod_cgroup(&record.config.cgroup_parent, &record.id) else {
        return Ok(None);
    };
    let parent = Cgroup::at(parent)?;
    let dir = match parent.version() {
        Version::V2 => parent.unified(),
        Version::V1 => HIERARCHIES.iter().find_map(|name| parent.controller(name)),
    };
    Ok(dir.map(|dir| dir.join(&record.id)))
}

fn make(record: &PodRecord) -> io::Result<()> {
    let Some(path) = path(record)? else { return Ok(()) };
    match std::fs::create_dir(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(io::Error::new(error.kind(), format!("{}: {error}", path.display())))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Removes a pod's mark; says whether there was one. Blocks.
pub(crate) fn remove(record: &PodRecord) -> io::Result<bool> {
    if record.config.cgroup_parent.is_empty() || record.config.namespaces.host_network {
        return Ok(false);
    }
    let Some(path) = path(record)? else { return Ok(false) };
    let Err(error) = std::fs::remove_dir(&path) else { return Ok(true) };
    match error.kind() {
        // With processes in it, it is that of a pause container, which another shim has.
        io::ErrorKind::NotFound | io::ErrorKind::ResourceBusy => Ok(false),
        kind => Err(io::Error::new(kind, format!("{}: {error}", path.display()))),
    }
}

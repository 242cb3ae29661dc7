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

/// Hierarchies of version 1 that cAdvisor watches, the cheapest first.
const HIERARCHIES: [&str; 3] = ["pids", "cpu", "memory"];

/// Marks of pods, and which process each stands for.
#[derive(Debug, Default)]
pub struct Marks {
    asked: AtomicBool,
    wake: Notify,
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
            self.settle(pod).await;
        }
        loop {
            let change = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                change = changes.next() => change,
            };
            let Some(change) = change else { return };
            // As it is now: changes may be old when many come at once.
            let pod = pods.find(change.pod.record.id.as_str());
            self.settle(pod.map_or(change.pod, |pod| pod.view())).await;
        }
    }

    /// Brings a pod's mark in line with the pod.
    async fn settle(self: &Arc<Self>, pod: Arc<PodView>) {
        let id = &pod.record.id;
        let had = self.process_of(id);
        let wanted = lender(&pod, had);
        if had == wanted {
            return;
        }
        // Known before the mark can be seen.
        match wanted {
            Some(pid) => self.processes().insert(id.clone(), pid),
            None => self.processes().remove(id),
        };
        let record = pod.record.clone();
        let made = tokio::task::spawn_blocking(move || {
            remove(&record)?;
            if wanted.is_some()
                && let Some(path) = path(&record)?
            {
                std::fs::create_dir(&path)
                    .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
            }
            Ok::<_, io::Error>(())
        });
        match made.await {
            Ok(Ok(())) => debug!(pod = id.short(), pid = wanted, "mark"),
            // Its cgroup is being removed: so is the pod.
            Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(Err(error)) => {
                warn!(pod = id.short(), error = %chain(&error), "no traffic for cAdvisor");
            }
            Err(_) => {}
        }
    }
}

/// The process that stands for a pod: the one that did, while it runs, else that of the container
/// which has run for longest.
fn lender(pod: &PodView, had: Option<u32>) -> Option<u32> {
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
    let had = running.iter().map(|(_, pid)| *pid).find(|pid| Some(*pid) == had);
    had.or_else(|| running.first().map(|(_, pid)| *pid))
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

/// Removes a pod's mark, if there is one. Blocks.
pub(crate) fn remove(record: &PodRecord) -> io::Result<()> {
    if record.config.cgroup_parent.is_empty() || record.config.namespaces.host_network {
        return Ok(());
    }
    let Some(path) = path(record)? else { return Ok(()) };
    match std::fs::remove_dir(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io::Error::new(error.kind(), format!("{}: {error}", path.display())))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

//! What a shim knows, in the form in which it outlives the shim: written to the pod's bundle
//! (`shim.json`) at each change, and read by the shim that comes after one that died.
//!
//! Versions: [`VERSION`] counts up when a reader that does not know a field would do wrong, and then
//! `needs` says from which version on readers may take it. Any other field is only added, with a
//! default, so that neighbouring releases read each other's.

use std::{
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::{
    Called, Container, Ended, Error, INIT_GRACE, IdMaps, Pod, Process, Stage, Uris, io_error,
};
use crate::{
    bundle::{Bundle, replace},
    cgroup::Cgroup,
    control::{Kept, Relay},
    kubernetes, mounts,
    options::PodOptions,
    process::{Reaper, lock, report},
    runtime::{self, Runtime},
    stat::stat_of,
};

/// What is written.
pub(crate) const VERSION: u32 = 1;

/// The oldest reader that understands what is written.
const NEEDS: u32 = 1;

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Saved {
    version: u32,
    needs: u32,
    #[serde(default)]
    pub(super) sandbox: Option<SavedSandbox>,
    #[serde(default)]
    pub(super) containers: Vec<SavedContainer>,
    /// Streams of containers that other shims run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) relays: Vec<Relay>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedSandbox {
    pub(super) id: String,
    pub(super) bundle: PathBuf,
    pub(super) options: PodOptions,
    pub(super) netns: Option<PathBuf>,
    pub(super) created_at: Option<SystemTime>,
    #[serde(default)]
    pub(super) init: Option<Who>,
    #[serde(default)]
    pub(super) ended: Option<SavedEnd>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedContainer {
    pub(super) id: String,
    pub(super) bundle: PathBuf,
    pub(super) runtime: Runtime,
    pub(super) init: SavedProcess,
    #[serde(default)]
    pub(super) execs: Vec<(String, SavedProcess)>,
    #[serde(default)]
    pub(super) cgroup: Option<Cgroup>,
    #[serde(default)]
    pub(super) oom_kills_before: Option<u64>,
    #[serde(default)]
    pub(super) shares_pids: bool,
    #[serde(default)]
    pub(super) paused: bool,
    #[serde(default)]
    pub(super) restore: Option<PathBuf>,
    #[serde(default)]
    pub(super) mounted: bool,
    #[serde(default)]
    pub(super) ids: IdMaps,
}

/// A process for good: a pid alone is given to others in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Who {
    pub(super) pid: u32,
    /// In clock ticks after the boot.
    pub(super) began: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedProcess {
    pub(super) uris: Uris,
    /// Of an exec that was not started: the OCI `Process`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) spec: String,
    pub(super) stage: SavedStage,
    /// Its standard input was closed.
    #[serde(default)]
    pub(super) stdin_closed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum SavedStage {
    New,
    Created(Who),
    Running(Who),
    Ended(SavedEnd),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedEnd {
    pub(super) pid: u32,
    pub(super) status: u32,
    pub(super) at: SystemTime,
}

impl From<Ended> for SavedEnd {
    fn from(Ended { pid, status, at }: Ended) -> Self {
        Self { pid, status, at }
    }
}

impl From<SavedEnd> for Ended {
    fn from(SavedEnd { pid, status, at }: SavedEnd) -> Self {
        Self { pid, status, at }
    }
}

impl Saved {
    /// Reads what a shim has written, of this release or another.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        Self::from_value(&serde_json::from_slice(bytes).map_err(bad)?)
    }

    /// The same, when it is JSON already.
    pub(crate) fn from_value(value: &serde_json::Value) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Versions {
            version: u32,
            needs: u32,
        }
        // First, for in a newer one even the rest may look different.
        let Versions { version, needs } = Versions::deserialize(value).map_err(bad)?;
        if needs > VERSION {
            return Err(format!(
                "the state of the shim before has version {version} and needs a shim that reads \
                 version {needs}; this one ({}) reads up to {VERSION}",
                env!("CARGO_PKG_VERSION")
            ));
        }
        Self::deserialize(value).map_err(bad)
    }
}

fn bad(error: serde_json::Error) -> String {
    format!("the state of the shim before: {error}")
}

impl Saved {
    /// Ends what a shim that is dead has left of its pod, where nobody is to take it over: containers, the
    /// pod's init, mounts. Says what could not be ended.
    pub(crate) async fn end(&self, reaper: &Arc<Reaper>) -> Vec<String> {
        let mut problems = Vec::new();
        for container in &self.containers {
            if let SavedStage::Created(who) | SavedStage::Running(who) = container.init.stage
                && who.lives()
                && let Err(error) = end_container(who.pid).await
            {
                problems.push(format!("container {}: {error}", container.id));
            }
            match container.runtime.delete(reaper, &container.id, true).await {
                Ok(()) | Err(runtime::Error::Spawn { .. }) => {}
                Err(error) => problems.push(error.to_string()),
            }
            let rootfs = Bundle::new(&container.bundle).rootfs();
            if container.mounted
                && let Err(error) = mounts::unmount(&rootfs)
            {
                problems.push(format!("unmount {}: {error}", rootfs.display()));
            }
        }
        if let Some(sandbox) = &self.sandbox {
            if let Some(who) = sandbox.init
                && let Some(init) = reaper.own_stranger(who.pid, who.began)
            {
                let _ = init.signal(libc::SIGKILL);
                let _ = tokio::time::timeout(INIT_GRACE, init.ended()).await;
            }
            kubernetes::remove_files(&Bundle::new(&sandbox.bundle), &sandbox.options);
        }
        problems
    }
}

impl Who {
    fn lives(self) -> bool {
        stat_of(self.pid).is_some_and(|stat| stat.began == self.began)
    }
}

/// Kills a container that has no shim any more, and waits until it is dead.
pub(crate) async fn end_container(pid: u32) -> Result<(), String> {
    let Ok(cgroup) = Cgroup::of_container(pid) else { return Ok(()) };
    cgroup.kill().map_err(|error| format!("kill what is left: {error}"))?;
    for _ in 0..500 {
        if cgroup.pids().is_ok_and(|pids| pids.is_empty()) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err(format!("process {pid} does not die within 5 s of SIGKILL"))
}

impl Process {
    fn saved(&self) -> SavedProcess {
        let who = |pid| Who { pid, began: self.began.load(Ordering::Relaxed) };
        let stage = match self.stage() {
            Stage::New => SavedStage::New,
            Stage::Created { pid } => SavedStage::Created(who(pid)),
            Stage::Running { pid } => SavedStage::Running(who(pid)),
            Stage::Ended(ended) => SavedStage::Ended(ended.into()),
        };
        let spec = match stage {
            SavedStage::New => String::from_utf8_lossy(&self.spec).into_owned(),
            _ => String::new(),
        };
        SavedProcess {
            uris: self.uris.clone(),
            spec,
            stage,
            stdin_closed: self.stdin_closed.load(Ordering::Relaxed),
        }
    }
}

impl Container {
    fn saved(&self) -> SavedContainer {
        let execs = lock(&self.execs);
        SavedContainer {
            id: self.id.clone(),
            bundle: self.bundle.dir().to_owned(),
            runtime: self.runtime.clone(),
            init: self.init.saved(),
            execs: execs.iter().map(|(name, exec)| (name.clone(), exec.saved())).collect(),
            cgroup: self.cgroup.get().cloned(),
            oom_kills_before: self.oom_kills_before.get().copied(),
            shares_pids: self.shares_pids,
            paused: self.paused.load(Ordering::Relaxed),
            restore: self.restore.clone(),
            mounted: self.mounted,
            ids: self.ids.clone(),
        }
    }
}

impl Pod {
    pub(crate) fn saved(&self) -> Saved {
        let sandbox = lock(&self.sandbox).as_ref().map(|sandbox| SavedSandbox {
            id: sandbox.id.clone(),
            bundle: sandbox.bundle.dir().to_owned(),
            options: sandbox.options.clone(),
            netns: sandbox.netns.clone(),
            created_at: sandbox.created_at,
            init: sandbox.init.as_ref().map(|(init, began)| Who { pid: init.pid(), began: *began }),
            ended: (*sandbox.ended.borrow()).map(Into::into),
        });
        let containers = self.all().iter().map(|container| container.saved()).collect();
        let relays = self.relays.asked();
        Saved { version: VERSION, needs: NEEDS, sandbox, containers, relays }
    }

    /// Something has changed that a shim after this one must know. A pod without a sandbox is
    /// containerd's, which ends the pods of dead shims itself.
    pub(crate) fn changed(&self) {
        self.lent.notify_waiters();
        if self.orphan_is_waiting() || lock(&self.sandbox).is_none() {
            return;
        }
        let path = self.bundle.shim_state();
        let written = serde_json::to_vec(&self.saved())
            .map_err(Into::into)
            .and_then(|bytes| replace(&path, &bytes, false));
        match written {
            // The bundle is being removed under us.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            // What was written before is still good for the processes it names.
            Err(error) => report!("{}: {error}", path.display()),
            Ok(()) => {}
        }
    }

    /// Begins where another shim has died: nothing is answered before [`Pod::adopt_orphan`].
    pub(crate) fn begin(&self) {
        if self.bundle.shim_state().exists() {
            *lock(&self.orphan) = true;
        }
    }

    pub(crate) fn orphan_is_waiting(&self) -> bool {
        *lock(&self.orphan)
    }

    /// Takes over what the shim had that died here, with what it has lent to the daemon.
    pub(crate) async fn adopt_orphan(self: &Arc<Self>, kept: Kept) -> Called<()> {
        if !self.orphan_is_waiting() {
            return Err(Error::Precondition("no shim has died here".into()));
        }
        let path = self.bundle.shim_state();
        let bytes = std::fs::read(&path).map_err(io_error("read the state of the shim before"))?;
        let saved = Saved::parse(&bytes).map_err(Error::Unsupported)?;
        self.take_over(saved, kept, true).await;
        *lock(&self.orphan) = false;
        self.changed();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_that_needs_a_newer_reader_is_refused_and_says_so() {
        let error = Saved::parse(br#"{"version":9,"needs":7,"containers":7}"#).unwrap_err();
        assert!(error.contains("version 9") && error.contains("version 7"), "{error}");
        assert!(Saved::parse(b"{}").is_err());
        assert!(Saved::parse(b"").is_err());
    }

    #[test]
    fn a_newer_state_that_an_older_reader_may_take_is_taken() {
        let text = r#"{"version":9,"needs":1,"weather":"fine","sandbox":null,"containers":[
            {"id":"a","bundle":"/b","runtime":{},"colour":"red","init":{"mood":"good",
             "uris":{"stdin":"","stdout":"cri-log://","stderr":"","terminal":false},
             "stage":{"Running":{"pid":7,"began":9}}}}]}"#;
        let saved = Saved::parse(text.as_bytes()).unwrap();
        let who = Who { pid: 7, began: 9 };
        assert_eq!(saved.containers[0].init.stage, SavedStage::Running(who));
    }

    /// What the first release writes. It must be read for ever.
    #[test]
    fn the_state_of_the_first_version_is_read() {
        let text = include_str!("../golden/state_v1.json");
        let saved = Saved::parse(text.as_bytes()).unwrap();
        let again: serde_json::Value = serde_json::to_value(&saved).unwrap();
        let before: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(again, before, "nothing is lost in reading");
    }
}

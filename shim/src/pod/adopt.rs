//! Taking over: the processes and streams of a shim that is gone become ours.
//!
//! ```text
//! each process: the pidfd that was lent, else a new one if the pid is still the process
//!   alive or lent -> watched as if it were a child; its exit code is the kernel's
//!   gone, not lent -> nobody knows how it ended: the container is lost, an exec is forgotten
//! each stream: what was lent, else the FIFO in the bundle by its path
//! ```

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::SystemTime,
};

use tokio::sync::{Notify, watch};

use super::{
    Container, Ended, Pod, Process, Sandbox, Slot, Stage,
    saved::{Saved, SavedContainer, SavedProcess, SavedSandbox, SavedStage, Who},
};
use crate::{
    bundle::{Bundle, ExitRecord},
    control::Kept,
    process::{Owned, lock, report},
    stdio::{self, Io, Lent},
};

impl Process {
    fn restored(saved: &SavedProcess) -> Self {
        let (stage, began) = match saved.stage {
            SavedStage::New => (Stage::New, 0),
            SavedStage::Created(Who { pid, began }) => (Stage::Created { pid }, began),
            SavedStage::Running(Who { pid, began }) => (Stage::Running { pid }, began),
            SavedStage::Ended(ended) => (Stage::Ended(ended.into()), 0),
        };
        Self {
            uris: saved.uris.clone(),
            spec: saved.spec.clone().into_bytes(),
            stage: watch::Sender::new(stage),
            order: tokio::sync::Mutex::new(()),
            io: Mutex::default(),
            owned: Mutex::default(),
            began: AtomicU64::new(began),
            stdin_closed: AtomicBool::new(saved.stdin_closed),
        }
    }
}

/// The name under which a descriptor of a process is lent.
pub(super) fn lent_as(container: &str, exec: &str, role: &str) -> String {
    format!("{container}/{exec}/{role}")
}

fn lent(kept: &mut Kept, container: &str, exec: &str) -> (Option<OwnedFd>, Lent) {
    let mut take = |role| kept.remove(&lent_as(container, exec, role));
    let pidfd = take("pid");
    (pidfd, Lent { stdin: take("in"), stdout: take("out"), stderr: take("err"), tty: take("tty") })
}

impl Pod {
    /// Takes over from the code that this process ran before.
    pub(crate) async fn take_over_from(
        self: &Arc<Self>,
        saved: Saved,
        kept: Kept,
        unfinished: Vec<(String, [Vec<u8>; 2])>,
    ) {
        self.take_over(saved, kept, false).await;
        for (id, text) in unfinished {
            if let Some(outputs) = self.outputs(&id) {
                outputs.set_unfinished(text);
            }
        }
    }

    fn outputs(&self, id: &str) -> Option<Arc<stdio::Outputs>> {
        match self.relays.find(id) {
            Some(relay) => relay.with_io(|io| io.outputs.clone()),
            None => self.container(id).ok()?.init.with_io(|io| io.outputs.clone()).flatten(),
        }
    }

    /// Text after the last line feed of every container.
    pub(crate) fn unfinished(&self) -> Vec<(String, [Vec<u8>; 2])> {
        let containers = self.all().into_iter().map(|container| container.id.clone());
        let relayed = self.relays.asked().into_iter().map(|relay| relay.container);
        let text = |id: String| Some((id.clone(), self.outputs(&id)?.unfinished()));
        containers.chain(relayed).filter_map(text).collect()
    }

    /// Whether attached clients have still to get output.
    pub(crate) fn clients_are_behind(&self) -> bool {
        lock(&self.attached).values().any(|(_, client)| client.is_behind())
    }

    /// Whether all that is there can be handed over; else what cannot.
    pub(crate) fn can_be_handed_over(&self) -> Result<(), String> {
        for container in self.all() {
            let id = &container.id;
            if let Stage::New = container.init.stage() {
                return Err(format!("container {id} is still to be restored"));
            }
            let can = |process: &Process| process.with_io(|io| io.can_be_handed_over());
            let execs: Vec<_> = lock(&container.execs).values().cloned().collect();
            let all = execs.iter().map(|exec| can(exec)).chain([can(&container.init)]);
            if all.into_iter().any(|can| can == Some(false)) {
                return Err(format!("the output of container {id} goes to a logging binary"));
            }
        }
        Ok(())
    }

    /// `crashed`: the shim is dead, and what it was doing has gone on without it.
    pub(super) async fn take_over(self: &Arc<Self>, saved: Saved, mut kept: Kept, crashed: bool) {
        for container in saved.containers {
            self.take_over_container(container, &mut kept, crashed).await;
        }
        for relay in saved.relays {
            // Its FIFOs are as they were: the other shim has them open.
            if let Err(error) = self.relays.begin(&relay, crashed).await {
                report!("streams of {}: {error}", relay.container);
            }
        }
        if let Some(sandbox) = saved.sandbox {
            self.take_over_sandbox(sandbox, &mut kept);
        }
    }

    fn stranger(&self, who: Who, pidfd: Option<OwnedFd>) -> Option<Arc<Owned>> {
        let owned = match pidfd {
            Some(fd) => self.reaper.own_fd(who.pid, fd).ok(),
            None => self.reaper.own_stranger(who.pid, who.began),
        };
        owned.map(Arc::new)
    }

    async fn take_over_container(
        self: &Arc<Self>,
        saved: SavedContainer,
        kept: &mut Kept,
        crashed: bool,
    ) {
        let init = Process::restored(&saved.init);
        let (pidfd, streams) = lent(kept, &saved.id, "");
        let container = Arc::new(Container {
            bundle: Bundle::new(saved.bundle),
            runtime: saved.runtime,
            init,
            execs: Mutex::default(),
            cgroup: saved.cgroup.map_or_else(OnceLock::new, OnceLock::from),
            started_at: saved.started_at.map_or_else(OnceLock::new, OnceLock::from),
            oom_kills_before: saved.oom_kills_before.map_or_else(OnceLock::new, OnceLock::from),
            shares_pids: saved.shares_pids,
            paused: AtomicBool::new(saved.paused),
            undeleted: AtomicBool::new(false),
            restore: saved.restore,
            mounted: saved.mounted,
            ids: saved.ids,
            turn: tokio::sync::Mutex::new(()),
            give_up: Notify::new(),
            deleting: tokio::sync::Mutex::new(()),
            id: saved.id,
        });
        let made = Slot::Made(container.clone());
        lock(&self.containers).insert(container.id.clone(), made);
        // The shim may have died between the record of an exit and its own note of it.
        if let Ok(Some(record)) = ExitRecord::load(container.bundle.exit_record())
            && !matches!(container.init.stage(), Stage::Ended(_))
        {
            let ended = Ended { pid: record.pid, status: record.wire_status(), at: record.at };
            container.init.stage.send_replace(Stage::Ended(ended));
        }
        let execs = match container.init.stage() {
            Stage::New => return,
            Stage::Ended(_) => saved.execs,
            Stage::Created { pid } | Stage::Running { pid } => {
                let who = Who { pid, began: container.init.began.load(Ordering::Relaxed) };
                let owned = self.stranger(who, pidfd);
                self.resume_io(&container, &container.init, streams, false, crashed).await;
                self.resume_init(&container, pid, owned, crashed).await;
                saved.execs
            }
        };
        for (name, exec) in execs {
            self.take_over_exec(&container, name, &exec, kept).await;
        }
    }

    async fn resume_io(
        &self,
        container: &Container,
        process: &Process,
        streams: Lent,
        exec: bool,
        crashed: bool,
    ) {
        let parsed = process.uris.parse();
        let resumed =
            parsed.map_err(|error| error.to_string()).and_then(|(stdin, stdout, stderr)| {
                let request = stdio::Request {
                    bundle: &container.bundle,
                    namespace: &self.namespace,
                    container: &container.id,
                    terminal: process.uris.terminal,
                    stdin: &stdin,
                    stdout: &stdout,
                    stderr: &stderr,
                    exec,
                };
                let closed = process.stdin_closed.load(Ordering::Relaxed);
                Io::resume(&request, streams, closed, crashed).map_err(|error| error.to_string())
            });
        match resumed {
            Ok(io) => *lock(&process.io) = Some(io),
            Err(error) => report!("container {}: its streams: {error}", container.id),
        }
    }

    async fn resume_init(
        self: &Arc<Self>,
        container: &Arc<Container>,
        pid: u32,
        owned: Option<Arc<Owned>>,
        crashed: bool,
    ) {
        let Some(owned) = owned else {
            let (pod, container) = (self.clone(), container.clone());
            tokio::spawn(async move {
                let error = std::io::Error::other("it ended while no shim was there");
                pod.settle(&container, pid, Err(error), SystemTime::now()).await;
            });
            return;
        };
        *lock(&container.init.owned) = Some(owned.clone());
        // A start that was under way has gone on without the shim.
        if crashed
            && matches!(container.init.stage(), Stage::Created { .. })
            && let Ok(state) = container.runtime.state(&self.reaper, &container.id).await
            && state.status == "running"
        {
            container.init.stage.send_replace(Stage::Running { pid });
        }
        self.watch_init(container.clone(), owned);
    }

    async fn take_over_exec(
        self: &Arc<Self>,
        container: &Arc<Container>,
        name: String,
        saved: &SavedProcess,
        kept: &mut Kept,
    ) {
        let process = Arc::new(Process::restored(saved));
        let (pidfd, streams) = lent(kept, &container.id, &name);
        if let SavedStage::Running(who) = saved.stage {
            // Of one that is gone nobody can tell how it ended, and no answer is better than a guess.
            let Some(owned) = self.stranger(who, pidfd) else { return };
            self.resume_io(container, &process, streams, true, false).await;
            *lock(&process.owned) = Some(owned.clone());
            self.watch_exec(container, &name, process.clone(), owned);
        }
        lock(&container.execs).insert(name, process);
    }

    fn take_over_sandbox(self: &Arc<Self>, saved: SavedSandbox, kept: &mut Kept) {
        let pidfd = kept.remove(&lent_as("", "", "pid"));
        let init = saved.init.and_then(|who| Some((self.stranger(who, pidfd)?, who.began)));
        let mut ended = saved.ended.map(Ended::from);
        if saved.init.is_some() && init.is_none() && ended.is_none() {
            let pid = saved.init.map_or(0, |who| who.pid);
            ended = Some(Ended { pid, status: 255, at: SystemTime::now() });
        }
        let id = saved.id.clone();
        *lock(&self.sandbox) = Some(Sandbox {
            id: saved.id,
            bundle: Bundle::new(saved.bundle),
            options: saved.options,
            netns: saved.netns,
            created_at: saved.created_at,
            starting: false,
            init: init.clone(),
            ended: watch::Sender::new(ended),
        });
        if let Some((init, _)) = init {
            self.watch_pod_init(id, init);
        }
    }

    /// What is lent to the daemon now: names, and whose descriptor each is.
    pub(crate) fn lending(&self) -> BTreeMap<String, stdio::Shared> {
        let mut lending = BTreeMap::new();
        if let Some(sandbox) = &*lock(&self.sandbox)
            && let Some((init, _)) = &sandbox.init
        {
            lending.insert(lent_as("", "", "pid"), stdio::Shared::Process(init.clone()));
        }
        for container in self.all() {
            container.init.lend(&container.id, "", &mut lending);
            for (name, exec) in &*lock(&container.execs) {
                exec.lend(&container.id, name, &mut lending);
            }
        }
        lending
    }
}

impl Process {
    fn lend(&self, container: &str, exec: &str, lending: &mut BTreeMap<String, stdio::Shared>) {
        if let Stage::New | Stage::Ended(_) = self.stage() {
            return;
        }
        if let Some(owned) = lock(&self.owned).clone() {
            lending.insert(lent_as(container, exec, "pid"), stdio::Shared::Process(owned));
        }
        self.with_io(|io| {
            for (role, fd) in io.lend() {
                lending.insert(lent_as(container, exec, role), fd);
            }
        });
    }
}

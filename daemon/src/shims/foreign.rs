//! Shims that are not ours, by containerd's contract: how one is started for a container, reached again
//! after a restart of the daemon, and ended without leaving anything.
//!
//! A foreign shim runs containers and nothing else: the pod's namespaces and the containers' logs are
//! our own shim's, which every pod has (docs/adr/0008-foreign-shims.md). What must be known to find a
//! foreign shim again is a [`Mark`] in the bundle, written before the shim is started.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use holdfast_protos::shim::protobuf::{CodedOutputStream, well_known_types::any::Any};
use holdfast_shim::{
    bundle::Bundle,
    client::{self, Client, Command, Endpoint, ErrorKind, Exited},
    control::Control,
    stat::stat_of,
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::unix::pipe,
    task::JoinHandle,
};
use tracing::{debug, warn};

use super::{BINARY, CONNECT, OBSERVER, Shims};
use crate::{
    config::{ForeignHandler, find_program},
    error::chain,
    id::{ContainerId, PodId},
};

/// How long a shim that was asked to exit may take.
const EXIT: Duration = Duration::from_secs(3);

/// How long a process that was killed may take to show itself.
const KILLED: Duration = Duration::from_secs(10);

/// Longest line of a shim's own log that is passed on, in bytes.
const LINE: usize = 4096;

/// What must be known of a foreign shim to find it again: `foreign.json` in the bundle that it was
/// started for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mark {
    /// Whose container it is.
    pub pod: PodId,
    /// How the shim is driven; `shim` is the binary's whole path.
    pub handler: ForeignHandler,
    /// `None`: it was to be started, and nobody knows how that went.
    #[serde(default)]
    pub running: Option<Running>,
}

/// A shim that was started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Running {
    /// Where it listens.
    pub endpoint: Endpoint,
    /// Its pid; 0 when it does not say.
    pub pid: u32,
    /// When that process was started, in clock ticks since boot: a pid alone may be another's later.
    pub born: u64,
}

impl Mark {
    fn path(bundle: &Bundle) -> PathBuf {
        bundle.dir().join("foreign.json")
    }

    /// The mark in a bundle; `None`: the container is our own shim's, or is gone.
    pub fn load(bundle: &Bundle) -> Option<Self> {
        let path = Self::path(bundle);
        let json = fs::read(&path).ok()?;
        match serde_json::from_slice(&json) {
            Ok(mark) => Some(mark),
            Err(error) => {
                warn!(path = %path.display(), %error, "a mark cannot be read");
                None
            }
        }
    }

    fn store(&self, bundle: &Bundle) -> io::Result<()> {
        let json = serde_json::to_vec(self)?;
        let (path, new) = (Self::path(bundle), bundle.dir().join(".foreign.json.new"));
        fs::write(&new, json)?;
        fs::rename(new, path)
    }
}

impl Running {
    /// Proof that the process is gone. Of one that never told its pid, that nobody listens any more.
    fn is_dead(&self, connect: Option<&client::Error>) -> bool {
        match self.pid {
            0 => connect.is_some_and(|error| error.kind() == ErrorKind::Closed),
            pid => born(pid) != Some(self.born),
        }
    }

    fn kill(&self) {
        if self.pid != 0 && born(self.pid) == Some(self.born) {
            let pid = nix::unistd::Pid::from_raw(self.pid.cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
    }
}

/// When a process was started, in clock ticks since boot (proc_pid_stat(5)); `None`: there is none, or
/// it waits only to be reaped.
fn born(pid: u32) -> Option<u64> {
    stat_of(pid).filter(|stat| !stat.zombie).map(|stat| stat.began)
}

/// Why there is no connection to a foreign shim.
#[derive(Debug, thiserror::Error)]
pub enum Unreached {
    /// It is proven dead.
    #[error("the shim is dead")]
    Dead,
    /// It was never started, or is ended and forgotten.
    #[error("there is no shim for it")]
    Unknown,
    /// It may come back.
    #[error(transparent)]
    NotNow(client::Error),
}

/// Connections to foreign shims, and readers of their logs.
#[derive(Debug, Default)]
pub struct Foreign {
    clients: Mutex<HashMap<String, Client>>,
    logs: Mutex<HashMap<PathBuf, JoinHandle<()>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Foreign {
    /// A connection that lives; clones share it.
    fn known(&self, address: &str) -> Option<Client> {
        let mut clients = lock(&self.clients);
        let client = clients.get(address)?.clone();
        if client.is_closed() {
            clients.remove(address);
            return None;
        }
        Some(client)
    }

    /// Passes a shim's own log on to ours, until it is forgotten.
    fn read_log(&self, bundle: &Bundle, log: fs::File, id: &str) {
        let Ok(pipe) = pipe::Receiver::from_file(log) else { return };
        let id = id.to_owned();
        let reader = tokio::spawn(async move {
            let mut lines = BufReader::with_capacity(LINE, pipe);
            let mut line = Vec::new();
            loop {
                line.clear();
                let mut limited = tokio::io::AsyncReadExt::take(&mut lines, LINE as u64);
                match limited.read_until(b'\n', &mut line).await {
                    Ok(1..) => {
                        let text = String::from_utf8_lossy(&line);
                        debug!(id, "foreign shim: {}", text.trim_end());
                    }
                    Ok(0) | Err(_) => return,
                }
            }
        });
        if let Some(old) = lock(&self.logs).insert(bundle.dir().to_owned(), reader) {
            old.abort();
        }
    }

    fn forget_log(&self, bundle: &Bundle) {
        if let Some(reader) = lock(&self.logs).remove(bundle.dir()) {
            reader.abort();
        }
    }
}

/// Options for shims that have some of their own: `runtimeoptions.v1.Options{config_path=2}`.
pub fn shim_options(handler: &ForeignHandler) -> Option<Any> {
    let file = handler.options.as_ref()?;
    let mut value = Vec::new();
    let mut out = CodedOutputStream::vec(&mut value);
    out.write_string(2, &file.to_string_lossy()).and_then(|()| out.flush()).ok()?;
    drop(out);
    Some(Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Default::default() })
}

impl Shims {
    /// The bundle of what a foreign shim is given for a pod itself. Its name is the id, for some shims
    /// look for it by that.
    pub fn sandbox_bundle(&self, pod: &PodId) -> Bundle {
        Bundle::new(self.pod_bundle(pod).dir().join("sandbox").join(pod))
    }

    /// Options as a foreign shim wants them.
    pub fn foreign_options(&self, handler: &ForeignHandler) -> Option<Any> {
        match &handler.path {
            Some(path) => Some(self.runtime_options(path)),
            None => shim_options(handler),
        }
    }

    fn foreign_command(&self, id: &str, bundle: &Bundle, handler: &ForeignHandler) -> Command {
        let options = self.foreign_options(handler);
        Command {
            binary: handler.shim.clone(),
            env: Vec::new(),
            ..self.command(id, bundle, options)
        }
    }

    /// Starts the shim of a container, or finds that of its pod, and connects to it. Its bundle has a
    /// `config.json`, by which shims group themselves.
    ///
    /// # Errors
    /// The binary is not there, or does not give an address where somebody answers. What it may have
    /// begun is found by [`Shims::end_foreign`].
    pub async fn start_foreign(
        &self,
        pod: &PodId,
        id: &str,
        bundle: &Bundle,
        handler: &ForeignHandler,
    ) -> Result<Client, client::Error> {
        let io = |source| client::Error::Io { call: "start", source };
        let missing = || client::Error::Spawn {
            binary: handler.shim.clone(),
            source: io::Error::new(
                io::ErrorKind::NotFound,
                "it is not installed: install it, or set the handler's `shim`",
            ),
        };
        let shim = find_program(&handler.shim).ok_or_else(missing)?;
        let handler = ForeignHandler { shim, ..handler.clone() };
        let mut mark = Mark { pod: pod.clone(), handler, running: None };
        mark.store(bundle).map_err(io)?;
        let command = self.foreign_command(id, bundle, &mark.handler);
        let log = command.open_log().map_err(io)?;
        self.foreign.read_log(bundle, log, id);
        let started = async {
            let endpoint = command.start(self.timeout).await?;
            let answered = async {
                let client = self.connect_foreign(&endpoint).await?;
                // Who does not answer this does not answer anything.
                let pid = match client.connect_info(id).await {
                    Ok(info) => info.shim_pid,
                    Err(client::Error::Refused { .. }) => 0,
                    Err(error) => return Err(error),
                };
                Ok((client, pid))
            };
            match answered.await {
                Ok((client, pid)) => Ok((endpoint, client, pid)),
                Err(error) => {
                    let _ = command.delete(BINARY).await;
                    lock(&self.foreign.clients).remove(&endpoint.address);
                    remove_dead_socket(&endpoint.address);
                    Err(error)
                }
            }
        };
        let (endpoint, client, pid) = match started.await {
            Ok(started) => started,
            Err(error) => {
                // Its `delete` was run; what it left running all the same is found by the id.
                kill_strays(&mark.handler.shim, id);
                self.foreign.forget_log(bundle);
                fs::remove_file(Mark::path(bundle)).map_err(io)?;
                return Err(error);
            }
        };
        let born = born(pid).unwrap_or_default();
        let pid = if born == 0 { 0 } else { pid };
        mark.running = Some(Running { endpoint, pid, born });
        mark.store(bundle).map_err(io)?;
        Ok(client)
    }

    /// Has a container use the shim of its pod's sandbox, which speaks a version of the contract in
    /// which no further binary is run.
    ///
    /// # Errors
    /// The sandbox's shim is not there, or the mark cannot be written.
    pub fn share_foreign(&self, sandbox: &Bundle, bundle: &Bundle) -> io::Result<()> {
        let mark = Mark::load(sandbox).ok_or(io::ErrorKind::NotFound)?;
        mark.store(bundle)
    }

    async fn connect_foreign(&self, endpoint: &Endpoint) -> Result<Client, client::Error> {
        if let Some(client) = self.foreign.known(&endpoint.address) {
            return Ok(client);
        }
        let deadline = self.timeout + Duration::from_secs(5);
        let client = Client::connect(endpoint, CONNECT).await?;
        let client = client.with_deadline(deadline).with_observer(&OBSERVER);
        let mut clients = lock(&self.foreign.clients);
        Ok(clients.entry(endpoint.address.clone()).or_insert(client).clone())
    }

    /// Whether a container is a foreign shim's.
    pub fn is_foreign(&self, id: &ContainerId) -> bool {
        Mark::path(&self.container_bundle(id)).exists()
    }

    /// The connection to the foreign shim of a bundle.
    ///
    /// # Errors
    /// See [`Unreached`].
    pub async fn reach_foreign(&self, bundle: &Bundle) -> Result<Client, Unreached> {
        let mark = Mark::load(bundle).ok_or(Unreached::Unknown)?;
        let running = mark.running.ok_or(Unreached::Unknown)?;
        // Another shim of the group may listen at the same address by now.
        if running.pid != 0 && running.is_dead(None) {
            return Err(Unreached::Dead);
        }
        if let Some(client) = self.foreign.known(&running.endpoint.address) {
            return Ok(client);
        }
        match self.connect_foreign(&running.endpoint).await {
            Ok(client) => {
                // After a restart of ours nobody reads its log yet.
                if !lock(&self.foreign.logs).contains_key(bundle.dir())
                    && let Some(id) = bundle.dir().file_name().and_then(|name| name.to_str())
                    && let Ok(log) = self.foreign_command(id, bundle, &mark.handler).open_log()
                {
                    self.foreign.read_log(bundle, log, id);
                }
                Ok(client)
            }
            Err(error) if running.is_dead(Some(&error)) => Err(Unreached::Dead),
            Err(error) => Err(Unreached::NotNow(error)),
        }
    }

    /// Takes away what a foreign shim has of a container, and the shim itself when nothing else is
    /// left to it: kills what runs, deletes it, passes its last output on. How the container ended,
    /// where the shim knows. May be repeated; `None`: there is nothing of a foreign shim's.
    ///
    /// # Errors
    /// The shim lives and does not do as it is asked, or it is dead and its binary cannot clean up.
    pub async fn end_foreign(
        &self,
        id: &str,
        bundle: &Bundle,
    ) -> Result<Option<Exited>, client::Error> {
        let Some(mark) = Mark::load(bundle) else { return Ok(None) };
        let command = self.foreign_command(id, bundle, &mark.handler);
        let running = match mark.running.clone() {
            Some(running) => Some(running),
            // We were killed while it was started: asked again, it tells where the shim is.
            None => command.start(BINARY).await.ok().map(|endpoint| Running {
                endpoint,
                pid: 0,
                born: 0,
            }),
        };
        let client = match &running {
            None => None,
            Some(running) if running.pid != 0 && running.is_dead(None) => None,
            Some(running) => match self.connect_foreign(&running.endpoint).await {
                Ok(client) => Some(client),
                Err(error) if running.is_dead(Some(&error)) => None,
                Err(error) => return Err(error),
            },
        };
        let ended = match client {
            Some(client) => {
                let ended = end_task(&client, id).await?;
                if ended.is_none() && !bundle.exit_record().exists() {
                    // The shim knows nothing of it, and nobody saw its end.
                    command.delete(BINARY).await?;
                }
                self.settle(&mark.pod, id).await;
                self.leave(&client, id, &mark, running.as_ref()).await;
                ended
            }
            None => {
                let ended = command.delete(BINARY).await.or_else(|error| match error {
                    // A shim that never ran anything may well have nothing to delete.
                    client::Error::Binary { .. } if mark.running.is_none() => {
                        let at = std::time::SystemTime::now();
                        Ok(Exited { pid: 0, status: 137, at })
                    }
                    error => Err(error),
                })?;
                self.settle(&mark.pod, id).await;
                if let Some(running) = &running {
                    remove_dead_socket(&running.endpoint.address);
                }
                Some(ended)
            }
        };
        self.foreign.forget_log(bundle);
        match fs::remove_file(Mark::path(bundle)) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(client::Error::Io { call: "delete", source })
            }
            // Two may be at it at once: what frees an ended container, and what stops its pod.
            _ => Ok(ended),
        }
    }

    /// Passes on the last output of a container, as far as our own shim is there to do it.
    pub async fn settle(&self, pod: &PodId, id: &str) {
        let settled = Control::new(&self.pod_bundle(pod)).settle(id).await;
        match settled {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::Closed => {}
            Err(error) => warn!(id, error = %chain(&error), "the end of a log may be missing"),
        }
    }

    /// Lets the shim exit when nothing is left to it.
    async fn leave(&self, client: &Client, id: &str, mark: &Mark, running: Option<&Running>) {
        let Some(running) = running else { return };
        let sandbox = Mark::load(&self.sandbox_bundle(&mark.pod)).and_then(|mark| mark.running);
        if id != mark.pod.as_str() && sandbox.is_some_and(|sandbox| sandbox.pid == running.pid) {
            // The sandbox is still to go.
            return;
        }
        if self.others_use(&running.endpoint.address, id) {
            return;
        }
        match client.shutdown(id, false).await {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::Closed => {}
            Err(error) => warn!(id, error = %chain(&error), "end a foreign shim"),
        }
        let by = tokio::time::Instant::now() + EXIT;
        loop {
            if running.pid != 0 && running.is_dead(None) {
                break;
            }
            if tokio::time::Instant::now() > by {
                warn!(
                    id,
                    pid = running.pid,
                    "a foreign shim does not exit by itself: it is killed"
                );
                running.kill();
                break;
            }
            let gone = tokio::time::timeout(Duration::from_millis(20), client.closed()).await;
            if gone.is_ok() && running.pid == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        lock(&self.foreign.clients).remove(&running.endpoint.address);
        remove_dead_socket(&running.endpoint.address);
    }

    /// Whether the shim at that address has anything else of ours.
    fn others_use(&self, address: &str, id: &str) -> bool {
        let Ok(entries) = fs::read_dir(&self.bundles) else { return true };
        entries.flatten().any(|entry| {
            let name = entry.file_name();
            let other = Mark::load(&Bundle::new(entry.path())).and_then(|mark| mark.running);
            name != *id && other.is_some_and(|running| running.endpoint.address == address)
        })
    }
}

/// Kills what a failed start of a shim has left running: processes of that binary with that `-id`,
/// which is random.
fn kill_strays(shim: &Path, id: &str) {
    let Ok(entries) = fs::read_dir("/proc") else { return };
    for pid in entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
        let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        if is_shim_of(&line, shim, id) {
            warn!(pid, id, shim = %shim.display(), "killing what a failed start has left");
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
    }
}

/// Whether a command line is that shim's, called for that id. An interpreter may come before it.
fn is_shim_of(line: &[u8], shim: &Path, id: &str) -> bool {
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    let is_shim = words.contains(&shim.as_os_str().as_encoded_bytes());
    let has_id = words.windows(2).any(|pair| pair[0] == b"-id" && pair[1] == id.as_bytes());
    is_shim && has_id
}

/// Kills a container and deletes it. How it ended, if the shim still knew it.
async fn end_task(client: &Client, id: &str) -> Result<Option<Exited>, client::Error> {
    let gone = |error: &client::Error| matches!(error.kind(), ErrorKind::NotFound);
    match client.delete(id, "").await {
        Ok(ended) => return Ok(Some(ended)),
        Err(error) if gone(&error) => return Ok(None),
        // It runs.
        Err(_) => {}
    }
    match client.kill(id, "", libc::SIGKILL as u32, true).await {
        Ok(()) => {}
        Err(error) if gone(&error) => {}
        Err(error) => return Err(error),
    }
    let waited = tokio::time::timeout(KILLED, client.wait(id, "")).await;
    match client.delete(id, "").await {
        Ok(ended) => Ok(Some(ended)),
        Err(error) if gone(&error) => Ok(waited.ok().and_then(Result::ok)),
        Err(error) => Err(error),
    }
}

/// Removes the socket of a shim that is gone: one that was killed has left it.
fn remove_dead_socket(address: &str) {
    let path = address.trim_start_matches("ttrpc+").strip_prefix("unix://").unwrap_or(address);
    if !path.starts_with('/') {
        return;
    }
    let refused = std::os::unix::net::UnixStream::connect(path)
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    if refused {
        let _ = fs::remove_file(path);
    }
}

/// Makes the directories of a bundle whose id is its name, below a pod's.
pub fn nested_bundle(bundle: &Bundle) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o711).create(bundle.dir())?;
    match fs::DirBuilder::new().mode(0o711).create(bundle.rootfs()) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Sandboxing;

    #[test]
    fn a_pid_that_is_anothers_by_now_is_not_taken_for_the_shim() {
        let endpoint = Endpoint { address: "unix:///nonexistent".into(), version: 2 };
        let me = std::process::id();
        let born = born(me).unwrap();
        let running = |pid, born| Running { endpoint: endpoint.clone(), pid, born };
        assert!(!running(me, born).is_dead(None));
        assert!(running(me, born + 1).is_dead(None));
        assert!(running(u32::MAX >> 2, born).is_dead(None));
        let refused = client::Error::Closed { call: "connect" };
        assert!(running(0, 0).is_dead(Some(&refused)));
        assert!(!running(0, 0).is_dead(None));
    }

    #[test]
    fn only_the_shim_of_the_failed_start_is_killed() {
        let shim = Path::new("/usr/bin/shim");
        let is = |line: &str| is_shim_of(line.replace(' ', "\0").as_bytes(), shim, "abc");
        assert!(is("/usr/bin/shim -namespace k8s.io -id abc -address /s"));
        assert!(is("/bin/sh /usr/bin/shim -id abc start"));
        for other in [
            "containerd-shim-holdfast-v2 -namespace k8s.io -id abc serve",
            "/usr/bin/shim -id abcd start",
            "/usr/bin/shim -namespace abc",
            "less /usr/bin/shim abc",
            "",
        ] {
            assert!(!is(other), "{other}");
        }
    }

    #[test]
    fn options_name_the_file_as_kata_reads_it() {
        let handler = ForeignHandler {
            shim: "containerd-shim-kata-v2".into(),
            path: None,
            options: Some("/etc/kata.toml".into()),
            sandbox: Sandboxing::Container,
            privileged_without_host_devices: false,
        };
        let any = shim_options(&handler).unwrap();
        assert_eq!(any.type_url, "runtimeoptions.v1.Options");
        assert_eq!(any.value, [&[0x12, 14][..], b"/etc/kata.toml"].concat());
        assert!(shim_options(&ForeignHandler { options: None, ..handler }).is_none());
    }

    #[test]
    fn a_mark_reads_as_it_was_stored() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle::new(dir.path());
        assert!(Mark::load(&bundle).is_none());
        let handler: ForeignHandler = serde_json::from_str(r#"{"shim":"/bin/shim"}"#).unwrap();
        let mark = Mark { pod: PodId::random(), handler, running: None };
        mark.store(&bundle).unwrap();
        let read = Mark::load(&bundle).unwrap();
        assert_eq!((read.pod, read.handler), (mark.pod, mark.handler));
    }
}

//! Commands in a running container: [`Exec`] for whoever brings the streams, and [`sync`] for
//! ExecSync, which gives output and exit code.
//!
//! Streams come through two named FIFOs that we make and the shim opens, as the shim contract has
//! it, so this works the same with a shim of somebody else.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use holdfast_shim::client::{Client, ErrorKind, ExecTask};
use nix::sys::stat::Mode;
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    task::JoinHandle,
    time::{Instant, timeout_at},
};
use tracing::warn;

use super::{ContainerView, Error, Pod, Services, foreign, io_at, state::ContainerState};
use crate::{error::chain, id::ContainerId, shims::private_dir, spec};

/// How long an exec's processes may still show themselves after SIGKILL.
const AFTER_KILL: Duration = Duration::from_secs(10);

/// What a command gave back.
#[derive(Debug)]
pub struct ExecOutput {
    /// Its standard output, as far as the limit goes.
    pub stdout: Vec<u8>,
    /// Its standard error; the same.
    pub stderr: Vec<u8>,
    /// Its exit code; 128 + n for signal n.
    pub code: i32,
}

/// The directory with the FIFOs of one exec; removed on drop.
struct Fifos {
    dir: PathBuf,
}

impl Fifos {
    fn make(dir: PathBuf, names: &[&str]) -> io::Result<Self> {
        private_dir(&dir)?;
        let fifos = Self { dir };
        for name in names {
            nix::unistd::mkfifo(&fifos.path(name), Mode::from_bits_truncate(0o600))?;
        }
        Ok(fifos)
    }
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

impl Drop for Fifos {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            warn!(dir = %self.dir.display(), %error, "exec directory stays until the next start");
        }
    }
}

/// What a command is run with.
pub(crate) struct Terms {
    pub(crate) command: Vec<String>,
    pub(crate) tty: bool,
    pub(crate) stdin: bool,
}

/// A command that the shim knows of.
pub(crate) struct Exec {
    client: Mutex<Client>,
    pod: Pod,
    container: ContainerId,
    name: String,
    _fifos: Fifos,
}

/// Our ends of its streams.
pub(crate) struct Pipes {
    pub(crate) stdin: Option<pipe::Sender>,
    pub(crate) stdout: pipe::Receiver,
    pub(crate) stderr: Option<pipe::Receiver>,
}

impl Exec {
    /// Hands a command to the shim, which does not run it yet. Must be followed by [`Exec::reap`].
    pub(crate) async fn register(
        services: &Services,
        pod: &Pod,
        container: &ContainerView,
        terms: Terms,
    ) -> Result<(Self, Pipes), Error> {
        let record = &container.record;
        let id = &record.id;
        if !matches!(record.state, ContainerState::Running { .. }) {
            return Err(Error::Wrong {
                id: id.clone(),
                state: record.state.name(),
                what: "a command can only be run in a running container",
            });
        }
        let client = foreign::tasks(services, pod, id).await?;
        let name = hex::encode(rand::random::<[u8; 16]>());

        let config = services.shims.container_bundle(id).config();
        let spec = std::fs::read(&config).map_err(io_at("read", &config))?;
        let spec: oci_spec::runtime::Spec = serde_json::from_slice(&spec)
            .and_then(|spec| super::nri::typed(&spec))
            .map_err(|e| io_at("parse", &config)(io::Error::new(io::ErrorKind::InvalidData, e)))?;
        let process = spec::process_for_exec(&spec, &terms.command, terms.tty);
        let process = serde_json::to_vec(&process).expect("a process serialises");

        let dir = services.config.state.join("exec").join(&name);
        // A terminal has one output.
        let names: &[&str] = match (terms.stdin, terms.tty) {
            (false, false) => &["stdout", "stderr"],
            (false, true) => &["stdout"],
            (true, false) => &["stdin", "stdout", "stderr"],
            (true, true) => &["stdin", "stdout"],
        };
        let fifos = Fifos::make(dir.clone(), names).map_err(io_at("make FIFOs in", &dir))?;
        // Ours first, so that the shim's open does not wait for us.
        let reader = |name| {
            let path = fifos.path(name);
            pipe::OpenOptions::new().open_receiver(&path).map_err(io_at("open", &path))
        };
        let pipes = Pipes {
            stdin: match terms.stdin {
                false => None,
                true => {
                    let path = fifos.path("stdin");
                    // Read-write: there is no reader yet, and none must be waited for (fifo(7)).
                    let open = pipe::OpenOptions::new().read_write(true).open_sender(&path);
                    Some(open.map_err(io_at("open", &path))?)
                }
            },
            stdout: reader("stdout")?,
            stderr: if terms.tty { None } else { Some(reader("stderr")?) },
        };
        let path_if = |there: bool, name| match there {
            true => fifos.path(name).display().to_string(),
            false => String::new(),
        };
        let task = ExecTask {
            terminal: terms.tty,
            stdin: path_if(terms.stdin, "stdin"),
            stdout: path_if(true, "stdout"),
            stderr: path_if(!terms.tty, "stderr"),
            process,
        };
        let exec = Self {
            client: Mutex::new(client.clone()),
            pod: pod.clone(),
            container: id.clone(),
            name,
            _fifos: fifos,
        };
        client
            .exec(id.as_str(), &exec.name, task)
            .await
            .map_err(|source| exec.failed("exec in", source))?;
        Ok((exec, pipes))
    }

    fn failed(&self, what: &'static str, source: holdfast_shim::client::Error) -> Error {
        Error::Task { what, id: self.container.clone(), source }
    }

    /// Runs it.
    pub(crate) async fn start(&self) -> Result<(), Error> {
        let started = self.client().start(self.container.as_str(), &self.name).await;
        started.map(drop).map_err(|source| self.failed("exec in", source))
    }

    /// Its exit code, when it has ended.
    pub(crate) async fn wait(&self) -> Result<i32, Error> {
        loop {
            let client = self.client();
            match client.wait(self.container.as_str(), &self.name).await {
                Ok(exited) => return Ok(exited.status as i32),
                // The shim died, and the command did not: another has taken over.
                Err(error) if error.kind() == ErrorKind::Closed => {
                    let next = self.pod.client_after(&client).await?;
                    *self.client.lock().unwrap_or_else(|e| e.into_inner()) = next;
                }
                Err(source) => return Err(self.failed("wait for a command in", source)),
            }
        }
    }

    fn client(&self) -> Client {
        self.client.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Sets the size of its terminal. That it has ended is no error.
    pub(crate) async fn resize(&self, width: u16, height: u16) {
        let (width, height) = (u32::from(width), u32::from(height));
        let resized =
            self.client().resize(self.container.as_str(), &self.name, width, height).await;
        self.note("resize the terminal of", resized);
    }

    /// Ends its standard input, once our own end is closed too.
    pub(crate) async fn close_stdin(&self) {
        let closed = self.client().close_stdin(self.container.as_str(), &self.name).await;
        self.note("close the standard input of", closed);
    }

    /// Signals it; with SIGKILL its children too.
    pub(crate) async fn signal(&self, signal: i32) {
        let all = signal == libc::SIGKILL;
        let (id, signal) = (self.container.as_str(), signal as u32);
        let sent = self.client().kill(id, &self.name, signal, all).await;
        self.note("signal", sent);
    }

    /// Kills it and waits until it is gone.
    async fn end(&self) {
        self.signal(libc::SIGKILL).await;
        if tokio::time::timeout(AFTER_KILL, self.wait()).await.is_err() {
            let container = self.container.short();
            warn!(container, "a command still runs {AFTER_KILL:?} after SIGKILL");
        }
    }

    /// Frees what the shim holds of it.
    pub(crate) async fn reap(self) {
        let deleted = self.client().delete(self.container.as_str(), &self.name).await;
        self.note("delete", deleted);
    }

    fn note<T>(&self, what: &str, result: Result<T, holdfast_shim::client::Error>) {
        match result {
            Ok(_) => {}
            // It, or its container, ended.
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Closed) => {}
            Err(error) => {
                warn!(container = self.container.short(), error = %chain(&error), "{what} a command");
            }
        }
    }
}

/// Runs a command and gives its output. Always reaps it, whatever happens.
pub(super) async fn sync(
    services: Arc<Services>,
    pod: Pod,
    container: Arc<ContainerView>,
    command: Vec<String>,
    timeout: Option<Duration>,
) -> Result<ExecOutput, Error> {
    let begun = Instant::now();
    let id = container.record.id.clone();
    let timed_out = |after| Error::Timeout { what: "the command", id: id.clone(), after };
    let terms = Terms { command, tty: false, stdin: false };
    let (exec, pipes) = Exec::register(&services, &pod, &container, terms).await?;
    let mut starting = Box::pin(async move {
        let started = exec.start().await;
        (exec, started)
    });
    let (exec, started) = match timeout {
        None => starting.await,
        Some(after) => match timeout_at(begun + after, &mut starting).await {
            Ok(done) => done,
            Err(_) => {
                // The runtime is slow, or hangs. The answer does not wait for it, the clean-up does.
                tokio::spawn(async move {
                    let (exec, started) = starting.await;
                    if started.is_ok() {
                        exec.end().await;
                    }
                    exec.reap().await;
                });
                return Err(timed_out(after));
            }
        },
    };
    let result = async {
        started?;
        let limit = services.config.runtime.exec_output_limit;
        let stdout = Stream::read(pipes.stdout, limit);
        let stderr = pipes.stderr.map(|stderr| Stream::read(stderr, limit));
        let code = match timeout {
            None => exec.wait().await?,
            Some(after) => match timeout_at(begun + after, exec.wait()).await {
                Ok(code) => code?,
                Err(_) => {
                    exec.end().await;
                    return Err(timed_out(after));
                }
            },
        };
        // A child of the command may hold the pipes for ever: what it writes later is not ours.
        let drained = Instant::now() + services.config.runtime.exec_drain;
        let stderr = async {
            match stderr {
                Some(stderr) => stderr.take(drained).await,
                None => Vec::new(),
            }
        };
        let (stdout, stderr) = tokio::join!(stdout.take(drained), stderr);
        Ok(ExecOutput { stdout, stderr, code })
    }
    .await;
    exec.reap().await;
    result
}

/// One stream's output: a task reads it, so that what was read is kept when the waiting for its end
/// is given up.
struct Stream {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Stream {
    fn read(mut pipe: pipe::Receiver, limit: usize) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let kept = bytes.clone();
        let reader = tokio::spawn(async move {
            let mut piece = [0; 16 << 10];
            // An error of the pipe is the end of it.
            while let Ok(n @ 1..) = pipe.read(&mut piece).await {
                let mut kept = kept.lock().unwrap_or_else(|e| e.into_inner());
                // Beyond the limit it is still read, so that the command does not hang.
                let room = limit.saturating_sub(kept.len());
                kept.extend_from_slice(&piece[..n.min(room)]);
            }
        });
        Self { bytes, reader }
    }

    /// What there is when the stream ends, or at the deadline.
    async fn take(mut self, deadline: Instant) -> Vec<u8> {
        // Whether it ended or not: what was read is what is given.
        let _ = timeout_at(deadline, &mut self.reader).await;
        std::mem::take(&mut *self.bytes.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

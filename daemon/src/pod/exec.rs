//! ExecSync: one command in a running container, its output and its exit code.
//!
//! Output comes through two named FIFOs that we make and the shim opens, as the shim contract has
//! it, so this works the same with a shim of somebody else.

use std::{
    io,
    path::{Path, PathBuf},
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

use super::{ContainerView, Error, Pod, Services, state::ContainerState};
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
    fn make(dir: PathBuf) -> io::Result<Self> {
        private_dir(&dir)?;
        let fifos = Self { dir };
        for path in [fifos.stdout(), fifos.stderr()] {
            nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600))?;
        }
        Ok(fifos)
    }
    fn stdout(&self) -> PathBuf {
        self.dir.join("stdout")
    }
    fn stderr(&self) -> PathBuf {
        self.dir.join("stderr")
    }
}

impl Drop for Fifos {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            warn!(dir = %self.dir.display(), %error, "exec directory stays until the next start");
        }
    }
}

/// Runs it. Always reaps it, whatever happens.
pub(super) async fn sync(
    services: Arc<Services>,
    pod: Pod,
    container: Arc<ContainerView>,
    command: Vec<String>,
    timeout: Option<Duration>,
) -> Result<ExecOutput, Error> {
    let record = &container.record;
    let id = &record.id;
    if !matches!(record.state, ContainerState::Running { .. }) {
        return Err(Error::Wrong {
            id: id.clone(),
            state: record.state.name(),
            what: "a command can only be run in a running container",
        });
    }
    let begun = Instant::now();
    let client = pod.client().await?;
    let exec = hex::encode(rand::random::<[u8; 16]>());

    let config = services.shims.container_bundle(id).config();
    let spec = std::fs::read(&config).map_err(io_at("read", &config))?;
    let spec: oci_spec::runtime::Spec = serde_json::from_slice(&spec)
        .map_err(|e| io_at("parse", &config)(io::Error::new(io::ErrorKind::InvalidData, e)))?;
    let process = spec::process_for_exec(&spec, &command, false);
    let process = serde_json::to_vec(&process).expect("a process serialises");

    let dir = services.config.state.join("exec").join(&exec);
    let fifos = Fifos::make(dir.clone()).map_err(io_at("make FIFOs in", &dir))?;
    // Readers first, so that the shim's open does not wait for us.
    let open = |path: PathBuf| {
        pipe::OpenOptions::new().open_receiver(&path).map_err(io_at("open", &path))
    };
    let (stdout, stderr) = (open(fifos.stdout())?, open(fifos.stderr())?);

    let task = ExecTask {
        terminal: false,
        stdin: String::new(),
        stdout: fifos.stdout().display().to_string(),
        stderr: fifos.stderr().display().to_string(),
        process,
    };
    let shim = |what| move |source| Error::Task { what, id: id.clone(), source };
    client.exec(id.as_str(), &exec, task).await.map_err(shim("exec in"))?;
    let result = async {
        client.start(id.as_str(), &exec).await.map_err(shim("exec in"))?;
        let limit = services.config.runtime.exec_output_limit;
        let stdout = Stream::read(stdout, limit);
        let stderr = Stream::read(stderr, limit);
        let exited = client.wait(id.as_str(), &exec);
        let exited = match timeout {
            None => exited.await,
            Some(after) => match timeout_at(begun + after, exited).await {
                Ok(exited) => exited,
                Err(_) => {
                    end(&client, id, &exec).await;
                    return Err(Error::Timeout { what: "the command", id: id.clone(), after });
                }
            },
        };
        let exited = exited.map_err(shim("wait for a command in"))?;
        // A child of the command may hold the pipes for ever: what it writes later is not ours.
        let drained = Instant::now() + services.config.runtime.exec_drain;
        let (stdout, stderr) = tokio::join!(stdout.take(drained), stderr.take(drained));
        Ok(ExecOutput { stdout, stderr, code: exited.status as i32 })
    }
    .await;
    match client.delete(id.as_str(), &exec).await {
        Ok(_) => {}
        // The container ended, and its execs with it.
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Closed) => {}
        Err(error) => warn!(container = id.short(), error = %chain(&error), "delete exec"),
    }
    result
}

fn io_at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
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

/// Kills the command and its children and waits until they are gone.
async fn end(client: &Client, id: &ContainerId, exec: &str) {
    if let Err(error) = client.kill(id.as_str(), exec, libc::SIGKILL as u32, true).await {
        // Not found: it ended by itself just now.
        if error.kind() != ErrorKind::NotFound {
            warn!(container = id.short(), error = %chain(&error), "kill a command at its timeout");
        }
    }
    let exited = tokio::time::timeout(AFTER_KILL, client.wait(id.as_str(), exec)).await;
    if exited.is_err() {
        warn!(container = id.short(), "a command still runs {AFTER_KILL:?} after SIGKILL");
    }
}

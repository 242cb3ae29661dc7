//! The daemon's way to a shim: starting one by the binary contract, and typed calls over ttrpc.
//!
//! Works with our shim and with foreign ones: the dialects of `start` are in [`Command`], the
//! versions of the Task service in [`Client`].

use std::{
    collections::HashMap,
    future::Future,
    io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    pin::Pin,
    process::Stdio,
    sync::{
        Arc, LazyLock, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use holdfast_protos::shim::{
    api,
    bootstrap_api::{BootstrapParams, BootstrapResult, Extension},
    protobuf::{
        Message, MessageField,
        well_known_types::{any::Any, empty::Empty, timestamp::Timestamp},
    },
    sandbox_api as sandbox,
    ttrpc::{
        self, Code,
        asynchronous::{Client as Connection, transport::Socket},
    },
    types,
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::UnixStream,
    process,
    sync::watch,
};

/// What a caller can do about an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// There is no such container, exec or pod (any more).
    NotFound,
    /// There is one of that name already.
    AlreadyExists,
    /// It is not in a state that allows this.
    Precondition,
    /// The request is wrong and will stay wrong.
    Invalid,
    /// The shim cannot do that.
    Unimplemented,
    /// The deadline passed; what was asked may still happen.
    Deadline,
    /// Space, descriptors, processes or memory have run out.
    Exhausted,
    /// The shim is gone, or the connection to it is.
    Closed,
    /// Anything else.
    Other,
}

/// Descriptors, processes or memory have run out.
fn is_want(error: &io::Error) -> bool {
    use libc::{EAGAIN, EMFILE, ENFILE, ENOMEM};
    matches!(error.raw_os_error(), Some(EAGAIN | EMFILE | ENFILE | ENOMEM))
}

/// A call to a shim that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The shim said so.
    #[error("shim {call}: {message}")]
    Refused {
        /// What was called.
        call: &'static str,
        /// The shim's reason.
        kind: ErrorKind,
        /// The shim's words.
        message: String,
    },
    /// No answer in time.
    #[error("shim {call}: no answer within {deadline:?}")]
    Deadline {
        /// What was called.
        call: &'static str,
        /// How long we waited.
        deadline: Duration,
    },
    /// The connection broke before an answer came.
    #[error("shim {call}: the connection is closed")]
    Closed {
        /// What was called.
        call: &'static str,
    },
    /// The socket or the binary could not be used.
    #[error("shim {call}")]
    Io {
        /// What was called.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The binary could not be run.
    #[error("run {}", binary.display())]
    Spawn {
        /// The binary.
        binary: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The binary ran and ended with an error, or answered something that is no answer.
    #[error("{} {action}: {message}", binary.display())]
    Binary {
        /// The binary.
        binary: PathBuf,
        /// `start`, `delete` or `-info`.
        action: &'static str,
        /// Its standard error, or what is wrong with its answer.
        message: String,
    },
}

impl Error {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Refused { kind, .. } => *kind,
            Error::Deadline { .. } => ErrorKind::Deadline,
            Error::Closed { .. } => ErrorKind::Closed,
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound
                | io::ErrorKind::ConnectionRefused
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::UnexpectedEof => ErrorKind::Closed,
                _ if is_want(source) => ErrorKind::Exhausted,
                _ => ErrorKind::Other,
            },
            Error::Spawn { source, .. } => match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => ErrorKind::Invalid,
                _ if is_want(source) => ErrorKind::Exhausted,
                _ => ErrorKind::Other,
            },
            Error::Binary { .. } => ErrorKind::Other,
        }
    }

    /// A refusal on the control socket: `<kind>: <text>`, as `server` writes it.
    pub(crate) fn refused(call: &'static str, text: &str) -> Self {
        let (kind, message) = match text.split_once(": ") {
            Some(("not found", rest)) => (ErrorKind::NotFound, rest),
            Some(("precondition", rest)) => (ErrorKind::Precondition, rest),
            Some(("invalid", rest)) => (ErrorKind::Invalid, rest),
            Some(("unsupported", rest)) => (ErrorKind::Unimplemented, rest),
            _ => (ErrorKind::Other, text),
        };
        Error::Refused { call, kind, message: message.to_owned() }
    }

    fn from_ttrpc(call: &'static str, deadline: Option<Duration>, error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => {
                let kind = match status.code() {
                    // What ttrpc for Rust says of a method that a shim does not have.
                    _ if lacks_method(&status.message) => ErrorKind::Unimplemented,
                    Code::NOT_FOUND => ErrorKind::NotFound,
                    Code::ALREADY_EXISTS => ErrorKind::AlreadyExists,
                    Code::FAILED_PRECONDITION | Code::ABORTED => ErrorKind::Precondition,
                    Code::INVALID_ARGUMENT
                        if status.message.ends_with("service does not exist") =>
                    {
                        ErrorKind::Unimplemented
                    }
                    Code::INVALID_ARGUMENT | Code::OUT_OF_RANGE => ErrorKind::Invalid,
                    Code::UNIMPLEMENTED => ErrorKind::Unimplemented,
                    Code::RESOURCE_EXHAUSTED => ErrorKind::Exhausted,
                    Code::DEADLINE_EXCEEDED => match deadline {
                        Some(deadline) => return Error::Deadline { call, deadline },
                        None => ErrorKind::Deadline,
                    },
                    _ => ErrorKind::Other,
                };
                Error::Refused { call, kind, message: status.message.clone() }
            }
            ttrpc::Error::Others(message) => {
                Error::Refused { call, kind: ErrorKind::Other, message }
            }
            ttrpc::Error::Socket(_)
            | ttrpc::Error::Nix(_)
            | ttrpc::Error::LocalClosed
            | ttrpc::Error::RemoteClosed
            | ttrpc::Error::Eof => Error::Closed { call },
        }
    }
}

/// Whether the words of a refusal are those of ttrpc for Rust for a service or a method that is not
/// there: `/service/Method does not exist`, `/service/Method is not supported`. Their codes are those
/// of a bad argument and of a container that is gone.
fn lacks_method(message: &str) -> bool {
    let method = message
        .strip_suffix(" does not exist")
        .or_else(|| message.strip_suffix(" is not supported"));
    method.is_some_and(|method| {
        method.starts_with("/containerd.") && !method.contains(char::is_whitespace)
    })
}

/// Where a running shim listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// `unix://…`, `vsock://…`, or (legacy) the name of an abstract unix socket.
    pub address: String,
    /// Version of the Task service, 2 or 3.
    pub version: u32,
}

/// How a process of a container ended, as the wire tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exited {
    /// Its host pid; 0 where the call does not tell.
    pub pid: u32,
    /// Code, or 128 + signal.
    pub status: u32,
    /// When; 1970 when the shim does not know.
    pub at: SystemTime,
}

/// The OCI runtime and shim behind a binary, as `-info` tells it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RuntimeInfo {
    /// Name of the shim.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its source revision.
    pub revision: String,
    /// The OCI runtime's `features` as JSON, when told.
    pub features: Option<Vec<u8>>,
    /// Further facts.
    pub annotations: HashMap<String, String>,
}

/// What a binary understands on the standard input of `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dialect {
    /// Runtime options as `Any`, or nothing.
    Options,
    /// `BootstrapParams`.
    Bootstrap,
}

/// Which file a binary is: replaced by an upgrade, it may speak another dialect.
type Identity = (PathBuf, u64, u64, i64, i64);

static DIALECTS: LazyLock<Mutex<HashMap<Identity, Dialect>>> = LazyLock::new(Mutex::default);

/// The shim binary, called for one container or pod.
#[derive(Clone, Debug, Default)]
pub struct Command {
    /// The shim.
    pub binary: PathBuf,
    /// containerd namespace ("k8s.io").
    pub namespace: String,
    /// Id of the container or pod.
    pub id: String,
    /// Its bundle, which is the working directory.
    pub bundle: PathBuf,
    /// The daemon's TTRPC socket, where the shim forwards events to.
    pub events: PathBuf,
    /// The daemon's GRPC socket. Part of the shim's socket name, so it must stay the same.
    pub grpc: PathBuf,
    /// The daemon's own binary, for shims that publish by running it.
    pub publish_binary: PathBuf,
    /// Runtime options.
    pub options: Option<Any>,
    /// Further environment of the shim.
    pub env: Vec<(String, String)>,
    /// Ask for a debug log.
    pub debug: bool,
    /// Where the shim's socket is to be; empty: the shim's own choice.
    pub socket_dir: PathBuf,
}

/// Most that is read of a shim's standard output or standard error.
const OUTPUT_MAX: u64 = 4 * 1024 * 1024;

impl Command {
    /// Starts the shim, or finds the one that already runs for this group.
    ///
    /// Old and new shims want different things on standard input. Options (or nothing) are tried
    /// first, because the only shims that refuse them do so before they start anything; then,
    /// after a `delete`, `BootstrapParams`. What worked is remembered per binary.
    ///
    /// # Errors
    /// The binary cannot be run, fails, or gives no usable address within `deadline`. What a
    /// failed start left behind has been deleted, as far as the binary's `delete` can.
    pub async fn start(&self, deadline: Duration) -> Result<Endpoint, Error> {
        let by = tokio::time::Instant::now() + deadline;
        let left = || by.saturating_duration_since(tokio::time::Instant::now());
        let identity = self.identity();
        let known = identity.as_ref().and_then(|identity| {
            DIALECTS.lock().unwrap_or_else(PoisonError::into_inner).get(identity).copied()
        });
        let first = known.unwrap_or(Dialect::Options);
        let mut result = self.start_as(first, deadline).await;
        let mut spoken = first;
        if matches!(result, Err(Error::Binary { .. })) && known.is_none() {
            let _ = self.delete(left()).await;
            if let Ok(endpoint) = self.start_as(Dialect::Bootstrap, left()).await {
                result = Ok(endpoint);
                spoken = Dialect::Bootstrap;
            }
        }
        match (&result, identity) {
            (Ok(_), Some(identity)) => {
                DIALECTS.lock().unwrap_or_else(PoisonError::into_inner).insert(identity, spoken);
            }
            (Err(_), _) => {
                let _ = self.delete(left().max(Duration::from_secs(5))).await;
            }
            (Ok(_), None) => {}
        }
        result
    }

    /// Starts our own shim where one has died. What that one left behind stays as it is, also after an
    /// error.
    ///
    /// # Errors
    /// As [`Command::start`].
    pub async fn start_again(&self, deadline: Duration) -> Result<Endpoint, Error> {
        self.start_as(Dialect::Options, deadline).await
    }

    async fn start_as(&self, dialect: Dialect, deadline: Duration) -> Result<Endpoint, Error> {
        let input = match dialect {
            Dialect::Options => self.options_bytes(),
            Dialect::Bootstrap => {
                let mut params = BootstrapParams::new();
                params.instance_id = self.id.clone();
                params.namespace = self.namespace.clone();
                params.containerd_ttrpc_address = text(&self.events);
                params.containerd_grpc_address = text(&self.grpc);
                params.containerd_binary = text(&self.publish_binary);
                if !self.socket_dir.as_os_str().is_empty() {
                    params.socket_dir = Some(text(&self.socket_dir));
                }
                params.extensions = self
                    .options
                    .iter()
                    .map(|options| {
                        let mut extension = Extension::new();
                        extension.value = MessageField::some(options.clone());
                        extension
                    })
                    .collect();
                params.write_to_bytes().unwrap_or_default()
            }
        };
        let output = self.run("start", &["start"], input, deadline).await?;
        parse_endpoint(&output).ok_or_else(|| Error::Binary {
            binary: self.binary.clone(),
            action: "start",
            message: format!(
                "no shim address in its answer {:?}",
                String::from_utf8_lossy(&output)
            ),
        })
    }

    /// Cleans up after a shim that is gone: kills what is left, unmounts, removes.
    ///
    /// # Errors
    /// The binary cannot be run, fails, or does not end within `deadline`.
    pub async fn delete(&self, deadline: Duration) -> Result<Exited, Error> {
        let bundle = text(&self.bundle);
        let output = self
            .run("delete", &["-bundle", &bundle, "delete"], self.options_bytes(), deadline)
            .await?;
        let reply = api::DeleteResponse::parse_from_bytes(&output).map_err(|_| Error::Binary {
            binary: self.binary.clone(),
            action: "delete",
            message: "its answer is no DeleteResponse".into(),
        })?;
        Ok(Exited { pid: reply.pid, status: reply.exit_status, at: time(&reply.exited_at) })
    }

    /// What the binary says about itself and its OCI runtime.
    ///
    /// # Errors
    /// As [`Command::delete`].
    pub async fn info(&self, deadline: Duration) -> Result<RuntimeInfo, Error> {
        let output = self.run("-info", &["-info"], self.options_bytes(), deadline).await?;
        let info = types::introspection::RuntimeInfo::parse_from_bytes(&output).map_err(|_| {
            Error::Binary {
                binary: self.binary.clone(),
                action: "-info",
                message: "its answer is no RuntimeInfo".into(),
            }
        })?;
        Ok(RuntimeInfo {
            name: info.name,
            version: info.version.version.clone(),
            revision: info.version.revision.clone(),
            features: info.features.into_option().map(|features| features.value),
            annotations: info.annotations,
        })
    }

    /// Makes the FIFO that foreign shims write their own log to (`log` in the bundle), and opens
    /// it so that they never block on it. Read it, or drop it when the shim has ended.
    ///
    /// # Errors
    /// The FIFO cannot be made or opened.
    pub fn open_log(&self) -> io::Result<std::fs::File> {
        let path = crate::bundle::Bundle::new(&self.bundle).shim_log();
        match nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)?;
        if !file.metadata()?.file_type().is_fifo() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the shim's log is no FIFO"));
        }
        Ok(file)
    }

    fn identity(&self) -> Option<Identity> {
        let meta = std::fs::metadata(&self.binary).ok()?;
        Some((self.binary.clone(), meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec()))
    }

    fn options_bytes(&self) -> Vec<u8> {
        self.options.as_ref().and_then(|any| any.write_to_bytes().ok()).unwrap_or_default()
    }

    async fn run(
        &self,
        action: &'static str,
        arguments: &[&str],
        input: Vec<u8>,
        deadline: Duration,
    ) -> Result<Vec<u8>, Error> {
        let spawn = |source| Error::Spawn { binary: self.binary.clone(), source };
        let io = |source| Error::Io { call: action, source };
        let mut command = process::Command::new(&self.binary);
        command
            .arg("-namespace")
            .arg(&self.namespace)
            .arg("-address")
            .arg(&self.grpc)
            .arg("-publish-binary")
            .arg(&self.publish_binary)
            .arg("-id")
            .arg(&self.id);
        if self.debug {
            command.arg("-debug");
        }
        command
            .args(arguments)
            .env("GOMAXPROCS", "2")
            .env("MAX_SHIM_VERSION", "2")
            .env("TTRPC_ADDRESS", &self.events)
            .env("GRPC_ADDRESS", &self.grpc)
            .env("NAMESPACE", &self.namespace);
        if !self.socket_dir.as_os_str().is_empty() {
            command.env("HOLDFAST_SHIM_SOCKET_DIR", &self.socket_dir);
        }
        command
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        if action != "-info" {
            // `delete` of a bundle that is gone must still run.
            let cwd = if self.bundle.is_dir() { &*self.bundle } else { Path::new("/") };
            command.current_dir(cwd);
        }
        let mut child = command.spawn().map_err(spawn)?;
        let group = child.id().map(|pid| nix::unistd::Pid::from_raw(pid.cast_signed()));
        let mut stdin = child.stdin.take().expect("standard input is piped");
        let stdout = child.stdout.take().expect("standard output is piped");
        let stderr = child.stderr.take().expect("standard error is piped");

        let whole = async {
            let feed = async move {
                // A shim that does not care for its input may have closed it.
                let _ = stdin.write_all(&input).await;
                drop(stdin);
            };
            let (mut out, mut err) = (Vec::new(), Vec::new());
            let (mut stdout, mut stderr) = (stdout.take(OUTPUT_MAX), stderr.take(OUTPUT_MAX));
            let ended = tokio::sync::Notify::new();
            let reading = async {
                tokio::select! {
                    biased;
                    _ = async {
                        tokio::join!(
                            stdout.read_to_end(&mut out),
                            stderr.read_to_end(&mut err),
                        )
                    } => {}
                    // Its end is what counts; a daemonised child may hold the pipes for ever.
                    () = async {
                        ended.notified().await;
                        tokio::time::sleep(Duration::from_millis(500)).await;
                    } => {}
                }
            };
            let waiting = async {
                let ((), status) = tokio::join!(feed, child.wait());
                ended.notify_one();
                status
            };
            let (status, ()) = tokio::join!(waiting, reading);
            let status = status.map_err(io)?;
            Ok::<_, Error>((status, out, err))
        };
        let (status, out, err) = match tokio::time::timeout(deadline, whole).await {
            Ok(done) => done?,
            Err(_) => {
                // What it has started to do its work goes with it; a shim that it has left behind
                // is in a group of its own.
                if let Some(group) = group {
                    let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
                }
                return Err(Error::Deadline { call: action, deadline });
            }
        };
        if !status.success() {
            let said = String::from_utf8_lossy(if err.is_empty() { &out } else { &err })
                .trim()
                .replace('\n', "; ");
            let message = if said.is_empty() { status.to_string() } else { said };
            return Err(Error::Binary { binary: self.binary.clone(), action, message });
        }
        Ok(out)
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The endpoint in what `start` wrote: JSON, an address, or a `BootstrapResult`.
fn parse_endpoint(output: &[u8]) -> Option<Endpoint> {
    #[derive(Deserialize)]
    struct Reply {
        version: u32,
        address: String,
        #[serde(default)]
        protocol: String,
    }
    let endpoint = |version: u32, address: &str, protocol: &str| {
        let known = matches!(protocol, "ttrpc" | "") && (2..=3).contains(&version);
        (known && !address.is_empty()).then(|| Endpoint { address: address.to_owned(), version })
    };
    if let Ok(said) = std::str::from_utf8(output) {
        let said = said.trim();
        if said.starts_with('{') {
            let reply: Reply = serde_json::from_str(said).ok()?;
            return endpoint(reply.version, &reply.address, &reply.protocol);
        }
        let scheme = said.split_once("://").map(|(scheme, _)| scheme);
        if said.starts_with('/')
            || scheme.is_some_and(|s| s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'+'))
        {
            return endpoint(2, said, "ttrpc");
        }
        // Some shims print more than they should; what counts comes last.
        if let Some((_, last)) = said.rsplit_once('\n') {
            return parse_endpoint(last.as_bytes());
        }
    }
    let result = BootstrapResult::parse_from_bytes(output).ok()?;
    endpoint(u32::try_from(result.version).ok()?, &result.address, &result.protocol)
}

/// What a container is to be made of.
#[derive(Clone, Debug, Default)]
pub struct CreateTask {
    /// Container id.
    pub id: String,
    /// Its bundle, with `config.json`.
    pub bundle: PathBuf,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// URI of standard input: see [`crate::options`]; empty: none.
    pub stdin: String,
    /// URI of standard output.
    pub stdout: String,
    /// URI of standard error.
    pub stderr: String,
    /// Mounts that make up the root file system, in order.
    pub rootfs: Vec<types::mount::Mount>,
    /// Runtime options.
    pub options: Option<Any>,
    /// Directory of a checkpoint to restore from; empty: start afresh.
    pub checkpoint: String,
}

/// A further process of a container.
#[derive(Clone, Debug, Default)]
pub struct ExecTask {
    /// Whether it has a terminal.
    pub terminal: bool,
    /// FIFO of standard input; empty: none.
    pub stdin: String,
    /// FIFO of standard output; empty: none.
    pub stdout: String,
    /// FIFO of standard error; empty: none.
    pub stderr: String,
    /// The OCI `Process` as JSON.
    pub process: Vec<u8>,
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskStatus {
    /// The shim does not know.
    Unknown,
    /// Made, not started.
    Created,
    /// Running.
    Running,
    /// Ended.
    Stopped,
    /// Frozen.
    Paused,
    /// Being frozen.
    Pausing,
}

/// The state of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskState {
    /// Where it is.
    pub status: TaskStatus,
    /// Its host pid; 0 when it has none.
    pub pid: u32,
    /// How it ended, when it has.
    pub exit: Option<Exited>,
}

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectInfo {
    /// The shim's pid.
    pub shim_pid: u32,
    /// The container's pid; 0 when there is none.
    pub task_pid: u32,
    /// The shim's version.
    pub version: String,
}

/// What a pod is to be made of.
#[derive(Clone, Debug, Default)]
pub struct CreateSandbox {
    /// Pod id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// A network namespace that is there already; empty: none.
    pub netns_path: String,
    /// [`crate::options::PodOptions`] for our shim: see [`CreateSandbox::pod_options`].
    pub options: Option<Any>,
    /// Annotations.
    pub annotations: HashMap<String, String>,
}

impl CreateSandbox {
    /// Packs the options of our shim.
    pub fn pod_options(options: &crate::options::PodOptions) -> Any {
        let mut any = Any::new();
        any.type_url = crate::options::POD_OPTIONS.to_owned();
        any.value = serde_json::to_vec(options).expect("plain data has a JSON form");
        any
    }
}

/// A pod that has been started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SandboxStarted {
    /// Host pid of the pod's init; 0 when it has none.
    pub pid: u32,
    /// When.
    pub created_at: SystemTime,
}

/// The state of a pod as its shim sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxStatus {
    /// Host pid of the pod's init; 0 when it has none.
    pub pid: u32,
    /// `SANDBOX_READY` or `SANDBOX_NOTREADY`.
    pub state: String,
    /// Further facts.
    pub info: HashMap<String, String>,
    /// When it was started.
    pub created_at: SystemTime,
    /// When it ended, if it has.
    pub exited_at: Option<SystemTime>,
}

const TASK_V2: &str = "containerd.task.v2.Task";
const TASK_V3: &str = "containerd.task.v3.Task";
const SANDBOX: &str = "containerd.runtime.sandbox.v1.Sandbox";

/// A connection to a shim. Clones share it. Every call but the waits has the client's deadline,
/// 60 seconds unless [`Client::with_deadline`] says otherwise. A call that is dropped, or whose
/// deadline passes, does not undo what it asked for.
#[derive(Clone)]
pub struct Client {
    connection: Connection,
    /// Ends when the transport has been dropped.
    gone: watch::Receiver<()>,
    deadline: Duration,
    version2: Arc<AtomicBool>,
    pinned: bool,
    observer: Option<&'static Observer>,
}

/// Who watches calls.
#[derive(Debug)]
pub struct Observer {
    /// What a call takes along as ttrpc metadata, asked when it begins.
    pub metadata: fn() -> Vec<(String, String)>,
    /// A call has ended: its name, how long it took, and what went wrong. Waits are not told.
    pub ended: fn(&'static str, Duration, Option<ErrorKind>),
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

type Called<T> = Result<T, Error>;

impl Client {
    /// Tells `observer` of every call.
    #[must_use]
    pub fn with_observer(mut self, observer: &'static Observer) -> Self {
        self.observer = Some(observer);
        self
    }

    /// Connects; a shim that is just starting is waited for, up to `deadline`.
    ///
    /// # Errors
    /// Nobody listens there by `deadline`, or the address is none.
    pub async fn connect(endpoint: &Endpoint, deadline: Duration) -> Called<Client> {
        let io = |source| Error::Io { call: "connect", source };
        let socket = tokio::time::timeout(deadline, open(&endpoint.address))
            .await
            .map_err(|_| Error::Deadline { call: "connect", deadline })?
            .map_err(io)?;
        let (sender, gone) = watch::channel(());
        let connection = Connection::new(Socket::new(Watched { socket, _alive: sender }));
        Ok(Client {
            connection,
            gone,
            deadline: Duration::from_secs(60),
            version2: Arc::new(AtomicBool::new(endpoint.version < 3)),
            pinned: false,
            observer: None,
        })
    }

    /// The same connection with another deadline for its calls.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The same connection, which asks for the version of its endpoint and no other: a shim that
    /// promises version 3 and has only 2 is then refused instead of taken.
    #[must_use]
    pub fn pinned(mut self) -> Self {
        self.pinned = true;
        self
    }

    /// Whether it is the same connection.
    pub fn is(&self, other: &Client) -> bool {
        Arc::ptr_eq(&self.version2, &other.version2)
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        self.gone.has_changed().is_err()
    }

    /// Resolves when the connection is gone, at once if it is already.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut gone = self.gone.clone();
        async move { while gone.changed().await.is_ok() {} }
    }

    /// OCI create; gives the pid of the container's first process, which waits to be started.
    ///
    /// # Errors
    /// `AlreadyExists`, `Invalid` (bad configuration), or what the OCI runtime says.
    pub async fn create(&self, task: CreateTask) -> Called<u32> {
        let mut request = api::CreateTaskRequest::new();
        request.id = task.id;
        request.bundle = text(&task.bundle);
        request.rootfs = task.rootfs;
        request.terminal = task.terminal;
        request.stdin = task.stdin;
        request.stdout = task.stdout;
        request.stderr = task.stderr;
        request.checkpoint = task.checkpoint;
        request.options = task.options.into();
        let reply: api::CreateTaskResponse = self.task("create", "Create", &request).await?;
        Ok(reply.pid)
    }

    /// Starts the container (`exec` empty) or an exec; gives its pid.
    ///
    /// # Errors
    /// `NotFound`, `Precondition` (already started or ended), or what the OCI runtime says.
    pub async fn start(&self, id: &str, exec: &str) -> Called<u32> {
        let mut request = api::StartRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec.to_owned();
        let reply: api::StartResponse = self.task("start", "Start", &request).await?;
        Ok(reply.pid)
    }

    /// Removes a container (`exec` empty) or an exec that has ended.
    ///
    /// # Errors
    /// `NotFound`; `Precondition` while it runs.
    pub async fn delete(&self, id: &str, exec: &str) -> Called<Exited> {
        let mut request = api::DeleteRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec.to_owned();
        let reply: api::DeleteResponse = self.task("delete", "Delete", &request).await?;
        Ok(Exited { pid: reply.pid, status: reply.exit_status, at: time(&reply.exited_at) })
    }

    /// Registers an exec, to be started by [`Client::start`].
    ///
    /// # Errors
    /// `NotFound`, `AlreadyExists`, `Precondition` (the container does not run), `Invalid`.
    pub async fn exec(&self, id: &str, exec: &str, task: ExecTask) -> Called<()> {
        let mut request = api::ExecProcessRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec.to_owned();
        request.terminal = task.terminal;
        request.stdin = task.stdin;
        request.stdout = task.stdout;
        request.stderr = task.stderr;
        request.spec = MessageField::some(json_any("Process", task.process));
        self.task::<Empty>("exec", "Exec", &request).await.map(drop)
    }

    /// Sets a terminal's size, in characters.
    ///
    /// # Errors
    /// `NotFound`; `Precondition` when there is no terminal.
    pub async fn resize(&self, id: &str, exec: &str, width: u32, height: u32) -> Called<()> {
        let mut request = api::ResizePtyRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec.to_owned();
        request.width = width;
        request.height = height;
        self.task::<Empty>("resize", "ResizePty", &request).await.map(drop)
    }

    /// Lets a process see the end of its standard input, once the other writers have left too.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn close_stdin(&self, id: &str, exec: &str) -> Called<()> {
        let mut request = api::CloseIORequest::new();
        request.id = id.to_owned();
        request.exec_id = exec.to_owned();
        request.stdin = true;
        self.task::<Empty>("close stdin", "CloseIO", &request).await.map(drop)
    }

    /// The state of a container (`exec` empty) or of an exec.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn state(&self, id: &str, exec: &str) -> Called<TaskState> {
        let mut request = api::StateRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec.to_owned();
        let reply: api::StateResponse = self.task("state", "State", &request).await?;
        use types::task::Status;
        let status = match reply.status.enum_value_or(Status::UNKNOWN) {
            Status::UNKNOWN => TaskStatus::Unknown,
            Status::CREATED => TaskStatus::Created,
            Status::RUNNING => TaskStatus::Running,
            Status::STOPPED => TaskStatus::Stopped,
            Status::PAUSED => TaskStatus::Paused,
            Status::PAUSING => TaskStatus::Pausing,
        };
        let exit = (status == TaskStatus::Stopped).then(|| Exited {
            pid: reply.pid,
            status: reply.exit_status,
            at: time(&reply.exited_at),
        });
        Ok(TaskState { status, pid: reply.pid, exit })
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// `NotFound`; `Precondition` when it does not run.
    pub async fn pause(&self, id: &str) -> Called<()> {
        let mut request = api::PauseRequest::new();
        request.id = id.to_owned();
        self.task::<Empty>("pause", "Pause", &request).await.map(drop)
    }

    /// Thaws a container.
    ///
    /// # Errors
    /// `NotFound`; `Precondition` when it is not frozen.
    pub async fn resume(&self, id: &str) -> Called<()> {
        let mut request = api::ResumeRequest::new();
        request.id = id.to_owned();
        self.task::<Empty>("resume", "Resume", &request).await.map(drop)
    }

    /// Signals a container's first process, an exec, or (`all`) every process of the container.
    ///
    /// # Errors
    /// `NotFound`, also when the process has ended; `Invalid` signal.
    pub async fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> Called<()> {
        let mut request = api::KillRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec.to_owned();
        request.signal = signal;
        request.all = all;
        self.task::<Empty>("kill", "Kill", &request).await.map(drop)
    }

    /// Host pids of all processes of a container.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn pids(&self, id: &str) -> Called<Vec<u32>> {
        let mut request = api::PidsRequest::new();
        request.id = id.to_owned();
        let reply: api::PidsResponse = self.task("pids", "Pids", &request).await?;
        Ok(reply.processes.iter().map(|process| process.pid).collect())
    }

    /// Writes a checkpoint of a container to the directory `path`.
    ///
    /// # Errors
    /// `NotFound`, `Unimplemented`, or what the OCI runtime says.
    pub async fn checkpoint(&self, id: &str, path: &Path, options: Option<Any>) -> Called<()> {
        let mut request = api::CheckpointTaskRequest::new();
        request.id = id.to_owned();
        request.path = text(path);
        request.options = options.into();
        self.task::<Empty>("checkpoint", "Checkpoint", &request).await.map(drop)
    }

    /// Changes a container's limits; `resources` is an OCI `LinuxResources` as JSON.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`, or what the OCI runtime says.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Called<()> {
        let mut request = api::UpdateTaskRequest::new();
        request.id = id.to_owned();
        request.resources = MessageField::some(json_any("LinuxResources", resources));
        self.task::<Empty>("update", "Update", &request).await.map(drop)
    }

    /// Waits until a container (`exec` empty) or an exec has ended. No deadline.
    ///
    /// # Errors
    /// `NotFound`; `Closed` when the shim goes first.
    pub async fn wait(&self, id: &str, exec: &str) -> Called<Exited> {
        let mut request = api::WaitRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec.to_owned();
        let reply: api::WaitResponse = self.task_within("wait", "Wait", &request, None).await?;
        Ok(Exited { pid: 0, status: reply.exit_status, at: time(&reply.exited_at) })
    }

    /// Usage: `io.containerd.cgroups.v1.Metrics` or `…v2.Metrics`.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn stats(&self, id: &str) -> Called<Any> {
        let mut request = api::StatsRequest::new();
        request.id = id.to_owned();
        let reply: api::StatsResponse = self.task("stats", "Stats", &request).await?;
        Ok(reply.stats.unwrap_or_default())
    }

    /// Who is at the other end.
    ///
    /// # Errors
    /// `Closed`, `Deadline`.
    pub async fn connect_info(&self, id: &str) -> Called<ConnectInfo> {
        let mut request = api::ConnectRequest::new();
        request.id = id.to_owned();
        let reply: api::ConnectResponse = self.task("connect", "Connect", &request).await?;
        Ok(ConnectInfo {
            shim_pid: reply.shim_pid,
            task_pid: reply.task_pid,
            version: reply.version,
        })
    }

    /// Asks the shim to exit; it stays while it has containers, unless `now`.
    ///
    /// # Errors
    /// `Closed` is the success of a shim that exits before it answers.
    pub async fn shutdown(&self, id: &str, now: bool) -> Called<()> {
        let mut request = api::ShutdownRequest::new();
        request.id = id.to_owned();
        request.now = now;
        self.task::<Empty>("shutdown", "Shutdown", &request).await.map(drop)
    }

    /// Tells the shim what its pod is to be.
    ///
    /// # Errors
    /// `AlreadyExists`, `Invalid` options; `Unimplemented` by shims without the Sandbox service.
    pub async fn create_sandbox(&self, pod: CreateSandbox) -> Called<()> {
        let mut request = sandbox::CreateSandboxRequest::new();
        request.sandbox_id = pod.id;
        request.bundle_path = text(&pod.bundle);
        request.netns_path = pod.netns_path;
        request.options = pod.options.into();
        request.annotations = pod.annotations;
        self.sandbox::<sandbox::CreateSandboxResponse>("create pod", "CreateSandbox", &request)
            .await
            .map(drop)
    }

    /// Makes the pod's namespaces; with our shim they are at [`crate::bundle::Bundle::namespace`].
    ///
    /// # Errors
    /// `NotFound`, `Precondition` (already started), `Invalid` (a sysctl or mapping the kernel
    /// refuses). After an error nothing is left.
    pub async fn start_sandbox(&self, id: &str) -> Called<SandboxStarted> {
        let mut request = sandbox::StartSandboxRequest::new();
        request.sandbox_id = id.to_owned();
        let reply: sandbox::StartSandboxResponse =
            self.sandbox("start pod", "StartSandbox", &request).await?;
        Ok(SandboxStarted { pid: reply.pid, created_at: time(&reply.created_at) })
    }

    /// Ends what is left of the pod's processes: SIGTERM, and SIGKILL after `timeout`.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn stop_sandbox(&self, id: &str, timeout: Duration) -> Called<()> {
        let mut request = sandbox::StopSandboxRequest::new();
        request.sandbox_id = id.to_owned();
        request.timeout_secs = u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX);
        let deadline = self.deadline.saturating_add(timeout);
        let reply: Called<sandbox::StopSandboxResponse> =
            self.call("stop pod", SANDBOX, "StopSandbox", &request, Some(deadline)).await;
        reply.map(drop)
    }

    /// Waits until the pod has ended. No deadline.
    ///
    /// # Errors
    /// `NotFound`; `Closed` when the shim goes first.
    pub async fn wait_sandbox(&self, id: &str) -> Called<Exited> {
        let mut request = sandbox::WaitSandboxRequest::new();
        request.sandbox_id = id.to_owned();
        let reply: sandbox::WaitSandboxResponse =
            self.call("wait for pod", SANDBOX, "WaitSandbox", &request, None).await?;
        Ok(Exited { pid: 0, status: reply.exit_status, at: time(&reply.exited_at) })
    }

    /// The pod's state.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn sandbox_status(&self, id: &str) -> Called<SandboxStatus> {
        let mut request = sandbox::SandboxStatusRequest::new();
        request.sandbox_id = id.to_owned();
        request.verbose = true;
        let reply: sandbox::SandboxStatusResponse =
            self.sandbox("pod status", "SandboxStatus", &request).await?;
        Ok(SandboxStatus {
            pid: reply.pid,
            state: reply.state,
            info: reply.info,
            created_at: time(&reply.created_at),
            exited_at: reply.exited_at.as_ref().map(from_timestamp),
        })
    }

    /// Where the pod runs: operating system and architecture, in Go's words ("linux", "amd64").
    ///
    /// # Errors
    /// `Unimplemented` by shims without the Sandbox service.
    pub async fn platform(&self, id: &str) -> Called<(String, String)> {
        let mut request = sandbox::PlatformRequest::new();
        request.sandbox_id = id.to_owned();
        let mut reply: sandbox::PlatformResponse =
            self.sandbox("pod platform", "Platform", &request).await?;
        let platform = reply.platform.take().unwrap_or_default();
        Ok((platform.os, platform.architecture))
    }

    /// Usage of the pod's cgroup: `io.containerd.cgroups.v1.Metrics` or `…v2.Metrics`.
    ///
    /// # Errors
    /// `NotFound`; `Precondition` when the pod has no cgroup of its own.
    pub async fn sandbox_metrics(&self, id: &str) -> Called<Any> {
        let mut request = sandbox::SandboxMetricsRequest::new();
        request.sandbox_id = id.to_owned();
        let mut reply: sandbox::SandboxMetricsResponse =
            self.sandbox("pod metrics", "SandboxMetrics", &request).await?;
        let metric = reply.metrics.take().unwrap_or_default();
        Ok(metric.data.into_option().unwrap_or_default())
    }

    /// Whether the shim answers.
    ///
    /// # Errors
    /// `NotFound`, `Closed`, `Deadline`.
    pub async fn ping_sandbox(&self, id: &str) -> Called<()> {
        let mut request = sandbox::PingRequest::new();
        request.sandbox_id = id.to_owned();
        self.sandbox::<sandbox::PingResponse>("ping pod", "PingSandbox", &request).await.map(drop)
    }

    /// Unpins the pod's namespaces and ends the shim.
    ///
    /// # Errors
    /// `NotFound`; `Precondition` while containers are left.
    pub async fn shutdown_sandbox(&self, id: &str) -> Called<()> {
        let mut request = sandbox::ShutdownSandboxRequest::new();
        request.sandbox_id = id.to_owned();
        self.sandbox::<sandbox::ShutdownSandboxResponse>(
            "shut pod down",
            "ShutdownSandbox",
            &request,
        )
        .await
        .map(drop)
    }

    async fn sandbox<R: Message>(
        &self,
        call: &'static str,
        method: &str,
        request: &impl Message,
    ) -> Called<R> {
        self.call(call, SANDBOX, method, request, Some(self.deadline)).await
    }

    async fn task<R: Message>(
        &self,
        call: &'static str,
        method: &str,
        request: &impl Message,
    ) -> Called<R> {
        self.task_within(call, method, request, Some(self.deadline)).await
    }

    async fn task_within<R: Message>(
        &self,
        call: &'static str,
        method: &str,
        request: &impl Message,
        deadline: Option<Duration>,
    ) -> Called<R> {
        if !self.version2.load(Ordering::Relaxed) {
            match self.call(call, TASK_V3, method, request, deadline).await {
                // A shim may promise version 3 and have only 2.
                Err(refused @ Error::Refused { kind: ErrorKind::Unimplemented, .. })
                    if !self.pinned =>
                {
                    let reply = self.call(call, TASK_V2, method, request, deadline).await;
                    return match reply {
                        // It has neither; what it said first is what was asked for.
                        Err(Error::Refused { kind: ErrorKind::Unimplemented, .. }) => Err(refused),
                        Ok(reply) => {
                            self.version2.store(true, Ordering::Relaxed);
                            Ok(reply)
                        }
                        error => error,
                    };
                }
                reply => return reply,
            }
        }
        self.call(call, TASK_V2, method, request, deadline).await
    }

    async fn call<R: Message>(
        &self,
        call: &'static str,
        service: &str,
        method: &str,
        request: &impl Message,
        deadline: Option<Duration>,
    ) -> Called<R> {
        let started = tokio::time::Instant::now();
        let result = self.call_unobserved(call, service, method, request, deadline).await;
        // What has no deadline is a wait: how long it takes says nothing of the shim.
        if let Some(observer) = self.observer.filter(|_| deadline.is_some()) {
            (observer.ended)(call, started.elapsed(), result.as_ref().err().map(Error::kind));
        }
        result
    }

    async fn call_unobserved<R: Message>(
        &self,
        call: &'static str,
        service: &str,
        method: &str,
        request: &impl Message,
        deadline: Option<Duration>,
    ) -> Called<R> {
        let other = |message: String| Error::Refused { call, kind: ErrorKind::Other, message };
        let mut envelope = ttrpc::Request::new();
        envelope.service = service.to_owned();
        envelope.method = method.to_owned();
        // ttrpc's own deadline is text in an error, and may break the connection in mid-frame: it
        // is there for the shim to see, and ours comes first.
        envelope.timeout_nano = deadline
            .map(|deadline| deadline.saturating_add(Duration::from_secs(1)).as_nanos())
            .map_or(0, |nanos| i64::try_from(nanos).unwrap_or(i64::MAX));
        if let Some(observer) = self.observer {
            envelope.metadata = (observer.metadata)()
                .into_iter()
                .map(|(key, value)| ttrpc::proto::KeyValue { key, value, ..Default::default() })
                .collect();
        }
        envelope.payload = request.write_to_bytes().map_err(|e| other(e.to_string()))?;
        let expired = async {
            match deadline {
                Some(deadline) => {
                    tokio::time::sleep(deadline).await;
                    deadline
                }
                None => std::future::pending().await,
            }
        };
        let reply = tokio::select! {
            biased;
            reply = self.connection.request(envelope) => reply,
            // A request that is queued while the connection breaks gets no answer from ttrpc.
            () = self.closed() => return Err(Error::Closed { call }),
            deadline = expired => return Err(Error::Deadline { call, deadline }),
        };
        let reply = match reply {
            Ok(reply) => reply,
            Err(error @ ttrpc::Error::RpcStatus(_)) => {
                return Err(Error::from_ttrpc(call, deadline, error));
            }
            // ttrpc tells the callers just before it drops the transport; whatever it calls the
            // error, without a transport it is that.
            Err(error) => {
                let grace = Duration::from_millis(100);
                return Err(match tokio::time::timeout(grace, self.closed()).await {
                    Ok(()) => Error::Closed { call },
                    Err(_) => Error::from_ttrpc(call, deadline, error),
                });
            }
        };
        R::parse_from_bytes(&reply.payload).map_err(|error| other(error.to_string()))
    }
}

/// JSON in the wrapping that containerd uses for types of the OCI runtime specification.
fn json_any(kind: &str, value: Vec<u8>) -> Any {
    let mut any = Any::new();
    any.type_url = format!("types.containerd.io/opencontainers/runtime-spec/1/{kind}");
    any.value = value;
    any
}

pub(crate) fn time(at: &MessageField<Timestamp>) -> SystemTime {
    at.as_ref().map_or(UNIX_EPOCH, from_timestamp)
}

fn from_timestamp(at: &Timestamp) -> SystemTime {
    let seconds = Duration::from_secs(u64::try_from(at.seconds).unwrap_or_default());
    let nanos = Duration::from_nanos(u64::try_from(at.nanos).unwrap_or_default());
    UNIX_EPOCH + seconds + nanos
}

async fn open(address: &str) -> io::Result<Socket> {
    if address.starts_with("vsock://") {
        return Socket::connect(address).await;
    }
    let path = ["unix://", "ttrpc+unix://"]
        .iter()
        .find_map(|scheme| address.strip_prefix(scheme))
        .unwrap_or(address);
    if path.is_empty() || path.contains("://") {
        let message = format!(
            "{address:?} is no address that can be reached: known are unix, ttrpc+unix and vsock"
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let stream = if path.starts_with('/') {
        UnixStream::connect(path).await?
    } else {
        // The name of an abstract socket, as shims of containerd 1.3 and before gave it.
        let name = path.trim_start_matches(['@', '\0']);
        UnixStream::connect(format!("\0{name}")).await?
    };
    Ok(Socket::new(stream))
}

/// A transport whose end can be noticed: ttrpc itself tells nobody.
struct Watched {
    socket: Socket,
    _alive: watch::Sender<()>,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(version: u32) -> Option<Endpoint> {
        Some(Endpoint { address: "unix:///run/s/a".into(), version })
    }

    #[test]
    fn every_form_of_answer_to_start_is_understood() {
        let mut result = BootstrapResult::new();
        result.version = 3;
        result.address = "unix:///run/s/a".into();
        result.protocol = "ttrpc".into();
        assert_eq!(parse_endpoint(&result.write_to_bytes().unwrap()), endpoint(3));
        let json = br#"{"version":3,"address":"unix:///run/s/a","protocol":"ttrpc"}"#;
        assert_eq!(parse_endpoint(json), endpoint(3));
        assert_eq!(parse_endpoint(b"unix:///run/s/a\n"), endpoint(2));
        let noisy = [&b"warning: old kernel\nreading config\n"[..], json].concat();
        assert_eq!(parse_endpoint(&noisy), endpoint(3));
        assert_eq!(parse_endpoint(b"hello\nunix:///run/s/a\n"), endpoint(2));
    }

    #[test]
    fn a_method_that_is_not_there_is_not_taken_for_a_container_that_is_gone() {
        assert!(lacks_method("/containerd.task.v2.Task/Pids is not supported"));
        assert!(lacks_method("/containerd.task.v3.Task/Connect does not exist"));
        for other in ["container c1 does not exist", "/containerd.x y does not exist", "not found"]
        {
            assert!(!lacks_method(other), "{other}");
        }
    }

    #[test]
    fn an_answer_that_cannot_be_used_is_refused() {
        for answer in [
            &b""[..],
            b"hello",
            b"hello\nworld",
            br#"{"version":4,"address":"unix:///a","protocol":"ttrpc"}"#,
            br#"{"version":3,"address":"unix:///a","protocol":"grpc"}"#,
            br#"{"version":3,"address":"","protocol":"ttrpc"}"#,
        ] {
            assert_eq!(parse_endpoint(answer), None, "{answer:?}");
        }
    }

    #[tokio::test]
    async fn a_client_notices_that_the_other_end_has_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let endpoint = Endpoint { address: format!("unix://{}", path.display()), version: 3 };
        let client = Client::connect(&endpoint, Duration::from_secs(1)).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let call = {
            let client = client.clone();
            tokio::spawn(async move { client.wait("a", "").await })
        };
        drop(server);
        tokio::time::timeout(Duration::from_secs(5), client.closed()).await.unwrap();
        assert_eq!(call.await.unwrap().unwrap_err().kind(), ErrorKind::Closed);
        assert_eq!(client.state("a", "").await.unwrap_err().kind(), ErrorKind::Closed);
    }

    #[tokio::test]
    async fn nobody_there_is_closed_and_a_bad_address_is_said() {
        let nobody = Endpoint { address: "unix:///nonexistent/s".into(), version: 3 };
        let error = Client::connect(&nobody, Duration::from_secs(1)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
        let bad = Endpoint { address: "hvsock://x:1".into(), version: 3 };
        let error = Client::connect(&bad, Duration::from_secs(1)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Other);
    }

    #[tokio::test]
    async fn a_silent_shim_meets_the_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = tokio::net::UnixListener::bind(&path).unwrap();
        let endpoint = Endpoint { address: format!("unix://{}", path.display()), version: 3 };
        let client = Client::connect(&endpoint, Duration::from_secs(1))
            .await
            .unwrap()
            .with_deadline(Duration::from_millis(50));
        assert_eq!(client.state("a", "").await.unwrap_err().kind(), ErrorKind::Deadline);
    }
}

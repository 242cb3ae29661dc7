//! The OCI command line: runc, crun, runsc and what else keeps to it.
//!
//! A runtime's errors are text. They are read here, once, into [`Reason`].
//!
//! A runtime's log and its standard error go to a memfd: no file is left in the bundle, calls on one
//! container do not mix, and stopping works with a full disk.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    bundle::Exit,
    process::{Reaper, check},
};

/// Deadline of a runtime call when neither the environment nor the options set one.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// Most that is read of a runtime's answer or errors.
const OUTPUT_MAX: u64 = 4 * 1024 * 1024;

/// How an OCI runtime is called. Kept in the bundle, for `delete` when the shim is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Runtime {
    /// The binary, by path or by name in PATH.
    pub(crate) binary: PathBuf,
    /// Its state directory.
    pub(crate) root: PathBuf,
    /// cgroups by way of systemd.
    pub(crate) systemd_cgroup: bool,
    /// Do not pivot_root (the rootfs is a ramdisk).
    pub(crate) no_pivot: bool,
    /// Do not make a session keyring.
    pub(crate) no_new_keyring: bool,
    /// Where criu works; empty: where the runtime wants.
    pub(crate) criu_work: PathBuf,
    /// Where criu writes images; empty: where the call says.
    pub(crate) criu_images: PathBuf,
    /// Deadline of each call, in seconds.
    pub(crate) deadline_secs: u64,
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            binary: "runc".into(),
            root: "/run/containerd/runc".into(),
            systemd_cgroup: false,
            no_pivot: false,
            no_new_keyring: false,
            criu_work: PathBuf::new(),
            criu_images: PathBuf::new(),
            deadline_secs: DEADLINE.as_secs(),
        }
    }
}

/// Why a runtime refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// It knows no such container.
    NoSuchContainer,
    /// The container, or the process, has ended.
    NotRunning,
    /// It has a container of that id.
    AlreadyExists,
    /// The program to run is not in the container.
    ExecutableNotFound,
    /// The program to run may not be run.
    ExecutableRefused,
    /// The working directory is not in the container, or may not be entered.
    WorkingDirectory,
    /// The container is frozen.
    Paused,
    /// A limit that the kernel does not take: a CPU that is not there, less memory than is in use.
    Limit,
    /// The verb or a flag is unknown to it, or the kernel lacks what it needs.
    Unsupported,
    /// Anything else.
    Other,
}

/// A runtime call that did not succeed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("run {}", binary.display())]
    Spawn { binary: PathBuf, source: io::Error },
    #[error("{binary} {verb}: not done within {deadline:?}; it was killed")]
    Deadline { binary: String, verb: &'static str, deadline: Duration },
    #[error("{binary} {verb}: {message}")]
    Refused { binary: String, verb: &'static str, reason: Reason, message: String },
    #[error("{binary} {verb}")]
    Io { binary: String, verb: &'static str, source: io::Error },
}

impl Error {
    /// Why, when the runtime itself said so.
    pub(crate) fn reason(&self) -> Reason {
        match self {
            Error::Refused { reason, .. } => *reason,
            _ => Reason::Other,
        }
    }
}

/// What a process is given as its standard streams.
#[derive(Default)]
pub(crate) struct Streams {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

/// `state` of a container.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct State {
    pub(crate) status: String,
    #[serde(default)]
    pub(crate) pid: u32,
}

/// How a checkpoint is to be made (`runc checkpoint`).
#[derive(Clone, Debug, Default)]
pub(crate) struct Checkpoint {
    pub(crate) images: PathBuf,
    pub(crate) work: PathBuf,
    pub(crate) leave_running: bool,
    pub(crate) open_tcp: bool,
    pub(crate) unix_sockets: bool,
    pub(crate) shell_job: bool,
    pub(crate) file_locks: bool,
    pub(crate) empty_namespaces: Vec<String>,
}

type Called<T> = Result<T, Error>;

impl Runtime {
    fn name(&self) -> String {
        self.binary.file_name().unwrap_or(self.binary.as_os_str()).to_string_lossy().into_owned()
    }

    /// The pids it tells are those of the processes themselves, so that a signal can be sent
    /// without running it. Not so where a sandbox stands between (gVisor, Kata).
    pub(crate) fn signals_directly(&self) -> bool {
        let name = self.name();
        ["runc", "crun", "youki"].iter().any(|known| name.contains(known))
    }

    pub(crate) fn deadline(&self) -> Duration {
        Duration::from_secs(self.deadline_secs.max(1))
    }

    /// Makes a container; its first process waits to be started.
    pub(crate) async fn create(
        &self,
        reaper: &Arc<Reaper>,
        id: &str,
        bundle: &Path,
        pid_file: &Path,
        console: Option<&Path>,
        streams: Streams,
    ) -> Called<()> {
        let mut call = self.call("create");
        call.arg("--bundle").arg(bundle).arg("--pid-file").arg(pid_file);
        if let Some(console) = console {
            call.arg("--console-socket").arg(console);
        }
        if self.no_pivot {
            call.arg("--no-pivot");
        }
        if self.no_new_keyring {
            call.arg("--no-new-keyring");
        }
        call.arg(id).streams(streams).run(reaper).await.map(drop)
    }

    /// Makes a container from a checkpoint; it runs at once.
    pub(crate) async fn restore(
        &self,
        reaper: &Arc<Reaper>,
        id: &str,
        bundle: &Path,
        pid_file: &Path,
        console: Option<&Path>,
        streams: Streams,
        images: &Path,
    ) -> Called<()> {
        let mut call = self.call("restore");
        call.arg("--detach").arg("--image-path").arg(images);
        if !self.criu_work.as_os_str().is_empty() {
            call.arg("--work-path").arg(&self.criu_work);
        }
        call.arg("--bundle").arg(bundle).arg("--pid-file").arg(pid_file);
        if let Some(console) = console {
            call.arg("--console-socket").arg(console);
        }
        if self.no_pivot {
            call.arg("--no-pivot");
        }
        call.arg(id).streams(streams).run(reaper).await.map(drop)
    }

    pub(crate) async fn start(&self, reaper: &Arc<Reaper>, id: &str) -> Called<()> {
        self.call("start").arg(id).run(reaper).await.map(drop)
    }

    /// Starts a further process; `process` is the OCI `Process` as JSON.
    pub(crate) async fn exec(
        &self,
        reaper: &Arc<Reaper>,
        id: &str,
        process: &[u8],
        pid_file: &Path,
        console: Option<&Path>,
        streams: Streams,
    ) -> Called<()> {
        let io = |source| Error::Io { binary: self.name(), verb: "exec", source };
        let mut file = memfd(c"process.json").map_err(io)?;
        file.write_all(process).map_err(io)?;
        let mut call = self.call("exec");
        call.arg("--detach").arg("--pid-file").arg(pid_file).arg("--process").arg(alias(&file));
        if let Some(console) = console {
            call.arg("--tty").arg("--console-socket").arg(console);
        }
        call.arg(id).streams(streams).run(reaper).await.map(drop)
    }

    pub(crate) async fn kill(
        &self,
        reaper: &Arc<Reaper>,
        id: &str,
        signal: i32,
        all: bool,
    ) -> Called<()> {
        let mut call = self.call("kill");
        if all {
            call.arg("--all");
        }
        call.arg(id).arg(signal.to_string()).run(reaper).await.map(drop)
    }

    /// Deletes a container that has ended; one that the runtime does not know is no error.
    pub(crate) async fn delete(&self, reaper: &Arc<Reaper>, id: &str, force: bool) -> Called<()> {
        let mut call = self.call("delete");
        if force {
            call.arg("--force");
        }
        match call.arg(id).run(reaper).await {
            Err(error) if error.reason() == Reason::NoSuchContainer => Ok(()),
            done => done.map(drop),
        }
    }

    pub(crate) async fn pause(&self, reaper: &Arc<Reaper>, id: &str) -> Called<()> {
        self.call("pause").arg(id).run(reaper).await.map(drop)
    }

    pub(crate) async fn resume(&self, reaper: &Arc<Reaper>, id: &str) -> Called<()> {
        self.call("resume").arg(id).run(reaper).await.map(drop)
    }

    /// Changes limits; `resources` is an OCI `LinuxResources` as JSON.
    pub(crate) async fn update(
        &self,
        reaper: &Arc<Reaper>,
        id: &str,
        resources: &[u8],
    ) -> Called<()> {
        let io = |source| Error::Io { binary: self.name(), verb: "update", source };
        let mut file = memfd(c"resources.json").map_err(io)?;
        file.write_all(resources).map_err(io)?;
        let mut call = self.call("update");
        call.arg("--resources").arg(alias(&file)).arg(id);
        call.run(reaper).await.map(drop)
    }

    pub(crate) async fn state(&self, reaper: &Arc<Reaper>, id: &str) -> Called<State> {
        let answer = self.call("state").arg(id).run(reaper).await?;
        serde_json::from_slice(&answer).map_err(|error| Error::Io {
            binary: self.name(),
            verb: "state",
            source: error.into(),
        })
    }

    /// What it can do, as JSON (runtime-spec features.md); `Unsupported` from old runtimes.
    pub(crate) async fn features(&self, reaper: &Arc<Reaper>) -> Called<Vec<u8>> {
        self.call("features").run(reaper).await
    }

    /// First line of `--version`.
    pub(crate) async fn version(&self, reaper: &Arc<Reaper>) -> Called<String> {
        let mut call = self.call("--version");
        call.globals = false;
        let answer = call.run(reaper).await?;
        Ok(String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned())
    }

    /// Host pids of a container's processes, by the runtime: for those whose cgroup tells nothing.
    pub(crate) async fn ps(&self, reaper: &Arc<Reaper>, id: &str) -> Called<Vec<u32>> {
        let answer = self.call("ps").arg("--format").arg("json").arg(id).run(reaper).await?;
        serde_json::from_slice(&answer).map_err(|error| Error::Io {
            binary: self.name(),
            verb: "ps",
            source: error.into(),
        })
    }

    pub(crate) async fn checkpoint(
        &self,
        reaper: &Arc<Reaper>,
        id: &str,
        how: &Checkpoint,
    ) -> Called<()> {
        let mut call = self.call("checkpoint");
        call.arg("--image-path").arg(&how.images);
        if !how.work.as_os_str().is_empty() {
            call.arg("--work-path").arg(&how.work);
        }
        for (wanted, flag) in [
            (how.leave_running, "--leave-running"),
            (how.open_tcp, "--tcp-established"),
            (how.unix_sockets, "--ext-unix-sk"),
            (how.shell_job, "--shell-job"),
            (how.file_locks, "--file-locks"),
        ] {
            if wanted {
                call.arg(flag);
            }
        }
        for namespace in &how.empty_namespaces {
            call.arg("--empty-ns").arg(namespace);
        }
        call.arg(id).run(reaper).await.map(drop)
    }

    fn call(&self, verb: &'static str) -> Call<'_> {
        Call { runtime: self, verb, arguments: Vec::new(), streams: None, globals: true }
    }
}

/// One run of the runtime.
struct Call<'a> {
    runtime: &'a Runtime,
    verb: &'static str,
    arguments: Vec<OsString>,
    /// The container's own streams; else the answer is captured.
    streams: Option<Streams>,
    /// Whether the global flags are put before the verb.
    globals: bool,
}

impl Call<'_> {
    fn arg(&mut self, argument: impl AsRef<OsStr>) -> &mut Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    fn streams(&mut self, streams: Streams) -> &mut Self {
        self.streams = Some(streams);
        self
    }

    async fn run(&mut self, reaper: &Arc<Reaper>) -> Called<Vec<u8>> {
        let runtime = self.runtime;
        let (verb, binary) = (self.verb, runtime.name());
        let io = |source| Error::Io { binary: binary.clone(), verb, source };

        let mut errors = memfd(c"errors").map_err(io)?;
        append(&errors).map_err(io)?;
        let mut command = Command::new(&runtime.binary);
        if self.globals {
            command.arg("--root").arg(&runtime.root).arg("--log").arg(alias(&errors));
            command.arg("--log-format").arg("json");
            if runtime.systemd_cgroup {
                command.arg("--systemd-cgroup");
            }
        }
        command.arg(verb).args(&self.arguments).process_group(0);
        let mut answer = None;
        match self.streams.take() {
            Some(streams) => {
                let stdio = |fd: Option<OwnedFd>| fd.map_or_else(Stdio::null, Stdio::from);
                command
                    .stdin(stdio(streams.stdin))
                    .stdout(stdio(streams.stdout))
                    .stderr(stdio(streams.stderr));
            }
            None => {
                let file = memfd(c"answer").map_err(io)?;
                command
                    .stdin(Stdio::null())
                    .stdout(file.try_clone().map_err(io)?)
                    .stderr(errors.try_clone().map_err(io)?);
                answer = Some(file);
            }
        }
        let child = reaper
            .spawn(&mut command)
            .map_err(|source| Error::Spawn { binary: runtime.binary.clone(), source })?;
        // What belongs to the container must not stay open here.
        drop(command);

        let deadline = runtime.deadline();
        let exit = match tokio::time::timeout(deadline, child.wait()).await {
            Ok(exit) => exit.map_err(io)?,
            Err(_) => {
                kill_group(child.pid());
                // SIGKILL is certain but for uninterruptible sleep; then the sweep gets it.
                let _ = tokio::time::timeout(Duration::from_secs(1), child.wait()).await;
                return Err(Error::Deadline { binary, verb, deadline });
            }
        };
        if exit == Exit::Code(0) {
            return match answer {
                Some(mut file) => read(&mut file).map_err(io),
                None => Ok(Vec::new()),
            };
        }
        let text = read(&mut errors).map_err(io)?;
        let message = message(&text, exit);
        Err(Error::Refused { binary, verb, reason: reason(&message), message })
    }
}

#[expect(unsafe_code, reason = "kill(2)")]
fn kill_group(pid: u32) {
    // SAFETY: no memory is involved. The leader has not been reaped, so the group is ours.
    unsafe { libc::kill(-pid.cast_signed(), libc::SIGKILL) };
}

/// An anonymous file in memory.
#[expect(unsafe_code, reason = "memfd_create(2)")]
fn memfd(name: &std::ffi::CStr) -> io::Result<File> {
    // SAFETY: the name is a C string; the descriptor is new and nobody else's.
    unsafe {
        let fd = check(libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC))?;
        Ok(File::from_raw_fd(fd))
    }
}

/// Writers that share the descriptor and those that open the alias must not overwrite each other.
#[expect(unsafe_code, reason = "fcntl(2)")]
fn append(file: &File) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_APPEND) }).map(drop)
}

/// A path by which another process can open the file, while we hold it.
fn alias(file: &File) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

fn read(file: &mut File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(OUTPUT_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The last error of a runtime's log, else its plain text, else how it ended.
fn message(text: &[u8], exit: Exit) -> String {
    #[derive(Deserialize)]
    struct Entry {
        level: String,
        msg: String,
    }
    let text = String::from_utf8_lossy(text);
    let mut logged = None;
    let mut plain = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        match serde_json::from_str::<Entry>(line) {
            Ok(entry) if matches!(entry.level.as_str(), "error" | "fatal" | "panic") => {
                logged = Some(entry.msg);
            }
            Ok(_) => {}
            Err(_) => plain.push(line),
        }
    }
    if let Some(message) = logged {
        return message.trim().to_owned();
    }
    if !plain.is_empty() {
        return plain.join("; ");
    }
    match exit {
        Exit::Code(code) => format!("exit code {code}"),
        Exit::Signal(signal) => format!("ended by signal {signal}"),
    }
}

/// The reason in a message of runc, crun or runsc. The tests hold what each of them says.
fn reason(message: &str) -> Reason {
    let text = message.to_ascii_lowercase();
    let has = |part: &str| text.contains(part);
    if has("executable file not found") || (has("exec") && has("no such file or directory")) {
        Reason::ExecutableNotFound
    } else if has("chdir") || has("cwd") {
        Reason::WorkingDirectory
    } else if has("exec") && (has("permission denied") || has("operation not permitted")) {
        Reason::ExecutableRefused
    } else if (has("container") && has("does not exist"))
        || has("no such container")
        || (has("status") && has("no such file or directory"))
        // crun looks into a directory that another delete has just removed.
        || (has("cannot open directory") && has("no such file or directory"))
    {
        Reason::NoSuchContainer
    } else if has("already exists") || has("id already in use") || has("container with given id") {
        Reason::AlreadyExists
    } else if has("paused") || has("frozen") {
        Reason::Paused
    } else if has("not running")
        || has("is stopped")
        || has("process already finished")
        || has("no such process")
        || has("stopped container")
    {
        Reason::NotRunning
    } else if (has("cgroup") || has("writing file `"))
        && (has("out of range") || has("resource busy") || has("invalid argument"))
    {
        Reason::Limit
    } else if has("flag provided but not defined")
        || has("no help topic")
        || has("unknown command")
        || has("unrecognized option")
        || has("not supported")
    {
        Reason::Unsupported
    } else {
        Reason::Other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_and_races_are_told_apart() {
        for (message, expected) in [
            (
                "failed to write \"4000\": write /sys/fs/cgroup/cpuset/a/cpuset.cpus: numerical result out of range",
                Reason::Limit,
            ),
            (
                "failed to write \"1\": write /sys/fs/cgroup/memory/a/memory.limit_in_bytes: device or resource busy",
                Reason::Limit,
            ),
            ("writing file `cpuset.cpus`: Numerical result out of range", Reason::Limit),
            (
                "cannot open directory '/run/s/runtime/k8s.io/ab': No such file or directory",
                Reason::NoSuchContainer,
            ),
            ("open executable: Operation not permitted", Reason::ExecutableRefused),
            ("open executable: Permission denied", Reason::ExecutableRefused),
            (
                "executable file `x` not found in $PATH: No such file or directory",
                Reason::ExecutableNotFound,
            ),
            ("exec: \"/x\": stat /x: no such file or directory", Reason::ExecutableNotFound),
        ] {
            assert_eq!(reason(message), expected, "{message}");
        }
    }
}

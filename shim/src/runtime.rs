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
use tokio::sync::Notify;

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
    /// The container, or the process, is not in the state that the call needs.
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
    /// A limit that the kernel does not take, or has no file for: a CPU that is not there, less
    /// memory than is in use.
    Limit,
    /// There is no space for what it writes.
    NoSpace,
    /// The container is not frozen.
    NotPaused,
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
    #[error("{binary} {verb}: given up, as the container is to run on")]
    GivenUp { binary: String, verb: &'static str },
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

/// Where a new process is made: what `create`, `restore` and `exec` have in common.
pub(crate) struct Place<'a> {
    pub(crate) bundle: &'a Path,
    /// Where the runtime writes the pid.
    pub(crate) pid_file: &'a Path,
    /// The socket that gets the master of its terminal.
    pub(crate) console: Option<&'a Path>,
    pub(crate) streams: Streams,
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
    pub(crate) fn name(&self) -> String {
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
        place: Place<'_>,
    ) -> Called<()> {
        let mut call = self.call("create");
        call.arg("--bundle").arg(place.bundle).arg("--pid-file").arg(place.pid_file);
        if let Some(console) = place.console {
            call.arg("--console-socket").arg(console);
        }
        if self.no_pivot {
            call.arg("--no-pivot");
        }
        if self.no_new_keyring {
            call.arg("--no-new-keyring");
        }
        call.arg(id).streams(place.streams).run(reaper).await.map(drop)
    }

    /// Makes a container from a checkpoint; it runs at once.
    pub(crate) async fn restore(
        &self,
        reaper: &Arc<Reaper>,
        id: &str,
        place: Place<'_>,
        images: &Path,
    ) -> Called<()> {
        let mut call = self.call("restore");
        call.arg("--detach").arg("--image-path").arg(images);
        if !self.criu_work.as_os_str().is_empty() {
            call.arg("--work-path").arg(&self.criu_work);
        }
        call.arg("--bundle").arg(place.bundle).arg("--pid-file").arg(place.pid_file);
        if let Some(console) = place.console {
            call.arg("--console-socket").arg(console);
        }
        if self.no_pivot {
            call.arg("--no-pivot");
        }
        call.arg(id).streams(place.streams).run(reaper).await.map(drop)
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
        place: Place<'_>,
    ) -> Called<()> {
        let io = |source| Error::Io { binary: self.name(), verb: "exec", source };
        let mut file = memfd(c"process.json").map_err(io)?;
        file.write_all(process).map_err(io)?;
        let mut call = self.call("exec");
        call.arg("--detach").arg("--pid-file").arg(place.pid_file);
        call.arg("--process").arg(alias(&file));
        if let Some(console) = place.console {
            call.arg("--tty").arg("--console-socket").arg(console);
        }
        call.arg(id).streams(place.streams).run(reaper).await.map(drop)
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

    /// Writes the images of a container's processes: all of its memory, so it has a deadline of its
    /// own.
    pub(crate) async fn checkpoint(
        &self,
        reaper: &Arc<Reaper>,
        id: &str,
        how: &Checkpoint,
        deadline: Duration,
        give_up: &Notify,
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
        call.deadline = deadline;
        call.give_up = Some(give_up);
        call.arg(id).run(reaper).await.map(drop)
    }

    fn call(&self, verb: &'static str) -> Call<'_> {
        let deadline = self.deadline();
        Call {
            runtime: self,
            verb,
            arguments: Vec::new(),
            streams: None,
            globals: true,
            deadline,
            give_up: None,
        }
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
    deadline: Duration,
    /// Ends it before.
    give_up: Option<&'a Notify>,
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

        let deadline = self.deadline;
        let give_up = async {
            match self.give_up {
                Some(give_up) => give_up.notified().await,
                None => std::future::pending().await,
            }
        };
        let exit = tokio::select! {
            // What has ended is not given up.
            biased;
            exit = child.wait() => Ok(exit.map_err(io)?),
            () = tokio::time::sleep(deadline) => {
                Err(Error::Deadline { binary: binary.clone(), verb, deadline })
            }
            () = give_up => Err(Error::GivenUp { binary: binary.clone(), verb }),
        };
        let exit = match exit {
            Ok(exit) => exit,
            Err(error) => {
                kill_group(child.pid());
                // SIGKILL is certain but for uninterruptible sleep; then the sweep gets it.
                let _ = tokio::time::timeout(Duration::from_secs(1), child.wait()).await;
                return Err(error);
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
pub(crate) fn memfd(name: &std::ffi::CStr) -> io::Result<File> {
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
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        // An entry is a line of runc and of older crun; that of crun 1.28 has several.
        let mut entries = serde_json::Deserializer::from_str(rest).into_iter::<Entry>();
        let after = match entries.next() {
            Some(Ok(entry)) => {
                if matches!(entry.level.as_str(), "error" | "fatal" | "panic") {
                    logged = Some(entry.msg);
                }
                &rest[entries.byte_offset()..]
            }
            Some(Err(_)) | None => {
                let (line, after) = rest.split_once('\n').unwrap_or((rest, ""));
                plain.push(line.trim());
                after
            }
        };
        rest = after.trim_start();
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

/// The reason in a message of runc, crun or runsc. The tests hold what runc and crun say.
fn reason(message: &str) -> Reason {
    let text = message.to_ascii_lowercase();
    let has = |part: &str| text.contains(part);
    // In runc's words the program's own error follows `exec: "program"`.
    let program = has("exec: \"") || has("executable file ");
    if has("no space left on device") || has("disk quota exceeded") {
        Reason::NoSpace
    } else if has("exec.fifo") {
        // crun's start of what has been started.
        Reason::NotRunning
    } else if has("container does not exist")
        || has("no such container")
        || text.starts_with("cannot open directory")
        || (has("cannot rm state directory") && has("no such file or directory"))
        || (has("error opening file") && has("/status`"))
        || (has("loading container") && has("does not exist"))
    {
        Reason::NoSuchContainer
    } else if program && (has("not found") || has("no such file or directory")) {
        Reason::ExecutableNotFound
    } else if (program && has("permission denied")) || has("open executable:") {
        Reason::ExecutableRefused
    } else if has("chdir") || has("working directory") {
        Reason::WorkingDirectory
    } else if has("already exists") {
        Reason::AlreadyExists
    } else if has("not paused") {
        Reason::NotPaused
    } else if has("paused") {
        Reason::Paused
    } else if has("not running")
        || has("stopped container")
        || has("has stopped")
        || has("not stopped")
        || has("already running")
        || has("no such process")
        || has("already finished")
        || has("is not in `created` or `stopped` state")
    {
        Reason::NotRunning
    } else if has("unable to set memory limit")
        || (has("cgroup") || has("writing file `"))
            && (has("out of range") || has("resource busy") || has("invalid argument"))
        || (has("opening file `") && has("for writing: no such file"))
    {
        Reason::Limit
    } else if has("flag provided but not defined")
        || has("no help topic")
        || has("unknown command")
        || has("unrecognized option")
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
    fn limits_that_the_kernel_does_not_take_are_told_apart() {
        for message in [
            "failed to write \"4000\": write /sys/fs/cgroup/cpuset/a/cpuset.cpus: numerical result out of range",
            "failed to write \"1\": write /sys/fs/cgroup/memory/a/memory.limit_in_bytes: device or resource busy",
            "unable to set memory limit to 1 (current usage: 2, peak usage: 2)",
            "writing file `cpuset.cpus`: Numerical result out of range",
            "writing file `memory.limit_in_bytes`: Device or resource busy",
            "opening file `blkio.weight` for writing: No such file or directory",
        ] {
            assert_eq!(reason(message), Reason::Limit, "{message}");
        }
    }

    fn logged(line: &str) -> Reason {
        reason(&message(line.as_bytes(), Exit::Code(1)))
    }

    #[test]
    fn what_runc_1_1_says_is_understood() {
        for (msg, wanted) in [
            ("container does not exist", Reason::NoSuchContainer),
            ("exec failed: container does not exist", Reason::NoSuchContainer),
            ("runc create failed: container with given ID already exists", Reason::AlreadyExists),
            (
                r#"runc create failed: unable to start container process: exec: \"/bin/nope\": stat /bin/nope: no such file or directory"#,
                Reason::ExecutableNotFound,
            ),
            (
                r#"exec failed: unable to start container process: exec: \"nope\": executable file not found in $PATH"#,
                Reason::ExecutableNotFound,
            ),
            (
                r#"exec failed: unable to start container process: exec: \"/etc\": permission denied"#,
                Reason::ExecutableRefused,
            ),
            ("cannot start an already running container", Reason::NotRunning),
            ("cannot start a container that has stopped", Reason::NotRunning),
            ("cannot delete container c1 that is not stopped: running", Reason::NotRunning),
            ("container not running", Reason::NotRunning),
            ("exec failed: cannot exec in a stopped container", Reason::NotRunning),
            ("container not paused", Reason::NotPaused),
            (
                "exec failed: cannot exec in a paused container (use --ignore-paused to override)",
                Reason::Paused,
            ),
            (r"No help topic for 'nosuchverb'\n", Reason::Unsupported),
            ("flag provided but not defined: -nosuchflag", Reason::Unsupported),
            ("runc create failed: unexpected EOF", Reason::Other),
            (
                "runc create failed: write /run/r/c1/.state-1: no space left on device",
                Reason::NoSpace,
            ),
        ] {
            let line =
                format!(r#"{{"level":"error","msg":"{msg}","time":"2026-11-24T08:59:39Z"}}"#);
            assert_eq!(logged(&line), wanted, "{msg}");
        }
    }

    #[test]
    fn what_crun_1_8_says_is_understood() {
        for (msg, wanted) in [
            (
                "error opening file `/run/r/exec/none/status`: No such file or directory",
                Reason::NoSuchContainer,
            ),
            (
                "cannot open directory '/run/r/none': No such file or directory",
                Reason::NoSuchContainer,
            ),
            (
                "cannot rm state directory `/run/r/c1`: No such file or directory",
                Reason::NoSuchContainer,
            ),
            ("container `c1` already exists", Reason::AlreadyExists),
            (
                "executable file `nope` not found in $PATH: No such file or directory",
                Reason::ExecutableNotFound,
            ),
            ("open executable: Operation not permitted", Reason::ExecutableRefused),
            ("cannot open `/run/r/c1/exec.fifo`: No such file or directory", Reason::NotRunning),
            ("the container `c1` is not in `created` or `stopped` state", Reason::NotRunning),
            ("setns(pid=9727, CLONE_NEWUSER): No such process", Reason::NotRunning),
            ("the container `c1` is paused", Reason::Paused),
            ("error loading config.json", Reason::Other),
            ("unknown version specified", Reason::Other),
        ] {
            let line = format!(
                r#"{{"msg":"{msg}","level":"error","time":"2026-11-24T08:59:40.945306Z"}}"#
            );
            assert_eq!(logged(&line), wanted, "{msg}");
        }
        // Before it has a log it only has its standard error.
        assert_eq!(logged("unknown command features\n"), Reason::Unsupported);
        assert_eq!(
            logged("create: unrecognized option '--nosuchflag'\nTry …"),
            Reason::Unsupported
        );
    }

    #[test]
    fn the_last_error_of_the_log_is_the_message() {
        let log = concat!(
            r#"{"msg":"fail startup","level":"error","time":"t"}"#,
            "\n",
            r#"{"level":"warning","msg":"unimportant","time":"t"}"#,
            "\nplain text\n",
            r#"{"msg":"the cause","level":"error","time":"t"}"#,
            "\n",
        );
        assert_eq!(message(log.as_bytes(), Exit::Code(1)), "the cause");
        assert_eq!(message(b"one\n\ntwo\n", Exit::Code(1)), "one; two");
        // crun 1.28.
        let log = "{\n  \"msg\": \"the cause\",\n  \"level\": \"error\",\n  \"time\": \"t\"\n}\n";
        assert_eq!(message(log.as_bytes(), Exit::Code(1)), "the cause");
        assert_eq!(message(b"{ no json\nelse", Exit::Code(1)), "{ no json; else");
        assert_eq!(message(b"", Exit::Signal(9)), "ended by signal 9");
    }
}

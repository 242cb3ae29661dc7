//! Running one plugin once: environment, configuration on stdin, bounded output, deadline.
//!
//! Protocol: CNI specification, section 2. A plugin runs in a process group of its own, so that a
//! deadline takes its helpers (IPAM plugins, iptables) with it.

use std::{
    collections::{HashMap, VecDeque},
    ffi::OsString,
    fs::File,
    io::{self, Seek, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use rustix::{
    fs::MemfdFlags,
    process::{Pid, Signal},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, Command},
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    args::Target,
    config::Version,
    result::{Refusal, excerpt, refusal},
};

/// Most that is taken of a plugin's stdout, in bytes. Real results are a few KiB.
const MAX_OUTPUT: u64 = 1 << 20;
/// How much of the end of a plugin's stderr is kept for the error, in bytes.
const STDERR_TAIL: usize = 2048;
/// How long output is still read after the plugin has exited: a daemon that it left behind may
/// hold its pipes for ever.
const DRAIN: Duration = Duration::from_millis(500);
/// How long a killed plugin may take to die. One that is stuck in the kernel is left to tokio,
/// which reaps it when it is done.
const REAP: Duration = Duration::from_secs(2);
/// How long, and how often, a program that is just being written ("text file busy") is tried.
const BUSY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_millis(20));
/// Deadline of VERSION, which does no work.
const VERSION_TIMEOUT: Duration = Duration::from_secs(5);

/// Name of the file in memory that is a plugin's stdin. A later daemon knows our plugins by it.
pub(super) const STDIN_NAME: &str = "holdfast-cni-config";

/// `PATH` for plugins when the daemon has none: they call iptables, ip, modprobe.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a plugin is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Make the attachment.
    Add,
    /// Take it away.
    Del,
    /// Look whether it is as it was made.
    Check,
    /// Say whether ADD would work.
    Status,
    /// Take away everything that is not in a list.
    Gc,
    /// Say which versions are spoken.
    Version,
}

impl Verb {
    /// The value of `CNI_COMMAND`.
    pub fn as_str(self) -> &'static str {
        match self {
            Verb::Add => "ADD",
            Verb::Del => "DEL",
            Verb::Check => "CHECK",
            Verb::Status => "STATUS",
            Verb::Gc => "GC",
            Verb::Version => "VERSION",
        }
    }
}

impl std::fmt::Display for Verb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a plugin failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// It could not be started.
    #[error("start {}", path.display())]
    Start {
        /// The program.
        path: PathBuf,
        /// Why.
        source: Arc<io::Error>,
    },
    /// It said why it failed (specification, section 5: "Error").
    #[error("code {code}: {message}{}{details}", if details.is_empty() { "" } else { ": " })]
    Refused {
        /// CNI's code, or the plugin's own from 100 on.
        code: u64,
        /// Its `msg`.
        message: String,
        /// Its `details`.
        details: String,
    },
    /// It failed without saying why as the specification asks.
    #[error("{status}{}{output}", if output.is_empty() { ", without any output" } else { ": " })]
    Exited {
        /// Exit code or signal.
        status: ExitStatus,
        /// End of its stderr, else beginning of its stdout.
        output: String,
    },
    /// It had not finished at the deadline; it was killed with all its process group.
    #[error("not finished after {} s; it was killed", after.as_secs_f32())]
    Deadline {
        /// How long it had, of the time that the whole list has.
        after: Duration,
    },
    /// It printed more than a result can be; it was killed.
    #[error("printed more than {MAX_OUTPUT} bytes; it was killed")]
    TooMuchOutput,
    /// It succeeded with something that is not a result.
    #[error("its answer is of no use: {0}")]
    Answer(#[from] super::result::Flaw),
    /// Its pipes or its exit status could not be read.
    #[error("wait for it")]
    Wait(#[source] Arc<io::Error>),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused { code: refusal.code, message: refusal.message, details: refusal.details }
    }
}

/// An installed plugin.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) path: PathBuf,
    /// Tells one build from the next.
    stamp: (u64, u64, i64, i64),
}

/// The plugins that are installed, and how they are run.
#[derive(Debug)]
pub(super) struct Plugins {
    dirs: Vec<PathBuf>,
    /// Environment of every plugin, without the `CNI_` variables of the call.
    env: Vec<(OsString, OsString)>,
    /// Answers to VERSION, by program.
    versions: Mutex<HashMap<PathBuf, (Program, Speaks)>>,
}

/// Which versions a plugin speaks.
#[derive(Clone, Debug)]
pub(super) enum Speaks {
    /// As it says.
    These(Arc<[Version]>),
    /// It does not answer VERSION as it should, so only the call itself will tell.
    Unknown,
}

impl Speaks {
    pub(super) fn includes(&self, version: Version) -> bool {
        match self {
            Speaks::These(versions) => versions.contains(&version),
            Speaks::Unknown => true,
        }
    }
}

impl Plugins {
    pub(super) fn new(dirs: Vec<PathBuf>) -> Self {
        let path = std::env::join_paths(&dirs).unwrap_or_else(|_| {
            // A directory with `:` in its name cannot be searched by plugins.
            dirs.first().map(|dir| dir.clone().into_os_string()).unwrap_or_default()
        });
        let mut env = environment(std::env::vars_os());
        env.push(("CNI_PATH".into(), path));
        Self { dirs, env, versions: Mutex::default() }
    }

    /// The first executable of that name in the plugin directories. `kind` is a plain file name.
    pub(super) fn find(&self, kind: &str) -> Option<Program> {
        self.dirs.iter().find_map(|dir| {
            let path = dir.join(kind);
            let meta = path.metadata().ok()?;
            let usable = meta.is_file() && meta.permissions().mode() & 0o111 != 0;
            let stamp = (meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec());
            usable.then_some(Program { path, stamp })
        })
    }

    /// Where plugins are looked for.
    pub(super) fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// What VERSION said, if it was asked since this build was installed.
    pub(super) fn known_versions(&self, program: &Program) -> Option<Speaks> {
        let cache = self.versions.lock().expect("nothing panics with it");
        let (asked, speaks) = cache.get(&program.path)?;
        (asked.stamp == program.stamp).then(|| speaks.clone())
    }

    /// Which versions a plugin speaks; asked once per build of it.
    pub(super) async fn versions(&self, program: &Program) -> Speaks {
        if let Some(known) = self.known_versions(program) {
            return known;
        }
        let ask = br#"{"cniVersion":"1.0.0"}"#;
        let deadline = Instant::now() + VERSION_TIMEOUT;
        let answer = self.run(program, Verb::Version, None, ask, deadline).await;
        let speaks = match &answer {
            Ok(answer) => {
                supported(answer).map_or(Speaks::Unknown, |found| Speaks::These(found.into()))
            }
            // A plugin without the verb: from the time before 0.2.0, or a script.
            Err(Failure::Refused { .. } | Failure::Exited { .. }) => Speaks::Unknown,
            // A fault of the moment is not remembered.
            Err(error) => {
                let error = crate::error::chain(error);
                let plugin = program.path.display();
                tracing::warn!(%plugin, error, "plugin does not tell its versions");
                return Speaks::Unknown;
            }
        };
        let mut cache = self.versions.lock().expect("nothing panics with it");
        cache.insert(program.path.clone(), (program.clone(), speaks.clone()));
        speaks
    }

    /// Runs a plugin to its end and returns its stdout.
    ///
    /// At the deadline its process group is killed. Cancelling the future leaves it running.
    pub(super) async fn run(
        &self,
        program: &Program,
        verb: Verb,
        target: Option<Target<'_>>,
        config: &[u8],
        deadline: Instant,
    ) -> Result<Vec<u8>, Failure> {
        let started = Instant::now();
        let mut child = self.spawn(program, verb, target, config).await?;
        let mut stdout = Vec::new();
        let mut stderr = VecDeque::new();
        let status = {
            let out = child.stdout.take().expect("it is piped");
            let err = child.stderr.take().expect("it is piped");
            let mut reading = std::pin::pin!(async {
                tokio::try_join!(read_output(out, &mut stdout), read_tail(err, &mut stderr))
            });
            let finished = timeout_at(deadline, async {
                tokio::select! {
                    biased;
                    // Output first: it tells of too much of it while the plugin still runs.
                    read = &mut reading => {
                        read?;
                        child.wait().await.map_err(wait_failed)
                    }
                    status = child.wait() => {
                        let status = status.map_err(wait_failed)?;
                        if let Ok(read) = timeout(DRAIN, &mut reading).await {
                            read?;
                        }
                        Ok(status)
                    }
                }
            });
            match finished.await {
                Ok(finished) => finished,
                Err(_) => Err(Failure::Deadline { after: deadline - started }),
            }
        };
        let status = match status {
            Ok(status) => status,
            Err(failure) => {
                kill_group(&mut child).await;
                return Err(failure);
            }
        };
        tracing::debug!(
            plugin = %program.path.display(), %verb, %status,
            milliseconds = started.elapsed().as_millis() as u64, "plugin ran"
        );
        if status.success() {
            return Ok(stdout);
        }
        if let Some(refusal) = refusal(&stdout) {
            return Err(refusal.into());
        }
        stderr.make_contiguous();
        let said = if stderr.iter().all(u8::is_ascii_whitespace) {
            excerpt(&stdout, STDERR_TAIL)
        } else {
            excerpt(stderr.as_slices().0, STDERR_TAIL)
        };
        Err(Failure::Exited { status, output: said })
    }

    async fn spawn(
        &self,
        program: &Program,
        verb: Verb,
        target: Option<Target<'_>>,
        config: &[u8],
    ) -> Result<Child, Failure> {
        let failed = |error| Failure::Start { path: program.path.clone(), source: Arc::new(error) };
        let started = Instant::now();
        loop {
            let mut command = Command::new(&program.path);
            command
                .env_clear()
                .envs(self.env.iter().map(|(name, value)| (name, value)))
                .env("CNI_COMMAND", verb.as_str())
                .stdin(Stdio::from(on_stdin(config).map_err(failed)?))
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .process_group(0);
            if let Some(target) = target {
                command
                    .env("CNI_CONTAINERID", target.container)
                    .env("CNI_NETNS", target.netns.unwrap_or(Path::new("")))
                    .env("CNI_IFNAME", target.interface)
                    .env("CNI_ARGS", target.args);
            }
            match command.spawn() {
                Ok(child) => return Ok(child),
                // Somebody installs a plugin just now, or has forked while writing it.
                Err(error)
                    if error.kind() == io::ErrorKind::ExecutableFileBusy
                        && started.elapsed() < BUSY.0 =>
                {
                    sleep(BUSY.1).await;
                }
                Err(error) => return Err(failed(error)),
            }
        }
    }
}

/// What plugins get of the daemon's environment: all but the service manager's sockets and what
/// belongs to a call of CNI.
fn environment(ours: impl Iterator<Item = (OsString, OsString)>) -> Vec<(OsString, OsString)> {
    let private = |name: &OsString| {
        let name = name.to_string_lossy();
        name.starts_with("CNI_")
            || name.starts_with("LISTEN_")
            || matches!(&*name, "NOTIFY_SOCKET" | "WATCHDOG_PID" | "WATCHDOG_USEC")
    };
    let mut env: Vec<_> = ours.filter(|(name, _)| !private(name)).collect();
    if !env.iter().any(|(name, _)| name == "PATH") {
        env.push(("PATH".into(), DEFAULT_PATH.into()));
    }
    env
}

fn wait_failed(error: io::Error) -> Failure {
    Failure::Wait(Arc::new(error))
}

/// A file in memory that holds the configuration: whatever its size, it is written without
/// waiting for the plugin to read it.
pub(super) fn on_stdin(config: &[u8]) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create(STDIN_NAME, MemfdFlags::CLOEXEC)?);
    file.write_all(config)?;
    file.rewind()?;
    Ok(file)
}

async fn read_output(pipe: impl AsyncRead + Unpin, into: &mut Vec<u8>) -> Result<(), Failure> {
    pipe.take(MAX_OUTPUT + 1).read_to_end(into).await.map_err(wait_failed)?;
    if into.len() as u64 > MAX_OUTPUT {
        return Err(Failure::TooMuchOutput);
    }
    Ok(())
}

async fn read_tail(
    mut pipe: impl AsyncRead + Unpin,
    into: &mut VecDeque<u8>,
) -> Result<(), Failure> {
    let mut buffer = [0; 1024];
    loop {
        let count = pipe.read(&mut buffer).await.map_err(wait_failed)?;
        if count == 0 {
            return Ok(());
        }
        into.extend(&buffer[..count]);
        let surplus = into.len().saturating_sub(STDERR_TAIL);
        into.drain(..surplus);
    }
}

/// Kills a plugin that was not yet waited for, and everything in its group.
async fn kill_group(child: &mut Child) {
    // `id` is `None` once the child is reaped; only until then is the number surely its group's.
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id as i32)) {
        let _ = rustix::process::kill_process_group(pid, Signal::KILL);
        let _ = timeout(REAP, child.wait()).await;
    }
}

/// `supportedVersions` of an answer to VERSION, as far as we know them.
fn supported(answer: &[u8]) -> Option<Vec<Version>> {
    let value: serde_json::Value = serde_json::from_slice(answer).ok()?;
    let names = value.get("supportedVersions")?.as_array()?;
    Some(names.iter().filter_map(|name| Version::parse(name.as_str()?)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugins_get_the_environment_but_not_what_is_the_daemons() {
        let env = |text: &str| {
            let pairs = text.split(' ').filter_map(|pair| pair.split_once('='));
            let pairs = pairs.map(|(name, value)| (name.into(), value.into()));
            let env = environment(pairs).into_iter();
            let pairs = env.map(|(n, v)| format!("{}={}", n.display(), v.display()));
            pairs.collect::<Vec<_>>().join(" ")
        };
        let ours = "A=1 NOTIFY_SOCKET=/x LISTEN_FDS=1 WATCHDOG_USEC=9 CNI_ARGS=x PATH=/bin LANG=C";
        assert_eq!(env(ours), "A=1 PATH=/bin LANG=C");
        assert_eq!(env("A=1"), format!("A=1 PATH={DEFAULT_PATH}"));
    }

    #[test]
    fn only_versions_that_we_know_are_taken_from_an_answer() {
        let answer = br#"{"cniVersion":"9.0.0","supportedVersions":["0.4.0","9.0.0",7]}"#;
        assert_eq!(supported(answer), Some(vec![Version::V0_4_0]));
        for bad in ["", "[]", "{}", r#"{"supportedVersions":"1.0.0"}"#] {
            assert_eq!(supported(bad.as_bytes()), None, "{bad}");
        }
    }
}

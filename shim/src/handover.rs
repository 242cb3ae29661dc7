//! The upgrade of a running shim: it executes the new binary in its own place, so that it stays the
//! parent of its containers, and hands over what it knows and what it has open.
//!
//! ```text
//! look      the new binary is run apart with the state, and says whether it can read it
//! quiet     no call is under way, no exit is being settled, no byte is in our hands
//! hand over state in a memfd; listeners, pidfds, pipes, terminals, attached clients stay open
//! execve    on an error everything is as it was; else the new code takes over and answers
//! ```
//! What is not handed over are connections of the Task service: who had one connects again.

use std::{
    ffi::{CString, OsString},
    fs::File,
    io::{self, Read as _, Seek as _, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStringExt as _,
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde::{Deserialize, Serialize};

use crate::{
    bootstrap::Arguments,
    control::{Attach, Kept},
    memory,
    pod::{Error, Pod, Saved},
    process::{Reaper, lock, report},
    runtime::memfd,
};

/// How long the new binary may take to say that it can read the state.
const LOOK: Duration = Duration::from_secs(10);

/// How long calls, exits and slow clients are waited for before the upgrade is put off.
const QUIET: Duration = Duration::from_secs(5);

/// What a binary says that can take over.
pub(crate) const CAN: &str = "holdfast-shim can take over";

/// Calls hold it shared; the upgrade alone, for good.
pub(crate) static CALLS: tokio::sync::RwLock<()> = tokio::sync::RwLock::const_new(());

static BUSY: AtomicUsize = AtomicUsize::new(0);

/// While it lives something is in our hands that would be lost: bytes, or an exit.
pub(crate) struct Busy(());

impl Busy {
    pub(crate) fn begin() -> Self {
        BUSY.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        BUSY.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All that the new code is given. Fields are only added, with a default; see `pod::saved` for what
/// keeps neighbouring releases apart.
#[derive(Serialize, Deserialize)]
pub(crate) struct Handover {
    pub(crate) bundle: PathBuf,
    pub(crate) state: serde_json::Value,
    pub(crate) listener: RawFd,
    #[serde(default)]
    pub(crate) control: Option<RawFd>,
    /// Who asked for the upgrade, and waits.
    #[serde(default)]
    pub(crate) asker: Option<RawFd>,
    /// By the names under which they are lent.
    #[serde(default)]
    fds: Vec<(String, RawFd)>,
    /// Of each container: the text after its last line feed, of both streams.
    #[serde(default)]
    pub(crate) unfinished: Vec<(String, [Vec<u8>; 2])>,
    #[serde(default)]
    pub(crate) attached: Vec<AttachedClient>,
    /// Events that are not acknowledged yet, as `Envelope`s.
    #[serde(default)]
    pub(crate) events: Vec<Vec<u8>>,
}

/// A client of `attach`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct AttachedClient {
    pub(crate) fd: RawFd,
    pub(crate) container: String,
    pub(crate) streams: Attach,
}

/// Where this process was started from, for the next one.
pub(crate) struct Origin {
    pub(crate) arguments: Arguments,
    pub(crate) listener: RawFd,
    pub(crate) control: Option<RawFd>,
}

/// Checks a state on standard input: what the new binary is run for, apart.
pub(crate) fn look() -> Result<(), String> {
    let mut bytes = Vec::new();
    io::stdin().read_to_end(&mut bytes).map_err(|error| format!("standard input: {error}"))?;
    let handover: Handover =
        serde_json::from_slice(&bytes).map_err(|error| format!("what is handed over: {error}"))?;
    Saved::from_value(&handover.state)?;
    println!("{CAN}");
    Ok(())
}

/// Reads what the code before us has handed over.
#[expect(unsafe_code, reason = "inherited descriptors become owned")]
pub(crate) fn receive(fd: RawFd) -> Result<(Handover, Kept), String> {
    // SAFETY: by the contract of the argument it is ours alone.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let mut bytes = Vec::new();
    file.rewind()
        .and_then(|()| file.read_to_end(&mut bytes))
        .map_err(|error| format!("what is handed over: {error}"))?;
    let mut handover: Handover =
        serde_json::from_slice(&bytes).map_err(|error| format!("what is handed over: {error}"))?;
    let mut kept = Kept::new();
    for (name, fd) in std::mem::take(&mut handover.fds) {
        kept.insert(name, inherited(fd)?);
    }
    Ok((handover, kept))
}

/// Makes a descriptor that outlived the exec ours.
#[expect(unsafe_code, reason = "an inherited descriptor becomes owned")]
pub(crate) fn inherited(fd: RawFd) -> Result<OwnedFd, String> {
    keep_over_exec(fd, false).map_err(|error| format!("descriptor {fd}: {error}"))?;
    // SAFETY: it is open, and the code before us has left it to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[expect(unsafe_code, reason = "a descriptor by its number")]
fn keep_over_exec(fd: RawFd, keep: bool) -> io::Result<()> {
    // SAFETY: only for the length of the call; one that is not open is an error.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let flags = if keep { FdFlag::empty() } else { FdFlag::FD_CLOEXEC };
    fcntl(fd, FcntlArg::F_SETFD(flags))?;
    Ok(())
}

fn gather(pod: &Pod, origin: &Origin, asker: Option<RawFd>) -> Result<Handover, String> {
    let state = serde_json::to_value(pod.saved()).map_err(|error| error.to_string())?;
    Ok(Handover {
        bundle: pod.bundle.dir().to_owned(),
        state,
        listener: origin.listener,
        control: origin.control,
        asker,
        fds: Vec::new(),
        unfinished: pod.unfinished(),
        attached: lock(&pod.attached).values().map(|(client, _)| client.clone()).collect(),
        events: pod.events.unacknowledged(),
    })
}

fn to_memfd(handover: &Handover) -> io::Result<File> {
    let mut file = memfd(c"handover")?;
    serde_json::to_writer(&mut file, handover)?;
    file.flush()?;
    file.rewind()?;
    Ok(file)
}

/// Has a binary say whether it can take over.
async fn ask(binary: &Path, handover: &Handover, reaper: &Arc<Reaper>) -> Result<(), String> {
    let name = binary.display();
    let state = to_memfd(handover).map_err(|error| format!("memfd: {error}"))?;
    let mut answer = memfd(c"answer").map_err(|error| format!("memfd: {error}"))?;
    let out = answer.try_clone().map_err(|error| error.to_string())?;
    let err = answer.try_clone().map_err(|error| error.to_string())?;
    let mut command = Command::new(binary);
    command.args(["-namespace", "n", "-id", "i", "look"]).stdin(state).stdout(out).stderr(err);
    command.current_dir("/").env_clear();
    let child = reaper.spawn(&mut command).map_err(|error| format!("run {name}: {error}"))?;
    let ended = tokio::time::timeout(LOOK, child.wait()).await;
    if ended.is_err() {
        let _ = child.signal(libc::SIGKILL);
        let _ = child.wait().await;
        return Err(format!("{name} does not answer within {LOOK:?}"));
    }
    let mut said = String::new();
    let _ = answer.rewind().and_then(|()| (&mut answer).take(4096).read_to_string(&mut said));
    match said.trim() {
        said if said == CAN => Ok(()),
        "" => Err(format!("{name} is no shim that can take over")),
        said => Err(format!("{name} cannot take over: {}", said.replace('\n', " "))),
    }
}

/// Executes `binary` in our place. Comes back only with an error, and then nothing has changed.
pub(crate) async fn upgrade(
    pod: &Arc<Pod>,
    origin: &Origin,
    binary: &Path,
    asker: RawFd,
) -> Result<std::convert::Infallible, Error> {
    let refused = |text: String| Error::Precondition(text);
    if pod.orphan_is_waiting() {
        return Err(Error::Orphaned);
    }
    let draft = gather(pod, origin, None).map_err(refused)?;
    ask(binary, &draft, &pod.reaper).await.map_err(refused)?;

    let by = tokio::time::Instant::now() + QUIET;
    let _alone = tokio::time::timeout_at(by, CALLS.write())
        .await
        .map_err(|_| refused(format!("a call is under way, and not done within {QUIET:?}")))?;
    while BUSY.load(Ordering::Relaxed) > 0 || pod.clients_are_behind() {
        if tokio::time::Instant::now() >= by {
            let text = format!(
                "a client that does not take its output, or an exit, is in the way for {QUIET:?}"
            );
            return Err(refused(text));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    pod.can_be_handed_over().map_err(refused)?;
    // From here on nothing is waited for, so nothing else runs.
    let mut handover = gather(pod, origin, Some(asker)).map_err(refused)?;
    let lending = pod.lending();
    handover.fds = lending
        .iter()
        .map(|(name, fd)| (name.clone(), std::os::fd::AsFd::as_fd(fd).as_raw_fd()))
        .collect();
    let file = to_memfd(&handover).map_err(|error| refused(format!("memfd: {error}")))?;
    let mut open: Vec<RawFd> = handover.fds.iter().map(|(_, fd)| *fd).collect();
    open.extend([handover.listener, asker, file.as_raw_fd()]);
    open.extend(handover.control);
    open.extend(handover.attached.iter().map(|client| client.fd));
    let error = execute(binary, &origin.arguments, &file, &open);
    for fd in open {
        let _ = keep_over_exec(fd, false);
    }
    report!("upgrade to {}: {error}", binary.display());
    Err(refused(format!("execute {}: {error}", binary.display())))
}

fn execute(binary: &Path, arguments: &Arguments, file: &File, open: &[RawFd]) -> io::Error {
    let done = (|| {
        for fd in open {
            keep_over_exec(*fd, true)?;
        }
        let text = |text: OsString| CString::new(text.into_vec()).map_err(io::Error::other);
        let path = text(binary.as_os_str().to_owned())?;
        let mut argv = vec![text("containerd-shim-holdfast-v2".into())?];
        for argument in ["-namespace", &arguments.namespace, "-id", &arguments.id] {
            argv.push(text(argument.into())?);
        }
        for argument in ["-address", &arguments.address, "-handover"] {
            argv.push(text(argument.into())?);
        }
        argv.push(text(file.as_raw_fd().to_string().into())?);
        argv.push(text("serve".into())?);
        let mut environment = Vec::new();
        if let Some((variable, settings)) = memory::environment() {
            environment.push(text(format!("{variable}={settings}").into())?);
        }
        for (mut name, value) in std::env::vars_os() {
            name.push("=");
            name.push(value);
            environment.push(text(name)?);
        }
        // Not by `Command`, which changes signals before it fails.
        nix::unistd::execve(&path, &argv, &environment)?;
        Ok::<(), io::Error>(())
    })();
    done.err().unwrap_or_else(|| io::Error::other("it came back"))
}

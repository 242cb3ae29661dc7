//! Processes the shim answers for: signals, the subreaper, pidfds.
//!
//! Every process that somebody waits for is [`Owned`]: its pidfd is opened before it can be reaped,
//! and only its owner reaps it. Everything else that ends as our child is an orphan that we adopted
//! as subreaper; [`Reaper::sweep`] reaps those. While a runtime call is under way that will bring
//! forth a process whose pid is not known yet ([`Launch`]), no orphan is reaped, for it could be
//! that process.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI32, AtomicU64, Ordering},
    },
};

use tokio::io::{Interest, unix::AsyncFd};

use crate::{bundle::Exit, stat::stat_of};

/// How long the end of a process that is not ours may go without anybody knowing how it was.
const STRANGER: std::time::Duration = std::time::Duration::from_secs(5);

/// Writes a line to the shim's own log, which is its standard error.
macro_rules! report {
    ($($part:tt)*) => {{
        use std::io::Write as _;
        // Nobody need be reading.
        let _ = writeln!(std::io::stderr(), $($part)*);
    }};
}
pub(crate) use report;

/// Locks; a panic aborts the shim, so a poisoned lock cannot be met.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The error of a libc call that gave -1.
pub(crate) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A descriptor that can be waited for.
#[expect(unsafe_code, reason = "the contract of AsyncFd")]
pub(crate) fn watch_fd(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: it is owned, so it stays open, and the same, until it is deregistered.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}

static WAKE: AtomicI32 = AtomicI32::new(-1);
static PENDING: AtomicU64 = AtomicU64::new(0);

#[expect(unsafe_code, reason = "a signal handler may only make system calls")]
extern "C" fn on_signal(signal: libc::c_int) {
    PENDING.fetch_or(1 << signal, Ordering::Relaxed);
    let one = 1u64;
    // SAFETY: write(2) and errno are async-signal-safe, and the eventfd is never closed.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(WAKE.load(Ordering::Relaxed), (&raw const one).cast(), 8);
        *libc::__errno_location() = errno;
    }
}

/// The signals the shim handles, through an eventfd: tokio's own registry would keep a channel for
/// every signal there is.
pub(crate) struct Signals {
    wake: AsyncFd<OwnedFd>,
}

impl Signals {
    /// Handles `signals` from here on. Children get the default handlers by exec.
    #[expect(unsafe_code, reason = "eventfd(2), sigaction(2)")]
    pub(crate) fn new(signals: &[libc::c_int]) -> io::Result<Self> {
        // SAFETY: no memory is involved.
        let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        WAKE.store(fd, Ordering::Relaxed);
        // SAFETY: a new descriptor that is nobody else's; it lives as long as the process.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let wake = watch_fd(fd, Interest::READABLE)?;
        for signal in signals {
            // SAFETY: zero is a valid sigaction; the handler keeps to async-signal-safe calls.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_signal as *const () as usize;
                action.sa_flags = libc::SA_RESTART | libc::SA_NOCLDSTOP;
                check(libc::sigaction(*signal, &raw const action, std::ptr::null_mut()))?;
            }
        }
        Ok(Self { wake })
    }

    /// Waits for signals; gives those that came, bit N for signal N.
    #[expect(unsafe_code, reason = "read(2) of the eventfd")]
    pub(crate) async fn next(&self) -> io::Result<u64> {
        loop {
            self.wake.readable().await?.clear_ready();
            let mut count = 0u64;
            // SAFETY: eight bytes are what an eventfd gives.
            unsafe { libc::read(self.wake.as_raw_fd(), (&raw mut count).cast(), 8) };
            let came = PENDING.swap(0, Ordering::Relaxed);
            if came != 0 {
                return Ok(came);
            }
        }
    }
}

/// Becomes the reaper of what containers and runtimes leave behind.
#[expect(unsafe_code, reason = "prctl(2)")]
pub(crate) fn become_subreaper() -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }).map(drop)
}

/// Who may reap whom.
#[derive(Default)]
pub(crate) struct Reaper {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    owned: Vec<i32>,
    launches: usize,
}

/// While it lives, no orphan is reaped.
pub(crate) struct Launch(Arc<Reaper>);

impl Drop for Launch {
    fn drop(&mut self) {
        lock(&self.0.state).launches -= 1;
        self.0.sweep();
    }
}

impl Reaper {
    /// Holds the sweeping of orphans until the pid of a process that is being made is known.
    pub(crate) fn launch(self: &Arc<Self>) -> Launch {
        lock(&self.state).launches += 1;
        Launch(self.clone())
    }

    /// Starts a program and owns it.
    pub(crate) fn spawn(self: &Arc<Self>, command: &mut Command) -> io::Result<Owned> {
        // Nothing else runs between the two on this one thread.
        let child = command.spawn()?;
        self.own(child.id())
    }

    /// Owns a child by its pid, which must not have been reaped.
    #[expect(unsafe_code, reason = "pidfd_open(2)")]
    pub(crate) fn own(self: &Arc<Self>, pid: u32) -> io::Result<Owned> {
        let raw = i32::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: no memory is involved.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, raw, 0) };
        let fd = check(fd as libc::c_int)?;
        // SAFETY: a new descriptor that is nobody else's.
        self.own_fd(pid, unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Owns a process, child or not, by a pidfd that was opened while it lived.
    pub(crate) fn own_fd(self: &Arc<Self>, pid: u32, fd: OwnedFd) -> io::Result<Owned> {
        let fd = watch_fd(fd, Interest::READABLE)?;
        lock(&self.state).owned.push(pid.cast_signed());
        Ok(Owned { pid, fd, reaper: self.clone() })
    }

    /// Owns a process that is nobody's child of ours, if it is still the one that began at `began`.
    pub(crate) fn own_stranger(self: &Arc<Self>, pid: u32, began: u64) -> Option<Owned> {
        let owned = self.own(pid).ok()?;
        // Looked at after the pidfd was opened: a pid that was given away since belongs to a process
        // that began later.
        (stat_of(pid)?.began == began).then_some(owned)
    }

    /// Reaps the orphans that have ended.
    #[expect(unsafe_code, reason = "waitid(2)")]
    pub(crate) fn sweep(&self) {
        let state = lock(&self.state);
        if state.launches > 0 {
            return;
        }
        loop {
            // A look only: which child is it?
            // SAFETY: zero is a valid siginfo, and it outlives the calls.
            let pid = unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
                if libc::waitid(libc::P_ALL, 0, &raw mut info, flags) < 0 {
                    return;
                }
                info.si_pid()
            };
            // Its owner reaps it, and sweeps then: the kernel shows one child at a time.
            if pid == 0 || state.owned.contains(&pid) {
                return;
            }
            // SAFETY: as above; the pid cannot be another's before this reaps it.
            unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                let flags = libc::WEXITED | libc::WNOHANG;
                libc::waitid(libc::P_PID, pid.unsigned_abs(), &raw mut info, flags);
            }
        }
    }
}

/// A process whose end somebody waits for.
pub(crate) struct Owned {
    pid: u32,
    fd: AsyncFd<OwnedFd>,
    reaper: Arc<Reaper>,
}

impl Owned {
    /// Its pid.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Its pidfd.
    pub(crate) fn pidfd(&self) -> &OwnedFd {
        self.fd.get_ref()
    }

    /// Waits for its end, and reaps it.
    pub(crate) async fn wait(&self) -> io::Result<Exit> {
        self.ended().await?;
        self.exit().await
    }

    /// Waits for its end, and reaps nothing.
    pub(crate) async fn ended(&self) -> io::Result<()> {
        self.fd.readable().await?.retain_ready();
        Ok(())
    }

    /// Reaps it, once it has ended. A process that is not our child (the runtime kept it, or its
    /// shim died and we adopted it) is reaped by somebody else; how it ended is known all the same.
    pub(crate) async fn exit(&self) -> io::Result<Exit> {
        if let Some(exit) = self.reap()? {
            return Ok(exit);
        }
        let by = tokio::time::Instant::now() + STRANGER;
        loop {
            if let Some(exit) = self.exit_of_stranger() {
                return Ok(exit);
            }
            if tokio::time::Instant::now() >= by {
                return Err(io::Error::other("nobody can tell how it ended"));
            }
            // Between its end and its reaping neither has the kernel told.
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }

    /// `None`: it is no child of ours.
    #[expect(unsafe_code, reason = "waitid(2)")]
    fn reap(&self) -> io::Result<Option<Exit>> {
        // SAFETY: zero is a valid siginfo; its fields are read as those of an ended child.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let fd = self.fd.as_raw_fd().unsigned_abs();
            match check(libc::waitid(libc::P_PIDFD, fd, &raw mut info, libc::WEXITED)) {
                Ok(_) => {
                    let status = info.si_status();
                    Ok(Some(match info.si_code {
                        libc::CLD_EXITED => Exit::Code(status as u8),
                        _ => Exit::Signal(status as u8),
                    }))
                }
                Err(error) if error.raw_os_error() == Some(libc::ECHILD) => Ok(None),
                Err(error) => Err(error),
            }
        }
    }

    /// How a process ended that we cannot reap: the kernel tells by the pidfd once it was reaped
    /// (Linux 6.15), and in /proc as long as it was not (proc_pid_stat(5), `exit_code`).
    fn exit_of_stranger(&self) -> Option<Exit> {
        if let Some(exit) = exit_by_pidfd(&self.fd) {
            return Some(exit);
        }
        let stat = stat_of(self.pid).filter(|stat| stat.zombie)?;
        // The stat was this process' only if that is still there: a reaped one takes no signal.
        self.signal(0).ok().map(|()| exit_of_status(stat.exit_code))
    }

    /// Sends a signal to it, and to nothing else.
    #[expect(unsafe_code, reason = "pidfd_send_signal(2)")]
    pub(crate) fn signal(&self, signal: i32) -> io::Result<()> {
        // SAFETY: no siginfo is passed.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        check(sent as libc::c_int).map(drop)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let pid = self.pid.cast_signed();
        let mut state = lock(&self.reaper.state);
        if let Some(place) = state.owned.iter().position(|owned| *owned == pid) {
            state.owned.swap_remove(place);
        }
        drop(state);
        self.reaper.sweep();
    }
}

/// `PIDFD_GET_INFO` with the exit bit: Linux 6.15 (include/uapi/linux/pidfd.h).
#[expect(unsafe_code, reason = "ioctl(2)")]
fn exit_by_pidfd(fd: &AsyncFd<OwnedFd>) -> Option<Exit> {
    #[repr(C)]
    #[derive(Default)]
    struct PidfdInfo {
        mask: u64,
        cgroup: u64,
        ids: [u32; 11],
        exit_code: i32,
    }
    const EXIT: u64 = 1 << 3;
    const GET_INFO: libc::c_ulong = 0xc040_ff0b;
    let mut info = PidfdInfo { mask: EXIT, ..PidfdInfo::default() };
    // SAFETY: the structure is that of the request, 64 bytes.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), GET_INFO, &raw mut info) }).ok()?;
    (info.mask & EXIT != 0).then(|| exit_of_status(info.exit_code))
}

/// A wait status (wait(2)) of a process that has ended.
fn exit_of_status(status: i32) -> Exit {
    if libc::WIFSIGNALED(status) {
        Exit::Signal(libc::WTERMSIG(status) as u8)
    } else {
        Exit::Code(libc::WEXITSTATUS(status) as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_status_is_a_code_or_a_signal() {
        assert_eq!(exit_of_status(42 << 8), Exit::Code(42));
        assert_eq!(exit_of_status(9), Exit::Signal(9));
        assert_eq!(exit_of_status(0x80 | 11), Exit::Signal(11), "with a core");
    }

    #[tokio::test]
    async fn the_exit_of_somebody_elses_child_is_known_while_it_is_a_zombie_and_after() {
        // The shell leaves its child to whoever reaps orphans here, and that may take its time.
        let script = "sh -c 'read x <\"$0\"; exit 42' \"$0\" >/dev/null 2>&1 & echo $!";
        let dir = tempfile::tempdir().unwrap();
        let gate = dir.path().join("gate");
        nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let said = Command::new("sh").args(["-c", script]).arg(&gate).output().unwrap();
        let pid: u32 = String::from_utf8(said.stdout).unwrap().trim().parse().unwrap();
        let reaper = Arc::<Reaper>::default();
        let began = stat_of(pid).unwrap().began;
        assert!(reaper.own_stranger(pid, began + 1).is_none(), "another process");
        let owned = reaper.own_stranger(pid, began).unwrap();
        std::fs::write(&gate, "go\n").unwrap();
        assert_eq!(owned.wait().await.unwrap(), Exit::Code(42));
    }
}

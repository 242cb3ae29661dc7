//! The first process of a PID namespace that a pod's containers share: it reaps, and ends on
//! SIGTERM. Its end is that of the namespace. Without one it only holds the pod's namespaces.

use std::io;

use crate::process::check;

/// Its name in `ps`, and how the binary knows that it is to be it.
pub(crate) const NAME: &str = "pod-init";

/// Reaps until SIGTERM or SIGINT.
#[expect(unsafe_code, reason = "signals and waiting, without a runtime: every byte counts")]
pub(crate) fn run() -> io::Result<()> {
    // SAFETY: no memory but the signal set and the siginfo of this frame is involved.
    unsafe {
        // Nothing that the shim had open may live on in here.
        libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
        libc::setsid();
        check(libc::chdir(c"/".as_ptr()))?;
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT] {
            libc::sigaddset(&raw mut signals, signal);
        }
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const signals, std::ptr::null_mut()))?;
        loop {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            match libc::sigwaitinfo(&raw const signals, &raw mut info) {
                libc::SIGTERM | libc::SIGINT => return Ok(()),
                _ => while libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 {},
            }
        }
    }
}

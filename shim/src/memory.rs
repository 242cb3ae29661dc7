//! The shim's heap: one shim runs for each pod, for months, so what it does must leave nothing behind.
//!
//! What is live is small, some 100 KiB, and does not grow. What grew was what glibc keeps of freed memory:
//! - its thread cache keeps seven chunks of each of 64 sizes, 240 KiB in time, as the texts that a shim
//!   handles have all lengths. It is switched off, by a tunable, which glibc reads before `main`: so
//!   it is in the environment of `serve`, and taken out for those that are started from here;
//! - pages in the middle of the heap that a burst has left. They are given back soon after it.

use std::{
    ffi::OsString, io, os::unix::process::CommandExt as _, process::Command, time::Duration,
};

use tokio::sync::Notify;

/// Where glibc looks for its settings (The GNU C Library, Tunables).
const VARIABLE: &str = "GLIBC_TUNABLES";
const NO_THREAD_CACHE: &str = "glibc.malloc.tcache_count=0";

/// How long after the first use the heap is gone through: at most once in this time, and an idle shim
/// sleeps.
const PAUSE: Duration = Duration::from_secs(1);

static USED: Notify = Notify::const_new();

/// What the environment of a shim that is started from here needs for its heap, beside what it
/// inherits: who set something else keeps it.
pub(crate) fn environment() -> Option<(&'static str, &'static str)> {
    std::env::var_os(VARIABLE).is_none().then_some((VARIABLE, NO_THREAD_CACHE))
}

/// Sees to it that this process has the settings, if need be by executing itself once more: a shim that
/// was upgraded from a release without them comes without. Who set others keeps them.
pub(crate) fn begin() {
    match std::env::var_os(VARIABLE) {
        None if cfg!(target_env = "gnu") => {
            let mut arguments = std::env::args_os();
            let name = arguments.next().unwrap_or_default();
            let error = again(name, arguments);
            crate::process::report!("execute the shim once more: {error}");
        }
        Some(set) if set == NO_THREAD_CACHE => forget(),
        _ => {}
    }
}

fn again(name: OsString, arguments: impl Iterator<Item = OsString>) -> io::Error {
    Command::new("/proc/self/exe").arg0(name).args(arguments).env(VARIABLE, NO_THREAD_CACHE).exec()
}

/// It has been read; OCI runtimes and their hooks are not to have it.
#[expect(unsafe_code, reason = "the environment is changed")]
fn forget() {
    // SAFETY: there is one thread.
    unsafe { std::env::remove_var(VARIABLE) };
}

/// Something was done that may have left free pages.
pub(crate) fn used() {
    USED.notify_one();
}

/// Gives free pages back, for ever.
pub(crate) async fn keep_small() {
    loop {
        USED.notified().await;
        tokio::time::sleep(PAUSE).await;
        give_back();
    }
}

#[expect(unsafe_code, reason = "malloc_trim(3)")]
fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it touches free memory alone.
    unsafe {
        libc::malloc_trim(0);
    }
}

//! Crash points: places in the code where the recovery tests end the process as a power cut would.
//!
//! There is one after every durable write and around every call outside, in the daemon and in the
//! shim. The tests read the names from the sources, so a new one is tested without being listed.
//!
//! Without the feature `failpoints` a point is nothing, and its name is not in the binary. With it,
//! the directory named by `HOLDFAST_CRASH_DIR` says what is to happen:
//!
//! | file | meaning |
//! |---|---|
//! | `trace` | a line with the name for each time that a process has come by |
//! | `armed/<name>` | die at this point, once: at the passage whose number the file holds, or a later one |
//! | `fired/<name>` | where `armed/<name>` is moved by the process that dies |

/// A place to die at. `name` is unique in the sources: `<daemon|shim>.<walk>.<what was just done>`.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn point(_name: &str) {}

/// A place to die at. `name` is unique in the sources: `<daemon|shim>.<walk>.<what was just done>`.
#[cfg(feature = "failpoints")]
pub fn point(name: &str) {
    use std::{fs, io::Write as _, path::PathBuf, sync::OnceLock};
    static DIR: OnceLock<Option<PathBuf>> = OnceLock::new();
    let Some(dir) = DIR.get_or_init(|| std::env::var_os(DIR_VARIABLE).map(PathBuf::from)) else {
        return;
    };
    let trace = dir.join("trace");
    // One write each, so that the lines of several processes do not mix.
    let _ = fs::File::options()
        .create(true)
        .append(true)
        .open(&trace)
        .and_then(|mut file| file.write_all(format!("{name}\n").as_bytes()));
    let armed = dir.join("armed").join(name);
    let Ok(from) = fs::read_to_string(&armed) else { return };
    let from: usize = from.trim().parse().unwrap_or(1);
    let passages = fs::read_to_string(&trace).unwrap_or_default();
    let passages = passages.lines().filter(|line| *line == name).count();
    // One process alone succeeds in moving it.
    if passages >= from && fs::rename(&armed, dir.join("fired").join(name)).is_ok() {
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
        loop {
            std::thread::park();
        }
    }
}

/// Names the directory; see the module.
#[cfg(feature = "failpoints")]
const DIR_VARIABLE: &str = "HOLDFAST_CRASH_DIR";

#[cfg(all(feature = "failpoints", not(debug_assertions)))]
compile_error!(
    "crash points are for tests: a release build must not have the feature `failpoints`"
);

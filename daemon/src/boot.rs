//! The boot of the machine that this daemon runs in, and what an earlier one left in the state directory.
//!
//! With a boot all processes, mounts and namespaces are gone. Whatever is on record of them carries the id
//! of its boot, so that nobody takes another process for one of then.

use std::{
    fs, io,
    path::Path,
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use rustix::mount::UnmountFlags;
use tracing::{info, warn};

/// Says in the state directory in which boot it was last used.
const MARK: &str = "boot";

/// What stays of a bundle: who it was of, and how it ended.
const KEPT: [&str; 2] = [crate::store::copies::RECORD, "exit.json"];

/// The kernel's id of this boot (proc_sys_kernel(5)); empty if it cannot be read.
pub fn id() -> &'static str {
    static ID: OnceLock<String> = OnceLock::new();
    ID.get_or_init(|| {
        if let Some(id) = pretended("HOLDFAST_BOOT_ID") {
            return id;
        }
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        text.trim().to_owned()
    })
}

/// When this boot was, to the second (`btime` of proc_stat(5)).
pub fn time() -> Option<SystemTime> {
    let seconds = pretended("HOLDFAST_BOOT_TIME").or_else(|| {
        let stat = fs::read_to_string("/proc/stat").ok()?;
        let line = stat.lines().find_map(|line| line.strip_prefix("btime "))?;
        Some(line.trim().to_owned())
    });
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds?.parse().ok()?))
}

/// Whether something on record is of this boot. What carries no id, or on a kernel that tells none, is
/// judged by its processes instead.
pub fn is_now(recorded: &str) -> bool {
    recorded.is_empty() || id().is_empty() || recorded == id()
}

/// Tests cannot boot the machine: they say that it was.
#[cfg(feature = "failpoints")]
fn pretended(variable: &str) -> Option<String> {
    std::env::var(variable).ok()
}

#[cfg(not(feature = "failpoints"))]
fn pretended(_variable: &str) -> Option<String> {
    None
}

/// Takes from a state directory on a disk what is of an earlier boot: pid files, sockets, the OCI
/// runtime's state. Only records stay. May be repeated; the mark comes last.
///
/// # Errors
/// Something cannot be removed.
pub fn settle(state: &Path) -> io::Result<()> {
    settle_as(state, id())
}

fn settle_as(state: &Path, id: &str) -> io::Result<()> {
    let mark = state.join(MARK);
    let before = fs::read_to_string(&mark).unwrap_or_default();
    let before = before.trim();
    if before == id {
        return Ok(());
    }
    if !before.is_empty() {
        info!(state = %state.display(), "the state directory is of an earlier boot: only its records count");
        let bundles = state.join("bundles");
        unmount_below(&bundles);
        for name in ["runtime", "s", "exec"] {
            remove(&state.join(name))?;
        }
        for bundle in entries(&bundles)? {
            for path in entries(&bundle)? {
                let kept =
                    path.file_name().is_some_and(|name| KEPT.iter().any(|kept| name == *kept));
                if !kept {
                    remove(&path)?;
                }
            }
        }
    }
    // It is for the next boot alone; a directory that is full outlives none, mostly.
    if let Err(error) = fs::write(&mark, format!("{id}\n")) {
        warn!(path = %mark.display(), %error, "that the state directory is of this boot is not on record");
    }
    Ok(())
}

/// Nothing is mounted there after a boot, unless by somebody whose files are not ours to remove.
fn unmount_below(dir: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let below = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
    for path in below.filter(|path| path.starts_with(dir) && *path != dir) {
        if let Err(error) = rustix::mount::unmount(path, UnmountFlags::DETACH) {
            warn!(path = %path.display(), %error, "a mount of an earlier boot stays");
        }
    }
}

fn entries(dir: &Path) -> io::Result<Vec<std::path::PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    let is_dir = match path.symlink_metadata() {
        Ok(meta) => meta.is_dir(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_an_earlier_boot_only_records_stay() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        let bundle = state.join("bundles/abc");
        fs::create_dir_all(bundle.join("ns")).unwrap();
        fs::create_dir_all(state.join("runtime/abc")).unwrap();
        for name in ["record.json", "exit.json", "init.pid", "address", "ns/net"] {
            fs::write(bundle.join(name), "x").unwrap();
        }
        let names = || {
            let mut names: Vec<_> = entries(&bundle).unwrap();
            names.sort();
            names
                .iter()
                .map(|p| p.file_name().unwrap().to_str().unwrap().to_owned())
                .collect::<Vec<_>>()
        };
        // Of a release that left no mark: nobody knows.
        settle_as(state, "one").unwrap();
        settle_as(state, "one").unwrap();
        assert_eq!(names().len(), 5);
        settle_as(state, "two").unwrap();
        assert_eq!(names(), ["exit.json", "record.json"]);
        assert!(!state.join("runtime").exists());
        assert_eq!(fs::read_to_string(state.join(MARK)).unwrap(), "two\n");
    }

    #[test]
    fn what_carries_no_boot_is_not_taken_for_an_earlier_one() {
        assert!(is_now("") && is_now(id()));
        assert!(!is_now("11111111-2222-3333-4444-555555555555"));
        assert!(time().is_some_and(|time| time < SystemTime::now()));
    }
}

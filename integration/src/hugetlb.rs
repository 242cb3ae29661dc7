//! What crun needs on a host with both cgroup versions.
//!
//! crun refuses such a host while the v2 mount lists a controller. Where that is hugetlb alone, mounting
//! the v1 hugetlb hierarchy anywhere takes it away. A kubelet on the same host would adopt that mount,
//! so it must go again: the last node of all test processes on the machine removes it.
//!
//! Nodes that run runc take part too, because runc makes cgroups in every hierarchy it sees, and one
//! that is not empty cannot be taken down.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount, umount},
};

use crate::ground::{mountinfo, names_in};

const LOCK: &str = "/run/lock/holdfast-test-hugetlb";
/// Where the hierarchy is while it is mounted.
pub const MOUNT: &str = "/tmp/hft.hugetlb";
const UNIFIED: &str = "/sys/fs/cgroup/unified";

/// Held by a node as long as it lives.
#[derive(Debug)]
pub struct Hugetlb {
    lock: Option<Flock<File>>,
}

impl Hugetlb {
    /// Keeps the mount, and makes it when it is needed and `wanted`.
    ///
    /// # Errors
    /// mount(2) fails, or v2 lists controllers that this cannot take away.
    pub fn hold(wanted: bool) -> Result<Self> {
        if !wanted {
            return Ok(Self { lock: Some(flock(FlockArg::LockShared)?) });
        }
        // Changing an exclusive lock to a shared one is not atomic: look again once it is shared.
        for _ in 0..100 {
            let exclusive = flock(FlockArg::LockExclusiveNonblock);
            // Also while somebody else's mount keeps it away: that one may go at any time.
            let hybrid = Path::new(UNIFIED).join("cgroup.controllers").exists();
            if hybrid && !is_mounted() && controllers().iter().all(|name| name == "hugetlb") {
                fs::create_dir_all(MOUNT)?;
                let mounted = mount(
                    Some("cgroup"),
                    MOUNT,
                    Some("cgroup"),
                    MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
                    Some("hugetlb"),
                );
                match mounted {
                    // Another process was faster, or the kernel is still taking the last one down.
                    Err(Errno::EBUSY) => thread::sleep(Duration::from_millis(20)),
                    other => other.context("mount the v1 hugetlb hierarchy")?,
                }
            }
            drop(exclusive);
            let lock = flock(FlockArg::LockShared)?;
            let left = controllers();
            if left.is_empty() && (!hybrid || is_mounted()) {
                return Ok(Self { lock: Some(lock) });
            }
            if left.iter().any(|name| name != "hugetlb") {
                bail!("crun cannot run here: {UNIFIED} has the controllers {left:?}");
            }
        }
        bail!("another process keeps unmounting {MOUNT}")
    }
}

impl Drop for Hugetlb {
    fn drop(&mut self) {
        drop(self.lock.take());
        // Whoever gets this lock is the last.
        let Ok(_exclusive) = flock(FlockArg::LockExclusiveNonblock) else { return };
        if is_mounted() {
            for name in names_in(Path::new(MOUNT)) {
                if name.starts_with("hft-") {
                    remove_tree(&Path::new(MOUNT).join(name));
                }
            }
            if let Err(error) = umount(MOUNT) {
                eprintln!("{MOUNT} cannot be unmounted: {error}");
            }
            let _ = fs::remove_dir(MOUNT);
        }
    }
}

fn flock(kind: FlockArg) -> Result<Flock<File>> {
    fs::create_dir_all("/run/lock")?;
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(LOCK)
        .with_context(|| format!("open {LOCK}"))?;
    Flock::lock(file, kind).map_err(|(_, error)| error).with_context(|| format!("lock {LOCK}"))
}

fn is_mounted() -> bool {
    mountinfo("/proc/self/mountinfo").iter().any(|mount| mount.point == Path::new(MOUNT))
}

/// Controllers of v2 on a host that has v1 too; none on any other host.
fn controllers() -> Vec<String> {
    fs::read_to_string(Path::new(UNIFIED).join("cgroup.controllers"))
        .unwrap_or_default()
        .split_whitespace()
        .map(String::from)
        .collect()
}

fn remove_tree(dir: &PathBuf) {
    for name in names_in(dir) {
        let path = dir.join(name);
        if path.is_dir() {
            remove_tree(&path);
        }
    }
    let _ = fs::remove_dir(dir);
}

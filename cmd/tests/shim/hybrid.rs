//! On a hybrid cgroup host crun runs only while the version 2 mount has no controller. hugetlb is
//! the one that is left there; while its version 1 hierarchy is mounted, anywhere, it is not.
//!
//! The mount is shared by all tests of the machine, by one lock file: shared while in use, exclusive
//! while mounting and unmounting. The last one takes it away, for a kubelet on the same host would
//! trip over it. Tests with runc join too, because runc makes cgroups in every hierarchy it sees.

use std::{
    fs::{self, File},
    path::Path,
};

use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags, mount, umount2},
};

const LOCK: &str = "/run/lock/holdfast-test-hugetlb";
pub(crate) const MOUNT: &str = "/tmp/hft.hugetlb";
const CONTROLLERS: &str = "/sys/fs/cgroup/unified/cgroup.controllers";

pub(crate) struct Hybrid {
    lock: Option<Flock<File>>,
}

fn lock(how: FlockArg) -> Option<Flock<File>> {
    fs::create_dir_all("/run/lock").unwrap();
    let file = File::options().create(true).truncate(false).write(true).open(LOCK).unwrap();
    Flock::lock(file, how).ok()
}

fn controllers() -> String {
    fs::read_to_string(CONTROLLERS).unwrap_or_default().trim().to_owned()
}

fn is_mounted() -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().any(|line| line.split(' ').nth(4) == Some(MOUNT))
}

impl Hybrid {
    /// `needed`: no controller may be left on version 2.
    pub(crate) fn join(needed: bool) -> Self {
        for _ in 0..100 {
            // Also while somebody else's mount keeps it away: that one may go at any time.
            if needed && Path::new(CONTROLLERS).exists() && !is_mounted() {
                let exclusive = lock(FlockArg::LockExclusiveNonblock);
                if ["", "hugetlb"].contains(&&*controllers()) {
                    fs::create_dir_all(MOUNT).unwrap();
                    // Another may be as quick; what counts is looked at below.
                    let _ = mount(
                        Some("cgroup"),
                        MOUNT,
                        Some("cgroup"),
                        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
                        Some("hugetlb"),
                    );
                }
                drop(exclusive);
            }
            // From exclusive to shared is two steps: look again.
            let lock = lock(FlockArg::LockShared);
            let there = !Path::new(CONTROLLERS).exists() || is_mounted();
            if !needed || there && controllers().is_empty() {
                return Self { lock };
            }
        }
        panic!("version 2 keeps the controllers {:?}", controllers());
    }
}

impl Drop for Hybrid {
    fn drop(&mut self) {
        drop(self.lock.take());
        if let Some(_last) = lock(FlockArg::LockExclusiveNonblock) {
            for entry in fs::read_dir(MOUNT).into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().starts_with("hft-") {
                    let _ = fs::remove_dir(Path::new(MOUNT).join(entry.file_name()));
                }
            }
            if umount2(MOUNT, MntFlags::empty()).is_ok() {
                let _ = fs::remove_dir(MOUNT);
            }
        }
    }
}

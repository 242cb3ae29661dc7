//! On a hybrid cgroup host crun runs only while the version 2 mount has no controller. hugetlb is
//! the one that is left there; while its version 1 hierarchy is mounted, anywhere, it is not.
//!
//! The mount is shared by all tests of the machine that need it, and the last one takes it away
//! (a kubelet on the same host would trip over it). Two lock files do that: `gate` is held for a
//! moment while joining or leaving, `users` is shared by those who are in.

use std::{
    fs::{self, File},
    path::Path,
};

use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags, mount, umount2},
};

const DIR: &str = "/tmp/holdfast-hugetlb";

pub(crate) struct Hybrid {
    users: Option<Flock<File>>,
}

fn lock(name: &str, how: FlockArg) -> Option<Flock<File>> {
    let file = File::create(Path::new(DIR).join(name)).expect("lock file");
    Flock::lock(file, how).ok()
}

impl Hybrid {
    pub(crate) fn acquire() -> Self {
        let controllers = "/sys/fs/cgroup/unified/cgroup.controllers";
        let hybrid = Path::new(controllers).exists();
        if !hybrid {
            return Self { users: None };
        }
        fs::create_dir_all(DIR).unwrap();
        let _gate = lock("gate", FlockArg::LockExclusive).expect("gate");
        let users = lock("users", FlockArg::LockShared);
        if !fs::read_to_string(controllers).unwrap().trim().is_empty() {
            let place = Path::new(DIR).join("mount");
            fs::create_dir_all(&place).unwrap();
            mount(Some("cgroup"), &place, Some("cgroup"), MsFlags::empty(), Some("hugetlb"))
                .expect("mount the hugetlb hierarchy");
        }
        Self { users }
    }
}

impl Drop for Hybrid {
    fn drop(&mut self) {
        let Some(users) = self.users.take() else { return };
        let _gate = lock("gate", FlockArg::LockExclusive);
        drop(users);
        if lock("users", FlockArg::LockExclusiveNonblock).is_some() {
            let place = Path::new(DIR).join("mount");
            // A hierarchy with cgroups left in it would not go, and stay for ever: remove them.
            for entry in fs::read_dir(&place).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(entry.path());
            }
            let _ = umount2(&place, MntFlags::empty());
        }
    }
}

//! Where a cgroup's figures are read: its directories, kept open.
//!
//! An open directory is the cgroup that it was, whatever is made at its path later; and it spares
//! looking the cgroup up in the mount table each time.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use holdfast_shim::cgroup::{Cgroup, Version};
use rustix::fs::{CWD, Mode, OFlags};

/// Version 1 controllers that figures are read from.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuacct", "memory", "pids", "blkio", "hugetlb"];

/// Descriptors held by all sources of this process.
static OPEN: AtomicUsize = AtomicUsize::new(0);

/// A cgroup whose directories are open.
#[derive(Debug)]
pub(super) struct Source {
    /// Its path in the hierarchies: "/kubepods/pod1/c1".
    pub(super) path: String,
    /// As the kernel's file system has it, through the open directories.
    pub(super) cgroup: Cgroup,
    held: Vec<OwnedFd>,
}

impl Drop for Source {
    fn drop(&mut self) {
        OPEN.fetch_sub(self.held.len(), Ordering::Relaxed);
    }
}

impl Source {
    /// The cgroup of a process.
    pub(super) fn of(pid: u32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let cgroup = Cgroup::from_pid(pid)?;
        let (path, unified) = paths(&text);
        // On a hybrid node the OCI runtime may leave the container where its shim is; what is counted
        // there is not the container's.
        let own = cgroup.version() == Version::V2 || unified == path;
        Ok(Self::open(path.unwrap_or_default().to_owned(), &cgroup, own))
    }

    /// The cgroup at a path, if it is there.
    pub(super) fn at(path: &str) -> Option<Self> {
        let cgroup = Cgroup::at(path).ok()?;
        (!cgroup.is_empty()).then(|| Self::open(path.to_owned(), &cgroup, true))
    }

    /// Whether the cgroup is still there.
    pub(super) fn is_alive(&self) -> bool {
        self.cgroup.dirs().any(|dir| dir.join("cgroup.procs").exists())
    }

    fn open(path: String, cgroup: &Cgroup, unified: bool) -> Self {
        let mut held: BTreeMap<PathBuf, OwnedFd> = BTreeMap::new();
        let budget = budget();
        let mut through = |dir: &Path| -> PathBuf {
            if let Some(fd) = held.get(dir) {
                return by_descriptor(fd);
            }
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            // With many containers and few descriptors the rest is read by path.
            if OPEN.load(Ordering::Relaxed) + held.len() >= budget {
                return dir.to_owned();
            }
            match rustix::fs::openat(CWD, dir, flags, Mode::empty()) {
                Ok(fd) => {
                    let path = by_descriptor(&fd);
                    held.insert(dir.to_owned(), fd);
                    path
                }
                Err(_) => dir.to_owned(),
            }
        };
        let controllers: Vec<_> = CONTROLLERS
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), through(cgroup.controller(name)?))))
            .collect();
        let unified = cgroup.unified().filter(|_| unified).map(&mut through);
        let held: Vec<OwnedFd> = held.into_values().collect();
        OPEN.fetch_add(held.len(), Ordering::Relaxed);
        Self { path, cgroup: Cgroup::from_paths(unified, controllers), held }
    }
}

fn by_descriptor(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

/// A quarter of what this process may open: connections and files of images come first.
fn budget() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit.map_or(usize::MAX, |limit| usize::try_from(limit / 4).unwrap_or(usize::MAX))
}

/// From /proc/PID/cgroup: the path that the controllers have, and that of the version 2 hierarchy.
fn paths(text: &str) -> (Option<&str>, Option<&str>) {
    let mut unified = None;
    let mut first = None;
    let mut memory = None;
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(names), Some(path)) = (fields.next(), fields.next()) else { continue };
        match names {
            "" => unified = Some(path),
            "memory" => memory = Some(path),
            names if names.split(',').any(|name| CONTROLLERS.contains(&name)) => {
                first.get_or_insert(path);
            }
            _ => {}
        }
    }
    (memory.or(first).or(unified), unified)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_controllers_path_comes_before_others() {
        let hybrid = "9:memory:/k/p/c\n3:cpu,cpuacct:/k/p/c\n1:name=systemd:/x\n0::/shim\n";
        assert_eq!(paths(hybrid), (Some("/k/p/c"), Some("/shim")));
        assert_eq!(paths("3:cpu,cpuacct:/k\n0::/\n"), (Some("/k"), Some("/")));
        assert_eq!(paths("0::/k/p/c\n"), (Some("/k/p/c"), Some("/k/p/c")));
        assert_eq!(paths("nonsense"), (None, None));
    }

    #[test]
    fn an_open_directory_is_the_one_that_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c1");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("memory.current"), "42\n").unwrap();
        let source = Source::open("/c1".into(), &Cgroup::from_paths(Some(path.clone()), []), true);
        assert_eq!(source.cgroup.stats().memory.usage, Some(42));
        fs::rename(&path, dir.path().join("moved")).unwrap();
        fs::create_dir(&path).unwrap();
        fs::write(path.join("memory.current"), "7\n").unwrap();
        assert_eq!(source.cgroup.stats().memory.usage, Some(42));
    }
}

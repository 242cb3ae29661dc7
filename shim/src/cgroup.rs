//! A cgroup on version 1, version 2 or both ("hybrid"): its usage, its processes, its end.
//!
//! The OCI runtime makes and limits cgroups; this module finds, reads, freezes, kills and removes
//! them. Sources: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/*.rst of the kernel.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use nix::sys::statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, statfs};
use serde::{Deserialize, Serialize};

/// Where the hierarchies are mounted by every init system.
const ROOT: &str = "/sys/fs/cgroup";

/// The directories of one cgroup: one on version 2, one per controller on version 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// On the version 2 hierarchy.
    unified: Option<PathBuf>,
    /// On version 1, by controller.
    controllers: BTreeMap<String, PathBuf>,
}

/// Which files a cgroup's usage is read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// Controllers on version 1 hierarchies, perhaps beside a version 2 one.
    V1,
    /// Version 2 alone.
    V2,
}

/// Usage; `None` where the kernel does not tell, or has no limit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Processor time.
    pub cpu: Cpu,
    /// Memory.
    pub memory: Memory,
    /// Processes and threads.
    pub pids: Pids,
    /// Block devices.
    pub io: Vec<Io>,
    /// Stall information of block devices (version 2, beside version 1 too).
    pub io_pressure: Option<Pressure>,
    /// Huge pages.
    pub hugetlb: Vec<HugePages>,
}

/// Processor time since the cgroup was made.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cpu {
    /// Total, in nanoseconds.
    pub usage_ns: Option<u64>,
    /// Of it in user mode, in nanoseconds.
    pub user_ns: Option<u64>,
    /// Of it in the kernel, in nanoseconds.
    pub system_ns: Option<u64>,
    /// Enforcement periods that passed.
    pub periods: u64,
    /// Periods in which the cgroup was throttled.
    pub throttled_periods: u64,
    /// How long it was throttled, in nanoseconds.
    pub throttled_ns: u64,
    /// Stall information (version 2, beside version 1 too).
    pub pressure: Option<Pressure>,
}

/// Memory, in bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Memory {
    /// Charged now, caches included.
    pub usage: Option<u64>,
    /// Usage without the inactive file cache: what Kubernetes calls the working set.
    pub working_set: Option<u64>,
    /// Anonymous memory, with swap cache.
    pub rss: Option<u64>,
    /// Page cache.
    pub cache: Option<u64>,
    /// Mapped files.
    pub mapped_file: Option<u64>,
    /// Inactive file cache.
    pub inactive_file: Option<u64>,
    /// Active file cache.
    pub active_file: Option<u64>,
    /// Kernel memory.
    pub kernel: Option<u64>,
    /// How often usage met the limit.
    pub limit_hits: Option<u64>,
    /// Most ever charged.
    pub peak: Option<u64>,
    /// Limit.
    pub limit: Option<u64>,
    /// Page faults.
    pub page_faults: Option<u64>,
    /// Page faults that needed I/O.
    pub major_page_faults: Option<u64>,
    /// Swap in use.
    pub swap: Option<u64>,
    /// Limit of swap alone (version 2), or of memory and swap together (version 1).
    pub swap_limit: Option<u64>,
    /// Swap that may still be used, by the limits.
    pub swap_available: Option<u64>,
    /// Processes that the kernel killed for want of memory.
    pub oom_kills: Option<u64>,
    /// Stall information (version 2, beside version 1 too).
    pub pressure: Option<Pressure>,
}

/// Processes and threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pids {
    /// How many there are.
    pub current: Option<u64>,
    /// How many there may be.
    pub limit: Option<u64>,
}

/// Traffic of one block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Io {
    /// Major number of the device.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Read operations.
    pub reads: u64,
    /// Write operations.
    pub writes: u64,
}

/// Huge pages of one size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugePages {
    /// As the kernel names it: "2MB".
    pub size: String,
    /// Bytes in use.
    pub usage: u64,
    /// Most bytes ever in use.
    pub peak: Option<u64>,
}

/// Pressure stall information (Documentation/accounting/psi.rst).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    /// Some task was stalled.
    pub some: Stall,
    /// All tasks were stalled.
    pub full: Stall,
}

/// One line of pressure.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stall {
    /// Percent of the last 10 seconds.
    pub avg10: f64,
    /// Percent of the last minute.
    pub avg60: f64,
    /// Percent of the last five minutes.
    pub avg300: f64,
    /// In all, in microseconds.
    pub total: u64,
}

impl Cgroup {
    /// The cgroup that a process is in.
    ///
    /// # Errors
    /// The process is gone, or no hierarchy is mounted.
    pub fn from_pid(pid: u32) -> io::Result<Self> {
        Self::below(&Mounts::current()?, pid)
    }

    fn below(mounts: &Mounts, pid: u32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let found = Self::from_proc(&text, mounts);
        if found.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "no cgroup hierarchy is mounted"));
        }
        Ok(found)
    }

    /// The cgroup of a container, by the pid of its first process: as [`Cgroup::from_pid`], without
    /// the directories that we are in, or below, ourselves. On a hierarchy that the OCI runtime did
    /// not use (it was mounted later, or is somebody's own) the container is where we are, and what
    /// is there is not the container's to kill or remove.
    ///
    /// # Errors
    /// As [`Cgroup::from_pid`]; `NotFound` also when nothing is the container's own.
    pub fn of_container(pid: u32) -> io::Result<Self> {
        let mounts = Mounts::current()?;
        let ours = Self::below(&mounts, std::process::id())?;
        let found = Self::below(&mounts, pid)?.apart_from(&ours);
        if found.is_empty() {
            let message = format!("process {pid} has no cgroup of its own");
            return Err(io::Error::new(io::ErrorKind::NotFound, message));
        }
        Ok(found)
    }

    fn apart_from(mut self, other: &Self) -> Self {
        self.controllers.retain(|name, dir| {
            !other.controllers.get(name).is_some_and(|theirs| theirs.starts_with(&*dir))
        });
        self.unified = self
            .unified
            .filter(|dir| !other.unified.as_ref().is_some_and(|theirs| theirs.starts_with(dir)));
        self
    }

    /// The cgroup at `path` of every mounted hierarchy that has it ("/kubepods/pod1").
    ///
    /// # Errors
    /// The mount table is unreadable. A cgroup that exists nowhere is empty, not an error.
    pub fn at(path: impl AsRef<Path>) -> io::Result<Self> {
        let relative = path.as_ref().strip_prefix("/").unwrap_or(path.as_ref());
        let mounts = Mounts::current()?;
        let there = |root: &PathBuf| Some(root.join(relative)).filter(|dir| dir.is_dir());
        Ok(Self {
            unified: mounts.unified.as_ref().and_then(there),
            controllers: mounts
                .controllers
                .iter()
                .filter_map(|(name, root)| Some((name.clone(), there(root)?)))
                .collect(),
        })
    }

    /// The cgroup at `path` of every mounted hierarchy, made where it is not there yet.
    ///
    /// # Errors
    /// The first directory that cannot be made, named.
    pub fn make(path: impl AsRef<Path>) -> io::Result<Self> {
        let mut made = Self::at("/")?;
        for part in path.as_ref().components() {
            match part {
                std::path::Component::Normal(name) => {
                    made = made.make_child(&name.to_string_lossy())?;
                }
                std::path::Component::RootDir | std::path::Component::CurDir => {}
                _ => return Err(io::ErrorKind::InvalidInput.into()),
            }
        }
        Ok(made)
    }

    /// The cgroup with these directories: on version 2, and on version 1 by controller.
    pub fn from_paths(
        unified: Option<PathBuf>,
        controllers: impl IntoIterator<Item = (String, PathBuf)>,
    ) -> Self {
        Self { unified, controllers: controllers.into_iter().collect() }
    }

    fn from_proc(text: &str, mounts: &Mounts) -> Self {
        let mut found = Self::default();
        for line in text.lines() {
            // "4:memory:/path", "1:name=systemd:/path", "0::/path" (cgroups(7)).
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(names), Some(path)) = (fields.next(), fields.next()) else { continue };
            let relative = path.trim_start_matches('/');
            if names.is_empty() {
                found.unified = mounts.unified.as_ref().map(|root| root.join(relative));
                continue;
            }
            for name in names.split(',') {
                let name = name.strip_prefix("name=").unwrap_or(name);
                if let Some(root) = mounts.controllers.get(name) {
                    found.controllers.insert(name.to_owned(), root.join(relative));
                }
            }
        }
        found
    }

    /// There is no directory at all.
    pub fn is_empty(&self) -> bool {
        self.unified.is_none() && self.controllers.is_empty()
    }

    /// Whether usage is read from version 1 or version 2 files.
    pub fn version(&self) -> Version {
        // On a hybrid host controllers are on version 1; the named hierarchy has none.
        let real = self.controllers.keys().any(|name| name != "systemd");
        if real { Version::V1 } else { Version::V2 }
    }

    /// Its directory on the version 2 hierarchy.
    pub fn unified(&self) -> Option<&Path> {
        self.unified.as_deref()
    }

    /// Its directory for a version 1 controller.
    pub fn controller(&self, name: &str) -> Option<&Path> {
        self.controllers.get(name).map(PathBuf::as_path)
    }

    /// All its directories.
    pub fn dirs(&self) -> impl Iterator<Item = &Path> {
        self.controllers.values().chain(&self.unified).map(PathBuf::as_path)
    }

    /// Whether it still is anywhere.
    pub fn exists(&self) -> bool {
        self.dirs().any(Path::is_dir)
    }

    /// It is the root of a hierarchy: not something to kill or to remove.
    fn is_root(&self) -> bool {
        self.main().is_none_or(|dir| {
            // The root alone has no `cgroup.events` (v2) and no parent with `tasks` (v1).
            match self.version() {
                Version::V2 => !dir.join("cgroup.events").exists(),
                Version::V1 => dir.parent().is_none_or(|p| !p.join("cgroup.procs").exists()),
            }
        })
    }

    /// The directory by which its processes are counted.
    fn main(&self) -> Option<&Path> {
        match self.version() {
            Version::V2 => self.unified(),
            Version::V1 => ["freezer", "pids", "memory", "cpu", "devices"]
                .iter()
                .find_map(|name| self.controller(name))
                .or_else(|| self.dirs().next()),
        }
    }

    /// Host pids of all its processes, those of child cgroups too. A cgroup that is gone has none.
    ///
    /// # Errors
    /// A list is unreadable.
    pub fn pids(&self) -> io::Result<Vec<u32>> {
        let mut found = Vec::new();
        if let Some(dir) = self.main() {
            walk(dir, &mut |dir| {
                let list = match fs::read_to_string(dir.join("cgroup.procs")) {
                    Ok(list) => list,
                    Err(error) if gone(&error) => return Ok(()),
                    // A threaded child lists its processes at its parent (v2).
                    Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(()),
                    Err(error) => return Err(error),
                };
                found.extend(list.lines().filter_map(|line| line.parse::<u32>().ok()));
                Ok(())
            })?;
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// Kills all its processes at once, so that none can escape by forking: `cgroup.kill`, or
    /// freeze, signal each, thaw.
    ///
    /// # Errors
    /// Its process list is unreadable, or it is the root of the hierarchy (`InvalidInput`).
    pub fn kill(&self) -> io::Result<()> {
        if self.is_root() {
            if !self.exists() {
                return Ok(());
            }
            let message = "the root cgroup is not to be killed";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        if self.version() == Version::V2
            && let Some(dir) = self.unified()
        {
            match fs::write(dir.join("cgroup.kill"), "1") {
                Ok(()) => return Ok(()),
                Err(error) if gone(&error) && !dir.is_dir() => return Ok(()),
                // Linux before 5.14 has no such file.
                Err(_) => {}
            }
        }
        // One that does not freeze in time is still on its way there: it is killed and thawed all
        // the same.
        let _ = self.freeze(true);
        let killed = self.signal(libc::SIGKILL);
        // A frozen process takes its SIGKILL when it thaws (v1).
        let _ = self.freeze(false);
        killed.map(drop)
    }

    /// Sends a signal to each of its processes; gives how many there were.
    ///
    /// # Errors
    /// Its process list is unreadable.
    #[expect(unsafe_code, reason = "kill(2)")]
    pub fn signal(&self, signal: i32) -> io::Result<usize> {
        let pids = self.pids()?;
        for pid in &pids {
            // 0 stands for a process of another pid namespace, and would mean our own group.
            if let Some(pid) = i32::try_from(*pid).ok().filter(|pid| *pid > 1) {
                // SAFETY: no memory is involved.
                unsafe { libc::kill(pid, signal) };
            }
        }
        Ok(pids.len())
    }

    /// Freezes or thaws it, and waits up to half a second until that is so.
    ///
    /// # Errors
    /// There is no freezer, or (`TimedOut`) a process does not get there, as in uninterruptible
    /// sleep.
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        let by = Instant::now() + Duration::from_millis(500);
        let (file, state, value, wanted) = match (self.version(), frozen) {
            (Version::V2, true) => ("cgroup.freeze", "cgroup.events", "1", "frozen 1"),
            (Version::V2, false) => ("cgroup.freeze", "cgroup.events", "0", "frozen 0"),
            (Version::V1, true) => ("freezer.state", "freezer.state", "FROZEN", "FROZEN"),
            (Version::V1, false) => ("freezer.state", "freezer.state", "THAWED", "THAWED"),
        };
        let dir = match self.version() {
            Version::V2 => self.unified(),
            Version::V1 => self.controller("freezer"),
        }
        .ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "no freezer"))?;
        loop {
            // Version 1 needs the write repeated while new processes appear.
            fs::write(dir.join(file), value)?;
            if fs::read_to_string(dir.join(state))?.lines().any(|line| line == wanted) {
                return Ok(());
            }
            if Instant::now() >= by {
                let message = format!("not {wanted} within 500 ms");
                return Err(io::Error::new(io::ErrorKind::TimedOut, message));
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether it, or a parent, is frozen.
    pub fn is_frozen(&self) -> bool {
        match self.version() {
            Version::V2 => self.unified().is_some_and(|dir| {
                fs::read_to_string(dir.join("cgroup.events"))
                    .is_ok_and(|text| text.lines().any(|line| line == "frozen 1"))
            }),
            Version::V1 => self.controller("freezer").is_some_and(|dir| {
                fs::read_to_string(dir.join("freezer.state"))
                    .is_ok_and(|text| text.trim() == "FROZEN")
            }),
        }
    }

    /// Puts a process into it.
    ///
    /// # Errors
    /// The first directory that refuses, named.
    pub fn add(&self, pid: u32) -> io::Result<()> {
        for dir in self.dirs() {
            fs::write(dir.join("cgroup.procs"), pid.to_string())
                .map_err(|error| named(dir, &error))?;
        }
        Ok(())
    }

    /// The child `name`, made where it is not there yet.
    ///
    /// # Errors
    /// The first directory that cannot be made, named; what was made is gone again.
    pub fn make_child(&self, name: &str) -> io::Result<Self> {
        let child = Self {
            unified: self.unified.as_ref().map(|dir| dir.join(name)),
            controllers: self
                .controllers
                .iter()
                .map(|(controller, dir)| (controller.clone(), dir.join(name)))
                .collect(),
        };
        for dir in child.dirs() {
            match fs::create_dir(dir) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    let _ = child.remove();
                    return Err(named(dir, &error));
                }
            }
        }
        // A cpuset that is new has no processors, and takes no process before it has (v1).
        if let (Some(parent), Some(dir)) = (self.controller("cpuset"), child.controller("cpuset")) {
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let inherited = fs::read(parent.join(file))?;
                fs::write(dir.join(file), inherited).map_err(|error| named(dir, &error))?;
            }
        }
        Ok(child)
    }

    /// Removes it with its children; it must have no processes. One that is gone is no error, and
    /// the root of a hierarchy is passed over.
    ///
    /// # Errors
    /// The first directory that the kernel does not give up, named.
    pub fn remove(&self) -> io::Result<()> {
        let mut result = Ok(());
        for dir in self.dirs() {
            let is_root = dir.parent().is_none_or(|p| !p.join("cgroup.procs").exists());
            if is_root && dir.join("cgroup.procs").exists() {
                continue;
            }
            if let Err(error) = remove_tree(dir)
                && result.is_ok()
            {
                result = Err(named(dir, &error));
            }
        }
        result
    }

    /// Processes killed for want of memory: `oom_kill` and `oom_group_kill` of memory.events (v2,
    /// children included by the kernel), `oom_kill` of memory.oom_control (v1, where the kernel
    /// counts each cgroup alone, so the children are added here). `None`: the kernel does not tell.
    pub fn oom_kills(&self) -> Option<u64> {
        match self.version() {
            Version::V2 => {
                let events = keyed(&self.unified()?.join("memory.events"))?;
                let of = |key| events.get(key).copied().unwrap_or_default();
                Some(of("oom_kill").max(of("oom_group_kill")))
            }
            Version::V1 => {
                let mut sum = None;
                walk(self.controller("memory")?, &mut |dir| {
                    let count = keyed(&dir.join("memory.oom_control"))
                        .and_then(|control| control.get("oom_kill").copied());
                    if let Some(count) = count {
                        sum = Some(sum.unwrap_or_default() + count);
                    }
                    Ok(())
                })
                .ok()?;
                sum
            }
        }
    }

    /// Its usage. What the kernel does not tell, or no longer, is absent.
    pub fn stats(&self) -> Stats {
        match self.version() {
            Version::V1 => self.stats_v1(),
            Version::V2 => self.unified().map(stats_v2).unwrap_or_default(),
        }
    }

    fn stats_v1(&self) -> Stats {
        let mut stats = Stats::default();
        if let Some(dir) = self.controller("cpuacct") {
            stats.cpu.usage_ns = number(&dir.join("cpuacct.usage"));
            // In ticks of a hundredth of a second, whatever the kernel's own rate is.
            let split = keyed(&dir.join("cpuacct.stat")).unwrap_or_default();
            stats.cpu.user_ns = split.get("user").map(|ticks| ticks * 10_000_000);
            stats.cpu.system_ns = split.get("system").map(|ticks| ticks * 10_000_000);
        }
        if let Some(dir) = self.controller("cpu") {
            let throttling = keyed(&dir.join("cpu.stat")).unwrap_or_default();
            let of = |key| throttling.get(key).copied().unwrap_or_default();
            stats.cpu.periods = of("nr_periods");
            stats.cpu.throttled_periods = of("nr_throttled");
            stats.cpu.throttled_ns = of("throttled_time");
        }
        if let Some(dir) = self.controller("memory") {
            let memory = keyed(&dir.join("memory.stat")).unwrap_or_default();
            let of = |key| memory.get(key).copied();
            let usage = number(&dir.join("memory.usage_in_bytes"));
            let swapped = number(&dir.join("memory.memsw.usage_in_bytes"));
            let swap = of("total_swap")
                .or_else(|| Some(swapped?.saturating_sub(usage.unwrap_or_default())));
            let limit = limit_v1(number(&dir.join("memory.limit_in_bytes")));
            let both = limit_v1(number(&dir.join("memory.memsw.limit_in_bytes")));
            stats.memory = Memory {
                usage,
                working_set: working_set(usage, of("total_inactive_file")),
                rss: of("total_rss"),
                cache: of("total_cache"),
                mapped_file: of("total_mapped_file"),
                inactive_file: of("total_inactive_file"),
                active_file: of("total_active_file"),
                kernel: number(&dir.join("memory.kmem.usage_in_bytes")),
                limit_hits: number(&dir.join("memory.failcnt")),
                peak: number(&dir.join("memory.max_usage_in_bytes")),
                limit,
                page_faults: of("total_pgfault"),
                major_page_faults: of("total_pgmajfault"),
                swap,
                swap_limit: both,
                // The limit is of both, so what memory may take is not swap's.
                swap_available: both.map(|both| {
                    let alone = both.saturating_sub(limit.unwrap_or_default());
                    alone.saturating_sub(swap.unwrap_or_default())
                }),
                oom_kills: self.oom_kills(),
                pressure: None,
            };
        }
        if let Some(dir) = self.controller("pids") {
            stats.pids = pids(dir);
        }
        if let Some(dir) = self.controller("blkio") {
            stats.io = io_v1(dir);
        }
        if let Some(dir) = self.controller("hugetlb") {
            stats.hugetlb = huge_pages(dir, ".usage_in_bytes", ".max_usage_in_bytes");
        }
        // Every directory of the version 2 hierarchy has these, whatever controllers it lacks.
        if let Some(dir) = self.unified() {
            stats.cpu.pressure = pressure(&dir.join("cpu.pressure"));
            stats.memory.pressure = pressure(&dir.join("memory.pressure"));
            stats.io_pressure = pressure(&dir.join("io.pressure"));
        }
        stats
    }
}

fn stats_v2(dir: &Path) -> Stats {
    let cpu = keyed(&dir.join("cpu.stat")).unwrap_or_default();
    let cpu_of = |key| cpu.get(key).copied();
    let memory = keyed(&dir.join("memory.stat")).unwrap_or_default();
    let of = |key| memory.get(key).copied();
    let usage = number(&dir.join("memory.current"));
    let events = keyed(&dir.join("memory.events"));
    let swap = number(&dir.join("memory.swap.current"));
    let swap_limit = number(&dir.join("memory.swap.max"));
    Stats {
        cpu: Cpu {
            usage_ns: cpu_of("usage_usec").map(|us| us * 1000),
            user_ns: cpu_of("user_usec").map(|us| us * 1000),
            system_ns: cpu_of("system_usec").map(|us| us * 1000),
            periods: cpu_of("nr_periods").unwrap_or_default(),
            throttled_periods: cpu_of("nr_throttled").unwrap_or_default(),
            throttled_ns: cpu_of("throttled_usec").unwrap_or_default() * 1000,
            pressure: pressure(&dir.join("cpu.pressure")),
        },
        memory: Memory {
            usage,
            working_set: working_set(usage, of("inactive_file")),
            rss: of("anon"),
            cache: of("file"),
            mapped_file: of("file_mapped"),
            inactive_file: of("inactive_file"),
            active_file: of("active_file"),
            kernel: of("kernel"),
            limit_hits: events.as_ref().and_then(|events| events.get("max").copied()),
            peak: number(&dir.join("memory.peak")),
            limit: number(&dir.join("memory.max")),
            page_faults: of("pgfault"),
            major_page_faults: of("pgmajfault"),
            swap,
            swap_limit,
            swap_available: swap_limit.map(|limit| limit.saturating_sub(swap.unwrap_or_default())),
            oom_kills: events.map(|events| {
                let of = |key| events.get(key).copied().unwrap_or_default();
                of("oom_kill").max(of("oom_group_kill"))
            }),
            pressure: pressure(&dir.join("memory.pressure")),
        },
        pids: pids(dir),
        io: io_v2(dir),
        io_pressure: pressure(&dir.join("io.pressure")),
        hugetlb: huge_pages(dir, ".current", ".peak"),
    }
}

/// What the kubelet computes: never below zero.
fn working_set(usage: Option<u64>, inactive_file: Option<u64>) -> Option<u64> {
    Some(usage?.saturating_sub(inactive_file.unwrap_or_default()))
}

/// Version 1 writes "no limit" as the largest number of pages.
fn limit_v1(limit: Option<u64>) -> Option<u64> {
    limit.filter(|limit| *limit < 1 << 62)
}

fn pids(dir: &Path) -> Pids {
    Pids { current: number(&dir.join("pids.current")), limit: number(&dir.join("pids.max")) }
}

fn io_v2(dir: &Path) -> Vec<Io> {
    let text = fs::read_to_string(dir.join("io.stat")).unwrap_or_default();
    // "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6"
    text.lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (major, minor) = words.next()?.split_once(':')?;
            let mut io =
                Io { major: major.parse().ok()?, minor: minor.parse().ok()?, ..Io::default() };
            for (key, value) in words.filter_map(|word| word.split_once('=')) {
                let value = value.parse().unwrap_or_default();
                match key {
                    "rbytes" => io.read_bytes = value,
                    "wbytes" => io.written_bytes = value,
                    "rios" => io.reads = value,
                    "wios" => io.writes = value,
                    _ => {}
                }
            }
            Some(io)
        })
        .collect()
}

fn io_v1(dir: &Path) -> Vec<Io> {
    let mut devices = BTreeMap::<(u32, u32), Io>::new();
    for (file, operations) in [
        ("blkio.throttle.io_service_bytes_recursive", false),
        ("blkio.throttle.io_serviced_recursive", true),
    ] {
        let text = fs::read_to_string(dir.join(file)).unwrap_or_default();
        // "8:0 Read 123"
        for line in text.lines() {
            let mut words = line.split(' ');
            let Some((major, minor)) = words.next().and_then(|word| word.split_once(':')) else {
                continue;
            };
            let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { continue };
            let (Some(what), Some(Ok(value))) = (words.next(), words.next().map(str::parse)) else {
                continue;
            };
            let io = devices.entry((major, minor)).or_insert_with(|| Io {
                major,
                minor,
                ..Io::default()
            });
            match (what, operations) {
                ("Read", false) => io.read_bytes = value,
                ("Write", false) => io.written_bytes = value,
                ("Read", true) => io.reads = value,
                ("Write", true) => io.writes = value,
                _ => {}
            }
        }
    }
    devices.into_values().collect()
}

fn huge_pages(dir: &Path, usage: &str, peak: &str) -> Vec<HugePages> {
    // Listing the directory for them would cost more than all that is read of it.
    static NAMES: OnceLock<Vec<String>> = OnceLock::new();
    let names = NAMES.get_or_init(|| {
        let mut names: Vec<_> = huge_page_sizes().into_iter().map(page_name).collect();
        names.sort();
        names
    });
    let read = |size: &String| {
        Some(HugePages {
            usage: number(&dir.join(format!("hugetlb.{size}{usage}")))?,
            peak: number(&dir.join(format!("hugetlb.{size}{peak}"))),
            size: size.clone(),
        })
    };
    names.iter().filter_map(read).collect()
}

/// Sizes of huge pages that the kernel knows, in bytes.
pub fn huge_page_sizes() -> Vec<u64> {
    let entries = fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
    entries.filter_map(|entry| hugepage_directory(&entry.file_name().to_string_lossy())).collect()
}

/// "hugepages-2048kB" is 2 MiB.
fn hugepage_directory(name: &str) -> Option<u64> {
    let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

/// As the kernel names its hugetlb files: "64KB", "2MB", "1GB".
pub fn page_name(size: u64) -> String {
    match size {
        size if size >= 1 << 30 => format!("{}GB", size >> 30),
        size if size >= 1 << 20 => format!("{}MB", size >> 20),
        size => format!("{}KB", size >> 10),
    }
}

fn pressure(path: &Path) -> Option<Pressure> {
    parse_pressure(&fs::read_to_string(path).ok()?)
}

fn parse_pressure(text: &str) -> Option<Pressure> {
    // "some avg10=0.00 avg60=0.00 avg300=0.00 total=0"
    let line = |kind: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let mut stall = Stall::default();
        for (key, value) in line.split(' ').filter_map(|word| word.split_once('=')) {
            match key {
                "avg10" => stall.avg10 = value.parse().ok()?,
                "avg60" => stall.avg60 = value.parse().ok()?,
                "avg300" => stall.avg300 = value.parse().ok()?,
                "total" => stall.total = value.parse().ok()?,
                _ => {}
            }
        }
        Some(stall)
    };
    Some(Pressure { some: line("some")?, full: line("full").unwrap_or_default() })
}

/// A file of one number; `max` is none.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A file of `key value` lines.
fn keyed(path: &Path) -> Option<BTreeMap<String, u64>> {
    let text = fs::read_to_string(path).ok()?;
    let pairs = text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key.to_owned(), value.trim().parse().ok()?))
    });
    Some(pairs.collect())
}

fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

fn named(dir: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cgroup {}: {error}", dir.display()))
}

/// Calls `visit` for `dir` and everything below it; what vanishes meanwhile is passed over.
fn walk(dir: &Path, visit: &mut dyn FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    // In the kernel's own file system a directory has two links, and one more for each in it. Others,
    // lxcfs for one, may say two of all.
    let counted = statfs(dir)
        .is_ok_and(|fs| [CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC].contains(&fs.filesystem_type()));
    walk_on(dir, counted, visit)
}

fn walk_on(
    dir: &Path,
    counted: bool,
    visit: &mut dyn FnMut(&Path) -> io::Result<()>,
) -> io::Result<()> {
    visit(dir)?;
    if counted && fs::metadata(dir).is_ok_and(|leaf| leaf.nlink() == 2) {
        return Ok(());
    }
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if gone(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let Ok(entry) = entry else { break };
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk_on(&entry.path(), counted, visit)?;
        }
    }
    Ok(())
}

/// Removes children first. A process that has just been killed holds its cgroup for a moment.
fn remove_tree(dir: &Path) -> io::Result<()> {
    let mut dirs = Vec::new();
    walk(dir, &mut |dir| {
        dirs.push(dir.to_owned());
        Ok(())
    })?;
    let by = Instant::now() + Duration::from_millis(500);
    for dir in dirs.iter().rev() {
        loop {
            match fs::remove_dir(dir) {
                Ok(()) => break,
                Err(error) if gone(&error) => break,
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < by => {
                    thread::sleep(Duration::from_millis(2));
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Where the hierarchies are mounted.
#[derive(Debug, Default)]
struct Mounts {
    unified: Option<PathBuf>,
    controllers: BTreeMap<String, PathBuf>,
}

impl Mounts {
    fn current() -> io::Result<Self> {
        // On a node of version 2 alone, which most are, spare the long mount table.
        if Path::new(ROOT).join("cgroup.controllers").is_file() {
            return Ok(Self { unified: Some(ROOT.into()), controllers: BTreeMap::new() });
        }
        Ok(Self::parse(&fs::read_to_string("/proc/self/mountinfo")?))
    }

    /// Reads mountinfo (proc_pid_mountinfo(5)).
    fn parse(text: &str) -> Self {
        let mut found = Self::default();
        for line in text.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let mut right = right.split(' ');
            let kind = right.next().unwrap_or_default();
            if !kind.starts_with("cgroup") {
                continue;
            }
            let mut left = left.split(' ').skip(3);
            let (Some(root), Some(place)) = (left.next(), left.next()) else { continue };
            // A bind mount of a part of a hierarchy is somebody's container.
            if root != "/" {
                continue;
            }
            // The first mount is the host's own; a later one may be a container's or a test's.
            let place = || PathBuf::from(place.replace("\\040", " "));
            if kind == "cgroup2" {
                found.unified.get_or_insert_with(place);
                continue;
            }
            let options = right.nth(1).unwrap_or_default();
            for option in options.split(',') {
                match option {
                    "rw" | "ro" | "xattr" | "clone_children" | "noprefix" => {}
                    other => {
                        let name = other.strip_prefix("name=").unwrap_or(other);
                        if !name.contains('=') {
                            found.controllers.entry(name.to_owned()).or_insert_with(place);
                        }
                    }
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
50 31 0:32 /a /var/lib/x/memory rw,relatime - cgroup cgroup rw,memory
";

    #[test]
    fn a_hybrid_host_is_read_as_version_1_with_a_unified_directory() {
        let text = "4:memory:/kubepods/pod1/c1\n3:cpu,cpuacct:/kubepods/pod1/c1\n\
                    1:name=systemd:/kubepods\n0::/kubepods/pod1/c1\n";
        let found = Cgroup::from_proc(text, &Mounts::parse(HYBRID));
        assert_eq!(found.version(), Version::V1);
        assert_eq!(
            found.controller("memory"),
            Some(Path::new("/sys/fs/cgroup/memory/kubepods/pod1/c1"))
        );
        assert_eq!(
            found.controller("cpuacct"),
            Some(Path::new("/sys/fs/cgroup/cpu,cpuacct/kubepods/pod1/c1"))
        );
        assert_eq!(found.controller("systemd"), Some(Path::new("/sys/fs/cgroup/systemd/kubepods")));
        assert_eq!(found.unified(), Some(Path::new("/sys/fs/cgroup/unified/kubepods/pod1/c1")));
    }

    #[test]
    fn a_pure_version_2_host_has_one_directory() {
        let mounts =
            Mounts::parse("31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n");
        let found = Cgroup::from_proc("0::/kubepods/pod1/c1\n", &mounts);
        assert_eq!(found.version(), Version::V2);
        assert_eq!(found.unified(), Some(Path::new("/sys/fs/cgroup/kubepods/pod1/c1")));
    }

    #[test]
    fn where_a_container_is_with_us_nothing_is_its_own() {
        let mounts = Mounts::parse(HYBRID);
        let ours = Cgroup::from_proc("4:memory:/node/shim\n1:name=systemd:/\n0::/node\n", &mounts);
        let theirs = "4:memory:/node/c1\n3:cpu,cpuacct:/c1\n1:name=systemd:/\n0::/node\n";
        let own = Cgroup::from_proc(theirs, &mounts).apart_from(&ours);
        assert_eq!(own.unified(), None);
        assert_eq!(own.controller("systemd"), None);
        assert_eq!(own.controller("memory"), Some(Path::new("/sys/fs/cgroup/memory/node/c1")));
        assert_eq!(own.controller("cpu"), Some(Path::new("/sys/fs/cgroup/cpu,cpuacct/c1")));
        let nothing = Cgroup::from_proc("4:memory:/node\n0::/\n", &mounts).apart_from(&ours);
        assert!(nothing.is_empty());
    }

    #[test]
    fn version_2_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("cpu.stat", "usage_usec 2500\nuser_usec 2000\nsystem_usec 500\nnr_throttled 3\n"),
            ("memory.current", "5000\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 1000\nfile 3000\ninactive_file 2000\npgfault 7\npgmajfault 1\n"),
            ("memory.events", "low 0\nhigh 0\nmax 4\noom 2\noom_kill 2\noom_group_kill 1\n"),
            ("memory.swap.current", "10\n"),
            ("memory.swap.max", "30\n"),
            (
                "memory.pressure",
                "some avg10=1.50 avg60=0.25 avg300=0.00 total=99\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n",
            ),
            ("pids.current", "4\n"),
            ("pids.max", "100\n"),
            ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n"),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.rsvd.current", "0\n"),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let stats = Cgroup::from_paths(Some(dir.path().to_owned()), []).stats();
        assert_eq!(stats.cpu.usage_ns, Some(2_500_000));
        assert_eq!(stats.cpu.throttled_periods, 3);
        assert_eq!(stats.memory.working_set, Some(3000));
        assert_eq!(stats.memory.limit, None);
        assert_eq!(stats.memory.oom_kills, Some(2));
        assert_eq!(stats.memory.limit_hits, Some(4));
        assert_eq!(stats.memory.swap_available, Some(20));
        assert_eq!(stats.memory.pressure.unwrap().some.avg10, 1.5);
        assert_eq!(stats.memory.pressure.unwrap().full.total, 1);
        assert_eq!(stats.pids, Pids { current: Some(4), limit: Some(100) });
        assert_eq!(stats.io[0].writes, 4);
        assert_eq!(stats.hugetlb.len(), 1);
        let names = ["hugepages-64kB", "hugepages-2048kB", "hugepages-1048576kB", "hugepages-x"];
        assert_eq!(
            names.map(|name| hugepage_directory(name).map(page_name)),
            [Some("64KB".into()), Some("2MB".into()), Some("1GB".into()), None]
        );
        assert_eq!(hugepage_directory("hugepages-2048kB"), Some(2 << 20));
    }

    #[test]
    fn version_1_files_are_read_and_oom_kills_of_children_are_added() {
        let dir = tempfile::tempdir().unwrap();
        let memory = dir.path().join("memory");
        fs::create_dir_all(memory.join("child")).unwrap();
        fs::write(memory.join("memory.usage_in_bytes"), "100\n").unwrap();
        fs::write(memory.join("memory.limit_in_bytes"), "1000\n").unwrap();
        fs::write(memory.join("memory.memsw.limit_in_bytes"), "1500\n").unwrap();
        fs::write(memory.join("memory.memsw.usage_in_bytes"), "120\n").unwrap();
        fs::write(memory.join("memory.stat"), "rss 1\ntotal_rss 40\ntotal_inactive_file 300\n")
            .unwrap();
        let control = "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n";
        fs::write(memory.join("memory.oom_control"), control).unwrap();
        fs::write(memory.join("child/memory.oom_control"), control).unwrap();
        let cgroup = Cgroup::from_paths(None, [("memory".to_owned(), memory)]);
        let stats = cgroup.stats();
        assert_eq!(stats.memory.oom_kills, Some(2));
        assert_eq!(stats.memory.limit, Some(1000));
        assert_eq!(stats.memory.swap, Some(20));
        assert_eq!(stats.memory.swap_available, Some(480));
        assert_eq!(stats.memory.working_set, Some(0));
        fs::write(
            cgroup.controller("memory").unwrap().join("memory.limit_in_bytes"),
            "9223372036854771712\n",
        )
        .unwrap();
        assert_eq!(cgroup.stats().memory.limit, None);
        assert_eq!(stats.memory.rss, Some(40));
    }

    #[test]
    fn a_cgroup_that_is_gone_is_empty_and_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::from_paths(Some(dir.path().join("gone")), []);
        assert!(cgroup.pids().unwrap().is_empty());
        assert_eq!(cgroup.stats(), Stats::default());
        assert_eq!(cgroup.oom_kills(), None);
        cgroup.kill().unwrap();
        cgroup.remove().unwrap();
    }

    #[test]
    fn the_root_cgroup_is_never_killed() {
        if let Ok(root) = Cgroup::at("/")
            && !root.is_empty()
        {
            assert_eq!(root.kill().unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}

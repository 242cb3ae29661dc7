//! What pods and containers use, read by the daemon itself from cgroupfs and /proc: no shim is
//! asked, so a hung one delays nothing.
//!
//! [`Stats`] keeps what the next reading is compared with, and what is dear to find out: open cgroup
//! directories (`source`) and sizes of writable layers (`layers`). Nothing in here waits for anybody
//! but the kernel, and for sizes that were never known, for a moment.

mod layers;
mod limits;
mod net;
mod processes;
mod rate;
pub(crate) mod source;

use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{Arc, Mutex},
    time::{Instant, SystemTime},
};

use holdfast_shim::{bundle::Namespace, cgroup::Pids};

pub use self::{
    layers::Layer,
    limits::Limits,
    net::{Interface, Traffic},
    processes::Processes,
};
use self::{layers::Layers, rate::Rate, source::Source};
use crate::{
    id::{ContainerId, PodId},
    pod::{ContainerView, PodView, Services},
    spec,
};

pub use holdfast_shim::cgroup::Stats as Usage;

/// A container's usage.
#[derive(Clone, Debug)]
pub struct Container {
    /// When it was read.
    pub at: SystemTime,
    /// From its cgroup; nothing if it has ended.
    pub usage: Usage,
    /// CPU over the last stretch of at least a second, in billionths of a core.
    pub nano_cores: Option<u64>,
    /// Writable layer.
    pub layer: Option<Layer>,
}

/// A pod's usage, and that of its running containers.
#[derive(Clone, Debug)]
pub struct Pod {
    /// When it was read.
    pub at: SystemTime,
    /// Of the pod's cgroup; of its containers together where it has none.
    pub usage: Usage,
    /// As of a container.
    pub nano_cores: Option<u64>,
    /// Count of its processes.
    pub processes: Option<u64>,
    /// Its interfaces; `None` with the node's network, or when the namespace is gone.
    pub interfaces: Option<Vec<Interface>>,
    /// Running containers.
    pub containers: Vec<(Arc<ContainerView>, Container)>,
}

/// What is read of a cgroup only for those who ask for everything.
#[derive(Clone, Debug, Default)]
pub struct Details {
    /// Its path in the hierarchies.
    pub path: String,
    /// Its limits.
    pub limits: Limits,
    /// What its processes have open.
    pub processes: Option<Processes>,
    /// Soft limit of open files of its first process.
    pub open_files: Option<u64>,
}

/// The file system of images and writable layers.
#[derive(Clone, Debug, Default)]
pub struct FileSystem {
    /// Device, as the mount table has it ("/dev/sda1").
    pub device: String,
    /// Capacity in bytes.
    pub bytes: u64,
    /// Inodes in all.
    pub inodes: u64,
    /// Inodes that are free.
    pub inodes_free: u64,
}

/// Reads usage; keeps what the next reading is compared with.
pub struct Stats {
    services: Arc<Services>,
    layers: Layers,
    containers: Mutex<HashMap<ContainerId, Last>>,
    pods: Mutex<HashMap<PodId, Last>>,
}

#[derive(Default)]
struct Last {
    /// First process of the container whose cgroup it is.
    pid: Option<u32>,
    source: Option<Arc<Source>>,
    cpu: Rate,
}

impl Stats {
    /// Over these services.
    pub fn new(services: Arc<Services>) -> Self {
        let layers = Layers::new(services.images.clone());
        Self { services, layers, containers: Mutex::default(), pods: Mutex::default() }
    }

    /// Usage of containers. Blocks for file reads.
    pub fn containers(&self, views: &[Arc<ContainerView>]) -> Vec<Container> {
        let ids: Vec<_> = views.iter().map(|view| view.record.id.clone()).collect();
        let layers = self.layers.sizes(&ids);
        views.iter().zip(layers).map(|(view, layer)| self.container(view, layer)).collect()
    }

    fn container(&self, view: &ContainerView, layer: Option<Layer>) -> Container {
        let source = self.container_source(view);
        let usage = source.map(|source| source.cgroup.stats()).unwrap_or_default();
        let nano_cores = rate(&self.containers, &view.record.id, &usage);
        Container { at: SystemTime::now(), usage, nano_cores, layer }
    }

    fn container_source(&self, view: &ContainerView) -> Option<Arc<Source>> {
        let mut all = self.containers.lock().unwrap_or_else(|e| e.into_inner());
        let last = all.entry(view.record.id.clone()).or_default();
        let pid = view.record.state.pid();
        if last.pid != pid || last.source.is_none() {
            let source = pid.and_then(|pid| Source::of(pid).ok()).map(Arc::new);
            *last = Last { pid, source, cpu: Rate::default() };
        }
        last.source.clone()
    }

    /// Usage of pods, and of their running containers. Blocks.
    pub fn pods(&self, pods: &[Arc<PodView>]) -> Vec<Pod> {
        let with_network: Vec<bool> =
            pods.iter().map(|pod| !pod.record.config.namespaces.host_network).collect();
        let own = pods.iter().zip(&with_network).filter(|(_, own)| **own);
        let pins = own.map(|(pod, _)| {
            self.services.shims.pod_bundle(&pod.record.id).namespace(Namespace::Net)
        });
        let mut interfaces = net::interfaces(pins.collect()).into_iter();
        pods.iter()
            .zip(with_network)
            .map(|(pod, own)| {
                let interfaces = own.then(|| interfaces.next()).flatten().and_then(Result::ok);
                self.pod(pod, interfaces)
            })
            .collect()
    }

    fn pod(&self, pod: &PodView, interfaces: Option<Vec<Interface>>) -> Pod {
        let running = pod.containers.values().filter(|c| c.record.state.pid().is_some());
        let views: Vec<_> = running.cloned().collect();
        let containers: Vec<_> = views.iter().cloned().zip(self.containers(&views)).collect();
        let source = self.pod_source(pod);
        let usage = match &source {
            Some(source) => source.cgroup.stats(),
            None => sum(containers.iter().map(|(_, read)| &read.usage)),
        };
        let nano_cores = match &source {
            Some(_) => rate(&self.pods, &pod.record.id, &usage),
            None => containers.iter().filter_map(|(_, read)| read.nano_cores).reduce(|a, b| a + b),
        };
        let processes = match source.map(|source| source.cgroup.pids()) {
            Some(pids) => pids.ok().map(|pids| pids.len() as u64),
            None => usage.pids.current,
        };
        Pod { at: SystemTime::now(), usage, nano_cores, processes, interfaces, containers }
    }

    fn pod_source(&self, pod: &PodView) -> Option<Arc<Source>> {
        let mut all = self.pods.lock().unwrap_or_else(|e| e.into_inner());
        let last = all.entry(pod.record.id.clone()).or_default();
        // A cgroup that was made anew meanwhile (the node's agent may) is another one.
        if last.source.as_ref().is_none_or(|source| !source.is_alive()) {
            last.source = spec::pod_cgroup(&pod.record.config.cgroup_parent, &pod.record.id)
                .and_then(|path| Source::at(&path))
                .map(Arc::new);
        }
        last.source.clone()
    }

    /// The rest of what a container's cgroup and processes tell. Blocks.
    pub fn container_details(&self, view: &ContainerView) -> Details {
        let Some(source) = self.container_source(view) else { return Details::default() };
        let open_files = view.record.state.pid().and_then(processes::open_files_limit);
        Details { open_files, ..details(&source) }
    }

    /// The same for a pod; `None` if it has no cgroup of its own. Blocks.
    pub fn pod_details(&self, pod: &PodView) -> Option<Details> {
        let source = self.pod_source(pod)?;
        Some(Details {
            path: source.path.clone(),
            limits: Limits::of(&source.cgroup),
            ..Details::default()
        })
    }

    /// Forgets pods and containers that are not there any more.
    pub fn retain(&self, pod: impl Fn(&PodId) -> bool, container: impl Fn(&ContainerId) -> bool) {
        self.containers.lock().unwrap_or_else(|e| e.into_inner()).retain(|id, _| container(id));
        self.pods.lock().unwrap_or_else(|e| e.into_inner()).retain(|id, _| pod(id));
        self.layers.retain(container);
    }

    /// Where writable layers are, for reports.
    pub fn mountpoint(&self) -> String {
        self.services.images.fs_usage().mountpoint.display().to_string()
    }

    /// The file system of images and writable layers. Blocks.
    pub fn file_system(&self) -> io::Result<FileSystem> {
        let root = &self.services.config.root;
        let stat = rustix::fs::statvfs(root)?;
        Ok(FileSystem {
            device: device_of(root)?,
            bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
            inodes: stat.f_files,
            inodes_free: stat.f_ffree,
        })
    }
}

fn details(source: &Source) -> Details {
    Details {
        path: source.path.clone(),
        limits: Limits::of(&source.cgroup),
        processes: Processes::of(&source.cgroup).ok(),
        open_files: None,
    }
}

fn rate<K: std::hash::Hash + Eq>(
    all: &Mutex<HashMap<K, Last>>,
    id: &K,
    usage: &Usage,
) -> Option<u64> {
    let used = usage.cpu.usage_ns?;
    let mut all = all.lock().unwrap_or_else(|e| e.into_inner());
    all.get_mut(id)?.cpu.add(Instant::now(), used)
}

/// What containers use together.
fn sum<'a>(all: impl Iterator<Item = &'a Usage> + Clone) -> Usage {
    let sum = |of: fn(&Usage) -> Option<u64>| all.clone().filter_map(of).reduce(|a, b| a + b);
    let mut usage = Usage::default();
    usage.cpu.usage_ns = sum(|u| u.cpu.usage_ns);
    usage.cpu.user_ns = sum(|u| u.cpu.user_ns);
    usage.cpu.system_ns = sum(|u| u.cpu.system_ns);
    usage.memory.usage = sum(|u| u.memory.usage);
    usage.memory.working_set = sum(|u| u.memory.working_set);
    usage.memory.rss = sum(|u| u.memory.rss);
    usage.memory.cache = sum(|u| u.memory.cache);
    usage.memory.page_faults = sum(|u| u.memory.page_faults);
    usage.memory.major_page_faults = sum(|u| u.memory.major_page_faults);
    usage.memory.swap = sum(|u| u.memory.swap);
    usage.pids = Pids { current: sum(|u| u.pids.current), limit: None };
    usage
}

/// The mount source of the file system that `path` is on (proc_pid_mountinfo(5)).
fn device_of(path: &Path) -> io::Result<String> {
    let stat = rustix::fs::stat(path)?;
    let id = format!("{}:{}", rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mount_source(&table, &id).unwrap_or(id))
}

fn mount_source(table: &str, id: &str) -> Option<String> {
    table.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        (left.split(' ').nth(2)? == id).then(|| right.split(' ').nth(1).map(str::to_owned))?
    })
}

/// Names of block devices by number, as metrics label them ("/dev/sda"); what has no name keeps its
/// number.
pub fn device_name(major: u32, minor: u32) -> String {
    let uevent = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"));
    let name = uevent.ok().and_then(|text| {
        text.lines()
            .find_map(|line| line.strip_prefix("DEVNAME="))
            .map(|name| format!("/dev/{name}"))
    });
    name.unwrap_or_else(|| format!("{major}:{minor}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_is_found_by_its_device_number() {
        let table = "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
                     23 22 0:21 / /proc rw shared:5 - proc proc rw\n";
        assert_eq!(mount_source(table, "254:0").as_deref(), Some("/dev/vda"));
        assert_eq!(mount_source(table, "0:21").as_deref(), Some("proc"));
        assert_eq!(mount_source(table, "9:9"), None);
    }

    #[test]
    fn usage_of_containers_is_added_up() {
        let mut one = Usage::default();
        one.cpu.usage_ns = Some(3);
        one.memory.usage = Some(10);
        let mut two = Usage::default();
        two.cpu.usage_ns = Some(4);
        let both = sum([&one, &two].into_iter());
        assert_eq!(both.cpu.usage_ns, Some(7));
        assert_eq!(both.memory.usage, Some(10));
        assert_eq!(both.memory.swap, None);
        assert_eq!(device_name(0, 0), "0:0");
    }
}

//! What pods and containers use, read by the daemon itself from cgroupfs and /proc: no shim is
//! asked, so a hung one delays nothing.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    path::Path,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant, SystemTime},
};

use holdfast_shim::{bundle::Namespace, cgroup::Cgroup};

use crate::{
    id::ContainerId,
    pod::{ContainerView, PodView, Services},
};

pub use holdfast_shim::cgroup::Stats as Usage;

/// How long the size of a writable layer is believed: finding it out walks the layer.
const LAYER_AGE: Duration = Duration::from_secs(30);

/// A container's usage.
#[derive(Clone, Debug)]
pub struct Container {
    /// When it was read.
    pub at: SystemTime,
    /// From its cgroup; nothing if it has ended.
    pub usage: Usage,
    /// CPU over the time since the last reading, in billionths of a core.
    pub nano_cores: Option<u64>,
    /// Writable layer: bytes and inodes.
    pub layer: Option<(u64, u64)>,
}

/// A network interface's counters (/proc/net/dev).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Receive errors.
    pub rx_errors: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Send errors.
    pub tx_errors: u64,
}

/// Reads usage; keeps what the next reading is compared with.
pub struct Stats {
    services: Arc<Services>,
    last: Mutex<HashMap<ContainerId, Last>>,
}

struct Last {
    cgroup: Option<(u32, Arc<Cgroup>)>,
    cpu: Option<(Instant, u64)>,
    layer: Option<(Instant, (u64, u64))>,
}

impl Stats {
    /// Over these services.
    pub fn new(services: Arc<Services>) -> Self {
        Self { services, last: Mutex::default() }
    }

    /// A container's usage. Blocks for file reads.
    pub fn container(&self, view: &ContainerView) -> Container {
        let id = &view.record.id;
        let (cgroup, mut cpu, mut layer) = {
            let mut all = self.last.lock().unwrap_or_else(|e| e.into_inner());
            let last =
                all.entry(id.clone()).or_insert(Last { cgroup: None, cpu: None, layer: None });
            let pid = view.record.state.pid();
            if last.cgroup.as_ref().map(|(pid, _)| *pid) != pid {
                let found = pid.and_then(|pid| Some((pid, Arc::new(Cgroup::from_pid(pid).ok()?))));
                last.cgroup = found;
            }
            (last.cgroup.as_ref().map(|(_, c)| c.clone()), last.cpu, last.layer)
        };
        let usage = cgroup.map(|cgroup| cgroup.stats()).unwrap_or_default();
        let now = Instant::now();
        let mut nano_cores = None;
        if let Some(used) = usage.cpu.usage_ns {
            if let Some((then, before)) = cpu {
                let nanos = now.duration_since(then).as_nanos().max(1);
                let used = u128::from(used.saturating_sub(before));
                nano_cores = u64::try_from(used * 1_000_000_000 / nanos).ok();
            }
            cpu = Some((now, used));
        }
        if layer.is_none_or(|(then, _)| now.duration_since(then) > LAYER_AGE) {
            let snapshot = self.services.images.snapshot(id);
            layer = snapshot.and_then(|s| s.usage().ok()).map(|usage| (now, usage));
        }
        let mut all = self.last.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(last) = all.get_mut(id) {
            last.cpu = cpu;
            last.layer = layer;
        }
        Container { at: SystemTime::now(), usage, nano_cores, layer: layer.map(|(_, usage)| usage) }
    }

    /// Forgets containers that are not there any more.
    pub fn retain(&self, live: impl Fn(&ContainerId) -> bool) {
        self.last.lock().unwrap_or_else(|e| e.into_inner()).retain(|id, _| live(id));
    }

    /// Where writable layers are, for reports.
    pub fn mountpoint(&self) -> String {
        self.services.images.fs_usage().mountpoint.display().to_string()
    }

    /// A pod's usage: of the cgroup that the kubelet made for it; of its containers together where
    /// there is none. Blocks.
    pub fn pod(&self, pod: &PodView, containers: &[&Container]) -> Usage {
        let parent = &pod.record.config.cgroup_parent;
        // A slice's path is systemd's to know; its containers are summed up.
        if parent.starts_with('/')
            && let Ok(cgroup) = Cgroup::at(parent)
            && cgroup.exists()
        {
            return cgroup.stats();
        }
        let sum = |of: fn(&Usage) -> Option<u64>| {
            containers.iter().filter_map(|c| of(&c.usage)).reduce(|a, b| a + b)
        };
        let mut usage = Usage::default();
        usage.cpu.usage_ns = sum(|u| u.cpu.usage_ns);
        usage.memory.usage = sum(|u| u.memory.usage);
        usage.memory.working_set = sum(|u| u.memory.working_set);
        usage.memory.rss = sum(|u| u.memory.rss);
        usage.memory.page_faults = sum(|u| u.memory.page_faults);
        usage.memory.major_page_faults = sum(|u| u.memory.major_page_faults);
        usage.pids.current = sum(|u| u.pids.current);
        usage
    }

    /// A pod's interfaces, without `lo`. Empty for the node's network. Blocks.
    pub fn interfaces(&self, pod: &PodView) -> io::Result<Vec<Interface>> {
        if pod.record.config.namespaces.host_network {
            return Ok(Vec::new());
        }
        let pin = self.services.shims.pod_bundle(&pod.record.id).namespace(Namespace::Net);
        let text = in_netns(&pin)?;
        Ok(parse_net_dev(&text))
    }
}

/// /proc/net/dev as seen from a pinned network namespace.
fn in_netns(pin: &Path) -> io::Result<String> {
    let ns = File::open(pin)?;
    // A thread of its own that ends: no other work may ever run in the wrong namespace.
    let read = thread::spawn(move || {
        nix::sched::setns(&ns, nix::sched::CloneFlags::CLONE_NEWNET)?;
        fs::read_to_string("/proc/thread-self/net/dev")
    });
    read.join().unwrap_or_else(|_| Err(io::Error::other("the reader broke off")))
}

/// Kernel format: two header lines, then "name: 8 receive columns, 8 transmit columns".
fn parse_net_dev(text: &str) -> Vec<Interface> {
    let line = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        let columns: Vec<u64> = rest.split_whitespace().filter_map(|c| c.parse().ok()).collect();
        let interface = Interface {
            name: name.trim().to_owned(),
            rx_bytes: *columns.first()?,
            rx_errors: *columns.get(2)?,
            tx_bytes: *columns.get(8)?,
            tx_errors: *columns.get(10)?,
        };
        (interface.name != "lo").then_some(interface)
    };
    text.lines().skip(2).filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn net_dev_is_read_by_column() {
        let text = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
  eth0: 1500 10 1 0 0 0 0 0 2500 20 2 0 0 0 0 0
";
        let eth0 = Interface {
            name: "eth0".into(),
            rx_bytes: 1500,
            rx_errors: 1,
            tx_bytes: 2500,
            tx_errors: 2,
        };
        assert_eq!(parse_net_dev(text), [eth0]);
        assert_eq!(parse_net_dev("garbage\n\nx: 1 2\n"), []);
    }
}

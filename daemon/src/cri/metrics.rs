//! Metrics of pods and containers: cAdvisor's names, labels and types, which is what dashboards know
//! and what the kubelet serves at /metrics/cadvisor when it has them from the runtime.
//!
//! The table says for each metric what it is and how it is read from what [`crate::stats`] found. The
//! CRI carries whole numbers, so seconds lose their fraction here.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use holdfast_protos::cri::{
    self,
    MetricType::{self, Counter, Gauge},
};
use holdfast_shim::cgroup::Stall;
use prost::Message as _;
use tonic::Status;

use super::{convert::nanos, stats::blocking};
use crate::{
    MESSAGE_LIMIT,
    pod::{ContainerView, PodView, state::ContainerState},
    stats::{Container, Details, FileSystem, Interface, Layer, Stats, Usage, device_name},
};

/// Labels of every metric, in this order. The rest follows them.
const LABELS: [&str; 6] = ["container", "id", "image", "name", "namespace", "pod"];

/// Where a streamed message ends: well below every client's limit, and worth its overhead.
const MESSAGE: usize = 512 << 10;

/// Containers that are read together.
const TOGETHER: usize = 16;

/// What a metric of a container, or of a pod's cgroup, is read from.
struct Subject<'a> {
    usage: &'a Usage,
    details: &'a Details,
    layer: Option<Layer>,
    fs: &'a FileSystem,
    started_at: SystemTime,
    now: SystemTime,
    is_container: bool,
    devices: &'a mut HashMap<(u32, u32), String>,
}

/// Values of one metric with their further labels. A value at a time in the past has it with it.
#[derive(Default)]
struct Values(Vec<(Vec<String>, u64, i64)>);

impl Values {
    fn one(&mut self, value: impl Into<Option<u64>>) {
        if let Some(value) = value.into() {
            self.0.push((Vec::new(), value, 0));
        }
    }

    fn with<const N: usize>(&mut self, labels: [&str; N], value: impl Into<Option<u64>>) {
        if let Some(value) = value.into() {
            self.0.push((labels.map(str::to_owned).to_vec(), value, 0));
        }
    }
}

/// A metric of cgroups.
struct Metric {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    labels: &'static [&'static str],
    read: fn(&mut Subject<'_>, &mut Values),
}

const fn metric(
    name: &'static str,
    kind: MetricType,
    help: &'static str,
    labels: &'static [&'static str],
    read: fn(&mut Subject<'_>, &mut Values),
) -> Metric {
    Metric { name, help, kind, labels, read }
}

/// Metrics of containers; those that have a value for it are told of a pod's cgroup too.
static METRICS: &[Metric] = &[
    metric(
        "container_last_seen",
        Gauge,
        "When the container was last seen, in Unix seconds.",
        &[],
        |s, v| {
            v.one(unix(s.now));
        },
    ),
    metric(
        "container_start_time_seconds",
        Gauge,
        "When it started, in Unix seconds.",
        &[],
        |s, v| {
            v.one(unix(s.started_at));
        },
    ),
    // CPU
    metric(
        "container_cpu_usage_seconds_total",
        Counter,
        "CPU time, in seconds.",
        &["cpu"],
        |s, v| {
            v.with(["total"], s.usage.cpu.usage_ns.map(seconds));
        },
    ),
    metric(
        "container_cpu_user_seconds_total",
        Counter,
        "CPU time in user mode, in seconds.",
        &[],
        |s, v| {
            v.one(s.usage.cpu.user_ns.map(seconds));
        },
    ),
    metric(
        "container_cpu_system_seconds_total",
        Counter,
        "CPU time in the kernel, in seconds.",
        &[],
        |s, v| {
            v.one(s.usage.cpu.system_ns.map(seconds));
        },
    ),
    metric(
        "container_cpu_cfs_periods_total",
        Counter,
        "Enforcement periods of the CPU quota that passed.",
        &[],
        |s, v| {
            v.one(s.quota().map(|_| s.usage.cpu.periods));
        },
    ),
    metric(
        "container_cpu_cfs_throttled_periods_total",
        Counter,
        "Enforcement periods in which it was throttled.",
        &[],
        |s, v| {
            v.one(s.quota().map(|_| s.usage.cpu.throttled_periods));
        },
    ),
    metric(
        "container_cpu_cfs_throttled_seconds_total",
        Counter,
        "How long it was throttled, in seconds.",
        &[],
        |s, v| {
            v.one(s.quota().map(|_| seconds(s.usage.cpu.throttled_ns)));
        },
    ),
    // Memory
    metric(
        "container_memory_usage_bytes",
        Gauge,
        "Memory charged to it, caches included.",
        &[],
        |s, v| {
            v.one(s.usage.memory.usage);
        },
    ),
    metric(
        "container_memory_working_set_bytes",
        Gauge,
        "Memory usage without inactive file cache.",
        &[],
        |s, v| {
            v.one(s.usage.memory.working_set);
        },
    ),
    metric("container_memory_rss", Gauge, "Anonymous memory, with swap cache.", &[], |s, v| {
        v.one(s.usage.memory.rss);
    }),
    metric("container_memory_cache", Gauge, "Page cache.", &[], |s, v| v.one(s.usage.memory.cache)),
    metric("container_memory_mapped_file", Gauge, "Mapped files.", &[], |s, v| {
        v.one(s.usage.memory.mapped_file);
    }),
    metric("container_memory_total_active_file_bytes", Gauge, "Active file cache.", &[], |s, v| {
        v.one(s.usage.memory.active_file);
    }),
    metric(
        "container_memory_total_inactive_file_bytes",
        Gauge,
        "Inactive file cache.",
        &[],
        |s, v| {
            v.one(s.usage.memory.inactive_file);
        },
    ),
    metric("container_memory_kernel_usage", Gauge, "Kernel memory.", &[], |s, v| {
        v.one(s.usage.memory.kernel);
    }),
    metric("container_memory_swap", Gauge, "Swap in use, in bytes.", &[], |s, v| {
        v.one(s.memory(s.usage.memory.swap));
    }),
    metric(
        "container_memory_max_usage_bytes",
        Gauge,
        "Most memory ever charged to it.",
        &[],
        |s, v| {
            v.one(s.usage.memory.peak);
        },
    ),
    metric(
        "container_memory_failcnt",
        Counter,
        "How often memory usage met the limit.",
        &[],
        |s, v| {
            v.one(s.memory(s.usage.memory.limit_hits));
        },
    ),
    metric(
        "container_memory_failures_total",
        Counter,
        "Page faults.",
        &["failure_type", "scope"],
        |s, v| {
            for scope in ["container", "hierarchy"] {
                v.with(["pgfault", scope], s.usage.memory.page_faults);
                v.with(["pgmajfault", scope], s.usage.memory.major_page_faults);
            }
        },
    ),
    metric(
        "container_oom_events_total",
        Counter,
        "Processes that the kernel killed for want of memory.",
        &[],
        |s, v| {
            v.one(s.memory(s.usage.memory.oom_kills));
        },
    ),
    metric(
        "container_hugetlb_usage_bytes",
        Gauge,
        "Huge pages in use, in bytes.",
        &["pagesize"],
        |s, v| {
            for pages in &s.usage.hugetlb {
                v.with([&pages.size], pages.usage);
            }
        },
    ),
    metric(
        "container_hugetlb_max_usage_bytes",
        Gauge,
        "Most huge pages ever in use, in bytes.",
        &["pagesize"],
        |s, v| {
            for pages in &s.usage.hugetlb {
                v.with([&pages.size], pages.peak);
            }
        },
    ),
    // Block devices
    metric(
        "container_fs_reads_bytes_total",
        Counter,
        "Bytes read from the device.",
        &["device"],
        |s, v| {
            s.devices(v, |io| io.read_bytes);
        },
    ),
    metric("container_fs_reads_total", Counter, "Reads from the device.", &["device"], |s, v| {
        s.devices(v, |io| io.reads);
    }),
    metric(
        "container_fs_writes_bytes_total",
        Counter,
        "Bytes written to the device.",
        &["device"],
        |s, v| {
            s.devices(v, |io| io.written_bytes);
        },
    ),
    metric("container_fs_writes_total", Counter, "Writes to the device.", &["device"], |s, v| {
        s.devices(v, |io| io.writes);
    }),
    metric(
        "container_blkio_device_usage_total",
        Counter,
        "Bytes read from and written to the device.",
        &["device", "major", "minor", "operation"],
        |s, v| {
            let usage = s.usage;
            for io in &usage.io {
                let (major, minor) = (io.major.to_string(), io.minor.to_string());
                let device = s.device(io.major, io.minor);
                v.with([device, &major, &minor, "Read"], io.read_bytes);
                v.with([device, &major, &minor, "Write"], io.written_bytes);
            }
        },
    ),
    // The file system of the writable layer
    metric(
        "container_fs_usage_bytes",
        Gauge,
        "Size of the writable layer.",
        &["device"],
        |s, v| {
            let Some(layer) = s.layer else { return };
            v.0.push((vec![s.fs.device.clone()], layer.bytes, nanos(layer.at)));
        },
    ),
    metric(
        "container_fs_limit_bytes",
        Gauge,
        "Capacity of the file system of the writable layer.",
        &["device"],
        |s, v| {
            s.file_system(v, |fs| fs.bytes);
        },
    ),
    metric(
        "container_fs_inodes_total",
        Gauge,
        "Inodes of the file system of the writable layer.",
        &["device"],
        |s, v| {
            s.file_system(v, |fs| fs.inodes);
        },
    ),
    metric("container_fs_inodes_free", Gauge, "Its free inodes.", &["device"], |s, v| {
        s.file_system(v, |fs| fs.inodes_free);
    }),
    // Processes
    metric("container_processes", Gauge, "Processes in it.", &[], |s, v| {
        v.one(s.details.processes.map(|p| p.count));
    }),
    metric("container_threads", Gauge, "Threads in it.", &[], |s, v| v.one(s.usage.pids.current)),
    metric(
        "container_threads_max",
        Gauge,
        "Most threads it may have; 0: no limit.",
        &[],
        |s, v| {
            v.one(s.usage.pids.current.map(|_| s.usage.pids.limit.unwrap_or_default()));
        },
    ),
    metric(
        "container_file_descriptors",
        Gauge,
        "Descriptors that its processes have open.",
        &[],
        |s, v| {
            v.one(s.details.processes.map(|p| p.descriptors));
        },
    ),
    metric("container_sockets", Gauge, "Sockets that its processes have open.", &[], |s, v| {
        v.one(s.details.processes.map(|p| p.sockets));
    }),
    metric(
        "container_ulimits_soft",
        Gauge,
        "Soft limits of its first process.",
        &["ulimit"],
        |s, v| {
            v.with(["max_open_files"], s.details.open_files);
        },
    ),
    // Limits
    metric(
        "container_spec_cpu_period",
        Gauge,
        "Length of a CPU quota's period, in microseconds.",
        &[],
        |s, v| {
            v.one(s.details.limits.cpu_period);
        },
    ),
    metric(
        "container_spec_cpu_quota",
        Gauge,
        "CPU time in a period, in microseconds.",
        &[],
        |s, v| v.one(s.quota()),
    ),
    metric("container_spec_cpu_shares", Gauge, "CPU shares.", &[], |s, v| {
        v.one(s.details.limits.cpu_shares)
    }),
    metric("container_spec_memory_limit_bytes", Gauge, "Memory limit; 0: none.", &[], |s, v| {
        v.one(s.memory(s.details.limits.memory));
    }),
    metric(
        "container_spec_memory_swap_limit_bytes",
        Gauge,
        "Swap limit, on cgroup v1 with memory; 0: none.",
        &[],
        |s, v| {
            v.one(s.memory(s.details.limits.memory_swap));
        },
    ),
    metric(
        "container_spec_memory_reservation_limit_bytes",
        Gauge,
        "Memory that is kept for it; 0: none.",
        &[],
        |s, v| {
            v.one(s.memory(s.details.limits.memory_reservation));
        },
    ),
    // Pressure
    metric(
        "container_pressure_cpu_waiting_seconds_total",
        Counter,
        "How long some task waited for CPU, in seconds.",
        &[],
        |s, v| {
            v.one(s.usage.cpu.pressure.map(|p| stalled(p.some)));
        },
    ),
    metric(
        "container_pressure_cpu_stalled_seconds_total",
        Counter,
        "How long all tasks waited for CPU, in seconds.",
        &[],
        |s, v| {
            v.one(s.usage.cpu.pressure.map(|p| stalled(p.full)));
        },
    ),
    metric(
        "container_pressure_memory_waiting_seconds_total",
        Counter,
        "How long some task waited for memory, in seconds.",
        &[],
        |s, v| {
            v.one(s.usage.memory.pressure.map(|p| stalled(p.some)));
        },
    ),
    metric(
        "container_pressure_memory_stalled_seconds_total",
        Counter,
        "How long all tasks waited for memory, in seconds.",
        &[],
        |s, v| {
            v.one(s.usage.memory.pressure.map(|p| stalled(p.full)));
        },
    ),
    metric(
        "container_pressure_io_waiting_seconds_total",
        Counter,
        "How long some task waited for a device, in seconds.",
        &[],
        |s, v| {
            v.one(s.usage.io_pressure.map(|p| stalled(p.some)));
        },
    ),
    metric(
        "container_pressure_io_stalled_seconds_total",
        Counter,
        "How long all tasks waited for a device, in seconds.",
        &[],
        |s, v| {
            v.one(s.usage.io_pressure.map(|p| stalled(p.full)));
        },
    ),
];

/// A metric of a pod's interfaces.
struct Network {
    name: &'static str,
    help: &'static str,
    read: fn(&Interface) -> u64,
}

static NETWORK: &[Network] = &{
    const fn network(
        name: &'static str,
        help: &'static str,
        read: fn(&Interface) -> u64,
    ) -> Network {
        Network { name, help, read }
    }
    [
        network("container_network_receive_bytes_total", "Bytes received.", |i| i.rx.bytes),
        network("container_network_receive_packets_total", "Packets received.", |i| i.rx.packets),
        network(
            "container_network_receive_packets_dropped_total",
            "Packets dropped on the way in.",
            |i| i.rx.dropped,
        ),
        network("container_network_receive_errors_total", "Errors while receiving.", |i| {
            i.rx.errors
        }),
        network("container_network_transmit_bytes_total", "Bytes sent.", |i| i.tx.bytes),
        network("container_network_transmit_packets_total", "Packets sent.", |i| i.tx.packets),
        network(
            "container_network_transmit_packets_dropped_total",
            "Packets dropped on the way out.",
            |i| i.tx.dropped,
        ),
        network("container_network_transmit_errors_total", "Errors while sending.", |i| {
            i.tx.errors
        }),
    ]
};

impl Subject<'_> {
    fn quota(&self) -> Option<u64> {
        self.details.limits.cpu_quota
    }

    /// What the kernel does not tell of memory is 0, where there is a memory controller at all.
    fn memory(&self, value: Option<u64>) -> Option<u64> {
        self.usage.memory.usage.map(|_| value.unwrap_or_default())
    }

    fn device(&mut self, major: u32, minor: u32) -> &str {
        self.devices.entry((major, minor)).or_insert_with(|| device_name(major, minor))
    }

    fn devices(&mut self, values: &mut Values, read: fn(&holdfast_shim::cgroup::Io) -> u64) {
        let usage = self.usage;
        for io in &usage.io {
            values.with([self.device(io.major, io.minor)], read(io));
        }
    }

    fn file_system(&self, values: &mut Values, read: fn(&FileSystem) -> u64) {
        // A pod's cgroup has no layer.
        if self.is_container && !self.fs.device.is_empty() {
            values.with([&self.fs.device], read(self.fs));
        }
    }
}

fn seconds(nanos: u64) -> u64 {
    nanos / 1_000_000_000
}

fn stalled(stall: Stall) -> u64 {
    stall.total / 1_000_000
}

fn unix(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

/// Every metric that [`pods`] may give.
pub(super) fn descriptors() -> Vec<cri::MetricDescriptor> {
    let describe = |name: &str, help: &str, labels: &[&str]| cri::MetricDescriptor {
        name: name.to_owned(),
        help: help.to_owned(),
        label_keys: LABELS.iter().chain(labels).map(|label| (*label).to_owned()).collect(),
    };
    let cgroups = METRICS.iter().map(|metric| describe(metric.name, metric.help, metric.labels));
    let networks = NETWORK.iter().map(|metric| describe(metric.name, metric.help, &["interface"]));
    cgroups.chain(networks).collect()
}

/// Everything about these pods and their running containers.
pub(super) async fn pods(
    stats: &Arc<Stats>,
    views: Vec<Arc<PodView>>,
) -> Result<Vec<cri::PodSandboxMetrics>, Status> {
    let stats = stats.clone();
    blocking(move || read(&stats, &views)).await
}

/// Refuses an answer that no client would take, with what to do instead.
pub(super) fn fits(answer: &cri::ListPodSandboxMetricsResponse) -> Result<(), Status> {
    let size = answer.encoded_len();
    match size <= MESSAGE_LIMIT {
        true => Ok(()),
        false => Err(Status::resource_exhausted(format!(
            "metrics of {} pods are {size} bytes, more than the {MESSAGE_LIMIT} of a message: use \
             StreamPodSandboxMetrics (the kubelet's feature gate CRIListStreaming)",
            answer.pod_metrics.len()
        ))),
    }
}

/// The next message of a stream: as many of the pods as are enough, taken off the list.
pub(super) async fn next(
    stats: &Arc<Stats>,
    rest: &mut std::vec::IntoIter<Arc<PodView>>,
) -> Result<Option<Vec<cri::PodSandboxMetrics>>, Status> {
    let mut message = Vec::new();
    let mut size = 0;
    while size < MESSAGE {
        // A few at a time, for what they share.
        let (mut some, mut containers) = (Vec::new(), 0);
        while containers < TOGETHER
            && let Some(pod) = rest.next()
        {
            containers += 1 + pod.containers.len();
            some.push(pod);
        }
        if some.is_empty() {
            break;
        }
        let read = pods(stats, some).await?;
        size += read.iter().map(cri::PodSandboxMetrics::encoded_len).sum::<usize>();
        message.extend(read);
    }
    Ok((!message.is_empty()).then_some(message))
}

fn read(stats: &Stats, views: &[Arc<PodView>]) -> Vec<cri::PodSandboxMetrics> {
    let fs = stats.file_system().unwrap_or_default();
    let mut devices = HashMap::new();
    let read = stats.pods(views);
    views
        .iter()
        .zip(read)
        .map(|(view, read)| {
            let details = stats.pod_details(view).unwrap_or_default();
            let labels = pod_labels(view, &details);
            let mut subject = Subject {
                usage: &read.usage,
                details: &details,
                layer: None,
                fs: &fs,
                started_at: view.record.created_at,
                now: read.at,
                is_container: false,
                devices: &mut devices,
            };
            let mut metrics = values(&mut subject, &labels);
            for interface in read.interfaces.iter().flatten() {
                metrics.extend(NETWORK.iter().map(|metric| {
                    let labels = labels.iter().chain([&interface.name]).cloned().collect();
                    told(metric.name, Counter, labels, (metric.read)(interface), 0)
                }));
            }
            let containers = read.containers.iter();
            let container_metrics = containers
                .map(|(view_of, read)| cri::ContainerMetrics {
                    container_id: view_of.record.id.to_string(),
                    metrics: container(stats, view, view_of, read, &fs, &mut devices),
                })
                .collect();
            cri::PodSandboxMetrics {
                pod_sandbox_id: view.record.id.to_string(),
                metrics,
                container_metrics,
            }
        })
        .collect()
}

fn container(
    stats: &Stats,
    pod: &PodView,
    view: &ContainerView,
    read: &Container,
    fs: &FileSystem,
    devices: &mut HashMap<(u32, u32), String>,
) -> Vec<cri::Metric> {
    let record = &view.record;
    let details = stats.container_details(view);
    let mut subject = Subject {
        usage: &read.usage,
        details: &details,
        layer: read.layer,
        fs,
        started_at: match record.state {
            ContainerState::Running { started_at, .. } => started_at,
            _ => record.created_at,
        },
        now: read.at,
        is_container: true,
        devices,
    };
    let config = &record.config;
    let labels = [
        config.name.clone(),
        details.path.clone(),
        config.asked_image().to_owned(),
        record.id.to_string(),
        pod.record.config.namespace.clone(),
        pod.record.config.name.clone(),
    ];
    values(&mut subject, &labels)
}

/// As cAdvisor labels a pod's cgroup: no container, no image.
fn pod_labels(view: &PodView, details: &Details) -> [String; 6] {
    let config = &view.record.config;
    [
        String::new(),
        details.path.clone(),
        String::new(),
        view.record.id.to_string(),
        config.namespace.clone(),
        config.name.clone(),
    ]
}

fn values(subject: &mut Subject<'_>, labels: &[String; 6]) -> Vec<cri::Metric> {
    let mut all = Vec::with_capacity(METRICS.len() + 8);
    for metric in METRICS {
        let mut values = Values::default();
        (metric.read)(subject, &mut values);
        for (further, value, at) in values.0 {
            let labels = labels.iter().cloned().chain(further).collect();
            all.push(told(metric.name, metric.kind, labels, value, at));
        }
    }
    all
}

fn told(name: &str, kind: MetricType, labels: Vec<String>, value: u64, at: i64) -> cri::Metric {
    cri::Metric {
        name: name.to_owned(),
        timestamp: at,
        metric_type: kind as i32,
        label_values: labels,
        value: Some(cri::UInt64Value { value }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_described_once_with_labels_and_words() {
        let all = descriptors();
        let mut names: Vec<_> = all.iter().map(|d| d.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all.len());
        for descriptor in &all {
            assert!(descriptor.name.starts_with("container_"), "{}", descriptor.name);
            assert!(descriptor.help.ends_with('.'), "{}: {}", descriptor.name, descriptor.help);
            assert_eq!(descriptor.label_keys[..6], LABELS.map(str::to_owned));
        }
    }

    /// `a_{b,c}[_d]`: `a_b`, `a_b_d`, `a_c`, `a_c_d`.
    fn expand(pattern: &str) -> Vec<String> {
        let Some(at) = pattern.find(['{', '[']) else { return vec![pattern.to_owned()] };
        let (before, rest) = pattern.split_at(at);
        let end = rest.find(['}', ']']).expect("a bracket is closed");
        let (inner, rest) = (&rest[1..end], &rest[end + 1..]);
        let choices: Vec<&str> = match pattern.as_bytes()[at] {
            b'{' => inner.split(',').collect(),
            _ => vec!["", inner],
        };
        let ends = expand(rest);
        let all = choices.iter().flat_map(|choice| ends.iter().map(move |end| (choice, end)));
        all.map(|(choice, end)| format!("{before}{choice}{end}")).collect()
    }

    #[test]
    fn the_guide_lists_what_is_told_and_nothing_else() {
        let guide = include_str!("../../../docs/observability.md");
        let cells = guide.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
        let names = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
        let mut listed: Vec<String> =
            names.filter(|name| name.starts_with("container_")).flat_map(expand).collect();
        let mut told: Vec<String> = descriptors().into_iter().map(|d| d.name).collect();
        listed.sort_unstable();
        told.sort_unstable();
        assert_eq!(listed, told);
    }

    #[test]
    fn what_is_too_large_for_a_message_is_refused_with_what_to_do() {
        let metric = |size: usize| cri::PodSandboxMetrics {
            pod_sandbox_id: "x".repeat(size),
            ..Default::default()
        };
        let answer = |size| cri::ListPodSandboxMetricsResponse { pod_metrics: vec![metric(size)] };
        assert!(fits(&answer(1000)).is_ok());
        let refused = fits(&answer(MESSAGE_LIMIT)).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        assert!(refused.message().contains("StreamPodSandboxMetrics"), "{}", refused.message());
    }
}

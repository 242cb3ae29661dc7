//! Usage, as the CRI has it.

use std::sync::Arc;

use holdfast_protos::cri;
use holdfast_shim::cgroup::{Pressure, Stall};
use tonic::Status;

use super::convert::{container_metadata, nanos, pod_metadata};
use crate::{
    pod::{ContainerView, PodView},
    stats::{Container, Interface, Pod, Stats, Usage},
};

fn value(value: Option<u64>) -> Option<cri::UInt64Value> {
    value.map(|value| cri::UInt64Value { value })
}

fn psi(pressure: Option<Pressure>) -> Option<cri::PsiStats> {
    let data = |s: Stall| cri::PsiData {
        total: s.total,
        avg10: s.avg10,
        avg60: s.avg60,
        avg300: s.avg300,
    };
    pressure.map(|p| cri::PsiStats { full: Some(data(p.full)), some: Some(data(p.some)) })
}

fn cpu(at: i64, usage: &Usage, nano_cores: Option<u64>) -> cri::CpuUsage {
    cri::CpuUsage {
        timestamp: at,
        usage_core_nano_seconds: value(usage.cpu.usage_ns),
        usage_nano_cores: value(nano_cores),
        psi: psi(usage.cpu.pressure),
    }
}

fn memory(at: i64, usage: &Usage) -> cri::MemoryUsage {
    let memory = &usage.memory;
    // The kubelet's own rule: what is left under the limit, if there is one.
    let left = memory.limit.zip(memory.working_set).map(|(l, w)| l.saturating_sub(w));
    cri::MemoryUsage {
        timestamp: at,
        working_set_bytes: value(memory.working_set),
        available_bytes: value(left),
        usage_bytes: value(memory.usage),
        rss_bytes: value(memory.rss),
        page_faults: value(memory.page_faults),
        major_page_faults: value(memory.major_page_faults),
        psi: psi(memory.pressure),
    }
}

fn swap(at: i64, usage: &Usage) -> Option<cri::SwapUsage> {
    let used = usage.memory.swap?;
    Some(cri::SwapUsage {
        timestamp: at,
        swap_available_bytes: value(usage.memory.swap_available),
        swap_usage_bytes: value(Some(used)),
    })
}

fn io(at: i64, usage: &Usage) -> Option<cri::IoUsage> {
    let psi = psi(usage.io_pressure)?;
    Some(cri::IoUsage { timestamp: at, psi: Some(psi) })
}

fn container(view: &ContainerView, read: &Container, mountpoint: &str) -> cri::ContainerStats {
    let at = nanos(read.at);
    let config = &view.record.config;
    cri::ContainerStats {
        attributes: Some(cri::ContainerAttributes {
            id: view.record.id.to_string(),
            metadata: Some(container_metadata(config)),
            labels: config.labels.clone().into_iter().collect(),
            annotations: config.annotations.clone().into_iter().collect(),
        }),
        cpu: Some(cpu(at, &read.usage, read.nano_cores)),
        memory: Some(memory(at, &read.usage)),
        writable_layer: read.layer.map(|layer| cri::FilesystemUsage {
            timestamp: nanos(layer.at),
            fs_id: Some(cri::FilesystemIdentifier { mountpoint: mountpoint.to_owned() }),
            used_bytes: value(Some(layer.bytes)),
            inodes_used: value(Some(layer.inodes)),
        }),
        swap: swap(at, &read.usage),
        io: io(at, &read.usage),
    }
}

/// Runs what reads files where it may block.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Status::internal("reading statistics broke off"))
}

/// Usage of these containers.
pub(super) async fn containers(
    stats: &Arc<Stats>,
    views: Vec<Arc<ContainerView>>,
) -> Result<Vec<cri::ContainerStats>, Status> {
    let stats = stats.clone();
    blocking(move || {
        let mountpoint = stats.mountpoint();
        let read = stats.containers(&views);
        views.iter().zip(&read).map(|(view, read)| container(view, read, &mountpoint)).collect()
    })
    .await
}

/// Usage of these pods and of their running containers.
pub(super) async fn pods(
    stats: &Arc<Stats>,
    views: Vec<Arc<PodView>>,
) -> Result<Vec<cri::PodSandboxStats>, Status> {
    let stats = stats.clone();
    blocking(move || {
        let mountpoint = stats.mountpoint();
        let read = stats.pods(&views);
        views.iter().zip(read).map(|(view, read)| pod(view, read, &mountpoint)).collect()
    })
    .await
}

fn pod(view: &PodView, read: Pod, mountpoint: &str) -> cri::PodSandboxStats {
    let at = nanos(read.at);
    let config = &view.record.config;
    let containers = read.containers.iter();
    cri::PodSandboxStats {
        attributes: Some(cri::PodSandboxAttributes {
            id: view.record.id.to_string(),
            metadata: Some(pod_metadata(config)),
            labels: config.labels.clone().into_iter().collect(),
            annotations: config.annotations.clone().into_iter().collect(),
        }),
        linux: Some(cri::LinuxPodSandboxStats {
            cpu: Some(cpu(at, &read.usage, read.nano_cores)),
            memory: Some(memory(at, &read.usage)),
            network: read.interfaces.map(|interfaces| network(at, interfaces)),
            process: Some(cri::ProcessUsage {
                timestamp: at,
                process_count: value(read.processes),
            }),
            containers: containers.map(|(view, read)| container(view, read, mountpoint)).collect(),
            io: io(at, &read.usage),
        }),
        windows: None,
    }
}

fn network(at: i64, interfaces: Vec<Interface>) -> cri::NetworkUsage {
    let mut all: Vec<_> = interfaces
        .into_iter()
        .map(|i| cri::NetworkInterfaceUsage {
            name: i.name,
            rx_bytes: value(Some(i.rx.bytes)),
            rx_errors: value(Some(i.rx.errors)),
            tx_bytes: value(Some(i.tx.bytes)),
            tx_errors: value(Some(i.tx.errors)),
        })
        .collect();
    let default = all.iter().position(|i| i.name == "eth0").map(|at| all.remove(at));
    cri::NetworkUsage { timestamp: at, default_interface: default, interfaces: all }
}

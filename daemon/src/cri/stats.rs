//! Usage, as the CRI has it.

use std::{sync::Arc, time::SystemTime};

use holdfast_protos::cri;
use holdfast_shim::cgroup::Pressure;
use tonic::Status;

use super::convert::nanos;
use crate::{
    pod::{ContainerView, PodView},
    stats::{Container, Interface, Stats, Usage},
};

fn value(value: Option<u64>) -> Option<cri::UInt64Value> {
    value.map(|value| cri::UInt64Value { value })
}

fn psi(pressure: Option<Pressure>) -> Option<cri::PsiStats> {
    let data = |s: holdfast_shim::cgroup::Stall| cri::PsiData {
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

fn container(view: &ContainerView, read: Container, mountpoint: &str) -> cri::ContainerStats {
    let at = nanos(read.at);
    let config = &view.record.config;
    let swap = read.usage.memory.swap;
    cri::ContainerStats {
        attributes: Some(cri::ContainerAttributes {
            id: view.record.id.to_string(),
            metadata: Some(cri::ContainerMetadata {
                name: config.name.clone(),
                attempt: config.attempt,
            }),
            labels: config.labels.clone().into_iter().collect(),
            annotations: config.annotations.clone().into_iter().collect(),
        }),
        cpu: Some(cpu(at, &read.usage, read.nano_cores)),
        memory: Some(memory(at, &read.usage)),
        writable_layer: read.layer.map(|(bytes, inodes)| cri::FilesystemUsage {
            timestamp: at,
            fs_id: Some(cri::FilesystemIdentifier { mountpoint: mountpoint.to_owned() }),
            used_bytes: value(Some(bytes)),
            inodes_used: value(Some(inodes)),
        }),
        swap: swap.map(|used| cri::SwapUsage {
            timestamp: at,
            swap_available_bytes: value(
                read.usage.memory.swap_limit.map(|l| l.saturating_sub(used)),
            ),
            swap_usage_bytes: value(Some(used)),
        }),
        io: None,
    }
}

async fn blocking<T: Send + 'static>(
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
        views.iter().map(|view| container(view, stats.container(view), &mountpoint)).collect()
    })
    .await
}

/// Usage of these pods and of their running containers.
pub(super) async fn pods(
    stats: &Arc<Stats>,
    views: Vec<Arc<PodView>>,
) -> Result<Vec<cri::PodSandboxStats>, Status> {
    let stats = stats.clone();
    blocking(move || views.iter().map(|view| pod(&stats, view)).collect()).await
}

fn pod(stats: &Stats, view: &PodView) -> cri::PodSandboxStats {
    let mountpoint = stats.mountpoint();
    let running = view.containers.values().filter(|c| c.record.state.pid().is_some());
    let read: Vec<_> = running.map(|c| (c, stats.container(c))).collect();
    let at = nanos(SystemTime::now());
    let usage = stats.pod(view, &read.iter().map(|(_, r)| r).collect::<Vec<_>>());
    let interfaces = stats.interfaces(view).unwrap_or_default();
    let config = &view.record.config;
    cri::PodSandboxStats {
        attributes: Some(cri::PodSandboxAttributes {
            id: view.record.id.to_string(),
            metadata: Some(cri::PodSandboxMetadata {
                name: config.name.clone(),
                uid: config.uid.clone(),
                namespace: config.namespace.clone(),
                attempt: config.attempt,
            }),
            labels: config.labels.clone().into_iter().collect(),
            annotations: config.annotations.clone().into_iter().collect(),
        }),
        linux: Some(cri::LinuxPodSandboxStats {
            cpu: Some(cpu(at, &usage, read.iter().map(|(_, r)| r.nano_cores).sum())),
            memory: Some(memory(at, &usage)),
            network: Some(network(at, interfaces)),
            process: Some(cri::ProcessUsage {
                timestamp: at,
                process_count: value(usage.pids.current),
            }),
            containers: read
                .into_iter()
                .map(|(view, read)| container(view, read, &mountpoint))
                .collect(),
            io: None,
        }),
        windows: None,
    }
}

fn network(at: i64, interfaces: Vec<Interface>) -> cri::NetworkUsage {
    let mut all: Vec<_> = interfaces
        .into_iter()
        .map(|i| cri::NetworkInterfaceUsage {
            name: i.name,
            rx_bytes: value(Some(i.rx_bytes)),
            rx_errors: value(Some(i.rx_errors)),
            tx_bytes: value(Some(i.tx_bytes)),
            tx_errors: value(Some(i.tx_errors)),
        })
        .collect();
    let default = all.iter().position(|i| i.name == "eth0").map(|at| all.remove(at));
    cri::NetworkUsage { timestamp: at, default_interface: default, interfaces: all }
}

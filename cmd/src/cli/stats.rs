//! `stats`: what containers use.

use std::{
    collections::{HashMap, HashSet},
    io::{self, IsTerminal as _},
    time::Duration,
};

use anyhow::Result;
use holdfast_protos::cri;

use super::{
    Client,
    args::{Document, Output, Stats},
    find::{self, All, Found},
    table::{Table, short_id, size},
    wire,
};

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// Clears the screen and goes to its top left corner.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// `holdfast stats`
pub(super) async fn stats(client: &mut Client, args: Stats) -> Result<u8> {
    let output = args.listing.output();
    let stream = output == Output::Table && !args.no_stream && io::stdout().is_terminal();
    let all = All::list(client).await?;
    let only = selection(&all, &args.names)?;
    let mut before = read(client, &only).await?;
    match output {
        Output::Json => {
            wire::print(&wire::to_json("ListContainerStatsResponse", &before), Document::Json)?;
            return Ok(0);
        }
        Output::Yaml => {
            wire::print(&wire::to_json("ListContainerStatsResponse", &before), Document::Yaml)?;
            return Ok(0);
        }
        Output::Name => {
            let ids = before.stats.iter().filter_map(|s| s.attributes.as_ref());
            wire::write(&ids.map(|a| format!("{}\n", a.id)).collect::<String>())?;
            return Ok(0);
        }
        Output::Table => {}
    }
    loop {
        // CPU use is a difference, of two looks.
        tokio::time::sleep(INTERVAL).await;
        let now = read(client, &only).await?;
        let all = All::list(client).await?;
        let text = table(&all, &before.stats, &now.stats, args.listing.no_trunc);
        if !stream {
            wire::write(&text)?;
            return Ok(0);
        }
        wire::write(&format!("{CLEAR}{text}"))?;
        before = now;
    }
}

/// Ids of the containers that are named. `None`: all.
fn selection(all: &All, names: &[String]) -> Result<Option<HashSet<String>>> {
    if names.is_empty() {
        return Ok(None);
    }
    let mut ids = HashSet::new();
    for name in names {
        match all.any(name)? {
            Found::Container(container) => {
                ids.insert(container.id);
            }
            Found::Pod(pod) => {
                let of_pod = all.containers.iter().filter(|c| c.pod_sandbox_id == pod.id);
                ids.extend(of_pod.map(|c| c.id.clone()));
            }
        }
    }
    Ok(Some(ids))
}

async fn read(
    client: &Client,
    only: &Option<HashSet<String>>,
) -> Result<cri::ListContainerStatsResponse> {
    let mut runtime = client.runtime.clone();
    let request = cri::ListContainerStatsRequest::default();
    let mut response = client.quick(runtime.list_container_stats(request)).await?;
    if let Some(only) = only {
        response.stats.retain(|s| s.attributes.as_ref().is_some_and(|a| only.contains(&a.id)));
    }
    let key = |s: &cri::ContainerStats| s.attributes.as_ref().map(|a| a.id.clone());
    response.stats.sort_by_key(key);
    Ok(response)
}

fn table(
    all: &All,
    before: &[cri::ContainerStats],
    now: &[cri::ContainerStats],
    full: bool,
) -> String {
    let id = |s: &cri::ContainerStats| s.attributes.as_ref().map_or("", |a| &a.id).to_owned();
    let earlier: HashMap<_, _> = before.iter().map(|s| (id(s), s)).collect();
    let mut table =
        Table::new(["CONTAINER ID", "NAME", "POD", "CPU", "MEMORY", "LIMIT", "DISK", "INODES"]);
    for stats in now {
        let id = id(stats);
        let container = all.containers.iter().find(|c| c.id == id);
        let pod = container.and_then(|c| all.pods.iter().find(|p| p.id == c.pod_sandbox_id));
        let memory = stats.memory.as_ref();
        let value = |v: Option<&cri::UInt64Value>| v.map(|v| v.value);
        let working_set = memory
            .and_then(|m| value(m.working_set_bytes.as_ref()).or(value(m.usage_bytes.as_ref())));
        let available = memory.and_then(|m| value(m.available_bytes.as_ref())).filter(|&a| a > 0);
        let limit = working_set.zip(available).map(|(used, free)| used + free);
        let disk = stats.writable_layer.as_ref();
        let bytes = |n: Option<u64>| n.map(size).unwrap_or_default();
        table.row([
            if full { id.clone() } else { short_id(&id).to_owned() },
            container.map_or("", find::container_name).to_owned(),
            pod.map_or("", |p| find::pod_name(p).1).to_owned(),
            cpu_percent(earlier.get(&id).copied(), stats)
                .map(|p| format!("{p:.1}%"))
                .unwrap_or_default(),
            bytes(working_set),
            bytes(limit),
            bytes(disk.and_then(|d| value(d.used_bytes.as_ref()))),
            disk.and_then(|d| value(d.inodes_used.as_ref()))
                .map(|n| n.to_string())
                .unwrap_or_default(),
        ]);
    }
    table.render()
}

/// Of one CPU: 200% is two.
fn cpu_percent(before: Option<&cri::ContainerStats>, now: &cri::ContainerStats) -> Option<f64> {
    let cpu = |s: &cri::ContainerStats| {
        let cpu = s.cpu.as_ref()?;
        Some((cpu.timestamp, cpu.usage_core_nano_seconds.as_ref()?.value))
    };
    let by_looks = || {
        let (t0, used0) = cpu(before?)?;
        let (t1, used1) = cpu(now)?;
        // The daemon may answer both looks from one measurement.
        (t1 > t0).then(|| used1.saturating_sub(used0) as f64 / (t1 - t0) as f64 * 100.0)
    };
    let by_daemon = || Some(now.cpu.as_ref()?.usage_nano_cores.as_ref()?.value as f64 / 1e7);
    by_looks().or_else(by_daemon)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(timestamp: i64, used: u64, nano_cores: Option<u64>) -> cri::ContainerStats {
        let value = |value| cri::UInt64Value { value };
        cri::ContainerStats {
            cpu: Some(cri::CpuUsage {
                timestamp,
                usage_core_nano_seconds: Some(value(used)),
                usage_nano_cores: nano_cores.map(value),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn cpu_is_measured_between_two_looks_or_told() {
        let (a, b) = (stats(1_000, 500, None), stats(2_000, 1_000, None));
        assert_eq!(cpu_percent(Some(&a), &b), Some(50.0));
        assert_eq!(cpu_percent(Some(&b), &b), None);
        assert_eq!(cpu_percent(None, &b), None);
        assert_eq!(cpu_percent(None, &stats(1, 1, Some(20_000_000))), Some(2.0));
        assert_eq!(cpu_percent(Some(&b), &stats(3_000, 1, None)), Some(0.0), "a restart is no use");
    }
}

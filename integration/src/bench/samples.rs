//! What was measured, and how it is shown.

use std::{collections::BTreeMap, fmt::Write as _};

use serde_json::{Value, json};

/// Who was measured: a column of the table.
pub type Column = &'static str;
/// The bare programs that every runtime must call.
pub const FLOOR: Column = "floor";
/// Ours.
pub const HOLDFAST: Column = "holdfast";
/// The other one.
pub const CONTAINERD: Column = "containerd";

/// What a bar compares its limit with.
#[derive(Clone, Copy, Debug)]
enum Against {
    /// Nothing: the median itself.
    Zero,
    /// The median above the floor's.
    Floor,
    /// The median as a multiple of another's.
    Times(Column),
    /// Nothing: the highest of all, not the median.
    Most,
}

/// A limit of the median.
#[derive(Clone, Copy, Debug)]
struct Bar {
    metric: &'static str,
    against: Against,
    limit: f64,
}

/// Pod with a bridge and portmap; the floor is ADD of the same plugins.
pub const RUN_POD: &str = "RunPodSandbox";
/// Pod without containers; the floor is DEL of the same plugins.
pub const STOP_POD: &str = "StopPodSandbox";
/// A stopped pod.
pub const REMOVE_POD: &str = "RemovePodSandbox";
/// The floor is `runc create`.
pub const CREATE: &str = "CreateContainer";
/// The floor is `runc start`.
pub const START: &str = "StartContainer";
/// Both, as a kubelet does.
pub const CREATE_START: &str = "Create + Start";
/// `/bin/true`; the floor is `runc exec`.
pub const EXEC: &str = "ExecSync";
/// A shell that exits from its SIGTERM trap.
pub const STOP: &str = "StopContainer";
/// An exited container; the floor is `runc delete`.
pub const REMOVE: &str = "RemoveContainer";
/// ListContainers without a filter.
pub const LIST: &str = "ListContainers, 500";
/// The same on a smaller load, which no bar is about.
pub const LIST_QUICK: &str = "ListContainers, 100";
/// ListContainers with 500 running containers.
pub const WATCH_LIST: &str = "ListContainers, running";
/// Status of the runtime beside them.
pub const WATCH_STATUS: &str = "Status";
/// ListContainerStats.
pub const WATCH_STATS: &str = "ListContainerStats";
/// ListPodSandboxStats.
pub const WATCH_POD_STATS: &str = "ListPodSandboxStats";
/// StreamPodSandboxMetrics, read to its end.
pub const WATCH_METRICS: &str = "PodSandboxMetrics";
/// Processor time of the daemon for one of each of them.
pub const WATCH_CPU: [&str; 5] =
    ["- list, CPU", "- status, CPU", "- stats, CPU", "- pod stats, CPU", "- metrics, CPU"];
/// Ten layers, 1 GiB when unpacked, two thirds in large files.
pub const PULL_TEN: &str = "Pull 10 layers, gzip";
/// The same, zstd.
pub const PULL_TEN_ZSTD: &str = "Pull 10 layers, zstd";
/// One such layer of 500 MiB when unpacked.
pub const PULL_ONE: &str = "Pull 1 layer, gzip";
/// The same, zstd.
pub const PULL_ONE_ZSTD: &str = "Pull 1 layer, zstd";
/// Forty layers of half a MiB.
pub const PULL_40: &str = "Pull 40 layers, gzip";
/// The same, zstd.
pub const PULL_40_ZSTD: &str = "Pull 40 layers, zstd";
/// The daemon's CPU time of a pull of ten layers.
pub const PULL_TEN_CPU: &str = "- its CPU, gzip";
/// The same, zstd.
pub const PULL_TEN_ZSTD_CPU: &str = "- its CPU, zstd";
/// Bytes that the daemon wrote for each byte of the layers' archives, in each of those pulls.
pub const PULL_WRITTEN: &str = "Pull, written per byte";
/// Growth of the daemon's resident memory to its peak during each of those pulls.
pub const PULL_MEMORY: &str = "Pull, peak of memory";
/// Ten PullImage at once for an image that is missing, as a part of one such pull.
pub const PULL_TEN_AT_ONCE: &str = "Ten pulls at once";
/// How often the layer of it was downloaded: bytes of it that were sent, by its size.
pub const PULL_FETCHED: &str = "Ten pulls, downloads";
/// Layers that were downloaded of an image that shares nine of ten.
pub const PULL_SHARED: &str = "Pull, 9 of 10 here";
/// An image that is here and up to date.
pub const PULL_UP_TO_DATE: &str = "Pull, up to date";
/// The daemon's CPU time for an event and what it tells of, without subscribers.
pub const EVENT: &str = "CPU per event";
/// The same with ten subscribers.
pub const EVENT_TEN: &str = "CPU per event, 10 subs";
/// From the start of a daemon that was killed with a hundred pods to the first complete lists.
pub const KILL_LIST: &str = "Kill, 100 pods: listed";
/// The same, until the daemon is connected to every shim.
pub const KILL_LINKS: &str = "Kill, 100 pods: shims";
/// Lines that a container wrote meanwhile, at 50 MB/s, and that are not in its log.
pub const KILL_LOST: &str = "Kill: lines lost";
/// Its longest write.
pub const KILL_STALL: &str = "Kill: longest write";
/// Three lists together, beside pods that are stuck.
pub const STUCK_LISTS: &str = "Stuck: three lists";
/// A status of the runtime, a pod or a container, likewise; also of what is stuck.
pub const STUCK_STATUS: &str = "Stuck: a status";
/// Two lists of statistics together, likewise.
pub const STUCK_STATS: &str = "Stuck: two lists of stats";
/// An exec in a pod that is not stuck.
pub const STUCK_EXEC: &str = "Stuck: exec elsewhere";
/// From the start of the daemon to the first complete lists.
pub const RESTART: &str = "Restart, 30 pods";
/// PSS of a shim.
pub const SHIM: &str = "Shim PSS per pod";
/// That and what the daemon grew by.
pub const POD_MEMORY: &str = "Shim + daemon per pod";

/// How much more a shim has after 10,000 execs and 1 GB of output than after one exec and a quarter of it.
pub const SHIM_GROWTH: &str = "Shim PSS growth in use";
/// The same of what the shim has written to and has alone.
pub const SHIM_OWN_GROWTH: &str = "Shim private growth in use";
/// 256 MB in lines of 100 bytes, to the end of the container; the floor is conmon.
pub const LOG: &str = "Output, 256 MB";
/// The shim alone: from the exec of `start` to the answer to Connect.
pub const SHIM_START: &str = "shim: start to Connect";
/// The shim alone; the floor is bare runc on the same bundle.
pub const SHIM_CREATE_START: &str = "shim: Create + Start";
/// The shim alone, from Exec to the answer to Wait; the floor is bare runc.
pub const SHIM_EXEC: &str = "shim: exec";
/// PSS of one shim alone, with an idle container.
pub const SHIM_IDLE: &str = "shim: PSS alone";
/// PSS of a shim under containerd, with a pause and an idle container; `containerd` is its own shim.
pub const SHIM_UNDER_PEER: &str = "shim: under containerd";
/// Size of the binary.
pub const SHIM_BINARY: &str = "shim: binary";

/// In the order of the table, with their units.
const METRICS: &[(&str, &str)] = &[
    (RUN_POD, "ms"),
    (STOP_POD, "ms"),
    (REMOVE_POD, "ms"),
    (CREATE, "ms"),
    (START, "ms"),
    (CREATE_START, "ms"),
    (EXEC, "ms"),
    (STOP, "ms"),
    (REMOVE, "ms"),
    (LIST, "ms"),
    (LIST_QUICK, "ms"),
    (WATCH_LIST, "ms"),
    (WATCH_CPU[0], "ms"),
    (WATCH_STATUS, "ms"),
    (WATCH_CPU[1], "ms"),
    (WATCH_STATS, "ms"),
    (WATCH_CPU[2], "ms"),
    (WATCH_POD_STATS, "ms"),
    (WATCH_CPU[3], "ms"),
    (WATCH_METRICS, "ms"),
    (WATCH_CPU[4], "ms"),
    (PULL_TEN, "ms"),
    (PULL_TEN_CPU, "ms"),
    (PULL_ONE, "ms"),
    (PULL_40, "ms"),
    (PULL_TEN_ZSTD, "ms"),
    (PULL_TEN_ZSTD_CPU, "ms"),
    (PULL_ONE_ZSTD, "ms"),
    (PULL_40_ZSTD, "ms"),
    (PULL_WRITTEN, "B/B"),
    (PULL_MEMORY, "MiB"),
    (PULL_TEN_AT_ONCE, "1"),
    (PULL_FETCHED, ""),
    (PULL_SHARED, ""),
    (PULL_UP_TO_DATE, "ms"),
    (EVENT, "µs"),
    (EVENT_TEN, "µs"),
    (RESTART, "ms"),
    (KILL_LIST, "ms"),
    (KILL_LINKS, "ms"),
    (KILL_LOST, ""),
    (KILL_STALL, "ms"),
    (STUCK_LISTS, "ms"),
    (STUCK_STATUS, "ms"),
    (STUCK_STATS, "ms"),
    (STUCK_EXEC, "ms"),
    (SHIM, "KiB"),
    (POD_MEMORY, "KiB"),
    (SHIM_GROWTH, "%"),
    (SHIM_OWN_GROWTH, "%"),
    (LOG, "ms"),
    (SHIM_START, "ms"),
    (SHIM_CREATE_START, "ms"),
    (SHIM_EXEC, "ms"),
    (SHIM_IDLE, "KiB"),
    (SHIM_UNDER_PEER, "KiB"),
    (SHIM_BINARY, "KiB"),
];

const BARS: &[Bar] = &[
    Bar { metric: RUN_POD, against: Against::Floor, limit: 10.0 },
    Bar { metric: CREATE_START, against: Against::Floor, limit: 6.0 },
    Bar { metric: STOP, against: Against::Zero, limit: 15.0 },
    Bar { metric: EXEC, against: Against::Floor, limit: 3.0 },
    Bar { metric: LIST, against: Against::Zero, limit: 3.0 },
    Bar { metric: PULL_TEN, against: Against::Times(CONTAINERD), limit: 0.5 },
    Bar { metric: PULL_ONE, against: Against::Times(CONTAINERD), limit: 0.7 },
    Bar { metric: PULL_40, against: Against::Times(CONTAINERD), limit: 0.4 },
    Bar { metric: PULL_TEN_ZSTD, against: Against::Times(CONTAINERD), limit: 0.5 },
    Bar { metric: PULL_ONE_ZSTD, against: Against::Times(CONTAINERD), limit: 0.7 },
    Bar { metric: PULL_40_ZSTD, against: Against::Times(CONTAINERD), limit: 0.4 },
    Bar { metric: PULL_WRITTEN, against: Against::Zero, limit: 1.1 },
    Bar { metric: PULL_MEMORY, against: Against::Most, limit: 120.0 },
    Bar { metric: PULL_TEN_AT_ONCE, against: Against::Zero, limit: 1.1 },
    Bar { metric: PULL_FETCHED, against: Against::Zero, limit: 1.0 },
    Bar { metric: PULL_SHARED, against: Against::Zero, limit: 1.0 },
    Bar { metric: PULL_UP_TO_DATE, against: Against::Zero, limit: 20.0 },
    Bar { metric: RESTART, against: Against::Zero, limit: 150.0 },
    Bar { metric: KILL_LIST, against: Against::Zero, limit: 150.0 },
    Bar { metric: KILL_LINKS, against: Against::Zero, limit: 500.0 },
    Bar { metric: KILL_LOST, against: Against::Most, limit: 0.0 },
    Bar { metric: KILL_STALL, against: Against::Most, limit: 50.0 },
    Bar { metric: STUCK_LISTS, against: Against::Most, limit: 100.0 },
    Bar { metric: STUCK_STATUS, against: Against::Most, limit: 100.0 },
    Bar { metric: STUCK_STATS, against: Against::Most, limit: 100.0 },
    Bar { metric: STUCK_EXEC, against: Against::Zero, limit: 100.0 },
    Bar { metric: SHIM, against: Against::Zero, limit: 450.0 },
    Bar { metric: POD_MEMORY, against: Against::Zero, limit: 650.0 },
    Bar { metric: EXEC, against: Against::Times(FLOOR), limit: 1.15 },
    Bar { metric: SHIM_GROWTH, against: Against::Zero, limit: 10.0 },
    Bar { metric: SHIM_OWN_GROWTH, against: Against::Zero, limit: 10.0 },
    Bar { metric: LOG, against: Against::Times(FLOOR), limit: 0.5 },
    Bar { metric: LOG, against: Against::Times(CONTAINERD), limit: 0.5 },
    Bar { metric: SHIM_START, against: Against::Zero, limit: 8.0 },
    Bar { metric: SHIM_CREATE_START, against: Against::Floor, limit: 3.0 },
    Bar { metric: SHIM_UNDER_PEER, against: Against::Zero, limit: 450.0 },
];

/// All figures of a run.
#[derive(Clone, Debug, Default)]
pub struct Samples(BTreeMap<(&'static str, Column), Vec<f64>>);

impl Samples {
    /// Adds a figure.
    pub fn add(&mut self, metric: &'static str, column: Column, value: f64) {
        self.0.entry((metric, column)).or_default().push(value);
    }

    /// A percentile by the nearest rank; none without figures.
    pub fn percentile(&self, metric: &'static str, column: Column, percent: usize) -> Option<f64> {
        let mut values = self.0.get(&(metric, column))?.clone();
        values.sort_by(f64::total_cmp);
        let rank = (values.len() * percent).div_ceil(100).max(1);
        values.get(rank - 1).copied()
    }

    fn median(&self, metric: &'static str, column: Column) -> Option<f64> {
        self.percentile(metric, column, 50)
    }

    /// The table for people: medians, with the 90th percentile behind them.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<25} {:>4}  {:>17}  {:>17}  {:>17}  {:>7}  {:>7}\n",
            "p50 (p90)", "", FLOOR, HOLDFAST, CONTAINERD, "ratio", "p99"
        );
        for &(metric, unit) in METRICS {
            if !self.0.keys().any(|(name, _)| *name == metric) {
                continue;
            }
            let cell =
                |column| match (self.median(metric, column), self.percentile(metric, column, 90)) {
                    (Some(median), Some(high)) => format!("{} ({})", short(median), short(high)),
                    _ => "-".into(),
                };
            let ratio = match (self.median(metric, HOLDFAST), self.median(metric, CONTAINERD)) {
                (Some(ours), Some(theirs)) if ours > 0.0 => format!("{:.1}x", theirs / ours),
                _ => "-".into(),
            };
            let p99 = self
                .percentile(metric, HOLDFAST, 99)
                .map_or("-".into(), |value| format!("{value:.1}"));
            let _ = writeln!(
                text,
                "{metric:<25} {unit:>4}  {:>17}  {:>17}  {:>17}  {ratio:>7}  {p99:>7}",
                cell(FLOOR),
                cell(HOLDFAST),
                cell(CONTAINERD)
            );
        }
        text
    }

    /// Each bar that was measured: what it is about, what was seen, the limit, and whether it is met.
    fn verdicts(&self) -> Vec<(Bar, f64, Option<f64>)> {
        let seen = |bar: Bar, column| {
            let median = self.median(bar.metric, column)?;
            match bar.against {
                Against::Zero => Some(median),
                Against::Most => self.percentile(bar.metric, column, 100),
                Against::Floor => Some(median - self.median(bar.metric, FLOOR)?),
                Against::Times(other) => Some(median / self.median(bar.metric, other)?),
            }
        };
        BARS.iter()
            .copied()
            .filter_map(|bar| {
                let other = match bar.against {
                    Against::Times(CONTAINERD) => None,
                    _ => seen(bar, CONTAINERD),
                };
                Some((bar, seen(bar, HOLDFAST)?, other))
            })
            .collect()
    }

    /// The bars for people.
    pub fn bars(&self) -> String {
        let mut text = String::new();
        for (bar, seen, other) in self.verdicts() {
            let over = match bar.against {
                Against::Zero => String::new(),
                Against::Floor => " above the floor".to_owned(),
                Against::Times(other) => format!(" times {other}"),
                Against::Most => " at most".to_owned(),
            };
            let verdict = if seen <= bar.limit { "met" } else { "NOT MET" };
            let other = other.map_or(String::new(), |value| format!(" (containerd {value:.2})"));
            let _ = writeln!(
                text,
                "{:<25} {seen:>8.2}{over} <= {}: {verdict}{other}",
                bar.metric, bar.limit
            );
        }
        text
    }

    /// All of it for programs, with every single figure.
    pub fn json(&self) -> Value {
        let metrics: Vec<Value> = METRICS
            .iter()
            .filter_map(|&(metric, unit)| {
                let mut columns = serde_json::Map::new();
                for column in [FLOOR, HOLDFAST, CONTAINERD] {
                    let Some(values) = self.0.get(&(metric, column)) else { continue };
                    let at = |percent| self.percentile(metric, column, percent);
                    columns.insert(
                        column.into(),
                        json!({"p50": at(50), "p90": at(90), "p99": at(99), "samples": values}),
                    );
                }
                (!columns.is_empty())
                    .then(|| json!({"name": metric, "unit": unit, "columns": columns}))
            })
            .collect();
        let bars: Vec<Value> = self
            .verdicts()
            .into_iter()
            .map(|(bar, seen, other)| {
                json!({
                    "name": bar.metric,
                    "above_floor": matches!(bar.against, Against::Floor),
                    "times": match bar.against {
                        Against::Times(other) => Some(other),
                        Against::Zero | Against::Most | Against::Floor => None,
                    },
                    "limit": bar.limit,
                    "holdfast": seen,
                    "containerd": other,
                    "met": seen <= bar.limit,
                })
            })
            .collect();
        json!({"metrics": metrics, "bars": bars})
    }
}

/// With as many digits as there are worth showing.
fn short(value: f64) -> String {
    if value < 10.0 { format!("{value:.2}") } else { format!("{value:.1}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Samples {
        let mut samples = Samples::default();
        for value in 1..=10 {
            samples.add(EXEC, HOLDFAST, f64::from(value) + 2.0);
            samples.add(EXEC, FLOOR, f64::from(value));
        }
        samples
    }

    #[test]
    fn percentiles_are_by_the_nearest_rank() {
        let samples = some();
        assert_eq!(samples.percentile(EXEC, FLOOR, 50), Some(5.0));
        assert_eq!(samples.percentile(EXEC, FLOOR, 90), Some(9.0));
        assert_eq!(samples.percentile(EXEC, FLOOR, 99), Some(10.0));
        assert_eq!(samples.percentile(STOP, FLOOR, 50), None);
    }

    #[test]
    fn a_bar_is_about_what_is_above_the_floor() {
        let mut samples = some();
        assert_eq!(samples.json()["bars"][0]["met"], true);
        for _ in 0..20 {
            samples.add(EXEC, HOLDFAST, 9.0);
        }
        assert_eq!(samples.json()["bars"][0]["met"], false);
        assert!(samples.bars().contains("NOT MET"), "{}", samples.bars());
    }

    #[test]
    fn a_bar_may_be_a_part_of_what_the_other_takes() {
        let mut samples = Samples::default();
        samples.add(PULL_TEN, HOLDFAST, 45.0);
        // Not measured: nothing is said.
        assert!(samples.bars().is_empty());
        samples.add(PULL_TEN, CONTAINERD, 100.0);
        assert!(samples.bars().contains("0.45 times containerd <= 0.5: met"), "{}", samples.bars());
        samples.add(PULL_40, HOLDFAST, 45.0);
        samples.add(PULL_40, CONTAINERD, 100.0);
        assert!(samples.bars().contains("0.45 times containerd <= 0.4: NOT"), "{}", samples.bars());
    }
}

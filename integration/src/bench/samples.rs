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
/// Ten layers of 16 MiB, gzip.
pub const PULL: &str = "PullImage, 10 layers";
/// The daemon's CPU time for an event and what it tells of, without subscribers.
pub const EVENT: &str = "CPU per event";
/// The same with ten subscribers.
pub const EVENT_TEN: &str = "CPU per event, 10 subs";
/// From the start of the daemon to the first complete lists.
pub const RESTART: &str = "Restart, 30 pods";
/// PSS of a shim.
pub const SHIM: &str = "Shim PSS per pod";
/// That and what the daemon grew by.
pub const POD_MEMORY: &str = "Shim + daemon per pod";

/// In the order of the table, with their units.
const METRICS: [(&str, &str); 17] = [
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
    (PULL, "ms"),
    (EVENT, "µs"),
    (EVENT_TEN, "µs"),
    (RESTART, "ms"),
    (SHIM, "KiB"),
    (POD_MEMORY, "KiB"),
];

const BARS: [Bar; 8] = [
    Bar { metric: RUN_POD, against: Against::Floor, limit: 10.0 },
    Bar { metric: CREATE_START, against: Against::Floor, limit: 6.0 },
    Bar { metric: STOP, against: Against::Zero, limit: 15.0 },
    Bar { metric: EXEC, against: Against::Floor, limit: 3.0 },
    Bar { metric: LIST, against: Against::Zero, limit: 3.0 },
    Bar { metric: RESTART, against: Against::Zero, limit: 150.0 },
    Bar { metric: SHIM, against: Against::Zero, limit: 450.0 },
    Bar { metric: POD_MEMORY, against: Against::Zero, limit: 650.0 },
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
            "{:<22} {:>4}  {:>17}  {:>17}  {:>17}  {:>7}  {:>7}\n",
            "p50 (p90)", "", FLOOR, HOLDFAST, CONTAINERD, "ratio", "p99"
        );
        for (metric, unit) in METRICS {
            if !self.0.keys().any(|(name, _)| *name == metric) {
                continue;
            }
            let cell =
                |column| match (self.median(metric, column), self.percentile(metric, column, 90)) {
                    (Some(median), Some(high)) => format!("{median:.1} ({high:.1})"),
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
                "{metric:<22} {unit:>4}  {:>17}  {:>17}  {:>17}  {ratio:>7}  {p99:>7}",
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
                Against::Floor => Some(median - self.median(bar.metric, FLOOR)?),
            }
        };
        BARS.into_iter()
            .filter_map(|bar| Some((bar, seen(bar, HOLDFAST)?, seen(bar, CONTAINERD))))
            .collect()
    }

    /// The bars for people.
    pub fn bars(&self) -> String {
        let mut text = String::new();
        for (bar, seen, other) in self.verdicts() {
            let over = match bar.against {
                Against::Zero => "",
                Against::Floor => " above the floor",
            };
            let verdict = if seen <= bar.limit { "met" } else { "NOT MET" };
            let other = other.map_or(String::new(), |value| format!(" (containerd {value:.1})"));
            let _ = writeln!(
                text,
                "{:<22} {seen:>8.1}{over} <= {}: {verdict}{other}",
                bar.metric, bar.limit
            );
        }
        text
    }

    /// All of it for programs, with every single figure.
    pub fn json(&self) -> Value {
        let metrics: Vec<Value> = METRICS
            .into_iter()
            .filter_map(|(metric, unit)| {
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
}

//! What the daemon measures of itself, for Prometheus. Metrics of pods and containers are the CRI's
//! (`cri/metrics.rs`).
//!
//! Counters and histograms are here for everybody to count with: [`counts`]. What can be looked up
//! (how many pods there are, how long a queue is) is looked up when somebody scrapes: `scrape`.
//! `http` is the endpoint, `rpc` counts requests. Nothing in here blocks or fails.

mod http;
mod process;
mod rpc;
mod scrape;

use std::{
    borrow::Cow,
    sync::LazyLock,
    time::{Duration, Instant},
};

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Metric, Registry, Unit},
};

pub(crate) use self::{
    http::{bind, serve},
    rpc::Counted,
};
use crate::{error::Kind, pod::Pods};

/// Labels of a metric, in order.
pub(crate) type Labels<const N: usize> = [(&'static str, Cow<'static, str>); N];

/// Durations by labels.
pub(crate) type Durations<const N: usize> = Family<Labels<N>, Histogram, fn() -> Histogram>;

/// Everything that is counted.
pub(crate) struct Counts {
    /// By service, method and gRPC code.
    pub(crate) requests: Family<Labels<3>, Counter>,
    /// By service and method.
    pub(crate) request_seconds: Durations<2>,
    /// By service and method.
    pub(crate) requests_in_flight: Family<Labels<2>, Gauge>,
    /// By result.
    pub(crate) pulls: Family<Labels<1>, Counter>,
    pub(crate) pull_seconds: Histogram,
    pub(crate) pulls_in_flight: Gauge,
    pub(crate) pull_bytes: Counter,
    /// By result.
    pub(crate) shim_starts: Family<Labels<1>, Counter>,
    pub(crate) shim_start_seconds: Histogram,
    pub(crate) shims_lost: Counter,
    /// By call and result.
    pub(crate) shim_calls: Family<Labels<2>, Counter>,
    /// By call.
    pub(crate) shim_call_seconds: Durations<1>,
    /// By operation and result.
    pub(crate) network_operations: Family<Labels<2>, Counter>,
    /// By operation.
    pub(crate) network_seconds: Durations<1>,
    /// By reason.
    pub(crate) container_exits: Family<Labels<1>, Counter>,
    pub(crate) container_restarts: Counter,
    pub(crate) store_jobs: Counter,
    pub(crate) store_commits: Counter,
    pub(crate) store_commit_failures: Counter,
    pub(crate) store_commit_seconds: Histogram,
    pub(crate) events: Counter,
    pub(crate) event_subscribers: Gauge,
    pub(crate) event_resyncs: Counter,
}

/// The counts of this process.
pub(crate) fn counts() -> &'static Counts {
    static COUNTS: LazyLock<Counts> = LazyLock::new(Counts::new);
    &COUNTS
}

/// From a millisecond to five minutes.
fn durations() -> Histogram {
    Histogram::new([
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
        120.0, 300.0,
    ])
}

impl Counts {
    fn new() -> Self {
        Self {
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(durations),
            requests_in_flight: Family::default(),
            pulls: Family::default(),
            pull_seconds: durations(),
            pulls_in_flight: Gauge::default(),
            pull_bytes: Counter::default(),
            shim_starts: Family::default(),
            shim_start_seconds: durations(),
            shims_lost: Counter::default(),
            shim_calls: Family::default(),
            shim_call_seconds: Family::new_with_constructor(durations),
            network_operations: Family::default(),
            network_seconds: Family::new_with_constructor(durations),
            container_exits: Family::default(),
            container_restarts: Counter::default(),
            store_jobs: Counter::default(),
            store_commits: Counter::default(),
            store_commit_failures: Counter::default(),
            store_commit_seconds: durations(),
            events: Counter::default(),
            event_subscribers: Gauge::default(),
            event_resyncs: Counter::default(),
        }
    }

    /// A call of a shim that has ended.
    pub(crate) fn shim_call(&self, call: &'static str, took: Duration, result: &'static str) {
        self.shim_call_seconds.get_or_create(&[("call", call.into())]).observe(took.as_secs_f64());
        self.shim_calls.get_or_create(&[("call", call.into()), ("result", result.into())]).inc();
    }

    /// A network operation that has ended.
    pub(crate) fn network(&self, operation: &'static str, since: Instant, result: &'static str) {
        let took = since.elapsed().as_secs_f64();
        self.network_seconds.get_or_create(&[("operation", operation.into())]).observe(took);
        let labels = [("operation", operation.into()), ("result", result.into())];
        self.network_operations.get_or_create(&labels).inc();
    }

    /// A shim that was, or was not, started.
    pub(crate) fn shim_start(&self, since: Instant, result: &'static str) {
        self.shim_start_seconds.observe(since.elapsed().as_secs_f64());
        self.shim_starts.get_or_create(&[("result", result.into())]).inc();
    }
}

/// A pull under way, until it is dropped.
pub(crate) struct Pull(Instant, &'static str);

impl Pull {
    pub(crate) fn begin() -> Self {
        counts().pulls_in_flight.inc();
        Self(Instant::now(), "cancelled")
    }

    pub(crate) fn end(mut self, result: &'static str) {
        self.1 = result;
    }
}

impl Drop for Pull {
    fn drop(&mut self) {
        let counts = counts();
        counts.pulls_in_flight.dec();
        counts.pull_seconds.observe(self.0.elapsed().as_secs_f64());
        counts.pulls.get_or_create(&[("result", self.1.into())]).inc();
    }
}

/// A client that watches events, until it is dropped.
pub(crate) struct Watching(());

impl Watching {
    pub(crate) fn begin() -> Self {
        counts().event_subscribers.inc();
        Self(())
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        counts().event_subscribers.dec();
    }
}

/// What a label says of a result.
pub(crate) fn outcome<T, E>(result: &Result<T, E>, kind: impl Fn(&E) -> Kind) -> &'static str {
    match result.as_ref().map_err(kind) {
        Ok(_) => "ok",
        Err(Kind::Invalid) => "invalid",
        Err(Kind::NotFound) => "not_found",
        Err(Kind::Deadline) => "deadline",
        Err(Kind::Unavailable) => "unavailable",
        Err(Kind::Exhausted) => "exhausted",
        Err(_) => "error",
    }
}

fn in_seconds(all: &mut Registry, name: &str, help: &str, metric: &(impl Metric + Clone)) {
    all.register_with_unit(name, help, Unit::Seconds, metric.clone());
}

/// Everything there is to scrape.
pub(crate) fn registry(pods: Pods) -> Registry {
    let counts = counts();
    let mut all = Registry::default();
    all.register("holdfast_grpc_requests", "Requests that have ended", counts.requests.clone());
    let help = "How long requests took; of a stream: how long it was open";
    in_seconds(&mut all, "holdfast_grpc_request_duration", help, &counts.request_seconds);
    all.register(
        "holdfast_grpc_requests_in_flight",
        "Requests under way, streams included",
        counts.requests_in_flight.clone(),
    );
    all.register("holdfast_image_pulls", "Pulls that have ended", counts.pulls.clone());
    let help = "How long pulls took";
    in_seconds(&mut all, "holdfast_image_pull_duration", help, &counts.pull_seconds);
    let help = "Pulls under way";
    all.register("holdfast_image_pulls_in_flight", help, counts.pulls_in_flight.clone());
    all.register_with_unit(
        "holdfast_image_pull_received",
        "Compressed bytes of layers received from registries",
        Unit::Bytes,
        counts.pull_bytes.clone(),
    );
    all.register("holdfast_shim_starts", "Shims started, or not", counts.shim_starts.clone());
    let help = "How long it took to start a shim and to connect to it";
    in_seconds(&mut all, "holdfast_shim_start_duration", help, &counts.shim_start_seconds);
    all.register("holdfast_shims_lost", "Shims found dead", counts.shims_lost.clone());
    all.register("holdfast_shim_calls", "Calls of shims", counts.shim_calls.clone());
    let help = "How long calls of shims took";
    in_seconds(&mut all, "holdfast_shim_call_duration", help, &counts.shim_call_seconds);
    all.register(
        "holdfast_network_operations",
        "Network attachments made, taken away and checked",
        counts.network_operations.clone(),
    );
    let help = "How long network operations took";
    in_seconds(&mut all, "holdfast_network_operation_duration", help, &counts.network_seconds);
    let help = "Containers that ended, by reason";
    all.register("holdfast_container_exits", help, counts.container_exits.clone());
    let help = "Containers made in place of one that ended";
    all.register("holdfast_container_restarts", help, counts.container_restarts.clone());
    all.register("holdfast_store_jobs", "Jobs of the database", counts.store_jobs.clone());
    let help = "Commits of the database; jobs that wait together share one";
    all.register("holdfast_store_commits", help, counts.store_commits.clone());
    let help = "Commits that went wrong";
    all.register("holdfast_store_commit_failures", help, counts.store_commit_failures.clone());
    let help = "How long commits took, with their jobs";
    in_seconds(&mut all, "holdfast_store_commit_duration", help, &counts.store_commit_seconds);
    all.register("holdfast_events", "Changes of pods and containers told", counts.events.clone());
    let help = "Clients that watch changes of pods and containers";
    all.register("holdfast_event_subscribers", help, counts.event_subscribers.clone());
    let help = "How often a slow subscriber was brought up to date";
    all.register("holdfast_event_resyncs", help, counts.event_resyncs.clone());
    all.register_collector(Box::new(scrape::Node(pods)));
    all.register_collector(Box::new(process::Process));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_told_in_few_words() {
        let kind = |_: &()| Kind::NotFound;
        assert_eq!(outcome(&Ok::<_, ()>(1), kind), "ok");
        assert_eq!(outcome(&Err::<u8, _>(()), kind), "not_found");
        assert_eq!(outcome(&Err::<u8, _>(()), |()| Kind::Internal), "error");
    }

    #[test]
    fn a_pull_that_is_dropped_is_cancelled() {
        let cancelled =
            || counts().pulls.get_or_create_owned(&[("result", "cancelled".into())]).get();
        let before = cancelled();
        drop(Pull::begin());
        assert_eq!(cancelled(), before + 1);
        Pull::begin().end("ok");
        assert_eq!(cancelled(), before + 1);
        assert_eq!(counts().pulls_in_flight.get(), 0);
    }
}

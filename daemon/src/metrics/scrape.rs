//! What is looked up when somebody scrapes: pods, containers, shims, images, queues. No I/O, and
//! nobody is waited for.

use std::{collections::BTreeMap, fmt};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::gauge::ConstGauge,
};

use crate::pod::{Pods, state::PodState};

/// All pods and what they are made from.
pub(super) struct Node(pub(super) Pods);

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").finish_non_exhaustive()
    }
}

impl Collector for Node {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let services = self.0.services();
        let mut pods = BTreeMap::from([("ready", 0), ("not_ready", 0)]);
        let mut containers =
            BTreeMap::from([("creating", 0), ("created", 0), ("running", 0), ("exited", 0)]);
        for pod in self.0.list() {
            let state = match pod.record.state {
                PodState::Ready => "ready",
                PodState::Starting | PodState::NotReady => "not_ready",
            };
            *pods.entry(state).or_default() += 1;
            for container in pod.containers.values() {
                *containers.entry(container.record.state.name()).or_default() += 1;
            }
        }
        let (shims, queued) = self.0.load();
        by(&mut encoder, "holdfast_pods", "Pods", "state", &pods)?;
        by(&mut encoder, "holdfast_containers", "Containers", "state", &containers)?;
        by(&mut encoder, "holdfast_shims", "Connections to shims of ready pods", "state", &shims)?;
        let usage = services.images.fs_usage();
        let one = |encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64| {
            let metric = ConstGauge::new(value as f64);
            let encoder = encoder.encode_descriptor(name, help, None, metric.metric_type())?;
            metric.encode(encoder)
        };
        let help = "Commands that wait for their pod's owner";
        one(&mut encoder, "holdfast_pod_commands_queued", help, queued)?;
        let help = "Jobs that wait for the database";
        one(&mut encoder, "holdfast_store_jobs_queued", help, services.store.queued() as u64)?;
        let images = services.images.list().len() as u64;
        one(&mut encoder, "holdfast_images", "Images", images)?;
        let help = "Size of image layers on disk";
        one(&mut encoder, "holdfast_image_layers_bytes", help, usage.used_bytes)?;
        let labels = [("version", env!("CARGO_PKG_VERSION"))];
        let metric = ConstGauge::new(1.0);
        let help = "1; the labels say which build this is";
        let mut descriptor =
            encoder.encode_descriptor("holdfast_build_info", help, None, metric.metric_type())?;
        metric.encode(descriptor.encode_family(&labels)?)
    }
}

fn by(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &'static str,
    values: &BTreeMap<&'static str, u64>,
) -> Result<(), fmt::Error> {
    let metric_type = ConstGauge::new(0.0).metric_type();
    let mut descriptor = encoder.encode_descriptor(name, help, None, metric_type)?;
    for (value, count) in values {
        let labels = [(label, *value)];
        ConstGauge::new(*count as f64).encode(descriptor.encode_family(&labels)?)?;
    }
    Ok(())
}

//! Streams of containers that other shims run in this pod.
//!
//! Such a shim writes to FIFOs, as the shim contract has it. We hold them, write the CRI log and serve
//! attach, as for our own containers: so neither a restart of the daemon nor one of the other shim
//! loses a byte, or makes the workload wait.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use crate::{
    control,
    process::lock,
    stdio::{self, Io},
};

/// How long the end of the streams is waited for, once the other shim should have let go of them.
const DRAIN: Duration = Duration::from_secs(2);

/// Streams of one container.
pub(crate) struct Relay {
    asked: control::Relay,
    io: Mutex<Io>,
}

impl Relay {
    pub(crate) fn with_io<T>(&self, f: impl FnOnce(&mut Io) -> T) -> T {
        f(&mut lock(&self.io))
    }
}

/// All of them, by container id.
#[derive(Default)]
pub(crate) struct Relays(Mutex<BTreeMap<String, Arc<Relay>>>);

impl Relays {
    pub(crate) fn find(&self, id: &str) -> Option<Arc<Relay>> {
        lock(&self.0).get(id).cloned()
    }

    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.0).is_empty()
    }

    /// What was asked for, to be begun again by a shim after this one.
    pub(crate) fn asked(&self) -> Vec<control::Relay> {
        lock(&self.0).values().map(|relay| relay.asked.clone()).collect()
    }

    /// Begins; a second request for a container is fine. `crashed`: after a shim that was killed.
    pub(crate) async fn begin(&self, relay: &control::Relay, crashed: bool) -> io::Result<()> {
        if self.find(&relay.container).is_some() {
            return Ok(());
        }
        let io = Io::relay(relay, crashed).await?;
        let new = Arc::new(Relay { asked: relay.clone(), io: Mutex::new(io) });
        lock(&self.0).entry(relay.container.clone()).or_insert(new);
        Ok(())
    }

    /// Passes on what is left, and forgets the container. One that is not known is fine.
    pub(crate) async fn settle(&self, id: &str) {
        let Some(relay) = self.find(id) else { return };
        // Our own ends: without them the streams end when the other shim's are closed.
        drop(relay.with_io(Io::take_given));
        let pumps = relay.with_io(|io| std::mem::take(io.pumps()));
        for late in stdio::drain(pumps, DRAIN).await {
            late.abort();
        }
        lock(&self.0).remove(id);
        if let Some(outputs) = relay.with_io(|io| io.outputs.take()) {
            outputs.finish();
        }
        relay.with_io(Io::close_stdin);
    }
}

//! Sizes of writable layers. To find one out is to walk the layer, so it is done beside requests, by
//! one thread at a time, and believed for a while: the longer the walk took, the longer.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant, SystemTime},
};

use tracing::debug;

use crate::{id::ContainerId, image::Images};

/// How long a size is believed at least.
const AGE: Duration = Duration::from_secs(30);

/// A walk may take this part of the time: a layer of millions of files is walked rarely.
const SHARE: u32 = 20;

/// How long a request waits, in all, for sizes that were never known.
const PATIENCE: Duration = Duration::from_millis(500);

/// A writable layer's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Bytes on disk.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
    /// When it was found out.
    pub at: SystemTime,
}

/// Sizes by container.
#[derive(Clone)]
pub(super) struct Layers(Arc<Shared>);

/// Bytes and inodes of a container's layer, by walking it.
type Walk = Box<dyn Fn(&ContainerId) -> Option<(u64, u64)> + Send + Sync>;

struct Shared {
    walk: Walk,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    known: HashMap<ContainerId, Known>,
    /// To walk.
    wanted: Vec<ContainerId>,
    queued: HashSet<ContainerId>,
    working: bool,
}

#[derive(Clone, Copy)]
struct Known {
    layer: Option<Layer>,
    until: Instant,
}

impl Layers {
    pub(super) fn new(images: Images) -> Self {
        Self::with(move |id| images.snapshot(id)?.usage().ok())
    }

    fn with(walk: impl Fn(&ContainerId) -> Option<(u64, u64)> + Send + Sync + 'static) -> Self {
        Self(Arc::new(Shared {
            walk: Box::new(walk),
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    /// The size of each, as far as it is known. Those that are out of date are found out beside; for
    /// those never known it waits a moment. Blocks.
    pub(super) fn sizes(&self, ids: &[ContainerId]) -> Vec<Option<Layer>> {
        let now = Instant::now();
        let mut state = self.0.lock();
        for id in ids {
            if state.known.get(id).is_none_or(|known| known.until <= now)
                && state.queued.insert(id.clone())
            {
                state.wanted.push(id.clone());
            }
        }
        if !state.wanted.is_empty() && !state.working {
            let shared = self.0.clone();
            // Without a thread there are no sizes this time.
            let started = thread::Builder::new().name("layer-sizes".into());
            state.working = started.spawn(move || shared.work()).is_ok();
        }
        let by = now + PATIENCE;
        while state.working && ids.iter().any(|id| !state.known.contains_key(id)) {
            let Some(left) = by.checked_duration_since(Instant::now()).filter(|d| !d.is_zero())
            else {
                break;
            };
            let waited = self.0.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(|e| e.into_inner()).0;
        }
        ids.iter().map(|id| state.known.get(id)?.layer).collect()
    }

    /// Forgets those that are not there any more.
    pub(super) fn retain(&self, live: impl Fn(&ContainerId) -> bool) {
        self.0.lock().known.retain(|id, _| live(id));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Walks what is wanted, then ends.
    fn work(&self) {
        loop {
            let id = {
                let mut state = self.lock();
                let Some(id) = state.wanted.pop() else {
                    state.working = false;
                    self.changed.notify_all();
                    return;
                };
                id
            };
            let started = Instant::now();
            let found = (self.walk)(&id);
            let took = started.elapsed();
            if took > Duration::from_secs(1) {
                debug!(container = id.short(), ?took, "a large writable layer was walked");
            }
            let layer = found.map(|(bytes, inodes)| Layer { bytes, inodes, at: SystemTime::now() });
            let until = Instant::now() + AGE.max(took * SHARE);
            let mut state = self.lock();
            state.queued.remove(&id);
            state.known.insert(id, Known { layer, until });
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    };

    use super::*;

    #[test]
    fn a_size_is_found_once_and_then_believed() {
        let walks = Arc::new(AtomicUsize::new(0));
        let counted = walks.clone();
        let layers = Layers::with(move |_| {
            counted.fetch_add(1, Ordering::Relaxed);
            Some((4096, 3))
        });
        let ids = [ContainerId::random(), ContainerId::random()];
        for _ in 0..3 {
            let sizes = layers.sizes(&ids);
            assert!(
                sizes.iter().all(|size| size.is_some_and(|s| (s.bytes, s.inodes) == (4096, 3)))
            );
        }
        assert_eq!(walks.load(Ordering::Relaxed), 2);
        layers.retain(|_| false);
        layers.sizes(&ids);
        assert_eq!(walks.load(Ordering::Relaxed), 4);
    }

    #[test]
    fn a_walk_that_takes_long_holds_nobody_up() {
        let (go, gate) = mpsc::channel::<()>();
        let gate = Mutex::new(gate);
        let layers = Layers::with(move |_| {
            gate.lock().unwrap().recv().ok()?;
            Some((1, 1))
        });
        let id = [ContainerId::random()];
        assert_eq!(layers.sizes(&id), [None]);
        go.send(()).unwrap();
        let by = Instant::now() + Duration::from_secs(20);
        while layers.sizes(&id)[0].is_none() {
            assert!(Instant::now() < by, "the size never came");
        }
    }

    #[test]
    fn a_layer_that_is_gone_has_no_size_and_is_not_walked_again_at_once() {
        let walks = Arc::new(AtomicUsize::new(0));
        let counted = walks.clone();
        let layers = Layers::with(move |_| {
            counted.fetch_add(1, Ordering::Relaxed);
            None
        });
        let id = [ContainerId::random()];
        assert_eq!(layers.sizes(&id), [None]);
        assert_eq!(layers.sizes(&id), [None]);
        assert_eq!(walks.load(Ordering::Relaxed), 1);
    }
}

//! What happened to pods and containers, for whoever watches.
//!
//! A change is sent without waiting for anybody. A subscriber that is too slow misses changes, and is
//! then brought up to date from the pods as they are: it may miss that a container ran for a moment,
//! but never how it ended, nor that it is gone.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::SystemTime,
};

use tokio::sync::broadcast::{self, error::RecvError};

use crate::pod::{
    PodView,
    state::{ContainerState, PodState},
};

/// Changes kept for slow subscribers. One that is further behind is brought up to date instead.
const KEPT: usize = 512;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Made.
    Created,
    /// Running; for a pod: ready.
    Started,
    /// Ended; for a pod: not ready any more.
    Stopped,
    /// Gone.
    Deleted,
}

/// A change of a container or of a pod itself.
#[derive(Clone, Debug)]
pub struct Event {
    /// A container's id; the pod's own for a change of the pod.
    pub id: String,
    /// What happened.
    pub kind: Kind,
    /// When it was recorded.
    pub at: SystemTime,
    /// The pod right after the change.
    pub pod: Arc<PodView>,
}

/// Where changes are sent and subscribed to.
#[derive(Debug)]
pub struct Events(broadcast::Sender<Event>);

impl Default for Events {
    fn default() -> Self {
        Self(broadcast::channel(KEPT).0)
    }
}

impl Events {
    /// Tells everybody who watches. Never waits.
    pub fn send(&self, id: impl Into<String>, kind: Kind, pod: Arc<PodView>) {
        crate::metrics::counts().events.inc();
        // No subscribers: nobody to tell.
        let _ = self.0.send(Event { id: id.into(), kind, at: SystemTime::now(), pod });
    }

    /// From now on. `list` gives all pods as they are, for when the subscriber has fallen behind.
    pub fn subscribe<L>(&self, list: L) -> Subscription<L>
    where
        L: Fn() -> Vec<Arc<PodView>>,
    {
        let mut known = BTreeMap::new();
        // Taken after the subscription has begun, so that no change falls between.
        let changes = self.0.subscribe();
        for (id, kind, pod) in states(&list()) {
            known.insert(id, Known { kind, pod });
        }
        Subscription { changes, list, known, late: VecDeque::new() }
    }
}

struct Known {
    kind: Kind,
    pod: Arc<PodView>,
}

/// One subscriber's place.
pub struct Subscription<L> {
    changes: broadcast::Receiver<Event>,
    list: L,
    /// What it was last told of each pod and container that is not gone.
    known: BTreeMap<String, Known>,
    /// What it is told to be up to date again.
    late: VecDeque<Event>,
}

impl<L: Fn() -> Vec<Arc<PodView>>> Subscription<L> {
    /// The next change; `None` when the daemon ends.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            let event = match self.late.pop_front() {
                Some(event) => event,
                None => match self.changes.recv().await {
                    Ok(event) => event,
                    Err(RecvError::Closed) => return None,
                    Err(RecvError::Lagged(_)) => {
                        crate::metrics::counts().event_resyncs.inc();
                        self.catch_up();
                        continue;
                    }
                },
            };
            // What it knows already: a change that was kept, but is older than the catching up.
            let known = self.known.get(&event.id).map(|known| known.kind);
            match event.kind {
                Kind::Deleted if known.is_none() => continue,
                Kind::Deleted => drop(self.known.remove(&event.id)),
                kind if known.is_some_and(|known| known >= kind) => continue,
                kind => {
                    let known = Known { kind, pod: event.pod.clone() };
                    self.known.insert(event.id.clone(), known);
                }
            }
            return Some(event);
        }
    }

    fn catch_up(&mut self) {
        // Begin anew behind the newest change, then look: what is seen is at least as new.
        self.changes = self.changes.resubscribe();
        let at = SystemTime::now();
        let now = states(&(self.list)());
        for (id, kind, pod) in &now {
            self.late.push_back(Event { id: id.clone(), kind: *kind, at, pod: pod.clone() });
        }
        let gone = self.known.iter().filter(|(id, _)| !now.iter().any(|(now, ..)| now == *id));
        for (id, known) in gone {
            let (id, pod) = (id.clone(), known.pod.clone());
            self.late.push_back(Event { id, kind: Kind::Deleted, at, pod });
        }
    }
}

/// Each pod and container, and the last thing that happened to it.
fn states(pods: &[Arc<PodView>]) -> Vec<(String, Kind, Arc<PodView>)> {
    let mut states = Vec::new();
    for pod in pods {
        let kind = match pod.record.state {
            PodState::Starting => continue,
            PodState::Ready => Kind::Started,
            PodState::NotReady => Kind::Stopped,
        };
        states.push((pod.record.id.to_string(), kind, pod.clone()));
        for (id, container) in &pod.containers {
            let kind = match container.record.state {
                ContainerState::Creating => continue,
                ContainerState::Created { .. } => Kind::Created,
                ContainerState::Running { .. } => Kind::Started,
                ContainerState::Exited { .. } => Kind::Stopped,
            };
            states.push((id.to_string(), kind, pod.clone()));
        }
    }
    states
}

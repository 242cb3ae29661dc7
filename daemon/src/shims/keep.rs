//! What shims lend: pidfds of their processes, read ends of output pipes, masters of terminals. Held
//! for nothing but to be given to the next shim, should one die: a terminal would hang up without
//! it, and the exit code of what ends in between would be nobody's.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use holdfast_shim::{
    client::{Client, ErrorKind},
    control::{Control, Kept},
};
use tracing::warn;

use super::Shims;
use crate::{error::chain, id::PodId};

/// How long a shim's last words are waited for. They are in our own socket when it is dead.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// By pod.
#[derive(Debug, Default)]
pub(super) struct Lent(Mutex<HashMap<PodId, Kept>>);

impl Lent {
    fn pods(&self) -> MutexGuard<'_, HashMap<PodId, Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Duplicates, so that giving them back can be tried again.
    pub(super) fn of(&self, id: &PodId) -> Kept {
        let pods = self.pods();
        let kept = pods.get(id).into_iter().flatten();
        kept.filter_map(|(name, fd)| Some((name.clone(), fd.try_clone().ok()?))).collect()
    }

    fn change(&self, id: &PodId, name: String, fd: Option<OwnedFd>) {
        let mut pods = self.pods();
        let kept = pods.entry(id.clone()).or_default();
        match fd {
            Some(fd) => drop(kept.insert(name, fd)),
            None => drop(kept.remove(&name)),
        }
    }

    fn forget(&self, id: &PodId) {
        self.pods().remove(id);
    }
}

impl Shims {
    /// Holds what a pod's shim lends, until the connection to it is gone.
    pub async fn hold(&self, id: &PodId, client: &Client) {
        let control = Control::new(&self.pod_bundle(id));
        // It tells all of it anew.
        self.lent.forget(id);
        let following = control.keep(|name, fd| self.lent.change(id, name, fd));
        tokio::pin!(following);
        let closed = client.closed();
        tokio::pin!(closed);
        tokio::select! {
            biased;
            ended = &mut following => {
                match ended {
                    Ok(()) => {}
                    // Of a release before it could, or somebody else's.
                    Err(error) if matches!(
                        error.kind(),
                        ErrorKind::Invalid | ErrorKind::Unimplemented | ErrorKind::Closed
                    ) => {}
                    Err(error) => warn!(
                        pod = id.short(),
                        error = %chain(&error),
                        "not all that the shim lends can be held; if it dies, its pod may end"
                    ),
                }
                closed.await;
            }
            () = &mut closed => drop(tokio::time::timeout(LAST_WORDS, following).await),
        }
    }

    /// Lets go of what a pod's shim has lent: the pod is not to be revived.
    pub fn let_go(&self, id: &PodId) {
        self.lent.forget(id);
    }
}

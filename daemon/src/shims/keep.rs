//! What shims lend: pidfds of their processes, read ends of output pipes, masters of terminals. Held
//! for nothing but to be given to the next shim, should one die: a terminal would hang up without
//! it, and the exit code of what ends in between would be nobody's.

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use holdfast_shim::{
    client::{Client, ErrorKind},
    control::{Control, Kept, Loan},
};
use tracing::warn;

use super::Shims;
use crate::{error::chain, id::PodId};

/// How long a shim's last words are waited for. They are in our own socket when it is dead.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// By pod.
#[derive(Debug, Default)]
pub(super) struct Lent(Mutex<HashMap<PodId, BTreeMap<String, Held>>>);

#[derive(Debug)]
struct Held {
    fd: OwnedFd,
    /// A shim before lent it, and the one that is there has not yet lent it again. Should that die first,
    /// this is the only one.
    inherited: bool,
}

impl Lent {
    fn pods(&self) -> MutexGuard<'_, HashMap<PodId, BTreeMap<String, Held>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Duplicates, so that giving them back can be tried again.
    pub(super) fn of(&self, id: &PodId) -> Kept {
        let pods = self.pods();
        let held = pods.get(id).into_iter().flatten();
        held.filter_map(|(name, held)| Some((name.clone(), held.fd.try_clone().ok()?))).collect()
    }

    /// A shim begins to lend.
    fn begin(&self, id: &PodId) {
        for held in self.pods().get_mut(id).into_iter().flat_map(BTreeMap::values_mut) {
            held.inherited = true;
        }
    }

    fn change(&self, id: &PodId, loan: Loan) {
        let mut pods = self.pods();
        let held = pods.entry(id.clone()).or_default();
        match loan {
            Loan::Keep(name, fd) => drop(held.insert(name, Held { fd, inherited: false })),
            Loan::Drop(name) => drop(held.remove(&name)),
            Loan::All => held.retain(|_, held| !held.inherited),
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
        self.lent.begin(id);
        let following = control.keep(|loan| self.lent.change(id, loan));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn names(lent: &Lent, id: &PodId) -> Vec<String> {
        lent.of(id).into_keys().collect()
    }

    #[test]
    fn what_one_shim_lent_is_held_until_the_next_has_lent_all() {
        let (lent, id) = (Lent::default(), PodId::random());
        let fd = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let keep = |name: &str| lent.change(&id, Loan::Keep(name.to_owned(), fd()));
        lent.begin(&id);
        keep("terminal");
        keep("ended");
        lent.change(&id, Loan::All);

        // Two that die, one at once, and one in the middle of it.
        lent.begin(&id);
        lent.begin(&id);
        keep("new");
        assert_eq!(names(&lent, &id), ["ended", "new", "terminal"]);

        lent.begin(&id);
        keep("terminal");
        keep("late");
        lent.change(&id, Loan::Drop("late".to_owned()));
        assert_eq!(names(&lent, &id), ["ended", "new", "terminal"]);
        lent.change(&id, Loan::All);
        assert_eq!(names(&lent, &id), ["terminal"]);

        lent.forget(&id);
        assert!(names(&lent, &id).is_empty());
    }
}

//! New code for shims that run. See `holdfast-shim`'s `handover`.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream};
use holdfast_shim::{client::ErrorKind, control::Control};
use tracing::info;

use super::{Error, Pod, Pods, Services, task};
use crate::{id::PodId, shims::Link};

/// How long a shim may take. It waits itself for what is under way, and gives up before this.
const DEADLINE: Duration = Duration::from_secs(25);

/// How many at a time.
const AT_ONCE: usize = 4;

/// What became of one pod's shim.
pub struct Upgrade {
    /// Its pod.
    pub id: PodId,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// Whether it was replaced, or runs that file already; or why it goes on as it is.
    pub outcome: Result<bool, Arc<Error>>,
}

impl Pods {
    /// Replaces the code of every running shim by that of `binary`, else of the configured one; of
    /// those that run that very file only with `force`. In the order of the pods' names.
    ///
    /// # Errors
    /// There is no such binary.
    pub async fn upgrade_shims(
        &self,
        binary: Option<PathBuf>,
        force: bool,
    ) -> Result<Vec<Upgrade>, Error> {
        let asked = binary.unwrap_or_else(|| self.services.config.runtime.shim.clone());
        let found = crate::config::find_program(&asked).filter(|path| path.is_absolute());
        let binary = found.ok_or_else(|| Error::NoShimBinary(asked.clone()))?;
        // Not a name that leads elsewhere tomorrow.
        let binary = fs::canonicalize(&binary).map_err(super::io_at("look at", &binary))?;
        let pods: Vec<Pod> = self.index().pods.values().cloned().collect();
        let running = pods.into_iter().filter(|pod| !matches!(*pod.link.borrow(), Link::Down));
        let mut upgrades: Vec<Upgrade> = stream::iter(running)
            .map(|pod| {
                let binary = binary.clone();
                async move {
                    let outcome = match !force && runs(&self.services, pod.id(), &binary) {
                        true => Ok(false),
                        false => pod.ask(task::Request::Upgrade { binary }).await.map(|_| true),
                    };
                    let config = &pod.view().record.config;
                    let (namespace, name) = (config.namespace.clone(), config.name.clone());
                    Upgrade { id: pod.id.clone(), namespace, name, outcome }
                }
            })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        upgrades.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        Ok(upgrades)
    }
}

/// Whether the pod's shim runs that very file.
fn runs(services: &Services, id: &PodId, binary: &Path) -> bool {
    let pid = fs::read_to_string(services.shims.pod_bundle(id).shim_pid()).unwrap_or_default();
    let file = |path: &Path| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let running = file(Path::new(&format!("/proc/{}/exe", pid.trim())));
    running.is_some() && running == file(binary)
}

/// Has one shim replace its code; comes back when it can be reached again.
pub(super) async fn upgrade(
    services: Arc<Services>,
    pod: Pod,
    binary: PathBuf,
) -> Result<task::Effect, Error> {
    let client = pod.client().await?;
    let control = Control::new(&services.shims.pod_bundle(&pod.id));
    let shim = |source| Error::Shim { what: "upgrade the shim", id: pod.id.clone(), source };
    match control.upgrade(&binary, DEADLINE).await {
        Ok(()) => {}
        Err(error) if matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Unimplemented) => {
            return Err(Error::OldShim(pod.id.clone()));
        }
        Err(source) => return Err(shim(source)),
    }
    pod.client_of(&client).await?;
    info!(binary = %binary.display(), "the shim has new code");
    Ok(task::Effect::Done)
}

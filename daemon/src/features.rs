//! What each configured OCI runtime says of itself, asked once at start-up.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::process::Command;
use tracing::{info, warn};

use crate::{
    config::{Handler, Runtime, find_program},
    error::chain,
    spec::RuntimeFeatures,
};

/// How long `features` may take.
const ASK: Duration = Duration::from_secs(10);

/// Features by the runtime's path as it is configured.
#[derive(Clone, Debug, Default)]
pub struct Features(HashMap<PathBuf, RuntimeFeatures>);

impl Features {
    /// Asks every OCI runtime of the configuration. One that has no such command, or is not
    /// installed, is taken to be of OCI 1.0.2.
    pub async fn discover(runtime: &Runtime) -> Self {
        let paths = runtime.handlers.values().filter_map(|handler| match handler {
            Handler::Oci { path, .. } => Some(path.clone()),
            Handler::Foreign { .. } => None,
        });
        let asked = paths.map(|path| async move {
            let features = ask(&path).await;
            (path, features)
        });
        Self(futures::future::join_all(asked).await.into_iter().collect())
    }

    /// Those of one runtime.
    pub fn of(&self, path: &Path) -> RuntimeFeatures {
        self.0.get(path).cloned().unwrap_or_default()
    }
}

async fn ask(path: &Path) -> RuntimeFeatures {
    let Some(program) = find_program(path) else {
        info!(runtime = %path.display(), "OCI runtime is not installed");
        return RuntimeFeatures::default();
    };
    let output = Command::new(&program).arg("features").kill_on_drop(true).output();
    match tokio::time::timeout(ASK, output).await {
        Ok(Ok(output)) if output.status.success() => RuntimeFeatures::parse(&output.stdout)
            .unwrap_or_else(|error| {
                warn!(runtime = %path.display(), error = %chain(&error), "its features are not understood");
                RuntimeFeatures::default()
            }),
        Ok(Ok(_)) => RuntimeFeatures::default(),
        Ok(Err(error)) => {
            warn!(runtime = %program.display(), %error, "it cannot be run");
            RuntimeFeatures::default()
        }
        Err(_) => {
            warn!(runtime = %program.display(), "it did not say its features within {ASK:?}");
            RuntimeFeatures::default()
        }
    }
}

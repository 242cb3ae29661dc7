//! What each configured OCI runtime says of itself, asked once at start-up.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::process::Command;
use tracing::{info, warn};

use crate::{
    config::{ForeignHandler, Handler, Runtime, find_program},
    error::chain,
    spec::RuntimeFeatures,
};

/// How long `features` may take.
const ASK: Duration = Duration::from_secs(10);

/// Features by the runtime's path as it is configured.
#[derive(Clone, Debug, Default)]
pub struct Features(HashMap<PathBuf, RuntimeFeatures>);

impl Features {
    /// Asks every OCI runtime of the configuration, and every foreign shim that has one of its own.
    /// One that has no such command, or is not installed, is taken to be of OCI 1.0.2.
    pub async fn discover(runtime: &Runtime) -> Self {
        let asked = runtime.handlers.values().map(|handler| async move {
            let features = match handler {
                Handler::Foreign(foreign) if foreign.path.is_none() => ask_shim(foreign).await,
                _ => ask(handler.runtime()).await,
            };
            (handler.runtime().to_owned(), features)
        });
        Self(futures::future::join_all(asked).await.into_iter().collect())
    }

    /// Those of one runtime.
    pub fn of(&self, path: &Path) -> RuntimeFeatures {
        self.0.get(path).cloned().unwrap_or_default()
    }
}

/// What a shim's `-info` says of its runtime. Shims before containerd 2.0 have no such action.
async fn ask_shim(handler: &ForeignHandler) -> RuntimeFeatures {
    let Some(binary) = find_program(&handler.shim) else {
        info!(shim = %handler.shim.display(), "shim is not installed");
        return RuntimeFeatures::default();
    };
    let command = holdfast_shim::client::Command {
        binary,
        namespace: crate::shims::NAMESPACE.into(),
        id: "info".into(),
        options: crate::shims::foreign::shim_options(handler),
        ..Default::default()
    };
    match command.info(ASK).await {
        Ok(info) => {
            info!(shim = %handler.shim.display(), name = info.name, version = info.version, "shim");
            let features = info.features.and_then(|json| RuntimeFeatures::parse(&json).ok());
            features.unwrap_or_default()
        }
        Err(error) => {
            info!(error = %chain(&error), "the shim does not say what it can do");
            RuntimeFeatures::default()
        }
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

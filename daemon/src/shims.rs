//! Live shims: how one is started and reached, and the socket where they report events.
//!
//! Owns the events listener and the connections. What an event means is the pod's business. Shims of
//! others are in [`foreign`].

pub mod foreign;

mod keep;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use holdfast_protos::shim::{
    oci::Options,
    protobuf::{Message as _, well_known_types::any::Any},
};
use holdfast_shim::{
    bundle::Bundle,
    client::{self, Client, Command, Endpoint, ErrorKind},
    control::Control,
};
use tokio::time::Instant;

use crate::{
    config::Config,
    id::{ContainerId, PodId},
};

/// The containerd namespace of everything we make: what Kubernetes' other tools look into.
pub const NAMESPACE: &str = "k8s.io";

/// How long a shim may take to answer a first connection.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a new shim may take to take over what a dead one had.
const ADOPT: Duration = Duration::from_secs(30);
/// How long `shim start` and `shim delete` may take.
const BINARY: Duration = Duration::from_secs(30);

/// Where shims are, and how to start one.
#[derive(Debug)]
pub struct Shims {
    binary: PathBuf,
    bundles: PathBuf,
    sockets: PathBuf,
    /// Where shims send events.
    pub events: PathBuf,
    grpc: PathBuf,
    runtime_root: PathBuf,
    systemd: bool,
    timeout: Duration,
    debug: bool,
    lent: keep::Lent,
    foreign: foreign::Foreign,
}

impl Shims {
    /// By the configuration; makes the directories.
    pub fn new(config: &Config) -> std::io::Result<Self> {
        let shims = Self {
            binary: config.runtime.shim.clone(),
            bundles: config.state.join("bundles"),
            sockets: config.state.join("s"),
            events: config.state.join("events.sock"),
            grpc: config.grpc.socket.clone(),
            runtime_root: config.state.join("runtime"),
            systemd: config.runtime.cgroup_driver == crate::config::CgroupDriver::Systemd,
            timeout: config.runtime.timeout,
            debug: config.log.level.contains("debug") || config.log.level.contains("trace"),
            lent: keep::Lent::default(),
            foreign: foreign::Foreign::default(),
        };
        passable_dir(&shims.bundles)?;
        for dir in [&shims.sockets, &shims.runtime_root] {
            private_dir(dir)?;
        }
        Ok(shims)
    }

    /// Our own shim's binary.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// Where bundles are: one directory per pod and per container, named by its id.
    pub fn bundles(&self) -> &Path {
        &self.bundles
    }

    /// A pod's bundle.
    pub fn pod_bundle(&self, id: &PodId) -> Bundle {
        Bundle::new(self.bundles.join(id))
    }

    /// A container's bundle.
    pub fn container_bundle(&self, id: &ContainerId) -> Bundle {
        Bundle::new(self.bundles.join(id))
    }

    /// `containerd.runc.v1.Options` for a container under an OCI command line.
    pub fn runtime_options(&self, runtime: &Path) -> Any {
        packed(&self.options(runtime))
    }

    fn options(&self, runtime: &Path) -> Options {
        Options {
            binary_name: runtime.display().to_string(),
            root: self.runtime_root.display().to_string(),
            systemd_cgroup: self.systemd,
            ..Default::default()
        }
    }

    /// The same for one that is to be restored; criu writes its log to `work`.
    pub fn restore_options(&self, runtime: &Path, work: &Path) -> Any {
        let mut options = self.options(runtime);
        options.criu_work_path = work.display().to_string();
        packed(&options)
    }

    fn command(&self, id: &str, bundle: &Bundle, options: Option<Any>) -> Command {
        Command {
            binary: self.binary.clone(),
            namespace: NAMESPACE.into(),
            id: id.to_owned(),
            bundle: bundle.dir().to_owned(),
            events: self.events.clone(),
            grpc: self.grpc.clone(),
            publish_binary: std::env::current_exe().unwrap_or_else(|_| "holdfastd".into()),
            options,
            // Whole seconds, and never none.
            env: vec![(
                "HOLDFAST_RUNTIME_TIMEOUT".into(),
                self.timeout.as_secs().max(1).to_string(),
            )],
            debug: self.debug,
            socket_dir: self.sockets.clone(),
        }
    }

    /// Starts a pod's shim and connects to it.
    pub async fn start(&self, id: &PodId) -> Result<(Endpoint, Client), client::Error> {
        let since = std::time::Instant::now();
        let started = async {
            let command = self.command(id.as_str(), &self.pod_bundle(id), None);
            let endpoint = command.start(BINARY).await?;
            let client = self.connect(&endpoint).await?;
            Ok((endpoint, client))
        };
        let started = started.await;
        let result = if started.is_ok() { "ok" } else { "error" };
        crate::metrics::counts().shim_start(since, result);
        started
    }

    /// Starts a shim where a pod's shim has died, and has it take over what that one had: its
    /// containers' processes, their output, and what was lent to us.
    pub async fn revive(&self, id: &PodId) -> Result<(Endpoint, Client), client::Error> {
        let bundle = self.pod_bundle(id);
        let endpoint = self.command(id.as_str(), &bundle, None).start_again(BINARY).await?;
        let control = Control::new(&bundle);
        // One that a daemon before us has started may have taken over already.
        let by = Instant::now() + CONNECT;
        let hello = loop {
            match control.hello(CONNECT).await {
                // It listens a moment after it was started; what is there before is the dead one's.
                Err(error) if error.kind() == ErrorKind::Closed && Instant::now() < by => {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                hello => break hello?,
            }
        };
        if hello.orphaned {
            control.adopt(&self.lent.of(id), ADOPT).await?;
        }
        let client = self.connect(&endpoint).await?;
        Ok((endpoint, client))
    }

    /// Connects to a running shim.
    pub async fn connect(&self, endpoint: &Endpoint) -> Result<Client, client::Error> {
        // Longer than the runtime's own deadline: the shim's answer names what hung, ours would not.
        let deadline = self.timeout + Duration::from_secs(5);
        let client = Client::connect(endpoint, CONNECT).await?;
        Ok(client.with_deadline(deadline).with_observer(&OBSERVER))
    }

    /// Cleans up after a container whose shim is dead: kills what is left of it and says how it
    /// ended, by its record if there is one.
    pub async fn delete_dead(
        &self,
        id: &ContainerId,
        runtime: &Path,
    ) -> Result<client::Exited, client::Error> {
        let bundle = self.container_bundle(id);
        if let Some(ended) = self.end_foreign(id.as_str(), &bundle).await? {
            return Ok(ended);
        }
        let options = Some(self.runtime_options(runtime));
        self.command(id.as_str(), &self.container_bundle(id), options).delete(BINARY).await
    }

    /// The same for a pod: its helper processes, namespaces and socket, and what a foreign shim was
    /// given for it.
    pub async fn delete_dead_pod(&self, id: &PodId) -> Result<client::Exited, client::Error> {
        self.end_foreign(id.as_str(), &self.sandbox_bundle(id)).await?;
        self.command(id.as_str(), &self.pod_bundle(id), None).delete(BINARY).await
    }
}

fn packed(options: &Options) -> Any {
    Any {
        type_url: "containerd.runc.v1.Options".into(),
        value: options.write_to_bytes().expect("a message without required fields"),
        ..Default::default()
    }
}

/// What is noted of calls, and what they take along.
static OBSERVER: client::Observer = client::Observer {
    metadata: crate::trace::carried,
    ended: |call, took, error| {
        let result = match error {
            None => "ok",
            Some(client::ErrorKind::NotFound) => "not_found",
            Some(client::ErrorKind::Deadline) => "deadline",
            Some(client::ErrorKind::Closed) => "closed",
            Some(_) => "error",
        };
        crate::metrics::counts().shim_call(call, took, result);
        crate::trace::called(call, took, result);
    },
};

/// Makes a directory that only we may enter.
pub fn private_dir(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Makes a directory that anybody may go through, but not look into: the root of a pod's user
/// namespace is nobody special on the node, and its files lie below.
pub fn passable_dir(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    private_dir(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o711))
}

/// Where a pod's connection stands.
#[derive(Clone, Default)]
pub enum Link {
    /// Not connected yet: being started, or being reached again after our own restart.
    #[default]
    Pending,
    /// Connected.
    Up(Client),
    /// The shim is proven dead, or was shut down.
    Down,
}

/// A connection that is waited for.
pub async fn connected(
    link: &mut tokio::sync::watch::Receiver<Link>,
    deadline: Duration,
) -> Option<Client> {
    let up = link.wait_for(|link| !matches!(link, Link::Pending));
    match tokio::time::timeout(deadline, up).await.ok()?.ok()?.clone() {
        Link::Up(client) => Some(client),
        Link::Pending | Link::Down => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shims of every release read them, containerd's too: see the shim's `golden`.
    #[test]
    fn the_options_of_a_runtime_are_as_they_were() {
        let any = packed(&Options {
            binary_name: "runc".into(),
            root: "/r".into(),
            systemd_cgroup: true,
            criu_work_path: "/w".into(),
            ..Default::default()
        });
        assert_eq!(any.type_url, "containerd.runc.v1.Options");
        assert_eq!(any.value, b"\x32\x04runc\x3a\x02/r\x48\x01\x5a\x02/w");
    }
}

//! Pods and containers as a test writes them.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use holdfast_protos::cri;

use crate::{
    cri::Cri,
    log,
    node::image_spec,
    wait::{Look, eventually},
};

/// How long a test waits for a container to do something.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Describes a pod.
#[derive(Clone, Debug)]
pub struct PodBuilder {
    cri: Cri,
    config: cri::PodSandboxConfig,
    runtime_handler: String,
}

impl PodBuilder {
    pub(crate) fn new(cri: &Cri, name: &str, cgroup_parent: &str, log_directory: &Path) -> Self {
        let config = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: name.into(),
                uid: format!("{name}-uid"),
                namespace: "test".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            log_directory: log_directory.display().to_string(),
            linux: Some(cri::LinuxPodSandboxConfig {
                cgroup_parent: cgroup_parent.into(),
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(cri::NamespaceOption {
                        // The wire's default shares it; the kubelet's does not.
                        pid: cri::NamespaceMode::Container.into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        Self { cri: cri.clone(), config, runtime_handler: String::new() }
    }

    /// A description for another socket than a node's.
    pub fn at(cri: &Cri, name: &str, cgroup_parent: &str, log_directory: &Path) -> Self {
        Self::new(cri, name, cgroup_parent, log_directory)
    }

    /// Changes the message itself.
    pub fn config(mut self, change: impl FnOnce(&mut cri::PodSandboxConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Changes the Linux part of the message.
    pub fn linux(self, change: impl FnOnce(&mut cri::LinuxPodSandboxConfig)) -> Self {
        self.config(|config| change(config.linux.get_or_insert_default()))
    }

    /// Changes the namespaces of the message.
    pub fn namespaces(self, change: impl FnOnce(&mut cri::NamespaceOption)) -> Self {
        self.linux(|linux| {
            change(
                linux
                    .security_context
                    .get_or_insert_default()
                    .namespace_options
                    .get_or_insert_default(),
            )
        })
    }

    /// On the node's network.
    pub fn host_network(self) -> Self {
        self.namespaces(|namespaces| namespaces.network = cri::NamespaceMode::Node.into())
            // The kubelet does the same: the host's name is the node's then.
            .config(|config| config.hostname.clear())
    }

    /// With one PID namespace for all containers.
    pub fn shared_pids(self) -> Self {
        self.namespaces(|namespaces| namespaces.pid = cri::NamespaceMode::Pod.into())
    }

    /// May have privileged containers.
    pub fn privileged(self) -> Self {
        self.linux(|linux| linux.security_context.get_or_insert_default().privileged = true)
    }

    /// With another runtime handler than the default.
    pub fn runtime(mut self, handler: &str) -> Self {
        self.runtime_handler = handler.into();
        self
    }

    /// With a label.
    pub fn label(self, key: &str, value: &str) -> Self {
        self.config(|config| {
            config.labels.insert(key.into(), value.into());
        })
    }

    /// Another attempt of the same pod.
    pub fn attempt(self, attempt: u32) -> Self {
        self.config(|config| config.metadata.get_or_insert_default().attempt = attempt)
    }

    /// With a port of the node that leads into the pod.
    pub fn port(self, host: i32, container: i32) -> Self {
        self.config(|config| {
            config.port_mappings.push(cri::PortMapping {
                host_port: host,
                container_port: container,
                ..Default::default()
            });
        })
    }

    /// Gives up waiting for the daemon after this time.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.cri = self.cri.deadline(deadline);
        self
    }

    /// The message.
    pub fn request(&self) -> cri::RunPodSandboxRequest {
        cri::RunPodSandboxRequest {
            config: Some(self.config.clone()),
            runtime_handler: self.runtime_handler.clone(),
        }
    }

    /// RunPodSandbox.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn run(self) -> Result<Pod, tonic::Status> {
        let answer = self.cri.runtime().run_pod_sandbox(self.request()).await?;
        Ok(Pod { id: answer.into_inner().pod_sandbox_id, cri: self.cri, config: self.config })
    }
}

/// A pod that was run.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its id.
    pub id: String,
    cri: Cri,
    config: cri::PodSandboxConfig,
}

impl Pod {
    /// A pod of which only the id is known.
    pub fn existing(cri: &Cri, id: &str) -> Self {
        Self { id: id.into(), cri: cri.clone(), config: cri::PodSandboxConfig::default() }
    }

    /// What it was run with.
    pub fn config(&self) -> &cri::PodSandboxConfig {
        &self.config
    }

    /// Describes a container of this pod, named "main", from an image that was pulled.
    pub fn container(&self, image: &str) -> ContainerBuilder {
        let namespaces = self
            .config
            .linux
            .as_ref()
            .and_then(|linux| linux.security_context.as_ref())
            .and_then(|security| security.namespace_options.clone());
        ContainerBuilder {
            pod: self.clone(),
            config: cri::ContainerConfig {
                metadata: Some(cri::ContainerMetadata { name: "main".into(), attempt: 0 }),
                image: Some(image_spec(image)),
                log_path: "main/0.log".into(),
                linux: Some(cri::LinuxContainerConfig {
                    resources: None,
                    security_context: Some(cri::LinuxContainerSecurityContext {
                        namespace_options: namespaces,
                        ..Default::default()
                    }),
                }),
                ..Default::default()
            },
        }
    }

    /// PodSandboxStatus.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn status(&self) -> Result<cri::PodSandboxStatus, tonic::Status> {
        let request =
            cri::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        let answer = self.cri.runtime().pod_sandbox_status(request).await?.into_inner();
        answer.status.ok_or_else(|| tonic::Status::data_loss("an answer without a status"))
    }

    /// Its primary address.
    ///
    /// # Errors
    /// The daemon's; it has none.
    pub async fn ip(&self) -> Result<String> {
        let ip = self.status().await?.network.unwrap_or_default().ip;
        ensure!(!ip.is_empty(), "pod {} has no address", self.id);
        Ok(ip)
    }

    /// StopPodSandbox.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn stop(&self) -> Result<(), tonic::Status> {
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.cri.runtime().stop_pod_sandbox(request).await?;
        Ok(())
    }

    /// RemovePodSandbox.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn remove(&self) -> Result<(), tonic::Status> {
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.cri.runtime().remove_pod_sandbox(request).await?;
        Ok(())
    }
}

/// Describes a container.
#[derive(Clone, Debug)]
pub struct ContainerBuilder {
    pod: Pod,
    config: cri::ContainerConfig,
}

impl ContainerBuilder {
    /// Changes the message itself.
    pub fn config(mut self, change: impl FnOnce(&mut cri::ContainerConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Changes the Linux part of the message.
    pub fn linux(self, change: impl FnOnce(&mut cri::LinuxContainerConfig)) -> Self {
        self.config(|config| change(config.linux.get_or_insert_default()))
    }

    /// Changes the security settings of the message.
    pub fn security(self, change: impl FnOnce(&mut cri::LinuxContainerSecurityContext)) -> Self {
        self.linux(|linux| change(linux.security_context.get_or_insert_default()))
    }

    /// Changes the limits of the message.
    pub fn resources(self, change: impl FnOnce(&mut cri::LinuxContainerResources)) -> Self {
        self.linux(|linux| change(linux.resources.get_or_insert_default()))
    }

    /// Another name; its log is named after it.
    pub fn name(self, name: &str) -> Self {
        self.config(|config| {
            config.metadata.get_or_insert_default().name = name.into();
            config.log_path = format!("{name}/0.log");
        })
    }

    /// Another attempt of the same container.
    pub fn attempt(self, attempt: u32) -> Self {
        self.config(|config| {
            let metadata = config.metadata.get_or_insert_default();
            metadata.attempt = attempt;
            config.log_path = format!("{}/{attempt}.log", metadata.name);
        })
    }

    /// Instead of the image's entrypoint.
    pub fn command<'a>(self, argv: impl IntoIterator<Item = &'a str>) -> Self {
        let argv = argv.into_iter().map(String::from).collect();
        self.config(|config| config.command = argv)
    }

    /// Instead of the image's arguments.
    pub fn args<'a>(self, argv: impl IntoIterator<Item = &'a str>) -> Self {
        let argv = argv.into_iter().map(String::from).collect();
        self.config(|config| config.args = argv)
    }

    /// A shell script as its command.
    pub fn sh(self, script: &str) -> Self {
        self.command(["/bin/sh", "-c", script])
    }

    /// An environment variable.
    pub fn env(self, key: &str, value: &str) -> Self {
        self.config(|config| {
            config.envs.push(cri::KeyValue { key: key.into(), value: value.as_bytes().to_vec() });
        })
    }

    /// A directory or file of the node.
    pub fn mount(self, host: &Path, container: &str, change: impl FnOnce(&mut cri::Mount)) -> Self {
        let mut mount = cri::Mount {
            host_path: host.display().to_string(),
            container_path: container.into(),
            ..Default::default()
        };
        change(&mut mount);
        self.config(|config| config.mounts.push(mount))
    }

    /// With a label.
    pub fn label(self, key: &str, value: &str) -> Self {
        self.config(|config| {
            config.labels.insert(key.into(), value.into());
        })
    }

    /// Gives up waiting for the daemon after this time.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.pod.cri = self.pod.cri.deadline(deadline);
        self
    }

    /// The message.
    pub fn request(&self) -> cri::CreateContainerRequest {
        cri::CreateContainerRequest {
            pod_sandbox_id: self.pod.id.clone(),
            config: Some(self.config.clone()),
            sandbox_config: Some(self.pod.config.clone()),
        }
    }

    /// CreateContainer.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn create(self) -> Result<Container, tonic::Status> {
        let answer = self.pod.cri.runtime().create_container(self.request()).await?;
        let log = PathBuf::from(&self.pod.config.log_directory).join(&self.config.log_path);
        Ok(Container { id: answer.into_inner().container_id, cri: self.pod.cri, log })
    }

    /// CreateContainer and StartContainer.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn start(self) -> Result<Container, tonic::Status> {
        let container = self.create().await?;
        container.start().await?;
        Ok(container)
    }

    /// Starts it and waits for its end; what it wrote to standard output.
    ///
    /// # Errors
    /// The daemon's; it ends with another code than 0.
    pub async fn output(self) -> Result<String> {
        let container = self.start().await?;
        let status = container.wait().await?;
        let log = container.log()?;
        ensure!(status.exit_code == 0, "exit code {}: {log:?}", status.exit_code);
        Ok(log::texts(&log, "stdout").join("\n"))
    }
}

/// A container that was created.
#[derive(Clone, Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    cri: Cri,
    log: PathBuf,
}

impl Container {
    /// The socket it is known at.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// A container of which only the id is known.
    pub fn existing(cri: &Cri, id: &str) -> Self {
        Self { id: id.into(), cri: cri.clone(), log: PathBuf::new() }
    }

    /// StartContainer.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn start(&self) -> Result<(), tonic::Status> {
        let request = cri::StartContainerRequest { container_id: self.id.clone() };
        self.cri.runtime().start_container(request).await?;
        Ok(())
    }

    /// StopContainer with a grace period in seconds.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn stop(&self, timeout: i64) -> Result<(), tonic::Status> {
        let request = cri::StopContainerRequest { container_id: self.id.clone(), timeout };
        self.cri.runtime().stop_container(request).await?;
        Ok(())
    }

    /// RemoveContainer.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn remove(&self) -> Result<(), tonic::Status> {
        let request = cri::RemoveContainerRequest { container_id: self.id.clone() };
        self.cri.runtime().remove_container(request).await?;
        Ok(())
    }

    /// ContainerStatus.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn status(&self) -> Result<cri::ContainerStatus, tonic::Status> {
        let request = cri::ContainerStatusRequest { container_id: self.id.clone(), verbose: false };
        let answer = self.cri.runtime().container_status(request).await?.into_inner();
        answer.status.ok_or_else(|| tonic::Status::data_loss("an answer without a status"))
    }

    /// Whether its process lives.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn is_running(&self) -> Result<bool, tonic::Status> {
        Ok(self.status().await?.state() == cri::ContainerState::ContainerRunning)
    }

    /// ExecSync with a timeout in seconds, 0 for none.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn exec_sync(
        &self,
        argv: &[&str],
        timeout: i64,
    ) -> Result<cri::ExecSyncResponse, tonic::Status> {
        let request = cri::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: argv.iter().map(|word| (*word).into()).collect(),
            timeout,
        };
        Ok(self.cri.runtime().exec_sync(request).await?.into_inner())
    }

    /// Standard output of a shell script that must succeed, without the last newline.
    ///
    /// # Errors
    /// The daemon's; the script ends with another code than 0.
    pub async fn sh(&self, script: &str) -> Result<String> {
        let answer = self.exec_sync(&["/bin/sh", "-c", script], 20).await?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        ensure!(
            answer.exit_code == 0,
            "{script}: exit code {}: {}",
            answer.exit_code,
            text(&answer.stderr)
        );
        Ok(text(&answer.stdout))
    }

    /// Waits until it has exited; its status then.
    ///
    /// # Errors
    /// The daemon's; it does not exit.
    pub async fn wait(&self) -> Result<cri::ContainerStatus> {
        eventually(PATIENCE, "the container to exit", async || {
            let status = self.status().await?;
            Ok(if status.state() == cri::ContainerState::ContainerExited {
                Look::Done(status)
            } else {
                Look::Not(format!("{:?}", status.state()))
            })
        })
        .await
    }

    /// Waits for its end, which must be with this code.
    ///
    /// # Errors
    /// As [`Container::wait`]; it ended otherwise.
    pub async fn ends_with(&self, code: i32) -> Result<()> {
        let status = self.wait().await?;
        ensure!(status.exit_code == code, "not {code}: {status:?}");
        Ok(())
    }

    /// Path of its log.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Its log.
    ///
    /// # Errors
    /// A line is not in the format.
    pub fn log(&self) -> Result<Vec<log::Line>> {
        log::read(&self.log)
    }

    /// Waits until a line of its log contains `text`.
    ///
    /// # Errors
    /// None does, in time.
    pub async fn wait_for_log(&self, text: &str) -> Result<()> {
        eventually(PATIENCE, &format!("{text:?} in the log"), async || {
            let lines = self.log()?;
            let found = lines.iter().any(|line| line.text.contains(text));
            Ok(Look::when(found, || format!("{} lines, {:?}", lines.len(), lines.last())))
        })
        .await
        .context("wait for a container's log")
    }

    /// ContainerStats.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn stats(&self) -> Result<cri::ContainerStats, tonic::Status> {
        let request = cri::ContainerStatsRequest { container_id: self.id.clone() };
        let answer = self.cri.runtime().container_stats(request).await?.into_inner();
        answer.stats.ok_or_else(|| tonic::Status::data_loss("an answer without stats"))
    }
}

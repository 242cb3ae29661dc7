//! `stop` and `rm`, of pods and containers.
//!
//! Every name is tried: one that fails does not keep the others from being stopped or removed.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use holdfast_protos::cri;

use super::{
    Client, Hint,
    args::{Rm, Stop},
    client,
    find::{All, Found},
    wire,
};

/// Where `run` keeps logs, a directory for each pod.
pub(super) const LOGS: &str = "/var/log/holdfast";

/// A pod's annotation: the directory that `run` made for its log.
pub(super) const LOG_ANNOTATION: &str = "holdfast.cli/log-directory";

/// `holdfast stop`
pub(super) async fn stop(client: &mut Client, args: Stop) -> Result<u8> {
    let all = All::list(client).await?;
    let mut failed = false;
    for name in &args.names {
        let stopped = match all.any(name) {
            Ok(Found::Pod(pod)) => stop_pod(client, &all, &pod.id, args.time).await,
            Ok(Found::Container(c)) => stop_container(client, &c.id, args.time).await,
            Err(error) => Err(error),
        };
        failed |= !done(name, stopped)?;
    }
    Ok(u8::from(failed))
}

/// `holdfast rm`
pub(super) async fn remove(client: &mut Client, args: Rm) -> Result<u8> {
    let all = All::list(client).await?;
    let mut failed = false;
    for name in &args.names {
        let removed = match all.any(name) {
            Ok(Found::Pod(pod)) => remove_pod(client, &pod, args.force).await,
            Ok(Found::Container(c)) => remove_container(client, &c, args.force).await,
            Err(error) => Err(error),
        };
        failed |= !done(name, removed)?;
    }
    Ok(u8::from(failed))
}

/// Prints what was done or why not; whether it was done.
pub(super) fn done(name: &str, result: Result<()>) -> Result<bool> {
    match result {
        Ok(()) => wire::write(&format!("{name}\n")).map(|()| true),
        Err(error) => {
            client::report(&error);
            Ok(false)
        }
    }
}

/// The containers with their grace, all at once, then the pod.
pub(super) async fn stop_pod(client: &mut Client, all: &All, id: &str, time: u32) -> Result<()> {
    let running = cri::ContainerState::ContainerRunning as i32;
    let containers: Vec<_> =
        all.containers.iter().filter(|c| c.pod_sandbox_id == id && c.state == running).collect();
    let client = &*client;
    let stops = containers.into_iter().map(|c| stop_container(client, &c.id, time));
    for stopped in futures::future::join_all(stops).await {
        stopped?;
    }
    let request = cri::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
    let mut runtime = client.runtime.clone();
    client.slow(runtime.stop_pod_sandbox(request)).await?;
    Ok(())
}

pub(super) async fn stop_container(client: &Client, id: &str, time: u32) -> Result<()> {
    let request = cri::StopContainerRequest { container_id: id.to_owned(), timeout: time.into() };
    let mut runtime = client.runtime.clone();
    let grace = Duration::from_secs(time.into());
    client.slow_and(grace, runtime.stop_container(request)).await?;
    Ok(())
}

async fn remove_container(client: &Client, container: &cri::Container, force: bool) -> Result<()> {
    if container.state() == cri::ContainerState::ContainerRunning && !force {
        return Err(Hint::on(
            anyhow!("container {} is running", container.id),
            "stop it first, or use rm -f",
        ));
    }
    let request = cri::RemoveContainerRequest { container_id: container.id.clone() };
    let mut runtime = client.runtime.clone();
    client.slow(runtime.remove_container(request)).await?;
    Ok(())
}

async fn remove_pod(client: &Client, pod: &cri::PodSandbox, force: bool) -> Result<()> {
    if pod.state() == cri::PodSandboxState::SandboxReady && !force {
        return Err(Hint::on(
            anyhow!("pod {} is not stopped", pod.id),
            "stop it first, or use rm -f",
        ));
    }
    force_remove_pod(client, &pod.id).await?;
    match pod.annotations.get(LOG_ANNOTATION) {
        Some(directory) => remove_logs(Path::new(LOGS), Path::new(directory)),
        None => Ok(()),
    }
}

/// Whatever state it is in. The CRI says that removing kills what still runs; stopping first also
/// works where a daemon insists on it.
pub(super) async fn force_remove_pod(client: &Client, id: &str) -> Result<()> {
    let mut runtime = client.runtime.clone();
    let request = cri::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
    client.slow(runtime.stop_pod_sandbox(request)).await?;
    let request = cri::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
    client.slow(runtime.remove_pod_sandbox(request)).await?;
    Ok(())
}

/// Removes a log directory that `run` made. Anybody who can make a pod can write the annotation, so it
/// is believed only for a directory right below `logs`, and only log files in it are removed.
pub(super) fn remove_logs(logs: &Path, directory: &Path) -> Result<()> {
    let name = directory.file_name().filter(|_| directory.parent() == Some(logs));
    let Some(name) = name else { return Ok(()) };
    let directory: PathBuf = logs.join(name);
    // A link here is not ours either.
    if !fs::symlink_metadata(&directory).is_ok_and(|m| m.is_dir()) {
        return Ok(());
    }
    let remove = || {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let log = entry.file_name().as_encoded_bytes().starts_with(b"0.log");
            if log && !entry.file_type()?.is_dir() {
                fs::remove_file(entry.path())?;
            }
        }
        fs::remove_dir(&directory)
    };
    remove().with_context(|| format!("remove the log directory {}", directory.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_log_files_in_a_directory_of_ours_are_removed() {
        let temp = tempfile::tempdir().unwrap();
        let logs = temp.path().join("logs");
        let elsewhere = temp.path().join("elsewhere");
        for dir in [&logs, &elsewhere, &logs.join("a"), &logs.join("b")] {
            fs::create_dir(dir).unwrap();
        }
        fs::write(logs.join("a/0.log"), "x").unwrap();
        fs::write(logs.join("a/0.log.20240101-000000"), "x").unwrap();
        fs::write(logs.join("b/precious"), "x").unwrap();
        fs::write(elsewhere.join("0.log"), "x").unwrap();
        symlink(&elsewhere, logs.join("link")).unwrap();

        remove_logs(&logs, &logs.join("a")).unwrap();
        assert!(!logs.join("a").exists());
        let error = remove_logs(&logs, &logs.join("b")).unwrap_err();
        assert!(format!("{error:#}").contains("not empty"), "{error:#}");
        assert!(logs.join("b/precious").exists());
        for not_ours in ["elsewhere", "logs/link", "logs/../elsewhere", "logs", "logs/none"] {
            remove_logs(&logs, &temp.path().join(not_ours)).unwrap();
        }
        assert!(elsewhere.join("0.log").exists() && logs.exists());
    }
}

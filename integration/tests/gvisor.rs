//! gVisor's runsc as an OCI command line under our shim.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{Node, bench::peer::in_path, binaries::binaries};

/// How gVisor gets hold of a program's system calls.
#[derive(Clone, Copy, Debug)]
enum Platform {
    /// Runs everywhere, if slowly.
    Ptrace,
    /// Needs a processor's virtualisation that holds: where the node is a guest itself, it may not.
    Kvm,
}

impl Platform {
    fn flag(self) -> &'static str {
        match self {
            Self::Ptrace => "--platform=ptrace",
            Self::Kvm => "--platform=kvm",
        }
    }
}

fn runsc() -> Result<PathBuf> {
    in_path("runsc").context("runsc is missing: run 'make deps'")
}

/// A node whose handler "gvisor" is runsc. It uses the pod's network by way of the kernel: Debian's takes
/// every namespace of Linux 6.18 for the node's, and refuses to take its network over.
async fn node(platform: Platform) -> Result<(Node, String, tempfile::TempDir)> {
    let runsc = runsc()?;
    let dir = tempfile::tempdir()?;
    let script = dir.path().join("runsc");
    // Flags of a runtime are put before it by a script.
    fs::write(
        &script,
        format!("#!/bin/sh\nexec {} {} --network=host \"$@\"\n", runsc.display(), platform.flag()),
    )?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let mut node = Node::builder()
        .config(&format!("[runtime.handlers.gvisor]\npath = {script:?}\n"))
        .start()
        .await?;
    let image = node.busybox().await?;
    Ok((node, image, dir))
}

/// Why this host's runsc cannot run anything on a platform, without any of ours in between.
fn why_not(platform: Platform) -> Result<Option<String>> {
    let dir = tempfile::tempdir()?;
    fs::create_dir(dir.path().join("state"))?;
    let output = Command::new("timeout")
        .args(["--kill-after=5", "20"])
        .arg(runsc()?)
        .arg("--root")
        .arg(dir.path().join("state"))
        .args([platform.flag(), "--network=none", "--ignore-cgroups", "do", "/bin/true"])
        .output()?;
    Ok(match output.status.code() {
        Some(0) => None,
        // timeout(1)'s codes.
        Some(124 | 137) => Some(format!(
            "'runsc {} do /bin/true' does not end within 20 seconds on this host",
            platform.flag()
        )),
        _ => Some(format!(
            "'runsc {} do /bin/true' ends with {} on this host: {}",
            platform.flag(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        )),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_lives_in_gvisor() -> Result<()> {
    a_pod_lives(Platform::Ptrace).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_lives_in_gvisor_on_kvm_where_gvisor_runs_on_it() -> Result<()> {
    // `make test` prints it at the end: what was not tested is said.
    let missing = binaries()?.shim.with_file_name("gvisor-kvm-missing");
    let why = match Path::new("/dev/kvm").exists() {
        true => why_not(Platform::Kvm)?,
        false => Some("this host has no /dev/kvm".into()),
    };
    if let Some(why) = why {
        println!("not tested: {why}");
        return fs::write(&missing, why).context("write why");
    }
    let _ = fs::remove_file(&missing);
    a_pod_lives(Platform::Kvm).await
}

async fn a_pod_lives(platform: Platform) -> Result<()> {
    let (mut node, image, _dir) = node(platform).await?;
    let pod = node.pod("a").runtime("gvisor").run().await?;
    let address = pod.ip().await?;
    let container = pod
        .container(&image)
        .sh("echo out; echo err >&2; trap 'exit 7' TERM; while :; do sleep 0.2; done")
        .start()
        .await?;
    container.wait_for_log("out").await?;
    container.wait_for_log("err").await?;
    let kernel = container.sh("dmesg | head -1; uname -r").await?;
    ensure!(kernel.contains("gVisor") || kernel.contains("4.4"), "{kernel}");
    let addresses = container.sh("ip -4 addr").await?;
    ensure!(addresses.contains(&address), "{address} is not in {addresses}");
    let failed = container.exec_sync(&["sh", "-c", "echo no >&2; exit 3"], 20).await?;
    assert_eq!((failed.exit_code, failed.stderr.as_slice()), (3, &b"no\n"[..]));
    let stats = container.stats().await?;
    let memory = stats.memory.and_then(|m| m.working_set_bytes).map_or(0, |b| b.value);
    ensure!(memory > 1 << 20, "a sandbox has some memory: {memory}");

    node.kill9()?;
    node.restart().await?;
    assert_eq!(container.sh("echo still here").await?, "still here");
    container.stop(20).await?;
    assert_eq!(container.status().await?.exit_code, 7);
    pod.stop().await?;
    pod.remove().await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_in_gvisor_is_killed_and_its_code_is_told() -> Result<()> {
    let (node, image, _dir) = node(Platform::Ptrace).await?;
    let pod = node.pod("a").host_network().runtime("gvisor").run().await?;
    let ends = pod.container(&image).name("ends").sh("exit 42").start().await?;
    assert_eq!(ends.wait().await?.exit_code, 42);
    let lives = pod.container(&image).name("lives").sh("sleep 1000").start().await?;
    lives.stop(0).await?;
    assert_eq!(lives.status().await?.exit_code, 137);
    pod.stop().await?;
    pod.remove().await?;
    node.finish().await
}

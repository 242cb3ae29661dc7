//! gVisor's runsc as an OCI command line under our shim.

use std::{fs, os::unix::fs::PermissionsExt as _};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{Node, bench::peer::in_path};

/// A node whose handler "gvisor" is runsc, by ptrace: that runs everywhere, if slowly. It uses the pod's
/// network by way of the kernel: Debian's takes every namespace of Linux 6.18 for the node's, and refuses
/// to take its network over.
async fn node() -> Result<(Node, String, tempfile::TempDir)> {
    let runsc = in_path("runsc").context("runsc is missing: run 'make deps'")?;
    let dir = tempfile::tempdir()?;
    let script = dir.path().join("runsc");
    // Flags of a runtime are put before it by a script.
    fs::write(
        &script,
        format!("#!/bin/sh\nexec {} --platform=ptrace --network=host \"$@\"\n", runsc.display()),
    )?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let mut node = Node::builder()
        .config(&format!("[runtime.handlers.gvisor]\npath = {script:?}\n"))
        .start()
        .await?;
    let image = node.busybox().await?;
    Ok((node, image, dir))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_lives_in_gvisor() -> Result<()> {
    let (mut node, image, _dir) = node().await?;
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
    let (node, image, _dir) = node().await?;
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

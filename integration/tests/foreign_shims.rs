//! The daemon drives shims that are not ours: Debian's containerd-shim-runc-v2, and two small ones on
//! the `containerd-shim` crate, one for each generation of the contract.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{
    Node,
    binaries::binaries,
    node::on,
    wait::{Look, eventually},
};
use holdfast_protos::cri;

const SHIM: &str = "/usr/bin/containerd-shim-runc-v2";

/// A node with handlers "foreign" and "bare" (no sandbox container), both containerd's shim.
async fn node() -> Result<(Node, String)> {
    ensure!(Path::new(SHIM).is_file(), "{SHIM} is missing: run 'make deps'");
    let mut node = Node::builder()
        .config(&format!("[runtime.handlers.foreign]\nshim = {SHIM:?}\n"))
        .config(&format!("[runtime.handlers.bare]\nshim = {SHIM:?}\nsandbox = \"none\"\n"))
        .config(&small("old")?)
        .config(&small("new")?)
        .start()
        .await?;
    let image = node.busybox().await?;
    Ok((node, image))
}

/// The handler of a small shim.
fn small(generation: &str) -> Result<String> {
    let shim = binaries()?.shim.with_file_name(format!("holdfast-testshim-{generation}"));
    ensure!(shim.is_file(), "{} is missing: run 'make test-bins'", shim.display());
    Ok(format!("[runtime.handlers.{generation}]\nshim = {shim:?}\npath = \"runc\"\n"))
}

/// Pids of the foreign shims of a pod, by their command lines.
fn shims(pod: &str) -> Vec<i32> {
    holdfast_integration::ground::names_in(Path::new("/proc"))
        .iter()
        .filter_map(|name| name.parse::<i32>().ok())
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            line.starts_with(SHIM) && line.contains(pod)
        })
        .collect()
}

fn kill9(pid: i32) -> Result<()> {
    use nix::sys::signal::{Signal, kill};
    Ok(kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL)?)
}

async fn a_pods_life(handler: &str) -> Result<()> {
    let (mut node, image) = node().await?;
    let pod = node.pod("a").runtime(handler).run().await?;
    let status = pod.status().await?;
    assert_eq!(status.runtime_handler, handler);
    let address = pod.ip().await?;
    let container =
        pod.container(&image).sh("echo out; echo err >&2; exec sleep 1000").start().await?;
    container.wait_for_log("out").await?;
    container.wait_for_log("err").await?;
    let lines = container.log()?;
    assert!(lines.iter().any(|l| l.text == "err" && l.stream == "stderr"), "{lines:?}");
    // It is in the pod's network and has its name.
    let addresses = container.sh("ip -4 addr show eth0").await?;
    ensure!(addresses.contains(&address), "{address} is not in {addresses}");
    assert_eq!(container.sh("hostname").await?, "a");
    // A second container is the same shim's.
    let second = pod.container(&image).name("second").sh("exit 7").start().await?;
    let ended = second.wait().await?;
    assert_eq!((ended.exit_code, ended.reason.as_str()), (7, "Error"));
    if handler == "foreign" {
        assert_eq!(shims(&pod.id).len(), 1, "one shim for the pod");
    }
    let failed = container.exec_sync(&["sh", "-c", "echo no >&2; exit 3"], 10).await?;
    assert_eq!((failed.exit_code, failed.stderr.as_slice()), (3, &b"no\n"[..]));
    node.kill9()?;
    node.restart().await?;
    assert_eq!(container.sh("echo still here").await?, "still here");
    let stats = container.stats().await?;
    let used = stats.memory.unwrap_or_default().working_set_bytes.unwrap_or_default().value;
    ensure!(used > 0, "no memory is used");
    container.stop(0).await?;
    let ended = container.status().await?;
    assert_eq!(ended.exit_code, 137);
    second.remove().await?;
    pod.stop().await?;
    pod.remove().await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_lives_in_a_foreign_shim_with_a_sandbox_container() -> Result<()> {
    a_pods_life("foreign").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_lives_in_a_foreign_shim_without_one() -> Result<()> {
    a_pods_life("bare").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_lives_in_a_small_shim_of_the_older_generation() -> Result<()> {
    a_pods_life("old").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_lives_in_a_small_shim_of_the_newer_generation() -> Result<()> {
    a_pods_life("new").await
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_of_a_foreign_shim_outlive_the_daemon_and_lose_no_output() -> Result<()> {
    let (mut node, image) = node().await?;
    let pod = node.pod("a").host_network().runtime("foreign").run().await?;
    let writer = pod
        .container(&image)
        .sh("i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; exec sleep 1000")
        .start()
        .await?;
    let go = node.path().join("go");
    std::fs::create_dir(&go)?;
    let start = async |name: &str, then: &str, memory: i64| {
        pod.container(&image)
            .name(name)
            .sh(&format!("echo ready; while [ ! -e /go/now ]; do usleep 20000; done; {then}"))
            .mount(&go, "/go", |_| {})
            .resources(|r| {
                r.memory_limit_in_bytes = memory;
                r.memory_swap_limit_in_bytes = memory;
            })
            .start()
            .await
    };
    let code = start("code", "echo last words; exit 42", 0).await?;
    let oom = start("oom", "head -c 300000000 /dev/zero | tail", 16 << 20).await?;
    for container in [&code, &oom] {
        container.wait_for_log("ready").await?;
    }
    node.kill9()?;
    std::fs::write(go.join("now"), "")?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    node.restart().await?;
    let ended = code.wait().await?;
    assert_eq!((ended.exit_code, ended.reason.as_str()), (42, "Error"));
    code.wait_for_log("last words").await?;
    assert_eq!(oom.wait().await?.reason, "OOMKilled");
    writer.wait_for_log("line 19999").await?;
    let lines = writer.log()?;
    assert_eq!(lines.len(), 20000);
    for (number, line) in lines.iter().enumerate() {
        assert_eq!(line.text, format!("line {number}"));
    }
    assert_eq!(writer.sh("echo still there").await?, "still there");
    node.terminate()?;
    node.restart().await?;
    assert_eq!(writer.sh("echo still there").await?, "still there");
    writer.remove().await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_foreign_shim_ends_its_containers_once_and_leaves_nothing() -> Result<()> {
    let (mut node, image) = node().await?;
    for handler in ["foreign", "bare"] {
        for while_down in [false, true] {
            let pod = node.pod(&format!("{handler}-{while_down}")).runtime(handler).run().await?;
            let container = pod.container(&image).sh("exec sleep 1000").start().await?;
            let group = if handler == "foreign" { &pod.id } else { &container.id };
            let [shim] = shims(group)[..] else { anyhow::bail!("{:?}", shims(group)) };
            if while_down {
                node.kill9()?;
            }
            kill9(shim)?;
            if while_down {
                node.restart().await?;
            }
            let ended = container.wait().await?;
            assert_eq!((ended.exit_code, ended.reason.as_str()), (137, "Error"), "{handler}");
            let ready = if handler == "foreign" { "SandboxNotready" } else { "SandboxReady" };
            on(&node, Duration::from_secs(10), "the pod's state", async || {
                let state = pod.status().await?.state();
                Ok(Look::when(format!("{state:?}") == ready, || format!("{state:?}")))
            })
            .await?;
            if handler == "bare" {
                // The pod is there still: a new container has a new shim.
                let again = pod.container(&image).name("again").sh("echo again; exit 0");
                let again = again.start().await?;
                assert_eq!(again.wait().await?.exit_code, 0);
                again.wait_for_log("again").await?;
            }
            pod.stop().await?;
            pod.remove().await?;
        }
    }
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_updated_and_the_handler_tells_its_features() -> Result<()> {
    let (node, image) = node().await?;
    let status = node.status(false).await?;
    let feature = |name: &str| {
        status.runtime_handlers.iter().find(|h| h.name == name).and_then(|h| h.features)
    };
    // It drives the same runc as our own shim.
    assert_eq!(feature("foreign").context("handler foreign")?, feature("runc").context("runc")?);
    let pod = node.pod("a").host_network().runtime("foreign").run().await?;
    let container = pod.container(&image).sh("exec sleep 1000").start().await?;
    let resources =
        cri::LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() };
    let request = cri::UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(resources),
        ..Default::default()
    };
    node.cri().runtime().update_container_resources(request).await?;
    let status = container.status().await?;
    let limit = status.resources.and_then(|r| r.linux).map(|l| l.memory_limit_in_bytes);
    assert_eq!(limit, Some(64 << 20));
    // A rotated log goes on in a new file.
    let rotated = container.log_path().with_extension("1");
    std::fs::rename(container.log_path(), &rotated)?;
    let request = cri::ReopenContainerLogRequest { container_id: container.id.clone() };
    node.cri().runtime().reopen_container_log(request).await?;
    ensure!(container.log_path().exists(), "no new log");
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_is_not_installed_is_named() -> Result<()> {
    let node = Node::builder()
        .config("[runtime.handlers.gone]\nshim = \"containerd-shim-gone-v2\"\n")
        .config("[runtime.handlers.none]\nshim = \"/opt/gone\"\nsandbox = \"none\"\n")
        .start()
        .await?;
    for (handler, name) in [("gone", "containerd-shim-gone-v2"), ("none", "/opt/gone")] {
        let error = node.pod("a").host_network().runtime(handler).run().await.unwrap_err();
        ensure!(error.message().contains(name), "{error}");
        ensure!(error.message().contains("install it"), "{error}");
    }
    eventually(Duration::from_secs(5), "no pod", async || {
        let pods = node.pods().await?;
        Ok(Look::when(pods.is_empty(), || format!("{pods:?}")))
    })
    .await?;
    node.finish().await
}

//! The machine is started again: with its power cut, or in order; with a state directory in memory, or on a
//! disk. A test cannot boot the machine: it ends everything that a boot ends, and the daemon is told another
//! boot id.

use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{
    Image, Node, Pod, eventually, leaks::addresses, tar::Entry, wait::Look,
};
use holdfast_protos::cri;

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

async fn gone(container: &holdfast_integration::Container) -> Result<cri::ContainerStatus> {
    eventually(Duration::from_secs(20), "the container to be told as ended", async || {
        let status = container.status().await?;
        let ended = status.state() == cri::ContainerState::ContainerExited;
        Ok(if ended { Look::Done(status) } else { Look::Not(format!("{status:?}")) })
    })
    .await
}

/// What `Status` says of the database.
async fn told(node: &Node) -> Result<serde_json::Value> {
    let status = node.status(true).await?;
    Ok(serde_json::from_str(status.info.get("database").context("it says nothing")?)?)
}

async fn pods_of_an_earlier_boot(state_survives: bool) -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let web = node.pod("web").port(20_001, 80).run().await?;
    let go = node.path().join("go");
    fs::create_dir(&go)?;
    let running = web.container(&image).sh("exec sleep 1000").start().await?;
    let made = web.container(&image).name("made").sh("true").create().await?;
    let ended = web.container(&image).name("ended").sh("exit 3").start().await?;
    let ended_so = ended.wait().await?;
    let last = web.container(&image).name("last");
    let last = last.sh("while [ ! -e /go/now ]; do usleep 20000; done; exit 6");
    let last = last.mount(&go, "/go", |_| {}).start().await?;
    let host = node.pod("host").host_network().run().await?;
    host.container(&image).sh("exec sleep 1000").start().await?;
    let stopped = node.pod("stopped").run().await?;
    stopped.stop().await?;
    let ipam = node.path().join("ipam");
    ensure!(!addresses(&ipam).is_empty(), "no address was given away");

    node.kill9()?;
    // The shim writes down how it ended, and nobody reads it before the power goes.
    let record = node.path().join("state/bundles").join(&last.id).join("exit.json");
    fs::write(go.join("now"), "")?;
    eventually(Duration::from_secs(10), "an exit record", async || {
        Ok(Look::when(record.exists(), || record.display().to_string()))
    })
    .await?;
    let boot = now() + 1;
    node.reboot(boot, state_survives)?;
    node.restart().await?;

    let status = gone(&running).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "NodeReboot"), "{status:?}");
    ensure!(status.message.contains("the time is that of the node's start"), "{status:?}");
    assert_eq!(status.finished_at, i64::try_from(boot)? * 1_000_000_000, "{status:?}");
    ensure!(status.started_at > 0 && status.started_at < status.finished_at);
    assert_eq!(gone(&made).await?.reason, "NodeReboot");
    assert_eq!(gone(&ended).await?, ended_so, "what was known stays");
    let status = gone(&last).await?;
    match state_survives {
        true => assert_eq!((status.exit_code, status.reason.as_str()), (6, "Error")),
        false => assert_eq!((status.exit_code, status.reason.as_str()), (255, "NodeReboot")),
    }
    eventually(Duration::from_secs(20), "pods to be told as gone", async || {
        let ready = cri::PodSandboxState::SandboxReady as i32;
        let left: Vec<_> = node.pods().await?.into_iter().filter(|p| p.state == ready).collect();
        Ok(Look::when(left.is_empty(), || format!("{left:?}")))
    })
    .await?;
    assert_eq!(node.pods().await?.len(), 3, "their records are kept");
    // Nobody has stopped them yet.
    eventually(Duration::from_secs(20), "addresses to be free", async || {
        let left = addresses(&ipam);
        Ok(Look::when(left.is_empty(), || format!("{left:?}")))
    })
    .await?;
    let status = Pod::existing(node.cri(), &web.id).status().await?;
    assert_eq!(status.network.unwrap_or_default().ip, "", "an address that is another's by now");

    // As the kubelet goes on.
    let again = node.pod("web").attempt(1).port(20_001, 80).run().await?;
    let container = again.container(&image).sh("echo up; exec sleep 1000").start().await?;
    container.wait_for_log("up").await?;
    // And what was told stays so.
    node.kill9()?;
    node.restart().await?;
    ensure!(container.is_running().await?);
    assert_eq!(gone(&running).await?.reason, "NodeReboot");
    ensure!(!told(&node).await?["rebooted"].as_bool().unwrap_or(true), "that was the start before");
    for pod in [&web, &host, &stopped] {
        pod.stop().await?;
        pod.remove().await?;
    }
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_boot_pods_are_told_as_gone_and_their_addresses_are_free() -> Result<()> {
    pods_of_an_earlier_boot(false).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_directory_that_outlives_the_boot_misleads_nobody() -> Result<()> {
    pods_of_an_earlier_boot(true).await
}

/// The largest file of a layer.
fn largest(dir: &Path) -> Result<(u64, PathBuf)> {
    let mut best = (0, PathBuf::new());
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let meta = path.symlink_metadata()?;
        if meta.is_dir() {
            best = best.max(largest(&path)?);
        } else if meta.is_file() {
            best = best.max((meta.len(), path));
        }
    }
    Ok(best)
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_power_cut_a_damaged_layer_is_found_and_its_image_pulled_again() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let other = Image::empty().layer(vec![Entry::file("data", 0o644, vec![7; 100_000])]).build()?;
    let other = node.load("test/other:1", &other).await?;
    let whole = node.images().await?;
    let spoil = |node: &Node| -> Result<()> {
        // Of the layer with the program, which is far larger.
        let (size, path) = largest(&node.path().join("root/layers"))?;
        ensure!(size > 500_000, "{}", path.display());
        let file = fs::File::options().write(true).open(&path)?;
        Ok(file.write_all_at(&[0; 4096], size / 2)?)
    };
    // An end in order and a crash without a boot are no reason to look.
    node.terminate()?;
    node.reboot(now(), false)?;
    node.restart().await?;
    let said = told(&node).await?;
    assert_eq!((&said["verification"], &said["rebooted"]), (&"not needed".into(), &true.into()));
    node.kill9()?;
    node.restart().await?;
    assert_eq!(told(&node).await?["verification"], "not needed");

    node.kill9()?;
    node.reboot(now(), false)?;
    node.restart().await?;
    let verified = async |node: &Node, wanted: &str| {
        eventually(Duration::from_secs(60), "the verification", async || {
            let said = told(node).await?;
            Ok(Look::when(said["verification"] == wanted, || said.to_string()))
        })
        .await
        .with_context(|| node.daemon_log(30))
    };
    verified(&node, "done").await?;
    assert_eq!(node.images().await?, whole, "all is well, and nothing changes");
    node.kill9()?;
    node.restart().await?;
    assert_eq!(told(&node).await?["verification"], "not needed", "once is enough");

    node.kill9()?;
    spoil(&node)?;
    node.reboot(now(), false)?;
    node.restart().await?;
    verified(&node, "done: damaged images were removed").await?;
    eventually(Duration::from_secs(30), "the image to be pulled again", async || {
        let images = node.images().await?;
        Ok(Look::when(images == whole, || format!("{images:?}, not {whole:?}")))
    })
    .await?;
    let log = fs::read_to_string(node.path().join("daemon.log"))?;
    for words in
        ["a layer is damaged: its image is removed and pulled again", "pulled again image="]
    {
        ensure!(log.contains(words), "not told: {words}");
    }
    let pod = node.pod("a").host_network().run().await?;
    let output = pod.container(&image).sh("echo whole").output().await?;
    assert_eq!(output, "whole");
    ensure!(node.image(&other).await?.is_some(), "the other image is not concerned");
    node.finish().await
}

/// The state went with the boot, and the database with the power: pods are nobody's any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_boot_that_finds_no_database_knows_its_images_and_leaks_nothing() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let baseline = node.inventory();
    let images = node.images().await?;
    let pod = node.pod("a").run().await?;
    pod.container(&image).sh("exec sleep 1000").start().await?;
    pod.container(&image).name("ended").sh("exit 3").start().await?.wait().await?;
    node.kill9()?;
    node.reboot(now(), false)?;
    // The log alone would be enough to mend it.
    fs::write(node.path().join("root/holdfast.db"), "torn by a power cut ".repeat(400))?;
    fs::remove_file(node.path().join("root/holdfast.db-wal"))?;
    node.restart().await?;
    assert_eq!(node.images().await?, images);
    ensure!(node.pods().await?.is_empty(), "nobody knows them any more");
    // Addresses, writable layers.
    node.nothing_left_since(&baseline).await?;
    let pod = node.pod("a").run().await?;
    assert_eq!(pod.container(&image).sh("echo up").output().await?, "up");
    node.finish().await
}

//! Checkpoint and restore by criu itself, where `criu check` ends well. Elsewhere each of these shows
//! that the node says so, and that nobody is disturbed; what the daemon makes of criu is shown by
//! `checkpoint.rs` everywhere.

use std::{collections::HashMap, fs, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{
    Container, Node, Pod,
    pod::ContainerBuilder,
    wait::{Look, eventually},
    with_each_runtime,
};
use holdfast_protos::cri;
use tonic::Code;

with_each_runtime! {
    a_container_goes_on_where_it_was
    a_terminal_and_a_pods_network_come_back
    a_whole_pod_goes_on_where_it_was
}

/// It counts in memory alone, and says so, in a file and on its output.
const COUNT: &str =
    "echo up; n=0; while :; do n=$((n+1)); echo $n > /count; echo n=$n; sleep 0.1; done";

/// Whether this node can: criu knows the kernel, and the OCI runtime is built with it.
fn works(runtime: &str) -> bool {
    let says = |program: &str, arg: &str| Command::new(program).arg(arg).output();
    let criu = says("criu", "check").is_ok_and(|output| output.status.success());
    let built = runtime != "crun"
        || says("crun", "--version")
            .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("+CRIU"));
    if criu && !built {
        println!("{runtime} is built without criu");
    }
    // On version 1 crun's restores would end everything on the node: we refuse them.
    let safe = runtime != "crun" || Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    criu && built && safe
}

async fn checkpoint(container: &Container, to: &Path) -> Result<(), tonic::Status> {
    let request = cri::CheckpointContainerRequest {
        container_id: container.id.clone(),
        location: to.display().to_string(),
        timeout: 60,
    };
    container.cri().runtime().checkpoint_container(request).await.map(drop)
}

async fn counted(container: &Container) -> Result<u64> {
    // The file is empty for a moment, each time.
    eventually(Duration::from_secs(5), "a number", async || {
        let text = container.sh("cat /count 2>/dev/null || true").await?;
        Ok(text.trim().parse().map_or_else(|_| Look::Not(text.clone()), Look::Done))
    })
    .await
}

async fn counts_beyond(container: &Container, than: u64) -> Result<u64> {
    eventually(Duration::from_secs(20), "it to count on", async || {
        let now = counted(container).await?;
        Ok(if now > than { Look::Done(now) } else { Look::Not(now.to_string()) })
    })
    .await
}

/// What a node says that cannot.
async fn refuses(container: &Container, archive: &Path) -> Result<()> {
    let error = checkpoint(container, archive).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    ensure!(
        ["install", "built without", "cgroup v2"].iter().any(|word| error.message().contains(word)),
        "{error}"
    );
    ensure!(!archive.exists(), "half an archive");
    let now = counted(container).await?;
    counts_beyond(container, now).await?;
    Ok(())
}

async fn a_container_goes_on_where_it_was(runtime: &str) -> Result<()> {
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let volume = node.path().join("volume");
    fs::create_dir(&volume)?;
    let describe = |pod: &Pod, image: &str| -> ContainerBuilder {
        pod.container(image).sh(COUNT).mount(&volume, "/data", |_| {})
    };
    let container = describe(&pod, &image).start().await?;
    counts_beyond(&container, 5).await?;
    container.sh("echo changed > /etc/motd; rm /bin/wc; echo shared > /dev/shm/x").await?;
    let archive = node.path().join("c.tar");
    if !works(runtime) {
        refuses(&container, &archive).await?;
        return node.finish().await;
    }
    checkpoint(&container, &archive).await?;
    let at = counted(&container).await?;
    // It was left running, and can be captured again.
    counts_beyond(&container, at).await?;
    checkpoint(&container, &archive).await?;
    let at = counted(&container).await?;
    container.stop(0).await?;
    container.remove().await?;

    let other = node.pod("b").host_network().run().await?;
    let restored = describe(&other, &archive.display().to_string()).start().await?;
    let now = counts_beyond(&restored, at).await?;
    ensure!(now < at + 600, "{now} after {at}");
    // Its memory and its root came back, and its output goes to the new log: it was not run anew.
    restored.wait_for_log(&format!("n={now}")).await?;
    ensure!(restored.log()?.iter().all(|line| line.text != "up"), "it began anew");
    assert_eq!(restored.sh("cat /etc/motd; cat /dev/shm/x").await?, "changed\nshared");
    restored.sh("! [ -e /bin/wc ]").await?;
    // It is a container as any other.
    node.kill9()?;
    node.restart().await?;
    let now = counted(&restored).await?;
    counts_beyond(&restored, now).await?;
    let again = node.path().join("again.tar");
    checkpoint(&restored, &again).await?;
    restored.sh("kill -9 1 2>/dev/null; true").await?;
    restored.stop(0).await?;
    assert_eq!(restored.status().await?.exit_code, 137);
    let third = other.container(&again.display().to_string()).name("third");
    let third = third.sh(COUNT).mount(&volume, "/data", |_| {}).start().await?;
    counts_beyond(&third, now).await?;
    node.finish().await
}

async fn a_terminal_and_a_pods_network_come_back(runtime: &str) -> Result<()> {
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").run().await?;
    let container = pod.container(&image).sh(COUNT).config(|c| c.tty = true).start().await?;
    counts_beyond(&container, 3).await?;
    let archive = node.path().join("c.tar");
    if !works(runtime) {
        refuses(&container, &archive).await?;
        return node.finish().await;
    }
    checkpoint(&container, &archive).await?;
    let at = counted(&container).await?;
    container.stop(0).await?;
    let other = node.pod("b").run().await?;
    let restored = other.container(&archive.display().to_string());
    let restored = restored.sh(COUNT).config(|c| c.tty = true).start().await?;
    let now = counts_beyond(&restored, at - 1).await?;
    restored.wait_for_log(&format!("n={now}")).await?;
    // The network is the new pod's.
    let address = restored.sh("ip -4 addr show eth0").await?;
    ensure!(address.contains(&other.ip().await?), "{address}");
    node.finish().await
}

async fn a_whole_pod_goes_on_where_it_was(runtime: &str) -> Result<()> {
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let mut containers = Vec::new();
    for name in ["one", "two"] {
        let container = pod.container(&image).name(name).sh(COUNT).start().await?;
        counts_beyond(&container, 3).await?;
        containers.push(container);
    }
    let to = node.path().join("pod");
    let request = cri::CheckpointPodRequest {
        pod_sandbox_id: pod.id.clone(),
        output_path: to.display().to_string(),
        ..Default::default()
    };
    let answer = node.cri().runtime().checkpoint_pod(request).await;
    if !works(runtime) {
        assert_eq!(answer.unwrap_err().code(), Code::FailedPrecondition);
        ensure!(!to.exists(), "half a checkpoint");
        return node.finish().await;
    }
    answer?;
    let mut at = HashMap::new();
    for (name, container) in ["one", "two"].into_iter().zip(&containers) {
        let count = counted(container).await?;
        at.insert(name.to_owned(), count);
        counts_beyond(container, count).await?;
    }
    pod.stop().await?;
    pod.remove().await?;
    let config = |name: &str| {
        let asked = pod.container(&image).name(name).sh(COUNT).request();
        asked.config.unwrap_or_default()
    };
    let restore = cri::RestorePodRequest {
        checkpoint_path: to.display().to_string(),
        config: node.pod("restored").host_network().request().config,
        container_configs: ["one", "two"].map(config).to_vec(),
        ..Default::default()
    };
    let restored = node.cri().runtime().restore_pod(restore).await?.into_inner();
    assert_eq!(restored.restored_containers.len(), 2);
    for made in &restored.restored_containers {
        let container = Container::existing(node.cri(), &made.container_id);
        assert_eq!(container.status().await?.state(), cri::ContainerState::ContainerCreated);
        container.start().await?;
        let at = *at.get(&made.name).context("a container that was captured")?;
        counts_beyond(&container, at).await?;
    }
    node.finish().await
}

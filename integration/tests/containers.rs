//! Containers as the kubelet handles them: again and again, in any order, with filters.

use std::{fs, time::Duration};

use anyhow::{Result, ensure};
use holdfast_integration::{Container, Node, node::on, wait::Look};
use holdfast_protos::cri;
use tonic::Code;

async fn list(node: &Node, filter: cri::ContainerFilter) -> Result<Vec<String>> {
    let request = cri::ListContainersRequest { filter: Some(filter) };
    let containers = node.cri().runtime().list_containers(request).await?.into_inner().containers;
    let mut names: Vec<String> =
        containers.into_iter().map(|c| c.metadata.unwrap_or_default().name).collect();
    names.sort();
    Ok(names)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_goes_through_its_states() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let before = node.inventory();
    let container = pod
        .container(&image)
        .sh("exec sleep 1000")
        .label("app", "x")
        .config(|c| {
            c.annotations.insert("note".into(), "kept".into());
        })
        .create()
        .await?;
    let status = container.status().await?;
    assert_eq!(status.state(), cri::ContainerState::ContainerCreated);
    ensure!(status.created_at > 0 && status.started_at == 0 && status.finished_at == 0);
    assert_eq!(status.labels["app"], "x");
    assert_eq!(status.annotations["note"], "kept");
    assert_eq!(status.log_path, container.log_path().display().to_string());
    ensure!(status.image_id.starts_with("sha256:"), "{status:?}");
    ensure!(!status.image_ref.is_empty(), "{status:?}");
    assert_eq!(status.image.unwrap_or_default().image, image);
    container.start().await?;
    let status = container.status().await?;
    assert_eq!(status.state(), cri::ContainerState::ContainerRunning);
    ensure!(status.started_at >= status.created_at && status.finished_at == 0, "{status:?}");
    // Again: done already, or refused; in no case a second process.
    if let Err(error) = container.start().await {
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    }
    assert_eq!(container.status().await?.started_at, status.started_at);
    container.stop(0).await?;
    let status = container.status().await?;
    assert_eq!(status.state(), cri::ContainerState::ContainerExited);
    ensure!(status.finished_at >= status.started_at, "{status:?}");
    assert_eq!(container.start().await.unwrap_err().code(), Code::FailedPrecondition);
    for _ in 0..2 {
        container.remove().await?;
        assert_eq!(container.status().await.unwrap_err().code(), Code::NotFound);
        container.stop(0).await?;
    }
    ensure!(container.log_path().exists(), "the log is the kubelet's to remove");
    node.nothing_left_since(&before).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_not_found_or_done() -> Result<()> {
    let node = Node::start().await?;
    for id in ["f".repeat(64), "short".into(), "../../etc".into()] {
        let nobody = Container::existing(node.cri(), &id);
        nobody.stop(0).await?;
        nobody.remove().await?;
        for error in [
            nobody.status().await.unwrap_err(),
            nobody.start().await.unwrap_err(),
            nobody.stats().await.unwrap_err(),
            nobody.exec_sync(&["true"], 1).await.unwrap_err(),
        ] {
            assert_eq!(error.code(), Code::NotFound, "{id:?}: {error}");
        }
    }
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_container_is_made_once() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let build = || pod.container(&image).sh("exec sleep 1000");
    let creates = (0..6).map(|_| build().create());
    let made = futures::future::try_join_all(creates).await?;
    ensure!(made.iter().all(|container| container.id == made[0].id), "{made:?}");
    let next = build().attempt(1).create().await?;
    assert_ne!(next.id, made[0].id);
    assert_eq!(node.containers().await?.len(), 2);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_filtered_by_id_state_pod_and_labels() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let one = node.pod("one").host_network().run().await?;
    let two = node.pod("two").host_network().run().await?;
    let runs = one.container(&image).name("runs").sh("exec sleep 1000").label("k", "v");
    let runs = runs.start().await?;
    one.container(&image).name("created").sh("true").create().await?;
    two.container(&image).name("exited").sh("true").label("k", "v").start().await?.wait().await?;
    let state = |state: cri::ContainerState| cri::ContainerFilter {
        state: Some(cri::ContainerStateValue { state: state.into() }),
        ..Default::default()
    };
    assert_eq!(list(&node, Default::default()).await?, ["created", "exited", "runs"]);
    assert_eq!(list(&node, state(cri::ContainerState::ContainerRunning)).await?, ["runs"]);
    assert_eq!(list(&node, state(cri::ContainerState::ContainerCreated)).await?, ["created"]);
    assert_eq!(list(&node, state(cri::ContainerState::ContainerExited)).await?, ["exited"]);
    let of = |pod: &str| cri::ContainerFilter { pod_sandbox_id: pod.into(), ..Default::default() };
    assert_eq!(list(&node, of(&one.id)).await?, ["created", "runs"]);
    assert_eq!(list(&node, of(&two.id)).await?, ["exited"]);
    let label = cri::ContainerFilter {
        label_selector: [("k".to_owned(), "v".to_owned())].into(),
        ..Default::default()
    };
    assert_eq!(list(&node, label).await?, ["exited", "runs"]);
    let id = cri::ContainerFilter { id: runs.id[..10].into(), ..Default::default() };
    assert_eq!(list(&node, id).await?, ["runs"]);
    let request = cri::ListContainerStatsRequest {
        filter: Some(cri::ContainerStatsFilter {
            pod_sandbox_id: one.id.clone(),
            ..Default::default()
        }),
    };
    let stats = node.cri().runtime().list_container_stats(request).await?.into_inner().stats;
    let ids: Vec<String> = stats.into_iter().map(|s| s.attributes.unwrap_or_default().id).collect();
    ensure!(ids.contains(&runs.id), "{ids:?}");
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_container_can_be_removed_and_its_pod_lives_on() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").run().await?;
    let before = node.inventory();
    let container = pod.container(&image).sh("sleep 1000 & sleep 1001 & wait").start().await?;
    container.remove().await?;
    node.nothing_left_since(&before).await?;
    assert_eq!(pod.status().await?.state(), cri::PodSandboxState::SandboxReady);
    assert_eq!(pod.container(&image).attempt(1).sh("echo again").output().await?, "again");
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_with_a_long_grace_can_be_overtaken() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod
        .container(&image)
        .sh("trap '' TERM; echo up; while :; do sleep 0.1; done")
        .start()
        .await?;
    container.wait_for_log("up").await?;
    let patient = container.clone();
    let patient = tokio::spawn(async move { patient.stop(600).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    // The owner is not kept by it: everything else works, and a shorter grace wins.
    assert_eq!(container.sh("echo still here").await?, "still here");
    container.stop(0).await?;
    tokio::time::timeout(Duration::from_secs(10), patient).await???;
    assert_eq!(container.status().await?.exit_code, 137);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_stops_with_a_container_whose_children_ignore_it() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let before = node.inventory();
    // With a shared PID namespace the end of a container does not end its children by itself.
    let pod = node.pod("a").shared_pids().run().await?;
    let script =
        "trap '' TERM; (trap '' TERM; sleep 1000) & (trap '' TERM; sleep 1000) & echo up; wait";
    let container = pod.container(&image).sh(script).start().await?;
    container.wait_for_log("up").await?;
    pod.stop().await?;
    pod.remove().await?;
    node.nothing_left_since(&before).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_of_logs_does_not_stall_the_workload() -> Result<()> {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let small = node.path().join("small");
    fs::create_dir(&small)?;
    mount(Some("none"), &small, Some("tmpfs"), MsFlags::empty(), Some("size=256k"))?;
    let pod = node
        .pod("a")
        .host_network()
        .config(|config| config.log_directory = small.display().to_string())
        .run()
        .await?;
    let progress = node.path().join("progress");
    fs::create_dir(&progress)?;
    let container = pod
        .container(&image)
        .sh("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); echo line $i of a log that fills the disk; \
             done; touch /progress/done; exec sleep 1000")
        .mount(&progress, "/progress", |_| {})
        .start()
        .await?;
    on(&node, Duration::from_secs(30), "the workload to go on", async || {
        Ok(Look::when(progress.join("done").exists(), || "it stands still".into()))
    })
    .await?;
    ensure!(container.is_running().await?);
    // With no byte free it can be stopped and removed.
    pod.stop().await?;
    pod.remove().await?;
    umount2(&small, MntFlags::MNT_DETACH)?;
    node.finish().await
}

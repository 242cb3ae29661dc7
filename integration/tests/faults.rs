//! Programs that hang, fail or die. Only the pod that needs them waits.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use holdfast_integration::{Node, node::on, wait::Look};
use holdfast_protos::cri;

/// What a read may take while something else hangs. The bar is far lower; this is for a debug build on
/// a busy machine.
const PROMPT: Duration = Duration::from_secs(1);

async fn reads_are_prompt(node: &Node) -> Result<()> {
    let begun = Instant::now();
    node.pods().await?;
    node.containers().await?;
    node.images().await?;
    node.status(false).await?;
    for pod in node.pods().await? {
        holdfast_integration::Pod::existing(node.cri(), &pod.id).status().await?;
    }
    let took = begun.elapsed();
    println!("four lists and every pod's status while something hangs: {took:?}");
    ensure!(took < PROMPT, "reads took {took:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_runtime_blocks_no_list_and_the_retry_joins() -> Result<()> {
    let mut node = Node::builder().gated_runtime().start().await?;
    let image = node.busybox().await?;
    let other = node.pod("other").host_network().run().await?;
    let lives = other.container(&image).sh("exec sleep 1000").start().await?;
    let pod = node.pod("a").host_network().run().await?;
    let gate = node.gated_runtime();
    gate.hang("create")?;
    let create = pod.container(&image).sh("echo up; exec sleep 1000");
    let error = create.clone().deadline(Duration::from_secs(1)).create().await.unwrap_err();
    ensure!(
        matches!(error.code(), tonic::Code::DeadlineExceeded | tonic::Code::Cancelled),
        "{error}"
    );
    on(&node, Duration::from_secs(5), "the runtime to be called", async || {
        Ok(Look::when(gate.hung("create") == 1, || "it was not".into()))
    })
    .await?;
    reads_are_prompt(&node).await?;
    // Another pod is not concerned, except by the same runtime.
    assert_eq!(lives.sh("echo fine").await?, "fine");
    // Two retries at once join the work that goes on; nothing is made twice.
    let retries = [create.clone().create(), create.clone().create()];
    let retries = tokio::spawn(futures::future::join_all(retries));
    tokio::time::sleep(Duration::from_millis(500)).await;
    ensure!(!retries.is_finished(), "a retry did not wait");
    reads_are_prompt(&node).await?;
    gate.release()?;
    let ids: Vec<String> =
        retries.await?.into_iter().map(|result| result.map(|c| c.id)).collect::<Result<_, _>>()?;
    assert_eq!(ids[0], ids[1]);
    let containers = node.containers().await?;
    assert_eq!(containers.iter().filter(|c| c.id == ids[0]).count(), 1);
    assert_eq!(containers.len(), 2);
    assert_eq!(gate.calls("create"), 2, "the other pod's and this one's");
    // And what was made is a container as any other.
    let container = create.create().await?;
    assert_eq!(container.id, ids[0]);
    container.start().await?;
    container.wait_for_log("up").await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_never_answers_is_given_up_and_leaves_nothing() -> Result<()> {
    let mut node =
        Node::builder().gated_runtime().runtime_config("timeout = \"3s\"").start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let before = node.inventory();
    node.gated_runtime().hang("create")?;
    let begun = Instant::now();
    let error = pod.container(&image).sh("exec sleep 1000").create().await.unwrap_err();
    ensure!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error}");
    ensure!(error.message().contains("create"), "{error}");
    node.gated_runtime().release()?;
    node.nothing_left_since(&before).await?;
    // The name is free at once.
    pod.container(&image).sh("exec sleep 1000").start().await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_create_says_why_and_leaves_nothing() -> Result<()> {
    let mut node = Node::builder().gated_runtime().start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let before = node.inventory();
    let gate = node.gated_runtime();
    gate.fail("create", "no more rope")?;
    let error = pod.container(&image).create().await.unwrap_err();
    ensure!(error.message().contains("no more rope"), "{error}");
    ensure!(!error.message().contains('\n'), "{error}");
    node.nothing_left_since(&before).await?;
    gate.release()?;
    // It did create, and failed to say so.
    gate.die_after("create")?;
    pod.container(&image).sh("exec sleep 1000").create().await.unwrap_err();
    gate.release()?;
    node.nothing_left_since(&before).await?;
    assert!(node.containers().await?.is_empty());
    // A start that fails is an exited container, which the kubelet reads and removes.
    let container = pod.container(&image).sh("exec sleep 1000").create().await?;
    gate.fail("start", "the anchor is stuck")?;
    let error = container.start().await.unwrap_err();
    ensure!(error.message().contains("the anchor is stuck"), "{error}");
    gate.release()?;
    let status = container.status().await?;
    assert_eq!(status.state(), cri::ContainerState::ContainerExited, "{status:?}");
    container.remove().await?;
    node.nothing_left_since(&before).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_cni_plugin_blocks_no_list_and_the_retry_joins() -> Result<()> {
    let mut node = Node::builder().gated_cni().start().await?;
    let image = node.busybox().await?;
    let gate = node.gated_cni();
    gate.hang("ADD")?;
    let builder = node.pod("a");
    let error = builder.clone().deadline(Duration::from_secs(1)).run().await.unwrap_err();
    ensure!(
        matches!(error.code(), tonic::Code::DeadlineExceeded | tonic::Code::Cancelled),
        "{error}"
    );
    on(&node, Duration::from_secs(5), "the plugin to be called", async || {
        Ok(Look::when(gate.hung("ADD") == 1, || "it was not".into()))
    })
    .await?;
    reads_are_prompt(&node).await?;
    // Pods on the node's network need no plugin.
    let host = node.pod("host").host_network().run().await?;
    assert_eq!(host.container(&image).sh("echo fine").output().await?, "fine");
    let retries = [builder.clone().run(), builder.clone().run()];
    let retries = tokio::spawn(futures::future::join_all(retries));
    tokio::time::sleep(Duration::from_millis(500)).await;
    ensure!(!retries.is_finished(), "a retry did not wait");
    gate.release()?;
    let pods: Vec<_> = retries.await?.into_iter().collect::<Result<_, _>>()?;
    assert_eq!(pods[0].id, pods[1].id);
    assert_eq!(gate.calls("ADD"), 1, "two networks for one pod");
    ensure!(!pods[0].ip().await?.is_empty());
    // Once more: it is there, and the answer is the same.
    assert_eq!(builder.run().await?.id, pods[0].id);
    assert_eq!(node.pods().await?.len(), 2);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_network_says_why_and_leaves_nothing() -> Result<()> {
    let mut node = Node::builder().gated_cni().start().await?;
    let image = node.busybox().await?;
    let before = node.inventory();
    let gate = node.gated_cni();
    gate.fail("ADD", r#"{"cniVersion":"1.0.0","code":11,"msg":"the harbour is full"}"#)?;
    let error = node.pod("a").run().await.unwrap_err();
    ensure!(error.message().contains("the harbour is full"), "{error}");
    assert!(node.pods().await?.is_empty());
    node.nothing_left_since(&before).await?;
    gate.release()?;
    // It did attach, and failed to say so: the address must not stay taken.
    gate.die_after("ADD")?;
    node.pod("a").run().await.unwrap_err();
    gate.release()?;
    node.nothing_left_since(&before).await?;
    let pod = node.pod("a").run().await?;
    assert_eq!(pod.container(&image).sh("echo fine").output().await?, "fine");
    // A DEL that fails does not keep the containers alive, and is tried again.
    gate.fail("DEL", r#"{"cniVersion":"1.0.0","code":11,"msg":"no way out"}"#)?;
    let error = pod.stop().await.unwrap_err();
    ensure!(error.message().contains("no way out"), "{error}");
    gate.release()?;
    pod.stop().await?;
    pod.remove().await?;
    node.nothing_left_since(&before).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_never_answers_is_given_up_and_its_address_freed() -> Result<()> {
    let mut node = Node::builder().gated_cni().network_config("timeout = \"2s\"").start().await?;
    node.busybox().await?;
    let before = node.inventory();
    let gate = node.gated_cni();
    gate.hang("ADD")?;
    let begun = Instant::now();
    let error = node.pod("a").run().await.unwrap_err();
    ensure!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error}");
    gate.release()?;
    node.nothing_left_since(&before).await?;
    node.pod("a").run().await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_while_a_plugin_runs_the_address_is_given_back() -> Result<()> {
    let mut node = Node::builder().gated_cni().start().await?;
    node.busybox().await?;
    let before = node.inventory();
    // Attached, and killed before the answer: the record that was written before is the only trace.
    node.gated_cni().hang("ADD")?;
    let builder = node.pod("a");
    let run = tokio::spawn(builder.clone().run());
    on(&node, Duration::from_secs(10), "the plugin to be called", async || {
        Ok(Look::when(node.gated_cni().hung("ADD") == 1, || "it was not".into()))
    })
    .await?;
    node.kill9()?;
    ensure!(run.await?.is_err());
    node.gated_cni().release()?;
    node.restart().await?;
    // The kubelet asks again, and gets a pod; or does not, and nothing stays.
    let pod = builder.run().await?;
    assert_eq!(node.pods().await?.len(), 1);
    pod.stop().await?;
    pod.remove().await?;
    node.nothing_left_since(&before).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_exec_does_not_keep_a_container_from_stopping() -> Result<()> {
    let mut node = Node::builder().gated_runtime().start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh("exec sleep 1000").start().await?;
    node.gated_runtime().hang("exec")?;
    let error = container.exec_sync(&["true"], 1).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error}");
    let begun = Instant::now();
    container.stop(0).await?;
    ensure!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    node.gated_runtime().release()?;
    node.finish().await
}

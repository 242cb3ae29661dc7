//! Pods as the kubelet handles them: again and again, in any order, with filters.

use anyhow::{Result, ensure};
use holdfast_integration::{Node, Pod, node::Cni};
use holdfast_protos::cri;
use tonic::Code;

async fn list(node: &Node, filter: cri::PodSandboxFilter) -> Result<Vec<String>> {
    let request = cri::ListPodSandboxRequest { filter: Some(filter) };
    let items = node.cri().runtime().list_pod_sandbox(request).await?.into_inner().items;
    let mut names: Vec<String> =
        items.into_iter().map(|pod| pod.metadata.unwrap_or_default().name).collect();
    names.sort();
    Ok(names)
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_and_removing_can_be_repeated() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let before = node.inventory();
    let pod = node.pod("a").run().await?;
    let container = pod.container(&image).sh("exec sleep 1000").start().await?;
    for _ in 0..2 {
        pod.stop().await?;
        assert_eq!(pod.status().await?.state(), cri::PodSandboxState::SandboxNotready);
        let status = container.status().await?;
        assert_eq!(status.state(), cri::ContainerState::ContainerExited, "{status:?}");
    }
    for _ in 0..2 {
        pod.remove().await?;
        assert_eq!(pod.status().await.unwrap_err().code(), Code::NotFound);
        assert_eq!(container.status().await.unwrap_err().code(), Code::NotFound);
    }
    // What has never been is as good as stopped and removed.
    let unknown = Pod::existing(node.cri(), &"f".repeat(64));
    unknown.stop().await?;
    unknown.remove().await?;
    assert_eq!(unknown.status().await.unwrap_err().code(), Code::NotFound);
    // A running pod can be removed at once.
    let pod = node.pod("b").run().await?;
    pod.container(&image).sh("exec sleep 1000").start().await?;
    pod.remove().await?;
    node.nothing_left_since(&before).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_pod_is_made_once() -> Result<()> {
    let node = Node::start().await?;
    let pod = node.pod("a").host_network().run().await?;
    assert_eq!(node.pod("a").host_network().run().await?.id, pod.id);
    let second = node.pod("a").host_network().attempt(1).run().await?;
    assert_ne!(second.id, pod.id);
    // Many at once.
    let runs = (0..8).map(|_| node.pod("b").run());
    let pods = futures::future::try_join_all(runs).await?;
    ensure!(pods.iter().all(|pod| pod.id == pods[0].id), "{pods:?}");
    assert_eq!(node.pods().await?.len(), 3);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_filtered_by_id_state_and_labels() -> Result<()> {
    let node = Node::start().await?;
    let a = node.pod("a").host_network().label("app", "web").label("tier", "front").run().await?;
    let b = node.pod("b").host_network().label("app", "web").run().await?;
    node.pod("c").host_network().run().await?;
    b.stop().await?;
    let labels = |pairs: &[(&str, &str)]| cri::PodSandboxFilter {
        label_selector: pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        ..Default::default()
    };
    let state = |state: cri::PodSandboxState| cri::PodSandboxFilter {
        state: Some(cri::PodSandboxStateValue { state: state.into() }),
        ..Default::default()
    };
    let id = |id: &str| cri::PodSandboxFilter { id: id.into(), ..Default::default() };
    assert_eq!(list(&node, cri::PodSandboxFilter::default()).await?, ["a", "b", "c"]);
    assert_eq!(list(&node, labels(&[("app", "web")])).await?, ["a", "b"]);
    assert_eq!(list(&node, labels(&[("app", "web"), ("tier", "front")])).await?, ["a"]);
    assert!(list(&node, labels(&[("app", "other")])).await?.is_empty());
    assert_eq!(list(&node, state(cri::PodSandboxState::SandboxReady)).await?, ["a", "c"]);
    assert_eq!(list(&node, state(cri::PodSandboxState::SandboxNotready)).await?, ["b"]);
    assert_eq!(list(&node, id(&a.id)).await?, ["a"]);
    assert_eq!(list(&node, id(&a.id[..13])).await?, ["a"]);
    assert!(list(&node, id(&"f".repeat(64))).await?.is_empty());
    let both =
        cri::PodSandboxFilter { id: b.id.clone(), ..state(cri::PodSandboxState::SandboxReady) };
    assert!(list(&node, both).await?.is_empty());

    let status = a.status().await?;
    assert_eq!(status.labels["tier"], "front");
    assert_eq!(status.metadata, a.config().metadata);
    assert_eq!(status.runtime_handler, "");
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn annotations_and_the_handler_are_told_again() -> Result<()> {
    let node = Node::start().await?;
    let pod = node
        .pod("a")
        .host_network()
        .runtime("runc")
        .config(|config| {
            config.annotations.insert("example.com/note".into(), "with spaces, and ünïcode".into());
        })
        .run()
        .await?;
    let status = pod.status().await?;
    assert_eq!(status.annotations["example.com/note"], "with spaces, and ünïcode");
    assert_eq!(status.runtime_handler, "runc");
    let listed = node.pods().await?.remove(0);
    assert_eq!(listed.annotations, status.annotations);
    assert_eq!(listed.created_at, status.created_at);
    let options = status.linux.unwrap_or_default().namespaces.unwrap_or_default().options;
    assert_eq!(options.unwrap_or_default().network(), cri::NamespaceMode::Node);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_a_network_says_so_and_runs_host_pods() -> Result<()> {
    let mut node = Node::builder().cni(Cni::None).start().await?;
    let image = node.busybox().await?;
    let conditions = node.status(false).await?.status.unwrap_or_default().conditions;
    let network = conditions.iter().find(|c| c.r#type == "NetworkReady").unwrap();
    ensure!(!network.status && !network.message.is_empty(), "{network:?}");
    let host = node.pod("host").host_network().run().await?;
    assert_eq!(host.container(&image).sh("echo fine").output().await?, "fine");
    let before = node.inventory();
    let error = node.pod("pod").run().await.unwrap_err();
    ensure!(error.message().contains("net.d"), "{error}");
    node.nothing_left_since(&before).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_built_says_so() -> Result<()> {
    let node = Node::start().await?;
    let mut runtime = node.cri().runtime();
    // No fake success: whoever is not built yet answers UNIMPLEMENTED, and a built one something of
    // its own about an object that is not there.
    let id = "f".repeat(64);
    let not_here =
        |code: Code| matches!(code, Code::Unimplemented | Code::NotFound | Code::InvalidArgument);
    let exec = cri::ExecRequest {
        container_id: id.clone(),
        cmd: vec!["true".into()],
        stdout: true,
        ..Default::default()
    };
    let attach =
        cri::AttachRequest { container_id: id.clone(), stdout: true, ..Default::default() };
    let forward = cri::PortForwardRequest { pod_sandbox_id: id.clone(), port: vec![80] };
    let checkpoint = cri::CheckpointContainerRequest {
        container_id: id.clone(),
        location: "/tmp/x".into(),
        timeout: 1,
    };
    let answers = [
        ("Exec", runtime.exec(exec).await.err().map(|e| e.code())),
        ("Attach", runtime.attach(attach).await.err().map(|e| e.code())),
        ("PortForward", runtime.port_forward(forward).await.err().map(|e| e.code())),
        (
            "CheckpointContainer",
            runtime.checkpoint_container(checkpoint).await.err().map(|e| e.code()),
        ),
        (
            "CheckpointPod",
            runtime
                .checkpoint_pod(cri::CheckpointPodRequest {
                    pod_sandbox_id: id.clone(),
                    output_path: "/tmp/x".into(),
                    ..Default::default()
                })
                .await
                .err()
                .map(|e| e.code()),
        ),
        (
            "RestorePod",
            runtime.restore_pod(cri::RestorePodRequest::default()).await.err().map(|e| e.code()),
        ),
        (
            "UpdatePodSandboxResources",
            runtime
                .update_pod_sandbox_resources(cri::UpdatePodSandboxResourcesRequest {
                    pod_sandbox_id: id,
                    ..Default::default()
                })
                .await
                .err()
                .map(|e| e.code()),
        ),
    ];
    for (name, code) in answers {
        ensure!(code.is_some_and(not_here), "{name} answered {code:?}");
    }
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn many_pods_come_and_go_at_once() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let before = node.inventory();
    let rounds = (0..12).map(|number| {
        let (node, image) = (&node, &image);
        async move {
            let pod = node.pod(&format!("p{number}")).run().await?;
            let text = pod.container(image).sh("hostname").output().await?;
            ensure!(text == format!("p{number}"), "{text}");
            let ip = pod.ip().await?;
            pod.stop().await?;
            pod.remove().await?;
            Ok(ip)
        }
    });
    let mut ips = futures::future::try_join_all(rounds).await?;
    ips.sort();
    ips.dedup();
    ensure!(ips.len() > 1, "{ips:?}");
    node.nothing_left_since(&before).await?;
    node.finish().await
}

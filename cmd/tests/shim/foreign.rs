//! Our client with a shim that is not ours. Which one says the environment:
//! `HOLDFAST_TEST_FOREIGN_SHIM=/usr/bin/containerd-shim-runc-v2 cargo test … foreign -- --ignored`.

use std::time::Duration;

use holdfast_shim::{
    client::{Client, ErrorKind, TaskStatus},
    events::Event,
    options::PodOptions,
};

use crate::node::{Fifos, Node, Oci, PATIENCE, process, soon};

#[tokio::test]
#[ignore = "needs a foreign shim, named by HOLDFAST_TEST_FOREIGN_SHIM"]
async fn a_foreign_shim_is_driven() {
    let binary = std::env::var_os("HOLDFAST_TEST_FOREIGN_SHIM").expect("the foreign shim");
    let node = Node::new(Oci::Runc);
    // For its helpers only; the container is the foreign shim's.
    let pod = node.pod("pod", PodOptions::default()).await;
    let fifos = Fifos::new(&node.path("f"));
    let mut container = pod.sh("c1", "echo from a foreign shim; sleep 0.5; exit 8");
    container.stdout = Some(fifos.path("out"));
    container.stderr = Some(fifos.path("err"));
    container.write();
    let mut command = node.command("c1", container.bundle.dir());
    command.binary = binary.into();
    let _log = command.open_log().unwrap();
    let endpoint = command.start(PATIENCE).await.unwrap();
    let client = Client::connect(&endpoint, PATIENCE).await.unwrap();
    let reads = fifos.read();
    client.create(container.task()).await.unwrap();
    let pid = client.start("c1", "").await.unwrap();
    assert_eq!(client.state("c1", "").await.unwrap().status, TaskStatus::Running);
    assert!(client.pids("c1").await.unwrap().contains(&pid));
    let exec = Fifos::new(&node.path("x"));
    client.exec("c1", "e", exec.task(process(&["/bin/echo", "exec"]))).await.unwrap();
    let exec_reads = exec.read();
    client.start("c1", "e").await.unwrap();
    assert_eq!(soon("the exec's end", client.wait("c1", "e")).await.unwrap().status, 0);
    client.delete("c1", "e").await.unwrap();
    assert_eq!(soon("output", exec_reads).await.unwrap().0, "exec\n");
    assert_eq!(soon("the end", client.wait("c1", "")).await.unwrap().status, 8);
    let sandbox = client.ping_sandbox("c1").await.unwrap_err();
    assert_eq!(sandbox.kind(), ErrorKind::Unimplemented, "{sandbox}");
    assert_eq!(client.delete("c1", "").await.unwrap().status, 8);
    assert_eq!(soon("output", reads).await.unwrap().0, "from a foreign shim\n");
    node.event("its exit", |event| matches!(event, Event::Exit { status: 8, .. })).await;
    let closed = client.closed();
    let _ = client.with_deadline(Duration::from_secs(3)).shutdown("c1", false).await;
    soon("the shim's end", closed).await;
    command.delete(PATIENCE).await.unwrap();
    pod.client.shutdown_sandbox("pod").await.unwrap();
}

//! What every pod goes through.

use std::{fs, path::Path};

use holdfast_shim::{
    bundle::{Exit, ExitRecord, Namespace},
    client::{ErrorKind, TaskStatus},
    events::Event,
    options::PodOptions,
};

use crate::node::{Node, Oci, soon, until};

fn own() -> PodOptions {
    PodOptions {
        net: true,
        ipc: true,
        uts: true,
        hostname: "web-0".into(),
        ..PodOptions::default()
    }
}

/// One test per runtime.
macro_rules! for_each_runtime {
    ($($name:ident)*) => {
        mod runc {
            $(#[tokio::test] async fn $name() { super::$name(crate::node::Oci::Runc).await; })*
        }
        mod crun {
            $(#[tokio::test] async fn $name() { super::$name(crate::node::Oci::Crun).await; })*
        }
    };
}
pub(crate) use for_each_runtime;

for_each_runtime! {
    a_pod_lives_and_leaves_nothing
    execs_tell_their_true_exit_codes
}

async fn a_pod_lives_and_leaves_nothing(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", own()).await;
    for kind in [Namespace::Net, Namespace::Ipc, Namespace::Uts] {
        let pinned = fs::metadata(pod.bundle.namespace(kind)).unwrap();
        let ours = fs::metadata(format!("/proc/self/ns/{}", kind.name())).unwrap();
        use std::os::unix::fs::MetadataExt as _;
        assert_ne!(pinned.ino(), ours.ino(), "{kind:?} is the pod's own");
    }
    let container = pod
        .sh("c1", "hostname; ip addr show lo | head -n 1; echo to stderr >&2; exit 42")
        .namespace("network", Some(&pod.bundle.namespace(Namespace::Net)))
        .namespace("uts", Some(&pod.bundle.namespace(Namespace::Uts)))
        .namespace("ipc", Some(&pod.bundle.namespace(Namespace::Ipc)))
        .start()
        .await;
    let ended = container.wait().await;
    assert_eq!(ended.status, 42);
    let out = container.lines("stdout");
    assert_eq!(out[0], "web-0");
    assert!(out[1].contains("LOOPBACK,UP"), "{out:?}");
    assert_eq!(container.lines("stderr"), ["to stderr"]);

    let record = ExitRecord::load(container.bundle.exit_record()).unwrap().unwrap();
    assert_eq!((record.status, record.oom_killed), (Exit::Code(42), false));
    assert_eq!(record.at, ended.at);
    let state = pod.client.state("c1", "").await.unwrap();
    assert_eq!(state.status, TaskStatus::Stopped);
    assert_eq!(container.delete().await.status, 42);
    assert_eq!(pod.client.state("c1", "").await.unwrap_err().kind(), ErrorKind::NotFound);

    node.event("the delete event", |event| matches!(event, Event::Delete { .. })).await;
    let order: Vec<_> = node
        .events()
        .into_iter()
        .map(|event| match event {
            Event::Create { .. } => "create",
            Event::Start { .. } => "start",
            Event::Exit { status: 42, .. } => "exit",
            Event::Delete { status: 42, .. } => "delete",
            _ => "other",
        })
        .collect();
    assert_eq!(order, ["create", "start", "exit", "delete"]);

    pod.client.stop_sandbox("pod", std::time::Duration::ZERO).await.unwrap();
    let closed = pod.client.closed();
    pod.client.shutdown_sandbox("pod").await.unwrap();
    soon("the shim's end", closed).await;
    until("the process to go", || {
        (!Path::new(&format!("/proc/{}", pod.pid)).exists()).then_some(())
    })
    .await;
    assert!(node.mounts().is_empty(), "{:?}", node.mounts());
    assert!(node.cgroups().is_empty(), "{:?}", node.cgroups());
    assert_eq!(fs::read_dir(node.path("s")).unwrap().count(), 0, "no socket is left");
    assert!(!pod.bundle.namespaces().exists() && !pod.bundle.io_socket().exists());
}

async fn execs_tell_their_true_exit_codes(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", PodOptions::default()).await;
    let container = pod.sh("c1", "sleep 1000").start().await;
    let (ended, out, err) =
        container.exec("e1", &["/bin/sh", "-c", "echo out; echo err >&2; exit 7"]).await;
    assert_eq!((ended.status, out.as_str(), err.as_str()), (7, "out\n", "err\n"));
    // As short as an exec can be, and many at once.
    let all = (0..20).map(|n| {
        let (container, id) = (&container, format!("short{n}"));
        async move { container.exec(&id, &["/bin/sh", "-c", &format!("exit {n}")]).await.0.status }
    });
    let codes = futures_join(all).await;
    assert_eq!(codes, (0..20).collect::<Vec<u32>>());
    let (ended, ..) = container.exec("sig", &["/bin/sh", "-c", "kill -9 $$"]).await;
    assert_eq!(ended.status, 137);
    container.kill(15).await;
    // A shell without a handler as pid 1 ignores SIGTERM.
    container.kill(9).await;
    assert_eq!(container.wait().await.status, 137);
    container.delete().await;
}

async fn futures_join<T>(all: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut done = Vec::new();
    let mut all: Vec<_> = all.map(Box::pin).collect();
    std::future::poll_fn(|cx| {
        use std::task::Poll;
        if done.is_empty() {
            done.extend(all.iter().map(|_| None));
        }
        for (slot, work) in done.iter_mut().zip(&mut all) {
            if slot.is_none()
                && let Poll::Ready(value) = work.as_mut().poll(cx)
            {
                *slot = Some(value);
            }
        }
        if done.iter().all(Option::is_some) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    done.into_iter().flatten().collect()
}

//! Something never answers: a file server, a shim that is stopped, a process in the kernel. Only who
//! needs it waits; nobody is taken for dead for being slow; and when it answers again all is as before.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{
    Node, Pod, eventually, fuse::DeadServer, ground::is_zombie, node::on, wait::Look,
};
use holdfast_protos::cri;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tonic::Code;

/// What anything that is not concerned may take. The bar is 100 ms, and `make bench` measures it; this
/// is for a debug build on a busy machine.
const PROMPT: Duration = Duration::from_secs(2);
/// A caller that gives up.
const IMPATIENT: Duration = Duration::from_secs(1);

/// Every read of the CRI, and the life of another pod, while something hangs.
async fn the_rest_goes_on(node: &Node, image: &str, name: &str) -> Result<()> {
    let mut slow = Vec::new();
    let mut longest = (Duration::ZERO, String::new());
    let mut timed = |what: &str, begun: Instant| {
        if begun.elapsed() > longest.0 {
            longest = (begun.elapsed(), what.to_owned());
        }
        if begun.elapsed() > PROMPT {
            slow.push(format!("{what} took {:?}", begun.elapsed()));
        }
    };
    let begun = Instant::now();
    let pods = node.pods().await?;
    node.containers().await?;
    node.images().await?;
    node.status(true).await?;
    timed("lists", begun);
    for pod in pods {
        let begun = Instant::now();
        Pod::existing(node.cri(), &pod.id).status().await?;
        timed("a pod's status", begun);
    }
    for container in node.containers().await? {
        let begun = Instant::now();
        holdfast_integration::Container::existing(node.cri(), &container.id).status().await?;
        timed("a container's status", begun);
    }
    let begun = Instant::now();
    node.cri().runtime().list_pod_sandbox_stats(cri::ListPodSandboxStatsRequest::default()).await?;
    node.cri().runtime().list_container_stats(cri::ListContainerStatsRequest::default()).await?;
    node.cri().images().image_fs_info(cri::ImageFsInfoRequest {}).await?;
    timed("stats", begun);
    println!("the longest while something hangs: {}, {:?}", longest.1, longest.0);
    let begun = Instant::now();
    let pod = node.pod(name).host_network().run().await?;
    let container = pod.container(image).sh("exec sleep 1000").start().await?;
    assert_eq!(container.sh("echo fine").await?, "fine");
    container.stop(0).await?;
    pod.stop().await?;
    pod.remove().await?;
    // Seven calls, with a runtime in most of them.
    ensure!(begun.elapsed() < 4 * PROMPT, "another pod's life took {:?}", begun.elapsed());
    ensure!(slow.is_empty(), "{slow:?}");
    Ok(())
}

fn gives_up<T: std::fmt::Debug>(what: &str, answer: Result<T, tonic::Status>) -> Result<()> {
    let status = answer.err().with_context(|| format!("{what}: answered"))?;
    let gave_up = matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled);
    ensure!(gave_up, "{what}: {status:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_file_server_hangs_only_the_container_that_mounts_it() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let server = DeadServer::mount(&node.path().join("volume"))?;
    let baseline = node.inventory();
    let pod = node.pod("a").host_network().run().await?;
    let fine = pod.container(&image).name("fine").sh("exec sleep 1000").start().await?;
    server.die();
    let stuck = pod.container(&image).name("stuck").sh("exec sleep 1000").mount(
        &node.path().join("volume"),
        "/volume",
        |_| {},
    );
    gives_up("create", stuck.clone().deadline(IMPATIENT).create().await)?;
    // Its own pod goes on, and so does everybody.
    assert_eq!(fine.sh("echo fine").await?, "fine");
    let late = pod.container(&image).name("late").sh("echo late").output().await?;
    assert_eq!(late, "late");
    the_rest_goes_on(&node, &image, "other").await?;
    // A retry joins what hangs, and hangs no more threads than that.
    for _ in 0..3 {
        gives_up("create again", stuck.clone().deadline(IMPATIENT).create().await)?;
    }
    // The daemon ends when it is asked to.
    let begun = Instant::now();
    node.terminate_within(Duration::from_secs(30))?;
    println!("ended after {:?}", begun.elapsed());
    node.restart().await?;
    ensure!(fine.is_running().await?);
    the_rest_goes_on(&node, &image, "another").await?;
    fine.stop(0).await?;
    // The server's connection ends; what waited for it gets an error, and the pod can go.
    server.abort();
    pod.stop().await?;
    pod.remove().await?;
    drop(server);
    on(&node, Duration::from_secs(15), "everything to be gone", async || {
        let left = node.inventory().without(&baseline);
        Ok(Look::when(left.is_empty(), || format!("still there:\n{left}")))
    })
    .await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_in_the_kernel_is_waited_for_and_never_declared_dead() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let server = DeadServer::mount(&node.path().join("volume"))?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod
        .container(&image)
        .sh("echo up; while [ ! -e /go/now ]; do sleep 0.05; done; exec cat /volume/file /volume/other")
        .mount(&node.path().join("volume"), "/volume", |_| {})
        .mount(&go(&node)?, "/go", |_| {})
        .start()
        .await?;
    container.wait_for_log("up").await?;
    server.die();
    fs::write(go(&node)?.join("now"), "")?;
    let init = node.pid_file(&container.id, "init.pid")?;
    eventually(Duration::from_secs(20), "it to hang in the kernel", async || {
        let stat = fs::read_to_string(format!("/proc/{init}/stat"))?;
        let wchan = fs::read_to_string(format!("/proc/{init}/wchan")).unwrap_or_default();
        let hangs = stat.contains(") D ") || wchan.contains("fuse") || wchan.contains("request");
        Ok(Look::when(hangs, || format!("{stat} {wchan}")))
    })
    .await?;
    let quick = node.cri().deadline(Duration::from_secs(3));
    let same = holdfast_integration::Container::existing(&quick, &container.id);
    gives_up("stop", same.stop(0).await)?;
    the_rest_goes_on(&node, &image, "other").await?;
    ensure!(container.is_running().await?, "it was declared dead");
    gives_up("remove", same.remove().await)?;
    gives_up("stop the pod", Pod::existing(&quick, &pod.id).stop().await)?;
    node.kill9()?;
    node.restart().await?;
    ensure!(container.is_running().await?, "it was declared dead");
    ensure!(!is_zombie(init), "the process is gone after all: the test proves nothing");
    server.abort();
    container.stop(0).await?;
    ensure!(container.status().await?.exit_code != 0);
    pod.stop().await?;
    pod.remove().await?;
    drop(server);
    node.finish().await
}

fn go(node: &Node) -> Result<std::path::PathBuf> {
    let go = node.path().join("go");
    fs::create_dir_all(&go)?;
    Ok(go)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_shim_is_waited_for_and_its_pod_is_not_ended() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").run().await?;
    let container =
        pod.container(&image).sh("trap 'exit 4' TERM; echo up; while :; do sleep 0.05; done");
    let container = container.start().await?;
    container.wait_for_log("up").await?;
    let shim = Pid::from_raw(node.pid_file(&pod.id, "shim.pid")?);
    kill(shim, Signal::SIGSTOP)?;
    let quick = node.cri().deadline(IMPATIENT);
    let same = holdfast_integration::Container::existing(&quick, &container.id);
    gives_up("exec", same.exec_sync(&["true"], 0).await)?;
    gives_up("stop", same.stop(30).await)?;
    gives_up("stop the pod", Pod::existing(&quick, &pod.id).stop().await)?;
    the_rest_goes_on(&node, &image, "other").await?;
    ensure!(container.is_running().await?, "it was declared dead");
    // Nor by a daemon that has never heard of it.
    node.kill9()?;
    let took = node.restart().await?;
    ensure!(took < Duration::from_secs(10), "ready after {took:?}");
    the_rest_goes_on(&node, &image, "another").await?;
    ensure!(container.is_running().await?, "it was declared dead");
    tokio::time::sleep(Duration::from_secs(2)).await;
    kill(shim, Signal::SIGCONT)?;
    // What was asked of it before is done now, or asked again.
    container.stop(10).await?;
    let code = container.status().await?.exit_code;
    ensure!(matches!(code, 4 | 137), "{code}");
    pod.stop().await?;
    pod.remove().await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn stopped_processes_are_killed_like_others() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh("exec sleep 1000").start().await?;
    kill(Pid::from_raw(node.pid_file(&container.id, "init.pid")?), Signal::SIGSTOP)?;
    the_rest_goes_on(&node, &image, "other").await?;
    ensure!(container.is_running().await?);
    container.stop(1).await?;
    assert_eq!(container.status().await?.exit_code, 137);
    node.finish().await
}

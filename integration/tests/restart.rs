//! The daemon is killed, at rest and under load. Nothing is lost and nothing is left.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{
    Node, Pod, eventually, ground::is_zombie, log, pod::PodBuilder, wait::Look,
};
use holdfast_protos::cri;
use rand::Rng as _;
use tokio::time::{Instant, sleep};

/// Pods, containers and addresses that must be the same before and after.
async fn everything(node: &Node) -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for pod in node.pods().await? {
        let status = Pod::existing(node.cri(), &pod.id).status().await?;
        all.insert(format!(
            "pod {} {:?} {:?} {:?} {:?}",
            pod.id,
            pod.metadata,
            pod.state(),
            status.network,
            pod.created_at
        ));
    }
    for container in node.containers().await? {
        all.insert(format!(
            "container {} of {} {:?} {:?} {}",
            container.id,
            container.pod_sandbox_id,
            container.metadata,
            container.state(),
            container.created_at
        ));
    }
    Ok(all)
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_there_again_after_a_kill() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let mut running = Vec::new();
    for number in 0..6 {
        let pod = node.pod(&format!("p{number}"));
        let pod = if number % 2 == 0 { pod.host_network() } else { pod }.run().await?;
        running.push(pod.container(&image).sh("exec sleep 1000").start().await?);
        pod.container(&image).name("created").sh("true").create().await?;
        pod.container(&image).name("exited").sh("exit 3").start().await?.wait().await?;
    }
    let stopped = node.pod("stopped").run().await?;
    stopped.stop().await?;
    let before = everything(&node).await?;
    for _ in 0..3 {
        node.kill9()?;
        let took = node.restart().await?;
        // The bar is for a release build on a quiet machine and is measured by `make bench`.
        ensure!(took < Duration::from_secs(10), "ready after {took:?}");
        assert_eq!(everything(&node).await?, before);
        for container in &running {
            assert_eq!(container.sh("cat /proc/1/comm").await?, "sleep");
        }
    }
    // An ordinary end is no different.
    node.terminate()?;
    node.restart().await?;
    assert_eq!(everything(&node).await?, before);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn exits_during_downtime_are_reported_truly() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let go = node.path().join("go");
    std::fs::create_dir(&go)?;
    // Each waits until the daemon is dead.
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
    let code = start("code", "exit 42", 0).await?;
    let signal = start("signal", "exec sh -c 'kill -SEGV $$'", 0).await?;
    let oom = start("oom", "head -c 300000000 /dev/zero | tail", 16 << 20).await?;
    let lives = start("lives", "sleep 1000", 0).await?;
    for container in [&code, &signal, &oom, &lives] {
        container.wait_for_log("ready").await?;
    }
    node.kill9()?;
    let nanos =
        || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as i64;
    let from = nanos();
    std::fs::write(go.join("now"), "")?;
    // Until their processes are gone: only the three that end, of four.
    eventually(Duration::from_secs(20), "the containers to end", async || {
        let waiting = node
            .ground()
            .processes()
            .into_iter()
            .filter(|pid| !is_zombie(*pid))
            .filter(|pid| {
                std::fs::read_to_string(format!("/proc/{pid}/cmdline"))
                    .is_ok_and(|line| line.contains("/go/now") || line.starts_with("tail"))
            })
            .count();
        Ok(Look::when(waiting <= 1, || format!("{waiting} still run")))
    })
    .await?;
    let until = nanos();
    sleep(Duration::from_millis(300)).await;
    node.restart().await?;

    let code = code.wait().await?;
    assert_eq!((code.exit_code, code.reason.as_str()), (42, "Error"));
    ensure!(
        (from..=until).contains(&code.finished_at),
        "finished at {}, not between {from} and {until}",
        code.finished_at
    );
    let signal = signal.wait().await?;
    // PID 1 of a namespace ignores what it sends itself, so a shell may end it in its own way: what
    // matters is that the truth is not replaced by a guess.
    ensure!(signal.exit_code != 255, "{signal:?}");
    let oom = oom.wait().await?;
    assert_eq!(oom.reason, "OOMKilled", "{oom:?}");
    ensure!(lives.is_running().await?);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_line_of_a_log_is_lost_or_doubled_by_five_restarts() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    // As fast as somebody reads it.
    let container = pod
        .container(&image)
        .command(["/bin/awk", r#"BEGIN { for (i = 1; ; i++) print "line " i }"#])
        .start()
        .await?;
    container.wait_for_log("line 1000").await?;
    for round in 0..5 {
        node.kill9()?;
        let size = || std::fs::metadata(container.log_path()).map_or(0, |m| m.len());
        let before = size();
        eventually(Duration::from_secs(10), "the log to grow without a daemon", async || {
            Ok(Look::when(size() > before + 100_000, || format!("{} bytes more", size() - before)))
        })
        .await
        .with_context(|| format!("round {round}"))?;
        node.restart().await?;
        ensure!(container.is_running().await?, "round {round}");
    }
    container.stop(0).await?;
    let mut lines = container.log()?;
    // It is killed in the middle of a line.
    lines.pop();
    let count = log::numbered(&lines)?;
    ensure!(count > 10_000, "only {count} lines");
    ensure!(lines.iter().all(|line| !line.text.is_empty()), "an empty line");
    println!("{count} lines, all there");
    node.finish().await
}

/// What the workers of the load did and must find again.
#[derive(Default)]
struct Load {
    /// Ends the workers.
    over: AtomicBool,
    /// Rounds that went through.
    rounds: AtomicUsize,
    /// Calls that a killed daemon left unanswered, and that were made again.
    retried: AtomicUsize,
}

/// Makes the call until a daemon has answered it. Every refusal is an error, except that nobody
/// answers: so do kubelets see a restart.
async fn insist<T>(
    load: &Load,
    what: &str,
    call: impl AsyncFn() -> Result<T, tonic::Status>,
) -> Result<T> {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        match call().await {
            Ok(value) => return Ok(value),
            Err(status) => {
                let broken = status.code() == tonic::Code::Unavailable
                    || status.message().contains("transport error")
                    || status.message().contains("h2 protocol error")
                    || status.code() == tonic::Code::Cancelled;
                ensure!(broken && Instant::now() < end, "{what}: {status:?}");
                load.retried.fetch_add(1, Ordering::Relaxed);
                sleep(Duration::from_millis(30)).await;
            }
        }
    }
}

async fn worker(load: &Load, number: usize, image: String, pods: [PodBuilder; 2]) -> Result<()> {
    let mut attempt = 0;
    while !load.over.load(Ordering::Relaxed) {
        attempt += 1;
        let builder = pods[attempt as usize % 2].clone().attempt(attempt);
        let what = |step: &str| format!("worker {number}, attempt {attempt}, {step}");
        let pod = insist(load, &what("run"), async || builder.clone().run().await).await?;
        let again = insist(load, &what("run again"), async || builder.clone().run().await).await?;
        ensure!(again.id == pod.id, "a second pod was made for the same name");
        let create =
            pod.container(&image).sh("trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done");
        let container =
            insist(load, &what("create"), async || create.clone().create().await).await?;
        match insist(load, &what("start"), async || container.start().await).await {
            Ok(()) => {}
            // Started by a daemon that was killed before it could say so.
            Err(error) => {
                ensure!(container.is_running().await.unwrap_or(false), "{error:#}");
            }
        }
        let exec =
            insist(load, &what("exec"), async || container.exec_sync(&["echo", "hello"], 20).await)
                .await?;
        ensure!(exec.stdout == b"hello\n", "{exec:?}");
        insist(load, &what("stop"), async || container.stop(5).await).await?;
        let status = insist(load, &what("status"), async || container.status().await).await?;
        ensure!(status.state() == cri::ContainerState::ContainerExited, "{status:?}");
        ensure!(matches!(status.exit_code, 9 | 137 | 143), "{status:?}");
        if attempt % 2 == 0 {
            insist(load, &what("remove container"), async || container.remove().await).await?;
        }
        insist(load, &what("stop pod"), async || pod.stop().await).await?;
        insist(load, &what("remove pod"), async || pod.remove().await).await?;
        load.rounds.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_random_under_load_it_loses_nothing_and_leaks_nothing() -> Result<()> {
    const WORKERS: usize = 4;
    const KILLS: usize = 8;
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    // Something that is not touched, and must never notice.
    let witness = node.pod("witness").run().await?;
    let container = witness
        .container(&image)
        .sh("i=0; while :; do i=$((i+1)); echo line $i; usleep 5000; done")
        .start()
        .await?;
    let before = container.status().await?;
    let ip = witness.ip().await?;
    let baseline = node.inventory();

    let load = Load::default();
    let workers = (0..WORKERS).map(|number| {
        let name = format!("w{number}");
        let pods = [node.pod(&name), node.pod(&name).host_network()];
        worker(&load, number, image.clone(), pods)
    });
    let workers: Vec<_> = workers.collect();
    let workers = async {
        let done = futures::future::try_join_all(workers).await;
        // One that failed ends the test, not the others' patience.
        load.over.store(true, Ordering::Relaxed);
        done
    };
    let killer = async {
        for _ in 0..KILLS {
            let pause = rand::rng().random_range(100..1500);
            sleep(Duration::from_millis(pause)).await;
            node.kill9()?;
            node.restart().await?;
        }
        let kept_up = eventually(Duration::from_secs(60), "the load to go on", async || {
            let rounds = load.rounds.load(Ordering::Relaxed);
            let over = load.over.load(Ordering::Relaxed);
            Ok(Look::when(rounds >= 2 * WORKERS || over, || format!("{rounds} rounds")))
        })
        .await;
        load.over.store(true, Ordering::Relaxed);
        kept_up
    };
    let (worked, killed) = futures::join!(workers, killer);
    worked.with_context(|| node.daemon_log(80))?;
    killed?;
    println!(
        "{} rounds, {} calls made again, {KILLS} kills",
        load.rounds.load(Ordering::Relaxed),
        load.retried.load(Ordering::Relaxed)
    );

    assert_eq!(container.status().await?, before);
    assert_eq!(witness.ip().await?, ip);
    log::numbered(&container.log()?)?;
    assert_eq!(node.pods().await?.len(), 1);
    assert_eq!(node.containers().await?.len(), 1);
    node.nothing_left_since(&baseline).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_can_be_stopped_and_removed_after_a_restart() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let baseline = node.inventory();
    let pod = node.pod("a").run().await?;
    let container =
        pod.container(&image).sh("trap 'exit 6' TERM; echo up; while :; do sleep 0.1; done");
    let container = container.start().await?;
    container.wait_for_log("up").await?;
    node.kill9()?;
    node.restart().await?;
    container.stop(10).await?;
    assert_eq!(container.status().await?.exit_code, 6);
    let second = pod.container(&image).name("second").sh("echo second").output().await?;
    assert_eq!(second, "second");
    pod.stop().await?;
    pod.remove().await?;
    node.nothing_left_since(&baseline).await?;
    node.finish().await
}

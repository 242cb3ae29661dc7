//! The daemon is killed, at rest and under load. Nothing is lost and nothing is left.

use std::{
    collections::BTreeSet,
    os::unix::net::UnixListener,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use holdfast_integration::{Node, Pod, eventually, ground::is_zombie, log, wait::Look};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
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

/// A child that a daemon forked has its locks until it executes its program, also when the daemon is dead
/// by then. Here they are held for longer than that takes, by somebody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_waits_for_what_is_left_of_the_one_before() -> Result<()> {
    let mut node = Node::start().await?;
    node.kill9()?;
    let (state, root) = (node.path().join("state/lock"), node.path().join("root"));
    let mut held = Vec::new();
    for path in [state, root] {
        let mut holder = tokio::process::Command::new("flock")
            .arg(path)
            .args(["sh", "-c", "echo locked; exec sleep 1"])
            .stdout(std::process::Stdio::piped())
            .spawn()?;
        let mut said = [0; 7];
        let mut stdout = holder.stdout.take().context("stdout")?;
        tokio::io::AsyncReadExt::read_exact(&mut stdout, &mut said).await?;
        held.push(holder);
    }
    node.restart().await?;
    for mut holder in held {
        holder.wait().await?;
    }
    node.finish().await
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

/// A shim tells an end as soon as there is a daemon, which may be before that daemon has reached it.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_whose_shim_is_not_reached_yet_is_removed_from_it_too() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh("exec sleep 100000").start().await?;
    let bundle = node.path().join("state/bundles").join(&pod.id);
    let address = std::fs::read_to_string(bundle.join("address"))?;
    let socket = PathBuf::from(address.trim().strip_prefix("unix://").context("no unix socket")?);
    let aside = socket.with_extension("aside");

    // In the shim's place is somebody who never answers.
    node.kill9()?;
    std::fs::rename(&socket, &aside)?;
    let deaf = UnixListener::bind(&socket)?;
    node.restart().await?;
    let pid = node.pid_file(&container.id, "init.pid")?;
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    container.wait().await?;

    let removal = tokio::spawn({
        let container = container.clone();
        async move { container.remove().await }
    });
    sleep(Duration::from_millis(500)).await;
    ensure!(!removal.is_finished(), "it was removed without its shim");
    std::fs::rename(&aside, &socket)?;
    drop(deaf);
    removal.await??;
    pod.stop().await?;
    pod.remove().await?;
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

/// Being killed is nothing to warn of: who reads the log looks for what is wrong.
#[tokio::test(flavor = "multi_thread")]
async fn a_kill_with_many_pods_leaves_no_warning_in_the_log() -> Result<()> {
    let count = if std::env::var_os("HOLDFAST_SOAK").is_some() { 100 } else { 25 };
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pods: Vec<_> = stream::iter(0..count)
        .map(|number| node.pod(&format!("p{number}")).host_network())
        .map(|builder| async {
            let pod = builder.run().await?;
            // Some end while nobody is there.
            let script = "trap 'exit 3' TERM; while :; do sleep 0.2; done";
            let container = pod.container(&image).sh(script).start().await?;
            anyhow::Ok((pod, container))
        })
        .buffer_unordered(4)
        .try_collect()
        .await?;
    for round in 0..2 {
        node.kill9()?;
        // Once: a pid of what has ended may be another's.
        for (_, container) in pods.iter().take(if round == 0 { 5 } else { 0 }) {
            let init = node.pid_file(&container.id, "init.pid")?;
            let init = nix::unistd::Pid::from_raw(init);
            nix::sys::signal::kill(init, nix::sys::signal::Signal::SIGKILL)?;
        }
        node.restart().await?;
        // The first stop after a start takes no longer than any other.
        let (pod, container) = pods.last().context("there are pods")?;
        if container.is_running().await? {
            let begun = Instant::now();
            container.stop(10).await?;
            println!("the first stop took {:?}", begun.elapsed());
        }
        pod.stop().await?;
        for (_, container) in pods.iter().take(5) {
            assert_eq!(container.wait().await?.exit_code, 137);
        }
    }
    node.remove_all().await?;
    let log = std::fs::read_to_string(node.path().join("daemon.log"))?;
    let warnings: Vec<_> =
        log.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR ")).collect();
    ensure!(warnings.is_empty(), "{}", warnings.join("\n"));
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

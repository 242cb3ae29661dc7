//! Shims die, or are replaced. Their pods go on.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{
    Container, Node, Pod,
    ground::is_zombie,
    log,
    node::{on, with_busybox},
    wait::Look,
};
use holdfast_protos::cri;
use holdfast_shim::{
    bundle::Bundle,
    control::{Attach, Control, Output},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

fn bundle(node: &Node, pod: &Pod) -> Bundle {
    Bundle::new(node.path().join("state/bundles").join(&pod.id))
}

fn shim_pid(node: &Node, pod: &Pod) -> Result<i32> {
    let text = fs::read_to_string(bundle(node, pod).shim_pid())?;
    text.trim().parse().context("the shim's pid")
}

fn send(pid: i32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid), signal).with_context(|| format!("{signal} to {pid}"))
}

/// Kills the pod's shim and waits until another has taken over.
async fn kill_shim(node: &Node, pod: &Pod) -> Result<()> {
    let old = shim_pid(node, pod)?;
    send(old, Signal::SIGKILL)?;
    taken_over(node, pod, old).await
}

async fn taken_over(node: &Node, pod: &Pod, old: i32) -> Result<()> {
    let control = Control::new(&bundle(node, pod));
    on(node, Duration::from_secs(20), "another shim to take over", async || {
        if shim_pid(node, pod)? == old {
            return Ok(Look::Not("the old one is on record".into()));
        }
        Ok(match control.hello(Duration::from_secs(5)).await {
            Ok(hello) => Look::when(!hello.orphaned, || format!("{hello:?}")),
            Err(error) => Look::Not(error.to_string()),
        })
    })
    .await
}

async fn pid_inside(container: &Container) -> Result<String> {
    container.sh("grep NSpid /proc/1/status; cat /proc/1/stat | cut -d' ' -f22").await
}

async fn a_killed_shim_takes_nothing_with_it(runtime: &str) -> Result<()> {
    let (node, image) = with_busybox(runtime).await?;
    let baseline = node.inventory();
    let pod = node.pod("a").shared_pids().run().await?;
    let ip = pod.ip().await?;
    let writer = pod
        .container(&image)
        .name("writer")
        .sh("trap 'exit 9' TERM; i=0; while :; do i=$((i+1)); echo line $i; usleep 2000; done")
        .start()
        .await?;
    let terminal = pod
        .container(&image)
        .name("terminal")
        .config(|c| {
            c.tty = true;
            c.stdin = true;
        })
        .sh("while read x; do echo got $x; done; exit 8")
        .start()
        .await?;
    let reader = pod
        .container(&image)
        .name("reader")
        .config(|c| c.stdin = true)
        .sh("while read x; do echo got $x; done; exit 7")
        .start()
        .await?;
    let created = pod.container(&image).name("created").sh("exit 6").create().await?;
    let exited = pod.container(&image).name("exited").sh("exit 5").start().await?;
    exited.ends_with(5).await?;
    let before = (writer.status().await?, exited.status().await?);
    writer.wait_for_log("line 100").await?;

    for round in 0..3 {
        // A command is under way, and its code and its output are what they are.
        let exec = async {
            let script = ["/bin/sh", "-c", "echo before; sleep 2; echo after; exit 33"];
            writer.exec_sync(&script, 30).await
        };
        let killing = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            kill_shim(&node, &pod).await
        };
        let (exec, killed) = tokio::join!(exec, killing);
        killed?;
        let exec = exec.with_context(|| format!("round {round}\n{}", node.daemon_log(40)))?;
        ensure!(exec.exit_code == 33 && exec.stdout == b"before\nafter\n", "{exec:?}");
        ensure!(writer.is_running().await? && terminal.is_running().await?, "round {round}");
        let lines = writer.log()?.len();
        writer.wait_for_log(&format!("line {}", lines + 100)).await?;
    }
    assert_eq!((writer.status().await?, exited.status().await?), before);
    assert_eq!(pod.ip().await?, ip);
    log::numbered(&writer.log()?)?;

    // Attach reaches what it did before.
    let control = Control::new(&bundle(&node, &pod));
    for container in [&terminal, &reader] {
        let both = Attach { stdin: true, stdout: true, stderr: false };
        let (mut input, mut output) = control.attach(&container.id, both).await?.split();
        input.stdin(b"hello\n").await?;
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains("got hello") {
            match output.next().await? {
                Some(Output::Stdout(bytes)) => seen.extend(bytes),
                other => anyhow::bail!("{other:?} after {:?}", String::from_utf8_lossy(&seen)),
            }
        }
        // The end of the input gets through, so nobody keeps it open.
        input.close_stdin().await?;
    }
    terminal.ends_with(8).await?;
    assert!(reader.is_running().await?, "others may attach");
    created.start().await?;
    created.ends_with(6).await?;
    writer.stop(10).await?;
    writer.ends_with(9).await?;
    pod.stop().await?;
    pod.remove().await?;
    node.nothing_left_since(&baseline).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_shim_takes_nothing_with_it_under_runc() -> Result<()> {
    a_killed_shim_takes_nothing_with_it("runc").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_shim_takes_nothing_with_it_under_crun() -> Result<()> {
    a_killed_shim_takes_nothing_with_it("crun").await
}

/// A shim that dies when it has hardly taken over is followed by one that has all the same.
#[tokio::test(flavor = "multi_thread")]
async fn shims_that_die_one_after_the_other_lose_no_terminal() -> Result<()> {
    let (node, image) = with_busybox("runc").await?;
    let pod = node.pod("a").host_network().run().await?;
    let terminal = pod.container(&image).config(|c| {
        c.tty = true;
        c.stdin = true;
    });
    let terminal = terminal.sh("while read x; do echo got $x; done; exit 8").start().await?;
    let control = Control::new(&bundle(&node, &pod));
    for round in 0..10 {
        for _ in 0..3 {
            kill_shim(&node, &pod).await?;
        }
        let both = Attach { stdin: true, stdout: true, stderr: false };
        let (mut input, _output) = control.attach(&terminal.id, both).await?.split();
        input.stdin(format!("round {round}\n").as_bytes()).await?;
        let seen = terminal.wait_for_log(&format!("got round {round}")).await;
        seen.with_context(|| node.daemon_log(40))?;
    }
    node.finish().await
}

/// What is read of a line that has not ended outlives the shim that read it, and is written once.
#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_has_begun_is_whole_after_its_shim_was_killed() -> Result<()> {
    let (node, image) = with_busybox("runc").await?;
    let pod = node.pod("a").host_network().run().await?;
    let go = node.path().join("go");
    fs::create_dir(&go)?;
    let wait = "w() { while [ ! -e /go/$1 ]; do usleep 20000; done; }";
    let both = "both() { printf '%s' \"$1\"; printf '%s' \"$1\" >&2; }";
    let script = format!(
        "{wait}; {both}; echo before; echo before >&2; both first; w 1; both -second; w 2; \
         echo -third; w 3; echo -third >&2; echo after; both last; w 4"
    );
    let piped = pod.container(&image).name("piped").sh(&script).mount(&go, "/go", |_| {});
    let piped = piped.start().await?;
    let terminal = pod
        .container(&image)
        .name("terminal")
        .config(|c| c.tty = true)
        .sh(&format!(
            "{wait}; printf first; w 1; printf -second; w 2; echo -third; w 3; printf last; w 4"
        ))
        .mount(&go, "/go", |_| {});
    let terminal = terminal.start().await?;
    let kept = async |container: &Container, streams: &[&str], text: &str| {
        let bundle = Bundle::new(node.path().join("state/bundles").join(&container.id));
        on(&node, Duration::from_secs(20), "the begun lines to be kept", async || {
            let seen: Vec<_> = bundle
                .unfinished()
                .iter()
                .zip(["stdout", "stderr"])
                .filter(|(_, name)| streams.contains(name))
                .map(|(path, _)| {
                    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
                })
                .collect();
            // Of a longer one before, the rest may be behind it.
            let all = seen.iter().all(|seen| seen.contains(text));
            Ok(Look::when(all, || format!("{seen:?}")))
        })
        .await
    };
    for (round, text) in ["first", "first-second"].into_iter().enumerate() {
        kept(&piped, &["stdout", "stderr"], text).await?;
        kept(&terminal, &["stdout"], text).await?;
        kill_shim(&node, &pod).await?;
        // Once more, with nothing new between.
        kill_shim(&node, &pod).await?;
        fs::write(go.join((round + 1).to_string()), "")?;
    }
    // The other stream's is still to come, and records of the one that has ended are behind its place.
    piped.wait_for_log("first-second-third").await?;
    terminal.wait_for_log("first-second-third").await?;
    kill_shim(&node, &pod).await?;
    fs::write(go.join("3"), "")?;
    piped.wait_for_log("after").await?;
    kept(&piped, &["stdout", "stderr"], "last").await?;
    kept(&terminal, &["stdout"], "last").await?;
    without_a_shim(&node, &pod, async || Ok(fs::write(go.join("4"), "")?)).await?;
    piped.ends_with(0).await?;
    terminal.ends_with(0).await?;
    let lines = |container: &Container, stream: &str| -> Result<Vec<String>> {
        let lines = container.log()?.into_iter().filter(|line| line.stream == stream);
        Ok(lines.map(|line| line.text.trim_end().to_owned()).collect())
    };
    let whole = ["before", "first-second-third"];
    assert_eq!(lines(&piped, "stdout")?, [&whole[..], &["after", "last"]].concat());
    assert_eq!(lines(&piped, "stderr")?, [&whole[..], &["last"]].concat());
    assert_eq!(lines(&terminal, "stdout")?, ["first-second-third", "last"]);
    node.finish().await
}

/// The daemon is stopped for as long as `meanwhile` takes, and the pod's shim is dead in it.
async fn without_a_shim(
    node: &Node,
    pod: &Pod,
    meanwhile: impl AsyncFn() -> Result<()>,
) -> Result<()> {
    let old = shim_pid(node, pod)?;
    send(node.daemon_pid(), Signal::SIGSTOP)?;
    send(old, Signal::SIGKILL)?;
    let done = meanwhile().await;
    send(node.daemon_pid(), Signal::SIGCONT)?;
    done?;
    taken_over(node, pod, old).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ends_while_no_shim_is_there_ends_truly() -> Result<()> {
    let node = Node::builder().start().await?;
    let mut node = node;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let go = node.path().join("go");
    fs::create_dir(&go)?;
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
    let code = start("code", "echo last words; exit 42", 0).await?;
    let oom = start("oom", "head -c 300000000 /dev/zero | tail", 16 << 20).await?;
    let lives = start("lives", "echo goes on; sleep 1000", 0).await?;
    for container in [&code, &oom, &lives] {
        container.wait_for_log("ready").await?;
    }
    let exec = async {
        let wait = "while [ ! -e /go/now ]; do usleep 20000; done; echo done; exit 44";
        lives.exec_sync(&["/bin/sh", "-c", wait], 60).await
    };
    let running = |word: &str| {
        let all = node.ground().processes();
        let is = |pid: &i32| {
            !is_zombie(*pid)
                && fs::read_to_string(format!("/proc/{pid}/cmdline"))
                    .is_ok_and(|line| line.contains(word))
        };
        all.iter().filter(|pid| is(pid)).count()
    };
    let test = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        without_a_shim(&node, &pod, async || {
            fs::write(go.join("now"), "")?;
            // Of the three and the exec one lives on.
            on(&node, Duration::from_secs(20), "them to end", async || {
                let left = running("/go/now") + running("tail");
                Ok(Look::when(left <= 1, || format!("{left} run")))
            })
            .await
        })
        .await
    };
    let (exec, tested) = tokio::join!(exec, test);
    tested?;
    let exec = exec.with_context(|| node.daemon_log(40))?;
    ensure!(exec.exit_code == 44 && exec.stdout == b"done\n", "{exec:?}");
    code.ends_with(42).await?;
    let words: Vec<_> = code.log()?.into_iter().map(|line| line.text).collect();
    assert_eq!(words, ["ready", "last words"], "what nobody had read yet is in the log");
    let status = oom.wait().await?;
    assert_eq!(status.reason, "OOMKilled", "{status:?}");
    ensure!(lives.is_running().await?);
    lives.wait_for_log("goes on").await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_daemon_dead_too_containers_go_on_and_no_exit_code_is_guessed() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").run().await?;
    let go = node.path().join("go");
    fs::create_dir(&go)?;
    let ends = pod
        .container(&image)
        .name("ends")
        .sh("echo ready; while [ ! -e /go/now ]; do usleep 20000; done; exit 42")
        .mount(&go, "/go", |_| {})
        .start()
        .await?;
    ends.wait_for_log("ready").await?;
    let lives = pod
        .container(&image)
        .name("lives")
        .sh("i=0; while :; do i=$((i+1)); echo line $i; usleep 2000; done")
        .start()
        .await?;
    lives.wait_for_log("line 100").await?;
    let inside = pid_inside(&lives).await?;
    let old = shim_pid(&node, &pod)?;
    node.kill9()?;
    send(old, Signal::SIGKILL)?;
    fs::write(go.join("now"), "")?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    node.restart().await?;
    taken_over(&node, &pod, old).await?;
    assert_eq!(pid_inside(&lives).await?, inside);
    let lines = lives.log()?.len();
    lives.wait_for_log(&format!("line {}", lines + 100)).await?;
    log::numbered(&lives.log()?)?;
    // Nobody held its pidfd. Whoever reaps orphans here may not have done so yet, and then it is
    // known all the same.
    let status = ends.wait().await?;
    let known = (status.exit_code, status.reason.as_str());
    ensure!(matches!(known, (42, "Error") | (255, "Unknown")), "{status:?}");
    pod.stop().await?;
    pod.remove().await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_no_shim_can_take_over_is_ended_whole() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let baseline = node.inventory();
    let pod = node.pod("a").shared_pids().run().await?;
    let first = pod.container(&image).sh("exec sleep 1234").start().await?;
    let second = pod.container(&image).name("b").sh("exec sleep 1234").start().await?;
    // Of a release that this one cannot read.
    let state = bundle(&node, &pod).shim_state();
    fs::write(&state, r#"{"version":99,"needs":99}"#)?;
    send(shim_pid(&node, &pod)?, Signal::SIGKILL)?;
    for container in [&first, &second] {
        let status = container.wait().await?;
        assert_eq!(status.exit_code, 137, "killed, and that is known: {status:?}");
    }
    on(&node, Duration::from_secs(10), "its processes to be gone", async || {
        let of_it = |pid: &i32| {
            !is_zombie(*pid)
                && fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| {
                    let line = String::from_utf8_lossy(&line);
                    line.contains("1234") || line.contains(&pod.id)
                })
        };
        let left: Vec<i32> = node.ground().processes().into_iter().filter(of_it).collect();
        Ok(Look::when(left.is_empty(), || format!("{left:?}")))
    })
    .await?;
    let status = pod.status().await?;
    assert_eq!(status.state(), cri::PodSandboxState::SandboxNotready);
    pod.stop().await?;
    pod.remove().await?;
    node.nothing_left_since(&baseline).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn shims_that_are_killed_at_random_under_load_cost_nothing() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let baseline = node.inventory();
    let pod = node.pod("a").run().await?;
    let witness = pod
        .container(&image)
        .name("witness")
        .sh("i=0; while :; do i=$((i+1)); echo line $i; usleep 5000; done")
        .start()
        .await?;
    witness.wait_for_log("line 10").await?;
    let over = std::sync::atomic::AtomicBool::new(false);
    let load = async {
        let mut rounds = 0;
        while !over.load(std::sync::atomic::Ordering::Relaxed) {
            rounds += 1;
            let name = format!("c{rounds}");
            let made = pod
                .container(&image)
                .name(&name)
                .sh("trap 'exit 3' TERM; while :; do sleep 0.05; done");
            // What was asked of a shim as it died may fail, and then leaves nothing.
            let Ok(container) = made.create().await else { continue };
            if container.start().await.is_ok() {
                let _ = container.exec_sync(&["/bin/true"], 10).await;
            }
            container.stop(5).await.with_context(|| format!("stop, round {rounds}"))?;
            let status = container.status().await?;
            ensure!(matches!(status.exit_code, 3 | 128 | 137 | 143), "{status:?}");
            container.remove().await.with_context(|| format!("remove, round {rounds}"))?;
        }
        Ok(rounds)
    };
    let killer = async {
        for _ in 0..8 {
            tokio::time::sleep(Duration::from_millis(rand::random_range(50..700))).await;
            kill_shim(&node, &pod).await?;
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        Ok::<_, anyhow::Error>(())
    };
    let (rounds, killed) = tokio::join!(load, killer);
    let killed = killed.with_context(|| node.daemon_log(60));
    let rounds = rounds.with_context(|| node.daemon_log(60))?;
    killed?;
    ensure!(rounds > 2, "only {rounds} rounds");
    println!("{rounds} rounds, 8 shims killed");
    ensure!(witness.is_running().await?);
    log::numbered(&witness.log()?)?;
    assert_eq!(node.containers().await?.len(), 1);
    pod.stop().await?;
    pod.remove().await?;
    node.nothing_left_since(&baseline).await?;
    node.finish().await
}

/// A copy of the shim, which is another file and so another release to whoever looks.
fn next_release(node: &Node, name: &str) -> Result<std::path::PathBuf> {
    let path = node.path().join(name);
    fs::copy(&node.binaries().shim, &path)?;
    Ok(path)
}

fn executable(pid: i32) -> Result<std::path::PathBuf> {
    Ok(fs::read_link(format!("/proc/{pid}/exe"))?)
}

async fn running_shims_get_new_code(runtime: &str) -> Result<()> {
    let (node, image) = with_busybox(runtime).await?;
    let baseline = node.inventory();
    let pod = node.pod("a").shared_pids().run().await?;
    let writer = pod
        .container(&image)
        .name("writer")
        .sh("trap 'exit 9' TERM; i=0; while :; do i=$((i+1)); echo line $i; done")
        .start()
        .await?;
    let terminal = pod
        .container(&image)
        .name("terminal")
        .config(|c| {
            c.tty = true;
            c.stdin = true;
        })
        .sh("stty -echo; echo ready; while read x; do echo got $x; done; exit 8")
        .start()
        .await?;
    let slow = pod
        .container(&image)
        .name("slow")
        .config(|c| c.stdin = true)
        .sh("printf 'one '; while read x; do printf \"$x \"; done; echo end; exit 7")
        .start()
        .await?;
    let created = pod.container(&image).name("created").sh("exit 6").create().await?;
    let exited = pod.container(&image).name("exited").sh("exit 5").start().await?;
    exited.ends_with(5).await?;
    terminal.wait_for_log("ready").await?;
    writer.wait_for_log("line 1000").await?;
    let before = writer.status().await?;
    let pid = shim_pid(&node, &pod)?;

    let control = Control::new(&bundle(&node, &pod));
    let both = Attach { stdin: true, stdout: true, stderr: false };
    let (mut to_terminal, mut of_terminal) = control.attach(&terminal.id, both).await?.split();
    let (mut to_slow, _of_slow) = control.attach(&slow.id, both).await?.split();
    for round in 0..3 {
        let exec = async {
            let script = ["/bin/sh", "-c", "echo before; sleep 3; echo after; exit 33"];
            writer.exec_sync(&script, 30).await
        };
        let upgrading = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let release = next_release(&node, &format!("shim{round}"))?;
            let path = release.display().to_string();
            let said = node.cli(&["upgrade", "shims", "--binary", &path])?;
            ensure!(said.contains("upgraded"), "{said}");
            // In place: the same process, with other code.
            assert_eq!(executable(pid)?, release);
            let said = node.cli(&["upgrade", "shims", "--binary", &path])?;
            ensure!(said.contains("runs it already"), "{said}");
            Ok::<_, anyhow::Error>(())
        };
        let (exec, upgraded) = tokio::join!(exec, upgrading);
        upgraded.with_context(|| format!("round {round}\n{}", node.daemon_log(30)))?;
        let exec = exec.with_context(|| format!("round {round}\n{}", node.daemon_log(30)))?;
        ensure!(exec.exit_code == 33 && exec.stdout == b"before\nafter\n", "{exec:?}");
        // Attached clients have not noticed.
        let word = format!("round{round}");
        to_terminal.stdin(format!("{word}\n").as_bytes()).await?;
        to_slow.stdin(format!("{word}\n").as_bytes()).await?;
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains(&format!("got {word}")) {
            match of_terminal.next().await? {
                Some(Output::Stdout(bytes)) => seen.extend(bytes),
                other => anyhow::bail!("{other:?} after {:?}", String::from_utf8_lossy(&seen)),
            }
        }
    }
    assert_eq!(writer.status().await?, before);
    assert_eq!(shim_pid(&node, &pod)?, pid);
    // A line that began before the upgrades and ends after them is one line.
    to_slow.close_stdin().await?;
    drop(to_slow);
    drop(_of_slow);
    created.start().await?;
    created.ends_with(6).await?;
    writer.stop(10).await?;
    writer.ends_with(9).await?;
    let count = log::numbered(&writer.log()?)?;
    println!("{count} lines, all there");
    pod.stop().await?;
    let texts: Vec<_> = slow.log()?.into_iter().map(|line| line.text).collect();
    assert_eq!(texts, ["one round0 round1 round2 "]);
    pod.remove().await?;
    node.nothing_left_since(&baseline).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn running_shims_get_new_code_under_runc() -> Result<()> {
    running_shims_get_new_code("runc").await
}

#[tokio::test(flavor = "multi_thread")]
async fn running_shims_get_new_code_under_crun() -> Result<()> {
    running_shims_get_new_code("crun").await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_that_cannot_be_leaves_the_old_shim_as_it_was() -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod
        .container(&image)
        .sh("i=0; while :; do i=$((i+1)); echo line $i; usleep 2000; done")
        .start()
        .await?;
    container.wait_for_log("line 10").await?;
    let pid = shim_pid(&node, &pod)?;
    let before = executable(pid)?;
    let write = |name: &str, text: &str| -> Result<String> {
        let path = node.path().join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path.display().to_string())
    };
    for (binary, part) in [
        (write("garbage", "no program at all")?, "cannot take over"),
        ("/bin/true".to_owned(), "no shim that can take over"),
        (write("newer", "#!/bin/sh\necho the state needs version 9 >&2; exit 1\n")?, "version 9"),
        (write("hangs", "#!/bin/sh\nexec sleep 100\n")?, "does not answer within"),
        // It says that it can, and then cannot be executed as what it claims to be.
        (write("liar", "#!/nowhere/at/all\n")?, "No such file"),
    ] {
        let refused = node.cli(&["upgrade", "shims", "--binary", &binary]);
        let text = format!("{:#}", refused.err().context(format!("{binary} was taken"))?);
        ensure!(text.contains(part), "{binary}: {text}");
        assert_eq!(executable(pid)?, before, "{binary}");
        ensure!(container.is_running().await?, "{binary}");
    }
    let refused = node.cli(&["upgrade", "shims", "--binary", "/not/there"]);
    let text = format!("{:#}", refused.err().context("it was taken")?);
    ensure!(text.contains("/not/there") && text.contains("not installed"), "{text}");
    assert_eq!(container.sh("echo still here").await?, "still here");
    log::numbered(&container.log()?)?;
    node.finish().await
}

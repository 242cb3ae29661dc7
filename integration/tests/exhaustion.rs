//! Something runs out: space for the database and images, for the state, for logs; descriptors,
//! processes, memory. What is asked for then is refused in clear words and leaves nothing; what takes
//! things away works all the same; and when there is enough again everything goes on by itself.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{
    Image, Node,
    disk::{Hog, is_full},
    eventually,
    ground::{cgroup_mounts, mountinfo},
    node::on,
    tar::Entry,
    wait::Look,
};
use tonic::{Code, Status};

const PATIENCE: Duration = Duration::from_secs(30);

/// A refusal that says that the disk is full.
fn says_full<T: std::fmt::Debug>(what: &str, answer: Result<T, Status>) -> Result<()> {
    let status = answer.err().with_context(|| format!("{what} with no space left"))?;
    let text = status.message().to_lowercase();
    ensure!(text.contains("no space left") || text.contains("full"), "{what}: {status:?}");
    ensure!(status.code() == Code::ResourceExhausted, "{what}: {status:?}");
    Ok(())
}

/// What was given back just now is gone too.
async fn filled(directory: &Path) -> Result<()> {
    eventually(PATIENCE, "the hog to have all of it", async || {
        Ok(Look::when(is_full(directory)?, || "there is space".into()))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn with_no_byte_left_for_records_and_images_everything_can_be_taken_away() -> Result<()> {
    let mut node = Node::builder().disk("root", 160).start().await?;
    let image = node.busybox().await?;
    let other = Image::busybox()?.layer(vec![Entry::file("big", 0o644, vec![7; 1 << 20])]);
    let other = node.registry().await?.push("test/other:1", &other.build()?).await?;
    node.pull(&other).await?;
    let pod = node.pod("a").run().await?;
    let deaf = pod.container(&image).name("deaf").sh("exec sleep 1000").start().await?;
    let polite = pod
        .container(&image)
        .name("polite")
        .sh("trap 'exit 6' TERM; echo up; while :; do sleep 0.05; done")
        .start()
        .await?;
    polite.wait_for_log("up").await?;
    let writer = pod
        .container(&image)
        .name("writer")
        .sh("while :; do head -c 8192 /dev/zero >> /x 2>/dev/null || echo refused; sleep 0.1; done")
        .start()
        .await?;
    let brief = pod.container(&image).name("brief").sh("sleep 3; exit 5").start().await?;
    let second = node.pod("b").host_network().run().await?;
    second.container(&image).sh("exec sleep 1000").start().await?;

    let root = node.path().join("root");
    let hog = Hog::take_all(&root)?;
    filled(&root).await?;
    // The container's own writes fail, and it goes on.
    writer.wait_for_log("refused").await?;

    // What needs space says so, and leaves nothing.
    let before = node.inventory();
    // A file system has crumbs left that it gives to one and not to another: what is small may be made,
    // and is taken away then.
    match pod.container(&image).name("late").sh("true").create().await {
        Ok(late) => late.remove().await?,
        refused => says_full("create", refused.map(|late| late.id))?,
    }
    match node.pod("late").run().await {
        Ok(late) => {
            late.stop().await?;
            late.remove().await?;
        }
        refused => says_full("run", refused.map(|late| late.id))?,
    }
    let late = Image::busybox()?.layer(vec![Entry::file("l", 0o644, vec![1; 1 << 20])]);
    let late = node.registry().await?.push("test/late:1", &late.build()?).await?;
    says_full("pull", node.pull(&late).await)?;
    node.nothing_stays_since(&before).await?;

    // What needs none works.
    assert_eq!(polite.sh("echo fine").await?, "fine");
    assert_eq!(brief.wait().await?.exit_code, 5);
    polite.stop(10).await?;
    assert_eq!(polite.status().await?.exit_code, 6);
    polite.remove().await?;
    deaf.stop(0).await?;
    deaf.remove().await?;
    node.remove_image(&other).await?;
    second.stop().await?;
    second.remove().await?;

    // Nor does a daemon that is killed need any to come back.
    node.kill9()?;
    node.restart().await?;
    ensure!(writer.is_running().await?);
    assert_eq!(brief.status().await?.exit_code, 5);
    filled(&root).await?;
    node.terminate()?;
    node.restart().await?;
    ensure!(writer.is_running().await?);
    pod.stop().await?;
    pod.remove().await?;
    node.remove_all().await?;

    // There is space again, and nobody need do anything about it.
    drop(hog);
    let pod = node.pod("after").run().await?;
    assert_eq!(pod.container(&image).sh("echo fine").output().await?, "fine");
    node.pull(&late).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn with_no_byte_left_for_the_state_exits_are_still_true() -> Result<()> {
    let mut node = Node::builder().disk("state", 32).start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").run().await?;
    let go = node.path().join("go");
    fs::create_dir(&go)?;
    let waits = async |name: &str, then: &str, memory: i64| {
        pod.container(&image)
            .name(name)
            .sh(&format!("echo up; while [ ! -e /go/now ]; do sleep 0.05; done; {then}"))
            .mount(&go, "/go", |_| {})
            .resources(|r| {
                r.memory_limit_in_bytes = memory;
                r.memory_swap_limit_in_bytes = memory;
            })
            .start()
            .await
    };
    let code = waits("code", "exit 42", 0).await?;
    let oom = waits("oom", "exec tail /dev/zero", 16 << 20).await?;
    let lives = waits("lives", "exec sleep 1000", 0).await?;
    for container in [&code, &oom, &lives] {
        container.wait_for_log("up").await?;
    }
    let state = node.path().join("state");
    let hog = Hog::take_all(&state)?;
    says_full("run", node.pod("late").run().await)?;
    says_full("create", pod.container(&image).name("late").sh("true").create().await)?;
    fs::write(go.join("now"), "")?;
    assert_eq!(code.wait().await?.exit_code, 42);
    assert_eq!(oom.wait().await?.reason, "OOMKilled");
    // Also to a daemon that was not there.
    node.kill9()?;
    node.restart().await?;
    assert_eq!(code.status().await?.exit_code, 42);
    assert_eq!(oom.status().await?.reason, "OOMKilled");
    ensure!(lives.is_running().await?);
    filled(&state).await?;
    code.remove().await?;
    lives.stop(0).await?;
    lives.remove().await?;
    pod.stop().await?;
    pod.remove().await?;
    drop(hog);
    let pod = node.pod("after").run().await?;
    assert_eq!(pod.container(&image).sh("echo fine").output().await?, "fine");
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn with_no_byte_left_for_logs_no_container_stalls() -> Result<()> {
    let mut node = Node::builder().disk("logs", 32).start().await?;
    let image = node.busybox().await?;
    let progress = node.path().join("progress");
    fs::create_dir(&progress)?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod
        .container(&image)
        .sh("i=0; while :; do i=$((i+1)); echo line $i; echo $i > /progress/new; \
             mv /progress/new /progress/now; done")
        .mount(&progress, "/progress", |_| {})
        .start()
        .await?;
    container.wait_for_log("line 100").await?;
    let at = || -> u64 {
        let text = fs::read_to_string(progress.join("now")).unwrap_or_default();
        text.trim().parse().unwrap_or_default()
    };
    let logs = node.path().join("logs");
    let hog = Hog::take_all(&logs)?;
    let from = at();
    // More than a pipe holds, so it is read although it cannot be written.
    on(&node, Duration::from_secs(60), "the container to go on", async || {
        Ok(Look::when(at() > from + 8000, || format!("at {}, from {from}", at())))
    })
    .await?;
    // Whoever comes now is not stalled either: a log that cannot be opened is made up for later.
    drop(hog);
    container.wait_for_log("are missing here").await?;
    let told = container.log()?;
    let missing = told.iter().find(|line| line.text.contains("are missing here"));
    let missing = missing.context("just seen")?;
    ensure!(missing.stream == "stderr", "{missing:?}");
    let last = told.len();
    on(&node, PATIENCE, "the log to go on", async || {
        let now = container.log()?.len();
        Ok(Look::when(now > last + 100, || format!("{now} lines, {last} before")))
    })
    .await?;
    container.stop(0).await?;
    node.finish().await
}

/// How many descriptors a process has open.
fn descriptors(pid: i32) -> Result<u64> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64)
}

/// Changes the limit of a running process (prlimit(2)).
#[expect(unsafe_code, reason = "prlimit(2)")]
fn limit_descriptors(pid: i32, soft: u64) -> Result<()> {
    // SAFETY: the structures are the kernel's, and outlive the calls.
    unsafe {
        let mut limit: libc::rlimit64 = std::mem::zeroed();
        let read = libc::prlimit64(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit);
        ensure!(read == 0, "prlimit: {}", std::io::Error::last_os_error());
        limit.rlim_cur = soft.min(limit.rlim_max);
        let none = std::ptr::null_mut();
        let set = libc::prlimit64(pid, libc::RLIMIT_NOFILE, &raw const limit, none);
        ensure!(set == 0, "prlimit: {}", std::io::Error::last_os_error());
    }
    Ok(())
}

/// CPU time of a process so far.
fn cpu(pid: i32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(") ").context("a name")?.1.split(' ').collect();
    // utime and stime in hundredths of a second (proc_pid_stat(5)).
    Ok(Duration::from_millis(10 * (fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)))
}

#[tokio::test(flavor = "multi_thread")]
async fn without_descriptors_it_refuses_and_recovers_without_a_restart() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").run().await?;
    let lives = pod.container(&image).sh("exec sleep 1000").start().await?;
    let before = node.inventory();
    let daemon = node.daemon_pid();
    let full = 65536;
    // Enough to take a connection or two, and no more.
    limit_descriptors(daemon, descriptors(daemon)? + 3)?;
    let quick = Duration::from_secs(5);
    let refused = node.pod("late").deadline(quick).run().await;
    let refused = refused.err().context("a pod without descriptors")?;
    ensure!(refused.message().contains("Too many open files"), "{refused:?}");
    ensure!(refused.code() == Code::ResourceExhausted, "{refused:?}");
    // None at all: even a connection has to wait.
    limit_descriptors(daemon, 3)?;
    let impatient = node.cri().deadline(Duration::from_secs(1));
    let mut runtime = impatient.runtime();
    let list = runtime.list_pod_sandbox(holdfast_protos::cri::ListPodSandboxRequest::default());
    let waits = list.await;
    println!("a list: {:?}", waits.as_ref().map(|_| "answered"));
    let spent = cpu(daemon)?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let spent = cpu(daemon)? - spent;
    ensure!(spent < Duration::from_secs(1), "it spins: {spent:?} of CPU in two idle seconds");

    limit_descriptors(daemon, full)?;
    on(&node, PATIENCE, "the daemon to answer", async || {
        Ok(match node.pods().await {
            Ok(pods) => Look::when(pods.len() == 1, || format!("{pods:?}")),
            Err(status) => Look::Not(status.to_string()),
        })
    })
    .await?;
    assert_eq!(node.daemon_pid(), daemon);
    ensure!(!node.has_ended()?, "the daemon has ended");
    node.nothing_left_since(&before).await?;
    ensure!(lives.is_running().await?);
    assert_eq!(lives.sh("echo fine").await?, "fine");
    let pod = node.pod("after").run().await?;
    assert_eq!(pod.container(&image).sh("echo fine").output().await?, "fine");
    node.finish().await
}

/// A cgroup of a controller, for a daemon.
struct Confined {
    dir: PathBuf,
    v2: bool,
}

impl Confined {
    fn make(node: &Node, controller: &str) -> Result<Self> {
        let name = format!("{}-daemon", node.ground().cgroup().trim_start_matches('/'));
        let v1 = mountinfo("/proc/self/mountinfo").into_iter().find(|mount| {
            mount.kind == "cgroup" && mount.options.split(',').any(|word| word == controller)
        });
        let (top, v2) = match v1 {
            Some(mount) => (mount.point, false),
            None => {
                let top = cgroup_mounts().into_iter().next().context("no cgroups")?;
                // May be on already.
                let _ = fs::write(top.join("cgroup.subtree_control"), format!("+{controller}"));
                (top, true)
            }
        };
        let dir = top.join(name);
        fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
        fs::write(dir.join("cgroup.procs"), node.daemon_pid().to_string())?;
        Ok(Self { dir, v2 })
    }

    fn read(&self, v1: &str, v2: &str) -> Result<u64> {
        let path = self.dir.join(if self.v2 { v2 } else { v1 });
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(text.trim().parse()?)
    }

    fn write(&self, v1: &str, v2: &str, value: &str) -> Result<()> {
        let path = self.dir.join(if self.v2 { v2 } else { v1 });
        fs::write(&path, value).with_context(|| path.display().to_string())
    }
}

impl Drop for Confined {
    fn drop(&mut self) {
        // What is left in it goes back to where it came from.
        let top = self.dir.parent().expect("it was joined").join("cgroup.procs");
        for pid in fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = fs::write(&top, pid);
        }
        let _ = fs::remove_dir(&self.dir);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_processes_it_refuses_and_recovers_without_a_restart() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").run().await?;
    let lives = pod.container(&image).sh("exec sleep 1000").start().await?;
    let before = node.inventory();
    let confined = Confined::make(&node, "pids")?;
    confined.write(
        "pids.max",
        "pids.max",
        &confined.read("pids.current", "pids.current")?.to_string(),
    )?;
    let quick = Duration::from_secs(10);
    for _ in 0..3 {
        let refused = node.pod("late").deadline(quick).run().await;
        let refused = refused.err().context("a pod without processes")?;
        ensure!(refused.message().contains("temporarily unavailable"), "{refused:?}");
        ensure!(refused.code() == Code::ResourceExhausted, "{refused:?}");
    }
    assert_eq!(node.pods().await?.len(), 1);
    ensure!(lives.is_running().await?);
    confined.write("pids.max", "pids.max", "max")?;
    ensure!(!node.has_ended()?, "the daemon has ended");
    node.nothing_left_since(&before).await?;
    let after = node.pod("after").run().await?;
    assert_eq!(after.container(&image).sh("echo fine").output().await?, "fine");
    assert_eq!(lives.sh("echo fine").await?, "fine");
    node.remove_all().await?;
    node.terminate()?;
    drop(confined);
    node.restart().await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_with_little_memory_keeps_to_it() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh("exec sleep 1000").start().await?;
    let confined = Confined::make(&node, "memory")?;
    confined.write("memory.limit_in_bytes", "memory.max", &(64u64 << 20).to_string())?;
    // A layer far larger than that, and commands that say more than anybody may keep.
    let mut noise = vec![0u8; 96 << 20];
    rand::fill(&mut noise[..]);
    let large = Image::busybox()?.layer(vec![Entry::file("noise", 0o644, noise)]).build()?;
    let large = node.registry().await?.push("test/large:1", &large).await?;
    let loud = ["/bin/sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x"];
    let execs = (0..8).map(|_| container.exec_sync(&loud, 60));
    let (pulled, said) = futures::join!(node.pull(&large), futures::future::join_all(execs));
    pulled?;
    for output in said {
        ensure!(output?.stdout.len() == 3_000_000);
    }
    ensure!(!node.has_ended()?, "the daemon was killed for its memory");
    node.remove_all().await?;
    node.terminate()?;
    drop(confined);
    node.restart().await?;
    node.finish().await
}

//! The daemon and the shim die at every crash point of their sources (`holdfast_shim::crash`), one
//! after the other, while a kubelet walks pods through their lives. After each walk everything that
//! was asked for has happened, nothing is left, and who was not concerned has noticed nothing.
//!
//! Points far from each other share a walk. `HOLDFAST_SOAK` gives each passage of each point a walk of
//! its own; `HOLDFAST_CRASH_POINT` tests one point alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use holdfast_integration::{
    Container, Image, Node, Pod,
    crash::{CrashPoints, all_points},
    eventually,
    ground::is_zombie,
    leaks::Inventory,
    node::image_spec,
    tar::Entry,
    wait::Look,
};
use holdfast_protos::cri;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::time::{Instant, sleep};
use tonic::Status;

/// Points that one walk dies at, when time is short.
const AT_ONCE: usize = 5;

/// How long a step may take, with all the restarts in it.
const STEP: Duration = Duration::from_secs(60);

/// Points that are only passed by the clean-up after a crash elsewhere: in the middle of a pod's
/// making, and of a container's.
const TRIGGERS: [&str; 2] = ["daemon.pod.namespaces-made", "daemon.create.root-mounted"];

/// Somebody died under the kubelet, so that the call's fate is not known.
fn is_broken(status: &Status) -> bool {
    let said = status.message();
    matches!(status.code(), tonic::Code::Unavailable | tonic::Code::Cancelled)
        || ["transport error", "h2 protocol error"].iter().any(|text| said.contains(text))
}

/// One node, its supervisor and its kubelet.
struct Kubelet {
    node: Node,
    points: CrashPoints,
    image: String,
    /// An image with a layer of its own, which comes and goes.
    passing: String,
    witness: Container,
    witnessed: cri::ContainerStatus,
    baseline: Inventory,
    attempt: u32,
}

impl Kubelet {
    async fn start() -> Result<Self> {
        let mut node = Node::builder().crash_points().start().await?;
        let image = node.busybox().await?;
        let passing = Image::busybox()?.layer(vec![Entry::file("passing", 0o644, "by")]);
        let passing = node.registry().await?.push("test/passing:1", &passing.build()?).await?;
        let pod = node.pod("witness").run().await?;
        // One process that makes no others, for processes are counted.
        let witness = pod.container(&image).sh("exec sleep 100000").start().await?;
        let witnessed = witness.status().await?;
        let (points, baseline) = (CrashPoints::of(&node), node.inventory());
        Ok(Self { node, points, image, passing, witness, witnessed, baseline, attempt: 0 })
    }

    /// Calls until somebody answers; a daemon that has died is started again.
    async fn call<T>(
        &mut self,
        what: &str,
        call: impl AsyncFn() -> Result<T, Status>,
    ) -> Result<Result<T, Status>> {
        let end = Instant::now() + STEP;
        loop {
            match call().await {
                Err(status) if is_broken(&status) => {
                    ensure!(Instant::now() < end, "{what}: {status}");
                    self.node.revive().await.context(what.to_owned())?;
                    sleep(Duration::from_millis(20)).await;
                }
                answer => return Ok(answer),
            }
        }
    }

    /// The answer must be a good one.
    async fn insist<T>(
        &mut self,
        what: &str,
        call: impl AsyncFn() -> Result<T, Status>,
    ) -> Result<T> {
        let answer = self.call(what, call).await?;
        answer.map_err(|status| anyhow::anyhow!("{what}: {status}"))
    }

    /// The answer must be a refusal with these words.
    async fn refused<T>(
        &mut self,
        what: &str,
        words: &str,
        call: impl AsyncFn() -> Result<T, Status>,
    ) -> Result<()> {
        match self.call(what, call).await? {
            Ok(_) => bail!("{what}: not refused"),
            Err(status) => ensure!(status.message().contains(words), "{what}: {status}"),
        }
        Ok(())
    }

    /// What it is asked for, from the first image to the last removal.
    async fn walk(&mut self) -> Result<()> {
        self.attempt += 1;
        let (cri, image) = (self.node.cri().clone(), self.image.clone());
        let passing = self.passing.clone();
        self.insist("pull", async || {
            let image = Some(image_spec(&passing));
            let request = cri::PullImageRequest { image, ..Default::default() };
            cri.images().pull_image(request).await
        })
        .await?;

        // One that cannot be.
        let impossible = self.node.pod("impossible").attempt(self.attempt).linux(|linux| {
            linux.sysctls.insert("net.ipv4.no_such_thing".into(), "1".into());
        });
        self.refused("run the impossible", "no_such_thing", async || {
            impossible.clone().run().await
        })
        .await?;

        let builder = self.node.pod("a").attempt(self.attempt);
        let pod = self.insist("run", async || builder.clone().run().await).await?;
        let again = self.insist("run again", async || builder.clone().run().await).await?;
        ensure!(again.id == pod.id, "a second pod was made for the same name");
        let impossible = pod.container(&image).name("impossible").command(["/no/such/program"]);
        self.refused("create the impossible", "/no/such/program", async || {
            impossible.clone().create().await
        })
        .await?;

        let main =
            pod.container(&image).sh("trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done");
        let main = self.created_and_started("main", main).await?;
        main.wait_for_log("up").await?;
        let exec = async || main.exec_sync(&["echo", "hello"], 20).await;
        let output = self.insist("exec", exec).await?;
        ensure!(output.stdout == b"hello\n" && output.exit_code == 0, "{output:?}");
        let update = cri::UpdateContainerResourcesRequest {
            container_id: main.id.clone(),
            linux: Some(cri::LinuxContainerResources { cpu_shares: 200, ..Default::default() }),
            ..Default::default()
        };
        self.insist("update", async || {
            cri.runtime().update_container_resources(update.clone()).await
        })
        .await?;
        let update = cri::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: pod.id.clone(),
            overhead: None,
            resources: Some(cri::LinuxContainerResources { cpu_shares: 300, ..Default::default() }),
        };
        self.insist("update the pod", async || {
            cri.runtime().update_pod_sandbox_resources(update.clone()).await
        })
        .await?;

        let brief = pod.container(&image).name("brief").sh("exit 3");
        let brief = self.created_and_started("brief", brief).await?;
        self.ends("brief", &brief, &[3]).await?;
        let deaf = pod.container(&image).name("deaf").sh("trap '' TERM; while :; do sleep 1; done");
        let deaf = self.created_and_started("deaf", deaf).await?;
        self.insist("stop at once", async || deaf.stop(0).await).await?;
        self.ends("deaf", &deaf, &[137]).await?;
        self.insist("stop", async || main.stop(10).await).await?;
        self.ends("main", &main, &[9]).await?;
        self.insist("remove", async || main.remove().await).await?;
        let last = pod.container(&image).name("last").sh("exec sleep 1000");
        self.created_and_started("last", last).await?;
        self.insist("stop the pod", async || pod.stop().await).await?;
        self.insist("remove the pod", async || pod.remove().await).await?;

        self.insist("remove the image", async || {
            let request = cri::RemoveImageRequest { image: Some(image_spec(&passing)) };
            cri.images().remove_image(request).await
        })
        .await?;
        Ok(())
    }

    async fn created_and_started(
        &mut self,
        name: &str,
        container: holdfast_integration::pod::ContainerBuilder,
    ) -> Result<Container> {
        let what = |step| format!("{step} {name}");
        let container =
            self.insist(&what("create"), async || container.clone().create().await).await?;
        let started = self.call(&what("start"), async || container.start().await).await?;
        if let Err(status) = started {
            // It was started by a daemon that could not say so, and has ended since.
            let state = self.insist(&what("look at"), async || container.status().await).await?;
            let ended = state.state() == cri::ContainerState::ContainerExited;
            ensure!(ended && state.started_at > 0, "start {name}: {status}; {state:?}");
        }
        Ok(container)
    }

    async fn ends(&mut self, name: &str, container: &Container, codes: &[i32]) -> Result<()> {
        let end = Instant::now() + STEP;
        loop {
            let status = self.insist("status", async || container.status().await).await?;
            if status.state() == cri::ContainerState::ContainerExited {
                ensure!(codes.contains(&status.exit_code), "{name}: {status:?}");
                return Ok(());
            }
            ensure!(Instant::now() < end, "{name} does not end: {status:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// A pod loses daemon, shim and container at once; the next daemon ends what is left of it.
    async fn lose_a_shim(&mut self) -> Result<()> {
        self.attempt += 1;
        let builder = self.node.pod("orphan").attempt(self.attempt).host_network();
        let pod = self.insist("run", async || builder.clone().run().await).await?;
        let container = pod.container(&self.image).sh("exec sleep 1000");
        let container = self.created_and_started("orphan", container).await?;
        let shim = self.node.pid_file(&pod.id, "shim.pid")?;
        let init = self.node.pid_file(&container.id, "init.pid")?;
        if self.node.has_ended()? {
            self.node.revive().await?;
        }
        self.node.kill9()?;
        // Without it no new shim can take over.
        let bundle = self.node.path().join("state/bundles").join(&pod.id);
        fs::remove_file(holdfast_shim::bundle::Bundle::new(bundle).shim_state())?;
        kill(Pid::from_raw(shim), Signal::SIGKILL)?;
        kill(Pid::from_raw(init), Signal::SIGKILL)?;
        eventually(STEP, "the shim to be dead", async || {
            Ok(Look::when(is_zombie(shim), || shim.to_string()))
        })
        .await?;
        self.node.revive().await?;
        let end = Instant::now() + STEP;
        loop {
            let status = self.insist("status", async || container.status().await).await?;
            if status.state() == cri::ContainerState::ContainerExited {
                ensure!(status.exit_code != 0, "{status:?}");
                break;
            }
            ensure!(Instant::now() < end, "the end is not noticed: {status:?}");
            sleep(Duration::from_millis(20)).await;
        }
        self.insist("stop the pod", async || pod.stop().await).await?;
        self.insist("remove the pod", async || pod.remove().await).await
    }

    /// The latter when there is something to be met there.
    async fn walk_and_lose_a_shim(&mut self) -> Result<()> {
        self.walk().await?;
        if !self.points.armed().is_empty() {
            self.lose_a_shim().await?;
        }
        Ok(())
    }

    /// Something in the state directory that no record names: the next start takes it away.
    fn leave_a_stray(&self) -> Result<()> {
        let id: String = (0..64).map(|_| format!("{:x}", rand::random::<u8>() % 16)).collect();
        let stray = self.node.path().join("state/bundles").join(id);
        fs::create_dir(&stray)?;
        Ok(fs::write(stray.join("hostname"), "stray")?)
    }

    /// Stops and removes what is left of a walk that broke off, as a kubelet does with pods that are
    /// not as they should be. It may try again, but must succeed.
    async fn clean_up(&mut self) -> Result<()> {
        let end = Instant::now() + STEP;
        loop {
            let cri = self.node.cri().clone();
            let list = async || {
                let request = cri::ListPodSandboxRequest::default();
                Ok(cri.runtime().list_pod_sandbox(request).await?.into_inner().items)
            };
            let pods = self.insist("list", list).await?;
            let mut left = Vec::new();
            for found in pods {
                if found.metadata.as_ref().is_some_and(|metadata| metadata.name == "witness") {
                    continue;
                }
                let pod = Pod::existing(&cri, &found.id);
                let gone = match self.call("stop the pod", async || pod.stop().await).await? {
                    Ok(()) => self.call("remove the pod", async || pod.remove().await).await?,
                    refused => refused,
                };
                if let Err(status) = gone {
                    left.push(status);
                }
            }
            if left.is_empty() {
                return Ok(());
            }
            ensure!(Instant::now() < end, "cannot be removed: {left:?}");
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// What holds between two walks.
    async fn all_is_well(&mut self) -> Result<()> {
        self.node.revive().await?;
        self.node.nothing_left_since(&self.baseline).await?;
        let pods = self.node.pods().await?;
        ensure!(pods.len() == 1, "left: {pods:?}");
        let containers = self.node.containers().await?;
        ensure!(containers.len() == 1, "left: {containers:?}");
        let images = self.node.images().await?;
        ensure!(images.len() == 1, "left: {images:?}");
        let now = self.witness.status().await?;
        ensure!(
            now == self.witnessed,
            "the witness has noticed: {now:?}, was {:?}",
            self.witnessed
        );
        Ok(())
    }

    /// A walk that dies at these points, each at that passage.
    async fn die_at(&mut self, points: &[(String, usize)], how: How) -> Result<()> {
        self.points.reset()?;
        for (name, passage) in points {
            self.points.arm(name, *passage)?;
        }
        if how == How::Recovering {
            for trigger in TRIGGERS {
                self.points.arm(trigger, 1)?;
            }
            self.leave_a_stray()?;
        }
        match how {
            How::Daemon | How::Recovering => {
                self.walk().await?;
                self.lose_a_shim().await?;
            }
            How::Shim => {
                // Each death may cost a pod; the kubelet makes another.
                let mut walked = self.walk_and_lose_a_shim().await;
                for _ in 0..points.len() {
                    if walked.is_ok() {
                        break;
                    }
                    self.clean_up().await?;
                    walked = self.walk_and_lose_a_shim().await;
                }
                walked?;
                self.clean_up().await?;
            }
        }
        self.all_is_well().await
    }

    /// The same, and every point must have been reached.
    async fn die_at_each(&mut self, points: &[(String, usize)], how: How) -> Result<()> {
        let names = points.iter().map(|(name, nth)| format!("{name} ({nth})"));
        let names = names.collect::<Vec<_>>().join(", ");
        let begun = Instant::now();
        self.die_at(points, how).await.with_context(|| format!("dying at {names}"))?;
        let missed: BTreeSet<_> = self.points.armed().into_iter().collect();
        for (name, passage) in points.iter().filter(|(name, _)| missed.contains(name)) {
            // Another death led the walk around it; alone it must be met.
            let alone = [(name.clone(), *passage)];
            self.die_at(&alone, how).await.with_context(|| format!("dying at {name} alone"))?;
            ensure!(self.points.armed().is_empty(), "{name} ({passage}) was not passed again");
        }
        println!("{:>5} ms  {names}", begun.elapsed().as_millis());
        Ok(())
    }

    /// The points of a walk without a death, in order, with how often each is passed.
    async fn passages(&mut self, how: How) -> Result<Vec<(String, usize)>> {
        self.die_at(&[], how).await.context("a walk without a death")?;
        if how == How::Shim {
            self.points.reset()?;
            self.walk().await?;
            self.lose_a_shim().await?;
        }
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        let mut order = Vec::new();
        for name in self.points.trace() {
            let count = counts.entry(name.clone()).or_default();
            *count += 1;
            if *count == 1 {
                order.push(name);
            }
        }
        Ok(order.into_iter().map(|name| (name.clone(), counts[&name])).collect())
    }

    async fn finish(mut self) -> Result<()> {
        self.all_is_well().await?;
        // And that is what is on record too.
        self.node.kill9()?;
        self.node.restart().await?;
        self.all_is_well().await?;
        self.node.finish().await
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// The daemon dies; whatever is asked for happens all the same, at the first time of asking.
    Daemon,
    /// The same, in the clean-up after deaths at [`TRIGGERS`].
    Recovering,
    /// A shim dies.
    Shim,
}

fn soak() -> bool {
    std::env::var_os("HOLDFAST_SOAK").is_some()
}

/// The walks to make: each has points that are far from each other.
fn walks(points: &[(String, usize)]) -> Vec<Vec<(String, usize)>> {
    if soak() {
        let each = points
            .iter()
            .flat_map(|(name, count)| (1..=*count).map(|passage| vec![(name.clone(), passage)]));
        return each.collect();
    }
    let count = points.len().div_ceil(AT_ONCE);
    (0..count)
        .map(|first| {
            points.iter().skip(first).step_by(count).map(|(name, _)| (name.clone(), 1)).collect()
        })
        .collect()
}

/// The part of the points that one test takes, so that several can run side by side.
async fn part(how: How, part: usize, of: usize) -> Result<()> {
    let mut kubelet = Kubelet::start().await?;
    let program = if how == How::Shim { "shim." } else { "daemon." };
    let mut points = kubelet.passages(how).await?;
    points.retain(|(name, _)| name.starts_with(program));
    if let Ok(only) = std::env::var("HOLDFAST_CRASH_POINT") {
        points.retain(|(name, _)| *name == only);
    }
    if how == How::Recovering {
        let plain = kubelet.passages(How::Daemon).await?;
        points.retain(|(name, _)| !plain.iter().any(|(other, _)| other == name));
    }
    for points in walks(&points).into_iter().skip(part).step_by(of) {
        kubelet.die_at_each(&points, how).await?;
    }
    kubelet.finish().await
}

/// Started by a daemon that died of it, ended while there was none.
#[tokio::test(flavor = "multi_thread")]
async fn who_ended_before_anybody_knew_of_its_start_has_both_its_times() -> Result<()> {
    let mut node = Node::builder().crash_points().start().await?;
    let image = node.busybox().await?;
    let points = CrashPoints::of(&node);
    let pod = node.pod("a").run().await?;
    let brief = pod.container(&image).name("brief").sh("exit 3").create().await?;
    points.arm("daemon.start.task-started", 1)?;
    let started = brief.start().await;
    ensure!(started.as_ref().is_err_and(is_broken), "{started:?}");
    ensure!(points.armed().is_empty(), "it did not die there");
    let record = node.path().join("state/bundles").join(&brief.id).join("exit.json");
    eventually(STEP, "an exit record", async || {
        let written = fs::read_to_string(&record).unwrap_or_default();
        Ok(Look::when(written.contains("pid"), || written))
    })
    .await?;
    // Its connections break before it is a zombie.
    eventually(STEP, "the daemon to be dead", async || {
        Ok(Look::when(node.has_ended()?, || "it is not".into()))
    })
    .await?;
    node.revive().await?;
    let status = eventually(STEP, "the end to be known", async || {
        let status = match brief.status().await {
            // The connection of before.
            Err(status) if is_broken(&status) => return Ok(Look::Not(status.to_string())),
            status => status?,
        };
        let exited = status.state() == cri::ContainerState::ContainerExited;
        Ok(if exited { Look::Done(status) } else { Look::Not(format!("{status:?}")) })
    })
    .await?;
    assert_eq!(status.exit_code, 3);
    let (created, began, ended) = (status.created_at, status.started_at, status.finished_at);
    ensure!(created < began && began <= ended, "{created} {began} {ended}");
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_dies_at_each_point_of_its_walks_first_half() -> Result<()> {
    part(How::Daemon, 0, 2).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_dies_at_each_point_of_its_walks_second_half() -> Result<()> {
    part(How::Daemon, 1, 2).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_dies_at_each_point_of_its_recovery() -> Result<()> {
    part(How::Recovering, 0, 1).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_dies_at_each_of_its_points() -> Result<()> {
    part(How::Shim, 0, 1).await
}

/// A point that no walk passes is tested by nobody.
#[tokio::test(flavor = "multi_thread")]
async fn every_crash_point_of_the_sources_is_passed() -> Result<()> {
    let mut kubelet = Kubelet::start().await?;
    let mut passed = BTreeSet::new();
    for how in [How::Daemon, How::Recovering, How::Shim] {
        passed.extend(kubelet.passages(how).await?.into_iter().map(|(name, _)| name));
    }
    let all = all_points()?;
    let never: Vec<_> = all.difference(&passed).collect();
    ensure!(never.is_empty(), "never passed: {never:?}");
    let unknown: Vec<_> = passed.difference(&all).collect();
    ensure!(unknown.is_empty(), "not found in the sources: {unknown:?}");
    kubelet.finish().await
}

#[test]
fn walks_have_every_point_once() {
    let points: Vec<_> = (0..23).map(|number| (format!("p{number}"), 2)).collect();
    let walks = walks(&points);
    let all: Vec<_> = walks.iter().flatten().map(|(name, _)| name.clone()).collect();
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 23);
    assert_eq!(all.len(), if soak() { 46 } else { 23 });
}

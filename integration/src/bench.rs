//! `make bench`: what a runtime costs above the programs that it must call, and beside containerd.
//!
//! Every runtime is a side: a CRI socket with a bridge, a cgroup and directories of its own. All of
//! them get the same requests in turns, one round each, so that whatever else the machine does falls on
//! all of them; the bare plugins and runc take their turn in the same rounds. Everything is measured
//! from outside: clocks around CRI calls, and the kernel's own account of memory.

pub mod endurance;
mod events;
pub mod floor;
pub mod peer;
mod pull;
pub mod samples;
pub mod shim;
mod survival;
mod watch;

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use holdfast_protos::cri as api;

pub use self::pull::PULLED;
use self::{
    floor::Floor,
    peer::Containerd,
    samples::{
        CONTAINERD, CREATE, CREATE_START, Column, EXEC, HOLDFAST, LIST, LIST_QUICK, POD_MEMORY,
        REMOVE, REMOVE_POD, RESTART, RUN_POD, SHIM, START, STOP, STOP_POD, Samples,
    },
};
use crate::{
    Image, Node, Registry,
    cri::{Cri, Images, Runtime},
    ground::Ground,
    node::image_spec,
    pod::PodBuilder,
    wait::{Look, eventually},
};

/// Calls of exec in a round.
const EXECS: usize = 3;
/// Pods of the memory and restart sections.
const PODS: usize = 30;
/// Changes that are under way at once where no clock runs.
const WIDTH: usize = 4;
/// How long a restarted daemon may take to list everything.
const RESTART_LIMIT: Duration = Duration::from_secs(60);
/// How long memory may settle before it is read.
const SETTLE: Duration = Duration::from_secs(3);
/// A command that exits at once on SIGTERM, although it is PID 1, and says when it is ready for that.
const OBEDIENT: &str = "trap 'exit 0' TERM; echo ready; sleep 100000 & wait";

/// Milliseconds since.
fn millis(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1000.0
}

/// What can be measured on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// Memory of idle pods.
    Memory,
    /// SIGKILL and start with running pods.
    Restart,
    /// The life of a pod with one container.
    Lifecycle,
    /// Lists with many containers.
    List,
    /// Lists, statuses, statistics and metrics with many running containers.
    Watch,
    /// Pull of an image.
    Pull,
    /// Memory and output of a shim in use.
    Endurance,
    /// Subscribers of events.
    Events,
    /// The daemon killed with a hundred pods, while one of them writes.
    Survival,
    /// What others notice of what never answers.
    Stuck,
    /// The shims alone, and ours under containerd.
    Shim,
}

impl Section {
    /// In the order in which they run.
    pub const ALL: [Self; 11] = [
        Self::Shim,
        Self::Memory,
        Self::Restart,
        Self::Lifecycle,
        Self::List,
        Self::Watch,
        Self::Pull,
        Self::Endurance,
        Self::Events,
        Self::Survival,
        Self::Stuck,
    ];

    /// As `--only` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Restart => "restart",
            Self::Lifecycle => "lifecycle",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Pull => "pull",
            Self::Events => "events",
            Self::Shim => "shim",
            Self::Endurance => "endurance",
            Self::Survival => "survival",
            Self::Stuck => "stuck",
        }
    }
}

/// What to measure and how often.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Fewer rounds and a smaller list.
    pub quick: bool,
    /// Rounds of the lifecycle; the others follow from `quick`.
    pub rounds: usize,
    /// Which parts.
    pub sections: Vec<Section>,
    /// Whether containerd is measured where it is installed.
    pub peer: bool,
    /// Which images the pull section pulls; empty: all of them.
    pub images: Vec<String>,
}

/// Measures. Figures that were taken before an error are in `samples` all the same.
///
/// # Errors
/// A program is missing, a call fails, or something is left at the end.
pub async fn run(plan: &Plan, samples: &mut Samples, facts: &mut Vec<String>) -> Result<()> {
    let runc = peer::in_path("runc").context("runc is not installed ('make deps')")?;
    let busybox = Image::busybox()?.build()?;
    let registry = Registry::start().await?;
    let image = registry.push("bench/busybox:1", &busybox).await?;
    let pause_image = Image::busybox()?.cmd(["/bin/sleep", "2147483647"]).build()?;
    let pause = registry.push("bench/pause:1", &pause_image).await?;

    if plan.sections.contains(&Section::Shim) {
        let ours = crate::binaries::binaries()?.shim;
        shim::measure(&ours, &runc, plan.rounds, samples).await?;
        if let Some(binary) = if plan.peer { peer::find()? } else { None } {
            for (column, with) in [(HOLDFAST, Some(ours.as_path())), (CONTAINERD, None)] {
                progress(format!("{column}'s shim under containerd"));
                let peer =
                    Containerd::start_with(&binary, &runc, registry.host(), &pause, with).await?;
                for reference in [&image, &pause] {
                    let request = api::PullImageRequest {
                        image: Some(image_spec(reference)),
                        ..Default::default()
                    };
                    peer.cri().images().pull_image(request).await?;
                }
                shim::under_containerd(column, &peer, &image, samples).await?;
            }
        }
    }
    if plan.sections.contains(&Section::Stuck) {
        progress("what never answers");
        survival::stuck(plan, samples).await?;
    }
    if plan.sections.iter().all(|section| matches!(section, Section::Shim | Section::Stuck)) {
        return Ok(());
    }

    let mut sides = Vec::new();
    // The harness asks for debug lines; what is shipped logs at "info".
    let metrics = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let node = Node::builder()
        .env("RUST_LOG", "info")
        .config(&format!("[metrics]\naddress = {metrics:?}\n"))
        .start()
        .await?;
    sides.push(Side::new(Daemon::Holdfast(node), &image));
    match if plan.peer { peer::find()? } else { None } {
        Some(binary) => {
            let peer = Containerd::start(&binary, &runc, registry.host(), &pause).await?;
            facts.push(format!("containerd {}", peer.version()));
            sides.push(Side::new(Daemon::Containerd(peer), &image));
        }
        None => facts.push("containerd: not measured".into()),
    }
    for side in &mut sides {
        side.pull(&image).await?;
        if side.column == CONTAINERD {
            side.pull(&pause).await?;
        }
        // The first pod of a daemon makes the bridge and loads what later ones find loaded.
        side.lifecycle(None).await?;
    }

    let mut outcome = sections(plan, samples, facts, &mut sides, &registry, &busybox, &runc).await;
    if outcome.is_ok() && plan.sections.contains(&Section::Survival) {
        outcome = survival::run(plan, &metrics, samples, &mut sides).await;
    }
    for side in sides {
        let name = side.column;
        let finished = side.finish().await.with_context(|| format!("clean up after {name}"));
        outcome = outcome.and(finished);
    }
    outcome
}

async fn sections(
    plan: &Plan,
    samples: &mut Samples,
    facts: &mut Vec<String>,
    sides: &mut [Side],
    registry: &Registry,
    busybox: &Image,
    runc: &Path,
) -> Result<()> {
    let wants = |section| plan.sections.contains(&section);
    if wants(Section::Memory) || wants(Section::Restart) {
        progress(format!("{PODS} pods"));
        for side in sides.iter_mut() {
            side.memory(wants(Section::Memory).then_some(&mut *samples)).await?;
        }
        let rounds = if plan.quick { 2 } else { 7 };
        for round in 0..if wants(Section::Restart) { rounds } else { 0 } {
            progress(format!("restart {}/{rounds}", round + 1));
            for side in sides.iter_mut() {
                side.restart(samples).await?;
            }
        }
        for side in sides.iter_mut() {
            side.clear().await?;
        }
    }
    if wants(Section::Lifecycle) {
        let mut floor = Floor::new(busybox, runc)?;
        floor.round(&mut Samples::default()).await?;
        for round in 0..plan.rounds {
            progress(format!("lifecycle {}/{}", round + 1, plan.rounds));
            floor.round(samples).await?;
            for side in sides.iter_mut() {
                side.lifecycle(Some(samples)).await?;
            }
        }
    }
    if wants(Section::List) {
        list(plan, samples, sides).await?;
    }
    if wants(Section::Watch) {
        watch::watch(plan, samples, sides).await?;
    }
    if wants(Section::Pull) {
        pull::run(plan, samples, sides, registry).await?;
    }
    if wants(Section::Endurance) {
        let loud = registry.push("bench/loud:1", &endurance::image()?).await?;
        let floor = Floor::new(busybox, runc)?;
        endurance::run(plan.quick, samples, sides, &loud, &floor, facts).await?;
    }
    if wants(Section::Events) {
        events::run(plan, samples, sides).await?;
    }
    Ok(())
}

async fn list(plan: &Plan, samples: &mut Samples, sides: &mut [Side]) -> Result<()> {
    let (metric, pods, each) = if plan.quick { (LIST_QUICK, 5, 20) } else { (LIST, 10, 50) };
    for side in sides.iter_mut() {
        progress(format!("{} containers for {}", pods * each, side.column));
        side.fill(pods, each, &["/bin/true"]).await?;
    }
    for _ in 0..if plan.quick { 10 } else { 40 } {
        for side in sides.iter_mut() {
            for _ in 0..10 {
                let started = Instant::now();
                let found = side.containers().await?;
                samples.add(metric, side.column, millis(started));
                ensure!(found.len() == pods * each, "{} of {}", found.len(), pods * each);
            }
        }
    }
    for side in sides.iter_mut() {
        side.clear().await?;
    }
    Ok(())
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there are two of them in all")]
enum Daemon {
    Holdfast(Node),
    Containerd(Containerd),
}

impl Daemon {
    fn ground(&self) -> &Ground {
        match self {
            Self::Holdfast(node) => node.ground(),
            Self::Containerd(peer) => peer.ground(),
        }
    }
    fn cri(&self) -> &Cri {
        match self {
            Self::Holdfast(node) => node.cri(),
            Self::Containerd(peer) => peer.cri(),
        }
    }
    fn pid(&self) -> i32 {
        match self {
            Self::Holdfast(node) => node.daemon_pid(),
            Self::Containerd(peer) => peer.pid(),
        }
    }
    fn kill9(&mut self) -> Result<()> {
        match self {
            Self::Holdfast(node) => node.kill9(),
            Self::Containerd(peer) => peer.kill9(),
        }
    }
    fn launch(&mut self) -> Result<()> {
        match self {
            Self::Holdfast(node) => node.launch(),
            Self::Containerd(peer) => peer.launch(),
        }
    }
}

/// A runtime under measurement, with one connection that is kept, as a kubelet keeps it.
#[derive(Debug)]
struct Side {
    column: Column,
    daemon: Daemon,
    runtime: Runtime,
    images: Images,
    image: String,
    pods: u32,
}

impl Side {
    fn new(daemon: Daemon, image: &str) -> Self {
        let cri = daemon.cri();
        Self {
            column: match daemon {
                Daemon::Holdfast(_) => HOLDFAST,
                Daemon::Containerd(_) => CONTAINERD,
            },
            runtime: cri.runtime(),
            images: cri.images(),
            image: image.into(),
            pods: 0,
            daemon,
        }
    }

    fn pod_request(&mut self) -> api::RunPodSandboxRequest {
        self.pods += 1;
        let name = format!("bench{}", self.pods);
        let ground = self.daemon.ground();
        let logs = ground.path().join("logs").join(&name);
        PodBuilder::at(self.daemon.cri(), &name, &ground.cgroup(), &logs).request()
    }

    fn container_request(
        &self,
        pod: &str,
        config: Option<&api::PodSandboxConfig>,
        name: &str,
        argv: &[&str],
    ) -> api::CreateContainerRequest {
        let options = api::NamespaceOption {
            pid: api::NamespaceMode::Container.into(),
            ..Default::default()
        };
        api::CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(api::ContainerConfig {
                metadata: Some(api::ContainerMetadata { name: name.into(), attempt: 0 }),
                image: Some(image_spec(&self.image)),
                command: argv.iter().map(|word| (*word).into()).collect(),
                log_path: format!("{name}.log"),
                linux: Some(api::LinuxContainerConfig {
                    security_context: Some(api::LinuxContainerSecurityContext {
                        namespace_options: Some(options),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            sandbox_config: config.cloned(),
        }
    }

    async fn run_pod(&mut self) -> Result<(String, Option<api::PodSandboxConfig>)> {
        let request = self.pod_request();
        let config = request.config.clone();
        let directory = config.as_ref().map(|config| config.log_directory.clone());
        fs::create_dir_all(directory.unwrap_or_default())?;
        let answer = self.runtime.run_pod_sandbox(request).await.context("RunPodSandbox")?;
        Ok((answer.into_inner().pod_sandbox_id, config))
    }

    /// A pod with a container from its beginning to its end.
    async fn lifecycle(&mut self, samples: Option<&mut Samples>) -> Result<()> {
        let mut scratch = Samples::default();
        let samples = samples.unwrap_or(&mut scratch);
        let column = self.column;

        let started = Instant::now();
        let (pod, config) = self.run_pod().await?;
        samples.add(RUN_POD, column, millis(started));

        let argv = ["/bin/sh", "-c", OBEDIENT];
        let request = self.container_request(&pod, config.as_ref(), "main", &argv);
        let started = Instant::now();
        let answer = self.runtime.create_container(request).await.context("CreateContainer")?;
        let created = millis(started);
        samples.add(CREATE, column, created);
        let container = answer.into_inner().container_id;

        let request = api::StartContainerRequest { container_id: container.clone() };
        let started = Instant::now();
        self.runtime.start_container(request).await.context("StartContainer")?;
        let took = millis(started);
        samples.add(START, column, took);
        samples.add(CREATE_START, column, created + took);

        let log = config.map(|config| config.log_directory).unwrap_or_default();
        let log = PathBuf::from(log).join("main.log");
        eventually(Duration::from_secs(30), "the container to be ready", async || {
            let text = fs::read_to_string(&log).unwrap_or_default();
            Ok(Look::when(text.contains("ready"), || format!("{text:?}")))
        })
        .await?;

        for _ in 0..EXECS {
            let request = api::ExecSyncRequest {
                container_id: container.clone(),
                cmd: vec!["/bin/true".into()],
                timeout: 30,
            };
            let started = Instant::now();
            let answer = self.runtime.exec_sync(request).await.context("ExecSync")?;
            samples.add(EXEC, column, millis(started));
            let code = answer.into_inner().exit_code;
            ensure!(code == 0, "/bin/true ends with {code}");
        }

        let request = api::StopContainerRequest { container_id: container.clone(), timeout: 30 };
        let started = Instant::now();
        self.runtime.stop_container(request).await.context("StopContainer")?;
        samples.add(STOP, column, millis(started));

        let request = api::RemoveContainerRequest { container_id: container };
        let started = Instant::now();
        self.runtime.remove_container(request).await.context("RemoveContainer")?;
        samples.add(REMOVE, column, millis(started));

        let request = api::StopPodSandboxRequest { pod_sandbox_id: pod.clone() };
        let started = Instant::now();
        self.runtime.stop_pod_sandbox(request).await.context("StopPodSandbox")?;
        samples.add(STOP_POD, column, millis(started));

        let request = api::RemovePodSandboxRequest { pod_sandbox_id: pod };
        let started = Instant::now();
        self.runtime.remove_pod_sandbox(request).await.context("RemovePodSandbox")?;
        samples.add(REMOVE_POD, column, millis(started));
        Ok(())
    }

    /// Runs the idle pods; what a shim has, and what the daemon grew by for each.
    async fn memory(&mut self, samples: Option<&mut Samples>) -> Result<()> {
        tokio::time::sleep(SETTLE).await;
        let before = pss(self.daemon.pid())?;
        for _ in 0..PODS {
            self.idle_pod().await?;
        }
        let Some(samples) = samples else { return Ok(()) };
        tokio::time::sleep(SETTLE).await;
        let after = pss(self.daemon.pid())?;
        let shims = self
            .daemon
            .ground()
            .processes()
            .into_iter()
            .filter(|pid| is_shim(*pid))
            .map(pss)
            .collect::<Result<Vec<f64>>>()?;
        ensure!(shims.len() == PODS, "{PODS} pods have {} shims", shims.len());
        let growth = (after - before) / PODS as f64;
        for shim in shims {
            samples.add(SHIM, self.column, shim);
            samples.add(POD_MEMORY, self.column, shim + growth);
        }
        Ok(())
    }

    /// A pod with a container that does nothing.
    async fn idle_pod(&mut self) -> Result<()> {
        let (pod, config) = self.run_pod().await?;
        let argv = ["/bin/sleep", "100000"];
        let request = self.container_request(&pod, config.as_ref(), "idle", &argv);
        let id = self.runtime.create_container(request).await?.into_inner().container_id;
        let request = api::StartContainerRequest { container_id: id };
        self.runtime.start_container(request).await?;
        Ok(())
    }

    async fn restart(&mut self, samples: &mut Samples) -> Result<()> {
        let started = self.kill_and_list(PODS).await?;
        samples.add(RESTART, self.column, millis(started));
        Ok(())
    }

    /// Kills the daemon and starts it, until it lists so many pods as ready and as many containers as
    /// running; when it was started.
    async fn kill_and_list(&mut self, pods: usize) -> Result<Instant> {
        self.daemon.kill9()?;
        let cri = self.daemon.cri().deadline(Duration::from_secs(5));
        let started = Instant::now();
        self.daemon.launch()?;
        let listed = loop {
            if complete(&cri, pods).await.unwrap_or(false) {
                break started.elapsed();
            }
            if started.elapsed() > RESTART_LIMIT {
                bail!("{} does not list {pods} running pods after its restart", self.column);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        progress(format!("listed after {listed:?}"));
        self.runtime = cri.deadline(Duration::from_secs(120)).runtime();
        self.images = cri.deadline(Duration::from_secs(120)).images();
        Ok(started)
    }

    /// Pods with containers that were created and not started.
    async fn fill(&mut self, pods: usize, each: usize, argv: &[&str]) -> Result<()> {
        for _ in 0..pods {
            let (pod, config) = self.run_pod().await?;
            let requests: Vec<_> = (0..each)
                .map(|number| {
                    let name = format!("c{number}");
                    self.container_request(&pod, config.as_ref(), &name, argv)
                })
                .collect();
            stream::iter(requests)
                .map(|request| {
                    let mut runtime = self.runtime.clone();
                    async move { runtime.create_container(request).await }
                })
                .buffer_unordered(WIDTH)
                .try_collect::<Vec<_>>()
                .await?;
        }
        Ok(())
    }

    async fn containers(&mut self) -> Result<Vec<api::Container>> {
        let request = api::ListContainersRequest::default();
        Ok(self.runtime.list_containers(request).await?.into_inner().containers)
    }

    async fn pull(&mut self, reference: &str) -> Result<()> {
        let pulled = self.images.pull_image(pull_request(reference)).await;
        pulled.with_context(|| format!("{} pulls {reference}", self.column))?;
        Ok(())
    }

    async fn remove_image(&mut self, reference: &str) -> Result<()> {
        let request = api::RemoveImageRequest { image: Some(image_spec(reference)) };
        self.images.remove_image(request).await?;
        Ok(())
    }

    /// Stops and removes every pod.
    async fn clear(&mut self) -> Result<()> {
        let request = api::ListPodSandboxRequest::default();
        let pods = self.runtime.list_pod_sandbox(request).await?.into_inner().items;
        let runtime = &self.runtime;
        stream::iter(pods)
            .map(|pod| {
                let mut runtime = runtime.clone();
                async move {
                    let id = pod.id;
                    let request = api::StopPodSandboxRequest { pod_sandbox_id: id.clone() };
                    runtime.stop_pod_sandbox(request).await?;
                    let request = api::RemovePodSandboxRequest { pod_sandbox_id: id };
                    runtime.remove_pod_sandbox(request).await
                }
            })
            .buffer_unordered(WIDTH)
            .try_collect::<Vec<_>>()
            .await?;
        Ok(())
    }

    /// Removes everything; for ours with the harness' check that nothing is left.
    async fn finish(mut self) -> Result<()> {
        self.clear().await?;
        match self.daemon {
            Daemon::Holdfast(node) => node.finish().await,
            // Its ground is swept when it is dropped.
            Daemon::Containerd(peer) => {
                drop(peer);
                Ok(())
            }
        }
    }
}

fn pull_request(reference: &str) -> api::PullImageRequest {
    api::PullImageRequest { image: Some(image_spec(reference)), ..Default::default() }
}

async fn complete(cri: &Cri, pods: usize) -> Result<bool> {
    let mut runtime = cri.runtime();
    let request = api::ListPodSandboxRequest::default();
    let listed = runtime.list_pod_sandbox(request).await?.into_inner().items;
    let ready = |pod: &&api::PodSandbox| pod.state() == api::PodSandboxState::SandboxReady;
    if listed.iter().filter(ready).count() != pods {
        return Ok(false);
    }
    let request = api::ListContainersRequest::default();
    let containers = runtime.list_containers(request).await?.into_inner().containers;
    let running = |c: &&api::Container| c.state() == api::ContainerState::ContainerRunning;
    Ok(containers.iter().filter(running).count() == pods)
}

fn is_shim(pid: i32) -> bool {
    fs::read_link(format!("/proc/{pid}/exe"))
        .ok()
        .and_then(|path| Some(path.file_name()?.to_string_lossy().starts_with("containerd-shim")))
        .unwrap_or(false)
}

/// Proportional set size in KiB.
fn pss(pid: i32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let line = line.with_context(|| format!("no Pss in {path}"))?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// User and kernel time of a process with all of its threads, those that ended too (proc_pid_stat(5)).
fn cpu(pid: i32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    // The name, in brackets, may have anything in it.
    let fields = text.rsplit_once(')').context("no name in it")?.1;
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(str::parse::<u64>)
        .sum::<Result<u64, _>>()
        .with_context(|| format!("no times in {path}"))?;
    let second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no clock")?;
    Ok(Duration::from_secs_f64(ticks as f64 / second as f64))
}

fn progress(what: impl std::fmt::Display) {
    eprintln!("bench: {what}");
}

//! A node: one `holdfastd` process on a [`Ground`] of its own.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use holdfast_protos::cri;
use serde_json::json;

use crate::{
    binaries::{Binaries, binaries},
    crash::CrashPoints,
    cri::Cri,
    disk::Disk,
    fake::{FakeCriu, GatedCni, GatedRuntime},
    ground::{Ground, Process},
    hugetlb::Hugetlb,
    image::Image,
    leaks::Inventory,
    pod::{Pod, PodBuilder},
    registry::Registry,
    wait::{Look, eventually},
};

/// How long a daemon has from its start to its first answer. Generous: it is not what is measured.
const READY: Duration = Duration::from_secs(30);
/// How long what was removed may take to be gone.
const SETTLE: Duration = Duration::from_secs(15);

/// The network of a node's pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cni {
    /// A bridge with IPv4 addresses by host-local, port mappings by portmap.
    #[default]
    Bridge,
    /// The same with IPv6 addresses too.
    DualStack,
    /// No configuration at all: only pods on the node's network can run.
    None,
}

/// Describes a node.
#[derive(Clone, Debug)]
pub struct Builder {
    cni: Cni,
    default_runtime: String,
    gated_runtime: bool,
    gated_cni: bool,
    crash_points: bool,
    disks: Vec<(String, u64)>,
    fake_criu: bool,
    log_level: String,
    config: String,
    runtime_config: String,
    network_config: String,
    images_config: String,
    nri_config: String,
    env: Vec<(String, String)>,
    installed: Option<Binaries>,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            cni: Cni::default(),
            default_runtime: "runc".into(),
            gated_runtime: false,
            gated_cni: false,
            crash_points: false,
            disks: Vec::new(),
            fake_criu: false,
            log_level: "info,holdfast_daemon=debug,holdfast_shim=debug".into(),
            config: String::new(),
            runtime_config: String::new(),
            network_config: String::new(),
            images_config: String::new(),
            nri_config: String::new(),
            env: Vec::new(),
            installed: None,
        }
    }
}

impl Builder {
    /// The pods' network.
    pub fn cni(mut self, cni: Cni) -> Self {
        self.cni = cni;
        self
    }
    /// The handler of pods that name none: "runc" or "crun".
    pub fn default_runtime(mut self, name: &str) -> Self {
        self.default_runtime = name.into();
        self
    }
    /// Puts a script between the shim and runc that can be told to hang or fail.
    pub fn gated_runtime(mut self) -> Self {
        self.gated_runtime = true;
        self
    }
    /// Puts a script before the bridge plugin that can be told to hang or fail.
    pub fn gated_cni(mut self) -> Self {
        self.gated_cni = true;
        self
    }
    /// Lets the daemon and the shims die where a test arms a crash point.
    pub fn crash_points(mut self) -> Self {
        self.crash_points = true;
        self
    }
    /// Puts a directory of the node (`root`, `state`, `logs`) on a file system of its own, an ext4 of so
    /// many MiB.
    pub fn disk(mut self, directory: &str, mib: u64) -> Self {
        self.disks.push((directory.into(), mib));
        self
    }
    /// Checkpoints are made by a script: see [`crate::fake`].
    pub fn fake_criu(mut self) -> Self {
        self.gated_runtime = true;
        self.fake_criu = true;
        self
    }
    /// What the daemon logs, instead of almost everything.
    pub fn log_level(mut self, level: &str) -> Self {
        self.log_level = level.into();
        self
    }
    /// More of the configuration file: whole tables.
    pub fn config(mut self, toml: &str) -> Self {
        self.config.push_str(toml);
        self.config.push('\n');
        self
    }
    /// More lines of the table `[runtime]`.
    pub fn runtime_config(mut self, lines: &str) -> Self {
        self.runtime_config.push_str(lines);
        self.runtime_config.push('\n');
        self
    }
    /// More lines of the table `[network]`.
    pub fn network_config(mut self, lines: &str) -> Self {
        self.network_config.push_str(lines);
        self.network_config.push('\n');
        self
    }
    /// More lines of the table `[images]`.
    pub fn images_config(mut self, lines: &str) -> Self {
        self.images_config.push_str(lines);
        self.images_config.push('\n');
        self
    }
    /// More lines of the table `[nri]`, and tables of it after them.
    pub fn nri_config(mut self, lines: &str) -> Self {
        self.nri_config.push_str(lines);
        self.nri_config.push('\n');
        self
    }
    /// An environment variable of the daemon.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.push((key.into(), value.into()));
        self
    }

    /// Runs these programs, from a directory of the node's own: [`Node::install`] can replace them.
    pub fn installed(mut self, binaries: &Binaries) -> Self {
        self.installed = Some(binaries.clone());
        self
    }

    /// Starts it and waits until it serves.
    ///
    /// # Errors
    /// A binary is missing; the daemon ends or does not answer: the error has the end of its log.
    pub async fn start(mut self) -> Result<Node> {
        let ground = Ground::new()?;
        let binaries = match self.installed.take() {
            Some(Binaries { daemon, shim, cli }) => Binaries {
                daemon: install(&ground, &daemon)?,
                shim: install(&ground, &shim)?,
                cli: install(&ground, &cli)?,
            },
            None => binaries()?,
        };
        if self.crash_points {
            let points = CrashPoints::install(&ground.path().join("crash"))?;
            self.env.push(points.variable());
        }
        let disks = self.disks.iter();
        let disks = disks.map(|(directory, mib)| Disk::mount(ground.path(), directory, *mib));
        let disks = disks.collect::<Result<Vec<_>>>()?;
        let hugetlb = Hugetlb::hold(self.default_runtime == "crun")?;
        let gated_cni = if self.gated_cni { Some(GatedCni::install(ground.path())?) } else { None };
        let gated_runtime =
            if self.gated_runtime { Some(GatedRuntime::install(ground.path())?) } else { None };
        let fake_criu = if self.fake_criu { Some(FakeCriu::install(ground.path())?) } else { None };
        if let Some(criu) = &fake_criu {
            self.env.push(("PATH".into(), criu.path()));
        }
        write_network(&ground, self.cni)?;
        let config = write_config(&self, &ground, &binaries, gated_runtime.as_ref())?;
        let cri = Cri::new(ground.path().join("cri.sock"));
        let mut node = Node {
            daemon: None,
            registry: None,
            baseline: Inventory::default(),
            config,
            cri,
            env: self.env,
            binaries,
            gated_runtime,
            gated_cni,
            disks,
            fake_criu,
            ground,
            finished: false,
            _hugetlb: hugetlb,
        };
        node.restart().await?;
        node.baseline = node.inventory();
        Ok(node)
    }
}

/// A running node. See the crate's documentation for the story it takes part in.
#[derive(Debug)]
pub struct Node {
    // Dropped in this order: the daemon first, its ground and what crun needs last.
    daemon: Option<Process>,
    registry: Option<Registry>,
    baseline: Inventory,
    config: PathBuf,
    cri: Cri,
    env: Vec<(String, String)>,
    binaries: Binaries,
    gated_runtime: Option<GatedRuntime>,
    gated_cni: Option<GatedCni>,
    disks: Vec<Disk>,
    fake_criu: Option<FakeCriu>,
    ground: Ground,
    finished: bool,
    _hugetlb: Hugetlb,
}

impl Node {
    /// A node with runc and a bridge.
    ///
    /// # Errors
    /// See [`Builder::start`].
    pub async fn start() -> Result<Self> {
        Self::builder().start().await
    }

    /// Any other node.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Its CRI socket.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// Its directory: `root`, `state`, `logs`, `ipam`, `config.toml`, `daemon.log`.
    pub fn path(&self) -> &Path {
        self.ground.path()
    }

    /// Names of its cgroup, bridge and network.
    pub fn ground(&self) -> &Ground {
        &self.ground
    }

    /// Its configuration file.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// The binaries under test.
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// The script before runc.
    pub fn gated_runtime(&self) -> &GatedRuntime {
        self.gated_runtime.as_ref().expect("the node was built with gated_runtime()")
    }

    /// The `criu` of a node that was built with [`Builder::fake_criu`].
    ///
    /// # Panics
    /// It was not.
    pub fn criu(&self) -> &FakeCriu {
        self.fake_criu.as_ref().expect("the node is built with fake_criu()")
    }

    /// The script before the bridge plugin.
    pub fn gated_cni(&self) -> &GatedCni {
        self.gated_cni.as_ref().expect("the node was built with gated_cni()")
    }

    /// Process id of the daemon.
    pub fn daemon_pid(&self) -> i32 {
        self.daemon.as_ref().expect("the daemon runs").pid()
    }

    /// Describes a pod of this name, on the pod network.
    pub fn pod(&self, name: &str) -> PodBuilder {
        PodBuilder::new(
            &self.cri,
            name,
            &self.ground.cgroup(),
            &self.ground.path().join("logs").join(name),
        )
    }

    /// The registry of this node, started when it is first asked for.
    ///
    /// # Errors
    /// See [`Registry::start`].
    pub async fn registry(&mut self) -> Result<&Registry> {
        if self.registry.is_none() {
            self.registry = Some(Registry::start().await?);
        }
        Ok(self.registry.as_ref().expect("just set"))
    }

    /// Pushes an image to the node's registry and pulls it; its reference.
    ///
    /// # Errors
    /// Either fails.
    pub async fn load(&mut self, name: &str, image: &Image) -> Result<String> {
        let reference = self.registry().await?.push(name, image).await?;
        self.pull(&reference).await?;
        Ok(reference)
    }

    /// The plain busybox image, pulled from the node's registry; its reference.
    ///
    /// # Errors
    /// See [`Node::load`].
    pub async fn busybox(&mut self) -> Result<String> {
        self.load("test/busybox:1", &Image::busybox()?.build()?).await
    }

    /// PullImage; the answered reference.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn pull(&self, reference: &str) -> Result<String, tonic::Status> {
        let request =
            cri::PullImageRequest { image: Some(image_spec(reference)), ..Default::default() };
        Ok(self.cri.images().pull_image(request).await?.into_inner().image_ref)
    }

    /// ImageStatus; none when the image is not here.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn image(&self, reference: &str) -> Result<Option<cri::Image>, tonic::Status> {
        let request =
            cri::ImageStatusRequest { image: Some(image_spec(reference)), ..Default::default() };
        Ok(self.cri.images().image_status(request).await?.into_inner().image)
    }

    /// ListImages without a filter.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn images(&self) -> Result<Vec<cri::Image>, tonic::Status> {
        let request = cri::ListImagesRequest::default();
        Ok(self.cri.images().list_images(request).await?.into_inner().images)
    }

    /// RemoveImage.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn remove_image(&self, reference: &str) -> Result<(), tonic::Status> {
        let request = cri::RemoveImageRequest { image: Some(image_spec(reference)) };
        self.cri.images().remove_image(request).await?;
        Ok(())
    }

    /// ListPodSandbox without a filter.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn pods(&self) -> Result<Vec<cri::PodSandbox>, tonic::Status> {
        let request = cri::ListPodSandboxRequest::default();
        Ok(self.cri.runtime().list_pod_sandbox(request).await?.into_inner().items)
    }

    /// ListContainers without a filter.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn containers(&self) -> Result<Vec<cri::Container>, tonic::Status> {
        let request = cri::ListContainersRequest::default();
        Ok(self.cri.runtime().list_containers(request).await?.into_inner().containers)
    }

    /// Status.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn status(&self, verbose: bool) -> Result<cri::StatusResponse, tonic::Status> {
        Ok(self.cri.runtime().status(cri::StatusRequest { verbose }).await?.into_inner())
    }

    /// Kills the daemon with SIGKILL.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill9(&mut self) -> Result<()> {
        self.daemon.take().context("the daemon does not run")?.kill9()
    }

    /// Ends the daemon with SIGTERM; it must exit with 0 within ten seconds.
    ///
    /// # Errors
    /// It does not.
    pub fn terminate(&mut self) -> Result<()> {
        self.terminate_within(Duration::from_secs(10))
    }

    /// The same with another limit.
    ///
    /// # Errors
    /// It does not.
    pub fn terminate_within(&mut self, limit: Duration) -> Result<()> {
        let daemon = self.daemon.take();
        let status = daemon.context("the daemon does not run")?.terminate(limit)?;
        ensure!(status.success(), "the daemon ended with {status}\n{}", self.daemon_log(40));
        Ok(())
    }

    /// Puts another release's program in the place of the one of this name, as a package does: what runs
    /// goes on with the old one. For a node that was built with [`Builder::installed`].
    ///
    /// # Errors
    /// It cannot be put there.
    pub fn install(&self, program: &Path) -> Result<()> {
        install(&self.ground, program).map(drop)
    }

    /// Starts the daemon, which must not run, and waits for nothing.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch(&mut self) -> Result<()> {
        ensure!(self.daemon.is_none(), "the daemon runs already");
        self.daemon = Some(Process::spawn(
            &self.binaries.daemon,
            &["--config".as_ref(), self.config.as_os_str()],
            &self.env,
            &self.ground.path().join("daemon.log"),
        )?);
        Ok(())
    }

    /// Starts the daemon, which must not run, and waits until it serves; the time that took.
    ///
    /// # Errors
    /// It ends, or does not answer in time: the error has the end of its log.
    pub async fn restart(&mut self) -> Result<Duration> {
        let started = Instant::now();
        self.launch()?;
        let mut daemon = self.daemon.take().context("just launched")?;
        let probe = self.cri.deadline(Duration::from_secs(5));
        let ready = eventually(READY, "the daemon to be ready", async || {
            if let Some(status) = daemon.try_wait()? {
                bail!("the daemon ended with {status}");
            }
            let request = cri::StatusRequest::default();
            Ok(match probe.runtime().status(request).await {
                Ok(status) => {
                    let conditions = status.into_inner().status.unwrap_or_default().conditions;
                    let ready = conditions.iter().any(|c| c.r#type == "RuntimeReady" && c.status);
                    Look::when(ready, || format!("{conditions:?}"))
                }
                Err(status) => Look::Not(status.to_string()),
            })
        })
        .await;
        self.daemon = Some(daemon);
        ready.with_context(|| self.daemon_log(60))?;
        Ok(started.elapsed())
    }

    /// Whether the daemon has ended.
    ///
    /// # Errors
    /// waitpid(2) fails.
    pub fn has_ended(&mut self) -> Result<bool> {
        match &mut self.daemon {
            Some(daemon) => Ok(daemon.try_wait()?.is_some()),
            None => Ok(true),
        }
    }

    /// Starts the daemon again if it has ended, as a supervisor does, and as often as it ends; whether
    /// it had. Waits until it serves.
    ///
    /// # Errors
    /// It ends again and again, or does not answer in time.
    pub async fn revive(&mut self) -> Result<bool> {
        for starts in 0..5 {
            if !self.has_ended()? {
                return Ok(starts > 0);
            }
            self.daemon = None;
            if let Err(error) = self.restart().await {
                ensure!(self.has_ended()?, error);
            }
        }
        bail!("the daemon ends again and again\n{}", self.daemon_log(60))
    }

    /// The pid in a file of a pod's or container's bundle: `shim.pid`, `init.pid`.
    ///
    /// # Errors
    /// There is none.
    pub fn pid_file(&self, id: &str, name: &str) -> Result<i32> {
        let path = self.path().join("state/bundles").join(id).join(name);
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        Ok(text.trim().parse()?)
    }

    /// Cuts the power, as far as a test can: the daemon is dead already, now all other processes are, and
    /// mounts, namespaces and cgroups with them. The next daemon believes that the machine was started
    /// `at` this time (in seconds since 1970). `state_survives`: it is on a disk, and not in memory.
    ///
    /// # Errors
    /// The daemon runs; something cannot be ended.
    pub fn reboot(&mut self, at: u64, state_survives: bool) -> Result<()> {
        ensure!(self.daemon.is_none(), "end the daemon first, in order or not");
        self.ground.power_off()?;
        let state = self.path().join("state");
        if !state_survives && self.disks.is_empty() {
            fs::remove_dir_all(&state)?;
        }
        self.env.retain(|(key, _)| !key.starts_with("HOLDFAST_BOOT_"));
        self.env.push(("HOLDFAST_BOOT_ID".into(), format!("{:032x}", rand::random::<u128>())));
        self.env.push(("HOLDFAST_BOOT_TIME".into(), at.to_string()));
        Ok(())
    }

    /// The last lines of the daemon's log.
    pub fn daemon_log(&self, lines: usize) -> String {
        let text = fs::read(self.ground.path().join("daemon.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let skip = text.lines().count().saturating_sub(lines);
        let mut end = String::from("the daemon's log:\n");
        for line in text.lines().skip(skip) {
            let _ = writeln!(end, "  | {line}");
        }
        end
    }

    /// Runs the command line tool against this node.
    ///
    /// # Errors
    /// It cannot be run, or ends with another code than 0; the error has its output.
    pub fn cli(&self, args: &[&str]) -> Result<String> {
        let output = Command::new(&self.binaries.cli)
            .env("HOLDFAST_ADDRESS", self.cri.socket())
            .args(args)
            .output()
            .context("run holdfast")?;
        ensure!(
            output.status.success(),
            "holdfast {}: {}\n{}{}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// What this node has on the machine now.
    pub fn inventory(&self) -> Inventory {
        Inventory::take(&self.ground, self.daemon.as_ref().map(Process::pid).as_slice())
    }

    /// What has been added since `before`, once it is nothing; waits for that.
    ///
    /// # Errors
    /// Something stays; the error lists it.
    pub async fn nothing_left_since(&self, before: &Inventory) -> Result<()> {
        eventually(SETTLE, "everything to be gone", async || {
            let left = self.inventory().without(before);
            Ok(Look::when(left.is_empty(), || format!("still there:\n{left}")))
        })
        .await
        .with_context(|| self.daemon_log(60))
    }

    /// The same while containers run that start processes and end them all the time. What was added
    /// at first must be gone, and of what is added since then nothing but processes may be there.
    ///
    /// # Errors
    /// Something stays; the error lists it.
    pub async fn nothing_stays_since(&self, before: &Inventory) -> Result<()> {
        let mut stays = self.inventory().without(before);
        eventually(SETTLE, "everything to be gone", async || {
            let added = self.inventory().without(before);
            stays = stays.both(&added);
            let left = stays.with(&added.except("process"));
            Ok(Look::when(left.is_empty(), || format!("still there:\n{left}")))
        })
        .await
        .with_context(|| self.daemon_log(60))
    }

    /// What is there now is nothing that must be gone at the end: files that another release of the daemon
    /// has and keeps. Before there are pods.
    pub fn rebase(&mut self) {
        self.baseline = self.inventory();
    }

    /// Stops and removes every pod through the CRI.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn remove_all(&self) -> Result<()> {
        let removals = self.pods().await?.into_iter().map(|pod| {
            let pod = Pod::existing(&self.cri, &pod.id);
            async move {
                pod.stop().await.with_context(|| format!("stop pod {}", pod.id))?;
                pod.remove().await.with_context(|| format!("remove pod {}", pod.id))
            }
        });
        futures::future::try_join_all(removals).await?;
        let (pods, containers) = (self.pods().await?, self.containers().await?);
        ensure!(pods.is_empty() && containers.is_empty(), "left: {pods:?} {containers:?}");
        Ok(())
    }

    /// The end of a test: every pod and every image is removed and nothing of them may be left; the
    /// daemon is ended and nothing of the node may be left.
    ///
    /// # Errors
    /// What is left, or what could not be removed.
    pub async fn finish(mut self) -> Result<()> {
        self.remove_all().await.with_context(|| self.daemon_log(60))?;
        for image in self.images().await? {
            self.remove_image(&image.id).await?;
        }
        self.nothing_left_since(&self.baseline).await?;
        self.terminate()?;
        for disk in self.disks.drain(..) {
            disk.unmount()?;
        }
        let left = self.inventory().only(&["mount", "cgroup", "process", "link", "address"]);
        ensure!(left.is_empty(), "left after the daemon:\n{left}");
        self.finished = true;
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // A test that did not get to its end. Pods are stopped through the daemon where it still
        // answers, so that CNI takes back what is outside the ground; the ground's own sweep kills
        // and unmounts the rest.
        eprintln!("{}", self.daemon_log(200));
        let cri = self.cri.deadline(Duration::from_secs(5));
        let _ = std::thread::spawn(move || {
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build()
            else {
                return;
            };
            runtime.block_on(async {
                let stop = async {
                    let request = cri::ListPodSandboxRequest::default();
                    let pods = cri.runtime().list_pod_sandbox(request).await?.into_inner().items;
                    futures::future::join_all(
                        pods.iter().map(|pod| async { Pod::existing(&cri, &pod.id).stop().await }),
                    )
                    .await;
                    Ok::<(), tonic::Status>(())
                };
                let _ = tokio::time::timeout(Duration::from_secs(10), stop).await;
            });
        })
        .join();
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.terminate(Duration::from_secs(5));
        }
    }
}

fn install(ground: &Ground, program: &Path) -> Result<PathBuf> {
    let name = program.file_name().context("a program has a name")?;
    let dir = ground.path().join("bin");
    fs::create_dir_all(&dir)?;
    let (new, place) = (dir.join(".new"), dir.join(name));
    let program = program.canonicalize().with_context(|| format!("{}", program.display()))?;
    // Whatever is there may be a link to a program that is not ours to overwrite.
    let _ = fs::remove_file(&new);
    // A link where it can be: who forks while a copy is being written keeps it from being executed.
    if fs::hard_link(&program, &new).is_err() {
        fs::copy(&program, &new).with_context(|| format!("copy {}", program.display()))?;
    }
    fs::rename(&new, &place)?;
    Ok(place)
}

/// A reference as the CRI takes it.
pub fn image_spec(reference: &str) -> cri::ImageSpec {
    cri::ImageSpec { image: reference.into(), ..Default::default() }
}

/// A node with that OCI runtime, and the busybox image on it.
///
/// # Errors
/// The daemon does not start, or does not take the image.
pub async fn with_busybox(runtime: &str) -> Result<(Node, String)> {
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    let image = node.busybox().await?;
    Ok((node, image))
}

/// Writes a network configuration into the directory `net.d` of a ground.
///
/// # Errors
/// It cannot be written.
pub fn write_network(ground: &Ground, cni: Cni) -> Result<()> {
    let dir = ground.path().join("net.d");
    fs::create_dir_all(&dir)?;
    let mut ranges = vec![json!([{"subnet": ground.subnet4()}])];
    match cni {
        Cni::None => return Ok(()),
        Cni::Bridge => {}
        Cni::DualStack => ranges.push(json!([{"subnet": ground.subnet6()}])),
    }
    let mut routes = vec![json!({"dst": "0.0.0.0/0"})];
    if cni == Cni::DualStack {
        routes.push(json!({"dst": "::/0"}));
    }
    let list = json!({
        "cniVersion": "1.0.0",
        "name": ground.network(),
        "plugins": [
            {
                "type": "bridge",
                "bridge": ground.bridge(),
                "isGateway": true,
                "ipMasq": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": ground.path().join("ipam"),
                    "ranges": ranges,
                    "routes": routes,
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    fs::write(dir.join("10-test.conflist"), serde_json::to_vec_pretty(&list)?)?;
    Ok(())
}

fn write_config(
    node: &Builder,
    ground: &Ground,
    binaries: &Binaries,
    gated: Option<&GatedRuntime>,
) -> Result<PathBuf> {
    let at = |name: &str| ground.path().join(name).display().to_string();
    let mut handlers: BTreeMap<&str, String> = BTreeMap::new();
    handlers.insert("runc", "runc".into());
    handlers.insert("crun", "crun".into());
    if let Some(gated) = gated {
        handlers.insert("runc", gated.path().display().to_string());
    }
    let mut text = format!(
        "version = 1\nroot = {root:?}\nstate = {state:?}\n\n[grpc]\nsocket = {socket:?}\n\n\
         [network]\nconf_dir = {conf:?}\nbin_dirs = [{bin:?}, \"/opt/cni/bin\", \"/usr/lib/cni\"]\n{network}\n\
         [images]\nhosts_dir = {hosts:?}\n{images}\n\
         [nri]\nsocket = {nri:?}\nplugin_dir = {plugins:?}\nconf_dir = {plugin_conf:?}\n{nri_more}\n\
         [log]\nlevel = {level:?}\n\n\
         [runtime]\ndefault = {default:?}\nshim = {shim:?}\ncgroup_driver = \"cgroupfs\"\n{more}",
        root = at("root"),
        state = at("state"),
        socket = at("cri.sock"),
        conf = at("net.d"),
        bin = at("cni"),
        hosts = at("hosts"),
        nri = at("nri.sock"),
        plugins = at("nri/plugins"),
        plugin_conf = at("nri/conf.d"),
        nri_more = node.nri_config,
        default = node.default_runtime,
        shim = binaries.shim.display().to_string(),
        network = node.network_config,
        images = node.images_config,
        more = node.runtime_config,
        level = node.log_level,
    );
    for (name, path) in handlers {
        let _ = write!(text, "\n[runtime.handlers.{name}]\npath = {path:?}\n");
    }
    text.push('\n');
    text.push_str(&node.config);
    let path = ground.path().join("config.toml");
    fs::write(&path, text)?;
    Ok(path)
}

/// The level-triggered wait for anything about a node, with the daemon's log in the error.
///
/// # Errors
/// See [`eventually`].
pub async fn on<T>(
    node: &Node,
    limit: Duration,
    what: &str,
    look: impl AsyncFnMut() -> Result<Look<T>>,
) -> Result<T> {
    eventually(limit, what, look).await.with_context(|| node.daemon_log(40))
}

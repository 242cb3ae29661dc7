//! What pods cost: the same load on this runtime and, where it is installed, on containerd, in turns, with
//! the same OCI runtime, the same CNI plugins and the same images; and below both the floor, which is what
//! the bare plugins and the bare runtime cost.
//!
//! ```text
//! holdfast-bench [--json FILE] [--rounds N] [--iterations N] [--pods N] [--containers N] [--only WORD]
//! ```
//!
//! Both daemons are started here, with directories, sockets and bridges of their own; a containerd that runs
//! on this machine is not touched. Times are in milliseconds, memory in KiB.

use std::{
    collections::BTreeMap,
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use holdfast_integration::{
    Container, Image, Node, Pod, Registry,
    cri::Cri,
    eventually,
    ground::{Ground, Process, names_in},
    node::{image_spec, write_network},
    pod::PodBuilder,
    wait::Look,
};
use holdfast_protos::cri;
use serde_json::{Value, json};

/// Layers of the image that is pulled, and random bytes in each.
const LAYERS: (usize, usize) = (10, 4 << 20);
/// Obeys SIGTERM at once.
const OBEDIENT: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

struct Options {
    json: Option<PathBuf>,
    rounds: usize,
    iterations: usize,
    pods: usize,
    containers: usize,
    only: Option<String>,
}

impl Options {
    fn parse() -> Result<Self> {
        let mut options =
            Self { json: None, rounds: 3, iterations: 10, pods: 30, containers: 500, only: None };
        let mut args = env::args().skip(1);
        while let Some(word) = args.next() {
            let value = args.next().with_context(|| format!("{word} needs a value"))?;
            match word.as_str() {
                "--json" => options.json = Some(value.into()),
                "--rounds" => options.rounds = value.parse()?,
                "--iterations" => options.iterations = value.parse()?,
                "--pods" => options.pods = value.parse()?,
                "--containers" => options.containers = value.parse()?,
                "--only" => options.only = Some(value),
                _ => bail!("option {word} is not known: see the head of holdfast-bench.rs"),
            }
        }
        Ok(options)
    }

    fn wants(&self, what: &str) -> bool {
        self.only.as_ref().is_none_or(|only| what.contains(only.as_str()))
    }
}

/// Samples by what they measure, in the order of the first one.
#[derive(Default)]
struct Samples(Vec<(String, Vec<f64>)>);

impl Samples {
    fn add(&mut self, what: &str, value: f64) {
        match self.0.iter_mut().find(|(name, _)| name == what) {
            Some((_, values)) => values.push(value),
            None => self.0.push((what.into(), vec![value])),
        }
    }

    fn time(&mut self, what: &str, since: Instant) {
        self.add(what, since.elapsed().as_secs_f64() * 1000.0);
    }

    fn quantile(&self, what: &str, part: f64) -> Option<f64> {
        let (_, values) = self.0.iter().find(|(name, _)| name == what)?;
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        Some(sorted[((sorted.len() - 1) as f64 * part).round() as usize])
    }

    fn median(&self, what: &str) -> Option<f64> {
        self.quantile(what, 0.5)
    }
}

/// One of the runtimes that are compared.
enum Target {
    Holdfast(Box<Node>),
    Containerd(Box<Containerd>),
}

impl Target {
    fn name(&self) -> &'static str {
        match self {
            Target::Holdfast(_) => "holdfast",
            Target::Containerd(_) => "containerd",
        }
    }

    fn cri(&self) -> &Cri {
        match self {
            Target::Holdfast(node) => node.cri(),
            Target::Containerd(containerd) => &containerd.cri,
        }
    }

    fn ground(&self) -> &Ground {
        match self {
            Target::Holdfast(node) => node.ground(),
            Target::Containerd(containerd) => &containerd.ground,
        }
    }

    fn pod(&self, name: &str) -> PodBuilder {
        let ground = self.ground();
        PodBuilder::at(self.cri(), name, &ground.cgroup(), &ground.path().join("logs").join(name))
    }

    fn daemon_pid(&self) -> i32 {
        match self {
            Target::Holdfast(node) => node.daemon_pid(),
            Target::Containerd(containerd) => containerd.process.as_ref().expect("it runs").pid(),
        }
    }

    fn kill(&mut self) -> Result<()> {
        match self {
            Target::Holdfast(node) => node.kill9(),
            Target::Containerd(containerd) => {
                containerd.process.take().context("it does not run")?.kill9()
            }
        }
    }

    /// Starts the daemon's process and does not wait for it.
    fn spawn(&mut self) -> Result<()> {
        match self {
            Target::Holdfast(node) => node.spawn(),
            Target::Containerd(containerd) => containerd.spawn(),
        }
    }

    /// Processes of shims: one for each pod.
    fn shims(&self) -> Vec<i32> {
        let is_shim = |pid: &i32| {
            fs::read_link(format!("/proc/{pid}/exe"))
                .is_ok_and(|exe| exe.to_string_lossy().contains("containerd-shim"))
        };
        self.ground().processes().into_iter().filter(is_shim).collect()
    }

    async fn pull(&self, reference: &str) -> Result<()> {
        let request =
            cri::PullImageRequest { image: Some(image_spec(reference)), ..Default::default() };
        self.cri()
            .images()
            .pull_image(request)
            .await
            .with_context(|| format!("pull {reference}"))?;
        Ok(())
    }

    async fn remove_image(&self, reference: &str) -> Result<()> {
        let request = cri::RemoveImageRequest { image: Some(image_spec(reference)) };
        self.cri().images().remove_image(request).await?;
        Ok(())
    }

    async fn remove_pods(&self) -> Result<()> {
        let list = cri::ListPodSandboxRequest::default();
        for pod in self.cri().runtime().list_pod_sandbox(list).await?.into_inner().items {
            let pod = Pod::existing(self.cri(), &pod.id);
            pod.stop().await?;
            pod.remove().await?;
        }
        Ok(())
    }

    async fn finish(self) -> Result<()> {
        match self {
            Target::Holdfast(node) => node.finish().await,
            Target::Containerd(_) => self.remove_pods().await,
        }
    }
}

/// A containerd with everything of its own, except that its shims' sockets are where it always has them.
struct Containerd {
    process: Option<Process>,
    cri: Cri,
    config: PathBuf,
    ground: Ground,
}

impl Containerd {
    /// None when it is not installed.
    async fn start(pause: &str) -> Result<Option<Self>> {
        let Ok(version) = Command::new("containerd").arg("--version").output() else {
            return Ok(None);
        };
        let version = String::from_utf8_lossy(&version.stdout).into_owned();
        println!("compared with {}", version.trim());
        let ground = Ground::new()?;
        write_network(&ground, Default::default())?;
        let at = |name: &str| ground.path().join(name).display().to_string();
        let head = format!(
            "root = {root:?}\nstate = {state:?}\n[grpc]\naddress = {socket:?}\n",
            root = at("root"),
            state = at("state"),
            socket = at("cri.sock"),
        );
        let cni = format!("bin_dir = \"/usr/lib/cni\"\nconf_dir = {:?}\n", at("net.d"));
        // Its second version moved everything. Where CAP_SYS_RESOURCE is missing, no pod of it would
        // start without `restrict_oom_score_adj`.
        let is_new =
            version.split_whitespace().any(|word| word.trim_start_matches('v').starts_with("2."));
        let text = if is_new {
            format!(
                "version = 3\n{head}[plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = {pause:?}\n\
                 [plugins.'io.containerd.cri.v1.runtime']\nrestrict_oom_score_adj = true\n\
                 [plugins.'io.containerd.cri.v1.runtime'.cni]\n{}",
                cni.replace("bin_dir = \"/usr/lib/cni\"", "bin_dirs = [\"/usr/lib/cni\"]")
            )
        } else {
            format!(
                "version = 2\n{head}[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = {pause:?}\n\
                 restrict_oom_score_adj = true\n\
                 [plugins.'io.containerd.grpc.v1.cri'.cni]\n{cni}"
            )
        };
        let config = ground.path().join("config.toml");
        fs::write(&config, text)?;
        let cri = Cri::new(ground.path().join("cri.sock"));
        let mut containerd = Self { process: None, cri, config, ground };
        containerd.spawn()?;
        eventually(Duration::from_secs(30), "containerd", async || {
            let request = cri::StatusRequest::default();
            Ok(match containerd.cri.runtime().status(request).await {
                Ok(_) => Look::Done(()),
                Err(status) => Look::Not(status.to_string()),
            })
        })
        .await
        .with_context(|| {
            fs::read_to_string(containerd.ground.path().join("log")).unwrap_or_default()
        })?;
        Ok(Some(containerd))
    }

    fn spawn(&mut self) -> Result<()> {
        let log = self.ground.path().join("log");
        let args = ["--config".as_ref(), self.config.as_os_str()];
        self.process = Some(Process::spawn("containerd", &args, &[], &log)?);
        Ok(())
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("holdfast-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<()> {
    let options = Options::parse()?;
    let registry = Registry::start().await?;
    let busybox = registry.push("bench/busybox:1", &Image::busybox()?.build()?).await?;
    let (count, size) = LAYERS;
    let layers = Image::busybox()?.random_layers(count - 1, size).build()?;
    let layers = registry.push("bench/layers:1", &layers).await?;
    let pause = Image::busybox()?.entrypoint(["/bin/sleep"]).cmd(["100000000"]).build()?;
    let pause = registry.push("bench/pause:1", &pause).await?;

    let mut targets =
        vec![Target::Holdfast(Box::new(Node::builder().log_level("info").start().await?))];
    match Containerd::start(&pause).await? {
        Some(containerd) => targets.push(Target::Containerd(Box::new(containerd))),
        None => println!("no containerd is installed: there is nothing to compare with"),
    }
    for target in &targets {
        target.pull(&busybox).await?;
    }

    let mut floor = Samples::default();
    let mut results: BTreeMap<&str, Samples> = BTreeMap::new();
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        bare(&options, &mut floor)?;
        for target in &mut targets {
            eprintln!("  {}", target.name());
            let samples = results.entry(target.name()).or_default();
            if options.wants("life") {
                life(target, &busybox, &options, samples).await?;
            }
            if options.wants("pull") {
                pull(target, &layers, samples).await?;
            }
        }
    }
    for target in &mut targets {
        eprintln!("many, {}", target.name());
        let samples = results.entry(target.name()).or_default();
        if options.wants("list") {
            list(target, &busybox, &options, samples).await?;
        }
        if options.wants("pods") {
            pods(target, &busybox, &options, samples).await?;
        }
    }
    let machine = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    report(&options, machine.trim(), &floor, &results)?;
    for target in targets {
        target.finish().await?;
    }
    Ok(())
}

/// The life of a pod with one container, step by step.
async fn life(
    target: &Target,
    image: &str,
    options: &Options,
    samples: &mut Samples,
) -> Result<()> {
    for number in 0..options.iterations {
        let begun = Instant::now();
        let pod = target.pod(&format!("life{number}")).run().await?;
        samples.time("RunPodSandbox", begun);
        let begun = Instant::now();
        let container = pod.container(image).sh(OBEDIENT).create().await?;
        samples.time("CreateContainer", begun);
        let started = Instant::now();
        container.start().await?;
        samples.time("StartContainer", started);
        samples.time("CreateContainer + StartContainer", begun);
        let begun = Instant::now();
        let answer = container.exec_sync(&["/bin/true"], 30).await?;
        samples.time("ExecSync", begun);
        ensure!(answer.exit_code == 0, "{answer:?}");
        // Until it has its trap.
        tokio::time::sleep(Duration::from_millis(30)).await;
        let begun = Instant::now();
        container.stop(30).await?;
        samples.time("StopContainer", begun);
        let code = container.status().await?.exit_code;
        ensure!(code == 0, "it did not obey: exit code {code}");
        let begun = Instant::now();
        container.remove().await?;
        samples.time("RemoveContainer", begun);
        let begun = Instant::now();
        pod.stop().await?;
        samples.time("StopPodSandbox", begun);
        let begun = Instant::now();
        pod.remove().await?;
        samples.time("RemovePodSandbox", begun);
    }
    Ok(())
}

async fn pull(target: &Target, image: &str, samples: &mut Samples) -> Result<()> {
    let begun = Instant::now();
    target.pull(image).await?;
    samples.time("PullImage, ten layers", begun);
    target.remove_image(image).await
}

/// Lists with many containers, which are created and not started: to a list they are all the same.
async fn list(
    target: &Target,
    image: &str,
    options: &Options,
    samples: &mut Samples,
) -> Result<()> {
    const PER_POD: usize = 50;
    for first in (0..options.containers).step_by(PER_POD) {
        let pod = target.pod(&format!("list{first}")).host_network().run().await?;
        for number in first..options.containers.min(first + PER_POD) {
            pod.container(image).name(&format!("c{number}")).create().await?;
        }
    }
    // As the kubelet does, over one connection.
    let mut runtime = target.cri().runtime();
    let what = format!("ListContainers, {}", options.containers);
    for _ in 0..100 {
        let begun = Instant::now();
        let list = runtime.list_containers(cri::ListContainersRequest::default()).await?;
        samples.time(&what, begun);
        let found = list.into_inner().containers.len();
        ensure!(found == options.containers, "{found} containers of {}", options.containers);
    }
    target.remove_pods().await
}

/// What running pods cost in memory, and how long a daemon needs to know them again.
async fn pods(
    target: &mut Target,
    image: &str,
    options: &Options,
    samples: &mut Samples,
) -> Result<()> {
    // A fresh daemon: what it has from the load before would hide what it grows.
    target.kill()?;
    target.spawn()?;
    eventually(Duration::from_secs(30), "the daemon", async || {
        let request = cri::ListContainersRequest::default();
        Ok(match target.cri().runtime().list_containers(request).await {
            Ok(_) => Look::Done(()),
            Err(status) => Look::Not(status.to_string()),
        })
    })
    .await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = pss(target.daemon_pid())?;
    for number in 0..options.pods {
        let pod = target.pod(&format!("pod{number}")).run().await?;
        pod.container(image).sh(OBEDIENT).start().await?;
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    let grown = pss(target.daemon_pid())?.saturating_sub(before) as f64;
    let shims = target.shims();
    ensure!(shims.len() == options.pods, "{} shims for {} pods", shims.len(), options.pods);
    let pods = options.pods as f64;
    let sum: u64 = shims.iter().map(|pid| pss(*pid)).sum::<Result<u64>>()?;
    samples.add("shim PSS per pod", sum as f64 / pods);
    samples.add("shim + growth of the daemon, per pod", (sum as f64 + grown) / pods);

    let what = format!("start with {} pods, to the first whole list", options.pods);
    for _ in 0..5 {
        target.kill()?;
        let begun = Instant::now();
        target.spawn()?;
        let probe = target.cri().deadline(Duration::from_secs(5));
        loop {
            ensure!(begun.elapsed() < Duration::from_secs(60), "{what}: not within a minute");
            let request = cri::ListContainersRequest::default();
            if let Ok(list) = probe.runtime().list_containers(request).await {
                let running = list
                    .into_inner()
                    .containers
                    .iter()
                    .filter(|c| c.state() == cri::ContainerState::ContainerRunning)
                    .count();
                if running == options.pods {
                    break;
                }
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        samples.time(&what, begun);
        // It shall not be killed while it is still about its start.
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    let list = cri::ListContainersRequest::default();
    let first = target.cri().runtime().list_containers(list).await?.into_inner().containers;
    let first = first.first().context("no container")?;
    ensure!(Container::existing(target.cri(), &first.id).sh("echo alive").await? == "alive");
    target.remove_pods().await
}

/// Proportional set size, KiB.
fn pss(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let line = text.lines().find(|line| line.starts_with("Pss:")).context("Pss")?;
    Ok(line.split_whitespace().nth(1).context("a number")?.parse()?)
}

/// The bare programs: the CNI plugins of one pod, and runc with one container.
fn bare(options: &Options, floor: &mut Samples) -> Result<()> {
    if !options.wants("life") {
        return Ok(());
    }
    let ground = Ground::new()?;
    write_network(&ground, Default::default())?;
    let list: Value =
        serde_json::from_slice(&fs::read(ground.path().join("net.d/10-test.conflist"))?)?;
    let bundle = bundle(&ground)?;
    for number in 0..options.iterations {
        cni(&ground, &list, number, floor)?;
        runc(&ground, &bundle, number, floor)?;
    }
    Ok(())
}

fn cni(ground: &Ground, list: &Value, number: usize, floor: &mut Samples) -> Result<()> {
    let log = ground.path().join("netns.log");
    let mut holder =
        Process::spawn("unshare", &["-n".as_ref(), "sleep".as_ref(), "1000".as_ref()], &[], &log)?;
    let netns = format!("/proc/{}/ns/net", holder.pid());
    let own = fs::read_link("/proc/self/ns/net")?;
    let end = Instant::now() + Duration::from_secs(5);
    while fs::read_link(&netns).is_ok_and(|link| link == own) {
        ensure!(Instant::now() < end, "unshare does nothing");
    }
    let id = format!("floor{number}");
    let plugins = list["plugins"].as_array().context("plugins")?;
    let call = |verb: &str, plugin: &Value, previous: &Value| -> Result<Value> {
        let mut config = plugin.clone();
        config["cniVersion"] = list["cniVersion"].clone();
        config["name"] = list["name"].clone();
        if !previous.is_null() {
            config["prevResult"] = previous.clone();
        }
        let kind = plugin["type"].as_str().context("type")?;
        let mut child = Command::new(Path::new("/usr/lib/cni").join(kind))
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &id)
            .env("CNI_NETNS", &netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/usr/lib/cni")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("run {kind}"))?;
        child.stdin.take().context("stdin")?.write_all(config.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "{kind} {verb}: {text}");
        Ok(serde_json::from_str(&text).unwrap_or(Value::Null))
    };
    let begun = Instant::now();
    let mut result = Value::Null;
    for plugin in plugins {
        result = call("ADD", plugin, &result)?;
    }
    floor.time("RunPodSandbox", begun);
    let begun = Instant::now();
    for plugin in plugins.iter().rev() {
        call("DEL", plugin, &result)?;
    }
    floor.time("StopPodSandbox", begun);
    holder.kill9()
}

/// A bundle with busybox.
fn bundle(ground: &Ground) -> Result<PathBuf> {
    let bundle = ground.path().join("bundle");
    let bin = bundle.join("rootfs/bin");
    fs::create_dir_all(&bin)?;
    fs::copy("/bin/busybox", bin.join("busybox"))?;
    for applet in ["sh", "sleep", "true"] {
        std::os::unix::fs::symlink("busybox", bin.join(applet))?;
    }
    let spec = Command::new("runc").arg("spec").current_dir(&bundle).status()?;
    ensure!(spec.success(), "runc spec: {spec}");
    let path = bundle.join("config.json");
    let mut spec: Value = serde_json::from_slice(&fs::read(&path)?)?;
    spec["process"]["terminal"] = json!(false);
    spec["process"]["args"] = json!(["/bin/sh", "-c", OBEDIENT]);
    spec["linux"]["cgroupsPath"] = json!(format!("{}/floor", ground.cgroup()));
    fs::write(&path, spec.to_string())?;
    Ok(bundle)
}

fn runc(ground: &Ground, bundle: &Path, number: usize, floor: &mut Samples) -> Result<()> {
    let root = ground.path().join("runc");
    let id = format!("floor{number}");
    let call = |args: &[&str]| -> Result<()> {
        let status = Command::new("runc")
            .arg("--root")
            .arg(&root)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        ensure!(status.success(), "runc {args:?}: {status}");
        Ok(())
    };
    let place = bundle.display().to_string();
    let begun = Instant::now();
    call(&["create", "--bundle", &place, &id])?;
    floor.time("CreateContainer", begun);
    let started = Instant::now();
    call(&["start", &id])?;
    floor.time("StartContainer", started);
    floor.time("CreateContainer + StartContainer", begun);
    let begun = Instant::now();
    call(&["exec", &id, "/bin/true"])?;
    floor.time("ExecSync", begun);
    call(&["kill", &id, "KILL"])?;
    let group = ground.cgroup();
    let alive = || {
        holdfast_integration::ground::cgroup_mounts().iter().any(|mount| {
            fs::read_to_string(mount.join(group.trim_start_matches('/')).join("floor/cgroup.procs"))
                .is_ok_and(|pids| !pids.is_empty())
        })
    };
    while alive() {
        std::thread::sleep(Duration::from_millis(1));
    }
    // It is dead, but who reaps orphans on this machine may be slow: force does not mind.
    let begun = Instant::now();
    call(&["delete", "--force", &id])?;
    floor.time("RemoveContainer", begun);
    ensure!(names_in(&root).is_empty());
    Ok(())
}

/// The bars of the project: what the median may be, given the floor's.
fn bar(what: &str, floor: Option<f64>) -> Option<f64> {
    match what {
        "RunPodSandbox" => Some(floor? + 10.0),
        "CreateContainer + StartContainer" => Some(floor? + 6.0),
        "ExecSync" => Some(floor? + 3.0),
        "StopContainer" => Some(15.0),
        "shim PSS per pod" => Some(450.0),
        "shim + growth of the daemon, per pod" => Some(650.0),
        _ if what.starts_with("ListContainers") => Some(3.0),
        _ if what.starts_with("start with") => Some(150.0),
        _ => None,
    }
}

fn report(
    options: &Options,
    machine: &str,
    floor: &Samples,
    results: &BTreeMap<&str, Samples>,
) -> Result<()> {
    let Some(own) = results.get("holdfast") else { bail!("nothing was measured") };
    let peer = results.get("containerd");
    println!("\nmedians, and in parentheses the 90th percentile; ms, memory in KiB\n");
    println!(
        "{:<46}{:>9}{:>18}{:>20}{:>8}{:>9}",
        "", "floor", "holdfast", "containerd", "ratio", "bar"
    );
    let mut rows = Vec::new();
    for (what, values) in &own.0 {
        let cell = |samples: Option<&Samples>| {
            let samples = samples?;
            Some((samples.median(what)?, samples.quantile(what, 0.9)?))
        };
        let text = |pair: Option<(f64, f64)>| match pair {
            Some((median, high)) => format!("{median:.1} ({high:.1})"),
            None => "-".into(),
        };
        let short = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.1}"));
        let (mine, theirs) = (cell(Some(own)), cell(peer));
        let ratio = mine.zip(theirs).map(|(mine, theirs)| theirs.0 / mine.0);
        let bar = bar(what, floor.median(what));
        let verdict = match (mine, bar) {
            (Some((median, _)), Some(bar)) if median > bar => " MISSED",
            (_, Some(_)) => " ok",
            _ => "",
        };
        println!(
            "{what:<46}{:>9}{:>18}{:>20}{:>8}{:>9}{verdict}",
            short(floor.median(what)),
            text(mine),
            text(theirs),
            ratio.map_or("-".into(), |ratio| format!("{ratio:.1}x")),
            short(bar),
        );
        rows.push(json!({
            "what": what,
            "samples": values.len(),
            "floor": floor.median(what),
            "holdfast": mine.map(|(median, high)| json!({"p50": median, "p90": high})),
            "containerd": theirs.map(|(median, high)| json!({"p50": median, "p90": high})),
            "bar": bar,
        }));
    }
    if let Some(path) = &options.json {
        let all = json!({
            "kernel": machine,
            "cpus": std::thread::available_parallelism()?.get(),
            "rounds": options.rounds,
            "iterations": options.iterations,
            "rows": rows,
        });
        fs::write(path, serde_json::to_vec_pretty(&all)?)
            .with_context(|| format!("write {}", path.display()))?;
        println!("\nwritten to {}", path.display());
    }
    Ok(())
}

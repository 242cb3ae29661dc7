//! Cases of the Sandbox service: what containerd 2.x asks of a shim for a pod (sandboxer "shim"), call by
//! call as it was recorded of its CRI plugin.
//!
//! ```text
//! RunPodSandbox    start, CreateSandbox, StartSandbox, SandboxStatus, WaitSandbox
//! CreateContainer  SandboxStatus, Platform, Create (no start of the binary: by the sandbox' connection)
//! StartContainer   Connect, State, Wait, Start
//! stats            Stats, SandboxMetrics; exec as with any container
//! a new containerd SandboxStatus, WaitSandbox, Pids, Connect, State, Wait
//! StopPodSandbox   Kill, Wait, Delete, Shutdown of each container; StopSandbox, SandboxStatus
//! RemovePodSandbox SandboxStatus, ShutdownSandbox, delete
//! ```

use holdfast_protos::cri;
use holdfast_shim::client::{CreateSandbox, SandboxStarted};
use prost::Message as _;

use super::*;

const POD: &str = "pod";

/// A pod of this case, and the way to its shim.
struct Sandbox {
    pod: Container,
    endpoint: Endpoint,
    client: Client,
}

impl Sandbox {
    /// Starts the binary for it, as for a container, but there is no configuration in its bundle.
    async fn start(bench: &Bench) -> Result<Self> {
        let bundle = Bundle::new(bench.ground.path().join("bundles").join(POD));
        fs::create_dir_all(bundle.rootfs())?;
        let pod = Container { id: POD.into(), bundle, terminal: false, stdin: false };
        let (client, endpoint) = bench.start(&pod).await?;
        Ok(Self { pod, endpoint, client })
    }

    async fn create(&self, config: &cri::PodSandboxConfig, netns: &Path) -> Result<()> {
        let options = Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: config.encode_to_vec(),
            ..Default::default()
        };
        let request = CreateSandbox {
            id: POD.into(),
            bundle: self.pod.bundle.dir().to_owned(),
            netns_path: netns.display().to_string(),
            options: Some(options),
            ..CreateSandbox::default()
        };
        self.client.create_sandbox(request).await.context("CreateSandbox")
    }

    async fn begin(&self, config: &cri::PodSandboxConfig, netns: &Path) -> Result<SandboxStarted> {
        self.create(config, netns).await?;
        let started = self.client.start_sandbox(POD).await.context("StartSandbox")?;
        ensure!(started.pid != 0, "no pid, by which namespaces are named");
        let status = self.client.sandbox_status(POD).await.context("SandboxStatus")?;
        ensure!(status.state == "SANDBOX_READY" && status.pid == started.pid, "{status:?}");
        Ok(started)
    }

    /// Waits for the pod's end, by a connection of its own.
    async fn wait(&self) -> Result<JoinHandle<Result<()>>> {
        let client = Client::connect(&self.endpoint, DEADLINE).await?;
        Ok(tokio::spawn(async move { Ok(client.wait_sandbox(POD).await.map(drop)?) }))
    }

    async fn stop(&self) -> Result<()> {
        self.client.stop_sandbox(POD, Duration::ZERO).await.context("StopSandbox")?;
        let status = self.client.sandbox_status(POD).await.context("SandboxStatus")?;
        ensure!(status.state == "SANDBOX_NOTREADY" && status.exited_at.is_some(), "{status:?}");
        Ok(())
    }

    /// Ends the shim; then its bundle is removed, which must not be held by anything.
    async fn shut_down(self, bench: &Bench) -> Result<()> {
        self.client.shutdown_sandbox(POD).await.context("ShutdownSandbox")?;
        let gone = tokio::time::timeout(DEADLINE, self.client.closed()).await;
        gone.context("the connection stays")?;
        let _ = bench.command(&self.pod).delete(DEADLINE).await;
        let socket = self.endpoint.address.trim_start_matches("unix://").to_owned();
        ensure!(!Path::new(&socket).exists(), "the socket {socket} is left");
        fs::remove_dir_all(self.pod.bundle.dir()).context("remove the pod's bundle")
    }
}

fn config(bench: &Bench) -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        hostname: "web".into(),
        dns_config: Some(cri::DnsConfig {
            servers: vec!["192.0.2.1".into()],
            ..Default::default()
        }),
        linux: Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: format!("{}/pod", bench.ground.cgroup()),
            sysctls: [("net.core.somaxconn".to_owned(), "100".to_owned())].into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn with_namespaces(bench: &Bench, options: cri::NamespaceOption) -> cri::PodSandboxConfig {
    let mut config = config(bench);
    let linux = config.linux.get_or_insert_default();
    linux.sysctls.clear();
    linux.security_context = Some(cri::LinuxSandboxSecurityContext {
        namespace_options: Some(options),
        ..Default::default()
    });
    config
}

/// A network namespace, kept by a mount at that path; `user`: in a user namespace of its own.
async fn network(at: &Path, user: bool) -> Result<()> {
    fs::write(at, "")?;
    let mut command = Program::new("unshare");
    if user {
        command.args(["--user", "--map-root-user"]);
    }
    let mut holder = command.args(["--net", "sleep", "1000"]).spawn().context("unshare")?;
    let made = async {
        let pid = holder.id();
        eventually(DEADLINE, "the network namespace", async || {
            // It is unshared, and mapped, before it becomes something else.
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            Ok(Look::when(name == "sleep\n", || name))
        })
        .await?;
        let source = format!("/proc/{pid}/ns/net");
        let bind = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some(source.as_str()), at, None::<&str>, bind, None::<&str>)?;
        anyhow::Ok(())
    };
    let made = made.await;
    holder.kill()?;
    holder.wait()?;
    made
}

fn inode(path: impl AsRef<Path>) -> Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let path = path.as_ref();
    Ok(fs::metadata(path).with_context(|| path.display().to_string())?.ino())
}

/// Of a process, by the kind of namespace.
fn namespace(pid: u32, kind: &str) -> Result<u64> {
    inode(format!("/proc/{pid}/ns/{kind}"))
}

/// A container of the pod, as the plugin writes its configuration.
fn member(bench: &Bench, script: &str, sandbox: SandboxStarted) -> Result<Container> {
    let container = bench.write("c1", script)?;
    let mut spec = container.spec()?;
    let path = |kind: &str| format!("/proc/{}/ns/{kind}", sandbox.pid);
    spec["linux"]["namespaces"] = json!([
        {"type": "mount"}, {"type": "pid", "path": path("pid")}, {"type": "ipc", "path": path("ipc")},
        {"type": "uts", "path": path("uts")}, {"type": "network", "path": path("net")},
    ]);
    spec["linux"]["cgroupsPath"] = json!(format!("{}/pod/c1", bench.ground.cgroup()));
    spec["annotations"] = json!({
        "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": POD,
    });
    let mounts = spec["mounts"].as_array_mut().context("mounts")?;
    mounts.push(json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}));
    fs::create_dir_all(bench.ground.path().join("rootfs/etc"))?;
    container.write_spec(&spec)?;
    Ok(container)
}

pub(super) async fn life(bench: Arc<Bench>) -> Result<()> {
    let netns = bench.ground.path().join("netns");
    network(&netns, false).await?;
    let sandbox = Sandbox::start(&bench).await?;
    let started = sandbox.begin(&config(&bench), &netns).await?;
    let ended = sandbox.wait().await?;
    ensure!(sandbox.client.platform(POD).await?.0 == "linux", "Platform");
    ensure!(namespace(started.pid, "net")? == inode(&netns)?, "the network that was given");

    let script = "cat /etc/hostname /etc/resolv.conf /proc/sys/net/core/somaxconn; \
                  echo > /dev/shm/shared; cat /proc/sys/kernel/hostname; exec sleep 1000";
    let container = member(&bench, script, started)?;
    let (reading, _err) = container.read()?;
    // By the connection of the sandbox: by version 3 no binary is run for it.
    let task = bench.task(&container);
    let pid = sandbox.client.create(task).await.context("create")?;
    let info = sandbox.client.connect_info("c1").await?;
    ensure!(info.task_pid == pid, "{info:?}");
    ensure!(sandbox.client.state("c1", "").await?.status == TaskStatus::Created, "created");
    sandbox.client.start("c1", "").await.context("start")?;
    reading.is(|text| text == "web\nnameserver 192.0.2.1\n100\nweb\n").await?;
    ensure!(namespace(pid, "ipc")? == namespace(started.pid, "ipc")?, "one IPC for the pod");
    let shared = sandbox.pod.bundle.shm().join("shared");
    ensure!(shared.exists(), "/dev/shm is the container's alone");
    for metrics in [sandbox.client.stats("c1").await?, sandbox.client.sandbox_metrics(POD).await?] {
        ensure!(metrics.type_url.ends_with(".Metrics") && !metrics.value.is_empty(), "{metrics:?}");
    }
    refused(sandbox.client.shutdown_sandbox(POD).await, &[ErrorKind::Precondition])?;

    // containerd is started anew: other connections, and nothing but the shim knows.
    let again = Client::connect(&sandbox.endpoint, DEADLINE).await?.with_deadline(DEADLINE);
    let status = again.sandbox_status(POD).await?;
    ensure!(status.state == "SANDBOX_READY" && status.pid == started.pid, "{status:?}");
    again.ping_sandbox(POD).await?;
    ensure!(again.pids("c1").await?.contains(&pid), "Pids");
    ensure!(again.connect_info("c1").await?.task_pid == pid, "Connect");
    ensure!(again.state("c1", "").await?.status == TaskStatus::Running, "State");
    ensure!(!ended.is_finished(), "the pod has not ended");

    again.kill("c1", "", libc::SIGKILL as u32, true).await?;
    ensure!(bench.ended(&again, "c1").await? == 137, "the container's exit");
    again.delete("c1", "").await?;
    // containerd says it of each task; the pod goes on.
    again.shutdown("c1", false).await?;
    again.ping_sandbox(POD).await?;
    sandbox.stop().await?;
    tokio::time::timeout(DEADLINE, ended).await.context("WaitSandbox does not answer")???;
    sandbox.stop().await.context("once more")?;
    let status = sandbox.client.sandbox_status(POD).await?;
    ensure!(status.state == "SANDBOX_NOTREADY", "{status:?}");
    sandbox.shut_down(&bench).await?;
    ensure!(inode(&netns).is_ok(), "the network is containerd's to remove");
    Ok(())
}

pub(super) async fn namespaces(bench: Arc<Bench>) -> Result<()> {
    let node = cri::NamespaceMode::Node.into();
    let all = cri::NamespaceOption { network: node, pid: node, ipc: node, ..Default::default() };
    let sandbox = Sandbox::start(&bench).await?;
    let started = sandbox.begin(&with_namespaces(&bench, all), Path::new("")).await?;
    for kind in ["net", "ipc", "uts", "pid", "user"] {
        ensure!(namespace(started.pid, kind)? == inode(format!("/proc/self/ns/{kind}"))?, "{kind}");
    }
    sandbox.stop().await?;
    sandbox.shut_down(&bench).await?;

    // The plugin makes the network in a user namespace; the pod's is that one.
    let maps = || vec![cri::IdMapping { host_id: 0, container_id: 0, length: 1 }];
    let user = cri::UserNamespace { uids: maps(), gids: maps(), ..Default::default() };
    let own = cri::NamespaceOption { userns_options: Some(user), ..Default::default() };
    let (netns, nodes) = (bench.ground.path().join("netns"), bench.ground.path().join("nodes"));
    network(&netns, true).await?;
    network(&nodes, false).await?;
    let sandbox = Sandbox::start(&bench).await?;
    let started = sandbox.begin(&with_namespaces(&bench, own.clone()), &netns).await?;
    ensure!(namespace(started.pid, "net")? == inode(&netns)?, "the network that was given");
    for kind in ["ipc", "uts", "pid", "user"] {
        ensure!(namespace(started.pid, kind)? != inode(format!("/proc/self/ns/{kind}"))?, "{kind}");
    }
    sandbox.stop().await?;
    sandbox.shut_down(&bench).await?;

    let sandbox = Sandbox::start(&bench).await?;
    sandbox.create(&with_namespaces(&bench, own), &nodes).await?;
    let error = sandbox.client.start_sandbox(POD).await.err().context("it is started")?;
    ensure!(error.to_string().contains("no user namespace"), "{error}");
    sandbox.shut_down(&bench).await
}

pub(super) async fn dead(bench: Arc<Bench>) -> Result<()> {
    let netns = bench.ground.path().join("netns");
    network(&netns, false).await?;
    let sandbox = Sandbox::start(&bench).await?;
    let started = sandbox.begin(&config(&bench), &netns).await?;
    let container = member(&bench, "exec sleep 1000", started)?;
    let (_out, _err) = container.read()?;
    let task = sandbox.client.create(bench.task(&container)).await?;
    sandbox.client.start("c1", "").await?;
    let shim = sandbox.client.connect_info("c1").await?.shim_pid;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(shim.cast_signed()),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    let gone = tokio::time::timeout(DEADLINE, sandbox.client.closed()).await;
    gone.context("the connection stays")?;
    // Of the pod alone: containerd runs none for the containers of a sandbox.
    bench.command(&sandbox.pod).delete(DEADLINE).await?;
    for pid in [task, started.pid] {
        eventually(DEADLINE, "the pod's processes to be gone", async || {
            let there =
                Path::new(&format!("/proc/{pid}")).exists() && !is_zombie(pid.cast_signed());
            Ok(Look::when(!there, || format!("{pid} is there")))
        })
        .await?;
    }
    let left: Vec<_> = bench.ground.mounts().into_iter().filter(|at| *at != netns).collect();
    ensure!(left.is_empty(), "mounts are left: {left:?}");
    fs::remove_dir_all(sandbox.pod.bundle.dir()).context("remove the pod's bundle")
}

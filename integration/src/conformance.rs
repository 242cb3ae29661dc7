//! A conformance kit for shims: the same cases against each, by containerd's shim v2 contract, and a
//! table of what came out.
//!
//! A case is one thing that a daemon counts on. It gets a shim of its own, in a directory of its own,
//! through the client that the daemon uses. What does not hold is a deviation: docs/shims.md explains
//! each that a shim of the tests has.

mod pods;

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command as Program, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use holdfast_protos::shim::{
    bootstrap_api::BootstrapParams,
    oci,
    protobuf::{Message as _, well_known_types::any::Any},
};
use holdfast_shim::{
    bundle::Bundle,
    client::{Client, Command, CreateTask, Endpoint, ErrorKind, ExecTask, TaskStatus},
    events::{self, Event},
};
use serde_json::json;
use tokio::{io::AsyncReadExt as _, net::unix::pipe, task::JoinHandle};

use crate::{
    ground::{Ground, is_zombie},
    wait::{Look, eventually},
};

/// No call of a healthy shim takes nearly as long.
const DEADLINE: Duration = Duration::from_secs(20);

/// A shim to be judged.
#[derive(Clone, Debug)]
pub struct Subject {
    /// What it is called in the table.
    pub name: &'static str,
    /// The binary.
    pub binary: PathBuf,
}

/// A case: what holds, in the table's words, and how that is found out.
pub struct Case {
    /// Says what a shim does that keeps to the contract.
    pub name: &'static str,
    run: fn(Arc<Bench>) -> futures::future::LocalBoxFuture<'static, Result<()>>,
}

macro_rules! cases {
    ($($name:literal => $case:path),* $(,)?) => {
        /// All cases, in the order of the table.
        pub const CASES: &[Case] = &[$(Case {
            name: $name,
            run: |bench| Box::pin($case(bench)),
        }),*];
    };
}

cases! {
    "`start` with nothing on standard input" => starts_on_nothing,
    "`start` with runtime options" => starts_on_options,
    "`start` with BootstrapParams" => starts_on_bootstrap,
    "`start` for a second container of the group gives the same address" => groups,
    "Task v2" => task_v2,
    "Task v3" => task_v3,
    "Connect tells the shim's pid" => connect,
    "output goes to FIFOs, whole, and ends with Delete" => output,
    "standard input ends with CloseIO" => input,
    "a reader that goes and comes back loses nothing" => reader_returns,
    "exit code of a process, by Wait and by State" => exit_code,
    "exit by signal is 128 + n" => exit_signal,
    "several waits for one exit" => many_waits,
    "Delete of a container that runs is refused" => delete_running,
    "Start of a container that runs is refused" => start_twice,
    "Create of an id that is taken: ALREADY_EXISTS" => create_twice,
    "what is not there: NOT_FOUND" => not_found,
    "Kill of what has ended: NOT_FOUND" => kill_ended,
    "Kill of all processes" => kill_all,
    "exec: output, exit code, Delete" => exec,
    "exec of a program that is not there fails in Start" => exec_missing,
    "a terminal, and its size" => terminal,
    "Pause and Resume" => pause,
    "Pids" => pids,
    "Stats" => stats,
    "a root of layers with mapped owners (uidmap, gidmap), for a user namespace" => mapped_layers,
    "Update" => update,
    "events: create, start, exit, delete, in that order" => event_order,
    "a stopped container is known until Delete" => known_until_delete,
    "Shutdown with a container left does nothing" => shutdown_early,
    "Shutdown ends the process and its socket" => shutdown,
    "`delete` after the shim was killed kills the container" => delete_dead,
    "Sandbox v1: a pod's life by containerd 2.x's calls" => pods::life,
    "Sandbox v1: namespaces of the node, and a user namespace that is given" => pods::namespaces,
    "Sandbox v1: `delete` after the shim was killed ends the whole pod" => pods::dead,
}

/// One case's ground: a shim's directories, and what it has sent.
pub struct Bench {
    binary: PathBuf,
    ground: Ground,
    events: Arc<Mutex<Vec<Event>>>,
    listener: JoinHandle<()>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

/// A container's bundle and its FIFOs.
struct Container {
    id: String,
    bundle: Bundle,
    terminal: bool,
    stdin: bool,
}

impl Container {
    /// The OCI configuration in its bundle.
    fn spec(&self) -> Result<serde_json::Value> {
        Ok(serde_json::from_slice(&fs::read(self.bundle.config())?)?)
    }

    fn write_spec(&self, spec: &serde_json::Value) -> Result<()> {
        Ok(fs::write(self.bundle.config(), serde_json::to_vec(spec)?)?)
    }

    /// Readers of both outputs: some shims wait for them in Create.
    fn read(&self) -> Result<(Reading, Reading)> {
        Ok((Reading::begin(&self.bundle.stdout())?, Reading::begin(&self.bundle.stderr())?))
    }
}

impl Bench {
    fn new(binary: &Path) -> Result<Arc<Self>> {
        let ground = Ground::new()?;
        let events = Arc::new(Mutex::new(Vec::new()));
        let socket = tokio::net::UnixListener::bind(ground.path().join("events.sock"))?;
        let sink = events.clone();
        let listener = tokio::spawn(async move {
            let _ = events::serve(socket, move |_, event| {
                sink.lock().unwrap_or_else(|e| e.into_inner()).push(event);
                async { true }
            })
            .await;
        });
        let rootfs = ground.path().join("rootfs");
        for dir in ["bin", "proc", "dev", "tmp"] {
            fs::create_dir_all(rootfs.join(dir))?;
        }
        fs::copy("/bin/busybox", rootfs.join("bin/busybox"))?;
        for name in ["sh", "echo", "sleep", "cat", "stty", "usleep", "true"] {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(name))?;
        }
        Ok(Arc::new(Self { binary: binary.into(), ground, events, listener }))
    }

    fn options(&self) -> Any {
        let options = oci::Options {
            binary_name: "runc".into(),
            root: self.ground.path().join("runc").display().to_string(),
            ..Default::default()
        };
        Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: options.write_to_bytes().unwrap_or_default(),
            ..Default::default()
        }
    }

    fn write(&self, id: &str, script: &str) -> Result<Container> {
        self.write_as(id, script, false, false)
    }

    fn write_as(&self, id: &str, script: &str, terminal: bool, stdin: bool) -> Result<Container> {
        let bundle = Bundle::new(self.ground.path().join("bundles").join(id));
        fs::create_dir_all(bundle.rootfs())?;
        let spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": self.ground.path().join("rootfs"), "readonly": false},
            "process": {
                "terminal": terminal, "user": {"uid": 0, "gid": 0}, "cwd": "/",
                "args": ["/bin/sh", "-c", script], "env": ["PATH=/bin"],
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666"]},
            ],
            "annotations": {"io.kubernetes.cri.sandbox-id": "group"},
            "linux": {
                "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "ipc"}],
                "cgroupsPath": format!("{}/{id}", self.ground.cgroup()),
                "resources": {"memory": {"limit": 512 << 20}},
            },
        });
        fs::write(bundle.config(), serde_json::to_vec(&spec)?)?;
        for fifo in [bundle.stdin(), bundle.stdout(), bundle.stderr()] {
            nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600))?;
        }
        Ok(Container { id: id.into(), bundle, terminal, stdin })
    }

    fn command(&self, container: &Container) -> Command {
        Command {
            binary: self.binary.clone(),
            namespace: "k8s.io".into(),
            id: container.id.clone(),
            bundle: container.bundle.dir().to_owned(),
            events: self.ground.path().join("events.sock"),
            grpc: self.ground.path().join("grpc.sock"),
            publish_binary: "/bin/true".into(),
            options: Some(self.options()),
            env: vec![(
                "HOLDFAST_RUNTIME_ROOT".into(),
                self.ground.path().join("runc").display().to_string(),
            )],
            debug: false,
            socket_dir: self.ground.path().join("s"),
        }
    }

    async fn start(&self, container: &Container) -> Result<(Client, Endpoint)> {
        let command = self.command(container);
        // Read by nobody: the pipe holds more than a case has it write.
        let log = command.open_log()?;
        let endpoint = command.start(DEADLINE).await?;
        std::mem::forget(log);
        let client = Client::connect(&endpoint, DEADLINE).await?.with_deadline(DEADLINE);
        Ok((client, endpoint))
    }

    fn task(&self, container: &Container) -> CreateTask {
        let text = |path: PathBuf| path.display().to_string();
        let bundle = &container.bundle;
        CreateTask {
            id: container.id.clone(),
            bundle: bundle.dir().to_owned(),
            terminal: container.terminal,
            stdin: if container.stdin { text(bundle.stdin()) } else { String::new() },
            stdout: text(bundle.stdout()),
            stderr: if container.terminal { String::new() } else { text(bundle.stderr()) },
            options: Some(self.options()),
            ..CreateTask::default()
        }
    }

    /// A container that runs, its output, and the way to its shim.
    async fn run(&self, id: &str, script: &str) -> Result<(Client, Container, Reading)> {
        let container = self.write(id, script)?;
        let (reading, _err) = container.read()?;
        let (client, _) = self.start(&container).await?;
        client.create(self.task(&container)).await.context("create")?;
        client.start(id, "").await.context("start")?;
        Ok((client, container, reading))
    }

    async fn ended(&self, client: &Client, id: &str) -> Result<u32> {
        let waited = tokio::time::timeout(DEADLINE, client.wait(id, "")).await;
        Ok(waited.context("Wait does not answer")??.status)
    }
}

/// What comes out of a FIFO.
struct Reading {
    task: JoinHandle<()>,
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl Reading {
    fn begin(fifo: &Path) -> Result<Self> {
        // Read-write, as a daemon does it: there is no writer yet.
        let mut pipe = pipe::OpenOptions::new().read_write(true).open_receiver(fifo)?;
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let kept = bytes.clone();
        let task = tokio::spawn(async move {
            let mut piece = vec![0; 64 << 10];
            while let Ok(count @ 1..) = pipe.read(&mut piece).await {
                kept.lock().unwrap_or_else(|e| e.into_inner()).extend_from_slice(&piece[..count]);
            }
        });
        Ok(Self { task, bytes })
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap_or_else(|e| e.into_inner())).into_owned()
    }

    async fn is(&self, wanted: impl Fn(&str) -> bool) -> Result<()> {
        eventually(DEADLINE, "the output", async || {
            let text = self.text();
            Ok(Look::when(wanted(&text), || format!("{} bytes: {:.200}", text.len(), text)))
        })
        .await
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn raw_start(bench: &Bench, input: &[u8]) -> Result<()> {
    let container = bench.write("c1", "sleep 1000")?;
    let command = bench.command(&container);
    let _log = command.open_log()?;
    let mut child = Program::new(&bench.binary)
        .args(["-namespace", "k8s.io", "-address"])
        .arg(&command.grpc)
        .args(["-publish-binary", "/bin/true", "-id", "c1", "start"])
        .current_dir(container.bundle.dir())
        .env("TTRPC_ADDRESS", &command.events)
        .env("GRPC_ADDRESS", &command.grpc)
        .env("NAMESPACE", "k8s.io")
        .env("MAX_SHIM_VERSION", "2")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // Some do not read it.
    let _ = child.stdin.take().context("a pipe")?.write_all(input);
    let output = tokio::task::spawn_blocking(move || child.wait_with_output()).await??;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{}: {}", output.status, said.trim());
    // The address, whatever is around it: what matters is that somebody listens there.
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let from = text.find("unix://").with_context(|| format!("no address in {text:?}"))?;
    let address: String =
        text[from..].chars().take_while(|c| c.is_ascii_graphic() && !"\",".contains(*c)).collect();
    let address = match address.find("ttrpc") {
        Some(end) => address[..end].trim_end_matches(|c: char| c.is_control()).to_owned(),
        None => address,
    };
    let endpoint = Endpoint { address, version: 3 };
    let client = Client::connect(&endpoint, DEADLINE).await?.with_deadline(DEADLINE);
    client.connect_info("c1").await.map(drop).or_else(|error| match error.kind() {
        ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })?;
    let _ = client.shutdown("c1", true).await;
    Ok(())
}

async fn starts_on_nothing(bench: Arc<Bench>) -> Result<()> {
    raw_start(&bench, &[]).await
}

async fn starts_on_options(bench: Arc<Bench>) -> Result<()> {
    let options = bench.options().write_to_bytes()?;
    raw_start(&bench, &options).await
}

async fn starts_on_bootstrap(bench: Arc<Bench>) -> Result<()> {
    let mut params = BootstrapParams::new();
    params.instance_id = "c1".into();
    params.namespace = "k8s.io".into();
    params.containerd_ttrpc_address = bench.ground.path().join("events.sock").display().to_string();
    params.containerd_grpc_address = bench.ground.path().join("grpc.sock").display().to_string();
    raw_start(&bench, &params.write_to_bytes()?).await
}

async fn groups(bench: Arc<Bench>) -> Result<()> {
    let (client, first, _out) = bench.run("c1", "sleep 1000").await?;
    let (_, one) = bench.start(&first).await?;
    let second = bench.write("c2", "exit 3")?;
    let _readings = second.read()?;
    let (_, two) = bench.start(&second).await?;
    ensure!(one.address == two.address, "{} and {}", one.address, two.address);
    client.create(bench.task(&second)).await?;
    client.start("c2", "").await?;
    ensure!(bench.ended(&client, "c2").await? == 3, "the second container's exit code");
    Ok(())
}

async fn version(bench: Arc<Bench>, version: u32) -> Result<()> {
    let container = bench.write("c1", "sleep 1000")?;
    let (_, endpoint) = bench.start(&container).await?;
    let endpoint = Endpoint { version, ..endpoint };
    let client = Client::connect(&endpoint, DEADLINE).await?.with_deadline(DEADLINE).pinned();
    match client.connect_info("c1").await {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.into()),
    }
}

async fn task_v2(bench: Arc<Bench>) -> Result<()> {
    version(bench, 2).await
}

async fn task_v3(bench: Arc<Bench>) -> Result<()> {
    version(bench, 3).await
}

async fn connect(bench: Arc<Bench>) -> Result<()> {
    let (client, container, _out) = bench.run("c1", "sleep 1000").await?;
    let info = client.connect_info(&container.id).await?;
    let line = fs::read(format!("/proc/{}/cmdline", info.shim_pid))?;
    let line = String::from_utf8_lossy(&line);
    ensure!(line.contains("shim"), "pid {} is {line:?}", info.shim_pid);
    let state = client.state("c1", "").await?;
    ensure!(info.task_pid == state.pid, "{info:?} {state:?}");
    Ok(())
}

async fn output(bench: Arc<Bench>) -> Result<()> {
    let script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; echo last";
    let (client, _, out) = bench.run("c1", script).await?;
    ensure!(bench.ended(&client, "c1").await? == 0, "exit code");
    client.delete("c1", "").await?;
    out.is(|text| text.ends_with("\nlast\n")).await?;
    ensure!(out.text().lines().count() == 20001, "{} lines", out.text().lines().count());
    Ok(())
}

async fn input(bench: Arc<Bench>) -> Result<()> {
    let container = bench.write_as("c1", "cat; echo ended", false, true)?;
    let (out, _err) = container.read()?;
    let (client, _) = bench.start(&container).await?;
    client.create(bench.task(&container)).await?;
    client.start("c1", "").await?;
    let mut writer = fs::File::options().write(true).open(container.bundle.stdin())?;
    writer.write_all(b"some input\n")?;
    out.is(|text| text.contains("some input\n")).await?;
    drop(writer);
    client.close_stdin("c1", "").await?;
    out.is(|text| text.ends_with("ended\n")).await?;
    ensure!(bench.ended(&client, "c1").await? == 0, "exit code");
    Ok(())
}

async fn reader_returns(bench: Arc<Bench>) -> Result<()> {
    let container = bench
        .write("c1", "i=0; while [ $i -lt 300 ]; do echo line $i; usleep 5000; i=$((i+1)); done")?;
    let (client, _) = bench.start(&container).await?;
    let (first, _err) = container.read()?;
    client.create(bench.task(&container)).await?;
    client.start("c1", "").await?;
    first.is(|text| text.contains("line 20\n")).await?;
    let mut whole = first.text();
    // Nobody reads for a while, as when a daemon is restarted.
    first.task.abort();
    tokio::time::sleep(Duration::from_millis(300)).await;
    whole = whole.max(first.text());
    let second = Reading::begin(&container.bundle.stdout())?;
    ensure!(bench.ended(&client, "c1").await? == 0, "the container died of it");
    second.is(|text| text.ends_with("line 299\n")).await?;
    whole.push_str(&second.text());
    ensure!(whole.lines().count() == 300, "{} lines of 300", whole.lines().count());
    Ok(())
}

async fn exit_code(bench: Arc<Bench>) -> Result<()> {
    let (client, _, _out) = bench.run("c1", "exit 42").await?;
    ensure!(bench.ended(&client, "c1").await? == 42, "by Wait");
    let state = client.state("c1", "").await?;
    ensure!(state.status == TaskStatus::Stopped, "{state:?}");
    let exit = state.exit.context("no exit in State")?;
    ensure!(exit.status == 42, "{state:?}");
    ensure!(exit.at.elapsed().is_ok_and(|since| since < DEADLINE), "exited at {:?}", exit.at);
    let deleted = client.delete("c1", "").await?;
    ensure!(deleted.status == 42, "by Delete: {deleted:?}");
    Ok(())
}

async fn exit_signal(bench: Arc<Bench>) -> Result<()> {
    let (client, _, _out) = bench.run("c1", "exec sleep 1000").await?;
    client.kill("c1", "", libc::SIGKILL as u32, false).await?;
    let status = bench.ended(&client, "c1").await?;
    ensure!(status == 137, "{status}");
    Ok(())
}

async fn many_waits(bench: Arc<Bench>) -> Result<()> {
    let (client, _, _out) = bench.run("c1", "sleep 0.5; exit 9").await?;
    let waits = (0..8).map(|_| client.wait("c1", ""));
    let all = tokio::time::timeout(DEADLINE, futures::future::join_all(waits)).await?;
    for exited in all {
        ensure!(exited?.status == 9, "a wait");
    }
    Ok(())
}

/// The call must fail with one of these.
fn refused<T>(result: Result<T, holdfast_shim::client::Error>, kinds: &[ErrorKind]) -> Result<()> {
    match result {
        Ok(_) => bail!("it is not refused"),
        Err(error) if kinds.contains(&error.kind()) => Ok(()),
        Err(error) => bail!("{:?}: {error}", error.kind()),
    }
}

const ANY: &[ErrorKind] = &[
    ErrorKind::Precondition,
    ErrorKind::AlreadyExists,
    ErrorKind::Invalid,
    ErrorKind::NotFound,
    ErrorKind::Other,
];

async fn delete_running(bench: Arc<Bench>) -> Result<()> {
    let (client, _, _out) = bench.run("c1", "sleep 1000").await?;
    refused(client.delete("c1", "").await, ANY)?;
    let state = client.state("c1", "").await?;
    ensure!(state.status == TaskStatus::Running, "{state:?}");
    Ok(())
}

async fn start_twice(bench: Arc<Bench>) -> Result<()> {
    let (client, _, _out) = bench.run("c1", "sleep 1000").await?;
    refused(client.start("c1", "").await, ANY)?;
    let state = client.state("c1", "").await?;
    ensure!(state.status == TaskStatus::Running, "{state:?}");
    Ok(())
}

async fn create_twice(bench: Arc<Bench>) -> Result<()> {
    let (client, container, _out) = bench.run("c1", "sleep 1000").await?;
    refused(client.create(bench.task(&container)).await, &[ErrorKind::AlreadyExists])?;
    let state = client.state("c1", "").await?;
    ensure!(state.status == TaskStatus::Running, "{state:?}");
    Ok(())
}

async fn not_found(bench: Arc<Bench>) -> Result<()> {
    let (client, _, _out) = bench.run("c1", "sleep 1000").await?;
    let gone = &[ErrorKind::NotFound];
    refused(client.state("nobody", "").await, gone).context("State")?;
    refused(client.kill("nobody", "", 9, false).await, gone).context("Kill")?;
    refused(client.start("nobody", "").await, gone).context("Start")?;
    refused(client.delete("nobody", "").await, gone).context("Delete")?;
    refused(client.state("c1", "nothing").await, gone).context("State of an exec")
}

async fn kill_ended(bench: Arc<Bench>) -> Result<()> {
    let (client, _, _out) = bench.run("c1", "exit 0").await?;
    bench.ended(&client, "c1").await?;
    refused(client.kill("c1", "", 15, false).await, &[ErrorKind::NotFound])
}

async fn kill_all(bench: Arc<Bench>) -> Result<()> {
    let (client, _, out) = bench.run("c1", "sleep 1000 & sleep 1000 & echo ready; wait").await?;
    out.is(|text| text.contains("ready")).await?;
    client.kill("c1", "", libc::SIGKILL as u32, true).await?;
    ensure!(bench.ended(&client, "c1").await? == 137, "exit code");
    Ok(())
}

fn process(script: &str, terminal: bool) -> Vec<u8> {
    let process = json!({
        "terminal": terminal, "user": {"uid": 0, "gid": 0}, "cwd": "/",
        "args": ["/bin/sh", "-c", script], "env": ["PATH=/bin"],
    });
    serde_json::to_vec(&process).unwrap_or_default()
}

async fn exec(bench: Arc<Bench>) -> Result<()> {
    let (client, container, _out) = bench.run("c1", "sleep 1000").await?;
    let fifo = container.bundle.dir().join("exec-out");
    let err = container.bundle.dir().join("exec-err");
    for fifo in [&fifo, &err] {
        nix::unistd::mkfifo(fifo, nix::sys::stat::Mode::from_bits_truncate(0o600))?;
    }
    let (out, _err) = (Reading::begin(&fifo)?, Reading::begin(&err)?);
    let task = || ExecTask {
        stdout: fifo.display().to_string(),
        stderr: err.display().to_string(),
        process: process("echo from exec; exit 6", false),
        ..ExecTask::default()
    };
    client.exec("c1", "e1", task()).await?;
    refused(client.exec("c1", "e1", task()).await, &[ErrorKind::AlreadyExists])?;
    client.start("c1", "e1").await?;
    let waited = tokio::time::timeout(DEADLINE, client.wait("c1", "e1")).await??;
    ensure!(waited.status == 6, "{waited:?}");
    let deleted = client.delete("c1", "e1").await?;
    ensure!(deleted.status == 6, "{deleted:?}");
    out.is(|text| text == "from exec\n").await?;
    let state = client.state("c1", "").await?;
    ensure!(state.status == TaskStatus::Running, "the container: {state:?}");
    Ok(())
}

async fn exec_missing(bench: Arc<Bench>) -> Result<()> {
    let (client, _, _out) = bench.run("c1", "sleep 1000").await?;
    let process = json!({
        "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["/bin/nothing"], "env": ["PATH=/bin"],
    });
    let task = ExecTask { process: serde_json::to_vec(&process)?, ..ExecTask::default() };
    client.exec("c1", "e1", task).await?;
    refused(client.start("c1", "e1").await, ANY)?;
    client.delete("c1", "e1").await.map(drop).or_else(|error| match error.kind() {
        ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })?;
    Ok(())
}

async fn terminal(bench: Arc<Bench>) -> Result<()> {
    let script = "[ -t 1 ] && echo a terminal; while [ $(stty size | cut -d' ' -f1) != 33 ]; do usleep 20000; done; echo resized";
    let script =
        script.replace("$(stty size | cut -d' ' -f1)", "\"$(set -- $(stty size); echo $1)\"");
    let container = bench.write_as("c1", &script, true, true)?;
    let out = Reading::begin(&container.bundle.stdout())?;
    let (client, _) = bench.start(&container).await?;
    client.create(bench.task(&container)).await?;
    client.start("c1", "").await?;
    out.is(|text| text.contains("a terminal")).await?;
    client.resize("c1", "", 90, 33).await?;
    out.is(|text| text.contains("resized")).await
}

async fn pause(bench: Arc<Bench>) -> Result<()> {
    let (client, _, _out) = bench.run("c1", "while :; do usleep 10000; done").await?;
    client.pause("c1").await?;
    let state = client.state("c1", "").await?;
    let frozen = state.status;
    client.resume("c1").await?;
    ensure!(frozen == TaskStatus::Paused, "State says {frozen:?} meanwhile");
    let state = client.state("c1", "").await?;
    ensure!(state.status == TaskStatus::Running, "{state:?}");
    Ok(())
}

async fn pids(bench: Arc<Bench>) -> Result<()> {
    let (client, _, out) = bench.run("c1", "sleep 1000 & echo ready; wait").await?;
    out.is(|text| text.contains("ready")).await?;
    let pids = client.pids("c1").await?;
    let init = client.state("c1", "").await?.pid;
    ensure!(pids.len() == 2 && pids.contains(&init), "{pids:?}, init {init}");
    Ok(())
}

async fn stats(bench: Arc<Bench>) -> Result<()> {
    let (client, _, _out) = bench.run("c1", "sleep 1000").await?;
    let any = client.stats("c1").await?;
    ensure!(any.type_url.ends_with("Metrics") && !any.value.is_empty(), "{any:?}");
    Ok(())
}

/// As containerd 2.x asks for it: layers are mapped, what is written has the owner it is shown with.
async fn mapped_layers(bench: Arc<Bench>) -> Result<()> {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
    const ROOT: u32 = 100_000;
    let script = "busybox stat -c %u:%g /mine /theirs; echo made > /made; exec sleep 1000";
    let container = bench.write("c1", script)?;
    let at = |name: &str| bench.ground.path().join(name);
    for dir in ["upper", "work", "top"] {
        fs::create_dir(at(dir))?;
    }
    for (name, owner, group) in [("mine", 0, 0), ("theirs", 7, 8)] {
        fs::write(at("top").join(name), name)?;
        chown(at("top").join(name), Some(owner), Some(group))?;
    }
    chown(at("upper"), Some(ROOT), Some(ROOT))?;
    let rootfs = container.bundle.rootfs();
    for dir in rootfs.ancestors().take_while(|dir| dir.starts_with(bench.ground.path())) {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o711))?;
    }
    let mut spec = container.spec()?;
    let ids = json!([{"containerID": 0, "hostID": ROOT, "size": 65536}]);
    spec["root"]["path"] = json!(rootfs);
    spec["linux"]["uidMappings"] = ids.clone();
    spec["linux"]["gidMappings"] = ids;
    let namespaces = spec["linux"]["namespaces"].as_array_mut().context("namespaces")?;
    namespaces.push(json!({"type": "user"}));
    container.write_spec(&spec)?;

    let mut task = bench.task(&container);
    let mut overlay = holdfast_protos::shim::types::mount::Mount::new();
    overlay.type_ = "overlay".into();
    overlay.source = "overlay".into();
    overlay.options = vec![
        format!("uidmap=0:{ROOT}:65536"),
        format!("gidmap=0:{ROOT}:65536"),
        format!("workdir={}", at("work").display()),
        format!("upperdir={}", at("upper").display()),
        format!("lowerdir={}:{}", at("top").display(), at("rootfs").display()),
    ];
    task.rootfs.push(overlay);
    let (out, _err) = container.read()?;
    let (client, _) = bench.start(&container).await?;
    client.create(task).await.context("create")?;
    client.start("c1", "").await.context("start")?;
    out.is(|text| text == "0:0\n7:8\n").await?;
    let made = at("upper/made");
    eventually(DEADLINE, "the file", async || {
        Ok(Look::when(made.exists(), || "it is not there".into()))
    })
    .await?;
    let owner = fs::metadata(&made)?.uid();
    ensure!(owner == ROOT, "what the container made belongs to {owner} on disk");
    client.kill("c1", "", libc::SIGKILL as u32, true).await?;
    bench.ended(&client, "c1").await?;
    client.delete("c1", "").await?;
    let left = bench.ground.mounts();
    ensure!(left.is_empty(), "mounts are left: {left:?}");
    Ok(())
}

async fn update(bench: Arc<Bench>) -> Result<()> {
    let (client, _, _out) = bench.run("c1", "sleep 1000").await?;
    let resources = json!({"memory": {"limit": 256 << 20}});
    client.update("c1", serde_json::to_vec(&resources)?).await?;
    let cgroup = holdfast_shim::cgroup::Cgroup::at(format!("{}/c1", bench.ground.cgroup()))?;
    let limit = cgroup.stats().memory.limit;
    ensure!(limit == Some(256 << 20), "{limit:?}");
    Ok(())
}

async fn event_order(bench: Arc<Bench>) -> Result<()> {
    let (client, _, _out) = bench.run("c1", "exit 7").await?;
    bench.ended(&client, "c1").await?;
    client.delete("c1", "").await?;
    let names = |events: &[Event]| {
        let name = |event: &Event| match event {
            Event::Create { .. } => "create",
            Event::Start { .. } => "start",
            Event::Exit { status: 7, .. } => "exit",
            Event::Delete { .. } => "delete",
            _ => "other",
        };
        events.iter().map(name).collect::<Vec<_>>()
    };
    eventually(DEADLINE, "the events", async || {
        let names = names(&bench.events.lock().unwrap_or_else(|e| e.into_inner()));
        Ok(Look::when(names == ["create", "start", "exit", "delete"], || format!("{names:?}")))
    })
    .await
}

async fn known_until_delete(bench: Arc<Bench>) -> Result<()> {
    let (client, _, _out) = bench.run("c1", "exit 3").await?;
    bench.ended(&client, "c1").await?;
    ensure!(client.wait("c1", "").await?.status == 3, "a Wait afterwards");
    client.delete("c1", "").await?;
    refused(client.state("c1", "").await, &[ErrorKind::NotFound])
}

async fn shutdown_early(bench: Arc<Bench>) -> Result<()> {
    let (client, _, _out) = bench.run("c1", "sleep 1000").await?;
    let _ = client.shutdown("c1", false).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let state = client.state("c1", "").await?;
    ensure!(state.status == TaskStatus::Running, "{state:?}");
    Ok(())
}

async fn shutdown(bench: Arc<Bench>) -> Result<()> {
    let (client, container, _out) = bench.run("c1", "exit 0").await?;
    let pid = client.connect_info("c1").await?.shim_pid;
    let (_, endpoint) = bench.start(&container).await?;
    bench.ended(&client, "c1").await?;
    client.delete("c1", "").await?;
    let _ = client.shutdown("c1", false).await;
    tokio::time::timeout(DEADLINE, client.closed()).await.context("the connection stays")?;
    eventually(DEADLINE, "the process to be gone", async || {
        let there = Path::new(&format!("/proc/{pid}")).exists() && !is_zombie(pid.cast_signed());
        Ok(Look::when(!there, || format!("{pid} is there")))
    })
    .await?;
    let socket = endpoint.address.trim_start_matches("unix://").to_owned();
    ensure!(!Path::new(&socket).exists(), "the socket {socket} is left");
    Ok(())
}

async fn delete_dead(bench: Arc<Bench>) -> Result<()> {
    let (client, container, _out) = bench.run("c1", "sleep 1000").await?;
    let pid = client.connect_info("c1").await?.shim_pid;
    let task = client.state("c1", "").await?.pid;
    let shim = nix::unistd::Pid::from_raw(pid.cast_signed());
    nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGKILL)?;
    tokio::time::timeout(DEADLINE, client.closed()).await.context("the connection stays")?;
    let ended = bench.command(&container).delete(DEADLINE).await?;
    ensure!(ended.status == 137, "{ended:?}");
    eventually(DEADLINE, "the container to be gone", async || {
        let there = Path::new(&format!("/proc/{task}")).exists() && !is_zombie(task.cast_signed());
        Ok(Look::when(!there, || format!("{task} is there")))
    })
    .await
}

/// What became of one case.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its name.
    pub case: &'static str,
    /// The shim's.
    pub subject: &'static str,
    /// Why it does not hold.
    pub deviation: Option<String>,
}

/// Runs every case against a shim, a few at a time.
///
/// # Errors
/// The kit itself cannot work: the binary is not there, or this is not root.
pub async fn judge(subject: &Subject) -> Result<Vec<Outcome>> {
    use futures::{StreamExt as _, stream};
    ensure!(subject.binary.is_file(), "{} is missing", subject.binary.display());
    let outcomes = stream::iter(CASES).map(|case| async move {
        let bench = Bench::new(&subject.binary)?;
        let begun = Instant::now();
        let result = tokio::time::timeout(DEADLINE * 3, (case.run)(bench.clone())).await;
        let result = result.unwrap_or_else(|_| bail_after(begun));
        clean(&bench).await;
        Ok::<_, anyhow::Error>(Outcome {
            case: case.name,
            subject: subject.name,
            deviation: result.err().map(|error| format!("{error:#}").replace('\n', " ")),
        })
    });
    outcomes.buffered(4).collect::<Vec<_>>().await.into_iter().collect()
}

fn bail_after(begun: Instant) -> Result<()> {
    bail!("no end within {:?}", begun.elapsed())
}

/// Takes away what a case has left: containers first, by the binary itself, then whatever runs there.
async fn clean(bench: &Bench) {
    let bundles = bench.ground.path().join("bundles");
    for id in crate::ground::names_in(&bundles) {
        let bundle = Bundle::new(bundles.join(&id));
        let container = Container { id, bundle, terminal: false, stdin: false };
        let command = bench.command(&container);
        if let Ok(endpoint) = command.start(DEADLINE).await
            && let Ok(client) = Client::connect(&endpoint, DEADLINE).await
        {
            let client = client.with_deadline(Duration::from_secs(5));
            let _ = client.resume(&container.id).await;
            let _ = client.kill(&container.id, "", libc::SIGKILL as u32, true).await;
            let _ =
                tokio::time::timeout(Duration::from_secs(5), client.wait(&container.id, "")).await;
            let _ = client.delete(&container.id, "").await;
            let pid = client.connect_info(&container.id).await.map_or(0, |info| info.shim_pid);
            let _ = client.shutdown(&container.id, true).await;
            let gone = tokio::time::timeout(Duration::from_secs(3), client.closed()).await;
            if gone.is_err() && pid != 0 {
                let shim = nix::unistd::Pid::from_raw(pid.cast_signed());
                let _ = nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGKILL);
            }
            let _ = fs::remove_file(endpoint.address.trim_start_matches("unix://"));
        }
        let _ = command.delete(DEADLINE).await;
    }
}

/// The table, as docs/shims.md has it: a row for each case, a column for each shim, and a number for
/// each deviation, which is told below.
pub fn table(subjects: &[Subject], outcomes: &[Outcome]) -> String {
    let mut text = String::from("| |");
    for subject in subjects {
        let _ = write!(text, " {} |", subject.name);
    }
    text.push_str("\n|---|");
    text.push_str(&"---|".repeat(subjects.len()));
    text.push('\n');
    for case in CASES {
        let _ = write!(text, "| {} |", case.name);
        for subject in subjects {
            let found = outcomes.iter().find(|o| o.case == case.name && o.subject == subject.name);
            let mark = match found.map(|outcome| &outcome.deviation) {
                Some(None) => "yes",
                Some(Some(_)) => "**no**",
                None => "",
            };
            let _ = write!(text, " {mark} |");
        }
        text.push('\n');
    }
    text
}

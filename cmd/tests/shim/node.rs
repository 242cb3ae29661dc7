//! A node for the shim's tests: a daemon's sockets, real OCI runtimes, a busybox root file system.

use std::{
    collections::HashMap,
    fs,
    future::Future,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use holdfast_protos::shim::{
    oci,
    protobuf::{Message as _, well_known_types::any::Any},
};
use holdfast_shim::{
    bundle::Bundle,
    client::{Client, Command, CreateSandbox, CreateTask, Endpoint, ExecTask, Exited},
    events::{self, Event},
    options::PodOptions,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{io::AsyncReadExt as _, net::UnixListener, task::JoinHandle};

use crate::hybrid::Hybrid;

/// What a step may take before the test is wrong.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// An OCI runtime that Debian has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Oci {
    Runc,
    Crun,
}

impl Oci {
    pub(crate) fn binary(self) -> &'static str {
        match self {
            Oci::Runc => "runc",
            Oci::Crun => "crun",
        }
    }
}

/// Waits until `check` gives something.
pub(crate) async fn until<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let by = std::time::Instant::now() + PATIENCE;
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(std::time::Instant::now() < by, "{what} within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Fails instead of hanging.
pub(crate) async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work)
        .await
        .unwrap_or_else(|_| panic!("{what} within {PATIENCE:?}"))
}

/// The shim under test: Cargo's, or the static one that is shipped.
pub(crate) fn shim_binary() -> PathBuf {
    std::env::var_os("HOLDFAST_TEST_SHIM")
        .unwrap_or_else(|| env!("CARGO_BIN_EXE_containerd-shim-holdfast-v2").into())
        .into()
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

pub(crate) struct Node {
    pub(crate) dir: TempDir,
    pub(crate) oci: Oci,
    name: String,
    events: Arc<Mutex<Vec<Event>>>,
    daemon: Mutex<Option<JoinHandle<()>>>,
    pub(crate) env: Vec<(String, String)>,
    /// Shims that were started, to be ended when a test fails half way.
    shims: Mutex<Vec<PathBuf>>,
    _hybrid: Hybrid,
}

impl Node {
    pub(crate) fn new(oci: Oci) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests need root");
        let hybrid = Hybrid::join(oci == Oci::Crun);
        let dir = tempfile::Builder::new().prefix("hf").tempdir().expect("temporary directory");
        let name =
            format!("hft-shim{}x{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let node = Self {
            dir,
            oci,
            name,
            events: Arc::default(),
            daemon: Mutex::default(),
            env: Vec::new(),
            shims: Mutex::default(),
            _hybrid: hybrid,
        };
        node.start_daemon();
        node
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The daemon's event socket is there again.
    pub(crate) fn start_daemon(&self) {
        let path = self.path("events.sock");
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(path).expect("bind the event socket");
        let seen = self.events.clone();
        let serving = tokio::spawn(async move {
            let sink = move |_namespace: String, event: Event| {
                seen.lock().unwrap().push(event);
                std::future::ready(true)
            };
            events::serve(listener, sink).await.expect("serve events");
        });
        *self.daemon.lock().unwrap() = Some(serving);
    }

    /// The daemon is down.
    pub(crate) async fn stop_daemon(&self) {
        let serving = self.daemon.lock().unwrap().take();
        if let Some(serving) = serving {
            serving.abort();
            let _ = serving.await;
        }
        let _ = fs::remove_file(self.path("events.sock"));
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }

    /// Waits for an event.
    pub(crate) async fn event(&self, what: &str, wanted: impl Fn(&Event) -> bool) -> Event {
        until(what, || self.events().into_iter().find(|event| wanted(event))).await
    }

    pub(crate) fn runtime_root(&self) -> PathBuf {
        self.path("oci")
    }

    /// `containerd.runc.v1.Options` for this node's runtime.
    pub(crate) fn options(&self) -> Any {
        self.options_for(Path::new(self.oci.binary()))
    }

    pub(crate) fn options_for(&self, binary: &Path) -> Any {
        let mut options = oci::Options::new();
        options.binary_name = binary.display().to_string();
        options.root = self.runtime_root().display().to_string();
        let mut any = Any::new();
        any.type_url = "containerd.runc.v1.Options".into();
        any.value = options.write_to_bytes().unwrap();
        any
    }

    pub(crate) fn command(&self, id: &str, bundle: &Path) -> Command {
        Command {
            binary: shim_binary(),
            namespace: "test".into(),
            id: id.into(),
            bundle: bundle.to_owned(),
            events: self.path("events.sock"),
            grpc: self.path("grpc.sock"),
            publish_binary: "/bin/false".into(),
            options: None,
            env: self.env.clone(),
            debug: false,
            socket_dir: self.path("s"),
        }
    }

    /// A pod whose shim runs, with what `options` ask for.
    pub(crate) async fn pod(&self, id: &str, options: PodOptions) -> Pod<'_> {
        let pod = self.shim(id).await;
        pod.create(options).await.expect("create the pod");
        pod.client.start_sandbox(id).await.expect("start the pod");
        pod
    }

    /// A shim without a pod.
    pub(crate) async fn shim(&self, id: &str) -> Pod<'_> {
        let bundle = Bundle::new(self.path("pods").join(id));
        fs::create_dir_all(bundle.dir()).unwrap();
        self.shims.lock().unwrap().push(bundle.shim_pid());
        let command = self.command(id, bundle.dir());
        let endpoint = command.start(PATIENCE).await.expect("start the shim");
        let client = Client::connect(&endpoint, PATIENCE).await.expect("connect to the shim");
        let pid = fs::read_to_string(bundle.shim_pid()).unwrap().parse().unwrap();
        Pod { node: self, id: id.into(), bundle, endpoint, client, pid }
    }

    fn cgroup(&self, container: &str) -> String {
        format!("/{}/{container}", self.name)
    }

    /// Directories of this node's cgroups that are still there.
    pub(crate) fn cgroups(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let hierarchies = fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|e| e.path());
        for hierarchy in hierarchies.chain([PathBuf::from("/tmp/hft.hugetlb")]) {
            let dir = hierarchy.join(&self.name);
            found.extend(fs::read_dir(&dir).into_iter().flatten().flatten().filter_map(|entry| {
                entry.file_type().is_ok_and(|kind| kind.is_dir()).then(|| entry.path())
            }));
        }
        found
    }

    /// Mounts below the node's directory.
    pub(crate) fn mounts(&self) -> Vec<String> {
        let here = self.dir.path().display().to_string();
        fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .filter(|line| line.contains(&here))
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let kill = |pid: i32| {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        };
        for file in self.shims.lock().unwrap().iter() {
            let pid = fs::read_to_string(file).ok().and_then(|text| text.parse::<i32>().ok());
            if let Some(pid) = pid {
                let exe = fs::read_link(format!("/proc/{pid}/exe"));
                if exe.is_ok_and(|exe| exe.ends_with("containerd-shim-holdfast-v2")) {
                    kill(pid);
                }
            }
        }
        let all = holdfast_shim::cgroup::Cgroup::at(format!("/{}", self.name)).unwrap();
        if !all.is_empty() {
            let _ = all.kill();
            let _ = all.remove();
        }
        for line in self.mounts() {
            if let Some(place) = line.split(' ').nth(4) {
                let _ = nix::mount::umount2(place, nix::mount::MntFlags::MNT_DETACH);
            }
        }
    }
}

pub(crate) struct Pod<'a> {
    pub(crate) node: &'a Node,
    pub(crate) id: String,
    pub(crate) bundle: Bundle,
    pub(crate) endpoint: Endpoint,
    pub(crate) client: Client,
    pub(crate) pid: u32,
}

impl Pod<'_> {
    pub(crate) async fn create(
        &self,
        options: PodOptions,
    ) -> Result<(), holdfast_shim::client::Error> {
        self.client
            .create_sandbox(CreateSandbox {
                id: self.id.clone(),
                bundle: self.bundle.dir().to_owned(),
                netns_path: String::new(),
                options: Some(CreateSandbox::pod_options(&options)),
                annotations: HashMap::new(),
            })
            .await
    }

    /// A container that runs `script` in a shell.
    pub(crate) fn sh(&self, id: &str, script: &str) -> Container<'_> {
        self.run(id, &["/bin/sh", "-c", script])
    }

    /// A container that runs a program, not created yet.
    pub(crate) fn run(&self, id: &str, arguments: &[&str]) -> Container<'_> {
        let bundle = Bundle::new(self.bundle.dir().join("c").join(id));
        let config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false,
                "user": {"uid": 0, "gid": 0},
                "args": arguments,
                "env": ["PATH=/bin", "TERM=xterm"],
                "cwd": "/",
                "capabilities": {
                    "bounding": ["CAP_KILL", "CAP_SETUID", "CAP_SETGID"],
                    "effective": ["CAP_KILL", "CAP_SETUID", "CAP_SETGID"],
                    "permitted": ["CAP_KILL", "CAP_SETUID", "CAP_SETGID"],
                },
                "noNewPrivileges": true,
            },
            "root": {"path": "rootfs", "readonly": false},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            ],
            "linux": {
                "cgroupsPath": self.node.cgroup(id),
                "namespaces": [
                    {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                    {"type": "network"},
                ],
            },
        });
        Container {
            pod: self,
            id: id.into(),
            log: bundle.dir().join("0.log"),
            bundle,
            config,
            stdin: String::new(),
            stdout: None,
            stderr: None,
            options: self.node.options(),
        }
    }
}

pub(crate) struct Container<'a> {
    pub(crate) pod: &'a Pod<'a>,
    pub(crate) id: String,
    pub(crate) bundle: Bundle,
    pub(crate) log: PathBuf,
    pub(crate) config: Value,
    pub(crate) stdin: String,
    pub(crate) stdout: Option<String>,
    pub(crate) stderr: Option<String>,
    pub(crate) options: Any,
}

impl Container<'_> {
    pub(crate) fn terminal(mut self) -> Self {
        self.config["process"]["terminal"] = json!(true);
        self
    }

    pub(crate) fn stdin(mut self, uri: &str) -> Self {
        self.stdin = uri.into();
        self
    }

    pub(crate) fn with(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.config);
        self
    }

    /// The container's namespace of a kind is that at `path`, or (`None`) the node's.
    pub(crate) fn namespace(mut self, kind: &str, path: Option<&Path>) -> Self {
        let all = self.config["linux"]["namespaces"].as_array_mut().unwrap();
        all.retain(|namespace| namespace["type"] != kind);
        if let Some(path) = path {
            all.push(json!({"type": kind, "path": path}));
        }
        self
    }

    /// Writes the bundle and its root file system.
    pub(crate) fn write(&self) {
        let bin = self.bundle.rootfs().join("bin");
        fs::create_dir_all(&bin).unwrap();
        for dir in ["proc", "dev", "tmp", "etc"] {
            fs::create_dir_all(self.bundle.rootfs().join(dir)).unwrap();
        }
        let tmp = self.bundle.rootfs().join("tmp");
        fs::set_permissions(tmp, fs::Permissions::from_mode(0o1777)).unwrap();
        fs::copy("/bin/busybox", bin.join("busybox")).expect("Debian's busybox-static");
        for name in [
            "sh", "cat", "echo", "sleep", "seq", "kill", "stty", "ps", "true", "dd", "id", "tail",
            "setsid", "yes", "head", "hostname", "ip", "printf", "ls",
        ] {
            let _ = symlink("busybox", bin.join(name));
        }
        fs::write(self.bundle.config(), self.config.to_string()).unwrap();
    }

    pub(crate) fn task(&self) -> CreateTask {
        let log = format!("cri-log://{}", self.log.display());
        CreateTask {
            id: self.id.clone(),
            bundle: self.bundle.dir().to_owned(),
            terminal: self.config["process"]["terminal"] == true,
            stdin: self.stdin.clone(),
            stdout: self.stdout.clone().unwrap_or_else(|| log.clone()),
            stderr: self.stderr.clone().unwrap_or(log),
            options: Some(self.options.clone()),
            ..CreateTask::default()
        }
    }

    pub(crate) async fn create(self) -> Self {
        self.write();
        let created = self.pod.client.create(self.task()).await;
        created.unwrap_or_else(|error| panic!("create {}: {error}", self.id));
        self
    }

    pub(crate) async fn start(self) -> Self {
        let container = self.create().await;
        let started = container.pod.client.start(&container.id, "").await;
        started.unwrap_or_else(|error| panic!("start {}: {error}", container.id));
        container
    }

    pub(crate) async fn wait(&self) -> Exited {
        let wait = self.pod.client.wait(&self.id, "");
        soon("the container's end", wait).await.expect("wait")
    }

    pub(crate) async fn delete(&self) -> Exited {
        self.pod.client.delete(&self.id, "").await.expect("delete")
    }

    pub(crate) async fn kill(&self, signal: u32) {
        self.pod.client.kill(&self.id, "", signal, false).await.expect("kill");
    }

    /// Stream, tag and text of the log's records.
    pub(crate) fn records(&self) -> Vec<(String, String, String)> {
        parse_log(&self.log)
    }

    /// The texts of one stream, one line each.
    pub(crate) fn lines(&self, stream: &str) -> Vec<String> {
        self.records().into_iter().filter(|(s, ..)| s == stream).map(|(.., text)| text).collect()
    }

    /// Waits for a line of the log.
    pub(crate) async fn line(&self, wanted: &str) {
        until(&format!("line {wanted:?}"), || {
            self.records().iter().any(|(.., text)| text == wanted).then_some(())
        })
        .await;
    }

    /// Runs a program in the container by FIFOs, to its end: exit, stdout, stderr.
    pub(crate) async fn exec(&self, exec: &str, arguments: &[&str]) -> (Exited, String, String) {
        let fifos = Fifos::new(&self.pod.node.path(&format!("x-{exec}")));
        let process = process(arguments);
        let client = &self.pod.client;
        client.exec(&self.id, exec, fifos.task(process)).await.expect("exec");
        let reads = fifos.read();
        client.start(&self.id, exec).await.expect("start the exec");
        let ended = soon("the exec's end", client.wait(&self.id, exec)).await.expect("wait");
        let (out, err) = soon("the exec's output", reads).await.expect("read");
        client.delete(&self.id, exec).await.expect("delete the exec");
        (ended, out, err)
    }
}

pub(crate) fn parse_log(path: &Path) -> Vec<(String, String, String)> {
    let text = fs::read_to_string(path).unwrap_or_default();
    // A record that is being written is none yet.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .map(|line| {
            let mut words = line.splitn(4, ' ');
            let time = words.next().unwrap();
            assert!(holdfast_shim::timestamp::parse(time).is_some(), "{line:?}");
            let mut word = || words.next().unwrap_or_default().to_owned();
            (word(), word(), word())
        })
        .collect()
}

/// An OCI process.
pub(crate) fn process(arguments: &[&str]) -> Value {
    json!({
        "terminal": false,
        "user": {"uid": 0, "gid": 0},
        "args": arguments,
        "env": ["PATH=/bin"],
        "cwd": "/",
        "noNewPrivileges": true,
    })
}

/// The daemon's FIFOs of an exec.
pub(crate) struct Fifos {
    dir: PathBuf,
}

impl Fifos {
    pub(crate) fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir).unwrap();
        for name in ["in", "out", "err"] {
            let _ = fs::remove_file(dir.join(name));
            nix::unistd::mkfifo(&dir.join(name), nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        Self { dir: dir.to_owned() }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    pub(crate) fn task(&self, process: Value) -> ExecTask {
        ExecTask {
            terminal: process["terminal"] == true,
            stdin: String::new(),
            stdout: self.path("out"),
            stderr: self.path("err"),
            process: process.to_string().into_bytes(),
        }
    }

    /// Reads both outputs to their end.
    pub(crate) fn read(&self) -> JoinHandle<(String, String)> {
        let open = |name| {
            tokio::net::unix::pipe::OpenOptions::new().open_receiver(self.dir.join(name)).unwrap()
        };
        let (mut out, mut err) = (open("out"), open("err"));
        let (out_dir, err_dir) = (self.path("out"), self.path("err"));
        tokio::spawn(async move {
            // A writer of our own until the exec has its, for without any there is an end at once.
            let hold = |path: &str| fs::OpenOptions::new().write(true).open(path).unwrap();
            let held = (hold(&out_dir), hold(&err_dir));
            let release = async move {
                tokio::time::sleep(Duration::from_millis(400)).await;
                drop(held);
            };
            let (mut a, mut b) = (String::new(), String::new());
            let (_, x, y) =
                tokio::join!(release, out.read_to_string(&mut a), err.read_to_string(&mut b));
            x.unwrap();
            y.unwrap();
            (a, b)
        })
    }
}

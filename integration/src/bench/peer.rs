//! A containerd of its own beside the node: other directories, socket, bridge and cgroup, but the same
//! runc, CNI configuration, registry and images.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use holdfast_protos::cri as api;

use crate::{
    cri::Cri,
    fake::GatedRuntime,
    ground::{Ground, Process, names_in},
    node::{Cni, write_network},
    wait::{Look, eventually},
};

/// Names the binary when it is not in `PATH`. Its shim is looked for beside it first.
pub const VARIABLE: &str = "HOLDFAST_BENCH_CONTAINERD";

/// The program, if there is one to compare with.
///
/// # Errors
/// The variable names what is no file.
pub fn find() -> Result<Option<PathBuf>> {
    if let Some(path) = env::var_os(VARIABLE).map(PathBuf::from) {
        ensure!(path.is_file(), "{VARIABLE} names {}, which is no file", path.display());
        return Ok(Some(path));
    }
    Ok(in_path("containerd"))
}

/// A program in `PATH`.
pub fn in_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    // The daemon ends before its ground is swept.
    daemon: Option<Process>,
    binary: PathBuf,
    shim: Option<PathBuf>,
    /// What our shim runs in runc's place.
    gate: Option<GatedRuntime>,
    version: String,
    cri: Cri,
    ground: Ground,
}

impl Containerd {
    /// Starts it and waits until it serves.
    ///
    /// # Errors
    /// It ends, or is not ready in time: the error has the end of its log.
    pub async fn start(binary: &Path, runc: &Path, registry: &str, pause: &str) -> Result<Self> {
        Self::start_with(binary, runc, registry, pause, None).await
    }

    /// The same; `shim` is the binary of our shim, which then runs every pod.
    ///
    /// # Errors
    /// As [`Containerd::start`].
    pub async fn start_with(
        binary: &Path,
        runc: &Path,
        registry: &str,
        pause: &str,
        shim: Option<&Path>,
    ) -> Result<Self> {
        let output =
            Command::new(binary).arg("--version").output().context("containerd --version")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.split_whitespace().nth(2).unwrap_or_default().to_owned();
        let major = version.trim_start_matches('v').split('.').next().and_then(|n| n.parse().ok());
        let major: u32 = major.with_context(|| format!("a version in {text:?}"))?;
        let ground = Ground::new()?;
        write_network(&ground, Cni::Bridge)?;
        let hosts = ground.path().join("hosts").join(registry);
        fs::create_dir_all(&hosts)?;
        fs::write(
            hosts.join("hosts.toml"),
            format!("server = \"http://{registry}\"\n[host.\"http://{registry}\"]\n"),
        )?;
        let kind =
            if shim.is_some() { "io.containerd.holdfast.v2" } else { "io.containerd.runc.v2" };
        fs::write(ground.path().join("config.toml"), config(&ground, major, runc, pause, kind))?;
        let cri = Cri::new(ground.path().join("cri.sock"));
        let shim = shim.map(Path::to_path_buf);
        let binary = binary.to_path_buf();
        let mut peer = Self { daemon: None, binary, shim, gate: None, version, cri, ground };
        peer.restart().await?;
        Ok(peer)
    }

    /// Starts the daemon, which must not run, and waits until it serves.
    ///
    /// # Errors
    /// As [`Containerd::start`].
    pub async fn restart(&mut self) -> Result<()> {
        self.launch()?;
        let peer = self;
        let probe = peer.cri.deadline(Duration::from_secs(5));
        let result = eventually(Duration::from_secs(30), "containerd to be ready", async || {
            if let Some(status) = peer.daemon.as_mut().and_then(|d| d.try_wait().transpose()) {
                bail!("containerd ended with {}", status?);
            }
            Ok(match probe.runtime().status(api::StatusRequest::default()).await {
                Ok(status) => {
                    let conditions = status.into_inner().status.unwrap_or_default().conditions;
                    let ready = conditions.iter().filter(|c| c.status).count() >= 2;
                    Look::when(ready, || format!("{conditions:?}"))
                }
                Err(status) => Look::Not(status.to_string()),
            })
        })
        .await;
        result.with_context(|| peer.log())
    }

    /// SIGTERM, and waits for the end. Its shims go on.
    ///
    /// # Errors
    /// It does not run, or does not end in time.
    pub fn terminate(&mut self) -> Result<()> {
        let mut daemon = self.daemon.take().context("containerd does not run")?;
        daemon.terminate(Duration::from_secs(10)).map(drop)
    }

    /// A call of `ctr` in the namespace "test", beside the binary or in `PATH`.
    pub fn ctr(&self) -> Command {
        let beside = self.binary.with_file_name("ctr");
        let mut command = Command::new(if beside.is_file() { beside } else { "ctr".into() });
        command.arg("--address").arg(self.ground.path().join("cri.sock")).args(["-n", "test"]);
        command
    }

    /// Its version.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Its CRI socket.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// What it has of the machine.
    pub fn ground(&self) -> &Ground {
        &self.ground
    }

    /// Process id of the daemon.
    pub fn pid(&self) -> i32 {
        self.daemon.as_ref().map_or(0, Process::pid)
    }

    /// Starts the daemon and waits for nothing.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch(&mut self) -> Result<()> {
        let mut dirs: Vec<PathBuf> = self
            .shim
            .iter()
            .chain([&self.binary])
            .filter_map(|program| Some(program.parent()?.to_path_buf()))
            .collect();
        dirs.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
        let path = env::join_paths(dirs)?.to_string_lossy().into_owned();
        let root = self.ground.path().join("runc").display().to_string();
        // Inherited by our shim: under `ctr` nobody tells it what to run, and where its state is to be.
        let mut environment = vec![("PATH".into(), path), ("HOLDFAST_RUNTIME_ROOT".into(), root)];
        if let Some(gate) = &self.gate {
            environment.push(("HOLDFAST_RUNTIME".into(), gate.path().display().to_string()));
        }
        self.daemon = Some(Process::spawn(
            &self.binary,
            &["--config".as_ref(), self.ground.path().join("config.toml").as_os_str()],
            &environment,
            &self.ground.path().join("daemon.log"),
        )?);
        Ok(())
    }

    /// From the next start on our shim runs a script before runc, for `ctr`'s containers.
    ///
    /// # Errors
    /// The script cannot be written.
    pub fn gate(&mut self) -> Result<GatedRuntime> {
        let gate = GatedRuntime::install(self.ground.path())?;
        self.gate = Some(gate.clone());
        Ok(gate)
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill9(&mut self) -> Result<()> {
        self.daemon.take().context("containerd does not run")?.kill9()
    }

    /// The end of its log.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(self.ground.path().join("daemon.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Shim sockets are in a directory that is compiled in; each bundle tells its own.
        let bundles = self.ground.path().join("state/io.containerd.runtime.v2.task");
        let sockets: Vec<String> = ["k8s.io", "test"]
            .iter()
            .map(|namespace| bundles.join(namespace))
            .flat_map(|dir| names_in(&dir).into_iter().map(move |id| dir.join(id)))
            .filter_map(|bundle| fs::read_to_string(bundle.join("address")).ok())
            .filter_map(|text| Some(text.trim().strip_prefix("unix://")?.to_owned()))
            .collect();
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.terminate(Duration::from_secs(10));
        }
        for socket in sockets {
            let _ = fs::remove_file(socket);
        }
    }
}

fn config(ground: &Ground, major: u32, runc: &Path, pause: &str, kind: &str) -> String {
    let at = |name: &str| ground.path().join(name).display().to_string();
    let (runtime, images, pinned) = if major >= 2 {
        (
            "io.containerd.cri.v1.runtime",
            "io.containerd.cri.v1.images",
            format!(
                "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = {pause:?}\n"
            ),
        )
    } else {
        let name = "io.containerd.grpc.v1.cri";
        (name, name, String::new())
    };
    let sandbox = if major >= 2 { String::new() } else { format!("sandbox_image = {pause:?}\n") };
    let bins = if major >= 2 {
        "bin_dirs = [\"/opt/cni/bin\", \"/usr/lib/cni\"]".to_owned()
    } else {
        let dir =
            if Path::new("/opt/cni/bin/bridge").exists() { "/opt/cni/bin" } else { "/usr/lib/cni" };
        format!("bin_dir = {dir:?}")
    };
    format!(
        "version = {version}\nroot = {root:?}\nstate = {state:?}\n\
         disabled_plugins = [\"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.zfs\", \
         \"io.containerd.snapshotter.v1.devmapper\", \"io.containerd.snapshotter.v1.aufs\", \
         \"io.containerd.tracing.processor.v1.otlp\", \"io.containerd.internal.v1.tracing\"]\n\n\
         [grpc]\naddress = {socket:?}\n\n[ttrpc]\naddress = {ttrpc:?}\n\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\npath = {opt:?}\n\n\
         [plugins.\"io.containerd.nri.v1.nri\"]\ndisable = true\n\n\
         [plugins.\"{runtime}\"]\nrestrict_oom_score_adj = true\ndisable_apparmor = true\n\
         netns_mounts_under_state_dir = true\n{sandbox}\
         [plugins.\"{runtime}\".cni]\n{bins}\nconf_dir = {net:?}\nmax_conf_num = 1\n\
         [plugins.\"{runtime}\".containerd]\ndefault_runtime_name = \"runc\"\n\
         [plugins.\"{runtime}\".containerd.runtimes.runc]\nruntime_type = {kind:?}\n\
         [plugins.\"{runtime}\".containerd.runtimes.runc.options]\nBinaryName = {runc:?}\n\
         Root = {runc_root:?}\nSystemdCgroup = false\n\n\
         [plugins.\"{images}\".registry]\nconfig_path = {hosts:?}\n{pinned}",
        version = if major >= 2 { 3 } else { 2 },
        root = at("root"),
        state = at("state"),
        socket = at("cri.sock"),
        ttrpc = at("cri.sock.ttrpc"),
        opt = at("opt"),
        net = at("net.d"),
        runc = runc.display().to_string(),
        runc_root = at("runc"),
        hosts = at("hosts"),
    )
}

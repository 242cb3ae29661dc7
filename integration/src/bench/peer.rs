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
        fs::write(ground.path().join("config.toml"), config(&ground, major, runc, pause))?;
        let cri = Cri::new(ground.path().join("cri.sock"));
        let mut peer = Self { daemon: None, binary: binary.into(), version, cri, ground };
        peer.launch()?;
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
        result.with_context(|| peer.log())?;
        Ok(peer)
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
        let mut dirs: Vec<PathBuf> =
            self.binary.parent().into_iter().map(Path::to_path_buf).collect();
        dirs.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
        let path = env::join_paths(dirs)?.to_string_lossy().into_owned();
        self.daemon = Some(Process::spawn(
            &self.binary,
            &["--config".as_ref(), self.ground.path().join("config.toml").as_os_str()],
            &[("PATH".into(), path)],
            &self.ground.path().join("daemon.log"),
        )?);
        Ok(())
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
        let bundles = self.ground.path().join("state/io.containerd.runtime.v2.task/k8s.io");
        let sockets: Vec<String> = names_in(&bundles)
            .iter()
            .filter_map(|id| fs::read_to_string(bundles.join(id).join("address")).ok())
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

fn config(ground: &Ground, major: u32, runc: &Path, pause: &str) -> String {
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
         [plugins.\"{runtime}\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\
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

//! The daemon's configuration: `RawConfig` is what a file says, [`Config`] is what is meant.
//!
//! A [`Config`] in hand is complete and valid: every default is filled in and every choice made.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

/// The resolved configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// What outlives a boot: database, layers, images.
    pub root: PathBuf,
    /// What does not: sockets, pinned namespaces, bundles.
    pub state: PathBuf,
    /// `[grpc]`
    pub grpc: Grpc,
    /// `[streaming]`
    pub streaming: Streaming,
    /// `[network]`
    pub network: Network,
    /// `[images]`
    pub images: Images,
    /// `[runtime]`
    pub runtime: Runtime,
    /// `[metrics]`: where to serve Prometheus metrics, if at all.
    pub metrics_address: Option<SocketAddr>,
    /// `[nri]`
    pub nri: Nri,
    /// `[log]`
    pub log: Log,
}

/// The CRI socket.
#[derive(Clone, Debug)]
pub struct Grpc {
    /// Path of the unix socket; made with mode 0660.
    pub socket: PathBuf,
    /// Group id that owns the socket.
    pub gid: u32,
}

/// The HTTP server for exec, attach and port-forward.
#[derive(Clone, Debug)]
pub struct Streaming {
    /// Listen address; port 0 picks a free one.
    pub address: SocketAddr,
    /// Certificate and key files.
    pub tls: Option<(PathBuf, PathBuf)>,
}

/// CNI.
#[derive(Clone, Debug)]
pub struct Network {
    /// Where network configurations are; the first by name is used.
    pub conf_dir: PathBuf,
    /// Where plugins are, in order of search.
    pub bin_dirs: Vec<PathBuf>,
    /// Deadline of one ADD, DEL or CHECK of the whole list.
    pub timeout: Duration,
}

/// Images and registries.
#[derive(Clone, Debug)]
pub struct Images {
    /// containerd's `hosts.toml` layout.
    pub hosts_dir: PathBuf,
    /// A containers-registries.conf(5) file.
    pub registries_conf: Option<PathBuf>,
    /// Registries ("host" or "host:port") that may be reached over plain HTTP. Loopback always may.
    pub insecure_registries: Vec<String>,
    /// Layers of one image that are downloaded and unpacked at a time.
    pub max_parallel_layers: usize,
    /// A pull that receives nothing for so long is given up.
    pub stall_timeout: Duration,
    /// Bound on what one layer may unpack to, in bytes.
    pub max_layer_size: u64,
}

/// OCI runtimes and what drives them.
#[derive(Clone, Debug)]
pub struct Runtime {
    /// The handler for pods that name none; always a key of `handlers`.
    pub default: String,
    /// Who makes cgroups.
    pub cgroup_driver: CgroupDriver,
    /// By name as in RuntimeClass.
    pub handlers: BTreeMap<String, Handler>,
    /// Our shim's binary.
    pub shim: PathBuf,
    /// Deadline of one call of an OCI runtime (create, start, exec, ...).
    pub timeout: Duration,
    /// How long output is still read after an ExecSync's command has exited.
    pub exec_drain: Duration,
    /// Largest output of one ExecSync, each of stdout and stderr, in bytes.
    pub exec_output_limit: usize,
    /// `pids.max` of a container that is not given one; 0: unlimited.
    pub pids_limit: i64,
}

/// A runtime handler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handler {
    /// An OCI command line (runc, crun, ...) under our shim.
    Oci {
        /// Name or path of the program.
        path: PathBuf,
    },
    /// Another implementation of containerd's shim v2.
    Foreign {
        /// Name or path of the shim binary.
        shim: PathBuf,
    },
}

/// Who makes a container's cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupDriver {
    /// The runtime writes cgroupfs itself.
    Cgroupfs,
    /// The runtime asks systemd over D-Bus.
    Systemd,
}

/// Node Resource Interface.
#[derive(Clone, Debug)]
pub struct Nri {
    /// Off: no socket is made and no plugin started.
    pub enabled: bool,
    /// Where plugins connect.
    pub socket: PathBuf,
    /// Pre-registered plugins.
    pub plugin_dir: PathBuf,
    /// Their configurations.
    pub conf_dir: PathBuf,
}

/// The daemon's own log.
#[derive(Clone, Debug)]
pub struct Log {
    /// A `tracing` filter: "info", "debug,hyper=warn".
    pub level: String,
    /// One JSON object per line instead of text.
    pub json: bool,
}

//! What our daemon tells our shim inside the contract's extension points.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `type_url` of [`PodOptions`] (JSON) in `CreateSandboxRequest.options`.
pub const POD_OPTIONS: &str = "holdfast.dev/PodOptions";

/// Scheme of an output that the shim itself writes as a CRI log: `cri-log:///path/to/file`.
///
/// With an empty path no file is written; attach works all the same.
pub const CRI_LOG: &str = "cri-log://";

/// Standard input that attach feeds: the shim keeps a FIFO in the bundle.
pub const HELD_STDIN: &str = "holdfast-stdin://";

/// Like [`HELD_STDIN`], and closed when the first attach that had it leaves.
pub const HELD_STDIN_ONCE: &str = "holdfast-stdin://?once";

/// What a pod is to have of its own; the default is nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodOptions {
    /// Host name in the UTS namespace; empty: as the node's. At most 64 bytes (Linux).
    pub hostname: String,
    /// A network namespace, with `lo` up. Not with a `netns_path` in the request.
    pub net: bool,
    /// An IPC namespace.
    pub ipc: bool,
    /// A UTS namespace.
    pub uts: bool,
    /// A PID namespace that the containers share, with a built-in init that reaps.
    pub pid: bool,
    /// A user namespace that owns the others. With a `netns_path` in the request it is the one that owns
    /// that namespace, and these are its mappings.
    pub user: Option<UserMappings>,
    /// Sysctls, set in the new namespaces: name with dots (or slashes) to value.
    pub sysctls: BTreeMap<String, String>,
    /// cgroup of the pod, as a path from the hierarchies' roots; the built-in init goes into its
    /// child `holdfast-init`.
    pub cgroup: Option<String>,
    /// An init also without a PID namespace of the pod's, in the node's: for a daemon that names the
    /// pod's namespaces by a pid.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub init: bool,
    /// The shim makes `hostname`, `hosts`, `resolv.conf` and `shm` in the pod's bundle, and mounts them into
    /// containers whose configuration does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub files: Option<PodFiles>,
}

/// The files that a pod's containers have in common.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodFiles {
    /// For its resolv.conf; `None`: the node's.
    pub dns: Option<Dns>,
}

/// A resolver's configuration (resolv.conf(5)).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Addresses of name servers.
    pub servers: Vec<String>,
    /// Domains that short names are looked up in.
    pub searches: Vec<String>,
    /// Options of the resolver ("ndots:5").
    pub options: Vec<String>,
}

impl Dns {
    /// The text of the file.
    pub fn resolv_conf(&self) -> String {
        let mut text = String::new();
        if !self.searches.is_empty() {
            text.push_str(&format!("search {}\n", self.searches.join(" ")));
        }
        for server in &self.servers {
            text.push_str(&format!("nameserver {server}\n"));
        }
        if !self.options.is_empty() {
            text.push_str(&format!("options {}\n", self.options.join(" ")));
        }
        text
    }
}

/// Mappings of a user namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserMappings {
    /// User ids.
    pub uids: Vec<IdMap>,
    /// Group ids.
    pub gids: Vec<IdMap>,
}

/// One line of a uid_map or gid_map (user_namespaces(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    /// First id inside.
    pub container_id: u32,
    /// First id outside.
    pub host_id: u32,
    /// Number of ids.
    pub length: u32,
}

/// The annotation by which runc and crun know a container's own criu configuration, which our shim
/// writes to [`crate::bundle::Bundle::criu_config`].
pub const CRIU_CONFIG: &str = "org.criu.config";

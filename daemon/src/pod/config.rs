//! What a pod and a container are asked to be: the CRI's configuration in our own words, validated.
//!
//! These types are made in `cri/convert.rs`, kept in the store as JSON (so a field that is added
//! must have a default), and read by `spec` and by the pod's owner.

use std::{collections::BTreeMap, path::PathBuf};

pub use holdfast_shim::options::Dns;
use serde::{Deserialize, Serialize};

use crate::id::PodId;

/// Labels, annotations, sysctls: sorted, so that records and specs are stable.
pub type Map = BTreeMap<String, String>;

/// A pod, as asked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodConfig {
    /// Kubernetes name.
    pub name: String,
    /// Kubernetes uid.
    pub uid: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// How many times the kubelet made this pod before.
    pub attempt: u32,
    /// Empty: the node's, or none.
    pub hostname: String,
    /// Directory of container logs; empty: none are kept.
    pub log_directory: PathBuf,
    /// DNS; `None`: the node's resolv.conf.
    pub dns: Option<Dns>,
    /// Host ports.
    pub port_mappings: Vec<PortMapping>,
    /// Labels.
    pub labels: Map,
    /// Annotations.
    pub annotations: Map,
    /// cgroup parent as the kubelet gives it: a path (cgroupfs) or a slice name (systemd).
    pub cgroup_parent: String,
    /// Sysctls of the pod's namespaces.
    pub sysctls: Map,
    /// Which namespaces the pod has of its own.
    pub namespaces: PodNamespaces,
    /// Security settings of the pod itself.
    pub security: PodSecurity,
    /// Overhead of the pod, by its RuntimeClass.
    pub overhead: Option<Resources>,
    /// Sum of the containers' resources.
    pub resources: Option<Resources>,
}

/// A pod's namespaces.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodNamespaces {
    /// The node's network instead of a network of the pod.
    pub host_network: bool,
    /// The node's IPC namespace.
    pub host_ipc: bool,
    /// PID namespace the containers get when they name none.
    pub pid: PidMode,
    /// A user namespace of the pod; `None`: the node's.
    pub user: Option<UserNamespace>,
}

/// Whose PID namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PidMode {
    /// One for all containers of the pod.
    Pod,
    /// One for each container.
    #[default]
    Container,
    /// The node's.
    Node,
    /// That of another container of the pod, by container id.
    Target(String),
}

/// Mappings of a user namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNamespace {
    /// User ids.
    pub uids: Vec<IdMapping>,
    /// Group ids.
    pub gids: Vec<IdMapping>,
}

/// One range of a mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    /// First id outside.
    pub host_id: u32,
    /// First id inside.
    pub container_id: u32,
    /// Number of ids.
    pub length: u32,
}

/// Security settings of a pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodSecurity {
    /// The pod may have privileged containers.
    pub privileged: bool,
    /// uid of pod-level processes.
    pub run_as_user: Option<i64>,
    /// gid of pod-level processes.
    pub run_as_group: Option<i64>,
    /// Further groups.
    pub supplemental_groups: Vec<i64>,
    /// SELinux label of the pod.
    pub selinux: Option<Selinux>,
    /// seccomp of the pod.
    pub seccomp: Option<Profile>,
    /// AppArmor of the pod.
    pub apparmor: Option<Profile>,
}

/// A host port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// Transport.
    pub protocol: Protocol,
    /// Port in the pod, 1 to 65535.
    pub container_port: u16,
    /// Port on the node; 0: none.
    pub host_port: u16,
    /// Address on the node; empty: all.
    pub host_ip: String,
}

/// Transport protocol of a host port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP
    Tcp,
    /// UDP
    Udp,
    /// SCTP
    Sctp,
}

/// A container, as asked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerConfig {
    /// Name in the pod.
    pub name: String,
    /// How many times it was made before.
    pub attempt: u32,
    /// The image as the request names it (for the kubelet this is an image id).
    pub image: String,
    /// The image as the user wrote it.
    pub user_specified_image: String,
    /// Annotations of the image spec.
    pub image_annotations: Map,
    /// The archive of a checkpoint that it is made from; empty: it is made from the image.
    pub checkpoint: PathBuf,
    /// Replaces the image's entrypoint.
    pub command: Vec<String>,
    /// Replaces the image's cmd.
    pub args: Vec<String>,
    /// Empty: the image's.
    pub working_dir: String,
    /// Environment, over the image's. Values need not be UTF-8 on the wire; they must be here.
    pub env: Vec<(String, String)>,
    /// Mounts.
    pub mounts: Vec<Mount>,
    /// Devices of the node.
    pub devices: Vec<Device>,
    /// CDI devices by full name.
    pub cdi_devices: Vec<String>,
    /// Labels.
    pub labels: Map,
    /// Annotations.
    pub annotations: Map,
    /// Log file, relative to the pod's log directory; empty: no log.
    pub log_path: PathBuf,
    /// Keep stdin open.
    pub stdin: bool,
    /// Close stdin when the first attached client leaves.
    pub stdin_once: bool,
    /// Give the container a terminal.
    pub tty: bool,
    /// Resources.
    pub resources: Resources,
    /// Security.
    pub security: Security,
    /// Stop signal by name ("SIGTERM"); `None`: the image's, else SIGTERM.
    pub stop_signal: Option<String>,
}

impl ContainerConfig {
    /// The image as a user knows it: as they wrote it, where the request tells.
    pub fn asked_image(&self) -> &str {
        match self.user_specified_image.as_str() {
            "" => &self.image,
            written => written,
        }
    }
}

/// A mount.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mount {
    /// Absolute path in the container.
    pub container_path: String,
    /// Path on the node; made as a directory if missing.
    pub host_path: String,
    /// Read-only.
    pub readonly: bool,
    /// Read-only in all submounts too.
    pub recursive_read_only: bool,
    /// Relabel for SELinux.
    pub selinux_relabel: bool,
    /// Propagation.
    pub propagation: Propagation,
    /// Id mapping of this mount.
    pub uid_mappings: Vec<IdMapping>,
    /// Id mapping of this mount.
    pub gid_mappings: Vec<IdMapping>,
    /// An image to mount instead of a host path.
    pub image: Option<String>,
    /// Id of that image, once it is found: what PullImage answers for it.
    pub image_ref: String,
    /// Path in that image.
    pub image_sub_path: String,
    /// Further mount options.
    pub options: Vec<String>,
}

/// Mount propagation (mount_namespaces(7)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Propagation {
    /// rprivate
    #[default]
    Private,
    /// rslave
    HostToContainer,
    /// rshared
    Bidirectional,
}

/// A device of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Path in the container.
    pub container_path: String,
    /// Path on the node.
    pub host_path: String,
    /// Of "r", "w" and "m".
    pub permissions: String,
}

/// Resource limits, in the CRI's units; 0 and empty mean "not given".
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// Microseconds.
    pub cpu_period: i64,
    /// Microseconds per period; -1: no limit.
    pub cpu_quota: i64,
    /// Relative weight, 2 to 262144.
    pub cpu_shares: i64,
    /// Bytes.
    pub memory_limit: i64,
    /// Memory and swap together, bytes.
    pub memory_swap_limit: i64,
    /// -1000 to 1000.
    pub oom_score_adj: i64,
    /// List format ("0-3,5").
    pub cpuset_cpus: String,
    /// List format.
    pub cpuset_mems: String,
    /// Page size ("2MB") and limit in bytes.
    pub hugepages: Vec<(String, u64)>,
    /// cgroup v2 files and values.
    pub unified: Map,
}

impl Resources {
    /// These, with what `change` gives put over them: the CRI sends only what is to change.
    pub fn merged(&self, change: Resources) -> Resources {
        let number = |new: i64, old: i64| if new == 0 { old } else { new };
        let text = |new: String, old: &String| if new.is_empty() { old.clone() } else { new };
        let mut unified = self.unified.clone();
        unified.extend(change.unified);
        // No swap stays no swap: the limit of both moves with the limit of memory.
        let no_swap = self.memory_limit > 0 && self.memory_swap_limit == self.memory_limit;
        let swap = match change.memory_swap_limit {
            0 if no_swap => change.memory_limit,
            given => given,
        };
        Resources {
            cpu_period: number(change.cpu_period, self.cpu_period),
            cpu_quota: number(change.cpu_quota, self.cpu_quota),
            cpu_shares: number(change.cpu_shares, self.cpu_shares),
            memory_limit: number(change.memory_limit, self.memory_limit),
            memory_swap_limit: number(swap, self.memory_swap_limit),
            oom_score_adj: number(change.oom_score_adj, self.oom_score_adj),
            cpuset_cpus: text(change.cpuset_cpus, &self.cpuset_cpus),
            cpuset_mems: text(change.cpuset_mems, &self.cpuset_mems),
            hugepages: match change.hugepages.is_empty() {
                true => self.hugepages.clone(),
                false => change.hugepages,
            },
            unified,
        }
    }
}

/// Security settings of a container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Security {
    /// Everything the node has.
    pub privileged: bool,
    /// "CAP_X", "X" or "ALL".
    pub add_capabilities: Vec<String>,
    /// The same.
    pub drop_capabilities: Vec<String>,
    /// The same.
    pub add_ambient_capabilities: Vec<String>,
    /// PID namespace.
    pub pid: PidMode,
    /// uid.
    pub run_as_user: Option<i64>,
    /// gid; needs a uid or a user name.
    pub run_as_group: Option<i64>,
    /// Name in the image's /etc/passwd.
    pub run_as_username: String,
    /// Further groups.
    pub supplemental_groups: Vec<i64>,
    /// Whether the image's own groups of the user are added.
    pub supplemental_groups_policy: GroupsPolicy,
    /// Root file system read-only.
    pub readonly_rootfs: bool,
    /// prctl(PR_SET_NO_NEW_PRIVS).
    pub no_new_privs: bool,
    /// Hidden paths; `None`: the defaults. The CRI's list is taken as it is, empty too: the kubelet
    /// sends the default ones, and none for an unmasked /proc. So `None` does not come from the CRI.
    pub masked_paths: Option<Vec<String>>,
    /// Read-only paths; the same.
    pub readonly_paths: Option<Vec<String>>,
    /// seccomp.
    pub seccomp: Option<Profile>,
    /// AppArmor.
    pub apparmor: Option<Profile>,
    /// SELinux.
    pub selinux: Option<Selinux>,
}

/// KEP-3619.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupsPolicy {
    /// The image's groups of the user, and those asked for.
    #[default]
    Merge,
    /// Only those asked for.
    Strict,
}

/// A seccomp or AppArmor profile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Profile {
    /// Ours.
    RuntimeDefault,
    /// None.
    Unconfined,
    /// A file (seccomp) or a loaded profile's name (AppArmor).
    Localhost(String),
}

/// An SELinux context.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selinux {
    /// user
    pub user: String,
    /// role
    pub role: String,
    /// type
    pub kind: String,
    /// level
    pub level: String,
}

/// What an image says of its containers (OCI image-spec config.md), as far as we use it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageDefaults {
    /// `User`: "", "1000", "name", "1000:1000", "name:group".
    pub user: String,
    /// `Env`, "K=V".
    pub env: Vec<String>,
    /// `Entrypoint`
    pub entrypoint: Vec<String>,
    /// `Cmd`
    pub cmd: Vec<String>,
    /// `WorkingDir`
    pub working_dir: String,
    /// `StopSignal`, as the image writes it.
    pub stop_signal: String,
    /// `Volumes`: paths.
    pub volumes: Vec<String>,
    /// `Labels`
    pub labels: Map,
}

/// Who the container's first process is, after name look-up in the image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// uid
    pub uid: u32,
    /// gid
    pub gid: u32,
    /// Further groups, sorted, without duplicates.
    pub additional_gids: Vec<u32>,
    /// Home directory by the image's /etc/passwd; empty: unknown.
    pub home: String,
}

/// The pod a container is in, for annotations and paths.
#[derive(Clone, Debug)]
pub struct PodRef<'a> {
    /// Its id.
    pub id: &'a PodId,
    /// Its configuration.
    pub config: &'a PodConfig,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_changes_only_what_it_gives() {
        let old = Resources {
            cpu_shares: 100,
            memory_limit: 10,
            memory_swap_limit: 15,
            cpuset_cpus: "0".into(),
            unified: [("a.b".to_owned(), "1".to_owned())].into(),
            ..Resources::default()
        };
        assert_eq!(old.merged(Resources::default()), old);
        let change = Resources {
            memory_limit: 12,
            unified: [("c.d".to_owned(), "2".to_owned())].into(),
            ..Resources::default()
        };
        let new = old.merged(change);
        assert_eq!((new.cpu_shares, new.memory_limit, new.memory_swap_limit), (100, 12, 15));
        assert_eq!(new.unified.len(), 2);
    }

    #[test]
    fn a_container_without_swap_stays_without() {
        let old = Resources { memory_limit: 10, memory_swap_limit: 10, ..Resources::default() };
        let merged = |memory_limit, memory_swap_limit| {
            let change = Resources { memory_limit, memory_swap_limit, ..Resources::default() };
            let new = old.merged(change);
            (new.memory_limit, new.memory_swap_limit)
        };
        assert_eq!(merged(20, 0), (20, 20));
        assert_eq!(merged(0, 0), (10, 10));
        assert_eq!(merged(20, 30), (20, 30));
        assert_eq!(merged(0, 30), (10, 30));
    }
}

//! From the CRI's configuration, the image's defaults and the facts of the node to an OCI runtime
//! spec. Nothing here touches the system: the facts are gathered in [`crate::node`].
//!
//! ```text
//! ContainerConfig ── check ──▶ node::gather ──▶ HostFacts ─┐
//! ImageDefaults, User, Node, RuntimeFeatures, namespaces ──┴─ generate ──▶ config.json
//! ```
//!
//! What the node or the runtime cannot do is a [`Kind::Precondition`] that names what is lacking;
//! nothing that was asked for is left out in silence. The one thing that is bent is oom_score_adj,
//! which is clamped where the daemon may not lower its own.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
};

use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxNamespace, LinuxNamespaceType,
    LinuxSeccomp, Process, Root, Spec, User as OciUser,
};
use serde::Deserialize;

use crate::{
    config::CgroupDriver,
    error::{Kind, Kinded},
    id::ContainerId,
    node::{CgroupMode, DeviceNode, HostFacts, Node},
    pod::config::{ContainerConfig, ImageDefaults, PodRef, Profile, User},
};

pub mod args;
mod caps;
mod mounts;
mod resources;
mod sandbox;
mod seccomp;
mod seccomp_default;
mod selinux;
pub mod user;

pub use mounts::clean;
pub use resources::{cgroups_path, oom_score_adj, own_cgroup, pod_cgroup, update};
pub use sandbox::sandbox;

/// Our AppArmor profile, where the node has it loaded.
pub const APPARMOR_DEFAULT: &str = "holdfast-default";

/// Everything a spec is made from.
#[derive(Clone, Debug)]
pub struct Input<'a> {
    /// The pod.
    pub pod: PodRef<'a>,
    /// The container's id.
    pub container_id: &'a ContainerId,
    /// What is asked for. [`check`] is done again here.
    pub container: &'a ContainerConfig,
    /// What the image says.
    pub image: &'a ImageDefaults,
    /// The image's name, for the annotations.
    pub image_name: &'a str,
    /// Who the first process is, by [`user::resolve`].
    pub user: &'a User,
    /// The pod's namespaces.
    pub namespaces: &'a NamespacePaths,
    /// The pod's files.
    pub files: &'a PodFiles,
    /// The node.
    pub node: &'a Node,
    /// The host paths that the container names, by [`crate::node::gather`].
    pub host: &'a HostFacts,
    /// Who makes cgroups.
    pub cgroup_driver: CgroupDriver,
    /// What the OCI runtime can do.
    pub features: &'a RuntimeFeatures,
    /// Volumes that the image declares, at the paths that were made for them.
    pub image_volumes: &'a [BoundVolume],
    /// `pids.max`; 0: no limit.
    pub pids_limit: i64,
    /// Text of the profile, if the container asks for a Localhost one.
    pub seccomp_localhost: Option<&'a [u8]>,
}

/// Where the pod's namespaces are pinned. `None`: the node's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespacePaths {
    /// Network.
    pub net: Option<PathBuf>,
    /// IPC.
    pub ipc: Option<PathBuf>,
    /// Host name.
    pub uts: Option<PathBuf>,
    /// Users.
    pub user: Option<PathBuf>,
    /// Processes.
    pub pid: PidNamespace,
}

/// A container's PID namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PidNamespace {
    /// One of its own.
    #[default]
    New,
    /// The pod's, or another container's.
    Path(PathBuf),
    /// The node's.
    Host,
}

/// Files of the pod that each container sees, unless it mounts something in their place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFiles {
    /// /etc/hostname
    pub hostname: Option<PathBuf>,
    /// /etc/hosts
    pub hosts: Option<PathBuf>,
    /// /etc/resolv.conf
    pub resolv_conf: Option<PathBuf>,
    /// /dev/shm; `None`: the node's for a pod with the node's IPC, else a small one.
    pub shm: Option<PathBuf>,
}

/// A volume that the image declares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundVolume {
    /// Directory on the node.
    pub source: PathBuf,
    /// Absolute path in the container.
    pub target: String,
}

/// What an OCI runtime says of itself (`features`, OCI runtime-spec features.md).
///
/// The default is what may be expected of a runtime that has no such command: OCI 1.0.2.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuntimeFeatures {
    /// Highest `ociVersion` it takes, major and minor; `None`: it does not say, so 1.0.
    pub oci_version_max: Option<(u32, u32)>,
    /// Mount options it knows; empty: it does not say.
    pub mount_options: BTreeSet<String>,
    /// Id-mapped mounts.
    pub idmap: bool,
    /// `Some(false)`: built without seccomp.
    pub seccomp: Option<bool>,
    /// Actions of seccomp filters; `None`: it does not say.
    pub seccomp_actions: Option<BTreeSet<String>>,
    /// `Some(false)`: built without AppArmor.
    pub apparmor: Option<bool>,
    /// `Some(false)`: built without SELinux.
    pub selinux: Option<bool>,
    /// `Some(false)`: built without criu; `None`: it does not say.
    pub checkpoint: Option<bool>,
}

/// First kernel whose overlayfs takes id-mapped layers.
pub const MAPPED_LAYERS: (u32, u32) = (5, 19);

impl RuntimeFeatures {
    /// Reads the output of `features`. Fields that we do not know are passed over.
    pub fn parse(json: &[u8]) -> Result<Self, Error> {
        #[derive(Deserialize, Default)]
        #[serde(rename_all = "camelCase", default)]
        struct Features {
            oci_version_max: String,
            mount_options: Option<BTreeSet<String>>,
            linux: Option<OfLinux>,
            annotations: BTreeMap<String, String>,
        }
        #[derive(Deserialize, Default)]
        #[serde(rename_all = "camelCase", default)]
        struct OfLinux {
            seccomp: Option<Seccomp>,
            apparmor: Option<Enabled>,
            selinux: Option<Enabled>,
            mount_extensions: Option<MountExtensions>,
        }
        #[derive(Deserialize, Default)]
        #[serde(default)]
        struct Seccomp {
            enabled: Option<bool>,
            actions: Option<BTreeSet<String>>,
        }
        #[derive(Deserialize, Default)]
        #[serde(default)]
        struct MountExtensions {
            idmap: Option<Enabled>,
        }
        #[derive(Deserialize, Default)]
        #[serde(default)]
        struct Enabled {
            enabled: Option<bool>,
        }
        let features: Features =
            serde_json::from_slice(json).map_err(|source| Error::Features { source })?;
        let linux = features.linux.unwrap_or_default();
        let seccomp = linux.seccomp.unwrap_or_default();
        let version = features.oci_version_max;
        let mut parts = version.split('.').map(|part| part.parse().ok());
        Ok(RuntimeFeatures {
            oci_version_max: parts.next().flatten().zip(parts.next().flatten()),
            mount_options: features.mount_options.unwrap_or_default(),
            idmap: linux
                .mount_extensions
                .and_then(|extensions| extensions.idmap)
                .and_then(|idmap| idmap.enabled)
                .unwrap_or(false),
            seccomp: seccomp.enabled,
            seccomp_actions: seccomp.actions,
            apparmor: linux.apparmor.and_then(|apparmor| apparmor.enabled),
            selinux: linux.selinux.and_then(|selinux| selinux.enabled),
            checkpoint: [
                "org.opencontainers.runc.checkpoint.enabled",
                "run.oci.crun.checkpoint.enabled",
            ]
            .iter()
            .find_map(|name| features.annotations.get(*name))
            .map(|enabled| enabled == "true"),
        })
    }

    /// Recursive read-only mounts work: for `RuntimeHandlerFeatures` of the CRI's Status.
    pub fn recursive_read_only(&self, node: &Node) -> bool {
        self.mount_options.contains("rro") && node.kernel >= (5, 12)
    }

    /// Pods with a user namespace work, with all the volumes that the kubelet gives them: those are
    /// id-mapped by the runtime, the image's layers by us.
    pub fn user_namespaces(&self, node: &Node) -> bool {
        self.idmap && node.kernel >= MAPPED_LAYERS
    }

    fn knows_mount_option(&self, option: &str) -> bool {
        self.mount_options.is_empty() || self.mount_options.contains(option)
    }

    fn allows_seccomp_action(&self, action: &str) -> bool {
        self.seccomp_actions.as_ref().is_none_or(|actions| actions.contains(action))
    }
}

/// Why there is no spec.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is wrong, on any node.
    #[error("{field}: {reason}")]
    Invalid {
        /// Field of the CRI's message.
        field: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// The node or the OCI runtime cannot do it.
    #[error("{field}: {lacks}")]
    Lacking {
        /// Field of the CRI's message.
        field: String,
        /// What is missing.
        lacks: String,
    },
    /// A seccomp profile is not one.
    #[error("seccomp profile {name}")]
    SeccompProfile {
        /// Its file.
        name: String,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The runtime's `features` is not understood.
    #[error("output of the OCI runtime's features command")]
    Features {
        /// Where and why.
        source: serde_json::Error,
    },
}

impl Error {
    fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Error::Invalid { field: field.into(), reason: reason.into() }
    }

    fn lacking(field: impl Into<String>, lacks: impl Into<String>) -> Self {
        Error::Lacking { field: field.into(), lacks: lacks.into() }
    }
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Invalid { .. } | Error::SeccompProfile { .. } => Kind::Invalid,
            Error::Lacking { .. } => Kind::Precondition,
            Error::Features { .. } => Kind::Internal,
        }
    }
}

/// Refuses what no node could run, before anything is made for the container.
pub fn check(
    pod: &PodRef<'_>,
    container: &ContainerConfig,
    driver: CgroupDriver,
) -> Result<(), Error> {
    if container.security.privileged && !pod.config.security.privileged {
        return Err(Error::invalid(
            "security.privileged",
            "the pod may have no privileged container: its own security context says so",
        ));
    }
    resources::check_parent(&pod.config.cgroup_parent, driver)?;
    if let Some(signal) = container.stop_signal.as_deref().filter(|signal| !signal.is_empty()) {
        args::parse_signal(signal)?;
    }
    for (index, device) in container.devices.iter().enumerate() {
        let refuse = |field: &str, reason: String| {
            Err(Error::invalid(format!("devices[{index}].{field}"), reason))
        };
        if !device.host_path.starts_with('/') {
            return refuse("host_path", format!("{:?} is not an absolute path", device.host_path));
        }
        if !device.container_path.is_empty() && !device.container_path.starts_with('/') {
            return refuse(
                "container_path",
                format!("{:?} is not an absolute path", device.container_path),
            );
        }
        if device.permissions.bytes().any(|byte| !b"rwm".contains(&byte)) {
            return refuse(
                "permissions",
                format!("{:?} has more than r, w and m", device.permissions),
            );
        }
    }
    if let Some(user) = &pod.config.namespaces.user {
        for (field, ranges) in [("uids", &user.uids), ("gids", &user.gids)] {
            let bad = ranges.iter().any(|range| {
                range.length == 0
                    || range.host_id.checked_add(range.length - 1).is_none()
                    || range.container_id.checked_add(range.length - 1).is_none()
            });
            if ranges.is_empty() || bad {
                return Err(Error::invalid(
                    format!("namespace_options.userns_options.{field}"),
                    "it must have ranges of one id or more, below 2^32",
                ));
            }
        }
    }
    mounts::check(pod, container)
}

/// The spec of a container.
pub fn generate(input: &Input<'_>) -> Result<Spec, Error> {
    check(&input.pod, input.container, input.cgroup_driver)?;
    let security = &input.container.security;
    let user_namespace = input.pod.config.namespaces.user.as_ref();
    let caps = caps::Sets::of(security, &input.node.capabilities, user_namespace.is_some())?;
    let labels = selinux::labels(input)?;
    let mounts = mounts::all(input)?;

    let mut root = Root::default();
    root.set_path("rootfs".into()).set_readonly(Some(security.readonly_rootfs));

    let mut user = OciUser::default();
    user.set_uid(input.user.uid)
        .set_gid(input.user.gid)
        .set_additional_gids(Some(input.user.additional_gids.clone()));

    let hostname = match input.pod.config.hostname.as_str() {
        "" => &input.node.hostname,
        name => name,
    };
    let resources = &input.container.resources;
    let mut process = Process::default();
    process
        .set_terminal(Some(input.container.tty))
        .set_user(user)
        .set_args(Some(args::arguments(input.container, input.image)?))
        .set_env(Some(args::environment(input.container, input.image, input.user, hostname)?))
        .set_cwd(args::working_dir(input.container, input.image)?.into())
        .set_capabilities(Some(caps.to_oci()))
        // Inherited from the daemon by way of the shim: a limit named here could not be raised
        // again by a shim that lacks CAP_SYS_RESOURCE.
        .set_rlimits(None)
        .set_no_new_privileges(Some(security.no_new_privs))
        .set_apparmor_profile(apparmor(input)?)
        .set_selinux_label(labels.as_ref().map(|labels| labels.process.clone()))
        .set_oom_score_adj(Some(resources::oom_score_adj(resources.oom_score_adj, input.node)?));

    let mut limits = resources::create(resources, input.pids_limit, input.node)?;
    let (devices, rules) = devices(input);
    limits.set_devices(Some(rules));

    let mut linux = Linux::default();
    linux
        .set_namespaces(Some(namespaces(input)))
        .set_uid_mappings(user_namespace.map(|user| mounts::mappings(&user.uids)))
        .set_gid_mappings(user_namespace.map(|user| mounts::mappings(&user.gids)))
        .set_resources(Some(limits))
        .set_cgroups_path(Some(
            cgroups_path(
                &input.pod.config.cgroup_parent,
                input.pod.id,
                input.container_id,
                input.cgroup_driver,
            )
            .into(),
        ))
        .set_devices((!devices.is_empty()).then_some(devices))
        .set_seccomp(seccomp(input, caps.bounding)?)
        .set_rootfs_propagation(mounts.rootfs_propagation.map(str::to_owned))
        .set_masked_paths(paths(security.privileged, &security.masked_paths, &MASKED))
        .set_readonly_paths(paths(security.privileged, &security.readonly_paths, &READONLY))
        .set_mount_label(labels.map(|labels| labels.mount))
        // The namespaces are the pod's, and its sysctls were set when they were made.
        .set_sysctl(None);

    let mut spec = Spec::default();
    // The lowest version that has the words used: crun 1.8 takes none above 1.1.
    let version = if mounts.id_mapped && input.features.oci_version_max >= Some((1, 1)) {
        "1.1.0"
    } else {
        "1.0.2"
    };
    spec.set_version(version.to_owned())
        .set_root(Some(root))
        .set_mounts(Some(mounts.list))
        .set_process(Some(process))
        // The pod's UTS namespace has it, or it is the node's.
        .set_hostname(None)
        .set_annotations(Some(annotations(input)))
        .set_linux(Some(linux));
    Ok(spec)
}

/// The process of an exec: the container's own with other arguments, so that it has no more rights
/// and no other limits, environment or oom_score_adj.
pub fn process_for_exec(spec: &Spec, cmd: &[String], tty: bool) -> Process {
    let mut process = spec.process().clone().unwrap_or_default();
    if tty
        && let Some(env) = process.env_mut()
        && !env.iter().any(|v| v.starts_with("TERM="))
    {
        env.push("TERM=xterm".to_owned());
    }
    process.set_args(Some(cmd.to_vec())).set_terminal(Some(tty)).set_console_size(None);
    process
}

/// Paths that show the host's secrets or its hardware.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Paths that change the host.
const READONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

fn paths(privileged: bool, asked: &Option<Vec<String>>, default: &[&str]) -> Option<Vec<String>> {
    let list = match asked {
        _ if privileged => return None,
        Some(list) => list.clone(),
        None => default.iter().map(|path| (*path).to_owned()).collect(),
    };
    (!list.is_empty()).then_some(list)
}

fn namespaces(input: &Input<'_>) -> Vec<LinuxNamespace> {
    let mut list = joined(input.namespaces);
    // On v1 it would hide less than it breaks: the hierarchies are bound, not mounted anew.
    if input.node.cgroup.mode == CgroupMode::V2 && !input.container.security.privileged {
        list.push(namespace(LinuxNamespaceType::Cgroup, None));
    }
    list
}

/// Mounts of its own, and those of the pod's namespaces that it joins.
fn joined(paths: &NamespacePaths) -> Vec<LinuxNamespace> {
    let mut list = vec![namespace(LinuxNamespaceType::Mount, None)];
    match &paths.pid {
        PidNamespace::New => list.push(namespace(LinuxNamespaceType::Pid, None)),
        PidNamespace::Path(path) => list.push(namespace(LinuxNamespaceType::Pid, Some(path))),
        PidNamespace::Host => {}
    }
    for (typ, path) in [
        (LinuxNamespaceType::Network, &paths.net),
        (LinuxNamespaceType::Ipc, &paths.ipc),
        (LinuxNamespaceType::Uts, &paths.uts),
        (LinuxNamespaceType::User, &paths.user),
    ] {
        if path.is_some() {
            list.push(namespace(typ, path.as_ref()));
        }
    }
    list
}

fn namespace(typ: LinuxNamespaceType, path: Option<&PathBuf>) -> LinuxNamespace {
    let mut out = LinuxNamespace::default();
    out.set_typ(typ).set_path(path.cloned());
    out
}

/// Device nodes to make, and the rules of the cgroup. The runtime adds /dev/null and its kin.
fn devices(input: &Input<'_>) -> (Vec<LinuxDevice>, Vec<LinuxDeviceCgroup>) {
    let rule = |allow, access: &str| {
        let mut out = LinuxDeviceCgroup::default();
        out.set_allow(allow).set_access(Some(access.to_owned()));
        out
    };
    let asked: Vec<(&DeviceNode, &str)> = input
        .container
        .devices
        .iter()
        .zip(&input.host.devices)
        .flat_map(|(device, nodes)| nodes.iter().map(move |node| (node, &*device.permissions)))
        .collect();
    let mut rules = vec![rule(false, "rwm")];
    if input.container.security.privileged && !input.host.host_devices.is_empty() {
        rules = vec![rule(true, "rwm")];
    } else {
        for (node, permissions) in &asked {
            let mut allow = rule(true, if permissions.is_empty() { "rwm" } else { permissions });
            allow
                .set_typ(Some(kind(node)))
                .set_major(Some(node.major.into()))
                .set_minor(Some(node.minor.into()));
            rules.push(allow);
        }
    }
    let mut devices: Vec<LinuxDevice> = Vec::new();
    let nodes = asked
        .iter()
        .map(|(node, _)| *node)
        .chain(input.host.host_devices.iter().filter(|_| input.container.security.privileged));
    for node in nodes {
        // The first one at a path wins: what was asked for, before what privileged gives.
        if devices.iter().any(|known| *known.path() == node.path) {
            continue;
        }
        let mut device = LinuxDevice::default();
        device
            .set_path(node.path.clone())
            .set_typ(kind(node))
            .set_major(node.major.into())
            .set_minor(node.minor.into())
            .set_file_mode(Some(node.mode))
            .set_uid(Some(node.uid))
            .set_gid(Some(node.gid));
        devices.push(device);
    }
    (devices, rules)
}

fn kind(node: &DeviceNode) -> LinuxDeviceType {
    if node.block { LinuxDeviceType::B } else { LinuxDeviceType::C }
}

fn seccomp(input: &Input<'_>, bounding: u64) -> Result<Option<LinuxSeccomp>, Error> {
    let security = &input.container.security;
    let profile = match &security.seccomp {
        // The kubelet always says which; silence has always meant none in the CRI.
        None | Some(Profile::Unconfined) => return Ok(None),
        Some(_) if security.privileged => return Ok(None),
        Some(profile) => profile,
    };
    if !input.node.seccomp {
        return Err(Error::lacking("security.seccomp", "this kernel has no seccomp"));
    }
    if input.features.seccomp == Some(false) {
        return Err(Error::lacking(
            "security.seccomp",
            "the OCI runtime was built without seccomp",
        ));
    }
    match profile {
        Profile::Localhost(name) => {
            let text = input.seccomp_localhost.ok_or_else(|| {
                Error::lacking("security.seccomp", format!("profile {name:?} is not on this node"))
            })?;
            seccomp::localhost(name, text, bounding, input.node, input.features).map(Some)
        }
        Profile::RuntimeDefault | Profile::Unconfined => {
            Ok(Some(seccomp::runtime_default(bounding, input.node)))
        }
    }
}

fn apparmor(input: &Input<'_>) -> Result<Option<String>, Error> {
    let security = &input.container.security;
    let loaded = &input.host.apparmor_profiles;
    let on = input.node.apparmor && input.features.apparmor != Some(false);
    let field = "security.apparmor";
    match &security.apparmor {
        Some(Profile::Unconfined) => Ok(on.then(|| "unconfined".to_owned())),
        None if on && !security.privileged && loaded.contains(APPARMOR_DEFAULT) => {
            Ok(Some(APPARMOR_DEFAULT.to_owned()))
        }
        None => Ok(None),
        Some(Profile::RuntimeDefault) if security.privileged => Ok(None),
        Some(Profile::RuntimeDefault | Profile::Localhost(_)) if !input.node.apparmor => {
            Err(Error::lacking(field, "this node has no AppArmor"))
        }
        Some(Profile::RuntimeDefault | Profile::Localhost(_)) if !on => {
            Err(Error::lacking(field, "the OCI runtime was built without AppArmor"))
        }
        Some(Profile::RuntimeDefault) => match loaded.contains(APPARMOR_DEFAULT) {
            true => Ok(Some(APPARMOR_DEFAULT.to_owned())),
            false => {
                Err(Error::lacking(field, format!("profile {APPARMOR_DEFAULT} is not loaded")))
            }
        },
        Some(Profile::Localhost(name)) => {
            let name = name.strip_prefix("localhost/").unwrap_or(name);
            match loaded.contains(name) {
                true => Ok(Some(name.to_owned())),
                false => Err(Error::lacking(field, format!("profile {name:?} is not loaded"))),
            }
        }
    }
}

/// Names that containerd gave and that shims, runtimes and tools read.
fn annotations(input: &Input<'_>) -> HashMap<String, String> {
    let pod = &input.pod;
    let ours = [
        ("container-type", "container"),
        ("sandbox-id", pod.id.as_str()),
        ("sandbox-uid", &pod.config.uid),
        ("sandbox-namespace", &pod.config.namespace),
        ("sandbox-name", &pod.config.name),
        ("container-name", &input.container.name),
        ("image-name", input.image_name),
    ];
    let ours = ours.map(|(key, value)| (format!("io.kubernetes.cri.{key}"), value.to_owned()));
    // Ours last: nobody can move a container to another pod's shim.
    input.container.annotations.clone().into_iter().chain(ours).collect()
}

#[cfg(test)]
pub(crate) mod tests;

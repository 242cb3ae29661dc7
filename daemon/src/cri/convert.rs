//! Where CRI types become ours and back. What is not valid ends here, with the field's name.

use std::{
    path::{Component, Path, PathBuf},
    time::{Duration, SystemTime},
};

use holdfast_protos::cri;
use tonic::Status;

use crate::{
    pod::{
        ContainerView, PodView,
        config::{
            ContainerConfig, Device, Dns, GroupsPolicy, IdMapping, Mount, PidMode, PodConfig,
            PodNamespaces, PodSecurity, PortMapping, Profile, Propagation, Protocol, Resources,
            Security, Selinux, UserNamespace,
        },
        state::{ContainerState, Exit, PodState},
    },
    store::pods::ContainerRecord,
};

type Result<T> = std::result::Result<T, Status>;

/// "field: what is wrong with it".
fn invalid(field: &str, what: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("{field}: {what}"))
}

fn required<T>(field: &str, value: Option<T>) -> Result<T> {
    value.ok_or_else(|| invalid(field, "it is required"))
}

/// A name of Kubernetes or of a container: it becomes part of paths and of annotations.
fn name(field: &str, text: String) -> Result<String> {
    if text.is_empty() {
        return Err(invalid(field, "it is required"));
    }
    if text.len() > 253 || text.contains(['/', '\0', '\n']) {
        return Err(invalid(
            field,
            format!("{text:?} must be at most 253 characters without / or control characters"),
        ));
    }
    Ok(text)
}

/// An absolute path without "..".
fn absolute(field: &str, path: &str) -> Result<PathBuf> {
    let path = PathBuf::from(path);
    if !path.is_absolute() || path.components().any(|c| c == Component::ParentDir) {
        return Err(invalid(field, format!("{path:?} must be absolute and without \"..\"")));
    }
    Ok(path)
}

fn no_nul(field: &str, texts: &[String]) -> Result<()> {
    match texts.iter().find(|text| text.contains('\0')) {
        Some(text) => Err(invalid(field, format!("{text:?} has a NUL character"))),
        None => Ok(()),
    }
}

/// The pod that a request asks for.
pub(super) fn pod_config(config: cri::PodSandboxConfig) -> Result<PodConfig> {
    let metadata = required("config.metadata", config.metadata)?;
    let linux = config.linux.unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    let options = security.namespace_options.clone().unwrap_or_default();
    for (name, mode) in [("network", options.network), ("ipc", options.ipc)] {
        let known = [cri::NamespaceMode::Pod as i32, cri::NamespaceMode::Node as i32];
        if !known.contains(&mode) {
            let field = format!("config.linux.security_context.namespace_options.{name}");
            return Err(invalid(&field, format!("namespace mode {mode} is neither POD nor NODE")));
        }
    }
    let host = |mode: i32| mode == cri::NamespaceMode::Node as i32;
    let hostname = config.hostname;
    if hostname.len() > 64 {
        return Err(invalid(
            "config.hostname",
            "the kernel takes at most 64 bytes (sethostname(2))",
        ));
    }
    if hostname.bytes().any(|b| b.is_ascii_whitespace() || b.is_ascii_control() || b == b'/') {
        return Err(invalid(
            "config.hostname",
            "a host name has no space, slash or control character",
        ));
    }
    let log_directory = match config.log_directory.is_empty() {
        true => PathBuf::new(),
        false => absolute("config.log_directory", &config.log_directory)?,
    };
    let pid = match cri::NamespaceMode::try_from(options.pid) {
        Ok(cri::NamespaceMode::Pod) => PidMode::Pod,
        Ok(cri::NamespaceMode::Container) => PidMode::Container,
        Ok(cri::NamespaceMode::Node) => PidMode::Node,
        Ok(cri::NamespaceMode::Target) | Err(_) => {
            return Err(invalid("namespace_options.pid", "a pod's is POD, CONTAINER or NODE"));
        }
    };
    let user = user_namespace(options.userns_options)?;
    if user.is_some() && (host(options.ipc) || pid == PidMode::Node) {
        return Err(Status::failed_precondition(
            "a pod with a user namespace of its own cannot share the node's IPC or PID namespace: its processes would have no rights there",
        ));
    }
    for (key, value) in &linux.sysctls {
        if key.is_empty() || key.contains("..") || !key.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(invalid("linux.sysctls", format!("{key:?} is not a sysctl")));
        }
        no_nul("linux.sysctls", std::slice::from_ref(value))?;
    }
    let mut port_mappings = Vec::new();
    for mapping in config.port_mappings {
        port_mappings.extend(port_mapping(mapping)?);
    }
    Ok(PodConfig {
        name: name("config.metadata.name", metadata.name)?,
        uid: name("config.metadata.uid", metadata.uid)?,
        namespace: name("config.metadata.namespace", metadata.namespace)?,
        attempt: metadata.attempt,
        hostname,
        log_directory,
        dns: config.dns_config.map(|dns| Dns {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        }),
        port_mappings,
        labels: config.labels.into_iter().collect(),
        annotations: config.annotations.into_iter().collect(),
        cgroup_parent: cgroup_parent(linux.cgroup_parent)?,
        sysctls: linux.sysctls.into_iter().collect(),
        namespaces: PodNamespaces {
            host_network: host(options.network),
            host_ipc: host(options.ipc),
            pid,
            user,
        },
        security: PodSecurity {
            privileged: security.privileged,
            run_as_user: security.run_as_user.map(|v| v.value),
            run_as_group: security.run_as_group.map(|v| v.value),
            supplemental_groups: security.supplemental_groups,
            selinux: security.selinux_options.map(selinux),
            seccomp: profile("seccomp", security.seccomp)?,
            apparmor: profile("apparmor", security.apparmor)?,
        },
        overhead: linux.overhead.map(resources),
        resources: linux.resources.map(resources),
    })
}

fn cgroup_parent(text: String) -> Result<String> {
    if text.contains('\0') || Path::new(&text).components().any(|c| c == Component::ParentDir) {
        return Err(invalid("linux.cgroup_parent", format!("{text:?} is not a path of a cgroup")));
    }
    Ok(text)
}

fn user_namespace(options: Option<cri::UserNamespace>) -> Result<Option<UserNamespace>> {
    let Some(options) = options else { return Ok(None) };
    match cri::NamespaceMode::try_from(options.mode) {
        Ok(cri::NamespaceMode::Node) => Ok(None),
        Ok(cri::NamespaceMode::Pod) => {
            let user = UserNamespace { uids: mappings(options.uids), gids: mappings(options.gids) };
            if user.uids.is_empty() || user.gids.is_empty() {
                return Err(invalid("userns_options", "mode POD needs uids and gids mappings"));
            }
            if user.uids.len() > 1 || user.gids.len() > 1 {
                let what = "mode POD takes one mapping of uids and one of gids";
                return Err(invalid("userns_options", what));
            }
            if user.uids.iter().chain(&user.gids).any(|m| m.container_id != 0) {
                return Err(invalid("userns_options", "the mappings must begin at container_id 0"));
            }
            let bad = |m: &&IdMapping| {
                m.length == 0
                    || m.host_id.checked_add(m.length).is_none()
                    || m.container_id.checked_add(m.length).is_none()
            };
            match user.uids.iter().chain(&user.gids).find(bad) {
                Some(m) => Err(invalid("userns_options", format!("{m:?} is not a range of ids"))),
                None => Ok(Some(user)),
            }
        }
        Ok(cri::NamespaceMode::Container | cri::NamespaceMode::Target) | Err(_) => {
            Err(invalid("userns_options.mode", "it is POD or NODE"))
        }
    }
}

fn mappings(list: Vec<cri::IdMapping>) -> Vec<IdMapping> {
    list.into_iter()
        .map(|m| IdMapping { host_id: m.host_id, container_id: m.container_id, length: m.length })
        .collect()
}

fn port_mapping(mapping: cri::PortMapping) -> Result<Option<PortMapping>> {
    let port = |field, port: i32| {
        u16::try_from(port).map_err(|_| invalid(field, format!("{port} is not a port")))
    };
    let host_port = port("port_mappings.host_port", mapping.host_port)?;
    let container_port = port("port_mappings.container_port", mapping.container_port)?;
    // Not mapped at all: the kubelet lists every port of the pod.
    if host_port == 0 {
        return Ok(None);
    }
    if container_port == 0 {
        return Err(invalid("port_mappings.container_port", "it is required with a host port"));
    }
    if !mapping.host_ip.is_empty() && mapping.host_ip.parse::<std::net::IpAddr>().is_err() {
        let what = format!("{:?} is not an IP address", mapping.host_ip);
        return Err(invalid("port_mappings.host_ip", what));
    }
    let protocol = match cri::Protocol::try_from(mapping.protocol) {
        Ok(cri::Protocol::Tcp) => Protocol::Tcp,
        Ok(cri::Protocol::Udp) => Protocol::Udp,
        Ok(cri::Protocol::Sctp) => Protocol::Sctp,
        Err(_) => return Err(invalid("port_mappings.protocol", "it is TCP, UDP or SCTP")),
    };
    Ok(Some(PortMapping { protocol, container_port, host_port, host_ip: mapping.host_ip }))
}

fn profile(field: &str, profile: Option<cri::SecurityProfile>) -> Result<Option<Profile>> {
    use cri::security_profile::ProfileType;
    let Some(profile) = profile else { return Ok(None) };
    match ProfileType::try_from(profile.profile_type) {
        Ok(ProfileType::RuntimeDefault) => Ok(Some(Profile::RuntimeDefault)),
        Ok(ProfileType::Unconfined) => Ok(Some(Profile::Unconfined)),
        Ok(ProfileType::Localhost) if profile.localhost_ref.is_empty() => {
            Err(invalid(field, "a Localhost profile needs localhost_ref"))
        }
        Ok(ProfileType::Localhost)
            if field == "seccomp" && !profile.localhost_ref.starts_with('/') =>
        {
            let wrong = format!("{:?} is not an absolute path", profile.localhost_ref);
            Err(invalid(field, wrong))
        }
        Ok(ProfileType::Localhost) => Ok(Some(Profile::Localhost(profile.localhost_ref))),
        Err(_) => Err(invalid(field, "unknown profile type")),
    }
}

fn selinux(options: cri::SeLinuxOption) -> Selinux {
    Selinux { user: options.user, role: options.role, kind: options.r#type, level: options.level }
}

/// Resources, in the same units.
pub(super) fn resources(r: cri::LinuxContainerResources) -> Resources {
    Resources {
        cpu_period: r.cpu_period,
        cpu_quota: r.cpu_quota,
        cpu_shares: r.cpu_shares,
        memory_limit: r.memory_limit_in_bytes,
        memory_swap_limit: r.memory_swap_limit_in_bytes,
        oom_score_adj: r.oom_score_adj,
        cpuset_cpus: r.cpuset_cpus,
        cpuset_mems: r.cpuset_mems,
        hugepages: r.hugepage_limits.into_iter().map(|h| (h.page_size, h.limit)).collect(),
        unified: r.unified.into_iter().collect(),
    }
}

fn resources_back(r: &Resources) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources {
        cpu_period: r.cpu_period,
        cpu_quota: r.cpu_quota,
        cpu_shares: r.cpu_shares,
        memory_limit_in_bytes: r.memory_limit,
        memory_swap_limit_in_bytes: r.memory_swap_limit,
        oom_score_adj: r.oom_score_adj,
        cpuset_cpus: r.cpuset_cpus.clone(),
        cpuset_mems: r.cpuset_mems.clone(),
        hugepage_limits: r
            .hugepages
            .iter()
            .map(|(page_size, limit)| cri::HugepageLimit {
                page_size: page_size.clone(),
                limit: *limit,
            })
            .collect(),
        unified: r.unified.clone().into_iter().collect(),
    }
}

/// The container that a request asks for.
pub(super) fn container_config(config: cri::ContainerConfig) -> Result<ContainerConfig> {
    let metadata = required("config.metadata", config.metadata)?;
    let image = required("config.image", config.image)?;
    if image.image.is_empty() {
        return Err(invalid("config.image.image", "it is required"));
    }
    let linux = config.linux.unwrap_or_default();
    let log_path = PathBuf::from(config.log_path);
    if log_path.is_absolute() || log_path.components().any(|c| c == Component::ParentDir) {
        let what =
            format!("{log_path:?} must be relative to the pod's log directory, without \"..\"");
        return Err(invalid("config.log_path", what));
    }
    no_nul("config.command", &config.command)?;
    no_nul("config.args", &config.args)?;
    let mut env = Vec::with_capacity(config.envs.len());
    for pair in config.envs {
        let value = String::from_utf8(pair.value).map_err(|_| {
            invalid("config.envs", format!("the value of {:?} is not UTF-8", pair.key))
        })?;
        if pair.key.is_empty() || pair.key.contains(['=', '\0']) || value.contains('\0') {
            return Err(invalid("config.envs", format!("{:?} is not a variable", pair.key)));
        }
        env.push((pair.key, value));
    }
    if config.stdin_once && !config.stdin {
        return Err(invalid("config.stdin_once", "it needs stdin"));
    }
    let mounts = config.mounts.into_iter().map(mount).collect::<Result<_>>()?;
    let devices = config.devices.into_iter().map(device).collect::<Result<_>>()?;
    let stop_signal = match cri::Signal::try_from(config.stop_signal) {
        Ok(cri::Signal::RuntimeDefault) => None,
        // "SIGNAL_SIGRTMINPLUS3" -> "SIGRTMIN+3", as signal names are written everywhere else.
        Ok(signal) => Some(
            signal
                .as_str_name()
                .trim_start_matches("SIGNAL_")
                .replace("PLUS", "+")
                .replace("MINUS", "-"),
        ),
        Err(_) => return Err(invalid("config.stop_signal", "unknown signal")),
    };
    let security = linux.security_context.unwrap_or_default();
    Ok(ContainerConfig {
        name: name("config.metadata.name", metadata.name)?,
        attempt: metadata.attempt,
        // No reference of an image begins so: it is the archive of a checkpoint.
        checkpoint: match image.image.starts_with('/') {
            true => image.image.clone().into(),
            false => PathBuf::new(),
        },
        image: image.image,
        user_specified_image: image.user_specified_image,
        image_annotations: image.annotations.into_iter().collect(),
        command: config.command,
        args: config.args,
        working_dir: config.working_dir,
        env,
        mounts,
        devices,
        cdi_devices: config.cdi_devices.into_iter().map(|d| d.name).collect(),
        labels: config.labels.into_iter().collect(),
        annotations: config.annotations.into_iter().collect(),
        log_path,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        resources: linux.resources.map(resources).unwrap_or_default(),
        security: container_security(security)?,
        stop_signal,
    })
}

fn mount(mount: cri::Mount) -> Result<Mount> {
    if mount.container_path.is_empty() || mount.container_path.contains('\0') {
        return Err(invalid("mounts.container_path", "it is required"));
    }
    let image = mount.image.map(|spec| spec.image).filter(|image| !image.is_empty());
    match (&image, mount.host_path.is_empty()) {
        (None, true) => return Err(invalid("mounts.host_path", "it, or an image, is required")),
        (Some(_), false) => {
            return Err(invalid(
                "mounts.host_path",
                "a mount has a host path or an image, not both",
            ));
        }
        (None, false) => drop(absolute("mounts.host_path", &mount.host_path)?),
        (Some(_), true) => {}
    }
    if mount.recursive_read_only && !mount.readonly {
        return Err(invalid("mounts.recursive_read_only", "it needs readonly"));
    }
    let propagation = match cri::MountPropagation::try_from(mount.propagation) {
        Ok(cri::MountPropagation::PropagationPrivate) => Propagation::Private,
        Ok(cri::MountPropagation::PropagationHostToContainer) => Propagation::HostToContainer,
        Ok(cri::MountPropagation::PropagationBidirectional) => Propagation::Bidirectional,
        Err(_) => return Err(invalid("mounts.propagation", "unknown")),
    };
    if mount.recursive_read_only && propagation != Propagation::Private {
        return Err(invalid("mounts.recursive_read_only", "it needs private propagation"));
    }
    Ok(Mount {
        container_path: mount.container_path,
        host_path: mount.host_path,
        readonly: mount.readonly,
        recursive_read_only: mount.recursive_read_only,
        selinux_relabel: mount.selinux_relabel,
        propagation,
        uid_mappings: mappings(mount.uid_mappings),
        gid_mappings: mappings(mount.gid_mappings),
        image,
        image_ref: String::new(),
        image_sub_path: mount.image_sub_path,
        options: mount.mount_options,
    })
}

fn device(device: cri::Device) -> Result<Device> {
    absolute("devices.host_path", &device.host_path)?;
    let permissions = match device.permissions.as_str() {
        "" => "rwm".to_owned(),
        text if text.bytes().all(|b| b"rwm".contains(&b)) => text.to_owned(),
        text => {
            return Err(invalid("devices.permissions", format!("{text:?} must be of r, w and m")));
        }
    };
    let container_path = match device.container_path.is_empty() {
        true => device.host_path.clone(),
        false => device.container_path,
    };
    Ok(Device { container_path, host_path: device.host_path, permissions })
}

fn container_security(security: cri::LinuxContainerSecurityContext) -> Result<Security> {
    let options = security.namespace_options.unwrap_or_default();
    let pid = match cri::NamespaceMode::try_from(options.pid) {
        Ok(cri::NamespaceMode::Pod) => PidMode::Pod,
        Ok(cri::NamespaceMode::Container) => PidMode::Container,
        Ok(cri::NamespaceMode::Node) => PidMode::Node,
        Ok(cri::NamespaceMode::Target) if options.target_id.is_empty() => {
            return Err(invalid("namespace_options.target_id", "pid TARGET needs it"));
        }
        Ok(cri::NamespaceMode::Target) => PidMode::Target(options.target_id),
        Err(_) => return Err(invalid("namespace_options.pid", "unknown mode")),
    };
    let id = |field, value: Option<cri::Int64Value>| match value.map(|v| v.value) {
        Some(id) if u32::try_from(id).is_err() => {
            Err(invalid(field, format!("{id} is not an id (0 to 4294967295)")))
        }
        id => Ok(id),
    };
    if security.run_as_user.is_some() && !security.run_as_username.is_empty() {
        return Err(invalid("run_as_username", "a user is given by id or by name, not both"));
    }
    let capabilities = security.capabilities.unwrap_or_default();
    let policy = match cri::SupplementalGroupsPolicy::try_from(security.supplemental_groups_policy)
    {
        Ok(cri::SupplementalGroupsPolicy::Merge) => GroupsPolicy::Merge,
        Ok(cri::SupplementalGroupsPolicy::Strict) => GroupsPolicy::Strict,
        Err(_) => return Err(invalid("supplemental_groups_policy", "unknown policy")),
    };
    let paths = |paths: Vec<String>| match (security.privileged, paths) {
        (true, _) => Some(Vec::new()),
        (false, paths) => Some(paths),
    };
    Ok(Security {
        privileged: security.privileged,
        add_capabilities: capabilities.add_capabilities,
        drop_capabilities: capabilities.drop_capabilities,
        add_ambient_capabilities: capabilities.add_ambient_capabilities,
        pid,
        run_as_user: id("run_as_user", security.run_as_user)?,
        run_as_group: id("run_as_group", security.run_as_group)?,
        run_as_username: security.run_as_username,
        supplemental_groups: security.supplemental_groups,
        supplemental_groups_policy: policy,
        readonly_rootfs: security.readonly_rootfs,
        no_new_privs: security.no_new_privs,
        masked_paths: paths(security.masked_paths),
        readonly_paths: paths(security.readonly_paths),
        seccomp: profile("seccomp", security.seccomp)?,
        apparmor: profile("apparmor", security.apparmor)?,
        selinux: security.selinux_options.map(selinux),
    })
}

/// Nanoseconds since 1970, as the CRI has times; 0: none.
pub(super) fn nanos(at: SystemTime) -> i64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

fn pod_state(state: PodState) -> cri::PodSandboxState {
    match state {
        PodState::Ready => cri::PodSandboxState::SandboxReady,
        PodState::Starting | PodState::NotReady => cri::PodSandboxState::SandboxNotready,
    }
}

pub(super) fn pod_metadata(config: &PodConfig) -> cri::PodSandboxMetadata {
    cri::PodSandboxMetadata {
        name: config.name.clone(),
        uid: config.uid.clone(),
        namespace: config.namespace.clone(),
        attempt: config.attempt,
    }
}

/// A pod in a list.
pub(super) fn pod_item(view: &PodView) -> cri::PodSandbox {
    let record = &view.record;
    cri::PodSandbox {
        id: record.id.to_string(),
        metadata: Some(pod_metadata(&record.config)),
        state: pod_state(record.state) as i32,
        created_at: nanos(record.created_at),
        labels: record.config.labels.clone().into_iter().collect(),
        annotations: record.config.annotations.clone().into_iter().collect(),
        runtime_handler: record.handler.clone(),
    }
}

/// Which pods a filter takes.
pub(super) fn pod_matches(view: &PodView, filter: &cri::PodSandboxFilter) -> bool {
    let record = &view.record;
    let labels = &record.config.labels;
    record.id.as_str().starts_with(&filter.id)
        && filter.state.is_none_or(|s| s.state == pod_state(record.state) as i32)
        && filter.label_selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}

/// A pod's status.
pub(super) fn pod_status(view: &PodView) -> cri::PodSandboxStatus {
    let record = &view.record;
    let namespaces = &record.config.namespaces;
    let mode = |host| match host {
        true => cri::NamespaceMode::Node as i32,
        false => cri::NamespaceMode::Pod as i32,
    };
    let mut ips = record.ips.iter().map(ToString::to_string);
    let pid = match namespaces.pid {
        PidMode::Pod => cri::NamespaceMode::Pod,
        PidMode::Node => cri::NamespaceMode::Node,
        PidMode::Container | PidMode::Target(_) => cri::NamespaceMode::Container,
    };
    cri::PodSandboxStatus {
        id: record.id.to_string(),
        metadata: Some(pod_metadata(&record.config)),
        state: pod_state(record.state) as i32,
        created_at: nanos(record.created_at),
        network: Some(cri::PodSandboxNetworkStatus {
            ip: ips.next().unwrap_or_default(),
            additional_ips: ips.map(|ip| cri::PodIp { ip }).collect(),
        }),
        linux: Some(cri::LinuxPodSandboxStatus {
            namespaces: Some(cri::Namespace {
                options: Some(cri::NamespaceOption {
                    network: mode(namespaces.host_network),
                    pid: pid as i32,
                    ipc: mode(namespaces.host_ipc),
                    target_id: String::new(),
                    userns_options: namespaces.user.as_ref().map(|user| cri::UserNamespace {
                        mode: cri::NamespaceMode::Pod as i32,
                        uids: mappings_back(&user.uids),
                        gids: mappings_back(&user.gids),
                    }),
                }),
            }),
        }),
        labels: record.config.labels.clone().into_iter().collect(),
        annotations: record.config.annotations.clone().into_iter().collect(),
        runtime_handler: record.handler.clone(),
    }
}

fn mappings_back(list: &[IdMapping]) -> Vec<cri::IdMapping> {
    list.iter()
        .map(|m| cri::IdMapping {
            host_id: m.host_id,
            container_id: m.container_id,
            length: m.length,
        })
        .collect()
}

fn container_state(state: &ContainerState) -> cri::ContainerState {
    match state {
        ContainerState::Creating => cri::ContainerState::ContainerUnknown,
        ContainerState::Created { .. } => cri::ContainerState::ContainerCreated,
        ContainerState::Running { .. } => cri::ContainerState::ContainerRunning,
        ContainerState::Exited { .. } => cri::ContainerState::ContainerExited,
    }
}

pub(super) fn container_metadata(config: &ContainerConfig) -> cri::ContainerMetadata {
    cri::ContainerMetadata { name: config.name.clone(), attempt: config.attempt }
}

fn image_spec(record: &ContainerRecord) -> cri::ImageSpec {
    cri::ImageSpec {
        image: match record.config.image.starts_with('/') {
            // Made from the archive of a checkpoint: its image is the one below that.
            true => record.image_ref.clone(),
            false => record.config.image.clone(),
        },
        annotations: record.config.image_annotations.clone().into_iter().collect(),
        user_specified_image: record.config.user_specified_image.clone(),
        ..Default::default()
    }
}

/// A container in a list.
pub(super) fn container_item(view: &ContainerView) -> cri::Container {
    let record = &view.record;
    cri::Container {
        id: record.id.to_string(),
        pod_sandbox_id: record.pod.to_string(),
        metadata: Some(container_metadata(&record.config)),
        image: Some(image_spec(record)),
        image_ref: record.image_id.clone(),
        state: container_state(&record.state) as i32,
        created_at: nanos(record.created_at),
        labels: record.config.labels.clone().into_iter().collect(),
        annotations: record.config.annotations.clone().into_iter().collect(),
        image_id: record.image_id.clone(),
    }
}

/// Which containers a filter takes.
pub(super) fn container_matches(view: &ContainerView, filter: &cri::ContainerFilter) -> bool {
    let record = &view.record;
    let labels = &record.config.labels;
    record.id.as_str().starts_with(&filter.id)
        && record.pod.as_str().starts_with(&filter.pod_sandbox_id)
        && filter.state.is_none_or(|s| s.state == container_state(&record.state) as i32)
        && filter.label_selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}

/// All containers of a pod, the newest first: the kubelet takes the first of a name for the one that
/// counts (evented PLEG does not sort them).
pub(super) fn container_statuses(pod: &PodView) -> Vec<cri::ContainerStatus> {
    let mut statuses: Vec<_> = pod.containers.values().map(|c| container_status(c)).collect();
    statuses.sort_by_key(|status| std::cmp::Reverse(status.created_at));
    statuses
}

/// A container's status.
pub(super) fn container_status(view: &ContainerView) -> cri::ContainerStatus {
    let record = &view.record;
    let config = &record.config;
    let (started_at, finished_at, exit) = match &record.state {
        ContainerState::Creating | ContainerState::Created { .. } => (None, None, None),
        ContainerState::Running { started_at, .. } => (Some(*started_at), None, None),
        ContainerState::Exited { started_at, finished_at, how } => {
            (*started_at, Some(*finished_at), Some(how))
        }
    };
    let message = match exit {
        Some(Exit::NotStarted { message, .. }) => message.clone(),
        Some(Exit::Lost) if record.rebooted => {
            "it was gone when the node was started again; nobody saw how and when it ended, and the time is \
             that of the node's start"
                .into()
        }
        Some(Exit::Lost) => "nobody saw how it ended: its shim died and left no record".into(),
        _ => String::new(),
    };
    cri::ContainerStatus {
        id: record.id.to_string(),
        metadata: Some(container_metadata(config)),
        state: container_state(&record.state) as i32,
        created_at: nanos(record.created_at),
        started_at: started_at.map(nanos).unwrap_or_default(),
        finished_at: finished_at.map(nanos).unwrap_or_default(),
        exit_code: exit.map(Exit::code).unwrap_or_default(),
        image: Some(image_spec(record)),
        image_ref: record.image_ref.clone(),
        reason: match exit {
            Some(Exit::Lost) if record.rebooted => "NodeReboot".into(),
            exit => exit.map(|exit| exit.reason().to_owned()).unwrap_or_default(),
        },
        message,
        labels: config.labels.clone().into_iter().collect(),
        annotations: config.annotations.clone().into_iter().collect(),
        mounts: config.mounts.iter().map(mount_back).collect(),
        log_path: record.log.display().to_string(),
        resources: Some(cri::ContainerResources {
            linux: Some(resources_back(&config.resources)),
            windows: None,
        }),
        image_id: record.image_id.clone(),
        user: Some(cri::ContainerUser {
            linux: Some(cri::LinuxContainerUser {
                uid: record.user.uid.into(),
                gid: record.user.gid.into(),
                supplemental_groups: groups_back(record),
            }),
        }),
        stop_signal: stop_signal(record.stop_signal) as i32,
    }
}

/// All groups of the first process: its own is among them, as the kernel lists them.
fn groups_back(record: &ContainerRecord) -> Vec<i64> {
    let mut groups: Vec<i64> =
        record.user.additional_gids.iter().map(|gid| i64::from(*gid)).collect();
    let own = i64::from(record.user.gid);
    if !groups.contains(&own) {
        groups.insert(0, own);
    }
    groups
}

/// A signal's number as the CRI names it.
fn stop_signal(number: i32) -> cri::Signal {
    let (min, max) = (libc::SIGRTMIN(), libc::SIGRTMAX());
    let name = match nix::sys::signal::Signal::try_from(number) {
        Ok(signal) => format!("SIGNAL_{}", signal.as_str()),
        Err(_) if number == min => "SIGNAL_SIGRTMIN".into(),
        Err(_) if number == max => "SIGNAL_SIGRTMAX".into(),
        Err(_) if number - min <= 15 => format!("SIGNAL_SIGRTMINPLUS{}", number - min),
        Err(_) => format!("SIGNAL_SIGRTMAXMINUS{}", max - number),
    };
    cri::Signal::from_str_name(&name).unwrap_or(cri::Signal::RuntimeDefault)
}

fn mount_back(mount: &Mount) -> cri::Mount {
    let propagation = match mount.propagation {
        Propagation::Private => cri::MountPropagation::PropagationPrivate,
        Propagation::HostToContainer => cri::MountPropagation::PropagationHostToContainer,
        Propagation::Bidirectional => cri::MountPropagation::PropagationBidirectional,
    };
    cri::Mount {
        container_path: mount.container_path.clone(),
        host_path: mount.host_path.clone(),
        readonly: mount.readonly,
        selinux_relabel: mount.selinux_relabel,
        propagation: propagation as i32,
        uid_mappings: mappings_back(&mount.uid_mappings),
        gid_mappings: mappings_back(&mount.gid_mappings),
        recursive_read_only: mount.recursive_read_only,
        image: mount.image.as_ref().map(|image| cri::ImageSpec {
            image: image.clone(),
            image_ref: mount.image_ref.clone(),
            ..Default::default()
        }),
        image_sub_path: mount.image_sub_path.clone(),
        mount_options: mount.options.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: "a".into(),
                uid: "u".into(),
                namespace: "default".into(),
                attempt: 0,
            }),
            ..Default::default()
        }
    }

    fn container() -> cri::ContainerConfig {
        cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: "c".into(), attempt: 0 }),
            image: Some(cri::ImageSpec { image: "busybox".into(), ..Default::default() }),
            ..Default::default()
        }
    }

    #[track_caller]
    fn refused<T: std::fmt::Debug>(result: Result<T>, field: &str) {
        let status = result.unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
        assert!(status.message().contains(field), "{:?} does not name {field}", status.message());
    }

    #[test]
    fn what_is_wrong_with_a_pod_is_named() {
        assert!(pod_config(pod()).is_ok());
        refused(pod_config(cri::PodSandboxConfig::default()), "metadata");
        for hostname in ["x".repeat(65), "a b".into(), "a/b".into(), "a\n127.0.0.1 b".into()] {
            refused(pod_config(cri::PodSandboxConfig { hostname, ..pod() }), "hostname");
        }
        refused(
            pod_config(cri::PodSandboxConfig { log_directory: "logs".into(), ..pod() }),
            "log_directory",
        );
        let up = "/var/log/../etc".into();
        refused(pod_config(cri::PodSandboxConfig { log_directory: up, ..pod() }), "log_directory");
        let mapping =
            cri::PortMapping { host_port: 70000, container_port: 80, ..Default::default() };
        refused(
            pod_config(cri::PodSandboxConfig { port_mappings: vec![mapping], ..pod() }),
            "host_port",
        );
    }

    #[test]
    fn what_is_wrong_with_a_container_is_named() {
        assert!(container_config(container()).is_ok());
        refused(container_config(cri::ContainerConfig { image: None, ..container() }), "image");
        refused(
            container_config(cri::ContainerConfig { log_path: "../x".into(), ..container() }),
            "log_path",
        );
        let mount = cri::Mount { container_path: "/x".into(), ..Default::default() };
        refused(
            container_config(cri::ContainerConfig { mounts: vec![mount], ..container() }),
            "host_path",
        );
        let env = cri::KeyValue { key: "a=b".into(), value: b"c".to_vec() };
        refused(container_config(cri::ContainerConfig { envs: vec![env], ..container() }), "envs");
        refused(
            container_config(cri::ContainerConfig { stdin_once: true, ..container() }),
            "stdin_once",
        );
        let device = cri::Device {
            host_path: "/dev/null".into(),
            permissions: "x".into(),
            ..Default::default()
        };
        refused(
            container_config(cri::ContainerConfig { devices: vec![device], ..container() }),
            "permissions",
        );
    }

    #[test]
    fn signals_go_there_and_back() {
        for signal in 1..=65 {
            let Ok(signal) = cri::Signal::try_from(signal) else { continue };
            let asked = cri::ContainerConfig { stop_signal: signal as i32, ..container() };
            let name = container_config(asked).unwrap().stop_signal.unwrap();
            assert!(name.starts_with("SIG") && !name.contains("PLUS"), "{name}");
        }
        assert_eq!(stop_signal(15), cri::Signal::Sigterm);
        assert_eq!(stop_signal(libc::SIGRTMIN() + 3), cri::Signal::Sigrtminplus3);
        assert_eq!(stop_signal(libc::SIGRTMAX() - 2), cri::Signal::Sigrtmaxminus2);
    }
}

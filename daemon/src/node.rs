//! Facts about this node, and about the host paths that one container names.
//!
//! [`Node::discover`] looks once, at start; [`gather`] looks at each CreateContainer. `spec` then
//! decides without touching the system. Everything here may block (a dead NFS server holds `stat`
//! for ever): call it where blocking is allowed, with a deadline.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{DirBuilderExt, FileTypeExt, MetadataExt},
    },
    path::{Component, Path, PathBuf},
};

use crate::{
    error::{Kind, Kinded},
    pod::config::{ContainerConfig, Propagation},
};

/// Why a fact could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the kernel's.
    #[error("read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of the kernel's is not what proc(5) says.
    #[error("{what} is not understood: {text:?}")]
    Format {
        /// Which file or field.
        what: &'static str,
        /// What it says.
        text: String,
    },
    /// The source of a mount.
    #[error("mounts[{index}].host_path {}", path.display())]
    MountSource {
        /// Which mount.
        index: usize,
        /// Its path on the node.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A device node.
    #[error("devices[{index}].host_path {}", path.display())]
    Device {
        /// Which device.
        index: usize,
        /// Its path on the node.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A path that is no device node and no directory with one.
    #[error("devices[{index}].host_path {}: no device node is there", path.display())]
    NoDevice {
        /// Which device.
        index: usize,
        /// Its path on the node.
        path: PathBuf,
    },
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Read { .. } | Error::Format { .. } => Kind::Internal,
            Error::NoDevice { .. } => Kind::Invalid,
            Error::MountSource { .. } | Error::Device { .. } => Kind::Precondition,
        }
    }
}

/// What this node and this process are able to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The host's name: what pods without a name of their own see.
    pub hostname: String,
    /// Architecture as Rust names it: "x86_64", "aarch64".
    pub arch: &'static str,
    /// Kernel version, major and minor.
    pub kernel: (u32, u32),
    /// cgroups.
    pub cgroup: Cgroup,
    /// Capabilities.
    pub capabilities: CapabilityMasks,
    /// The daemon's own oom_score_adj.
    pub oom_score_adj: i32,
    /// The kernel filters system calls.
    pub seccomp: bool,
    /// AppArmor is on.
    pub apparmor: bool,
    /// SELinux is on, with these contexts.
    pub selinux: Option<SelinuxContexts>,
    /// The daemon's own RLIMIT_NOFILE, soft and hard: what containers inherit.
    pub nofile: (u64, u64),
}

/// Which cgroup hierarchies there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// How they are mounted.
    pub mode: CgroupMode,
    /// Controllers that a runtime can use: those of the mounted v1 hierarchies, or of the v2 root.
    /// On a hybrid host runtimes use v1 only, so what only the v2 mount has does not count.
    pub controllers: BTreeSet<String>,
    /// Page sizes of hugetlb, bytes.
    pub hugepage_sizes: BTreeSet<u64>,
    /// Swap is accounted, so that a limit on it can be set.
    pub swap: bool,
}

/// cgroups(7): how the hierarchies are mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupMode {
    /// Version 1 hierarchies only.
    V1,
    /// The unified hierarchy alone, at /sys/fs/cgroup.
    V2,
    /// Version 1 hierarchies, and version 2 mounted beside them.
    Hybrid,
}

/// Sets of capabilities as bit masks, bit n being capability number n (linux/capability.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CapabilityMasks {
    /// What the kernel knows.
    pub known: u64,
    /// What this process may give to a container: permitted and in its bounding set.
    pub grantable: u64,
    /// What this process has in effect.
    pub effective: u64,
}

/// The policy's contexts for containers (lxc_contexts of the loaded policy).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelinuxContexts {
    /// Of processes: "system_u:system_r:container_t:s0".
    pub process: String,
    /// Of files: "system_u:object_r:container_file_t:s0".
    pub file: String,
}

/// Facts about the host paths of one container's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// One for each of `ContainerConfig::mounts`, in order.
    pub mounts: Vec<MountFacts>,
    /// One list for each of `ContainerConfig::devices`, in order: a directory has many.
    pub devices: Vec<Vec<DeviceNode>>,
    /// The node's devices, when the container is privileged. Emptied by the caller for handlers
    /// that give privileged containers no devices.
    pub host_devices: Vec<DeviceNode>,
    /// Names of the AppArmor profiles that the kernel has loaded.
    pub apparmor_profiles: BTreeSet<String>,
    /// Directories that were made, outermost first: what to remove if the container is not made.
    pub created: Vec<PathBuf>,
}

/// The source of a mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountFacts {
    /// What to bind: the host path with symbolic links resolved. `None` for an image volume, until
    /// whoever mounts the image puts its path here.
    pub source: Option<PathBuf>,
    /// How the mount that it lies on propagates.
    pub propagation: HostPropagation,
}

/// How a mount of the host's propagates (mount_namespaces(7)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostPropagation {
    /// Not at all.
    #[default]
    Private,
    /// It receives.
    Slave,
    /// It receives and sends.
    Shared,
}

/// A device node of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceNode {
    /// Path in the container.
    pub path: PathBuf,
    /// Block, else character.
    pub block: bool,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Node {
    /// Looks at the node and at this process.
    pub fn discover() -> Result<Node, Error> {
        let status = read("/proc/self/status")?;
        let mask = |field: &'static str| -> Result<u64, Error> {
            let text = status_field(&status, field).unwrap_or_default();
            u64::from_str_radix(text, 16)
                .map_err(|_| Error::Format { what: field, text: text.to_owned() })
        };
        let last = read("/proc/sys/kernel/cap_last_cap")?;
        let last: u32 = last
            .trim()
            .parse()
            .ok()
            .filter(|last| *last < 64)
            .ok_or(Error::Format { what: "cap_last_cap", text: last })?;
        let oom = read("/proc/self/oom_score_adj")?;
        let oom_score_adj = oom
            .trim()
            .parse()
            .map_err(|_| Error::Format { what: "oom_score_adj", text: oom.clone() })?;
        let release = read("/proc/sys/kernel/osrelease")?;
        let kernel = kernel_version(&release)
            .ok_or_else(|| Error::Format { what: "osrelease", text: release.clone() })?;
        let nofile = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        Ok(Node {
            hostname: read("/proc/sys/kernel/hostname")?.trim().to_owned(),
            arch: std::env::consts::ARCH,
            kernel,
            cgroup: Cgroup::discover()?,
            capabilities: CapabilityMasks {
                known: u64::MAX >> (63 - last),
                grantable: mask("CapPrm")? & mask("CapBnd")?,
                effective: mask("CapEff")?,
            },
            oom_score_adj,
            seccomp: status_field(&status, "Seccomp").is_some(),
            apparmor: fs::read("/sys/module/apparmor/parameters/enabled")
                .is_ok_and(|text| text.starts_with(b"Y")),
            selinux: selinux_contexts(Path::new("/sys/fs/selinux"), Path::new("/etc/selinux")),
            nofile: (nofile.current.unwrap_or(u64::MAX), nofile.maximum.unwrap_or(u64::MAX)),
        })
    }
}

/// Where runtimes expect cgroups.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

impl Cgroup {
    fn discover() -> Result<Cgroup, Error> {
        let mounts = parse_mountinfo(&read_bytes("/proc/self/mountinfo")?);
        let unified = Path::new(CGROUP_ROOT);
        let (mode, v1) = cgroup_mode(&mounts);
        let controllers = match mode {
            CgroupMode::V2 => fs::read_to_string(unified.join("cgroup.controllers"))
                .map(|text| text.split_whitespace().map(str::to_owned).collect())
                .unwrap_or_default(),
            CgroupMode::V1 | CgroupMode::Hybrid => v1_controllers(&v1),
        };
        let swap = match mode {
            // The root of v2 has no memory.swap.max; its children do if swap is accounted.
            CgroupMode::V2 => fs::read_dir(unified).is_ok_and(|entries| {
                entries.flatten().any(|entry| entry.path().join("memory.swap.max").exists())
            }),
            CgroupMode::V1 | CgroupMode::Hybrid => v1
                .iter()
                .filter(|m| m.options.split(',').any(|o| o == "memory"))
                .any(|m| m.target.join("memory.memsw.limit_in_bytes").exists()),
        };
        let hugepage_sizes = holdfast_shim::cgroup::huge_page_sizes().into_iter().collect();
        Ok(Cgroup { mode, controllers, hugepage_sizes, swap })
    }

    /// Whether the runtime can use a controller.
    pub fn has(&self, controller: &str) -> bool {
        self.controllers.contains(controller)
    }
}

/// How the hierarchies are mounted, and the v1 ones. One that somebody mounted elsewhere is not one
/// that runtimes look at.
fn cgroup_mode(mounts: &[MountInfo]) -> (CgroupMode, Vec<&MountInfo>) {
    let of = |kind: &str| -> Vec<&MountInfo> {
        let here = mounts.iter().filter(|m| m.target.starts_with(CGROUP_ROOT));
        here.filter(|m| m.fs_type == kind).collect()
    };
    let (v1, v2) = (of("cgroup"), of("cgroup2"));
    let mode = match (v1.is_empty(), v2.is_empty()) {
        (true, _) => CgroupMode::V2,
        (false, false) => CgroupMode::Hybrid,
        (false, true) => CgroupMode::V1,
    };
    (mode, v1)
}

fn v1_controllers(mounts: &[&MountInfo]) -> BTreeSet<String> {
    // Super options mix controllers with flags; a flag is never asked for by name.
    mounts
        .iter()
        .flat_map(|m| m.options.split(','))
        .filter(|o| !matches!(*o, "rw" | "ro" | "xattr" | "noprefix" | "clone_children"))
        .filter(|o| !o.contains('='))
        .map(str::to_owned)
        .collect()
}

fn status_field<'a>(status: &'a str, field: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).map(str::trim)
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.trim().split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The contexts of the loaded policy, if SELinux is on.
fn selinux_contexts(selinuxfs: &Path, etc: &Path) -> Option<SelinuxContexts> {
    if !selinuxfs.join("enforce").exists() {
        return None;
    }
    let value = |text: &str, key: &str| {
        text.lines()
            .filter_map(|line| line.split_once('='))
            .find(|(name, _)| name.trim() == key)
            .map(|(_, value)| value.trim().trim_matches('"').to_owned())
    };
    let policy = fs::read_to_string(etc.join("config"))
        .ok()
        .and_then(|text| value(&text, "SELINUXTYPE"))
        .unwrap_or_else(|| "targeted".to_owned());
    let text =
        fs::read_to_string(etc.join(policy).join("contexts/lxc_contexts")).unwrap_or_default();
    Some(SelinuxContexts {
        process: value(&text, "process")
            .unwrap_or_else(|| "system_u:system_r:container_t:s0".to_owned()),
        file: value(&text, "file")
            .unwrap_or_else(|| "system_u:object_r:container_file_t:s0".to_owned()),
    })
}

/// Looks at what a container's configuration names on the host, and makes the directories that are
/// missing as sources of mounts (mode 0755, as the kubelet expects of a runtime).
///
/// Call it after [`crate::spec::check`], so that a configuration that cannot be is refused before
/// anything is made. On an error what was made is removed again.
pub fn gather(container: &ContainerConfig) -> Result<HostFacts, Error> {
    let mut facts = HostFacts::default();
    let result = look(container, &mut facts);
    match result {
        Ok(()) => Ok(facts),
        Err(error) => {
            remove_created(&facts.created);
            Err(error)
        }
    }
}

/// Removes directories that [`gather`] made, if they are still empty.
pub fn remove_created(created: &[PathBuf]) {
    for path in created.iter().rev() {
        // Someone may have put something there meanwhile: then it is theirs.
        let _ = fs::remove_dir(path);
    }
}

fn look(container: &ContainerConfig, facts: &mut HostFacts) -> Result<(), Error> {
    let mut sources = Vec::with_capacity(container.mounts.len());
    for (index, mount) in container.mounts.iter().enumerate() {
        if mount.image.is_some() {
            sources.push(None);
            continue;
        }
        let path = Path::new(&mount.host_path);
        let source = resolve_or_create(path, &mut facts.created)
            .map_err(|source| Error::MountSource { index, path: path.to_owned(), source })?;
        sources.push(Some(source));
    }
    // Reading the mount table costs milliseconds on nodes with many pods: only if it is needed.
    let asked = container.mounts.iter().any(|m| m.propagation != Propagation::Private);
    let mountinfo = if asked { read_bytes("/proc/self/mountinfo")? } else { Vec::new() };
    let table = parse_mountinfo(&mountinfo);
    facts.mounts = sources
        .into_iter()
        .map(|source| MountFacts {
            propagation: source
                .as_deref()
                .and_then(|source| covering(&table, source))
                .map(|mount| mount.propagation)
                .unwrap_or_default(),
            source,
        })
        .collect();
    for (index, device) in container.devices.iter().enumerate() {
        let path = Path::new(&device.host_path);
        let failed = |source| Error::Device { index, path: path.to_owned(), source };
        let target = Path::new(&device.container_path);
        let target = if target.as_os_str().is_empty() { path } else { target };
        let mut nodes = Vec::new();
        let meta = fs::metadata(path).map_err(failed)?;
        if meta.is_dir() {
            let root = fs::canonicalize(path).map_err(failed)?;
            walk_devices(&root, target, &mut nodes, &|_| false).map_err(failed)?;
        } else {
            nodes.extend(device_node(target, &meta));
        }
        if nodes.is_empty() {
            return Err(Error::NoDevice { index, path: path.to_owned() });
        }
        facts.devices.push(nodes);
    }
    if container.security.privileged {
        facts.host_devices = host_devices(Path::new("/dev"))?;
    }
    facts.apparmor_profiles = fs::read_to_string("/sys/kernel/security/apparmor/profiles")
        .map(|text| parse_apparmor_profiles(&text))
        .unwrap_or_default();
    Ok(())
}

/// "name (enforce)" a line; names may have spaces.
fn parse_apparmor_profiles(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter_map(|line| line.rsplit_once(" ("))
        .map(|(name, _)| name.to_owned())
        .collect()
}

fn resolve_or_create(path: &Path, created: &mut Vec<PathBuf>) -> io::Result<PathBuf> {
    match fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => return other,
    }
    let mut missing = PathBuf::new();
    for part in path.components() {
        missing.push(part);
        if matches!(part, Component::Normal(_)) {
            match fs::DirBuilder::new().mode(0o755).create(&missing) {
                Ok(()) => created.push(missing.clone()),
                // Also a link to nowhere: canonicalize below says so.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }
    fs::canonicalize(path)
}

fn device_node(path: &Path, meta: &fs::Metadata) -> Option<DeviceNode> {
    let kind = meta.file_type();
    (kind.is_block_device() || kind.is_char_device()).then(|| DeviceNode {
        path: path.to_owned(),
        block: kind.is_block_device(),
        major: rustix::fs::major(meta.rdev()),
        minor: rustix::fs::minor(meta.rdev()),
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
    })
}

fn walk_devices(
    from: &Path,
    to: &Path,
    nodes: &mut Vec<DeviceNode>,
    skip: &dyn Fn(&Path) -> bool,
) -> io::Result<()> {
    let mut entries = fs::read_dir(from)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if skip(&path) {
            continue;
        }
        let meta = match fs::symlink_metadata(&path) {
            Ok(meta) => meta,
            // Devices come and go while we look.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if meta.is_dir() {
            match walk_devices(&path, &target, nodes, skip) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        } else {
            nodes.extend(device_node(&target, &meta));
        }
    }
    Ok(())
}

/// The node's devices, without those that a container has of its own (ptys, console, shm).
fn host_devices(dev: &Path) -> Result<Vec<DeviceNode>, Error> {
    let own = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev", "console", "ptmx"];
    let skip = |path: &Path| own.iter().any(|name| path == dev.join(name));
    let mut nodes = Vec::new();
    walk_devices(dev, Path::new("/dev"), &mut nodes, &skip)
        .map_err(|source| Error::Read { path: dev.to_owned(), source })?;
    Ok(nodes)
}

/// A line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
#[derive(Debug, PartialEq, Eq)]
struct MountInfo {
    target: PathBuf,
    propagation: HostPropagation,
    fs_type: String,
    options: String,
}

fn parse_mountinfo(text: &[u8]) -> Vec<MountInfo> {
    text.split(|byte| *byte == b'\n').filter_map(parse_mount_line).collect()
}

fn parse_mount_line(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|byte| *byte == b' ');
    let target = unescape(fields.nth(4)?);
    let _mount_options = fields.next()?;
    let mut propagation = HostPropagation::Private;
    loop {
        let field = fields.next()?;
        if field == b"-" {
            break;
        }
        // A mount can be both; what matters is whether it sends.
        if field.starts_with(b"shared:") {
            propagation = HostPropagation::Shared;
        } else if field.starts_with(b"master:") && propagation == HostPropagation::Private {
            propagation = HostPropagation::Slave;
        }
    }
    let fs_type = String::from_utf8_lossy(fields.next()?).into_owned();
    let options = String::from_utf8_lossy(fields.nth(1)?).into_owned();
    let target = PathBuf::from(std::ffi::OsString::from_vec(target));
    Some(MountInfo { target, propagation, fs_type, options })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = (byte == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .filter(|digits| digits.iter().all(|d| (b'0'..=b'7').contains(d)))
            .map(|digits| digits.iter().fold(0u32, |sum, d| sum * 8 + u32::from(d - b'0')))
            .and_then(|value| u8::try_from(value).ok());
        match octal {
            Some(value) => {
                out.push(value);
                rest = &tail[3..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    out
}

/// The mount that a path lies on: the deepest mount point above it, and of several at one point the
/// last, which hides the others.
fn covering<'a>(table: &'a [MountInfo], path: &Path) -> Option<&'a MountInfo> {
    table
        .iter()
        .filter(|mount| path.starts_with(&mount.target))
        .max_by_key(|mount| mount.target.as_os_str().as_bytes().len())
}

fn read(path: &str) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| Error::Read { path: path.into(), source })
}

fn read_bytes(path: &str) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|source| Error::Read { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pod::config::{Device, Mount, Security};

    const TABLE: &[u8] = b"27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
        30 27 0:25 / /var rw shared:7 master:1 - tmpfs tmpfs rw\n\
        31 30 0:26 / /var/a\\040b rw master:3 - tmpfs tmpfs rw,size=4k\n\
        32 27 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
        33 27 0:32 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
        34 27 0:33 / /top rw - tmpfs tmpfs rw\n\
        35 34 0:34 / /top rw master:9 - tmpfs tmpfs rw\n\
        garbage\n";

    #[test]
    fn the_mount_table_is_read_with_escapes_and_propagation() {
        let table = parse_mountinfo(TABLE);
        assert_eq!(table.len(), 7);
        let propagation = |path: &str| covering(&table, Path::new(path)).unwrap().propagation;
        assert_eq!(propagation("/etc"), HostPropagation::Shared);
        assert_eq!(propagation("/var/lib"), HostPropagation::Shared);
        assert_eq!(propagation("/var/a b/c"), HostPropagation::Slave);
        assert_eq!(propagation("/variable"), HostPropagation::Shared);
        assert_eq!(propagation("/sys/fs/cgroup/cpu"), HostPropagation::Private);
        assert_eq!(propagation("/top/x"), HostPropagation::Slave, "the upper of two mounts");
        let (mode, v1) = cgroup_mode(&table);
        assert_eq!(mode, CgroupMode::V1);
        assert_eq!(v1_controllers(&v1), ["cpu", "cpuacct"].map(str::to_owned).into());
    }

    #[test]
    fn cgroups_are_v1_v2_or_both() {
        let mode = |lines: &[(&str, &str)]| {
            let text: String = lines
                .iter()
                .map(|(target, kind)| format!("1 1 0:1 / {target} rw - {kind} x rw,memory\n"))
                .collect();
            cgroup_mode(&parse_mountinfo(text.as_bytes())).0
        };
        let (v1, v2) = (("/sys/fs/cgroup/memory", "cgroup"), ("/sys/fs/cgroup", "cgroup2"));
        assert_eq!(mode(&[v1]), CgroupMode::V1);
        assert_eq!(mode(&[v2]), CgroupMode::V2);
        assert_eq!(mode(&[v1, ("/sys/fs/cgroup/unified", "cgroup2")]), CgroupMode::Hybrid);
        assert_eq!(mode(&[v2, ("/tmp/hugetlb", "cgroup")]), CgroupMode::V2);
        assert_eq!(mode(&[v1, ("/mnt/v2", "cgroup2")]), CgroupMode::V1);
    }

    #[test]
    fn small_files_of_the_kernel() {
        assert_eq!(kernel_version("6.18.44-fc\n"), Some((6, 18)));
        assert_eq!(kernel_version("5.10-rc1"), Some((5, 10)));
        assert_eq!(kernel_version("linux"), None);
        assert_eq!(status_field("Name:\tx\nCapBnd:\t00ff\n", "CapBnd"), Some("00ff"));
        assert_eq!(status_field("Seccomp_filters:\t0\n", "Seccomp"), None);
        let profiles = parse_apparmor_profiles("a b (enforce)\n/usr/bin/x (complain)\n");
        assert_eq!(profiles, ["/usr/bin/x", "a b"].map(str::to_owned).into());
    }

    #[test]
    fn selinux_contexts_come_from_the_loaded_policy() {
        let dir = tempfile::tempdir().unwrap();
        let (fs_dir, etc) = (dir.path().join("fs"), dir.path().join("etc"));
        fs::create_dir_all(&fs_dir).unwrap();
        assert_eq!(selinux_contexts(&fs_dir, &etc), None);
        fs::write(fs_dir.join("enforce"), "1").unwrap();
        fs::create_dir_all(etc.join("mls/contexts")).unwrap();
        fs::write(etc.join("config"), "SELINUX=enforcing\nSELINUXTYPE=mls\n").unwrap();
        fs::write(
            etc.join("mls/contexts/lxc_contexts"),
            "process = \"system_u:system_r:svirt_t:s0\"\nfile = \"a:b:c:s0\"\n",
        )
        .unwrap();
        let contexts = selinux_contexts(&fs_dir, &etc).unwrap();
        assert_eq!(contexts.process, "system_u:system_r:svirt_t:s0");
        assert_eq!(contexts.file, "a:b:c:s0");
    }

    #[test]
    fn this_node_is_understood() {
        let node = Node::discover().unwrap();
        assert_eq!(node.capabilities.grantable & !node.capabilities.known, 0);
        assert_eq!(node.capabilities.effective & !node.capabilities.known, 0);
        assert!(!node.hostname.is_empty());
        assert!(node.nofile.0 <= node.nofile.1);
    }

    fn mount(host: &Path) -> Mount {
        Mount { host_path: host.to_str().unwrap().into(), ..Mount::default() }
    }

    #[test]
    fn missing_sources_are_made_links_resolved_and_a_failure_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        fs::create_dir(root.join("real")).unwrap();
        std::os::unix::fs::symlink("real", root.join("link")).unwrap();
        let mut config = ContainerConfig {
            mounts: vec![mount(&root.join("link")), mount(&root.join("link/new/deep"))],
            ..ContainerConfig::default()
        };
        let facts = gather(&config).unwrap();
        assert_eq!(facts.mounts[0].source.as_deref(), Some(&*root.join("real")));
        assert_eq!(facts.mounts[1].source.as_deref(), Some(&*root.join("real/new/deep")));
        assert_eq!(facts.created, [root.join("link/new"), root.join("link/new/deep")]);
        remove_created(&facts.created);
        assert!(!root.join("real/new").exists());

        fs::write(root.join("file"), "").unwrap();
        config.mounts.push(mount(&root.join("file/below")));
        let error = gather(&config).unwrap_err();
        assert_eq!(error.kind(), Kind::Precondition);
        assert!(error.to_string().starts_with("mounts[2].host_path /"), "{error}");
        assert!(!root.join("real/new").exists(), "what was made is removed");

        std::os::unix::fs::symlink("nowhere", root.join("dangling")).unwrap();
        config.mounts = vec![mount(&root.join("dangling"))];
        assert!(gather(&config).is_err());
    }

    #[test]
    fn devices_are_found_alone_and_in_directories() {
        let mut config = ContainerConfig {
            devices: vec![Device {
                container_path: "/dev/nothing".into(),
                host_path: "/dev/null".into(),
                permissions: "rw".into(),
            }],
            security: Security { privileged: true, ..Security::default() },
            ..ContainerConfig::default()
        };
        let facts = gather(&config).unwrap();
        let node = &facts.devices[0][0];
        assert_eq!((node.major, node.minor, node.block), (1, 3, false));
        assert_eq!(node.path, Path::new("/dev/nothing"));
        assert!(facts.host_devices.iter().any(|node| node.path == Path::new("/dev/zero")));
        assert!(!facts.host_devices.iter().any(|node| node.path.starts_with("/dev/pts")));

        let dir = tempfile::tempdir().unwrap();
        config.devices[0].host_path = dir.path().to_str().unwrap().into();
        let error = gather(&config).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
        config.devices[0].host_path = dir.path().join("missing").to_str().unwrap().into();
        assert_eq!(gather(&config).unwrap_err().kind(), Kind::Precondition);
    }

    proptest! {
        #[test]
        fn no_mount_table_panics(text: Vec<u8>) {
            parse_mountinfo(&text);
        }

        #[test]
        fn unescape_undoes_the_kernels_escapes(path: Vec<u8>) {
            let escaped: Vec<u8> = path.iter().flat_map(|byte| match byte {
                b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
                other => vec![*other],
            }).collect();
            prop_assert_eq!(unescape(&escaped), path);
        }
    }
}

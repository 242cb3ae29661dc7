//! Mounts: what every container has, what its pod gives it, and what the CRI asks for.

use std::{
    collections::BTreeSet,
    path::{Component, Path, PathBuf},
};

use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, Mount as OciMount};

use super::{Error, Input};
use crate::{
    node::{HostPropagation, MountFacts},
    pod::config::{ContainerConfig, IdMapping, Mount, PodRef, Propagation},
};

/// A container's mounts, and what they need of the root.
pub(super) struct Mounts {
    /// In the order of mounting.
    pub(super) list: Vec<OciMount>,
    /// `linux.rootfsPropagation`: the runtime's default (rprivate) would cut off a mount that is to
    /// see the host's changes.
    pub(super) rootfs_propagation: Option<&'static str>,
    /// A mount has id mappings: words of OCI 1.1.
    pub(super) id_mapped: bool,
}

/// Everything the container mounts, parents before what lies below them.
pub(super) fn all(input: &Input<'_>) -> Result<Mounts, Error> {
    let mut out = Mounts { list: Vec::new(), rootfs_propagation: None, id_mapped: false };
    let mut asked = Vec::new();
    for (index, mount) in input.container.mounts.iter().enumerate() {
        let facts = input.host.mounts.get(index).cloned().unwrap_or_default();
        asked.push(out.bind(input, index, mount, &facts)?);
    }
    let targets: BTreeSet<PathBuf> =
        asked.iter().map(|mount| mount.destination().clone()).collect();
    let covered = |path: &Path| {
        // Whoever brings his own /dev brings what is in it.
        targets.contains(path) || (path.starts_with("/dev") && targets.contains(Path::new("/dev")))
    };
    let volumes = input.image_volumes.iter().map(|volume| {
        let target = clean(&volume.target);
        plain_bind(&volume.source, target, &["rbind", "rprivate", "rw"])
    });
    out.list = base(input).into_iter().chain(volumes).chain(files(input)).collect();
    out.list.retain(|mount| !covered(mount.destination()));
    out.list.append(&mut asked);
    // Of two mounts at one place the later one would be seen: the earlier one is left out.
    let mut seen = BTreeSet::new();
    out.list.reverse();
    out.list.retain(|mount| seen.insert(mount.destination().clone()));
    out.list.reverse();
    out.list.sort_by_key(|mount| mount.destination().components().count());
    Ok(out)
}

/// What can be said of the mounts without a look at the host.
pub(super) fn check(pod: &PodRef<'_>, container: &ContainerConfig) -> Result<(), Error> {
    for (index, mount) in container.mounts.iter().enumerate() {
        let refuse = |field: &str, reason: String| {
            Err(Error::invalid(format!("mounts[{index}]{field}"), reason))
        };
        let target = &mount.container_path;
        if !target.starts_with('/') || target.contains('\0') {
            return refuse(".container_path", format!("{target:?} is not an absolute path"));
        }
        if clean(target) == Path::new("/") {
            return refuse(".container_path", "it cannot be the root itself".to_owned());
        }
        match (&mount.image, mount.host_path.as_str()) {
            (Some(_), "") => {}
            (Some(_), _) => {
                return refuse("", "it has both an image and a host_path".to_owned());
            }
            (None, path) if !path.starts_with('/') || path.contains('\0') => {
                return refuse(".host_path", format!("{path:?} is not an absolute path"));
            }
            (None, _) => {}
        }
        if mount.image.is_some() && !mount.readonly {
            return refuse(".readonly", "an image can be mounted read-only only".to_owned());
        }
        if mount.image.is_some() && mount.propagation != Propagation::Private {
            return refuse(".propagation", "an image's mount has no propagation".to_owned());
        }
        if mount.recursive_read_only {
            if !mount.readonly {
                return refuse(".recursive_read_only", "it needs readonly as well".to_owned());
            }
            if mount.propagation != Propagation::Private {
                return refuse(
                    ".recursive_read_only",
                    "it needs private propagation: a mount that comes later could not be made read-only"
                        .to_owned(),
                );
            }
        }
        if mount.image.is_some() {
            let parts = Path::new(&mount.image_sub_path).components();
            if mount.image_sub_path.contains('\0')
                || parts.into_iter().any(|p| !matches!(p, Component::Normal(_) | Component::CurDir))
            {
                let reason = format!(
                    "{:?} is not a path below the image's root, without \"..\"",
                    mount.image_sub_path
                );
                return refuse(".image_sub_path", reason);
            }
            let user = pod.config.namespaces.user.as_ref();
            let (uids, gids) =
                user.map_or((&[][..], &[][..]), |user| (&user.uids[..], &user.gids[..]));
            if (!mount.uid_mappings.is_empty() && mount.uid_mappings != uids)
                || (!mount.gid_mappings.is_empty() && mount.gid_mappings != gids)
            {
                return refuse(
                    ".uid_mappings",
                    "an image can be mounted with the pod's own mappings only".to_owned(),
                );
            }
        }
        if mount.uid_mappings.is_empty() != mount.gid_mappings.is_empty() {
            return refuse("", "uid_mappings and gid_mappings must be given together".to_owned());
        }
        for option in &mount.options {
            if !OPTIONS.contains(&option.as_str()) {
                return refuse(
                    ".mount_options",
                    format!("{option:?} is not one of {}", OPTIONS.join(", ")),
                );
            }
        }
        if let Some(option) = mount.options.iter().find(|o| mount.options.contains(&opposite(o))) {
            return refuse(
                ".mount_options",
                format!("{option:?} and {:?} exclude each other", opposite(option)),
            );
        }
    }
    Ok(())
}

/// Options of a bind mount that a CRI client may add. What has a field of its own (ro,
/// propagation) or would make it another mount is not among them.
const OPTIONS: [&str; 16] = [
    "atime",
    "dev",
    "diratime",
    "exec",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "relatime",
    "strictatime",
    "suid",
    "symfollow",
];

fn opposite(option: &str) -> String {
    match option.strip_prefix("no") {
        Some(positive) => positive.to_owned(),
        None => format!("no{option}"),
    }
}

impl Mounts {
    /// A mount of the CRI's. [`check`] has passed it.
    fn bind(
        &mut self,
        input: &Input<'_>,
        index: usize,
        mount: &Mount,
        facts: &MountFacts,
    ) -> Result<OciMount, Error> {
        let lacking =
            |field: &str, lacks: String| Error::lacking(format!("mounts[{index}].{field}"), lacks);
        let source = match (&facts.source, &mount.image) {
            (Some(source), _) => source.clone(),
            (None, None) => PathBuf::from(&mount.host_path),
            (None, Some(image)) => {
                return Err(lacking(
                    "image",
                    format!("image {image:?} is not mounted on this node"),
                ));
            }
        };
        let mut options = vec!["rbind"];
        let on = || source.display().to_string();
        match (mount.propagation, facts.propagation) {
            (Propagation::Private, _) => options.push("rprivate"),
            (Propagation::HostToContainer, HostPropagation::Shared | HostPropagation::Slave) => {
                options.push("rslave");
                self.rootfs_propagation.get_or_insert("rslave");
            }
            (Propagation::Bidirectional, HostPropagation::Shared) => {
                options.push("rshared");
                self.rootfs_propagation = Some("rshared");
            }
            (Propagation::HostToContainer, HostPropagation::Private) => {
                return Err(lacking(
                    "propagation",
                    format!("{} is not on a shared or slave mount of the host", on()),
                ));
            }
            (Propagation::Bidirectional, _) => {
                return Err(lacking(
                    "propagation",
                    format!("{} is not on a shared mount of the host", on()),
                ));
            }
        }
        if mount.recursive_read_only {
            if !input.features.recursive_read_only(input.node) {
                return Err(lacking(
                    "recursive_read_only",
                    "it needs Linux 5.12 and an OCI runtime that knows rro".to_owned(),
                ));
            }
            options.push("rro");
        } else {
            options.push(if mount.readonly { "ro" } else { "rw" });
        }
        if mount.image.is_some() {
            // Its programs may be run (KEP-4639), but nobody becomes another by it.
            options.extend(["nosuid", "nodev"]);
        }
        for option in &mount.options {
            // A runtime takes what it does not know as data for the file system, which fails late.
            if !input.features.knows_mount_option(option) {
                return Err(lacking(
                    "mount_options",
                    format!("the OCI runtime does not know {option:?}"),
                ));
            }
            if !options.contains(&option.as_str()) {
                options.push(option);
            }
        }
        let mut out = plain_bind(&source, clean(&mount.container_path), &options);
        // An image is mounted with the pod's mappings already.
        if !mount.uid_mappings.is_empty() && mount.image.is_none() {
            if !input.features.idmap {
                return Err(lacking(
                    "uid_mappings",
                    "the OCI runtime does not support id-mapped mounts".to_owned(),
                ));
            }
            self.id_mapped = true;
            if input.features.mount_options.contains("ridmap")
                && let Some(options) = out.options_mut()
            {
                options.push("ridmap".to_owned());
            }
            out.set_uid_mappings(Some(mappings(&mount.uid_mappings)))
                .set_gid_mappings(Some(mappings(&mount.gid_mappings)));
        }
        Ok(out)
    }
}

/// What every container has.
fn base(input: &Input<'_>) -> Vec<OciMount> {
    let privileged = input.container.security.privileged;
    let access = if privileged { "rw" } else { "ro" };
    let user = input.pod.config.namespaces.user.as_ref();
    // In a user namespace the group "tty" is there only if it is mapped.
    let tty = user.is_none_or(|user| {
        user.gids.iter().any(|range| {
            (range.container_id..range.container_id.saturating_add(range.length)).contains(&5)
        })
    });
    let mut pts = vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"];
    pts.extend(tty.then_some("gid=5"));
    let mut list = vec![
        pseudo("proc", "proc", "/proc", &["nosuid", "noexec", "nodev"]),
        pseudo("tmpfs", "tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        pseudo("devpts", "devpts", "/dev/pts", &pts),
    ];
    // Mounting these needs to own the namespace that they show: a pod with a user namespace and the
    // node's network or IPC does not.
    list.push(if user.is_some() && input.namespaces.ipc.is_none() {
        plain_bind(
            Path::new("/dev/mqueue"),
            "/dev/mqueue".into(),
            &["rbind", "nosuid", "noexec", "nodev"],
        )
    } else {
        pseudo("mqueue", "mqueue", "/dev/mqueue", &["nosuid", "noexec", "nodev"])
    });
    list.push(if user.is_some() && input.namespaces.net.is_none() {
        // The node's whole /sys comes with its submounts: those are to be read-only as well.
        let access = match access {
            "ro" if input.features.recursive_read_only(input.node) => "rro",
            other => other,
        };
        let options = ["rbind", "rprivate", "nosuid", "noexec", "nodev", access];
        plain_bind(Path::new("/sys"), "/sys".into(), &options)
    } else {
        pseudo("sysfs", "sysfs", "/sys", &["nosuid", "noexec", "nodev", access])
    });
    let cgroup = ["nosuid", "noexec", "nodev", "relatime", access];
    list.push(pseudo("cgroup", "cgroup", "/sys/fs/cgroup", &cgroup));
    list
}

/// What the pod gives to each of its containers.
fn files<'a>(input: &'a Input<'a>) -> impl Iterator<Item = OciMount> + 'a {
    let access = if input.container.security.readonly_rootfs { "ro" } else { "rw" };
    let etc = [
        ("/etc/hostname", &input.files.hostname),
        ("/etc/hosts", &input.files.hosts),
        ("/etc/resolv.conf", &input.files.resolv_conf),
    ];
    let etc = etc.into_iter().filter_map(move |(target, source)| {
        let source = source.as_deref()?;
        Some(plain_bind(source, target.into(), &["rbind", "rprivate", access]))
    });
    let shm = match (&input.namespaces.ipc, input.files.shm.as_deref()) {
        (_, Some(source)) => plain_bind(source, "/dev/shm".into(), &["rbind", "rprivate", "rw"]),
        (None, None) => {
            plain_bind(Path::new("/dev/shm"), "/dev/shm".into(), &["rbind", "rprivate", "rw"])
        }
        (Some(_), None) => pseudo(
            "tmpfs",
            "shm",
            "/dev/shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
    };
    etc.chain([shm])
}

fn pseudo(kind: &str, source: &str, target: &str, options: &[&str]) -> OciMount {
    let mut out = OciMount::default();
    out.set_destination(target.into())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(source.into()))
        .set_options(Some(options.iter().map(|option| (*option).to_owned()).collect()));
    out
}

fn plain_bind(source: &Path, target: PathBuf, options: &[&str]) -> OciMount {
    let mut out = OciMount::default();
    out.set_destination(target)
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(source.to_owned()))
        .set_options(Some(options.iter().map(|option| (*option).to_owned()).collect()));
    out
}

/// Mappings in the spec's words.
pub(super) fn mappings(ranges: &[IdMapping]) -> Vec<LinuxIdMapping> {
    ranges
        .iter()
        .map(|range| {
            LinuxIdMappingBuilder::default()
                .host_id(range.host_id)
                .container_id(range.container_id)
                .size(range.length)
                .build()
                .expect("every field has a default")
        })
        .collect()
}

/// The path without ".", ".." and doubled slashes, by its words alone: ".." above the root is the
/// root, as in a chroot.
pub fn clean(path: &str) -> PathBuf {
    let mut out = PathBuf::from("/");
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => {
                out.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    out
}

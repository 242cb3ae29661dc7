//! CDI, the Container Device Interface (specification 1.1.0, cncf-tags/container-device-interface):
//! vendors describe in files what a container needs to use a device of theirs, and a container names
//! devices as `vendor.com/class=device`.
//!
//! This module owns the files: finding, checking and keeping them. What they change in a spec is
//! put there by [`apply`]. Files are looked at when a container names a device: one `stat` each, and
//! one reading for each that has changed. So an installed driver counts at once, and a node without
//! CDI pays nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use oci_spec::runtime::{
    Hook as OciHook, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxIntelRdt,
    Mount as OciMount, Spec,
};
use serde::Deserialize;
use tracing::warn;

use crate::{
    error::{Kind, Kinded},
    pod::config::ContainerConfig,
};

/// Annotations that name devices, as they were before the CRI had a field for them.
const ANNOTATION: &str = "cdi.k8s.io/";

/// Versions of the specification whose words are understood. All of them are read alike: a later one
/// only adds to an earlier one.
const VERSIONS: [&str; 10] =
    ["0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0"];

/// Largest file that is read. Those of GPU drivers have some tens of KiB.
const FILE_LIMIT: u64 = 4 << 20;

/// Why a container cannot have its devices.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What is named is no name of a device.
    #[error(
        "{field}: {name:?} is not the name of a CDI device: it must be VENDOR/CLASS=DEVICE, as in \"vendor.com/gpu=0\""
    )]
    Name {
        /// The CRI field or the annotation.
        field: String,
        /// What it says.
        name: String,
    },
    /// No file has it.
    #[error("no CDI device {name:?}: {}{}", looked_in(dirs), skipped(broken))]
    Unknown {
        /// The device.
        name: String,
        /// Where it was looked for.
        dirs: Vec<PathBuf>,
        /// Files there that are not valid: it may be in one of them.
        broken: Vec<String>,
    },
    /// Two files of one directory have it.
    #[error("CDI device {name:?} is defined twice: in {} and in {}", first.display(), second.display())]
    Conflict {
        /// The device.
        name: String,
        /// One of the files.
        first: PathBuf,
        /// The other one.
        second: PathBuf,
    },
    /// A device node that a file names.
    #[error("CDI device {name:?} needs {}", path.display())]
    Node {
        /// The device.
        name: String,
        /// The node's path on this node.
        path: PathBuf,
        /// Why it cannot be had.
        source: io::Error,
    },
    /// Words that no OCI runtime of ours would act on.
    #[error("CDI device {name:?} ({}) needs {what}, which is not supported", file.display())]
    Unsupported {
        /// The device.
        name: String,
        /// Its file.
        file: PathBuf,
        /// What it asks for.
        what: &'static str,
    },
}

fn looked_in(dirs: &[PathBuf]) -> String {
    let dirs: Vec<_> = dirs.iter().map(|dir| dir.display().to_string()).collect();
    format!("looked in {} (runtime.cdi_spec_dirs)", dirs.join(", "))
}

fn skipped(broken: &[String]) -> String {
    match broken {
        [] => String::new(),
        files => format!("; not valid there: {}", files.join("; ")),
    }
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Name { .. } => Kind::Invalid,
            Error::Unknown { .. }
            | Error::Conflict { .. }
            | Error::Node { .. }
            | Error::Unsupported { .. } => Kind::Precondition,
        }
    }
}

/// "vendor.com/class" and "device".
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    kind: String,
    device: String,
}

impl Name {
    fn parse(text: &str) -> Option<Self> {
        let (kind, device) = text.split_once('=')?;
        (is_kind(kind) && is_device(device))
            .then(|| Self { kind: kind.to_owned(), device: device.to_owned() })
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}={}", self.kind, self.device)
    }
}

/// `first`, then `rest`, and a letter or digit at the end.
fn is_word(text: &str, first: fn(u8) -> bool, rest: &[u8]) -> bool {
    let bytes = text.as_bytes();
    let ends = |byte: &u8| byte.is_ascii_alphanumeric();
    bytes.first().is_some_and(|byte| first(*byte))
        && bytes.last().is_some_and(ends)
        && bytes.iter().all(|byte| ends(byte) || rest.contains(byte))
}

fn is_kind(text: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_alphabetic();
    text.split_once('/').is_some_and(|(vendor, class)| {
        is_word(vendor, letter, b"_-.") && is_word(class, letter, b"_-")
    })
}

fn is_device(text: &str) -> bool {
    is_word(text, |byte| byte.is_ascii_alphanumeric(), b"_-.:")
}

/// The devices that a container names, in its field and in annotations, each once.
pub fn names(container: &ContainerConfig) -> Result<Vec<Name>, Error> {
    let mut found = Vec::new();
    let mut add = |field: &str, text: &str| {
        let name = Name::parse(text)
            .ok_or_else(|| Error::Name { field: field.to_owned(), name: text.to_owned() })?;
        if !found.contains(&name) {
            found.push(name);
        }
        Ok(())
    };
    for text in &container.cdi_devices {
        add("CDI_devices", text)?;
    }
    for (key, value) in &container.annotations {
        if key.starts_with(ANNOTATION) {
            for text in value.split(',') {
                add(&format!("annotation {key}"), text.trim())?;
            }
        }
    }
    Ok(found)
}

/// The files' devices. Shared by all containers.
#[derive(Debug)]
pub struct Devices {
    dirs: Vec<PathBuf>,
    files: Mutex<BTreeMap<PathBuf, Kept>>,
}

#[derive(Clone, Debug)]
struct Kept {
    stamp: Stamp,
    file: Arc<Result<File, String>>,
}

/// What changes when a file does: inode, size, and time of change in nanoseconds.
type Stamp = (u64, u64, i64, i64);

/// A file, and what is in it or why it is not valid.
type Found = (PathBuf, Arc<Result<File, String>>);

/// What devices change in a spec.
#[derive(Debug, Default)]
pub struct Edits {
    env: Vec<(String, String)>,
    nodes: Vec<(LinuxDevice, String)>,
    mounts: Vec<OciMount>,
    hooks: Vec<(HookName, OciHook)>,
    gids: Vec<u32>,
    rdt: Option<LinuxIntelRdt>,
}

impl Devices {
    /// Those of the files in `dirs`; a later directory goes before an earlier one.
    pub fn new(dirs: Vec<PathBuf>) -> Self {
        Self { dirs, files: Mutex::default() }
    }

    /// What the named devices change. Blocks for file reads.
    pub fn edits(&self, names: &[Name]) -> Result<Edits, Error> {
        let mut edits = Edits::default();
        if names.is_empty() {
            return Ok(edits);
        }
        let dirs = self.scan();
        let mut used = BTreeSet::new();
        for name in names {
            let (path, file) = self.find(name, &dirs)?;
            // What a file says of all its devices is taken once, before the first of them.
            if used.insert(path) {
                edits.add(name, path, &file.container_edits)?;
            }
            let device = file.devices.iter().find(|device| device.name == name.device);
            let device = device.expect("`find` found the device in the file");
            edits.add(name, path, &device.container_edits)?;
        }
        Ok(edits)
    }

    fn find<'a>(&self, name: &Name, dirs: &'a [Vec<Found>]) -> Result<(&'a Path, &'a File), Error> {
        for dir in dirs.iter().rev() {
            let mut found = dir.iter().filter_map(|(path, file)| match &**file {
                Ok(file) if file.has(name) => Some((path.as_path(), file)),
                _ => None,
            });
            match (found.next(), found.next()) {
                (None, _) => {}
                (Some(one), None) => return Ok(one),
                (Some(first), Some(second)) => {
                    return Err(Error::Conflict {
                        name: name.to_string(),
                        first: first.0.to_owned(),
                        second: second.0.to_owned(),
                    });
                }
            }
        }
        let broken = dirs.iter().flatten().filter_map(|(path, file)| match &**file {
            Err(why) => Some(format!("{}: {why}", path.display())),
            Ok(_) => None,
        });
        Err(Error::Unknown {
            name: name.to_string(),
            dirs: self.dirs.clone(),
            broken: broken.collect(),
        })
    }

    /// The files by directory, as they are now.
    fn scan(&self) -> Vec<Vec<Found>> {
        let mut kept = self.files.lock().unwrap_or_else(|e| e.into_inner());
        let mut seen = BTreeMap::new();
        let mut dirs = Vec::with_capacity(self.dirs.len());
        for dir in &self.dirs {
            let mut files = Vec::new();
            for path in spec_files(dir) {
                // It went meanwhile.
                let Ok(meta) = fs::metadata(&path) else { continue };
                let stamp = (meta.ino(), meta.size(), meta.ctime(), meta.ctime_nsec());
                let known = kept.get(&path).filter(|known| known.stamp == stamp).cloned();
                let entry = known.unwrap_or_else(|| {
                    let file = File::read(&path, meta.size());
                    if let Err(why) = &file {
                        warn!(file = %path.display(), why, "CDI file is not valid; its devices are not there");
                    }
                    Kept { stamp, file: Arc::new(file) }
                });
                files.push((path.clone(), entry.file.clone()));
                seen.insert(path, entry);
            }
            dirs.push(files);
        }
        *kept = seen;
        dirs
    }
}

/// Files of a directory that count, by name. A directory that is not there has none.
fn spec_files(dir: &Path) -> Vec<PathBuf> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                warn!(dir = %dir.display(), %error, "CDI directory cannot be read");
            }
            return Vec::new();
        }
    };
    let mut files: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "json" || e == "yaml"))
        .collect();
    files.sort();
    files
}

/// A specification.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    cdi_version: String,
    kind: String,
    #[serde(default, rename = "annotations")]
    _annotations: BTreeMap<String, String>,
    devices: Vec<Device>,
    #[serde(default)]
    container_edits: FileEdits,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Device {
    name: String,
    #[serde(default, rename = "annotations")]
    _annotations: BTreeMap<String, String>,
    container_edits: FileEdits,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct FileEdits {
    env: Vec<String>,
    device_nodes: Vec<DeviceNode>,
    net_devices: Vec<serde_json::Value>,
    hooks: Vec<Hook>,
    mounts: Vec<Mount>,
    intel_rdt: Option<LinuxIntelRdt>,
    #[serde(rename = "additionalGids", alias = "additionalGIDs")]
    additional_gids: Vec<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct DeviceNode {
    path: PathBuf,
    #[serde(default)]
    host_path: Option<PathBuf>,
    #[serde(default, rename = "type")]
    kind: String,
    major: Option<i64>,
    minor: Option<i64>,
    file_mode: Option<u32>,
    #[serde(default)]
    permissions: String,
    uid: Option<u32>,
    gid: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Mount {
    host_path: PathBuf,
    container_path: PathBuf,
    #[serde(default)]
    options: Vec<String>,
    #[serde(default, rename = "type")]
    kind: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Hook {
    hook_name: HookName,
    path: PathBuf,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    timeout: Option<i64>,
}

/// When a hook runs (OCI runtime-spec config.md, "POSIX-platform Hooks").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
enum HookName {
    Prestart,
    CreateRuntime,
    CreateContainer,
    StartContainer,
    Poststart,
    Poststop,
}

impl File {
    fn read(path: &Path, size: u64) -> Result<Self, String> {
        if size > FILE_LIMIT {
            return Err(format!("it has {size} bytes, more than {FILE_LIMIT}"));
        }
        let text = fs::read(path).map_err(|error| error.to_string())?;
        let file: File = match path.extension().is_some_and(|e| e == "json") {
            true => serde_json::from_slice(&text).map_err(|error| error.to_string())?,
            false => serde_yaml_ng::from_slice(&text).map_err(|error| error.to_string())?,
        };
        file.check()?;
        Ok(file)
    }

    fn has(&self, name: &Name) -> bool {
        self.kind == name.kind && self.devices.iter().any(|device| device.name == name.device)
    }

    fn check(&self) -> Result<(), String> {
        let version = self.cdi_version.trim_start_matches('v');
        if !VERSIONS.contains(&version) {
            let last = VERSIONS[VERSIONS.len() - 1];
            return Err(format!(
                "cdiVersion {:?} is unknown: up to {last} is read",
                self.cdi_version
            ));
        }
        if !is_kind(&self.kind) {
            return Err(format!("kind {:?} is not VENDOR/CLASS", self.kind));
        }
        if self.devices.is_empty() {
            return Err("it has no devices".to_owned());
        }
        self.container_edits.check()?;
        let mut seen = BTreeSet::new();
        for device in &self.devices {
            let name = &device.name;
            if !is_device(name) {
                return Err(format!("{name:?} is not a device's name"));
            }
            if !seen.insert(name) {
                return Err(format!("device {name:?} is there twice"));
            }
            device.container_edits.check().map_err(|why| format!("device {name:?}: {why}"))?;
        }
        Ok(())
    }
}

impl FileEdits {
    fn check(&self) -> Result<(), String> {
        let is_variable = |text: &&String| text.find('=').is_none_or(|at| at == 0);
        let envs = self.env.iter().chain(self.hooks.iter().flat_map(|hook| &hook.env));
        if let Some(bad) = envs.into_iter().find(is_variable) {
            return Err(format!("env {bad:?} is not NAME=VALUE"));
        }
        for node in &self.device_nodes {
            let path = node.path.display();
            if !node.path.is_absolute() || node.host_path.as_ref().is_some_and(|p| !p.is_absolute())
            {
                return Err(format!("device node {path} has a path that is not absolute"));
            }
            if !matches!(node.kind.as_str(), "" | "b" | "c" | "u" | "p") {
                return Err(format!(
                    "device node {path} has type {:?}: not b, c, u or p",
                    node.kind
                ));
            }
            if node.permissions.bytes().any(|byte| !b"rwm".contains(&byte)) {
                return Err(format!("device node {path} has permissions {:?}", node.permissions));
            }
        }
        for mount in &self.mounts {
            if !mount.container_path.is_absolute() {
                return Err(format!("mount {} is not absolute", mount.container_path.display()));
            }
        }
        for hook in &self.hooks {
            if !hook.path.is_absolute() {
                return Err(format!("hook {} is not absolute", hook.path.display()));
            }
        }
        Ok(())
    }
}

impl Edits {
    fn add(&mut self, name: &Name, file: &Path, edits: &FileEdits) -> Result<(), Error> {
        if !edits.net_devices.is_empty() {
            // An OCI runtime below 1.3 passes over what it does not know: the container would lack it.
            return Err(Error::Unsupported {
                name: name.to_string(),
                file: file.to_owned(),
                what: "netDevices",
            });
        }
        for pair in &edits.env {
            let (key, value) = pair.split_once('=').expect("checked when the file was read");
            self.env.retain(|(known, _)| known != key);
            self.env.push((key.to_owned(), value.to_owned()));
        }
        for node in &edits.device_nodes {
            let device = node.resolve().map_err(|(path, source)| Error::Node {
                name: name.to_string(),
                path,
                source,
            })?;
            self.nodes.retain(|(known, _)| known.path() != device.path());
            let access = if node.permissions.is_empty() { "rwm" } else { &node.permissions };
            self.nodes.push((device, access.to_owned()));
        }
        for mount in &edits.mounts {
            let mut options = mount.options.clone();
            if mount.kind.is_empty() && !options.iter().any(|o| o == "bind" || o == "rbind") {
                options.push("rbind".to_owned());
            }
            let mut out = OciMount::default();
            out.set_destination(mount.container_path.clone())
                .set_source(Some(mount.host_path.clone()))
                .set_typ((!mount.kind.is_empty()).then(|| mount.kind.clone()))
                .set_options(Some(options));
            self.mounts.retain(|known| known.destination() != out.destination());
            self.mounts.push(out);
        }
        for hook in &edits.hooks {
            let mut out = OciHook::default();
            out.set_path(hook.path.clone());
            out.set_args((!hook.args.is_empty()).then(|| hook.args.clone()));
            out.set_env((!hook.env.is_empty()).then(|| hook.env.clone()));
            out.set_timeout(hook.timeout);
            self.hooks.push((hook.hook_name, out));
        }
        self.gids.extend(edits.additional_gids.iter().filter(|gid| **gid != 0));
        if edits.intel_rdt.is_some() {
            self.rdt.clone_from(&edits.intel_rdt);
        }
        Ok(())
    }
}

impl DeviceNode {
    /// With what the file leaves out taken from the node on this host.
    fn resolve(&self) -> Result<LinuxDevice, (PathBuf, io::Error)> {
        let on_host = self.host_path.as_ref().unwrap_or(&self.path);
        let failed = |source| (on_host.clone(), source);
        let numbered = self.kind == "p" || (self.major.is_some() && self.minor.is_some());
        let mut device = LinuxDevice::default();
        let typ = |text: &str| match text {
            "b" => LinuxDeviceType::B,
            "u" => LinuxDeviceType::U,
            "p" => LinuxDeviceType::P,
            _ => LinuxDeviceType::C,
        };
        device.set_path(self.path.clone()).set_uid(self.uid).set_gid(self.gid);
        if !self.kind.is_empty() && numbered {
            device
                .set_typ(typ(&self.kind))
                .set_major(self.major.unwrap_or_default())
                .set_minor(self.minor.unwrap_or_default())
                .set_file_mode(self.file_mode);
            return Ok(device);
        }
        let meta = fs::metadata(on_host).map_err(failed)?;
        let kind = match meta.file_type() {
            kind if kind.is_block_device() => "b",
            kind if kind.is_char_device() => "c",
            kind if kind.is_fifo() => "p",
            _ => {
                let what = "it is not a device node";
                return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, what)));
            }
        };
        if !self.kind.is_empty() && typ(&self.kind) != typ(kind) && self.kind != "u" {
            let what = format!("it is a node of type {kind:?}, not {:?}", self.kind);
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, what)));
        }
        device
            .set_typ(typ(if self.kind.is_empty() { kind } else { &self.kind }))
            .set_major(self.major.unwrap_or_else(|| rustix::fs::major(meta.rdev()).into()))
            .set_minor(self.minor.unwrap_or_else(|| rustix::fs::minor(meta.rdev()).into()))
            .set_file_mode(Some(self.file_mode.unwrap_or(meta.mode() & 0o7777)));
        Ok(device)
    }
}

/// Puts the edits into a spec. What a device brings goes over what was there.
pub fn apply(spec: &mut Spec, edits: Edits) {
    let (mut uid, mut gid) = (0, 0);
    if let Some(process) = spec.process_mut() {
        let mut env = process.env().clone().unwrap_or_default();
        for (key, value) in &edits.env {
            let prefix = format!("{key}=");
            env.retain(|known| !known.starts_with(&prefix));
            env.push(format!("{prefix}{value}"));
        }
        process.set_env(Some(env));
        let user = process.user_mut();
        (uid, gid) = (user.uid(), user.gid());
        let mut gids = user.additional_gids().clone().unwrap_or_default();
        for gid in edits.gids {
            if !gids.contains(&gid) {
                gids.push(gid);
            }
        }
        user.set_additional_gids(Some(gids));
    }
    if let Some(linux) = spec.linux_mut() {
        let mut devices = linux.devices().clone().unwrap_or_default();
        let mut rules = Vec::new();
        for (mut device, access) in edits.nodes {
            // Without an owner of its own it belongs to who is to use it.
            if device.uid().is_none() && uid != 0 {
                device.set_uid(Some(uid));
            }
            if device.gid().is_none() && gid != 0 {
                device.set_gid(Some(gid));
            }
            if matches!(device.typ(), LinuxDeviceType::B | LinuxDeviceType::C) {
                let mut rule = LinuxDeviceCgroup::default();
                rule.set_allow(true)
                    .set_typ(Some(device.typ()))
                    .set_major(Some(device.major()))
                    .set_minor(Some(device.minor()))
                    .set_access(Some(access));
                rules.push(rule);
            }
            devices.retain(|known| known.path() != device.path());
            devices.push(device);
        }
        linux.set_devices((!devices.is_empty()).then_some(devices));
        if !rules.is_empty() {
            let mut resources = linux.resources().clone().unwrap_or_default();
            let mut all = resources.devices().clone().unwrap_or_default();
            all.append(&mut rules);
            resources.set_devices(Some(all));
            linux.set_resources(Some(resources));
        }
        if edits.rdt.is_some() {
            linux.set_intel_rdt(edits.rdt);
        }
    }
    if !edits.mounts.is_empty() {
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for mount in edits.mounts {
            mounts.retain(|known| known.destination() != mount.destination());
            mounts.push(mount);
        }
        // Stable: parents before what lies below them.
        mounts.sort_by_key(|mount| mount.destination().components().count());
        spec.set_mounts(Some(mounts));
    }
    if !edits.hooks.is_empty() {
        let mut hooks = spec.hooks().clone().unwrap_or_default();
        for (name, hook) in edits.hooks {
            let list = match name {
                HookName::Prestart => hooks.prestart_mut(),
                HookName::CreateRuntime => hooks.create_runtime_mut(),
                HookName::CreateContainer => hooks.create_container_mut(),
                HookName::StartContainer => hooks.start_container_mut(),
                HookName::Poststart => hooks.poststart_mut(),
                HookName::Poststop => hooks.poststop_mut(),
            };
            list.get_or_insert_with(Vec::new).push(hook);
        }
        spec.set_hooks(Some(hooks));
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{Linux, Process, User};
    use proptest::prelude::*;

    use super::*;
    use crate::error::chain;

    const GPU: &str = r#"
cdiVersion: 0.6.0
kind: vendor.com/gpu
containerEdits:
  env: ["ALL=1", "A=file"]
  hooks:
    - {hookName: createContainer, path: /bin/hook, args: [hook, x], env: [K=V], timeout: 3}
devices:
  - name: "0"
    containerEdits:
      env: ["A=device"]
      deviceNodes:
        - {path: /dev/gpu0, hostPath: /dev/null, permissions: rw}
        - {path: /dev/made, type: c, major: 1, minor: 5, fileMode: 0o640, uid: 7}
      mounts:
        - {hostPath: /usr, containerPath: /opt/gpu/lib, options: [ro, bind]}
        - {hostPath: /usr, containerPath: /opt, options: [ro]}
      additionalGids: [0, 44]
      intelRdt: {closID: fast}
  - name: all:x
    containerEdits: {env: ["B=2"]}
"#;

    struct Dirs {
        _tmp: tempfile::TempDir,
        low: PathBuf,
        high: PathBuf,
        devices: Devices,
    }

    fn dirs() -> Dirs {
        let tmp = tempfile::tempdir().unwrap();
        let (low, high) = (tmp.path().join("low"), tmp.path().join("high"));
        fs::create_dir(&low).unwrap();
        let devices = Devices::new(vec![low.clone(), high.clone()]);
        Dirs { _tmp: tmp, low, high, devices }
    }

    fn named(texts: &[&str]) -> Vec<Name> {
        texts.iter().map(|text| Name::parse(text).unwrap()).collect()
    }

    fn spec(uid: u32) -> Spec {
        let mut user = User::default();
        user.set_uid(uid).set_gid(uid).set_additional_gids(Some(vec![uid]));
        let mut process = Process::default();
        process.set_env(Some(vec!["A=image".into(), "PATH=/bin".into()])).set_user(user);
        let mut spec = Spec::default();
        spec.set_process(Some(process)).set_linux(Some(Linux::default())).set_mounts(Some(vec![]));
        spec
    }

    #[test]
    fn a_device_is_all_that_its_file_says() {
        let dirs = dirs();
        fs::write(dirs.low.join("gpu.yaml"), GPU).unwrap();
        let names = named(&["vendor.com/gpu=0", "vendor.com/gpu=all:x"]);
        let mut spec = spec(1000);
        apply(&mut spec, dirs.devices.edits(&names).unwrap());
        let process = spec.process().as_ref().unwrap();
        let env = process.env().as_ref().unwrap().join(" ");
        assert_eq!(env, "PATH=/bin ALL=1 A=device B=2");
        assert_eq!(process.user().additional_gids().as_ref().unwrap(), &[1000, 44]);
        let linux = spec.linux().as_ref().unwrap();
        let devices = linux.devices().as_ref().unwrap();
        let of = |d: &LinuxDevice| (d.major(), d.minor(), d.uid(), d.gid(), d.file_mode());
        assert_eq!(of(&devices[0]), (1, 3, Some(1000), Some(1000), Some(0o666)));
        assert_eq!(of(&devices[1]), (1, 5, Some(7), Some(1000), Some(0o640)));
        let rules = linux.resources().as_ref().unwrap().devices().as_ref().unwrap();
        assert_eq!(rules[0].access().as_deref(), Some("rw"));
        assert_eq!(rules[1].access().as_deref(), Some("rwm"));
        let rdt = linux.intel_rdt().as_ref().unwrap();
        assert_eq!(rdt.clos_id().as_deref(), Some("fast"));
        let mounts = spec.mounts().as_ref().unwrap();
        assert_eq!(mounts[0].destination(), Path::new("/opt"));
        assert_eq!(mounts[0].options().as_ref().unwrap(), &["ro", "rbind"]);
        assert_eq!(mounts[1].destination(), Path::new("/opt/gpu/lib"));
        // Once, though two devices of the file are used.
        let hooks = spec.hooks().as_ref().unwrap().create_container().as_ref().unwrap();
        assert_eq!((hooks.len(), hooks[0].timeout()), (1, Some(3)));
    }

    #[test]
    fn a_later_directory_wins_and_changes_are_seen() {
        let dirs = dirs();
        let file = |value: &str| {
            format!(
                r#"{{"cdiVersion":"1.0.0","kind":"v.io/c","devices":[{{"name":"d","containerEdits":{{"env":["V={value}"]}}}}]}}"#
            )
        };
        let names = named(&["v.io/c=d"]);
        let value = || dirs.devices.edits(&names).unwrap().env[0].1.clone();
        fs::write(dirs.low.join("a.json"), file("low")).unwrap();
        assert_eq!(value(), "low");
        fs::create_dir(&dirs.high).unwrap();
        fs::write(dirs.high.join("z.json"), file("high")).unwrap();
        assert_eq!(value(), "high");
        fs::write(dirs.high.join("z.json"), file("other")).unwrap();
        assert_eq!(value(), "other");
        fs::write(dirs.high.join("y.json"), file("high")).unwrap();
        let error = dirs.devices.edits(&names).unwrap_err();
        assert!(matches!(error, Error::Conflict { .. }), "{error}");
        fs::remove_dir_all(&dirs.high).unwrap();
        assert_eq!(value(), "low");
        fs::remove_file(dirs.low.join("a.json")).unwrap();
        let error = dirs.devices.edits(&names).unwrap_err();
        assert_eq!(error.kind(), Kind::Precondition);
        let text = error.to_string();
        assert!(
            text.contains("v.io/c=d") && text.contains("low") && text.contains("high"),
            "{text}"
        );
    }

    #[test]
    fn a_file_that_is_not_valid_is_named_when_a_device_is_missing() {
        let dirs = dirs();
        let cases = [
            (
                r#"{"cdiVersion":"9.0.0","kind":"v/c","devices":[{"name":"d","containerEdits":{}}]}"#,
                "9.0.0",
            ),
            (
                r#"{"cdiVersion":"1.0.0","kind":"c","devices":[{"name":"d","containerEdits":{}}]}"#,
                "kind",
            ),
            (r#"{"cdiVersion":"1.0.0","kind":"v/c","devices":[]}"#, "no devices"),
            (
                r#"{"cdiVersion":"1.0.0","kind":"v/c","devices":[{"name":"d","containerEdits":{"env":["x"]}}]}"#,
                "env",
            ),
            (
                r#"{"cdiVersion":"1.0.0","kind":"v/c","devices":[{"name":"d","containerEdits":{"x":1}}]}"#,
                "unknown field",
            ),
            (
                r#"{"cdiVersion":"1.0.0","kind":"v/c","devices":[{"name":"d","containerEdits":{"hooks":[{"hookName":"no","path":"/x"}]}}]}"#,
                "unknown variant",
            ),
            (
                r#"{"cdiVersion":"1.0.0","kind":"v/c","devices":[{"name":"d","containerEdits":{"deviceNodes":[{"path":"/d","type":"x"}]}}]}"#,
                "type",
            ),
            ("{", "EOF"),
        ];
        for (text, part) in cases {
            fs::write(dirs.low.join("a.json"), text).unwrap();
            let error = dirs.devices.edits(&named(&["v/c=d"])).unwrap_err().to_string();
            assert!(error.contains("a.json") && error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn a_node_that_is_not_there_is_named() {
        let dirs = dirs();
        let text = r#"{"cdiVersion":"1.0.0","kind":"v/c","devices":[
            {"name":"gone","containerEdits":{"deviceNodes":[{"path":"/dev/no-such"}]}},
            {"name":"dir","containerEdits":{"deviceNodes":[{"path":"/dev"}]}},
            {"name":"net","containerEdits":{"netDevices":[{"hostInterfaceName":"eth7","name":"e"}]}}]}"#;
        fs::write(dirs.low.join("a.json"), text).unwrap();
        for (name, part) in
            [("gone", "/dev/no-such"), ("dir", "not a device node"), ("net", "netDevices")]
        {
            let error = dirs.devices.edits(&named(&[&format!("v/c={name}")])).unwrap_err();
            assert_eq!(error.kind(), Kind::Precondition);
            assert!(chain(&error).contains(part), "{}", chain(&error));
        }
    }

    #[test]
    fn names_come_from_the_field_and_from_annotations() {
        let container = ContainerConfig {
            cdi_devices: vec!["a.b/c=1".into(), "a.b/c=1".into()],
            annotations: [
                ("cdi.k8s.io/plugin".to_owned(), "a.b/c=2, a.b/c=1".to_owned()),
                ("other".to_owned(), "x".to_owned()),
            ]
            .into(),
            ..ContainerConfig::default()
        };
        assert_eq!(names(&container).unwrap(), named(&["a.b/c=1", "a.b/c=2"]));
        for bad in [
            "", "a", "a/b", "a/b=", "/b=c", "a/=c", "1a/b=c", "a/b=c-", "a/b c=d", "a/b=c=d",
            "a/b=../x",
        ] {
            let container =
                ContainerConfig { cdi_devices: vec![bad.into()], ..ContainerConfig::default() };
            assert_eq!(names(&container).unwrap_err().kind(), Kind::Invalid, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_name_reads_back(text in "[a-z][a-z.]{0,5}[a-z]/[a-z]{1,5}=[a-z0-9]([a-z0-9:]{0,4}[a-z0-9])?") {
            prop_assert_eq!(Name::parse(&text).unwrap().to_string(), text);
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = Name::parse(&text);
            let _ = serde_yaml_ng::from_str::<File>(&text).map(|file| file.check());
        }
    }
}

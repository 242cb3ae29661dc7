//! What plugins make of a container that is about to be made: each one's adjustment is put into the
//! OCI spec, in the order of the plugins, so that the next one sees what those before it did.
//!
//! The spec is JSON here: its words go further than those of the types it is read into elsewhere.
//! Nothing that was asked for is left out in silence: a value that makes no sense, or one that the OCI
//! runtime does not know yet, is an error that names the plugin.

use holdfast_protos::nri::{
    ContainerAdjustment, Field, Hook, Hooks, IoPrioClass, KeyValue, LinuxContainerAdjustment,
    LinuxDevice, LinuxIoPriority, LinuxMemoryPolicy, LinuxNamespace, LinuxRdt, LinuxResources,
    LinuxScheduler, LinuxSchedulerFlag, LinuxSchedulerPolicy, LinuxSeccomp, Mount, MpolFlag,
    MpolMode, PosixRlimit,
};
use serde_json::{Map, Value, json};

use super::{
    limits::{claim_resources, merge_resources, overlay},
    owners::{Conflict, Owners},
};

/// Annotations that say what a container is, and of which pod.
const OURS: &str = "io.kubernetes.cri.";

/// Why an adjustment is not made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Two plugins want the same.
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// A value that makes no sense.
    #[error("NRI plugin {plugin:?}: {field}: {reason}")]
    Invalid {
        /// Who asks for it.
        plugin: String,
        /// Where in the adjustment.
        field: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// The node or the OCI runtime cannot do it.
    #[error("NRI plugin {plugin:?}: {field}: {lacks}")]
    Lacking {
        /// Who asks for it.
        plugin: String,
        /// Where in the adjustment.
        field: String,
        /// What is missing.
        lacks: String,
    },
}

/// What is known of who is to carry the spec out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Abilities {
    /// Highest version of the OCI runtime spec that the runtime takes; `None`: 1.0.
    pub oci_version: Option<(u32, u32)>,
    /// The node counts swap.
    pub swap: bool,
    /// The node's controllers are on cgroup version 2.
    pub unified: bool,
}

/// Something that is left for the caller, because it needs files of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// CDI devices by full name, each with the plugin that wants it.
    pub cdi_devices: Vec<(String, String)>,
    /// The class of block I/O and the plugin; an empty class: none.
    pub blockio_class: Option<(String, String)>,
    /// The class of RDT and the plugin; an empty class: none.
    pub rdt_class: Option<(String, String)>,
}

/// A container's spec while plugins adjust it.
#[derive(Debug)]
pub struct Draft {
    container: String,
    /// As it is now.
    pub spec: Value,
    /// Who set what, of this container and of those that are updated with it.
    pub owners: Owners,
    /// All adjustments as one, for validators.
    pub merged: ContainerAdjustment,
    /// What is left for the caller.
    pub wanted: Wanted,
    abilities: Abilities,
    /// Whether anything was changed.
    pub changed: bool,
}

/// A key without the mark that says "remove it", and whether it has the mark.
fn removal(key: &str) -> (&str, bool) {
    match key.strip_prefix('-') {
        Some(key) => (key, true),
        None => (key, false),
    }
}

pub(super) fn object(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().expect("just made one")
}

pub(super) fn array(value: &mut Value) -> &mut Vec<Value> {
    if !value.is_array() {
        *value = Value::Array(Vec::new());
    }
    value.as_array_mut().expect("just made one")
}

fn starts(value: &Value, prefix: &str) -> bool {
    value.as_str().is_some_and(|text| text.starts_with(prefix))
}

/// One plugin's turn.
struct Step<'a> {
    draft: &'a mut Draft,
    plugin: &'a str,
}

impl Draft {
    /// Of that container, as it would be without plugins.
    pub fn new(container: &str, spec: Value, abilities: Abilities) -> Self {
        Self {
            container: container.to_owned(),
            spec,
            owners: Owners::default(),
            merged: ContainerAdjustment::default(),
            wanted: Wanted::default(),
            abilities,
            changed: false,
        }
    }

    /// Puts in what `plugin` answered.
    ///
    /// # Errors
    /// The container cannot be made; the draft is of no use any more.
    pub fn adjust(&mut self, adjust: &ContainerAdjustment, plugin: &str) -> Result<(), Error> {
        if *adjust == ContainerAdjustment::default() {
            return Ok(());
        }
        self.changed = true;
        let mut step = Step { draft: self, plugin };
        step.annotations(adjust)?;
        step.mounts(&adjust.mounts)?;
        step.env(&adjust.env)?;
        step.args(&adjust.args)?;
        if let Some(hooks) = &adjust.hooks {
            step.hooks(hooks)?;
        }
        if let Some(linux) = &adjust.linux {
            step.linux(linux)?;
        }
        step.rlimits(&adjust.rlimits)?;
        for device in &adjust.cdi_devices {
            step.claim(Field::CdiDevices, Some(&device.name))?;
            let wanted = &mut step.draft.wanted.cdi_devices;
            wanted.push((device.name.clone(), plugin.to_owned()));
            step.draft.merged.cdi_devices.push(device.clone());
        }
        Ok(())
    }
}

impl Step<'_> {
    fn claim(&mut self, field: Field, key: Option<&str>) -> Result<(), Error> {
        Ok(self.draft.owners.claim(&self.draft.container, field, key, self.plugin)?)
    }

    /// Whether another plugin, or this one, has set it before.
    fn is_set(&self, field: Field, key: &str) -> bool {
        self.draft.owners.keys(&self.draft.container, field).iter().any(|(known, _)| *known == key)
    }

    /// Takes a key away: only what a plugin has set has an owner to be replaced.
    fn remove(&mut self, field: Field, key: &str) {
        if self.is_set(field, key) {
            self.draft.owners.remove(&self.draft.container, field, Some(key), self.plugin);
        }
    }

    fn invalid(&self, field: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Invalid {
            plugin: self.plugin.to_owned(),
            field: field.into(),
            reason: reason.into(),
        }
    }

    fn lacking(&self, field: impl Into<String>, lacks: impl Into<String>) -> Error {
        Error::Lacking { plugin: self.plugin.to_owned(), field: field.into(), lacks: lacks.into() }
    }

    /// Words that a runtime of an older version would pass over.
    fn needs(&mut self, field: &str, (major, minor): (u32, u32)) -> Result<(), Error> {
        let version = self.draft.abilities.oci_version;
        if version < Some((major, minor)) {
            let has = version.map_or("does not say what it takes".to_owned(), |(major, minor)| {
                format!("takes {major}.{minor}")
            });
            let lacks =
                format!("it needs an OCI runtime of version {major}.{minor}; the pod's {has}");
            return Err(self.lacking(field, lacks));
        }
        let spec = &mut self.draft.spec;
        let now = spec["ociVersion"].as_str().unwrap_or_default();
        let mut parts = now.split('.').map(|part| part.parse::<u32>().unwrap_or_default());
        if (parts.next().unwrap_or_default(), parts.next().unwrap_or_default()) < (major, minor) {
            spec["ociVersion"] = json!(format!("{major}.{minor}.0"));
        }
        Ok(())
    }

    fn process(&mut self) -> &mut Value {
        &mut self.draft.spec["process"]
    }

    fn merged_linux(&mut self) -> &mut LinuxContainerAdjustment {
        self.draft.merged.linux.get_or_insert_default()
    }

    fn annotations(&mut self, adjust: &ContainerAdjustment) -> Result<(), Error> {
        // Marks begin with "-", which sorts before what they are marks of.
        for (key, value) in &adjust.annotations {
            let (name, removed) = removal(key);
            if name.starts_with(OURS) {
                let reason = format!("{name} is the runtime's: shims find a container's pod by it");
                return Err(self.invalid("annotations", reason));
            }
            if removed {
                self.remove(Field::Annotations, name);
                object(&mut self.draft.spec["annotations"]).remove(name);
                self.draft.merged.annotations.remove(name);
            } else {
                self.claim(Field::Annotations, Some(name))?;
                object(&mut self.draft.spec["annotations"]).insert(name.to_owned(), json!(value));
                self.draft.merged.annotations.remove(&format!("-{name}"));
            }
            self.draft.merged.annotations.insert(key.clone(), value.clone());
        }
        Ok(())
    }

    fn mounts(&mut self, mounts: &[Mount]) -> Result<(), Error> {
        if mounts.is_empty() {
            return Ok(());
        }
        let at = |value: &Value, path: &str| {
            value["destination"].as_str().is_some_and(|known| clean(known) == clean(path))
        };
        let (removed, added): (Vec<_>, Vec<_>) =
            mounts.iter().partition(|mount| removal(&mount.destination).1);
        for mount in removed {
            let (path, _) = removal(&mount.destination);
            self.remove(Field::Mounts, path);
            array(&mut self.draft.spec["mounts"]).retain(|known| !at(known, path));
            self.draft.merged.mounts.retain(|known| known.destination != path);
            self.draft.merged.mounts.push(mount.clone());
        }
        for mount in added {
            let path = &mount.destination;
            if !path.starts_with('/') {
                let reason = format!("{path:?} is not an absolute path");
                return Err(self.invalid("mounts.destination", reason));
            }
            self.claim(Field::Mounts, Some(path))?;
            let mut new = json!({ "destination": path });
            for (key, text) in [("type", &mount.r#type), ("source", &mount.source)] {
                if !text.is_empty() {
                    new[key] = json!(text);
                }
            }
            if !mount.options.is_empty() {
                new["options"] = json!(mount.options);
            }
            let list = array(&mut self.draft.spec["mounts"]);
            list.retain(|known| !at(known, path));
            list.push(new);
            self.draft.merged.mounts.retain(|known| removal(&known.destination).0 != path);
            self.draft.merged.mounts.push(mount.clone());
            self.propagation(mount);
        }
        // Stable: parents before what lies below them.
        array(&mut self.draft.spec["mounts"]).sort_by_key(|mount| {
            mount["destination"].as_str().map_or(0, |path| clean(path).components().count())
        });
        Ok(())
    }

    /// A mount that shares with the host needs a root that does not cut it off.
    fn propagation(&mut self, mount: &Mount) {
        let root = &mut self.draft.spec["linux"]["rootfsPropagation"];
        for option in &mount.options {
            match (option.as_str(), root.as_str()) {
                ("rshared" | "shared", _) => *root = json!("rshared"),
                ("rslave" | "slave", Some("rshared" | "shared")) => {}
                ("rslave" | "slave", _) => *root = json!("rslave"),
                _ => {}
            }
        }
    }

    fn env(&mut self, env: &[KeyValue]) -> Result<(), Error> {
        let (removed, added): (Vec<_>, Vec<_>) = env.iter().partition(|var| removal(&var.key).1);
        for var in removed {
            let (name, _) = removal(&var.key);
            self.remove(Field::Env, name);
            let prefix = format!("{name}=");
            array(&mut self.process()["env"]).retain(|known| !starts(known, &prefix));
            self.draft.merged.env.retain(|known| known.key != name);
            self.draft.merged.env.push(var.clone());
        }
        for var in added {
            let (name, value) = (&var.key, &var.value);
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                let reason = format!("{name:?} is not a variable that a process can have");
                return Err(self.invalid("env", reason));
            }
            self.claim(Field::Env, Some(name))?;
            let prefix = format!("{name}=");
            let new = json!(format!("{prefix}{value}"));
            let list = array(&mut self.process()["env"]);
            // In its place, so that the order stays.
            match list.iter_mut().find(|known| starts(known, &prefix)) {
                Some(known) => *known = new,
                None => list.push(new),
            }
            self.draft.merged.env.retain(|known| removal(&known.key).0 != name);
            self.draft.merged.env.push(var.clone());
        }
        Ok(())
    }

    fn args(&mut self, args: &[String]) -> Result<(), Error> {
        let args = match args {
            [] => return Ok(()),
            [first, rest @ ..] if first.is_empty() => {
                self.draft.owners.remove(&self.draft.container, Field::Args, None, self.plugin);
                rest
            }
            args => args,
        };
        if args.is_empty() {
            return Err(self.invalid("args", "a container needs a command"));
        }
        self.claim(Field::Args, None)?;
        self.process()["args"] = json!(args);
        self.draft.merged.args = args.to_vec();
        Ok(())
    }

    fn hooks(&mut self, hooks: &Hooks) -> Result<(), Error> {
        let lists: [(&str, &[Hook]); 6] = [
            ("prestart", &hooks.prestart),
            ("createRuntime", &hooks.create_runtime),
            ("createContainer", &hooks.create_container),
            ("startContainer", &hooks.start_container),
            ("poststart", &hooks.poststart),
            ("poststop", &hooks.poststop),
        ];
        let mut any = false;
        for (name, list) in lists {
            for hook in list {
                if !hook.path.starts_with('/') {
                    let reason = format!("{:?} is not an absolute path", hook.path);
                    return Err(self.invalid(format!("hooks.{name}.path"), reason));
                }
                let mut new = json!({ "path": hook.path });
                if !hook.args.is_empty() {
                    new["args"] = json!(hook.args);
                }
                if !hook.env.is_empty() {
                    new["env"] = json!(hook.env);
                }
                match hook.timeout.map(|timeout| timeout.value) {
                    // The OCI spec wants more than 0.
                    Some(seconds) if seconds > 0 => new["timeout"] = json!(seconds),
                    _ => {}
                }
                array(&mut self.draft.spec["hooks"][name]).push(new);
                any = true;
            }
        }
        if any {
            self.draft.owners.add_hooks(&self.draft.container, self.plugin);
            let merged = self.draft.merged.hooks.get_or_insert_default();
            merged.prestart.extend_from_slice(&hooks.prestart);
            merged.create_runtime.extend_from_slice(&hooks.create_runtime);
            merged.create_container.extend_from_slice(&hooks.create_container);
            merged.start_container.extend_from_slice(&hooks.start_container);
            merged.poststart.extend_from_slice(&hooks.poststart);
            merged.poststop.extend_from_slice(&hooks.poststop);
        }
        Ok(())
    }

    fn linux(&mut self, linux: &LinuxContainerAdjustment) -> Result<(), Error> {
        self.devices(&linux.devices)?;
        if let Some(resources) = &linux.resources {
            self.resources(resources)?;
        }
        if !linux.cgroups_path.is_empty() {
            if linux.cgroups_path.split('/').any(|part| part == "..") {
                return Err(self.invalid("linux.cgroups_path", "it has a \"..\""));
            }
            self.claim(Field::CgroupsPath, None)?;
            self.draft.spec["linux"]["cgroupsPath"] = json!(linux.cgroups_path);
            self.merged_linux().cgroups_path = linux.cgroups_path.clone();
        }
        if let Some(score) = linux.oom_score_adj {
            if !(-1000..=1000).contains(&score.value) {
                let reason = format!("{} is not in -1000 to 1000", score.value);
                return Err(self.invalid("linux.oom_score_adj", reason));
            }
            self.claim(Field::OomScoreAdj, None)?;
            self.process()["oomScoreAdj"] = json!(score.value);
            self.merged_linux().oom_score_adj = Some(score);
        }
        if let Some(priority) = &linux.io_priority {
            self.io_priority(priority)?;
        }
        if let Some(policy) = &linux.seccomp_policy {
            self.seccomp(policy)?;
        }
        self.namespaces(&linux.namespaces)?;
        for (key, value) in &linux.sysctl {
            let (name, removed) = removal(key);
            if removed {
                self.remove(Field::Sysctl, name);
                object(&mut self.draft.spec["linux"]["sysctl"]).remove(name);
                self.merged_linux().sysctl.remove(name);
            } else {
                self.claim(Field::Sysctl, Some(name))?;
                object(&mut self.draft.spec["linux"]["sysctl"])
                    .insert(name.to_owned(), json!(value));
                self.merged_linux().sysctl.remove(&format!("-{name}"));
            }
            self.merged_linux().sysctl.insert(key.clone(), value.clone());
        }
        for (key, device) in &linux.net_devices {
            let (name, removed) = removal(key);
            if removed {
                self.remove(Field::LinuxNetDevices, name);
                object(&mut self.draft.spec["linux"]["netDevices"]).remove(name);
                self.merged_linux().net_devices.remove(name);
            } else {
                self.needs("linux.net_devices", (1, 3))?;
                self.claim(Field::LinuxNetDevices, Some(name))?;
                let new = match device.name.as_str() {
                    "" => json!({}),
                    inside => json!({ "name": inside }),
                };
                object(&mut self.draft.spec["linux"]["netDevices"]).insert(name.to_owned(), new);
                self.merged_linux().net_devices.remove(&format!("-{name}"));
            }
            self.merged_linux().net_devices.insert(key.clone(), device.clone());
        }
        if let Some(scheduler) = &linux.scheduler {
            self.scheduler(scheduler)?;
        }
        if let Some(rdt) = &linux.rdt {
            self.rdt(rdt)?;
        }
        if let Some(policy) = &linux.memory_policy {
            self.memory_policy(policy)?;
        }
        Ok(())
    }

    fn devices(&mut self, devices: &[LinuxDevice]) -> Result<(), Error> {
        let (removed, added): (Vec<_>, Vec<_>) =
            devices.iter().partition(|device| removal(&device.path).1);
        for device in removed {
            let (path, _) = removal(&device.path);
            self.remove(Field::Devices, path);
            array(&mut self.draft.spec["linux"]["devices"])
                .retain(|known| known["path"].as_str() != Some(path));
            let merged = &mut self.merged_linux().devices;
            merged.retain(|known| known.path != path);
            merged.push(device.clone());
        }
        for device in added {
            let path = &device.path;
            if !path.starts_with('/') || !["b", "c", "u", "p"].contains(&device.r#type.as_str()) {
                let reason = format!(
                    "{path:?} of type {:?} is not an absolute path and one of b, c, u and p",
                    device.r#type
                );
                return Err(self.invalid("linux.devices", reason));
            }
            self.claim(Field::Devices, Some(path))?;
            let mut new = json!({ "path": path, "type": device.r#type });
            if device.r#type != "p" {
                new["major"] = json!(device.major);
                new["minor"] = json!(device.minor);
            }
            for (key, value) in [
                ("fileMode", device.file_mode.map(|mode| mode.value)),
                ("uid", device.uid.map(|id| id.value)),
                ("gid", device.gid.map(|id| id.value)),
            ] {
                if let Some(value) = value {
                    new[key] = json!(value);
                }
            }
            let list = array(&mut self.draft.spec["linux"]["devices"]);
            list.retain(|known| known["path"].as_str() != Some(path.as_str()));
            list.push(new);
            if device.r#type != "p" {
                // What is of no use without the cgroup's leave.
                let kind = if device.r#type == "u" { "c" } else { device.r#type.as_str() };
                let rule = json!({
                    "allow": true, "type": kind, "access": "rwm",
                    "major": device.major, "minor": device.minor,
                });
                array(&mut self.draft.spec["linux"]["resources"]["devices"]).push(rule);
            }
            let merged = &mut self.merged_linux().devices;
            merged.retain(|known| removal(&known.path).0 != path);
            merged.push(device.clone());
        }
        Ok(())
    }

    fn namespaces(&mut self, namespaces: &[LinuxNamespace]) -> Result<(), Error> {
        const KINDS: [&str; 8] =
            ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"];
        for namespace in namespaces {
            let (kind, removed) = removal(&namespace.r#type);
            if !KINDS.contains(&kind) {
                let reason = format!("{kind:?} is not one of {}", KINDS.join(", "));
                return Err(self.invalid("linux.namespaces.type", reason));
            }
            self.claim(Field::Namespace, Some(kind))?;
            let list = array(&mut self.draft.spec["linux"]["namespaces"]);
            list.retain(|known| known["type"].as_str() != Some(kind));
            if !removed {
                let mut new = json!({ "type": kind });
                if !namespace.path.is_empty() {
                    new["path"] = json!(namespace.path);
                }
                list.push(new);
            }
            self.merged_linux().namespaces.push(namespace.clone());
        }
        Ok(())
    }

    fn resources(&mut self, resources: &LinuxResources) -> Result<(), Error> {
        let abilities = self.draft.abilities;
        if !resources.unified.is_empty() && !abilities.unified {
            let lacks = "it needs cgroup v2, and this node's controllers are on v1";
            return Err(self.lacking("linux.resources.unified", lacks));
        }
        let container = self.draft.container.clone();
        claim_resources(&mut self.draft.owners, &container, resources, self.plugin)?;
        overlay(&mut self.draft.spec["linux"]["resources"], resources, abilities.swap);
        for rule in &resources.devices {
            let mut new = json!({ "allow": rule.allow });
            for (key, text) in [("type", &rule.r#type), ("access", &rule.access)] {
                if !text.is_empty() {
                    new[key] = json!(text);
                }
            }
            for (key, number) in [("major", rule.major), ("minor", rule.minor)] {
                if let Some(number) = number {
                    new[key] = json!(number.value);
                }
            }
            array(&mut self.draft.spec["linux"]["resources"]["devices"]).push(new);
        }
        let by = |class: &str| (class.to_owned(), self.plugin.to_owned());
        if let Some(class) = &resources.blockio_class {
            self.draft.wanted.blockio_class = Some(by(&class.value));
        }
        if let Some(class) = &resources.rdt_class {
            self.draft.wanted.rdt_class = Some(by(&class.value));
        }
        let merged = self.merged_linux().resources.get_or_insert_default();
        merge_resources(merged, resources);
        Ok(())
    }

    fn io_priority(&mut self, priority: &LinuxIoPriority) -> Result<(), Error> {
        self.claim(Field::IoPriority, None)?;
        match IoPrioClass::try_from(priority.class) {
            Ok(IoPrioClass::IoprioClassNone) => {
                object(self.process()).remove("ioPriority");
            }
            Ok(class) if (0..=7).contains(&priority.priority) => {
                self.needs("linux.io_priority", (1, 1))?;
                self.process()["ioPriority"] =
                    json!({ "class": class.as_str_name(), "priority": priority.priority });
            }
            _ => {
                let reason = format!(
                    "class {} with priority {} is not one of the protocol's with 0 to 7",
                    priority.class, priority.priority
                );
                return Err(self.invalid("linux.io_priority", reason));
            }
        }
        self.merged_linux().io_priority = Some(*priority);
        Ok(())
    }

    fn scheduler(&mut self, scheduler: &LinuxScheduler) -> Result<(), Error> {
        self.claim(Field::LinuxSched, None)?;
        let unknown = |what: &str, number: i32| {
            self.invalid(format!("linux.scheduler.{what}"), format!("{number} is not known"))
        };
        let policy = LinuxSchedulerPolicy::try_from(scheduler.policy)
            .map_err(|_| unknown("policy", scheduler.policy))?;
        let flags = scheduler
            .flags
            .iter()
            .map(|flag| {
                let known = LinuxSchedulerFlag::try_from(*flag);
                Ok(known.map_err(|_| unknown("flags", *flag))?.as_str_name())
            })
            .collect::<Result<Vec<_>, Error>>()?;
        if policy == LinuxSchedulerPolicy::SchedNone {
            object(self.process()).remove("scheduler");
        } else {
            self.needs("linux.scheduler", (1, 1))?;
            let mut new = json!({ "policy": policy.as_str_name() });
            for (key, number) in [("nice", scheduler.nice), ("priority", scheduler.priority)] {
                if number != 0 {
                    new[key] = json!(number);
                }
            }
            for (key, number) in [
                ("runtime", scheduler.runtime),
                ("deadline", scheduler.deadline),
                ("period", scheduler.period),
            ] {
                if number != 0 {
                    new[key] = json!(number);
                }
            }
            if !flags.is_empty() {
                new["flags"] = json!(flags);
            }
            self.process()["scheduler"] = new;
        }
        self.merged_linux().scheduler = Some(scheduler.clone());
        Ok(())
    }

    fn seccomp(&mut self, policy: &LinuxSeccomp) -> Result<(), Error> {
        self.claim(Field::SeccompPolicy, None)?;
        let mut new = json!({ "defaultAction": policy.default_action });
        if let Some(errno) = policy.default_errno {
            new["defaultErrnoRet"] = json!(errno.value);
        }
        for (key, list) in [("architectures", &policy.architectures), ("flags", &policy.flags)] {
            if !list.is_empty() {
                new[key] = json!(list);
            }
        }
        for (key, text) in [
            ("listenerPath", &policy.listener_path),
            ("listenerMetadata", &policy.listener_metadata),
        ] {
            if !text.is_empty() {
                new[key] = json!(text);
            }
        }
        let calls = policy.syscalls.iter().map(|call| {
            let mut new = json!({ "names": call.names, "action": call.action });
            if let Some(errno) = call.errno_ret {
                new["errnoRet"] = json!(errno.value);
            }
            if !call.args.is_empty() {
                let args = call.args.iter().map(|arg| {
                    json!({ "index": arg.index, "value": arg.value, "valueTwo": arg.value_two,
                            "op": arg.op })
                });
                new["args"] = args.collect();
            }
            new
        });
        new["syscalls"] = calls.collect();
        self.draft.spec["linux"]["seccomp"] = new;
        self.merged_linux().seccomp_policy = Some(policy.clone());
        Ok(())
    }

    fn rdt(&mut self, rdt: &LinuxRdt) -> Result<(), Error> {
        const FIELDS: [Field; 3] =
            [Field::RdtClosId, Field::RdtSchemata, Field::RdtEnableMonitoring];
        let linux = object(&mut self.draft.spec["linux"]);
        if rdt.remove {
            linux.remove("intelRdt");
            for field in FIELDS {
                self.draft.owners.remove(&self.draft.container, field, None, self.plugin);
            }
            self.merged_linux().rdt = Some(LinuxRdt { remove: true, ..LinuxRdt::default() });
        }
        if let Some(id) = &rdt.clos_id {
            self.claim(Field::RdtClosId, None)?;
            self.draft.spec["linux"]["intelRdt"]["closID"] = json!(id.value);
            self.merged_linux().rdt.get_or_insert_default().clos_id = Some(id.clone());
        }
        if let Some(schemata) = &rdt.schemata {
            self.needs("linux.rdt.schemata", (1, 3))?;
            self.claim(Field::RdtSchemata, None)?;
            self.draft.spec["linux"]["intelRdt"]["schemata"] = json!(schemata.value);
            self.merged_linux().rdt.get_or_insert_default().schemata = Some(schemata.clone());
        }
        if let Some(enable) = rdt.enable_monitoring {
            self.needs("linux.rdt.enable_monitoring", (1, 3))?;
            self.claim(Field::RdtEnableMonitoring, None)?;
            self.draft.spec["linux"]["intelRdt"]["enableMonitoring"] = json!(enable.value);
            self.merged_linux().rdt.get_or_insert_default().enable_monitoring = Some(enable);
        }
        Ok(())
    }

    fn memory_policy(&mut self, policy: &LinuxMemoryPolicy) -> Result<(), Error> {
        self.needs("linux.memory_policy", (1, 3))?;
        self.claim(Field::MemoryPolicy, None)?;
        let unknown = |what: &str, number: i32| {
            self.invalid(format!("linux.memory_policy.{what}"), format!("{number} is not known"))
        };
        let mode = MpolMode::try_from(policy.mode).map_err(|_| unknown("mode", policy.mode))?;
        let mut new = json!({ "mode": mode.as_str_name() });
        if !policy.nodes.is_empty() {
            new["nodes"] = json!(policy.nodes);
        }
        let flags = policy
            .flags
            .iter()
            .map(|flag| {
                let known = MpolFlag::try_from(*flag);
                Ok(known.map_err(|_| unknown("flags", *flag))?.as_str_name())
            })
            .collect::<Result<Vec<_>, Error>>()?;
        if !flags.is_empty() {
            new["flags"] = json!(flags);
        }
        self.draft.spec["linux"]["memoryPolicy"] = new;
        self.merged_linux().memory_policy = Some(policy.clone());
        Ok(())
    }

    fn rlimits(&mut self, rlimits: &[PosixRlimit]) -> Result<(), Error> {
        for rlimit in rlimits {
            // "nofile", "NOFILE" and "RLIMIT_NOFILE" are one.
            let upper = rlimit.r#type.to_ascii_uppercase();
            let kind = match upper.strip_prefix("RLIMIT_") {
                Some(_) => upper,
                None => format!("RLIMIT_{upper}"),
            };
            if rlimit.soft > rlimit.hard {
                let reason = format!("{kind}: soft {} is above hard {}", rlimit.soft, rlimit.hard);
                return Err(self.invalid("rlimits", reason));
            }
            self.claim(Field::Rlimits, Some(&kind))?;
            let list = array(&mut self.process()["rlimits"]);
            list.retain(|known| known["type"].as_str() != Some(kind.as_str()));
            list.push(json!({ "type": kind, "hard": rlimit.hard, "soft": rlimit.soft }));
            self.draft.merged.rlimits.push(rlimit.clone());
        }
        Ok(())
    }
}

fn clean(path: &str) -> std::path::PathBuf {
    std::path::Path::new(path).components().collect()
}

#[cfg(test)]
mod tests;

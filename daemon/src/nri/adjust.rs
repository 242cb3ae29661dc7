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

use super::owners::{Conflict, Owners};

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

fn object(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().expect("just made one")
}

fn array(value: &mut Value) -> &mut Vec<Value> {
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

/// Claims every limit that `resources` gives.
pub fn claim_resources(
    owners: &mut Owners,
    container: &str,
    resources: &LinuxResources,
    plugin: &str,
) -> Result<(), Conflict> {
    let mut claim = |given: bool, field, key: Option<&str>| match given {
        true => owners.claim(container, field, key, plugin),
        false => Ok(()),
    };
    if let Some(memory) = &resources.memory {
        claim(memory.limit.is_some(), Field::MemLimit, None)?;
        claim(memory.reservation.is_some(), Field::MemReservation, None)?;
        claim(memory.swap.is_some(), Field::MemSwapLimit, None)?;
        claim(memory.kernel.is_some(), Field::MemKernelLimit, None)?;
        claim(memory.kernel_tcp.is_some(), Field::MemTcpLimit, None)?;
        claim(memory.swappiness.is_some(), Field::MemSwappiness, None)?;
        claim(memory.disable_oom_killer.is_some(), Field::MemDisableOomKiller, None)?;
        claim(memory.use_hierarchy.is_some(), Field::MemUseHierarchy, None)?;
    }
    if let Some(cpu) = &resources.cpu {
        claim(cpu.shares.is_some(), Field::CpuShares, None)?;
        claim(cpu.quota.is_some(), Field::CpuQuota, None)?;
        claim(cpu.period.is_some(), Field::CpuPeriod, None)?;
        claim(cpu.realtime_runtime.is_some(), Field::CpuRealtimeRuntime, None)?;
        claim(cpu.realtime_period.is_some(), Field::CpuRealtimePeriod, None)?;
        claim(!cpu.cpus.is_empty(), Field::CpuSetCpUs, None)?;
        claim(!cpu.mems.is_empty(), Field::CpuSetMems, None)?;
    }
    for limit in &resources.hugepage_limits {
        claim(true, Field::HugepageLimits, Some(&limit.page_size))?;
    }
    for key in resources.unified.keys() {
        claim(true, Field::CgroupsUnified, Some(key))?;
    }
    claim(resources.blockio_class.is_some(), Field::BlockioClass, None)?;
    claim(resources.rdt_class.is_some(), Field::RdtClass, None)?;
    claim(resources.pids.is_some(), Field::PidsLimit, None)
}

/// Puts the limits that `resources` gives over `linux.resources` of a spec. Without a word on swap, a
/// container that may not swap still may not: on a node that counts swap its limit moves along.
pub fn overlay(spec: &mut Value, resources: &LinuxResources, swap: bool) {
    let old = spec["memory"].clone();
    let mut put = |group: &str, key: &str, value: Option<Value>| {
        if let Some(value) = value {
            object(object(spec).entry(group).or_insert(Value::Null)).insert(key.into(), value);
        }
    };
    if let Some(memory) = &resources.memory {
        put("memory", "limit", memory.limit.map(|v| json!(v.value)));
        put("memory", "reservation", memory.reservation.map(|v| json!(v.value)));
        put("memory", "swap", memory.swap.map(|v| json!(v.value)));
        put("memory", "kernel", memory.kernel.map(|v| json!(v.value)));
        put("memory", "kernelTCP", memory.kernel_tcp.map(|v| json!(v.value)));
        put("memory", "swappiness", memory.swappiness.map(|v| json!(v.value)));
        put("memory", "disableOOMKiller", memory.disable_oom_killer.map(|v| json!(v.value)));
        put("memory", "useHierarchy", memory.use_hierarchy.map(|v| json!(v.value)));
        if let (Some(limit), None, true) = (memory.limit, memory.swap, swap) {
            // One that may swap keeps its own limit, as long as the kernel would take it.
            let may_swap = old["swap"].is_i64() && old["swap"] != old["limit"];
            let fits = old["swap"].as_i64().is_some_and(|s| s < 0 || s >= limit.value);
            if !(may_swap && fits) {
                put("memory", "swap", Some(json!(limit.value)));
            }
        }
    }
    if let Some(cpu) = &resources.cpu {
        let list = |text: &str| (!text.is_empty()).then(|| json!(text));
        put("cpu", "shares", cpu.shares.map(|v| json!(v.value)));
        put("cpu", "quota", cpu.quota.map(|v| json!(v.value)));
        put("cpu", "period", cpu.period.map(|v| json!(v.value)));
        put("cpu", "realtimeRuntime", cpu.realtime_runtime.map(|v| json!(v.value)));
        put("cpu", "realtimePeriod", cpu.realtime_period.map(|v| json!(v.value)));
        put("cpu", "cpus", list(&cpu.cpus));
        put("cpu", "mems", list(&cpu.mems));
    }
    // No limit is the absence of one: a runtime takes 0 as none at all, and -1 as "max".
    put("pids", "limit", resources.pids.map(|pids| json!(pids.limit)));
    for (key, value) in &resources.unified {
        put("unified", key, Some(json!(value)));
    }
    for limit in &resources.hugepage_limits {
        let list = array(object(spec).entry("hugepageLimits").or_insert(Value::Null));
        list.retain(|known| known["pageSize"].as_str() != Some(limit.page_size.as_str()));
        list.push(json!({ "pageSize": limit.page_size, "limit": limit.limit }));
    }
}

/// Puts what `over` gives over `base`.
pub fn merge_resources(base: &mut LinuxResources, over: &LinuxResources) {
    fn put<T: Clone>(base: &mut Option<T>, over: &Option<T>) {
        if over.is_some() {
            base.clone_from(over);
        }
    }
    if let Some(over) = &over.memory {
        let memory = base.memory.get_or_insert_default();
        put(&mut memory.limit, &over.limit);
        put(&mut memory.reservation, &over.reservation);
        put(&mut memory.swap, &over.swap);
        put(&mut memory.kernel, &over.kernel);
        put(&mut memory.kernel_tcp, &over.kernel_tcp);
        put(&mut memory.swappiness, &over.swappiness);
        put(&mut memory.disable_oom_killer, &over.disable_oom_killer);
        put(&mut memory.use_hierarchy, &over.use_hierarchy);
    }
    if let Some(over) = &over.cpu {
        let cpu = base.cpu.get_or_insert_default();
        put(&mut cpu.shares, &over.shares);
        put(&mut cpu.quota, &over.quota);
        put(&mut cpu.period, &over.period);
        put(&mut cpu.realtime_runtime, &over.realtime_runtime);
        put(&mut cpu.realtime_period, &over.realtime_period);
        for (base, over) in [(&mut cpu.cpus, &over.cpus), (&mut cpu.mems, &over.mems)] {
            if !over.is_empty() {
                base.clone_from(over);
            }
        }
    }
    for limit in &over.hugepage_limits {
        base.hugepage_limits.retain(|known| known.page_size != limit.page_size);
        base.hugepage_limits.push(limit.clone());
    }
    base.unified.extend(over.unified.clone());
    base.devices.extend(over.devices.iter().cloned());
    put(&mut base.blockio_class, &over.blockio_class);
    put(&mut base.rdt_class, &over.rdt_class);
    put(&mut base.pids, &over.pids);
}

#[cfg(test)]
mod tests {
    use holdfast_protos::nri::{
        CdiDevice, HugepageLimit, LinuxCpu, LinuxDeviceCgroup, LinuxMemory, LinuxNetDevice,
        LinuxPids, LinuxSyscall, OptionalBool, OptionalInt, OptionalInt64, OptionalRepeatedString,
        OptionalString, OptionalUInt64,
    };

    use super::*;

    fn draft() -> Draft {
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": {
                "args": ["sh"], "env": ["PATH=/bin", "A=1"], "cwd": "/",
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 10, "soft": 10}],
            },
            "annotations": {"keep": "1", "drop": "1"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data/", "type": "bind", "source": "/srv"},
            ],
            "linux": {
                "namespaces": [{"type": "mount"}, {"type": "pid"}],
                "devices": [{"path": "/dev/a", "type": "c", "major": 1, "minor": 2}],
                "resources": {"memory": {"limit": 10, "swap": 10}},
                "intelRdt": {"closID": "old"},
            },
        });
        let abilities = Abilities { oci_version: Some((1, 3)), swap: true, unified: true };
        Draft::new("c", spec, abilities)
    }

    fn linux(linux: LinuxContainerAdjustment) -> ContainerAdjustment {
        ContainerAdjustment { linux: Some(linux), ..ContainerAdjustment::default() }
    }

    fn resources(resources: LinuxResources) -> ContainerAdjustment {
        linux(LinuxContainerAdjustment { resources: Some(resources), ..Default::default() })
    }

    fn mount(destination: &str, options: &[&str]) -> Mount {
        Mount {
            destination: destination.into(),
            r#type: "bind".into(),
            source: "/src".into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }

    fn var(key: &str, value: &str) -> KeyValue {
        KeyValue { key: key.into(), value: value.into() }
    }

    fn is_invalid(adjust: &ContainerAdjustment, words: &str) {
        let error = draft().adjust(adjust, "10-a").unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.to_string().contains("10-a"), "{error}");
    }

    #[test]
    fn nothing_asked_for_changes_nothing() {
        let mut draft = draft();
        let before = draft.spec.clone();
        draft.adjust(&ContainerAdjustment::default(), "10-a").unwrap();
        assert!(!draft.changed);
        assert_eq!(draft.spec, before);
    }

    #[test]
    fn everything_finds_its_place_in_the_spec() {
        let mut draft = draft();
        let hook = Hook {
            path: "/hook".into(),
            args: vec!["hook".into()],
            env: vec!["K=V".into()],
            timeout: Some(OptionalInt { value: 3 }),
        };
        let int = |value| Some(OptionalInt64 { value });
        let uint = |value| Some(OptionalUInt64 { value });
        let adjust = ContainerAdjustment {
            annotations: [("-drop", ""), ("new", "2")].map(|(k, v)| (k.into(), v.into())).into(),
            mounts: vec![
                mount("/data/sub", &["rbind", "rslave"]),
                mount("/data", &["bind", "ro"]),
                mount("-/proc", &[]),
            ],
            env: vec![var("-PATH", ""), var("A", "2"), var("B", "x=y")],
            hooks: Some(Hooks { create_runtime: vec![hook], ..Hooks::default() }),
            linux: Some(LinuxContainerAdjustment {
                devices: vec![
                    LinuxDevice { path: "-/dev/a".into(), ..LinuxDevice::default() },
                    LinuxDevice {
                        path: "/dev/b".into(),
                        r#type: "b".into(),
                        major: 8,
                        minor: 1,
                        ..LinuxDevice::default()
                    },
                ],
                resources: Some(LinuxResources {
                    memory: Some(LinuxMemory {
                        limit: int(20),
                        reservation: int(5),
                        ..LinuxMemory::default()
                    }),
                    cpu: Some(LinuxCpu {
                        shares: uint(512),
                        quota: int(5000),
                        period: uint(10_000),
                        cpus: "0".into(),
                        ..LinuxCpu::default()
                    }),
                    hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit: 4 }],
                    unified: [("memory.high".to_owned(), "15".to_owned())].into(),
                    devices: vec![LinuxDeviceCgroup {
                        allow: true,
                        r#type: "c".into(),
                        major: int(1),
                        access: "r".into(),
                        ..LinuxDeviceCgroup::default()
                    }],
                    pids: Some(LinuxPids { limit: 9 }),
                    blockio_class: Some(OptionalString { value: "slow".into() }),
                    rdt_class: Some(OptionalString { value: "gold".into() }),
                }),
                cgroups_path: "/other/c".into(),
                oom_score_adj: Some(OptionalInt { value: 7 }),
                io_priority: Some(LinuxIoPriority {
                    class: IoPrioClass::IoprioClassBe as i32,
                    priority: 3,
                }),
                seccomp_policy: Some(LinuxSeccomp {
                    default_action: "SCMP_ACT_ALLOW".into(),
                    syscalls: vec![LinuxSyscall {
                        names: vec!["reboot".into()],
                        action: "SCMP_ACT_ERRNO".into(),
                        ..LinuxSyscall::default()
                    }],
                    ..LinuxSeccomp::default()
                }),
                namespaces: vec![
                    LinuxNamespace { r#type: "-pid".into(), path: String::new() },
                    LinuxNamespace { r#type: "cgroup".into(), path: String::new() },
                ],
                sysctl: [("net.x".to_owned(), "1".to_owned())].into(),
                net_devices: [("eth9".to_owned(), LinuxNetDevice { name: "in".into() })].into(),
                scheduler: Some(LinuxScheduler {
                    policy: LinuxSchedulerPolicy::SchedBatch as i32,
                    nice: 5,
                    flags: vec![LinuxSchedulerFlag::SchedFlagResetOnFork as i32],
                    ..LinuxScheduler::default()
                }),
                rdt: Some(LinuxRdt {
                    remove: true,
                    schemata: Some(OptionalRepeatedString { value: vec!["L3:0=f".into()] }),
                    enable_monitoring: Some(OptionalBool { value: true }),
                    ..LinuxRdt::default()
                }),
                memory_policy: Some(LinuxMemoryPolicy {
                    mode: MpolMode::MpolBind as i32,
                    nodes: "0".into(),
                    flags: vec![MpolFlag::MpolFStaticNodes as i32],
                }),
            }),
            rlimits: vec![PosixRlimit { r#type: "nofile".into(), hard: 64, soft: 32 }],
            cdi_devices: vec![CdiDevice { name: "a.b/c=d".into() }],
            args: vec!["sleep".into(), "1".into()],
        };
        draft.adjust(&adjust, "10-a").unwrap();
        let expected = json!({
            "ociVersion": "1.3.0",
            "process": {
                "args": ["sleep", "1"], "env": ["A=2", "B=x=y"], "cwd": "/",
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 64, "soft": 32}],
                "oomScoreAdj": 7,
                "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 3},
                "scheduler": {"policy": "SCHED_BATCH", "nice": 5,
                              "flags": ["SCHED_FLAG_RESET_ON_FORK"]},
            },
            "annotations": {"keep": "1", "new": "2"},
            "mounts": [
                {"destination": "/data", "type": "bind", "source": "/src",
                 "options": ["bind", "ro"]},
                {"destination": "/data/sub", "type": "bind", "source": "/src",
                 "options": ["rbind", "rslave"]},
            ],
            "hooks": {"createRuntime": [
                {"path": "/hook", "args": ["hook"], "env": ["K=V"], "timeout": 3}]},
            "linux": {
                "namespaces": [{"type": "mount"}, {"type": "cgroup"}],
                "devices": [{"path": "/dev/b", "type": "b", "major": 8, "minor": 1}],
                "resources": {
                    "memory": {"limit": 20, "swap": 20, "reservation": 5},
                    "cpu": {"shares": 512, "quota": 5000, "period": 10000, "cpus": "0"},
                    "pids": {"limit": 9},
                    "unified": {"memory.high": "15"},
                    "hugepageLimits": [{"pageSize": "2MB", "limit": 4}],
                    "devices": [
                        {"allow": true, "type": "b", "access": "rwm", "major": 8, "minor": 1},
                        {"allow": true, "type": "c", "access": "r", "major": 1},
                    ],
                },
                "rootfsPropagation": "rslave",
                "cgroupsPath": "/other/c",
                "seccomp": {"defaultAction": "SCMP_ACT_ALLOW",
                            "syscalls": [{"names": ["reboot"], "action": "SCMP_ACT_ERRNO"}]},
                "sysctl": {"net.x": "1"},
                "netDevices": {"eth9": {"name": "in"}},
                "intelRdt": {"schemata": ["L3:0=f"], "enableMonitoring": true},
                "memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0",
                                 "flags": ["MPOL_F_STATIC_NODES"]},
            },
        });
        let mut spec = draft.spec.clone();
        // Indexing leaves a null where nothing was; the caller takes them out.
        spec["linux"].as_object_mut().unwrap().retain(|_, value| !value.is_null());
        assert_eq!(spec, expected);
        let by = |name: &str| Some((name.to_owned(), "10-a".to_owned()));
        assert_eq!(draft.wanted.blockio_class, by("slow"));
        assert_eq!(draft.wanted.rdt_class, by("gold"));
        assert_eq!(draft.wanted.cdi_devices, [("a.b/c=d".to_owned(), "10-a".to_owned())]);
        // As another plugin would see it.
        let seen = super::super::message::container(&spec);
        let seen_linux = seen.linux.unwrap();
        assert_eq!(seen.args, ["sleep", "1"]);
        assert_eq!(seen_linux.scheduler.unwrap().flags, [0]);
        assert_eq!(seen_linux.resources.unwrap().cpu.unwrap().shares, uint(512));
        assert_eq!(seen_linux.rdt.unwrap().schemata.unwrap().value, ["L3:0=f"]);
    }

    #[test]
    fn a_later_plugin_sets_the_same_only_after_it_has_removed_it() {
        let mut draft = draft();
        let env = |vars: &[KeyValue]| ContainerAdjustment {
            env: vars.to_vec(),
            ..ContainerAdjustment::default()
        };
        draft.adjust(&env(&[var("B", "1")]), "10-a").unwrap();
        let error = draft.adjust(&env(&[var("B", "2")]), "20-b").unwrap_err();
        assert_eq!(
            error.to_string(),
            "plugins \"10-a\" and \"20-b\" both set Env \"B\" of container c"
        );
        draft.adjust(&env(&[var("-B", ""), var("B", "3")]), "20-b").unwrap();
        assert_eq!(draft.spec["process"]["env"], json!(["PATH=/bin", "A=1", "B=3"]));
        // What nobody has set yet is anybody's to remove.
        draft.adjust(&env(&[var("-A", "")]), "20-b").unwrap();
        draft.adjust(&env(&[var("-A", ""), var("A", "9")]), "30-c").unwrap();
        assert_eq!(draft.spec["process"]["env"], json!(["PATH=/bin", "B=3", "A=9"]));

        let args = |args: &[&str]| ContainerAdjustment {
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            ..ContainerAdjustment::default()
        };
        draft.adjust(&args(&["a"]), "10-a").unwrap();
        assert!(draft.adjust(&args(&["b"]), "20-b").is_err());
        draft.adjust(&args(&["", "b"]), "20-b").unwrap();
        assert_eq!(draft.spec["process"]["args"], json!(["b"]));
        assert_eq!(draft.merged.args, ["b"]);
    }

    #[test]
    fn values_without_sense_are_refused_by_name() {
        let env = |key: &str| ContainerAdjustment {
            env: vec![var(key, "x")],
            ..ContainerAdjustment::default()
        };
        is_invalid(&env(""), "not a variable");
        is_invalid(&env("A=B"), "not a variable");
        let annotations = [("io.kubernetes.cri.sandbox-id".to_owned(), "x".to_owned())].into();
        is_invalid(&ContainerAdjustment { annotations, ..Default::default() }, "the runtime's");
        let mounts = vec![mount("relative", &[])];
        is_invalid(&ContainerAdjustment { mounts, ..Default::default() }, "absolute");
        let rlimits = vec![PosixRlimit { r#type: "nofile".into(), hard: 1, soft: 2 }];
        is_invalid(&ContainerAdjustment { rlimits, ..Default::default() }, "above hard");
        let args = vec![String::new()];
        is_invalid(&ContainerAdjustment { args, ..Default::default() }, "needs a command");
        let namespaces = vec![LinuxNamespace { r#type: "net".into(), path: String::new() }];
        is_invalid(
            &linux(LinuxContainerAdjustment { namespaces, ..Default::default() }),
            "network",
        );
        let oom_score_adj = Some(OptionalInt { value: 1001 });
        is_invalid(
            &linux(LinuxContainerAdjustment { oom_score_adj, ..Default::default() }),
            "-1000 to 1000",
        );
        let io_priority = Some(LinuxIoPriority { class: 9, priority: 0 });
        is_invalid(
            &linux(LinuxContainerAdjustment { io_priority, ..Default::default() }),
            "class 9",
        );
        let cgroups_path = "/a/../b".to_owned();
        is_invalid(&linux(LinuxContainerAdjustment { cgroups_path, ..Default::default() }), "..");
        let devices = vec![LinuxDevice { path: "/dev/x".into(), ..LinuxDevice::default() }];
        is_invalid(&linux(LinuxContainerAdjustment { devices, ..Default::default() }), "/dev/x");
    }

    #[test]
    fn what_an_old_runtime_would_pass_over_is_refused() {
        let mut draft = draft();
        draft.abilities = Abilities::default();
        let scheduler = LinuxScheduler {
            policy: LinuxSchedulerPolicy::SchedIdle as i32,
            ..LinuxScheduler::default()
        };
        let adjust =
            linux(LinuxContainerAdjustment { scheduler: Some(scheduler), ..Default::default() });
        let error = draft.adjust(&adjust, "10-a").unwrap_err();
        assert!(matches!(error, Error::Lacking { .. }), "{error}");
        assert!(error.to_string().contains("1.1"), "{error}");
        let unified = [("memory.high".to_owned(), "1".to_owned())].into();
        let error = draft
            .adjust(&resources(LinuxResources { unified, ..Default::default() }), "10-a")
            .unwrap_err();
        assert!(error.to_string().contains("cgroup v2"), "{error}");
    }

    #[test]
    fn swap_moves_with_memory_unless_it_is_allowed() {
        let set = |before: Value, limit: i64, swap: bool| {
            let mut spec = json!({ "memory": before });
            let memory =
                LinuxMemory { limit: Some(OptionalInt64 { value: limit }), ..Default::default() };
            let over = LinuxResources { memory: Some(memory), ..LinuxResources::default() };
            overlay(&mut spec, &over, swap);
            spec["memory"]["swap"].as_i64()
        };
        assert_eq!(set(json!({"limit": 10, "swap": 10}), 20, true), Some(20));
        assert_eq!(set(json!({"limit": 10, "swap": 30}), 20, true), Some(30));
        assert_eq!(set(json!({"limit": 10, "swap": 30}), 40, true), Some(40));
        assert_eq!(set(json!({"limit": 10, "swap": -1}), 40, true), Some(-1));
        assert_eq!(set(Value::Null, 40, true), Some(40));
        assert_eq!(set(Value::Null, 40, false), None);
    }
}

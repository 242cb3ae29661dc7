//! What NRI plugins are told of pods and containers, and when; `world` carries out what they want.
//!
//! The order of things is [`crate::nri`]'s. Work of a pod may wait for the turn; who has the turn never
//! waits for a pod (here: for an answer of an owner, only for its queue).

mod world;

use std::{sync::Arc, time::Duration};

use holdfast_protos::nri::{
    CdiDevice, Container, ContainerState as WireState, HugepageLimit, LinuxContainer, LinuxCpu,
    LinuxMemory, LinuxNamespace, LinuxPodSandbox, LinuxResources, OptionalInt64, OptionalUInt64,
    PodSandbox, SecurityProfile, security_profile::ProfileType,
};
use holdfast_shim::bundle::Namespace;
use oci_spec::runtime::Spec;
use serde_json::Value;
use tracing::{info, warn};

use super::{
    Error, Pod, PodView, Services,
    config::{ContainerConfig, Profile, Resources},
    state::ContainerState,
};
use crate::{
    cdi, classes,
    config::CgroupDriver,
    error::chain,
    id::ContainerId,
    node::CgroupMode,
    nri::{
        self,
        adjust::{Abilities, Draft},
        limits::overlay,
        message,
    },
    spec,
    store::pods::{ContainerRecord, PodRecord},
};

/// How long a container that is being made waits for what plugins want of others, which goes on.
const OTHERS: Duration = Duration::from_secs(10);

fn refused(what: impl Into<String>) -> impl FnOnce(nri::Error) -> Error {
    let what = what.into();
    move |source| Error::Nri { what, source: Box::new(source) }
}

fn nanos(time: std::time::SystemTime) -> i64 {
    let since = time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Limits as the CRI has them, as plugins have them.
pub(super) fn resources(of: &Resources) -> LinuxResources {
    let int = |value: i64| (value != 0).then_some(OptionalInt64 { value });
    let uint = |value: i64| {
        u64::try_from(value).ok().filter(|v| *v != 0).map(|value| OptionalUInt64 { value })
    };
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: int(of.memory_limit),
            swap: int(of.memory_swap_limit),
            ..LinuxMemory::default()
        }),
        cpu: Some(LinuxCpu {
            shares: uint(of.cpu_shares),
            quota: int(of.cpu_quota),
            period: uint(of.cpu_period),
            cpus: of.cpuset_cpus.clone(),
            mems: of.cpuset_mems.clone(),
            ..LinuxCpu::default()
        }),
        hugepage_limits: of
            .hugepages
            .iter()
            .map(|(page_size, limit)| HugepageLimit { page_size: page_size.clone(), limit: *limit })
            .collect(),
        unified: of.unified.clone(),
        ..LinuxResources::default()
    }
}

/// The other way: what of it the CRI has.
fn cri_resources(of: &LinuxResources) -> Resources {
    let signed = |value: Option<u64>| value.map_or(0, |v| i64::try_from(v).unwrap_or(i64::MAX));
    let memory = of.memory.unwrap_or_default();
    let cpu = of.cpu.clone().unwrap_or_default();
    Resources {
        cpu_period: signed(cpu.period.map(|v| v.value)),
        cpu_quota: cpu.quota.map_or(0, |v| v.value),
        cpu_shares: signed(cpu.shares.map(|v| v.value)),
        memory_limit: memory.limit.map_or(0, |v| v.value),
        memory_swap_limit: memory.swap.map_or(0, |v| v.value),
        oom_score_adj: 0,
        cpuset_cpus: cpu.cpus,
        cpuset_mems: cpu.mems,
        hugepages: of
            .hugepage_limits
            .iter()
            .map(|limit| (limit.page_size.clone(), limit.limit))
            .collect(),
        unified: of.unified.clone(),
    }
}

/// What of it the CRI does not have: it goes to the OCI runtime as it is.
fn beyond_cri(of: LinuxResources) -> Option<Box<LinuxResources>> {
    let memory = of.memory.map(|memory| LinuxMemory { limit: None, swap: None, ..memory });
    let cpu = of.cpu.map(|cpu| LinuxCpu {
        realtime_runtime: cpu.realtime_runtime,
        realtime_period: cpu.realtime_period,
        ..LinuxCpu::default()
    });
    let rest = LinuxResources { memory, cpu, pids: of.pids, ..LinuxResources::default() };
    let empty = rest.memory.is_none_or(|memory| memory == LinuxMemory::default())
        && rest.cpu.as_ref().is_none_or(|cpu| *cpu == LinuxCpu::default())
        && rest.pids.is_none();
    (!empty).then(|| Box::new(rest))
}

/// A change of limits that an owner is asked for.
pub(super) struct Change {
    /// What the CRI has.
    pub(super) resources: Resources,
    /// What only plugins set.
    pub(super) more: Option<Box<LinuxResources>>,
}

impl From<Resources> for Change {
    fn from(resources: Resources) -> Self {
        Self { resources, more: None }
    }
}

impl Change {
    fn of(resources: LinuxResources) -> Self {
        Self { resources: cri_resources(&resources), more: beyond_cri(resources) }
    }

    /// `linux.resources` as the OCI runtime is told them.
    pub(super) fn json(
        more: Option<&LinuxResources>,
        linux: &oci_spec::runtime::LinuxResources,
    ) -> Vec<u8> {
        let Some(more) = more else {
            return serde_json::to_vec(linux).expect("resources serialise");
        };
        let mut value = serde_json::to_value(linux).expect("resources serialise");
        overlay(&mut value, more, false);
        value.to_string().into_bytes()
    }
}

/// A pod as plugins see it.
fn pod(services: &Services, record: &PodRecord) -> PodSandbox {
    let config = &record.config;
    let bundle = services.shims.pod_bundle(&record.id);
    let namespaces = [
        (Namespace::Net, "network"),
        (Namespace::Ipc, "ipc"),
        (Namespace::Uts, "uts"),
        (Namespace::User, "user"),
        (Namespace::Pid, "pid"),
    ];
    let namespaces = namespaces.into_iter().filter_map(|(kind, name)| {
        let path = bundle.namespace(kind);
        path.exists().then(|| LinuxNamespace {
            r#type: name.to_owned(),
            path: path.to_string_lossy().into_owned(),
        })
    });
    let parent = &config.cgroup_parent;
    let cgroups_path = match services.config.runtime.cgroup_driver {
        CgroupDriver::Cgroupfs if parent.is_empty() => spec::own_cgroup(&record.id),
        CgroupDriver::Cgroupfs | CgroupDriver::Systemd => parent.clone(),
    };
    PodSandbox {
        id: record.id.to_string(),
        name: config.name.clone(),
        uid: config.uid.clone(),
        namespace: config.namespace.clone(),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        runtime_handler: record.handler.clone(),
        linux: Some(LinuxPodSandbox {
            pod_overhead: config.overhead.as_ref().map(resources),
            pod_resources: config.resources.as_ref().map(resources),
            cgroup_parent: parent.clone(),
            cgroups_path,
            namespaces: namespaces.collect(),
            resources: None,
        }),
        pid: 0,
        ips: record.ips.iter().map(ToString::to_string).collect(),
    }
}

/// A container as plugins see it.
fn container(record: &ContainerRecord, spec: &Value) -> Container {
    let mut out = message::container(spec);
    let config = &record.config;
    out.id = record.id.to_string();
    out.pod_sandbox_id = record.pod.to_string();
    out.name = config.name.clone();
    out.labels = config.labels.clone();
    for (key, value) in &config.annotations {
        out.annotations.entry(key.clone()).or_insert_with(|| value.clone());
    }
    out.cdi_devices =
        config.cdi_devices.iter().map(|name| CdiDevice { name: name.clone() }).collect();
    out.created_at = nanos(record.created_at);
    out.pid = record.state.pid().unwrap_or_default();
    let profile = |kind: ProfileType, name: &str| SecurityProfile {
        profile_type: kind as i32,
        localhost_ref: name.to_owned(),
    };
    let linux = out.linux.get_or_insert_with(LinuxContainer::default);
    linux.seccomp_profile = config.security.seccomp.as_ref().map(|asked| match asked {
        Profile::RuntimeDefault => profile(ProfileType::RuntimeDefault, ""),
        Profile::Unconfined => profile(ProfileType::Unconfined, ""),
        Profile::Localhost(name) => profile(ProfileType::Localhost, name),
    });
    let state = match &record.state {
        ContainerState::Creating => WireState::ContainerUnknown,
        ContainerState::Created { .. } => WireState::ContainerCreated,
        ContainerState::Running { started_at, .. } => {
            out.started_at = nanos(*started_at);
            WireState::ContainerRunning
        }
        ContainerState::Exited { started_at, finished_at, how } => {
            out.started_at = started_at.map(nanos).unwrap_or_default();
            out.finished_at = nanos(*finished_at);
            out.exit_code = how.code();
            out.status_reason = how.reason().to_owned();
            WireState::ContainerStopped
        }
    };
    out.state = state as i32;
    out
}

/// The spec that a container's runtime was given; nothing if its bundle is gone. Blocks.
fn read_spec(services: &Services, id: &ContainerId) -> Value {
    let json = std::fs::read(services.shims.container_bundle(id).config()).ok();
    json.and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default()
}

/// The same beside everything else.
async fn spec_of(services: &Arc<Services>, id: &ContainerId) -> Value {
    let (services, id) = (services.clone(), id.clone());
    tokio::task::spawn_blocking(move || read_spec(&services, &id)).await.unwrap_or_default()
}

/// A pod has all that it is made of.
pub(super) async fn run_pod(services: &Arc<Services>, record: PodRecord) -> Result<(), Error> {
    if !services.nri.is_enabled() {
        return Ok(());
    }
    let id = record.id.to_string();
    let what = format!("pod {id}");
    let mut turn = services.nri.line().await;
    // Weak: it is kept by what the services own.
    let kept = Arc::downgrade(services);
    let message = move || kept.upgrade().map(|all| pod(&all, &record)).unwrap_or_default();
    turn.run_pod(&id, message).await.map_err(refused(what))
}

/// All containers of a pod have ended; those of them are told first.
pub(super) async fn stop_pod(services: &Arc<Services>, view: &PodView) {
    let mut turn = services.nri.line().await;
    if turn.is_idle() {
        return;
    }
    let message = pod(services, &view.record);
    for of in view.containers.values().filter(|c| c.record.state.is_exited()) {
        let container = container(&of.record, &spec_of(services, &of.record.id).await);
        // Others are updated in their own time.
        drop(turn.stop(&message, &container).await);
    }
    turn.stop_pod(&message).await;
}

/// A pod and its containers are about to be gone.
pub(super) async fn remove_pod(services: &Arc<Services>, view: &PodView) {
    let mut turn = services.nri.line().await;
    if turn.is_idle() {
        return;
    }
    let message = pod(services, &view.record);
    for of in view.containers.values() {
        let container = container(&of.record, &spec_of(services, &of.record.id).await);
        turn.remove(&message, &container).await;
    }
    turn.remove_pod(&message).await;
}

/// A pod that plugins were told of did not come up after all.
pub(super) async fn undo_pod(services: &Arc<Services>, record: &PodRecord) {
    if services.nri.is_making(record.id.as_str()) {
        let mut turn = services.nri.line().await;
        turn.remove_pod(&pod(services, record)).await;
    }
}

/// A container is to be made of this spec: the text that its runtime gets. What plugins make of its
/// limits is put into its record.
pub(super) async fn create(
    services: &Arc<Services>,
    of: &Arc<PodRecord>,
    record: &mut ContainerRecord,
    spec: Spec,
) -> Result<Vec<u8>, Error> {
    let name = record.config.name.clone();
    let what = format!("container {name:?}");
    let mut turn = services.nri.line().await;
    if !turn.would_ask(&of.config.annotations) {
        let json = serde_json::to_vec(&spec).expect("a spec serialises");
        let record = record.clone();
        turn.making(record.id.to_string().as_str(), move || {
            let value = serde_json::to_value(&spec).expect("a spec serialises");
            container(&record, &value)
        });
        return Ok(json);
    }
    let value = serde_json::to_value(&spec).expect("a spec serialises");
    let abilities = Abilities {
        oci_version: services.features.of(&of.runtime).oci_version_max,
        swap: services.node.cgroup.swap,
        unified: services.node.cgroup.mode == CgroupMode::V2,
    };
    let message = pod(services, of);
    let described = record.clone();
    let draft = Draft::new(record.id.as_str(), value, abilities);
    let created = turn
        .create(&message, draft, move |spec| container(&described, spec))
        .await
        .map_err(refused(what.clone()))?;
    drop(turn);
    if tokio::time::timeout(OTHERS, created.done).await.is_err() {
        warn!(
            container = record.id.short(),
            "what plugins want of other containers takes its time"
        );
    }
    let draft = created.draft;
    if !draft.changed {
        return Ok(serde_json::to_vec(&spec).expect("a spec serialises"));
    }
    info!(container = record.id.short(), name, "NRI plugins adjust a container");
    if let Some(limits) = draft.merged.linux.as_ref().and_then(|linux| linux.resources.as_ref()) {
        let asked = record.config.resources.clone();
        record.config.resources = asked.merged(cri_resources(limits));
        record.asked_resources = Some(Box::new(asked));
    }
    let shared = services.clone();
    tokio::task::spawn_blocking(move || finish(&shared, &name, draft))
        .await
        .unwrap_or(Err(Error::Panicked))
}

/// Adds what needs files of the node, and looks whether the whole still is a spec.
fn finish(services: &Services, name: &str, draft: Draft) -> Result<Vec<u8>, Error> {
    let wanted = &draft.wanted;
    let mut value = draft.spec;
    let not_a_spec = |source| Error::NotASpec { name: name.to_owned(), source };
    let lacking = |plugin: &str, field: &str, lacks: String| Error::Nri {
        what: format!("container {name:?}"),
        source: Box::new(nri::Error::Adjust(nri::adjust::Error::Lacking {
            plugin: plugin.to_owned(),
            field: field.to_owned(),
            lacks,
        })),
    };
    if !wanted.cdi_devices.is_empty() {
        // All at once: what a file says of all its devices is taken once.
        let (devices, mut plugins): (Vec<_>, Vec<_>) = wanted.cdi_devices.iter().cloned().unzip();
        plugins.dedup();
        let asked = ContainerConfig { cdi_devices: devices, ..Default::default() };
        let edits = cdi::names(&asked).and_then(|names| services.cdi.edits(&names));
        let edits =
            edits.map_err(|error| lacking(&plugins.join(", "), "CDI_devices", chain(&error)))?;
        let mut spec: Spec = typed(&value).map_err(not_a_spec)?;
        cdi::apply(&mut spec, edits);
        let flags = value["process"]["scheduler"]["flags"].take();
        value = serde_json::to_value(&spec).expect("a spec serialises");
        if !flags.is_null() {
            value["process"]["scheduler"]["flags"] = flags;
        }
    }
    if let Some((class, plugin)) = &wanted.blockio_class {
        let limits = match class.is_empty() {
            true => Value::Null,
            false => {
                let choice = classes::Choice::of_plugin(class, plugin);
                let limits = services.blockio.class(&choice, &services.node);
                let limits = limits.map_err(|error| {
                    lacking(plugin, "linux.resources.blockio_class", chain(&error))
                })?;
                serde_json::to_value(limits).expect("limits serialise")
            }
        };
        put(&mut value["linux"]["resources"], "blockIO", limits);
    }
    if let Some((class, plugin)) = &wanted.rdt_class {
        let group = match class.is_empty() {
            true => Value::Null,
            false => {
                let choice = classes::Choice::of_plugin(class, plugin);
                let group = classes::rdt(&choice, std::path::Path::new(super::extras::RESCTRL));
                let group = group
                    .map_err(|error| lacking(plugin, "linux.resources.rdt_class", chain(&error)))?;
                serde_json::json!({ "closID": group })
            }
        };
        put(&mut value["linux"], "intelRdt", group);
    }
    if let Some(score) = value["process"]["oomScoreAdj"].as_i64() {
        let score = spec::oom_score_adj(score, &services.node);
        let score = score.map_err(|source| Error::Spec { name: name.to_owned(), source })?;
        value["process"]["oomScoreAdj"] = score.into();
    }
    prune(&mut value);
    typed::<Spec>(&value).map_err(not_a_spec)?;
    Ok(value.to_string().into_bytes())
}

/// Reads what the types have words for: they lack the scheduler's flags.
pub(super) fn typed<T: serde::de::DeserializeOwned>(spec: &Value) -> Result<T, serde_json::Error> {
    let mut spec = spec.clone();
    if let Some(scheduler) = spec.pointer_mut("/process/scheduler").and_then(Value::as_object_mut) {
        scheduler.remove("flags");
    }
    serde_json::from_value(spec)
}

fn put(object: &mut Value, key: &str, value: Value) {
    match (object.as_object_mut(), value.is_null()) {
        (Some(map), true) => drop(map.remove(key)),
        (Some(map), false) => drop(map.insert(key.to_owned(), value)),
        (None, true) => {}
        (None, false) => object[key] = value,
    }
}

/// Takes out what was only looked at: indexing leaves a null.
fn prune(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.values_mut().for_each(prune);
            map.retain(|_, value| !value.is_null());
        }
        Value::Array(list) => list.iter_mut().for_each(prune),
        _ => {}
    }
}

/// A container is made; it is listed when the owner knows of it.
pub(super) async fn post_create(
    services: &Arc<Services>,
    of: &PodRecord,
    record: &ContainerRecord,
) {
    let mut turn = services.nri.line().await;
    if !turn.is_idle() {
        let container = container(record, &spec_of(services, &record.id).await);
        turn.post_create(&pod(services, of), &container).await;
    }
}

/// A container that plugins were asked about was not made, or is not on record.
pub(super) async fn undo_create(
    services: &Arc<Services>,
    of: &PodRecord,
    record: &ContainerRecord,
) {
    if services.nri.is_making(record.id.as_str()) {
        let mut turn = services.nri.line().await;
        let container = container(record, &spec_of(services, &record.id).await);
        turn.remove(&pod(services, of), &container).await;
    }
}

/// A container that has ended is about to be gone.
pub(super) async fn remove(services: &Arc<Services>, of: &Pod, id: &ContainerId) {
    let mut turn = services.nri.line().await;
    if turn.is_idle() {
        return;
    }
    let Ok(found) = of.container(id) else { return };
    let container = container(&found.record, &spec_of(services, id).await);
    turn.remove(&pod(services, &of.view().record), &container).await;
}

/// A container is about to be started.
pub(super) async fn start(
    services: &Arc<Services>,
    of: &Pod,
    id: &ContainerId,
) -> Result<(), Error> {
    let mut turn = services.nri.line().await;
    if turn.is_idle() {
        return Ok(());
    }
    let (view, found) = (of.view(), of.container(id)?);
    let container = container(&found.record, &spec_of(services, id).await);
    let message = pod(services, &view.record);
    turn.start(&message, &container).await.map_err(refused(format!("container {id}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_go_both_ways_and_the_rest_is_kept_apart() {
        let of = Resources {
            cpu_shares: 512,
            cpu_quota: -1,
            cpu_period: 100_000,
            memory_limit: 1 << 20,
            memory_swap_limit: 1 << 21,
            cpuset_cpus: "0-1".into(),
            hugepages: vec![("2MB".into(), 4)],
            unified: [("a.b".to_owned(), "1".to_owned())].into(),
            ..Resources::default()
        };
        assert_eq!(cri_resources(&resources(&of)), of);
        assert_eq!(beyond_cri(resources(&of)), None);
        let mut wire = resources(&of);
        wire.pids = Some(holdfast_protos::nri::LinuxPids { limit: 7 });
        let rest = beyond_cri(wire).unwrap();
        let linux = oci_spec::runtime::LinuxResources::default();
        let json = String::from_utf8(Change::json(Some(&rest), &linux)).unwrap();
        assert_eq!(json, r#"{"pids":{"limit":7}}"#);
    }

    #[test]
    fn what_was_only_looked_at_is_not_left() {
        let mut value = serde_json::json!({"a": {"b": null, "c": [{"d": null}]}, "e": null});
        prune(&mut value);
        assert_eq!(value, serde_json::json!({"a": {"c": [{}]}}));
    }
}

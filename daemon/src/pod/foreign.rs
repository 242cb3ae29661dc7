//! Pods whose containers a foreign shim runs. Our own shim has their namespaces and their logs; here
//! is what is different for the containers, and the container that such a shim may need for the pod.
//!
//! An exit is taken from the shim's answer to `Wait`, not from its events, which it may drop: one
//! operation waits for each container. Then the exit record is written, as our own shim does it, and
//! the container deleted in the shim, which passes its last output on; only then is it told.

use std::{
    fs,
    sync::Arc,
    time::{Duration, SystemTime},
};

use holdfast_shim::{
    bundle::{Bundle, Exit as Status, ExitRecord, Namespace},
    cgroup::Cgroup,
    client::{self, Client, CreateTask, ErrorKind},
    control::{Control, Relay},
};
use oci_spec::runtime::Spec;
use tracing::{info, warn};

use super::{
    Error, Pod, Services,
    config::{PidMode, PodRef},
    container, io_at, recover, run,
    state::{ContainerState, Exit},
    task::Effect,
    volumes,
};
use crate::{
    config::{CgroupDriver, ForeignHandler, Sandboxing},
    error::chain,
    id::ContainerId,
    shims::foreign::{Mark, Unreached, nested_bundle},
    spec::{self, PidNamespace},
    store::pods::{ContainerRecord, PodRecord},
};

/// First and last pause between attempts to reach a shim.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// A file in the bundle: the shim said that the kernel killed a process for want of memory.
const OOM: &str = "oom";

/// The connection that a container's calls go to: the pod's own shim, or the foreign one.
pub(crate) async fn tasks(
    services: &Services,
    pod: &Pod,
    id: &ContainerId,
) -> Result<Client, Error> {
    if pod.view().record.foreign.is_none() {
        return pod.client().await;
    }
    match services.shims.reach_foreign(&services.shims.container_bundle(id)).await {
        Ok(client) => Ok(client),
        Err(Unreached::Dead | Unreached::Unknown) => Err(Error::NoForeignShim(id.clone())),
        Err(Unreached::NotNow(source)) => {
            Err(Error::Task { what: "reach the shim of", id: id.clone(), source })
        }
    }
}

fn sandbox_id(pod: &PodRecord) -> ContainerId {
    pod.id.as_str().parse().expect("both kinds of id have one form")
}

fn shim_error(pod: &PodRecord, what: &'static str) -> impl FnOnce(client::Error) -> Error {
    let id = pod.id.clone();
    move |source| Error::Shim { what, id, source }
}

/// Makes what the handler needs for the pod itself, once its namespaces and its network are there.
pub(super) async fn bring_up(services: &Services, pod: &PodRecord) -> Result<(), Error> {
    let Some(handler) = &pod.foreign else { return Ok(()) };
    if handler.sandbox == Sandboxing::None {
        // Found out now, and not by the first container.
        let found = crate::config::find_program(&handler.shim).is_some();
        return match found {
            true => Ok(()),
            false => Err(Error::NoShimBinary(handler.shim.clone())),
        };
    }
    let bundle = services.shims.sandbox_bundle(&pod.id);
    let id = sandbox_id(pod);
    nested_bundle(&bundle).map_err(io_at("make", bundle.dir()))?;
    for dir in [bundle.dir().parent().unwrap_or(bundle.dir()), bundle.dir()] {
        volumes::owned_dir(dir, pod.config.namespaces.user.as_ref())?;
    }
    let of_pod = services.shims.pod_bundle(&pod.id);
    let pid = match pod.config.namespaces.pid {
        PidMode::Node => PidNamespace::Host,
        PidMode::Pod => PidNamespace::Path(of_pod.namespace(Namespace::Pid)),
        PidMode::Container | PidMode::Target(_) => PidNamespace::New,
    };
    let namespaces = container::pinned(&pod.config.namespaces, &of_pod, pid);
    let spec = spec::sandbox(
        &PodRef { id: &pod.id, config: &pod.config },
        &id,
        &namespaces,
        services.shims.binary(),
        &pod.config.log_directory,
        &services.node,
        services.config.runtime.cgroup_driver,
    )
    .map_err(|source| Error::Spec { name: pod.config.name.clone(), source })?;
    let json = serde_json::to_vec(&spec).expect("a spec serialises");
    fs::write(bundle.config(), json).map_err(io_at("write", &bundle.config()))?;

    let started = services.shims.start_foreign(&pod.id, id.as_str(), &bundle, handler).await;
    let client = started.map_err(shim_error(pod, "start the handler's shim for"))?;
    let task = CreateTask {
        id: id.to_string(),
        bundle: bundle.dir().to_owned(),
        options: services.shims.foreign_options(handler),
        ..CreateTask::default()
    };
    client.create(task).await.map_err(shim_error(pod, "make the sandbox container of"))?;
    client
        .start(id.as_str(), "")
        .await
        .map_err(shim_error(pod, "start the sandbox container of"))?;
    Ok(())
}

/// Takes away what [`bring_up`] made. May be repeated.
pub(super) async fn tear_down(services: &Services, pod: &PodRecord) -> Result<(), Error> {
    let bundle = services.shims.sandbox_bundle(&pod.id);
    if !bundle.dir().exists() {
        return Ok(());
    }
    let ended = services.shims.end_foreign(pod.id.as_str(), &bundle).await;
    ended.map_err(shim_error(pod, "end the handler's shim of"))?;
    let rootfs = bundle.rootfs();
    let unmounted = tokio::task::spawn_blocking(move || run::unmount(&rootfs));
    unmounted.await.unwrap_or(Err(Error::Panicked))
}

/// Starts or finds the shim of a container whose bundle is ready, has its streams passed on, and makes
/// the container. Gives its pid.
pub(super) async fn create(
    services: &Services,
    pod: &PodRecord,
    handler: &ForeignHandler,
    record: &ContainerRecord,
    bundle: &Bundle,
) -> Result<u32, client::Error> {
    let config = &record.config;
    let relay = Relay {
        container: record.id.to_string(),
        bundle: bundle.dir().to_owned(),
        log: (!record.log.as_os_str().is_empty()).then(|| record.log.clone()),
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        stderr: !config.tty,
    };
    let control = Control::new(&services.shims.pod_bundle(&pod.id));
    control.relay(relay).await?;
    let made = made(services, pod, handler, record, bundle).await;
    if made.is_err() {
        services.shims.settle(&pod.id, record.id.as_str()).await;
    }
    made
}

async fn made(
    services: &Services,
    pod: &PodRecord,
    handler: &ForeignHandler,
    record: &ContainerRecord,
    bundle: &Bundle,
) -> Result<u32, client::Error> {
    let config = &record.config;
    let client = client_for_new(services, pod, handler, &record.id, bundle).await?;
    let path = |there: bool, path: std::path::PathBuf| match there {
        true => path.display().to_string(),
        false => String::new(),
    };
    let task = CreateTask {
        id: record.id.to_string(),
        bundle: bundle.dir().to_owned(),
        terminal: config.tty,
        stdin: path(config.stdin, bundle.stdin()),
        stdout: path(true, bundle.stdout()),
        stderr: path(!config.tty, bundle.stderr()),
        rootfs: Vec::new(),
        options: services.shims.foreign_options(handler),
        checkpoint: String::new(),
    };
    client.create(task).await
}

/// By version 2 of the contract the binary is run for each container, and says which shim it has; by
/// version 3 a pod's containers are its sandbox's shim's.
async fn client_for_new(
    services: &Services,
    pod: &PodRecord,
    handler: &ForeignHandler,
    id: &ContainerId,
    bundle: &Bundle,
) -> Result<Client, client::Error> {
    let sandbox = services.shims.sandbox_bundle(&pod.id);
    let running = Mark::load(&sandbox).and_then(|mark| mark.running);
    if running.is_some_and(|running| running.endpoint.version >= 3) {
        let io = |source| client::Error::Io { call: "share a shim", source };
        services.shims.share_foreign(&sandbox, bundle).map_err(io)?;
        return services.shims.reach_foreign(bundle).await.map_err(|error| match error {
            Unreached::NotNow(error) => error,
            Unreached::Dead | Unreached::Unknown => client::Error::Closed { call: "connect" },
        });
    }
    services.shims.start_foreign(&pod.id, id.as_str(), bundle, handler).await
}

/// Whether a container that is on record as created was started: a daemon that was killed had no time
/// to say so.
pub(super) async fn was_started(services: &Services, id: &ContainerId) -> bool {
    let bundle = services.shims.container_bundle(id);
    match services.shims.reach_foreign(&bundle).await {
        Ok(client) => container::runs(&client, id).await.is_some(),
        Err(_) => false,
    }
}

/// Keeps that the kernel killed a process of a container for want of memory.
pub(super) fn note_oom(services: &Services, id: &ContainerId) {
    let bundle = services.shims.container_bundle(id);
    if Mark::load(&bundle).is_some()
        && let Err(error) = fs::write(bundle.dir().join(OOM), "")
    {
        warn!(container = id.short(), %error, "an OOM kill is not kept");
    }
}

/// Waits for the end of a container, however often its shim, or we, are restarted meanwhile.
pub(super) async fn watch(
    services: Arc<Services>,
    pod: Pod,
    record: ContainerRecord,
) -> Result<Effect, Error> {
    let id = record.id.clone();
    let bundle = services.shims.container_bundle(&id);
    let mut pause = PAUSES.0;
    let seen = loop {
        // Told before we could say it.
        if let Ok(Some(_)) = ExitRecord::load(bundle.exit_record()) {
            break settle(&services, &pod, &record, None).await;
        }
        match services.shims.reach_foreign(&bundle).await {
            Ok(client) => match client.wait(id.as_str(), "").await {
                Ok(exited) => {
                    break settle(&services, &pod, &record, Some((&client, exited))).await;
                }
                // Deleted without our doing.
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    break settle(&services, &pod, &record, None).await;
                }
                Err(error) if error.kind() == ErrorKind::Closed => {}
                Err(error) => warn!(
                    container = id.short(),
                    error = %chain(&error),
                    "the shim does not say when the container ends, asking again"
                ),
            },
            Err(Unreached::Dead) => break bury(&services, &record).await,
            // Ended by an operation of ours, which says so itself.
            Err(Unreached::Unknown) => break settle(&services, &pod, &record, None).await,
            Err(Unreached::NotNow(error)) => {
                warn!(container = id.short(), error = %chain(&error), "the shim does not answer");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    };
    Ok(Effect::Ended(seen))
}

/// Writes down how a container ended, and has its last output passed on.
async fn settle(
    services: &Services,
    pod: &Pod,
    record: &ContainerRecord,
    told: Option<(&Client, client::Exited)>,
) -> recover::Seen {
    let id = &record.id;
    let bundle = services.shims.container_bundle(id);
    if let Some((client, exited)) = told {
        let at = match exited.at {
            SystemTime::UNIX_EPOCH => SystemTime::now(),
            at => at,
        };
        let status = match Exit::from_status(exited.status, false) {
            Exit::Signal(signal) => Status::Signal(signal),
            other => Status::Code(u8::try_from(other.code()).unwrap_or(u8::MAX)),
        };
        let parent = pod.view().record.config.cgroup_parent.clone();
        let driver = services.config.runtime.cgroup_driver;
        let cgroup = spec::cgroups_path(&parent, pod.id(), id, driver);
        let (oom, pid) = (bundle.dir().join(OOM), record.state.pid().unwrap_or_default());
        let path = bundle.exit_record();
        let stored = tokio::task::spawn_blocking(move || {
            let kills = match driver {
                CgroupDriver::Cgroupfs => Cgroup::at(&cgroup).ok().and_then(|c| c.oom_kills()),
                CgroupDriver::Systemd => None,
            };
            let oom_killed =
                status != Status::Code(0) && (oom.exists() || kills.is_some_and(|n| n > 0));
            ExitRecord { pid, status, at, oom_killed, lost: false }.store(path)
        });
        match stored.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                warn!(container = id.short(), %error, "the exit record is not written");
            }
            Err(error) => warn!(container = id.short(), %error, "the exit record is not written"),
        }
        // Its streams end with it.
        match client.delete(id.as_str(), "").await {
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Closed) => {}
            Err(error) => {
                warn!(container = id.short(), error = %chain(&error), "delete an ended container");
            }
        }
        services.shims.settle(pod.id(), id.as_str()).await;
        let (at, how) = recover::how_ended(&bundle.exit_record(), Some((at, exited.status)));
        return recover::Seen { id: id.clone(), at, how };
    }
    let (at, how) = recover::how_ended(&bundle.exit_record(), None);
    recover::Seen { id: id.clone(), at, how }
}

/// Ends what a dead shim left of a container.
async fn bury(services: &Services, record: &ContainerRecord) -> recover::Seen {
    let id = &record.id;
    info!(container = id.short(), "the container's shim is dead");
    let bundle = services.shims.container_bundle(id);
    let before = recover::Before::look(record, &bundle.exit_record());
    if let Err(error) = services.shims.end_foreign(id.as_str(), &bundle).await {
        warn!(container = id.short(), error = %chain(&error), "clean up after a dead shim");
    }
    let (at, how) = before.verdict(None);
    recover::Seen { id: id.clone(), at, how }
}

/// Waits for the end of the pod's own container: without it, to some shims the pod is gone.
pub(super) async fn watch_sandbox(services: Arc<Services>, pod: Pod) -> Result<Effect, Error> {
    let bundle = services.shims.sandbox_bundle(pod.id());
    let mut pause = PAUSES.0;
    loop {
        match services.shims.reach_foreign(&bundle).await {
            Ok(client) => match client.wait(pod.id().as_str(), "").await {
                Ok(_) => return Ok(Effect::SandboxEnded),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    return Ok(Effect::SandboxEnded);
                }
                Err(error) if error.kind() == ErrorKind::Closed => {}
                Err(error) => warn!(error = %chain(&error), "the pod's sandbox cannot be watched"),
            },
            Err(Unreached::Dead | Unreached::Unknown) => return Ok(Effect::SandboxEnded),
            Err(Unreached::NotNow(error)) => {
                warn!(error = %chain(&error), "the shim of the pod's sandbox does not answer");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Takes from a container of gVisor under our own shim the mark by which runsc would look for a pod's
/// sandbox to put it into: each has its own, whose process ends when it does.
pub(super) fn apart(pod: &PodRecord, spec: &mut Spec) {
    let name = pod.runtime.file_name().unwrap_or_default().to_string_lossy();
    if pod.foreign.is_none()
        && name.starts_with("runsc")
        && let Some(annotations) = spec.annotations_mut()
    {
        annotations.remove("io.kubernetes.cri.container-type");
    }
}

/// Whether a container of this state is to be watched.
pub(super) fn is_watched(state: &ContainerState) -> bool {
    !matches!(state, ContainerState::Creating) && !state.is_exited()
}

//! Bringing a pod up and taking it down.
//!
//! Everything a pod is made of can be found from its id alone (bundle, namespaces, mounts, shim,
//! cgroup) or from a record that was written first (CNI attachment). So there is one way down,
//! [`tear_down`], which may be repeated; the undo of a failed start, a removal and the clean-up
//! after a crash all are it.

use std::{fs, io, net::IpAddr, path::Path, sync::Arc, time::Duration};

use holdfast_protos::shim::protobuf::well_known_types::any::Any;
use holdfast_shim::{
    bundle::{Bundle, Namespace},
    client::{Client, CreateSandbox, Endpoint, ErrorKind},
    crash,
    options::{IdMap, PodOptions, UserMappings},
};
use rustix::mount::{MountFlags, UnmountFlags};
use tracing::warn;

use super::{
    Error, Pod, Services,
    config::{Dns, IdMapping, PidMode, PodConfig},
    container, foreign, io_at, leftover, nri,
    task::Effect,
    volumes,
};
use crate::{network::Attach, shims::private_dir, spec, store::pods::PodRecord};

/// Size of a pod's /dev/shm; what Docker made everybody's default.
const SHM_SIZE: &str = "64m";

/// What a pod has once it is up.
pub(super) struct Up {
    pub(super) endpoint: Endpoint,
    pub(super) client: Client,
    pub(super) ips: Vec<IpAddr>,
}

/// Intent, then the steps; on failure everything is undone, the intent last.
pub(super) async fn bring_up(
    services: Arc<Services>,
    record: Arc<PodRecord>,
) -> Result<Effect, Error> {
    services.store.put_pod(&record).await?;
    crash::point("daemon.pod.intent-recorded");
    match steps(&services, &record).await {
        Ok(up) => Ok(Effect::Up(up)),
        Err(error) => {
            nri::undo_pod(&services, &record).await;
            undo(&services, &record).await;
            Err(error)
        }
    }
}

async fn undo(services: &Arc<Services>, record: &Arc<PodRecord>) {
    if let Err(error) = undo_once(services, record).await {
        let (services, record) = (services.clone(), record.clone());
        leftover::later("a pod that did not come up", &error, move || {
            let (services, record) = (services.clone(), record.clone());
            async move { undo_once(&services, &record).await }
        });
    }
}

/// May be repeated. What is not undone keeps its record.
async fn undo_once(services: &Arc<Services>, record: &PodRecord) -> Result<(), Error> {
    take_away(services, record).await?;
    crash::point("daemon.pod.undone");
    services.store.delete_pod(&record.id).await?;
    crash::point("daemon.pod.undone-and-forgotten");
    Ok(())
}

/// Takes away a pod that a crash left half made.
pub(super) async fn discard(
    services: Arc<Services>,
    record: Arc<PodRecord>,
) -> Result<Effect, Error> {
    nri::undo_pod(&services, &record).await;
    match take_away(&services, &record).await {
        Ok(()) => {
            crash::point("daemon.pod.discarded");
            Ok(Effect::Gone)
        }
        Err(error) => {
            leftover::later("a pod that a crash left", &error, move || {
                let (services, record) = (services.clone(), record.clone());
                async move { undo_once(&services, &record).await }
            });
            Err(error)
        }
    }
}

/// Takes away all of a pod that never had a container. May be repeated.
async fn take_away(services: &Arc<Services>, record: &PodRecord) -> Result<(), Error> {
    tear_down(services, record, None).await?;
    remove_dir(services.shims.pod_bundle(&record.id).dir()).await
}

async fn steps(services: &Arc<Services>, record: &PodRecord) -> Result<Up, Error> {
    let id = &record.id;
    let config = &record.config;
    let bundle = services.shims.pod_bundle(id);
    let (major, minor) = services.node.kernel;
    if config.namespaces.user.is_some() && (major, minor) < spec::MAPPED_LAYERS {
        return Err(Error::NoMappedLayers { id: id.clone(), major, minor });
    }
    volumes::owned_dir(bundle.dir(), config.namespaces.user.as_ref())?;
    crash::point("daemon.pod.bundle-made");
    let files = {
        let (bundle, config) = (bundle.clone(), config.clone());
        tokio::task::spawn_blocking(move || make_files(&bundle, &config))
    };
    let shim = |what| move |source| Error::Shim { what, id: id.clone(), source };
    let (endpoint, client) = services.shims.start(id).await.map_err(shim("start the shim"))?;
    crash::point("daemon.pod.shim-started");
    files.await.unwrap_or(Err(Error::Panicked))?;
    crash::point("daemon.pod.files-made");

    let sandbox = CreateSandbox {
        id: id.to_string(),
        bundle: bundle.dir().to_owned(),
        netns_path: String::new(),
        options: Some(pod_options(record)),
        annotations: config.annotations.clone().into_iter().collect(),
    };
    client.create_sandbox(sandbox).await.map_err(shim("make the namespaces"))?;
    crash::point("daemon.pod.sandbox-described");
    client.start_sandbox(id.as_str()).await.map_err(shim("make the namespaces"))?;
    crash::point("daemon.pod.namespaces-made");

    let ips = if config.namespaces.host_network {
        Vec::new()
    } else {
        let attach = Attach {
            pod: id.clone(),
            name: config.name.clone(),
            namespace: config.namespace.clone(),
            uid: config.uid.clone(),
            netns: bundle.namespace(Namespace::Net),
            port_mappings: config.port_mappings.clone(),
            dns: config.dns.clone(),
            annotations: config.annotations.clone(),
            labels: config.labels.clone(),
            cgroup_parent: config.cgroup_parent.clone(),
        };
        let attached = services.network.attach(&attach).await;
        crash::point("daemon.pod.attached");
        let ips = attached.map_err(|source| Error::Network { id: id.clone(), source })?.ips;
        let path = bundle.hosts();
        fs::write(&path, hosts(&hostname(config), &ips)).map_err(io_at("write", &path))?;
        crash::point("daemon.pod.hosts-written");
        ips
    };
    foreign::bring_up(services, record).await?;
    nri::run_pod(services, PodRecord { ips: ips.clone(), ..record.clone() }).await?;
    Ok(Up { endpoint, client, ips })
}

fn pod_options(record: &PodRecord) -> Any {
    let config = &record.config;
    let ns = &config.namespaces;
    let ids = |list: &[IdMapping]| {
        list.iter()
            .map(|m| IdMap { container_id: m.container_id, host_id: m.host_id, length: m.length })
            .collect()
    };
    let options = PodOptions {
        hostname: if ns.host_network { String::new() } else { hostname(config) },
        net: !ns.host_network,
        ipc: !ns.host_ipc,
        // A pod on the node's network has the node's name.
        uts: !ns.host_network,
        pid: ns.pid == PidMode::Pod,
        user: ns.user.as_ref().map(|u| UserMappings { uids: ids(&u.uids), gids: ids(&u.gids) }),
        sysctls: config.sysctls.clone(),
        ..PodOptions::default()
    };
    CreateSandbox::pod_options(&options)
}

/// The pod's host name: as asked for, else its name, as containerd does.
fn hostname(config: &PodConfig) -> String {
    match config.hostname.is_empty() {
        true => config.name.chars().take(63).collect(),
        false => config.hostname.clone(),
    }
}

/// /etc/hosts of a pod with a network of its own: itself, and nothing of the node's. The kubelet
/// mounts one of its own over it.
fn hosts(name: &str, ips: &[IpAddr]) -> String {
    let mut text =
        String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for ip in ips {
        text.push_str(&format!("{ip}\t{name}\n"));
    }
    text
}

/// resolv.conf, hostname, hosts and /dev/shm of a pod, in its bundle.
fn make_files(bundle: &Bundle, config: &PodConfig) -> Result<(), Error> {
    let write = |path: &Path, text: &str| fs::write(path, text).map_err(io_at("write", path));
    let node_file = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let host_network = config.namespaces.host_network;
    let name = match host_network {
        true => nix::unistd::gethostname()
            .ok()
            .and_then(|name| name.into_string().ok())
            .unwrap_or_else(|| hostname(config)),
        false => hostname(config),
    };
    write(&bundle.hostname(), &format!("{name}\n"))?;
    // A pod with a network of its own gets its addresses once it has them.
    let hosts = if host_network { node_file("/etc/hosts") } else { String::new() };
    write(&bundle.hosts(), &hosts)?;
    let resolv = match &config.dns {
        Some(dns) if *dns != Dns::default() => dns.resolv_conf(),
        _ => node_file("/etc/resolv.conf"),
    };
    write(&bundle.resolv_conf(), &resolv)?;
    // Containers whose user is not root read these.
    for file in [bundle.hostname(), bundle.hosts(), bundle.resolv_conf()] {
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::Permissions::from_mode(0o644);
        fs::set_permissions(&file, mode).map_err(io_at("set the mode of", &file))?;
        give_to_root(&file, config)?;
    }
    if !config.namespaces.host_ipc {
        let shm = bundle.shm();
        private_dir(&shm).map_err(io_at("make", &shm))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        let options = format!("mode=1777,size={SHM_SIZE}");
        let options = std::ffi::CString::new(options).expect("no NUL in it");
        rustix::mount::mount("shm", &shm, "tmpfs", flags, options.as_c_str())
            .map_err(|e| io_at("mount", &shm)(e.into()))?;
        crash::point("daemon.pod.shm-mounted");
        give_to_root(&shm, config)?;
    }
    Ok(())
}

/// Gives a file to the root of the pod's user namespace, if it has one.
fn give_to_root(path: &Path, config: &PodConfig) -> Result<(), Error> {
    let Some(user) = &config.namespaces.user else { return Ok(()) };
    let root = |ids: &[IdMapping]| ids.iter().find(|m| m.container_id == 0).map(|m| m.host_id);
    std::os::unix::fs::chown(path, root(&user.uids), root(&user.gids))
        .map_err(io_at("give to the pod's root", path))
}

/// Kills the pod's containers, takes its network and its namespaces away and ends its shim. The
/// containers' remains (logs, writable layers, records) stay until they are removed.
pub(super) async fn stop(services: Arc<Services>, pod: Pod) -> Result<Effect, Error> {
    let view = pod.view();
    // The shim may be gone for good, or not be reached again yet: what the kernel has is then dealt
    // with by the tear-down.
    let mut client = pod.shim().await?;
    if let Some(first) = &client {
        let stops = view
            .containers
            .keys()
            .map(|id| container::stop(&services, pod.clone(), id.clone(), Duration::ZERO));
        for stopped in futures::future::join_all(stops).await {
            match stopped {
                Ok(()) | Err(Error::NoContainer(_)) => {}
                Err(error) => return Err(error),
            }
        }
        crash::point("daemon.stop-pod.containers-stopped");
        for id in view.containers.keys() {
            container::free(&services, Some(&(&pod, first.clone())), id).await?;
        }
        crash::point("daemon.stop-pod.containers-freed");
        // Another one by now, perhaps.
        client = pod.connected();
    }
    // As they are now, ended.
    nri::stop_pod(&services, &pod.view()).await;
    tear_down(&services, &view.record, client).await?;
    crash::point("daemon.stop-pod.torn-down");
    Ok(Effect::Stopped)
}

/// Stops the pod if it is not, then removes its containers and its bundle.
pub(super) async fn remove(services: Arc<Services>, pod: Pod) -> Result<Effect, Error> {
    stop(services.clone(), pod.clone()).await?;
    let view = pod.view();
    nri::remove_pod(&services, &view).await;
    for container in view.containers.values() {
        container::take_away(&services, None, &container.record).await?;
    }
    crash::point("daemon.remove-pod.containers-gone");
    let bundle = services.shims.pod_bundle(&pod.id);
    remove_dir(bundle.dir()).await?;
    crash::point("daemon.remove-pod.bundle-gone");
    Ok(Effect::Gone)
}

/// Takes away all that a pod is made of, but not its containers' remains. May be repeated.
async fn tear_down(
    services: &Arc<Services>,
    record: &PodRecord,
    client: Option<Client>,
) -> Result<(), Error> {
    let id = &record.id;
    let bundle = services.shims.pod_bundle(id);
    let client = match client {
        Some(client) => Some(client),
        None => live_shim(services, record).await,
    };
    foreign::tear_down(services, record).await?;
    // While the namespace is still there: plugins look into it.
    let detached = services.network.detach(id).await;
    detached.map_err(|source| Error::Network { id: id.clone(), source })?;
    crash::point("daemon.stop-pod.detached");

    let shim = |what| move |source| Error::Shim { what, id: id.clone(), source };
    let mut dead = client.is_none();
    if let Some(client) = client {
        let mut died = false;
        let mut gone = |kind| {
            died |= kind == ErrorKind::Closed;
            matches!(kind, ErrorKind::NotFound | ErrorKind::Closed)
        };
        match client.stop_sandbox(id.as_str(), Duration::from_secs(10)).await {
            Err(error) if !gone(error.kind()) => return Err(shim("stop the shim")(error)),
            Ok(_) | Err(_) => {}
        }
        crash::point("daemon.stop-pod.sandbox-stopped");
        match client.shutdown_sandbox(id.as_str()).await {
            Err(error) if !gone(error.kind()) => return Err(shim("end the shim")(error)),
            Ok(_) | Err(_) => {}
        }
        crash::point("daemon.stop-pod.shim-ended");
        // Killed in the middle of it, or dying when it was reached, so it has left things behind.
        dead = died;
    }
    if dead && bundle.dir().exists() {
        services.shims.delete_dead_pod(id).await.map_err(shim("clean up after the shim"))?;
        crash::point("daemon.stop-pod.cleaned-up-after-shim");
    }
    let (bundle, own_cgroup) = (bundle.clone(), record.config.cgroup_parent.is_empty());
    let (of, record) = (id.clone(), record.clone());
    tokio::task::spawn_blocking(move || {
        unmount(&bundle.shm())?;
        crash::point("daemon.stop-pod.shm-unmounted");
        // The kubelet removes it with the pod's cgroup, if it cannot be removed now.
        if let Err(error) = crate::cadvisor::remove_mark(&record) {
            warn!(pod = of.short(), %error, "a cgroup is left");
        }
        if own_cgroup {
            // Containers without a parent of the kubelet's live below a group of ours.
            let path = spec::own_cgroup(&of);
            holdfast_shim::cgroup::Cgroup::at(&path)
                .and_then(|cgroup| cgroup.remove())
                .map_err(io_at("remove cgroup", Path::new(&path)))?;
        }
        Ok(())
    })
    .await
    .unwrap_or(Err(Error::Panicked))
}

/// A connection to the shim, if it still lives.
async fn live_shim(services: &Services, record: &PodRecord) -> Option<Client> {
    let endpoint = match &record.endpoint {
        Some(endpoint) => endpoint.clone(),
        None => {
            let address = services.shims.pod_bundle(&record.id).address();
            let address = fs::read_to_string(address).ok()?.trim().to_owned();
            Endpoint { address, version: 3 }
        }
    };
    services.shims.connect(&endpoint).await.ok()
}

/// Unmounts what is mounted there, if anything is.
pub(super) fn unmount(path: &Path) -> Result<(), Error> {
    loop {
        // DETACH: a process that hangs in the kernel must not keep the pod from going.
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // There may be one below.
            Ok(()) => {}
            // Not a mount point, or not there at all.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => return Ok(()),
            Err(error) => return Err(io_at("unmount", path)(error.into())),
        }
    }
}

/// Removes a directory that may be gone already. Refuses to follow a mount into somebody's data.
pub(super) async fn remove_dir(path: &Path) -> Result<(), Error> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || match fs::remove_dir_all(&path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io_at("remove", &path)(error)),
    })
    .await
    .unwrap_or(Err(Error::Panicked))
}

//! Containers that are made from a checkpoint: a tar archive, or an image that has one in it.
//!
//! ```text
//! CreateContainer   checkpoint unpacked to <root>/restores/<container>/, base image found or pulled,
//!                   changes of the root put into the writable layer, spec as for any container
//! StartContainer    the OCI runtime restores the processes; then the unpacked checkpoint goes
//! ```
//! The processes are those of the checkpoint: command, environment and user of the request have no
//! say. Its mounts have: criu looks for each by its path, so one that is missing is an error here.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use holdfast_shim::client;
use oci_spec::runtime::Spec;
use tracing::{info, warn};

use super::{
    Error, PodView, Pods, Services, Shared, checkpoint,
    config::{ContainerConfig, PodConfig},
    io_at,
    run::remove_dir,
};
use crate::{
    checkpoint::{
        archive::{self, Found},
        criu,
    },
    error::chain,
    id::{ContainerId, Digest, PodId},
    image::{Image, Mounted, Snapshot, diff, unpack},
    shims::private_dir,
    spec,
};

/// Largest description of a pod's checkpoint, in bytes.
const OPTIONS_MAX: u64 = 1 << 20;

/// Where a checkpoint is.
enum Source {
    Archive(PathBuf),
    Image(Arc<Image>),
}

/// A checkpoint that was unpacked for a container.
pub(super) struct Restore {
    dir: PathBuf,
    found: Found,
    /// The image it was made from.
    pub(super) base: Arc<Image>,
}

impl Restore {
    /// criu's images.
    pub(super) fn images(&self) -> PathBuf {
        self.dir.join(archive::IMAGES)
    }

    /// Where criu writes its log.
    pub(super) fn work(&self) -> PathBuf {
        self.dir.join("work")
    }

    /// Puts what the container had changed into its new root, before it is mounted. Blocks.
    pub(super) fn fill(&self, id: &ContainerId, snapshot: &Snapshot) -> Result<(), Error> {
        let path = self.dir.join(archive::ROOTFS_DIFF);
        let changes = match fs::File::open(&path) {
            Ok(changes) => changes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(io_at("read", &path)(error)),
        };
        snapshot.apply_changes(id, changes).map_err(|source| Error::Changes { source })
    }

    /// Removes from the mounted root what the container had removed. Blocks.
    pub(super) fn prune(&self, root: &Mounted) -> Result<(), Error> {
        let path = self.dir.join(archive::DELETED);
        diff::remove_deleted(root, &self.found.deleted).map_err(io_at("do what is said by", &path))
    }

    /// Puts what was in /dev/shm into the pod's, if nobody has anything there yet. Blocks.
    pub(super) fn fill_shm(&self, shm: &Path) -> Result<(), Error> {
        let path = self.dir.join(archive::SHM);
        let Ok(content) = fs::File::open(&path) else { return Ok(()) };
        let mut entries = fs::read_dir(shm).map_err(io_at("read", shm))?;
        if entries.next().is_some() {
            info!("the pod's /dev/shm is in use: the checkpoint's is not put there");
            return Ok(());
        }
        let root = unpack::open_root(shm).map_err(io_at("open", shm))?;
        use std::os::fd::AsFd;
        unpack::unpack(io::BufReader::new(content), root.as_fd(), None)
            .map(drop)
            .map_err(|error| io_at("unpack", &path)(io::Error::other(chain(&error))))
    }

    /// Whether the new container's configuration is one that criu can restore into.
    pub(super) fn fits(&self, name: &str, spec: &Spec) -> Result<(), Error> {
        let terminal = spec.process().as_ref().and_then(|process| process.terminal());
        let had = self.found.spec.process.terminal;
        if terminal.unwrap_or(false) != had {
            let reason = match had {
                true => "the checkpointed container has a terminal, so tty must be true".to_owned(),
                false => {
                    "the checkpointed container has no terminal, so tty must be false".to_owned()
                }
            };
            return Err(Error::Unfit { name: name.to_owned(), reason });
        }
        let given: BTreeSet<PathBuf> = spec
            .mounts()
            .iter()
            .flatten()
            .map(|mount| spec::clean(&mount.destination().to_string_lossy()))
            .collect();
        let missing: Vec<&str> = self
            .found
            .spec
            .mounts
            .iter()
            .filter(|mount| mount.is_bind() && !given.contains(&spec::clean(&mount.destination)))
            .map(|mount| mount.destination.as_str())
            .collect();
        if !missing.is_empty() {
            let missing = missing.join(", ");
            let reason = format!(
                "the checkpointed container has mounts at {missing}: give a mount for each of them"
            );
            return Err(Error::Unfit { name: name.to_owned(), reason });
        }
        Ok(())
    }
}

fn restores(services: &Services) -> PathBuf {
    services.config.root.join("restores")
}

/// Where a container's checkpoint is unpacked.
pub(super) fn directory(services: &Services, id: &ContainerId) -> PathBuf {
    restores(services).join(id)
}

/// Whether the container is made, and its processes are still to be restored.
pub(super) fn waits(services: &Services, id: &ContainerId) -> bool {
    directory(services, id).is_dir()
}

/// Removes a container's unpacked checkpoint. May be repeated.
pub(super) async fn forget(services: &Services, id: &ContainerId) -> Result<(), Error> {
    remove_dir(&directory(services, id)).await
}

/// Removes the checkpoints of containers that `known` does not know.
pub(super) async fn sweep(services: &Services, known: impl Fn(&ContainerId) -> bool) {
    // Not there: nothing was ever restored.
    let Ok(entries) = fs::read_dir(restores(services)) else { return };
    for entry in entries.flatten() {
        let id = entry.file_name().to_str().and_then(|name| name.parse::<ContainerId>().ok());
        let Some(id) = id.filter(|id| !known(id)) else { continue };
        info!(container = id.short(), "removing a checkpoint that no container is restored from");
        if let Err(error) = forget(services, &id).await {
            warn!(container = id.short(), error = %chain(&error), "it stays until the next start");
        }
    }
}

/// The checkpoint that a container is asked to be made from, if it is.
fn source(services: &Services, config: &ContainerConfig) -> Option<Source> {
    if !config.checkpoint.as_os_str().is_empty() {
        return Some(Source::Archive(config.checkpoint.clone()));
    }
    let image = services.images.find(&config.image)?;
    let marked = |name: &&str| image.annotations.contains_key(*name);
    archive::IMAGE_ANNOTATIONS.iter().any(marked).then_some(Source::Image(image))
}

/// Unpacks the checkpoint that a container is to be made from, if it is one; nothing of it is left
/// on an error.
pub(super) async fn prepare(
    services: &Services,
    view: &PodView,
    id: &ContainerId,
    config: &ContainerConfig,
) -> Result<Option<Restore>, Error> {
    let Some(source) = source(services, config) else { return Ok(None) };
    if view.record.foreign.is_some() {
        return Err(Error::ForeignCheckpoint { handler: view.record.handler.clone() });
    }
    if view.record.config.namespaces.user.is_some() {
        return Err(Error::RestoreUsers { id: view.record.id.clone() });
    }
    let runtime = &view.record.runtime;
    criu::check(runtime, &services.features.of(runtime), services.node.cgroup.mode).await?;
    let dir = directory(services, id);
    let unpacked = async {
        let found = take(services, source, dir.clone()).await?;
        let base = base(services, &found).await?;
        Ok(Restore { dir: dir.clone(), found, base })
    };
    match unpacked.await {
        Ok(restore) => Ok(Some(restore)),
        Err(error) => {
            if let Err(error) = forget(services, id).await {
                warn!(container = id.short(), error = %chain(&error), "not all undone");
            }
            Err(error)
        }
    }
}

async fn take(services: &Services, source: Source, dir: PathBuf) -> Result<Found, Error> {
    let view = match &source {
        Source::Archive(_) => None,
        Source::Image(image) => Some(services.images.view(image)),
    };
    tokio::task::spawn_blocking(move || {
        private_dir(&dir.join("work")).map_err(io_at("make", &dir))?;
        match (&source, view) {
            (Source::Image(image), Some(view)) => {
                let name = image.names.first().cloned().unwrap_or_else(|| image.id.to_string());
                let image_error = |source| Error::Image { name: name.clone(), source };
                let mounted = view.mount(None).map_err(image_error)?;
                match contained(&mounted)? {
                    // `buildah add` of an archive unpacks it; other tools put it in as it is.
                    Some(tar) => Ok(archive::unpack(&tar, &dir)?),
                    None => Ok(archive::copy_out(&name, &mounted, &dir)?),
                }
            }
            (Source::Archive(path), _) => Ok(archive::unpack(path, &dir)?),
            (Source::Image(_), None) => Err(Error::Panicked),
        }
    })
    .await
    .unwrap_or(Err(Error::Panicked))
}

/// The path of the one archive that an image has at its root, if it has nothing else there.
fn contained(root: &Mounted) -> Result<Option<PathBuf>, Error> {
    use std::os::fd::{AsFd, AsRawFd};
    let read = io_at("read the image's", Path::new("/"));
    let Some(top) = root.directory(Path::new("/")).map_err(read)? else { return Ok(None) };
    let names = crate::image::tree::names(top.as_fd());
    let names = names.map_err(io_at("read the image's", Path::new("/")))?;
    let [(name, kind)] = names.as_slice() else { return Ok(None) };
    let is_tar = Path::new(name).extension().is_some_and(|extension| extension == "tar");
    if !is_tar || *kind != rustix::fs::FileType::RegularFile {
        return Ok(None);
    }
    let root = root.as_fd().as_raw_fd();
    Ok(Some(Path::new(&format!("/proc/self/fd/{root}")).join(name)))
}

/// The image that the checkpointed container was made from: the very one, for its files are open.
async fn base(services: &Services, found: &Found) -> Result<Arc<Image>, Error> {
    let config = &found.config;
    let id = [config.rootfs_image_ref.clone(), format!("sha256:{}", config.rootfs_image_ref)]
        .into_iter()
        .find_map(|text| text.parse::<Digest>().ok());
    if let Some(image) = services.images.find(&config.rootfs_image_ref) {
        return Ok(image);
    }
    let names = [&config.rootfs_image_name, &config.rootfs_image];
    let name = names.into_iter().find(|name| !name.is_empty() && !name.starts_with('/'));
    let name = name.ok_or_else(|| Error::NoBase { reference: config.rootfs_image_ref.clone() })?;
    let image = match services.images.find(name) {
        Some(image) => image,
        None => {
            info!(image = name, "pulling the image that a checkpoint was made on");
            let pulled = services.images.pull(name, None, None).await;
            pulled.map_err(|source| Error::Base { name: name.clone(), source })?
        }
    };
    match id {
        Some(id) if id != image.id => Err(Error::OtherBase {
            name: name.clone(),
            found: image.id.to_string(),
            wanted: id.to_string(),
        }),
        _ => Ok(image),
    }
}

/// Why a container was not restored, with what criu says of it.
pub(super) fn failed(services: &Services, id: ContainerId, source: client::Error) -> Error {
    let log = directory(services, &id).join("work").join("restore.log");
    Error::Restore { id, criu: criu::said_in(&log), source }
}

impl Pods {
    /// Makes a pod, and in it the containers of a pod's checkpoint, which are to be started. On an
    /// error nothing is left.
    pub async fn restore_pod(
        &self,
        path: &Path,
        config: PodConfig,
        handler: &str,
        containers: Vec<ContainerConfig>,
    ) -> Shared<(PodId, Vec<(String, ContainerId)>)> {
        let containers = matched(path, containers).map_err(Arc::new)?;
        let there = self.index().keys.contains_key(&super::key(&config));
        let pod = self.run(config, handler).await?;
        let made = containers.into_iter().map(|config| async {
            let name = config.name.clone();
            self.create(pod.as_str(), config).await.map(|id| (name, id))
        });
        let made: Shared<Vec<_>> = futures::future::join_all(made).await.into_iter().collect();
        if made.is_err()
            && !there
            && let Err(error) = self.remove_pod(pod.as_str()).await
        {
            warn!(pod = pod.short(), error = %chain(&*error), "a pod that was not restored is left");
        }
        Ok((pod, made?))
    }
}

/// The containers to make: those of the checkpoint, each with its configuration.
fn matched(path: &Path, configs: Vec<ContainerConfig>) -> Result<Vec<ContainerConfig>, Error> {
    let options = path.join(checkpoint::POD_OPTIONS);
    let wrong = |reason: String| Error::PodCheckpoint { path: path.to_owned(), reason };
    if !path.is_absolute() {
        return Err(wrong("an absolute path is needed".into()));
    }
    let there = match fs::metadata(&options) {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let what =
                format!("it has no {}: it is no checkpoint of a pod", checkpoint::POD_OPTIONS);
            return Err(wrong(what));
        }
        Err(error) => return Err(io_at("read", &options)(error)),
    };
    if !there.is_file() || there.len() > OPTIONS_MAX {
        return Err(wrong(format!("{} is no description", checkpoint::POD_OPTIONS)));
    }
    let json = fs::read(&options).map_err(io_at("read", &options))?;
    let options: checkpoint::PodOptions = serde_json::from_slice(&json)
        .map_err(|error| wrong(format!("{} is not valid: {error}", checkpoint::POD_OPTIONS)))?;
    if options.containers.is_empty() {
        return Err(wrong("it has no containers".into()));
    }
    let mut left: Vec<ContainerConfig> = configs;
    let mut found = Vec::with_capacity(options.containers.len());
    let mut missing = Vec::new();
    for (name, file) in &options.containers {
        if file.is_empty() || file.contains(['/', '\0']) {
            return Err(wrong(format!("the archive of container {name:?} is not a file of it")));
        }
        match left.iter().position(|config| config.name == *name) {
            Some(at) => {
                let mut config = left.swap_remove(at);
                config.checkpoint = path.join(format!("{file}.tar"));
                found.push(config);
            }
            None => missing.push(name.as_str()),
        }
    }
    if !missing.is_empty() {
        missing.sort_unstable();
        let missing = missing.join(", ");
        let reason = format!("container_configs has none for {missing}, which it has");
        return Err(wrong(reason));
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(name: &str) -> ContainerConfig {
        ContainerConfig { name: name.into(), ..ContainerConfig::default() }
    }

    #[test]
    fn containers_are_matched_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let error = matched(path, vec![]).unwrap_err();
        assert!(error.to_string().contains("no checkpoint of a pod"), "{error}");
        let write = |json: &str| fs::write(path.join(checkpoint::POD_OPTIONS), json).unwrap();
        write(r#"{"version":1,"containers":{"b":"2","a":"1"}}"#);
        // One that was not checkpointed is nobody's business here.
        let found = matched(path, vec![config("b"), config("c"), config("a")]).unwrap();
        let found: Vec<_> = found.iter().map(|c| (c.name.as_str(), c.checkpoint.clone())).collect();
        assert_eq!(found, [("a", path.join("1.tar")), ("b", path.join("2.tar"))]);
        let error = matched(path, vec![config("b")]).unwrap_err();
        assert!(error.to_string().contains("none for a"), "{error}");
        write(r#"{"version":1,"containers":{"a":"../1"}}"#);
        matched(path, vec![config("a")]).unwrap_err();
        write("{}");
        matched(path, vec![config("a")]).unwrap_err();
        write("no JSON");
        matched(path, vec![config("a")]).unwrap_err();
        matched(Path::new("relative"), vec![]).unwrap_err();
    }
}

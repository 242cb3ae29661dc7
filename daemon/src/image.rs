//! Images: pulling, unpacking, keeping, and the root file systems made from them.
//!
//! ```text
//! <root>/layers/<number>      unpacked layers, in overlayfs form       (layers, unpack, erofs, tar)
//! <root>/recipes/<number>     how to make a layer's archive again      (recipe)
//! <root>/ingest/<number>      the same on their way                    (pull, registry, archive)
//! <root>/snapshots/<id>       containers' writable layers              (snapshots, overlay)
//! <root>/images/<digest>.json copies of images' records                (store/copies)
//! ```
//! What exists is what the store says. Reads are answered from an immutable index in memory and
//! wait for nothing. A pull is a task of its own: a caller that goes away does not end it, a caller
//! that asks for the same joins it, with whatever credentials either has.
//!
//! Invariant: a record is written after what it names is on disk, and goes before it is removed.
//! An image in the index is complete.
//!
//! Layers that are complete when their pull fails for a reason that may pass, or with the daemon, are kept
//! for `KEEP_UNFINISHED`: the pull that is tried again goes on from there.
//!
//! Removing an image that a container uses succeeds: the image is gone from all lists at once, its
//! layers stay until the last root file system on them is removed.

pub mod archive;
mod attributes;
pub mod authfile;
pub mod commit;
mod connect;
pub mod diff;
pub mod erofs;
mod fit;
pub mod hosts;
mod ids;
pub mod layers;
pub mod manifest;
pub mod names;
pub mod overlay;
mod pipeline;
pub mod policy;
pub mod pull;
pub mod push;
pub mod recipe;
pub mod reference;
pub mod registries;
pub mod registry;
pub mod save;
pub mod snapshots;
pub mod stream;
pub mod tar;
pub mod tarball;
pub mod tls;
pub mod tree;
pub mod unpack;
mod verify;

#[cfg(test)]
mod format_tests;
#[cfg(test)]
mod node_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use futures::{FutureExt, future::BoxFuture};
use holdfast_shim::crash;
use tokio::sync::{oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    layers::{Layer, LayerId, Layers, Reap},
    manifest::{Config, Platform},
    reference::Reference,
    registry::Registries,
    snapshots::{Dirs, Snapshots},
};
pub use self::{
    pull::{LayerProgress, Phase, Progress},
    registry::Auth,
    snapshots::{ImageVolume, Mounted, Owners, Snapshot},
};
use crate::{
    config,
    error::{Kind, Kinded},
    id::{ContainerId, Digest},
    pod::config::{ImageDefaults, Map},
    store::{
        self, Store,
        images::{ImageRecord, StoredImage},
    },
};

/// Why images did not do something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is no reference.
    #[error(transparent)]
    Reference(#[from] reference::Invalid),
    /// The node's registries.conf, or what it says of a name.
    #[error(transparent)]
    Registries(#[from] registries::Error),
    /// The text is no platform.
    #[error("platform {0:?} is not valid: write os/architecture, as linux/amd64")]
    Platform(String),
    /// The state directory.
    #[error("open image store {path}")]
    Open {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What the configuration asks for.
    #[error(
        "layers cannot be kept as EROFS images (images.layer_format): that needs Linux 6.15 with CONFIG_EROFS_FS_BACKED_BY_FILE"
    )]
    NoErofs(#[source] io::Error),
    /// A pull. Shared by all that joined it.
    #[error("pull {reference}")]
    Pull {
        /// What was pulled.
        reference: String,
        /// Why it ended.
        source: Arc<pull::Error>,
    },
    /// An import.
    #[error("import image")]
    Import(#[source] pull::Error),
    /// There is no such image.
    #[error("there is no image {0:?} here")]
    NoImage(String),
    /// A digest is no name to give.
    #[error("{0:?} names a content: a name that can be given to an image is a tag")]
    DigestName(String),
    /// It has files, and no program.
    #[error("{name} is no container image but an artifact of type {kind:?}: {what}")]
    Artifact {
        /// Its id.
        name: Digest,
        /// What it says to be.
        kind: String,
        /// What can be done instead.
        what: &'static str,
    },
    /// It is given by its id, and could go anywhere.
    #[error("image {0:?} has no such name: say as what it is to be pushed")]
    NoName(String),
    /// A push.
    #[error("push {reference}")]
    Push {
        /// As what.
        reference: String,
        /// Why it ended.
        source: push::Error,
    },
    /// An archive of images that are here.
    #[error("save images")]
    Save(#[source] save::Error),
    /// The container has no writable layer that could become an image.
    #[error("container {0} has no root file system here")]
    NoSnapshot(ContainerId),
    /// A container's changes.
    #[error("make an image of container {id}")]
    Commit {
        /// The container.
        id: ContainerId,
        /// Why.
        source: commit::Error,
    },
    /// The container's root file system was made from another image.
    #[error("container {id} has a root file system from image {image}")]
    OtherSnapshot {
        /// The container.
        id: ContainerId,
        /// The image.
        image: Digest,
    },
    /// The image was removed in the meantime.
    #[error("image {0} is not here")]
    Gone(Digest),
    /// Directories of a root file system.
    #[error("{doing} root file system of container {id}")]
    Snapshot {
        /// "make" or "remove".
        doing: &'static str,
        /// The container.
        id: ContainerId,
        /// Why.
        source: io::Error,
    },
    /// A mount of layers.
    #[error("mount layers with {path}")]
    Mount {
        /// The writable layer, or where the layers are.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The layers cannot be given to a user namespace.
    #[error(
        "user namespaces need id-mapped mounts: this kernel, or the file system of {path}, does not allow them"
    )]
    Unmapped {
        /// The writable layer, or where the layers are.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The mount point.
    #[error("attach root file system at {target}")]
    Attach {
        /// The mount point.
        target: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The record.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The daemon ends.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// The daemon ends, and what was asked for with it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the daemon is shutting down")]
pub struct Stopped;

/// Why a pull failed, where the kubelet makes a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullFailure {
    /// The policy refuses the image.
    Signature,
    /// No server answers.
    Unavailable,
}

impl Error {
    /// Why a pull failed, where the kubelet makes a difference.
    pub fn pull_failure(&self) -> Option<PullFailure> {
        let Error::Pull { source, .. } = self else { return None };
        match &**source {
            pull::Error::Policy(policy::Error::Refused { .. }) => Some(PullFailure::Signature),
            pull::Error::Registry(registry) if registry.is_unreachable() => {
                Some(PullFailure::Unavailable)
            }
            _ => None,
        }
    }
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Reference(_) | Error::Platform(_) => Kind::Invalid,
            Error::Registries(e) => e.kind(),
            Error::DigestName(_) | Error::NoName(_) | Error::Artifact { .. } => Kind::Invalid,
            Error::Push { source, .. } => source.kind(),
            Error::NoImage(_) | Error::NoSnapshot(_) => Kind::NotFound,
            Error::Commit { source, .. } => match source {
                commit::Error::Read { source, .. } | commit::Error::Write(source) => {
                    Kind::of_disk(source)
                }
                commit::Error::Refused { .. } => Kind::Precondition,
                commit::Error::Config(_) => Kind::Internal,
            },
            Error::Save(e) => e.kind(),
            Error::Pull { source, .. } => source.kind(),
            Error::Import(source) => source.kind(),
            Error::OtherSnapshot { .. } => Kind::AlreadyExists,
            Error::Gone(_) => Kind::NotFound,
            Error::Unmapped { .. } | Error::NoErofs(_) => Kind::Precondition,
            Error::Open { source, .. }
            | Error::Snapshot { source, .. }
            | Error::Mount { source, .. }
            | Error::Attach { source, .. } => Kind::of_disk(source),
            Error::Store(e) => e.kind(),
            Error::Stopped(_) => Kind::Unavailable,
        }
    }
}

/// An image that is complete on this node.
#[derive(Clone, Debug)]
pub struct Image {
    /// Digest of its config: what the CRI calls image id and image ref.
    pub id: Digest,
    /// Tag references, normalised, sorted ("repo tags").
    pub names: Vec<String>,
    /// Digest references, normalised, sorted ("repo digests").
    pub digests: Vec<String>,
    /// Layers as they were sent, config and manifest, in bytes.
    pub size: u64,
    /// What containers inherit.
    pub defaults: ImageDefaults,
    /// The kubelet must not collect it.
    pub pinned: bool,
    /// Annotations of its manifest.
    pub annotations: Map,
    /// Whom it is for.
    pub platform: Platform,
    /// When it was made, as its config writes it; may be empty.
    pub created: String,
    /// What it says to be, if it is no container image but an artifact: files.
    pub artifact: Option<String>,
    /// When it came to this node.
    pub added: SystemTime,
    layers: Vec<Arc<Layer>>,
}

impl Image {
    /// Its layers, from the bottom.
    pub fn layers(&self) -> Vec<LayerId> {
        self.layers.iter().map(|layer| layer.id()).collect()
    }

    /// Digests of its uncompressed layers, from the bottom.
    pub fn diff_ids(&self) -> Vec<Digest> {
        self.layers.iter().map(|layer| layer.diff_id.clone()).collect()
    }

    /// An error if it is an artifact; `what` can be done instead.
    fn check_kind(&self, what: &'static str) -> Result<(), Error> {
        match &self.artifact {
            None => Ok(()),
            Some(kind) => Err(Error::Artifact { name: self.id.clone(), kind: kind.clone(), what }),
        }
    }

    /// Handles of its layers, from the bottom, which keep them on disk. [`Layer::archive`] makes
    /// their archives again.
    pub fn hold_layers(&self) -> Vec<Arc<Layer>> {
        self.layers.clone()
    }
}

/// What the layers take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsUsage {
    /// Where they are.
    pub mountpoint: PathBuf,
    /// Bytes, by blocks of 4 KiB.
    pub used_bytes: u64,
    /// Files, directories and so on.
    pub inodes_used: u64,
}

/// A pull that is under way.
pub struct Flight {
    /// How far it is. Closes when it ends.
    pub progress: watch::Receiver<Progress>,
    /// How it ends. Dropping it ends nothing.
    pub done: BoxFuture<'static, Result<Arc<Image>, Error>>,
    /// While one of them is kept the pull goes on, even if nobody else wants it.
    pub hold: Hold,
}

/// A full reference, and the servers that would be asked for it.
pub type Resolved = (Reference, Result<Vec<registry::Endpoint>, registry::Error>);

/// Who wants a pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// One that asks again if it goes away, as a kubelet that is restarted: the pull goes on.
    Lasting,
    /// Somebody at a terminal: a pull that only such callers want ends with the last of them.
    Watching,
}

/// The interest of a caller in a pull.
pub struct Hold {
    shared: Arc<Shared>,
    key: (String, String),
    flight: u64,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut flights = self.shared.flights.lock().expect("no panic while it is held");
        // Whoever asks from now on gets a new one.
        if let Some(running) = flights.get_mut(&self.key)
            && running.number == self.flight
        {
            running.watching -= 1;
            if running.watching == 0 && !running.lasting {
                running.cancel.cancel();
                flights.remove(&self.key);
            }
        }
    }
}

/// A handle to all images; clones share them.
#[derive(Clone)]
pub struct Images {
    shared: Arc<Shared>,
}

type Outcome = Result<Arc<Image>, Arc<pull::Error>>;

/// A flight as it is kept: all may wait for it.
#[derive(Clone)]
struct Running {
    number: u64,
    progress: watch::Receiver<Progress>,
    done: futures::future::Shared<BoxFuture<'static, Outcome>>,
    cancel: CancellationToken,
    /// It is wanted whoever goes away.
    lasting: bool,
    /// Holds that are kept.
    watching: usize,
}

struct Shared {
    root: PathBuf,
    config: config::Images,
    store: Store,
    registries: Arc<Registries>,
    layers: Layers,
    snapshots: Snapshots,
    index: ArcSwap<Index>,
    /// Layers of pulls that were interrupted; holding them keeps them on disk.
    unfinished: Mutex<Vec<Arc<Layer>>>,
    /// Names of images that were incomplete when the records were read.
    lost: Mutex<Vec<Vec<String>>>,
    verification: verify::Progress,
    /// Held over record and index, so that both change in the same order.
    writer: tokio::sync::Mutex<()>,
    /// By normalised references and platform.
    flights: Mutex<HashMap<(String, String), Running>>,
    /// Numbers flights.
    next_flight: std::sync::atomic::AtomicU64,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// How long layers of a pull that was interrupted wait for the next one. A kubelet tries again within
/// five minutes.
const KEEP_UNFINISHED: Duration = Duration::from_secs(15 * 60);

/// What to do with an artifact that is to be given away.
const ELSEWHERE: &str = "its files can be used here, and copied from its registry";

/// What is visible. Never changed, only replaced.
#[derive(Clone, Default)]
struct Index {
    images: BTreeMap<Digest, Arc<Image>>,
    /// By tag and digest reference: the image, and what the registry said the name stands for.
    names: HashMap<String, (Digest, String)>,
}

/// An image that is on disk and synced, to become visible.
struct NewImage {
    id: Digest,
    config: Config,
    config_bytes: Vec<u8>,
    manifest: Option<(Digest, Vec<u8>)>,
    annotations: Map,
    size: u64,
    layers: Vec<Arc<Layer>>,
    names: Vec<(String, String)>,
}

impl Images {
    /// Loads the records below `root`, and has removed what no record names: leftovers of a crash.
    /// Leftovers that are mounted are kept: then records were lost, and containers live on.
    pub async fn open(root: &Path, config: config::Images, store: Store) -> Result<Self, Error> {
        let registries = Registries::new(config.clone());
        Self::open_with(root, config, store, registries).await
    }

    async fn open_with(
        root: &Path,
        config: config::Images,
        store: Store,
        registries: Registries,
    ) -> Result<Self, Error> {
        let dirs = Dirs::new(root);
        let stored = store.load_images().await?;
        let named = stored.layers.iter().map(|layer| layer.number).collect::<HashSet<_>>();
        let containers =
            stored.snapshots.iter().map(|s| s.container.clone()).collect::<HashSet<_>>();
        let found = {
            let dirs = dirs.clone();
            blocking(move || Found::look(&dirs, &named, &containers)).await?
        };
        let found = found.map_err(|source| Error::Open { path: root.to_owned(), source })?;
        if config.layer_format == config::LayerFormat::Erofs {
            let scratch = dirs.ingest();
            blocking(move || erofs::probe(&scratch)).await?.map_err(Error::NoErofs)?;
        }
        let layers = Layers::new(root, found.next, store.clone());
        let mut unfinished = Vec::new();
        for path in &found.leftovers {
            let number = path.file_name().and_then(|name| name.to_str()?.parse().ok());
            if path.parent() == Some(&dirs.layers())
                && let Some(layer) = number.and_then(|number| layers.adopt(number))
            {
                tracing::info!(?layer, "layer of an interrupted pull is kept");
                unfinished.push(layer);
            }
        }
        let kept: HashSet<String> = unfinished.iter().map(|layer| layer.id().to_string()).collect();
        for path in found.leftovers {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.parent() != Some(&dirs.ingest()) && kept.contains(&*name) {
                continue;
            }
            tracing::info!(path = %path.display(), "leftover is removed");
            layers.reap(Reap::Path(path));
        }

        let mut restored = HashMap::new();
        for record in stored.layers {
            if found.missing.contains(&record.number) {
                continue;
            }
            let Ok(diff_id) = record.diff_id.parse::<Digest>() else { continue };
            restored.insert(record.number, layers.restore(record, diff_id));
        }
        let mut index = Index::default();
        let mut lost = Vec::new();
        for image in stored.images {
            let id = image.id.clone();
            let called = image.names.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
            match restore(image, &restored) {
                Some((image, names)) => {
                    for (name, target) in names {
                        index.names.insert(name, (image.id.clone(), target));
                    }
                    index.images.insert(image.id.clone(), Arc::new(image));
                }
                None => {
                    // Nothing incomplete is shown; the next pull brings it back.
                    tracing::error!(image = id, "image is incomplete on disk and is forgotten");
                    lost.push(called);
                    if let Ok(id) = id.parse() {
                        store.remove_image(&id).await?;
                    }
                }
            }
        }
        let snapshots = Snapshots::new(dirs, store.clone());
        for snapshot in stored.snapshots {
            let held: Option<Vec<_>> =
                snapshot.layers.iter().map(|number| restored.get(number).cloned()).collect();
            if let Some((container, _)) = snapshot.container.split_once('/') {
                if let (Ok(id), Ok(image)) = (container.parse(), snapshot.image.parse()) {
                    let here = snapshot.layers.iter().filter_map(|n| restored.get(n).cloned());
                    snapshots.restore_volume(id, image, here.collect());
                }
                continue;
            }
            let (Ok(id), Ok(image)) = (snapshot.container.parse(), snapshot.image.parse()) else {
                continue;
            };
            if held.is_none() {
                tracing::error!(container = %id, "root file system has lost layers");
            }
            snapshots.restore(id, image, held);
        }
        let images = Self {
            shared: Arc::new(Shared {
                root: root.to_owned(),
                config,
                store,
                registries: Arc::new(registries),
                layers,
                snapshots,
                index: ArcSwap::from_pointee(index),
                unfinished: Mutex::default(),
                lost: Mutex::new(lost),
                verification: verify::Progress::default(),
                writer: tokio::sync::Mutex::default(),
                flights: Mutex::default(),
                next_flight: Default::default(),
                tasks: TaskTracker::new(),
                stop: CancellationToken::new(),
            }),
        };
        images.shared.keep_unfinished(unfinished);
        Ok(images)
    }

    /// Pulls an image, or joins a pull of it that is under way. `platform` is
    /// "os/architecture[/variant]"; `None`: the node's. Dropping the future does not end the pull.
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<Auth>,
        platform: Option<&str>,
    ) -> Result<Arc<Image>, Error> {
        self.pull_with_progress(reference, auth, platform, Caller::Lasting)?.done.await
    }

    /// The same, watched. Must be called in the daemon's runtime.
    pub fn pull_with_progress(
        &self,
        reference: &str,
        auth: Option<Auth>,
        platform: Option<&str>,
        caller: Caller,
    ) -> Result<Flight, Error> {
        let references = self.shared.registries.conf()?.candidates(reference)?;
        let platform = match platform {
            None | Some("") => Platform::node(),
            Some(text) => Platform::parse(text).ok_or_else(|| Error::Platform(text.to_owned()))?,
        };
        let names = references.iter().map(Reference::to_string).collect::<Vec<_>>();
        let text = names.join(" or ");
        let key = (text.clone(), platform.to_string());
        let running = {
            let mut flights = self.shared.flights.lock().expect("no panic while it is held");
            let running = flights.entry(key.clone()).or_insert_with(|| {
                self.shared.clone().take_off(key.clone(), references, auth, platform)
            });
            running.lasting |= caller == Caller::Lasting;
            running.watching += 1;
            running.clone()
        };
        let hold = Hold { shared: self.shared.clone(), key, flight: running.number };
        let done = running.done;
        let done =
            async move { done.await.map_err(|source| Error::Pull { reference: text, source }) };
        Ok(Flight { progress: running.progress, done: done.boxed(), hold })
    }

    /// The full references that a text stands for, in order of trying, each with the servers that
    /// would be asked for it. Asks none of them.
    pub async fn resolve(&self, reference: &str) -> Result<Vec<Resolved>, Error> {
        let mut resolved = Vec::new();
        for reference in self.shared.registries.conf()?.candidates(reference)? {
            let remote = self.shared.registries.remote(&reference, None).await;
            resolved.push((reference, remote.map(|remote| remote.endpoints())));
        }
        Ok(resolved)
    }

    /// All images, by id. Waits for nothing.
    pub fn list(&self) -> Vec<Arc<Image>> {
        self.shared.index.load().images.values().cloned().collect()
    }

    /// The image that a text means: an id with or without "sha256:", a reference in any form that
    /// [`Reference`] takes, or a prefix of an id, of 6 digits or more, that no other id has.
    pub fn find(&self, any: &str) -> Option<Arc<Image>> {
        let index = self.shared.index.load();
        if let Ok(id) = any.parse::<Digest>() {
            return index.images.get(&id).cloned();
        }
        if let Ok(id) = format!("sha256:{any}").parse::<Digest>() {
            return index.images.get(&id).cloned();
        }
        for reference in self.meanings(any) {
            if let Some((id, _)) = index.names.get(&reference.to_string()) {
                return index.images.get(id).cloned();
            }
        }
        let prefix = any.strip_prefix("sha256:").unwrap_or(any);
        if prefix.len() < 6 || !prefix.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let mut matching = index.images.values().filter(|image| image.id.hex().starts_with(prefix));
        let found = matching.next()?;
        matching.next().is_none().then(|| found.clone())
    }

    /// References that a text may stand for; none if it is no reference.
    fn meanings(&self, any: &str) -> Vec<Reference> {
        if Reference::is_short(any)
            && let Ok(conf) = self.shared.registries.conf()
            && let Ok(references) = conf.candidates(any)
        {
            return references;
        }
        any.parse().into_iter().collect()
    }

    /// Removes an image with all its names, by any text that [`Images::find`] takes. That it is
    /// not here is no error. Containers made from it keep its layers.
    pub async fn remove(&self, any: &str) -> Result<(), Error> {
        let Some(image) = self.find(any) else { return Ok(()) };
        let shared = self.shared.clone();
        // Not ended by a caller that goes away between record and index.
        let id = image.id.clone();
        // The caller's own handle must not keep the layers.
        drop(image);
        // Somebody wants room.
        shared.let_go_of_unfinished();
        joined(self.shared.tasks.spawn(async move {
            let _writer = shared.writer.lock().await;
            shared.store.remove_image(&id).await?;
            crash::point("daemon.remove-image.forgotten");
            let mut index = Index::clone(&shared.index.load());
            index.images.remove(&id);
            index.names.retain(|_, (image, _)| *image != id);
            shared.index.store(Arc::new(index));
            Ok(())
        }))
        .await?
    }

    /// Imports the images of a tar archive (OCI layout, or what `docker save` writes), which may be
    /// compressed. `name` is for an image that has none in the archive.
    pub async fn import(
        &self,
        archive: impl tokio::io::AsyncRead + Send + Unpin + 'static,
        name: Option<&str>,
    ) -> Result<Vec<Arc<Image>>, Error> {
        let name = name.map(str::parse::<Reference>).transpose()?;
        let result = archive::import(&self.shared, archive, name).await;
        if result.is_err() {
            self.shared.layers.flush().await;
        }
        result.map_err(Error::Import)
    }

    /// Writes an archive of images, each named as [`Images::find`] takes it. An image that is
    /// given by a tag is written with that name alone, one that is given by its id with all.
    pub async fn save(
        &self,
        names: &[String],
        format: save::Format,
        out: impl io::Write + Send + 'static,
    ) -> Result<(), Error> {
        let mut images: Vec<save::Whole> = Vec::new();
        for any in names {
            let image = self.find(any).ok_or_else(|| Error::NoImage(any.clone()))?;
            image.check_kind(ELSEWHERE)?;
            let meant: Vec<String> = self.meanings(any).iter().map(ToString::to_string).collect();
            let tag = image.names.iter().find(|name| meant.contains(name));
            let tags = tag.map_or_else(|| image.names.clone(), |tag| vec![tag.clone()]);
            match images.iter_mut().find(|other| other.image.id == image.id) {
                Some(other) => {
                    let new: Vec<_> =
                        tags.into_iter().filter(|t| !other.names.contains(t)).collect();
                    other.names.extend(new);
                }
                None => {
                    let documents = self.shared.store.image_documents(&image.id).await?;
                    let (_, config) = documents.ok_or_else(|| Error::Gone(image.id.clone()))?;
                    images.push(save::Whole { image, config, names: tags });
                }
            }
        }
        let shared = self.shared.clone();
        blocking(move || save::write(&shared.layers, &images, format, out))
            .await?
            .map_err(Error::Save)
    }

    /// What all layers take: kept counters.
    pub fn fs_usage(&self) -> FsUsage {
        let (used_bytes, inodes_used) = self.shared.layers.usage();
        FsUsage { mountpoint: self.shared.root.clone(), used_bytes, inodes_used }
    }

    /// The config of an image as it was sent.
    pub async fn raw_config(&self, image: &Image) -> Result<String, Error> {
        let documents = self.shared.store.image_documents(&image.id).await?;
        let (_, config) = documents.ok_or_else(|| Error::Gone(image.id.clone()))?;
        Ok(String::from_utf8_lossy(&config).into_owned())
    }

    /// Makes the root file system of a container. Doing it again gives the same one.
    pub async fn create_snapshot(
        &self,
        id: &ContainerId,
        image: &Image,
    ) -> Result<Snapshot, Error> {
        image
            .check_kind("a container cannot be made of it, but can mount it as an image volume")?;
        let (shared, id) = (self.shared.clone(), id.clone());
        let (image, layers) = (image.id.clone(), image.layers.clone());
        joined(
            self.shared
                .tasks
                .spawn(async move { shared.snapshots.create(&id, &image, layers).await }),
        )
        .await?
    }

    /// The root file system of a container.
    pub fn snapshot(&self, id: &ContainerId) -> Option<Snapshot> {
        self.shared.snapshots.get(id)
    }

    /// Keeps the layers of an image that a container mounts by its mount of this number, for as long
    /// as the container has a root file system.
    pub async fn hold_volume(
        &self,
        id: &ContainerId,
        mount: usize,
        image: &Image,
    ) -> Result<ImageVolume, Error> {
        let (shared, id) = (self.shared.clone(), id.clone());
        let (image, layers) = (image.id.clone(), image.layers.clone());
        joined(
            self.shared
                .tasks
                .spawn(async move { shared.snapshots.hold(&id, mount, &image, layers).await }),
        )
        .await?
    }

    /// An image's files, to be looked at now: its layers stay for as long as what is returned.
    pub fn view(&self, image: &Image) -> ImageVolume {
        self.shared.snapshots.view(image.layers.clone())
    }

    /// Removes the root file system of a container, which must be unmounted, and lets go of its
    /// image volumes. That there is none is no error.
    pub async fn remove_snapshot(&self, id: &ContainerId) -> Result<(), Error> {
        let (shared, id) = (self.shared.clone(), id.clone());
        joined(self.shared.tasks.spawn(async move { shared.snapshots.remove(&id).await })).await?
    }

    /// Containers that have a root file system or image volumes.
    pub fn snapshots(&self) -> Vec<ContainerId> {
        self.shared.snapshots.ids()
    }

    /// Ends all pulls and waits for what must not be interrupted. Their complete layers stay for the next
    /// start.
    pub async fn shutdown(&self) {
        self.shared.layers.close();
        self.shared.stop.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        self.shared.layers.flush().await;
    }

    /// Waits until what was let go so far is removed from the disk.
    #[doc(hidden)]
    pub async fn flush(&self) {
        self.shared.layers.flush().await;
    }
}

impl Shared {
    /// Starts a pull. It removes itself from the flights when it ends.
    fn take_off(
        self: Arc<Self>,
        key: (String, String),
        references: Vec<Reference>,
        auth: Option<Auth>,
        platform: Platform,
    ) -> Running {
        let (progress, watched) = watch::channel(Progress::default());
        let (landed, done) = oneshot::channel();
        let number = self.next_flight.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let cancel = CancellationToken::new();
        let (shared, cancelled) = (self.clone(), cancel.clone());
        self.tasks.spawn(async move {
            let landing = Landing { shared: shared.clone(), key, number };
            let counted = crate::metrics::Pull::begin();
            let unpackers = TaskTracker::new();
            let limit = shared.config.pull_timeout;
            let pull = async {
                let mut errors = pull::Tried::default();
                // More than one only for a short name: the first that has it is meant.
                for reference in &references {
                    let auth = auth.as_ref();
                    let get =
                        pull::pull(&shared, reference, auth, &platform, &progress, &unpackers);
                    match get.await {
                        Ok(image) => return Ok(image),
                        Err(error) => errors.add(reference, error),
                    }
                }
                Err(errors.into_error())
            };
            let outcome = tokio::select! {
                biased;
                // First: a daemon that ends does not begin anything.
                () = shared.stop.cancelled() => Err(pull::Error::Stopped(Stopped)),
                () = cancelled.cancelled() => Err(pull::Error::Cancelled),
                outcome = tokio::time::timeout(limit, pull) => match outcome {
                    Ok(outcome) => outcome,
                    Err(_) => Err(pull::Error::Deadline(limit)),
                },
            };
            match &outcome {
                Ok(image) => {
                    tracing::info!(name = landing.key.0, image = %image.id, "image pulled")
                }
                // Nothing is left behind when the caller hears of it.
                Err(error) => {
                    unpackers.close();
                    unpackers.wait().await;
                    if matches!(error, pull::Error::Cancelled) || error.kind() == Kind::Exhausted {
                        shared.let_go_of_unfinished();
                    }
                    shared.layers.flush().await;
                }
            }
            counted.end(crate::metrics::outcome(&outcome, Kinded::kind));
            drop(landing);
            let _ = landed.send(outcome.map_err(Arc::new));
        });
        let done = async move {
            done.await.unwrap_or_else(|_| Err(Arc::new(pull::Error::Stopped(Stopped))))
        };
        let done = done.boxed().shared();
        Running { number, progress: watched, done, cancel, lasting: false, watching: 0 }
    }

    /// Keeps layers for the pull that is tried again.
    fn keep_unfinished(self: &Arc<Self>, layers: Vec<Arc<Layer>>) {
        if layers.is_empty() {
            return;
        }
        let numbers: HashSet<LayerId> = layers.iter().map(|layer| layer.id()).collect();
        self.unfinished.lock().expect("no panic while it is held").extend(layers);
        let shared = Arc::downgrade(self);
        // A runtime that ends needs no end of their time.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            tokio::time::sleep(KEEP_UNFINISHED).await;
            if let Some(shared) = shared.upgrade() {
                let mut unfinished = shared.unfinished.lock().expect("no panic while it is held");
                unfinished.retain(|layer| !numbers.contains(&layer.id()));
            }
        });
    }

    fn let_go_of_unfinished(&self) {
        self.unfinished.lock().expect("no panic while it is held").clear();
    }

    fn named(&self, name: &str) -> Option<(Arc<Image>, String)> {
        let index = self.index.load();
        let (id, target) = index.names.get(name)?;
        Some((index.images.get(id)?.clone(), target.clone()))
    }

    /// Syncs an image's layers to disk and makes it visible. Runs to its end even if the caller
    /// goes away.
    async fn commit(self: &Arc<Self>, new: NewImage) -> Result<Arc<Image>, pull::Error> {
        let shared = self.clone();
        joined(self.tasks.spawn(async move {
            let syncing = shared.clone();
            blocking(move || syncing.layers.sync()).await?.map_err(pull::Error::Sync)?;
            let _writer = shared.writer.lock().await;
            let image = shared.record(new).await?;
            let recorded = (shared.clone(), image.clone());
            blocking(move || recorded.0.layers.recorded(&recorded.1.layers)).await?;
            Ok(image)
        }))
        .await?
    }

    async fn record(&self, new: NewImage) -> Result<Arc<Image>, pull::Error> {
        let mut index = Index::clone(&self.index.load());
        let added = SystemTime::now();
        let mut image = match index.images.get(&new.id) {
            // The same image by another name; its layers are those it has.
            Some(image) => Image::clone(image),
            None => Image {
                id: new.id.clone(),
                names: Vec::new(),
                digests: Vec::new(),
                size: new.size,
                defaults: new.config.defaults,
                pinned: false,
                annotations: new.annotations.clone(),
                platform: new.config.platform,
                created: new.config.created,
                artifact: new.config.artifact,
                added,
                layers: new.layers,
            },
        };
        let (manifest, manifest_bytes) = new.manifest.unzip();
        let record = ImageRecord {
            size: new.size,
            manifest: manifest.map(|digest| digest.to_string()).unwrap_or_default(),
            annotations: new.annotations,
            pinned: false,
            added: added.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            ..ImageRecord::default()
        };
        let layers = image.layers.iter().map(|layer| layer.record.clone()).collect();
        self.store
            .add_image(
                &new.id,
                record,
                manifest_bytes.unwrap_or_default(),
                new.config_bytes,
                layers,
                new.names.clone(),
            )
            .await?;
        crash::point("daemon.pull.recorded");
        for (name, target) in new.names {
            index.rename(&name, &new.id, target);
            let names = if name.contains('@') { &mut image.digests } else { &mut image.names };
            if let Err(at) = names.binary_search(&name) {
                names.insert(at, name);
            }
        }
        let image = Arc::new(image);
        index.images.insert(new.id, image.clone());
        self.index.store(Arc::new(index));
        Ok(image)
    }
}

/// Takes a flight off the list, also when its task panics.
struct Landing {
    shared: Arc<Shared>,
    key: (String, String),
    number: u64,
}

impl Drop for Landing {
    fn drop(&mut self) {
        let mut flights = self.shared.flights.lock().expect("no panic while it is held");
        // One that was cancelled may have a successor.
        if flights.get(&self.key).is_some_and(|running| running.number == self.number) {
            flights.remove(&self.key);
        }
    }
}

/// An image from its record, or `None` if a layer is missing or the record is not understood.
fn restore(
    stored: StoredImage,
    layers: &HashMap<LayerId, Arc<Layer>>,
) -> Option<(Image, Vec<(String, String)>)> {
    let config = Config::parse(&stored.config).ok()?;
    let on_disk: Vec<Arc<Layer>> =
        stored.layers.iter().map(|number| layers.get(number).cloned()).collect::<Option<_>>()?;
    // Those that the config names: a number alone may have become another's when records were lost.
    if !on_disk.iter().map(|layer| &layer.diff_id).eq(&config.diff_ids) {
        return None;
    }
    let (digests, names) =
        stored.names.iter().map(|(name, _)| name.clone()).partition(|name| name.contains('@'));
    let image = Image {
        id: stored.id.parse().ok()?,
        names,
        digests,
        size: stored.record.size,
        defaults: config.defaults,
        pinned: stored.record.pinned,
        annotations: stored.record.annotations,
        platform: config.platform,
        created: config.created,
        artifact: config.artifact,
        added: UNIX_EPOCH + std::time::Duration::from_secs(stored.record.added),
        layers: on_disk,
    };
    Some((image, stored.names))
}

/// What is on disk, compared with the records.
struct Found {
    /// First free number.
    next: u64,
    /// Directories that no record names and nobody has mounted.
    leftovers: Vec<PathBuf>,
    /// Recorded layers without a directory.
    missing: HashSet<u64>,
}

impl Found {
    fn look(dirs: &Dirs, named: &HashSet<u64>, containers: &HashSet<String>) -> io::Result<Self> {
        dirs.create()?;
        let on_disk: HashSet<u64> = layers::numbered(&dirs.layers())?.into_iter().collect();
        let recipes = layers::numbered(&dirs.recipes())?;
        let ingest = layers::numbered(&dirs.ingest())?;
        let all = named.iter().chain(&on_disk).chain(&recipes).chain(&ingest);
        let next = all.max().map_or(1, |n| n + 1);
        let mut leftovers = Vec::new();
        for entry in std::fs::read_dir(dirs.ingest())? {
            leftovers.push(entry?.path());
        }
        let unnamed = on_disk.difference(named).map(|n| dirs.layers().join(n.to_string()));
        let mut suspects: Vec<PathBuf> = unnamed.collect();
        for entry in std::fs::read_dir(dirs.snapshots())? {
            let entry = entry?;
            if !entry.file_name().to_str().is_some_and(|name| containers.contains(name)) {
                suspects.push(entry.path());
            }
        }
        if !suspects.is_empty() {
            let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
            suspects.retain(|path| !is_mounted(&mounts, path));
            leftovers.append(&mut suspects);
        }
        let unnamed = recipes.into_iter().filter(|number| !named.contains(number));
        leftovers.extend(unnamed.map(|number| dirs.recipes().join(number.to_string())));
        let missing = named.difference(&on_disk).copied().collect();
        Ok(Self { next, leftovers, missing })
    }
}

/// Whether an overlay mount uses `path` or something below it.
fn is_mounted(mountinfo: &str, path: &Path) -> bool {
    let path = path.to_string_lossy();
    mountinfo.lines().filter(|line| line.contains(" - overlay ")).any(|line| {
        line.match_indices(&*path).any(|(at, found)| {
            let next = line[at + found.len()..].chars().next();
            matches!(next, None | Some(':' | ',' | '/' | ' '))
        })
    })
}

/// Runs blocking work; it runs to its end even if the caller goes away.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Stopped> {
    joined(tokio::task::spawn_blocking(work)).await
}

/// The result of a task. Its panic is ours; that it was cancelled means the runtime ends.
async fn joined<T>(task: tokio::task::JoinHandle<T>) -> Result<T, Stopped> {
    match task.await {
        Ok(result) => Ok(result),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(Stopped),
        },
    }
}

//! One pull: from a reference to an image that is on disk and recorded.
//!
//! ```text
//! name -> index -> manifest -> config -> layers, in parallel -> fitted in order -> syncfs -> record
//! ```
//! Nothing is visible before the record. Whatever ends a pull before, its directories go with the
//! handles that it holds.

use std::{
    io::{self, BufRead, BufReader, Read},
    path::PathBuf,
    sync::Arc,
};

use bytes::{Buf, Bytes};
use futures::StreamExt;
use holdfast_shim::crash;
use tokio::sync::{mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Image, NewImage, Shared, Stopped, blocking,
    layers::{Layer, Slot, Staged, chain_id},
    manifest::{self, Config, Descriptor, Document, Manifest, Platform},
    pipeline,
    policy::{self, Transport},
    reference::{Object, Reference},
    registry::{self, Auth, MAX_MANIFEST, Remote},
    stream::{self, Expected},
    unpack,
};
use crate::{
    error::{Kind, Kinded},
    id::Digest,
    store,
};

/// Pieces of a layer that wait for its unpacker, of at most 256 KiB each. Full: the connection is
/// not read, and TCP slows the server.
const QUEUE: usize = 8;

/// Deepest nesting of indexes.
const MAX_DEPTH: usize = 4;

/// Why an image was not pulled or imported.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The registry.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// Manifest or config.
    #[error(transparent)]
    Manifest(#[from] manifest::Error),
    /// A layer's content.
    #[error("layer {layer}")]
    Layer {
        /// Its digest by the manifest, else its diff id.
        layer: Digest,
        /// Why.
        source: stream::Error,
    },
    /// A layer cannot be moved to its place.
    #[error("put layer {layer} in its place")]
    Place {
        /// Its diff id.
        layer: Digest,
        /// Why.
        source: io::Error,
    },
    /// A registry need not have it.
    #[error(
        "layer {layer} is a foreign one, and the registry does not have it: push the image again with its foreign layers (URLs in a manifest are not followed)"
    )]
    Foreign {
        /// Its digest by the manifest.
        layer: Digest,
        /// What the registry says.
        source: registry::Error,
    },
    /// The disk does not take it.
    #[error("sync layers to disk")]
    Sync(#[source] io::Error),
    /// The archive of an import.
    #[error("the archive is not valid: {0}")]
    Archive(String),
    /// The archive of an import cannot be read, or unpacked to disk.
    #[error("read archive")]
    Read(#[source] unpack::Error),
    /// The record.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The policy of the node.
    #[error(transparent)]
    Policy(#[from] policy::Error),
    /// Nobody waits for it any more.
    #[error("the pull was cancelled")]
    Cancelled,
    /// It took too long.
    #[error("the pull was not done within {} s (images.pull_timeout)", .0.as_secs())]
    Deadline(std::time::Duration),
    /// A short name that no registry has.
    #[error("{tried}, and last {name}")]
    Short {
        /// Names that were tried before, with their errors.
        tried: String,
        /// The name that was tried last.
        name: Reference,
        /// Its error.
        source: Box<Error>,
    },
    /// The daemon ends.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// What became of the names that a short name may stand for.
#[derive(Default)]
pub(super) struct Tried(Vec<(Reference, Error)>);

impl Tried {
    pub(super) fn add(&mut self, name: &Reference, error: Error) {
        self.0.push((name.clone(), error));
    }

    /// There must be one.
    pub(super) fn into_error(mut self) -> Error {
        let (name, last) = self.0.pop().expect("there is at least one name");
        if self.0.is_empty() {
            return last;
        }
        let said = self.0.iter().map(|(n, e)| format!("{n}: {}", crate::error::chain(e)));
        let tried = said.collect::<Vec<_>>().join("; then ");
        Error::Short { tried, name, source: Box::new(last) }
    }
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        let unpack = |e: &unpack::Error| match e {
            unpack::Error::Write { source, .. } => Kind::of_disk(source),
            unpack::Error::Tar(_) | unpack::Error::Refused { .. } => Kind::Invalid,
        };
        match self {
            Error::Registry(e) | Error::Foreign { source: e, .. } => e.kind(),
            Error::Policy(e) => e.kind(),
            Error::Manifest(manifest::Error::Unsupported(_)) => Kind::Unsupported,
            Error::Manifest(manifest::Error::Platform { .. }) => Kind::NotFound,
            Error::Manifest(_) | Error::Archive(_) => Kind::Invalid,
            Error::Layer { source, .. } => match source {
                stream::Error::Unpack(e) => unpack(e),
                stream::Error::Directory(e) => Kind::of_disk(e),
                stream::Error::Content { .. }
                | stream::Error::DiffId { .. }
                | stream::Error::Size { .. }
                | stream::Error::TooLarge { .. } => Kind::Invalid,
            },
            Error::Place { source, .. } | Error::Sync(source) => Kind::of_disk(source),
            Error::Read(e) => unpack(e),
            Error::Store(e) => e.kind(),
            Error::Deadline(_) => Kind::Deadline,
            Error::Short { source, .. } => source.kind(),
            Error::Cancelled | Error::Stopped(_) => Kind::Unavailable,
        }
    }
}

/// How far a pull is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// In the manifest's order, from the bottom; empty until the manifest is known.
    pub layers: Vec<LayerProgress>,
}

/// How far a layer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerProgress {
    /// Its digest by the manifest.
    pub digest: Digest,
    /// What it is doing.
    pub phase: Phase,
    /// Compressed bytes received.
    pub received: u64,
    /// Compressed bytes by the manifest.
    pub total: u64,
}

/// What a layer is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// For its turn.
    Waiting,
    /// Download and unpack, in one pass.
    Pulling,
    /// It is here.
    Done,
    /// It was here.
    Exists,
}

/// A layer that an image needs.
pub(super) struct Wanted {
    pub content: Option<(Digest, u64)>,
    pub diff_id: Digest,
    /// Registries need not have it.
    pub foreign: bool,
    /// It is a file of this name, and no archive.
    pub file: Option<String>,
}

impl Wanted {
    /// One that is an archive in a file.
    pub(super) fn archive(diff_id: &Digest) -> Self {
        Self { content: None, diff_id: diff_id.clone(), foreign: false, file: None }
    }
}

/// Where layers come from.
pub(super) enum Source {
    Registry(Remote),
    /// Files by position of the layer.
    Files(Vec<PathBuf>),
}

/// Pulls `reference` for `platform`.
pub(super) async fn pull(
    shared: &Arc<Shared>,
    reference: &Reference,
    auth: Option<&Auth>,
    platform: &Platform,
    progress: &watch::Sender<Progress>,
    unpackers: &TaskTracker,
) -> Result<Arc<Image>, Error> {
    let judge = {
        let (shared, name) = (shared.clone(), reference.clone());
        let policy = move || {
            policy::judge(shared.config.policy.as_deref(), Transport::Registry, Some(&name))
        };
        blocking(policy).await??
    };
    judge.reject(&reference.to_string())?;
    let remote = shared.registries.remote(reference, auth).await?;
    let unchanged = match unchanged(shared, &remote, reference, platform).await? {
        // By the policy of now. If not by this digest, then perhaps by that of its manifest.
        Some((image, target)) => match judge.pulled(&remote, reference, &[&target]).await {
            Ok(()) => Some(image),
            Err(policy::Error::Refused { .. }) => None,
            Err(error) => return Err(error.into()),
        },
        None => None,
    };
    if let Some(image) = unchanged {
        progress.send_modify(|progress| {
            progress.layers = image
                .layers
                .iter()
                .map(|layer| LayerProgress {
                    digest: layer.diff_id.clone(),
                    phase: Phase::Exists,
                    received: 0,
                    total: 0,
                })
                .collect();
        });
        return Ok(image);
    }
    let top = remote.manifest(reference.object()).await?;
    let target = top.digest.clone();
    let (document, manifest, bytes, config) = resolve(&remote, top, platform).await?;
    // Before any layer is asked for.
    let digests = [&target, &document.digest];
    let digests = if target == document.digest { &digests[..1] } else { &digests[..] };
    judge.pulled(&remote, reference, digests).await?;
    let wanted = match &manifest.artifact {
        None => wanted(&manifest.layers, &config)?,
        Some(_) => files(&manifest.layers)?,
    };
    let size = manifest.layers.iter().map(|layer| layer.size).sum::<u64>()
        + manifest.config.size
        + document.bytes.len() as u64;
    let layers = layers(shared, Source::Registry(remote), &wanted, progress, unpackers).await?;
    let by_digest = reference.at(&target);
    let mut names = vec![(by_digest, target.to_string())];
    if let Object::Tag(_) = reference.object() {
        names.push((reference.to_string(), target.to_string()));
    }
    let id = match manifest.artifact {
        None => manifest.config.digest,
        // The config of most artifacts is the same: "{}".
        Some(_) => document.digest.clone(),
    };
    let new = NewImage {
        id,
        config,
        config_bytes: bytes.to_vec(),
        manifest: Some((document.digest, document.bytes.to_vec())),
        annotations: manifest.annotations,
        size,
        layers,
        names,
    };
    shared.commit(new).await
}

/// The image that we have, if the name still stands for it. One HEAD: it also shows that these
/// credentials may have it.
async fn unchanged(
    shared: &Shared,
    remote: &Remote,
    reference: &Reference,
    platform: &Platform,
) -> Result<Option<(Arc<Image>, Digest)>, Error> {
    let Some((image, target)) = shared.named(&reference.to_string()) else { return Ok(None) };
    let config = &image.platform;
    if (config.os.as_str(), config.architecture.as_str())
        != (platform.os.as_str(), platform.architecture.as_str())
    {
        return Ok(None);
    }
    let now = match remote.digest(reference.object()).await {
        Ok(now) => now,
        // Not all that serve manifests know HEAD.
        Err(registry::Error::Status { status, .. }) if status.is_client_error() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(now.filter(|now| now.to_string() == target).map(|now| (image, now)))
}

/// From what a name stands for to one manifest and its config.
async fn resolve(
    remote: &Remote,
    top: registry::Document,
    platform: &Platform,
) -> Result<(registry::Document, Box<Manifest>, Bytes, Config), Error> {
    let mut todo = vec![(top, 1)];
    let mut mismatch = None;
    // Depth first, best candidates first; those without a platform may turn out to be for another.
    while let Some((document, depth)) = todo.pop() {
        match Document::parse(&document.bytes, &document.media_type)? {
            Document::Manifest(manifest) => {
                if let Some(kind) = &manifest.artifact {
                    let bytes = Config::of_artifact(kind, platform);
                    let config = Config::parse(&bytes)?;
                    return Ok((document, manifest, bytes.into(), config));
                }
                let Descriptor { digest, size, .. } = &manifest.config;
                let bytes = remote.small_blob(digest, *size).await?;
                let config = Config::parse(&bytes)?;
                match config.check_platform(platform) {
                    Ok(()) => return Ok((document, manifest, bytes, config)),
                    Err(error) => mismatch = Some(error),
                }
            }
            Document::Index(entries) => {
                if depth > MAX_DEPTH {
                    return Err(too_deep().into());
                }
                let best = match manifest::candidates(&entries, platform) {
                    Ok(candidates) => candidates,
                    Err(error) => {
                        mismatch = Some(error);
                        continue;
                    }
                };
                // Later ones are only of use if earlier ones did not say whom they are for.
                let unsure = best.iter().take_while(|entry| entry.platform.is_none()).count();
                for entry in best.into_iter().take(unsure.clamp(1, 8)).rev() {
                    if entry.size > MAX_MANIFEST {
                        return Err(registry::Error::TooLarge {
                            url: format!("manifest {}", entry.digest),
                            limit: MAX_MANIFEST,
                        }
                        .into());
                    }
                    let object = Object::Digest(entry.digest.clone());
                    todo.push((remote.manifest(&object).await?, depth + 1));
                }
            }
        }
    }
    Err(mismatch.expect("there was at least one document").into())
}

pub(super) fn too_deep() -> manifest::Error {
    manifest::Error::Invalid {
        what: "index",
        rule: format!("indexes are nested deeper than {MAX_DEPTH}"),
    }
}

/// Which layers an image needs.
pub(super) fn wanted(layers: &[Descriptor], config: &Config) -> Result<Vec<Wanted>, Error> {
    if layers.len() != config.diff_ids.len() {
        return Err(manifest::Error::Invalid {
            what: "image config",
            rule: format!(
                "it has {} diff_ids and the manifest {} layers",
                config.diff_ids.len(),
                layers.len()
            ),
        }
        .into());
    }
    Ok(layers
        .iter()
        .zip(&config.diff_ids)
        .map(|(layer, diff_id)| Wanted {
            content: Some((layer.digest.clone(), layer.size)),
            diff_id: diff_id.clone(),
            foreign: manifest::is_foreign(&layer.media_type),
            file: None,
        })
        .collect())
}

/// The files of an artifact.
pub(super) fn files(layers: &[Descriptor]) -> Result<Vec<Wanted>, Error> {
    let names = manifest::file_names(layers)?;
    let layers = layers.iter().zip(names);
    Ok(layers
        .map(|(layer, name)| Wanted {
            content: Some((layer.digest.clone(), layer.size)),
            diff_id: layer.digest.clone(),
            foreign: manifest::is_foreign(&layer.media_type),
            file: Some(name),
        })
        .collect())
}

/// A layer that is here, or one that must be fitted to those below.
enum Got {
    Ready(Arc<Layer>),
    Staged(Box<Staged>),
}

/// Gets all layers, in parallel, and puts them in their places. When this returns an error nothing
/// of it is at work any more. If it is dropped instead, `unpackers` are still to be waited for:
/// threads at work on files, which find their queues closed.
pub(super) async fn layers(
    shared: &Arc<Shared>,
    source: Source,
    wanted: &[Wanted],
    progress: &watch::Sender<Progress>,
    unpackers: &TaskTracker,
) -> Result<Vec<Arc<Layer>>, Error> {
    progress.send_modify(|progress| {
        progress.layers = wanted
            .iter()
            .map(|wanted| {
                let (digest, total) =
                    wanted.content.clone().unwrap_or_else(|| (wanted.diff_id.clone(), 0));
                LayerProgress { digest, phase: Phase::Waiting, received: 0, total }
            })
            .collect();
    });
    let chains: Vec<String> = (0..wanted.len())
        .map(|index| chain_id(wanted[..index].iter().map(|wanted| &wanted.diff_id)))
        .collect();
    let fetch = Fetch { shared, source: &source, unpackers, progress };
    let mut fetches = Vec::with_capacity(wanted.len());
    for (index, wanted) in wanted.iter().enumerate() {
        fetches.push(fetch.layer(index, wanted, &chains[index]));
    }
    let mut work =
        futures::stream::iter(fetches).buffer_unordered(shared.config.max_parallel_layers.max(1));
    let mut got = Vec::with_capacity(wanted.len());
    let mut complete = Complete { shared, layers: Vec::new() };
    let mut failed = None;
    while failed.is_none()
        && let Some(result) = work.next().await
    {
        match result {
            Ok((index, layer)) => {
                if let Got::Ready(layer) = &layer {
                    complete.layers.push(layer.clone());
                }
                got.push((index, layer));
            }
            Err(error) => failed = Some(error),
        }
    }
    drop(work);
    // After an error the other unpackers find their queues closed.
    unpackers.close();
    unpackers.wait().await;
    if let Some(error) = failed {
        // What fails for good is not tried again soon.
        if !matches!(error.kind(), Kind::Unavailable | Kind::Deadline) {
            complete.layers.clear();
        }
        return Err(error);
    }
    got.sort_by_key(|(index, _)| *index);

    let mut placed = Vec::with_capacity(got.len());
    for (index, got) in got {
        let layer = match got {
            Got::Ready(layer) => layer,
            Got::Staged(staged) => {
                let (shared, below) = (shared.clone(), placed.clone());
                blocking(move || shared.layers.place(*staged, &below)).await?.map_err(|source| {
                    Error::Place { layer: wanted[index].diff_id.clone(), source }
                })?
            }
        };
        placed.push(layer);
    }
    complete.layers.clear();
    Ok(placed)
}

/// Layers of a pull that are in their places. If it is dropped, by an error or by somebody who has
/// waited long enough, they are kept for the pull that is tried again.
struct Complete<'a> {
    shared: &'a Arc<Shared>,
    layers: Vec<Arc<Layer>>,
}

impl Drop for Complete<'_> {
    fn drop(&mut self) {
        self.shared.keep_unfinished(std::mem::take(&mut self.layers));
    }
}

/// Opens a layer's content, on the thread that reads it.
type Open = Box<dyn FnOnce() -> Result<Box<dyn BufRead + Send>, stream::Error> + Send>;

struct Fetch<'a> {
    shared: &'a Arc<Shared>,
    source: &'a Source,
    unpackers: &'a TaskTracker,
    progress: &'a watch::Sender<Progress>,
}

impl Fetch<'_> {
    async fn layer(
        &self,
        index: usize,
        wanted: &Wanted,
        below: &str,
    ) -> Result<(usize, Got), Error> {
        let layers = &self.shared.layers;
        // Another pull may be at this very layer: wait and see.
        let _alone = layers.lock(&wanted.diff_id).await;
        let found = match &wanted.file {
            None => layers.find(&wanted.diff_id, below),
            Some(name) => layers.find_file(&wanted.diff_id, name),
        };
        if let Some(layer) = found {
            self.phase(index, Phase::Exists);
            return Ok((index, Got::Ready(layer)));
        }
        self.phase(index, Phase::Pulling);
        let slot = layers.slot(wanted.diff_id.clone());
        let staged = match self.source {
            Source::Registry(remote) => self.download(remote, index, wanted, slot).await?,
            Source::Files(files) => {
                let path = files[index].clone();
                let open: Open = Box::new(move || {
                    let file = std::fs::File::open(path).map_err(stream::Error::Directory)?;
                    Ok(Box::new(BufReader::with_capacity(256 << 10, file)))
                });
                self.unpack(open, wanted, slot, CancellationToken::new()).await??
            }
        };
        self.phase(index, Phase::Done);
        if staged.depends_on_parents() {
            return Ok((index, Got::Staged(Box::new(staged))));
        }
        let (shared, token) = (self.shared.clone(), self.unpackers.token());
        // In this order: the token goes after the layer, should nobody wait for them any more.
        let (placed, _token) = blocking(move || (shared.layers.place(staged, &[]), token)).await?;
        let place = |source| Error::Place { layer: wanted.diff_id.clone(), source };
        Ok((index, Got::Ready(placed.map_err(place)?)))
    }

    async fn download(
        &self,
        remote: &Remote,
        index: usize,
        wanted: &Wanted,
        slot: Slot,
    ) -> Result<Staged, Error> {
        let (digest, size) = wanted.content.as_ref().expect("a registry's manifest has it");
        let (pieces, queue) = mpsc::channel(QUEUE);
        let open: Open = Box::new(move || Ok(Box::new(Pieces::new(queue))));
        let gave_up = CancellationToken::new();
        let unpack = self.unpack(open, wanted, slot, gave_up.clone());
        let feed = async move {
            let mut blob = remote.blob(digest, *size);
            loop {
                let next = tokio::select! {
                    biased;
                    // First: a server that says nothing must not keep an error waiting.
                    () = gave_up.cancelled() => return Ok(()),
                    next = blob.next() => next?,
                };
                let Some(data) = next else { break };
                let length = data.len() as u64;
                crate::metrics::counts().pull_bytes.inc_by(length);
                if pieces.send(Piece::Data(data)).await.is_err() {
                    // The unpacker has given up and says why.
                    return Ok(());
                }
                self.progress.send_modify(|p| p.layers[index].received += length);
            }
            let _ = pieces.send(Piece::End).await;
            Ok::<_, Error>(())
        };
        // Both to their ends: after an error of one the other ends by itself.
        let (unpacked, fed) = futures::join!(unpack, feed);
        // An unpacker that got too little only knows that; the network knows why.
        match fed {
            Err(Error::Registry(source)) if wanted.foreign && source.is_absence() => {
                return Err(Error::Foreign { layer: digest.clone(), source });
            }
            fed => fed?,
        }
        unpacked?
    }

    /// Runs an unpacker on a thread of its own. If nobody waits for it any more it still removes
    /// what it began.
    fn unpack(
        &self,
        open: Open,
        wanted: &Wanted,
        slot: Slot,
        gave_up: CancellationToken,
    ) -> impl Future<Output = Result<Result<Staged, Error>, Stopped>> + use<> {
        let expected = Expected {
            content: wanted.content.clone(),
            diff_id: wanted.diff_id.clone(),
            limit: self.shared.config.max_layer_size,
            format: self.shared.config.layer_format,
            file: wanted.file.clone(),
        };
        let token = self.unpackers.token();
        let work = tokio::task::spawn_blocking(move || {
            let (path, recipe) = (slot.path(), slot.recipe());
            let unpacked = open().and_then(|source| {
                stream::unpack_layer(source, &expected, &path, &recipe, || gave_up.cancel())
            });
            let unpacked = match unpacked {
                Ok(unpacked) => {
                    crash::point("daemon.pull.layer-unpacked");
                    Ok(slot.filled(unpacked))
                }
                Err(source) => {
                    let layer = match expected.content {
                        Some((digest, _)) => digest,
                        None => expected.diff_id,
                    };
                    Err(Error::Layer { layer, source })
                }
            };
            (unpacked, token)
        });
        async move { super::joined(work).await.map(|(unpacked, _token)| unpacked) }
    }

    fn phase(&self, index: usize, phase: Phase) {
        self.progress.send_modify(|progress| {
            let layer = &mut progress.layers[index];
            layer.phase = phase;
            if phase == Phase::Done {
                layer.received = layer.total;
            }
        });
    }
}

/// What goes to an unpacker.
pub(super) enum Piece {
    Data(Bytes),
    /// All is sent. A queue that closes without it was given up.
    End,
}

/// The reading end, for a blocking thread.
pub(super) struct Pieces {
    queue: mpsc::Receiver<Piece>,
    current: Bytes,
    ended: bool,
}

impl Pieces {
    pub(super) fn new(queue: mpsc::Receiver<Piece>) -> Self {
        Self { queue, current: Bytes::new(), ended: false }
    }
}

impl BufRead for Pieces {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() && !self.ended {
            match self.queue.blocking_recv() {
                Some(Piece::Data(data)) => self.current = data,
                Some(Piece::End) => self.ended = true,
                None => return Err(io::Error::other("the download was given up")),
            }
        }
        Ok(&self.current)
    }

    fn consume(&mut self, length: usize) {
        self.current.advance(length);
    }
}

impl Read for Pieces {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        pipeline::read_buffered(self, out)
    }
}

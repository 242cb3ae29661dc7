//! One push: an image that is here, to a registry.
//!
//! ```text
//! layers (there already? taken over from a neighbour? else packed and sent) -> config -> manifest
//! ```
//! The manifest comes last: what a reader of the registry finds is complete.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use super::{
    Image, Images, Shared, blocking,
    layers::Layer,
    manifest::{Descriptor, Document, Manifest},
    reference::{Object, Reference},
    registry::{
        self, Auth, Remote,
        push::{Payload, Sent},
    },
    save,
};
use crate::{
    error::{Kind, Kinded},
    id::Digest,
};

/// Layers that are packed and sent at a time: packing takes a whole CPU.
const PARALLEL: usize = 2;

/// How often the bytes that were sent are told.
const TELL: Duration = Duration::from_millis(200);

/// Why an image was not pushed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The registry.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// The layers.
    #[error(transparent)]
    Save(#[from] save::Error),
    /// It took too long.
    #[error("the push was not done within {} s (images.pull_timeout)", .0.as_secs())]
    Deadline(Duration),
    /// The daemon ends.
    #[error(transparent)]
    Stopped(#[from] super::Stopped),
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Registry(e) => e.kind(),
            Error::Save(e) => e.kind(),
            Error::Deadline(_) => Kind::Deadline,
            Error::Stopped(_) => Kind::Unavailable,
        }
    }
}

/// How far a layer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layered {
    /// Its diff id, and its blob's digest once that is known.
    pub digest: Digest,
    /// What it is doing.
    pub phase: Phase,
    /// Compressed bytes sent.
    pub sent: u64,
    /// Compressed bytes; 0: not known yet.
    pub total: u64,
}

/// What a layer is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// For its turn.
    Waiting,
    /// Its archive is made and compressed.
    Packing,
    /// It is sent.
    Sending,
    /// It is there.
    Done,
    /// It was there.
    Exists,
}

impl Images {
    /// Pushes an image as `to`, or as the name by which it is given. Dropping the future ends it.
    /// The digest of the manifest.
    pub async fn push(
        &self,
        any: &str,
        to: Option<&str>,
        auth: Option<Auth>,
        progress: watch::Sender<Vec<Layered>>,
    ) -> Result<(Reference, Digest), super::Error> {
        let image = self.find(any).ok_or_else(|| super::Error::NoImage(any.to_owned()))?;
        image.check_kind(super::ELSEWHERE)?;
        let conf = self.shared.registries.conf()?;
        let name = match to {
            Some(to) => conf.candidates(to)?.swap_remove(0),
            None => {
                let meant = self.meanings(any);
                let own = meant.into_iter().find(|name| image.names.contains(&name.to_string()));
                own.ok_or_else(|| super::Error::NoName(any.to_owned()))?
            }
        };
        if let Object::Digest(_) = name.object() {
            return Err(super::Error::DigestName(name.to_string()));
        }
        let documents = self.shared.store.image_documents(&image.id).await?;
        let (manifest, config) = documents.ok_or_else(|| super::Error::Gone(image.id.clone()))?;
        let limit = self.shared.config.pull_timeout;
        let push = Push {
            shared: &self.shared,
            image: &image,
            original: original(&manifest),
            progress: &progress,
            stop: StopOnDrop::default(),
        };
        let done = push.run(&name, auth.as_ref(), manifest, config);
        let done = tokio::time::timeout(limit, done).await;
        match done.unwrap_or(Err(Error::Deadline(limit))) {
            Ok(digest) => Ok((name, digest)),
            Err(source) => Err(super::Error::Push { reference: name.to_string(), source }),
        }
    }
}

/// The manifest that the image came with, if it came with one.
fn original(manifest: &[u8]) -> Option<Manifest> {
    match Document::parse(manifest, "") {
        Ok(Document::Manifest(manifest)) => Some(*manifest),
        _ => None,
    }
}

/// Tells threads that nobody waits for them.
#[derive(Default)]
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Push<'a> {
    shared: &'a Arc<Shared>,
    image: &'a Image,
    original: Option<Manifest>,
    progress: &'a watch::Sender<Vec<Layered>>,
    stop: StopOnDrop,
}

/// A layer that is in the registry.
enum There {
    /// As it was pulled.
    AsItCame,
    /// As we packed it.
    Anew(serde_json::Value),
}

impl Push<'_> {
    async fn run(
        &self,
        name: &Reference,
        auth: Option<&Auth>,
        manifest: Vec<u8>,
        config: Vec<u8>,
    ) -> Result<Digest, Error> {
        let remote = self.shared.registries.remote(name, auth).await?.for_push();
        let layers = &self.image.layers;
        self.progress.send_modify(|progress| {
            *progress = layers
                .iter()
                .map(|layer| Layered {
                    digest: layer.diff_id().clone(),
                    phase: Phase::Waiting,
                    sent: 0,
                    total: 0,
                })
                .collect();
        });
        let mut sends = Vec::with_capacity(layers.len());
        for (index, layer) in layers.iter().enumerate() {
            sends.push(self.layer(&remote, name, index, layer));
        }
        let mut there: Vec<(usize, There)> =
            futures::stream::iter(sends).buffer_unordered(PARALLEL).try_collect().await?;
        there.sort_by_key(|(index, _)| *index);

        let config = Bytes::from(config);
        if !remote.has_blob(&self.image.id).await? {
            remote.put_blob(&self.image.id, &Payload::Bytes(config.clone())).await?;
        }
        let as_it_came = there.iter().all(|(_, there)| matches!(there, There::AsItCame));
        let (manifest, media_type) = match &self.original {
            Some(_) if as_it_came => {
                let media_type = media_type(&manifest);
                (manifest, media_type)
            }
            original => {
                let descriptors: Vec<_> = there
                    .into_iter()
                    .map(|(index, there)| match (there, original) {
                        (There::Anew(descriptor), _) => descriptor,
                        (There::AsItCame, Some(original)) => described(&original.layers[index]),
                        (There::AsItCame, None) => unreachable!("it came with no manifest"),
                    })
                    .collect();
                let manifest = save::manifest(self.image, &config, &descriptors);
                (manifest, save::MANIFEST.to_owned())
            }
        };
        let digest = Digest::from_sha256(Sha256::digest(&manifest).into());
        let object = name.object().to_string();
        remote.put_manifest(&object, &media_type, manifest.into()).await?;
        Ok(digest)
    }

    async fn layer(
        &self,
        remote: &Remote,
        name: &Reference,
        index: usize,
        layer: &Arc<Layer>,
    ) -> Result<(usize, There), Error> {
        if let Some(original) = &self.original
            && let Some(blob) = original.layers.get(index)
            // What must not be distributed is not looked for: it becomes a layer like any other.
            && !blob.media_type.contains("nondistributable")
            && !blob.media_type.contains("foreign")
            && self.is_there(remote, name, &blob.digest).await?
        {
            self.tell(index, |layer| {
                layer.digest = blob.digest.clone();
                layer.phase = Phase::Exists;
                (layer.sent, layer.total) = (blob.size, blob.size);
            });
            return Ok((index, There::AsItCame));
        }
        self.tell(index, |layer| layer.phase = Phase::Packing);
        let (shared, held, stop) = (self.shared.clone(), layer.clone(), self.stop.0.clone());
        let packed = blocking(move || save::pack(&shared.layers, &held, true, &stop)).await??;
        let descriptor = packed.descriptor();
        let exists = remote.has_blob(&packed.digest).await?;
        self.tell(index, |layer| {
            layer.digest = packed.digest.clone();
            layer.total = packed.size;
            layer.phase = if exists { Phase::Exists } else { Phase::Sending };
        });
        if !exists {
            let sent = Sent::default();
            let payload = Payload::File(Arc::new(packed.file), packed.size, sent.clone());
            let mut put = std::pin::pin!(remote.put_blob(&packed.digest, &payload));
            let mut tick = tokio::time::interval(TELL);
            loop {
                tokio::select! {
                    biased;
                    done = &mut put => {
                        done?;
                        break;
                    }
                    _ = tick.tick() => {
                        let sent = sent.load(Ordering::Relaxed);
                        self.tell(index, |layer| layer.sent = sent);
                    }
                }
            }
        }
        self.tell(index, |layer| {
            layer.sent = layer.total;
            if layer.phase == Phase::Sending {
                layer.phase = Phase::Done;
            }
        });
        Ok((index, There::Anew(descriptor)))
    }

    /// Whether the registry has a blob, or takes it over from a repository that the image is known
    /// by there.
    async fn is_there(
        &self,
        remote: &Remote,
        name: &Reference,
        digest: &Digest,
    ) -> Result<bool, Error> {
        if remote.has_blob(digest).await? {
            return Ok(true);
        }
        let known = self.image.names.iter().chain(&self.image.digests);
        let neighbour = known.filter_map(|known| known.parse::<Reference>().ok()).find(|known| {
            known.registry() == name.registry() && known.repository() != name.repository()
        });
        match neighbour {
            Some(neighbour) => Ok(remote.mount_blob(digest, neighbour.repository()).await?),
            None => Ok(false),
        }
    }

    fn tell(&self, index: usize, change: impl FnOnce(&mut Layered)) {
        self.progress.send_modify(|progress| change(&mut progress[index]));
    }
}

/// A layer of the image's own manifest, in a manifest of OCI's kind.
fn described(layer: &Descriptor) -> serde_json::Value {
    let media_type = match layer.media_type.as_str() {
        "application/vnd.docker.image.rootfs.diff.tar" => "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip" => save::GZIP,
        "application/vnd.docker.image.rootfs.diff.tar.zstd" => {
            "application/vnd.oci.image.layer.v1.tar+zstd"
        }
        other => other,
    };
    json!({"mediaType": media_type, "digest": layer.digest, "size": layer.size})
}

fn media_type(manifest: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Typed {
        media_type: Option<String>,
    }
    let typed = serde_json::from_slice::<Typed>(manifest).ok().and_then(|typed| typed.media_type);
    typed.unwrap_or_else(|| save::MANIFEST.to_owned())
}

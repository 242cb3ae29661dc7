//! Whether layers are what they were unpacked from: after the machine went down without warning, and after
//! the database was lost.
//!
//! Each layer's archive is made again and must have its digest ([`super::recipe`]), so all content is read. That
//! takes a core and the disk for as long as it takes, on a thread that gives way to everybody else; nothing
//! waits for it. A layer that is damaged takes its images with it, and they are pulled again.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read as _},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::Instant,
};

use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{Error, Images, Index, Shared, joined, layers::Layer, recipe};
use crate::error::chain;

/// Bytes between two looks at whether the daemon ends.
const STEP: u64 = 8 << 20;

/// Least there is (setpriority(2)).
const NICE: i32 = 19;

/// How far it is, for `Status`.
#[derive(Default)]
pub(super) struct Progress(AtomicU8);

impl Progress {
    fn set(&self, text: &str) {
        let index = TEXTS.iter().position(|known| *known == text).unwrap_or_default();
        self.0.store(index as u8, Ordering::Relaxed);
    }
    pub(super) fn get(&self) -> &'static str {
        TEXTS[usize::from(self.0.load(Ordering::Relaxed))]
    }
}

const NOT_NEEDED: &str = "not needed";
const UNDER_WAY: &str = "under way";
const DONE: &str = "done";
const DAMAGED: &str = "done: damaged images were removed";
const TEXTS: [&str; 4] = [NOT_NEEDED, UNDER_WAY, DONE, DAMAGED];

/// What reading a layer came to.
enum Read {
    Whole,
    /// An earlier release unpacked it, and kept nothing to compare it with.
    Unknown,
    /// Why.
    Damaged(String),
    /// The daemon ends.
    Broken,
}

impl Images {
    /// How far the verification of layers is.
    pub fn verification(&self) -> &'static str {
        self.shared.verification.get()
    }

    /// Reads every layer, removes the images whose layers are damaged, and pulls them again. False: it was
    /// broken off, and is to be done again.
    pub async fn verify(&self) -> bool {
        let shared = &self.shared;
        shared.verification.set(UNDER_WAY);
        let begun = Instant::now();
        let mut layers: BTreeMap<u64, Arc<Layer>> = BTreeMap::new();
        for image in self.list() {
            layers.extend(image.layers.iter().map(|layer| (layer.id(), layer.clone())));
        }
        let count = layers.len();
        info!(
            layers = count,
            "verifying all layers, for the machine went down without warning or records were lost"
        );
        let mut lost = Vec::new();
        while let Some((_, layer)) = layers.pop_first() {
            let (of, stop) = (layer.clone(), shared.stop.clone());
            let (said, read) = tokio::sync::oneshot::channel();
            let started = thread::Builder::new().name("verify".into()).spawn(move || {
                let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE);
                let _ = said.send(look(&of, &stop));
            });
            if let Err(error) = started {
                warn!(%error, "layers are not verified until the next start");
                return false;
            }
            match read.await.unwrap_or(Read::Broken) {
                Read::Whole => {}
                Read::Unknown => info!(?layer, "a layer cannot be verified: it has no recipe"),
                Read::Damaged(why) => lost.extend(self.drop_damaged(&layer, why).await),
                Read::Broken => return false,
            }
        }
        shared.verification.set(if lost.is_empty() { DONE } else { DAMAGED });
        info!(layers = count, images = lost.len(), took = ?begun.elapsed(), "layers are verified");
        self.pull_again(lost).await;
        true
    }

    /// Pulls what was found incomplete when the records were read.
    pub async fn pull_lost(&self) {
        let lost =
            std::mem::take(&mut *self.shared.lost.lock().expect("no panic while it is held"));
        self.pull_again(lost).await;
    }

    /// Removes the images that a damaged layer is of; their names.
    async fn drop_damaged(&self, layer: &Arc<Layer>, why: String) -> Vec<Vec<String>> {
        let shared = self.shared.clone();
        let layer = layer.clone();
        let dropped = joined(
            self.shared.tasks.spawn(async move { shared.drop_images_of(&layer, &why).await }),
        )
        .await;
        match dropped {
            Ok(Ok(names)) => names,
            Ok(Err(error)) => {
                error!(
                    error = chain(&error),
                    "a damaged image stays: remove it, and pull it again"
                );
                Vec::new()
            }
            Err(_) => Vec::new(),
        }
    }

    /// By its digest if it has one, for a tag may stand for another image by now. Without anybody's
    /// credentials: what needs some the kubelet pulls, with its own, for the next container of it.
    async fn pull_again(&self, lost: Vec<Vec<String>>) {
        for names in lost {
            let (digests, tags): (Vec<_>, Vec<_>) =
                names.iter().partition(|name| name.contains('@'));
            let mut failed = Vec::new();
            let mut exact = None;
            for name in digests {
                match self.pull(name, None, None).await {
                    Ok(image) => {
                        exact = Some(image.id.clone());
                        info!(image = name, "pulled again");
                        break;
                    }
                    Err(error) => failed.push(chain(&error)),
                }
            }
            for name in tags {
                let again = match &exact {
                    Some(id) => self.shared.name(id, name.clone()).await,
                    None => self.pull(name, None, None).await,
                };
                match again {
                    Ok(_) => info!(image = name, "is here again"),
                    Err(error) => failed.push(chain(&error)),
                }
            }
            if let Some(error) = failed.pop() {
                warn!(
                    image = names.join(", "),
                    error,
                    "not all of it came back: it is pulled for the next container of it, or do it by hand"
                );
            }
        }
    }
}

impl Shared {
    async fn drop_images_of(
        &self,
        layer: &Arc<Layer>,
        why: &str,
    ) -> Result<Vec<Vec<String>>, Error> {
        self.layers.condemn(layer);
        let _writer = self.writer.lock().await;
        let mut index = Index::clone(&self.index.load());
        let mut dropped = Vec::new();
        let of: Vec<_> = index
            .images
            .values()
            .filter(|image| image.layers.iter().any(|other| other.id() == layer.id()))
            .cloned()
            .collect();
        for image in of {
            error!(
                image = %image.id,
                names = image.names.join(", "),
                layer = %layer.diff_id(),
                why,
                "a layer is damaged: its image is removed and pulled again"
            );
            self.store.remove_image(&image.id).await?;
            index.images.remove(&image.id);
            index.names.retain(|_, (id, _)| *id != image.id);
            self.index.store(Arc::new(index.clone()));
            let names: BTreeSet<_> = image.names.iter().chain(&image.digests).cloned().collect();
            dropped.push(names.into_iter().collect());
        }
        for id in self.snapshots.with_layer(layer.id()) {
            warn!(
                container = id.short(),
                layer = %layer.diff_id(),
                "the root file system of a container is on a damaged layer: replace the container"
            );
        }
        Ok(dropped)
    }
}

/// Reads a layer's archive from end to end, which compares its digest.
fn look(layer: &Layer, stop: &CancellationToken) -> Read {
    let mut archive = match layer.archive() {
        Ok(archive) => archive,
        Err(recipe::Error::None(_)) => return Read::Unknown,
        Err(error) => return Read::Damaged(chain(&error)),
    };
    loop {
        if stop.is_cancelled() {
            return Read::Broken;
        }
        match io::copy(&mut (&mut archive).take(STEP), &mut io::sink()) {
            Ok(0) => return Read::Whole,
            Ok(_) => {}
            Err(error) => return Read::Damaged(chain(&error)),
        }
    }
}

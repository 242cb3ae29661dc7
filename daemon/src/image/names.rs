//! Names of images that are here: giving, taking away, and removing what has none or no use.

use std::sync::Arc;

use super::{Error, Image, Images, Index, Shared, joined, reference::Object};
use crate::id::Digest;

/// What a removal by name did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removed {
    /// The image has other names and stays.
    Name(String),
    /// The image is gone, with all its names.
    Image(Digest),
}

impl Images {
    /// Gives an image one more name, which is taken from another if it has it. `any` is what
    /// [`Images::find`] takes. The name in full.
    pub async fn tag(&self, any: &str, name: &str) -> Result<(String, Arc<Image>), Error> {
        let image = self.find(any).ok_or_else(|| Error::NoImage(any.to_owned()))?;
        // What a short name means here is what it will be found as.
        let reference = self.shared.registries.conf()?.candidates(name)?.swap_remove(0);
        if let Object::Digest(_) = reference.object() {
            return Err(Error::DigestName(name.to_owned()));
        }
        let (shared, name) = (self.shared.clone(), reference.to_string());
        let given = name.clone();
        let naming = self.shared.tasks.spawn(async move { shared.name(&image.id, given).await });
        Ok((name, joined(naming).await??))
    }

    /// Takes a tag or digest from its image, and removes the image with the last of its tags; an
    /// image that is named by its id is removed with all its names. That there is no such image is
    /// an error.
    pub async fn remove_name(&self, any: &str) -> Result<Removed, Error> {
        let image = self.find(any).ok_or_else(|| Error::NoImage(any.to_owned()))?;
        let names: Vec<String> = self.meanings(any).iter().map(ToString::to_string).collect();
        let own = image.names.iter().chain(&image.digests).find(|name| names.contains(name));
        let id = image.id.clone();
        let Some(name) = own.cloned() else {
            drop(image);
            self.remove(&id.to_string()).await?;
            return Ok(Removed::Image(id));
        };
        let others = image.names.iter().any(|other| *other != name);
        // The caller's own handle must not keep the layers.
        drop(image);
        if !others {
            self.remove(&id.to_string()).await?;
            return Ok(Removed::Image(id));
        }
        let (shared, gone) = (self.shared.clone(), name.clone());
        joined(self.shared.tasks.spawn(async move { shared.unname(gone).await })).await??;
        Ok(Removed::Name(name))
    }

    /// Removes images that no container was made from and no container mounts: those without a tag,
    /// or with `all` any. Pinned ones stay. What was removed, and the bytes that their layers took.
    pub async fn prune(&self, all: bool) -> Result<(Vec<Arc<Image>>, u64), Error> {
        let used = self.shared.snapshots.images();
        let before = self.fs_usage().used_bytes;
        let mut removed = Vec::new();
        for image in self.list() {
            if image.pinned || used.contains(&image.id) || !all && !image.names.is_empty() {
                continue;
            }
            self.remove(&image.id.to_string()).await?;
            // Of what is told about it nothing keeps its layers.
            removed.push(Arc::new(Image { layers: Vec::new(), ..Image::clone(&image) }));
        }
        Ok((removed, before.saturating_sub(self.fs_usage().used_bytes)))
    }
}

impl Shared {
    pub(super) async fn name(&self, id: &Digest, name: String) -> Result<Arc<Image>, Error> {
        let _writer = self.writer.lock().await;
        let mut index = Index::clone(&self.index.load());
        let mut image = match index.images.get(id) {
            Some(image) => Image::clone(image),
            None => return Err(Error::Gone(id.clone())),
        };
        // No registry said it: the next pull of the name asks anew.
        self.store.add_image_name(id, &name, "").await?;
        index.rename(&name, id, String::new());
        if let Err(at) = image.names.binary_search(&name) {
            image.names.insert(at, name);
        }
        let image = Arc::new(image);
        index.images.insert(id.clone(), image.clone());
        self.index.store(Arc::new(index));
        Ok(image)
    }

    async fn unname(&self, name: String) -> Result<(), Error> {
        let _writer = self.writer.lock().await;
        self.store.remove_image_name(&name).await?;
        let mut index = Index::clone(&self.index.load());
        if let Some((id, _)) = index.names.remove(&name)
            && let Some(image) = index.images.get(&id)
        {
            let mut image = Image::clone(image);
            image.names.retain(|other| *other != name);
            image.digests.retain(|other| *other != name);
            index.images.insert(id, Arc::new(image));
        }
        self.index.store(Arc::new(index));
        Ok(())
    }
}

impl Index {
    /// `name` is of image `id` from now on: another that had it loses it.
    pub(super) fn rename(&mut self, name: &str, id: &Digest, target: String) {
        let before = self.names.insert(name.to_owned(), (id.clone(), target));
        if let Some((other, _)) = before
            && other != *id
            && let Some(loser) = self.images.get(&other)
        {
            let mut loser = Image::clone(loser);
            loser.names.retain(|n| n != name);
            loser.digests.retain(|n| n != name);
            self.images.insert(other, Arc::new(loser));
        }
    }
}

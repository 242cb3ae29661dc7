//! What is made for a container to mount: images, and directories for the volumes that its own image
//! declares.
//!
//! ```text
//! <bundle>/images/<n>             the image of mount n, read-only
//! <root>/volumes/<container>/<n>  volume n of the image
//! ```
//! All of it is found from the container's id alone. The layers of a mounted image are kept by a
//! record, as those of the container's own image are.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use holdfast_shim::bundle::Bundle;
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use tracing::{info, warn};

use super::{
    Error, Services,
    config::{ContainerConfig, ImageDefaults, UserNamespace},
    io_at,
    run::unmount,
};
use crate::{
    error::chain,
    id::ContainerId,
    image::{Image, ImageVolume, Mounted, Owners, tree},
    shims::{passable_dir, private_dir},
    spec::{self, BoundVolume},
};

/// An image that a container mounts.
pub(super) struct Asked {
    /// Which of the container's mounts.
    index: usize,
    image: Arc<Image>,
}

/// An image whose layers are kept for a container.
pub(super) struct Held {
    index: usize,
    volume: ImageVolume,
}

/// Finds the images that the container mounts, and writes down which they are.
pub(super) fn find(services: &Services, config: &mut ContainerConfig) -> Result<Vec<Asked>, Error> {
    let mut asked = Vec::new();
    for (index, mount) in config.mounts.iter_mut().enumerate() {
        let Some(name) = &mount.image else { continue };
        let image = services.images.find(name).ok_or_else(|| Error::NoImage(name.clone()))?;
        mount.image_ref = image.id.to_string();
        asked.push(Asked { index, image });
    }
    Ok(asked)
}

/// Keeps their layers until the container is removed.
pub(super) async fn hold(
    services: &Services,
    id: &ContainerId,
    asked: &[Asked],
) -> Result<Vec<Held>, crate::image::Error> {
    let mut held = Vec::with_capacity(asked.len());
    for Asked { index, image } in asked {
        let volume = services.images.hold_volume(id, *index, image).await?;
        held.push(Held { index: *index, volume });
    }
    Ok(held)
}

fn images(bundle: &Bundle) -> PathBuf {
    bundle.dir().join("images")
}

/// Mounts the images in the bundle. Says what to bind for which mount.
pub(super) fn mount(
    bundle: &Bundle,
    config: &ContainerConfig,
    held: &[Held],
    owners: Option<&Owners>,
) -> Result<Vec<(usize, PathBuf)>, Error> {
    let mut sources = Vec::with_capacity(held.len());
    for Held { index, volume } in held {
        let asked = &config.mounts[*index];
        let image_error = |source| Error::Image { name: config.name.clone(), source };
        let at = images(bundle).join(index.to_string());
        passable_dir(&images(bundle)).map_err(io_at("make", &images(bundle)))?;
        private_dir(&at).map_err(io_at("make", &at))?;
        volume.mount(owners).and_then(|mounted| mounted.attach(&at)).map_err(image_error)?;
        let source = below(&at, &asked.image_sub_path).map_err(|source| Error::SubPath {
            index: *index,
            path: asked.image_sub_path.clone(),
            image: asked.image.clone().unwrap_or_default(),
            source,
        })?;
        sources.push((*index, source));
    }
    Ok(sources)
}

/// Where `path` leads inside the image that is mounted at `root`: links stay inside. Nothing changes
/// an image, so what is found now is what will be bound.
fn below(root: &Path, path: &str) -> io::Result<PathBuf> {
    if Path::new(path).components().all(|part| part == std::path::Component::CurDir) {
        return Ok(root.to_owned());
    }
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root_fd = rustix::fs::openat(CWD, root, directory, Mode::empty())?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let found = match rustix::fs::openat2(&root_fd, path, flags, Mode::empty(), resolve) {
        Ok(found) => found,
        Err(Errno::NOENT | Errno::NOTDIR) => {
            return Err(io::Error::new(io::ErrorKind::NotFound, "it is not in the image"));
        }
        Err(Errno::LOOP) => {
            let text = "its links lead in a circle";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Err(error) => return Err(error.into()),
    };
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode);
    if !matches!(kind, FileType::Directory | FileType::RegularFile) {
        let text = "it is neither a directory nor a file";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
}

/// Unmounts the images of a container. May be repeated.
pub(super) fn unmount_images(bundle: &Bundle) -> Result<(), Error> {
    let dir = images(bundle);
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_at("read", &dir)(error)),
    };
    for entry in entries {
        unmount(&entry.map_err(io_at("read", &dir))?.path())?;
    }
    Ok(())
}

fn volumes(services: &Services) -> PathBuf {
    services.config.root.join("volumes")
}

/// Makes the volumes that the image declares, with what the image has there, unless the container
/// mounts something of its own in their place.
pub(super) fn declared(
    services: &Services,
    id: &ContainerId,
    image: &ImageDefaults,
    config: &ContainerConfig,
    root: &Mounted,
    user: Option<(&UserNamespace, &Owners)>,
) -> Result<Vec<BoundVolume>, Error> {
    let mut taken: BTreeSet<PathBuf> =
        config.mounts.iter().map(|mount| spec::clean(&mount.container_path)).collect();
    // A volume cannot be the root itself.
    taken.insert("/".into());
    let mut made = Vec::new();
    for (index, path) in image.volumes.iter().enumerate() {
        let target = spec::clean(path);
        // Twice at one place is once.
        if !taken.insert(target.clone()) {
            continue;
        }
        let dir = volumes(services).join(id);
        passable_dir(&volumes(services)).map_err(io_at("make", &dir))?;
        owned_dir(&dir, user.map(|(user, _)| user))?;
        let source = dir.join(index.to_string());
        private_dir(&source).map_err(io_at("make", &source))?;
        let volume_error = |source| Error::Volume { path: path.clone(), source };
        match root.directory(&target).map_err(volume_error)? {
            Some(content) => {
                let directory = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let to = rustix::fs::openat(CWD, &source, directory, Mode::empty())
                    .map_err(|e| volume_error(e.into()))?;
                tree::copy(content.as_fd(), to.as_fd()).map_err(volume_error)?;
            }
            None => {
                let (uid, gid) = user.map_or((None, None), |(_, owners)| owners.on_node(0, 0));
                set_mode(&source, 0o755)?;
                std::os::unix::fs::chown(&source, uid, gid).map_err(volume_error)?;
            }
        }
        made.push(BoundVolume { source, target: target.to_string_lossy().into_owned() });
    }
    Ok(made)
}

/// Removes a container's volumes. May be repeated.
pub(super) async fn remove(services: &Services, id: &ContainerId) -> Result<(), Error> {
    let dir = volumes(services).join(id);
    tokio::task::spawn_blocking(move || tree::remove(&dir).map_err(io_at("remove", &dir)))
        .await
        .unwrap_or(Err(Error::Panicked))
}

/// Removes the volumes of containers that `known` does not know.
pub(super) async fn sweep(services: &Services, known: impl Fn(&ContainerId) -> bool) {
    // Not there: no container ever had one.
    let Ok(entries) = fs::read_dir(volumes(services)) else { return };
    for entry in entries.flatten() {
        let id = entry.file_name().to_str().and_then(|name| name.parse::<ContainerId>().ok());
        let Some(id) = id.filter(|id| !known(id)) else { continue };
        info!(container = id.short(), "removing volumes that no container has");
        if let Err(error) = remove(services, &id).await {
            warn!(container = id.short(), error = %chain(&error), "they stay until the next start");
        }
    }
}

/// Makes a directory of a pod's or container's: ours alone, and for the root of its user namespace,
/// if it has one, to go through.
pub(super) fn owned_dir(path: &Path, user: Option<&UserNamespace>) -> Result<(), Error> {
    private_dir(path).map_err(io_at("make", path))?;
    let Some(user) = user else { return Ok(()) };
    let group = user.gids.iter().find(|range| range.container_id == 0).map(|range| range.host_id);
    std::os::unix::fs::chown(path, None, group).map_err(io_at("give", path))?;
    set_mode(path, 0o710)
}

fn set_mode(path: &Path, mode: u32) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(io_at("set the mode of", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sub_path_stays_inside_its_image() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap().join("image");
        fs::create_dir_all(root.join("etc/sub")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(root.join("etc/file"), "").unwrap();
        let link = |to: &str, at: &str| std::os::unix::fs::symlink(to, root.join(at)).unwrap();
        link("/etc/sub", "absolute");
        link("../outside", "up");
        link("../../../etc/sub", "clamped");
        link("loop", "loop");
        assert_eq!(below(&root, "").unwrap(), root);
        assert_eq!(below(&root, "./").unwrap(), root);
        assert_eq!(below(&root, "etc/sub").unwrap(), root.join("etc/sub"));
        assert_eq!(below(&root, "etc/file").unwrap(), root.join("etc/file"));
        assert_eq!(below(&root, "absolute").unwrap(), root.join("etc/sub"));
        assert_eq!(below(&root, "clamped").unwrap(), root.join("etc/sub"));
        for path in ["up", "missing", "etc/file/x", "etc/missing"] {
            let error = below(&root, path).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "{path}");
        }
        assert!(below(&root, "loop").is_err());
    }
}

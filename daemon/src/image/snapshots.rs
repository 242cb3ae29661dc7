//! Containers' root file systems: the layers of an image under one writable layer.

use std::{
    collections::HashMap,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
    mount::MoveMountFlags,
};

use super::{
    Error,
    layers::{self, Layer},
    overlay::Overlay,
    tree, unpack,
};
use crate::{
    id::{ContainerId, Digest},
    store::Store,
};

/// Where everything of images is, and what it is called there.
#[derive(Clone, Debug)]
pub(super) struct Dirs {
    root: PathBuf,
}

impl Dirs {
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }
    /// Makes them. Only root may look in: layers have other people's setuid files and devices.
    pub(super) fn create(&self) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        for path in [self.layers(), self.ingest(), self.snapshots(), self.layers().join(EMPTY)] {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        }
        Ok(())
    }
    pub(super) fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }
    pub(super) fn ingest(&self) -> PathBuf {
        self.root.join("ingest")
    }
    pub(super) fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }
}

/// The layer of images that have none: overlayfs wants one.
const EMPTY: &str = "empty";

/// All snapshots.
pub(super) struct Snapshots {
    dirs: Dirs,
    store: Store,
    known: Mutex<HashMap<ContainerId, Snapshot>>,
}

/// A container's root file system.
#[derive(Clone, Debug)]
pub struct Snapshot {
    image: Digest,
    dirs: Dirs,
    upper: PathBuf,
    work: PathBuf,
    /// From the bottom. Holding them keeps them on disk. `None`: somebody else removed one.
    layers: Option<Arc<[Arc<Layer>]>>,
}

impl Snapshots {
    pub(super) fn new(dirs: Dirs, store: Store) -> Self {
        Self { dirs, store, known: Mutex::default() }
    }

    /// One that a record names.
    pub(super) fn restore(&self, id: ContainerId, image: Digest, layers: Option<Vec<Arc<Layer>>>) {
        let snapshot = self.describe(&id, image, layers);
        self.known.lock().expect("no panic while it is held").insert(id, snapshot);
    }

    fn describe(
        &self,
        id: &ContainerId,
        image: Digest,
        layers: Option<Vec<Arc<Layer>>>,
    ) -> Snapshot {
        let path = self.dirs.snapshots().join(id);
        Snapshot {
            image,
            dirs: self.dirs.clone(),
            upper: path.join("upper"),
            work: path.join("work"),
            layers: layers.map(Into::into),
        }
    }

    pub(super) fn get(&self, id: &ContainerId) -> Option<Snapshot> {
        self.known.lock().expect("no panic while it is held").get(id).cloned()
    }

    pub(super) fn ids(&self) -> Vec<ContainerId> {
        self.known.lock().expect("no panic while it is held").keys().cloned().collect()
    }

    /// Record, memory, directory. What a crash leaves in between is completed by the next call,
    /// or removed.
    pub(super) async fn create(
        &self,
        id: &ContainerId,
        image: &Digest,
        layers: Vec<Arc<Layer>>,
    ) -> Result<Snapshot, Error> {
        let snapshot = match self.get(id) {
            Some(snapshot) if snapshot.image == *image => snapshot,
            Some(snapshot) => {
                return Err(Error::OtherSnapshot { id: id.clone(), image: snapshot.image });
            }
            None => {
                let numbers = layers.iter().map(|layer| layer.id()).collect();
                self.store.add_snapshot(id, image, numbers).await?;
                let snapshot = self.describe(id, image.clone(), Some(layers));
                let mut known = self.known.lock().expect("no panic while it is held");
                known.insert(id.clone(), snapshot.clone());
                snapshot
            }
        };
        let made = snapshot.clone();
        super::blocking(move || made.create_directories())
            .await?
            .map_err(|source| Error::Snapshot { doing: "make", id: id.clone(), source })?;
        Ok(snapshot)
    }

    /// Directory, record, memory: a full disk has room for the record once the directory is gone.
    pub(super) async fn remove(&self, id: &ContainerId) -> Result<(), Error> {
        let path = self.dirs.snapshots().join(id);
        super::blocking(move || tree::remove(&path)).await?.map_err(|source| Error::Snapshot {
            doing: "remove",
            id: id.clone(),
            source,
        })?;
        self.store.remove_snapshot(id).await?;
        self.known.lock().expect("no panic while it is held").remove(id);
        Ok(())
    }
}

impl Snapshot {
    /// Id of the image it was made from.
    pub fn image(&self) -> &Digest {
        &self.image
    }

    /// The writable layer.
    pub fn upper(&self) -> &Path {
        &self.upper
    }

    /// Bytes and inodes of the writable layer. Walks it: blocks.
    pub fn usage(&self) -> io::Result<(u64, u64)> {
        tree::usage(&self.upper)
    }

    fn create_directories(&self) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        let make = |path: &Path| match std::fs::DirBuilder::new().mode(0o755).create(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        };
        // Writable layers have setuid files too: nobody but root gets in this way.
        let parent = self.upper.parent().expect("it is joined to one");
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        make(&self.upper)?;
        make(&self.work)?;
        let upper = unpack::open_root(&self.upper)?;
        // The root directory of the mount is this one: it must look like the image's.
        match self
            .layers
            .iter()
            .flat_map(|layers| layers.iter().rev())
            .find(|layer| layer.record.root_listed)
        {
            Some(layer) => layers::copy_attributes(&unpack::open_root(&layer.path())?, &upper),
            None => Ok(rustix::fs::fchmod(&upper, Mode::from_raw_mode(0o755))?),
        }
    }

    /// Mounts it, attached nowhere yet. Blocks for a moment. A snapshot can be mounted once at a
    /// time.
    pub fn mount(&self, readonly: bool) -> Result<Mounted, Error> {
        let mount = |source| Error::Mount { upper: self.upper.clone(), source };
        let layers = self.layers.as_ref().ok_or_else(|| {
            mount(io::Error::new(io::ErrorKind::NotFound, "a layer of it is gone from the disk"))
        })?;
        let mut lowers = layers::lowers(layers);
        if lowers.is_empty() {
            lowers.push(EMPTY.to_owned());
        }
        let overlay = Overlay {
            layers: &self.dirs.layers(),
            lowers: &lowers,
            writable: Some((&self.upper, &self.work)),
            readonly,
        };
        let fd = overlay.mount(&self.dirs.ingest()).map_err(mount)?;
        Ok(Mounted { fd })
    }
}

/// A mounted root file system. Dropping it unmounts it, unless it was attached.
#[derive(Debug)]
pub struct Mounted {
    fd: OwnedFd,
}

impl AsFd for Mounted {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Mounted {
    /// The content of a regular file as the container would see it (links stay inside), or `None`
    /// if there is none. More than `limit` bytes are an error.
    pub fn read(&self, path: &str, limit: usize) -> io::Result<Option<Vec<u8>>> {
        let path = path.trim_start_matches('/');
        // Nonblocking: it might be a FIFO.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        // What opening a device may do is not wanted: look first.
        let look = OFlags::PATH | OFlags::CLOEXEC;
        let open = |flags| rustix::fs::openat2(&self.fd, path, flags, Mode::empty(), resolve);
        let seen = match open(look) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        if FileType::from_raw_mode(rustix::fs::fstat(&seen)?.st_mode) != FileType::RegularFile {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("/{path} in the image is not a regular file"),
            ));
        }
        let mut content = Vec::new();
        std::fs::File::from(open(flags)?).take(limit as u64 + 1).read_to_end(&mut content)?;
        if content.len() > limit {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("/{path} in the image is larger than {limit} bytes"),
            ));
        }
        Ok(Some(content))
    }

    /// Attaches the mount at `target`, an existing directory.
    pub fn attach(self, target: &Path) -> Result<(), Error> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(&self.fd, "", CWD, target, flags)
            .map_err(|e| Error::Attach { target: target.to_owned(), source: e.into() })
    }
}

//! Containers' root file systems: the layers of an image under one writable layer. And images that
//! containers mount as volumes: the layers alone.
//!
//! The record of such a volume is like that of a root file system, under the name
//! `<container>/<mount>`: so the layers of both are kept in one way, by every version.

use std::{
    collections::{HashMap, HashSet},
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use holdfast_shim::{crash, mount_attr::set_attributes};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
    mount::{MountAttrFlags, MoveMountFlags},
};

use super::{
    Error,
    layers::{self, LANES, Layer},
    overlay::{self, Lower, Overlay},
    tree, unpack,
};
use crate::{
    id::{ContainerId, Digest},
    pod::config::IdMapping,
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
        for path in [
            self.layers(),
            self.recipes(),
            self.ingest(),
            self.snapshots(),
            self.layers().join(EMPTY),
        ] {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        }
        self.make_lanes()
    }
    /// Where layers are unpacked, in turns (`layers`, "Lanes").
    fn make_lanes(&self) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(self.lanes())?;
        let lanes = unpack::open_root(&self.lanes())?;
        if let Ok(flags) = rustix::fs::ioctl_getflags(&lanes) {
            // File systems without block groups have no such thing, and need none.
            let _ = rustix::fs::ioctl_setflags(&lanes, flags | rustix::fs::IFlags::TOPDIR);
        }
        for lane in 0..LANES {
            builder.create(self.lanes().join(lane.to_string()))?;
        }
        Ok(())
    }
    pub(super) fn lanes(&self) -> PathBuf {
        self.root.join("lanes")
    }
    /// All that is in one of them.
    pub(super) fn in_lanes(&self) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for lane in 0..LANES {
            for entry in std::fs::read_dir(self.lanes().join(lane.to_string()))? {
                found.push(entry?.path());
            }
        }
        Ok(found)
    }
    pub(super) fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }
    pub(super) fn recipes(&self) -> PathBuf {
        self.root.join("recipes")
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
    /// Layers of the images that a container mounts; holding them keeps them on disk.
    volumes: Mutex<HashMap<ContainerId, Vec<Held>>>,
}

/// An image and its layers.
type Held = (Digest, Vec<Arc<Layer>>);

/// Whose files a mount shows: the ids on disk are those of a user namespace.
#[derive(Debug)]
pub struct Owners {
    namespace: OwnedFd,
    uids: Vec<IdMapping>,
    gids: Vec<IdMapping>,
}

impl Owners {
    /// By the user namespace that is pinned at `path` and has these mappings.
    pub fn open(path: &Path, uids: &[IdMapping], gids: &[IdMapping]) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let namespace = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
        Ok(Self { namespace, uids: uids.to_owned(), gids: gids.to_owned() })
    }

    /// Who on the node a user and group of the namespace are, if it has them.
    pub fn on_node(&self, uid: u32, gid: u32) -> (Option<u32>, Option<u32>) {
        let find = |ranges: &[IdMapping], id: u32| {
            ranges.iter().find_map(|range| {
                let offset = id.checked_sub(range.container_id)?;
                (offset < range.length).then(|| range.host_id + offset)
            })
        };
        (find(&self.uids, uid), find(&self.gids, gid))
    }
}

impl AsFd for Owners {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }
}

/// An image as a volume of a container.
#[derive(Clone, Debug)]
pub struct ImageVolume {
    pub(super) dirs: Dirs,
    pub(super) layers: Vec<Arc<Layer>>,
}

impl ImageVolume {
    /// Mounts its layers, read-only, attached nowhere yet. Blocks for a moment.
    pub fn mount(&self, owners: Option<&Owners>) -> Result<Mounted, Error> {
        let layers = self.dirs.layers();
        let mut lowers =
            layers::lowers(&self.layers).map_err(|e| mount_error(&layers, owners, e))?;
        if lowers.is_empty() {
            lowers.push(Lower::Name(EMPTY.to_owned()));
        }
        let users = owners.map(AsFd::as_fd);
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV;
        let attributes = attributes.bits().into();
        let mounted = match (lowers.as_slice(), self.layers.as_slice()) {
            // overlayfs wants two.
            ([_], layers) => {
                let one = match layers {
                    [layer, ..] => layer.bind(),
                    [] => overlay::bind(&self.dirs.layers().join(EMPTY), false),
                };
                one.and_then(|fd| {
                    set_attributes(fd.as_fd(), attributes, users)?;
                    Ok(fd)
                })
            }
            (lowers, _) => {
                let overlay = Overlay { layers: &layers, lowers, writable: None, readonly: true };
                let mounted = match users {
                    Some(users) => overlay.mount_mapped(users, &self.dirs.ingest()),
                    None => overlay.mount(&self.dirs.ingest()),
                };
                mounted.and_then(|fd| {
                    set_attributes(fd.as_fd(), attributes, None)?;
                    Ok(fd)
                })
            }
        };
        let fd = mounted.map_err(|source| mount_error(&layers, owners, source))?;
        Ok(Mounted { fd })
    }
}

/// What a failed mount of layers means.
fn mount_error(layers: &Path, owners: Option<&Owners>, source: io::Error) -> Error {
    let path = layers.to_owned();
    let unmapped = [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP, Errno::PERM]
        .iter()
        .any(|errno| source.raw_os_error() == Some(errno.raw_os_error()));
    match owners {
        Some(_) if unmapped => Error::Unmapped { path, source },
        _ => Error::Mount { path, source },
    }
}

/// A container's root file system.
#[derive(Clone, Debug)]
pub struct Snapshot {
    image: Digest,
    pub(super) dirs: Dirs,
    pub(super) upper: PathBuf,
    work: PathBuf,
    /// From the bottom. Holding them keeps them on disk. `None`: somebody else removed one.
    pub(super) layers: Option<Arc<[Arc<Layer>]>>,
}

impl Snapshots {
    pub(super) fn new(dirs: Dirs, store: Store) -> Self {
        Self { dirs, store, known: Mutex::default(), volumes: Mutex::default() }
    }

    /// Keeps the layers of an image that the container's mount of this number shows.
    pub(super) async fn hold(
        &self,
        id: &ContainerId,
        mount: usize,
        image: &Digest,
        layers: Vec<Arc<Layer>>,
    ) -> Result<ImageVolume, Error> {
        let numbers = layers.iter().map(|layer| layer.id()).collect();
        self.store.add_image_volume(id, mount, image, numbers).await?;
        self.restore_volume(id.clone(), image.clone(), layers.clone());
        Ok(ImageVolume { dirs: self.dirs.clone(), layers })
    }

    /// Layers without a record: for a look.
    pub(super) fn view(&self, layers: Vec<Arc<Layer>>) -> ImageVolume {
        ImageVolume { dirs: self.dirs.clone(), layers }
    }

    /// A volume that a record names.
    pub(super) fn restore_volume(&self, id: ContainerId, image: Digest, layers: Vec<Arc<Layer>>) {
        let mut volumes = self.volumes.lock().expect("no panic while it is held");
        volumes.entry(id).or_default().push((image, layers));
    }

    /// Images that containers were made from or mount.
    pub(super) fn images(&self) -> HashSet<Digest> {
        let known = self.known.lock().expect("no panic while it is held");
        let volumes = self.volumes.lock().expect("no panic while it is held");
        let mounted = volumes.values().flatten().map(|(image, _)| image);
        known.values().map(|snapshot| &snapshot.image).chain(mounted).cloned().collect()
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

    /// Containers whose root file system has this layer.
    pub(super) fn with_layer(&self, number: layers::LayerId) -> Vec<ContainerId> {
        let known = self.known.lock().expect("no panic while it is held");
        let has = |snapshot: &Snapshot| {
            snapshot.layers().is_some_and(|layers| layers.iter().any(|layer| layer.id() == number))
        };
        known.iter().filter(|(_, snapshot)| has(snapshot)).map(|(id, _)| id.clone()).collect()
    }

    pub(super) fn ids(&self) -> Vec<ContainerId> {
        let known = self.known.lock().expect("no panic while it is held");
        let volumes = self.volumes.lock().expect("no panic while it is held");
        let ids: HashSet<&ContainerId> = known.keys().chain(volumes.keys()).collect();
        ids.into_iter().cloned().collect()
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
                crash::point("daemon.snapshot.recorded");
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
    /// The container's image volumes are let go with it.
    pub(super) async fn remove(&self, id: &ContainerId) -> Result<(), Error> {
        let path = self.dirs.snapshots().join(id);
        super::blocking(move || tree::remove(&path)).await?.map_err(|source| Error::Snapshot {
            doing: "remove",
            id: id.clone(),
            source,
        })?;
        crash::point("daemon.snapshot.directory-gone");
        self.store.remove_snapshot(id).await?;
        crash::point("daemon.snapshot.forgotten");
        self.known.lock().expect("no panic while it is held").remove(id);
        self.volumes.lock().expect("no panic while it is held").remove(id);
        Ok(())
    }
}

impl Snapshot {
    /// Id of the image it was made from.
    pub fn image(&self) -> &Digest {
        &self.image
    }

    /// The image's layers, from the bottom; `None`: somebody else removed one.
    pub(super) fn layers(&self) -> Option<&[Arc<Layer>]> {
        self.layers.as_deref()
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
        match self.root_layer() {
            Some(layer) => layers::copy_attributes(&layer.open()?, &upper),
            None => Ok(rustix::fs::fchmod(&upper, Mode::from_raw_mode(0o755))?),
        }
    }

    /// The layer that says what the root directory is like.
    fn root_layer(&self) -> Option<&Arc<Layer>> {
        let mut layers = self.layers.iter().flat_map(|layers| layers.iter().rev());
        layers.find(|layer| layer.record.root_listed)
    }

    /// Gives the root directory to whom the mapping makes of its owner: the writable layer is not
    /// mapped.
    fn map_root(&self, owners: &Owners) -> io::Result<()> {
        let (uid, gid) = match self.root_layer() {
            Some(layer) => {
                let stat = rustix::fs::fstat(layer.open()?)?;
                (stat.st_uid, stat.st_gid)
            }
            None => (0, 0),
        };
        let (uid, gid) = owners.on_node(uid, gid);
        std::os::unix::fs::chown(&self.upper, uid, gid)
    }

    /// Mounts it, attached nowhere yet. Blocks for a moment. A snapshot can be mounted once at a
    /// time.
    pub fn mount(&self, readonly: bool) -> Result<Mounted, Error> {
        self.mount_for(readonly, None)
    }

    /// The same. With `owners` the image's files are those of a user namespace; it must be the same
    /// each time.
    pub fn mount_for(&self, readonly: bool, owners: Option<&Owners>) -> Result<Mounted, Error> {
        let layers = self.layers.as_ref().ok_or_else(|| Error::Mount {
            path: self.upper.clone(),
            source: io::Error::new(io::ErrorKind::NotFound, "a layer of it is gone from the disk"),
        })?;
        let mut lowers = layers::lowers(layers).map_err(|e| mount_error(&self.upper, owners, e))?;
        if lowers.is_empty() {
            lowers.push(Lower::Name(EMPTY.to_owned()));
        }
        let overlay = Overlay {
            layers: &self.dirs.layers(),
            lowers: &lowers,
            writable: Some((&self.upper, &self.work)),
            readonly,
        };
        let mounted = match owners {
            None => overlay.mount(&self.dirs.ingest()),
            Some(owners) => self
                .map_root(owners)
                .and_then(|()| overlay.mount_mapped(owners.as_fd(), &self.dirs.ingest())),
        };
        let fd = mounted.map_err(|source| mount_error(&self.upper, owners, source))?;
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

    /// The directory at `path` as the container would see it (links stay inside); `None` if there is
    /// nothing, `NotADirectory` if there is something else.
    pub fn directory(&self, path: &Path) -> io::Result<Option<OwnedFd>> {
        let inside = path.strip_prefix("/").unwrap_or(path);
        let inside = if inside.as_os_str().is_empty() { Path::new(".") } else { inside };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        match rustix::fs::openat2(&self.fd, inside, flags, Mode::empty(), resolve) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Attaches the mount at `target`, an existing directory.
    pub fn attach(self, target: &Path) -> Result<(), Error> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(&self.fd, "", CWD, target, flags)
            .map_err(|e| Error::Attach { target: target.to_owned(), source: e.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_found_in_their_ranges() {
        let range = |container_id, host_id, length| IdMapping { host_id, container_id, length };
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("namespace");
        std::fs::write(&file, "").unwrap();
        let uids = [range(0, 1000, 10), range(100, u32::MAX - 1, 2)];
        let owners = Owners::open(&file, &uids, &[range(0, 7, 1)]).unwrap();
        assert_eq!(owners.on_node(0, 0), (Some(1000), Some(7)));
        assert_eq!(owners.on_node(9, 1), (Some(1009), None));
        assert_eq!(owners.on_node(10, 0), (None, Some(7)));
        assert_eq!(owners.on_node(101, 0), (Some(u32::MAX), Some(7)));
        assert_eq!(owners.on_node(99, u32::MAX), (None, None));
    }
}

//! Layers on disk and their lifetime.
//!
//! A layer is the directory or EROFS image `layers/<number>`. Numbers are short, so that hundreds of layers fit in
//! the options of a mount, and are never used twice. A layer lives as long as somebody holds its
//! [`Layer`]: an image, a snapshot, a pull that is under way. When the last one lets go, the reaper
//! asks the store whether a record still names it, and if not removes first the row and then the
//! directory. So "is it still needed" and "forget it" are one transaction.
//!
//! ```text
//! lanes/<lane>/<number>   --unpacked, fitted-->  layers/<number>   --syncfs, transaction-->  recorded
//! ingest/<number>.recipe  --------------------->  recipes/<number>
//! ```
//! A crash leaves directories without a row; `Images::open` gives them to the reaper. But for layers that
//! were complete when their pull was interrupted: as long as the machine was not started again the kernel
//! has all of them, synced or not, and the next pull goes on from there ([`Layers::adopt`]).
//!
//! # Lanes
//! ext4 makes a directory's files near it, in the same block group, and without a journal does not give out inodes
//! that were freed less than a minute (or five) ago: it looks at each of them again for each file that is made. A node
//! that removes an image of 30,000 files and pulls another spends a third of its time there, if all layers are made
//! below one directory. So they are made in turns below one of `LANES`, which are in block groups of their
//! own, because the directory that has them is marked as one whose subdirectories are unrelated (FS_TOPDIR_FL,
//! chattr(1) "T"). A layer's number says which lane.
//!
//! [`Layer::archive`] gives a layer's archive again, byte for byte ([`super::recipe`]).
//!
//! A layer whose archive lists each directory it uses is good on any layers below it. One that
//! implies directories ([`super::unpack`]) is fitted to the layers below (`fit`), and kept for
//! that chain only.
//!
//! A layer of an artifact is a file, and its directory has that file alone. Its archive, in the sense of
//! [`Layer::archive`], is the file's content, and its diff id the digest of that.

use std::{
    collections::{BTreeSet, HashMap},
    ffi::{OsStr, OsString},
    fmt, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use holdfast_shim::crash;
use rustix::fs::{Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedMutexGuard, mpsc, oneshot};

use super::{
    attributes::{self, Attribute},
    erofs,
    fit::{Directory, fit},
    overlay::{self, Lower},
    recipe::{self, Rebuilt},
    tree,
    unpack::{self, Unpacked},
};
use crate::{
    id::Digest,
    store::{Store, images::LayerRecord},
};

/// How many lanes there are: more than the layers of most images, so that those of one that was just
/// removed are not in the way of the next.
pub(super) const LANES: u64 = 64;

/// What names a layer in records: its directory in `layers`.
pub type LayerId = u64;

/// A layer on disk. Dropping the last handle of one that no record names removes it.
pub struct Layer {
    pub(super) record: LayerRecord,
    pub(super) diff_id: Digest,
    /// The mount of one that is an image, once somebody has asked for it. All share it, and so the pages
    /// that the kernel has of it.
    mount: OnceLock<Option<OwnedFd>>,
    shared: Arc<Shared>,
}

impl Layer {
    /// Its number.
    pub fn id(&self) -> LayerId {
        self.record.number
    }
    /// Its directory or image.
    pub fn path(&self) -> PathBuf {
        self.shared.layers.join(self.record.number.to_string())
    }
    /// The mount that shows it, if it is an image. Blocks the first time.
    fn image(&self) -> io::Result<Option<&OwnedFd>> {
        if self.mount.get().is_none() {
            let path = self.path();
            let is_image = std::fs::symlink_metadata(&path)?.is_file();
            let mount = if is_image { Some(erofs::mount(&path)?) } else { None };
            // If another was faster, its mount is as good.
            let _ = self.mount.set(mount);
        }
        Ok(self.mount.get().and_then(Option::as_ref))
    }
    /// Its root directory.
    pub fn open(&self) -> io::Result<OwnedFd> {
        match self.image()? {
            Some(mount) => erofs::root(mount),
            None => unpack::open_root(&self.path()),
        }
    }
    /// Where all layers are, and scratch space beside them.
    pub(super) fn places(&self) -> (&Path, &Path) {
        (&self.shared.layers, &self.shared.ingest)
    }
    /// A mount of it alone, attached nowhere.
    pub(super) fn bind(&self) -> io::Result<OwnedFd> {
        match self.image()? {
            Some(mount) => overlay::clone_mount(mount.as_fd()),
            None => overlay::bind(&self.path(), false),
        }
    }
    /// Digest of its uncompressed archive.
    pub fn diff_id(&self) -> &Digest {
        &self.diff_id
    }
    /// Its uncompressed archive, exactly as it came. Opening and reading block. The layer must be held
    /// for as long as it is read.
    pub fn archive(&self) -> Result<Rebuilt, recipe::Error> {
        let error =
            |source| recipe::Error::Read { layer: self.diff_id.clone(), path: self.path(), source };
        let content = match self.image().map_err(error)? {
            Some(_) => recipe::Content::Image(std::fs::File::open(self.path()).map_err(error)?),
            None => recipe::Content::Directory(unpack::open_root(&self.path()).map_err(error)?),
        };
        let recipe = self.shared.recipes.join(self.record.number.to_string());
        Rebuilt::open(content, &recipe, &self.diff_id)
    }
}

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {} ({})", self.record.number, self.diff_id)
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        self.shared.bytes.fetch_sub(self.record.bytes, Ordering::Relaxed);
        self.shared.inodes.fetch_sub(self.record.inodes, Ordering::Relaxed);
        if !self.shared.closing.load(Ordering::Relaxed) {
            self.shared.reap(Reap::Layer(self.record.number));
        }
    }
}

/// Says of a layer that is complete and not recorded what its record would; in its recipe's directory.
const PLACED: &str = "placed";

#[derive(Serialize, Deserialize)]
struct Placed {
    /// The boot in which it was unpacked.
    boot: String,
    diff_id: String,
    chain: String,
    bytes: u64,
    inodes: u64,
    root_listed: bool,
}

/// An unpacked layer that is not in its place yet. Dropping it removes it.
pub struct Staged {
    number: u64,
    diff_id: Digest,
    unpacked: Unpacked,
    shared: Arc<Shared>,
    placed: bool,
}

impl Staged {
    /// Whether it must be fitted to the layers below.
    pub fn depends_on_parents(&self) -> bool {
        !self.unpacked.implied.is_empty()
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.placed {
            self.shared.reap(Reap::Path(self.shared.lane(self.number)));
            self.shared.reap(Reap::Path(self.shared.ingest.join(recipe_name(self.number))));
        }
    }
}

/// A place for a layer to be unpacked at. Dropping it removes what is there.
pub struct Slot(Staged);

impl Slot {
    /// Where; does not exist yet.
    pub fn path(&self) -> PathBuf {
        self.0.shared.lane(self.0.number)
    }
    /// Where its recipe goes; does not exist yet.
    pub fn recipe(&self) -> PathBuf {
        self.0.shared.ingest.join(recipe_name(self.0.number))
    }
    /// The layer is there.
    pub fn filled(mut self, unpacked: Unpacked) -> Staged {
        self.0.unpacked = unpacked;
        self.0
    }
}

/// All layers.
pub struct Layers {
    shared: Arc<Shared>,
    next: AtomicU64,
    /// By diff id and, for fitted ones, chain id of the layers below.
    known: Mutex<HashMap<(Digest, String), Weak<Layer>>>,
    /// One download and unpack at a time of each diff id, whoever asks.
    busy: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
}

struct Shared {
    layers: PathBuf,
    recipes: PathBuf,
    ingest: PathBuf,
    lanes: PathBuf,
    bytes: AtomicU64,
    inodes: AtomicU64,
    /// The daemon ends: what is let go is left to the next start.
    closing: AtomicBool,
    /// Unbounded, as `Drop` cannot wait; it holds at most what exists on disk.
    reaper: mpsc::UnboundedSender<Reap>,
}

impl Shared {
    /// Where the layer of this number is made.
    fn lane(&self, number: u64) -> PathBuf {
        self.lanes.join((number % LANES).to_string()).join(number.to_string())
    }

    fn reap(&self, what: Reap) {
        // The reaper ends with the runtime; the next start finds what is left.
        let _ = self.reaper.send(what);
    }
}

/// Work of the reaper.
pub(super) enum Reap {
    /// Nobody in this process holds it any more.
    Layer(u64),
    /// A directory that no record names.
    Path(PathBuf),
    /// Answer when all that came before is done.
    Flush(oneshot::Sender<()>),
}

impl Layers {
    /// `next` is the first free number. Starts the reaper.
    pub fn new(root: &Path, next: u64, store: Store) -> Self {
        let (reaper, queue) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            layers: root.join("layers"),
            recipes: root.join("recipes"),
            ingest: root.join("ingest"),
            lanes: root.join("lanes"),
            bytes: AtomicU64::new(0),
            inodes: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            reaper,
        });
        tokio::spawn(reap(queue, [shared.layers.clone(), shared.recipes.clone()], store));
        Self { shared, next: AtomicU64::new(next), known: Mutex::default(), busy: Mutex::default() }
    }

    /// Bytes and inodes of all layers.
    pub fn usage(&self) -> (u64, u64) {
        let Shared { bytes, inodes, .. } = &*self.shared;
        (bytes.load(Ordering::Relaxed), inodes.load(Ordering::Relaxed))
    }

    /// Scratch space on the layers' file system.
    pub fn ingest(&self) -> &Path {
        &self.shared.ingest
    }

    pub(super) fn reap(&self, what: Reap) {
        self.shared.reap(what);
    }

    /// Waits until all that was let go so far is removed.
    pub async fn flush(&self) {
        let (tx, rx) = oneshot::channel();
        self.shared.reap(Reap::Flush(tx));
        // An error means that the reaper is gone with the runtime.
        let _ = rx.await;
    }

    /// A layer that a record names.
    pub fn restore(&self, record: LayerRecord, diff_id: Digest) -> Arc<Layer> {
        self.shared.bytes.fetch_add(record.bytes, Ordering::Relaxed);
        self.shared.inodes.fetch_add(record.inodes, Ordering::Relaxed);
        let key = (diff_id.clone(), record.chain.clone());
        let mount = OnceLock::new();
        let layer = Arc::new(Layer { record, diff_id, mount, shared: self.shared.clone() });
        let mut known = self.known.lock().expect("no panic while it is held");
        known.retain(|_, layer| layer.strong_count() > 0);
        known.insert(key, Arc::downgrade(&layer));
        layer
    }

    /// The layer of this number, if it was complete when its pull was interrupted, since the machine was
    /// started.
    pub fn adopt(&self, number: u64) -> Option<Arc<Layer>> {
        let path = self.shared.recipes.join(number.to_string()).join(PLACED);
        let placed: Placed = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        // With a line's end, as earlier releases wrote it.
        if placed.boot.trim().is_empty() || placed.boot.trim() != crate::boot::id() {
            return None;
        }
        let Placed { diff_id, chain, bytes, inodes, root_listed, .. } = placed;
        let digest = diff_id.parse().ok()?;
        Some(
            self.restore(
                LayerRecord { number, diff_id, chain, bytes, inodes, root_listed },
                digest,
            ),
        )
    }

    /// These are recorded: nothing else need say what they are. Blocks.
    pub fn recorded(&self, layers: &[Arc<Layer>]) {
        for layer in layers {
            let recipe = self.shared.recipes.join(layer.id().to_string());
            // Once recorded it says nothing any more.
            let _ = std::fs::remove_file(recipe.join(PLACED));
        }
    }

    /// From now on what is let go stays on disk, for the next start to judge.
    pub fn close(&self) {
        self.shared.closing.store(true, Ordering::Relaxed);
    }

    /// The layer if it is here, for any layers below it or for those of `below` ([`chain_id`]).
    pub fn find(&self, diff_id: &Digest, below: &str) -> Option<Arc<Layer>> {
        let known = self.known.lock().expect("no panic while it is held");
        let get = |chain: &str| known.get(&(diff_id.clone(), chain.to_owned()))?.upgrade();
        get("").or_else(|| get(below))
    }

    /// The same for a file of an artifact, by its digest and name.
    pub fn find_file(&self, digest: &Digest, name: &str) -> Option<Arc<Layer>> {
        let known = self.known.lock().expect("no panic while it is held");
        known.get(&(digest.clone(), file_chain(name)))?.upgrade()
    }

    /// Its content is damaged: nothing more is made of it. Who has it keeps it.
    pub fn condemn(&self, layer: &Layer) {
        let mut known = self.known.lock().expect("no panic while it is held");
        known.retain(|_, other| {
            other.upgrade().is_some_and(|other| other.record.number != layer.record.number)
        });
    }

    /// Waits until nobody else fetches this layer.
    pub async fn lock(&self, diff_id: &Digest) -> OwnedMutexGuard<()> {
        let mutex = {
            let mut busy = self.busy.lock().expect("no panic while it is held");
            busy.retain(|_, mutex| mutex.strong_count() > 0);
            match busy.get(diff_id).and_then(Weak::upgrade) {
                Some(mutex) => mutex,
                None => {
                    let mutex = Arc::default();
                    busy.insert(diff_id.clone(), Arc::downgrade(&mutex));
                    mutex
                }
            }
        };
        mutex.lock_owned().await
    }

    /// A place to unpack a layer at.
    pub fn slot(&self, diff_id: Digest) -> Slot {
        Slot(Staged {
            number: self.number(),
            diff_id,
            unpacked: Unpacked::default(),
            shared: self.shared.clone(),
            placed: false,
        })
    }

    /// A number that nothing else has.
    pub fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Moves a layer to its place, fitted to `below` (from the bottom) if it must be. Blocks.
    /// It is not yet synced, and not recorded.
    pub fn place(&self, mut staged: Staged, below: &[Arc<Layer>]) -> io::Result<Arc<Layer>> {
        let from = self.shared.lane(staged.number);
        let mut chain = staged.unpacked.file.as_deref().map_or_else(String::new, file_chain);
        let mut kept = staged.unpacked.kept.take();
        if staged.depends_on_parents() {
            chain = chain_id(below.iter().map(|layer| &layer.diff_id));
            let implied = std::mem::take(&mut staged.unpacked.implied);
            match &mut staged.unpacked.image {
                Some((_, tree)) => fit(tree, &implied, below)?,
                None => {
                    let root = unpack::open_root(&from)?;
                    fit(&mut Directory { root, kept: &mut kept }, &implied, below)?;
                }
            }
        }
        if let Some((writer, tree)) = staged.unpacked.image.take() {
            writer.finish(&tree)?;
            erofs::seal(&from)?;
            staged.unpacked.bytes = std::fs::metadata(&from)?.len();
        }
        let number = staged.number.to_string();
        if let Some(kept) = kept {
            kept.finish()?;
            let recipe = self.shared.ingest.join(recipe_name(staged.number));
            let placed = Placed {
                boot: crate::boot::id().to_owned(),
                diff_id: staged.diff_id.to_string(),
                chain: chain.clone(),
                bytes: staged.unpacked.bytes,
                inodes: staged.unpacked.inodes,
                root_listed: staged.unpacked.root_listed,
            };
            let placed = serde_json::to_vec(&placed).map_err(io::Error::from)?;
            std::fs::write(recipe.join(PLACED), placed)?;
            std::fs::rename(recipe, self.shared.recipes.join(&number))?;
            crash::point("daemon.pull.recipe-placed");
        }
        if let Err(error) = std::fs::rename(&from, self.shared.layers.join(&number)) {
            self.shared.reap(Reap::Path(self.shared.recipes.join(&number)));
            return Err(error);
        }
        crash::point("daemon.pull.layer-placed");
        staged.placed = true;
        let record = LayerRecord {
            number: staged.number,
            diff_id: staged.diff_id.to_string(),
            chain,
            bytes: staged.unpacked.bytes,
            inodes: staged.unpacked.inodes,
            root_listed: staged.unpacked.root_listed,
        };
        Ok(self.restore(record, staged.diff_id.clone()))
    }

    /// Puts everything that was placed so far on disk. Blocks for as long as the disk takes.
    /// One call for a whole image: fsync of each file would cost a journal commit each.
    pub fn sync(&self) -> io::Result<()> {
        let root = unpack::open_root(&self.shared.layers)?;
        rustix::fs::syncfs(root)?;
        crash::point("daemon.pull.synced");
        Ok(())
    }
}

/// Names a chain of layers from the bottom (image-spec config.md "Layer ChainID"); "none" for none.
pub fn chain_id<'a>(diff_ids: impl Iterator<Item = &'a Digest>) -> String {
    let mut chain: Option<String> = None;
    for diff_id in diff_ids {
        chain = Some(match chain {
            None => diff_id.to_string(),
            Some(below) => {
                let hash = Sha256::digest(format!("{below} {diff_id}"));
                Digest::from_sha256(hash.into()).to_string()
            }
        });
    }
    chain.unwrap_or_else(|| "none".to_owned())
}

/// A chain's layers as overlayfs wants them: from the top, each once. A layer that occurs twice hides
/// its lower self: all that it has is there above.
pub fn lowers(layers: &[Arc<Layer>]) -> io::Result<Vec<Lower>> {
    let mut seen = BTreeSet::new();
    let layers = layers.iter().rev().filter(|layer| seen.insert(layer.record.number));
    layers
        .map(|layer| match layer.image()? {
            Some(mount) => Ok(Lower::Mount(mount.try_clone()?)),
            None => Ok(Lower::Name(layer.record.number.to_string())),
        })
        .collect()
}

/// A file is good on any layers, but by this name alone, and never an archive of the same bytes.
fn file_chain(name: &str) -> String {
    format!("file:{name}")
}

fn recipe_name(number: u64) -> String {
    format!("{number}.recipe")
}

/// `places` are the directories that have one of each layer's number.
async fn reap(mut queue: mpsc::UnboundedReceiver<Reap>, places: [PathBuf; 2], store: Store) {
    while let Some(work) = queue.recv().await {
        let paths = match work {
            Reap::Flush(done) => {
                let _ = done.send(());
                continue;
            }
            Reap::Path(path) => vec![path],
            Reap::Layer(number) => match store.forget_layer(number).await {
                Ok(true) => {
                    crash::point("daemon.remove-image.layer-forgotten");
                    places.iter().map(|place| place.join(number.to_string())).collect()
                }
                Ok(false) => continue,
                Err(error) => {
                    // It stays for the next start.
                    tracing::warn!(
                        number,
                        error = crate::error::chain(&error),
                        "layer not removed"
                    );
                    continue;
                }
            },
        };
        let removed = tokio::task::spawn_blocking(move || {
            for path in paths {
                if let Err(error) = tree::remove(&path) {
                    tracing::warn!(path = %path.display(), %error, "leftover not removed");
                }
            }
        });
        // An error means that the runtime is going down.
        if removed.await.is_err() {
            return;
        }
        crash::point("daemon.remove-image.layer-gone");
    }
}

/// Owner, mode, attributes and times of a directory; not what overlayfs keeps on it.
pub fn copy_attributes(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    let stat = rustix::fs::fstat(from)?;
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::fchown(to, Some(uid), Some(gid))?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    for (name, value) in attributes_of(from)? {
        rustix::fs::fsetxattr(to, OsStr::from_bytes(&name), &value, XattrFlags::empty())?;
    }
    let time = |seconds: i64, nanos: u64| Timespec { tv_sec: seconds, tv_nsec: nanos as i64 };
    rustix::fs::futimens(
        to,
        &Timestamps {
            last_access: time(stat.st_atime, stat.st_atime_nsec),
            last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
        },
    )?;
    Ok(())
}

/// The extended attributes of an open file, without what overlayfs and the node keep there.
pub(super) fn attributes_of(file: &OwnedFd) -> io::Result<Vec<Attribute>> {
    let mut found = attributes::of_file(file)?;
    found.retain(|(name, _)| attributes::is_content(name));
    Ok(found)
}

/// Names in a directory that belongs to us, as numbers; what else is there is left alone.
pub(super) fn numbered(directory: &Path) -> io::Result<Vec<u64>> {
    let fd = unpack::open_root(directory)?;
    let names = tree::names(fd.as_fd())?;
    Ok(names.into_iter().filter_map(|(name, _)| number(name)).collect())
}

fn number(name: OsString) -> Option<u64> {
    String::from_utf8(name.into_vec()).ok()?.parse().ok()
}

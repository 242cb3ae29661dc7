//! An image from what a container has changed: its writable layer as one more layer on those of its
//! image.
//!
//! The writable layer has overlayfs' form; the archive gets that of image-spec (layer.md, "Whiteouts"):
//! a name that is gone is an empty file `.wh.<name>`, a directory that hides those below has a file
//! `.wh..wh..opq`. Owners are those that the container sees. Sockets are left out, as in any archive.
//!
//! The container is not paused: a daemon that is killed meanwhile would leave it so. A file that is
//! written meanwhile may be in the image half old and half new; for more, stop the container first.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::File,
    io::{self, BufWriter, Read, Seek, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
    sync::Arc,
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, Stat},
    io::Errno,
};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

pub use super::ids::Ids;
use super::{
    Image, Images, NewImage, Shared,
    attributes::{self, Attribute},
    blocking,
    layers::Reap,
    manifest::{self, Config},
    pull::{self, Progress, Source, Wanted},
    snapshots::Snapshot,
    tarball::{Entry, Kind, Tarball},
    tree, unpack,
};
use crate::id::{ContainerId, Digest};

/// Deepest directory: more than any path that a program can open has.
const DEPTH: usize = 1000;

/// Why there is no image of a container's changes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the writable layer.
    #[error("read {path} of the container")]
    Read {
        /// In the container.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A file that cannot be in an image.
    #[error("{path} of the container {what}")]
    Refused {
        /// In the container.
        path: String,
        /// Why.
        what: &'static str,
    },
    /// The archive.
    #[error("write the layer")]
    Write(#[source] io::Error),
    /// The image's own config.
    #[error("the config of the container's image is not understood")]
    Config(#[source] manifest::Error),
}

/// What is said of the new image.
#[derive(Clone, Debug, Default)]
pub struct Notes {
    /// Who made it; may be empty.
    pub author: String,
    /// Why; may be empty.
    pub comment: String,
}

impl Images {
    /// Makes an image named `name` of a container's image and what the container has changed.
    pub async fn commit(
        &self,
        id: &ContainerId,
        name: &str,
        ids: Ids,
        notes: Notes,
    ) -> Result<(String, Arc<Image>), super::Error> {
        let reference = self.shared.registries.conf()?.candidates(name)?.swap_remove(0);
        if let super::reference::Object::Digest(_) = reference.object() {
            return Err(super::Error::DigestName(name.to_owned()));
        }
        let gone = || super::Error::NoSnapshot(id.clone());
        let snapshot = self.snapshot(id).ok_or_else(gone)?;
        let layers = snapshot.layers().ok_or_else(gone)?;
        let base = snapshot.image().clone();
        let documents = self.shared.store.image_documents(&base).await?;
        let (_, config) = documents.ok_or(super::Error::Gone(base))?;
        let size = self.find(&snapshot.image().to_string()).map_or(0, |image| image.size);

        let work = Work::new(&self.shared);
        let path = work.path.clone();
        let packed = {
            let (snapshot, path) = (snapshot.clone(), path.clone());
            blocking(move || pack(&snapshot, &ids, &path)).await?
        };
        let failed = |source| super::Error::Commit { id: id.clone(), source };
        let (diff_id, length) = packed.map_err(failed)?;
        let new = changed(&config, &diff_id, &notes).map_err(failed)?;
        let parsed = Config::parse(&new).map_err(|e| failed(Error::Config(e)))?;

        let count = layers.len() + 1;
        let wanted: Vec<Wanted> = parsed.diff_ids.iter().map(Wanted::archive).collect();
        if wanted.len() != count {
            let rule = "it has other layers than the container".to_owned();
            let error = manifest::Error::Invalid { what: "image config", rule };
            return Err(failed(Error::Config(error)));
        }
        // The container's own layers are held, and found; only the new one is read from its file.
        let (progress, _) = watch::channel(Progress::default());
        let source = Source::Files(vec![path; count]);
        let got = pull::layers(&self.shared, source, &wanted, &progress, &TaskTracker::new()).await;
        let layers = got.map_err(super::Error::Import)?;
        let full = reference.to_string();
        let image = NewImage {
            id: Digest::from_sha256(Sha256::digest(&new).into()),
            config: parsed,
            size: size + length + new.len() as u64,
            config_bytes: new,
            manifest: None,
            annotations: Default::default(),
            layers,
            names: vec![(full.clone(), String::new())],
        };
        let image = self.shared.commit(image).await.map_err(super::Error::Import)?;
        Ok((full, image))
    }
}

/// The file of the new layer. It goes when nobody needs it any more.
struct Work {
    shared: Arc<Shared>,
    path: PathBuf,
}

impl Work {
    fn new(shared: &Arc<Shared>) -> Self {
        let layers = &shared.layers;
        let path = layers.ingest().join(format!("{}.commit", layers.number()));
        Self { shared: shared.clone(), path }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.shared.layers.reap(Reap::Path(self.path.clone()));
    }
}

/// The config of the image with one more layer.
fn changed(config: &[u8], diff_id: &Digest, notes: &Notes) -> Result<Vec<u8>, Error> {
    let json = |source| Error::Config(manifest::Error::Json { what: "image config", source });
    let mut config: serde_json::Value = serde_json::from_slice(config).map_err(json)?;
    let odd = || {
        let rule = "rootfs.diff_ids is no list".to_owned();
        Error::Config(manifest::Error::Invalid { what: "image config", rule })
    };
    let diff_ids = &mut config["rootfs"]["diff_ids"];
    if diff_ids.is_null() {
        *diff_ids = json!([]);
    }
    diff_ids.as_array_mut().ok_or_else(odd)?.push(json!(diff_id));
    let now = jiff::Timestamp::now().to_string();
    let mut step = json!({"created": now, "created_by": "holdfast commit"});
    for (key, value) in [("author", &notes.author), ("comment", &notes.comment)] {
        if !value.is_empty() {
            step[key] = json!(value);
        }
    }
    if !notes.author.is_empty() {
        config["author"] = json!(notes.author);
    }
    config["created"] = json!(now);
    // Images need no history; one that has it has a step for each layer.
    match &mut config["history"] {
        serde_json::Value::Array(history) => history.push(step),
        history => *history = json!([step]),
    }
    Ok(config.to_string().into_bytes())
}

/// Writes the layer's archive; its diff id and length. Blocks.
fn pack(snapshot: &Snapshot, ids: &Ids, to: &std::path::Path) -> Result<(Digest, u64), Error> {
    let root = unpack::open_root(snapshot.upper())
        .map_err(|source| Error::Read { path: "/".to_owned(), source })?;
    let mut file =
        File::options().read(true).write(true).create_new(true).open(to).map_err(Error::Write)?;
    let mut walk = Walk {
        tar: Tarball::new(BufWriter::with_capacity(
            256 << 10,
            file.try_clone().map_err(Error::Write)?,
        )),
        ids,
        links: HashMap::new(),
    };
    let stat = rustix::fs::fstat(&root)
        .map_err(|e| Error::Read { path: "/".to_owned(), source: e.into() })?;
    walk.directory(root.as_fd(), &stat, b".", OsStr::new("."), root.as_fd(), 0)?;
    walk.tar.finish().map_err(Error::Write)?;
    file.rewind().map_err(Error::Write)?;
    let mut hash = Sha256::new();
    let mut piece = vec![0; 256 << 10];
    let mut length = 0;
    loop {
        match file.read(&mut piece).map_err(Error::Write)? {
            0 => break,
            n => {
                hash.update(&piece[..n]);
                length += n as u64;
            }
        }
    }
    Ok((Digest::from_sha256(hash.finalize().into()), length))
}

struct Walk<'a, W> {
    tar: Tarball<W>,
    ids: &'a Ids,
    /// Where a file with several names was written.
    links: HashMap<(u64, u64), Vec<u8>>,
}

impl<W: Write> Walk<'_, W> {
    /// A directory and all in it. `name` in `parent` is what it is.
    fn directory(
        &mut self,
        directory: BorrowedFd<'_>,
        stat: &Stat,
        path: &[u8],
        name: &OsStr,
        parent: BorrowedFd<'_>,
        depth: usize,
    ) -> Result<(), Error> {
        if depth == DEPTH {
            return Err(refused(path, "is nested too deep"));
        }
        let attributes = attributes(parent, name, path)?;
        let opaque = attributes.iter().any(|(n, v)| n == unpack::OPAQUE.as_bytes() && v == b"y");
        if attributes.iter().any(|(n, _)| n == b"trusted.overlay.redirect") {
            return Err(refused(path, "was renamed by overlayfs, which no image can say"));
        }
        self.append(&self.entry(path, Kind::Directory, stat, attributes)?)?;
        if opaque {
            let marker = Entry::file("", 0);
            self.append(&Entry { path: join(path, b".wh..wh..opq"), ..marker })?;
        }
        let mut names = tree::names(directory).map_err(|e| read(path, e))?;
        names.sort_by(|(a, _), (b, _)| a.cmp(b));
        for (name, _) in names {
            let below = join(path, name.as_bytes());
            let stat = match rustix::fs::statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                // Removed since it was listed.
                Err(Errno::NOENT) => continue,
                Err(e) => return Err(read(&below, e.into())),
            };
            self.one(directory, &name, &stat, &below, depth)?;
        }
        Ok(())
    }

    fn one(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &OsStr,
        stat: &Stat,
        path: &[u8],
        depth: usize,
    ) -> Result<(), Error> {
        if tree::is_whiteout(stat) {
            let at = path.len() - name.len();
            let gone = [&path[..at], b".wh.", name.as_bytes()].concat();
            return self.append(&Entry { path: gone, ..Entry::file("", 0) });
        }
        if name.as_bytes().starts_with(b".wh.") {
            return Err(refused(path, "has a name that means a removal in an image"));
        }
        let kind = FileType::from_raw_mode(stat.st_mode);
        let key = (stat.st_dev, stat.st_ino);
        if kind != FileType::Directory && stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&key) {
                let link = Kind::HardLink(first.clone());
                let entry = self.entry(path, link, stat, Vec::new())?;
                return self.append(&entry);
            }
            self.links.insert(key, path.to_owned());
        }
        let device = || (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let kind = match kind {
            FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let opened = rustix::fs::openat(parent, name, flags, Mode::empty());
                let below = match opened {
                    Ok(below) => below,
                    Err(Errno::NOENT) => return Ok(()),
                    Err(e) => return Err(read(path, e.into())),
                };
                return self.directory(below.as_fd(), stat, path, name, parent, depth + 1);
            }
            FileType::RegularFile => return self.file(parent, name, path),
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(parent, name, Vec::new())
                    .map_err(|e| read(path, e.into()))?;
                Kind::Symlink(target.into_bytes())
            }
            FileType::CharacterDevice => Kind::Char(device().0, device().1),
            FileType::BlockDevice => Kind::Block(device().0, device().1),
            FileType::Fifo => Kind::Fifo,
            // A socket without the program that listens on it is nothing.
            _ => return Ok(()),
        };
        let attributes = attributes(parent, name, path)?;
        let entry = self.entry(path, kind, stat, attributes)?;
        self.append(&entry)
    }

    fn file(&mut self, parent: BorrowedFd<'_>, name: &OsStr, path: &[u8]) -> Result<(), Error> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mut file = match rustix::fs::openat(parent, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(()),
            Err(e) => return Err(read(path, e.into())),
        };
        let stat = rustix::fs::fstat(&file).map_err(|e| read(path, e.into()))?;
        let mut entry = self.entry(path, Kind::File, &stat, attributes(parent, name, path)?)?;
        // What is appended to it from now on is not in the image.
        entry.size = stat.st_size as u64;
        self.tar.append(&entry, &mut file).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => {
                refused(path, "became shorter while it was read: stop the container first")
            }
            _ => Error::Write(source),
        })
    }

    fn entry(
        &self,
        path: &[u8],
        kind: Kind,
        stat: &Stat,
        attributes: Vec<Attribute>,
    ) -> Result<Entry, Error> {
        let (Some(uid), Some(gid)) = (self.ids.user(stat.st_uid), self.ids.group(stat.st_gid))
        else {
            return Err(refused(path, "has an owner that the container's user namespace lacks"));
        };
        let mut xattrs = attributes;
        // overlayfs' own, and what the node's policy says and not the image.
        xattrs.retain(|(name, _)| attributes::is_content(name));
        Ok(Entry {
            path: path.to_owned(),
            kind,
            mode: stat.st_mode & 0o7777,
            uid,
            gid,
            mtime: (stat.st_mtime, stat.st_mtime_nsec as u32),
            size: 0,
            xattrs,
        })
    }

    fn append(&mut self, entry: &Entry) -> Result<(), Error> {
        self.tar.append(entry, &mut io::empty()).map_err(Error::Write)
    }
}

fn refused(path: &[u8], what: &'static str) -> Error {
    Error::Refused { path: shown(path), what }
}

fn read(path: &[u8], source: io::Error) -> Error {
    Error::Read { path: shown(path), source }
}

fn shown(path: &[u8]) -> String {
    format!("/{}", String::from_utf8_lossy(path.strip_prefix(b"./").unwrap_or(path)))
}

/// The top is ".", and no part of what is below.
fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    if path == b"." { name.to_owned() } else { [path, b"/", name].concat() }
}

fn attributes(parent: BorrowedFd<'_>, name: &OsStr, path: &[u8]) -> Result<Vec<Attribute>, Error> {
    match attributes::of_name(parent, name) {
        // Removed since it was listed.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(|error| read(path, error)),
    }
}

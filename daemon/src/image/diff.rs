//! What a container has changed in its root file system, as a tar archive and a list of what it
//! removed: the form that CRI-O and Podman keep in a checkpoint. Reading knows containerd's form too,
//! which is a compressed layer with whiteouts.

use std::{
    collections::{HashMap, HashSet},
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, BufReader, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps};

pub use super::ids::Ids;
use super::{
    Error, ImageVolume, Mounted, Snapshot,
    attributes::{self, Attribute},
    fit, stream, tree,
    unpack::{self, Unpacked},
};
use crate::id::ContainerId;

impl Snapshot {
    /// Writes what is in the writable layer as a tar archive. Gives the paths, from the root, of what
    /// was removed from the image. Blocks. `go_on` is asked before each entry and each piece of a
    /// file; what it returns ends the writing.
    ///
    /// # Errors
    /// Of reading the layer and of writing to `to`.
    pub fn write_changes(
        &self,
        to: impl Write,
        ids: &Ids,
        go_on: &dyn Fn() -> io::Result<()>,
    ) -> io::Result<Vec<PathBuf>> {
        let below = self
            .layers
            .as_ref()
            .map(|layers| ImageVolume { dirs: self.dirs.clone(), layers: layers.to_vec() });
        let mut writer = Writer::new(to, &self.upper, ids, go_on)?;
        writer.below = below;
        writer.write()
    }

    /// Puts changes that were written so into the writable layer, which has nothing yet. Blocks.
    ///
    /// # Errors
    /// What is no archive, and what `unpack` refuses.
    pub fn apply_changes(&self, id: &ContainerId, changes: impl Read) -> Result<(), Error> {
        let failed = |source| Error::Snapshot { doing: "restore", id: id.clone(), source };
        let root = unpack::open_root(&self.upper).map_err(failed)?;
        let source = stream::inflate(BufReader::new(changes)).map_err(failed)?;
        let Unpacked { implied, .. } =
            unpack::unpack(BufReader::new(source), root.as_fd(), None)
                .map_err(|error| failed(io::Error::other(crate::error::chain(&error))))?;
        if let Some(layers) = &self.layers {
            fit::fit(&mut fit::Directory { root, kept: &mut None }, &implied, layers)
                .map_err(failed)?;
        }
        Ok(())
    }
}

/// Writes all that is in a directory as a tar archive. Blocks.
///
/// # Errors
/// Of reading it and of writing to `to`.
pub fn write_tree(
    directory: &Path,
    to: impl Write,
    ids: &Ids,
    go_on: &dyn Fn() -> io::Result<()>,
) -> io::Result<()> {
    Writer::new(to, directory, ids, go_on)?.write().map(drop)
}

/// Removes what a checkpoint says was removed. Paths are from the root; links on the way stay inside.
///
/// # Errors
/// One that is there cannot be removed.
pub fn remove_deleted(root: &Mounted, deleted: &[PathBuf]) -> io::Result<()> {
    for path in deleted {
        let path = crate::spec::clean(&path.to_string_lossy());
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { continue };
        match root.directory(parent) {
            Ok(Some(parent)) => {
                let stat = rustix::fs::fstat(&parent)?;
                tree::remove_at(parent.as_fd(), name)?;
                // It was changed when the container did it, not now.
                let time = |tv_sec, nanos: u64| Timespec { tv_sec, tv_nsec: nanos as i64 };
                let times = Timestamps {
                    last_access: time(stat.st_atime, stat.st_atime_nsec),
                    last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
                };
                rustix::fs::futimens(&parent, &times)?;
            }
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

struct Writer<'a, W: Write> {
    tar: tar::Builder<W>,
    root: OwnedFd,
    ids: &'a Ids,
    go_on: &'a dyn Fn() -> io::Result<()>,
    /// The image's layers, for what an opaque directory hides.
    below: Option<ImageVolume>,
    below_mounted: Option<Mounted>,
    linked: HashMap<(u64, u64), PathBuf>,
    deleted: Vec<PathBuf>,
}

impl<'a, W: Write> Writer<'a, W> {
    fn new(
        to: W,
        directory: &Path,
        ids: &'a Ids,
        go_on: &'a dyn Fn() -> io::Result<()>,
    ) -> io::Result<Self> {
        Ok(Self {
            tar: tar::Builder::new(to),
            root: unpack::open_root(directory)?,
            ids,
            go_on,
            below: None,
            below_mounted: None,
            linked: HashMap::new(),
            deleted: Vec::new(),
        })
    }

    fn write(mut self) -> io::Result<Vec<PathBuf>> {
        // Relative paths instead of open directories: no bound on depth by open files. A directory's
        // own entry is before those of what is in it.
        let mut todo = vec![PathBuf::from(".")];
        while let Some(path) = todo.pop() {
            (self.go_on)()?;
            let directory = self.beneath(&path)?;
            self.directory(&path, &directory)?;
            let mut names = tree::names(directory.as_fd())?;
            names.sort_by(|a, b| a.0.cmp(&b.0));
            let mut below = Vec::new();
            for (name, _) in names {
                let stat = rustix::fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW)?;
                let inside = path.join(&name);
                if tree::is_whiteout(&stat) {
                    self.deleted.push(from_root(&inside));
                } else if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                    below.push(inside);
                } else {
                    (self.go_on)()?;
                    self.other(&inside, directory.as_fd(), &name, &stat)?;
                }
            }
            todo.extend(below.into_iter().rev());
        }
        self.tar.into_inner()?.flush()?;
        Ok(self.deleted)
    }

    fn beneath(&self, path: &Path) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        Ok(rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve)?)
    }

    fn directory(&mut self, path: &Path, directory: &OwnedFd) -> io::Result<()> {
        let stat = rustix::fs::fstat(directory)?;
        let attributes = attributes::of_file(directory)?;
        let opaque = unpack::OPAQUE.as_bytes();
        if attributes.iter().any(|(name, value)| name == opaque && value == b"y") {
            self.hidden(path, directory)?;
        }
        let mut header = self.header(&stat, tar::EntryType::Directory);
        self.extensions(&stat, attributes)?;
        self.tar.append_data(&mut header, path.join(""), io::empty())
    }

    /// What the image has in a directory that was removed and made anew.
    fn hidden(&mut self, path: &Path, directory: &OwnedFd) -> io::Result<()> {
        let Some(below) = &self.below else { return Ok(()) };
        if self.below_mounted.is_none() {
            let mounted =
                below.mount(None).map_err(|e| io::Error::other(crate::error::chain(&e)))?;
            self.below_mounted = Some(mounted);
        }
        let Some(mounted) = &self.below_mounted else { return Ok(()) };
        let lower = match mounted.directory(&from_root(path)) {
            Ok(Some(lower)) => lower,
            Ok(None) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(()),
            Err(error) => return Err(error),
        };
        let here: HashSet<OsString> =
            tree::names(directory.as_fd())?.into_iter().map(|(name, _)| name).collect();
        let mut hidden: Vec<_> = tree::names(lower.as_fd())?;
        hidden.sort_by(|a, b| a.0.cmp(&b.0));
        let hidden = hidden.into_iter().filter(|(name, _)| !here.contains(name));
        self.deleted.extend(hidden.map(|(name, _)| from_root(&path.join(name))));
        Ok(())
    }

    /// All but directories.
    fn other(
        &mut self,
        path: &Path,
        parent: BorrowedFd<'_>,
        name: &OsStr,
        stat: &Stat,
    ) -> io::Result<()> {
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => tar::EntryType::Regular,
            FileType::Symlink => tar::EntryType::Symlink,
            FileType::Fifo => tar::EntryType::Fifo,
            FileType::CharacterDevice => tar::EntryType::Char,
            FileType::BlockDevice => tar::EntryType::Block,
            // Nobody could listen at a copy; criu makes those of the processes itself.
            _ => return Ok(()),
        };
        let mut header = self.header(stat, kind);
        if stat.st_nlink > 1 {
            let first = self.linked.entry((stat.st_dev, stat.st_ino));
            if let std::collections::hash_map::Entry::Occupied(first) = &first {
                header.set_entry_type(tar::EntryType::Link);
                return self.tar.append_link(&mut header, path, first.get());
            }
            first.or_insert_with(|| path.to_owned());
        }
        if kind == tar::EntryType::Symlink {
            let target = rustix::fs::readlinkat(parent, name, Vec::new())?;
            self.extensions(stat, Vec::new())?;
            return self.tar.append_link(&mut header, path, OsStr::from_bytes(target.as_bytes()));
        }
        self.extensions(stat, attributes::of_name(parent, name)?)?;
        if kind == tar::EntryType::Char || kind == tar::EntryType::Block {
            header.set_device_major(rustix::fs::major(stat.st_rdev))?;
            header.set_device_minor(rustix::fs::minor(stat.st_rdev))?;
        }
        if kind != tar::EntryType::Regular {
            return self.tar.append_data(&mut header, path, io::empty());
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(parent, name, flags, Mode::empty())?);
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        header.set_size(size);
        // Exactly as much as the header says, should somebody write to it all the same.
        let data = Exactly { file, left: size, go_on: self.go_on };
        self.tar.append_data(&mut header, path, data)
    }

    fn header(&self, stat: &Stat, kind: tar::EntryType) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(stat.st_mode & 0o7777);
        // What the namespace has no name for stays as it is: the container saw "nobody".
        header.set_uid(self.ids.user(stat.st_uid).unwrap_or(stat.st_uid).into());
        header.set_gid(self.ids.group(stat.st_gid).unwrap_or(stat.st_gid).into());
        header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
        header.set_size(0);
        header
    }

    /// What a header has no room for.
    fn extensions(&mut self, stat: &Stat, attributes: Vec<Attribute>) -> io::Result<()> {
        let mut records = Vec::new();
        if stat.st_mtime_nsec != 0 && stat.st_mtime >= 0 {
            let time = format!("{}.{:09}", stat.st_mtime, stat.st_mtime_nsec);
            records.push(("mtime".to_owned(), time.into_bytes()));
        }
        for (name, value) in attributes {
            let kept = attributes::is_content(&name) && !name.contains(&b'=');
            if let Some(name) = std::str::from_utf8(&name).ok().filter(|_| kept) {
                records.push((format!("SCHILY.xattr.{name}"), value));
            }
        }
        match records.is_empty() {
            true => Ok(()),
            false => self
                .tar
                .append_pax_extensions(records.iter().map(|(k, v)| (k.as_str(), v.as_slice()))),
        }
    }
}

/// A path below ".", from "/".
fn from_root(path: &Path) -> PathBuf {
    Path::new("/").join(path.strip_prefix(".").unwrap_or(path))
}

struct Exactly<'a> {
    file: File,
    left: u64,
    go_on: &'a dyn Fn() -> io::Result<()>,
}

impl Read for Exactly<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (self.go_on)()?;
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let buffer = &mut buffer[..most];
        let mut length = self.file.read(buffer)?;
        if length == 0 && most > 0 {
            // It became shorter: the rest is as a hole would be.
            buffer.fill(0);
            length = most;
        }
        self.left -= length as u64;
        Ok(length)
    }
}

//! Fitting a layer to those below it.
//!
//! An archive may have usr/lib/x and no entry for usr/lib. On overlayfs such an implied directory would
//! hide owner, mode and attributes of the one below, and one where the layers below have a symbolic link
//! (lib -> usr/lib) would hide that. So it gets what the layers below say of it, and what is in it goes
//! where the link leads. This is the same for both kinds of layer.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat},
    io::Errno,
};

use super::{
    erofs::tree::{Attributes, Tree},
    layers::{Layer, attributes_of, copy_attributes, lowers},
    overlay::Overlay,
    recipe::Kept,
    tar::Time,
    tree, unpack,
};

/// A layer that is being fitted.
pub(super) trait Fitted {
    /// Whether it has a directory at this path that hides the one below.
    fn is_opaque(&self, path: &Path) -> io::Result<bool>;
    /// Moves what it has at `from` to `to`, whose missing directories are made: their paths go to
    /// `made`. False, and nothing done, if something else is in the way there.
    fn relocate(
        &mut self,
        from: &Path,
        to: &Path,
        made: &mut BTreeSet<PathBuf>,
    ) -> io::Result<bool>;
    /// Makes its directory at `path` look like `from`.
    fn look_like(&mut self, path: &Path, from: &OwnedFd) -> io::Result<()>;
}

/// Gives the implied directories of a layer what the layers below say of them.
pub(super) fn fit(
    layer: &mut impl Fitted,
    implied: &[PathBuf],
    below: &[Arc<Layer>],
) -> io::Result<()> {
    let lower = match below {
        [] => return Ok(()),
        below => match lowers(below)?.as_slice() {
            // overlayfs wants two.
            [_] => below[0].open()?,
            lowers => {
                let (layers, scratch) = below[0].places();
                Overlay { layers, lowers, writable: None, readonly: true }.mount(scratch)?
            }
        },
    };
    let unlisted: BTreeSet<&Path> = implied.iter().map(PathBuf::as_path).collect();
    let mut moves: Vec<(PathBuf, PathBuf)> = Vec::new();
    let mut like_below: BTreeSet<PathBuf> = BTreeSet::new();
    'implied: for original in implied {
        let mut path = original.clone();
        for (from, to) in &moves {
            if let Ok(rest) = path.strip_prefix(from) {
                path = to.join(rest);
            }
        }
        let mut at = PathBuf::new();
        for name in path.components() {
            at.push(name);
            if layer.is_opaque(&at)? {
                continue 'implied;
            }
            let Some(stat) = stat_beneath(&lower, &at)? else { continue 'implied };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {}
                // Directories come before what is in them: this is the implied one itself.
                FileType::Symlink if unlisted.contains(&*at) => {
                    if let Some(real) = real_directory(&lower, &at)?
                        && layer.relocate(&at, &real, &mut like_below)?
                    {
                        moves.push((at, real));
                    }
                    continue 'implied;
                }
                // New in this layer, whatever was below.
                _ => continue 'implied,
            }
        }
        like_below.insert(path);
    }
    // Last, as all of the above changes times.
    for path in like_below {
        layer.look_like(&path, &open(&lower, &path)?)?;
    }
    Ok(())
}

impl Fitted for Tree {
    fn is_opaque(&self, path: &Path) -> io::Result<bool> {
        Ok(Tree::is_opaque(self, path))
    }

    fn relocate(
        &mut self,
        from: &Path,
        to: &Path,
        made: &mut BTreeSet<PathBuf>,
    ) -> io::Result<bool> {
        Ok(Tree::relocate(self, from, to, made))
    }

    fn look_like(&mut self, path: &Path, from: &OwnedFd) -> io::Result<()> {
        let stat = rustix::fs::fstat(from)?;
        self.set_attributes(
            path,
            Attributes {
                mode: stat.st_mode & 0o7777,
                uid: stat.st_uid,
                gid: stat.st_gid,
                mtime: Time { seconds: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 },
                xattrs: attributes_of(from)?,
            },
        );
        Ok(())
    }
}

/// A layer that is a directory, and what is elsewhere than its archive put it.
pub(super) struct Directory<'a> {
    pub root: OwnedFd,
    pub kept: &'a mut Option<Kept>,
}

impl Fitted for Directory<'_> {
    fn is_opaque(&self, path: &Path) -> io::Result<bool> {
        is_opaque(&self.root, path)
    }

    fn relocate(
        &mut self,
        from: &Path,
        to: &Path,
        made: &mut BTreeSet<PathBuf>,
    ) -> io::Result<bool> {
        let moved = relocate(&self.root, from, to, made, self.kept)?;
        if moved && let Some(kept) = self.kept {
            kept.moved(from, to);
        }
        Ok(moved)
    }

    fn look_like(&mut self, path: &Path, from: &OwnedFd) -> io::Result<()> {
        copy_attributes(from, &open(&self.root, path)?)
    }
}

/// Where the link at `path` leads inside `root`, if that is a directory.
fn real_directory(root: &OwnedFd, path: &Path) -> io::Result<Option<PathBuf>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let fd = match rustix::fs::openat2(root, path, flags, Mode::empty(), resolve) {
        Ok(fd) => fd,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    match unpack::real_path(root.as_fd(), fd.as_fd()) {
        Ok(real) if real.is_empty() => Ok(None),
        Ok(real) => Ok(Some(PathBuf::from(OsString::from_vec(real)))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Moves what the layer has at `from` to `to`, whose missing directories are made. False, and
/// nothing done, if something else is in the way there.
fn relocate(
    layer: &OwnedFd,
    from: &Path,
    to: &Path,
    like_below: &mut BTreeSet<PathBuf>,
    kept: &mut Option<Kept>,
) -> io::Result<bool> {
    let mut at = PathBuf::new();
    let mut missing = Vec::new();
    for name in to.components() {
        at.push(name);
        if at == from {
            return Ok(false);
        }
        match stat_beneath(layer, &at)? {
            None => missing.push(at.clone()),
            Some(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {}
            Some(_) => return Ok(false),
        }
    }
    for path in missing {
        rustix::fs::mkdirat(layer, &path, Mode::RWXU)?;
        like_below.insert(path);
    }
    merge(&open(layer, from)?, &open(layer, to)?, to, kept)?;
    rustix::fs::unlinkat(layer, from, AtFlags::REMOVEDIR)?;
    Ok(true)
}

/// Moves the entries of one directory into another; of two of a name the moved one wins, except
/// that directories are merged. Depth is bounded by that of a layer. `path` is where `to` is.
fn merge(from: &OwnedFd, to: &OwnedFd, path: &Path, kept: &mut Option<Kept>) -> io::Result<()> {
    for (name, _) in tree::names(from.as_fd())? {
        let directory =
            |at: &OwnedFd| match rustix::fs::statat(at, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)),
                Err(Errno::NOENT) => Ok(None),
                Err(e) => Err(e),
            };
        match (directory(from)?, directory(to)?) {
            (Some(true), Some(true)) => {
                let name: &Path = name.as_ref();
                merge(&open(from, name)?, &open(to, name)?, &path.join(name), kept)?;
                rustix::fs::unlinkat(from, name, AtFlags::REMOVEDIR)?;
                continue;
            }
            (_, Some(_)) => match kept {
                Some(kept) => kept.lost(to.as_fd(), &name, &path.join(&name))?,
                None => tree::remove_at(to.as_fd(), &name)?,
            },
            (_, None) => {}
        }
        rustix::fs::renameat(from, &name, to, &name)?;
    }
    Ok(())
}

fn open(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    Ok(rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?)
}

/// Of the last part itself, links on the way are "not there".
fn stat_beneath(root: &OwnedFd, path: &Path) -> io::Result<Option<Stat>> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // NO_SYMLINKS would refuse the last part too; with O_PATH and O_NOFOLLOW it may be a link.
    let (parent, name) = match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if !parent.as_os_str().is_empty() => {
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            match rustix::fs::openat2(root, parent, flags, Mode::empty(), resolve) {
                Ok(fd) => (Some(fd), Path::new(name)),
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        }
        _ => (None, path),
    };
    match rustix::fs::openat(parent.as_ref().unwrap_or(root), name, flags, Mode::empty()) {
        Ok(fd) => Ok(Some(rustix::fs::fstat(fd)?)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn is_opaque(layer: &OwnedFd, path: &Path) -> io::Result<bool> {
    let fd = match open(layer, path) {
        Ok(fd) => fd,
        Err(_) => return Ok(false),
    };
    let mut value = [0; 1];
    Ok(rustix::fs::fgetxattr(&fd, unpack::OPAQUE, &mut value).is_ok_and(|n| &value[..n] == b"y"))
}

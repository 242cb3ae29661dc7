//! One layer's tar stream becomes one directory in overlayfs form.
//!
//! The layers below are not needed: a whiteout becomes a 0/0 character device, an opaque marker an
//! attribute (image-spec layer.md "Whiteouts", kernel Documentation/filesystems/overlayfs.rst).
//! What cannot be known without the layers below (the attributes of directories that the archive
//! implies but does not list) is reported in [`Unpacked`]; `layers` settles it.
//!
//! The stream is hostile until proven otherwise, and its digest is known only at its end. So:
//! every path is resolved by the kernel beneath the layer's directory (openat2, RESOLVE_BENEATH);
//! a name that could leave it is an error, not a guess; sizes are bounded while reading.
//!
//! Order matters. Attributes of directories are set when everything is in place, because files in
//! them change their times, and a setgid bit or a default ACL would change the files. Of a file,
//! owner comes before mode and attributes, as chown(2) clears setuid bits and capabilities.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    io::{self, BufRead},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::{Path, PathBuf},
    rc::Rc,
};

use rustix::{
    fs::{
        AtFlags, CWD, FileType, Gid, Mode, OFlags, RawMode, ResolveFlags, Timespec, Timestamps,
        Uid, XattrFlags,
    },
    io::Errno,
};

use super::{
    erofs,
    recipe::{Kept, Recorder},
    tar::{self, Archive, Entry, Kind, Time},
    tree,
};

/// Deepest nesting of directories; a bound for those who later walk the layer.
const MAX_DEPTH: usize = 256;

/// PATH_MAX, which includes the terminating NUL.
const MAX_PATH: usize = 4095;

/// Files of this many bytes begin their way to the disk as soon as they are complete.
pub(super) const WRITE_BACK: u64 = 1 << 20;

/// What overlayfs calls a directory that hides the one below it.
pub(super) const OPAQUE: &str = "trusted.overlay.opaque";

/// Why a layer cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The stream itself.
    #[error(transparent)]
    Tar(#[from] tar::Error),
    /// An entry that could reach out of the layer, or that no file system can hold.
    #[error("layer entry {path:?} is refused: {rule}")]
    Refused {
        /// The entry.
        path: String,
        /// Which rule it breaks.
        rule: &'static str,
    },
    /// The file system refused an entry.
    #[error("write layer entry {path:?}")]
    Write {
        /// The entry.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// A layer that was unpacked.
#[derive(Debug, Default)]
pub struct Unpacked {
    /// Room it takes, in bytes, by blocks of 4 KiB.
    pub bytes: u64,
    /// Files, directories and so on.
    pub inodes: u64,
    /// The archive lists the root directory itself.
    pub root_listed: bool,
    /// Directories that the archive implies but does not list, parents first. They have mode 0755,
    /// owner 0:0.
    pub implied: Vec<PathBuf>,
    /// What of it the recipe must look for elsewhere; `None`: no recipe was asked for.
    pub kept: Option<Kept>,
    /// It is this file alone, of an artifact.
    pub file: Option<String>,
    /// The image that it is to be, of which names and attributes are not yet written; `None`: it is a
    /// directory.
    pub image: Option<(erofs::Writer, erofs::tree::Tree)>,
}

/// An open directory of the layer.
struct Parent {
    /// As the archive names it.
    named: Vec<u8>,
    /// Without links.
    real: Vec<u8>,
    fd: Rc<OwnedFd>,
}

impl Unpacked {
    /// Writes down what its recipe must look for elsewhere, of a layer that nothing else is done to.
    pub fn finish_recipe(self) -> io::Result<()> {
        self.kept.map_or(Ok(()), Kept::finish)
    }
}

/// What a directory gets at the end.
#[derive(Default)]
struct Directory {
    /// From its entry; `None`: implied only.
    listed: Option<Attributes>,
    opaque: bool,
}

#[derive(Default)]
struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: Time,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Unpacks the archive into `root`, an empty directory that nobody else uses, to the end of the
/// stream. How to make the archive again goes to `recorder`. On an error `root` is left as it is:
/// the caller removes it.
pub fn unpack<R: BufRead>(
    source: R,
    root: BorrowedFd<'_>,
    recorder: Option<Recorder>,
) -> Result<Unpacked, Error> {
    let mut archive = match recorder {
        Some(recorder) => Archive::recorded(source, recorder),
        None => Archive::new(source),
    };
    let defaults = Defaults::of(root);
    let directories = BTreeMap::new();
    let mut layer = Layer { root, parent: None, directories, done: Unpacked::default(), defaults };
    layer.directories.insert(Vec::new(), Directory::default());
    while let Some(entry) = archive.entry()? {
        layer.place(entry, &mut archive)?;
    }
    if let (_, Some(recorder)) = archive.finish()? {
        let write = |source| Error::Write { path: "its recipe".to_owned(), source };
        layer.done.kept = Some(recorder.finish().map_err(write)?);
    }
    layer.finish()
}

/// The same into a new EROFS image at `path`, all but what depends on the layers below.
pub fn unpack_image<R: BufRead>(
    source: R,
    path: &Path,
    recorder: Option<Recorder>,
) -> Result<Unpacked, Error> {
    let write = |source| Error::Write { path: path.display().to_string(), source };
    let mut writer = erofs::Writer::create(path).map_err(write)?;
    let built = erofs::tree::Builder::new(&mut writer).read(source, recorder)?;
    let tree = built.tree;
    Ok(Unpacked {
        bytes: built.bytes,
        inodes: tree.inodes(),
        root_listed: tree.root_listed(),
        implied: tree.implied(),
        kept: built.kept,
        file: None,
        image: Some((writer, tree)),
    })
}

struct Layer<'a> {
    root: BorrowedFd<'a>,
    /// The directory of the entry before: most archives list a directory's files in a row.
    parent: Option<Parent>,
    /// By their path without links; the root is the empty one.
    directories: BTreeMap<Vec<u8>, Directory>,
    done: Unpacked,
    defaults: Defaults,
}

/// What a new file gets by itself.
struct Defaults {
    /// Bits that its mode loses.
    umask: u32,
    /// Its owner and group, if that is certain.
    owner: Option<(u32, u32)>,
}

impl Defaults {
    /// Below `root`, a new directory, whose directories have no set-group-id bit and no default ACL
    /// until all is in place.
    fn of(root: BorrowedFd<'_>) -> Self {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        let owner = rustix::fs::fstat(root)
            .ok()
            // Else the group is inherited: by the bit, or by a mount option.
            .filter(|stat| stat.st_mode & 0o2000 == 0 && stat.st_gid == gid.as_raw())
            .map(|_| (uid.as_raw(), gid.as_raw()));
        // umask(2) tells only by setting it (proc_pid_status(5)).
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
        let umask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
        let umask = umask.and_then(|text| u32::from_str_radix(text.trim(), 8).ok());
        Self { umask: umask.unwrap_or(0o777), owner }
    }
}

impl Layer<'_> {
    fn place<R: BufRead>(&mut self, entry: Entry, archive: &mut Archive<R>) -> Result<(), Error> {
        let shown = || show(&entry.path);
        let refuse = |rule| Error::Refused { path: shown(), rule };
        let write = |e: Errno| Error::Write { path: shown(), source: e.into() };
        let path = clean(&entry.path).map_err(refuse)?;
        if path.is_empty() {
            if entry.kind != Kind::Directory {
                return Err(refuse("the layer's root must be a directory"));
            }
            check_xattrs(&entry.xattrs).map_err(refuse)?;
            self.list(path, entry);
            return Ok(());
        }
        let (parent_path, name) = match path.iter().rposition(|b| *b == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&path[..0], &path[..]),
        };
        if let Some(marker) = marker(name) {
            return self.mark(&entry, parent_path, marker.map_err(refuse)?);
        }
        check_xattrs(&entry.xattrs).map_err(refuse)?;
        let parent = self.enter(parent_path, &entry.path)?;
        let path = join(&parent.real, name);
        let name = OsStr::from_bytes(name);
        let parent = parent.fd.clone();
        let parent = parent.as_fd();
        let recorder = archive.recorder();
        match &entry.kind {
            Kind::Directory => {
                if let Err(e) = rustix::fs::mkdirat(parent, name, Mode::RWXU) {
                    if e != Errno::EXIST {
                        return Err(write(e));
                    }
                    let cleared = self.clear(parent, name, &path, true, recorder).map_err(write)?;
                    if cleared != Cleared::Kept {
                        rustix::fs::mkdirat(parent, name, Mode::RWXU).map_err(write)?;
                        self.count(0);
                        // The archive, applied in order, would have emptied what is below.
                        self.directories.entry(path.clone()).or_default().opaque = true;
                    }
                } else {
                    self.count(0);
                }
                self.list(path, entry);
                return Ok(());
            }
            Kind::File => {
                let flags = OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::WRONLY
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                // Most files can be made as they are to be, which saves two calls for each.
                let plain = entry.mode & (self.defaults.umask | !0o777) == 0;
                let mode = if plain { entry.mode } else { 0o600 };
                let mode = Mode::from_raw_mode(mode as RawMode);
                let open = || rustix::fs::openat(parent, name, flags, mode);
                let file = match open() {
                    Err(Errno::EXIST) => {
                        self.clear(parent, name, &path, false, recorder).map_err(write)?;
                        open()
                    }
                    other => other,
                }
                .map_err(write)?;
                let file = std::fs::File::from(file);
                let stored = copy(archive, &entry, &path, &file)?;
                self.count(stored);
                if self.defaults.owner != Some((entry.uid, entry.gid)) {
                    rustix::fs::fchown(&file, uid(entry.uid), gid(entry.gid)).map_err(write)?;
                }
                if !plain {
                    rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.mode as RawMode))
                        .map_err(write)?;
                }
                for (name, value) in wanted_xattrs(&entry.xattrs) {
                    rustix::fs::fsetxattr(&file, name, value, XattrFlags::empty())
                        .or_else(|e| forgive(name, e))
                        .map_err(write)?;
                }
                rustix::fs::futimens(&file, &times(entry.mtime)).map_err(write)?;
                if stored >= WRITE_BACK {
                    write_back(&file);
                }
                return Ok(());
            }
            Kind::HardLink(target) => {
                return self.hard_link(&entry, target, parent, name, &path, recorder);
            }
            _ => {}
        }
        // What is left is made by one call and changed by name. Nobody else can be in this
        // directory, so the name stays what was just made.
        let make = || match &entry.kind {
            Kind::Symlink(target) => rustix::fs::symlinkat(OsStr::from_bytes(target), parent, name),
            Kind::Char(major, minor) => {
                mknod(parent, name, FileType::CharacterDevice, *major, *minor)
            }
            Kind::Block(major, minor) => mknod(parent, name, FileType::BlockDevice, *major, *minor),
            Kind::Fifo => mknod(parent, name, FileType::Fifo, 0, 0),
            Kind::Directory | Kind::File | Kind::HardLink(_) => unreachable!("made above"),
        };
        match make() {
            Err(Errno::EXIST) => {
                self.clear(parent, name, &path, false, recorder).map_err(write)?;
                make()
            }
            other => other,
        }
        .map_err(write)?;
        self.count(0);
        let nofollow = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(parent, name, uid(entry.uid), gid(entry.gid), nofollow)
            .map_err(write)?;
        if !matches!(entry.kind, Kind::Symlink(_)) {
            let mode = Mode::from_raw_mode(entry.mode as RawMode);
            rustix::fs::chmodat(parent, name, mode, AtFlags::empty()).map_err(write)?;
        }
        if !entry.xattrs.is_empty() {
            let by_name = through_proc(parent, name);
            for (name, value) in wanted_xattrs(&entry.xattrs) {
                rustix::fs::lsetxattr(&by_name, name, value, XattrFlags::empty())
                    .or_else(|e| forgive(name, e))
                    .map_err(write)?;
            }
        }
        rustix::fs::utimensat(parent, name, &times(entry.mtime), nofollow).map_err(write)
    }

    /// Keeps a directory's attributes for the end.
    fn list(&mut self, path: Vec<u8>, entry: Entry) {
        let Entry { mode, uid, gid, mtime, xattrs, .. } = entry;
        self.directories.entry(path).or_default().listed =
            Some(Attributes { mode, uid, gid, mtime, xattrs });
    }

    fn count(&mut self, stored: u64) {
        self.done.inodes += 1;
        self.done.bytes += stored.next_multiple_of(4096);
    }

    fn mark(&mut self, entry: &Entry, parent_path: &[u8], marker: Marker<'_>) -> Result<(), Error> {
        let write = |e: Errno| Error::Write { path: show(&entry.path), source: e.into() };
        let hidden = match marker {
            Marker::Opaque => {
                let real = self.enter(parent_path, &entry.path)?.real.clone();
                self.directories.entry(real).or_default().opaque = true;
                return Ok(());
            }
            Marker::Nothing => return Ok(()),
            Marker::Gone(hidden) => hidden,
        };
        let parent = self.enter(parent_path, &entry.path)?;
        let path = join(&parent.real, hidden);
        let parent = parent.fd.try_clone();
        let parent = parent.map_err(|source| Error::Write { path: show(&entry.path), source })?;
        let name = OsStr::from_bytes(hidden);
        match mknod(parent.as_fd(), name, FileType::CharacterDevice, 0, 0) {
            Ok(()) => self.count(0),
            // A whiteout never hides what its own layer has (layer.md). A file hides what is
            // below by itself; a directory must say so.
            Err(Errno::EXIST) => {
                let stat =
                    rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(write)?;
                if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                    self.directories.entry(path).or_default().opaque = true;
                }
            }
            Err(e) => return Err(write(e)),
        }
        Ok(())
    }

    fn hard_link(
        &mut self,
        entry: &Entry,
        target: &[u8],
        parent: BorrowedFd<'_>,
        name: &OsStr,
        path: &[u8],
        recorder: Option<&mut Recorder>,
    ) -> Result<(), Error> {
        let refuse = |rule| Error::Refused { path: show(&entry.path), rule };
        let write = |e: Errno| Error::Write { path: show(&entry.path), source: e.into() };
        let target = clean(target)
            .ok()
            .filter(|target| !target.is_empty())
            .ok_or(refuse("the target of a hard link must be a path inside the layer"))?;
        if clean(&entry.path).is_ok_and(|path| path == target) {
            return Ok(());
        }
        let (from_path, from_name) = match target.iter().rposition(|b| *b == b'/') {
            Some(slash) => (&target[..slash], &target[slash + 1..]),
            None => (&target[..0], &target[..]),
        };
        let missing = "the target of a hard link must be an earlier file of the same layer";
        let from = open_beneath(self.root, from_path).map_err(|e| match e {
            Errno::XDEV => refuse("the target of a hard link is outside the layer"),
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP => refuse(missing),
            e => write(e),
        })?;
        let from_name = OsStr::from_bytes(from_name);
        let link = || rustix::fs::linkat(&from, from_name, parent, name, AtFlags::empty());
        match link() {
            Err(Errno::EXIST) => {
                let at = |dir: BorrowedFd<'_>, name: &OsStr| {
                    rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
                };
                let (old, new) = (
                    at(from.as_fd(), from_name).map_err(|_| refuse(missing))?,
                    at(parent, name).map_err(write)?,
                );
                if (old.st_dev, old.st_ino) == (new.st_dev, new.st_ino) {
                    return Ok(());
                }
                // Making way must not take the target along.
                let inside = real_path(self.root, from.as_fd())
                    .map_err(|source| Error::Write { path: show(&entry.path), source })?;
                if inside.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
                {
                    return Err(refuse(missing));
                }
                self.clear(parent, name, path, false, recorder).map_err(write)?;
                link()
            }
            other => other,
        }
        .map_err(|e| match e {
            Errno::NOENT => refuse(missing),
            Errno::PERM => refuse("a hard link to a directory"),
            e => write(e),
        })
    }

    /// Makes the directory `path` the current parent; it and those above it are made if missing.
    fn enter(&mut self, path: &[u8], entry: &[u8]) -> Result<&Parent, Error> {
        if self.parent.as_ref().is_none_or(|parent| parent.named != path) {
            let refuse = |rule| Error::Refused { path: show(entry), rule };
            let write = |e: Errno| Error::Write { path: show(entry), source: e.into() };
            // Most have no link in their path, and then it is the real one.
            let plain = ResolveFlags::NO_SYMLINKS;
            let (real, fd) = match open_beneath_with(self.root, path, plain) {
                Ok(fd) => (path.to_vec(), fd),
                Err(_) => {
                    let fd = match open_beneath(self.root, path) {
                        Ok(fd) => fd,
                        Err(Errno::NOENT | Errno::NOTDIR) => self.make_parents(path, entry)?,
                        Err(Errno::XDEV) => {
                            return Err(refuse(
                                "a symbolic link in its path leads out of the layer",
                            ));
                        }
                        Err(Errno::LOOP) => {
                            return Err(refuse("symbolic links in its path form a loop"));
                        }
                        Err(e) => return Err(write(e)),
                    };
                    let real = real_path(self.root, fd.as_fd())
                        .map_err(|source| Error::Write { path: show(entry), source })?;
                    (real, fd)
                }
            };
            self.parent = Some(Parent { named: path.to_vec(), real, fd: fd.into() });
        }
        Ok(self.parent.as_ref().expect("just set"))
    }

    fn make_parents(&mut self, path: &[u8], entry: &[u8]) -> Result<OwnedFd, Error> {
        let refuse = |rule| Error::Refused { path: show(entry), rule };
        let write = |e: Errno| Error::Write { path: show(entry), source: e.into() };
        let mut at = open_beneath(self.root, b"").map_err(write)?;
        let mut end = 0;
        for name in path.split(|b| *b == b'/') {
            end += name.len() + usize::from(end > 0);
            let so_far = &path[..end];
            let name = OsStr::from_bytes(name);
            at = match open_beneath(self.root, so_far) {
                Ok(fd) => fd,
                Err(e @ (Errno::NOENT | Errno::NOTDIR)) => {
                    let mut opaque = false;
                    if e == Errno::NOTDIR {
                        // `.wh.NAME`, then NAME/…: the old one is gone, this is a new one.
                        let stat = rustix::fs::statat(&at, name, AtFlags::SYMLINK_NOFOLLOW)
                            .map_err(write)?;
                        if !tree::is_whiteout(&stat) {
                            return Err(refuse("a part of its path is not a directory"));
                        }
                        rustix::fs::unlinkat(&at, name, AtFlags::empty()).map_err(write)?;
                        opaque = true;
                    }
                    match rustix::fs::mkdirat(&at, name, Mode::RWXU) {
                        Ok(()) => {}
                        Err(Errno::EXIST) => {
                            return Err(refuse("a symbolic link in its path leads nowhere"));
                        }
                        Err(e) => return Err(write(e)),
                    }
                    self.count(0);
                    let made = open_beneath(self.root, so_far).map_err(write)?;
                    let real = real_path(self.root, made.as_fd())
                        .map_err(|source| Error::Write { path: show(entry), source })?;
                    self.directories.entry(real).or_default().opaque |= opaque;
                    made
                }
                Err(Errno::XDEV) => {
                    return Err(refuse("a symbolic link in its path leads out of the layer"));
                }
                Err(Errno::LOOP) => return Err(refuse("symbolic links in its path form a loop")),
                Err(e) => return Err(write(e)),
            };
        }
        Ok(at)
    }

    /// Makes way for an entry of the same name: a later one wins.
    fn clear(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &OsStr,
        path: &[u8],
        for_directory: bool,
        recorder: Option<&mut Recorder>,
    ) -> Result<Cleared, Errno> {
        let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let errno = |e: io::Error| Errno::from_io_error(&e).unwrap_or(Errno::IO);
        match (kind, recorder) {
            (FileType::Directory, _) if for_directory => return Ok(Cleared::Kept),
            // It is part of the archive still.
            (FileType::Directory | FileType::RegularFile, Some(recorder)) => {
                recorder.replaced(parent, name, path).map_err(errno)?;
            }
            (FileType::Directory, None) => tree::remove_at(parent, name).map_err(errno)?,
            _ => rustix::fs::unlinkat(parent, name, AtFlags::empty())?,
        }
        // What is known of paths through it (it may have been a link) is void.
        self.directories.remove(path);
        let below = [path, b"/"].concat();
        let gone: Vec<_> = self
            .directories
            .range(below.clone()..)
            .map(|(path, _)| path)
            .take_while(|path| path.starts_with(&below))
            .cloned()
            .collect();
        for path in gone {
            self.directories.remove(&path);
        }
        self.parent = None;
        Ok(Cleared::Removed)
    }

    /// Sets the attributes of all directories.
    fn finish(mut self) -> Result<Unpacked, Error> {
        for (path, directory) in &self.directories {
            let write = |e: Errno| Error::Write { path: show(path), source: e.into() };
            let fd = open_beneath(self.root, path).map_err(write)?;
            let implied = Attributes { mode: 0o755, ..Attributes::default() };
            let attributes = directory.listed.as_ref().unwrap_or(&implied);
            rustix::fs::fchown(&fd, uid(attributes.uid), gid(attributes.gid)).map_err(write)?;
            let mode = Mode::from_raw_mode(attributes.mode as RawMode);
            rustix::fs::fchmod(&fd, mode).map_err(write)?;
            for (name, value) in wanted_xattrs(&attributes.xattrs) {
                rustix::fs::fsetxattr(&fd, name, value, XattrFlags::empty())
                    .or_else(|e| forgive(name, e))
                    .map_err(write)?;
            }
            // On the root it would mean nothing.
            if directory.opaque && !path.is_empty() {
                rustix::fs::fsetxattr(&fd, OPAQUE, b"y", XattrFlags::empty()).map_err(write)?;
            }
            match (&directory.listed, path.is_empty()) {
                (Some(_), root) => {
                    self.done.root_listed |= root;
                    rustix::fs::futimens(&fd, &times(attributes.mtime)).map_err(write)?;
                }
                (None, true) => {}
                // Hidden below: nothing to take attributes from.
                (None, false) if directory.opaque => {}
                (None, false) => {
                    self.done.implied.push(PathBuf::from(OsStr::from_bytes(path)));
                }
            }
        }
        Ok(self.done)
    }
}

#[derive(PartialEq, Eq)]
enum Cleared {
    /// A directory stays for a directory.
    Kept,
    Removed,
}

/// Has the kernel begin to write a file's data to disk (sync_file_range(2)), so that less is left for the
/// sync at the end of the pull. Small files are better written together, by that.
#[expect(unsafe_code, reason = "sync_file_range(2)")]
pub(super) fn write_back(file: &std::fs::File) {
    use std::os::fd::AsRawFd;
    // SAFETY: it takes numbers only. What goes wrong here the sync finds again and tells.
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Writes the data of a file; returns the bytes that are stored.
fn copy<R: BufRead>(
    archive: &mut Archive<R>,
    entry: &Entry,
    path: &[u8],
    file: &std::fs::File,
) -> Result<u64, Error> {
    let whole = [(0, entry.size)];
    let pieces = entry.sparse.as_ref().map_or(&whole[..], |sparse| &sparse.pieces);
    if let Some(recorder) = archive.recorder() {
        recorder.content(path, pieces);
    }
    for (offset, length) in pieces {
        let mut done = 0;
        while archive.data(length - done, |data| -> Result<usize, Error> {
            file.write_all_at(data, offset + done)
                .map_err(|source| Error::Write { path: show(&entry.path), source })?;
            done += data.len() as u64;
            Ok(data.len())
        })? {}
    }
    if let Some(sparse) = &entry.sparse {
        file.set_len(sparse.size)
            .map_err(|source| Error::Write { path: show(&entry.path), source })?;
    }
    Ok(entry.size)
}

/// The path without empty and `.` parts, or which rule it breaks.
pub(super) fn clean(path: &[u8]) -> Result<Vec<u8>, &'static str> {
    if path.is_empty() {
        return Err("its path is empty");
    }
    if path.starts_with(b"/") {
        return Err("its path is absolute");
    }
    if path.len() > MAX_PATH {
        return Err("its path is longer than 4095 bytes");
    }
    let mut cleaned = Vec::with_capacity(path.len());
    let mut depth = 0;
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => continue,
            b".." => return Err("its path has '..' in it"),
            _ if part.len() > 255 => return Err("a name in its path is longer than 255 bytes"),
            _ => {}
        }
        if !cleaned.is_empty() {
            cleaned.push(b'/');
        }
        cleaned.extend_from_slice(part);
        depth += 1;
    }
    if depth > MAX_DEPTH {
        return Err("it is nested deeper than 256 directories");
    }
    Ok(cleaned)
}

/// What an entry says of the layers below, by a name that begins with `.wh.` (image-spec layer.md
/// "Whiteouts").
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Marker<'a> {
    /// `.wh.NAME`: NAME is gone.
    Gone(&'a [u8]),
    /// `.wh..wh..opq`: all of this directory is.
    Opaque,
    /// aufs' own bookkeeping (.wh..wh.plnk, .wh..wh.aufs): no content.
    Nothing,
}

/// The marker that an entry of this name is, or which rule it breaks; `None`: it is a file or the like.
pub(super) fn marker(name: &[u8]) -> Option<Result<Marker<'_>, &'static str>> {
    Some(match name.strip_prefix(b".wh.")? {
        b".wh..opq" => Ok(Marker::Opaque),
        hidden if hidden.starts_with(b".wh.") => Ok(Marker::Nothing),
        b"" | b"." | b".." => Err("a whiteout must name what it hides"),
        hidden => Ok(Marker::Gone(hidden)),
    })
}

/// overlayfs' own attributes decide how layers are put together: a layer may not bring them.
pub(super) fn check_xattrs(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<(), &'static str> {
    if xattrs.iter().any(|(name, _)| name.starts_with(b"trusted.overlay.")) {
        return Err("it has an attribute of overlayfs");
    }
    Ok(())
}

/// SELinux labels are the node's to give.
pub(super) fn wanted_xattrs(
    xattrs: &[(Vec<u8>, Vec<u8>)],
) -> impl Iterator<Item = (&OsStr, &[u8])> {
    xattrs
        .iter()
        .filter(|(name, _)| name != b"security.selinux")
        .map(|(name, value)| (OsStr::from_bytes(name), value.as_slice()))
}

/// A file system without user attributes loses only those.
fn forgive(name: &OsStr, error: Errno) -> Result<(), Errno> {
    if error == Errno::OPNOTSUPP && name.as_bytes().starts_with(b"user.") {
        return Ok(());
    }
    Err(error)
}

fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}

/// Where the open directory `fd` is in `root`.
pub(super) fn real_path(root: BorrowedFd<'_>, fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    use std::os::fd::AsRawFd;
    let name = |fd: BorrowedFd<'_>| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let (base, full) = (name(root)?, name(fd)?);
    let inside = full.strip_prefix(&base).map_err(|_| io::ErrorKind::NotFound)?;
    Ok(inside.as_os_str().as_bytes().to_vec())
}

/// Opens a directory beneath `root`; links are followed as long as they stay there.
fn open_beneath(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    open_beneath_with(root, path, ResolveFlags::empty())
}

fn open_beneath_with(
    root: BorrowedFd<'_>,
    path: &[u8],
    more: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { b"." } else { path };
    rustix::fs::openat2(
        root,
        OsStr::from_bytes(path),
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | more,
    )
}

fn mknod(
    parent: BorrowedFd<'_>,
    name: &OsStr,
    kind: FileType,
    major: u32,
    minor: u32,
) -> Result<(), Errno> {
    let device = rustix::fs::makedev(major, minor);
    rustix::fs::mknodat(parent, name, kind, Mode::RUSR | Mode::WUSR, device)
}

/// There is no setxattrat before Linux 6.13; the last part of this path is not followed.
pub(super) fn through_proc(parent: BorrowedFd<'_>, name: &OsStr) -> PathBuf {
    use std::os::fd::AsRawFd;
    PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd())).join(name)
}

fn uid(id: u32) -> Option<Uid> {
    Some(Uid::from_raw(id))
}

fn gid(id: u32) -> Option<Gid> {
    Some(Gid::from_raw(id))
}

/// Access time is made equal: a layer says nothing of it.
fn times(time: Time) -> Timestamps {
    let time = Timespec { tv_sec: time.seconds, tv_nsec: time.nanos.into() };
    Timestamps { last_access: time, last_modification: time }
}

/// A path as a message shows it: one line, of bounded length.
pub(super) fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(&path[..path.len().min(200)]).into_owned()
}

/// Opens the directory at `path` for [`unpack`].
pub fn open_root(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?)
}

#[cfg(test)]
#[path = "unpack_tests.rs"]
pub(super) mod tests;

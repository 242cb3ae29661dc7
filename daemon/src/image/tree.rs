//! Directory trees that strangers made: removing, measuring and copying them.
//!
//! A container may nest directories as deep as it likes, deeper than any stack, any limit of open
//! files and PATH_MAX. Nothing here recurses without bound.

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps,
        Uid,
    },
    io::Errno,
};

use super::layers::copy_attributes;

/// Depth at which a directory is moved up before it is gone through.
const DEPTH: usize = 32;

/// Whether it is overlayfs' mark for a name that is gone: a character device 0/0.
pub fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Removes `path` and everything below it. That it does not exist is no error.
pub fn remove(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    match open(CWD, parent.as_os_str()) {
        Ok(parent) => remove_at(parent.as_fd(), name),
        Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// The same for `name` in `parent`; links are not followed.
pub fn remove_at(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let top = match open(parent, name) {
        Ok(top) => top,
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTDIR | Errno::LOOP) => {
            return Ok(rustix::fs::unlinkat(parent, name, AtFlags::empty())?);
        }
        Err(e) => return Err(e.into()),
    };
    let mut moved = 0;
    // Directories that were moved up are found by the next round.
    loop {
        let before = moved;
        empty(&top, top.as_fd(), 0, &mut moved)?;
        if moved == before {
            break;
        }
    }
    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn empty(
    top: &OwnedFd,
    directory: BorrowedFd<'_>,
    depth: usize,
    moved: &mut u64,
) -> io::Result<()> {
    for (name, kind) in names(directory)? {
        if kind != FileType::Directory {
            match rustix::fs::unlinkat(directory, &name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => continue,
                // The file system did not tell the type.
                Err(Errno::ISDIR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        if depth == DEPTH {
            *moved += 1;
            // `top` is being emptied: any name is free sooner or later.
            let mut up = format!(".{moved}");
            while let Err(e) = rustix::fs::renameat_with(
                directory,
                &name,
                top,
                &up,
                rustix::fs::RenameFlags::NOREPLACE,
            ) {
                if e != Errno::EXIST {
                    return Err(e.into());
                }
                *moved += 1;
                up = format!(".{moved}");
            }
            continue;
        }
        let below = open(directory, &name)?;
        empty(top, below.as_fd(), depth + 1, moved)?;
        drop(below);
        match rustix::fs::unlinkat(directory, &name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Bytes and inodes that the tree at `path` takes. What vanishes meanwhile is not counted; hard
/// links are counted once for each name. Deeper than 4,000 levels is not looked at.
pub fn usage(path: &Path) -> io::Result<(u64, u64)> {
    const DEEPEST: usize = 4_000;
    let root = open(CWD, path.as_os_str())?;
    let (mut bytes, mut inodes) = (0, 0);
    // Relative paths instead of open directories: a bound on neither depth nor width of fds.
    let mut todo = vec![(OsString::from("."), 0)];
    while let Some((directory, depth)) = todo.pop() {
        let fd = match open(root.as_fd(), &directory) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG) => continue,
            Err(e) => return Err(e.into()),
        };
        for (name, _) in names(fd.as_fd())? {
            let Ok(stat) = rustix::fs::statat(&fd, &name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            bytes += stat.st_blocks as u64 * 512;
            inodes += 1;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory && depth < DEEPEST {
                let mut path = directory.clone();
                path.push("/");
                path.push(&name);
                todo.push((path, depth + 1));
            }
        }
    }
    Ok((bytes, inodes))
}

/// Copies what is in the directory `from` into the empty directory `to`, and makes `to` like it:
/// owners, modes, attributes, times, hard links. Sockets are left out: nobody could listen at a copy.
///
/// Paths longer than PATH_MAX are an error: no image can have been unpacked with them.
pub fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let from_root = from.try_clone_to_owned()?;
    let to_root = to.try_clone_to_owned()?;
    // Relative paths instead of open directories: no bound on depth by open files.
    let mut todo = vec![PathBuf::from(".")];
    let mut directories = Vec::new();
    let mut linked: HashMap<(u64, u64), PathBuf> = HashMap::new();
    while let Some(path) = todo.pop() {
        let (from, to) = (beneath(&from_root, &path)?, beneath(&to_root, &path)?);
        for (name, _) in names(from.as_fd())? {
            let stat = rustix::fs::statat(&from, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            let inside = path.join(&name);
            let kind = FileType::from_raw_mode(stat.st_mode);
            if kind == FileType::Socket {
                continue;
            }
            if kind == FileType::Directory {
                rustix::fs::mkdirat(&to, &name, Mode::RWXU)?;
                todo.push(inside);
                continue;
            }
            if stat.st_nlink > 1 {
                match linked.entry((stat.st_dev, stat.st_ino)) {
                    Entry::Occupied(first) => {
                        rustix::fs::linkat(&to_root, first.get(), &to, &name, AtFlags::empty())?;
                        continue;
                    }
                    Entry::Vacant(entry) => drop(entry.insert(inside)),
                }
            }
            copy_one(&from, &to, &name, kind, &stat)?;
        }
        directories.push(path);
    }
    // Last, and from below: making entries changes the times of what they are in.
    for path in directories.iter().rev() {
        copy_attributes(&beneath(&from_root, path)?, &beneath(&to_root, path)?)?;
    }
    Ok(())
}

/// A file, link, FIFO or device that is not there yet.
fn copy_one(
    from: &OwnedFd,
    to: &OwnedFd,
    name: &OsStr,
    kind: FileType,
    stat: &Stat,
) -> io::Result<()> {
    let owner = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    if kind == FileType::RegularFile {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let source = rustix::fs::openat(from, name, flags | OFlags::RDONLY, Mode::empty())?;
        let new = flags | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let target = rustix::fs::openat(to, name, new, Mode::RUSR | Mode::WUSR)?;
        let (mut source, mut target) = (File::from(source), File::from(target));
        io::copy(&mut source, &mut target)?;
        return copy_attributes(&source.into(), &target.into());
    }
    if kind == FileType::Symlink {
        let link = rustix::fs::readlinkat(from, name, Vec::new())?;
        rustix::fs::symlinkat(&link, to, name)?;
    } else {
        rustix::fs::mknodat(to, name, kind, Mode::empty(), stat.st_rdev)?;
    }
    let links = AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(to, name, Some(owner.0), Some(owner.1), links)?;
    if kind != FileType::Symlink {
        // After the change of owner, which may take bits away.
        rustix::fs::chmodat(
            to,
            name,
            Mode::from_raw_mode(stat.st_mode & 0o7777),
            AtFlags::empty(),
        )?;
    }
    let time = |seconds: i64, nanos: u64| Timespec { tv_sec: seconds, tv_nsec: nanos as i64 };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    Ok(rustix::fs::utimensat(to, name, &times, links)?)
}

fn beneath(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    Ok(rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?)
}

/// The names in a directory, without `.` and `..`.
pub fn names(directory: BorrowedFd<'_>) -> io::Result<Vec<(OsString, FileType)>> {
    let mut found = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            found.push((OsStr::from_bytes(name).to_owned(), entry.file_type()));
        }
    }
    Ok(found)
}

fn open(parent: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_deeper_than_any_path_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        std::fs::create_dir(&top).unwrap();
        let mut at = open(CWD, top.as_os_str()).unwrap();
        for _ in 0..3_000 {
            rustix::fs::mkdirat(&at, "directory", Mode::RWXU).unwrap();
            rustix::fs::mkdirat(&at, ".1", Mode::RWXU).unwrap();
            at = open(at.as_fd(), OsStr::new("directory")).unwrap();
        }
        usage(&top).unwrap();
        remove(&top).unwrap();
        assert!(!top.exists());
        remove(&top).unwrap();
    }

    #[test]
    fn a_copy_has_owners_modes_links_attributes_and_times() {
        use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
        if !rustix::process::geteuid().is_root() {
            eprintln!("not run: only root may give files away");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::create_dir_all(from.join("a/b")).unwrap();
        std::fs::create_dir(&to).unwrap();
        std::fs::write(from.join("a/file"), "content").unwrap();
        std::fs::hard_link(from.join("a/file"), from.join("a/b/same")).unwrap();
        symlink("/etc/shadow", from.join("a/link")).unwrap();
        rustix::fs::mkfifoat(CWD, from.join("fifo"), Mode::RWXU).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(from.join("socket")).unwrap();
        let give = |path: &str, uid, gid, mode| {
            std::os::unix::fs::lchown(from.join(path), Some(uid), Some(gid)).unwrap();
            if !path.ends_with("link") {
                let mode = std::fs::Permissions::from_mode(mode);
                std::fs::set_permissions(from.join(path), mode).unwrap();
            }
        };
        give("", 5, 6, 0o2751);
        give("a", 1, 2, 0o1700);
        give("a/file", 3, 4, 0o4755);
        give("a/link", 7, 8, 0);
        give("fifo", 9, 10, 0o622);
        let file = File::open(from.join("a/file")).unwrap();
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::fsetxattr(&file, "trusted.test", b"value", flags).unwrap();
        let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        file.set_modified(old).unwrap();
        File::open(from.join("a")).unwrap().set_modified(old).unwrap();

        let open_dir = |path: &Path| open(CWD, path.as_os_str()).unwrap();
        copy(open_dir(&from).as_fd(), open_dir(&to).as_fd()).unwrap();
        let look = |root: &Path, path: &str| {
            let meta = std::fs::symlink_metadata(root.join(path)).unwrap();
            (meta.uid(), meta.gid(), meta.mode(), meta.nlink(), meta.mtime(), meta.size())
        };
        for path in ["", "a", "a/b", "a/file", "a/b/same", "a/link", "fifo"] {
            let (mut is, mut was) = (look(&to, path), look(&from, path));
            if path.is_empty() || path == "a" || path == "a/b" {
                // How a file system counts directories is its own matter.
                (is.3, was.3, is.5, was.5) = (0, 0, 0, 0);
            }
            assert_eq!(is, was, "{path:?}");
        }
        assert_eq!(std::fs::read_to_string(to.join("a/b/same")).unwrap(), "content");
        assert_eq!(std::fs::read_link(to.join("a/link")).unwrap(), Path::new("/etc/shadow"));
        let mut value = [0; 8];
        let file = File::open(to.join("a/file")).unwrap();
        assert_eq!(rustix::fs::fgetxattr(&file, "trusted.test", &mut value).unwrap(), 5);
        assert!(!to.join("socket").exists());
    }

    #[test]
    fn links_out_of_a_tree_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (top, kept) = (dir.path().join("top"), dir.path().join("kept"));
        std::fs::create_dir(&top).unwrap();
        std::fs::create_dir(&kept).unwrap();
        std::fs::write(kept.join("file"), "x").unwrap();
        std::os::unix::fs::symlink(&kept, top.join("link")).unwrap();
        assert_eq!(usage(&top).unwrap().1, 1);
        remove(&top).unwrap();
        assert!(kept.join("file").exists() && !top.exists());
        std::os::unix::fs::symlink(&kept, &top).unwrap();
        remove(&top).unwrap();
        assert!(kept.join("file").exists() && !top.exists());
    }
}

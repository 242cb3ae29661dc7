//! Directory trees that strangers made: removing and measuring them.
//!
//! A container may nest directories as deep as it likes, deeper than any stack, any limit of open
//! files and PATH_MAX. Nothing here recurses without bound.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat},
    io::Errno,
};

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

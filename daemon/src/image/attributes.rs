//! Reading extended attributes (xattr(7)).

use std::{
    ffi::OsStr,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::ffi::OsStrExt,
    },
};

use rustix::io::Errno;

use super::unpack::through_proc;

/// Largest list of names, and largest value, in bytes: the kernel's own (limits.h, XATTR_LIST_MAX).
const MOST: usize = 64 << 10;

/// A name and its value.
pub(super) type Attribute = (Vec<u8>, Vec<u8>);

/// Those of an open file, in order of name.
pub(super) fn of_file(file: impl AsFd) -> io::Result<Vec<Attribute>> {
    let file = file.as_fd();
    read(
        |names| rustix::fs::flistxattr(file, names),
        |name, value| rustix::fs::fgetxattr(file, name, value),
    )
}

/// Those of whatever `name` in `parent` is, which is neither opened nor followed; in order of name.
pub(super) fn of_name(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<Vec<Attribute>> {
    // There is no getxattrat before Linux 6.13.
    let path = through_proc(parent, name);
    read(
        |names| rustix::fs::llistxattr(&path, names),
        |name, value| rustix::fs::lgetxattr(&path, name, value),
    )
}

fn read(
    list: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
    get: impl Fn(&OsStr, &mut [u8]) -> Result<usize, Errno>,
) -> io::Result<Vec<Attribute>> {
    let mut names = vec![0; MOST];
    let length = match list(&mut names) {
        Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Ok(length) => length,
        Err(error) => return Err(error.into()),
    };
    let mut found = Vec::new();
    let mut value = vec![0; MOST];
    for name in names[..length].split(|b| *b == 0).filter(|name| !name.is_empty()) {
        match get(OsStr::from_bytes(name), &mut value) {
            Ok(length) => found.push((name.to_owned(), value[..length].to_owned())),
            // Removed since it was listed.
            Err(Errno::NODATA) => {}
            Err(error) => return Err(error.into()),
        }
    }
    found.sort();
    Ok(found)
}

/// Whether it is an image's to have: not what overlayfs and the node keep on a file.
pub(super) fn is_content(name: &[u8]) -> bool {
    !name.starts_with(b"trusted.overlay.") && name != b"security.selinux"
}

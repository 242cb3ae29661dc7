//! Mounts whose owners are shown as a user namespace has them (mount_setattr(2), `MOUNT_ATTR_IDMAP`:
//! Linux 5.12, layers of overlayfs 5.19).

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, net::UnixStream},
    },
    path::Path,
};

use nix::sched::{CloneFlags, unshare};

use crate::{
    mount_attr::set_attributes, mounts::unmount, namespaces, options::UserMappings, process::check,
};

/// A user namespace of these mappings, in which nobody is.
///
/// # Errors
/// The kernel refuses it or its mappings.
#[expect(unsafe_code, reason = "waitpid(2)")]
pub(crate) fn user_namespace(ids: &UserMappings) -> io::Result<OwnedFd> {
    let (mut ours, theirs) = UnixStream::pair()?;
    let pid = namespaces::fork_helper(theirs, |mut wire| {
        let errno = unshare(CloneFlags::CLONE_NEWUSER).err().map_or(0, |errno| errno as i32);
        wire.write_all(&errno.to_ne_bytes())?;
        // Until its namespace is open: then the other end closes.
        wire.read(&mut [0]).map(drop)
    })?;
    let made = (|| {
        let mut errno = [0; 4];
        ours.read_exact(&mut errno)?;
        match i32::from_ne_bytes(errno) {
            0 => {}
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
        namespaces::map(pid, ids)?;
        File::open(format!("/proc/{pid}/ns/user"))
    })();
    drop(ours);
    // SAFETY: a child of ours that nobody else waits for: the one thread is here.
    while unsafe { libc::waitpid(pid.cast_signed(), std::ptr::null_mut(), 0) } == -1
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
    made.map(OwnedFd::from).map_err(|error| {
        io::Error::new(error.kind(), format!("make a user namespace of the mapped ids: {error}"))
    })
}

/// Puts the uppermost mount at `place` there again, in the place of all that are there; with the owners
/// that `users`, a user namespace, has for them.
///
/// # Errors
/// `EINVAL` with a namespace: the file system knows no mapped ids.
pub(crate) fn again(place: &Path, users: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let tree = copy(place)?;
    if let Some(users) = users {
        map(&tree, users)?;
    }
    unmount(place)?;
    attach(&tree, place)
}

#[expect(unsafe_code, reason = "open_tree(2)")]
fn copy(place: &Path) -> io::Result<OwnedFd> {
    let path = c_path(place)?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: the path is a string, which the call only reads; the descriptor is new and nobody else's.
    unsafe {
        let fd = libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags);
        Ok(OwnedFd::from_raw_fd(check(fd as libc::c_int)?))
    }
}

fn map(tree: &OwnedFd, users: BorrowedFd<'_>) -> io::Result<()> {
    set_attributes(tree.as_fd(), 0, Some(users)).map_err(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => io::Error::new(
            io::ErrorKind::Unsupported,
            "the file system of the layers, or this kernel, knows no mapped owners \
             (idmapped mounts: Linux 5.19 for overlayfs)",
        ),
        _ => error,
    })
}

#[expect(unsafe_code, reason = "move_mount(2)")]
fn attach(tree: &OwnedFd, place: &Path) -> io::Result<()> {
    let path = c_path(place)?;
    // SAFETY: the paths are strings, which the call only reads.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    check(result as libc::c_int).map(drop)
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

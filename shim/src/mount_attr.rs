//! mount_setattr(2), which libraries have no safe call for.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

/// Sets attributes of a mount (`MOUNT_ATTR_…`) that is attached nowhere yet, and its id mapping: that of
/// `users`, a user namespace.
///
/// # Errors
/// What the kernel says; `EINVAL` with a mapping: the file system, or the kernel, knows none.
#[expect(unsafe_code, reason = "mount_setattr(2)")]
pub fn set_attributes(
    mount: BorrowedFd<'_>,
    attributes: u64,
    users: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut attr =
        libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    if let Some(users) = users {
        attr.attr_set |= libc::MOUNT_ATTR_IDMAP;
        attr.userns_fd = users.as_raw_fd().unsigned_abs().into();
    }
    // SAFETY: the path is a string, the structure has the size that is given, and the call only
    // reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

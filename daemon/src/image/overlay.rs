//! overlayfs mounts that are attached nowhere yet (kernel Documentation/filesystems/overlayfs.rst).
//!
//! Layers are given one by one (`lowerdir+`, Linux 6.8), so neither the page that mount(2) has for
//! options nor the 256 bytes of one fsconfig(2) string bounds their number: overlayfs itself stops
//! at 500. On older kernels the layers are named relative to their common directory, from a thread
//! that has a working directory of its own; with short names 500 of them fit in that page.
//!
//! For a pod with a user namespace the layers are mapped (mount_setattr(2), Linux 5.19 for layers of
//! overlayfs): what is root's on disk is shown as the pod's root's. The writable layer is not: what
//! is written there has the owner that the mount shows, on disk as well.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use holdfast_shim::mount_attr::set_attributes;
use rustix::{
    fs::{CWD, Mode, OFlags},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags,
        MoveMountFlags, OpenTreeFlags, UnmountFlags,
    },
};

/// Most layers of one mount: OVL_MAX_STACK of the kernel.
pub const MAX_LOWERS: usize = 500;

/// A string of fsconfig(2), with its NUL, must fit here.
const MAX_STRING: usize = 256;

/// A layer, as an overlay takes it.
#[derive(Debug)]
pub enum Lower {
    /// A directory of this name beside the others.
    Name(String),
    /// The root of a mount that is attached nowhere: Linux 6.15.
    Mount(OwnedFd),
}

/// What is to be mounted.
#[derive(Clone, Copy, Debug)]
pub struct Overlay<'a> {
    /// The directory that holds all the layers.
    pub layers: &'a Path,
    /// Its layers, from the top.
    pub lowers: &'a [Lower],
    /// The writable layer and its work directory.
    pub writable: Option<(&'a Path, &'a Path)>,
    /// Mount read-only all the same.
    pub readonly: bool,
}

impl Overlay<'_> {
    /// Makes the mount. It goes when the fd does, unless it was attached. `scratch` is a directory
    /// in which an old kernel may need to make a mount point for a moment.
    pub fn mount(&self, scratch: &Path) -> io::Result<OwnedFd> {
        match self.mount_by_parts() {
            Err(e) if unknown_to_kernel(&e) => self.mount_at_once(scratch),
            result => result,
        }
    }

    /// The same with the layers seen through an id-mapped mount, as `users`, a user namespace, has
    /// it.
    pub fn mount_mapped(&self, users: BorrowedFd<'_>, scratch: &Path) -> io::Result<OwnedFd> {
        let mapped = self
            .lowers
            .iter()
            .map(|lower| match lower {
                Lower::Name(name) => Ok(Lower::Name(name.clone())),
                Lower::Mount(mount) => {
                    let mount = clone_mount(mount.as_fd())?;
                    set_attributes(mount.as_fd(), 0, Some(users))?;
                    Ok(Lower::Mount(mount))
                }
            })
            .collect::<io::Result<Vec<Lower>>>()?;
        let mapped = Overlay { lowers: &mapped, ..*self };
        if !mapped.lowers.iter().any(|lower| matches!(lower, Lower::Name(_))) {
            return mapped.mount(scratch);
        }
        let layers = bind(self.layers, false)?;
        set_attributes(layers.as_fd(), 0, Some(users))?;
        std::thread::scope(|scope| {
            scope
                .spawn(|| -> io::Result<OwnedFd> {
                    // The mapped layers lie over the real ones in a mount namespace that ends with
                    // this thread: nobody sees them and no crash leaves them. Before Linux 6.15 they
                    // had to be attached somewhere to be layers.
                    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
                    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
                    rustix::mount::mount_change("/", private)?;
                    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                    rustix::mount::move_mount(&layers, "", CWD, self.layers, flags)?;
                    mapped.mount(scratch)
                })
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
        })
    }

    fn mount_by_parts(&self) -> io::Result<OwnedFd> {
        let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        // Kept open until the mount is made: they are named through /proc.
        let mut open = Vec::new();
        let mut set = |key: &str, path: &Path| -> io::Result<()> {
            if path.as_os_str().len() < MAX_STRING {
                return Ok(rustix::mount::fsconfig_set_string(&context, key, path)?);
            }
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            open.push(fd);
            Ok(rustix::mount::fsconfig_set_string(&context, key, path)?)
        };
        let explained = |e: io::Error| explain(&context, e);
        for (index, lower) in self.lowers.iter().enumerate() {
            let added = match lower {
                Lower::Name(name) => set("lowerdir+", &self.layers.join(name)),
                Lower::Mount(mount) => rustix::mount::fsconfig_set_fd(&context, "lowerdir+", mount)
                    .map_err(|e| e.into()),
            };
            added.map_err(|e| {
                if index == 0 && e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) {
                    // Before 6.8 the key itself is unknown.
                    return Errno::NOSYS.into();
                }
                explained(e)
            })?;
        }
        if let Some((upper, work)) = self.writable {
            set("upperdir", upper).map_err(explained)?;
            set("workdir", work).map_err(explained)?;
        }
        for option in options() {
            rustix::mount::fsconfig_set_string(&context, option, "off")
                .map_err(|e| explained(e.into()))?;
        }
        rustix::mount::fsconfig_create(&context).map_err(|e| explained(e.into()))?;
        let attributes =
            if self.readonly { MountAttrFlags::MOUNT_ATTR_RDONLY } else { MountAttrFlags::empty() };
        Ok(rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
    }

    fn mount_at_once(&self, scratch: &Path) -> io::Result<OwnedFd> {
        let names = self.lowers.iter().map(|lower| match lower {
            Lower::Name(name) => Ok(name.as_str()),
            Lower::Mount(_) => Err(io::Error::from(io::ErrorKind::Unsupported)),
        });
        let names = names.collect::<io::Result<Vec<&str>>>()?;
        let point = tempfile_in(scratch)?;
        let mut options = format!("lowerdir={}", names.join(":")).into_bytes();
        if let Some((upper, work)) = self.writable {
            for (key, path) in [(",upperdir=", upper), (",workdir=", work)] {
                options.extend_from_slice(key.as_bytes());
                options.extend_from_slice(&escape(path));
            }
        }
        for option in self::options() {
            options.extend_from_slice(format!(",{option}=off").as_bytes());
        }
        let options = std::ffi::CString::new(options)?;
        let flags = if self.readonly { MountFlags::RDONLY } else { MountFlags::empty() };
        let mounted = std::thread::scope(|scope| {
            scope
                .spawn(|| -> io::Result<OwnedFd> {
                    // The working directory becomes this thread's own.
                    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
                    rustix::process::chdir(self.layers)?;
                    rustix::mount::mount("overlay", &point, "overlay", flags, Some(&*options))?;
                    let tree = rustix::mount::open_tree(
                        CWD,
                        &point,
                        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
                    );
                    rustix::mount::unmount(&point, UnmountFlags::DETACH)?;
                    Ok(tree?)
                })
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
        });
        std::fs::remove_dir(&point)?;
        mounted
    }
}

/// A bind mount of `path`, attached nowhere yet; with what is mounted below it if `below`.
pub fn bind(path: &Path, below: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, below);
    Ok(rustix::mount::open_tree(CWD, path, flags)?)
}

/// The same mount once more, attached nowhere.
pub fn clone_mount(mount: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(rustix::mount::open_tree(mount, "", flags)?)
}

/// Features that are off when the kernel has them: they would need the lower layers to be used by
/// nobody else (index) or write what other kernels cannot read (metacopy).
fn options() -> impl Iterator<Item = &'static str> {
    ["index", "metacopy"]
        .into_iter()
        .filter(|name| Path::new("/sys/module/overlay/parameters").join(name).exists())
}

fn unknown_to_kernel(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NOSYS.raw_os_error())
}

/// The error with what the kernel says about it: reading the context gives its messages.
pub(super) fn explain(context: &OwnedFd, error: io::Error) -> io::Error {
    let mut text = [0; 512];
    match rustix::io::read(context.as_fd(), &mut text) {
        Ok(length) if length > 0 => {
            let said = String::from_utf8_lossy(&text[..length]).trim().to_owned();
            io::Error::new(error.kind(), format!("{error}: {said}"))
        }
        _ => error,
    }
}

/// A new directory to mount on.
fn tempfile_in(scratch: &Path) -> io::Result<std::path::PathBuf> {
    let path = scratch.join(format!("mount-{:016x}", rand::random::<u64>()));
    std::fs::create_dir(&path)?;
    Ok(path)
}

/// Commas and backslashes mean something in mount options.
fn escape(path: &Path) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    let mut escaped = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        if matches!(byte, b',' | b'\\' | b':') {
            escaped.push(b'\\');
        }
        escaped.push(*byte);
    }
    escaped
}

#[cfg(test)]
mod tests {
    use rustix::fs::{AtFlags, FileType};

    use super::*;

    /// Both ways of mounting show the same files.
    #[test]
    fn five_hundred_layers_fit_in_either_way_of_mounting() {
        let dir = tempfile::tempdir().unwrap();
        let layers = dir.path().join("layers");
        let lowers: Vec<String> = (1..=MAX_LOWERS).rev().map(|n| n.to_string()).collect();
        for lower in &lowers {
            std::fs::create_dir_all(layers.join(lower)).unwrap();
            std::fs::write(layers.join(lower).join(format!("file-{lower}")), lower).unwrap();
            std::fs::write(layers.join(lower).join("same"), lower).unwrap();
        }
        let (upper, work) = (dir.path().join("up,per"), dir.path().join("work"));
        std::fs::create_dir(&upper).unwrap();
        std::fs::create_dir(&work).unwrap();
        let lowers: Vec<Lower> = lowers.into_iter().map(Lower::Name).collect();
        let overlay = Overlay {
            layers: &layers,
            lowers: &lowers,
            writable: Some((&upper, &work)),
            readonly: false,
        };
        for way in [Overlay::mount_by_parts, |o: &Overlay<'_>| {
            o.mount_at_once(o.writable.unwrap().0.parent().unwrap())
        }] {
            let fd = way(&overlay).unwrap();
            let read = |name: &str| {
                let fd = rustix::fs::openat(&fd, name, OFlags::RDONLY, Mode::empty()).unwrap();
                io::read_to_string(std::fs::File::from(fd)).unwrap()
            };
            assert_eq!(read("same"), "500");
            assert_eq!(read("file-1"), "1");
            rustix::fs::unlinkat(&fd, "file-2", AtFlags::empty()).unwrap_or_else(|e| {
                assert_eq!(e, Errno::NOENT, "the other way removed it before");
            });
            drop(fd);
            let stat = rustix::fs::stat(upper.join("file-2")).unwrap();
            assert_eq!(FileType::from_raw_mode(stat.st_mode), FileType::CharacterDevice);
        }
    }
}

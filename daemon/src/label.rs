//! SELinux labels of files: volumes are given the label that their container may touch.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{XattrFlags, lgetxattr, lsetxattr},
    io::Errno,
};

use crate::error::{Kind, Kinded};

/// The extended attribute that holds a file's context.
pub const SELINUX: &str = "security.selinux";

/// Longest context that is compared; a longer one counts as different.
const LABEL_LIMIT: usize = 4096;

/// Directories of the node itself: programs of the node would be locked out of them.
const NEVER: [&str; 19] = [
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/etc/passwd",
    "/etc/pki",
    "/etc/shadow",
    "/home",
    "/lib",
    "/lib64",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/sys",
    "/tmp",
    "/usr",
    "/var",
];

/// Why a volume was not labelled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A directory that the node needs as it is.
    #[error("selinux_relabel of {}: it is a directory of the node, which would lose access to it", .0.display())]
    Protected(PathBuf),
    /// A file.
    #[error("label {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Protected(_) => Kind::Invalid,
            Error::File { .. } => Kind::Internal,
        }
    }
}

/// Labels `root` and all that is below it. Nothing is done if `root` has the label: it is set last,
/// so it says that all of it was done. A file system without labels is left as it is.
pub fn relabel(root: &Path, label: &str, attribute: &str) -> Result<(), Error> {
    if NEVER.iter().any(|path| root == Path::new(path)) {
        return Err(Error::Protected(root.to_owned()));
    }
    let mut buffer = [0; LABEL_LIMIT];
    match lgetxattr(root, attribute, &mut buffer) {
        // The kernel gives the final zero byte back if there is one.
        Ok(length)
            if buffer[..length].strip_suffix(b"\0").unwrap_or(&buffer[..length])
                == label.as_bytes() =>
        {
            return Ok(());
        }
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Ok(_) | Err(_) => {}
    }
    walk(root, label, attribute)
}

fn walk(path: &Path, label: &str, attribute: &str) -> Result<(), Error> {
    let failed = |source: io::Error| Error::File { path: path.to_owned(), source };
    let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        // Volumes are written to while they are labelled.
        Err(error) if gone(&error) => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if meta.is_dir() {
        match fs::read_dir(path) {
            Ok(entries) => {
                for entry in entries {
                    walk(&entry.map_err(failed)?.path(), label, attribute)?;
                }
            }
            Err(error) if gone(&error) => return Ok(()),
            Err(error) => return Err(failed(error)),
        }
    }
    match lsetxattr(path, attribute, label.as_bytes(), XattrFlags::empty()) {
        // Gone meanwhile, or on a file system below that has no labels.
        Ok(()) | Err(Errno::NOENT | Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(failed(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Like SELinux's in all that matters here, and settable without it (root only).
    const FAKE: &str = "trusted.holdfast.test";

    fn label_of(path: &Path) -> Option<String> {
        let mut buffer = [0; 64];
        let length = lgetxattr(path, FAKE, &mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    #[test]
    fn everything_below_is_labelled_once() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path().join("volume");
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/file"), "").unwrap();
        std::os::unix::fs::symlink("/etc", root.join("link")).unwrap();
        match lsetxattr(&root, FAKE, b"probe", XattrFlags::empty()) {
            Ok(()) => {}
            Err(Errno::PERM | Errno::OPNOTSUPP) => {
                return eprintln!("skipped: needs root and trusted.*");
            }
            Err(error) => panic!("{error}"),
        }
        relabel(&root, "x:c1", FAKE).unwrap();
        for path in ["", "a", "a/b", "a/file", "link"] {
            assert_eq!(label_of(&root.join(path)).as_deref(), Some("x:c1"), "{path}");
        }
        assert_eq!(label_of(Path::new("/etc")), None, "links are not followed");
        // The root has it: the rest is believed.
        fs::write(root.join("new"), "").unwrap();
        relabel(&root, "x:c1", FAKE).unwrap();
        assert_eq!(label_of(&root.join("new")), None);
        relabel(&root, "x:c2", FAKE).unwrap();
        assert_eq!(label_of(&root.join("new")).as_deref(), Some("x:c2"));
    }

    #[test]
    fn directories_of_the_node_are_refused() {
        for path in ["/", "/etc", "/usr", "/home"] {
            let error = relabel(Path::new(path), "x", FAKE).unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid);
            assert!(error.to_string().contains("selinux_relabel"), "{error}");
        }
        assert!(relabel(Path::new("/no/such/file"), "x", FAKE).is_ok());
    }
}

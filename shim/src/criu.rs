//! What criu must be told of a container's streams, by way of the OCI runtime.
//!
//! A container's standard streams are FIFOs of its bundle, which its own mount namespace does not
//! show: to criu they are "external" files, known by mount and inode (criu(8), `--external file[…]`).
//! At a restore the new container's streams take their places (`--inherit-fd`).
//!
//! runc and crun hand criu the configuration file that the annotation
//! [`crate::options::CRIU_CONFIG`] names, in place of /etc/criu/runc.conf and /etc/criu/crun.conf; so
//! the node's own settings are repeated in ours.

use std::{
    fs::{self, OpenOptions},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::bundle::{Bundle, replace};

/// Where the streams of a checkpoint are described, among its images.
const STREAMS: &str = "holdfast-streams.json";

/// What crun 1.24 to 1.28 call the directory that hides others (`linux.maskedPaths`) when a checkpoint is
/// made, whatever state directory they were given; at the restore they look for another name.
const MASK: &str = "/run/crun/.empty-directory";

/// Largest file of these that is read, in bytes.
const LIMIT: u64 = 64 << 10;

/// A file that criu does not look for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct External {
    mount: u32,
    inode: u64,
}

impl External {
    /// The FIFO at `path`; `None` if there is none.
    fn of(path: &Path) -> io::Result<Option<Self>> {
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let metadata = file.metadata()?;
        if !metadata.file_type().is_fifo() {
            return Ok(None);
        }
        // The container's descriptors were opened by the same mount: they have its number.
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
        let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
        let mount = mount.ok_or_else(|| io::Error::other("the kernel tells no mnt_id"))?;
        Ok(Some(Self { mount, inode: metadata.ino() }))
    }
}

impl std::fmt::Display for External {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "file[{:x}:{:x}]", self.mount, self.inode)
    }
}

/// The streams of a container, as they were when it was checkpointed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Streams {
    stdin: Option<External>,
    stdout: Option<External>,
    stderr: Option<External>,
}

impl Streams {
    fn named(&self) -> impl Iterator<Item = (u32, External)> {
        let all = [(0, self.stdin), (1, self.stdout), (2, self.stderr)];
        all.into_iter().filter_map(|(fd, external)| Some((fd, external?)))
    }
}

/// Before a checkpoint: criu is told which files are the container's streams; for the restore they
/// are kept among the images.
///
/// # Errors
/// The bundle or the directory of images cannot be written.
pub(crate) fn before_checkpoint(bundle: &Bundle, images: &Path, runtime: &str) -> io::Result<()> {
    let streams = Streams {
        stdin: External::of(&bundle.stdin())?,
        stdout: External::of(&bundle.stdout())?,
        stderr: External::of(&bundle.stderr())?,
    };
    fs::create_dir_all(images)?;
    replace(&images.join(STREAMS), &serde_json::to_vec(&streams)?, false)?;
    let lines = streams.named().map(|(_, external)| format!("external {external}\n"));
    configure(bundle, runtime, lines.collect())
}

/// Before a restore: the new container's streams take the place of those of the checkpoint, if it is
/// one of ours. In others they are pipes, which the runtimes replace themselves.
///
/// # Errors
/// The description is there and is none, or the bundle cannot be written.
pub(crate) fn before_restore(bundle: &Bundle, images: &Path, runtime: &str) -> io::Result<()> {
    let streams = match read(&images.join(STREAMS))? {
        Some(text) => serde_json::from_str(&text)?,
        None => Streams::default(),
    };
    let lines = streams.named().map(|(fd, external)| format!("inherit-fd fd[{fd}]:{external}\n"));
    let mut lines: String = lines.collect();
    if runtime.contains("crun") {
        let empty = bundle.dir().join("empty");
        match fs::create_dir(&empty) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => lines.push_str(&format!("external mnt[{MASK}]:{}\n", empty.display())),
        }
    }
    configure(bundle, runtime, lines)
}

fn configure(bundle: &Bundle, runtime: &str, lines: String) -> io::Result<()> {
    let node = if runtime.contains("crun") { "crun" } else { "runc" };
    let mut text = read(Path::new(&format!("/etc/criu/{node}.conf")))?.unwrap_or_default();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(&lines);
    replace(&bundle.criu_config(), text.as_bytes(), false)
}

/// A small file's text; `None` if there is none.
fn read(path: &Path) -> io::Result<Option<String>> {
    use io::Read as _;
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut text = String::new();
    file.take(LIMIT).read_to_string(&mut text)?;
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fifo(path: &Path) {
        let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
        #[expect(unsafe_code, reason = "mkfifo(3)")]
        // SAFETY: the name is a C string.
        let made = unsafe { libc::mkfifo(name.as_ptr(), 0o600) };
        assert_eq!(made, 0);
    }

    #[test]
    fn the_streams_of_a_checkpoint_are_replaced_at_its_restore() {
        let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let images = old.path().join("images");
        let (old, new) = (Bundle::new(old.path()), Bundle::new(new.path()));
        fifo(&old.stdout());
        fifo(&old.stderr());
        before_checkpoint(&old, &images, "runc").unwrap();
        let config = fs::read_to_string(old.criu_config()).unwrap();
        let inode = fs::metadata(old.stdout()).unwrap().ino();
        let external: Vec<&str> = config.lines().filter(|l| l.starts_with("external ")).collect();
        assert_eq!(external.len(), 2, "{config}");
        assert!(external[0].ends_with(&format!(":{inode:x}]")), "{config}");

        before_restore(&new, &images, "crun").unwrap();
        let restored = fs::read_to_string(new.criu_config()).unwrap();
        let file = external[0].strip_prefix("external ").unwrap();
        assert!(restored.lines().any(|l| l == format!("inherit-fd fd[1]:{file}")), "{restored}");
        assert!(restored.contains("fd[2]:") && !restored.contains("fd[0]:"), "{restored}");
        // What crun hides directories behind has another name there.
        let empty = new.dir().join("empty");
        let mask = format!("external mnt[{MASK}]:{}", empty.display());
        assert!(empty.is_dir() && restored.lines().any(|line| line == mask), "{restored}");
        before_restore(&new, &images, "runc").unwrap();
        assert!(!fs::read_to_string(new.criu_config()).unwrap().contains(MASK));
    }

    #[test]
    fn a_checkpoint_of_others_says_nothing_of_streams() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle::new(dir.path());
        before_restore(&bundle, dir.path(), "runc").unwrap();
        assert!(!fs::read_to_string(bundle.criu_config()).unwrap().contains("inherit-fd"));
    }

    #[test]
    fn a_description_cannot_set_what_else_criu_does() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle::new(dir.path());
        let evil = r#"{"stdout":{"mount":"1]\nexec-cmd /bin/sh\n","inode":2}}"#;
        fs::write(dir.path().join(STREAMS), evil).unwrap();
        before_restore(&bundle, dir.path(), "runc").unwrap_err();
        assert!(!bundle.criu_config().exists());
    }
}

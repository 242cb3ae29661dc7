//! The tar archive of a checkpointed container, as CRI-O, containerd, Podman and checkpointctl
//! exchange it (names and JSON fields: checkpointctl's `lib/metadata.go`).
//!
//! ```text
//! config.dump            which container of which image        spec.dump    its OCI configuration
//! status.dump            its CRI status                        bind.mounts  what it had of the node
//! checkpoint/            criu's images                         dump.log, stats-dump  criu's words
//! rootfs-diff.tar        what it changed in its root           deleted.files  what it removed there
//! devshm-checkpoint.tar  what is in /dev/shm                   container.log  its log so far
//! ```
//! Archives come from elsewhere: what is read is bounded, and nothing is written but under names that
//! we choose.

use std::{
    fs::{self, File},
    io::{self, BufReader, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Kind, Kinded},
    image::{
        Mounted, stream,
        tar::{self as reader, Archive},
        tree,
    },
};

/// Whose the container is, and of which image.
pub const CONFIG: &str = "config.dump";
/// Its OCI configuration.
pub const SPEC: &str = "spec.dump";
/// Its CRI status.
pub const STATUS: &str = "status.dump";
/// Its mounts of the node.
pub const BIND_MOUNTS: &str = "bind.mounts";
/// criu's images.
pub const IMAGES: &str = "checkpoint";
/// Changes in its root.
pub const ROOTFS_DIFF: &str = "rootfs-diff.tar";
/// What it removed there.
pub const DELETED: &str = "deleted.files";
/// What is in /dev/shm.
pub const SHM: &str = "devshm-checkpoint.tar";
/// Its log.
pub const LOG: &str = "container.log";
/// What criu said.
pub const DUMP_LOG: &str = "dump.log";
/// What criu counted.
pub const STATS: &str = "stats-dump";

/// Annotations of an image that has a checkpoint in it: of today, and CRI-O's before that.
pub const IMAGE_ANNOTATIONS: [&str; 2] =
    ["org.criu.checkpoint.container.name", "io.kubernetes.cri-o.annotations.checkpoint.name"];

/// Largest description that is read into memory, in bytes.
const DESCRIPTION_MAX: u64 = 32 << 20;

/// Why an archive cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each message is its documentation")]
pub enum Error {
    #[error("{what} {path}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("checkpoint {path} is not a regular file")]
    NotAFile { path: PathBuf },
    #[error("checkpoint {path}")]
    Tar { path: PathBuf, source: reader::Error },
    #[error("checkpoint {path}: it has no {name}: it is no checkpoint of a container")]
    Lacks { path: PathBuf, name: &'static str },
    #[error("checkpoint {path}: {name} in it is not valid")]
    Description { path: PathBuf, name: &'static str, source: serde_json::Error },
    #[error("checkpoint {path}: entry {entry:?}: {rule}")]
    Entry { path: PathBuf, entry: String, rule: &'static str },
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Kind::NotFound,
                io::ErrorKind::TimedOut => Kind::Deadline,
                _ => Kind::of_disk(source),
            },
            Error::Tar { source: reader::Error::Source(source), .. }
                if source.kind() == io::ErrorKind::StorageFull =>
            {
                Kind::Exhausted
            }
            Error::NotAFile { .. }
            | Error::Tar { .. }
            | Error::Lacks { .. }
            | Error::Description { .. }
            | Error::Entry { .. } => Kind::Invalid,
        }
    }
}

fn at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

/// `config.dump`. Times are RFC 3339.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ConfigDump {
    /// Container id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The image as it was asked for.
    pub rootfs_image: String,
    /// Id, or name and digest, of the image.
    pub rootfs_image_ref: String,
    /// A name that the image can be pulled by.
    pub rootfs_image_name: String,
    /// OCI runtime.
    pub runtime: String,
    /// When the container was made.
    pub created_time: String,
    /// When the checkpoint was.
    pub checkpointed_time: String,
    /// When it was restored.
    pub restored_time: String,
    /// Whether it was.
    pub restored: bool,
}

/// A time as the descriptions have it.
pub fn rfc3339(at: SystemTime) -> String {
    jiff::Timestamp::try_from(at).unwrap_or_default().to_string()
}

/// The time that Go's tools mean by none.
pub const NEVER: &str = "0001-01-01T00:00:00Z";

/// What we need of `spec.dump`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct SpecDump {
    /// Its mounts.
    pub mounts: Vec<SpecMount>,
    /// Its first process.
    pub process: SpecProcess,
}

/// A mount of an OCI configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct SpecMount {
    /// Path in the container.
    pub destination: String,
    /// Kind of file system.
    #[serde(rename = "type")]
    pub kind: String,
    /// Options.
    pub options: Vec<String>,
}

impl SpecMount {
    /// Whether it shows something of the node: criu does not look into such a mount, and wants it to
    /// be there at the restore.
    pub fn is_bind(&self) -> bool {
        self.kind == "bind" || self.options.iter().any(|o| o == "bind" || o == "rbind")
    }
}

/// A first process of an OCI configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct SpecProcess {
    /// It has a terminal.
    pub terminal: bool,
}

/// One of `bind.mounts`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindMount {
    /// Path on the node.
    pub source: String,
    /// Path in the container.
    pub destination: String,
    /// "file" or "directory".
    pub file_type: String,
    /// Permission bits.
    pub permissions: u32,
}

// ---- writing ------------------------------------------------------------------------------------

/// What is put into an archive: descriptions by name, and files of `dir`.
#[derive(Debug, Default)]
pub struct Parts {
    /// Names and contents.
    pub descriptions: Vec<(&'static str, Vec<u8>)>,
    /// Where [`IMAGES`], [`ROOTFS_DIFF`] and [`SHM`] are, as far as they are there.
    pub dir: PathBuf,
    /// Where criu wrote [`DUMP_LOG`] and [`STATS`].
    pub work: PathBuf,
    /// The container's log, if it has one.
    pub log: Option<PathBuf>,
}

/// Writes an archive to `to`, a new file, and syncs it. Blocks. `go_on` is asked now and then; what it
/// returns ends the writing.
///
/// # Errors
/// Of reading the parts and of writing. `to` may then be there.
pub fn pack(to: &Path, parts: &Parts, go_on: &dyn Fn() -> io::Result<()>) -> Result<(), Error> {
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(to);
    let file = file.map_err(at("make", to))?;
    let mut tar = tar::Builder::new(io::BufWriter::with_capacity(1 << 20, file));
    let written = |source| Error::Io { what: "write", path: to.to_owned(), source };
    for (name, content) in &parts.descriptions {
        let mut header = header(content.len() as u64);
        tar.append_data(&mut header, name, content.as_slice()).map_err(written)?;
    }
    let images = parts.dir.join(IMAGES);
    let mut directory = header(0);
    directory.set_entry_type(tar::EntryType::Directory);
    directory.set_mode(0o700);
    tar.append_data(&mut directory, format!("{IMAGES}/"), io::empty()).map_err(written)?;
    let mut names = Vec::new();
    for entry in fs::read_dir(&images).map_err(at("read", &images))? {
        names.push(entry.map_err(at("read", &images))?.file_name());
    }
    names.sort();
    for name in names {
        append(&mut tar, &Path::new(IMAGES).join(&name), &images.join(&name), go_on)?;
    }
    for name in [ROOTFS_DIFF, SHM] {
        append(&mut tar, Path::new(name), &parts.dir.join(name), go_on)?;
    }
    for name in [DUMP_LOG, STATS] {
        append(&mut tar, Path::new(name), &parts.work.join(name), go_on)?;
    }
    if let Some(log) = &parts.log {
        append(&mut tar, Path::new(LOG), log, go_on)?;
    }
    let file = tar.into_inner().and_then(|buffer| Ok(buffer.into_inner()?)).map_err(written)?;
    file.sync_all().map_err(written)
}

fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Regular);
    header.set_mode(0o600);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header
}

/// A regular file, as long as it is now; anything else is left out.
fn append<W: Write>(
    tar: &mut tar::Builder<W>,
    name: &Path,
    from: &Path,
    go_on: &dyn Fn() -> io::Result<()>,
) -> Result<(), Error> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = match fs::OpenOptions::new().read(true).custom_flags(flags).open(from) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Ok(()),
        Err(error) => return Err(at("read", from)(error)),
    };
    let metadata = file.metadata().map_err(at("read", from))?;
    if !metadata.is_file() {
        return Ok(());
    }
    let mut header = header(metadata.len());
    let data = Asking { source: file.take(metadata.len()), go_on };
    tar.append_data(&mut header, name, data).map_err(at("copy", from))
}

struct Asking<'a, R> {
    source: R,
    go_on: &'a dyn Fn() -> io::Result<()>,
}

impl<R: Read> Read for Asking<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (self.go_on)()?;
        self.source.read(buffer)
    }
}

// ---- reading ------------------------------------------------------------------------------------

/// What was found in a checkpoint; the rest of it is in a directory now, under the names of the
/// archive: [`IMAGES`], [`ROOTFS_DIFF`], [`SHM`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Whose it is.
    pub config: ConfigDump,
    /// What it was made of.
    pub spec: SpecDump,
    /// Paths that it had removed from its image.
    pub deleted: Vec<PathBuf>,
}

/// The descriptions as they are collected.
#[derive(Default)]
struct Descriptions {
    config: Option<Vec<u8>>,
    spec: Option<Vec<u8>>,
    deleted: Option<Vec<u8>>,
    images: bool,
}

impl Descriptions {
    fn slot(&mut self, name: &str) -> Option<&mut Option<Vec<u8>>> {
        match name {
            CONFIG => Some(&mut self.config),
            SPEC => Some(&mut self.spec),
            DELETED => Some(&mut self.deleted),
            _ => None,
        }
    }

    fn parse(self, path: &Path) -> Result<Found, Error> {
        fn json<T: serde::de::DeserializeOwned>(
            path: &Path,
            name: &'static str,
            bytes: Option<Vec<u8>>,
        ) -> Result<T, Error> {
            let lacks = || Error::Lacks { path: path.to_owned(), name };
            serde_json::from_slice(&bytes.ok_or_else(lacks)?).map_err(|source| Error::Description {
                path: path.to_owned(),
                name,
                source,
            })
        }
        if !self.images {
            return Err(Error::Lacks { path: path.to_owned(), name: IMAGES });
        }
        Ok(Found {
            config: json(path, CONFIG, self.config)?,
            spec: json(path, SPEC, self.spec)?,
            deleted: match self.deleted {
                // JSON `null`, where a tool of another language had no list.
                Some(bytes) => json::<Option<_>>(path, DELETED, Some(bytes))?.unwrap_or_default(),
                None => Vec::new(),
            },
        })
    }
}

/// Where an entry goes.
enum Place {
    Description,
    File(PathBuf),
    /// Nothing that a restore needs.
    Nowhere,
}

/// By its name, cleaned of "./".
fn place(name: &str) -> Option<Place> {
    let file = |name: &str| Some(Place::File(name.into()));
    match name {
        CONFIG | SPEC | DELETED => Some(Place::Description),
        ROOTFS_DIFF | SHM => file(name),
        _ => match name.strip_prefix("checkpoint/") {
            Some(image) if image.contains('/') || image == ".." || image == "." => None,
            Some(image) if !image.is_empty() => file(name),
            _ => Some(Place::Nowhere),
        },
    }
}

/// Unpacks the checkpoint at `path` into `into`, an empty directory of ours. Blocks.
///
/// # Errors
/// It is no checkpoint, or cannot be read or written. `into` is then left as it is.
pub fn unpack(path: &Path, into: &Path) -> Result<Found, Error> {
    // Nonblocking: it might be a FIFO.
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(at("open checkpoint", path))?;
    if !file.metadata().map_err(at("read", path))?.is_file() {
        return Err(Error::NotAFile { path: path.to_owned() });
    }
    let source = stream::inflate(BufReader::new(file)).map_err(at("read", path))?;
    let mut archive = Archive::new(BufReader::with_capacity(256 << 10, source));
    let broken = |source| Error::Tar { path: path.to_owned(), source };
    let mut descriptions = Descriptions::default();
    let images = into.join(IMAGES);
    while let Some(entry) = archive.entry().map_err(broken)? {
        let shown = String::from_utf8_lossy(&entry.path).into_owned();
        let name = shown.trim_start_matches("./").trim_end_matches('/');
        let refuse = |rule| Error::Entry { path: path.to_owned(), entry: shown.clone(), rule };
        if name == IMAGES && entry.kind == reader::Kind::Directory {
            make_images(&images)?;
            descriptions.images = true;
            continue;
        }
        let to = match place(name).ok_or_else(|| refuse("it leads out of its directory"))? {
            Place::Nowhere => continue,
            other => other,
        };
        if entry.kind != reader::Kind::File || entry.sparse.is_some() {
            return Err(refuse("a plain file is expected there"));
        }
        match to {
            Place::Description => {
                if entry.size > DESCRIPTION_MAX {
                    return Err(refuse("it is too large for a description"));
                }
                let mut content = Vec::with_capacity(usize::try_from(entry.size).unwrap_or(0));
                copy(&mut archive, &mut content, |error| match error {
                    Copy::Tar(source) => broken(source),
                    Copy::Write(source) => at("read", path)(source),
                })?;
                if let Some(slot) = descriptions.slot(name) {
                    *slot = Some(content);
                }
            }
            Place::File(to) => {
                if to.starts_with(IMAGES) {
                    // Not every writer lists the directory itself.
                    make_images(&images)?;
                    descriptions.images = true;
                }
                let to = into.join(to);
                let mut file = create(&to)?;
                copy(&mut archive, &mut file, |error| match error {
                    Copy::Tar(source) => broken(source),
                    Copy::Write(source) => at("write", &to)(source),
                })?;
            }
            Place::Nowhere => {}
        }
    }
    descriptions.parse(path)
}

/// Takes the checkpoint out of an image, whose root is mounted: the same files are there. Blocks.
///
/// # Errors
/// As [`unpack`]; `name` is the image's.
pub fn copy_out(name: &str, root: &Mounted, into: &Path) -> Result<Found, Error> {
    let path = Path::new(name);
    let mut descriptions = Descriptions::default();
    for name in [CONFIG, SPEC, DELETED] {
        let limit = usize::try_from(DESCRIPTION_MAX).unwrap_or(usize::MAX);
        let content = root.read(name, limit).map_err(at("read", path))?;
        if let Some(slot) = descriptions.slot(name) {
            *slot = content;
        }
    }
    let images = into.join(IMAGES);
    if let Some(from) = root.directory(Path::new(IMAGES)).map_err(at("read", path))? {
        use std::os::fd::AsFd;
        make_images(&images)?;
        descriptions.images = true;
        for (name, _) in tree::names(from.as_fd()).map_err(at("read", path))? {
            copy_file(&from, Path::new(&name), &images.join(&name))?;
        }
    }
    for name in [ROOTFS_DIFF, SHM] {
        copy_file(root, Path::new(name), &into.join(name))?;
    }
    descriptions.parse(path)
}

/// A regular file, if there is one of that name.
fn copy_file(from: &impl std::os::fd::AsFd, name: &Path, to: &Path) -> Result<(), Error> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut file = match rustix::fs::openat(from, name, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::LOOP) => return Ok(()),
        Err(error) => return Err(at("read", name)(error.into())),
    };
    if !file.metadata().map_err(at("read", name))?.is_file() {
        return Ok(());
    }
    io::copy(&mut file, &mut create(to)?).map(drop).map_err(at("write", to))
}

fn make_images(path: &Path) -> Result<(), Error> {
    crate::shims::private_dir(path).map_err(at("make", path))
}

/// A new file; one that is there is an archive with an entry twice.
fn create(path: &Path) -> Result<File, Error> {
    let options = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    options.map_err(at("make", path))
}

enum Copy {
    Tar(reader::Error),
    Write(io::Error),
}

impl From<reader::Error> for Copy {
    fn from(error: reader::Error) -> Self {
        Copy::Tar(error)
    }
}

fn copy<R: io::BufRead>(
    archive: &mut Archive<R>,
    to: &mut impl Write,
    error: impl FnOnce(Copy) -> Error,
) -> Result<(), Error> {
    let mut all = || {
        while archive.data(u64::MAX, |bytes| {
            to.write_all(bytes).map_err(Copy::Write)?;
            Ok::<usize, Copy>(bytes.len())
        })? {}
        Ok::<(), Copy>(())
    };
    all().map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(dir: &Path) -> Parts {
        let images = dir.join("stage").join(IMAGES);
        fs::create_dir_all(&images).unwrap();
        fs::write(images.join("pages-1.img"), vec![7; 100_000]).unwrap();
        fs::write(images.join("inventory.img"), "i").unwrap();
        fs::write(dir.join("stage").join(ROOTFS_DIFF), "a tar").unwrap();
        fs::create_dir(dir.join("work")).unwrap();
        fs::write(dir.join("work").join(DUMP_LOG), "fine").unwrap();
        let config =
            ConfigDump { id: "c1".into(), rootfs_image_name: "x".into(), ..Default::default() };
        let spec = r#"{"ociVersion":"1.0.2","process":{"terminal":true},
            "mounts":[{"destination":"/data","type":"bind","source":"/x","options":["rbind"]}]}"#;
        Parts {
            descriptions: vec![
                (CONFIG, serde_json::to_vec(&config).unwrap()),
                (SPEC, spec.into()),
                (DELETED, br#"["/etc/motd"]"#.to_vec()),
            ],
            dir: dir.join("stage"),
            work: dir.join("work"),
            log: None,
        }
    }

    #[test]
    fn what_is_packed_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("c.tar");
        pack(&to, &parts(dir.path()), &|| Ok(())).unwrap();
        let into = dir.path().join("into");
        fs::create_dir(&into).unwrap();
        let found = unpack(&to, &into).unwrap();
        assert_eq!(found.config.id, "c1");
        assert!(found.spec.process.terminal && found.spec.mounts[0].is_bind());
        assert_eq!(found.deleted, [PathBuf::from("/etc/motd")]);
        assert_eq!(fs::read(into.join("checkpoint/pages-1.img")).unwrap(), vec![7; 100_000]);
        assert_eq!(fs::read(into.join(ROOTFS_DIFF)).unwrap(), b"a tar");
        assert!(!into.join(DUMP_LOG).exists(), "a restore does not need it");
    }

    #[test]
    fn writing_ends_when_it_is_told_to() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("c.tar");
        let late = || Err(io::Error::new(io::ErrorKind::TimedOut, "late"));
        let error = pack(&to, &parts(dir.path()), &late).unwrap_err();
        assert_eq!(error.kind(), Kind::Deadline);
    }

    /// An archive of these entries.
    fn archive(dir: &Path, entries: &[(&str, tar::EntryType, &str)]) -> PathBuf {
        let path = dir.join("bad.tar");
        let mut tar = tar::Builder::new(File::create(&path).unwrap());
        for (name, kind, content) in entries {
            let mut header = header(content.len() as u64);
            header.set_entry_type(*kind);
            // As it is, without the builder's own checks.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            tar.append(&header, content.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap();
        path
    }

    #[test]
    fn a_hostile_archive_writes_nothing_elsewhere() {
        use tar::EntryType::{Directory, Regular, Symlink};
        for entries in [
            &[("checkpoint/../../evil", Regular, "x")][..],
            &[("checkpoint/..", Regular, "x")],
            &[("checkpoint/a/b", Regular, "x")],
            &[("checkpoint/link", Symlink, "")],
            &[("checkpoint", Symlink, "")],
            &[("rootfs-diff.tar", Symlink, "")],
            &[("config.dump", Directory, "")],
            &[("checkpoint/a", Regular, "x"), ("checkpoint/a", Regular, "y")],
            &[("../evil", Regular, "x")],
            &[("/evil", Regular, "x")],
            &[],
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = archive(dir.path(), entries);
            let into = dir.path().join("into");
            fs::create_dir(&into).unwrap();
            unpack(&path, &into).unwrap_err();
            let left: Vec<_> =
                fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            assert_eq!(left.len(), 2, "{entries:?}: {left:?}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        use tar::EntryType::Regular;
        let dir = tempfile::tempdir().unwrap();
        let into = |n: &str| {
            let into = dir.path().join(n);
            fs::create_dir(&into).unwrap();
            into
        };
        let path = archive(dir.path(), &[("config.dump", Regular, "{}")]);
        let error = unpack(&path, &into("1")).unwrap_err();
        assert_eq!((error.kind(), error.to_string().contains(IMAGES)), (Kind::Invalid, true));
        let entries = [("checkpoint/a", Regular, "x"), ("config.dump", Regular, "{}")];
        let error = unpack(&archive(dir.path(), &entries), &into("2")).unwrap_err();
        assert!(error.to_string().contains(SPEC), "{error}");
        let error = unpack(&dir.path().join("none"), &into("3")).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        let error = unpack(dir.path(), &into("4")).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid, "{error}");
        fs::write(dir.path().join("text"), "no archive at all").unwrap();
        let error = unpack(&dir.path().join("text"), &into("5")).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid, "{error}");
    }
}

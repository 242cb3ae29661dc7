//! The on-disk layout that both ends of the wire agree on.
//!
//! ```text
//! container  config.json rootfs/ stdout stderr stdin (FIFOs) exit.json init.pid options.json
//!            criu.conf stdout.unfinished stderr.unfinished
//! pod        address shim.pid shim.json io.sock ns/{net,ipc,uts,user,pid} hostname hosts resolv.conf shm/
//! ```
//! Under containerd a bundle is both at once. `record.json` is the daemon's: a copy of its record.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

/// The directory of a pod or of a container, mode 0700.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    dir: PathBuf,
}

impl Bundle {
    /// The bundle at `dir`, which need not exist yet.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The directory itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The OCI configuration.
    pub fn config(&self) -> PathBuf {
        self.dir.join("config.json")
    }

    /// Where the root file system is mounted.
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// The FIFO the container writes its standard output to.
    pub fn stdout(&self) -> PathBuf {
        self.dir.join("stdout")
    }

    /// The FIFO the container writes its standard error to.
    pub fn stderr(&self) -> PathBuf {
        self.dir.join("stderr")
    }

    /// What the shim has read of a line of standard output, and of standard error, that is not in the
    /// log yet.
    pub fn unfinished(&self) -> [PathBuf; 2] {
        ["stdout.unfinished", "stderr.unfinished"].map(|name| self.dir.join(name))
    }

    /// The FIFO the container reads its standard input from, when attach feeds it.
    pub fn stdin(&self) -> PathBuf {
        self.dir.join("stdin")
    }

    /// The [`ExitRecord`], present once the container has ended.
    pub fn exit_record(&self) -> PathBuf {
        self.dir.join("exit.json")
    }

    /// The pid of the container's first process, in decimal.
    pub fn init_pid(&self) -> PathBuf {
        self.dir.join("init.pid")
    }

    /// How the OCI runtime was called for this container, for `delete` when the shim is gone.
    pub fn options(&self) -> PathBuf {
        self.dir.join("options.json")
    }

    /// What criu is told when the container is checkpointed or restored; written by the shim.
    pub fn criu_config(&self) -> PathBuf {
        self.dir.join("criu.conf")
    }

    /// The shim's ttrpc address, written by `start`.
    pub fn address(&self) -> PathBuf {
        self.dir.join("address")
    }

    /// What the shim knows, for the one that comes after it should it die.
    pub fn shim_state(&self) -> PathBuf {
        self.dir.join("shim.json")
    }

    /// The shim's pid in decimal, written by `start`.
    pub fn shim_pid(&self) -> PathBuf {
        self.dir.join("shim.pid")
    }

    /// The FIFO a shim writes its own log to, when the daemon has made one.
    pub fn shim_log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// The pod's private control socket, mode 0600: see [`crate::control`].
    pub fn io_socket(&self) -> PathBuf {
        self.dir.join("io.sock")
    }

    /// The directory of pinned namespaces, a private mount of its own.
    pub fn namespaces(&self) -> PathBuf {
        self.dir.join("ns")
    }

    /// Where a namespace of the pod is pinned.
    pub fn namespace(&self, kind: Namespace) -> PathBuf {
        self.namespaces().join(kind.name())
    }

    /// The pod's /etc/hostname.
    pub fn hostname(&self) -> PathBuf {
        self.dir.join("hostname")
    }

    /// The pod's /etc/hosts.
    pub fn hosts(&self) -> PathBuf {
        self.dir.join("hosts")
    }

    /// The pod's /etc/resolv.conf.
    pub fn resolv_conf(&self) -> PathBuf {
        self.dir.join("resolv.conf")
    }

    /// The pod's /dev/shm.
    pub fn shm(&self) -> PathBuf {
        self.dir.join("shm")
    }
}

/// A kind of namespace that a pod can have of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Namespace {
    /// Network.
    Net,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host and domain name.
    Uts,
    /// User and group ids.
    User,
    /// Process ids, shared by the pod's containers.
    Pid,
}

impl Namespace {
    /// All of them.
    pub const ALL: [Namespace; 5] =
        [Namespace::Net, Namespace::Ipc, Namespace::Uts, Namespace::User, Namespace::Pid];

    /// The name under /proc/PID/ns and under the pod's `ns` directory.
    pub fn name(self) -> &'static str {
        match self {
            Namespace::Net => "net",
            Namespace::Ipc => "ipc",
            Namespace::Uts => "uts",
            Namespace::User => "user",
            Namespace::Pid => "pid",
        }
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// It called exit with this code.
    Code(u8),
    /// This signal ended it.
    Signal(u8),
}

impl Exit {
    /// The shell's encoding, which the wire uses: the code, or 128 + signal.
    pub fn wire_status(self) -> u32 {
        match self {
            Exit::Code(code) => u32::from(code),
            Exit::Signal(signal) => 128 + u32::from(signal),
        }
    }
}

/// No exit record is longer, in bytes.
const RECORD_MAX: i64 = 512;

/// How a container ended: written and synced before anybody is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Host pid of the container's first process.
    pub pid: u32,
    /// How that process ended.
    pub status: Exit,
    /// When its command was executed; `None` when it was not, or when nobody has kept it.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "rfc3339::optional")]
    pub started_at: Option<SystemTime>,
    /// When.
    #[serde(with = "rfc3339")]
    pub at: SystemTime,
    /// The kernel killed a process of the container for want of memory, and the container ended
    /// with something else than success.
    pub oom_killed: bool,
    /// Nobody could tell how it ended (its shim was dead at the time): `status` is made up.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lost: bool,
}

impl ExitRecord {
    /// The record at `path`; `None` when there is none.
    ///
    /// # Errors
    /// The file is unreadable, or (`InvalidData`) is no record.
    pub fn load(path: impl AsRef<Path>) -> io::Result<Option<Self>> {
        match fs::read(path) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Takes the space that [`ExitRecord::store`] will need, so that how a container ended is on record
    /// also when the disk has filled up meanwhile.
    ///
    /// # Errors
    /// There is no space now.
    pub fn reserve(path: impl AsRef<Path>) -> io::Result<()> {
        let file = open_beside(path.as_ref())?.0;
        match nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, RECORD_MAX) {
            // Where there is no such call the record finds the space it finds.
            Ok(()) | Err(nix::errno::Errno::EOPNOTSUPP) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Makes the record durable at `path`: after this it survives a crash whole, or (when this
    /// fails) is not there at all.
    ///
    /// # Errors
    /// Any of writing, syncing and renaming.
    pub fn store(&self, path: impl AsRef<Path>) -> io::Result<()> {
        replace(path.as_ref(), &serde_json::to_vec(self)?, true)
    }

    /// See [`Exit::wire_status`].
    pub fn wire_status(&self) -> u32 {
        self.status.wire_status()
    }
}

/// Writes `bytes` to a file beside `path` (mode 0600) and renames it there, so that a reader sees
/// all or nothing; `durable`: and it survives a crash of the machine.
pub(crate) fn replace(path: &Path, bytes: &[u8], durable: bool) -> io::Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let (mut file, temporary) = open_beside(path)?;
    let written = (|| {
        if !durable {
            // ext4 begins to write out what is renamed over another file, which takes milliseconds at a
            // disk that is busy; not where it has its blocks already. Who has no space hears of it below.
            let length = i64::try_from(bytes.len()).unwrap_or_default();
            let _ = nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, length);
        }
        // Not cut before: what `reserve` took would be given back.
        file.write_all(bytes)?;
        file.set_len(bytes.len() as u64)?;
        if durable {
            file.sync_all()?;
        }
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
        return written;
    }
    if durable {
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

/// The hidden file beside `path` that becomes it.
fn open_beside(path: &Path) -> io::Result<(File, PathBuf)> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(".new");
    let temporary = path.with_file_name(hidden);
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    Ok((options.open(&temporary)?, temporary))
}

mod rfc3339 {
    use std::time::SystemTime;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    use crate::timestamp;

    pub(super) fn serialize<S: Serializer>(at: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&timestamp::format(*at))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<SystemTime, D::Error> {
        let text = String::deserialize(from)?;
        timestamp::parse(&text).ok_or_else(|| D::Error::custom(format!("no RFC 3339 time: {text}")))
    }

    /// The same for a time that may be absent.
    pub(super) mod optional {
        use super::*;

        #[expect(clippy::ref_option, reason = "serde's form")]
        pub(in super::super) fn serialize<S: Serializer>(
            at: &Option<SystemTime>,
            to: S,
        ) -> Result<S::Ok, S::Error> {
            match at {
                Some(at) => super::serialize(at, to),
                None => to.serialize_none(),
            }
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
            from: D,
        ) -> Result<Option<SystemTime>, D::Error> {
            super::deserialize(from).map(Some)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn record() -> ExitRecord {
        ExitRecord {
            pid: 4711,
            status: Exit::Signal(9),
            started_at: Some(UNIX_EPOCH + Duration::new(1_699_999_999, 5)),
            at: UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789),
            oom_killed: true,
            lost: false,
        }
    }

    #[test]
    fn a_record_comes_back_as_it_was_stored() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle::new(dir.path());
        assert_eq!(ExitRecord::load(bundle.exit_record()).unwrap(), None);
        record().store(bundle.exit_record()).unwrap();
        assert_eq!(ExitRecord::load(bundle.exit_record()).unwrap(), Some(record()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_later_record_replaces_the_earlier_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = Bundle::new(dir.path()).exit_record();
        record().store(&path).unwrap();
        let later = ExitRecord { status: Exit::Code(3), ..record() };
        later.store(&path).unwrap();
        assert_eq!(ExitRecord::load(&path).unwrap(), Some(later));
    }

    #[test]
    fn the_space_that_was_taken_becomes_the_record() {
        let dir = tempfile::tempdir().unwrap();
        let path = Bundle::new(dir.path()).exit_record();
        ExitRecord::reserve(&path).unwrap();
        assert_eq!(ExitRecord::load(&path).unwrap(), None);
        record().store(&path).unwrap();
        assert_eq!(ExitRecord::load(&path).unwrap(), Some(record()));
        let length = fs::metadata(&path).unwrap().len();
        assert!(length < RECORD_MAX as u64, "{length}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_record_is_an_error_and_not_an_exit() {
        let dir = tempfile::tempdir().unwrap();
        let path = Bundle::new(dir.path()).exit_record();
        fs::write(&path, "{\"pid\":1,\"status\"").unwrap();
        let error = ExitRecord::load(&path).unwrap_err();
        assert!(matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof));
    }

    #[test]
    fn the_wire_status_is_the_shells() {
        assert_eq!(Exit::Code(42).wire_status(), 42);
        assert_eq!(Exit::Signal(9).wire_status(), 137);
    }

    #[test]
    fn the_text_of_a_record_is_stable() {
        assert_eq!(
            serde_json::to_string(&record()).unwrap(),
            r#"{"pid":4711,"status":{"Signal":9},"started_at":"2023-11-14T22:13:19.000000005Z","at":"2023-11-14T22:13:20.123456789Z","oom_killed":true}"#
        );
    }
}

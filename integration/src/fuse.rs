//! A file server that dies: a FUSE file system which answers until it is told to stop, and then never
//! again. Whoever asks it for something after that hangs in the kernel.
//!
//! Speaks as little of the protocol as it takes (include/uapi/linux/fuse.h): a root directory with one
//! empty file in it, `file`.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// A mounted one. Dropping it ends the connection, which frees whoever hangs.
#[derive(Debug)]
pub struct DeadServer {
    at: PathBuf,
    dead: Arc<AtomicBool>,
    connection: PathBuf,
}

impl DeadServer {
    /// Mounts one that still answers at `at`, a directory that is made.
    ///
    /// # Errors
    /// The kernel has no FUSE, or refuses the mount.
    pub fn mount(at: &Path) -> Result<Self> {
        fs::create_dir_all(at)?;
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.context("open /dev/fuse: these tests need FUSE in the kernel")?;
        let options =
            format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        mount(Some("dead"), at, Some("fuse"), MsFlags::empty(), Some(options.as_str()))
            .context("mount a FUSE file system")?;
        let dead = Arc::new(AtomicBool::new(false));
        let seen = dead.clone();
        thread::spawn(move || serve(device, &seen));
        // The first answer; and the number of the connection, by which it can be ended.
        use std::os::unix::fs::MetadataExt as _;
        let number = fs::metadata(at)?.dev();
        let minor = (number & 0xff) | ((number >> 12) & !0xff);
        let connection = PathBuf::from(format!("/sys/fs/fuse/connections/{minor}/abort"));
        Ok(Self { at: at.to_owned(), dead, connection })
    }

    /// From now on nobody is answered.
    pub fn die(&self) {
        self.dead.store(true, Ordering::SeqCst);
    }

    /// Ends the connection: whoever hangs gets an error, and so does who comes.
    pub fn abort(&self) {
        // fusectl may not be mounted; a forced unmount does the same.
        if fs::write(&self.connection, "1").is_err() {
            let _ = umount2(&self.at, MntFlags::MNT_FORCE);
        }
    }
}

impl Drop for DeadServer {
    fn drop(&mut self) {
        self.abort();
        let _ = umount2(&self.at, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
}

fn serve(mut device: File, dead: &AtomicBool) {
    let mut buffer = vec![0; 1 << 20];
    // Until the connection is ended.
    while let Ok(length) = device.read(&mut buffer) {
        if length < 40 || dead.load(Ordering::SeqCst) {
            // Read, and never answered: not even SIGKILL ends who waits for that.
            continue;
        }
        let word = |at: usize| u32::from_ne_bytes(buffer[at..at + 4].try_into().expect("four"));
        let long = |at: usize| u64::from_ne_bytes(buffer[at..at + 8].try_into().expect("eight"));
        let (operation, unique, node) = (word(4), long(8), long(16));
        let answer = match operation {
            INIT => Ok(init(word(44))),
            GETATTR => Ok([&[0; 16][..], &attributes(node)].concat()),
            LOOKUP if buffer[40..length].starts_with(b"file\0") => {
                // Node 2, never to be kept in the cache.
                let mut entry = vec![0; 40];
                entry[0] = 2;
                Ok([entry, attributes(2)].concat())
            }
            OPEN | OPENDIR => Ok(vec![0; 16]),
            READ | READDIR | RELEASE | RELEASEDIR | FLUSH => Ok(Vec::new()),
            FORGET | BATCH_FORGET | INTERRUPT => continue,
            LOOKUP => Err(libc::ENOENT),
            _ => Err(libc::ENOSYS),
        };
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(errno) => (-errno, Vec::new()),
        };
        let mut reply = Vec::new();
        reply.extend(((16 + body.len()) as u32).to_ne_bytes());
        reply.extend(error.to_ne_bytes());
        reply.extend(unique.to_ne_bytes());
        reply.extend(body);
        if device.write_all(&reply).is_err() {
            // Whoever asked has gone.
            continue;
        }
    }
}

/// fuse_init_out of version 7.23, which has 64 bytes.
fn init(minor: u32) -> Vec<u8> {
    let mut out = Vec::new();
    for word in [7u32, minor.min(23), 0, 0] {
        out.extend(word.to_ne_bytes());
    }
    // max_background, congestion_threshold; max_write; time_gran.
    for half in [12u16, 9] {
        out.extend(half.to_ne_bytes());
    }
    for word in [4096u32, 1] {
        out.extend(word.to_ne_bytes());
    }
    out.resize(64, 0);
    out
}

/// fuse_attr: a directory, or an empty file.
fn attributes(node: u64) -> Vec<u8> {
    let (mode, links): (u32, u32) =
        if node == 1 { (libc::S_IFDIR | 0o755, 2) } else { (libc::S_IFREG | 0o644, 1) };
    let mut out = Vec::new();
    for long in [node, 0, 0, 0, 0, 0] {
        out.extend(long.to_ne_bytes());
    }
    for word in [0, 0, 0, mode, links, 0, 0, 0, 4096, 0] {
        out.extend(word.to_ne_bytes());
    }
    out
}

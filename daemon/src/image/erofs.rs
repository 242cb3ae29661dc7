//! Layers as EROFS images: one file for each layer, written from its beginning to its end in one go, and
//! mounted from the file (kernel Documentation/filesystems/erofs.rst, fs/erofs/erofs_fs.h).
//!
//! ```text
//! block 0        superblock
//! blocks 1..     content of files, each from a block's beginning, in the order of the archive
//!                directories that are larger than an inode's tail
//! meta_blkaddr   inodes, with attributes, small directories and links behind each
//! ```
//! Nothing is compressed: an image costs what its files do, and the kernel reads pages straight from
//! the file. What a layer is made of is held in memory until its archive has ended ([`tree`]), content
//! is not.
//!
//! Needs Linux 6.15: files are mounted without a loop device since 6.12, and overlayfs takes mounts
//! that are attached nowhere as layers since 6.15. [`probe`] finds out.

pub mod tree;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Seek, SeekFrom, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::Path,
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags},
};

use self::tree::{Content, Id, Node, Tree};
use super::overlay::{Lower, Overlay};

/// Unit of allocation, in bytes.
const BLOCK: u64 = 4096;

/// An inode number is a place in units of so many bytes.
const SLOT: u64 = 32;

/// Size of an inode of the extended kind.
const INODE: u64 = 64;

/// The root is not inode 0: there are programs to which that means "none".
const ROOT: u64 = 2;

/// Links and directories up to this size are kept behind their inodes.
const TAIL: u64 = 2048;

const MAGIC: u32 = 0xe0f5_e1e2;

/// feature_compat: an inode's time is that of its last modification.
const COMPAT_MTIME: u32 = 0x2;
/// feature_incompat: files may be in chunks, some of which are holes.
const INCOMPAT_CHUNKED: u32 = 0x4;

/// i_format: extended inode, and how its data is laid out.
const PLAIN: u16 = 1;
const INLINE: u16 = 1 | (2 << 1);
const CHUNKED: u16 = 1 | (4 << 1);

/// A chunk without data.
const HOLE: u32 = u32::MAX;

/// Names of attributes begin with one of these: e_name_index and the prefix.
const PREFIXES: [(u8, &[u8]); 5] = [
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (1, b"user."),
    (4, b"trusted."),
    (6, b"security."),
];

/// An image that is being written: content first.
#[derive(Debug)]
pub struct Writer {
    file: File,
    /// Where the next byte goes.
    at: u64,
}

impl Writer {
    /// A new image at `path`.
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut file = File::options().read(true).write(true).create_new(true).open(path)?;
        // The superblock comes last.
        file.seek(SeekFrom::Start(BLOCK))?;
        Ok(Self { file, at: BLOCK })
    }

    /// Where content that is written next begins: a block.
    fn begin(&mut self) -> u64 {
        // What is left out reads as zeros.
        self.at = self.at.next_multiple_of(BLOCK);
        self.at
    }

    /// Writes at a place from where content began.
    fn write_at(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, at)?;
        self.at = self.at.max(at + bytes.len() as u64);
        Ok(())
    }

    /// Writes directories, inodes and superblock.
    pub fn finish(mut self, tree: &Tree) -> io::Result<()> {
        let plan = Plan::new(tree, self.begin() / BLOCK)?;
        let out = self.file.try_clone()?;
        let mut out = io::BufWriter::with_capacity(1 << 20, out);
        out.seek(SeekFrom::Start(self.begin()))?;
        for (id, parent) in &plan.order {
            if let Place::Blocks(_) = plan.places[id].data {
                let mut data = directory(tree, *id, *parent, &plan);
                data.resize(data.len().next_multiple_of(BLOCK as usize), 0);
                out.write_all(&data)?;
            }
        }
        let mut at = 0;
        for (id, parent) in &plan.order {
            let place = &plan.places[id];
            out.write_all(&vec![0; (place.at - at) as usize])?;
            let inode = plan.inode(tree, *id, *parent)?;
            out.write_all(&inode)?;
            at = place.at + inode.len() as u64;
        }
        let end = (plan.meta * BLOCK + at).next_multiple_of(BLOCK);
        out.flush()?;
        self.file.set_len(end)?;
        self.file.write_all_at(&plan.superblock(end / BLOCK)?, 0)
    }
}

/// Where an inode's data is.
enum Place {
    /// Nowhere, or behind the inode.
    Behind,
    /// From this block.
    Blocks(u64),
}

struct Placed {
    /// Byte from the beginning of the inodes.
    at: u64,
    data: Place,
}

/// Where everything goes.
struct Plan {
    /// First block of the inodes.
    meta: u64,
    /// All that is in the tree, each once, with the directory that it is in; the root first.
    order: Vec<(Id, Id)>,
    places: BTreeMap<Id, Placed>,
    chunked: bool,
}

impl Plan {
    /// `free` is the first free block.
    fn new(tree: &Tree, mut free: u64) -> io::Result<Self> {
        let order = tree.order();
        let mut places = BTreeMap::new();
        let mut at = ROOT * SLOT;
        let mut chunked = false;
        for (id, parent) in &order {
            let node = tree.node(*id);
            let size = match &node.content {
                Content::Directory(_) => directory_size(tree, *id, *parent),
                Content::Symlink(text) => text.len() as u64,
                _ => 0,
            };
            let (mut behind, mut data) = (size, Place::Behind);
            if size > TAIL && matches!(node.content, Content::Directory(_)) {
                (behind, data) = (0, Place::Blocks(free));
                free += size.div_ceil(BLOCK);
            }
            let fixed = INODE + attributes_size(node);
            match &node.content {
                Content::Sparse(sparse) => {
                    chunked = true;
                    behind = sparse.chunks.len() as u64 * 4;
                }
                // A tail does not go over the end of a block.
                _ => {
                    while (at + fixed) % BLOCK + behind > BLOCK && behind > 0 {
                        at += SLOT;
                    }
                }
            }
            places.insert(*id, Placed { at, data });
            at = (at + fixed + behind).next_multiple_of(SLOT);
        }
        Ok(Self { meta: free, order, places, chunked })
    }

    fn number(&self, id: Id) -> u64 {
        self.places[&id].at / SLOT
    }

    fn inode(&self, tree: &Tree, id: Id, parent: Id) -> io::Result<Vec<u8>> {
        let node = tree.node(id);
        let attributes = attributes(node)?;
        let mut behind = Vec::new();
        let (mut format, mut size, mut start) = (PLAIN, 0, 0u32);
        let block = |block: u64| {
            u32::try_from(block).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))
        };
        match &node.content {
            Content::Directory(_) => {
                let data = directory(tree, id, parent, self);
                size = data.len() as u64;
                match self.places[&id].data {
                    Place::Blocks(at) => start = block(at)?,
                    Place::Behind => (format, behind) = (INLINE, data),
                }
            }
            Content::File(file) | Content::LongSymlink(file) => {
                size = file.size;
                start = block(file.start / BLOCK)?;
            }
            Content::Sparse(sparse) => {
                format = CHUNKED;
                size = sparse.size;
                start = sparse.bits - BLOCK.ilog2();
                for chunk in &sparse.chunks {
                    let at = match chunk {
                        Some(at) => block(at / BLOCK)?,
                        None => HOLE,
                    };
                    behind.extend_from_slice(&at.to_le_bytes());
                }
            }
            Content::Symlink(text) => {
                size = text.len() as u64;
                format = INLINE;
                behind.extend_from_slice(text);
            }
            Content::Char(major, minor) | Content::Block(major, minor) => {
                // new_encode_dev of the kernel.
                start = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
            }
            Content::Fifo => {}
        }
        let mut out = Vec::with_capacity(INODE as usize + attributes.len() + behind.len());
        out.extend_from_slice(&format.to_le_bytes());
        let count = if attributes.is_empty() { 0 } else { (attributes.len() - 12) / 4 + 1 };
        out.extend_from_slice(&(count as u16).to_le_bytes());
        out.extend_from_slice(&((node.kind() | node.mode & 0o7777) as u16).to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&size.to_le_bytes());
        out.extend_from_slice(&start.to_le_bytes());
        out.extend_from_slice(&(self.number(id) as u32).to_le_bytes());
        out.extend_from_slice(&node.uid.to_le_bytes());
        out.extend_from_slice(&node.gid.to_le_bytes());
        out.extend_from_slice(&node.mtime.seconds.to_le_bytes());
        out.extend_from_slice(&node.mtime.nanos.to_le_bytes());
        out.extend_from_slice(&tree.links(id).to_le_bytes());
        out.extend_from_slice(&[0; 16]);
        out.extend_from_slice(&attributes);
        out.extend_from_slice(&behind);
        Ok(out)
    }

    fn superblock(&self, blocks: u64) -> io::Result<Vec<u8>> {
        let word = |value: u64| {
            u32::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))
        };
        let mut out = vec![0; 1024];
        let incompat = if self.chunked { INCOMPAT_CHUNKED } else { 0 };
        out.extend_from_slice(&MAGIC.to_le_bytes());
        // No checksum.
        out.extend_from_slice(&0u32.to_le_bytes());
        out.extend_from_slice(&COMPAT_MTIME.to_le_bytes());
        out.push(BLOCK.ilog2() as u8);
        out.push(0);
        out.extend_from_slice(&(ROOT as u16).to_le_bytes());
        out.extend_from_slice(&(self.order.len() as u64).to_le_bytes());
        // Time of making: the same layer is the same image.
        out.extend_from_slice(&[0; 12]);
        out.extend_from_slice(&word(blocks)?.to_le_bytes());
        out.extend_from_slice(&word(self.meta)?.to_le_bytes());
        // xattr_blkaddr, uuid and volume name.
        out.extend_from_slice(&[0; 4 + 16 + 16]);
        out.extend_from_slice(&incompat.to_le_bytes());
        out.resize(1024 + 128, 0);
        Ok(out)
    }
}

/// Attributes as they follow an inode: a header of 12 bytes, then entries in words.
fn attributes(node: &Node) -> io::Result<Vec<u8>> {
    let mut out = vec![0; 12];
    for (name, value) in node.attributes() {
        let known = PREFIXES.into_iter().find_map(|(index, prefix)| {
            let rest = name.strip_prefix(prefix)?;
            // The two ACLs are whole names.
            (rest.is_empty() == (index == 2 || index == 3)).then_some((index, rest))
        });
        let (Some((index, rest)), Ok(length)) = (known, u16::try_from(value.len())) else {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("attribute {} cannot be kept", String::from_utf8_lossy(name)),
            ));
        };
        out.push(rest.len() as u8);
        out.push(index);
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(rest);
        out.extend_from_slice(value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    if (out.len() - 12) / 4 + 1 > u16::MAX.into() {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "a file has more than 256 KiB of attributes",
        ));
    }
    Ok(if out.len() == 12 { Vec::new() } else { out })
}

fn attributes_size(node: &Node) -> u64 {
    // What cannot be encoded is told when it is.
    attributes(node).map_or(0, |encoded| encoded.len() as u64)
}

/// Bytes of an entry without its name: inode number, place of the name, type.
const ENTRY: u64 = 12;

/// All names of a directory as the kernel searches them: sorted by their bytes.
fn names(tree: &Tree, id: Id, parent: Id) -> Vec<(&[u8], Id)> {
    let Content::Directory(children) = &tree.node(id).content else { return Vec::new() };
    let mut names: Vec<(&[u8], Id)> = vec![(b".", id), (b"..", parent)];
    names.extend(children.iter().map(|(name, id)| (&**name, *id)));
    names.sort_unstable_by_key(|(name, _)| *name);
    names
}

/// How many of `names` go in the next block, and how many bytes that is.
fn one_block(names: &[(&[u8], Id)]) -> (usize, u64) {
    let mut used = 0;
    for (count, (name, _)) in names.iter().enumerate() {
        let entry = ENTRY + name.len() as u64;
        if used + entry > BLOCK {
            return (count, used);
        }
        used += entry;
    }
    (names.len(), used)
}

fn directory_size(tree: &Tree, id: Id, parent: Id) -> u64 {
    let names = names(tree, id, parent);
    let (mut names, mut size) = (&names[..], 0);
    loop {
        let (count, used) = one_block(names);
        names = &names[count..];
        if names.is_empty() {
            return size + used;
        }
        size += BLOCK;
    }
}

/// A directory's data: in each block first the entries, then their names.
fn directory(tree: &Tree, id: Id, parent: Id, plan: &Plan) -> Vec<u8> {
    let names = names(tree, id, parent);
    let mut names = &names[..];
    let mut out = Vec::new();
    loop {
        let (count, used) = one_block(names);
        let (here, rest) = names.split_at(count);
        let mut place = count as u64 * ENTRY;
        for (name, id) in here {
            out.extend_from_slice(&plan.number(*id).to_le_bytes());
            out.extend_from_slice(&(place as u16).to_le_bytes());
            out.push(tree.node(*id).file_type());
            out.push(0);
            place += name.len() as u64;
        }
        for (name, _) in here {
            out.extend_from_slice(name);
        }
        names = rest;
        if names.is_empty() {
            return out;
        }
        out.resize(out.len() + (BLOCK - used) as usize, 0);
    }
}

/// Mounts the image in `path`, read-only, attached nowhere.
pub fn mount(path: &Path) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "source", path)?;
    rustix::mount::fsconfig_set_flag(&context, "ro")?;
    rustix::mount::fsconfig_create(&context)
        .map_err(|e| super::overlay::explain(&context, e.into()))?;
    let read_only = MountAttrFlags::MOUNT_ATTR_RDONLY;
    Ok(rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, read_only)?)
}

/// The root directory of a mount.
pub fn root(mount: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH;
    Ok(rustix::fs::openat2(mount.as_fd(), ".", flags, Mode::empty(), resolve)?)
}

/// Has the file system check the image's content at each read from now on, by fs-verity, and keep it from
/// being changed. False: it cannot; then the image is as good as its file system.
#[expect(unsafe_code, reason = "FS_IOC_ENABLE_VERITY")]
pub fn seal(path: &Path) -> io::Result<bool> {
    /// `struct fsverity_enable_arg` of the kernel: version 1, SHA-256, blocks of 4096 bytes, no salt and
    /// no signature.
    #[repr(C)]
    struct Enable {
        version: u32,
        hash: u32,
        block: u32,
        unused: [u32; 29],
    }
    const FS_IOC_ENABLE_VERITY: libc::Ioctl = 0x4080_6685_u32 as libc::Ioctl;
    let file = File::open(path)?;
    let enable = Enable { version: 1, hash: 1, block: BLOCK as u32, unused: [0; 29] };
    // SAFETY: the structure has the size that is part of the number, and the call only reads it.
    let result = unsafe {
        libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&file), FS_IOC_ENABLE_VERITY, &raw const enable)
    };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // Not known to this kernel, or not to this file system as it was made.
        Some(libc::ENOTTY | libc::EOPNOTSUPP | libc::EINVAL) => Ok(false),
        _ => Err(error),
    }
}

/// Whether this kernel can use such layers: makes one in `scratch` and mounts it below an overlay.
pub fn probe(scratch: &Path) -> io::Result<()> {
    let path = scratch.join(format!("probe-{:016x}", rand::random::<u64>()));
    let tried = Writer::create(&path).and_then(|writer| {
        writer.finish(&Tree::default())?;
        let mount = mount(&path)?;
        let lowers = [Lower::Mount(mount.try_clone()?), Lower::Mount(self::mount(&path)?)];
        Overlay { layers: scratch, lowers: &lowers, writable: None, readonly: true }
            .mount(scratch)
            .map(drop)
    });
    std::fs::remove_file(&path)?;
    tried
}

#[cfg(test)]
#[path = "erofs/tests.rs"]
pub(super) mod tests;

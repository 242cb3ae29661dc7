//! What a layer is made of while its archive is read, in memory: names and attributes. Content goes to
//! the image at once, and stays there also when a later entry replaces it.
//!
//! It does what `unpack` has the kernel do in a directory, and comes to the same: parents are resolved
//! beneath the layer's root and links in them followed as long as they stay there; later entries replace
//! earlier ones; whiteouts are 0/0 devices and opaque directories have an attribute.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    io::{self, BufRead},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use super::{
    super::{
        recipe::Recorder,
        tar::{Archive, Entry, Kind, Sparse, Time},
        unpack::{
            Error, Marker, OPAQUE, WRITE_BACK, check_xattrs, clean, marker, show, wanted_xattrs,
            write_back,
        },
    },
    BLOCK, TAIL, Writer,
};

/// Most files, directories and so on of one layer: a bound on memory, some 200 bytes each.
const MAX_NODES: usize = 2 << 20;

/// Most links that are followed in one path, as the kernel has it.
const MAX_LINKS: usize = 40;

/// Most chunks of a sparse file; the larger it is, the larger its chunks.
const MAX_CHUNKS: u64 = 1 << 18;

/// Bits of the largest chunk: EROFS has five bits for what it is above a block.
const MAX_CHUNK_BITS: u32 = 12 + 31;

/// Names a node.
pub type Id = u32;

const ROOT: Id = 0;

/// A file, directory and so on.
#[derive(Debug)]
pub struct Node {
    /// What it is and what is in it.
    pub content: Content,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Time,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Of a directory: the archive lists it; it hides the one below.
    listed: bool,
    opaque: bool,
}

/// What a node is.
#[derive(Debug)]
pub enum Content {
    /// Names in it.
    Directory(BTreeMap<Box<[u8]>, Id>),
    /// In one piece.
    File(Extent),
    /// With holes.
    Sparse(Chunks),
    /// A link of moderate length.
    Symlink(Box<[u8]>),
    /// One that is kept as content.
    LongSymlink(Extent),
    /// Major and minor number.
    Char(u32, u32),
    /// Major and minor number.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// Content in the image.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Byte in the image: the beginning of a block.
    pub start: u64,
    /// Its size, in bytes.
    pub size: u64,
}

/// Content of a file with holes.
#[derive(Debug)]
pub struct Chunks {
    /// Size of the file, in bytes.
    pub size: u64,
    /// Size of a chunk, as a power of two.
    pub bits: u32,
    /// Where each is in the image.
    pub chunks: Vec<Option<u64>>,
}

impl Node {
    fn new(content: Content, attributes: Attributes) -> Self {
        let Attributes { mode, uid, gid, mtime, xattrs } = attributes;
        Self { content, mode, uid, gid, mtime, xattrs, listed: false, opaque: false }
    }

    /// One that is only implied.
    fn implied() -> Self {
        let attributes = Attributes { mode: 0o755, ..Attributes::default() };
        Self::new(Content::Directory(BTreeMap::new()), attributes)
    }

    /// S_IFMT of its mode.
    pub fn kind(&self) -> u32 {
        match &self.content {
            Content::Directory(_) => libc::S_IFDIR,
            Content::File(_) | Content::Sparse(_) => libc::S_IFREG,
            Content::Symlink(_) | Content::LongSymlink(_) => libc::S_IFLNK,
            Content::Char(..) => libc::S_IFCHR,
            Content::Block(..) => libc::S_IFBLK,
            Content::Fifo => libc::S_IFIFO,
        }
    }

    /// What a directory says of it (EROFS_FT_*).
    pub fn file_type(&self) -> u8 {
        match &self.content {
            Content::File(_) | Content::Sparse(_) => 1,
            Content::Directory(_) => 2,
            Content::Char(..) => 3,
            Content::Block(..) => 4,
            Content::Fifo => 5,
            Content::Symlink(_) | Content::LongSymlink(_) => 7,
        }
    }

    /// Its extended attributes.
    pub fn attributes(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let opaque = self.opaque.then_some((OPAQUE.as_bytes(), &b"y"[..]));
        self.xattrs.iter().map(|(name, value)| (&name[..], &value[..])).chain(opaque)
    }

    fn directory(&mut self) -> Option<&mut BTreeMap<Box<[u8]>, Id>> {
        match &mut self.content {
            Content::Directory(names) => Some(names),
            _ => None,
        }
    }

    fn is_whiteout(&self) -> bool {
        matches!(self.content, Content::Char(0, 0))
    }
}

/// What an entry says besides its content.
#[derive(Default)]
pub struct Attributes {
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Time,
    /// Extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Attributes {
    fn of(entry: &Entry) -> Self {
        let xattrs = wanted_xattrs(&entry.xattrs)
            .map(|(name, value)| (name.as_bytes().to_vec(), value.to_vec()))
            .collect();
        let Entry { mode, uid, gid, mtime, .. } = *entry;
        Self { mode, uid, gid, mtime, xattrs }
    }
}

/// A layer.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    links: BTreeMap<Id, u32>,
}

impl Default for Tree {
    fn default() -> Self {
        Self { nodes: vec![Node::implied()], links: BTreeMap::new() }
    }
}

/// Why a path leads to no directory.
enum Lost {
    /// There is nothing at part so many of the path.
    Missing,
    NotDirectory,
    Outside,
    Loop,
}

impl Tree {
    /// A node.
    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[id as usize]
    }

    fn node_mut(&mut self, id: Id) -> &mut Node {
        &mut self.nodes[id as usize]
    }

    /// How many names a node has; a directory, as many as it has in it and two.
    pub fn links(&self, id: Id) -> u32 {
        match &self.node(id).content {
            Content::Directory(names) => {
                let is_directory =
                    |id: &&Id| matches!(self.node(**id).content, Content::Directory(_));
                2 + names.values().filter(is_directory).count() as u32
            }
            _ => self.links.get(&id).copied().unwrap_or(1),
        }
    }

    /// All nodes that have a name, each once, the root first, with the directory that has it.
    pub fn order(&self) -> Vec<(Id, Id)> {
        let mut order = vec![(ROOT, ROOT)];
        let mut seen = vec![false; self.nodes.len()];
        let mut at = 0;
        while let Some((id, _)) = order.get(at).copied() {
            at += 1;
            if let Content::Directory(names) = &self.node(id).content {
                for child in names.values() {
                    if !std::mem::replace(&mut seen[*child as usize], true) {
                        order.push((*child, id));
                    }
                }
            }
        }
        order
    }

    fn names(&self, id: Id) -> Option<&BTreeMap<Box<[u8]>, Id>> {
        match &self.node(id).content {
            Content::Directory(names) => Some(names),
            _ => None,
        }
    }

    fn lookup(&self, directory: Id, name: &[u8]) -> Option<Id> {
        self.names(directory)?.get(name).copied()
    }

    fn add(&mut self, directory: Id, name: &[u8], node: Node) -> Id {
        let id = self.nodes.len() as Id;
        self.nodes.push(node);
        self.link(directory, name, id);
        id
    }

    /// Gives a node a name, whatever had it before.
    fn link(&mut self, directory: Id, name: &[u8], id: Id) {
        let names = self.node_mut(directory).directory().expect("it was resolved as one");
        let before = names.insert(name.into(), id);
        *self.links.entry(id).or_insert(0) += 1;
        if let Some(before) = before {
            self.unlinked(before);
        }
    }

    fn remove(&mut self, directory: Id, name: &[u8]) {
        let names = self.node_mut(directory).directory().expect("it was resolved as one");
        if let Some(id) = names.remove(name) {
            self.unlinked(id);
        }
    }

    /// A name of it is gone. Below a directory all names are gone too.
    fn unlinked(&mut self, id: Id) {
        let mut todo = vec![id];
        while let Some(id) = todo.pop() {
            if let Some(links) = self.links.get_mut(&id) {
                *links -= 1;
            }
            if let Some(names) = self.node_mut(id).directory() {
                todo.extend(std::mem::take(names).into_values());
            }
        }
    }

    /// The directory at `path`, with its way from the root; links are followed and stay inside.
    fn resolve(&self, path: &[u8]) -> Result<Vec<Id>, Lost> {
        let mut way = vec![ROOT];
        let mut links = 0;
        // Parts that are still to go, the next one last.
        let split = |path: &[u8]| -> Vec<Vec<u8>> {
            let parts = path.split(|b| *b == b'/').filter(|part| !part.is_empty() && *part != b".");
            let mut parts: Vec<_> = parts.map(<[u8]>::to_vec).collect();
            parts.reverse();
            parts
        };
        let mut todo = split(path);
        while let Some(part) = todo.pop() {
            if part == b".." {
                if way.len() == 1 {
                    return Err(Lost::Outside);
                }
                way.pop();
                continue;
            }
            let here = *way.last().expect("the root is never left");
            let id = self.lookup(here, &part).ok_or(Lost::Missing)?;
            match &self.node(id).content {
                Content::Directory(_) => way.push(id),
                Content::Symlink(text) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Lost::Loop);
                    }
                    if text.starts_with(b"/") {
                        return Err(Lost::Outside);
                    }
                    todo.extend(split(text));
                }
                Content::LongSymlink(_) => return Err(Lost::Missing),
                _ => return Err(Lost::NotDirectory),
            }
        }
        Ok(way)
    }
}

/// Reads an archive into a tree and an image.
pub(in super::super) struct Builder<'a> {
    pub tree: Tree,
    writer: &'a mut Writer,
    parent: Option<(Vec<u8>, Id)>,
    /// Room that content takes.
    bytes: u64,
    /// Content since the kernel was last told to begin writing.
    fresh: u64,
}

impl<'a> Builder<'a> {
    pub(in super::super) fn new(writer: &'a mut Writer) -> Self {
        Self { tree: Tree::default(), writer, parent: None, bytes: 0, fresh: 0 }
    }

    /// Reads the archive to its end.
    pub(in super::super) fn read<R: BufRead>(
        mut self,
        source: R,
        recorder: Option<Recorder>,
    ) -> Result<Built, Error> {
        let mut archive = match recorder {
            Some(recorder) => Archive::recorded(source, recorder),
            None => Archive::new(source),
        };
        while let Some(entry) = archive.entry()? {
            self.place(entry, &mut archive)?;
            if self.tree.nodes.len() > MAX_NODES {
                return Err(Error::Refused {
                    path: "the layer".to_owned(),
                    rule: "it has more than 2097152 files (images.layer_format = \"directories\" takes it)",
                });
            }
        }
        let mut kept = None;
        if let (_, Some(recorder)) = archive.finish()? {
            let write = |source| Error::Write { path: "its recipe".to_owned(), source };
            kept = Some(recorder.finish().map_err(write)?);
        }
        Ok(Built { tree: self.tree, bytes: self.bytes, kept })
    }

    fn place<R: BufRead>(&mut self, entry: Entry, archive: &mut Archive<R>) -> Result<(), Error> {
        let refuse = |rule| Error::Refused { path: show(&entry.path), rule };
        let path = clean(&entry.path).map_err(refuse)?;
        if path.is_empty() {
            if entry.kind != Kind::Directory {
                return Err(refuse("the layer's root must be a directory"));
            }
            check_xattrs(&entry.xattrs).map_err(refuse)?;
            self.list(ROOT, &entry);
            return Ok(());
        }
        let (parent, name) = match path.iter().rposition(|b| *b == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&path[..0], &path[..]),
        };
        if let Some(marker) = marker(name) {
            return self.mark(&entry, parent, marker.map_err(refuse)?);
        }
        check_xattrs(&entry.xattrs).map_err(refuse)?;
        let parent = self.enter(parent, &entry.path)?;
        let attributes = Attributes::of(&entry);
        let content = match &entry.kind {
            Kind::Directory => {
                let there = self.tree.lookup(parent, name);
                let is_directory = |id: &Id| self.tree.names(*id).is_some();
                let id = match there.filter(is_directory) {
                    Some(id) => id,
                    None => {
                        self.parent = None;
                        let id = self.tree.add(parent, name, Node::implied());
                        // The archive, applied in order, would have emptied what is below.
                        self.tree.node_mut(id).opaque = there.is_some();
                        id
                    }
                };
                self.list(id, &entry);
                return Ok(());
            }
            Kind::HardLink(target) => return self.hard_link(&entry, target, parent, name),
            Kind::File => self.content(&entry, archive)?,
            Kind::Symlink(text) if text.len() as u64 > TAIL => {
                Content::LongSymlink(self.extent(&entry, text)?)
            }
            Kind::Symlink(text) => Content::Symlink(text.as_slice().into()),
            Kind::Char(major, minor) => Content::Char(*major, *minor),
            Kind::Block(major, minor) => Content::Block(*major, *minor),
            Kind::Fifo => Content::Fifo,
        };
        let mut attributes = attributes;
        if matches!(content, Content::Symlink(_) | Content::LongSymlink(_)) {
            attributes.mode = 0o777;
        }
        self.put(parent, name, Node::new(content, attributes));
        Ok(())
    }

    /// Something new at a name, whatever was there.
    fn put(&mut self, parent: Id, name: &[u8], node: Node) -> Id {
        if self.tree.lookup(parent, name).is_some() {
            self.parent = None;
        }
        self.tree.add(parent, name, node)
    }

    fn list(&mut self, id: Id, entry: &Entry) {
        let Attributes { mode, uid, gid, mtime, xattrs } = Attributes::of(entry);
        let node = self.tree.node_mut(id);
        (node.mode, node.uid, node.gid, node.mtime, node.xattrs) = (mode, uid, gid, mtime, xattrs);
        node.listed = true;
    }

    fn mark(&mut self, entry: &Entry, parent: &[u8], marker: Marker<'_>) -> Result<(), Error> {
        let hidden = match marker {
            Marker::Opaque => {
                let parent = self.enter(parent, &entry.path)?;
                self.tree.node_mut(parent).opaque = true;
                return Ok(());
            }
            Marker::Nothing => return Ok(()),
            Marker::Gone(hidden) => hidden,
        };
        let parent = self.enter(parent, &entry.path)?;
        match self.tree.lookup(parent, hidden) {
            Some(id) if self.tree.names(id).is_some() => self.tree.node_mut(id).opaque = true,
            Some(_) => {}
            None => {
                let attributes = Attributes { mode: 0o600, ..Attributes::default() };
                self.put(parent, hidden, Node::new(Content::Char(0, 0), attributes));
            }
        }
        Ok(())
    }

    fn hard_link(
        &mut self,
        entry: &Entry,
        target: &[u8],
        parent: Id,
        name: &[u8],
    ) -> Result<(), Error> {
        let refuse = |rule| Error::Refused { path: show(&entry.path), rule };
        let target = clean(target)
            .ok()
            .filter(|target| !target.is_empty())
            .ok_or(refuse("the target of a hard link must be a path inside the layer"))?;
        if clean(&entry.path).is_ok_and(|path| path == target) {
            return Ok(());
        }
        let (from, from_name) = match target.iter().rposition(|b| *b == b'/') {
            Some(slash) => (&target[..slash], &target[slash + 1..]),
            None => (&target[..0], &target[..]),
        };
        let missing = "the target of a hard link must be an earlier file of the same layer";
        let way = self.tree.resolve(from).map_err(|lost| match lost {
            Lost::Outside => refuse("the target of a hard link is outside the layer"),
            Lost::Missing | Lost::NotDirectory | Lost::Loop => refuse(missing),
        })?;
        let from = *way.last().expect("the root is never left");
        let id = self.tree.lookup(from, from_name).ok_or(refuse(missing))?;
        if self.tree.lookup(parent, name) == Some(id) {
            return Ok(());
        }
        if self.tree.names(id).is_some() {
            return Err(refuse("a hard link to a directory"));
        }
        // Making way may take the target with it, as it does in a directory.
        if let Some(old) = self.tree.lookup(parent, name) {
            self.parent = None;
            self.tree.remove(parent, name);
            if way.contains(&old) {
                return Err(refuse(missing));
            }
        }
        self.tree.link(parent, name, id);
        Ok(())
    }

    /// The directory `path`; it and those above it are made if missing.
    fn enter(&mut self, path: &[u8], entry: &[u8]) -> Result<Id, Error> {
        if let Some((named, id)) = &self.parent
            && named == path
        {
            return Ok(*id);
        }
        let refuse = |rule| Error::Refused { path: show(entry), rule };
        let mut id = ROOT;
        let mut end = 0;
        let resolved = self.tree.resolve(path);
        let id = match resolved {
            Ok(way) => *way.last().expect("the root is never left"),
            Err(Lost::Outside) => {
                return Err(refuse("a symbolic link in its path leads out of the layer"));
            }
            Err(Lost::Loop) => return Err(refuse("symbolic links in its path form a loop")),
            Err(Lost::Missing | Lost::NotDirectory) => {
                for name in path.split(|b| *b == b'/') {
                    end += name.len() + usize::from(end > 0);
                    id = self.make_directory(id, name, &path[..end], entry)?;
                }
                id
            }
        };
        self.parent = Some((path.to_vec(), id));
        Ok(id)
    }

    /// One part of a path whose parts before are there.
    fn make_directory(
        &mut self,
        parent: Id,
        name: &[u8],
        so_far: &[u8],
        entry: &[u8],
    ) -> Result<Id, Error> {
        let refuse = |rule| Error::Refused { path: show(entry), rule };
        let opaque = match self.tree.resolve(so_far) {
            Ok(way) => return Ok(*way.last().expect("the root is never left")),
            Err(Lost::Outside) => {
                return Err(refuse("a symbolic link in its path leads out of the layer"));
            }
            Err(Lost::Loop) => return Err(refuse("symbolic links in its path form a loop")),
            Err(Lost::Missing) => {
                if self.tree.lookup(parent, name).is_some() {
                    return Err(refuse("a symbolic link in its path leads nowhere"));
                }
                false
            }
            Err(Lost::NotDirectory) => {
                let there = self.tree.lookup(parent, name);
                if !there.is_some_and(|id| self.tree.node(id).is_whiteout()) {
                    return Err(refuse("a part of its path is not a directory"));
                }
                // `.wh.NAME`, then NAME/…: the old one is gone, this is a new one.
                true
            }
        };
        let id = self.put(parent, name, Node::implied());
        self.tree.node_mut(id).opaque = opaque;
        Ok(id)
    }

    fn extent(&mut self, entry: &Entry, bytes: &[u8]) -> Result<Extent, Error> {
        let start = self.writer.begin();
        self.writer
            .write_at(bytes, start)
            .map_err(|source| Error::Write { path: show(&entry.path), source })?;
        Ok(Extent { start, size: bytes.len() as u64 })
    }

    /// Writes a file's data.
    fn content<R: BufRead>(
        &mut self,
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Result<Content, Error> {
        let write = |source| Error::Write { path: show(&entry.path), source };
        let Some(Sparse { size, pieces }) = &entry.sparse else {
            let start = self.writer.begin();
            let extent = Extent { start, size: entry.size };
            self.copy(entry, archive, &[(start, entry.size)])?;
            return Ok(Content::File(extent));
        };
        let needed = size.div_ceil(MAX_CHUNKS).max(BLOCK).next_power_of_two();
        let bits = needed.ilog2();
        if bits > MAX_CHUNK_BITS {
            return Err(write(io::ErrorKind::FileTooLarge.into()));
        }
        let count = size.div_ceil(1 << bits) as usize;
        let mut chunks: Vec<Option<u64>> = vec![None; count];
        let mut places = Vec::with_capacity(pieces.len());
        // Pieces are in order: each chunk is begun once.
        let mut free = self.writer.begin();
        for (offset, length) in pieces {
            let (mut offset, mut length) = (*offset, *length);
            while length > 0 {
                let chunk = &mut chunks[(offset >> bits) as usize];
                let start = *chunk.get_or_insert_with(|| {
                    let start = free;
                    free += 1 << bits;
                    start
                });
                let inside = offset & ((1 << bits) - 1);
                let step = length.min((1 << bits) - inside);
                places.push((start + inside, step));
                offset += step;
                length -= step;
            }
        }
        self.copy(entry, archive, &places)?;
        // The last chunk is whole: what comes next begins behind it.
        self.writer.at = self.writer.at.max(free);
        Ok(Content::Sparse(Chunks { size: *size, bits, chunks }))
    }

    /// Writes the entry's data to these places of the image.
    fn copy<R: BufRead>(
        &mut self,
        entry: &Entry,
        archive: &mut Archive<R>,
        places: &[(u64, u64)],
    ) -> Result<(), Error> {
        self.bytes += entry.size.next_multiple_of(BLOCK);
        self.fresh += entry.size;
        if self.fresh >= 8 * WRITE_BACK {
            self.fresh = 0;
            write_back(&self.writer.file);
        }
        if let Some(recorder) = archive.recorder() {
            recorder.content_of_image(places);
        }
        for (start, length) in places {
            let mut done = 0;
            while archive.data(length - done, |data| -> Result<usize, Error> {
                self.writer
                    .write_at(data, start + done)
                    .map_err(|source| Error::Write { path: show(&entry.path), source })?;
                done += data.len() as u64;
                Ok(data.len())
            })? {}
        }
        Ok(())
    }
}

/// What came of an archive.
pub(in super::super) struct Built {
    pub tree: Tree,
    pub bytes: u64,
    pub kept: Option<super::super::recipe::Kept>,
}

impl Tree {
    /// Files, directories and so on that have a name, without the root.
    pub fn inodes(&self) -> u64 {
        self.order().len() as u64 - 1
    }

    /// Whether the archive lists the root.
    pub fn root_listed(&self) -> bool {
        self.node(ROOT).listed
    }

    /// Directories that the archive implies and that do not hide what is below, parents first.
    pub fn implied(&self) -> Vec<PathBuf> {
        let mut implied = Vec::new();
        let mut todo = vec![(ROOT, PathBuf::new())];
        while let Some((id, path)) = todo.pop() {
            let node = self.node(id);
            let Content::Directory(names) = &node.content else { continue };
            if id != ROOT && !node.listed && !node.opaque {
                implied.push(path.clone());
            }
            for (name, id) in names.iter().rev() {
                todo.push((*id, path.join(OsStr::from_bytes(name))));
            }
        }
        implied
    }

    /// The node at a path without links.
    fn at(&self, path: &Path) -> Option<Id> {
        let mut id = ROOT;
        for part in path.components() {
            id = self.lookup(id, part.as_os_str().as_bytes())?;
        }
        Some(id)
    }

    /// Whether the directory at a path hides the one below; false if there is none.
    pub fn is_opaque(&self, path: &Path) -> bool {
        self.at(path).is_some_and(|id| self.node(id).opaque)
    }

    /// Gives the directory at a path these attributes.
    pub fn set_attributes(&mut self, path: &Path, attributes: Attributes) {
        if let Some(id) = self.at(path) {
            let node = self.node_mut(id);
            let Attributes { mode, uid, gid, mtime, xattrs } = attributes;
            (node.mode, node.uid, node.gid, node.mtime, node.xattrs) =
                (mode, uid, gid, mtime, xattrs);
        }
    }

    /// Moves what is in the directory `from` to `to`, whose missing directories are made: their paths
    /// go to `made`. False, and nothing done, if something else is in the way there.
    pub fn relocate(&mut self, from: &Path, to: &Path, made: &mut BTreeSet<PathBuf>) -> bool {
        let mut at = PathBuf::new();
        for part in to.components() {
            at.push(part);
            if at == from {
                return false;
            }
            if self.at(&at).is_some_and(|id| self.names(id).is_none()) {
                return false;
            }
        }
        let (Some(source), Some(parent)) = (self.at(from), from.parent().and_then(|p| self.at(p)))
        else {
            return false;
        };
        let mut target = ROOT;
        let mut at = PathBuf::new();
        for part in to.components() {
            at.push(part);
            let name = part.as_os_str().as_bytes();
            target = match self.lookup(target, name) {
                Some(id) => id,
                None => {
                    made.insert(at.clone());
                    self.add(target, name, Node::implied())
                }
            };
        }
        self.merge(source, target);
        let name = from.file_name().map(|name| name.as_bytes().to_vec()).unwrap_or_default();
        self.remove(parent, &name);
        true
    }

    /// Moves the names of one directory to another; of two of a name the moved one wins, except that
    /// directories are merged.
    fn merge(&mut self, from: Id, to: Id) {
        let mut todo = vec![(from, to)];
        while let Some((from, to)) = todo.pop() {
            let Some(names) = self.node_mut(from).directory().map(std::mem::take) else { continue };
            for (name, id) in names {
                match self.lookup(to, &name) {
                    Some(other) if self.names(other).is_some() && self.names(id).is_some() => {
                        todo.push((id, other));
                    }
                    _ => {
                        self.link(to, &name, id);
                        // It has lost the name that it had.
                        *self.links.entry(id).or_insert(1) -= 1;
                    }
                }
            }
        }
    }
}

//! How a layer's archive is made again, byte for byte, from the layer on disk.
//!
//! A push or a save must give the very archive that the image names by digest, and a layer is kept as
//! files only: storing the archive too would write everything twice. So unpacking puts aside, in a
//! *recipe*, all of the archive that is not the content of a file: headers, padding, what follows
//! the end. Content stays where it is, in the layer; the recipe says which file it is of.
//!
//! ```text
//! recipes/<number>/steps   zstd of: MAGIC, then steps:
//!                            1 length bytes                as they are
//!                            2 path count (offset length)* content of a file of the layer
//!                            3 count (offset length)*      content that is there in the layer's image
//!                            0 length                      the end; of the whole archive
//! recipes/<number>/moves   (before from to)*: files that are not where the archive put them
//! recipes/<number>/<n>     a file or directory that a later entry of the archive replaced
//! ```
//! Numbers are LEB128. The files are synced and live as long as the layer ([`super::layers`]).
//!
//! Use: [`super::layers::Layer::archive`] gives a [`Rebuilt`], which is a [`Read`] of the uncompressed
//! archive. It hashes what it gives, and ends with an error instead of an end of file if that is not
//! the layer's diff id: whoever has read it to its end has the right bytes. It blocks: read it on a
//! thread that may.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, BufReader, BufWriter, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use sha2::{Digest as _, Sha256};

use super::unpack::open_root;
use crate::id::Digest;

const MAGIC: &[u8] = b"holdfast recipe 1\n";

const END: u8 = 0;
const BYTES: u8 = 1;
const CONTENT: u8 = 2;
const IMAGE: u8 = 3;

/// Bytes that are gathered before they are a step.
const STEP: usize = 64 << 10;

/// Longest path and most pieces that a recipe is believed: more than `unpack`, `tar` and `erofs` make.
const MAX_PATH: u64 = 1 << 16;
const MAX_PIECES: u64 = 1 << 20;

/// Why a layer's archive cannot be made again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The layer came to this node before recipes were kept.
    #[error(
        "layer {0} was unpacked by a version that kept no recipe for its archive: remove and pull its images again"
    )]
    None(Digest),
    /// A file of the layer or of its recipe.
    #[error("read layer {layer} at {path}")]
    Read {
        /// The layer.
        layer: Digest,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A file or directory that is not where the archive put it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// Files of the first so many content steps are meant.
    pub before: u64,
    /// Where it was in the layer; what is below it moved with it.
    pub from: Vec<u8>,
    /// Where it is.
    pub to: Place,
}

/// Where a moved file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the layer.
    Layer(Vec<u8>),
    /// With the recipe, by number.
    Kept(u64),
}

/// Writes a recipe while its layer is unpacked. What goes wrong is told by `finish`.
pub struct Recorder {
    out: zstd::stream::write::Encoder<'static, BufWriter<File>>,
    kept: Kept,
    bytes: Vec<u8>,
    steps: u64,
    length: u64,
    failed: Option<io::Error>,
}

impl Recorder {
    /// Makes the directory `path` for it.
    pub fn create(path: &Path) -> io::Result<Self> {
        std::fs::create_dir(path)?;
        let file = File::create_new(path.join("steps"))?;
        let mut out = zstd::stream::write::Encoder::new(BufWriter::new(file), 1)?;
        out.write_all(MAGIC)?;
        let kept = Kept { directory: open_root(path)?, next: 0, moves: Vec::new() };
        Ok(Self { out, kept, bytes: Vec::new(), steps: 0, length: 0, failed: None })
    }

    /// Bytes of the archive that are no file's content.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.length += bytes.len() as u64;
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() >= STEP {
            self.flush();
        }
    }

    /// Here the archive has the content of the file at `path`, which has no links in it.
    pub(super) fn content(&mut self, path: &[u8], pieces: &[(u64, u64)]) {
        if pieces.iter().all(|(_, length)| *length == 0) {
            return;
        }
        let mut step = vec![CONTENT];
        text(&mut step, path);
        self.pieces(step, pieces);
        self.steps += 1;
    }

    /// Here the archive has what is at these places of the layer's image.
    pub(super) fn content_of_image(&mut self, pieces: &[(u64, u64)]) {
        if pieces.iter().any(|(_, length)| *length > 0) {
            self.pieces(vec![IMAGE], pieces);
        }
    }

    fn pieces(&mut self, mut step: Vec<u8>, pieces: &[(u64, u64)]) {
        self.flush();
        number(&mut step, pieces.len() as u64);
        for (offset, length) in pieces {
            number(&mut step, *offset);
            number(&mut step, *length);
            self.length += length;
        }
        self.write(&step);
    }

    /// Takes `name` out of `parent`, as something else comes to `path`, where it was.
    pub(super) fn replaced(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &OsStr,
        path: &[u8],
    ) -> io::Result<()> {
        self.kept.take(parent, name, path, self.steps)
    }

    fn flush(&mut self) {
        if self.bytes.is_empty() {
            return;
        }
        let mut head = vec![BYTES];
        number(&mut head, self.bytes.len() as u64);
        self.write(&head);
        let bytes = std::mem::take(&mut self.bytes);
        self.write(&bytes);
        self.bytes = bytes;
        self.bytes.clear();
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.failed.is_none() {
            self.failed = self.out.write_all(bytes).err();
        }
    }

    /// All of the archive was seen.
    pub(super) fn finish(mut self) -> io::Result<Kept> {
        self.flush();
        let mut end = vec![END];
        number(&mut end, self.length);
        self.write(&end);
        match self.failed {
            Some(error) => Err(error),
            None => {
                self.out.finish()?.flush()?;
                Ok(self.kept)
            }
        }
    }
}

/// What of a layer is elsewhere than its archive put it.
#[derive(Debug)]
pub struct Kept {
    directory: OwnedFd,
    next: u64,
    moves: Vec<Move>,
}

impl Kept {
    /// Takes `name` out of `parent`: it was at `path` when the archive had come to content `before`.
    pub(super) fn take(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &OsStr,
        path: &[u8],
        before: u64,
    ) -> io::Result<()> {
        let number = self.next;
        self.next += 1;
        rustix::fs::renameat(parent, name, &self.directory, number.to_string())?;
        self.moves.push(Move { before, from: path.to_owned(), to: Place::Kept(number) });
        Ok(())
    }

    /// All that is below `from` was moved to `to`, in the layer.
    pub(super) fn moved(&mut self, from: &Path, to: &Path) {
        let bytes = |path: &Path| path.as_os_str().as_bytes().to_owned();
        self.moves.push(Move { before: u64::MAX, from: bytes(from), to: Place::Layer(bytes(to)) });
    }

    /// The same as [`Kept::take`] for what was there when the whole archive was unpacked.
    pub(super) fn lost(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &OsStr,
        path: &Path,
    ) -> io::Result<()> {
        self.take(parent, name, path.as_os_str().as_bytes(), u64::MAX)
    }

    /// Writes down what was moved.
    pub(super) fn finish(self) -> io::Result<()> {
        if self.moves.is_empty() {
            return Ok(());
        }
        let mut out = Vec::new();
        for Move { before, from, to } in &self.moves {
            number(&mut out, *before);
            text(&mut out, from);
            match to {
                Place::Kept(kept) => {
                    number(&mut out, 1);
                    number(&mut out, *kept);
                }
                Place::Layer(path) => {
                    number(&mut out, 0);
                    text(&mut out, path);
                }
            }
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = rustix::fs::openat(&self.directory, "moves", flags, mode)?;
        File::from(file).write_all(&out)
    }
}

fn number(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn text(out: &mut Vec<u8>, text: &[u8]) {
    number(out, text.len() as u64);
    out.extend_from_slice(text);
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the layer's recipe is damaged: {what}"))
}

fn read_number(source: &mut impl Read) -> io::Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let mut byte = [0];
        source.read_exact(&mut byte)?;
        value |= u64::from(byte[0] & 0x7f) << shift;
        if byte[0] & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(damaged("a number has no end"))
}

fn read_text(source: &mut impl Read) -> io::Result<Vec<u8>> {
    let length = read_number(source)?;
    if length > MAX_PATH {
        return Err(damaged("a path is too long"));
    }
    let mut text = vec![0; length as usize];
    source.read_exact(&mut text)?;
    Ok(text)
}

fn read_moves(mut text: &[u8]) -> io::Result<Vec<Move>> {
    let source = &mut text;
    let mut moves = Vec::new();
    while !source.is_empty() {
        let before = read_number(source)?;
        let from = read_text(source)?;
        let to = match read_number(source)? {
            0 => Place::Layer(read_text(source)?),
            1 => Place::Kept(read_number(source)?),
            _ => return Err(damaged("a file is at an unknown place")),
        };
        moves.push(Move { before, from, to });
    }
    Ok(moves)
}

/// Where a layer's content is.
pub enum Content {
    /// In files below this directory.
    Directory(OwnedFd),
    /// At places of this file.
    Image(File),
}

/// A layer's uncompressed archive, made again as it is read. An end of file means that all of it was
/// given and has the layer's diff id.
pub struct Rebuilt {
    layer: Content,
    recipe: OwnedFd,
    steps: zstd::stream::read::Decoder<'static, BufReader<File>>,
    moves: Vec<Move>,
    /// Content steps so far.
    index: u64,
    now: Now,
    length: u64,
    hash: Sha256,
    want: Digest,
}

/// What is given next.
enum Now {
    Step,
    Bytes(u64),
    /// A file, and pieces of it, the first of which comes last.
    Content(File, Vec<(u64, u64)>),
    End,
}

impl Rebuilt {
    /// Of the layer whose content is `layer`, by the recipe in the directory `recipe`.
    pub fn open(layer: Content, recipe: &Path, want: &Digest) -> Result<Self, Error> {
        let error = |path: &Path, source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => Error::None(want.clone()),
            _ => Error::Read { layer: want.clone(), path: path.to_owned(), source },
        };
        let directory = open_root(recipe).map_err(|e| error(recipe, e))?;
        let path = recipe.join("steps");
        let open = || -> io::Result<_> {
            let file = BufReader::with_capacity(STEP, File::open(&path)?);
            let mut steps = zstd::stream::read::Decoder::with_buffer(file)?;
            let mut magic = [0; MAGIC.len()];
            steps.read_exact(&mut magic)?;
            if magic != *MAGIC {
                return Err(damaged("it is of a version that is not known here"));
            }
            Ok(steps)
        };
        let steps = open().map_err(|e| error(&path, e))?;
        let path = recipe.join("moves");
        let moves = match std::fs::read(&path) {
            Ok(text) => read_moves(&text).map_err(|e| error(&path, e))?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(error(&path, e)),
        };
        Ok(Self {
            layer,
            recipe: directory,
            steps,
            moves,
            index: 0,
            now: Now::Step,
            length: 0,
            hash: Sha256::new(),
            want: want.clone(),
        })
    }

    fn step(&mut self) -> io::Result<Now> {
        let mut kind = [0];
        self.steps.read_exact(&mut kind)?;
        match kind[0] {
            BYTES => Ok(Now::Bytes(read_number(&mut self.steps)?)),
            CONTENT => {
                let path = read_text(&mut self.steps)?;
                let pieces = self.pieces()?;
                let file = self.file(path)?;
                self.index += 1;
                Ok(Now::Content(file, pieces))
            }
            IMAGE => {
                let pieces = self.pieces()?;
                match &self.layer {
                    Content::Image(file) => Ok(Now::Content(file.try_clone()?, pieces)),
                    Content::Directory(_) => Err(damaged("it is of a layer of another kind")),
                }
            }
            END => {
                let length = read_number(&mut self.steps)?;
                let got = Digest::from_sha256(std::mem::take(&mut self.hash).finalize().into());
                if length != self.length || got != self.want {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!(
                            "the layer's files were changed: its archive is now {got} and should be {}; \
                             remove and pull its images again",
                            self.want
                        ),
                    ));
                }
                Ok(Now::End)
            }
            _ => Err(damaged("a step is of an unknown kind")),
        }
    }

    fn pieces(&mut self) -> io::Result<Vec<(u64, u64)>> {
        let count = read_number(&mut self.steps)?;
        if count > MAX_PIECES {
            return Err(damaged("a file has too many pieces"));
        }
        let mut pieces = Vec::with_capacity(count as usize);
        for _ in 0..count {
            pieces.push((read_number(&mut self.steps)?, read_number(&mut self.steps)?));
        }
        pieces.reverse();
        Ok(pieces)
    }

    /// Opens what the archive had at `path` when it came to content `index`.
    fn file(&self, mut path: Vec<u8>) -> io::Result<File> {
        let mut kept = None;
        for Move { before, from, to } in &self.moves {
            if self.index >= *before || kept.is_some() {
                continue;
            }
            let rest = match path.strip_prefix(from.as_slice()) {
                Some(rest) if rest.is_empty() || rest[0] == b'/' => rest.to_owned(),
                _ => continue,
            };
            path = match to {
                Place::Layer(to) => [to.as_slice(), &rest].concat(),
                Place::Kept(number) => {
                    kept = Some(());
                    [number.to_string().as_bytes(), &rest].concat()
                }
            };
        }
        let root = match (&self.layer, kept) {
            (_, Some(())) => &self.recipe,
            (Content::Directory(root), None) => root,
            (Content::Image(_), None) => return Err(damaged("it is of a layer of another kind")),
        };
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let named = |e: io::Error| {
            io::Error::new(e.kind(), format!("{}: {e}", String::from_utf8_lossy(&path)))
        };
        let file =
            rustix::fs::openat2(root, OsStr::from_bytes(&path), flags, Mode::empty(), resolve)
                .map_err(|e| named(e.into()))?;
        let stat = rustix::fs::fstat(file.as_fd())?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(named(io::Error::other("not a regular file any more")));
        }
        Ok(file.into())
    }
}

impl Read for Rebuilt {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        loop {
            let length = match &mut self.now {
                Now::End => return Ok(0),
                Now::Step => {
                    self.now = self.step()?;
                    continue;
                }
                Now::Bytes(0) => {
                    self.now = Now::Step;
                    continue;
                }
                Now::Bytes(left) => {
                    let most = usize::try_from(*left).unwrap_or(usize::MAX).min(out.len());
                    let length = self.steps.read(&mut out[..most])?;
                    if length == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    *left -= length as u64;
                    length
                }
                Now::Content(file, pieces) => match pieces.last_mut() {
                    None => {
                        self.now = Now::Step;
                        continue;
                    }
                    Some((_, 0)) => {
                        pieces.pop();
                        continue;
                    }
                    Some((offset, left)) => {
                        let most = usize::try_from(*left).unwrap_or(usize::MAX).min(out.len());
                        let length = file.read_at(&mut out[..most], *offset)?;
                        if length == 0 {
                            return Err(io::Error::new(
                                io::ErrorKind::UnexpectedEof,
                                "a file of the layer is shorter than its archive has it",
                            ));
                        }
                        *offset += length as u64;
                        *left -= length as u64;
                        length
                    }
                },
            };
            self.length += length as u64;
            self.hash.update(&out[..length]);
            return Ok(length);
        }
    }
}

#[cfg(test)]
#[path = "recipe_tests.rs"]
mod tests;

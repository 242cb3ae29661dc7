//! The bytes of one layer on their way from a source to `unpack`, in one pass:
//! compressed → size and SHA-256 → inflate → bound and SHA-256 (diff id) → tar → files. What runs at
//! the same time as what is the business of `pipeline`.

use std::{
    io::{self, BufRead, Read, Write as _},
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    },
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use sha2::{Digest as _, Sha256};

use super::{
    pipeline,
    recipe::Recorder,
    unpack::{self, Unpacked},
};
use crate::{config::LayerFormat, id::Digest};

/// Largest window of a zstd frame, as a power of two: what the zstd tool accepts by default.
const ZSTD_WINDOW_LOG: u32 = 27;

/// Windows above this are decoded one at a time: the memory of a pull is bounded whatever the image.
const LARGE_WINDOW: u64 = 8 << 20;

/// Held while such a frame is decoded.
static ALONE: Mutex<()> = Mutex::new(());

/// Why a layer did not become a directory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The archive in it.
    #[error(transparent)]
    Unpack(#[from] unpack::Error),
    /// The directory for it cannot be made or opened.
    #[error("make a directory for the layer")]
    Directory(#[source] io::Error),
    /// The compressed bytes are not those that the manifest names.
    #[error("the layer's content is {got}, its manifest says {want}")]
    Content {
        /// What came.
        got: Digest,
        /// What should have.
        want: Digest,
    },
    /// The uncompressed bytes are not those that the image's config names.
    #[error("the layer's uncompressed content is {got}, its image says {want}")]
    DiffId {
        /// What came.
        got: Digest,
        /// What should have.
        want: Digest,
    },
    /// There is more or less of it than the manifest says.
    #[error("the layer has {got} bytes, its manifest says {want}")]
    Size {
        /// What came, as far as it was read.
        got: u64,
        /// What should have.
        want: u64,
    },
    /// More than the configuration allows.
    #[error("the layer unpacks to more than {limit} bytes (images.max_layer_size)")]
    TooLarge {
        /// The limit.
        limit: u64,
    },
}

/// What a layer must turn out to be.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Digest and size of the compressed bytes; a docker-archive does not say.
    pub content: Option<(Digest, u64)>,
    /// Digest of the uncompressed bytes.
    pub diff_id: Digest,
    /// Most uncompressed bytes.
    pub limit: u64,
    /// What it is to become.
    pub format: LayerFormat,
    /// It is no archive but a file, which gets this name.
    pub file: Option<String>,
}

/// Unpacks the layer that `source` yields into the new directory or image `path`, and its recipe into the new
/// directory `recipe`. Blocks. On an error the directories may be there: the caller removes them.
///
/// `give_up` is called when unpacking has failed: a source that waits must end then.
pub fn unpack_layer(
    source: impl BufRead + Send,
    expected: &Expected,
    path: &Path,
    recipe: &Path,
    give_up: impl FnOnce(),
) -> Result<Unpacked, Error> {
    if let Some(name) = &expected.file {
        let done = place_file(source, expected, path, recipe, name);
        if done.is_err() {
            give_up();
        }
        return done;
    }
    let root = match expected.format {
        LayerFormat::Directories => {
            std::fs::create_dir(path).map_err(Error::Directory)?;
            Some(unpack::open_root(path).map_err(Error::Directory)?)
        }
        LayerFormat::Erofs => None,
    };
    let recorder = Recorder::create(recipe).map_err(Error::Directory)?;

    let mut content = Hashed::new(source, expected.content.as_ref().map(|(_, size)| *size));
    let passed = pipeline::pass(
        || inflate(&mut content),
        expected.limit,
        |plain| match &root {
            Some(root) => unpack::unpack(plain, root.as_fd(), Some(recorder)),
            None => unpack::unpack_image(plain, path, Some(recorder)),
        },
        |unpacked| {
            if unpacked.is_err() {
                give_up();
            }
        },
    );

    // A size or a limit that was passed explains whatever the reader made of it.
    if let Some((_, want)) = &expected.content
        && content.length > *want
    {
        return Err(Error::Size { got: content.length, want: *want });
    }
    if passed.too_large {
        return Err(Error::TooLarge { limit: expected.limit });
    }
    let unpacked = passed.result?;
    // Decoders stop at their own end; the digest covers all.
    io::copy(&mut content, &mut io::sink()).map_err(source_error)?;
    if let Some((want, size)) = &expected.content {
        if content.length != *size {
            return Err(Error::Size { got: content.length, want: *size });
        }
        let got = Digest::from_sha256(content.hash.finalize().into());
        if got != *want {
            return Err(Error::Content { got, want: want.clone() });
        }
    }
    let got = Digest::from_sha256(passed.hash);
    if got != expected.diff_id {
        return Err(Error::DiffId { got, want: expected.diff_id.clone() });
    }
    Ok(unpacked)
}

/// Makes the new directory `path` with the file `name`, which is what `source` yields.
fn place_file(
    source: impl BufRead,
    expected: &Expected,
    path: &Path,
    recipe: &Path,
    name: &str,
) -> Result<Unpacked, Error> {
    let write = |source| unpack::Error::Write { path: name.to_owned(), source };
    std::fs::create_dir(path).map_err(Error::Directory)?;
    let mut recorder = Recorder::create(recipe).map_err(Error::Directory)?;
    // Names are relative and have no "..": see `manifest::file_names`.
    let target = path.join(name);
    let parents = target.parent().expect("it is below the layer");
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(parents).map_err(write)?;
    let options = &mut std::fs::OpenOptions::new();
    let options = options.write(true).create_new(true).mode(0o644);
    let mut file = options.open(&target).map_err(write)?;

    let limit = expected.content.as_ref().map_or(expected.limit, |(_, size)| *size);
    if limit > expected.limit {
        return Err(Error::TooLarge { limit: expected.limit });
    }
    let mut content = Hashed::new(source, Some(limit));
    loop {
        let piece = content.fill_buf().map_err(source_error)?;
        if piece.is_empty() {
            break;
        }
        let length = piece.len();
        file.write_all(piece).map_err(write)?;
        content.consume(length);
    }
    let size = content.length;
    if let Some((_, want)) = &expected.content
        && size != *want
    {
        return Err(Error::Size { got: size, want: *want });
    }
    let got = Digest::from_sha256(content.hash.finalize().into());
    if got != expected.diff_id {
        return Err(Error::Content { got, want: expected.diff_id.clone() });
    }
    if size >= unpack::WRITE_BACK {
        unpack::write_back(&file);
    }
    recorder.content(name.as_bytes(), &[(0, size)]);
    let kept = recorder.finish().map_err(write)?;
    Ok(Unpacked {
        bytes: size.next_multiple_of(4096),
        inodes: name.split('/').count() as u64,
        kept: Some(kept),
        file: Some(name.to_owned()),
        ..Unpacked::default()
    })
}

fn source_error(error: io::Error) -> Error {
    unpack::Error::from(super::tar::Error::Source(error)).into()
}

/// By what the bytes are, not by what the manifest calls them: registries have wrong media types.
/// No tar archive begins with either magic number, as an entry's name comes first and its checksum
/// would have to fit.
pub fn inflate<'a>(mut source: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut head = [0; ZSTD_HEAD];
    let mut length = 0;
    while length < head.len() {
        match source.read(&mut head[length..]) {
            Ok(0) => break,
            Ok(n) => length += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    // From the source's own buffer: nothing is copied on the way to the decoder.
    let rest = io::Cursor::new(head).take(length as u64).chain(source);
    Ok(match head[..4] {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(rest)),
        // A frame, or a frame to be skipped.
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => {
            let alone = (window(&head) > LARGE_WINDOW)
                .then(|| ALONE.lock().unwrap_or_else(PoisonError::into_inner));
            let mut decoder = zstd::stream::read::Decoder::with_buffer(rest)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Box::new(Zstd { decoder, _alone: alone })
        }
        _ => Box::new(rest),
    })
}

/// Bytes of a zstd frame that tell its window.
const ZSTD_HEAD: usize = 14;

/// The window of the frame that begins with `head`, in bytes (RFC 8878, section 3.1.1.1); 0 for a frame
/// that is to be skipped.
fn window(head: &[u8; ZSTD_HEAD]) -> u64 {
    if head[..4] != [0x28, 0xb5, 0x2f, 0xfd] {
        return 0;
    }
    let (flags, rest) = (head[4], &head[5..]);
    let is_single_segment = flags & 0x20 != 0;
    if !is_single_segment {
        let base = 1u64 << (10 + (rest[0] >> 3));
        return base + base / 8 * u64::from(rest[0] & 7);
    }
    // The window is the content; its size comes after the id of a dictionary.
    let at = [0, 1, 2, 4][usize::from(flags & 3)];
    let size = |length: usize| {
        let bytes = &rest[at..(at + length).min(rest.len())];
        bytes.iter().rev().fold(0, |size, byte| size << 8 | u64::from(*byte))
    };
    match flags >> 6 {
        0 => size(1),
        1 => size(2) + 256,
        2 => size(4),
        _ => size(8),
    }
}

/// A decoder, and the right to a large window if it needs one.
struct Zstd<D> {
    decoder: D,
    _alone: Option<MutexGuard<'static, ()>>,
}

impl<D: Read> Read for Zstd<D> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.decoder.read(out)
    }
}

/// Counts and hashes what passes.
struct Hashed<R> {
    source: R,
    hash: Sha256,
    length: u64,
    limit: Option<u64>,
}

impl<R> Hashed<R> {
    fn new(source: R, limit: Option<u64>) -> Self {
        Self { source, hash: Sha256::new(), length: 0, limit }
    }
}

impl<R: BufRead> BufRead for Hashed<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.limit.is_some_and(|limit| self.length > limit) {
            return Err(io::Error::other("more bytes than the manifest says"));
        }
        self.source.fill_buf()
    }

    fn consume(&mut self, length: usize) {
        if let Ok(buffer) = self.source.fill_buf() {
            self.hash.update(&buffer[..length]);
        }
        self.source.consume(length);
        self.length += length as u64;
    }
}

impl<R: BufRead> Read for Hashed<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        pipeline::read_buffered(self, out)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn head(bytes: &[u8]) -> [u8; ZSTD_HEAD] {
        let mut head = [0; ZSTD_HEAD];
        let length = bytes.len().min(ZSTD_HEAD);
        head[..length].copy_from_slice(&bytes[..length]);
        head
    }

    #[test]
    fn the_window_of_a_frame_is_known_from_its_head() {
        for log in [17, 20, 23, 24, 27] {
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
            encoder.window_log(log).unwrap();
            // More than fits: the size is not known when the head is written.
            encoder.write_all(&vec![7; 300_000]).unwrap();
            encoder.flush().unwrap();
            let frame = encoder.finish().unwrap();
            assert_eq!(window(&head(&frame)), 1 << log);
        }
        for size in [100, 10_000, 200_000] {
            // Known: one segment.
            let frame = zstd::bulk::compress(&vec![7; size], 3).unwrap();
            assert_eq!(window(&head(&frame)), size as u64);
        }
        assert_eq!(window(&head(b"\x50\x2a\x4d\x18\xff\xff\xff\xff")), 0);
        assert_eq!(window(&[0xff; ZSTD_HEAD]), 0);
    }

    #[test]
    fn short_and_plain_content_passes_as_it_is() {
        for content in [&b""[..], b"a", b"\x1f", b"no archive, but more than a head of it"] {
            let mut read = Vec::new();
            inflate(content).unwrap().read_to_end(&mut read).unwrap();
            assert_eq!(read, content);
        }
    }
}

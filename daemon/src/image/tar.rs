//! Reading a tar stream: headers and data, in the order of the archive. What becomes of an entry is
//! `unpack`'s business.
//!
//! Understood: ustar, old GNU and v7 headers, PAX records (local and global), GNU long names and
//! links, base-256 numbers, both signs of checksum, GNU sparse files (old format and PAX 0.0, 0.1
//! and 1.0), extended attributes as `SCHILY.xattr.*`. Sources: POSIX.1-2017 pax(1), the GNU tar
//! manual ("Basic Tar Format", "Storing Sparse Files"), image-spec layer.md.

use std::{
    collections::BTreeMap,
    io::{self, BufRead},
};

use super::recipe::Recorder;

/// Size of a header and the unit that data is padded to, in bytes.
const BLOCK: usize = 512;

/// Largest PAX header or GNU long name, in bytes. Room for some attributes of 64 KiB each.
const MAX_EXTENSION: u64 = 1 << 20;

/// Most pieces of one sparse file.
const MAX_PIECES: usize = 1 << 16;

/// Why a tar stream cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What supplies the stream (network, inflate) ended with an error.
    #[error("read layer")]
    Source(#[from] io::Error),
    /// The stream ends inside an entry.
    #[error("the archive ends in the middle of an entry")]
    Truncated,
    /// A header that no tar writes.
    #[error("the archive is not valid at byte {at}: {what}")]
    Invalid {
        /// Offset of the header in the uncompressed stream.
        at: u64,
        /// Which rule it breaks.
        what: &'static str,
    },
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file; its data follows.
    File,
    /// Another name of an earlier entry.
    HardLink(Vec<u8>),
    /// A symbolic link and what it says.
    Symlink(Vec<u8>),
    /// A character device: major, minor.
    Char(u32, u32),
    /// A block device: major, minor.
    Block(u32, u32),
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// A time, as `timespec` has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    /// Seconds since 1970; may be negative.
    pub seconds: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The path as the archive has it, not checked.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Time,
    /// Bytes of data in the archive.
    pub size: u64,
    /// Extended attributes by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the data goes, if the file has holes.
    pub sparse: Option<Sparse>,
}

/// A file with holes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sparse {
    /// Size of the file, in bytes.
    pub size: u64,
    /// Offset and length of each piece of data, ascending.
    pub pieces: Vec<(u64, u64)>,
}

/// A tar stream.
pub struct Archive<R> {
    source: R,
    /// Bytes read so far.
    at: u64,
    /// Data of the current entry that was not read yet.
    left: u64,
    /// Padding behind it.
    padding: u64,
    globals: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Gets all bytes that are not an entry's data.
    recorder: Option<Recorder>,
}

impl<R: BufRead> Archive<R> {
    /// Reads from `source`, which should be buffered well: data is copied out of its buffer.
    pub fn new(source: R) -> Self {
        Self { source, at: 0, left: 0, padding: 0, globals: BTreeMap::new(), recorder: None }
    }

    /// The same; all but the data that [`Archive::data`] gives goes to `recorder` as well.
    pub fn recorded(source: R, recorder: Recorder) -> Self {
        Self { recorder: Some(recorder), ..Self::new(source) }
    }

    /// Who writes down what is read.
    pub(super) fn recorder(&mut self) -> Option<&mut Recorder> {
        self.recorder.as_mut()
    }

    /// The next entry, or `None` at the end of the archive. Data that is left of the current one
    /// is skipped.
    pub fn entry(&mut self) -> Result<Option<Entry>, Error> {
        let mut extended: Option<Pax> = None;
        let mut long_path = None;
        let mut long_link = None;
        loop {
            self.skip(self.left + self.padding)?;
            (self.left, self.padding) = (0, 0);
            let at = self.at;
            let invalid = |what| Error::Invalid { at, what };
            let mut header = [0; BLOCK];
            if !self.read_header(&mut header)? {
                if extended.is_some() || long_path.is_some() || long_link.is_some() {
                    return Err(Error::Truncated);
                }
                return Ok(None);
            }
            let header = Header(&header);
            if !header.checksum_is_right() {
                return Err(invalid("the checksum of the header is wrong"));
            }
            let size = header.number(124, 12).filter(|n| *n >= 0).ok_or(invalid("size"))? as u64;
            match header.0[156] {
                b'x' | b'g' => {
                    let data = self.extension(size, invalid)?;
                    let pax = Pax::parse(&data).ok_or(invalid("a PAX record is not valid"))?;
                    if header.0[156] == b'g' {
                        self.globals.extend(pax.records);
                    } else {
                        extended = Some(pax);
                    }
                }
                b'L' => long_path = Some(until_nul(&self.extension(size, invalid)?).to_vec()),
                b'K' => long_link = Some(until_nul(&self.extension(size, invalid)?).to_vec()),
                // A volume's label: no file.
                b'V' => self.begin(size),
                _ => {
                    let pax = extended.unwrap_or_default();
                    return self.describe(&header, size, &pax, long_path, long_link, at).map(Some);
                }
            }
        }
    }

    /// Up to `data.len()` bytes of the current entry's data, in the source's own buffer: `use_data`
    /// gets them and returns an error of its own kind, or the number of bytes it took.
    /// Returns false when no data is left.
    pub fn data<E: From<Error>>(
        &mut self,
        limit: u64,
        use_data: impl FnOnce(&[u8]) -> Result<usize, E>,
    ) -> Result<bool, E> {
        let wanted = self.left.min(limit);
        if wanted == 0 {
            return Ok(false);
        }
        let buffer = self.source.fill_buf().map_err(Error::Source)?;
        if buffer.is_empty() {
            return Err(Error::Truncated.into());
        }
        let length = buffer.len().min(usize::try_from(wanted).unwrap_or(usize::MAX));
        let used = use_data(&buffer[..length])?;
        self.source.consume(used);
        self.at += used as u64;
        self.left -= used as u64;
        Ok(true)
    }

    /// Reads what follows the archive to its end, as the digest covers that too. Gives back what the
    /// reader was made of.
    pub fn finish(mut self) -> Result<(R, Option<Recorder>), Error> {
        loop {
            let length = self.source.fill_buf()?.len();
            if length == 0 {
                return Ok((self.source, self.recorder));
            }
            self.consume(length);
        }
    }

    /// Passes bytes that are in the source's buffer.
    fn consume(&mut self, length: usize) {
        if let Some(recorder) = &mut self.recorder
            && let Ok(buffer) = self.source.fill_buf()
        {
            recorder.bytes(&buffer[..length]);
        }
        self.source.consume(length);
        self.at += length as u64;
    }

    /// Fills `header`; false at the end of the archive: two blocks of zeros, or (as GNU tar and
    /// others accept) one at the very end, or the end of the stream where a header may begin.
    fn read_header(&mut self, header: &mut [u8; BLOCK]) -> Result<bool, Error> {
        for _ in 0..2 {
            match self.read_block(header)? {
                0 => return Ok(false),
                BLOCK => {}
                _ => return Err(Error::Truncated),
            }
            if header.iter().any(|b| *b != 0) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Bytes read: fewer than a block at the end of the stream only.
    fn read_block(&mut self, block: &mut [u8]) -> Result<usize, Error> {
        let mut done = 0;
        while done < block.len() {
            let buffer = self.source.fill_buf()?;
            if buffer.is_empty() {
                break;
            }
            let length = buffer.len().min(block.len() - done);
            block[done..done + length].copy_from_slice(&buffer[..length]);
            self.consume(length);
            done += length;
        }
        Ok(done)
    }

    fn skip(&mut self, mut length: u64) -> Result<(), Error> {
        while length > 0 {
            let buffered = self.source.fill_buf()?.len();
            if buffered == 0 {
                return Err(Error::Truncated);
            }
            let step = length.min(buffered as u64);
            self.consume(step as usize);
            length -= step;
        }
        Ok(())
    }

    fn begin(&mut self, size: u64) {
        self.left = size;
        self.padding = padding(size);
    }

    fn extension(
        &mut self,
        size: u64,
        invalid: impl Fn(&'static str) -> Error,
    ) -> Result<Vec<u8>, Error> {
        if size > MAX_EXTENSION {
            return Err(invalid("an extended header is larger than 1 MiB"));
        }
        let mut data = vec![0; size as usize];
        if self.read_block(&mut data)? < data.len() {
            return Err(Error::Truncated);
        }
        self.skip(padding(size))?;
        Ok(data)
    }

    fn describe(
        &mut self,
        header: &Header<'_>,
        size: u64,
        pax: &Pax,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        at: u64,
    ) -> Result<Entry, Error> {
        let invalid = |what| Error::Invalid { at, what };
        // A local record wins over a global one; an empty value takes the record away.
        let record = |name: &str| {
            let value = match pax.records.get(name.as_bytes()) {
                Some(value) => Some(value),
                None => self.globals.get(name.as_bytes()),
            };
            value.filter(|v| !v.is_empty()).map(Vec::as_slice)
        };
        let decimal = |name: &str, what| match record(name) {
            None => Ok(None),
            Some(text) => digits(text).map(Some).ok_or(invalid(what)),
        };
        let id = |name: &str, offset| -> Result<u32, Error> {
            let value = match decimal(name, "owner")? {
                Some(value) => Some(value as i64),
                None => header.number(offset, 8),
            };
            value
                .and_then(|v| u32::try_from(v).ok())
                // The last one means "leave it" to chown(2).
                .filter(|v| *v != u32::MAX)
                .ok_or(invalid("an owner must be a number below 4294967295"))
        };
        let mut path = match (record("GNU.sparse.name").or(record("path")), long_path) {
            (Some(path), _) => path.to_vec(),
            (None, Some(path)) => path,
            (None, None) => header.path(),
        };
        let link = match (record("linkpath"), long_link) {
            (Some(link), _) => link.to_vec(),
            (None, Some(link)) => link,
            (None, None) => until_nul(&header.0[157..257]).to_vec(),
        };
        if path.contains(&0) || link.contains(&0) {
            return Err(invalid("a path has a NUL in it"));
        }
        let size = decimal("size", "size")?.unwrap_or(size);
        if size > i64::MAX as u64 / 2 {
            return Err(invalid("size"));
        }
        let mtime = match record("mtime") {
            Some(text) => Time::parse(text).ok_or(invalid("mtime"))?,
            None => Time { seconds: header.number(136, 12).ok_or(invalid("mtime"))?, nanos: 0 },
        };
        let device = || -> Result<(u32, u32), Error> {
            let part = |offset| {
                header
                    .number(offset, 8)
                    .and_then(|n| u32::try_from(n).ok())
                    .ok_or(invalid("device number"))
            };
            Ok((part(329)?, part(337)?))
        };
        let (kind, has_data) = match header.0[156] {
            // v7 marks a directory by a slash at the end of its name.
            b'0' | 0 if path.ends_with(b"/") && header.0[156] == 0 => (Kind::Directory, false),
            b'0' | 0 | b'7' | b'S' => (Kind::File, true),
            b'1' => (Kind::HardLink(link), false),
            b'2' => (Kind::Symlink(link), false),
            b'3' => device().map(|(a, b)| (Kind::Char(a, b), false))?,
            b'4' => device().map(|(a, b)| (Kind::Block(a, b), false))?,
            b'5' => (Kind::Directory, false),
            b'6' => (Kind::Fifo, false),
            _ => return Err(invalid("an entry of unknown type")),
        };
        let mode = header.number(100, 8).ok_or(invalid("mode"))? as u32 & 0o7777;
        let uid = id("uid", 108)?;
        let gid = id("gid", 116)?;
        let mut xattrs = Vec::new();
        for (name, value) in self.globals.iter().chain(&pax.records) {
            if let Some(name) = name.strip_prefix(b"SCHILY.xattr.") {
                if name.is_empty() || name.contains(&0) {
                    return Err(invalid("the name of an extended attribute"));
                }
                xattrs.retain(|(n, _)| n != name);
                xattrs.push((name.to_vec(), value.clone()));
            }
        }
        let sparse_1 = record("GNU.sparse.major") == Some(b"1");
        let pax_sparse =
            match (decimal("GNU.sparse.realsize", "sparse size")?, record("GNU.sparse.size")) {
                (Some(size), _) => Some(size),
                (None, Some(_)) => decimal("GNU.sparse.size", "sparse size")?,
                (None, None) => None,
            };
        let map = record("GNU.sparse.map").map(<[u8]>::to_vec);

        // Types without data may still give a size (hard links of some writers): what then
        // follows is a header, except for ordinary files.
        self.begin(if has_data { size } else { 0 });
        let sparse = if header.0[156] == b'S' {
            Some(self.old_sparse(header, at)?)
        } else if let Some(size) = pax_sparse {
            let pieces = if sparse_1 {
                self.sparse_map(at)?
            } else if let Some(map) = map {
                pairs(map.split(|b| *b == b',')).ok_or(invalid("sparse map"))?
            } else {
                pax.sparse.clone()
            };
            Some(Sparse { size, pieces })
        } else {
            None
        };
        if let Some(sparse) = &sparse {
            let mut end = 0u64;
            let mut sum = 0u64;
            for (offset, length) in &sparse.pieces {
                if *offset < end {
                    return Err(invalid("the pieces of a sparse file overlap"));
                }
                end = offset.checked_add(*length).ok_or(invalid("sparse map"))?;
                sum += length;
            }
            if end > sparse.size || sum != self.left || sparse.size > i64::MAX as u64 / 2 {
                return Err(invalid("the pieces of a sparse file do not fit its size"));
            }
        }
        if kind == Kind::Directory {
            while path.len() > 1 && path.ends_with(b"/") {
                path.pop();
            }
        }
        let size = self.left;
        Ok(Entry { path, kind, mode, uid, gid, mtime, size, xattrs, sparse })
    }

    /// The map of an old GNU sparse file: 4 pieces in the header, 21 in each block that follows.
    fn old_sparse(&mut self, header: &Header<'_>, at: u64) -> Result<Sparse, Error> {
        let invalid = || Error::Invalid { at, what: "sparse map" };
        let unsigned = |n: Option<i64>| n.and_then(|n| u64::try_from(n).ok()).ok_or_else(invalid);
        let mut pieces = Vec::new();
        let mut read = |block: &Header<'_>, offset: usize, count: usize| -> Result<(), Error> {
            for index in 0..count {
                let offset = offset + index * 24;
                if block.0[offset] == 0 {
                    break;
                }
                pieces.push((
                    unsigned(block.number(offset, 12))?,
                    unsigned(block.number(offset + 12, 12))?,
                ));
            }
            if pieces.len() > MAX_PIECES { Err(invalid()) } else { Ok(()) }
        };
        read(header, 386, 4)?;
        let mut more = header.0[482] != 0;
        while more {
            let mut block = [0; BLOCK];
            if self.read_block(&mut block)? < BLOCK {
                return Err(Error::Truncated);
            }
            read(&Header(&block), 0, 21)?;
            more = block[504] != 0;
        }
        Ok(Sparse { size: unsigned(header.number(483, 12))?, pieces })
    }

    /// The map of a PAX 1.0 sparse file: decimal numbers, one a line, at the head of the data.
    fn sparse_map(&mut self, at: u64) -> Result<Vec<(u64, u64)>, Error> {
        let invalid = || Error::Invalid { at, what: "sparse map" };
        let mut text = Vec::new();
        let mut wanted = None;
        loop {
            if self.left < BLOCK as u64 || text.len() > MAX_PIECES * 42 {
                return Err(invalid());
            }
            let start = text.len();
            text.resize(start + BLOCK, 0);
            if self.read_block(&mut text[start..])? < BLOCK {
                return Err(Error::Truncated);
            }
            self.left -= BLOCK as u64;
            let lines = text.iter().filter(|b| **b == b'\n').count();
            if wanted.is_none() && lines > 0 {
                let first = text.split(|b| *b == b'\n').next().unwrap_or_default();
                let count =
                    digits(first).filter(|n| *n <= MAX_PIECES as u64).ok_or_else(invalid)?;
                wanted = Some(count as usize);
            }
            if let Some(count) = wanted
                && lines > count * 2
            {
                let numbers = text.split(|b| *b == b'\n').skip(1).take(count * 2);
                return pairs(numbers).ok_or_else(invalid);
            }
        }
    }
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn until_nul(text: &[u8]) -> &[u8] {
    text.split(|b| *b == 0).next().unwrap_or_default()
}

/// An unsigned decimal number.
fn digits(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok().filter(|n| *n <= i64::MAX as u64)
}

fn pairs<'a>(numbers: impl Iterator<Item = &'a [u8]>) -> Option<Vec<(u64, u64)>> {
    let numbers: Vec<u64> = numbers.map(digits).collect::<Option<_>>()?;
    if !numbers.len().is_multiple_of(2) || numbers.len() > MAX_PIECES * 2 {
        return None;
    }
    Some(numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

impl Time {
    /// PAX: an optional sign, seconds, and a fraction of any length (cut at nanoseconds).
    fn parse(text: &[u8]) -> Option<Self> {
        let (negative, text) = match text.strip_prefix(b"-") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let mut parts = text.splitn(2, |b| *b == b'.');
        let seconds = digits(parts.next()?)? as i64;
        let mut nanos = 0;
        if let Some(fraction) = parts.next() {
            if !fraction.iter().all(u8::is_ascii_digit) {
                return None;
            }
            for index in 0..9 {
                nanos = nanos * 10 + u32::from(fraction.get(index).map_or(0, |b| b - b'0'));
            }
        }
        Some(match (negative, nanos) {
            (false, nanos) => Self { seconds, nanos },
            (true, 0) => Self { seconds: -seconds, nanos: 0 },
            // -1.25 s is -2 s and 0.75 s.
            (true, nanos) => Self { seconds: -seconds - 1, nanos: 1_000_000_000 - nanos },
        })
    }
}

/// A header block.
struct Header<'a>(&'a [u8; BLOCK]);

impl Header<'_> {
    fn checksum_is_right(&self) -> bool {
        let Some(want) = self.number(148, 8) else { return false };
        let byte = |(index, byte): (usize, &u8)| {
            if (148..156).contains(&index) { b' ' } else { *byte }
        };
        let unsigned: i64 = self.0.iter().enumerate().map(|b| i64::from(byte(b))).sum();
        // Old writers summed signed characters.
        let signed: i64 = self.0.iter().enumerate().map(|b| i64::from(byte(b) as i8)).sum();
        want == unsigned || want == signed
    }

    /// A number field: octal digits amid spaces and NULs, or base-256 if the first bit is set.
    fn number(&self, offset: usize, length: usize) -> Option<i64> {
        let field = &self.0[offset..offset + length];
        if field[0] & 0x80 != 0 {
            // Two's complement without the marking bit; bit 6 is the sign.
            let mut value: i128 = if field[0] & 0x40 != 0 { -1 } else { 0 };
            for (index, byte) in field.iter().enumerate() {
                let byte = if index == 0 {
                    byte & 0x7f | (if value < 0 { 0x80 } else { 0 })
                } else {
                    *byte
                };
                value = (value << 8) | i128::from(byte);
            }
            return i64::try_from(value).ok();
        }
        let is_blank = |b: &u8| *b == b' ' || *b == 0;
        let start = field.iter().position(|b| !is_blank(b)).unwrap_or(field.len());
        let digits = &field[start..];
        let end = digits.iter().position(is_blank).unwrap_or(digits.len());
        let mut value: i64 = 0;
        for digit in &digits[..end] {
            if !(b'0'..=b'7').contains(digit) {
                return None;
            }
            value = value.checked_mul(8)? + i64::from(digit - b'0');
        }
        Some(value)
    }

    fn path(&self) -> Vec<u8> {
        let name = until_nul(&self.0[..100]);
        let prefix = until_nul(&self.0[345..500]);
        // Old GNU headers ("ustar  ") have times where ustar ("ustar\0") has the prefix.
        if &self.0[257..263] == b"ustar\0" && !prefix.is_empty() {
            [prefix, b"/", name].concat()
        } else {
            name.to_vec()
        }
    }
}

/// The records of one PAX header.
#[derive(Default)]
struct Pax {
    records: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The repeated records of a PAX 0.0 sparse file.
    sparse: Vec<(u64, u64)>,
}

impl Pax {
    /// `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record.
    fn parse(mut data: &[u8]) -> Option<Self> {
        let mut pax = Self::default();
        let mut offset = None;
        // Some writers pad with NULs.
        while !data.is_empty() && data[0] != 0 {
            let space = data.iter().take(8).position(|b| *b == b' ')?;
            let length = usize::try_from(digits(&data[..space])?).ok()?;
            if length <= space + 1 || length > data.len() {
                return None;
            }
            let record = data[space + 1..length].strip_suffix(b"\n")?;
            let equals = record.iter().position(|b| *b == b'=')?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"GNU.sparse.offset" => offset = Some(digits(value)?),
                b"GNU.sparse.numbytes" => {
                    if pax.sparse.len() >= MAX_PIECES {
                        return None;
                    }
                    pax.sparse.push((offset.take()?, digits(value)?));
                }
                _ => {
                    pax.records.insert(key.to_vec(), value.to_vec());
                }
            }
            data = &data[length..];
        }
        Some(pax)
    }
}

//! Writing tar archives: ustar, with PAX records (POSIX.1-2008, pax "Extended Format") where ustar
//! has no room. The same entries give the same bytes.

use std::io::{self, Read, Write};

pub use super::tar::Kind;

const BLOCK: usize = 512;

/// An entry, as the archive has it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Relative, as raw bytes; a directory's without a slash at its end.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permissions with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Owner.
    pub gid: u32,
    /// Seconds since 1970, and nanoseconds.
    pub mtime: (i64, u32),
    /// Bytes of content, for a file.
    pub size: u64,
    /// Extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Entry {
    /// A file that root owns, of no date.
    pub fn file(path: &str, size: u64) -> Self {
        Self {
            path: path.into(),
            kind: Kind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            size,
            xattrs: Vec::new(),
        }
    }
}

/// An archive that is being written.
pub struct Tarball<W> {
    out: W,
}

impl<W: Write> Tarball<W> {
    /// Writes to `out`, which should be buffered.
    pub fn new(out: W) -> Self {
        Self { out }
    }

    /// An entry with its content: exactly `entry.size` bytes of `content`, none if it is no file.
    pub fn append(&mut self, entry: &Entry, content: &mut dyn Read) -> io::Result<()> {
        self.header(entry)?;
        if entry.kind != Kind::File {
            return Ok(());
        }
        let copied = io::copy(&mut content.take(entry.size), &mut self.out)?;
        if copied != entry.size {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!(
                    "{} became shorter while it was read",
                    String::from_utf8_lossy(&entry.path)
                ),
            ));
        }
        self.pad(entry.size)
    }

    /// A small file.
    pub fn text(&mut self, path: &str, content: &[u8]) -> io::Result<()> {
        self.append(&Entry::file(path, content.len() as u64), &mut &*content)
    }

    /// The end of the archive; what it was written to.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn pad(&mut self, size: u64) -> io::Result<()> {
        let rest = (size % BLOCK as u64) as usize;
        if rest > 0 {
            self.out.write_all(&[0; BLOCK][rest..])?;
        }
        Ok(())
    }

    fn header(&mut self, entry: &Entry) -> io::Result<()> {
        let mut path = entry.path.clone();
        if entry.kind == Kind::Directory {
            path.push(b'/');
        }
        let (kind, link, device) = match &entry.kind {
            Kind::File => (b'0', &[][..], (0, 0)),
            Kind::HardLink(to) => (b'1', to.as_slice(), (0, 0)),
            Kind::Symlink(to) => (b'2', to.as_slice(), (0, 0)),
            Kind::Char(major, minor) => (b'3', &[][..], (*major, *minor)),
            Kind::Block(major, minor) => (b'4', &[][..], (*major, *minor)),
            Kind::Directory => (b'5', &[][..], (0, 0)),
            Kind::Fifo => (b'6', &[][..], (0, 0)),
        };
        let size = if entry.kind == Kind::File { entry.size } else { 0 };
        let mut records = Vec::new();
        // What ustar has no room for; readers take the record and not the field.
        if path.len() > 100 {
            record(&mut records, b"path", &path);
        }
        if link.len() > 100 {
            record(&mut records, b"linkpath", link);
        }
        for (name, value, most) in [
            (&b"size"[..], size, 0o77_777_777_777),
            (b"uid", entry.uid.into(), 0o7_777_777),
            (b"gid", entry.gid.into(), 0o7_777_777),
        ] {
            if value > most {
                record(&mut records, name, value.to_string().as_bytes());
            }
        }
        let (seconds, nanos) = entry.mtime;
        if nanos != 0 || !(0..=0o77_777_777_777).contains(&seconds) {
            record(&mut records, b"mtime", decimal(seconds, nanos).as_bytes());
        }
        for (name, value) in &entry.xattrs {
            record(&mut records, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
        }
        if !records.is_empty() {
            let head = Fields {
                path: b"pax_header",
                kind: b'x',
                link: b"",
                device: (0, 0),
                mode: 0o644,
                uid: 0,
                gid: 0,
                mtime: 0,
                size: records.len() as u64,
            };
            self.out.write_all(&head.block())?;
            self.out.write_all(&records)?;
            self.pad(records.len() as u64)?;
        }
        let head = Fields {
            path: &path,
            kind,
            link,
            device,
            mode: entry.mode & 0o7777,
            uid: entry.uid.into(),
            gid: entry.gid.into(),
            mtime: u64::try_from(seconds).unwrap_or(0),
            size,
        };
        self.out.write_all(&head.block())
    }
}

struct Fields<'a> {
    path: &'a [u8],
    kind: u8,
    link: &'a [u8],
    device: (u32, u32),
    mode: u32,
    uid: u64,
    gid: u64,
    mtime: u64,
    size: u64,
}

impl Fields<'_> {
    fn block(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let mut text = |at: usize, most: usize, value: &[u8]| {
            let length = value.len().min(most);
            block[at..at + length].copy_from_slice(&value[..length]);
        };
        text(0, 100, self.path);
        text(157, 100, self.link);
        text(257, 8, b"ustar\x0000");
        text(156, 1, &[self.kind]);
        // One that does not fit has a record, and any value will do.
        let mut octal = |at: usize, width: usize, value: u64| {
            let most = (1u64 << (3 * (width - 1))) - 1;
            let digits = format!("{:0width$o}", value.min(most), width = width - 1);
            text(at, width, digits.as_bytes());
        };
        octal(100, 8, self.mode.into());
        octal(108, 8, self.uid);
        octal(116, 8, self.gid);
        octal(124, 12, self.size);
        octal(136, 12, self.mtime);
        octal(329, 8, self.device.0.into());
        octal(337, 8, self.device.1.into());
        text(148, 8, b"        ");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }
}

/// "length key=value\n", where length counts itself.
fn record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(format!("{length} ").as_bytes());
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

/// Seconds with their fraction, as PAX has times: -1.5 is half a second after -2.
fn decimal(seconds: i64, nanos: u32) -> String {
    if nanos == 0 {
        return seconds.to_string();
    }
    let (sign, seconds, nanos) = match seconds {
        ..0 => ("-", -(seconds + 1), 1_000_000_000 - nanos),
        _ => ("", seconds, nanos),
    };
    let text = format!("{sign}{seconds}.{nanos:09}");
    text.trim_end_matches('0').to_owned()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::image::{testing::listing, unpack};

    #[test]
    fn negative_times_have_their_sign() {
        for (time, want) in [
            ((0, 0), "0"),
            ((5, 500_000_000), "5.5"),
            ((-1, 0), "-1"),
            ((-2, 500_000_000), "-1.5"),
            ((-1, 999_999_999), "-0.000000001"),
        ] {
            assert_eq!(decimal(time.0, time.1), want);
        }
    }

    /// What is written, GNU tar and our own reader unpack alike. Needs root.
    #[test]
    fn another_program_reads_what_is_written() {
        let long = |name: &str| format!("{name}-{}", "x".repeat(120)).into_bytes();
        let base = |path: Vec<u8>, kind: Kind| Entry {
            path,
            kind,
            mode: 0o4751,
            uid: 1234,
            gid: 3_000_000,
            mtime: (1_700_000_000, 123_456_789),
            size: 0,
            xattrs: Vec::new(),
        };
        let mut tar = Tarball::new(Vec::new());
        let directory = base(long("dir"), Kind::Directory);
        tar.append(&directory, &mut io::empty()).unwrap();
        let inside = |name: &[u8]| [directory.path.as_slice(), b"/", name].concat();
        let file = Entry {
            size: 5000,
            xattrs: vec![(b"user.a\xc3\xa9".to_vec(), b"x\0=\n".to_vec())],
            ..base(inside(b"file\xff"), Kind::File)
        };
        tar.append(&file, &mut io::repeat(7)).unwrap();
        for (name, kind) in [
            (&b"hard"[..], Kind::HardLink(file.path.clone())),
            (b"soft", Kind::Symlink(long("nowhere"))),
            (b"char", Kind::Char(5, 300)),
            (b"block", Kind::Block(7, 1)),
            (b"fifo", Kind::Fifo),
        ] {
            tar.append(&base(inside(name), kind), &mut io::empty()).unwrap();
        }
        let old = Entry { mtime: (-5, 0), ..base(b"old".to_vec(), Kind::File) };
        tar.append(&old, &mut io::empty()).unwrap();
        assert!(tar.append(&Entry { size: 2, ..old }, &mut &b"1"[..]).is_err());
        let mut tar2 = Tarball::new(Vec::new());
        tar2.text("a", b"b").unwrap();
        assert_eq!(tar2.finish().unwrap().len(), 4 * BLOCK);

        // The failed entry is taken back by hand.
        let mut bytes = tar.out;
        bytes.truncate(bytes.len() - 1 - 3 * BLOCK);
        bytes.resize(bytes.len() + 2 * BLOCK, 0);
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.tar"), &bytes).unwrap();
        let (ours, gnu) = (dir.path().join("ours"), dir.path().join("gnu"));
        std::fs::create_dir(&ours).unwrap();
        std::fs::create_dir(&gnu).unwrap();
        let root = unpack::open_root(&ours).unwrap();
        unpack::unpack(&mut bytes.as_slice(), root.as_fd(), None).unwrap();
        let status = std::process::Command::new("tar")
            .args([
                "--xattrs",
                "--xattrs-include=*",
                "--numeric-owner",
                "-xpf",
                "a.tar",
                "-C",
                "gnu",
            ])
            .current_dir(dir.path())
            .status()
            .unwrap();
        assert!(status.success());
        let (mut a, mut b) = (listing(&ours), listing(&gnu));
        a.remove("\"\"");
        b.remove("\"\"");
        assert_eq!(a, b);
        assert_eq!(a.len(), 8);
    }
}

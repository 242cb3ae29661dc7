//! The line that a container has begun and not ended, kept where the next shim finds it if this one is
//! killed: it has been read from the pipe, and is not in the log yet.
//!
//! It is written when there is nothing more to read, before it is waited for; lines that end in the read
//! that they began in cost nothing. A file in the bundle has it, with the place in the log that was the
//! end then: a record of the same stream behind that place began with the text, so the text is not
//! taken twice. Nothing here fails towards the container.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use crate::{
    log::{LINE_MAX, Stream},
    timestamp,
};

/// What the file begins with; another layout gets another.
const MAGIC: [u8; 8] = *b"HFLINE1\n";

/// Magic, inode and size of the log, length of the text and its sum, eight bytes each.
const HEADER: usize = 40;

/// How much of a log is read at once.
const CHUNK: usize = 16 * 1024;

/// The file for one stream of one container.
pub(crate) struct Unfinished {
    path: PathBuf,
    file: Option<File>,
    /// There is a text in it.
    full: bool,
}

impl Unfinished {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, file: None, full: false }
    }

    /// What the shim before us had read of a line that `log` does not have.
    pub(crate) fn load(&mut self, log: &Path, stream: Stream) -> Vec<u8> {
        let text = read(&self.path, log, stream).ok().flatten().unwrap_or_default();
        self.full = true;
        if text.is_empty() {
            self.clear();
        }
        text
    }

    /// Keeps `text`, with which the next line begins in a log that has all before it.
    pub(crate) fn keep(&mut self, text: &[u8], log: &File) {
        if text.is_empty() {
            return self.clear();
        }
        // A file that cannot be written has what it had: behind its place are records by now.
        let _ = self.write(text, log);
    }

    fn write(&mut self, text: &[u8], log: &File) -> io::Result<()> {
        let log = log.metadata()?;
        let mut bytes = Vec::with_capacity(HEADER + text.len());
        bytes.extend(MAGIC);
        for number in [log.ino(), log.len(), text.len() as u64, sum(text)] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(text);
        let file = match &self.file {
            Some(file) => file,
            None => {
                let mut options = OpenOptions::new();
                options.create(true).truncate(false).write(true).mode(0o600);
                self.file.insert(options.open(&self.path)?)
            }
        };
        self.full = true;
        file.write_all_at(&bytes, 0)
    }

    /// There is nothing to keep.
    pub(crate) fn clear(&mut self) {
        if std::mem::take(&mut self.full) {
            let _ = match &self.file {
                Some(file) => file.set_len(0),
                None => std::fs::remove_file(&self.path),
            };
        }
    }
}

/// FNV-1a: the shim may have been killed in the middle of a write.
fn sum(text: &[u8]) -> u64 {
    text.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// `None`: there is no text, or the log has it.
fn read(path: &Path, log: &Path, stream: Stream) -> io::Result<Option<Vec<u8>>> {
    let bytes = std::fs::read(path)?;
    let Some((header, text)) = bytes.split_at_checked(HEADER) else { return Ok(None) };
    let number = |place: usize| {
        header[8 * place..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    let (inode, end, length) = (number(1), number(2), number(3) as usize);
    if header[..8] != MAGIC || length > LINE_MAX || length > text.len() {
        return Ok(None);
    }
    // A longer text may have been there before.
    let text = &text[..length];
    let log = File::open(log)?;
    let now = log.metadata()?;
    // In another log, or in less of it, nobody can tell what has been written since.
    if sum(text) != number(4) || now.ino() != inode || now.len() < end {
        return Ok(None);
    }
    Ok((!has_record(&log, end, stream)?).then(|| text.to_vec()))
}

/// Whether a record of this stream begins at or behind `at`, where a record begins.
fn has_record(log: &File, mut at: u64, stream: Stream) -> io::Result<bool> {
    let tag = &stream.tag(true)[..8];
    let mut buffer = vec![0; CHUNK];
    // Bytes of the record that have been seen.
    let mut seen = 0;
    let mut name = [0; 8];
    loop {
        let count = log.read_at(&mut buffer, at)?;
        if count == 0 {
            return Ok(false);
        }
        at += count as u64;
        for byte in &buffer[..count] {
            if *byte == b'\n' {
                seen = 0;
                continue;
            }
            if (timestamp::LEN..timestamp::LEN + 8).contains(&seen) {
                name[seen - timestamp::LEN] = *byte;
                if seen == timestamp::LEN + 7 && name == *tag {
                    return Ok(true);
                }
            }
            seen += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = "2016-10-06T00:17:09.669794202Z stderr F something else\n";

    fn place() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (kept, log) = (dir.path().join("stdout.unfinished"), dir.path().join("0.log"));
        std::fs::write(&log, RECORD).unwrap();
        (dir, kept, log)
    }

    fn loaded(kept: &Path, log: &Path) -> Vec<u8> {
        Unfinished::new(kept.to_owned()).load(log, Stream::Stdout)
    }

    fn append(log: &Path, text: &str) {
        let mut all = std::fs::read_to_string(log).unwrap();
        all.push_str(text);
        std::fs::write(log, all).unwrap();
    }

    #[test]
    fn a_line_is_found_until_its_stream_has_a_record() {
        let (_dir, kept, log) = place();
        assert_eq!(loaded(&kept, &log), b"");
        let mut line = Unfinished::new(kept.clone());
        line.keep(b"a longer half", &File::open(&log).unwrap());
        line.keep(b"half a", &File::open(&log).unwrap());
        assert_eq!(loaded(&kept, &log), b"half a");
        append(&log, RECORD);
        assert_eq!(loaded(&kept, &log), b"half a", "the other stream's");
        append(&log, "2016-10-06T00:17:09.669794202Z stderr P 2016 stdout F\n");
        assert_eq!(loaded(&kept, &log), b"half a", "in a text");
        append(&log, "2016-10-06T00:17:09.669794202Z stdout P half a line\n");
        assert_eq!(loaded(&kept, &log), b"");
        assert!(!kept.exists());
    }

    #[test]
    fn nothing_is_taken_that_may_be_in_the_log_or_was_cut_off() {
        let (_dir, kept, log) = place();
        let keep = || {
            Unfinished::new(kept.clone()).keep(&[b'x'; 9000], &File::open(&log).unwrap());
            std::fs::read(&kept).unwrap()
        };
        let whole = keep();
        for damaged in [&b""[..], &whole[..20], &whole[..HEADER + 4096], b"HFLINE2\n"] {
            std::fs::write(&kept, damaged).unwrap();
            assert_eq!(loaded(&kept, &log), b"");
        }
        let mut torn = whole.clone();
        torn[HEADER + 5000] = b'y';
        std::fs::write(&kept, torn).unwrap();
        assert_eq!(loaded(&kept, &log), b"");
        keep();
        std::fs::write(&log, &RECORD[..10]).unwrap();
        assert_eq!(loaded(&kept, &log), b"", "a log that is shorter");
        keep();
        std::fs::rename(&log, log.with_extension("1")).unwrap();
        std::fs::write(&log, RECORD).unwrap();
        assert_eq!(loaded(&kept, &log), b"", "another log");
        keep();
        std::fs::remove_file(&log).unwrap();
        assert_eq!(loaded(&kept, &log), b"", "no log");
    }

    #[test]
    fn what_has_ended_is_not_kept() {
        let (_dir, kept, log) = place();
        let log = File::open(log).unwrap();
        let mut line = Unfinished::new(kept.clone());
        line.keep(b"", &log);
        assert!(!kept.exists());
        line.keep(b"half", &log);
        assert!(kept.exists());
        line.keep(b"", &log);
        assert_eq!(std::fs::read(&kept).unwrap(), b"");
    }
}

//! A container's log in the CRI format, one line per record:
//! `2016-10-06T00:17:09.669794202Z stdout F the text`
//!
//! (Kubernetes, pkg/kubelet/kuberuntime/logs.) `P` is a part of a line that goes on, `F` a whole
//! line or its last part. A line of more than 16 KiB is written in parts. The writer never fails
//! towards the container: what cannot be written is dropped and counted, and when writing works
//! again a record says how much is missing.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use crate::{timestamp, unfinished::Unfinished};

/// Longest text of a record, in bytes.
pub(crate) const LINE_MAX: usize = 16 * 1024;

/// Size of the buffer that records are put together in.
pub(crate) const OUT_SIZE: usize = 256 * 1024;

/// Bytes of a record besides its text: time, stream, tag, line feed.
const OVERHEAD: usize = HEAD + 1;

/// Bytes of a record before its text.
const HEAD: usize = timestamp::LEN + " stdout F ".len();

type Head = [u8; HEAD];

/// How often opening a log that could not be opened is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Which output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    pub(crate) fn tag(self, whole: bool) -> &'static [u8; 10] {
        match (self, whole) {
            (Stream::Stdout, true) => b" stdout F ",
            (Stream::Stdout, false) => b" stdout P ",
            (Stream::Stderr, true) => b" stderr F ",
            (Stream::Stderr, false) => b" stderr P ",
        }
    }
}

/// A log file, and the lines that have not ended yet.
pub(crate) struct Log {
    path: PathBuf,
    file: Option<File>,
    /// Text since the last line feed, at most `LINE_MAX`: of stdout and of stderr.
    unfinished: [Vec<u8>; 2],
    /// Where that is kept, should we be killed.
    kept: Option<[Unfinished; 2]>,
    /// There was output since.
    changed: [bool; 2],
    clock: Clock,
    dropped: Dropped,
    tried: Option<Instant>,
}

#[derive(Default)]
struct Dropped {
    records: u64,
    bytes: u64,
}

impl Log {
    /// Opens (appends to) the log at `path`.
    pub(crate) fn open(path: PathBuf) -> io::Result<Self> {
        let file = open(&path)?;
        Ok(Self::new(path, Some(file)))
    }

    /// Goes on with the log at `path` after a shim that died, perhaps in the middle of a record. A log
    /// that cannot be opened now is tried again as long as there is output.
    pub(crate) fn resume(path: PathBuf) -> Self {
        let file = open(&path).and_then(|file| mend(&path, &file).map(|()| file)).ok();
        Self::new(path, file)
    }

    fn new(path: PathBuf, file: Option<File>) -> Self {
        Self {
            path,
            file,
            unfinished: [Vec::new(), Vec::new()],
            kept: None,
            changed: [false; 2],
            clock: Clock::default(),
            dropped: Dropped::default(),
            tried: None,
        }
    }

    /// Text after the last line feed, of both streams.
    pub(crate) fn unfinished(&self) -> [Vec<u8>; 2] {
        self.unfinished.clone()
    }

    pub(crate) fn set_unfinished(&mut self, unfinished: [Vec<u8>; 2]) {
        self.unfinished = unfinished;
        self.keep_all();
    }

    /// Keeps unfinished lines in these files from now on; `load`: a shim before us was killed, and may
    /// have left some there.
    pub(crate) fn keep_in(&mut self, paths: [PathBuf; 2], load: bool) {
        if !load {
            for path in &paths {
                let _ = std::fs::remove_file(path);
            }
        }
        let mut kept = paths.map(Unfinished::new);
        if load {
            for stream in [Stream::Stdout, Stream::Stderr] {
                let text = kept[stream as usize].load(&self.path, stream);
                self.unfinished[stream as usize] = text;
            }
        }
        self.kept = Some(kept);
    }

    /// There is nothing more to read for now: what is unfinished is kept.
    pub(crate) fn settle(&mut self, stream: Stream) {
        let stream = stream as usize;
        if std::mem::take(&mut self.changed[stream])
            && let (Some(kept), Some(log)) = (&mut self.kept, &self.file)
        {
            kept[stream].keep(&self.unfinished[stream], log);
        }
    }

    fn keep_all(&mut self) {
        self.changed = [true; 2];
        self.settle(Stream::Stdout);
        self.settle(Stream::Stderr);
    }

    /// Takes output of the container; `out` is a buffer of [`OUT_SIZE`]. Gives how much of it was
    /// used.
    pub(crate) fn write(&mut self, stream: Stream, bytes: &[u8], out: &mut [u8]) -> usize {
        let mut unfinished = std::mem::take(&mut self.unfinished[stream as usize]);
        self.changed[stream as usize] = true;
        // All of it was there when it was read, so it has one time.
        let mut batch = Batch { heads: self.heads(stream), out, used: 0, peak: 0 };
        let mut rest = bytes;
        while !rest.is_empty() {
            let (text, ended) = match memchr::memchr(b'\n', rest) {
                Some(end) => {
                    let text = &rest[..end];
                    rest = &rest[end + 1..];
                    (text, true)
                }
                None => (std::mem::take(&mut rest), false),
            };
            let mut text = text;
            while unfinished.len() + text.len() > LINE_MAX {
                let (part, more) = text.split_at(LINE_MAX - unfinished.len());
                self.record(&mut batch, false, &unfinished, part);
                unfinished.clear();
                text = more;
            }
            if ended {
                self.record(&mut batch, true, &unfinished, text);
                unfinished.clear();
            } else {
                unfinished.extend_from_slice(text);
            }
        }
        self.flush(&mut batch);
        if unfinished.is_empty() {
            // An idle container keeps no buffer.
            unfinished = Vec::new();
        }
        self.unfinished[stream as usize] = unfinished;
        batch.peak
    }

    /// The stream has ended: a last line without a line feed is a line all the same.
    pub(crate) fn end(&mut self, stream: Stream, out: &mut [u8]) {
        let unfinished = std::mem::take(&mut self.unfinished[stream as usize]);
        let mut batch = Batch { heads: self.heads(stream), out, used: 0, peak: 0 };
        if !unfinished.is_empty() {
            self.record(&mut batch, true, &unfinished, &[]);
        }
        self.flush(&mut batch);
        self.changed[stream as usize] = true;
        self.settle(stream);
    }

    /// Closes the file and opens its path again. On an error the old file stays.
    pub(crate) fn reopen(&mut self) -> io::Result<()> {
        self.file = Some(open(&self.path)?);
        self.keep_all();
        Ok(())
    }

    /// What records of this moment begin with: of a part of a line, and of a whole one.
    fn heads(&mut self, stream: Stream) -> [Head; 2] {
        let time = self.clock.now();
        [false, true].map(|whole| {
            let mut head = [0; HEAD];
            head[..timestamp::LEN].copy_from_slice(time);
            head[timestamp::LEN..].copy_from_slice(stream.tag(whole));
            head
        })
    }

    fn record(&mut self, batch: &mut Batch<'_>, whole: bool, a: &[u8], b: &[u8]) {
        if batch.used + OVERHEAD + a.len() + b.len() > batch.out.len() {
            self.flush(batch);
        }
        let head = batch.heads[usize::from(whole)];
        batch.put(&head);
        batch.put(a);
        batch.put(b);
        batch.put(b"\n");
    }

    fn flush(&mut self, batch: &mut Batch<'_>) {
        batch.peak = batch.peak.max(batch.used);
        let records = &batch.out[..batch.used];
        batch.used = 0;
        if records.is_empty() {
            return;
        }
        self.retry();
        if self.file.is_some() && self.dropped.records > 0 && !self.tell() {
            return self.drop(records);
        }
        if let Some(unwritten) = self.put(records) {
            self.drop(&records[unwritten..]);
        }
    }

    /// Opens a log that is not open, now and then.
    fn retry(&mut self) {
        if self.file.is_none() && self.tried.is_none_or(|tried| tried.elapsed() >= RETRY) {
            self.tried = Some(Instant::now());
            self.file = open(&self.path).ok();
        }
    }

    fn drop(&mut self, records: &[u8]) {
        self.dropped.records += records.iter().filter(|byte| **byte == b'\n').count() as u64;
        self.dropped.bytes += records.len() as u64;
    }

    /// Writes the record that says how much is missing.
    fn tell(&mut self) -> bool {
        let Dropped { records, bytes } = self.dropped;
        let mut line = self.clock.now().to_vec();
        line.extend_from_slice(Stream::Stderr.tag(true));
        let text = format!(
            "holdfast: {records} log records ({bytes} bytes) are missing here: the log could not be written\n"
        );
        line.extend_from_slice(text.as_bytes());
        let written = self.put(&line).is_none();
        if written {
            self.dropped = Dropped::default();
        }
        written
    }

    /// Writes records; when not all of them fit, gives where the first one begins that was not
    /// written. No part of a record is left in the file.
    fn put(&mut self, records: &[u8]) -> Option<usize> {
        let Some(file) = &mut self.file else { return Some(0) };
        let mut written = 0;
        while written < records.len() {
            match file.write(&records[written..]) {
                Ok(0) => break,
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        if written == records.len() {
            return None;
        }
        let whole = records[..written].iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
        if whole < written
            && let Ok(size) = file.metadata().map(|meta| meta.len())
        {
            let _ = file.set_len(size.saturating_sub((written - whole) as u64));
        }
        Some(whole)
    }
}

/// Takes away the part of a record that a log ends with: a line of it has no meaning, and would spoil
/// the next one.
fn mend(path: &PathBuf, file: &File) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let size = file.metadata()?.len();
    // What is longer is no record of ours.
    let tail = size.min((OVERHEAD + LINE_MAX) as u64);
    let mut bytes = vec![0; tail as usize];
    File::open(path)?.read_exact_at(&mut bytes, size - tail)?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    if whole < bytes.len() && (whole > 0 || tail == size) {
        file.set_len(size - tail + whole as u64)?;
    }
    Ok(())
}

fn open(path: &PathBuf) -> io::Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o640)
        // A FIFO in its place must not block the shim; it is refused below.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        let message = format!("{} is no regular file", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(file)
}

struct Batch<'a> {
    heads: [Head; 2],
    out: &'a mut [u8],
    used: usize,
    peak: usize,
}

impl Batch<'_> {
    fn put(&mut self, bytes: &[u8]) {
        self.out[self.used..self.used + bytes.len()].copy_from_slice(bytes);
        self.used += bytes.len();
    }
}

/// The time as text; only the digits that change are written anew.
#[derive(Default)]
struct Clock {
    second: u64,
    text: [u8; timestamp::LEN],
}

impl Clock {
    fn now(&mut self) -> &[u8; timestamp::LEN] {
        let since = timestamp::since_epoch(SystemTime::now());
        if since.as_secs() == self.second && self.second != 0 {
            timestamp::digits(&mut self.text[20..29], u64::from(since.subsec_nanos()));
        } else {
            self.second = since.as_secs();
            timestamp::write(self.second, since.subsec_nanos(), &mut self.text);
        }
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    /// Stream, tag and text of each record.
    fn records(path: &PathBuf) -> Vec<(String, char, Vec<u8>)> {
        let bytes = fs::read(path).unwrap();
        let mut lines: Vec<_> = bytes.split(|byte| *byte == b'\n').collect();
        assert_eq!(lines.pop(), Some(&[][..]), "the file ends with a line feed");
        lines
            .into_iter()
            .map(|line| {
                let mut words = line.splitn(4, |byte| *byte == b' ');
                let time = std::str::from_utf8(words.next().unwrap()).unwrap();
                assert!(timestamp::parse(time).is_some(), "{time}");
                let stream = String::from_utf8(words.next().unwrap().to_vec()).unwrap();
                let tag = words.next().unwrap()[0] as char;
                (stream, tag, words.next().unwrap().to_vec())
            })
            .collect()
    }

    #[test]
    fn after_a_shim_that_died_the_log_goes_on_at_a_whole_record() {
        let (_dir, path, mut log, mut out) = log();
        log.write(Stream::Stdout, b"one\ntwo\n", &mut out);
        let whole = fs::read(&path).unwrap();
        for cut in [b"2026-01-01T00:00".to_vec(), vec![b'x'; 9000], Vec::new()] {
            fs::write(&path, [&whole[..], &cut].concat()).unwrap();
            let mut log = Log::resume(path.clone());
            log.write(Stream::Stderr, b"three\n", &mut out);
            let texts: Vec<_> = records(&path).into_iter().map(|(.., text)| text).collect();
            assert_eq!(texts, [&b"one"[..], b"two", b"three"]);
        }
        // Not a log of ours: nothing of it is taken away.
        let foreign = vec![b'x'; 3 * LINE_MAX];
        fs::write(&path, &foreign).unwrap();
        drop(Log::resume(path.clone()));
        assert_eq!(fs::read(&path).unwrap(), foreign);
        fs::write(&path, b"only a part").unwrap();
        drop(Log::resume(path.clone()));
        assert_eq!(fs::read(&path).unwrap(), b"");
    }

    fn log() -> (tempfile::TempDir, PathBuf, Log, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let log = Log::open(path.clone()).unwrap();
        (dir, path, log, vec![0; OUT_SIZE])
    }

    #[test]
    fn a_line_of_exactly_the_limit_is_whole_and_one_more_byte_makes_two_parts() {
        let (_dir, path, mut log, mut out) = log();
        let mut line = vec![b'a'; LINE_MAX];
        line.push(b'\n');
        log.write(Stream::Stdout, &line, &mut out);
        line.insert(0, b'b');
        log.write(Stream::Stdout, &line, &mut out);
        let tags: Vec<_> = records(&path).iter().map(|(_, tag, text)| (*tag, text.len())).collect();
        assert_eq!(tags, [('F', LINE_MAX), ('P', LINE_MAX), ('F', 1)]);
    }

    #[test]
    fn the_last_line_needs_no_line_feed() {
        let (_dir, path, mut log, mut out) = log();
        log.write(Stream::Stderr, b"one\n\ntw", &mut out);
        log.write(Stream::Stderr, b"o", &mut out);
        assert_eq!(records(&path).len(), 2);
        log.end(Stream::Stderr, &mut out);
        let texts: Vec<_> = records(&path).into_iter().map(|(.., text)| text).collect();
        assert_eq!(texts, [b"one".to_vec(), b"".to_vec(), b"two".to_vec()]);
    }

    #[test]
    fn reopening_goes_on_in_a_new_file() {
        let (dir, path, mut log, mut out) = log();
        log.write(Stream::Stdout, b"old\nhalf", &mut out);
        let rotated = dir.path().join("0.log.1");
        fs::rename(&path, &rotated).unwrap();
        log.reopen().unwrap();
        log.write(Stream::Stdout, b" line\n", &mut out);
        assert_eq!(records(&rotated).len(), 1);
        assert_eq!(records(&path)[0].2, b"half line");
    }

    #[test]
    fn a_log_that_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Log::open(dir.path().to_owned()).is_err());
        assert!(Log::open("/dev/full".into()).is_err());
    }

    #[test]
    fn what_cannot_be_written_is_counted_and_told_when_it_can_be_again() {
        let (_dir, path, mut log, mut out) = log();
        log.write(Stream::Stdout, b"before\n", &mut out);
        log.file = Some(OpenOptions::new().write(true).open("/dev/full").unwrap());
        log.write(Stream::Stdout, b"lost 1\nlost 2\nhalf", &mut out);
        log.write(Stream::Stderr, b"lost 3\n", &mut out);
        log.file = None;
        log.tried = None;
        log.write(Stream::Stdout, b" kept\n", &mut out);
        let texts: Vec<_> =
            records(&path).into_iter().map(|(.., text)| String::from_utf8(text).unwrap()).collect();
        assert_eq!(texts[0], "before");
        assert!(texts[1].starts_with("holdfast: 3 log records ("), "{}", texts[1]);
        assert_eq!(texts[2], "half kept");
        assert_eq!(texts.len(), 3);
    }

    proptest! {
        #[test]
        fn every_byte_comes_out_once_and_in_order(
            chunks in proptest::collection::vec(
                proptest::collection::vec(prop_oneof![9 => any::<u8>(), 1 => Just(b'\n')], 0..40_000),
                1..6,
            )
        ) {
            let (_dir, path, mut log, mut out) = log();
            // A small buffer meets its end often.
            out.truncate(LINE_MAX + OVERHEAD + 7);
            for chunk in &chunks {
                log.write(Stream::Stdout, chunk, &mut out);
            }
            log.end(Stream::Stdout, &mut out);
            let mut whole = Vec::new();
            for (stream, tag, text) in records(&path) {
                prop_assert_eq!(stream, "stdout");
                prop_assert!(text.len() <= LINE_MAX);
                whole.extend_from_slice(&text);
                if tag == 'F' {
                    whole.push(b'\n');
                } else {
                    prop_assert_eq!(text.len(), LINE_MAX);
                }
            }
            let mut given = chunks.concat();
            if given.last().is_some_and(|last| *last != b'\n') {
                given.push(b'\n');
            }
            prop_assert_eq!(whole, given);
        }
    }
}

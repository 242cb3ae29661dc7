//! The CRI log format, read back: `<RFC3339Nano> stdout|stderr P|F <text>` (kubelet's
//! kuberuntime/logs). A line that was too long for one record is in several, all but the last
//! tagged P; records of stdout and stderr may lie between.

/// A stream of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

/// A whole line, as the container wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    /// When its beginning was read from the container, as the log has it.
    pub(super) time: String,
    pub(super) stream: Stream,
    /// Without its line feed.
    pub(super) text: Vec<u8>,
}

/// Joins records to lines.
#[derive(Default)]
pub(super) struct Joiner {
    /// Bytes of a record that is not complete in the file yet.
    tail: Vec<u8>,
    stdout: Option<Line>,
    stderr: Option<Line>,
}

impl Joiner {
    /// Takes the next bytes of a log and gives the lines that are complete with them.
    pub(super) fn push(&mut self, bytes: &[u8], mut line: impl FnMut(Line)) {
        self.tail.extend_from_slice(bytes);
        let mut rest = &self.tail[..];
        let mut taken = 0;
        while let Some(end) = rest.iter().position(|&b| b == b'\n') {
            if let Some(complete) = join(&mut self.stdout, &mut self.stderr, &rest[..end]) {
                line(complete);
            }
            rest = &rest[end + 1..];
            taken += end + 1;
        }
        self.tail.drain(..taken);
    }

    /// What is left at the end of a container's log: lines whose end was never written.
    pub(super) fn finish(self, mut line: impl FnMut(Line)) {
        let Self { tail, mut stdout, mut stderr } = self;
        if !tail.is_empty()
            && let Some(complete) = join(&mut stdout, &mut stderr, &tail)
        {
            line(complete);
        }
        for rest in [stdout, stderr].into_iter().flatten() {
            line(rest);
        }
    }
}

/// Adds a record to the line that is open on its stream; the line, if the record ends it.
fn join(stdout: &mut Option<Line>, stderr: &mut Option<Line>, record: &[u8]) -> Option<Line> {
    let Some(record) = parse(record) else {
        // Not ours (somebody wrote to the file by hand, or a disk lost a piece of it). Better shown
        // than lost.
        return Some(Line { time: String::new(), stream: Stream::Stdout, text: record.to_vec() });
    };
    let open = match record.stream {
        Stream::Stdout => stdout,
        Stream::Stderr => stderr,
    };
    let line = open.get_or_insert_with(|| Line {
        time: record.time.to_owned(),
        stream: record.stream,
        text: Vec::new(),
    });
    line.text.extend_from_slice(record.text);
    if record.partial { None } else { open.take() }
}

#[derive(Debug, PartialEq, Eq)]
struct Record<'a> {
    time: &'a str,
    stream: Stream,
    partial: bool,
    text: &'a [u8],
}

fn parse(record: &[u8]) -> Option<Record<'_>> {
    let mut fields = record.splitn(4, |&b| b == b' ');
    let time = str::from_utf8(fields.next()?).ok()?;
    // Cheap, and enough to tell a time from text.
    if !time.starts_with(|c: char| c.is_ascii_digit()) || !time.contains('T') {
        return None;
    }
    let stream = match fields.next()? {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return None,
    };
    // Tags are separated by colons; the first says whether the line goes on.
    let partial = match fields.next()?.split(|&b| b == b':').next()? {
        b"P" => true,
        b"F" => false,
        _ => return None,
    };
    Some(Record { time, stream, partial, text: fields.next().unwrap_or_default() })
}

/// The last `count` lines of a log that is read backwards, in growing steps: `read(n)` gives its last
/// `n` bytes, or all of it if it is shorter.
///
/// Returns the lines, and the joiner to go on with behind them.
pub(super) fn tail<E>(
    count: usize,
    length: u64,
    keep: impl Fn(&Line) -> bool,
    mut read: impl FnMut(u64) -> Result<Vec<u8>, E>,
) -> Result<(Vec<Line>, Joiner), E> {
    let mut size = 64 << 10;
    loop {
        let whole = size >= length;
        let bytes = read(size.min(length))?;
        let mut joiner = Joiner::default();
        let mut lines = Vec::new();
        // Unless it is the whole file, the first record is cut.
        let start = match whole {
            true => 0,
            false => bytes.iter().position(|&b| b == b'\n').map_or(bytes.len(), |n| n + 1),
        };
        joiner.push(&bytes[start..], |line| lines.push(line));
        // The first line of each stream may have begun before the piece: it must not be among the ones
        // that are shown.
        let whole_from = |stream, open: &Option<Line>| match lines
            .iter()
            .position(|l: &Line| l.stream == stream)
        {
            Some(first) => first + 1,
            None if open.is_some() => usize::MAX,
            None => 0,
        };
        let cut = whole_from(Stream::Stdout, &joiner.stdout)
            .max(whole_from(Stream::Stderr, &joiner.stderr));
        if whole || cut.saturating_add(count) <= lines.len() {
            lines.retain(keep);
            lines.drain(..lines.len().saturating_sub(count));
            return Ok((lines, joiner));
        }
        size = size.saturating_mul(4);
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn lines(log: &[u8]) -> Vec<String> {
        let mut joiner = Joiner::default();
        let mut out = Vec::new();
        joiner.push(log, |l| out.push(l));
        joiner.finish(|l| out.push(l));
        out.iter().map(|l| format!("{:?} {}", l.stream, String::from_utf8_lossy(&l.text))).collect()
    }

    #[test]
    fn parts_are_joined_by_stream() {
        let log = b"2024-05-01T12:00:00.1Z stdout P one \n\
                    2024-05-01T12:00:00.2Z stderr F err\n\
                    2024-05-01T12:00:00.3Z stdout P two \n\
                    2024-05-01T12:00:00.4Z stdout F three\n\
                    2024-05-01T12:00:00.5Z stdout F \n";
        assert_eq!(lines(log), ["Stderr err", "Stdout one two three", "Stdout "]);
    }

    #[test]
    fn a_joined_line_has_the_time_of_its_beginning() {
        let mut joiner = Joiner::default();
        let mut out = Vec::new();
        joiner.push(b"1T1 stdout P a\n2T2 stdout F b\n", |l| out.push(l));
        assert_eq!(out[0].time, "1T1");
    }

    #[test]
    fn what_is_no_record_is_shown_as_it_is() {
        assert_eq!(lines(b"hello\n1T1 stdout X a\n"), ["Stdout hello", "Stdout 1T1 stdout X a"]);
    }

    #[test]
    fn the_end_of_a_log_is_not_lost() {
        assert_eq!(lines(b"1T1 stdout P a\n1T1 stderr F b"), ["Stderr b", "Stdout a"]);
        assert_eq!(lines(b""), [""; 0]);
    }

    #[test]
    fn tail_counts_lines_and_not_records() {
        let mut log = Vec::new();
        for n in 0..20_000 {
            log.extend_from_slice(format!("1T1 stdout P {n}\n1T1 stdout F -\n").as_bytes());
        }
        let read = |n: u64| Ok::<_, Infallible>(log[log.len() - n as usize..].to_vec());
        for (count, first) in [(3, "19997-"), (9_000, "11000-"), (30_000, "0-")] {
            let Ok((lines, _)) = tail(count, log.len() as u64, |_| true, read);
            assert_eq!(lines.len(), count.min(20_000));
            assert_eq!(lines[0].text, first.as_bytes());
        }
        // A line that began before the piece is read whole, however late it ends.
        let mut cut = b"1T1 stdout P begin-\n".to_vec();
        cut.extend_from_slice(&b"1T1 stderr F x\n".repeat(10_000));
        cut.extend_from_slice(b"1T1 stdout F end\n");
        let read_cut = |n: u64| Ok::<_, Infallible>(cut[cut.len() - n as usize..].to_vec());
        let Ok((lines, _)) = tail(2, cut.len() as u64, |_| true, read_cut);
        assert_eq!(lines[1].text, b"begin-end");
        let Ok((none, _)) = tail(0, log.len() as u64, |_| true, read);
        assert!(none.is_empty());
    }

    proptest::proptest! {
        #[test]
        fn where_the_file_is_cut_does_not_matter(
            log in "([0-9]T (stdout|stderr) [PF] [a-c]{0,3}\n){0,6}",
            cut in 0usize..200,
        ) {
            let cut = cut.min(log.len());
            let mut joiner = Joiner::default();
            let mut out = Vec::new();
            joiner.push(&log.as_bytes()[..cut], |l| out.push(l));
            joiner.push(&log.as_bytes()[cut..], |l| out.push(l));
            joiner.finish(|l| out.push(l));
            let pieces: Vec<_> = out
                .iter()
                .map(|l| format!("{:?} {}", l.stream, String::from_utf8_lossy(&l.text)))
                .collect();
            proptest::prop_assert_eq!(pieces, lines(log.as_bytes()));
        }

        #[test]
        fn no_log_panics(log: Vec<u8>) {
            lines(&log);
        }
    }
}

//! CRI log files: `<RFC 3339 time> stdout|stderr P|F <text>`.

use std::{fs, io, path::Path};

use anyhow::{Context as _, Result, bail, ensure};

/// One line of a log file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// RFC 3339 with nanoseconds, as written.
    pub time: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// `P`: the next line of the same stream goes on.
    pub partial: bool,
    /// Without the newline.
    pub text: String,
}

/// Every line of a log file; none when it does not exist yet.
///
/// # Errors
/// A line that is not in the format. What has no newline yet is still being written and left out.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    match fs::read(path) {
        Ok(bytes) => parse(&bytes).with_context(|| format!("log {}", path.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

fn parse(bytes: &[u8]) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for raw in bytes.split_inclusive(|byte| *byte == b'\n') {
        let Some(raw) = raw.strip_suffix(b"\n") else { break };
        let text = String::from_utf8_lossy(raw);
        let mut words = text.splitn(4, ' ');
        let (Some(time), Some(stream), Some(tag), Some(text)) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            bail!("{text:?} has fewer than four parts");
        };
        ensure!(
            time.len() >= "2000-01-01T00:00:00Z".len() && time.as_bytes()[10] == b'T',
            "{time:?} is not a time"
        );
        ensure!(matches!(stream, "stdout" | "stderr"), "{stream:?} is not a stream");
        ensure!(matches!(tag, "P" | "F"), "{tag:?} is not a tag");
        lines.push(Line {
            time: time.into(),
            stream: stream.into(),
            partial: tag == "P",
            text: text.into(),
        });
    }
    Ok(lines)
}

/// The texts of one stream with their parts joined.
pub fn texts(lines: &[Line], stream: &str) -> Vec<String> {
    let mut texts = Vec::new();
    let mut open = String::new();
    for line in lines.iter().filter(|line| line.stream == stream) {
        open.push_str(&line.text);
        if !line.partial {
            texts.push(std::mem::take(&mut open));
        }
    }
    if !open.is_empty() {
        texts.push(open);
    }
    texts
}

/// Whether the texts that are numbers are 1, 2, 3, … without gap, repetition or disorder; their count.
///
/// # Errors
/// The first that is out of place, and its neighbours.
pub fn numbered(lines: &[Line]) -> Result<u64> {
    let mut expected = 1;
    for text in texts(lines, "stdout") {
        let Some(number) = text.strip_prefix("line ") else { continue };
        let number: u64 = number.trim().parse().with_context(|| format!("number in {text:?}"))?;
        ensure!(number == expected, "after line {} comes line {number}", expected - 1);
        expected += 1;
    }
    Ok(expected - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_joined_and_what_is_no_line_is_refused() {
        let time = "2026-01-02T03:04:05.000000006Z";
        let log = format!(
            "{time} stdout P ab\n{time} stderr F x y\n{time} stdout F c\n{time} stdout F \n{time} stdout F unfin"
        );
        let lines = parse(log.as_bytes()).unwrap();
        assert_eq!(texts(&lines, "stdout"), ["abc", ""]);
        assert_eq!(texts(&lines, "stderr"), ["x y"]);
        for bad in ["x\n", "now stdout F x\n", "2026-01-02T03:04:05Z std F x\n"] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_gap_a_repetition_and_disorder_are_found() {
        let log = |numbers: &[u64]| {
            let text: String = numbers
                .iter()
                .map(|n| format!("2026-01-02T03:04:05Z stdout F line {n}\n"))
                .collect();
            numbered(&parse(text.as_bytes()).unwrap())
        };
        assert_eq!(log(&[1, 2, 3]).unwrap(), 3);
        assert_eq!(log(&[]).unwrap(), 0);
        for bad in [&[1, 3][..], &[1, 1], &[2, 1], &[1, 2, 2]] {
            assert!(log(bad).is_err(), "{bad:?}");
        }
    }
}

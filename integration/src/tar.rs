//! A tar writer that writes whatever it is told, for good layers and for hostile ones.
//!
//! ustar headers (POSIX.1-1988) with a pax header (POSIX.1-2001) in front where a name is too long.

/// One entry.
#[derive(Clone, Debug)]
pub struct Entry {
    path: String,
    kind: u8,
    mode: u32,
    uid: u32,
    gid: u32,
    link: String,
    device: (u32, u32),
    content: Vec<u8>,
}

impl Entry {
    fn new(path: &str, kind: u8, mode: u32) -> Self {
        Self {
            path: path.into(),
            kind,
            mode,
            uid: 0,
            gid: 0,
            link: String::new(),
            device: (0, 0),
            content: Vec::new(),
        }
    }
    /// A regular file.
    pub fn file(path: &str, mode: u32, content: impl Into<Vec<u8>>) -> Self {
        Self { content: content.into(), ..Self::new(path, b'0', mode) }
    }
    /// A directory.
    pub fn dir(path: &str, mode: u32) -> Self {
        Self::new(path, b'5', mode)
    }
    /// A symbolic link to `target`.
    pub fn symlink(path: &str, target: &str) -> Self {
        Self { link: target.into(), ..Self::new(path, b'2', 0o777) }
    }
    /// A hard link to the entry `target`.
    pub fn hardlink(path: &str, target: &str) -> Self {
        Self { link: target.into(), ..Self::new(path, b'1', 0o644) }
    }
    /// A character device.
    pub fn char_device(path: &str, major: u32, minor: u32) -> Self {
        Self { device: (major, minor), ..Self::new(path, b'3', 0o666) }
    }
    /// A block device.
    pub fn block_device(path: &str, major: u32, minor: u32) -> Self {
        Self { device: (major, minor), ..Self::new(path, b'4', 0o666) }
    }
    /// The same, owned by others.
    pub fn owner(self, uid: u32, gid: u32) -> Self {
        Self { uid, gid, ..self }
    }

    fn write(&self, out: &mut Vec<u8>) {
        if self.path.len() > 100 || self.link.len() > 100 {
            let records = pax_record("path", &self.path)
                + &if self.link.is_empty() {
                    String::new()
                } else {
                    pax_record("linkpath", &self.link)
                };
            Entry { kind: b'x', ..Self::file("pax", 0o644, records) }.write(out);
        }
        let mut header = [0; 512];
        let mut put = |at: usize, bytes: &[u8], most: usize| {
            let bytes = &bytes[..bytes.len().min(most)];
            header[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(0, self.path.as_bytes(), 100);
        put(100, format!("{:07o}", self.mode).as_bytes(), 8);
        put(108, format!("{:07o}", self.uid).as_bytes(), 8);
        put(116, format!("{:07o}", self.gid).as_bytes(), 8);
        put(124, format!("{:011o}", self.content.len()).as_bytes(), 12);
        put(136, b"00000000000", 12);
        put(148, b"        ", 8);
        put(156, &[self.kind], 1);
        put(157, self.link.as_bytes(), 100);
        put(257, b"ustar\x0000", 8);
        put(329, format!("{:07o}", self.device.0).as_bytes(), 8);
        put(337, format!("{:07o}", self.device.1).as_bytes(), 8);
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(&self.content);
        out.resize(out.len().next_multiple_of(512), 0);
    }
}

/// The archive of some entries, in order.
pub fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        entry.write(&mut out);
    }
    out.resize(out.len() + 1024, 0);
    out
}

/// `"<length> <key>=<value>\n"`, where the length counts itself.
fn pax_record(key: &str, value: &str) -> String {
    let rest = format!(" {key}={value}\n");
    let mut length = rest.len();
    loop {
        let text = format!("{length}{rest}");
        if text.len() == length {
            return text;
        }
        length = text.len();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn another_program_reads_it() {
        let long = format!("a/{}/b", "x".repeat(150));
        let bytes = archive(&[
            Entry::dir("d", 0o755),
            Entry::file("d/f", 0o640, "hello").owner(7, 8),
            Entry::symlink("d/s", "f"),
            Entry::hardlink("d/h", "d/f"),
            Entry::char_device("d/null", 1, 3),
            Entry::file(&long, 0o644, "x"),
        ]);
        let mut tar = Command::new("tar")
            .args(["tvf", "-", "--numeric-owner"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        tar.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = tar.wait_with_output().unwrap();
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        for part in ["-rw-r----- 7/8", " d/s -> f", " d/h link to d/f", "crw-rw-rw-", "1,3", &long]
        {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn a_pax_record_counts_itself() {
        assert_eq!(pax_record("path", "abc"), "12 path=abc\n");
        assert_eq!(pax_record("p", &"a".repeat(94)).len(), 101);
    }
}

//! Archives made again. Unpacking needs root.

use std::io::BufReader;

use proptest::prelude::*;

use super::{
    super::{
        testing::{Header, Tar, digest},
        unpack::unpack,
    },
    *,
};

/// A layer on disk, with its recipe.
struct Unpacked {
    dir: tempfile::TempDir,
    diff_id: Digest,
}

impl Unpacked {
    fn new(archive: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("layer")).unwrap();
        let root = open_root(&dir.path().join("layer")).unwrap();
        let recorder = Recorder::create(&dir.path().join("recipe")).unwrap();
        let source = BufReader::with_capacity(700, archive);
        let unpacked = unpack(source, root.as_fd(), Some(recorder))
            .unwrap_or_else(|e| panic!("{}", crate::error::chain(&e)));
        unpacked.kept.unwrap().finish().unwrap();
        Self { dir, diff_id: digest(archive) }
    }

    fn open(&self) -> Result<Rebuilt, Error> {
        let layer = open_root(&self.dir.path().join("layer")).unwrap();
        Rebuilt::open(Content::Directory(layer), &self.dir.path().join("recipe"), &self.diff_id)
    }

    fn archive(&self) -> io::Result<Vec<u8>> {
        let mut archive = Vec::new();
        self.open().unwrap().read_to_end(&mut archive)?;
        Ok(archive)
    }
}

#[track_caller]
fn comes_back(archive: Vec<u8>) -> Unpacked {
    let unpacked = Unpacked::new(&archive);
    assert!(unpacked.archive().unwrap() == archive, "another archive came back");
    unpacked
}

#[test]
fn replaced_files_and_directories_are_part_of_the_archive_still() {
    comes_back(
        Tar::new()
            .file("a", "first")
            .dir("d")
            .file("d/x", "in the directory")
            .file("a", "second, and longer")
            .hard_link("h", "a")
            .file("d", "the directory is a file now")
            .file("a", "third")
            .dir("a")
            .file("a/below", "x")
            .symlink("d", "a")
            .file("d/below", "through a link")
            .file("d/other", "through a link too")
            .file("d", "not a link any more")
            .file(".wh.gone", "")
            .file("a/.wh..wh..opq", "")
            .end(),
    );
}

#[test]
fn a_link_that_becomes_a_directory_does_not_mislead() {
    comes_back(
        Tar::new()
            .dir("usr")
            .symlink("lib", "usr")
            .file("lib/x", "in usr")
            .dir("lib")
            .file("lib/x", "in lib")
            .end(),
    );
}

#[test]
fn what_no_file_holds_comes_back() {
    // Data behind the end, padding that is not zeros, a file without data, a label, a device.
    let mut archive = Tar::new()
        .header(&Header { path: b"label", kind: b'V', size: 3, ..Header::default() })
        .data(b"abc")
        .file("empty", "")
        .file("a", "12345")
        .header(&Header { path: b"null", kind: b'3', device: (1, 3), ..Header::default() })
        .pax(&[("SCHILY.xattr.user.x", b"value"), ("mtime", b"1.5")])
        .file("b", "x")
        .end();
    let padding = archive.windows(5).position(|w| w == b"12345").unwrap() + 5;
    archive[padding] = b'!';
    archive.extend_from_slice(&vec![7; 100_000]);
    comes_back(archive);
}

#[test]
fn sparse_files_come_back_without_their_holes() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    let file = File::create(tree.join("holes")).unwrap();
    for piece in 0..40 {
        file.write_all_at(b"data", piece * 300_000).unwrap();
    }
    file.set_len(20_000_000).unwrap();
    for format in ["gnu", "posix --sparse-version=0.0", "posix --sparse-version=0.1", "posix"] {
        let out = std::process::Command::new("tar")
            .args(["--sparse", "-C"])
            .arg(&tree)
            .args(format!("-cf - --format={format} .").split(' '))
            .output()
            .unwrap();
        assert!(out.status.success(), "{out:?}");
        let unpacked = comes_back(out.stdout);
        let size = std::fs::read_dir(unpacked.dir.path().join("recipe"))
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum::<u64>();
        assert!(size < 4_000, "{format}: the recipe has {size} bytes");
    }
}

#[test]
fn a_changed_layer_is_told() {
    let archive = Tar::new().file("a", "content").file("b", "x").end();
    let a = |unpacked: &Unpacked| unpacked.dir.path().join("layer/a");
    let unpacked = Unpacked::new(&archive);
    std::fs::write(a(&unpacked), "changed").unwrap();
    let text = unpacked.archive().unwrap_err().to_string();
    assert!(
        text.contains("were changed") && text.contains(&unpacked.diff_id.to_string()),
        "{text}"
    );
    std::fs::write(a(&unpacked), "shor").unwrap();
    assert!(unpacked.archive().unwrap_err().to_string().contains("shorter"));
    std::fs::remove_file(a(&unpacked)).unwrap();
    assert!(unpacked.archive().unwrap_err().to_string().starts_with("a: "));
    std::os::unix::fs::symlink("/etc/passwd", a(&unpacked)).unwrap();
    unpacked.archive().unwrap_err();
    std::fs::remove_dir_all(unpacked.dir.path().join("recipe")).unwrap();
    let text = unpacked.open().err().unwrap().to_string();
    assert!(text.contains("kept no recipe"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any order of entries with few names, so that many replace each other.
    #[test]
    fn any_archive_comes_back(
        entries in proptest::collection::vec((0..7u8, 0..4usize, 0..4usize, 0..2000usize), 0..24)
    ) {
        let mut tar = Tar::new();
        let name = |at: usize, below: usize| {
            let top = ["a", "b", "c", "d"][at];
            if below == 0 { top.to_owned() } else { format!("{top}/{}", ["", "a", "b", "x"][below]) }
        };
        for (kind, at, below, size) in entries {
            let path = name(at, below);
            tar = match kind {
                0 | 1 => tar.file(&path, vec![size as u8; size]),
                2 => tar.dir(&path),
                3 => tar.symlink(&path, &name((at + 1) % 4, 0)),
                4 => tar.hard_link(&path, &name(size % 4, below)),
                5 => tar.file(&format!("{}/.wh.x", name(at, 0)), ""),
                _ => tar.file(&format!("{}/.wh..wh..opq", name(at, 0)), ""),
            };
        }
        let archive = tar.end();
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("layer")).unwrap();
        let root = open_root(&dir.path().join("layer")).unwrap();
        let recorder = Recorder::create(&dir.path().join("recipe")).unwrap();
        // Some are refused: a file as a directory, a link that leads nowhere.
        if let Ok(unpacked) = unpack(&archive[..], root.as_fd(), Some(recorder)) {
            unpacked.kept.unwrap().finish().unwrap();
            let layer = open_root(&dir.path().join("layer")).unwrap();
            let mut again = Vec::new();
            Rebuilt::open(Content::Directory(layer), &dir.path().join("recipe"), &digest(&archive))
                .unwrap()
                .read_to_end(&mut again)
                .unwrap();
            prop_assert!(again == archive);
        }
    }

    #[test]
    fn any_recipe_is_read_or_refused(text in proptest::collection::vec(any::<u8>(), 0..200)) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("layer")).unwrap();
        let steps = zstd::encode_all(&[MAGIC, &text].concat()[..], 1).unwrap();
        std::fs::write(dir.path().join("steps"), steps).unwrap();
        std::fs::write(dir.path().join("moves"), &text).unwrap();
        let layer = open_root(&dir.path().join("layer")).unwrap();
        if let Ok(mut rebuilt) = Rebuilt::open(Content::Directory(layer), dir.path(), &digest(b"")) {
            let _ = io::copy(&mut rebuilt, &mut io::sink());
        }
    }
}

//! Images, mounted by the kernel and compared with what the same archive is as a directory. Needs root.

use std::{collections::BTreeMap, io::BufReader, path::PathBuf};

use proptest::prelude::*;
use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, UnmountFlags},
};

use super::{
    super::{
        testing::{Header, Tar, listing},
        unpack::{self, Error, Unpacked, tests::pretty},
    },
    *,
};

/// A mount that goes with it.
struct Attached(PathBuf);

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn image(path: &Path, archive: &[u8]) -> Result<Unpacked, Error> {
    let source = BufReader::with_capacity(700, archive);
    let mut unpacked = unpack::unpack_image(source, path, None)?;
    let (writer, tree) = unpacked.image.take().unwrap();
    writer.finish(&tree).unwrap();
    Ok(unpacked)
}

/// All that the kernel shows of the image of an archive.
pub(in super::super) fn image_listing(archive: &[u8]) -> Result<BTreeMap<String, String>, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    image(&path, archive)?;
    let at = dir.path().join("mounted");
    std::fs::create_dir(&at).unwrap();
    let mounted = mount(&path).unwrap();
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&mounted, "", CWD, &at, flags).unwrap();
    let attached = Attached(at);
    Ok(listing(&attached.0))
}

fn directory_listing(archive: &[u8]) -> Result<(BTreeMap<String, String>, Unpacked), Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer");
    std::fs::create_dir(&path).unwrap();
    let root = unpack::open_root(&path).unwrap();
    let unpacked = unpack::unpack(archive, root.as_fd(), None)?;
    Ok((listing(&path), unpacked))
}

/// Both kinds of layer are the same, but for times that no archive has given.
#[track_caller]
fn same(archive: &[u8]) {
    let (mut want, unpacked) = directory_listing(archive).unwrap();
    let mut got = image_listing(archive).unwrap();
    let listed = image_of(archive);
    assert_eq!(listed.implied, unpacked.implied);
    assert_eq!(listed.root_listed, unpacked.root_listed);
    for listing in [&mut want, &mut got] {
        for text in listing.values_mut() {
            // Whiteouts, and directories that are only implied.
            if text.starts_with("20600 0:0 ") || text.starts_with("40755 0:0 ") {
                let rest = text.splitn(4, ' ').nth(3).unwrap_or_default().to_owned();
                *text = format!("{} {rest}", &text[..9]);
            }
        }
        if !unpacked.root_listed {
            listing.remove("\"\"");
        }
    }
    pretty(&got, &want, "image");
}

fn image_of(archive: &[u8]) -> Unpacked {
    let dir = tempfile::tempdir().unwrap();
    image(&dir.path().join("image"), archive).unwrap()
}

#[test]
fn an_empty_layer_is_an_empty_directory() {
    assert_eq!(image_listing(&[]).unwrap().len(), 1);
    let dir = tempfile::tempdir().unwrap();
    probe(dir.path()).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn directories_of_every_size_are_searched() {
    for count in [1, 100, 170, 171, 5_000] {
        let mut tar = Tar::new().dir("d");
        for number in 0..count {
            // Names that sort before "." and between, short and long.
            let name = match number % 4 {
                0 => format!("d/+{number}"),
                1 => format!("d/.{number}"),
                2 => format!("d/{number}"),
                _ => format!("d/{number}-{}", "x".repeat(number % 60)),
            };
            tar = tar.file(&name, number.to_string());
        }
        same(&tar.end());
    }
}

#[test]
fn whiteouts_opaque_directories_and_replacements_are_the_same() {
    same(
        &Tar::new()
            .dir("./")
            .file("a/.wh.gone", "")
            .dir("opaque")
            .file("opaque/.wh..wh..opq", "")
            .file("x", "first")
            .hard_link("y", "x")
            .file("x", "second")
            .dir("x")
            .file("x/z", "in it")
            .file(".wh.new", "")
            .file("new/file", "after the whiteout")
            .symlink("lib", "usr/lib")
            .dir("usr/lib")
            .file("lib/through", "a link")
            .file("usr/file", "then a directory")
            .dir("usr/file")
            .dir("usr/file/below")
            .file("usr/file", "and a file again")
            .end(),
    );
}

#[test]
fn long_links_many_attributes_and_special_files_are_the_same() {
    let long = "t/".repeat(1500);
    let value = vec![7; 3000];
    let records: Vec<(String, &[u8])> =
        (0..20).map(|n| (format!("SCHILY.xattr.user.attribute-{n}"), &value[n * 10..])).collect();
    let records: Vec<(&str, &[u8])> = records.iter().map(|(k, v)| (k.as_str(), *v)).collect();
    let capability =
        b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let device =
        |kind, path: &'static [u8], device| Header { kind, path, device, ..Header::default() };
    same(
        &Tar::new()
            .pax(&[("linkpath", long.as_bytes())])
            .symlink("long", "x")
            .symlink("short", "..")
            .pax(&[("SCHILY.xattr.security.capability", &capability[..])])
            .header(&Header { path: b"ping", mode: 0o4755, ..Header::default() })
            .pax(&[("mtime", b"-1.25"), ("SCHILY.xattr.user.x", b"")])
            .file("old", "x")
            .header(&device(b'3', b"tty", (4, 70_000)))
            .header(&device(b'4', b"disk", (300, 5)))
            .header(&device(b'6', b"fifo", (0, 0)))
            .end(),
    );
    // ext4 has no room for so many: only the image is looked at.
    let listing = image_listing(&Tar::new().pax(&records).file("many", "x").end()).unwrap();
    let text = &listing["\"many\""];
    assert_eq!(text.matches("user.attribute").count(), 20);
}

#[test]
fn a_file_that_is_almost_all_hole_takes_no_room() {
    let map = format!("1,5,{},1", (1u64 << 40) - 1);
    let archive = Tar::new()
        .pax(&[
            ("GNU.sparse.major", b"0"),
            ("GNU.sparse.size", (1u64 << 40).to_string().as_bytes()),
            ("GNU.sparse.map", map.as_bytes()),
        ])
        .file("huge", "123456")
        .end();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    image(&path, &archive).unwrap();
    let mounted = root(&mount(&path).unwrap()).unwrap();
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(&mounted, "huge", flags, Mode::empty()).unwrap());
    assert_eq!(file.metadata().unwrap().len(), 1 << 40);
    let read = |at: u64| {
        let mut bytes = [9; 4];
        let length = file.read_at(&mut bytes, at).unwrap();
        bytes[..length].to_vec()
    };
    assert_eq!(read(0), [0, b'1', b'2', b'3']);
    assert_eq!(read(4), [b'4', b'5', 0, 0]);
    assert_eq!(read(1 << 30), [0; 4]);
    assert_eq!(read((1 << 40) - 2), [0, b'6']);
    use std::os::unix::fs::MetadataExt as _;
    let blocks = std::fs::metadata(&path).unwrap().blocks();
    assert!(blocks * 512 < 2 << 20, "{blocks}");
}

#[test]
fn hostile_entries_are_refused_as_they_are_in_a_directory() {
    for archive in [
        Tar::new().file("../evil", "x").end(),
        Tar::new().symlink("a", "/").file("a/evil", "x").end(),
        Tar::new().symlink("a", "../..").file("a/evil", "x").end(),
        Tar::new().symlink("a", "b").symlink("b", "..").file("a/x/evil", "x").end(),
        Tar::new().symlink("a", "nowhere").file("a/evil", "x").end(),
        Tar::new().symlink("a", "b").symlink("b", "a").file("a/x", "x").end(),
        Tar::new().symlink("s", "/etc").hard_link("a", "s/passwd").end(),
        Tar::new().hard_link("a", "b").end(),
        Tar::new().dir("d").hard_link("a", "d").end(),
        Tar::new().file("a", "x").file("a/b", "x").end(),
        Tar::new().file(".wh.", "").end(),
        Tar::new().pax(&[("SCHILY.xattr.trusted.overlay.redirect", b"/")]).dir("a").end(),
    ] {
        let directory = directory_listing(&archive).map(drop).unwrap_err().to_string();
        assert_eq!(image_listing(&archive).unwrap_err().to_string(), directory);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any order of entries with few names, so that many replace each other.
    #[test]
    fn any_archive_is_the_same_in_both_ways(
        entries in prop::collection::vec((0..8u8, 0..4usize, 0..4usize, 0..9000usize), 0..24)
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
                6 => tar.symlink(&path, &format!("../{}", name((at + 2) % 4, below))),
                _ => tar.file(&format!("{}/.wh..wh..opq", name(at, 0)), ""),
            };
        }
        let archive = tar.end();
        match directory_listing(&archive) {
            Ok(_) => same(&archive),
            Err(directory) => {
                let image = image_listing(&archive).expect_err("refused as a directory");
                prop_assert_eq!(image.to_string(), directory.to_string());
            }
        }
    }
}

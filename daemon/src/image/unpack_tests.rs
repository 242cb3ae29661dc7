//! Unpacking, with real file systems: needs root.

use std::{
    io::{BufReader, Read, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::{Command, Stdio},
};

use proptest::prelude::*;
use rand::{Rng, SeedableRng};

use super::{
    super::{
        erofs::tests::image_listing,
        testing::{Header, Tar, listing},
    },
    *,
};

fn unpack_to(dir: &Path, archive: &[u8]) -> Result<Unpacked, Error> {
    std::fs::create_dir(dir).unwrap();
    let root = open_root(dir).unwrap();
    // A small buffer: data and headers are cut at odd places.
    unpack(BufReader::with_capacity(700, archive), root.as_fd(), None)
}

/// Unpacks into a directory of its own.
fn unpacked(archive: &[u8]) -> (tempfile::TempDir, Unpacked) {
    let dir = tempfile::tempdir().unwrap();
    let done = unpack_to(&dir.path().join("layer"), archive).unwrap_or_else(|e| {
        panic!("{}", crate::error::chain(&e));
    });
    (dir, done)
}

fn is_opaque(path: &Path) -> bool {
    let mut value = [0; 8];
    rustix::fs::getxattr(path, OPAQUE, &mut value).is_ok_and(|n| &value[..n] == b"y")
}

fn is_whiteout(path: &Path) -> bool {
    rustix::fs::lstat(path).is_ok_and(|stat| tree::is_whiteout(&stat))
}

#[test]
fn hostile_entries_are_refused_and_nothing_is_outside() {
    let deep = "d/".repeat(300) + "f";
    let long = "x".repeat(300);
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("parent", Tar::new().file("../evil", "x").end(), "'..'"),
        ("parent inside", Tar::new().file("a/../../evil", "x").end(), "'..'"),
        ("absolute", Tar::new().file("/evil", "x").end(), "absolute"),
        ("absolute directory", Tar::new().dir("/").end(), "absolute"),
        (
            "symlink to root",
            Tar::new().symlink("a", "/").file("a/evil", "x").end(),
            "out of the layer",
        ),
        (
            "symlink up",
            Tar::new().symlink("a", "../..").file("a/evil", "x").end(),
            "out of the layer",
        ),
        (
            "symlink chain",
            Tar::new().symlink("a", "b").symlink("b", "..").file("a/x/evil", "x").end(),
            "out of the layer",
        ),
        (
            "dangling symlink",
            Tar::new().symlink("a", "nowhere").file("a/evil", "x").end(),
            "leads nowhere",
        ),
        (
            "symlink loop",
            Tar::new().symlink("a", "b").symlink("b", "a").file("a/x", "x").end(),
            "loop",
        ),
        ("hard link up", Tar::new().hard_link("a", "../evil").end(), "inside the layer"),
        ("hard link absolute", Tar::new().hard_link("a", "/etc/passwd").end(), "inside the layer"),
        (
            "hard link through a symlink",
            Tar::new().symlink("s", "/etc").hard_link("a", "s/passwd").end(),
            "outside the layer",
        ),
        ("hard link to nothing", Tar::new().hard_link("a", "b").end(), "earlier file"),
        (
            "hard link over what has its target",
            Tar::new().dir("d").file("d/f", "x").hard_link("d", "d/f").end(),
            "earlier file",
        ),
        ("hard link to a directory", Tar::new().dir("d").hard_link("a", "d").end(), "directory"),
        (
            "whiteout up",
            Tar::new().symlink("a", "..").file("a/.wh.outside", "").end(),
            "out of the layer",
        ),
        ("whiteout of the parent", Tar::new().file(".wh...", "").end(), "must name"),
        ("whiteout of nothing", Tar::new().file(".wh.", "").end(), "must name"),
        (
            "directory through a symlink",
            Tar::new().symlink("a", "..").dir("a/evil").end(),
            "out of the layer",
        ),
        ("file as directory", Tar::new().file("a", "x").file("a/b", "x").end(), "not a directory"),
        ("root as file", Tar::new().file("./", "x").end(), "must be a directory"),
        ("deep", Tar::new().pax(&[("path", deep.as_bytes())]).file("x", "").end(), "deeper"),
        ("long", Tar::new().pax(&[("path", long.as_bytes())]).file("x", "").end(), "255"),
        ("NUL", Tar::new().pax(&[("path", b"a\0b")]).file("x", "").end(), "NUL"),
        (
            "overlay attribute",
            Tar::new().pax(&[("SCHILY.xattr.trusted.overlay.redirect", b"/")]).dir("a").end(),
            "overlayfs",
        ),
        ("truncated", Tar::new().file("a", "0123456789").out[..514].to_vec(), "middle"),
        ("cut header", Tar::new().file("a", "0123456789").out[..100].to_vec(), "middle"),
        ("noise", vec![7; 2048], "checksum"),
        (
            "unknown type",
            Tar::new().header(&Header { path: b"a", kind: b'M', ..Header::default() }).end(),
            "unknown type",
        ),
        (
            "huge pax header",
            Tar::new().header(&Header { kind: b'x', size: 1 << 30, ..Header::default() }).end(),
            "1 MiB",
        ),
        (
            "pax nonsense",
            Tar::new()
                .header(&Header { kind: b'x', size: 3, ..Header::default() })
                .data(b"9 x")
                .file("a", "")
                .end(),
            "PAX",
        ),
    ];
    for (name, archive, part) in cases {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("outside"), "kept").unwrap();
        let error = unpack_to(&dir.path().join("layer"), &archive).expect_err(name);
        let text = crate::error::chain(&error);
        assert!(text.contains(part), "{name}: {text}");
        let outside = std::fs::read_to_string(dir.path().join("outside")).unwrap();
        assert_eq!(outside, "kept", "{name}");
        let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(names.len(), 2, "{name}: something is outside the layer");
    }
    assert!(!Path::new("/evil").exists());
}

#[test]
fn what_points_out_may_be_said_but_not_followed() {
    let archive = Tar::new()
        .symlink("up", "../../../etc")
        .symlink("root", "/etc/passwd")
        // A file in the place of a link replaces the link.
        .file("root", "mine")
        .end();
    let (dir, _) = unpacked(&archive);
    let layer = dir.path().join("layer");
    assert_eq!(std::fs::read_link(layer.join("up")).unwrap(), Path::new("../../../etc"));
    assert_eq!(std::fs::read_to_string(layer.join("root")).unwrap(), "mine");
    assert!(!std::fs::read_to_string("/etc/passwd").unwrap().contains("mine"));
}

#[test]
fn links_inside_the_layer_are_followed() {
    let archive = Tar::new().dir("usr/lib").symlink("lib", "usr/lib").file("lib/a", "x").end();
    let (dir, _) = unpacked(&archive);
    assert_eq!(std::fs::read_to_string(dir.path().join("layer/usr/lib/a")).unwrap(), "x");
}

#[test]
fn attributes_are_exact() {
    let capability =
        b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let archive = Tar::new()
        .header(&Header {
            path: b"./",
            kind: b'5',
            mode: 0o1750,
            uid: 7,
            gid: 8,
            ..Header::default()
        })
        .header(&Header {
            path: b"d/",
            kind: b'5',
            mode: 0o2775,
            gid: 50,
            mtime: 5,
            ..Header::default()
        })
        .header(&Header {
            path: b"d/setuid",
            mode: 0o6755,
            uid: 1000,
            gid: 1001,
            ..Header::default()
        })
        .pax(&[
            ("mtime", b"1234567890.123456789"),
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.user.note", b"a\0b\n"),
            ("SCHILY.xattr.security.selinux", b"u:r:t:s0"),
            ("uid", b"3000000000"),
        ])
        .file("d/ping", "data")
        .pax(&[("mtime", b"-1.25")])
        .symlink("d/link", "ping")
        .header(&Header {
            path: b"null",
            kind: b'3',
            mode: 0o666,
            device: (1, 3),
            ..Header::default()
        })
        .header(&Header {
            path: b"block",
            kind: b'4',
            mode: 0o660,
            device: (259, 300),
            ..Header::default()
        })
        .header(&Header { path: b"fifo", kind: b'6', mode: 0o600, uid: 2, ..Header::default() })
        .hard_link("d/again", "d/ping")
        .pax(&[("path", b"caf\xe9 \xff\n")])
        .file("x", "latin")
        .end();
    let (dir, done) = unpacked(&archive);
    let layer = dir.path().join("layer");
    let meta = |path: &str| std::fs::symlink_metadata(layer.join(path)).unwrap();
    assert_eq!((meta("").mode() & 0o7777, meta("").uid(), meta("").gid()), (0o1750, 7, 8));
    assert_eq!((meta("d").mode() & 0o7777, meta("d").gid(), meta("d").mtime()), (0o2775, 50, 5));
    let setuid = meta("d/setuid");
    assert_eq!((setuid.mode() & 0o7777, setuid.uid(), setuid.gid()), (0o6755, 1000, 1001));
    let ping = meta("d/ping");
    assert_eq!((ping.mtime(), ping.mtime_nsec()), (1_234_567_890, 123_456_789));
    assert_eq!((ping.uid(), ping.gid(), ping.nlink()), (3_000_000_000, 0, 2));
    assert_eq!(ping.ino(), meta("d/again").ino());
    let attribute = |name: &str| {
        let mut value = vec![0; 100];
        let length = rustix::fs::getxattr(layer.join("d/ping"), name, &mut value)?;
        value.truncate(length);
        Ok::<_, Errno>(value)
    };
    assert_eq!(attribute("security.capability").unwrap(), capability);
    assert_eq!(attribute("user.note").unwrap(), b"a\0b\n");
    assert_eq!(attribute("security.selinux"), Err(Errno::NODATA));
    assert_eq!((meta("d/link").mtime(), meta("d/link").mtime_nsec()), (-2, 750_000_000));
    assert_eq!(meta("null").rdev(), rustix::fs::makedev(1, 3));
    assert_eq!(meta("null").mode(), 0o020_666);
    assert_eq!(meta("block").rdev(), rustix::fs::makedev(259, 300));
    assert_eq!((meta("fifo").mode(), meta("fifo").uid()), (0o010_600, 2));
    let odd = layer.join(OsStr::from_bytes(b"caf\xe9 \xff\n"));
    assert_eq!(std::fs::read(odd).unwrap(), b"latin");
    assert!(done.root_listed && done.implied.is_empty());
    assert_eq!(done.inodes, 8);
}

#[test]
fn whiteouts_and_opaque_directories_take_overlayfs_form() {
    let archive = Tar::new()
        .dir("d")
        .file("d/.wh.gone", "")
        .dir("o")
        .file("o/kept", "x")
        .file("o/.wh..wh..opq", "")
        // The directory is new, what was below it is gone: in either order.
        .file(".wh.first", "")
        .dir("first")
        .dir("second")
        .file("second/x", "")
        .file(".wh.second", "")
        .file("file", "x")
        .file(".wh.file", "")
        .file(".wh.other", "")
        .file("other/in", "x")
        .file(".wh..wh.plnk", "")
        .file(".wh.twice", "")
        .file(".wh.twice", "")
        .end();
    let (dir, done) = unpacked(&archive);
    let layer = dir.path().join("layer");
    assert!(is_whiteout(&layer.join("d/gone")));
    assert!(is_opaque(&layer.join("o")) && layer.join("o/kept").exists());
    assert!(is_opaque(&layer.join("first")) && layer.join("first").is_dir());
    assert!(is_opaque(&layer.join("second")) && layer.join("second/x").exists());
    assert!(layer.join("file").is_file());
    assert!(is_opaque(&layer.join("other")) && layer.join("other/in").exists());
    assert!(is_whiteout(&layer.join("twice")));
    assert!(!is_opaque(&layer.join("d")));
    let names = std::fs::read_dir(&layer).unwrap().map(|e| e.unwrap().file_name());
    let names: Vec<String> = names.map(|n| n.into_string().unwrap()).collect();
    assert!(names.iter().all(|name| !name.starts_with(".wh")), "{names:?}");
    // It is hidden below: nothing to take from there.
    assert!(done.implied.is_empty(), "{:?}", done.implied);
}

#[test]
fn a_later_entry_replaces_an_earlier_one() {
    let archive = Tar::new()
        .file("a", "first")
        .file("a", "second")
        .file("b", "x")
        .dir("b")
        .file("b/in", "x")
        .dir("c")
        .file("c/in", "x")
        .file("c", "now a file")
        .dir("d/sub")
        .file("d/sub/one", "1")
        .symlink("d", "b")
        .file("d/two", "2")
        .dir("e")
        .file("e/kept", "x")
        .header(&Header { path: b"e/", kind: b'5', mode: 0o700, ..Header::default() })
        .file("target", "t")
        .file("name", "n")
        .hard_link("name", "target")
        .hard_link("name", "target")
        .end();
    let (dir, _) = unpacked(&archive);
    let layer = dir.path().join("layer");
    let text = |path: &str| std::fs::read_to_string(layer.join(path)).unwrap();
    assert_eq!(text("a"), "second");
    assert!(layer.join("b/in").exists() && is_opaque(&layer.join("b")));
    assert_eq!(text("c"), "now a file");
    assert_eq!(text("b/two"), "2");
    assert!(layer.join("e/kept").exists());
    assert_eq!(layer.join("e").metadata().unwrap().permissions().mode() & 0o7777, 0o700);
    assert_eq!(text("name"), "t");
    assert_eq!(layer.join("target").metadata().unwrap().nlink(), 2);
}

#[test]
fn directories_that_are_implied_are_reported_parents_first() {
    let archive = Tar::new().file("usr/share/doc/a", "x").dir("usr").file("b/.wh.x", "").end();
    let (dir, done) = unpacked(&archive);
    let names: Vec<&str> = done.implied.iter().map(|p| p.to_str().unwrap()).collect();
    assert_eq!(names, ["b", "usr/share", "usr/share/doc"]);
    assert!(!done.root_listed);
    let mode = |path: &str| dir.path().join("layer").join(path).metadata().unwrap().mode() & 0o7777;
    assert_eq!((mode("b"), mode("usr/share"), mode("")), (0o755, 0o755, 0o755));
}

#[test]
fn padding_and_missing_end_blocks_are_accepted() {
    for tail in [0, 512, 1024, 10_240] {
        let mut archive = Tar::new().file("a", "x").out;
        archive.resize(archive.len() + tail, 0);
        assert!(unpacked(&archive).0.path().join("layer/a").exists(), "{tail}");
    }
    assert_eq!(unpacked(&[]).1.inodes, 0);
}

/// A tree of all that a layer can have, with random names, sizes and attributes.
fn random_tree(dir: &Path, random: &mut rand::rngs::StdRng) {
    let mut directories = vec![dir.to_owned()];
    let mut files: Vec<std::path::PathBuf> = Vec::new();
    for number in 0..120 {
        let parent = directories[random.random_range(0..directories.len())].clone();
        let mut name = match random.random_range(0..6) {
            0 => format!("{number}-{}", "long".repeat(random.random_range(20..60))).into_bytes(),
            1 => format!("{number} sp\u{e9}cial").into_bytes(),
            _ => format!("n{number}").into_bytes(),
        };
        if random.random_range(0..10) == 0 {
            name.push(0xfe);
        }
        let path = parent.join(OsStr::from_bytes(&name));
        if path.as_os_str().len() > 3000 {
            continue;
        }
        match random.random_range(0..12) {
            0..=2 => {
                std::fs::create_dir(&path).unwrap();
                directories.push(path.clone());
            }
            3 => {
                let target = "t/".repeat(random.random_range(1..90));
                std::os::unix::fs::symlink(target, &path).unwrap();
            }
            4 if !files.is_empty() => {
                let old = &files[random.random_range(0..files.len())];
                std::fs::hard_link(old, &path).unwrap();
                continue;
            }
            5 => rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
                .unwrap(),
            6 => {
                let device =
                    rustix::fs::makedev(random.random_range(1..500), random.random_range(0..2000));
                let mode = Mode::from_raw_mode(0o600);
                let kind = [FileType::CharacterDevice, FileType::BlockDevice];
                let kind = kind[random.random_range(0..2)];
                rustix::fs::mknodat(CWD, &path, kind, mode, device).unwrap();
            }
            7 => {
                // Data, a hole, data, and a hole at the end.
                let file = std::fs::File::create(&path).unwrap();
                file.write_all_at(&[1; 5000], 0).unwrap();
                for piece in 1..random.random_range(1..40u64) {
                    file.write_all_at(&[piece as u8; 4096], piece * 30_000).unwrap();
                }
                file.set_len(1_400_000).unwrap();
                files.push(path.clone());
            }
            _ => {
                let length = random.random_range(0..20_000);
                let data: Vec<u8> = (0..length).map(|_| random.random()).collect();
                std::fs::write(&path, data).unwrap();
                files.push(path.clone());
            }
        }
        let is_link = path.is_symlink();
        let owner = |random: &mut rand::rngs::StdRng| match random.random_range(0..4) {
            0 => random.random_range(2_097_152..4_000_000_000u32),
            1 => 0,
            _ => random.random_range(0..70_000),
        };
        std::os::unix::fs::lchown(&path, Some(owner(random)), Some(owner(random))).unwrap();
        if !is_link {
            let mode = random.random_range(0..0o10000) | 0o400;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        if path.is_file() && random.random_range(0..3) == 0 {
            let value: Vec<u8> =
                (0..random.random_range(1..200)).map(|_| random.random()).collect();
            rustix::fs::setxattr(&path, "user.random", &value, XattrFlags::empty()).unwrap();
            // cap_net_bind_service+ep (linux/capability.h, struct vfs_cap_data)
            let mut capability = [0; 20];
            (capability[0], capability[3], capability[5]) = (1, 2, 4);
            let name = "security.capability";
            rustix::fs::setxattr(&path, name, &capability, XattrFlags::empty()).unwrap();
        }
        let seconds = random.random_range(0..8_000_000_000);
        let time = Timespec { tv_sec: seconds, tv_nsec: random.random_range(0..1_000_000_000) };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
    for directory in directories {
        let time = Timespec { tv_sec: 1_600_000_000, tv_nsec: 42 };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, &directory, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

fn gnu_tar(dir: &Path, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new("tar")
        .args(["--numeric-owner", "--sort=name", "-C"])
        .arg(dir)
        .args(arguments)
        .args(["-cf", "-", "."])
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success());
    output.stdout
}

/// What GNU tar makes of an archive.
fn gnu_untar(into: &Path, archive: &[u8]) {
    std::fs::create_dir(into).unwrap();
    let mut tar = Command::new("tar")
        .args(["--numeric-owner", "--same-owner", "-pxf", "-", "-C"])
        .arg(into)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    tar.stdin.take().unwrap().write_all(archive).unwrap();
    assert!(tar.wait().unwrap().success());
}

#[test]
fn names_that_come_again_are_what_gnu_tar_makes_of_them() {
    for (seed, format) in ["posix", "gnu", "oldgnu", "ustar", "v7"].into_iter().enumerate() {
        let mut random = rand::rngs::StdRng::seed_from_u64(seed as u64);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("archive");
        for round in 0..6 {
            let tree = dir.path().join(format!("tree-{round}"));
            std::fs::create_dir(&tree).unwrap();
            for number in 0..12 {
                // 100 bytes and more are ustar's prefix; v7, and links of ustar, have no room for them.
                let long = if format == "v7" || number % 2 == 0 { 40 } else { 90 };
                let at = tree.join(format!("{number}-{}", "n".repeat(long)));
                match random.random_range(0..6) {
                    0 => std::fs::create_dir(&at).unwrap(),
                    1 => std::os::unix::fs::symlink(format!("to-{round}"), &at).unwrap(),
                    2 if format != "v7" => {
                        let mode = Mode::from_raw_mode(0o600);
                        rustix::fs::mknodat(CWD, &at, FileType::Fifo, mode, 0).unwrap();
                    }
                    3 if number % 2 == 0 => {
                        let other = tree.join("other");
                        std::fs::write(&other, format!("linked {round}")).unwrap();
                        std::fs::hard_link(&other, &at).unwrap();
                        std::fs::remove_file(other).unwrap();
                        std::fs::hard_link(&at, tree.join(format!("0{number}"))).unwrap();
                    }
                    _ => std::fs::write(&at, format!("{number} {round}")).unwrap(),
                }
                let time = Timespec { tv_sec: random.random_range(0..1 << 30), tv_nsec: 0 };
                let times = Timestamps { last_access: time, last_modification: time };
                rustix::fs::utimensat(CWD, &at, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
            }
            let status = Command::new("tar")
                .args(["--numeric-owner", "--sort=name", "--format", format, "-C"])
                .arg(&tree)
                .args(["--transform=s,^\\./,somewhere/else/,", "-rf"])
                .arg(&path)
                .arg(".")
                .status()
                .unwrap();
            assert!(status.success());
        }
        let archive = std::fs::read(&path).unwrap();
        let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
        unpack_to(&ours, &archive).unwrap();
        gnu_untar(&theirs, &archive);
        let seen = |listing: std::collections::BTreeMap<String, String>| {
            let mut seen = listing;
            // Nobody's: the archive implies them, and each gives them what it likes.
            seen.retain(|path, _| {
                !matches!(path.as_str(), "\"\"" | "\"somewhere\"" | "\"somewhere/else\"")
            });
            for text in seen.values_mut() {
                // What was something else hides what is below.
                *text = text.replace(" \"trusted.overlay.opaque\"=79", "");
            }
            assert!(seen.len() >= 12);
            seen
        };
        let theirs = seen(listing(&theirs));
        pretty(&seen(listing(&ours)), &theirs, format);
        pretty(&seen(image_listing(&archive).unwrap()), &theirs, &format!("image of {format}"));
    }
}

#[test]
fn what_gnu_tar_archives_comes_out_the_same() {
    let attributes = ["--xattrs", "--xattrs-include=*"];
    for seed in 0..3 {
        let mut random = rand::rngs::StdRng::seed_from_u64(seed);
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        random_tree(&tree, &mut random);
        let want = listing(&tree);
        for (number, format) in [
            &["--format=posix"][..],
            &["--format=posix", "--sparse", "--sparse-version=0.0"],
            &["--format=posix", "--sparse", "--sparse-version=0.1"],
            &["--format=posix", "--sparse", "--sparse-version=1.0"],
        ]
        .iter()
        .enumerate()
        {
            let archive = gnu_tar(&tree, &[&attributes[..], format].concat());
            let out = dir.path().join(format!("out-{number}"));
            unpack_to(&out, &archive).unwrap();
            pretty(&listing(&out), &want, &format!("{format:?}, seed {seed}"));
            let image = image_listing(&archive).unwrap();
            pretty(&image, &want, &format!("image of {format:?}, seed {seed}"));
        }
        // The old format knows neither nanoseconds nor attributes: GNU tar itself is the measure.
        for (number, format) in
            [&["--format=gnu"][..], &["--format=gnu", "--sparse"], &["--format=oldgnu"]]
                .iter()
                .enumerate()
        {
            let archive = gnu_tar(&tree, format);
            let (ours, theirs) = (
                dir.path().join(format!("ours-{number}")),
                dir.path().join(format!("theirs-{number}")),
            );
            unpack_to(&ours, &archive).unwrap();
            gnu_untar(&theirs, &archive);
            let theirs = listing(&theirs);
            pretty(&listing(&ours), &theirs, &format!("{format:?}, seed {seed}"));
            let image = image_listing(&archive).unwrap();
            pretty(&image, &theirs, &format!("image of {format:?}, seed {seed}"));
        }
    }
}

/// Compares two listings and shows only what differs.
pub(in super::super) fn pretty(
    got: &std::collections::BTreeMap<String, String>,
    want: &std::collections::BTreeMap<String, String>,
    what: &str,
) {
    let mut difference = String::new();
    for path in got.keys().chain(want.keys()) {
        if got.get(path) != want.get(path) {
            difference +=
                &format!("{path}\n  got  {:?}\n  want {:?}\n", got.get(path), want.get(path));
        }
    }
    assert!(difference.is_empty(), "{what}:\n{difference}");
}

#[test]
fn holes_stay_holes() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    let file = std::fs::File::create(tree.join("sparse")).unwrap();
    file.write_all_at(b"end", 200 << 20).unwrap();
    drop(file);
    for format in ["--format=gnu", "--format=posix"] {
        let archive = gnu_tar(&tree, &["--sparse", format]);
        assert!(archive.len() < 100_000);
        let (out, _) = unpacked(&archive);
        let meta = out.path().join("layer/sparse").metadata().unwrap();
        assert_eq!(meta.len(), (200 << 20) + 3);
        assert!(meta.blocks() < 100, "{}", meta.blocks());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever comes: no panic, and the reader ends.
    #[test]
    fn any_bytes_are_read_or_refused(
        start in prop::collection::vec(any::<u8>(), 0..2000),
        changes in prop::collection::vec((0usize..8192, any::<u8>()), 0..12),
        fix in any::<bool>(),
    ) {
        let mut archive = Tar::new()
            .pax(&[("path", b"a/b"), ("mtime", b"1.5"), ("SCHILY.xattr.user.a", b"v")])
            .file("x", &start)
            .dir("d")
            .symlink("s", "d")
            .hard_link("h", "a/b")
            .header(&Header { path: b"sp", kind: b'S', ..Header::default() })
            .end();
        for (at, byte) in &changes {
            let length = archive.len();
            archive[at % length] = *byte;
        }
        if fix {
            // With right checksums the damage goes deeper.
            for block in archive.chunks_exact_mut(512) {
                if &block[257..262] == b"ustar" {
                    block[148..156].copy_from_slice(b"        ");
                    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
                    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
                }
            }
        }
        for source in [&archive[..], &start[..]] {
            let mut reader = Archive::new(BufReader::with_capacity(513, source));
            while let Ok(Some(entry)) = reader.entry() {
                let mut taken = 0;
                while reader.data(u64::MAX, |data| {
                    taken += data.len() as u64;
                    Ok::<_, tar::Error>(data.len())
                }).unwrap_or(false) {}
                prop_assert!(taken <= entry.size);
            }
        }
    }

    /// What is written is what is read, whatever the names.
    #[test]
    fn names_and_data_survive(
        path in prop::collection::vec(1u8.., 1..300),
        data in prop::collection::vec(any::<u8>(), 0..3000),
        seconds in -5_000_000_000i64..5_000_000_000,
    ) {
        let archive = Tar::new()
            .pax(&[("path", &path), ("mtime", seconds.to_string().as_bytes())])
            .file("x", &data)
            .end();
        let mut reader = Archive::new(BufReader::with_capacity(100, &archive[..]));
        let entry = reader.entry().unwrap().unwrap();
        prop_assert_eq!(&entry.path, &path);
        prop_assert_eq!(entry.mtime.seconds, seconds);
        let mut read = Vec::new();
        while reader.data(u64::MAX, |piece| {
            read.extend_from_slice(piece);
            Ok::<_, tar::Error>(piece.len())
        }).unwrap() {}
        prop_assert_eq!(read, data);
        prop_assert!(reader.entry().unwrap().is_none());
        let mut rest = Vec::new();
        reader.finish().unwrap().0.read_to_end(&mut rest).unwrap();
        prop_assert!(rest.is_empty());
    }
}

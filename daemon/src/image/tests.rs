//! Pulling, keeping and mounting, against registries on loopback. Needs root.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use hyper::Response;
use serde_json::json;

use super::{
    testing::{
        FakeRegistry, GZIP, Header, INDEX, MANIFEST, Tar, TestImage, broken, digest, full, gzip,
        listing, response,
    },
    *,
};
use crate::{error::chain, pod::config::IdMapping};

/// An image store in a directory of its own.
pub(super) struct Node {
    pub(super) dir: tempfile::TempDir,
    pub(super) images: Images,
}

fn config(dir: &Path) -> config::Images {
    config::Images {
        hosts_dir: dir.join("certs.d"),
        registries_conf: None,
        auth_file: None,
        policy: None,
        insecure_registries: Vec::new(),
        max_parallel_layers: 4,
        stall_timeout: Duration::from_millis(1500),
        pull_timeout: Duration::from_secs(120),
        max_layer_size: 64 << 20,
        layer_format: config::LayerFormat::Directories,
    }
}

impl Node {
    pub(super) async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub(super) async fn of(format: config::LayerFormat) -> Self {
        Self::with(|config| config.layer_format = format).await
    }

    pub(super) async fn with(change: impl Fn(&mut config::Images)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path());
        change(&mut config);
        let images = open(dir.path(), config).await;
        Self { dir, images }
    }

    /// As after a crash of the daemon: nothing is told to the one before.
    pub(super) async fn again(self) -> Self {
        let Self { dir, images } = self;
        let config = images.shared.config.clone();
        drop(images);
        let images = open(dir.path(), config).await;
        images.flush().await;
        Self { dir, images }
    }

    pub(super) fn hosts(&self, registry: &str, text: &str) {
        let dir = self.dir.path().join("certs.d").join(registry);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("hosts.toml"), text).unwrap();
    }

    /// A file in the node's own directory.
    pub(super) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join(name), text).unwrap();
    }

    /// Everything in the store's directories.
    pub(super) fn files(&self) -> std::collections::BTreeMap<String, String> {
        let mut all = listing(&self.dir.path().join("images"));
        // Times of the directories themselves change with each attempt.
        for name in ["\"\"", "\"layers\"", "\"recipes\"", "\"ingest\"", "\"snapshots\""] {
            all.remove(name);
        }
        all
    }

    pub(super) async fn pull(&self, reference: &str) -> Result<Arc<Image>, Error> {
        self.images.pull(reference, None, None).await
    }

    /// The pull fails, says `part`, and the node is as before.
    pub(super) async fn refuses(&self, reference: &str, part: &str) -> Kind {
        let (files, list) = (self.files(), self.images.list().len());
        let usage = self.images.fs_usage();
        let error = self.pull(reference).await.expect_err(part);
        let text = chain(&error);
        assert!(text.contains(part), "{part}: {text}");
        assert_eq!(self.files(), files, "{part}: something was left behind");
        assert_eq!(self.images.list().len(), list, "{part}");
        assert_eq!(self.images.fs_usage(), usage, "{part}");
        error.kind()
    }
}

/// The layers' archives, made again.
pub(super) fn archives(image: &Image) -> Vec<Vec<u8>> {
    let again = |layer: Arc<layers::Layer>| {
        let mut archive = Vec::new();
        let mut rebuilt = layer.archive().unwrap();
        std::io::Read::read_to_end(&mut rebuilt, &mut archive).map(|_| archive).unwrap()
    };
    image.hold_layers().into_iter().map(again).collect()
}

async fn open(dir: &Path, config: config::Images) -> Images {
    let store = Store::open_beside(&dir.join("db")).unwrap();
    let registries = Registries::new(config.clone()).with_back_off(Duration::from_millis(10));
    Images::open_with(&dir.join("images"), config, store, registries).await.unwrap()
}

pub(super) fn auth(username: &str, password: &str) -> Option<Auth> {
    Some(Auth { username: username.into(), password: password.into(), ..Auth::default() })
}

pub(super) fn base() -> Vec<u8> {
    Tar::new()
        .header(&Header { path: b"./", kind: b'5', mode: 0o750, uid: 3, ..Header::default() })
        .dir("etc")
        .file("etc/passwd", "root:x:0:0::/root:/bin/sh\n")
        .dir("bin")
        .file("bin/sh", vec![7; 300_000])
        .end()
}

pub(super) fn layer(name: &str) -> Vec<u8> {
    Tar::new().dir("etc").file(&format!("etc/{name}"), name).end()
}

#[tokio::test]
async fn a_pulled_image_is_found_by_all_its_names_and_survives_a_restart() {
    let registry = FakeRegistry::start().await;
    let plain = [base(), layer("one"), layer("two"), layer("three")];
    let image = TestImage::new(&plain);
    registry.put("a/b", "1", &image);
    let node = Node::new().await;
    let name = registry.reference("a/b:1");
    let pulled = node.pull(&name).await.unwrap();
    assert_eq!(pulled.id, image.id());
    assert_eq!(pulled.names, [&*name]);
    let by_digest = registry.reference(&format!("a/b@{}", digest(&image.manifest)));
    assert_eq!(pulled.digests, [&*by_digest]);
    assert_eq!(pulled.defaults.user, "1000");
    assert_eq!(pulled.defaults.labels["label"], "test");
    let sum: usize = image.layers.iter().map(Vec::len).sum();
    assert_eq!(pulled.size as usize, sum + image.config.len() + image.manifest.len());

    let node = node.again().await;
    let id = image.id();
    let both = format!("{name}@{}", digest(&image.manifest));
    for text in [&name, &by_digest, &both, &id.to_string(), &id.hex(), &id.hex()[..6].to_owned()] {
        let found = node.images.find(text).unwrap_or_else(|| panic!("{text}"));
        assert_eq!(found.id, id);
        assert_eq!((&found.names, &found.digests), (&pulled.names, &pulled.digests));
        assert_eq!((found.size, &found.defaults), (pulled.size, &pulled.defaults));
    }
    for text in ["", "sha256:", &id.hex()[..5], "other", "a/b:1", &"0".repeat(64)] {
        assert!(node.images.find(text).is_none(), "{text}");
    }
    let config = node.images.raw_config(&pulled).await.unwrap();
    assert_eq!(config.as_bytes(), image.config);
    assert!(archives(&node.images.find(&name).unwrap()) == plain, "other archives came back");
    assert!(node.images.fs_usage().used_bytes > 300_000);

    // A restart finds everything: nothing is asked for again but the name.
    registry.forget_log();
    node.pull(&name).await.unwrap();
    node.pull(&by_digest).await.unwrap();
    let log = registry.log();
    assert_eq!(log.len(), 2, "{log:?}");
    assert!(log.iter().all(|line| line.starts_with("HEAD ")), "{log:?}");
}

#[tokio::test]
async fn a_container_sees_its_image_and_writes_beside_it() {
    a_container_sees(config::LayerFormat::Directories).await;
}

#[tokio::test]
async fn a_container_sees_its_image_and_writes_beside_it_of_erofs_layers() {
    a_container_sees(config::LayerFormat::Erofs).await;
}

async fn a_container_sees(format: config::LayerFormat) {
    let registry = FakeRegistry::start().await;
    let top = Tar::new()
        .dir("etc")
        .file("etc/.wh.gone", "")
        .file("etc/group", "wheel:x:0:\n")
        .dir("opaque")
        .file("opaque/.wh..wh..opq", "")
        .symlink("etc/alias", "/etc/passwd")
        .end();
    let middle =
        Tar::new().dir("etc").file("etc/gone", "x").dir("opaque").file("opaque/x", "").end();
    registry.put("a", "1", &TestImage::new(&[base(), middle, top]));
    let node = Node::of(format).await;
    let image = node.pull(&registry.reference("a:1")).await.unwrap();
    let id = ContainerId::random();
    let snapshot = node.images.create_snapshot(&id, &image).await.unwrap();
    node.images.create_snapshot(&id, &image).await.unwrap();
    assert_eq!(node.images.snapshots(), std::slice::from_ref(&id));

    let mounted = snapshot.mount(false).unwrap();
    let read = |path: &str| mounted.read(path, 1000).unwrap();
    assert!(read("/etc/passwd").unwrap().starts_with(b"root:"));
    assert_eq!(read("etc/alias"), read("/etc/passwd"));
    assert_eq!(read("etc/group").unwrap(), b"wheel:x:0:\n");
    for gone in ["etc/gone", "opaque/x", "nothing", "etc/passwd/below"] {
        assert_eq!(read(gone), None, "{gone}");
    }
    assert!(mounted.read("etc/passwd", 3).is_err());
    assert!(mounted.read("etc", 3).is_err());
    let target = node.dir.path().join("rootfs");
    std::fs::create_dir(&target).unwrap();
    mounted.attach(&target).unwrap();
    let meta = target.metadata().unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o750, 3));
    std::fs::write(target.join("etc/new"), vec![1; 10_000]).unwrap();
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::empty()).unwrap();
    assert!(snapshot.upper().join("etc/new").exists());
    let (bytes, inodes) = snapshot.usage().unwrap();
    assert!(bytes >= 10_000 && inodes == 2, "{bytes} {inodes}");

    // Read-only: nothing can be written, and what was written before is there.
    let readonly = snapshot.mount(true).unwrap();
    readonly.attach(&target).unwrap();
    assert!(target.join("etc/new").exists());
    assert!(std::fs::write(target.join("x"), "").is_err());
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::empty()).unwrap();

    let node = node.again().await;
    assert!(node.images.snapshot(&id).unwrap().upper().join("etc/new").exists());
    node.images.remove_snapshot(&id).await.unwrap();
    node.images.remove_snapshot(&id).await.unwrap();
    assert!(node.images.snapshot(&id).is_none());
    assert!(!node.dir.path().join("images/snapshots").join(&id).exists());
}

#[tokio::test]
async fn what_a_container_changed_is_put_into_another() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let registry = FakeRegistry::start().await;
    let tar = Tar::new().dir("etc").file("etc/gone", "x").file("etc/kept", "k").dir("made-anew");
    let tar = tar.file("made-anew/old", "o").file("made-anew/both", "old").dir("gone-too");
    registry.put("a", "1", &TestImage::new(&[tar.file("gone-too/x", "x").end()]));
    let node = Node::new().await;
    let image = node.pull(&registry.reference("a:1")).await.unwrap();
    let [from, to] = [ContainerId::random(), ContainerId::random()];
    let attached = |name: &str, mounted: Mounted| {
        let target = node.dir.path().join(name);
        std::fs::create_dir(&target).unwrap();
        mounted.attach(&target).unwrap();
        target
    };

    let snapshot = node.images.create_snapshot(&from, &image).await.unwrap();
    let root = attached("from", snapshot.mount(false).unwrap());
    std::fs::remove_file(root.join("etc/gone")).unwrap();
    std::fs::remove_dir_all(root.join("gone-too")).unwrap();
    std::fs::remove_dir_all(root.join("made-anew")).unwrap();
    std::fs::create_dir(root.join("made-anew")).unwrap();
    std::fs::write(root.join("made-anew/both"), "new").unwrap();
    let deep = root.join("n".repeat(200)).join("m".repeat(200));
    std::fs::create_dir_all(&deep).unwrap();
    let file = deep.join("l".repeat(150));
    std::fs::write(&file, vec![7; 100_000]).unwrap();
    std::os::unix::fs::chown(&file, Some(3_000_000), Some(7)).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o4755)).unwrap();
    rustix::fs::setxattr(&file, "user.binary", b"a\0=\n", rustix::fs::XattrFlags::empty()).unwrap();
    std::fs::hard_link(&file, root.join("etc/same")).unwrap();
    symlink("l".repeat(300), root.join("etc/link")).unwrap();
    std::fs::set_permissions(root.join("etc"), std::fs::Permissions::from_mode(0o711)).unwrap();

    let mut changes = Vec::new();
    let ids = diff::Ids::default();
    let mut deleted = snapshot.write_changes(&mut changes, &ids, &|| Ok(())).unwrap();
    deleted.sort();
    let paths = ["/etc/gone", "/gone-too", "/made-anew/old"];
    assert_eq!(deleted, paths.map(std::path::PathBuf::from));
    // In the ids of a user namespace.
    let range = |host_id| vec![IdMapping { host_id, container_id: 1000, length: 10 }];
    let ids = diff::Ids { uids: range(2_999_999), gids: range(0) };
    let mut mapped = Vec::new();
    snapshot.write_changes(&mut mapped, &ids, &|| Ok(())).unwrap();
    let mut archive = super::tar::Archive::new(&mapped[..]);
    let mut owners = Vec::new();
    while let Some(entry) = archive.entry().unwrap() {
        if entry.size == 100_000 {
            owners.push((entry.uid, entry.gid));
        }
    }
    assert_eq!(owners, [(1001, 1007)]);
    // It ends when it is told to.
    let late = || Err(io::Error::new(io::ErrorKind::TimedOut, "late"));
    let error = snapshot.write_changes(io::sink(), &ids, &late).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);

    for changes in [changes.clone(), gzip(&changes)] {
        let snapshot = node.images.create_snapshot(&to, &image).await.unwrap();
        snapshot.apply_changes(&to, &changes[..]).unwrap();
        let mounted = snapshot.mount(false).unwrap();
        diff::remove_deleted(&mounted, &deleted).unwrap();
        let copy = attached("to", mounted);
        assert_eq!(listing(&copy), listing(&root));
        let copied = copy.join(file.strip_prefix(&root).unwrap());
        let mut value = [0; 16];
        let length = rustix::fs::getxattr(&copied, "user.binary", &mut value).unwrap();
        assert_eq!(&value[..length], b"a\0=\n");
        let same = copy.join("etc/same").metadata().unwrap().ino();
        assert_eq!(copied.metadata().unwrap().ino(), same);
        rustix::mount::unmount(&copy, rustix::mount::UnmountFlags::empty()).unwrap();
        std::fs::remove_dir(&copy).unwrap();
        node.images.remove_snapshot(&to).await.unwrap();
    }
    rustix::mount::unmount(&root, rustix::mount::UnmountFlags::empty()).unwrap();
    // What is no archive is an error, and not an empty change.
    let snapshot = node.images.create_snapshot(&to, &image).await.unwrap();
    snapshot.apply_changes(&to, &b"no archive at all, although it is long enough"[..]).unwrap_err();
}

#[tokio::test]
async fn an_image_without_layers_and_one_with_the_same_layer_twice_can_be_mounted() {
    without_layers_and_twice(config::LayerFormat::Directories).await;
}

#[tokio::test]
async fn an_image_without_layers_and_one_with_the_same_layer_twice_can_be_mounted_of_erofs_layers()
{
    without_layers_and_twice(config::LayerFormat::Erofs).await;
}

async fn without_layers_and_twice(format: config::LayerFormat) {
    let registry = FakeRegistry::start().await;
    registry.put("none", "1", &TestImage::new(&[]));
    let (a, b) = (layer("a"), Tar::new().dir("etc").file("etc/.wh.a", "").end());
    registry.put("twice", "1", &TestImage::new(&[a.clone(), b.clone(), a.clone(), b, a]));
    let node = Node::of(format).await;
    for (name, found) in [("none:1", None), ("twice:1", Some(b"a".to_vec()))] {
        let image = node.pull(&registry.reference(name)).await.unwrap();
        let id = ContainerId::random();
        let snapshot = node.images.create_snapshot(&id, &image).await.unwrap();
        assert_eq!(snapshot.mount(false).unwrap().read("etc/a", 10).unwrap(), found);
    }
}

#[tokio::test]
async fn layers_are_shared_and_go_with_the_last_that_needs_them() {
    let registry = FakeRegistry::start().await;
    let one = TestImage::labelled(&[base(), layer("one")], "one");
    let two = TestImage::labelled(&[base(), layer("two")], "two");
    registry.put("a", "1", &one);
    registry.put("a", "2", &two);
    let node = Node::new().await;
    let empty = node.files();
    let first = node.pull(&registry.reference("a:1")).await.unwrap();
    registry.forget_log();
    let second = node.pull(&registry.reference("a:2")).await.unwrap();
    assert_eq!(first.layers()[0], second.layers()[0]);
    let blobs = registry.log().iter().filter(|line| line.contains("/blobs/")).count();
    assert_eq!(blobs, 2, "only the config and the layer that is new: {:?}", registry.log());
    let directories = |node: &Node| {
        let mut names = layers::numbered(&node.dir.path().join("images/layers")).unwrap();
        names.sort_unstable();
        names
    };
    assert_eq!(directories(&node).len(), 3);

    let id = ContainerId::random();
    node.images.create_snapshot(&id, &first).await.unwrap();
    let text = first.id.to_string();
    drop((first, second));
    node.images.remove(&text).await.unwrap();
    node.images.remove(&text).await.unwrap();
    assert!(node.images.find(&text).is_none());
    node.images.remove(&registry.reference("a:2")).await.unwrap();
    node.images.flush().await;
    // The container holds its own two layers, also over a restart.
    assert_eq!(directories(&node).len(), 2);
    assert!(node.images.list().is_empty());
    let node = node.again().await;
    assert_eq!(directories(&node).len(), 2);
    let snapshot = node.images.snapshot(&id).unwrap();
    assert_eq!(snapshot.mount(false).unwrap().read("etc/one", 9).unwrap().unwrap(), b"one");
    drop(snapshot);
    node.images.remove_snapshot(&id).await.unwrap();
    node.images.flush().await;
    assert_eq!(directories(&node), [] as [u64; 0]);
    assert_eq!(node.files(), empty);
    assert_eq!((node.images.fs_usage().used_bytes, node.images.fs_usage().inodes_used), (0, 0));
}

#[tokio::test]
async fn a_tag_that_moves_takes_its_name_along() {
    let registry = FakeRegistry::start().await;
    let node = Node::new().await;
    let name = registry.reference("a:latest");
    registry.put("a", "latest", &TestImage::labelled(&[base()], "old"));
    let old = node.pull(&name).await.unwrap();
    registry.put("a", "latest", &TestImage::labelled(&[base()], "new"));
    let new = node.pull(&name).await.unwrap();
    assert_ne!(old.id, new.id);
    let node = node.again().await;
    assert_eq!(node.images.find(&name).unwrap().id, new.id);
    let old = node.images.find(&old.id.to_string()).unwrap();
    assert!(old.names.is_empty() && old.digests.len() == 1);
    node.images.remove(&name).await.unwrap();
    assert!(node.images.find(&name).is_none());
    assert_eq!(node.images.list().len(), 1);
}

#[tokio::test]
async fn what_a_crash_leaves_is_removed_and_what_is_incomplete_is_not_shown() {
    let registry = FakeRegistry::start().await;
    registry.put("a", "1", &TestImage::new(&[base(), layer("one")]));
    registry.put("b", "1", &TestImage::new(&[layer("b")]));
    let node = Node::new().await;
    let image = node.pull(&registry.reference("a:1")).await.unwrap();
    let other = node.pull(&registry.reference("b:1")).await.unwrap();
    let before = node.files();
    let root = node.dir.path().join("images");
    std::fs::create_dir_all(root.join("layers/900/x")).unwrap();
    std::fs::create_dir_all(root.join("ingest/901/x")).unwrap();
    std::fs::create_dir_all(root.join("ingest/902.recipe")).unwrap();
    std::fs::create_dir_all(root.join("recipes/903/0")).unwrap();
    std::fs::create_dir_all(root.join("snapshots").join(ContainerId::random()).join("upper"))
        .unwrap();
    let node = node.again().await;
    assert_eq!(node.files(), before);
    // No number is used twice, not even that of what was just removed.
    assert!(node.images.shared.layers.number() > 903);

    let number = other.layers()[0].to_string();
    std::fs::rename(root.join("layers").join(&number), node.dir.path().join("lost")).unwrap();
    let node = node.again().await;
    assert_eq!(node.images.list().len(), 1);
    assert!(node.images.find(&image.id.to_string()).is_some());
    node.pull(&registry.reference("b:1")).await.unwrap();
    assert_eq!(node.images.list().len(), 2);
}

#[tokio::test]
async fn a_lost_database_takes_no_mounted_layer_away() {
    let registry = FakeRegistry::start().await;
    registry.put("a", "1", &TestImage::new(&[base(), layer("one")]));
    let node = Node::new().await;
    let image = node.pull(&registry.reference("a:1")).await.unwrap();
    let id = ContainerId::random();
    let snapshot = node.images.create_snapshot(&id, &image).await.unwrap();
    let target = node.dir.path().join("rootfs");
    std::fs::create_dir(&target).unwrap();
    snapshot.mount(false).unwrap().attach(&target).unwrap();
    drop((image, snapshot));
    let Node { dir, images } = node;
    let config = images.shared.config.clone();
    images.shutdown().await;
    drop(images);
    for name in ["db", "db-wal", "db-shm"] {
        let _ = std::fs::remove_file(dir.path().join(name));
    }
    let images = open(dir.path(), config.clone()).await;
    images.flush().await;
    let text = std::fs::read_to_string(target.join("etc/one"));
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::empty()).unwrap();
    assert_eq!(text.unwrap(), "one");
    // Unmounted, it is a leftover like any other.
    drop(images);
    let images = open(dir.path(), config).await;
    images.flush().await;
    assert!(layers::numbered(&dir.path().join("images/layers")).unwrap().is_empty());
}

#[tokio::test]
async fn hostile_content_is_refused_and_leaves_nothing() {
    let registry = FakeRegistry::start().await;
    let node = Node::new().await;
    let fresh = layer("not seen before");
    let good = gzip(&fresh);
    // What is here must stay as it is.
    registry.put("good", "1", &TestImage::new(&[base(), layer("one")]));
    node.pull(&registry.reference("good:1")).await.unwrap();

    let one = |blob: Vec<u8>, plain: &[u8]| {
        TestImage::with(
            vec![(GZIP, gzip(&layer("below"))), (GZIP, blob)],
            vec![digest(&layer("below")), digest(plain)],
            "x",
        )
    };
    let archive = |tar: Tar| {
        let plain = tar.end();
        one(gzip(&plain), &plain)
    };
    let half = good[..good.len() / 2].to_vec();
    let garbage = [good.clone(), b"garbage after the end".to_vec()].concat();
    let bomb = Tar::new().file("bomb", vec![0; 80 << 20]).end();
    let many = [gzip(&fresh[..700]), gzip(&fresh[700..])].concat();
    for (name, image, part, kind) in [
        ("up", archive(Tar::new().file("../evil", "x")), "'..'", Kind::Invalid),
        ("absolute", archive(Tar::new().file("/evil", "x")), "absolute", Kind::Invalid),
        (
            "symlink",
            archive(Tar::new().symlink("a", "/").file("a/evil", "x")),
            "out of the layer",
            Kind::Invalid,
        ),
        ("hardlink", archive(Tar::new().hard_link("a", "/etc/passwd")), "hard link", Kind::Invalid),
        ("truncated", one(half, &fresh), "", Kind::Invalid),
        ("garbage", one(garbage, &fresh), "", Kind::Invalid),
        ("diffid", one(good.clone(), b"other"), "uncompressed content", Kind::Invalid),
        ("bomb", one(gzip(&bomb), &bomb), "max_layer_size", Kind::Invalid),
        ("notar", one(vec![9; 5000], &[9; 5000]), "checksum", Kind::Invalid),
    ] {
        registry.put(name, "1", &image);
        assert_eq!(
            node.refuses(&registry.reference(&format!("{name}:1")), part).await,
            kind,
            "{name}"
        );
    }
    assert!(!Path::new("/evil").exists());
    // Several members are one stream (RFC 1952), as eStargz and pigz -i write them.
    registry.put("members", "1", &one(many, &fresh));
    node.pull(&registry.reference("members:1")).await.unwrap();
}

#[tokio::test]
async fn what_does_not_match_its_digest_or_size_is_refused() {
    let node = Node::new().await;
    let registry = FakeRegistry::start().await;
    let image = TestImage::new(&[base()]);
    let name = registry.reference("a:1");
    let blob = image.layers[0].clone();
    let path = format!("/v2/a/blobs/{}", digest(&blob));
    let serve = |content: Vec<u8>| {
        registry.put("a", "1", &image);
        let path = path.clone();
        registry
            .hook(move |r| (r.uri().path() == path).then(|| Response::new(full(content.clone()))));
    };
    // The same archive in other bytes of the same number: all but the digest is right.
    let mut other = blob.clone();
    other[9] ^= 1;
    serve(other);
    assert_eq!(node.refuses(&name, "its manifest says").await, Kind::Invalid);
    serve([blob.clone(), vec![0; 10]].concat());
    node.refuses(&name, "larger than").await;
    registry.hook(|_| None);

    // The manifest: other content than the header says, or than the reference asks for.
    let manifest = image.manifest.clone();
    registry.hook(move |r| {
        r.uri().path().contains("/manifests/").then(|| {
            Response::builder()
                .header("content-type", MANIFEST)
                .header("docker-content-digest", digest(b"other").to_string())
                .body(full(manifest.clone()))
                .unwrap()
        })
    });
    assert_eq!(node.refuses(&name, "expected").await, Kind::Unavailable);
    registry.hook(|_| None);
    registry.put_manifest("a", &digest(b"other").to_string(), MANIFEST, &image.manifest);
    node.refuses(&registry.reference(&format!("a@{}", digest(b"other"))), "expected").await;

    // The config.
    let config = format!("/v2/a/blobs/{}", digest(&image.config));
    let wrong = String::from_utf8(image.config.clone()).unwrap().replace("1000", "0000");
    registry.hook(move |r| (r.uri().path() == config).then(|| Response::new(full(wrong.clone()))));
    node.refuses(&name, "expected").await;
    registry.hook(|_| None);
    node.pull(&name).await.unwrap();
}

#[tokio::test]
async fn manifests_that_are_too_large_or_of_the_wrong_kind_are_refused() {
    let node = Node::new().await;
    let registry = FakeRegistry::start().await;
    let name = registry.reference("a:1");
    // 100 MB, with and without a length.
    registry.hook(|_| Some(Response::new(full(vec![b' '; 100 << 20]))));
    assert_eq!(node.refuses(&name, "larger than 4194304 bytes").await, Kind::Invalid);
    registry.hook(|_| {
        let chunk = vec![b' '; 1 << 20];
        let stream = futures::stream::iter((0..100).map(move |_| {
            Ok::<_, std::io::Error>(hyper::body::Frame::data(bytes::Bytes::from(chunk.clone())))
        }));
        Some(Response::new(http_body_util::BodyExt::boxed(http_body_util::StreamBody::new(stream))))
    });
    node.refuses(&name, "larger than 4194304 bytes").await;
    registry.hook(|_| None);

    let schema1 = r#"{"schemaVersion":1,"name":"a","fsLayers":[]}"#;
    registry.put_manifest(
        "a",
        "1",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
        schema1.as_bytes(),
    );
    assert_eq!(node.refuses(&name, "schema 1").await, Kind::Unsupported);
    for (text, part, kind) in [
        ("<html>login</html>".to_owned(), "manifest is not valid", Kind::Invalid),
        (
            String::from_utf8(TestImage::new(&[base()]).manifest).unwrap().replace(
                "vnd.oci.image.layer.v1.tar+gzip",
                "vnd.oci.image.layer.v1.tar+gzip+encrypted",
            ),
            "encrypted layers: there is no key",
            Kind::Unsupported,
        ),
        (
            String::from_utf8(TestImage::new(&[base()]).manifest).unwrap().replace(
                "vnd.oci.image.layer.v1.tar+gzip",
                "vnd.cncf.helm.chart.content.v1.tar+gzip",
            ),
            "not a tar archive we know",
            Kind::Unsupported,
        ),
    ] {
        registry.put_manifest("a", "1", MANIFEST, text.as_bytes());
        assert_eq!(node.refuses(&name, part).await, kind);
    }
    // As many layers as diff_ids.
    let image = TestImage::with(vec![(GZIP, gzip(&base()))], vec![], "x");
    registry.put("a", "1", &image);
    node.refuses(&name, "diff_ids").await;

    // Indexes: nested too deep, pointing to themselves, without this platform.
    let index = |digest: &Digest, size: usize, platform: Option<&str>| {
        let platform = platform.map(|a| json!({"os": "linux", "architecture": a}));
        let entry =
            json!({"mediaType": INDEX, "digest": digest, "size": size, "platform": platform});
        json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}).to_string()
    };
    let mut text = index(&digest(b"none"), 4, Some("other"));
    registry.put_manifest("a", "1", INDEX, text.as_bytes());
    assert_eq!(node.refuses(&name, "it has linux/other").await, Kind::NotFound);
    for _ in 0..6 {
        registry.put_manifest("a", &digest(text.as_bytes()).to_string(), INDEX, text.as_bytes());
        text = index(&digest(text.as_bytes()), text.len(), None);
    }
    registry.put_manifest("a", "1", INDEX, text.as_bytes());
    node.refuses(&name, "nested deeper").await;
    assert_eq!(node.refuses(&registry.reference("a:2"), "manifest unknown").await, Kind::NotFound);
    for bad in ["", "a b", "UPPER", "a:b:c", "a@sha256:00", "http://a/b"] {
        assert_eq!(node.refuses(bad, "is not valid").await, Kind::Invalid);
    }
    let error = node.images.pull("a", None, Some("amd64")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
}

#[tokio::test]
async fn an_index_gives_the_image_of_the_platform() {
    let node = Node::new().await;
    let registry = FakeRegistry::start().await;
    let own = TestImage::labelled(&[base()], "own");
    let other = {
        let mut image = TestImage::labelled(&[layer("other")], "other");
        let text = String::from_utf8(image.config.clone()).unwrap();
        let own = manifest::Platform::node().architecture;
        let config = text.replace(&format!("\"{own}\""), "\"s390x\"").into_bytes();
        let manifest = String::from_utf8(image.manifest).unwrap();
        let manifest = manifest
            .replace(&digest(&image.config).to_string(), &digest(&config).to_string())
            .replace(&format!(":{}", image.config.len()), &format!(":{}", config.len()));
        image.manifest = manifest.into_bytes();
        image.config = config;
        image
    };
    registry.put("a", "own", &own);
    registry.put("a", "other", &other);
    let entry = |image: &TestImage, architecture: Option<&str>| {
        let platform = architecture.map(|a| json!({"os": "linux", "architecture": a}));
        json!({"mediaType": MANIFEST, "digest": digest(&image.manifest),
               "size": image.manifest.len(), "platform": platform})
    };
    let node_architecture = manifest::Platform::node().architecture;
    for (tag, entries) in [
        ("1", vec![entry(&other, Some("s390x")), entry(&own, Some(&node_architecture))]),
        // Only the configs can tell.
        ("2", vec![entry(&other, None), entry(&own, None)]),
    ] {
        let index = json!({"schemaVersion": 2, "manifests": entries}).to_string();
        registry.put_manifest("a", tag, INDEX, index.as_bytes());
        let name = registry.reference(&format!("a:{tag}"));
        let image = node.pull(&name).await.unwrap();
        assert_eq!(image.id, own.id());
        let by_digest = registry.reference(&format!("a@{}", digest(index.as_bytes())));
        assert!(image.digests.contains(&by_digest));
        let image = node.images.pull(&name, None, Some("linux/s390x")).await.unwrap();
        assert_eq!(image.defaults.labels["label"], "other");
    }
    assert_eq!(
        node.refuses(&registry.reference("a:other"), "it has linux/s390x").await,
        Kind::NotFound
    );
}

#[tokio::test]
async fn broken_connections_go_on_where_they_broke() {
    let node = Node::new().await;
    let registry = FakeRegistry::start().await;
    let noise: Vec<u8> = (0..1_000_000).map(|_| rand::random()).collect();
    let image = TestImage::new(&[Tar::new().file("noise", &noise).end()]);
    registry.put("a", "1", &image);
    let blob = image.layers[0].clone();
    let path = format!("/v2/a/blobs/{}", digest(&blob));
    let sent = Arc::new(AtomicUsize::new(0));
    let counted = sent.clone();
    // Each connection brings 200,000 bytes; one of them is cut before its head.
    registry.hook(move |request| {
        if request.uri().path() != path {
            return None;
        }
        let from: usize = match request.headers().get("range") {
            None => 0,
            Some(range) => range.to_str().unwrap()["bytes=".len()..]
                .strip_suffix('-')
                .unwrap()
                .parse()
                .unwrap(),
        };
        let piece = &blob[from..blob.len().min(from + 200_000)];
        counted.fetch_add(piece.len(), Ordering::Relaxed);
        let mut response = broken(piece, blob.len() - from, false);
        if from > 0 {
            *response.status_mut() = hyper::StatusCode::PARTIAL_CONTENT;
            let text = format!("bytes {from}-{}/{}", blob.len() - 1, blob.len());
            response.headers_mut().insert("content-range", text.parse().unwrap());
        }
        Some(response)
    });
    let image_of = node.pull(&registry.reference("a:1")).await.unwrap();
    assert_eq!(image_of.id, image.id());
    let sent = sent.load(Ordering::Relaxed);
    assert!(sent <= image.layers[0].len() * 105 / 100, "{sent}");
}

#[tokio::test]
async fn a_server_that_knows_no_ranges_is_skipped_through() {
    let node = Node::new().await;
    let registry = FakeRegistry::start().await;
    let image = TestImage::new(&[base()]);
    registry.put("a", "1", &image);
    let blob = image.layers[0].clone();
    let path = format!("/v2/a/blobs/{}", digest(&blob));
    let first = AtomicUsize::new(0);
    registry.hook(move |request| {
        if request.uri().path() != path {
            return None;
        }
        Some(match first.fetch_add(1, Ordering::Relaxed) {
            0 => broken(&blob[..100], blob.len(), false),
            _ => Response::new(full(blob.clone())),
        })
    });
    node.pull(&registry.reference("a:1")).await.unwrap();
}

#[tokio::test]
async fn a_registry_that_fails_for_good_or_hangs_is_given_up_in_time() {
    let node = Node::with(|config| config.stall_timeout = Duration::from_millis(150)).await;
    let registry = FakeRegistry::start().await;
    let image = TestImage::new(&[base()]);
    registry.put("a", "1", &image);
    let name = registry.reference("a:1");
    let path = format!("/v2/a/blobs/{}", digest(&image.layers[0]));
    let blob = image.layers[0].clone();
    let begun = Instant::now();

    // The same few bytes again and again.
    let (p, b) = (path.clone(), blob.clone());
    registry.hook(move |r| (r.uri().path() == p).then(|| broken(&b[..10], b.len(), false)));
    assert_eq!(node.refuses(&name, "request http").await, Kind::Unavailable);
    let (p, b) = (path.clone(), blob.clone());
    registry.hook(move |r| (r.uri().path() == p).then(|| broken(&b[..10], b.len(), true)));
    assert_eq!(node.refuses(&name, "stall_timeout").await, Kind::Deadline);
    registry.forget_log();
    registry.hook(|_| Some(response(503, "")));
    assert_eq!(node.refuses(&name, "503").await, Kind::Unavailable);
    assert_eq!(registry.log().len(), 5, "attempts");
    registry.hook(|_| None);
    assert!(begun.elapsed() < Duration::from_secs(10));
    node.pull(&name).await.unwrap();

    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_eq!(node.refuses(&format!("{closed}/a:1"), "request http").await, Kind::Unavailable);
}

#[tokio::test]
async fn a_busy_registry_is_asked_again_when_it_says_so() {
    let node = Node::new().await;
    let registry = FakeRegistry::start().await;
    registry.put("a", "1", &TestImage::new(&[base()]));
    let refused = AtomicUsize::new(0);
    registry.hook(move |_| {
        (refused.fetch_add(1, Ordering::Relaxed) < 2).then(|| {
            let mut response = response(429, "");
            response.headers_mut().insert("retry-after", "1".parse().unwrap());
            response
        })
    });
    let begun = Instant::now();
    node.pull(&registry.reference("a:1")).await.unwrap();
    let waited = begun.elapsed();
    assert!((2.0..4.0).contains(&waited.as_secs_f64()), "{waited:?}");
}

/// A registry that wants a bearer token, which its own token service gives for user and password.
fn token_service(registry: &FakeRegistry) {
    let realm = format!("http://{}/token", registry.address);
    let issued = Arc::new(AtomicUsize::new(0));
    registry.hook(move |request| {
        let header =
            |name: &str| request.headers().get(name).map(|v| v.to_str().unwrap().to_owned());
        let given = header("authorization").unwrap_or_default();
        if request.uri().path() == "/token" {
            let query = request.uri().query().unwrap_or_default();
            // base64 of "me:secret".
            let known = given == "Basic bWU6c2VjcmV0"
                && query.contains("service=registry.test")
                && query.contains("scope=repository%3Aa%3Apull");
            if !known && request.method() == "GET" {
                return Some(response(401, r#"{"details":"incorrect username or password"}"#));
            }
            let number = issued.fetch_add(1, Ordering::Relaxed);
            return Some(response(
                200,
                &format!(r#"{{"access_token":"token-{number}","expires_in":60}}"#),
            ));
        }
        // Each token is good until the next one is given out.
        let good = format!("Bearer token-{}", issued.load(Ordering::Relaxed).wrapping_sub(1));
        if given == good {
            return None;
        }
        let mut response = response(401, r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#);
        let challenge = format!(
            r#"Bearer realm="{realm}",service="registry.test",scope="repository:a:pull",error="x""#
        );
        response.headers_mut().insert("www-authenticate", challenge.parse().unwrap());
        Some(response)
    });
}

#[tokio::test]
async fn bearer_tokens_are_got_with_the_credentials_of_the_request() {
    let node = Node::with(|config| config.max_parallel_layers = 3).await;
    let registry = FakeRegistry::start().await;
    registry.put("a", "1", &TestImage::new(&[base(), layer("x"), layer("y"), layer("z")]));
    token_service(&registry);
    let name = registry.reference("a:1");

    assert_eq!(node.refuses(&name, "401").await, Kind::Denied);
    let error = node.images.pull(&name, auth("me", "wrong"), None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Denied);
    assert!(chain(&error).contains("incorrect username or password"));
    assert!(!chain(&error).contains("wrong"));

    registry.forget_log();
    node.images.pull(&name, auth("me", "secret"), None).await.unwrap();
    let tokens = registry.log().iter().filter(|line| line.contains("/token")).count();
    assert_eq!(tokens, 1, "{:?}", registry.log());

    // All ways of giving the same.
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode("me:secret\0\0");
    for given in [
        Auth { auth: text, ..Auth::default() },
        Auth { identity_token: "refresh".into(), ..Auth::default() },
        Auth {
            server_address: format!("http://{}/v1/", registry.address),
            ..auth("me", "secret").unwrap()
        },
    ] {
        node.images.remove(&name).await.unwrap();
        node.images.pull(&name, Some(given.clone()), None).await.unwrap_or_else(|e| {
            panic!("{given:?}: {}", chain(&e));
        });
    }
    // For somebody else.
    node.images.remove(&name).await.unwrap();
    let other = Auth { server_address: "other.example".into(), ..auth("me", "secret").unwrap() };
    let error = node.images.pull(&name, Some(other), None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Denied);
    let broken = Auth { auth: "###".into(), ..Auth::default() };
    let error = node.images.pull(&name, Some(broken), None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
}

#[tokio::test]
async fn basic_credentials_and_ready_tokens_are_sent_when_asked_for() {
    let node = Node::new().await;
    let registry = FakeRegistry::start().await;
    registry.put("a", "1", &TestImage::new(&[base()]));
    let name = registry.reference("a:1");
    registry.hook(|request| {
        let given = request.headers().get("authorization").map(|v| v.to_str().unwrap());
        if matches!(given, Some("Basic bWU6c2VjcmV0" | "Bearer ready")) {
            return None;
        }
        let mut response = response(401, "");
        response.headers_mut().insert("www-authenticate", "Basic realm=x".parse().unwrap());
        Some(response)
    });
    assert_eq!(node.refuses(&name, "401").await, Kind::Denied);
    node.images.pull(&name, auth("me", "secret"), None).await.unwrap();
    node.images.remove(&name).await.unwrap();
    let ready = Auth { registry_token: "ready".into(), ..Auth::default() };
    node.images.pull(&name, Some(ready), None).await.unwrap();
    let error = node.images.pull(&name, auth("me", "wrong"), None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Denied);
    registry.hook(|_| Some(response(403, "")));
    let error = node.images.pull(&name, auth("me", "secret"), None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Denied);
}

#[tokio::test]
async fn credentials_do_not_follow_a_redirect_to_another_host() {
    let node = Node::new().await;
    let (registry, elsewhere) = (FakeRegistry::start().await, FakeRegistry::start().await);
    let image = TestImage::new(&[base()]);
    registry.put("a", "1", &image);
    elsewhere.put("a", "1", &image);
    let target = elsewhere.address;
    registry.hook(move |request| {
        if !request.headers().contains_key("authorization") {
            let mut response = response(401, "");
            response.headers_mut().insert("www-authenticate", "Basic realm=x".parse().unwrap());
            return Some(response);
        }
        request.uri().path().contains("/blobs/").then(|| {
            Response::builder()
                .status(307)
                .header("location", format!("http://{target}{}?signature=s", request.uri().path()))
                .body(full(""))
                .unwrap()
        })
    });
    node.images.pull(&registry.reference("a:1"), auth("me", "secret"), None).await.unwrap();
    assert!(elsewhere.log().len() >= 2);
    assert!(elsewhere.seen("authorization").is_empty());
    assert!(!registry.seen("authorization").is_empty());
}

#[tokio::test]
async fn redirects_that_loop_or_leave_https_are_not_followed() {
    let node = Node::new().await;
    let registry = FakeRegistry::start().await;
    let own = registry.address;
    let name = registry.reference("a:1");
    for (target, part) in [
        (format!("http://{own}/again"), "more than 5 times"),
        ("http://203.0.113.1/x".to_owned(), "not https"),
        ("file:///etc/passwd".to_owned(), "scheme"),
    ] {
        registry.hook(move |_| {
            let response = Response::builder().status(302).header("location", &target);
            Some(response.body(full("")).unwrap())
        });
        node.refuses(&name, part).await;
    }
    registry.hook(|_| Some(Response::builder().status(302).body(full("")).unwrap()));
    node.refuses(&name, "without a location").await;
}

#[tokio::test]
async fn mirrors_are_asked_first_without_our_credentials_and_the_registry_last() {
    let node = Node::new().await;
    let (mirror, upstream) = (FakeRegistry::start().await, FakeRegistry::start().await);
    let image = TestImage::new(&[base(), layer("one")]);
    upstream.put("library/a", "1", &image);
    node.hosts(
        "docker.io",
        &format!(
            "server = \"http://{}\"\n[host.\"http://{}\"]\n[host.\"http://{0}\".header]\nx = \"y\"\n",
            upstream.address, mirror.address
        ),
    );
    // The mirror lacks it.
    let pulled = node.images.pull("a:1", auth("me", "secret"), None).await.unwrap();
    assert_eq!(pulled.names, ["docker.io/library/a:1"]);
    assert!(mirror.log().iter().any(|line| line.contains("/v2/library/a/manifests/1")));
    assert_eq!(pulled.id, image.id());
    // The mirror has it; the registry is not asked.
    node.images.remove("a:1").await.unwrap();
    mirror.put("library/a", "1", &image);
    mirror.hook(|request| {
        let mut response = response(401, "");
        response.headers_mut().insert("www-authenticate", "Basic realm=x".parse().unwrap());
        (request.uri().query() != Some("ns=docker.io")).then_some(response)
    });
    upstream.forget_log();
    node.images.pull("a:1", auth("me", "secret"), None).await.unwrap();
    assert!(upstream.log().is_empty(), "{:?}", upstream.log());
    assert!(mirror.seen("authorization").is_empty());
    assert!(upstream.seen("x").is_empty());
    // Both fail: both are told.
    mirror.hook(|_| Some(response(404, "")));
    upstream.hook(|_| Some(response(404, "")));
    let error = node.pull("b:1").await.unwrap_err();
    let text = chain(&error);
    assert!(text.contains(&mirror.address.to_string()), "{text}");
    assert!(text.contains(&upstream.address.to_string()), "{text}");
    assert_eq!(error.kind(), Kind::NotFound);
}

/// A certificate for 127.0.0.1 that nobody knows, and its key.
fn certificate(dir: &Path) -> (Vec<u8>, Vec<u8>) {
    let (certificate, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    let status = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"])
        .args(["-nodes", "-days", "2", "-subj", "/CN=test", "-addext"])
        .args(["subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .stderr(Stdio::null())
        .status()
        .expect("openssl is installed");
    assert!(status.success());
    (std::fs::read(certificate).unwrap(), std::fs::read(key).unwrap())
}

#[tokio::test]
async fn certificates_are_verified_unless_the_operator_says_otherwise() {
    let node = Node::new().await;
    let (cert, key) = certificate(node.dir.path());
    let registry = FakeRegistry::start_tls(&cert, &key).await;
    registry.put("a", "1", &TestImage::new(&[base()]));
    let server = format!("https://{}", registry.address);
    node.hosts("one.example", &format!("server = {server:?}\n"));
    assert_eq!(node.refuses("one.example/a:1", "certificate").await, Kind::Unavailable);
    assert!(registry.log().is_empty());

    node.hosts("two.example", &format!("server = {server:?}\nskip_verify = true\n"));
    node.pull("two.example/a:1").await.unwrap();
    // Next to the file, as a relative path has it.
    node.hosts("three.example", &format!("server = {server:?}\nca = \"own.pem\"\n"));
    std::fs::write(node.dir.path().join("certs.d/three.example/own.pem"), &cert).unwrap();
    node.pull("three.example/a:1").await.unwrap();

    // What was allowed for one server is not for where it redirects to.
    let skipped = FakeRegistry::start().await;
    let target = server.clone();
    skipped.hook(move |request| {
        let location = format!("{target}{}", request.uri().path());
        Some(Response::builder().status(307).header("location", location).body(full("")).unwrap())
    });
    registry.forget_log();
    // By name it is the same host: another one.
    let by_name =
        format!("server = \"http://localhost:{}\"\nskip_verify = true\n", skipped.address.port());
    node.hosts("four.example", &by_name);
    node.refuses("four.example/a:1", "certificate").await;
    assert!(registry.log().is_empty());
}

#[tokio::test]
async fn https_goes_through_the_proxy_that_the_environment_names() {
    let dir = tempfile::tempdir().unwrap();
    let (cert, key) = certificate(dir.path());
    let registry = FakeRegistry::start_tls(&cert, &key).await;
    registry.put("a", "1", &TestImage::new(&[base()]));
    // A proxy that connects all names to the registry.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = listener.local_addr().unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (seen, target) = (asked.clone(), registry.address);
    let serving = tokio::spawn(async move {
        use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let seen = seen.clone();
            tokio::spawn(async move {
                let mut client = tokio::io::BufReader::new(client);
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    assert!(client.read_line(&mut head).await.unwrap() > 0);
                }
                let wanted = head.starts_with("CONNECT registry.example:443 ");
                seen.lock().unwrap().push(head);
                if !wanted {
                    client.write_all(b"HTTP/1.1 403 Forbidden\r\n\r\n").await.unwrap();
                    return;
                }
                client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                let mut server = tokio::net::TcpStream::connect(target).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    let config = config(dir.path());
    let store = Store::open(&dir.path().join("db")).unwrap();
    let registries = Registries::new(config.clone())
        .with_back_off(Duration::from_millis(1))
        .with_proxy(&format!("http://user:secret@{proxy}"), "direct.invalid");
    let images =
        Images::open_with(&dir.path().join("images"), config, store, registries).await.unwrap();
    for registry in ["registry.example", "other.example", "direct.invalid"] {
        let hosts = dir.path().join("certs.d").join(registry);
        std::fs::create_dir_all(&hosts).unwrap();
        std::fs::write(
            hosts.join("hosts.toml"),
            format!("server = \"https://{registry}\"\nskip_verify = true\n"),
        )
        .unwrap();
    }
    images.pull("registry.example/a:1", None, None).await.unwrap();
    let heads = std::mem::take(&mut *asked.lock().unwrap());
    // base64 of "user:secret".
    let auth = "proxy-authorization: basic dxnlcjpzzwnyzxq=";
    assert!(heads.iter().all(|head| head.to_lowercase().contains(auth)), "{heads:?}");
    let error = images.pull("other.example/a:1", None, None).await.unwrap_err();
    assert!(chain(&error).contains("through the proxy 127.0.0.1"), "{}", chain(&error));
    asked.lock().unwrap().clear();
    images.pull("direct.invalid/a:1", None, None).await.unwrap_err();
    assert!(asked.lock().unwrap().is_empty());
    serving.abort();
}

#[tokio::test]
async fn plain_http_is_not_spoken_to_others() {
    let node = Node::with(|config| config.insecure_registries = vec!["named.example".into()]).await;
    let registry = FakeRegistry::start().await;
    registry.put("a", "1", &TestImage::new(&[base()]));
    let port = registry.address.port();
    // Not loopback by its address: HTTPS it is, which this server does not speak.
    let other = format!("0.0.0.0:{port}/a:1");
    assert_eq!(node.refuses(&other, "https://0.0.0.0").await, Kind::Unavailable);
    assert!(registry.log().is_empty(), "{:?}", registry.log());
    let insecure = Node::with(move |config| {
        config.insecure_registries = vec![format!("0.0.0.0:{port}")];
    })
    .await;
    insecure.pull(&other).await.unwrap();
}

#[tokio::test]
async fn callers_join_a_pull_and_may_leave() {
    let node = Node::new().await;
    let registry = FakeRegistry::start().await;
    let image = TestImage::new(&[base(), layer("one")]);
    registry.put("a", "1", &image);
    let gate = Arc::new(AtomicUsize::new(0));
    let waiting = gate.clone();
    registry.hook(move |request| {
        // Held up until all have joined.
        let held = waiting.load(Ordering::SeqCst) == 0 && request.uri().path().contains("/blobs/");
        held.then(|| response(503, ""))
    });
    let name = registry.reference("a:1");
    let first = node.images.pull_with_progress(&name, None, None, Caller::Lasting).unwrap();
    let mut watched = first.progress.clone();
    // The one who began it goes away.
    drop(first);
    let others = (0..10).map(|_| {
        let (images, name) = (node.images.clone(), name.clone());
        tokio::spawn(
            async move { images.pull(&name, auth("x", "y"), None).await.unwrap().id.clone() },
        )
    });
    let others: Vec<_> = others.collect();
    gate.store(1, Ordering::SeqCst);
    for other in others {
        assert_eq!(other.await.unwrap(), image.id());
    }
    let manifests = registry
        .log()
        .iter()
        .filter(|line| line.contains("GET") && line.contains("/manifests/"))
        .count();
    assert_eq!(manifests, 1, "{:?}", registry.log());
    while watched.changed().await.is_ok() {}
    let progress = watched.borrow().clone();
    assert_eq!(progress.layers.len(), 2);
    for (layer, blob) in progress.layers.iter().zip(&image.layers) {
        assert_eq!(layer.digest, digest(blob));
        assert_eq!((layer.phase, layer.received), (Phase::Done, blob.len() as u64));
    }
}

#[tokio::test]
async fn two_images_that_share_a_layer_download_it_once() {
    let node = Node::new().await;
    let registry = FakeRegistry::start().await;
    let images: Vec<TestImage> = (0..4)
        .map(|n| TestImage::labelled(&[base(), layer(&format!("own-{n}"))], &n.to_string()))
        .collect();
    for (number, image) in images.iter().enumerate() {
        registry.put("a", &number.to_string(), image);
    }
    let pulls = (0..4).map(|n| {
        let (images, name) = (node.images.clone(), registry.reference(&format!("a:{n}")));
        async move { images.pull(&name, None, None).await }
    });
    for pulled in futures::future::join_all(pulls).await {
        pulled.unwrap();
    }
    let blob = format!("GET /v2/a/blobs/{}", digest(&images[0].layers[0]));
    assert_eq!(registry.log().iter().filter(|line| **line == blob).count(), 1);
}

#[tokio::test]
async fn implied_directories_look_like_those_below() {
    implied_directories(config::LayerFormat::Directories).await;
}

#[tokio::test]
async fn implied_directories_look_like_those_below_of_erofs_layers() {
    implied_directories(config::LayerFormat::Erofs).await;
}

async fn implied_directories(format: config::LayerFormat) {
    let node = Node::of(format).await;
    let registry = FakeRegistry::start().await;
    let below = Tar::new()
        .dir("usr")
        .header(&Header {
            path: b"usr/lib",
            kind: b'5',
            mode: 0o2711,
            uid: 5,
            gid: 6,
            mtime: 9,
            ..Header::default()
        })
        .file("usr/lib/old", "old")
        .symlink("lib", "usr/lib")
        .symlink("loop", "loop")
        .pax(&[("SCHILY.xattr.user.mark", b"here")])
        .header(&Header { path: b"srv", kind: b'5', mode: 0o1777, ..Header::default() })
        .dir("gone")
        .file("gone/x", "")
        .end();
    let middle = Tar::new().file(".wh.gone", "").dir("usr").end();
    let top = Tar::new()
        .file("usr/lib/listed-nowhere", "1")
        .file("lib/through-link", "2")
        .file("usr/lib/both", "the lower one")
        .file("lib/both", "the one that is seen")
        .file("usr/lib/sub", "where the other has a directory")
        .file("lib/sub/deep", "3")
        .file("srv/data", "4")
        .file("gone/new", "5")
        .file("loop/x", "6")
        .file("fresh/y", "7")
        .end();
    let three = [below, middle, top.clone()];
    registry.put("a", "1", &TestImage::labelled(&three, "three"));
    // The same layer on nothing: it is another directory.
    registry.put("a", "2", &TestImage::labelled(std::slice::from_ref(&top), "alone"));
    let image = node.pull(&registry.reference("a:1")).await.unwrap();
    let alone = node.pull(&registry.reference("a:2")).await.unwrap();
    assert_ne!(image.layers()[2], alone.layers()[0]);
    let id = ContainerId::random();
    let snapshot = node.images.create_snapshot(&id, &image).await.unwrap();
    let target = node.dir.path().join("rootfs");
    std::fs::create_dir(&target).unwrap();
    snapshot.mount(false).unwrap().attach(&target).unwrap();
    let check = || -> Option<String> {
        let meta = |path: &str| target.join(path).symlink_metadata().unwrap();
        let text = |path: &str| std::fs::read_to_string(target.join(path)).unwrap_or_default();
        let lib = meta("usr/lib");
        let mut wrong = Vec::new();
        let mut expect = |what: &str, ok: bool| {
            if !ok {
                wrong.push(what.to_owned());
            }
        };
        expect(
            "lib's attributes",
            (lib.mode() & 0o7777, lib.uid(), lib.gid(), lib.mtime()) == (0o2711, 5, 6, 9),
        );
        expect("the link stays", meta("lib").is_symlink());
        expect("files of both", text("lib/old") == "old" && text("usr/lib/listed-nowhere") == "1");
        expect(
            "through the link",
            text("usr/lib/through-link") == "2"
                && text("usr/lib/sub/deep") == "3"
                && text("lib/both") == "the one that is seen",
        );
        expect("sticky", meta("srv").mode() & 0o7777 == 0o1777);
        let mut value = [0; 8];
        expect(
            "attribute",
            rustix::fs::getxattr(target.join("srv"), "user.mark", &mut value) == Ok(4),
        );
        expect("a new directory", text("gone/new") == "5" && !target.join("gone/x").exists());
        expect(
            "what nothing is below",
            text("fresh/y") == "7" && meta("fresh").mode() & 0o7777 == 0o755,
        );
        expect("a link that leads nowhere is replaced", text("loop/x") == "6");
        (!wrong.is_empty()).then(|| wrong.join(", "))
    };
    let wrong = check();
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::empty()).unwrap();
    assert_eq!(wrong, None);
    // Files were moved, and one of two of a name is gone: the archives are the same all the same.
    assert!(archives(&image) == three && archives(&alone) == [top]);
    // And it is found again for the same layers below, also after a restart.
    let node = node.again().await;
    drop((image, alone));
    registry.forget_log();
    let again = node.pull(&registry.reference("a:1")).await.unwrap();
    assert_eq!(again.layers().len(), 3);
    assert_eq!(registry.log().len(), 1);
}

#[tokio::test]
async fn archives_are_imported() {
    let node = Node::new().await;
    let image = TestImage::new(&[base(), layer("one")]);
    let empty = node.files();
    let import = |bytes: Vec<u8>, name: Option<&'static str>| {
        let images = node.images.clone();
        async move { images.import(std::io::Cursor::new(bytes), name).await }
    };
    // OCI layout, compressed.
    let archive = gzip(&image.oci_archive("example.com/a:1"));
    let imported = import(archive, None).await.unwrap();
    assert_eq!(imported.len(), 1);
    assert_eq!(imported[0].id, image.id());
    assert_eq!(imported[0].names, ["example.com/a:1"]);
    drop(imported);
    // Only a tag: the name comes from the caller.
    let imported = import(image.oci_archive("1"), Some("given")).await.unwrap();
    assert_eq!(imported[0].names, ["docker.io/library/given:latest", "example.com/a:1"]);
    drop(imported);
    node.images.remove("given").await.unwrap();
    node.images.flush().await;
    assert_eq!(node.files(), empty);

    // docker save: a layer is a link to another's.
    let (one, two) = (base(), layer("docker"));
    let docker = TestImage::labelled(&[one.clone(), two.clone(), one.clone()], "docker");
    let config = digest(&docker.config).hex();
    let manifest = json!([{"Config": format!("{config}.json"), "RepoTags": ["busybox:1", "busybox:2"],
        "Layers": ["x/layer.tar", "y/layer.tar", "z/layer.tar"]}]);
    let archive = Tar::new()
        .dir("x")
        .file("x/layer.tar", &one)
        .file("y/layer.tar", &two)
        .symlink("z/layer.tar", "../x/layer.tar")
        .file(&format!("{config}.json"), &docker.config)
        .file("manifest.json", manifest.to_string())
        .end();
    let imported = import(archive, None).await.unwrap();
    assert_eq!(imported[0].names, ["docker.io/library/busybox:1", "docker.io/library/busybox:2"]);
    assert!(imported[0].digests.is_empty());
    assert_eq!(imported[0].layers().len(), 3);
    drop(imported);
    let node = node.again().await;
    let found = node.images.find("busybox:2").unwrap();
    let snapshot = node.images.create_snapshot(&ContainerId::random(), &found).await.unwrap();
    assert_eq!(snapshot.mount(false).unwrap().read("etc/docker", 9).unwrap().unwrap(), b"docker");
}

#[tokio::test]
async fn bad_archives_are_refused_and_leave_nothing() {
    let node = Node::new().await;
    let empty = node.files();
    let image = TestImage::new(&[base(), layer("one")]);
    let whole = image.oci_archive("a:1");
    let swapped = {
        // A blob with another's name.
        let mut tar = Tar::new().file("oci-layout", "{}");
        for (name, blob) in [
            (digest(&image.manifest), &image.manifest),
            (digest(&image.config), &image.config),
            (digest(&image.layers[0]), &image.layers[1]),
            (digest(&image.layers[1]), &image.layers[1]),
        ] {
            tar = tar.file(&format!("blobs/sha256/{}", name.hex()), blob);
        }
        let index = json!({"schemaVersion": 2, "manifests": [
            {"mediaType": MANIFEST, "digest": digest(&image.manifest), "size": 1}]});
        tar.file("index.json", index.to_string()).end()
    };
    let other = TestImage::labelled(&[], "x");
    for (archive, name, part) in [
        (Tar::new().file("hello", "x").end(), None, "neither index.json"),
        (b"no archive".to_vec(), None, "middle of an entry"),
        (vec![1; 4096], None, "checksum"),
        (whole[..whole.len() / 2].to_vec(), None, ""),
        (swapped, None, "its manifest says"),
        (Tar::new().file("index.json", "{}").end(), None, "manifest is not valid"),
        (Tar::new().file("manifest.json", "[]").end(), None, "no image"),
        (
            Tar::new()
                .file("manifest.json", r#"[{"Config":"../../etc/passwd","Layers":[]}]"#)
                .end(),
            None,
            "it has no",
        ),
        (
            Tar::new()
                .symlink("a", "b")
                .symlink("b", "a")
                .file("manifest.json", r#"[{"Config":"a","Layers":[]}]"#)
                .end(),
            None,
            "it has no a",
        ),
        (other.oci_archive("UPPER:1"), None, "lower case"),
        (whole.clone(), Some("UPPER"), "lower case"),
    ] {
        let error = node.images.import(std::io::Cursor::new(archive), name).await.expect_err(part);
        assert!(chain(&error).contains(part), "{part}: {}", chain(&error));
        assert_eq!(node.files(), empty, "{part}");
        assert!(node.images.list().is_empty());
    }
}

/// The second layer of an image comes only when it may; the first is counted.
#[tokio::test]
async fn a_pull_that_is_tried_again_goes_on_from_the_layers_that_are_complete() {
    let registry = FakeRegistry::start().await;
    let image = TestImage::new(&[base(), layer("one")]);
    registry.put("a", "1", &image);
    let (first, second) = (digest(&image.layers[0]).hex(), digest(&image.layers[1]));
    let open = Arc::new(std::sync::atomic::AtomicBool::new(false));
    registry.hook({
        let (open, second) = (open.clone(), second.hex());
        move |r| {
            let shut = !open.load(std::sync::atomic::Ordering::Relaxed);
            (shut && r.uri().path().contains(&second)).then(|| response(403, "not now"))
        }
    });
    let node = Node::with(|config| config.max_parallel_layers = 1).await;
    let reference = registry.reference("a:1");
    // Denied will not pass by itself: nothing is kept.
    node.pull(&reference).await.unwrap_err();
    assert_eq!(node.images.fs_usage().inodes_used, 0);

    registry.hook({
        let (open, second) = (open.clone(), second.hex());
        move |r| {
            let shut = !open.load(std::sync::atomic::Ordering::Relaxed);
            (shut && r.uri().path().contains(&second)).then(|| response(503, "not now"))
        }
    });
    node.pull(&reference).await.unwrap_err();
    assert!(node.images.fs_usage().inodes_used > 0);
    // Also over the end of the daemon.
    node.images.shutdown().await;
    let node = node.again().await;
    assert!(node.images.list().is_empty() && node.images.fs_usage().inodes_used > 0);
    registry.forget_log();
    open.store(true, std::sync::atomic::Ordering::Relaxed);
    node.pull(&reference).await.unwrap();
    let log = registry.log();
    assert!(!log.iter().any(|line| line.contains(&first)), "{log:?}");
    assert!(log.iter().any(|line| line.contains(&second.hex())), "{log:?}");

    // Complete and recorded, it is like any other.
    node.images.remove(&reference).await.unwrap();
    node.images.flush().await;
    assert_eq!(node.images.fs_usage().inodes_used, 0);
    let root = node.dir.path().join("images");
    assert!(layers::numbered(&root.join("recipes")).unwrap().is_empty());
}

/// Layers that are here stay as they are when the configuration changes, and go with others.
#[tokio::test]
async fn an_image_may_have_layers_of_both_kinds() {
    let registry = FakeRegistry::start().await;
    let (one, two) = ([base(), layer("one")], [base(), layer("one"), layer("two"), layer("three")]);
    registry.put("a", "1", &TestImage::new(&one));
    registry.put("a", "2", &TestImage::new(&two));
    let mut node = Node::of(config::LayerFormat::Erofs).await;
    let first = node.pull(&registry.reference("a:1")).await.unwrap();
    assert!(first.hold_layers().iter().all(|layer| layer.path().is_file()));
    drop(first);
    let mut config = node.images.shared.config.clone();
    config.layer_format = config::LayerFormat::Directories;
    node.images.shutdown().await;
    node.images = open(node.dir.path(), config).await;
    let image = node.pull(&registry.reference("a:2")).await.unwrap();
    let kinds: Vec<bool> = image.hold_layers().iter().map(|layer| layer.path().is_file()).collect();
    assert_eq!(kinds, [true, true, false, false]);
    assert!(archives(&image) == two);
    let snapshot = node.images.create_snapshot(&ContainerId::random(), &image).await.unwrap();
    let mounted = snapshot.mount(false).unwrap();
    for name in ["one", "two", "three"] {
        let text = mounted.read(&format!("etc/{name}"), 10).unwrap();
        assert_eq!(text.unwrap(), name.as_bytes());
    }
    drop((mounted, snapshot, image));
    node.images.remove(&registry.reference("a:1")).await.unwrap();
    node.images.remove(&registry.reference("a:2")).await.unwrap();
}

/// A layer of a boot that is over may lack what was never synced.
#[tokio::test]
async fn what_was_unpacked_before_a_reboot_and_not_recorded_is_not_used() {
    let registry = FakeRegistry::start().await;
    let image = TestImage::new(&[base(), layer("one")]);
    registry.put("a", "1", &image);
    let second = digest(&image.layers[1]).hex();
    registry.hook(move |r| r.uri().path().contains(&second).then(|| response(503, "not now")));
    let node = Node::with(|config| config.max_parallel_layers = 1).await;
    node.pull(&registry.reference("a:1")).await.unwrap_err();
    let root = node.dir.path().join("images");
    let [number] = layers::numbered(&root.join("recipes")).unwrap()[..] else { panic!("one") };
    let placed = root.join(format!("recipes/{number}/placed"));
    let mut text: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&placed).unwrap()).unwrap();
    text["boot"] = "another".into();
    std::fs::write(&placed, text.to_string()).unwrap();
    node.images.shutdown().await;
    let node = node.again().await;
    assert_eq!(node.images.fs_usage().inodes_used, 0);
    assert!(layers::numbered(&root.join("layers")).unwrap().is_empty());
}

#[tokio::test]
async fn a_shutdown_ends_pulls_and_leaves_nothing() {
    let node = Node::with(|config| config.stall_timeout = Duration::from_secs(60)).await;
    let registry = FakeRegistry::start().await;
    let image = TestImage::new(&[base()]);
    registry.put("a", "1", &image);
    let blob = image.layers[0].clone();
    registry.hook(move |r| {
        r.uri()
            .path()
            .contains(&digest(&blob).hex())
            .then(|| broken(&blob[..200], blob.len(), true))
    });
    let empty = node.files();
    let name = registry.reference("a:1");
    let flight = node.images.pull_with_progress(&name, None, None, Caller::Lasting).unwrap();
    let mut progress = flight.progress.clone();
    progress.wait_for(|p| p.layers.first().is_some_and(|l| l.received > 0)).await.unwrap();
    let begun = Instant::now();
    node.images.shutdown().await;
    let error = flight.done.await.unwrap_err();
    assert!(chain(&error).contains("shutting down"));
    assert!(begun.elapsed() < Duration::from_secs(5));
    // The unpacker notices that nobody sends any more.
    let deadline = Instant::now() + Duration::from_secs(5);
    while node.files() != empty {
        assert!(Instant::now() < deadline, "{:?}", node.files());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Debian's docker-registry on a free port of loopback. Killed by its pid when dropped.
pub(super) struct DockerRegistry {
    child: Child,
    pub(super) address: std::net::SocketAddr,
    _dir: tempfile::TempDir,
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl DockerRegistry {
    pub(super) async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let config = dir.path().join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage: {{filesystem: \
             {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"}}\n",
            dir.path().join("data").display()
        );
        std::fs::write(&config, text).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed");
        let registry = Self { child, address, _dir: dir };
        let deadline = Instant::now() + Duration::from_secs(20);
        while tokio::net::TcpStream::connect(address).await.is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not listen");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        registry
    }

    async fn request(
        &self,
        method: &str,
        path: &str,
        media_type: &str,
        body: &[u8],
    ) -> Response<()> {
        let client =
            hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
                .build_http();
        let uri = if path.starts_with("http") {
            path.to_owned()
        } else {
            format!("http://{}{path}", self.address)
        };
        let request = hyper::Request::builder()
            .method(method)
            .uri(uri)
            .header("content-type", media_type)
            .body(http_body_util::Full::new(bytes::Bytes::copy_from_slice(body)))
            .unwrap();
        let response = client.request(request).await.unwrap();
        assert!(response.status().is_success(), "{method} {path}: {}", response.status());
        let (parts, _) = response.into_parts();
        Response::from_parts(parts, ())
    }

    async fn push(&self, repository: &str, tag: &str, image: &TestImage) {
        for blob in image.layers.iter().chain([&image.config]) {
            let begun =
                self.request("POST", &format!("/v2/{repository}/blobs/uploads/"), "", b"").await;
            let location = begun.headers()["location"].to_str().unwrap().to_owned();
            let path = format!("{location}&digest={}", digest(blob));
            self.request("PUT", &path, "application/octet-stream", blob).await;
        }
        let path = format!("/v2/{repository}/manifests/{tag}");
        self.request("PUT", &path, MANIFEST, &image.manifest).await;
    }
}

#[tokio::test]
async fn an_image_comes_from_a_real_registry() {
    let registry = DockerRegistry::start().await;
    let image = TestImage::new(&[base(), layer("one"), layer("two"), layer("three")]);
    registry.push("some/where", "v1", &image).await;
    let node = Node::new().await;
    let name = format!("{}/some/where:v1", registry.address);
    let pulled = node.pull(&name).await.unwrap();
    assert_eq!((&pulled.id, &pulled.names), (&image.id(), &vec![name.clone()]));
    let by_digest = format!("{}/some/where@{}", registry.address, digest(&image.manifest));
    assert_eq!(node.pull(&by_digest).await.unwrap().id, image.id());
    // As the CRI suite has it: names of a public registry, answered from loopback.
    node.hosts(
        "registry.k8s.io",
        &format!(
            "server = \"http://{0}\"\n\n[host.\"http://{0}\"]\n  capabilities = [\"pull\", \"resolve\"]\n",
            registry.address
        ),
    );
    let pulled = node.pull("registry.k8s.io/some/where:v1").await.unwrap();
    assert_eq!(pulled.names.len(), 2);
    let kind = node.refuses("registry.k8s.io/some/where:v2", "manifest unknown").await;
    assert_eq!(kind, Kind::NotFound);
    let id = ContainerId::random();
    let snapshot = node.images.create_snapshot(&id, &pulled).await.unwrap();
    let mounted = snapshot.mount(false).unwrap();
    assert_eq!(mounted.read("etc/two", 10).unwrap().unwrap(), b"two");
}

/// Not a test of behaviour: prints what a pull of ten layers costs. `--ignored --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement of a minute"]
async fn measure_ten_layers() {
    let total = 1usize << 30;
    let mut layers = Vec::new();
    for number in 0..10u64 {
        let mut tar = Tar::new().dir("data").dir(&format!("data/{number}"));
        let mut left = total / 10;
        let mut file = 0u64;
        while left > 0 {
            // Many small ones and a few large; half of the bytes compress.
            let size = if file.is_multiple_of(50) { 8 << 20 } else { 20_000 };
            let size = size.min(left);
            let mut data = vec![0u8; size];
            let mut state = number << 32 | file | 1;
            for chunk in data.chunks_exact_mut(16) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                chunk[..8].copy_from_slice(&state.to_le_bytes());
            }
            tar = tar.file(&format!("data/{number}/{file}"), &data);
            left -= size;
            file += 1;
        }
        layers.push(tar.end());
    }
    let packed: Vec<_> = layers.iter().map(|layer| (GZIP, gzip(layer))).collect();
    let diff_ids = layers.iter().map(|layer| digest(layer)).collect();
    let image = TestImage::with(packed, diff_ids, "big");
    let compressed: usize = image.layers.iter().map(Vec::len).sum();
    drop(layers);
    let registry = DockerRegistry::start().await;
    registry.push("big", "1", &image).await;
    let name = format!("{}/big:1", registry.address);
    for round in 0..3 {
        let node = Node::with(|config| {
            config.max_parallel_layers = 6;
            config.max_layer_size = 1 << 40;
            config.stall_timeout = Duration::from_secs(30);
        })
        .await;
        rustix::fs::sync();
        let begun = Instant::now();
        node.pull(&name).await.unwrap();
        let pull = begun.elapsed();
        let begun = Instant::now();
        node.pull(&name).await.unwrap();
        let again = begun.elapsed();
        // The same number of bytes in one file: what the disk allows.
        let path = node.dir.path().join("plain");
        let chunk = vec![round as u8 + 1; 1 << 20];
        let begun = Instant::now();
        let mut file = std::fs::File::create(&path).unwrap();
        for _ in 0..total >> 20 {
            std::io::Write::write_all(&mut file, &chunk).unwrap();
        }
        file.sync_all().unwrap();
        println!(
            "pull {:.2} s ({} MB compressed, {} MB unpacked), again {:.1} ms, dd {:.2} s",
            pull.as_secs_f64(),
            compressed >> 20,
            total >> 20,
            again.as_secs_f64() * 1000.0,
            begun.elapsed().as_secs_f64()
        );
    }
}

//! Layers in the forms of tools that pull lazily, and what is in registries besides container images.

use std::io::Write as _;

use serde_json::json;

use super::{
    testing::{FakeRegistry, MANIFEST, Tar, TestImage, digest, gzip},
    tests::{Node, archives, layer},
    *,
};
use crate::error::chain;

const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const TITLE: &str = "org.opencontainers.image.title";

/// A frame that decoders skip (RFC 8878, section 3.1.2).
fn skippable(number: u8, content: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x50 | number, 0x2a, 0x4d, 0x18];
    frame.extend_from_slice(&(content.len() as u32).to_le_bytes());
    frame.extend_from_slice(content);
    frame
}

/// The archive in many frames, with a table of contents and a footer in frames to be skipped
/// (containers/storage, "zstd:chunked").
fn zstd_chunked(archive: &[u8]) -> Vec<u8> {
    let frames = archive.chunks(1000).map(|piece| zstd::bulk::compress(piece, 3).unwrap());
    let mut out: Vec<u8> = frames.flatten().collect();
    let toc = zstd::bulk::compress(br#"{"version":1,"entries":[]}"#, 3).unwrap();
    out.extend(skippable(0, &toc));
    out.extend(skippable(0, b"tar-split"));
    let mut footer = [0; 64];
    footer[56..].copy_from_slice(b"GNUlInUx");
    out.extend(skippable(0, &footer));
    out
}

/// The archive in many gzip members, the last of them an empty one whose header says where the table of
/// contents is (stargz-snapshotter, docs/estargz.md).
fn estargz(archive: &[u8]) -> Vec<u8> {
    let mut out: Vec<u8> = archive.chunks(700).flat_map(gzip).collect();
    out.extend(b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0");
    write!(out, "{:016x}STARGZ", 4711).unwrap();
    out.extend(b"\x01\0\0\xff\xff\0\0\0\0\0\0\0\0");
    out
}

fn changed(image: &TestImage, change: impl FnOnce(&mut serde_json::Value)) -> TestImage {
    let mut manifest = serde_json::from_slice(&image.manifest).unwrap();
    change(&mut manifest);
    TestImage { manifest: manifest.to_string().into_bytes(), ..image.clone() }
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_for_lazy_pulling_are_plain_zstd_and_gzip() {
    let registry = FakeRegistry::start().await;
    for format in [config::LayerFormat::Directories, config::LayerFormat::Erofs] {
        let node = Node::of(format).await;
        let content = |tag: &str| (0..90_000).map(|n| (n / 7) as u8 ^ tag.as_bytes()[0]).collect();
        let archive = |tag: &str, more: &str| {
            let data: Vec<u8> = content(tag);
            Tar::new().dir("etc").file(&format!("etc/{tag}"), data).file(more, "{}").end()
        };
        let chunked = archive("zstd", "etc/x");
        let stargz = archive("gzip", "stargz.index.json");
        let mut first = skippable(7, b"in front");
        first.extend(zstd_chunked(&archive("a", "b")));
        let image = TestImage::with(
            vec![
                (ZSTD, zstd_chunked(&chunked)),
                (GZIP, estargz(&stargz)),
                (ZSTD, first),
                // Registries have wrong media types.
                (GZIP, zstd_chunked(&archive("c", "d"))),
            ],
            [&chunked, &stargz, &archive("a", "b"), &archive("c", "d")].map(|a| digest(a)).into(),
            "lazy",
        );
        let image = changed(&image, |manifest| {
            manifest["layers"][0]["annotations"] = json!({
                "io.github.containers.zstd-chunked.manifest-checksum": digest(b"x"),
                "io.github.containers.zstd-chunked.manifest-position": "1:2:3:1",
            });
            manifest["layers"][1]["annotations"] =
                json!({"containerd.io/snapshot/stargz/toc.digest": digest(b"x")});
        });
        registry.put("lazy", "1", &image);
        let pulled = node.pull(&registry.reference("lazy:1")).await.unwrap();
        let again = archives(&pulled);
        assert!(again[0] == chunked && again[1] == stargz);
        assert!(again[2] == archive("a", "b") && again[3] == archive("c", "d"));

        // What comes behind the last frame must be one: nothing is taken for a layer by half.
        let mut odd = zstd_chunked(&chunked);
        odd.extend(b"and more");
        let image = TestImage::with(vec![(ZSTD, odd)], vec![digest(&chunked)], "odd");
        registry.put("lazy", "odd", &image);
        let error = node.pull(&registry.reference("lazy:odd")).await.map(|_| ());
        // The layer that is here already is not fetched again: it needs a node without it.
        assert!(error.is_ok());
        let fresh = Node::of(format).await;
        let error = fresh.pull(&registry.reference("lazy:odd")).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid, "{}", chain(&error));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_layers_come_from_the_registry_and_from_no_url() {
    let node = Node::new().await;
    let (registry, elsewhere) = (FakeRegistry::start().await, FakeRegistry::start().await);
    let archive = layer("foreign");
    let packed = gzip(&archive);
    elsewhere.put_blob("layers", &packed);
    let url = format!("http://{}/v2/layers/blobs/{}", elsewhere.address, digest(&packed));
    for media_type in [
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    ] {
        let image =
            TestImage::with(vec![(media_type, packed.clone())], vec![digest(&archive)], "f");
        let image = changed(&image, |manifest| manifest["layers"][0]["urls"] = json!([url]));
        registry.put("with", "1", &image);
        let name = registry.reference("with:1");
        assert!(archives(&node.pull(&name).await.unwrap()) == [archive.clone()]);
        node.images.remove(&name).await.unwrap();
        node.images.flush().await;

        registry.put_blob("without", &image.config);
        registry.put_manifest("without", "1", MANIFEST, &image.manifest);
        let kind = node.refuses(&registry.reference("without:1"), "is a foreign one").await;
        assert_eq!(kind, Kind::NotFound);
        node.refuses(&registry.reference("without:1"), "URLs in a manifest are not followed").await;
    }
    assert!(elsewhere.log().is_empty(), "{:?}", elsewhere.log());
}

/// A manifest of files: their titles and contents.
fn artifact(kind: &str, files: &[(Option<&str>, &[u8])]) -> TestImage {
    let layers = files.iter().map(|(title, content)| {
        let annotations = title.map_or(json!({}), |title| json!({ TITLE: title }));
        // What ORAS says of any file.
        let media_type = "application/vnd.oci.image.layer.v1.tar";
        json!({"mediaType": media_type, "digest": digest(content), "size": content.len(),
            "annotations": annotations})
    });
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": kind,
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest(b"{}"),
            "size": 2},
        "layers": layers.collect::<Vec<_>>(),
        "annotations": {"about": kind},
    });
    TestImage {
        manifest: manifest.to_string().into_bytes(),
        config: b"{}".to_vec(),
        layers: files.iter().map(|(_, content)| content.to_vec()).collect(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_artifacts_layers_are_files_with_their_titles() {
    for format in [config::LayerFormat::Directories, config::LayerFormat::Erofs] {
        let registry = FakeRegistry::start().await;
        let node = Node::of(format).await;
        let large: Vec<u8> = (0..3_000_000u32).map(|n| (n / 99) as u8).collect();
        let tar = layer("not unpacked");
        let model = artifact(
            "application/vnd.example.model",
            &[
                (Some("weights.bin"), &large),
                (Some("docs/read me"), b"hello"),
                (Some("a.tar"), &tar),
                (None, b"no title"),
                (Some("empty"), b""),
            ],
        );
        registry.put("model", "1", &model);
        let image = node.pull(&registry.reference("model:1")).await.unwrap();
        // The config of all of them is the same.
        assert_eq!(image.id, digest(&model.manifest));
        assert_eq!(image.artifact.as_deref(), Some("application/vnd.example.model"));
        assert_eq!(image.annotations["about"], "application/vnd.example.model");
        assert!(archives(&image) == model.layers);

        let own = digest(b"no title").to_string().replace(':', "-");
        let look = |image: &Image| {
            let mounted = node.images.view(image).mount(None).unwrap();
            let root = mounted.directory(Path::new("/")).unwrap().unwrap();
            let root = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&root));
            let read = |name: &str| std::fs::read(format!("{root}/{name}")).unwrap();
            assert!(read("weights.bin") == large && read("a.tar") == tar);
            assert_eq!(read("docs/read me"), b"hello");
            assert_eq!(read(&own), b"no title");
            assert_eq!(read("empty"), b"");
        };
        look(&image);
        // The same bytes as an image's layer are an archive, and under another title another file.
        let unpacked = TestImage::with(
            vec![("application/vnd.oci.image.layer.v1.tar", tar.clone())],
            vec![digest(&tar)],
            "x",
        );
        registry.put("image", "1", &unpacked);
        let other = node.pull(&registry.reference("image:1")).await.unwrap();
        assert_ne!(other.layers()[0], image.layers()[2]);
        registry.put("model", "2", &artifact("t", &[(Some("b.tar"), &tar)]));
        let renamed = node.pull(&registry.reference("model:2")).await.unwrap();
        assert!(![image.layers()[2], other.layers()[0]].contains(&renamed.layers()[0]));
        // One that shares files with another fetches only what is new.
        registry.forget_log();
        registry.put(
            "model",
            "3",
            &artifact("t", &[(Some("weights.bin"), &large), (Some("n"), b"n")]),
        );
        node.pull(&registry.reference("model:3")).await.unwrap();
        let blobs = registry.log().iter().filter(|line| line.contains("/blobs/")).count();
        assert_eq!(blobs, 1, "{:?}", registry.log());

        // It cannot run, nor be given away.
        let id: ContainerId = "c".repeat(64).parse().unwrap();
        let refused = [
            node.images.create_snapshot(&id, &image).await.map(drop),
            node.images.save(&[image.id.to_string()], save::Format::Oci, std::io::sink()).await,
            node.images
                .push(&registry.reference("model:1"), None, None, watch::channel(vec![]).0)
                .await
                .map(drop),
        ];
        for refused in refused {
            let error = refused.unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid);
            let text = chain(&error);
            assert!(
                text.contains("an artifact of type \"application/vnd.example.model\""),
                "{text}"
            );
        }

        // It is the same after a restart, and goes as images do.
        let node = node.again().await;
        let image = node.images.find(&registry.reference("model:1")).unwrap();
        assert_eq!(image.artifact.as_deref(), Some("application/vnd.example.model"));
        assert!(archives(&image) == model.layers);
        drop(image);
        let all: Vec<_> = node.images.list().iter().map(|image| image.id.to_string()).collect();
        for id in all {
            node.images.remove(&id).await.unwrap();
        }
        node.images.flush().await;
        assert_eq!(node.images.fs_usage().inodes_used, 0);

        // From an archive too.
        let archive = model.oci_archive("example.com/model:4");
        let imported = node.images.import(std::io::Cursor::new(archive), None).await.unwrap();
        assert_eq!(imported[0].id, digest(&model.manifest));
        assert!(archives(&imported[0]) == model.layers);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_artifact_that_is_not_what_it_says_is_refused_and_leaves_nothing() {
    let registry = FakeRegistry::start().await;
    let node = Node::with(|config| config.max_layer_size = 1 << 20).await;
    let name = registry.reference("a:1");
    for (titles, part) in [
        (&["../out"][..], "no relative path"),
        (&["/etc/passwd"], "no relative path"),
        (&["a", "a"], "two of its layers"),
        (&["a", "a/b"], "two of its layers"),
    ] {
        let contents: Vec<String> = (0..titles.len()).map(|n| format!("content {n}")).collect();
        let files: Vec<_> =
            titles.iter().zip(&contents).map(|(t, c)| (Some(*t), c.as_bytes())).collect();
        registry.put("a", "1", &artifact("t", &files));
        assert_eq!(node.refuses(&name, part).await, Kind::Invalid);
    }
    registry.put("a", "1", &artifact("t", &[(Some("big"), &vec![7; 2 << 20])]));
    assert_eq!(node.refuses(&name, "images.max_layer_size").await, Kind::Invalid);
    // Other bytes, more and fewer than the manifest says.
    let honest = artifact("t", &[(Some("x"), b"honest")]);
    registry.put("a", "1", &honest);
    let path = digest(b"honest").to_string();
    for (content, part) in
        [("liar!!", "content is"), ("hon", "ends after"), ("honest and more", "larger")]
    {
        let path = path.clone();
        registry.hook(move |r| {
            r.uri()
                .path()
                .ends_with(&path)
                .then(|| hyper::Response::new(super::testing::full(content)))
        });
        node.refuses(&name, part).await;
    }
}

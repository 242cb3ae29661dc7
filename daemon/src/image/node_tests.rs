//! Pulls as the node's files say: registries.conf, credentials of the node; and pulls that nobody
//! wants any more. Needs root.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use serde_json::json;

use super::{
    testing::{FakeRegistry, Tar, TestImage, broken, digest, listing, response, slow},
    tests::{DockerRegistry, Node, auth, base, layer},
    *,
};
use crate::error::chain;

/// A node with a registries.conf.
async fn node_with(conf: &str) -> Node {
    let node = Node::with(|config| {
        config.registries_conf = Some(config.hosts_dir.with_file_name("registries.conf"));
        config.auth_file = Some(config.hosts_dir.with_file_name("auth.json"));
    })
    .await;
    node.write("registries.conf", conf);
    node
}

#[tokio::test]
async fn an_image_is_looked_for_where_registries_conf_says() {
    let (mirror, own) = (FakeRegistry::start().await, FakeRegistry::start().await);
    let image = TestImage::new(&[base(), layer("one")]);
    own.put("real/a/b", "1", &image);
    let node = node_with(&format!(
        "[[registry]]\nprefix = 'r.example/team'\nlocation = '{}/real'\n\
         [[registry.mirror]]\nlocation = '{}/hub'\n",
        own.address, mirror.address
    ))
    .await;
    // Credentials of the request are for r.example, which is nobody here.
    let pulled = node.images.pull("r.example/team/a/b:1", auth("me", "s3cret"), None).await;
    assert_eq!(pulled.unwrap().names, ["r.example/team/a/b:1"]);
    assert!(mirror.log().iter().all(|line| line.contains("/v2/hub/a/b/")), "{:?}", mirror.log());
    assert!(mirror.log().len() >= 3 && own.log().len() >= 3, "mirrors come first, for each part");
    assert!(own.seen("authorization").is_empty() && mirror.seen("authorization").is_empty());

    // What the mirror has the registry is not asked for.
    mirror.put("hub/a/b", "1", &image);
    own.forget_log();
    let node = node.again().await;
    node.images.remove("r.example/team/a/b:1").await.unwrap();
    node.images.flush().await;
    node.pull("r.example/team/a/b:1").await.unwrap();
    assert!(own.log().is_empty(), "{:?}", own.log());

    node.write("registries.conf", "[[registry]]\nprefix = 'r.example/team'\nblocked = true\n");
    let kind = node.refuses("r.example/team/a/b:1", "blocked in").await;
    assert_eq!(kind, Kind::Precondition);
    node.write("registries.conf", "[[registry]]\nblocked = 1\n");
    assert_eq!(node.refuses("r.example/other:1", "registries.conf").await, Kind::Precondition);
}

#[tokio::test]
async fn hosts_toml_says_how_a_place_of_registries_conf_is_reached() {
    let (near, place) = (FakeRegistry::start().await, FakeRegistry::start().await);
    let image = TestImage::new(&[base()]);
    near.put("real/a", "1", &image);
    let node = node_with(&format!(
        "[[registry]]\nprefix = 'r.example'\nlocation = '{}/real'\n",
        place.address
    ))
    .await;
    node.hosts(&place.address.to_string(), &format!("[host.\"http://{}\"]\n", near.address));
    node.hosts("_default", "server = \"http://127.0.0.1:1\"\n");
    node.pull("r.example/a:1").await.unwrap();
    assert!(!near.log().is_empty() && place.log().is_empty());
    let resolved = node.images.resolve("r.example/a:1").await.unwrap();
    let endpoints = resolved[0].1.as_ref().unwrap();
    let urls: Vec<_> = endpoints.iter().map(|e| e.url.as_str()).collect();
    assert_eq!(
        urls,
        [
            format!("http://{}/v2/real/a", near.address),
            format!("https://{}/v2/real/a", place.address),
            format!("http://{}/v2/real/a", place.address),
        ]
    );
    assert!(endpoints[0].mirror && !endpoints[1].mirror && endpoints[2].fallback);
    assert!(endpoints[0].from.as_ref().unwrap().ends_with("hosts.toml"));
    assert!(endpoints[1].from.as_ref().unwrap().ends_with("registries.conf"));
    assert!(endpoints.iter().all(|e| !e.credentials));
}

#[tokio::test]
async fn a_short_name_is_what_the_node_says_and_found_as_it_was_written() {
    let (first, second) = (FakeRegistry::start().await, FakeRegistry::start().await);
    let image = TestImage::new(&[base()]);
    second.put("tool", "1", &image);
    second.put("deep/other", "latest", &TestImage::labelled(&[base()], "other"));
    let node = node_with(&format!(
        "unqualified-search-registries = ['{}', '{}']\n[aliases]\nx = '{}/deep/other'\n",
        first.address, second.address, second.address
    ))
    .await;
    let pulled = node.pull("tool:1").await.unwrap();
    assert_eq!(pulled.names, [second.reference("tool:1")]);
    assert!(first.log().iter().any(|line| line.contains("/v2/tool/manifests/1")));
    assert_eq!(node.images.find("tool:1").unwrap().id, image.id());
    let other = node.pull("x").await.unwrap();
    assert_eq!(other.names, [second.reference("deep/other:latest")]);
    assert_eq!(node.images.find("x").unwrap().id, other.id);
    // Nobody has it: each is named with its reason.
    let error = chain(&node.pull("missing").await.unwrap_err());
    for registry in [&first, &second] {
        assert!(error.contains(&registry.reference("missing")), "{error}");
    }
}

#[tokio::test]
async fn credentials_of_the_node_go_to_the_server_they_are_for_when_it_asks() {
    let (mirror, own) = (FakeRegistry::start().await, FakeRegistry::start().await);
    let image = TestImage::new(&[base()]);
    own.put("a/b", "1", &image);
    own.put("open/c", "1", &image);
    let node = node_with(&format!(
        "[[registry]]\nlocation = '{}'\n[[registry.mirror]]\nlocation = '{}/m'\n",
        own.address, mirror.address
    ))
    .await;
    for registry in [&own, &mirror] {
        registry.hook(|request| {
            let open = request.uri().path().contains("/open/");
            (!open && request.headers().get("authorization").is_none()).then(|| {
                let mut refused = response(401, "");
                let challenge = "Basic realm=\"x\"".parse().unwrap();
                refused.headers_mut().insert("www-authenticate", challenge);
                refused
            })
        });
    }
    node.pull(&own.reference("open/c:1")).await.unwrap();
    assert!(own.seen("authorization").is_empty(), "nobody asked");

    let base64 =
        |text: &str| base64::Engine::encode(&base64::engine::general_purpose::STANDARD, text);
    let auths = json!({"auths": {
        format!("{}/a", own.address): {"auth": base64("own:x")},
        mirror.address.to_string(): {"auth": base64("mirror:y")},
    }});
    node.write("auth.json", &auths.to_string());
    node.pull(&own.reference("a/b:1")).await.unwrap();
    let only = |registry: &FakeRegistry, text: &str| {
        let seen = registry.seen("authorization");
        let want = format!("Basic {}", base64(text));
        assert!(!seen.is_empty() && seen.iter().all(|value| *value == want), "{seen:?}");
    };
    only(&own, "own:x");
    only(&mirror, "mirror:y");

    // A file that cannot be used is part of the refusal.
    node.write("auth.json", "{");
    let error = chain(&node.pull(&own.reference("a/b:2")).await.unwrap_err());
    assert!(
        error.contains("credentials are not to be had") && error.contains("auth.json"),
        "{error}"
    );
}

#[tokio::test]
async fn a_pull_that_only_watchers_want_ends_with_the_last_of_them() {
    let registry = FakeRegistry::start().await;
    let node = Node::with(|config| config.stall_timeout = Duration::from_secs(60)).await;
    let image = TestImage::new(&[base(), layer("one")]);
    registry.put("a", "1", &image);
    let blob = image.layers[0].clone();
    let hang = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let hangs = hang.clone();
    registry.hook(move |request| {
        let held = hangs.load(std::sync::atomic::Ordering::SeqCst);
        let it = request.uri().path().contains(&digest(&blob).hex());
        (held && it).then(|| broken(&blob[..200], blob.len(), true))
    });
    let empty = node.files();
    let name = registry.reference("a:1");
    let watch = || node.images.pull_with_progress(&name, None, None, Caller::Watching).unwrap();
    let (first, second) = (watch(), watch());
    let mut progress = first.progress.clone();
    progress.wait_for(|p| p.layers.first().is_some_and(|l| l.received > 0)).await.unwrap();
    drop(first);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let Flight { hold, done, .. } = second;
    let begun = Instant::now();
    drop(hold);
    let error = done.await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert!(chain(&error).contains("cancelled"), "{}", chain(&error));
    // All of it is gone when the last hears of it.
    assert_eq!(node.files(), empty);

    // One that a kubelet wants too goes on.
    let watched = watch();
    let images = node.images.clone();
    let pull = tokio::spawn({
        let name = name.clone();
        async move { images.pull(&name, None, None).await.map(|image| image.id.clone()) }
    });
    let mut progress = watched.progress.clone();
    progress.wait_for(|p| p.layers.first().is_some_and(|l| l.received > 0)).await.unwrap();
    // The other has joined by now, or will find it.
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(watched);
    hang.store(false, std::sync::atomic::Ordering::SeqCst);
    // The held connection is not released by the script; a shutdown would be. It is joined:
    let joined = node.images.pull_with_progress(&name, None, None, Caller::Watching).unwrap();
    assert!(!pull.is_finished());
    assert!(joined.progress.borrow().layers[0].received > 0, "the same flight");
    node.images.shutdown().await;
    assert!(pull.await.unwrap().is_err());
}

#[tokio::test]
async fn a_pull_has_a_deadline_as_a_whole() {
    let registry = FakeRegistry::start().await;
    let node = Node::with(|config| {
        config.stall_timeout = Duration::from_secs(60);
        config.pull_timeout = Duration::from_millis(300);
    })
    .await;
    let image = TestImage::new(&[base()]);
    registry.put("a", "1", &image);
    let blob = image.layers[0].clone();
    registry.hook(move |request| {
        let it = request.uri().path().contains(&digest(&blob).hex());
        it.then(|| broken(&blob[..200], blob.len(), true))
    });
    let kind = node.refuses(&registry.reference("a:1"), "images.pull_timeout").await;
    assert_eq!(kind, Kind::Deadline);
}

#[tokio::test]
async fn names_are_given_and_taken_and_images_without_use_pruned() {
    let registry = FakeRegistry::start().await;
    let node = Node::new().await;
    registry.put("a", "1", &TestImage::labelled(&[base(), layer("one")], "a"));
    registry.put("b", "1", &TestImage::labelled(&[base(), layer("two")], "b"));
    let (a, b) = (registry.reference("a:1"), registry.reference("b:1"));
    let first = node.pull(&a).await.unwrap().id.clone();
    let second = node.pull(&b).await.unwrap().id.clone();
    node.images.tag(&a, "r.example/x:1").await.unwrap();
    node.images.tag(&first.hex()[..8], "r.example/x:2").await.unwrap();
    // A name moves.
    node.images.tag(&b, "r.example/x:2").await.unwrap();
    let node = node.again().await;
    assert_eq!(node.images.find("r.example/x:1").unwrap().id, first);
    assert_eq!(node.images.find("r.example/x:2").unwrap().id, second);
    assert_eq!(node.images.find(&a).unwrap().names, [a.as_str(), "r.example/x:1"]);
    for (image, name) in [("r.example/none:1", "x.example/y:1"), (&a, "UPPER"), (&a, "")] {
        assert!(node.images.tag(image, name).await.is_err(), "{name}");
    }
    let digest = format!("r.example/x@sha256:{}", "a".repeat(64));
    assert_eq!(node.images.tag(&a, &digest).await.unwrap_err().kind(), Kind::Invalid);

    use super::names::Removed;
    let gone = node.images.remove_name(&a).await.unwrap();
    assert_eq!(gone, Removed::Name(a.clone()));
    assert!(node.images.find(&a).is_none());
    // Used by a container, with a tag, and neither.
    let id = ContainerId::random();
    let image = node.images.find(&b).unwrap();
    node.images.create_snapshot(&id, &image).await.unwrap();
    drop(image);
    assert!(node.images.prune(false).await.unwrap().0.is_empty());
    let (pruned, _) = node.images.prune(true).await.unwrap();
    assert_eq!(pruned.iter().map(|image| &image.id).collect::<Vec<_>>(), [&first]);
    let node = node.again().await;
    assert_eq!(node.images.list().len(), 1);
    assert_eq!(
        node.images.remove_name("r.example/x:2").await.unwrap(),
        Removed::Name("r.example/x:2".into())
    );
    assert_eq!(node.images.remove_name(&b).await.unwrap(), Removed::Image(second));
    assert_eq!(node.images.remove_name(&b).await.unwrap_err().kind(), Kind::NotFound);
    node.images.remove_snapshot(&id).await.unwrap();
    node.images.flush().await;
    assert_eq!(node.images.fs_usage().used_bytes, 0);
}

/// Writes to memory, from another thread.
#[derive(Clone, Default)]
struct Out(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl io::Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn what_is_saved_is_imported_elsewhere_as_the_same_image() {
    let registry = FakeRegistry::start().await;
    let node = Node::new().await;
    let shared = base();
    let one = TestImage::labelled(&[shared.clone(), layer("one")], "one");
    let two = TestImage::labelled(&[shared, layer("two")], "two");
    registry.put("a", "1", &one);
    registry.put("b", "1", &two);
    let (a, b) = (registry.reference("a:1"), registry.reference("b:1"));
    node.pull(&a).await.unwrap();
    node.pull(&b).await.unwrap();
    node.images.tag(&a, "r.example/second:1").await.unwrap();
    for format in [save::Format::Oci, save::Format::Docker] {
        let save = async |names: &[&str]| {
            let out = Out::default();
            let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
            node.images.save(&names, format, out.clone()).await.unwrap();
            out.0.lock().unwrap().clone()
        };
        let archive = save(&[&a, &b, "r.example/second:1"]).await;
        assert_eq!(
            archive,
            save(&[&a, &b, "r.example/second:1"]).await,
            "{format:?}: the same bytes"
        );
        let elsewhere = Node::new().await;
        elsewhere.images.import(io::Cursor::new(archive), None).await.map(|_| ()).unwrap();
        let found = elsewhere.images.find(&a).unwrap();
        assert_eq!((&found.id, found.names.len()), (&one.id(), 2), "{format:?}");
        assert_eq!(elsewhere.images.find(&b).unwrap().id, two.id());
        assert_eq!(
            elsewhere.images.raw_config(&found).await.unwrap().into_bytes(),
            one.config,
            "{format:?}"
        );
        assert_eq!(elsewhere.images.fs_usage().used_bytes, node.images.fs_usage().used_bytes);
        let unnamed = save(&[&two.id().to_string()]).await;
        elsewhere.images.remove(&b).await.unwrap();
        elsewhere.images.import(io::Cursor::new(unnamed), None).await.map(|_| ()).unwrap();
        // Given by its id: with all its names.
        assert_eq!(elsewhere.images.find(&b).unwrap().id, two.id());
    }
    let out = Out::default();
    let error = node.images.save(&["none:1".into()], save::Format::Oci, out.clone()).await;
    assert_eq!(error.unwrap_err().kind(), Kind::NotFound);
    assert!(out.0.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_pushed_image_is_pulled_elsewhere_as_the_same_and_sent_once() {
    use super::push::Phase;
    let registry = FakeRegistry::start().await;
    let real = DockerRegistry::start().await;
    let image = TestImage::new(&[base(), layer("one"), layer("two")]);
    registry.put("a", "1", &image);
    let node = Node::new().await;
    let name = registry.reference("a:1");
    node.pull(&name).await.unwrap();
    let push = async |any: &str, to: Option<&str>| {
        let (progress, watched) = watch::channel(Vec::new());
        let pushed = node.images.push(any, to, None, progress).await;
        let phases = watched.borrow().iter().map(|layer| layer.phase).collect::<Vec<_>>();
        pushed.map(|(name, digest)| (name.to_string(), digest, phases))
    };
    let to = format!("{}/team/a:1", real.address);
    let (full, first, phases) = push(&name, Some(&to)).await.unwrap();
    assert_eq!((full.as_str(), phases), (to.as_str(), vec![Phase::Done; 3]));

    let elsewhere = Node::new().await;
    let pulled = elsewhere.pull(&to).await.unwrap();
    assert_eq!(pulled.id, image.id());
    assert_eq!(pulled.digests, [format!("{}/team/a@{first}", real.address)]);
    assert_eq!(
        elsewhere.images.fs_usage(),
        FsUsage { mountpoint: elsewhere.images.fs_usage().mountpoint, ..node.images.fs_usage() }
    );

    // Again: the same blobs, the same manifest.
    let (_, again, phases) = push(&name, Some(&to)).await.unwrap();
    assert_eq!((again, phases), (first.clone(), vec![Phase::Exists; 3]));
    // As it came from there, to a neighbour there: nothing is sent, the manifest is the same.
    let (progress, watched) = watch::channel(Vec::new());
    let neighbour = format!("{}/other/a:2", real.address);
    let pushed = elsewhere.images.push(&to, Some(&neighbour), None, progress).await.unwrap();
    assert_eq!(pushed.1, first);
    assert!(watched.borrow().iter().all(|layer| layer.phase == Phase::Exists), "taken over");
    let third = Node::new().await;
    assert_eq!(third.pull(&neighbour).await.unwrap().id, image.id());

    // Without a name to push it as, of what is not here, and where nobody is.
    assert_eq!(push(&image.id().hex(), None).await.unwrap_err().kind(), Kind::Invalid);
    assert_eq!(push("none:1", Some(&to)).await.unwrap_err().kind(), Kind::NotFound);
    let nobody = push(&name, Some("127.0.0.1:1/a:1")).await.unwrap_err();
    assert!(chain(&nobody).contains("push 127.0.0.1:1/a:1"), "{}", chain(&nobody));
    // A registry that is only read.
    registry.hook(|request| (request.method() == "PUT").then(|| response(405, "")));
    let refused = chain(&push(&name, None).await.unwrap_err());
    assert!(refused.contains("405") && refused.contains("/v2/a/manifests/1"), "{refused}");
    let ingest = std::fs::read_dir(node.dir.path().join("images/ingest")).unwrap();
    assert_eq!(ingest.count(), 0);
}

/// A layer that does not compress.
fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    rand::RngCore::fill_bytes(&mut rand::rng(), &mut bytes);
    Tar::new().file("noise", bytes).end()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_layer_comes_by_ranges_side_by_side_where_a_connection_is_slow() {
    use std::sync::Mutex;
    let registry = FakeRegistry::start().await;
    let node = Node::new().await;
    let image = TestImage::new(&[noise(40 << 20)]);
    registry.put("a", "1", &image);
    let blob = bytes::Bytes::from(image.layers[0].clone());
    let asked = std::sync::Arc::new(Mutex::new(Vec::new()));
    let (seen, content) = (asked.clone(), blob.clone());
    // Ends with the body that is sent.
    struct Sending(std::sync::Arc<AtomicUsize>);
    impl Drop for Sending {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }
    let (sending, most) = <(std::sync::Arc<AtomicUsize>, std::sync::Arc<AtomicUsize>)>::default();
    let highest = most.clone();
    registry.hook(move |request| {
        if !request.uri().path().contains(&digest(&content).hex()) {
            return None;
        }
        let range = request.headers().get("range")?.to_str().unwrap().to_owned();
        let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let from: usize = from.parse().unwrap();
        let to = to.parse::<usize>().map_or(content.len(), |to| to + 1);
        seen.lock().unwrap().push(from..to);
        let beside = sending.fetch_add(1, Ordering::SeqCst) + 1;
        highest.fetch_max(beside, Ordering::SeqCst);
        let guard = Sending(sending.clone());
        let body = slow(content.slice(from..to), 256 << 10, Duration::from_millis(10));
        let body = http_body_util::BodyExt::map_frame(body, move |frame| {
            let _ = &guard;
            frame
        });
        let body = http_body_util::BodyExt::boxed(body);
        let length = content.len();
        Some(
            hyper::Response::builder()
                .status(206)
                .header("content-range", format!("bytes {from}-{}/{length}", to - 1))
                .header("content-length", to - from)
                .body(body)
                .unwrap(),
        )
    });
    assert_eq!(node.pull(&registry.reference("a:1")).await.unwrap().id, image.id());
    let mut asked = asked.lock().unwrap().clone();
    asked.sort_by_key(|range| range.start);
    // Each byte was asked for once.
    let mut at = 0;
    for range in &asked {
        assert_eq!(range.start, at, "{asked:?}");
        at = range.end;
    }
    assert_eq!(at, blob.len());
    let most = most.load(Ordering::SeqCst);
    assert!((2..=4).contains(&most), "{most} parts at a time: {asked:?}");
}

#[tokio::test]
async fn a_large_layer_of_a_server_without_ranges_comes_as_a_whole() {
    let registry = FakeRegistry::start().await;
    let node = Node::new().await;
    let image = TestImage::new(&[noise(20 << 20)]);
    registry.put("a", "1", &image);
    let blob = image.layers[0].clone();
    registry.hook(move |request| {
        let it = request.uri().path().contains(&digest(&blob).hex());
        it.then(|| hyper::Response::new(super::testing::full(blob.clone())))
    });
    assert_eq!(node.pull(&registry.reference("a:1")).await.unwrap().id, image.id());
    let blob = digest(&image.layers[0]).hex();
    assert_eq!(registry.log().iter().filter(|line| line.contains(&blob)).count(), 1);
}

#[tokio::test]
async fn connections_that_end_early_cost_no_bytes_and_no_patience() {
    let registry = FakeRegistry::start().await;
    let node = Node::new().await;
    let image = TestImage::new(&[noise(24 << 20)]);
    registry.put("a", "1", &image);
    let blob = bytes::Bytes::from(image.layers[0].clone());
    let sent = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (counted, content) = (sent.clone(), blob.clone());
    registry.hook(move |request| {
        if !request.uri().path().contains(&digest(&content).hex()) {
            return None;
        }
        let range = request.headers().get("range")?.to_str().unwrap().to_owned();
        let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let from: usize = from.parse().unwrap();
        let to = to.parse::<usize>().map_or(content.len(), |to| to + 1);
        let until = to.min(from + (2 << 20));
        counted.fetch_add(until - from, std::sync::atomic::Ordering::SeqCst);
        let mut answer = match until == to {
            true => hyper::Response::new(super::testing::full(content.slice(from..to))),
            false => broken(&content[from..until], to - from, false),
        };
        *answer.status_mut() = hyper::StatusCode::PARTIAL_CONTENT;
        let value = format!("bytes {from}-{}/{}", to - 1, content.len()).parse().unwrap();
        answer.headers_mut().insert("content-range", value);
        Some(answer)
    });
    assert_eq!(node.pull(&registry.reference("a:1")).await.unwrap().id, image.id());
    assert_eq!(sent.load(std::sync::atomic::Ordering::SeqCst), blob.len(), "nothing came twice");
}

#[tokio::test]
async fn a_containers_changes_become_an_image_that_looks_like_it() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let registry = FakeRegistry::start().await;
    let node = Node::new().await;
    let below = Tar::new()
        .dir("data")
        .file("data/gone", "x")
        .file("data/kept", "x")
        .file("data/changed", "old")
        .dir("data/emptied")
        .file("data/emptied/old", "x")
        .file("data/becomes-directory", "x")
        .end();
    registry.put("a", "1", &TestImage::new(&[base(), below]));
    let image = node.pull(&registry.reference("a:1")).await.unwrap();
    let id = ContainerId::random();
    let snapshot = node.images.create_snapshot(&id, &image).await.unwrap();
    let root = node.dir.path().join("rootfs");
    std::fs::create_dir(&root).unwrap();
    snapshot.mount(false).unwrap().attach(&root).unwrap();
    let at = |path: &str| root.join(path);
    std::fs::remove_file(at("data/gone")).unwrap();
    std::fs::write(at("data/changed"), "new").unwrap();
    std::fs::set_permissions(at("data/changed"), PermissionsExt::from_mode(0o4755)).unwrap();
    std::fs::remove_dir_all(at("data/emptied")).unwrap();
    std::fs::create_dir(at("data/emptied")).unwrap();
    std::fs::write(at("data/emptied/new"), "n").unwrap();
    std::fs::remove_file(at("data/becomes-directory")).unwrap();
    std::fs::create_dir(at("data/becomes-directory")).unwrap();
    std::fs::write(at("data/first"), vec![5; 100_000]).unwrap();
    std::fs::hard_link(at("data/first"), at("data/second")).unwrap();
    std::os::unix::fs::chown(at("data/first"), Some(1000), Some(70_000)).unwrap();
    symlink("../etc/passwd", at("data/link")).unwrap();
    let long = format!("data/{}", "n".repeat(200));
    std::fs::write(at(&long), "long").unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(at(&long), "user.note", b"a\0b", flags).unwrap();
    let made = std::process::Command::new("mkfifo").arg(at("data/fifo")).status().unwrap();
    assert!(made.success());
    let socket = std::os::unix::net::UnixListener::bind(at("data/socket")).unwrap();

    let notes = commit::Notes { author: "Me".into(), comment: "why".into() };
    let commit = async |name: &str| {
        node.images.commit(&id, name, commit::Ids::default(), notes.clone()).await
    };
    let (name, made) = commit("r.example/made:1").await.unwrap();
    assert_eq!((name.as_str(), made.names.as_slice()), ("r.example/made:1", &[name.clone()][..]));
    assert_eq!(made.layers().len(), 3);
    assert_eq!(made.layers()[..2], image.layers()[..]);
    assert_eq!(made.defaults, image.defaults);
    let config = node.images.raw_config(&made).await.unwrap();
    assert!(config.contains("holdfast commit") && config.contains("\"why\""), "{config}");

    std::fs::remove_file(at("data/socket")).unwrap();
    // It would keep the mount busy.
    drop(socket);
    let other = ContainerId::random();
    let copy = node.images.create_snapshot(&other, &made).await.unwrap();
    let second = node.dir.path().join("second");
    std::fs::create_dir(&second).unwrap();
    copy.mount(false).unwrap().attach(&second).unwrap();
    let (mut want, mut got) = (listing(&root), listing(&second));
    // Removing the socket changed the time of its directory.
    want.remove("\"data\"");
    got.remove("\"data\"");
    let unmount = |path: &Path| {
        let status = std::process::Command::new("umount").arg(path).status().unwrap();
        assert!(status.success());
    };
    unmount(&second);
    unmount(&root);
    assert_eq!(got, want);

    assert_eq!(commit("UPPER").await.unwrap_err().kind(), Kind::Invalid);
    let nobody = ContainerId::random();
    let none =
        node.images.commit(&nobody, "r.example/x:1", Default::default(), notes.clone()).await;
    assert_eq!(none.unwrap_err().kind(), Kind::NotFound);
    // Ids that the user namespace lacks.
    let range = crate::pod::config::IdMapping { host_id: 5_000_000, container_id: 0, length: 10 };
    let ids = commit::Ids { uids: vec![range], gids: vec![range] };
    let refused = node.images.commit(&id, "r.example/x:1", ids, notes.clone()).await.unwrap_err();
    assert_eq!(refused.kind(), Kind::Precondition, "{}", chain(&refused));
    node.images.flush().await;
    assert_eq!(std::fs::read_dir(node.dir.path().join("images/ingest")).unwrap().count(), 0);
}

//! Pulls as the node's files say: registries.conf, credentials of the node; and pulls that nobody
//! wants any more. Needs root.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{
    testing::{FakeRegistry, TestImage, broken, digest, response},
    tests::{Node, auth, base, layer},
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
    assert_eq!(kind, Kind::Denied);
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

//! Images: pulled, listed, shared, kept and removed.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use holdfast_integration::{
    Image, Node,
    image::{Compression, Format},
    node::{image_spec, on},
    registry::{Answer, Scripted},
    tar::Entry,
    wait::Look,
};
use holdfast_protos::cri;
use hyper::StatusCode;
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn every_format_and_compression_runs() -> Result<()> {
    let mut node = Node::start().await?;
    let pod = node.pod("a").host_network().run().await?;
    for (format, compression) in [
        (Format::Oci, Compression::Gzip),
        (Format::Oci, Compression::Zstd),
        (Format::Oci, Compression::Plain),
        (Format::Docker, Compression::Gzip),
    ] {
        let name = format!("{format:?}-{compression:?}").to_lowercase();
        let image = Image::busybox_with(compression)?
            .format(format)
            .layer([Entry::file("etc/name", 0o644, name.as_str())])
            .build()?;
        let reference = node.load(&format!("formats/{name}:1"), &image).await?;
        let text = pod.container(&reference).name(&name).sh("cat /etc/name").output().await?;
        assert_eq!(text, name);
        let here = node.image(&reference).await?.context("it was pulled")?;
        assert_eq!(here.id, image.id());
        ensure!(here.repo_tags.contains(&reference), "{here:?}");
        ensure!(here.repo_digests.iter().any(|d| d.ends_with(&image.manifest.digest)), "{here:?}");
        ensure!(here.size > 0);
    }
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_lie_over_each_other_with_whiteouts_owners_and_modes() -> Result<()> {
    let mut node = Node::start().await?;
    let image = Image::busybox()?
        .layer([
            Entry::dir("data", 0o755),
            Entry::file("data/replaced", 0o644, "old"),
            Entry::file("data/removed", 0o644, "old"),
            Entry::dir("data/emptied", 0o755),
            Entry::file("data/emptied/old", 0o644, "old"),
            Entry::dir("data/becomes-file", 0o755),
            Entry::file("data/becomes-file/x", 0o644, "old"),
            Entry::file("data/setuid", 0o4755, "x").owner(1000, 3000),
            Entry::file("data/linked", 0o644, "same"),
            Entry::hardlink("data/link", "data/linked"),
            Entry::symlink("data/sym", "../etc/hostname"),
        ])
        .layer([
            Entry::file("data/replaced", 0o600, "new"),
            Entry::file("data/.wh.removed", 0o644, ""),
            Entry::file("data/emptied/.wh..wh..opq", 0o644, ""),
            Entry::file("data/emptied/new", 0o644, "new"),
            Entry::file("data/.wh.becomes-file", 0o644, ""),
            Entry::file("data/becomes-file", 0o644, "file"),
        ])
        .layer([Entry::file(&format!("data/{}", "n".repeat(200)), 0o644, "long name")])
        .build()?;
    let reference = node.load("test/layers:1", &image).await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&reference).sh("exec sleep 1000").start().await?;
    assert_eq!(container.sh("cat /data/replaced /data/becomes-file").await?, "newfile");
    assert_eq!(container.sh("ls /data/emptied").await?, "new");
    assert_eq!(container.sh("stat -c '%a %u %g' /data/setuid").await?, "4755 1000 3000");
    assert_eq!(container.sh("stat -c %h /data/link").await?, "2");
    assert_eq!(container.sh("readlink /data/sym").await?, "../etc/hostname");
    assert_eq!(container.sh("cat /data/nnnn*").await?, "long name");
    assert_eq!(container.sh("ls -a /data | grep -c wh || true").await?, "0");
    assert_eq!(container.sh("ls /data/removed 2>&1 | grep -c 'No such'").await?, "1");
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_gives_the_image_of_this_platform() -> Result<()> {
    let mut node = Node::start().await?;
    let own = holdfast_integration::image::architecture();
    let mine = Image::busybox()?.layer([Entry::file("mine", 0o644, "x")]).build()?;
    let other = Image::busybox()?.architecture("s390x").build()?;
    let platform = format!("linux/{own}");
    for format in [Format::Oci, Format::Docker] {
        let index = Image::index(format, &[("linux/s390x", &other), (&platform, &mine)]);
        let name = format!("index/{format:?}:1").to_lowercase();
        let reference = node.registry().await?.push_index(&name, &index, &[&other, &mine]).await?;
        node.pull(&reference).await?;
        let here = node.image(&reference).await?.context("pulled")?;
        assert_eq!(here.id, mine.id());
        // By the digest of the index, and by that of the manifest.
        let (repository, _) = reference.rsplit_once(':').unwrap();
        for digest in [&index.digest, &mine.manifest.digest] {
            let by_digest = format!("{repository}@{digest}");
            node.pull(&by_digest).await?;
            assert_eq!(node.image(&by_digest).await?.context("by digest")?.id, mine.id());
        }
    }
    assert_eq!(node.images().await?.len(), 1);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_pulls_of_one_image_share_one_download() -> Result<()> {
    let mut node = Node::start().await?;
    let image = Image::busybox()?.random_layers(4, 1_000_000).build()?;
    let reference = node.registry().await?.push("shared/image:1", &image).await?;
    let pulls = (0..8).map(|_| node.pull(&reference));
    let answers = futures::future::try_join_all(pulls).await?;
    ensure!(answers.iter().all(|answer| answer == &answers[0]), "{answers:?}");
    // Again, one after another: nothing is fetched twice.
    node.pull(&reference).await?;
    let registry = node.registry().await?;
    for blob in image.blobs() {
        let path = format!("/v2/shared/image/blobs/{}", blob.digest);
        assert_eq!(registry.gets(&path).await?, 1, "{path}");
    }
    // What another image shares with it is not fetched either.
    let second = Image::busybox()?.layer([Entry::file("second", 0o644, "x")]).build()?;
    assert_eq!(second.layers[0].digest, image.layers[0].digest);
    let second_reference = node.registry().await?.push("shared/second:1", &second).await?;
    node.pull(&second_reference).await?;
    let path = format!("/v2/shared/second/blobs/{}", second.layers[0].digest);
    assert_eq!(node.registry().await?.gets(&path).await?, 0);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_does_not_end_the_pull() -> Result<()> {
    let node = Node::start().await?;
    let registry = Scripted::start().await?;
    let image = Image::busybox()?.build()?;
    let reference = registry.serve("slow:1", &image)?;
    let layer = &image.layers[0];
    let blob = format!("/v2/slow/blobs/{}", layer.digest);
    // The config waits for a while: long enough for the first caller to give up.
    registry.answer(&blob, Answer::Stall(layer.media_type.clone(), vec![].into(), 1 << 20));
    let impatient = node.cri().deadline(Duration::from_millis(700));
    let request =
        cri::PullImageRequest { image: Some(image_spec(&reference)), ..Default::default() };
    let error = impatient.images().pull_image(request).await.unwrap_err();
    ensure!(matches!(error.code(), Code::DeadlineExceeded | Code::Cancelled), "{error:?}");
    let begun = Instant::now();
    node.images().await?;
    ensure!(begun.elapsed() < Duration::from_secs(1), "a list waited for a pull");
    registry.answer(&blob, Answer::blob(layer));
    node.pull(&reference).await?;
    ensure!(node.image(&reference).await?.is_some());
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn images_survive_restarts() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let before = node.images().await?;
    node.kill9()?;
    node.restart().await?;
    assert_eq!(node.images().await?, before);
    let pod = node.pod("a").host_network().run().await?;
    assert_eq!(pod.container(&image).sh("echo fine").output().await?, "fine");
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_during_a_pull_starts_again_without_the_image() -> Result<()> {
    let mut node = Node::start().await?;
    let registry = Scripted::start().await?;
    let image = Image::busybox()?.random_layers(2, 500_000).build()?;
    let reference = registry.serve("cut:1", &image)?;
    let layer = &image.layers[1];
    let half = layer.content[..layer.content.len() / 2].to_vec();
    let blob = format!("/v2/cut/blobs/{}", layer.digest);
    registry.answer(
        &blob,
        Answer::Stall(layer.media_type.clone(), half.into(), layer.content.len() as u64),
    );
    let cri = node.cri().clone();
    let request =
        cri::PullImageRequest { image: Some(image_spec(&reference)), ..Default::default() };
    let pull = tokio::spawn(async move { cri.images().pull_image(request).await });
    on(&node, Duration::from_secs(10), "the layer to be asked for", async || {
        let asked = registry.requests().iter().any(|request| request.path == blob);
        Ok(Look::when(asked, || "it was not".into()))
    })
    .await?;
    node.kill9()?;
    ensure!(pull.await?.is_err());
    registry.answer(&blob, Answer::blob(layer));
    node.restart().await?;
    assert!(node.images().await?.is_empty());
    node.pull(&reference).await?;
    let pod = node.pod("a").host_network().run().await?;
    let text = pod.container(&reference).sh("wc -c < /random/0").output().await?;
    assert_eq!(text.trim(), "500000");
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn removal_is_complete_and_can_be_repeated() -> Result<()> {
    let mut node = Node::start().await?;
    let before = node.inventory();
    let image = Image::busybox()?.build()?;
    let registry = node.registry().await?;
    let one = registry.push("test/one:1", &image).await?;
    let two = registry.push("test/two:1", &image).await?;
    node.pull(&one).await?;
    node.pull(&two).await?;
    let images = node.images().await?;
    assert_eq!(images.len(), 1, "{images:?}");
    assert_eq!(images[0].repo_tags.len(), 2, "{images:?}");
    // By id, by any name: all of it goes.
    node.remove_image(image.id()).await?;
    assert!(node.images().await?.is_empty());
    ensure!(node.image(&one).await?.is_none() && node.image(&two).await?.is_none());
    node.remove_image(&one).await?;
    node.remove_image("registry.example/never/seen:1").await?;
    node.nothing_left_since(&before).await?;
    let request = cri::ImageFsInfoRequest {};
    let usage = node.cri().images().image_fs_info(request).await?.into_inner();
    ensure!(!usage.image_filesystems.is_empty() && !usage.container_filesystems.is_empty());
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_in_use_stays_usable() -> Result<()> {
    let mut node = Node::start().await?;
    let before = node.inventory();
    let image = node.registry().await?.push("test/used:1", &Image::busybox()?.build()?).await?;
    node.pull(&image).await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh("exec sleep 1000").start().await?;
    // Refused or deferred: either way the container keeps its files, also those it has not opened.
    match node.remove_image(&image).await {
        Ok(()) => ensure!(node.image(&image).await?.is_none(), "removed, and still named"),
        Err(error) => ensure!(
            error.code() == Code::FailedPrecondition
                && error.message().contains(&container.id[..13]),
            "{error:?}"
        ),
    }
    assert_eq!(container.sh("ls /bin/busybox && echo fine").await?, "/bin/busybox\nfine");
    node.kill9()?;
    node.restart().await?;
    assert_eq!(container.sh("cat /etc/group | wc -l").await?, "4");
    pod.stop().await?;
    pod.remove().await?;
    node.remove_image(&image).await?;
    node.nothing_left_since(&before).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_are_sent_as_the_registry_asks() -> Result<()> {
    let node = Node::start().await?;
    let registry = Scripted::start().await?;
    let image = Image::busybox()?.build()?;
    let reference = registry.serve("private/image:1", &image)?;
    let manifest = "/v2/private/image/manifests/1";
    let token = format!("http://{}/token", registry.host());
    let challenge = |value: String| {
        Answer::Status(
            StatusCode::UNAUTHORIZED,
            vec![("www-authenticate".into(), value)],
            r#"{"errors":[{"code":"UNAUTHORIZED","message":"who are you"}]}"#.into(),
        )
    };
    let pull = async |auth: cri::AuthConfig| {
        let request = cri::PullImageRequest {
            image: Some(image_spec(&reference)),
            auth: Some(auth),
            ..Default::default()
        };
        node.cri().images().pull_image(request).await
    };
    let login = cri::AuthConfig {
        username: "kelp".into(),
        password: "s3cret-word".into(),
        ..Default::default()
    };
    // Basic: the answer stays 401, so the pull fails; what counts is what was sent, and what is said.
    registry.answer(manifest, challenge("Basic realm=\"test\"".into()));
    registry.answer("/v2/", challenge("Basic realm=\"test\"".into()));
    let error = pull(login.clone()).await.unwrap_err();
    ensure!(matches!(error.code(), Code::PermissionDenied | Code::Unauthenticated), "{error:?}");
    ensure!(!error.message().contains("s3cret-word"), "the password is in the error");
    ensure!(!node.daemon_log(10_000).contains("s3cret-word"), "the password is in the log");
    let basic = base64::engine::general_purpose::STANDARD.encode("kelp:s3cret-word");
    let sent = |value: &str| {
        let value = Some(value.to_owned());
        registry.requests().iter().any(|request| request.authorization == value)
    };
    ensure!(sent(&format!("Basic {basic}")), "{:?}", registry.requests());

    // Bearer: a token is fetched with the login, and sent.
    let bearer = challenge(format!(
        "Bearer realm=\"{token}\",service=\"test\",scope=\"repository:private/image:pull\""
    ));
    registry.answer(manifest, bearer.clone());
    registry.answer("/v2/", bearer);
    registry.answer(
        "/token",
        Answer::Content("application/json".into(), r#"{"token":"t0ken-value"}"#.into()),
    );
    pull(login).await.unwrap_err();
    let asked = registry.requests();
    let fetched =
        asked.iter().find(|r| r.path.starts_with("/token")).context("no token fetched")?;
    ensure!(fetched.path.contains("service=test"), "{fetched:?}");
    ensure!(fetched.path.contains("private%2Fimage") || fetched.path.contains("private/image"));
    assert_eq!(fetched.authorization.as_deref(), Some(format!("Basic {basic}").as_str()));
    ensure!(sent("Bearer t0ken-value"), "{asked:?}");

    // Then without being asked for anything.
    registry.serve("private/image:1", &image)?;
    pull(cri::AuthConfig::default()).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_are_imported_with_the_command_line() -> Result<()> {
    let node = Node::start().await?;
    let image = Image::busybox()?.layer([Entry::file("etc/name", 0o644, "imported")]).build()?;
    let oci = node.path().join("oci.tar");
    let docker = node.path().join("docker.tar");
    std::fs::write(&oci, image.oci_archive("registry.example/oci:1"))?;
    std::fs::write(&docker, image.docker_archive("registry.example/docker:1")?)?;
    for (file, name) in [(&oci, "registry.example/oci:1"), (&docker, "registry.example/docker:1")] {
        let text = node.cli(&["image", "import", &file.display().to_string()])?;
        ensure!(text.contains(name), "{text}");
        let here = node.image(name).await?.with_context(|| format!("{name} is not here"))?;
        assert_eq!(here.id, image.id());
    }
    let pod = node.pod("a").host_network().run().await?;
    let text = pod.container("registry.example/docker:1").sh("cat /etc/name").output().await?;
    assert_eq!(text, "imported");
    let list = node.cli(&["images"])?;
    ensure!(list.contains("registry.example/oci"), "{list}");
    // What is no archive.
    std::fs::write(&oci, "not a tar file at all")?;
    let error = node.cli(&["image", "import", &oci.display().to_string()]).unwrap_err();
    ensure!(error.to_string().contains("oci.tar"), "{error}");
    node.finish().await
}

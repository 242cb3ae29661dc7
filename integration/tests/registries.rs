//! The registry client and the image commands as users meet them: the daemon, the command line, a real
//! registry.

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use holdfast_integration::{
    Image, Node,
    ground::Ground,
    image::Compression,
    node::image_spec,
    proxy::Cutting,
    registry::{Answer, Registry, Scripted},
    tar::Entry,
};
use holdfast_protos::cri;
use hyper::StatusCode;

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_cuts_connections_costs_few_more_bytes() -> Result<()> {
    let node = Node::start().await?;
    let registry = Registry::start().await?;
    // 500 MB that do not compress, through a proxy that ends each connection after 20 MB.
    let image =
        Image::empty().compression(Compression::Plain).random_layers(1, 500_000_000).build()?;
    registry.push("cut/image:1", &image).await?;
    let size: u64 = image.blobs().map(|blob| blob.content.len() as u64).sum();
    let proxy = Cutting::start(registry.host(), 20_000_000).await?;
    let reference = format!("{}/cut/image:1", proxy.host());
    node.pull(&reference).await.with_context(|| node.daemon_log(40))?;
    assert_eq!(node.image(&reference).await?.context("it was pulled")?.id, image.id());
    ensure!(proxy.cuts() >= 24, "it cut {} connections", proxy.cuts());
    let (sent, most) = (proxy.sent(), size + size / 20);
    eprintln!(
        "{} connections cut, {sent} bytes for {size}: {:.3} % more",
        proxy.cuts(),
        (sent as f64 / size as f64 - 1.0) * 100.0
    );
    ensure!(sent <= most, "{sent} bytes for {size}");
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_log_has_a_secret_at_any_level() -> Result<()> {
    let files = Ground::new()?;
    let registry = Scripted::start().await?;
    let image = Image::busybox()?.build()?;
    let reference = registry.serve("private/image:1", &image)?;
    let auth_file = files.path().join("auth.json");
    let base64 = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let node = Node::builder()
        .log_level("trace")
        .images_config(&format!("auth_file = {auth_file:?}"))
        .start()
        .await?;
    // The header of a mirror is a secret too.
    let hosts = node.path().join("hosts").join(registry.host());
    std::fs::create_dir_all(&hosts)?;
    std::fs::write(
        hosts.join("hosts.toml"),
        format!("[host.\"http://{0}\".header]\nx-secret = \"h3ader-secret\"\n", registry.host()),
    )?;
    let token = format!("http://{}/token", registry.host());
    registry.answer(
        "/v2/private/image/manifests/1",
        Answer::Status(
            StatusCode::UNAUTHORIZED,
            vec![("www-authenticate".into(), format!("Bearer realm=\"{token}\",service=\"s\""))],
            String::new(),
        ),
    );
    registry.answer(
        "/token",
        Answer::Content("application/json".into(), r#"{"token":"t0ken-secret"}"#.into()),
    );
    let pull = async |auth: Option<cri::AuthConfig>| {
        let request = cri::PullImageRequest {
            image: Some(image_spec(&reference)),
            auth,
            ..Default::default()
        };
        node.cri().images().pull_image(request).await.unwrap_err().to_string()
    };
    let mut said = String::new();
    // Of the request: password, identity token, registry token.
    let login = |change: &dyn Fn(&mut cri::AuthConfig)| {
        let mut auth = cri::AuthConfig::default();
        change(&mut auth);
        Some(auth)
    };
    said += &pull(login(&|auth| {
        auth.username = "kelp".into();
        auth.password = "passw0rd-secret".into();
    }))
    .await;
    said += &pull(login(&|auth| auth.identity_token = "1dentity-secret".into())).await;
    said += &pull(login(&|auth| auth.registry_token = "reg1stry-secret".into())).await;
    said += &pull(login(&|auth| auth.auth = base64("kelp:base64-secret"))).await;
    // Of the node; also from a file that cannot be read.
    let login =
        serde_json::json!({"auths": {registry.host(): {"auth": base64("n0de:file-secret")}}});
    std::fs::write(&auth_file, login.to_string())?;
    said += &pull(None).await;
    std::fs::write(&auth_file, "{\"auths\": {\"x\": {\"auth\": [\"br0ken-secret\"]}}}")?;
    said += &pull(None).await;
    let sent: Vec<_> = registry.requests().iter().filter_map(|r| r.authorization.clone()).collect();
    ensure!(sent.contains(&format!("Basic {}", base64("n0de:file-secret"))), "{sent:?}");
    ensure!(sent.contains(&"Bearer t0ken-secret".to_owned()), "{sent:?}");
    ensure!(sent.contains(&"Bearer reg1stry-secret".to_owned()), "{sent:?}");

    let log = std::fs::read(node.path().join("daemon.log"))?;
    let log = String::from_utf8_lossy(&log);
    ensure!(log.contains("TRACE"), "the log is not what this test is about");
    for secret in [
        "h3ader-secret".to_owned(),
        "t0ken-secret".to_owned(),
        "passw0rd-secret".to_owned(),
        "1dentity-secret".to_owned(),
        "reg1stry-secret".to_owned(),
        "base64-secret".to_owned(),
        "file-secret".to_owned(),
        "br0ken-secret".to_owned(),
        base64("kelp:passw0rd-secret"),
        base64("kelp:base64-secret"),
        base64("n0de:file-secret"),
    ] {
        let line = log.lines().find(|line| line.contains(&secret));
        ensure!(line.is_none(), "{secret} is in the log: {line:?}");
        ensure!(!said.contains(&secret), "{secret} is in an answer: {said}");
    }
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn registries_conf_leads_to_a_mirror_and_is_explained() -> Result<()> {
    let files = Ground::new()?;
    let conf = files.path().join("registries.conf");
    let mirror = Registry::start().await?;
    let image = Image::busybox()?.build()?;
    mirror.push("hub/library/busybox:1", &image).await?;
    std::fs::write(
        &conf,
        format!(
            "unqualified-search-registries = ['docker.io']\n[[registry]]\nprefix = 'docker.io'\n\
             location = '127.0.0.1:1'\n[[registry.mirror]]\nlocation = '{}/hub'\ninsecure = true\n\
             [[registry]]\nprefix = 'evil.example'\nblocked = true\n",
            mirror.host()
        ),
    )?;
    let node =
        Node::builder().images_config(&format!("registries_conf = {conf:?}")).start().await?;
    node.pull("busybox:1").await?;
    let here = node.image("busybox:1").await?.context("by its short name")?;
    assert_eq!(here.repo_tags, ["docker.io/library/busybox:1"]);
    let text = node.cli(&["config", "registries", "busybox:1"])?;
    let lines: Vec<&str> = text.lines().collect();
    ensure!(lines[0] == "docker.io/library/busybox:1", "{text}");
    // That it speaks plain HTTP is known since the pull.
    ensure!(
        lines[2].contains(&format!("http://{}/v2/hub/library/busybox", mirror.host())),
        "{text}"
    );
    ensure!(lines[3].contains("https://127.0.0.1:1/v2/library/busybox"), "{text}");
    ensure!(lines[4].contains("http://127.0.0.1:1/v2/library/busybox"), "{text}");
    ensure!(lines[2..].iter().all(|line| line.contains("registries.conf")), "{text}");
    let json: serde_json::Value =
        serde_json::from_str(&node.cli(&["config", "registries", "-o", "json", "busybox:1"])?)?;
    assert_eq!(json["names"][0]["endpoints"][0]["mirror"], true);
    let error = node.cli(&["config", "registries", "evil.example/a"]).unwrap_err().to_string();
    ensure!(error.contains("blocked in"), "{error}");
    let error = node.pull("evil.example/a").await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::FailedPrecondition);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn images_leave_the_node_and_come_back_by_the_command_line() -> Result<()> {
    let mut node = Node::start().await?;
    let image = Image::busybox()?.layer([Entry::file("etc/name", 0o644, "given away")]).build()?;
    let reference = node.load("team/image:1", &image).await?;
    node.pull(&reference).await?;
    // Named, pushed to another registry, pulled from there.
    let other = Registry::start().await?;
    let elsewhere = format!("{}/copies/image:2", other.host());
    node.cli(&["image", "tag", &reference, &elsewhere])?;
    let digest = node.cli(&["image", "push", &elsewhere])?;
    ensure!(digest.starts_with("sha256:"), "{digest}");
    assert_eq!(node.cli(&["image", "push", "-q", &reference, &elsewhere])?, digest);
    node.cli(&["rmi", &elsewhere])?;
    ensure!(node.image(&elsewhere).await?.is_none(), "its name was taken");
    ensure!(node.image(&reference).await?.is_some(), "the image stays");
    assert_eq!(node.pull(&elsewhere).await?, image.id());

    for format in ["oci", "docker"] {
        let file = node.path().join(format!("{format}.tar")).display().to_string();
        node.cli(&["image", "save", "--format", format, "-o", &file, &reference])?;
        node.cli(&["rmi", image.id()])?;
        ensure!(node.images().await?.is_empty(), "the image is gone");
        let loaded = node.cli(&["image", "load", &file])?;
        ensure!(loaded.contains(&reference) && loaded.contains(image.id()), "{loaded}");
        let pod = node.pod(format).host_network().run().await?;
        let text = pod.container(&reference).sh("cat /etc/name").output().await?;
        assert_eq!(text, "given away");
        ensure!(node.cli(&["image", "prune", "-a"])?.is_empty(), "it is in use");
        pod.remove().await?;
        let partial = node.path().join(format!("{format}.tar.partial"));
        ensure!(!partial.exists(), "it was renamed");
    }
    let error = node.cli(&["image", "save", "-o", "/nowhere/x.tar", &reference]).unwrap_err();
    ensure!(error.to_string().contains("/nowhere/x.tar"), "{error}");
    let error = node.cli(&["image", "save", "none.example/a:1"]).unwrap_err();
    ensure!(error.to_string().contains("none.example/a:1"), "{error}");
    let pruned = node.cli(&["image", "prune", "-a"])?;
    ensure!(pruned.contains(image.id()), "{pruned}");
    ensure!(node.images().await?.is_empty());
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_container_has_changed_becomes_an_image() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let script = "echo changed > /etc/changed; rm /bin/vi; mkdir -p /d/e; ln /etc/changed /d/e/link; exec sleep 1000";
    let container = pod.container(&image).name("work").sh(script).start().await?;
    container.sh("while ! [ -e /d/e/link ]; do sleep 0.05; done").await?;
    let id = node.cli(&["commit", "-m", "by a test", &container.id, "r.example/made:1"])?;
    ensure!(id.starts_with("sha256:"), "{id}");
    let inspected = node.cli(&["image", "inspect", "r.example/made:1"])?;
    ensure!(inspected.contains("by a test"), "{inspected}");
    let other = node.pod("b").host_network().run().await?;
    let script = "cat /etc/changed; stat -c %h /etc/changed; [ -e /bin/vi ] || echo gone";
    let text = other.container("r.example/made:1").sh(script).output().await?;
    assert_eq!(text.split_whitespace().collect::<Vec<_>>(), ["changed", "2", "gone"]);
    let error = node.cli(&["commit", "nothing", "r.example/made:2"]).unwrap_err().to_string();
    ensure!(error.contains("nothing"), "{error}");
    node.finish().await
}

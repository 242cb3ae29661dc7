//! What is wrong, malformed or hostile gets a clear error and leaves nothing behind.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{
    Image, Node,
    image::Builder,
    registry::{Answer, Scripted},
    tar::{self, Entry},
};
use holdfast_protos::cri;
use hyper::{StatusCode, body::Bytes};
use tonic::Code;

/// An error that a user can act on: not ours, on one line, with these words.
fn is_clear(status: &tonic::Status, code: Code, words: &[&str]) -> Result<()> {
    ensure!(status.code() == code, "{status:?} should be {code:?}");
    ensure!(!status.message().contains('\n'), "{status:?} has more than one line");
    for word in words {
        ensure!(status.message().contains(word), "{status:?} does not say {word:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_references_are_refused_by_every_image_call() -> Result<()> {
    let node = Node::start().await?;
    let before = node.inventory();
    let long = format!("a/{}", "b".repeat(300));
    for reference in [
        "",
        " ",
        "upper/CASE",
        "a//b",
        "/a",
        "a/",
        "a:",
        "a:b:c",
        "a@sha256:123",
        "a@md5:0123456789abcdef0123456789abcdef",
        "a:tag with space",
        "../../etc/passwd",
        "http://example.com/a",
        "a\nb",
        "ä/b",
        "host:port/a",
        "host:99999/a",
        &format!("a:{}", "t".repeat(129)),
        &long,
    ] {
        let error = node.pull(reference).await.expect_err(reference);
        is_clear(&error, Code::InvalidArgument, &[]).with_context(|| format!("{reference:?}"))?;
        // Nothing of that name can be here: saying so is right as well.
        match node.image(reference).await {
            Ok(image) => ensure!(image.is_none(), "{reference:?}"),
            Err(error) => is_clear(&error, Code::InvalidArgument, &[])?,
        }
        match node.remove_image(reference).await {
            Ok(()) => {}
            Err(error) => is_clear(&error, Code::InvalidArgument, &[])?,
        }
    }
    node.nothing_left_since(&before).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_pods_are_refused() -> Result<()> {
    let node = Node::start().await?;
    let before = node.inventory();
    type Change = Box<dyn FnOnce(&mut cri::PodSandboxConfig)>;
    let metadata = |change: fn(&mut cri::PodSandboxMetadata)| -> Change {
        Box::new(move |config| change(config.metadata.as_mut().unwrap()))
    };
    let cases: Vec<(&str, Change)> = vec![
        ("metadata", Box::new(|config| config.metadata = None)),
        ("name", metadata(|metadata| metadata.name.clear())),
        ("namespace", metadata(|metadata| metadata.namespace.clear())),
        ("uid", metadata(|metadata| metadata.uid.clear())),
        ("log", Box::new(|config| config.log_directory = "relative/path".into())),
        ("hostname", Box::new(|config| config.hostname = "a b".into())),
        ("hostname", Box::new(|config| config.hostname = "x".repeat(300))),
        (
            "port",
            Box::new(|config| {
                config.port_mappings.push(cri::PortMapping {
                    container_port: 70_000,
                    host_port: 80,
                    ..Default::default()
                });
            }),
        ),
        (
            "protocol",
            Box::new(|config| {
                config.port_mappings.push(cri::PortMapping {
                    protocol: 77,
                    container_port: 80,
                    host_port: 80,
                    ..Default::default()
                });
            }),
        ),
        (
            "sysctl",
            Box::new(|config| {
                config.linux.as_mut().unwrap().sysctls.insert("../../etc/x".into(), "1".into());
            }),
        ),
        (
            "namespace",
            Box::new(|config| {
                let linux = config.linux.as_mut().unwrap();
                linux
                    .security_context
                    .get_or_insert_default()
                    .namespace_options
                    .get_or_insert_default()
                    .network = 99;
            }),
        ),
        (
            "cgroup",
            Box::new(|config| config.linux.as_mut().unwrap().cgroup_parent = "/a/../../b".into()),
        ),
    ];
    let mut findings = Vec::new();
    for (number, (word, change)) in cases.into_iter().enumerate() {
        match node.pod("wrong").config(change).run().await {
            Ok(pod) => {
                findings.push(format!("{number}: a pod with a wrong {word} was run"));
                pod.remove().await?;
            }
            Err(error) => findings.extend(
                is_clear(&error, Code::InvalidArgument, &[word])
                    .err()
                    .map(|finding| format!("{number}: {finding}")),
            ),
        }
    }
    ensure!(findings.is_empty(), "{findings:#?}");
    let Err(error) =
        node.cri().runtime().run_pod_sandbox(cri::RunPodSandboxRequest::default()).await
    else {
        anyhow::bail!("a pod without a configuration was run");
    };
    is_clear(&error, Code::InvalidArgument, &["config"])?;
    let error = node.pod("wrong").runtime("no-such-runtime").run().await.unwrap_err();
    ensure!(matches!(error.code(), Code::InvalidArgument | Code::NotFound), "{error:?}");
    // It says what there is instead.
    is_clear(&error, error.code(), &["no-such-runtime", "runc", "crun"])?;
    assert!(node.pods().await?.is_empty());
    node.nothing_left_since(&before).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_containers_are_refused() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let before = node.inventory();
    type Change = Box<dyn FnOnce(&mut cri::ContainerConfig)>;
    fn security(config: &mut cri::ContainerConfig) -> &mut cri::LinuxContainerSecurityContext {
        config.linux.get_or_insert_default().security_context.get_or_insert_default()
    }
    fn resources(config: &mut cri::ContainerConfig) -> &mut cri::LinuxContainerResources {
        config.linux.get_or_insert_default().resources.get_or_insert_default()
    }
    let mount = |host: &str, container: &str| cri::Mount {
        host_path: host.into(),
        container_path: container.into(),
        ..Default::default()
    };
    let (relative, nowhere) = (mount("/tmp", "relative"), mount("", "/x"));
    let rro = cri::Mount { recursive_read_only: true, ..mount("/tmp", "/x") };
    let mapped = cri::Mount { propagation: 9, ..mount("/tmp", "/x") };
    let cases: Vec<(&str, Change)> = vec![
        ("metadata", Box::new(|c| c.metadata = None)),
        ("name", Box::new(|c| c.metadata.as_mut().unwrap().name.clear())),
        ("image", Box::new(|c| c.image = None)),
        ("log", Box::new(|c| c.log_path = "../../outside.log".into())),
        ("log", Box::new(|c| c.log_path = "/absolute.log".into())),
        ("mount", Box::new(move |c| c.mounts.push(relative))),
        ("mount", Box::new(move |c| c.mounts.push(nowhere))),
        ("read", Box::new(move |c| c.mounts.push(rro))),
        ("propagation", Box::new(move |c| c.mounts.push(mapped))),
        ("working", Box::new(|c| c.working_dir = "relative".into())),
        (
            "env",
            Box::new(|c| {
                c.envs.push(cri::KeyValue { key: "A=B".into(), value: b"x".to_vec() });
            }),
        ),
        (
            "env",
            Box::new(|c| {
                c.envs.push(cri::KeyValue { key: "A".into(), value: b"x\0y".to_vec() });
            }),
        ),
        ("arg", Box::new(|c| c.args.push("nul\0byte".into()))),
        ("user", Box::new(|c| security(c).run_as_user = Some(cri::Int64Value { value: -1 }))),
        ("group", Box::new(|c| security(c).run_as_group = Some(cri::Int64Value { value: 5 }))),
        ("group", Box::new(|c| security(c).supplemental_groups = vec![-7])),
        (
            "user",
            Box::new(|c| {
                security(c).run_as_user = Some(cri::Int64Value { value: 1 });
                security(c).run_as_username = "app".into();
            }),
        ),
        ("memory", Box::new(|c| resources(c).memory_limit_in_bytes = -5)),
        ("oom", Box::new(|c| resources(c).oom_score_adj = 5000)),
        ("cpuset", Box::new(|c| resources(c).cpuset_cpus = "zero".into())),
        (
            "page",
            Box::new(|c| {
                resources(c).hugepage_limits =
                    vec![cri::HugepageLimit { page_size: "3 bananas".into(), limit: 1 }];
            }),
        ),
        (
            "container",
            Box::new(|c| {
                let namespaces = security(c).namespace_options.get_or_insert_default();
                namespaces.pid = cri::NamespaceMode::Target.into();
                namespaces.target_id = "0".repeat(64);
            }),
        ),
        (
            "seccomp",
            Box::new(|c| {
                security(c).seccomp = Some(cri::SecurityProfile {
                    profile_type: cri::security_profile::ProfileType::Localhost.into(),
                    localhost_ref: "relative.json".into(),
                });
            }),
        ),
        (
            "device",
            Box::new(|c| {
                c.devices.push(cri::Device {
                    host_path: "/dev/null".into(),
                    container_path: "/dev/x".into(),
                    permissions: "rwx".into(),
                });
            }),
        ),
        ("stop", Box::new(|c| c.stop_signal = 999)),
    ];
    let mut findings = Vec::new();
    for (number, (word, change)) in cases.into_iter().enumerate() {
        match pod.container(&image).config(change).create().await {
            Ok(container) => {
                findings.push(format!("{number}: a container with a wrong {word} was created"));
                container.remove().await?;
            }
            Err(error) => {
                let says = error.message().to_lowercase().contains(word);
                let code = matches!(
                    error.code(),
                    Code::InvalidArgument | Code::NotFound | Code::FailedPrecondition
                );
                if !(says && code) {
                    findings.push(format!("{number}: {word}: {error:?}"));
                }
            }
        }
    }
    ensure!(findings.is_empty(), "{findings:#?}");
    // Of a pod that is not there, of an image that is not there.
    let nowhere = holdfast_integration::Pod::existing(node.cri(), &"0".repeat(64));
    let error = nowhere.container(&image).create().await.unwrap_err();
    is_clear(&error, Code::NotFound, &["pod"])?;
    let error = pod.container("registry.example/none:1").create().await.unwrap_err();
    is_clear(&error, Code::NotFound, &["registry.example/none:1"])?;
    let stopped = node.pod("stopped").host_network().run().await?;
    stopped.stop().await?;
    let error = stopped.container(&image).create().await.unwrap_err();
    is_clear(&error, Code::FailedPrecondition, &[])?;
    stopped.remove().await?;
    assert!(node.containers().await?.is_empty());
    node.nothing_left_since(&before).await?;
    node.finish().await
}

/// Pulls an image with these entries in its second layer and expects a refusal that names `words`.
async fn refused(node: &mut Node, name: &str, image: &Image, words: &[&str]) -> Result<()> {
    let before = node.inventory();
    let reference = node.registry().await?.push(name, image).await?;
    let error = match node.pull(&reference).await {
        Err(error) => error,
        Ok(_) => anyhow::bail!("{name} was pulled"),
    };
    for word in words {
        ensure!(error.message().contains(word), "{name}: {error:?} does not say {word:?}");
    }
    ensure!(
        !matches!(error.code(), Code::Internal | Code::Unknown | Code::Ok),
        "{name}: {error:?}"
    );
    ensure!(node.image(&reference).await?.is_none(), "{name} is there");
    node.nothing_left_since(&before).await.with_context(|| name.to_owned())
}

fn base() -> Builder {
    Image::empty().layer([Entry::dir("etc", 0o755), Entry::file("etc/base", 0o644, "base")])
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_layers_write_nothing_outside() -> Result<()> {
    let mut node = Node::start().await?;
    // Where they aim at. What appears here has escaped.
    let outside = node.path().join("outside");
    fs::create_dir(&outside)?;
    let target = outside.join("escaped").display().to_string();
    let up = format!("{}{}", "../".repeat(24), target.trim_start_matches('/'));
    let link = outside.display().to_string();
    let deep = "../".repeat(24) + link.trim_start_matches('/');
    let victim = outside.join("victim");
    fs::write(&victim, "untouched")?;

    let cases: Vec<(&str, Vec<Entry>)> = vec![
        ("dotdot", vec![Entry::file(&up, 0o644, "x")]),
        ("inner-dotdot", vec![Entry::file(&format!("etc/{up}"), 0o644, "x")]),
        ("absolute", vec![Entry::file(&target, 0o644, "x")]),
        ("symlink", vec![Entry::symlink("way", &link), Entry::file("way/escaped", 0o644, "x")]),
        (
            "relative-symlink",
            vec![Entry::symlink("way", &deep), Entry::file("way/escaped", 0o644, "x")],
        ),
        (
            "symlink-chain",
            vec![
                Entry::dir("a", 0o755),
                Entry::symlink("a/up", ".."),
                Entry::symlink("way", &format!("a/up/{deep}")),
                Entry::file("way/escaped", 0o644, "x"),
            ],
        ),
        ("hardlink", vec![Entry::hardlink("stolen", &victim.display().to_string())]),
        (
            "hardlink-through-symlink",
            vec![Entry::symlink("way", &link), Entry::hardlink("stolen", "way/victim")],
        ),
        (
            "overwrite-through-hardlink",
            vec![
                Entry::symlink("way", &victim.display().to_string()),
                Entry::file("way", 0o644, "x"),
            ],
        ),
        (
            "whiteout-outside",
            vec![Entry::symlink("way", &link), Entry::file("way/.wh.victim", 0o644, "")],
        ),
        ("whiteout-dotdot", vec![Entry::file("etc/.wh...", 0o644, "")]),
        ("whiteout-dot", vec![Entry::file("etc/.wh..", 0o644, "")]),
    ];
    for (name, entries) in cases {
        let image = base().layer(entries).build()?;
        let reference = node.registry().await?.push(&format!("hostile/{name}:1"), &image).await?;
        // Either is safe: to refuse it, or to keep it inside the root as a container would see it.
        let result = node.pull(&reference).await;
        if let Err(error) = &result {
            ensure!(!matches!(error.code(), Code::Internal | Code::Unknown), "{name}: {error:?}");
            ensure!(error.message().len() > 20, "{name}: {error:?}");
        }
        let names: Vec<_> = fs::read_dir(&outside)?.map(|e| e.unwrap().file_name()).collect();
        ensure!(names == ["victim"], "{name} escaped: {names:?}");
        ensure!(fs::read_to_string(&victim)? == "untouched", "{name} wrote outside");
        ensure!(fs::metadata(&victim)?.nlink() == 1, "{name} linked outside");
        if result.is_ok() {
            node.remove_image(&reference).await?;
        }
    }
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn device_nodes_of_a_layer_give_no_access_to_devices() -> Result<()> {
    let mut node = Node::start().await?;
    let image = Image::busybox()?
        .layer([
            Entry::dir("devices", 0o755),
            Entry::block_device("devices/disk", 254, 0),
            Entry::char_device("devices/kmsg", 1, 11),
        ])
        .build()?;
    let reference = node.registry().await?.push("hostile/devices:1", &image).await?;
    match node.pull(&reference).await {
        Err(error) => ensure!(error.message().contains("device"), "{error:?}"),
        Ok(_) => {
            let pod = node.pod("a").host_network().run().await?;
            let container = pod.container(&reference).sh("exec sleep 1000").start().await?;
            for name in ["disk", "kmsg"] {
                let path = format!("/devices/{name}");
                let read = container.exec_sync(&["head", "-c", "1", &path], 10).await?;
                ensure!(read.exit_code != 0, "{path} was read");
            }
            pod.stop().await?;
            pod.remove().await?;
            node.remove_image(&reference).await?;
        }
    }
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_image_store_is_closed_to_other_users() -> Result<()> {
    let mut node = Node::start().await?;
    // Set-user-ID programs, device nodes and secrets of images lie in it as they are.
    let image = base().layer([Entry::file("setuid", 0o4755, "x")]).build()?;
    node.load("test/store:1", &image).await?;
    let mut open = vec![node.path().join("root")];
    let mut files = 0;
    while let Some(dir) = open.pop() {
        let metadata = fs::metadata(&dir)?;
        if metadata.mode() & 0o011 == 0 && metadata.uid() == 0 {
            continue;
        }
        for entry in fs::read_dir(&dir)?.flatten() {
            ensure!(entry.file_name() != "setuid", "{} can be reached", entry.path().display());
            files += 1;
            if entry.file_type()?.is_dir() {
                open.push(entry.path());
            }
        }
    }
    println!("{files} names can be seen by others");
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_layers_are_refused() -> Result<()> {
    let mut node = Node::start().await?;
    let image = base().layer([Entry::file("big", 0o644, vec![7; 300_000])]).build()?;
    let whole = image.layers[1].content.clone();

    let cut = image.clone().replace_layer(1, whole[..whole.len() / 2].to_vec());
    refused(&mut node, "broken/truncated:1", &cut, &[]).await?;
    let garbage = image.clone().replace_layer(1, b"this is no gzip at all".repeat(100));
    refused(&mut node, "broken/garbage:1", &garbage, &[]).await?;
    // Well formed, and not what the configuration says.
    let other = base().layer([Entry::file("other", 0o644, "other")]).build()?;
    let swapped = image.clone().replace_layer(1, other.layers[1].content.clone());
    refused(&mut node, "broken/diff-id:1", &swapped, &["diff"]).await?;
    // A tar that ends in the middle of a file, within a gzip stream that does not.
    let mut archive = tar::archive(&[Entry::file("big", 0o644, vec![7; 300_000])]);
    archive.truncate(100_000);
    let short = base().raw_layer(archive).build()?;
    refused(&mut node, "broken/short-tar:1", &short, &[]).await?;
    let noise = base().raw_layer(vec![0x5a; 4096]).build()?;
    refused(&mut node, "broken/no-tar:1", &noise, &[]).await?;
    // After all that, a good one.
    node.load("good/image:1", &image).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_unpacks_to_more_than_the_limit_is_refused() -> Result<()> {
    let mut node = Node::builder().images_config("max_layer_size = \"10MiB\"").start().await?;
    // Zeros: 40 MB that travel as 40 kB.
    let bomb = base().layer([Entry::file("bomb", 0o644, vec![0; 40_000_000])]).build()?;
    refused(&mut node, "hostile/bomb:1", &bomb, &["max_layer_size"]).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_registry_serves_is_verified() -> Result<()> {
    let node = Node::start().await?;
    let registry = Scripted::start().await?;
    let image = Image::empty()
        .compression(holdfast_integration::image::Compression::Plain)
        .layer([Entry::dir("etc", 0o755), Entry::file("etc/base", 0o644, "base")])
        .build()?;
    let before = node.inventory();
    let other = Bytes::from_static(b"{\"not\":\"what was asked for\"}");
    // A good layer of the same length, but another.
    let foreign = Image::empty()
        .compression(holdfast_integration::image::Compression::Plain)
        .layer([Entry::dir("etc", 0o755), Entry::file("etc/base", 0o644, "BASE")])
        .build()?;
    let foreign_layer = &foreign.layers[0];

    // A layer, a configuration, a manifest by digest: each with other bytes than its digest says.
    let layer = &image.layers[0];
    let reference = registry.serve("wrong/layer:1", &image)?;
    let path = |kind: &str, what: &str, digest: &str| format!("/v2/wrong/{kind}/{what}/{digest}");
    registry.answer(
        &path("layer", "blobs", &layer.digest),
        Answer::Content(layer.media_type.clone(), foreign_layer.content.clone().into()),
    );
    let error = node.pull(&reference).await.unwrap_err();
    ensure!(error.message().contains("manifest says"), "{error:?}");

    let reference = registry.serve("wrong/config:1", &image)?;
    let config = &image.config;
    registry.answer(
        &path("config", "blobs", &config.digest),
        Answer::Content(config.media_type.clone(), other.clone()),
    );
    let error = node.pull(&reference).await.unwrap_err();
    ensure!(error.message().contains("expected sha256:"), "{error:?}");

    registry.serve("wrong/manifest:1", &image)?;
    let digest = &image.manifest.digest;
    registry.answer(
        &path("manifest", "manifests", digest),
        Answer::Content(image.manifest.media_type.clone(), other),
    );
    let reference = format!("{}/wrong/manifest@{digest}", registry.host());
    let error = node.pull(&reference).await.unwrap_err();
    ensure!(error.message().contains("expected sha256:"), "{error:?}");

    // A manifest of 100 MB is not read to its end.
    let kind = image.manifest.media_type.clone();
    registry.answer("/v2/huge/manifests/1", Answer::Spaces(kind.clone(), 100_000_000));
    let rss = || -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", node.daemon_pid()))?;
        let line = status.lines().find(|line| line.starts_with("VmHWM")).context("VmHWM")?;
        Ok(line.split_whitespace().nth(1).context("kB")?.parse()?)
    };
    let peak = rss()?;
    let error = node.pull(&format!("{}/huge:1", registry.host())).await.unwrap_err();
    ensure!(!matches!(error.code(), Code::Internal | Code::Unknown), "{error:?}");
    ensure!(error.message().contains("manifest"), "{error:?}");
    ensure!(rss()? < peak + 40_000, "the daemon grew from {peak} to {} kB", rss()?);

    let mut findings = Vec::new();
    // What is no manifest, what has no platform of ours, what is refused, what is not there.
    for (name, answer, words) in [
        ("text", Answer::Content(kind.clone(), "hello".into()), vec!["manifest"]),
        ("html", Answer::Content("text/html".into(), "<html>".into()), vec!["manifest"]),
        ("empty", Answer::Content(kind.clone(), r#"{"schemaVersion":2}"#.into()), vec!["manifest"]),
        (
            "old",
            Answer::Content(
                "application/vnd.docker.distribution.manifest.v1+json".into(),
                r#"{"schemaVersion":1}"#.into(),
            ),
            vec!["schema 1"],
        ),
        (
            "denied",
            Answer::Status(
                StatusCode::FORBIDDEN,
                vec![],
                r#"{"errors":[{"code":"DENIED","message":"not for you"}]}"#.into(),
            ),
            vec!["not for you"],
        ),
        ("loop", redirect_to("/v2/loop/manifests/1"), vec!["redirect"]),
        ("busy", Answer::Status(StatusCode::SERVICE_UNAVAILABLE, vec![], "".into()), vec!["503"]),
    ] {
        registry.answer(&format!("/v2/{name}/manifests/1"), answer);
        let error = node.pull(&format!("{}/{name}:1", registry.host())).await.expect_err(name);
        let clear = !matches!(error.code(), Code::Internal | Code::Unknown)
            && words.iter().all(|word| error.message().contains(word));
        if !clear {
            findings.push(format!("{name}: {error:?}, which should say {words:?}"));
        }
    }
    ensure!(findings.is_empty(), "{findings:#?}");
    let error = node.pull(&format!("{}/nothing/here:1", registry.host())).await.unwrap_err();
    is_clear(&error, Code::NotFound, &["nothing/here"])?;

    let foreign = base().architecture("s390x").build()?;
    let index = Image::index(Default::default(), &[("linux/s390x", &foreign)]);
    registry.answer("/v2/foreign/manifests/1", Answer::blob(&index));
    let error = node.pull(&format!("{}/foreign:1", registry.host())).await.unwrap_err();
    ensure!(error.message().contains("s390x") || error.message().contains("platform"), "{error:?}");

    assert!(node.images().await?.is_empty());
    node.nothing_left_since(&before).await?;
    node.finish().await
}

fn redirect_to(path: &str) -> Answer {
    let headers = vec![("location".to_owned(), path.to_owned())];
    Answer::Status(StatusCode::TEMPORARY_REDIRECT, headers, String::new())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_stalls_or_is_not_there_is_given_up() -> Result<()> {
    let node = Node::builder().images_config("stall_timeout = \"2s\"").start().await?;
    let registry = Scripted::start().await?;
    let image = base().build()?;
    let before = node.inventory();
    let layer = &image.layers[0];
    let half: Bytes = layer.content[..layer.content.len() / 2].to_vec().into();
    let whole = layer.content.len() as u64;
    let blob = format!("/v2/slow/blobs/{}", layer.digest);
    let reference = registry.serve("slow:1", &image)?;
    registry.answer(&blob, Answer::Stall(layer.media_type.clone(), half.clone(), whole));
    let begun = Instant::now();
    let error = node.pull(&reference).await.unwrap_err();
    ensure!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
    ensure!(matches!(error.code(), Code::DeadlineExceeded | Code::Unavailable), "{error:?}");
    // Cut in the middle, each time.
    registry.answer(&blob, Answer::Cut(layer.media_type.clone(), half, whole));
    let error = node.pull(&reference).await.unwrap_err();
    ensure!(matches!(error.code(), Code::Unavailable | Code::DeadlineExceeded), "{error:?}");
    // Nobody listens.
    let nobody = holdfast_integration::registry::free_address()?;
    let error = node.pull(&format!("{nobody}/a:1")).await.unwrap_err();
    is_clear(&error, Code::Unavailable, &[&nobody.to_string()])?;
    node.nothing_left_since(&before).await?;
    // And then it works.
    registry.answer(&blob, Answer::blob(layer));
    node.pull(&reference).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_is_for_loopback_and_named_registries_only() -> Result<()> {
    let node = Node::start().await?;
    // Reserved for documentation: no host answers, and none may be asked in the clear.
    let begun = Instant::now();
    let deadline = node.cri().deadline(Duration::from_secs(10));
    let request = cri::PullImageRequest {
        image: Some(holdfast_integration::node::image_spec("192.0.2.1:5000/a:1")),
        ..Default::default()
    };
    let error = deadline.images().pull_image(request).await.unwrap_err();
    ensure!(!error.message().contains("http://192.0.2.1"), "{error:?}");
    println!("given up after {:?}: {error}", begun.elapsed());
    node.finish().await
}

#[test]
fn a_wrong_configuration_names_the_key_and_the_nearest() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let daemon = holdfast_integration::binaries::binaries()?.daemon;
    let check = |text: &str| -> Result<(bool, String)> {
        let path = dir.path().join("config.toml");
        fs::write(&path, text)?;
        let output = std::process::Command::new(&daemon)
            .args([Path::new("--config"), &path, Path::new("config"), Path::new("check")])
            .output()?;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
    };
    let (good, text) = check("version = 1\n")?;
    ensure!(good, "{text}");
    for (text, words) in [
        ("version = 1\n[grpc]\nsoket = \"/x\"\n", ["soket", "socket"]),
        ("version = 1\n[netwerk]\n", ["netwerk", "network"]),
        ("version = 1\nroot = 5\n", ["root", "string"]),
        ("version = 99\n", ["version", "99"]),
        ("version = 1\n[runtime]\ndefault = \"none\"\n", ["default", "none"]),
        ("version = 1\n[runtime\n", ["config.toml:2", "unclosed"]),
    ] {
        let (good, said) = check(text)?;
        ensure!(!good, "{text:?} was taken: {said}");
        for word in words {
            ensure!(said.contains(word), "{text:?}: {said:?} does not say {word:?}");
        }
    }
    Ok(())
}

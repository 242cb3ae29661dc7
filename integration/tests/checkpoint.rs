//! Checkpoint and restore, with a script in criu's place (see `fake.rs`): what is asked of the OCI
//! runtime, what is in the archives, and that nobody stays frozen.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::Read as _,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{
    Image, Node, Pod,
    node::on,
    pod::{Container, ContainerBuilder},
    tar::Entry,
    wait::Look,
};
use holdfast_protos::cri;
use tonic::Code;

/// Files of a tar archive by name; directories have none.
fn files(archive: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    let mut archive = tar::Archive::new(fs::File::open(archive).context("open the archive")?);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = entry.path()?.to_string_lossy().into_owned();
        let mut content = Vec::new();
        entry.read_to_end(&mut content)?;
        files.insert(name, content);
    }
    Ok(files)
}

async fn checkpoint(container: &Container, to: &Path, timeout: i64) -> Result<(), tonic::Status> {
    let request = cri::CheckpointContainerRequest {
        container_id: container.id.clone(),
        location: to.display().to_string(),
        timeout,
    };
    container.cri().runtime().checkpoint_container(request).await.map(drop)
}

async fn checkpoint_pod(
    node: &Node,
    pod: &str,
    to: &Path,
    containers: &[&Container],
) -> Result<(), tonic::Status> {
    let request = cri::CheckpointPodRequest {
        pod_sandbox_id: pod.into(),
        output_path: to.display().to_string(),
        container_ids: containers.iter().map(|c| c.id.clone()).collect(),
        options: HashMap::new(),
    };
    node.cri().runtime().checkpoint_pod(request).await.map(drop)
}

/// Its processes get to run: a frozen container answers no exec, and its counter stands still.
async fn goes_on(container: &Container) -> Result<()> {
    let before = container.sh("cat /count").await?;
    holdfast_integration::eventually(Duration::from_secs(10), "the counter to move", async || {
        let now = container.sh("cat /count").await?;
        Ok(Look::when(now != before, || now.clone()))
    })
    .await
}

const COUNT: &str = "echo up; n=0; while :; do n=$((n+1)); echo $n > /count; sleep 0.05; done";

fn nothing_beside(dir: &Path, expected: &[&str]) -> Result<()> {
    let mut names: Vec<_> = fs::read_dir(dir)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    ensure!(names == expected, "{names:?} instead of {expected:?}");
    Ok(())
}

/// Nothing of a checkpoint is left in the daemon's own directory.
fn no_stages(node: &Node) -> Result<()> {
    for name in ["checkpoints", "restores"] {
        let dir = node.path().join("root").join(name);
        if dir.exists() {
            nothing_beside(&dir, &[]).context(name)?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_is_checkpointed_runs_on_and_comes_back_in_another_pod() -> Result<()> {
    let mut node = Node::builder().fake_criu().start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let volume = node.path().join("volume");
    fs::create_dir(&volume)?;
    let container = pod.container(&image).sh(COUNT).mount(&volume, "/data", |_| {}).start().await?;
    container.wait_for_log("up").await?;
    container
        .sh("echo changed > /etc/motd; rm /bin/wc; mkdir -p /new/deep; ln -s /etc/motd /new/link; \
             chmod 4755 /etc/motd; echo shared > /dev/shm/x")
        .await?;
    let out = node.path().join("out");
    fs::create_dir(&out)?;
    let archive = out.join("c.tar");
    checkpoint(&container, &archive, 0).await?;
    goes_on(&container).await?;
    nothing_beside(&out, &["c.tar"])?;
    no_stages(&node)?;
    ensure!(
        node.gated_runtime().flags() == ["--leave-running"],
        "{:?}",
        node.gated_runtime().flags()
    );

    let found = files(&archive)?;
    for name in [
        "config.dump",
        "spec.dump",
        "status.dump",
        "bind.mounts",
        "checkpoint/",
        "rootfs-diff.tar",
        "deleted.files",
        "devshm-checkpoint.tar",
        "dump.log",
        "stats-dump",
        "container.log",
        "checkpoint/pages-1.img",
    ] {
        ensure!(found.contains_key(name), "no {name} in {:?}", found.keys());
    }
    // Captured while it stood still, with its streams told to criu.
    assert_eq!(found["checkpoint/status"], b"paused\n");
    let conf = String::from_utf8_lossy(&found["checkpoint/criu.conf"]).into_owned();
    let external: Vec<&str> =
        conf.lines().filter(|line| line.starts_with("external file[")).collect();
    assert_eq!(external.len(), 2, "{conf}");
    let config: serde_json::Value = serde_json::from_slice(&found["config.dump"])?;
    assert_eq!(config["id"], container.id.as_str());
    assert_eq!(config["name"], "main");
    let status = container.status().await?;
    assert_eq!(config["rootfsImageRef"], status.image_id.as_str());
    let spec: serde_json::Value = serde_json::from_slice(&found["spec.dump"])?;
    assert_eq!(spec["annotations"]["io.kubernetes.cri.sandbox-name"], "a");
    assert_eq!(String::from_utf8(found["deleted.files"].clone())?, r#"["/bin/wc"]"#);
    let log = String::from_utf8_lossy(&found["container.log"]).into_owned();
    ensure!(log.contains(" stdout F up"), "{log}");

    // A second one over it, and a retry that joins the first.
    let (one, two) =
        tokio::join!(checkpoint(&container, &archive, 60), checkpoint(&container, &archive, 60));
    one?;
    two?;
    ensure!(files(&archive)?.contains_key("checkpoint/pages-1.img"), "it was replaced");

    // Restored: in another pod, from the archive alone.
    let other = node.pod("b").host_network().run().await?;
    let from = archive.display().to_string();
    let describe = |pod: &Pod| -> ContainerBuilder {
        pod.container(&from).sh(COUNT).mount(&volume, "/data", |_| {})
    };
    let restored = describe(&other).create().await?;
    let status = restored.status().await?;
    assert_eq!(status.state(), cri::ContainerState::ContainerCreated);
    assert_eq!(status.image_id, container.status().await?.image_id);
    ensure!(!status.image.unwrap_or_default().image.starts_with('/'), "a path is no image");
    assert_eq!(describe(&other).create().await?.id, restored.id, "a retry finds it");
    assert_eq!(node.gated_runtime().calls("restore"), 0, "not before its start");
    restored.start().await?;
    restored.wait_for_log("up").await?;
    assert_eq!(restored.sh("cat /etc/motd; stat -c %a /etc/motd").await?, "changed\n4755");
    assert_eq!(restored.sh("readlink /new/link; ls -d /new/deep").await?, "/etc/motd\n/new/deep");
    restored.sh("! [ -e /bin/wc ]").await?;
    assert_eq!(restored.sh("cat /dev/shm/x").await?, "shared");
    let (told, _) = node.gated_runtime().restored();
    for (fd, file) in external.iter().map(|l| l.trim_start_matches("external ")).enumerate() {
        let line = format!("inherit-fd fd[{}]:{file}", fd + 1);
        ensure!(told.lines().any(|told| told == line), "{line} is not in {told}");
    }
    goes_on(&restored).await?;
    no_stages(&node)?;
    // It is a container as any other: its exit is known, and so is a kill of the daemon.
    node.kill9()?;
    node.restart().await?;
    ensure!(restored.is_running().await?, "it does not run after a restart");
    restored.stop(1).await?;
    assert_eq!(restored.status().await?.exit_code, 137);
    restored.remove().await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_a_checkpoint_is_restored_and_its_base_is_pulled() -> Result<()> {
    let mut node = Node::builder().fake_criu().start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh(COUNT).start().await?;
    container.wait_for_log("up").await?;
    container.sh("echo changed > /etc/motd; rm /bin/wc").await?;
    let archive = node.path().join("c.tar");
    checkpoint(&container, &archive, 0).await?;
    // As `buildah add` makes them of an archive, and as an archive in a layer.
    let found = files(&archive)?;
    let entries: Vec<Entry> = found
        .iter()
        .map(|(name, content)| match name.strip_suffix('/') {
            Some(name) => Entry::dir(name, 0o700),
            None => Entry::file(name, 0o600, content.clone()),
        })
        .collect();
    let unpacked = Image::empty().layer(entries).build()?;
    let unpacked = unpacked.annotated("org.criu.checkpoint.container.name", "main")?;
    let packed =
        Image::empty().layer([Entry::file("c.tar", 0o600, fs::read(&archive)?)]).build()?;
    let packed = packed.annotated("io.kubernetes.cri-o.annotations.checkpoint.name", "main")?;
    let unpacked = node.load("test/unpacked:1", &unpacked).await?;
    let packed = node.load("test/packed:1", &packed).await?;
    // The image below it is not here any more.
    let base = container.status().await?.image_id;
    container.stop(0).await?;
    container.remove().await?;
    node.remove_image(&base).await?;
    for (name, from) in [("unpacked", &unpacked), ("packed", &packed)] {
        let restored = pod.container(from).name(name).sh(COUNT).create().await.context(name)?;
        assert_eq!(restored.status().await?.image_id, base, "{name}");
        restored.start().await?;
        assert_eq!(restored.sh("cat /etc/motd").await?, "changed");
        restored.sh("! [ -e /bin/wc ]").await?;
        goes_on(&restored).await?;
    }
    ensure!(node.image(&base).await?.is_some(), "the base was not pulled");
    // An image that only says so.
    let liar = Image::busybox()?
        .env("LIAR", "1")
        .build()?
        .annotated("org.criu.checkpoint.container.name", "x")?;
    let liar = node.load("test/liar:1", &liar).await?;
    let error = pod.container(&liar).name("liar").create().await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    ensure!(error.message().contains("no checkpoint"), "{error}");
    no_stages(&node)?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_waits_to_be_restored_can_be_stopped_and_removed() -> Result<()> {
    let mut node = Node::builder().fake_criu().start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh(COUNT).start().await?;
    container.wait_for_log("up").await?;
    let archive = node.path().join("c.tar");
    checkpoint(&container, &archive, 0).await?;
    let from = archive.display().to_string();
    let stopped = pod.container(&from).name("stopped").create().await?;
    let begun = Instant::now();
    stopped.stop(5).await?;
    assert_eq!(stopped.status().await?.state(), cri::ContainerState::ContainerExited);
    let removed = pod.container(&from).name("removed").create().await?;
    removed.remove().await?;
    // The script in criu's place runs what the request says.
    let kept = pod.container(&from).name("kept").sh(COUNT).create().await?;
    ensure!(begun.elapsed() < Duration::from_secs(20), "nobody waits for a process that is none");
    // A restart in between changes nothing.
    node.kill9()?;
    node.restart().await?;
    assert_eq!(kept.status().await?.state(), cri::ContainerState::ContainerCreated);
    kept.start().await?;
    kept.wait_for_log("up").await?;
    // One whose checkpoint is damaged meanwhile says what criu said.
    let broken = pod.container(&from).name("broken").create().await?;
    fs::remove_file(
        node.path().join("root/restores").join(&broken.id).join("checkpoint/pages-1.img"),
    )?;
    let error = broken.start().await.unwrap_err();
    ensure!(error.message().contains("criu/fake.c:1): no pages"), "{error}");
    let status = broken.status().await?;
    assert_eq!(status.reason, "StartError");
    ensure!(status.message.contains("no pages"), "{}", status.message);
    broken.remove().await?;
    // What it was to be restored from is kept as long as it is.
    stopped.remove().await?;
    no_stages(&node)?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_checkpointed_or_restored_is_refused_and_leaves_nothing() -> Result<()> {
    let mut node = Node::builder().fake_criu().start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh(COUNT).start().await?;
    container.wait_for_log("up").await?;
    let out = node.path().join("out");
    fs::create_dir(&out)?;
    let created = pod.container(&image).name("created").sh("true").create().await?;
    let refused = async |container: &Container, to: &str, code: Code, says: &str| -> Result<()> {
        let error = checkpoint(container, Path::new(to), 0).await.unwrap_err();
        ensure!(error.code() == code && error.message().contains(says), "{error}");
        Ok(())
    };
    let at = out.join("c.tar").display().to_string();
    refused(&created, &at, Code::FailedPrecondition, "only one that runs").await?;
    refused(&container, "", Code::InvalidArgument, "location").await?;
    refused(&container, "relative.tar", Code::InvalidArgument, "absolute").await?;
    refused(&container, "/no/such/dir/c.tar", Code::InvalidArgument, "make it first").await?;
    let dir = out.display().to_string();
    refused(&container, &dir, Code::InvalidArgument, "something else than a file").await?;
    let gone = Container::existing(node.cri(), "0123456789abcdef");
    refused(&gone, &at, Code::NotFound, "no container").await?;
    assert_eq!(node.gated_runtime().calls("checkpoint"), 0);
    assert_eq!(node.gated_runtime().calls("pause"), 0, "nobody was disturbed");

    // criu fails in the middle.
    node.gated_runtime().no_dump("can't dump a hologram")?;
    refused(&container, &at, Code::Internal, "Error (criu/fake.c:1): can't dump a hologram")
        .await?;
    goes_on(&container).await?;
    // It never ends: the caller's limit does.
    node.gated_runtime().hang("checkpoint")?;
    let begun = Instant::now();
    let error = checkpoint(&container, &out.join("c.tar"), 3).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    ensure!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    goes_on(&container).await?;
    nothing_beside(&out, &[])?;
    no_stages(&node)?;

    // No archive, and archives that are none.
    let before = node.inventory();
    let restore = async |from: &str, code: Code, says: &str| -> Result<()> {
        let error = pod.container(from).name("r").create().await.unwrap_err();
        ensure!(error.code() == code && error.message().contains(says), "{error}");
        Ok(())
    };
    restore("/no/such/archive.tar", Code::NotFound, "/no/such/archive.tar").await?;
    let text = out.join("text.tar");
    fs::write(&text, "this is no archive")?;
    restore(&text.display().to_string(), Code::InvalidArgument, "text.tar").await?;
    restore(&dir, Code::InvalidArgument, "not a regular file").await?;
    no_stages(&node)?;
    node.nothing_left_since(&before).await?;

    // A node whose criu does not know its kernel.
    node.criu().break_down("Error (criu/vdso.c:381): vdso: Unexpected rt vDSO area bounds")?;
    let error = checkpoint(&container, &out.join("c.tar"), 0).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    for says in ["vDSO area bounds", "install a criu that knows this kernel", "Linux "] {
        ensure!(error.message().contains(says), "{error}");
    }
    restore(&text.display().to_string(), Code::FailedPrecondition, "vDSO").await?;
    goes_on(&container).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_must_fit_what_it_is_restored_into() -> Result<()> {
    let mut node = Node::builder().fake_criu().start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let volume = node.path().join("volume");
    fs::create_dir(&volume)?;
    let container = pod.container(&image).sh(COUNT).mount(&volume, "/data", |_| {}).start().await?;
    container.wait_for_log("up").await?;
    let archive = node.path().join("c.tar").display().to_string();
    checkpoint(&container, Path::new(&archive), 0).await?;
    let before = node.inventory();
    let error = pod.container(&archive).name("r").create().await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    ensure!(error.message().contains("/data"), "{error}");
    let tty =
        pod.container(&archive).name("r").mount(&volume, "/data", |_| {}).config(|c| c.tty = true);
    let error = tty.create().await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    ensure!(error.message().contains("tty must be false"), "{error}");
    node.nothing_left_since(&before).await?;
    no_stages(&node)?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_captured_as_one_and_restored_as_created_containers() -> Result<()> {
    let mut node = Node::builder().fake_criu().start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let mut containers = Vec::new();
    for name in ["one", "two", "three"] {
        let container = pod.container(&image).name(name).sh(COUNT).start().await?;
        container.wait_for_log("up").await?;
        containers.push(container);
    }
    let done = pod.container(&image).name("done").sh("true").start().await?;
    done.wait().await?;
    let [one, two, three] = &containers[..] else { unreachable!("three were made") };
    let to = node.path().join("pod-checkpoint");
    checkpoint_pod(&node, &pod.id, &to, &[]).await?;
    // All were paused before the first was captured, and resumed after the last.
    let order: Vec<String> = fs::read_to_string(node.path().join("gated-runc/calls"))?
        .lines()
        .filter_map(|line| line.split(' ').next().map(String::from))
        .filter(|verb| ["pause", "checkpoint", "resume"].contains(&verb.as_str()))
        .collect();
    assert_eq!(order.len(), 9, "{order:?}");
    ensure!(
        order[..3].iter().all(|v| v == "pause") && order[6..].iter().all(|v| v == "resume"),
        "{order:?}"
    );
    for container in &containers {
        goes_on(container).await?;
        ensure!(
            to.join(format!("{}.tar", container.id)).is_file(),
            "no archive of {}",
            container.id
        );
    }
    let options: serde_json::Value = serde_json::from_slice(&fs::read(to.join("pod.options"))?)?;
    assert_eq!(options["version"], 1);
    assert_eq!(options["containers"].as_object().map(|c| c.len()), Some(3));
    assert_eq!(options["annotations"]["org.criu.checkpoint.pod.name"], "a");

    // Refused: into what is there, a container of nobody, an option that is not known.
    let error = checkpoint_pod(&node, &pod.id, &to, &[]).await.unwrap_err();
    ensure!(
        error.code() == Code::InvalidArgument && error.message().contains("not empty"),
        "{error}"
    );
    let other = node.pod("other").host_network().run().await?;
    let stranger = other.container(&image).sh("exec sleep 1000").start().await?;
    let elsewhere = node.path().join("elsewhere");
    let error = checkpoint_pod(&node, &pod.id, &elsewhere, &[&stranger]).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    let error = checkpoint_pod(&node, &pod.id, &elsewhere, &[&done]).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    let mut request = cri::CheckpointPodRequest {
        pod_sandbox_id: pod.id.clone(),
        output_path: elsewhere.display().to_string(),
        ..Default::default()
    };
    request.options.insert("compress".into(), "zstd".into());
    let error = node.cri().runtime().checkpoint_pod(request).await.unwrap_err();
    ensure!(
        error.code() == Code::InvalidArgument && error.message().contains("compress"),
        "{error}"
    );

    // A capture that fails: none stays paused, and there is no half of it.
    node.gated_runtime().fail("checkpoint", "no room in the ark")?;
    let error = checkpoint_pod(&node, &pod.id, &elsewhere, &[one, two]).await.unwrap_err();
    ensure!(error.message().contains("no room in the ark"), "{error}");
    node.gated_runtime().release()?;
    for container in [one, two, three] {
        goes_on(container).await?;
    }
    ensure!(!elsewhere.exists(), "half a checkpoint");
    // A selection, into an empty directory that is there.
    fs::create_dir(&elsewhere)?;
    checkpoint_pod(&node, &pod.id, &elsewhere, &[one]).await?;
    ensure!(elsewhere.join("pod.options").is_file(), "no description");
    no_stages(&node)?;

    // Restored.
    let target = node.pod("restored").host_network();
    let request = target.request();
    let config = |name: &str| {
        let asked = pod.container(&image).name(name).sh(COUNT).request();
        asked.config.unwrap_or_default()
    };
    let restore = cri::RestorePodRequest {
        checkpoint_path: to.display().to_string(),
        config: request.config,
        runtime_handler: String::new(),
        options: HashMap::new(),
        container_configs: ["one", "two", "three", "done"].map(config).to_vec(),
    };
    let before = node.inventory();
    let refused = async |change: &dyn Fn(&mut cri::RestorePodRequest), says: &str| -> Result<()> {
        let mut request = restore.clone();
        change(&mut request);
        let error = node.cri().runtime().restore_pod(request).await.unwrap_err();
        ensure!(error.code() == Code::InvalidArgument && error.message().contains(says), "{error}");
        Ok(())
    };
    refused(&|r| drop(r.options.insert("x".into(), "y".into())), "\"x\" is unknown").await?;
    refused(&|r| r.container_configs.truncate(1), "none for three, two").await?;
    refused(&|r| r.checkpoint_path = "/tmp".into(), "no checkpoint of a pod").await?;
    refused(&|r| r.config = None, "config").await?;
    let tty = |r: &mut cri::RestorePodRequest| r.container_configs[1].tty = true;
    refused(&tty, "tty must be false").await?;
    node.nothing_stays_since(&before).await?;
    ensure!(node.pods().await?.len() == 2, "a pod that was not restored is left");

    let restored = node.cri().runtime().restore_pod(restore.clone()).await?.into_inner();
    assert_eq!(restored.restored_containers.len(), 3);
    let again = node.cri().runtime().restore_pod(restore).await?.into_inner();
    assert_eq!(again, restored, "a retry finds what the first call made");
    for made in &restored.restored_containers {
        let container = Container::existing(node.cri(), &made.container_id);
        let status = container.status().await?;
        assert_eq!(status.state(), cri::ContainerState::ContainerCreated, "{}", made.name);
        assert_eq!(status.metadata.unwrap_or_default().name, made.name);
        container.start().await?;
        goes_on(&container).await?;
    }
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_command_line_tool_alone() -> Result<()> {
    let mut node = Node::builder().fake_criu().start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh(COUNT).start().await?;
    container.wait_for_log("up").await?;
    container.sh("echo changed > /etc/motd").await?;
    let out = node.path().join("out");
    fs::create_dir(&out)?;
    let archive = out.join("c.tar").display().to_string();
    let says = |args: &[&str], text: &str| -> Result<()> {
        let error = node.cli(args).err().with_context(|| format!("{args:?} went well"))?;
        ensure!(error.to_string().contains(text), "{error}");
        Ok(())
    };

    // A container by its id, and by the name of the pod that has no other.
    for name in [container.id.as_str(), "a"] {
        node.cli(&["checkpoint", "--export", &archive, name])?;
        goes_on(&container).await?;
        ensure!(files(Path::new(&archive))?.contains_key("checkpoint/pages-1.img"), "no images");
        fs::rename(&archive, out.join("kept.tar"))?;
    }
    // What goes wrong is told, nobody stands still for it, and no file is there.
    node.gated_runtime().fail("checkpoint", "no room in the ark")?;
    says(&["checkpoint", "--export", &archive, "a"], "no room in the ark")?;
    node.gated_runtime().release()?;
    goes_on(&container).await?;
    says(&["checkpoint", "--export", &archive, "nobody"], "nobody")?;
    says(&["checkpoint", "--export", "/not/there/c.tar", "a"], "/not/there")?;
    nothing_beside(&out, &["kept.tar"])?;

    // A whole pod, to a directory that is not there yet.
    let dir = node.path().join("whole").display().to_string();
    node.cli(&["checkpoint", "--pod", "--export", &dir, "a"])?;
    nothing_beside(
        Path::new(&dir),
        &[&format!("{}.tar", container.id), "pod.dump", "pod.options"],
    )?;
    says(&["checkpoint", "--pod", "--export", &dir, "a"], "not empty")?;
    no_stages(&node)?;

    // Run again, from the archive in an image's place.
    let before = node.pods().await?.len();
    let logs = node.path().join("cli-logs").display().to_string();
    // The script in criu's place runs the command that is given; criu itself would go on with the old one.
    let flags = ["run", "-d", "--net", "host", "--name", "again", "--log-dir", &logs];
    let command = ["sh", "-c", COUNT];
    let kept = out.join("kept.tar").display().to_string();
    let id = node.cli(&[&flags[..], &[&kept], &command].concat())?;
    assert_eq!(node.cli(&["exec", "again", "cat", "/etc/motd"])?, "changed\n");
    let count = || node.cli(&["exec", "again", "cat", "/count"]);
    let first = count()?;
    holdfast_integration::eventually(Duration::from_secs(10), "the counter to move", async || {
        let now = count()?;
        Ok(Look::when(now != first, || now.clone()))
    })
    .await?;
    node.cli(&["rm", "-f", id.trim()])?;
    // What is no checkpoint leaves no pod.
    let text = out.join("text").display().to_string();
    fs::write(&text, "no archive at all")?;
    says(&[&flags[..], &[&text], &command].concat(), "checkpoint")?;
    says(&[&flags[..], &["/not/there.tar"], &command].concat(), "/not/there.tar")?;
    assert_eq!(node.pods().await?.len(), before, "a pod is left");
    no_stages(&node)?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_killed_in_the_middle_leaves_nobody_frozen() -> Result<()> {
    let mut node = Node::builder().fake_criu().start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let mut containers = Vec::new();
    for name in ["one", "two"] {
        let container = pod.container(&image).name(name).sh(COUNT).start().await?;
        container.wait_for_log("up").await?;
        containers.push(container);
    }
    let out = node.path().join("out");
    fs::create_dir(&out)?;
    for (round, verb) in ["pause", "checkpoint", "checkpoint"].into_iter().enumerate() {
        let gate = node.gated_runtime();
        let calls = gate.hung(verb);
        gate.hang(verb)?;
        let (cri, id, to) = (node.cri().clone(), pod.id.clone(), out.join("p"));
        let asked = tokio::spawn(async move {
            let request = cri::CheckpointPodRequest {
                pod_sandbox_id: id,
                output_path: to.display().to_string(),
                ..Default::default()
            };
            cri.runtime().checkpoint_pod(request).await
        });
        on(&node, Duration::from_secs(20), "the runtime to hang", async || {
            Ok(Look::when(node.gated_runtime().hung(verb) > calls, || "it does not".into()))
        })
        .await?;
        // The last time it is not killed, but asked to end.
        if round < 2 {
            node.kill9()?
        } else {
            node.terminate()?
        }
        asked.await?.unwrap_err();
        node.gated_runtime().release()?;
        node.restart().await?;
        for container in &containers {
            on(&node, Duration::from_secs(30), "it to run again", async || {
                Ok(match goes_on(container).await {
                    Ok(()) => Look::Done(()),
                    Err(error) => Look::Not(format!("{error:#}")),
                })
            })
            .await?;
        }
        on(&node, Duration::from_secs(30), "nothing to be left", async || {
            let left = no_stages(&node).and_then(|()| nothing_beside(&out, &[]));
            Ok(Look::when(left.is_ok(), || format!("{left:?}")))
        })
        .await?;
        fs::remove_file(node.path().join("gated-runc/release")).context("arm the gate again")?;
    }
    // And then it works.
    checkpoint_pod(&node, &pod.id, &out.join("p"), &[]).await?;
    nothing_beside(&out, &["p"])?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_cannot_says_so() -> Result<()> {
    // The real runc, and whatever criu there is: where criu works, so does this.
    let works = std::process::Command::new("criu")
        .arg("check")
        .output()
        .is_ok_and(|output| output.status.success());
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh(COUNT).start().await?;
    container.wait_for_log("up").await?;
    let archive = node.path().join("c.tar");
    let answer = checkpoint(&container, &archive, 0).await;
    if works {
        answer?;
        ensure!(files(&archive)?.contains_key("checkpoint/inventory.img"), "no images of criu");
    } else {
        let error = answer.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
        ensure!(error.message().contains("install"), "{error}");
        ensure!(!archive.exists(), "half an archive");
    }
    goes_on(&container).await?;
    node.finish().await
}

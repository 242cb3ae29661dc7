//! Images as volumes, volumes that images declare, mount options and user namespaces, with both OCI
//! runtimes.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{
    Image, Node, Pod, node, pod::PodBuilder, tar::Entry, with_each_runtime,
};
use holdfast_protos::cri;
use tonic::Code;

with_each_runtime! {
    an_image_is_mounted_read_only
    a_part_of_an_image_is_mounted
    an_artifact_is_mounted_as_files_and_never_run
    an_image_that_is_mounted_can_be_removed_and_its_layers_stay
    what_cannot_be_mounted_is_a_clear_error_and_leaves_nothing
    image_volumes_survive_the_daemon_and_are_swept
    volumes_of_the_image_have_its_content_and_go_with_the_container
    mounts_of_the_pod_cover_volumes_of_the_image
    mounts_lie_below_and_above_volumes_of_the_image
    options_of_mounts_take_effect
    a_pod_has_a_user_namespace_with_its_own_files
    volumes_of_a_pod_with_a_user_namespace_are_its_own
    a_user_namespace_goes_with_the_nodes_network
    volumes_that_the_runtime_cannot_map_are_refused
}

fn image_mount(image: &str, path: &str) -> cri::Mount {
    cri::Mount {
        container_path: path.into(),
        readonly: true,
        image: Some(cri::ImageSpec { image: image.into(), ..Default::default() }),
        ..Default::default()
    }
}

/// An image of two layers without a program.
fn data() -> Result<Image> {
    Image::empty()
        .layer([
            Entry::dir("etc", 0o755),
            Entry::file("etc/below", 0o644, "below"),
            Entry::file("etc/hidden", 0o644, "old"),
            Entry::symlink("abs", "/etc"),
        ])
        .layer([
            Entry::dir("etc", 0o755),
            Entry::file("etc/hidden", 0o644, "new"),
            Entry::file("etc/owned", 0o600, "owned").owner(1000, 1000),
        ])
        .build()
}

async fn an_image_is_mounted_read_only(runtime: &str) -> Result<()> {
    let (mut node, busybox) = node::with_busybox(runtime).await?;
    let two = node.load("test/two:1", &data()?).await?;
    let none = node.load("test/none:1", &Image::empty().build()?).await?;
    let id = node.image(&two).await?.context("image")?.id;
    let pod = node.pod("a").host_network().run().await?;
    let by_id = id.trim_start_matches("sha256:").to_owned();
    let container = pod
        .container(&busybox)
        .sh("sleep 1000")
        .config(|c| {
            c.mounts = vec![
                image_mount(&two, "/two"),
                // One layer, which has programs.
                image_mount(&busybox, "/one"),
                image_mount(&none, "/none"),
                image_mount(&by_id, "/by-id"),
            ];
        })
        .start()
        .await?;
    assert_eq!(container.sh("cat /two/etc/below /two/etc/hidden").await?.trim(), "belownew");
    assert_eq!(container.sh("cat /by-id/etc/hidden").await?.trim(), "new");
    assert_eq!(container.sh("ls -A /none | wc -l").await?.trim(), "0");
    // Its programs run, but give nobody else's rights.
    assert_eq!(container.sh("/one/bin/echo ran").await?.trim(), "ran");
    for path in ["/two", "/one", "/none", "/two/etc"] {
        let text =
            container.sh(&format!("touch {path}/x 2>&1; rm -rf {path}/etc 2>&1; true")).await?;
        ensure!(text.contains("Read-only file system"), "{path}: {text}");
        let options = container
            .sh(&format!(
                "grep ' {} ' /proc/self/mountinfo | cut -d' ' -f6",
                path.replace("/etc", "")
            ))
            .await?;
        let options: BTreeSet<&str> = options.trim().split(',').collect();
        ensure!(["ro", "nosuid", "nodev"].iter().all(|o| options.contains(o)), "{options:?}");
        ensure!(!options.contains("noexec"), "{options:?}");
    }
    let status = container.status().await?;
    let mount = status.mounts.iter().find(|m| m.container_path == "/two").context("mount")?;
    let reported = mount.image.as_ref().context("image")?;
    assert_eq!((reported.image.as_str(), reported.image_ref.as_str()), (two.as_str(), id.as_str()));
    // Remounting does not open it: the layers are others' too.
    let privileged = node.pod("p").host_network().privileged().run().await?;
    let container = privileged
        .container(&busybox)
        .sh("sleep 1000")
        .security(|s| s.privileged = true)
        .config(|c| c.mounts = vec![image_mount(&two, "/two")])
        .start()
        .await?;
    let text = container.sh("touch /two/x 2>&1; true").await?;
    ensure!(text.contains("Read-only file system"), "{text}");
    node.finish().await
}

async fn an_artifact_is_mounted_as_files_and_never_run(runtime: &str) -> Result<()> {
    let (mut node, busybox) = node::with_busybox(runtime).await?;
    let large = vec![b'w'; 3 << 20];
    let kind = "application/vnd.example.model";
    let files: [(&str, &[u8]); 3] =
        [("weights.bin", &large), ("docs/readme", b"hello"), ("config.json", b"{}")];
    let model = Image::artifact(kind, &files);
    let reference = node.registry().await?.push("test/model:1", &model).await?;
    node.pull(&reference).await?;
    let here = node.image(&reference).await?.context("pulled")?;
    assert_eq!(here.id, model.manifest.digest);
    let pod = node.pod("a").host_network().run().await?;
    let container = pod
        .container(&busybox)
        .sh("sleep 1000")
        .config(|c| {
            c.mounts = vec![
                image_mount(&reference, "/model"),
                cri::Mount { image_sub_path: "docs".into(), ..image_mount(&reference, "/docs") },
            ];
        })
        .start()
        .await?;
    assert_eq!(container.sh("cat /model/docs/readme /model/config.json").await?, "hello{}");
    assert_eq!(container.sh("cat /docs/readme").await?, "hello");
    assert_eq!(container.sh("wc -c < /model/weights.bin").await?.trim(), large.len().to_string());
    assert_eq!(container.sh("ls /model").await?.trim(), "config.json\ndocs\nweights.bin");
    assert_eq!(container.sh("stat -c '%u %g %a' /model/config.json").await?.trim(), "0 0 644");
    let text = container.sh("touch /model/x 2>&1; true").await?;
    ensure!(text.contains("Read-only file system"), "{text}");

    let refused = pod.container(&reference).name("model").sh("true").create().await;
    let status = refused.err().context("an artifact became a container")?;
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    for part in [kind, "image volume"] {
        ensure!(status.message().contains(part), "{status:?}");
    }
    // Also by a daemon that has read it from its records.
    node.kill9()?;
    node.restart().await?;
    assert_eq!(container.sh("cat /docs/readme").await?, "hello");
    let refused = pod.container(&reference).name("model").sh("true").create().await;
    ensure!(refused.is_err(), "an artifact became a container");
    node.finish().await
}

async fn a_part_of_an_image_is_mounted(runtime: &str) -> Result<()> {
    let (mut node, busybox) = node::with_busybox(runtime).await?;
    let two = node.load("test/two:1", &data()?).await?;
    let pod = node.pod("a").host_network().run().await?;
    let part =
        |path: &str, at: &str| cri::Mount { image_sub_path: path.into(), ..image_mount(&two, at) };
    let text = pod
        .container(&busybox)
        .sh("cat /dir/hidden /file /link/below; touch /dir/x 2>&1")
        .config(|c| {
            c.mounts = vec![part("etc", "/dir"), part("etc/below", "/file"), part("abs", "/link")];
        })
        .start()
        .await?;
    let status = text.wait().await?;
    ensure!(status.exit_code != 0, "{status:?}");
    let log: String = text.log()?.iter().map(|l| l.text.clone()).collect();
    ensure!(log.starts_with("newbelowbelow") && log.contains("Read-only"), "{log}");
    for (path, words) in [
        ("missing", "missing"),
        ("etc/below/x", "etc/below/x"),
        ("../etc", "without \"..\""),
        ("/etc", "below the image's root"),
    ] {
        let refused = pod
            .container(&busybox)
            .name("refused")
            .config(|c| c.mounts = vec![part(path, "/dir")])
            .create()
            .await
            .map(|c| c.id)
            .unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{path}: {refused}");
        let text = refused.message();
        ensure!(text.contains("mounts[0].image_sub_path") && text.contains(words), "{text}");
    }
    node.finish().await
}

async fn an_image_that_is_mounted_can_be_removed_and_its_layers_stay(runtime: &str) -> Result<()> {
    let (mut node, busybox) = node::with_busybox(runtime).await?;
    let two = node.load("test/two:1", &data()?).await?;
    let layers = node.path().join("root/layers");
    let count = || fs::read_dir(&layers).map(Iterator::count);
    let with_image = count()?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod
        .container(&busybox)
        .sh("sleep 1000")
        .config(|c| c.mounts = vec![image_mount(&two, "/two")])
        .start()
        .await?;
    node.remove_image(&two).await?;
    ensure!(node.image(&two).await?.is_none(), "it is listed");
    // Also by the next daemon, which knows of it by the record alone.
    node.kill9()?;
    node.restart().await?;
    assert_eq!(container.sh("cat /two/etc/below").await?.trim(), "below");
    assert_eq!(count()?, with_image);
    container.stop(0).await?;
    assert_eq!(count()?, with_image, "a stopped container may be looked at");
    container.remove().await?;
    holdfast_integration::eventually(std::time::Duration::from_secs(10), "layers go", async || {
        Ok(match count()? {
            n if n == with_image - 2 => holdfast_integration::wait::Look::Done(()),
            n => holdfast_integration::wait::Look::Not(format!("{n} layers of {with_image}")),
        })
    })
    .await?;
    node.finish().await
}

async fn what_cannot_be_mounted_is_a_clear_error_and_leaves_nothing(runtime: &str) -> Result<()> {
    let (mut node, busybox) = node::with_busybox(runtime).await?;
    let two = node.load("test/two:1", &data()?).await?;
    let pod = node.pod("a").host_network().run().await?;
    let before = node.inventory();
    let writable = cri::Mount { readonly: false, ..image_mount(&two, "/two") };
    let both = cri::Mount { host_path: "/srv".into(), ..image_mount(&two, "/two") };
    for (mount, code, words) in [
        (image_mount("test/absent:1", "/x"), Code::NotFound, "test/absent:1"),
        (writable, Code::InvalidArgument, "read-only"),
        (both, Code::InvalidArgument, "host_path"),
        (image_mount(&two, "relative"), Code::InvalidArgument, "container_path"),
    ] {
        let refused = pod
            .container(&busybox)
            // The first is good: it is taken back too.
            .config(|c| c.mounts = vec![image_mount(&two, "/good"), mount])
            .create()
            .await
            .map(|c| c.id)
            .unwrap_err();
        assert_eq!(refused.code(), code, "{refused}");
        ensure!(refused.message().contains(words), "{refused}");
        node.nothing_left_since(&before).await?;
    }
    node.finish().await
}

async fn image_volumes_survive_the_daemon_and_are_swept(runtime: &str) -> Result<()> {
    let (mut node, busybox) = node::with_busybox(runtime).await?;
    let two = node.load("test/two:1", &data()?).await?;
    let image = Image::busybox()?.volume("/data").build()?;
    let declared = node.load("test/declared:1", &image).await?;
    let pod = node.pod("a").host_network().run().await?;
    let before = node.inventory();
    let container = pod
        .container(&declared)
        .sh("sleep 1000")
        .config(|c| c.mounts = vec![image_mount(&two, "/two")])
        .start()
        .await?;
    node.kill9()?;
    node.restart().await?;
    assert_eq!(container.sh("cat /two/etc/below; ls /data").await?.trim(), "below");
    container.stop(0).await?;
    container.remove().await?;
    node.nothing_left_since(&before).await?;

    // A directory that no record names, as a crash may leave one.
    let stray = node.path().join("root/volumes").join("ab".repeat(32));
    fs::create_dir_all(stray.join("0/deep"))?;
    node.kill9()?;
    node.restart().await?;
    holdfast_integration::eventually(std::time::Duration::from_secs(10), "sweep", async || {
        Ok(match stray.exists() {
            false => holdfast_integration::wait::Look::Done(()),
            true => holdfast_integration::wait::Look::Not("it is there".into()),
        })
    })
    .await?;
    ensure!(!busybox.is_empty(), "an image");
    node.finish().await
}

async fn volumes_of_the_image_have_its_content_and_go_with_the_container(
    runtime: &str,
) -> Result<()> {
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    let image = Image::busybox()?
        .layer([
            Entry::dir("data", 0o2750).owner(1000, 1000),
            Entry::file("data/seed", 0o640, "seed").owner(1000, 1000),
            Entry::hardlink("data/again", "data/seed"),
            Entry::symlink("data/link", "seed"),
            Entry::dir("data/sub", 0o1777),
            Entry::symlink("by-link", "data/sub"),
            Entry::file("file", 0o644, ""),
        ])
        .volume("/data")
        .volume("/fresh/deep")
        .build()?;
    let image = node.load("test/volumes:1", &image).await?;
    let pod = node.pod("a").host_network().run().await?;
    let script = "stat -c '%u:%g:%a' /data /data/seed /data/sub /fresh/deep; stat -c %h /data/seed; \
                  readlink /data/link; cat /data/again; echo; echo end; sleep 1000";
    let container = pod.container(&image).sh(script).start().await?;
    container.wait_for_log("end").await?;
    let lines: Vec<String> = container.log()?.iter().map(|l| l.text.clone()).collect();
    assert_eq!(
        lines.join(" ").replace('\n', ""),
        "1000:1000:2750 1000:1000:640 0:0:1777 0:0:755 2 seed seed end"
    );
    container.sh("echo changed >/data/seed; touch /fresh/deep/x").await?;
    // It is the container's own.
    let second = pod.container(&image).name("second").sh("cat /data/seed; ls /fresh/deep").output();
    assert_eq!(second.await?, "seed");
    let dir = node.path().join("root/volumes").join(&container.id);
    assert_eq!(fs::read_to_string(dir.join("0/seed"))?, "changed\n");
    container.stop(0).await?;
    ensure!(dir.exists(), "what a stopped container wrote is kept");
    container.remove().await?;
    ensure!(!dir.exists(), "it is left");

    let image =
        Image::busybox()?.layer([Entry::file("file", 0o644, "")]).volume("/file").build()?;
    let image = node.load("test/file:1", &image).await?;
    let refused = pod.container(&image).name("file").create().await.map(|c| c.id).unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    ensure!(refused.message().contains("\"/file\""), "{refused}");
    node.finish().await
}

async fn mounts_of_the_pod_cover_volumes_of_the_image(runtime: &str) -> Result<()> {
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    let image = Image::busybox()?
        .layer([Entry::dir("data", 0o755), Entry::file("data/seed", 0o644, "seed")])
        .volume("/data/")
        .volume("/")
        .build()?;
    let image = node.load("test/covered:1", &image).await?;
    let host = node.path().join("host");
    fs::create_dir(&host)?;
    fs::write(host.join("mine"), "mine")?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod
        .container(&image)
        .sh("ls /data; sleep 1000")
        .mount(&host, "/data", |_| {})
        .start()
        .await?;
    container.wait_for_log("mine").await?;
    let dir = node.path().join("root/volumes").join(&container.id);
    ensure!(!dir.exists(), "a volume was made that nobody sees");
    node.finish().await
}

async fn mounts_lie_below_and_above_volumes_of_the_image(runtime: &str) -> Result<()> {
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    let image = Image::busybox()?
        .layer([
            Entry::dir("data", 0o755),
            Entry::file("data/seed", 0o644, "seed"),
            Entry::dir("srv", 0o755),
            Entry::dir("srv/deep", 0o755),
            Entry::file("srv/deep/seed", 0o644, "deep seed"),
        ])
        .volume("/data")
        .volume("/srv/deep")
        .build()?;
    let image = node.load("test/nested:1", &image).await?;
    let host = node.path().join("host");
    fs::create_dir_all(host.join("below"))?;
    fs::create_dir_all(host.join("above"))?;
    fs::write(host.join("below/mine"), "below")?;
    fs::write(host.join("above/mine"), "above")?;
    let pod = node.pod("a").host_network().run().await?;
    // In the order in which nobody would mount them.
    let container = pod
        .container(&image)
        .sh("sleep 1000")
        .mount(&host.join("below"), "/data/sub/dir", |_| {})
        .mount(&host.join("above"), "/srv", |_| {})
        .start()
        .await?;
    // Below: the volume with its content, and in it the mount.
    assert_eq!(container.sh("cat /data/seed /data/sub/dir/mine").await?, "seedbelow");
    container.sh("echo x > /data/new; echo y > /data/sub/dir/new").await?;
    let volumes = node.path().join("root/volumes").join(&container.id);
    assert_eq!(fs::read_to_string(volumes.join("0/new"))?, "x\n");
    assert_eq!(fs::read_to_string(host.join("below/new"))?, "y\n");
    // Above: the mount, and in it the volume, as the image wants it.
    assert_eq!(container.sh("cat /srv/mine /srv/deep/seed").await?, "abovedeep seed");
    container.sh("echo z > /srv/deep/new").await?;
    assert_eq!(fs::read_to_string(volumes.join("1/new"))?, "z\n");
    ensure!(!host.join("above/deep/new").exists(), "the volume's content is in the mount");
    container.stop(0).await?;
    container.remove().await?;
    ensure!(!volumes.exists(), "the volumes are left");
    ensure!(host.join("below/new").exists(), "the node's files went with the container");
    node.finish().await
}

async fn options_of_mounts_take_effect(runtime: &str) -> Result<()> {
    let (node, busybox) = node::with_busybox(runtime).await?;
    let features = node.status(false).await?.features.context("features")?;
    ensure!(features.mount_options, "Status does not say so");
    let host = node.path().join("host");
    fs::create_dir(&host)?;
    fs::copy("/bin/busybox", host.join("echo"))?;
    let pod = node.pod("a").host_network().run().await?;
    let sets: [&[&str]; 4] = [
        &["noexec", "nosuid", "nodev"],
        &["noatime"],
        &["nodiratime", "relatime"],
        &["exec", "suid"],
    ];
    let container = pod
        .container(&busybox)
        .sh("sleep 1000")
        .config(|c| {
            c.mounts = sets
                .iter()
                .enumerate()
                .map(|(n, options)| cri::Mount {
                    container_path: format!("/m{n}"),
                    host_path: host.display().to_string(),
                    mount_options: options.iter().map(|o| (*o).to_owned()).collect(),
                    ..Default::default()
                })
                .collect();
        })
        .start()
        .await?;
    let options = async |n: usize| {
        let text =
            container.sh(&format!("grep ' /m{n} ' /proc/self/mountinfo | cut -d' ' -f6")).await?;
        anyhow::Ok(text.trim().split(',').map(str::to_owned).collect::<BTreeSet<_>>())
    };
    for (n, wanted) in
        [(0, &["noexec", "nosuid", "nodev"][..]), (1, &["noatime"]), (2, &["nodiratime"])]
    {
        let has = options(n).await?;
        ensure!(wanted.iter().all(|w| has.contains(*w)), "/m{n}: {has:?}");
    }
    let has = options(3).await?;
    ensure!(!has.contains("noexec") && !has.contains("nosuid"), "/m3: {has:?}");
    let text = container.sh("/m0/echo ran 2>&1; /m3/echo ran").await?;
    ensure!(text.contains("Permission denied") && text.trim_end().ends_with("ran"), "{text}");
    let status = container.status().await?;
    let mount = status.mounts.iter().find(|m| m.container_path == "/m1").context("mount")?;
    assert_eq!(mount.mount_options, ["noatime"]);
    for (option, other) in [("size=1k", ""), ("rw", ""), ("loop", ""), ("exec", "noexec")] {
        let refused = pod
            .container(&busybox)
            .name("refused")
            .mount(&host, "/x", |m| {
                m.mount_options = [option, other]
                    .iter()
                    .filter(|o| !o.is_empty())
                    .map(|o| (*o).to_owned())
                    .collect();
            })
            .create()
            .await
            .map(|c| c.id)
            .unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        ensure!(refused.message().contains(&format!("{option:?}")), "{refused}");
    }
    node.finish().await
}

const HOST: u32 = 200_000;

/// The pod's root is `HOST` on the node.
fn mapped(pod: PodBuilder) -> PodBuilder {
    let range = cri::IdMapping { host_id: HOST, container_id: 0, length: 65_536 };
    pod.namespaces(|n| {
        n.userns_options = Some(cri::UserNamespace {
            mode: cri::NamespaceMode::Pod.into(),
            uids: vec![range],
            gids: vec![range],
        });
    })
}

/// The pod's root is nobody special: what is above the node's directories must let him through.
fn open_up(node: &Node) -> Result<()> {
    Ok(fs::set_permissions(node.path(), fs::Permissions::from_mode(0o711))?)
}

async fn a_pod_has_a_user_namespace_with_its_own_files(runtime: &str) -> Result<()> {
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    open_up(&node)?;
    let image = Image::busybox()?
        .layer([
            Entry::dir("srv", 0o755),
            Entry::file("srv/root", 0o600, "root's"),
            Entry::file("srv/app", 0o600, "app's").owner(1000, 1000),
        ])
        .layer([Entry::file("srv/other", 0o644, "other")])
        .build()?;
    let image = node.load("test/mapped:1", &image).await?;
    let pod = mapped(node.pod("a")).run().await?;
    let container = pod.container(&image).sh("sleep 1000").start().await?;
    let text = container.sh("cat /proc/self/uid_map /proc/self/gid_map").await?;
    let map: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(map, ["0", "200000", "65536", "0", "200000", "65536"]);
    let owners = container
        .sh("stat -c '%u:%g' / /bin/busybox /srv/root /srv/app /etc/hosts /etc/resolv.conf /etc/hostname /dev/shm /dev/pts")
        .await?;
    assert_eq!(
        owners.split_whitespace().collect::<Vec<_>>(),
        ["0:0", "0:0", "0:0", "1000:1000", "0:0", "0:0", "0:0", "0:0", "0:0"]
    );
    assert_eq!(container.sh("cat /srv/root /srv/app").await?, "root'sapp's");
    // Everything is its root's, and it may do with it what root does.
    let script = "echo more >>/srv/root && chown 1000:1000 /srv/root && chmod 4755 /srv/app && rm /srv/other \
                  && mkdir /new && touch /new/x /dev/shm/x && hostname && ip addr show lo | grep -c 127.0.0.1 \
                  && stat -c '%u:%g:%a' /srv/root /srv/app /new /dev/shm/x | tr '\\n' ' '";
    let text = container.sh(script).await?;
    ensure!(text.trim_end().ends_with("1000:1000:600 1000:1000:4755 0:0:755 0:0:644"), "{text}");
    // On the node it is nobody's but the range's.
    let upper = node.path().join("root/snapshots").join(&container.id).join("upper");
    let owner = |path: &Path| fs::symlink_metadata(path).map(|m| (m.uid(), m.gid()));
    assert_eq!(owner(&upper.join("new"))?, (HOST, HOST));
    assert_eq!(owner(&upper.join("srv/root"))?, (HOST + 1000, HOST + 1000));
    // Layers are as they were, for everybody else.
    let plain = node.pod("b").host_network().run().await?;
    let text = plain
        .container(&image)
        .sh("stat -c '%u:%g' /srv/root /srv/app; cat /srv/root /srv/other")
        .output();
    assert_eq!(text.await?, "0:0\n1000:1000\nroot'sother");
    // An account of the image, and exec as that.
    let user = pod
        .container(&image)
        .name("app")
        .sh("id -u; cat /srv/app; echo on stderr >/dev/stderr")
        .security(|s| s.run_as_username = "app".into())
        .output()
        .await?;
    ensure!(user.starts_with("1000\napp's"), "{user}");
    let status = pod.status().await?;
    let options = status
        .linux
        .context("linux")?
        .namespaces
        .context("namespaces")?
        .options
        .context("options")?;
    assert_eq!(options.userns_options.context("userns")?.uids[0].host_id, HOST);
    node.finish().await
}

async fn volumes_of_a_pod_with_a_user_namespace_are_its_own(runtime: &str) -> Result<()> {
    let (mut node, busybox) = node::with_busybox(runtime).await?;
    open_up(&node)?;
    let two = node.load("test/two:1", &data()?).await?;
    let image = Image::busybox()?
        .layer([
            Entry::dir("data", 0o700).owner(1000, 1000),
            Entry::file("data/seed", 0o600, "seed"),
        ])
        .volume("/data")
        .volume("/fresh")
        .build()?;
    let image = node.load("test/volumes:1", &image).await?;
    let pod = mapped(node.pod("a")).run().await?;
    let container = pod
        .container(&image)
        .sh("sleep 1000")
        .config(|c| c.mounts = vec![image_mount(&two, "/two"), image_mount(&busybox, "/one")])
        .start()
        .await?;
    let owners = container
        .sh("stat -c '%u:%g' /two/etc/below /two/etc/owned /one/bin/busybox /data /data/seed /fresh")
        .await?;
    assert_eq!(
        owners.split_whitespace().collect::<Vec<_>>(),
        ["0:0", "1000:1000", "0:0", "1000:1000", "0:0", "0:0"]
    );
    assert_eq!(
        container.sh("cat /two/etc/owned && echo x >/data/new && touch /fresh/x").await?,
        "owned"
    );
    let text = container.sh("touch /two/x 2>&1; touch /one/x 2>&1; true").await?;
    assert_eq!(text.matches("Read-only file system").count(), 2, "{text}");
    let new = node.path().join("root/volumes").join(&container.id).join("0/new");
    assert_eq!(fs::metadata(new)?.uid(), HOST);
    node.finish().await
}

async fn a_user_namespace_goes_with_the_nodes_network(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    open_up(&node)?;
    let pod = mapped(node.pod("a")).host_network().run().await?;
    let container = pod.container(&image).sh("sleep 1000").start().await?;
    let text = container.sh("cat /proc/self/uid_map; readlink /proc/self/ns/net").await?;
    let network = fs::read_link("/proc/self/ns/net")?;
    let words: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(words, ["0", "200000", "65536", &*network.to_string_lossy()]);
    // The node's own name, interfaces and addresses; to be looked at, and not to be changed.
    assert_eq!(
        container.sh("hostname").await?,
        fs::read_to_string("/proc/sys/kernel/hostname")?.trim()
    );
    ensure!(container.sh("ls /sys/class/net").await?.contains("lo"), "no interfaces in /sys");
    for change in ["ip link add d0 type dummy", "echo 1 >/sys/kernel/profiling", "touch /sys/x"] {
        let done = container.exec_sync(&["sh", "-c", change], 10).await?;
        ensure!(
            done.exit_code != 0,
            "{change} went well: {}",
            String::from_utf8_lossy(&done.stdout)
        );
    }
    assert_eq!(container.sh("touch /x && stat -c %u /x").await?, "0");
    // Not the node's IPC or processes.
    for change in [
        (|n: &mut cri::NamespaceOption| n.ipc = cri::NamespaceMode::Node.into()) as fn(&mut _),
        |n| n.pid = cri::NamespaceMode::Node.into(),
    ] {
        let error = mapped(node.pod("b")).namespaces(change).run().await.map(|p| p.id).unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    }
    node.finish().await
}

async fn volumes_that_the_runtime_cannot_map_are_refused(runtime: &str) -> Result<()> {
    let (node, busybox) = node::with_busybox(runtime).await?;
    open_up(&node)?;
    let handlers = node.status(false).await?.runtime_handlers;
    let handler = handlers.iter().find(|h| h.name == runtime).context("handler")?;
    ensure!(
        !handler.features.as_ref().context("features")?.user_namespaces,
        "Debian's {runtime} says it maps ids of mounts: this test must change"
    );
    let pod: Pod = mapped(node.pod("a")).run().await?;
    let range = cri::IdMapping { host_id: HOST, container_id: 0, length: 65_536 };
    let host = node.path().join("host");
    let refused = pod
        .container(&busybox)
        .mount(&host, "/x", |m| {
            m.uid_mappings = vec![range];
            m.gid_mappings = vec![range];
        })
        .create()
        .await
        .map(|c| c.id)
        .unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    ensure!(refused.message().contains("id-mapped"), "{refused}");
    ensure!(!host.exists(), "the directory was left");
    for (uids, words) in [
        (vec![range, range], "one mapping"),
        (vec![cri::IdMapping { container_id: 1, ..range }], "container_id 0"),
        (vec![cri::IdMapping { length: 0, ..range }], "range"),
        (vec![], "needs"),
    ] {
        let pod = node.pod("wrong").namespaces(|n| {
            n.userns_options = Some(cri::UserNamespace {
                mode: cri::NamespaceMode::Pod.into(),
                uids,
                gids: vec![range],
            });
        });
        let refused = pod.run().await.map(|p| p.id).unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        ensure!(refused.message().contains(words), "{refused}");
    }
    node.finish().await
}

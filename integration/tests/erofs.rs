//! Layers that are EROFS images: containers see what they would see of directories.

use std::{fs, os::unix::fs::PermissionsExt as _};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{Image, Node, pod::PodBuilder, tar::Entry, with_each_runtime};
use holdfast_protos::cri;

with_each_runtime! {
    containers_run_from_erofs_images
}

const HOST: u32 = 200_000;

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

async fn containers_run_from_erofs_images(runtime: &str) -> Result<()> {
    let mut node = Node::builder()
        .default_runtime(runtime)
        .images_config("layer_format = \"erofs\"")
        .start()
        .await?;
    // The root of a pod with a user namespace is nobody special.
    fs::set_permissions(node.path(), fs::Permissions::from_mode(0o711))?;
    let image = Image::busybox()?
        .layer([
            Entry::dir("srv", 0o755),
            Entry::file("srv/app", 0o600, "app's").owner(1000, 1000),
            Entry::file("srv/gone", 0o644, "gone"),
            Entry::dir("srv/emptied", 0o755),
            Entry::file("srv/emptied/old", 0o644, "old"),
            Entry::file("srv/large", 0o644, vec![b'x'; 3 << 20]),
            Entry::hardlink("srv/same", "srv/large"),
        ])
        .layer([
            Entry::dir("srv", 0o755),
            Entry::file("srv/.wh.gone", 0o644, ""),
            Entry::dir("srv/emptied", 0o755),
            Entry::file("srv/emptied/.wh..wh..opq", 0o644, ""),
            Entry::file("srv/emptied/new", 0o644, "new"),
        ])
        .build()?;
    let image = node.load("test/erofs:1", &image).await?;
    let layers = node.path().join("root/layers");
    let mut images = 0;
    for entry in fs::read_dir(&layers)? {
        images += usize::from(entry?.file_type()?.is_file());
    }
    assert_eq!(images, 3);

    let look = "stat -c '%u:%g %a' /srv/app; ls /srv /srv/emptied; cksum </srv/same; id -u";
    let pod = node.pod("plain").host_network().run().await?;
    let plain = pod.container(&image).sh("sleep 1000").start().await?;
    let seen = plain.sh(look).await?;
    ensure!(seen.starts_with("1000:1000 600\n/srv:\napp\nemptied\nlarge\nsame\n"), "{seen}");
    ensure!(seen.contains("/srv/emptied:\nnew\n"), "{seen}");
    // What is written goes beside the image.
    plain.sh("echo more >>/srv/large; rm /srv/app; mkdir /srv/emptied/x").await?;

    let other = mapped(node.pod("mapped")).run().await?;
    let container = other.container(&image).sh("sleep 1000").start().await?;
    assert_eq!(container.sh(look).await?, seen);
    container.sh("chown 5:5 /srv/app && echo x >>/srv/same").await?;

    // The mounts do not depend on the daemon, and it finds the images again.
    node.kill9()?;
    node.restart().await?;
    assert_eq!(plain.sh("ls /srv").await?, "emptied\nlarge\nsame\n");
    let again = pod.container(&image).name("again").sh("sleep 1000").start().await?;
    assert_eq!(again.sh(look).await?, seen);

    // Alone, as a volume.
    let data = Image::empty().layer([Entry::file("one", 0o644, "1")]).build()?;
    let data = node.load("test/data:1", &data).await?;
    let mount = cri::Mount {
        container_path: "/data".into(),
        readonly: true,
        image: Some(cri::ImageSpec { image: data, ..Default::default() }),
        ..Default::default()
    };
    let with_volume = pod
        .container(&image)
        .name("volume")
        .sh("cat /data/one")
        .config(|config| config.mounts.push(mount))
        .output()
        .await
        .context("an image as a volume")?;
    assert_eq!(with_volume, "1");
    node.finish().await
}

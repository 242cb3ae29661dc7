//! Images made here: busybox from Debian's `busybox-static`, with whatever layers and configuration a
//! test is about.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use rand::RngCore as _;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::tar::{self, Entry};

/// Where Debian's busybox-static puts it.
const BUSYBOX: &str = "/bin/busybox";

/// How a layer travels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// As almost all images are.
    #[default]
    Gzip,
    /// Zstandard.
    Zstd,
    /// Not at all.
    Plain,
}

/// Whose media types the manifest has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// OCI image-spec 1.x.
    #[default]
    Oci,
    /// Docker image manifest, version 2, schema 2.
    Docker,
}

/// A blob and how the manifest describes it.
#[derive(Clone, Debug)]
pub struct Blob {
    /// What the manifest says that it is.
    pub media_type: String,
    /// `sha256:…` of `content`.
    pub digest: String,
    /// As it travels.
    pub content: Vec<u8>,
}

impl Blob {
    fn new(media_type: &str, content: Vec<u8>) -> Self {
        Self { media_type: media_type.into(), digest: sha256(&content), content }
    }

    fn descriptor(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": self.digest, "size": self.content.len()})
    }
}

/// An image that is ready to be served.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its configuration; its digest is the image's id.
    pub config: Blob,
    /// From the lowest up.
    pub layers: Vec<Blob>,
    /// Its manifest.
    pub manifest: Blob,
}

impl Image {
    /// An image with busybox and all its applets in `/bin`, a few users, and `/bin/sh` as command.
    ///
    /// # Errors
    /// busybox-static is not installed.
    pub fn busybox() -> Result<Builder> {
        Self::busybox_with(Compression::default())
    }

    /// The same with its layers compressed in another way.
    ///
    /// # Errors
    /// busybox-static is not installed.
    pub fn busybox_with(compression: Compression) -> Result<Builder> {
        let layer = busybox_layer()?;
        Ok(Self::empty().compression(compression).layer(layer).cmd(["/bin/sh"]).env("PATH", "/bin"))
    }

    /// An image without layers.
    pub fn empty() -> Builder {
        Builder::default()
    }

    /// No image but an artifact: files by name, each a blob as it is (image-spec manifest.md
    /// "Guidelines for Artifact Usage").
    pub fn artifact(kind: &str, files: &[(&str, &[u8])]) -> Self {
        let config = Blob::new("application/vnd.oci.empty.v1+json", b"{}".to_vec());
        let layers: Vec<Blob> = files
            .iter()
            .map(|(_, content)| Blob::new("application/octet-stream", content.to_vec()))
            .collect();
        let described = layers.iter().zip(files).map(|(layer, (name, _))| {
            let mut descriptor = layer.descriptor();
            descriptor["annotations"] = json!({"org.opencontainers.image.title": name});
            descriptor
        });
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media_type,
            "artifactType": kind,
            "config": config.descriptor(),
            "layers": described.collect::<Vec<_>>(),
        });
        let manifest = Blob::new(media_type, manifest.to_string().into_bytes());
        Self { config, layers, manifest }
    }

    /// The id that the node will know it by.
    pub fn id(&self) -> &str {
        &self.config.digest
    }

    /// Everything that the manifest refers to.
    pub fn blobs(&self) -> impl Iterator<Item = &Blob> {
        self.layers.iter().chain([&self.config])
    }

    /// An image index (a manifest list with Docker's media types) over images by platform
    /// ("linux/amd64").
    pub fn index(format: Format, images: &[(&str, &Image)]) -> Blob {
        let manifests: Vec<Value> = images
            .iter()
            .map(|(platform, image)| {
                let (os, architecture) = platform.split_once('/').unwrap_or(("linux", platform));
                let mut descriptor = image.manifest.descriptor();
                descriptor["platform"] = json!({"os": os, "architecture": architecture});
                descriptor
            })
            .collect();
        let media_type = match format {
            Format::Oci => "application/vnd.oci.image.index.v1+json",
            Format::Docker => "application/vnd.docker.distribution.manifest.list.v2+json",
        };
        let index = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests});
        Blob::new(media_type, index.to_string().into_bytes())
    }

    /// The image as the tar archive of an OCI layout, under the name `reference`.
    pub fn oci_archive(&self, reference: &str) -> Vec<u8> {
        let path = |digest: &str| format!("blobs/sha256/{}", digest.trim_start_matches("sha256:"));
        let mut descriptor = self.manifest.descriptor();
        descriptor["annotations"] = json!({
            "io.containerd.image.name": reference,
            "org.opencontainers.image.ref.name": reference,
        });
        let index = json!({"schemaVersion": 2, "manifests": [descriptor]});
        let mut entries = vec![
            Entry::file("oci-layout", 0o644, json!({"imageLayoutVersion": "1.0.0"}).to_string()),
            Entry::file("index.json", 0o644, index.to_string()),
        ];
        for blob in self.blobs().chain([&self.manifest]) {
            entries.push(Entry::file(&path(&blob.digest), 0o644, blob.content.clone()));
        }
        tar::archive(&entries)
    }

    /// The image as `docker save` writes it, under the name `reference`.
    ///
    /// # Errors
    /// A layer cannot be unpacked: such archives hold plain tar files.
    pub fn docker_archive(&self, reference: &str) -> Result<Vec<u8>> {
        let config = format!("{}.json", self.config.digest.trim_start_matches("sha256:"));
        let mut entries = vec![Entry::file(&config, 0o644, self.config.content.clone())];
        let mut names = Vec::new();
        for (number, layer) in self.layers.iter().enumerate() {
            let name = format!("{number}/layer.tar");
            entries.push(Entry::file(&name, 0o644, unpack(layer)?));
            names.push(name);
        }
        let manifest = json!([{"Config": config, "RepoTags": [reference], "Layers": names}]);
        entries.push(Entry::file("manifest.json", 0o644, manifest.to_string()));
        Ok(tar::archive(&entries))
    }
}

/// Describes an image.
#[derive(Clone, Debug)]
pub struct Builder {
    layers: Vec<(Vec<u8>, Compression)>,
    compression: Compression,
    format: Format,
    architecture: String,
    env: Vec<String>,
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    user: String,
    working_dir: String,
    stop_signal: String,
    volumes: Vec<String>,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            layers: Vec::new(),
            compression: Compression::default(),
            format: Format::default(),
            architecture: architecture().into(),
            env: Vec::new(),
            entrypoint: Vec::new(),
            cmd: Vec::new(),
            user: String::new(),
            working_dir: String::new(),
            stop_signal: String::new(),
            volumes: Vec::new(),
        }
    }
}

impl Builder {
    /// How the layers that follow travel.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }
    /// Whose media types.
    pub fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }
    /// Another layer, of these entries.
    pub fn layer(self, entries: impl AsRef<[Entry]>) -> Self {
        let archive = tar::archive(entries.as_ref());
        self.raw_layer(archive)
    }
    /// Another layer, of these bytes before compression.
    pub fn raw_layer(mut self, archive: Vec<u8>) -> Self {
        self.layers.push((archive, self.compression));
        self
    }
    /// `count` more layers with a file of `bytes` random bytes each, which do not compress.
    pub fn random_layers(mut self, count: usize, bytes: usize) -> Self {
        for number in 0..count {
            let mut content = vec![0; bytes];
            rand::rng().fill_bytes(&mut content);
            self = self.layer([
                Entry::dir("random", 0o755),
                Entry::file(&format!("random/{number}"), 0o644, content),
            ]);
        }
        self
    }
    /// GOARCH of the configuration.
    pub fn architecture(mut self, architecture: &str) -> Self {
        self.architecture = architecture.into();
        self
    }
    /// `ENV`
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.push(format!("{key}={value}"));
        self
    }
    /// `ENTRYPOINT`
    pub fn entrypoint<const N: usize>(mut self, argv: [&str; N]) -> Self {
        self.entrypoint = argv.map(String::from).into();
        self
    }
    /// `CMD`
    pub fn cmd<const N: usize>(mut self, argv: [&str; N]) -> Self {
        self.cmd = argv.map(String::from).into();
        self
    }
    /// `USER`
    pub fn user(mut self, user: &str) -> Self {
        self.user = user.into();
        self
    }
    /// `WORKDIR`
    pub fn working_dir(mut self, dir: &str) -> Self {
        self.working_dir = dir.into();
        self
    }
    /// `STOPSIGNAL`
    pub fn stop_signal(mut self, signal: &str) -> Self {
        self.stop_signal = signal.into();
        self
    }
    /// `VOLUME`
    pub fn volume(mut self, path: &str) -> Self {
        self.volumes.push(path.into());
        self
    }

    /// Makes it.
    ///
    /// # Errors
    /// A layer cannot be compressed.
    pub fn build(self) -> Result<Image> {
        let diff_ids: Vec<String> =
            self.layers.iter().map(|(archive, _)| sha256(archive)).collect();
        let layers = self
            .layers
            .iter()
            .map(|(archive, compression)| {
                Ok(Blob::new(
                    layer_media_type(self.format, *compression),
                    compress(archive, *compression)?,
                ))
            })
            .collect::<Result<Vec<_>>>()?;
        let volumes: BTreeMap<&str, Value> =
            self.volumes.iter().map(|path| (path.as_str(), json!({}))).collect();
        let mut config = json!({
            "Env": self.env,
            "Entrypoint": self.entrypoint,
            "Cmd": self.cmd,
            "User": self.user,
            "WorkingDir": self.working_dir,
            "StopSignal": self.stop_signal,
            "Volumes": volumes,
        });
        if let Value::Object(fields) = &mut config {
            fields.retain(|_, value| {
                !(value == &json!([]) || value == &json!("") || value == &json!({}))
            });
        }
        let config = json!({
            "created": "2026-01-01T00:00:00Z",
            "architecture": self.architecture,
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let (config_type, manifest_type) = match self.format {
            Format::Oci => (
                "application/vnd.oci.image.config.v1+json",
                "application/vnd.oci.image.manifest.v1+json",
            ),
            Format::Docker => (
                "application/vnd.docker.container.image.v1+json",
                "application/vnd.docker.distribution.manifest.v2+json",
            ),
        };
        Ok(assemble(Blob::new(config_type, config.to_string().into_bytes()), layers, manifest_type))
    }
}

impl Image {
    /// The same image, with an annotation of its manifest.
    ///
    /// # Errors
    /// The manifest is no JSON object.
    pub fn annotated(mut self, key: &str, value: &str) -> Result<Self> {
        let mut manifest: Value = serde_json::from_slice(&self.manifest.content)?;
        manifest["annotations"][key] = json!(value);
        let media_type = self.manifest.media_type.clone();
        self.manifest = Blob::new(&media_type, manifest.to_string().into_bytes());
        Ok(self)
    }

    /// The same image with other bytes for a layer, and a manifest that says so truthfully. Its
    /// configuration still has the diff id of the original.
    pub fn replace_layer(mut self, number: usize, content: Vec<u8>) -> Self {
        self.layers[number] = Blob::new(&self.layers[number].media_type, content);
        let media_type = self.manifest.media_type.clone();
        assemble(self.config, self.layers, &media_type)
    }
}

fn assemble(config: Blob, layers: Vec<Blob>, media_type: &str) -> Image {
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": config.descriptor(),
        "layers": layers.iter().map(Blob::descriptor).collect::<Vec<_>>(),
    });
    Image { config, layers, manifest: Blob::new(media_type, manifest.to_string().into_bytes()) }
}

/// `sha256:…` of some bytes.
pub fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// This machine's architecture as images name it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn layer_media_type(format: Format, compression: Compression) -> &'static str {
    match (format, compression) {
        (Format::Oci, Compression::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
        (Format::Oci, Compression::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
        (Format::Oci, Compression::Plain) => "application/vnd.oci.image.layer.v1.tar",
        (Format::Docker, Compression::Gzip) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
        (Format::Docker, Compression::Zstd) => "application/vnd.docker.image.rootfs.diff.tar.zstd",
        (Format::Docker, Compression::Plain) => "application/vnd.docker.image.rootfs.diff.tar",
    }
}

fn compress(archive: &[u8], compression: Compression) -> Result<Vec<u8>> {
    match compression {
        Compression::Plain => Ok(archive.to_vec()),
        Compression::Zstd => zstd::encode_all(archive, 3).context("zstd"),
        Compression::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(archive)?;
            encoder.finish().context("gzip")
        }
    }
}

fn unpack(layer: &Blob) -> Result<Vec<u8>> {
    let mut archive = Vec::new();
    if layer.media_type.ends_with("gzip") {
        flate2::read::GzDecoder::new(&layer.content[..]).read_to_end(&mut archive)?;
    } else if layer.media_type.ends_with("zstd") {
        archive = zstd::decode_all(&layer.content[..])?;
    } else {
        archive.clone_from(&layer.content);
    }
    Ok(archive)
}

/// busybox and what a container expects of a root file system. Users: root, app (1000:1000, also in
/// the group "extra" 3000), and daemon (1:1).
fn busybox_layer() -> Result<Vec<Entry>> {
    let busybox = fs::read(BUSYBOX)
        .with_context(|| format!("read {BUSYBOX}: install busybox-static ('make deps')"))?;
    let list = Command::new(BUSYBOX).arg("--list").output().context("run busybox --list")?;
    ensure!(list.status.success(), "busybox --list: {}", list.status);
    let mut entries = vec![
        Entry::dir("bin", 0o755),
        Entry::dir("dev", 0o755),
        Entry::dir("etc", 0o755),
        Entry::dir("home", 0o755),
        Entry::dir("home/app", 0o755).owner(1000, 1000),
        Entry::dir("proc", 0o555),
        Entry::dir("root", 0o700),
        Entry::dir("sys", 0o555),
        Entry::dir("tmp", 0o1777),
        Entry::dir("var", 0o755),
        Entry::file("bin/busybox", 0o755, busybox),
        Entry::file(
            "etc/passwd",
            0o644,
            "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1::/:/bin/false\n\
             app:x:1000:1000::/home/app:/bin/sh\n",
        ),
        Entry::file("etc/group", 0o644, "root:x:0:\ndaemon:x:1:\napp:x:1000:\nextra:x:3000:app\n"),
    ];
    for applet in String::from_utf8(list.stdout)?.lines() {
        if applet != "busybox" {
            entries.push(Entry::symlink(&format!("bin/{applet}"), "busybox"));
        }
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_and_sizes_are_true() {
        for (format, compression) in [
            (Format::Oci, Compression::Gzip),
            (Format::Oci, Compression::Zstd),
            (Format::Docker, Compression::Plain),
        ] {
            let image = Image::empty()
                .format(format)
                .compression(compression)
                .layer([Entry::file("a", 0o644, "x")])
                .user("app")
                .build()
                .unwrap();
            let manifest: Value = serde_json::from_slice(&image.manifest.content).unwrap();
            let config: Value = serde_json::from_slice(&image.config.content).unwrap();
            assert_eq!(manifest["config"]["digest"], sha256(&image.config.content));
            assert_eq!(manifest["layers"][0]["digest"], sha256(&image.layers[0].content));
            assert_eq!(manifest["layers"][0]["size"], image.layers[0].content.len());
            let plain = unpack(&image.layers[0]).unwrap();
            assert_eq!(config["rootfs"]["diff_ids"][0], sha256(&plain));
            assert_eq!(config["config"], json!({"User": "app"}));
        }
    }
}

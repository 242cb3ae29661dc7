//! Images out of the store: as archives (an OCI layout, or what `docker load` reads), and layers as
//! blobs for a push.
//!
//! A layer's archive is made again byte for byte ([`super::recipe`]), so the config and with it the
//! image's id stay. It is compressed anew, always in the same way: the digests of the compressed
//! layers, and so of the manifest, may be others than those the image was pulled by.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read, Seek, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::{
    Image,
    layers::{Layer, Layers},
    recipe,
    tarball::{Entry, Tarball},
};
use crate::{
    error::{Kind, Kinded},
    id::Digest,
};

/// OCI's name of a manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI's name of an index.
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI's name of a config.
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// OCI's name of a layer that gzip compressed.
pub(super) const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// Why an image did not get out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The archive of a layer.
    #[error(transparent)]
    Recipe(#[from] recipe::Error),
    /// The archive of a layer, on its way.
    #[error("make the archive of layer {layer} again")]
    Layer {
        /// The layer.
        layer: Digest,
        /// Why.
        source: io::Error,
    },
    /// Room for a layer beside the others.
    #[error("put a layer aside")]
    Aside(#[source] io::Error),
    /// Nobody wants it any more.
    #[error("it was cancelled")]
    Stopped,
    /// Where it goes.
    #[error("write the archive")]
    Out(#[source] io::Error),
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Recipe(recipe::Error::None(_)) => Kind::Precondition,
            Error::Aside(source) | Error::Layer { source, .. } => Kind::of_disk(source),
            Error::Recipe(_) => Kind::Internal,
            Error::Out(_) | Error::Stopped => Kind::Unavailable,
        }
    }
}

/// Which form an archive has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// An OCI layout (image-spec image-layout.md), layers compressed.
    Oci,
    /// What `docker save` wrote before it wrote OCI layouts; layers are not compressed.
    Docker,
}

/// An image with its documents.
pub(super) struct Whole {
    pub image: Arc<Image>,
    pub config: Vec<u8>,
    /// Tags to be written.
    pub names: Vec<String>,
}

/// A layer as a blob in a file that has no name.
pub(super) struct Packed {
    pub file: File,
    pub digest: Digest,
    pub size: u64,
}

impl Packed {
    pub(super) fn descriptor(&self) -> serde_json::Value {
        json!({"mediaType": GZIP, "digest": self.digest, "size": self.size})
    }
}

/// Hashes what is written.
struct Hashed<W> {
    out: W,
    hash: Sha256,
    length: u64,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = self.out.write(bytes)?;
        self.hash.update(&bytes[..length]);
        self.length += length as u64;
        Ok(length)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A file on the layers' file system that is gone when it is closed.
pub(super) fn aside(layers: &Layers) -> io::Result<File> {
    let path = layers.ingest().join(format!("{}.out", layers.number()));
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

/// Makes a layer's archive again, compressed or not. Blocks; ends early once `stop` is set.
pub(super) fn pack(
    layers: &Layers,
    layer: &Layer,
    compress: bool,
    stop: &AtomicBool,
) -> Result<Packed, Error> {
    let mut archive = BufReader::with_capacity(256 << 10, layer.archive()?);
    let file = aside(layers).map_err(Error::Aside)?;
    let out = BufWriter::with_capacity(256 << 10, file);
    let mut out = Hashed { out, hash: Sha256::new(), length: 0 };
    // Reading and writing are told apart: one says that the layer is broken, one that the disk is full.
    let mut copy = |out: &mut dyn Write| -> Result<(), Error> {
        let mut piece = vec![0; 256 << 10];
        loop {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Stopped);
            }
            let length = archive
                .read(&mut piece)
                .map_err(|source| Error::Layer { layer: layer.diff_id().clone(), source })?;
            if length == 0 {
                return Ok(());
            }
            out.write_all(&piece[..length]).map_err(Error::Aside)?;
        }
    };
    if compress {
        // No name and no time in the header: the same layer is always the same blob.
        let mut gzip = flate2::GzBuilder::new()
            .operating_system(255)
            .write(&mut out, flate2::Compression::new(6));
        copy(&mut gzip)?;
        gzip.finish().map_err(Error::Aside)?;
    } else {
        copy(&mut out)?;
    }
    let Hashed { out, hash, length } = out;
    let mut file = out.into_inner().map_err(|e| Error::Aside(e.into_error()))?;
    file.rewind().map_err(Error::Aside)?;
    Ok(Packed { file, digest: Digest::from_sha256(hash.finalize().into()), size: length })
}

/// The manifest of an image with layers as they were packed.
pub(super) fn manifest(image: &Image, config: &[u8], layers: &[serde_json::Value]) -> Vec<u8> {
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": image.id, "size": config.len()},
        "layers": layers,
    });
    if !image.annotations.is_empty() {
        manifest["annotations"] = json!(image.annotations);
    }
    manifest.to_string().into_bytes()
}

/// Writes an archive of images. Blocks.
pub(super) fn write(
    layers: &Layers,
    images: &[Whole],
    format: Format,
    out: impl Write,
) -> Result<(), Error> {
    let mut tar = Tarball::new(BufWriter::with_capacity(1 << 20, out));
    match format {
        Format::Oci => oci(layers, images, &mut tar)?,
        Format::Docker => docker(layers, images, &mut tar)?,
    }
    tar.finish().map_err(Error::Out)?;
    Ok(())
}

fn oci<W: Write>(layers: &Layers, images: &[Whole], tar: &mut Tarball<W>) -> Result<(), Error> {
    let path = |digest: &Digest| format!("blobs/sha256/{}", digest.hex());
    tar.text("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#).map_err(Error::Out)?;
    // Layers that images share are written once.
    let mut packed = std::collections::HashMap::new();
    let mut entries = Vec::new();
    for Whole { image, config, names } in images {
        let mut descriptors = Vec::new();
        for layer in &image.layers {
            let descriptor = match packed.get(layer.diff_id()) {
                Some(descriptor) => descriptor,
                None => {
                    let mut blob = pack(layers, layer, true, &AtomicBool::new(false))?;
                    let entry = Entry::file(&path(&blob.digest), blob.size);
                    tar.append(&entry, &mut blob.file).map_err(Error::Out)?;
                    packed.entry(layer.diff_id().clone()).or_insert(blob.descriptor())
                }
            };
            descriptors.push(descriptor.clone());
        }
        let manifest = manifest(image, config, &descriptors);
        let digest = Digest::from_sha256(Sha256::digest(&manifest).into());
        tar.text(&path(&image.id), config).map_err(Error::Out)?;
        tar.text(&path(&digest), &manifest).map_err(Error::Out)?;
        let entry = |name: Option<&String>| {
            let mut entry = json!({
                "mediaType": MANIFEST, "digest": digest, "size": manifest.len(),
                "platform": {"os": image.platform.os, "architecture": image.platform.architecture},
            });
            if !image.platform.variant.is_empty() {
                entry["platform"]["variant"] = json!(image.platform.variant);
            }
            if let Some(name) = name {
                entry["annotations"] = json!({
                    "io.containerd.image.name": name,
                    "org.opencontainers.image.ref.name": name,
                });
            }
            entry
        };
        match names.as_slice() {
            [] => entries.push(entry(None)),
            names => entries.extend(names.iter().map(|name| entry(Some(name)))),
        }
    }
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries});
    tar.text("index.json", index.to_string().as_bytes()).map_err(Error::Out)
}

fn docker<W: Write>(layers: &Layers, images: &[Whole], tar: &mut Tarball<W>) -> Result<(), Error> {
    let mut written = std::collections::HashSet::new();
    let mut items = Vec::new();
    for Whole { image, config, names } in images {
        let mut paths = Vec::new();
        for layer in &image.layers {
            let path = format!("{}/layer.tar", layer.diff_id().hex());
            if written.insert(layer.diff_id().clone()) {
                let mut blob = pack(layers, layer, false, &AtomicBool::new(false))?;
                tar.append(&Entry::file(&path, blob.size), &mut blob.file).map_err(Error::Out)?;
            }
            paths.push(path);
        }
        let path = format!("{}.json", image.id.hex());
        if written.insert(image.id.clone()) {
            tar.text(&path, config).map_err(Error::Out)?;
        }
        items.push(json!({"Config": path, "RepoTags": names, "Layers": paths}));
    }
    let manifest = serde_json::Value::from(items).to_string();
    tar.text("manifest.json", manifest.as_bytes()).map_err(Error::Out)
}

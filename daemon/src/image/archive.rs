//! Importing images from a tar archive: an OCI layout (image-spec image-layout.md) or what
//! `docker save` writes. Archives have their index anywhere, so all files are put aside first.

use std::{
    collections::{HashMap, HashSet},
    io::{self, BufReader},
    os::unix::{ffi::OsStrExt, fs::FileExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::{mpsc, watch},
};
use tokio_util::task::TaskTracker;

use super::{
    Image, NewImage, Shared, blocking,
    layers::Reap,
    manifest::{self, Config, Descriptor, Document, MAX_CONFIG, Platform},
    policy::{self, Transport},
    pull::{self, Error, Piece, Pieces, Progress, Source, Wanted, too_deep},
    reference::Reference,
    registry::MAX_MANIFEST,
    stream,
    tar::{self, Archive, Kind},
    unpack,
};
use crate::id::Digest;

/// Pieces of the archive that wait for the disk. Full: the sender waits.
const QUEUE: usize = 8;

/// Most files in an archive: far more than 500 layers and their documents.
const MAX_FILES: usize = 16_384;

/// Deepest nesting of indexes.
const MAX_DEPTH: usize = 4;

/// Imports all images that are for this node.
pub(super) async fn import(
    shared: &Arc<Shared>,
    archive: impl AsyncRead + Send + Unpin + 'static,
    name: Option<Reference>,
) -> Result<Vec<Arc<Image>>, Error> {
    let spool = Spool::fill(shared, archive).await?;
    let (spool, found) = blocking(move || {
        let found = spool.images();
        (spool, found)
    })
    .await?;
    let mut found = found?;
    if let Some(name) = name {
        let mut unnamed = found.iter_mut().filter(|image| image.names.is_empty());
        match (unnamed.next(), unnamed.next()) {
            (Some(image), None) => image.names.push(name),
            (Some(_), Some(_)) => {
                return Err(Error::Archive(
                    "it has several images without a name: one name cannot be given to all"
                        .to_owned(),
                ));
            }
            (None, _) => {}
        }
    }
    // All of them before the first is unpacked.
    let judged: Vec<(Transport, Option<Reference>)> = found
        .iter()
        .flat_map(|image| {
            let transport = match image.manifest {
                Some(_) => Transport::OciArchive,
                None => Transport::DockerArchive,
            };
            let names = image.names.iter().cloned().map(Some);
            // One without a name is judged too.
            names.chain(image.names.is_empty().then_some(None)).map(move |name| (transport, name))
        })
        .collect();
    let policy = shared.config.policy.clone();
    let judge = move || {
        for (transport, name) in judged {
            let shown =
                name.as_ref().map_or("an image without a name".into(), Reference::to_string);
            policy::judge(policy.as_deref(), transport, name.as_ref())?.archived(&shown)?;
        }
        Ok::<_, policy::Error>(())
    };
    blocking(judge).await??;
    let mut images = Vec::new();
    for image in found {
        let (progress, _) = watch::channel(Progress::default());
        let source = Source::Files(image.files);
        let layers =
            pull::layers(shared, source, &image.wanted, &progress, &TaskTracker::new()).await?;
        let target = image.target.as_ref().map(Digest::to_string).unwrap_or_default();
        let mut names = Vec::new();
        for name in &image.names {
            names.push((name.to_string(), target.clone()));
            if let Some(digest) = &image.target {
                names.push((name.at(digest), target.clone()));
            }
        }
        let new = NewImage {
            id: image.id,
            config: image.config,
            config_bytes: image.config_bytes,
            manifest: image.manifest,
            annotations: image.annotations,
            size: image.size,
            layers,
            names,
        };
        images.push(shared.commit(new).await?);
    }
    drop(spool);
    Ok(images)
}

/// An image as an archive has it.
struct Found {
    id: Digest,
    config: Config,
    config_bytes: Vec<u8>,
    manifest: Option<(Digest, Vec<u8>)>,
    target: Option<Digest>,
    annotations: crate::pod::config::Map,
    size: u64,
    wanted: Vec<Wanted>,
    files: Vec<PathBuf>,
    names: Vec<Reference>,
}

/// The files of an archive, by cleaned path. Dropping it removes them.
struct Spool {
    shared: Arc<Shared>,
    directory: PathBuf,
    files: HashMap<PathBuf, Item>,
}

enum Item {
    /// The file of this number in the directory.
    File(usize),
    /// The same as another path.
    Link(PathBuf),
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.shared.layers.reap(Reap::Path(self.directory.clone()));
    }
}

impl Spool {
    async fn fill(
        shared: &Arc<Shared>,
        mut archive: impl AsyncRead + Send + Unpin + 'static,
    ) -> Result<Self, Error> {
        let directory = shared.layers.ingest().join(shared.layers.number().to_string());
        let mut spool = Self { shared: shared.clone(), directory, files: HashMap::new() };
        let (pieces, queue) = mpsc::channel(QUEUE);
        let work = blocking(move || spool.unpack(Pieces::new(queue)).map(|()| spool));
        let feed = async move {
            loop {
                let mut data = Vec::with_capacity(256 << 10);
                match archive.read_buf(&mut data).await {
                    Ok(0) => {
                        let _ = pieces.send(Piece::End).await;
                        return Ok(());
                    }
                    Ok(_) => {
                        if pieces.send(Piece::Data(Bytes::from(data))).await.is_err() {
                            // The other end has given up and says why.
                            return Ok(());
                        }
                    }
                    Err(error) => return Err(error),
                }
            }
        };
        let (spool, fed) = futures::join!(work, feed);
        let source = |e| Error::Read(unpack::Error::Tar(tar::Error::Source(e)));
        fed.map_err(source)?;
        spool?
    }

    fn unpack(&mut self, source: Pieces) -> Result<(), Error> {
        let read = |e: tar::Error| Error::Read(unpack::Error::Tar(e));
        let write = |path: &Path, source: io::Error| {
            Error::Read(unpack::Error::Write { path: path.display().to_string(), source })
        };
        let directory = self.directory.clone();
        std::fs::create_dir(&directory).map_err(|e| write(&directory, e))?;
        let plain = stream::inflate(source).map_err(|e| read(e.into()))?;
        let mut archive = Archive::new(BufReader::with_capacity(256 << 10, plain));
        let mut left = self.shared.config.max_layer_size.saturating_mul(4);
        let mut count = 0;
        while let Some(entry) = archive.entry().map_err(read)? {
            if count == MAX_FILES {
                return Err(Error::Archive(format!("it has more than {MAX_FILES} files")));
            }
            let path = clean(Path::new(std::ffi::OsStr::from_bytes(&entry.path)));
            let target = |text: &[u8]| PathBuf::from(std::ffi::OsStr::from_bytes(text));
            match entry.kind {
                Kind::File => {
                    if entry.sparse.is_some() {
                        return Err(Error::Archive("a file in it is sparse".to_owned()));
                    }
                    left = left.checked_sub(entry.size).ok_or_else(|| {
                        Error::Archive("it is larger than four times images.max_layer_size".into())
                    })?;
                    let to = directory.join(count.to_string());
                    let file = std::fs::File::create_new(&to).map_err(|e| write(&to, e))?;
                    let mut done = 0;
                    while archive
                        .data(u64::MAX, |data| -> Result<usize, Failure> {
                            file.write_all_at(data, done).map_err(Failure::Write)?;
                            done += data.len() as u64;
                            Ok(data.len())
                        })
                        .map_err(|e| match e {
                            Failure::Tar(e) => read(e),
                            Failure::Write(e) => write(&to, e),
                        })?
                    {}
                    self.files.insert(path, Item::File(count));
                    count += 1;
                }
                Kind::Symlink(text) => {
                    let parent = path.parent().unwrap_or(Path::new("")).to_owned();
                    self.files.insert(path, Item::Link(clean(&parent.join(target(&text)))));
                    count += 1;
                }
                Kind::HardLink(text) => {
                    self.files.insert(path, Item::Link(clean(&target(&text))));
                    count += 1;
                }
                Kind::Directory | Kind::Char(..) | Kind::Block(..) | Kind::Fifo => {}
            }
        }
        archive.finish().map_err(read)?;
        Ok(())
    }

    /// Where the content of a path of the archive is.
    fn path(&self, path: impl AsRef<Path>) -> Option<PathBuf> {
        let mut path = clean(path.as_ref());
        for _ in 0..8 {
            match self.files.get(&path)? {
                Item::File(number) => return Some(self.directory.join(number.to_string())),
                Item::Link(target) => path.clone_from(target),
            }
        }
        None
    }

    fn read(&self, path: &str, limit: u64) -> Result<Vec<u8>, Error> {
        let missing = || Error::Archive(format!("it has no {path}"));
        let file = self.path(path).ok_or_else(missing)?;
        let size = std::fs::metadata(&file).map_err(|_| missing())?.len();
        if size > limit {
            return Err(Error::Archive(format!("{path} is larger than {limit} bytes")));
        }
        std::fs::read(&file)
            .map_err(|e| Error::Read(unpack::Error::Write { path: path.to_owned(), source: e }))
    }

    fn blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, Error> {
        let bytes = self.read(&format!("blobs/sha256/{}", digest.hex()), limit)?;
        let got = Digest::from_sha256(Sha256::digest(&bytes).into());
        if got != *digest {
            return Err(Error::Archive(format!("the blob {digest} has the content {got}")));
        }
        Ok(bytes)
    }

    fn images(&self) -> Result<Vec<Found>, Error> {
        // Newer `docker save` writes both forms: the OCI one says more.
        let found = if self.path("index.json").is_some() {
            self.oci_images()?
        } else if self.path("manifest.json").is_some() {
            self.docker_images()?
        } else {
            return Err(Error::Archive(
                "it has neither index.json (OCI layout) nor manifest.json (docker save)".to_owned(),
            ));
        };
        if found.is_empty() {
            return Err(Error::Archive("it has no image".to_owned()));
        }
        Ok(found)
    }

    fn oci_images(&self) -> Result<Vec<Found>, Error> {
        let index = self.read("index.json", MAX_MANIFEST)?;
        let Document::Index(entries) =
            Document::parse(&index, "application/vnd.oci.image.index.v1+json")?
        else {
            unreachable!("a manifest of that media type is refused");
        };
        let platform = Platform::node();
        let mut found: Vec<Found> = Vec::new();
        let mut mismatch = None;
        for entry in &entries {
            let mut image = match self.oci_image(entry, &platform, 1) {
                Ok(image) => image,
                // Archives of several platforms: ours is enough.
                Err(Error::Manifest(e @ manifest::Error::Platform { .. })) => {
                    mismatch = Some(e);
                    continue;
                }
                Err(error) => return Err(error),
            };
            image.target = Some(entry.digest.clone());
            image.names.extend(oci_name(entry)?);
            match found.iter_mut().find(|other| other.id == image.id) {
                Some(other) => other.names.append(&mut image.names),
                None => found.push(image),
            }
        }
        match (found.is_empty(), mismatch) {
            (true, Some(error)) => Err(error.into()),
            _ => Ok(found),
        }
    }

    fn oci_image(
        &self,
        entry: &Descriptor,
        platform: &Platform,
        depth: usize,
    ) -> Result<Found, Error> {
        let bytes = self.blob(&entry.digest, MAX_MANIFEST)?;
        match Document::parse(&bytes, &entry.media_type)? {
            Document::Index(entries) => {
                if depth > MAX_DEPTH {
                    return Err(too_deep().into());
                }
                let mut result = None;
                for candidate in manifest::candidates(&entries, platform)? {
                    let tried = self.oci_image(candidate, platform, depth + 1);
                    let mismatch =
                        matches!(&tried, Err(Error::Manifest(manifest::Error::Platform { .. })));
                    result = Some(tried);
                    if !mismatch {
                        break;
                    }
                }
                result.expect("there is a candidate, or an error")
            }
            Document::Manifest(manifest) => {
                let (id, config_bytes) = match &manifest.artifact {
                    None => {
                        let config = &manifest.config.digest;
                        (config.clone(), self.blob(config, MAX_CONFIG)?)
                    }
                    Some(kind) => (entry.digest.clone(), Config::of_artifact(kind, platform)),
                };
                let config = Config::parse(&config_bytes)?;
                config.check_platform(platform)?;
                let files = manifest
                    .layers
                    .iter()
                    .map(|layer| {
                        let path = format!("blobs/sha256/{}", layer.digest.hex());
                        self.path(&path)
                            .ok_or_else(|| Error::Archive(format!("it has no layer {path}")))
                    })
                    .collect::<Result<_, _>>()?;
                let size = manifest.layers.iter().map(|layer| layer.size).sum::<u64>()
                    + (config_bytes.len() + bytes.len()) as u64;
                Ok(Found {
                    wanted: match manifest.artifact {
                        None => pull::wanted(&manifest.layers, &config)?,
                        Some(_) => pull::files(&manifest.layers)?,
                    },
                    id,
                    config,
                    config_bytes,
                    manifest: Some((entry.digest.clone(), bytes)),
                    target: None,
                    annotations: manifest.annotations,
                    size,
                    files,
                    names: Vec::new(),
                })
            }
        }
    }

    fn docker_images(&self) -> Result<Vec<Found>, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Item {
            config: String,
            #[serde(default)]
            repo_tags: Option<Vec<String>>,
            layers: Vec<String>,
        }
        let text = self.read("manifest.json", MAX_MANIFEST)?;
        let items: Vec<Item> = serde_json::from_slice(&text)
            .map_err(|source| manifest::Error::Json { what: "manifest.json", source })?;
        let mut found = Vec::new();
        for item in items {
            let config_bytes = self.read(&item.config, MAX_CONFIG)?;
            let config = Config::parse(&config_bytes)?;
            config.check_platform(&Platform::node())?;
            if item.layers.len() != config.diff_ids.len()
                || item.layers.len() > manifest::MAX_LAYERS
            {
                return Err(Error::Archive(format!(
                    "{} has {} diff_ids, manifest.json has {} layers",
                    item.config,
                    config.diff_ids.len(),
                    item.layers.len()
                )));
            }
            let files: Vec<PathBuf> = item
                .layers
                .iter()
                .map(|layer| {
                    self.path(layer)
                        .ok_or_else(|| Error::Archive(format!("it has no layer {layer}")))
                })
                .collect::<Result<_, _>>()?;
            let names = item.repo_tags.unwrap_or_default();
            let names: Vec<Reference> =
                names.iter().map(|name| parse_name(name)).collect::<Result<_, _>>()?;
            let mut seen = HashSet::new();
            let size = files
                .iter()
                .filter(|file| seen.insert(*file))
                .filter_map(|file| Some(std::fs::metadata(file).ok()?.len()))
                .sum::<u64>();
            found.push(Found {
                id: Digest::from_sha256(Sha256::digest(&config_bytes).into()),
                wanted: config.diff_ids.iter().map(Wanted::archive).collect(),
                size: size + config_bytes.len() as u64,
                config,
                config_bytes,
                manifest: None,
                target: None,
                annotations: Default::default(),
                files,
                names,
            });
        }
        Ok(found)
    }
}

/// An error while a file is put aside.
enum Failure {
    Tar(tar::Error),
    Write(io::Error),
}

impl From<tar::Error> for Failure {
    fn from(error: tar::Error) -> Self {
        Failure::Tar(error)
    }
}

/// The name that an entry of index.json gives its image. `org.opencontainers.image.ref.name` is a
/// whole name with some tools, and only a tag with others: then it names nothing.
fn oci_name(entry: &Descriptor) -> Result<Option<Reference>, Error> {
    let Some(annotations) = &entry.annotations else { return Ok(None) };
    if let Some(name) = annotations.get("io.containerd.image.name") {
        return parse_name(name).map(Some);
    }
    match annotations.get("org.opencontainers.image.ref.name") {
        Some(name) if name.contains([':', '/']) => parse_name(name).map(Some),
        _ => Ok(None),
    }
}

fn parse_name(name: &str) -> Result<Reference, Error> {
    name.parse().map_err(|e: super::reference::Invalid| Error::Archive(e.to_string()))
}

/// A path without `.`, `..` and a leading slash. It only names, it is never opened.
fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::Normal(name) => cleaned.push(name),
            std::path::Component::ParentDir => {
                cleaned.pop();
            }
            _ => {}
        }
    }
    cleaned
}

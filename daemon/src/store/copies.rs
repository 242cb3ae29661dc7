//! Each record a second time, outside of the database, so that a database that is lost can be made again.
//!
//! ```text
//! <state>/bundles/<id>/record.json   a pod, or a container with what holds its layers
//! <root>/images/<digest>.json        an image: names, documents, layers
//! ```
//! A copy is written after the commit of what it says, on the store's thread, so that copies are written in
//! the order of commits. It goes before its record does: that of a pod or container with its bundle, that of
//! an image by itself. So, in this order of things, no copy is ever newer than the database, and there is
//! none of what the database does not know. Where that is not so the database has lost something.
//!
//! Those of pods and containers live as long as the processes that they are about, and are not synced: they
//! need to survive the daemon, not the machine. Those of images are synced.
//!
//! A copy that cannot be written (a full disk) fails nothing; the next start writes it.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use holdfast_shim::crash;
use rusqlite::{Connection, OptionalExtension as _, params};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::warn;

use super::{Error, images::LayerRecord};

/// The file in a bundle.
pub(crate) const RECORD: &str = "record.json";

/// Where copies are.
#[derive(Debug)]
pub(super) struct Copies {
    pub(super) bundles: PathBuf,
    pub(super) images: PathBuf,
}

/// The copy of a pod's or container's record.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct BundleCopy {
    pub(super) revision: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) pod: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) container: Option<Value>,
    /// A container's root file system and the images that it mounts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) snapshots: Vec<SnapshotCopy>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SnapshotCopy {
    pub(super) container: String,
    pub(super) image: String,
    pub(super) layers: Vec<LayerRecord>,
}

/// The copy of all that is recorded of an image.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ImageCopy {
    pub(super) revision: i64,
    pub(super) id: String,
    pub(super) record: Value,
    /// In base64, as `config`.
    pub(super) manifest: String,
    pub(super) config: String,
    pub(super) layers: Vec<LayerRecord>,
    pub(super) names: Vec<(String, String)>,
}

impl ImageCopy {
    pub(super) fn documents(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        Some((BASE64.decode(&self.manifest).ok()?, BASE64.decode(&self.config).ok()?))
    }
}

/// What tells whether a copy is up to date.
#[derive(Debug, Deserialize)]
pub(super) struct ImageHead {
    pub(super) revision: i64,
    pub(super) id: String,
    pub(super) record: Value,
    pub(super) names: Vec<(String, String)>,
}

impl Copies {
    pub(super) fn new(bundles: PathBuf, images: PathBuf) -> Self {
        Self { bundles, images }
    }

    /// Where the copy of a pod's or container's record is.
    pub(super) fn bundle(&self, id: &str) -> PathBuf {
        self.bundles.join(id).join(RECORD)
    }

    /// Where the copy of an image is.
    pub(super) fn image(&self, id: &str) -> PathBuf {
        self.images.join(format!("{}.json", id.rsplit(':').next().unwrap_or(id)))
    }

    /// Writes a pod's or container's; not where there is no bundle: what it is about is gone.
    fn put_bundle(&self, id: &str, copy: &BundleCopy) {
        let path = self.bundle(id);
        let written = serde_json::to_vec(copy)
            .map_err(io::Error::from)
            .and_then(|bytes| replace(&path, &bytes, false));
        match written {
            Ok(()) => match copy.pod {
                Some(_) => crash::point("daemon.store.pod-copied"),
                None => crash::point("daemon.store.container-copied"),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => not_written(&path, &error),
        }
    }

    /// [`Copies::put_bundle`], for when a commit has gone well; of what has no copy, nothing.
    pub(super) fn put(id: String) -> impl FnOnce(&Self, &Option<BundleCopy>) + Send + 'static {
        move |copies, copy| {
            if let Some(copy) = copy {
                copies.put_bundle(&id, copy);
            }
        }
    }

    /// Writes an image's.
    pub(super) fn put_image(&self, copy: &ImageCopy) {
        let path = self.image(&copy.id);
        let written = serde_json::to_vec(copy).map_err(io::Error::from).and_then(|bytes| {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.images)?;
            replace(&path, &bytes, true)
        });
        match written {
            Ok(()) => crash::point("daemon.store.image-copied"),
            Err(error) => not_written(&path, &error),
        }
    }

    /// Removes an image's, before its record goes.
    pub(super) fn remove_image(&self, id: &str) -> Result<(), Error> {
        let path = self.image(id);
        match fs::remove_file(&path) {
            Ok(()) => {
                crash::point("daemon.store.image-copy-removed");
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(Error::Copy { path, source }),
        }
    }
}

fn not_written(path: &Path, error: &io::Error) {
    warn!(path = %path.display(), %error, "the copy of a record is not written; the next start does it");
}

/// Reads a copy; `None`: it is not there, or says nothing.
pub(super) fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) => {
            if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) {
                warn!(path = %path.display(), %error, "the copy of a record cannot be read");
            }
            return None;
        }
    };
    match serde_json::from_slice(&bytes) {
        Ok(copy) => Some(copy),
        Err(error) => {
            warn!(path = %path.display(), %error, "the copy of a record is damaged");
            None
        }
    }
}

/// All or nothing, for whoever reads it; `durable`: after a power cut too.
fn replace(path: &Path, bytes: &[u8], durable: bool) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.new"));
    let written = (|| {
        let mut options = fs::File::options();
        let mut file =
            options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        // Renamed first: name and bytes share one commit of the file system's journal. What a power cut
        // leaves empty is no copy.
        fs::rename(&temporary, path)?;
        if durable {
            file.sync_all()?;
            fs::File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()?;
        }
        Ok(())
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// What the database says of a pod, for its copy; none of one that is only intended.
pub(super) fn of_pod(db: &Connection, id: &str) -> Result<Option<BundleCopy>, Error> {
    let row: Option<(String, i64)> = db
        .prepare_cached("SELECT record, revision FROM pods WHERE id = ?1")?
        .query_row([id], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((text, revision)) = row else { return Ok(None) };
    let record: Value = serde_json::from_str(&text).map_err(|e| Error::Record(id.to_owned(), e))?;
    let made = record["state"] != "Starting";
    let copy = BundleCopy { revision, pod: Some(record), container: None, snapshots: Vec::new() };
    Ok(made.then_some(copy))
}

/// The same of a container.
pub(super) fn of_container(db: &Connection, id: &str) -> Result<Option<BundleCopy>, Error> {
    let row: Option<(String, i64)> = db
        .prepare_cached("SELECT record, revision FROM containers WHERE id = ?1")?
        .query_row([id], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((text, revision)) = row else { return Ok(None) };
    let record: Value = serde_json::from_str(&text).map_err(|e| Error::Record(id.to_owned(), e))?;
    if record["state"] == "Creating" {
        return Ok(None);
    }
    // '0' comes after '/': a range, so that the index is used.
    let held: Vec<(String, String)> = db
        .prepare_cached(
            "SELECT container, image FROM snapshots
             WHERE container = ?1 OR (container > ?1 || '/' AND container < ?1 || '0')",
        )?
        .query_map([id], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<_, _>>()?;
    let snapshots = held
        .into_iter()
        .map(|(container, image)| {
            let layers = layers(db, "snapshot_layers", "container", &container)?;
            Ok(SnapshotCopy { container, image, layers })
        })
        .collect::<Result<_, Error>>()?;
    Ok(Some(BundleCopy { revision, pod: None, container: Some(record), snapshots }))
}

/// The same of an image.
pub(super) fn of_image(db: &Connection, id: &str) -> Result<Option<ImageCopy>, Error> {
    let row: Option<(String, Vec<u8>, Vec<u8>, i64)> = db
        .prepare_cached("SELECT record, manifest, config, revision FROM images WHERE id = ?1")?
        .query_row([id], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))
        .optional()?;
    let Some((record, manifest, config, revision)) = row else { return Ok(None) };
    Ok(Some(ImageCopy {
        revision,
        id: id.to_owned(),
        record: serde_json::from_str(&record)
            .map_err(|e| Error::Record(format!("image {id}"), e))?,
        manifest: BASE64.encode(manifest),
        config: BASE64.encode(config),
        layers: layers(db, "image_layers", "image", id)?,
        names: super::images::names(db, id)?,
    }))
}

/// `table` and `key` are ours.
fn layers(db: &Connection, table: &str, key: &str, value: &str) -> Result<Vec<LayerRecord>, Error> {
    let sql = format!(
        "SELECT number, diff_id, chain, bytes, inodes, root_listed FROM layers
         JOIN {table} ON layer = number WHERE {key} = ?1 ORDER BY position"
    );
    let mut statement = db.prepare_cached(&sql)?;
    let rows = statement.query_map(params![value], super::images::layer)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

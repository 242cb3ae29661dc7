//! Records of images, layers and snapshots (containers' root file systems).

use std::collections::BTreeSet;

use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};

use super::{
    Error, Store,
    copies::{self, Copies, ImageCopy},
    pods::Unknown,
};
use crate::{
    id::{ContainerId, Digest},
    pod::config::Map,
};

/// An unpacked layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Names its directory.
    pub number: u64,
    /// Digest of its uncompressed archive.
    pub diff_id: String,
    /// Empty: good on any layers below; else the chain id of those it was fitted to.
    pub chain: String,
    /// Room it takes.
    pub bytes: u64,
    /// Files, directories and so on.
    pub inodes: u64,
    /// Its archive lists the root directory.
    pub root_listed: bool,
}

/// What is kept of an image besides its documents. Fields that are added need a default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageRecord {
    /// Compressed layers and the config, in bytes.
    pub size: u64,
    /// Digest of its manifest; empty if it came without one.
    pub manifest: String,
    /// Annotations of its manifest.
    pub annotations: Map,
    /// Never collected by the kubelet.
    pub pinned: bool,
    /// When it was first pulled or imported, in seconds since 1970.
    pub added: u64,
    /// What a later release has added: it survives.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// An image with all that belongs to it.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredImage {
    /// Digest of the config.
    pub id: String,
    /// The record.
    pub record: ImageRecord,
    /// The config as it came.
    pub config: Vec<u8>,
    /// Numbers of its layers, from the bottom.
    pub layers: Vec<u64>,
    /// Names and what they stand for.
    pub names: Vec<(String, String)>,
}

/// A container's root file system, or an image that it mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredSnapshot {
    /// Of this container; `<container>/<mount>` for an image that it mounts.
    pub container: String,
    /// Id of the image it was made from, which may be gone.
    pub image: String,
    /// Numbers of its layers, from the bottom.
    pub layers: Vec<u64>,
}

/// All there is.
#[derive(Debug, Default)]
pub struct Stored {
    /// Layers that images or snapshots need.
    pub layers: Vec<LayerRecord>,
    /// Images.
    pub images: Vec<StoredImage>,
    /// Snapshots.
    pub snapshots: Vec<StoredSnapshot>,
}

impl Store {
    /// Reads everything and forgets the layers that nothing needs.
    pub async fn load_images(&self) -> Result<Stored, Error> {
        self.call(|db| {
            db.execute(
                "DELETE FROM layers WHERE number NOT IN (SELECT layer FROM image_layers)
                 AND number NOT IN (SELECT layer FROM snapshot_layers)",
                [],
            )?;
            let layers = db
                .prepare("SELECT number, diff_id, chain, bytes, inodes, root_listed FROM layers")?
                .query_map([], layer)?
                .collect::<Result<_, _>>()?;
            let images: Vec<(String, String, Vec<u8>)> = db
                .prepare("SELECT id, record, config FROM images")?
                .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
                .collect::<Result<_, _>>()?;
            let images = images
                .into_iter()
                .map(|(id, record, config)| {
                    Ok(StoredImage {
                        // An image without its annotations is worth more than a daemon that
                        // does not start.
                        record: serde_json::from_str(&record).unwrap_or_else(|error| {
                            tracing::error!(image = id, %error, "record is not understood");
                            ImageRecord::default()
                        }),
                        config,
                        layers: numbers(db, "image_layers", "image", &id)?,
                        names: names(db, &id)?,
                        id,
                    })
                })
                .collect::<Result<_, Error>>()?;
            let snapshots: Vec<(String, String)> = db
                .prepare("SELECT container, image FROM snapshots")?
                .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
                .collect::<Result<_, _>>()?;
            let snapshots = snapshots
                .into_iter()
                .map(|(container, image)| {
                    let layers = numbers(db, "snapshot_layers", "container", &container)?;
                    Ok(StoredSnapshot { container, image, layers })
                })
                .collect::<Result<_, Error>>()?;
            Ok(Stored { layers, images, snapshots })
        })
        .await
    }

    /// Makes an image visible, with its layers, or gives one that is there already more names.
    /// A name that stood for another image is moved.
    pub async fn add_image(
        &self,
        id: &Digest,
        record: ImageRecord,
        manifest: Vec<u8>,
        config: Vec<u8>,
        layers: Vec<LayerRecord>,
        names: Vec<(String, String)>,
    ) -> Result<(), Error> {
        let id = id.to_string();
        let job = move |db: &Connection| {
            let json = serde_json::to_string(&record)
                .map_err(|e| Error::Record(format!("image {id}"), e))?;
            let new = db.execute(
                "INSERT INTO images (id, record, manifest, config) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (id) DO NOTHING",
                params![id, json, manifest, config],
            )? > 0;
            if new {
                for (position, layer) in layers.iter().enumerate() {
                    db.execute(
                        "INSERT INTO layers (number, diff_id, chain, bytes, inodes, root_listed)
                         VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT (number) DO NOTHING",
                        params![
                            layer.number as i64,
                            layer.diff_id,
                            layer.chain,
                            layer.bytes as i64,
                            layer.inodes as i64,
                            layer.root_listed
                        ],
                    )?;
                    db.execute(
                        "INSERT INTO image_layers (image, position, layer) VALUES (?1, ?2, ?3)",
                        params![id, position as i64, layer.number as i64],
                    )?;
                }
            }
            let mut losers = BTreeSet::new();
            let mut renamed = new;
            for (name, target) in &names {
                let there: bool = db.query_row(
                    "SELECT EXISTS (SELECT 1 FROM image_names
                     WHERE name = ?1 AND image = ?2 AND target = ?3)",
                    params![name, id, target],
                    |row| row.get(0),
                )?;
                if there {
                    continue;
                }
                renamed = true;
                losers.extend(loser(db, name, &id)?);
                db.execute(
                    "INSERT INTO image_names (name, image, target) VALUES (?1, ?2, ?3)
                     ON CONFLICT (name) DO UPDATE SET image = ?2, target = ?3",
                    params![name, id, target],
                )?;
            }
            // The winner last: of two copies that claim a name the later one counts.
            let mut images: Vec<_> = losers.into_iter().collect();
            images.extend(renamed.then_some(id));
            changed(db, &images)
        };
        self.call_then(job, put_copies).await.map(drop)
    }

    /// Gives an image a name, which another may lose.
    pub async fn add_image_name(&self, id: &Digest, name: &str, target: &str) -> Result<(), Error> {
        let (id, name, target) = (id.to_string(), name.to_owned(), target.to_owned());
        let job = move |db: &Connection| {
            let mut images = Vec::from_iter(loser(db, &name, &id)?);
            db.execute(
                "INSERT INTO image_names (name, image, target) VALUES (?1, ?2, ?3)
                 ON CONFLICT (name) DO UPDATE SET image = ?2, target = ?3",
                params![name, id, target],
            )?;
            images.push(id);
            changed(db, &images)
        };
        self.call_then(job, put_copies).await.map(drop)
    }

    /// Takes a name from its image.
    pub async fn remove_image_name(&self, name: &str) -> Result<(), Error> {
        let name = name.to_owned();
        let job = move |db: &Connection| {
            let images = Vec::from_iter(loser(db, &name, "")?);
            db.execute("DELETE FROM image_names WHERE name = ?1", [name])?;
            changed(db, &images)
        };
        self.call_then(job, put_copies).await.map(drop)
    }

    /// Forgets an image and all its names. Its layers stay until [`Store::forget_layer`].
    pub async fn remove_image(&self, id: &Digest) -> Result<(), Error> {
        let id = id.to_string();
        let copies = self.copies.clone();
        self.call(move |db| {
            // First: a copy without a record would bring it back.
            if let Some(copies) = copies {
                copies.remove_image(&id)?;
            }
            db.execute("DELETE FROM images WHERE id = ?1", [id])?;
            Ok(())
        })
        .await
    }

    /// Manifest and config of an image as they came.
    pub async fn image_documents(&self, id: &Digest) -> Result<Option<(Vec<u8>, Vec<u8>)>, Error> {
        let id = id.to_string();
        self.call(move |db| {
            Ok(db
                .query_row("SELECT manifest, config FROM images WHERE id = ?1", [id], |row| {
                    Ok((row.get(0)?, row.get(1)?))
                })
                .optional()?)
        })
        .await
    }

    /// Forgets a layer that neither image nor snapshot needs; false if one does.
    pub async fn forget_layer(&self, number: u64) -> Result<bool, Error> {
        self.call(move |db| {
            let needed: bool = db.query_row(
                "SELECT EXISTS (SELECT 1 FROM image_layers WHERE layer = ?1)
                 OR EXISTS (SELECT 1 FROM snapshot_layers WHERE layer = ?1)",
                [number as i64],
                |row| row.get(0),
            )?;
            if !needed {
                db.execute("DELETE FROM layers WHERE number = ?1", [number as i64])?;
            }
            Ok(!needed)
        })
        .await
    }

    /// Records a snapshot before its directory is made.
    pub async fn add_snapshot(
        &self,
        container: &ContainerId,
        image: &Digest,
        layers: Vec<u64>,
    ) -> Result<(), Error> {
        self.add_held(container.to_string(), image, layers).await
    }

    async fn add_held(
        &self,
        container: String,
        image: &Digest,
        layers: Vec<u64>,
    ) -> Result<(), Error> {
        let image = image.to_string();
        self.call(move |db| {
            db.execute(
                "INSERT INTO snapshots (container, image) VALUES (?1, ?2)",
                params![container, image],
            )?;
            for (position, layer) in layers.iter().enumerate() {
                db.execute(
                    "INSERT INTO snapshot_layers (container, position, layer) VALUES (?1, ?2, ?3)",
                    params![container, position as i64, *layer as i64],
                )?;
            }
            Ok(())
        })
        .await
    }

    /// Records that a container's mount of this number shows an image.
    pub async fn add_image_volume(
        &self,
        container: &ContainerId,
        mount: usize,
        image: &Digest,
        layers: Vec<u64>,
    ) -> Result<(), Error> {
        self.add_held(format!("{container}/{mount}"), image, layers).await
    }

    /// Forgets a snapshot, after its directory is gone, and the container's image volumes.
    pub async fn remove_snapshot(&self, container: &ContainerId) -> Result<(), Error> {
        let container = container.to_string();
        self.call(move |db| {
            // '0' comes after '/': a range, so that the index is used.
            db.execute(
                "DELETE FROM snapshots WHERE container = ?1
                 OR (container > ?1 || '/' AND container < ?1 || '0')",
                [container],
            )?;
            Ok(())
        })
        .await
    }
}

/// `table` and `key` are ours, never a user's.
fn numbers(db: &Connection, table: &str, key: &str, value: &str) -> Result<Vec<u64>, Error> {
    let sql = format!("SELECT layer FROM {table} WHERE {key} = ?1 ORDER BY position");
    let mut statement = db.prepare_cached(&sql)?;
    let rows = statement.query_map([value], |row| Ok(row.get::<_, i64>(0)? as u64))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// number, diff_id, chain, bytes, inodes, root_listed
pub(super) fn layer(row: &rusqlite::Row<'_>) -> Result<LayerRecord, rusqlite::Error> {
    Ok(LayerRecord {
        number: row.get::<_, i64>(0)? as u64,
        diff_id: row.get(1)?,
        chain: row.get(2)?,
        bytes: row.get::<_, i64>(3)? as u64,
        inodes: row.get::<_, i64>(4)? as u64,
        root_listed: row.get(5)?,
    })
}

/// Notes that these images have changed; what their copies are to say.
fn changed(db: &Connection, images: &[String]) -> Result<Vec<ImageCopy>, Error> {
    let mut copies = Vec::new();
    for image in images {
        db.prepare_cached(
            "UPDATE images SET revision = (SELECT max(revision) + 1 FROM images) WHERE id = ?1",
        )?
        .execute([image])?;
        copies.extend(copies::of_image(db, image)?);
    }
    Ok(copies)
}

fn put_copies(copies: &Copies, changed: &Vec<ImageCopy>) {
    for copy in changed {
        copies.put_image(copy);
    }
}

/// The image that has a name, unless it is this one.
fn loser(db: &Connection, name: &str, winner: &str) -> Result<Option<String>, Error> {
    let sql = "SELECT image FROM image_names WHERE name = ?1 AND image <> ?2";
    Ok(db.prepare_cached(sql)?.query_row([name, winner], |row| row.get(0)).optional()?)
}

pub(super) fn names(db: &Connection, image: &str) -> Result<Vec<(String, String)>, Error> {
    let mut statement =
        db.prepare_cached("SELECT name, target FROM image_names WHERE image = ?1 ORDER BY name")?;
    let rows = statement.query_map([image], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

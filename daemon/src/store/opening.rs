//! Opening the database whatever state it is in.
//!
//! ```text
//! no file, or empty ──┐
//! damaged ─set aside──┼─▶ migrated ─▶ compared with the copies ─▶ served
//! whole ──────────────┘
//! ```
//! A file that SQLite finds damaged, or that is not ours, is renamed and kept, its log with it. Then, and
//! also where the file is whole, the copies of records (copies.rs) are compared with the database, for a
//! database may be whole and old: without the log that went with it, or out of a backup. What the database
//! has lost comes back from the copies; of two versions of a record the later one counts. All of it is one
//! transaction; a crash before its end leaves nothing but the broken file in its new place.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fmt, fs, io,
    path::{Path, PathBuf},
    time::Instant,
};

use rusqlite::{Connection, OptionalExtension as _, Transaction, params};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tracing::{debug, error, info, warn};

use super::{
    Error,
    copies::{self, BundleCopy, Copies, ImageCopy, ImageHead},
    images::{ImageRecord, LayerRecord},
    migrate::{self, Unusable, about, set_about},
    pods::{ContainerRecord, PodRecord},
    room,
};

/// What was found when the database was opened.
#[derive(Clone, Debug, Default)]
pub struct Opening {
    /// Its file.
    pub path: PathBuf,
    /// Its schema version; higher than ours if a later release wrote it.
    pub schema: i64,
    /// What was wrong with the file that was there.
    pub damage: Option<Damage>,
    /// What came back from the copies.
    pub restored: Restored,
    /// The machine was started again since the database was last used.
    pub rebooted: bool,
    /// Layers are to be verified: the machine went down before the daemon had ended, or the database was
    /// lost.
    pub verify: bool,
    /// Records whose copy is missing or old.
    pub(super) uncopied: Uncopied,
}

/// A file that could not be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// What was wrong.
    pub what: String,
    /// Where the file is now; empty if there was none.
    pub kept: Vec<PathBuf>,
}

/// Records that the database had lost, or had old.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Of pods.
    pub pods: usize,
    /// Of containers.
    pub containers: usize,
    /// Of images.
    pub images: usize,
}

impl Restored {
    fn is_empty(self) -> bool {
        self == Self::default()
    }
}

impl fmt::Display for Restored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pods, containers, images } = self;
        write!(f, "{pods} pods, {containers} containers and {images} images")
    }
}

/// Ids of records whose copy is to be written.
#[derive(Clone, Debug, Default)]
pub(super) struct Uncopied {
    pub(super) pods: Vec<String>,
    pub(super) containers: Vec<String>,
    pub(super) images: Vec<String>,
}

impl Opening {
    /// One line for people.
    pub fn summary(&self) -> String {
        let known = migrate::version();
        let mut text = format!("schema {}", self.schema);
        if self.schema > known {
            text.push_str(&format!(" (of a later release; this one has {known})"));
        }
        if let Some(damage) = &self.damage {
            text.push_str(&format!(", made anew: {}", damage.what));
            for kept in damage.kept.iter().take(1) {
                text.push_str(&format!("; the old file is {}", kept.display()));
            }
        }
        if !self.restored.is_empty() {
            text.push_str(&format!("; {} came back", self.restored));
        }
        text
    }

    /// The same for programs.
    pub fn to_json(&self) -> Value {
        let damage = self.damage.as_ref();
        json!({
            "path": self.path,
            "schema": self.schema,
            "knownSchema": migrate::version(),
            "summary": self.summary(),
            "damage": damage.map(|damage| &damage.what),
            "kept": damage.map(|damage| &damage.kept),
            "restored": {
                "pods": self.restored.pods,
                "containers": self.restored.containers,
                "images": self.restored.images,
            },
            "rebooted": self.rebooted,
        })
    }
}

/// Opens the database at `path`, whatever there is, and brings it up to date; with `copies`, whatever has
/// become of it.
pub(super) fn open(
    path: &Path,
    alone: bool,
    copies: Option<&Copies>,
    boot: &str,
) -> Result<(Connection, Opening), Error> {
    let begun = Instant::now();
    let mut opening = Opening { path: path.to_owned(), ..Opening::default() };
    let absent = match fs::metadata(path) {
        Ok(meta) if meta.len() == 0 => Some("it was empty"),
        Ok(_) => None,
        Err(_) => Some("it was not there"),
    };
    if copies.is_some() {
        opening.damage = orphaned_log(path)?;
    }
    let first = try_open(path, alone, copies.is_some());
    let mut db = match (first, copies) {
        (Ok(db), _) => db,
        (Err(Failed::Damaged(what)), Some(_)) => {
            let kept = set_aside(path)?;
            error!(
                what,
                kept = %kept.first().map(|path| path.display().to_string()).unwrap_or_default(),
                "the database is damaged and is made anew from the copies of its records"
            );
            opening.damage = Some(Damage { what, kept });
            try_open(path, alone, true).map_err(|failed| failed.into_error(path))?
        }
        (Err(failed), _) => return Err(failed.into_error(path)),
    };
    let at = |source| Error::Open { path: path.to_owned(), source };
    opening.schema = migrate::found(&db).map_err(at)?;
    if let Some(copies) = copies {
        compare(&mut db, copies, boot, absent, &mut opening)?;
    }
    debug!(took = ?begun.elapsed(), schema = opening.schema, "the database is open");
    Ok((db, opening))
}

enum Failed {
    Damaged(String),
    Newer { found: i64, oldest: i64 },
    Sql(rusqlite::Error),
}

impl Failed {
    fn into_error(self, path: &Path) -> Error {
        let path = path.to_owned();
        match self {
            Failed::Damaged(what) => Error::Damaged { path, what },
            Failed::Newer { found, oldest } => {
                Error::Newer { path, found, oldest, known: migrate::version() }
            }
            Failed::Sql(source) => Error::Open { path, source },
        }
    }
}

impl From<rusqlite::Error> for Failed {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ffi;
        match &error {
            rusqlite::Error::SqliteFailure(code, _)
                if matches!(
                    code.code,
                    rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt
                ) || code.extended_code == ffi::SQLITE_IOERR_SHORT_READ =>
            {
                Failed::Damaged(error.to_string())
            }
            _ => Failed::Sql(error),
        }
    }
}

impl From<Unusable> for Failed {
    fn from(unusable: Unusable) -> Self {
        match unusable {
            Unusable::Newer { found, oldest } => Failed::Newer { found, oldest },
            Unusable::Strange(what) => Failed::Damaged(what.to_owned()),
            Unusable::Sql(error) => error.into(),
        }
    }
}

fn try_open(path: &Path, alone: bool, check: bool) -> Result<Connection, Failed> {
    super::private_file(path);
    let mut db = Connection::open(path)?;
    // One daemon has it, by the lock beside it. So the log's index is in our memory, and not in a file that
    // a full disk has no room for (sqlite.org/wal.html, "Use of WAL Without Shared-Memory"). Before
    // anything that opens the log.
    if alone {
        db.pragma_update(None, "locking_mode", "exclusive")?;
    }
    // WAL with FULL: one fsync of the log per commit, and a commit that returned survives a power cut
    // (sqlite.org/pragma.html#pragma_synchronous).
    db.pragma_update(None, "journal_mode", "wal")?;
    db.pragma_update(None, "synchronous", "full")?;
    db.pragma_update(None, "foreign_keys", true)?;
    if check {
        // Some thousand pages at most: a few milliseconds.
        let said: String = db.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
        if said != "ok" {
            return Err(Failed::Damaged(said));
        }
    }
    migrate::migrate(&mut db, migrate::MIGRATIONS)?;
    if check {
        has_our_tables(&db)?;
    }
    room::keep_log(&db)?;
    Ok(db)
}

/// All that we read is there: a number in a file's head is not enough.
fn has_our_tables(db: &Connection) -> Result<(), Failed> {
    const READ: [&str; 9] = [
        "SELECT id, record, revision FROM pods",
        "SELECT id, pod, record, revision FROM containers",
        "SELECT number, diff_id, chain, bytes, inodes, root_listed FROM layers",
        "SELECT id, record, manifest, config, revision FROM images",
        "SELECT image, position, layer FROM image_layers",
        "SELECT name, image, target FROM image_names",
        "SELECT container, image FROM snapshots",
        "SELECT container, position, layer FROM snapshot_layers",
        "SELECT id FROM removed_images",
    ];
    for sql in READ {
        db.prepare(sql).map_err(|error| match error {
            rusqlite::Error::SqlInputError { msg, .. } => Failed::Damaged(msg),
            other => other.into(),
        })?;
    }
    Ok(())
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    PathBuf::from(name)
}

/// A log whose database is gone: SQLite would remove it, and it may be all that is left for people to
/// look at.
fn orphaned_log(path: &Path) -> Result<Option<Damage>, Error> {
    let length = |path: &Path| fs::metadata(path).map_or(0, |meta| meta.len());
    let existed = path.exists();
    if length(path) > 0 || length(&beside(path, "-wal")) == 0 {
        return Ok(None);
    }
    let kept = set_aside(path)?;
    let what = if existed { "it was empty" } else { "it was not there, but its log was" };
    error!(what, "the database is lost and is made anew from the copies of its records");
    Ok(Some(Damage { what: what.to_owned(), kept }))
}

/// Renames a database and its log; where they are now. The database first: a crash in between leaves a log
/// without one, which the next start sets aside.
fn set_aside(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let stamp = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let free = |number: u32| {
        let number = if number == 0 { String::new() } else { format!("-{number}") };
        beside(path, &format!(".broken-{stamp}{number}"))
    };
    let taken = |path: &PathBuf| path.exists() || beside(path, "-wal").exists();
    let target = (0..).map(free).find(|path| !taken(path)).unwrap_or_else(|| free(0));
    let mut kept = Vec::new();
    for suffix in ["", "-wal"] {
        let (from, to) = (beside(path, suffix), beside(&target, suffix));
        match fs::rename(&from, &to) {
            Ok(()) => kept.push(to),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::SetAside { path: from, source }),
        }
    }
    // Only ever the index of the log.
    let _ = fs::remove_file(beside(path, "-shm"));
    Ok(kept)
}

/// Brings back what the copies have and the database has not, and notes in which boot that is.
fn compare(
    db: &mut Connection,
    copies: &Copies,
    boot: &str,
    absent: Option<&'static str>,
    opening: &mut Opening,
) -> Result<(), Error> {
    let tx = db.transaction()?;
    let mut of_bundles = (BTreeMap::new(), BTreeMap::new());
    for id in names_in(&copies.bundles)? {
        let Some(copy) = copies::read::<BundleCopy>(&copies.bundle(&id)) else { continue };
        match (&copy.pod, &copy.container) {
            (Some(_), None) => drop(of_bundles.0.insert(id, copy)),
            (None, Some(_)) => drop(of_bundles.1.insert(id, copy)),
            _ => warn!(id, "the copy of a record is of nothing that this release knows"),
        }
    }
    pods(&tx, copies, &of_bundles.0, opening)?;
    containers(&tx, copies, &of_bundles.1, opening)?;
    images(&tx, copies, opening)?;

    let before = about(&tx, "boot")?;
    opening.rebooted = before.as_deref().is_some_and(|before| before != boot && !boot.is_empty());
    let clean = about(&tx, "clean")?.as_deref() == Some("yes");
    let lost = opening.damage.is_some() || opening.restored.images > 0;
    if opening.rebooted && !clean || lost {
        set_about(&tx, "verify", "yes")?;
    }
    opening.verify = about(&tx, "verify")?.as_deref() == Some("yes");
    set_about(&tx, "boot", boot)?;
    set_about(&tx, "clean", "no")?;
    tx.commit()?;

    if !opening.restored.is_empty() {
        if opening.damage.is_none() {
            let what = absent.unwrap_or("it had lost what was written last, or is another's");
            error!(what, "the database lacks what the copies of its records have");
            opening.damage = Some(Damage { what: what.to_owned(), kept: Vec::new() });
        }
        warn!(restored = %opening.restored, "records came back from their copies");
    } else if opening.damage.is_some() {
        info!("there were no copies of records: no pod of this boot, and no image");
    }
    Ok(())
}

/// Names in a directory; none if it is not there.
fn names_in(dir: &Path) -> Result<BTreeSet<String>, Error> {
    let failed = |source| Error::Copy { path: dir.to_owned(), source };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) => return Err(failed(error)),
    };
    let names = entries.map(|entry| Ok(entry.map_err(failed)?.file_name().into_string().ok()));
    Ok(names.collect::<Result<Vec<_>, Error>>()?.into_iter().flatten().collect())
}

/// What is to be done about a record and its copy.
enum Verdict {
    Same,
    /// The database has it right.
    Copy,
    /// The copy has it right.
    Restore,
}

/// `row`: the record and its revision, if the database has one.
fn judge<T: DeserializeOwned>(row: Option<&(String, i64)>, copy: (&Value, i64)) -> Verdict {
    let copied = || serde_json::from_value::<T>(copy.0.clone()).is_ok();
    let Some((text, revision)) = row else {
        return if copied() { Verdict::Restore } else { Verdict::Same };
    };
    let same = serde_json::from_str::<Value>(text).is_ok_and(|row| row == *copy.0);
    // As good as always, and every start waits for all of them.
    if same && copy.1 == *revision {
        return Verdict::Same;
    }
    // One that this release does not understand may be of a later one.
    let read = serde_json::from_str::<T>(text).is_ok();
    if (copy.1 > *revision || !read) && copied() {
        return Verdict::Restore;
    }
    if read { Verdict::Copy } else { Verdict::Same }
}

fn rows(db: &Connection, table: &str) -> Result<BTreeMap<String, (String, i64)>, rusqlite::Error> {
    db.prepare(&format!("SELECT id, record, revision FROM {table}"))?
        .query_map([], |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?))))?
        .collect()
}

fn pods(
    tx: &Transaction<'_>,
    copies: &Copies,
    found: &BTreeMap<String, BundleCopy>,
    opening: &mut Opening,
) -> Result<(), Error> {
    let rows = rows(tx, "pods")?;
    for (id, copy) in found {
        let Some(record) = &copy.pod else { continue };
        match judge::<PodRecord>(rows.get(id), (record, copy.revision)) {
            Verdict::Same => {}
            Verdict::Copy => opening.uncopied.pods.push(id.clone()),
            Verdict::Restore => {
                tx.execute(
                    "INSERT INTO pods (id, record, revision) VALUES (?1, ?2, ?3)
                     ON CONFLICT (id) DO UPDATE SET record = ?2, revision = ?3",
                    params![id, record.to_string(), copy.revision],
                )?;
                info!(pod = id, "the record of a pod came back");
                opening.restored.pods += 1;
            }
        }
    }
    let missing = rows.keys().filter(|id| !found.contains_key(*id) && has_bundle(copies, id));
    opening.uncopied.pods.extend(missing.cloned());
    Ok(())
}

fn has_bundle(copies: &Copies, id: &str) -> bool {
    copies.bundles.join(id).exists()
}

fn containers(
    tx: &Transaction<'_>,
    copies: &Copies,
    found: &BTreeMap<String, BundleCopy>,
    opening: &mut Opening,
) -> Result<(), Error> {
    let rows = rows(tx, "containers")?;
    for (id, copy) in found {
        let Some(record) = &copy.container else { continue };
        match judge::<ContainerRecord>(rows.get(id), (record, copy.revision)) {
            Verdict::Same => {}
            Verdict::Copy => opening.uncopied.containers.push(id.clone()),
            Verdict::Restore => {
                let pod = record["pod"].as_str().unwrap_or_default();
                tx.execute(
                    "INSERT INTO containers (id, pod, record, revision) VALUES (?1, ?2, ?3, ?4)
                     ON CONFLICT (id) DO UPDATE SET pod = ?2, record = ?3, revision = ?4",
                    params![id, pod, record.to_string(), copy.revision],
                )?;
                for held in &copy.snapshots {
                    layers(tx, &held.layers)?;
                    tx.execute(
                        "INSERT INTO snapshots (container, image) VALUES (?1, ?2)
                         ON CONFLICT (container) DO UPDATE SET image = ?2",
                        params![held.container, held.image],
                    )?;
                    chain(tx, "snapshot_layers", "container", &held.container, &held.layers)?;
                }
                info!(container = id, "the record of a container came back");
                opening.restored.containers += 1;
            }
        }
    }
    let missing = rows.keys().filter(|id| !found.contains_key(*id) && has_bundle(copies, id));
    opening.uncopied.containers.extend(missing.cloned());
    Ok(())
}

fn images(tx: &Transaction<'_>, copies: &Copies, opening: &mut Opening) -> Result<(), Error> {
    let rows = rows(tx, "images")?;
    let mut seen = BTreeSet::new();
    let mut heads = Vec::new();
    for name in names_in(&copies.images)? {
        if !name.ends_with(".json") || name.starts_with('.') {
            // Of a write that was cut short.
            let _ = fs::remove_file(copies.images.join(&name));
            continue;
        }
        if let Some(head) = copies::read::<ImageHead>(&copies.images.join(&name)) {
            heads.push(head);
        }
    }
    // A name that two of them claim is that of the one which was written later.
    heads.sort_by_key(|head| head.revision);
    let mut removed = tx.prepare("SELECT EXISTS (SELECT 1 FROM removed_images WHERE id = ?1)")?;
    for head in heads {
        let row = rows.get(&head.id);
        if row.is_none() && removed.query_row([&head.id], |row| row.get(0))? {
            // By a daemon that knows no copies, or one that died before it was removed.
            copies.remove_image(&head.id)?;
            continue;
        }
        seen.insert(head.id.clone());
        let mut verdict = judge::<ImageRecord>(row, (&head.record, head.revision));
        if matches!(verdict, Verdict::Same) && row.is_some() {
            let mut names = head.names.clone();
            names.sort();
            // By a daemon that knows no copies.
            if super::images::names(tx, &head.id)? != names {
                verdict = Verdict::Copy;
            }
        }
        match verdict {
            Verdict::Same => {}
            Verdict::Copy => opening.uncopied.images.push(head.id),
            Verdict::Restore => {
                let Some(copy) = copies::read::<ImageCopy>(&copies.image(&head.id)) else {
                    continue;
                };
                if image(tx, &copy)? {
                    info!(image = copy.id, "the record of an image came back");
                    opening.restored.images += 1;
                }
            }
        }
    }
    drop(removed);
    tx.execute("DELETE FROM removed_images", [])?;
    opening.uncopied.images.extend(rows.keys().filter(|id| !seen.contains(*id)).cloned());
    Ok(())
}

fn image(tx: &Transaction<'_>, copy: &ImageCopy) -> Result<bool, Error> {
    let Some((manifest, config)) = copy.documents() else {
        warn!(image = copy.id, "the copy of an image's record is damaged");
        return Ok(false);
    };
    tx.execute(
        "INSERT INTO images (id, record, manifest, config, revision) VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT (id) DO UPDATE SET record = ?2, manifest = ?3, config = ?4, revision = ?5",
        params![copy.id, copy.record.to_string(), manifest, config, copy.revision],
    )?;
    layers(tx, &copy.layers)?;
    chain(tx, "image_layers", "image", &copy.id, &copy.layers)?;
    tx.execute("DELETE FROM image_names WHERE image = ?1", [&copy.id])?;
    for (name, target) in &copy.names {
        tx.execute(
            "INSERT INTO image_names (name, image, target) VALUES (?1, ?2, ?3)
             ON CONFLICT (name) DO UPDATE SET image = ?2, target = ?3",
            params![name, copy.id, target],
        )?;
    }
    Ok(true)
}

fn layers(tx: &Transaction<'_>, layers: &[LayerRecord]) -> Result<(), Error> {
    let mut known = tx.prepare_cached("SELECT diff_id FROM layers WHERE number = ?1")?;
    let mut put = tx.prepare_cached(
        "INSERT INTO layers (number, diff_id, chain, bytes, inodes, root_listed)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)
         ON CONFLICT (number) DO UPDATE
         SET diff_id = ?2, chain = ?3, bytes = ?4, inodes = ?5, root_listed = ?6",
    )?;
    for layer in layers {
        let number = layer.number as i64;
        let diff_id: Option<String> = known.query_row([number], |row| row.get(0)).optional()?;
        // Another of this number was there before, and the database is older than that.
        if diff_id.as_ref() != Some(&layer.diff_id) {
            put.execute(params![
                number,
                layer.diff_id,
                layer.chain,
                layer.bytes as i64,
                layer.inodes as i64,
                layer.root_listed
            ])?;
        }
    }
    Ok(())
}

/// `table` and `key` are ours.
fn chain(
    tx: &Transaction<'_>,
    table: &str,
    key: &str,
    value: &str,
    layers: &[LayerRecord],
) -> Result<(), Error> {
    tx.execute(&format!("DELETE FROM {table} WHERE {key} = ?1"), [value])?;
    let sql = format!("INSERT INTO {table} ({key}, position, layer) VALUES (?1, ?2, ?3)");
    let mut put = tx.prepare_cached(&sql)?;
    for (position, layer) in layers.iter().enumerate() {
        put.execute(params![value, position as i64, layer.number as i64])?;
    }
    Ok(())
}

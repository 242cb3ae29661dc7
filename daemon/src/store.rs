//! Durable records: SQLite in WAL mode, one thread that owns the connection.
//!
//! Jobs that are waiting together are committed together, so that many pods that start at once
//! share one fsync. A job's result is handed out only after the commit that holds it: what a caller
//! has seen is on disk. Records hold *intent* (what should exist); bundles and shims hold fact.
//!
//! Owns the schema and its migrations. Each table's statements are in the module of its noun. Of every record
//! there is a copy elsewhere, from which a database that is lost is made again: `copies`, `opening`.

pub(crate) mod copies;
pub mod images;
mod migrate;
mod opening;
pub mod pods;
mod room;

#[cfg(test)]
mod tests;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use self::copies::Copies;
pub use self::opening::{Damage, Opening, Restored};
use crate::error::{Kind, Kinded};

/// Jobs that wait for the store's thread. A full queue makes callers wait; nothing is dropped.
const QUEUE: usize = 1024;

/// Most jobs that share a commit; bounds how long the first of them waits.
const BATCH: usize = 64;

/// Why the store did not do something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database file cannot be opened or brought to the current schema.
    #[error("open database {path}")]
    Open {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: rusqlite::Error,
    },
    /// It is no database, or not one of ours.
    #[error("database {path} is damaged: {what}")]
    Damaged {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A release that is too far ahead wrote it.
    #[error(
        "database {path} is of a later release (schema {found}, for releases that know schema {oldest}; this one \
         knows {known}): install that release again, or move the file away and start: it is made anew, with all \
         running pods and all images"
    )]
    Newer {
        /// Its path.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// The oldest version that may use it.
        oldest: i64,
        /// Ours.
        known: i64,
    },
    /// A file that cannot be used cannot be renamed either.
    #[error("set the damaged database file {path} aside")]
    SetAside {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The copy of a record, or where copies are.
    #[error("copies of records at {path}")]
    Copy {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A statement or commit went wrong.
    #[error("write record")]
    Sql(#[from] rusqlite::Error),
    /// A record is not what this version writes.
    #[error("record of {0}")]
    Record(String, #[source] serde_json::Error),
    /// The store's thread is gone: the daemon is shutting down.
    #[error("the store is closed")]
    Closed,
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Sql(rusqlite::Error::SqliteFailure(e, _))
                if e.code == rusqlite::ErrorCode::DiskFull =>
            {
                Kind::Exhausted
            }
            Error::Closed => Kind::Unavailable,
            Error::Copy { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                Kind::Exhausted
            }
            Error::Open { .. }
            | Error::Damaged { .. }
            | Error::Newer { .. }
            | Error::SetAside { .. }
            | Error::Copy { .. }
            | Error::Sql(_)
            | Error::Record(..) => Kind::Internal,
        }
    }
}

/// Makes the database nobody's but ours: it has the environment of containers. SQLite gives its other
/// files the same mode. What goes wrong here, opening it finds again and tells.
fn private_file(path: &Path) {
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
    let file = std::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path);
    if let Ok(file) = file {
        let _ = file.set_permissions(std::fs::Permissions::from_mode(0o600));
    }
}

/// Runs one job inside the batch's transaction; returns what to do once that is committed.
type Job = Box<dyn FnOnce(&Connection) -> Reply + Send>;
/// Tells the caller: its result if the commit went well (`None`), else the commit's failure.
type Reply = Box<dyn FnOnce(Option<&Failure>) + Send>;
/// What SQLite says, and in words.
type Failure = (Option<rusqlite::ffi::Error>, String);

/// A handle to the store; clones share it.
#[derive(Clone)]
pub struct Store {
    jobs: mpsc::Sender<Job>,
    copies: Option<Arc<Copies>>,
    opening: Arc<Opening>,
}

impl Store {
    /// Opens or creates the database and brings its schema up to date. It has no copies: for tests.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_as(path, true, None)
    }

    /// The same, with copies of pods' and containers' records in their `bundles`, and of images' in
    /// `images`. What is damaged or lost is made anew from them: [`Store::opening`] tells.
    pub fn open_with_copies(path: &Path, bundles: &Path, images: &Path) -> Result<Self, Error> {
        Self::open_as(path, true, Some(Copies::new(bundles.to_owned(), images.to_owned())))
    }

    /// The same beside another that is open: for tests, whose first daemon is not gone when the next
    /// one starts.
    #[cfg(test)]
    pub(crate) fn open_beside(path: &Path) -> Result<Self, Error> {
        Self::open_as(path, false, None)
    }

    fn open_as(path: &Path, alone: bool, copies: Option<Copies>) -> Result<Self, Error> {
        let room = room::Room::new(path);
        let (db, opening) = opening::open(path, alone, copies.as_ref(), crate::boot::id())?;
        room.provide_log();
        let (jobs, queue) = mpsc::channel(QUEUE);
        thread::Builder::new()
            .name("store".into())
            .spawn(move || serve(&db, room, queue))
            .expect("a thread can be started at start-up");
        Ok(Self { jobs, copies: copies.map(Arc::new), opening: Arc::new(opening) })
    }

    /// What was found when it was opened.
    pub fn opening(&self) -> &Opening {
        &self.opening
    }

    /// Writes the copies that are missing or old: of an earlier release's records, and of those that a
    /// crash or a full disk came between.
    pub async fn copy_missing(&self) -> Result<(), Error> {
        let uncopied = self.opening.uncopied.clone();
        let put_bundle = |id: String, of: fn(&Connection, &str) -> Result<_, Error>| {
            let then = Copies::put(id.clone());
            self.call_then(move |db| of(db, &id), then)
        };
        for id in uncopied.pods {
            put_bundle(id, copies::of_pod).await?;
        }
        for id in uncopied.containers {
            put_bundle(id, copies::of_container).await?;
        }
        for id in uncopied.images {
            let copy = self.call_then(
                move |db| copies::of_image(db, &id),
                |copies, copy: &Option<_>| {
                    if let Some(copy) = copy {
                        copies.put_image(copy);
                    }
                },
            );
            copy.await?;
        }
        Ok(())
    }

    /// Layers are verified now: it need not be done again.
    pub async fn verified(&self) -> Result<(), Error> {
        self.call(|db| Ok(db.execute("DELETE FROM about WHERE key = 'verify'", [])?))
            .await
            .map(drop)
    }

    /// The daemon has ended in order: what it knows is on disk.
    pub async fn end_clean(&self) -> Result<(), Error> {
        self.call(|db| Ok(migrate::set_about(db, "clean", "yes")?)).await
    }

    /// Jobs that wait.
    pub fn queued(&self) -> usize {
        self.jobs.max_capacity() - self.jobs.capacity()
    }

    /// Runs `job` in a transaction and returns its result after the commit. A job that fails is
    /// undone alone; others of its batch are not.
    pub async fn call<R, F>(&self, job: F) -> Result<R, Error>
    where
        R: Send + 'static,
        F: FnOnce(&Connection) -> Result<R, Error> + Send + 'static,
    {
        self.call_then(job, |_, _| {}).await
    }

    /// The same, and when the commit went well `then` brings the copies up to date, on the store's thread
    /// and before the result is handed out.
    async fn call_then<R, F, T>(&self, job: F, then: T) -> Result<R, Error>
    where
        R: Send + 'static,
        F: FnOnce(&Connection) -> Result<R, Error> + Send + 'static,
        T: FnOnce(&Copies, &R) + Send + 'static,
    {
        let copies = self.copies.clone();
        let (tx, rx) = oneshot::channel();
        let job: Job = Box::new(move |db| {
            let result = isolated(db, job);
            Box::new(move |commit| {
                let result = match commit {
                    None => result,
                    Some((code, text)) => Err(Error::Sql(rusqlite::Error::SqliteFailure(
                        code.unwrap_or_else(|| {
                            rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_IOERR)
                        }),
                        Some(text.clone()),
                    ))),
                };
                if let (Ok(result), Some(copies)) = (&result, &copies) {
                    then(copies, result);
                }
                // The caller may have been dropped; the work is done all the same.
                let _ = tx.send(result);
            })
        });
        self.jobs.send(job).await.map_err(|_| Error::Closed)?;
        rx.await.map_err(|_| Error::Closed)?
    }
}

fn isolated<R>(
    db: &Connection,
    job: impl FnOnce(&Connection) -> Result<R, Error>,
) -> Result<R, Error> {
    db.execute_batch("SAVEPOINT job")?;
    let result = job(db);
    match &result {
        Ok(_) => db.execute_batch("RELEASE job")?,
        Err(_) => db.execute_batch("ROLLBACK TO job; RELEASE job")?,
    }
    result
}

fn serve(db: &Connection, mut room: room::Room, mut queue: mpsc::Receiver<Job>) {
    let mut batch = Vec::with_capacity(BATCH);
    let counts = crate::metrics::counts();
    while queue.blocking_recv_many(&mut batch, BATCH) > 0 {
        room.look();
        let started = std::time::Instant::now();
        counts.store_jobs.inc_by(batch.len() as u64);
        let begun = db.execute_batch("BEGIN IMMEDIATE");
        let replies: Vec<Reply> = batch.drain(..).map(|job| job(db)).collect();
        let commit = begun.and_then(|()| db.execute_batch("COMMIT"));
        let failure = commit.err().map(|e| {
            // The transaction may still be open (a full disk): leave nothing of it behind.
            let _ = db.execute_batch("ROLLBACK");
            counts.store_commit_failures.inc();
            (e.sqlite_error().copied(), e.to_string())
        });
        counts.store_commits.inc();
        counts.store_commit_seconds.observe(started.elapsed().as_secs_f64());
        for reply in replies {
            reply(failure.as_ref());
        }
    }
}

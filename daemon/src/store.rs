//! Durable records: SQLite in WAL mode, one thread that owns the connection.
//!
//! Jobs that are waiting together are committed together, so that many pods that start at once
//! share one fsync. A job's result is handed out only after the commit that holds it: what a caller
//! has seen is on disk. Records hold *intent* (what should exist); bundles and shims hold fact.
//!
//! Owns the schema and its migrations. Each table's statements are in the module of its noun.

pub mod images;
pub mod pods;
mod room;

use std::{path::Path, thread};

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use crate::error::{Kind, Kinded};

/// Jobs that wait for the store's thread. A full queue makes callers wait; nothing is dropped.
const QUEUE: usize = 1024;

/// Most jobs that share a commit; bounds how long the first of them waits.
const BATCH: usize = 64;

/// Schema versions, oldest first; `PRAGMA user_version` counts those that were applied. A version
/// only ever adds, so that an older daemon can still read what a newer one wrote.
const MIGRATIONS: &[&str] =
    &[concat!(include_str!("store/pods.sql"), "\n", include_str!("store/images.sql"))];

/// Why the store did not do something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database file cannot be opened or brought to the current schema.
    #[error("open database {path}")]
    Open {
        /// Its path.
        path: std::path::PathBuf,
        /// Why.
        source: rusqlite::Error,
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
            Error::Open { .. } | Error::Sql(_) | Error::Record(..) => Kind::Internal,
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
}

impl Store {
    /// Opens or creates the database and brings its schema up to date.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_as(path, true)
    }

    /// The same beside another that is open: for tests, whose first daemon is not gone when the next
    /// one starts.
    #[cfg(test)]
    pub(crate) fn open_beside(path: &Path) -> Result<Self, Error> {
        Self::open_as(path, false)
    }

    fn open_as(path: &Path, alone: bool) -> Result<Self, Error> {
        let open = |source| Error::Open { path: path.to_owned(), source };
        let room = room::Room::new(path);
        private_file(path);
        let mut db = Connection::open(path).map_err(open)?;
        // One daemon has it, by the lock on the state directory. So the log's index is in our memory,
        // and not in a file that a full disk has no room for (sqlite.org/wal.html, "Use of WAL
        // Without Shared-Memory"). Before anything that opens the log.
        if alone {
            db.pragma_update(None, "locking_mode", "exclusive").map_err(open)?;
        }
        // WAL with FULL: one fsync of the log per commit, and a commit that returned survives a
        // power cut (sqlite.org/pragma.html#pragma_synchronous).
        db.pragma_update(None, "journal_mode", "wal").map_err(open)?;
        db.pragma_update(None, "synchronous", "full").map_err(open)?;
        db.pragma_update(None, "foreign_keys", true).map_err(open)?;
        migrate(&mut db).map_err(open)?;
        room::keep_log(&db).map_err(open)?;
        room.provide_log();
        let (jobs, queue) = mpsc::channel(QUEUE);
        thread::Builder::new()
            .name("store".into())
            .spawn(move || serve(&db, room, queue))
            .expect("a thread can be started at start-up");
        Ok(Self { jobs })
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

fn migrate(db: &mut Connection) -> Result<(), rusqlite::Error> {
    let done: usize =
        db.pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0))? as usize;
    for (index, sql) in MIGRATIONS.iter().enumerate().skip(done) {
        let tx = db.transaction()?;
        tx.execute_batch(sql)?;
        tx.pragma_update(None, "user_version", (index + 1) as i64)?;
        tx.commit()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failed_job_is_undone_alone_and_results_survive_a_reopen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let store = Store::open(&path).unwrap();
        store
            .call(|db| Ok(db.execute_batch("CREATE TABLE t (x INTEGER PRIMARY KEY)")?))
            .await
            .unwrap();
        let jobs = (0..50).map(|n| {
            let store = store.clone();
            tokio::spawn(async move {
                store
                    .call(move |db| {
                        db.execute("INSERT INTO t VALUES (?1)", [n / 2])?;
                        Ok(())
                    })
                    .await
                    .is_ok()
            })
        });
        let done = futures::future::join_all(jobs).await;
        assert_eq!(done.into_iter().filter(|r| *r.as_ref().unwrap()).count(), 25);
        drop(store);
        let store = Store::open(&path).unwrap();
        let count: i64 = store
            .call(|db| Ok(db.query_row("SELECT count(*) FROM t", [], |r| r.get(0))?))
            .await
            .unwrap();
        assert_eq!(count, 25);
    }
}

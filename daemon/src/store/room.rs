//! Room for records on a full disk: whoever frees space must be able to write down that it did.
//!
//! Two provisions, both made while there is space. The write-ahead log is given its blocks beforehand,
//! so that commits overwrite instead of growing it; what else may grow (the database at a checkpoint)
//! finds the blocks of a reserve file, which is given up when the file system is nearly full and made
//! again when it is not.

use std::{
    ffi::OsString,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use rustix::fs::FallocateFlags;
use tracing::{info, warn};

/// The log's size when SQLite copies it back into the database (1000 pages and their headers:
/// sqlite.org/wal.html "Automatic Checkpoint"), and some pages for the commit that goes beyond.
const LOG: u64 = 5 << 20;

/// Size of the reserve.
const RESERVE: u64 = 8 << 20;

/// Below this much free space the reserve is given up.
const LOW: u64 = 2 << 20;

/// Above this much it is made again; well above [`LOW`] plus what it takes itself.
const ENOUGH: u64 = 64 << 20;

/// See the module.
pub(super) struct Room {
    reserve: PathBuf,
    log: PathBuf,
    held: bool,
}

impl Room {
    /// For the database at `path`. Gives up the reserve of an earlier daemon if the disk is full, so
    /// that the database can be opened.
    pub(super) fn new(path: &Path) -> Self {
        let beside = |suffix: &str| {
            let mut name = OsString::from(path);
            name.push(suffix);
            PathBuf::from(name)
        };
        let mut room = Self { reserve: beside(".reserve"), log: beside("-wal"), held: false };
        room.held = fs::metadata(&room.reserve).is_ok_and(|meta| meta.len() >= RESERVE);
        room.look();
        room
    }

    /// Gives the log its blocks. Where the file system cannot do that, or has not as many, the log
    /// grows as it needs.
    pub(super) fn provide_log(&self) {
        let Ok(log) = fs::File::options().write(true).open(&self.log) else { return };
        if log.metadata().is_ok_and(|meta| meta.len() < LOG) {
            // What is beyond the last frame is no frame to SQLite: its checksum does not fit.
            let _ = rustix::fs::fallocate(&log, FallocateFlags::empty(), 0, LOG);
        }
    }

    /// Called before each commit: holds the reserve while there is space, gives it up when not.
    pub(super) fn look(&mut self) {
        let dir = self.reserve.parent().unwrap_or(Path::new("/"));
        let Ok(stat) = rustix::fs::statvfs(dir) else { return };
        // Available to anybody: ext4 counts blocks as free that it keeps for itself.
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if self.held && free < LOW {
            match fs::remove_file(&self.reserve) {
                Ok(()) => warn!(
                    free,
                    "the disk is full: the space kept back for records is used now; free some"
                ),
                Err(error) => warn!(%error, "the disk is full, and the reserve cannot be removed"),
            }
            self.held = false;
        } else if !self.held && free > ENOUGH {
            match self.hold() {
                Ok(()) => self.held = true,
                // Tried again with the next commit, and there is space anyway.
                Err(error) => {
                    let _ = fs::remove_file(&self.reserve);
                    info!(%error, "no space is kept back for records");
                }
            }
        }
    }

    fn hold(&self) -> io::Result<()> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let mut options = fs::File::options();
        let mut file =
            options.write(true).create(true).truncate(true).mode(0o600).open(&self.reserve)?;
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, RESERVE) {
            Ok(()) => Ok(()),
            // Written out where there is no such call.
            Err(rustix::io::Errno::OPNOTSUPP) => {
                let zeros = vec![0; 1 << 20];
                for _ in 0..RESERVE >> 20 {
                    file.write_all(&zeros)?;
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Leaves the log's file, and with it its blocks, when the database is closed: the next daemon may find
/// no others.
#[expect(unsafe_code, reason = "sqlite3_file_control")]
pub(super) fn keep_log(db: &rusqlite::Connection) -> Result<(), rusqlite::Error> {
    use rusqlite::ffi;
    let mut keep: std::ffi::c_int = 1;
    // SAFETY: the handle is open while `db` lives, no name means its main database, and the argument
    // of this request is an int that outlives the call.
    let code = unsafe {
        ffi::sqlite3_file_control(
            db.handle(),
            std::ptr::null(),
            ffi::SQLITE_FCNTL_PERSIST_WAL,
            (&raw mut keep).cast(),
        )
    };
    match code {
        ffi::SQLITE_OK => Ok(()),
        code => Err(rusqlite::Error::SqliteFailure(ffi::Error::new(code), None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    #[tokio::test]
    async fn a_log_with_room_is_no_matter_to_who_opens_it_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let store = Store::open(&path).unwrap();
        store.call(|db| Ok(db.execute_batch("CREATE TABLE t (x)")?)).await.unwrap();
        let log = fs::metadata(dir.path().join("db-wal")).unwrap().len();
        assert!(log >= LOG, "{log}");
        // As a daemon that is killed leaves it: the log as it is.
        let copy = dir.path().join("copy");
        fs::copy(&path, &copy).unwrap();
        fs::copy(dir.path().join("db-wal"), dir.path().join("copy-wal")).unwrap();
        let copy = Store::open(&copy).unwrap();
        copy.call(|db| Ok(db.execute_batch("INSERT INTO t VALUES (1)")?)).await.unwrap();
        // And no commit makes it longer.
        for _ in 0..50 {
            store.call(|db| Ok(db.execute_batch("INSERT INTO t VALUES (1)")?)).await.unwrap();
        }
        assert_eq!(fs::metadata(dir.path().join("db-wal")).unwrap().len(), log);
        // No other file is needed, and it stays when the database is closed in order.
        assert!(!dir.path().join("db-shm").exists());
        drop(store);
        let store = Store::open(&path).unwrap();
        let count: i64 = store
            .call(|db| Ok(db.query_row("SELECT count(*) FROM t", [], |row| row.get(0))?))
            .await
            .unwrap();
        assert_eq!(count, 50);
        assert_eq!(fs::metadata(dir.path().join("db-wal")).unwrap().len(), log);
    }
}

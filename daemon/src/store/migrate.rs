//! The schema's versions, upwards and downwards.
//!
//! `PRAGMA user_version` counts the migrations that were applied. A migration only adds: tables, indexes,
//! columns with a default. So a daemon of an earlier release can go on with the database of a later one:
//! it reads and writes what it knows and leaves the rest as it is. Should a change ever be one that older
//! daemons must not write past, its migration says from which version on they may, and the database keeps
//! that number (`compatible_down_to`): a daemon that is older still refuses, and changes nothing.
//!
//! Documents in columns follow the same rule: fields are only added, each with a default. Those that a
//! daemon does not know survive its writes if they are at the top of a record (`unknown` in pods.rs and
//! images.rs); that is where a field belongs that a downgrade must not lose. A record that a daemon cannot
//! read at all is left alone, and so is what it is of.

use rusqlite::{Connection, OptionalExtension as _, params};

/// One step.
pub(super) struct Migration {
    pub(super) sql: &'static str,
    /// The oldest schema version whose daemons may use a database that has it.
    pub(super) compatible_down_to: i64,
}

/// All of them, oldest first. Never change one that was released.
pub(super) const MIGRATIONS: &[Migration] = &[
    Migration {
        sql: concat!(include_str!("pods.sql"), "\n", include_str!("images.sql")),
        compatible_down_to: 1,
    },
    Migration { sql: include_str!("revisions.sql"), compatible_down_to: 1 },
];

/// The version that this daemon writes.
pub(super) const fn version() -> i64 {
    MIGRATIONS.len() as i64
}

/// What keeps a database from being used.
#[derive(Debug)]
pub(super) enum Unusable {
    /// A later release wrote it, and allows only versions from `oldest` on.
    Newer { found: i64, oldest: i64 },
    /// It is no database of ours.
    Strange(&'static str),
    /// SQLite says so.
    Sql(rusqlite::Error),
}

impl From<rusqlite::Error> for Unusable {
    fn from(error: rusqlite::Error) -> Self {
        Unusable::Sql(error)
    }
}

/// The version that the database has.
pub(super) fn found(db: &Connection) -> Result<i64, rusqlite::Error> {
    db.pragma_query_value(None, "user_version", |row| row.get(0))
}

/// A value of the table `about`.
pub(super) fn about(db: &Connection, key: &str) -> Result<Option<String>, rusqlite::Error> {
    db.query_row("SELECT value FROM about WHERE key = ?1", [key], |row| row.get(0)).optional()
}

/// Sets a value of the table `about`.
pub(super) fn set_about(db: &Connection, key: &str, value: &str) -> Result<(), rusqlite::Error> {
    db.execute(
        "INSERT INTO about (key, value) VALUES (?1, ?2)
         ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        params![key, value],
    )?;
    Ok(())
}

fn has_table(db: &Connection, name: &str) -> Result<bool, rusqlite::Error> {
    let sql = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?1)";
    db.query_row(sql, [name], |row| row.get(0))
}

/// Brings a database up to date, or finds out that it cannot be used. A later one that may be used stays
/// as it is.
pub(super) fn migrate(db: &mut Connection, migrations: &[Migration]) -> Result<(), Unusable> {
    let known = migrations.len() as i64;
    let done = found(db)?;
    if done > known {
        if !has_table(db, "pods")? {
            return Err(Unusable::Strange("it has no table of pods"));
        }
        let oldest = match has_table(db, "about")? {
            true => about(db, "compatible_down_to")?.and_then(|text| text.parse().ok()),
            false => None,
        };
        let oldest = oldest.unwrap_or(done);
        return if oldest <= known { Ok(()) } else { Err(Unusable::Newer { found: done, oldest }) };
    }
    let any: bool =
        db.query_row("SELECT EXISTS (SELECT 1 FROM sqlite_schema)", [], |row| row.get(0))?;
    match (done, any) {
        (0, true) => return Err(Unusable::Strange("it is of another program")),
        (1.., false) => return Err(Unusable::Strange("it has no tables")),
        _ => {}
    }
    for (index, migration) in migrations.iter().enumerate().skip(done.max(0) as usize) {
        let tx = db.transaction()?;
        tx.execute_batch(migration.sql)?;
        if has_table(&tx, "about")? {
            set_about(&tx, "compatible_down_to", &migration.compatible_down_to.to_string())?;
        }
        tx.pragma_update(None, "user_version", (index + 1) as i64)?;
        tx.commit()?;
    }
    Ok(())
}

-- What the daemon knows of the database itself: `compatible_down_to` (migrate.rs), `boot`, `clean` and
-- `verify` (opening.rs).
CREATE TABLE about (
    key     TEXT PRIMARY KEY,
    value   TEXT NOT NULL
) STRICT, WITHOUT ROWID;
-- Counts the writes of a record, so that it and its copy outside of the database can be compared
-- (copies.rs). Of images it is counted over all of them.
ALTER TABLE pods ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
ALTER TABLE containers ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
ALTER TABLE images ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
-- Images whose record is gone: their copy must go too, also if a daemon of before this version, which knows
-- no copies, has removed the record.
CREATE TABLE removed_images (
    id      TEXT PRIMARY KEY
) STRICT, WITHOUT ROWID;
CREATE TRIGGER image_removed AFTER DELETE ON images BEGIN
    INSERT OR REPLACE INTO removed_images (id) VALUES (old.id);
END;
CREATE TRIGGER image_added AFTER INSERT ON images BEGIN
    DELETE FROM removed_images WHERE id = new.id;
END;

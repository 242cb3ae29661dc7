-- An unpacked layer is the directory layers/<number>. Its row is written after its content is on
-- disk, together with the image that needs it, and goes when neither image nor snapshot does.
CREATE TABLE layers (
    number      INTEGER PRIMARY KEY,
    diff_id     TEXT NOT NULL,
    -- '': good on any layers below; else the chain id of those it was fitted to.
    chain       TEXT NOT NULL,
    bytes       INTEGER NOT NULL,
    inodes      INTEGER NOT NULL,
    root_listed INTEGER NOT NULL
) STRICT;
-- `record` is a JSON document (images.rs); manifest and config are as the registry sent them.
CREATE TABLE images (
    id          TEXT PRIMARY KEY,
    record      TEXT NOT NULL,
    manifest    BLOB NOT NULL,
    config      BLOB NOT NULL
) STRICT;
CREATE TABLE image_layers (
    image       TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    -- From the bottom, 0.
    position    INTEGER NOT NULL,
    layer       INTEGER NOT NULL REFERENCES layers (number),
    PRIMARY KEY (image, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX image_layers_by_layer ON image_layers (layer);
-- Tag and digest references, normalised.
CREATE TABLE image_names (
    name        TEXT PRIMARY KEY,
    image       TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    -- What the registry said the name stands for: digest of an index or a manifest; '': unknown.
    target      TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX image_names_by_image ON image_names (image);
-- A container's writable layer is the directory snapshots/<container>. The row comes before it.
-- A row <container>/<mount> has no directory: it keeps the layers of an image that the container
-- mounts.
CREATE TABLE snapshots (
    container   TEXT PRIMARY KEY,
    image       TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE snapshot_layers (
    container   TEXT NOT NULL REFERENCES snapshots (container) ON DELETE CASCADE,
    position    INTEGER NOT NULL,
    layer       INTEGER NOT NULL REFERENCES layers (number),
    PRIMARY KEY (container, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX snapshot_layers_by_layer ON snapshot_layers (layer);

-- A pod's record is one JSON document (pods.rs); the columns are what is searched for.
CREATE TABLE pods (
    id      TEXT PRIMARY KEY,
    record  TEXT NOT NULL
) STRICT;
CREATE TABLE containers (
    id      TEXT PRIMARY KEY,
    pod     TEXT NOT NULL,
    record  TEXT NOT NULL
) STRICT;
CREATE INDEX containers_of_pod ON containers (pod);

//! Checkpoints of containers: what the files are, and whether this node can make them. Knows no pods.
//!
//! - [`archive`]: the tar archive that CRI-O, containerd, Podman and checkpointctl exchange, read and
//!   written.
//! - [`criu`]: whether criu, kernel and OCI runtime can do it.

pub mod archive;
pub mod criu;

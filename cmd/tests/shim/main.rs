//! The real shim binary with real OCI runtimes. Needs root, runc, crun and busybox-static.

mod costs;
mod faults;
mod hybrid;
mod main_path;
mod node;
mod streams;

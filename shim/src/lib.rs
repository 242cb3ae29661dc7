//! Both ends of the shim wire: the process that owns one pod, and the daemon's typed way to it.
//!
//! The wire is containerd's shim-v2 contract (ttrpc: Task v2 and v3, Sandbox v1, Events), so that
//! either end can be replaced by a foreign one. What our pair can do beyond the contract travels in
//! the contract's own extension points ([`options`]) or over a private socket ([`control`]).
//!
//! - feature `client`: [`client`], [`events`] and [`control::Control`], used by the daemon;
//! - feature `server`: everything behind the `containerd-shim-holdfast-v2` binary, entered by
//!   `command_line::main`.
//!
//! Both ends agree on [`bundle`], [`options`], [`control`] and [`cgroup`].

pub mod bundle;
pub mod cgroup;
pub mod control;
pub mod options;
pub mod timestamp;

#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "client")]
pub mod events;

//mod bootstrap;
//pub mod command_line;
//mod log;
//mod mounts;
//mod namespaces;
//mod pod;
//mod pod_init;
//mod process;
//mod publish;
//mod runtime;
//mod server;
//mod stdio;

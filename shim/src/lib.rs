//! Both ends of the shim wire: the process that owns one pod, and the daemon's typed way to it.
//!
//! The wire is containerd's shim-v2 contract (ttrpc: Task v2 and v3, Sandbox v1, Events), so that
//! either end can be replaced by a foreign one. What our pair can do beyond the contract travels in
//! the contract's own extension points ([`options`]) or over a private socket ([`control`]).
//!
//! - feature `client`: [`client`], [`events`] and `control::Control`, used by the daemon;
//! - feature `server`: everything behind the `containerd-shim-holdfast-v2` binary, entered by
//!   [`command_line::main`].
//!
//! Without our daemon the client is enough: [`client::Command`] starts a shim of anybody's,
//! [`client::Client`] drives it, [`events::serve`] is what it reports to. `examples/orchestrator.rs` runs
//! a pod that way.
//!
//! Both ends agree on [`bundle`], [`options`], [`control`] and [`cgroup`].

#![warn(missing_docs)]

pub mod bundle;
pub mod cgroup;
pub mod control;
pub mod crash;
mod fds;
pub mod mount_attr;
pub mod options;
pub mod stat;
pub mod timestamp;

#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "client")]
pub mod events;

#[cfg(feature = "server")]
mod bootstrap;
#[cfg(feature = "server")]
pub mod command_line;
#[cfg(feature = "server")]
mod criu;
#[cfg(all(test, feature = "server"))]
mod golden;
#[cfg(feature = "server")]
mod handover;
#[cfg(feature = "server")]
mod kubernetes;
#[cfg(feature = "server")]
mod log;
#[cfg(feature = "server")]
mod mapped;
#[cfg(feature = "server")]
mod memory;
#[cfg(feature = "server")]
mod mounts;
#[cfg(feature = "server")]
mod namespaces;
#[cfg(feature = "server")]
mod pod;
#[cfg(feature = "server")]
mod pod_init;
#[cfg(feature = "server")]
mod process;
#[cfg(feature = "server")]
mod publish;
#[cfg(feature = "server")]
mod relay;
#[cfg(feature = "server")]
mod runtime;
#[cfg(feature = "server")]
mod server;
#[cfg(feature = "server")]
mod stdio;
#[cfg(feature = "server")]
mod unfinished;

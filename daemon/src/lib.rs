//! Everything behind the CRI socket.

pub mod config;
pub mod cri;
pub mod error;
pub mod id;
pub mod image;
pub mod network;
pub mod node;
pub mod pod;
pub mod spec;
pub mod store;
pub mod streaming;

//! What the binaries in `src/bin` do, in a library so that it can be tested. Nothing else uses it.

#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "daemon")]
pub mod daemon;

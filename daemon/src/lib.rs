//! Everything behind the CRI socket.

pub mod config;
pub mod cri;
pub mod error;
pub mod id;
pub mod image;
pub mod network;
pub mod pod;
pub mod spec;
pub mod store;
pub mod streaming;

/// Serves until `shutdown` is ready.
pub async fn run(
    config: config::Config,
    shutdown: impl Future<Output = ()>,
) -> Result<(), std::io::Error> {
    let _ = config;
    shutdown.await;
    Ok(())
}

//! An NRI plugin that does what a test tells it: see `holdfast_integration::nri`.

use anyhow::Result;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    holdfast_integration::nri::run(&args).await
}

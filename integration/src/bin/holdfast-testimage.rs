//! Makes busybox images from Debian's `busybox-static` and puts them where a runtime can take them from,
//! without any other tool. For the quickstart and for trying things by hand.
//!
//! ```text
//! holdfast-testimage push   HOST:PORT/REPOSITORY:TAG [OPTION...]
//! holdfast-testimage oci    NAME FILE                [OPTION...]
//! holdfast-testimage docker NAME FILE                [OPTION...]
//!   --layers N          N more layers of random bytes (default 0)
//!   --layer-size BYTES  size of each of those (default 1048576)
//!   --compression C     gzip, zstd or plain (default gzip)
//! ```

use std::{env, fs, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use holdfast_integration::{
    Image,
    image::{Builder, Compression},
    registry::Remote,
};

const USAGE: &str = "usage: holdfast-testimage push HOST:PORT/REPOSITORY:TAG | oci NAME FILE | docker NAME FILE \
                     [--layers N] [--layer-size BYTES] [--compression gzip|zstd|plain]";

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(env::args().skip(1).collect()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("holdfast-testimage: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Vec<String>) -> Result<()> {
    let (plain, image) = parse(args)?;
    let words: Vec<&str> = plain.iter().map(String::as_str).collect();
    match words[..] {
        ["push", reference] => {
            let (host, name) = reference.split_once('/').context(USAGE)?;
            let image = image.build()?;
            println!("{}", Remote::new(host).push(name, &image).await?);
        }
        ["oci", name, file] => fs::write(file, image.build()?.oci_archive(name))?,
        ["docker", name, file] => fs::write(file, image.build()?.docker_archive(name)?)?,
        _ => bail!(USAGE),
    }
    Ok(())
}

/// The words that are no options, and the image that the options describe.
fn parse(args: Vec<String>) -> Result<(Vec<String>, Builder)> {
    let mut plain = Vec::new();
    let (mut layers, mut size, mut compression) = (0, 1 << 20, Compression::Gzip);
    let mut args = args.into_iter();
    while let Some(word) = args.next() {
        let mut value = || args.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--layers" => layers = value()?.parse().context("--layers")?,
            "--layer-size" => size = value()?.parse().context("--layer-size")?,
            "--compression" => {
                compression = match value()?.as_str() {
                    "gzip" => Compression::Gzip,
                    "zstd" => Compression::Zstd,
                    "plain" => Compression::Plain,
                    other => bail!("compression {other:?} is not gzip, zstd or plain"),
                }
            }
            option if option.starts_with('-') => bail!("option {option} is not known; {USAGE}"),
            _ => plain.push(word),
        }
    }
    Ok((plain, Image::busybox_with(compression)?.random_layers(layers, size)))
}

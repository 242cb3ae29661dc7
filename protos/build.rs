//! Compiles our `.proto` files with a parser written in Rust, so that no `protoc` is needed.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for (feature, file) in
        [("CRI", "cri.proto"), ("ADMIN", "admin.proto"), ("ADMIN", "images.proto")]
    {
        println!("cargo:rerun-if-changed=proto/{file}");
        if env::var_os(format!("CARGO_FEATURE_{feature}")).is_none() {
            continue;
        }
        let set = protox::compile([file], ["proto"])?;
        // The descriptor is kept for reflection: the CLI prints CRI messages as proto3 JSON, and
        // a test compares it with the interface's published table.
        fs::write(out.join(format!("{file}.bin")), set.encode_to_vec())?;
        tonic_prost_build::configure().compile_fds(set)?;
    }
    Ok(())
}

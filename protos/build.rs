//! Compiles our `.proto` files with a parser written in Rust, so that no `protoc` is needed.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for (feature, file) in [
        ("CRI", "cri.proto"),
        ("ADMIN", "admin.proto"),
        ("ADMIN", "images.proto"),
        ("NRI", "nri.proto"),
    ] {
        println!("cargo:rerun-if-changed=proto/{file}");
        if env::var_os(format!("CARGO_FEATURE_{feature}")).is_none() {
            continue;
        }
        let set = protox::compile([file], ["proto"])?;
        // The descriptor is kept for reflection: the CLI prints CRI messages as proto3 JSON, and
        // a test compares it with the interface's published table.
        fs::write(out.join(format!("{file}.bin")), set.encode_to_vec())?;
        let build = match feature {
            // Spoken over ttrpc, so only the messages are wanted. Maps are sorted, so that what is
            // sent and shown of them is the same each time.
            "NRI" => tonic_prost_build::configure()
                .build_client(false)
                .build_server(false)
                .btree_map("."),
            _ => tonic_prost_build::configure(),
        };
        build.compile_fds(set)?;
    }
    println!("cargo:rerun-if-changed=proto/containerd");
    if env::var_os("CARGO_FEATURE_CONTAINERD").is_some() {
        let files = ["version", "containers", "tasks"].map(|f| format!("containerd/{f}.proto"));
        tonic_prost_build::configure().compile_fds(protox::compile(files, ["proto"])?)?;
    }
    Ok(())
}

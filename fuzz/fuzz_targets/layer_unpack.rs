#![no_main]
//! The whole way of a layer, as root, in a directory of its own: what is an error as a directory is the
//! same error as an image, nothing is made outside, and the archive can be made again.

use std::{
    fs::File,
    io::Read as _,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use holdfast_daemon::{
    id::Digest,
    image::{
        recipe::{Content, Rebuilt, Recorder},
        tree, unpack,
    },
};
use libfuzzer_sys::fuzz_target;
use sha2::{Digest as _, Sha256};

static SCRATCH: OnceLock<PathBuf> = OnceLock::new();

fn scratch() -> &'static Path {
    SCRATCH.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("holdfast-fuzz-{}", std::process::id()));
        std::fs::create_dir(&path).expect("a scratch directory");
        path
    })
}

/// Makes the checksums of headers right, without which nearly nothing would be looked at.
fn repaired(data: &[u8]) -> Vec<u8> {
    let mut data = data.to_vec();
    for block in data.as_chunks_mut::<512>().0 {
        if &block[257..262] == b"ustar" {
            block[148..156].copy_from_slice(b"        ");
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    data
}

fuzz_target!(|data: &[u8]| {
    let data = &repaired(data)[..];
    let top = scratch();
    let path = |name: &str| top.join(name);
    for name in ["layer", "image", "recipe", "image-recipe"] {
        tree::remove(&path(name)).expect("the scratch directory is ours");
    }
    std::fs::create_dir(path("layer")).unwrap();
    let root = unpack::open_root(&path("layer")).unwrap();
    let recorder = Recorder::create(&path("recipe")).unwrap();
    let directory = unpack::unpack(data, root.as_fd(), Some(recorder));
    let recorder = Recorder::create(&path("image-recipe")).unwrap();
    let image = unpack::unpack_image(data, &path("image"), Some(recorder));
    let names = std::fs::read_dir(top).unwrap().count();
    assert!(names <= 4, "something is outside the layer");
    match (directory, image) {
        (Ok(directory), Ok(image)) => {
            assert_eq!(directory.implied, image.implied);
            let want = Digest::from_sha256(Sha256::digest(data).into());
            directory.finish_recipe().unwrap();
            same(Rebuilt::open(Content::Directory(root), &path("recipe"), &want), data);
            let (writer, tree) = image.image.expect("it is an image");
            if writer.finish(&tree).is_ok() {
                let file = File::open(path("image")).unwrap();
                same(Rebuilt::open(Content::Image(file), &path("image-recipe"), &want), data);
            }
        }
        (Err(directory), Err(image)) => {
            // What the file system refuses it says in its own words.
            if !matches!(directory, unpack::Error::Write { .. }) {
                assert_eq!(directory.to_string(), image.to_string());
            }
        }
        (Err(unpack::Error::Write { .. }), Ok(_)) | (Ok(_), Err(unpack::Error::Write { .. })) => {}
        (directory, image) => panic!("{:?} and {:?}", directory.err(), image.err()),
    }
});

fn same(rebuilt: Result<Rebuilt, holdfast_daemon::image::recipe::Error>, data: &[u8]) {
    let mut again = Vec::new();
    rebuilt.unwrap().read_to_end(&mut again).unwrap();
    assert!(again == data, "another archive came back");
}

#![no_main]
//! The reader of layers' archives: it ends, with an error or without.

use holdfast_daemon::image::tar::{Archive, Error};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // A small buffer cuts headers and data at odd places.
    let mut archive = Archive::new(std::io::BufReader::with_capacity(700, data));
    while let Ok(Some(entry)) = archive.entry() {
        let mut left = entry.size;
        while let Ok(true) = archive.data(left, |data| -> Result<usize, Error> {
            left -= data.len() as u64;
            Ok(data.len())
        }) {}
    }
});

//! Any bytes as a SPDY client's: the frame decoder and the header decompressor must not panic.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| holdfast_streaming::fuzzing::spdy_frames(data));

//! Any bytes as an NRI plugin's: frames, messages and envelopes must not panic, nor pile up.
#![no_main]

use holdfast_daemon::nri::wire::{Decoder, Request, Response};
use prost::Message as _;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut decoder = Decoder::default();
    // In two pieces, at a place that the bytes choose.
    let at = data.first().map_or(0, |byte| usize::from(*byte).min(data.len()));
    let (first, second) = data.split_at(at);
    for piece in [first, second] {
        let fed = decoder.feed(piece, |_channel, message| {
            let _ = Request::decode(&message.data[..]);
            let _ = Response::decode(&message.data[..]);
        });
        if fed.is_err() {
            return;
        }
    }
});

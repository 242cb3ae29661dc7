//! Any bytes as a WebSocket client's: messages and the channels in them must not panic.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| holdfast_streaming::fuzzing::websocket_messages(data));

//! SPDY/3.1, the server's side: what Kubernetes' clients still speak to a runtime.
//!
//! `frame` and `header` are pure, `flow` keeps the windows, `session` joins them to a connection.
//! Source: the SPDY/3.1 draft of the Chromium project. No crate of it exists (docs/adr/0006).

pub(crate) mod flow;
pub(crate) mod frame;
pub(crate) mod header;
mod session;

pub(crate) use session::{Session, Stream};

/// Feeds any bytes to the frame decoder and the header decompressor.
#[cfg(feature = "fuzzing")]
pub fn fuzz_frames(data: &[u8]) {
    let mut decoder = frame::Decoder::new();
    let mut inflater = header::Inflater::new();
    let mut buffer = bytes::BytesMut::from(data);
    while let Ok(Some(frame)) = decoder.next(&mut buffer) {
        let (frame::Frame::SynStream { block, .. } | frame::Frame::OtherHeaders { block }) = frame
        else {
            continue;
        };
        if inflater.headers(&block).is_err() {
            return;
        }
    }
}

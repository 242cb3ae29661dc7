//! SPDY/3.1 frames: bytes to [`Frame`], and the few frames we send to bytes. Pure.
//!
//! DATA frames are passed on in the pieces in which they arrive, so that a frame of 16 MiB needs no
//! buffer of 16 MiB. Control frames are small, and larger ones than [`MAX_CONTROL`] are refused.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The largest control frame that is taken. Those of real clients have some hundred bytes.
pub(crate) const MAX_CONTROL: usize = 64 * 1024;
const VERSION: u16 = 3;
const FIN: u8 = 1;
/// SETTINGS: the initial window of streams.
const INITIAL_WINDOW_SIZE: u32 = 7;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

/// A frame of the peer, or a piece of a DATA frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// `fin` only with the last piece; a piece may be empty.
    Data {
        stream: u32,
        payload: Bytes,
        fin: bool,
    },
    SynStream {
        stream: u32,
        fin: bool,
        unidirectional: bool,
        block: Bytes,
    },
    /// SYN_REPLY or HEADERS: nothing in it is of interest, but the decompressor must see its block.
    OtherHeaders {
        block: Bytes,
    },
    RstStream {
        stream: u32,
    },
    Settings {
        initial_window: Option<u32>,
    },
    Ping {
        id: u32,
    },
    GoAway,
    /// Stream 0 is the session.
    WindowUpdate {
        stream: u32,
        delta: u32,
    },
    /// A control frame of unknown type, which the specification says to ignore.
    Unknown {
        kind: u16,
    },
}

/// Why a session cannot go on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("control frame of SPDY version {0}, not 3")]
    Version(u16),
    #[error("control frame of {0} bytes, more than {MAX_CONTROL}")]
    TooLarge(usize),
    #[error("frame type {kind} of {length} bytes, which it cannot have")]
    Length { kind: u16, length: usize },
    #[error("data on stream 0")]
    DataOnSession,
}

/// Status of RST_STREAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reset {
    InvalidStream = 2,
    Refused = 3,
    Cancel = 5,
    FlowControl = 7,
    AlreadyClosed = 9,
}

/// Status of GOAWAY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Away {
    Ok = 0,
    Protocol = 1,
}

/// Splits what arrives into frames.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    /// The DATA frame that is under way: stream, bytes to come, whether it ends the stream.
    data: Option<(u32, usize, bool)>,
}

impl Decoder {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// The next frame or piece in `buffer`, or `None` when more bytes are needed.
    pub(crate) fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        if let Some((stream, left, fin)) = self.data.take() {
            if buffer.is_empty() {
                self.data = Some((stream, left, fin));
                return Ok(None);
            }
            return Ok(Some(self.piece(buffer, stream, left, fin)));
        }
        let Some(head) = buffer.first_chunk::<8>() else { return Ok(None) };
        let word = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let flags = head[4];
        let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
        if word >> 31 == 0 {
            if word == 0 {
                return Err(FrameError::DataOnSession);
            }
            buffer.advance(8);
            if buffer.is_empty() && length > 0 {
                self.data = Some((word, length, flags & FIN != 0));
                return Ok(None);
            }
            return Ok(Some(self.piece(buffer, word, length, flags & FIN != 0)));
        }
        let (version, kind) = ((word >> 16) as u16 & 0x7fff, word as u16);
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        if length > MAX_CONTROL {
            return Err(FrameError::TooLarge(length));
        }
        if buffer.len() < 8 + length {
            return Ok(None);
        }
        buffer.advance(8);
        control(kind, flags, buffer.split_to(length).freeze()).map(Some)
    }

    fn piece(&mut self, buffer: &mut BytesMut, stream: u32, left: usize, fin: bool) -> Frame {
        let payload = buffer.split_to(left.min(buffer.len())).freeze();
        let left = left - payload.len();
        if left > 0 {
            self.data = Some((stream, left, fin));
        }
        Frame::Data { stream, payload, fin: fin && left == 0 }
    }
}

fn control(kind: u16, flags: u8, mut body: Bytes) -> Result<Frame, FrameError> {
    let wrong = FrameError::Length { kind, length: body.len() };
    let id = |body: &mut Bytes| body.get_u32() & 0x7fff_ffff;
    let frame = match kind {
        SYN_STREAM if body.len() >= 10 => {
            let stream = id(&mut body);
            // The associated stream, the priority and the credential slot mean nothing here.
            body.advance(6);
            Frame::SynStream {
                stream,
                fin: flags & FIN != 0,
                unidirectional: flags & 2 != 0,
                block: body,
            }
        }
        SYN_REPLY | HEADERS if body.len() >= 4 => {
            body.advance(4);
            Frame::OtherHeaders { block: body }
        }
        RST_STREAM if body.len() == 8 => Frame::RstStream { stream: id(&mut body) },
        SETTINGS if body.len() >= 4 => {
            let count = body.get_u32() as usize;
            if body.len() != count.saturating_mul(8) {
                return Err(wrong);
            }
            let mut initial_window = None;
            while body.has_remaining() {
                let (key, value) = (body.get_u32() & 0x00ff_ffff, body.get_u32());
                if key == INITIAL_WINDOW_SIZE {
                    initial_window = Some(value & 0x7fff_ffff);
                }
            }
            Frame::Settings { initial_window }
        }
        PING if body.len() == 4 => Frame::Ping { id: body.get_u32() },
        GOAWAY if body.len() == 8 => Frame::GoAway,
        WINDOW_UPDATE if body.len() == 8 => {
            Frame::WindowUpdate { stream: id(&mut body), delta: id(&mut body) }
        }
        SYN_STREAM | SYN_REPLY | HEADERS | RST_STREAM | SETTINGS | PING | GOAWAY
        | WINDOW_UPDATE => {
            return Err(wrong);
        }
        kind => Frame::Unknown { kind },
    };
    Ok(frame)
}

fn head(into: &mut BytesMut, kind: u16, length: usize) {
    into.put_u16(0x8000 | VERSION);
    into.put_u16(kind);
    into.put_u32(length as u32);
}

pub(crate) fn syn_reply(into: &mut BytesMut, stream: u32, block: &[u8]) {
    head(into, SYN_REPLY, 4 + block.len());
    into.put_u32(stream);
    into.put_slice(block);
}

pub(crate) fn rst_stream(into: &mut BytesMut, stream: u32, status: Reset) {
    head(into, RST_STREAM, 8);
    into.put_u32(stream);
    into.put_u32(status as u32);
}

pub(crate) fn ping(into: &mut BytesMut, id: u32) {
    head(into, PING, 4);
    into.put_u32(id);
}

pub(crate) fn goaway(into: &mut BytesMut, last_stream: u32, status: Away) {
    head(into, GOAWAY, 8);
    into.put_u32(last_stream);
    into.put_u32(status as u32);
}

pub(crate) fn window_update(into: &mut BytesMut, stream: u32, delta: u32) {
    head(into, WINDOW_UPDATE, 8);
    into.put_u32(stream);
    into.put_u32(delta);
}

/// The empty DATA frame that ends our direction.
pub(crate) fn fin(into: &mut BytesMut, stream: u32) {
    into.put_u32(stream);
    into.put_u32(u32::from(FIN) << 24);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(bytes: &[u8], cuts: &[usize]) -> Result<Vec<Frame>, FrameError> {
        let (mut decoder, mut buffer, mut frames) = (Decoder::new(), BytesMut::new(), Vec::new());
        let mut rest = bytes;
        for cut in cuts.iter().copied().chain([usize::MAX]) {
            let (now, later) = rest.split_at(cut.min(rest.len()));
            buffer.extend_from_slice(now);
            rest = later;
            while let Some(frame) = decoder.next(&mut buffer)? {
                frames.push(frame);
            }
        }
        Ok(frames)
    }

    /// Pieces of one DATA frame put together again, so that the way of cutting cannot be seen.
    fn joined(frames: Vec<Frame>) -> Vec<Frame> {
        let mut whole: Vec<Frame> = Vec::new();
        for frame in frames {
            if let (
                Some(Frame::Data { stream, payload, fin: fin @ false }),
                Frame::Data { stream: next, payload: more, fin: end },
            ) = (whole.last_mut(), &frame)
                && stream == next
            {
                *payload = [&payload[..], &more[..]].concat().into();
                *fin = *end;
                continue;
            }
            whole.push(frame);
        }
        whole
    }

    #[test]
    fn frames_as_the_specification_draws_them() {
        let syn = [
            &[0x80, 3, 0, 1, 0x01, 0, 0, 12][..], // version 3, SYN_STREAM, FIN, 12 bytes
            &[0, 0, 0, 5, 0, 0, 0, 0, 0x40, 0],   // stream 5, no parent, priority 2
            &[0xaa, 0xbb],
        ]
        .concat();
        let expected = Frame::SynStream {
            stream: 5,
            fin: true,
            unidirectional: false,
            block: Bytes::from_static(&[0xaa, 0xbb]),
        };
        assert_eq!(all(&syn, &[]), Ok(vec![expected]));
        let cases: [(&[u8], Frame); 6] = [
            (&[0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, 7, 0, 0, 0, 5], Frame::RstStream { stream: 7 }),
            (
                &[0x80, 3, 0, 4, 0, 0, 0, 12, 0, 0, 0, 1, 1, 0, 0, 7, 0, 1, 0, 0],
                Frame::Settings { initial_window: Some(65536) },
            ),
            (&[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 9], Frame::Ping { id: 9 }),
            (&[0x80, 3, 0, 7, 0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 0, 0], Frame::GoAway),
            (
                &[0x80, 3, 0, 9, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 1, 0],
                Frame::WindowUpdate { stream: 3, delta: 256 },
            ),
            (
                &[0, 0, 0, 3, 1, 0, 0, 2, b'h', b'i'],
                Frame::Data { stream: 3, payload: Bytes::from_static(b"hi"), fin: true },
            ),
        ];
        for (bytes, frame) in cases {
            assert_eq!(all(bytes, &[]), Ok(vec![frame]));
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert_eq!(all(&[0x80, 2, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1], &[]), Err(FrameError::Version(2)));
        assert_eq!(
            all(&[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff], &[]),
            Err(FrameError::TooLarge(0xff_ffff))
        );
        assert_eq!(all(&[0, 0, 0, 0, 0, 0, 0, 0], &[]), Err(FrameError::DataOnSession));
        let short = FrameError::Length { kind: 6, length: 2 };
        assert_eq!(all(&[0x80, 3, 0, 6, 0, 0, 0, 2, 0, 0], &[]), Err(short));
        // A count of entries that would overflow.
        let settings = [0x80, 3, 0, 4, 0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff];
        assert!(matches!(all(&settings, &[]), Err(FrameError::Length { kind: 4, .. })));
        assert_eq!(
            all(&[0x80, 3, 0, 99, 0, 0, 0, 1, 7], &[]),
            Ok(vec![Frame::Unknown { kind: 99 }])
        );
    }

    #[test]
    fn ours_are_read_as_what_they_are() {
        let mut bytes = BytesMut::new();
        rst_stream(&mut bytes, 3, Reset::Refused);
        ping(&mut bytes, 8);
        goaway(&mut bytes, 9, Away::Ok);
        window_update(&mut bytes, 5, 1000);
        syn_reply(&mut bytes, 5, b"zz");
        fin(&mut bytes, 7);
        let expected = vec![
            Frame::RstStream { stream: 3 },
            Frame::Ping { id: 8 },
            Frame::GoAway,
            Frame::WindowUpdate { stream: 5, delta: 1000 },
            Frame::OtherHeaders { block: Bytes::from_static(b"zz") },
            Frame::Data { stream: 7, payload: Bytes::new(), fin: true },
        ];
        assert_eq!(all(&bytes, &[]), Ok(expected));
    }

    fn some_frame() -> impl Strategy<Value = Vec<u8>> {
        let data = (1u32..6, any::<bool>(), proptest::collection::vec(any::<u8>(), 0..50))
            .prop_map(|(stream, end, payload)| {
                let mut bytes = BytesMut::new();
                bytes.put_u32(stream);
                bytes.put_u32(u32::from(end) << 24 | payload.len() as u32);
                bytes.put_slice(&payload);
                bytes.to_vec()
            });
        let control = (any::<u32>(), 0u8..3).prop_map(|(id, kind)| {
            let mut bytes = BytesMut::new();
            match kind {
                0 => ping(&mut bytes, id),
                1 => window_update(&mut bytes, id, 5),
                _ => syn_reply(&mut bytes, id, &id.to_be_bytes()),
            }
            bytes.to_vec()
        });
        prop_oneof![data, control]
    }

    proptest! {
        #[test]
        fn the_way_the_bytes_arrive_makes_no_difference(
            frames in proptest::collection::vec(some_frame(), 0..12),
            cuts in proptest::collection::vec(0usize..20, 0..40),
        ) {
            let bytes = frames.concat();
            prop_assert_eq!(all(&bytes, &cuts).map(joined), all(&bytes, &[]).map(joined));
        }

        #[test]
        fn any_bytes_end_in_frames_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let total: usize = all(&bytes, &[]).map_or(0, |frames| {
                frames.iter().map(|f| if let Frame::Data { payload, .. } = f { payload.len() } else { 0 }).sum()
            });
            prop_assert!(total <= bytes.len());
        }
    }
}

//! The bytes of a plugin's connection: frames of two channels, and in each channel messages of ttrpc.
//!
//! ```text
//! frame    channel u32 | length u32 | payload
//! message  length u32  | stream u32 | type u8 | flags u8 | data        all numbers big endian
//! ```
//! Frames and messages need not have the same borders. Ours do: a header is one frame and its data
//! another, because the peers' reader takes a frame only whole, into a buffer of 4096 bytes or into
//! that of the data.
//!
//! What a plugin sends is not trusted: lengths are checked before anything is kept, so a connection
//! holds at most one message of each channel.

use bytes::{Buf as _, BytesMut};
use prost::Message as _;

/// The channel on which a plugin serves its `Plugin` service and we are the client.
pub const PLUGIN: u32 = 1;
/// The channel on which we serve the `Runtime` service and the plugin is the client.
pub const RUNTIME: u32 = 2;

/// Largest data of a message (ttrpc PROTOCOL.md).
pub const MESSAGE_MAX: usize = 4 << 20;

const FRAME_HEADER: usize = 8;
const MESSAGE_HEADER: usize = 10;

/// Largest payload of a frame: a message with its header.
const FRAME_MAX: usize = MESSAGE_HEADER + MESSAGE_MAX;

/// A call.
pub const REQUEST: u8 = 1;
/// Its answer.
pub const RESPONSE: u8 = 2;

/// Why a connection cannot be read on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A frame or a message is larger than any may be.
    #[error("a {what} of {length} bytes; {most} are the most")]
    TooLong {
        /// "frame" or "message".
        what: &'static str,
        /// As its header has it.
        length: usize,
        /// What is allowed.
        most: usize,
    },
}

/// A message of ttrpc.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Pairs an answer with its call.
    pub stream: u32,
    /// [`REQUEST`], [`RESPONSE`], or something that is not of one call and one answer.
    pub kind: u8,
    /// An envelope: [`Request`] or [`Response`].
    pub data: Vec<u8>,
}

impl Message {
    /// The frames of it.
    ///
    /// # Errors
    /// Its data is larger than [`MESSAGE_MAX`].
    pub fn encode(&self, channel: u32) -> Result<Vec<u8>, Error> {
        let length = self.data.len();
        if length > MESSAGE_MAX {
            return Err(Error::TooLong { what: "message", length, most: MESSAGE_MAX });
        }
        let mut out = Vec::with_capacity(2 * FRAME_HEADER + MESSAGE_HEADER + length);
        let mut frame = |size: usize, parts: &[&[u8]]| {
            out.extend_from_slice(&channel.to_be_bytes());
            out.extend_from_slice(&(size as u32).to_be_bytes());
            parts.iter().for_each(|part| out.extend_from_slice(part));
        };
        // Flags are of streams with more than one message.
        let marks = [self.kind, 0];
        let header: [&[u8]; 3] =
            [&(length as u32).to_be_bytes(), &self.stream.to_be_bytes(), &marks];
        frame(MESSAGE_HEADER, &header);
        if length > 0 {
            frame(length, &[&self.data]);
        }
        Ok(out)
    }
}

/// Takes bytes as they come and gives messages.
#[derive(Debug, Default)]
pub struct Decoder {
    header: BytesMut,
    /// What is still to come of a frame: its channel and number of bytes.
    rest: Option<(u32, usize)>,
    plugin: BytesMut,
    runtime: BytesMut,
}

impl Decoder {
    /// Takes `bytes`; `each` is given every message that is complete, in order, with its channel.
    /// Frames of channels that nobody knows are passed over, as the protocol wants.
    ///
    /// # Errors
    /// The connection is of no use any more.
    pub fn feed(
        &mut self,
        mut bytes: &[u8],
        mut each: impl FnMut(u32, Message),
    ) -> Result<(), Error> {
        while !bytes.is_empty() {
            let Some((channel, rest)) = self.rest else {
                let missing = FRAME_HEADER - self.header.len();
                let (now, later) = bytes.split_at(missing.min(bytes.len()));
                self.header.extend_from_slice(now);
                bytes = later;
                if self.header.len() == FRAME_HEADER {
                    let channel = self.header.get_u32();
                    let length = self.header.get_u32() as usize;
                    if length > FRAME_MAX {
                        return Err(Error::TooLong { what: "frame", length, most: FRAME_MAX });
                    }
                    self.rest = (length > 0).then_some((channel, length));
                }
                continue;
            };
            let (now, later) = bytes.split_at(rest.min(bytes.len()));
            bytes = later;
            self.rest = (rest > now.len()).then(|| (channel, rest - now.len()));
            let buffer = match channel {
                PLUGIN => &mut self.plugin,
                RUNTIME => &mut self.runtime,
                _ => continue,
            };
            buffer.extend_from_slice(now);
            while let Some(message) = take(buffer)? {
                each(channel, message);
            }
        }
        Ok(())
    }

    /// Bytes that are held.
    #[cfg(test)]
    fn held(&self) -> usize {
        self.header.len() + self.plugin.len() + self.runtime.len()
    }
}

/// The first message of a channel, once it is there.
fn take(buffer: &mut BytesMut) -> Result<Option<Message>, Error> {
    let Some(mut header) = buffer.get(..MESSAGE_HEADER) else { return Ok(None) };
    let length = header.get_u32() as usize;
    if length > MESSAGE_MAX {
        return Err(Error::TooLong { what: "message", length, most: MESSAGE_MAX });
    }
    let (stream, kind) = (header.get_u32(), header.get_u8());
    if buffer.len() < MESSAGE_HEADER + length {
        return Ok(None);
    }
    buffer.advance(MESSAGE_HEADER);
    Ok(Some(Message { stream, kind, data: buffer.split_to(length).to_vec() }))
}

/// The envelope of a call.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// "nri.pkg.api.v1alpha1.Plugin", …
    #[prost(string, tag = "1")]
    pub service: String,
    /// "Configure", …
    #[prost(string, tag = "2")]
    pub method: String,
    /// The encoded request.
    #[prost(bytes = "vec", tag = "3")]
    pub payload: Vec<u8>,
    /// What the caller gives it, in nanoseconds; 0: any time.
    #[prost(int64, tag = "4")]
    pub timeout_nano: i64,
}

/// The envelope of an answer.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Response {
    /// Absent or 0: it went well.
    #[prost(message, optional, tag = "1")]
    pub status: Option<Status>,
    /// The encoded answer.
    #[prost(bytes = "vec", tag = "2")]
    pub payload: Vec<u8>,
}

/// google.rpc.Status
#[derive(Clone, PartialEq, prost::Message)]
pub struct Status {
    /// google.rpc.Code
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// For people.
    #[prost(string, tag = "2")]
    pub message: String,
}

impl Response {
    /// An answer that something went wrong.
    pub fn failed(code: tonic::Code, message: impl Into<String>) -> Self {
        let status = Status { code: code as i32, message: message.into() };
        Self { status: Some(status), payload: Vec::new() }
    }

    /// An answer.
    pub fn of(message: &impl prost::Message) -> Self {
        Self { status: None, payload: message.encode_to_vec() }
    }
}

/// What is left of [`MESSAGE_MAX`] for the request of a call of that service and method.
pub fn room(service: &str, method: &str) -> usize {
    let envelope = Request {
        service: service.to_owned(),
        method: method.to_owned(),
        payload: Vec::new(),
        timeout_nano: i64::MAX,
    };
    // Tag and length of the payload.
    MESSAGE_MAX - envelope.encoded_len() - 8
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(stream: u32, data: &[u8]) -> Message {
        Message { stream, kind: REQUEST, data: data.to_vec() }
    }

    fn decode(decoder: &mut Decoder, bytes: &[u8]) -> Result<Vec<(u32, Message)>, Error> {
        let mut out = Vec::new();
        decoder.feed(bytes, |channel, message| out.push((channel, message)))?;
        Ok(out)
    }

    #[test]
    fn a_call_is_two_frames_that_the_peers_reader_takes() {
        let bytes = message(3, b"abc").encode(PLUGIN).unwrap();
        let expected: &[u8] =
            b"\0\0\0\x01\0\0\0\x0a\0\0\0\x03\0\0\0\x03\x01\0\0\0\0\x01\0\0\0\x03abc";
        assert_eq!(bytes, expected);
        let answer = Message { stream: 3, kind: RESPONSE, data: Vec::new() };
        let expected: &[u8] = b"\0\0\0\x02\0\0\0\x0a\0\0\0\0\0\0\0\x03\x02\0";
        assert_eq!(answer.encode(RUNTIME).unwrap(), expected);
    }

    #[test]
    fn lengths_are_checked_before_anything_is_kept() {
        let mut decoder = Decoder::default();
        let frame = [0, 0, 0, 1, 0x7f, 0xff, 0xff, 0xff];
        assert!(matches!(
            decode(&mut decoder, &frame),
            Err(Error::TooLong { what: "frame", length: 0x7fff_ffff, .. })
        ));
        let mut decoder = Decoder::default();
        let header = [0, 0, 0, 1, 0, 0, 0, 10, 0, 0x40, 0, 1, 0, 0, 0, 1, 1, 0];
        assert!(matches!(
            decode(&mut decoder, &header),
            Err(Error::TooLong { what: "message", length: 0x40_0001, .. })
        ));
        assert!(message(1, &vec![0; MESSAGE_MAX + 1]).encode(PLUGIN).is_err());
        assert!(message(1, &vec![0; MESSAGE_MAX]).encode(PLUGIN).is_ok());
    }

    #[test]
    fn the_room_of_a_call_is_not_too_much() {
        let request = Request {
            service: "a.b.C".into(),
            method: "D".into(),
            payload: vec![0; room("a.b.C", "D")],
            timeout_nano: i64::MAX,
        };
        let left = MESSAGE_MAX - request.encoded_len();
        assert!(left < 8, "{left}");
    }

    proptest! {
        /// Whatever pieces the bytes come in, and whatever frames they are cut into.
        #[test]
        fn messages_survive_any_cutting(
            messages in prop::collection::vec(
                (prop_oneof![Just(PLUGIN), Just(RUNTIME)], any::<u32>(), any::<u8>(),
                 prop::collection::vec(any::<u8>(), 0..200)), 0..8),
            frame in 1usize..40,
            piece in 1usize..40,
            noise in any::<bool>(),
        ) {
            let mut bytes = Vec::new();
            let mut sent = Vec::new();
            for (channel, stream, kind, data) in messages {
                let message = Message { stream, kind, data };
                // Its content without its frames, framed anew.
                let mut content = Vec::new();
                content.extend_from_slice(&(message.data.len() as u32).to_be_bytes());
                content.extend_from_slice(&stream.to_be_bytes());
                content.extend_from_slice(&[kind, 0]);
                content.extend_from_slice(&message.data);
                for part in content.chunks(frame) {
                    for (channel, part) in [(9, &b"x"[..]), (channel, part)] {
                        if channel == 9 && !noise { continue }
                        bytes.extend_from_slice(&channel.to_be_bytes());
                        bytes.extend_from_slice(&(part.len() as u32).to_be_bytes());
                        bytes.extend_from_slice(part);
                    }
                }
                sent.push((channel, message));
            }
            let mut decoder = Decoder::default();
            let mut got = Vec::new();
            for part in bytes.chunks(piece) {
                got.extend(decode(&mut decoder, part).unwrap());
            }
            prop_assert_eq!(got, sent);
            prop_assert_eq!(decoder.held(), 0);
        }

        #[test]
        fn what_is_encoded_is_decoded(stream: u32, data: Vec<u8>, piece in 1usize..64) {
            let message = Message { stream, kind: RESPONSE, data };
            let bytes = message.encode(RUNTIME).unwrap();
            let mut decoder = Decoder::default();
            let mut got = Vec::new();
            for part in bytes.chunks(piece) {
                got.extend(decode(&mut decoder, part).unwrap());
            }
            prop_assert_eq!(got, vec![(RUNTIME, message)]);
        }

        #[test]
        fn noise_neither_panics_nor_piles_up(bytes: Vec<u8>) {
            let mut decoder = Decoder::default();
            let _ = decode(&mut decoder, &bytes);
            prop_assert!(decoder.held() <= bytes.len());
            let _ = Request::decode(&bytes[..]);
            let _ = Response::decode(&bytes[..]);
        }
    }
}

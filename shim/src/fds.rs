//! Frames of the control socket that carry descriptors: what a shim lends to the daemon, so that it
//! outlives the shim, and what the next shim is given back.
//!
//! A frame of kind [`Kind::Keep`] has a name as its payload and one descriptor; [`Kind::Drop`] names
//! one that is not to be kept any more. Names are `<container>/<exec or nothing>/<role>`.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use tokio::{io::Interest, net::UnixStream};

use crate::control::{HEADER, Kind, header, parse_header};

/// Longest name.
const NAME_MAX: usize = 512;

/// Descriptors by name.
pub type Kept = BTreeMap<String, OwnedFd>;

/// Sends one frame; a descriptor goes with its first byte.
pub(crate) async fn send(
    stream: &UnixStream,
    kind: Kind,
    name: &str,
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut frame = header(kind, name.len()).to_vec();
    frame.extend_from_slice(name.as_bytes());
    let raw = fd.map(|fd| [fd.as_raw_fd()]);
    let mut sent = 0;
    while sent < frame.len() {
        sent += stream
            .async_io(Interest::WRITABLE, || {
                let rights = raw.as_ref().map(|raw| [ControlMessage::ScmRights(raw)]);
                let messages = rights.as_ref().filter(|_| sent == 0).map_or(&[][..], |m| &m[..]);
                let slices = [IoSlice::new(&frame[sent..])];
                let flags = MsgFlags::MSG_NOSIGNAL;
                Ok(sendmsg::<()>(stream.as_raw_fd(), &slices, messages, flags, None)?)
            })
            .await?;
    }
    Ok(())
}

/// What comes in.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    /// With [`Kind::Keep`], and with nothing else.
    pub(crate) fd: Option<OwnedFd>,
}

/// Reads a stream whose descriptors must not be lost: an ordinary read would drop them.
pub(crate) struct Reader<'a> {
    stream: &'a UnixStream,
    bytes: VecDeque<u8>,
    fds: VecDeque<OwnedFd>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(stream: &'a UnixStream) -> Self {
        Self { stream, bytes: VecDeque::new(), fds: VecDeque::new() }
    }

    /// The next line, without its line feed.
    #[cfg(feature = "client")]
    pub(crate) async fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=end).take(end).collect();
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            if self.bytes.len() > crate::control::LINE_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
            if !self.fill().await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// The next frame; `None`: the peer has left.
    pub(crate) async fn frame(&mut self) -> io::Result<Option<Frame>> {
        loop {
            if self.bytes.len() >= HEADER {
                let mut head = [0; HEADER];
                head.iter_mut().zip(&self.bytes).for_each(|(to, from)| *to = *from);
                let (kind, length) = parse_header(head)
                    .filter(|(_, length)| *length <= NAME_MAX)
                    .ok_or(io::ErrorKind::InvalidData)?;
                if self.bytes.len() >= HEADER + length {
                    let name = self.bytes.drain(..HEADER + length).skip(HEADER).collect();
                    let name = String::from_utf8(name).map_err(|_| io::ErrorKind::InvalidData)?;
                    let fd = match kind {
                        Kind::Keep => Some(self.fds.pop_front().ok_or(io::ErrorKind::InvalidData)?),
                        _ => None,
                    };
                    return Ok(Some(Frame { kind, name, fd }));
                }
            }
            if !self.fill().await? {
                return match self.bytes.is_empty() {
                    true => Ok(None),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
        }
    }

    async fn fill(&mut self) -> io::Result<bool> {
        let Self { stream, bytes, fds } = self;
        let count = stream.async_io(Interest::READABLE, || receive(stream, bytes, fds)).await?;
        Ok(count > 0)
    }
}

#[expect(unsafe_code, reason = "received descriptors become owned")]
fn receive(
    stream: &UnixStream,
    bytes: &mut VecDeque<u8>,
    fds: &mut VecDeque<OwnedFd>,
) -> io::Result<usize> {
    let mut buffer = [0; 4096];
    let mut space = nix::cmsg_space!([RawFd; 4]);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let cut = message.flags.contains(MsgFlags::MSG_CTRUNC);
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just made them for us.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if cut {
        return Err(io::Error::other("a descriptor was lost: the limit of open files is reached"));
    }
    let count = message.bytes;
    bytes.extend(&buffer[..count]);
    Ok(count)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        os::fd::AsFd as _,
    };

    use super::*;

    #[tokio::test]
    async fn descriptors_arrive_with_their_names_and_the_end_is_seen() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let sending = async move {
            for n in 0..200 {
                let (read, mut write) = std::io::pipe().unwrap();
                write_all(&mut write, n);
                // What is read must end, whenever that is.
                drop(write);
                let name = format!("container{n}//out");
                send(&ours, Kind::Keep, &name, Some(read.as_fd())).await.unwrap();
                send(&ours, Kind::Drop, &name, None).await.unwrap();
            }
        };
        let receiving = async {
            let mut reader = Reader::new(&theirs);
            for n in 0..200 {
                let frame = reader.frame().await.unwrap().unwrap();
                assert_eq!((frame.kind, frame.name), (Kind::Keep, format!("container{n}//out")));
                let mut text = String::new();
                std::fs::File::from(frame.fd.unwrap()).read_to_string(&mut text).unwrap();
                assert_eq!(text, n.to_string());
                let frame = reader.frame().await.unwrap().unwrap();
                assert!(frame.kind == Kind::Drop && frame.fd.is_none());
            }
            assert!(reader.frame().await.unwrap().is_none());
        };
        tokio::join!(sending, receiving);
    }

    fn write_all(to: &mut std::io::PipeWriter, n: u32) {
        to.write_all(n.to_string().as_bytes()).unwrap();
    }

    #[tokio::test]
    async fn a_frame_without_its_descriptor_or_too_long_is_refused() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send(&ours, Kind::Keep, "a//out", None).await.unwrap();
        assert!(Reader::new(&theirs).frame().await.is_err());
        let (ours, theirs) = UnixStream::pair().unwrap();
        send(&ours, Kind::Drop, &"a".repeat(NAME_MAX + 1), None).await.unwrap();
        assert!(Reader::new(&theirs).frame().await.is_err());
    }
}

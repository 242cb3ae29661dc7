//! WebSocket: Kubernetes' channels in its messages, and SPDY tunnelled through it.
//!
//! A message is a channel's number and data; `base64.` protocols put both into text. Protocol v5 adds
//! the close signal: channel 255, then the number of the channel that ends. RFC 6455 itself is
//! tungstenite's.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf, Bytes};
use futures::stream::{SplitSink, SplitStream};
use futures::{Sink, SinkExt, Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_tungstenite::tungstenite::{self, Message, Utf8Bytes};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::conn::Watch;
use crate::outbound::{CHUNK, Framing, Out, Outbound, QUEUE};
use crate::pipe::{PipeReader, PipeWriter, pipe};

/// The largest message that is taken. Clients send some 32 KiB at a time.
const MAX_MESSAGE: usize = 4 * 1024 * 1024;
/// The channel whose messages say that another one ends.
const CLOSE_SIGNAL: u8 = 255;
/// How long the last bytes to a peer that is gone, or broke the rules, may take.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long we wait for the peer to close after all is said.
const LINGER: Duration = Duration::from_secs(5);
/// Without a close signal the peer cannot be told that our direction has ended: what it may still send
/// after that is taken for so long.
const HALF_OPEN: Duration = Duration::from_secs(1);

pub(crate) fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
        .read_buffer_size(32 * 1024)
        .write_buffer_size(64 * 1024)
}

/// How channels are put into messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codec {
    Binary,
    Base64,
}

/// What a message says.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Data(u32, Bytes),
    /// The peer's direction of a channel has ended.
    End(u32),
    Nothing,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("message that is not a channel's number and base64")]
struct BadMessage;

impl Codec {
    fn framing(self) -> Framing {
        match self {
            Codec::Binary => Framing::Binary,
            Codec::Base64 => Framing::Base64,
        }
    }

    fn decode(self, mut message: Bytes, signals: bool) -> Result<Said, BadMessage> {
        if message.is_empty() {
            return Ok(Said::Nothing);
        }
        let channel = message.get_u8();
        match self {
            Codec::Binary if signals && channel == CLOSE_SIGNAL => match message[..] {
                [ended] => Ok(Said::End(u32::from(ended))),
                _ => Err(BadMessage),
            },
            Codec::Binary => Ok(Said::Data(u32::from(channel), message)),
            Codec::Base64 => {
                let channel = channel.checked_sub(b'0').ok_or(BadMessage)?;
                let data = STANDARD.decode(&message).map_err(|_| BadMessage)?;
                Ok(Said::Data(u32::from(channel), data.into()))
            }
        }
    }
}

/// Which end of the connection this is, and what its protocol can say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) codec: Codec,
    /// Whether the peer may send the close signal.
    pub(crate) signals: bool,
    /// Whether we may: Kubernetes' clients of v5 send it, and complain about one that they get.
    pub(crate) announces: bool,
    /// Whether an orderly close of the connection is the channels' end: so for the client. A server
    /// has lost its client then.
    pub(crate) close_ends: bool,
}

type Pipes = Arc<HashMap<u32, PipeWriter>>;

/// A connection's channels. Dropping it ends the connection at once.
pub(crate) struct Channels {
    framing: Framing,
    queue: mpsc::Sender<Out>,
    closed: CancellationToken,
    finish: CancellationToken,
    writer_done: CancellationToken,
    tasks: [AbortHandle; 2],
}

impl Channels {
    /// Starts on a connection that is past its handshake. Gives back the peer's ends of the channels in
    /// `inbound`; what arrives on others is thrown away.
    pub(crate) fn start<T, const N: usize>(
        socket: WebSocketStream<T>,
        watch: Watch,
        rules: Rules,
        inbound: [u32; N],
    ) -> (Self, [PipeReader; N])
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (channels, mut readers) = Self::start_many(socket, watch, rules, &inbound);
        (channels, std::array::from_fn(|_| readers.remove(0)))
    }

    /// As [`Channels::start`], for a number of channels that only the request knows.
    pub(crate) fn start_many<T>(
        socket: WebSocketStream<T>,
        watch: Watch,
        rules: Rules,
        inbound: &[u32],
    ) -> (Self, Vec<PipeReader>)
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (mut pipes, mut readers) = (HashMap::new(), Vec::new());
        for id in inbound {
            let (writer, reader) = pipe(None);
            pipes.insert(*id, writer);
            readers.push(reader);
        }
        let pipes: Pipes = Arc::new(pipes);
        let (queue, out) = mpsc::channel(QUEUE);
        let (closed, finish, writer_done) =
            (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
        let refuse = CancellationToken::new();
        let (sink, source) = socket.split();
        let reading = tokio::spawn({
            let (closed, refuse, pipes) = (closed.clone(), refuse.clone(), pipes.clone());
            async move {
                let _end = closed.drop_guard();
                let end = read(source, &pipes, &watch, rules).await;
                if matches!(end, ReadEnd::Refused) {
                    refuse.cancel();
                }
                let orderly = matches!(end, ReadEnd::Closed) && rules.close_ends;
                for pipe in pipes.values() {
                    if orderly {
                        pipe.close()
                    } else {
                        pipe.reset(io::ErrorKind::ConnectionAborted)
                    }
                }
            }
        });
        let writing = tokio::spawn({
            let (closed, finish, done) = (closed.clone(), finish.clone(), writer_done.clone());
            async move {
                let _done = done.drop_guard();
                let end = closed.clone().drop_guard();
                tokio::select! {
                    biased;
                    result = write(sink, out, pipes, rules, &finish, &refuse) => {
                        if let Err(error) = result {
                            debug!(%error, "streaming connection broke");
                        } else {
                            // An orderly end leaves the peer to close.
                            end.disarm();
                        }
                    }
                    () = async { closed.cancelled().await; tokio::time::sleep(LAST_WORDS).await } => {}
                }
            }
        });
        let tasks = [reading.abort_handle(), writing.abort_handle()];
        let framing = rules.codec.framing();
        (Self { framing, queue, closed, finish, writer_done, tasks }, readers)
    }

    /// Our direction of a channel.
    pub(crate) fn outbound(&self, id: u32) -> Outbound {
        Outbound::new(id, self.framing.clone(), self.queue.clone())
    }

    /// Fires when the peer is gone.
    pub(crate) fn closed(&self) -> CancellationToken {
        self.closed.clone()
    }

    /// Sends what is queued, closes the connection, and waits for the peer to do so too.
    pub(crate) async fn close(self) {
        self.finish.cancel();
        self.writer_done.cancelled().await;
        let _ = tokio::time::timeout(LINGER, self.closed.cancelled()).await;
    }
}

impl Drop for Channels {
    fn drop(&mut self) {
        self.closed.cancel();
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

enum ReadEnd {
    /// The peer closed the connection in order.
    Closed,
    /// It broke, or the peer is gone.
    Broke,
    /// The peer broke the rules.
    Refused,
}

async fn read<T>(
    mut source: SplitStream<WebSocketStream<T>>,
    pipes: &Pipes,
    watch: &Watch,
    rules: Rules,
) -> ReadEnd
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mut end = ReadEnd::Broke;
    while let Some(message) = source.next().await {
        let message = match message {
            Ok(Message::Binary(data)) => data,
            Ok(Message::Text(text)) => text.into(),
            Ok(Message::Close(frame)) => {
                let normal = frame.is_none_or(|frame| frame.code == CloseCode::Normal);
                end = if normal { ReadEnd::Closed } else { ReadEnd::Broke };
                // The next poll answers it, and then the source ends.
                continue;
            }
            Ok(_) => continue,
            Err(
                tungstenite::Error::Capacity(_)
                | tungstenite::Error::Protocol(_)
                | tungstenite::Error::Utf8(_),
            ) => {
                return ReadEnd::Refused;
            }
            Err(error) => {
                debug!(%error, "streaming connection broke");
                return end;
            }
        };
        match rules.codec.decode(message, rules.signals) {
            Ok(Said::Data(channel, data)) => {
                let Some(pipe) = pipes.get(&channel) else { continue };
                // A large message goes in by pieces, so that a pipe never holds much more than it should.
                for piece in data.chunks(CHUNK) {
                    while !pipe.try_push(piece) {
                        if !watch.wait_for(pipe.ready()).await {
                            return ReadEnd::Broke;
                        }
                    }
                }
            }
            Ok(Said::End(channel)) => {
                if let Some(pipe) = pipes.get(&channel) {
                    pipe.close();
                }
            }
            Ok(Said::Nothing) => {}
            Err(error) => {
                debug!(%error, "the peer broke the channel protocol");
                return ReadEnd::Refused;
            }
        }
    }
    end
}

async fn write<T>(
    mut sink: SplitSink<WebSocketStream<T>, Message>,
    mut out: mpsc::Receiver<Out>,
    pipes: Pipes,
    rules: Rules,
    finish: &CancellationToken,
    refuse: &CancellationToken,
) -> Result<(), tungstenite::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mut code = CloseCode::Normal;
    loop {
        // Without waiting, as long as there is something: feeding writes whenever a buffer is full.
        let next = match out.try_recv() {
            Ok(next) => next,
            Err(_) => {
                sink.flush().await?;
                tokio::select! {
                    // Data before the end.
                    biased;
                    () = refuse.cancelled() => {
                        code = CloseCode::Protocol;
                        break;
                    }
                    Some(next) = out.recv() => next,
                    () = finish.cancelled() => break,
                }
            }
        };
        let message = match next {
            Out::Frame(frame) => match rules.codec {
                Codec::Binary => Message::Binary(frame),
                Codec::Base64 => {
                    Message::Text(Utf8Bytes::try_from(frame).expect("base64 is ASCII"))
                }
            },
            Out::Fin(id) | Out::Reset(id) if rules.announces => {
                Message::Binary(Bytes::copy_from_slice(&[CLOSE_SIGNAL, id as u8]))
            }
            Out::Fin(id) | Out::Reset(id) => {
                if pipes.contains_key(&id) {
                    let pipes = pipes.clone();
                    let closed = refuse.clone();
                    tokio::spawn(async move {
                        let _ = tokio::time::timeout(HALF_OPEN, closed.cancelled()).await;
                        pipes[&id].close();
                    });
                }
                continue;
            }
        };
        sink.feed(message).await?;
    }
    let close = CloseFrame { code, reason: Utf8Bytes::from_static("") };
    sink.send(Message::Close(Some(close))).await
}

/// A byte stream in the messages of a WebSocket: what SPDY tunnelled through it is.
pub(crate) struct Tunnel<T> {
    socket: WebSocketStream<T>,
    ahead: Bytes,
}

impl<T> Tunnel<T> {
    pub(crate) fn new(socket: WebSocketStream<T>) -> Self {
        Self { socket, ahead: Bytes::new() }
    }
}

fn io_error(error: tungstenite::Error) -> io::Error {
    match error {
        tungstenite::Error::Io(error) => error,
        tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed => {
            io::ErrorKind::BrokenPipe.into()
        }
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tunnel<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.ahead.is_empty() {
            match ready!(Pin::new(&mut self.socket).poll_next(cx)) {
                Some(Ok(Message::Binary(data))) => self.ahead = data,
                Some(Ok(Message::Text(text))) => self.ahead = text.into(),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let count = self.ahead.len().min(into.remaining());
        into.put_slice(&self.ahead[..count]);
        self.ahead.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tunnel<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(io_error)?;
        let data = &data[..data.len().min(2 * CHUNK)];
        let message = Message::Binary(Bytes::copy_from_slice(data));
        Pin::new(&mut self.socket).start_send(message).map_err(io_error)?;
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(io_error)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_close(cx).map_err(io_error)
    }
}

/// Feeds any bytes to the server's side of a connection: the first byte chooses the codec.
#[cfg(feature = "fuzzing")]
pub fn fuzz_messages(data: &[u8]) {
    use tungstenite::protocol::{Role, WebSocket};

    /// Reads the data, and takes any answer.
    struct Peer<'a>(&'a [u8]);
    impl io::Read for Peer<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            io::Read::read(&mut self.0, into)
        }
    }
    impl io::Write for Peer<'_> {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    let Some((choice, data)) = data.split_first() else { return };
    let codec = if choice & 1 == 0 { Codec::Binary } else { Codec::Base64 };
    let mut socket = WebSocket::from_raw_socket(Peer(data), Role::Server, Some(config()));
    while let Ok(message) = socket.read() {
        assert!(message.len() <= MAX_MESSAGE);
        if message.is_binary() || message.is_text() {
            let _ = codec.decode(message.into_data(), choice & 2 != 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(codec: Codec, signals: bool, message: &'static [u8]) -> Result<Said, BadMessage> {
        codec.decode(Bytes::from_static(message), signals)
    }

    #[test]
    fn messages_of_each_protocol() {
        let data =
            |channel, bytes: &'static [u8]| Ok(Said::Data(channel, Bytes::from_static(bytes)));
        assert_eq!(decode(Codec::Binary, false, b"\x00hello"), data(0, b"hello"));
        assert_eq!(decode(Codec::Binary, false, b"\x04"), data(4, b""));
        assert_eq!(decode(Codec::Binary, false, b"\xff\x00"), data(255, b"\x00"));
        assert_eq!(decode(Codec::Binary, true, b"\xff\x00"), Ok(Said::End(0)));
        assert_eq!(decode(Codec::Binary, true, b"\xff"), Err(BadMessage));
        assert_eq!(decode(Codec::Binary, true, b"\xff\x00\x01"), Err(BadMessage));
        assert_eq!(decode(Codec::Binary, false, b""), Ok(Said::Nothing));
        assert_eq!(decode(Codec::Base64, false, b"0aGVsbG8="), data(0, b"hello"));
        assert_eq!(decode(Codec::Base64, false, b"0aGVsbG8"), Err(BadMessage));
        assert_eq!(decode(Codec::Base64, false, b"!aGVsbG8="), Err(BadMessage));
    }

    proptest! {
        #[test]
        fn any_message_is_decoded_or_refused(
            message in proptest::collection::vec(any::<u8>(), 0..100), binary: bool, signals: bool,
        ) {
            let codec = if binary { Codec::Binary } else { Codec::Base64 };
            let length = message.len();
            if let Ok(Said::Data(_, data)) = codec.decode(message.into(), signals) {
                prop_assert!(data.len() < length);
            }
        }
    }
}

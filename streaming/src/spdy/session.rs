//! A SPDY session on a connection: one task reads, one writes, streams come out of [`Session::next`].
//!
//! ```text
//!  peer -> reader -> pipe of each stream -> backend
//!             |  replies, resets, pongs (bounded; the reader waits when it is full)
//!             v
//!  peer <- writer <- grants (one number per stream) and frames of all streams (bounded, in turn)
//! ```
//! The reader never waits for the writer's data, only for its control frames, and a peer that lets
//! those pile up is a peer that does not read.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::flow::{self, Grants, SendWindows, StreamGrants};
use super::frame::{self, Away, Decoder, Frame, FrameError, Reset};
use super::header::{EmptyBlocks, HeaderError, Headers, Inflater};
use crate::conn::Watch;
use crate::outbound::{Framing, Out, Outbound, QUEUE};
use crate::pipe::{PipeReader, PipeWriter, pipe};

/// Streams that one connection may have open: 512 forwarded connections.
const MAX_STREAMS: usize = 1024;
/// What is read from the connection at a time.
const READ: usize = 64 * 1024;
/// Replies that wait to be written; the reader waits when there are more.
const CONTROL: usize = 64;
/// New streams that wait to be looked at; the reader waits when there are more.
const INCOMING: usize = 16;
/// Frames are gathered up to this size, so that small ones share a write.
const GATHER: usize = 64 * 1024;
/// How long the last bytes to a peer that is gone, or broke the rules, may take.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long we wait for the peer to close after all is said.
const LINGER: Duration = Duration::from_secs(5);

#[derive(Debug)]
enum Control {
    Reply(u32),
    Reset(u32, Reset),
    Pong(u32),
    /// The peer broke the rules: say so and close.
    Refuse,
}

/// A stream that the peer opened.
pub(crate) struct Stream {
    pub(crate) id: u32,
    pub(crate) headers: Headers,
    /// From the peer.
    pub(crate) reader: PipeReader,
    /// To the peer.
    pub(crate) writer: Outbound,
    /// Fires when the peer resets the stream, or is gone.
    pub(crate) reset: CancellationToken,
    /// Fires when the peer ends or resets its direction, or is gone.
    pub(crate) ended: CancellationToken,
    control: mpsc::Sender<Control>,
    windows: Arc<SendWindows>,
}

impl Stream {
    /// Tells the peer that the stream is there.
    pub(crate) async fn accept(&self) {
        let _ = self.control.send(Control::Reply(self.id)).await;
    }

    /// Tells the peer that there will be no such stream.
    pub(crate) async fn refuse(self) {
        self.writer.finished().store(true, Ordering::Release);
        self.ended.cancel();
        let _ = self.control.send(Control::Reset(self.id, Reset::Refused)).await;
    }

    /// What is left to do with a stream whose reader and writer are elsewhere.
    pub(crate) fn handle(&self) -> Handle {
        Handle {
            id: self.id,
            control: self.control.clone(),
            windows: self.windows.clone(),
            finished: self.writer.finished(),
            ended: self.ended.clone(),
        }
    }
}

/// Ends a stream from our side.
pub(crate) struct Handle {
    id: u32,
    control: mpsc::Sender<Control>,
    windows: Arc<SendWindows>,
    finished: Arc<AtomicBool>,
    ended: CancellationToken,
}

impl Handle {
    /// Waits until the peer has ended its direction; if it does not within `limit`, tells it that
    /// nothing it still sends will be read.
    pub(crate) async fn settle(&self, limit: Duration) {
        if tokio::time::timeout(limit, self.ended.cancelled()).await.is_ok() {
            return;
        }
        self.finished.store(true, Ordering::Release);
        self.ended.cancel();
        self.windows.remove(self.id);
        let _ = self.control.send(Control::Reset(self.id, Reset::Cancel)).await;
    }
}

/// The connection's streams. Dropping it ends the connection at once.
pub(crate) struct Session {
    incoming: mpsc::Receiver<Stream>,
    closed: CancellationToken,
    finish: CancellationToken,
    tasks: [AbortHandle; 2],
    writer_done: CancellationToken,
}

impl Session {
    /// Starts the session: the connection is past its HTTP upgrade.
    pub(crate) fn start<T>(io: T, watch: Watch) -> Self
    where
        T: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (read, write) = tokio::io::split(io);
        let (control, control_out) = mpsc::channel(CONTROL);
        let (data, data_out) = mpsc::channel(QUEUE);
        let (opened, incoming) = mpsc::channel(INCOMING);
        let closed = CancellationToken::new();
        let finish = CancellationToken::new();
        let writer_done = CancellationToken::new();
        let windows = Arc::new(SendWindows::new());
        let grants = Grants::new();
        let last = Arc::new(AtomicU32::new(0));

        let writer = Writer {
            io: write,
            control: control_out,
            data: data_out,
            grants: grants.clone(),
            blocks: EmptyBlocks::default(),
            last: last.clone(),
        };
        let reader = Reader {
            io: read,
            decoder: Decoder::new(),
            inflater: Inflater::new(),
            streams: HashMap::new(),
            last,
            control,
            data,
            opened,
            windows: windows.clone(),
            grants,
            watch,
        };
        let gone = closed.clone();
        let reading = tokio::spawn(async move {
            // Whatever ends the reading: the streams that are dropped with it break.
            let _end = gone.drop_guard();
            reader.run().await;
        });
        let (gone, finishing, done) = (closed.clone(), finish.clone(), writer_done.clone());
        let writing = tokio::spawn(async move {
            let _done = done.drop_guard();
            // Even when this task is aborted, nobody may go on waiting for a window.
            let _windows = EndWindows(windows);
            let _end = gone.clone().drop_guard();
            tokio::select! {
                biased;
                result = writer.run(&finishing) => {
                    if let Err(error) = result {
                        debug!(%error, "streaming connection broke");
                    }
                    // An orderly end leaves the peer to close.
                    if finishing.is_cancelled() {
                        _end.disarm();
                    }
                }
                () = async { gone.cancelled().await; tokio::time::sleep(LAST_WORDS).await } => {}
            }
        });
        let tasks = [reading.abort_handle(), writing.abort_handle()];
        Self { incoming, closed, finish, tasks, writer_done }
    }

    /// Fires when the peer is gone.
    pub(crate) fn closed(&self) -> CancellationToken {
        self.closed.clone()
    }

    /// The next stream that the peer opens; `None` when the peer is gone.
    pub(crate) async fn next(&mut self) -> Option<Stream> {
        self.incoming.recv().await
    }

    /// Sends what is queued, says goodbye, and waits for the peer to close. To be called when all
    /// streams' writers have finished.
    pub(crate) async fn close(mut self) {
        self.incoming.close();
        while let Some(stream) = self.incoming.recv().await {
            drop(stream);
        }
        self.finish.cancel();
        self.writer_done.cancelled().await;
        let _ = tokio::time::timeout(LINGER, self.closed.cancelled()).await;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.closed.cancel();
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

struct EndWindows(Arc<SendWindows>);
impl Drop for EndWindows {
    fn drop(&mut self) {
        self.0.end();
    }
}

struct Open {
    pipe: PipeWriter,
    ended: CancellationToken,
    reset: CancellationToken,
    finished: Arc<AtomicBool>,
}

impl Drop for Open {
    fn drop(&mut self) {
        // With the connection: who waits for the stream's end or reset is told.
        if !self.ended.is_cancelled() {
            self.reset.cancel();
            self.ended.cancel();
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("the peer is gone")]
    Gone,
    #[error("read")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error("{0}")]
    Rule(&'static str),
}

struct Reader<T> {
    io: ReadHalf<T>,
    decoder: Decoder,
    inflater: Inflater,
    streams: HashMap<u32, Open>,
    last: Arc<AtomicU32>,
    control: mpsc::Sender<Control>,
    data: mpsc::Sender<Out>,
    opened: mpsc::Sender<Stream>,
    windows: Arc<SendWindows>,
    grants: Arc<Grants>,
    watch: Watch,
}

impl<T: AsyncRead> Reader<T> {
    async fn run(mut self) {
        match self.read().await {
            Ok(()) => {}
            Err(error @ (ReadError::Frame(_) | ReadError::Header(_) | ReadError::Rule(_))) => {
                debug!(%error, "the peer broke SPDY's rules");
                let _ = tokio::time::timeout(LAST_WORDS, self.control.send(Control::Refuse)).await;
            }
            Err(error) => debug!(%error, "streaming connection broke"),
        }
    }

    async fn read(&mut self) -> Result<(), ReadError> {
        let mut buffer = BytesMut::new();
        loop {
            while let Some(frame) = self.decoder.next(&mut buffer)? {
                self.frame(frame).await?;
            }
            buffer.reserve(READ);
            if self.io.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
    }

    async fn frame(&mut self, frame: Frame) -> Result<(), ReadError> {
        match frame {
            Frame::Data { stream, payload, fin } => self.data(stream, payload, fin).await,
            Frame::SynStream { stream, fin, unidirectional, block } => {
                let headers = self.inflater.headers(&block)?;
                self.open(stream, fin, unidirectional, headers).await
            }
            Frame::OtherHeaders { block } => {
                self.inflater.headers(&block)?;
                Ok(())
            }
            Frame::RstStream { stream } => {
                self.remove(stream, io::ErrorKind::ConnectionReset);
                Ok(())
            }
            Frame::Settings { initial_window } => {
                if let Some(size) = initial_window {
                    self.windows.initial(size);
                }
                Ok(())
            }
            // Even ids would answer ours, and we send none.
            Frame::Ping { id } if id % 2 == 1 => self.control(Control::Pong(id)).await,
            Frame::WindowUpdate { stream, delta } => match self.windows.update(stream, delta) {
                Ok(()) => Ok(()),
                Err(_) if stream == 0 => Err(ReadError::Rule("session window out of range")),
                Err(_) => self.break_off(stream, Reset::FlowControl).await,
            },
            // After GOAWAY the peer opens no more streams; those that are open go on.
            Frame::Ping { .. } | Frame::GoAway => Ok(()),
            Frame::Unknown { kind } => {
                debug!(kind, "ignored a SPDY frame of unknown type");
                Ok(())
            }
        }
    }

    async fn open(
        &mut self,
        id: u32,
        fin: bool,
        unidirectional: bool,
        headers: Headers,
    ) -> Result<(), ReadError> {
        if id.is_multiple_of(2) {
            return Err(ReadError::Rule("client's stream with an even id"));
        }
        if id <= self.last.load(Ordering::Relaxed) {
            return Err(ReadError::Rule("stream id that does not grow"));
        }
        self.last.store(id, Ordering::Relaxed);
        self.forget_ended();
        if unidirectional || self.streams.len() >= MAX_STREAMS {
            return self.control(Control::Reset(id, Reset::Refused)).await;
        }
        let hook = StreamGrants { stream: id, grants: self.grants.clone() };
        let (pipe, reader) = pipe(Some(Box::new(hook)));
        let writer = Outbound::new(id, Framing::Spdy(self.windows.clone()), self.data.clone());
        self.windows.open(id);
        let open = Open {
            pipe,
            ended: CancellationToken::new(),
            reset: CancellationToken::new(),
            finished: writer.finished(),
        };
        if fin {
            open.pipe.close();
            open.ended.cancel();
        }
        let stream = Stream {
            id,
            headers,
            reader,
            writer,
            reset: open.reset.clone(),
            ended: open.ended.clone(),
            control: self.control.clone(),
            windows: self.windows.clone(),
        };
        self.streams.insert(id, open);
        // Once the session takes no more streams, opening one is answered with a refusal.
        let opened = self.opened.clone();
        let mut refused = None;
        let send = async { refused = opened.send(stream).await.err() };
        if !self.watch.wait_for(send).await {
            return Err(ReadError::Gone);
        }
        if refused.is_some() {
            return self.break_off(id, Reset::Refused).await;
        }
        Ok(())
    }

    async fn data(&mut self, id: u32, payload: Bytes, fin: bool) -> Result<(), ReadError> {
        let Some(stream) = self.streams.get(&id) else {
            // What was under way when we reset a stream is not the peer's fault.
            if id > self.last.load(Ordering::Relaxed) || id.is_multiple_of(2) {
                return self.control(Control::Reset(id, Reset::InvalidStream)).await;
            }
            return Ok(());
        };
        if stream.ended.is_cancelled() {
            return self.break_off(id, Reset::AlreadyClosed).await;
        }
        if !payload.is_empty() {
            if !self.grants.has_room() && !self.watch.wait_for(self.grants.room()).await {
                return Err(ReadError::Gone);
            }
            self.grants.arrived(payload.len());
            while !stream.pipe.try_push(&payload) {
                if !self.watch.wait_for(stream.pipe.ready()).await {
                    return Err(ReadError::Gone);
                }
            }
        }
        if fin {
            stream.pipe.close();
            stream.ended.cancel();
        }
        Ok(())
    }

    /// Resets a stream from our side and forgets it.
    async fn break_off(&mut self, id: u32, status: Reset) -> Result<(), ReadError> {
        self.remove(id, io::ErrorKind::ConnectionAborted);
        self.control(Control::Reset(id, status)).await
    }

    fn remove(&mut self, id: u32, kind: io::ErrorKind) {
        if let Some(stream) = self.streams.remove(&id) {
            stream.finished.store(true, Ordering::Release);
            stream.pipe.reset(kind);
            // Also one whose peer had ended its own direction before.
            stream.reset.cancel();
            stream.ended.cancel();
            self.windows.remove(id);
        }
    }

    /// Forgets the streams that have ended in both directions.
    fn forget_ended(&mut self) {
        let windows = &self.windows;
        self.streams.retain(|&id, stream| {
            let ended = stream.ended.is_cancelled() && stream.finished.load(Ordering::Acquire);
            if ended {
                windows.remove(id);
            }
            !ended
        });
    }

    async fn control(&mut self, control: Control) -> Result<(), ReadError> {
        let mut sent = true;
        let send = async { sent = self.control.send(control).await.is_ok() };
        if self.watch.wait_for(send).await && sent { Ok(()) } else { Err(ReadError::Gone) }
    }
}

struct Writer<T> {
    io: WriteHalf<T>,
    control: mpsc::Receiver<Control>,
    data: mpsc::Receiver<Out>,
    grants: Arc<Grants>,
    blocks: EmptyBlocks,
    last: Arc<AtomicU32>,
}

impl<T: AsyncWrite> Writer<T> {
    async fn run(mut self, finish: &CancellationToken) -> io::Result<()> {
        let mut buffer = BytesMut::new();
        frame::window_update(&mut buffer, 0, flow::SESSION - flow::INITIAL);
        loop {
            // Without waiting, as long as there is something and the buffer is not full.
            if buffer.len() < GATHER {
                if let Ok(control) = self.control.try_recv() {
                    if self.encode_control(&mut buffer, control) {
                        break;
                    }
                    continue;
                }
                self.grants
                    .take_due(|stream, delta| frame::window_update(&mut buffer, stream, delta));
                if let Ok(out) = self.data.try_recv() {
                    encode(&mut buffer, out);
                    continue;
                }
            }
            if !buffer.is_empty() {
                self.io.write_all_buf(&mut buffer).await?;
                if buffer.capacity() > 2 * GATHER {
                    buffer = BytesMut::new();
                }
                continue;
            }
            self.io.flush().await?;
            tokio::select! {
                // What keeps the session going before data, and the end after all of it.
                biased;
                Some(control) = self.control.recv() => {
                    if self.encode_control(&mut buffer, control) {
                        break;
                    }
                }
                () = self.grants.due.notified() => {}
                Some(out) = self.data.recv() => encode(&mut buffer, out),
                () = finish.cancelled() => {
                    frame::goaway(&mut buffer, self.last.load(Ordering::Relaxed), Away::Ok);
                    break;
                }
            }
        }
        self.io.write_all_buf(&mut buffer).await?;
        self.io.flush().await?;
        self.io.shutdown().await
    }

    /// True when that was the last frame.
    fn encode_control(&mut self, buffer: &mut BytesMut, control: Control) -> bool {
        match control {
            Control::Reply(id) => {
                let block = self.blocks.next();
                frame::syn_reply(buffer, id, &block);
            }
            Control::Reset(id, status) => frame::rst_stream(buffer, id, status),
            Control::Pong(id) => frame::ping(buffer, id),
            Control::Refuse => {
                frame::goaway(buffer, self.last.load(Ordering::Relaxed), Away::Protocol);
                return true;
            }
        }
        false
    }
}

fn encode(buffer: &mut BytesMut, out: Out) {
    match out {
        Out::Frame(frame) => buffer.extend_from_slice(&frame),
        Out::Fin(id) => frame::fin(buffer, id),
        Out::Reset(id) => frame::rst_stream(buffer, id, Reset::Cancel),
    }
}

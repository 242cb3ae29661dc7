//! The way from the backend to the client: each write becomes one frame in a short queue that the
//! connection's writer empties. While the queue is full, or the peer's window is used up, writing waits.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::AsyncWrite;
use tokio::sync::mpsc;
use tokio_util::sync::PollSender;

use crate::spdy::flow::SendWindows;

/// The most payload that one frame carries.
pub(crate) const CHUNK: usize = 32 * 1024;
/// Frames that wait for the connection; a full queue makes the streams' writers wait in turn.
pub(crate) const QUEUE: usize = 8;

/// What the connection's writer is to send, in order.
#[derive(Debug)]
pub(crate) enum Out {
    /// A frame (SPDY: with its header) or message (WebSocket: with its channel).
    Frame(Bytes),
    /// The end of our direction of a stream.
    Fin(u32),
    /// The end of a stream that broke.
    Reset(u32),
}

/// How a write is put into a frame.
#[derive(Clone)]
pub(crate) enum Framing {
    /// A SPDY DATA frame, within the peer's windows.
    Spdy(Arc<SendWindows>),
    /// The channel's number as a byte, then the data.
    Binary,
    /// The channel's number as a digit, then the data in base64.
    Base64,
}

/// Our direction of one stream. Clones are the same stream.
#[derive(Clone)]
pub(crate) struct Outbound {
    id: u32,
    framing: Framing,
    queue: PollSender<Out>,
    finished: Arc<AtomicBool>,
}

impl Outbound {
    pub(crate) fn new(id: u32, framing: Framing, queue: mpsc::Sender<Out>) -> Self {
        Self { id, framing, queue: PollSender::new(queue), finished: Arc::default() }
    }

    /// True once our direction has ended: later writes fail. Shared with every clone.
    pub(crate) fn finished(&self) -> Arc<AtomicBool> {
        self.finished.clone()
    }

    /// Ends our direction after what was written before, unless that is done. A connection that is
    /// gone is no error: there is nobody left to tell.
    pub(crate) async fn finish(&mut self) {
        let _ = tokio::io::AsyncWriteExt::shutdown(self).await;
    }

    /// Breaks the stream off after what was written before, unless it has ended.
    pub(crate) async fn reset(&mut self) {
        if !self.finished.swap(true, Ordering::AcqRel)
            && std::future::poll_fn(|cx| self.queue.poll_reserve(cx)).await.is_ok()
        {
            let _ = self.queue.send_item(Out::Reset(self.id));
        }
    }

    /// Sends a message without data, which tells a WebSocket client that the session has begun.
    pub(crate) async fn send_empty(&mut self) {
        let frame = self.frame(&[]);
        if std::future::poll_fn(|cx| self.queue.poll_reserve(cx)).await.is_ok() {
            let _ = self.queue.send_item(Out::Frame(frame));
        }
    }

    fn frame(&self, data: &[u8]) -> Bytes {
        match &self.framing {
            Framing::Spdy(_) => {
                let mut frame = BytesMut::with_capacity(8 + data.len());
                frame.put_u32(self.id);
                frame.put_u32(data.len() as u32);
                frame.put_slice(data);
                frame.freeze()
            }
            Framing::Binary => {
                let mut frame = BytesMut::with_capacity(1 + data.len());
                frame.put_u8(self.id as u8);
                frame.put_slice(data);
                frame.freeze()
            }
            Framing::Base64 => {
                let mut text = String::with_capacity(1 + data.len().div_ceil(3) * 4);
                text.push(char::from(b'0' + self.id as u8));
                STANDARD.encode_string(data, &mut text);
                text.into()
            }
        }
    }
}

impl AsyncWrite for Outbound {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if self.finished.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        ready!(self.queue.poll_reserve(cx)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        let mut count = data.len().min(CHUNK);
        if let Framing::Spdy(windows) = &self.framing {
            match windows.poll_take(self.id, count, cx) {
                Poll::Ready(Ok(granted)) => count = granted,
                // The place in the queue is others' while this stream waits for its window.
                Poll::Ready(Err(error)) => {
                    self.queue.abort_send();
                    return Poll::Ready(Err(error));
                }
                Poll::Pending => {
                    self.queue.abort_send();
                    return Poll::Pending;
                }
            }
        }
        let frame = self.frame(&data[..count]);
        self.queue.send_item(Out::Frame(frame)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's writer flushes whenever it has nothing more to send.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.finished.load(Ordering::Acquire) {
            return Poll::Ready(Ok(()));
        }
        ready!(self.queue.poll_reserve(cx)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        if self.finished.swap(true, Ordering::AcqRel) {
            self.queue.abort_send();
            return Poll::Ready(Ok(()));
        }
        let id = self.id;
        self.queue.send_item(Out::Fin(id)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        Poll::Ready(Ok(()))
    }
}

//! The way from the client to the backend: a buffer of bounded size with an end that tells a closed
//! stream from a broken one.
//!
//! The writer is the connection's reader: while one pipe is full it waits, and so nothing more is read
//! from the peer. When the backend drops its end, what still arrives is thrown away.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, ReadBuf};

/// How much of one stream may wait for the backend. A peer that ignores flow control windows (all
/// Kubernetes' SPDY clients do) stalls its connection when a stream reaches it.
pub(crate) const CAPACITY: usize = 256 * 1024;

/// A buffer that was used for bulk data is given back when it is empty.
const KEEP: usize = 16 * 1024;

/// Told about bytes that have left the pipe, read or thrown away.
pub(crate) trait Consumed: Send + Sync {
    fn consumed(&self, bytes: usize);
}

#[derive(Clone, Copy)]
enum End {
    Open,
    Closed,
    Broken(io::ErrorKind),
}

struct State {
    buffer: BytesMut,
    end: End,
    reader_gone: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

struct Pipe {
    state: Mutex<State>,
    hook: Option<Box<dyn Consumed>>,
}

impl Pipe {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is valid after each statement that changes it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn consumed(&self, bytes: usize) {
        if let (Some(hook), true) = (&self.hook, bytes > 0) {
            hook.consumed(bytes);
        }
    }
}

/// The connection's end. Dropping it breaks the stream.
pub(crate) struct PipeWriter(Arc<Pipe>);
/// The backend's end.
pub(crate) struct PipeReader(Arc<Pipe>);

pub(crate) fn pipe(hook: Option<Box<dyn Consumed>>) -> (PipeWriter, PipeReader) {
    let state = State {
        buffer: BytesMut::new(),
        end: End::Open,
        reader_gone: false,
        reader: None,
        writer: None,
    };
    let pipe = Arc::new(Pipe { state: Mutex::new(state), hook });
    (PipeWriter(pipe.clone()), PipeReader(pipe))
}

impl PipeWriter {
    /// Appends `data` if the pipe is not full; one piece may overshoot the capacity by its own size.
    /// False means that the pipe is full: wait for [`PipeWriter::ready`] and try again.
    pub(crate) fn try_push(&self, data: &[u8]) -> bool {
        let mut state = self.0.lock();
        if state.reader_gone || !matches!(state.end, End::Open) {
            drop(state);
            self.0.consumed(data.len());
            return true;
        }
        if state.buffer.len() >= CAPACITY {
            return false;
        }
        state.buffer.extend_from_slice(data);
        let reader = state.reader.take();
        drop(state);
        reader.into_iter().for_each(Waker::wake);
        true
    }

    /// Waits until [`PipeWriter::try_push`] will take something.
    pub(crate) async fn ready(&self) {
        poll_fn(|cx| {
            let mut state = self.0.lock();
            if state.reader_gone || state.buffer.len() < CAPACITY {
                return Poll::Ready(());
            }
            state.writer = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Ends the stream in order: the reader gets what is there, then the end.
    pub(crate) fn close(&self) {
        self.end(End::Closed);
    }

    /// Breaks a stream that has not ended in order: what is buffered is dropped and the reader gets the
    /// error at once. One that has ended is complete, whatever happens to its connection.
    pub(crate) fn reset(&self, kind: io::ErrorKind) {
        self.end(End::Broken(kind));
    }

    fn end(&self, end: End) {
        let mut state = self.0.lock();
        if !matches!(state.end, End::Open) {
            return;
        }
        state.end = end;
        let mut dropped = 0;
        if let End::Broken(_) = end {
            dropped = state.buffer.len();
            state.buffer = BytesMut::new();
        }
        let wakers = [state.reader.take(), state.writer.take()];
        drop(state);
        wakers.into_iter().flatten().for_each(Waker::wake);
        self.0.consumed(dropped);
    }
}

impl Drop for PipeWriter {
    fn drop(&mut self) {
        // Not ended in order: the connection went away under it.
        self.reset(io::ErrorKind::ConnectionAborted);
    }
}

impl AsyncRead for PipeReader {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = self.0.lock();
        if let End::Broken(kind) = state.end {
            return Poll::Ready(Err(kind.into()));
        }
        if state.buffer.is_empty() {
            if matches!(state.end, End::Closed) || into.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            state.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let count = state.buffer.len().min(into.remaining());
        into.put_slice(&state.buffer[..count]);
        state.buffer.advance(count);
        if state.buffer.is_empty() && state.buffer.capacity() > KEEP {
            state.buffer = BytesMut::new();
        }
        let writer = if state.buffer.len() < CAPACITY { state.writer.take() } else { None };
        drop(state);
        writer.into_iter().for_each(Waker::wake);
        self.0.consumed(count);
        Poll::Ready(Ok(()))
    }
}

impl Drop for PipeReader {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.reader_gone = true;
        let dropped = state.buffer.len();
        state.buffer = BytesMut::new();
        let writer = state.writer.take();
        drop(state);
        writer.into_iter().for_each(Waker::wake);
        self.0.consumed(dropped);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::AsyncReadExt;

    use super::*;

    struct Count(Arc<AtomicUsize>);
    impl Consumed for Count {
        fn consumed(&self, bytes: usize) {
            self.0.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn a_full_pipe_takes_nothing_until_it_is_read() {
        let (writer, mut reader) = pipe(None);
        assert!(writer.try_push(&vec![1; CAPACITY]));
        assert!(!writer.try_push(b"x"));
        let mut some = [0; 10];
        reader.read_exact(&mut some).await.unwrap();
        writer.ready().await;
        assert!(writer.try_push(b"end"));
        writer.close();
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest.len(), CAPACITY - 10 + 3);
        assert!(rest.ends_with(b"end"));
    }

    #[tokio::test]
    async fn a_broken_stream_is_not_an_ended_one() {
        let (writer, mut reader) = pipe(None);
        assert!(writer.try_push(b"half"));
        drop(writer);
        let error = reader.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);

        let (writer, mut reader) = pipe(None);
        assert!(writer.try_push(b"whole"));
        writer.close();
        writer.reset(io::ErrorKind::ConnectionReset);
        drop(writer);
        let mut all = Vec::new();
        reader.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"whole");
    }

    #[tokio::test]
    async fn every_byte_is_counted_once_however_it_leaves() {
        let total = Arc::new(AtomicUsize::new(0));
        let (writer, mut reader) = pipe(Some(Box::new(Count(total.clone()))));
        assert!(writer.try_push(&[0; 100]));
        let mut some = [0; 30];
        reader.read_exact(&mut some).await.unwrap();
        assert_eq!(total.load(Ordering::Relaxed), 30);
        drop(reader);
        assert_eq!(total.load(Ordering::Relaxed), 100);
        assert!(writer.try_push(&[0; 7]));
        assert_eq!(total.load(Ordering::Relaxed), 107);

        let total = Arc::new(AtomicUsize::new(0));
        let (writer, _reader) = pipe(Some(Box::new(Count(total.clone()))));
        assert!(writer.try_push(&[0; 5]));
        writer.reset(io::ErrorKind::ConnectionReset);
        writer.reset(io::ErrorKind::ConnectionReset);
        assert_eq!(total.load(Ordering::Relaxed), 5);
    }
}

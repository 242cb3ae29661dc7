//! A client's connection: TCP with or without TLS, and when anything last moved on it.

use std::future::Future;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use rustix::event::{PollFd, PollFlags};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;

enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// When bytes last moved on a connection, and whether its peer is still there.
#[derive(Clone)]
pub(crate) struct Watch {
    start: Instant,
    last: Arc<AtomicU64>,
    socket: Option<Arc<OwnedFd>>,
}

impl Watch {
    pub(crate) fn new(socket: Option<OwnedFd>) -> Self {
        Self { start: Instant::now(), last: Arc::default(), socket: socket.map(Arc::new) }
    }

    fn moved(&self) {
        self.last.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Resolves when nothing has moved for `limit`.
    pub(crate) async fn idle(&self, limit: Duration) {
        loop {
            let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
            let until = self.start + last + limit;
            if until <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }

    /// Waits for `room`, or returns false when the peer goes away meanwhile. A connection that is not
    /// read does not show its end, so the socket is asked once a second.
    pub(crate) async fn wait_for(&self, room: impl Future<Output = ()>) -> bool {
        tokio::pin!(room);
        loop {
            tokio::select! {
                // Room first: what a peer sent before it left is still delivered if there is a place.
                biased;
                () = &mut room => return true,
                () = tokio::time::sleep(Duration::from_secs(1)) => {
                    if self.hung_up() {
                        return false;
                    }
                }
            }
        }
    }

    fn hung_up(&self) -> bool {
        let Some(socket) = &self.socket else { return false };
        let flags = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut fds = [PollFd::new(socket, flags)];
        let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(rustix::event::poll(&mut fds, Some(&zero)), Ok(1))
            && fds[0].revents().intersects(flags)
    }
}

/// A connection of either kind. Bytes that the HTTP parser had read ahead come first.
pub(crate) struct Conn {
    io: Io,
    ahead: Bytes,
    watch: Watch,
}

impl Conn {
    pub(crate) fn plain(stream: TcpStream, watch: Watch) -> Self {
        Self { io: Io::Plain(stream), ahead: Bytes::new(), watch }
    }

    pub(crate) fn tls(stream: TlsStream<TcpStream>, watch: Watch) -> Self {
        Self { io: Io::Tls(Box::new(stream)), ahead: Bytes::new(), watch }
    }

    pub(crate) fn with_ahead(mut self, ahead: Bytes) -> Self {
        self.ahead = ahead;
        self
    }

    pub(crate) fn watch(&self) -> Watch {
        self.watch.clone()
    }
}

impl AsyncRead for Conn {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.ahead.is_empty() {
            let count = self.ahead.len().min(into.remaining());
            into.put_slice(&self.ahead[..count]);
            self.ahead.advance(count);
            return Poll::Ready(Ok(()));
        }
        let before = into.filled().len();
        let result = match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_read(cx, into),
            Io::Tls(stream) => Pin::new(stream).poll_read(cx, into),
        };
        if into.filled().len() > before {
            self.watch.moved();
        }
        result
    }
}

impl AsyncWrite for Conn {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_write(cx, data),
            Io::Tls(stream) => Pin::new(stream).poll_write(cx, data),
        };
        if matches!(result, Poll::Ready(Ok(1..))) {
            self.watch.moved();
        }
        result
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, data),
            Io::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, data),
        };
        if matches!(result, Poll::Ready(Ok(1..))) {
            self.watch.moved();
        }
        result
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(stream) => stream.is_write_vectored(),
            Io::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Io::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

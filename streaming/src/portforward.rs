//! Port-forward: many connections to a pod's ports in one session.
//!
//! Over SPDY each connection is a pair of streams that share a `requestid`: data both ways, and error
//! towards the client. Over WebSocket channels the request names the ports, and each has two channels;
//! the first message of each is its port, two bytes, little-endian. Our own v5 of that adds the close
//! signal in both directions, so that half-close is kept.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_tungstenite::WebSocketStream;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::backend::{Backend, PortForwardRequest};
use crate::conn::{Conn, Watch};
use crate::outbound::Outbound;
use crate::pipe::PipeReader;
use crate::remotecommand::link;
use crate::server::Limits;
use crate::spdy::{Session, Stream};
use crate::websocket::{Channels, Codec, Rules};

/// Of SPDY.
pub(crate) const SPDY_PROTOCOLS: [&str; 1] = ["portforward.k8s.io"];
/// SPDY in the messages of a WebSocket.
pub(crate) const TUNNEL_PROTOCOL: &str = "SPDY/3.1+portforward.k8s.io";
/// Of WebSocket, best first; a client that names none speaks binary channels.
pub(crate) const WEBSOCKET_PROTOCOLS: [&str; 5] =
    [TUNNEL_PROTOCOL, "v5.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io", ""];
/// Each port has two channels, and the number of a channel is a byte of which 255 is taken.
pub(crate) const MAX_CHANNEL_PORTS: usize = 100;

/// How long the client may leave its direction open after a connection has ended.
const SETTLE: Duration = Duration::from_secs(30);

/// A client's connection as the backend sees it.
struct Forwarded {
    reader: PipeReader,
    writer: Outbound,
}

impl AsyncRead for Forwarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, into)
    }
}

impl AsyncWrite for Forwarded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, data)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}

/// Runs one connection and tells the client how it ended: an end in order is the end of the data, a
/// failure a text on `error` and data that break off.
async fn forward<B: Backend>(
    backend: &B,
    pod: &str,
    port: u16,
    (reader, mut writer): (PipeReader, Outbound),
    mut error: Outbound,
    broken: impl Future<Output = ()>,
) {
    let stream = Box::new(Forwarded { reader, writer: writer.clone() });
    tokio::select! {
        biased;
        result = backend.port_forward(pod, port, stream) => match result {
            Ok(()) => writer.finish().await,
            Err(text) => {
                debug!(pod, port, error = text, "a forwarded connection failed");
                let _ = error.write_all(text.as_bytes()).await;
                writer.reset().await;
            }
        },
        () = broken => {}
    }
    error.finish().await;
}

/// Streams of a connection that has not all of its two yet.
struct Half {
    since: Instant,
    data: Option<Stream>,
    error: Option<Stream>,
}

/// Serves one session over SPDY.
pub(crate) async fn spdy<B: Backend>(
    mut session: Session,
    request: PortForwardRequest,
    backend: Arc<B>,
    limits: Limits,
) {
    let closed = session.closed();
    let mut halves: HashMap<String, Half> = HashMap::new();
    let mut connections = JoinSet::new();
    loop {
        let oldest = halves.iter().min_by_key(|(_, half)| half.since);
        let oldest = oldest.map(|(id, half)| (id.clone(), half.since + limits.stream_creation));
        let expired = async {
            match &oldest {
                Some((id, until)) => {
                    tokio::time::sleep_until(*until).await;
                    id
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // What has ended is taken out first, so that a busy session does not collect it.
            biased;
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    debug!(%error, "a forwarded connection's task failed");
                }
            }
            () = closed.cancelled() => break,
            id = expired => {
                if let Some(half) = halves.remove(id) {
                    for stream in [half.data, half.error].into_iter().flatten() {
                        stream.refuse().await;
                    }
                }
            }
            stream = session.next() => {
                let Some(stream) = stream else { break };
                let Some((id, port, data)) = identify(&stream) else {
                    stream.refuse().await;
                    continue;
                };
                let half = halves.entry(id.clone()).or_insert_with(|| Half {
                    since: Instant::now(),
                    data: None,
                    error: None,
                });
                let place = if data { &mut half.data } else { &mut half.error };
                if place.is_some() {
                    stream.refuse().await;
                    continue;
                }
                stream.accept().await;
                *place = Some(stream);
                if half.data.is_none() || half.error.is_none() {
                    continue;
                }
                let Some(Half { data: Some(data), error: Some(error), .. }) = halves.remove(&id) else {
                    continue;
                };
                let (backend, pod, closed) = (backend.clone(), request.pod.clone(), closed.clone());
                connections.spawn(async move {
                    let handles = [data.handle(), error.handle()];
                    let broken = {
                        let reset = data.reset.clone();
                        async move {
                            tokio::select! {
                                () = reset.cancelled() => {}
                                () = closed.cancelled() => {}
                            }
                        }
                    };
                    forward(&*backend, &pod, port, (data.reader, data.writer), error.writer, broken).await;
                    for handle in handles {
                        handle.settle(SETTLE).await;
                    }
                });
            }
        }
    }
    connections.shutdown().await;
    session.close().await;
}

/// The request, the port, and whether it is the data stream. Clients of old send no request id: their
/// error stream's id is that, and the data stream is the next one.
fn identify(stream: &Stream) -> Option<(String, u16, bool)> {
    let port = stream.headers.get("port")?.parse().ok().filter(|port| *port > 0)?;
    let data = match stream.headers.get("streamtype")? {
        "data" => true,
        "error" => false,
        _ => return None,
    };
    let id = match stream.headers.get("requestid") {
        Some(id) if !id.is_empty() => id.to_owned(),
        _ => format!("stream {}", if data { stream.id.checked_sub(2)? } else { stream.id }),
    };
    Some((id, port, data))
}

/// Serves one session over WebSocket channels; `protocol` is one of [`WEBSOCKET_PROTOCOLS`] but the
/// tunnel, and the request has ports.
pub(crate) async fn websocket<B: Backend>(
    socket: WebSocketStream<Conn>,
    watch: Watch,
    protocol: &str,
    request: PortForwardRequest,
    backend: Arc<B>,
    stop: CancellationToken,
) {
    let base64 = protocol.contains("base64.");
    let rules = Rules {
        codec: if base64 { Codec::Base64 } else { Codec::Binary },
        signals: protocol.starts_with("v5."),
        announces: protocol.starts_with("v5."),
        close_ends: false,
    };
    let inbound: Vec<u32> = (0..request.ports.len() as u32).map(|index| 2 * index).collect();
    let (channels, readers) = Channels::start_many(socket, watch, rules, &inbound);
    let closed = channels.closed();
    let _stop = link(stop, closed.clone());
    let mut connections = JoinSet::new();
    for ((&port, reader), channel) in request.ports.iter().zip(readers).zip(inbound) {
        let (mut data, mut error) = (channels.outbound(channel), channels.outbound(channel + 1));
        let (backend, pod, closed) = (backend.clone(), request.pod.clone(), closed.clone());
        connections.spawn(async move {
            let begun = data.write_all(&port.to_le_bytes()).await.is_ok()
                && error.write_all(&port.to_le_bytes()).await.is_ok();
            if begun {
                let broken = async move { closed.cancelled().await };
                forward(&*backend, &pod, port, (reader, data), error, broken).await;
            }
        });
    }
    while connections.join_next().await.is_some() {}
    channels.close().await;
}

//! What the server needs from the daemon, and what it hands to it.

use std::future::Future;

use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The exit code of a process, as the container's runtime reports it (128 + n for signal n).
pub type ExitCode = i32;

/// A command to run in a container: the CRI's ExecRequest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecRequest {
    /// The container's id, as the caller of the CRI gave it.
    pub container: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Whether the process gets a terminal; then there is no separate stderr.
    pub tty: bool,
    /// Whether stdin is connected.
    pub stdin: bool,
    /// Whether stdout is connected.
    pub stdout: bool,
    /// Whether stderr is connected.
    pub stderr: bool,
}

/// A connection to a container's own process: the CRI's AttachRequest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachRequest {
    /// The container's id, as the caller of the CRI gave it.
    pub container: String,
    /// Whether the container has a terminal; then there is no separate stderr.
    pub tty: bool,
    /// Whether stdin is connected.
    pub stdin: bool,
    /// Whether stdout is connected.
    pub stdout: bool,
    /// Whether stderr is connected.
    pub stderr: bool,
}

/// Connections to ports of a pod: the CRI's PortForwardRequest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortForwardRequest {
    /// The pod's id, as the caller of the CRI gave it.
    pub pod: String,
    /// The ports that may be forwarded; empty means that the client names them (SPDY can, WebSocket
    /// channels cannot).
    pub ports: Vec<u16>,
}

/// What flows from the client.
pub type Input = Box<dyn AsyncRead + Send + Unpin>;
/// What flows to the client.
pub type Output = Box<dyn AsyncWrite + Send + Unpin>;

/// Both directions of one forwarded connection.
///
/// Reading ends (0 bytes) when the client has ended its direction; `shutdown` ends ours. An error
/// from reading means that the client broke the connection off.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + ?Sized> Duplex for T {}

/// A terminal's size in character cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Size {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// The sizes that the client's terminal takes. Only the newest one is kept: a backend that is slow to
/// apply one, or never looks, holds nothing up.
#[derive(Debug)]
pub struct Resizes(pub(crate) watch::Receiver<Option<Size>>);

impl Resizes {
    /// The next size, or `None` when there will be no more. Can be dropped and called again.
    pub async fn next(&mut self) -> Option<Size> {
        self.0.changed().await.ok()?;
        *self.0.borrow_and_update()
    }
}

/// The client's ends of an exec or attach. A stream that was not asked for is `None`.
pub struct Streams {
    /// From the client. Ends when the client closes it; an error means that the client is gone, which
    /// is not the same: what was read so far is not all there was to be.
    pub stdin: Option<Input>,
    /// To the client. The server ends it when the backend returns; until then `shutdown` does.
    pub stdout: Option<Output>,
    /// To the client; never with a terminal.
    pub stderr: Option<Output>,
    /// Sizes of the client's terminal; only with a terminal.
    pub resizes: Option<Resizes>,
    /// Fires when the client has gone or the session's time is up. The backend is expected to return
    /// within [`Limits::wind_up`](crate::Limits::wind_up); after that its future is dropped.
    pub closed: CancellationToken,
}

/// What the streams are connected to: the daemon, or a test.
///
/// An `Err` is the text that the user sees.
pub trait Backend: Send + Sync + 'static {
    /// Runs a command in a container; returns when it has exited and all its output has been written.
    fn exec(
        &self,
        request: ExecRequest,
        streams: Streams,
    ) -> impl Future<Output = Result<ExitCode, String>> + Send;

    /// Connects to a container's process; returns when that has exited, or `streams.closed` fires.
    fn attach(
        &self,
        request: AttachRequest,
        streams: Streams,
    ) -> impl Future<Output = Result<(), String>> + Send;

    /// Connects to a port of a pod and copies both ways until both directions have ended: the end of
    /// one is passed on (`shutdown`) and leaves the other open.
    ///
    /// The future is dropped when the client breaks the connection off; that must close the pod's end.
    /// Note for `Err`: kubectl ends its whole session when one connection reports an error text, so an
    /// error is for a connection that could not be made or broke, not for a peer's orderly end.
    fn port_forward(
        &self,
        pod: &str,
        port: u16,
        stream: Box<dyn Duplex>,
    ) -> impl Future<Output = Result<(), String>> + Send;
}

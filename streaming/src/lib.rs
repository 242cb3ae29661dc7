//! Exec, attach and port-forward: the HTTP server behind the URLs that the CRI's Exec, Attach and
//! PortForward return, and the client that our own command line uses for them.
//!
//! This crate owns the protocols and nothing else: who may connect (single-use tokens), SPDY/3.1,
//! WebSocket, the `*.channel.k8s.io` and `portforward.k8s.io` protocols on top of them, flow control,
//! half-close and time limits. What a stream is connected to is the [`Backend`]'s.
//!
//! ```text
//!   kubelet, crictl                                            daemon
//!        |  HTTP Upgrade  /exec|attach|portforward/TOKEN          ^
//!        v                                                        | Backend
//!   server.rs --+-- spdy/ (frames, header blocks, session) --+-- remotecommand.rs
//!   tokens.rs   +-- websocket.rs (channels) -----------------+-- portforward.rs
//!   conn.rs     +-- websocket.rs (SPDY tunnelled) -> spdy/ --+
//!                        pipe.rs: client -> backend, bounded; outbound.rs: backend -> client, bounded
//! ```
//!
//! Memory: what a peer sends waits in a pipe of fixed size, and while that is full nothing more
//! is read from its connection; what we send waits in a queue of a few frames. A session thus costs
//! a bounded amount whatever its peer does, and its peer can stall or break that session only.
//!
//! One failed stream never ends a session. A session ends when its work is done, when the peer is
//! gone, or when nothing at all moved for [`Limits::idle`].

mod backend;
pub mod client;
mod conn;
mod outbound;
mod pipe;
mod portforward;
mod remotecommand;
mod server;
mod spdy;
mod status;
mod tokens;
mod websocket;

pub use backend::{AttachRequest, Backend, Duplex, ExecRequest, ExitCode, PortForwardRequest};
pub use backend::{Input, Output, Resizes, Size, Streams};
pub use server::{Config, Error, Limits, Server, Tls};

/// What the fuzz targets call: each takes any bytes, and must neither panic nor use more memory than a
/// session may.
#[cfg(feature = "fuzzing")]
pub mod fuzzing {
    pub use crate::spdy::fuzz_frames as spdy_frames;
    pub use crate::websocket::fuzz_messages as websocket_messages;
}

//! CRI clients over a unix socket.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use holdfast_protos::{
    admin::admin_client::AdminClient,
    cri::{image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient},
};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

/// The kubelet's own limit of a message.
const MESSAGE_LIMIT: usize = 16 << 20;

/// The runtime service of a socket.
pub type Runtime = RuntimeServiceClient<Channel>;
/// The image service of a socket.
pub type Images = ImageServiceClient<Channel>;
/// Our own service of a socket.
pub type Admin = AdminClient<Channel>;

/// A CRI socket. Every call of [`Cri::runtime`] and the others dials anew, so that a handle outlives
/// the daemon that it was made with.
#[derive(Clone, Debug)]
pub struct Cri {
    socket: PathBuf,
    deadline: Duration,
    window: Option<u32>,
}

impl Cri {
    /// A socket; calls have two minutes, as the kubelet gives them.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), deadline: Duration::from_secs(120), window: None }
    }

    /// The same with another deadline for each call.
    pub fn deadline(&self, deadline: Duration) -> Self {
        Self { deadline, ..self.clone() }
    }

    /// The same with flow control windows of that many bytes, for each stream and for the whole
    /// connection: what a server may send to a client that does not read.
    pub fn window(&self, bytes: u32) -> Self {
        Self { window: Some(bytes), ..self.clone() }
    }

    /// Path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Dials when the first call is made.
    pub fn channel(&self) -> Channel {
        let socket = self.socket.clone();
        Endpoint::from_static("http://localhost")
            .timeout(self.deadline)
            .initial_stream_window_size(self.window)
            .initial_connection_window_size(self.window)
            .connect_with_connector_lazy(service_fn(move |_| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }))
    }

    /// A client of the runtime service.
    pub fn runtime(&self) -> Runtime {
        Runtime::new(self.channel())
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT)
    }

    /// A client of the image service.
    pub fn images(&self) -> Images {
        Images::new(self.channel()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    /// A client of our own service.
    pub fn admin(&self) -> Admin {
        Admin::new(self.channel())
    }
}

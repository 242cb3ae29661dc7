//! Sending blobs and manifests (distribution-spec, "Push").

use std::{
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures::TryStreamExt;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Method, StatusCode,
    body::Frame,
    header::{self, HeaderMap, HeaderValue},
};
use tokio_util::io::ReaderStream;
use url::Url;

use super::{Error, Remote, Server, protocol, show};
use crate::id::Digest;

/// The body of a request.
pub(super) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Bytes of a body that were taken to be sent.
pub type Sent = Arc<AtomicU64>;

/// Piece of a file that is read at a time, in bytes.
const PIECE: usize = 256 << 10;

/// A body that is in memory.
pub(super) fn full(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// What a request sends. It can be sent again.
#[derive(Clone)]
pub enum Payload {
    /// Nothing.
    None,
    /// A document.
    Bytes(Bytes),
    /// A file from its beginning, and what is told how much of it was taken.
    File(Arc<File>, u64, Sent),
}

impl Payload {
    /// A new body, and the count of what is taken of it.
    pub(super) async fn body(&self) -> io::Result<(Body, Sent)> {
        match self {
            Payload::None => Ok((full(Bytes::new()), Sent::default())),
            Payload::Bytes(bytes) => Ok((full(bytes.clone()), Sent::default())),
            Payload::File(file, _, sent) => {
                sent.store(0, Ordering::Relaxed);
                let counted = sent.clone();
                let pieces = ReaderStream::with_capacity(Positioned::new(file.clone()), PIECE)
                    .map_ok(move |piece| {
                        counted.fetch_add(piece.len() as u64, Ordering::Relaxed);
                        Frame::data(piece)
                    });
                Ok((StreamBody::new(pieces).boxed_unsync(), sent.clone()))
            }
        }
    }

    fn length(&self) -> u64 {
        match self {
            Payload::None => 0,
            Payload::Bytes(bytes) => bytes.len() as u64,
            Payload::File(_, length, _) => *length,
        }
    }
}

/// A file read from an offset of our own: a body that is sent again must not move another's.
struct Positioned {
    file: Arc<File>,
    offset: u64,
    reading: Option<tokio::task::JoinHandle<io::Result<Vec<u8>>>>,
}

impl Positioned {
    fn new(file: Arc<File>) -> Self {
        Self { file, offset: 0, reading: None }
    }
}

impl tokio::io::AsyncRead for Positioned {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        use std::{future::Future, os::unix::fs::FileExt, pin::Pin, task::Poll};
        let this = &mut *self;
        let reading = this.reading.get_or_insert_with(|| {
            let (file, offset, most) = (this.file.clone(), this.offset, buffer.remaining());
            tokio::task::spawn_blocking(move || {
                let mut piece = vec![0; most.min(PIECE)];
                let length = file.read_at(&mut piece, offset)?;
                piece.truncate(length);
                Ok(piece)
            })
        });
        let read = match Pin::new(reading).poll(context) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(read) => read,
        };
        this.reading = None;
        let piece = read.map_err(io::Error::other)??;
        // The same buffer, or one as large, comes with each poll of a reader.
        let length = piece.len().min(buffer.remaining());
        buffer.put_slice(&piece[..length]);
        this.offset += length as u64;
        Poll::Ready(Ok(()))
    }
}

impl Remote {
    /// The same servers, asked for more: what is pushed goes to the registry itself.
    pub fn for_push(mut self) -> Self {
        self.servers.retain(Server::takes_pushes);
        self.actions = "pull,push";
        self
    }

    /// Whether the registry has a blob.
    pub async fn has_blob(&self, digest: &Digest) -> Result<bool, Error> {
        let found = self
            .first(false, "push", |server| {
                Box::pin(async move {
                    let url = self.url(server, "blobs", &digest.to_string());
                    self.retried(server, Method::HEAD, &url, HeaderMap::new()).await
                })
            })
            .await;
        match found {
            Ok(_) => Ok(true),
            // Some registries answer so of what a token does not reach.
            Err(error) if error.is_absence() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Takes a blob over from another repository of the registry, if it lets us.
    pub async fn mount_blob(&self, digest: &Digest, from: &str) -> Result<bool, Error> {
        self.first(false, "push", |server| {
            Box::pin(async move {
                let mut url = self.url(server, "blobs", "uploads/");
                url.query_pairs_mut()
                    .append_pair("mount", &digest.to_string())
                    .append_pair("from", from);
                let answer = self.post(server, &url).await?;
                if answer.status() == StatusCode::CREATED {
                    return Ok(true);
                }
                // It began an upload instead, which nobody goes on with.
                if let Ok(location) = location(&url, answer.headers()) {
                    let none = Payload::None;
                    let headers = HeaderMap::new();
                    let _ =
                        self.authorized(server, Method::DELETE, &location, &headers, &none).await;
                }
                Ok(false)
            })
        })
        .await
    }

    /// Sends a blob.
    pub async fn put_blob(&self, digest: &Digest, payload: &Payload) -> Result<(), Error> {
        self.first(false, "push", |server| {
            Box::pin(async move {
                let mut attempt = 0;
                loop {
                    let error = match self.upload(server, digest, payload).await {
                        Ok(()) => return Ok(()),
                        Err(error) => error,
                    };
                    attempt += 1;
                    self.wait_or_fail(error, attempt).await?;
                }
            })
        })
        .await
    }

    async fn upload(
        &self,
        server: &Server,
        digest: &Digest,
        payload: &Payload,
    ) -> Result<(), Error> {
        let url = self.url(server, "blobs", "uploads/");
        let answer = self.post(server, &url).await?;
        let mut to = location(&url, answer.headers())?;
        to.query_pairs_mut().append_pair("digest", &digest.to_string());
        let mut headers = length(payload);
        let octets = HeaderValue::from_static("application/octet-stream");
        headers.insert(header::CONTENT_TYPE, octets);
        self.authorized(server, Method::PUT, &to, &headers, payload).await?;
        Ok(())
    }

    /// Sends a manifest, by a tag or its digest.
    pub async fn put_manifest(
        &self,
        object: &str,
        media_type: &str,
        manifest: Bytes,
    ) -> Result<(), Error> {
        let media_type = HeaderValue::from_str(media_type)
            .unwrap_or(HeaderValue::from_static(crate::image::save::MANIFEST));
        let (payload, media_type) = (&Payload::Bytes(manifest), &media_type);
        self.first(false, "push", |server| {
            Box::pin(async move {
                let url = self.url(server, "manifests", object);
                let mut attempt = 0;
                loop {
                    let mut headers = length(payload);
                    headers.insert(header::CONTENT_TYPE, media_type.clone());
                    let put = self.authorized(server, Method::PUT, &url, &headers, payload).await;
                    let Err(error) = put else { return Ok(()) };
                    attempt += 1;
                    self.wait_or_fail(error, attempt).await?;
                }
            })
        })
        .await
    }

    async fn post(
        &self,
        server: &Server,
        url: &Url,
    ) -> Result<hyper::Response<hyper::body::Incoming>, Error> {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        self.retried(server, Method::POST, url, headers).await
    }
}

fn length(payload: &Payload) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_LENGTH, payload.length().into());
    headers
}

/// Where an upload goes on. Elsewhere our authorisation does not go, so nothing can be sent there.
fn location(url: &Url, headers: &HeaderMap) -> Result<Url, Error> {
    let location = headers.get(header::LOCATION).and_then(|value| value.to_str().ok());
    let mut to = location
        .and_then(|location| url.join(location).ok())
        .ok_or_else(|| protocol(url, "an upload without a location"))?;
    if to.host_str() == url.host_str() && to.scheme() != url.scheme() {
        // Registries behind a proxy that ends TLS know neither its scheme nor its port.
        let _ = to.set_scheme(url.scheme());
        let _ = to.set_port(url.port());
    }
    if to.origin() != url.origin() {
        return Err(protocol(url, &format!("the upload is to go on at {}", show(&to))));
    }
    Ok(to)
}

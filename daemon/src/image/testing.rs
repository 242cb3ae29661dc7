//! For tests: archives, images, and a registry that does as it is told.

use std::{
    collections::HashMap,
    ffi::OsStr,
    io::Write as _,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::Path,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures::StreamExt;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{Method, Request, Response, StatusCode, body::Frame, header};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::id::Digest;

/// Writes archives, also such as no honest tool writes.
#[derive(Default)]
pub(super) struct Tar {
    pub out: Vec<u8>,
}

/// A header to be written.
pub(super) struct Header<'a> {
    pub path: &'a [u8],
    pub kind: u8,
    pub mode: u32,
    pub size: u64,
    pub link: &'a [u8],
    pub device: (u32, u32),
    pub mtime: i64,
    pub uid: u32,
    pub gid: u32,
}

impl Default for Header<'_> {
    fn default() -> Self {
        Self {
            path: b"",
            kind: b'0',
            mode: 0o644,
            size: 0,
            link: b"",
            device: (0, 0),
            mtime: 1_700_000_000,
            uid: 0,
            gid: 0,
        }
    }
}

impl Tar {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn header(mut self, header: &Header<'_>) -> Self {
        let mut block = [0u8; 512];
        block[..header.path.len()].copy_from_slice(header.path);
        let mut octal = |at: usize, length: usize, value: u64| {
            let text = format!("{value:0width$o}", width = length - 1);
            block[at..at + length - 1].copy_from_slice(text.as_bytes());
        };
        octal(100, 8, header.mode.into());
        octal(108, 8, header.uid.into());
        octal(116, 8, header.gid.into());
        octal(124, 12, header.size);
        octal(136, 12, header.mtime as u64);
        octal(329, 8, header.device.0.into());
        octal(337, 8, header.device.1.into());
        block[156] = header.kind;
        block[157..157 + header.link.len()].copy_from_slice(header.link);
        block[257..265].copy_from_slice(b"ustar\x0000");
        block[148..156].copy_from_slice(b"        ");
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.out.extend_from_slice(&block);
        self
    }

    pub(super) fn data(mut self, data: &[u8]) -> Self {
        self.out.extend_from_slice(data);
        self.out.resize(self.out.len().next_multiple_of(512), 0);
        self
    }

    pub(super) fn dir(self, path: &str) -> Self {
        self.header(&Header { path: path.as_bytes(), kind: b'5', mode: 0o755, ..Header::default() })
    }

    pub(super) fn file(self, path: &str, data: impl AsRef<[u8]>) -> Self {
        let data = data.as_ref();
        let size = data.len() as u64;
        self.header(&Header { path: path.as_bytes(), size, ..Header::default() }).data(data)
    }

    pub(super) fn symlink(self, path: &str, link: &str) -> Self {
        let (path, link) = (path.as_bytes(), link.as_bytes());
        self.header(&Header { path, kind: b'2', link, ..Header::default() })
    }

    pub(super) fn hard_link(self, path: &str, link: &str) -> Self {
        let (path, link) = (path.as_bytes(), link.as_bytes());
        self.header(&Header { path, kind: b'1', link, ..Header::default() })
    }

    /// Records for the next header.
    pub(super) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while rest + length.to_string().len() != length {
                length = rest + length.to_string().len();
            }
            data.extend_from_slice(format!("{length} {key}=").as_bytes());
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        let size = data.len() as u64;
        self.header(&Header { path: b"pax", kind: b'x', size, ..Header::default() }).data(&data)
    }

    pub(super) fn end(mut self) -> Vec<u8> {
        self.out.resize(self.out.len() + 1024, 0);
        self.out
    }
}

/// All that a file system knows of a tree, by path.
pub(super) fn listing(root: &Path) -> std::collections::BTreeMap<String, String> {
    fn walk(root: &Path, path: &Path, out: &mut std::collections::BTreeMap<String, String>) {
        let meta = std::fs::symlink_metadata(path).unwrap();
        let mut text = format!(
            "{:o} {}:{} {}.{:09}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec()
        );
        let kind = meta.file_type();
        if kind.is_file() {
            let data = std::fs::read(path).unwrap();
            text += &format!(" {} {}", data.len(), hex::encode(&Sha256::digest(data)[..8]));
            text += &format!(" links {}", meta.nlink());
        } else if kind.is_symlink() {
            text += &format!(" -> {:?}", std::fs::read_link(path).unwrap());
        } else if !kind.is_dir() {
            text += &format!(" device {}", meta.rdev());
        }
        let mut names = vec![0; 64 << 10];
        let length = rustix::fs::llistxattr(path, &mut names).unwrap();
        let mut names: Vec<&[u8]> = names[..length].split(|b| *b == 0).collect();
        names.sort_unstable();
        for name in names.into_iter().filter(|n| !n.is_empty()) {
            let mut value = vec![0; 64 << 10];
            let name = OsStr::from_bytes(name);
            let length = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
            text += &format!(" {name:?}={}", hex::encode(&value[..length]));
        }
        let shown = path.strip_prefix(root).unwrap();
        out.insert(format!("{shown:?}"), text);
        if kind.is_dir() {
            for entry in std::fs::read_dir(path).unwrap() {
                walk(root, &entry.unwrap().path(), out);
            }
        }
    }
    let mut out = Default::default();
    walk(root, root, &mut out);
    out
}

pub(super) fn digest(bytes: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(bytes).into())
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(super) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(super) const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// An image to be served.
#[derive(Clone)]
pub(super) struct TestImage {
    pub manifest: Vec<u8>,
    pub config: Vec<u8>,
    /// As served, from the bottom.
    pub layers: Vec<Vec<u8>>,
}

impl TestImage {
    /// Layers as plain archives; they are compressed in turn as gzip, zstd and not at all.
    pub(super) fn new(layers: &[Vec<u8>]) -> Self {
        Self::labelled(layers, "test")
    }

    pub(super) fn labelled(layers: &[Vec<u8>], label: &str) -> Self {
        let packed = layers.iter().enumerate().map(|(index, layer)| match index % 3 {
            0 => (GZIP, gzip(layer)),
            1 => (ZSTD, zstd::encode_all(layer.as_slice(), 1).unwrap()),
            _ => (PLAIN, layer.clone()),
        });
        Self::with(packed.collect(), layers.iter().map(|l| digest(l)).collect(), label)
    }

    /// Layers as they are to be served, and what their digests are said to be uncompressed.
    pub(super) fn with(layers: Vec<(&str, Vec<u8>)>, diff_ids: Vec<Digest>, label: &str) -> Self {
        let config = json!({
            "architecture": super::manifest::Platform::node().architecture,
            "os": "linux",
            "created": "2024-01-01T00:00:00Z",
            "config": {"Cmd": ["sh"], "User": "1000", "Labels": {"label": label}},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        })
        .to_string()
        .into_bytes();
        let descriptor = |media_type: &str, bytes: &[u8]| json!({"mediaType": media_type, "digest": digest(bytes), "size": bytes.len()});
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &config),
            "layers": layers.iter().map(|(t, b)| descriptor(t, b)).collect::<Vec<_>>(),
        })
        .to_string()
        .into_bytes();
        Self { manifest, config, layers: layers.into_iter().map(|(_, b)| b).collect() }
    }

    pub(super) fn id(&self) -> Digest {
        digest(&self.config)
    }

    /// As an OCI layout in a tar archive.
    pub(super) fn oci_archive(&self, name: &str) -> Vec<u8> {
        let mut tar = Tar::new().file("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#);
        for blob in self.layers.iter().chain([&self.manifest, &self.config]) {
            tar = tar.file(&format!("blobs/sha256/{}", digest(blob).hex()), blob);
        }
        let index = json!({"schemaVersion": 2, "manifests": [{
            "mediaType": MANIFEST,
            "digest": digest(&self.manifest),
            "size": self.manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": name},
        }]});
        tar.file("index.json", index.to_string()).end()
    }
}

pub(super) type Body = BoxBody<Bytes, std::io::Error>;
type Hook = Box<dyn Fn(&Request<()>) -> Option<Response<Body>> + Send + Sync>;

/// A registry on loopback, over plain HTTP. Ends when dropped.
pub(super) struct FakeRegistry {
    pub address: std::net::SocketAddr,
    state: Arc<State>,
    server: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct State {
    /// By path: media type and content.
    content: Mutex<HashMap<String, (String, Bytes)>>,
    log: Mutex<Vec<Request<()>>>,
    hook: Mutex<Option<Hook>>,
}

impl Drop for FakeRegistry {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl FakeRegistry {
    pub(super) async fn start() -> Self {
        Self::serve(None).await
    }

    /// Over HTTPS, with this certificate and key (PEM).
    pub(super) async fn start_tls(certificate: &[u8], key: &[u8]) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                rustls_pemfile::certs(&mut &*certificate).map(Result::unwrap).collect(),
                rustls_pemfile::private_key(&mut &*key).unwrap().unwrap(),
            )
            .unwrap();
        Self::serve(Some(tokio_rustls::TlsAcceptor::from(Arc::new(config)))).await
    }

    async fn serve(tls: Option<tokio_rustls::TlsAcceptor>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::<State>::default();
        let serving = state.clone();
        let server = tokio::spawn(async move {
            // Connections end with the server.
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (state, tls) = (serving.clone(), tls.clone());
                connections.spawn(async move {
                    let service = hyper::service::service_fn(move |request| {
                        let state = state.clone();
                        async move { Ok::<_, std::io::Error>(state.answer(request).await) }
                    });
                    let http = hyper::server::conn::http1::Builder::new();
                    match tls {
                        None => {
                            let stream = hyper_util::rt::TokioIo::new(stream);
                            let _ = http.serve_connection(stream, service).await;
                        }
                        Some(tls) => {
                            let Ok(stream) = tls.accept(stream).await else { return };
                            let stream = hyper_util::rt::TokioIo::new(stream);
                            let _ = http.serve_connection(stream, service).await;
                        }
                    }
                });
            }
        });
        Self { address, state, server }
    }

    /// A reference to something here.
    pub(super) fn reference(&self, rest: &str) -> String {
        format!("{}/{rest}", self.address)
    }

    /// Serves `image` as `repository:tag`.
    pub(super) fn put(&self, repository: &str, tag: &str, image: &TestImage) {
        for blob in image.layers.iter().chain([&image.config]) {
            self.put_blob(repository, blob);
        }
        for name in [tag, &digest(&image.manifest).to_string()] {
            self.put_manifest(repository, name, MANIFEST, &image.manifest);
        }
    }

    pub(super) fn put_blob(&self, repository: &str, blob: &[u8]) {
        let path = format!("/v2/{repository}/blobs/{}", digest(blob));
        let content = ("application/octet-stream".to_owned(), Bytes::copy_from_slice(blob));
        self.state.content.lock().unwrap().insert(path, content);
    }

    pub(super) fn put_manifest(&self, repository: &str, name: &str, media_type: &str, text: &[u8]) {
        let path = format!("/v2/{repository}/manifests/{name}");
        let content = (media_type.to_owned(), Bytes::copy_from_slice(text));
        self.state.content.lock().unwrap().insert(path, content);
    }

    /// Answers instead of the content, where it does.
    pub(super) fn hook(
        &self,
        hook: impl Fn(&Request<()>) -> Option<Response<Body>> + Send + Sync + 'static,
    ) {
        *self.state.hook.lock().unwrap() = Some(Box::new(hook));
    }

    /// Requests so far, as "METHOD path".
    pub(super) fn log(&self) -> Vec<String> {
        let log = self.state.log.lock().unwrap();
        log.iter().map(|r| format!("{} {}", r.method(), r.uri().path())).collect()
    }

    /// Values of a header in all requests so far.
    pub(super) fn seen(&self, name: &str) -> Vec<String> {
        let log = self.state.log.lock().unwrap();
        log.iter()
            .filter_map(|r| Some(r.headers().get(name)?.to_str().unwrap().to_owned()))
            .collect()
    }

    pub(super) fn forget_log(&self) {
        self.state.log.lock().unwrap().clear();
    }
}

impl State {
    async fn answer(&self, request: Request<hyper::body::Incoming>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let _ = body.collect().await;
        let request = Request::from_parts(parts, ());
        let mut logged = Request::builder().method(request.method()).uri(request.uri());
        logged.headers_mut().unwrap().extend(request.headers().clone());
        self.log.lock().unwrap().push(logged.body(()).unwrap());
        if let Some(hook) = &*self.hook.lock().unwrap()
            && let Some(response) = hook(&request)
        {
            return response;
        }
        let Some((media_type, content)) =
            self.content.lock().unwrap().get(request.uri().path()).cloned()
        else {
            return response(
                404,
                r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#,
            );
        };
        let mut response = Response::builder()
            .header(header::CONTENT_TYPE, media_type)
            .header("docker-content-digest", digest(&content).to_string());
        let range = request.headers().get(header::RANGE).map(|v| v.to_str().unwrap());
        let mut body = content.clone();
        if let Some(range) = range {
            let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
            let from: usize = from.parse().unwrap();
            let to = if to.is_empty() { content.len() } else { to.parse::<usize>().unwrap() + 1 };
            let to = to.min(content.len());
            body = content.slice(from..to);
            let text = format!("bytes {from}-{}/{}", to - 1, content.len());
            response =
                response.status(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, text);
        }
        if request.method() == Method::HEAD {
            body = Bytes::new();
        }
        response.body(full(body)).unwrap()
    }
}

pub(super) fn full(body: impl Into<Bytes>) -> Body {
    Full::new(body.into()).map_err(|e| match e {}).boxed()
}

pub(super) fn response(status: u16, body: &str) -> Response<Body> {
    Response::builder().status(status).body(full(body.to_owned())).unwrap()
}

/// Sends `body` in pieces with pauses in between.
pub(super) fn slow(body: Bytes, piece: usize, pause: std::time::Duration) -> Body {
    let stream = futures::stream::unfold(body, move |mut body| async move {
        if body.is_empty() {
            return None;
        }
        tokio::time::sleep(pause).await;
        let piece = body.split_to(piece.min(body.len()));
        Some((Ok(Frame::data(piece)), body))
    });
    BodyExt::boxed(StreamBody::new(SyncStream(Mutex::new(stream.boxed()))))
}

/// Sends `body`, and then breaks the connection, or hangs.
pub(super) fn broken(body: &[u8], claimed: usize, hang: bool) -> Response<Body> {
    let head = futures::stream::iter([Ok(Frame::data(Bytes::copy_from_slice(body)))]);
    let stream = if hang {
        head.chain(futures::stream::pending()).boxed()
    } else {
        let error = async {
            // So that what was sent is on its way before the reset.
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            Err(std::io::Error::other("broken on purpose"))
        };
        head.chain(futures::stream::once(error)).boxed()
    };
    Response::builder()
        .header(header::CONTENT_LENGTH, claimed)
        .body(BodyExt::boxed(StreamBody::new(SyncStream(Mutex::new(stream)))))
        .unwrap()
}

/// `BoxBody` wants `Sync`.
struct SyncStream(Mutex<futures::stream::BoxStream<'static, std::io::Result<Frame<Bytes>>>>);

impl futures::Stream for SyncStream {
    type Item = std::io::Result<Frame<Bytes>>;
    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.0.lock().unwrap().poll_next_unpin(context)
    }
}

//! The client's side, for our own command line: exec and attach over WebSocket v5, and port-forward
//! with one WebSocket for each connection, so that none waits for another and each keeps its half-close.
//!
//! It knows streams, not terminals: raw mode, the detach keys and the signal of a changed size are its
//! caller's. The server may be any that speaks `v5.channel.k8s.io`, or `v4.channel.k8s.io` where the end
//! of stdin need not be told.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{self, http};

use crate::backend::{Input, Output, Size};
use crate::conn::Watch;
use crate::status::Outcome;
use crate::websocket::{Channels, Codec, Rules, config};

/// From connecting to the end of the WebSocket handshake.
const CONNECT: Duration = Duration::from_secs(10);
const V5: &str = "v5.channel.k8s.io";
const V4: &str = "v4.channel.k8s.io";
/// The most that is read of what a server reports as the outcome.
const MAX_OUTCOME: u64 = 256 * 1024;

/// Why a session did not begin, or did not end as it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL is not one that a runtime gives out.
    #[error("use the URL {url}: {reason}")]
    Url {
        /// The URL.
        url: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The file of certificates to trust cannot be read.
    #[error("read certificates from {path}")]
    Certificates {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// An https URL, and no certificates to trust.
    #[error("the streaming server of {0} uses TLS: name the file of its certificate")]
    NoTrust(String),
    /// The server cannot be reached.
    #[error("connect to the streaming server at {authority}")]
    Connect {
        /// Host and port.
        authority: String,
        /// Why.
        source: io::Error,
    },
    /// The server did not accept the session.
    #[error("the streaming server refused the session ({status}): {text}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// What it said.
        text: String,
    },
    /// The server speaks no WebSocket as we know it.
    #[error("the handshake with the streaming server")]
    Handshake(#[source] Box<tungstenite::Error>),
    /// The server was too slow.
    #[error("the streaming server at {0} did not answer within {limit} s", limit = CONNECT.as_secs())]
    Timeout(String),
    /// The connection ended without an outcome: what was received may be a part only.
    #[error("the connection to the streaming server was lost")]
    Lost,
    /// What the server says about the outcome cannot be read.
    #[error("read the outcome that the streaming server reports")]
    Outcome(#[source] serde_json::Error),
    /// The server ran into an error; its text.
    #[error("{0}")]
    Remote(String),
    /// Our own end could not be read or written: `| head` that has seen enough, for example.
    #[error("{what}")]
    Local {
        /// What we did.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The process exited with this code (attach: 0).
    Exited(i32),
    /// The caller detached; the process goes on.
    Detached,
}

/// The caller's ends of a session.
#[derive(Default)]
pub struct Io {
    /// Sent to the process; its end closes the process's stdin.
    pub stdin: Option<Input>,
    /// Where the process's stdout goes (with a terminal: everything).
    pub stdout: Option<Output>,
    /// Where the process's stderr goes.
    pub stderr: Option<Output>,
    /// The sizes that the terminal takes, the first one at once.
    pub sizes: Option<mpsc::Receiver<Size>>,
}

/// Connects to streaming servers.
#[derive(Clone, Default)]
pub struct Client {
    tls: Option<Arc<rustls::ClientConfig>>,
}

impl Client {
    /// A client for `http` URLs.
    pub fn new() -> Self {
        Self::default()
    }

    /// A client that also takes `https` URLs: of servers whose certificate is in the PEM file, or is
    /// signed by one that is.
    pub fn trusting(certificates: &Path) -> Result<Self, Error> {
        let read = |source| Error::Certificates { path: certificates.to_owned(), source };
        let trusted = CertificateDer::pem_file_iter(certificates)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(read)?;
        if trusted.is_empty() {
            return Err(read(rustls::pki_types::pem::Error::NoItemsFound));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect("ring has the cipher suites of TLS 1.2 and 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Pinned::new(trusted, provider)))
            .with_no_client_auth();
        Ok(Self { tls: Some(Arc::new(config)) })
    }

    /// Joins `io` to the process behind an exec or attach URL, until that ends or `detach` resolves.
    pub async fn run(
        &self,
        url: &str,
        io: Io,
        detach: impl Future<Output = ()>,
    ) -> Result<Ended, Error> {
        self.open(url).await?.join(io, detach).await
    }

    /// Begins the session behind an exec or attach URL. What the process writes from then on is kept
    /// for [`Session::join`], as far as a session's buffers go; so a container's output can be had
    /// from its beginning, by attaching to it before it is started.
    pub async fn open(&self, url: &str) -> Result<Session, Error> {
        let (channels, protocol, outputs) = self.connect(url, [1, 2, 3]).await?;
        Ok(Session { channels, v5: protocol == V5, outputs })
    }

    /// Joins one connection to the port of a port-forward URL that was made for that port alone, until
    /// both directions have ended. Each direction's end is passed on by itself.
    pub async fn port_forward<S>(&self, url: &str, stream: S) -> Result<(), Error>
    where
        S: AsyncRead + AsyncWrite,
    {
        let (channels, protocol, [mut data, mut error]) = self.connect(url, [0, 1]).await?;
        let v5 = protocol == V5;
        let (mut from, mut to) = tokio::io::split(stream);
        let mut out = channels.outbound(0);
        let receive = async {
            let mut port = [0; 2];
            data.read_exact(&mut port).await.map_err(|_| Error::Lost)?;
            copy(&mut data, &mut to, "write to the local connection").await?;
            let shut = to.shutdown().await;
            shut.or_else(|error| match error.kind() {
                // It has gone already, and with it who would see our end.
                io::ErrorKind::NotConnected => Ok(()),
                _ => Err(Error::Local { what: "close the local connection", source: error }),
            })
        };
        let send = async {
            let mut buffer = vec![0; 32 * 1024];
            loop {
                let count = from.read(&mut buffer).await;
                let count = count.map_err(|source| Error::Local {
                    what: "read from the local connection",
                    source,
                })?;
                if count == 0 {
                    break;
                }
                // The server is done, or gone: what it said, or the connection's end, tells which.
                if out.write_all(&buffer[..count]).await.is_err() {
                    return Ok(());
                }
            }
            if v5 {
                out.finish().await;
            }
            Ok(())
        };
        // Ends when the server has done all there is to do, the pod's taking of the last byte included.
        let report = async {
            let mut text = Vec::new();
            (&mut error).take(MAX_OUTCOME).read_to_end(&mut text).await.map_err(|_| Error::Lost)?;
            match text.get(2..) {
                Some(text) if !text.is_empty() => {
                    Err(Error::Remote(String::from_utf8_lossy(text).into()))
                }
                _ => Ok(()),
            }
        };
        let result = tokio::select! {
            result = async { tokio::try_join!(receive, report) } => result.map(|_| ()),
            Err(error) = send => Err(error),
        };
        channels.close().await;
        result
    }

    async fn connect<const N: usize>(
        &self,
        url: &str,
        inbound: [u32; N],
    ) -> Result<(Channels, String, [crate::pipe::PipeReader; N]), Error> {
        let wrong = |reason| Error::Url { url: url.to_owned(), reason };
        let uri: http::Uri = url.parse().map_err(|_| wrong("it is no URL"))?;
        let authority = uri.authority().ok_or_else(|| wrong("it has no host"))?.clone();
        let tls = match uri.scheme_str() {
            Some("http") => None,
            Some("https") => {
                let config =
                    self.tls.clone().ok_or_else(|| Error::NoTrust(authority.to_string()))?;
                let host = authority.host().trim_matches(['[', ']']).to_owned();
                let name = ServerName::try_from(host).map_err(|_| wrong("its host is no name"))?;
                Some((TlsConnector::from(config), name))
            }
            _ => return Err(wrong("it begins with neither http:// nor https://")),
        };
        let port = authority.port_u16().unwrap_or(if tls.is_some() { 443 } else { 80 });
        let host = authority.host().trim_matches(['[', ']']);
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let mut request = format!("ws://{authority}{path}")
            .into_client_request()
            .map_err(|error| Error::Handshake(error.into()))?;
        let protocols = http::HeaderValue::from_static("v5.channel.k8s.io, v4.channel.k8s.io");
        request.headers_mut().insert(http::header::SEC_WEBSOCKET_PROTOCOL, protocols);

        let rules = |protocol: &str| Rules {
            codec: Codec::Binary,
            signals: protocol == V5,
            announces: protocol == V5,
            close_ends: true,
        };
        let connecting = async {
            let failed = |source| Error::Connect { authority: authority.to_string(), source };
            let tcp = TcpStream::connect((host, port)).await.map_err(failed)?;
            tcp.set_nodelay(true).map_err(failed)?;
            let watch = Watch::new(rustix::io::fcntl_dupfd_cloexec(&tcp, 3).ok());
            Ok(match tls {
                None => {
                    let (socket, protocol) = handshake(request, tcp).await?;
                    let (channels, readers) =
                        Channels::start(socket, watch, rules(&protocol), inbound);
                    (channels, protocol, readers)
                }
                Some((connector, name)) => {
                    let stream = connector.connect(name, tcp).await.map_err(failed)?;
                    let (socket, protocol) = handshake(request, stream).await?;
                    let (channels, readers) =
                        Channels::start(socket, watch, rules(&protocol), inbound);
                    (channels, protocol, readers)
                }
            })
        };
        match tokio::time::timeout(CONNECT, connecting).await {
            Ok(result) => result,
            Err(_) => Err(Error::Timeout(authority.to_string())),
        }
    }
}

/// A session of exec or attach that has begun.
pub struct Session {
    channels: Channels,
    v5: bool,
    outputs: [crate::pipe::PipeReader; 3],
}

impl Session {
    /// Joins `io` to the session's process, until that ends or `detach` resolves.
    pub async fn join(self, io: Io, detach: impl Future<Output = ()>) -> Result<Ended, Error> {
        let Session { channels, v5, outputs: [stdout, stderr, mut error] } = self;
        let output = async {
            let (stdout, stderr, outcome) = tokio::join!(
                receive(stdout, io.stdout, "write stdout"),
                receive(stderr, io.stderr, "write stderr"),
                async {
                    let mut outcome = Vec::new();
                    (&mut error).take(MAX_OUTCOME).read_to_end(&mut outcome).await.map(|_| outcome)
                },
            );
            // Our own failure explains more than the connection's end that it leads to.
            stdout?;
            stderr?;
            outcome.map_err(|_| Error::Lost)
        };
        let input = async {
            let stdin = send(io.stdin, channels.outbound(0), v5);
            let sizes = async {
                let Some(mut sizes) = io.sizes else { return };
                let mut out = channels.outbound(4);
                while let Some(Size { width, height }) = sizes.recv().await {
                    let text = format!("{{\"Width\":{width},\"Height\":{height}}}\n");
                    if out.write_all(text.as_bytes()).await.is_err() {
                        return;
                    }
                }
            };
            let (stdin, ()) = tokio::join!(stdin, sizes);
            match stdin {
                // There is nothing more to send; what is received decides.
                Ok(()) => std::future::pending().await,
                Err(error) => error,
            }
        };
        let result = tokio::select! {
            // The outcome before anything else that is ready.
            biased;
            outcome = output => outcome.and_then(|outcome| {
                if outcome.is_empty() {
                    return Err(Error::Lost);
                }
                match Outcome::parse(&outcome).map_err(Error::Outcome)? {
                    Outcome::Exited(code) => Ok(Ended::Exited(code)),
                    Outcome::Failed(text) => Err(Error::Remote(text)),
                }
            }),
            error = input => Err(error),
            () = detach => Ok(Ended::Detached),
        };
        channels.close().await;
        result
    }
}

async fn handshake<T>(
    request: http::Request<()>,
    io: T,
) -> Result<(WebSocketStream<T>, String), Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let result = tokio_tungstenite::client_async_with_config(request, io, Some(config())).await;
    let (socket, response) = result.map_err(|error| match error {
        tungstenite::Error::Http(response) => Error::Refused {
            status: response.status().as_u16(),
            text: String::from_utf8_lossy(response.body().as_deref().unwrap_or_default())
                .trim()
                .to_owned(),
        },
        other => Error::Handshake(other.into()),
    })?;
    let protocol = response.headers().get(http::header::SEC_WEBSOCKET_PROTOCOL);
    match protocol.and_then(|protocol| protocol.to_str().ok()) {
        Some(protocol @ (V4 | V5)) => Ok((socket, protocol.to_owned())),
        _ => Err(Error::Refused { status: 101, text: format!("it speaks neither {V5} nor {V4}") }),
    }
}

/// Everything that comes, to `to`; or to nowhere.
async fn receive(
    mut from: crate::pipe::PipeReader,
    to: Option<Output>,
    what: &'static str,
) -> Result<(), Error> {
    let mut to = to.unwrap_or_else(|| Box::new(tokio::io::sink()));
    copy(&mut from, &mut to, what).await
}

async fn copy(
    from: &mut crate::pipe::PipeReader,
    to: &mut (impl AsyncWrite + Unpin),
    what: &'static str,
) -> Result<(), Error> {
    let mut buffer = vec![0; 32 * 1024];
    loop {
        let count = from.read(&mut buffer).await.map_err(|_| Error::Lost)?;
        if count == 0 {
            return Ok(());
        }
        let local = |source| Error::Local { what, source };
        to.write_all(&buffer[..count]).await.map_err(local)?;
        // A terminal shows what there is.
        to.flush().await.map_err(local)?;
    }
}

async fn send(
    stdin: Option<Input>,
    mut out: crate::outbound::Outbound,
    v5: bool,
) -> Result<(), Error> {
    let Some(mut stdin) = stdin else { return Ok(()) };
    let mut buffer = vec![0; 32 * 1024];
    loop {
        let count = stdin.read(&mut buffer).await;
        let count = count.map_err(|source| Error::Local { what: "read stdin", source })?;
        if count == 0 {
            if v5 {
                out.finish().await;
            }
            return Ok(());
        }
        // The session is over; its outcome tells how.
        if out.write_all(&buffer[..count]).await.is_err() {
            return Ok(());
        }
    }
}

/// Takes a server whose certificate is one of `trusted`, or leads to one.
#[derive(Debug)]
struct Pinned {
    trusted: Vec<CertificateDer<'static>>,
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<rustls::crypto::CryptoProvider>,
}

impl Pinned {
    fn new(
        trusted: Vec<CertificateDer<'static>>,
        provider: Arc<rustls::crypto::CryptoProvider>,
    ) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(trusted.iter().cloned());
        let chain =
            WebPkiServerVerifier::builder_with_provider(roots.into(), provider.clone()).build();
        Self { trusted, chain: chain.ok(), provider }
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // The very certificate that we were given, as self-signed ones are: there is nothing to deduce.
        if self.trusted.iter().any(|trusted| trusted == certificate) {
            return Ok(ServerCertVerified::assertion());
        }
        match &self.chain {
            Some(chain) => chain.verify_server_cert(certificate, intermediates, name, ocsp, now),
            None => Err(rustls::CertificateError::UnknownIssuer.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

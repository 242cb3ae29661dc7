//! The HTTP server: takes connections, checks tokens, upgrades, and hands over to the protocols.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::backend::{AttachRequest, Backend, ExecRequest, PortForwardRequest};
use crate::conn::{Conn, Watch};
use crate::portforward;
use crate::remotecommand::{self, Command, link};
use crate::spdy::Session;
use crate::tokens::{Full as TokensFull, Tokens};
use crate::websocket::{self, Tunnel};

/// The largest request head that is read.
const MAX_HEAD: usize = 32 * 1024;
const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_PROTOCOLS: HeaderName =
    HeaderName::from_static("x-accepted-stream-protocol-versions");

/// Where to serve, and with what.
#[derive(Clone, Debug)]
pub struct Config {
    /// The address to listen on; port 0 takes a free one.
    pub address: SocketAddr,
    /// With it the server speaks TLS alone.
    pub tls: Option<Tls>,
    /// Times and numbers; the defaults are what Kubernetes' clients expect.
    pub limits: Limits,
}

/// The server's certificate.
#[derive(Clone, Debug)]
pub struct Tls {
    /// PEM: the certificate, then those that lead to its root.
    pub certificates: PathBuf,
    /// PEM: the certificate's private key.
    pub key: PathBuf,
}

/// What bounds a server's work.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long a URL can be used.
    pub token_ttl: Duration,
    /// How many unused URLs there can be.
    pub outstanding: usize,
    /// How long a client may take from connecting to the end of its request.
    pub handshake: Duration,
    /// How many clients may be at that; more are turned away with 429.
    pub handshakes: usize,
    /// How long a client may take to open the streams of its request.
    pub stream_creation: Duration,
    /// After so long without a byte in either direction a session ends.
    pub idle: Duration,
    /// How long the backend may take to return once its client is gone.
    pub wind_up: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            token_ttl: Duration::from_secs(60),
            outstanding: 1000,
            handshake: Duration::from_secs(10),
            handshakes: 256,
            stream_creation: Duration::from_secs(30),
            idle: Duration::from_secs(4 * 3600),
            wind_up: Duration::from_secs(10),
        }
    }
}

/// Why there is no server, or no URL.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address cannot be used.
    #[error("listen on {address} for streaming")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A PEM file cannot be read, or holds nothing of use.
    #[error("read {path} for streaming")]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// The certificate and the key do not make a TLS server.
    #[error("use {certificates} with {key} for streaming")]
    Tls {
        /// The certificate's file.
        certificates: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// The request is wrong.
    #[error("{0}")]
    Invalid(&'static str),
    /// As many URLs are out as may be: RESOURCE_EXHAUSTED.
    #[error(
        "{limit} exec, attach and port-forward sessions wait for their clients to connect; \
         try again when one has, or within {} s", ttl.as_secs()
    )]
    TooMany {
        /// [`Limits::outstanding`].
        limit: usize,
        /// [`Limits::token_ttl`].
        ttl: Duration,
    },
}

/// What a token stands for.
#[derive(Clone, Debug)]
enum Purpose {
    Command(Command),
    PortForward(PortForwardRequest),
}

impl Purpose {
    /// The first part of the URL's path.
    fn kind(&self) -> &'static str {
        match self {
            Purpose::Command(Command::Exec(_)) => "exec",
            Purpose::Command(Command::Attach(_)) => "attach",
            Purpose::PortForward(_) => "portforward",
        }
    }
}

/// A server that listens. URLs can be made at once; [`Server::serve`] answers them.
pub struct Server {
    listener: TcpListener,
    base: String,
    tls: Option<TlsAcceptor>,
    limits: Limits,
    tokens: Tokens<Purpose>,
}

impl Server {
    /// Binds the address and reads the certificate.
    pub async fn bind(config: Config) -> Result<Self, Error> {
        let Config { address, tls, limits } = config;
        let tls = tls.as_ref().map(acceptor).transpose()?;
        let listen = |source| Error::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let mut local = listener.local_addr().map_err(listen)?;
        // "Any address" is one to listen on, not one to connect to; the kubelet is on this node.
        match local.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => local.set_ip(Ipv4Addr::LOCALHOST.into()),
            IpAddr::V6(ip) if ip.is_unspecified() => local.set_ip(Ipv6Addr::LOCALHOST.into()),
            _ => {}
        }
        let scheme = if tls.is_some() { "https" } else { "http" };
        let tokens = Tokens::new(limits.token_ttl, limits.outstanding);
        Ok(Self { listener, base: format!("{scheme}://{local}"), tls, limits, tokens })
    }

    /// The address that is listened on.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The URL at which a client gets this command, once.
    pub fn exec_url(&self, request: ExecRequest) -> Result<String, Error> {
        if request.command.is_empty() {
            return Err(Error::Invalid("the command to run is empty"));
        }
        check(request.tty, request.stdin, request.stdout, request.stderr)?;
        self.url(Purpose::Command(Command::Exec(request)))
    }

    /// The URL at which a client is attached, once.
    pub fn attach_url(&self, request: AttachRequest) -> Result<String, Error> {
        check(request.tty, request.stdin, request.stdout, request.stderr)?;
        self.url(Purpose::Command(Command::Attach(request)))
    }

    /// The URL at which a client can forward ports, in one session.
    pub fn port_forward_url(&self, request: PortForwardRequest) -> Result<String, Error> {
        if request.ports.contains(&0) {
            return Err(Error::Invalid("0 is not a port to forward"));
        }
        self.url(Purpose::PortForward(request))
    }

    fn url(&self, session: Purpose) -> Result<String, Error> {
        let kind = session.kind();
        let token = self.tokens.insert(session, Instant::now()).map_err(|TokensFull| {
            Error::TooMany { limit: self.limits.outstanding, ttl: self.limits.token_ttl }
        })?;
        Ok(format!("{}/{kind}/{token}", self.base))
    }

    /// Serves until `shutdown` resolves; then ends all sessions and returns when they have ended.
    pub async fn serve<B: Backend>(
        self: Arc<Self>,
        backend: Arc<B>,
        shutdown: impl Future<Output = ()>,
    ) {
        let tracker = TaskTracker::new();
        let stop = CancellationToken::new();
        let places = Arc::new(Semaphore::new(self.limits.handshakes));
        tokio::pin!(shutdown);
        loop {
            let accepted = tokio::select! {
                // The end first: a busy listener must not put it off.
                biased;
                () = &mut shutdown => break,
                accepted = self.listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, mostly: the connection stays in the queue, so wait a little.
                    warn!(%error, "accept a streaming connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                turn_away(stream, self.tls.is_some());
                continue;
            };
            let (server, backend, tracker_, stop) =
                (self.clone(), backend.clone(), tracker.clone(), stop.clone());
            tracker.spawn(async move {
                let _place = place;
                if let Err(error) = server.connection(stream, backend, tracker_, stop).await {
                    debug!(%error, "streaming connection ended before its session");
                }
            });
        }
        stop.cancel();
        tracker.close();
        let limit = self.limits.wind_up + Duration::from_secs(5);
        if tokio::time::timeout(limit, tracker.wait()).await.is_err() {
            warn!(left = tracker.len(), "streaming sessions did not end in time");
        }
    }

    /// From the accepted connection to the upgrade. What follows is a task of its own.
    async fn connection<B: Backend>(
        self: Arc<Self>,
        stream: TcpStream,
        backend: Arc<B>,
        tracker: TaskTracker,
        stop: CancellationToken,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let limit = self.limits.handshake;
        let deadline = tokio::time::Instant::now() + limit;
        stream.set_nodelay(true)?;
        // A client whose machine is gone shows within some minutes.
        rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
        rustix::net::sockopt::set_tcp_keepidle(&stream, Duration::from_secs(60))?;
        let watch = Watch::new(Some(rustix::io::fcntl_dupfd_cloexec(&stream, 3)?));
        let conn = match &self.tls {
            Some(tls) => {
                let stream = tokio::time::timeout_at(deadline, tls.accept(stream)).await??;
                Conn::tls(stream, watch)
            }
            None => Conn::plain(stream, watch),
        };
        let service = service_fn(|request: Request<Incoming>| {
            let response = self.clone().answer(request, &backend, &tracker, &stop);
            async move { Ok::<_, Infallible>(one_request(response)) }
        });
        let serving = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limit)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(conn), service)
            .with_upgrades();
        tokio::select! {
            result = serving => Ok(result?),
            // Also for a request that is complete and whose answer is not read.
            () = tokio::time::sleep_until(deadline + limit) => Ok(()),
            () = stop.cancelled() => Ok(()),
        }
    }

    fn answer<B: Backend>(
        self: Arc<Self>,
        mut request: Request<Incoming>,
        backend: &Arc<B>,
        tracker: &TaskTracker,
        stop: &CancellationToken,
    ) -> Response<Full<Bytes>> {
        let upgrade = match self.negotiate(&request) {
            Ok(upgrade) => upgrade,
            Err(refusal) => return *refusal,
        };
        let Some(session) = self.tokens.take(token(request.uri().path()).1, Instant::now()) else {
            // Another request with the token was faster.
            return no_such_session();
        };
        let response = upgrade.response();
        let limits = self.limits;
        let upgraded = hyper::upgrade::on(&mut request);
        tracker.spawn(session_task(
            upgraded,
            upgrade,
            session,
            backend.clone(),
            limits,
            stop.clone(),
        ));
        response
    }

    /// What to upgrade to, or why not. The token stays good until an upgrade is agreed on, so that a
    /// client can try another protocol.
    fn negotiate(
        &self,
        request: &Request<Incoming>,
    ) -> Result<Upgrade, Box<Response<Full<Bytes>>>> {
        if request.method() != Method::GET && request.method() != Method::POST {
            let mut response =
                text(StatusCode::METHOD_NOT_ALLOWED, "only GET and POST lead to a session");
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, POST"));
            return Err(response.into());
        }
        let (kind, token) = token(request.uri().path());
        let ports = self.tokens.peek(token, Instant::now(), |session| {
            let ports = match session {
                Purpose::PortForward(request) => request.ports.len(),
                Purpose::Command(_) => 0,
            };
            (session.kind() == kind).then_some(ports)
        });
        let Some(Some(ports)) = ports else { return Err(no_such_session().into()) };
        let headers = request.headers();
        if !lists(headers, header::CONNECTION, "upgrade") {
            return Err(text(
                StatusCode::BAD_REQUEST,
                "a session needs an upgrade to SPDY/3.1 or websocket, and the request asks for none",
            )
            .into());
        }
        if lists(headers, header::UPGRADE, "spdy/3.1") {
            spdy_protocol(headers, kind)
        } else if lists(headers, header::UPGRADE, "websocket") {
            websocket_protocol(request, kind, ports)
        } else {
            Err(text(StatusCode::BAD_REQUEST, "the upgrade must be to SPDY/3.1 or websocket")
                .into())
        }
    }
}

/// What a connection becomes.
enum Upgrade {
    Spdy { protocol: &'static str, named: bool },
    WebSocket { protocol: &'static str, accept: String },
}

impl Upgrade {
    fn response(&self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::default());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        match self {
            Upgrade::Spdy { protocol, named } => {
                headers.insert(header::UPGRADE, HeaderValue::from_static("SPDY/3.1"));
                if *named {
                    headers.insert(STREAM_PROTOCOL, HeaderValue::from_static(protocol));
                }
            }
            Upgrade::WebSocket { protocol, accept } => {
                headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
                let accept = HeaderValue::from_str(accept).expect("base64 is a header value");
                headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
                if !protocol.is_empty() {
                    headers
                        .insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
                }
            }
        }
        response
    }
}

fn spdy_protocol(headers: &HeaderMap, kind: &str) -> Result<Upgrade, Box<Response<Full<Bytes>>>> {
    let supported: &'static [&'static str] = match kind {
        "portforward" => &portforward::SPDY_PROTOCOLS,
        _ => &remotecommand::SPDY_PROTOCOLS,
    };
    let wanted: Vec<&str> = listed(headers, STREAM_PROTOCOL).collect();
    // Clients of Kubernetes 1.0 name none and speak the oldest.
    if wanted.is_empty() {
        let oldest = supported[supported.len() - 1];
        return Ok(Upgrade::Spdy { protocol: oldest, named: false });
    }
    match first_common(&wanted, supported) {
        Some(protocol) => Ok(Upgrade::Spdy { protocol, named: true }),
        None => {
            let mut response = no_common(&wanted, supported);
            for protocol in supported {
                response
                    .headers_mut()
                    .append(ACCEPTED_PROTOCOLS, HeaderValue::from_static(protocol));
            }
            Err(response.into())
        }
    }
}

fn websocket_protocol(
    request: &Request<Incoming>,
    kind: &str,
    ports: usize,
) -> Result<Upgrade, Box<Response<Full<Bytes>>>> {
    let headers = request.headers();
    let refuse = |status, reason| Err(text(status, reason).into());
    if request.method() != Method::GET {
        return refuse(StatusCode::BAD_REQUEST, "a WebSocket handshake is a GET request");
    }
    if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        let mut response =
            text(StatusCode::UPGRADE_REQUIRED, "WebSocket version 13 is the one supported");
        response
            .headers_mut()
            .insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        return Err(response.into());
    }
    let Some(key) = headers.get(header::SEC_WEBSOCKET_KEY) else {
        return refuse(StatusCode::BAD_REQUEST, "the WebSocket handshake lacks Sec-WebSocket-Key");
    };
    let supported: &'static [&'static str] = match kind {
        "portforward" => &portforward::WEBSOCKET_PROTOCOLS,
        _ => &remotecommand::WEBSOCKET_PROTOCOLS,
    };
    let mut wanted: Vec<&str> = listed(headers, header::SEC_WEBSOCKET_PROTOCOL).collect();
    if wanted.is_empty() {
        wanted.push("");
    }
    let Some(protocol) = first_common(&wanted, supported) else {
        return Err(no_common(&wanted, supported).into());
    };
    if kind == "portforward" && protocol != portforward::TUNNEL_PROTOCOL {
        if ports == 0 {
            let reason =
                "WebSocket channels need the ports in the PortForward request, and it names none";
            return refuse(StatusCode::BAD_REQUEST, reason);
        }
        if ports > portforward::MAX_CHANNEL_PORTS {
            return refuse(StatusCode::BAD_REQUEST, "WebSocket channels carry at most 100 ports");
        }
    }
    Ok(Upgrade::WebSocket { protocol, accept: derive_accept_key(key.as_bytes()) })
}

/// The session, from the upgrade to the end of the connection.
async fn session_task<B: Backend>(
    upgraded: OnUpgrade,
    upgrade: Upgrade,
    session: Purpose,
    backend: Arc<B>,
    limits: Limits,
    stop: CancellationToken,
) {
    let upgraded = match upgraded.await {
        Ok(upgraded) => upgraded,
        Err(error) => return debug!(%error, "a client left before its session began"),
    };
    let parts = match upgraded.downcast::<TokioIo<Conn>>() {
        Ok(parts) => parts,
        Err(_) => unreachable!("connections are served on a Conn"),
    };
    let conn = parts.io.into_inner().with_ahead(parts.read_buf);
    let watch = conn.watch();
    // Both the server's end and the session's idleness end it in the same way: the backend is told.
    let stop = stop.child_token();
    let serving = async {
        match (upgrade, session) {
            (Upgrade::Spdy { protocol, .. }, Purpose::Command(command)) => {
                let session = Session::start(conn, watch.clone());
                let _stop = link(stop.clone(), session.closed());
                remotecommand::spdy(session, protocol, command, backend, limits).await;
            }
            (Upgrade::Spdy { .. }, Purpose::PortForward(request)) => {
                let session = Session::start(conn, watch.clone());
                let _stop = link(stop.clone(), session.closed());
                portforward::spdy(session, request, backend, limits).await;
            }
            (Upgrade::WebSocket { protocol, .. }, session) => {
                let config = Some(websocket::config());
                let socket = WebSocketStream::from_raw_socket(conn, Role::Server, config).await;
                let watch = watch.clone();
                match session {
                    Purpose::Command(command) => {
                        let stop = stop.clone();
                        remotecommand::websocket(
                            socket, watch, protocol, command, backend, limits, stop,
                        )
                        .await;
                    }
                    Purpose::PortForward(request) if protocol == portforward::TUNNEL_PROTOCOL => {
                        let session = Session::start(Tunnel::new(socket), watch);
                        let _stop = link(stop.clone(), session.closed());
                        portforward::spdy(session, request, backend, limits).await;
                    }
                    Purpose::PortForward(request) => {
                        portforward::websocket(
                            socket,
                            watch,
                            protocol,
                            request,
                            backend,
                            stop.clone(),
                        )
                        .await;
                    }
                }
            }
        }
    };
    tokio::select! {
        () = serving => {}
        () = async {
            tokio::select! {
                () = watch.idle(limits.idle) => debug!("a streaming session was idle for too long"),
                () = stop.cancelled() => {}
            }
            stop.cancel();
            tokio::time::sleep(limits.wind_up + Duration::from_secs(1)).await;
        } => {}
    }
}

fn acceptor(tls: &Tls) -> Result<TlsAcceptor, Error> {
    let pem = |path: &PathBuf| {
        let path = path.clone();
        move |source| Error::Pem { path, source }
    };
    let certificates = CertificateDer::pem_file_iter(&tls.certificates)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(pem(&tls.certificates))?;
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(pem(&tls.key))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(certificates, key))
        .map_err(|source| Error::Tls {
            certificates: tls.certificates.clone(),
            key: tls.key.clone(),
            source,
        })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn check(tty: bool, stdin: bool, stdout: bool, stderr: bool) -> Result<(), Error> {
    if tty && stderr {
        return Err(Error::Invalid(
            "with a terminal there is no separate stderr: ask for one of the two",
        ));
    }
    if !stdin && !stdout && !stderr {
        return Err(Error::Invalid("at least one of stdin, stdout and stderr must be asked for"));
    }
    Ok(())
}

/// One request is what a connection is for. An upgrade says so by itself: its `Connection` header has
/// to be "Upgrade", which hyper's own way to end a connection would replace.
fn one_request(mut response: Response<Full<Bytes>>) -> Response<Full<Bytes>> {
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// `/exec/TOKEN` in its two parts; both empty when the path is no such thing.
fn token(path: &str) -> (&str, &str) {
    path.strip_prefix('/').and_then(|path| path.split_once('/')).unwrap_or_default()
}

/// The items of a header that is a list, over all its lines.
fn listed(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let lines = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim).filter(|item| !item.is_empty())
}

fn lists(headers: &HeaderMap, name: HeaderName, item: &str) -> bool {
    listed(headers, name).any(|listed| listed.eq_ignore_ascii_case(item))
}

/// The client's list is in its order of preference.
fn first_common(wanted: &[&str], supported: &'static [&'static str]) -> Option<&'static str> {
    wanted.iter().find_map(|wanted| supported.iter().copied().find(|known| known == wanted))
}

fn no_common(wanted: &[&str], supported: &[&str]) -> Response<Full<Bytes>> {
    let wanted = wanted.join(", ");
    let supported =
        supported.iter().copied().filter(|name| !name.is_empty()).collect::<Vec<_>>().join(", ");
    let reason = format!("none of the protocols {wanted} is supported; supported are {supported}");
    text(StatusCode::FORBIDDEN, reason)
}

fn no_such_session() -> Response<Full<Bytes>> {
    text(
        StatusCode::NOT_FOUND,
        "no such session: its URL is good once and for a minute; ask the runtime for a new one",
    )
}

fn text(status: StatusCode, reason: impl Into<String>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(reason.into() + "\n"));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    // One request is what a connection is for. (hyper's own setting for that would also replace the
    // `Connection: Upgrade` of those that succeed.)
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// Too many clients are at their handshake: this one is told at once, and costs nothing more.
fn turn_away(stream: TcpStream, tls: bool) {
    const ANSWER: &[u8] = b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\n\
        connection: close\r\ncontent-length: 0\r\n\r\n";
    if !tls {
        // The socket's buffer is empty, so this is written at once or not at all.
        let _ = stream.try_write(ANSWER);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_order_decides() {
        let supported: &'static [&'static str] = &["v4", "v3", ""];
        assert_eq!(first_common(&["v3", "v4"], supported), Some("v3"));
        assert_eq!(first_common(&["v9", "v4"], supported), Some("v4"));
        assert_eq!(first_common(&["v9"], supported), None);
    }

    #[test]
    fn paths() {
        assert_eq!(token("/exec/abc"), ("exec", "abc"));
        assert_eq!(token("/exec/a/b"), ("exec", "a/b"));
        for path in ["", "/", "/exec", "exec"] {
            assert_eq!(token(path), ("", ""));
        }
    }

    #[test]
    fn lists_may_span_lines() {
        let mut headers = HeaderMap::new();
        headers.append(header::CONNECTION, HeaderValue::from_static("keep-alive, Upgrade"));
        headers.append(STREAM_PROTOCOL, HeaderValue::from_static("v4.channel.k8s.io"));
        headers.append(STREAM_PROTOCOL, HeaderValue::from_static("v3.channel.k8s.io"));
        assert!(lists(&headers, header::CONNECTION, "upgrade"));
        let all: Vec<_> = listed(&headers, STREAM_PROTOCOL).collect();
        assert_eq!(all, ["v4.channel.k8s.io", "v3.channel.k8s.io"]);
    }
}

//! A client for the OCI Distribution API (distribution-spec v1.1), for reading.
//!
//! One [`Remote`] is one repository for the length of one pull: its servers in order, and for each
//! what it wants for authorisation. HTTP/1.1 only: parallel layers then have connections, and so
//! windows, of their own, and a layer that is unpacked slowly holds up no other.
//!
//! Credentials go to the registry that the reference names (or the server that the request names),
//! to the token service that this registry points to, and nowhere else: not to mirrors, not to
//! where a redirect leads. Plain HTTP is spoken only where `hosts` allows it.
//!
//! Deadlines: an answer must begin within the stall timeout; a body must bring a minimum of bytes a
//! second over the stall timeout. The time that we do not read (unpacking is slower) is not counted.

use std::{
    collections::HashMap,
    error::Error as StdError,
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use base64::Engine as _;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{self, HeaderMap, HeaderValue},
};
use hyper_rustls::HttpsConnector;
use hyper_util::{
    client::{legacy::Client, proxy::matcher::Matcher},
    rt::{TokioExecutor, TokioTimer},
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use url::Url;

use super::{
    connect::Connector,
    hosts::{self, Host, Tls},
    reference::{Object, Reference},
    tls,
};
use crate::{
    config,
    error::{Kind, Kinded},
    id::Digest,
};

/// Largest manifest or index, in bytes: what distribution-spec asks registries to accept.
pub const MAX_MANIFEST: u64 = 4 << 20;

/// Largest answer of a token service, and most of an error's body that is read, in bytes.
const MAX_SMALL: usize = 1 << 20;

/// Redirects that are followed for one request.
const MAX_REDIRECTS: usize = 5;

/// Attempts of one request, or of a blob without progress in between.
const ATTEMPTS: u32 = 5;

/// Bytes of a blob that make an attempt a success, so that failures are counted anew.
const PROGRESS: u64 = 64 << 10;

/// Bound on making a connection, where the hosts.toml gives none.
const DIAL_TIMEOUT: Duration = Duration::from_secs(15);

/// Longest wait that a server's Retry-After can ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// Bytes a second below which a server counts as stalled.
const SLOWEST: u64 = 256;

/// What we call ourselves.
const USER_AGENT: &str = concat!("holdfast/", env!("CARGO_PKG_VERSION"));

/// Credentials of a request, as the CRI has them. Empty fields are not given.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Auth {
    /// With `password`.
    pub username: String,
    /// With `username`.
    pub password: String,
    /// base64 of `username:password`.
    pub auth: String,
    /// The server they are for; empty: the registry of the reference.
    pub server_address: String,
    /// An OAuth2 refresh token.
    pub identity_token: String,
    /// A bearer token for the registry.
    pub registry_token: String,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let given = |secret: &String| if secret.is_empty() { "" } else { "<redacted>" };
        f.debug_struct("Auth")
            .field("username", &self.username)
            .field("password", &given(&self.password))
            .field("auth", &given(&self.auth))
            .field("server_address", &self.server_address)
            .field("identity_token", &given(&self.identity_token))
            .field("registry_token", &given(&self.registry_token))
            .finish()
    }
}

/// Why a registry did not give what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The hosts.toml of the registry.
    #[error("registry hosts")]
    Hosts(#[from] hosts::Error),
    /// Certificates that the hosts.toml names.
    #[error("tls settings for {host}")]
    Tls {
        /// The server.
        host: String,
        /// Why.
        source: tls::Error,
    },
    /// The credentials of the request make no sense.
    #[error("the credentials of the request are not valid: {0}")]
    Credentials(&'static str),
    /// The hosts.toml has no server that may do it.
    #[error("no server for {registry} has the capability {capability:?} in its hosts.toml")]
    NoServer {
        /// The registry.
        registry: String,
        /// What is missing.
        capability: &'static str,
    },
    /// No connection, or it broke.
    #[error("request {url}")]
    Connect {
        /// Without its query, which may be signed.
        url: String,
        /// Why.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// Nothing came for too long.
    #[error("{url} sent too little for {} s (images.stall_timeout)", after.as_secs_f32())]
    Stalled {
        /// Without its query.
        url: String,
        /// For so long.
        after: Duration,
    },
    /// 401 or 403.
    #[error("{url} denies access ({status}){detail}: check the name and the pull secret")]
    Denied {
        /// Without its query.
        url: String,
        /// The answer.
        status: StatusCode,
        /// What the server says.
        detail: Detail,
    },
    /// 404.
    #[error("{url} is not found{detail}")]
    NotFound {
        /// Without its query.
        url: String,
        /// What the server says.
        detail: Detail,
    },
    /// Any other status that is no success.
    #[error("{url} answers {status}{detail}")]
    Status {
        /// Without its query.
        url: String,
        /// The answer.
        status: StatusCode,
        /// What the server says.
        detail: Detail,
        /// When to try again, if it says so.
        retry_after: Option<Duration>,
    },
    /// A redirect that must not be followed.
    #[error("{url} redirects {rule}")]
    Redirect {
        /// Without its query.
        url: String,
        /// Why not.
        rule: String,
    },
    /// An answer that the protocol does not allow.
    #[error("{url} answers against the protocol: {what}")]
    Protocol {
        /// Without its query.
        url: String,
        /// Which rule.
        what: String,
    },
    /// More than the limit.
    #[error("{url} is larger than {limit} bytes")]
    TooLarge {
        /// Without its query.
        url: String,
        /// The limit.
        limit: u64,
    },
    /// Not the content that was asked for.
    #[error("{url} has content {got}, expected {want}")]
    Content {
        /// Without its query.
        url: String,
        /// What came.
        got: Digest,
        /// What should have.
        want: Digest,
    },
    /// No server gave it.
    #[error("{tried}, and last")]
    All {
        /// The servers before the last, with their errors.
        tried: String,
        /// The error of the last.
        #[source]
        last: Box<Error>,
    },
}

impl Kinded for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Hosts(_) | Error::Tls { .. } | Error::NoServer { .. } => Kind::Precondition,
            Error::Credentials(_) => Kind::Invalid,
            Error::Connect { .. } => Kind::Unavailable,
            Error::Stalled { .. } => Kind::Deadline,
            Error::Denied { .. } => Kind::Denied,
            Error::NotFound { .. } => Kind::NotFound,
            Error::Status { status, .. } if *status == StatusCode::TOO_MANY_REQUESTS => {
                Kind::Exhausted
            }
            Error::Status { .. } => Kind::Unavailable,
            Error::Redirect { .. } | Error::Protocol { .. } | Error::Content { .. } => {
                Kind::Unavailable
            }
            Error::TooLarge { .. } => Kind::Invalid,
            Error::All { last, .. } => last.kind(),
        }
    }
}

impl Error {
    /// Whether the same request may succeed a moment later.
    fn is_transient(&self) -> bool {
        match self {
            Error::Connect { .. } | Error::Stalled { .. } => true,
            Error::Status { status, .. } => {
                matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504)
            }
            _ => false,
        }
    }
}

/// What a registry says in the body of an error.
#[derive(Debug, Default)]
pub struct Detail(String);

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, ": {}", self.0) }
    }
}

type Http = Client<HttpsConnector<Connector>, Full<Bytes>>;

/// What all remotes share: connections, and which guesses were right.
pub struct Registries {
    config: config::Images,
    /// First wait before a retry; doubles each time.
    back_off: Duration,
    proxies: Arc<Matcher>,
    clients: Mutex<HashMap<(Tls, Option<Duration>), Http>>,
    /// Scheme by authority, where it was guessed.
    schemes: Mutex<HashMap<String, String>>,
}

impl Registries {
    /// Connects to nothing yet.
    pub fn new(config: config::Images) -> Self {
        Self {
            config,
            back_off: Duration::from_millis(250),
            proxies: Arc::new(Matcher::from_env()),
            clients: Mutex::default(),
            schemes: Mutex::default(),
        }
    }

    /// For tests: waits are shorter.
    #[cfg(test)]
    pub(super) fn with_back_off(mut self, back_off: Duration) -> Self {
        self.back_off = back_off;
        self
    }

    /// For tests: HTTPS goes through this proxy, except to the hosts in `not_to`.
    #[cfg(test)]
    pub(super) fn with_proxy(mut self, proxy: &str, not_to: &str) -> Self {
        self.proxies = Arc::new(Matcher::builder().https(proxy).no(not_to).build());
        self
    }

    /// The repository of a reference. Reads its hosts.toml.
    pub async fn remote(
        self: &Arc<Self>,
        reference: &Reference,
        auth: Option<&Auth>,
    ) -> Result<Remote, Error> {
        let credentials = auth.map(Credentials::parse).transpose()?.flatten();
        let (registry, this) = (reference.registry().to_owned(), self.clone());
        let mut hosts = super::blocking(move || {
            hosts::hosts(&registry, &this.config.hosts_dir, &this.config.insecure_registries)
        })
        .await
        .unwrap_or_else(|_| Ok(Vec::new()))?;
        {
            let schemes = self.schemes.lock().expect("no panic while it is held");
            if let Some(guess) = hosts.iter().find(|host| host.guess)
                && let Some(scheme) = schemes.get(guess.base.authority())
            {
                let authority = guess.base.authority().to_owned();
                hosts.retain(|h| h.base.authority() != authority || h.base.scheme() == scheme);
                hosts.iter_mut().for_each(|h| h.guess = false);
            }
        }
        let registry = reference.registry();
        let servers = hosts
            .into_iter()
            .map(|host| {
                let for_it = match auth.map(|a| a.server_address.as_str()) {
                    None | Some("") => host.upstream,
                    Some(address) => is_for(address, &host, registry),
                };
                let credentials = if for_it { credentials.clone() } else { None };
                Server {
                    namespace: (!host.upstream).then(|| registry.to_owned()),
                    host,
                    credentials,
                    authorization: tokio::sync::Mutex::default(),
                }
            })
            .collect();
        Ok(Remote {
            registries: self.clone(),
            registry: registry.to_owned(),
            repository: reference.repository().to_owned(),
            servers,
        })
    }

    fn client(&self, tls: &Tls, dial_timeout: Option<Duration>) -> Result<Http, tls::Error> {
        let key = (tls.clone(), dial_timeout);
        if let Some(client) = self.clients.lock().expect("no panic while it is held").get(&key) {
            return Ok(client.clone());
        }
        let dial_timeout = dial_timeout.unwrap_or(DIAL_TIMEOUT);
        let tcp = Connector::new(self.proxies.clone(), dial_timeout);
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls::config(tls)?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(20))
            .pool_max_idle_per_host(self.config.max_parallel_layers.max(1))
            // Bounds what a connection reads ahead of the unpacker.
            .http1_max_buf_size(256 << 10)
            .build(connector);
        let mut clients = self.clients.lock().expect("no panic while it is held");
        Ok(clients.entry(key).or_insert(client).clone())
    }
}

/// Whether credentials that name `address` ("host", "host:port/path", a URL) are for `host`.
fn is_for(address: &str, host: &Host, registry: &str) -> bool {
    let text =
        if address.contains("://") { address.to_owned() } else { format!("https://{address}") };
    let Ok(address) = Url::parse(&text) else { return false };
    let Some(name) = address.host_str() else { return false };
    let authority = match address.port() {
        Some(port) => format!("{name}:{port}"),
        None => name.to_owned(),
    };
    // Docker Hub has several names; the one in docker config files is a URL of its old index.
    let hub = ["docker.io", "index.docker.io", "registry-1.docker.io"];
    if registry == "docker.io" && host.upstream && hub.contains(&authority.as_str()) {
        return true;
    }
    host.upstream && authority.eq_ignore_ascii_case(registry)
        || address.host_str() == host.base.host_str()
            && address.port_or_known_default() == host.base.port_or_known_default()
        || authority.eq_ignore_ascii_case(host.base.authority())
}

/// Credentials in the form that is sent.
#[derive(Clone)]
enum Credentials {
    /// Ready for the header: "Basic …".
    Basic(HeaderValue),
    /// For the token service.
    Identity(String),
    /// Ready for the header: "Bearer …".
    Bearer(HeaderValue),
}

impl Credentials {
    fn parse(auth: &Auth) -> Result<Option<Self>, Error> {
        let base64 = base64::engine::general_purpose::STANDARD;
        let secret = |text: String| {
            let mut value = HeaderValue::from_str(&text)
                .map_err(|_| Error::Credentials("they have control characters"))?;
            value.set_sensitive(true);
            Ok::<_, Error>(value)
        };
        let basic = |pair: &[u8]| secret(format!("Basic {}", base64.encode(pair)));
        // Some services give a name of no meaning along with the token.
        let only_token = auth.password.is_empty() && !auth.identity_token.is_empty();
        if !auth.username.is_empty() && !only_token {
            let pair = format!("{}:{}", auth.username, auth.password);
            return Ok(Some(Credentials::Basic(basic(pair.as_bytes())?)));
        }
        if !auth.identity_token.is_empty() {
            return Ok(Some(Credentials::Identity(auth.identity_token.clone())));
        }
        if !auth.auth.is_empty() {
            let pair = base64
                .decode(auth.auth.trim())
                .map_err(|_| Error::Credentials("'auth' is not base64"))?;
            // Some tools pad the secret with NULs.
            let end = pair.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
            if !pair[..end].contains(&b':') {
                return Err(Error::Credentials("'auth' is not base64 of user:password"));
            }
            return Ok(Some(Credentials::Basic(basic(&pair[..end])?)));
        }
        if !auth.registry_token.is_empty() {
            let value = secret(format!("Bearer {}", auth.registry_token))?;
            return Ok(Some(Credentials::Bearer(value)));
        }
        Ok(None)
    }
}

/// A repository, for one pull.
pub struct Remote {
    registries: Arc<Registries>,
    registry: String,
    repository: String,
    servers: Vec<Server>,
}

struct Server {
    host: Host,
    /// Sent to mirrors, which may serve many registries.
    namespace: Option<String>,
    credentials: Option<Credentials>,
    authorization: tokio::sync::Mutex<Authorization>,
}

/// What a server was found to want.
#[derive(Default)]
struct Authorization {
    header: Option<HeaderValue>,
    /// Counts changes, so that of many requests that were refused together one asks for a token.
    generation: u64,
}

/// A manifest or an index, verified.
#[derive(Clone, Debug)]
pub struct Document {
    /// As it came.
    pub bytes: Bytes,
    /// By the server's word, else by the document's own.
    pub media_type: String,
    /// Of `bytes`.
    pub digest: Digest,
}

const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
                      application/vnd.oci.image.manifest.v1+json, \
                      application/vnd.docker.distribution.manifest.list.v2+json, \
                      application/vnd.docker.distribution.manifest.v2+json, \
                      application/vnd.docker.distribution.manifest.v1+prettyjws;q=0.1, */*;q=0.1";

impl Remote {
    /// The digest that the registry has for a name now, without the content; `None` if it does not
    /// say.
    pub async fn digest(&self, object: &Object) -> Result<Option<Digest>, Error> {
        self.first(true, "resolve", |server| {
            Box::pin(async move {
                let url = self.url(server, "manifests", &object.to_string());
                let response = self.retried(server, Method::HEAD, &url, accept()).await?;
                Ok(content_digest(response.headers()))
            })
        })
        .await
    }

    /// A manifest or index, verified against its digest if that is known.
    pub async fn manifest(&self, object: &Object) -> Result<Document, Error> {
        let resolve = matches!(object, Object::Tag(_));
        let capability = if resolve { "resolve" } else { "pull" };
        self.first(resolve, capability, |server| {
            Box::pin(async move {
                let url = self.url(server, "manifests", &object.to_string());
                let (headers, bytes) = self.small(server, &url, accept(), MAX_MANIFEST).await?;
                let got = Digest::from_sha256(Sha256::digest(&bytes).into());
                let want = match object {
                    Object::Digest(digest) => Some(digest.clone()),
                    Object::Tag(_) => content_digest(&headers),
                };
                if let Some(want) = want
                    && want != got
                {
                    return Err(Error::Content { url: show(&url), got, want });
                }
                let media_type = headers
                    .get(header::CONTENT_TYPE)
                    .and_then(|value| value.to_str().ok())
                    .and_then(|value| value.split(';').next())
                    .unwrap_or_default()
                    .trim()
                    .to_owned();
                Ok(Document { bytes, media_type, digest: got })
            })
        })
        .await
    }

    /// A small blob as a whole, verified.
    pub async fn small_blob(&self, digest: &Digest, size: u64) -> Result<Bytes, Error> {
        self.first(false, "pull", |server| {
            Box::pin(async move {
                let url = self.url(server, "blobs", &digest.to_string());
                let (_, bytes) = self.small(server, &url, HeaderMap::new(), size).await?;
                let got = Digest::from_sha256(Sha256::digest(&bytes).into());
                if got != *digest {
                    return Err(Error::Content { url: show(&url), got, want: digest.clone() });
                }
                Ok(bytes)
            })
        })
        .await
    }

    /// A blob as a stream of exactly `size` bytes. Its digest is for the reader to verify.
    pub fn blob(&self, digest: &Digest, size: u64) -> Blob<'_> {
        Blob {
            remote: self,
            digest: digest.clone(),
            size,
            offset: 0,
            open: None,
            attempts: 0,
            since_failure: 0,
            pace: Pace::default(),
        }
    }

    /// The first server that gives it.
    async fn first<'a, T>(
        &'a self,
        resolve: bool,
        capability: &'static str,
        ask: impl Fn(&'a Server) -> Pin<Box<dyn Future<Output = Result<T, Error>> + Send + 'a>>,
    ) -> Result<T, Error> {
        let able: Vec<&Server> = self
            .servers
            .iter()
            .filter(|server| if resolve { server.host.resolve } else { server.host.pull })
            .collect();
        let mut tried = Vec::new();
        let mut last = None;
        for server in able {
            if let Some(error) = last.take() {
                tried.push(crate::error::chain(&error));
            }
            match ask(server).await {
                Ok(answer) => return Ok(answer),
                // A wrong guess is no news.
                Err(error) if server.host.guess && matches!(error, Error::Connect { .. }) => {}
                Err(error) => last = Some(error),
            }
        }
        match (last, tried.is_empty()) {
            (None, _) => Err(Error::NoServer { registry: self.registry.clone(), capability }),
            (Some(error), true) => Err(error),
            (Some(error), false) => {
                Err(Error::All { tried: tried.join(", then "), last: Box::new(error) })
            }
        }
    }

    fn url(&self, server: &Server, what: &str, object: &str) -> Url {
        let mut url = server.host.base.clone();
        url.set_path(&format!("{}/{}/{what}/{object}", url.path(), self.repository));
        if let Some(namespace) = &server.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        url
    }

    /// A whole body of at most `limit` bytes.
    async fn small(
        &self,
        server: &Server,
        url: &Url,
        headers: HeaderMap,
        limit: u64,
    ) -> Result<(HeaderMap, Bytes), Error> {
        let mut attempt = 0;
        loop {
            let response = self.retried(server, Method::GET, url, headers.clone()).await?;
            let too_large = || Error::TooLarge { url: show(url), limit };
            let length = response.headers().get(header::CONTENT_LENGTH);
            let length: Option<u64> = length.and_then(|v| v.to_str().ok()?.parse().ok());
            if length.is_some_and(|length| length > limit) {
                return Err(too_large());
            }
            let (parts, body) = response.into_parts();
            let stall = self.registries.config.stall_timeout;
            let read = Limited::new(body, usize::try_from(limit).unwrap_or(usize::MAX)).collect();
            let error = match tokio::time::timeout(stall, read).await {
                Ok(Ok(body)) => return Ok((parts.headers, body.to_bytes())),
                Ok(Err(e)) if e.is::<http_body_util::LengthLimitError>() => return Err(too_large()),
                Ok(Err(source)) => Error::Connect { url: show(url), source },
                Err(_) => Error::Stalled { url: show(url), after: stall },
            };
            attempt += 1;
            self.wait_or_fail(error, attempt).await?;
        }
    }

    /// Sends until the answer is a success, or an error that will stay.
    async fn retried(
        &self,
        server: &Server,
        method: Method,
        url: &Url,
        headers: HeaderMap,
    ) -> Result<Response<Incoming>, Error> {
        let mut attempt = 0;
        loop {
            let error = match self.authorized(server, method.clone(), url, &headers).await {
                Ok(response) => {
                    self.remember(server);
                    return Ok(response);
                }
                Err(error) => error,
            };
            if server.host.guess && matches!(error, Error::Connect { .. }) {
                return Err(error);
            }
            attempt += 1;
            self.wait_or_fail(error, attempt).await?;
        }
    }

    /// A guess that was right is not made again.
    fn remember(&self, server: &Server) {
        let both = |s: &&Server| s.host.base.authority() == server.host.base.authority();
        if self.servers.iter().filter(both).any(|s| s.host.guess) {
            let mut schemes = self.registries.schemes.lock().expect("no panic while it is held");
            schemes.insert(
                server.host.base.authority().to_owned(),
                server.host.base.scheme().to_owned(),
            );
        }
    }

    async fn wait_or_fail(&self, error: Error, attempt: u32) -> Result<(), Error> {
        if !error.is_transient() || attempt >= ATTEMPTS {
            if let Error::Connect { .. } = error {
                // The scheme may have been learnt from a server that is another one by now.
                self.registries.schemes.lock().expect("no panic while it is held").clear();
            }
            return Err(error);
        }
        let asked = match &error {
            Error::Status { retry_after, .. } => *retry_after,
            _ => None,
        };
        let wait = asked.map(|wait| wait.min(MAX_RETRY_AFTER)).unwrap_or_else(|| {
            let full = self.registries.back_off * 2u32.pow(attempt - 1);
            full.mul_f64(rand::random_range(0.5..1.0))
        });
        tracing::debug!(error = crate::error::chain(&error), ?wait, "registry request is repeated");
        tokio::time::sleep(wait).await;
        Ok(())
    }

    /// Sends with what authorisation is known; if refused, gets what is asked for and sends again.
    async fn authorized(
        &self,
        server: &Server,
        method: Method,
        url: &Url,
        headers: &HeaderMap,
    ) -> Result<Response<Incoming>, Error> {
        let mut refused = false;
        loop {
            let (header, generation) = {
                let authorization = server.authorization.lock().await;
                (authorization.header.clone(), authorization.generation)
            };
            let (response, url) =
                self.follow(server, method.clone(), url, headers, header.as_ref()).await?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            let challenge = Challenge::parse(response.headers());
            let same_server = url.origin() == server.host.base.origin();
            if status == StatusCode::UNAUTHORIZED && same_server && !refused {
                refused = true;
                if self.authorize(server, &url, challenge, generation).await? {
                    continue;
                }
            }
            return Err(failure(&url, response).await);
        }
    }

    /// Gets a new authorisation, unless another request has since `generation`. False: there is
    /// nothing to get.
    async fn authorize(
        &self,
        server: &Server,
        url: &Url,
        challenge: Option<Challenge>,
        generation: u64,
    ) -> Result<bool, Error> {
        let mut authorization = server.authorization.lock().await;
        if authorization.generation != generation {
            return Ok(true);
        }
        let header = match (challenge, &server.credentials) {
            (None, _) => return Ok(false),
            (Some(_), Some(Credentials::Bearer(header))) => header.clone(),
            (Some(Challenge::Basic), Some(Credentials::Basic(header))) => header.clone(),
            (Some(Challenge::Basic), _) => return Ok(false),
            (Some(Challenge::Bearer { realm, service, scope }), credentials) => {
                let realm = self.realm(server, url, &realm)?;
                let token = self.token(server, realm, service, scope, credentials.as_ref()).await?;
                let mut header = HeaderValue::from_str(&format!("Bearer {token}"))
                    .map_err(|_| protocol(url, "a token with control characters"))?;
                header.set_sensitive(true);
                header
            }
        };
        if authorization.header.as_ref() == Some(&header) {
            // That very one was refused.
            return Ok(false);
        }
        authorization.header = Some(header);
        authorization.generation += 1;
        Ok(true)
    }

    fn realm(&self, server: &Server, url: &Url, realm: &str) -> Result<Url, Error> {
        let realm = url.join(realm).map_err(|_| protocol(url, "the token realm is no URL"))?;
        let insecure = &self.registries.config.insecure_registries;
        let host = realm.host_str().unwrap_or_default();
        let plain_is_fine = hosts::plain_allowed(host, realm.port(), insecure)
            || server.host.base.scheme() == "http"
                && realm.host_str() == server.host.base.host_str();
        match realm.scheme() {
            "https" => Ok(realm),
            "http" if plain_is_fine => Ok(realm),
            _ => Err(protocol(
                url,
                &format!("it wants a token from {}, which is not https", show(&realm)),
            )),
        }
    }

    /// A token (distribution docs, "Token Authentication" and "OAuth2").
    async fn token(
        &self,
        server: &Server,
        mut realm: Url,
        service: Option<String>,
        scope: Option<String>,
        credentials: Option<&Credentials>,
    ) -> Result<String, Error> {
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
        let client = self.client_for(server, &realm)?;
        let mut attempt = 0;
        if !matches!(credentials, Some(Credentials::Identity(_))) {
            let mut query = realm.query_pairs_mut();
            if let Some(service) = &service {
                query.append_pair("service", service);
            }
            for scope in scope.split_whitespace() {
                query.append_pair("scope", scope);
            }
        }
        loop {
            let mut request = Request::builder().uri(realm.as_str());
            let mut body = Bytes::new();
            match credentials {
                Some(Credentials::Identity(token)) => {
                    let mut form = url::form_urlencoded::Serializer::new(String::new());
                    form.append_pair("grant_type", "refresh_token")
                        .append_pair("refresh_token", token)
                        .append_pair("client_id", "holdfast")
                        .append_pair("scope", &scope);
                    if let Some(service) = &service {
                        form.append_pair("service", service);
                    }
                    body = form.finish().into();
                    request = request
                        .method(Method::POST)
                        .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
                }
                Some(Credentials::Basic(value)) => {
                    request = request.header(header::AUTHORIZATION, value);
                }
                Some(Credentials::Bearer(_)) | None => {}
            }
            let request = request
                .header(header::USER_AGENT, USER_AGENT)
                .body(Full::new(body))
                .map_err(|e| Error::Connect { url: show(&realm), source: e.into() })?;
            let error = match self.send(&client, &realm, request).await {
                Ok(response) if response.status().is_success() => {
                    let body = Limited::new(response.into_body(), MAX_SMALL).collect();
                    let stall = self.registries.config.stall_timeout;
                    match tokio::time::timeout(stall, body).await {
                        Ok(Ok(body)) => {
                            return serde_json::from_slice::<Answer>(&body.to_bytes())
                                .ok()
                                .and_then(|answer| answer.token.or(answer.access_token))
                                .filter(|token| !token.is_empty())
                                .ok_or_else(|| protocol(&realm, "its answer has no token"));
                        }
                        Ok(Err(source)) => Error::Connect { url: show(&realm), source },
                        Err(_) => Error::Stalled { url: show(&realm), after: stall },
                    }
                }
                // Not followed: the request has the credentials in it.
                Ok(response) if response.status().is_redirection() => {
                    return Err(Error::Redirect {
                        url: show(&realm),
                        rule: "a request for a token, which is not allowed".to_owned(),
                    });
                }
                Ok(response) => failure(&realm, response).await,
                Err(error) => error,
            };
            attempt += 1;
            self.wait_or_fail(error, attempt).await?;
        }
    }

    /// Sends one request and follows redirects; returns the answer and where it came from.
    async fn follow(
        &self,
        server: &Server,
        method: Method,
        url: &Url,
        headers: &HeaderMap,
        authorization: Option<&HeaderValue>,
    ) -> Result<(Response<Incoming>, Url), Error> {
        let mut url = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = Request::builder().method(method.clone()).uri(url.as_str());
            let target = request.headers_mut();
            if let Some(target) = target {
                target.extend(headers.clone());
                target.insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
                // What is secret is for this server alone.
                if url.origin() == server.host.base.origin() {
                    target.extend(server.host.headers.clone());
                    if let Some(value) = authorization {
                        target.insert(header::AUTHORIZATION, value.clone());
                    }
                }
            }
            let request = request
                .body(Full::default())
                .map_err(|e| Error::Connect { url: show(&url), source: e.into() })?;
            let client = self.client_for(server, &url)?;
            let response = self.send(&client, &url, request).await?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok((response, url));
            }
            let location = response
                .headers()
                .get(header::LOCATION)
                .and_then(|value| value.to_str().ok())
                .and_then(|location| url.join(location).ok())
                .ok_or_else(|| protocol(&url, "a redirect without a location"))?;
            self.check_redirect(server, &url, &location)?;
            url = location;
        }
        Err(Error::Redirect { url: show(&url), rule: format!("more than {MAX_REDIRECTS} times") })
    }

    fn check_redirect(&self, server: &Server, from: &Url, to: &Url) -> Result<(), Error> {
        let insecure = &self.registries.config.insecure_registries;
        let plain_is_fine = hosts::plain_allowed(
            to.host_str().unwrap_or_default(),
            to.port_or_known_default(),
            insecure,
        ) || to.origin() == server.host.base.origin();
        match to.scheme() {
            "https" => Ok(()),
            "http" if plain_is_fine && (from.scheme() == "http") => Ok(()),
            "http" => Err(Error::Redirect {
                url: show(from),
                rule: format!(
                    "to {}, which is not https; name its host in images.insecure_registries \
                     if that is intended",
                    show(to)
                ),
            }),
            other => Err(Error::Redirect {
                url: show(from),
                rule: format!("to a URL of scheme {other:?}"),
            }),
        }
    }

    /// The server's own TLS settings are for the server; elsewhere certificates are verified and
    /// ours are not shown.
    fn client_for(&self, server: &Server, url: &Url) -> Result<Http, Error> {
        let tls = if url.host_str() == server.host.base.host_str() {
            server.host.tls.clone()
        } else {
            Tls { ca: server.host.tls.ca.clone(), ..Tls::default() }
        };
        self.registries
            .client(&tls, server.host.dial_timeout)
            .map_err(|source| Error::Tls { host: server.host.base.to_string(), source })
    }

    /// One request, one answer (its head).
    async fn send(
        &self,
        client: &Http,
        url: &Url,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, Error> {
        let stall = self.registries.config.stall_timeout;
        match tokio::time::timeout(stall, client.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(Error::Connect { url: show(url), source: error.into() }),
            Err(_) => Err(Error::Stalled { url: show(url), after: stall }),
        }
    }
}

/// A blob on its way. A connection that breaks is made anew and goes on where it broke.
pub struct Blob<'a> {
    remote: &'a Remote,
    digest: Digest,
    size: u64,
    offset: u64,
    open: Option<Open>,
    /// Without [`PROGRESS`] in between.
    attempts: u32,
    since_failure: u64,
    pace: Pace,
}

struct Open {
    body: Incoming,
    url: Url,
    /// Bytes that the server sends again, as it knows no ranges.
    skip: u64,
}

/// Time spent waiting for bytes, and bytes that came.
#[derive(Default)]
struct Pace {
    waited: Duration,
    bytes: u64,
}

impl Blob<'_> {
    /// The next piece, or `None` after `size` bytes.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if self.offset == self.size {
                return Ok(None);
            }
            if self.open.is_none() {
                self.open = Some(self.connect().await?);
                self.pace = Pace::default();
            }
            let stall = self.remote.registries.config.stall_timeout;
            let open = self.open.as_mut().expect("opened above");
            let url = &open.url;
            let broken = |source| Error::Connect { url: show(url), source };
            let begun = Instant::now();
            let frame =
                tokio::time::timeout(stall.saturating_sub(self.pace.waited), open.body.frame());
            let error = match frame.await {
                Ok(Some(Ok(frame))) => {
                    let Ok(mut data) = frame.into_data() else { continue };
                    self.pace.waited += begun.elapsed();
                    self.pace.bytes += data.len() as u64;
                    let again = open.skip.min(data.len() as u64);
                    open.skip -= again;
                    let _ = data.split_to(again as usize);
                    if data.is_empty() {
                        continue;
                    }
                    if data.len() as u64 > self.size - self.offset {
                        return Err(Error::TooLarge { url: show(url), limit: self.size });
                    }
                    let too_slow = self.pace.waited >= stall / 2
                        && self.pace.bytes < SLOWEST * (stall.as_secs() / 2).max(1);
                    if !too_slow {
                        if self.pace.waited >= stall / 2 {
                            self.pace = Pace::default();
                        }
                        self.offset += data.len() as u64;
                        self.since_failure += data.len() as u64;
                        if self.since_failure >= PROGRESS {
                            self.attempts = 0;
                        }
                        return Ok(Some(data));
                    }
                    Error::Stalled { url: show(url), after: stall / 2 }
                }
                Ok(Some(Err(error))) => broken(error.into()),
                Ok(None) => broken(
                    format!("the body ends after {} of {} bytes", self.offset, self.size).into(),
                ),
                Err(_) => Error::Stalled { url: show(url), after: stall },
            };
            self.open = None;
            self.since_failure = 0;
            self.attempts += 1;
            self.remote.wait_or_fail(error, self.attempts).await?;
        }
    }

    async fn connect(&self) -> Result<Open, Error> {
        let (remote, offset) = (self.remote, self.offset);
        let digest = self.digest.to_string();
        let (digest, size) = (&digest, self.size);
        remote
            .first(false, "pull", |server| {
                let digest = digest.clone();
                Box::pin(async move {
                    let url = remote.url(server, "blobs", &digest);
                    let mut headers = HeaderMap::new();
                    if offset > 0 {
                        let range = HeaderValue::from_str(&format!("bytes={offset}-"));
                        headers.insert(header::RANGE, range.expect("digits"));
                    }
                    let response = remote.retried(server, Method::GET, &url, headers).await?;
                    let skip = match response.status() {
                        StatusCode::PARTIAL_CONTENT => {
                            let starts = response
                                .headers()
                                .get(header::CONTENT_RANGE)
                                .and_then(|value| value.to_str().ok())
                                .is_some_and(|v| v.starts_with(&format!("bytes {offset}-")));
                            if !starts {
                                return Err(protocol(&url, "it sent another range than asked for"));
                            }
                            0
                        }
                        _ => {
                            let length = response.headers().get(header::CONTENT_LENGTH);
                            let length: Option<u64> =
                                length.and_then(|v| v.to_str().ok()?.parse().ok());
                            if length.is_some_and(|length| length > size) {
                                return Err(Error::TooLarge { url: show(&url), limit: size });
                            }
                            offset
                        }
                    };
                    Ok(Open { body: response.into_body(), url, skip })
                })
            })
            .await
    }
}

/// What a 401 asks for.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// The strongest of RFC 9110's challenges that we know: Bearer, else Basic.
    fn parse(headers: &HeaderMap) -> Option<Self> {
        let mut found = None;
        for value in headers.get_all(header::WWW_AUTHENTICATE) {
            let Ok(mut text) = value.to_str() else { continue };
            while let Some((scheme, parameters, rest)) = challenge(text) {
                if scheme.eq_ignore_ascii_case("bearer") {
                    let get = |name: &str| {
                        let found = parameters.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
                        found.map(|(_, value)| value.clone())
                    };
                    if let Some(realm) = get("realm") {
                        return Some(Challenge::Bearer {
                            realm,
                            service: get("service"),
                            scope: get("scope"),
                        });
                    }
                } else if scheme.eq_ignore_ascii_case("basic") {
                    found = Some(Challenge::Basic);
                }
                text = rest;
            }
        }
        found
    }
}

type Parameters = Vec<(String, String)>;

/// The first challenge of a header's value, and what follows it.
fn challenge(text: &str) -> Option<(&str, Parameters, &str)> {
    let text = text.trim_start_matches([' ', ',', '\t']);
    let end = text.find([' ', ',']).unwrap_or(text.len());
    let (scheme, mut rest) = text.split_at(end);
    if scheme.is_empty() {
        return None;
    }
    let mut parameters = Vec::new();
    loop {
        let next = rest.trim_start_matches([' ', ',', '\t']);
        let Some(equals) = next.find('=') else { return Some((scheme, parameters, "")) };
        let name = next[..equals].trim_end();
        if name.contains([' ', ',']) || name.is_empty() {
            // The name of another scheme comes first.
            return Some((scheme, parameters, next));
        }
        let value = &next[equals + 1..];
        if let Some(quoted) = value.strip_prefix('"') {
            let mut text = String::new();
            let mut characters = quoted.char_indices();
            let mut end = quoted.len();
            while let Some((at, character)) = characters.next() {
                match character {
                    '"' => {
                        end = at + 1;
                        break;
                    }
                    '\\' => text.extend(characters.next().map(|(_, c)| c)),
                    other => text.push(other),
                }
            }
            parameters.push((name.to_owned(), text));
            rest = &quoted[end..];
        } else {
            let end = value.find([',', ' ']).unwrap_or(value.len());
            parameters.push((name.to_owned(), value[..end].to_owned()));
            rest = &value[end..];
        }
    }
}

fn accept() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::ACCEPT, HeaderValue::from_static(ACCEPT));
    headers
}

fn content_digest(headers: &HeaderMap) -> Option<Digest> {
    headers.get("docker-content-digest")?.to_str().ok()?.parse().ok()
}

fn protocol(url: &Url, what: &str) -> Error {
    Error::Protocol { url: show(url), what: what.to_owned() }
}

/// A URL as messages show it: without a query, which may have a signature in it.
fn show(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    let _ = url.set_password(None);
    let _ = url.set_username("");
    url.into()
}

/// The error of an answer that is no success.
async fn failure(url: &Url, response: Response<Incoming>) -> Error {
    #[derive(Deserialize)]
    struct Body {
        #[serde(default)]
        errors: Vec<Item>,
        #[serde(default)]
        details: String,
    }
    #[derive(Deserialize)]
    struct Item {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let status = response.status();
    let url = show(url);
    let retry_after = response
        .headers()
        .get(header::RETRY_AFTER)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.trim().parse().ok())
        .map(Duration::from_secs);
    let body = Limited::new(response.into_body(), MAX_SMALL).collect();
    let body = match tokio::time::timeout(Duration::from_secs(5), body).await {
        Ok(Ok(body)) => body.to_bytes(),
        _ => Bytes::new(),
    };
    let mut text = match serde_json::from_slice::<Body>(&body) {
        Ok(body) if !body.errors.is_empty() => body
            .errors
            .iter()
            .map(|item| match (item.code.as_str(), item.message.as_str()) {
                ("", message) => message.to_owned(),
                (code, "") => code.to_owned(),
                (code, message) => format!("{code}: {message}"),
            })
            .collect::<Vec<_>>()
            .join("; "),
        Ok(body) => body.details,
        Err(_) => String::new(),
    };
    text.retain(|c| !c.is_control());
    let detail = Detail(text.chars().take(300).collect());
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Error::Denied { url, status, detail },
        StatusCode::NOT_FOUND => Error::NotFound { url, detail },
        _ => Error::Status { url, status, detail, retry_after },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(values: &[&str]) -> HeaderMap {
        values.iter().map(|v| (header::WWW_AUTHENTICATE, v.parse().unwrap())).collect()
    }

    #[test]
    fn challenges_are_understood() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| {
            Some(Challenge::Bearer {
                realm: realm.into(),
                service: service.map(Into::into),
                scope: scope.map(Into::into),
            })
        };
        for (values, want) in [
            (&["Basic realm=\"x\""][..], Some(Challenge::Basic)),
            (
                &["Bearer realm=\"https://a/t\",service=\"s\",scope=\"repository:a/b:pull,push\""],
                bearer("https://a/t", Some("s"), Some("repository:a/b:pull,push")),
            ),
            (&["Basic realm=\"x\", Bearer realm=\"https://a\""], bearer("https://a", None, None)),
            (
                &["Negotiate", "bearer Realm=https://a , service=s"],
                bearer("https://a", Some("s"), None),
            ),
            (&["Bearer realm=\"a\\\"b\""], bearer("a\"b", None, None)),
            (&["Bearer service=\"x\""], None),
            (&["Negotiate"], None),
            (&[""], None),
            (&["Bearer realm=\"unterminated"], bearer("unterminated", None, None)),
        ] {
            assert_eq!(Challenge::parse(&headers(values)), want, "{values:?}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let auth = Auth {
            username: "me".into(),
            password: "s3cret".into(),
            auth: "s3cret".into(),
            identity_token: "s3cret".into(),
            registry_token: "s3cret".into(),
            ..Auth::default()
        };
        let text = format!("{auth:?}");
        assert!(text.contains("me") && !text.contains("s3cret"), "{text}");
    }

    #[test]
    fn credentials_are_for_one_server() {
        let host = |base: &str, upstream| Host {
            base: base.parse().unwrap(),
            resolve: true,
            pull: true,
            upstream,
            guess: false,
            headers: HeaderMap::new(),
            tls: Tls::default(),
            dial_timeout: None,
        };
        let hub = host("https://registry-1.docker.io/v2", true);
        for address in ["https://index.docker.io/v1/", "docker.io", "registry-1.docker.io"] {
            assert!(is_for(address, &hub, "docker.io"), "{address}");
        }
        let mirror = host("https://mirror.example:5000/v2", false);
        assert!(is_for("mirror.example:5000", &mirror, "docker.io"));
        assert!(is_for("https://mirror.example:5000/x", &mirror, "docker.io"));
        for address in ["docker.io", "mirror.example", "example:5000", "other", ":::"] {
            assert!(!is_for(address, &mirror, "docker.io"), "{address}");
        }
        let own = host("https://registry.example/v2", true);
        assert!(is_for("registry.example", &own, "registry.example"));
        assert!(!is_for("evil.example", &own, "registry.example"));
    }
}

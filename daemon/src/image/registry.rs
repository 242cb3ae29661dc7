//! A client for the OCI Distribution API (distribution-spec v1.1).
//!
//! One [`Remote`] is one image for the length of one pull: the servers that may have it, in order
//! ([`super::registries`], [`super::hosts`]), and for each what it wants for authorisation. HTTP/1.1 only: parallel layers then have connections, and so
//! windows, of their own, and a layer that is unpacked slowly holds up no other.
//!
//! Credentials go to the server that they are for, to the token service that it points to, and
//! nowhere else. Those of a request are for the registry that the reference names, or for the server
//! that the request names: not for mirrors, not for where a redirect leads. Those of the node
//! ([`super::authfile`]) are looked up for each server by its own name. Plain HTTP is spoken only where `hosts` allows it.
//!
//! Deadlines: an answer must begin within the stall timeout; a body must bring a minimum of bytes a
//! second over the stall timeout. The time that we do not read (unpacking is slower) is not counted.

mod blob;
mod challenge;
pub mod push;

use std::{
    collections::HashMap,
    error::Error as StdError,
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use base64::Engine as _;
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
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

pub use self::blob::Blob;
use self::challenge::Challenge;
use super::{
    authfile,
    connect::Connector,
    hosts::{self, Host, Tls},
    reference::{Object, Reference},
    registries::{self, Conf, Place},
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
    /// The registries.conf, or what it forbids.
    #[error(transparent)]
    Registries(#[from] registries::Error),
    /// What is to be sent cannot be read.
    #[error("read what is to be sent")]
    Payload(#[source] std::io::Error),
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
            Error::Registries(e) => e.kind(),
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
            Error::Payload(_) => Kind::Internal,
            Error::All { last, .. } => last.kind(),
        }
    }
}

impl Error {
    /// Whether it says that something is not there.
    pub(super) fn is_absence(&self) -> bool {
        match self {
            Error::NotFound { .. } => true,
            Error::All { last, .. } => last.is_absence(),
            _ => false,
        }
    }

    /// Whether no server answered.
    pub(super) fn is_unreachable(&self) -> bool {
        match self {
            Error::Connect { .. } | Error::Stalled { .. } => true,
            Error::All { last, .. } => last.is_unreachable(),
            _ => false,
        }
    }

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

type Http = Client<HttpsConnector<Connector>, push::Body>;

/// What all remotes share: connections, and which guesses were right.
pub struct Registries {
    config: config::Images,
    /// First wait before a retry; doubles each time.
    back_off: Duration,
    proxies: Arc<Matcher>,
    clients: Mutex<HashMap<(Tls, Option<Duration>), Http>>,
    /// Scheme by authority, where it was guessed.
    schemes: Mutex<HashMap<String, String>>,
    conf: registries::Source,
    /// Room for parts of blobs that come before their turn.
    ahead: Arc<tokio::sync::Semaphore>,
}

impl Registries {
    /// Connects to nothing yet.
    pub fn new(config: config::Images) -> Self {
        Self {
            conf: registries::Source::new(config.registries_conf.clone()),
            ahead: Arc::new(tokio::sync::Semaphore::new(blob::BUDGET)),
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

    /// What the node's registries.conf says now.
    pub fn conf(&self) -> Result<Arc<Conf>, registries::Error> {
        self.conf.current()
    }

    /// The servers that may have an image. Reads a few small files.
    pub async fn remote(
        self: &Arc<Self>,
        reference: &Reference,
        auth: Option<&Auth>,
    ) -> Result<Remote, Error> {
        let credentials = auth.map(Credentials::parse).transpose()?.flatten();
        let (this, wanted) = (self.clone(), reference.clone());
        let found = super::blocking(move || this.servers(&wanted)).await;
        // Only a runtime that ends gives nothing.
        let (places, helpers) = found.unwrap_or_else(|_| Ok(Default::default()))?;
        let mut servers = Vec::new();
        for (place, mut hosts) in places {
            self.settle_guesses(&mut hosts);
            let registry = place.name.registry();
            // What a user calls docker.io is docker.io's only where it is not moved elsewhere.
            let own_place = place.name.name() == reference.name();
            for host in hosts {
                let for_it = match auth.map(|a| a.server_address.as_str()) {
                    None | Some("") => own_place && host.upstream,
                    Some(address) => is_for(address, &host, registry),
                };
                let name = match host.upstream {
                    true => place.name.name(),
                    false => format!("{}/{}", host.base.authority(), place.name.repository()),
                };
                servers.push(Server {
                    namespace: (!host.upstream).then(|| registry.to_owned()),
                    repository: place.name.repository().to_owned(),
                    name,
                    from: host.from.clone().or_else(|| place.from.clone()),
                    place: place.clone(),
                    is_own: own_place && host.upstream,
                    given: if for_it { credentials.clone() } else { None },
                    own: tokio::sync::OnceCell::new(),
                    authorization: tokio::sync::Mutex::default(),
                    host,
                });
            }
        }
        Ok(Remote {
            registries: self.clone(),
            registry: reference.registry().to_owned(),
            helpers,
            servers,
            actions: "pull",
        })
    }

    /// The places of an image with their hosts, and the node's credential helpers.
    fn servers(&self, reference: &Reference) -> Result<Found, Error> {
        let conf = self.conf.current()?;
        let mut found = Vec::new();
        for place in conf.places(reference)? {
            let rules = hosts::Rules {
                directory: &self.config.hosts_dir,
                insecure: &self.config.insecure_registries,
                use_default: place.from.is_none(),
                unverified: place.insecure,
            };
            let hosts = hosts::hosts(place.name.registry(), rules)?;
            found.push((place, hosts));
        }
        Ok((found, conf.credential_helpers.clone()))
    }

    /// What was a guess once is known now.
    fn settle_guesses(&self, hosts: &mut Vec<Host>) {
        let schemes = self.schemes.lock().expect("no panic while it is held");
        if let Some(guess) = hosts.iter().find(|host| host.guess)
            && let Some(scheme) = schemes.get(guess.base.authority())
        {
            let authority = guess.base.authority().to_owned();
            hosts.retain(|h| h.base.authority() != authority || h.base.scheme() == scheme);
            hosts.iter_mut().for_each(|h| h.guess = false);
        }
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

/// Places with their hosts, and credential helpers.
type Found = (Vec<(Place, Vec<Host>)>, Vec<String>);

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

/// An image, for one pull.
pub struct Remote {
    registries: Arc<Registries>,
    registry: String,
    /// Programs that know the node's credentials.
    helpers: Vec<String>,
    servers: Vec<Server>,
    /// What a token must allow, where the server does not say.
    actions: &'static str,
}

struct Server {
    host: Host,
    /// The repository there.
    repository: String,
    /// Registry and repository, as the node's own credentials are looked up.
    name: String,
    place: Place,
    /// What the reference itself names.
    is_own: bool,
    /// The file that names it.
    from: Option<std::path::PathBuf>,
    /// Sent to mirrors, which may serve many registries.
    namespace: Option<String>,
    /// Of the request.
    given: Option<Credentials>,
    /// Of the node, once they were needed; or why there are none.
    own: tokio::sync::OnceCell<Result<Option<Credentials>, String>>,
    authorization: tokio::sync::Mutex<Authorization>,
}

impl Server {
    /// Mirrors are for reading, whatever they allow.
    fn takes_pushes(&self) -> bool {
        self.host.push && self.host.upstream && self.place.primary
    }
}

/// A server that may have an image, as shown to people.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Where the repository is.
    pub url: String,
    /// It is no registry of its own, but a mirror.
    pub mirror: bool,
    /// It is asked what a tag stands for.
    pub resolve: bool,
    /// It is asked for content.
    pub pull: bool,
    /// It is sent what is pushed.
    pub push: bool,
    /// Its certificate is not verified.
    pub unverified: bool,
    /// Only if the one before does not answer.
    pub fallback: bool,
    /// Credentials of a request that name no server go to it.
    pub credentials: bool,
    /// The file that names it.
    pub from: Option<std::path::PathBuf>,
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
    /// The servers, in the order in which they are asked.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        let mut guessed = None;
        self.servers
            .iter()
            .map(|server| {
                let host = &server.host;
                let mut url = host.base.clone();
                url.set_path(&format!("{}/{}", url.path(), server.repository));
                let fallback = guessed == Some(host.base.authority());
                guessed = host.guess.then(|| host.base.authority());
                Endpoint {
                    url: show(&url),
                    mirror: !(server.place.primary && host.upstream),
                    resolve: host.resolve,
                    pull: host.pull,
                    push: server.takes_pushes(),
                    unverified: host.tls.skip_verify || host.base.scheme() == "http",
                    fallback,
                    credentials: server.is_own,
                    from: server.from.clone(),
                }
            })
            .collect()
    }

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
        Blob::new(self, digest, size)
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
        url.set_path(&format!("{}/{}/{what}/{object}", url.path(), server.repository));
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
            let none = push::Payload::None;
            let sent = self.authorized(server, method.clone(), url, &headers, &none).await;
            let error = match sent {
                Ok((response, _)) => {
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
        payload: &push::Payload,
    ) -> Result<(Response<Incoming>, Url), Error> {
        let mut refused = false;
        loop {
            let (header, generation) = {
                let authorization = server.authorization.lock().await;
                (authorization.header.clone(), authorization.generation)
            };
            let (response, url) =
                self.follow(server, method.clone(), url, headers, header.as_ref(), payload).await?;
            let status = response.status();
            if status.is_success() {
                return Ok((response, url));
            }
            let challenge = Challenge::parse(response.headers());
            let same_server = url.origin() == server.host.base.origin();
            if status == StatusCode::UNAUTHORIZED && same_server && !refused {
                refused = true;
                if self.authorize(server, &url, challenge, generation).await? {
                    continue;
                }
            }
            let mut error = failure(&url, response).await;
            if let (Error::Denied { detail, .. }, Some(Err(why))) = (&mut error, server.own.get()) {
                detail.0 += &format!("; the node's own credentials are not to be had: {why}");
            }
            return Err(error);
        }
    }

    /// What the server may be told of who we are: what came with the request, else what the node
    /// has for it.
    async fn credentials<'a>(&self, server: &'a Server) -> Option<&'a Credentials> {
        if server.given.is_some() {
            return server.given.as_ref();
        }
        let config = &self.registries.config;
        let own = server.own.get_or_init(|| async {
            let found = authfile::find(config.auth_file.as_deref(), &self.helpers, &server.name);
            let parsed = match found.await {
                Ok(None) => return Ok(None),
                Ok(Some(auth)) => Credentials::parse(&auth).map_err(|e| e.to_string()),
                Err(error) => Err(crate::error::chain(&error)),
            };
            if let Err(why) = &parsed {
                tracing::warn!(name = server.name, why, "no credentials for the registry");
            }
            parsed
        });
        own.await.as_ref().ok()?.as_ref()
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
        let Some(challenge) = challenge else { return Ok(false) };
        let header = match (challenge, self.credentials(server).await) {
            (_, Some(Credentials::Bearer(header))) => header.clone(),
            (Challenge::Basic, Some(Credentials::Basic(header))) => header.clone(),
            (Challenge::Basic, _) => return Ok(false),
            (Challenge::Bearer { realm, service, scope }, credentials) => {
                let realm = self.realm(server, url, &realm)?;
                let token = self.token(server, realm, service, scope, credentials).await?;
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
        let scope =
            scope.unwrap_or_else(|| format!("repository:{}:{}", server.repository, self.actions));
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
                .body(push::full(body))
                .map_err(|e| Error::Connect { url: show(&realm), source: e.into() })?;
            let error = match self.send(&client, &realm, request, None).await {
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
        payload: &push::Payload,
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
            let (body, sent) = payload.body().await.map_err(Error::Payload)?;
            let request = request
                .body(body)
                .map_err(|e| Error::Connect { url: show(&url), source: e.into() })?;
            let client = self.client_for(server, &url)?;
            let response = self.send(&client, &url, request, Some(&sent)).await?;
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

    /// One request, one answer (its head). Time in which something is sent is no stall.
    async fn send(
        &self,
        client: &Http,
        url: &Url,
        request: Request<push::Body>,
        sent: Option<&push::Sent>,
    ) -> Result<Response<Incoming>, Error> {
        let stall = self.registries.config.stall_timeout;
        let mut answer = std::pin::pin!(client.request(request));
        let mut before = 0;
        loop {
            match tokio::time::timeout(stall, &mut answer).await {
                Ok(Ok(response)) => return Ok(response),
                Ok(Err(error)) => {
                    return Err(Error::Connect { url: show(url), source: error.into() });
                }
                Err(_) => {
                    let now = sent.map_or(0, |sent| sent.load(Ordering::Relaxed));
                    if now == before {
                        return Err(Error::Stalled { url: show(url), after: stall });
                    }
                    before = now;
                }
            }
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
            push: true,
            from: None,
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

//! Registries on loopback: Debian's docker-registry, and one that serves whatever a test tells it.

use std::{
    collections::HashMap,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Frame, Incoming},
    header,
};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt as _;

use crate::{
    ground::{Ground, Process},
    image::{Blob, Image},
    wait::{Look, eventually},
};

type Http = Client<HttpConnector, Full<Bytes>>;

/// A docker-registry process with storage of its own; killed and removed when dropped.
#[derive(Debug)]
pub struct Registry {
    remote: Remote,
    log: PathBuf,
    _process: Process,
    _ground: Option<Ground>,
}

impl Registry {
    /// Starts one in a directory of its own.
    ///
    /// # Errors
    /// docker-registry is not installed, or did not answer within ten seconds; the error has its log.
    pub async fn start() -> Result<Self> {
        let ground = Ground::new()?;
        let mut registry = Self::start_in(ground.path().join("registry")).await?;
        registry._ground = Some(ground);
        Ok(registry)
    }

    /// Starts one in `dir`, which is made.
    ///
    /// # Errors
    /// See [`Registry::start`].
    pub async fn start_in(dir: PathBuf) -> Result<Self> {
        Self::start_at(dir, free_address()?).await
    }

    /// Starts one in `dir` that listens at `address`.
    ///
    /// # Errors
    /// See [`Registry::start`].
    pub async fn start_at(dir: PathBuf, address: SocketAddr) -> Result<Self> {
        fs::create_dir_all(&dir)?;
        let config = dir.join("config.yml");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog:\n  level: warn\n  accesslog:\n    disabled: false\nstorage:\n  \
                 filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: {address}\n",
                dir.join("storage").display()
            ),
        )?;
        let log = dir.join("log");
        let process =
            Process::spawn("docker-registry", &["serve".as_ref(), config.as_os_str()], &[], &log)
                .context("start docker-registry: is it installed ('make deps')?")?;
        let registry = Self {
            remote: Remote::new(&address.to_string()),
            log,
            _process: process,
            _ground: None,
        };
        eventually(Duration::from_secs(10), "docker-registry", async || {
            Ok(match registry.remote.ping().await {
                Ok(_) => Look::Done(()),
                Err(error) => Look::Not(format!("{error:#}")),
            })
        })
        .await
        .with_context(|| registry.log())?;
        Ok(registry)
    }

    /// `host:port`
    pub fn host(&self) -> &str {
        &self.remote.host
    }

    /// Its log, one line for each request.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// How often a path was asked for with GET since the start.
    ///
    /// # Errors
    /// The log does not come.
    pub async fn gets(&self, path: &str) -> Result<usize> {
        Ok(self.answers(path).await?.len())
    }

    /// Bytes of answers to GET requests for a path since the start: what was asked for by ranges
    /// counts once in sum.
    ///
    /// # Errors
    /// The log does not come.
    pub async fn sent(&self, path: &str) -> Result<u64> {
        Ok(self.answers(path).await?.iter().sum())
    }

    /// Bytes of each answer to a GET request for a path since the start.
    async fn answers(&self, path: &str) -> Result<Vec<u64>> {
        // The access log has, after the request in quotes, status and bytes.
        let request = format!("\"GET {path} HTTP/1.1\" ");
        let log = self.whole_log().await?;
        let bytes = |rest: &str| rest.split_whitespace().nth(1).unwrap_or_default().parse::<u64>();
        let answers: Result<_, _> = log.split(&request).skip(1).map(bytes).collect();
        answers.context("bytes of an answer in the registry's log")
    }

    /// The requests about a repository since the start, as "METHOD path".
    ///
    /// # Errors
    /// The log does not come.
    pub async fn asked(&self, repository: &str) -> Result<Vec<String>> {
        let path = format!(" /v2/{repository}/");
        let log = self.whole_log().await?;
        // The access log has requests in quotes: "GET /v2/… HTTP/1.1".
        let requests = log.split('"').filter_map(|part| part.strip_suffix(" HTTP/1.1"));
        Ok(requests.filter(|line| line.contains(&path)).map(str::to_owned).collect())
    }

    /// The log with all requests that were answered before this call.
    async fn whole_log(&self) -> Result<String> {
        // It logs a request after it has answered: what is asked now is in the log after the rest.
        let mark = format!("/v2/?mark={}", rand::random::<u32>());
        self.remote.request(Method::GET, &mark, &[], Bytes::new()).await?;
        eventually(Duration::from_secs(5), "the registry's log", async || {
            let log = self.log();
            Ok(Look::when(log.contains(&mark), || format!("{} bytes", log.len())))
        })
        .await?;
        Ok(self.log())
    }

    /// Pushes an image under `name` ("repository:tag"); its reference for pulling.
    ///
    /// # Errors
    /// The registry refused something.
    pub async fn push(&self, name: &str, image: &Image) -> Result<String> {
        self.remote.push(name, image).await
    }

    /// Pushes an index and its images; its reference for pulling.
    ///
    /// # Errors
    /// The registry refused something.
    pub async fn push_index(&self, name: &str, index: &Blob, images: &[&Image]) -> Result<String> {
        self.remote.push_index(name, index, images).await
    }
}

/// A registry somewhere, over plain HTTP.
#[derive(Clone, Debug)]
pub struct Remote {
    host: String,
    http: Http,
}

impl Remote {
    /// The registry at `host:port`.
    pub fn new(host: &str) -> Self {
        Self { host: host.into(), http: Client::builder(TokioExecutor::new()).build_http() }
    }

    /// Whether it answers.
    ///
    /// # Errors
    /// It does not.
    pub async fn ping(&self) -> Result<()> {
        self.request(Method::GET, "/v2/", &[], Bytes::new()).await?;
        Ok(())
    }

    /// GETs a path; the body.
    ///
    /// # Errors
    /// Another status than success.
    pub async fn get(&self, path: &str) -> Result<Bytes> {
        let response = self.request(Method::GET, path, &[], Bytes::new()).await?;
        Ok(response.into_body().collect().await?.to_bytes())
    }

    /// Pushes an image under `name` ("repository:tag"); its reference for pulling.
    ///
    /// # Errors
    /// The registry refused something.
    pub async fn push(&self, name: &str, image: &Image) -> Result<String> {
        let (repository, tag) = name.rsplit_once(':').context("a name has a tag")?;
        self.push_blobs(repository, image).await?;
        self.push_manifest(repository, tag, &image.manifest).await?;
        Ok(format!("{}/{name}", self.host))
    }

    /// Pushes an index and its images; its reference for pulling.
    ///
    /// # Errors
    /// The registry refused something.
    pub async fn push_index(&self, name: &str, index: &Blob, images: &[&Image]) -> Result<String> {
        let (repository, tag) = name.rsplit_once(':').context("a name has a tag")?;
        for image in images {
            self.push_blobs(repository, image).await?;
            self.push_manifest(repository, &image.manifest.digest, &image.manifest).await?;
        }
        self.push_manifest(repository, tag, index).await?;
        Ok(format!("{}/{name}", self.host))
    }

    async fn push_blobs(&self, repository: &str, image: &Image) -> Result<()> {
        for blob in image.blobs() {
            let path = format!("/v2/{repository}/blobs/uploads/");
            let response = self.request(Method::POST, &path, &[], Bytes::new()).await?;
            let location = response
                .headers()
                .get(header::LOCATION)
                .context("an upload has no location")?
                .to_str()?
                .to_owned();
            let separator = if location.contains('?') { '&' } else { '?' };
            let location = format!("{location}{separator}digest={}", blob.digest);
            let octets = [(header::CONTENT_TYPE.as_str(), "application/octet-stream")];
            self.request(Method::PUT, &location, &octets, blob.content.clone().into()).await?;
        }
        Ok(())
    }

    async fn push_manifest(&self, repository: &str, tag: &str, manifest: &Blob) -> Result<()> {
        let path = format!("/v2/{repository}/manifests/{tag}");
        let kind = [(header::CONTENT_TYPE.as_str(), manifest.media_type.as_str())];
        self.request(Method::PUT, &path, &kind, manifest.content.clone().into()).await?;
        Ok(())
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Result<Response<Incoming>> {
        let uri = if path.starts_with("http://") {
            path.to_owned()
        } else {
            format!("http://{}{path}", self.host)
        };
        let mut request = Request::builder().method(&method).uri(&uri);
        for (key, value) in headers {
            request = request.header(*key, *value);
        }
        let response = self.http.request(request.body(Full::new(body))?).await?;
        if !response.status().is_success() {
            let status = response.status();
            let body = response.into_body().collect().await?.to_bytes();
            bail!("{method} {uri}: {status}: {}", String::from_utf8_lossy(&body));
        }
        Ok(response)
    }
}

/// A port of loopback that is free now.
///
/// # Errors
/// There is none.
pub fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port")?;
    Ok(listener.local_addr()?)
}

/// What a [`Scripted`] registry answers.
#[derive(Clone, Debug)]
pub enum Answer {
    /// 200 with this content type and body.
    Content(String, Bytes),
    /// 200 with this content type and this many spaces, made as they are sent.
    Spaces(String, u64),
    /// 200 and these bytes of a longer body; then nothing, for ever.
    Stall(String, Bytes, u64),
    /// 200 and these bytes of a longer body; then the connection is closed.
    Cut(String, Bytes, u64),
    /// Another status, with headers and body.
    Status(StatusCode, Vec<(String, String)>, String),
}

impl Answer {
    /// A blob or manifest as it is.
    pub fn blob(blob: &Blob) -> Self {
        Answer::Content(blob.media_type.clone(), blob.content.clone().into())
    }
}

type Answers = Arc<Mutex<HashMap<String, Answer>>>;
type Requests = Arc<Mutex<Vec<Asked>>>;

/// A request that a [`Scripted`] registry got.
#[derive(Clone, Debug)]
pub struct Asked {
    /// GET, HEAD, …
    pub method: String,
    /// With the query.
    pub path: String,
    /// `Authorization`, if there was one.
    pub authorization: Option<String>,
}

/// A registry that answers by a table: what is not in it is 404.
#[derive(Debug)]
pub struct Scripted {
    address: SocketAddr,
    answers: Answers,
    requests: Requests,
    server: JoinHandle<()>,
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Scripted {
    /// Listens on a free port of loopback.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub async fn start() -> Result<Self> {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let answers = Answers::default();
        let requests = Requests::default();
        let server = tokio::spawn(serve(listener, answers.clone(), requests.clone()));
        let registry = Self { address, answers, requests, server };
        registry.answer("/v2/", Answer::Content("application/json".into(), "{}".into()));
        Ok(registry)
    }

    /// `host:port`
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Sets the answer for a path, whatever the query.
    pub fn answer(&self, path: &str, answer: Answer) {
        self.answers.lock().unwrap().insert(path.into(), answer);
    }

    /// Serves an image under `name` ("repository:tag"); its reference for pulling. Answers can then be
    /// replaced, by [`Scripted::answer`].
    ///
    /// # Errors
    /// The name has no tag.
    pub fn serve(&self, name: &str, image: &Image) -> Result<String> {
        let (repository, tag) = name.rsplit_once(':').context("a name has a tag")?;
        for tag in [tag, &image.manifest.digest] {
            self.answer(
                &format!("/v2/{repository}/manifests/{tag}"),
                Answer::blob(&image.manifest),
            );
        }
        for blob in image.blobs() {
            self.answer(&format!("/v2/{repository}/blobs/{}", blob.digest), Answer::blob(blob));
        }
        Ok(format!("{}/{name}", self.address))
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Asked> {
        self.requests.lock().unwrap().clone()
    }
}

async fn serve(listener: tokio::net::TcpListener, answers: Answers, requests: Requests) {
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (answers, requests) = (answers.clone(), requests.clone());
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            let asked = Asked {
                method: request.method().to_string(),
                path: request.uri().to_string(),
                authorization: request
                    .headers()
                    .get(header::AUTHORIZATION)
                    .and_then(|value| value.to_str().ok())
                    .map(String::from),
            };
            requests.lock().unwrap().push(asked);
            let answer = answers.lock().unwrap().get(request.uri().path()).cloned();
            let head = request.method() == Method::HEAD;
            async move { respond(answer, head) }
        });
        connections.spawn(async move {
            // A client that goes away in the middle is what some tests are about.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

type Body = BoxBody<Bytes, std::io::Error>;

fn respond(answer: Option<Answer>, head: bool) -> Result<Response<Body>, hyper::http::Error> {
    let none = || Full::default().map_err(|never| match never {}).boxed();
    let whole = |bytes: Bytes| {
        if head { none() } else { Full::new(bytes).map_err(|never| match never {}).boxed() }
    };
    let ok = |kind: String, length: u64| {
        Response::builder()
            .header(header::CONTENT_TYPE, kind)
            .header(header::CONTENT_LENGTH, length)
    };
    match answer {
        None => Response::builder().status(StatusCode::NOT_FOUND).body(whole(
            r#"{"errors":[{"code":"NAME_UNKNOWN","message":"not in the script"}]}"#.into(),
        )),
        Some(Answer::Content(kind, bytes)) => ok(kind, bytes.len() as u64).body(whole(bytes)),
        Some(Answer::Status(status, headers, body)) => {
            let mut response = Response::builder().status(status);
            for (key, value) in headers {
                response = response.header(key, value);
            }
            response.body(whole(body.into()))
        }
        Some(Answer::Spaces(kind, length)) => {
            const PIECE: u64 = 64 << 10;
            let pieces = (0..length.div_ceil(PIECE)).map(move |piece| {
                let size = PIECE.min(length - piece * PIECE) as usize;
                Ok(Frame::data(Bytes::from(vec![b' '; size])))
            });
            let body =
                if head { none() } else { StreamBody::new(tokio_stream::iter(pieces)).boxed() };
            ok(kind, length).body(body)
        }
        Some(Answer::Stall(kind, bytes, length)) => {
            let body = tokio_stream::once(Ok(Frame::data(bytes))).chain(tokio_stream::pending());
            ok(kind, length).body(if head { none() } else { StreamBody::new(body).boxed() })
        }
        Some(Answer::Cut(kind, bytes, length)) => {
            let body = tokio_stream::iter([
                Ok(Frame::data(bytes)),
                Err(std::io::Error::other("cut by the script")),
            ]);
            ok(kind, length).body(if head { none() } else { StreamBody::new(body).boxed() })
        }
    }
}

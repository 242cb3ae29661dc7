//! The endpoint: `GET /metrics`, in the OpenMetrics text format 1.0.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ALLOW, CONTENT_TYPE},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// What Prometheus asks for first.
const FORMAT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Connections at a time; further ones wait. Scrapers are few.
const CONNECTIONS: usize = 16;

/// How long a client may take for its request.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a connection may last: scrapers that keep one connect again.
const LIFE: Duration = Duration::from_secs(600);

/// Pause after a failed accept: out of descriptors, mostly.
const AGAIN: Duration = Duration::from_millis(100);

/// Listens.
pub(crate) async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves until `stop`.
pub(crate) async fn serve(listener: TcpListener, registry: Registry, stop: CancellationToken) {
    let registry = Arc::new(registry);
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = room.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let (registry, stop) = (registry.clone(), stop.clone());
                tokio::spawn(async move {
                    connection(stream, registry, stop).await;
                    drop(place);
                });
            }
            Err(error) => {
                warn!(%error, "accept a connection for metrics");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, registry: Arc<Registry>, stop: CancellationToken) {
    let service = service_fn(move |request| {
        let registry = registry.clone();
        async move { Ok::<_, Infallible>(answer(&request, &registry)) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), service);
    let ended = tokio::select! {
        ended = served => ended,
        () = stop.cancelled() => return,
        () = tokio::time::sleep(LIFE) => return,
    };
    if let Err(error) = ended {
        debug!(%error, "a connection for metrics broke off");
    }
}

fn answer(request: &Request<Incoming>, registry: &Registry) -> Response<Full<Bytes>> {
    let text = |status, text: &'static str| {
        let mut answer = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
        *answer.status_mut() = status;
        answer
    };
    if request.uri().path() != "/metrics" {
        return text(StatusCode::NOT_FOUND, "metrics are at /metrics\n");
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        answer.headers_mut().insert(ALLOW, "GET, HEAD".parse().expect("it is a header's value"));
        return answer;
    }
    let mut body = String::new();
    match encode(&mut body, registry) {
        Ok(()) => {
            let mut answer = Response::new(Full::new(body.into()));
            let format = FORMAT.parse().expect("it is a header's value");
            answer.headers_mut().insert(CONTENT_TYPE, format);
            answer
        }
        Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, "metrics cannot be written\n"),
    }
}

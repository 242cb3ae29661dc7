//! Counts gRPC requests: by method and code, how long they took, how many are under way.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::LazyLock,
    task::{Context, Poll, ready},
    time::Instant,
};

use holdfast_protos::{admin, cri, images};
use hyper::{
    Request, Response,
    body::{Body, Frame, SizeHint},
    http::HeaderMap,
};
use prost::Message as _;
use tonic::Code;
use tower::Service;
use tracing::{Instrument, Span, field::Empty, instrument::Instrumented};

use super::{Labels, counts};
use crate::trace;

/// A service whose requests are counted.
#[derive(Clone, Debug)]
pub(crate) struct Counted<S>(pub(crate) S);

/// Every method that is served, by its path. What strangers ask for makes no metric of its own.
static METHODS: LazyLock<HashMap<String, (String, String)>> = LazyLock::new(|| {
    let mut known = HashMap::new();
    let mut add = |service: &str, method: &str| {
        known.insert(format!("/{service}/{method}"), (service.to_owned(), method.to_owned()));
    };
    for set in [cri::DESCRIPTOR_SET, admin::DESCRIPTOR_SET, images::DESCRIPTOR_SET] {
        let set = prost_types::FileDescriptorSet::decode(set).unwrap_or_default();
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    add(&format!("{}.{}", file.package(), service.name()), method.name());
                }
            }
        }
    }
    add("containerd.services.version.v1.Version", "Version");
    add("containerd.services.containers.v1.Containers", "Get");
    add("containerd.services.tasks.v1.Tasks", "Get");
    known
});

fn labels(path: &str) -> Labels<2> {
    match METHODS.get(path) {
        Some((service, method)) => {
            [("service", service.clone().into()), ("method", method.clone().into())]
        }
        None => [("service", "unknown".into()), ("method", "unknown".into())],
    }
}

impl<S, In, Out> Service<Request<In>> for Counted<S>
where
    S: Service<Request<In>, Response = Response<Out>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    Out: Body + Unpin + Send + 'static,
{
    type Response = Response<CountedBody<Out>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<In>) -> Self::Future {
        let underway = Underway::begin(labels(request.uri().path()), request.headers());
        let answer = self.0.call(request);
        Box::pin(async move {
            let mut underway = underway;
            let answer: Instrumented<S::Future> = answer.instrument(underway.span.clone());
            let answer = answer.await?;
            // A refusal has its code in front and no body.
            if let Some(code) = code_in(answer.headers()) {
                underway.code = code;
            }
            Ok(answer.map(|body| CountedBody { body, underway }))
        })
    }
}

/// A request from its arrival to the end of its answer.
#[derive(Debug)]
struct Underway {
    labels: Labels<2>,
    since: Instant,
    /// As it is told if nothing more is heard: who asked has gone.
    code: Code,
    span: Span,
}

impl Underway {
    fn begin(labels: Labels<2>, headers: &HeaderMap) -> Self {
        counts().requests_in_flight.get_or_create(&labels).inc();
        let [(_, service), (_, method)] = &labels;
        let span = tracing::info_span!(
            target: trace::TARGET,
            "rpc",
            otel.name = format!("{service}/{method}"),
            otel.kind = "server",
            rpc.system = "grpc",
            rpc.service = %service,
            rpc.method = %method,
            rpc.grpc.status_code = Empty,
            otel.status_code = Empty,
        );
        trace::continue_from(&span, headers);
        Self { labels, since: Instant::now(), code: Code::Cancelled, span }
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        let counts = counts();
        counts.requests_in_flight.get_or_create(&self.labels).dec();
        let took = self.since.elapsed().as_secs_f64();
        counts.request_seconds.get_or_create(&self.labels).observe(took);
        let [service, method] = self.labels.clone();
        let code = ("code", name(self.code).into());
        counts.requests.get_or_create(&[service, method, code]).inc();
        self.span.record("rpc.grpc.status_code", self.code as i32);
        if self.code != Code::Ok {
            self.span.record("otel.status_code", "ERROR");
        }
    }
}

fn code_in(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|code| Code::from_bytes(code.as_bytes()))
}

/// As the gRPC specification writes it.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// An answer whose end is noted.
#[derive(Debug)]
pub(crate) struct CountedBody<B> {
    body: B,
    underway: Underway,
}

impl<B: Body + Unpin> Body for CountedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let span = self.underway.span.clone();
        // What a stream does as it is read belongs to its request.
        let _entered = span.enter();
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(code) = frame.trailers_ref().and_then(code_in)
        {
            self.underway.code = code;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body_util::{BodyExt as _, Full, StreamBody};
    use hyper::body::Bytes;
    use tower::service_fn;

    use super::*;

    fn ended(method: &str, code: &'static str) -> u64 {
        let labels = labels(method);
        let [service, method] = labels;
        counts().requests.get_or_create_owned(&[service, method, ("code", code.into())]).get()
    }

    #[tokio::test]
    async fn a_request_is_counted_by_the_code_that_its_trailers_bring() {
        let path = "/runtime.v1.RuntimeService/Version";
        let mut service = Counted(service_fn(async |_: Request<()>| {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().unwrap());
            let frames = [
                Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"x"))),
                Ok(Frame::trailers(trailers)),
            ];
            Ok::<_, Infallible>(Response::new(StreamBody::new(futures::stream::iter(frames))))
        }));
        let request = || Request::builder().uri(path).body(()).unwrap();
        let (ok, gone) = (ended(path, "OK"), ended(path, "CANCELLED"));
        let answer = service.call(request()).await.unwrap();
        assert_eq!(counts().requests_in_flight.get_or_create_owned(&labels(path)).get(), 1);
        answer.into_body().collect().await.unwrap();
        assert_eq!(ended(path, "OK"), ok + 1);
        // The client goes before the end.
        drop(service.call(request()).await.unwrap());
        assert_eq!(ended(path, "CANCELLED"), gone + 1);
        assert_eq!(counts().requests_in_flight.get_or_create_owned(&labels(path)).get(), 0);
    }

    #[tokio::test]
    async fn a_refusal_is_counted_and_a_stranger_makes_no_label() {
        let mut service = Counted(service_fn(async |_: Request<()>| {
            let answer = Response::builder().header("grpc-status", "12");
            Ok::<_, Infallible>(answer.body(Full::<Bytes>::default()).unwrap())
        }));
        for path in ["/no.such.Service/A", "/no.such.Service/B", "nonsense"] {
            let before = ended(path, "UNIMPLEMENTED");
            let request = Request::builder().uri(path).body(()).unwrap();
            service.call(request).await.unwrap().into_body().collect().await.unwrap();
            assert_eq!(ended("anything", "UNIMPLEMENTED"), before + 1);
        }
        assert!(METHODS.contains_key("/runtime.v1.ImageService/PullImage"));
        assert!(METHODS.contains_key("/holdfast.admin.v1.Admin/PullImage"), "{:?}", METHODS.keys());
    }
}

//! OpenTelemetry traces over OTLP: what a request was made of, in the daemon and in its calls of shims.
//!
//! Spans that are meant for traces have the target [`TARGET`]; the log does not show them. A request
//! that comes with a `traceparent` (as the kubelet's do when it traces) is part of that trace, and calls
//! of shims take it along. Built without the feature `otlp`, or without an endpoint in the configuration,
//! all of it is nothing.

use hyper::http::HeaderMap;
use tracing::Span;

/// Target of spans for traces, which log filters leave out.
pub const TARGET: &str = "holdfast::trace";

/// Whether this build can send traces.
pub const BUILT: bool = cfg!(feature = "otlp");

/// Makes a span that was just made part of the trace that the request's headers name.
#[cfg_attr(not(feature = "otlp"), expect(unused_variables, reason = "there are no traces"))]
pub(crate) fn continue_from(span: &Span, headers: &HeaderMap) {
    #[cfg(feature = "otlp")]
    otlp::continue_from(span, headers);
}

/// Notes a call of a shim that has just ended, below the current span.
#[cfg_attr(not(feature = "otlp"), expect(unused_variables, reason = "there are no traces"))]
pub(crate) fn called(call: &'static str, took: std::time::Duration, result: &'static str) {
    #[cfg(feature = "otlp")]
    otlp::called(call, took, result);
}

/// What a call to another process takes along: `traceparent` and the like.
pub(crate) fn carried() -> Vec<(String, String)> {
    #[cfg(feature = "otlp")]
    return otlp::carried();
    #[cfg(not(feature = "otlp"))]
    Vec::new()
}

#[cfg(feature = "otlp")]
pub use otlp::{Tracer, layer};

#[cfg(feature = "otlp")]
mod otlp {
    use std::{
        collections::HashMap,
        sync::OnceLock,
        time::{Duration, SystemTime},
    };

    use hyper::http::HeaderMap;
    use opentelemetry::{
        KeyValue,
        propagation::{Extractor, TextMapPropagator as _},
        trace::{
            Span as _, SpanKind, Status, TraceContextExt as _, Tracer as _, TracerProvider as _,
        },
    };
    use opentelemetry_otlp::WithExportConfig as _;
    use opentelemetry_sdk::{
        Resource,
        propagation::TraceContextPropagator,
        trace::{Sampler, SdkTracer, SdkTracerProvider},
    };
    use tracing::{Span, Subscriber};
    use tracing_opentelemetry::OpenTelemetrySpanExt as _;
    use tracing_subscriber::{Layer, filter::filter_fn, registry::LookupSpan};

    /// How long one export may take. What a collector does not take is dropped, never waited for.
    const EXPORT: Duration = Duration::from_secs(5);

    /// How long the last spans may take to be sent when the daemon ends.
    const GOODBYE: Duration = Duration::from_secs(2);

    /// Sends traces until it is dropped.
    #[derive(Debug)]
    pub struct Tracer(SdkTracerProvider);

    impl Drop for Tracer {
        fn drop(&mut self) {
            // A collector that is gone keeps nobody from ending.
            let _ = self.0.shutdown_with_timeout(GOODBYE);
        }
    }

    /// What is to be added to the log's subscriber. Must be called in a tokio runtime; nothing is
    /// connected to yet.
    ///
    /// # Errors
    /// The endpoint is no URL that the exporter takes.
    pub fn layer<S>(
        endpoint: &str,
        samples_per_million: u32,
    ) -> Result<(Box<dyn Layer<S> + Send + Sync>, Tracer), String>
    where
        S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
    {
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(EXPORT)
            .build()
            .map_err(|e| format!("tracing.endpoint {endpoint:?}: {e}"))?;
        let ratio = f64::from(samples_per_million) / 1e6;
        let node = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            // Whoever began a trace has decided on it.
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(ratio))))
            .with_resource(
                Resource::builder()
                    .with_service_name("holdfastd")
                    .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
                    .with_attribute(KeyValue::new("host.name", node.trim().to_owned()))
                    .build(),
            )
            .build();
        let layer = tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("holdfastd"))
            .with_filter(filter_fn(|metadata| metadata.target() == super::TARGET));
        // Calls of shims are noted when they have ended, without a span of the log's library.
        let _ = CALLS.set(provider.tracer("holdfastd"));
        Ok((Box::new(layer), Tracer(provider)))
    }

    /// For spans of calls of shims.
    static CALLS: OnceLock<SdkTracer> = OnceLock::new();

    pub(super) fn called(call: &'static str, took: Duration, result: &'static str) {
        let Some(tracer) = CALLS.get() else { return };
        let context = Span::current().context();
        if !context.span().span_context().is_sampled() {
            return;
        }
        let now = SystemTime::now();
        let mut span = tracer
            .span_builder(format!("shim {call}"))
            .with_kind(SpanKind::Client)
            .with_start_time(now.checked_sub(took).unwrap_or(now))
            .with_attributes([
                KeyValue::new("rpc.system", "ttrpc"),
                KeyValue::new("rpc.method", call),
                KeyValue::new("result", result),
            ])
            .start_with_context(tracer, &context);
        if result != "ok" {
            span.set_status(Status::error(result));
        }
        span.end_with_timestamp(now);
    }

    struct Headers<'a>(&'a HeaderMap);

    impl Extractor for Headers<'_> {
        fn get(&self, key: &str) -> Option<&str> {
            self.0.get(key)?.to_str().ok()
        }
        fn keys(&self) -> Vec<&str> {
            self.0.keys().map(|key| key.as_str()).collect()
        }
    }

    pub(super) fn continue_from(span: &Span, headers: &HeaderMap) {
        if span.is_disabled() || !headers.contains_key("traceparent") {
            return;
        }
        let parent = TraceContextPropagator::new().extract(&Headers(headers));
        if parent.span().span_context().is_valid() {
            // It is an error only where there are no traces.
            let _ = span.set_parent(parent);
        }
    }

    pub(super) fn carried() -> Vec<(String, String)> {
        let context = Span::current().context();
        if !context.span().span_context().is_valid() {
            return Vec::new();
        }
        let mut carrier = HashMap::new();
        TraceContextPropagator::new().inject_context(&context, &mut carrier);
        carrier.into_iter().filter(|(_, value): &(String, String)| !value.is_empty()).collect()
    }
}

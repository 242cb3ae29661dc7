//! Traces: what a collector is sent of a request that comes with a trace of its own.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{Node, node::on, wait::Look};
use holdfast_protos::cri;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    trace::v1::Span,
};
use tonic::{Request, Response, Status};

/// A collector that keeps what it is sent.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let all = request.into_inner().resource_spans.into_iter().flat_map(|r| r.scope_spans);
        let spans = all.flat_map(|scope| scope.spans);
        self.0.lock().expect("no panic while it is held").extend(spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_with_a_trace_is_traced_down_to_the_shims_calls() -> Result<()> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let collector = Collector::default();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let service = TraceServiceServer::new(collector.clone());
    let server = tonic::transport::Server::builder().add_service(service);
    let server = tokio::spawn(server.serve_with_incoming(incoming));

    // Only what comes with a decision is traced.
    let config = format!("[tracing]\nendpoint = \"http://{address}\"\nsamples_per_million = 0\n");
    let mut node = Node::builder().config(&config).start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let request = pod.container(&image).sh("exec sleep 1000").request();
    let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let traced = |sampled: &str| {
        let mut request = Request::new(request.clone());
        let header = format!("00-{trace}-{parent}-{sampled}").parse().expect("ascii");
        request.metadata_mut().insert("traceparent", header);
        request
    };
    node.cri().runtime().create_container(traced("01")).await?;
    let refused = cri::ContainerStatusRequest { container_id: "f".repeat(64), verbose: false };
    let mut refused = Request::new(refused);
    refused.metadata_mut().insert("traceparent", format!("00-{trace}-{parent}-01").parse()?);
    node.cri().runtime().container_status(refused).await.unwrap_err();

    let spans = on(&node, Duration::from_secs(30), "the spans", async || {
        let spans = collector.0.lock().expect("no panic while it is held").clone();
        let there = spans.iter().any(|span| span.name.ends_with("/ContainerStatus"));
        Ok(if there { Look::Done(spans) } else { Look::Not(format!("{} spans", spans.len())) })
    })
    .await?;
    let names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    ensure!(spans.iter().all(|span| hex(&span.trace_id) == trace), "others are sent: {names:?}");
    let named: BTreeMap<_, _> = spans.iter().map(|span| (span.name.as_str(), span)).collect();
    let find = |name: &str| named.get(name).with_context(|| format!("no {name} in {names:?}"));
    let rpc = find("runtime.v1.RuntimeService/CreateContainer")?;
    assert_eq!(hex(&rpc.parent_span_id), parent);
    let work = find("create container")?;
    assert_eq!(work.parent_span_id, rpc.span_id);
    let call = spans.iter().find(|span| span.name.starts_with("shim "));
    let call = call.with_context(|| format!("no shim's call in {names:?}"))?;
    assert_eq!(call.parent_span_id, work.span_id);
    ensure!(call.start_time_unix_nano >= work.start_time_unix_nano);
    ensure!(call.end_time_unix_nano > call.start_time_unix_nano);
    let failed = find("runtime.v1.RuntimeService/ContainerStatus")?;
    assert_eq!(failed.status.as_ref().map(|status| status.code), Some(2), "{failed:?}");
    // The log says nothing of spans.
    ensure!(!node.daemon_log(400).contains("otel.name"), "{}", node.daemon_log(400));

    // A collector that is gone holds nobody up, neither at work nor at the end.
    server.abort();
    node.cri().runtime().create_container(traced("01")).await?;
    let before = std::time::Instant::now();
    node.terminate()?;
    ensure!(before.elapsed() < Duration::from_secs(15), "{:?}", before.elapsed());
    node.restart().await?;
    node.finish().await
}

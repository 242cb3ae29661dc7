//! gRPC over a unix socket.
//!
//! tonic's own server ends a request whose `grpc-timeout` has passed with CANCELLED, and races with
//! the client, which says DEADLINE_EXCEEDED of the same event. The deadline is the client's: here it
//! resets the stream, and that is all.

use std::time::Duration;

use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;
use tracing::{debug, warn};

use crate::metrics::Counted;

/// Requests under way on one connection: the kubelet has one for all of a node's pods.
const STREAMS: u32 = 4096;

/// Pause after a failed accept: out of descriptors, mostly.
const AGAIN: Duration = Duration::from_millis(100);

/// Serves until `stop` is cancelled, then lets the requests under way end.
pub(crate) async fn serve(listener: UnixListener, routes: Routes, stop: CancellationToken) {
    let routes = routes.prepare();
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            // The end first: a busy listener must not put it off.
            biased;
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                connections.spawn(connection(stream, routes.clone(), stop.clone()));
            }
            Err(error) => {
                warn!(%error, "accept a connection");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
    connections.close();
    connections.wait().await;
}

async fn connection(stream: UnixStream, routes: Routes, stop: CancellationToken) {
    let served = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(Counted(routes)));
    tokio::pin!(served);
    let ended = tokio::select! {
        ended = &mut served => ended,
        () = stop.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        // Clients that are killed, or that do not say goodbye.
        debug!(%error, "connection broke off");
    }
}

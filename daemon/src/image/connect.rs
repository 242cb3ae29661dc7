//! Connections to registries: straight, or through the proxy that the environment names
//! (`HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`, in either case, as curl and Go read them).
//!
//! A proxy is used for HTTPS only, by CONNECT: it sees neither credentials nor content. Plain HTTP
//! is for registries near by, and goes straight. So do loopback addresses.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper::Uri;
use hyper_util::{
    client::{
        legacy::connect::{HttpConnector, proxy::Tunnel},
        proxy::matcher::Matcher,
    },
    rt::TokioIo,
};
use tokio::net::TcpStream;
use tower::Service;

use super::hosts;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Makes TCP connections to a server or through a proxy to it.
#[derive(Clone)]
pub(super) struct Connector {
    tcp: HttpConnector,
    proxies: Arc<Matcher>,
}

impl Connector {
    /// `dial_timeout` bounds the making of a connection, to the server or the proxy.
    pub(super) fn new(proxies: Arc<Matcher>, dial_timeout: Duration) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_keepalive(Some(Duration::from_secs(30)));
        tcp.set_connect_timeout(Some(dial_timeout));
        Self { tcp, proxies }
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.tcp.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let straight = to.scheme_str() != Some("https")
            || hosts::plain_allowed(to.host().unwrap_or_default(), None, &[]);
        let proxy = if straight { None } else { self.proxies.intercept(&to) };
        match proxy {
            None => {
                let connect = self.tcp.call(to);
                Box::pin(async move { Ok(connect.await?) })
            }
            Some(proxy) => {
                let mut tunnel = Tunnel::new(proxy.uri().clone(), self.tcp.clone());
                if let Some(auth) = proxy.basic_auth() {
                    tunnel = tunnel.with_auth(auth.clone());
                }
                let connect = tunnel.call(to);
                let name = proxy.uri().authority().map(|a| a.host().to_owned());
                Box::pin(async move {
                    connect.await.map_err(|source| {
                        BoxError::from(Proxy {
                            name: name.unwrap_or_default(),
                            source: source.into(),
                        })
                    })
                })
            }
        }
    }
}

/// That it was the proxy is half of the answer.
#[derive(Debug, thiserror::Error)]
#[error("through the proxy {name}")]
struct Proxy {
    name: String,
    #[source]
    source: BoxError,
}

//! `port-forward`: ports of this node that lead to ports of a pod. Each connection has a session of its
//! own, so that one that fails, or is not read from, is nothing to the others.

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use futures::future::join_all;
use holdfast_protos::cri;
use tokio::net::{TcpListener, TcpStream};

use super::{
    Client, Hint, args::PortForward, client, find::All, session, table::printable, terminal::Ends,
    text::Forward, wire,
};

/// `holdfast port-forward`
pub(super) async fn port_forward(client: &mut Client, args: PortForward) -> Result<u8> {
    let pod = All::list(client).await?.pod(&args.pod)?;
    if pod.state() != cri::PodSandboxState::SandboxReady {
        bail!("pod {} is stopped: nothing listens in it", printable(&args.pod));
    }
    let mut ends = Ends::catch()?;
    // All of them before any is told of, so that what is told of works.
    let mut listeners = Vec::new();
    for forward in &args.ports {
        listeners.push((listen(forward).await?, forward.remote));
    }
    for (listener, remote) in &listeners {
        wire::write(&format!("{} -> {remote}\n", listener.local_addr()?))?;
    }
    let client = &*client;
    let serving = listeners.iter().map(|(listener, port)| serve(client, &pod.id, listener, *port));
    tokio::select! {
        biased;
        _ = ends.next() => Ok(0),
        _ = join_all(serving) => unreachable!("listeners are served for ever"),
    }
}

async fn listen(forward: &Forward) -> Result<TcpListener> {
    let address = SocketAddr::new(forward.address, forward.local);
    TcpListener::bind(address).await.map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::AddrInUse => "choose another port, or 0 for any that is free",
            io::ErrorKind::PermissionDenied => "ports below 1024 need root: choose a higher one",
            io::ErrorKind::AddrNotAvailable => "it must be an address of this node",
            _ => "",
        };
        let error = anyhow::Error::new(error).context(format!("listen on {address}"));
        if hint.is_empty() { error } else { Hint::on(error, hint) }
    })
}

/// Never ends.
async fn serve(client: &Client, pod: &str, listener: &TcpListener, port: u16) {
    let mut connections = futures::stream::FuturesUnordered::new();
    loop {
        use futures::StreamExt as _;
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => connections.push(async move {
                    if let Err(error) = forward(client, pod, port, stream).await {
                        client::report(&error.context(format!("connection from {peer} to port {port}")));
                    }
                }),
                Err(error) => {
                    // Out of descriptors, mostly: the connection stays in the queue, so wait a little.
                    let _ = writeln!(io::stderr(), "holdfast: accept a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(()) = connections.next() => {}
        }
    }
}

async fn forward(client: &Client, pod: &str, port: u16, stream: TcpStream) -> Result<()> {
    let request =
        cri::PortForwardRequest { pod_sandbox_id: pod.to_owned(), port: vec![port.into()] };
    let mut runtime = client.runtime.clone();
    let url = client.quick(runtime.port_forward(request)).await?.url;
    stream.set_nodelay(true).context("set TCP_NODELAY")?;
    Ok(session::client_for(client, &url).await?.port_forward(&url, stream).await?)
}

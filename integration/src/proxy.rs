//! A TCP proxy that ends connections early, as some do after so many bytes.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::Result;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
};

/// A proxy on loopback; ends when dropped.
#[derive(Debug)]
pub struct Cutting {
    address: SocketAddr,
    sent: Arc<AtomicU64>,
    cuts: Arc<AtomicU64>,
    server: JoinHandle<()>,
}

impl Drop for Cutting {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Cutting {
    /// Leads to `to` ("host:port"), and ends each connection once `limit` bytes came back on it.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub async fn start(to: &str, limit: u64) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (sent, cuts) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let (to, counted, cut) = (to.to_owned(), sent.clone(), cuts.clone());
        let server = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (to, counted, cut) = (to.clone(), counted.clone(), cut.clone());
                // One that breaks is what this is for.
                connections.spawn(async move {
                    let _ = relay(stream, &to, limit, &counted, &cut).await;
                });
            }
        });
        Ok(Self { address, sent, cuts, server })
    }

    /// `host:port`
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Bytes that came back so far, with heads.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::SeqCst)
    }

    /// Connections that it ended.
    pub fn cuts(&self) -> u64 {
        self.cuts.load(Ordering::SeqCst)
    }
}

async fn relay(
    client: TcpStream,
    to: &str,
    limit: u64,
    sent: &AtomicU64,
    cuts: &AtomicU64,
) -> std::io::Result<()> {
    let server = TcpStream::connect(to).await?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let up = tokio::io::copy(&mut from_client, &mut to_server);
    let down = async {
        let mut left = limit;
        let mut piece = vec![0; 64 << 10];
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
            let length = from_server.read(&mut piece[..most]).await?;
            if length == 0 {
                return Ok(());
            }
            to_client.write_all(&piece[..length]).await?;
            left -= length as u64;
            sent.fetch_add(length as u64, Ordering::SeqCst);
        }
        cuts.fetch_add(1, Ordering::SeqCst);
        to_client.shutdown().await
    };
    tokio::select! {
        done = up => done.map(|_| ()),
        done = down => done,
    }
}

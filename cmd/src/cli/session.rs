//! A session of exec or attach over the daemon's streaming server, with our own stdin, stdout, stderr
//! and terminal at its other end.

use std::{
    io::{self, IsTerminal as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use holdfast_protos::cri;
use holdfast_streaming::client::{self as streaming, Ended};
use tokio::io::{stderr, stdin, stdout};

use super::{
    Client, Hint,
    detach::{Keys, Watched},
    terminal::{Follower, Raw},
};

/// Which streams a session has.
#[derive(Clone, Debug, Default)]
pub(super) struct Terms {
    /// The process has a terminal.
    pub(super) tty: bool,
    /// Our stdin is its.
    pub(super) stdin: bool,
    /// What leaves the session, if our stdin is a terminal.
    pub(super) keys: Keys,
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// The process exited with this code (attach: its output ended).
    Ended(i32),
    /// The keys were typed.
    Detached,
    /// A signal asks us to end.
    Signal(i32),
}

/// A client that is trusting as the URL needs it.
pub(super) async fn client_for(client: &Client, url: &str) -> Result<streaming::Client> {
    if !url.starts_with("https:") {
        return Ok(streaming::Client::new());
    }
    let certificates = certificates(client).await?.with_context(|| {
        format!(
            "{url} is of a server with TLS, and the daemon does not tell its streaming.tls_cert"
        )
    })?;
    streaming::Client::trusting(&certificates)
        .map_err(|error| Hint::on(error.into(), "it must be readable: use sudo"))
}

/// The file of the streaming server's certificate. The daemon tells its configuration over the socket,
/// which is as much to be trusted as the commands that it takes there.
async fn certificates(client: &Client) -> Result<Option<PathBuf>> {
    let mut runtime = client.runtime.clone();
    let status = client.quick(runtime.status(cri::StatusRequest { verbose: true })).await?;
    let config = status.info.get("config").and_then(|text| text.parse::<toml::Table>().ok());
    let path =
        config.as_ref().and_then(|config| config.get("streaming")?.get("tls_cert")?.as_str());
    Ok(path.filter(|path| !path.is_empty()).map(|path| Path::new(path).to_owned()))
}

/// Begins the session behind a URL.
pub(super) async fn open(client: &Client, url: &str) -> Result<streaming::Session> {
    Ok(client_for(client, url).await?.open(url).await?)
}

/// Joins our ends to a session's, until that ends, or a signal comes.
pub(super) async fn join(
    session: streaming::Session,
    terms: &Terms,
    signal: impl Future<Output = i32>,
) -> Result<How> {
    let typed = terms.stdin && io::stdin().is_terminal();
    let (follower, sizes) = match terms.tty {
        true => {
            let (follower, sizes) = Follower::new(typed)?;
            (Some(follower), Some(sizes))
        }
        false => (None, None),
    };
    // The process's terminal does what ours then leaves undone: echo, lines, Ctrl-C.
    let raw = (terms.tty && typed).then(Raw::enter).transpose()?;
    let mut streams = streaming::Io {
        stdin: None,
        stdout: Some(Box::new(stdout())),
        stderr: (!terms.tty).then(|| Box::new(stderr()) as _),
        sizes,
    };
    let mut detached = None;
    if terms.stdin {
        if raw.is_some() {
            let (input, keys) = Watched::new(stdin(), terms.keys.clone());
            streams.stdin = Some(Box::new(input));
            detached = Some(keys);
        } else {
            streams.stdin = Some(Box::new(stdin()));
        }
    }
    let detach = async {
        // Its other end is dropped, with the keys untyped, at the end of the session only.
        if let Some(keys) = detached
            && keys.await.is_ok()
        {
            return;
        }
        std::future::pending().await
    };
    let follow = async {
        match follower {
            Some(follower) => follower.run().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        // A code that is known comes before a signal.
        biased;
        ended = session.join(streams, detach) => Ok(match ended? {
            Ended::Exited(code) => How::Ended(code),
            Ended::Detached => How::Detached,
        }),
        number = signal => Ok(How::Signal(number)),
        () = follow => unreachable!("it follows for ever"),
    }
}

/// Whether a session broke off because the daemon, or the connection to it, has gone.
pub(super) fn is_lost(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(streaming::Error::Lost))
}

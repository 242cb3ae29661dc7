//! Exec and attach: Kubernetes' remotecommand protocols, over SPDY (v1 to v4) and over WebSocket
//! channels (the unversioned ones, v4 and v5).
//!
//! What differs between versions: v1 to v3 report an outcome as a text, v4 and later as a Status; v3
//! and later carry the terminal's size; v5 can end stdin.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_tungstenite::WebSocketStream;
use tokio_util::sync::CancellationToken;

use crate::backend::{AttachRequest, Backend, ExecRequest, Input, Output, Resizes, Size, Streams};
use crate::conn::{Conn, Watch};
use crate::outbound::Outbound;
use crate::pipe::PipeReader;
use crate::server::Limits;
use crate::spdy::Session;
use crate::status::Outcome;
use crate::websocket::{Channels, Codec, Rules};

/// Of SPDY, best first.
pub(crate) const SPDY_PROTOCOLS: [&str; 4] =
    ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
/// Of WebSocket, best first; a client that names none speaks the first version.
pub(crate) const WEBSOCKET_PROTOCOLS: [&str; 6] = [
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
    "",
];

/// The channels of WebSocket.
const STDIN: u32 = 0;
const STDOUT: u32 = 1;
const STDERR: u32 = 2;
const ERROR: u32 = 3;
const RESIZE: u32 = 4;

/// What the token stands for.
#[derive(Clone, Debug)]
pub(crate) enum Command {
    Exec(ExecRequest),
    Attach(AttachRequest),
}

/// Which streams a request has.
#[derive(Clone, Copy)]
struct Wants {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
}

impl Command {
    fn wants(&self) -> Wants {
        match self {
            Command::Exec(r) => {
                Wants { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr, tty: r.tty }
            }
            Command::Attach(r) => {
                Wants { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr, tty: r.tty }
            }
        }
    }
}

/// The client's streams, whatever they run over.
#[derive(Default)]
struct Ends {
    stdin: Option<PipeReader>,
    stdout: Option<Outbound>,
    stderr: Option<Outbound>,
    resize: Option<PipeReader>,
    error: Option<Outbound>,
}

/// Serves one session over SPDY; `protocol` is one of [`SPDY_PROTOCOLS`].
pub(crate) async fn spdy<B: Backend>(
    mut session: Session,
    protocol: &str,
    command: Command,
    backend: Arc<B>,
    limits: Limits,
) {
    let closed = session.closed();
    let json = protocol == "v4.channel.k8s.io";
    let resizes = json || protocol == "v3.channel.k8s.io";
    let (ends, complete) =
        collect(&mut session, command.wants(), resizes, limits.stream_creation).await;
    let work = async {
        if complete {
            run(&*backend, command, ends, json, &closed, limits.wind_up).await;
        } else {
            let text = format!(
                "the client did not open the streams of its request within {} s",
                limits.stream_creation.as_secs()
            );
            report(ends.stdout, ends.stderr, ends.error, Outcome::Failed(text), json, &closed)
                .await;
        }
    };
    // A stream that does not belong to the session is refused, and stops nothing.
    let refuse = async {
        while let Some(stream) = session.next().await {
            stream.refuse().await;
        }
        std::future::pending::<()>().await
    };
    tokio::select! {
        () = work => {}
        () = refuse => {}
    }
    session.close().await;
}

/// Waits for the streams of a request; the second part says whether all are there.
async fn collect(
    session: &mut Session,
    wants: Wants,
    resizes: bool,
    limit: Duration,
) -> (Ends, bool) {
    let mut ends = Ends::default();
    let deadline = Instant::now() + limit;
    loop {
        let missing = ends.error.is_none()
            || wants.stdin && ends.stdin.is_none()
            || wants.stdout && ends.stdout.is_none()
            || wants.stderr && ends.stderr.is_none()
            || wants.tty && resizes && ends.resize.is_none();
        if !missing {
            return (ends, true);
        }
        let Ok(Some(stream)) = tokio::time::timeout_at(deadline, session.next()).await else {
            return (ends, false);
        };
        let place = stream.headers.get("streamtype").unwrap_or_default();
        let fits = match place {
            "error" => ends.error.is_none(),
            "stdin" => wants.stdin && ends.stdin.is_none(),
            "stdout" => wants.stdout && ends.stdout.is_none(),
            "stderr" => wants.stderr && ends.stderr.is_none(),
            "resize" => wants.tty && resizes && ends.resize.is_none(),
            _ => false,
        };
        if !fits {
            stream.refuse().await;
            continue;
        }
        stream.accept().await;
        match stream.headers.get("streamtype").unwrap_or_default() {
            "error" => ends.error = Some(stream.writer),
            "stdin" => ends.stdin = Some(stream.reader),
            "stdout" => ends.stdout = Some(stream.writer),
            "stderr" => ends.stderr = Some(stream.writer),
            _ => ends.resize = Some(stream.reader),
        }
    }
}

/// Serves one session over WebSocket; `protocol` is one of [`WEBSOCKET_PROTOCOLS`].
pub(crate) async fn websocket<B: Backend>(
    socket: WebSocketStream<Conn>,
    watch: Watch,
    protocol: &str,
    command: Command,
    backend: Arc<B>,
    limits: Limits,
    stop: CancellationToken,
) {
    let base64 = protocol.contains("base64.");
    let rules = Rules {
        codec: if base64 { Codec::Base64 } else { Codec::Binary },
        signals: protocol.starts_with("v5."),
        announces: false,
        close_ends: false,
    };
    let json = protocol.starts_with("v4.") || protocol.starts_with("v5.");
    let wants = command.wants();
    let (channels, [stdin, resize]) = Channels::start(socket, watch, rules, [STDIN, RESIZE]);
    let closed = channels.closed();
    let _stop = link(stop, closed.clone());
    let out = |wanted: bool, id| wanted.then(|| channels.outbound(id));
    let mut ends = Ends {
        stdin: wants.stdin.then_some(stdin),
        stdout: out(wants.stdout, STDOUT),
        stderr: out(wants.stderr, STDERR),
        resize: wants.tty.then_some(resize),
        error: out(true, ERROR),
    };
    // Clients wait for a first message, to know that the session has begun.
    let first = ends.stdout.as_mut().or(ends.stderr.as_mut()).or(ends.error.as_mut());
    if let Some(first) = first {
        first.send_empty().await;
    }
    // The close of the connection is the end of all channels.
    run(&*backend, command, ends, json, &closed, limits.wind_up).await;
    channels.close().await;
}

/// Cancels `closed` when `stop` fires, as long as what it returns lives.
pub(crate) fn link(stop: CancellationToken, closed: CancellationToken) -> impl Drop {
    let task = tokio::spawn(async move {
        stop.cancelled().await;
        closed.cancel();
    });
    struct Abort(tokio::task::JoinHandle<()>);
    impl Drop for Abort {
        fn drop(&mut self) {
            self.0.abort();
        }
    }
    Abort(task)
}

async fn run<B: Backend>(
    backend: &B,
    command: Command,
    ends: Ends,
    json: bool,
    closed: &CancellationToken,
    wind_up: Duration,
) {
    let (sizes, resizes) = watch::channel(None);
    let streams = Streams {
        stdin: ends.stdin.map(|stdin| Box::new(stdin) as Input),
        stdout: ends.stdout.clone().map(|stdout| Box::new(stdout) as Output),
        stderr: ends.stderr.clone().map(|stderr| Box::new(stderr) as Output),
        resizes: ends.resize.is_some().then_some(Resizes(resizes)),
        closed: closed.clone(),
    };
    let work = async {
        match command {
            Command::Exec(request) => match backend.exec(request, streams).await {
                Ok(code) => Outcome::Exited(code),
                Err(text) => Outcome::Failed(text),
            },
            Command::Attach(request) => match backend.attach(request, streams).await {
                Ok(()) => Outcome::Exited(0),
                Err(text) => Outcome::Failed(text),
            },
        }
    };
    let resize = async {
        if let Some(resize) = ends.resize {
            read_sizes(resize, sizes).await;
        }
        std::future::pending::<()>().await
    };
    let outcome = tokio::select! {
        biased;
        outcome = work => outcome,
        () = resize => return,
        // The backend has been told by `streams.closed`.
        () = async { closed.cancelled().await; tokio::time::sleep(wind_up).await } => return,
    };
    report(ends.stdout, ends.stderr, ends.error, outcome, json, closed).await;
}

/// Ends the outputs, then tells the outcome. A client reads the outputs to their end first.
async fn report(
    stdout: Option<Outbound>,
    stderr: Option<Outbound>,
    error: Option<Outbound>,
    outcome: Outcome,
    json: bool,
    closed: &CancellationToken,
) {
    let telling = async {
        for mut output in [stdout, stderr].into_iter().flatten() {
            output.finish().await;
        }
        if let Some(mut error) = error {
            let text = if json { outcome.json() } else { outcome.text() };
            let _ = error.write_all(&text).await;
            error.finish().await;
        }
    };
    tokio::select! {
        biased;
        () = telling => {}
        () = closed.cancelled() => {}
    }
}

/// Reads `{"Width":80,"Height":24}` after `{…}`. What is no such thing ends the resizing alone.
async fn read_sizes(mut resize: PipeReader, sizes: watch::Sender<Option<Size>>) {
    /// More than a size can be long.
    const MAX: usize = 1024;
    let mut text = Vec::new();
    let mut piece = [0; 256];
    loop {
        match resize.read(&mut piece).await {
            Ok(0) | Err(_) => return,
            Ok(count) => text.extend_from_slice(&piece[..count]),
        }
        let mut values = serde_json::Deserializer::from_slice(&text).into_iter::<Size>();
        loop {
            match values.next() {
                Some(Ok(size)) => {
                    // Nobody listens any more when this fails; the stream is read all the same.
                    let _ = sizes.send(Some(size));
                }
                Some(Err(error)) if error.is_eof() && text.len() < MAX => break,
                Some(Err(_)) => {
                    // Go on reading, so that nothing piles up.
                    let _ = tokio::io::copy(&mut resize, &mut tokio::io::sink()).await;
                    return;
                }
                None => break,
            }
        }
        let used = values.byte_offset();
        text.drain(..used);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipe::pipe;

    #[tokio::test]
    async fn sizes_come_however_they_are_cut() {
        let (writer, reader) = pipe(None);
        let (sender, receiver) = watch::channel(None);
        let mut resizes = Resizes(receiver);
        let task = tokio::spawn(read_sizes(reader, sender));
        assert!(writer.try_push(b"{\"Width\":80,\"Hei"));
        tokio::task::yield_now().await;
        assert!(writer.try_push(b"ght\":24}\n{\"Width\":132,"));
        assert_eq!(resizes.next().await, Some(Size { width: 80, height: 24 }));
        assert!(writer.try_push(b"\"Height\":43}"));
        assert_eq!(resizes.next().await, Some(Size { width: 132, height: 43 }));
        writer.close();
        task.await.unwrap();
        assert_eq!(resizes.next().await, None);
    }

    #[tokio::test]
    async fn what_is_no_size_ends_the_resizing() {
        for bad in [
            &b"{\"Width\":-1,\"Height\":2}"[..],
            b"hello",
            &[b'['; 2000],
            b"{\"Width\":70000,\"Height\":1}",
        ] {
            let (writer, reader) = pipe(None);
            let (sender, receiver) = watch::channel(None);
            let task = tokio::spawn(read_sizes(reader, sender));
            assert!(writer.try_push(bad));
            writer.close();
            task.await.unwrap();
            assert_eq!(*receiver.borrow(), None);
        }
    }
}

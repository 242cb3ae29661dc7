//! WebSocket: our own client, channels of each protocol by hand, and SPDY tunnelled.

mod common;

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use common::*;
use futures::{SinkExt, StreamExt};
use holdfast_streaming::client::{Client, Ended, Error, Io};
use holdfast_streaming::{AttachRequest, Limits, Size, Tls};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

/// A sink that can be looked at.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Shared {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    async fn until(&self, wanted: &str) {
        let seen = async {
            while !self.text().contains(wanted) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        within(10, wanted, seen).await;
    }
}

impl AsyncWrite for Shared {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        self.0.lock().unwrap().extend(data);
        Poll::Ready(Ok(data.len()))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn outputs() -> (Shared, Shared, Io) {
    let (stdout, stderr) = (Shared::default(), Shared::default());
    let io = Io {
        stdout: Some(Box::new(stdout.clone())),
        stderr: Some(Box::new(stderr.clone())),
        ..Io::default()
    };
    (stdout, stderr, io)
}

fn never() -> impl Future<Output = ()> {
    std::future::pending()
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_runs_a_command() {
    let node = Node::start().await;
    let (stdout, stderr, mut io) = outputs();
    let input = "line\n".repeat(100_000);
    io.stdin = Some(Box::new(std::io::Cursor::new(input.clone())));
    let url = node.sh("cat; echo oops >&2; exit 42");
    let ended = within(20, "the session", Client::new().run(&url, io, never())).await.unwrap();
    assert_eq!(ended, Ended::Exited(42));
    assert_eq!(stdout.text(), input, "stdin's end is told, or cat would not end");
    assert_eq!(stderr.text(), "oops\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_attaches_and_detaches() {
    let node = Node::start().await;
    let request = AttachRequest {
        container: "attached".into(),
        tty: false,
        stdin: true,
        stdout: true,
        stderr: false,
    };
    let (stdout, _, mut io) = outputs();
    let (mut typed, stdin) = tokio::io::duplex(100);
    io.stdin = Some(Box::new(stdin));
    let (detach, detached) = tokio::sync::oneshot::channel::<()>();
    let url = node.server.attach_url(request).unwrap();
    let session = tokio::spawn(async move {
        Client::new().run(&url, io, async { detached.await.unwrap() }).await
    });
    typed.write_all(b"typed\n").await.unwrap();
    stdout.until("ready\ntyped\n").await;
    detach.send(()).unwrap();
    let ended = within(10, "detaching", session).await.unwrap().unwrap();
    assert_eq!(ended, Ended::Detached);
    node.running(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_has_a_terminal() {
    let node = Node::start().await;
    let script = "trap 'stty size; exit 7' WINCH; echo ready; while :; do sleep 0.05; done";
    let url = node.exec(&[BUSYBOX, "sh", "-c", script], &["stdin", "stdout"], true);
    let (stdout, _, mut io) = outputs();
    let (sizes, receiver) = tokio::sync::mpsc::channel(1);
    io.sizes = Some(receiver);
    let session = tokio::spawn(async move { Client::new().run(&url, io, never()).await });
    stdout.until("ready").await;
    sizes.send(Size { width: 132, height: 43 }).await.unwrap();
    assert_eq!(within(10, "the session", session).await.unwrap().unwrap(), Ended::Exited(7));
    assert_eq!(stdout.text(), "ready\r\n43 132\r\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_tells_failures_apart() {
    let node = Node::start().await;
    let client = Client::new();
    let run = async |url: &str| client.run(url, outputs().2, never()).await.unwrap_err();

    let error = run(&node.exec_in("gone", &["true"], &["stdout"], false)).await;
    assert_eq!(error.to_string(), "Internal error occurred: container gone is not running");

    let url = node.sh("true");
    client.run(&url, outputs().2, never()).await.unwrap();
    assert!(matches!(run(&url).await, Error::Refused { status: 404, .. }), "used up");

    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    assert!(matches!(run(&format!("http://{closed}/exec/x")).await, Error::Connect { .. }));
    assert!(matches!(run("localhost/exec/x").await, Error::Url { .. }));
    assert!(matches!(run("https://127.0.0.1:1/exec/x").await, Error::NoTrust(_)));

    // A server that goes away leaves no outcome, and none is made up.
    let (stdout, _, io) = outputs();
    let (node, url) = {
        let url = node.sh("echo begun; sleep 1000");
        (node, url)
    };
    let session = tokio::spawn(async move { Client::new().run(&url, io, never()).await });
    stdout.until("begun").await;
    node.stop().await;
    let error = within(10, "the session", session).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Lost | Error::Remote(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_forwards_a_port_and_keeps_half_close() {
    let node = Node::start().await;
    let pod = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = pod.local_addr().unwrap().port();
    let pod = tokio::spawn(async move {
        let (mut first, _) = pod.accept().await.unwrap();
        let mut all = Vec::new();
        first.read_to_end(&mut all).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        first.write_all(&all).await.unwrap();
        drop(first);
        let (mut second, _) = pod.accept().await.unwrap();
        second.write_all(b"bye").await.unwrap();
        second.shutdown().await.unwrap();
        let mut all = Vec::new();
        second.read_to_end(&mut all).await.unwrap();
        all.len()
    });
    let forward = |node: &Node| {
        let (ours, theirs) = tokio::io::duplex(10_000);
        let url = node.forward(&[port]);
        (ours, tokio::spawn(async move { Client::new().port_forward(&url, theirs).await }))
    };

    // The client's direction ends first; the answer comes later, and whole.
    let (ours, session) = forward(&node);
    let (mut read, mut write) = tokio::io::split(ours);
    let sent: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
    let sending = {
        let sent = sent.clone();
        tokio::spawn(async move {
            write.write_all(&sent).await.unwrap();
            write.shutdown().await.unwrap();
            write
        })
    };
    let mut got = Vec::new();
    within(20, "the echo", read.read_to_end(&mut got)).await.unwrap();
    assert!(got == sent);
    within(10, "the session", session).await.unwrap().unwrap();
    drop(sending.await.unwrap());

    // The pod's direction ends first; what the client sends later still arrives.
    let (mut ours, session) = forward(&node);
    let mut got = Vec::new();
    within(10, "bye", ours.read_to_end(&mut got)).await.unwrap();
    assert_eq!(got, b"bye");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    ours.write_all(&[1; 50_000]).await.unwrap();
    ours.shutdown().await.unwrap();
    within(10, "the session", session).await.unwrap().unwrap();
    assert_eq!(within(10, "the pod", pod).await.unwrap(), 50_000);

    // A port that nobody listens on.
    let (_ours, session) = forward(&node);
    let error = within(10, "the session", session).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("Connection refused"), "{error}");
}

fn tls_files(certificate: &str) -> Tls {
    let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    Tls { certificates: data.join(certificate), key: data.join("key.pem") }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_it_over_tls() {
    let tls = tls_files("certificate.pem");
    let node = Node::with(Limits::default(), Some(tls.clone())).await;
    let url = node.sh("cat; exit 4");
    assert!(url.starts_with("https://127.0.0.1:"));
    let (stdout, _, mut io) = outputs();
    io.stdin = Some(Box::new(std::io::Cursor::new(vec![b'x'; 1_000_000])));
    let client = Client::trusting(&tls.certificates).unwrap();
    let ended = within(20, "the session", client.run(&url, io, never())).await.unwrap();
    assert_eq!((ended, stdout.text().len()), (Ended::Exited(4), 1_000_000));

    // The same over SPDY, by Python's TLS.
    let seen = python_exec(
        &node.sh("cat"),
        &["error", "stdin", "stdout", "stderr"],
        json!({ "stdin": "y", "times": 300_000 }),
    )
    .await;
    assert_eq!(seen["stdout"]["length"], 300_000);

    // A certificate that was not given is not trusted, and the URL stays good.
    let url = node.sh("true");
    let other = Client::trusting(&tls_files("other.pem").certificates).unwrap();
    assert!(matches!(other.run(&url, outputs().2, never()).await, Err(Error::Connect { .. })));
    assert_eq!(client.run(&url, outputs().2, never()).await.unwrap(), Ended::Exited(0));
}

#[tokio::test]
async fn certificates_that_are_none_are_refused_by_name() {
    let bind = async |tls| {
        let config = holdfast_streaming::Config {
            address: "127.0.0.1:0".parse().unwrap(),
            tls: Some(tls),
            limits: Limits::default(),
        };
        holdfast_streaming::Server::bind(config).await.err().unwrap().to_string()
    };
    assert!(bind(tls_files("missing.pem")).await.ends_with("missing.pem for streaming"));
    // The key of another certificate.
    let error = bind(tls_files("other.pem")).await;
    assert!(error.starts_with("use ") && error.contains("other.pem with "), "{error}");
    // No certificate in the file.
    let key = tls_files("key.pem").key;
    let error = bind(Tls { certificates: key.clone(), key }).await;
    assert!(error.contains("key.pem"), "{error}");
}

type Socket = WebSocketStream<TcpStream>;

async fn dial(node: &Node, url: &str, protocols: &str) -> Result<(Socket, String), u16> {
    let mut request = url.replacen("http", "ws", 1).into_client_request().unwrap();
    if !protocols.is_empty() {
        request.headers_mut().insert("sec-websocket-protocol", protocols.parse().unwrap());
    }
    let stream = TcpStream::connect(node.address).await.unwrap();
    match tokio_tungstenite::client_async(request, stream).await {
        Ok((socket, response)) => {
            let protocol = response.headers().get("sec-websocket-protocol");
            Ok((
                socket,
                protocol.map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default(),
            ))
        }
        Err(tokio_tungstenite::tungstenite::Error::Http(response)) => {
            Err(response.status().as_u16())
        }
        Err(error) => panic!("{error}"),
    }
}

/// Every channel's bytes until the server closes, in order; whether it closed with "normal".
async fn drain(socket: &mut Socket, mut each: impl FnMut(&Message)) -> (Vec<Vec<u8>>, bool) {
    use base64::Engine as _;
    let (mut channels, mut normal) = (vec![Vec::new(); 256], false);
    let reading = async {
        while let Some(Ok(message)) = socket.next().await {
            each(&message);
            match message {
                Message::Binary(data) => channels[usize::from(data[0])].extend(&data[1..]),
                Message::Text(text) => {
                    let channel = usize::from(text.as_bytes()[0] - b'0');
                    let data =
                        base64::engine::general_purpose::STANDARD.decode(&text[1..]).unwrap();
                    channels[channel].extend(data);
                }
                Message::Close(frame) => normal = u16::from(frame.unwrap().code) == 1000,
                _ => {}
            }
        }
    };
    within(20, "the server's close", reading).await;
    (channels, normal)
}

#[tokio::test(flavor = "multi_thread")]
async fn channels_of_each_protocol() {
    use base64::Engine as _;
    let node = Node::start().await;
    for protocol in [
        "",
        "channel.k8s.io",
        "base64.channel.k8s.io",
        "v4.channel.k8s.io",
        "v4.base64.channel.k8s.io",
        "v5.channel.k8s.io",
    ] {
        let url = node.sh("read line; echo got $line; echo err >&2; exit 9");
        let (mut socket, agreed) = dial(&node, &url, protocol).await.unwrap();
        assert_eq!(agreed, protocol);
        let input = if protocol.contains("base64") {
            Message::text(format!(
                "0{}",
                base64::engine::general_purpose::STANDARD.encode("hello\n")
            ))
        } else {
            Message::binary(&b"\x00hello\n"[..])
        };
        socket.send(input).await.unwrap();
        let mut first = None;
        let (channels, normal) = drain(&mut socket, |message| {
            first.get_or_insert(message.clone());
        })
        .await;
        assert!(normal);
        let opening = if protocol.contains("base64") {
            Message::text("1")
        } else {
            Message::binary(&b"\x01"[..])
        };
        assert_eq!(first, Some(opening), "a client learns that the session has begun");
        assert_eq!(channels[1], b"got hello\n");
        assert_eq!(channels[2], b"err\n");
        if protocol.starts_with('v') {
            let status: Value = serde_json::from_slice(&channels[3]).unwrap();
            assert_eq!(status["details"]["causes"][0]["message"], "9");
        } else {
            assert_eq!(channels[3], b"command terminated with exit code 9");
        }
        assert!(channels[255].is_empty(), "Kubernetes' clients complain about a close signal");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_close_signal_ends_stdin_alone() {
    let node = Node::start().await;
    let (mut socket, _) =
        dial(&node, &node.sh("wc -c; sleep 0.2; echo more"), "v5.channel.k8s.io").await.unwrap();
    socket.send(Message::binary(&b"\x00abc"[..])).await.unwrap();
    socket.send(Message::binary(&b"\xff\x00"[..])).await.unwrap();
    let (channels, normal) = drain(&mut socket, |_| {}).await;
    assert_eq!(channels[1], b"3\nmore\n");
    assert!(normal);
}

#[tokio::test(flavor = "multi_thread")]
async fn pings_are_answered_while_a_command_runs() {
    let node = Node::start().await;
    let (mut socket, _) = dial(&node, &node.sh("sleep 1"), "v4.channel.k8s.io").await.unwrap();
    socket.send(Message::Ping("there?".into())).await.unwrap();
    let mut ponged = false;
    drain(&mut socket, |message| ponged |= *message == Message::Pong("there?".into())).await;
    assert!(ponged);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_protocol_that_nobody_knows_is_refused() {
    let node = Node::start().await;
    let url = node.sh("true");
    assert_eq!(dial(&node, &url, "v9.channel.k8s.io").await.unwrap_err(), 403);
    assert_eq!(
        dial(&node, &url, "v9.channel.k8s.io, v4.channel.k8s.io").await.unwrap().1,
        "v4.channel.k8s.io"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_against_the_rules_end_their_session_alone() {
    let node = Node::start().await;
    let (mut good, _) =
        dial(&node, &node.sh("read line; echo $line"), "v4.channel.k8s.io").await.unwrap();
    let bad = [
        ("v5.channel.k8s.io", Message::binary(&b"\xff"[..])),
        ("v4.base64.channel.k8s.io", Message::text("0***")),
        ("v4.channel.k8s.io", Message::binary(vec![0; 5 << 20])),
    ];
    for (protocol, message) in bad {
        let (mut socket, _) = dial(&node, &node.sh("sleep 1000"), protocol).await.unwrap();
        node.running(2).await;
        let _ = socket.send(message).await;
        let (_, normal) = drain(&mut socket, |_| {}).await;
        assert!(!normal);
        node.running(1).await;
    }
    good.send(Message::binary(&b"\x00fine\n"[..])).await.unwrap();
    assert_eq!(drain(&mut good, |_| {}).await.0[1], b"fine\n");
}

async fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_by_channels() {
    let node = Node::start().await;
    let (one, two) = (echo().await, echo().await);
    for protocol in ["", "v4.channel.k8s.io"] {
        let (mut socket, _) = dial(&node, &node.forward(&[one, two]), protocol).await.unwrap();
        socket.send(Message::binary(&b"\x02second"[..])).await.unwrap();
        socket.send(Message::binary(&b"\x00first"[..])).await.unwrap();
        let mut channels = vec![Vec::<u8>::new(); 4];
        let reading = async {
            while channels[0].len() < 7
                || channels[2].len() < 8
                || channels[1].len() < 2
                || channels[3].len() < 2
            {
                match socket.next().await.unwrap().unwrap() {
                    Message::Binary(data) => channels[usize::from(data[0])].extend(&data[1..]),
                    other => panic!("{other:?}"),
                }
            }
        };
        within(10, "both ports", reading).await;
        assert_eq!(channels[0], [&one.to_le_bytes()[..], b"first"].concat());
        assert_eq!(channels[2], [&two.to_le_bytes()[..], b"second"].concat());
        assert_eq!(channels[1], one.to_le_bytes());
        assert_eq!(channels[3], two.to_le_bytes());
        socket.close(None).await.unwrap();
        node.running(0).await;
    }
    // The request must name the ports.
    assert_eq!(dial(&node, &node.forward(&[]), "v4.channel.k8s.io").await.unwrap_err(), 400);
}

/// Without a close signal the pod's end cannot be told but by closing, which must not cut off its data.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_ends_first_ends_channels_without_a_signal() {
    let node = Node::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&[7; 500_000]).await.unwrap();
        stream.shutdown().await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    let (mut socket, _) = dial(&node, &node.forward(&[port]), "v4.channel.k8s.io").await.unwrap();
    let (channels, normal) = drain(&mut socket, |_| {}).await;
    assert_eq!((channels[0].len(), normal), (500_002, true));
}

/// What kubectl and crictl do: SPDY in the messages of a WebSocket.
#[tokio::test(flavor = "multi_thread")]
async fn spdy_through_a_websocket() {
    let node = Node::start().await;
    let (socket, agreed) =
        dial(&node, &node.forward(&[]), "SPDY/3.1+portforward.k8s.io").await.unwrap();
    assert_eq!(agreed, "SPDY/3.1+portforward.k8s.io");
    // Between the two, bytes: cut otherwise than the frames.
    let (io, far) = tokio::io::duplex(1 << 16);
    let (mut sink, mut source) = socket.split();
    let (mut from, mut to) = tokio::io::split(far);
    tokio::spawn(async move {
        let mut buffer = [0; 777];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            sink.send(Message::binary(buffer[..count].to_vec())).await.unwrap();
        }
    });
    tokio::spawn(async move {
        while let Some(Ok(message)) = source.next().await {
            if let Message::Binary(data) = message {
                to.write_all(&data).await.unwrap();
            }
        }
    });
    let mut client = Spdy::over(io);
    let port = echo().await;
    for number in 0..3 {
        let (_, stream) = client.forward(port, &number.to_string()).await;
        let sent: Vec<u8> = (0..200_000u32).map(|n| (n / 7) as u8).collect();
        let mut got = Vec::new();
        for piece in sent.chunks(20_000) {
            client.send(stream, piece, false).await;
            while got.len()
                < sent.len().min((piece.as_ptr() as usize - sent.as_ptr() as usize) + piece.len())
            {
                got.extend(client.data_of(stream).await.unwrap().0);
            }
        }
        client.send(stream, b"", true).await;
        assert!(got == sent);
        assert!(client.data_of(stream).await.unwrap().1);
    }
}

//! Who may connect: tokens, methods, handshakes, and clients that take their time.

mod common;

use std::time::Duration;

use common::*;
use holdfast_streaming::{Error, ExecRequest, Limits, PortForwardRequest};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_url_is_good_once_and_for_its_own_kind() {
    let node = Node::start().await;
    let url = node.sh("true");
    assert!(url.starts_with(&format!("http://{}/exec/", node.address)), "absolute: {url}");
    let token = url.rsplit('/').next().unwrap();
    assert!(token.len() >= 22, "128 bits: {token}");
    let upgrade = |path: &str| head_of_spdy(path, "v4.channel.k8s.io");

    for path in ["/attach/", "/portforward/", "/", "/exec/x", "/exec/../exec/"] {
        let (answer, _) = request(node.address, &upgrade(&format!("{path}{token}"))).await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{path}: {answer}");
    }
    // None of these used it up; an upgrade does.
    let (answer, _stream) = request(node.address, &upgrade(path(&url))).await;
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    let (answer, _) = request(node.address, &upgrade(path(&url))).await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_upgrade_is_told_so() {
    let node = Node::start().await;
    let url = node.sh("true");
    let path = path(&url);
    let websocket = "connection: upgrade\r\nupgrade: websocket\r\n";
    for (head, status) in [
        (get(path), 400),
        (format!("PUT {path} HTTP/1.1\r\nhost: x\r\n\r\n"), 405),
        (
            format!(
                "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
            ),
            400,
        ),
        (format!("GET {path} HTTP/1.1\r\nhost: x\r\nupgrade: SPDY/3.1\r\n\r\n"), 400),
        (format!("GET {path} HTTP/1.1\r\nhost: x\r\n{websocket}\r\n"), 426),
        (
            format!(
                "GET {path} HTTP/1.1\r\nhost: x\r\n{websocket}sec-websocket-version: 13\r\n\r\n"
            ),
            400,
        ),
        (
            format!(
                "POST {path} HTTP/1.1\r\nhost: x\r\n{websocket}sec-websocket-version: 13\r\n\r\n"
            ),
            400,
        ),
        ("nonsense\r\n\r\n".into(), 400),
        (format!("GET {path} HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "y".repeat(100_000)), 431),
    ] {
        let (answer, _) = request(node.address, &head).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{head:.80}: {answer}");
    }
    let (answer, _) = request(node.address, &head_of_spdy(path, "v4.channel.k8s.io")).await;
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn get_is_as_good_as_post() {
    let node = Node::start().await;
    let head = head_of_spdy(path(&node.sh("true")), "v4.channel.k8s.io").replace("POST", "GET");
    let (answer, _stream) = request(node.address, &head).await;
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    let lower = answer.to_ascii_lowercase();
    for line in [
        "upgrade: spdy/3.1\r\n",
        "connection: upgrade\r\n",
        "x-stream-protocol-version: v4.channel.k8s.io\r\n",
    ] {
        assert!(lower.contains(line), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_url_expires() {
    let limits = Limits { token_ttl: Duration::from_millis(300), ..Limits::default() };
    let node = Node::with(limits, None).await;
    let url = node.sh("true");
    tokio::time::sleep(Duration::from_millis(400)).await;
    let seen = python_exec(&url, &["error"], json!({})).await;
    assert_eq!(seen["status"], 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn at_most_a_thousand_are_outstanding() {
    let node = Node::start().await;
    let request =
        || node.server.port_forward_url(PortForwardRequest { pod: "pod".into(), ports: vec![] });
    let urls: std::collections::HashSet<String> = (0..1000).map(|_| request().unwrap()).collect();
    assert_eq!(urls.len(), 1000);
    let error = request().unwrap_err();
    assert!(matches!(error, Error::TooMany { limit: 1000, .. }));
    assert_eq!(
        error.to_string(),
        "1000 exec, attach and port-forward sessions wait for their clients to connect; \
         try again when one has, or within 60 s"
    );
    // One that is used makes room.
    let url = urls.into_iter().next().unwrap();
    let _client = Spdy::connect(&node, &url, "portforward.k8s.io").await;
    request().unwrap();
    request().unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_make_no_sense_get_no_url() {
    let node = Node::start().await;
    let exec = |command: &[&str], tty, stdin, stdout, stderr| {
        let command = command.iter().map(|part| part.to_string()).collect();
        let request = ExecRequest { container: "c".into(), command, tty, stdin, stdout, stderr };
        node.server.exec_url(request).unwrap_err().to_string()
    };
    assert!(exec(&["sh"], true, true, true, true).contains("no separate stderr"));
    assert!(exec(&["sh"], false, false, false, false).starts_with("at least one of"));
    assert!(exec(&[], false, true, true, true).contains("empty"));
    let ports = PortForwardRequest { pod: "p".into(), ports: vec![80, 0] };
    assert!(node.server.port_forward_url(ports).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_too_long_is_cut_off_and_holds_nobody_up() {
    let limits = Limits { handshake: Duration::from_secs(1), handshakes: 8, ..Limits::default() };
    let node = Node::with(limits, None).await;
    // As many as may be at their handshake, each a byte at a time.
    let mut slow = Vec::new();
    for _ in 0..8 {
        slow.push(TcpStream::connect(node.address).await.unwrap());
    }
    let dripping = tokio::spawn(async move {
        let head = get("/exec/x");
        for byte in head.bytes().take(30) {
            for stream in &mut slow {
                let _ = stream.write_all(&[byte]).await;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        for mut stream in slow {
            // Not one byte of an answer to a request; 408 would be as good.
            let mut all = Vec::new();
            let _ = stream.read_to_end(&mut all).await;
        }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    // One more is turned away, and told when to come again.
    let (answer, _) = request(node.address, &get("/exec/x")).await;
    assert!(
        answer.starts_with("HTTP/1.1 429 ") && answer.contains("retry-after: 1\r\n"),
        "{answer}"
    );
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let (answer, _) = request(node.address, &get("/exec/x")).await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    within(10, "the slow ones' end", dripping).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_behind_the_upgrade_are_the_sessions() {
    let node = Node::start().await;
    let url = node.exec(&[BUSYBOX, "echo", "hi"], &["stdout"], false);
    // Some clients do not wait for the answer.
    let mut client = Spdy::over(TcpStream::connect(node.address).await.unwrap());
    let mut all = head_of_spdy(path(&url), "v4.channel.k8s.io").into_bytes();
    all.extend(client.syn_stream(&[("streamtype", "error")]).1);
    all.extend(client.syn_stream(&[("streamtype", "stdout")]).1);
    client.io.write_all(&all).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.io.read_u8().await.unwrap());
    }
    assert_eq!(client.data_of(3).await.unwrap().0, b"hi\n");
}

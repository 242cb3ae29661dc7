//! Port-forward over SPDY: bulk, half-close, many connections of which some fail.

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use common::*;
use holdfast_streaming::Limits;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A server on a free port of this machine that does `each` with every connection.
async fn listen<F, Fut>(each: F) -> u16
where
    F: Fn(TcpStream) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let each = Arc::new(each);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let each = each.clone();
            tokio::spawn(async move { each(stream).await });
        }
    });
    port
}

async fn echo() -> u16 {
    listen(async |mut stream: TcpStream| {
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
        let _ = write.shutdown().await;
    })
    .await
}

/// A port that nothing listens on.
async fn closed_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

const PROTOCOL: &str = "portforward.k8s.io";

#[tokio::test(flavor = "multi_thread")]
async fn by_a_client_that_shares_nothing() {
    let node = Node::start().await;
    let (open, closed) = (echo().await, closed_port().await);
    let connections = json!([
        { "port": open, "send": "one" },
        { "port": closed, "send": "two" },
        { "port": open, "send": "three", "no_request_id": true },
    ]);
    let request =
        json!({ "url": node.forward(&[]), "mode": "portforward", "connections": connections });
    let seen = python(request).await;
    assert_eq!(
        seen["connections"][0],
        json!({ "got": "one", "text": "", "ended": ["data", "error"] })
    );
    assert_eq!(
        seen["connections"][2],
        json!({ "got": "three", "text": "", "ended": ["data", "error"] })
    );
    let failed = &seen["connections"][1];
    assert_eq!(failed["ended"], json!(["error", "reset"]), "a failure is not an end in order");
    let text = failed["text"].as_str().unwrap();
    assert!(text.starts_with(&format!("connect to port {closed}: Connection refused")), "{text}");
}

/// 1 GiB there and back, at the same time, every byte checked.
#[tokio::test(flavor = "multi_thread")]
async fn a_gibibyte_both_ways_is_byte_exact() {
    const TOTAL: u64 = 1 << 30;
    let node = Node::start().await;
    let mut client = Spdy::connect(&node, &node.forward(&[]), PROTOCOL).await;
    let (error, stream) = client.forward(echo().await, "1").await;
    let (read, mut write) = tokio::io::split(client.io);
    let sending = tokio::spawn(async move {
        let mut chunk = vec![0; 60000];
        let mut offset = 0;
        while offset < TOTAL {
            let count = chunk.len().min((TOTAL - offset) as usize);
            pattern(offset, &mut chunk[..count]);
            write.write_all(&data(stream, &chunk[..count], false)).await.unwrap();
            offset += count as u64;
        }
        write.write_all(&data(stream, b"", true)).await.unwrap();
        write
    });
    let mut read = tokio::io::BufReader::with_capacity(1 << 18, read);
    let receiving = async {
        let mut expected = Vec::new();
        let (mut offset, mut ended) = (0, false);
        while !ended {
            match read_frame(&mut read).await.expect("the connection ended") {
                Frame::Data { stream: id, fin, data } if id == stream => {
                    expected.resize(data.len(), 0);
                    pattern(offset, &mut expected);
                    assert!(data == expected, "the bytes at {offset} are others");
                    offset += data.len() as u64;
                    ended = fin;
                }
                Frame::Data { stream, data, .. } => {
                    assert_eq!(
                        (stream, &data[..]),
                        (error, &b""[..]),
                        "{}",
                        String::from_utf8_lossy(&data)
                    );
                }
                Frame::Control { .. } => {}
            }
        }
        offset
    };
    let received = within(180, "a gibibyte", receiving).await;
    assert_eq!(received, TOTAL);
    sending.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_direction_ends_by_itself() {
    let node = Node::start().await;
    // One answers only when its peer has ended; the other ends first, and goes on reading.
    let after = listen(async |mut stream: TcpStream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        stream.write_all(format!("{} bytes", all.len()).as_bytes()).await.unwrap();
    })
    .await;
    let (send, mut got) = tokio::sync::mpsc::channel(1);
    let first = listen(move |mut stream: TcpStream| {
        let send = send.clone();
        async move {
            stream.write_all(b"bye").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.unwrap();
            send.send(all).await.unwrap();
        }
    })
    .await;
    let mut client = Spdy::connect(&node, &node.forward(&[]), PROTOCOL).await;

    let (_, stream) = client.forward(after, "after").await;
    client.send(stream, &[1; 5000], true).await;
    assert_eq!(client.data_of(stream).await.unwrap().0, b"5000 bytes");
    assert!(client.data_of(stream).await.unwrap().1);

    let (_, stream) = client.forward(first, "first").await;
    assert_eq!(client.data_of(stream).await.unwrap().0, b"bye");
    assert!(client.data_of(stream).await.unwrap().1, "the pod's end is passed on");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    client.send(stream, &[2; 100_000], false).await;
    client.send(stream, &[3; 10], true).await;
    assert_eq!(within(10, "the rest", got.recv()).await.unwrap().len(), 100_010);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_connections_at_once_of_which_some_fail() {
    const COUNT: usize = 200;
    let node = Node::start().await;
    let (open, closed) = (echo().await, closed_port().await);
    let mut client = Spdy::connect(&node, &node.forward(&[]), PROTOCOL).await;
    let mut expected = HashMap::new();
    let mut failing = HashMap::new();
    for number in 0..COUNT {
        let (port, fails) = if number % 5 == 4 { (closed, true) } else { (open, false) };
        let (error, stream) = client.forward(port, &number.to_string()).await;
        if fails {
            failing.insert(error, Vec::new());
        } else {
            let text = format!("connection {number} ").repeat(100).into_bytes();
            expected.insert(stream, (text, Vec::new(), false));
        }
    }
    for (&stream, (text, _, _)) in &expected {
        for (index, piece) in text.chunks(700).enumerate() {
            client
                .io
                .write_all(&data(stream, piece, (index + 1) * 700 >= text.len()))
                .await
                .unwrap();
        }
    }
    while expected.values().any(|(.., ended)| !ended) || failing.values().any(Vec::is_empty) {
        if let Frame::Data { stream, fin, data } = client.read().await.expect("the session goes on")
        {
            if let Some((_, got, ended)) = expected.get_mut(&stream) {
                got.extend(data);
                *ended |= fin;
            } else if let Some(text) = failing.get_mut(&stream) {
                text.extend(data);
            }
        }
    }
    for (text, got, _) in expected.values() {
        assert!(text == got);
    }
    assert_eq!(failing.len(), COUNT / 5);
    // And the session still takes connections, though each of these had two streams.
    let (_, stream) = client.forward(open, "last").await;
    client.send(stream, b"still here", true).await;
    assert_eq!(client.data_of(stream).await.unwrap().0, b"still here");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_outlives_any_number_of_connections() {
    let node = Node::start().await;
    let port = echo().await;
    let mut client = Spdy::connect(&node, &node.forward(&[]), PROTOCOL).await;
    // More than may be open at a time.
    for number in 0..1500 {
        let (error, stream) = client.forward(port, &number.to_string()).await;
        client.send(error, b"", true).await;
        client.send(stream, b"x", true).await;
        loop {
            let (data, fin) = client.data_of(stream).await.unwrap();
            assert!(data.is_empty() || data == b"x");
            if fin {
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_the_client_resets_is_closed_in_the_pod() {
    let node = Node::start().await;
    let (send, mut gone) = tokio::sync::mpsc::channel(1);
    let port = listen(move |mut stream: TcpStream| {
        let send = send.clone();
        async move {
            // Does not read; sees its peer's end all the same.
            stream.write_all(b"hello").await.unwrap();
            while stream.write_all(b".").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let _ = send.send(()).await;
        }
    })
    .await;
    let mut client = Spdy::connect(&node, &node.forward(&[]), PROTOCOL).await;
    let (_, stream) = client.forward(port, "1").await;
    client.data_of(stream).await.unwrap();
    client.send(stream, &[0; 50000], false).await;
    let mut body = stream.to_be_bytes().to_vec();
    body.extend(5u32.to_be_bytes());
    client.io.write_all(&control(3, &body)).await.unwrap();
    within(10, "the pod's end", gone.recv()).await.unwrap();
    node.running(0).await;
    // The session goes on.
    let (_, stream) = client.forward(echo().await, "2").await;
    client.send(stream, b"more", true).await;
    assert_eq!(client.data_of(stream).await.unwrap().0, b"more");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clients_end_closes_all_connections() {
    let node = Node::start().await;
    let port = echo().await;
    let mut client = Spdy::connect(&node, &node.forward(&[]), PROTOCOL).await;
    for number in 0..20 {
        client.forward(port, &number.to_string()).await;
    }
    node.running(20).await;
    drop(client);
    node.running(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_without_a_partner_or_sense_are_refused() {
    let limits = Limits { stream_creation: Duration::from_secs(1), ..Limits::default() };
    let node = Node::with(limits, None).await;
    let port = echo().await;
    let port_text = port.to_string();
    let mut client = Spdy::connect(&node, &node.forward(&[]), PROTOCOL).await;
    for headers in [
        &[("streamtype", "data"), ("requestid", "1")][..],
        &[("streamtype", "data"), ("port", "0"), ("requestid", "1")],
        &[("streamtype", "data"), ("port", "65536"), ("requestid", "1")],
        &[("streamtype", "stdin"), ("port", &port_text), ("requestid", "1")],
        &[("streamtype", "data"), ("port", &port_text), ("requestid", "alone")],
    ] {
        let stream = client.open(headers).await;
        loop {
            match client.read().await.expect("the session goes on") {
                Frame::Control { kind: 3, body } => {
                    assert_eq!(body, [stream.to_be_bytes(), 3u32.to_be_bytes()].concat());
                    break;
                }
                Frame::Control { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }
    let (_, stream) = client.forward(port, "2").await;
    client.send(stream, b"fine", true).await;
    assert_eq!(client.data_of(stream).await.unwrap().0, b"fine");
    node.running(0).await;
}

/// A pod that does not read holds up its own connection; with a client that keeps windows, no other.
#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_connection_does_not_hold_up_others() {
    let node = Node::start().await;
    let stuck = listen(async |stream: TcpStream| {
        tokio::time::sleep(Duration::from_secs(60)).await;
        drop(stream);
    })
    .await;
    let mut client = Spdy::connect(&node, &node.forward(&[]), PROTOCOL).await;
    let (_, stream) = client.forward(stuck, "stuck").await;
    node.running(1).await;
    // Sends as the window allows, until nothing was granted for a while.
    let mut window = 65536i64;
    let mut sent = 0u64;
    loop {
        if window > 0 {
            let count = window.min(16384) as usize;
            client.send(stream, &vec![0; count], false).await;
            window -= count as i64;
            sent += count as u64;
            continue;
        }
        match tokio::time::timeout(Duration::from_secs(1), read_frame(&mut client.io)).await {
            Ok(Some(Frame::Control { kind: 9, body })) if body[..4] == stream.to_be_bytes() => {
                window += i64::from(u32::from_be_bytes(body[4..].try_into().unwrap()));
            }
            Ok(frame) => assert!(frame.is_some()),
            Err(_) => break,
        }
    }
    assert!(sent < 32 << 20, "{sent} bytes went to a pod that reads none");
    let (_, stream) = client.forward(echo().await, "other").await;
    client.send(stream, b"not held up", true).await;
    assert_eq!(client.data_of(stream).await.unwrap().0, b"not held up");
}

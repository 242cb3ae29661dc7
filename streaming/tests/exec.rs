//! Exec and attach over SPDY by a client that shares nothing with the server.

mod common;

use std::time::Duration;

use common::*;
use holdfast_streaming::{AttachRequest, Limits};
use serde_json::{Value, json};

const ALL: [&str; 4] = ["error", "stdin", "stdout", "stderr"];

fn status(seen: &Value) -> Value {
    serde_json::from_str(seen["error"].as_str().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_gets_its_input_and_its_outputs_and_exit_code_come_back() {
    let node = Node::start().await;
    let url = node.sh("cat; echo oops >&2; exit 42");
    let seen = python_exec(&url, &ALL, json!({ "stdin": "hello\n".repeat(3000) })).await;
    assert_eq!(seen["status"], 101);
    assert_eq!(seen["protocol"], json!(["v4.channel.k8s.io"]));
    assert_eq!(seen["replied"], json!(ALL));
    assert_eq!(seen["stdout"], "hello\n".repeat(3000));
    assert_eq!(seen["stderr"], "oops\n");
    assert_eq!(seen["ended"], json!(["error", "stderr", "stdout"]));
    assert_eq!(seen["pong"], 7);
    assert_eq!(seen["goaway"], json!([7, 0]));
    let status = status(&seen);
    assert_eq!(status["status"], "Failure");
    assert_eq!(status["reason"], "NonZeroExitCode");
    assert_eq!(status["details"]["causes"], json!([{ "reason": "ExitCode", "message": "42" }]));
}

#[tokio::test(flavor = "multi_thread")]
async fn success_failure_and_signals_are_told_apart() {
    let node = Node::start().await;
    let seen = python_exec(&node.sh("true"), &ALL, json!({})).await;
    assert_eq!(status(&seen), json!({ "metadata": {}, "status": "Success" }));

    let seen = python_exec(&node.sh("kill -9 $$"), &ALL, json!({})).await;
    assert_eq!(status(&seen)["details"]["causes"][0]["message"], "137");

    let url = node.exec_in("gone", &["true"], &["stdout"], false);
    let seen = python_exec(&url, &["error", "stdout"], json!({})).await;
    assert_eq!(status(&seen)["reason"], "InternalError");
    assert_eq!(status(&seen)["message"], "Internal error occurred: container gone is not running");
}

#[tokio::test(flavor = "multi_thread")]
async fn older_protocols_report_a_text() {
    let node = Node::start().await;
    for protocol in ["v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"] {
        let seen =
            python_exec(&node.sh("echo out; exit 3"), &ALL, json!({ "protocols": [protocol] }))
                .await;
        assert_eq!(seen["protocol"], json!([protocol]));
        assert_eq!(seen["stdout"], "out\n");
        assert_eq!(seen["error"], "command terminated with exit code 3");
        let seen = python_exec(&node.sh("true"), &ALL, json!({ "protocols": [protocol] })).await;
        assert_eq!(seen["error"], "", "nothing is said of a success");
        assert_eq!(seen["ended"], json!(["error", "stderr", "stdout"]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_protocol_that_both_know_is_taken() {
    let node = Node::start().await;
    let newer =
        json!({ "protocols": ["v9.channel.k8s.io", "v3.channel.k8s.io", "v4.channel.k8s.io"] });
    let seen = python_exec(&node.sh("true"), &ALL, newer).await;
    assert_eq!(seen["protocol"], json!(["v3.channel.k8s.io"]));

    let seen = python_exec(&node.sh("exit 1"), &ALL, json!({ "protocols": [] })).await;
    assert_eq!((&seen["status"], &seen["protocol"]), (&json!(101), &json!([])));
    assert_eq!(seen["error"], "command terminated with exit code 1", "that is the first version");

    let url = node.sh("true");
    let seen = python_exec(&url, &ALL, json!({ "protocols": ["v9.channel.k8s.io"] })).await;
    assert_eq!(seen["status"], 403);
    let accepted =
        json!(["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"]);
    assert_eq!(seen["accepted"], accepted);
    // The refusal has not used the URL up.
    let seen = python_exec(&url, &ALL, json!({})).await;
    assert_eq!(seen["status"], 101);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_takes_the_clients_sizes() {
    let node = Node::start().await;
    let script = "trap 'stty size; n=$((n+1)); [ $n = 2 ] && exit 7' WINCH; echo ready; \
                  while :; do sleep 0.05; done";
    let url = node.exec(&[BUSYBOX, "sh", "-c", script], &["stdin", "stdout"], true);
    let sizes = json!([[132, 43, "ready"], [80, 24, "43 132"]]);
    let seen =
        python_exec(&url, &["error", "stdin", "stdout", "resize"], json!({ "sizes": sizes })).await;
    assert_eq!(seen["stdout"], "ready\r\n43 132\r\n24 80\r\n");
    assert_eq!(status(&seen)["details"]["causes"][0]["message"], "7");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_were_not_asked_for_are_refused_and_stop_nothing() {
    let node = Node::start().await;
    let url = node.exec(&[BUSYBOX, "echo", "hi"], &["stdout"], false);
    let streams = ["error", "stdin", "resize", "nonsense", "stdout"];
    let seen = python_exec(&url, &streams, json!({})).await;
    assert_eq!(seen["resets"], json!({ "stdin": 3, "resize": 3, "nonsense": 3 }));
    assert_eq!(seen["stdout"], "hi\n");
    assert_eq!(status(&seen)["status"], "Success");
}

/// Kubernetes' own SPDY library never sends WINDOW_UPDATE.
#[tokio::test(flavor = "multi_thread")]
async fn much_output_reaches_a_client_without_windows() {
    let node = Node::start().await;
    let url = node.sh("head -c 30000000 /dev/zero");
    let seen = python_exec(&url, &ALL, json!({})).await;
    assert_eq!(seen["stdout"]["length"], 30_000_000);
    assert_eq!(status(&seen)["status"], "Success");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_windows_of_a_client_that_has_them_are_kept_to() {
    let node = Node::start().await;
    for window in [1000, 65536, 1 << 20] {
        let url = node.sh("head -c 3000000 /dev/zero");
        let seen = python_exec(&url, &ALL, json!({ "window": window })).await;
        assert_eq!(seen["stdout"]["length"], 3_000_000);
        assert_eq!(seen["longest"], window.min(65536), "the whole window is used");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_backend_has_read_is_granted_again() {
    let node = Node::start().await;
    let stdin = json!({ "stdin": "x", "times": 1_000_000, "piece": 30000 });
    let seen = python_exec(&node.sh("wc -c"), &ALL, stdin).await;
    assert_eq!(seen["stdout"], "1000000\n");
    let granted = seen["granted"].as_u64().unwrap();
    assert!((1_000_000 - 32768..=1_000_000).contains(&granted), "{granted}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_reads_no_input_ends_all_the_same() {
    let node = Node::start().await;
    let stdin = "x".repeat(3_000_000);
    let url = node.sh("sleep 0.3; exit 5");
    let mut client = Spdy::connect(&node, &url, "v4.channel.k8s.io").await;
    for kind in ALL {
        client.open(&[("streamtype", kind)]).await;
    }
    // Stdin is more than all buffers take: written beside reading.
    let (mut read, mut write) = tokio::io::split(client.io);
    let writing = tokio::spawn(async move {
        use tokio::io::AsyncWriteExt as _;
        let _ = write.write_all(&data(3, stdin.as_bytes(), true)).await;
    });
    let mut error = Vec::new();
    let reading = async {
        while let Some(frame) = read_frame(&mut read).await {
            if let Frame::Data { stream: 1, data, .. } = frame {
                error.extend(data);
            }
        }
    };
    within(10, "the outcome", reading).await;
    let status: Value = serde_json::from_slice(&error).unwrap();
    assert_eq!(status["details"]["causes"][0]["message"], "5");
    within(10, "the writer", writing).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn attach_joins_the_process_that_is_there() {
    let node = Node::start().await;
    let request = AttachRequest {
        container: "attached".into(),
        tty: false,
        stdin: true,
        stdout: true,
        stderr: false,
    };
    let url = node.server.attach_url(request).unwrap();
    let seen =
        python_exec(&url, &["error", "stdin", "stdout"], json!({ "stdin": "typed\n" })).await;
    assert_eq!(seen["stdout"], "ready\ntyped\n");
    assert_eq!(status(&seen)["status"], "Success");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_opens_too_few_streams_is_told() {
    let limits = Limits { stream_creation: Duration::from_secs(1), ..Limits::default() };
    let node = Node::with(limits, None).await;
    let seen = python_exec(&node.sh("echo never"), &["error", "stdin"], json!({})).await;
    let message = status(&seen)["message"].as_str().unwrap().to_owned();
    assert!(message.ends_with("did not open the streams of its request within 1 s"), "{message}");
    assert_eq!(node.backend.running.load(std::sync::atomic::Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backend_learns_that_its_client_left() {
    let node = Node::start().await;
    let mut client = Spdy::connect(&node, &node.sh("sleep 1000"), "v4.channel.k8s.io").await;
    for kind in ALL {
        client.open(&[("streamtype", kind)]).await;
    }
    node.running(1).await;
    drop(client);
    node.running(0).await;
    assert_eq!(node.backend.lost.load(std::sync::atomic::Ordering::SeqCst), 1);
}

/// The connection is not read while stdin is full, so its end has to be noticed in another way.
#[tokio::test(flavor = "multi_thread")]
async fn the_backend_learns_it_also_when_stdin_is_full() {
    let node = Node::start().await;
    let mut client = Spdy::connect(&node, &node.sh("sleep 1000"), "v4.channel.k8s.io").await;
    for kind in ALL {
        client.open(&[("streamtype", kind)]).await;
    }
    node.running(1).await;
    let full = async {
        loop {
            client.send(3, &[0; 60000], false).await;
        }
    };
    let filled = tokio::time::timeout(Duration::from_secs(2), full).await;
    assert!(filled.is_err());
    drop(client);
    node.running(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_session_ends() {
    let limits = Limits { idle: Duration::from_secs(1), ..Limits::default() };
    let node = Node::with(limits, None).await;
    let seen = python_exec(&node.sh("sleep 1000"), &ALL, json!({})).await;
    assert_eq!(
        status(&seen)["message"],
        "Internal error occurred: the client left",
        "so it was told"
    );
    node.running(0).await;
    // One in which something moves does not.
    let script = "for n in 1 2 3 4; do sleep 0.5; echo $n; done";
    let seen = python_exec(&node.sh(script), &ALL, json!({})).await;
    assert_eq!(seen["stdout"], "1\n2\n3\n4\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_servers_end_ends_the_sessions() {
    let node = Node::start().await;
    let mut client = Spdy::connect(&node, &node.sh("sleep 1000"), "v4.channel.k8s.io").await;
    for kind in ALL {
        client.open(&[("streamtype", kind)]).await;
    }
    node.running(1).await;
    let backend = node.backend.clone();
    within(10, "the server", node.stop()).await;
    assert_eq!(backend.running.load(std::sync::atomic::Ordering::SeqCst), 0);
    while client.read().await.is_some() {}
}

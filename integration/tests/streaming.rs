//! Exec, attach and port-forward from the CRI's call to the process in the container, with both OCI
//! runtimes. The protocols alone, and hostile peers, are tested in the crate `holdfast-streaming`.

use std::{
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{
    Container, Node, Pod,
    node::{self, on},
    wait::Look,
    with_each_runtime,
};
use holdfast_protos::cri;
use holdfast_streaming::{
    Size,
    client::{Client, Ended, Io},
};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::mpsc,
    time::timeout,
};
use tonic::Code;

with_each_runtime! {
    a_command_has_its_streams_and_its_exit_code
    a_command_is_run_over_spdy
    much_data_goes_both_ways_unchanged
    a_terminal_has_the_clients_size
    a_command_whose_client_goes_gets_sighup
    attach_sees_what_the_log_has_and_feeds_the_process
    stdin_once_ends_with_its_first_session
    ports_of_a_pod_are_reached
    what_cannot_be_streamed_is_refused_at_the_call
    sessions_end_with_the_daemon_and_containers_do_not
}

/// The longest that a session of these tests takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a session has written, to be looked at while it goes on.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<u8>>>);

impl Seen {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }

    fn output(&self) -> Option<holdfast_streaming::Output> {
        let (mut read, write) = tokio::io::duplex(64 * 1024);
        let seen = self.0.clone();
        tokio::spawn(async move {
            let mut piece = vec![0; 64 * 1024];
            while let Ok(n @ 1..) = read.read(&mut piece).await {
                seen.lock().unwrap().extend_from_slice(&piece[..n]);
            }
        });
        Some(Box::new(write))
    }

    async fn wait_for(&self, node: &Node, text: &str) -> Result<()> {
        on(node, PATIENCE, &format!("output with {text:?}"), async || {
            let seen = self.text();
            Ok(if seen.contains(text) { Look::Done(()) } else { Look::Not(seen) })
        })
        .await
    }
}

fn input(bytes: impl AsyncRead + Send + Unpin + 'static) -> Option<holdfast_streaming::Input> {
    Some(Box::new(bytes))
}

async fn exec_url(
    node: &Node,
    container: &Container,
    command: &[&str],
    tty: bool,
) -> Result<String, tonic::Status> {
    let request = cri::ExecRequest {
        container_id: container.id.clone(),
        cmd: command.iter().map(|&word| word.to_owned()).collect(),
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
    };
    Ok(node.cri().runtime().exec(request).await?.into_inner().url)
}

async fn attach_url(
    node: &Node,
    container: &Container,
    tty: bool,
) -> Result<String, tonic::Status> {
    let request = cri::AttachRequest {
        container_id: container.id.clone(),
        stdin: true,
        tty,
        stdout: true,
        stderr: !tty,
    };
    Ok(node.cri().runtime().attach(request).await?.into_inner().url)
}

async fn forward_url(node: &Node, pod: &Pod, port: i32) -> Result<String, tonic::Status> {
    let request = cri::PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![port] };
    Ok(node.cri().runtime().port_forward(request).await?.into_inner().url)
}

/// Runs a command over WebSocket to its end: its code, stdout and stderr.
async fn exec(
    node: &Node,
    container: &Container,
    command: &[&str],
    stdin: &'static [u8],
) -> Result<(i32, String, String)> {
    let url = exec_url(node, container, command, false).await?;
    let (stdout, stderr) = (Seen::default(), Seen::default());
    let io =
        Io { stdin: input(stdin), stdout: stdout.output(), stderr: stderr.output(), sizes: None };
    let ended = timeout(PATIENCE, Client::new().run(&url, io, std::future::pending())).await??;
    let Ended::Exited(code) = ended else { anyhow::bail!("{ended:?}") };
    // The readers behind the two take what is in flight.
    tokio::task::yield_now().await;
    for seen in [&stdout, &stderr] {
        let mut last = usize::MAX;
        while last != seen.text().len() {
            last = seen.text().len();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    Ok((code, stdout.text(), stderr.text()))
}

/// A client that shares no code with the server.
async fn spdy(request: Value) -> Result<Value> {
    let client = Path::new(env!("CARGO_MANIFEST_DIR")).join("../streaming/tests/spdy_client.py");
    let mut command = Command::new("python3");
    command.arg(client).arg(request.to_string()).stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(PATIENCE, command.output()).await??;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

async fn idle(runtime: &str) -> Result<(Node, Pod, Container)> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh("exec sleep 1000").start().await?;
    Ok((node, pod, container))
}

async fn a_command_has_its_streams_and_its_exit_code(runtime: &str) -> Result<()> {
    let (node, _pod, container) = idle(runtime).await?;
    let script = "echo to stdout; echo to stderr >&2; cat; exit 7";
    let (code, stdout, stderr) = exec(&node, &container, &["sh", "-c", script], b"fed\n").await?;
    assert_eq!((code, &*stdout, &*stderr), (7, "to stdout\nfed\n", "to stderr\n"));
    let (code, ..) = exec(&node, &container, &["sh", "-c", "kill -9 $$"], b"").await?;
    assert_eq!(code, 137);
    // A child that keeps the pipes does not keep the session.
    let (code, stdout, _) =
        exec(&node, &container, &["sh", "-c", "sleep 1000 & echo done"], b"").await?;
    assert_eq!((code, &*stdout), (0, "done\n"));
    let url = exec_url(&node, &container, &["/no/such/program"], false).await?;
    let error = Client::new().run(&url, Io::default(), std::future::pending()).await.unwrap_err();
    ensure!(error.to_string().contains("/no/such/program"), "{error}");
    node.finish().await
}

async fn a_command_is_run_over_spdy(runtime: &str) -> Result<()> {
    let (node, _pod, container) = idle(runtime).await?;
    let script = "cat; echo to stderr >&2; exit 5";
    let url = exec_url(&node, &container, &["sh", "-c", script], false).await?;
    let seen = spdy(json!({
        "mode": "exec", "url": url, "streams": ["error", "stdin", "stdout", "stderr"], "stdin": "fed",
    }))
    .await?;
    assert_eq!((&seen["stdout"], &seen["stderr"]), (&json!("fed"), &json!("to stderr\n")));
    let status: Value = serde_json::from_str(seen["error"].as_str().context("a status")?)?;
    assert_eq!(status["reason"], "NonZeroExitCode");
    assert_eq!(status["details"]["causes"][0]["message"], "5");
    // The token was good once.
    let again = spdy(json!({"mode": "exec", "url": url, "streams": ["error", "stdout"]})).await?;
    assert_eq!(again["status"], 404);
    node.finish().await
}

async fn much_data_goes_both_ways_unchanged(runtime: &str) -> Result<()> {
    const SIZE: usize = 96 << 20;
    let (node, _pod, container) = idle(runtime).await?;
    let data: Vec<u8> =
        (0..SIZE / 4).flat_map(|n| (n as u32).wrapping_mul(0x9E37_79B9).to_le_bytes()).collect();
    let expected = Sha256::digest(&data);
    let url = exec_url(&node, &container, &["cat"], false).await?;
    let (write, mut read) = tokio::io::duplex(256 * 1024);
    let io = Io {
        stdin: input(std::io::Cursor::new(data)),
        stdout: Some(Box::new(write)),
        ..Io::default()
    };
    let session = async { anyhow::Ok(Client::new().run(&url, io, std::future::pending()).await?) };
    let hash = async {
        let (mut hash, mut piece, mut total) = (Sha256::new(), vec![0; 256 * 1024], 0);
        loop {
            match read.read(&mut piece).await? {
                0 => break anyhow::Ok((hash.finalize(), total)),
                n => {
                    hash.update(&piece[..n]);
                    total += n;
                }
            }
        }
    };
    let (ended, (hash, total)) =
        timeout(PATIENCE * 2, async { tokio::try_join!(session, hash) }).await??;
    assert_eq!((ended, total), (Ended::Exited(0), SIZE));
    assert_eq!(hash, expected);
    node.finish().await
}

async fn a_terminal_has_the_clients_size(runtime: &str) -> Result<()> {
    let (node, _pod, container) = idle(runtime).await?;
    let url = exec_url(&node, &container, &["sh"], true).await?;
    let seen = Seen::default();
    let (sizes, resized) = mpsc::channel(4);
    let (mut keys, typed) = tokio::io::duplex(1024);
    sizes.send(Size { width: 71, height: 23 }).await?;
    let io = Io { stdin: input(typed), stdout: seen.output(), stderr: None, sizes: Some(resized) };
    let session =
        tokio::spawn(async move { Client::new().run(&url, io, std::future::pending()).await });
    // A size may come after the first command: the terminal is asked until it has it.
    keys.write_all(b"until [ \"$(stty size)\" = '23 71' ]; do sleep 0.1; done; echo is-first\n")
        .await?;
    seen.wait_for(&node, "\r\nis-first").await?;
    sizes.send(Size { width: 132, height: 50 }).await?;
    keys.write_all(b"until [ \"$(stty size)\" = '50 132' ]; do sleep 0.1; done; echo is-second\n")
        .await?;
    seen.wait_for(&node, "\r\nis-second").await?;
    // The interrupt key is a signal to what is in front: whoever says so is there already.
    keys.write_all(b"sh -c 'echo be-fore; sleep 1000'\n").await?;
    seen.wait_for(&node, "\r\nbe-fore").await?;
    keys.write_all(b"\x03").await?;
    keys.write_all(b"exit 9\n").await?;
    assert_eq!(timeout(PATIENCE, session).await???, Ended::Exited(9));
    node.finish().await
}

async fn a_command_whose_client_goes_gets_sighup(runtime: &str) -> Result<()> {
    let (node, _pod, container) = idle(runtime).await?;
    let script = "trap 'echo hup > /tmp/end; exit' HUP; echo ready; while :; do sleep 0.1; done";
    let url = exec_url(&node, &container, &["sh", "-c", script], false).await?;
    let seen = Seen::default();
    let io = Io { stdout: seen.output(), ..Io::default() };
    let session =
        tokio::spawn(async move { Client::new().run(&url, io, std::future::pending()).await });
    seen.wait_for(&node, "ready").await?;
    session.abort();
    on(&node, PATIENCE, "SIGHUP", async || {
        Ok(match &*container.sh("cat /tmp/end 2>/dev/null || true").await? {
            "hup\n" | "hup" => Look::Done(()),
            other => Look::Not(other.to_owned()),
        })
    })
    .await?;
    node.finish().await
}

async fn attach_sees_what_the_log_has_and_feeds_the_process(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let script =
        "while read line; do echo out $line; echo err $line >&2; done; echo no more; exit 3";
    let container = pod.container(&image).sh(script).config(|c| c.stdin = true).start().await?;
    let join = async |from: Option<holdfast_streaming::Input>| {
        let url = attach_url(&node, &container, false).await?;
        let (stdout, stderr) = (Seen::default(), Seen::default());
        let io = Io { stdin: from, stdout: stdout.output(), stderr: stderr.output(), sizes: None };
        let session = Client::new().open(&url).await?;
        let (leave, left) = tokio::sync::oneshot::channel::<()>();
        let task = tokio::spawn(session.join(io, async move {
            let _ = left.await;
        }));
        anyhow::Ok((task, leave, stdout, stderr))
    };
    let (mut keys, typed) = tokio::io::duplex(1024);
    let (first, leave, first_out, first_err) = join(input(typed)).await?;
    let (second, stay, second_out, second_err) = join(None).await?;
    // A session is open before the shim has it; what the process writes once it sees anything is its too.
    on(&node, PATIENCE, "both to be attached", async || {
        keys.write_all(b"sync\n").await?;
        let seen = [first_out.text(), second_out.text()];
        let both = seen.iter().all(|text| text.contains("out sync\n"));
        Ok(Look::when(both, || format!("{seen:?}")))
    })
    .await?;
    keys.write_all(b"one\n").await?;
    for (out, err) in [(&first_out, &first_err), (&second_out, &second_err)] {
        out.wait_for(&node, "out one\n").await?;
        err.wait_for(&node, "err one\n").await?;
    }
    // One that leaves takes nobody along, and the process keeps its stdin.
    leave.send(()).ok();
    assert_eq!(timeout(PATIENCE, first).await???, Ended::Detached);
    let (mut keys, typed) = tokio::io::duplex(1024);
    let (third, third_stays, third_out, _) = join(input(typed)).await?;
    keys.write_all(b"two\n").await?;
    second_out.wait_for(&node, "out two\n").await?;
    third_out.wait_for(&node, "out two\n").await?;
    assert!(!third_out.text().contains("one"), "attach is not the log");
    container.wait_for_log("out two").await?;
    container.stop(1).await?;
    for session in [second, third] {
        // Attach has no exit code of its own.
        assert_eq!(timeout(PATIENCE, session).await???, Ended::Exited(0));
    }
    drop((stay, third_stays));
    node.finish().await
}

async fn stdin_once_ends_with_its_first_session(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    for (name, in_order) in [("closed", true), ("gone", false)] {
        let container = pod
            .container(&image)
            .name(name)
            .sh("cat; echo end of input; exit 4")
            .config(|c| (c.stdin, c.stdin_once) = (true, true))
            .start()
            .await?;
        let url = attach_url(&node, &container, false).await?;
        let (mut keys, typed) = tokio::io::duplex(1024);
        let seen = Seen::default();
        let io = Io { stdin: input(typed), stdout: seen.output(), ..Io::default() };
        let session =
            tokio::spawn(async move { Client::new().run(&url, io, std::future::pending()).await });
        keys.write_all(b"fed\n").await?;
        seen.wait_for(&node, "fed\n").await?;
        if in_order {
            drop(keys);
            seen.wait_for(&node, "end of input\n").await?;
            timeout(PATIENCE, session).await???;
        } else {
            session.abort();
        }
        assert_eq!(container.wait().await?.exit_code, 4, "{name}");
        container.wait_for_log("end of input").await?;
    }
    node.finish().await
}

async fn ports_of_a_pod_are_reached(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").run().await?;
    // It answers when its client has sent all: a half-closed connection must still carry the answer.
    let script = "nc -ll -p 7000 -e wc -c";
    let container = pod.container(&image).sh(script).start().await?;
    on(&node, PATIENCE, "a listener in the pod", async || {
        let listening = container.sh("grep -c :1B58 /proc/net/tcp /proc/net/tcp6 || true").await?;
        Ok(if listening.contains(":1") { Look::Done(()) } else { Look::Not(listening) })
    })
    .await?;
    let local = TcpListener::bind("127.0.0.1:0").await?;
    for size in [0, 1, 3_000_000] {
        let url = forward_url(&node, &pod, 7000).await?;
        let mut here = TcpStream::connect(local.local_addr()?).await?;
        let (accepted, _) = local.accept().await?;
        let client = Client::new();
        let forward = client.port_forward(&url, accepted);
        let talk = async {
            here.write_all(&vec![b'x'; size]).await?;
            here.shutdown().await?;
            let mut answer = String::new();
            here.read_to_string(&mut answer).await?;
            anyhow::Ok(answer)
        };
        let (forwarded, answer) = timeout(PATIENCE, async { tokio::join!(forward, talk) }).await?;
        forwarded?;
        assert_eq!(answer?.trim(), size.to_string());
    }
    // Over SPDY: several in one session, of which one has nobody to talk to.
    let url = forward_url(&node, &pod, 7000).await?;
    let seen = spdy(json!({"mode": "portforward", "url": url, "connections": [
        {"port": 7000, "send": "hello"}, {"port": 7001, "send": ""}, {"port": 7000, "send": "hi"},
    ]}))
    .await?;
    assert_eq!(seen["connections"][0]["got"].as_str().map(str::trim), Some("5"));
    assert_eq!(seen["connections"][2]["got"].as_str().map(str::trim), Some("2"));
    let text = seen["connections"][1]["text"].as_str().unwrap_or_default();
    ensure!(text.contains("7001"), "{seen}");

    // The node's own ports for a pod on the node's network.
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let host = node.pod("host").host_network().run().await?;
    let url = forward_url(&node, &host, port.into()).await?;
    let seen = tokio::spawn(spdy(json!({"mode": "portforward", "url": url, "connections": [
        {"port": port, "send": "ping"},
    ]})));
    let (mut inside, _) = timeout(PATIENCE, listener.accept()).await??;
    let mut got = String::new();
    inside.read_to_string(&mut got).await?;
    inside.write_all(b"pong").await?;
    drop(inside);
    assert_eq!(got, "ping");
    assert_eq!(seen.await??["connections"][0]["got"], "pong");
    node.finish().await
}

async fn what_cannot_be_streamed_is_refused_at_the_call(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh("exec sleep 1000").create().await?;
    let code = |result: Result<String, tonic::Status>| result.unwrap_err().code();
    // Not running yet, or no more.
    assert_eq!(code(exec_url(&node, &container, &["id"], false).await), Code::FailedPrecondition);
    container.start().await?;
    assert_eq!(code(exec_url(&node, &container, &[], false).await), Code::InvalidArgument);
    // With a terminal there is no stderr of its own.
    let both = cri::ExecRequest {
        container_id: container.id.clone(),
        cmd: vec!["id".into()],
        tty: true,
        stderr: true,
        ..Default::default()
    };
    let refused = node.cri().runtime().exec(both).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    container.stop(0).await?;
    assert_eq!(code(exec_url(&node, &container, &["id"], false).await), Code::FailedPrecondition);
    assert_eq!(code(attach_url(&node, &container, false).await), Code::FailedPrecondition);
    pod.stop().await?;
    assert_eq!(code(forward_url(&node, &pod, 80).await), Code::FailedPrecondition);
    container.remove().await?;
    pod.remove().await?;
    assert_eq!(code(exec_url(&node, &container, &["id"], false).await), Code::NotFound);
    assert_eq!(code(attach_url(&node, &container, false).await), Code::NotFound);
    assert_eq!(code(forward_url(&node, &pod, 80).await), Code::NotFound);
    node.finish().await
}

async fn sessions_end_with_the_daemon_and_containers_do_not(runtime: &str) -> Result<()> {
    let (mut node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let script = "while read line; do echo out $line; done; exit 3";
    let container = pod.container(&image).sh(script).config(|c| c.stdin = true).start().await?;
    let mut sessions = Vec::new();
    for url in [
        exec_url(&node, &container, &["sh", "-c", "echo begun; exec sleep 1000"], false).await?,
        attach_url(&node, &container, false).await?,
    ] {
        let seen = Seen::default();
        let (mut keys, typed) = tokio::io::duplex(1024);
        let io = Io { stdin: input(typed), stdout: seen.output(), ..Io::default() };
        let session =
            tokio::spawn(async move { Client::new().run(&url, io, std::future::pending()).await });
        keys.write_all(b"one\n").await?;
        sessions.push((session, seen, keys));
    }
    sessions[0].1.wait_for(&node, "begun").await?;
    sessions[1].1.wait_for(&node, "out one").await?;
    node.kill9()?;
    for (session, ..) in &mut sessions {
        // At once, and as what it is: not as the command's end.
        ensure!(timeout(PATIENCE, session).await??.is_err());
    }
    node.launch()?;
    on(&node, PATIENCE, "the daemon", async || {
        Ok(match container.is_running().await {
            Ok(true) => Look::Done(()),
            other => Look::Not(format!("{other:?}")),
        })
    })
    .await?;
    // The same stdin, and the same process.
    let url = attach_url(&node, &container, false).await?;
    let seen = Seen::default();
    let (mut keys, typed) = tokio::io::duplex(1024);
    let io = Io { stdin: input(typed), stdout: seen.output(), ..Io::default() };
    let session =
        tokio::spawn(async move { Client::new().run(&url, io, std::future::pending()).await });
    keys.write_all(b"two\n").await?;
    seen.wait_for(&node, "out two").await?;
    let (code, stdout, _) = exec(&node, &container, &["echo", "again"], b"").await?;
    assert_eq!((code, &*stdout), (0, "again\n"));
    container.stop(0).await?;
    timeout(PATIENCE, session).await???;
    node.finish().await
}

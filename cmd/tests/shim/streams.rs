//! Logs, attach, terminals, standard input.

use std::{fs, time::Duration};

use holdfast_shim::{
    control::{Attach, Control, Output},
    options::{HELD_STDIN, HELD_STDIN_ONCE, PodOptions},
};
use serde_json::json;
use tokio::io::AsyncWriteExt as _;

use crate::{
    main_path::for_each_runtime,
    node::{Fifos, Node, Oci, PATIENCE, parse_log, process, soon, until},
};

for_each_runtime! {
    every_line_is_logged_once_and_in_order
    a_user_other_than_root_can_open_its_outputs_again
    a_log_is_reopened_after_a_rotation
    a_terminal_can_be_attached_and_resized
    standard_input_by_attach_ends_with_the_first_client
    an_exec_can_have_a_terminal
    an_exec_reads_its_standard_input_to_the_end
    files_and_fifos_get_the_output_without_the_shim
}

const ALL: Attach = Attach { stdin: true, stdout: true, stderr: true };

async fn every_line_is_logged_once_and_in_order(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", PodOptions::default()).await;
    let container = pod.sh("c1", "seq 1 300000; printf 'no line feed'").start().await;
    assert_eq!(container.wait().await.status, 0);
    let lines = container.lines("stdout");
    assert_eq!(lines.len(), 300_001);
    for (n, line) in lines[..300_000].iter().enumerate() {
        assert_eq!(*line, (n + 1).to_string());
    }
    assert_eq!(lines[300_000], "no line feed");
    container.delete().await;
}

async fn a_user_other_than_root_can_open_its_outputs_again(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", PodOptions::default()).await;
    let script = "id -u; echo again > /dev/stdout; echo wrong > /dev/stderr";
    let container = pod
        .sh("c1", script)
        .with(|config| config["process"]["user"] = json!({"uid": 1000, "gid": 1000}))
        .start()
        .await;
    assert_eq!(container.wait().await.status, 0);
    assert_eq!(container.lines("stdout"), ["1000", "again"]);
    assert_eq!(container.lines("stderr"), ["wrong"]);
}

async fn a_log_is_reopened_after_a_rotation(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", PodOptions::default()).await;
    let container = pod
        .sh("c1", "echo one; while ! [ -e /tmp/go ]; do sleep 0.05; done; echo two")
        .start()
        .await;
    container.line("one").await;
    let rotated = container.bundle.dir().join("0.log.1");
    fs::rename(&container.log, &rotated).unwrap();
    let control = Control::new(&pod.bundle);
    control.reopen_log("c1", PATIENCE).await.unwrap();
    fs::write(container.bundle.rootfs().join("tmp/go"), "").unwrap();
    container.wait().await;
    assert_eq!(parse_log(&rotated).len(), 1);
    assert_eq!(container.lines("stdout"), ["two"]);
    let error = control.reopen_log("nobody", PATIENCE).await.unwrap_err();
    assert_eq!(error.kind(), holdfast_shim::client::ErrorKind::NotFound);
}

/// Output of an attach until it contains `wanted`.
async fn read_until(output: &mut holdfast_shim::control::AttachOutput, wanted: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(wanted) {
        match soon(wanted, output.next()).await.unwrap() {
            Some(Output::Stdout(bytes) | Output::Stderr(bytes)) => {
                seen.push_str(&String::from_utf8_lossy(&bytes));
            }
            None => panic!("the output ended with {seen:?}"),
        }
    }
    seen
}

async fn a_terminal_can_be_attached_and_resized(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", PodOptions::default()).await;
    let container = pod.run("c1", &["/bin/sh"]).terminal().stdin(HELD_STDIN).start().await;
    let control = Control::new(&pod.bundle);
    let (mut input, mut output) = control.attach("c1", ALL).await.unwrap().split();
    pod.client.resize("c1", "", 91, 37).await.unwrap();
    input.stdin(b"stty size\n").await.unwrap();
    read_until(&mut output, "37 91").await;
    input.resize(80, 25).await.unwrap();
    input.stdin(b"stty size\n").await.unwrap();
    read_until(&mut output, "25 80").await;
    input.stdin(b"exit 5\n").await.unwrap();
    assert_eq!(container.wait().await.status, 5);
    while soon("the end", output.next()).await.unwrap().is_some() {}
    // Output of a terminal is logged as standard output.
    assert!(container.lines("stdout").iter().any(|line| line.contains("37 91")));
    container.delete().await;
}

async fn standard_input_by_attach_ends_with_the_first_client(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", PodOptions::default()).await;
    let container = pod.sh("c1", "cat; echo over").stdin(HELD_STDIN_ONCE).start().await;
    let control = Control::new(&pod.bundle);
    let (mut input, mut output) = control.attach("c1", ALL).await.unwrap().split();
    let (_, mut other) = control
        .attach("c1", Attach { stdin: false, stdout: true, stderr: false })
        .await
        .unwrap()
        .split();
    input.stdin(b"hello\n").await.unwrap();
    read_until(&mut output, "hello\n").await;
    // Every attached client sees the output.
    read_until(&mut other, "hello\n").await;
    drop((input, output));
    read_until(&mut other, "over\n").await;
    assert_eq!(container.wait().await.status, 0);
    assert_eq!(container.lines("stdout"), ["hello", "over"]);

    let keeps = pod.sh("c2", "cat").stdin(HELD_STDIN).start().await;
    let (mut input, output) = control.attach("c2", ALL).await.unwrap().split();
    input.stdin(b"a\n").await.unwrap();
    keeps.line("a").await;
    drop((input, output));
    let (mut input, _output) = control.attach("c2", ALL).await.unwrap().split();
    input.stdin(b"b\n").await.unwrap();
    keeps.line("b").await;
    pod.client.close_stdin("c2", "").await.unwrap();
    assert_eq!(keeps.wait().await.status, 0);
}

async fn an_exec_can_have_a_terminal(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", PodOptions::default()).await;
    let container = pod.sh("c1", "sleep 1000").start().await;
    let fifos = Fifos::new(&node.path("x"));
    let mut process = process(&["/bin/sh", "-c", "stty size; read line; echo got $line; exit 3"]);
    process["terminal"] = json!(true);
    let mut task = fifos.task(process);
    task.stdin = fifos.path("in");
    task.stderr = String::new();
    pod.client.exec("c1", "t", task).await.unwrap();
    let reads = fifos.read();
    pod.client.start("c1", "t").await.unwrap();
    pod.client.resize("c1", "t", 70, 20).await.unwrap();
    let mut stdin =
        tokio::net::unix::pipe::OpenOptions::new().open_sender(fifos.path("in")).unwrap();
    stdin.write_all(b"line\n").await.unwrap();
    let ended = soon("the exec's end", pod.client.wait("c1", "t")).await.unwrap();
    assert_eq!(ended.status, 3);
    pod.client.delete("c1", "t").await.unwrap();
    let (out, _) = soon("the output", reads).await.unwrap();
    assert!(out.contains("got line\r\n"), "{out:?}");
    container.kill(9).await;
    container.wait().await;
}

async fn an_exec_reads_its_standard_input_to_the_end(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", PodOptions::default()).await;
    let _container = pod.sh("c1", "sleep 1000").start().await;
    let fifos = Fifos::new(&node.path("x"));
    let mut task = fifos.task(process(&["/bin/cat"]));
    task.stdin = fifos.path("in");
    pod.client.exec("c1", "cat", task).await.unwrap();
    let reads = fifos.read();
    pod.client.start("c1", "cat").await.unwrap();
    let mut stdin =
        tokio::net::unix::pipe::OpenOptions::new().open_sender(fifos.path("in")).unwrap();
    let much = "0123456789abcdef".repeat(20_000);
    stdin.write_all(much.as_bytes()).await.unwrap();
    drop(stdin);
    // Held open by the shim until it is told otherwise: a client may come back.
    tokio::time::sleep(Duration::from_millis(100)).await;
    pod.client.close_stdin("c1", "cat").await.unwrap();
    let ended = soon("the exec's end", pod.client.wait("c1", "cat")).await.unwrap();
    assert_eq!(ended.status, 0);
    let (out, _) = soon("the output", reads).await.unwrap();
    assert_eq!(out, much);
}

async fn files_and_fifos_get_the_output_without_the_shim(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", PodOptions::default()).await;
    let file = node.path("out/put.txt");
    let mut container = pod.sh("c1", "echo one; echo two >&2");
    container.stdout = Some(format!("file://{}", file.display()));
    container.stderr = container.stdout.clone();
    let container = container.start().await;
    container.wait().await;
    assert_eq!(fs::read_to_string(file).unwrap(), "one\ntwo\n");
    container.delete().await;

    let fifos = Fifos::new(&node.path("f"));
    let reads = fifos.read();
    let mut container = pod.sh("c2", "echo one; echo two >&2");
    container.stdout = Some(fifos.path("out"));
    container.stderr = Some(fifos.path("err"));
    let container = container.start().await;
    container.wait().await;
    container.delete().await;
    assert_eq!(soon("the output", reads).await.unwrap(), ("one\n".into(), "two\n".into()));
}

#[tokio::test]
async fn a_logging_binary_gets_the_output() {
    use std::os::unix::fs::PermissionsExt as _;
    let node = Node::new(Oci::Runc);
    let pod = node.pod("pod", PodOptions::default()).await;
    let logger = node.path("logger");
    let out = node.path("logged");
    let script = format!(
        "#!/bin/sh\nexec 5>&-\n(echo $CONTAINER_ID $CONTAINER_NAMESPACE $*; cat <&3; cat <&4) > {}\n",
        out.display()
    );
    fs::write(&logger, script).unwrap();
    fs::set_permissions(&logger, fs::Permissions::from_mode(0o755)).unwrap();
    let mut container = pod.sh("c1", "echo out; echo err >&2");
    let uri = format!("binary://{}?key=value", logger.display());
    container.stdout = Some(uri.clone());
    container.stderr = Some(uri);
    let container = container.start().await;
    container.wait().await;
    container.delete().await;
    until("the logger's file", || {
        (fs::read_to_string(&out).ok()? == "c1 test key value\nout\nerr\n").then_some(())
    })
    .await;

    let mut refused = pod.sh("c2", "true");
    refused.stdout = Some("binary:///bin/sleep?10".into());
    refused.stderr = refused.stdout.clone();
    refused.write();
    let started = std::time::Instant::now();
    let mut task = refused.task();
    task.stdout = "binary-v2:///bin/true".into();
    task.stderr.clone_from(&task.stdout);
    let error = pod.client.create(task).await.unwrap_err();
    assert!(error.to_string().contains("/bin/true did not get ready"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_full_disk_drops_whole_lines_counts_them_and_stops_nothing() {
    let node = Node::new(Oci::Runc);
    let pod = node.pod("pod", PodOptions::default()).await;
    let small_disk = |dir: std::path::PathBuf| {
        fs::create_dir_all(&dir).unwrap();
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), &dir, Some("tmpfs"), flags, Some("size=8m")).unwrap();
        dir
    };
    let free = |dir: &std::path::Path| {
        nix::sys::statvfs::statvfs(dir).map(|s| s.blocks_available()).unwrap() as usize * 4096
    };
    let (logs, bundles) = (small_disk(node.path("logs")), small_disk(pod.bundle.dir().join("c")));
    let script =
        "i=0; while true; do i=$((i+1)); echo line $i of some forty characters, really; done";
    let mut container = pod.sh("c1", script);
    container.log = logs.join("0.log");
    let container = container.create().await;
    let filler = logs.join("filler");
    // Not to the last page, so that the log meets the end in the middle of a batch.
    fs::write(&filler, vec![b'x'; free(&logs) - 5 * 4096]).unwrap();
    pod.client.start("c1", "").await.unwrap();
    until("the disk to be full", || (free(&logs) == 0).then_some(())).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    // The container writes on, and everything else works.
    let (ended, out, _) = container.exec("e1", &["/bin/echo", "alive"]).await;
    assert_eq!((ended.status, out.as_str()), (0, "alive\n"));
    fs::remove_file(&filler).unwrap();
    until("the count of what is missing", || {
        let missing = |(_, _, text): &(String, String, String)| text.starts_with("holdfast: ");
        container.records().iter().any(missing).then_some(())
    })
    .await;
    // Stopping and deleting need no space, be it the log's or the bundle's.
    fs::write(bundles.join("filler"), vec![b'x'; free(&bundles) + 4096]).unwrap_err();
    container.kill(9).await;
    assert_eq!(container.wait().await.status, 137);
    container.delete().await;

    let mut expected = 1;
    let mut gaps = 0;
    for (stream, tag, text) in container.records() {
        if let Some(rest) = text.strip_prefix("holdfast: ") {
            let missing: u64 = rest.split(' ').next().unwrap().parse().unwrap();
            assert!(missing > 0);
            expected += missing;
            gaps += 1;
            continue;
        }
        assert_eq!((stream.as_str(), tag.as_str()), ("stdout", "F"), "{text}");
        assert_eq!(text, format!("line {expected} of some forty characters, really"));
        expected += 1;
    }
    assert!(gaps >= 1 && expected > 100, "{gaps} {expected}");
}

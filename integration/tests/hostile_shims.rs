//! Foreign shims that do what they should not. The error says so, nothing is left, and the daemon goes
//! on as if nothing had been.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::Node;

const REAL: &str = "/usr/bin/containerd-shim-runc-v2";

/// A node whose handler "fake" is a script with this body, in which `$verb` is start, delete or the
/// like, and `$real` containerd's shim.
async fn node_with(body: &str) -> Result<(Node, String)> {
    ensure!(Path::new(REAL).is_file(), "{REAL} is missing: run 'make deps'");
    let dir = tempfile::tempdir()?.keep();
    let shim = dir.join("containerd-shim-fake-v1");
    let text = format!(
        "#!/bin/sh\nreal={REAL}\nfor verb; do :; done\n\
         echo \"$verb\" >> {calls}\n{body}\n",
        calls = dir.join("calls").display()
    );
    fs::write(&shim, text)?;
    fs::set_permissions(&shim, fs::Permissions::from_mode(0o755))?;
    let mut node = Node::builder()
        .runtime_config("timeout = \"3s\"")
        .config(&format!("[runtime.handlers.fake]\nshim = {shim:?}\npath = \"runc\"\n"))
        .start()
        .await?;
    let image = node.busybox().await?;
    Ok((node, image))
}

/// Where the script is, for what it has written.
fn script_dir(node: &Node) -> Result<PathBuf> {
    let config = fs::read_to_string(node.config())?;
    let line =
        config.lines().find(|line| line.contains("containerd-shim-fake")).context("a shim")?;
    let path = line.split('"').nth(1).context("a path")?;
    Ok(Path::new(path).parent().context("a directory")?.to_path_buf())
}

/// A pod of the fake cannot be run and the error has these words; then a pod of our own shim can.
async fn refused(body: &str, words: &[&str]) -> Result<Duration> {
    let (node, image) = node_with(body).await?;
    let begun = Instant::now();
    let error = node.pod("a").host_network().runtime("fake").run().await.unwrap_err();
    let took = begun.elapsed();
    for word in words {
        ensure!(error.message().contains(word), "{word:?} is not in: {}", error.message());
    }
    ensure!(node.pods().await?.is_empty(), "a pod is left");
    let pod = node.pod("b").host_network().run().await?;
    ensure!(pod.container(&image).sh("echo fine").output().await?.contains("fine"), "ours");
    let dir = script_dir(&node)?;
    node.finish().await?;
    fs::remove_dir_all(dir)?;
    Ok(took)
}

/// A pod of the fake runs all the same.
async fn tolerated(body: &str) -> Result<()> {
    let (mut node, image) = node_with(body).await?;
    let pod = node.pod("a").host_network().runtime("fake").run().await?;
    let container = pod.container(&image).sh("echo out; exec sleep 1000").start().await?;
    container.wait_for_log("out").await?;
    assert_eq!(container.sh("echo exec").await?, "exec");
    node.kill9()?;
    node.restart().await?;
    assert_eq!(container.sh("echo again").await?, "again");
    container.stop(0).await?;
    pod.stop().await?;
    pod.remove().await?;
    let dir = script_dir(&node)?;
    node.finish().await?;
    fs::remove_dir_all(dir)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn noise_before_the_answer_is_passed_over() -> Result<()> {
    tolerated(
        "echo 'warning: noise' >&2\n[ $verb = delete ] || echo 'some noise'\nexec $real \"$@\"",
    )
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promise_of_version_3_that_is_not_kept_is_found_out() -> Result<()> {
    let body = r#"
[ $verb = start ] || exec $real "$@"
address=$($real "$@") || exit 1
printf '{"version":3,"address":"%s","protocol":"ttrpc"}' "$address""#;
    tolerated(body).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_takes_only_bootstrap_parameters_is_tried_again() -> Result<()> {
    // As containerd 2.4's: it refuses what is no BootstrapParams before it starts anything. What it is
    // given then has the id as its first field.
    let body = r#"
[ $verb = start ] || exec $real "$@"
dir=$(dirname "$0")
cat > "$dir/input.$$"
if [ "$(head -c 1 "$dir/input.$$" | od -An -tx1 | tr -d ' ')" != 0a ] ||
   [ "$(head -c 2 "$dir/input.$$" | tail -c 1 | od -An -tu1 | tr -d ' ')" != 64 ]; then
  rm "$dir/input.$$"; echo "invalid bootstrap parameters" >&2; exit 1
fi
rm "$dir/input.$$"
exec $real "$@" < /dev/null"#;
    let (node, _) = node_with(body).await?;
    for name in ["a", "b"] {
        let pod = node.pod(name).host_network().runtime("fake").run().await?;
        pod.stop().await?;
        pod.remove().await?;
    }
    let dir = script_dir(&node)?;
    let calls = fs::read_to_string(dir.join("calls"))?;
    let starts = calls.lines().filter(|line| *line == "start").count();
    // Once in vain: after that it is known what the binary speaks.
    ensure!(starts == 3, "{calls}");
    node.finish().await?;
    fs::remove_dir_all(dir)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_does_not_come_meets_the_deadline() -> Result<()> {
    let took = refused("[ $verb = start ] && sleep 30\nexit 0", &["start", "3s"]).await?;
    ensure!(took < Duration::from_secs(25), "{took:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_dies_in_start_says_why() -> Result<()> {
    refused("echo 'no virtual machines here' >&2\nexit 1", &["no virtual machines here"]).await?;
    refused("kill -9 $$", &["signal: 9"]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_none_is_named() -> Result<()> {
    refused("printf hvsock://vm:1024", &["hvsock://vm:1024", "no address"]).await?;
    refused("printf nonsense", &["nonsense", "no shim address"]).await?;
    let future = r#"printf '{"version":9,"address":"unix:///s","protocol":"ttrpc"}'"#;
    refused(future, &["version", "9"]).await?;
    refused("printf unix:///nonexistent/socket", &["connect"]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_listens_and_never_answers_is_ended() -> Result<()> {
    let body = r#"
[ $verb = start ] || exit 0
socket=$(dirname "$0")/socket
python3 -c '
import socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
time.sleep(1000)
' "$socket" "$0" "$@" > /dev/null 2>&1 &
while [ ! -e "$socket" ]; do sleep 0.05; done
printf "unix://$socket""#;
    refused(body, &["no answer within"]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_dies_in_create_leaves_nothing() -> Result<()> {
    // The sandbox is made; the shim is killed as soon as a container is to be.
    let body = r#"
dir=$(dirname "$0")
if [ $verb = start ] && [ -e "$dir/sandbox" ]; then
  kill -9 $(cat "$dir/sandbox")
  rm "$dir/sandbox"
  exec $real "$@" < /dev/null
fi
[ $verb = start ] || exec $real "$@"
address=$($real "$@") || exit 1
id=$(basename "$PWD")
for process in /proc/[0-9]*; do
  line=$(tr '\0' ' ' < $process/cmdline 2>/dev/null)
  case $line in "$real "*"-id $id "*) echo ${process#/proc/} > "$dir/sandbox" ;; esac
done
printf "$address""#;
    let (node, image) = node_with(body).await?;
    let pod = node.pod("a").host_network().runtime("fake").run().await?;
    // Either the new shim took it, or it is refused; nothing hangs and nothing is left.
    let _ = pod.container(&image).sh("exec sleep 1000").start().await;
    holdfast_integration::node::on(
        &node,
        Duration::from_secs(10),
        "the pod without its sandbox",
        async || {
            let state = pod.status().await?.state();
            let gone = state == holdfast_protos::cri::PodSandboxState::SandboxNotready;
            Ok(holdfast_integration::wait::Look::when(gone, || format!("{state:?}")))
        },
    )
    .await?;
    pod.stop().await?;
    pod.remove().await?;
    let dir = script_dir(&node)?;
    node.finish().await?;
    fs::remove_dir_all(dir)?;
    Ok(())
}

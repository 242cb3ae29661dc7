//! Our shim in other hands: Debian's containerd, through `ctr` and through its CRI plugin.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{
    Container, Image, Registry,
    bench::peer::{Containerd, in_path},
    binaries::binaries,
    eventually,
    ground::names_in,
    pod::PodBuilder,
    wait::Look,
};
use holdfast_protos::cri;

const PATIENCE: Duration = Duration::from_secs(30);

/// A containerd whose every runtime is our shim, and the images it can pull.
struct Peer {
    containerd: Containerd,
    _registry: Registry,
    busybox: String,
    rootfs: PathBuf,
}

impl Peer {
    async fn start() -> Result<Self> {
        let binary = in_path("containerd").context("containerd is missing: run 'make deps'")?;
        let runc = in_path("runc").context("runc is missing: run 'make deps'")?;
        let registry = Registry::start().await?;
        let busybox = registry.push("test/busybox:1", &Image::busybox()?.build()?).await?;
        let pause = Image::busybox()?.cmd(["/bin/sleep", "2147483647"]).build()?;
        let pause = registry.push("test/pause:1", &pause).await?;
        let shim = binaries()?.shim;
        let containerd =
            Containerd::start_with(&binary, &runc, registry.host(), &pause, Some(&shim)).await?;
        let rootfs = containerd.ground().path().join("rootfs");
        for dir in ["bin", "proc", "sys", "dev", "tmp", "etc", "run"] {
            fs::create_dir_all(rootfs.join(dir))?;
        }
        fs::copy("/bin/busybox", rootfs.join("bin/busybox"))?;
        for name in ["sh", "echo", "sleep", "cat", "kill", "true", "tty"] {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(name))?;
        }
        let peer = Self { containerd, _registry: registry, busybox, rootfs };
        for image in [&peer.busybox, &pause] {
            let spec = cri::ImageSpec { image: image.clone(), ..Default::default() };
            let request = cri::PullImageRequest { image: Some(spec), ..Default::default() };
            peer.containerd.cri().images().pull_image(request).await?;
        }
        Ok(peer)
    }

    /// `ctr` with these arguments; what it printed, and its exit code.
    fn try_ctr(&self, arguments: &[&str]) -> Result<(i32, String)> {
        let output = self.containerd.ctr().args(arguments).output().context("run ctr")?;
        Ok((output.status.code().unwrap_or(-1), said(&output)))
    }

    fn ctr(&self, arguments: &[&str]) -> Result<String> {
        let (code, text) = self.try_ctr(arguments)?;
        ensure!(code == 0, "ctr {arguments:?}: {code}: {text}\n{}", self.containerd.log());
        Ok(text)
    }

    /// `ctr run` of a shell script with our shim.
    fn run<'a>(&'a self, flags: &[&'a str], id: &'a str, script: &'a str) -> Vec<&'a str> {
        let rootfs = self.rootfs.to_str().expect("a path of ours is text");
        let mut line = vec!["run", "--runtime", "io.containerd.holdfast.v2"];
        line.extend(flags);
        line.extend(["--rootfs", rootfs, id, "/bin/sh", "-c", script]);
        line
    }

    fn state(&self, id: &str) -> Result<String> {
        let list = self.ctr(&["task", "ls"])?;
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(id));
        Ok(line.and_then(|l| l.split_whitespace().last()).unwrap_or("GONE").to_owned())
    }

    async fn state_is(&self, id: &str, wanted: &str) -> Result<()> {
        eventually(PATIENCE, &format!("{id} to be {wanted}"), async || {
            let state = self.state(id)?;
            Ok(Look::when(state == wanted, || state))
        })
        .await
    }

    fn delete(&self, id: &str) -> Result<()> {
        let _ = self.try_ctr(&["task", "kill", "-s", "SIGKILL", id])?;
        let _ = self.try_ctr(&["task", "delete", "-f", id])?;
        self.ctr(&["container", "delete", id]).map(drop)
    }

    /// Shims and containers that are still there once all were deleted.
    async fn finish(self) -> Result<()> {
        let path = self.containerd.ground().path().display().to_string();
        eventually(PATIENCE, "every shim to be gone", async || {
            let left = shims(&path);
            Ok(Look::when(left.is_empty(), || format!("{left:?}")))
        })
        .await?;
        let left = self.containerd.ground().mounts();
        ensure!(left.is_empty(), "mounts are left: {left:?}");
        Ok(())
    }
}

fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

/// Pids of our shims whose command line has that text.
fn shims(text: &str) -> Vec<(i32, String)> {
    names_in(Path::new("/proc"))
        .iter()
        .filter_map(|name| name.parse::<i32>().ok())
        .filter_map(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let ours = line.starts_with("containerd-shim-holdfast-v2 ") && line.contains(text);
            ours.then_some((pid, line))
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn ctr_runs_execs_pauses_and_kills() -> Result<()> {
    let peer = Peer::start().await?;
    // Through FIFOs that ctr reads, with the exit code.
    let (code, text) =
        peer.try_ctr(&peer.run(&["--rm"], "fifo", "echo out; echo err >&2; exit 3"))?;
    ensure!(code == 3 && text.contains("out\n") && text.contains("err\n"), "{code}: {text}");

    peer.ctr(&peer.run(&["-d"], "c1", "trap 'exit 0' TERM; while :; do sleep 0.1; done"))?;
    peer.state_is("c1", "RUNNING").await?;
    let text = peer.ctr(&["task", "exec", "--exec-id", "e1", "c1", "/bin/echo", "from exec"])?;
    ensure!(text == "from exec\n", "{text}");
    let failing = ["task", "exec", "--exec-id", "e2", "c1", "/bin/sh", "-c", "exit 9"];
    ensure!(peer.try_ctr(&failing)?.0 == 9, "an exec's exit code");
    let missing = ["task", "exec", "--exec-id", "e3", "c1", "/bin/nothing"];
    let (code, text) = peer.try_ctr(&missing)?;
    ensure!(code != 0 && text.contains("/bin/nothing"), "{code}: {text}");

    peer.ctr(&["task", "pause", "c1"])?;
    peer.state_is("c1", "PAUSED").await?;
    peer.ctr(&["task", "resume", "c1"])?;
    peer.state_is("c1", "RUNNING").await?;
    let metrics = peer.ctr(&["task", "metrics", "--format", "json", "c1"])?;
    ensure!(metrics.contains("\"pids\"") && metrics.contains("\"memory\""), "{metrics}");
    let pids = peer.ctr(&["task", "ps", "c1"])?;
    ensure!(pids.lines().count() >= 2, "{pids}");

    peer.ctr(&["task", "kill", "-s", "SIGKILL", "c1"])?;
    peer.state_is("c1", "STOPPED").await?;
    peer.delete("c1")?;
    peer.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_cannot_be_made_is_refused_and_the_container_goes_on() -> Result<()> {
    let peer = Peer::start().await?;
    let script = "echo > /tmp/runs; while :; do sleep 0.1; done";
    peer.ctr(&peer.run(&["-d"], "c1", script))?;
    // ctr freezes it first, and runc takes what has not begun yet for what has ended.
    let runs = peer.rootfs.join("tmp/runs");
    eventually(PATIENCE, "the container to run", async || {
        Ok(Look::when(runs.exists(), || "it does not".into()))
    })
    .await?;
    // Whether or not there is a criu: one that always fails is found first by runc's options.
    let images = peer.containerd.ground().path().join("no/such/dir");
    let images = images.to_str().context("text")?;
    let line = ["task", "checkpoint", "--image-path", images, "--work-path", "/proc", "c1"];
    let (code, text) = peer.try_ctr(&line)?;
    ensure!(code != 0 && text.contains("checkpoint"), "{code}: {text}");
    peer.state_is("c1", "RUNNING").await?;
    peer.delete("c1")?;
    peer.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_becomes_an_image_and_the_container_goes_on() -> Result<()> {
    let mut peer = Peer::start().await?;
    // With a script in criu's place: criu itself does not run on every kernel.
    let gate = peer.containerd.gate()?;
    peer.containerd.terminate()?;
    peer.containerd.restart().await?;
    peer.ctr(&peer.run(&["-d"], "c1", "echo > /tmp/runs; while :; do sleep 0.1; done"))?;
    let runs = peer.rootfs.join("tmp/runs");
    eventually(PATIENCE, "the container to run", async || {
        Ok(Look::when(runs.exists(), || "it does not".into()))
    })
    .await?;
    // Without a directory: ctr 1.6 passes one on to runc's own shim alone. It becomes an image.
    let name = peer.ctr(&["task", "checkpoint", "c1"])?;
    let images = peer.ctr(&["image", "ls", "-q"])?;
    ensure!(!name.trim().is_empty() && images.contains(name.trim()), "{name:?} in {images:?}");
    ensure!(gate.calls("checkpoint") == 1, "{} calls", gate.calls("checkpoint"));
    ensure!(gate.flags().contains(&"--leave-running".to_owned()), "{:?}", gate.flags());
    peer.state_is("c1", "RUNNING").await?;
    let text = peer.ctr(&["task", "exec", "--exec-id", "e", "c1", "/bin/echo", "goes on"])?;
    ensure!(text == "goes on\n", "{text}");
    gate.no_dump("no such luck")?;
    let (code, text) = peer.try_ctr(&["task", "checkpoint", "c1"])?;
    ensure!(code != 0 && text.contains("no such luck"), "{code}: {text}");
    peer.state_is("c1", "RUNNING").await?;
    peer.delete("c1")?;
    peer.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn ctr_logs_to_files_and_to_logging_binaries() -> Result<()> {
    let peer = Peer::start().await?;
    let dir = peer.containerd.ground().path().to_path_buf();
    let file = dir.join("out.log");
    let uri = format!("file://{}", file.display());
    peer.ctr(&peer.run(&["-d", "--log-uri", &uri], "f", "echo to a file; echo also >&2"))?;
    peer.state_is("f", "STOPPED").await?;
    let text = fs::read_to_string(&file)?;
    ensure!(text.contains("to a file\n") && text.contains("also\n"), "{text:?}");

    let (logger, taken) = (dir.join("logger"), dir.join("taken"));
    // Ready is said by closing descriptor 5.
    let script = format!(
        "#!/bin/sh\nexec 5>&-\necho \"$1 $2 $CONTAINER_ID $CONTAINER_NAMESPACE\" > {0}\ncat <&3 >> {0}\n",
        taken.display()
    );
    fs::write(&logger, script)?;
    fs::set_permissions(&logger, fs::Permissions::from_mode(0o755))?;
    let uri = format!("binary://{}?key=a%20value", logger.display());
    peer.ctr(&peer.run(&["-d", "--log-uri", &uri], "b", "echo to a binary"))?;
    peer.state_is("b", "STOPPED").await?;
    eventually(PATIENCE, "the logging binary to have it", async || {
        let text = fs::read_to_string(&taken).unwrap_or_default();
        Ok(Look::when(text == "key a value b test\nto a binary\n", || text))
    })
    .await?;
    for id in ["f", "b"] {
        peer.delete(id)?;
    }
    peer.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn ctr_gives_a_terminal() -> Result<()> {
    let peer = Peer::start().await?;
    let mut line = vec![peer.containerd.ctr().get_program().to_os_string()];
    line.extend(peer.containerd.ctr().get_args().map(ToOwned::to_owned));
    let script = "[ -t 0 ] && [ -t 1 ] && echo a terminal; exit 4";
    line.extend(peer.run(&["--rm", "-t"], "t", script).iter().map(Into::into));
    // ctr wants a terminal of its own.
    let python =
        "import pty, os, sys; s = pty.spawn(sys.argv[1:]); sys.exit(os.waitstatus_to_exitcode(s))";
    let output = Command::new("python3").arg("-c").arg(python).args(line).output()?;
    let text = said(&output);
    ensure!(output.status.code() == Some(4) && text.contains("a terminal"), "{output:?}");
    peer.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_outlive_a_containerd_that_is_killed_or_restarted() -> Result<()> {
    let mut peer = Peer::start().await?;
    let go = peer.rootfs.join("tmp/go");
    peer.ctr(&peer.run(&["-d"], "lives", "while :; do sleep 0.1; done"))?;
    peer.ctr(&peer.run(&["-d"], "ends", "while [ ! -e /tmp/go ]; do sleep 0.1; done; exit 42"))?;
    peer.containerd.kill9()?;
    fs::write(&go, "")?;
    peer.containerd.restart().await?;
    peer.state_is("lives", "RUNNING").await?;
    peer.state_is("ends", "STOPPED").await?;
    let text = peer.ctr(&["task", "delete", "ends"])?;
    ensure!(text.contains("exit code 42"), "{text}");
    peer.ctr(&["container", "delete", "ends"])?;
    peer.containerd.terminate()?;
    peer.containerd.restart().await?;
    let text = peer.ctr(&["task", "exec", "--exec-id", "e", "lives", "/bin/echo", "still here"])?;
    ensure!(text == "still here\n", "{text}");
    peer.delete("lives")?;
    peer.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_containerds_cri_have_one_shim_each_and_outlive_it() -> Result<()> {
    let mut peer = Peer::start().await?;
    let ground = peer.containerd.ground();
    let (cgroup, logs) = (ground.cgroup(), ground.path().join("logs"));
    let pod =
        PodBuilder::at(peer.containerd.cri(), "a", &cgroup, &logs).host_network().run().await?;
    let go = ground.path().join("go");
    fs::create_dir(&go)?;
    let lives = pod
        .container(&peer.busybox)
        .name("lives")
        .sh("echo hello from the pod; exec sleep 1000")
        .start()
        .await?;
    let ends = pod
        .container(&peer.busybox)
        .name("ends")
        .sh("while [ ! -e /go/now ]; do usleep 20000; done; exit 42")
        .mount(&go, "/go", |_| {})
        .start()
        .await?;
    lives.wait_for_log("hello from the pod").await?;
    ensure!(shims(&pod.id).len() == 1, "one shim for the pod: {:?}", shims(&pod.id));
    for id in [&lives.id, &ends.id] {
        ensure!(shims(id).is_empty(), "a shim of its own: {:?}", shims(id));
    }
    ensure!(lives.sh("echo from exec").await? == "from exec", "exec");
    let stats = lives.stats().await?;
    ensure!(stats.memory.is_some_and(|m| m.working_set_bytes.is_some()), "no memory is told");

    peer.containerd.kill9()?;
    fs::write(go.join("now"), "")?;
    peer.containerd.restart().await?;
    let (lives, ends) = (
        Container::existing(peer.containerd.cri(), &lives.id),
        Container::existing(peer.containerd.cri(), &ends.id),
    );
    ensure!(ends.wait().await?.exit_code == 42, "the exit while nobody listened");
    ensure!(lives.is_running().await?, "it runs on");
    peer.containerd.terminate()?;
    peer.containerd.restart().await?;
    ensure!(lives.sh("echo still here").await? == "still here", "exec after a restart");
    lives.stop(0).await?;
    ensure!(lives.status().await?.exit_code == 137, "a killed container's code");
    pod.stop().await?;
    pod.remove().await?;
    peer.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_cleans_up_after_a_shim_that_was_killed() -> Result<()> {
    let peer = Peer::start().await?;
    peer.ctr(&peer.run(&["-d"], "c1", "while :; do sleep 0.1; done"))?;
    let socket = peer.containerd.ground().path().display().to_string();
    let [(shim, _)] = &shims(&socket)[..] else { anyhow::bail!("{:?}", shims(&socket)) };
    use nix::sys::signal::{Signal, kill};
    kill(nix::unistd::Pid::from_raw(*shim), Signal::SIGKILL)?;
    peer.state_is("c1", "GONE").await?;
    let rootfs = peer.rootfs.display().to_string();
    eventually(PATIENCE, "the container's process to be gone", async || {
        let left = peer.containerd.ground().processes();
        let left: Vec<_> = left.into_iter().filter(|pid| *pid != peer.containerd.pid()).collect();
        Ok(Look::when(left.is_empty(), || format!("{left:?} {rootfs}")))
    })
    .await?;
    peer.ctr(&["container", "delete", "c1"])?;
    peer.finish().await
}

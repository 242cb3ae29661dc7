//! Two releases on one node: daemons and shims of the release before this one, really built from its
//! commit (`make previous`), beside those of this one. Whoever is upgraded, in whatever order, and
//! whoever is put back: pods go on, and everything that can be asked for is answered truly.

use std::{collections::BTreeSet, fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use holdfast_integration::{
    Container, Node, Pod,
    binaries::{Binaries, binaries, previous},
    log,
    node::on,
    wait::Look,
};
use holdfast_protos::cri;
use holdfast_shim::{
    bundle::Bundle,
    control::{Attach, AttachInput, AttachOutput, Control, Output},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// The release before this one, and this one.
struct Releases {
    old: Binaries,
    new: Binaries,
}

/// `None` where the clone does not have the commit, which was said.
fn releases() -> Result<Option<Releases>> {
    let Some(old) = previous()? else { return Ok(None) };
    Ok(Some(Releases { old, new: binaries()? }))
}

/// A pod whose containers must not notice anything.
struct Story {
    image: String,
    pod: Pod,
    ip: String,
    go: PathBuf,
    /// Counts, some thousand lines a second.
    writer: Container,
    terminal: Container,
    /// Answers a line, in one line of its log that never ends.
    reader: Container,
    created: Container,
    everything: BTreeSet<String>,
    rounds: u32,
    /// What the reader was given.
    said: Vec<u32>,
    /// A shim of it was killed.
    lost_shims: bool,
}

impl Story {
    async fn begin(node: &mut Node, new: &Binaries, old: &Binaries) -> Result<Self> {
        let image = prepared(node, [new, old]).await?;
        let go = node.path().join("go");
        fs::create_dir(&go)?;
        let pod = node.pod("a").shared_pids().run().await?;
        let count = "trap 'exit 9' TERM; i=0; while :; do i=$((i+1)); echo line $i; \
                     [ $((i % 50)) != 0 ] || usleep 2000; done";
        let writer = pod.container(&image).name("writer").sh(count).start().await?;
        let terminal = pod
            .container(&image)
            .name("terminal")
            .config(|c| {
                c.tty = true;
                c.stdin = true;
            })
            .sh("stty -echo; echo ready; while read x; do echo got $x; done; exit 8")
            .start()
            .await?;
        let reader = pod
            .container(&image)
            .name("reader")
            .config(|c| c.stdin = true)
            .sh("printf 'one '; while read x; do printf \"$x \"; done; echo end; exit 7")
            .start()
            .await?;
        let created = pod.container(&image).name("created").sh("exit 6").create().await?;
        let exited = pod.container(&image).name("exited").sh("exit 5").start().await?;
        exited.ends_with(5).await?;
        writer.wait_for_log("line 1000").await?;
        terminal.wait_for_log("ready").await?;
        let ip = pod.ip().await?;
        let everything = everything(node).await?;
        Ok(Self {
            image,
            pod,
            ip,
            go,
            writer,
            terminal,
            reader,
            created,
            everything,
            rounds: 0,
            said: Vec::new(),
            lost_shims: false,
        })
    }

    fn control(&self, node: &Node) -> Control {
        Control::new(&Bundle::new(node.path().join("state/bundles").join(&self.pod.id)))
    }

    fn shim(&self, node: &Node) -> Result<i32> {
        node.pid_file(&self.pod.id, "shim.pid")
    }

    /// The shim of the pod runs this program, which may have been replaced since.
    fn is_run_by(&self, node: &Node, program: &Binaries) -> Result<bool> {
        use std::os::unix::fs::MetadataExt as _;
        let exe = fs::metadata(format!("/proc/{}/exe", self.shim(node)?))?;
        let program = fs::metadata(&program.shim)?;
        Ok((exe.dev(), exe.ino()) == (program.dev(), program.ino()))
    }

    /// Puts other programs in the place of the node's and starts its daemon anew. What ends in between
    /// is told truly.
    async fn install(&mut self, node: &mut Node, programs: &[&PathBuf]) -> Result<()> {
        self.rounds += 1;
        let (round, file) = (self.rounds, format!("now{}", self.rounds));
        let wait = format!(
            "echo ready; while [ ! -e /go/{file} ]; do usleep 20000; done; exit {}",
            40 + round
        );
        let ends = self
            .pod
            .container(&self.image)
            .name(&format!("ends{round}"))
            .sh(&wait)
            .mount(&self.go, "/go", |_| {})
            .start()
            .await?;
        ends.wait_for_log("ready").await?;
        let init = node.pid_file(&ends.id, "init.pid")?;
        // Upgraded by its unit, and killed: both happen.
        if round % 2 == 0 {
            node.kill9()?
        } else {
            node.terminate()?
        }
        fs::write(self.go.join(&file), "")?;
        on(node, Duration::from_secs(20), "it to end without a daemon", async || {
            let line = fs::read_to_string(format!("/proc/{init}/cmdline")).unwrap_or_default();
            Ok(Look::when(!line.contains(&file), || line))
        })
        .await?;
        for program in programs {
            node.install(program)?;
        }
        node.restart().await?;
        ends.ends_with(40 + round as i32).await?;
        ends.remove().await?;
        Ok(())
    }

    /// Everything that can be asked of the pod, and the life of others.
    async fn goes_on(&mut self, node: &Node) -> Result<()> {
        assert_eq!(everything(node).await?, self.everything);
        assert_eq!(self.pod.ip().await?, self.ip);
        let script = ["/bin/sh", "-c", "echo out; echo err >&2; exit 33"];
        let exec = self.writer.exec_sync(&script, 20).await?;
        ensure!(exec.exit_code == 33 && exec.stdout == b"out\n", "{exec:?}");
        ensure!(exec.stderr == b"err\n", "{exec:?}");
        let late = self.writer.exec_sync(&["sleep", "100"], 1).await;
        ensure!(late.is_err_and(|status| status.code() == tonic::Code::DeadlineExceeded));

        // Containers of old shims, and shims of this daemon's own.
        for pod in [&self.pod, &node.pod("b").run().await?] {
            self.a_life_in(node, pod).await?;
            if pod.id != self.pod.id {
                pod.stop().await?;
                pod.remove().await?;
            }
        }

        let stats = self.writer.stats().await?;
        let memory = stats.memory.and_then(|memory| memory.working_set_bytes);
        ensure!(memory.is_some_and(|bytes| bytes.value > 0), "{memory:?}");
        let size = || fs::metadata(self.writer.log_path()).map_or(0, |meta| meta.len());
        let before = size();
        on(node, Duration::from_secs(20), "the log to go on", async || {
            Ok(Look::when(size() > before + 10_000, || format!("{} bytes more", size() - before)))
        })
        .await?;

        let both = Attach { stdin: true, stdout: true, stderr: false };
        let (mut input, mut output) =
            self.control(node).attach(&self.terminal.id, both).await?.split();
        says(&mut input, &mut output, &format!("round{}", self.rounds)).await?;
        let (mut input, _output) = self.control(node).attach(&self.reader.id, both).await?.split();
        input.stdin(format!("round{}\n", self.rounds).as_bytes()).await?;
        self.said.push(self.rounds);
        Ok(())
    }

    /// A container that is made, updated, read, paused by nobody, stopped and removed in this pod.
    async fn a_life_in(&self, node: &Node, pod: &Pod) -> Result<()> {
        let container = pod
            .container(&self.image)
            .name("life")
            .sh("trap 'exit 21' TERM; echo first; while :; do sleep 0.05; echo more; done")
            .resources(|r| r.memory_limit_in_bytes = 64 << 20)
            .start()
            .await?;
        container.wait_for_log("first").await?;
        let request = cri::UpdateContainerResourcesRequest {
            container_id: container.id.clone(),
            linux: Some(cri::LinuxContainerResources {
                memory_limit_in_bytes: 48 << 20,
                ..Default::default()
            }),
            ..Default::default()
        };
        node.cri().runtime().update_container_resources(request).await?;
        let told = container.status().await?.resources.and_then(|resources| resources.linux);
        ensure!(told.as_ref().is_some_and(|r| r.memory_limit_in_bytes == 48 << 20), "{told:?}");
        fs::rename(container.log_path(), container.log_path().with_extension("1"))?;
        let request = cri::ReopenContainerLogRequest { container_id: container.id.clone() };
        node.cri().runtime().reopen_container_log(request).await?;
        container.wait_for_log("more").await?;
        container.stop(10).await?;
        container.ends_with(21).await?;
        container.remove().await?;

        let oom = pod
            .container(&self.image)
            .name("oom")
            .sh("exec tail /dev/zero")
            .resources(|r| {
                r.memory_limit_in_bytes = 12 << 20;
                r.memory_swap_limit_in_bytes = 12 << 20;
            })
            .start()
            .await?;
        let status = oom.wait().await?;
        ensure!(status.reason == "OOMKilled" && status.exit_code == 137, "{status:?}");
        oom.remove().await?;
        Ok(())
    }

    /// The end: nothing was lost, and nothing is left.
    async fn ends(self, node: Node) -> Result<()> {
        self.created.start().await?;
        self.created.ends_with(6).await?;
        let both = Attach { stdin: true, stdout: true, stderr: false };
        let (mut input, _output) =
            self.control(&node).attach(&self.terminal.id, both).await?.split();
        input.close_stdin().await?;
        self.terminal.ends_with(8).await?;
        self.reader.stop(0).await?;
        let answers: Vec<_> = self.reader.log()?.into_iter().map(|line| line.text).collect();
        // One line, begun before all that happened. Of the end of a line a shim that dies takes with it
        // what it had read.
        let whole =
            format!("one {}", self.said.iter().map(|n| format!("round{n} ")).collect::<String>());
        let rest = answers.concat();
        ensure!(answers.len() == 1 && !rest.is_empty(), "{answers:?}");
        ensure!(
            if self.lost_shims { whole.ends_with(&rest) } else { whole == rest },
            "{answers:?}"
        );
        self.writer.stop(10).await?;
        self.writer.ends_with(9).await?;
        let count = log::numbered(&self.writer.log()?)?;
        println!("{count} lines of the writer, all there");
        self.pod.stop().await?;
        self.pod.remove().await?;
        node.finish().await
    }
}

/// An image, on a node that daemons of both releases have had, the last of them still: each has files of
/// its own that stay, and copies of what it knows of images.
async fn prepared(node: &mut Node, releases: [&Binaries; 2]) -> Result<String> {
    let image = node.busybox().await?;
    for release in releases {
        node.terminate()?;
        node.install(&release.daemon)?;
        node.restart().await?;
    }
    node.rebase();
    Ok(image)
}

async fn says(input: &mut AttachInput, output: &mut AttachOutput, word: &str) -> Result<()> {
    input.stdin(format!("{word}\n").as_bytes()).await?;
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains(&format!("got {word}")) {
        match output.next().await? {
            Some(Output::Stdout(bytes)) => seen.extend(bytes),
            other => bail!("{other:?} after {:?}", String::from_utf8_lossy(&seen)),
        }
    }
    Ok(())
}

/// What both daemons must tell alike.
async fn everything(node: &Node) -> Result<BTreeSet<String>> {
    let pods = node.pods().await?.into_iter().map(|pod| {
        format!("pod {} {:?} {:?} {}", pod.id, pod.metadata, pod.state(), pod.created_at)
    });
    let containers =
        node.containers().await?.into_iter().map(|c| {
            format!("container {} {:?} {:?} {}", c.id, c.metadata, c.state(), c.created_at)
        });
    Ok(pods.chain(containers).collect())
}

/// `holdfast upgrade shims` to the installed program, for all shims.
fn upgrade(node: &Node) -> Result<()> {
    let said = node.cli(&["upgrade", "shims"])?;
    ensure!(said.contains("upgraded"), "{said}");
    Ok(())
}

/// Kills the pod's shim and waits until the installed one has taken over.
async fn kill_shim(node: &Node, story: &mut Story) -> Result<()> {
    story.lost_shims = true;
    let old = story.shim(node)?;
    kill(Pid::from_raw(old), Signal::SIGKILL)?;
    let control = story.control(node);
    on(node, Duration::from_secs(20), "another shim to take over", async || {
        if story.shim(node)? == old {
            return Ok(Look::Not("the old one is on record".into()));
        }
        Ok(match control.hello(Duration::from_secs(5)).await {
            Ok(hello) => Look::when(!hello.orphaned, || format!("{hello:?}")),
            Err(error) => Look::Not(error.to_string()),
        })
    })
    .await
}

/// The daemon is upgraded and put back, twice; the shims are not touched.
#[tokio::test(flavor = "multi_thread")]
async fn pods_of_the_previous_release_go_on_under_this_daemon_and_back_again() -> Result<()> {
    let Some(Releases { old, new }) = releases()? else { return Ok(()) };
    let mut node = Node::builder().installed(&old).start().await?;
    let mut story = Story::begin(&mut node, &new, &old).await?;
    for (release, what) in [(&new, "upgraded"), (&old, "put back"), (&new, "upgraded again")] {
        story.install(&mut node, &[&release.daemon, &release.cli]).await.context(what)?;
        let on = story.goes_on(&node).await;
        on.with_context(|| format!("{what}\n{}", node.daemon_log(30)))?;
        ensure!(story.is_run_by(&node, &old)?, "{what}: the shim is another");
    }
    story.ends(node).await
}

/// The shim's file was replaced before the daemon's: what the old daemon starts is the new one.
#[tokio::test(flavor = "multi_thread")]
async fn shims_of_this_release_serve_the_previous_daemon() -> Result<()> {
    let Some(Releases { old, new }) = releases()? else { return Ok(()) };
    let mixed = Binaries { shim: new.shim.clone(), ..old.clone() };
    let mut node = Node::builder().installed(&mixed).start().await?;
    let mut story = Story::begin(&mut node, &new, &old).await?;
    ensure!(story.is_run_by(&node, &new)?);
    story.goes_on(&node).await.with_context(|| node.daemon_log(30))?;
    for (release, what) in [(&old, "started anew"), (&new, "upgraded"), (&old, "put back")] {
        story.install(&mut node, &[&release.daemon, &release.cli]).await.context(what)?;
        let on = story.goes_on(&node).await;
        on.with_context(|| format!("{what}\n{}", node.daemon_log(30)))?;
    }
    story.ends(node).await
}

/// `holdfast upgrade shims` after a package was installed; then the package is put back, and so are the
/// shims, under either daemon.
#[tokio::test(flavor = "multi_thread")]
async fn shims_of_the_previous_release_are_upgraded_in_place_and_put_back() -> Result<()> {
    let Some(Releases { old, new }) = releases()? else { return Ok(()) };
    let mut node = Node::builder().installed(&old).start().await?;
    let mut story = Story::begin(&mut node, &new, &old).await?;
    let pid = story.shim(&node)?;
    let attached = story.control(&node);
    let both = Attach { stdin: true, stdout: true, stderr: false };
    let (mut input, mut output) = attached.attach(&story.terminal.id, both).await?.split();
    for (release, what) in [(&new, "upgraded"), (&old, "put back")] {
        let programs = [&release.daemon, &release.cli, &release.shim];
        story.install(&mut node, &programs).await.context(what)?;
        // Under way while the code is replaced, in both directions.
        let exec = async {
            let script = ["/bin/sh", "-c", "echo before; sleep 2; echo after; exit 34"];
            story.writer.exec_sync(&script, 30).await
        };
        let upgrading = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            upgrade(&node)
        };
        let (exec, upgraded) = tokio::join!(exec, upgrading);
        upgraded.with_context(|| format!("{what}\n{}", node.daemon_log(30)))?;
        let exec = exec.with_context(|| format!("{what}\n{}", node.daemon_log(30)))?;
        ensure!(exec.exit_code == 34 && exec.stdout == b"before\nafter\n", "{what}: {exec:?}");
        ensure!(story.shim(&node)? == pid && story.is_run_by(&node, release)?, "{what}");
        says(&mut input, &mut output, what).await?;
        let on = story.goes_on(&node).await;
        on.with_context(|| format!("{what}\n{}", node.daemon_log(30)))?;
    }
    drop((input, output));
    story.ends(node).await
}

/// A shim that dies when its file was replaced is followed by one of the other release, which reads
/// what it has left behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_shim_takes_over_from_a_dead_one_of_the_other_release() -> Result<()> {
    let Some(Releases { old, new }) = releases()? else { return Ok(()) };
    let mut node = Node::builder().installed(&old).start().await?;
    let mut story = Story::begin(&mut node, &new, &old).await?;
    for (release, what) in [(&new, "upgraded"), (&old, "put back")] {
        let programs = [&release.daemon, &release.cli, &release.shim];
        story.install(&mut node, &programs).await.context(what)?;
        kill_shim(&node, &mut story).await.context(what)?;
        ensure!(story.is_run_by(&node, release)?, "{what}: it is not the installed one");
        let on = story.goes_on(&node).await;
        on.with_context(|| format!("{what}\n{}", node.daemon_log(30)))?;
    }
    story.ends(node).await
}

/// A pod that the one release has made is taken away by the other, with nothing left of it.
#[tokio::test(flavor = "multi_thread")]
async fn what_one_release_has_made_the_other_takes_away() -> Result<()> {
    let Some(Releases { old, new }) = releases()? else { return Ok(()) };
    for (before, after) in [(&old, &new), (&new, &old)] {
        let mut node = Node::builder().installed(before).start().await?;
        let image = prepared(&mut node, [after, before]).await?;
        let baseline = node.inventory();
        let mut pods = Vec::new();
        for name in ["running", "stopped", "gone"] {
            let pod = node.pod(name).run().await?;
            pod.container(&image).sh("exec sleep 1000").start().await?;
            pod.container(&image).name("created").sh("true").create().await?;
            pods.push(pod);
        }
        pods[1].stop().await?;
        // Its shim dies with the daemon, so that the other release finds nobody.
        let shim = node.pid_file(&pods[2].id, "shim.pid")?;
        node.kill9()?;
        kill(Pid::from_raw(shim), Signal::SIGKILL)?;
        for program in [&after.daemon, &after.cli, &after.shim] {
            node.install(program)?;
        }
        node.restart().await?;
        assert_eq!(node.pods().await?.len(), 3);
        for pod in pods {
            pod.stop().await?;
            pod.remove().await?;
        }
        node.nothing_left_since(&baseline).await?;
        node.finish().await?;
    }
    Ok(())
}

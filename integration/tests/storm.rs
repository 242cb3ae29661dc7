//! Twenty clients make, use, stop and remove pods while the daemon is killed after about 300 ms each time; and
//! the same while the OCI runtime and the CNI plugin fail, die and are slow at random. At the end what
//! the clients have and what the node has agree exactly.
//!
//! 30 seconds of it; `HOLDFAST_SOAK=<seconds>` makes it so many.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use holdfast_integration::{
    Container, Node, Pod, eventually, log, node::Builder, pod::PodBuilder, wait::Look,
};
use holdfast_protos::cri;
use rand::Rng as _;
use tokio::time::{Instant, sleep};
use tonic::{Code, Status};

const CLIENTS: usize = 20;
/// Mean time from one daemon's start, or service, to its end. As in a storm it is now short, now long:
/// most live for less.
const KILL_EVERY: Duration = Duration::from_millis(300);
/// How long a client insists on one call.
const STEP: Duration = Duration::from_secs(120);

fn how_long() -> Duration {
    let seconds = std::env::var("HOLDFAST_SOAK").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(30))
}

/// What the clients did, and what they have.
#[derive(Default)]
struct Storm {
    /// Ends the clients, each at a point where it knows what it has.
    over: AtomicBool,
    /// Whether programs fail, so that any call may be refused.
    refusals: bool,
    rounds: AtomicUsize,
    /// Calls that nobody answered, and that were made again.
    repeated: AtomicUsize,
    refused: AtomicUsize,
    /// Pods that clients have at the end, by their id, with their running container.
    kept: Mutex<BTreeMap<String, String>>,
}

/// Nobody answered: the daemon is being started again.
fn is_broken(status: &Status) -> bool {
    let said = status.message();
    matches!(status.code(), Code::Unavailable | Code::Cancelled)
        || ["transport error", "h2 protocol error"].iter().any(|text| said.contains(text))
}

impl Storm {
    /// Calls until a daemon has answered.
    async fn call<T>(
        &self,
        what: &str,
        call: impl AsyncFn() -> Result<T, Status>,
    ) -> Result<Result<T, Status>> {
        let begun = Instant::now();
        let mut said = Duration::ZERO;
        loop {
            match call().await {
                Err(status) if is_broken(&status) => {
                    ensure!(begun.elapsed() < STEP, "{what}: {status:?}");
                    if begun.elapsed() > said + STEP / 4 {
                        said = begun.elapsed();
                        println!("{what}: not answered for {said:.0?}");
                    }
                    self.repeated.fetch_add(1, Ordering::Relaxed);
                    let pause = rand::rng().random_range(10..60);
                    sleep(Duration::from_millis(pause)).await;
                }
                answer => return Ok(answer),
            }
        }
    }

    /// Calls until it goes well: what takes things away may be refused, but not for ever.
    async fn until_done(
        &self,
        what: &str,
        call: impl AsyncFn() -> Result<(), Status>,
    ) -> Result<()> {
        let end = Instant::now() + STEP;
        loop {
            match self.call(what, &call).await? {
                Ok(()) => return Ok(()),
                Err(status) => {
                    ensure!(self.refusals && Instant::now() < end, "{what}: {status:?}");
                    self.refused.fetch_add(1, Ordering::Relaxed);
                    sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    /// A call that must go well when no program fails; `None`: it was refused.
    async fn ask<T>(
        &self,
        what: &str,
        call: impl AsyncFn() -> Result<T, Status>,
    ) -> Result<Option<T>> {
        match self.call(what, call).await? {
            Ok(value) => Ok(Some(value)),
            Err(status) if self.refusals => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                // A refusal says why: a fault of ours is none.
                ensure!(status.code() != Code::Unknown, "{what}: {status:?}");
                Ok(None)
            }
            Err(status) => bail!("{what}: {status:?}"),
        }
    }

    async fn client(&self, number: usize, image: &str, builder: PodBuilder) -> Result<()> {
        let mut attempt = 0;
        while !self.over.load(Ordering::Relaxed) {
            attempt += 1;
            let builder = match attempt % 3 {
                0 => builder.clone().attempt(attempt),
                _ => builder.clone().attempt(attempt).host_network(),
            };
            let name = format!("client {number}, attempt {attempt}");
            self.round(&name, image, &builder).await?;
            self.rounds.fetch_add(1, Ordering::Relaxed);
        }
        // Every second client has something at the end.
        if number.is_multiple_of(2) {
            let end = Instant::now() + STEP;
            loop {
                attempt += 1;
                let builder = builder.clone().attempt(attempt).host_network();
                if let Some((pod, container)) = self.keep(number, image, &builder).await? {
                    let mut kept = self.kept.lock().expect("no panic with it");
                    kept.insert(pod, container);
                    return Ok(());
                }
                ensure!(Instant::now() < end, "client {number} gets no pod");
            }
        }
        Ok(())
    }

    async fn keep(
        &self,
        number: usize,
        image: &str,
        builder: &PodBuilder,
    ) -> Result<Option<(String, String)>> {
        let what = |step: &str| format!("client {number}, {step} for good");
        let Some(pod) = self.ask(&what("run"), async || builder.clone().run().await).await? else {
            return Ok(None);
        };
        let create = pod.container(image).sh("exec sleep 100000");
        let made = self.ask(&what("create"), async || create.clone().create().await).await?;
        if let Some(container) = made
            && self.ask(&what("start"), async || container.start().await).await?.is_some()
        {
            return Ok(Some((pod.id, container.id)));
        }
        self.take_away(&what("undo"), &pod).await?;
        Ok(None)
    }

    async fn take_away(&self, what: &str, pod: &Pod) -> Result<()> {
        self.until_done(&format!("{what}, stop pod"), async || pod.stop().await).await?;
        self.until_done(&format!("{what}, remove pod"), async || pod.remove().await).await
    }

    async fn round(&self, name: &str, image: &str, builder: &PodBuilder) -> Result<()> {
        let what = |step: &str| format!("{name}, {step}");
        let Some(pod) = self.ask(&what("run"), async || builder.clone().run().await).await? else {
            return Ok(());
        };
        let used = self.use_pod(name, image, builder, &pod).await;
        self.take_away(name, &pod).await?;
        used
    }

    async fn use_pod(
        &self,
        name: &str,
        image: &str,
        builder: &PodBuilder,
        pod: &Pod,
    ) -> Result<()> {
        let what = |step: &str| format!("{name}, {step}");
        if let Some(again) =
            self.ask(&what("run again"), async || builder.clone().run().await).await?
        {
            ensure!(again.id == pod.id, "{name}: a second pod was made for the same name");
        }
        let create = pod.container(image).sh("trap 'exit 9' TERM; while :; do sleep 0.2; done");
        let made = self.ask(&what("create"), async || create.clone().create().await).await?;
        let Some(container) = made else { return Ok(()) };
        if self.call(&what("start"), async || container.start().await).await?.is_err() {
            let status = self.status(name, &container).await?;
            // Started by a daemon that was killed before it could say so, or refused for good.
            let runs = status.state() == cri::ContainerState::ContainerRunning;
            ensure!(runs || self.refusals, "{name}, start: {status:?}");
            if !runs {
                return Ok(());
            }
        }
        let exec = async || container.exec_sync(&["echo", "hello"], 30).await;
        if let Some(exec) = self.ask(&what("exec"), exec).await? {
            ensure!(exec.stdout == b"hello\n", "{name}: {exec:?}");
        }
        self.until_done(&what("stop"), async || container.stop(5).await).await?;
        let status = self.status(name, &container).await?;
        ensure!(status.state() == cri::ContainerState::ContainerExited, "{name}: {status:?}");
        // It may be asked before it has set its trap: 137, or 143 where it is not the first process of its
        // namespace. 2: before runc's init had become it. Go's runtime catches the signal, raises it again,
        // and leaves with 2 when it outlives that, as the first process of a namespace does. The
        // shell's own 2 has a reason in the log.
        let log = container.log()?;
        ensure!(
            matches!(status.exit_code, 9 | 137 | 143) || (status.exit_code == 2 && log.is_empty()),
            "{name}: {status:?}, its log: {log:?}"
        );
        if rand::random() {
            self.until_done(&what("remove"), async || container.remove().await).await?;
        }
        Ok(())
    }

    async fn status(&self, name: &str, container: &Container) -> Result<cri::ContainerStatus> {
        let answer = self.call(name, async || container.status().await).await?;
        answer.with_context(|| format!("{name}: status"))
    }
}

async fn storm(builder: Builder, kills: bool, refusals: bool) -> Result<()> {
    let mut node = builder.start().await?;
    let image = node.busybox().await?;
    // Something that is not touched, and must never notice.
    let witness = node.pod("witness").run().await?;
    let container = witness
        .container(&image)
        .command(["/bin/awk", r#"BEGIN { for (i = 1; ; i++) { print "line " i; system("") ; for (j = 0; j < 20000; j++); } }"#])
        .start()
        .await?;
    let before = container.status().await?;
    let baseline = node.inventory();
    if refusals {
        node.gated_runtime().chaos("the runtime is out of sorts")?;
        let error = r#"{"cniVersion":"1.0.0","code":100,"msg":"the network is out of sorts"}"#;
        node.gated_cni().chaos(error)?;
    }

    let storm = Storm { refusals, ..Storm::default() };
    let clients =
        (0..CLIENTS).map(|number| storm.client(number, &image, node.pod(&format!("c{number}"))));
    let clients: Vec<_> = clients.collect();
    let clients = async {
        let done = futures::future::try_join_all(clients).await;
        // One that failed ends the storm, not the others' patience.
        storm.over.store(true, Ordering::Relaxed);
        done
    };
    let mut killed = 0;
    let weather = async {
        let end = Instant::now() + how_long();
        while Instant::now() < end && !storm.over.load(Ordering::Relaxed) {
            // Exponential, so that a kill does not depend on when the last one was.
            sleep(KILL_EVERY.mul_f64(-(1.0 - rand::random::<f64>()).ln())).await;
            if kills {
                node.kill9()?;
                killed += 1;
                // Some die while they start; most when they have begun to serve, however long that
                // takes on a busy machine: else nobody would ever get anything done.
                if rand::rng().random_ratio(1, 3) {
                    node.launch()?;
                } else {
                    node.restart().await?;
                }
            }
        }
        storm.over.store(true, Ordering::Relaxed);
        // A last start whose end is waited for.
        if kills {
            node.kill9()?;
            node.restart().await?;
        }
        // The clients must come to their ends with what they are given.
        Ok::<_, anyhow::Error>(())
    };
    // Whichever fails first ends both: without a daemon the clients would only lose their patience, and nobody
    // would know why.
    let worked = futures::future::try_join(clients, weather).await;
    if refusals {
        node.gated_runtime().release()?;
        node.gated_cni().release()?;
    }
    worked.with_context(|| node.daemon_log(120))?;
    let rounds = storm.rounds.load(Ordering::Relaxed);
    println!(
        "{rounds} rounds, {killed} kills, {} calls made again, {} refused",
        storm.repeated.load(Ordering::Relaxed),
        storm.refused.load(Ordering::Relaxed)
    );
    ensure!(rounds >= CLIENTS, "only {rounds} rounds");

    // The clients' pods, and no others; their containers run, and no others.
    let kept = storm.kept.into_inner()?;
    eventually(Duration::from_secs(30), "model and node to agree", async || {
        let mut found = BTreeMap::new();
        for pod in node.pods().await? {
            if pod.id != witness.id {
                ensure!(kept.contains_key(&pod.id), "a pod of nobody: {pod:?}");
                ensure!(pod.state() == cri::PodSandboxState::SandboxReady, "{pod:?}");
                found.insert(pod.id, String::new());
            }
        }
        for made in node.containers().await? {
            if made.pod_sandbox_id != witness.id {
                let runs = made.state() == cri::ContainerState::ContainerRunning;
                ensure!(runs, "{made:?}");
                found.insert(made.pod_sandbox_id, made.id);
            }
        }
        Ok(Look::when(found == kept, || format!("{found:?} instead of {kept:?}")))
    })
    .await?;
    for container in kept.values() {
        assert_eq!(Container::existing(node.cri(), container).sh("echo fine").await?, "fine");
    }
    assert_eq!(container.status().await?, before);
    let mut lines = container.log()?;
    // It is in the middle of one.
    lines.pop();
    log::numbered(&lines)?;
    for pod in kept.keys() {
        let pod = Pod::existing(node.cri(), pod);
        pod.stop().await?;
        pod.remove().await?;
    }
    node.nothing_left_since(&baseline).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_three_times_a_second_it_loses_nothing_and_leaks_nothing() -> Result<()> {
    storm(Node::builder(), true, false).await
}

#[tokio::test(flavor = "multi_thread")]
async fn with_programs_that_fail_and_die_at_random_nothing_is_lost_or_leaked() -> Result<()> {
    let node = Node::builder().gated_runtime().gated_cni();
    storm(node.runtime_config("timeout = \"20s\""), false, true).await
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_while_programs_fail_nothing_is_lost_or_leaked() -> Result<()> {
    let node = Node::builder().gated_runtime().gated_cni();
    storm(node.runtime_config("timeout = \"20s\""), true, true).await
}

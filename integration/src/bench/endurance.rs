//! What a shim costs under use: its memory after many execs and much output, and how fast it takes
//! lines of 100 bytes, beside containerd and beside conmon, which writes the log of CRI-O's and
//! podman's containers.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use holdfast_protos::cri as api;
use serde_json::{Value, json};

use super::{
    PODS, SETTLE, Side, WIDTH,
    floor::Floor,
    millis,
    peer::in_path,
    progress,
    samples::{CONTAINERD, FLOOR, HOLDFAST, LOG, SHIM_GROWTH, SHIM_OWN_GROWTH, Samples},
    shim::shim_of,
};
use crate::{Image, ground::names_in, memory::Memory, tar::Entry, wait::Look, wait::eventually};

/// Lines of 100 bytes with their ends: 16 MB of them in a file that the container writes out.
const LINES: usize = 160_000;
/// How often it does: 256 MB in a round.
const TIMES: usize = 16;
/// What a log has besides the text of a line: time, stream and tag.
const OVERHEAD_MIN: usize = 20;

/// The image: busybox and a file of lines.
///
/// # Errors
/// It cannot be built.
pub fn image() -> Result<Image> {
    let lines = lines();
    Image::busybox()?.layer([Entry::file("lines", 0o644, lines)]).build()
}

fn lines() -> Vec<u8> {
    let mut text = Vec::with_capacity(LINES * 100);
    for number in 0..LINES {
        text.extend(format!("{number:>8} {:.<90}\n", "a line of one hundred bytes ").bytes());
    }
    text
}

fn script() -> String {
    format!("i=0; while [ $i -lt {TIMES} ]; do cat /lines; i=$((i+1)); done")
}

/// Size at least that a complete log has.
fn complete() -> u64 {
    (LINES * TIMES * (100 + OVERHEAD_MIN)) as u64
}

/// Rounds of output, then of execs on ours.
pub(super) async fn run(
    quick: bool,
    samples: &mut Samples,
    sides: &mut [Side],
    image: &str,
    floor: &Floor,
    facts: &mut Vec<String>,
) -> Result<()> {
    let (rounds, execs) = if quick { (1, 500) } else { (4, 10_000) };
    let conmon = in_path("conmon");
    if conmon.is_none() {
        facts.push("conmon: not measured".into());
    }
    for side in sides.iter_mut() {
        side.pull(image).await?;
    }
    if let Some(ours) = sides.iter_mut().find(|side| side.column == HOLDFAST) {
        growth(ours, image, rounds, execs, samples, facts).await?;
    }
    for side in sides.iter_mut().filter(|side| side.column == CONTAINERD) {
        let (pod, config) = side.run_pod().await?;
        for round in 0..rounds {
            progress(format!("output {}/{rounds} of {}", round + 1, side.column));
            output(side, &pod, config.as_ref(), image, round, samples).await?;
        }
    }
    if let Some(conmon) = conmon {
        fs::write(floor.bundle().join("rootfs/lines"), lines())?;
        for round in 0..rounds {
            progress(format!("output {}/{rounds} of conmon", round + 1));
            under_conmon(&conmon, floor, round, samples).await?;
        }
    }
    for side in sides.iter_mut() {
        side.clear().await?;
        side.remove_image(image).await?;
    }
    // Megabytes of text, in lines of 100 bytes.
    let text = (LINES * TIMES * 100) as f64 / 1e6;
    for (name, column) in [("holdfast", HOLDFAST), ("containerd", CONTAINERD), ("conmon", FLOOR)] {
        if let Some(took) = samples.percentile(LOG, column, 50) {
            facts
                .push(format!("output of one container, {name}: {:.0} MB/s", text / took * 1000.0));
        }
    }
    Ok(())
}

/// The memory of one shim, idle, and after much use.
///
/// Compared are three moments, each when nothing has been asked of the shim for [`SETTLE`]: after one
/// exec and one container's output; after all rounds of output and all execs; after as many execs
/// again. Growth is that of the larger of the later two over the first, once of its PSS and once of what it
/// has written to and has alone. By the first moment it has touched the program's pages that only use
/// needs; they are this shim's alone among idle ones, and so they would look like growth. Its heap has
/// done no more than that by then.
async fn growth(
    side: &mut Side,
    image: &str,
    rounds: usize,
    execs: usize,
    samples: &mut Samples,
    facts: &mut Vec<String>,
) -> Result<()> {
    // Among as many as the memory section has: they share the program's pages.
    for _ in 1..PODS {
        side.idle_pod().await?;
    }
    let (pod, config) = side.run_pod().await?;
    let request = side.container_request(&pod, config.as_ref(), "idle", &["/bin/sleep", "100000"]);
    let container = side.runtime.create_container(request).await?.into_inner().container_id;
    let request = api::StartContainerRequest { container_id: container.clone() };
    side.runtime.start_container(request).await?;
    let shim = shim_of(&pod).context("no shim runs")?;
    let settled = async || {
        tokio::time::sleep(SETTLE).await;
        Memory::of(shim)
    };
    let runtime = side.runtime.clone();
    let many = async |execs: usize| {
        progress(format!("{execs} execs"));
        stream::iter(0..execs)
            .map(|_| {
                let mut runtime = runtime.clone();
                let request = api::ExecSyncRequest {
                    container_id: container.clone(),
                    cmd: vec!["/bin/true".into()],
                    timeout: 60,
                };
                async move { runtime.exec_sync(request).await }
            })
            .buffer_unordered(WIDTH)
            .try_for_each(|_| async { Ok(()) })
            .await
    };
    let idle = settled().await?;
    output(side, &pod, config.as_ref(), image, usize::MAX, &mut Samples::default()).await?;
    many(1).await?;
    let before = settled().await?;
    for round in 0..rounds {
        progress(format!("output {}/{rounds} of {}", round + 1, side.column));
        output(side, &pod, config.as_ref(), image, round, samples).await?;
    }
    let loud = settled().await?;
    many(execs).await?;
    let after = settled().await?;
    many(execs).await?;
    let again = settled().await?;
    facts.push(format!("memory of a shim among {PODS}"));
    for (when, memory) in [
        ("idle".to_owned(), &idle),
        ("after one exec and one container's output".to_owned(), &before),
        (format!("after {rounds} times that output"), &loud),
        (format!("after {execs} execs"), &after),
        (format!("after {execs} execs more"), &again),
    ] {
        facts.push(format!("  {when}: {memory}"));
    }
    let growth = |of: fn(&Memory) -> u64| {
        (of(&after).max(of(&again)) as f64 / of(&before) as f64 - 1.0) * 100.0
    };
    samples.add(SHIM_GROWTH, HOLDFAST, growth(Memory::pss));
    samples.add(SHIM_OWN_GROWTH, HOLDFAST, growth(Memory::dirty));
    Ok(())
}

/// A container that writes all its lines; until they are in its log and its end is known.
async fn output(
    side: &mut Side,
    pod: &str,
    config: Option<&api::PodSandboxConfig>,
    image: &str,
    round: usize,
    samples: &mut Samples,
) -> Result<()> {
    let name = format!("loud{round}");
    let script = script();
    let mut request = side.container_request(pod, config, &name, &["/bin/sh", "-c", &script]);
    if let Some(config) = &mut request.config {
        config.image = Some(crate::node::image_spec(image));
    }
    let log = config.map(|config| config.log_directory.clone()).unwrap_or_default();
    let log = PathBuf::from(log).join(format!("{name}.log"));
    let container = side.runtime.create_container(request).await?.into_inner().container_id;
    let request = api::StartContainerRequest { container_id: container.clone() };
    let started = Instant::now();
    side.runtime.start_container(request).await?;
    let mut runtime = side.runtime.clone();
    eventually(Duration::from_secs(300), "the output to end", async || {
        let request =
            api::ContainerStatusRequest { container_id: container.clone(), verbose: false };
        let status = runtime.container_status(request).await?.into_inner().status;
        let state = status.unwrap_or_default().state();
        Ok(Look::when(state == api::ContainerState::ContainerExited, || format!("{state:?}")))
    })
    .await?;
    whole(&log).await?;
    samples.add(LOG, side.column, millis(started));
    fs::remove_file(&log)?;
    let request = api::RemoveContainerRequest { container_id: container };
    side.runtime.remove_container(request).await?;
    Ok(())
}

async fn whole(log: &Path) -> Result<()> {
    eventually(Duration::from_secs(60), "all of the log", async || {
        let size = fs::metadata(log).map_or(0, |meta| meta.len());
        Ok(Look::when(size >= complete(), || format!("{size} of {} bytes", complete())))
    })
    .await
}

/// The same with conmon and runc alone.
async fn under_conmon(
    conmon: &Path,
    floor: &Floor,
    round: usize,
    samples: &mut Samples,
) -> Result<()> {
    let id = format!("conmon{round}");
    let at = floor.ground().path().join(&id);
    let exits = at.join("exits");
    fs::create_dir_all(&exits)?;
    let config = floor.bundle().join("config.json");
    let mut spec: Value = serde_json::from_slice(&fs::read(&config)?)?;
    spec["process"]["terminal"] = json!(false);
    spec["process"]["args"] = json!(["/bin/sh", "-c", script()]);
    spec["process"]["env"] = json!(["PATH=/bin"]);
    spec["linux"]["cgroupsPath"] = json!(format!("{}/{id}", floor.ground().cgroup()));
    for namespace in spec["linux"]["namespaces"].as_array_mut().context("namespaces")? {
        if let Some(namespace) = namespace.as_object_mut() {
            namespace.remove("path");
        }
    }
    fs::write(&config, spec.to_string())?;
    let log = at.join("log");
    let root = floor.ground().path().join("runc");
    let run = |command: &mut Command| -> Result<()> {
        let errors = at.join("errors");
        // No pipes: what is left behind would hold them.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&errors)?);
        let status = command.status().with_context(|| format!("run {command:?}"))?;
        let said = fs::read_to_string(&errors).unwrap_or_default();
        ensure!(status.success(), "{command:?}: {status}: {said}");
        Ok(())
    };
    run(Command::new(conmon)
        .args(["--cid", &id, "--cuuid", &id])
        .arg("--runtime")
        .arg(floor.runc_path())
        .arg(format!("--runtime-arg=--root={}", root.display()))
        .arg("--bundle")
        .arg(floor.bundle())
        .arg("--container-pidfile")
        .arg(at.join("pid"))
        .arg("--conmon-pidfile")
        .arg(at.join("conmon.pid"))
        .arg("--log-path")
        .arg(format!("k8s-file:{}", log.display()))
        // Else it wants a directory of CRI-O's.
        .arg("--socket-dir-path")
        .arg(&at)
        .arg("--exit-dir")
        .arg(&exits))?;
    // It answers when the container is created only to who gives it a pipe.
    eventually(Duration::from_secs(30), "conmon to create the container", async || {
        let made = fs::read_to_string(at.join("pid")).is_ok_and(|text| !text.is_empty());
        Ok(Look::when(made, || fs::read_to_string(at.join("errors")).unwrap_or_default()))
    })
    .await?;
    let started = Instant::now();
    run(Command::new(floor.runc_path()).arg("--root").arg(&root).args(["start", &id]))?;
    eventually(Duration::from_secs(300), "the output under conmon to end", async || {
        let ended = names_in(&exits);
        Ok(Look::when(!ended.is_empty(), || "no exit file".into()))
    })
    .await?;
    whole(&log).await?;
    samples.add(LOG, FLOOR, millis(started));
    run(Command::new(floor.runc_path()).arg("--root").arg(&root).args(["delete", "--force", &id]))?;
    fs::remove_dir_all(&at)?;
    Ok(())
}

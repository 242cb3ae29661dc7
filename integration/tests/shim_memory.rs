//! A shim's memory does not grow with what it has done.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use holdfast_integration::{
    Container, Pod,
    memory::Memory,
    node::{on, with_busybox},
    wait::Look,
};

/// Execs at once.
const WIDTH: usize = 4;
/// What a shim may have more after much use: a few pages, in KiB. Freed memory that its allocator kept was
/// ten times that.
const FEW_PAGES: u64 = 24;

async fn execs(container: &Container, count: usize) -> Result<()> {
    stream::iter(0..count)
        .map(|_| async {
            let done = container.exec_sync(&["/bin/true"], 60).await?;
            ensure!(done.exit_code == 0, "{done:?}");
            Ok(())
        })
        .buffer_unordered(WIDTH)
        .try_for_each(|()| async { Ok(()) })
        .await
}

/// A container that writes so many lines, and is gone.
async fn output(pod: &Pod, image: &str, name: &str, lines: usize) -> Result<()> {
    let loud =
        pod.container(image).name(name).sh(&format!("seq 100000 {}", 99_999 + lines)).start();
    let loud = loud.await?;
    loud.ends_with(0).await?;
    ensure!(loud.log()?.len() == lines, "lines are missing");
    loud.remove().await?;
    fs::remove_file(loud.log_path())?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_has_as_much_memory_after_hundreds_of_execs_as_after_a_few() -> Result<()> {
    let (node, image) = with_busybox("runc").await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).name("idle").sh("sleep 100000").start().await?;
    let shim = node.pid_file(&pod.id, "shim.pid")?;
    execs(&container, 2 * WIDTH).await?;
    output(&pod, &image, "first", 10_000).await?;
    // It gives back what is free a second after it was used.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let few = Memory::of(shim)?;
    execs(&container, 400).await?;
    output(&pod, &image, "second", 400_000).await?;
    on(&node, Duration::from_secs(20), "a shim as small as before", async || {
        let many = Memory::of(shim)?;
        println!("{few}\n{many}");
        Ok(Look::when(many.dirty() <= few.dirty() + FEW_PAGES, || format!("{many}; it was {few}")))
    })
    .await?;
    node.finish().await
}

/// What its heap needs is in the shim's environment, and in nobody else's.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_shims_heap_needs_is_not_inherited() -> Result<()> {
    let mut node = holdfast_integration::Node::builder().gated_runtime().start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let environment = |pid: i32| -> Result<String> {
        let bytes = fs::read(format!("/proc/{pid}/environ")).context("an environment")?;
        Ok(String::from_utf8_lossy(&bytes).replace('\0', "\n"))
    };
    let shim = environment(node.pid_file(&pod.id, "shim.pid")?)?;
    ensure!(
        shim.lines().any(|line| line == "GLIBC_TUNABLES=glibc.malloc.tcache_count=0"),
        "{shim}"
    );
    node.gated_runtime().hang("create")?;
    let creating = tokio::spawn(pod.container(&image).sh("sleep 100000").start());
    let script = node.path().join("gated-runc/runc");
    let runtime = on(&node, Duration::from_secs(20), "the OCI runtime to run", async || {
        let found = node.ground().processes().into_iter().find(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = line.split(|byte| *byte == 0);
            words.any(|word| word == script.as_os_str().as_encoded_bytes())
                && line.windows(6).any(|word| word == b"create")
        });
        Ok(found.map_or_else(|| Look::Not("no process of it".into()), Look::Done))
    })
    .await?;
    let runtime = environment(runtime)?;
    ensure!(runtime.contains("PATH=") && !runtime.contains("GLIBC_TUNABLES"), "{runtime}");
    node.gated_runtime().release()?;
    creating.await??;
    node.finish().await
}

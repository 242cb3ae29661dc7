//! Many ends, and each told truly. `HOLDFAST_SOAK` makes them a thousand of each kind.

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use holdfast_integration::{Container, Node};

/// Containers that are under way at once.
const WIDTH: usize = 8;
/// Containers of one pod.
const PER_POD: usize = 25;

fn count(short: usize) -> usize {
    if std::env::var_os("HOLDFAST_SOAK").is_some() { 1000 } else { short }
}

/// Makes so many containers, `WIDTH` at once and `PER_POD` in a pod, and has each checked when it has
/// ended.
async fn many(
    count: usize,
    script: impl Fn(usize) -> String,
    memory: i64,
    check: impl AsyncFn(usize, &Container) -> Result<()>,
) -> Result<()> {
    let mut node = Node::builder().log_level("info").start().await?;
    let image = node.busybox().await?;
    let done = AtomicUsize::new(0);
    for first in (0..count).step_by(PER_POD) {
        let pod = node.pod(&format!("p{first}")).host_network().run().await?;
        stream::iter(first..(first + PER_POD).min(count))
            .map(|number| {
                let make = pod
                    .container(&image)
                    .name(&format!("c{number}"))
                    .sh(&script(number))
                    .resources(|r| {
                        r.memory_limit_in_bytes = memory;
                        r.memory_swap_limit_in_bytes = memory;
                    });
                let (check, done) = (&check, &done);
                async move {
                    let container = make.start().await?;
                    container.wait().await?;
                    check(number, &container)
                        .await
                        .with_context(|| format!("container {number}"))?;
                    done.fetch_add(1, Ordering::Relaxed);
                    container.remove().await?;
                    anyhow::Ok(())
                }
            })
            .buffer_unordered(WIDTH)
            .try_collect::<Vec<()>>()
            .await?;
        pod.stop().await?;
        pod.remove().await?;
    }
    let done = done.into_inner();
    println!("{done} of {count} told truly");
    ensure!(done == count);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_exits_at_once_leaves_a_true_code() -> Result<()> {
    let code = |number: usize| (number % 250) as i32;
    many(
        count(100),
        |number| format!("exit {}", code(number)),
        0,
        async |number, container| {
            let status = container.status().await?;
            ensure!(status.exit_code == code(number), "{status:?}");
            ensure!(status.started_at > 0 && status.finished_at >= status.started_at, "{status:?}");
            let reason = if code(number) == 0 { "Completed" } else { "Error" };
            ensure!(status.reason == reason, "{status:?}");
            Ok(())
        },
    )
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn whom_the_oom_killer_ends_is_told_as_such() -> Result<()> {
    let script = |_| "exec tail /dev/zero".to_owned();
    many(count(50), script, 12 << 20, async |_, container| {
        let status = container.status().await?;
        ensure!(status.reason == "OOMKilled" && status.exit_code == 137, "{status:?}");
        Ok(())
    })
    .await
}

//! What this project is for, on real parts: a pod from a real image outlives the daemon.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{Node, eventually, log, node::on, wait::Look};

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_outlives_the_daemon_with_runc() -> Result<()> {
    a_pod_outlives_the_daemon("runc").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_outlives_the_daemon_with_crun() -> Result<()> {
    a_pod_outlives_the_daemon("crun").await
}

async fn a_pod_outlives_the_daemon(runtime: &str) -> Result<()> {
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("web").run().await?;
    let ip = pod.ip().await?;
    let subnet = node.ground().subnet4();
    ensure!(ip.starts_with(subnet.trim_end_matches("0/24")), "{ip} is not in {subnet}");

    // A web server and a log that never stops.
    let container = pod
        .container(&image)
        .sh("mkdir /tmp/www; echo served > /tmp/www/index.html; httpd -p 8080 -h /tmp/www; \
             i=0; while :; do i=$((i+1)); echo line $i; usleep 2000; done")
        .start()
        .await?;
    container.wait_for_log("line 10").await?;
    ensure!(get(&ip).await?.ends_with("served\n"));
    assert_eq!(container.sh("echo from inside; hostname").await?, "from inside\nweb");
    let before = container.status().await?;
    let pid = container.sh("cat /proc/1/stat").await?;

    node.kill9()?;
    let lines = container.log()?.len();
    eventually(Duration::from_secs(10), "the log to grow without a daemon", async || {
        let now = container.log()?.len();
        Ok(Look::when(now > lines + 100, || format!("{now} lines, before {lines}")))
    })
    .await?;
    ensure!(get(&ip).await?.ends_with("served\n"), "the pod's network went with the daemon");
    node.restart().await?;

    let after = container.status().await?;
    assert_eq!(after, before);
    assert_eq!(pod.ip().await?, ip);
    let start_time = |stat: &str| stat.split(' ').nth(21).map(String::from);
    let stat = container.sh("cat /proc/1/stat").await?;
    assert_eq!(start_time(&stat), start_time(&pid), "it is another process");
    ensure!(get(&ip).await?.ends_with("served\n"));

    container.stop(5).await?;
    let count = log::numbered(&container.log()?)?;
    ensure!(count > lines as u64 + 100, "{count} lines");
    node.finish().await
}

/// What the pod's web server answers.
async fn get(ip: &str) -> Result<String> {
    let address = format!("{ip}:8080").parse()?;
    tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))
            .with_context(|| format!("connect to {address}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
    .await?
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_reports_what_it_is_and_that_it_is_ready() -> Result<()> {
    let node = Node::start().await?;
    let version = node
        .cri()
        .runtime()
        .version(holdfast_protos::cri::VersionRequest { version: "v1".into() })
        .await?
        .into_inner();
    assert_eq!(version.runtime_name, "holdfast");
    assert_eq!(version.runtime_api_version, "v1");
    ensure!(!version.runtime_version.is_empty());
    on(&node, Duration::from_secs(5), "NetworkReady", async || {
        let conditions = node.status(false).await?.status.unwrap_or_default().conditions;
        let ready = |kind: &str| conditions.iter().any(|c| c.r#type == kind && c.status);
        Ok(Look::when(ready("RuntimeReady") && ready("NetworkReady"), || format!("{conditions:?}")))
    })
    .await?;
    let status = node.status(true).await?;
    ensure!(!status.info.is_empty(), "verbose has no info");
    let handlers: Vec<&str> = status.runtime_handlers.iter().map(|h| h.name.as_str()).collect();
    for name in ["", "runc", "crun"] {
        ensure!(handlers.contains(&name), "{name:?} is not among the handlers {handlers:?}");
    }
    node.finish().await
}

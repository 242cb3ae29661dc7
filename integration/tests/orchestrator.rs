//! The shim crate's example: a pod with our shim and no daemon.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{binaries::binaries, ground::Ground};

#[test]
fn the_example_runs_a_pod_without_a_daemon() -> Result<()> {
    let ground = Ground::new()?;
    let rootfs = ground.path().join("rootfs");
    for dir in ["bin", "proc"] {
        fs::create_dir_all(rootfs.join(dir))?;
    }
    fs::copy("/bin/busybox", rootfs.join("bin/busybox"))?;
    std::os::unix::fs::symlink("busybox", rootfs.join("bin/sh"))?;
    let shim = binaries()?.shim;
    let example = shim.with_file_name("orchestrator");
    ensure!(example.is_file(), "{} is missing: run 'make test-bins'", example.display());
    let output = Command::new(example)
        .arg(&shim)
        .arg(&rootfs)
        .args(["/bin/sh", "-c", "echo hello from $(busybox hostname); exit 5"])
        .env("TMPDIR", ground.path())
        .output()
        .context("run the example")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (said, events) = (text(&output.stdout), text(&output.stderr));
    ensure!(output.status.code() == Some(5), "{}: {said}{events}", output.status);
    ensure!(said == "hello from example\n", "{said}{events}");
    for event in ["Create", "Start", "Exit", "Delete"] {
        ensure!(events.contains(&format!("event: {event} ")), "no {event}: {events}");
    }
    ensure!(ground.processes().is_empty(), "processes are left");
    ensure!(ground.mounts().is_empty(), "mounts are left");
    Ok(())
}

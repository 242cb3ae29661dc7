//! The harness itself, where a mistake would make other tests pass or leave things on the machine.

use std::{
    fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use holdfast_integration::{
    Image, Registry, eventually,
    ground::{Ground, Process, is_zombie, mountinfo},
    hugetlb::{self, Hugetlb},
    leaks::Inventory,
    registry::{Answer, Remote, Scripted},
    wait::Look,
};
use nix::mount::{MsFlags, mount};

#[tokio::test]
async fn an_image_is_pushed_to_a_real_registry_and_reads_are_counted() -> Result<()> {
    let registry = Registry::start().await?;
    let image = Image::busybox()?.build()?;
    let reference = registry.push("test/busybox:1", &image).await?;
    assert_eq!(reference, format!("{}/test/busybox:1", registry.host()));
    let path = format!("/v2/test/busybox/blobs/{}", image.layers[0].digest);
    assert_eq!(registry.gets(&path).await?, 0);
    let remote = Remote::new(registry.host());
    for _ in 0..2 {
        assert!(remote.get(&path).await? == image.layers[0].content);
    }
    // It writes its log when it has answered.
    eventually(Duration::from_secs(5), "both reads to be logged", async || {
        let gets = registry.gets(&path).await?;
        Ok(Look::when(gets >= 2, || format!("{gets}")))
    })
    .await?;
    assert_eq!(registry.gets(&path).await?, 2, "{}", registry.log());
    let size = image.layers[0].content.len() as u64;
    assert_eq!(registry.sent(&path).await?, 2 * size, "{}", registry.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scripted_registry_answers_by_its_table() -> Result<()> {
    let registry = Scripted::start().await?;
    registry.answer("/v2/a/manifests/1", Answer::Spaces("text/plain".into(), 100_000_000));
    let remote = Remote::new(&registry.host());
    assert_eq!(remote.get("/v2/a/manifests/1").await?.len(), 100_000_000);
    let error = remote.get("/v2/nothing").await.unwrap_err().to_string();
    assert!(error.contains("404") && error.contains("NAME_UNKNOWN"), "{error}");
    assert_eq!(registry.requests().len(), 2);
    Ok(())
}

#[test]
fn a_ground_takes_everything_with_it() -> Result<()> {
    let ground = Ground::new()?;
    let other = Ground::new()?;
    let before = Inventory::take(&ground, &[]);
    assert!(before.is_empty(), "{before}");

    let dir = ground.path().join("state");
    fs::create_dir(&dir)?;
    mount(Some("none"), &dir, Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
    let cgroup = Path::new("/sys/fs/cgroup/pids");
    let cgroup = if cgroup.is_dir() { cgroup } else { Path::new("/sys/fs/cgroup") };
    let cgroup = cgroup.join(ground.cgroup().trim_start_matches('/')).join("x");
    fs::create_dir_all(&cgroup)?;
    Command::new("ip").args(["link", "add", &ground.bridge(), "type", "bridge"]).status()?;
    let log = ground.path().join("log");
    // By its cgroup alone: neither its command line nor its directory tell.
    let mut by_cgroup = Process::spawn("sleep", &["1000".as_ref()], &[], &log)?;
    fs::write(cgroup.join("cgroup.procs"), by_cgroup.pid().to_string())?;
    let script = "sleep 1000; : $0";
    let by_command = ["-c".as_ref(), script.as_ref(), dir.as_os_str()];
    let mut by_command = Process::spawn("sh", &by_command, &[], &log)?;
    let children = format!("/proc/{0}/task/{0}/children", by_command.pid());
    let child = wait_for_child(&children)?;

    let found = Inventory::take(&ground, &[]).without(&before);
    assert_eq!(found.only(&["mount"]).len(), 1, "{found}");
    assert_eq!(found.only(&["cgroup"]).len(), 1, "{found}");
    assert_eq!(found.only(&["process"]).len(), 2, "{found}");
    assert!(Inventory::take(&other, &[]).is_empty());

    let (path, bridge) = (ground.path().to_owned(), ground.bridge());
    drop(ground);
    assert!(by_cgroup.try_wait()?.is_some());
    assert!(by_command.try_wait()?.is_some());
    // Nothing tells that the child belongs to the ground but that it is in the group of one that does.
    assert!(is_zombie(child), "process {child} outlived its ground");
    assert!(!path.exists());
    assert!(!cgroup.exists() && !cgroup.parent().unwrap().exists());
    assert!(!Path::new("/sys/class/net").join(bridge).exists());
    assert!(other.path().exists());
    Ok(())
}

fn wait_for_child(children: &str) -> Result<i32> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        if let Ok(pid) = fs::read_to_string(children)?.trim().parse() {
            return Ok(pid);
        }
        ensure!(Instant::now() < end, "no child in {children}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_hugetlb_hierarchy_is_there_while_somebody_needs_it() -> Result<()> {
    if !Path::new("/sys/fs/cgroup/unified/cgroup.controllers").exists() {
        println!("this host has one cgroup version: nothing is mounted, and crun runs as it is");
        return Ok(());
    }
    let mounted =
        || mountinfo("/proc/self/mountinfo").iter().any(|m| m.point == Path::new(hugetlb::MOUNT));
    let first = Hugetlb::hold(true)?;
    let second = Hugetlb::hold(true)?;
    assert!(mounted());
    drop(first);
    assert!(mounted(), "taken away from under another node");
    drop(second);
    // Another test process may hold it just now: then it is that one's to remove.
    let alone =
        Command::new("flock").args(["-n", "/run/lock/holdfast-test-hugetlb", "true"]).status()?;
    assert!(!alone.success() || !mounted(), "left behind");
    Ok(())
}

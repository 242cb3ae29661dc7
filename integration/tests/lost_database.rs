//! The database is lost, damaged, or not the one it was. No pod is harmed, and everything is on record again.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use holdfast_daemon::store::Store;
use holdfast_integration::{
    Image, Node, Pod, eventually, ground::is_zombie, log, tar::Entry, wait::Look,
};
use holdfast_protos::cri;

/// All that a node tells of what it has: pods, containers, images.
async fn everything(node: &Node) -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for pod in node.pods().await? {
        all.insert(format!("{pod:?}"));
        let status = Pod::existing(node.cri(), &pod.id).status().await?;
        all.insert(format!("{status:?}"));
    }
    for container in node.containers().await? {
        let request =
            cri::ContainerStatusRequest { container_id: container.id.clone(), verbose: false };
        let status = node.cri().runtime().container_status(request).await?.into_inner();
        all.insert(format!("{container:?}"));
        all.insert(format!("{:?}", status.status));
    }
    for image in node.images().await? {
        all.insert(format!("{image:?}"));
    }
    // Maps have no order.
    Ok(all.into_iter().map(|text| sorted(&text)).collect())
}

fn sorted(text: &str) -> String {
    let mut words: Vec<_> = text.split([',', '{', '}', ' ']).filter(|w| !w.is_empty()).collect();
    words.sort_unstable();
    words.join(" ")
}

/// What `Status` says of the database.
async fn database(node: &Node) -> Result<serde_json::Value> {
    let status = node.status(true).await?;
    Ok(serde_json::from_str(status.info.get("database").context("it says nothing")?)?)
}

/// What does not come and go by itself.
const THINGS: [&str; 8] =
    ["mount", "cgroup", "link", "address", "file", "directory", "socket", "fifo"];

type Damage = fn(&Path) -> Result<()>;

/// The write-ahead log of a database.
fn wal(db: &Path) -> PathBuf {
    PathBuf::from(format!("{}-wal", db.display()))
}

const DAMAGES: [(&str, Damage); 6] = [
    ("gone with its log", |db| {
        fs::remove_file(db)?;
        Ok(fs::remove_file(wal(db))?)
    }),
    ("gone", |db| Ok(fs::remove_file(db)?)),
    ("empty", |db| Ok(fs::write(db, "")?)),
    ("garbage", |db| Ok(fs::write(db, "not a database ".repeat(2000))?)),
    ("half of it, without its log", |db| {
        let file = fs::File::options().write(true).open(db)?;
        file.set_len(file.metadata()?.len() / 2 + 100)?;
        Ok(fs::remove_file(wal(db))?)
    }),
    ("without its log", |db| Ok(fs::remove_file(wal(db))?)),
];

#[tokio::test(flavor = "multi_thread")]
async fn whatever_becomes_of_the_database_no_pod_is_harmed() -> Result<()> {
    let mut node = Node::start().await?;
    let db = node.path().join("root/holdfast.db");
    let image = node.busybox().await?;
    let passing = Image::busybox()?.layer(vec![Entry::file("passing", 0o644, "by")]).build()?;
    let passing = node.load("test/passing:1", &passing).await?;
    let data = node.path().join("data");
    fs::create_dir(&data)?;

    let web = node.pod("web").attempt(3).label("app", "web").port(20_000, 80);
    let web =
        web.config(|c| drop(c.annotations.insert("note".into(), "kept".into()))).run().await?;
    let writes = "i=0; while :; do echo line $((i += 1)); usleep 2000; done";
    let writer = web.container(&image).name("writer").sh(writes).start().await?;
    let full = web
        .container(&passing)
        .name("full")
        .attempt(2)
        .sh("trap 'exit 6' TERM; while [ ! -e /data/go ]; do usleep 20000; done; exit 7")
        .env("MODE", "fast")
        .label("tier", "front")
        .mount(&data, "/data", |_| {})
        .resources(|resources| resources.memory_limit_in_bytes = 64 << 20)
        .start()
        .await?;
    web.container(&image).name("ended").sh("exit 3").start().await?.wait().await?;
    web.container(&image).name("made").sh("true").create().await?;
    let host = node.pod("host").host_network().run().await?;
    let stubborn =
        host.container(&image).sh("trap 'exit 5' TERM; echo up; while :; do usleep 9000; done");
    let stubborn = stubborn.start().await?;
    stubborn.wait_for_log("up").await?;
    let shared = node.pod("shared").shared_pids().runtime("runc").run().await?;
    shared.container(&image).sh("exec sleep 1000").start().await?;
    let stopped = node.pod("stopped").run().await?;
    stopped.container(&image).sh("exec sleep 1000").start().await?;
    stopped.stop().await?;
    // Its layers stay for as long as the container does.
    node.remove_image(&passing).await?;

    let before = everything(&node).await?;
    let inventory = node.inventory();
    for (how, damage) in DAMAGES {
        let told = async {
            node.kill9()?;
            damage(&db)?;
            node.restart().await?;
            let now = everything(&node).await?;
            let lost: Vec<_> = before.difference(&now).collect();
            let new: Vec<_> = now.difference(&before).collect();
            ensure!(lost.is_empty() && new.is_empty(), "lost: {lost:#?}\nnew: {new:#?}");
            assert_eq!(writer.sh("cat /proc/1/comm").await?, "sh");
            let told = database(&node).await?;
            ensure!(!told["damage"].is_null(), "not told: {told}");
            assert_eq!(told["restored"]["pods"], 4, "{told}");
            assert_eq!(told["restored"]["containers"], 7, "{told}");
            assert_eq!(told["restored"]["images"], 1, "{told}");
            for kept in told["kept"].as_array().context("no list")? {
                ensure!(Path::new(kept.as_str().unwrap_or_default()).exists(), "{told}");
            }
            // What the sweep of the start takes away is nothing of these. Processes come and go.
            eventually(Duration::from_secs(15), "nothing to be left over", async || {
                let left = node.inventory().without(&inventory).only(&THINGS);
                Ok(Look::when(left.is_empty(), || left.to_string()))
            })
            .await?;
            // Not sockets: that of a pod which was stopped goes a moment later.
            let missing = ["mount", "cgroup", "link", "address", "file"];
            let missing = inventory.without(&node.inventory()).only(&missing);
            ensure!(missing.is_empty(), "taken away:\n{missing}");
            Ok(())
        };
        told.await.with_context(|| format!("database {how}"))?;
    }
    // People see it too.
    let output = Command::new(&node.binaries().cli)
        .args(["--address", &node.path().join("cri.sock").display().to_string(), "info"])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(text.contains("4 pods, 7 containers and 1 images came back"), "{text}");

    // It ends while there is neither daemon nor database.
    node.kill9()?;
    let init = node.pid_file(&full.id, "init.pid")?;
    fs::remove_file(&db)?;
    fs::write(data.join("go"), "")?;
    eventually(Duration::from_secs(10), "the container to end", async || {
        let ended = is_zombie(init) || !Path::new(&format!("/proc/{init}")).exists();
        Ok(Look::when(ended, || init.to_string()))
    })
    .await?;
    node.restart().await?;
    assert_eq!(full.wait().await?.exit_code, 7);
    // A rebuilt database is like any other.
    node.terminate()?;
    node.restart().await?;
    ensure!(database(&node).await?["damage"].is_null(), "the next start finds it well");
    full.remove().await?;
    stubborn.stop(10).await?;
    assert_eq!(stubborn.status().await?.exit_code, 5);
    writer.stop(0).await?;
    let mut lines = writer.log()?;
    lines.pop();
    ensure!(log::numbered(&lines)? > 100, "too few lines");
    let again = node.pod("web").attempt(4).run().await?;
    ensure!(web.ip().await? != again.ip().await?, "an address is used twice");
    let second = host.container(&image).name("second").sh("echo second").output().await?;
    assert_eq!(second, "second");
    node.finish().await
}

/// A record that this release cannot read is perhaps of a later one: its pod runs on, untouched.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_record_is_of_that_cannot_be_read_is_left_alone() -> Result<()> {
    let mut node = Node::start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").run().await?;
    let container = pod.container(&image).sh("exec sleep 1000").start().await?;
    let init = node.pid_file(&container.id, "init.pid")?;
    let baseline = node.inventory();
    node.kill9()?;
    let copy = node.path().join("state/bundles").join(&pod.id).join("record.json");
    let known = fs::read_to_string(&copy)?;
    let db = node.path().join("root/holdfast.db");
    let swap = async |from: &'static str, to: &'static str| -> Result<()> {
        let store = Store::open(&db)?;
        store
            .call(move |db| {
                let sql = "UPDATE pods SET record = replace(record, ?1, ?2)";
                Ok(db.execute(sql, [from, to])?)
            })
            .await?;
        fs::write(&copy, fs::read_to_string(&copy)?.replace(from, to))?;
        drop(store);
        // Its thread closes it a moment later.
        eventually(Duration::from_secs(10), "the database to be free", async || {
            Ok(match Store::open(&db) {
                Ok(_) => Look::Done(()),
                Err(error) => Look::Not(format!("{error:?}")),
            })
        })
        .await
    };
    swap(r#""Ready""#, r#""Dormant""#).await?;
    ensure!(fs::read_to_string(&copy)? != known, "nothing was changed");
    // The sweep takes this away, and when it has it has seen the others.
    let stray = node.path().join("state/bundles").join("f".repeat(64));
    fs::create_dir(&stray)?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    node.restart().await?;
    ensure!(node.pods().await?.is_empty() && node.containers().await?.is_empty());
    eventually(Duration::from_secs(20), "the sweep", async || {
        Ok(Look::when(!stray.exists(), || "a stray bundle is there".into()))
    })
    .await?;
    // Then come snapshots, volumes and the network.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let told = database(&node).await?;
    assert_eq!(told["unread"].as_array().map(Vec::len), Some(2), "{told}");
    ensure!(
        baseline.without(&node.inventory()).is_empty(),
        "{}",
        baseline.without(&node.inventory())
    );
    ensure!(!is_zombie(init) && Path::new(&format!("/proc/{init}")).exists());
    node.terminate()?;
    // The later release is back.
    swap(r#""Dormant""#, r#""Ready""#).await?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    node.restart().await?;
    ensure!(container.is_running().await?);
    assert_eq!(container.sh("cat /proc/1/comm").await?, "sleep");
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_daemons_cannot_have_the_same_root_nor_the_same_state() -> Result<()> {
    let node = Node::start().await?;
    let text = fs::read_to_string(node.config())?;
    let at = |name: &str| format!("{:?}", node.path().join(name).display().to_string());
    for (what, shared) in [("root", "state"), ("state", "root")] {
        let other = text.replace(&at(shared), &at(&format!("other-{shared}")));
        let other = other
            .replace(&at("cri.sock"), &at("other.sock"))
            .replace(&at("nri.sock"), &at("other-nri.sock"));
        let path = node.path().join("other.toml");
        fs::write(&path, other)?;
        let daemon = node.binaries().daemon.clone();
        let output = tokio::task::spawn_blocking(move || {
            Command::new("timeout").arg("20").arg(daemon).arg("--config").arg(path).output()
        });
        let output = output.await??;
        let said = String::from_utf8_lossy(&output.stderr);
        let directory = node.path().join(what).display().to_string();
        let wanted = format!("another holdfastd runs with {what} directory {directory}");
        ensure!(!output.status.success() && said.contains(&wanted), "{}: {said}", output.status);
        ensure!(said.contains("end it first"), "{said}");
    }
    node.pods().await?;
    node.finish().await
}

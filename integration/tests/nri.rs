//! NRI: plugins that adjust, update, evict, refuse, hang, die, and join while containers are being made.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{Container, Node, eventually, nri::TestPlugin, wait::Look};
use holdfast_protos::cri;
use serde_json::{Value, json};
use tonic::Code;

const PROGRAM: &str = env!("CARGO_BIN_EXE_holdfast-testplugin");

/// A plugin of that node, there and synchronised.
async fn plugin(node: &Node, index: &str, name: &str, script: &Value) -> Result<TestPlugin> {
    let dir = node.path().join("plugins").join(format!("{index}-{name}"));
    let socket = node.path().join("nri.sock");
    TestPlugin::connect(Path::new(PROGRAM), &socket, &dir, (index, name), script)
        .await
        .with_context(|| node.daemon_log(60))
}

fn answers(method: &str, answer: Value) -> Value {
    json!({"answers": {method: [answer]}})
}

/// A node with more of the table `[nri]`.
async fn node_with(nri: &str) -> Result<(Node, String)> {
    let mut node = Node::builder().nri_config(nri).start().await?;
    let image = node.busybox().await?;
    Ok((node, image))
}

async fn start() -> Result<(Node, String)> {
    node_with("").await
}

fn cgroup(node: &Node, container: &Container, v1: &str, v2: &str) -> Result<String> {
    let dirs = node.ground().cgroups();
    for dir in dirs.iter().filter(|dir| dir.to_string_lossy().contains(&container.id)) {
        for name in [v1, v2] {
            if let Ok(text) = fs::read_to_string(dir.join(name)) {
                return Ok(text.trim().into());
            }
        }
    }
    anyhow::bail!("neither {v1} nor {v2} of {}", container.id)
}

/// The CPU period and quota of a container, once they are `wanted`.
async fn has_quota(node: &Node, container: &Container, wanted: &str) -> Result<()> {
    eventually(Duration::from_secs(20), "a quota to be set", async || {
        let seen = cgroup(node, container, "cpu.cfs_quota_us", "cpu.max")?;
        Ok(Look::when(seen.split_whitespace().next() == Some(wanted), || seen.clone()))
    })
    .await
}

fn quota(container: &str, quota: i64) -> Value {
    json!({
        "container_id": container,
        "linux": {"resources": {"cpu": {"quota": {"value": quota}, "period": {"value": 100_000}}}},
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_gets_what_plugins_make_of_it() -> Result<()> {
    let (node, image) = start().await?;
    let extra = tempfile::tempdir()?;
    fs::write(extra.path().join("file"), "from the plugin")?;
    let hooked = extra.path().join("hooked");
    let adjust = json!({"adjust": {
        "annotations": {"by.plugin": "yes", "-drop.me": ""},
        "mounts": [{"destination": "/extra", "type": "bind", "source": extra.path(),
                    "options": ["rbind", "ro"]}],
        "env": [{"key": "ADDED", "value": "a=b"}, {"key": "-GONE", "value": ""},
                {"key": "KEPT", "value": "changed"}],
        "hooks": {"create_runtime": [{"path": "/bin/sh",
            "args": ["sh", "-c", format!("cat > /dev/null; echo ran > {}", hooked.display())]}]},
        "rlimits": [{"type": "nofile", "hard": 77, "soft": 66}],
        "linux": {
            "devices": [{"path": "/dev/mine", "type": "c", "major": 1, "minor": 3,
                         "file_mode": {"value": 0o666}}],
            "resources": {
                "memory": {"limit": {"value": 64 << 20}},
                "cpu": {"shares": {"value": 321}, "quota": {"value": 30_000},
                        "period": {"value": 100_000}},
                "pids": {"limit": 55},
            },
            "oom_score_adj": {"value": 444},
        },
    }});
    let first =
        plugin(&node, "10", "first", &answers("CreateContainer", json!({"answer": adjust})))
            .await?;
    let second = json!({"adjust": {"env": [{"key": "-ADDED", "value": ""},
                                           {"key": "ADDED", "value": "by the second"}]}});
    let second =
        plugin(&node, "20", "second", &answers("CreateContainer", json!({"answer": second})))
            .await?;

    let pod = node.pod("a").run().await?;
    let script = "echo added=$ADDED gone=$GONE kept=$KEPT; cat /extra/file; echo; \
                  ulimit -n; cat /proc/self/oom_score_adj; echo x > /dev/mine && echo null; \
                  touch /extra/x 2>/dev/null || echo read-only; sleep 1000";
    let container = pod
        .container(&image)
        .env("GONE", "1")
        .env("KEPT", "1")
        .config(|config| drop(config.annotations.insert("drop.me".into(), "1".into())))
        .sh(script)
        .start()
        .await?;
    container.wait_for_log("read-only").await?;
    let log = container.log()?;
    let text = holdfast_integration::log::texts(&log, "stdout").join("\n");
    ensure!(
        text == "added=by the second gone= kept=changed\nfrom the plugin\n66\n444\nnull\nread-only",
        "{text}"
    );
    ensure!(fs::read_to_string(&hooked)?.trim() == "ran");
    ensure!(cgroup(&node, &container, "memory.limit_in_bytes", "memory.max")? == "67108864");
    ensure!(cgroup(&node, &container, "pids.max", "pids.max")? == "55");
    has_quota(&node, &container, "30000").await?;

    // The second one saw what the first one did.
    let seen = second.wait_for("CreateContainer", |_| true).await?;
    let env = seen["request"]["container"]["env"].to_string();
    ensure!(env.contains("ADDED=a=b") && !env.contains("GONE"), "{env}");
    // What is told of the container is what it has.
    let told = container.status().await?.resources.unwrap_or_default().linux.unwrap_or_default();
    ensure!((told.cpu_shares, told.memory_limit_in_bytes) == (321, 64 << 20), "{told:?}");
    let info = node.cli(&["inspect", &container.id])?;
    ensure!(info.contains("by.plugin"), "{info}");

    // An update that says nothing of CPU keeps what the plugin has set of it.
    let request = cri::UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: 128 << 20,
            ..Default::default()
        }),
        ..Default::default()
    };
    node.cri().runtime().update_container_resources(request).await?;
    ensure!(cgroup(&node, &container, "memory.limit_in_bytes", "memory.max")? == "134217728");
    has_quota(&node, &container, "30000").await?;

    let info = node.cli(&["info"])?;
    ensure!(info.contains("10-first, 20-second"), "{info}");
    drop((first, second));
    node.finish().await
}

/// Takes the plugins away that the daemon starts: they are processes of the node.
async fn without_programs(node: &mut Node) -> Result<()> {
    node.terminate()?;
    fs::remove_dir_all(node.path().join("nri/plugins"))?;
    node.restart().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn plugins_are_told_everything_in_order() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut node = Node::builder().start().await?;
    let image = node.busybox().await?;
    // One that is started with the daemon, one that knows only the oldest calls.
    node.terminate()?;
    let (programs, conf) = (node.path().join("nri/plugins"), node.path().join("nri/conf.d"));
    fs::create_dir_all(&programs)?;
    fs::create_dir_all(&conf)?;
    std::os::unix::fs::symlink(PROGRAM, programs.join("05-started"))?;
    let started = TestPlugin::prepare(&dir.path().join("started"), &json!({}))?;
    fs::write(conf.join("started.conf"), started.dir().display().to_string())?;
    node.restart().await?;
    started.wait_for("Synchronize", |_| true).await?;
    let configured = started.wait_for("Configure", |_| true).await?;
    ensure!(configured["request"]["runtime_name"] == "holdfast", "{configured}");
    ensure!(configured["request"]["request_timeout"] == "2000", "{configured}");
    let old = json!({"unknown": ["RunPodSandbox", "StartContainer", "PostStartContainer",
        "PostCreateContainer", "StopPodSandbox", "RemovePodSandbox", "RemoveContainer"]});
    let old = plugin(&node, "90", "old", &old).await?;

    let pod = node.pod("a").label("l", "1").run().await?;
    let container = pod.container(&image).sh("exit 3").start().await?;
    container.wait().await?;
    let request = cri::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.id.clone(),
        resources: Some(cri::LinuxContainerResources { cpu_shares: 9, ..Default::default() }),
        ..Default::default()
    };
    node.cri().runtime().update_pod_sandbox_resources(request).await?;
    let running = pod.container(&image).name("second").sh("sleep 1000").start().await?;
    let request = cri::UpdateContainerResourcesRequest {
        container_id: running.id.clone(),
        linux: Some(cri::LinuxContainerResources { cpu_shares: 99, ..Default::default() }),
        ..Default::default()
    };
    node.cri().runtime().update_container_resources(request).await?;
    started.wait_for("PostUpdateContainer", |_| true).await?;
    started.wait_for("StopContainer", |line| line["container"] == "main").await?;
    container.remove().await?;
    pod.stop().await?;
    pod.stop().await?;
    pod.remove().await?;

    let life = |update: bool| {
        let mut life = vec!["CreateContainer", "ValidateContainerAdjustment"];
        life.extend(["PostCreateContainer", "StartContainer", "PostStartContainer"]);
        if update {
            life.extend(["UpdateContainer", "PostUpdateContainer"]);
        }
        life.extend(["StopContainer", "RemoveContainer"]);
        life
    };
    let sorted = |mut seen: Vec<String>| {
        // A container that ends at once has ended before it is known to run.
        if let [.., stop, post, _] = &mut seen[..]
            && stop == "StopContainer"
            && post == "PostStartContainer"
        {
            std::mem::swap(stop, post);
        }
        seen
    };
    ensure!(
        sorted(started.of_container("main")) == life(false),
        "{:?}",
        started.of_container("main")
    );
    ensure!(started.of_container("second") == life(true), "{:?}", started.of_container("second"));
    let pod_life = [
        "RunPodSandbox",
        "UpdatePodSandbox",
        "PostUpdatePodSandbox",
        "StopPodSandbox",
        "RemovePodSandbox",
    ];
    ensure!(started.of_pod("a") == pod_life, "{:?}", started.of_pod("a"));
    let ran = started.wait_for("RunPodSandbox", |_| true).await?;
    let told = &ran["request"]["pod"];
    ensure!(told["namespace"] == "test" && told["labels"]["l"] == "1", "{told}");
    ensure!(told["ips"].as_array().is_some_and(|ips| ips.len() == 1), "{told}");
    ensure!(told["linux"]["namespaces"].to_string().contains("network"), "{told}");
    let stopped = started.wait_for("StopContainer", |line| line["container"] == "main").await?;
    let told = &stopped["request"]["container"];
    ensure!(told["exit_code"] == 3 && told["state"] == "CONTAINER_STOPPED", "{told}");
    ensure!(told["args"] == json!(["/bin/sh", "-c", "exit 3"]), "{told}");
    // The old one is told by its own call, and only once by the new one.
    let of_second = old.of_container("second");
    ensure!(of_second.iter().filter(|m| *m == "StateChange").count() == 4, "{of_second:?}");
    ensure!(of_second.iter().filter(|m| *m == "PostStartContainer").count() == 0, "{of_second:?}");

    let info = node.cli(&["info", "-o", "json"])?;
    ensure!(info.contains("05-started"), "{info}");
    drop(old);
    without_programs(&mut node).await?;
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_two_plugins_want_alike_is_refused_and_leaves_nothing() -> Result<()> {
    let (node, image) = start().await?;
    let env = |key: &str| {
        let adjust = json!({"env": [{"key": key, "value": "1"}]});
        answers("CreateContainer", json!({"answer": {"adjust": adjust}}))
    };
    let first = plugin(&node, "10", "first", &env("SAME")).await?;
    let second = plugin(&node, "20", "second", &env("SAME")).await?;
    let pod = node.pod("a").host_network().run().await?;
    let before = node.inventory();
    let error = pod.container(&image).sh("true").create().await.err().context("made")?;
    ensure!(error.code() == Code::FailedPrecondition, "{error}");
    for word in ["10-first", "20-second", "Env \"SAME\""] {
        ensure!(error.message().contains(word), "{error}");
    }
    node.nothing_left_since(&before).await?;
    // They are told that there will be no such container.
    for plugin in [&first, &second] {
        let told = plugin.of_container("main");
        ensure!(told == ["CreateContainer", "StopContainer", "RemoveContainer"], "{told:?}");
    }
    for (script, words) in [
        (json!({"adjust": {"mounts": [{"destination": "x"}]}}), "not an absolute path"),
        (json!({"adjust": {"rlimits": [{"type": "bananas"}]}}), "not an OCI spec"),
        (json!({"adjust": {"linux": {"memory_policy": {"mode": "MPOL_LOCAL"}}}}), "version 1.3"),
        (json!({"adjust": {"CDI_devices": [{"name": "no.such/device=1"}]}}), "no.such/device=1"),
    ] {
        first.script(&answers("CreateContainer", json!({"answer": script})))?;
        let error = pod.container(&image).sh("true").create().await.err().context("made")?;
        ensure!(error.code() == Code::FailedPrecondition, "{error}");
        ensure!(error.message().contains(words), "{error} does not say {words}");
        node.nothing_left_since(&before).await?;
    }
    first.script(&env("OTHER"))?;
    let text = pod.container(&image).sh("echo $SAME$OTHER").output().await?;
    ensure!(text == "11", "{text}");
    drop((first, second));
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn others_are_updated_and_evicted() -> Result<()> {
    let (node, image) = start().await?;
    let mut plugin = plugin(&node, "10", "policy", &json!({})).await?;
    let pod = node.pod("a").host_network().run().await?;
    let one = pod.container(&image).name("one").sh("sleep 1000").start().await?;
    let two = pod.container(&image).name("two").sh("sleep 1000").start().await?;

    // While another one is made.
    plugin.script(&json!({"answers": {
        "CreateContainer": [{"container": "three", "answer": {"update": [quota(&one.id, 20_000)]}}],
        "StopContainer": [{"container": "three", "answer": {"update": [quota(&one.id, 40_000)]}}],
        "UpdateContainer": [{"container": "two", "answer":
            {"update": [quota(&two.id, 11_000), quota(&one.id, 50_000)]}}],
    }}))?;
    let other = node.pod("b").host_network().run().await?;
    let three = other.container(&image).name("three").sh("sleep 1000").start().await?;
    has_quota(&node, &one, "20000").await?;
    three.stop(0).await?;
    has_quota(&node, &one, "40000").await?;
    // What the kubelet wants is the plugin's to change.
    let request = cri::UpdateContainerResourcesRequest {
        container_id: two.id.clone(),
        linux: Some(cri::LinuxContainerResources {
            cpu_quota: 90_000,
            cpu_period: 100_000,
            ..Default::default()
        }),
        ..Default::default()
    };
    node.cri().runtime().update_container_resources(request).await?;
    has_quota(&node, &two, "11000").await?;
    has_quota(&node, &one, "50000").await?;
    // The kernel has it before the runtime has ended, and the record follows that.
    eventually(Duration::from_secs(20), "the quota to be on record", async || {
        let told = one.status().await?.resources.unwrap_or_default().linux.unwrap_or_default();
        Ok(Look::when(told.cpu_quota == 50_000, || format!("{told:?}")))
    })
    .await?;

    // Out of turn; what cannot be done is told.
    let failed = plugin
        .update(&json!({"update": [quota(&one.id, 60_000), quota("nobody", 1000),
                                   quota(&three.id, 1000)]}))
        .await?;
    let failed: Vec<_> = failed["failed"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|u| u["container_id"].clone())
        .collect();
    ensure!(failed == [json!("nobody"), json!(three.id)], "{failed:?}");
    has_quota(&node, &one, "60000").await?;

    plugin.script(&json!({"answers": {"CreateContainer": [
        {"container": "four", "answer": {"evict": [{"container_id": two.id, "reason": "room"}]}}]}}))?;
    other.container(&image).name("four").sh("true").create().await?;
    // It is gone before the other one is there.
    ensure!(two.status().await?.state() == cri::ContainerState::ContainerExited);
    plugin.update(&json!({"evict": [{"container_id": one.id, "reason": "room"}]})).await?;
    ensure!(one.status().await?.state() == cri::ContainerState::ContainerExited);
    ensure!(one.status().await?.exit_code == 137);
    drop(plugin);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_hangs_costs_its_time_once() -> Result<()> {
    let (node, image) =
        node_with("request_timeout = \"20s\"\nplugin_timeouts = [\"slow=1s\"]").await?;
    let slow = plugin(&node, "10", "slow", &json!({})).await?;
    let other = plugin(&node, "20", "other", &json!({})).await?;
    let pod = node.pod("a").host_network().run().await?;
    slow.script(&answers("CreateContainer", json!({"hang": true})))?;
    let began = Instant::now();
    let makings = (0..4).map(|n| {
        let container = pod.container(&image).name(&format!("c{n}")).sh("sleep 1000");
        async move { container.create().await }
    });
    let lists = async {
        slow.wait_for("CreateContainer", |_| true).await?;
        // Nothing that only looks waits for it.
        let list = Instant::now();
        node.containers().await?;
        node.pods().await?;
        node.status(true).await?;
        ensure!(list.elapsed() < Duration::from_millis(700), "{:?}", list.elapsed());
        Ok(())
    };
    let (made, lists) = tokio::join!(futures::future::join_all(makings), lists);
    lists?;
    for made in made {
        made?;
    }
    ensure!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
    // The one that hung was asked once, and is not there any more; the other one was asked for all.
    let asked = |of: &TestPlugin| {
        of.events().iter().filter(|line| line["method"] == "CreateContainer").count()
    };
    ensure!((asked(&slow), asked(&other)) == (1, 4), "{} {}", asked(&slow), asked(&other));
    let info = node.cli(&["info"])?;
    ensure!(info.contains("20-other") && !info.contains("10-slow"), "{info}");
    drop((slow, other));
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_dies_is_dropped_unless_it_is_required() -> Result<()> {
    let (node, image) = start().await?;
    let mut dying =
        plugin(&node, "10", "dying", &answers("CreateContainer", json!({"die": true}))).await?;
    let other = plugin(&node, "20", "other", &json!({})).await?;
    let required = |pod: &str, annotation: &str| {
        node.pod(pod).host_network().config(|config| {
            config.annotations.insert(annotation.into(), "[\"dying\"]".into());
        })
    };
    let strict = required("strict", "required-plugins.noderesource.dev").run().await?;
    let before = node.inventory();
    // It dies of being asked: then it is not there.
    let error = strict.container(&image).sh("true").create().await.err().context("made")?;
    ensure!(error.code() == Code::Unavailable, "{error}");
    ensure!(error.message().contains("required NRI plugin \"dying\" is not there"), "{error}");
    dying.ended().await?;
    node.nothing_left_since(&before).await?;
    let lax = node.pod("lax").host_network().run().await?;
    lax.container(&image).sh("true").create().await?;
    ensure!(other.of_container("main").iter().any(|method| method == "PostCreateContainer"));
    // It comes again, and all is well.
    let back = plugin(&node, "11", "dying", &json!({})).await?;
    strict.container(&image).name("again").sh("true").create().await?;
    drop((dying, back, other));
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_required_plugin_nothing_is_made() -> Result<()> {
    let (node, image) = node_with(
        "[nri.validator]\nrequired_plugins = [\"guard\"]\n\
         tolerate_missing_plugins_annotation = \"do.without\"\nreject_oci_hook_adjustment = true",
    )
    .await?;
    let pod = node.pod("a").host_network().run().await?;
    let error = pod.container(&image).sh("true").create().await.err().context("made")?;
    ensure!(error.message().contains("nri.validator.required_plugins"), "{error}");
    let without = node
        .pod("b")
        .host_network()
        .config(|config| drop(config.annotations.insert("do.without".into(), "true".into())))
        .run()
        .await?;
    without.container(&image).sh("true").create().await?;
    let guard = plugin(&node, "10", "guard", &json!({})).await?;
    pod.container(&image).sh("true").create().await?;
    let hooks = json!({"hooks": {"poststop": [{"path": "/bin/true"}]}});
    guard.script(&answers("CreateContainer", json!({"answer": {"adjust": hooks}})))?;
    let error = pod.container(&image).name("b").sh("true").create().await.err().context("made")?;
    ensure!(error.message().contains("\"10-guard\" may not adjust OCI hooks"), "{error}");
    // A plugin's own verdict.
    guard.script(&answers(
        "ValidateContainerAdjustment",
        json!({"answer": {"reject": true, "reason": "not today"}}),
    ))?;
    let error = pod.container(&image).name("b").sh("true").create().await.err().context("made")?;
    ensure!(
        error.message().contains("10-guard") && error.message().contains("not today"),
        "{error}"
    );
    drop(guard);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_plugin_refuses_is_not_done() -> Result<()> {
    let (node, image) = start().await?;
    let plugin = plugin(&node, "10", "no", &json!({})).await?;
    let refuse = |method: &str| answers(method, json!({"error": "not on my node"}));
    let before = node.inventory();
    plugin.script(&refuse("RunPodSandbox"))?;
    let error = node.pod("a").run().await.err().context("run")?;
    for word in ["10-no", "RunPodSandbox", "not on my node"] {
        ensure!(error.message().contains(word), "{error}");
    }
    ensure!(node.pods().await?.is_empty());
    node.nothing_left_since(&before).await?;
    ensure!(plugin.of_pod("a") == ["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"]);
    plugin.script(&json!({}))?;
    let pod = node.pod("a").run().await?;
    plugin.script(&refuse("CreateContainer"))?;
    let error = pod.container(&image).sh("true").create().await.err().context("made")?;
    ensure!(error.message().contains("not on my node"), "{error}");
    plugin.script(&refuse("StartContainer"))?;
    let container = pod.container(&image).sh("true").create().await?;
    let error = container.start().await.err().context("started")?;
    ensure!(error.message().contains("not on my node"), "{error}");
    let status = container.status().await?;
    ensure!(status.state() == cri::ContainerState::ContainerExited, "{status:?}");
    ensure!(status.message.contains("not on my node"), "{status:?}");
    // Ends are not for plugins to refuse.
    plugin.script(&json!({"answers": {
        "StopContainer": [{"error": "no"}], "RemoveContainer": [{"error": "no"}],
        "StopPodSandbox": [{"error": "no"}], "RemovePodSandbox": [{"error": "no"}],
        "PostCreateContainer": [{"error": "no"}],
    }}))?;
    let container = pod.container(&image).name("b").sh("sleep 1000").start().await?;
    container.stop(0).await?;
    container.remove().await?;
    drop(plugin);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_joins_late_is_told_of_each_container_once() -> Result<()> {
    let (node, image) = start().await?;
    let pod = node.pod("a").host_network().run().await?;
    let made = tokio::sync::Mutex::new(Vec::new());
    let makings = async {
        for round in 0..6 {
            let four = (0..4).map(|n| {
                let container =
                    pod.container(&image).name(&format!("c{round}-{n}")).sh("sleep 1000");
                async { container.create().await }
            });
            for container in futures::future::try_join_all(four).await? {
                made.lock().await.push(container.id);
            }
        }
        Ok::<_, anyhow::Error>(())
    };
    // Each takes its time to take in what there is, while more is made.
    let script = answers("Synchronize", json!({"sleep": 150}));
    let joinings = async {
        let mut plugins = Vec::new();
        for n in 0..5 {
            plugins.push(plugin(&node, "10", &format!("late{n}"), &script).await?);
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
        Ok::<_, anyhow::Error>(plugins)
    };
    let (makings, joinings) = tokio::join!(makings, joinings);
    makings?;
    let plugins = joinings?;
    let made = made.into_inner();
    ensure!(made.len() == 24);
    for plugin in &plugins {
        let mut told: BTreeMap<String, u32> = BTreeMap::new();
        for line in plugin.events() {
            let synchronised = line["request"]["containers"].as_array().into_iter().flatten();
            let created =
                (line["method"] == "CreateContainer").then(|| &line["request"]["container"]);
            for container in synchronised.chain(created) {
                let id = container["id"].as_str().context("no id")?;
                *told.entry(id.to_owned()).or_default() += 1;
                // Whole, also of one that was being made.
                ensure!(container["args"] == json!(["/bin/sh", "-c", "sleep 1000"]), "{container}");
            }
        }
        for id in &made {
            ensure!(told.get(id) == Some(&1), "{id} {:?} of {told:?}", told.get(id));
        }
    }
    drop(plugins);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_node_is_told_in_pieces() -> Result<()> {
    let (node, _) = start().await?;
    let large = "x".repeat(200 << 10);
    for n in 0..25 {
        node.pod(&format!("p{n}"))
            .host_network()
            .config(|config| drop(config.annotations.insert("large".into(), large.clone())))
            .run()
            .await?;
    }
    let plugin = plugin(&node, "10", "reader", &json!({})).await?;
    let lines: Vec<_> =
        plugin.events().into_iter().filter(|line| line["method"] == "Synchronize").collect();
    ensure!(lines.len() == 2, "{} messages", lines.len());
    let pods: usize =
        lines.iter().map(|l| l["request"]["pods"].as_array().map_or(0, Vec::len)).sum();
    ensure!(pods == 25, "{pods} pods");
    drop(plugin);
    node.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_no_plugin_harms_nobody() -> Result<()> {
    let (node, image) = node_with("registration_timeout = \"300ms\"").await?;
    let socket = node.path().join("nri.sock");
    let dir = node.path().join("plugins/silent");
    let who = ("10", "silent");
    let program = Path::new(PROGRAM);
    let mut silent = TestPlugin::launch(program, &socket, &dir, who, &json!({"silent": true}))?;
    silent.ended().await.context("it is not closed")?;
    for (index, name) in [("1", "a"), ("ab", "a"), ("10", "a/b"), ("10", "")] {
        let dir = node.path().join("plugins/bad");
        let mut bad = TestPlugin::launch(program, &socket, &dir, (index, name), &json!({}))?;
        bad.ended().await.with_context(|| format!("{index}-{name} is taken"))?;
        ensure!(bad.events().is_empty());
    }
    use std::io::{Read as _, Write as _};
    let mut noise = std::os::unix::net::UnixStream::connect(&socket)?;
    noise.write_all(&[0xff; 4096])?;
    noise.set_read_timeout(Some(Duration::from_secs(10)))?;
    ensure!(noise.read(&mut [0; 16]).unwrap_or(0) == 0, "noise is answered");
    let good = plugin(&node, "10", "good", &json!({})).await?;
    let pod = node.pod("a").host_network().run().await?;
    pod.container(&image).sh("true").create().await?;
    ensure!(good.of_container("main").first().is_some_and(|m| m == "CreateContainer"));
    drop((silent, good));
    node.finish().await
}

/// The processes of the plugins that are there.
async fn pids(node: &Node) -> Result<Vec<u64>> {
    let status = node.status(true).await?;
    let nri: Value = serde_json::from_str(&status.info["nri"])?;
    let plugins = nri["plugins"].as_array().into_iter().flatten();
    Ok(plugins.filter_map(|plugin| plugin["pid"].as_u64()).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_ends_the_plugins_that_the_daemon_started() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (mut node, image) = start().await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh("sleep 1000").start().await?;
    node.terminate()?;
    let (programs, conf) = (node.path().join("nri/plugins"), node.path().join("nri/conf.d"));
    fs::create_dir_all(&programs)?;
    fs::create_dir_all(&conf)?;
    std::os::unix::fs::symlink(PROGRAM, programs.join("05-started"))?;
    fs::write(programs.join("10-broken"), "#!/no/such/interpreter\n")?;
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(programs.join("10-broken"), fs::Permissions::from_mode(0o755))?;
    let started = TestPlugin::prepare(&dir.path().join("started"), &json!({}))?;
    fs::write(conf.join("05-started.conf"), started.dir().display().to_string())?;
    node.restart().await?;
    let sync = started.wait_for("Synchronize", |_| true).await?;
    ensure!(sync["request"]["containers"][0]["id"] == container.id, "{sync}");
    ensure!(sync["request"]["containers"][0]["state"] == "CONTAINER_RUNNING", "{sync}");
    let first = pids(&node).await?;
    ensure!(first.len() == 1, "{first:?}");
    // Killed, or told to end: its plugins are gone with it.
    node.kill9()?;
    let gone = async |pid: u64| {
        eventually(Duration::from_secs(10), "the plugin to end", async || {
            let alive = Path::new(&format!("/proc/{pid}")).exists();
            Ok(Look::when(!alive, || "it lives".into()))
        })
        .await
    };
    gone(first[0]).await?;
    node.restart().await?;
    let second = eventually(Duration::from_secs(10), "the plugin to be back", async || {
        let now = pids(&node).await?;
        Ok(if now.len() == 1 { Look::Done(now[0]) } else { Look::Not(format!("{now:?}")) })
    })
    .await?;
    node.terminate()?;
    gone(second).await?;
    started.wait_for("Shutdown", |_| true).await?;
    fs::remove_dir_all(&programs)?;
    node.restart().await?;
    ensure!(container.status().await?.state() == cri::ContainerState::ContainerRunning);
    node.finish().await
}

//! Devices, limits and classes: what the node's files, the security context and updates make of a
//! container, and how a container that cannot be started is told of. With runc and with crun.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{
    Container, Image, Node, Pod, ground::cgroup_mounts, node, with_each_runtime,
};
use holdfast_protos::cri;
use tonic::Code;

with_each_runtime! {
    cdi_devices_bring_what_their_files_say
    devices_belong_to_the_security_context_if_configured
    a_handler_may_keep_devices_from_privileged_containers
    an_update_is_told_as_the_kernel_has_it
    an_update_that_cannot_be_is_refused_and_changes_nothing
    swap_and_processes_are_limited
    what_the_host_lacks_is_named
    a_pods_resources_are_kept
    block_io_classes_are_limits
    a_container_that_cannot_start_says_why
}

/// A file of the container's cgroup, by its name on version 1 or on version 2.
fn cgroup(node: &Node, container: &Container, v1: &str, v2: &str) -> Result<String> {
    let dirs = node.ground().cgroups();
    let dirs = dirs.iter().filter(|dir| dir.to_string_lossy().contains(&container.id));
    for dir in dirs {
        for name in [v1, v2] {
            if let Ok(text) = fs::read_to_string(dir.join(name)) {
                return Ok(text.trim().into());
            }
        }
    }
    anyhow::bail!("neither {v1} nor {v2} of {}", container.id)
}

/// The file systems' controllers are on version 1.
fn version_1() -> bool {
    cgroup_mounts().iter().any(|mount| mount.ends_with("memory"))
}

async fn update(
    node: &Node,
    container: &Container,
    change: impl FnOnce(&mut cri::LinuxContainerResources),
) -> Result<(), tonic::Status> {
    let mut linux = cri::LinuxContainerResources::default();
    change(&mut linux);
    let request = cri::UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(linux),
        ..Default::default()
    };
    node.cri().runtime().update_container_resources(request).await.map(drop)
}

async fn told(container: &Container) -> Result<cri::LinuxContainerResources> {
    Ok(container.status().await?.resources.unwrap_or_default().linux.unwrap_or_default())
}

/// The error of a container that is not to be made, which must name all of `words`.
async fn refused(
    pod: &Pod,
    image: &str,
    code: Code,
    words: &[&str],
    change: impl FnOnce(&mut cri::ContainerConfig),
) -> Result<()> {
    let container = pod.container(image).name("refused").sh("true").config(change);
    let error = match container.create().await {
        Ok(_) => anyhow::bail!("made, though it should be refused for {words:?}"),
        Err(error) => error,
    };
    ensure!(error.code() == code, "{error}");
    for word in words {
        ensure!(error.message().contains(word), "{error} does not name {word}");
    }
    Ok(())
}

async fn cdi_devices_bring_what_their_files_say(runtime: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let specs = dir.path().join("specs");
    let mut node = Node::builder()
        .default_runtime(runtime)
        .runtime_config(&format!("cdi_spec_dirs = [\"/no/such/dir\", {specs:?}]"))
        .start()
        .await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let device = |name: &'static str| {
        move |c: &mut cri::ContainerConfig| {
            c.cdi_devices = vec![cri::CdiDevice { name: name.into() }];
        }
    };
    let dirs = specs.display().to_string();
    let words = ["test.io/gpu=0", "/no/such/dir", &dirs];
    refused(&pod, &image, Code::FailedPrecondition, &words, device("test.io/gpu=0")).await?;
    refused(&pod, &image, Code::InvalidArgument, &["test.io=0"], device("test.io=0")).await?;

    // Installed while the daemon runs.
    fs::create_dir(&specs)?;
    let hook = dir.path().join("hook-ran");
    let spec = serde_json::json!({
        "cdiVersion": "0.7.0",
        "kind": "test.io/gpu",
        "containerEdits": {
            "env": ["DRIVER=7"],
            "hooks": [{
                "hookName": "createRuntime",
                "path": "/bin/sh",
                "args": ["sh", "-c", format!("cat >/dev/null; touch {}", hook.display())],
            }],
        },
        "devices": [
            {"name": "0", "containerEdits": {
                "env": ["GPU=0"],
                "deviceNodes": [{"path": "/dev/gpu0", "hostPath": "/dev/zero", "permissions": "r"}],
                "mounts": [{"hostPath": dir.path(), "containerPath": "/opt/gpu", "options": ["ro", "nosuid", "bind"]}],
                "additionalGids": [4711],
            }},
            {"name": "1", "containerEdits": {
                "deviceNodes": [{"path": "/dev/gpu1", "type": "c", "major": 1, "minor": 7, "fileMode": 432, "uid": 5, "gid": 6}],
            }},
        ],
    });
    fs::write(specs.join("gpu.json"), spec.to_string())?;
    let container = pod
        .container(&image)
        .sh("sleep 100")
        .config(device("test.io/gpu=0"))
        .config(|c| drop(c.annotations.insert("cdi.k8s.io/plugin".into(), "test.io/gpu=1".into())))
        .security(|s| {
            s.run_as_user = Some(cri::Int64Value { value: 1000 });
            s.run_as_group = Some(cri::Int64Value { value: 1001 });
        })
        .start()
        .await?;
    let script = "echo $DRIVER $GPU; id -G; stat -c '%a %u:%g %t:%T' /dev/gpu0 /dev/gpu1; \
                  head -c 2 /dev/gpu0 | od -An -tx1; ls /opt/gpu; touch /opt/gpu/x || echo read-only";
    let text = container.sh(&format!("({script}) 2>/dev/null")).await?;
    let expected =
        "7 0\n1001 3000 4711\n666 1000:1001 1:5\n660 5:6 1:7\n 00 00\nhook-ran\nspecs\nread-only";
    assert_eq!(text.trim(), expected);
    ensure!(hook.exists(), "the hook did not run");

    // A file that is broken later takes its devices away, and the error says so.
    fs::write(specs.join("gpu.json"), "{")?;
    let words = ["test.io/gpu=0", "gpu.json"];
    refused(&pod, &image, Code::FailedPrecondition, &words, device("test.io/gpu=0")).await?;
    node.finish().await
}

fn zero_as(path: &str) -> cri::Device {
    cri::Device {
        host_path: "/dev/zero".into(),
        container_path: path.into(),
        permissions: "rw".into(),
    }
}

async fn devices_belong_to_the_security_context_if_configured(runtime: &str) -> Result<()> {
    for (lines, owner) in
        [("", "0:0"), ("device_ownership_from_security_context = true", "1000:1001")]
    {
        let mut node =
            Node::builder().default_runtime(runtime).runtime_config(lines).start().await?;
        let image = node.busybox().await?;
        let pod = node.pod("a").host_network().run().await?;
        let text = pod
            .container(&image)
            .sh("stat -c %u:%g /dev/own")
            .config(|c| c.devices.push(zero_as("/dev/own")))
            .security(|s| {
                s.run_as_user = Some(cri::Int64Value { value: 1000 });
                s.run_as_group = Some(cri::Int64Value { value: 1001 });
            })
            .output()
            .await?;
        assert_eq!(text, owner);
        node.finish().await?;
    }
    Ok(())
}

async fn a_handler_may_keep_devices_from_privileged_containers(runtime: &str) -> Result<()> {
    let bare = format!(
        "[runtime.handlers.bare]\npath = {runtime:?}\nprivileged_without_host_devices = true\n"
    );
    let mut node = Node::builder().default_runtime(runtime).config(&bare).start().await?;
    let image = node.busybox().await?;
    let has_kmsg = async |handler: &str| {
        let pod = node.pod(&format!("pod-{handler}")).host_network().privileged();
        let pod = pod.runtime(handler).run().await?;
        let script = "test -e /dev/kmsg && echo yes || echo no; test -c /dev/own && echo own; \
                      mknod /tmp/kmsg c 1 11 && head -c 1 /tmp/kmsg >/dev/null && echo opened";
        let container = pod.container(&image).sh(&format!("({script}) 2>/dev/null; true"));
        let container = container.security(|s| s.privileged = true);
        container.config(|c| c.devices.push(zero_as("/dev/own"))).output().await
    };
    ensure!(Path::new("/dev/kmsg").exists());
    assert_eq!(has_kmsg(runtime).await?, "yes\nown\nopened");
    assert_eq!(has_kmsg("bare").await?, "no\nown");
    node.finish().await
}

async fn an_update_is_told_as_the_kernel_has_it(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod
        .container(&image)
        .sh("sleep 100")
        .resources(|r| {
            r.memory_limit_in_bytes = 64 << 20;
            r.memory_swap_limit_in_bytes = 64 << 20;
            r.cpu_shares = 512;
            r.cpu_quota = 50_000;
            r.cpu_period = 100_000;
        })
        .start()
        .await?;
    let limits = || -> Result<(i64, i64)> {
        let memory = cgroup(&node, &container, "memory.limit_in_bytes", "memory.max")?.parse()?;
        let swap = match version_1() {
            true => cgroup(&node, &container, "memory.memsw.limit_in_bytes", "")?.parse()?,
            false => memory + cgroup(&node, &container, "", "memory.swap.max")?.parse::<i64>()?,
        };
        Ok((memory, swap))
    };
    // Up past the limit of memory and swap, then down again: version 1 wants another order each way.
    for wanted in [200_000_001, 48 << 20] {
        update(&node, &container, |r| r.memory_limit_in_bytes = wanted).await?;
        let (memory, swap) = limits()?;
        ensure!(memory == wanted / 4096 * 4096, "{memory} of {wanted}");
        assert_eq!(swap, memory, "it had no swap, so it has none");
        let told = told(&container).await?;
        assert_eq!((told.memory_limit_in_bytes, told.memory_swap_limit_in_bytes), (memory, swap));
        assert_eq!((told.cpu_shares, told.cpu_quota, told.cpu_period), (512, 50_000, 100_000));
    }
    update(&node, &container, |r| {
        r.memory_limit_in_bytes = 96 << 20;
        r.memory_swap_limit_in_bytes = 128 << 20;
        r.cpu_quota = -1;
        r.cpu_shares = 1;
        r.cpuset_cpus = "0".into();
    })
    .await?;
    assert_eq!(limits()?, (96 << 20, 128 << 20));
    let seen = told(&container).await?;
    assert_eq!((seen.memory_limit_in_bytes, seen.memory_swap_limit_in_bytes), limits()?);
    assert_eq!((seen.cpu_shares, seen.cpu_quota), (2, -1), "the least that there is; no limit");
    assert_eq!(seen.cpuset_cpus, "0");
    node.finish().await
}

async fn an_update_that_cannot_be_is_refused_and_changes_nothing(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod
        .container(&image)
        .sh("sleep 100")
        .resources(|r| {
            r.memory_limit_in_bytes = 64 << 20;
            r.memory_swap_limit_in_bytes = 96 << 20;
        })
        .start()
        .await?;
    let before = told(&container).await?;
    type Change = fn(&mut cri::LinuxContainerResources);
    let cases: [(Code, &str, Change); 5] = [
        (Code::InvalidArgument, "memory_swap_limit_in_bytes", |r| {
            r.memory_limit_in_bytes = 128 << 20
        }),
        (Code::InvalidArgument, "cpu_quota", |r| r.cpu_quota = -2),
        (Code::InvalidArgument, "cpuset_cpus", |r| r.cpuset_cpus = "x".into()),
        (Code::InvalidArgument, "cpu_shares", |r| r.cpu_shares = -1),
        (Code::FailedPrecondition, "cpuset.cpus", |r| r.cpuset_cpus = "4000".into()),
    ];
    for (code, word, change) in cases {
        let error = update(&node, &container, change).await.unwrap_err();
        ensure!(error.code() == code && error.message().contains(word), "{error}");
        assert_eq!(told(&container).await?, before, "{word}");
    }
    assert_eq!(cgroup(&node, &container, "memory.limit_in_bytes", "memory.max")?, "67108864");
    if version_1() {
        // Without swap to go to, what is in a tmpfs cannot be taken back. (On v2 the kernel kills.)
        container.sh("head -c 40000000 /dev/zero >/dev/shm/full").await?;
        let less = |r: &mut cri::LinuxContainerResources| {
            r.memory_limit_in_bytes = 16 << 20;
            r.memory_swap_limit_in_bytes = 16 << 20;
        };
        let error = update(&node, &container, less).await.unwrap_err();
        ensure!(error.code() == Code::FailedPrecondition, "{error}");
        ensure!(error.message().contains("memory"), "{error}");
        assert_eq!(told(&container).await?, before);
        ensure!(container.is_running().await?);
    }
    let nobody = Container::existing(node.cri(), &"0".repeat(64));
    let error = update(&node, &nobody, |r| r.cpu_shares = 2).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    node.finish().await
}

async fn swap_and_processes_are_limited(runtime: &str) -> Result<()> {
    let mut node =
        Node::builder().default_runtime(runtime).runtime_config("pids_limit = 20").start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod
        .container(&image)
        .sh("sleep 100")
        .resources(|r| {
            r.memory_limit_in_bytes = 32 << 20;
            r.memory_swap_limit_in_bytes = 48 << 20;
        })
        .start()
        .await?;
    let swap = cgroup(&node, &container, "memory.memsw.limit_in_bytes", "memory.swap.max")?;
    assert_eq!(swap, if version_1() { "50331648" } else { "16777216" });
    assert_eq!(cgroup(&node, &container, "pids.max", "pids.max")?, "20");
    let text = container.sh("(for i in $(seq 30); do sleep 5 & done) 2>&1; true").await;
    let text = text.unwrap_or_else(|error| format!("{error:#}"));
    ensure!(text.contains("fork"), "30 processes fit into 20: {text}");
    node.finish().await
}

async fn what_the_host_lacks_is_named(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let lacks = Code::FailedPrecondition;
    if version_1() {
        refused(&pod, &image, lacks, &["unified", "cgroup v2"], |c| {
            let linux = c.linux.get_or_insert_default().resources.get_or_insert_default();
            linux.unified = HashMap::from([("memory.high".into(), "1".into())]);
        })
        .await?;
    }
    refused(&pod, &image, lacks, &["cpuset.cpus"], |c| {
        let linux = c.linux.get_or_insert_default().resources.get_or_insert_default();
        linux.cpuset_cpus = "4000".into();
    })
    .await?;
    refused(&pod, &image, lacks, &["hugepage_limits", "3MB"], |c| {
        let linux = c.linux.get_or_insert_default().resources.get_or_insert_default();
        linux.hugepage_limits = vec![cri::HugepageLimit { page_size: "3MB".into(), limit: 1 }];
    })
    .await
    // Without the controller its absence is what is named.
    .or_else(|error| match error.to_string().contains("hugetlb") {
        true => Ok(()),
        false => Err(error),
    })?;
    if !Path::new("/sys/fs/resctrl/schemata").exists() {
        refused(&pod, &image, lacks, &["gold", "resctrl", "rdt-class"], |c| {
            c.annotations.insert("io.kubernetes.cri.rdt-class".into(), "gold".into());
        })
        .await?;
    }
    let apparmor = fs::read("/sys/module/apparmor/parameters/enabled");
    if !apparmor.is_ok_and(|text| text.starts_with(b"Y")) {
        use cri::security_profile::ProfileType;
        let with = |kind: ProfileType, name: &str| {
            let profile =
                cri::SecurityProfile { profile_type: kind as i32, localhost_ref: name.into() };
            move |c: &mut cri::ContainerConfig| {
                let linux = c.linux.get_or_insert_default();
                linux.security_context.get_or_insert_default().apparmor = Some(profile);
            }
        };
        refused(&pod, &image, lacks, &["AppArmor"], with(ProfileType::RuntimeDefault, "")).await?;
        refused(&pod, &image, lacks, &["AppArmor"], with(ProfileType::Localhost, "x")).await?;
        let free = pod.container(&image).name("free").sh("echo runs");
        let free = free.config(with(ProfileType::Unconfined, ""));
        assert_eq!(free.output().await?, "runs");
        let info = node.status(true).await?.info;
        ensure!(info["apparmor"].contains("no AppArmor"), "{:?}", info["apparmor"]);
    }
    // Relabelling means nothing without SELinux, and the kubelet asks for it everywhere.
    let dir = tempfile::tempdir()?;
    let labelled = pod.container(&image).name("labelled").sh("ls -d /x");
    let labelled = labelled.mount(dir.path(), "/x", |m| m.selinux_relabel = true);
    assert_eq!(labelled.output().await?, "/x");
    node.finish().await
}

async fn a_pods_resources_are_kept(runtime: &str) -> Result<()> {
    let (mut node, _) = node::with_busybox(runtime).await?;
    let pod = node
        .pod("a")
        .host_network()
        .linux(|linux| {
            linux.overhead =
                Some(cri::LinuxContainerResources { cpu_shares: 7, ..Default::default() });
        })
        .run()
        .await?;
    let request = cri::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.id.clone(),
        overhead: None,
        resources: Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: 123_456_789,
            ..Default::default()
        }),
    };
    node.cri().runtime().update_pod_sandbox_resources(request.clone()).await?;
    node.kill9()?;
    node.restart().await?;
    let status = cri::PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
    let info = node.cri().runtime().pod_sandbox_status(status).await?.into_inner().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"])?;
    assert_eq!(info["config"]["resources"]["memory_limit"], 123_456_789);
    assert_eq!(info["config"]["overhead"]["cpu_shares"], 7, "what was not given was changed");
    let request =
        cri::UpdatePodSandboxResourcesRequest { pod_sandbox_id: "0".repeat(64), ..request };
    let error = node.cri().runtime().update_pod_sandbox_resources(request).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    node.finish().await
}

/// A whole disk of this host: its node in /dev, and its numbers as the kernel writes them.
fn disk() -> Result<(PathBuf, String)> {
    for entry in fs::read_dir("/sys/block")? {
        let path = entry?.path();
        let node = Path::new("/dev").join(path.file_name().context("a name")?);
        let numbers = fs::read_to_string(path.join("dev"))?;
        if node.exists() && path.join("queue").exists() {
            return Ok((node, numbers.trim().to_owned()));
        }
    }
    anyhow::bail!("this host has no disk")
}

async fn block_io_classes_are_limits(runtime: &str) -> Result<()> {
    let (disk, numbers) = disk()?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("blockio.yaml");
    let slow = |rate: &str| {
        format!("Classes:\n  slow:\n  - Devices: [{disk:?}]\n    ThrottleReadBps: {rate}\n")
    };
    fs::write(&file, slow("60M"))?;
    let mut node = Node::builder()
        .default_runtime(runtime)
        .runtime_config(&format!("blockio_config = {file:?}"))
        .start()
        .await?;
    let image = node.busybox().await?;
    let pod = node
        .pod("a")
        .host_network()
        .config(|c| {
            let key = "blockio.resources.beta.kubernetes.io/";
            c.annotations.insert(format!("{key}pod"), "no-such".into());
            c.annotations.insert(format!("{key}container.slow"), "slow".into());
        })
        .run()
        .await?;
    let limit = async |name: &str| {
        let container = pod.container(&image).name("slow").sh("sleep 100");
        let container = container.attempt(if name == "first" { 0 } else { 1 }).start().await?;
        cgroup(&node, &container, "blkio.throttle.read_bps_device", "io.max")
    };
    let seen = limit("first").await?;
    ensure!(seen.contains(&numbers) && seen.contains("60000000"), "{seen:?} of {numbers}");
    // Changed while the daemon runs.
    fs::write(&file, slow("1Mi"))?;
    let seen = limit("second").await?;
    ensure!(seen.contains("1048576"), "{seen:?}");
    fs::write(&file, "Classes:\n  slow:\n  - Weight: 500\n")?;
    let weighed = pod.container(&image).name("slow").attempt(7).sh("sleep 100").start().await;
    match weighed {
        Ok(container) => {
            let weight = cgroup(&node, &container, "blkio.bfq.weight", "io.bfq.weight")?;
            ensure!(weight.contains("500"), "{weight}");
        }
        // Kernels without BFQ; crun 1.8, which knows blkio.weight only.
        Err(error) => {
            ensure!(error.code() == Code::FailedPrecondition, "{error}");
            ensure!(error.message().to_lowercase().contains("weight"), "{error}");
        }
    }
    let words = ["no-such", "it has slow", "blockio.resources.beta.kubernetes.io/pod"];
    refused(&pod, &image, Code::FailedPrecondition, &words, |_| {}).await?;
    node.finish().await
}

async fn a_container_that_cannot_start_says_why(runtime: &str) -> Result<()> {
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    let image = node.load("test/cannot:1", &Image::busybox()?.build()?).await?;
    let pod = node.pod("a").host_network().run().await?;
    // The runtimes find these out when the command is executed.
    let late = tempfile::tempdir()?;
    for (name, text) in [("interpreter", "#!/no/such/interpreter\n"), ("format", "neither\n")] {
        let path = late.path().join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    let container = |name: &str, command: &str| {
        let container = pod.container(&image).name(name).command([command]);
        container.mount(late.path(), "/late", |_| ())
    };
    for (name, command, words) in [
        ("missing", "/no/such/program", &["not found", "no such file"]),
        ("not-in-path", "no-such-program", &["not found in $PATH"; 2]),
        ("directory", "/etc", &["not permitted", "permission denied"]),
        ("not-executable", "/etc/passwd", &["Permission denied", "permission denied"]),
    ] {
        let error = match container(name, command).create().await {
            Ok(_) => anyhow::bail!("{name} was made"),
            Err(error) => error,
        };
        ensure!(error.code() == Code::InvalidArgument, "{error}");
        let text = error.message();
        ensure!(text.contains(&format!("{name:?}")) && text.contains(command), "{text}");
        ensure!(words.iter().any(|word| text.contains(word)), "{text}");
    }
    ensure!(node.containers().await?.is_empty(), "containers that were not made are listed");
    for (name, command, word) in [
        ("interpreter", "/late/interpreter", "o such file or directory"),
        ("format", "/late/format", "xec format error"),
    ] {
        let container = container(name, command).start().await?;
        let status = container.wait().await?;
        ensure!(status.exit_code != 0 && status.reason == "Error", "{status:?}");
        // As with any program that ends at once, its log says why.
        let log = container.log()?;
        ensure!(log.iter().any(|l| l.text.contains(command) && l.text.contains(word)), "{log:?}");
    }
    node.finish().await
}

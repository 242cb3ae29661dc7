//! What any pod needs of a container, with both OCI runtimes: each test is run with runc and with crun.

use std::{
    collections::HashMap,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use holdfast_integration::{
    Container, Image, Node, eventually,
    ground::cgroup_mounts,
    log,
    node::{self, Cni, on},
    wait::Look,
    with_each_runtime,
};
use holdfast_protos::cri;

with_each_runtime! {
    command_and_arguments_replace_those_of_the_image
    environment_and_working_directory_are_merged_with_the_image
    the_user_is_the_images_or_the_configs
    groups_are_merged_or_strict
    a_user_that_does_not_exist_is_a_clear_error
    mounts_are_bound_read_only_and_made_when_missing
    mounts_propagate_as_asked
    an_image_volume_is_writable_and_has_its_content
    hosts_resolv_conf_hostname_and_shm_are_the_pods
    ports_of_the_node_lead_into_the_pod
    a_pod_has_addresses_of_both_families
    limits_are_in_the_cgroup_below_the_given_parent
    limits_can_be_changed_while_it_runs
    huge_pages_are_limited
    oom_score_is_set_or_clamped
    a_privileged_container_has_what_the_daemon_has
    capabilities_are_added_and_dropped
    the_root_can_be_read_only
    seccomp_profiles_are_applied
    paths_are_masked_and_read_only
    devices_appear_with_their_permissions
    sysctls_are_the_pods_own
    no_new_privileges_is_set
    pid_namespaces_are_shared_as_asked
    host_namespaces_are_the_nodes
    stopping_sends_the_stop_signal_then_kill
    ends_are_reported_with_code_and_reason
    exec_answers_with_output_and_code
    exec_that_times_out_is_killed
    exec_output_is_capped_and_background_children_do_not_hold_it
    logs_have_both_streams_parts_and_can_be_reopened
    the_end_of_a_log_is_kept_with_and_without_a_newline
    usage_is_reported
}

async fn command_and_arguments_replace_those_of_the_image(runtime: &str) -> Result<()> {
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    let image = Image::busybox()?.entrypoint(["/bin/echo", "entry"]).cmd(["cmd"]).build()?;
    let image = node.load("test/echo:1", &image).await?;
    let pod = node.pod("a").host_network().run().await?;
    let run = async |name: &str, command: &[&str], args: &[&str]| {
        let container = pod.container(&image).name(name);
        container.command(command.iter().copied()).args(args.iter().copied()).output().await
    };
    assert_eq!(run("neither", &[], &[]).await?, "entry cmd");
    assert_eq!(run("args", &[], &["a", "b"]).await?, "entry a b");
    assert_eq!(run("command", &["/bin/echo", "x"], &[]).await?, "x");
    assert_eq!(run("both", &["/bin/echo", "x"], &["y  z"]).await?, "x y  z");
    node.finish().await
}

async fn environment_and_working_directory_are_merged_with_the_image(runtime: &str) -> Result<()> {
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    let image =
        Image::busybox()?.env("A", "image").env("B", "image").working_dir("/var").build()?;
    let image = node.load("test/env:1", &image).await?;
    let pod = node.pod("a").host_network().run().await?;
    let script = "echo $A,$B,$C,$PWD; env | sort | tr '\\n' ' '";
    let text = pod.container(&image).sh(script).env("B", "config").env("C", "x=y").output().await?;
    ensure!(text.starts_with("image,config,x=y,/var\n"), "{text}");
    ensure!(text.contains("HOSTNAME=") && text.contains("PATH=/bin"), "{text}");
    // A directory that the image lacks is made.
    let text = pod
        .container(&image)
        .name("dir")
        .sh("pwd")
        .config(|c| c.working_dir = "/srv/new".into())
        .output()
        .await?;
    assert_eq!(text, "/srv/new");
    node.finish().await
}

async fn the_user_is_the_images_or_the_configs(runtime: &str) -> Result<()> {
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    let image = node.load("test/user:1", &Image::busybox()?.user("app").build()?).await?;
    let root = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let value = |value| Some(cri::Int64Value { value });
    let script = "id -u; id -g; echo $HOME; echo on stderr >/dev/stderr";
    let run =
        async |name: &str, image: &str, set: &dyn Fn(&mut cri::LinuxContainerSecurityContext)| {
            pod.container(image).name(name).sh(script).security(set).output().await
        };
    assert_eq!(run("root", &root, &|_| {}).await?, "0\n0\n/root");
    assert_eq!(run("image", &image, &|_| {}).await?, "1000\n1000\n/home/app");
    assert_eq!(
        run("name", &root, &|s| s.run_as_username = "app".into()).await?,
        "1000\n1000\n/home/app"
    );
    assert_eq!(run("id", &image, &|s| s.run_as_user = value(1)).await?, "1\n1\n/");
    let both = |s: &mut cri::LinuxContainerSecurityContext| {
        s.run_as_user = value(1000);
        s.run_as_group = value(3000);
    };
    assert_eq!(run("both", &root, &both).await?, "1000\n3000\n/home/app");
    // An id that no passwd file knows is as good as any; its group is root's. Its home is the OCI
    // runtime's choice: "/" with runc, none with crun.
    let unknown = run("unknown", &root, &|s| s.run_as_user = value(4242)).await?;
    ensure!(unknown.trim_end_matches(['/', '\n']) == "4242\n0", "{unknown}");
    node.finish().await
}

async fn groups_are_merged_or_strict(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    for (policy, expected) in [
        (cri::SupplementalGroupsPolicy::Merge, vec![1000, 2000, 3000]),
        (cri::SupplementalGroupsPolicy::Strict, vec![1000, 2000]),
    ] {
        let container = pod
            .container(&image)
            .name(&format!("{policy:?}").to_lowercase())
            .sh("id -G; sleep 100")
            .security(|s| {
                s.run_as_username = "app".into();
                s.supplemental_groups = vec![2000];
                s.supplemental_groups_policy = policy.into();
            })
            .start()
            .await?;
        container.wait_for_log("1000").await?;
        let mut seen: Vec<i64> = log::texts(&container.log()?, "stdout")[0]
            .split(' ')
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        seen.sort_unstable();
        assert_eq!(seen, expected, "{policy:?}");
        let user = container.status().await?.user.unwrap_or_default().linux.unwrap_or_default();
        assert_eq!((user.uid, user.gid), (1000, 1000));
        let mut told = user.supplemental_groups;
        told.sort_unstable();
        told.retain(|group| *group != 1000);
        assert_eq!(told, expected[1..], "{policy:?}");
        // An exec is the same user.
        let mut exec: Vec<i64> =
            container.sh("id -G").await?.split(' ').map(str::parse).collect::<Result<_, _>>()?;
        exec.sort_unstable();
        assert_eq!(exec, expected, "{policy:?}");
    }
    node.finish().await
}

async fn a_user_that_does_not_exist_is_a_clear_error(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let before = node.inventory();
    let error = pod
        .container(&image)
        .security(|s| s.run_as_username = "nobody-here".into())
        .create()
        .await
        .unwrap_err();
    ensure!(error.message().contains("nobody-here"), "{error}");
    ensure!(error.code() != tonic::Code::Internal, "{error}");
    node.nothing_left_since(&before).await?;
    node.finish().await
}

async fn mounts_are_bound_read_only_and_made_when_missing(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let dir = node.path().join("volume");
    fs::create_dir(&dir)?;
    fs::write(dir.join("file"), "content")?;
    std::os::unix::fs::symlink(&dir, node.path().join("link"))?;
    let pod = node.pod("a").host_network().run().await?;
    let missing = node.path().join("made/by/runtime");
    let container = pod
        .container(&image)
        .sh("sleep 100")
        .mount(&dir, "/rw", |_| {})
        .mount(&dir, "/ro", |m| m.readonly = true)
        .mount(&dir.join("file"), "/etc/one-file", |m| m.readonly = true)
        .mount(&node.path().join("link"), "/through/link", |_| {})
        .mount(&missing, "/missing", |_| {})
        .start()
        .await?;
    assert_eq!(container.sh("cat /rw/file /ro/file /etc/one-file").await?, "content".repeat(3));
    assert_eq!(container.sh("cat /through/link/file").await?, "content");
    container.sh("echo new > /rw/new; touch /missing/file").await?;
    assert_eq!(fs::read_to_string(dir.join("new"))?, "new\n");
    ensure!(missing.join("file").exists());
    let refused = container.exec_sync(&["touch", "/ro/x"], 10).await?;
    ensure!(refused.exit_code != 0);
    ensure!(String::from_utf8_lossy(&refused.stderr).contains("Read-only"), "{refused:?}");
    let told = container.status().await?.mounts;
    ensure!(told.iter().any(|m| m.container_path == "/ro" && m.readonly), "{told:?}");
    node.finish().await
}

async fn mounts_propagate_as_asked(runtime: &str) -> Result<()> {
    use nix::mount::{MsFlags, mount};
    let (node, image) = node::with_busybox(runtime).await?;
    // A shared mount of the node, as the kubelet's directories are.
    let shared = node.path().join("shared");
    fs::create_dir(&shared)?;
    mount(Some("none"), &shared, Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
    mount(None::<&str>, &shared, None::<&str>, MsFlags::MS_SHARED, None::<&str>)?;
    for name in ["late", "inside"] {
        fs::create_dir(shared.join(name))?;
    }
    let pod = node.pod("a").host_network().privileged().run().await?;
    let start = async |name: &str, propagation: cri::MountPropagation| {
        pod.container(&image)
            .name(name)
            .sh("sleep 100")
            .security(|s| s.privileged = true)
            .mount(&shared, "/mnt", |m| m.propagation = propagation.into())
            .start()
            .await
    };
    let private = start("private", cri::MountPropagation::PropagationPrivate).await?;
    let slave = start("slave", cri::MountPropagation::PropagationHostToContainer).await?;
    let both = start("both", cri::MountPropagation::PropagationBidirectional).await?;
    let late = shared.join("late");
    mount(Some("none"), &late, Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
    fs::write(late.join("file"), "x")?;
    let sees = "[ -e /mnt/late/file ] && echo yes || echo no";
    assert_eq!(private.sh(sees).await?, "no");
    assert_eq!(slave.sh(sees).await?, "yes");
    assert_eq!(both.sh(sees).await?, "yes");
    slave.sh("mount -t tmpfs none /mnt/inside && touch /mnt/inside/slave").await?;
    ensure!(!shared.join("inside/slave").exists());
    both.sh("mount -t tmpfs none /mnt/inside && touch /mnt/inside/both").await?;
    ensure!(shared.join("inside/both").exists());
    for pod in node.pods().await? {
        holdfast_integration::Pod::existing(node.cri(), &pod.id).stop().await?;
    }
    for dir in [shared.join("inside"), late, shared] {
        nix::mount::umount2(&dir, nix::mount::MntFlags::MNT_DETACH)?;
    }
    // A mount that is not shared cannot be bidirectional: an error at creation, not a surprise later.
    let plain = node.path().join("plain");
    fs::create_dir(&plain)?;
    mount(Some("none"), &plain, Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
    mount(None::<&str>, &plain, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
    let pod = node.pod("b").host_network().privileged().run().await?;
    let error = pod
        .container(&image)
        .security(|s| s.privileged = true)
        .mount(&plain, "/mnt", |m| {
            m.propagation = cri::MountPropagation::PropagationBidirectional.into();
        })
        .create()
        .await
        .unwrap_err();
    ensure!(error.message().contains("shared"), "{error}");
    nix::mount::umount2(&plain, nix::mount::MntFlags::MNT_DETACH)?;
    node.finish().await
}

async fn an_image_volume_is_writable_and_has_its_content(runtime: &str) -> Result<()> {
    use holdfast_integration::tar::Entry;
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    let image = Image::busybox()?
        .layer([
            Entry::dir("data", 0o750).owner(1000, 1000),
            Entry::file("data/seed", 0o640, "seed").owner(1000, 1000),
        ])
        .volume("/data")
        .build()?;
    let image = node.load("test/volume:1", &image).await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod
        .container(&image)
        .sh("sleep 100")
        .security(|s| {
            s.readonly_rootfs = true;
            s.run_as_username = "app".into();
        })
        .start()
        .await?;
    assert_eq!(
        container.sh("cat /data/seed && touch /data/new && ls /data").await?,
        "seednew\nseed"
    );
    container.stop(0).await?;
    container.remove().await?;
    // Another container of the image starts with what the image has.
    let text = pod.container(&image).name("b").sh("ls /data").output().await?;
    assert_eq!(text, "seed");
    node.finish().await
}

async fn hosts_resolv_conf_hostname_and_shm_are_the_pods(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node
        .pod("web-1")
        .config(|config| {
            config.dns_config = Some(cri::DnsConfig {
                servers: vec!["10.9.8.7".into(), "10.9.8.6".into()],
                searches: vec!["a.example".into(), "b.example".into()],
                options: vec!["ndots:5".into()],
            });
        })
        .run()
        .await?;
    let container = pod.container(&image).sh("sleep 100").start().await?;
    let other = pod.container(&image).name("other").sh("sleep 100").start().await?;
    let resolv = container.sh("cat /etc/resolv.conf").await?;
    let mut lines: Vec<&str> = resolv.lines().collect();
    lines.sort_unstable();
    let expected = [
        "nameserver 10.9.8.6",
        "nameserver 10.9.8.7",
        "options ndots:5",
        "search a.example b.example",
    ];
    assert_eq!(lines, expected);
    let ip = pod.ip().await?;
    let hosts = container.sh("cat /etc/hosts").await?;
    ensure!(hosts.contains("127.0.0.1") && hosts.contains("localhost"), "{hosts}");
    ensure!(hosts.contains(&ip) && hosts.contains("web-1"), "{hosts} has not {ip}");
    assert_eq!(container.sh("hostname; cat /etc/hostname").await?, "web-1\nweb-1");
    // One /dev/shm for the pod, of a size that a database can live with.
    container.sh("echo shared > /dev/shm/file").await?;
    assert_eq!(other.sh("cat /dev/shm/file").await?, "shared");
    assert_eq!(other.sh("df -k /dev/shm | awk 'NR==2 {print $2}'").await?, "65536");
    assert_eq!(other.sh("stat -c %a /dev/shm").await?, "1777");
    // Without a DNS configuration: the node's.
    let plain = node.pod("b").run().await?;
    let text = plain.container(&image).sh("cat /etc/resolv.conf").output().await?;
    assert_eq!(text.trim(), fs::read_to_string("/etc/resolv.conf")?.trim());
    // A mount of the pod's author over one of these wins.
    fs::write(node.path().join("hosts"), "mine\n")?;
    let own = plain
        .container(&image)
        .name("own")
        .sh("cat /etc/hosts")
        .mount(&node.path().join("hosts"), "/etc/hosts", |m| m.readonly = true)
        .output()
        .await?;
    assert_eq!(own, "mine");
    node.finish().await
}

async fn ports_of_the_node_lead_into_the_pod(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let port = holdfast_integration::registry::free_address()?.port();
    let pod = node.pod("a").port(port.into(), 8080).run().await?;
    let container = pod
        .container(&image)
        .sh("while :; do echo through the port | nc -l -p 8080; done")
        .start()
        .await?;
    ensure!(container.is_running().await?);
    // By another address of the node than loopback, which portmap serves without further settings.
    let gateway = node.ground().subnet4().replace("0/24", "1");
    let text = eventually(Duration::from_secs(10), "the port", async || {
        Ok(match read_all(&format!("{gateway}:{port}")).await {
            Ok(text) if !text.is_empty() => Look::Done(text),
            other => Look::Not(format!("{other:?}")),
        })
    })
    .await?;
    assert_eq!(text, "through the port\n");
    pod.stop().await?;
    ensure!(read_all(&format!("{gateway}:{port}")).await.is_err(), "the port is still open");
    node.finish().await
}

async fn read_all(address: &str) -> Result<String> {
    let address = address.parse()?;
    tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })
    .await?
}

async fn a_pod_has_addresses_of_both_families(runtime: &str) -> Result<()> {
    let mut node = Node::builder().default_runtime(runtime).cni(Cni::DualStack).start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").run().await?;
    let network = pod.status().await?.network.unwrap_or_default();
    ensure!(network.ip.starts_with("10."), "{network:?}");
    assert_eq!(network.additional_ips.len(), 1, "{network:?}");
    let six = network.additional_ips[0].ip.clone();
    ensure!(six.starts_with("fd00:686f:6c64:"), "{six}");
    let text = pod.container(&image).sh("ip addr show eth0; ip link show lo").output().await?;
    ensure!(text.contains(&network.ip) && text.contains(&six), "{text}");
    ensure!(text.contains("LOOPBACK,UP"), "loopback is down: {text}");
    node.finish().await
}

/// A file of a container's cgroup: of v1's `controller` hierarchy, or of v2.
struct Cgroup {
    dirs: Vec<PathBuf>,
}

impl Cgroup {
    /// By a process in it, for names are the runtime's business.
    async fn of(node: &Node, container: &Container) -> Result<Self> {
        let dirs: Vec<PathBuf> = node
            .ground()
            .cgroups()
            .into_iter()
            .filter(|dir| dir.to_string_lossy().contains(&container.id))
            .collect();
        ensure!(!dirs.is_empty(), "no cgroup of {} under {}", container.id, node.ground().cgroup());
        Ok(Self { dirs })
    }

    fn read(&self, v1: &str, v2: &str) -> Result<String> {
        for dir in &self.dirs {
            for name in [v1, v2] {
                if let Ok(text) = fs::read_to_string(dir.join(name)) {
                    return Ok(text.trim().into());
                }
            }
        }
        anyhow::bail!("neither {v1} nor {v2} in {:?}", self.dirs)
    }
}

fn has_v1(controller: &str) -> bool {
    cgroup_mounts().iter().any(|mount| mount.ends_with(controller))
}

async fn limits_are_in_the_cgroup_below_the_given_parent(runtime: &str) -> Result<()> {
    let mut node =
        Node::builder().default_runtime(runtime).runtime_config("pids_limit = 77").start().await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod
        .container(&image)
        .sh("sleep 100")
        .resources(|r| {
            r.memory_limit_in_bytes = 64 << 20;
            r.cpu_shares = 512;
            r.cpu_quota = 50_000;
            r.cpu_period = 100_000;
            r.cpuset_cpus = "0".into();
        })
        .start()
        .await?;
    let cgroup = Cgroup::of(&node, &container).await?;
    assert_eq!(cgroup.read("memory.limit_in_bytes", "memory.max")?, "67108864");
    assert_eq!(cgroup.read("pids.max", "pids.max")?, "77");
    assert_eq!(cgroup.read("cpuset.cpus", "cpuset.cpus")?, "0");
    if has_v1("cpu") {
        assert_eq!(cgroup.read("cpu.shares", "")?, "512");
        assert_eq!(cgroup.read("cpu.cfs_quota_us", "")?, "50000");
        assert_eq!(cgroup.read("cpu.cfs_period_us", "")?, "100000");
    } else {
        assert_eq!(cgroup.read("", "cpu.max")?, "50000 100000");
    }
    let told = container.status().await?.resources.unwrap_or_default().linux.unwrap_or_default();
    assert_eq!(told.memory_limit_in_bytes, 64 << 20, "{told:?}");
    assert_eq!(told.cpu_shares, 512, "{told:?}");
    node.finish().await
}

async fn limits_can_be_changed_while_it_runs(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod
        .container(&image)
        .sh("sleep 100")
        .resources(|r| {
            r.memory_limit_in_bytes = 64 << 20;
            r.cpu_shares = 512;
        })
        .start()
        .await?;
    let update = cri::UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: 128 << 20,
            ..Default::default()
        }),
        ..Default::default()
    };
    node.cri().runtime().update_container_resources(update).await?;
    let cgroup = Cgroup::of(&node, &container).await?;
    assert_eq!(cgroup.read("memory.limit_in_bytes", "memory.max")?, "134217728");
    if has_v1("cpu") {
        assert_eq!(cgroup.read("cpu.shares", "")?, "512", "what was not given was changed");
    }
    let told = container.status().await?.resources.unwrap_or_default().linux.unwrap_or_default();
    assert_eq!((told.memory_limit_in_bytes, told.cpu_shares), (128 << 20, 512));
    node.finish().await
}

async fn huge_pages_are_limited(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let create = async |name: &str, limit: u64| {
        let container = pod.container(&image).name(name).sh("exec sleep 1000");
        let limits = vec![cri::HugepageLimit { page_size: "2MB".into(), limit }];
        container.resources(|r| r.hugepage_limits = limits).start().await
    };
    // The kubelet sends a limit of none to every container: that is no reason to refuse it.
    create("none", 0).await?;
    let limited = create("some", 4 << 20).await;
    let root = Path::new("/sys/fs/cgroup");
    let v2 = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    if root.join("hugetlb").is_dir() || v2.contains("hugetlb") {
        let cgroup = Cgroup::of(&node, &limited?).await?;
        assert_eq!(cgroup.read("hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max")?, "4194304");
    } else {
        // A limit that cannot be kept is not promised.
        let error = limited.unwrap_err();
        assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error}");
        ensure!(error.message().contains("hugetlb"), "{error}");
    }
    node.finish().await
}

async fn oom_score_is_set_or_clamped(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let run = async |name: &str, score: i64| {
        let text = pod
            .container(&image)
            .name(name)
            .sh("cat /proc/1/oom_score_adj /proc/self/oom_score_adj | head -1")
            .resources(|r| r.oom_score_adj = score)
            .output()
            .await?;
        Ok::<i64, anyhow::Error>(text.trim().parse()?)
    };
    assert_eq!(run("higher", 500).await?, 500);
    // Without CAP_SYS_RESOURCE nobody may go below the daemon's own: the container runs all the same.
    let daemon = fs::read_to_string(format!("/proc/{}/oom_score_adj", node.daemon_pid()))?;
    let daemon: i64 = daemon.trim().parse()?;
    let lowest = if may(node.daemon_pid(), 24)? { -998 } else { daemon };
    assert_eq!(run("lower", -998).await?, lowest);
    node.finish().await
}

/// A line of /proc/<pid>/status, parsed as hexadecimal.
fn status_hex(pid: i32, name: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    hex_of(&status, name)
}

fn hex_of(status: &str, name: &str) -> Result<u64> {
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(":"))
        .with_context(|| format!("{name} in {status}"))?;
    Ok(u64::from_str_radix(value.trim(), 16)?)
}

/// Whether a process has a capability, by its number.
fn may(pid: i32, capability: u32) -> Result<bool> {
    Ok(status_hex(pid, "CapEff")? & (1 << capability) != 0)
}

async fn a_privileged_container_has_what_the_daemon_has(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().privileged().run().await?;
    let container =
        pod.container(&image).sh("sleep 100").security(|s| s.privileged = true).start().await?;
    let status = container.sh("cat /proc/1/status").await?;
    // "All" are those that the daemon may grant.
    let all = status_hex(node.daemon_pid(), "CapBnd")?;
    assert_eq!(hex_of(&status, "CapEff")?, all);
    assert_eq!(hex_of(&status, "CapBnd")?, all);
    assert_eq!(hex_of(&status, "Seccomp")?, 0);
    // Every device of the node, writable /sys, nothing masked.
    ensure!(Path::new("/dev/kmsg").exists(), "a host without /dev/kmsg");
    container.sh("test -c /dev/kmsg").await?;
    assert_eq!(container.sh("grep -c ' /sys sysfs rw' /proc/mounts").await?, "1");
    assert_eq!(container.sh("grep -c ' /proc/[^ ]* ' /proc/mounts || true").await?, "0");
    let plain = node.pod("plain").host_network().run().await?;
    let error =
        plain.container(&image).security(|s| s.privileged = true).create().await.unwrap_err();
    ensure!(error.message().contains("privileged"), "{error}");
    node.finish().await
}

async fn capabilities_are_added_and_dropped(runtime: &str) -> Result<()> {
    const CHOWN: u64 = 1 << 0;
    const NET_BIND_SERVICE: u64 = 1 << 10;
    const SYS_PTRACE: u64 = 1 << 19;
    const SYS_ADMIN: u64 = 1 << 21;
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let run = async |name: &str, add: &[&str], drop: &[&str], user: Option<i64>| {
        let text = pod
            .container(&image)
            .name(name)
            .sh("cat /proc/self/status")
            .security(|s| {
                s.capabilities = Some(cri::Capability {
                    add_capabilities: add.iter().map(|name| (*name).into()).collect(),
                    drop_capabilities: drop.iter().map(|name| (*name).into()).collect(),
                    ..Default::default()
                });
                s.run_as_user = user.map(|value| cri::Int64Value { value });
            })
            .output()
            .await?;
        Ok::<(u64, u64), anyhow::Error>((hex_of(&text, "CapEff")?, hex_of(&text, "CapBnd")?))
    };
    let (default, _) = run("default", &[], &[], None).await?;
    assert_eq!(default & CHOWN, CHOWN);
    assert_eq!(default & (SYS_PTRACE | SYS_ADMIN), 0);
    let (changed, _) = run("changed", &["SYS_PTRACE"], &["CAP_CHOWN"], None).await?;
    assert_eq!(changed, (default | SYS_PTRACE) & !CHOWN);
    let (one, bounding) = run("one", &["NET_BIND_SERVICE"], &["ALL"], None).await?;
    assert_eq!((one, bounding), (NET_BIND_SERVICE, NET_BIND_SERVICE));
    let (all, _) = run("all", &["ALL"], &["CHOWN"], None).await?;
    assert_eq!(all, status_hex(node.daemon_pid(), "CapBnd")? & !CHOWN);
    let (user, _) = run("user", &["SYS_PTRACE"], &[], Some(1000)).await?;
    assert_eq!(user, 0, "a user other than root keeps none over execve");
    let error = pod
        .container(&image)
        .name("wrong")
        .security(|s| {
            s.capabilities = Some(cri::Capability {
                add_capabilities: vec!["FLY".into()],
                ..Default::default()
            });
        })
        .create()
        .await
        .unwrap_err();
    assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error}");
    ensure!(error.message().contains("FLY"), "{error}");
    node.finish().await
}

async fn the_root_can_be_read_only(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod
        .container(&image)
        .sh("sleep 100")
        .security(|s| s.readonly_rootfs = true)
        .start()
        .await?;
    let refused = container.exec_sync(&["touch", "/tmp/x"], 10).await?;
    ensure!(String::from_utf8_lossy(&refused.stderr).contains("Read-only"), "{refused:?}");
    // What is mounted stays writable.
    container.sh("touch /dev/shm/x").await?;
    node.finish().await
}

async fn seccomp_profiles_are_applied(runtime: &str) -> Result<()> {
    use cri::security_profile::ProfileType;
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let profile = node.path().join("deny-mkdir.json");
    fs::write(
        &profile,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
            {"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":1}]}"#,
    )?;
    let run = async |name: &str, kind: ProfileType, reference: &str| {
        pod.container(&image)
            .name(name)
            .sh("grep ^Seccomp: /proc/self/status; unshare -U true 2>&1 && echo unshared; mkdir /tmp/d 2>&1; :")
            .security(|s| {
                s.seccomp = Some(cri::SecurityProfile {
                    profile_type: kind.into(),
                    localhost_ref: reference.into(),
                });
            })
            .output()
            .await
    };
    let default = run("default", ProfileType::RuntimeDefault, "").await?;
    ensure!(default.contains("Seccomp:\t2") && !default.contains("unshared"), "{default}");
    let none = run("none", ProfileType::Unconfined, "").await?;
    ensure!(none.contains("Seccomp:\t0") && none.contains("unshared"), "{none}");
    let own = run("own", ProfileType::Localhost, &profile.display().to_string()).await?;
    ensure!(own.contains("Seccomp:\t2") && own.contains("not permitted"), "{own}");
    for (name, content) in [("missing.json", None), ("broken.json", Some("{"))] {
        let path = node.path().join(name);
        if let Some(content) = content {
            fs::write(&path, content)?;
        }
        let error = pod
            .container(&image)
            .name("wrong")
            .security(|s| {
                s.seccomp = Some(cri::SecurityProfile {
                    profile_type: ProfileType::Localhost.into(),
                    localhost_ref: path.display().to_string(),
                });
            })
            .create()
            .await
            .unwrap_err();
        ensure!(error.message().contains(name), "{error}");
    }
    node.finish().await
}

async fn paths_are_masked_and_read_only(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    // What the kubelet sends for every ordinary container: the kernel's secrets are hidden and its
    // switches cannot be turned.
    let container = pod
        .container(&image)
        .sh("sleep 100")
        .security(|s| {
            s.masked_paths =
                ["/proc/keys", "/proc/kcore", "/sys/firmware"].map(String::from).into();
            s.readonly_paths = vec!["/proc/sys".into()];
        })
        .start()
        .await?;
    let keys = container.sh("cat /proc/keys").await?;
    ensure!(keys.is_empty() && !fs::read("/proc/keys")?.is_empty(), "/proc/keys: {keys}");
    assert_eq!(container.sh("ls /sys/firmware").await?, "");
    let refused = container.exec_sync(&["sh", "-c", "echo 1 > /proc/sys/kernel/panic"], 10).await?;
    ensure!(refused.exit_code != 0, "{refused:?}");
    // Any path can be hidden or closed, and one that is not there does no harm.
    let container = pod
        .container(&image)
        .name("own")
        .sh("sleep 100")
        .security(|s| {
            s.masked_paths = vec!["/etc/passwd".into(), "/var".into(), "/no/such/path".into()];
            s.readonly_paths = vec!["/tmp".into()];
        })
        .start()
        .await?;
    assert_eq!(container.sh("cat /etc/passwd; ls /var").await?, "");
    let refused = container.exec_sync(&["touch", "/tmp/x"], 10).await?;
    ensure!(String::from_utf8_lossy(&refused.stderr).contains("Read-only"), "{refused:?}");
    node.finish().await
}

async fn devices_appear_with_their_permissions(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod
        .container(&image)
        .sh("sleep 100")
        .config(|c| {
            for (host, path, permissions) in
                [("/dev/zero", "/dev/own-zero", "rw"), ("/dev/full", "/dev/own-full", "r")]
            {
                c.devices.push(cri::Device {
                    host_path: host.into(),
                    container_path: path.into(),
                    permissions: permissions.into(),
                });
            }
        })
        .start()
        .await?;
    assert_eq!(container.sh("head -c 3 /dev/own-zero | od -An -tx1").await?.trim(), "00 00 00");
    assert_eq!(container.sh("head -c 1 /dev/own-full | wc -c").await?, "1");
    // The usual ones are there, and no others of the node.
    container
        .sh("for d in null zero full random urandom tty; do test -c /dev/$d || exit 1; done")
        .await?;
    assert_eq!(container.sh("test -e /dev/kmsg && echo there || echo absent").await?, "absent");
    let error = pod
        .container(&image)
        .name("wrong")
        .config(|c| {
            c.devices.push(cri::Device {
                host_path: "/dev/no-such-device".into(),
                container_path: "/dev/x".into(),
                permissions: "rw".into(),
            });
        })
        .create()
        .await
        .unwrap_err();
    ensure!(error.message().contains("/dev/no-such-device"), "{error}");
    node.finish().await
}

async fn sysctls_are_the_pods_own(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node
        .pod("a")
        .linux(|linux| {
            linux.sysctls = HashMap::from([
                ("net.ipv4.ip_unprivileged_port_start".into(), "77".into()),
                ("kernel.shm_rmid_forced".into(), "1".into()),
            ]);
        })
        .run()
        .await?;
    let text = pod
        .container(&image)
        .sh("cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced")
        .output()
        .await?;
    assert_eq!(text, "77\n1");
    let host = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start")?;
    ensure!(host.trim() != "77", "it was set on the node");
    node.finish().await
}

async fn no_new_privileges_is_set(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    for wanted in [true, false] {
        let text = pod
            .container(&image)
            .name(&format!("nnp-{wanted}"))
            .sh("grep NoNewPrivs /proc/self/status")
            .security(|s| s.no_new_privs = wanted)
            .output()
            .await?;
        assert_eq!(text, format!("NoNewPrivs:\t{}", i32::from(wanted)));
    }
    node.finish().await
}

async fn pid_namespaces_are_shared_as_asked(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let shared = node.pod("shared").host_network().shared_pids().run().await?;
    let one = shared.container(&image).name("one").sh("exec sleep 1001").start().await?;
    let two = shared.container(&image).name("two").sh("exec sleep 1002").start().await?;
    let seen = two.sh("ps -o args").await?;
    ensure!(seen.contains("sleep 1001") && seen.contains("sleep 1002"), "{seen}");
    ensure!(one.sh("cat /proc/1/cmdline").await? != "sleep\u{0}1001", "PID 1 is the container");
    // PID 1 reaps: an orphan does not stay as a zombie.
    one.sh("(sleep 0.1 &) ; sleep 0.5").await?;
    let zombies = two.sh("ps -o stat | grep -c ^Z || true").await?;
    assert_eq!(zombies, "0");
    // The end of one container is not the end of the other.
    one.stop(0).await?;
    ensure!(two.is_running().await?);

    let own = node.pod("own").host_network().run().await?;
    let container = own.container(&image).sh("exec sleep 1003").start().await?;
    assert_eq!(container.sh("tr '\\0' ' ' < /proc/1/cmdline").await?, "sleep 1003");

    let target = own
        .container(&image)
        .name("debug")
        .sh("exec sleep 1004")
        .security(|s| {
            let namespaces = s.namespace_options.get_or_insert_default();
            namespaces.pid = cri::NamespaceMode::Target.into();
            namespaces.target_id = container.id.clone();
        })
        .start()
        .await?;
    ensure!(target.sh("ps -o args").await?.contains("sleep 1003"));
    node.finish().await
}

async fn host_namespaces_are_the_nodes(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let host = node
        .pod("host")
        .host_network()
        .namespaces(|n| {
            n.pid = cri::NamespaceMode::Node.into();
            n.ipc = cri::NamespaceMode::Node.into();
        })
        .run()
        .await?;
    let script = "for ns in net pid ipc mnt; do readlink /proc/self/ns/$ns; done";
    let text = host.container(&image).sh(script).output().await?;
    let inside: Vec<&str> = text.lines().collect();
    let own = |ns: &str| fs::read_link(format!("/proc/self/ns/{ns}")).unwrap();
    for (number, ns) in ["net", "pid", "ipc"].iter().enumerate() {
        assert_eq!(inside[number], own(ns).to_string_lossy(), "{ns}");
    }
    assert_ne!(inside[3], own("mnt").to_string_lossy());
    ensure!(host.status().await?.network.unwrap_or_default().ip.is_empty());

    let pod = node.pod("pod").run().await?;
    let text = pod.container(&image).sh(script).output().await?;
    for (number, ns) in ["net", "pid", "ipc"].iter().enumerate() {
        assert_ne!(text.lines().nth(number).unwrap(), own(ns).to_string_lossy(), "{ns}");
    }
    node.finish().await
}

async fn stopping_sends_the_stop_signal_then_kill(runtime: &str) -> Result<()> {
    let mut node = Node::builder().default_runtime(runtime).start().await?;
    let usr1 = node.load("test/usr1:1", &Image::busybox()?.stop_signal("SIGUSR1").build()?).await?;
    let image = node.busybox().await?;
    let pod = node.pod("a").host_network().run().await?;
    let traps = "trap 'echo got TERM; exit 3' TERM; trap 'echo got USR1; exit 4' USR1; \
                 trap 'echo got QUIT; exit 5' QUIT; echo ready; while :; do sleep 0.1; done";

    let term = pod.container(&image).name("term").sh(traps).start().await?;
    term.wait_for_log("ready").await?;
    term.stop(20).await?;
    assert_eq!(term.status().await?.exit_code, 3);

    let from_image = pod.container(&usr1).name("image").sh(traps).start().await?;
    from_image.wait_for_log("ready").await?;
    from_image.stop(20).await?;
    assert_eq!(from_image.status().await?.exit_code, 4);

    let from_config = pod
        .container(&usr1)
        .name("config")
        .sh(traps)
        .config(|c| c.stop_signal = cri::Signal::Sigquit.into())
        .start()
        .await?;
    from_config.wait_for_log("ready").await?;
    from_config.stop(20).await?;
    assert_eq!(from_config.status().await?.exit_code, 5);

    // Who does not obey is killed when the grace period is over, and not before.
    let deaf = pod
        .container(&image)
        .name("deaf")
        .sh("trap '' TERM; echo ready; while :; do sleep 0.1; done");
    let deaf = deaf.start().await?;
    deaf.wait_for_log("ready").await?;
    let begun = Instant::now();
    deaf.stop(1).await?;
    let took = begun.elapsed();
    ensure!(took >= Duration::from_secs(1) && took < Duration::from_secs(10), "{took:?}");
    assert_eq!(deaf.status().await?.exit_code, 137);

    // Stopping again, and what has never been started, is no error.
    deaf.stop(10).await?;
    let created = pod.container(&image).name("created").sh("sleep 100").create().await?;
    created.stop(10).await?;
    node.finish().await
}

async fn ends_are_reported_with_code_and_reason(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let good = pod.container(&image).name("good").sh("exit 0").start().await?.wait().await?;
    assert_eq!((good.exit_code, good.reason.as_str()), (0, "Completed"));
    ensure!(good.created_at <= good.started_at && good.started_at <= good.finished_at, "{good:?}");
    let bad = pod.container(&image).name("bad").sh("exit 42").start().await?.wait().await?;
    assert_eq!((bad.exit_code, bad.reason.as_str()), (42, "Error"));
    let killed = pod.container(&image).name("killed").sh("kill -9 $$; sleep 1");
    // PID 1 of a namespace is not killed by itself: kill it from outside.
    let killed = killed.start().await?;
    killed.stop(0).await?;
    assert_eq!(killed.status().await?.exit_code, 137);
    let oom = pod
        .container(&image)
        .name("oom")
        .sh("head -c 200000000 /dev/zero | tail")
        .resources(|r| {
            r.memory_limit_in_bytes = 16 << 20;
            r.memory_swap_limit_in_bytes = 16 << 20;
        })
        .start()
        .await?
        .wait()
        .await?;
    assert_eq!(oom.reason, "OOMKilled", "{oom:?}");
    // A program that is not there is an error of the start, and the container says why.
    let container = pod.container(&image).name("none").command(["/no/such/program"]);
    let error = match container.create().await {
        Ok(container) => container.start().await.unwrap_err(),
        Err(error) => error,
    };
    ensure!(error.message().contains("/no/such/program"), "{error}");
    node.finish().await
}

async fn exec_answers_with_output_and_code(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh("sleep 100").env("A", "b").start().await?;
    let answer = container.exec_sync(&["sh", "-c", "echo $A; echo error >&2; exit 7"], 10).await?;
    assert_eq!(answer.stdout, b"b\n");
    assert_eq!(answer.stderr, b"error\n");
    assert_eq!(answer.exit_code, 7);
    let signalled = container.exec_sync(&["sh", "-c", "kill -TERM $$"], 10).await?;
    assert_eq!(signalled.exit_code, 143);
    let missing = container.exec_sync(&["/no/such/program"], 10).await;
    match missing {
        Ok(answer) => ensure!(matches!(answer.exit_code, 126 | 127), "{answer:?}"),
        Err(error) => ensure!(error.message().contains("/no/such/program"), "{error}"),
    }
    container.stop(0).await?;
    let error = container.exec_sync(&["true"], 10).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error}");
    let error = Container::existing(node.cri(), &"0".repeat(64))
        .exec_sync(&["true"], 10)
        .await
        .unwrap_err();
    assert_eq!(error.code(), tonic::Code::NotFound, "{error}");
    node.finish().await
}

async fn exec_that_times_out_is_killed(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh("sleep 100").start().await?;
    let begun = Instant::now();
    let error = container
        .exec_sync(&["sh", "-c", "sleep 3001 & sleep 3002; echo done"], 1)
        .await
        .unwrap_err();
    let took = begun.elapsed();
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error}");
    ensure!(took >= Duration::from_secs(1) && took < Duration::from_secs(8), "{took:?}");
    // Its children too, and nothing else.
    on(&node, Duration::from_secs(5), "the command to be gone", async || {
        let seen = container.sh("ps -o args").await?;
        Ok(Look::when(!seen.contains("sleep 300"), || seen))
    })
    .await?;
    ensure!(container.is_running().await?);
    node.finish().await
}

async fn exec_output_is_capped_and_background_children_do_not_hold_it(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod.container(&image).sh("sleep 100").start().await?;
    // 16 MiB are kept; the message itself must fit what the kubelet takes.
    let large = container.exec_sync(&["sh", "-c", "head -c 15000000 /dev/zero"], 60).await?;
    assert_eq!(large.stdout.len(), 15_000_000);
    let more =
        container.exec_sync(&["sh", "-c", "head -c 40000000 /dev/zero; echo end >&2"], 60).await;
    match more {
        Ok(answer) => ensure!(answer.stdout.len() <= 16 << 20, "{}", answer.stdout.len()),
        Err(error) => ensure!(
            matches!(error.code(), tonic::Code::OutOfRange | tonic::Code::ResourceExhausted),
            "{error}"
        ),
    }
    // A child in the background holds the pipe; the answer does not wait for it.
    let begun = Instant::now();
    let answer = container.exec_sync(&["sh", "-c", "sleep 60 & echo done"], 30).await?;
    assert_eq!(answer.stdout, b"done\n");
    ensure!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    node.finish().await
}

async fn logs_have_both_streams_parts_and_can_be_reopened(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    let container = pod
        .container(&image)
        .sh("echo out; echo err >&2; head -c 40000 /dev/zero | tr '\\0' x; echo; printf unfinished; \
             while [ ! -e /tmp/go ]; do sleep 0.1; done; echo; echo after")
        .start()
        .await?;
    container.wait_for_log("out").await?;
    container.wait_for_log("err").await?;
    on(&node, Duration::from_secs(10), "the long line", async || {
        let lines = container.log()?;
        let long = log::texts(&lines, "stdout").iter().any(|text| text.len() == 40_000);
        Ok(Look::when(long, || format!("{} lines", lines.len())))
    })
    .await?;
    let parts: Vec<(usize, bool)> = container
        .log()?
        .iter()
        .filter(|line| line.text.starts_with('x'))
        .map(|line| (line.text.len(), line.partial))
        .collect();
    assert_eq!(parts, [(16384, true), (16384, true), (7232, false)]);
    let path = container.log_path();
    assert_eq!(fs::metadata(path)?.mode() & 0o777 & !0o644, 0, "others may not write a log");

    // As the kubelet rotates: rename, then reopen.
    let old = path.with_extension("log.1");
    fs::rename(path, &old)?;
    let request = cri::ReopenContainerLogRequest { container_id: container.id.clone() };
    node.cri().runtime().reopen_container_log(request.clone()).await?;
    container.sh("touch /tmp/go").await?;
    container.wait_for_log("after").await?;
    ensure!(container.log()?.iter().all(|line| line.text != "out"), "lines twice");
    ensure!(log::read(&old)?.iter().any(|line| line.text == "out"));
    container.wait().await?;
    let error = node.cri().runtime().reopen_container_log(request).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error}");
    let mode = fs::metadata(path)?.permissions().mode() & 0o777;
    ensure!(mode & 0o022 == 0, "{mode:o}");
    node.finish().await
}

async fn the_end_of_a_log_is_kept_with_and_without_a_newline(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").host_network().run().await?;
    for (name, script, expected) in [
        ("with", "seq 1 5000", 5000),
        ("without", "seq 1 5000; printf 'the end'", 5001),
        ("only", "printf 'the end'", 1),
    ] {
        let container = pod.container(&image).name(name).sh(script).start().await?;
        container.wait().await?;
        let texts = log::texts(&container.log()?, "stdout");
        assert_eq!(texts.len(), expected, "{name}: {:?}", texts.last());
        let last = if name == "with" { "5000" } else { "the end" };
        assert_eq!(texts.last().map(String::as_str), Some(last), "{name}");
    }
    node.finish().await
}

async fn usage_is_reported(runtime: &str) -> Result<()> {
    let (node, image) = node::with_busybox(runtime).await?;
    let pod = node.pod("a").run().await?;
    let container = pod
        .container(&image)
        .sh("head -c 3000000 /dev/zero > /tmp/file; echo written; while :; do :; done")
        .resources(|r| r.memory_limit_in_bytes = 256 << 20)
        .start()
        .await?;
    // The size of the writable layer is found out once in a while: not before it is what it will be.
    container.wait_for_log("written").await?;
    let used = |value: Option<cri::UInt64Value>| value.map_or(0, |value| value.value);
    let stats = on(&node, Duration::from_secs(15), "usage", async || {
        let stats = container.stats().await?;
        let cpu = used(stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds));
        let memory = used(stats.memory.and_then(|memory| memory.working_set_bytes));
        let disk = used(stats.writable_layer.as_ref().and_then(|layer| layer.used_bytes));
        Ok(if cpu > 100_000_000 && memory > 0 && disk >= 3_000_000 {
            Look::Done(stats)
        } else {
            Look::Not(format!("cpu {cpu} memory {memory} disk {disk}"))
        })
    })
    .await?;
    let attributes = stats.attributes.unwrap_or_default();
    assert_eq!(attributes.id, container.id);
    assert_eq!(attributes.metadata.unwrap_or_default().name, "main");
    let memory = stats.memory.unwrap_or_default();
    let (working, available) = (used(memory.working_set_bytes), used(memory.available_bytes));
    assert_eq!(working + available, 256 << 20);

    let request = cri::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let stats = node.cri().runtime().pod_sandbox_stats(request).await?.into_inner();
    let linux = stats.stats.unwrap_or_default().linux.unwrap_or_default();
    ensure!(used(linux.cpu.and_then(|cpu| cpu.usage_core_nano_seconds)) > 0);
    let network = linux.network.unwrap_or_default().default_interface.unwrap_or_default();
    assert_eq!(network.name, "eth0");
    assert_eq!(linux.containers.len(), 1);
    node.finish().await
}

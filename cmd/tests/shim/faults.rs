//! What goes wrong: daemons and shims that die, runtimes that hang, memory that runs out.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use holdfast_shim::{
    bundle::{Exit, ExitRecord, Namespace},
    client::{Client, ErrorKind, TaskStatus},
    events::Event,
    options::{IdMap, PodOptions, UserMappings},
};
use serde_json::json;

use crate::{
    main_path::for_each_runtime,
    node::{Node, Oci, PATIENCE, process, soon, until},
};

for_each_runtime! {
    out_of_memory_is_told_before_the_exit_and_recorded
    containers_outlive_their_shim_and_delete_cleans_up_after_it
    the_exit_record_tells_the_truth_when_the_shim_is_gone
    wrong_requests_get_errors_that_say_what_to_do
    killing_an_exec_takes_all_that_it_started
    a_shared_pid_namespace_has_an_init_that_reaps
    what_shares_the_nodes_pids_is_killed_with_its_container
    freezing_changing_and_counting
    a_user_namespace_of_the_pod
}

fn alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(") ").unwrap().1.starts_with('Z'))
}

async fn out_of_memory_is_told_before_the_exit_and_recorded(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", PodOptions::default()).await;
    let container = pod
        // busybox tail keeps what has no line feed in memory.
        .sh("c1", "tail /dev/zero")
        .with(|config| {
            config["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
            config["mounts"].as_array_mut().unwrap().retain(|m| m["destination"] != "/dev");
            config["mounts"].as_array_mut().unwrap().insert(0, json!({
                "destination": "/dev", "type": "bind", "source": "/dev", "options": ["rbind", "rprivate"]
            }));
            config["mounts"].as_array_mut().unwrap().retain(|m| m["destination"] != "/dev/pts");
        })
        .start()
        .await;
    let ended = container.wait().await;
    assert_eq!(ended.status, 137);
    let record = ExitRecord::load(container.bundle.exit_record()).unwrap().unwrap();
    assert!(record.oom_killed, "{record:?}");
    node.event("the exit event", |event| matches!(event, Event::Exit { .. })).await;
    let events = node.events();
    let place = |wanted: fn(&Event) -> bool| events.iter().position(wanted).unwrap();
    assert!(
        place(|e| matches!(e, Event::Oom { .. })) < place(|e| matches!(e, Event::Exit { .. })),
        "{events:?}"
    );
    container.delete().await;
}

#[tokio::test]
async fn events_wait_for_a_daemon_that_is_down() {
    let node = Node::new(Oci::Runc);
    let pod = node.pod("pod", PodOptions::default()).await;
    let container = pod.sh("c1", "sleep 1000").start().await;
    node.event("the start event", |event| matches!(event, Event::Start { .. })).await;
    node.stop_daemon().await;
    // Work goes on meanwhile.
    let (ended, ..) = container.exec("e1", &["/bin/sh", "-c", "exit 9"]).await;
    assert_eq!(ended.status, 9);
    container.kill(9).await;
    container.wait().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!node.events().iter().any(|event| matches!(event, Event::Exit { .. })));
    node.start_daemon();
    node.event(
        "the container's exit",
        |event| matches!(event, Event::Exit { id, status: 137, .. } if id == "c1"),
    )
    .await;
    let order: Vec<_> = node
        .events()
        .into_iter()
        .filter_map(|event| match event {
            Event::Exit { id, .. } => Some(id),
            _ => None,
        })
        .collect();
    assert_eq!(order, ["e1", "c1"]);
}

async fn containers_outlive_their_shim_and_delete_cleans_up_after_it(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", PodOptions { net: true, ..PodOptions::default() }).await;
    let script = "i=0; while true; do i=$((i+1)); echo $i; echo $i > /tmp/count; sleep 0.01; done";
    let container = pod.sh("c1", script).start().await;
    container.line("3").await;
    let init: u32 = fs::read_to_string(container.bundle.init_pid()).unwrap().parse().unwrap();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pod.pid.cast_signed()),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    soon("the connection to break", pod.client.closed()).await;
    // It writes on: its pipe is a FIFO that it holds itself.
    let count = || fs::read_to_string(container.bundle.rootfs().join("tmp/count")).ok();
    let then = count();
    until("the container to go on", || (count()? != then.clone()?).then_some(())).await;
    assert!(alive(init));

    // As the daemon cleans up: each container, then the pod.
    let mut command = node.command("c1", container.bundle.dir());
    command.env.push(("HOLDFAST_RUNTIME_ROOT".into(), node.runtime_root().display().to_string()));
    let ended = command.delete(PATIENCE).await.unwrap();
    assert_eq!((ended.status, ended.pid), (137, init));
    assert!(!alive(init));
    node.command("pod", pod.bundle.dir()).delete(PATIENCE).await.unwrap();
    assert!(node.mounts().is_empty(), "{:?}", node.mounts());
    assert!(node.cgroups().is_empty(), "{:?}", node.cgroups());
    // And once more, for a daemon that died meanwhile.
    command.delete(PATIENCE).await.unwrap();
    // The socket that the dead shim left does not stop the next one.
    let again = node.command("pod", pod.bundle.dir()).start(PATIENCE).await.unwrap();
    assert_eq!(again, pod.endpoint);
    let client = Client::connect(&again, PATIENCE).await.unwrap();
    assert_ne!(client.connect_info("").await.unwrap().shim_pid, pod.pid);
    client.shutdown("pod", true).await.unwrap();
}

async fn the_exit_record_tells_the_truth_when_the_shim_is_gone(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", PodOptions::default()).await;
    let container = pod.sh("c1", "exit 23").start().await;
    let ended = container.wait().await;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pod.pid.cast_signed()),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    let told = node.command("c1", container.bundle.dir()).delete(PATIENCE).await.unwrap();
    assert_eq!((told.status, told.at), (23, ended.at));
    assert!(node.cgroups().is_empty(), "{:?}", node.cgroups());
}

async fn wrong_requests_get_errors_that_say_what_to_do(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.shim("pod").await;
    let client = &pod.client;
    let refused = |options: PodOptions| {
        let pod = &pod;
        async move { pod.create(options).await.unwrap_err() }
    };
    let error =
        refused(PodOptions { hostname: "x".repeat(65), uts: true, ..Default::default() }).await;
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let sysctls = [("net.ipv4.no_such_thing".to_owned(), "1".to_owned())].into();
    pod.create(PodOptions { net: true, sysctls, ..Default::default() }).await.unwrap();
    let error = client.start_sandbox("pod").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("net.ipv4.no_such_thing"), "{error}");
    assert!(node.mounts().is_empty(), "nothing is left: {:?}", node.mounts());

    let missing = pod.run("c1", &["/bin/no-such-program"]);
    missing.write();
    let error = match client.create(missing.task()).await {
        // crun looks for the program when it starts.
        Ok(_) => client.start("c1", "").await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(error.to_string().contains("no-such-program"), "{error}");

    let container = pod.sh("c2", "sleep 1000").start().await;
    let error = client.create(container.task()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(client.start("c2", "").await.unwrap_err().kind(), ErrorKind::Precondition);
    assert_eq!(client.delete("c2", "").await.unwrap_err().kind(), ErrorKind::Precondition);
    assert_eq!(client.kill("c2", "", 99, false).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(client.resize("c2", "", 1, 1).await.unwrap_err().kind(), ErrorKind::Precondition);
    assert_eq!(client.state("c2", "no").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(client.wait("no", "").await.unwrap_err().kind(), ErrorKind::NotFound);
    let exec = |id: &'static str, arguments: &'static [&'static str]| {
        let task = holdfast_shim::client::ExecTask {
            process: process(arguments).to_string().into_bytes(),
            ..Default::default()
        };
        client.exec("c2", id, task)
    };
    exec("e1", &["/no/such"]).await.unwrap();
    assert_eq!(exec("e1", &["/no/such"]).await.unwrap_err().kind(), ErrorKind::AlreadyExists);
    let error = client.start("c2", "e1").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    client.delete("c2", "e1").await.unwrap();
    let mut bad = container.task();
    bad.id = "../c3".into();
    assert_eq!(client.create(bad).await.unwrap_err().kind(), ErrorKind::Invalid);
    let mut bad = container.task();
    bad.id = "c4".into();
    bad.stdout = "ftp://x".into();
    let error = client.create(bad).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("cri-log"), "{error}");
    container.kill(9).await;
    container.wait().await;
    assert_eq!(client.kill("c2", "", 9, false).await.unwrap_err().kind(), ErrorKind::NotFound);
    container.delete().await;
}

async fn killing_an_exec_takes_all_that_it_started(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", PodOptions::default()).await;
    let container = pod.sh("c1", "sleep 1000").start().await;
    let task = holdfast_shim::client::ExecTask {
        process: process(&["/bin/sh", "-c", "sleep 2001 & setsid sleep 2002 & sleep 2003; true"])
            .to_string()
            .into_bytes(),
        ..Default::default()
    };
    pod.client.exec("c1", "e1", task).await.unwrap();
    pod.client.start("c1", "e1").await.unwrap();
    let pids = || async { pod.client.pids("c1").await.unwrap() };
    let by = std::time::Instant::now() + PATIENCE;
    while pids().await.len() < 5 {
        assert!(std::time::Instant::now() < by, "{:?}", pids().await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    pod.client.kill("c1", "e1", 9, false).await.unwrap();
    assert_eq!(soon("the exec's end", pod.client.wait("c1", "e1")).await.unwrap().status, 137);
    let by = std::time::Instant::now() + PATIENCE;
    while pids().await.len() > 1 {
        assert!(std::time::Instant::now() < by, "{:?}", pids().await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(pod.client.state("c1", "").await.unwrap().status, TaskStatus::Running);
    container.kill(9).await;
    container.wait().await;
}

async fn a_shared_pid_namespace_has_an_init_that_reaps(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", PodOptions { pid: true, ..PodOptions::default() }).await;
    let status = pod.client.sandbox_status("pod").await.unwrap();
    assert_eq!(status.state, "SANDBOX_READY");
    assert!(alive(status.pid));
    let pids = pod.bundle.namespace(Namespace::Pid);
    // An orphan in the namespace: its parent leaves, the pod's init gets it.
    let script = "echo $$; sh -c 'sleep 0.2 & true'; sleep 0.5; ps | grep -c 'Z' ; exit 4";
    let one = pod.sh("c1", script).namespace("pid", Some(&pids)).start().await;
    let two = pod.sh("c2", "sleep 3001 & sleep 3002").namespace("pid", Some(&pids)).start().await;
    assert_eq!(one.wait().await.status, 4);
    assert_ne!(one.lines("stdout")[0], "1");
    // The kernel does not end c2's background process with c2: the shim does.
    let before = pod.client.pids("c2").await.unwrap();
    assert!(before.len() >= 2, "{before:?}");
    two.kill(9).await;
    assert_eq!(two.wait().await.status, 137);
    until("the rest of c2 to go", || (!before.iter().any(|pid| alive(*pid))).then_some(())).await;
    assert!(alive(status.pid));
    one.delete().await;
    two.delete().await;
    let waiting = {
        let client = pod.client.clone();
        tokio::spawn(async move { client.wait_sandbox("pod").await })
    };
    pod.client.stop_sandbox("pod", Duration::ZERO).await.unwrap();
    soon("the pod's end", waiting).await.unwrap().unwrap();
    assert!(!alive(status.pid));
    assert_eq!(pod.client.sandbox_status("pod").await.unwrap().state, "SANDBOX_NOTREADY");
    pod.client.shutdown_sandbox("pod").await.unwrap();
    until("the mounts to go", || node.mounts().is_empty().then_some(())).await;
}

async fn what_shares_the_nodes_pids_is_killed_with_its_container(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", PodOptions::default()).await;
    let container = pod
        .sh("c1", "(sleep 4001 &) ; echo ready; sleep 4002")
        .namespace("pid", None)
        .start()
        .await;
    container.line("ready").await;
    let pids = pod.client.pids("c1").await.unwrap();
    assert!(pids.len() >= 2, "{pids:?}");
    container.kill(9).await;
    container.wait().await;
    // Ended and reaped: an orphan of the node's namespace comes to the shim.
    until("no process, no zombie", || {
        (!pids.iter().any(|pid| Path::new(&format!("/proc/{pid}")).exists())).then_some(())
    })
    .await;
    container.delete().await;
}

async fn freezing_changing_and_counting(oci: Oci) {
    let node = Node::new(oci);
    let pod = node.pod("pod", PodOptions::default()).await;
    let client = &pod.client;
    let container = pod.sh("c1", "while true; do echo x; sleep 0.02; done").start().await;
    container.line("x").await;
    client.pause("c1").await.unwrap();
    assert_eq!(client.state("c1", "").await.unwrap().status, TaskStatus::Paused);
    let then = container.records().len();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let now = container.records().len();
    // What was in the pipe may still come.
    assert!(now <= then + 1, "{then} {now}");
    client.resume("c1").await.unwrap();
    until("output again", || (container.records().len() > now + 2).then_some(())).await;

    let limits = json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 77}});
    client.update("c1", limits.to_string().into_bytes()).await.unwrap();
    let pid = client.pids("c1").await.unwrap()[0];
    let stats = holdfast_shim::cgroup::Cgroup::from_pid(pid).unwrap().stats();
    assert_eq!(stats.memory.limit, Some(64 << 20));
    assert_eq!(stats.pids.limit, Some(77));
    assert!(stats.memory.usage.unwrap() > 0 && stats.cpu.usage_ns.unwrap() > 0);
    let any = client.stats("c1").await.unwrap();
    assert!(any.type_url.ends_with(".Metrics") && !any.value.is_empty(), "{any:?}");
    // A frozen container dies all the same.
    client.pause("c1").await.unwrap();
    container.kill(9).await;
    assert_eq!(container.wait().await.status, 137);
    container.delete().await;
}

async fn a_user_namespace_of_the_pod(oci: Oci) {
    let node = Node::new(oci);
    let map = vec![IdMap { container_id: 0, host_id: 200_000, length: 65_536 }];
    let sysctls = [("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())].into();
    let pod = node
        .pod(
            "pod",
            PodOptions {
                net: true,
                ipc: true,
                uts: true,
                hostname: "mapped".into(),
                user: Some(UserMappings { uids: map.clone(), gids: map }),
                sysctls,
                ..PodOptions::default()
            },
        )
        .await;
    let owner = fs::read_to_string(pod.bundle.dir().join("shim.pid")).unwrap();
    assert_eq!(owner, pod.pid.to_string());
    let netns = fs::File::open(pod.bundle.namespace(Namespace::Net)).unwrap();
    let userns = fs::File::open(pod.bundle.namespace(Namespace::User)).unwrap();
    // NS_GET_USERNS: whose the network namespace is.
    let parent = {
        use std::os::{fd::AsRawFd as _, unix::fs::MetadataExt as _};
        let fd = ns_get_userns(netns.as_raw_fd());
        fs::metadata(format!("/proc/self/fd/{fd}")).unwrap().ino()
            == userns.metadata().unwrap().ino()
    };
    assert!(parent, "the network namespace belongs to the pod's user namespace");
}

#[expect(unsafe_code, reason = "ioctl(2)")]
fn ns_get_userns(fd: i32) -> i32 {
    // SAFETY: no memory is involved.
    let user = unsafe { nix::libc::ioctl(fd, 0xb701) };
    assert!(user >= 0, "{}", std::io::Error::last_os_error());
    user
}

#[tokio::test]
async fn a_runtime_that_hangs_holds_up_nothing_else() {
    let mut node = Node::new(Oci::Runc);
    node.env.push(("HOLDFAST_RUNTIME_TIMEOUT".into(), "2".into()));
    let fake = node.path("hang");
    fs::write(&fake, "#!/bin/sh\ncase \"$*\" in *' create '*) sleep 1000;; esac\n").unwrap();
    fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
    let pod = node.pod("pod", PodOptions::default()).await;
    let mut stuck = pod.sh("stuck", "true");
    stuck.options = node.options_for(&fake);
    stuck.write();
    let creating = {
        let (client, task) = (pod.client.clone(), stuck.task());
        tokio::spawn(async move { client.create(task).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    let started = std::time::Instant::now();
    let container = pod.sh("c1", "exit 6").start().await;
    assert_eq!(container.wait().await.status, 6);
    container.delete().await;
    assert!(started.elapsed() < Duration::from_millis(1500), "{:?}", started.elapsed());
    let error = soon("the deadline", creating).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadline, "{error}");
    // The name is free again.
    assert_eq!(pod.client.state("stuck", "").await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn a_caller_that_leaves_does_not_undo_the_work() {
    let node = Node::new(Oci::Runc);
    let pod = node.pod("pod", PodOptions::default()).await;
    let container = pod.sh("c1", "sleep 1000");
    container.write();
    let hasty = Client::connect(&pod.endpoint, PATIENCE)
        .await
        .unwrap()
        .with_deadline(Duration::from_millis(3));
    let error = hasty.create(container.task()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadline);
    drop(hasty);
    let by = std::time::Instant::now() + PATIENCE;
    while pod.client.state("c1", "").await.is_err() {
        assert!(std::time::Instant::now() < by);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(pod.client.state("c1", "").await.unwrap().status, TaskStatus::Created);
    // Never started, and deleted all the same.
    container.delete().await;
    let record = ExitRecord::load(container.bundle.exit_record()).unwrap().unwrap();
    assert_eq!(record.status, Exit::Signal(9));
}

#[tokio::test]
async fn a_shim_goes_when_its_bundle_does() {
    let node = Node::new(Oci::Runc);
    let pod = node.shim("pod").await;
    let container = pod.sh("c1", "sleep 1000").start().await;
    container.kill(9).await;
    container.wait().await;
    container.delete().await;
    fs::remove_dir_all(pod.bundle.dir()).unwrap();
    until("the shim to go", || (!alive(pod.pid)).then_some(())).await;
    assert_eq!(fs::read_dir(node.path("s")).unwrap().count(), 0, "no socket is left");
}

#[tokio::test]
async fn a_group_has_one_shim() {
    let node = Node::new(Oci::Runc);
    let pod = node.shim("pod").await;
    let container = pod.sh("c1", "true").with(|config| {
        config["annotations"] = json!({"io.kubernetes.cri.sandbox-id": "pod"});
    });
    container.write();
    let command = node.command("c1", container.bundle.dir());
    assert_eq!(command.start(PATIENCE).await.unwrap(), pod.endpoint);
    assert!(!container.bundle.shim_pid().exists(), "nothing was started");
    let info = command.info(PATIENCE).await.unwrap();
    assert_eq!(info.name, "containerd-shim-holdfast-v2");
    assert!(info.annotations["holdfast.dev/oci-runtime"].contains("runc"), "{info:?}");
    // A second daemon, or another containerd namespace, has shims of its own.
    let mut other = command.clone();
    other.namespace = "other".into();
    let endpoint = other.start(PATIENCE).await.unwrap();
    assert_ne!(endpoint, pod.endpoint);
    let client = Client::connect(&endpoint, PATIENCE).await.unwrap();
    client.shutdown("c1", true).await.unwrap();
    soon("the other shim's end", client.closed()).await;
}

#[tokio::test]
async fn both_versions_of_the_task_service_answer() {
    let node = Node::new(Oci::Runc);
    let pod = node.shim("pod").await;
    for version in [2, 3] {
        let endpoint = holdfast_shim::client::Endpoint { version, ..pod.endpoint.clone() };
        let client = Client::connect(&endpoint, PATIENCE).await.unwrap();
        assert_eq!(client.connect_info("pod").await.unwrap().shim_pid, pod.pid);
    }
}

/// criu does not run everywhere; what a runtime is asked for can be tested all the same.
#[tokio::test]
async fn checkpoint_and_restore_ask_the_runtime_for_the_right_thing() {
    let node = Node::new(Oci::Runc);
    let fake = node.path("runtime");
    let calls = node.path("calls");
    let script = format!(
        r#"#!/bin/sh
echo "$*" | sed 's/.*--log-format json //' >> {}
pid_file=$(echo "$*" | sed -n 's/.*--pid-file \([^ ]*\).*/\1/p')
case "$*" in
*' restore '*) (echo restored; exec sleep 0.3) & echo -n $! > "$pid_file" ;;
*' checkpoint '*) echo done ;;
*' nothing '*) exit 1 ;;
esac
"#,
        calls.display()
    );
    fs::write(&fake, script).unwrap();
    fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
    let pod = node.pod("pod", PodOptions::default()).await;
    let mut container = pod.sh("c1", "true");
    container.options = node.options_for(&fake);
    container.write();
    let mut task = container.task();
    task.checkpoint = "/images/c1".into();
    assert_eq!(pod.client.create(task).await.unwrap(), 0);
    let pid = pod.client.start("c1", "").await.unwrap();
    assert!(alive(pid));
    pod.client.checkpoint("c1", Path::new("/images/new"), None).await.unwrap();
    assert_eq!(container.wait().await.status, 0);
    assert_eq!(container.lines("stdout"), ["restored"]);
    container.delete().await;
    let bundle = container.bundle.dir().display();
    let calls = fs::read_to_string(calls).unwrap();
    assert_eq!(
        calls.lines().collect::<Vec<_>>(),
        [
            &format!(
                "restore --detach --image-path /images/c1 --bundle {bundle} --pid-file {bundle}/init.pid c1"
            ),
            "checkpoint --image-path /images/new --leave-running c1",
            "delete c1",
        ]
    );
    node.event(
        "its event",
        |event| matches!(event, Event::Checkpointed { path, .. } if path == "/images/new"),
    )
    .await;
}

#[tokio::test]
async fn delete_leaves_the_pod_of_a_living_shim_alone() {
    let node = Node::new(Oci::Runc);
    let pod = node.pod("pod", PodOptions { net: true, ..PodOptions::default() }).await;
    // As a daemon does whose `start` met its deadline.
    node.command("pod", pod.bundle.dir()).delete(PATIENCE).await.unwrap();
    assert_eq!(node.mounts().len(), 2, "the directory and the pin: {:?}", node.mounts());
    assert!(pod.bundle.io_socket().exists());
    pod.client.shutdown_sandbox("pod").await.unwrap();
}

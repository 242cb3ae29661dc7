//! The CNI runtime with the real plugins of Debian's containernetworking-plugins. Needs root.
//!
//! Each test has a network and a mount namespace of its own that play the node: bridges, rules,
//! addresses and pinned namespaces live in them and go with them, and the machine's own are never
//! touched.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{PoisonError, RwLock, mpsc},
    thread,
    time::{Duration, Instant},
};

use holdfast_daemon::{
    config,
    error::chain,
    id::PodId,
    network::{Attach, Attached, Network},
    pod::config::{Map, PortMapping, Protocol},
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};
use serde_json::{Value, json};

const PLUGINS: &str = "/usr/lib/cni";
const NONE: Option<&str> = None;

/// Held for writing by a test that measures.
static QUIET: RwLock<()> = RwLock::new(());

/// Runs a test on a node of its own, beside others.
fn on_a_node(test: impl AsyncFnOnce(Node) + Send + 'static) {
    let _others = QUIET.read().unwrap_or_else(PoisonError::into_inner);
    alone_on_a_node(test);
}

fn alone_on_a_node(test: impl AsyncFnOnce(Node) + Send + 'static) {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test makes network namespaces and needs root: run it with sudo"
    );
    for plugin in ["bridge", "host-local", "portmap", "bandwidth", "firewall", "tuning"] {
        let path = Path::new(PLUGINS).join(plugin);
        assert!(
            path.exists(),
            "{} is missing: apt-get install containernetworking-plugins",
            path.display()
        );
    }
    // Namespaces are a thread's. The runtime is this thread's too, so plugins start from here.
    let node = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            run("ip", &["link", "set", "lo", "up"]);
            test(Node::new()).await;
        });
    });
    if let Err(panic) = node.join() {
        std::panic::resume_unwind(panic);
    }
}

struct Node {
    dir: tempfile::TempDir,
}

impl Node {
    fn new() -> Self {
        let node = Self { dir: tempfile::tempdir().unwrap() };
        for name in ["conf", "bin", "netns"] {
            fs::create_dir(node.path(name)).unwrap();
        }
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn network(&self) -> Network {
        let config = config::Network {
            conf_dir: self.path("conf"),
            bin_dirs: vec![self.path("bin"), PLUGINS.into()],
            timeout: Duration::from_secs(30),
        };
        Network::open(config, self.path("attachments")).unwrap()
    }

    /// A dual-stack bridge, then `more`.
    fn configure(&self, more: &[Value]) {
        let mut plugins = vec![json!({
            "type": "bridge",
            "bridge": "hftest0",
            "isGateway": true,
            "ipMasq": true,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "dataDir": self.path("ipam"),
                "ranges": [[{"subnet": "10.213.0.0/24"}], [{"subnet": "fd13::/64"}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        })];
        plugins.extend_from_slice(more);
        let list = json!({"cniVersion": "1.0.0", "name": "real", "plugins": plugins});
        fs::write(self.path("conf/10.conflist"), list.to_string()).unwrap();
    }

    /// A pod with a pinned namespace that has `lo` up, as the shim makes it.
    fn pod(&self) -> Attach {
        let pod = PodId::random();
        let netns = self.path("netns").join(pod.as_str());
        fs::write(&netns, "").unwrap();
        let pin = netns.clone();
        // Mounts are seen by this test's threads only: they share its mount namespace.
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            mount(Some("/proc/thread-self/ns/net"), &pin, NONE, MsFlags::MS_BIND, NONE).unwrap();
            run("ip", &["link", "set", "lo", "up"]);
        })
        .join()
        .unwrap();
        Attach {
            pod,
            name: "web-0".into(),
            namespace: "shop".into(),
            uid: "u-1".into(),
            netns,
            port_mappings: Vec::new(),
            dns: None,
            annotations: Map::new(),
            labels: Map::new(),
            cgroup_parent: String::new(),
        }
    }

    fn unpin(&self, pod: &Attach) {
        umount2(&pod.netns, MntFlags::MNT_DETACH).unwrap();
        fs::remove_file(&pod.netns).unwrap();
    }

    /// Addresses that host-local has given away.
    fn allocated(&self) -> BTreeSet<String> {
        let Ok(entries) = fs::read_dir(self.path("ipam/real")) else { return BTreeSet::new() };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.parse::<IpAddr>().is_ok()).collect()
    }

    fn records(&self) -> usize {
        fs::read_dir(self.path("attachments")).unwrap().count()
    }

    /// Everything of a pod that a node can be left with: interfaces and rules.
    fn state(&self) -> String {
        let links = run("ip", &["-o", "link", "show", "type", "veth"]);
        let ifbs = run("ip", &["-o", "link", "show", "type", "ifb"]);
        let rules: String = ["iptables-save", "ip6tables-save"]
            .iter()
            .flat_map(|save| {
                let all = run(save, &[]);
                all.lines().map(str::to_owned).collect::<Vec<_>>()
            })
            // Chains that are made once for all pods stay, and counters count.
            .filter(|line| line.starts_with("-A") && line.contains("10.213.0."))
            .map(|line| line + "\n")
            .collect();
        links + &ifbs + &rules
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Else the directory cannot be removed.
        for pin in fs::read_dir(self.path("netns")).into_iter().flatten().flatten() {
            let _ = umount2(&pin.path(), MntFlags::MNT_DETACH);
        }
    }
}

fn run(program: &str, args: &[&str]) -> String {
    let Output { status, stdout, stderr } =
        Command::new(program).args(args).stdin(Stdio::null()).output().unwrap();
    let stderr = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{program} {args:?}: {status}: {stderr}");
    String::from_utf8(stdout).unwrap()
}

/// A server in a pod's network that answers once, on port 80 of all addresses.
fn serve(pod: &Attach) {
    let netns = fs::File::open(&pod.netns).unwrap();
    let (ready, is_ready) = mpsc::channel();
    thread::spawn(move || {
        setns(netns, CloneFlags::CLONE_NEWNET).unwrap();
        let listener = TcpListener::bind("[::]:80").unwrap();
        ready.send(()).unwrap();
        listener.accept().unwrap().0.write_all(b"hello from the pod").unwrap();
    });
    is_ready.recv().unwrap();
}

/// What the server says, or why it cannot be reached.
fn ask(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// A new IPv6 address is not used before duplicate address detection is done with it.
fn ask_when_usable(address: SocketAddr) -> String {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        match ask(address) {
            Ok(text) => return text,
            Err(error) => assert!(Instant::now() < deadline, "{address}: {error}"),
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn port(host_port: u16) -> PortMapping {
    PortMapping { protocol: Protocol::Tcp, container_port: 80, host_port, host_ip: String::new() }
}

#[test]
fn a_dual_stack_pod_is_reached_by_address_and_host_port_and_leaves_nothing() {
    on_a_node(async |node| {
        node.configure(&[
            json!({"type": "portmap", "capabilities": {"portMappings": true}}),
            json!({"type": "firewall"}),
            json!({"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}}),
        ]);
        let network = node.network();
        network.status().await.unwrap();
        // The first pod makes the bridge and the shared chains.
        let first = node.pod();
        network.attach(&first).await.unwrap();
        let before = node.state();

        let pod = Attach { port_mappings: vec![port(8080)], ..node.pod() };
        let attached: Attached = network.attach(&pod).await.unwrap();
        let [v4, v6] = *attached.ips else { panic!("two addresses: {:?}", attached.ips) };
        assert_eq!(v4.to_string(), "10.213.0.3");
        assert_eq!(v6.to_string(), "fd13::3");
        assert_eq!(attached.mac.as_ref().unwrap().len(), 17);
        assert_eq!(attached.interface, "eth0");
        for address in [SocketAddr::new(v4, 80), SocketAddr::new(v6, 80)] {
            serve(&pod);
            assert_eq!(ask_when_usable(address), "hello from the pod", "{address}");
            // The server took port 80 for one answer; wait until it is free again.
            thread::sleep(Duration::from_millis(50));
        }
        serve(&pod);
        assert_eq!(ask_when_usable("10.213.0.1:8080".parse().unwrap()), "hello from the pod");
        // Not of the other: portmap 1.1.1's CHECK looks for an IPv6 rule that its ADD never makes.
        network.check(&first.pod).await.unwrap();
        assert_eq!(network.attachments().len(), 2);
        assert_eq!(node.allocated().len(), 4);

        let netns = format!("--net={}", first.netns.display());
        let somaxconn = run("nsenter", &[&netns, "sysctl", "-n", "net.core.somaxconn"]);
        assert_eq!(somaxconn.trim(), "500");
        network.detach(&pod.pod).await.unwrap();
        assert_eq!(node.state(), before);
        assert_eq!(node.allocated().len(), 2);

        run("nsenter", &[&netns, "ip", "route", "del", "default"]);
        let error = chain(&network.check(&first.pod).await.unwrap_err());
        assert!(error.starts_with("network real: plugin bridge: CHECK: "), "{error}");
        network.detach(&first.pod).await.unwrap();
        assert_eq!(node.state(), "");
        assert!(node.allocated().is_empty(), "{:?}", node.allocated());
        assert_eq!(node.records(), 0);
        network.gc(&[]).await.unwrap();
    });
}

#[test]
fn bandwidth_annotations_reach_the_kernel() {
    on_a_node(async |node| {
        node.configure(&[json!({"type": "bandwidth", "capabilities": {"bandwidth": true}})]);
        let network = node.network();
        let mut pod = node.pod();
        for way in ["ingress", "egress"] {
            pod.annotations.insert(format!("kubernetes.io/{way}-bandwidth"), "8M".into());
        }
        network.attach(&pod).await.unwrap();
        let shaping = run("tc", &["qdisc", "show"]);
        assert_eq!(shaping.matches("tbf").count(), 2, "{shaping}");
        assert_eq!(shaping.matches("rate 8Mbit").count(), 2, "{shaping}");
        network.detach(&pod.pod).await.unwrap();
        assert_eq!(node.state(), "");
    });
}

#[test]
fn no_address_leaks_over_twenty_reboots() {
    on_a_node(async |node| {
        node.configure(&[json!({"type": "portmap", "capabilities": {"portMappings": true}})]);
        for boot in 0..20 {
            let network = node.network();
            for pod in network.attachments() {
                network.detach(&pod).await.unwrap();
            }
            assert!(node.allocated().is_empty(), "boot {boot}: {:?}", node.allocated());
            let pods = [node.pod(), Attach { port_mappings: vec![port(8080)], ..node.pod() }];
            for pod in &pods {
                network.attach(pod).await.unwrap();
                // A boot takes the namespaces; the records and host-local's files stay.
                node.unpin(pod);
            }
            assert_eq!(node.allocated().len(), 4);
        }
        node.network().gc(&[]).await.unwrap();
        assert!(node.allocated().is_empty());
        assert_eq!(node.records(), 0);
    });
}

#[test]
fn a_plugin_that_fails_after_the_bridge_leaves_nothing_of_it() {
    on_a_node(async |node| {
        let fails = node.path("bin/fails");
        let script = "#!/bin/sh\n[ $CNI_COMMAND = ADD ] || exit 0\n\
                      echo '{\"code\":100,\"msg\":\"out of order\"}'; exit 1\n";
        fs::write(&fails, script).unwrap();
        fs::set_permissions(&fails, fs::Permissions::from_mode(0o755)).unwrap();
        node.configure(&[
            json!({"type": "portmap", "capabilities": {"portMappings": true}}),
            json!({"type": "fails"}),
        ]);
        let network = node.network();
        let pod = Attach { port_mappings: vec![port(8080)], ..node.pod() };
        let error = chain(&network.attach(&pod).await.unwrap_err());
        assert_eq!(error, "network real: plugin fails: ADD: code 100: out of order");
        assert_eq!(node.state(), "");
        assert!(node.allocated().is_empty(), "{:?}", node.allocated());
        assert_eq!(node.records(), 0);
        // The same pod once the fault is mended.
        node.configure(&[json!({"type": "portmap", "capabilities": {"portMappings": true}})]);
        network.attach(&pod).await.unwrap();
        network.detach(&pod.pod).await.unwrap();
        assert_eq!(node.state(), "");
    });
}

#[test]
fn a_full_pool_is_an_error_that_names_it() {
    on_a_node(async |node| {
        node.configure(&[]);
        let path = node.path("conf/10.conflist");
        let small = fs::read_to_string(&path).unwrap().replace("10.213.0.0/24", "10.213.0.0/30");
        fs::write(&path, small).unwrap();
        let network = node.network();
        network.attach(&node.pod()).await.unwrap();
        let pod = node.pod();
        let error = chain(&network.attach(&pod).await.unwrap_err());
        assert!(error.starts_with("network real: plugin bridge: ADD: code "), "{error}");
        assert!(error.contains("no IP addresses available"), "{error}");
        assert_eq!(node.records(), 2, "the record and the result of the first pod");
    });
}

#[test]
fn many_pods_at_once_get_addresses_of_their_own() {
    on_a_node(async |node| {
        node.configure(&[json!({"type": "portmap", "capabilities": {"portMappings": true}})]);
        let network = node.network();
        let pods: Vec<_> = (0..20).map(|_| node.pod()).collect();
        let attached = futures::future::join_all(pods.iter().map(|pod| network.attach(pod))).await;
        let ips: BTreeSet<_> = attached.into_iter().flat_map(|a| a.unwrap().ips).collect();
        assert_eq!(ips.len(), 40);
        let detached =
            futures::future::join_all(pods.iter().map(|pod| network.detach(&pod.pod))).await;
        for detached in detached {
            detached.unwrap();
        }
        assert!(node.allocated().is_empty(), "{:?}", node.allocated());
        assert_eq!(node.state(), "");
    });
}

#[test]
fn the_configuration_that_we_ship_works_with_these_plugins() {
    on_a_node(async |node| {
        let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/cni/10-holdfast.conflist");
        let mut list: Value = serde_json::from_slice(&fs::read(shipped).unwrap()).unwrap();
        // The one change: addresses are noted in this test's directory, not in the node's.
        list["plugins"][0]["ipam"]["dataDir"] = json!(node.path("ipam"));
        fs::write(node.path("conf/10-holdfast.conflist"), list.to_string()).unwrap();
        let network = node.network();
        network.status().await.unwrap();
        let pod = Attach { port_mappings: vec![port(8080)], ..node.pod() };
        let attached = network.attach(&pod).await.unwrap();
        serve(&pod);
        assert_eq!(ask_when_usable(SocketAddr::new(attached.ips[0], 80)), "hello from the pod");
        network.detach(&pod.pod).await.unwrap();
        assert_eq!(run("ip", &["-o", "link", "show", "type", "veth"]), "");
        assert_eq!(node.records(), 0);
    });
}

/// The same two plugins as [`Network::attach`] runs, run by hand.
fn bare(node: &Node, pod: &Attach, verb: &str, list: &Value) {
    let mut plugins: Vec<_> = list["plugins"].as_array().unwrap().iter().collect();
    if verb == "DEL" {
        plugins.reverse();
    }
    let mut previous: Option<Value> = None;
    for plugin in plugins {
        let mut config = plugin.clone();
        config["name"] = list["name"].clone();
        config["cniVersion"] = list["cniVersion"].clone();
        if let Some(previous) = previous {
            config["prevResult"] = previous;
        }
        let mut child = Command::new(Path::new(PLUGINS).join(plugin["type"].as_str().unwrap()))
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", pod.pod.as_str())
            .env("CNI_NETNS", &pod.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", PLUGINS)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .current_dir(node.dir.path())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        previous = serde_json::from_slice(&output.stdout).ok();
    }
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[test]
fn the_runtime_costs_little_over_the_bare_plugins() {
    let _alone = QUIET.write().unwrap_or_else(PoisonError::into_inner);
    alone_on_a_node(async |node| {
        node.configure(&[json!({"type": "portmap", "capabilities": {"portMappings": true}})]);
        let path = node.path("conf/10.conflist");
        let mut list: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        // With IPv6 the plugins wait for duplicate address detection, which hides all else.
        list["plugins"][0]["ipam"]["ranges"].as_array_mut().unwrap().truncate(1);
        list["plugins"][0]["ipam"]["routes"].as_array_mut().unwrap().truncate(1);
        fs::write(&path, list.to_string()).unwrap();
        let network = node.network();
        // The first makes the bridge and the shared chains.
        network.attach(&node.pod()).await.unwrap();
        let mut times: [Vec<Duration>; 4] = Default::default();
        for round in 0..40 {
            let (ours, theirs) = (node.pod(), node.pod());
            // In turns, each first in half of the rounds, so that both see the same load.
            for turn in 0..4 {
                let (adds, is_ours) = (turn < 2, (turn + round) % 2 == 0);
                let started = Instant::now();
                match (adds, is_ours) {
                    (true, true) => drop(network.attach(&ours).await.unwrap()),
                    (true, false) => bare(&node, &theirs, "ADD", &list),
                    (false, true) => network.detach(&ours.pod).await.unwrap(),
                    (false, false) => bare(&node, &theirs, "DEL", &list),
                }
                times[usize::from(!adds) * 2 + usize::from(!is_ours)].push(started.elapsed());
            }
        }
        let [add, bare_add, del, bare_del] = times.each_mut().map(|times| median(times));
        println!(
            "ADD: {add:?}, bare plugins {bare_add:?}; DEL: {del:?}, bare plugins {bare_del:?}"
        );
        // The goal is 2 ms; the bound leaves room for a machine that is busy with other tests.
        let bound = Duration::from_millis(20);
        assert!(add < bare_add + bound, "ADD {add:?}, bare plugins {bare_add:?}");
        assert!(del < bare_del + bound, "DEL {del:?}, bare plugins {bare_del:?}");
    });
}

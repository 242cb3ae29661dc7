//! The runtime against scripted plugins. No root: the network namespace is the test's own.

use std::{fs, os::unix::fs::PermissionsExt};

use serde_json::json;
use tempfile::TempDir;

use super::*;

/// Far longer than any scripted plugin takes, far shorter than a test may.
const LONG: Duration = Duration::from_secs(20);

/// A directory with configurations, plugins and attachments.
struct Node {
    dir: TempDir,
}

const VERSIONS: &str = r#"VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}' ;;"#;

impl Node {
    fn new() -> Self {
        let node = Self { dir: tempfile::tempdir().unwrap() };
        for name in ["conf", "bin", "seen"] {
            fs::create_dir(node.path(name)).unwrap();
        }
        std::os::unix::fs::symlink("/proc/self/ns/net", node.path("netns")).unwrap();
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn network(&self, timeout: Duration) -> Network {
        let config = crate::config::Network {
            conf_dir: self.path("conf"),
            bin_dirs: vec![self.path("nowhere"), self.path("bin")],
            timeout,
        };
        Network::open(config, self.path("attachments")).unwrap()
    }

    fn conf(&self, name: &str, config: &Value) {
        fs::write(self.path("conf").join(name), config.to_string()).unwrap();
    }

    /// A network of these plugins, with CNI `version`.
    fn list(&self, version: &str, plugins: &[&str]) {
        let plugins: Vec<_> = plugins.iter().map(|kind| json!({"type": kind})).collect();
        self.conf(
            "10.conflist",
            &json!({"cniVersion": version, "name": "net", "plugins": plugins}),
        );
    }

    /// A plugin that notes each call and then does what `cases` say, as in `ADD) … ;;`.
    fn plugin(&self, name: &str, cases: &str) {
        let path = self.path("bin").join(name);
        let script = format!(
            r#"#!/bin/sh
dir={dir}
echo "{name} $CNI_COMMAND" >> $dir/seen/calls
cat > $dir/seen/{name}.$CNI_COMMAND.json
env > $dir/seen/{name}.$CNI_COMMAND.env
case $CNI_COMMAND in
{cases}
{VERSIONS}
esac
"#,
            dir = self.dir.path().display()
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A plugin whose ADD gives the pod an address.
    fn good(&self, name: &str) {
        self.plugin(name, &format!("ADD) {} ;;", print(&result("10.1.0.5/16"))));
    }

    /// Calls so far, without those of VERSION.
    fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("seen/calls")).unwrap_or_default();
        text.lines().filter(|line| !line.ends_with("VERSION")).map(str::to_owned).collect()
    }

    fn stdin(&self, plugin: &str, verb: &str) -> Value {
        let bytes = fs::read(self.path("seen").join(format!("{plugin}.{verb}.json"))).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }

    fn env(&self, plugin: &str, verb: &str, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.path("seen").join(format!("{plugin}.{verb}.env")));
        let text = text.unwrap();
        let found = text.lines().find_map(|line| line.strip_prefix(&format!("{name}=")));
        found.map(str::to_owned)
    }

    fn pod(&self) -> Attach {
        Attach {
            pod: PodId::random(),
            name: "web-0".into(),
            namespace: "shop".into(),
            uid: "u-1".into(),
            netns: self.path("netns"),
            port_mappings: Vec::new(),
            dns: None,
            annotations: Labels::new(),
            labels: Labels::new(),
            cgroup_parent: String::new(),
        }
    }

    fn records(&self) -> usize {
        fs::read_dir(self.path("attachments")).unwrap().count()
    }
}

fn result(address: &str) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "interfaces": [
            {"name": "hf0"},
            {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/x"},
        ],
        "ips": [{"address": address, "interface": 1}, {"address": "fd00::5/64", "interface": 1}],
    })
}

fn print(value: &Value) -> String {
    format!("echo '{value}'")
}

fn text(error: &Error) -> String {
    chain(error)
}

/// Waits for something that another task or process does.
async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not so after {LONG:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_chain_is_added_in_order_and_deleted_in_reverse_with_all_it_needs() {
    let node = Node::new();
    let record = "test -s $dir/attachments/$CNI_CONTAINERID.json || exit 9";
    let first = json!({"cniVersion": "1.0.0", "ips": [{"address": "10.1.0.4/16"}], "mine": 1});
    node.plugin("first", &format!("ADD) {record}; {} ;;", print(&first)));
    node.plugin("second", &format!("ADD) {record}; {} ;;", print(&result("10.1.0.5/16"))));
    node.conf(
        "10.conflist",
        &json!({
            "cniVersion": "1.0.0",
            "name": "net",
            "plugins": [
                {"type": "first", "name": "other", "cniVersion": "0.1.0", "x": [1, 2]},
                {"type": "second", "capabilities": {"portMappings": true, "mac": false},
                 "args": {"cni": {"ips": ["10.1.0.9"]}}},
            ],
        }),
    );
    let network = node.network(LONG);
    let mut pod = node.pod();
    pod.port_mappings = vec![PortMapping {
        protocol: crate::pod::config::Protocol::Tcp,
        container_port: 80,
        host_port: 8080,
        host_ip: String::new(),
    }];
    pod.annotations.insert("cni.holdfast/mac".into(), "02:00:00:00:00:09".into());
    pod.labels.insert("app".into(), "web".into());
    let attached = network.attach(&pod).await.unwrap();
    let ips: Vec<_> = attached.ips.iter().map(ToString::to_string).collect();
    assert_eq!(ips, ["10.1.0.5", "fd00::5"]);
    assert_eq!(attached.mac.as_deref(), Some("02:00:00:00:00:01"));
    assert_eq!(attached.result, result("10.1.0.5/16"));
    assert_eq!(network.attachments(), std::slice::from_ref(&pod.pod));
    let labels = json!([{"key": "app", "value": "web"}]);
    assert_eq!(
        node.stdin("first", "ADD"),
        json!({
            "type": "first", "name": "net", "cniVersion": "1.0.0", "x": [1, 2],
            "args": {"cni": {"labels": labels}},
        })
    );
    let ports = json!([
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""},
    ]);
    let mut second = json!({
        "type": "second", "name": "net", "cniVersion": "1.0.0",
        "capabilities": {"portMappings": true, "mac": false},
        "runtimeConfig": {"portMappings": ports},
        "args": {"cni": {"ips": ["10.1.0.9"], "labels": labels}},
        "prevResult": first,
    });
    assert_eq!(node.stdin("second", "ADD"), second);
    let path = format!("{}:{}", node.path("nowhere").display(), node.path("bin").display());
    for verb in ["ADD", "DEL"] {
        if verb == "DEL" {
            network.detach(&pod.pod).await.unwrap();
        }
        let env = |name| node.env("second", verb, name).unwrap();
        assert_eq!(env("CNI_CONTAINERID"), pod.pod.as_str());
        assert_eq!(env("CNI_NETNS"), node.path("netns").display().to_string());
        assert_eq!(env("CNI_IFNAME"), "eth0");
        assert_eq!(env("CNI_PATH"), path);
        assert!(env("CNI_ARGS").starts_with("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;"));
        assert!(!env("PATH").is_empty());
    }
    second["prevResult"] = result("10.1.0.5/16");
    assert_eq!(node.stdin("second", "DEL"), second);
    assert_eq!(node.stdin("first", "DEL")["prevResult"], second["prevResult"]);
    assert_eq!(node.calls(), ["first ADD", "second ADD", "second DEL", "first DEL"]);
    assert_eq!(node.records(), 0);
    assert!(network.attachments().is_empty());
    network.detach(&pod.pod).await.unwrap();
    assert_eq!(node.calls().len(), 4, "a second detach has nothing to do");
}

#[tokio::test]
async fn a_failed_add_is_undone_and_says_which_plugin_failed_and_why() {
    let table = [
        (
            r#"echo '{"code":11,"msg":"no addresses","details":"pool is full"}'; exit 1"#,
            "network net: plugin second: ADD: code 11: no addresses: pool is full",
            Kind::Unavailable,
        ),
        (
            r#"echo '{"code":7,"msg":"bad"}'; exit 1"#,
            "network net: plugin second: ADD: code 7: bad",
            Kind::Internal,
        ),
        (
            "echo oh no >&2; echo dear >&2; exit 3",
            "network net: plugin second: ADD: exit status: 3: oh no dear",
            Kind::Internal,
        ),
        (
            "echo not json; exit 2",
            "network net: plugin second: ADD: exit status: 2: not json",
            Kind::Internal,
        ),
        (
            "kill -9 $$",
            "network net: plugin second: ADD: signal: 9 (SIGKILL), without any output",
            Kind::Internal,
        ),
        ("true", "network net: plugin second: ADD: its answer is of no use", Kind::Internal),
        ("echo pony", "it begins with \"pony\"", Kind::Internal),
        (r#"echo '{"cniVersion":"1.0.0"}'"#, "it has no address for eth0", Kind::Internal),
        (
            "head -c 2000000 /dev/zero; sleep 60",
            "network net: plugin second: ADD: printed more than 1048576 bytes; it was killed",
            Kind::Internal,
        ),
    ];
    for (script, expected, kind) in table {
        let node = Node::new();
        node.good("first");
        node.plugin("second", &format!("ADD) {script} ;;"));
        node.good("third");
        node.list("1.0.0", &["first", "second"]);
        let network = node.network(LONG);
        let pod = node.pod();
        let error = network.attach(&pod).await.unwrap_err();
        assert!(text(&error).contains(expected), "{script}: {}", text(&error));
        assert_eq!(error.kind(), kind, "{script}");
        assert_eq!(node.calls(), ["first ADD", "second ADD", "second DEL", "first DEL"]);
        assert_eq!(node.stdin("first", "DEL").get("prevResult"), None);
        assert_eq!(node.records(), 0);
    }
}

#[tokio::test]
async fn a_plugin_that_hangs_is_killed_with_its_helpers_at_the_deadline() {
    let node = Node::new();
    node.good("first");
    // Neither the plugin nor its helper minds SIGTERM.
    node.plugin("hangs", "ADD) trap '' TERM; sleep 60 & echo $$ $! > $dir/pids; wait; sleep 60 ;;");
    node.list("1.0.0", &["first", "hangs"]);
    let network = node.network(Duration::from_millis(300));
    let started = Instant::now();
    let error = network.attach(&node.pod()).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert_eq!(error.kind(), Kind::Deadline);
    let said = text(&error);
    assert!(said.starts_with("network net: plugin hangs: ADD: not finished after 0."), "{said}");
    for pid in fs::read_to_string(node.path("pids")).unwrap().split_whitespace() {
        let stat = PathBuf::from(format!("/proc/{pid}/stat"));
        until("the plugin and its helper are dead", || {
            fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "))
        })
        .await;
    }
    assert_eq!(node.calls(), ["first ADD", "hangs ADD", "hangs DEL", "first DEL"]);
    assert_eq!(node.records(), 0);
}

#[tokio::test]
async fn the_deadline_is_that_of_the_list_and_a_hung_undo_keeps_the_record() {
    let node = Node::new();
    node.plugin("slow", &format!("ADD) sleep 0.2; {} ;; DEL) sleep 60 ;;", print(&json!({}))));
    node.list("1.0.0", &["slow", "slow", "slow", "slow", "slow", "slow"]);
    let network = node.network(Duration::from_millis(500));
    let pod = node.pod();
    let started = Instant::now();
    let error = network.attach(&pod).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(text(&error).contains("plugin slow: ADD: not finished"), "{}", text(&error));
    assert!(node.calls().iter().filter(|call| *call == "slow ADD").count() < 5);
    assert_eq!(network.attachments(), std::slice::from_ref(&pod.pod));
    // Once the plugin is well again, the next garbage collection has nothing to be told.
    node.good("slow");
    network.gc(&[]).await.unwrap();
    assert!(network.attachments().is_empty());
    assert_eq!(node.records(), 0);
}

#[tokio::test]
async fn a_daemon_that_a_plugin_leaves_behind_does_not_hold_up_the_pod() {
    let node = Node::new();
    let good = print(&result("10.1.0.5/16"));
    node.plugin("forks", &format!("ADD) sleep 3 & {good} ;;"));
    node.list("1.0.0", &["forks"]);
    let started = Instant::now();
    node.network(LONG).attach(&node.pod()).await.unwrap();
    assert!(started.elapsed() < Duration::from_millis(2500), "{:?}", started.elapsed());
}

#[tokio::test]
async fn pods_do_not_wait_for_each_other() {
    let node = Node::new();
    let good = print(&result("10.1.0.5/16"));
    node.plugin("fussy", &format!("ADD) case $CNI_ARGS in *stuck*) sleep 60 ;; esac; {good} ;;"));
    node.list("1.0.0", &["fussy"]);
    let network = node.network(Duration::from_secs(3));
    let stuck = Attach { name: "stuck".into(), ..node.pod() };
    let waiting = tokio::spawn({
        let (network, stuck) = (network.clone(), stuck.clone());
        async move { network.attach(&stuck).await }
    });
    until("the stuck ADD runs", || node.calls().len() == 1).await;
    let started = Instant::now();
    network.attach(&node.pod()).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert!(!waiting.is_finished());
    assert_eq!(waiting.await.unwrap().unwrap_err().kind(), Kind::Deadline);
}

#[tokio::test]
async fn a_caller_that_goes_away_does_not_stop_the_work_and_its_retry_joins() {
    let node = Node::new();
    let good = print(&result("10.1.0.5/16"));
    node.plugin("slow", &format!("ADD) sleep 0.5; {good} ;;"));
    node.list("1.0.0", &["slow"]);
    let network = node.network(LONG);
    let pod = node.pod();
    let given_up = tokio::time::timeout(Duration::from_millis(50), network.attach(&pod)).await;
    assert!(given_up.is_err());
    let attached = network.attach(&pod).await.unwrap();
    assert_eq!(attached.ips[0].to_string(), "10.1.0.5");
    assert_eq!(node.calls(), ["slow ADD"]);
    // A detach waits for an ADD in progress.
    let other = node.pod();
    let given_up = tokio::time::timeout(Duration::from_millis(50), network.attach(&other)).await;
    assert!(given_up.is_err());
    network.detach(&other.pod).await.unwrap();
    assert_eq!(node.calls(), ["slow ADD", "slow ADD", "slow DEL"]);
    let given_up = tokio::time::timeout(Duration::from_millis(50), network.attach(&other)).await;
    assert!(given_up.is_err());
    network.drain().await;
    assert_eq!(network.attachments().len(), 2);
}

#[tokio::test]
async fn the_next_daemon_detaches_by_the_record_even_if_the_configuration_is_gone() {
    let node = Node::new();
    node.good("old");
    node.list("0.4.0", &["old"]);
    let pod = node.pod();
    node.network(LONG).attach(&pod).await.unwrap();
    fs::remove_file(node.path("conf/10.conflist")).unwrap();
    // As after a boot: the place of the namespace is gone.
    fs::remove_file(node.path("netns")).unwrap();

    let network = node.network(LONG);
    assert_eq!(network.attachments(), std::slice::from_ref(&pod.pod));
    network.detach(&pod.pod).await.unwrap();
    assert_eq!(node.env("old", "DEL", "CNI_NETNS").as_deref(), Some(""));
    let stdin = node.stdin("old", "DEL");
    assert_eq!((&stdin["name"], &stdin["cniVersion"]), (&json!("net"), &json!("0.4.0")));
    assert_eq!(stdin["prevResult"]["ips"][0]["address"], "10.1.0.5/16");
    assert_eq!(stdin["prevResult"]["ips"][0]["version"], "4");
    assert_eq!(node.records(), 0);
}

#[tokio::test]
async fn a_failed_del_keeps_the_record_and_an_unknown_container_is_a_success() {
    let node = Node::new();
    let good = print(&result("10.1.0.5/16"));
    let fails = |code: u32| {
        let refuse = format!(r#"echo '{{"code":{code},"msg":"no"}}'; exit 1"#);
        node.plugin("moody", &format!("ADD) {good} ;; DEL) {refuse} ;;"));
    };
    node.good("first");
    node.list("1.0.0", &["first", "moody"]);
    fails(100);
    let network = node.network(LONG);
    let pod = node.pod();
    network.attach(&pod).await.unwrap();
    let error = network.detach(&pod.pod).await.unwrap_err();
    assert_eq!(text(&error), "network net: plugin moody: DEL: code 100: no");
    assert_eq!(node.calls().last().unwrap(), "moody DEL", "the list stops at a failure");
    assert_eq!(network.attachments(), std::slice::from_ref(&pod.pod));
    fs::remove_file(node.path("bin/moody")).unwrap();
    let error = text(&network.detach(&pod.pod).await.unwrap_err());
    assert!(error.contains("plugin moody is not installed; looked in"), "{error}");
    fails(3);
    network.detach(&pod.pod).await.unwrap();
    assert_eq!(node.calls()[3..], ["moody DEL", "first DEL"]);
    assert_eq!(node.records(), 0);
}

/// What a daemon leaves that was killed in the middle of an ADD: plugin and record, no result.
fn killed_daemon(node: &Node, pod: &Attach) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let network = node.network(LONG);
        let attach = tokio::time::timeout(LONG, network.attach(pod));
        tokio::select! {
            _ = attach => panic!("ADD ended too early"),
            () = until("ADD runs", || node.calls().iter().any(|call| call.ends_with("ADD"))) => {}
        }
    });
    runtime.shutdown_background();
}

#[test]
fn the_next_daemon_waits_for_the_plugin_of_a_killed_one_before_it_deletes() {
    let node = Node::new();
    let add = "sleep 1; echo 'slow ADDED' >> $dir/seen/calls";
    node.plugin("slow", &format!("ADD) {add} ;;"));
    node.list("1.0.0", &["slow"]);
    let pod = node.pod();
    killed_daemon(&node, &pod);
    assert_eq!(node.calls(), ["slow ADD"]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let network = node.network(LONG);
        assert_eq!(network.attachments(), std::slice::from_ref(&pod.pod));
        network.detach(&pod.pod).await.unwrap();
        assert_eq!(node.calls(), ["slow ADD", "slow ADDED", "slow DEL"]);
        assert_eq!(node.records(), 0);
    });
}

#[test]
fn an_add_that_a_killed_daemon_began_is_deleted_before_it_is_done_again() {
    let node = Node::new();
    node.plugin("hangs", "ADD) sleep 60 ;;");
    node.list("1.0.0", &["hangs"]);
    let pod = node.pod();
    killed_daemon(&node, &pod);
    node.good("hangs");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        // The hung plugin is killed when its time is over.
        let network = node.network(Duration::from_secs(1));
        network.attach(&pod).await.unwrap();
        assert_eq!(node.calls(), ["hangs ADD", "hangs DEL", "hangs ADD"]);
        assert!(!orphan::scan().contains_key(&pod.pod), "the hung plugin is gone");
        // A further daemon that attaches the same pod to the same namespace joins.
        node.network(LONG).attach(&pod).await.unwrap();
        assert_eq!(node.calls().len(), 3);
    });
}

#[tokio::test]
async fn readiness_has_a_reason_that_an_administrator_can_act_on() {
    let node = Node::new();
    let network = node.network(LONG);
    let reason = async |network: &Network| {
        let error = network.status().await.unwrap_err();
        assert_eq!(error.kind(), Kind::Precondition);
        text(&error)
    };
    let conf = node.path("conf").display().to_string();
    let said = reason(&network).await;
    let expected = format!("no network configuration in {conf}: it has no .conf, .conflist or");
    assert!(said.starts_with(&expected), "{said}");
    fs::write(node.path("conf/05.conf"), "{").unwrap();
    let said = reason(&network).await;
    assert!(said.contains("05.conf: it is not valid JSON"), "{said}");
    let error = network.attach(&node.pod()).await.unwrap_err();
    assert!(matches!(error, Error::NoConfig { .. }), "{error}");
    node.list("1.1.0", &["first", "second"]);
    node.good("first");
    let said = reason(&network).await;
    let bins = format!("{}, {}", node.path("nowhere").display(), node.path("bin").display());
    assert_eq!(said, format!("network net: plugin second is not installed; looked in {bins}"));
    // Files that cannot be executed are not plugins.
    fs::write(node.path("bin/second"), "").unwrap();
    let network = node.network(LONG);
    assert!(reason(&network).await.contains("second is not installed"));
    let old = r#"VERSION) echo '{"supportedVersions":["0.4.0","1.0.0"]}' ;;"#;
    node.plugin("second", old);
    let said = reason(&node.network(LONG)).await;
    assert_eq!(
        said,
        "network net: plugin second speaks CNI 0.4.0, 1.0.0, the configuration asks for 1.1.0"
    );
    fs::remove_dir_all(node.path("conf")).unwrap();
    let said = reason(&node.network(LONG)).await;
    assert!(said.contains("No such file or directory"), "{said}");
    assert!(node.calls().is_empty(), "a node that is not ready runs no plugin");
}

#[tokio::test]
async fn status_is_asked_of_every_plugin_and_remembered_for_a_moment() {
    let node = Node::new();
    node.good("first");
    node.good("second");
    node.list("1.1.0", &["first", "second"]);
    let network = node.network(LONG);
    let asked = (0..20).map(|_| network.status());
    for answer in futures::future::join_all(asked).await {
        answer.unwrap();
    }
    assert_eq!(node.calls(), ["first STATUS", "second STATUS"]);
    assert_eq!(node.stdin("second", "STATUS")["name"], "net");
    assert_eq!(node.env("second", "STATUS", "CNI_CONTAINERID"), None);
    let all = fs::read_to_string(node.path("seen/calls")).unwrap();
    assert_eq!(all.lines().filter(|line| line.ends_with("VERSION")).count(), 2);

    node.plugin("first", r#"STATUS) echo '{"code":50,"msg":"agent is down"}'; exit 1 ;;"#);
    let network = node.network(LONG);
    let error = network.status().await.unwrap_err();
    assert_eq!(text(&error), "network net: plugin first: STATUS: code 50: agent is down");
    assert_eq!(error.kind(), Kind::Unavailable);
    // A changed configuration is asked about at once; before 1.1.0 there is nothing to ask.
    node.list("1.0.0", &["first", "second"]);
    network.status().await.unwrap();
}

#[tokio::test]
async fn the_newest_version_that_all_plugins_speak_is_used() {
    let node = Node::new();
    node.good("new");
    let old = r#"VERSION) echo '{"supportedVersions":["0.4.0","1.0.0"]}' ;;"#;
    node.plugin("old", &format!("ADD) {} ;;\n{old}", print(&result("10.1.0.5/16"))));
    node.conf(
        "10.conflist",
        &json!({
            "cniVersion": "0.4.0", "cniVersions": ["0.4.0", "1.0.0", "1.1.0"], "name": "net",
            "plugins": [{"type": "new"}, {"type": "old"}],
        }),
    );
    let network = node.network(LONG);
    network.status().await.unwrap();
    network.attach(&node.pod()).await.unwrap();
    assert_eq!(node.stdin("old", "ADD")["cniVersion"], "1.0.0");
    network.gc(&[]).await.unwrap();
    assert_eq!(node.calls(), ["new ADD", "old ADD"], "1.0.0 has neither STATUS nor GC");
}

#[tokio::test]
async fn garbage_collection_takes_what_is_stale_and_spares_what_is_not() {
    let node = Node::new();
    node.good("first");
    node.good("second");
    node.list("1.1.0", &["first", "second"]);
    let (kept, stale) = (node.pod(), node.pod());
    let before = node.network(LONG);
    before.attach(&kept).await.unwrap();
    before.attach(&stale).await.unwrap();

    let network = node.network(LONG);
    let new = node.pod();
    network.attach(&new).await.unwrap();
    let before = node.calls().len();
    network.gc(std::slice::from_ref(&kept.pod)).await.unwrap();
    assert_eq!(node.calls()[before..], ["second DEL", "first DEL", "first GC", "second GC"]);
    assert_eq!(node.env("first", "DEL", "CNI_CONTAINERID").unwrap(), stale.pod.as_str());
    let stdin = node.stdin("second", "GC");
    let mut expected = [&kept.pod, &new.pod];
    expected.sort();
    let expected = json!([
        {"containerID": expected[0], "ifname": "eth0"},
        {"containerID": expected[1], "ifname": "eth0"},
    ]);
    assert_eq!(stdin["cni.dev/valid-attachments"], expected);
    assert_eq!(stdin["cni.dev/attachments"], expected);
    assert_eq!(node.env("second", "GC", "CNI_CONTAINERID"), None);

    // Every step is tried, and the first failure is told.
    node.plugin("first", r#"DEL|GC) echo '{"code":100,"msg":"no"}'; exit 1 ;;"#);
    let network = node.network(LONG);
    let before = node.calls().len();
    let error = network.gc(std::slice::from_ref(&new.pod)).await.unwrap_err();
    assert_eq!(text(&error), "network net: plugin first: DEL: code 100: no");
    assert_eq!(node.calls()[before..], ["second DEL", "first DEL", "first GC", "second GC"]);
    let left = json!([{"containerID": new.pod, "ifname": "eth0"}]);
    assert_eq!(node.stdin("second", "GC")["cni.dev/valid-attachments"], left);
    assert_eq!(network.attachments().len(), 2);

    let config = json!({
        "cniVersion": "1.1.0", "name": "net", "disableGC": true, "plugins": [{"type": "second"}],
    });
    node.conf("10.conflist", &config);
    let before = node.calls().len();
    network.gc(&[kept.pod.clone(), new.pod.clone()]).await.unwrap();
    assert_eq!(node.calls().len(), before);
}

#[tokio::test]
async fn garbage_is_not_collected_while_a_pod_is_being_attached() {
    let node = Node::new();
    let good = print(&result("10.1.0.5/16"));
    node.plugin(
        "slow",
        &format!("ADD) sleep 0.5; {good}; echo 'slow ADDED' >> $dir/seen/calls ;;"),
    );
    node.list("1.1.0", &["slow"]);
    let network = node.network(LONG);
    let pod = node.pod();
    let attaching = tokio::spawn({
        let (network, pod) = (network.clone(), pod.clone());
        async move { network.attach(&pod).await }
    });
    until("ADD runs", || node.calls().len() == 1).await;
    network.gc(&[]).await.unwrap();
    attaching.await.unwrap().unwrap();
    assert_eq!(node.calls(), ["slow ADD", "slow ADDED", "slow GC"]);
    assert_eq!(network.attachments(), [pod.pod]);
}

#[tokio::test]
async fn check_asks_with_the_result_unless_the_configuration_forbids_it() {
    let node = Node::new();
    let good = print(&result("10.1.0.5/16"));
    node.plugin(
        "eager",
        &format!("ADD) {good} ;; CHECK) echo '{{\"code\":101,\"msg\":\"gone\"}}'; exit 1 ;;"),
    );
    node.list("1.0.0", &["eager"]);
    let network = node.network(LONG);
    let pod = node.pod();
    let error = network.check(&pod.pod).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    network.attach(&pod).await.unwrap();
    let error = network.check(&pod.pod).await.unwrap_err();
    assert_eq!(text(&error), "network net: plugin eager: CHECK: code 101: gone");
    assert_eq!(node.stdin("eager", "CHECK")["prevResult"], result("10.1.0.5/16"));

    let config = |version: &str, disabled: bool| {
        json!({"cniVersion": version, "name": "net", "disableCheck": disabled,
               "plugins": [{"type": "eager"}]})
    };
    node.conf("10.conflist", &config("1.0.0", true));
    let quiet = node.pod();
    network.attach(&quiet).await.unwrap();
    network.check(&quiet.pod).await.unwrap();
    node.conf("10.conflist", &config("0.3.1", false));
    let old = node.pod();
    network.attach(&old).await.unwrap();
    let error = network.check(&old.pod).await.unwrap_err();
    assert_eq!(text(&error), "network net: CNI 0.3.1 has no CHECK");
    network.detach(&old.pod).await.unwrap();
    assert_eq!(node.stdin("eager", "DEL").get("prevResult"), None, "DEL has it from 0.4.0 on");
}

#[tokio::test]
async fn what_cannot_be_asked_for_is_refused_before_anything_is_done() {
    let node = Node::new();
    node.good("first");
    node.list("1.0.0", &["first"]);
    let network = node.network(LONG);
    let pod = node.pod();
    let mut refused = vec![
        (Attach { name: "a;b".into(), ..pod.clone() }, Kind::Invalid),
        (Attach { netns: node.path("conf"), ..pod.clone() }, Kind::Precondition),
        (Attach { netns: node.path("nothing"), ..pod.clone() }, Kind::Precondition),
    ];
    let mut fast = pod.clone();
    fast.annotations.insert("kubernetes.io/egress-bandwidth".into(), "fast".into());
    refused.push((fast, Kind::Invalid));
    for (pod, kind) in refused {
        let error = network.attach(&pod).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
    assert!(node.calls().is_empty());
    assert_eq!(node.records(), 0);
}

#[tokio::test]
async fn a_damaged_record_is_freed_with_the_current_configuration() {
    let node = Node::new();
    node.good("first");
    let pod = PodId::random();
    fs::create_dir(node.path("attachments")).unwrap();
    fs::write(node.path("attachments").join(format!("{pod}.json")), "{\"half").unwrap();
    let network = node.network(LONG);
    let error = text(&network.detach(&pod).await.unwrap_err());
    assert!(error.contains("is damaged") && error.contains("remove the file"), "{error}");
    node.list("1.0.0", &["first"]);
    network.detach(&pod).await.unwrap();
    assert_eq!(node.env("first", "DEL", "CNI_CONTAINERID").unwrap(), pod.as_str());
    assert_eq!(node.records(), 0);
}

#[tokio::test]
async fn a_full_disk_stops_an_attach_but_not_a_detach() {
    // `/dev/full` says ENOSPC to every write, and nothing else of a full disk is needed here.
    let node = Node::new();
    node.good("first");
    node.list("1.0.0", &["first"]);
    let network = node.network(LONG);
    let (pod, other) = (node.pod(), node.pod());
    network.attach(&pod).await.unwrap();
    let temporary = node.path("attachments").join(format!("{}.tmp", other.pod));
    std::os::unix::fs::symlink("/dev/full", temporary).unwrap();
    let error = network.attach(&other).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Exhausted, "{}", text(&error));
    network.detach(&pod.pod).await.unwrap();
    assert_eq!(node.calls(), ["first ADD", "first DEL"]);
    assert_eq!(node.records(), 0);
}

#[tokio::test]
async fn config_info_tells_what_is_used_and_what_is_not() {
    let node = Node::new();
    fs::write(node.path("conf/05.conf"), "{").unwrap();
    node.good("first");
    node.list("1.0.0", &["first", "second"]);
    let info = node.network(LONG).config_info();
    assert_eq!(info["network"]["name"], "net");
    assert_eq!(info["network"]["file"], json!(node.path("conf/10.conflist")));
    assert_eq!(info["network"]["plugins"][0]["path"], json!(node.path("bin/first")));
    assert_eq!(info["network"]["plugins"][1]["path"], Value::Null);
    assert_eq!(info["skipped"][0]["file"], json!(node.path("conf/05.conf")));
    assert_eq!(info["attachments"], 0);
}

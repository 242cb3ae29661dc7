//! The real `holdfast` against a fake CRI server: what it asks, what it prints, how it exits.

mod fake;
mod streaming;

use std::{
    fs,
    path::Path,
    process::{Output, Stdio},
    time::Duration,
};

use fake::{Fake, State};
use holdfast_protos::cri;
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    process::Command,
};
use tonic::Code;

/// For anything that must happen; a test that gets there has failed.
const DEADLINE: Duration = Duration::from_secs(30);

struct Node {
    dir: TempDir,
    fake: Fake,
}

impl Node {
    fn new(state: State) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let fake = Fake::serve(dir.path(), state);
        Self { dir, fake }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = holdfast(words);
        command.env("HOLDFAST_ADDRESS", &self.fake.socket);
        command
    }

    async fn run(&self, words: &[&str]) -> Ran {
        ran(self.command(words)).await
    }

    fn calls(&self) -> Vec<String> {
        self.fake.state().calls.clone()
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }
}

fn holdfast(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast"));
    command.args(words).env_remove("HOLDFAST_PASSWORD").stdin(Stdio::null()).kill_on_drop(true);
    command
}

#[derive(Debug)]
struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().expect("it was not killed by a signal"),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

async fn ran(mut command: Command) -> Ran {
    tokio::time::timeout(DEADLINE, command.output()).await.expect("it ends").unwrap().into()
}

impl Ran {
    #[track_caller]
    fn ok(self) -> String {
        assert_eq!((self.code, &*self.err), (0, ""), "{self:?}");
        self.out
    }

    #[track_caller]
    fn fails(self, code: i32, expected: &str) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        assert!(self.err.contains(expected), "{expected}: {self:?}");
        self
    }
}

fn id(first: &str) -> String {
    format!("{first:0<64}")
}

fn pod(first: &str, name: &str) -> cri::PodSandbox {
    cri::PodSandbox {
        id: id(first),
        metadata: Some(cri::PodSandboxMetadata {
            name: name.into(),
            namespace: "default".into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn container(first: &str, pod: &str, name: &str, state: cri::ContainerState) -> cri::Container {
    cri::Container {
        id: id(first),
        pod_sandbox_id: id(pod),
        metadata: Some(cri::ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(cri::ImageSpec {
            image: "sha256:00112233445566778899".into(),
            user_specified_image: "r/app:1".into(),
            ..Default::default()
        }),
        state: state.into(),
        ..Default::default()
    }
}

/// Two pods: web (ready, containers app and sidecar, the latter exited) and db (stopped).
fn two_pods() -> State {
    use cri::ContainerState::{ContainerExited, ContainerRunning};
    let mut db = pod("b2", "db");
    db.state = cri::PodSandboxState::SandboxNotready.into();
    State {
        pods: vec![pod("a1", "web"), db],
        containers: vec![
            container("c1", "a1", "app", ContainerRunning),
            container("c2", "a1", "sidecar", ContainerExited),
        ],
        ..Default::default()
    }
}

fn with_image() -> State {
    let image = cri::Image {
        id: "sha256:feed".to_owned() + &"0".repeat(60),
        repo_tags: vec!["r:5000/busybox:1".into()],
        size: 1_500_000,
        ..Default::default()
    };
    State { images: vec![image], has_admin: true, ..Default::default() }
}

#[tokio::test]
async fn pods_are_a_table_json_yaml_or_ids() {
    let node = Node::new(two_pods());
    let table = node.run(&["pods"]).await.ok();
    assert_eq!(
        table,
        "POD ID          NAME   NAMESPACE   STATE       AGE   ATTEMPT   RUNTIME\n\
         a100000000000   web    default     ready       -     0         (default)\n\
         b200000000000   db     default     not ready   -     0         (default)\n"
    );
    let json: Value = serde_json::from_str(&node.run(&["pods", "-o", "json"]).await.ok()).unwrap();
    assert_eq!(json["items"][0]["id"], id("a1"));
    assert_eq!(json["items"][0]["state"], "SANDBOX_READY");
    let yaml = node.run(&["pods", "-o", "yaml"]).await.ok();
    assert!(yaml.starts_with("items:\n- id: "), "{yaml}");
    assert_eq!(node.run(&["pods", "-q"]).await.ok(), format!("{}\n{}\n", id("a1"), id("b2")));
    assert_eq!(node.run(&["pods", "--ready", "-o", "name"]).await.ok(), id("a1") + "\n");
    assert_eq!(node.run(&["pods", "-n", "other", "-q"]).await.ok(), "");
    assert_eq!(node.run(&["pods", "-l", "a=b", "-q"]).await.ok(), "");
}

#[tokio::test]
async fn ps_shows_what_runs_and_with_a_all() {
    let node = Node::new(two_pods());
    assert_eq!(
        node.run(&["ps"]).await.ok(),
        "CONTAINER ID    NAME   STATE     AGE   ATTEMPT   IMAGE     POD   NAMESPACE\n\
         c100000000000   app    running   -     0         r/app:1   web   default\n"
    );
    assert_eq!(node.run(&["ps", "-aq"]).await.ok(), format!("{}\n{}\n", id("c1"), id("c2")));
    assert_eq!(node.run(&["ps", "-aq", "--pod", "db"]).await.ok(), "");
    let json: Value = serde_json::from_str(&node.run(&["ps", "-o", "json"]).await.ok()).unwrap();
    assert_eq!(json["containers"][0]["state"], "CONTAINER_RUNNING");
    node.run(&["ps", "--pod", "nope"]).await.fails(1, "there is no pod nope");
}

#[tokio::test]
async fn images_are_listed_inspected_and_removed() {
    let node = Node::new(with_image());
    assert_eq!(
        node.run(&["images"]).await.ok(),
        "IMAGE            TAG   IMAGE ID        SIZE\n\
         r:5000/busybox   1     feed000000000   1.4MiB\n"
    );
    assert_eq!(node.run(&["image", "ls"]).await.ok(), node.run(&["images"]).await.ok());
    let inspected = node.run(&["image", "inspect", "feed"]).await.ok();
    let json: Value = serde_json::from_str(&inspected).unwrap();
    assert_eq!(json["image"]["size"], "1500000");
    assert_eq!(node.run(&["rmi", "r:5000/busybox:1"]).await.ok(), "r:5000/busybox:1\n");
    assert_eq!(node.run(&["image", "rm", "feed"]).await.ok(), "feed\n");
    // By name only that name goes; the beginning of an id is made whole.
    let full = "sha256:feed".to_owned() + &"0".repeat(60);
    assert_eq!(
        node.calls(),
        ["RemoveImage r:5000/busybox:1".to_owned(), format!("RemoveImage {full}")]
    );
    let ran = node.run(&["rmi", "nope", "feed"]).await;
    assert_eq!(ran.out, "feed\n", "one that fails does not keep the others");
    ran.fails(1, "there is no image nope");
}

#[tokio::test]
async fn pull_reports_each_layer_and_prints_the_id() {
    let node = Node::new(with_image());
    let ran = node.run(&["pull", "r:5000/a:1"]).await;
    assert_eq!((ran.code, &*ran.out), (0, "sha256:9011ed\n"));
    assert_eq!(ran.err, "1a7e12: done 2.0KiB\n");
    assert_eq!(node.run(&["pull", "-q", "r:5000/a:1"]).await.ok(), "sha256:9011ed\n");
}

#[tokio::test]
async fn passwords_come_from_the_environment_or_stdin() {
    let node = Node::new(with_image());
    let mut by_env = node.command(&["pull", "-q", "-u", "me", "r/a"]);
    by_env.env("HOLDFAST_PASSWORD", "from env");
    ran(by_env).await.ok();

    let mut by_stdin = node.command(&["pull", "-q", "-u", "me", "--password-stdin", "r/a"]);
    let mut child = by_stdin
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"from stdin\n").await.unwrap();
    let output = tokio::time::timeout(DEADLINE, child.wait_with_output()).await.unwrap().unwrap();
    Ran::from(output).ok();

    node.run(&["pull", "-q", "-u", "me:from:line", "r/a"]).await.ok();
    let passwords: Vec<_> =
        node.fake.state().pulls.iter().map(|p| (p.username.clone(), p.password.clone())).collect();
    let expected = [("me", "from env"), ("me", "from stdin"), ("me", "from:line")];
    assert_eq!(passwords, expected.map(|(u, p)| (u.to_owned(), p.to_owned())));

    let ran = node.run(&["pull", "-u", "me", "r/a"]).await;
    ran.fails(1, "there is no password for me\n  set HOLDFAST_PASSWORD");
    node.run(&["pull", "--password-stdin", "r/a"]).await.fails(2, "--user");
}

#[tokio::test]
async fn a_refused_pull_says_what_to_do() {
    let mut state = with_image();
    state.failures.insert("PullImage", (Code::PermissionDenied, "registry r says 401"));
    let ran = Node::new(state).run(&["pull", "r/a"]).await;
    assert_eq!(
        ran.fails(1, "").err,
        "holdfast: pull r/a: registry r says 401\n  for a registry, give -u USER and the password in \
         HOLDFAST_PASSWORD or by --password-stdin\n"
    );
}

#[tokio::test]
async fn without_our_service_pull_uses_the_cri() {
    let node = Node::new(State::default());
    assert_eq!(node.run(&["pull", "r/a"]).await.ok(), "sha256:c41\n");
    assert_eq!(node.calls(), ["CriPullImage r/a"]);
    node.run(&["pull", "--platform", "linux/arm64", "r/a"]).await.fails(1, "--platform needs");
    node.run(&["image", "import", "/dev/null"]).await.fails(1, "this holdfastd does not have that");
}

#[tokio::test]
async fn import_sends_the_whole_archive() {
    let node = Node::new(with_image());
    let archive: Vec<u8> = (0..5_000_000_u32).map(|n| (n % 251) as u8).collect();
    fs::write(node.path("a.tar"), &archive).unwrap();
    let imported = node.run(&["image", "import", "--name", "r/x:1", &node.path("a.tar")]).await;
    assert_eq!(imported.ok(), "sha256:13 r/x:1\n");
    assert!(node.fake.state().imported == archive, "the archive arrived as it is");
    assert_eq!(node.fake.state().import_name, "r/x:1");

    let mut by_stdin = node.command(&["image", "import", "-"]);
    by_stdin.stdin(fs::File::open(node.path("a.tar")).unwrap());
    let unnamed = ran(by_stdin).await;
    assert_eq!((unnamed.code, &*unnamed.out), (0, "sha256:13\n"));
    assert!(unnamed.err.contains("--name"), "{unnamed:?}");
    assert!(node.fake.state().imported == archive);
}

#[tokio::test]
async fn an_archive_that_cannot_be_read_is_not_imported() {
    let node = Node::new(with_image());
    node.run(&["image", "import", "/nonexistent.tar"]).await.fails(1, "open /nonexistent.tar");
    // A directory opens, and fails when it is read.
    let dir = node.path("");
    node.run(&["image", "import", &dir]).await.fails(1, "Is a directory");
    assert!(node.calls().is_empty(), "{:?}", node.calls());
}

#[tokio::test]
async fn run_prints_the_log_and_returns_the_exit_code() {
    let node = Node::new(State {
        log: "2024-05-01T12:00:00Z stdout P he\n2024-05-01T12:00:00Z stderr F oops\n\
              2024-05-01T12:00:00Z stdout F llo\n"
            .into(),
        exits: Some(7),
        ..with_image()
    });
    let logs = node.path("logs");
    let words = ["run", "--name", "web", "--log-dir", &logs, "r:5000/busybox:1", "sh", "-c", "x"];
    let ran = node.run(&words).await;
    assert_eq!((ran.code, &*ran.out, &*ran.err), (7, "hello\n", "oops\n"));
    {
        let state = node.fake.state();
        assert_eq!(state.container_configs[0].args, ["sh", "-c", "x"]);
        assert_eq!(state.pod_configs[0].log_directory, logs);
        let metadata = state.pod_configs[0].metadata.clone().unwrap();
        assert_eq!((&*metadata.name, &*metadata.namespace), ("web", "default"));
        let pod = &state.pods[0].id;
        let expected = [
            "RunPodSandbox",
            "CreateContainer",
            "StartContainer",
            &format!("StopPodSandbox {pod}"),
        ];
        assert_eq!(state.calls, expected, "it stays, stopped, and no pull was needed");
    }
    let again = node.run(&words).await;
    again.fails(125, "there is a pod web already\n  choose another --name, or remove it");
}

#[tokio::test]
async fn run_rm_removes_the_pod_and_run_pulls_what_is_missing() {
    let node = Node::new(State { exits: Some(0), ..with_image() });
    let logs = node.path("logs");
    let ran = node.run(&["run", "--rm", "--log-dir", &logs, "--runtime", "crun", "r/new:1"]).await;
    assert_eq!((ran.code, &*ran.out), (0, ""), "{ran:?}");
    assert!(node.fake.state().pods.is_empty());
    let calls = node.calls();
    assert_eq!(calls[..2], ["PullImage r/new:1", "RunPodSandbox crun"]);
    let image = node.fake.state().container_configs[0].image.clone().unwrap();
    assert_eq!((&*image.image, &*image.user_specified_image), ("sha256:9011ed", "r/new:1"));
}

#[tokio::test]
async fn run_d_prints_the_pod_and_leaves_it() {
    let node = Node::new(with_image());
    let logs = node.path("logs");
    let out = node.run(&["run", "-d", "--log-dir", &logs, "r:5000/busybox:1"]).await.ok();
    let state = node.fake.state();
    assert_eq!(out, state.pods[0].id.clone() + "\n");
    let name = &state.pods[0].metadata.as_ref().unwrap().name;
    assert!(name.starts_with("busybox-"), "{name}");
    assert_eq!(state.calls, ["RunPodSandbox", "CreateContainer", "StartContainer"]);
}

#[tokio::test]
async fn a_run_that_fails_leaves_nothing() {
    for step in ["CreateContainer", "StartContainer"] {
        let mut state = with_image();
        state.failures.insert(step, (Code::Internal, "runc says no"));
        let node = Node::new(state);
        let logs = node.path("logs");
        let ran = node.run(&["run", "--log-dir", &logs, "r:5000/busybox:1"]).await;
        ran.fails(125, "the container: runc says no");
        assert!(node.fake.state().pods.is_empty(), "{step}: the pod is removed");
    }
    // What could not be removed is named.
    let mut state = with_image();
    state.failures.insert("CreateContainer", (Code::Internal, "no"));
    state.failures.insert("StopPodSandbox", (Code::Internal, "cni says no"));
    let node = Node::new(state);
    let ran = node.run(&["run", "--log-dir", &node.path("l"), "r:5000/busybox:1"]).await;
    let pod = node.fake.state().pods[0].id.clone();
    ran.fails(125, &format!("pod {pod} could not be removed: cni says no"));
}

#[tokio::test]
async fn a_pod_that_came_after_the_deadline_is_removed() {
    let node = Node::new(State { mute: true, ..with_image() });
    let logs = node.path("logs");
    let words = ["run", "--timeout", "500ms", "--log-dir", &logs, "r:5000/busybox:1"];
    node.run(&words).await.fails(125, "create the pod: no answer from");
    assert!(node.calls().contains(&"RunPodSandbox".to_owned()));
    assert!(node.fake.state().pods.is_empty());
}

#[tokio::test]
async fn run_never_pulls_when_told_so() {
    let node = Node::new(with_image());
    let ran = node.run(&["run", "--pull", "never", "--log-dir", &node.path("l"), "r/new:1"]).await;
    ran.fails(125, "there is no image r/new:1").fails(125, "leave out --pull never");
    assert!(node.calls().is_empty());
    node.run(&["run", "--net", "host", "-p", "1:1", "x"]).await.fails(125, "--publish needs");
    node.run(&["run", "-it", "x"]).await.fails(125, "-t needs a terminal");
}

#[tokio::test]
async fn ctrl_c_stops_the_container_and_its_exit_code_is_returned() {
    let node =
        Node::new(State { log: "2024-05-01T12:00:00Z stdout F ready\n".into(), ..with_image() });
    let logs = node.path("logs");
    let mut child = node
        .command(&["run", "--rm", "--log-dir", &logs, "r:5000/busybox:1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = tokio::time::timeout(DEADLINE, lines.next_line()).await.expect("a line").unwrap();
    assert_eq!(line.as_deref(), Some("ready"));
    let pid = nix::unistd::Pid::from_raw(child.id().unwrap() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let status = tokio::time::timeout(DEADLINE, child.wait()).await.expect("it ends").unwrap();
    assert_eq!(status.code(), Some(143));
    assert!(node.fake.state().pods.is_empty(), "--rm");
    let calls = node.calls();
    assert!(
        calls.iter().any(|c| c.starts_with("StopContainer") && c.ends_with(" 10")),
        "{calls:?}"
    );
}

#[tokio::test]
async fn exec_returns_what_the_command_does() {
    let mut state = two_pods();
    state.exec =
        cri::ExecSyncResponse { stdout: b"out\n".into(), stderr: b"err\n".into(), exit_code: 3 };
    let node = Node::new(state);
    let ran = node.run(&["--timeout", "90s", "exec", "app", "ls", "-l"]).await;
    assert_eq!((ran.code, &*ran.out, &*ran.err), (3, "out\n", "err\n"));
    node.run(&["--timeout", "1500ms", "exec", "web/app", "--", "true"]).await;
    assert_eq!(
        node.calls(),
        [format!("ExecSync {} 90 ls -l", id("c1")), format!("ExecSync {} 2 true", id("c1"))],
        "a timeout is whole seconds, rounded up"
    );
    node.run(&["exec", "web", "true"]).await.fails(125, "more than one container");
}

#[tokio::test]
async fn stop_and_rm_take_pods_and_containers() {
    let node = Node::new(two_pods());
    assert_eq!(node.run(&["stop", "-t", "3", "app"]).await.ok(), "app\n");
    assert_eq!(node.calls(), [format!("StopContainer {} 3", id("c1"))]);
    node.fake.state().calls.clear();

    assert_eq!(node.run(&["stop", "web"]).await.ok(), "web\n");
    let stops = [format!("StopContainer {} 10", id("c1")), format!("StopPodSandbox {}", id("a1"))];
    assert_eq!(node.calls(), stops, "containers get their grace before the pod is stopped");

    node.fake.state().calls.clear();
    node.run(&["rm", "app"]).await.fails(1, "is running\n  stop it first, or use rm -f");
    assert_eq!(node.run(&["rm", "-f", "app", "sidecar"]).await.ok(), "app\nsidecar\n");
    assert_eq!(node.run(&["rm", "web"]).await.ok(), "web\n", "it was stopped above");
    assert_eq!(node.run(&["rm", "b2"]).await.ok(), "b2\n");
    assert!(node.fake.state().pods.is_empty() && node.fake.state().containers.is_empty());
    let ran = node.run(&["rm", "web"]).await;
    ran.fails(1, "there is no pod or container web\n  see `holdfast pods` and `holdfast ps -a`");
}

#[tokio::test]
async fn inspect_finds_pods_containers_and_images() {
    let mut state = two_pods();
    state.images = with_image().images;
    state.status.insert(id("c1"), cri::ContainerStatus { id: id("c1"), ..Default::default() });
    let node = Node::new(state);
    let json = |text: String| serde_json::from_str::<Value>(&text).unwrap();
    let pod = json(node.run(&["inspect", "web"]).await.ok());
    assert_eq!(pod["status"]["id"], id("a1"));
    assert_eq!(pod["info"]["shim"]["pid"], 7, "info is JSON, not text with JSON in it");
    let container = json(node.run(&["inspect", "c1"]).await.ok());
    assert_eq!(container["status"]["state"], "CONTAINER_CREATED");
    let image = json(node.run(&["inspect", "r:5000/busybox:1"]).await.ok());
    assert_eq!(image["image"]["repoTags"][0], "r:5000/busybox:1");
    let yaml = node.run(&["inspect", "-o", "yaml", "web", "db"]).await.ok();
    assert_eq!(yaml.matches("---\n").count(), 1, "{yaml}");
    node.run(&["inspect", "-t", "pod", "app"]).await.fails(1, "there is no pod app");
    node.run(&["inspect", "nope"]).await.fails(1, "no pod, container or image nope");
}

fn with_log(log: &Path) -> State {
    let mut state = two_pods();
    let status = cri::ContainerStatus {
        id: id("c1"),
        state: cri::ContainerState::ContainerRunning.into(),
        log_path: log.to_string_lossy().into_owned(),
        ..Default::default()
    };
    state.status.insert(id("c1"), status);
    state
}

#[tokio::test]
async fn logs_join_parts_and_can_be_cut() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("0.log");
    fs::write(
        &log,
        "2024-05-01T12:00:01Z stdout F one\n2024-05-01T12:00:02Z stdout P tw\n\
         2024-05-01T12:00:03Z stderr F three\n2024-05-01T12:00:04Z stdout F o\n",
    )
    .unwrap();
    let node = Node::new(with_log(&log));
    let ran = node.run(&["logs", "app"]).await;
    assert_eq!((ran.code, &*ran.out, &*ran.err), (0, "one\ntwo\n", "three\n"));
    let ran = node.run(&["logs", "--tail", "1", "-t", "app"]).await;
    assert_eq!((&*ran.out, &*ran.err), ("2024-05-01T12:00:02Z two\n", ""));
    let ran = node.run(&["logs", "--since", "2024-05-01T12:00:03Z", "app"]).await;
    assert_eq!((&*ran.out, &*ran.err), ("", "three\n"));
    node.run(&["logs", "-p", "app"]).await.fails(1, "has no earlier attempt");
    fs::remove_file(&log).unwrap();
    node.run(&["logs", "app"]).await.fails(1, "is not there");
}

#[tokio::test]
async fn following_a_log_survives_rotation_and_ends_with_the_container() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("0.log");
    let record = |n: u32| format!("2024-05-01T12:00:00Z stdout F {n}\n");
    fs::write(&log, record(1)).unwrap();
    let node = Node::new(with_log(&log));
    let mut child = node.command(&["logs", "-f", "app"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = async || {
        let line = tokio::time::timeout(DEADLINE, lines.next_line()).await.expect("a line");
        line.unwrap()
    };
    assert_eq!(next().await.as_deref(), Some("1"));

    // The kubelet renames, and asks for a new file; the writer writes on until then.
    let old = dir.path().join("0.log.20240501");
    fs::rename(&log, &old).unwrap();
    let mut old = fs::OpenOptions::new().append(true).open(old).unwrap();
    std::io::Write::write_all(&mut old, record(2).as_bytes()).unwrap();
    fs::write(&log, record(3)).unwrap();
    assert_eq!(next().await.as_deref(), Some("2"));
    assert_eq!(next().await.as_deref(), Some("3"));

    // A daemon that cannot be reached for a while does not end it.
    node.fake.state().failures.insert("ContainerStatus", (Code::Unavailable, "restarting"));
    let mut file = fs::OpenOptions::new().append(true).open(&log).unwrap();
    std::io::Write::write_all(&mut file, record(4).as_bytes()).unwrap();
    assert_eq!(next().await.as_deref(), Some("4"));
    node.fake.state().failures.clear();

    // What was written before the exit is printed.
    std::io::Write::write_all(&mut file, record(5).as_bytes()).unwrap();
    node.fake.state().status.get_mut(&id("c1")).unwrap().state =
        cri::ContainerState::ContainerExited.into();
    assert_eq!(next().await.as_deref(), Some("5"));
    assert_eq!(next().await, None);
    let status = tokio::time::timeout(DEADLINE, child.wait()).await.expect("it ends").unwrap();
    assert!(status.success());
}

#[tokio::test]
async fn stats_show_cpu_between_two_looks() {
    let stats = |timestamp, used| {
        let value = |value| Some(cri::UInt64Value { value });
        vec![cri::ContainerStats {
            attributes: Some(cri::ContainerAttributes { id: id("c1"), ..Default::default() }),
            cpu: Some(cri::CpuUsage {
                timestamp,
                usage_core_nano_seconds: value(used),
                ..Default::default()
            }),
            memory: Some(cri::MemoryUsage {
                working_set_bytes: value(1 << 20),
                available_bytes: value(3 << 20),
                ..Default::default()
            }),
            ..Default::default()
        }]
    };
    let mut state = two_pods();
    state.stats = [stats(1_000, 0), stats(3_000, 1_000), stats(5_000, 1)].into();
    let node = Node::new(state);
    assert_eq!(
        node.run(&["stats", "web"]).await.ok(),
        "CONTAINER ID    NAME   POD   CPU     MEMORY   LIMIT    DISK   INODES\n\
         c100000000000   app    web   50.0%   1.0MiB   4.0MiB   -      -\n"
    );
    let json = node.run(&["stats", "--no-stream", "-o", "json"]).await.ok();
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["stats"][0]["memory"]["workingSetBytes"]["value"], "1048576");
}

#[tokio::test]
async fn info_says_what_is_not_ready_and_why() {
    let node = Node::new(State { not_ready: true, ..Default::default() });
    assert_eq!(
        node.run(&["info"]).await.ok(),
        "Runtime         fake 1.2.3\n\
         CRI             v1\n\
         RuntimeReady    yes\n\
         NetworkReady    no: NoNetworkConfig: no file in /etc/cni/net.d\n\
         Cgroup driver   cgroupfs\n\
         Handlers        (default), crun, runc\n\
         NRI plugins     -\n\
         Images          3.0MiB in /var/lib/holdfast\n"
    );
    let json: Value = serde_json::from_str(&node.run(&["info", "-o", "json"]).await.ok()).unwrap();
    assert_eq!(json["info"]["config"]["root"], "/x");
    assert_eq!(json["runtimeConfig"]["linux"]["cgroupDriver"], "CGROUPFS");
}

#[tokio::test]
async fn version_is_the_clients_and_the_daemons() {
    let own = env!("CARGO_PKG_VERSION");
    let node = Node::new(State::default());
    let expected = format!("client     {own}\ndaemon     fake 1.2.3\nCRI        v1\n");
    assert_eq!(node.run(&["version"]).await.ok(), expected);
    let json: Value =
        serde_json::from_str(&node.run(&["version", "-o", "json"]).await.ok()).unwrap();
    assert_eq!(json["server"]["runtimeName"], "fake");
    // The client's own is known without a daemon.
    let ran = ran(holdfast(&["version", "--address", "/nonexistent.sock"])).await;
    assert_eq!(ran.out, format!("client     {own}\n"));
    ran.fails(1, "is holdfastd running?");
}

#[tokio::test]
async fn a_daemon_that_is_not_there_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let ps = async |address: &str| ran(holdfast(&["ps", "--address", address])).await;
    ps(&at("none")).await.fails(1, "is holdfastd running?").fails(1, "--address");
    // A socket that nobody listens on any more.
    drop(std::os::unix::net::UnixListener::bind(at("dead")).unwrap());
    ps(&at("dead")).await.fails(1, "holdfastd is not running");
    ps("tcp://127.0.0.1:1").await.fails(1, "tcp is not supported");
    // One that listens and never answers.
    let _mute = std::os::unix::net::UnixListener::bind(at("mute")).unwrap();
    let mute = holdfast(&["ps", "--timeout", "300ms", "--address", &at("mute")]);
    ran(mute).await.fails(1, "in 300ms").fails(1, "--timeout");
}

#[tokio::test]
async fn a_reader_that_goes_away_is_no_error() {
    let mut state = two_pods();
    state.pods = (0..5_000).map(|n| pod(&format!("{n:x}"), "web")).collect();
    let node = Node::new(state);
    let script = format!("set -o pipefail; {} pods | head -n 1", env!("CARGO_BIN_EXE_holdfast"));
    let mut bash = Command::new("bash");
    bash.args(["-c", &script]).env("HOLDFAST_ADDRESS", &node.fake.socket).kill_on_drop(true);
    let out = ran(bash).await.ok();
    assert!(out.starts_with("POD ID"), "{out}");
}

#[tokio::test]
async fn completions_are_printed_for_every_shell() {
    for shell in ["bash", "zsh", "fish"] {
        let script = ran(holdfast(&["completion", shell])).await.ok();
        assert!(script.contains("holdfast") && script.contains("inspect"), "{shell}");
    }
}

#[tokio::test]
async fn wrong_command_lines_exit_with_2() {
    ran(holdfast(&["prs"])).await.fails(2, "unrecognized subcommand");
    ran(holdfast(&["pods", "-o", "xml"]))
        .await
        .fails(2, "possible values: table, json, yaml, name");
}

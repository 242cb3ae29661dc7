//! The real `holdfastd`: its configuration commands, and `publish`.

use std::{
    fs,
    io::Write as _,
    process::{Command, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use holdfast_protos::shim::{
    api::ForwardRequest,
    protobuf::{
        Message as _,
        well_known_types::{any::Any, empty::Empty},
    },
    shim_async, ttrpc,
};

fn holdfastd(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_holdfastd"));
    command.args(words).env_remove("TTRPC_ADDRESS").stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[track_caller]
fn refused(output: &Output, code: i32, expected: &str) {
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert!(error.contains(expected), "{error}");
    assert_eq!(error.lines().count(), 1, "one line: {error}");
}

#[test]
fn the_default_configuration_is_what_deploy_has() {
    let output = holdfastd(&["config", "default"]).output().unwrap();
    assert!(output.status.success());
    let deployed = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/config.toml");
    assert_eq!(
        text(&output.stdout),
        fs::read_to_string(deployed).unwrap(),
        "write it anew: holdfastd config default > deploy/config.toml"
    );
}

#[test]
fn every_key_is_in_the_configuration_reference() {
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
    let docs = fs::read_to_string(docs).unwrap();
    let output = holdfastd(&["config", "default"]).output().unwrap();
    let mut table = String::new();
    let mut count = 0;
    for line in text(&output.stdout).lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            table = format!("{name}.");
        } else if let Some((key, value)) = line.split_once(" = ")
            && !line.starts_with('#')
            && !table.starts_with("runtime.handlers.")
        {
            let row = format!("| `{table}{key}` | ");
            let documented = docs.lines().find(|l| l.starts_with(&row));
            let documented = documented.unwrap_or_else(|| panic!("{table}{key} has no row"));
            assert!(documented.contains(&format!("| `{value}` |")), "{documented}: {value}");
            count += 1;
        }
    }
    assert!(count > 25, "{count}");
    for key in ["runtime.handlers.NAME.path", "runtime.handlers.NAME.shim"] {
        assert!(docs.contains(&format!("| `{key}` | ")), "{key} has no row");
    }
}

#[test]
fn a_dump_is_what_is_in_effect() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.toml");
    fs::write(&file, "[log]\nlevel = \"warn\"").unwrap();
    fs::create_dir(dir.path().join("c.toml.d")).unwrap();
    fs::write(dir.path().join("c.toml.d/1.toml"), "[grpc]\ngid = 9").unwrap();
    let file = file.to_str().unwrap();
    let output = holdfastd(&["--config", file, "config", "dump"]).output().unwrap();
    assert!(output.status.success());
    let dump = text(&output.stdout);
    assert!(dump.contains("level = \"warn\"") && dump.contains("gid = 9"), "{dump}");
    let output = holdfastd(&["config", "check", "-c", file]).output().unwrap();
    assert_eq!(
        (output.status.code(), text(&output.stdout)),
        (Some(0), "the configuration is valid\n")
    );
}

#[test]
fn a_wrong_configuration_is_refused_before_anything_starts() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.toml");
    fs::write(&file, "[runtime]\ndefualt = \"runc\"").unwrap();
    let path = file.to_str().unwrap();
    for words in [&["--config", path][..], &["--config", path, "config", "check"]] {
        let expected =
            format!("{path}:2: unknown key runtime.defualt, did you mean runtime.default?");
        refused(&holdfastd(words).output().unwrap(), 2, &expected);
    }
    refused(&holdfastd(&["-c", "/nonexistent"]).output().unwrap(), 2, "/nonexistent");
}

#[test]
fn a_wrong_log_level_is_refused() {
    let output = holdfastd(&["--log-level", "a=b=c"]).output().unwrap();
    refused(&output, 2, "--log-level \"a=b=c\" is not a level or filter");
}

struct Events(tokio::sync::mpsc::UnboundedSender<ForwardRequest>);

#[async_trait::async_trait]
impl shim_async::Events for Events {
    async fn forward(
        &self,
        _: &ttrpc::r#async::TtrpcContext,
        request: ForwardRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.send(request).unwrap();
        Ok(Empty::new())
    }
}

fn publish(words: &[&str], env: Option<&str>, stdin: &[u8]) -> Output {
    let mut command = holdfastd(words);
    if let Some(address) = env {
        command.env("TTRPC_ADDRESS", address);
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may have refused already, without reading.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    child.wait_with_output().unwrap()
}

fn event() -> Vec<u8> {
    let mut any = Any::new();
    any.type_url = "containerd.events.TaskExit".into();
    any.value = b"\x0a\x01x".into();
    any.write_to_bytes().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn publish_forwards_the_event_on_stdin() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("events.sock");
    let address = format!("unix://{}", socket.display());
    let (sent, mut received) = tokio::sync::mpsc::unbounded_channel();
    let mut server = ttrpc::r#async::Server::new()
        .bind(&address)
        .unwrap()
        .register_service(shim_async::create_events(Arc::new(Events(sent))));
    server.start().await.unwrap();

    let plain = socket.to_str().unwrap().to_owned();
    let (by_env, by_argument) = (address.clone(), plain.clone());
    let outputs = tokio::task::spawn_blocking(move || {
        let rest = ["publish", "--topic", "/tasks/exit", "--namespace", "k8s.io"];
        let words = |address| [&["--address", address], &rest[..]].concat();
        [
            // As containerd calls it: -address is not the ttrpc socket, the environment has that.
            publish(&words("/other.sock"), Some(&by_env), &event()),
            publish(&words(&by_argument), None, &event()),
        ]
    })
    .await
    .unwrap();
    for output in outputs {
        assert!(output.status.success(), "{}", text(&output.stderr));
        let request =
            tokio::time::timeout(Duration::from_secs(10), received.recv()).await.unwrap().unwrap();
        assert_eq!(request.envelope.topic, "/tasks/exit");
        assert_eq!(request.envelope.namespace, "k8s.io");
        assert!(request.envelope.timestamp.seconds > 1_700_000_000);
        assert_eq!(request.envelope.event.type_url, "containerd.events.TaskExit");
        assert_eq!(request.envelope.event.value, b"\x0a\x01x");
    }
}

#[test]
fn publish_says_why_it_cannot() {
    let words = ["--address", "/nonexistent.sock", "publish", "--topic", "/t", "--namespace", "n"];
    refused(&publish(&words, None, &event()), 1, "connect to unix:///nonexistent.sock");
    refused(&publish(&words, None, b"\xff\xff"), 1, "no protobuf Any");
    refused(&publish(&words, None, b""), 1, "has no type");
    refused(&publish(&words[2..], None, &event()), 1, "publish needs --address");
}

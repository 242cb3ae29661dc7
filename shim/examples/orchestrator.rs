//! Runs one pod with one container, and nothing else: no daemon, no images, no CNI.
//!
//! ```text
//! orchestrator SHIM ROOTFS COMMAND [ARGUMENT...]      # as root, with runc in PATH
//! orchestrator target/…/containerd-shim-holdfast-v2 /srv/rootfs /bin/echo hello
//! ```
//! The container's output goes to ours, its exit code becomes ours.

use std::{error::Error, fs, path::Path, process::ExitCode, time::Duration};

use holdfast_shim::{
    bundle::{Bundle, Namespace},
    client::{Client, Command, CreateSandbox, CreateTask},
    events,
    options::PodOptions,
};
use serde_json::json;
use tokio::net::UnixListener;

const DEADLINE: Duration = Duration::from_secs(30);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut words = std::env::args().skip(1);
    let (Some(shim), Some(rootfs)) = (words.next(), words.next()) else {
        return Err("usage: orchestrator SHIM ROOTFS COMMAND [ARGUMENT...]".into());
    };
    let command: Vec<String> = words.collect();
    let state = std::env::temp_dir().join(format!("orchestrator-{}", std::process::id()));
    fs::create_dir(&state)?;
    let code = run(&state, shim.as_ref(), rootfs.as_ref(), &command).await;
    fs::remove_dir_all(&state)?;
    Ok(ExitCode::from(code?))
}

async fn run(
    state: &Path,
    shim: &Path,
    rootfs: &Path,
    command: &[String],
) -> Result<u8, Box<dyn Error>> {
    // Where the shim reports. Answering `true` tells it that the event has arrived.
    let listener = UnixListener::bind(state.join("events.sock"))?;
    let events = events::serve(listener, async |_namespace, event| {
        eprintln!("event: {event:?}");
        true
    });
    let events = tokio::spawn(events);

    // The pod: its bundle, its shim, its namespaces.
    let pod = Bundle::new(state.join("pod"));
    fs::create_dir(pod.dir())?;
    let start = Command {
        binary: shim.to_owned(),
        namespace: "example".into(),
        id: "pod".into(),
        bundle: pod.dir().to_owned(),
        events: state.join("events.sock"),
        socket_dir: state.join("s"),
        env: vec![("HOLDFAST_RUNTIME_ROOT".into(), state.join("runc").display().to_string())],
        ..Command::default()
    };
    let endpoint = start.start(DEADLINE).await?;
    let client = Client::connect(&endpoint, DEADLINE).await?.with_deadline(DEADLINE);
    let options = PodOptions {
        hostname: "example".into(),
        net: true,
        ipc: true,
        uts: true,
        ..PodOptions::default()
    };
    let sandbox = CreateSandbox {
        id: "pod".into(),
        bundle: pod.dir().to_owned(),
        options: Some(CreateSandbox::pod_options(&options)),
        ..CreateSandbox::default()
    };
    client.create_sandbox(sandbox).await?;
    client.start_sandbox("pod").await?;

    // The container: an OCI bundle that joins the pod's namespaces.
    let container = Bundle::new(state.join("container"));
    fs::create_dir(container.dir())?;
    let joined = [("network", Namespace::Net), ("ipc", Namespace::Ipc), ("uts", Namespace::Uts)]
        .map(|(kind, ns)| json!({"type": kind, "path": pod.namespace(ns)}));
    let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "pid"})];
    namespaces.extend(joined);
    let spec = json!({
        "ociVersion": "1.0.2",
        "root": {"path": rootfs.canonicalize()?, "readonly": true},
        "process": {"args": command, "cwd": "/", "env": ["PATH=/bin:/usr/bin"],
                    "user": {"uid": 0, "gid": 0}},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": namespaces, "cgroupsPath": format!("/orchestrator-{}", std::process::id())},
    });
    fs::write(container.config(), serde_json::to_vec(&spec)?)?;
    let output = state.join("output");
    let uri = format!("file://{}", output.display());
    let task = CreateTask {
        id: "container".into(),
        bundle: container.dir().to_owned(),
        stdout: uri.clone(),
        stderr: uri,
        ..CreateTask::default()
    };
    let result = async {
        client.create(task).await?;
        client.start("container", "").await?;
        let exited = client.wait("container", "").await?;
        client.delete("container", "").await?;
        Ok::<_, Box<dyn Error>>(exited.status as u8)
    }
    .await;

    // Whatever happened: what the pod has is taken away. Without a shim, `delete` would do it.
    client.stop_sandbox("pod", Duration::ZERO).await?;
    client.shutdown_sandbox("pod").await?;
    client.closed().await;
    events.abort();
    print!("{}", fs::read_to_string(&output).unwrap_or_default());
    result
}

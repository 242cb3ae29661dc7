//! The shims alone, without a daemon: what they cost above the OCI runtime that they call.
//!
//! Ours and containerd's get the same bundles, by the same client; bare runc takes its turn with the
//! same configuration.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command as Program,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use holdfast_protos::shim::{
    oci,
    protobuf::{Message as _, well_known_types::any::Any},
};
use holdfast_shim::{
    bundle::Bundle,
    client::{Client, Command, CreateTask, ExecTask},
};
use serde_json::json;

use super::{
    millis,
    peer::{Containerd, in_path},
    progress, pss,
    samples::{
        CONTAINERD, Column, FLOOR, HOLDFAST, SHIM_BINARY, SHIM_CREATE_START, SHIM_EXEC, SHIM_IDLE,
        SHIM_START, SHIM_UNDER_PEER, Samples,
    },
};
use crate::{
    ground::{Ground, is_zombie, names_in},
    pod::PodBuilder,
};

const DEADLINE: Duration = Duration::from_secs(30);

/// Measures both shims and the floor, in turns.
///
/// # Errors
/// A shim or runc fails.
pub async fn measure(ours: &Path, runc: &Path, rounds: usize, samples: &mut Samples) -> Result<()> {
    let ground = Ground::new()?;
    let rootfs = ground.path().join("rootfs");
    for dir in ["bin", "proc"] {
        fs::create_dir_all(rootfs.join(dir))?;
    }
    fs::copy("/bin/busybox", rootfs.join("bin/busybox"))?;
    let mut sides: Vec<(Column, PathBuf)> = vec![(HOLDFAST, ours.canonicalize()?)];
    sides.extend(in_path("containerd-shim-runc-v2").map(|path| (CONTAINERD, path)));
    for (column, binary) in &sides {
        samples.add(SHIM_BINARY, column, fs::metadata(binary)?.len() as f64 / 1024.0);
    }
    let _events = tokio::net::UnixListener::bind(ground.path().join("events.sock"))?;
    let bench = Bench { ground, rootfs, runc: runc.into() };
    // Once for the page cache.
    bench.floor("warm", &mut Samples::default())?;
    for (column, binary) in &sides {
        bench.shim(column, binary, "warm", &mut Samples::default()).await?;
    }
    for round in 0..rounds {
        progress(format!("shim {}/{rounds}", round + 1));
        bench.floor(&format!("f{round}"), samples)?;
        for (column, binary) in &sides {
            bench.shim(column, binary, &format!("{column}{round}"), samples).await?;
        }
    }
    Ok(())
}

/// Memory of our shim and of containerd's own, both under containerd: idle pods with one container.
///
/// # Errors
/// containerd or a pod fails.
pub async fn under_containerd(
    column: Column,
    peer: &Containerd,
    image: &str,
    samples: &mut Samples,
) -> Result<()> {
    let (cgroup, logs) = (peer.ground().cgroup(), peer.ground().path().join("shim-logs"));
    let mut pods = Vec::new();
    // As many as the memory section has: what they share of the binary counts by their number.
    for number in 0..super::PODS {
        let name = format!("shim{number}");
        let pod = PodBuilder::at(peer.cri(), &name, &cgroup, &logs).host_network().run().await?;
        pod.container(image).command(["/bin/sleep", "100000"]).start().await?;
        pods.push(pod);
    }
    tokio::time::sleep(super::SETTLE).await;
    for pod in &pods {
        let pid = shim_of(&pod.id).with_context(|| format!("the shim of pod {}", pod.id))?;
        samples.add(SHIM_UNDER_PEER, column, pss(pid)?);
    }
    for pod in pods {
        pod.stop().await?;
        pod.remove().await?;
    }
    Ok(())
}

/// The process that was started with `-id` and this id.
pub(super) fn shim_of(id: &str) -> Option<i32> {
    names_in(Path::new("/proc")).iter().filter_map(|name| name.parse().ok()).find(|pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).collect();
        words.windows(2).any(|pair| pair[0] == b"-id" && pair[1] == id.as_bytes())
    })
}

struct Bench {
    ground: Ground,
    rootfs: PathBuf,
    runc: PathBuf,
}

impl Bench {
    fn bundle(&self, id: &str) -> Result<Bundle> {
        let bundle = Bundle::new(self.ground.path().join("bundles").join(id));
        fs::create_dir_all(bundle.rootfs())?;
        let spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": self.rootfs, "readonly": true},
            "process": {
                "user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["PATH=/bin"],
                "args": ["/bin/busybox", "sleep", "100000"],
            },
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {
                "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "ipc"}],
                "cgroupsPath": format!("{}/{id}", self.ground.cgroup()),
            },
        });
        fs::write(bundle.config(), serde_json::to_vec(&spec)?)?;
        Ok(bundle)
    }

    fn root(&self) -> PathBuf {
        self.ground.path().join("runc")
    }

    fn floor(&self, id: &str, samples: &mut Samples) -> Result<()> {
        let bundle = self.bundle(id)?;
        // As a shim has it: runc's state by containerd namespace.
        let root = self.root().join("k8s.io");
        let runc = |words: &[&str]| -> Result<()> {
            // No pipes: a container would inherit and hold them.
            let status = Program::new(&self.runc)
                .arg("--root")
                .arg(&root)
                .args(words)
                .stdin(std::process::Stdio::null())
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .status()?;
            ensure!(status.success(), "runc {words:?}: {status}");
            Ok(())
        };
        let text = |path: PathBuf| path.display().to_string();
        let (dir, pid_file) = (bundle.dir().display().to_string(), text(bundle.init_pid()));
        let begun = Instant::now();
        runc(&["create", "--bundle", &dir, "--pid-file", &pid_file, id])?;
        runc(&["start", id])?;
        samples.add(SHIM_CREATE_START, FLOOR, millis(begun));
        let process = bundle.dir().join("process.json");
        fs::write(&process, process_json()?)?;
        let begun = Instant::now();
        runc(&["exec", "--process", &text(process), id])?;
        samples.add(SHIM_EXEC, FLOOR, millis(begun));
        runc(&["kill", id, "KILL"])?;
        let pid: i32 = fs::read_to_string(&pid_file)?.trim().parse()?;
        let by = Instant::now() + DEADLINE;
        while !is_zombie(pid) && Path::new(&format!("/proc/{pid}")).exists() {
            ensure!(Instant::now() < by, "the container survives SIGKILL");
            std::thread::sleep(Duration::from_millis(1));
        }
        runc(&["delete", id])
    }

    async fn shim(
        &self,
        column: Column,
        binary: &Path,
        id: &str,
        samples: &mut Samples,
    ) -> Result<()> {
        let bundle = self.bundle(id)?;
        let runc = oci::Options {
            binary_name: self.runc.display().to_string(),
            root: self.root().display().to_string(),
            ..Default::default()
        };
        let options = Some(Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: runc.write_to_bytes()?,
            ..Default::default()
        });
        let command = Command {
            binary: binary.into(),
            namespace: "k8s.io".into(),
            id: id.into(),
            bundle: bundle.dir().to_owned(),
            events: self.ground.path().join("events.sock"),
            grpc: self.ground.path().join("grpc.sock"),
            publish_binary: "/bin/true".into(),
            options: options.clone(),
            socket_dir: self.ground.path().join("s"),
            ..Command::default()
        };
        let _log = command.open_log()?;
        let begun = Instant::now();
        let endpoint = command.start(DEADLINE).await?;
        let client = Client::connect(&endpoint, DEADLINE).await?.with_deadline(DEADLINE);
        // containerd's refuses for want of a container; it is the answer that counts.
        let info = client.connect_info(id).await;
        samples.add(SHIM_START, column, millis(begun));

        let task = CreateTask {
            id: id.into(),
            bundle: bundle.dir().to_owned(),
            options,
            ..CreateTask::default()
        };
        let begun = Instant::now();
        client.create(task).await?;
        client.start(id, "").await?;
        samples.add(SHIM_CREATE_START, column, millis(begun));
        let info = match info {
            Ok(info) => info,
            Err(_) => client.connect_info(id).await?,
        };
        let begun = Instant::now();
        let exec = ExecTask { process: process_json()?, ..ExecTask::default() };
        client.exec(id, "e", exec).await?;
        client.start(id, "e").await?;
        client.wait(id, "e").await?;
        samples.add(SHIM_EXEC, column, millis(begun));
        client.delete(id, "e").await?;
        tokio::time::sleep(Duration::from_millis(200)).await;
        samples.add(SHIM_IDLE, column, pss(info.shim_pid.cast_signed())?);

        client.kill(id, "", libc::SIGKILL as u32, true).await?;
        client.wait(id, "").await?;
        client.delete(id, "").await?;
        let _ = client.shutdown(id, false).await;
        tokio::time::timeout(DEADLINE, client.closed()).await.context("the shim stays")?;
        Ok(())
    }
}

fn process_json() -> Result<Vec<u8>> {
    Ok(serde_json::to_vec(&json!({
        "user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["PATH=/bin"],
        "args": ["/bin/busybox", "true"],
    }))?)
}

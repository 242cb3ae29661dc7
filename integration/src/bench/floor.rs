//! The floor: what the CNI plugins and runc cost when nothing but a timer is around them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, umount2};
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt as _, time::timeout};

use super::{
    millis,
    samples::{CREATE, CREATE_START, EXEC, FLOOR, REMOVE, RUN_POD, START, STOP_POD, Samples},
};
use crate::{
    ground::{Ground, is_zombie},
    image::Image,
    node::{Cni, write_network},
};

/// No bare call takes nearly as long.
const DEADLINE: Duration = Duration::from_secs(60);
/// Where distributions put the plugins.
const PLUGIN_DIRS: [&str; 2] = ["/opt/cni/bin", "/usr/lib/cni"];

/// A bridge, a root file system and a bundle to measure on.
#[derive(Debug)]
pub struct Floor {
    ground: Ground,
    runc: PathBuf,
    plugins: Vec<(PathBuf, Value)>,
    count: u32,
}

impl Floor {
    /// Unpacks the image and writes the configuration that the runtimes get too.
    ///
    /// # Errors
    /// A program is missing, or a file cannot be written.
    pub fn new(image: &Image, runc: &Path) -> Result<Self> {
        let ground = Ground::new()?;
        write_network(&ground, Cni::Bridge)?;
        let list: Value =
            serde_json::from_slice(&fs::read(ground.path().join("net.d/10-test.conflist"))?)?;
        let mut plugins = Vec::new();
        for plugin in list["plugins"].as_array().context("a list of plugins")? {
            let mut config = plugin.clone();
            config["name"] = list["name"].clone();
            config["cniVersion"] = list["cniVersion"].clone();
            let name = plugin["type"].as_str().context("a plugin has a type")?;
            let path = PLUGIN_DIRS
                .iter()
                .map(|dir| Path::new(dir).join(name))
                .find(|path| path.is_file())
                .with_context(|| format!("CNI plugin {name} is not installed ('make deps')"))?;
            plugins.push((path, config));
        }

        let bundle = ground.path().join("bundle");
        fs::create_dir_all(bundle.join("rootfs"))?;
        fs::create_dir(ground.path().join("netns"))?;
        for layer in &image.layers {
            let file = ground.path().join("layer.tar.gz");
            fs::write(&file, &layer.content)?;
            let status = Command::new("tar")
                .arg("-xzf")
                .arg(&file)
                .arg("-C")
                .arg(bundle.join("rootfs"))
                .status()
                .context("run tar")?;
            ensure!(status.success(), "tar: {status}");
        }
        let status = Command::new(runc).arg("spec").current_dir(&bundle).status()?;
        ensure!(status.success(), "runc spec: {status}");
        Ok(Self { ground, runc: runc.into(), plugins, count: 0 })
    }

    /// Its ground.
    pub fn ground(&self) -> &Ground {
        &self.ground
    }

    /// Its bundle, with the image's root file system.
    pub fn bundle(&self) -> PathBuf {
        self.ground.path().join("bundle")
    }

    /// The OCI runtime.
    pub fn runc_path(&self) -> &Path {
        &self.runc
    }

    /// One pod's and one container's life.
    ///
    /// # Errors
    /// A program fails.
    pub async fn round(&mut self, samples: &mut Samples) -> Result<()> {
        self.count += 1;
        let id = format!("floor{}", self.count);
        let netns = self.ground.path().join("netns").join(&id);
        fs::write(&netns, "")?;
        let mut unshare = tokio::process::Command::new("unshare");
        unshare.arg(format!("--net={}", netns.display())).arg("true");
        self.run(unshare).await?;
        let result = self.pod(&id, &netns, samples).await;
        umount2(&netns, MntFlags::MNT_DETACH)?;
        fs::remove_file(&netns)?;
        result
    }

    async fn pod(&self, id: &str, netns: &Path, samples: &mut Samples) -> Result<()> {
        let started = Instant::now();
        let mut result = Value::Null;
        for (plugin, config) in &self.plugins {
            let output = self.plugin(plugin, config, "ADD", id, netns, &result).await?;
            result = serde_json::from_slice(&output).context("a CNI result")?;
        }
        samples.add(RUN_POD, FLOOR, millis(started));

        self.container(id, netns, samples).await?;

        let started = Instant::now();
        for (plugin, config) in self.plugins.iter().rev() {
            self.plugin(plugin, config, "DEL", id, netns, &result).await?;
        }
        samples.add(STOP_POD, FLOOR, millis(started));
        Ok(())
    }

    async fn container(&self, id: &str, netns: &Path, samples: &mut Samples) -> Result<()> {
        let bundle = self.ground.path().join("bundle");
        let config = bundle.join("config.json");
        let mut spec: Value = serde_json::from_slice(&fs::read(&config)?)?;
        spec["process"]["terminal"] = json!(false);
        spec["process"]["args"] = json!(["/bin/sleep", "100000"]);
        spec["process"]["env"] = json!(["PATH=/bin"]);
        spec["linux"]["cgroupsPath"] = json!(format!("{}/{id}", self.ground.cgroup()));
        // As a pod's containers do: they are given a network, they do not make one.
        for namespace in spec["linux"]["namespaces"].as_array_mut().context("namespaces")? {
            if namespace["type"] == "network" {
                namespace["path"] = json!(netns);
            }
        }
        fs::write(&config, spec.to_string())?;

        let pid_file = self.ground.path().join("pid");
        let started = Instant::now();
        let mut create = self.runc("create");
        create.arg("--bundle").arg(&bundle).arg("--pid-file").arg(&pid_file).arg(id);
        self.run(create).await?;
        let created = millis(started);
        samples.add(CREATE, FLOOR, created);

        let started = Instant::now();
        let mut start = self.runc("start");
        start.arg(id);
        self.run(start).await?;
        samples.add(START, FLOOR, millis(started));
        samples.add(CREATE_START, FLOOR, created + millis(started));

        for _ in 0..super::EXECS {
            let started = Instant::now();
            let mut exec = self.runc("exec");
            exec.args([id, "/bin/true"]);
            self.run(exec).await?;
            samples.add(EXEC, FLOOR, millis(started));
        }

        let mut kill = self.runc("kill");
        kill.args([id, "KILL"]);
        self.run(kill).await?;
        let pid: i32 = fs::read_to_string(&pid_file)?.trim().parse()?;
        let end = Instant::now() + DEADLINE;
        while !is_zombie(pid) {
            ensure!(Instant::now() < end, "the container survives SIGKILL");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let started = Instant::now();
        let mut delete = self.runc("delete");
        delete.arg(id);
        self.run(delete).await?;
        samples.add(REMOVE, FLOOR, millis(started));
        Ok(())
    }

    fn runc(&self, verb: &str) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(&self.runc);
        command.arg("--root").arg(self.ground.path().join("runc")).arg(verb);
        command
    }

    /// Runs a program to its end. It gets no pipe: a container would inherit and hold it.
    async fn run(&self, mut command: tokio::process::Command) -> Result<()> {
        let errors = self.ground.path().join("errors");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&errors)?)
            .kill_on_drop(true);
        let mut child = command.spawn().with_context(|| format!("run {command:?}"))?;
        let status = timeout(DEADLINE, child.wait())
            .await
            .with_context(|| format!("{command:?} did not end within {DEADLINE:?}"))??;
        ensure!(
            status.success(),
            "{command:?}: {status}: {}",
            fs::read_to_string(&errors).unwrap_or_default().trim()
        );
        Ok(())
    }

    async fn plugin(
        &self,
        path: &Path,
        config: &Value,
        verb: &str,
        id: &str,
        netns: &Path,
        previous: &Value,
    ) -> Result<Vec<u8>> {
        let mut config = config.clone();
        if !previous.is_null() {
            config["prevResult"] = previous.clone();
        }
        let mut child = tokio::process::Command::new(path)
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", PLUGIN_DIRS.join(":"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("run {}", path.display()))?;
        let mut stdin = child.stdin.take().context("a pipe")?;
        stdin.write_all(config.to_string().as_bytes()).await?;
        drop(stdin);
        let output = timeout(DEADLINE, child.wait_with_output())
            .await
            .with_context(|| format!("{} {verb} did not end", path.display()))??;
        ensure!(
            output.status.success(),
            "{} {verb}: {}: {}",
            path.display(),
            output.status,
            String::from_utf8_lossy(&output.stdout).trim()
        );
        Ok(output.stdout)
    }
}

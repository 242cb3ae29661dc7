//! `run`: an image and a command in a new pod, by the CRI's own steps.

use std::{
    fs::DirBuilder,
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    pin::pin,
    process,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use holdfast_protos::cri;
use holdfast_streaming::client::Session;

use super::{
    Client, Hint,
    args::{Net, PullPolicy, Registry, Run},
    attach, checkpoint,
    exec::exit_code,
    find,
    image::{self, Credentials},
    logs::{self, Reader, Style},
    progress::Progress,
    remove::{self, LOG_ANNOTATION, LOGS},
    session::{self, How, Terms},
    terminal::{self, Ends},
    text::{self, Who},
    wire,
};

/// What the kubelet hides from ordinary containers: the kernel's secrets and noise.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
];

/// What it lets them read but not write: the kernel's switches.
const READONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The Kubernetes namespace of pods that `run` makes.
const NAMESPACE: &str = "default";

/// The log in the pod's log directory.
const LOG: &str = "0.log";

/// Seconds that Ctrl-C gives the container.
const GRACE: u32 = 10;

/// Exit code after a second Ctrl-C, as shells have it for SIGINT.
const INTERRUPTED: i32 = 130;

/// `holdfast run`
pub(super) async fn run(client: &mut Client, args: Run) -> Result<u8> {
    if args.tty && !args.detach {
        terminal::require(args.interactive)?;
    }
    if args.net == Net::Host && !args.publish.is_empty() {
        bail!(
            "--publish needs a network of the pod's own; with --net host its ports are the node's"
        );
    }
    let image = ensure_image(client, &args).await?;
    let uid = random_uid()?;
    let name = match &args.name {
        Some(name) => name.clone(),
        None => format!("{}-{}", text::image_base(&args.image), &uid[..5]),
    };
    for pod in client.pods().await? {
        if find::pod_name(&pod) == (NAMESPACE, &name) {
            return Err(Hint::on(
                anyhow!("there is a pod {name} already"),
                format!("choose another --name, or remove it: holdfast rm -f {name}"),
            ));
        }
    }

    let logs = LogDirectory::make(args.log_dir.as_deref(), &name, &uid)?;
    let pod_config = pod_config(&args, &name, &uid, &logs);
    let container_config = container_config(&args, &name, image);

    // From here on Ctrl-C means "undo".
    let mut interrupts = Interrupts::new()?;
    let pod = cri::RunPodSandboxRequest {
        config: Some(pod_config.clone()),
        runtime_handler: args.runtime.clone(),
    };
    let mut runtime = client.runtime.clone();
    let created = interrupts.defer(client.slow(runtime.run_pod_sandbox(pod))).await;
    let pod =
        match created.context("create the pod") {
            Ok(pod) => pod.pod_sandbox_id,
            Err(error) => {
                // No answer is not a no: the daemon may be making the pod all the same.
                let late =
                    client.pods().await.unwrap_or_default().into_iter().find(|pod| {
                        pod.metadata.as_ref().is_some_and(|metadata| metadata.uid == uid)
                    });
                return Err(match late {
                    Some(pod) => undo_after(error, client, &pod.id, &logs).await,
                    None => {
                        logs.remove()?;
                        error
                    }
                });
            }
        };
    // Whoever prints the log needs no session; who types, or has a terminal, does.
    let terms = (!args.detach && (args.interactive || args.tty)).then(|| Terms {
        tty: args.tty,
        stdin: args.interactive,
        keys: args.detach_keys.clone(),
    });
    let started =
        start(client, &mut interrupts, &pod, pod_config, container_config, terms.as_ref()).await;
    let (container, session) = match started {
        Ok(Some(started)) => started,
        Ok(None) => {
            undo(client, &pod, &logs).await?;
            return Ok(exit_code(INTERRUPTED));
        }
        Err(error) => {
            return Err(undo_after(error, client, &pod, &logs).await);
        }
    };
    if args.detach {
        wire::write(&format!("{pod}\n"))?;
        return Ok(0);
    }

    let followed = match session.zip(terms) {
        Some((session, terms)) => {
            match join(client, &mut interrupts, &container, session, &terms).await {
                Ok(Joined::Detached) => {
                    attach::note_detached(&name);
                    return Ok(0);
                }
                Ok(Joined::Exited(status)) => Ok(*status),
                // Nothing of ours is wrong with it, and nothing can be done without the daemon.
                Err(error) if session::is_lost(&error) => return Err(attach::lost(error, &name)),
                Err(error) => Err(error),
            }
        }
        None => {
            let reader = Reader::absent(&logs.path.join(LOG));
            follow(client, &mut interrupts, &container, Some(reader)).await
        }
    };
    // Also when following ended with an error (stdout is gone): nobody is left to stop it.
    let ended = if args.rm {
        undo(client, &pod, &logs).await
    } else {
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() };
        client.slow(runtime.stop_pod_sandbox(request)).await.map(drop)
    };
    let status = followed?;
    ended.with_context(|| format!("clean up pod {pod}"))?;
    let Some(status) = status else {
        bail!("the container was removed while it was watched; its exit code is not known");
    };
    if status.reason == "OOMKilled" {
        eprintln!("holdfast: the container was killed: it needed more memory than it may use");
    }
    Ok(exit_code(status.exit_code))
}

/// Creates and starts the container, and attaches to it before, if that is wanted. `None`: Ctrl-C.
async fn start(
    client: &Client,
    interrupts: &mut Interrupts,
    pod: &str,
    pod_config: cri::PodSandboxConfig,
    config: cri::ContainerConfig,
    terms: Option<&Terms>,
) -> Result<Option<(String, Option<Session>)>> {
    let mut runtime = client.runtime.clone();
    if interrupts.seen {
        return Ok(None);
    }
    let create = cri::CreateContainerRequest {
        pod_sandbox_id: pod.to_owned(),
        config: Some(config),
        sandbox_config: Some(pod_config),
    };
    let created = interrupts.defer(client.slow(runtime.create_container(create))).await;
    let id = created.context("create the container")?.container_id;
    if interrupts.seen {
        return Ok(None);
    }
    let session = match terms {
        Some(terms) => {
            let opened = async {
                let url = attach::url(client, &id, terms).await?;
                session::open(client, &url).await
            };
            Some(interrupts.defer(opened).await.context("attach to the container")?)
        }
        None => None,
    };
    if interrupts.seen {
        return Ok(None);
    }
    let start = cri::StartContainerRequest { container_id: id.clone() };
    let started = interrupts.defer(client.slow(runtime.start_container(start))).await;
    started.context("start the container")?;
    Ok((!interrupts.seen).then_some((id, session)))
}

enum Joined {
    /// The container's status, if it has not been removed.
    Exited(Box<Option<cri::ContainerStatus>>),
    Detached,
}

/// Joins our terminal, or pipes, to the container until it has exited. A signal stops it.
async fn join(
    client: &Client,
    interrupts: &mut Interrupts,
    container: &str,
    session: Session,
    terms: &Terms,
) -> Result<Joined> {
    let signal = async {
        interrupts.next().await;
        // The number is not asked for: the container is stopped, whichever it was.
        0
    };
    match session::join(session, terms, signal).await? {
        How::Detached => Ok(Joined::Detached),
        How::Signal(_) => {
            stop(client, interrupts, container).await?;
            let status = logs::follow(client, container, None, Style::default()).await?;
            Ok(Joined::Exited(Box::new(status)))
        }
        // Its output has ended; it may run on for a while.
        How::Ended(_) => follow(client, interrupts, container, None)
            .await
            .map(|status| Joined::Exited(Box::new(status))),
    }
}

/// Prints the log, if there is one to print, until the container has exited; Ctrl-C stops it.
async fn follow(
    client: &Client,
    interrupts: &mut Interrupts,
    container: &str,
    reader: Option<Reader>,
) -> Result<Option<cri::ContainerStatus>> {
    let mut follow = pin!(logs::follow(client, container, reader, Style::default()));
    tokio::select! {
        biased; // An exit that is known comes before an interrupt.
        result = &mut follow => return result,
        () = interrupts.next() => {}
    }
    stop(client, interrupts, container).await?;
    follow.await
}

/// Stops the container; Ctrl-C kills it.
async fn stop(client: &Client, interrupts: &mut Interrupts, container: &str) -> Result<()> {
    let mut stop = pin!(remove::stop_container(client, container, GRACE));
    tokio::select! {
        biased;
        stopped = &mut stop => stopped,
        () = interrupts.next() => {
            // Do not wait for its grace.
            remove::stop_container(client, container, 0).await
        }
    }
}

async fn undo(client: &Client, pod: &str, logs: &LogDirectory) -> Result<()> {
    remove::force_remove_pod(client, pod).await?;
    logs.remove()
}

/// Undoes after an error; the error, and what is left if that fails too.
async fn undo_after(
    error: anyhow::Error,
    client: &Client,
    pod: &str,
    logs: &LogDirectory,
) -> anyhow::Error {
    match undo(client, pod, logs).await {
        Ok(()) => error,
        Err(left) => Hint::on(error, format!("pod {pod} could not be removed: {left:#}")),
    }
}

async fn ensure_image(client: &mut Client, args: &Run) -> Result<String> {
    if let Some(archive) = checkpoint::archive(&args.image) {
        let there = archive.is_file();
        ensure!(there, "{}: there is no such archive of a checkpoint", archive.display());
        return Ok(archive.to_string_lossy().into_owned());
    }
    let wanted = match args.pull {
        PullPolicy::Always => true,
        PullPolicy::Missing => !image::exists(client, &args.image).await?,
        PullPolicy::Never => false,
    };
    if wanted {
        let registry = Registry { credentials: args.registry_user.clone(), password_stdin: false };
        let credentials: Credentials = image::credentials(&registry)?;
        let progress = Progress::on_stderr();
        return image::pull_image(client, &args.image, credentials, "", progress).await;
    }
    match find::image(client, &args.image).await {
        Ok(image) => Ok(image.id),
        Err(error) if args.pull == PullPolicy::Never => {
            Err(Hint::on(error, "pull it, or leave out --pull never"))
        }
        Err(error) => Err(error),
    }
}

fn pod_config(args: &Run, name: &str, uid: &str, logs: &LogDirectory) -> cri::PodSandboxConfig {
    let namespaces = cri::NamespaceOption {
        network: match args.net {
            Net::Pod => cri::NamespaceMode::Pod,
            Net::Host => cri::NamespaceMode::Node,
        }
        .into(),
        pid: cri::NamespaceMode::Container.into(),
        ..Default::default()
    };
    let security = cri::LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces),
        privileged: args.privileged,
        ..Default::default()
    };
    let port_mappings = args.publish.iter().map(|port| cri::PortMapping {
        protocol: port.protocol.into(),
        container_port: port.container.into(),
        host_port: port.host.into(),
        host_ip: port.host_ip.clone(),
    });
    let annotations =
        logs.ours.then(|| (LOG_ANNOTATION.to_owned(), logs.path.to_string_lossy().into_owned()));
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: name.to_owned(),
            uid: uid.to_owned(),
            namespace: NAMESPACE.to_owned(),
            attempt: 0,
        }),
        // With the node's network the pod has the node's name.
        hostname: if args.net == Net::Host { String::new() } else { name.to_owned() },
        log_directory: logs.path.to_string_lossy().into_owned(),
        port_mappings: port_mappings.collect(),
        labels: args.label.iter().cloned().collect(),
        annotations: annotations.into_iter().collect(),
        linux: Some(cri::LinuxPodSandboxConfig {
            security_context: Some(security),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn container_config(args: &Run, name: &str, image: String) -> cri::ContainerConfig {
    let namespaces = cri::NamespaceOption {
        network: match args.net {
            Net::Pod => cri::NamespaceMode::Pod,
            Net::Host => cri::NamespaceMode::Node,
        }
        .into(),
        pid: cri::NamespaceMode::Container.into(),
        ..Default::default()
    };
    let mut security = cri::LinuxContainerSecurityContext {
        namespace_options: Some(namespaces),
        privileged: args.privileged,
        readonly_rootfs: args.read_only,
        ..Default::default()
    };
    if !args.privileged {
        // To the CRI an empty list means that nothing is hidden.
        security.masked_paths = MASKED.map(String::from).into();
        security.readonly_paths = READONLY.map(String::from).into();
        security.seccomp = Some(cri::SecurityProfile {
            profile_type: cri::security_profile::ProfileType::RuntimeDefault.into(),
            localhost_ref: String::new(),
        });
    }
    if let Some(user) = &args.user {
        match &user.who {
            Who::Id(id) => security.run_as_user = Some(cri::Int64Value { value: *id }),
            Who::Name(name) => security.run_as_username = name.clone(),
        }
        security.run_as_group = user.gid.map(|value| cri::Int64Value { value });
    }
    let resources = cri::LinuxContainerResources {
        cpu_period: args.cpus.map_or(0, |_| 100_000),
        cpu_quota: args.cpus.map_or(0, |c| c.quota()),
        cpu_shares: args.cpus.map_or(0, |c| c.shares()),
        memory_limit_in_bytes: args.memory.map_or(0, |m| m as i64),
        ..Default::default()
    };
    let mounts = args.volume.iter().map(|volume| cri::Mount {
        container_path: volume.container.clone(),
        host_path: volume.host.to_string_lossy().into_owned(),
        readonly: volume.readonly,
        propagation: volume.propagation.into(),
        ..Default::default()
    });
    let envs = args
        .env
        .iter()
        .map(|(key, value)| cri::KeyValue { key: key.clone(), value: value.clone().into() });
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(cri::ImageSpec {
            image,
            user_specified_image: args.image.clone(),
            ..Default::default()
        }),
        command: args.entrypoint.iter().cloned().collect(),
        args: args.command.clone(),
        working_dir: args.workdir.clone(),
        envs: envs.collect(),
        mounts: mounts.collect(),
        labels: args.label.iter().cloned().collect(),
        log_path: LOG.to_owned(),
        stdin: args.interactive,
        // A pipe's end is the end of the container's input. A terminal has none, and who detaches from
        // it comes back.
        stdin_once: args.interactive && !args.tty && !args.detach,
        tty: args.tty,
        linux: Some(cri::LinuxContainerConfig {
            resources: Some(resources),
            security_context: Some(security),
        }),
        ..Default::default()
    }
}

/// Where the container's log is.
struct LogDirectory {
    path: PathBuf,
    /// It was made for this pod alone, and goes with it.
    ours: bool,
}

impl LogDirectory {
    fn make(given: Option<&Path>, name: &str, uid: &str) -> Result<Self> {
        let (path, ours) = match given {
            Some(path) => (std::path::absolute(path).context("--log-dir")?, false),
            None => (Path::new(LOGS).join(format!("{name}-{}", &uid[..8])), true),
        };
        // What a container prints may be meant for few.
        let made = DirBuilder::new().recursive(true).mode(0o750).create(&path);
        made.map_err(|error| {
            let denied = error.kind() == io::ErrorKind::PermissionDenied;
            let error = anyhow::Error::new(error)
                .context(format!("make the log directory {}", path.display()));
            if denied { Hint::on(error, "use sudo, or --log-dir") } else { error }
        })?;
        Ok(Self { path, ours })
    }

    fn remove(&self) -> Result<()> {
        if self.ours { remove::remove_logs(Path::new(LOGS), &self.path) } else { Ok(()) }
    }
}

/// The signals that ask to end, once a pod exists that must be undone.
struct Interrupts {
    ends: Ends,
    /// One came while something was under way.
    seen: bool,
}

impl Interrupts {
    fn new() -> Result<Self> {
        Ok(Self { ends: Ends::catch()?, seen: false })
    }

    async fn next(&mut self) {
        self.ends.next().await;
        self.seen = true;
    }

    /// Lets a call end in spite of the first interrupt, because only its answer tells what there is to
    /// undo. A second interrupt ends this process.
    async fn defer<T>(&mut self, call: impl Future<Output = T>) -> T {
        let mut call = pin!(call);
        loop {
            let again = self.seen;
            tokio::select! {
                biased;
                result = &mut call => return result,
                () = self.next() => {
                    if again {
                        eprintln!("holdfast: interrupted; see `holdfast pods` for what is left");
                        process::exit(INTERRUPTED);
                    }
                    eprintln!("holdfast: waiting for the daemon, to undo; Ctrl-C again to leave now");
                }
            }
        }
    }
}

/// A random UUID, from the kernel.
fn random_uid() -> Result<String> {
    const FILE: &str = "/proc/sys/kernel/random/uuid";
    let uid = std::fs::read_to_string(FILE).with_context(|| format!("read {FILE}"))?;
    Ok(uid.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::args::{Args, Command};
    use super::*;

    fn args(line: &str) -> Run {
        let words = ["holdfast", "run"].into_iter().chain(line.split_whitespace());
        match Args::try_parse_from(words).unwrap().command {
            Command::Run(run) => *run,
            _ => unreachable!(),
        }
    }

    #[test]
    fn options_reach_the_container() {
        let run = args(
            "--memory 64MiB --cpus 0.5 --user 7:8 -w /w -e A=b -v /a:/b:ro --read-only \
             --entrypoint /bin/x --privileged -l k=v busybox a b",
        );
        let config = container_config(&run, "web", "sha256:aa".into());
        let linux = config.linux.unwrap();
        let resources = linux.resources.unwrap();
        assert_eq!(resources.memory_limit_in_bytes, 64 << 20);
        assert_eq!((resources.cpu_period, resources.cpu_quota), (100_000, 50_000));
        let security = linux.security_context.unwrap();
        assert_eq!(security.run_as_user.unwrap().value, 7);
        assert_eq!(security.run_as_group.unwrap().value, 8);
        assert!(security.readonly_rootfs && security.privileged);
        assert_eq!(
            (config.command, config.args),
            (vec!["/bin/x".into()], vec!["a".into(), "b".into()])
        );
        assert_eq!(config.working_dir, "/w");
        assert!(config.mounts[0].readonly);
        assert_eq!(config.envs[0].value, b"b");
        let image = config.image.unwrap();
        assert_eq!((&*image.image, &*image.user_specified_image), ("sha256:aa", "busybox"));
        assert_eq!(config.labels["k"], "v");
        assert!(!config.tty && !config.stdin && !config.stdin_once);
    }

    #[test]
    fn the_end_of_a_pipe_is_the_end_of_stdin_and_that_of_a_terminal_is_not() {
        let config = |line: &str| {
            let config = container_config(&args(line), "web", "sha256:aa".into());
            (config.tty, config.stdin, config.stdin_once)
        };
        assert_eq!(config("-i x"), (false, true, true));
        assert_eq!(config("-it x"), (true, true, false));
        assert_eq!(config("-t x"), (true, false, false));
        assert_eq!(config("-di x"), (false, true, false));
    }

    #[test]
    fn the_network_is_the_pods_or_the_nodes() {
        let logs = LogDirectory { path: "/l".into(), ours: false };
        let network = |line: &str| {
            let pod = pod_config(&args(line), "web", "uid", &logs);
            let options = pod.linux.unwrap().security_context.unwrap().namespace_options.unwrap();
            (options.network(), pod.hostname, pod.port_mappings.len())
        };
        assert_eq!(network("-p 1:2 x"), (cri::NamespaceMode::Pod, "web".into(), 1));
        assert_eq!(network("--net host x"), (cri::NamespaceMode::Node, String::new(), 0));
    }
}

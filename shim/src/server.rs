//! The services on the shim's sockets: translate, call, translate.
//!
//! Task v2 and v3 (the same messages) and Sandbox v1 over ttrpc, and the control socket. A caller
//! that goes away, or whose deadline passes, drops its answer and never the work: every call that
//! changes something runs in a task of its own.

use std::{
    collections::{BTreeSet, HashMap},
    future::Future,
    io,
    os::fd::AsRawFd as _,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use futures::Stream;
use holdfast_protos::shim::{
    api, cgroups as v1, cgroups_v2 as v2, oci,
    protobuf::{
        self, Message, MessageField,
        well_known_types::{any::Any, empty::Empty, timestamp::Timestamp},
    },
    sandbox_api as sandbox,
    sandbox_async::{Sandbox, create_sandbox},
    shim_async::{Task, create_task},
    ttrpc::{
        self, Code,
        asynchronous::{Server, Service, TtrpcContext, transport},
    },
    types,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use crate::{
    bundle::Bundle,
    cgroup::{self, Version},
    control::{self, Attach, Kind, Request},
    fds,
    handover::{self, AttachedClient, Busy},
    kubernetes,
    options::{POD_OPTIONS, PodOptions},
    pod::{Create, Error, Pod, Stage, Uris},
    process::lock,
    runtime::{Checkpoint, Reason, Runtime},
    stdio::{self, Next},
};

const TASK_V2: &str = "containerd.task.v2.Task";
const TASK_V3: &str = "containerd.task.v3.Task";

/// How long a client of the control socket may take to say what it wants.
const REQUEST: Duration = Duration::from_secs(10);

pub(crate) fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    let since = crate::timestamp::since_epoch(at);
    let mut stamp = Timestamp::new();
    stamp.seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    stamp.nanos = since.subsec_nanos().cast_signed();
    MessageField::some(stamp)
}

/// The whole chain of an error on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text.replace('\n', " ")
}

fn code(error: &Error) -> Code {
    match error {
        Error::NotFound(_) => Code::NOT_FOUND,
        Error::Orphaned => Code::UNAVAILABLE,
        Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
        Error::Precondition(_) => Code::FAILED_PRECONDITION,
        Error::Invalid(_) => Code::INVALID_ARGUMENT,
        Error::Unsupported(_) => Code::UNIMPLEMENTED,
        Error::Runtime(crate::runtime::Error::Deadline { .. }) => Code::DEADLINE_EXCEEDED,
        Error::Runtime(error) => match error.reason() {
            Reason::NoSuchContainer => Code::NOT_FOUND,
            Reason::AlreadyExists => Code::ALREADY_EXISTS,
            Reason::NotRunning | Reason::Paused | Reason::NotPaused | Reason::Limit => {
                Code::FAILED_PRECONDITION
            }
            Reason::ExecutableNotFound | Reason::ExecutableRefused | Reason::WorkingDirectory => {
                Code::INVALID_ARGUMENT
            }
            Reason::Unsupported => Code::UNIMPLEMENTED,
            Reason::NoSpace => Code::RESOURCE_EXHAUSTED,
            Reason::Other => Code::UNKNOWN,
        },
        Error::Namespaces(crate::namespaces::Error::Invalid(_)) => Code::INVALID_ARGUMENT,
        Error::Namespaces(crate::namespaces::Error::Refused { .. }) => Code::INVALID_ARGUMENT,
        Error::Namespaces(crate::namespaces::Error::Deadline(_)) => Code::DEADLINE_EXCEEDED,
        Error::Namespaces(crate::namespaces::Error::Io { source, .. })
        | Error::Io { source, .. } => match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::RESOURCE_EXHAUSTED,
            _ => Code::UNKNOWN,
        },
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        status(code(&error), chain(&error))
    }
}

fn status(code: Code, message: impl Into<String>) -> ttrpc::Error {
    let mut status = ttrpc::Status::new();
    status.set_code(code);
    status.set_message(message.into());
    ttrpc::Error::RpcStatus(status)
}

type Answer<T> = ttrpc::Result<T>;

/// Runs `work` to its end, whether or not the caller stays, and not into an upgrade of the shim.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Answer<T> {
    let call = async {
        let _call = handover::CALLS.read().await;
        work.await
    };
    match tokio::spawn(call).await {
        Ok(done) => done.map_err(Into::into),
        Err(error) => Err(status(Code::INTERNAL, error.to_string())),
    }
}

/// All services of a shim.
pub(crate) fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let mut services = create_task(Arc::new(Services(pod.clone())));
    // The messages are the same; containerd before 2.0 knows the older name only.
    let mut older = create_task(Arc::new(Services(pod.clone())));
    if let Some(service) = older.remove(TASK_V3) {
        services.insert(TASK_V2.to_owned(), service);
    }
    services.extend(create_sandbox(Arc::new(Services(pod.clone()))));
    services
}

/// Serves ttrpc on `listener`.
pub(crate) async fn serve(listener: UnixListener, pod: &Arc<Pod>) -> io::Result<Server> {
    let mut server = Server::new()
        .register_service(services(pod))
        .add_listener(transport::Listener::new(Incoming(listener)));
    server.start().await.map_err(io::Error::other)?;
    Ok(server)
}

/// Accepts for ever.
struct Incoming(UnixListener);

impl Stream for Incoming {
    type Item = io::Result<UnixStream>;

    fn poll_next(
        self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.0.poll_accept(cx).map(|accepted| Some(accepted.map(|(stream, _)| stream)))
    }
}

struct Services(Arc<Pod>);

/// `containerd.runc.v1.Options` and `runtimeoptions.v1.Options` as ways to call the runtime.
fn runtime(options: Option<&Any>, namespace_default: &Runtime) -> Result<Runtime, Error> {
    let mut runtime = namespace_default.clone();
    let Some(any) = options.filter(|any| !any.type_url.is_empty()) else { return Ok(runtime) };
    let bad = |error: protobuf::Error| {
        Error::Invalid(format!("options of type {}: {error}", any.type_url))
    };
    match any.type_url.rsplit('/').next().unwrap_or_default() {
        "containerd.runc.v1.Options" => {
            let options = oci::Options::parse_from_bytes(&any.value).map_err(bad)?;
            if !options.binary_name.is_empty() {
                runtime.binary = options.binary_name.into();
            }
            if !options.root.is_empty() {
                // As containerd does it: one state directory per containerd namespace.
                let namespace = namespace_default.root.file_name().unwrap_or_default().to_owned();
                runtime.root = PathBuf::from(options.root).join(namespace);
            }
            runtime.systemd_cgroup = options.systemd_cgroup;
            runtime.no_pivot = options.no_pivot_root;
            runtime.no_new_keyring = options.no_new_keyring;
            runtime.criu_work = options.criu_work_path.into();
            runtime.criu_images = options.criu_image_path.into();
        }
        "runtimeoptions.v1.Options" => {
            let path = kubernetes::config_path(&any.value).map_err(bad)?;
            if !path.is_empty() {
                return Err(Error::Unsupported(format!(
                    "runtime options in a file ({path}); give containerd.runc.v1.Options"
                )));
            }
        }
        other => {
            return Err(Error::Invalid(format!(
                "options of type {other}; known are containerd.runc.v1.Options and \
                 runtimeoptions.v1.Options"
            )));
        }
    }
    Ok(runtime)
}

/// The cgroup that the options want the shim in.
pub(crate) fn shim_cgroup(input: &crate::bootstrap::Input) -> Option<String> {
    let any = input.options().find(|any| any.type_url.ends_with("containerd.runc.v1.Options"))?;
    let options = oci::Options::parse_from_bytes(&any.value).ok()?;
    Some(options.shim_cgroup).filter(|cgroup| !cgroup.is_empty())
}

/// [`runtime`] for `-info`.
pub(crate) fn runtime_of(options: &Any, default: &Runtime) -> Result<Runtime, String> {
    runtime(Some(options), default).map_err(|error| error.to_string())
}

#[async_trait]
impl Task for Services {
    async fn state(&self, _: &TtrpcContext, r: api::StateRequest) -> Answer<api::StateResponse> {
        self.0.events.daemon_is_there();
        Ok(self.0.state(&r.id, &r.exec_id)?)
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        r: api::CreateTaskRequest,
    ) -> Answer<api::CreateTaskResponse> {
        let pod = self.0.clone();
        let runtime = runtime(r.options.as_ref(), &pod.runtime)?;
        let create = Create {
            id: r.id,
            bundle: r.bundle.into(),
            uris: Uris { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr, terminal: r.terminal },
            rootfs: r.rootfs,
            runtime,
            checkpoint: r.checkpoint,
        };
        let pid = detached(async move { pod.create(create).await }).await?;
        Ok(api::CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, r: api::StartRequest) -> Answer<api::StartResponse> {
        let pod = self.0.clone();
        let pid = detached(async move { pod.start(&r.id, &r.exec_id).await }).await?;
        Ok(api::StartResponse { pid, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, r: api::DeleteRequest) -> Answer<api::DeleteResponse> {
        let pod = self.0.clone();
        let ended = detached(async move { pod.delete(&r.id, &r.exec_id).await }).await?;
        Ok(api::DeleteResponse {
            pid: ended.pid,
            exit_status: ended.status,
            exited_at: timestamp(ended.at),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, r: api::PidsRequest) -> Answer<api::PidsResponse> {
        let execs = self.0.container(&r.id)?.exec_pids();
        let mut answer = api::PidsResponse::new();
        for pid in self.0.pids(&r.id).await? {
            let mut info = types::task::ProcessInfo::new();
            info.pid = pid;
            if let Some(exec) = execs.get(&pid) {
                let mut details = oci::ProcessDetails::new();
                details.exec_id.clone_from(exec);
                let any = any("containerd.runc.v1.ProcessDetails", &details)?;
                info.info = MessageField::some(any);
            }
            answer.processes.push(info);
        }
        Ok(answer)
    }

    async fn pause(&self, _: &TtrpcContext, r: api::PauseRequest) -> Answer<Empty> {
        let pod = self.0.clone();
        detached(async move { pod.pause(&r.id).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, r: api::ResumeRequest) -> Answer<Empty> {
        let pod = self.0.clone();
        detached(async move { pod.resume(&r.id).await }).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(
        &self,
        context: &TtrpcContext,
        r: api::CheckpointTaskRequest,
    ) -> Answer<Empty> {
        let pod = self.0.clone();
        // A tenth of the caller's patience is for ending what is not done by then, and for saying so.
        let within = u64::try_from(context.timeout_nano).ok().filter(|nanos| *nanos > 0);
        let within = within.map(|nanos| Duration::from_nanos(nanos - nanos / 10));
        let mut how =
            Checkpoint { images: r.path.into(), leave_running: true, ..Checkpoint::default() };
        if let Some(any) = r.options.as_ref().filter(|any| !any.value.is_empty()) {
            let options = oci::CheckpointOptions::parse_from_bytes(&any.value)
                .map_err(|error| Error::Invalid(format!("checkpoint options: {error}")))?;
            how = Checkpoint {
                images: if options.image_path.is_empty() {
                    how.images
                } else {
                    options.image_path.into()
                },
                work: options.work_path.into(),
                leave_running: !options.exit,
                open_tcp: options.open_tcp,
                unix_sockets: options.external_unix_sockets,
                shell_job: options.terminal,
                file_locks: options.file_locks,
                empty_namespaces: options.empty_namespaces,
            };
        }
        detached(async move { pod.checkpoint(&r.id, how, within).await }).await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, r: api::KillRequest) -> Answer<Empty> {
        let pod = self.0.clone();
        detached(async move { pod.kill(&r.id, &r.exec_id, r.signal, r.all).await }).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, r: api::ExecProcessRequest) -> Answer<Empty> {
        let uris =
            Uris { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr, terminal: r.terminal };
        let spec = r.spec.into_option().unwrap_or_default().value;
        self.0.exec(&r.id, &r.exec_id, uris, spec)?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, r: api::ResizePtyRequest) -> Answer<Empty> {
        let container = self.0.container(&r.id)?;
        let process = container.process(&r.exec_id)?;
        let side = |value| u16::try_from(value).unwrap_or(u16::MAX);
        let resized = process.with_io(|io| io.resize(side(r.width), side(r.height)));
        match resized {
            Some(Ok(true)) => Ok(Empty::new()),
            Some(Err(error)) => Err(status(Code::UNKNOWN, format!("resize: {error}"))),
            Some(Ok(false)) | None => {
                Err(Error::Precondition("there is no terminal to resize".into()).into())
            }
        }
    }

    async fn close_io(&self, _: &TtrpcContext, r: api::CloseIORequest) -> Answer<Empty> {
        let container = self.0.container(&r.id)?;
        if r.stdin {
            container.process(&r.exec_id)?.close_stdin();
            self.0.changed();
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, r: api::UpdateTaskRequest) -> Answer<Empty> {
        let pod = self.0.clone();
        let resources = r.resources.into_option().unwrap_or_default().value;
        detached(async move { pod.update(&r.id, &resources).await }).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, r: api::WaitRequest) -> Answer<api::WaitResponse> {
        let container = self.0.container(&r.id)?;
        let ended = container.process(&r.exec_id)?.ended().await;
        Ok(api::WaitResponse {
            exit_status: ended.status,
            exited_at: timestamp(ended.at),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, r: api::StatsRequest) -> Answer<api::StatsResponse> {
        let container = self.0.container(&r.id)?;
        let cgroup = container
            .cgroup()
            .ok_or_else(|| Error::Precondition(format!("container {} has no cgroup", r.id)))?;
        let metrics = MessageField::some(metrics(cgroup)?);
        Ok(api::StatsResponse { stats: metrics, ..Default::default() })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        r: api::ConnectRequest,
    ) -> Answer<api::ConnectResponse> {
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.0.task_pid(&r.id),
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, r: api::ShutdownRequest) -> Answer<Empty> {
        let pod_is_up = crate::process::lock(&self.0.sandbox).is_some();
        if r.now || (self.0.is_empty() && !pod_is_up) {
            self.0.exit();
        }
        Ok(Empty::new())
    }
}

#[async_trait]
impl Sandbox for Services {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        r: sandbox::CreateSandboxRequest,
    ) -> Answer<sandbox::CreateSandboxResponse> {
        let options = match r.options.as_ref() {
            Some(any) if any.type_url.rsplit('/').next() == POD_OPTIONS.rsplit('/').next() => {
                serde_json::from_slice(&any.value)
                    .map_err(|error| Error::Invalid(format!("{POD_OPTIONS}: {error}")))?
            }
            Some(any) if any.type_url.ends_with("PodSandboxConfig") => {
                let options = kubernetes::pod(&any.value)
                    .map_err(|error| Error::Invalid(format!("{}: {error}", any.type_url)))?;
                // The kubelet has made it; who asks by hand may not have.
                if let Some(path) = &options.cgroup
                    && !cgroup::Cgroup::at(path).is_ok_and(|found| found.exists())
                {
                    cgroup::Cgroup::make(path).map_err(|source| Error::Io {
                        what: format!("make cgroup {path}"),
                        source,
                    })?;
                }
                options
            }
            _ => PodOptions::default(),
        };
        let netns = Some(PathBuf::from(r.netns_path)).filter(|path| !path.as_os_str().is_empty());
        let bundle = if r.bundle_path.is_empty() {
            self.0.bundle.dir().to_owned()
        } else {
            r.bundle_path.into()
        };
        self.0.create_sandbox(&r.sandbox_id, bundle, options, netns)?;
        Ok(sandbox::CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        r: sandbox::StartSandboxRequest,
    ) -> Answer<sandbox::StartSandboxResponse> {
        let pod = self.0.clone();
        let (pid, at) = detached(async move { pod.start_sandbox(&r.sandbox_id).await }).await?;
        // There is no container behind the pod, but containerd wants to read a specification of one.
        let mut spec = Any::new();
        spec.type_url = "types.containerd.io/opencontainers/runtime-spec/1/Spec".into();
        spec.value = b"{}".to_vec();
        Ok(sandbox::StartSandboxResponse {
            pid,
            created_at: timestamp(at),
            spec: MessageField::some(spec),
            ..Default::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        _: sandbox::PlatformRequest,
    ) -> Answer<sandbox::PlatformResponse> {
        let mut platform = types::platform::Platform::new();
        platform.os = "linux".into();
        platform.architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        }
        .into();
        Ok(sandbox::PlatformResponse {
            platform: MessageField::some(platform),
            ..Default::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        r: sandbox::StopSandboxRequest,
    ) -> Answer<sandbox::StopSandboxResponse> {
        let pod = self.0.clone();
        let grace = Duration::from_secs(r.timeout_secs.into());
        detached(async move { pod.stop_sandbox(&r.sandbox_id, grace).await }).await?;
        Ok(sandbox::StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        r: sandbox::WaitSandboxRequest,
    ) -> Answer<sandbox::WaitSandboxResponse> {
        let mut ended = self.0.with_sandbox(&r.sandbox_id, |s| Ok(s.ended.subscribe()))?;
        let ended = ended.wait_for(Option::is_some).await.ok().and_then(|ended| *ended);
        let ended = ended.ok_or_else(|| Error::NotFound(format!("pod {}", r.sandbox_id)))?;
        Ok(sandbox::WaitSandboxResponse {
            exit_status: ended.status,
            exited_at: timestamp(ended.at),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        r: sandbox::SandboxStatusRequest,
    ) -> Answer<sandbox::SandboxStatusResponse> {
        let mut answer = sandbox::SandboxStatusResponse::new();
        answer.sandbox_id.clone_from(&r.sandbox_id);
        self.0.with_sandbox(&r.sandbox_id, |sandbox| {
            let ended = *sandbox.ended.borrow();
            answer.pid = sandbox.pid();
            let ready = sandbox.created_at.is_some() && ended.is_none();
            answer.state = if ready { "SANDBOX_READY" } else { "SANDBOX_NOTREADY" }.into();
            answer.created_at = sandbox.created_at.map(timestamp).unwrap_or_default();
            answer.exited_at = ended.map(|ended| timestamp(ended.at)).unwrap_or_default();
            if r.verbose {
                answer.info.insert("shimPid".into(), std::process::id().to_string());
                answer.info.insert("bundle".into(), sandbox.bundle.dir().display().to_string());
            }
            Ok(())
        })?;
        Ok(answer)
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        r: sandbox::PingRequest,
    ) -> Answer<sandbox::PingResponse> {
        self.0.with_sandbox(&r.sandbox_id, |_| Ok(()))?;
        Ok(sandbox::PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        r: sandbox::ShutdownSandboxRequest,
    ) -> Answer<sandbox::ShutdownSandboxResponse> {
        let pod = self.0.clone();
        detached(async move { pod.shutdown_sandbox(&r.sandbox_id).await }).await?;
        Ok(sandbox::ShutdownSandboxResponse::new())
    }

    /// Those of the pod's cgroup, in which all its containers are.
    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        r: sandbox::SandboxMetricsRequest,
    ) -> Answer<sandbox::SandboxMetricsResponse> {
        let cgroup = self.0.with_sandbox(&r.sandbox_id, |s| Ok(s.cgroup().map(str::to_owned)))?;
        let cgroup = cgroup.ok_or_else(|| {
            Error::Precondition(format!(
                "pod {}: it has no cgroup of its own; its configuration names no cgroup_parent",
                r.sandbox_id
            ))
        })?;
        let found = cgroup::Cgroup::at(&cgroup).ok().filter(|found| !found.is_empty());
        let found = found.ok_or_else(|| Error::NotFound(format!("cgroup {cgroup}")))?;
        let mut answer = sandbox::SandboxMetricsResponse::new();
        let metric = answer.metrics.mut_or_insert_default();
        metric.timestamp = timestamp(SystemTime::now());
        metric.id = r.sandbox_id;
        metric.data = MessageField::some(metrics(&found)?);
        Ok(answer)
    }
}

fn any(type_url: &str, message: &impl Message) -> Answer<Any> {
    let mut any = Any::new();
    any.type_url = type_url.to_owned();
    any.value = message.write_to_bytes().map_err(|e| status(Code::INTERNAL, e.to_string()))?;
    Ok(any)
}

fn metrics(cgroup: &cgroup::Cgroup) -> Answer<Any> {
    let stats = cgroup.stats();
    match cgroup.version() {
        Version::V1 => any("io.containerd.cgroups.v1.Metrics", &metrics_v1(&stats)),
        Version::V2 => any("io.containerd.cgroups.v2.Metrics", &metrics_v2(&stats)),
    }
}

fn metrics_v1(stats: &cgroup::Stats) -> v1::metrics::Metrics {
    use v1::metrics::{
        BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl,
        MemoryStat, Metrics, PidsStat, Throttle,
    };
    let mut metrics = Metrics::new();
    let mut pids = PidsStat::new();
    pids.current = stats.pids.current.unwrap_or_default();
    pids.limit = stats.pids.limit.unwrap_or_default();
    metrics.pids = MessageField::some(pids);

    let mut usage = CPUUsage::new();
    usage.total = stats.cpu.usage_ns.unwrap_or_default();
    usage.user = stats.cpu.user_ns.unwrap_or_default();
    usage.kernel = stats.cpu.system_ns.unwrap_or_default();
    let mut throttling = Throttle::new();
    throttling.periods = stats.cpu.periods;
    throttling.throttled_periods = stats.cpu.throttled_periods;
    throttling.throttled_time = stats.cpu.throttled_ns;
    let mut cpu = CPUStat::new();
    cpu.usage = MessageField::some(usage);
    cpu.throttling = MessageField::some(throttling);
    metrics.cpu = MessageField::some(cpu);

    let m = &stats.memory;
    let mut usage = MemoryEntry::new();
    usage.usage = m.usage.unwrap_or_default();
    usage.max = m.peak.unwrap_or_default();
    usage.limit = m.limit.unwrap_or(u64::MAX);
    let mut swap = MemoryEntry::new();
    swap.usage = m.swap.unwrap_or_default() + m.usage.unwrap_or_default();
    swap.limit = m.swap_limit.unwrap_or(u64::MAX);
    let mut memory = MemoryStat::new();
    memory.total_rss = m.rss.unwrap_or_default();
    memory.rss = memory.total_rss;
    memory.total_cache = m.cache.unwrap_or_default();
    memory.cache = memory.total_cache;
    memory.total_mapped_file = m.mapped_file.unwrap_or_default();
    memory.total_inactive_file = m.inactive_file.unwrap_or_default();
    memory.inactive_file = memory.total_inactive_file;
    memory.total_pg_fault = m.page_faults.unwrap_or_default();
    memory.pg_fault = memory.total_pg_fault;
    memory.total_pg_maj_fault = m.major_page_faults.unwrap_or_default();
    memory.pg_maj_fault = memory.total_pg_maj_fault;
    memory.hierarchical_memory_limit = usage.limit;
    memory.usage = MessageField::some(usage);
    memory.swap = MessageField::some(swap);
    let mut kernel = MemoryEntry::new();
    kernel.usage = m.kernel.unwrap_or_default();
    memory.kernel = MessageField::some(kernel);
    metrics.memory = MessageField::some(memory);

    let mut oom = MemoryOomControl::new();
    oom.oom_kill = m.oom_kills.unwrap_or_default();
    metrics.memory_oom_control = MessageField::some(oom);

    let mut io = BlkIOStat::new();
    for device in &stats.io {
        let entry = |op: &str, value| BlkIOEntry {
            op: op.to_owned(),
            major: device.major.into(),
            minor: device.minor.into(),
            value,
            ..Default::default()
        };
        io.io_service_bytes_recursive.push(entry("read", device.read_bytes));
        io.io_service_bytes_recursive.push(entry("write", device.written_bytes));
        io.io_serviced_recursive.push(entry("read", device.reads));
        io.io_serviced_recursive.push(entry("write", device.writes));
    }
    metrics.blkio = MessageField::some(io);
    for pages in &stats.hugetlb {
        metrics.hugetlb.push(HugetlbStat {
            pagesize: pages.size.clone(),
            usage: pages.usage,
            max: pages.peak.unwrap_or_default(),
            ..Default::default()
        });
    }
    metrics
}

fn metrics_v2(stats: &cgroup::Stats) -> v2::metrics::Metrics {
    use v2::metrics::{
        CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData,
        PSIStats, PidsStat,
    };
    let pressure = |pressure: Option<cgroup::Pressure>| {
        let line = |stall: cgroup::Stall| PSIData {
            avg10: stall.avg10,
            avg60: stall.avg60,
            avg300: stall.avg300,
            total: stall.total,
            ..Default::default()
        };
        pressure.map(|pressure| PSIStats {
            some: MessageField::some(line(pressure.some)),
            full: MessageField::some(line(pressure.full)),
            ..Default::default()
        })
    };
    let mut metrics = Metrics::new();
    let mut pids = PidsStat::new();
    pids.current = stats.pids.current.unwrap_or_default();
    pids.limit = stats.pids.limit.unwrap_or_default();
    metrics.pids = MessageField::some(pids);

    let mut cpu = CPUStat::new();
    cpu.usage_usec = stats.cpu.usage_ns.unwrap_or_default() / 1000;
    cpu.user_usec = stats.cpu.user_ns.unwrap_or_default() / 1000;
    cpu.system_usec = stats.cpu.system_ns.unwrap_or_default() / 1000;
    cpu.nr_periods = stats.cpu.periods;
    cpu.nr_throttled = stats.cpu.throttled_periods;
    cpu.throttled_usec = stats.cpu.throttled_ns / 1000;
    cpu.psi = pressure(stats.cpu.pressure).into();
    metrics.cpu = MessageField::some(cpu);

    let m = &stats.memory;
    let mut memory = MemoryStat::new();
    memory.anon = m.rss.unwrap_or_default();
    memory.file = m.cache.unwrap_or_default();
    memory.file_mapped = m.mapped_file.unwrap_or_default();
    memory.inactive_file = m.inactive_file.unwrap_or_default();
    memory.pgfault = m.page_faults.unwrap_or_default();
    memory.pgmajfault = m.major_page_faults.unwrap_or_default();
    memory.usage = m.usage.unwrap_or_default();
    memory.usage_limit = m.limit.unwrap_or(u64::MAX);
    memory.max_usage = m.peak.unwrap_or_default();
    memory.swap_usage = m.swap.unwrap_or_default();
    memory.swap_limit = m.swap_limit.unwrap_or(u64::MAX);
    memory.psi = pressure(m.pressure).into();
    metrics.memory = MessageField::some(memory);

    let mut events = MemoryEvents::new();
    events.oom_kill = m.oom_kills.unwrap_or_default();
    metrics.memory_events = MessageField::some(events);

    let mut io = IOStat::new();
    for device in &stats.io {
        io.usage.push(IOEntry {
            major: device.major.into(),
            minor: device.minor.into(),
            rbytes: device.read_bytes,
            wbytes: device.written_bytes,
            rios: device.reads,
            wios: device.writes,
            ..Default::default()
        });
    }
    metrics.io = MessageField::some(io);
    for pages in &stats.hugetlb {
        metrics.hugetlb.push(HugeTlbStat {
            pagesize: pages.size.clone(),
            current: pages.usage,
            max: pages.peak.unwrap_or_default(),
            ..Default::default()
        });
    }
    metrics
}

/// Binds the control socket of the pod, mode 0600.
pub(crate) fn control_listener(bundle: &Bundle) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt as _;
    let socket = bundle.io_socket();
    match std::fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Bundles are deep, and a socket's path holds 107 bytes.
    let dir = std::fs::File::open(bundle.dir())?;
    let name = socket.file_name().unwrap_or_default().to_owned();
    let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    let listener = UnixListener::bind(short)?;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves the control socket for ever.
pub(crate) async fn serve_control(listener: UnixListener, pod: Arc<Pod>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let pod = pod.clone();
                tokio::spawn(async move {
                    // A client that is gone needs no answer.
                    let _ = control_client(stream, &pod).await;
                });
            }
            // Out of descriptors: there may be some again soon.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn control_client(stream: UnixStream, pod: &Arc<Pod>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::with_capacity(control::LINE_MAX, read);
    let mut line = String::new();
    let limit = control::LINE_MAX as u64;
    tokio::time::timeout(REQUEST, (&mut read).take(limit).read_line(&mut line)).await??;
    let refuse = |kind: &str, text: String| format!("error {kind}: {}\n", text.replace('\n', " "));
    let request = line.strip_suffix('\n').and_then(Request::parse);
    let answer = match &request {
        None => refuse("invalid", format!("no request: {line:?}")),
        Some(Request::Hello) => {
            let hello = control::Hello {
                control: control::VERSION,
                version: env!("CARGO_PKG_VERSION").into(),
                state: crate::pod::STATE_VERSION,
                orphaned: pod.orphan_is_waiting(),
            };
            format!("ok {}\n", serde_json::to_string(&hello).unwrap_or_default())
        }
        Some(Request::Keep) => {
            write.write_all(b"ok\n").await?;
            let stream = write.reunite(read.into_inner()).map_err(io::Error::other)?;
            return lend(stream, pod).await;
        }
        Some(Request::Adopt) => {
            write.write_all(b"ok\n").await?;
            let mut stream = write.reunite(read.into_inner()).map_err(io::Error::other)?;
            let kept = given_back(&stream).await?;
            let adopted = {
                let pod = pod.clone();
                tokio::spawn(async move { pod.adopt_orphan(kept).await }).await
            };
            let answer = match adopted.map_err(io::Error::other)? {
                Ok(()) => "ok\n".into(),
                Err(error @ Error::Precondition(_)) => refuse("precondition", error.to_string()),
                Err(error @ Error::Unsupported(_)) => refuse("unsupported", error.to_string()),
                Err(error) => refuse("other", chain(&error)),
            };
            return stream.write_all(answer.as_bytes()).await;
        }
        Some(Request::Upgrade(binary)) => {
            let stream: &UnixStream = write.as_ref();
            let asker = stream.as_raw_fd();
            let upgraded = match pod.origin.get() {
                Some(origin) => handover::upgrade(pod, origin, binary, asker).await,
                None => Err(Error::Unsupported("this shim was not started to be upgraded".into())),
            };
            match upgraded {
                Ok(never) => match never {},
                Err(error @ Error::Unsupported(_)) => refuse("unsupported", error.to_string()),
                Err(error) => refuse("precondition", error.to_string()),
            }
        }
        Some(Request::Relay(relay)) => match pod.relays.begin(relay, false).await {
            Ok(()) => {
                pod.changed();
                "ok\n".into()
            }
            Err(error) => refuse("other", error.to_string()),
        },
        Some(Request::Settle(id)) => {
            let _call = handover::CALLS.read().await;
            pod.relays.settle(id).await;
            pod.changed();
            "ok\n".into()
        }
        Some(Request::Reopen(id)) => match Holder::find(pod, id)
            .map(|holder| holder.with_io(|io| io.outputs.as_ref().map(|outputs| outputs.reopen())))
        {
            Ok(Some(Some(Ok(())))) => "ok\n".into(),
            Ok(Some(Some(Err(error)))) => refuse("other", format!("open the log: {error}")),
            Ok(_) => refuse("precondition", format!("container {id} has no log of the shim's")),
            Err(error) => refuse("not found", error.to_string()),
        },
        Some(Request::Attach(id, streams)) => match attach(pod, id, *streams) {
            Ok(attached) => {
                write.write_all(b"ok\n").await?;
                // Frames that came with the request.
                let early = io::Cursor::new(read.buffer().to_vec());
                let asked = (id.clone(), *streams);
                return attached.run(early, asked, read.into_inner(), write).await;
            }
            Err(error @ Error::NotFound(_)) => refuse("not found", error.to_string()),
            Err(error) => refuse("precondition", error.to_string()),
        },
    };
    write.write_all(answer.as_bytes()).await
}

/// Lends the daemon what would be lost with us, for as long as it stays.
async fn lend(stream: UnixStream, pod: &Pod) -> io::Result<()> {
    use std::os::fd::AsFd as _;
    let mut told = BTreeSet::<String>::new();
    let mut told_all = false;
    loop {
        // Before the look, so that no change after it is missed.
        let changed = pod.lent.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let lending = pod.lending();
        for gone in told.iter().filter(|name| !lending.contains_key(*name)) {
            fds::send(&stream, Kind::Drop, gone, None).await?;
        }
        told.retain(|name| lending.contains_key(name));
        for (name, fd) in lending {
            if !told.contains(&name) {
                fds::send(&stream, Kind::Keep, &name, Some(fd.as_fd())).await?;
                told.insert(name);
            }
        }
        if !std::mem::replace(&mut told_all, true) {
            fds::send(&stream, Kind::End, "", None).await?;
        }
        tokio::select! {
            biased;
            // It says nothing; what comes is its end.
            left = stream.readable() => return left,
            () = changed => {}
        }
    }
}

/// Who has a container's streams: the container, or (another shim runs it) its relay.
enum Holder {
    Container(Arc<crate::pod::Container>),
    Relay(Arc<crate::relay::Relay>),
}

impl Holder {
    fn find(pod: &Pod, id: &str) -> Result<Self, Error> {
        match pod.relays.find(id) {
            Some(relay) => Ok(Self::Relay(relay)),
            None => pod.container(id).map(Self::Container),
        }
    }

    fn with_io<T>(&self, f: impl FnOnce(&mut stdio::Io) -> T) -> Option<T> {
        match self {
            Self::Container(container) => container.init.with_io(f),
            Self::Relay(relay) => Some(relay.with_io(f)),
        }
    }
}

/// What the daemon kept of the shim before us.
async fn given_back(stream: &UnixStream) -> io::Result<control::Kept> {
    let mut kept = control::Kept::new();
    let mut reader = fds::Reader::new(stream);
    let all = async {
        while let Some(frame) = reader.frame().await? {
            match (frame.kind, frame.fd) {
                (Kind::Keep, Some(fd)) => drop(kept.insert(frame.name, fd)),
                (Kind::End, _) => return io::Result::Ok(()),
                _ => {}
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    };
    tokio::time::timeout(REQUEST, all).await??;
    Ok(kept)
}

/// An attached client's ends inside the shim.
struct Attachment {
    pod: Arc<Pod>,
    holder: Holder,
    outputs: Arc<stdio::Outputs>,
    client: Arc<stdio::Attached>,
    /// The client may feed standard input.
    input: bool,
    /// Standard input ends with this client.
    once: bool,
}

fn attach(pod: &Arc<Pod>, id: &str, streams: Attach) -> Result<Attachment, Error> {
    let holder = Holder::find(pod, id)?;
    if let Holder::Container(container) = &holder
        && !matches!(container.init.stage(), Stage::Created { .. } | Stage::Running { .. })
    {
        return Err(Error::Precondition(format!("container {id} does not run")));
    }
    let ends = holder.with_io(|io| {
        let outputs = io.outputs.clone()?;
        Some((outputs, streams.stdin && io.input().is_some(), streams.stdin && io.once()))
    });
    let (outputs, input, once) = ends.flatten().ok_or_else(|| {
        Error::Precondition(format!("the streams of container {id} are not the shim's"))
    })?;
    if streams.stdin && !input {
        return Err(Error::Precondition(format!(
            "container {id} has no standard input to attach to"
        )));
    }
    let client = outputs.attach(streams);
    Ok(Attachment { pod: pod.clone(), holder, outputs, client, input, once })
}

impl Attachment {
    async fn run(
        self,
        early: io::Cursor<Vec<u8>>,
        (container, streams): (String, Attach),
        read: OwnedReadHalf,
        write: OwnedWriteHalf,
    ) -> io::Result<()> {
        let client = self.client.clone();
        let stream: &UnixStream = read.as_ref();
        let known = AttachedClient { fd: stream.as_raw_fd(), container, streams };
        lock(&self.pod.attached).insert(known.fd, (known.clone(), client.clone()));
        let _known = Known(&self.pod, known.fd);
        let out = send(&client, write);
        let inward = self.receive(early, read);
        // Whichever ends first: the container's output, or the client.
        let result = tokio::select! {
            biased;
            sent = out => sent,
            received = inward => received,
        };
        if self.once {
            self.close_stdin();
        }
        result
    }

    fn close_stdin(&self) {
        match &self.holder {
            Holder::Container(container) => container.init.close_stdin(),
            Holder::Relay(relay) => relay.with_io(stdio::Io::close_stdin),
        }
        self.pod.changed();
    }

    /// Takes frames until the client is gone.
    async fn receive(&self, early: io::Cursor<Vec<u8>>, read: OwnedReadHalf) -> io::Result<()> {
        let mut read = early.chain(read);
        // Asked for anew each time: CloseIO ends the input of attached clients too.
        let target =
            |open: bool| open.then(|| self.holder.with_io(|io| io.input())).flatten().flatten();
        let mut open = self.input;
        loop {
            let mut head = [0; control::HEADER];
            read.read_exact(&mut head[..1]).await?;
            // In the middle of a frame: an upgrade waits for its end.
            let _busy = Busy::begin();
            read.read_exact(&mut head[1..]).await?;
            let (kind, length) = control::parse_header(head).ok_or(io::ErrorKind::InvalidData)?;
            let mut payload = vec![0; length];
            read.read_exact(&mut payload).await?;
            match kind {
                Kind::Stdin if payload.is_empty() => {
                    let terminal = self.holder.with_io(|io| io.is_terminal()).unwrap_or_default();
                    if terminal && let Some(to) = target(open) {
                        // A terminal's end of input is a character.
                        let _ = stdio::write_all(&to, &[4]).await;
                    }
                    open = false;
                    if self.once {
                        self.close_stdin();
                    }
                }
                Kind::Stdin => {
                    if let Some(to) = target(open)
                        && stdio::write_all(&to, &payload).await.is_err()
                    {
                        // The container closed its input; what comes is dropped.
                        open = false;
                    }
                }
                Kind::Resize => {
                    if let [a, b, c, d] = payload[..] {
                        let (width, height) =
                            (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
                        self.holder.with_io(|io| io.resize(width, height));
                    }
                }
                Kind::Stdout | Kind::Stderr | Kind::End | Kind::Keep | Kind::Drop => {
                    return Err(io::ErrorKind::InvalidData.into());
                }
            }
        }
    }
}

/// While an attached client is known, an upgrade of the shim keeps it.
struct Known<'a>(&'a Pod, i32);

impl Drop for Known<'_> {
    fn drop(&mut self) {
        lock(&self.0.attached).remove(&self.1);
    }
}

/// Goes on with a client that was attached to the code before us.
pub(crate) fn attach_again(stream: UnixStream, pod: &Arc<Pod>, client: &AttachedClient) {
    let Ok(attached) = attach(pod, &client.container, client.streams) else { return };
    let asked = (client.container.clone(), client.streams);
    let (read, write) = stream.into_split();
    tokio::spawn(async move {
        let _ = attached.run(io::Cursor::default(), asked, read, write).await;
    });
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.outputs.detach(&self.client);
    }
}

/// Sends frames until the container's output ends or the client does not keep up.
async fn send(client: &stdio::Attached, mut write: OwnedWriteHalf) -> io::Result<()> {
    loop {
        match client.next().await {
            Next::Bytes(bytes) => {
                let _busy = Busy::begin();
                write.write_all(&bytes).await?;
            }
            Next::End => return Ok(()),
            Next::Overrun => return Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

//! The binary: `start` leaves a shim behind, `delete` cleans up without one, `serve` is the shim.

use std::{
    ffi::OsString,
    fs,
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::{
            fs::{DirBuilderExt as _, FileTypeExt as _, OpenOptionsExt as _},
            net::{UnixListener, UnixStream},
            process::CommandExt as _,
        },
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::Arc,
    time::{Duration, SystemTime},
};

use holdfast_protos::shim::{
    api::DeleteResponse,
    protobuf::{Message, MessageField, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};

use crate::{
    bootstrap::{self, Action, Arguments, Input, Reader},
    bundle::{Bundle, ExitRecord, replace},
    cgroup::Cgroup,
    control::Kept,
    crash,
    handover::{self, Handover, Origin},
    memory, mounts, namespaces,
    pod::{Pod, Saved, end_container},
    pod_init,
    process::{self, Reaper, Signals, check, report, watch_fd},
    publish::Events,
    runtime::{self, Runtime},
    server,
};

/// The descriptor on which a served shim finds its listener.
const LISTENER: i32 = 3;

/// How long `start` waits for its input to end.
const INPUT: Duration = Duration::from_secs(10);

/// Most that is read of it.
const INPUT_MAX: usize = 4 * 1024 * 1024;

/// How long a process that dies may take to let go of its sockets.
const DYING: Duration = Duration::from_secs(1);

/// How long a shim that leaves waits for its last events to be acknowledged.
const LAST_EVENTS: Duration = Duration::from_secs(2);

/// The binary's main function.
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    // By its name alone, or by the path that it has in a container.
    if Path::new(&name).file_name() == Some(pod_init::NAME.as_ref()) {
        return code(pod_init::run().map_err(|error| error.to_string()));
    }
    code(run(arguments))
}

fn code(done: Result<(), String>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            report!("containerd-shim-holdfast-v2: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: impl Iterator<Item = OsString>) -> Result<(), String> {
    let arguments = Arguments::parse(arguments)?;
    match arguments.action {
        Action::Start => start(&arguments),
        Action::Serve => serve(&arguments),
        Action::Look => handover::look(),
        Action::Delete => delete(&arguments),
        Action::Info => info(),
        Action::Version => {
            say(format!("containerd-shim-holdfast-v2:\n  Version: {}\n", env!("CARGO_PKG_VERSION"))
                .as_bytes())
        }
    }
}

fn say(bytes: &[u8]) -> Result<(), String> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|e| format!("standard output: {e}"))
}

/// Standard input up to its end, which must come in time.
fn input() -> Result<Vec<u8>, String> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let by = std::time::Instant::now() + INPUT;
    let stdin = io::stdin();
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let left = by.saturating_duration_since(std::time::Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return Err(format!("standard input did not end within {INPUT:?}")),
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(errno) => return Err(format!("standard input: {errno}")),
        }
        match nix::unistd::read(&stdin, &mut buffer) {
            Ok(0) => return Ok(bytes),
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(format!("standard input: {errno}")),
        }
        if bytes.len() > INPUT_MAX {
            return Err(format!("standard input has more than {INPUT_MAX} bytes"));
        }
    }
}

fn start(arguments: &Arguments) -> Result<(), String> {
    let cwd = std::env::current_dir().map_err(|error| format!("working directory: {error}"))?;
    let bundle = Bundle::new(cwd);
    let input = Input::parse(&input()?, arguments)?;
    let group = bootstrap::group(&bundle, &arguments.id)?;
    let socket = bootstrap::socket_path(arguments, &input, &group)?;
    let address = format!("unix://{}", socket.display());
    let said = bootstrap::answer(&input, Reader::from_environment(), &address);
    let write = |path: PathBuf, text: &str| {
        replace(&path, text.as_bytes(), false).map_err(|e| format!("{}: {e}", path.display()))
    };
    // First, so that whoever cleans up after us finds what we leave: a socket, or a shim.
    write(bundle.address(), &address)?;
    crash::point("shim.launch.address-written");
    if let Some(listener) = listen(&socket)? {
        crash::point("shim.launch.bound");
        let pid = leave_behind(arguments, &input, &bundle, &listener).map_err(|error| {
            let _ = fs::remove_file(&socket);
            format!("leave a shim behind: {error}")
        })?;
        crash::point("shim.launch.spawned");
        if let Some(cgroup) = server::shim_cgroup(&input) {
            Cgroup::make(&cgroup)
                .and_then(|cgroup| cgroup.add(pid))
                .map_err(|error| format!("put the shim into cgroup {cgroup}: {error}"))?;
        }
        write(bundle.shim_pid(), &pid.to_string())?;
        crash::point("shim.launch.pid-written");
    }
    say(&said)
}

/// Binds the group's socket; `None`: its shim runs already.
fn listen(socket: &Path) -> Result<Option<UnixListener>, String> {
    let dir = socket.parent().unwrap_or(Path::new("/"));
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(dir)
        .map_err(|error| format!("socket directory {}: {error}", dir.display()))?;
    let named = |error: io::Error| format!("socket {}: {error}", socket.display());
    // Made for the owner alone from the first moment.
    let mask = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let mut bound = UnixListener::bind(socket);
    if let Err(error) = &bound
        && error.kind() == io::ErrorKind::AddrInUse
    {
        if UnixStream::connect(socket).is_ok() {
            nix::sys::stat::umask(mask);
            return Ok(None);
        }
        // Left by a shim that was killed.
        fs::remove_file(socket).map_err(named)?;
        bound = UnixListener::bind(socket);
    }
    nix::sys::stat::umask(mask);
    bound.map(Some).map_err(named)
}

/// Starts the process that serves, in a session of its own.
#[expect(unsafe_code, reason = "only system calls between fork and exec")]
fn leave_behind(
    arguments: &Arguments,
    input: &Input,
    bundle: &Bundle,
    listener: &UnixListener,
) -> io::Result<u32> {
    let log = fs::OpenOptions::new()
        // Read-write, so that it neither blocks nor breaks when the daemon goes.
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(bundle.shim_log())
        .ok()
        .filter(|log| log.metadata().is_ok_and(|meta| meta.file_type().is_fifo()));
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("containerd-shim-holdfast-v2")
        .args(["-namespace", &arguments.namespace, "-id", &arguments.id])
        .args(["-address", &arguments.address, "serve"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.map_or_else(Stdio::null, Stdio::from));
    if let Some(address) = input.ttrpc_address() {
        command.env("TTRPC_ADDRESS", address);
    }
    command.envs(memory::environment());
    let fd = listener.as_raw_fd();
    let prepare = move || {
        // SAFETY: no memory is involved; a duplicate does not close on exec.
        unsafe {
            if fd == LISTENER {
                check(libc::fcntl(fd, libc::F_SETFD, 0))?;
            } else {
                check(libc::dup2(fd, LISTENER))?;
            }
            check(libc::setsid())?;
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(prepare) };
    Ok(command.spawn()?.id())
}

/// How the OCI runtime is called when the options do not say: the environment's word, else runc.
fn default_runtime(namespace: &str) -> Runtime {
    let mut runtime = Runtime::default();
    if let Some(binary) = std::env::var_os("HOLDFAST_RUNTIME") {
        runtime.binary = binary.into();
    }
    if let Some(root) = std::env::var_os("HOLDFAST_RUNTIME_ROOT") {
        runtime.root = root.into();
    }
    runtime.root = runtime.root.join(namespace);
    if let Some(seconds) =
        std::env::var("HOLDFAST_RUNTIME_TIMEOUT").ok().and_then(|text| text.parse().ok())
    {
        runtime.deadline_secs = seconds;
    }
    runtime
}

fn run_async<T>(work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        // The default is a buffer for a thousand.
        .max_io_events_per_tick(64)
        .build()
        .map_err(|error| format!("event loop: {error}"))?
        .block_on(work)
}

fn serve(arguments: &Arguments) -> Result<(), String> {
    memory::begin();
    let handed = arguments.handover.map(handover::receive).transpose()?;
    let (listener, bundle) = match &handed {
        Some((handed, _)) => {
            let listener = UnixListener::from(handover::inherited(handed.listener)?);
            (listener, Bundle::new(&handed.bundle))
        }
        None => {
            let cwd = std::env::current_dir();
            let cwd = cwd.map_err(|error| format!("working directory: {error}"))?;
            (inherited()?, Bundle::new(cwd))
        }
    };
    // The bundle must be removable, and its removal noticeable.
    std::env::set_current_dir("/").map_err(|error| format!("/: {error}"))?;
    process::become_subreaper().map_err(|error| format!("become subreaper: {error}"))?;
    let socket = listener.local_addr().ok().and_then(|a| a.as_pathname().map(Path::to_owned));
    let events = Events::new(
        arguments.namespace.clone(),
        std::env::var("TTRPC_ADDRESS")
            .ok()
            .filter(|address| !address.is_empty())
            .map(|address| PathBuf::from(address.strip_prefix("unix://").unwrap_or(&address))),
    );
    let pod = Pod::new(
        arguments.namespace.clone(),
        bundle,
        events,
        default_runtime(&arguments.namespace),
    );
    if handed.is_none() {
        pod.begin();
    }
    crash::point("shim.serve.begun");
    let done = run_async(live(arguments, listener, pod.clone(), handed));
    crash::point("shim.serve.ended");
    let _ = fs::remove_file(pod.bundle.io_socket());
    if let Some(socket) = socket {
        let _ = fs::remove_file(socket);
    }
    done
}

/// The listener that `start` bound.
#[expect(unsafe_code, reason = "an inherited descriptor becomes owned")]
fn inherited() -> Result<UnixListener, String> {
    let bad = |error: io::Error| format!("descriptor {LISTENER} is no listening socket: {error}");
    // SAFETY: no memory is involved; a descriptor that is not there is an error.
    check(unsafe { libc::fcntl(LISTENER, libc::F_SETFD, libc::FD_CLOEXEC) }).map_err(bad)?;
    // SAFETY: by the contract of `serve` it is ours alone.
    let listener = UnixListener::from(unsafe { OwnedFd::from_raw_fd(LISTENER) });
    listener.local_addr().map_err(bad)?;
    listener.set_nonblocking(true).map_err(bad)?;
    Ok(listener)
}

/// The shim's life.
async fn live(
    arguments: &Arguments,
    listener: UnixListener,
    pod: Arc<Pod>,
    handed: Option<(Handover, Kept)>,
) -> Result<(), String> {
    let signals = Signals::new(&[libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGUSR1])
        .map_err(|error| format!("signals: {error}"))?;
    let (asker, control) = match handed {
        Some((handed, kept)) => take_over(&pod, handed, kept).await?,
        None => (None, server::control_listener(&pod.bundle)),
    };
    let listener = tokio::net::UnixListener::from_std(listener)
        .map_err(|error| format!("listener: {error}"))?;
    let _ = pod.origin.set(Origin {
        arguments: arguments.clone(),
        listener: listener.as_raw_fd(),
        control: control.as_ref().ok().map(|control| control.as_raw_fd()),
    });
    let mut server =
        server::serve(listener, &pod).await.map_err(|error| format!("listener: {error}"))?;
    match control {
        Ok(control) => {
            tokio::spawn(server::serve_control(control, pod.clone()));
        }
        Err(error) => report!("no control socket: {error}"),
    }
    if let Some(mut asker) = asker {
        // It may have gone; the upgrade is done all the same.
        let _ = tokio::io::AsyncWriteExt::write_all(&mut asker, b"ok\n").await;
    }
    let forwarding = pod.clone();
    tokio::spawn(async move { forwarding.events.run().await });
    tokio::spawn(memory::keep_small());
    let watching = pod.clone();
    tokio::spawn(async move {
        if let Err(error) = watch_bundle(watching).await {
            report!("watch the bundle: {error}");
        }
    });

    loop {
        tokio::select! {
            biased;
            came = signals.next() => {
                let came = came.map_err(|error| format!("signals: {error}"))?;
                if came & (1 << libc::SIGCHLD) != 0 {
                    pod.reaper.sweep();
                }
                if came & (1 << libc::SIGUSR1) != 0 {
                    report!("{}", pod.describe());
                }
                // With containers to answer for, a shim does not go because somebody asks all
                // processes to.
                if came & (1 << libc::SIGTERM | 1 << libc::SIGINT) != 0
                    && pod.is_empty()
                    && !pod.orphan_is_waiting()
                    && pod.relays.is_empty()
                {
                    pod.exit();
                }
            }
            () = pod.leave.notified() => {}
        }
        if pod.is_done() {
            break;
        }
    }
    // The answer to the call that ends us goes out first.
    tokio::time::sleep(Duration::from_millis(20)).await;
    if pod.bundle.dir().exists() {
        pod.events.flush(LAST_EVENTS).await;
    }
    let _ = tokio::time::timeout(Duration::from_secs(1), server.shutdown()).await;
    Ok(())
}

/// Takes over from the code that was here before; gives who asked for that, and the control socket.
async fn take_over(
    pod: &Arc<Pod>,
    handed: Handover,
    kept: Kept,
) -> Result<(Option<tokio::net::UnixStream>, io::Result<tokio::net::UnixListener>), String> {
    let stream = |fd: i32| {
        let stream = std::os::unix::net::UnixStream::from(handover::inherited(fd)?);
        tokio::net::UnixStream::from_std(stream).map_err(|error| error.to_string())
    };
    let control = match handed.control {
        Some(fd) => {
            let control = UnixListener::from(handover::inherited(fd)?);
            tokio::net::UnixListener::from_std(control)
        }
        None => server::control_listener(&pod.bundle),
    };
    pod.take_over_from(Saved::from_value(&handed.state)?, kept, handed.unfinished).await;
    pod.events.restore(handed.events);
    for client in handed.attached {
        match stream(client.fd) {
            Ok(stream) => server::attach_again(stream, pod, &client),
            Err(error) => report!("an attached client: {error}"),
        }
    }
    // Those that ended meanwhile were told to the code before.
    pod.reaper.sweep();
    pod.changed();
    Ok((handed.asker.map(stream).transpose()?, control))
}

/// Wakes the shim when its bundle may have gone: one inotify instance per shim, and no timer.
async fn watch_bundle(pod: Arc<Pod>) -> io::Result<()> {
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    // The bound control socket keeps the directory's inode, so that its own removal is told only
    // when we are gone; that of what is in it is told at once.
    inotify.add_watch(
        pod.bundle.dir(),
        AddWatchFlags::IN_DELETE | AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF,
    )?;
    let inotify = watch_fd(OwnedFd::from(inotify), tokio::io::Interest::READABLE)?;
    loop {
        inotify.readable().await?.clear_ready();
        // The directory goes after its files.
        tokio::time::sleep(Duration::from_secs(1)).await;
        while nix::unistd::read(inotify.get_ref(), &mut [0; 4096]).is_ok() {}
        pod.leave.notify_one();
    }
}

/// Cleans up where no shim is left to do it.
fn delete(arguments: &Arguments) -> Result<(), String> {
    let bundle = if arguments.bundle.as_os_str().is_empty() {
        Bundle::new(std::env::current_dir().map_err(|e| format!("working directory: {e}"))?)
    } else {
        Bundle::new(&arguments.bundle)
    };
    let ended = run_async(clean_up(arguments, &bundle))?;
    let mut response = DeleteResponse::new();
    response.pid = ended.pid;
    response.exit_status = ended.status;
    response.exited_at = server::timestamp(ended.at);
    say(&response.write_to_bytes().map_err(|error| error.to_string())?)
}

async fn clean_up(arguments: &Arguments, bundle: &Bundle) -> Result<crate::pod::Ended, String> {
    let reaper = Arc::<Reaper>::default();
    let record = ExitRecord::load(bundle.exit_record()).unwrap_or_default();
    let runtime = fs::read(bundle.options())
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_else(|| default_runtime(&arguments.namespace));
    let mut problems = Vec::new();
    let pid = fs::read_to_string(bundle.init_pid())
        .ok()
        .and_then(|text| text.trim().parse::<u32>().ok())
        .unwrap_or_default();
    // A container at all, and not a pod whose shim is gone?
    if bundle.config().exists() || pid != 0 {
        // The pid is the container's only while the runtime says so; it may be another's by now.
        match runtime.state(&reaper, &arguments.id).await {
            Ok(state) if state.status != "stopped" && state.pid == pid && pid != 0 => {
                problems.extend(end_container(pid).await.err());
            }
            _ => {}
        }
        if let Err(error) = runtime.delete(&reaper, &arguments.id, true).await
            && !matches!(error, runtime::Error::Spawn { .. })
        {
            problems.push(error.to_string());
        }
        crash::point("shim.clean-up.container-deleted");
    }
    if let Err(error) = mounts::unmount(&bundle.rootfs()) {
        problems.push(format!("unmount {}: {error}", bundle.rootfs().display()));
    }
    // A shim that only did not answer in time still owns its pod.
    if !shim_answers(bundle) {
        // containerd runs this for a pod of the Sandbox service, and for none of its containers.
        if let Ok(state) = fs::read(bundle.shim_state()) {
            match Saved::parse(&state) {
                Ok(left) => problems.extend(left.end(&reaper).await),
                // Of a release that this one cannot read, or broken: the rest goes all the same.
                Err(error) => report!("delete: what the pod had is not known: {error}"),
            }
        }
        namespaces::remove(bundle);
        crash::point("shim.clean-up.namespaces-gone");
        let _ = fs::remove_file(bundle.io_socket());
        let _ = fs::remove_file(bundle.shim_state());
        remove_dead_socket(bundle);
        crash::point("shim.clean-up.sockets-gone");
    }
    if !problems.is_empty() {
        return Err(problems.join("; "));
    }
    Ok(match record {
        Some(record) => {
            crate::pod::Ended { pid: record.pid, status: record.wire_status(), at: record.at }
        }
        // Nobody saw its end but us.
        None => crate::pod::Ended { pid, status: 137, at: SystemTime::now() },
    })
}

/// Somebody listens where the bundle says its shim is.
fn shim_answers(bundle: &Bundle) -> bool {
    let Ok(address) = fs::read_to_string(bundle.address()) else { return false };
    let Ok(mut stream) = UnixStream::connect(address.trim().trim_start_matches("unix://")) else {
        return false;
    };
    // A process that is dying lets go of its listener last, after what takes the kernel long; until
    // then it takes connections, and breaks them. A shim that lives says nothing before it is asked.
    let waited = stream.set_read_timeout(Some(DYING)).and_then(|()| stream.read(&mut [0]));
    waited.is_err_and(|error| {
        matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
    })
}

/// Removes the socket that a shim which was killed has left. A bundle of a container names its pod's
/// socket, which is not to go while that shim lives.
fn remove_dead_socket(bundle: &Bundle) {
    let Ok(address) = fs::read_to_string(bundle.address()) else { return };
    let Some(path) = address.trim().strip_prefix("unix://").filter(|path| path.starts_with('/'))
    else {
        return;
    };
    let refused = UnixStream::connect(path)
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    if refused {
        let _ = fs::remove_file(path);
    }
}

/// `-info`: what this shim and its runtime are.
fn info() -> Result<(), String> {
    let input = input()?;
    let options = Any::parse_from_bytes(&input).unwrap_or_default();
    let runtime = server::runtime_of(&options, &default_runtime("default"))?;
    let info = run_async(async {
        let reaper = Arc::<Reaper>::default();
        let mut info = RuntimeInfo::new();
        info.name = "containerd-shim-holdfast-v2".into();
        let mut version = RuntimeVersion::new();
        version.version = env!("CARGO_PKG_VERSION").into();
        info.version = MessageField::some(version);
        if !options.type_url.is_empty() {
            info.options = MessageField::some(options.clone());
        }
        // A runtime that is missing or old has no features to tell; the shim is what it is.
        if let Ok(features) = runtime.features(&reaper).await {
            let mut any = Any::new();
            any.type_url =
                "types.containerd.io/opencontainers/runtime-spec/1/features/Features".into();
            any.value = features;
            info.features = MessageField::some(any);
        }
        if let Ok(version) = runtime.version(&reaper).await {
            info.annotations.insert("holdfast.dev/oci-runtime".into(), version);
        }
        Ok(info)
    })?;
    say(&info.write_to_bytes().map_err(|error| error.to_string())?)
}

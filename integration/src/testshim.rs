//! What two small shims of the tests are made of: the `containerd-shim` crate gives start-up and wire, in
//! an older and a newer generation, and this runs the containers, by runc.
//!
//! They are as small as a shim may be, to show what the contract lets a daemon count on: no terminals,
//! no events, no statistics; streams are handed to runc as they are.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::SystemTime,
};

use holdfast_protos::shim::{oci, protobuf::Message as _};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};

/// Why a call is refused, and the code for it.
#[derive(Debug)]
pub enum Refusal {
    /// NOT_FOUND
    NotFound(String),
    /// ALREADY_EXISTS
    Exists(String),
    /// FAILED_PRECONDITION
    State(String),
    /// UNIMPLEMENTED
    Lacking(&'static str),
    /// UNKNOWN
    Failed(String),
}

type Done<T> = Result<T, Refusal>;

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Refusal::Failed(error.to_string())
    }
}

/// How a process ended: the wire's status, and when.
pub type Ended = (u32, SystemTime);

/// The state of a process.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// 0: not made yet.
    pub pid: u32,
    /// It was started.
    pub started: bool,
    /// It is frozen.
    pub paused: bool,
    /// It has ended.
    pub ended: Option<Ended>,
}

#[derive(Debug)]
struct Process {
    state: State,
    /// An exec's OCI `Process`.
    spec: Vec<u8>,
    streams: Streams,
    /// The write side of its standard input, until it is closed.
    input: Option<File>,
}

/// FIFOs of a process; empty: none.
#[derive(Clone, Debug, Default)]
pub struct Streams {
    /// Standard input.
    pub stdin: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

#[derive(Debug)]
struct Container {
    bundle: PathBuf,
    root: PathBuf,
    init: Process,
    execs: BTreeMap<String, Process>,
}

/// Containers, by runc.
#[derive(Debug, Default)]
pub struct Engine {
    containers: Mutex<BTreeMap<String, Container>>,
    changed: Condvar,
}

/// Whose shim a container's is: the annotation that Kubernetes' sandboxes have, else its own.
pub fn group(id: &str) -> String {
    let spec: serde_json::Value = fs::read("config.json")
        .ok()
        .and_then(|json| serde_json::from_slice(&json).ok())
        .unwrap_or_default();
    spec["annotations"]["io.kubernetes.cri.sandbox-id"].as_str().unwrap_or(id).to_owned()
}

/// `delete`: what is left of a container whose shim is gone.
pub fn clean_up(bundle: &Path, id: &str) {
    let root = fs::read_to_string(bundle.join("runc-root")).unwrap_or_default();
    let _ = Command::new("runc").arg("--root").arg(root).args(["delete", "--force", id]).output();
}

fn open(path: &str, read: bool, write: bool) -> io::Result<Option<File>> {
    if path.is_empty() {
        return Ok(None);
    }
    let file = File::options().read(read).write(write).custom_flags(libc::O_NONBLOCK).open(path)?;
    // The container is not to find its streams non-blocking.
    let flags = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_GETFL)?;
    let flags = nix::fcntl::OFlag::from_bits_truncate(flags) - nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETFL(flags))?;
    Ok(Some(file))
}

/// Runs runc with these streams, which the container's process inherits.
fn runc(command: &mut Command, streams: &Streams) -> Done<Option<File>> {
    let stdio = |file: Option<File>| file.map_or_else(Stdio::null, Stdio::from);
    let stdin = open(&streams.stdin, true, false)?;
    let held = open(&streams.stdin, false, true)?;
    // Both ways, so that a reader that goes does not hurt.
    command.stdin(stdio(stdin)).stdout(stdio(open(&streams.stdout, true, true)?));
    command.stderr(stdio(open(&streams.stderr, true, true)?));
    let status = command.status()?;
    match status.success() {
        true => Ok(held),
        false => Err(Refusal::Failed(format!("runc: {status}"))),
    }
}

fn plain(command: &mut Command) -> Done<()> {
    let output = command.output()?;
    match output.status.success() {
        true => Ok(()),
        false => Err(Refusal::Failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

impl Engine {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Container>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, id: &str, exec: &str, f: impl FnOnce(&mut Process) -> Done<T>) -> Done<T> {
        let mut all = self.lock();
        let container = all.get_mut(id).ok_or_else(|| Refusal::NotFound(id.into()))?;
        match exec {
            "" => f(&mut container.init),
            exec => {
                let process = container.execs.get_mut(exec);
                f(process.ok_or_else(|| Refusal::NotFound(format!("{id}/{exec}")))?)
            }
        }
    }

    /// The runtime, as its options say where its state is.
    fn command(&self, id: &str) -> Done<Command> {
        let all = self.lock();
        let container = all.get(id).ok_or_else(|| Refusal::NotFound(id.into()))?;
        let mut command = Command::new("runc");
        command.arg("--root").arg(&container.root);
        Ok(command)
    }

    /// OCI create. `options` is `containerd.runc.v1.Options`.
    ///
    /// # Errors
    /// There is such a container; runc's.
    pub fn create(
        self: &Arc<Self>,
        id: &str,
        bundle: &str,
        terminal: bool,
        streams: Streams,
        options: &[u8],
    ) -> Done<u32> {
        if terminal {
            return Err(Refusal::Lacking("a terminal"));
        }
        let options = oci::Options::parse_from_bytes(options).unwrap_or_default();
        let root = match options.root.as_str() {
            "" => PathBuf::from("/run/holdfast-testshim"),
            root => Path::new(root).join("k8s.io"),
        };
        let bundle = PathBuf::from(bundle);
        fs::write(bundle.join("runc-root"), root.as_os_str().as_encoded_bytes())?;
        if self.lock().contains_key(id) {
            return Err(Refusal::Exists(id.into()));
        }
        let pid_file = bundle.join("init.pid");
        let mut command = Command::new("runc");
        command.arg("--root").arg(&root).args(["create", "--bundle"]).arg(&bundle);
        command.arg("--pid-file").arg(&pid_file).arg(id);
        let input = runc(&mut command, &streams)?;
        let pid = read_pid(&pid_file)?;
        let state = State { pid, ..State::default() };
        let init = Process { state, spec: Vec::new(), streams, input };
        let container = Container { bundle, root, init, execs: BTreeMap::new() };
        self.lock().insert(id.into(), container);
        self.watch(id, "", pid);
        Ok(pid)
    }

    /// A thread waits for each process, whose parent we are by being the subreaper.
    fn watch(self: &Arc<Self>, id: &str, exec: &str, pid: u32) {
        let (engine, id, exec) = (self.clone(), id.to_owned(), exec.to_owned());
        thread::spawn(move || {
            let status = loop {
                match waitpid(Pid::from_raw(pid.cast_signed()), None) {
                    Ok(WaitStatus::Exited(_, code)) => break code.cast_unsigned(),
                    Ok(WaitStatus::Signaled(_, signal, _)) => {
                        break 128 + (signal as i32).cast_unsigned();
                    }
                    Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                    Err(_) => break 255,
                }
            };
            let _ = engine.with(&id, &exec, |process| {
                process.state.ended = Some((status, SystemTime::now()));
                Ok(())
            });
            engine.changed.notify_all();
        });
    }

    /// OCI start, or (with `exec`) exec.
    ///
    /// # Errors
    /// It is not known, or runs; runc's.
    pub fn start(self: &Arc<Self>, id: &str, exec: &str) -> Done<u32> {
        let before = self.state(id, exec)?;
        if before.started || before.ended.is_some() {
            return Err(Refusal::State(format!("{id} was started")));
        }
        let mut command = self.command(id)?;
        if exec.is_empty() {
            plain(command.arg("start").arg(id))?;
            self.with(id, "", |process| {
                process.state.started = true;
                Ok(process.state.pid)
            })
        } else {
            let bundle = self.lock().get(id).map(|c| c.bundle.clone()).unwrap_or_default();
            let at = |end: &str| bundle.join(format!("{exec}.{end}"));
            let (spec, streams) =
                self.with(id, exec, |p| Ok((p.spec.clone(), p.streams.clone())))?;
            fs::write(at("json"), spec)?;
            command.args(["exec", "--detach", "--process"]).arg(at("json"));
            command.arg("--pid-file").arg(at("pid")).arg(id);
            let started = runc(&mut command, &streams);
            let pid = started.and_then(|input| Ok((read_pid(&at("pid"))?, input)));
            let _ = fs::remove_file(at("json"));
            let _ = fs::remove_file(at("pid"));
            let (pid, input) = pid?;
            self.with(id, exec, |process| {
                process.state.pid = pid;
                process.state.started = true;
                process.input = input;
                Ok(())
            })?;
            self.watch(id, exec, pid);
            Ok(pid)
        }
    }

    /// Registers an exec.
    ///
    /// # Errors
    /// No such container, or there is such an exec.
    pub fn exec(
        &self,
        id: &str,
        exec: &str,
        terminal: bool,
        streams: Streams,
        spec: Vec<u8>,
    ) -> Done<()> {
        if terminal {
            return Err(Refusal::Lacking("a terminal"));
        }
        let mut all = self.lock();
        let container = all.get_mut(id).ok_or_else(|| Refusal::NotFound(id.into()))?;
        if container.init.state.ended.is_some() {
            return Err(Refusal::State(format!("{id} has ended")));
        }
        if container.execs.contains_key(exec) {
            return Err(Refusal::Exists(exec.into()));
        }
        let process = Process { state: State::default(), spec, streams, input: None };
        container.execs.insert(exec.into(), process);
        Ok(())
    }

    /// The state of a process.
    ///
    /// # Errors
    /// It is not known.
    pub fn state(&self, id: &str, exec: &str) -> Done<State> {
        self.with(id, exec, |process| Ok(process.state.clone()))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It is not known.
    pub fn wait(&self, id: &str, exec: &str) -> Done<Ended> {
        let mut all = self.lock();
        loop {
            let container = all.get(id).ok_or_else(|| Refusal::NotFound(id.into()))?;
            let process = match exec {
                "" => Some(&container.init),
                exec => container.execs.get(exec),
            };
            let process = process.ok_or_else(|| Refusal::NotFound(exec.into()))?;
            if let Some(ended) = process.state.ended {
                return Ok(ended);
            }
            all = self.changed.wait(all).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Signals a process, or (`everybody`) all of the container's.
    ///
    /// # Errors
    /// It is not known, or has ended.
    pub fn kill(&self, id: &str, exec: &str, signal: u32, everybody: bool) -> Done<()> {
        let state = self.state(id, exec)?;
        if state.ended.is_some() || state.pid == 0 {
            return Err(Refusal::NotFound(format!("{id}: process has ended")));
        }
        if everybody && exec.is_empty() {
            return plain(self.command(id)?.args(["kill", "--all", id]).arg(signal.to_string()));
        }
        let signal = Signal::try_from(signal.cast_signed())
            .map_err(|_| Refusal::Failed(format!("signal {signal}")))?;
        kill(Pid::from_raw(state.pid.cast_signed()), signal)
            .map_err(|errno| Refusal::NotFound(format!("{id}: {errno}")))
    }

    /// Removes a process that has ended.
    ///
    /// # Errors
    /// It is not known, or runs; runc's.
    pub fn delete(&self, id: &str, exec: &str) -> Done<(u32, Ended)> {
        let state = self.state(id, exec)?;
        let ended = match state.ended {
            Some(ended) => ended,
            // Never run: nothing ends.
            None if state.pid == 0 => (0, SystemTime::now()),
            None => return Err(Refusal::State(format!("{id} has not ended"))),
        };
        if exec.is_empty() {
            plain(self.command(id)?.args(["delete", "--force", id]))?;
            self.lock().remove(id);
        } else if let Some(container) = self.lock().get_mut(id) {
            container.execs.remove(exec);
        }
        self.changed.notify_all();
        Ok((state.pid, ended))
    }

    /// Closes our side of its standard input.
    ///
    /// # Errors
    /// It is not known.
    pub fn close_input(&self, id: &str, exec: &str) -> Done<()> {
        self.with(id, exec, |process| {
            process.input = None;
            Ok(())
        })
    }

    /// Freezes or thaws.
    ///
    /// # Errors
    /// It is not known; runc's.
    pub fn freeze(&self, id: &str, frozen: bool) -> Done<()> {
        let verb = if frozen { "pause" } else { "resume" };
        plain(self.command(id)?.args([verb, id]))?;
        self.with(id, "", |process| {
            process.state.paused = frozen;
            Ok(())
        })
    }

    /// Whether it has no container: then it may exit.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }
}

fn read_pid(path: &Path) -> Done<u32> {
    let text = fs::read_to_string(path)?;
    text.trim().parse().map_err(|_| Refusal::Failed(format!("no pid: {text:?}")))
}

/// The whole of a shim, on a generation of the `containerd-shim` crate.
#[macro_export]
macro_rules! test_shim {
    ($shim:ident, $name:literal) => {
        use std::{path::PathBuf, sync::Arc, time::SystemTime};

        use $crate::testshim::{Engine, Refusal, Streams, clean_up, group};
        use $shim::{
            Config, DeleteResponse, ExitSignal, Flags, StartOpts, TtrpcContext, TtrpcResult, api,
            protos::{
                protobuf::{MessageField, well_known_types::timestamp::Timestamp},
                ttrpc,
            },
            synchronous::publisher::RemotePublisher,
        };

        #[derive(Clone)]
        struct Service {
            id: String,
            bundle: PathBuf,
            exit: Arc<ExitSignal>,
            engine: Arc<Engine>,
        }

        fn refused(refusal: Refusal) -> ttrpc::Error {
            let (code, message) = match refusal {
                Refusal::NotFound(what) => (ttrpc::Code::NOT_FOUND, format!("{what}: not found")),
                Refusal::Exists(what) => {
                    (ttrpc::Code::ALREADY_EXISTS, format!("{what}: exists already"))
                }
                Refusal::State(what) => (ttrpc::Code::FAILED_PRECONDITION, what),
                Refusal::Lacking(what) => {
                    (ttrpc::Code::UNIMPLEMENTED, format!("{what} is not implemented"))
                }
                Refusal::Failed(what) => (ttrpc::Code::UNKNOWN, what),
            };
            ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
        }

        fn stamp(at: SystemTime) -> MessageField<Timestamp> {
            MessageField::some(Timestamp::from(at))
        }

        impl $shim::Shim for Service {
            type T = Service;

            fn new(_: &str, flags: &Flags, _: &mut Config) -> Self {
                let bundle = match flags.bundle.as_str() {
                    "" => std::env::current_dir().unwrap_or_default(),
                    bundle => bundle.into(),
                };
                Service {
                    id: flags.id.clone(),
                    bundle,
                    exit: Arc::default(),
                    engine: Arc::default(),
                }
            }

            fn start_shim(&mut self, opts: StartOpts) -> Result<String, $shim::Error> {
                let group = group(&opts.id);
                $shim::spawn(opts, &group, Vec::new()).map(|(_, address)| address)
            }

            fn delete_shim(&mut self) -> Result<DeleteResponse, $shim::Error> {
                clean_up(&self.bundle, &self.id);
                let mut response = DeleteResponse::new();
                response.exit_status = 137;
                response.exited_at = stamp(SystemTime::now());
                Ok(response)
            }

            fn wait(&mut self) {
                self.exit.wait();
            }

            fn create_task_service(&self, _: RemotePublisher) -> Self::T {
                self.clone()
            }
        }

        impl $shim::Task for Service {
            fn connect(
                &self,
                _: &TtrpcContext,
                r: api::ConnectRequest,
            ) -> TtrpcResult<api::ConnectResponse> {
                let mut answer = api::ConnectResponse::new();
                answer.shim_pid = std::process::id();
                answer.task_pid = self.engine.state(&r.id, "").map_or(0, |state| state.pid);
                answer.version = $name.into();
                Ok(answer)
            }

            fn create(
                &self,
                _: &TtrpcContext,
                r: api::CreateTaskRequest,
            ) -> TtrpcResult<api::CreateTaskResponse> {
                let options = r.options.as_ref().map(|any| any.value.clone()).unwrap_or_default();
                let streams = Streams { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr };
                let made = self.engine.create(&r.id, &r.bundle, r.terminal, streams, &options);
                let mut answer = api::CreateTaskResponse::new();
                answer.pid = made.map_err(refused)?;
                Ok(answer)
            }

            fn start(
                &self,
                _: &TtrpcContext,
                r: api::StartRequest,
            ) -> TtrpcResult<api::StartResponse> {
                let mut answer = api::StartResponse::new();
                answer.pid = self.engine.start(&r.id, &r.exec_id).map_err(refused)?;
                Ok(answer)
            }

            fn exec(
                &self,
                _: &TtrpcContext,
                r: api::ExecProcessRequest,
            ) -> TtrpcResult<api::Empty> {
                let spec = r.spec.as_ref().map(|any| any.value.clone()).unwrap_or_default();
                let streams = Streams { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr };
                let registered = self.engine.exec(&r.id, &r.exec_id, r.terminal, streams, spec);
                registered.map(|()| api::Empty::new()).map_err(refused)
            }

            fn state(
                &self,
                _: &TtrpcContext,
                r: api::StateRequest,
            ) -> TtrpcResult<api::StateResponse> {
                let state = self.engine.state(&r.id, &r.exec_id).map_err(refused)?;
                let mut answer = api::StateResponse::new();
                answer.id = r.id;
                answer.exec_id = r.exec_id;
                answer.pid = state.pid;
                answer.status = match (state.started, state.ended) {
                    (_, Some((status, at))) => {
                        answer.exit_status = status;
                        answer.exited_at = stamp(at);
                        api::Status::STOPPED
                    }
                    (true, None) if state.paused => api::Status::PAUSED,
                    (true, None) => api::Status::RUNNING,
                    (false, None) => api::Status::CREATED,
                }
                .into();
                Ok(answer)
            }

            fn wait(
                &self,
                _: &TtrpcContext,
                r: api::WaitRequest,
            ) -> TtrpcResult<api::WaitResponse> {
                let (status, at) = self.engine.wait(&r.id, &r.exec_id).map_err(refused)?;
                let mut answer = api::WaitResponse::new();
                answer.exit_status = status;
                answer.exited_at = stamp(at);
                Ok(answer)
            }

            fn kill(&self, _: &TtrpcContext, r: api::KillRequest) -> TtrpcResult<api::Empty> {
                let killed = self.engine.kill(&r.id, &r.exec_id, r.signal, r.all);
                killed.map(|()| api::Empty::new()).map_err(refused)
            }

            fn delete(
                &self,
                _: &TtrpcContext,
                r: api::DeleteRequest,
            ) -> TtrpcResult<api::DeleteResponse> {
                let (pid, (status, at)) = self.engine.delete(&r.id, &r.exec_id).map_err(refused)?;
                let mut answer = api::DeleteResponse::new();
                answer.pid = pid;
                answer.exit_status = status;
                answer.exited_at = stamp(at);
                Ok(answer)
            }

            fn close_io(
                &self,
                _: &TtrpcContext,
                r: api::CloseIORequest,
            ) -> TtrpcResult<api::Empty> {
                let closed = self.engine.close_input(&r.id, &r.exec_id);
                closed.map(|()| api::Empty::new()).map_err(refused)
            }

            fn pause(&self, _: &TtrpcContext, r: api::PauseRequest) -> TtrpcResult<api::Empty> {
                self.engine.freeze(&r.id, true).map(|()| api::Empty::new()).map_err(refused)
            }

            fn resume(&self, _: &TtrpcContext, r: api::ResumeRequest) -> TtrpcResult<api::Empty> {
                self.engine.freeze(&r.id, false).map(|()| api::Empty::new()).map_err(refused)
            }

            fn shutdown(
                &self,
                _: &TtrpcContext,
                _: api::ShutdownRequest,
            ) -> TtrpcResult<api::Empty> {
                if self.engine.is_empty() {
                    self.exit.signal();
                }
                Ok(api::Empty::new())
            }
        }

        fn main() {
            // Each process has a thread that waits for it.
            let config = Config { no_reaper: true, ..Config::default() };
            $shim::run::<Service>($name, Some(config))
        }
    };
}

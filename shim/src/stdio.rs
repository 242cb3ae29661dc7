//! A process' standard streams: where they come from, where they go, who else listens.
//!
//! ```text
//! container --write--> FIFO in the bundle --read--> Outputs --> CRI log file
//!                      (the container holds it        \-------> attached clients (bounded)
//!                       read-write: it outlives us)
//! exec, or containerd's FIFOs: handed to the runtime, nothing is copied
//! terminal: pty master --read--> Outputs or the daemon's FIFO
//! ```

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::fs::{FileTypeExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, OFlag},
    sys::{
        socket::{ControlMessageOwned, MsgFlags},
        stat::Mode,
    },
    unistd::mkfifo,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
    task::JoinHandle,
};

use crate::{
    bundle::Bundle,
    control::{self, Attach, Kind},
    handover::Busy,
    log::{Log, OUT_SIZE, Stream},
    options,
    process::{Owned, Reaper, check, lock, watch_fd},
    runtime::Streams,
};

/// Size of the container's log pipes: how much it can write while we do not run, before it blocks.
/// The kernel takes memory for them only when there is data in them.
const PIPE_SIZE: libc::c_int = 256 * 1024;

/// Most that is read at once.
const IN_SIZE: usize = 64 * 1024;

/// How long a stream says nothing until the buffers are given back: giving them back and taking them
/// again for each read costs as much as the reading.
const IDLE: Duration = Duration::from_millis(200);

/// Most that waits for an attached client; one that is further behind is dropped.
const ATTACH_BUFFER: usize = 1024 * 1024;

/// How long a logging binary may take to say that it is ready, and to end when its input has.
const LOGGER_READY: Duration = Duration::from_secs(10);
const LOGGER_END: Duration = Duration::from_secs(12);

/// Where a stream goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sink {
    Null,
    /// A CRI log written by the shim; `None`: no file.
    CriLog(Option<PathBuf>),
    Fifo(PathBuf),
    File(PathBuf),
    /// A logging binary and its `key value` arguments; `ready`: it must send a byte.
    Binary {
        path: PathBuf,
        arguments: Vec<String>,
        ready: bool,
    },
}

/// Where standard input comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Null,
    Fifo(PathBuf),
    /// Attached clients; `once`: it ends when the first one leaves.
    Held {
        once: bool,
    },
}

impl Sink {
    pub(crate) fn parse(uri: &str) -> Result<Self, String> {
        let absolute = |path: &str| {
            let path = PathBuf::from(path);
            if path.is_absolute() { Ok(path) } else { Err(format!("{uri:?} has no absolute path")) }
        };
        let Some((scheme, rest)) = uri.split_once("://") else {
            return match uri.strip_prefix("fifo:").unwrap_or(uri) {
                "" => Ok(Sink::Null),
                path => absolute(path).map(Sink::Fifo),
            };
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        match scheme {
            "cri-log" if path.is_empty() => Ok(Sink::CriLog(None)),
            "cri-log" => absolute(path).map(|path| Sink::CriLog(Some(path))),
            "fifo" => absolute(path).map(Sink::Fifo),
            "file" => absolute(path).map(Sink::File),
            "binary" | "binary-v2" => {
                let mut arguments = Vec::new();
                for pair in query.split('&').filter(|pair| !pair.is_empty()) {
                    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                    arguments.push(unescape(key)?);
                    arguments.extend(Some(unescape(value)?).filter(|value| !value.is_empty()));
                }
                let path = absolute(path)?;
                Ok(Sink::Binary { path, arguments, ready: scheme == "binary-v2" })
            }
            _ => Err(format!(
                "{uri:?}: unknown scheme; known are cri-log, fifo, file, binary and binary-v2"
            )),
        }
    }
}

impl Source {
    pub(crate) fn parse(uri: &str) -> Result<Self, String> {
        match uri {
            "" => Ok(Source::Null),
            options::HELD_STDIN => Ok(Source::Held { once: false }),
            options::HELD_STDIN_ONCE => Ok(Source::Held { once: true }),
            _ => match Sink::parse(uri)? {
                Sink::Fifo(path) => Ok(Source::Fifo(path)),
                _ => Err(format!("{uri:?} cannot be a standard input")),
            },
        }
    }
}

/// Undoes percent-encoding, and `+` for a space.
fn unescape(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || rest.next().and_then(|digit| (digit as char).to_digit(16));
                match (digit(), digit()) {
                    (Some(high), Some(low)) => (high * 16 + low) as u8,
                    _ => return Err(format!("{text:?}: a % without two hexadecimal digits")),
                }
            }
            other => other,
        });
    }
    String::from_utf8(bytes).map_err(|_| format!("{text:?} is not UTF-8"))
}

/// The one pair of buffers of the shim: used between two awaits, given back to the kernel when idle.
struct Scratch {
    memory: *mut u8,
    /// How far into input and output it has been used since it was given back.
    used: (usize, usize),
}

#[expect(unsafe_code, reason = "the mapping belongs to the value alone")]
// SAFETY: see the reason; the raw pointer is what takes `Send` away.
unsafe impl Send for Scratch {}

static SCRATCH: Mutex<Scratch> = Mutex::new(Scratch { memory: std::ptr::null_mut(), used: (0, 0) });

impl Scratch {
    #[expect(unsafe_code, reason = "mmap(2)")]
    fn buffers(&mut self) -> io::Result<(&mut [u8], &mut [u8])> {
        if self.memory.is_null() {
            // SAFETY: a new anonymous mapping.
            let memory = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    IN_SIZE + OUT_SIZE,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
            if memory == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            self.memory = memory.cast();
        }
        // SAFETY: the mapping is that long, initialised (zero), and borrowed from `self`.
        let whole = unsafe { std::slice::from_raw_parts_mut(self.memory, IN_SIZE + OUT_SIZE) };
        Ok(whole.split_at_mut(IN_SIZE))
    }

    /// Gives the pages back: an idle shim keeps none.
    #[expect(unsafe_code, reason = "madvise(2)")]
    fn release(&mut self) {
        if self.memory.is_null() || self.used == (0, 0) {
            return;
        }
        let (input, output) = std::mem::take(&mut self.used);
        // SAFETY: both ranges are within the mapping, and nobody borrows from it now.
        unsafe {
            libc::madvise(self.memory.cast(), input, libc::MADV_DONTNEED);
            libc::madvise(self.memory.add(IN_SIZE).cast(), output, libc::MADV_DONTNEED);
        }
    }
}

/// Where a container's output goes: the log and the attached clients.
pub(crate) struct Outputs {
    log: Mutex<Option<Log>>,
    attached: Mutex<Vec<Arc<Attached>>>,
    /// Streams that have not ended yet.
    open: AtomicUsize,
}

impl Outputs {
    /// Text after the last line feed, of both streams.
    pub(crate) fn unfinished(&self) -> [Vec<u8>; 2] {
        lock(&self.log).as_ref().map(Log::unfinished).unwrap_or_default()
    }

    /// Goes on with it.
    pub(crate) fn set_unfinished(&self, unfinished: [Vec<u8>; 2]) {
        if let Some(log) = lock(&self.log).as_mut() {
            log.set_unfinished(unfinished);
        }
    }

    /// There is nothing more to read for now.
    fn settle(&self, stream: Stream) {
        if let Some(log) = lock(&self.log).as_mut() {
            log.settle(stream);
        }
    }

    /// `log` goes on where it was; `load`: with the unfinished lines that are in the bundle.
    fn new(mut log: Option<Log>, streams: usize, bundle: &Bundle, load: bool) -> Arc<Self> {
        if let Some(log) = &mut log {
            log.keep_in(bundle.unfinished(), load);
        }
        Arc::new(Self {
            log: Mutex::new(log),
            attached: Mutex::default(),
            open: AtomicUsize::new(streams),
        })
    }

    /// Closes and opens the log file anew.
    pub(crate) fn reopen(&self) -> io::Result<()> {
        lock(&self.log).as_mut().map_or(Ok(()), Log::reopen)
    }

    /// A new client.
    pub(crate) fn attach(&self, streams: Attach) -> Arc<Attached> {
        let client = Arc::new(Attached::new(streams));
        if self.open.load(Ordering::Relaxed) == 0 {
            client.put(Kind::End, &[]);
        } else {
            lock(&self.attached).push(client.clone());
        }
        client
    }

    /// The client has gone.
    pub(crate) fn detach(&self, client: &Arc<Attached>) {
        lock(&self.attached).retain(|other| !Arc::ptr_eq(other, client));
    }

    /// Reads once and passes it on; gives how much.
    fn pass(&self, fd: &OwnedFd, stream: Stream) -> io::Result<usize> {
        let mut scratch = lock(&SCRATCH);
        let (input, out) = scratch.buffers()?;
        let count = read_fd(fd, input)?;
        let bytes = &input[..count];
        let mut peak = 0;
        if count > 0 {
            if let Some(log) = lock(&self.log).as_mut() {
                peak = log.write(stream, bytes, out);
            }
            self.fan_out(stream, bytes);
        }
        scratch.used = (scratch.used.0.max(count), scratch.used.1.max(peak));
        Ok(count)
    }

    fn fan_out(&self, stream: Stream, bytes: &[u8]) {
        lock(&self.attached).retain(|client| {
            let (wanted, kind) = match stream {
                Stream::Stdout => (client.streams.stdout, Kind::Stdout),
                Stream::Stderr => (client.streams.stderr, Kind::Stderr),
            };
            !wanted || client.put(kind, bytes)
        });
    }

    /// Tells every attached client that nothing will follow, should a stream have no end.
    pub(crate) fn finish(&self) {
        self.open.store(0, Ordering::Relaxed);
        for client in lock(&self.attached).drain(..) {
            client.put(Kind::End, &[]);
        }
    }

    /// A stream has ended.
    fn end(&self, stream: Stream) {
        if let Some(log) = lock(&self.log).as_mut() {
            let mut scratch = lock(&SCRATCH);
            if let Ok((_, out)) = scratch.buffers() {
                log.end(stream, out);
            }
            scratch.used.1 = scratch.used.1.max(crate::log::LINE_MAX + 4096);
            scratch.release();
        }
        if self.open.fetch_sub(1, Ordering::Relaxed) == 1 {
            for client in lock(&self.attached).drain(..) {
                client.put(Kind::End, &[]);
            }
        }
    }
}

/// Frames that wait for an attached client.
pub(crate) struct Attached {
    streams: Attach,
    queue: Mutex<Queue>,
    more: Notify,
}

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// Nothing will follow.
    ended: bool,
    /// The client did not keep up.
    overrun: bool,
}

/// What an attached client gets next.
pub(crate) enum Next {
    Bytes(Vec<u8>),
    /// All has been sent.
    End,
    /// It did not keep up.
    Overrun,
}

impl Attached {
    fn new(streams: Attach) -> Self {
        Self { streams, queue: Mutex::default(), more: Notify::new() }
    }

    /// It has not got all yet.
    pub(crate) fn is_behind(&self) -> bool {
        !lock(&self.queue).bytes.is_empty()
    }

    /// Queues a frame; `false`: the client is to be dropped.
    fn put(&self, kind: Kind, payload: &[u8]) -> bool {
        let mut queue = lock(&self.queue);
        if queue.bytes.len() + control::HEADER + payload.len() > ATTACH_BUFFER {
            queue.overrun = true;
        } else {
            queue.bytes.extend(control::header(kind, payload.len()));
            queue.bytes.extend(payload);
            queue.ended |= kind == Kind::End;
        }
        self.more.notify_one();
        !queue.overrun
    }

    /// Waits for frames.
    pub(crate) async fn next(&self) -> Next {
        loop {
            {
                let mut queue = lock(&self.queue);
                if queue.overrun {
                    return Next::Overrun;
                }
                if !queue.bytes.is_empty() {
                    // The whole buffer is given away, so that an idle client costs nothing.
                    return Next::Bytes(std::mem::take(&mut queue.bytes).into());
                }
                if queue.ended {
                    return Next::End;
                }
            }
            self.more.notified().await;
        }
    }
}

/// A descriptor that is lent to the daemon.
pub(crate) enum Shared {
    Process(Arc<Owned>),
    Stream(Arc<AsyncFd<OwnedFd>>),
}

impl std::os::fd::AsFd for Shared {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Shared::Process(owned) => owned.pidfd().as_fd(),
            Shared::Stream(stream) => stream.get_ref().as_fd(),
        }
    }
}

/// Descriptors of a process' streams that were lent to the daemon, and are given back.
#[derive(Debug, Default)]
pub(crate) struct Lent {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
    pub(crate) tty: Option<OwnedFd>,
}

/// The streams of one process.
pub(crate) struct Io {
    /// What the runtime is to be given; taken by the launch.
    given: Streams,
    /// Read ends and where they go, until the pumps run.
    readers: Vec<(OwnedFd, Stream)>,
    pumps: Vec<JoinHandle<()>>,
    /// What the pumps read.
    tapped: Vec<(Arc<AsyncFd<OwnedFd>>, Stream)>,
    pub(crate) outputs: Option<Arc<Outputs>>,
    /// The write side of standard input, held open until it is closed.
    stdin: Option<Arc<AsyncFd<OwnedFd>>>,
    once: bool,
    terminal: Option<Terminal>,
    logger: Option<Owned>,
}

/// A pty, or the wish for one.
enum Terminal {
    /// Where the runtime sends the master, and where input and output go then.
    Wanted {
        console: Console,
        stdin: Source,
        stdout: Sink,
    },
    Open(Arc<AsyncFd<OwnedFd>>),
}

/// Who asks for streams.
pub(crate) struct Request<'a> {
    pub(crate) bundle: &'a Bundle,
    pub(crate) namespace: &'a str,
    pub(crate) container: &'a str,
    pub(crate) terminal: bool,
    pub(crate) stdin: &'a Source,
    pub(crate) stdout: &'a Sink,
    pub(crate) stderr: &'a Sink,
    /// An exec: its outputs are a client's FIFOs, and it may die with the client.
    pub(crate) exec: bool,
}

impl Io {
    /// Nothing is open yet.
    fn closed(once: bool) -> Self {
        Self {
            given: Streams::default(),
            readers: Vec::new(),
            pumps: Vec::new(),
            tapped: Vec::new(),
            outputs: None,
            stdin: None,
            once,
            terminal: None,
            logger: None,
        }
    }

    /// Opens everything; on an error all is closed again.
    pub(crate) async fn open(request: Request<'_>, reaper: &Arc<Reaper>) -> io::Result<Self> {
        let mut io = Self::closed(matches!(request.stdin, Source::Held { once: true }));
        let bundle = request.bundle;
        if let Sink::CriLog(path) = request.stdout {
            let log = path.clone().map(|path| {
                let name = path.display().to_string();
                Log::open(path).map_err(|error| named("log", &name, &error))
            });
            let streams = if request.terminal { 1 } else { 2 };
            io.outputs = Some(Outputs::new(log.transpose()?, streams, bundle, false));
        }
        if request.terminal {
            io.terminal = Some(Terminal::Wanted {
                console: Console::new(bundle)?,
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
            });
            return Ok(io);
        }
        match request.stdin {
            Source::Null => {}
            Source::Fifo(path) => {
                io.given.stdin = Some(open_stdin(path, &mut io.stdin)?);
            }
            Source::Held { .. } => {
                make_fifo(&bundle.stdin())?;
                io.given.stdin = Some(open_stdin(&bundle.stdin(), &mut io.stdin)?);
            }
        }
        if let Sink::Binary { path, arguments, ready } = request.stdout {
            io.start_logger(&request, reaper, path, arguments, *ready).await?;
            return Ok(io);
        }
        for (sink, stream, fifo) in [
            (request.stdout, Stream::Stdout, bundle.stdout()),
            (request.stderr, Stream::Stderr, bundle.stderr()),
        ] {
            let given = match sink {
                Sink::Null => None,
                Sink::CriLog(_) => {
                    if io.outputs.is_none() {
                        let message =
                            "standard error can go to a cri-log only with standard output";
                        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
                    }
                    make_fifo(&fifo)?;
                    let held = open_fifo(&fifo, true, true)?;
                    // It stays as it was where the kernel does not allow more.
                    let _ = nix::fcntl::fcntl(held.as_fd(), FcntlArg::F_SETPIPE_SZ(PIPE_SIZE));
                    io.readers.push((open_fifo(&fifo, true, false)?, stream));
                    set_blocking(&held)?;
                    Some(held)
                }
                Sink::Fifo(path) => Some(open_output(path, request.exec)?),
                Sink::File(path) => Some(open_append(path)?.into()),
                Sink::Binary { .. } => {
                    let message =
                        "standard error can go to a logging binary only with standard output";
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
                }
            };
            match stream {
                Stream::Stdout => io.given.stdout = given,
                Stream::Stderr => io.given.stderr = given,
            }
        }
        if let Some(outputs) = &io.outputs {
            outputs.open.store(io.readers.len(), Ordering::Relaxed);
        }
        Ok(io)
    }

    /// The streams of a container that another shim runs: FIFOs in its bundle. Those that are there
    /// already are used as they are, for there may be output in them. We hold both ends until
    /// [`Io::take_given`], so that the other shim may open, and die, when it likes.
    pub(crate) async fn relay(relay: &control::Relay, crashed: bool) -> io::Result<Self> {
        let bundle = Bundle::new(&relay.bundle);
        let log = relay.log.clone().map(|path| {
            if crashed {
                return Ok(Log::resume(path));
            }
            let name = path.display().to_string();
            Log::open(path).map_err(|error| named("log", &name, &error))
        });
        let mut io = Self::closed(relay.stdin_once);
        let streams = if relay.stderr { 2 } else { 1 };
        io.outputs = Some(Outputs::new(log.transpose()?, streams, &bundle, crashed));
        if relay.stdin {
            keep_fifo(&bundle.stdin())?;
            io.given.stdin = Some(open_stdin(&bundle.stdin(), &mut io.stdin)?);
        }
        for (wanted, fifo, stream) in [
            (true, bundle.stdout(), Stream::Stdout),
            (relay.stderr, bundle.stderr(), Stream::Stderr),
        ] {
            if !wanted {
                continue;
            }
            keep_fifo(&fifo)?;
            let held = open_fifo(&fifo, true, true)?;
            // It stays as it was where the kernel does not allow more.
            let _ = nix::fcntl::fcntl(held.as_fd(), FcntlArg::F_SETPIPE_SZ(PIPE_SIZE));
            io.readers.push((open_fifo(&fifo, true, false)?, stream));
            match stream {
                Stream::Stdout => io.given.stdout = Some(held),
                Stream::Stderr => io.given.stderr = Some(held),
            }
        }
        io.launched().await?;
        Ok(io)
    }

    /// The path for `--console-socket`, when a terminal is wanted.
    pub(crate) fn console(&self) -> Option<PathBuf> {
        match &self.terminal {
            Some(Terminal::Wanted { console, .. }) => Some(console.path.clone()),
            _ => None,
        }
    }

    /// Gives the FIFOs to whom the process is on the node, if that is known: it may want to open
    /// /dev/stdout anew. Without a user namespace the OCI runtime does it; in one it may not.
    pub(crate) fn give_to(&self, owner: Option<(u32, u32)>) -> io::Result<()> {
        let Some((uid, gid)) = owner else { return Ok(()) };
        let Streams { stdin, stdout, stderr } = &self.given;
        for fd in [stdin, stdout, stderr].into_iter().flatten() {
            let kind = nix::sys::stat::fstat(fd)?.st_mode & libc::S_IFMT;
            if kind == libc::S_IFIFO {
                nix::unistd::fchown(fd, Some(uid.into()), Some(gid.into()))?;
            }
        }
        Ok(())
    }

    /// It has nothing that a shim after this one could not have.
    pub(crate) fn can_be_handed_over(&self) -> bool {
        self.logger.is_none() && !matches!(self.terminal, Some(Terminal::Wanted { .. }))
    }

    /// What the runtime is to be given.
    pub(crate) fn take_given(&mut self) -> Streams {
        std::mem::take(&mut self.given)
    }

    /// The runtime has made the process: from now on its output is passed on.
    pub(crate) async fn launched(&mut self) -> io::Result<()> {
        let terminal = match self.terminal.take() {
            Some(Terminal::Wanted { console, stdin, stdout }) => {
                let master = Arc::new(watch_fd(
                    console.receive().await?,
                    Interest::READABLE | Interest::WRITABLE,
                )?);
                self.run_terminal(&master, &stdin, &stdout)?;
                Some(Terminal::Open(master))
            }
            other => other,
        };
        self.terminal = terminal;
        self.tap()
    }

    fn tap(&mut self) -> io::Result<()> {
        let Some(outputs) = &self.outputs else { return Ok(()) };
        for (reader, stream) in self.readers.drain(..) {
            let reader = Arc::new(watch_fd(reader, Interest::READABLE)?);
            self.tapped.push((reader.clone(), stream));
            self.pumps.push(tokio::spawn(pump(reader, outputs.clone(), stream)));
        }
        Ok(())
    }

    /// The streams of a process whose shim died: what was lent is given back, and the FIFOs of the
    /// bundle are opened anew. A terminal that was not lent is lost.
    pub(crate) fn resume(
        request: &Request<'_>,
        lent: Lent,
        closed: bool,
        crashed: bool,
    ) -> io::Result<Self> {
        let mut io = Self::closed(matches!(request.stdin, Source::Held { once: true }));
        if let Sink::CriLog(path) = request.stdout {
            let log = path.clone().map(Log::resume);
            io.outputs = Some(Outputs::new(log, 0, request.bundle, crashed));
        }
        if request.terminal {
            if let Some(master) = lent.tty {
                let interest = Interest::READABLE | Interest::WRITABLE;
                let master = Arc::new(watch_fd(master, interest)?);
                if let Some(outputs) = &io.outputs {
                    outputs.open.store(1, Ordering::Relaxed);
                }
                io.run_terminal(&master, request.stdin, request.stdout)?;
                io.terminal = Some(Terminal::Open(master));
            } else if let Some(outputs) = &io.outputs {
                // It has hung up: what had begun is all of its last line.
                outputs.open.store(1, Ordering::Relaxed);
                outputs.end(Stream::Stdout);
            }
            return Ok(io);
        }
        let fifo = match request.stdin {
            _ if closed => None,
            Source::Null => None,
            Source::Fifo(path) => Some(path.clone()),
            Source::Held { .. } => Some(request.bundle.stdin()),
        };
        if let Some(path) = fifo {
            // Without a reader there is nobody to write to.
            let writer = lent.stdin.or_else(|| open_fifo(&path, false, true).ok());
            let watch = |fd| watch_fd(fd, Interest::WRITABLE).map(Arc::new);
            io.stdin = writer.map(watch).transpose()?;
        }
        for (sink, stream, fifo, lent) in [
            (request.stdout, Stream::Stdout, request.bundle.stdout(), lent.stdout),
            (request.stderr, Stream::Stderr, request.bundle.stderr(), lent.stderr),
        ] {
            if let Sink::CriLog(_) = sink {
                let reader = lent.map_or_else(|| open_fifo(&fifo, true, false), Ok)?;
                io.readers.push((reader, stream));
            }
        }
        if let Some(outputs) = &io.outputs {
            outputs.open.store(io.readers.len(), Ordering::Relaxed);
        }
        io.tap()?;
        Ok(io)
    }

    /// What would be lost with this process, by its role.
    pub(crate) fn lend(&self) -> Vec<(&'static str, Shared)> {
        let mut lent = Vec::new();
        let mut share = |role, fd: &Arc<AsyncFd<OwnedFd>>| {
            lent.push((role, Shared::Stream(fd.clone())));
        };
        for (reader, stream) in &self.tapped {
            let role = match stream {
                Stream::Stdout => "out",
                Stream::Stderr => "err",
            };
            share(role, reader);
        }
        if let Some(stdin) = &self.stdin {
            share("in", stdin);
        }
        if let Some(Terminal::Open(master)) = &self.terminal {
            share("tty", master);
        }
        lent
    }

    fn run_terminal(
        &mut self,
        master: &Arc<AsyncFd<OwnedFd>>,
        stdin: &Source,
        stdout: &Sink,
    ) -> io::Result<()> {
        match stdout {
            Sink::CriLog(_) => {
                if let Some(outputs) = &self.outputs {
                    let pump = pump(master.clone(), outputs.clone(), Stream::Stdout);
                    self.pumps.push(tokio::spawn(pump));
                }
            }
            Sink::Null => self.pumps.push(tokio::spawn(copy(master.clone(), None))),
            Sink::Fifo(path) => {
                let fifo = Arc::new(watch_fd(
                    open_fifo(path, true, true)?,
                    Interest::READABLE | Interest::WRITABLE,
                )?);
                self.pumps.push(tokio::spawn(copy(master.clone(), Some(fifo))));
            }
            Sink::File(path) => {
                let file = open_append(path)?;
                self.pumps.push(tokio::spawn(copy_to_file(master.clone(), file)));
            }
            Sink::Binary { .. } => {
                let message = "a logging binary cannot have a terminal's output";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
        }
        if let Source::Fifo(path) = stdin {
            let mut held = None;
            let reader = open_stdin(path, &mut held)?;
            self.stdin = held;
            set_nonblocking(&reader)?;
            let reader = Arc::new(watch_fd(reader, Interest::READABLE)?);
            // Not one of the pumps: input need not end for the process to have ended.
            tokio::spawn(copy(reader, Some(master.clone())));
        }
        Ok(())
    }

    /// What still passes output on: to be waited for by [`drain`], and given back.
    pub(crate) fn pumps(&mut self) -> &mut Vec<JoinHandle<()>> {
        &mut self.pumps
    }

    /// Sets the terminal's size; `false`: there is none.
    #[expect(unsafe_code, reason = "ioctl(2)")]
    pub(crate) fn resize(&self, width: u16, height: u16) -> io::Result<bool> {
        let Some(Terminal::Open(master)) = &self.terminal else { return Ok(false) };
        let size = libc::winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the structure is that of the request.
        check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })?;
        Ok(true)
    }

    /// Lets go of the write side of standard input.
    pub(crate) fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Where an attached client's input goes: the terminal, or the FIFO that we hold.
    pub(crate) fn input(&self) -> Option<Arc<AsyncFd<OwnedFd>>> {
        match &self.terminal {
            Some(Terminal::Open(master)) => Some(master.clone()),
            _ => self.stdin.clone(),
        }
    }

    /// Whether input is a terminal's.
    pub(crate) fn is_terminal(&self) -> bool {
        self.terminal.is_some()
    }

    /// Standard input ends with the first attached client that had it.
    pub(crate) fn once(&self) -> bool {
        self.once
    }

    /// Ends everything; a logging binary is given time, and then no more.
    pub(crate) fn close(mut self) {
        for pump in self.pumps.drain(..) {
            pump.abort();
        }
        if let Some(logger) = self.logger.take() {
            tokio::spawn(async move {
                if tokio::time::timeout(LOGGER_END, logger.wait()).await.is_err() {
                    let _ = logger.signal(libc::SIGTERM);
                    if tokio::time::timeout(LOGGER_END, logger.wait()).await.is_err() {
                        let _ = logger.signal(libc::SIGKILL);
                        let _ = logger.wait().await;
                    }
                }
            });
        }
    }

    /// Runs a logging binary: its descriptors 3 and 4 are the outputs, 5 it closes (or, version 2,
    /// writes a byte to) when it is ready.
    async fn start_logger(
        &mut self,
        request: &Request<'_>,
        reaper: &Arc<Reaper>,
        path: &Path,
        arguments: &[String],
        byte: bool,
    ) -> io::Result<()> {
        let (out_read, out_write) = pipe()?;
        let (err_read, err_write) = pipe()?;
        let (ready_read, ready_write) = pipe()?;
        let mut command = Command::new(path);
        command
            .args(arguments)
            .env("CONTAINER_ID", request.container)
            .env("CONTAINER_NAMESPACE", request.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        inherit(&mut command, [&out_read, &err_read, &ready_write]);
        let name = path.display().to_string();
        let logger = reaper.spawn(&mut command).map_err(|error| named("run", &name, &error))?;
        drop((out_read, err_read, ready_write));
        set_nonblocking(&ready_read)?;
        let ready = watch_fd(ready_read, Interest::READABLE)?;
        let said = tokio::time::timeout(LOGGER_READY, async {
            let mut buffer = [0];
            loop {
                let mut guard = ready.readable().await?;
                if let Ok(result) = guard.try_io(|fd| read_fd(fd.get_ref(), &mut buffer)) {
                    return result;
                }
            }
        })
        .await;
        match said {
            Ok(Ok(count)) if count > 0 || !byte => {}
            _ => {
                let _ = logger.signal(libc::SIGKILL);
                let _ = logger.wait().await;
                return Err(io::Error::other(format!("logging binary {name} did not get ready")));
            }
        }
        self.given.stdout = Some(out_write);
        self.given.stderr = Some(err_write);
        self.logger = Some(logger);
        Ok(())
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        for pump in self.pumps.drain(..) {
            pump.abort();
        }
    }
}

/// Waits until all output has been passed on, at most `deadline`; gives what a process in the
/// background still holds open, which goes on.
pub(crate) async fn drain(pumps: Vec<JoinHandle<()>>, deadline: Duration) -> Vec<JoinHandle<()>> {
    let by = tokio::time::Instant::now() + deadline;
    let mut left = Vec::new();
    for mut pump in pumps {
        if tokio::time::timeout_at(by, &mut pump).await.is_err() {
            left.push(pump);
        }
    }
    left
}

/// Passes one stream on until it ends.
async fn pump(reader: Arc<AsyncFd<OwnedFd>>, outputs: Arc<Outputs>, stream: Stream) {
    let mut passes = 0u32;
    let mut released = true;
    'ended: loop {
        if !released && tokio::time::timeout(IDLE, reader.ready(Interest::READABLE)).await.is_err()
        {
            lock(&SCRATCH).release();
            released = true;
        }
        let Ok(mut guard) = reader.ready(Interest::READABLE).await else { break };
        loop {
            match outputs.pass(reader.get_ref(), stream) {
                Ok(0) => break 'ended,
                Ok(_) => {
                    released = false;
                    // Other containers and the calls of the daemon get their turn.
                    passes = passes.wrapping_add(1);
                    if passes.is_multiple_of(8) {
                        tokio::task::yield_now().await;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    outputs.settle(stream);
                    guard.clear_ready();
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // EIO: nobody has the terminal open any more.
                Err(_) => break 'ended,
            }
        }
    }
    outputs.end(stream);
}

/// Copies bytes until either end is gone; without a target they are dropped.
async fn copy(from: Arc<AsyncFd<OwnedFd>>, to: Option<Arc<AsyncFd<OwnedFd>>>) {
    // As much as a pipe takes at once that has room at all (pipe(7)): so bytes are seldom in our hands
    // for longer than it takes to pass them on.
    let mut buffer = vec![0; libc::PIPE_BUF];
    loop {
        if let Some(to) = &to
            && to.ready(Interest::WRITABLE).await.map(|mut guard| guard.retain_ready()).is_err()
        {
            return;
        }
        let Ok(mut guard) = from.ready(Interest::READABLE).await else { return };
        let _busy = Busy::begin();
        let count = match read_fd(from.get_ref(), &mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                guard.clear_ready();
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if let Some(to) = &to
            && write_all(to, &buffer[..count]).await.is_err()
        {
            return;
        }
    }
}

async fn copy_to_file(from: Arc<AsyncFd<OwnedFd>>, mut file: File) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let Ok(mut guard) = from.ready(Interest::READABLE).await else { return };
        match read_fd(from.get_ref(), &mut buffer) {
            Ok(0) => return,
            // A full disk must not block the terminal.
            Ok(count) => drop(io::Write::write_all(&mut file, &buffer[..count])),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Writes all of it, waiting while the other side does not read.
pub(crate) async fn write_all(to: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut guard = to.ready(Interest::WRITABLE).await?;
        match nix::unistd::write(to.get_ref(), bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(nix::errno::Errno::EAGAIN) => guard.clear_ready(),
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn read_fd(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    nix::unistd::read(fd, buffer).map_err(Into::into)
}

/// The socket over which the runtime sends the master of a new pty.
struct Console {
    listener: tokio::net::UnixListener,
    file: PathBuf,
    /// A short alias of `file`: bundles are deep, and a socket's path holds 107 bytes.
    path: PathBuf,
    _dir: File,
}

impl Console {
    fn new(bundle: &Bundle) -> io::Result<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let name = format!("console{}.sock", NUMBER.fetch_add(1, Ordering::Relaxed));
        let dir = File::open(bundle.dir())?;
        let path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), dir.as_raw_fd()))
            .join(&name);
        let file = bundle.dir().join(name);
        let _ = std::fs::remove_file(&file);
        let listener = tokio::net::UnixListener::bind(&path)?;
        Ok(Self { listener, file, path, _dir: dir })
    }

    /// The master. The runtime has sent it before it ended, so it is there already.
    async fn receive(&self) -> io::Result<OwnedFd> {
        let deadline = Duration::from_secs(5);
        let accepted = tokio::time::timeout(deadline, self.listener.accept()).await;
        let (stream, _) =
            accepted.map_err(|_| io::Error::other("the runtime sent no terminal"))??;
        loop {
            tokio::time::timeout(deadline, stream.readable())
                .await
                .map_err(|_| io::Error::other("the runtime sent no terminal"))??;
            match stream.try_io(Interest::READABLE, || receive_fd(&stream)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(master) => {
                    set_nonblocking(&master)?;
                    return Ok(master);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

#[expect(unsafe_code, reason = "a received descriptor becomes owned")]
fn receive_fd(stream: &tokio::net::UnixStream) -> io::Result<OwnedFd> {
    let mut bytes = [0; 4096];
    let mut buffers = [io::IoSliceMut::new(&mut bytes)];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let fd = stream.as_raw_fd();
    let message = nix::sys::socket::recvmsg::<()>(fd, &mut buffers, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel has just made it for us.
            return Ok(unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    Err(io::Error::other("the runtime sent no terminal"))
}

fn named(what: &str, name: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what} {name}: {error}"))
}

/// A fresh FIFO, for the owner alone.
fn make_fifo(path: &Path) -> io::Result<()> {
    let name = path.display().to_string();
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(named("remove", &name, &error));
        }
        _ => {}
    }
    mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|errno| named("make", &name, &errno.into()))
}

/// A FIFO for the owner alone; one that is there already is kept.
fn keep_fifo(path: &Path) -> io::Result<()> {
    match mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR) {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(errno) => Err(named("make", &path.display().to_string(), &errno.into())),
    }
}

/// Opens a FIFO without blocking.
fn open_fifo(path: &Path, read: bool, write: bool) -> io::Result<OwnedFd> {
    let opened = (|| {
        let file =
            OpenOptions::new().read(read).write(write).custom_flags(libc::O_NONBLOCK).open(path)?;
        if !file.metadata()?.file_type().is_fifo() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no FIFO"));
        }
        Ok(file.into())
    })();
    opened.map_err(|error| named("open", &path.display().to_string(), &error))
}

/// The read side of standard input, for the process; its write side goes to `held`, so that the
/// end comes only when we let it.
fn open_stdin(path: &Path, held: &mut Option<Arc<AsyncFd<OwnedFd>>>) -> io::Result<OwnedFd> {
    let reader = open_fifo(path, true, false)?;
    let writer = open_fifo(path, false, true)?;
    set_blocking(&reader)?;
    *held = Some(Arc::new(watch_fd(writer, Interest::WRITABLE)?));
    Ok(reader)
}

/// The write side of a client's FIFO. A container holds it read-write, so that it survives a client
/// that goes; an exec holds it write-only, and learns by SIGPIPE that its client has gone.
fn open_output(path: &Path, exec: bool) -> io::Result<OwnedFd> {
    let both = open_fifo(path, true, true)?;
    let given = if exec { open_fifo(path, false, true)? } else { both };
    set_blocking(&given)?;
    Ok(given)
}

fn open_append(path: &Path) -> io::Result<File> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o644)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| named("open", &path.display().to_string(), &error))
}

fn set_blocking(fd: &OwnedFd) -> io::Result<()> {
    set_flag(fd, false)
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    set_flag(fd, true)
}

fn set_flag(fd: &OwnedFd, nonblocking: bool) -> io::Result<()> {
    let mut flags = OFlag::from_bits_retain(nix::fcntl::fcntl(fd, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_NONBLOCK, nonblocking);
    nix::fcntl::fcntl(fd, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(Into::into)
}

/// Passes descriptors on as 3, 4 and 5.
#[expect(unsafe_code, reason = "only system calls between fork and exec")]
fn inherit(command: &mut Command, fds: [&OwnedFd; 3]) {
    use std::os::unix::process::CommandExt as _;
    let fds = fds.map(|fd| fd.as_raw_fd());
    let places = move || {
        let mut copies = [0; 3];
        // Copies above all the targets first, so that no target overwrites a source.
        for (copy, fd) in copies.iter_mut().zip(fds) {
            // SAFETY: no memory is involved.
            *copy = check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 6) })?;
        }
        for (place, copy) in (3..).zip(copies) {
            // SAFETY: no memory is involved; dup2 clears close-on-exec.
            check(unsafe { libc::dup2(copy, place) })?;
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(places) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_output_uri_is_understood() {
        let path = |path: &str| PathBuf::from(path);
        assert_eq!(Sink::parse(""), Ok(Sink::Null));
        assert_eq!(Sink::parse("/run/a"), Ok(Sink::Fifo(path("/run/a"))));
        assert_eq!(Sink::parse("fifo:/run/a"), Ok(Sink::Fifo(path("/run/a"))));
        assert_eq!(Sink::parse("fifo:///run/a"), Ok(Sink::Fifo(path("/run/a"))));
        assert_eq!(Sink::parse("file:///var/a"), Ok(Sink::File(path("/var/a"))));
        assert_eq!(Sink::parse("cri-log:///a/0.log"), Ok(Sink::CriLog(Some(path("/a/0.log")))));
        assert_eq!(Sink::parse("cri-log://?attach"), Ok(Sink::CriLog(None)));
        assert_eq!(
            Sink::parse("binary-v2:///bin/l?k=v%20w&flag&a=b+c"),
            Ok(Sink::Binary {
                path: path("/bin/l"),
                arguments: ["k", "v w", "flag", "a", "b c"].map(str::to_owned).to_vec(),
                ready: true,
            })
        );
    }

    #[test]
    fn a_wrong_uri_is_refused_with_what_is_wrong() {
        assert!(Sink::parse("run/a").unwrap_err().contains("absolute"));
        assert!(Sink::parse("https://x/y").unwrap_err().contains("known are"));
        assert!(Sink::parse("binary:///b?a=%4").unwrap_err().contains("hexadecimal"));
        assert!(Source::parse("file:///a").unwrap_err().contains("standard input"));
    }

    #[test]
    fn every_form_of_input_uri_is_understood() {
        assert_eq!(Source::parse(""), Ok(Source::Null));
        assert_eq!(Source::parse(options::HELD_STDIN), Ok(Source::Held { once: false }));
        assert_eq!(Source::parse(options::HELD_STDIN_ONCE), Ok(Source::Held { once: true }));
        assert_eq!(Source::parse("/run/a"), Ok(Source::Fifo("/run/a".into())));
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_dropped_and_others_go_on() {
        let outputs = Outputs::new(None, 1, &Bundle::new("/"), false);
        let both = Attach { stdin: false, stdout: true, stderr: true };
        let slow = outputs.attach(both);
        let chunk = vec![b'x'; IN_SIZE];
        for _ in 0..ATTACH_BUFFER / IN_SIZE + 1 {
            outputs.fan_out(Stream::Stdout, &chunk);
        }
        assert!(matches!(slow.next().await, Next::Overrun));
        let quick = outputs.attach(both);
        outputs.fan_out(Stream::Stderr, b"hello");
        outputs.end(Stream::Stdout);
        let Next::Bytes(bytes) = quick.next().await else { panic!("no bytes") };
        assert_eq!(bytes, [&[2, 0, 0, 0, 5][..], b"hello", &[3, 0, 0, 0, 0]].concat());
        assert!(matches!(quick.next().await, Next::End));
    }

    #[tokio::test]
    async fn attaching_after_the_end_ends_at_once() {
        let outputs = Outputs::new(None, 1, &Bundle::new("/"), false);
        outputs.end(Stream::Stdout);
        let late = outputs.attach(Attach { stdin: false, stdout: true, stderr: false });
        assert!(matches!(late.next().await, Next::Bytes(bytes) if bytes == [3, 0, 0, 0, 0]));
        assert!(matches!(late.next().await, Next::End));
    }
}

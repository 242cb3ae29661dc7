//! `logs`, and the following of a log that `run` does too.
//!
//! The log is read from the file that the daemon names, on this node: it is there, and flows, whether
//! or not the daemon runs.

use std::{
    fs::File,
    io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use holdfast_protos::cri;
use tonic::Code;

use super::{
    Client, Hint,
    args::Logs,
    client,
    find::{All, container_name},
    log::{self, Joiner, Line, Stream},
};

/// How long a follower sleeps: from the shorter, after something new, to the longer.
const POLL: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(300));

/// How a log is printed.
#[derive(Clone, Copy, Default)]
pub(super) struct Style {
    pub(super) timestamps: bool,
    pub(super) since: Option<jiff::Timestamp>,
}

/// `holdfast logs`
pub(super) async fn logs(client: &mut Client, args: Logs) -> Result<u8> {
    let all = All::list(client).await?;
    let mut container = all.container(&args.name)?;
    if args.previous {
        container = previous(&all, &container)?;
    }
    let status = status(client, &container.id).await?;
    if status.log_path.is_empty() {
        bail!("container {} keeps no log: its pod was made without a log directory", args.name);
    }
    let style = Style { timestamps: args.timestamps, since: args.since };
    let path = PathBuf::from(&status.log_path);
    let opened = Reader::open(&path).map_err(|e| open_error(&path, e));
    let mut reader = match opened {
        Ok(Some(reader)) => reader,
        Ok(None) if status.state() == cri::ContainerState::ContainerCreated => {
            // Not started yet: an empty log, and with -f one to wait for.
            Reader::absent(&path)
        }
        Ok(None) => return Err(anyhow!("the log {} is not there", path.display())),
        Err(error) => return Err(error),
    };
    if let Some(count) = args.tail {
        reader.tail(count, style)?;
    }
    if args.follow {
        follow(client, &container.id, Some(reader), style).await?;
    } else {
        reader.read_on(style)?;
        reader.finish(style)?;
    }
    Ok(0)
}

/// The attempt before `container`.
fn previous(all: &All, container: &cri::Container) -> Result<cri::Container> {
    let attempt = |c: &cri::Container| c.metadata.as_ref().map_or(0, |m| m.attempt);
    all.containers
        .iter()
        .filter(|c| {
            c.pod_sandbox_id == container.pod_sandbox_id
                && container_name(c) == container_name(container)
                && attempt(c) < attempt(container)
        })
        .max_by_key(|c| attempt(c))
        .cloned()
        .with_context(|| format!("container {} has no earlier attempt", container_name(container)))
}

/// A container's status.
pub(super) async fn status(client: &Client, id: &str) -> Result<cri::ContainerStatus> {
    let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
    let mut runtime = client.runtime.clone();
    let response = client.quick(runtime.container_status(request)).await?;
    response.status.with_context(|| format!("container {id} has no status"))
}

/// Prints a log, if there is one to print, until its container has exited (its status) or is removed
/// (nothing).
///
/// The daemon may go away and come back meanwhile.
pub(super) async fn follow(
    client: &Client,
    id: &str,
    mut reader: Option<Reader>,
    style: Style,
) -> Result<Option<cri::ContainerStatus>> {
    let mut pause = POLL.0;
    loop {
        // Before the read: what was written before the exit is then read below.
        let status = match status(client, id).await {
            Ok(status) => Some(status),
            Err(error) => match client::code(&error) {
                Some(Code::NotFound) => {
                    if let Some(mut reader) = reader {
                        reader.read_on(style)?;
                        reader.finish(style)?;
                    }
                    return Ok(None);
                }
                // Restarting, or busy: the container and its log do not need it.
                Some(
                    Code::Unavailable | Code::DeadlineExceeded | Code::Unknown | Code::Cancelled,
                )
                | None => None,
                Some(_) => return Err(error),
            },
        };
        let news = match &mut reader {
            Some(reader) => reader.read_on(style)?,
            None => false,
        };
        if let Some(status) = status
            && status.state() == cri::ContainerState::ContainerExited
        {
            if let Some(reader) = reader {
                reader.finish(style)?;
            }
            return Ok(Some(status));
        }
        pause = if news { POLL.0 } else { (pause * 2).min(POLL.1) };
        tokio::time::sleep(pause).await;
    }
}

/// A log file that is read on and on, over rotation.
pub(super) struct Reader {
    path: PathBuf,
    file: Option<File>,
    joiner: Joiner,
}

impl Reader {
    /// Opens a log. `None`: it is not there.
    pub(super) fn open(path: &Path) -> io::Result<Option<Self>> {
        match File::open(path) {
            Ok(file) => {
                Ok(Some(Self { path: path.into(), file: Some(file), joiner: Joiner::default() }))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// A log that will be made.
    pub(super) fn absent(path: &Path) -> Self {
        Self { path: path.into(), file: None, joiner: Joiner::default() }
    }

    /// Prints the last lines, and goes on behind them.
    fn tail(&mut self, count: usize, style: Style) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let length = file.metadata().context("look at the log")?.len();
        let read = |size: u64| {
            file.seek(SeekFrom::Start(length - size))?;
            let mut bytes = Vec::new();
            (&mut *file).take(size).read_to_end(&mut bytes)?;
            Ok::<_, io::Error>(bytes)
        };
        let keep = |line: &Line| is_since(line, style);
        let (lines, joiner) = log::tail(count, length, keep, read)
            .with_context(|| format!("read {}", self.path.display()))?;
        self.joiner = joiner;
        let mut printer = Printer::new(style);
        for line in lines {
            printer.print(line);
        }
        printer.finish().map(drop)
    }

    /// Prints what is new; whether there was anything.
    fn read_on(&mut self, style: Style) -> Result<bool> {
        let mut news = false;
        loop {
            if self.file.is_none() {
                let reopened = File::open(&self.path);
                match reopened {
                    Ok(file) => self.file = Some(file),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(news),
                    Err(e) => return Err(open_error(&self.path, e)),
                }
            }
            // Looked at before the rest of this file is read: once there is another file of that
            // name, the writer has moved on, and what is read then is all.
            let rotated = self.is_rotated()?;
            news |= self.drain(style)?;
            if !rotated {
                return Ok(news);
            }
            self.file = None;
        }
    }

    fn is_rotated(&self) -> Result<bool> {
        let Some(file) = &self.file else { return Ok(false) };
        let look = || -> io::Result<bool> {
            let ours = file.metadata()?;
            match std::fs::metadata(&self.path) {
                Ok(now) => Ok((now.dev(), now.ino()) != (ours.dev(), ours.ino())),
                // Renamed, and not made again yet.
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
                Err(e) => Err(e),
            }
        };
        look().with_context(|| format!("look at {}", self.path.display()))
    }

    fn drain(&mut self, style: Style) -> Result<bool> {
        let Some(file) = &mut self.file else { return Ok(false) };
        let mut printer = Printer::new(style);
        let mut buffer = vec![0; 64 << 10];
        let mut news = false;
        let read = || format!("read {}", self.path.display());
        // Cut to nothing in place, as some tools rotate.
        let position = file.stream_position().with_context(read)?;
        if file.metadata().with_context(read)?.len() < position {
            file.rewind().with_context(read)?;
        }
        loop {
            match file.read(&mut buffer).with_context(read)? {
                0 => break,
                n => {
                    news = true;
                    self.joiner.push(&buffer[..n], |line| printer.print(line));
                    printer.check()?;
                }
            }
        }
        printer.finish()?;
        Ok(news)
    }

    /// Prints lines whose end was never written.
    fn finish(self, style: Style) -> Result<()> {
        let mut printer = Printer::new(style);
        self.joiner.finish(|line| printer.print(line));
        printer.finish()
    }
}

fn open_error(path: &Path, error: io::Error) -> anyhow::Error {
    let denied = error.kind() == io::ErrorKind::PermissionDenied;
    let error = anyhow::Error::new(error).context(format!("open the log {}", path.display()));
    if denied { Hint::on(error, "logs are read from the node's files: use sudo") } else { error }
}

fn is_since(line: &Line, style: Style) -> bool {
    let Some(since) = style.since else { return true };
    // A line without a time is nobody's to hide.
    line.time.parse::<jiff::Timestamp>().map_or(true, |time| time >= since)
}

/// Prints lines; remembers the first error.
struct Printer {
    style: Style,
    stdout: BufWriter<io::StdoutLock<'static>>,
    result: io::Result<()>,
}

impl Printer {
    fn new(style: Style) -> Self {
        Self { style, stdout: BufWriter::new(io::stdout().lock()), result: Ok(()) }
    }

    fn print(&mut self, line: Line) {
        if self.result.is_ok() && is_since(&line, self.style) {
            self.result = self.write(&line);
        }
    }

    fn write(&mut self, line: &Line) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(line.text.len() + 40);
        if self.style.timestamps {
            bytes.extend_from_slice(line.time.as_bytes());
            bytes.push(b' ');
        }
        bytes.extend_from_slice(&line.text);
        bytes.push(b'\n');
        match line.stream {
            Stream::Stdout => self.stdout.write_all(&bytes),
            Stream::Stderr => {
                // Where both are one terminal, their order is kept.
                self.stdout.flush()?;
                io::stderr().write_all(&bytes)
            }
        }
    }

    fn check(&mut self) -> Result<()> {
        Ok(std::mem::replace(&mut self.result, Ok(()))?)
    }

    fn finish(mut self) -> Result<()> {
        self.check()?;
        Ok(self.stdout.flush()?)
    }
}

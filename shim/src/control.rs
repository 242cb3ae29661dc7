//! The pod's private control socket (`io.sock` in the pod's bundle, mode 0600): what the shim
//! contract lacks, log reopening, attach, and what it takes that nothing ends with a shim.
//!
//! One request per connection:
//! ```text
//! -> hello\n                          <- ok <Hello as JSON>\n
//! -> reopen <container>\n             <- ok\n | error <text>\n
//! -> attach <container> [i][o][e]\n   <- ok\n | error <text>\n, then frames both ways
//! -> relay <Relay as JSON>\n        <- ok\n | error <text>\n
//! -> settle <container>\n           <- ok\n
//! -> upgrade <path>\n               <- ok\n, by the new code | error <text>\n
//! frame: kind u8, length u32 big endian, payload
//! -> 0 stdin (empty: end of input)   4 resize (u16 width, u16 height, big endian)
//! <- 1 stdout   2 stderr   3 end (empty: the container's output has ended)
//! -> keep\n                           <- ok\n, then 5 keep (a descriptor and its name) and 6 drop (name),
//!                                       and 3 end once, when all that there is has been lent
//! -> adopt\n                          <- ok\n
//! -> 5 keep …, 3 end                  <- ok\n | error <text>\n
//! ```
//! `keep` lasts as long as the shim: it lends the daemon what would be lost with it (pidfds, the read
//! ends of output pipes, masters of terminals). `adopt` tells a new shim to take over what the bundle
//! says that the dead one had, with what that one had lent.
//!
//! A peer of another version: a word that is not known is answered with an error of kind `invalid` or
//! `unsupported`, and whoever asked does without; fields of [`Hello`] are only ever added, each with
//! a default.
//!
//! An attached client that does not read is dropped when its bounded buffer is full; it never
//! stalls the container.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Longest payload of a frame, in bytes; a longer one is a broken peer.
pub const FRAME_MAX: usize = 256 * 1024;

/// Longest request or reply line, in bytes.
pub const LINE_MAX: usize = 16 * 1024;

/// Bytes of a frame before its payload.
pub const HEADER: usize = 5;

/// The kind of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Bytes for the container's standard input; none: its end.
    Stdin = 0,
    /// Bytes of standard output.
    Stdout = 1,
    /// Bytes of standard error.
    Stderr = 2,
    /// No output will follow; of descriptors, that they are all there.
    End = 3,
    /// New size of the terminal.
    Resize = 4,
    /// A descriptor to be kept, under this name.
    Keep = 5,
    /// It is not to be kept any more.
    Drop = 6,
}

impl Kind {
    /// The kind of this number.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Kind::Stdin,
            1 => Kind::Stdout,
            2 => Kind::Stderr,
            3 => Kind::End,
            4 => Kind::Resize,
            5 => Kind::Keep,
            6 => Kind::Drop,
            _ => return None,
        })
    }
}

/// The bytes before a payload of `length` bytes.
pub fn header(kind: Kind, length: usize) -> [u8; HEADER] {
    let [a, b, c, d] = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    [kind as u8, a, b, c, d]
}

/// Kind and payload length of a header; `None` when a peer that keeps to the protocol cannot have
/// sent it.
pub fn parse_header(header: [u8; HEADER]) -> Option<(Kind, usize)> {
    let [kind, length @ ..] = header;
    let length = u32::from_be_bytes(length) as usize;
    (length <= FRAME_MAX).then_some((Kind::from_byte(kind)?, length))
}

/// Which streams an attach wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// Feed standard input.
    pub stdin: bool,
    /// See standard output (of a terminal: all output).
    pub stdout: bool,
    /// See standard error.
    pub stderr: bool,
}

/// Version of the words that this end knows.
pub const VERSION: u32 = 2;

/// Who is at the other end of a control socket. A shim from before `hello` is the default.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Hello {
    /// [`VERSION`] of that end.
    pub control: u32,
    /// Its release.
    pub version: String,
    /// Version of the state that it hands over and takes over.
    pub state: u32,
    /// It was started where another shim has died, and waits for `adopt`.
    pub orphaned: bool,
}

/// Streams of a container that another shim runs: FIFOs in its bundle, which we log and let others
/// attach to. The other shim is given their paths ([`crate::bundle::Bundle::stdout`] and so on).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relay {
    /// Container id.
    pub container: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// The CRI log; `None`: no file is written, attach works all the same.
    pub log: Option<PathBuf>,
    /// There is a FIFO for standard input, too.
    pub stdin: bool,
    /// Standard input ends with the first attached client that had it.
    pub stdin_once: bool,
    /// There is a FIFO for standard error: not with a terminal.
    pub stderr: bool,
}

/// A request line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Who are you?
    Hello,
    /// Lend me what would be lost with you.
    Keep,
    /// Take over what a dead shim had.
    Adopt,
    /// Execute this binary in your place.
    Upgrade(PathBuf),
    /// Close the container's log and open its path again.
    Reopen(String),
    /// Attach to the container.
    Attach(String, Attach),
    /// Pass on the streams of a container that another shim runs. Once is enough.
    Relay(Relay),
    /// The other shim has let go of the container's streams: pass on what is left, then forget it.
    /// One that is not known is fine.
    Settle(String),
}

impl Request {
    /// The line, with its line feed.
    pub fn line(&self) -> String {
        match self {
            Request::Hello => "hello\n".into(),
            Request::Keep => "keep\n".into(),
            Request::Adopt => "adopt\n".into(),
            Request::Upgrade(binary) => format!("upgrade {}\n", binary.display()),
            Request::Reopen(container) => format!("reopen {container}\n"),
            Request::Relay(relay) => {
                let json = serde_json::to_string(relay).expect("plain data has a JSON form");
                format!("relay {json}\n")
            }
            Request::Settle(container) => format!("settle {container}\n"),
            Request::Attach(container, attach) => {
                let mark = |on: bool, letter: &'static str| if on { letter } else { "" };
                format!(
                    "attach {container} {}{}{}\n",
                    mark(attach.stdin, "i"),
                    mark(attach.stdout, "o"),
                    mark(attach.stderr, "e")
                )
            }
        }
    }

    /// The request of a line without its line feed.
    pub fn parse(line: &str) -> Option<Self> {
        match line {
            "hello" => return Some(Request::Hello),
            "keep" => return Some(Request::Keep),
            "adopt" => return Some(Request::Adopt),
            _ => {}
        }
        if let Some(path) = line.strip_prefix("upgrade ") {
            return Some(PathBuf::from(path))
                .filter(|path| path.is_absolute())
                .map(Request::Upgrade);
        }
        if let Some(json) = line.strip_prefix("relay ") {
            return serde_json::from_str(json).ok().map(Request::Relay);
        }
        let mut words = line.split(' ');
        let request = match (words.next()?, words.next().filter(|id| !id.is_empty())?) {
            ("reopen", id) => Request::Reopen(id.to_owned()),
            ("settle", id) => Request::Settle(id.to_owned()),
            ("attach", id) => {
                let mut attach = Attach::default();
                for letter in words.next().unwrap_or_default().chars() {
                    match letter {
                        'i' => attach.stdin = true,
                        'o' => attach.stdout = true,
                        'e' => attach.stderr = true,
                        _ => return None,
                    }
                }
                Request::Attach(id.to_owned(), attach)
            }
            _ => return None,
        };
        words.next().is_none().then_some(request)
    }
}

#[cfg(feature = "client")]
pub use self::client::{AttachInput, AttachOutput, AttachStream, Control, Output};
pub use crate::fds::Kept;

/// What a shim says of what it lends.
#[derive(Debug)]
pub enum Loan {
    /// To be held under this name.
    Keep(String, std::os::fd::OwnedFd),
    /// Not to be held any more.
    Drop(String),
    /// All that there was to lend when it began.
    All,
}

#[cfg(feature = "client")]
mod client {
    use std::{
        io,
        path::{Path, PathBuf},
        sync::Arc,
        time::Duration,
    };

    use tokio::{
        io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
        net::{
            UnixStream,
            unix::{OwnedReadHalf, OwnedWriteHalf},
        },
        sync::Mutex,
    };

    use super::{
        Attach, FRAME_MAX, HEADER, Hello, Kept, Kind, LINE_MAX, Loan, Request, header, parse_header,
    };
    use crate::{bundle::Bundle, client::Error, fds};

    /// The way to a pod's control socket.
    #[derive(Clone, Debug)]
    pub struct Control {
        socket: PathBuf,
    }

    impl Control {
        /// The control socket of the pod whose bundle this is.
        pub fn new(pod_bundle: &Bundle) -> Self {
            Self { socket: pod_bundle.io_socket() }
        }

        /// Closes the container's log file and opens its path again, after a rotation.
        ///
        /// # Errors
        /// The shim does not answer within `deadline`, does not know the container, or cannot open
        /// the file; then it goes on with the file it has.
        pub async fn reopen_log(&self, container: &str, deadline: Duration) -> Result<(), Error> {
            self.order("reopen log", deadline, Request::Reopen(container.to_owned())).await
        }

        /// Has the streams of a container that another shim runs logged and open to attach.
        ///
        /// # Errors
        /// No answer within 10 seconds; the FIFOs or the log cannot be opened.
        pub async fn relay(&self, relay: super::Relay) -> Result<(), Error> {
            self.order("relay streams", Duration::from_secs(10), Request::Relay(relay)).await
        }

        /// Passes on what is left in the streams of [`Control::relay`] and ends that.
        ///
        /// # Errors
        /// No answer within 20 seconds.
        pub async fn settle(&self, container: &str) -> Result<(), Error> {
            let request = Request::Settle(container.to_owned());
            self.order("settle streams", Duration::from_secs(20), request).await
        }

        /// Has the shim replace its code by that of `binary`, an absolute path. Its Task connections break
        /// and can be made again at once; everything else goes on.
        ///
        /// # Errors
        /// It cannot be, and the old code goes on (`Precondition`, and `Invalid` or `Unimplemented` from
        /// one that does not know how); or, as `Closed`, the new code did not come up.
        pub async fn upgrade(&self, binary: &Path, deadline: Duration) -> Result<(), Error> {
            self.order("upgrade", deadline, Request::Upgrade(binary.to_owned())).await
        }

        /// Attaches to a running container.
        ///
        /// # Errors
        /// The shim does not answer within 10 seconds, or does not know the container.
        pub async fn attach(&self, container: &str, attach: Attach) -> Result<AttachStream, Error> {
            let request = Request::Attach(container.to_owned(), attach);
            let call = "attach";
            let (read, write) = within(call, Duration::from_secs(10), async {
                let (read, write) = self.ask(call, &request).await?.into_split();
                // Frames follow the answer: what is read ahead must not be lost.
                let (mut read, mut reply) = (BufReader::new(read), Vec::new());
                let line = (&mut read).take(LINE_MAX as u64).read_until(b'\n', &mut reply).await;
                line.map_err(|source| Error::Io { call, source })?;
                let reply = String::from_utf8_lossy(&reply);
                accepted(call, reply.trim_end_matches('\n'))?;
                Ok((read, write))
            })
            .await?;
            let write = Arc::new(Mutex::new(write));
            let output = AttachOutput { read, _write: write.clone() };
            Ok(AttachStream { input: AttachInput { write }, output })
        }

        /// Who is there. A shim that does not know the question is one from before it.
        ///
        /// # Errors
        /// Nobody answers within `deadline`.
        pub async fn hello(&self, deadline: Duration) -> Result<Hello, Error> {
            let call = "hello";
            within(call, deadline, async {
                let io = |source| Error::Io { call, source };
                let stream = self.ask(call, &Request::Hello).await?;
                let reply = fds::Reader::new(&stream).line().await.map_err(io)?;
                match reply.split_once(' ') {
                    Some(("ok", json)) => serde_json::from_str(json).map_err(|e| io(e.into())),
                    Some(("error", _)) => Ok(Hello::default()),
                    _ => Err(Error::Closed { call }),
                }
            })
            .await
        }

        /// Follows what the shim lends, until it is gone. A shim of a release before [`Loan::All`] says
        /// nothing of the kind.
        ///
        /// # Errors
        /// The shim cannot be reached, does not know the word, or breaks the protocol.
        pub async fn keep(&self, mut changed: impl FnMut(Loan)) -> Result<(), Error> {
            let call = "keep";
            let io = |source| Error::Io { call, source };
            let stream = self.ask(call, &Request::Keep).await?;
            let mut reader = fds::Reader::new(&stream);
            accepted(call, &reader.line().await.map_err(io)?)?;
            while let Some(frame) = reader.frame().await.map_err(io)? {
                match (frame.kind, frame.fd) {
                    (Kind::Keep, Some(fd)) => changed(Loan::Keep(frame.name, fd)),
                    (Kind::Drop, _) => changed(Loan::Drop(frame.name)),
                    (Kind::End, _) => changed(Loan::All),
                    // Of a newer shim.
                    _ => {}
                }
            }
            Ok(())
        }

        /// Has a new shim take over what the one that died here had, and what that had lent.
        ///
        /// # Errors
        /// It cannot; or it does not answer within `deadline`.
        pub async fn adopt(&self, kept: &Kept, deadline: Duration) -> Result<(), Error> {
            use std::os::fd::AsFd as _;
            let call = "adopt";
            within(call, deadline, async {
                let io = |source| Error::Io { call, source };
                let stream = self.ask(call, &Request::Adopt).await?;
                let mut reader = fds::Reader::new(&stream);
                accepted(call, &reader.line().await.map_err(io)?)?;
                for (name, fd) in kept {
                    let sent = fds::send(&stream, Kind::Keep, name, Some(fd.as_fd())).await;
                    sent.map_err(io)?;
                }
                fds::send(&stream, Kind::End, "", None).await.map_err(io)?;
                accepted(call, &reader.line().await.map_err(io)?)
            })
            .await
        }

        /// A request whose whole answer is that it was done, or why not.
        async fn order(
            &self,
            call: &'static str,
            deadline: Duration,
            request: Request,
        ) -> Result<(), Error> {
            within(call, deadline, async {
                let stream = self.ask(call, &request).await?;
                let reply = fds::Reader::new(&stream).line().await;
                accepted(call, &reply.map_err(|source| Error::Io { call, source })?)
            })
            .await
        }

        /// Sends a request; the answer is still to be read.
        async fn ask(&self, call: &'static str, request: &Request) -> Result<UnixStream, Error> {
            let io = |source| Error::Io { call, source };
            // sun_path holds 107 bytes and bundles are deep: connect through a short alias.
            let (_dir, short) = short_path(&self.socket).map_err(io)?;
            let mut stream = UnixStream::connect(short).await.map_err(io)?;
            stream.write_all(request.line().as_bytes()).await.map_err(io)?;
            Ok(stream)
        }
    }

    /// What is done in a call, and given up at its deadline.
    async fn within<T>(
        call: &'static str,
        deadline: Duration,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let done = tokio::time::timeout(deadline, work).await;
        done.map_err(|_| Error::Deadline { call, deadline })?
    }

    fn accepted(call: &'static str, reply: &str) -> Result<(), Error> {
        match reply.split_once(' ') {
            None if reply == "ok" => Ok(()),
            Some(("error", text)) => Err(Error::refused(call, text)),
            _ => Err(Error::Closed { call }),
        }
    }

    /// `/proc/self/fd/N/name`, and the directory that must stay open for it.
    fn short_path(socket: &std::path::Path) -> io::Result<(std::fs::File, PathBuf)> {
        use std::os::fd::AsRawFd as _;
        let parent = socket.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let name = socket.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let dir = std::fs::File::open(parent)?;
        let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
        Ok((dir, short))
    }

    /// What comes from an attached container.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub enum Output {
        /// Bytes of standard output, or of the terminal.
        Stdout(Vec<u8>),
        /// Bytes of standard error.
        Stderr(Vec<u8>),
    }

    /// An attached container.
    #[derive(Debug)]
    pub struct AttachStream {
        /// Towards the container.
        pub input: AttachInput,
        /// From the container.
        pub output: AttachOutput,
    }

    impl AttachStream {
        /// Both directions, to be driven apart. The attach ends when both are dropped; standard
        /// input alone ends by [`AttachInput::close_stdin`].
        pub fn split(self) -> (AttachInput, AttachOutput) {
            (self.input, self.output)
        }
    }

    /// Towards an attached container.
    #[derive(Debug)]
    pub struct AttachInput {
        write: Arc<Mutex<OwnedWriteHalf>>,
    }

    impl AttachInput {
        /// Feeds standard input; waits while the container does not read.
        ///
        /// # Errors
        /// The shim has ended the attach.
        pub async fn stdin(&mut self, mut bytes: &[u8]) -> io::Result<()> {
            while !bytes.is_empty() {
                let (now, later) = bytes.split_at(bytes.len().min(FRAME_MAX));
                self.frame(Kind::Stdin, now).await?;
                bytes = later;
            }
            Ok(())
        }

        /// Ends standard input.
        ///
        /// # Errors
        /// As [`AttachInput::stdin`].
        pub async fn close_stdin(&mut self) -> io::Result<()> {
            self.frame(Kind::Stdin, &[]).await
        }

        /// Sets the terminal's size, in characters.
        ///
        /// # Errors
        /// As [`AttachInput::stdin`].
        pub async fn resize(&mut self, width: u16, height: u16) -> io::Result<()> {
            let ([a, b], [c, d]) = (width.to_be_bytes(), height.to_be_bytes());
            self.frame(Kind::Resize, &[a, b, c, d]).await
        }

        async fn frame(&mut self, kind: Kind, payload: &[u8]) -> io::Result<()> {
            let mut frame = Vec::with_capacity(HEADER + payload.len());
            frame.extend_from_slice(&header(kind, payload.len()));
            frame.extend_from_slice(payload);
            self.write.lock().await.write_all(&frame).await
        }
    }

    /// From an attached container.
    #[derive(Debug)]
    pub struct AttachOutput {
        read: BufReader<OwnedReadHalf>,
        /// Dropping a write half shuts it down, and to the shim the client has left then.
        _write: Arc<Mutex<OwnedWriteHalf>>,
    }

    impl AttachOutput {
        /// The next bytes; `None` when the container's output has ended. Not cancel safe: a
        /// dropped call can lose a part of a frame.
        ///
        /// # Errors
        /// `UnexpectedEof`: the shim dropped this client (it read too slowly), or is gone.
        pub async fn next(&mut self) -> io::Result<Option<Output>> {
            loop {
                let mut head = [0; HEADER];
                self.read.read_exact(&mut head).await?;
                let (kind, length) = parse_header(head).ok_or(io::ErrorKind::InvalidData)?;
                let mut payload = vec![0; length];
                self.read.read_exact(&mut payload).await?;
                match kind {
                    Kind::Stdout => return Ok(Some(Output::Stdout(payload))),
                    Kind::Stderr => return Ok(Some(Output::Stderr(payload))),
                    Kind::End => return Ok(None),
                    Kind::Stdin | Kind::Resize | Kind::Keep | Kind::Drop => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_read_as_they_are_written() {
        let all = Attach { stdin: true, stdout: true, stderr: true };
        for request in [
            Request::Hello,
            Request::Keep,
            Request::Adopt,
            Request::Upgrade("/opt/a shim".into()),
            Request::Reopen("a".into()),
            Request::Attach("b".into(), all),
            Request::Attach("c".into(), Attach::default()),
            Request::Settle("d".into()),
            Request::Relay(Relay {
                container: "e".into(),
                bundle: "/a b".into(),
                log: Some("/var/log/a\nb".into()),
                stdin: true,
                stdin_once: false,
                stderr: true,
            }),
        ] {
            assert_eq!(Request::parse(request.line().trim_end_matches('\n')), Some(request));
        }
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for line in [
            "",
            "hello you",
            "keep ",
            "upgrade",
            "upgrade shim",
            "reopen",
            "reopen ",
            "attach a x",
            "attach a io e",
            "detach a",
            "reopen a b",
            "relay {}",
        ] {
            assert_eq!(Request::parse(line), None, "{line}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_parsed_or_refused(bytes: [u8; HEADER]) {
            if let Some((kind, length)) = parse_header(bytes) {
                prop_assert!(length <= FRAME_MAX);
                prop_assert_eq!(header(kind, length), bytes);
            }
        }
    }
}

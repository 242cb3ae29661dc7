//! A backend of real processes and sockets, a server on loopback, and clients that share no code with
//! the server: a Python one for the protocol's details, one here for bulk and for bad manners.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "a module of several test binaries, each of which uses its part"
)]

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use flate2::write::ZlibEncoder;
use holdfast_streaming::{
    AttachRequest, Backend, Config, Duplex, ExecRequest, ExitCode, Limits, PortForwardRequest,
    Server, Streams, Tls,
};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

pub const BUSYBOX: &str = "/bin/busybox";

/// Runs commands here, and forwards to ports of this machine.
#[derive(Default)]
pub struct Processes {
    /// Sessions that the backend is in.
    pub running: AtomicUsize,
    /// Sessions whose client went away first.
    pub lost: AtomicUsize,
}

struct Running<'a>(&'a AtomicUsize);
impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn code(status: ExitStatus) -> ExitCode {
    use std::os::unix::process::ExitStatusExt as _;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap())
}

async fn copy_to(mut from: impl AsyncRead + Unpin, to: Option<impl AsyncWrite + Unpin>) {
    if let Some(mut to) = to {
        let _ = tokio::io::copy(&mut from, &mut to).await;
    }
}

impl Processes {
    fn enter(&self) -> Running<'_> {
        self.running.fetch_add(1, Ordering::SeqCst);
        Running(&self.running)
    }

    async fn piped(&self, command: &[String], streams: Streams) -> Result<ExitCode, String> {
        let pipe = |wanted: bool| if wanted { Stdio::piped() } else { Stdio::null() };
        let mut child = Command::new(&command[0])
            .args(&command[1..])
            .stdin(pipe(streams.stdin.is_some()))
            .stdout(pipe(streams.stdout.is_some()))
            .stderr(pipe(streams.stderr.is_some()))
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("start {}: {error}", command[0]))?;
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let input = async move {
            if let (Some(mut from), Some(mut to)) = (streams.stdin, stdin) {
                let _ = tokio::io::copy(&mut from, &mut to).await;
            }
        };
        let output = async {
            tokio::join!(
                async {
                    if let Some(stdout) = stdout {
                        copy_to(stdout, streams.stdout).await
                    }
                },
                async {
                    if let Some(stderr) = stderr {
                        copy_to(stderr, streams.stderr).await
                    }
                },
            );
            child.wait().await
        };
        let input = async {
            input.await;
            std::future::pending::<()>().await
        };
        tokio::select! {
            status = output => status.map(code).map_err(|error| error.to_string()),
            () = streams.closed.cancelled() => {
                self.lost.fetch_add(1, Ordering::SeqCst);
                Err("the client left".into())
            }
            () = input => unreachable!(),
        }
    }

    async fn terminal(&self, command: &[String], streams: Streams) -> Result<ExitCode, String> {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let path = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let slave = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        // `setsid -c` makes it the controlling terminal, so that a new size is signalled.
        let mut child = Command::new(BUSYBOX)
            .args(["setsid", "-c"])
            .args(command)
            .stdin(slave.try_clone().unwrap())
            .stdout(slave.try_clone().unwrap())
            .stderr(slave)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| error.to_string())?;
        let master: std::fs::File = master.into();
        let (read, write) = (master.try_clone().unwrap(), master.try_clone().unwrap());
        let (mut read, mut write) =
            (tokio::fs::File::from_std(read), tokio::fs::File::from_std(write));
        let input = async {
            if let Some(mut from) = streams.stdin {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = from.read(&mut buffer).await {
                    let _ = write.write_all(&buffer[..count]).await;
                    let _ = write.flush().await;
                }
            }
            std::future::pending::<()>().await
        };
        let resize = async {
            if let Some(mut sizes) = streams.resizes {
                while let Some(size) = sizes.next().await {
                    let size = rustix::termios::Winsize {
                        ws_col: size.width,
                        ws_row: size.height,
                        ws_xpixel: 0,
                        ws_ypixel: 0,
                    };
                    rustix::termios::tcsetwinsize(&master, size).unwrap();
                }
            }
            std::future::pending::<()>().await
        };
        let output = async {
            let mut to = streams.stdout.unwrap();
            let mut buffer = [0; 4096];
            // EIO: the last process has closed the terminal.
            while let Ok(count @ 1..) = read.read(&mut buffer).await {
                to.write_all(&buffer[..count]).await.unwrap();
            }
            child.wait().await
        };
        tokio::select! {
            status = output => status.map(code).map_err(|error| error.to_string()),
            () = input => unreachable!(),
            () = resize => unreachable!(),
        }
    }
}

impl Backend for Processes {
    async fn exec(&self, request: ExecRequest, streams: Streams) -> Result<ExitCode, String> {
        let _running = self.enter();
        if request.container == "gone" {
            return Err("container gone is not running".into());
        }
        if request.tty {
            self.terminal(&request.command, streams).await
        } else {
            self.piped(&request.command, streams).await
        }
    }

    async fn attach(&self, request: AttachRequest, streams: Streams) -> Result<(), String> {
        let _running = self.enter();
        assert_eq!(request.container, "attached");
        let command = [BUSYBOX, "sh", "-c", "echo ready; cat; exit 3"].map(String::from);
        self.piped(&command, streams).await.map(|_| ())
    }

    async fn port_forward(
        &self,
        pod: &str,
        port: u16,
        mut stream: Box<dyn Duplex>,
    ) -> Result<(), String> {
        let _running = self.enter();
        assert_eq!(pod, "pod");
        let to = SocketAddr::from(([127, 0, 0, 1], port));
        let mut pod = TcpStream::connect(to)
            .await
            .map_err(|error| format!("connect to port {port}: {error}"))?;
        let result =
            tokio::io::copy_bidirectional_with_sizes(&mut stream, &mut pod, 16384, 16384).await;
        result.map(|_| ()).map_err(|error| format!("forward port {port}: {error}"))
    }
}

/// A server that runs until it is dropped.
pub struct Node {
    pub server: Arc<Server>,
    pub backend: Arc<Processes>,
    pub address: SocketAddr,
    stop: CancellationToken,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl Node {
    pub async fn start() -> Self {
        Self::with(Limits::default(), None).await
    }

    pub async fn with(limits: Limits, tls: Option<Tls>) -> Self {
        let config = Config { address: "127.0.0.1:0".parse().unwrap(), tls, limits };
        let server = Arc::new(Server::bind(config).await.unwrap());
        let backend = Arc::new(Processes::default());
        let stop = CancellationToken::new();
        let shutdown = stop.clone();
        let task = tokio::spawn(
            server.clone().serve(backend.clone(), async move { shutdown.cancelled().await }),
        );
        let address = server.address().unwrap();
        Self { server, backend, address, stop, task: Some(task) }
    }

    /// Ends the server, and returns when it has ended.
    pub async fn stop(mut self) {
        self.stop.cancel();
        within(20, "the server's end", self.task.take().unwrap()).await.unwrap();
    }

    pub fn exec(&self, command: &[&str], streams: &[&str], tty: bool) -> String {
        self.exec_in("container", command, streams, tty)
    }

    pub fn exec_in(
        &self,
        container: &str,
        command: &[&str],
        streams: &[&str],
        tty: bool,
    ) -> String {
        let request = ExecRequest {
            container: container.into(),
            command: command.iter().map(|part| part.to_string()).collect(),
            tty,
            stdin: streams.contains(&"stdin"),
            stdout: streams.contains(&"stdout"),
            stderr: streams.contains(&"stderr"),
        };
        self.server.exec_url(request).unwrap()
    }

    pub fn sh(&self, script: &str) -> String {
        self.exec(&[BUSYBOX, "sh", "-c", script], &["stdin", "stdout", "stderr"], false)
    }

    pub fn forward(&self, ports: &[u16]) -> String {
        let request = PortForwardRequest { pod: "pod".into(), ports: ports.into() };
        self.server.port_forward_url(request).unwrap()
    }

    /// Waits until the backend is in `count` sessions.
    pub async fn running(&self, count: usize) {
        let reached = async {
            while self.backend.running.load(Ordering::SeqCst) != count {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        within(20, &format!("{count} sessions"), reached).await;
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

pub async fn within<F: Future>(seconds: u64, what: &str, future: F) -> F::Output {
    let limit = Duration::from_secs(seconds);
    tokio::time::timeout(limit, future)
        .await
        .unwrap_or_else(|_| panic!("{what}: not within {seconds} s"))
}

/// What the Python client saw.
pub async fn python(request: Value) -> Value {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/spdy_client.py");
    let mut command = Command::new("python3");
    command.arg(script).arg(request.to_string()).kill_on_drop(true);
    let output = within(60, "the Python client", command.output())
        .await
        .expect("python3 is needed by this test");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Exec by the Python client; `more` goes into its request.
pub async fn python_exec(url: &str, streams: &[&str], more: Value) -> Value {
    let mut request = json!({ "url": url, "mode": "exec", "streams": streams });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    python(request).await
}

/// The path of an URL, for requests by hand.
pub fn path(url: &str) -> &str {
    &url[url.match_indices('/').nth(2).unwrap().0..]
}

/// Sends a request by hand and gives back the head of the answer and the connection.
pub async fn request(address: SocketAddr, head: &str) -> (String, TcpStream) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let reading = async {
        while !answer.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => answer.push(byte),
                Err(_) => break,
            }
        }
    };
    within(20, "an answer", reading).await;
    (String::from_utf8(answer).unwrap(), stream)
}

/// A frame of the server.
#[derive(Debug)]
pub enum Frame {
    Data { stream: u32, fin: bool, data: Vec<u8> },
    Control { kind: u16, body: Vec<u8> },
}

/// A SPDY client of a few lines. Its header blocks are zlib without a dictionary, which a server must
/// take as well.
pub struct Spdy<T> {
    pub io: T,
    next: u32,
    deflate: ZlibEncoder<Vec<u8>>,
}

pub fn head_of_spdy(path: &str, protocol: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: SPDY/3.1\r\n\
         x-stream-protocol-version: {protocol}\r\n\r\n"
    )
}

impl Spdy<TcpStream> {
    pub async fn connect(node: &Node, url: &str, protocol: &str) -> Self {
        let (answer, stream) = request(node.address, &head_of_spdy(path(url), protocol)).await;
        assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
        Self::over(stream)
    }
}

impl<T> Spdy<T> {
    pub fn over(io: T) -> Self {
        Self { io, next: 1, deflate: ZlibEncoder::new(Vec::new(), flate2::Compression::fast()) }
    }

    pub fn block(&mut self, raw: &[u8]) -> Vec<u8> {
        self.deflate.write_all(raw).unwrap();
        self.deflate.flush().unwrap();
        std::mem::take(self.deflate.get_mut())
    }

    pub fn syn_stream(&mut self, headers: &[(&str, &str)]) -> (u32, Vec<u8>) {
        let mut raw = (headers.len() as u32).to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            raw.extend((text.len() as u32).to_be_bytes());
            raw.extend(text.as_bytes());
        }
        let stream = self.next;
        self.next += 2;
        let mut body = stream.to_be_bytes().to_vec();
        body.extend([0; 6]);
        body.extend(self.block(&raw));
        (stream, control(1, &body))
    }
}

pub fn control(kind: u16, body: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80, 3];
    frame.extend(kind.to_be_bytes());
    frame.extend((body.len() as u32).to_be_bytes());
    frame.extend(body);
    frame
}

pub fn data(stream: u32, data: &[u8], fin: bool) -> Vec<u8> {
    let mut frame = stream.to_be_bytes().to_vec();
    frame.extend((u32::from(fin) << 24 | data.len() as u32).to_be_bytes());
    frame.extend(data);
    frame
}

impl<T: AsyncRead + AsyncWrite + Unpin> Spdy<T> {
    pub async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let (stream, frame) = self.syn_stream(headers);
        self.io.write_all(&frame).await.unwrap();
        stream
    }

    pub async fn send(&mut self, stream: u32, bytes: &[u8], fin: bool) {
        self.io.write_all(&data(stream, bytes, fin)).await.unwrap();
    }

    /// Opens one forwarded connection: its error and its data stream.
    pub async fn forward(&mut self, port: u16, id: &str) -> (u32, u32) {
        let port = port.to_string();
        let error = self.open(&[("streamtype", "error"), ("port", &port), ("requestid", id)]).await;
        let data = self.open(&[("streamtype", "data"), ("port", &port), ("requestid", id)]).await;
        (error, data)
    }

    /// The next frame, or `None` at the end of the connection.
    pub async fn read(&mut self) -> Option<Frame> {
        within(30, "a frame", read_frame(&mut self.io)).await
    }

    /// The next frame that concerns `stream` as data.
    pub async fn data_of(&mut self, wanted: u32) -> Option<(Vec<u8>, bool)> {
        loop {
            match self.read().await? {
                Frame::Data { stream, fin, data } if stream == wanted => return Some((data, fin)),
                _ => {}
            }
        }
    }
}

pub async fn read_frame(io: &mut (impl AsyncRead + Unpin)) -> Option<Frame> {
    let mut head = [0; 8];
    io.read_exact(&mut head).await.ok()?;
    let word = u32::from_be_bytes(head[..4].try_into().unwrap());
    let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
    let mut body = vec![0; length];
    io.read_exact(&mut body).await.ok()?;
    Some(if word >> 31 == 0 {
        Frame::Data { stream: word, fin: head[4] & 1 != 0, data: body }
    } else {
        Frame::Control { kind: word as u16, body }
    })
}

/// Bytes that repeat with no period of use, by position: what is at an offset can be checked alone.
pub fn pattern(offset: u64, into: &mut [u8]) {
    for (index, byte) in into.iter_mut().enumerate() {
        let position = offset + index as u64;
        *byte = (position.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
    }
}

//! Sessions: the real `holdfast`, on pipes and on a terminal, a real streaming server, and behind it a
//! script.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::SocketAddr,
    os::fd::OwnedFd,
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use holdfast_protos::cri;
use holdfast_streaming::{
    AttachRequest, Backend, Config, Duplex, ExecRequest, ExitCode, Limits, Server, Streams,
};
use nix::{
    pty::{Winsize, openpty},
    sys::{
        signal::{Signal, kill},
        termios::{LocalFlags, tcgetattr},
    },
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
};

use super::{DEADLINE, Node, State, two_pods, with_image};

/// A command of its own kind for each test: what it gets it prints, in brackets.
#[derive(Clone, Default)]
struct Script {
    /// Set by StartContainer's end, in effect: the fake's status says what the exit code is.
    node: Arc<Mutex<Option<super::Fake>>>,
}

impl Script {
    async fn play(&self, command: &str, streams: Streams) -> Result<ExitCode, String> {
        let Streams { stdin, stdout, stderr, resizes, closed } = streams;
        let mut out = stdout.unwrap();
        match command {
            "echo" => {
                let mut all = String::new();
                stdin.unwrap().read_to_string(&mut all).await.map_err(|e| e.to_string())?;
                out.write_all(format!("[{all}]").as_bytes()).await.unwrap();
                stderr.unwrap().write_all(b"no\n").await.unwrap();
                Ok(42)
            }
            "no-input" => {
                out.write_all(format!("[{}]", stdin.is_none()).as_bytes()).await.unwrap();
                Ok(0)
            }
            "refuse" => Err("no such program".into()),
            // Prints sizes and keys until `q`.
            "terminal" => {
                assert!(stderr.is_none());
                let (mut stdin, mut resizes) = (stdin.unwrap(), resizes.unwrap());
                loop {
                    let mut key = [0; 1];
                    let text = tokio::select! {
                        biased;
                        Some(size) = resizes.next() => format!("[{}x{}]", size.width, size.height),
                        read = stdin.read(&mut key) => match read {
                            Ok(1) if key[0] == b'q' => return Ok(7),
                            Ok(1) => format!("[{}]", key[0]),
                            _ => return Err("stdin has ended".into()),
                        },
                        () = closed.cancelled() => return Err("the client has gone".into()),
                    };
                    out.write_all(text.as_bytes()).await.unwrap();
                    out.flush().await.unwrap();
                }
            }
            other => panic!("{other}"),
        }
    }
}

impl Backend for Script {
    async fn exec(&self, request: ExecRequest, streams: Streams) -> Result<ExitCode, String> {
        self.play(&request.command[0], streams).await
    }

    async fn attach(&self, request: AttachRequest, streams: Streams) -> Result<(), String> {
        let command = if request.tty { "terminal" } else { "echo" };
        let code = self.play(command, streams).await?;
        let fake = self.node.lock().unwrap().clone().unwrap();
        let mut state = fake.state();
        let status = state.status.get_mut(&request.container).unwrap();
        status.state = cri::ContainerState::ContainerExited.into();
        status.exit_code = code;
        Ok(())
    }

    async fn port_forward(
        &self,
        _: &str,
        port: u16,
        mut stream: Box<dyn Duplex>,
    ) -> Result<(), String> {
        let to = SocketAddr::from(([127, 0, 0, 1], port));
        let mut inside = TcpStream::connect(to).await.map_err(|e| format!("connect: {e}"))?;
        let copied = tokio::io::copy_bidirectional(&mut stream, &mut inside).await;
        copied.map(drop).map_err(|e| e.to_string())
    }
}

async fn node(mut state: State) -> Node {
    let config =
        Config { address: "127.0.0.1:0".parse().unwrap(), tls: None, limits: Limits::default() };
    let server = Arc::new(Server::bind(config).await.unwrap());
    let script = Script::default();
    tokio::spawn(server.clone().serve(Arc::new(script.clone()), std::future::pending()));
    state.streaming = Some(server);
    let node = Node::new(state);
    *script.node.lock().unwrap() = Some(node.fake.clone());
    node
}

/// With a status for the container that runs, which was made with these.
fn running(tty: bool, stdin: bool) -> State {
    let mut state = two_pods();
    let id = state.containers[0].id.clone();
    let status = cri::ContainerStatus {
        id: id.clone(),
        state: cri::ContainerState::ContainerRunning.into(),
        ..Default::default()
    };
    state.status.insert(id, status);
    state.container_info =
        serde_json::json!({ "config": { "tty": tty, "stdin": stdin } }).to_string();
    state
}

/// `holdfast` on a terminal of its own.
struct Terminal {
    child: Child,
    master: File,
    /// Keeps the terminal, and with it its settings, when holdfast has gone.
    slave: OwnedFd,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    fn start(node: &Node, words: &[&str]) -> Self {
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(Some(&size), None).unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        // A session of its own, whose terminal it is: only then does a new size reach it.
        let mut command = Command::new("setsid");
        command
            .args(["--ctty", env!("CARGO_BIN_EXE_holdfast")])
            .args(words)
            .env("HOLDFAST_ADDRESS", &node.fake.socket)
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .kill_on_drop(true);
        let child = command.spawn().unwrap();
        let shown = Arc::new(Mutex::new(Vec::new()));
        let master = File::from(pty.master);
        let (mut reader, to) = (master.try_clone().unwrap(), shown.clone());
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut piece) {
                to.lock().unwrap().extend_from_slice(&piece[..count]);
            }
        });
        Self { child, master, slave: pty.slave, shown }
    }

    async fn shows(&self, text: &str) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let shown = String::from_utf8_lossy(&self.shown.lock().unwrap()).into_owned();
            if shown.contains(text) {
                return;
            }
            assert!(Instant::now() < deadline, "{text:?} is not in {shown:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn types(&mut self, keys: &[u8]) {
        self.master.write_all(keys).unwrap();
    }

    fn resize(&self, columns: u16, rows: u16) {
        let size = rustix_size(columns, rows);
        rustix::termios::tcsetwinsize(&self.master, size).unwrap();
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.slave)
            .unwrap()
            .local_flags
            .intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
    }

    fn kill(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().unwrap() as i32), signal).unwrap();
    }

    /// The exit code; the terminal is as it was.
    async fn ends(mut self) -> i32 {
        let status = tokio::time::timeout(DEADLINE, self.child.wait()).await.expect("it ends");
        assert!(!self.is_raw(), "the terminal is given back");
        status.unwrap().code().expect("it was not killed by a signal")
    }
}

fn rustix_size(columns: u16, rows: u16) -> rustix::termios::Winsize {
    rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_i_joins_pipes_and_returns_the_exit_code() {
    let node = node(two_pods()).await;
    let mut command = node.command(&["exec", "-i", "app", "echo"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"some text").await.unwrap();
    drop(stdin);
    let output = tokio::time::timeout(DEADLINE, child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(42));
    assert_eq!((&*output.stdout, &*output.stderr), (&b"[some text]"[..], &b"no\n"[..]));
    // Without -i there is no stdin at all.
    assert_eq!(node.run(&["exec", "app", "no-input"]).await.ok(), "[true]");
    node.run(&["exec", "app", "refuse"]).await.fails(125, "no such program");
}

#[tokio::test(flavor = "multi_thread")]
async fn t_without_a_terminal_is_refused_before_anything_is_done() {
    let node = node(with_image()).await;
    for words in
        [&["exec", "-it", "app", "sh"][..], &["run", "-it", "r/app:1"], &["run", "-t", "r/app:1"]]
    {
        node.run(words).await.fails(125, "-t needs a terminal");
    }
    assert_eq!(node.calls(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_it_is_raw_follows_the_size_and_gives_the_terminal_back() {
    let node = node(two_pods()).await;
    let mut terminal = Terminal::start(&node, &["exec", "-it", "app", "terminal"]);
    terminal.shows("[80x24]").await;
    assert!(terminal.is_raw());
    // Ctrl-C, and the keys that other sessions are left with, are the command's.
    terminal.types(b"\x03\x10\x11");
    terminal.shows("[3][16][17]").await;
    terminal.resize(132, 50);
    terminal.shows("[132x50]").await;
    terminal.types(b"q");
    assert_eq!(terminal.ends().await, 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_give_the_terminal_back() {
    let node = node(two_pods()).await;
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT] {
        let terminal = Terminal::start(&node, &["exec", "-it", "app", "terminal"]);
        terminal.shows("[80x24]").await;
        assert!(terminal.is_raw());
        terminal.kill(signal);
        assert_eq!(terminal.ends().await, 128 + signal as i32);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn attach_can_be_left_with_the_keys() {
    let node = node(running(true, true)).await;
    let mut terminal = Terminal::start(&node, &["attach", "-i", "app"]);
    terminal.shows("[80x24]").await;
    // The first key alone is held back, and passed on with one that is not the second.
    terminal.types(b"a\x10b");
    terminal.shows("[97][16][98]").await;
    terminal.types(b"\x10\x11");
    terminal.shows("app runs on").await;
    assert_eq!(terminal.ends().await, 0);
    // Other keys; and without them the exit code is the container's.
    let mut terminal = Terminal::start(&node, &["attach", "-i", "--detach-keys", "ctrl-a", "app"]);
    terminal.shows("[80x24]").await;
    terminal.types(b"\x10\x11");
    terminal.shows("[16][17]").await;
    terminal.types(b"q");
    assert_eq!(terminal.ends().await, 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn attach_knows_what_the_container_has() {
    let state = running(false, false);
    let node = node(state).await;
    node.run(&["attach", "-i", "app"]).await.fails(125, "takes no input");
    node.fake.state().container_info = r#"{"config":{"tty":true,"stdin":true}}"#.into();
    node.run(&["attach", "-i", "app"]).await.fails(125, "stdin is none");
    node.fake.state().container_info = r#"{"config":{"stdin":true}}"#.into();
    let ran = node.run(&["attach", "-i", "app"]).await;
    assert_eq!((ran.code, &*ran.out, &*ran.err), (42, "[]", "no\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn run_it_attaches_before_the_start_and_returns_the_exit_code() {
    let node = node(with_image()).await;
    let logs = node.path("logs");
    let words = ["run", "-it", "--rm", "--name", "x", "--log-dir", &logs, "r/app:1"];
    let mut terminal = Terminal::start(&node, &words);
    terminal.shows("[80x24]").await;
    terminal.types(b"q");
    assert_eq!(terminal.ends().await, 7);
    let calls = node.calls();
    let at = |name: &str| calls.iter().position(|call| call.starts_with(name));
    assert!(
        at("CreateContainer") < at("Attach") && at("Attach") < at("StartContainer"),
        "{calls:?}"
    );
    assert!(at("RemovePodSandbox").is_some(), "{calls:?}");
    let state = node.fake.state();
    assert!(state.container_configs[0].tty && state.container_configs[0].stdin);
}

#[tokio::test(flavor = "multi_thread")]
async fn run_it_that_is_left_leaves_the_pod() {
    let node = node(with_image()).await;
    let logs = node.path("logs");
    let words = ["run", "-it", "--rm", "--name", "x", "--log-dir", &logs, "r/app:1"];
    let mut terminal = Terminal::start(&node, &words);
    terminal.shows("[80x24]").await;
    terminal.types(b"\x10\x11");
    terminal.shows("holdfast attach -i x").await;
    assert_eq!(terminal.ends().await, 0);
    assert!(!node.calls().iter().any(|call| call.starts_with("StopPod")), "{:?}", node.calls());
    // A signal, on the other hand, stops it.
    let words = ["run", "-it", "--rm", "--name", "y", "--log-dir", &logs, "r/app:1"];
    let terminal = Terminal::start(&node, &words);
    terminal.shows("[80x24]").await;
    terminal.kill(Signal::SIGTERM);
    assert_eq!(terminal.ends().await, 143);
    assert!(node.calls().iter().any(|call| call.starts_with("RemovePod")), "{:?}", node.calls());
}

#[tokio::test(flavor = "multi_thread")]
async fn port_forward_serves_many_and_outlives_failures() {
    let node = node(two_pods()).await;
    let inside = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let open = inside.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = inside.accept().await.unwrap();
            tokio::spawn(async move {
                // Answers at the end of what is sent: needs the half-close.
                let mut all = Vec::new();
                stream.read_to_end(&mut all).await.unwrap();
                all.reverse();
                stream.write_all(&all).await.unwrap();
            });
        }
    });
    // A port that nobody listens on.
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let words = ["port-forward", "web", &format!("0:{open}"), &format!("0:{closed}")];
    let mut command = node.command(&words);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut errors = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut local = Vec::new();
    for port in [open, closed] {
        let line =
            tokio::time::timeout(DEADLINE, lines.next_line()).await.unwrap().unwrap().unwrap();
        let (address, remote) = line.split_once(" -> ").unwrap();
        assert_eq!(remote, port.to_string());
        local.push(address.parse::<SocketAddr>().unwrap());
    }
    let talk = async |text: &str| {
        let mut stream = TcpStream::connect(local[0]).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    // One that says nothing holds nobody up.
    let _idle = TcpStream::connect(local[0]).await.unwrap();
    assert_eq!(talk("abc").await, "cba");
    let mut failing = TcpStream::connect(local[1]).await.unwrap();
    let mut nothing = Vec::new();
    let _ = failing.read_to_end(&mut nothing).await;
    assert_eq!(nothing, b"");
    let error = tokio::time::timeout(DEADLINE, errors.next_line()).await.unwrap().unwrap().unwrap();
    assert!(error.contains(&format!("to port {closed}: connect")), "{error}");
    let all = futures::future::join_all((0..20).map(|n| {
        let text = format!("{n}x");
        let talk = &talk;
        async move { (talk(&text).await, text.chars().rev().collect::<String>()) }
    }));
    for (answer, expected) in all.await {
        assert_eq!(answer, expected);
    }
    kill(Pid::from_raw(child.id().unwrap() as i32), Signal::SIGINT).unwrap();
    let status = tokio::time::timeout(DEADLINE, child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(0));
    // Of several ports, one that is taken means that none is forwarded.
    let taken = format!("{open}:80");
    node.run(&["port-forward", "web", &taken]).await.fails(1, "choose another port");
    node.run(&["port-forward", "db", "80"]).await.fails(1, "is stopped");
}

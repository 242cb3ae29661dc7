//! What the streaming server's sessions are connected to: commands and containers through the shim,
//! ports through the pod's network namespace.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    thread,
    time::Duration,
};

use holdfast_shim::{
    bundle::Namespace,
    control::{Attach, Control, Output as Attached},
};
use holdfast_streaming::{
    AttachRequest, Backend, Duplex, ExecRequest, ExitCode, Input, Output, Streams,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpStream, unix::pipe},
    sync::oneshot,
};
use tokio_util::sync::CancellationToken;

use crate::{
    error::chain,
    pod::{
        Pods,
        exec::{Exec, Terms},
        foreign::tasks,
    },
};

/// How long a port of a pod may take to accept.
const CONNECT: Duration = Duration::from_secs(10);

/// Bytes that are carried at a time.
const PIECE: usize = 32 << 10;

/// Sessions of the streaming server, over these pods.
pub struct Sessions(pub Pods);

impl Backend for Sessions {
    async fn exec(&self, request: ExecRequest, streams: Streams) -> Result<ExitCode, String> {
        let text = |e: crate::pod::Error| chain(&e);
        let services = self.0.services().clone();
        let (pod, container) = self.0.find_running(&request.container).map_err(text)?;
        let terms = Terms { command: request.command, tty: request.tty, stdin: request.stdin };
        let registered = Exec::register(&services, &pod, &container, terms).await;
        let (exec, pipes) = registered.map_err(text)?;
        if let Err(error) = exec.start().await {
            exec.reap().await;
            return Err(text(error));
        }
        let ended = CancellationToken::new();
        let drain = services.config.runtime.exec_drain;
        let Streams { stdin, stdout, stderr, mut resizes, closed } = streams;
        // Not awaited with the rest: a client may well keep its input open for ever.
        let input = async {
            if let (Some(from), Some(to)) = (stdin, pipes.stdin)
                && feed(from, to).await.is_ok()
            {
                exec.close_stdin().await;
            }
            std::future::pending::<()>().await
        };
        let sizes = async {
            while let Some(resizes) = &mut resizes
                && let Some(size) = resizes.next().await
            {
                exec.resize(size.width, size.height).await;
            }
            std::future::pending::<()>().await
        };
        let output = async {
            let stdout = carry(pipes.stdout, stdout, &ended, drain);
            match pipes.stderr {
                Some(pipe) => drop(tokio::join!(stdout, carry(pipe, stderr, &ended, drain))),
                None => stdout.await,
            }
        };
        let code = async {
            let code = exec.wait().await;
            ended.cancel();
            code
        };
        let session = async { tokio::join!(code, output).0 };
        let result = tokio::select! {
            // A client that goes as the command ends still gets its code.
            biased;
            code = session => code.map_err(text),
            () = closed.cancelled() => {
                // As when a terminal is closed: who wants to live on ignores it.
                exec.signal(libc::SIGHUP).await;
                Err("the client has gone".into())
            }
            () = input => Err(String::new()),
            () = sizes => Err(String::new()),
        };
        match &result {
            Ok(_) => exec.reap().await,
            // It may live on: reaped when it ends.
            Err(_) => drop(tokio::spawn(async move {
                let _ = exec.wait().await;
                exec.reap().await;
            })),
        }
        result
    }

    async fn attach(&self, request: AttachRequest, streams: Streams) -> Result<(), String> {
        let (pod, container) = self.0.find_attachable(&request.container).map_err(|e| chain(&e))?;
        let bundle = self.0.services().shims.pod_bundle(pod.id());
        let attach = Attach {
            stdin: request.stdin && container.record.config.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let once = container.record.config.stdin_once;
        let attached = Control::new(&bundle).attach(container.record.id.as_str(), attach).await;
        let (mut input, mut output) = attached.map_err(|e| chain(&e))?.split();
        // A foreign shim has the terminal, and an end of the input, of its own.
        let id = &container.record.id;
        let foreign = match pod.view().record.foreign.is_some() {
            true => tasks(self.0.services(), &pod, id).await.ok(),
            false => None,
        };
        let Streams { stdin, mut stdout, mut stderr, mut resizes, closed } = streams;
        let inward = async {
            let mut stdin = stdin.filter(|_| attach.stdin);
            let mut piece = vec![0; PIECE];
            loop {
                let size = async {
                    match &mut resizes {
                        Some(resizes) => resizes.next().await,
                        None => None,
                    }
                };
                tokio::select! {
                    // Sizes are few and must not wait behind a stream of input.
                    biased;
                    Some(size) = size => match &foreign {
                        Some(shim) => {
                            let (width, height) = (size.width.into(), size.height.into());
                            // The container may have ended; the output says so.
                            let _ = shim.resize(id.as_str(), "", width, height).await;
                        }
                        None => input.resize(size.width, size.height).await?,
                    },
                    read = async {
                        match &mut stdin {
                            Some(stdin) => stdin.read(&mut piece).await,
                            None => std::future::pending().await,
                        }
                    } => match read? {
                        0 => {
                            stdin = None;
                            // Others may attach later, unless the container asked for one only.
                            if once {
                                input.close_stdin().await?;
                                if let Some(shim) = &foreign {
                                    let _ = shim.close_stdin(id.as_str(), "").await;
                                }
                            }
                        }
                        n => input.stdin(&piece[..n]).await?,
                    },
                    else => std::future::pending::<()>().await,
                }
            }
            #[expect(unreachable_code, reason = "gives the block its type")]
            io::Result::Ok(())
        };
        let outward = async {
            while let Some(piece) = output.next().await? {
                let (to, bytes) = match &piece {
                    Attached::Stdout(bytes) => (&mut stdout, bytes),
                    Attached::Stderr(bytes) => (&mut stderr, bytes),
                };
                if let Some(to) = to {
                    to.write_all(bytes).await?;
                    to.flush().await?;
                }
            }
            io::Result::Ok(())
        };
        tokio::select! {
            // The end of the output is the end of the session, whatever the input does.
            biased;
            ended = outward => ended.map_err(|e| format!("attached output: {e}")),
            broken = inward => broken.map_err(|e| format!("attached input: {e}")),
            () = closed.cancelled() => Ok(()),
        }
    }

    async fn port_forward(
        &self,
        pod: &str,
        port: u16,
        mut stream: Box<dyn Duplex>,
    ) -> Result<(), String> {
        let pod = self.0.find(pod).map_err(|e| chain(&e))?;
        let view = pod.view();
        let netns = match view.record.config.namespaces.host_network {
            true => None,
            false => {
                let bundle = self.0.services().shims.pod_bundle(pod.id());
                Some(bundle.namespace(Namespace::Net))
            }
        };
        let refused = |e: io::Error| format!("connect to port {port} of the pod: {e}");
        let mut inside = connect(netns, port).await.map_err(refused)?;
        // Each direction ends by itself; the other goes on.
        match copy_bidirectional(&mut stream, &mut inside).await {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("port {port} of the pod: {error}")),
        }
    }
}

/// Carries input until its end. An error means that it did not end but broke off.
async fn feed(mut from: Input, mut to: pipe::Sender) -> io::Result<()> {
    tokio::io::copy(&mut from, &mut to).await.map(drop)
}

/// Carries output until its end; once the command has ended, until nothing has come for `drain`: a
/// child of it may hold the pipe for ever. A slow client is waited for.
async fn carry(
    mut from: pipe::Receiver,
    to: Option<Output>,
    ended: &CancellationToken,
    drain: Duration,
) {
    let mut to = to;
    let mut piece = vec![0; PIECE];
    loop {
        let idle = async {
            ended.cancelled().await;
            tokio::time::sleep(drain).await;
        };
        let read = tokio::select! {
            // What is there is read before the time is looked at.
            biased;
            read = from.read(&mut piece) => read,
            () = idle => break,
        };
        let Ok(n @ 1..) = read else { break };
        if let Some(out) = &mut to
            && (out.write_all(&piece[..n]).await.is_err() || out.flush().await.is_err())
        {
            // The client is gone; the command is not to hang for that.
            to = None;
        }
    }
}

/// Connects to a port on the loopback of a pod, or of the node.
async fn connect(netns: Option<PathBuf>, port: u16) -> io::Result<TcpStream> {
    let (connected, wait) = oneshot::channel();
    // A thread of its own that ends: no other work may ever run in the pod's namespace. The socket
    // stays in the namespace it was made in.
    thread::Builder::new().name("port-forward".into()).spawn(move || {
        let connect = || -> io::Result<std::net::TcpStream> {
            if let Some(path) = netns {
                let ns = File::open(path)?;
                nix::sched::setns(&ns, nix::sched::CloneFlags::CLONE_NEWNET)?;
            }
            let to = |ip: IpAddr| {
                std::net::TcpStream::connect_timeout(&SocketAddr::new(ip, port), CONNECT)
            };
            to(Ipv4Addr::LOCALHOST.into()).or_else(|error| {
                // What listens on IPv6 alone is tried too; the first answer is the one to tell.
                to(Ipv6Addr::LOCALHOST.into()).map_err(|_| error)
            })
        };
        // Nobody waits any more: the connection closes with it.
        let _ = connected.send(connect());
    })?;
    let stream = wait.await.map_err(|_| io::Error::other("the connecting thread broke off"))??;
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    TcpStream::from_std(stream)
}

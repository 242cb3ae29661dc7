//! The connection to the daemon, and errors that say what to do next.

use std::{
    error::Error as StdError,
    fmt,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, anyhow};
use holdfast_protos::{
    admin::admin_client::AdminClient,
    cri::{
        self, image_service_client::ImageServiceClient,
        runtime_service_client::RuntimeServiceClient,
    },
    images::images_client::ImagesClient,
};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::{
    Code, Response, Status,
    transport::{Channel, Endpoint},
};
use tower::service_fn;

use super::args::Global;

/// Reads come from the daemon's memory: one that takes longer has a daemon that hangs.
const QUICK: Duration = Duration::from_secs(30);

/// Calls that wait for programs outside (CNI plugins, OCI runtimes). More than the daemon's own
/// deadlines for them add up to, so that its error, which says what hung, comes first.
const SLOW: Duration = Duration::from_secs(300);

/// Lists and ExecSync's output (16 MiB each of stdout and stderr) go beyond tonic's 4 MiB.
const MAX_MESSAGE: usize = 64 << 20;

/// The daemon's services on one connection.
pub(crate) struct Client {
    pub(crate) runtime: RuntimeServiceClient<Channel>,
    pub(crate) images: ImageServiceClient<Channel>,
    pub(crate) admin: AdminClient<Channel>,
    pub(crate) admin_images: ImagesClient<Channel>,
    timeout: Option<Duration>,
    socket: PathBuf,
}

impl Client {
    /// Connects.
    pub(super) async fn connect(global: &Global) -> Result<Self> {
        let socket = socket_path(&global.address)?;
        // Once by hand: tonic hides why a connection could not be made.
        let quick = global.timeout.unwrap_or(QUICK);
        match tokio::time::timeout(quick, UnixStream::connect(&socket)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(connect_error(&socket, error)),
            Err(_) => return Err(no_answer(&socket, quick)),
        }
        let path = socket.clone();
        let connector = service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The URI is only for the :authority header.
        let channel =
            Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector);
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_MESSAGE),
            images: ImageServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
            admin_images: ImagesClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
            admin: AdminClient::new(channel).max_decoding_message_size(MAX_MESSAGE),
            timeout: global.timeout,
            socket,
        })
    }

    /// Waits for an answer that the daemon has at hand.
    pub(super) async fn quick<T>(&self, call: impl Call<T>) -> Result<T> {
        self.within(Some(self.timeout.unwrap_or(QUICK)), call).await
    }

    /// Waits for an answer that takes outside programs.
    pub(super) async fn slow<T>(&self, call: impl Call<T>) -> Result<T> {
        self.within(Some(self.timeout.unwrap_or(SLOW)), call).await
    }

    /// The same, and `more` that the call itself was told to wait.
    pub(super) async fn slow_and<T>(&self, more: Duration, call: impl Call<T>) -> Result<T> {
        self.within(Some(self.timeout.unwrap_or(SLOW).saturating_add(more)), call).await
    }

    /// Waits as long as it takes, if --timeout does not say otherwise. The daemon watches such calls
    /// for progress itself.
    pub(super) async fn long<T>(&self, call: impl Call<T>) -> Result<T> {
        self.within(self.timeout, call).await
    }

    /// What `--timeout` said.
    pub(super) fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    async fn within<T>(&self, limit: Option<Duration>, call: impl Call<T>) -> Result<T> {
        let result = match limit {
            Some(limit) => match tokio::time::timeout(limit, call).await {
                Ok(result) => result,
                Err(_) => return Err(no_answer(&self.socket, limit)),
            },
            None => call.await,
        };
        result.map(Response::into_inner).map_err(|status| status_error(status, &self.socket))
    }

    /// An error of a stream's item.
    pub(super) fn stream_error(&self, status: Status) -> anyhow::Error {
        status_error(status, &self.socket)
    }

    pub(super) async fn pods(&mut self) -> Result<Vec<cri::PodSandbox>> {
        let mut runtime = self.runtime.clone();
        let list = runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default());
        Ok(self.quick(list).await?.items)
    }

    pub(super) async fn containers(&mut self) -> Result<Vec<cri::Container>> {
        let mut runtime = self.runtime.clone();
        let list = runtime.list_containers(cri::ListContainersRequest::default());
        Ok(self.quick(list).await?.containers)
    }
}

/// A gRPC call under way.
pub(super) trait Call<T>: Future<Output = Result<Response<T>, Status>> {}
impl<T, F: Future<Output = Result<Response<T>, Status>>> Call<T> for F {}

/// The path of a unix socket, as crictl and containerd's tools write it too.
fn socket_path(address: &str) -> Result<PathBuf> {
    let path = match address.split_once("://") {
        Some(("unix", path)) => path,
        Some((scheme, _)) => {
            return Err(Hint::on(
                anyhow!("{address}: {scheme} is not supported"),
                "holdfastd listens on a unix socket: give its path",
            ));
        }
        None => address.strip_prefix("unix:").unwrap_or(address),
    };
    if path.is_empty() {
        return Err(Hint::on(
            anyhow!("the address is empty"),
            "give the path of holdfastd's socket",
        ));
    }
    Ok(path.into())
}

fn connect_error(socket: &Path, error: io::Error) -> anyhow::Error {
    let hint = match error.kind() {
        io::ErrorKind::NotFound => {
            "is holdfastd running? See `systemctl status holdfast`; if its socket is elsewhere, use \
             --address or HOLDFAST_ADDRESS"
        }
        io::ErrorKind::ConnectionRefused => {
            "holdfastd is not running: see `systemctl status holdfast` and `journalctl -u holdfast`"
        }
        io::ErrorKind::PermissionDenied => {
            "use sudo, or join the group of the socket (grpc.gid in the configuration)"
        }
        _ => "is that the path of holdfastd's socket? Use --address or HOLDFAST_ADDRESS",
    };
    Hint::on(anyhow::Error::new(error).context(format!("connect to {}", socket.display())), hint)
}

fn no_answer(socket: &Path, limit: Duration) -> anyhow::Error {
    Hint::on(
        anyhow!("no answer from {} in {limit:?}", socket.display()),
        "the daemon may be busy or stuck: see `journalctl -u holdfast`; to wait longer, use --timeout",
    )
}

fn status_error(status: Status, socket: &Path) -> anyhow::Error {
    // A connection that broke has a transport error behind it; what the daemon answered has not.
    let transport = status.source().is_some();
    let hint = match status.code() {
        Code::Unimplemented => "this holdfastd does not have that; see `holdfast version`",
        Code::PermissionDenied | Code::Unauthenticated => {
            "for a registry, give -u USER and the password in HOLDFAST_PASSWORD or by --password-stdin"
        }
        Code::ResourceExhausted => "free some space or raise the limit; see `holdfast info`",
        _ if transport => "the daemon went away: see `journalctl -u holdfast`; pods go on running",
        _ => "",
    };
    let mut error = anyhow::Error::new(Answer::from(status));
    if transport {
        error = error.context(format!("talk to {}", socket.display()));
    }
    if hint.is_empty() { error } else { Hint::on(error, hint) }
}

/// What the daemon said. `Status` itself prints its code's name and its metadata too.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) code: Code,
    message: String,
}

impl From<Status> for Answer {
    fn from(status: Status) -> Self {
        let mut message = match status.message() {
            "" => status.code().description().to_owned(),
            text => text.to_owned(),
        };
        let mut next = status.source();
        while let Some(cause) = next {
            let text = cause.to_string();
            if !message.ends_with(&text) {
                message = format!("{message}: {text}");
            }
            next = cause.source();
        }
        Self { code: status.code(), message }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Answer {}

/// The daemon's code of an error, if it is an answer of the daemon.
pub(super) fn code(error: &anyhow::Error) -> Option<Code> {
    answer(error).map(|answer| answer.code)
}

fn answer(error: &anyhow::Error) -> Option<&Answer> {
    error.chain().find_map(|cause| {
        let answer = cause.downcast_ref::<Answer>();
        answer.or_else(|| cause.downcast_ref::<Hint>()?.error.downcast_ref())
    })
}

/// Says of what an error is (`verb` and `what`), if the daemon's answer does not say it by itself.
pub(super) fn during(error: anyhow::Error, verb: &str, what: &str) -> anyhow::Error {
    let says_it = answer(&error).is_some_and(|answer| {
        answer.message.strip_prefix(verb).is_some_and(|rest| rest.starts_with(' '))
    });
    if says_it { error } else { error.context(format!("{verb} {what}")) }
}

/// An error, and what to do about it.
#[derive(Debug)]
pub(crate) struct Hint {
    error: anyhow::Error,
    hint: String,
}

impl Hint {
    /// Adds a hint to an error.
    pub(crate) fn on(error: anyhow::Error, hint: impl Into<String>) -> anyhow::Error {
        anyhow::Error::new(Self { error, hint: hint.into() })
    }
}

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

// Its own Display has the whole chain of `error`, so there is no source to print again.
impl StdError for Hint {}

/// Prints an error: its chain on one line, then what to do.
pub(super) fn report(error: &anyhow::Error) {
    // A terminal that has hung up is no reason to panic.
    let mut stderr = io::stderr().lock();
    let _ = writeln!(stderr, "holdfast: {}", format!("{error:#}").replace('\n', " "));
    for hint in error.chain().filter_map(|cause| cause.downcast_ref::<Hint>()) {
        let _ = writeln!(stderr, "  {}", hint.hint);
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn addresses_are_paths_with_or_without_a_scheme() {
        for address in ["/run/x.sock", "unix:/run/x.sock", "unix:///run/x.sock"] {
            assert_eq!(socket_path(address).unwrap(), Path::new("/run/x.sock"));
        }
        let error = socket_path("tcp://1.2.3.4:5").unwrap_err();
        assert!(error.to_string().contains("tcp is not supported"), "{error}");
        assert!(socket_path("unix://").is_err());
    }

    #[test]
    fn the_code_of_an_answer_survives_hints_and_context() {
        for code_in in [Code::NotFound, Code::Unimplemented] {
            let error = status_error(Status::new(code_in, "no"), Path::new("/s"));
            assert_eq!(format!("{error:#}"), "no");
            let error = Err::<(), _>(error).context("pull x").unwrap_err();
            assert_eq!(code(&error), Some(code_in));
            assert_eq!(format!("{error:#}"), "pull x: no");
        }
        assert_eq!(code(&anyhow!("x")), None);
    }

    #[test]
    fn what_an_error_is_of_is_said_once() {
        // The second has a hint.
        for code in [Code::NotFound, Code::ResourceExhausted] {
            for (answer, said) in [
                ("pull reg/x:1: no such tag", "pull reg/x:1: no such tag"),
                ("\"X\" is no reference", "pull x: \"X\" is no reference"),
                ("pulls are off", "pull x: pulls are off"),
            ] {
                let error = status_error(Status::new(code, answer), Path::new("/s"));
                assert_eq!(format!("{:#}", during(error, "pull", "x")), said);
            }
        }
        assert_eq!(format!("{:#}", during(anyhow!("cut"), "pull", "x")), "pull x: cut");
    }
}

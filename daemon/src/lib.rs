//! Everything behind the CRI socket. [`run`] is the daemon; the binary only calls it.

pub mod apparmor;
pub mod boot;
pub mod cadvisor;
pub mod cdi;
pub mod checkpoint;
pub mod classes;
pub mod config;
pub mod cri;
pub mod error;
pub mod events;
pub mod features;
pub mod id;
pub mod image;
pub mod label;
mod metrics;
pub mod network;
pub mod node;
pub mod notify;
pub mod nri;
pub mod pod;
mod serve;
pub mod shims;
pub mod spec;
pub mod stats;
pub mod store;
pub mod streaming;
pub mod trace;

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use holdfast_protos::{
    admin::admin_server::AdminServer,
    cri::{image_service_server::ImageServiceServer, runtime_service_server::RuntimeServiceServer},
    images::images_server::ImagesServer,
};
use holdfast_shim::events::{Event, serve as serve_events};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tracing::{info, warn};

use crate::{
    config::Config,
    error::chain,
    image::Images,
    network::Network,
    pod::{Pods, Services},
    shims::{Shims, passable_dir},
    store::Store,
};

/// Largest gRPC message, in and out: what the kubelet allows itself.
const MESSAGE_LIMIT: usize = 16 << 20;

/// How long open requests may still take at shutdown.
const GOODBYE: Duration = Duration::from_secs(5);

/// How long somebody who has the socket of NRI plugins may take to say so.
const PROBE: Duration = Duration::from_secs(1);

/// Why the daemon did not start, or stopped by itself.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each message is its documentation")]
pub enum Error {
    #[error("{what} {path}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "another holdfastd runs with {what} directory {path}: end it first, or use another directory"
    )]
    Running { what: &'static str, path: PathBuf },
    #[error("{0} exists and is not a socket: move it away, or set grpc.socket")]
    NotASocket(PathBuf),
    #[error("database")]
    Store(#[from] store::Error),
    #[error("images")]
    Images(#[from] image::Error),
    #[error("network")]
    Network(#[from] network::Error),
    #[error("node")]
    Node(#[from] node::Error),
    #[error("pods")]
    Pods(#[from] pod::Error),
    #[error("listen at {0} for metrics: free it, or change metrics.address")]
    Metrics(std::net::SocketAddr, #[source] io::Error),
    #[error("streaming server")]
    Streaming(#[from] holdfast_streaming::Error),
}

fn at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

/// Runs the daemon until `shutdown` is ready. Pods and containers outlive it.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
    // What must not be seen in them is closed itself.
    passable_dir(&config.root).map_err(at("make", &config.root))?;
    passable_dir(&config.state).map_err(at("make", &config.state))?;
    let _locks = lock(&config).await?;
    boot::settle(&config.state).map_err(at("clear of an earlier boot", &config.state))?;

    let (bundles, image_copies) = (config.state.join("bundles"), config.root.join("images"));
    let database = config.root.join("holdfast.db");
    let store = Store::open_with_copies(&database, &bundles, &image_copies)?;
    let images = Images::open(&config.root, config.images.clone(), store.clone()).await?;
    let network = Network::open(config.network.clone(), config.root.join("cni"))?;
    let shims = Arc::new(Shims::new(&config).map_err(at("make", &config.state))?);
    let node = node::Node::discover()?;
    let services = Arc::new(Services {
        apparmor: apparmor::load_default(&node).await,
        cdi: cdi::Devices::new(config.runtime.cdi_spec_dirs.clone()),
        blockio: classes::BlockIo::new(config.runtime.blockio_config.clone()),
        events: events::Events::default(),
        features: features::Features::discover(&config.runtime).await,
        node,
        store,
        images,
        network,
        shims: shims.clone(),
        nri: nri::Nri::new(config.nri.clone()),
        config: config.clone(),
    });
    let pods = Pods::new(services);
    // Listed before anybody can ask, and before a shim can tell of an exit.
    pods.recover().await?;

    let told = pods.clone();
    let events = serve_events(bind(&shims.events, 0o600)?, move |_namespace, event| {
        let pods = told.clone();
        async move {
            match event {
                // An exec's exit is its waiter's business.
                Event::Exit { container_id, id, status, at, .. } if container_id == id => {
                    pods.exited(&container_id, at, status).await
                }
                Event::Oom { container_id } => {
                    pods.oom(&container_id);
                    true
                }
                _ => true,
            }
        }
    });
    let events = tokio::spawn(events);

    // Before anybody can ask for a container: none is made past a plugin that is to be started.
    pods.start_plugins(bind_plugins(&config.nri).await).await;

    let socket = &config.grpc.socket;
    if let Some(dir) = socket.parent() {
        fs::create_dir_all(dir).map_err(at("make", dir))?;
    }
    // First what may fail for want of an address.
    let scraped = match config.metrics_address {
        Some(address) => {
            let bound = metrics::bind(address).await;
            Some(bound.map_err(|source| Error::Metrics(address, source))?)
        }
        None => None,
    };
    let listener = bind(socket, 0o660)?;
    std::os::unix::fs::chown(socket, None, Some(config.grpc.gid)).map_err(at("give", socket))?;
    let streaming = &config.streaming;
    let streaming = holdfast_streaming::Server::bind(holdfast_streaming::Config {
        address: streaming.address,
        tls: streaming.tls.as_ref().map(|(certificates, key)| holdfast_streaming::Tls {
            certificates: certificates.clone(),
            key: key.clone(),
        }),
        limits: Default::default(),
    });
    let streaming = Arc::new(streaming.await?);
    let (end_streams, streams_end) = tokio::sync::oneshot::channel::<()>();
    let sessions = Arc::new(streaming::Sessions(pods.clone()));
    let streams = tokio::spawn(streaming.clone().serve(sessions, async {
        let _ = streams_end.await;
    }));
    let service = cri::Service::new(pods.clone(), streaming);
    let routes = Routes::new(
        RuntimeServiceServer::new(service.clone())
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT),
    )
    .add_service(
        ImageServiceServer::new(service.clone())
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT),
    )
    .add_service(AdminServer::new(service.clone()).max_decoding_message_size(MESSAGE_LIMIT))
    .add_service(ImagesServer::new(service).max_decoding_message_size(MESSAGE_LIMIT));
    let stop = CancellationToken::new();
    if let Some(listener) = scraped {
        info!(address = %listener.local_addr().map_err(at("read the address of", socket))?, "metrics");
        tokio::spawn(metrics::serve(listener, metrics::registry(pods.clone()), stop.clone()));
    }
    let marks = Arc::new(cadvisor::Marks::default());
    tokio::spawn(marks.clone().keep(pods.clone(), stop.clone()));
    let routes = cadvisor::Service::new(pods.clone(), marks).serve_with(routes);
    let mut server = tokio::spawn(serve::serve(listener, routes, stop.clone()));
    info!(socket = %socket.display(), version = env!("CARGO_PKG_VERSION"), "serving");
    notify::ready();

    let sweeper = {
        let pods = pods.clone();
        tokio::spawn(async move {
            if let Err(error) = pods.services().store.copy_missing().await {
                warn!(error = %chain(&error), "not all records have a copy");
            }
            pods.sweep().await;
        })
    };
    let verifier = {
        let pods = pods.clone();
        tokio::spawn(async move { pods.verify_images().await })
    };

    shutdown.await;
    info!("ending; pods go on");
    notify::stopping();
    sweeper.abort();
    verifier.abort();
    stop.cancel();
    let _ = end_streams.send(());
    // Requests first: what they wait for is still being done.
    if tokio::time::timeout(GOODBYE, &mut server).await.is_err() {
        server.abort();
    }
    if tokio::time::timeout(GOODBYE, streams).await.is_err() {
        warn!("a streaming session did not end in time");
    }
    pods.close().await;
    pods.services().nri.stop().await;
    pods.services().network.drain().await;
    pods.services().images.shutdown().await;
    if let Err(error) = pods.services().store.end_clean().await {
        warn!(error = %chain(&error), "the next boot verifies images: that this end was clean is not on record");
    }
    events.abort();
    // Nobody can connect any more; a client learns so at once.
    if let Err(error) = fs::remove_file(socket) {
        warn!(error = %chain(&error), "the socket file stays");
    }
    Ok(())
}

/// How long a daemon waits for the locks of one that was killed: a child that it had forked has them until
/// it executes its program, which takes its time on a busy node.
const UNLOCKED: Duration = Duration::from_secs(3);

/// One daemon per state directory, by a file that earlier releases lock too, and one per root directory, by
/// the directory itself, for a full disk has room for no file. Held until the process ends, however it ends.
async fn lock(config: &Config) -> Result<[nix::fcntl::Flock<fs::File>; 2], Error> {
    let end = tokio::time::Instant::now() + UNLOCKED;
    let take = async |mut file, what, dir: &Path| loop {
        match nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock) {
            Ok(locked) => return Ok(locked),
            Err((again, _)) if tokio::time::Instant::now() < end => file = again,
            Err(_) => return Err(Error::Running { what, path: dir.to_owned() }),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let path = config.state.join("lock");
    let file = fs::File::create(&path).map_err(at("make", &path))?;
    let root = fs::File::open(&config.root).map_err(at("open", &config.root))?;
    Ok([take(file, "state", &config.state).await?, take(root, "root", &config.root).await?])
}

/// The socket of NRI plugins. Without it they cannot connect, but pods run all the same: where that must
/// not be, `nri.validator.required_plugins` says so.
async fn bind_plugins(nri: &config::Nri) -> Option<UnixListener> {
    if !nri.enabled || nri.disable_connections {
        return None;
    }
    let socket = &nri.socket;
    // Another runtime's plugins connect there by default, too.
    let found = tokio::time::timeout(PROBE, tokio::net::UnixStream::connect(socket)).await;
    let free = match &found {
        Ok(Err(error)) => {
            matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
        }
        Ok(Ok(_)) | Err(_) => false,
    };
    if !free {
        warn!(
            socket = %socket.display(),
            "another runtime has the socket of NRI plugins: set nri.socket, or nri.enabled = false"
        );
        return None;
    }
    let made =
        socket.parent().map_or(Ok(()), |dir| fs::create_dir_all(dir).map_err(at("make", dir)));
    match made.and_then(|()| bind(socket, 0o600)) {
        Ok(listener) => Some(listener),
        Err(error) => {
            warn!(error = chain(&error), "no NRI plugin can connect: see nri.socket");
            None
        }
    }
}

/// A listening socket in place of one that an earlier daemon left; the lock says there is no other.
fn bind(path: &Path, mode: u32) -> Result<UnixListener, Error> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(Error::NotASocket(path.to_owned()));
        }
        Ok(_) => fs::remove_file(path).map_err(at("remove", path))?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(at("listen at", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(at("set the mode of", path))?;
    Ok(listener)
}

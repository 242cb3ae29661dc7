//! `pull`, `rmi`, `image import`.

use std::{
    env,
    fs::File,
    io::{self, IsTerminal as _, Read, Write as _},
    path::Path,
};

use anyhow::{Context as _, Result, anyhow, bail};
use holdfast_protos::{admin, cri, images};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::{
    Client, Hint,
    args::{Import, Pull, Registry, Rmi},
    client, find,
    progress::{Layer, Progress},
    remove, wire,
};

/// The daemon takes pieces of an archive of at most this size.
const PIECE: usize = 1 << 20;

/// Pieces that are read ahead of the daemon; when it is slower, reading waits.
const PIECES_AHEAD: usize = 2;

const PASSWORD: &str = "HOLDFAST_PASSWORD";

/// Who to be at a registry.
#[derive(Clone, Default)]
pub(super) struct Credentials {
    user: String,
    password: String,
}

impl Credentials {
    /// User and password.
    pub(super) fn into_parts(self) -> (String, String) {
        (self.user, self.password)
    }
}

/// `holdfast pull`
pub(super) async fn pull(client: &mut Client, args: Pull) -> Result<u8> {
    let credentials = credentials(&args.registry)?;
    let progress = if args.quiet { Progress::none() } else { Progress::on_stderr() };
    let id = pull_image(client, &args.image, credentials, &args.platform, progress).await?;
    wire::write(&format!("{id}\n"))?;
    Ok(0)
}

/// Pulls an image; its id.
pub(super) async fn pull_image(
    client: &mut Client,
    reference: &str,
    credentials: Credentials,
    platform: &str,
    mut progress: Progress,
) -> Result<String> {
    let request = admin::PullImageRequest {
        reference: reference.to_owned(),
        username: credentials.user.clone(),
        password: credentials.password.clone(),
        platform: platform.to_owned(),
    };
    let mut service = client.admin.clone();
    let pull = async {
        let mut stream = service.pull_image(request).await?.into_inner();
        while let Some(update) = stream.message().await? {
            progress.update(&update.layers.iter().map(Layer::pulled).collect::<Vec<_>>());
            if !update.image_ref.is_empty() {
                return Ok(tonic::Response::new(Some(update.image_ref)));
            }
        }
        Ok(tonic::Response::new(None))
    };
    // --timeout is for the whole pull. Without it the daemon's stall_timeout ends a pull that hangs.
    let result = client.long(pull).await;
    match result {
        Ok(Some(id)) => {
            progress.finish(true);
            Ok(id)
        }
        Ok(None) => {
            progress.finish(false);
            bail!("pull {reference}: the daemon ended the pull without a result")
        }
        Err(error) if client::code(&error) == Some(Code::Unimplemented) => {
            progress.finish(false);
            if !platform.is_empty() {
                return Err(error.context("--platform needs holdfastd's own service"));
            }
            pull_by_cri(client, reference, credentials).await
        }
        Err(error) => {
            progress.finish(false);
            Err(client::during(error, "pull", reference))
        }
    }
}

/// From a runtime that has only the CRI: the same, without progress.
async fn pull_by_cri(
    client: &mut Client,
    reference: &str,
    credentials: Credentials,
) -> Result<String> {
    let auth = (!credentials.user.is_empty()).then(|| cri::AuthConfig {
        username: credentials.user,
        password: credentials.password,
        ..Default::default()
    });
    let image = cri::ImageSpec { image: reference.to_owned(), ..Default::default() };
    let request = cri::PullImageRequest { image: Some(image), auth, sandbox_config: None };
    let mut images = client.images.clone();
    let pulled = client.long(images.pull_image(request)).await;
    Ok(pulled.map_err(|error| client::during(error, "pull", reference))?.image_ref)
}

/// From the command line, the environment or stdin.
pub(super) fn credentials(registry: &Registry) -> Result<Credentials> {
    let Some(text) = &registry.credentials else { return Ok(Credentials::default()) };
    let (user, inline) = match text.split_once(':') {
        Some((user, password)) => (user, Some(password.to_owned())),
        None => (text.as_str(), None),
    };
    if user.is_empty() {
        bail!("--user {text:?} has no user before the colon");
    }
    let password = match (registry.password_stdin, inline) {
        (true, Some(_)) => bail!("the password is in --user already; leave out --password-stdin"),
        (true, None) => {
            let mut password = String::new();
            io::stdin().read_to_string(&mut password).context("read the password from stdin")?;
            // What `echo` and a text file add.
            password.trim_end_matches(['\n', '\r']).to_owned()
        }
        (false, Some(password)) => password,
        (false, None) => env::var(PASSWORD).map_err(|_| {
            Hint::on(
                anyhow!("there is no password for {user}"),
                format!("set {PASSWORD}, or use --password-stdin"),
            )
        })?,
    };
    if password.is_empty() {
        bail!("the password of {user} is empty");
    }
    Ok(Credentials { user: user.to_owned(), password })
}

/// `holdfast rmi`
pub(super) async fn remove(client: &mut Client, args: Rmi) -> Result<u8> {
    let mut failed = false;
    for name in &args.images {
        let removed = remove_one(client, name).await;
        failed |= !remove::done(name, removed)?;
    }
    Ok(u8::from(failed))
}

async fn remove_one(client: &mut Client, name: &str) -> Result<()> {
    let mut service = client.admin_images.clone();
    let request = images::RemoveRequest { image: name.to_owned() };
    match client.slow(service.remove(request)).await {
        Err(error) if client::code(&error) == Some(Code::Unimplemented) => {}
        Err(error) if client::code(&error) == Some(Code::NotFound) => {
            // With what is spelt alike.
            find::image(client, name).await?;
            return Err(error);
        }
        result => return result.map(drop),
    }
    // A runtime that has only the CRI.
    let image = find::image(client, name).await?;
    // A tag or digest removes that name; the beginning of an id is something only we understand.
    let by_id =
        image.id.trim_start_matches("sha256:").starts_with(name.trim_start_matches("sha256:"));
    let image = if by_id { image.id } else { name.to_owned() };
    let spec = cri::ImageSpec { image, ..Default::default() };
    let mut images = client.images.clone();
    client.slow(images.remove_image(cri::RemoveImageRequest { image: Some(spec) })).await?;
    Ok(())
}

/// `holdfast image import`
pub(super) async fn import(client: &mut Client, args: Import) -> Result<u8> {
    let stdin = args.file == Path::new("-");
    let source: Box<dyn Read + Send> = if stdin {
        if io::stdin().is_terminal() {
            bail!("stdin is a terminal; redirect an archive into it, or name a file");
        }
        Box::new(io::stdin())
    } else {
        let open = File::open(&args.file);
        Box::new(open.with_context(|| format!("open {}", args.file.display()))?)
    };
    let (pieces, queue) = mpsc::channel(PIECES_AHEAD);
    let (failure, failed) = oneshot::channel();
    let reference = args.name;
    // A thread of its own: reading a pipe may block for ever, and must not keep us from ending.
    std::thread::spawn(move || {
        if let Err(error) = read_pieces(source, reference, &pieces) {
            // The queue stays open until this is received: an archive that cannot be read to its
            // end must not look complete to the daemon.
            let _ = failure.send((error, pieces));
        }
    });
    let mut service = client.admin.clone();
    let call = service.import_image(ReceiverStream::new(queue));
    let response = tokio::select! {
        biased; // A read error explains the call's, if both are there.
        Ok((error, _pieces)) = failed => {
            return Err(anyhow::Error::new(error).context(format!("read {}", args.file.display())));
        }
        response = client.long(call) => response.context("import")?,
    };
    let names = response.images.iter().map(|image| match image.names.is_empty() {
        true => format!("{}\n", image.id),
        false => format!("{} {}\n", image.id, image.names.join(" ")),
    });
    wire::write(&names.collect::<String>())?;
    if response.images.iter().any(|image| image.names.is_empty()) {
        writeln!(
            io::stderr(),
            "holdfast: an image has no name; import it with --name to give it one"
        )?;
    }
    Ok(0)
}

fn read_pieces(
    mut source: Box<dyn Read + Send>,
    mut reference: String,
    pieces: &mpsc::Sender<admin::ImportImageRequest>,
) -> io::Result<()> {
    loop {
        let mut data = Vec::with_capacity(PIECE);
        source.by_ref().take(PIECE as u64).read_to_end(&mut data)?;
        if data.is_empty() {
            return Ok(());
        }
        let piece = admin::ImportImageRequest { data, reference: std::mem::take(&mut reference) };
        if pieces.blocking_send(piece).is_err() {
            // The daemon has answered already; its answer says why.
            return Ok(());
        }
    }
}

/// Whether the node has the image.
pub(super) async fn exists(client: &Client, image: &str) -> Result<bool> {
    let spec = cri::ImageSpec { image: image.to_owned(), ..Default::default() };
    let request = cri::ImageStatusRequest { image: Some(spec), verbose: false };
    let mut images = client.images.clone();
    Ok(client.quick(images.image_status(request)).await?.image.is_some())
}

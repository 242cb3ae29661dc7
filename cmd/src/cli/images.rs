//! `image push`, `save`, `tag`, `prune`: what needs our own service.

use std::{
    fs::File,
    io::{self, IsTerminal as _, Write},
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use holdfast_protos::images as wire;

use super::{
    Client,
    args::{ArchiveFormat, Commit, Prune, Push, Save, Tag},
    client,
    find::All,
    image,
    progress::{Layer, Progress},
    table::size,
    wire as output,
};

/// `holdfast image push`
pub(super) async fn push(client: &mut Client, args: Push) -> Result<u8> {
    let (username, password) = image::credentials(&args.registry)?.into_parts();
    let mut progress = if args.quiet { Progress::none() } else { Progress::on_stderr() };
    let request = wire::PushRequest {
        image: args.image.clone(),
        reference: args.name.clone(),
        username,
        password,
    };
    let mut service = client.admin_images.clone();
    let push = async {
        let mut stream = service.push(request).await?.into_inner();
        while let Some(update) = stream.message().await? {
            progress.update(&update.layers.iter().map(Layer::pushed).collect::<Vec<_>>());
            if !update.digest.is_empty() {
                return Ok(tonic::Response::new(Some((update.reference, update.digest))));
            }
        }
        Ok(tonic::Response::new(None))
    };
    let result = client.long(push).await;
    progress.finish(matches!(result, Ok(Some(_))));
    let what = if args.name.is_empty() { &args.image } else { &args.name };
    match result.map_err(|error| client::during(error, "push", what))? {
        Some((_, digest)) => output::write(&format!("{digest}\n"))?,
        None => bail!("push {what}: the daemon ended the push without a result"),
    }
    Ok(0)
}

/// `holdfast image save`
pub(super) async fn save(client: &mut Client, args: Save) -> Result<u8> {
    let format = match args.format {
        ArchiveFormat::Oci => wire::save_request::Format::Oci,
        ArchiveFormat::Docker => wire::save_request::Format::Docker,
    };
    let to_stdout = args.output == Path::new("-");
    if to_stdout && io::stdout().is_terminal() {
        bail!("stdout is a terminal; redirect it into a file, or use --output");
    }
    let request = wire::SaveRequest { images: args.images, format: format as i32 };
    let mut service = client.admin_images.clone();
    let save = async {
        let mut stream = service.save(request).await?.into_inner();
        // Before a file is made there must be something for it.
        let first = stream.message().await?;
        Ok(tonic::Response::new((stream, first)))
    };
    let (mut stream, mut next) = client.long(save).await.context("save")?;
    if to_stdout {
        let mut out = io::stdout().lock();
        while let Some(piece) = next {
            out.write_all(&piece.data)?;
            next = stream.message().await.map_err(|e| client.stream_error(e)).context("save")?;
        }
        out.flush()?;
        return Ok(0);
    }
    let name = args.output.display();
    let partial = Partial(args.output.with_added_extension("partial"));
    let mut out = File::create(&partial.0).with_context(|| format!("make {name}"))?;
    while let Some(piece) = next {
        out.write_all(&piece.data).with_context(|| format!("write {name}"))?;
        next = stream.message().await.map_err(|e| client.stream_error(e)).context("save")?;
    }
    out.sync_all().with_context(|| format!("write {name}"))?;
    std::fs::rename(&partial.0, &args.output).with_context(|| format!("make {name}"))?;
    Ok(0)
}

/// A file that is removed, unless it got another name.
struct Partial(std::path::PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// `holdfast image tag`
pub(super) async fn tag(client: &mut Client, args: Tag) -> Result<u8> {
    let request = wire::TagRequest { image: args.image, name: args.name };
    let mut service = client.admin_images.clone();
    let tagged = client.quick(service.tag(request)).await?;
    output::write(&format!("{}\n", tagged.name))?;
    Ok(0)
}

/// `holdfast commit`
pub(super) async fn commit(client: &mut Client, args: Commit) -> Result<u8> {
    let all = All::list(client).await?;
    let request = wire::CommitRequest {
        container_id: all.container(&args.container)?.id,
        reference: args.image,
        author: args.author,
        comment: args.message,
    };
    let mut service = client.admin_images.clone();
    let made = client.long(service.commit(request)).await.context("commit")?;
    output::write(&format!("{}\n", made.id))?;
    Ok(0)
}

/// `holdfast image prune`
pub(super) async fn prune(client: &mut Client, args: Prune) -> Result<u8> {
    let mut service = client.admin_images.clone();
    let pruned = client.slow(service.prune(wire::PruneRequest { all: args.all })).await?;
    let lines = pruned.images.iter().map(|image| match image.names.is_empty() {
        true => format!("{}\n", image.id),
        false => format!("{} {}\n", image.id, image.names.join(" ")),
    });
    output::write(&lines.collect::<String>())?;
    writeln!(io::stderr(), "freed {}", size(pruned.freed_bytes))?;
    Ok(0)
}

//! The Images service: what our command line does with images beyond the CRI.

use std::{io, pin::Pin};

use futures::{Stream, StreamExt};
use holdfast_protos::images::{self as wire, images_server::Images};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status};

use super::{Answer, Service};
use crate::{
    error::{chain, status as to_status},
    image::{
        Auth,
        commit::{Ids, Notes},
        names::Removed,
        push::{Layered, Phase},
        registry,
        save::Format,
    },
};

/// Pieces of an archive that wait for the caller, of at most 1 MiB each. Full: making it waits.
const PIECES: usize = 2;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send + 'static>>;

/// Gives what is written to whoever reads the other end. Blocks.
struct Pieces(mpsc::Sender<Result<wire::SaveResponse, Status>>);

impl io::Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(1 << 20)];
        let message = wire::SaveResponse { data: piece.to_vec() };
        let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "the caller went away");
        self.0.blocking_send(Ok(message)).map_err(gone)?;
        Ok(piece.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn pushed(layers: &[Layered]) -> wire::PushProgress {
    let layers = layers.iter().map(|layer| {
        let phase = match layer.phase {
            Phase::Waiting => wire::pushed_layer::Phase::Waiting,
            Phase::Packing => wire::pushed_layer::Phase::Packing,
            Phase::Sending => wire::pushed_layer::Phase::Sending,
            Phase::Done => wire::pushed_layer::Phase::Done,
            Phase::Exists => wire::pushed_layer::Phase::Exists,
        };
        wire::PushedLayer {
            digest: layer.digest.to_string(),
            phase: phase as i32,
            sent_bytes: layer.sent,
            total_bytes: layer.total,
        }
    });
    wire::PushProgress { layers: layers.collect(), ..Default::default() }
}

fn endpoint(endpoint: registry::Endpoint) -> wire::Endpoint {
    wire::Endpoint {
        url: endpoint.url,
        mirror: endpoint.mirror,
        resolve: endpoint.resolve,
        pull: endpoint.pull,
        push: endpoint.push,
        unverified: endpoint.unverified,
        fallback: endpoint.fallback,
        credentials: endpoint.credentials,
        file: endpoint.from.map(|path| path.display().to_string()).unwrap_or_default(),
    }
}

#[tonic::async_trait]
impl Images for Service {
    async fn resolve(
        &self,
        request: Request<wire::ResolveRequest>,
    ) -> Answer<wire::ResolveResponse> {
        let images = &self.pods.services().images;
        let resolved = images.resolve(&request.into_inner().reference).await;
        let resolved = resolved.map_err(|e| to_status(&e))?;
        let names = resolved.into_iter().map(|(reference, endpoints)| {
            let reference = reference.to_string();
            match endpoints {
                Ok(found) => wire::ResolvedName {
                    reference,
                    endpoints: found.into_iter().map(endpoint).collect(),
                    error: String::new(),
                },
                Err(error) => {
                    wire::ResolvedName { reference, endpoints: Vec::new(), error: chain(&error) }
                }
            }
        });
        Ok(Response::new(wire::ResolveResponse { names: names.collect() }))
    }

    async fn tag(&self, request: Request<wire::TagRequest>) -> Answer<wire::TagResponse> {
        let request = request.into_inner();
        let images = &self.pods.services().images;
        let tagged = images.tag(&request.image, &request.name).await;
        let (name, image) = tagged.map_err(|e| to_status(&e))?;
        Ok(Response::new(wire::TagResponse { name, id: image.id.to_string() }))
    }

    async fn remove(&self, request: Request<wire::RemoveRequest>) -> Answer<wire::RemoveResponse> {
        let images = &self.pods.services().images;
        let removed = images.remove_name(&request.into_inner().image).await;
        Ok(Response::new(match removed.map_err(|e| to_status(&e))? {
            Removed::Name(name) => wire::RemoveResponse { name, id: String::new() },
            Removed::Image(id) => wire::RemoveResponse { name: String::new(), id: id.to_string() },
        }))
    }

    async fn prune(&self, request: Request<wire::PruneRequest>) -> Answer<wire::PruneResponse> {
        let images = &self.pods.services().images;
        let pruned = images.prune(request.into_inner().all).await;
        let (pruned, freed_bytes) = pruned.map_err(|e| to_status(&e))?;
        let images = pruned.iter().map(|image| wire::PrunedImage {
            id: image.id.to_string(),
            names: image.names.clone(),
        });
        Ok(Response::new(wire::PruneResponse { images: images.collect(), freed_bytes }))
    }

    type SaveStream = Answers<wire::SaveResponse>;

    async fn save(&self, request: Request<wire::SaveRequest>) -> Answer<Self::SaveStream> {
        let request = request.into_inner();
        let format = match request.format() {
            wire::save_request::Format::Oci => Format::Oci,
            wire::save_request::Format::Docker => Format::Docker,
        };
        if request.images.is_empty() {
            return Err(Status::invalid_argument("images: at least one is required"));
        }
        let images = self.pods.services().images.clone();
        let (pieces, queue) = mpsc::channel(PIECES);
        let failed = pieces.clone();
        // Ends by itself when the caller goes away: nothing can be written any more.
        tokio::spawn(async move {
            if let Err(error) = images.save(&request.images, format, Pieces(pieces)).await {
                let _ = failed.send(Err(to_status(&error))).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }

    async fn commit(&self, request: Request<wire::CommitRequest>) -> Answer<wire::CommitResponse> {
        let request = request.into_inner();
        let found = self.pods.find_container(&request.container_id);
        let (pod, container) = found.map_err(|e| to_status(&e))?;
        let user = pod.view().record.config.namespaces.user.clone();
        let ids = user.map(|user| Ids { uids: user.uids, gids: user.gids }).unwrap_or_default();
        let notes = Notes { author: request.author, comment: request.comment };
        let images = self.pods.services().images.clone();
        let id = container.record.id.clone();
        // Ended with the caller, what was written goes.
        let made = images.commit(&id, &request.reference, ids, notes).await;
        let (reference, image) = made.map_err(|e| to_status(&e))?;
        Ok(Response::new(wire::CommitResponse { id: image.id.to_string(), reference }))
    }

    type PushStream = Answers<wire::PushProgress>;

    async fn push(&self, request: Request<wire::PushRequest>) -> Answer<Self::PushStream> {
        let request = request.into_inner();
        let auth = (!request.username.is_empty()).then(|| Auth {
            username: request.username,
            password: request.password,
            ..Default::default()
        });
        let images = self.pods.services().images.clone();
        let (progress, watched) = watch::channel(Vec::new());
        let last = watched.clone();
        // With the stream, which a caller that goes away drops, the push ends.
        let push = AbortOnDropHandle::new(tokio::spawn(async move {
            let to = Some(request.reference.as_str()).filter(|to| !to.is_empty());
            images.push(&request.image, to, auth, progress).await
        }));
        let steps = WatchStream::new(watched).map(|layers| Ok(pushed(&layers)));
        let done = futures::stream::once(async move {
            let done =
                push.await.map_err(|_| Status::unavailable("the daemon is shutting down"))?;
            let (reference, digest) = done.map_err(|e| to_status(&e))?;
            let mut end = pushed(&last.borrow());
            end.reference = reference.to_string();
            end.digest = digest.to_string();
            Ok(end)
        });
        Ok(Response::new(Box::pin(steps.chain(done))))
    }
}

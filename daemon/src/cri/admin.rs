//! The Admin service: what our command line needs beyond the CRI.

use std::pin::Pin;

use futures::{Stream, StreamExt, TryStreamExt};
use holdfast_protos::admin::{self, admin_server::Admin};
use tokio_stream::wrappers::WatchStream;
use tokio_util::io::StreamReader;
use tonic::{Request, Response, Status, Streaming};

use super::{Answer, Service};
use crate::{
    error::{chain, status as to_status},
    image::{Auth, Caller, Phase, Progress},
};

fn progress(progress: &Progress) -> admin::PullProgress {
    let layers = progress.layers.iter().map(|layer| {
        let phase = match layer.phase {
            Phase::Waiting => admin::layer_progress::Phase::Waiting,
            Phase::Pulling => admin::layer_progress::Phase::Pulling,
            Phase::Done => admin::layer_progress::Phase::Done,
            Phase::Exists => admin::layer_progress::Phase::Exists,
        };
        admin::LayerProgress {
            digest: layer.digest.to_string(),
            phase: phase as i32,
            received_bytes: layer.received,
            total_bytes: layer.total,
        }
    });
    admin::PullProgress { layers: layers.collect(), image_ref: String::new() }
}

#[tonic::async_trait]
impl Admin for Service {
    type PullImageStream =
        Pin<Box<dyn Stream<Item = Result<admin::PullProgress, Status>> + Send + 'static>>;

    async fn pull_image(
        &self,
        request: Request<admin::PullImageRequest>,
    ) -> Answer<Self::PullImageStream> {
        let request = request.into_inner();
        let auth = (!request.username.is_empty()).then(|| Auth {
            username: request.username,
            password: request.password,
            ..Default::default()
        });
        let platform = Some(request.platform.as_str()).filter(|p| !p.is_empty());
        let images = &self.pods.services().images;
        let flight = images
            .pull_with_progress(&request.reference, auth, platform, Caller::Watching)
            .map_err(|e| to_status(&e))?;
        let last = flight.progress.clone();
        let steps = WatchStream::new(flight.progress).map(|p| Ok(progress(&p)));
        let hold = flight.hold;
        let done = futures::stream::once(async move {
            // A caller that goes away drops the stream, and with it its interest in the pull.
            let _hold = hold;
            let image = flight.done.await.map_err(|e| to_status(&e))?;
            let mut end = progress(&last.borrow());
            end.image_ref = image.id.to_string();
            Ok(end)
        });
        Ok(Response::new(Box::pin(steps.chain(done))))
    }

    async fn upgrade_shims(
        &self,
        request: Request<admin::UpgradeShimsRequest>,
    ) -> Answer<admin::UpgradeShimsResponse> {
        let request = request.into_inner();
        let asked = (!request.binary.is_empty()).then(|| request.binary.clone().into());
        let upgraded = self.pods.upgrade_shims(asked, request.force).await;
        let shims = upgraded.map_err(|e| to_status(&e))?.into_iter().map(|upgrade| {
            use admin::upgraded_shim::Outcome;
            let (outcome, error) = match upgrade.outcome {
                Ok(true) => (Outcome::Upgraded, String::new()),
                Ok(false) => (Outcome::Current, String::new()),
                Err(error) => (Outcome::Kept, chain(&*error)),
            };
            admin::UpgradedShim {
                pod_id: upgrade.id.to_string(),
                pod_namespace: upgrade.namespace,
                pod_name: upgrade.name,
                outcome: outcome as i32,
                error,
            }
        });
        Ok(Response::new(admin::UpgradeShimsResponse { shims: shims.collect() }))
    }

    async fn import_image(
        &self,
        request: Request<Streaming<admin::ImportImageRequest>>,
    ) -> Answer<admin::ImportImageResponse> {
        let mut pieces = request.into_inner();
        let first = pieces.message().await?;
        let first = first.ok_or_else(|| Status::invalid_argument("the archive is empty"))?;
        let name = Some(first.reference.clone()).filter(|name| !name.is_empty());
        let rest = pieces.map_ok(|piece| bytes::Bytes::from(piece.data));
        let all = futures::stream::once(async { Ok(bytes::Bytes::from(first.data)) }).chain(rest);
        let archive = StreamReader::new(Box::pin(all.map_err(std::io::Error::other)));
        let images = &self.pods.services().images;
        let images = images.import(archive, name.as_deref()).await.map_err(|e| to_status(&e))?;
        let images = images.iter().map(|image| admin::ImportedImage {
            id: image.id.to_string(),
            names: image.names.clone(),
        });
        Ok(Response::new(admin::ImportImageResponse { images: images.collect() }))
    }
}

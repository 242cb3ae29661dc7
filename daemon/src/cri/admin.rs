//! The Admin service: what our command line needs beyond the CRI.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt, TryStreamExt, future::BoxFuture};
use holdfast_protos::admin::{self, admin_server::Admin};
use tokio::sync::watch;
use tokio_util::io::StreamReader;
use tonic::{Request, Response, Status, Streaming};

use super::{Answer, Service};
use crate::{
    error::{chain, status as to_status},
    image::{Auth, Caller, Error, Hold, Image, Phase, Progress},
};

/// A pull is not told of more often than this: each message has all layers.
const GAP: Duration = Duration::from_millis(100);

/// A pull as a caller watches it.
struct Watched {
    progress: watch::Receiver<Progress>,
    /// `None`: it was told how the pull ended.
    done: Option<BoxFuture<'static, Result<Arc<Image>, Error>>>,
    /// A caller that goes away drops this, and with it its interest in the pull.
    _hold: Hold,
    /// When the next message may come.
    at: Instant,
    rates: HashMap<usize, Rate>,
}

/// How fast a layer comes.
struct Rate {
    since: Instant,
    bytes: u64,
    per_second: f64,
}

impl Watched {
    async fn next(mut self) -> Option<(Result<admin::PullProgress, Status>, Self)> {
        let mut done = self.done.take()?;
        let changed = async {
            tokio::time::sleep_until(self.at.into()).await;
            self.progress.changed().await
        };
        let result = tokio::select! {
            // The end first: nobody waits for a gap then.
            biased;
            result = &mut done => result,
            changed = changed => match changed {
                Ok(()) => {
                    self.at = Instant::now() + GAP;
                    let now = self.progress.borrow_and_update().clone();
                    let message = self.message(&now);
                    self.done = Some(done);
                    return Some((Ok(message), self));
                }
                // It ends, and says how in a moment.
                Err(_) => done.await,
            },
        };
        let end = result.map_err(|error| to_status(&error)).map(|image| {
            let now = self.progress.borrow().clone();
            let mut end = self.message(&now);
            end.image_ref = image.id.to_string();
            end
        });
        Some((end, self))
    }

    fn message(&mut self, now: &Progress) -> admin::PullProgress {
        let mut message = progress(now);
        for (index, layer) in message.layers.iter_mut().enumerate() {
            if layer.phase() != admin::layer_progress::Phase::Pulling {
                continue;
            }
            let fresh =
                || Rate { since: Instant::now(), bytes: layer.received_bytes, per_second: 0.0 };
            let rate = self.rates.entry(index).or_insert_with(fresh);
            let passed = rate.since.elapsed().as_secs_f64();
            if passed >= 0.5 {
                let new = layer.received_bytes.saturating_sub(rate.bytes) as f64 / passed;
                // The last seconds count, not the last moment.
                rate.per_second = match rate.per_second {
                    0.0 => new,
                    old => 0.7 * old + 0.3 * new,
                };
                (rate.since, rate.bytes) = (Instant::now(), layer.received_bytes);
            }
            layer.bytes_per_second = rate.per_second as u64;
        }
        message
    }
}

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
            bytes_per_second: 0,
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
        let mut watched = flight.progress;
        watched.mark_changed();
        let pull = Watched {
            progress: watched,
            done: Some(flight.done),
            _hold: flight.hold,
            at: Instant::now(),
            rates: HashMap::new(),
        };
        let steps = futures::stream::unfold(pull, Watched::next);
        Ok(Response::new(Box::pin(steps)))
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

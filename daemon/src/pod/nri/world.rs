//! The pods as plugins find and change them.

use std::{sync::Arc, time::Duration};

use futures::FutureExt as _;
use holdfast_protos::nri::{Container, ContainerEviction, ContainerUpdate, PodSandbox};
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::{
    super::{
        ContainerView, Pod, PodView, Pods, Shared, answered,
        config::Resources,
        container::stop,
        state::PodState,
        task::{Answer, Request},
    },
    Change, container, pod, read_spec, refused, resources, spec_of,
};
use crate::{error::chain, id::ContainerId, nri, shims::Link};

impl Pods {
    /// A container runs: plugins are told beside it.
    pub(in crate::pod) fn announce_start(&self, view: &PodView, container: &Arc<ContainerView>) {
        self.later(view, container, |turn, pod, container| {
            async move { turn.post_start(pod, container).await }.boxed()
        });
    }

    /// A container has ended: plugins are told beside it.
    pub(in crate::pod) fn announce_exit(&self, view: &PodView, container: &Arc<ContainerView>) {
        self.later(view, container, |turn, pod, container| {
            async move { drop(turn.stop(pod, container).await) }.boxed()
        });
    }

    /// Tells in the order in which this is called, without making anybody wait.
    fn later(
        &self,
        view: &PodView,
        of: &Arc<ContainerView>,
        tell: impl for<'a> FnOnce(
            &'a mut nri::Turn,
            &'a PodSandbox,
            &'a Container,
        ) -> futures::future::BoxFuture<'a, ()>
        + Send
        + 'static,
    ) {
        let services = self.services.clone();
        if !services.nri.is_enabled() {
            return;
        }
        let (record, of) = (view.record.clone(), of.clone());
        let place = services.nri.line();
        self.tracker.spawn(async move {
            let mut turn = place.await;
            if turn.is_idle() {
                return;
            }
            let spec = spec_of(&services, &of.record.id).await;
            let container = container(&of.record, &spec);
            tell(&mut turn, &pod(&services, &record), &container).await;
        });
    }

    /// Changes a container's limits as plugins have them.
    pub(in crate::pod) async fn update_with_plugins(
        self,
        of: Pod,
        id: ContainerId,
        asked: Resources,
    ) -> Shared<()> {
        let services = self.services.clone();
        let mut turn = services.nri.line().await;
        let told = !turn.is_idle();
        let mut change = Change::from(asked);
        let mut done = std::future::ready(()).boxed();
        if told {
            let found = of.container(&id).map_err(Arc::new)?;
            let message = pod(&services, &of.view().record);
            let container = container(&found.record, &spec_of(&services, &id).await);
            let updated = turn
                .update(&message, &container, resources(&change.resources))
                .await
                .map_err(refused(format!("container {id}")))
                .map_err(Arc::new)?;
            let oom_score_adj = change.resources.oom_score_adj;
            change = Change::of(updated.resources);
            change.resources.oom_score_adj = oom_score_adj;
            done = updated.done;
        }
        let request = Request::Update { id: id.clone(), change: Box::new(change) };
        let order = of.order(request).await;
        drop(turn);
        let answer = answered(order?).await;
        self.tracker.spawn(done);
        answer?;
        if told && let Ok(found) = of.container(&id) {
            let place = services.nri.line();
            self.tracker.spawn(async move {
                let mut turn = place.await;
                let container = container(&found.record, &spec_of(&services, &id).await);
                turn.post_update(&pod(&services, &of.view().record), &container).await;
            });
        }
        Ok(())
    }

    /// Changes a pod's overhead and sum of resources, unless a plugin refuses.
    pub(in crate::pod) async fn update_pod_with_plugins(
        self,
        of: Pod,
        overhead: Option<Resources>,
        sum: Option<Resources>,
    ) -> Shared<()> {
        let services = self.services.clone();
        let mut turn = services.nri.line().await;
        if !turn.is_idle() {
            let message = pod(&services, &of.view().record);
            turn.update_pod(message, overhead.as_ref().map(resources), sum.as_ref().map(resources))
                .await
                .map_err(refused(format!("pod {}", of.id)))
                .map_err(Arc::new)?;
        }
        let told = !turn.is_idle();
        drop(turn);
        of.ask(Request::UpdatePod { change: Box::new((overhead, sum)) }).await?;
        if told {
            let place = services.nri.line();
            self.tracker.spawn(async move {
                let mut turn = place.await;
                turn.post_update_pod(&pod(&services, &of.view().record)).await;
            });
        }
        Ok(())
    }

    /// Starts the plugins, and takes theirs from `listener`.
    pub async fn start_plugins(&self, listener: Option<tokio::net::UnixListener>) {
        self.services.nri.start(Arc::new(World(self.clone())), listener).await;
    }
}

/// The pods, as plugins find and change them.
struct World(Pods);

#[async_trait::async_trait]
impl nri::World for World {
    async fn state(&self) -> nri::State {
        let services = self.0.services.clone();
        let views = self.0.list();
        let read = tokio::task::spawn_blocking(move || {
            let mut state = nri::State::default();
            for view in views {
                if view.record.state == PodState::NotReady {
                    state.ended.push(view.record.id.to_string());
                }
                state.pods.push(pod(&services, &view.record));
                for of in view.containers.values() {
                    if of.record.state.is_exited() {
                        state.ended.push(of.record.id.to_string());
                        continue;
                    }
                    let spec = read_spec(&services, &of.record.id);
                    state.containers.push(container(&of.record, &spec));
                }
            }
            state
        });
        read.await.unwrap_or_default()
    }

    async fn order(
        &self,
        updates: Vec<ContainerUpdate>,
        evictions: Vec<ContainerEviction>,
        plugin: String,
    ) -> nri::Ordered {
        let mut waiting = Vec::new();
        let mut failed = Vec::new();
        for update in updates {
            match self.send(&update).await {
                Ok(answer) => waiting.push((update, answer)),
                Err(error) => {
                    info!(container = update.container_id, plugin, error, "not updated");
                    failed.push(update);
                }
            }
        }
        let mut stops = Vec::new();
        for eviction in evictions {
            let id = eviction.container_id;
            let Ok((pod, found)) = self.0.find_container_exactly(&id) else {
                info!(container = id, plugin, "not evicted: there is no such container");
                continue;
            };
            warn!(container = id, plugin, reason = eviction.reason, "evicted by an NRI plugin");
            let (services, id) = (self.0.services.clone(), found.record.id.clone());
            stops.push(self.0.tracker.spawn(async move {
                if let Err(error) = stop(&services, pod, id, Duration::ZERO).await {
                    warn!(error = chain(&error), "evict a container");
                }
            }));
        }
        async move {
            for (update, answer) in waiting {
                let Err(error) = answered(answer).await else { continue };
                let error = chain(&*error);
                info!(container = update.container_id, plugin, error, "not updated");
                failed.push(update);
            }
            futures::future::join_all(stops).await;
            failed
        }
        .boxed()
    }
}

impl World {
    /// Puts an update in line at its container's owner.
    async fn send(
        &self,
        update: &ContainerUpdate,
    ) -> Result<oneshot::Receiver<Shared<Answer>>, String> {
        let found = self.0.find_container_exactly(&update.container_id);
        let (pod, found) = found.map_err(|error| chain(&error))?;
        if found.record.state.is_exited() {
            return Err("it has ended".to_owned());
        }
        let limits = update.linux.clone().and_then(|linux| linux.resources).unwrap_or_default();
        if limits.blockio_class.is_some() || limits.rdt_class.is_some() {
            return Err("a class can be chosen only before the container is made".to_owned());
        }
        if matches!(*pod.link.borrow(), Link::Down) {
            return Err("its pod is not ready".to_owned());
        }
        let id = found.record.id.clone();
        let request = Request::Update { id, change: Box::new(Change::of(limits)) };
        pod.order(request).await.map_err(|error| chain(&*error))
    }
}

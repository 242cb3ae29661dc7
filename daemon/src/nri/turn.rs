//! The turn: who has it asks plugins, one request at a time, and gathers what they want.

use std::{collections::BTreeMap, sync::Arc};

use futures::{FutureExt as _, future::BoxFuture};
use holdfast_protos::nri::{
    Container, ContainerEviction, ContainerUpdate, CreateContainerRequest, CreateContainerResponse,
    Event, LinuxContainerUpdate, LinuxResources, PluginInstance, PodSandbox,
    PostCreateContainerRequest, PostStartContainerRequest, PostUpdateContainerRequest,
    PostUpdatePodSandboxRequest, RemoveContainerRequest, RemovePodSandboxRequest,
    RunPodSandboxRequest, StartContainerRequest, StopContainerRequest, StopContainerResponse,
    StopPodSandboxRequest, UpdateContainerRequest, UpdateContainerResponse,
    UpdatePodSandboxRequest, UpdatePodSandboxResponse, ValidateContainerAdjustmentRequest,
    ValidateContainerAdjustmentResponse,
};
use prost::Message;
use serde_json::Value;
use tokio::sync::OwnedMutexGuard;
use tracing::warn;

use super::{
    Core, Error, Line, Making,
    adjust::Draft,
    connection,
    limits::{claim_resources, merge_resources},
    owners::{Conflict, Owners},
    plugin::Plugin,
    validate,
};
use crate::{config, error::chain};

pub(super) fn report(failed: Vec<ContainerUpdate>, when: &str) {
    for update in failed.iter().filter(|update| !update.ignore_failure) {
        warn!(container = update.container_id, "an update that an NRI plugin wants failed {when}");
    }
}

/// The turn: see the module. With no plugins every question is answered at once.
pub struct Turn {
    pub(super) held: Option<(Arc<Core>, OwnedMutexGuard<Line>)>,
}

/// What plugins made of a container, and what else they want.
pub struct Created {
    /// The container.
    pub draft: Draft,
    /// Waits until other containers are updated, and evicted ones gone.
    pub done: BoxFuture<'static, ()>,
}

/// What plugins made of an update, and what else they want.
pub struct Updated {
    /// The limits to be set.
    pub resources: LinuxResources,
    /// Waits until other containers are updated.
    pub done: BoxFuture<'static, ()>,
}

/// What is asked once of each plugin.
enum Asked<R> {
    /// It is not one of its events, or it is gone now.
    Nothing,
    Answer(R),
}

impl Turn {
    fn plugins(&self) -> Vec<Arc<Plugin>> {
        match &self.held {
            Some((_, line)) => line.plugins.clone(),
            None => Vec::new(),
        }
    }

    /// Whether nobody would be asked.
    pub fn is_idle(&self) -> bool {
        self.held.as_ref().is_none_or(|(_, line)| line.plugins.is_empty())
    }

    fn drop_plugin(plugin: &Plugin, what: &'static str, error: &connection::Error) {
        warn!(
            plugin = plugin.full_name(),
            error = chain(error),
            "an NRI plugin is dropped: it did not answer {what}"
        );
        plugin.close();
    }

    async fn ask<R: Message + Default>(
        plugin: &Plugin,
        event: Event,
        what: &'static str,
        request: &impl Message,
    ) -> Result<Asked<R>, Error> {
        if plugin.is_closed() || !plugin.wants(event) {
            return Ok(Asked::Nothing);
        }
        match plugin.call(what, request).await {
            Ok(answer) => Ok(Asked::Answer(answer)),
            Err(error) if error.is_fatal() => {
                Self::drop_plugin(plugin, what, &error);
                Ok(Asked::Nothing)
            }
            Err(source) => {
                Err(Error::Refused { plugin: plugin.full_name().to_owned(), what, source })
            }
        }
    }

    /// Tells all plugins of an event. The first that refuses ends it.
    async fn tell(
        &self,
        event: Event,
        what: &'static str,
        request: &impl Message,
        pod: &PodSandbox,
        container: Option<&Container>,
    ) -> Result<(), Error> {
        for plugin in self.plugins() {
            if plugin.is_closed() || !plugin.wants(event) {
                continue;
            }
            match plugin.tell(event, what, request, pod, container).await {
                Ok(()) => {}
                Err(error) if error.is_fatal() => Self::drop_plugin(&plugin, what, &error),
                Err(source) => {
                    let plugin = plugin.full_name().to_owned();
                    return Err(Error::Refused { plugin, what, source });
                }
            }
        }
        Ok(())
    }

    /// The same where nobody may refuse: the event has happened.
    async fn announce(
        &self,
        event: Event,
        what: &'static str,
        request: &impl Message,
        pod: &PodSandbox,
        container: Option<&Container>,
    ) {
        for plugin in self.plugins() {
            if plugin.is_closed() || !plugin.wants(event) {
                continue;
            }
            match plugin.tell(event, what, request, pod, container).await {
                Ok(()) => {}
                Err(error) if error.is_fatal() => Self::drop_plugin(&plugin, what, &error),
                Err(error) => {
                    let plugin = plugin.full_name();
                    warn!(plugin, error = chain(&error), "an NRI plugin has a complaint: {what}");
                }
            }
        }
    }

    fn begin(&self, id: &str, making: Making) {
        if let Some((core, _)) = &self.held {
            core.making().insert(id.to_owned(), making);
        }
    }

    fn has_ended(&self, id: &str) -> bool {
        self.held.as_ref().is_some_and(|(_, line)| line.ended.contains(id))
    }

    fn set_ended(&mut self, id: &str, ended: bool) {
        if let Some((_, line)) = &mut self.held {
            match ended {
                // With nobody to tell it to, there is nothing to remember.
                true if line.plugins.is_empty() => false,
                true => line.ended.insert(id.to_owned()),
                false => line.ended.remove(id),
            };
        }
    }

    /// A pod is about to be ready. When a plugin refuses, those that were asked are told its end.
    pub async fn run_pod(
        &mut self,
        id: &str,
        message: impl Fn() -> PodSandbox + Send + 'static,
    ) -> Result<(), Error> {
        if self.is_idle() {
            self.begin(id, Making::Pod(Box::new(message)));
            return Ok(());
        }
        let pod = message();
        let request = RunPodSandboxRequest { pod: Some(pod.clone()) };
        let told = self.tell(Event::RunPodSandbox, "RunPodSandbox", &request, &pod, None).await;
        match told {
            Ok(()) => self.begin(id, Making::Pod(Box::new(message))),
            Err(error) => {
                self.stop_pod(&pod).await;
                self.remove_pod(&pod).await;
                return Err(error);
            }
        }
        Ok(())
    }

    /// A pod's overhead or sum of resources is about to change.
    pub async fn update_pod(
        &mut self,
        pod: PodSandbox,
        overhead: Option<LinuxResources>,
        resources: Option<LinuxResources>,
    ) -> Result<(), Error> {
        let request = UpdatePodSandboxRequest {
            pod: Some(pod),
            overhead_linux_resources: overhead,
            linux_resources: resources,
        };
        for plugin in self.plugins() {
            let _: Asked<UpdatePodSandboxResponse> =
                Self::ask(&plugin, Event::UpdatePodSandbox, "UpdatePodSandbox", &request).await?;
        }
        Ok(())
    }

    /// It has changed.
    pub async fn post_update_pod(&mut self, pod: &PodSandbox) {
        let request = PostUpdatePodSandboxRequest { pod: Some(pod.clone()) };
        let event = Event::PostUpdatePodSandbox;
        self.announce(event, "PostUpdatePodSandbox", &request, pod, None).await;
    }

    /// A pod's containers have ended; told once.
    pub async fn stop_pod(&mut self, pod: &PodSandbox) {
        if self.has_ended(&pod.id) {
            return;
        }
        let request = StopPodSandboxRequest { pod: Some(pod.clone()) };
        self.announce(Event::StopPodSandbox, "StopPodSandbox", &request, pod, None).await;
        self.set_ended(&pod.id, true);
    }

    /// A pod is about to be gone.
    pub async fn remove_pod(&mut self, pod: &PodSandbox) {
        self.stop_pod(pod).await;
        let request = RemovePodSandboxRequest { pod: Some(pod.clone()) };
        self.announce(Event::RemovePodSandbox, "RemovePodSandbox", &request, pod, None).await;
        self.set_ended(&pod.id, false);
        if let Some((core, _)) = &self.held {
            core.making().remove(&pod.id);
        }
    }

    /// Whether anything would be asked, or required, for a container of a pod with these annotations.
    pub fn would_ask(&self, annotations: &BTreeMap<String, String>) -> bool {
        let required = |key: &String| key.starts_with(validate::REQUIRED);
        let configured = self
            .held
            .as_ref()
            .is_some_and(|(core, _)| !core.config.validator.required_plugins.is_empty());
        !self.is_idle() || configured || annotations.keys().any(required)
    }

    /// A container is being made about which nobody need be asked.
    pub fn making(&self, id: &str, message: impl Fn() -> Container + Send + 'static) {
        self.begin(id, Making::Container(Box::new(message)));
    }

    /// A container is about to be made. `container` is what `describe` makes of the draft's spec.
    ///
    /// When it is not to be made, those that were asked are told its end.
    pub async fn create(
        &mut self,
        pod: &PodSandbox,
        mut draft: Draft,
        describe: impl Fn(&Value) -> Container + Send + 'static,
    ) -> Result<Created, Error> {
        let container = describe(&draft.spec);
        let result = self.chain_create(pod, &container, &mut draft, &describe).await;
        let wishes = match result {
            Ok(wishes) => wishes,
            Err(error) => {
                self.remove(pod, &container).await;
                return Err(error);
            }
        };
        let done = self.order(wishes, "before a container is made").await;
        let spec = draft.spec.clone();
        self.begin(&container.id, Making::Container(Box::new(move || describe(&spec))));
        Ok(Created { draft, done })
    }

    async fn chain_create(
        &mut self,
        pod: &PodSandbox,
        original: &Container,
        draft: &mut Draft,
        describe: &(impl Fn(&Value) -> Container + Send),
    ) -> Result<Wishes, Error> {
        let validator = match &self.held {
            Some((core, _)) => core.config.validator.clone(),
            None => config::NriValidator::default(),
        };
        let mut wishes = Wishes::default();
        let plugins = self.plugins();
        let mut container = original.clone();
        for plugin in &plugins {
            let request = CreateContainerRequest {
                pod: Some(pod.clone()),
                container: Some(container.clone()),
            };
            let event = Event::CreateContainer;
            let asked = Self::ask(plugin, event, "CreateContainer", &request).await?;
            let Asked::Answer(answer) = asked else { continue };
            let answer: CreateContainerResponse = answer;
            if let Some(adjustment) = &answer.adjust {
                draft.adjust(adjustment, plugin.full_name())?;
                container = describe(&draft.spec);
            }
            for update in answer.update {
                if update.container_id == original.id {
                    let (plugin, container) = (plugin.full_name().to_owned(), update.container_id);
                    return Err(Error::UpdatesItself { plugin, container });
                }
                wishes.update(&mut draft.owners, update, plugin.full_name())?;
            }
            wishes.evict(answer.evict, plugin.full_name());
        }
        // Who went away while it was asked is not there.
        let present: Vec<_> = plugins.iter().filter(|plugin| !plugin.is_closed()).collect();
        let names: Vec<_> = present.iter().map(|p| p.full_name().to_owned()).collect();
        validate::required(&validator, pod, &original.name, &names)?;
        validate::adjusted(&validator, original, &draft.owners)?;
        let validators: Vec<_> =
            present.iter().filter(|p| p.wants(Event::ValidateContainerAdjustment)).collect();
        if validators.is_empty() {
            return Ok(wishes);
        }
        let request = ValidateContainerAdjustmentRequest {
            pod: Some(pod.clone()),
            container: Some(original.clone()),
            adjust: Some(draft.merged.clone()),
            update: wishes.updates.clone(),
            owners: Some(draft.owners.message().clone()),
            plugins: present
                .iter()
                .map(|plugin| {
                    let (index, name) = plugin.index_and_name();
                    PluginInstance { name, index }
                })
                .collect(),
        };
        let what = "ValidateContainerAdjustment";
        let verdicts = validators.iter().map(|plugin| async {
            let name = plugin.full_name().to_owned();
            match plugin.call::<ValidateContainerAdjustmentResponse>(what, &request).await {
                Ok(verdict) if verdict.reject => {
                    Err(Error::Rejected { plugin: name, reason: verdict.reason })
                }
                Ok(_) => Ok(()),
                Err(source) => {
                    if source.is_fatal() {
                        Self::drop_plugin(plugin, what, &source);
                    }
                    Err(Error::NoVerdict { plugin: name, source })
                }
            }
        });
        futures::future::join_all(verdicts).await.into_iter().collect::<Result<Vec<()>, _>>()?;
        Ok(wishes)
    }

    /// Puts in line what plugins want of other containers.
    async fn order(&self, wishes: Wishes, when: &'static str) -> BoxFuture<'static, ()> {
        let world = self.held.as_ref().and_then(|(core, _)| core.world());
        let (Some(world), false) = (world, wishes.is_empty()) else {
            return std::future::ready(()).boxed();
        };
        let done = world.order(wishes.updates, wishes.evictions, wishes.plugins.join(", ")).await;
        done.map(move |failed| report(failed, when)).boxed()
    }

    /// A container is made.
    pub async fn post_create(&mut self, pod: &PodSandbox, container: &Container) {
        let request = PostCreateContainerRequest {
            pod: Some(pod.clone()),
            container: Some(container.clone()),
        };
        let event = Event::PostCreateContainer;
        self.announce(event, "PostCreateContainer", &request, pod, Some(container)).await;
    }

    /// A container is about to be started.
    pub async fn start(&mut self, pod: &PodSandbox, container: &Container) -> Result<(), Error> {
        let request =
            StartContainerRequest { pod: Some(pod.clone()), container: Some(container.clone()) };
        let event = Event::StartContainer;
        self.tell(event, "StartContainer", &request, pod, Some(container)).await
    }

    /// A container runs.
    pub async fn post_start(&mut self, pod: &PodSandbox, container: &Container) {
        let request = PostStartContainerRequest {
            pod: Some(pod.clone()),
            container: Some(container.clone()),
        };
        let event = Event::PostStartContainer;
        self.announce(event, "PostStartContainer", &request, pod, Some(container)).await;
    }

    /// Limits of a container are about to be changed.
    pub async fn update(
        &mut self,
        pod: &PodSandbox,
        container: &Container,
        resources: LinuxResources,
    ) -> Result<Updated, Error> {
        let (mut owners, mut wishes) = (Owners::default(), Wishes::default());
        let mut resources = resources;
        for plugin in self.plugins() {
            let request = UpdateContainerRequest {
                pod: Some(pod.clone()),
                container: Some(container.clone()),
                linux_resources: Some(resources.clone()),
            };
            let event = Event::UpdateContainer;
            let asked = Self::ask(&plugin, event, "UpdateContainer", &request).await?;
            let Asked::Answer(answer) = asked else { continue };
            let answer: UpdateContainerResponse = answer;
            for update in answer.update {
                if update.container_id != container.id {
                    wishes.update(&mut owners, update, plugin.full_name())?;
                    continue;
                }
                let Some(wanted) = update.linux.and_then(|linux| linux.resources) else { continue };
                claim_resources(&mut owners, &container.id, &wanted, plugin.full_name())?;
                merge_resources(&mut resources, &wanted);
            }
            wishes.evict(answer.evict, plugin.full_name());
        }
        let done = self.order(wishes, "before a container is updated").await;
        Ok(Updated { resources, done })
    }

    /// They are changed.
    pub async fn post_update(&mut self, pod: &PodSandbox, container: &Container) {
        let request = PostUpdateContainerRequest {
            pod: Some(pod.clone()),
            container: Some(container.clone()),
        };
        let event = Event::PostUpdateContainer;
        self.announce(event, "PostUpdateContainer", &request, pod, Some(container)).await;
    }

    /// A container has ended; told once. What comes back waits until other containers are updated.
    pub async fn stop(
        &mut self,
        pod: &PodSandbox,
        container: &Container,
    ) -> BoxFuture<'static, ()> {
        let nothing = std::future::ready(()).boxed();
        if self.is_idle() || self.has_ended(&container.id) {
            return nothing;
        }
        let (mut owners, mut wishes) = (Owners::default(), Wishes::default());
        let request =
            StopContainerRequest { pod: Some(pod.clone()), container: Some(container.clone()) };
        for plugin in self.plugins() {
            let event = Event::StopContainer;
            match Self::ask(&plugin, event, "StopContainer", &request).await {
                Ok(Asked::Nothing) => {}
                Ok(Asked::Answer(answer)) => {
                    let answer: StopContainerResponse = answer;
                    for update in answer.update {
                        let put = wishes.update(&mut owners, update, plugin.full_name());
                        if let Err(error) = put {
                            warn!(error = chain(&error), "not done after a container has ended");
                        }
                    }
                }
                Err(error) => warn!(error = chain(&error), "an NRI plugin has a complaint"),
            }
        }
        self.set_ended(&container.id, true);
        self.order(wishes, "after a container has ended").await
    }

    /// A container is about to be gone, or was not made after all.
    pub async fn remove(&mut self, pod: &PodSandbox, container: &Container) {
        // Not waited for: it is in line, and nothing here depends on it.
        let done = self.stop(pod, container).await;
        if let Some((core, _)) = &self.held {
            core.tasks.spawn(done);
            core.making().remove(&container.id);
        }
        let request =
            RemoveContainerRequest { pod: Some(pod.clone()), container: Some(container.clone()) };
        let event = Event::RemoveContainer;
        self.announce(event, "RemoveContainer", &request, pod, Some(container)).await;
        self.set_ended(&container.id, false);
    }
}

/// What plugins want of other containers, gathered over one request.
#[derive(Default)]
struct Wishes {
    updates: Vec<ContainerUpdate>,
    evictions: Vec<ContainerEviction>,
    plugins: Vec<String>,
}

impl Wishes {
    fn is_empty(&self) -> bool {
        self.updates.is_empty() && self.evictions.is_empty()
    }

    fn by(&mut self, plugin: &str) {
        if !self.plugins.iter().any(|known| known == plugin) {
            self.plugins.push(plugin.to_owned());
        }
    }

    /// Two plugins that set the same limit are in conflict, unless the later one can do without it.
    fn update(
        &mut self,
        owners: &mut Owners,
        update: ContainerUpdate,
        plugin: &str,
    ) -> Result<(), Conflict> {
        let Some(wanted) = update.linux.as_ref().and_then(|linux| linux.resources.as_ref()) else {
            return Ok(());
        };
        let before = owners.clone();
        if let Err(conflict) = claim_resources(owners, &update.container_id, wanted, plugin) {
            if update.ignore_failure {
                *owners = before;
                return Ok(());
            }
            return Err(conflict);
        }
        self.by(plugin);
        match self.updates.iter_mut().find(|known| known.container_id == update.container_id) {
            Some(known) => {
                known.ignore_failure &= update.ignore_failure;
                let linux = known.linux.get_or_insert_with(LinuxContainerUpdate::default);
                merge_resources(linux.resources.get_or_insert_default(), wanted);
            }
            None => self.updates.push(update),
        }
        Ok(())
    }

    fn evict(&mut self, evictions: Vec<ContainerEviction>, plugin: &str) {
        for eviction in evictions {
            self.by(plugin);
            if !self.evictions.iter().any(|known| known.container_id == eviction.container_id) {
                self.evictions.push(eviction);
            }
        }
    }
}

//! One plugin: how it becomes one (registration, configuration, synchronisation), and what it is asked.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use holdfast_protos::nri::{
    ConfigureRequest, ConfigureResponse, Container, Empty, Event, PodSandbox,
    RegisterPluginRequest, StateChangeEvent, SynchronizeRequest, SynchronizeResponse,
};
use prost::Message;
use tokio::{net::UnixStream, sync::mpsc, time::timeout};
use tonic::Code;
use tracing::info;

use super::{
    connection::{self, Connection, Incoming},
    launch::Process,
    wire::Response,
};
use crate::config::{self, is_plugin_name};

/// The protocol's version that plugins are told.
const NRI_VERSION: &str = "v0.12.0";

/// Bytes of the field `more` of a SynchronizeRequest.
const MORE: usize = 2;

/// Every event.
const ALL: i32 = (1 << (Event::Last as i32 - 1)) - 1;

/// Why a plugin is not one.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each message is its documentation")]
pub(super) enum Error {
    #[error("no registration within {0:?} (nri.registration_timeout)")]
    Silent(Duration),
    #[error("its connection was closed before it registered")]
    Closed,
    #[error("it calls {0} before it has registered")]
    Unregistered(String),
    #[error("its registration")]
    Registration(#[source] prost::DecodeError),
    #[error("{0:?} is not a plugin's name: it has letters, digits and . _ + - only")]
    Name(String),
    #[error("{0:?} is not a plugin's index: it is two digits")]
    Index(String),
    #[error("{method}")]
    Call { method: &'static str, source: connection::Error },
    #[error("it asks for events that do not exist: {0:#x}")]
    Events(i32),
    #[error("it does not take the state of the node in more than one message")]
    Whole,
    #[error("{what} {id} alone is larger than a message")]
    TooLarge { what: &'static str, id: String },
    #[error("start {path}")]
    Start { path: PathBuf, source: std::io::Error },
}

/// A registered plugin.
#[derive(Debug)]
pub(super) struct Plugin {
    /// Two digits: plugins are asked in this order.
    index: String,
    name: String,
    /// "index-name"
    full: String,
    events: i32,
    limit: Duration,
    /// For its synchronisation, which is the end of its registration.
    join_limit: Duration,
    connection: Connection,
    /// Started by us; it ends when this is dropped.
    process: Option<Process>,
    pid: Option<u32>,
    /// Events it knows only as StateChange.
    legacy: AtomicU32,
}

/// "10-name" as index and name.
pub(super) fn parse_name(text: &str) -> Result<(&str, &str), Error> {
    let (index, name) = text.split_once('-').unwrap_or((text, ""));
    check(index, name)?;
    Ok((index, name))
}

fn check(index: &str, name: &str) -> Result<(), Error> {
    if index.len() != 2 || !index.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Error::Index(index.to_owned()));
    }
    if !is_plugin_name(name) {
        return Err(Error::Name(name.to_owned()));
    }
    Ok(())
}

/// A plugin that was started by us: who it is, and its own configuration.
#[derive(Debug)]
pub(super) struct Launched {
    pub(super) index: String,
    pub(super) name: String,
    pub(super) config: String,
    pub(super) process: Process,
}

impl Plugin {
    /// Lets a connection register, and configures it. The plugin's further calls come out of the
    /// receiver.
    pub(super) async fn register(
        stream: UnixStream,
        launched: Option<Launched>,
        config: &config::Nri,
    ) -> Result<(Self, mpsc::Receiver<Incoming>), Error> {
        let pid = match &launched {
            Some(launched) => Some(launched.process.pid()),
            None => stream.peer_cred().ok().and_then(|peer| peer.pid()).map(|pid| pid as u32),
        };
        let (connection, mut calls) = Connection::new(stream);
        let within = config.registration_timeout;
        let call = timeout(within, calls.recv()).await.map_err(|_| Error::Silent(within))?;
        let call = call.ok_or(Error::Closed)?;
        let registered = registration(&call, launched.as_ref());
        let response = match &registered {
            Ok(_) => Response::of(&Empty {}),
            Err(error) => Response::failed(Code::InvalidArgument, crate::error::chain(error)),
        };
        call.answer(response).await;
        let (index, name) = registered?;
        let full = format!("{index}-{name}");
        let timeouts: &BTreeMap<String, Duration> = &config.plugin_timeouts;
        let limit = timeouts.get(&full).or_else(|| timeouts.get(&name));
        let limit = limit.copied().unwrap_or(config.request_timeout);
        let milliseconds = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
        let (own, process) = match launched {
            Some(launched) => (launched.config, Some(launched.process)),
            None => (super::launch::configuration(&config.conf_dir, &index, &name), None),
        };
        let request = ConfigureRequest {
            config: own,
            runtime_name: "holdfast".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            registration_timeout: milliseconds(config.registration_timeout),
            request_timeout: milliseconds(limit),
            nri_version: NRI_VERSION.into(),
        };
        let answer: ConfigureResponse = connection
            .call("Configure", &request, limit)
            .await
            .map_err(|source| Error::Call { method: "Configure", source })?;
        let events = match answer.events {
            0 => ALL,
            events if events & !ALL == 0 => events,
            events => return Err(Error::Events(events & !ALL)),
        };
        info!(plugin = full, pid, events = format!("{events:#x}"), "NRI plugin is configured");
        let legacy = AtomicU32::new(0);
        let join_limit = limit.max(config.registration_timeout);
        let plugin =
            Self { index, name, full, events, limit, join_limit, connection, process, pid, legacy };
        Ok((plugin, calls))
    }

    /// "index-name"
    pub(super) fn full_name(&self) -> &str {
        &self.full
    }

    pub(super) fn order(&self) -> (&str, &str) {
        (&self.index, &self.name)
    }

    pub(super) fn index_and_name(&self) -> (String, String) {
        (self.index.clone(), self.name.clone())
    }

    pub(super) fn wants(&self, event: Event) -> bool {
        self.events & (1 << (event as i32 - 1)) != 0
    }

    /// What it is asked for, by name.
    pub(super) fn events(&self) -> Vec<&'static str> {
        (1..Event::Last as i32)
            .filter_map(|event| Event::try_from(event).ok())
            .filter(|event| self.wants(*event))
            .map(|event| event.as_str_name())
            .collect()
    }

    pub(super) fn limit(&self) -> Duration {
        self.limit
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.pid
    }

    pub(super) fn is_launched(&self) -> bool {
        self.process.is_some()
    }

    pub(super) fn close(&self) {
        self.connection.close();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.connection.is_closed()
    }

    pub(super) async fn closed(&self) {
        self.connection.closed().await;
    }

    /// Asks it, within its time.
    pub(super) async fn call<R: Message + Default>(
        &self,
        method: &'static str,
        request: &impl Message,
    ) -> Result<R, connection::Error> {
        self.connection.call(method, request, self.limit).await
    }

    /// Tells it of an event that has a call of its own, which older plugins lack.
    pub(super) async fn tell(
        &self,
        event: Event,
        method: &'static str,
        request: &impl Message,
        pod: &PodSandbox,
        container: Option<&Container>,
    ) -> Result<(), connection::Error> {
        let bit = 1 << (event as u32);
        if self.legacy.load(Ordering::Relaxed) & bit == 0 {
            match self.call::<Empty>(method, request).await {
                Err(connection::Error::Refused { code: Code::Unimplemented, .. }) => {
                    self.legacy.fetch_or(bit, Ordering::Relaxed);
                }
                other => return other.map(drop),
            }
        }
        let request = StateChangeEvent {
            event: event as i32,
            pod: Some(pod.clone()),
            container: container.cloned(),
        };
        match self.call::<Empty>("StateChange", &request).await {
            // It has subscribed to what it cannot be told of.
            Err(connection::Error::Refused { code: Code::Unimplemented, .. }) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Tells it everything, in as many messages as it takes.
    pub(super) async fn synchronize(
        &self,
        pods: Vec<PodSandbox>,
        containers: Vec<Container>,
    ) -> Result<SynchronizeResponse, Error> {
        let room = Connection::room("Synchronize") - MORE;
        let chunks = chunks(pods, containers, room)?;
        let last = chunks.len() - 1;
        for (number, mut request) in chunks.into_iter().enumerate() {
            request.more = number != last;
            let answer: SynchronizeResponse = self
                .connection
                .call("Synchronize", &request, self.join_limit)
                .await
                .map_err(|source| Error::Call { method: "Synchronize", source })?;
            if !request.more {
                return Ok(answer);
            }
            if !answer.more || !answer.update.is_empty() {
                return Err(Error::Whole);
            }
        }
        Ok(SynchronizeResponse::default())
    }

    /// Says that the runtime ends, and ends it if it is ours.
    pub(super) async fn shut_down(&self, within: Duration) {
        let _ = self.connection.call::<Empty>("Shutdown", &Empty {}, within).await;
        self.close();
        if let Some(process) = &self.process {
            process.end(within).await;
        }
    }
}

fn registration(call: &Incoming, launched: Option<&Launched>) -> Result<(String, String), Error> {
    if call.method != "RegisterPlugin" {
        return Err(Error::Unregistered(call.method.clone()));
    }
    let request = RegisterPluginRequest::decode(&call.payload[..]).map_err(Error::Registration)?;
    match launched {
        // Its file says who it is.
        Some(launched) => Ok((launched.index.clone(), launched.name.clone())),
        None => {
            check(&request.plugin_idx, &request.plugin_name)?;
            Ok((request.plugin_idx, request.plugin_name))
        }
    }
}

/// Cuts the state into messages of at most `room` bytes; at least one.
fn chunks(
    pods: Vec<PodSandbox>,
    containers: Vec<Container>,
    room: usize,
) -> Result<Vec<SynchronizeRequest>, Error> {
    let mut out = vec![SynchronizeRequest::default()];
    let mut left = room;
    // Tag, and length of up to 4 MiB.
    let size = |length: usize| length + 5;
    let mut fit = |out: &mut Vec<SynchronizeRequest>, what, id: &str, size: usize| {
        if size > room {
            return Err(Error::TooLarge { what, id: id.to_owned() });
        }
        if size > left {
            out.push(SynchronizeRequest::default());
            left = room;
        }
        left -= size;
        Ok(())
    };
    for pod in pods {
        fit(&mut out, "pod", &pod.id, size(pod.encoded_len()))?;
        out.last_mut().expect("never empty").pods.push(pod);
    }
    for container in containers {
        fit(&mut out, "container", &container.id, size(container.encoded_len()))?;
        out.last_mut().expect("never empty").containers.push(container);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_of_plugins() {
        assert_eq!(parse_name("10-a-b.c").unwrap(), ("10", "a-b.c"));
        for bad in ["", "10", "10-", "1-a", "100-a", "ab-c", "10-a b", "10-a/b"] {
            assert!(parse_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_empty_node_is_one_message() {
        assert_eq!(chunks(vec![], vec![], 100).unwrap(), [SynchronizeRequest::default()]);
        let pod = PodSandbox { id: "x".repeat(100), ..PodSandbox::default() };
        assert!(chunks(vec![pod], vec![], 100).is_err());
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_no_message_is_too_large(
            pods in prop::collection::vec(0usize..60, 0..40),
            containers in prop::collection::vec(0usize..60, 0..40),
            room in 70usize..300,
        ) {
            let pod = |n: &usize| PodSandbox { id: "p".repeat(*n), ..PodSandbox::default() };
            let container = |n: &usize| Container { id: "c".repeat(*n), ..Container::default() };
            let pods: Vec<_> = pods.iter().map(pod).collect();
            let containers: Vec<_> = containers.iter().map(container).collect();
            let chunks = chunks(pods.clone(), containers.clone(), room).unwrap();
            for chunk in &chunks {
                prop_assert!(chunk.encoded_len() <= room);
            }
            let all: Vec<_> = chunks.iter().flat_map(|c| c.pods.clone()).collect();
            prop_assert_eq!(all, pods);
            let all: Vec<_> = chunks.iter().flat_map(|c| c.containers.clone()).collect();
            prop_assert_eq!(all, containers);
        }
    }
}

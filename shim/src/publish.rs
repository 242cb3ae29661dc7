//! Events to the daemon, in order, each repeated until it is acknowledged.

use std::{collections::VecDeque, path::PathBuf, sync::Mutex, time::Duration};

use holdfast_protos::shim::{
    api::ForwardRequest,
    event::Envelope,
    protobuf::{Message, MessageField, well_known_types::any::Any},
    shim_async::{Client, EventsClient},
    ttrpc::{self, Code, context},
};
use tokio::sync::Notify;

use crate::{memory, process::lock};

/// Events that wait for a daemon that is down. Beyond it the oldest is lost; the exit records in
/// the bundles are not, and a daemon that comes back reads those.
const QUEUE_MAX: usize = 4096;

/// How long the daemon may take to acknowledge one event.
const ACKNOWLEDGE: Duration = Duration::from_secs(5);

/// First and longest pause before the daemon is called again.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The queue of events.
pub(crate) struct Events {
    namespace: String,
    /// The daemon's TTRPC socket; `None`: nobody wants to know.
    address: Option<PathBuf>,
    /// Encoded `Envelope`s: one piece of memory each.
    queue: Mutex<VecDeque<Vec<u8>>>,
    more: Notify,
    empty: Notify,
    /// The daemon lives: it has called us.
    alive: Notify,
}

impl Events {
    pub(crate) fn new(namespace: String, address: Option<PathBuf>) -> Self {
        Self {
            namespace,
            address,
            queue: Mutex::default(),
            more: Notify::new(),
            empty: Notify::new(),
            alive: Notify::new(),
        }
    }

    /// Queues an event; `name` is that of its message in `containerd.events`. (Asking the message
    /// itself would build its descriptor: some ten pages of heap.)
    pub(crate) fn send(&self, topic: &str, name: &str, event: &impl Message) {
        memory::used();
        if self.address.is_none() {
            return;
        }
        let mut any = Any::new();
        any.type_url = format!("containerd.events.{name}");
        any.value = event.write_to_bytes().unwrap_or_default();
        let mut envelope = Envelope::new();
        envelope.timestamp = crate::server::timestamp(std::time::SystemTime::now());
        envelope.namespace = self.namespace.clone();
        envelope.topic = topic.to_owned();
        envelope.event = MessageField::some(any);
        let envelope = envelope.write_to_bytes().unwrap_or_default();
        let mut queue = lock(&self.queue);
        if queue.len() == QUEUE_MAX {
            queue.pop_front();
        }
        queue.push_back(envelope);
        self.more.notify_one();
    }

    /// The daemon has called, so that it can be told what is queued.
    pub(crate) fn daemon_is_there(&self) {
        if !lock(&self.queue).is_empty() {
            self.alive.notify_one();
        }
    }

    /// Events that nobody has acknowledged yet, oldest first.
    pub(crate) fn unacknowledged(&self) -> Vec<Vec<u8>> {
        lock(&self.queue).iter().cloned().collect()
    }

    /// Puts them back in, before any other.
    pub(crate) fn restore(&self, events: Vec<Vec<u8>>) {
        lock(&self.queue).extend(events);
        self.more.notify_one();
    }

    /// Waits until all events are acknowledged, at most `deadline`.
    pub(crate) async fn flush(&self, deadline: Duration) {
        let _ = tokio::time::timeout(deadline, async {
            loop {
                let emptied = self.empty.notified();
                if lock(&self.queue).is_empty() {
                    return;
                }
                emptied.await;
            }
        })
        .await;
    }

    /// Forwards for ever.
    pub(crate) async fn run(&self) {
        let Some(address) = &self.address else { return };
        let address = format!("unix://{}", address.display());
        let mut pause = PAUSE.0;
        loop {
            while lock(&self.queue).is_empty() {
                // An idle shim keeps neither a connection nor a buffer.
                lock(&self.queue).shrink_to_fit();
                self.empty.notify_waiters();
                self.more.notified().await;
            }
            if self.forward(&address).await {
                pause = PAUSE.0;
            } else {
                // A daemon that is back calls, and need not wait for what it missed.
                let called = tokio::time::timeout(pause, self.alive.notified()).await.is_ok();
                pause = if called { PAUSE.0 } else { (pause * 2).min(PAUSE.1) };
            }
        }
    }

    /// Forwards what is queued over one connection; `false`: the daemon did not take it all.
    async fn forward(&self, address: &str) -> bool {
        let Ok(Ok(connection)) = tokio::time::timeout(ACKNOWLEDGE, Client::connect(address)).await
        else {
            return false;
        };
        let client = EventsClient::new(connection);
        loop {
            let Some(next) = lock(&self.queue).front().cloned() else { return true };
            let mut request = ForwardRequest::new();
            // One of ours can be read; should it not, the daemon says so.
            let envelope = Envelope::parse_from_bytes(&next).unwrap_or_default();
            request.envelope = MessageField::some(envelope);
            let nanos = i64::try_from(ACKNOWLEDGE.as_nanos()).unwrap_or(i64::MAX);
            let call = client.forward(context::with_timeout(nanos), &request);
            match tokio::time::timeout(ACKNOWLEDGE, call).await {
                Ok(Ok(_)) => {}
                // A daemon that cannot read the event will not learn to by repetition.
                Ok(Err(ttrpc::Error::RpcStatus(status)))
                    if matches!(status.code(), Code::INVALID_ARGUMENT | Code::UNIMPLEMENTED) => {}
                _ => return false,
            }
            let mut queue = lock(&self.queue);
            // The queue may have overflowed meanwhile.
            if queue.front() == Some(&next) {
                queue.pop_front();
            }
        }
    }
}

//! The daemon's listener for what shims tell: `containerd.services.events.ttrpc.v1.Events`.

use std::{
    convert::Infallible,
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::SystemTime,
};

use async_trait::async_trait;
use futures::Stream;
use holdfast_protos::shim::{
    api::ForwardRequest,
    events::task,
    protobuf::{Message, well_known_types::empty::Empty},
    shim_async::{Events, create_events},
    topics,
    ttrpc::{
        self, Code,
        asynchronous::{Server, TtrpcContext, transport},
    },
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::oneshot,
};

use crate::client::time;

/// Something that happened in a shim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A container was made.
    Create {
        /// Container.
        id: String,
        /// Host pid of its first process.
        pid: u32,
    },
    /// A container was started.
    Start {
        /// Container.
        id: String,
        /// Host pid of its first process.
        pid: u32,
    },
    /// A process ended. May be told more than once.
    Exit {
        /// Container.
        container_id: String,
        /// The exec, or the container's own id for its first process.
        id: String,
        /// Its host pid.
        pid: u32,
        /// Code, or 128 + signal.
        status: u32,
        /// When.
        at: SystemTime,
    },
    /// The kernel killed a process of the container for want of memory.
    Oom {
        /// Container.
        container_id: String,
    },
    /// A container was deleted.
    Delete {
        /// Container.
        id: String,
        /// Host pid of its first process.
        pid: u32,
        /// Code, or 128 + signal.
        status: u32,
        /// When it ended.
        at: SystemTime,
    },
    /// An exec was registered.
    ExecAdded {
        /// Container.
        container_id: String,
        /// Exec.
        exec_id: String,
    },
    /// An exec was started.
    ExecStarted {
        /// Container.
        container_id: String,
        /// Exec.
        exec_id: String,
        /// Its host pid.
        pid: u32,
    },
    /// A container was frozen.
    Paused {
        /// Container.
        id: String,
    },
    /// A container was thawed.
    Resumed {
        /// Container.
        id: String,
    },
    /// A checkpoint was written.
    Checkpointed {
        /// Container.
        id: String,
        /// Where to.
        path: String,
    },
    /// Any other topic.
    Other(String),
}

impl Event {
    /// The event of a topic and its message.
    fn parse(topic: &str, value: &[u8]) -> Result<Self, ttrpc::Error> {
        fn read<M: Message>(value: &[u8]) -> Result<M, ttrpc::Error> {
            M::parse_from_bytes(value).map_err(|error| {
                ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INVALID_ARGUMENT, error))
            })
        }
        Ok(match topic {
            topics::TASK_CREATE_EVENT_TOPIC => {
                let e: task::TaskCreate = read(value)?;
                Event::Create { id: e.container_id, pid: e.pid }
            }
            topics::TASK_START_EVENT_TOPIC => {
                let e: task::TaskStart = read(value)?;
                Event::Start { id: e.container_id, pid: e.pid }
            }
            topics::TASK_EXIT_EVENT_TOPIC => {
                let e: task::TaskExit = read(value)?;
                let at = time(&e.exited_at);
                Event::Exit {
                    container_id: e.container_id,
                    id: e.id,
                    pid: e.pid,
                    status: e.exit_status,
                    at,
                }
            }
            topics::TASK_OOM_EVENT_TOPIC => {
                let e: task::TaskOOM = read(value)?;
                Event::Oom { container_id: e.container_id }
            }
            topics::TASK_DELETE_EVENT_TOPIC => {
                let e: task::TaskDelete = read(value)?;
                let at = time(&e.exited_at);
                Event::Delete { id: e.container_id, pid: e.pid, status: e.exit_status, at }
            }
            topics::TASK_EXEC_ADDED_EVENT_TOPIC => {
                let e: task::TaskExecAdded = read(value)?;
                Event::ExecAdded { container_id: e.container_id, exec_id: e.exec_id }
            }
            topics::TASK_EXEC_STARTED_EVENT_TOPIC => {
                let e: task::TaskExecStarted = read(value)?;
                Event::ExecStarted { container_id: e.container_id, exec_id: e.exec_id, pid: e.pid }
            }
            topics::TASK_PAUSED_EVENT_TOPIC => {
                let e: task::TaskPaused = read(value)?;
                Event::Paused { id: e.container_id }
            }
            topics::TASK_RESUMED_EVENT_TOPIC => {
                let e: task::TaskResumed = read(value)?;
                Event::Resumed { id: e.container_id }
            }
            topics::TASK_CHECKPOINTED_EVENT_TOPIC => {
                let e: task::TaskCheckpointed = read(value)?;
                Event::Checkpointed { id: e.container_id, path: e.checkpoint }
            }
            other => Event::Other(other.to_owned()),
        })
    }
}

/// Serves the Events service until the future is dropped. `sink` gets the containerd namespace and
/// the event; only when it answers `true` is the shim told that the event has arrived, else the
/// shim repeats it. Events of one shim come in order, one at a time.
///
/// # Errors
/// The listener cannot be served.
pub async fn serve<F, Fut>(listener: UnixListener, sink: F) -> io::Result<()>
where
    F: Fn(String, Event) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = bool> + Send + 'static,
{
    let service = create_events(Arc::new(Sink(move |namespace, event| {
        Box::pin(sink(namespace, event)) as Pin<Box<dyn Future<Output = bool> + Send>>
    })));
    let (serving, ended) = oneshot::channel();
    let mut server = Server::new()
        .register_service(service)
        .add_listener(transport::Listener::new(Incoming { listener, ended }));
    server.start().await.map_err(io::Error::other)?;
    let _stop = Stop { server: Some(server), _serving: serving };
    std::future::pending::<()>().await;
    Ok(())
}

/// Accepts until the other end of `ended` is gone.
struct Incoming {
    listener: UnixListener,
    ended: oneshot::Receiver<Infallible>,
}

impl Stream for Incoming {
    type Item = io::Result<UnixStream>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { listener, ended } = self.get_mut();
        if Pin::new(ended).poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        listener.poll_accept(cx).map(|accepted| Some(accepted.map(|(stream, _)| stream)))
    }
}

/// Ends the accept task and the connections, which ttrpc spawns detached, when `serve` is dropped.
///
/// Not by `Server::shutdown`: it asks the accept task for its listener and panics when that is gone, as
/// it may be at any time while the runtime ends.
struct Stop {
    server: Option<Server>,
    _serving: oneshot::Sender<Infallible>,
}

impl Drop for Stop {
    fn drop(&mut self) {
        if let (Some(mut server), Ok(runtime)) =
            (self.server.take(), tokio::runtime::Handle::try_current())
        {
            runtime.spawn(async move { server.disconnect().await });
        }
    }
}

struct Sink<F>(F);

#[async_trait]
impl<F> Events for Sink<F>
where
    F: Fn(String, Event) -> Pin<Box<dyn Future<Output = bool> + Send>> + Send + Sync,
{
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.into_option().unwrap_or_default();
        let value = envelope.event.as_ref().map(|any| any.value.as_slice()).unwrap_or_default();
        let event = Event::parse(&envelope.topic, value)?;
        if (self.0)(envelope.namespace, event).await {
            Ok(Empty::new())
        } else {
            Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
                Code::UNAVAILABLE,
                "the event could not be taken now",
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        panic,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    /// Tasks that ttrpc has spawned end in any order with their runtime.
    #[test]
    fn no_task_panics_when_the_runtime_ends() {
        static PANICS: AtomicUsize = AtomicUsize::new(0);
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if info.location().is_some_and(|at| at.file().contains("ttrpc")) {
                PANICS.fetch_add(1, Ordering::Relaxed);
            }
            before(info);
        }));
        let dir = tempfile::tempdir().unwrap();
        for round in 0..300 {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let path = dir.path().join(round.to_string());
                let listener = UnixListener::bind(&path).unwrap();
                let serving = tokio::spawn(serve(listener, |_, _| async { true }));
                let _client = UnixStream::connect(&path).await.unwrap();
                tokio::task::yield_now().await;
                serving.abort();
            });
            runtime.shutdown_background();
        }
        assert_eq!(PANICS.load(Ordering::Relaxed), 0);
    }
}

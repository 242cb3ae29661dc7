//! The daemon's listener for what shims tell: `containerd.services.events.ttrpc.v1.Events`.

use std::{future::Future, io, pin::Pin, sync::Arc, time::SystemTime};

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
use tokio::net::{UnixListener, UnixStream};

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
    let mut server = Server::new()
        .register_service(service)
        .add_listener(transport::Listener::new(Incoming(listener)));
    server.start().await.map_err(io::Error::other)?;
    let _stop = Stop(Some(server));
    std::future::pending::<()>().await;
    Ok(())
}

/// Accepts for ever.
struct Incoming(UnixListener);

impl Stream for Incoming {
    type Item = io::Result<UnixStream>;

    fn poll_next(
        self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.0.poll_accept(cx).map(|accepted| Some(accepted.map(|(stream, _)| stream)))
    }
}

/// Ends the accept task, which ttrpc spawns detached, when `serve` is dropped.
struct Stop(Option<Server>);

impl Drop for Stop {
    fn drop(&mut self) {
        if let (Some(mut server), Ok(runtime)) =
            (self.0.take(), tokio::runtime::Handle::try_current())
        {
            runtime.spawn(async move {
                let _ = server.shutdown().await;
            });
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

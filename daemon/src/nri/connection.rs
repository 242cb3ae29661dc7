//! A plugin's connection: calls to it, and its calls to us.
//!
//! A call has a deadline, and so has the writing of it: what a plugin does not read piles up in a short
//! queue and then in the caller's own deadline, nowhere else.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot},
};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tracing::debug;

use super::wire::{self, Decoder, Message, PLUGIN, REQUEST, RESPONSE, RUNTIME, Request, Response};

/// The service that a plugin has.
const PLUGIN_SERVICE: &str = "nri.pkg.api.v1alpha1.Plugin";
/// The service that we have.
const RUNTIME_SERVICE: &str = "nri.pkg.api.v1alpha1.Runtime";

/// Messages that wait for being written. When it is full, callers wait, within their deadlines.
const OUTGOING: usize = 16;

/// Calls of the plugin that wait for being answered. When it is full, the plugin is not read any more,
/// which harms nobody else.
const INCOMING: usize = 16;

/// Bytes that are read at a time.
const PIECE: usize = 64 << 10;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection is closed.
    #[error("its connection is closed")]
    Closed,
    /// It did not answer in time.
    #[error("no answer to {method} within {limit:?}")]
    Timeout {
        /// What was called.
        method: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// What is to be sent is too large.
    #[error("{method} cannot be sent")]
    Send {
        /// What was called.
        method: &'static str,
        /// Why.
        source: wire::Error,
    },
    /// The answer cannot be read.
    #[error("answer to {method}")]
    Answer {
        /// What was called.
        method: &'static str,
        /// Why.
        source: prost::DecodeError,
    },
    /// It says no.
    #[error("{message}")]
    Refused {
        /// A gRPC code.
        code: Code,
        /// Its own words.
        message: String,
    },
}

impl Error {
    /// Whether the plugin is of no use any more. What it refuses is its right.
    pub(super) fn is_fatal(&self) -> bool {
        match self {
            Error::Closed | Error::Timeout { .. } | Error::Answer { .. } => true,
            Error::Send { .. } | Error::Refused { .. } => false,
        }
    }
}

/// A call of the plugin to our service.
#[derive(Debug)]
pub(super) struct Incoming {
    /// "RegisterPlugin" or "UpdateContainers".
    pub(super) method: String,
    /// The encoded request.
    pub(super) payload: Vec<u8>,
    stream: u32,
    shared: Arc<Shared>,
}

impl Incoming {
    /// Answers it.
    pub(super) async fn answer(self, response: Response) {
        answer(&self.shared, self.stream, &response).await;
    }
}

async fn answer(shared: &Shared, stream: u32, response: &Response) {
    let message = Message { stream, kind: RESPONSE, data: response.encode_to_vec() };
    let bytes = message.encode(RUNTIME).or_else(|error| {
        let response = Response::failed(Code::ResourceExhausted, error.to_string());
        Message { stream, kind: RESPONSE, data: response.encode_to_vec() }.encode(RUNTIME)
    });
    if let Ok(bytes) = bytes {
        // Closed: nobody waits for it.
        let _ = shared.out.send(bytes).await;
    }
}

#[derive(Debug, Default)]
struct Calls {
    last: u32,
    waiting: HashMap<u32, oneshot::Sender<Response>>,
}

#[derive(Debug)]
struct Shared {
    out: mpsc::Sender<Vec<u8>>,
    calls: Mutex<Calls>,
    closed: CancellationToken,
}

impl Shared {
    fn calls(&self) -> std::sync::MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A connection. It is closed when this is dropped.
#[derive(Debug)]
pub(super) struct Connection {
    shared: Arc<Shared>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

/// Takes a call off the list however its waiting ends.
struct Waiting<'a> {
    shared: &'a Shared,
    stream: u32,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.shared.calls().waiting.remove(&self.stream);
    }
}

impl Connection {
    /// Speaks over `stream`. The plugin's calls come out of the receiver.
    pub(super) fn new(stream: UnixStream) -> (Self, mpsc::Receiver<Incoming>) {
        let (out, outgoing) = mpsc::channel(OUTGOING);
        let (calls, incoming) = mpsc::channel(INCOMING);
        let closed = CancellationToken::new();
        let shared = Arc::new(Shared { out, calls: Mutex::default(), closed: closed.clone() });
        let (read, write) = stream.into_split();
        let reader = shared.clone();
        tokio::spawn(async move {
            let done = closed.clone();
            tokio::select! {
                // The order to close first: then nothing that is still read matters.
                biased;
                () = done.cancelled() => {}
                () = self::write(write, outgoing) => {}
                () = self::read(read, reader.clone(), calls) => {}
            }
            closed.cancel();
            // Whoever waits for an answer learns that there is none.
            reader.calls().waiting.clear();
        });
        (Self { shared }, incoming)
    }

    /// Ends it. What waits for an answer gets [`Error::Closed`].
    pub(super) fn close(&self) {
        self.shared.closed.cancel();
    }

    /// Whether it has ended.
    pub(super) fn is_closed(&self) -> bool {
        self.shared.closed.is_cancelled()
    }

    /// Waits for its end.
    pub(super) async fn closed(&self) {
        self.shared.closed.cancelled().await;
    }

    /// The largest request of that method.
    pub(super) fn room(method: &str) -> usize {
        wire::room(PLUGIN_SERVICE, method)
    }

    /// Calls the plugin.
    pub(super) async fn call<R: prost::Message + Default>(
        &self,
        method: &'static str,
        request: &impl prost::Message,
        limit: Duration,
    ) -> Result<R, Error> {
        let envelope = Request {
            service: PLUGIN_SERVICE.to_owned(),
            method: method.to_owned(),
            payload: request.encode_to_vec(),
            timeout_nano: i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX),
        };
        let mut message = Message { stream: 0, kind: REQUEST, data: envelope.encode_to_vec() };
        let asked = async {
            let place = self.shared.out.reserve().await.map_err(|_| Error::Closed)?;
            let (sender, answer) = oneshot::channel();
            let _waiting = {
                let mut calls = self.shared.calls();
                // A client's streams are odd, and each is greater than those sent before it.
                let stream = calls.last.checked_add(if calls.last == 0 { 1 } else { 2 });
                message.stream = stream.ok_or(Error::Closed)?;
                let bytes = message.encode(PLUGIN);
                let bytes = bytes.map_err(|source| Error::Send { method, source })?;
                calls.last = message.stream;
                calls.waiting.insert(message.stream, sender);
                place.send(bytes);
                Waiting { shared: &self.shared, stream: message.stream }
            };
            // Looked at after the call is on the list, which is emptied when the connection ends.
            if self.is_closed() {
                return Err(Error::Closed);
            }
            answer.await.map_err(|_| Error::Closed)
        };
        let response = tokio::time::timeout(limit, asked)
            .await
            .map_err(|_| Error::Timeout { method, limit })??;
        match response.status {
            Some(status) if status.code != 0 => {
                let code = Code::from_i32(status.code);
                Err(Error::Refused { code, message: status.message })
            }
            _ => {
                R::decode(&response.payload[..]).map_err(|source| Error::Answer { method, source })
            }
        }
    }
}

async fn write(mut stream: OwnedWriteHalf, mut outgoing: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = outgoing.recv().await {
        if let Err(error) = stream.write_all(&bytes).await {
            debug!(%error, "write to a plugin");
            return;
        }
    }
}

async fn read(mut stream: OwnedReadHalf, shared: Arc<Shared>, calls: mpsc::Sender<Incoming>) {
    let mut decoder = Decoder::default();
    let mut piece = vec![0; PIECE];
    loop {
        let length = match stream.read(&mut piece).await {
            Ok(0) => return,
            Ok(length) => length,
            Err(error) => {
                debug!(%error, "read from a plugin");
                return;
            }
        };
        let mut requests = Vec::new();
        let fed = decoder.feed(&piece[..length], |channel, message| match channel {
            PLUGIN if message.kind == RESPONSE => {
                let Ok(response) = Response::decode(&message.data[..]) else {
                    debug!("an answer without an envelope");
                    return;
                };
                // None waits: its deadline has passed.
                if let Some(waiting) = shared.calls().waiting.remove(&message.stream) {
                    let _ = waiting.send(response);
                }
            }
            RUNTIME if message.kind == REQUEST => requests.push(message),
            _ => debug!(channel, kind = message.kind, "a message that has no meaning here"),
        });
        for message in requests {
            let stream = message.stream;
            match Request::decode(&message.data[..]) {
                Ok(request) if request.service == RUNTIME_SERVICE => {
                    let (method, payload) = (request.method, request.payload);
                    let call = Incoming { method, payload, stream, shared: shared.clone() };
                    // Nobody takes calls any more: the connection is about to be closed.
                    let _ = calls.send(call).await;
                }
                Ok(request) => {
                    let text = format!("there is no service {:?} here", request.service);
                    let response = Response::failed(Code::Unimplemented, text);
                    answer(&shared, stream, &response).await;
                }
                Err(error) => {
                    let response = Response::failed(Code::InvalidArgument, error.to_string());
                    answer(&shared, stream, &response).await;
                }
            }
        }
        if let Err(error) = fed {
            debug!(%error, "a plugin speaks something else");
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use holdfast_protos::nri;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// The plugin's end: reads one message.
    async fn message(stream: &mut UnixStream) -> (u32, Message) {
        let mut decoder = Decoder::default();
        let mut got = None;
        while got.is_none() {
            // One byte at a time, so that nothing of the next one is taken.
            let byte = stream.read_u8().await.unwrap();
            decoder.feed(&[byte], |channel, message| got = Some((channel, message))).unwrap();
        }
        got.unwrap()
    }

    async fn respond(stream: &mut UnixStream, to: u32, response: &Response) {
        let message = Message { stream: to, kind: RESPONSE, data: response.encode_to_vec() };
        stream.write_all(&message.encode(PLUGIN).unwrap()).await.unwrap();
    }

    #[tokio::test]
    async fn answers_find_their_calls_in_any_order() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (connection, _calls) = Connection::new(ours);
        let plugin = tokio::spawn(async move {
            let (_, first) = message(&mut theirs).await;
            let (_, second) = message(&mut theirs).await;
            assert_eq!((first.stream, second.stream), (1, 3));
            for (message, events) in [(second, 7), (first, 5)] {
                let answer = nri::ConfigureResponse { events };
                respond(&mut theirs, message.stream, &Response::of(&answer)).await;
            }
            theirs
        });
        let request = nri::ConfigureRequest::default();
        let (one, two) = tokio::join!(
            connection.call::<nri::ConfigureResponse>("Configure", &request, LIMIT),
            connection.call::<nri::ConfigureResponse>("Configure", &request, LIMIT),
        );
        assert_eq!((one.unwrap().events, two.unwrap().events), (5, 7));
        drop(plugin.await.unwrap());
    }

    #[tokio::test]
    async fn a_refusal_is_told_and_silence_ends() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (connection, _calls) = Connection::new(ours);
        let request = nri::Empty {};
        let silent = connection
            .call::<nri::Empty>("Shutdown", &request, Duration::from_millis(20))
            .await
            .unwrap_err();
        assert!(silent.is_fatal(), "{silent}");
        let _ = message(&mut theirs).await;
        let call = connection.call::<nri::Empty>("Shutdown", &request, LIMIT);
        let plugin = async {
            let (_, asked) = message(&mut theirs).await;
            // Of a call that nobody waits for any more.
            respond(&mut theirs, 1, &Response::of(&nri::Empty {})).await;
            respond(&mut theirs, asked.stream, &Response::failed(Code::Aborted, "not now")).await;
        };
        let (refused, ()) = tokio::join!(call, plugin);
        let refused = refused.unwrap_err();
        assert!(!refused.is_fatal());
        assert_eq!(refused.to_string(), "not now");
        drop(theirs);
        let closed = connection.call::<nri::Empty>("Shutdown", &request, LIMIT).await.unwrap_err();
        assert!(matches!(closed, Error::Closed), "{closed}");
        assert!(connection.shared.calls().waiting.is_empty());
    }

    #[tokio::test]
    async fn a_plugin_that_does_not_read_costs_its_caller_the_deadline_alone() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (connection, _calls) = Connection::new(ours);
        let request = nri::ConfigureRequest { config: "x".repeat(1 << 20), ..Default::default() };
        let limit = Duration::from_millis(10);
        for _ in 0..2 * OUTGOING {
            let error = connection.call::<nri::Empty>("Configure", &request, limit).await;
            assert!(matches!(error, Err(Error::Timeout { .. })));
        }
        drop(theirs);
    }

    #[tokio::test]
    async fn calls_of_the_plugin_are_answered() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (_connection, mut calls) = Connection::new(ours);
        let send = |service: &str, stream| {
            let request = Request {
                service: service.to_owned(),
                method: "RegisterPlugin".into(),
                ..Default::default()
            };
            Message { stream, kind: REQUEST, data: request.encode_to_vec() }
                .encode(RUNTIME)
                .unwrap()
        };
        let bytes = [send("who", 1), send(RUNTIME_SERVICE, 3)].concat();
        theirs.write_all(&bytes).await.unwrap();
        let call = calls.recv().await.unwrap();
        assert_eq!(call.method, "RegisterPlugin");
        call.answer(Response::of(&nri::Empty {})).await;
        let (channel, answer) = message(&mut theirs).await;
        let response = Response::decode(&answer.data[..]).unwrap();
        assert_eq!((channel, answer.stream), (RUNTIME, 1));
        assert_eq!(response.status.unwrap().code, Code::Unimplemented as i32);
        let (_, answer) = message(&mut theirs).await;
        assert_eq!((answer.stream, Response::decode(&answer.data[..]).unwrap().status), (3, None));
    }
}

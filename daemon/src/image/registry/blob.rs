//! A blob as an ordered stream of bytes.
//!
//! ```text
//! |--- front: given as it comes ---|--- ahead: put aside ---|--- ahead ---|     not asked for yet
//! ```
//! A large blob is asked for in parts, by ranges, if its server knows them. While the reader waits
//! for the network more than it works, as where each connection is slow, parts ahead are asked for
//! too, on connections of their own; what comes of them is put aside, within a budget for all pulls
//! together. A reader that is slower than the network, and a server that knows no ranges, get one
//! connection. Parts ahead are only read while the reader waits: then there is nothing else to do.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{Stream, StreamExt, stream::BoxStream};
use http_body_util::BodyExt;
use hyper::{
    Method, StatusCode,
    body::Incoming,
    header::{self, HeaderMap, HeaderValue},
};
use tokio::sync::OwnedSemaphorePermit;
use url::Url;

use super::{Error, PROGRESS, Remote, SLOWEST, protocol, show};
use crate::id::Digest;

/// Bytes of a part that is asked for beside others.
const PART: u64 = 8 << 20;

/// Parts ahead of all blobs that are on their way: 48 MiB put aside at most.
pub(super) const BUDGET: usize = 6;

/// Parts of one blob at a time.
const PARTS: usize = 4;

/// A blob that is smaller is asked for as a whole.
const LARGE: u64 = 2 * PART;

/// Bytes in one go where the network is not what is waited for.
const STRETCH: u64 = 8 * PART;

/// Bytes since a connection was made that make its end no failure: it is made anew at once.
const ENOUGH: u64 = 1 << 20;

/// A blob on its way. A connection that breaks is made anew and goes on where it broke.
pub struct Blob<'a> {
    remote: &'a Remote,
    digest: Digest,
    size: u64,
    /// Where the next part begins.
    next: u64,
    parts: VecDeque<Ahead<'a>>,
    /// The server gave a part of the blob when it was asked for one.
    ranges: Arc<AtomicBool>,
    /// Time that the reader waited for bytes, and worked on them, since the last look.
    waited: Duration,
    worked: Duration,
    returned: Option<Instant>,
}

/// A part with what of it is here.
struct Ahead<'a> {
    stream: BoxStream<'a, Result<Bytes, Error>>,
    here: VecDeque<Bytes>,
    ended: bool,
    error: Option<Error>,
    _room: Option<OwnedSemaphorePermit>,
}

impl<'a> Blob<'a> {
    pub(super) fn new(remote: &'a Remote, digest: &Digest, size: u64) -> Self {
        Self {
            remote,
            digest: digest.clone(),
            size,
            next: 0,
            parts: VecDeque::new(),
            ranges: Arc::default(),
            waited: Duration::ZERO,
            worked: Duration::ZERO,
            returned: None,
        }
    }

    /// The next piece, or `None` after `size` bytes.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let begun = Instant::now();
        if let Some(returned) = self.returned {
            self.worked += begun - returned;
        }
        self.go_on();
        let piece = std::future::poll_fn(|context| self.poll(context)).await;
        let now = Instant::now();
        self.waited += now - begun;
        self.returned = Some(now);
        piece
    }

    /// Asks for what should be on its way now.
    fn go_on(&mut self) {
        if self.next == self.size {
            return;
        }
        if self.next == 0 {
            // Whether there are ranges is seen by the answer to this.
            let end = if self.size < LARGE { self.size } else { PART };
            return self.ask(end, None);
        }
        if !self.ranges.load(Ordering::Relaxed) {
            return;
        }
        let starved = self.waited > self.worked;
        if !starved {
            if self.parts.is_empty() {
                self.ask((self.next + STRETCH).min(self.size), None);
            }
            return;
        }
        while self.parts.len() < PARTS && self.next < self.size {
            let room = self.remote.registries.ahead.clone().try_acquire_owned().ok();
            if room.is_none() && !self.parts.is_empty() {
                break;
            }
            self.ask((self.next + PART).min(self.size), room);
        }
    }

    fn ask(&mut self, end: u64, room: Option<OwnedSemaphorePermit>) {
        let part = Part {
            remote: self.remote,
            digest: self.digest.clone(),
            size: self.size,
            end,
            offset: self.next,
            first: self.next == 0,
            ranges: self.ranges.clone(),
            open: None,
            attempts: 0,
            since_failure: 0,
            pace: Pace::default(),
        };
        let stream = futures::stream::unfold(Some(part), |part: Option<Part<'a>>| async move {
            let mut part = part?;
            match part.next().await {
                Ok(Some(piece)) => Some((Ok(piece), Some(part))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        });
        self.next = end;
        self.parts.push_back(Ahead {
            stream: stream.boxed(),
            here: VecDeque::new(),
            ended: false,
            error: None,
            _room: room,
        });
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Error>> {
        loop {
            let Some((front, ahead)) = self.parts.make_contiguous().split_first_mut() else {
                return Poll::Ready(Ok(None));
            };
            // The others first: what they have is to be taken while the front is waited for.
            for part in ahead {
                part.fill(context);
            }
            if let Some(piece) = front.here.pop_front() {
                return Poll::Ready(Ok(Some(piece)));
            }
            if let Some(error) = front.error.take() {
                return Poll::Ready(Err(error));
            }
            if !front.ended {
                match Pin::new(&mut front.stream).poll_next(context) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Some(piece)) => return Poll::Ready(piece.map(Some)),
                    Poll::Ready(None) => {}
                }
            }
            self.parts.pop_front();
            if self.next < self.size {
                if self.ranges.load(Ordering::Relaxed) {
                    self.go_on();
                } else {
                    // The first part was all of it.
                    self.next = self.size;
                }
                // How it is from now on, and not how it was at the beginning.
                self.waited /= 2;
                self.worked /= 2;
            }
        }
    }
}

impl Ahead<'_> {
    /// Puts aside what is there.
    fn fill(&mut self, context: &mut Context<'_>) {
        while !self.ended && self.error.is_none() {
            match Pin::new(&mut self.stream).poll_next(context) {
                Poll::Pending => return,
                Poll::Ready(Some(Ok(piece))) => self.here.push_back(piece),
                Poll::Ready(Some(Err(error))) => self.error = Some(error),
                Poll::Ready(None) => self.ended = true,
            }
        }
    }
}

/// Bytes of a blob from `offset` to `end`, by one connection at a time.
struct Part<'a> {
    remote: &'a Remote,
    digest: Digest,
    /// Of the blob.
    size: u64,
    /// Moves to `size` if the server gives all of the blob instead of the first part.
    end: u64,
    offset: u64,
    first: bool,
    ranges: Arc<AtomicBool>,
    open: Option<Open>,
    /// Without [`PROGRESS`] in between.
    attempts: u32,
    since_failure: u64,
    pace: Pace,
}

struct Open {
    body: Incoming,
    url: Url,
    /// Bytes that the server sends again, as it knows no ranges.
    skip: u64,
    /// It is all of the blob.
    whole: bool,
}

/// Time spent waiting for bytes, and bytes that came.
#[derive(Default)]
struct Pace {
    waited: Duration,
    bytes: u64,
}

impl Part<'_> {
    /// The next piece, or `None` at the end of the part.
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if self.offset == self.end {
                return Ok(None);
            }
            if self.open.is_none() {
                let open = self.connect().await?;
                if self.first && self.offset == 0 {
                    self.ranges.store(!open.whole, Ordering::Relaxed);
                    if open.whole {
                        self.end = self.size;
                    }
                }
                self.open = Some(open);
                self.pace = Pace::default();
            }
            let stall = self.remote.registries.config.stall_timeout;
            let open = self.open.as_mut().expect("opened above");
            let url = &open.url;
            let broken = |source| Error::Connect { url: show(url), source };
            let begun = Instant::now();
            let frame =
                tokio::time::timeout(stall.saturating_sub(self.pace.waited), open.body.frame());
            let error = match frame.await {
                Ok(Some(Ok(frame))) => {
                    let Ok(mut data) = frame.into_data() else { continue };
                    self.pace.waited += begun.elapsed();
                    self.pace.bytes += data.len() as u64;
                    let again = open.skip.min(data.len() as u64);
                    open.skip -= again;
                    let _ = data.split_to(again as usize);
                    if data.is_empty() {
                        continue;
                    }
                    let left = self.end - self.offset;
                    if data.len() as u64 > left {
                        if !open.whole || self.end == self.size {
                            return Err(Error::TooLarge { url: show(url), limit: self.size });
                        }
                        // The rest is of other parts.
                        data.truncate(left as usize);
                    }
                    let too_slow = self.pace.waited >= stall / 2
                        && self.pace.bytes < SLOWEST * (stall.as_secs() / 2).max(1);
                    if !too_slow {
                        if self.pace.waited >= stall / 2 {
                            self.pace = Pace::default();
                        }
                        self.offset += data.len() as u64;
                        self.since_failure += data.len() as u64;
                        if self.since_failure >= PROGRESS {
                            self.attempts = 0;
                        }
                        return Ok(Some(data));
                    }
                    Error::Stalled { url: show(url), after: stall / 2 }
                }
                Ok(Some(Err(error))) => broken(error.into()),
                Ok(None) => broken(
                    format!("the body ends after {} of {} bytes", self.offset, self.size).into(),
                ),
                Err(_) => Error::Stalled { url: show(url), after: stall },
            };
            self.open = None;
            let enough = std::mem::take(&mut self.since_failure) >= ENOUGH;
            if enough && matches!(error, Error::Connect { .. }) {
                // Proxies that end each connection after so many bytes, or so long.
                tracing::debug!(error = crate::error::chain(&error), "layer goes on");
                continue;
            }
            self.attempts += 1;
            self.remote.wait_or_fail(error, self.attempts).await?;
        }
    }

    async fn connect(&self) -> Result<Open, Error> {
        let (remote, offset, end, size) = (self.remote, self.offset, self.end, self.size);
        let digest = self.digest.to_string();
        let digest = &digest;
        remote
            .first(false, "pull", |server| {
                let digest = digest.clone();
                Box::pin(async move {
                    let url = remote.url(server, "blobs", &digest);
                    let mut headers = HeaderMap::new();
                    let range = match (offset, end == size) {
                        (0, true) => None,
                        (_, true) => Some(format!("bytes={offset}-")),
                        (_, false) => Some(format!("bytes={offset}-{}", end - 1)),
                    };
                    if let Some(range) = range {
                        let range = HeaderValue::from_str(&range).expect("digits");
                        headers.insert(header::RANGE, range);
                    }
                    let response = remote.retried(server, Method::GET, &url, headers).await?;
                    let whole = response.status() != StatusCode::PARTIAL_CONTENT;
                    if whole {
                        let length = response.headers().get(header::CONTENT_LENGTH);
                        let length: Option<u64> =
                            length.and_then(|v| v.to_str().ok()?.parse().ok());
                        if length.is_some_and(|length| length > size) {
                            return Err(Error::TooLarge { url: show(&url), limit: size });
                        }
                    } else {
                        let starts = response
                            .headers()
                            .get(header::CONTENT_RANGE)
                            .and_then(|value| value.to_str().ok())
                            .is_some_and(|v| v.starts_with(&format!("bytes {offset}-")));
                        if !starts {
                            return Err(protocol(&url, "it sent another range than asked for"));
                        }
                    }
                    let skip = if whole { offset } else { 0 };
                    Ok(Open { body: response.into_body(), url, skip, whole })
                })
            })
            .await
    }
}

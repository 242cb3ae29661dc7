//! A blob as an ordered stream of bytes.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::{
    Method, StatusCode,
    body::Incoming,
    header::{self, HeaderMap, HeaderValue},
};
use url::Url;

use super::{Error, PROGRESS, Remote, SLOWEST, protocol, show};
use crate::id::Digest;

/// A blob on its way. A connection that breaks is made anew and goes on where it broke.
pub struct Blob<'a> {
    remote: &'a Remote,
    digest: Digest,
    size: u64,
    offset: u64,
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
}

/// Time spent waiting for bytes, and bytes that came.
#[derive(Default)]
struct Pace {
    waited: Duration,
    bytes: u64,
}

impl<'a> Blob<'a> {
    pub(super) fn new(remote: &'a Remote, digest: &Digest, size: u64) -> Self {
        Self {
            remote,
            digest: digest.clone(),
            size,
            offset: 0,
            open: None,
            attempts: 0,
            since_failure: 0,
            pace: Pace::default(),
        }
    }

    /// The next piece, or `None` after `size` bytes.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if self.offset == self.size {
                return Ok(None);
            }
            if self.open.is_none() {
                self.open = Some(self.connect().await?);
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
                    if data.len() as u64 > self.size - self.offset {
                        return Err(Error::TooLarge { url: show(url), limit: self.size });
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
            self.since_failure = 0;
            self.attempts += 1;
            self.remote.wait_or_fail(error, self.attempts).await?;
        }
    }

    async fn connect(&self) -> Result<Open, Error> {
        let (remote, offset) = (self.remote, self.offset);
        let digest = self.digest.to_string();
        let (digest, size) = (&digest, self.size);
        remote
            .first(false, "pull", |server| {
                let digest = digest.clone();
                Box::pin(async move {
                    let url = remote.url(server, "blobs", &digest);
                    let mut headers = HeaderMap::new();
                    if offset > 0 {
                        let range = HeaderValue::from_str(&format!("bytes={offset}-"));
                        headers.insert(header::RANGE, range.expect("digits"));
                    }
                    let response = remote.retried(server, Method::GET, &url, headers).await?;
                    let skip = match response.status() {
                        StatusCode::PARTIAL_CONTENT => {
                            let starts = response
                                .headers()
                                .get(header::CONTENT_RANGE)
                                .and_then(|value| value.to_str().ok())
                                .is_some_and(|v| v.starts_with(&format!("bytes {offset}-")));
                            if !starts {
                                return Err(protocol(&url, "it sent another range than asked for"));
                            }
                            0
                        }
                        _ => {
                            let length = response.headers().get(header::CONTENT_LENGTH);
                            let length: Option<u64> =
                                length.and_then(|v| v.to_str().ok()?.parse().ok());
                            if length.is_some_and(|length| length > size) {
                                return Err(Error::TooLarge { url: show(&url), limit: size });
                            }
                            offset
                        }
                    };
                    Ok(Open { body: response.into_body(), url, skip })
                })
            })
            .await
    }
}

//! Tokens: what the CRI call hands out and the HTTP request brings back, once and soon.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::TryRngCore as _;

/// Random bits of a token: 192, so that none can be guessed however long one tries.
const BYTES: usize = 24;

struct Entry<T> {
    value: T,
    expires: Instant,
}

/// Outstanding requests by token.
pub(crate) struct Tokens<T> {
    entries: Mutex<HashMap<String, Entry<T>>>,
    ttl: Duration,
    limit: usize,
}

/// As many tokens are outstanding as may be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl<T> Tokens<T> {
    pub(crate) fn new(ttl: Duration, limit: usize) -> Self {
        Self { entries: Mutex::default(), ttl, limit }
    }

    /// Keeps `value` and returns the token that gets it back, once, within the time to live.
    pub(crate) fn insert(&self, value: T, now: Instant) -> Result<String, Full> {
        let mut random = [0; BYTES];
        rand::rngs::OsRng
            .try_fill_bytes(&mut random)
            .expect("the kernel's getrandom does not fail");
        let token = URL_SAFE_NO_PAD.encode(random);
        let mut entries = self.lock();
        if entries.len() >= self.limit {
            entries.retain(|_, entry| entry.expires > now);
        }
        if entries.len() >= self.limit {
            return Err(Full);
        }
        entries.insert(token.clone(), Entry { value, expires: now + self.ttl });
        Ok(token)
    }

    /// What `look` makes of a token's value, if there is one. The token stays good.
    pub(crate) fn peek<R>(
        &self,
        token: &str,
        now: Instant,
        look: impl FnOnce(&T) -> R,
    ) -> Option<R> {
        let entries = self.lock();
        let entry = entries.get(token).filter(|entry| entry.expires > now)?;
        Some(look(&entry.value))
    }

    /// Uses a token up.
    pub(crate) fn take(&self, token: &str, now: Instant) -> Option<T> {
        let entry = self.lock().remove(token)?;
        (entry.expires > now).then_some(entry.value)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry<T>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(60);

    #[test]
    fn a_token_is_good_once() {
        let tokens = Tokens::new(TTL, 10);
        let now = Instant::now();
        let token = tokens.insert("value", now).unwrap();
        assert!(
            token.len() >= 22
                && token.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c))
        );
        assert_eq!(tokens.peek(&token, now, |value| value.len()), Some(5));
        assert_eq!(tokens.take(&token, now), Some("value"));
        assert_eq!(tokens.take(&token, now), None);
        assert_eq!(tokens.peek(&token, now, |_| ()), None);
    }

    #[test]
    fn a_token_expires() {
        let tokens = Tokens::new(TTL, 10);
        let now = Instant::now();
        let (first, second) = (tokens.insert(1, now).unwrap(), tokens.insert(2, now).unwrap());
        assert_eq!(tokens.take(&first, now + TTL - Duration::from_millis(1)), Some(1));
        assert_eq!(tokens.peek(&second, now + TTL, |_| ()), None);
        assert_eq!(tokens.take(&second, now + TTL), None);
    }

    #[test]
    fn the_number_outstanding_is_limited_and_expired_ones_make_room() {
        let tokens = Tokens::new(TTL, 1000);
        let now = Instant::now();
        for n in 0..1000 {
            tokens.insert(n, now).unwrap();
        }
        assert_eq!(tokens.insert(1000, now + TTL / 2), Err(Full));
        assert!(tokens.insert(1001, now + TTL).is_ok());
    }
}

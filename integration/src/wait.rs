//! Level-triggered waiting: look, and look again, until it is so or the time is up.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::{Instant, sleep};

/// Time between two looks.
const PERIOD: Duration = Duration::from_millis(20);

/// What a look found.
pub enum Look<T> {
    /// It is so.
    Done(T),
    /// Not yet; the text says what was seen instead, for the error.
    Not(String),
}

/// Looks until `look` is done.
///
/// # Errors
/// `limit` passed: the error names `what` and the last thing seen. Errors of `look` end the wait.
pub async fn eventually<T>(
    limit: Duration,
    what: &str,
    mut look: impl AsyncFnMut() -> Result<Look<T>>,
) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        match look().await? {
            Look::Done(value) => return Ok(value),
            Look::Not(seen) if Instant::now() >= end => {
                bail!("waited {limit:?} for {what}: {seen}")
            }
            Look::Not(_) => sleep(PERIOD).await,
        }
    }
}

impl Look<()> {
    /// Done when `so`.
    pub fn when(so: bool, seen: impl FnOnce() -> String) -> Self {
        if so { Look::Done(()) } else { Look::Not(seen()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_ends_when_it_is_so_and_says_what_it_saw_when_it_is_not() {
        let mut looks = 0;
        eventually(Duration::from_secs(5), "three looks", async || {
            looks += 1;
            Ok(Look::when(looks == 3, || format!("{looks} looks")))
        })
        .await
        .unwrap();
        let error = eventually(Duration::from_millis(1), "rain", async || {
            Ok(Look::<()>::Not("sunshine".into()))
        })
        .await
        .unwrap_err();
        assert_eq!(error.to_string(), "waited 1ms for rain: sunshine");
    }
}

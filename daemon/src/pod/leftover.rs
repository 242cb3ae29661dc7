//! What could not be taken away at once: for want of processes or descriptors, because a plugin failed.
//! It is on record, so the next start would take it away; but nobody should have to start the daemon
//! anew because there was too little of something for a moment.

use std::{future::Future, time::Duration};

use tracing::{Instrument as _, info, warn};

use super::Error;
use crate::error::chain;

/// First and longest pause before the next attempt.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Tries `again` beside everything else, until it is done. Ends with the daemon; what is left by then
/// the next start finds.
pub(super) fn later<F>(what: &'static str, first: &Error, again: impl Fn() -> F + Send + 'static)
where
    F: Future<Output = Result<(), Error>> + Send,
{
    warn!(error = %chain(first), "{what} is not all undone; it is tried again");
    let work = async move {
        let mut pause = PAUSES.0;
        loop {
            tokio::time::sleep(pause).await;
            match again().await {
                Ok(()) => break info!("{what} is undone now"),
                Err(error) => {
                    pause = (pause * 2).min(PAUSES.1);
                    info!(error = %chain(&error), ?pause, "{what} is still not undone");
                }
            }
        }
    };
    tokio::spawn(work.in_current_span());
}

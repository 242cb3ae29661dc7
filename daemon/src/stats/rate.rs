//! A counter's rate over the time between two readings.

use std::time::{Duration, Instant};

/// A shorter time says little: a scheduler's tick is a large part of it.
const SHORTEST: Duration = Duration::from_secs(1);

/// The last readings of a counter of nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rate {
    base: Option<(Instant, u64)>,
    value: Option<u64>,
}

impl Rate {
    /// Takes a reading; gives billionths per second over the last stretch of at least a second.
    /// `None`: there was no such stretch yet.
    pub(super) fn add(&mut self, at: Instant, count: u64) -> Option<u64> {
        match self.base {
            // A new cgroup, or the first reading.
            Some((_, before)) if count < before => *self = Self::default(),
            Some((then, _)) if at.saturating_duration_since(then) < SHORTEST => return self.value,
            Some((then, before)) => {
                let nanos = at.duration_since(then).as_nanos();
                let rate = u128::from(count - before) * 1_000_000_000 / nanos;
                self.value = u64::try_from(rate).ok();
            }
            None => {}
        }
        self.base = Some((at, count));
        self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_close_to_each_other_share_a_rate() {
        let mut rate = Rate::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(rate.add(at(0), 0), None);
        assert_eq!(rate.add(at(1), 50_000_000), None);
        assert_eq!(rate.add(at(2000), 1_000_000_000), Some(500_000_000));
        // A second client, a millisecond later, hears the same.
        assert_eq!(rate.add(at(2001), 1_001_000_000), Some(500_000_000));
        assert_eq!(rate.add(at(4000), 1_000_000_000), Some(0));
        // The counter began anew.
        assert_eq!(rate.add(at(6000), 10), None);
        assert_eq!(rate.add(at(7000), 10), Some(0));
    }
}

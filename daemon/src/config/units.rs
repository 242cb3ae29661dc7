//! Durations and sizes as the configuration writes them: a whole number and a unit.

use std::time::Duration;

const DURATIONS: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];
const SIZES: [(&str, u64); 5] =
    [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

/// "500ms", "60s", "2m", "1h".
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    scaled(text, &DURATIONS).map(Duration::from_millis)
}

/// "512B", "16MiB", "64GiB": bytes.
pub(super) fn parse_size(text: &str) -> Option<u64> {
    scaled(text, &SIZES)
}

/// The shortest text that [`parse_duration`] reads as the same number of milliseconds.
pub(super) fn format_duration(duration: Duration) -> String {
    // Whole minutes and hours stay in seconds: "120s" is easier to compare with "60s" than "2m".
    let ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if ms.is_multiple_of(1000) { format!("{}s", ms / 1000) } else { format!("{ms}ms") }
}

/// The shortest text that [`parse_size`] reads as the same number of bytes.
pub(super) fn format_size(bytes: u64) -> String {
    let (unit, scale) = SIZES
        .into_iter()
        .rev()
        .find(|&(_, s)| bytes >= s && bytes.is_multiple_of(s))
        .unwrap_or(SIZES[0]);
    format!("{}{unit}", bytes / scale)
}

fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let (_, scale) = units.iter().find(|(name, _)| *name == unit.trim_start())?;
    number.parse::<u64>().ok()?.checked_mul(*scale)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn units_are_required_and_overflow_is_refused() {
        assert_eq!(parse_duration("60s"), Some(Duration::from_secs(60)));
        assert_eq!(parse_duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(parse_duration("2m"), Some(Duration::from_secs(120)));
        assert_eq!(parse_size("16MiB"), Some(16 << 20));
        assert_eq!(parse_size("16 MiB"), Some(16 << 20));
        for bad in ["", "60", "s", "-1s", "1.5s", "1 d", "1s1s", "99999999999999999999s"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
        for bad in ["16", "16mb", "16M", "99999999TiB", "MiB"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_the_same(n in 0u64..1 << 50) {
            prop_assert_eq!(parse_size(&format_size(n)), Some(n));
            let duration = Duration::from_millis(n);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Some(duration));
        }

        #[test]
        fn no_text_panics(text in ".*") {
            let _ = (parse_size(&text), parse_duration(&text));
        }
    }
}

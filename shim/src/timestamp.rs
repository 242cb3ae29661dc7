//! RFC 3339 in UTC with nanoseconds, without a calendar crate: log lines and exit records.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Length of what [`write()`] gives: `2026-11-05T10:20:30.123456789Z`.
pub const LEN: usize = 30;

/// Seconds and nanoseconds since 1970; a time before that counts as 1970.
pub fn since_epoch(at: SystemTime) -> Duration {
    at.duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// `at` as RFC 3339 in UTC, always with nine digits of nanoseconds.
pub fn format(at: SystemTime) -> String {
    let since = since_epoch(at);
    let mut buffer = [0; LEN];
    write(since.as_secs(), since.subsec_nanos(), &mut buffer);
    String::from_utf8_lossy(&buffer).into_owned()
}

/// Writes `seconds` and `nanos` since 1970 into `buffer`, as [`format()`] does.
pub fn write(seconds: u64, nanos: u32, buffer: &mut [u8; LEN]) {
    let (year, month, day) = civil(seconds / 86_400);
    let of_day = seconds % 86_400;
    buffer.copy_from_slice(b"0000-00-00T00:00:00.000000000Z");
    digits(&mut buffer[0..4], year);
    digits(&mut buffer[5..7], month);
    digits(&mut buffer[8..10], day);
    digits(&mut buffer[11..13], of_day / 3600);
    digits(&mut buffer[14..16], of_day / 60 % 60);
    digits(&mut buffer[17..19], of_day % 60);
    digits(&mut buffer[20..29], u64::from(nanos));
}

/// Right-aligned decimal digits of `value`, padded with zeros.
pub(crate) fn digits(place: &mut [u8], mut value: u64) {
    for digit in place.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

/// Year, month and day of a day counted from 1970-01-01.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years are counted from March, so that the leap day is the last of its year; an era is the
    // 400 years after which the calendar repeats.
    let days = days + 719_468;
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

/// Day counted from 1970-01-01.
fn day_number(year: u64, month: u64, day: u64) -> Option<u64> {
    let year = year.checked_sub(u64::from(month <= 2))?;
    let shifted = if month > 2 { month - 3 } else { month + 9 };
    let of_year = (153 * shifted + 2) / 5 + day - 1;
    let of_era = (year % 400) * 365 + (year % 400) / 4 - (year % 400) / 100 + of_year;
    (year / 400 * 146_097 + of_era).checked_sub(719_468)
}

/// Reads what [`format()`] writes; also fewer or no digits of a fraction. UTC (`Z`) only.
pub fn parse(text: &str) -> Option<SystemTime> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.splitn(3, '-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let (clock, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let mut clock = clock.splitn(3, ':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    let in_range = (1970..10_000).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second <= 60;
    if !in_range || fraction.len() > 9 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let nanos = format!("{fraction:0<9}").parse().ok()?;
    let seconds = day_number(year, month, day)? * 86_400 + hour * 3600 + minute * 60 + second;
    Some(UNIX_EPOCH + Duration::new(seconds, nanos))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_times_are_written_as_rfc_3339() {
        let at = |seconds, nanos| format(UNIX_EPOCH + Duration::new(seconds, nanos));
        assert_eq!(at(0, 0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(at(951_782_400, 1), "2000-02-29T00:00:00.000000001Z");
        assert_eq!(at(1_475_712_437, 669_794_202), "2016-10-06T00:07:17.669794202Z");
        assert_eq!(at(4_107_542_399, 999_999_999), "2100-02-28T23:59:59.999999999Z");
        assert_eq!(at(4_107_542_400, 0), "2100-03-01T00:00:00.000000000Z");
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in ["", "Z", "2020-01-01", "2020-13-01T00:00:00Z", "2020-01-01T00:00:00+01:00"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_time_survives_the_text(seconds in 0u64..250_000_000_000, nanos in 0u32..1_000_000_000) {
            let at = UNIX_EPOCH + Duration::new(seconds, nanos);
            prop_assert_eq!(parse(&format(at)), Some(at));
        }
    }
}

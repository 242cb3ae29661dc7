//! Tables for people: aligned columns, short ids, relative ages, sizes with units.

use std::{fmt::Write as _, time::SystemTime};

use super::wire;

/// A table with a heading.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new<const N: usize>(heading: [&str; N]) -> Self {
        Self { rows: vec![heading.iter().map(|&h| h.to_owned()).collect()] }
    }

    /// Adds a row; it has as many cells as the heading.
    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.rows[0].len());
        self.rows.push(cells.into_iter().map(|c| printable(&c)).collect());
    }

    /// The text: columns two or more spaces apart, no spaces at line ends.
    pub(super) fn render(&self) -> String {
        let columns = self.rows[0].len();
        let widths: Vec<usize> = (0..columns)
            .map(|c| self.rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0))
            .collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                write!(line, "{cell:<width$}   ").expect("a String takes all that is written");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Names come from whoever made the pod: none may move the cursor or fake a row.
pub(super) fn printable(text: &str) -> String {
    if text.is_empty() {
        return "-".to_owned();
    }
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// The first 13 digits of an id, with or without its algorithm.
pub(super) fn short_id(id: &str) -> &str {
    let id = id.strip_prefix("sha256:").unwrap_or(id);
    id.get(..13).unwrap_or(id)
}

/// How long ago a CRI time (nanoseconds since 1970) was: "5s", "3m", "7h", "12d", "3y".
pub(super) fn age(nanoseconds: i64, now: SystemTime) -> String {
    if nanoseconds <= 0 {
        return "-".to_owned();
    }
    let seconds = now.duration_since(wire::time(nanoseconds)).map_or(0, |d| d.as_secs());
    let (number, unit) = match seconds {
        // Two units' worth, so that "1m" never hides almost two minutes.
        0..120 => (seconds, "s"),
        120..7_200 => (seconds / 60, "m"),
        7_200..172_800 => (seconds / 3600, "h"),
        172_800..63_072_000 => (seconds / 86_400, "d"),
        _ => (seconds / 31_536_000, "y"),
    };
    format!("{number}{unit}")
}

/// Bytes for people: "0B", "1023B", "1.5KiB", "15.2MiB", "152MiB".
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes}B");
    }
    let mut number = bytes as f64;
    let mut unit = "";
    for next in UNITS {
        // What would be printed as 1024 belongs to the next unit.
        if number < 1023.5 {
            break;
        }
        number /= 1024.0;
        unit = next;
    }
    if number < 99.95 { format!("{number:.1}{unit}") } else { format!("{number:.0}{unit}") }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_have_no_tail() {
        let mut table = Table::new(["NAME", "STATE", "X"]);
        table.row(["a".into(), "running".into(), "é".into()]);
        table.row(["longer".into(), String::new(), String::new()]);
        assert_eq!(
            table.render(),
            "NAME     STATE     X\n\
             a        running   é\n\
             longer   -         -\n"
        );
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let mut table = Table::new(["A"]);
        table.row(["x\u{1b}[2J\ny".into()]);
        assert_eq!(table.render(), "A\nx\u{fffd}[2J\u{fffd}y\n");
    }

    #[test]
    fn ages_have_one_unit() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000);
        let ago = |s: i64| age((2_000_000_000 - s) * 1_000_000_000, now);
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (7_199, "119m"),
            (7_200, "2h"),
            (172_800, "2d"),
            (63_072_000, "2y"),
            (-5, "0s"),
        ] {
            assert_eq!(ago(seconds), text);
        }
        assert_eq!(age(0, now), "-");
    }

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0B"),
            (1023, "1023B"),
            (1024, "1.0KiB"),
            (1536, "1.5KiB"),
            (102_400, "100KiB"),
            (1_048_575, "1.0MiB"),
            (3 << 30, "3.0GiB"),
            (u64::MAX, "16384PiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn ids_are_shortened_without_their_algorithm() {
        assert_eq!(short_id("sha256:0123456789abcdef"), "0123456789abc");
        assert_eq!(short_id("012"), "012");
    }
}

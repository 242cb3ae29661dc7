//! A workload for `make bench`: writes lines of 100 bytes, numbered from 1, at a steady rate, and tells on
//! standard error how long the longest write took. See `integration/src/bench/survival.rs`.
//!
//! usage: `holdfast-testwriter MEGABYTES_PER_SECOND SECONDS`

use std::{
    env,
    io::{self, Write as _},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

/// Bytes of a line, with its end.
const LINE: u64 = 100;
/// How often it writes.
const TICK: Duration = Duration::from_millis(1);

fn main() -> ExitCode {
    let numbers: Vec<u64> = env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let &[rate, seconds] = numbers.as_slice() else {
        eprintln!("usage: holdfast-testwriter MEGABYTES_PER_SECOND SECONDS");
        return ExitCode::from(2);
    };
    match write(rate * 1_000_000 / LINE, Duration::from_secs(seconds)) {
        Ok((lines, longest)) => {
            eprintln!("lines {lines} longest {}", longest.as_micros());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("write: {error}");
            ExitCode::FAILURE
        }
    }
}

/// So many lines a second for so long; how many lines, and the longest write. What a write that took long
/// has kept back is written at once after it.
fn write(per_second: u64, limit: Duration) -> io::Result<(u64, Duration)> {
    let mut out = io::stdout().lock();
    let (begun, mut lines, mut longest) = (Instant::now(), 0, Duration::ZERO);
    let mut text = Vec::new();
    loop {
        let passed = begun.elapsed();
        if passed >= limit {
            return Ok((lines, longest));
        }
        let due = (passed.as_secs_f64() * per_second as f64) as u64;
        while lines < due {
            text.clear();
            // A page at a time, as programs do that buffer what they print.
            for number in lines + 1..=due.min(lines + 40) {
                writeln!(text, "line {number:<94}")?;
            }
            lines = due.min(lines + 40);
            let started = Instant::now();
            out.write_all(&text)?;
            out.flush()?;
            longest = longest.max(started.elapsed());
        }
        thread::sleep(TICK);
    }
}

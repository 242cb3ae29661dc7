//! Progress of a pull or push on stderr: a bar for each layer on a terminal, else lines: one when a
//! layer is done, and one now and then for those that take long. Where a terminal has not enough rows
//! for all layers, those that are under way have a bar, and all together another.

use std::{
    collections::HashMap,
    io::{self, IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use holdfast_protos::{
    admin::{LayerProgress, layer_progress},
    images::{PushedLayer, pushed_layer},
};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use rustix::termios::tcgetwinsize;

use super::table::{short_id, size};

/// How often a layer that takes long gets a line.
const OFTEN: Duration = Duration::from_secs(5);

/// A layer on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layer {
    digest: String,
    phase: Phase,
    bytes: u64,
    total: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Waiting,
    Packing,
    Pulling,
    Pushing,
    Done,
    Exists,
}

impl Phase {
    fn word(self) -> &'static str {
        match self {
            Phase::Waiting => "waiting",
            Phase::Packing => "packing",
            Phase::Pulling => "pulling",
            Phase::Pushing => "pushing",
            Phase::Done => "done",
            Phase::Exists => "exists",
        }
    }

    fn is_end(self) -> bool {
        matches!(self, Phase::Done | Phase::Exists)
    }
}

impl Layer {
    pub(super) fn pulled(layer: &LayerProgress) -> Self {
        Self {
            digest: layer.digest.clone(),
            phase: match layer.phase() {
                layer_progress::Phase::Waiting => Phase::Waiting,
                layer_progress::Phase::Pulling => Phase::Pulling,
                layer_progress::Phase::Done => Phase::Done,
                layer_progress::Phase::Exists => Phase::Exists,
            },
            bytes: layer.received_bytes,
            total: layer.total_bytes,
        }
    }

    pub(super) fn pushed(layer: &PushedLayer) -> Self {
        Self {
            digest: layer.digest.clone(),
            phase: match layer.phase() {
                pushed_layer::Phase::Waiting => Phase::Waiting,
                pushed_layer::Phase::Packing => Phase::Packing,
                pushed_layer::Phase::Sending => Phase::Pushing,
                pushed_layer::Phase::Done => Phase::Done,
                pushed_layer::Phase::Exists => Phase::Exists,
            },
            bytes: layer.sent_bytes,
            total: layer.total_bytes,
        }
    }
}

/// Where progress goes.
pub(super) enum Progress {
    None,
    Lines(Lines),
    Bars(Bars),
}

impl Progress {
    pub(super) fn none() -> Self {
        Self::None
    }

    pub(super) fn on_stderr() -> Self {
        if io::stderr().is_terminal() {
            Self::Bars(Bars::new(MultiProgress::new()))
        } else {
            Self::Lines(Lines::default())
        }
    }

    /// Shows what is new. Layers are always the same, in the same order.
    pub(super) fn update(&mut self, layers: &[Layer]) {
        match self {
            Self::None => {}
            Self::Lines(lines) => {
                for line in lines.changes(layers, Instant::now()) {
                    // Progress is not worth failing for.
                    let _ = writeln!(io::stderr(), "{line}");
                }
            }
            Self::Bars(bars) => bars.update(layers, window()),
        }
    }

    /// Leaves the bars as they are (`complete`), or takes them away for an error to be printed.
    pub(super) fn finish(&mut self, complete: bool) {
        if let Self::Bars(bars) = self {
            bars.finish(complete);
        }
    }
}

/// Columns and rows of the terminal at stderr.
fn window() -> (usize, usize) {
    match tcgetwinsize(io::stderr()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
        // One that does not say, as of a serial line.
        _ => (80, 24),
    }
}

/// A bar for each layer.
pub(super) struct Bars {
    all: MultiProgress,
    bars: Vec<Option<ProgressBar>>,
    /// The bar of all layers, if there is no room for one of each.
    total: Option<ProgressBar>,
    /// Of the terminal, when the bars were last drawn.
    columns: usize,
}

impl Bars {
    fn new(all: MultiProgress) -> Self {
        Self { all, bars: Vec::new(), total: None, columns: 0 }
    }

    fn update(&mut self, layers: &[Layer], (columns, rows): (usize, usize)) {
        if self.bars.is_empty() && !layers.is_empty() {
            self.bars = vec![None; layers.len()];
            // One row is for the cursor.
            if layers.len() >= rows {
                let bar = ProgressBar::new(0).with_style(style(columns, false));
                self.total = Some(self.all.add(bar.with_message("layers")));
            }
        }
        let resized = std::mem::replace(&mut self.columns, columns) != columns;
        for (layer, slot) in layers.iter().zip(&mut self.bars) {
            let is_end = layer.phase.is_end();
            if self.total.is_some() && (is_end || layer.phase == Phase::Waiting) {
                if let Some(bar) = slot.take() {
                    self.all.remove(&bar);
                }
                continue;
            }
            let new = slot.is_none();
            let bar = slot.get_or_insert_with(|| {
                // It has a name before it is drawn the first time.
                let bar = ProgressBar::new(layer.total)
                    .with_style(style(columns, is_end))
                    .with_prefix(short_id(&layer.digest).to_owned())
                    .with_message(layer.phase.word());
                match &self.total {
                    Some(total) => self.all.insert_before(total, bar),
                    None => self.all.add(bar),
                }
            });
            if (resized && !new) || (is_end && !bar.is_finished()) {
                bar.set_style(style(columns, is_end));
            }
            bar.set_message(layer.phase.word());
            bar.set_length(layer.total);
            bar.set_position(if is_end { layer.total } else { layer.bytes });
            if is_end && !bar.is_finished() {
                bar.finish();
            }
        }
        if let Some(total) = &self.total {
            let here = |layer: &Layer| if layer.phase.is_end() { layer.total } else { layer.bytes };
            let ended = layers.iter().filter(|layer| layer.phase.is_end()).count();
            if resized {
                total.set_style(style(columns, false));
            }
            // As wide as the names of layers.
            total.set_prefix(format!("{:13}", format!("{ended} of {}", layers.len())));
            total.set_length(layers.iter().map(|layer| layer.total).sum());
            total.set_position(layers.iter().map(here).sum());
        }
    }

    fn finish(&mut self, complete: bool) {
        for bar in self.bars.iter().flatten().chain(&self.total) {
            if complete { bar.finish() } else { bar.abandon() }
        }
        if !complete {
            // Nothing to be done about a terminal that is gone.
            let _ = self.all.clear();
        }
    }
}

/// What a line has, so that it fits: one that is wrapped cannot be drawn over. One that is done has no
/// rate.
fn style(columns: usize, done: bool) -> ProgressStyle {
    // Name, word, and numbers as "1023.99 MiB", with what is between; the last column stays free.
    const NAME: usize = 13 + 2 + 8;
    const BYTES: usize = 1 + 11 + 1 + 11;
    const RATE: usize = 1 + 13;
    const BAR: usize = 30;
    let room = columns.saturating_sub(NAME + BYTES + 1 + 1);
    let (bar, rate) = match room.checked_sub(RATE) {
        Some(room) if room >= 10 => (room.min(BAR), true),
        _ => (room.min(BAR), false),
    };
    let text = if bar < 8 {
        "{prefix}  {msg:8} {percent:>3} %".to_owned()
    } else {
        let rate = if rate && !done { " {binary_bytes_per_sec:>13}" } else { "" };
        format!(
            "{{prefix}}  {{msg:8}} {{bar:{bar}}} {{binary_bytes:>11}}/{{binary_total_bytes:11}}{rate}"
        )
    };
    ProgressStyle::with_template(&text).expect("it is one of a few").progress_chars("=> ")
}

/// What was printed of each layer.
#[derive(Default)]
pub(super) struct Lines {
    layers: HashMap<usize, Printed>,
}

struct Printed {
    phase: Phase,
    at: Instant,
    bytes: u64,
}

impl Lines {
    fn changes(&mut self, layers: &[Layer], now: Instant) -> Vec<String> {
        let mut lines = Vec::new();
        for (index, layer) in layers.iter().enumerate() {
            let fresh = Printed { phase: layer.phase, at: now, bytes: layer.bytes };
            let name = short_id(&layer.digest);
            let Some(before) = self.layers.get_mut(&index) else {
                self.layers.insert(index, fresh);
                if layer.phase.is_end() {
                    lines.push(format!("{name}: {} {}", layer.phase.word(), size(layer.total)));
                }
                continue;
            };
            if before.phase != layer.phase {
                *before = fresh;
                if layer.phase.is_end() {
                    lines.push(format!("{name}: {} {}", layer.phase.word(), size(layer.total)));
                }
                continue;
            }
            let passed = now.duration_since(before.at);
            if !layer.phase.is_end() && layer.phase != Phase::Waiting && passed >= OFTEN {
                let rate = layer.bytes.saturating_sub(before.bytes) as f64 / passed.as_secs_f64();
                lines.push(format!(
                    "{name}: {} {} of {}, {}/s",
                    layer.phase.word(),
                    size(layer.bytes),
                    size(layer.total),
                    size(rate as u64)
                ));
                *before = fresh;
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use indicatif::{ProgressDrawTarget, TermLike};

    use super::*;

    /// A terminal that keeps what is written, with a line's end before each piece.
    #[derive(Clone, Debug, Default)]
    struct Paper(Arc<Mutex<String>>, u16);

    impl Paper {
        fn put(&self, text: &str) -> io::Result<()> {
            self.0.lock().unwrap().push_str(text);
            Ok(())
        }
    }

    impl TermLike for Paper {
        fn width(&self) -> u16 {
            self.1
        }
        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            self.put("\n")
        }
        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            self.put("\n")
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            self.put("\n")
        }
        fn write_line(&self, text: &str) -> io::Result<()> {
            self.put(&format!("{text}\n"))
        }
        // A line, or blanks to its end.
        fn write_str(&self, text: &str) -> io::Result<()> {
            self.put(&format!("\n{text}"))
        }
        fn clear_line(&self) -> io::Result<()> {
            self.put("\n")
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is drawn of these layers, step by step, and then at the end.
    fn drawn(columns: u16, rows: usize, steps: &[Vec<Layer>]) -> Vec<String> {
        let paper = Paper(Arc::default(), columns);
        let target = ProgressDrawTarget::term_like(Box::new(paper.clone()));
        let mut bars = Bars::new(MultiProgress::with_draw_target(target));
        for layers in steps {
            bars.update(layers, (columns.into(), rows));
        }
        bars.finish(true);
        let text = paper.0.lock().unwrap().clone();
        let lines = text.split('\n').map(str::trim_end);
        lines.filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }

    fn layers(count: u8, phase: impl Fn(u8) -> Phase) -> Vec<Layer> {
        let layer = |number: u8| Layer {
            digest: format!("sha256:{}", format!("{number:02x}").repeat(32)),
            phase: phase(number),
            bytes: 123 << 20,
            total: 1000 << 20,
        };
        (0..count).map(layer).collect()
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for columns in [30, 45, 56, 57, 60, 66, 67, 72, 73, 79, 80, 92, 93, 94, 120, 300] {
            let steps = [layers(3, |_| Phase::Pulling), layers(3, |_| Phase::Done)];
            let lines = drawn(columns, 24, &steps);
            assert!(lines.len() >= 3, "{lines:?}");
            for line in &lines {
                assert!(line.chars().count() < columns.into(), "{columns}: {line:?}");
            }
            assert_eq!(lines.iter().any(|l| l.contains("/s")), columns >= 73, "{lines:?}");
        }
    }

    #[test]
    fn more_layers_than_rows_have_one_bar_together() {
        let under_way = |now: u8| {
            move |number: u8| match number {
                n if n < now => Phase::Done,
                n if n < now + 6 => Phase::Pulling,
                _ => Phase::Waiting,
            }
        };
        let mut bars = Bars::new(MultiProgress::with_draw_target(ProgressDrawTarget::hidden()));
        for now in [0, 7, 34, 40] {
            bars.update(&layers(40, under_way(now)), (100, 24));
            let total = bars.total.as_ref().unwrap();
            assert_eq!(total.prefix().trim_end(), format!("{now} of 40"));
            let shown = bars.bars.iter().flatten().count();
            assert_eq!(shown, usize::from(40 - now).min(6));
        }
        let steps = [0, 7, 34, 40].map(|now| layers(40, under_way(now)));
        let lines = drawn(100, 24, &steps);
        assert!(lines.last().unwrap().starts_with("40 of 40"), "{lines:?}");
        assert!(!lines.iter().any(|l| l.contains("done") || l.contains("waiting")), "{lines:?}");
        // And as many as fit have one each.
        let lines = drawn(100, 24, &[layers(23, |_| Phase::Waiting), layers(23, |_| Phase::Done)]);
        assert!(lines.last().unwrap().contains("done"), "{lines:?}");
    }

    #[test]
    fn a_layer_has_a_line_when_it_is_done_and_now_and_then_before() {
        let layer = |digest: &str, phase: Phase, bytes: u64| Layer {
            digest: digest.into(),
            phase,
            bytes,
            total: 20 << 20,
        };
        let mut lines = Lines::default();
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let both =
            |phase, bytes| [layer("sha256:aa", phase, bytes), layer("sha256:bb", Phase::Exists, 0)];
        assert_eq!(lines.changes(&both(Phase::Pulling, 0), at(0)), ["bb: exists 20.0MiB"]);
        assert!(lines.changes(&both(Phase::Pulling, 1 << 20), at(4)).is_empty());
        assert_eq!(
            lines.changes(&both(Phase::Pulling, 10 << 20), at(5)),
            ["aa: pulling 10.0MiB of 20.0MiB, 2.0MiB/s"]
        );
        assert!(lines.changes(&both(Phase::Pulling, 11 << 20), at(6)).is_empty());
        assert_eq!(lines.changes(&both(Phase::Done, 20 << 20), at(7)), ["aa: done 20.0MiB"]);
        assert!(lines.changes(&both(Phase::Done, 20 << 20), at(70)).is_empty());
    }
}

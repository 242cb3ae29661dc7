//! Progress of a pull or push on stderr: a bar for each layer on a terminal, else lines: one when a
//! layer is done, and one now and then for those that take long.

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
    Bars { all: MultiProgress, bars: Vec<ProgressBar> },
}

impl Progress {
    pub(super) fn none() -> Self {
        Self::None
    }

    pub(super) fn on_stderr() -> Self {
        if io::stderr().is_terminal() {
            Self::Bars { all: MultiProgress::new(), bars: Vec::new() }
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
            Self::Bars { all, bars } => {
                while bars.len() < layers.len() {
                    bars.push(all.add(ProgressBar::new(0).with_style(style(false))));
                }
                for (layer, bar) in layers.iter().zip(bars) {
                    bar.set_prefix(short_id(&layer.digest).to_owned());
                    bar.set_length(layer.total);
                    bar.set_position(layer.bytes);
                    bar.set_message(layer.phase.word());
                    if layer.phase.is_end() && !bar.is_finished() {
                        bar.set_position(layer.total);
                        bar.set_style(style(true));
                        bar.finish();
                    }
                }
            }
        }
    }

    /// Leaves the bars as they are (`complete`), or takes them away for an error to be printed.
    pub(super) fn finish(&mut self, complete: bool) {
        if let Self::Bars { all, bars } = self {
            for bar in bars {
                if complete { bar.finish() } else { bar.abandon() }
            }
            if !complete {
                // Nothing to be done about a terminal that is gone.
                let _ = all.clear();
            }
        }
    }
}

/// One that is done has no rate.
fn style(done: bool) -> ProgressStyle {
    let rate = if done { "" } else { " {binary_bytes_per_sec:>12}" };
    let text = format!(
        "{{prefix}}  {{msg:8}} {{bar:30}} {{binary_bytes:>10}}/{{binary_total_bytes:10}}{rate}"
    );
    ProgressStyle::with_template(&text).expect("the template is a constant").progress_chars("=> ")
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
    use super::*;

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

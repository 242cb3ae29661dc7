//! A pull's progress on stderr: a bar for each layer on a terminal, else a line when a layer is done.

use std::{
    collections::HashMap,
    io::{self, IsTerminal as _, Write as _},
};

use holdfast_protos::admin::{LayerProgress, layer_progress::Phase};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::table::{short_id, size};

/// Where progress goes.
pub(super) enum Progress {
    None,
    Lines { last: HashMap<String, Phase> },
    Bars { all: MultiProgress, bars: HashMap<String, ProgressBar> },
}

impl Progress {
    pub(super) fn none() -> Self {
        Self::None
    }

    pub(super) fn on_stderr() -> Self {
        if io::stderr().is_terminal() {
            Self::Bars { all: MultiProgress::new(), bars: HashMap::new() }
        } else {
            Self::Lines { last: HashMap::new() }
        }
    }

    /// Shows what is new.
    pub(super) fn update(&mut self, layers: &[LayerProgress]) {
        match self {
            Self::None => {}
            Self::Lines { last } => {
                for line in new_lines(last, layers) {
                    // Progress is not worth failing for.
                    let _ = writeln!(io::stderr(), "{line}");
                }
            }
            Self::Bars { all, bars } => {
                for layer in layers {
                    let bar = bars.entry(layer.digest.clone()).or_insert_with(|| {
                        let bar = ProgressBar::new(layer.total_bytes).with_style(style());
                        all.add(bar).with_prefix(short_id(&layer.digest).to_owned())
                    });
                    bar.set_length(layer.total_bytes);
                    bar.set_position(layer.received_bytes);
                    bar.set_message(word(layer.phase()));
                    if matches!(layer.phase(), Phase::Done | Phase::Exists) && !bar.is_finished() {
                        bar.set_position(layer.total_bytes);
                        bar.finish();
                    }
                }
            }
        }
    }

    /// Leaves the bars as they are (`complete`), or takes them away for an error to be printed.
    pub(super) fn finish(&mut self, complete: bool) {
        if let Self::Bars { all, bars } = self {
            for bar in bars.values() {
                if complete { bar.finish() } else { bar.abandon() }
            }
            if !complete {
                // Nothing to be done about a terminal that is gone.
                let _ = all.clear();
            }
        }
    }
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template(
        "{prefix}  {msg:8} {bar:30} {binary_bytes:>10}/{binary_total_bytes:10}",
    )
    .expect("the template is a constant")
    .progress_chars("=> ")
}

fn word(phase: Phase) -> &'static str {
    match phase {
        Phase::Waiting => "waiting",
        Phase::Pulling => "pulling",
        Phase::Done => "done",
        Phase::Exists => "exists",
    }
}

/// A line for each layer that reached its end since the last update.
fn new_lines(last: &mut HashMap<String, Phase>, layers: &[LayerProgress]) -> Vec<String> {
    let mut lines = Vec::new();
    for layer in layers {
        let phase = layer.phase();
        let before = last.insert(layer.digest.clone(), phase);
        if before != Some(phase) && matches!(phase, Phase::Done | Phase::Exists) {
            let bytes = size(layer.total_bytes);
            lines.push(format!("{}: {} {bytes}", short_id(&layer.digest), word(phase)));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_has_one_line_when_it_is_done() {
        let layer = |digest: &str, phase: Phase| LayerProgress {
            digest: digest.into(),
            phase: phase.into(),
            received_bytes: 0,
            total_bytes: 2048,
        };
        let mut last = HashMap::new();
        let pulling = [layer("sha256:aa", Phase::Pulling), layer("sha256:bb", Phase::Exists)];
        assert_eq!(new_lines(&mut last, &pulling), ["bb: exists 2.0KiB"]);
        assert!(new_lines(&mut last, &pulling).is_empty());
        let done = [layer("sha256:aa", Phase::Done), layer("sha256:bb", Phase::Exists)];
        assert_eq!(new_lines(&mut last, &done), ["aa: done 2.0KiB"]);
    }
}

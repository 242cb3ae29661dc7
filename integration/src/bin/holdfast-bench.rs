//! What `make bench` runs: measures this build against the bare CNI plugins and runc, and, where a
//! containerd is installed, in turns with it. See docs/benchmarks.md.
//!
//! ```text
//! holdfast-bench [OPTION...]
//!   --json FILE    writes every figure there
//!   --quick        fewer rounds, a list of 100 containers
//!   --rounds N     rounds of the lifecycle section (default 20, with --quick 4)
//!   --only NAME    shim, memory, restart, lifecycle, list, watch, pull, endurance, events, survival or
//!                  stuck; may be repeated
//!   --image NAME   ten, one, forty, ten-zstd, one-zstd, forty-zstd, many or shared: what the pull
//!                  section pulls; may be repeated
//!   --no-peer      leaves containerd out
//! ```

use std::{env, fs, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use holdfast_integration::bench::{self, Plan, Section, samples::Samples};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

const USAGE: &str = "usage: holdfast-bench [--json FILE] [--quick] [--rounds N] [--only NAME]... [--image NAME]... [--no-peer]";

#[tokio::main]
async fn main() -> ExitCode {
    match run(env::args().skip(1).collect()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("holdfast-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Vec<String>) -> Result<()> {
    let (plan, json_file) = parse(args)?;
    let mut samples = Samples::default();
    let mut facts = machine();
    facts.push(format!("load before: {}", load()));
    let (mut interrupt, mut terminate) =
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let result = tokio::select! {
        biased;
        // Dropped in the middle, every part removes what it made.
        _ = interrupt.recv() => Err(anyhow::anyhow!("interrupted")),
        _ = terminate.recv() => Err(anyhow::anyhow!("terminated")),
        result = bench::run(&plan, &mut samples, &mut facts) => result,
    };
    facts.push(format!("load after: {}", load()));
    for fact in &facts {
        println!("{fact}");
    }
    println!("\n{}\n{}", samples.table(), samples.bars());
    if let Some(file) = json_file {
        let mut report = samples.json();
        report["machine"] = json!(facts);
        report["complete"] = json!(result.is_ok());
        fs::write(&file, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("write {}", file.display()))?;
    }
    result
}

fn parse(args: Vec<String>) -> Result<(Plan, Option<PathBuf>)> {
    let mut plan =
        Plan { quick: false, rounds: 0, sections: Vec::new(), peer: true, images: Vec::new() };
    let mut json_file = None;
    let mut args = args.into_iter();
    while let Some(word) = args.next() {
        let mut value = || args.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--json" => json_file = Some(value()?.into()),
            "--quick" => plan.quick = true,
            "--image" => {
                let name = value()?;
                let known = bench::PULLED.contains(&name.as_str());
                ensure!(known, "--image {name}: there are {}", bench::PULLED.join(", "));
                plan.images.push(name);
            }
            "--no-peer" => plan.peer = false,
            "--rounds" => plan.rounds = value()?.parse().context("--rounds takes a number")?,
            "--only" => {
                let name = value()?;
                let known = Section::ALL.into_iter().find(|section| section.name() == name);
                plan.sections.push(known.with_context(|| {
                    let names = Section::ALL.map(Section::name).join(", ");
                    format!("--only {name}: there are {names}")
                })?);
            }
            _ => bail!("{word} is not known; {USAGE}"),
        }
    }
    if plan.rounds == 0 {
        plan.rounds = if plan.quick { 4 } else { 20 };
    }
    if plan.sections.is_empty() {
        plan.sections = Section::ALL.to_vec();
    }
    Ok((plan, json_file))
}

/// What figures depend on besides the programs.
fn machine() -> Vec<String> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    let runc = std::process::Command::new("runc").arg("--version").output();
    let runc = runc.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let runc = runc.unwrap_or_default().lines().next().unwrap_or("runc: none").to_owned();
    vec![format!("Linux {}, {processors} processors", kernel.trim()), runc]
}

fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

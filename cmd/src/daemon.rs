//! `holdfastd`: its command line, log and tokio runtime around [`holdfast_daemon::run`].

mod publish;

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use holdfast_daemon::config::Config;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::{
    EnvFilter, Layer as _,
    filter::{FilterExt as _, filter_fn},
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

/// Exit code for a wrong command line or configuration; clap uses it too.
const USAGE: u8 = 2;

/// Threads of the pool for blocking calls (mounts, untar, netns). More than a burst of pods uses,
/// and enough that a few mounts hung on a dead file server leave room for others. An idle thread
/// ends after ten seconds.
const BLOCKING_THREADS: usize = 128;

/// Holdfast's daemon: a Kubernetes container runtime (CRI).
///
/// Pods outlive it: it can be stopped, upgraded or killed at any time without a container noticing.
#[derive(Debug, Parser)]
#[command(
    name = "holdfastd",
    version,
    max_term_width = 100,
    after_help = "\
Exit codes: 0 after SIGTERM or SIGINT, 1 for a failure while running, 2 for a wrong command line or
configuration."
)]
struct Args {
    /// Configuration file; FILE.d/*.toml are read over it [default: /etc/holdfast/config.toml, if it
    /// exists]
    #[arg(long, short, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// error, warn, info, debug, trace, or a filter as in "info,hyper=warn"; comes before RUST_LOG and
    /// the configuration's log.level
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// Where a shim's event goes when TTRPC_ADDRESS is not set (only for `publish`)
    #[arg(long, hide = true)]
    address: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print or check the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Forward one event of a shim, read from stdin: what containerd calls a publish binary
    #[command(hide = true)]
    Publish(publish::Args),
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print a commented file with every key at its default
    Default,
    /// Check the files, and that the programs they name are here
    Check,
    /// Print the configuration in effect
    Dump,
}

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let result = match args.command {
        None => {
            let config = match Config::load(args.config.as_deref()) {
                Ok(config) => config,
                Err(error) => return report(&error.into(), USAGE),
            };
            return match serve(config, args.log_level) {
                Ok(code) => code,
                Err(error) => report(&error, 1),
            };
        }
        Some(Command::Config(ConfigCommand::Default)) => print(&Config::default_toml()),
        Some(Command::Config(ConfigCommand::Dump)) => Config::load(args.config.as_deref())
            .map_err(Into::into)
            .and_then(|config| print(&config.to_toml())),
        Some(Command::Config(ConfigCommand::Check)) => {
            Config::load(args.config.as_deref()).map_err(Into::into).and_then(|config| {
                for (key, program) in config.missing_programs() {
                    eprintln!("holdfastd: warning: {key}: {} is not here", program.display());
                }
                print("the configuration is valid\n")
            })
        }
        Some(Command::Publish(publish)) => {
            return match publish::run(publish, args.address) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => report(&error, 1),
            };
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error, USAGE),
    }
}

/// The whole chain on one line.
fn report(error: &anyhow::Error, code: u8) -> ExitCode {
    eprintln!("holdfastd: {}", format!("{error:#}").replace('\n', " "));
    ExitCode::from(code)
}

/// A reader that has had enough (`| head`) is no failure.
fn print(text: &str) -> Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("write to stdout"),
        _ => Ok(()),
    }
}

fn serve(config: Config, log_level: Option<String>) -> Result<ExitCode> {
    // A node agent shares its node: two workers keep one slow poll from stopping all, and more than
    // four buy nothing for what is mostly waiting. The stack of a thread costs what it touches; the
    // limit is against runaway recursion in what strangers send.
    let workers = thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 4));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_stack_size(1 << 20)
        .thread_name("holdfastd")
        .enable_all()
        .build()
        .context("start the tokio runtime")?;
    let traces = {
        let _in_runtime = runtime.enter();
        match log_and_trace(&config, log_level) {
            Ok(traces) => traces,
            Err(error) => return Ok(report(&error, USAGE)),
        }
    };
    let result = runtime.block_on(async {
        // Registered before anything is started, so that no signal in between kills us.
        let mut term = signal(SignalKind::terminate()).context("catch SIGTERM")?;
        let mut int = signal(SignalKind::interrupt()).context("catch SIGINT")?;
        let shutdown = async move {
            let name = tokio::select! {
                _ = term.recv() => "SIGTERM",
                _ = int.recv() => "SIGINT",
            };
            tracing::info!("{name}: shutting down; pods go on running");
        };
        holdfast_daemon::run(config, shutdown).await.map_err(anyhow::Error::from)
    });
    // The last of them, while there is something that can send them.
    drop(traces);
    // A blocking call that hangs (a mount on a dead server) must not keep us from ending.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match result {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            // In the log too: with JSON logs that is where people look.
            tracing::error!("{}", format!("{error:#}").replace('\n', " "));
            Ok(ExitCode::FAILURE)
        }
    }
}

/// What sends traces until it is dropped.
#[derive(Default)]
struct Traces {
    #[cfg(feature = "otlp")]
    _sender: Option<holdfast_daemon::trace::Tracer>,
}

/// The log goes to stderr; traces, if there are any, to where the configuration says.
fn log_and_trace(config: &Config, log_level: Option<String>) -> Result<Traces> {
    let from_env = std::env::var("RUST_LOG").ok().filter(|v| !v.is_empty());
    let (origin, text) = match (log_level, from_env) {
        (Some(text), _) => ("--log-level", text),
        (None, Some(text)) => ("RUST_LOG", text),
        (None, None) => ("log.level", config.log.level.clone()),
    };
    let filter = EnvFilter::builder()
        .parse(&text)
        .with_context(|| format!("{origin} {text:?} is not a level or filter"))?;
    // What is for traces alone is not for the log.
    let filter = filter.and(filter_fn(|of| of.target() != holdfast_daemon::trace::TARGET));
    let log = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    let log = match config.log.json {
        true => log.json().flatten_event(true).with_filter(filter).boxed(),
        false => log.with_filter(filter).boxed(),
    };
    let subscriber = tracing_subscriber::registry().with(log);
    #[cfg(feature = "otlp")]
    if let Some(endpoint) = &config.tracing.endpoint {
        let samples = config.tracing.samples_per_million;
        let (layer, tracer) =
            holdfast_daemon::trace::layer(endpoint, samples).map_err(anyhow::Error::msg)?;
        subscriber.with(layer).init();
        return Ok(Traces { _sender: Some(tracer) });
    }
    subscriber.init();
    Ok(Traces::default())
}

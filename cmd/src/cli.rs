//! `holdfast`: the command line over the CRI socket.
//!
//! It talks to the CRI for everything that the CRI has, and to our Admin service for pull progress and
//! archives. Tables are for people; `-o json` is the CRI's own messages as proto3 JSON.
//!
//! stdout has what was asked for; progress, warnings and errors go to stderr. A reader of stdout that
//! goes away (`| head`) ends the command without a complaint.

mod args;
mod attach;
mod checkpoint;
mod client;
mod detach;
mod exec;
mod find;
mod forward;
mod image;
mod images;
mod info;
mod inspect;
mod list;
mod log;
mod logs;
mod progress;
mod registries;
mod remove;
mod run;
mod session;
mod stats;
mod table;
mod terminal;
mod text;
mod upgrade;
mod wire;

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::Result;
use clap::{CommandFactory as _, Parser as _};

use self::args::{Args, Command, ConfigCommand, ImageCommand, UpgradeCommand};
pub(crate) use self::client::{Client, Hint};

/// Exit code of `run`, `exec` and `attach` when the command itself did not run.
const NOT_RUN: u8 = 125;

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let not_run = match &args.command {
        Command::Run(_) | Command::Exec(_) | Command::Attach(_) => NOT_RUN,
        _ => 1,
    };
    // One thread: everything here is waiting for one socket.
    let result = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Into::into)
        .and_then(|runtime| {
            let result = runtime.block_on(dispatch(args));
            // A read of stdin that is still going on cannot be interrupted.
            runtime.shutdown_background();
            result
        });
    let result = result.and_then(|code| io::stdout().flush().map(|()| code).map_err(Into::into));
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            client::report(&error);
            ExitCode::from(not_run)
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    })
}

async fn dispatch(args: Args) -> Result<u8> {
    let global = args.global;
    match args.command {
        Command::Completion { shell } => {
            // Into memory first: the generator panics when it cannot write.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "holdfast", &mut script);
            io::stdout().write_all(&script)?;
            Ok(0)
        }
        Command::Version(version) => info::version(&global, version).await,
        command => {
            let mut client = Client::connect(&global).await?;
            let client = &mut client;
            match command {
                Command::Pods(a) => list::pods(client, a).await,
                Command::Ps(a) => list::containers(client, a).await,
                Command::Images(a) | Command::Image(ImageCommand::Ls(a)) => {
                    list::images(client, a).await
                }
                Command::Pull(a) | Command::Image(ImageCommand::Pull(a)) => {
                    image::pull(client, a).await
                }
                Command::Rmi(a) | Command::Image(ImageCommand::Rm(a)) => {
                    image::remove(client, a).await
                }
                Command::Image(ImageCommand::Import(a)) => image::import(client, a).await,
                Command::Image(ImageCommand::Push(a)) => images::push(client, a).await,
                Command::Image(ImageCommand::Save(a)) => images::save(client, a).await,
                Command::Image(ImageCommand::Tag(a)) => images::tag(client, a).await,
                Command::Commit(a) => images::commit(client, a).await,
                Command::Image(ImageCommand::Prune(a)) => images::prune(client, a).await,
                Command::Image(ImageCommand::Inspect(a)) => inspect::images(client, a).await,
                Command::Run(a) => run::run(client, *a).await,
                Command::Exec(a) => exec::exec(client, a).await,
                Command::Attach(a) => attach::attach(client, a).await,
                Command::PortForward(a) => forward::port_forward(client, a).await,
                Command::Logs(a) => logs::logs(client, a).await,
                Command::Checkpoint(a) => checkpoint::checkpoint(client, a).await,
                Command::Stop(a) => remove::stop(client, a).await,
                Command::Rm(a) => remove::remove(client, a).await,
                Command::Inspect(a) => inspect::inspect(client, a).await,
                Command::Stats(a) => stats::stats(client, a).await,
                Command::Config(ConfigCommand::Registries(a)) => {
                    registries::registries(client, a).await
                }
                Command::Upgrade(UpgradeCommand::Shims(a)) => upgrade::shims(client, a).await,
                Command::Info(a) => info::info(client, a).await,
                Command::Completion { .. } | Command::Version(_) => unreachable!("handled above"),
            }
        }
    }
}

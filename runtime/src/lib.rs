//! `hull`: the daemon of a node, and a command line for people.
//!
//! Read in this order: [`cli`] (what can be asked for), [`config`] (settings),
//! [`app`] (what `hull serve` is made of), [`cri`] (the services). [`host`] is
//! behind `hull check` and the node's status; [`run`] is `hull run`, [`containers`] what is asked
//! of containers (`hull ps` and so on), and [`images`] `hull images`, all of them clients of the same
//! socket ([`client`]).
//! `stream_backend` is between pods and the streaming server. What a pod is, is in
//! the crate `hull-pod`.

#![forbid(unsafe_code)]

mod app;
mod check;
mod cli;
mod client;
mod config;
mod containers;
mod cri;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod host;
mod images;
mod run;
mod shutdown;
mod socket;
mod stream_backend;
mod table;
mod trailing;

use std::{io, process::ExitCode};

use anyhow::{Context, Result};
use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::{
    app::App,
    check::Format,
    cli::{Cli, Command},
    config::Settings,
    containers::ContainersCommand,
    images::ImagesCommand,
};

/// We failed, where other codes are the container's or command's (as docker-run(1) has it).
const OWN_FAILURE: u8 = 125;
/// Nobody reads our output any more: as if SIGPIPE had ended us.
const NO_READER: u8 = 141;

/// Does what the command line asks for.
pub fn main() -> ExitCode {
    // First of all: it must be the only thread.
    if let Some(code) = hull_image::worker(std::env::args_os()) {
        return code;
    }
    let cli = Cli::parse();
    let failure = match &cli.command {
        Command::Run(_)
        | Command::Containers(ContainersCommand::Exec(_) | ContainersCommand::Attach(_)) => {
            ExitCode::from(OWN_FAILURE)
        }
        _ => ExitCode::FAILURE,
    };
    match execute(cli) {
        Ok(code) => code,
        Err(error) if lost_reader(&error) => ExitCode::from(NO_READER),
        Err(error) => {
            eprintln!("hull: {error:#}");
            failure
        }
    }
}

fn lost_reader(error: &anyhow::Error) -> bool {
    let mut causes = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

fn execute(cli: Cli) -> Result<ExitCode> {
    let settings = Settings::load(&cli.flags)?;
    let runtime = tokio::runtime::Runtime::new().context("start the async runtime")?;
    match cli.command {
        Command::Serve => {
            socket::keep_private();
            log(&settings, "info")?;
            runtime.block_on(serve(settings))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Check { json } => {
            log(&settings, "warn")?;
            let format = if json { Format::Json } else { Format::Text };
            let good = runtime.block_on(check::check(&settings, format))?;
            Ok(if good {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Command::Run(arguments) => {
            log(&settings, "error")?;
            let code = runtime.block_on(run::run(settings, *arguments))?;
            Ok(ExitCode::from(code))
        }
        Command::Containers(command) => {
            log(&settings, "error")?;
            let code = runtime.block_on(containers::run(&settings, command))?;
            Ok(ExitCode::from(code))
        }
        Command::Pull(asked) => {
            log(&settings, "error")?;
            runtime.block_on(images::run(settings, ImagesCommand::Pull(asked)))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Images(command) => {
            log(&settings, "error")?;
            runtime.block_on(images::run(settings, command))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Version => {
            println!("hull {}", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn serve(settings: Settings) -> Result<()> {
    let stop = shutdown::requested().context("install signal handlers")?;
    App::start(settings).await?.serve(stop).await?;
    Ok(())
}

fn log(settings: &Settings, default: &str) -> Result<()> {
    let filter = settings.log.as_deref().unwrap_or(default);
    let filter = EnvFilter::try_new(filter).with_context(|| format!("log filter {filter:?}"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
        .init();
    Ok(())
}

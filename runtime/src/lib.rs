//! `hull`: the daemon of a node, and a command line for people.
//!
//! Read in this order: [`cli`] (what can be asked for), [`config`] (settings),
//! [`app`] (what `hull serve` is made of), [`service`] (what the service manager hears of it), [`cri`] (the
//! services). [`host`] is
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
mod exit;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod host;
mod images;
pub mod reference;
mod reset;
mod run;
mod service;
mod shutdown;
mod socket;
mod stream_backend;
mod table;
mod trailing;

use std::{io, process::ExitCode};

use anyhow::{Context, Result};
use clap::Parser;
use tokio::runtime::Runtime;
use tracing_subscriber::EnvFilter;

use crate::{
    app::App,
    check::Format,
    cli::{Cli, Command, ConfigCommand},
    config::{Flags, Settings, keys},
    containers::ContainersCommand,
    images::ImagesCommand,
};

/// Does what the command line asks for.
pub fn main() -> ExitCode {
    // First of all: it must be the only thread.
    if let Some(code) = hull_image::worker(std::env::args_os()) {
        return code;
    }
    let cli = Cli::parse();
    let codes_are_others = matches!(
        &cli.command,
        Command::Run(_)
            | Command::Containers(ContainersCommand::Exec(_) | ContainersCommand::Attach(_))
    );
    match execute(cli) {
        Ok(code) => code,
        Err(error) => {
            let lost_reader = exit::lost_reader(&error);
            if !lost_reader {
                eprintln!("hull: {error:#}");
            }
            ExitCode::from(if codes_are_others && !lost_reader {
                exit::OWN_FAILURE
            } else {
                exit::code(&error)
            })
        }
    }
}

fn execute(cli: Cli) -> Result<ExitCode> {
    let flags = &cli.flags;
    // What is logged when nothing else is said.
    let start = |level| -> Result<(Settings, Runtime)> {
        let settings = Settings::load(flags)?;
        log(&settings, level)?;
        let runtime = Runtime::new().context("start the async runtime")?;
        Ok((settings, runtime))
    };
    let code = match cli.command {
        Command::Serve => {
            socket::keep_private();
            let (settings, runtime) = start("info")?;
            runtime.block_on(serve(settings))?;
            0
        }
        Command::Check { json } => {
            let (settings, runtime) = start("warn")?;
            let format = if json { Format::Json } else { Format::Text };
            runtime.block_on(check::check(&settings, format))?;
            0
        }
        Command::Run(arguments) => {
            let (settings, runtime) = start("error")?;
            runtime.block_on(run::run(settings, *arguments))?
        }
        Command::Containers(command) => {
            let (settings, runtime) = start("error")?;
            runtime.block_on(containers::run(&settings, command))?
        }
        Command::Pull(asked) => {
            let (settings, runtime) = start("error")?;
            runtime.block_on(images::run(settings, ImagesCommand::Pull(asked)))?;
            0
        }
        Command::Images(command) => {
            let (settings, runtime) = start("error")?;
            runtime.block_on(images::run(settings, command))?;
            0
        }
        Command::Reset(arguments) => {
            let (settings, runtime) = start("error")?;
            runtime.block_on(reset::reset(settings, &arguments))?;
            0
        }
        Command::Config(command) => {
            configuration(command, flags)?;
            0
        }
        Command::Version => {
            println!("hull {}", env!("CARGO_PKG_VERSION"));
            0
        }
    };
    Ok(ExitCode::from(code))
}

fn configuration(command: ConfigCommand, flags: &Flags) -> Result<()> {
    let text = match command {
        ConfigCommand::Default => keys::default_file(),
        ConfigCommand::Show => Settings::show(flags)?,
        ConfigCommand::Check => {
            Settings::load(flags)?;
            "the configuration makes sense\n".to_owned()
        }
    };
    table::print(&text)
}

async fn serve(settings: Settings) -> Result<()> {
    let stop = shutdown::requested().context("install signal handlers")?;
    let socket = settings.listen.clone();
    let app = App::start(settings).await?;
    service::ready(socket);
    let stop = async {
        stop.await;
        service::stopping();
    };
    app.serve(stop).await?;
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

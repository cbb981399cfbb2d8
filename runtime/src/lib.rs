//! `hull`: the daemon of a node, and a command line for people.
//!
//! Read in this order: [`cli`] (what can be asked for), [`config`] (settings),
//! [`app`] (what `hull serve` is made of), [`service`] (what the service manager hears of it), [`cri`] (the
//! services), [`life`] (plugins have their say), [`reload`] (SIGHUP), [`metrics`] (`/metrics`), [`traces`]. [`host`] is
//! behind `hull check` and the node's status; [`run`] is `hull run`, [`containers`] what is asked
//! of containers (`hull ps` and so on), and [`images`] `hull images`, all of them clients of the same
//! socket ([`client`]).
//! `stream_backend` is between pods and the streaming server. What a pod is, is in
//! the crate `hull-pod`.

#![forbid(unsafe_code)]

mod app;
mod authority;
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
mod life;
mod metrics;
pub mod reference;
mod reload;
mod reset;
mod run;
mod runtime_class;
mod service;
mod shutdown;
mod signals;
mod socket;
mod stream_backend;
mod support;
mod table;
mod traces;
mod trailing;

use std::{io, process::ExitCode};

use anyhow::{Context, Result};
use clap::Parser;
use tokio::runtime::Runtime;

use crate::{
    app::{App, AppError},
    cli::{Cli, Command, ConfigCommand},
    config::{Flags, Settings, keys},
    containers::ContainersCommand,
    images::ImagesCommand,
    reload::{Reload, SetLog},
    traces::Traces,
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
            if !exit::lost_reader(&error) {
                eprintln!("hull: {error:#}");
            }
            ExitCode::from(if codes_are_others {
                exit::code_of_command(&error)
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
        drop(log(&settings, level));
        let runtime = Runtime::new().context("start the async runtime")?;
        Ok((settings, runtime))
    };
    let code = match cli.command {
        Command::Serve => {
            socket::keep_private();
            let (settings, values) = Settings::load_with_values(flags)?;
            let set_log = log(&settings, "info");
            let runtime = Runtime::new().context("start the async runtime")?;
            runtime.block_on(async {
                let reload = Reload::new(flags, values, set_log)?;
                serve(settings, reload).await
            })?;
            0
        }
        Command::Check { output } => {
            let (settings, runtime) = start("warn")?;
            runtime.block_on(check::check(&settings, output.format))?;
            0
        }
        Command::Run(arguments) => {
            let (settings, runtime) = start("error")?;
            runtime.block_on(run::run(settings, *arguments))?
        }
        Command::Restore(arguments) => {
            let (settings, runtime) = start("error")?;
            runtime.block_on(run::restore(&settings, &arguments))?;
            0
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
        Command::Login(arguments) => {
            let (settings, runtime) = start("error")?;
            runtime.block_on(images::login::login(settings, arguments))?
        }
        Command::Logout(arguments) => {
            images::login::logout(&arguments)?;
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
        Command::RuntimeClass(arguments) => {
            let (settings, runtime) = start("error")?;
            runtime.block_on(async {
                let daemon = client::serving(&settings).await?;
                runtime_class::runtime_class(&daemon.client(), &settings.handlers, &arguments).await
            })?;
            0
        }
        Command::Support(arguments) => {
            let (settings, runtime) = start("error")?;
            runtime.block_on(support::support(&settings, flags, &arguments))?;
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

async fn serve(settings: Settings, reload: Reload) -> Result<()> {
    let stop = shutdown::requested().context("install signal handlers")?;
    let socket = settings.listen.clone();
    let traces = settings.traces.clone().map(Traces::start);
    let traces = traces.transpose().map_err(AppError::from)?;
    let app = App::start(settings).await?;
    tokio::spawn(reload.serve(app.backend()));
    service::ready(socket);
    let stop = async {
        stop.await;
        service::stopping();
    };
    app.serve(stop).await?;
    if let Some(traces) = traces {
        traces.end().await;
    }
    Ok(())
}

/// Begins to log; what is logged can be set later.
fn log(settings: &Settings, default: &str) -> SetLog {
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(settings.log_filter(default))
        .with_writer(io::stderr)
        .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
        .with_filter_reloading();
    let handle = subscriber.reload_handle();
    subscriber.init();
    Box::new(move |filter| Ok(handle.reload(filter)?))
}

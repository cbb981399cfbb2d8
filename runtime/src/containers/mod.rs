//! `hull ps`, `exec`, `logs` and the like: the node's containers, for a person.
//!
//! All are clients of the daemon that serves the socket. [`find`] tells which container is meant,
//! [`own`] what `hull run` leaves to it, [`streams`] opens sessions, and [`log`] prints logs.

mod checkpoint;
mod console;
mod copy;
mod debug;
mod events;
mod exec;
mod find;
mod inspect;
mod list;
mod log;
mod logs;
pub(crate) mod own;
mod ports;
mod stats;
mod stop;
mod streams;
mod suspend;
mod top;
mod trace;
mod volume;

use anyhow::Result;

pub(crate) use self::checkpoint::path_of;
pub(crate) use self::debug::NotToBeEntered;
pub(crate) use self::{
    exec::check_terminal,
    find::{exit_code, status},
    list::listed,
    log::{Show, follow},
    streams::Streams,
    suspend::start,
    volume::{PathsGiven, Volume},
};
use crate::{client, config::Settings};

/// What is asked of containers. A CONTAINER is an id or its start, a name that `hull run` gave, or
/// NAMESPACE/POD/CONTAINER.
#[derive(Debug, Clone, clap::Subcommand)]
pub(crate) enum ContainersCommand {
    /// List containers
    Ps(list::PsArgs),
    /// Run a command in a container; its exit code becomes this one's
    Exec(exec::ExecArgs),
    /// Connect to a container's input and output
    Attach(exec::AttachArgs),
    /// Print what a container wrote
    Logs(logs::LogsArgs),
    /// Stop containers, and the microVMs that `hull run` made for them
    Stop(stop::StopArgs),
    /// Remove containers, and the microVMs that `hull run` made for them
    Rm(stop::RmArgs),
    /// Print what is known of containers
    Inspect(inspect::InspectArgs),
    /// List the processes of a container
    Top(top::TopArgs),
    /// Show what containers use
    Stats(stats::StatsArgs),
    /// Print what happens to pods and containers from now on
    Events(events::EventsArgs),
    /// Print what the guest's kernel said, if debug_console is set
    Console(console::ConsoleArgs),
    /// Run a shell in a pod's guest itself, if it was started with vm.debug
    Debug(debug::DebugArgs),
    /// Copy files from or to a container, which needs a tar(1) for it
    Cp(copy::CpArgs),
    /// Write a pod's memory and disk to a directory, while it goes on; `hull restore` goes on from there
    Checkpoint(checkpoint::CheckpointArgs),
    /// Write a pod's memory and disk to a directory, and end it; `hull resume` has it go on as what it was
    Suspend(checkpoint::CheckpointArgs),
    /// Have a pod go on that `hull suspend` wrote
    Resume(suspend::ResumeArgs),
    /// Draw the start of a pod by stage, as an SVG picture that browsers show
    Trace(trace::TraceArgs),
    /// Forward ports of 127.0.0.1 to a container's pod, until interrupted
    PortForward(ports::PortForwardArgs),
}

/// Does what is asked; returns the exit code.
pub(crate) async fn run(settings: &Settings, command: ContainersCommand) -> Result<u8> {
    let daemon = client::serving(settings).await?;
    let client = daemon.client();
    let streams = Streams::new(client.clone(), &settings.streaming)?;
    match command {
        ContainersCommand::Exec(arguments) => {
            return exec::exec(&client, &streams, &arguments).await;
        }
        ContainersCommand::Attach(arguments) => {
            return exec::attach(&client, &streams, &arguments).await;
        }
        ContainersCommand::Debug(arguments) => {
            return debug::debug(&client, &settings.pods, &arguments).await;
        }
        ContainersCommand::Stop(arguments) => return stop::stop(&client, &arguments).await,
        ContainersCommand::Rm(arguments) => {
            return stop::rm(&client, &settings.state, &arguments).await;
        }
        ContainersCommand::Ps(arguments) => list::ps(&client, &arguments).await?,
        ContainersCommand::Logs(arguments) => logs::logs(&client, &arguments).await?,
        ContainersCommand::Inspect(arguments) => inspect::inspect(&client, &arguments).await?,
        ContainersCommand::Top(arguments) => top::top(&client, &arguments).await?,
        ContainersCommand::Stats(arguments) => stats::stats(&client, &arguments).await?,
        ContainersCommand::Events(arguments) => events::events(&client, &arguments).await?,
        ContainersCommand::Console(arguments) => {
            console::console(&client, &settings.state, &arguments).await?;
        }
        ContainersCommand::Cp(arguments) => copy::cp(&client, &streams, &arguments).await?,
        ContainersCommand::Checkpoint(arguments) => {
            checkpoint::checkpoint(&client, &arguments).await?;
        }
        ContainersCommand::Suspend(arguments) => suspend::suspend(&client, &arguments).await?,
        ContainersCommand::Resume(arguments) => suspend::resume(&client, &arguments).await?,
        ContainersCommand::Trace(arguments) => trace::trace(&client, &arguments).await?,
        ContainersCommand::PortForward(arguments) => {
            ports::port_forward(&client, &streams, &arguments).await?;
        }
    }
    Ok(0)
}

//! `hull top`.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::find;
use crate::{
    client::Client,
    table::{self, Column, Format, Output},
};

/// What `hull top` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct TopArgs {
    /// Container
    container: String,
    #[command(flatten)]
    output: Output,
}

/// The processes, as the daemon tells them.
#[derive(Debug, Deserialize)]
struct Processes {
    processes: Vec<Process>,
    left_out: u64,
}

#[derive(Debug, Deserialize, Serialize)]
struct Process {
    pid: u32,
    parent: u32,
    uid: u32,
    state: String,
    cpu_ms: u64,
    memory_bytes: u64,
    age_ms: u64,
    command: String,
}

/// Lists the processes of a container.
pub(super) async fn top(client: &Client, arguments: &TopArgs) -> Result<()> {
    let found = find::one(client, &arguments.container).await?;
    if !found.is_running() {
        bail!("{} does not run", found.name());
    }
    let (_, info) = find::status(client, &found.container.id, true).await?;
    let told = info.and_then(|mut info| Some(info.get_mut("processes")?.take()));
    let Some(told) = told.filter(|told| !told.is_null()) else {
        bail!("the guest of {} does not tell its processes", found.name());
    };
    let told: Processes = serde_json::from_value(told).context("read the processes")?;
    table::print(&match arguments.output.format {
        Format::Table => text(&told.processes),
        Format::Json => table::json(told.processes.iter().map(|p| serde_json::json!(p))),
    })?;
    if told.left_out > 0 {
        eprintln!("hull: {} more processes are left out", told.left_out);
    }
    Ok(())
}

fn text(processes: &[Process]) -> String {
    let columns = [
        Column::Right("PID"),
        Column::Right("PARENT"),
        Column::Right("UID"),
        Column::Left("STATE"),
        Column::Right("CPU"),
        Column::Right("MEMORY"),
        Column::Right("AGE"),
        Column::Left("COMMAND"),
    ];
    let row = |process: &Process| {
        [
            process.pid.to_string(),
            process.parent.to_string(),
            process.uid.to_string(),
            process.state.clone(),
            cpu(process.cpu_ms),
            table::size(process.memory_bytes),
            table::seconds(process.age_ms / 1000),
            process.command.clone(),
        ]
    };
    table::text(columns, &processes.iter().map(row).collect::<Vec<_>>())
}

/// CPU time in minutes and seconds, as ps(1) has it.
fn cpu(ms: u64) -> String {
    let seconds = ms / 1000;
    format!("{}:{:02}.{:02}", seconds / 60, seconds % 60, ms % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_minutes_seconds_and_hundredths() {
        for (ms, expected) in [
            (0, "0:00.00"),
            (61_059, "1:01.05"),
            (7_199_999, "119:59.99"),
        ] {
            assert_eq!(cpu(ms), expected);
        }
    }
}

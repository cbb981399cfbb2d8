//! `hull stats`.

use std::{
    collections::HashMap,
    io::{self, IsTerminal},
    time::Duration,
};

use anyhow::Result;
use hull_proto_cri::v1::{ContainerStats, ListContainerStatsRequest, UInt64Value};
use serde_json::{Value, json};

use super::find::{self, Found};
use crate::{
    client::{Client, refused},
    table::{self, Column, Format, Output},
};

/// Between two looks; what is told of CPUs is of this time.
const INTERVAL: Duration = Duration::from_secs(1);
/// To the upper left, and the screen empty from there.
const CLEAR: &str = "\x1b[H\x1b[J";

/// What `hull stats` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct StatsArgs {
    /// Once only
    #[arg(long)]
    no_stream: bool,
    #[command(flatten)]
    output: Output,
}

/// What a container uses.
#[derive(Debug, Clone, PartialEq)]
struct Usage {
    id: String,
    name: String,
    /// In hundredths of a CPU; none when it was not there before.
    cpu_percent: Option<f64>,
    memory: u64,
    written: u64,
}

/// Shows what containers use.
pub(super) async fn stats(client: &Client, arguments: &StatsArgs) -> Result<()> {
    let format = arguments.output.format;
    let clear = !arguments.no_stream && format == Format::Table && io::stdout().is_terminal();
    let mut before = ask(client).await?;
    loop {
        tokio::time::sleep(INTERVAL).await;
        let now = ask(client).await?;
        let all = usages(&find::all(client).await?, &before, &now);
        before = now;
        let text = match format {
            Format::Json => table::json(all.iter().map(json)),
            Format::Table => text(&all),
        };
        table::print(&if clear {
            format!("{CLEAR}{text}")
        } else {
            text
        })?;
        if arguments.no_stream {
            return Ok(());
        }
    }
}

/// By id.
async fn ask(client: &Client) -> Result<HashMap<String, ContainerStats>> {
    let request = ListContainerStatsRequest::default();
    let answer = client.runtime.clone().list_container_stats(request).await;
    let stats = answer
        .map_err(refused("ask for what is used"))?
        .into_inner()
        .stats;
    let id = |stats: &ContainerStats| Some(stats.attributes.as_ref()?.id.clone());
    let stats = stats
        .into_iter()
        .filter_map(|stats| Some((id(&stats)?, stats)));
    Ok(stats.collect())
}

fn usages(
    all: &[Found],
    before: &HashMap<String, ContainerStats>,
    now: &HashMap<String, ContainerStats>,
) -> Vec<Usage> {
    let number = |value: Option<&UInt64Value>| value.map_or(0, |value| value.value);
    let usage = |found: &Found| {
        let id = &found.container.id;
        let stats = now.get(id)?;
        let memory = stats.memory.as_ref();
        let layer = stats.writable_layer.as_ref();
        Some(Usage {
            id: id.clone(),
            name: found.name(),
            cpu_percent: before.get(id).and_then(|before| cpu(before, stats)),
            memory: number(memory.and_then(|memory| memory.working_set_bytes.as_ref())),
            written: number(layer.and_then(|layer| layer.used_bytes.as_ref())),
        })
    };
    all.iter()
        .filter(|found| found.is_running())
        .filter_map(usage)
        .collect()
}

/// CPU time over time. None when no new numbers came.
fn cpu(before: &ContainerStats, now: &ContainerStats) -> Option<f64> {
    let (before, now) = (before.cpu.as_ref()?, now.cpu.as_ref()?);
    let used = |cpu: &hull_proto_cri::v1::CpuUsage| {
        cpu.usage_core_nano_seconds.as_ref().map(|time| time.value)
    };
    let used = used(now)?.checked_sub(used(before)?)?;
    let passed = u64::try_from(now.timestamp.checked_sub(before.timestamp)?).ok()?;
    #[expect(clippy::cast_precision_loss, reason = "seconds in nanoseconds")]
    let percent = used as f64 / passed as f64 * 100.0;
    (passed > 0).then_some(percent)
}

fn text(all: &[Usage]) -> String {
    let columns = [
        Column::Left("CONTAINER"),
        Column::Left("NAME"),
        Column::Right("CPU %"),
        Column::Right("MEMORY"),
        Column::Right("WRITTEN"),
    ];
    let row = |usage: &Usage| {
        [
            table::short(&usage.id),
            usage.name.clone(),
            match usage.cpu_percent {
                Some(percent) => format!("{percent:.1}"),
                None => "-".to_owned(),
            },
            table::size(usage.memory),
            table::size(usage.written),
        ]
    };
    table::text(columns, &all.iter().map(row).collect::<Vec<_>>())
}

fn json(usage: &Usage) -> Value {
    json!({
        "id": usage.id,
        "name": usage.name,
        "cpu_percent": usage.cpu_percent,
        "memory_bytes": usage.memory,
        "written_bytes": usage.written,
    })
}

#[cfg(test)]
mod tests {
    use hull_proto_cri::v1::CpuUsage;

    use super::*;

    #[test]
    fn cpu_time_is_told_of_the_time_between_two_looks() {
        let at = |timestamp, used: Option<u64>| ContainerStats {
            cpu: Some(CpuUsage {
                timestamp,
                usage_core_nano_seconds: used.map(|value| UInt64Value { value }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let first = at(1_000, Some(500));
        assert_eq!(cpu(&first, &at(3_000, Some(1_500))), Some(50.0));
        assert_eq!(cpu(&first, &at(1_000, Some(500))), None);
        assert_eq!(cpu(&first, &at(500, Some(600))), None);
        assert_eq!(cpu(&first, &at(3_000, Some(400))), None);
        assert_eq!(cpu(&first, &at(3_000, None)), None);
    }
}

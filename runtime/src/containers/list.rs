//! `hull ps`.

use anyhow::Result;
use hull_base::clock;
use hull_proto_cri::v1::ContainerState;
use serde_json::{Value, json};

use super::find::{self, Found};
use crate::{
    client::Client,
    table::{self, Column, Format, Output},
};

/// What `hull ps` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct PsArgs {
    /// Those that don't run, too
    #[arg(short, long)]
    all: bool,
    /// Ids only
    #[arg(short, long, conflicts_with = "output")]
    quiet: bool,
    #[command(flatten)]
    output: Output,
}

/// Lists containers.
pub(super) async fn ps(client: &Client, arguments: &PsArgs) -> Result<()> {
    let mut all = find::all(client).await?;
    all.retain(|found| arguments.all || found.is_running());
    if arguments.quiet {
        let ids = all.into_iter().map(|found| found.container.id);
        return table::print(&table::lines(ids));
    }
    let rows = with_exit_codes(client, all).await;
    table::print(&match arguments.output.format {
        Format::Json => table::json(rows.iter().map(json)),
        Format::Table => text(&rows, clock::now_ns()),
    })
}

/// All containers, as `hull ps -a -o json` prints them.
pub(crate) async fn listed(client: &Client) -> Result<String> {
    let rows = with_exit_codes(client, find::all(client).await?).await;
    Ok(table::json(rows.iter().map(json)))
}

async fn with_exit_codes(client: &Client, all: Vec<Found>) -> Vec<(Found, Option<i32>)> {
    let mut rows = Vec::new();
    for found in all {
        let exit_code = match found.container.state() {
            ContainerState::ContainerExited => exit_code(client, &found.container.id).await,
            _ => None,
        };
        rows.push((found, exit_code));
    }
    rows
}

/// None for one that has gone meanwhile.
async fn exit_code(client: &Client, id: &str) -> Option<i32> {
    let (status, _) = find::status(client, id, false).await.ok()?;
    Some(status.exit_code)
}

/// A word for a state.
pub(super) fn state(state: ContainerState) -> &'static str {
    match state {
        ContainerState::ContainerCreated => "created",
        ContainerState::ContainerRunning => "running",
        ContainerState::ContainerExited => "exited",
        ContainerState::ContainerUnknown => "unknown",
    }
}

fn text(rows: &[(Found, Option<i32>)], now_ns: i64) -> String {
    let columns = ["CONTAINER", "NAME", "IMAGE", "STATE", "CREATED"].map(Column::Left);
    let row = |(found, exit_code): &(Found, Option<i32>)| {
        let word = state(found.container.state());
        [
            table::short(&found.container.id),
            found.name(),
            found.image(),
            match exit_code {
                Some(code) => format!("{word} ({code})"),
                None => word.to_owned(),
            },
            format!("{} ago", table::age(found.container.created_at, now_ns)),
        ]
    };
    table::text(columns, &rows.iter().map(row).collect::<Vec<_>>())
}

fn json((found, exit_code): &(Found, Option<i32>)) -> Value {
    let (pod, container) = found.names();
    json!({
        "id": found.container.id,
        "name": found.name(),
        "namespace": pod.namespace,
        "pod": pod.name,
        "container": container,
        "pod_id": found.pod.id,
        "image": found.image(),
        "state": state(found.container.state()),
        "exit_code": exit_code,
        "created_at": table::time(found.container.created_at),
    })
}

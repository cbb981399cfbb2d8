//! `hull inspect`.

use anyhow::Result;
use hull_proto_cri::v1::{PodSandboxNetworkStatus, PodSandboxStatusRequest};
use serde_json::{Value, json};

use super::{
    find::{self, Found},
    list::state,
};
use crate::{
    client::{Client, refused},
    table::{self, Column, Format, time},
};

/// What `hull inspect` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct InspectArgs {
    /// Containers
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
    /// Form of what is printed; a table has the part that people ask for
    #[arg(short, long, value_name = "FORM", default_value = "json")]
    output: Format,
}

/// Prints what is known of containers.
pub(super) async fn inspect(client: &Client, arguments: &InspectArgs) -> Result<()> {
    let mut all = Vec::new();
    for meant in &arguments.containers {
        all.push(known(client, &find::one(client, meant).await?).await?);
    }
    table::print(&match arguments.output {
        Format::Json => format!("{:#}\n", Value::from(all)),
        Format::Table => all.iter().map(text).collect::<Vec<_>>().join("\n"),
    })
}

/// A line for each thing that is known of one, but for `info`, which is for programs.
fn text(known: &Value) -> String {
    let mut rows = Vec::new();
    for (name, value) in known.as_object().into_iter().flatten() {
        match value {
            _ if name == "info" => {}
            Value::Object(parts) => {
                let parts = parts.iter();
                rows.extend(parts.map(|(part, value)| [format!("{name}.{part}"), word(value)]));
            }
            value => rows.push([name.clone(), word(value)]),
        }
    }
    rows.retain(|[_, value]| !value.is_empty());
    table::text(["WHAT", "VALUE"].map(Column::Left), &rows)
}

fn word(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(word).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

async fn known(client: &Client, found: &Found) -> Result<Value> {
    let (status, info) = find::status(client, &found.container.id, true).await?;
    let network = network(client, found).await?;
    let others = network.additional_ips.into_iter().map(|ip| ip.ip);
    let addresses = std::iter::once(network.ip).chain(others);
    let addresses: Vec<_> = addresses.filter(|ip| !ip.is_empty()).collect();
    let (pod, container) = found.names();
    Ok(json!({
        "id": status.id,
        "name": found.name(),
        "container": container,
        "pod": {
            "id": found.pod.id,
            "namespace": pod.namespace,
            "name": pod.name,
            "uid": pod.uid,
            "runtime": found.pod.runtime_handler,
            "addresses": addresses,
        },
        "image": found.image(),
        "image_id": status.image_id,
        "state": state(status.state()),
        "exit_code": status.exit_code,
        "reason": status.reason,
        "message": status.message,
        "created_at": time(status.created_at),
        "started_at": time(status.started_at),
        "finished_at": time(status.finished_at),
        "log_path": status.log_path,
        "labels": status.labels,
        "annotations": status.annotations,
        "info": info,
    }))
}

async fn network(client: &Client, found: &Found) -> Result<PodSandboxNetworkStatus> {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: found.pod.id.clone(),
        verbose: false,
    };
    let status = client.runtime.clone().pod_sandbox_status(request).await;
    let status = status.map_err(refused("ask for the sandbox's state"))?;
    let network = status.into_inner().status.and_then(|status| status.network);
    Ok(network.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_is_told_a_thing_a_line_and_nothing_of_what_is_not_there() {
        let known = json!({
            "id": "ab", "pod": {"name": "p", "addresses": ["10.0.0.1", "fd00::1"], "uid": ""},
            "exit_code": 0, "reason": "", "finished_at": null, "labels": {"a": "b"},
            "info": {"much": "more"},
        });
        let text = text(&known);
        let lines = text
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
        let mut lines: Vec<_> = lines.collect();
        lines[1..].sort();
        assert_eq!(
            lines,
            [
                "WHAT VALUE",
                "exit_code 0",
                "id ab",
                "labels.a b",
                "pod.addresses 10.0.0.1, fd00::1",
                "pod.name p"
            ]
        );
    }
}

//! `hull check`: whether this host can run microVMs, in plain words.

mod certificate;
mod daemon;

use anyhow::Result;
use serde_json::{Value, json};

use crate::{
    config::Settings,
    host::{self, Finding, HostIncomplete},
    table::{self, Format},
};

/// Prints all findings.
///
/// # Errors
/// When one of them is bad.
pub(crate) async fn check(settings: &Settings, format: Format) -> Result<()> {
    let findings = find(settings).await;
    table::print(&match format {
        Format::Table => lines(&findings),
        Format::Json => table::json(
            findings
                .iter()
                .map(|(what, finding)| to_json(what, finding)),
        ),
    })?;
    let bad: Vec<&str> = findings
        .iter()
        .filter(|(_, finding)| !finding.is_good())
        .map(|(what, _)| *what)
        .collect();
    if bad.is_empty() {
        return Ok(());
    }
    Err(HostIncomplete {
        failed: bad.len(),
        network_alone: bad.iter().all(|what| host::OF_NETWORK.contains(what)),
    }
    .into())
}

/// What [`check`] prints for people.
pub(crate) async fn text(settings: &Settings) -> String {
    lines(&find(settings).await)
}

async fn find(settings: &Settings) -> Vec<(&'static str, Finding)> {
    let mut findings = host::check(settings).await;
    let socket = daemon::socket(&settings.listen).await;
    let streaming = daemon::streaming(settings.streaming.address, &socket);
    findings.extend([("CRI socket", socket), ("streaming port", streaming)]);
    if let Some(files) = &settings.streaming.tls {
        findings.push(("streaming certificate", certificate::check(&files.cert)));
    }
    findings
}

fn lines(findings: &[(&'static str, Finding)]) -> String {
    table::lines(findings.iter().map(|(what, finding)| line(what, finding)))
}

fn line(what: &str, finding: &Finding) -> String {
    match finding {
        Finding::Good(detail) => format!("ok    {what}: {detail}"),
        Finding::Bad { detail, advice } => format!("FAIL  {what}: {detail} ({advice})"),
    }
}

fn to_json(what: &str, finding: &Finding) -> Value {
    match finding {
        Finding::Good(detail) => json!({ "what": what, "ok": true, "detail": detail }),
        Finding::Bad { detail, advice } => {
            json!({ "what": what, "ok": false, "detail": detail, "advice": advice })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_to_do() {
        let bad = Finding::Bad {
            detail: "there is no /dev/kvm".into(),
            advice: "load the module".into(),
        };
        assert_eq!(
            line("kvm device", &bad),
            "FAIL  kvm device: there is no /dev/kvm (load the module)"
        );
        assert_eq!(
            line("user", &Finding::Good("root".into())),
            "ok    user: root"
        );
    }
}

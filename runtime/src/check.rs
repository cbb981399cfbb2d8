//! `hull check`: whether this host can run microVMs, in plain words.

mod daemon;

use std::io::{self, Write};

use anyhow::Result;
use serde_json::json;

use crate::{
    config::Settings,
    host::{self, Finding, HostIncomplete},
};

/// How the findings are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// A line each.
    Text,
    /// One JSON array.
    Json,
}

/// Prints all findings.
///
/// # Errors
/// When one of them is bad.
pub(crate) async fn check(settings: &Settings, format: Format) -> Result<()> {
    let mut findings = host::check(settings).await;
    let socket = daemon::socket(&settings.listen).await;
    let streaming = daemon::streaming(settings.streaming.address, &socket);
    findings.extend([("CRI socket", socket), ("streaming port", streaming)]);
    let mut out = io::stdout().lock();
    match format {
        Format::Text => {
            for (what, finding) in &findings {
                writeln!(out, "{}", line(what, finding))?;
            }
        }
        Format::Json => writeln!(out, "{}", to_json(&findings))?,
    }
    let bad = findings
        .iter()
        .filter(|(_, finding)| !finding.is_good())
        .count();
    if bad > 0 {
        return Err(HostIncomplete(bad).into());
    }
    Ok(())
}

fn line(what: &str, finding: &Finding) -> String {
    match finding {
        Finding::Good(detail) => format!("ok    {what}: {detail}"),
        Finding::Bad { detail, advice } => format!("FAIL  {what}: {detail} ({advice})"),
    }
}

fn to_json(findings: &[(&'static str, Finding)]) -> serde_json::Value {
    findings
        .iter()
        .map(|(what, finding)| match finding {
            Finding::Good(detail) => json!({ "what": what, "ok": true, "detail": detail }),
            Finding::Bad { detail, advice } => {
                json!({ "what": what, "ok": false, "detail": detail, "advice": advice })
            }
        })
        .collect()
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

//! `hull trace`: the start of a pod by stage, as a picture.

use std::{fmt::Write as _, fs, path::PathBuf};

use anyhow::{Context, Result, bail};
use hull_base::printable::one_line;
use hull_proto_cri::v1::PodSandboxStatusRequest;
use serde::Deserialize;

use super::find;
use crate::{
    client::{Client, refused},
    table::{self, short},
};

/// What `hull trace` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct TraceArgs {
    /// Pod: its id or the start of it, NAMESPACE/NAME, or the name that `hull run` gave
    #[arg(value_name = "POD")]
    pod: String,
    /// Write to FILE instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// What the daemon tells of a start.
#[derive(Debug, Deserialize)]
struct Told {
    stages: Option<Vec<Stage>>,
    #[serde(default, rename = "bootMicroseconds")]
    parts: Option<Parts>,
    cloned: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct Parts {
    total: u64,
}

/// A stage; times are in microseconds.
#[derive(Debug, Deserialize)]
struct Stage {
    name: String,
    /// The one that it is a part of.
    within: Option<usize>,
    begin: u64,
    took: u64,
    failed: bool,
}

/// Draws the start of a pod.
pub(super) async fn trace(client: &Client, arguments: &TraceArgs) -> Result<()> {
    let pod = find::pod(client, &arguments.pod).await?;
    let name = find::pod_name(&pod);
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: true,
    };
    let status = client.runtime.clone().pod_sandbox_status(request).await;
    let status = status.map_err(refused("ask for the sandbox's state"))?;
    let info = status.into_inner().info;
    let told = info.get("info").map_or("{}", String::as_str);
    let told: Told = serde_json::from_str(told).context("read what the daemon tells of the pod")?;
    let (Some(stages), Some(parts)) = (&told.stages, &told.parts) else {
        bail!("the start of {name} is not known: another daemon than this one has started it");
    };
    let how = match told.cloned {
        Some(true) => "a clone",
        _ => "booted",
    };
    let title = format!("{name} ({}), {how}", short(&pod.id));
    let picture = draw(&title, stages, parts.total);
    match &arguments.output {
        Some(path) => fs::write(path, picture).with_context(|| format!("write {}", path.display())),
        None => table::print(&picture),
    }
}

/// Pixels: of the picture, of the names, of what is beside the bars, and of a line.
const WIDTH: u64 = 1100;
const NAMES: u64 = 330;
const TIMES: u64 = 90;
const LINE: u64 = 22;
/// Where the first line is.
const TOP: u64 = 76;
/// Marks on the axis of time.
const MARKS: u64 = 6;
/// Longest name.
const NAME_MAX: usize = 48;

/// The stages as bars over time, those that are parts of another one below it.
fn draw(title: &str, stages: &[Stage], total: u64) -> String {
    let lines = lines(stages);
    let end = stages
        .iter()
        .map(|stage| stage.begin.saturating_add(stage.took))
        .chain([total, 1])
        .max()
        .unwrap_or(1);
    let chart = WIDTH - NAMES - TIMES;
    let x = |us: u64| {
        u64::try_from(u128::from(us) * u128::from(chart) / u128::from(end)).unwrap_or(chart)
    };
    let height = TOP + LINE * lines.len() as u64 + 16;
    let title = escape(title, 200);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <title>{title}</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"12\" y=\"26\" font-size=\"16\">Start of {title}: {}</text>\n",
        time(total)
    );
    let mut add = |line: std::fmt::Arguments<'_>| {
        // Writing to a string does not fail.
        let _ = svg.write_fmt(line);
    };
    for mark in 0..=MARKS {
        let us = end / MARKS * mark;
        let at = NAMES + x(us);
        add(format_args!(
            "<line x1=\"{at}\" y1=\"58\" x2=\"{at}\" y2=\"{}\" stroke=\"#dddddd\"/>\n\
             <text x=\"{at}\" y=\"52\" text-anchor=\"middle\" fill=\"#666666\">{}</text>\n",
            height - 10,
            time(us)
        ));
    }
    for (row, (stage, depth)) in lines.iter().enumerate() {
        let y = TOP + LINE * row as u64;
        let (name, took) = (escape(&stage.name, NAME_MAX), time(stage.took));
        let (left, wide) = (NAMES + x(stage.begin), x(stage.took).max(1));
        let indent = 12 + 16 * depth.min(&8);
        let (fill, failed) = match stage.failed {
            true => ("#c62828", " (failed)"),
            false => (colour(&stage.name), ""),
        };
        add(format_args!(
            "<g><title>{name}: {took}, from {}{failed}</title>\n\
             <text x=\"{indent}\" y=\"{}\">{name}</text>\n\
             <rect x=\"{left}\" y=\"{y}\" width=\"{wide}\" height=\"16\" rx=\"2\" fill=\"{fill}\"/>\n\
             <text x=\"{}\" y=\"{}\" fill=\"#444444\">{took}{failed}</text></g>\n",
            time(stage.begin),
            y + 13,
            left + wide + 6,
            y + 13,
        ));
    }
    svg.push_str("</svg>\n");
    svg
}

/// All stages with how deep they are within others, parts behind what they are parts of.
fn lines(stages: &[Stage]) -> Vec<(&Stage, usize)> {
    fn add<'a>(
        stages: &'a [Stage],
        within: Option<usize>,
        depth: usize,
        into: &mut Vec<(&'a Stage, usize)>,
    ) {
        let is_part = |(index, stage): &(usize, &Stage)| {
            // A stage is kept behind what it is a part of.
            stage.within.filter(|outer| outer < index) == within
        };
        for (index, stage) in stages.iter().enumerate().filter(is_part) {
            into.push((stage, depth));
            add(stages, Some(index), depth + 1, into);
        }
    }
    let mut all = Vec::with_capacity(stages.len());
    add(stages, None, 0, &mut all);
    all
}

/// By who does the work.
fn colour(name: &str) -> &'static str {
    match name.split_once(": ") {
        Some(("vmm", _)) => "#7e57c2",
        Some(("agent" | "guest", _)) => "#2e8b57",
        Some(("cni", _)) => "#ef8e19",
        _ => "#3f7fbf",
    }
}

/// A time, for a person.
fn time(us: u64) -> String {
    if us < 1000 {
        return format!("{us} µs");
    }
    let ms = us as f64 / 1000.0;
    if us < 1_000_000 {
        format!("{ms:.1} ms")
    } else {
        format!("{:.2} s", ms / 1000.0)
    }
}

/// A text that is nothing but text in XML.
fn escape(text: &str, max: usize) -> String {
    let mut escaped = String::new();
    for char in one_line(text, max).chars() {
        match char {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&apos;"),
            // XML has no others, whatever stands for them.
            ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'.. => {
                escaped.push(char);
            }
            _ => escaped.push('\u{fffd}'),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(name: &str, within: Option<usize>, begin: u64, took: u64) -> Stage {
        Stage {
            name: name.to_owned(),
            within,
            begin,
            took,
            failed: name == "bad",
        }
    }

    #[test]
    fn parts_are_below_what_they_are_parts_of_and_as_long_as_they_took() {
        let stages = [
            stage("network", None, 0, 30_000),
            stage("spawn", None, 0, 10_000),
            stage("cni: bridge ADD", Some(0), 5_000, 20_000),
            stage("bad", None, 40_000, 0),
            // Of none that is before it: it is shown all the same.
            stage("astray", Some(7), 0, 1),
        ];
        let names: Vec<_> = lines(&stages)
            .iter()
            .map(|(stage, depth)| (stage.name.as_str(), *depth))
            .collect();
        let expected = [
            ("network", 0),
            ("cni: bridge ADD", 1),
            ("spawn", 0),
            ("bad", 0),
            ("astray", 0),
        ];
        assert_eq!(names, expected);
        let svg = draw("default/web", &stages, 68_000);
        // 680 pixels are 68 ms.
        for bar in [
            r##"<rect x="330" y="76" width="300" height="16" rx="2" fill="#3f7fbf"/>"##,
            r##"<rect x="380" y="98" width="200" height="16" rx="2" fill="#ef8e19"/>"##,
            r##"<rect x="730" y="142" width="1" height="16" rx="2" fill="#c62828"/>"##,
        ] {
            assert!(svg.contains(bar), "no {bar} in {svg}");
        }
        assert!(svg.contains("20.0 ms") && svg.contains("(failed)"), "{svg}");
        assert!(draw("nothing", &[], 0).ends_with("</svg>\n"));
        draw("late", &[stage("x", None, u64::MAX, u64::MAX)], u64::MAX);
    }

    #[test]
    fn hostile_names_are_only_text() {
        let hostile = "<script>alert('1')</script>&\"\u{1b}[31m\u{0}\u{ffff}]]>";
        let svg = draw(hostile, &[stage(hostile, None, 0, 1)], 1);
        assert!(!svg.contains("<script") && !svg.contains("]]>"), "{svg}");
        assert!(svg.contains("&lt;script&gt;alert(&apos;1&apos;)"), "{svg}");
        assert!(!svg.contains(['\u{1b}', '\u{0}', '\u{ffff}']), "{svg:?}");
        let tags = svg.matches('<').count();
        assert_eq!(
            draw("x", &[stage("x", None, 0, 1)], 1).matches('<').count(),
            tags
        );
        let long = draw("x", &[stage(&"y".repeat(10_000), None, 0, 1)], 1);
        assert!(long.len() < 5_000, "{}", long.len());
    }

    #[test]
    fn times_have_their_unit() {
        assert_eq!(
            [0, 999, 1500, 61_000_000].map(time),
            ["0 µs", "999 µs", "1.5 ms", "61.00 s"]
        );
    }
}

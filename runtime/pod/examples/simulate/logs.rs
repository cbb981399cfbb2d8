//! What a container writes, and what its log has of it.

use std::{fs, path::Path};

/// What the arguments of a fake process have it write: lines of standard output and of standard error.
fn written(args: &[String]) -> [Vec<String>; 2] {
    let mut outputs = [String::new(), String::new()];
    let mut is_open = true;
    for arg in args {
        let (word, value) = arg.split_once(':').unwrap_or((arg, ""));
        let (output, text) = match word {
            "out" => (0, value.replace("\\n", "\n")),
            "err" => (1, value.replace("\\n", "\n")),
            "lines" => {
                let count: u32 = value.parse().unwrap();
                (0, (0..count).map(|n| format!("line {n}\n")).collect())
            }
            "close" => {
                is_open = false;
                continue;
            }
            _ => continue,
        };
        if is_open {
            outputs[output].push_str(&text);
        }
    }
    outputs.map(|text| text.lines().map(str::to_owned).collect())
}

/// Compares a log with what was written: each output is a beginning of it, or all of it.
pub fn check(directory: &Path, name: &str, args: &[String], is_whole: bool) -> Result<(), String> {
    let text = all(directory, name);
    let mut found = [Vec::new(), Vec::new()];
    for line in text.lines() {
        let mut parts = line.splitn(4, ' ');
        let (Some(time), Some(stream), Some(_), Some(text)) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(format!("no line of a log: {line:?}"));
        };
        if time.len() != "2000-01-01T00:00:00.000000000Z".len() {
            return Err(format!("no time: {line:?}"));
        }
        match stream {
            "stdout" => found[0].push(text.to_owned()),
            "stderr" => found[1].push(text.to_owned()),
            _ => return Err(format!("no stream: {line:?}")),
        }
    }
    // What it answers to the signal that asks it to end comes at any time, and once.
    let before = found[0].len();
    found[0].retain(|line| line != "TERM");
    if before > found[0].len() + 1 {
        return Err("it was asked to end more than once".into());
    }
    let written = written(args);
    for (found, written) in found.iter().zip(&written) {
        let is_beginning = found.len() <= written.len() && written.starts_with(found);
        // A line that is not ended may be cut by the end of its process.
        let is_complete = found.len() == written.len();
        if !is_beginning || (is_whole && !is_complete) {
            return Err(format!(
                "{found:?} instead of {written:?}, whole: {is_whole}"
            ));
        }
    }
    Ok(())
}

/// The log with what was rotated, oldest first.
fn all(directory: &Path, name: &str) -> String {
    let rotated = (0..).map(|n| directory.join(format!("{name}.log.{n}")));
    let rotated = rotated.take_while(|path| path.exists());
    let paths = rotated.chain([directory.join(format!("{name}.log"))]);
    paths
        .map(|path| fs::read_to_string(path).unwrap_or_default())
        .collect()
}

/// Renames all logs of pods, as a rotator does that asks nobody.
pub fn rotate_all(logs: &Path) {
    let entries = |path: &Path| {
        let found = fs::read_dir(path).into_iter().flatten().flatten();
        let mut paths: Vec<_> = found.map(|entry| entry.path()).collect();
        paths.sort();
        paths
    };
    for pod in entries(logs) {
        for log in entries(&pod) {
            if log.extension().is_some_and(|end| end == "log")
                && let Some(name) = log.file_stem().and_then(|name| name.to_str())
            {
                rotate(&pod, name);
            }
        }
    }
}

/// Renames a log as a rotator does.
pub fn rotate(directory: &Path, name: &str) {
    let free = (0..).find(|n| !directory.join(format!("{name}.log.{n}")).exists());
    let to = directory.join(format!("{name}.log.{}", free.unwrap_or(0)));
    // It may not have been begun.
    let _ = fs::rename(directory.join(format!("{name}.log")), to);
}

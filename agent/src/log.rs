//! Where the agent's own words go: the kernel log, so that they appear on the
//! console in order with the kernel's.

use std::{fs::OpenOptions, io, sync::Mutex};

use tracing_subscriber::filter::LevelFilter;

/// Words on the kernel command line that set the level ("hull.log=debug").
const PARAMETER: &str = "hull.log=";

/// Starts logging. In a guest to `/dev/kmsg`, else to standard error.
pub(crate) fn start(guest: bool) {
    let command_line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let wanted = std::env::var("HULL_LOG").ok();
    let level = match (guest, wanted) {
        (false, Some(level)) => level,
        _ => level(&command_line).unwrap_or_default().to_owned(),
    };
    let builder = tracing_subscriber::fmt()
        .with_max_level(level.parse().unwrap_or(LevelFilter::WARN))
        .with_ansi(false)
        .without_time();
    let kmsg = OpenOptions::new().write(true).open("/dev/kmsg");
    match kmsg {
        Ok(kmsg) if guest => builder.with_writer(Mutex::new(kmsg)).init(),
        _ => builder.with_writer(io::stderr).init(),
    }
}

fn level(command_line: &str) -> Option<&str> {
    command_line
        .split_whitespace()
        .find_map(|word| word.strip_prefix(PARAMETER))
        .filter(|level| !level.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_sets_the_level() {
        assert_eq!(level("quiet hull.log=debug ro"), Some("debug"));
        assert_eq!(level("quiet hull.log= ro"), None);
        assert_eq!(level("xhull.log=debug"), None);
    }
}

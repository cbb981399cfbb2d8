//! What commands print: lists for people and for programs, and the forms that numbers have in them.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _, Write as _},
};

use anyhow::{Context, Result};
use hull_base::clock;
use rustix::termios::tcgetwinsize;
use serde_json::Value;

/// Digits of an id that people are shown; enough to ask by.
const SHORT_ID: usize = 12;
/// A column is made no narrower than this: what is cut is still told from others, and ids are whole.
const NARROWEST: usize = SHORT_ID;
/// What is between columns.
const GAP: &str = "  ";

/// The form in which a list is printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people; as wide as the terminal
    #[default]
    Table,
    /// For programs
    Json,
}

/// The form that is asked for.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub(crate) struct Output {
    /// Form of what is printed
    #[arg(
        short = 'o',
        long = "output",
        value_name = "FORM",
        default_value = "table",
        id = "output"
    )]
    pub(crate) format: Format,
}

/// The head of a column, which tells to which side its cells are moved.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Column {
    /// Texts.
    Left(&'static str),
    /// Numbers.
    Right(&'static str),
}

/// A line for the heads and one for each row, for standard output: a terminal gets lines that fit, where
/// that can be done by cutting texts.
pub(crate) fn text<const N: usize>(columns: [Column; N], rows: &[[String; N]]) -> String {
    within(terminal_width(), columns, rows)
}

/// The characters of a line of the terminal that standard output is, if it is one.
fn terminal_width() -> Option<usize> {
    let out = io::stdout();
    let size = out
        .is_terminal()
        .then(|| tcgetwinsize(out).ok())
        .flatten()?;
    // A serial line may not know.
    Some(size.ws_col.into()).filter(|&width| width > 0)
}

fn within<const N: usize>(
    width: Option<usize>,
    columns: [Column; N],
    rows: &[[String; N]],
) -> String {
    let heads = columns.map(|column| match column {
        Column::Left(head) | Column::Right(head) => head.to_owned(),
    });
    let mut widths = heads.each_ref().map(|head| head.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    if let Some(width) = width {
        fit(width, columns, &mut widths);
    }
    let mut text = String::new();
    for row in std::iter::once(&heads).chain(rows) {
        let mut line = String::new();
        for ((column, cell), width) in columns.iter().zip(row).zip(widths) {
            let cell = cut(cell, width);
            // Writing to a string does not fail.
            let _ = match column {
                Column::Left(_) => write!(line, "{cell:width$}{GAP}"),
                Column::Right(_) => write!(line, "{cell:>width$}{GAP}"),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Makes the widest columns of texts narrower, until a line is no longer than that.
fn fit<const N: usize>(width: usize, columns: [Column; N], widths: &mut [usize; N]) {
    let gaps = GAP.len() * N.saturating_sub(1);
    while widths.iter().sum::<usize>() + gaps > width {
        let texts = columns.iter().zip(widths.iter_mut());
        let texts = texts
            .filter(|(column, width)| matches!(column, Column::Left(_)) && **width > NARROWEST);
        match texts.map(|(_, width)| width).max() {
            Some(widest) => *widest -= 1,
            None => return,
        }
    }
}

/// At most so many characters, none of which moves a terminal's cursor: guests and clients chose them.
fn cut(cell: &str, width: usize) -> String {
    let mut chars: Vec<char> = cell.chars().collect();
    for char in chars.iter_mut().filter(|char| char.is_control()) {
        *char = char::REPLACEMENT_CHARACTER;
    }
    if chars.len() > width {
        chars.truncate(width.saturating_sub(1));
        chars.push('…');
    }
    chars.into_iter().collect()
}

/// One JSON array in a line.
pub(crate) fn json(items: impl Iterator<Item = Value>) -> String {
    format!("{}\n", items.collect::<Value>())
}

/// A text a line.
pub(crate) fn lines(texts: impl IntoIterator<Item = String>) -> String {
    texts.into_iter().map(|text| text + "\n").collect()
}

/// Writes to standard output, at once.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.context("write to standard output")
}

/// The start of an id.
pub(crate) fn short(id: &str) -> String {
    let digits = id.trim_start_matches("sha256:");
    digits.get(..SHORT_ID).unwrap_or(digits).to_owned()
}

/// Bytes in a unit that suits them.
pub(crate) fn size(bytes: u64) -> String {
    let mut value = bytes;
    let mut tenths = 0;
    let mut unit = "B";
    for larger in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024 {
            break;
        }
        tenths = value % 1024 * 10 / 1024;
        value /= 1024;
        unit = larger;
    }
    if unit == "B" {
        format!("{value} B")
    } else {
        format!("{value}.{tenths} {unit}")
    }
}

/// How long ago a moment (Unix time in nanoseconds) was, in a unit that suits it.
pub(crate) fn age(at_ns: i64, now_ns: i64) -> String {
    let ns = now_ns.saturating_sub(at_ns).max(0);
    seconds(ns.unsigned_abs() / 1_000_000_000)
}

/// A time in a unit that suits it.
pub(crate) fn seconds(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// A moment as RFC 3339 has it; none for one that there was not.
pub(crate) fn time(at_ns: i64) -> Option<String> {
    let mut text = String::new();
    clock::write_rfc3339(at_ns, &mut text);
    (at_ns != 0).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_unit_that_suits_them() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (5 << 20, "5.0 MiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(size(bytes), expected);
        }
    }

    #[test]
    fn ages_have_the_unit_that_suits_them() {
        for (seconds, expected) in [
            (-5, "0 s"),
            (119, "119 s"),
            (120, "2 min"),
            (7200, "2 h"),
            (200_000, "2 d"),
        ] {
            assert_eq!(age(0, seconds * 1_000_000_000), expected);
        }
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [
            ["a".to_owned(), "1".to_owned(), String::new()],
            ["längster".to_owned(), "1000".to_owned(), "x".to_owned()],
        ];
        let text = text(
            [Column::Left("NAME"), Column::Right("N"), Column::Left("X")],
            &rows,
        );
        assert_eq!(
            text,
            "NAME         N  X\na            1\nlängster  1000  x\n"
        );
    }

    #[test]
    fn texts_are_cut_where_a_terminal_is_narrow_and_numbers_and_ids_are_not() {
        let columns = [
            Column::Left("ID"),
            Column::Left("NAME"),
            Column::Right("SIZE"),
        ];
        let id = "0123456789ab";
        let row = |name: &str| [id.to_owned(), name.to_owned(), "1234567.8 KiB".to_owned()];
        let rows = [
            row("registry.example/team/application:1"),
            row("b\u{1b}[31m"),
        ];
        for (width, expected) in [
            (Some(46), "registry.example…"),
            (Some(41), "registry.ex…"),
            (Some(3), "registry.ex…"),
            (Some(99), "registry.example/team/application:1"),
            (None, "registry.example/team/application:1"),
        ] {
            let text = within(width, columns, &rows);
            let lines: Vec<&str> = text.lines().collect();
            assert_eq!(lines.len(), 3, "{text}");
            assert_eq!(lines[1], format!("{id}  {expected}  1234567.8 KiB"));
            let longest = lines.iter().map(|line| line.chars().count()).max();
            assert!(
                longest <= width.map(|width| width.max(41)).or(longest),
                "{text}"
            );
            assert!(
                lines[2].starts_with(&format!("{id}  b\u{fffd}[31m")),
                "{text}"
            );
        }
    }
}

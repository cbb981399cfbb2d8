//! What commands print: lists for people, and the forms that numbers have in them.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
};

use anyhow::{Context, Result};
use hull_base::clock;

/// Digits of an id that people are shown; enough to ask by.
const SHORT_ID: usize = 12;

/// The head of a column, which tells to which side its cells are moved.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Column {
    /// Texts.
    Left(&'static str),
    /// Numbers.
    Right(&'static str),
}

/// A line for the heads and one for each row; columns are as wide as they need to be.
pub(crate) fn text<const N: usize>(columns: [Column; N], rows: &[[String; N]]) -> String {
    let heads = columns.map(|column| match column {
        Column::Left(head) | Column::Right(head) => head.to_owned(),
    });
    let mut widths = heads.each_ref().map(|head| head.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in std::iter::once(&heads).chain(rows) {
        let mut line = String::new();
        for ((column, cell), width) in columns.iter().zip(row).zip(widths) {
            // Writing to a string does not fail.
            let _ = match column {
                Column::Left(_) => write!(line, "{cell:width$}  "),
                Column::Right(_) => write!(line, "{cell:>width$}  "),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
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
    let seconds = now_ns.saturating_sub(at_ns).max(0) / 1_000_000_000;
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
}

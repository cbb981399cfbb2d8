//! Text that a hostile side sent, made fit to be shown.

/// The text without control characters but line ends, and no longer than `max` bytes.
#[must_use]
pub fn printable(text: &str, max: usize) -> String {
    let mut out = String::with_capacity(text.len().min(max));
    for c in text.chars() {
        let c = if c.is_control() && c != '\n' {
            char::REPLACEMENT_CHARACTER
        } else {
            c
        };
        if out.len().saturating_add(c.len_utf8()) > max {
            break;
        }
        out.push(c);
    }
    out
}

/// The text in one line of at most `max` characters, without control characters. One that is longer loses
/// its middle: of an error, what failed stands at the beginning and why at the end.
#[must_use]
pub fn one_line(text: &str, max: usize) -> String {
    const CUT: &str = " ... ";
    let words: Vec<&str> = text.split_whitespace().collect();
    let line: Vec<char> = words
        .join(" ")
        .chars()
        .map(|c| {
            if c.is_control() {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect();
    if line.len() <= max {
        return line.into_iter().collect();
    }
    let kept = max.saturating_sub(CUT.len());
    let (begin, end) = (kept / 2, kept - kept / 2);
    let (begin, end) = (line.iter().take(begin), line.iter().skip(line.len() - end));
    begin
        .copied()
        .chain(CUT.chars())
        .chain(end.copied())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_keeps_its_beginning_and_its_end_in_one_line() {
        assert_eq!(one_line("a\n  b\t\u{1b}[31mc\r\n", 64), "a b \u{fffd}[31mc");
        assert_eq!(
            one_line(&format!("mount it:{}\nno ä", "x".repeat(99)), 20),
            "mount i ... xxx no ä"
        );
        assert_eq!(one_line("ä".repeat(20).as_str(), 20), "ä".repeat(20));
    }

    #[test]
    fn text_of_the_guest_is_tamed() {
        assert_eq!(printable("a\u{1b}[31mb", 64), "a\u{fffd}[31mb");
        assert_eq!(printable("äöü", 3), "ä");
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_the_guest_is_tamed() {
        assert_eq!(printable("a\u{1b}[31mb", 64), "a\u{fffd}[31mb");
        assert_eq!(printable("äöü", 3), "ä");
    }
}

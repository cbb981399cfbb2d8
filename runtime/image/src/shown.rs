//! Text of strangers in messages: errors end in events that owners of pods read.

/// At most so many characters in one line, all of them printable.
pub(crate) fn line(text: &str, most: usize) -> String {
    let printable = |c: char| c.is_alphanumeric() || c == ' ' || c.is_ascii_punctuation();
    let mut line: String = text
        .chars()
        .take(most)
        .map(|c| if printable(c) { c } else { '?' })
        .collect();
    if text.chars().nth(most).is_some() {
        line.push_str("...");
    }
    line
}

/// Why text is not the JSON that it should be, without any of the text: it may come from where its
/// reader must not see it.
pub(crate) fn json_error(error: &serde_json::Error) -> String {
    let (line, column) = (error.line(), error.column());
    if error.is_data() {
        // Names of fields are this program's own.
        let missing = error.to_string();
        if missing.starts_with("missing field") {
            return missing;
        }
        return format!("unexpected value at line {line} column {column}");
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_printable_is_shown_and_not_much_of_it() {
        assert_eq!(line("it's ünder 7!", 100), "it's ünder 7!");
        assert_eq!(line("a\nb\u{1b}[31m\u{202e}c\u{2028}", 100), "a?b?[31m?c?");
        assert_eq!(line(&"x".repeat(50), 10), "xxxxxxxxxx...");
    }

    #[test]
    fn json_that_does_not_fit_is_not_quoted() {
        #[derive(Debug, serde::Deserialize)]
        struct Expected {
            #[serde(rename = "size")]
            _size: u64,
        }
        let error = |text: &str| json_error(&serde_json::from_str::<Expected>(text).unwrap_err());
        for text in [
            r#""secret""#,
            r#"{"size":"secret"}"#,
            r#"["secret"]"#,
            "secret",
        ] {
            assert!(!error(text).contains("secret"), "{}", error(text));
        }
        assert!(error("{}").contains("`size`"));
        assert!(error("").contains("EOF"));
    }
}

//! Command lines that end with another one, as in `hull run IMAGE COMMAND…`: all behind the first word
//! is the other's, options too, as docker(1) has it. Two dashes between them may be there.

use anyhow::{Result, bail};

/// The first word, and the other command line.
pub(crate) fn split(words: &[String]) -> (&str, &[String]) {
    match words {
        [] => ("", &[]),
        [first, dashes, rest @ ..] if dashes == "--" => (first, rest),
        [first, rest @ ..] => (first, rest),
    }
}

/// Refuses an option that nobody knows; it looks like a first word.
pub(crate) fn check(words: &[String]) -> Result<()> {
    match split(words).0 {
        "" => bail!("a name is empty; see --help"),
        word if word.starts_with('-') => bail!("there is no option {word}; see --help"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_the_first_word_is_as_it_was_but_for_two_dashes() {
        let parts = |text: &str| {
            let words: Vec<String> = text.split(' ').map(str::to_owned).collect();
            let (first, rest) = split(&words);
            (first.to_owned(), rest.join(" "))
        };
        for (line, rest) in [
            ("a", ""),
            ("a --", ""),
            ("a sh -c id", "sh -c id"),
            ("a -- sh -c id", "sh -c id"),
            ("a -- -- x", "-- x"),
            ("a --version", "--version"),
            ("a x -- y", "x -- y"),
        ] {
            assert_eq!(parts(line), ("a".to_owned(), rest.to_owned()), "{line}");
        }
        assert!(check(&["--bogus".to_owned(), "a".to_owned()]).is_err());
        assert!(check(&["".to_owned()]).is_err());
        assert!(check(&["a".to_owned(), "--bogus".to_owned()]).is_ok());
    }
}

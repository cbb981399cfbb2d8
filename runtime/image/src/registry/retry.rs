//! When to ask again, and from where.

use std::time::{Duration, SystemTime};

use backon::ExponentialBuilder;
use reqwest::header::{HeaderMap, HeaderValue, RETRY_AFTER};

/// Waits that grow, and how often a failure is tried again.
pub(super) fn policy(retries: u32) -> ExponentialBuilder {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(200))
        .with_max_delay(Duration::from_secs(10))
        .with_max_times(usize::try_from(retries).unwrap_or(usize::MAX))
}

/// How long a server asks to be left alone: seconds, or a date (RFC 9110, section 10.2.3).
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    // A date that has passed asks for nothing.
    Some(
        date.duration_since(SystemTime::now())
            .unwrap_or(Duration::ZERO),
    )
}

/// The first byte of `bytes 10-19/20`.
pub(super) fn range_start(range: &HeaderValue) -> Option<u64> {
    let range = range.to_str().ok()?.strip_prefix("bytes ")?;
    range.split_once('-')?.0.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use backon::BackoffBuilder;

    use super::*;

    #[test]
    fn a_wait_is_seconds_or_a_date() {
        let wait = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, text.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(wait(" 120 "), Some(Duration::from_secs(120)));
        assert_eq!(wait("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        let later = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(1000));
        assert!(wait(&later).unwrap() > Duration::from_secs(900));
        assert_eq!(wait("soon"), None);
        assert_eq!(wait("-1"), None);
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }

    #[test]
    fn a_range_says_where_it_starts() {
        let start = |text: &'static str| range_start(&HeaderValue::from_static(text));
        assert_eq!(start("bytes 10-19/20"), Some(10));
        assert_eq!(start("bytes 0-19/*"), Some(0));
        assert_eq!(start("bytes */20"), None);
        assert_eq!(start("lines 1-2/3"), None);
    }

    #[test]
    fn waits_grow_and_have_an_end() {
        let waits: Vec<_> = policy(39).build().collect();
        assert!(waits.is_sorted());
        assert_eq!(waits[0], Duration::from_millis(200));
        assert_eq!(waits[38], Duration::from_secs(10));
    }
}

//! The certificate of the streaming port, which clients stop to believe one day.

use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use x509_cert::{Certificate, time::Validity};

use crate::host::Finding;

/// In seconds.
const DAY: u64 = 24 * 60 * 60;
const RENEW: &str = "have it renewed, and `systemctl restart hull`";

/// Whether the first certificate of a file, which is the server's, can be read and is valid now.
pub(super) fn check(path: &Path) -> Finding {
    let name = path.display().to_string();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    match validity(path) {
        Ok(validity) => judge(&name, &validity, now),
        Err(why) => Finding::bad(format!("{name}: {why}"), "set `streaming.tls_cert`"),
    }
}

fn validity(path: &Path) -> Result<Validity, String> {
    let text = fs::read(path).map_err(|error| error.to_string())?;
    let chain = Certificate::load_pem_chain(&text).map_err(|error| error.to_string())?;
    let first = chain.first().ok_or("there is no certificate in it")?;
    Ok(*first.tbs_certificate().validity())
}

/// `now` is since 1970.
fn judge(name: &str, validity: &Validity, now: Duration) -> Finding {
    let Validity {
        not_before,
        not_after,
        ..
    } = validity;
    let (begin, end) = (not_before.to_unix_duration(), not_after.to_unix_duration());
    if now < begin {
        let detail = format!("{name} is not valid before {not_before}");
        return Finding::bad(
            detail,
            "set this machine's clock right, or have it made anew",
        );
    }
    match end.checked_sub(now) {
        Some(left) => Finding::Good(format!("{name} is valid for {} yet", days(left))),
        None => {
            let ago = days(now.saturating_sub(end));
            Finding::bad(format!("{name} expired {ago} ago"), RENEW)
        }
    }
}

fn days(time: Duration) -> String {
    match time.as_secs() / DAY {
        1 => "1 day".into(),
        days => format!("{days} days"),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    /// What is found of a certificate that is valid between two moments, in days from now.
    fn found(from: i64, to: i64) -> Finding {
        let at = |days: i64| {
            let day = Duration::from_secs(DAY);
            let by = day * u32::try_from(days.abs()).unwrap() + day / 2;
            let now = SystemTime::now();
            if days < 0 { now - by } else { now + by }
        };
        let mut params = CertificateParams::new(["node".to_owned()]).unwrap();
        params.not_before = at(from).into();
        params.not_after = at(to).into();
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), certificate.pem()).unwrap();
        check(file.path())
    }

    fn bad(finding: Finding) -> String {
        match finding {
            Finding::Bad { detail, advice } => format!("{detail} ({advice})"),
            Finding::Good(detail) => panic!("{detail}"),
        }
    }

    #[test]
    fn a_certificate_that_expired_is_told_before_clients_refuse_it() {
        assert!(bad(found(-9, -3)).contains("expired 3 days ago (have it renewed"));
        assert!(bad(found(1, 3)).contains("is not valid before"));
        let good = found(-1, 30);
        assert!(
            matches!(&good, Finding::Good(detail) if detail.ends_with("is valid for 30 days yet")),
            "{good:?}"
        );
    }

    #[test]
    fn a_file_that_has_no_certificate_is_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(bad(check(file.path())).contains("streaming.tls_cert"));
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        fs::write(file.path(), broken).unwrap();
        assert!(bad(check(file.path())).contains("streaming.tls_cert"));
        assert!(bad(check(Path::new("/nowhere"))).contains("No such file"));
    }
}

//! The pod's network, as it was found to have changed.

use std::net::IpAddr;

use super::state::Driver;
use crate::network::NetworkNews;

impl Driver {
    /// Takes over what became of the pod's network.
    pub(super) async fn network_changed(&mut self, news: NetworkNews) {
        // A stopped pod has none, whatever was on its way.
        if self.running.is_none() {
            return;
        }
        match news {
            NetworkNews::Addresses(there) => self.addresses_changed(there).await,
            NetworkNews::Record(record, kept) => {
                let before = self.record.network.replace(*record);
                let saved = self.save().await;
                if saved.is_err() {
                    self.record.network = before;
                }
                // An error means that nobody waits any more.
                let _ = kept.send(saved.is_ok());
            }
        }
    }

    async fn addresses_changed(&mut self, there: Vec<IpAddr>) {
        if self.record.seen_ips.as_ref() == Some(&there) {
            return;
        }
        let before = self.record.seen_ips.take();
        let before = before.unwrap_or_else(|| self.record.ips.clone());
        self.record.ips = addresses(&self.record.ips, &before, &there);
        self.record.seen_ips = Some(there);
        // A failure was logged. The next daemon compares with what was saved before.
        let _ = self.save().await;
        self.publish();
    }
}

/// The pod's addresses after its interface had `before` and has `there`: those that it keeps, then
/// those that are new. What CNI named or left out is as it was, unless it came or went. The first one
/// is of the family that it was, if there is one.
fn addresses(ips: &[IpAddr], before: &[IpAddr], there: &[IpAddr]) -> Vec<IpAddr> {
    let is_gone = |ip: &IpAddr| before.contains(ip) && !there.contains(ip);
    let is_new = |ip: &IpAddr| !before.contains(ip) && !ips.contains(ip);
    let kept = ips.iter().filter(|ip| !is_gone(ip));
    let mut next: Vec<_> = kept
        .chain(there.iter().filter(|ip| is_new(ip)))
        .copied()
        .collect();
    let first = ips.first();
    let is_alike = |ip: &IpAddr| first.is_some_and(|first| first.is_ipv4() == ip.is_ipv4());
    if let Some(at) = next.iter().position(is_alike) {
        next[..=at].rotate_right(1);
    }
    next
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_come_and_go_are_the_pods() {
        let parse = |texts: &[&str]| -> Vec<IpAddr> {
            texts.iter().map(|text| text.parse().unwrap()).collect()
        };
        // CNI names one, and one that is not there; another it leaves out.
        let named = parse(&["10.0.0.2", "192.0.2.1"]);
        let before = parse(&["10.0.0.2", "10.0.0.3"]);
        let after = |there: &[&str]| addresses(&named, &before, &parse(there));
        assert_eq!(after(&["10.0.0.3", "10.0.0.2"]), named);
        assert_eq!(after(&["10.0.0.2"]), named);
        assert_eq!(
            after(&["10.0.0.2", "10.0.0.3", "fd00::2"]),
            parse(&["10.0.0.2", "192.0.2.1", "fd00::2"])
        );
        assert_eq!(after(&["10.0.0.9"]), parse(&["192.0.2.1", "10.0.0.9"]));
        assert_eq!(after(&[]), parse(&["192.0.2.1"]));
        // Of two families.
        let both = parse(&["10.0.0.2", "fd00::2"]);
        let there = parse(&["fd00::2", "10.0.0.9"]);
        assert_eq!(
            addresses(&both, &both, &there),
            parse(&["10.0.0.9", "fd00::2"])
        );
        let there = parse(&["fd00::2"]);
        assert_eq!(addresses(&both, &both, &there), there);
        assert!(addresses(&both, &both, &[]).is_empty());
    }
}

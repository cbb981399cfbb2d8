//! Counters of network interfaces.

use hull_proto_agent::agent::InterfaceStats;

/// Reads `/proc/net/dev`; loopback is left out.
pub(super) fn interfaces(text: &str) -> Vec<InterfaceStats> {
    text.lines()
        .filter_map(|line| {
            let (name, counters) = line.split_once(':')?;
            let counters: Vec<u64> = counters
                .split_whitespace()
                .map_while(|c| c.parse().ok())
                .collect();
            let counter = |at: usize| counters.get(at).copied();
            Some(InterfaceStats {
                name: name.trim().to_owned(),
                rx_bytes: counter(0)?,
                rx_packets: counter(1)?,
                rx_errors: counter(2)?,
                rx_dropped: counter(3)?,
                tx_bytes: counter(8)?,
                tx_packets: counter(9)?,
                tx_errors: counter(10)?,
                tx_dropped: counter(11)?,
                ..InterfaceStats::default()
            })
        })
        .filter(|i| i.name != "lo")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_read_without_loopback() {
        let text = "Inter-|   Receive  |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes\n    \
            lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n  \
            eth0: 100 2 3 4 5 6 7 8 900 10 11 12 13 14 15 16\n";
        let all = interfaces(text);
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].name, "eth0");
        assert_eq!((all[0].rx_bytes, all[0].rx_packets), (100, 2));
        assert_eq!((all[0].rx_errors, all[0].rx_dropped), (3, 4));
        assert_eq!((all[0].tx_bytes, all[0].tx_packets), (900, 10));
        assert_eq!((all[0].tx_errors, all[0].tx_dropped), (11, 12));
    }
}

//! Rules that choose a routing table.

use futures::{TryStreamExt, pin_mut};
use rtnetlink::{
    Handle, IpVersion,
    packet_core::Nla,
    packet_route::{
        route::RouteProtocol,
        rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage, RulePortRange},
    },
};

use crate::{
    guest::{GuestRange, GuestRule},
    netlink::{LinkError, failed},
};

/// What a rule says when it suppresses nothing.
const NOTHING: u32 = u32::MAX;
/// `FRA_SPORT_MASK` and `FRA_DPORT_MASK` (linux/fib_rules.h), which newer kernels tell of single ports.
const PORT_MASKS: [u16; 2] = [28, 29];

/// The rules that somebody set.
pub(super) async fn read(
    handle: &Handle,
    unsupported: &mut Vec<String>,
) -> Result<Vec<GuestRule>, LinkError> {
    let mut found = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let ipv6 = version == IpVersion::V6;
        let stream = handle.rule().get(version).execute();
        pin_mut!(stream);
        while let Some(rule) = stream.try_next().await.map_err(failed("list rules"))? {
            found.extend(guest_rule(&rule, ipv6, unsupported));
        }
    }
    Ok(found)
}

/// The rule as the guest needs it; none for those that every kernel has, and for those that it can't
/// be told of, which `unsupported` names: without a part it would not mean the same.
fn guest_rule(rule: &RuleMessage, ipv6: bool, unsupported: &mut Vec<String>) -> Option<GuestRule> {
    let by_kernel = RuleAttribute::Protocol(RouteProtocol::Kernel);
    if rule.attributes.contains(&by_kernel) {
        return None;
    }
    match translate(rule, ipv6) {
        Ok(rule) => Some(rule),
        Err(why) => {
            let priority = rule.attributes.iter().find_map(|a| match a {
                RuleAttribute::Priority(priority) => Some(*priority),
                _ => None,
            });
            unsupported.push(format!("rule {}: {why}", priority.unwrap_or(0)));
            None
        }
    }
}

fn translate(rule: &RuleMessage, ipv6: bool) -> Result<GuestRule, String> {
    let header = &rule.header;
    if !matches!(
        header.action,
        RuleAction::ToTable
            | RuleAction::Blackhole
            | RuleAction::Unreachable
            | RuleAction::Prohibit
    ) {
        return Err(format!("its action {:?}", header.action));
    }
    let mut to = GuestRule {
        ipv6,
        invert: header.flags.contains(RuleFlags::Invert),
        tos: u32::from(header.tos),
        action: u32::from(u8::from(header.action)),
        table: u32::from(header.table),
        ..GuestRule::default()
    };
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => to.priority = *priority,
            RuleAttribute::Table(table) => to.table = *table,
            RuleAttribute::Source(ip) => to.source = format!("{ip}/{}", header.src_len),
            RuleAttribute::Destination(ip) => to.destination = format!("{ip}/{}", header.dst_len),
            RuleAttribute::Iifname(name) => to.input.clone_from(name),
            RuleAttribute::Oifname(name) => to.output.clone_from(name),
            RuleAttribute::FwMark(mark) => to.mark = *mark,
            RuleAttribute::FwMask(mask) => to.mask = *mask,
            RuleAttribute::SuppressPrefixLen(length) => {
                to.suppress_prefix = Some(*length).filter(|length| *length != NOTHING);
            }
            RuleAttribute::IpProtocol(protocol) => to.protocol = u32::from(u8::from(*protocol)),
            RuleAttribute::SourcePortRange(ports) => to.source_ports = Some(range(ports)),
            RuleAttribute::DestinationPortRange(ports) => to.destination_ports = Some(range(ports)),
            RuleAttribute::UidRange(users) => {
                to.users = Some(GuestRange {
                    first: users.start,
                    last: users.end,
                });
            }
            RuleAttribute::SuppressIfGroup(group) if *group == NOTHING => {}
            RuleAttribute::Protocol(_) => {}
            // All bits of a port count: no other mask can be told, and this one goes without saying.
            RuleAttribute::Other(other)
                if PORT_MASKS.contains(&other.kind()) && value(other) == [0xff; 2] => {}
            other => return Err(format!("its attribute {other:?}")),
        }
    }
    Ok(to)
}

fn range(ports: &RulePortRange) -> GuestRange {
    GuestRange {
        first: u32::from(ports.start),
        last: u32::from(ports.end),
    }
}

fn value(attribute: &impl Nla) -> Vec<u8> {
    let mut bytes = vec![0; attribute.value_len()];
    attribute.emit_value(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use rtnetlink::{packet_core::DefaultNla, packet_route::rule::RuleUidRange};

    use super::*;

    fn told(attributes: Vec<RuleAttribute>) -> (Option<GuestRule>, Vec<String>) {
        let mut rule = RuleMessage::default();
        rule.header.action = RuleAction::ToTable;
        rule.attributes = vec![RuleAttribute::Priority(7), RuleAttribute::Table(100)];
        rule.attributes.extend(attributes);
        let mut unsupported = Vec::new();
        let rule = guest_rule(&rule, false, &mut unsupported);
        (rule, unsupported)
    }

    #[test]
    fn all_selectors_are_told() {
        let port = RulePortRange { start: 80, end: 80 };
        let (rule, unsupported) = told(vec![
            RuleAttribute::IpProtocol(17.into()),
            RuleAttribute::SourcePortRange(RulePortRange { start: 1, end: 9 }),
            RuleAttribute::DestinationPortRange(port),
            RuleAttribute::Other(DefaultNla::new(29, vec![0xff, 0xff])),
            RuleAttribute::UidRange(RuleUidRange { start: 0, end: 5 }),
            RuleAttribute::SuppressIfGroup(NOTHING),
        ]);
        let rule = rule.unwrap();
        let range = |first, last| Some(GuestRange { first, last });
        assert_eq!((rule.protocol, rule.table), (17, 100));
        assert_eq!(rule.source_ports, range(1, 9));
        assert_eq!(rule.destination_ports, range(80, 80));
        assert_eq!(rule.users, range(0, 5));
        assert!(unsupported.is_empty());
    }

    #[test]
    fn a_rule_that_is_not_told_whole_is_named() {
        for attribute in [
            RuleAttribute::TunId(5),
            RuleAttribute::SuppressIfGroup(5),
            // Only some bits of the port count.
            RuleAttribute::Other(DefaultNla::new(29, vec![0xf0, 0xff])),
            // What a later kernel adds.
            RuleAttribute::Other(DefaultNla::new(99, vec![0xff, 0xff])),
        ] {
            let (rule, unsupported) = told(vec![attribute]);
            assert_eq!(rule, None);
            assert!(
                unsupported[0].starts_with("rule 7: its attribute"),
                "{unsupported:?}"
            );
        }
        let (rule, unsupported) = told(vec![RuleAttribute::Protocol(RouteProtocol::Kernel)]);
        assert_eq!((rule, unsupported.len()), (None, 0));
    }
}

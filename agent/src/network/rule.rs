//! Policy rules.

use hull_proto_agent::agent as proto;
use nix::errno::Errno;
use rtnetlink::{
    Handle,
    packet_route::{
        AddressFamily,
        rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage, RulePortRange, RuleUidRange},
    },
};

use super::error::{NetworkError, Result};
use super::netlink::{failed, gone};
use super::parse::{parse_cidr, parse_name};

/// A checked [`proto::Rule`].
#[derive(Debug, PartialEq)]
pub(super) struct Rule(RuleMessage);

impl Rule {
    pub(super) fn parse(rule: &proto::Rule) -> Result<Self> {
        let mut message = RuleMessage::default();
        let header = &mut message.header;
        header.family = if rule.ipv6 {
            AddressFamily::Inet6
        } else {
            AddressFamily::Inet
        };
        header.action = match u8::try_from(rule.action).map(RuleAction::from) {
            Ok(
                action @ (RuleAction::ToTable
                | RuleAction::Blackhole
                | RuleAction::Unreachable
                | RuleAction::Prohibit),
            ) => action,
            _ => return Err(NetworkError::Kind(rule.action)),
        };
        header.tos = u8::try_from(rule.tos).map_err(|_| NetworkError::Kind(rule.tos))?;
        if rule.invert {
            header.flags |= RuleFlags::Invert;
        }
        let prefix = |text: &str| {
            let some = (!text.is_empty()).then(|| parse_cidr(text)).transpose()?;
            match some {
                Some((address, _)) if address.is_ipv6() != rule.ipv6 => {
                    Err(NetworkError::MixedFamilies(text.to_owned()))
                }
                some => Ok(some),
            }
        };
        let attributes = &mut message.attributes;
        attributes.push(RuleAttribute::Priority(rule.priority));
        if let Some((address, length)) = prefix(&rule.source)? {
            header.src_len = length;
            attributes.push(RuleAttribute::Source(address));
        }
        if let Some((address, length)) = prefix(&rule.destination)? {
            header.dst_len = length;
            attributes.push(RuleAttribute::Destination(address));
        }
        if !rule.input.is_empty() {
            attributes.push(RuleAttribute::Iifname(parse_name(&rule.input)?));
        }
        if !rule.output.is_empty() {
            attributes.push(RuleAttribute::Oifname(parse_name(&rule.output)?));
        }
        if rule.mark > 0 || rule.mask > 0 {
            attributes.push(RuleAttribute::FwMark(rule.mark));
            attributes.push(RuleAttribute::FwMask(rule.mask));
        }
        if rule.table > 0 {
            attributes.push(RuleAttribute::Table(rule.table));
        }
        if let Some(length) = rule.suppress_prefix {
            attributes.push(RuleAttribute::SuppressPrefixLen(length));
        }
        if rule.protocol > 0 {
            let protocol = u8::try_from(rule.protocol);
            let protocol = protocol.map_err(|_| NetworkError::Protocol(rule.protocol))?;
            attributes.push(RuleAttribute::IpProtocol(protocol.into()));
        }
        if let Some(ports) = rule.source_ports.as_ref() {
            attributes.push(RuleAttribute::SourcePortRange(parse_ports(ports)?));
        }
        if let Some(ports) = rule.destination_ports.as_ref() {
            attributes.push(RuleAttribute::DestinationPortRange(parse_ports(ports)?));
        }
        if let Some(users) = rule.users.as_ref() {
            let (start, end) = (users.first, users.last);
            if start > end {
                return Err(NetworkError::Range(start, end));
            }
            attributes.push(RuleAttribute::UidRange(RuleUidRange { start, end }));
        }
        Ok(Self(message))
    }

    pub(super) async fn apply(&self, handle: &Handle) -> Result<()> {
        let mut request = handle.rule().add();
        *request.message_mut() = self.0.clone();
        match request.execute().await {
            Err(rtnetlink::Error::NetlinkError(message))
                if message.raw_code() == -(Errno::EEXIST as i32) =>
            {
                Ok(())
            }
            result => result.map_err(failed("add rule", &self.text())),
        }
    }

    pub(super) async fn remove(&self, handle: &Handle) -> Result<()> {
        let removed = gone(handle.rule().del(self.0.clone()).execute().await);
        removed.map_err(failed("remove rule", &self.text()))
    }

    fn text(&self) -> String {
        format!("{:?}", self.0.attributes)
    }
}

fn parse_ports(range: &proto::Range) -> Result<RulePortRange> {
    match (u16::try_from(range.first), u16::try_from(range.last)) {
        (Ok(start), Ok(end)) if (1..=end).contains(&start) => Ok(RulePortRange { start, end }),
        _ => Err(NetworkError::Range(range.first, range.last)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_have_ranges_that_are_some() {
        let range = |first, last| proto::Range {
            first,
            last,
            ..proto::Range::default()
        };
        let rule = |ports: proto::Range, users: proto::Range| {
            Rule::parse(&proto::Rule {
                action: 1,
                table: 100,
                protocol: 17,
                destination_ports: Some(ports).into(),
                users: Some(users).into(),
                ..proto::Rule::default()
            })
        };
        let Rule(message) = rule(range(80, 90), range(0, u32::MAX)).unwrap();
        for attribute in [
            RuleAttribute::IpProtocol(17.into()),
            RuleAttribute::DestinationPortRange(RulePortRange { start: 80, end: 90 }),
            RuleAttribute::UidRange(RuleUidRange {
                start: 0,
                end: u32::MAX,
            }),
        ] {
            assert!(message.attributes.contains(&attribute), "{attribute:?}");
        }
        for bad in [(0, 5), (6, 5), (5, 65536)] {
            let rule = rule(range(bad.0, bad.1), range(0, 0));
            assert!(matches!(rule, Err(NetworkError::Range(..))), "{bad:?}");
        }
        let rule = rule(range(1, 1), range(2, 1));
        assert!(matches!(rule, Err(NetworkError::Range(2, 1))));
        let protocol = Rule::parse(&proto::Rule {
            action: 1,
            protocol: 256,
            ..proto::Rule::default()
        });
        assert!(matches!(protocol, Err(NetworkError::Protocol(256))));
    }
}

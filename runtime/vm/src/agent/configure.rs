//! What the agent is told about its pod: names, network, resolver, clock, random bytes.

use std::{fmt::Write, net::IpAddr};

use hull_network::{GuestNetwork, GuestRange};
use hull_proto_agent::agent::{
    ConfigureRequest, Interface, Neighbor, NextHop, Range, Route, Rule, UpdateNetworkRequest,
    UserNamespace, WakeRequest,
};

use hull_base::clock;
use hull_spec::{
    id::PodId,
    spec::{Dns, SandboxSpec},
};

/// The request that tells the agent about its pod, once it runs.
#[must_use]
pub fn request(
    pod: &PodId,
    spec: &SandboxSpec,
    network: &GuestNetwork,
    ips: &[IpAddr],
    resolv_conf: String,
) -> ConfigureRequest {
    let hostname = spec.guest_hostname();
    let user_namespace = spec.namespaces.user_namespace.map(|user| UserNamespace {
        host_uid: user.uids.host,
        uid_count: user.uids.length,
        host_gid: user.gids.host,
        gid_count: user.gids.length,
        ..UserNamespace::default()
    });
    ConfigureRequest {
        sandbox_id: pod.to_string(),
        hosts: hosts(hostname, ips),
        hostname: hostname.to_owned(),
        sysctls: spec.sysctls.clone().into_iter().collect(),
        interfaces: interfaces(network),
        routes: routes(network),
        neighbors: neighbors(network),
        rules: rules(network),
        resolv_conf,
        realtime_ns: clock::now_ns().unsigned_abs(),
        entropy: entropy(),
        user_namespace: user_namespace.into(),
        ..ConfigureRequest::default()
    }
}

/// The request that makes a clone another one than its template; with `restored` it comes from a checkpoint of
/// a pod.
#[must_use]
pub fn wake(restored: bool) -> WakeRequest {
    WakeRequest {
        restored,
        realtime_ns: clock::now_ns().unsigned_abs(),
        entropy: entropy(),
        ..WakeRequest::default()
    }
}

fn entropy() -> Vec<u8> {
    let bytes: [u8; 64] = std::array::from_fn(|_| rand::random());
    bytes.to_vec()
}

/// The request that tells the agent of a changed network.
#[must_use]
pub fn network(network: &GuestNetwork) -> UpdateNetworkRequest {
    UpdateNetworkRequest {
        interfaces: interfaces(network),
        routes: routes(network),
        neighbors: neighbors(network),
        rules: rules(network),
        ..UpdateNetworkRequest::default()
    }
}

fn interfaces(network: &GuestNetwork) -> Vec<Interface> {
    let told = network.interfaces.iter().map(|interface| Interface {
        mac: interface.mac.clone(),
        name: interface.name.clone(),
        mtu: interface.mtu,
        addresses: interface.addresses.clone(),
        lone_addresses: interface.lone_addresses.clone(),
        ..Interface::default()
    });
    told.collect()
}

fn routes(network: &GuestNetwork) -> Vec<Route> {
    let told = network.routes.iter().map(|route| Route {
        destination: route.destination.clone(),
        gateway: route.gateway.clone(),
        source: route.source.clone(),
        interface: route.interface.clone(),
        mtu: route.mtu,
        metric: route.metric,
        scope: route.scope,
        onlink: route.onlink,
        table: route.table,
        kind: route.kind,
        next_hops: route
            .next_hops
            .iter()
            .map(|hop| NextHop {
                gateway: hop.gateway.clone(),
                interface: hop.interface.clone(),
                weight: hop.weight,
                onlink: hop.onlink,
                ..NextHop::default()
            })
            .collect(),
        ..Route::default()
    });
    told.collect()
}

fn neighbors(network: &GuestNetwork) -> Vec<Neighbor> {
    let told = network.neighbors.iter().map(|neighbor| Neighbor {
        address: neighbor.address.clone(),
        mac: neighbor.mac.clone(),
        interface: neighbor.interface.clone(),
        ..Neighbor::default()
    });
    told.collect()
}

fn rules(network: &GuestNetwork) -> Vec<Rule> {
    let range = |range: Option<GuestRange>| {
        let told = range.map(|range| Range {
            first: range.first,
            last: range.last,
            ..Range::default()
        });
        told.into()
    };
    let told = network.rules.iter().map(|rule| Rule {
        ipv6: rule.ipv6,
        priority: rule.priority,
        invert: rule.invert,
        source: rule.source.clone(),
        destination: rule.destination.clone(),
        input: rule.input.clone(),
        output: rule.output.clone(),
        tos: rule.tos,
        mark: rule.mark,
        mask: rule.mask,
        action: rule.action,
        table: rule.table,
        suppress_prefix: rule.suppress_prefix,
        protocol: rule.protocol,
        source_ports: range(rule.source_ports),
        destination_ports: range(rule.destination_ports),
        users: range(rule.users),
        ..Rule::default()
    });
    told.collect()
}

/// The text of /etc/resolv.conf: what the pod asks for, else what CNI returned, else the host's.
pub fn resolv_conf(
    asked: Option<&Dns>,
    cni: &hull_network::Dns,
    host: impl FnOnce() -> String,
) -> String {
    match asked {
        Some(dns) if *dns != Dns::default() => lines(&dns.servers, &dns.searches, &dns.options),
        _ if !cni.nameservers.is_empty() => {
            // The local domain is a search list of one, which a longer list replaces (resolv.conf(5)).
            let domain =
                Vec::from_iter(Some(cni.domain.clone()).filter(|domain| !domain.is_empty()));
            let search = if cni.search.is_empty() {
                &domain
            } else {
                &cni.search
            };
            lines(&cni.nameservers, search, &cni.options)
        }
        _ => host(),
    }
}

fn lines(servers: &[String], searches: &[String], options: &[String]) -> String {
    let mut text = String::new();
    if !searches.is_empty() {
        let _ = writeln!(text, "search {}", searches.join(" "));
    }
    for server in servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !options.is_empty() {
        let _ = writeln!(text, "options {}", options.join(" "));
    }
    text
}

fn hosts(hostname: &str, ips: &[IpAddr]) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    for ip in ips {
        let _ = writeln!(text, "{ip}\t{hostname}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pods_own_resolver_settings_come_first() {
        let asked = Dns {
            servers: vec!["10.0.0.10".into()],
            searches: vec!["a.svc".into(), "svc".into()],
            options: vec!["ndots:5".into()],
        };
        let cni = hull_network::Dns {
            nameservers: vec!["1.1.1.1".into()],
            ..hull_network::Dns::default()
        };
        let host = || "host".to_owned();
        assert_eq!(
            resolv_conf(Some(&asked), &cni, host),
            "search a.svc svc\nnameserver 10.0.0.10\noptions ndots:5\n"
        );
        let empty = Dns::default();
        assert_eq!(
            resolv_conf(Some(&empty), &cni, host),
            "nameserver 1.1.1.1\n"
        );
        assert_eq!(
            resolv_conf(None, &hull_network::Dns::default(), host),
            "host"
        );
        let local = hull_network::Dns {
            domain: "local.test".into(),
            ..cni.clone()
        };
        assert_eq!(
            resolv_conf(None, &local, host),
            "search local.test\nnameserver 1.1.1.1\n"
        );
        let searched = hull_network::Dns {
            search: vec!["a.test".into(), "b.test".into()],
            ..local
        };
        assert_eq!(
            resolv_conf(None, &searched, host),
            "search a.test b.test\nnameserver 1.1.1.1\n"
        );
    }

    #[test]
    fn a_long_pod_name_is_cut_to_a_host_name() {
        let mut spec = SandboxSpec::default();
        spec.metadata.name = format!("{}-{}", "a".repeat(62), "b".repeat(62));
        assert_eq!(spec.guest_hostname(), "a".repeat(62));
        spec.hostname = "web".into();
        assert_eq!(spec.guest_hostname(), "web");
    }

    #[test]
    fn the_host_name_is_in_hosts() {
        let text = hosts("web", &["10.88.0.5".parse().unwrap()]);
        assert!(text.ends_with("10.88.0.5\tweb\n"), "{text}");
    }
}

//! Which connections can be handed off, and why the others cannot; and which way the kernel moves those of the proxy.
//!
//! PURE. Owns: the rules. Must never: look anything up; facts come in, a choice or a reason in one line goes out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use drowse_ebpf::{Endpoint, FAMILY_V4, FAMILY_V6};

use crate::address::Address;
use crate::config::{PlaneChoice, RunArgs, Switch};

/// What is known of one of drowse's listeners.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerFacts {
    /// How people know it.
    pub name: String,
    /// Where it listens; `None` for a unix socket.
    pub address: Option<SocketAddr>,
    /// An IPv6 listener that takes no IPv4.
    pub only_v6: bool,
    /// What sets it apart, if anything does.
    pub peculiarity: Option<Peculiarity>,
}

/// What keeps the connections of a TCP listener from being handed off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peculiarity {
    /// It speaks more than TCP: MPTCP, for one.
    NotPlainTcp,
    /// It belongs to another network namespace than the one that drowse runs in.
    OtherNetns,
    /// The kernel does not tell to which one it belongs (before Linux 5.14).
    UnknownNetns,
    /// `SO_REUSEPORT`: others may listen on the same address.
    SharesPort,
    /// `SO_BINDTODEVICE`: only what comes through one interface is for it.
    BoundToDevice,
}

impl Peculiarity {
    fn reason(self) -> &'static str {
        match self {
            Self::NotPlainTcp => "it is no plain TCP socket (SocketProtocol= of the .socket unit)",
            Self::OtherNetns => "it belongs to another network namespace than drowse",
            Self::UnknownNetns => "hand-off needs Linux 5.15, and this kernel is older",
            Self::SharesPort => "others may share its address (ReusePort= of the .socket unit)",
            Self::BoundToDevice => "it is bound to a network interface (BindToDevice= of the .socket unit)",
        }
    }
}

/// A way by which the kernel moves the flows that the proxy has accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirection {
    /// What a socket of the proxy receives goes out of the other one.
    Own,
    /// The same, and what a program on this machine writes does not come to the proxy at all.
    Ends,
    /// The latter where the probes find nothing that others would notice, else the former.
    Best,
}

impl Redirection {
    /// Its word on the command line.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Own | Self::Best => "sockmap",
            Self::Ends => "sockmap-ends",
        }
    }
}

/// What `--plane auto` and `--plane handoff` take for the flows that the proxy has accepted; `None` is splice.
///
/// 64 B requests on two processors, client and backend among them, seven runs of 3 to 6 rounds, against splice: at a fixed rate
/// of 20,000 a second sockmap answers 6 to 35 % sooner in the median; the 99th percentile is below it in some runs and above it in
/// others; the whole machine takes as much processor time within 8 %, nearly none of it in the proxy, which wakes up for a flow no
/// more. At saturation splice has up to 24 % more requests. A machine is rarely saturated by requests: the first counts.
const BEST: Option<Redirection> = Some(Redirection::Best);

/// The way that is wanted, as far as the options tell; `None`: the proxy moves the bytes itself.
///
/// # Errors
/// There is nothing that the kernel could move, or it may not: the reason.
pub fn redirection(run: &RunArgs, listeners: &[ListenerFacts]) -> Result<Option<Redirection>, String> {
    let wanted = match run.plane {
        PlaneChoice::Auto | PlaneChoice::Handoff => BEST,
        PlaneChoice::Sockmap => Some(Redirection::Own),
        PlaneChoice::SockmapEnds => Some(Redirection::Ends),
        PlaneChoice::Splice | PlaneChoice::Copy => None,
    };
    if wanted.is_none() {
        return Ok(None);
    }
    if run.ebpf == Switch::Off {
        return Err("--ebpf off: it is done by eBPF programs".to_owned());
    }
    if matches!(run.backend, Address::Unix(_) | Address::Abstract(_)) {
        return Err(format!("the backend's address {} is a unix socket", run.backend));
    }
    if listeners.iter().all(|listener| listener.address.is_none()) {
        return Err("every listener is a unix socket".to_owned());
    }
    Ok(wanted)
}

/// Why nothing is handed off, as far as the options tell.
#[must_use]
pub fn obstacle(run: &RunArgs) -> Option<String> {
    match run.plane {
        PlaneChoice::Auto | PlaneChoice::Handoff => {}
        PlaneChoice::Sockmap => return Some("--plane sockmap was asked for".to_owned()),
        PlaneChoice::SockmapEnds => return Some("--plane sockmap-ends was asked for".to_owned()),
        PlaneChoice::Splice => return Some("--plane splice was asked for".to_owned()),
        PlaneChoice::Copy => return Some("--plane copy was asked for".to_owned()),
    }
    if run.ebpf == Switch::Off {
        return Some("--ebpf off: a hand-off is done by eBPF programs".to_owned());
    }
    if run.proxy_protocol.is_some() {
        return Some("--proxy-protocol: only a proxy can send the header".to_owned());
    }
    if run.connections_max.is_some() {
        return Some("--connections-max: only a proxy can keep clients waiting".to_owned());
    }
    if run.max_per_source.is_some() {
        return Some("--max-per-source: only a proxy can turn clients away".to_owned());
    }
    match run.backend {
        Address::Tcp { .. } => None,
        Address::Unix(_) | Address::Abstract(_) => {
            Some(format!("the backend's address {} is a unix socket", run.backend))
        }
    }
}

/// The addresses whose connections a listener gets, as packets have them.
///
/// # Errors
/// Its connections cannot be handed off: the reason.
pub fn endpoints(listener: &ListenerFacts) -> Result<Vec<Endpoint>, String> {
    let Some(address) = listener.address else {
        return Err("it is a unix socket".to_owned());
    };
    if let Some(peculiarity) = listener.peculiarity {
        return Err(peculiarity.reason().to_owned());
    }
    if matches!(address.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local()) {
        return Err("it is at a link-local address".to_owned());
    }
    let mut endpoints = vec![endpoint(address)];
    if address.is_ipv6() && address.ip().is_unspecified() && !listener.only_v6 {
        endpoints.push(Endpoint { family: FAMILY_V4, ..endpoint(address) });
    }
    Ok(endpoints)
}

/// An address as packets have it: IPv4 in IPv6 is IPv4.
#[must_use]
pub fn endpoint(address: SocketAddr) -> Endpoint {
    let port = u32::from(address.port());
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => {
            Endpoint { address: [u32::from_ne_bytes(ip.octets()), 0, 0, 0], port, family: FAMILY_V4 }
        }
        IpAddr::V6(ip) => {
            let mut address = [0; 4];
            for (word, bytes) in address.iter_mut().zip(ip.octets().as_chunks().0) {
                *word = u32::from_ne_bytes(*bytes);
            }
            Endpoint { address, port, family: FAMILY_V6 }
        }
    }
}

/// Where a backend's listener is looked for: the unspecified address means this machine, as for connect(2).
#[must_use]
pub fn backend_endpoint(address: SocketAddr) -> Endpoint {
    let loopback = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip @ (IpAddr::V4(_) | IpAddr::V6(_)) => ip,
    };
    endpoint(SocketAddr::new(loopback, address.port()))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::config::{Action, Cli};

    fn run(options: &[&str]) -> RunArgs {
        let line = ["drowse", "run", "--listen", ":80", "--backend", "127.0.0.1:8081"];
        let Action::Run(run) = Cli::parse_from(line.iter().chain(options)).action else {
            panic!("not run");
        };
        *run
    }

    fn listener(address: &str) -> ListenerFacts {
        ListenerFacts {
            name: address.to_owned(),
            address: Some(address.parse().unwrap()),
            only_v6: false,
            peculiarity: None,
        }
    }

    #[test]
    fn an_option_that_only_a_proxy_can_fulfil_is_named() {
        assert_eq!(obstacle(&run(&[])), None);
        assert_eq!(obstacle(&run(&["--plane", "handoff"])), None);
        assert_eq!(obstacle(&run(&["--allow", "10.0.0.0/8", "--held-max", "5", "--", "true"])), None);
        for options in [
            &["--plane", "splice"][..],
            &["--plane", "copy"],
            &["--plane", "sockmap"],
            &["--plane", "sockmap-ends"],
            &["--ebpf", "off"],
            &["--proxy-protocol", "v1"],
            &["--connections-max", "5"],
            &["--max-per-source", "5"],
        ] {
            let reason = obstacle(&run(options)).unwrap();
            assert!(reason.starts_with(options[0]), "{options:?}: {reason}");
        }
        let unix = RunArgs { backend: "/run/x.sock".parse().unwrap(), ..run(&[]) };
        assert!(obstacle(&unix).unwrap().contains("/run/x.sock is a unix socket"));
    }

    #[test]
    fn the_kernel_moves_what_is_tcp_on_both_sides() {
        let tcp = [listener("127.0.0.1:80")];
        let unix = ListenerFacts { address: None, ..tcp[0].clone() };
        for (plane, wanted) in [
            ("auto", BEST),
            ("handoff", BEST),
            ("sockmap", Some(Redirection::Own)),
            ("sockmap-ends", Some(Redirection::Ends)),
            ("splice", None),
            ("copy", None),
        ] {
            let run = run(&["--plane", plane]);
            assert_eq!(redirection(&run, &tcp), Ok(wanted), "{plane}");
            if let Some(wanted) = wanted {
                assert!(plane == wanted.word() || !plane.starts_with("sockmap"), "{plane}");
                let off = RunArgs { ebpf: Switch::Off, ..run.clone() };
                assert!(redirection(&off, &tcp).unwrap_err().contains("--ebpf off"), "{plane}");
                let to_unix = RunArgs { backend: "/run/x.sock".parse().unwrap(), ..run.clone() };
                assert!(redirection(&to_unix, &tcp).unwrap_err().contains("/run/x.sock is a unix"));
                let from_unix = std::slice::from_ref(&unix);
                assert!(redirection(&run, from_unix).unwrap_err().contains("every listener"), "{plane}");
            }
        }
    }

    #[test]
    fn every_address_of_a_listener_is_covered() {
        let v4 = |bytes: [u8; 4], port| Endpoint {
            address: [u32::from_ne_bytes(bytes), 0, 0, 0],
            port,
            family: FAMILY_V4,
        };
        assert_eq!(endpoints(&listener("127.0.0.1:80")), Ok(vec![v4([127, 0, 0, 1], 80)]));
        assert_eq!(endpoints(&listener("[::ffff:127.0.0.1]:80")), Ok(vec![v4([127, 0, 0, 1], 80)]));
        assert_eq!(endpoints(&listener("0.0.0.0:81")), Ok(vec![v4([0; 4], 81)]));
        let any = Endpoint { address: [0; 4], port: 82, family: FAMILY_V6 };
        assert_eq!(endpoints(&listener("[::]:82")), Ok(vec![any, v4([0; 4], 82)]));
        let only_v6 = ListenerFacts { only_v6: true, ..listener("[::]:82") };
        assert_eq!(endpoints(&only_v6), Ok(vec![any]));
        let one =
            Endpoint { address: [0, 0, 0, u32::from_ne_bytes([0, 0, 0, 1])], port: 83, family: FAMILY_V6 };
        assert_eq!(endpoints(&listener("[::1]:83")), Ok(vec![one]));
    }

    #[test]
    fn a_listener_that_cannot_be_steered_says_why() {
        let plain = listener("127.0.0.1:80");
        assert!(endpoints(&listener("[fe80::1]:80")).unwrap_err().contains("link-local"));
        let unix = ListenerFacts { address: None, ..plain.clone() };
        assert!(endpoints(&unix).unwrap_err().contains("unix"));
        for (peculiarity, says) in [
            (Peculiarity::NotPlainTcp, "SocketProtocol="),
            (Peculiarity::OtherNetns, "network namespace"),
            (Peculiarity::UnknownNetns, "Linux 5.15"),
            (Peculiarity::SharesPort, "ReusePort="),
            (Peculiarity::BoundToDevice, "BindToDevice="),
        ] {
            let facts = ListenerFacts { peculiarity: Some(peculiarity), ..plain.clone() };
            assert!(endpoints(&facts).unwrap_err().contains(says), "{says}");
        }
    }

    #[test]
    fn a_backend_on_any_address_is_looked_for_on_this_machine() {
        let [any, one] = ["0.0.0.0:80", "127.0.0.1:80"].map(|text| backend_endpoint(text.parse().unwrap()));
        assert_eq!(any, one);
        let [any, one] = ["[::]:80", "[::1]:80"].map(|text| backend_endpoint(text.parse().unwrap()));
        assert_eq!(any, one);
    }
}

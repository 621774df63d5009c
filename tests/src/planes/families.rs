//! Sockets of every family, protocol and network namespace.

use std::fs::File;
use std::net::{TcpListener, TcpStream};

use socket2::{Protocol, Socket};

use super::MakePlane;
use super::fixture::{Bed, Kind, exercise, limit_waiting, pair};
use super::streams::mixed_flows;
use crate::isolated::{FAR, NEAR, Remote, in_netns, new_netns};

/// IPv4, IPv6, and IPv4 on IPv6, of the client and of the backend.
pub fn every_family_meets_every_other(make: MakePlane) {
    let kinds = [Kind::Tcp, Kind::Tcp6, Kind::FarMapped, Kind::NearMapped];
    let bed = Bed::new(make);
    for client_kind in kinds {
        for backend_kind in kinds {
            let (client, backend) = bed.flow(client_kind, backend_kind);
            exercise(&client, &backend);
        }
    }
    assert_eq!(bed.all_closed().flows_total, 16);
}

/// Clients that came by MPTCP, and a backend that listens for it.
pub fn mptcp_is_served(make: MakePlane) {
    if std::fs::read_to_string("/proc/sys/net/mptcp/enabled").is_ok_and(|enabled| enabled.trim() == "1") {
        let bed = Bed::new(make);
        assert_eq!(pair(Kind::Mptcp).1.protocol().unwrap(), Some(Protocol::MPTCP), "it is really MPTCP");
        for client_kind in [Kind::Mptcp, Kind::FarMptcp, Kind::Tcp] {
            for backend_kind in [Kind::Tcp, Kind::FarMptcp] {
                let (client, backend) = bed.flow(client_kind, backend_kind);
                exercise(&client, &backend);
            }
        }
        assert_eq!(bed.all_closed().flows_total, 6);
        mixed_flows(make, [Kind::Mptcp, Kind::Tcp, Kind::FarMptcp]);
    } else {
        eprintln!("not tested: net.mptcp.enabled is not 1 here, so there are no MPTCP sockets");
    }
}

/// Where the two sockets of a pair are.
#[derive(Clone, Copy)]
enum Place {
    Here,
    /// The peer's socket is on the other end of a cable, in another network namespace.
    PeerRemote,
    /// Both sockets are in another network namespace.
    BothRemote,
}

struct Places {
    remote: Remote,
    elsewhere: File,
}

impl Places {
    /// A client and the socket that was accepted from it.
    fn client(&self, place: Place) -> (Socket, Socket) {
        let Place::PeerRemote = place else { return self.both(place) };
        let listener = TcpListener::bind((NEAR, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let client = self.remote.inside(|| TcpStream::connect(address)).unwrap().unwrap();
        (client.into(), listener.accept().unwrap().0.into())
    }

    /// The plane's socket and the backend's.
    fn backend(&self, place: Place) -> (Socket, Socket) {
        let Place::PeerRemote = place else { return self.both(place) };
        let listener = self.remote.inside(|| TcpListener::bind((FAR, 0))).unwrap().unwrap();
        let connected = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (connected.into(), listener.accept().unwrap().0.into())
    }

    fn both(&self, place: Place) -> (Socket, Socket) {
        match place {
            Place::BothRemote => in_netns(&self.elsewhere, || pair(Kind::Tcp)).unwrap(),
            Place::Here | Place::PeerRemote => pair(Kind::Tcp),
        }
    }
}

/// Clients and backends of other network namespaces, and sockets of the plane's own there.
pub fn peers_in_other_network_namespaces(make: MakePlane) {
    let bed = Bed::new(make);
    let places = Places { remote: Remote::connected().unwrap(), elsewhere: new_netns().unwrap() };
    let every = [Place::Here, Place::PeerRemote, Place::BothRemote];
    for (client_place, backend_place) in every.into_iter().flat_map(|one| every.map(|other| (one, other))) {
        let (client, accepted) = places.client(client_place);
        let (connected, backend) = places.backend(backend_place);
        [&client, &backend].into_iter().for_each(limit_waiting);
        bed.open(accepted, connected);
        exercise(&client, &backend);
    }
    assert_eq!(bed.all_closed().flows_total, 9);
}

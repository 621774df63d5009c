//! Peers that send straight to the other side, and those that must be left alone.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::thread;

use drowse::ebpf::facts::{BPFFS, kernel_version};
use drowse::ebpf::{Object, layout};
use drowse::plane::choose::Redirection;
use drowse::plane::sockmap::Sockmap;
use rustix::system::uname;
use socket2::{Domain, Protocol, Socket, Type};

use super::MakePlane;
use super::fixture::{Bed, Endless, Kind, MIB, eventually, expect_end, finish, limit_waiting, pair, ping};
use super::sleepers::send_at_edges;

/// How many bytes go the short way, of those of a connection that is not congested: all but a few.
fn mostly(bytes: u64) -> u64 {
    bytes - bytes / 20
}

/// Both directions of a flow whose ends are here.
pub fn both_directions_are_cut_short(make: MakePlane) {
    const PINGS: u64 = 1000;
    let bed = Bed::new(make);
    for kind in [Kind::Tcp, Kind::Tcp6, Kind::FarMapped, Kind::NearMapped] {
        let (client, backend) = bed.flow(kind, kind);
        let open = bed.accounting.redirected();
        eventually("both send the short way", || {
            ping(&client, &backend);
            let now = bed.accounting.redirected();
            now.redirected_to_backend > open.redirected_to_backend
                && now.redirected_to_client > open.redirected_to_client
        });
        let before = bed.accounting.redirected();
        (0..PINGS).for_each(|_| ping(&client, &backend));
        let after = bed.accounting.redirected();
        assert!(after.redirected_to_backend - before.redirected_to_backend >= mostly(4 * PINGS), "{kind:?}");
        assert!(after.redirected_to_client - before.redirected_to_client >= mostly(4 * PINGS), "{kind:?}");
        assert_eq!(
            (after.passed_to_backend, after.passed_to_client),
            (0, 0),
            "nothing goes the other way through the kernel"
        );
        drop((client, backend));
        bed.all_closed();
    }
    assert_eq!(bed.accounting.redirected().peers_total, 8);
    assert_eq!(bed.accounting.redirected().flows_open, 0);
}

/// A stream much larger than any buffer, from a program that is told once that there is room.
pub fn an_edge_triggered_stream_is_cut_short(make: MakePlane) {
    const STREAM: usize = 64 * MIB;
    let bed = Bed::new(make);
    let stream = Endless::new(60);
    let (client, backend) = bed.tcp();
    ping(&client, &backend);
    for (sender, receiver) in [(&backend, &client), (&client, &backend)] {
        let before = bed.accounting.redirected();
        thread::scope(|scope| {
            scope.spawn(|| {
                send_at_edges(sender, &stream, STREAM, STREAM);
                finish(sender);
            });
            stream.expect(receiver, 0..STREAM);
            expect_end(receiver);
        });
        let after = bed.accounting.redirected();
        let moved = after.redirected_to_client + after.redirected_to_backend
            - before.redirected_to_client
            - before.redirected_to_backend;
        assert!(moved > MIB as u64, "{moved} bytes went the short way");
    }
    drop((client, backend));
    let totals = bed.all_closed();
    let expected = STREAM as u64 + 4;
    assert_eq!((totals.bytes_to_backend, totals.bytes_to_client), (expected, expected));
}

/// Somebody else is connected to the same backend.
pub fn other_connections_of_the_backend_are_left_alone(make: MakePlane) {
    let bed = Bed::new(make);
    let listener = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
    listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    listener.listen(2).unwrap();
    let connect = || {
        let near = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
        near.connect(&listener.local_addr().unwrap()).unwrap();
        let far = listener.accept().unwrap().0;
        [&near, &far].into_iter().for_each(limit_waiting);
        (near, far)
    };
    let (stranger, served) = connect();
    let (connected, backend) = connect();
    let (client, accepted) = pair(Kind::Tcp);
    bed.open(accepted, connected);
    for _ in 0..100 {
        ping(&client, &backend);
        ping(&stranger, &served);
    }
    let (late, served_late) = connect();
    for _ in 0..100 {
        ping(&late, &served_late);
        ping(&client, &backend);
    }
    let proxied = bed.accounting.redirected();
    assert_eq!(proxied.peers_total, 2, "the flow's own two");
    assert!(proxied.redirected_to_client > 0 && proxied.redirected_to_client <= 4 * 200);
}

/// A peer with an upper layer protocol: the client's MPTCP, which C, plain TCP, knows nothing of.
pub fn a_peer_with_an_upper_layer_is_left_alone(make: MakePlane) {
    let bed = Bed::new(make);
    let (client, accepted) = pair(Kind::NearMptcp);
    let (connected, backend) = pair(Kind::Tcp);
    bed.open(accepted, connected);
    eventually("the backend sends the short way", || {
        ping(&client, &backend);
        bed.accounting.redirected().redirected_to_client > 0
    });
    for _ in 0..100 {
        ping(&client, &backend);
    }
    assert_eq!(bed.accounting.redirected().peers_total, 1, "the backend's end alone");
}

/// Whether programs notice that their sockets are in a sockmap is the kernel's affair; that we find out is ours. No kernel
/// until 6.18 lets a blocking read alone.
pub fn what_peers_notice_is_found_out(_: MakePlane) {
    let mut object = Object::load(Path::new(BPFFS), "planes", Some(layout().unwrap())).unwrap();
    let (sockmap, _announcements) = Sockmap::prepare(&mut object, Redirection::Ends).unwrap();
    let answer = sockmap.peers_notice_nothing();
    let version = kernel_version(&uname().release().to_string_lossy()).unwrap();
    match answer {
        Ok(()) => assert!(version > (6, 18)),
        Err(reason) => assert!(reason.contains("a blocking read fails with EAGAIN"), "{reason}"),
    }
}

//! Bytes in order, whatever their sizes and whoever speaks first.

use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use drowse::accounting::Totals;
use drowse::sys::send_queue_bytes;
use rustix::event::PollFlags;

use super::MakePlane;
use super::fixture::{
    Bed, Endless, KIB, Kind, MIB, PATIENCE, Pattern, eventually, expect, expect_end, finish, is_ready, pair,
    ping, receive_in_chunks, send, send_in_chunks, send_until_full,
};

/// 64 flows at once, in chunks of any size, both ways, of each kind to each kind.
pub(super) fn mixed_flows(make: MakePlane, kinds: [Kind; 3]) {
    let bed = Bed::new(make);
    let mut random = Pattern(0x5eed);
    let mut expected = Totals::default();
    thread::scope(|scope| {
        for flow in 0..64_usize {
            let (client, backend) = bed.flow(kinds[flow % 3], kinds[flow / 3 % 3]);
            let limit = [1, 1000, 100 * KIB, MIB][random.below(4)];
            let there = Pattern::bytes(random.next(), random.below(limit));
            let back = Pattern::bytes(random.next(), random.below(limit));
            expected.bytes_to_backend += there.len() as u64;
            expected.bytes_to_client += back.len() as u64;
            let seed = random.next();
            scope.spawn(move || {
                thread::scope(|scope| {
                    scope.spawn(|| send_in_chunks(&client, seed, &there));
                    scope.spawn(|| send_in_chunks(&backend, seed ^ 2, &back));
                    scope.spawn(|| assert!(receive_in_chunks(&backend, seed ^ 4) == there, "to the backend"));
                    scope.spawn(|| assert!(receive_in_chunks(&client, seed ^ 8) == back, "to the client"));
                });
            });
        }
    });
    let totals = bed.all_closed();
    assert_eq!(totals.flows_total, 64);
    assert_eq!(totals.bytes_to_backend, expected.bytes_to_backend);
    assert_eq!(totals.bytes_to_client, expected.bytes_to_client);
}

/// 64 flows at once of TCP and unix sockets.
pub fn mixed_flows_arrive_whole(make: MakePlane) {
    mixed_flows(make, [Kind::Tcp, Kind::Unix, Kind::SmallTcp]);
}

/// 64 flows at once of TCP alone.
pub fn mixed_tcp_flows_arrive_whole(make: MakePlane) {
    mixed_flows(make, [Kind::Tcp, Kind::SmallTcp, Kind::Tcp]);
}

/// A server that greets before it is asked.
pub fn backend_speaks_first(make: MakePlane) {
    let bed = Bed::new(make);
    let (client, backend) = bed.tcp();
    send(&backend, b"220 hello");
    expect(&client, b"220 hello");
    ping(&client, &backend);
}

/// Bytes and FIN that were there before the plane had the flow.
pub fn bytes_before_the_flow_opens_arrive(make: MakePlane) {
    let bed = Bed::new(make);
    // The last is more than one buffer of the kernel's holds.
    for len in [0, 13, 40 * KIB, 300 * KIB] {
        let request = &Pattern::bytes(31, len);
        let answer = &Pattern::bytes(32, len);
        for fins in 0..4 {
            let [client_ends, backend_ends] = [fins & 1 != 0, fins & 2 != 0];
            let (client, accepted) = pair(Kind::Tcp);
            let (connected, backend) = pair(Kind::Tcp);
            let sides =
                [(&client, &accepted, request, client_ends), (&backend, &connected, answer, backend_ends)];
            for (peer, ours, bytes, ends) in sides {
                // Room for all of it, else the FIN would not be there before the flow.
                ours.set_recv_buffer_size(MIB).unwrap();
                peer.set_send_buffer_size(MIB).unwrap();
                assert_eq!(send_until_full(peer, bytes), len);
                if ends {
                    finish(peer);
                    assert!(is_ready(ours, PollFlags::RDHUP, PATIENCE), "bytes and FIN are there");
                } else {
                    eventually("the bytes are there", || send_queue_bytes(peer.as_fd()).unwrap() == 0);
                }
            }
            let opened = bed.accounting.totals().flows_total;
            bed.open(accepted, connected);
            assert_eq!(bed.accounting.totals().flows_total, opened + 1, "counted at once");
            expect(&backend, request);
            expect(&client, answer);
            for (sender, receiver, ended) in
                [(&client, &backend, client_ends), (&backend, &client, backend_ends)]
            {
                if !ended {
                    send(sender, b"and more");
                    expect(receiver, b"and more");
                    finish(sender);
                }
                expect_end(receiver);
            }
        }
    }
    let totals = bed.all_closed();
    let expected = 4 * (13 + 340 * KIB as u64) + 4 * 2 * 8;
    assert_eq!((totals.bytes_to_backend, totals.bytes_to_client), (expected, expected));
}

/// More bytes from both sides than fit their sockets, begun before the plane has the flow.
pub fn bytes_that_wait_for_the_flow_arrive(make: MakePlane) {
    let bed = Bed::new(make);
    let stream = Endless::new(33);
    for kind in [Kind::SmallTcp, Kind::Tcp] {
        let (client, accepted) = pair(kind);
        let (connected, backend) = pair(kind);
        let sent = [&client, &backend]
            .map(|socket| stream.send_until_full_for(socket, 0..16 * MIB, Duration::from_millis(10)));
        assert!(sent.iter().all(|sent| *sent < 16 * MIB));
        bed.open(accepted, connected);
        thread::scope(|scope| {
            let stream = &stream;
            for (sender, receiver, sent) in [(&client, &backend, sent[0]), (&backend, &client, sent[1])] {
                scope.spawn(move || {
                    stream.send(sender, sent..16 * MIB);
                    finish(sender);
                });
                scope.spawn(move || {
                    stream.expect(receiver, 0..16 * MIB);
                    expect_end(receiver);
                });
            }
        });
    }
    bed.all_closed();
}

/// Single bytes around one huge write.
pub fn tiny_and_huge_writes(make: MakePlane) {
    let bed = Bed::new(make);
    for kind in [Kind::Tcp, Kind::Unix] {
        let (client, backend) = bed.flow(kind, kind);
        for (sender, receiver) in [(&client, &backend), (&backend, &client)] {
            let tiny = Pattern::bytes(11, 2000);
            let huge = Pattern::bytes(12, 32 * MIB);
            thread::scope(|scope| {
                scope.spawn(|| {
                    tiny.chunks(1).for_each(|byte| send(sender, byte));
                    send(sender, &huge);
                    tiny.chunks(1).for_each(|byte| send(sender, byte));
                });
                expect(receiver, &tiny);
                expect(receiver, &huge);
                expect(receiver, &tiny);
            });
        }
    }
}

/// Urgent bytes arrive where they were sent.
pub fn urgent_bytes_stay_in_the_stream(make: MakePlane) {
    let bed = Bed::new(make);
    let bulk = Pattern::bytes(14, 300 * KIB);
    let (client, backend) = bed.tcp();
    for (sender, receiver) in [(&client, &backend), (&backend, &client)] {
        // What goes straight from peer to peer is as urgent there as it was here.
        receiver.set_out_of_band_inline(bed.plane.name() == "sockmap-ends").unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                send(sender, b"before");
                assert_eq!(sender.send_out_of_band(b"!").unwrap(), 1);
                send(sender, b"between");
                send(sender, &bulk);
                assert_eq!(sender.send_out_of_band(b"?").unwrap(), 1);
                send(sender, &bulk);
            });
            expect(receiver, b"before!between");
            expect(receiver, &bulk);
            expect(receiver, b"?");
            expect(receiver, &bulk);
        });
    }
}

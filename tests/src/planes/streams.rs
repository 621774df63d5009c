//! Bytes in order, whatever their sizes and whoever speaks first.

use std::thread;

use drowse::accounting::Totals;
use drowse::admission::Seat;
use drowse::plane::Flow;
use rustix::event::PollFlags;

use super::MakePlane;
use super::fixture::{
    Bed, KIB, Kind, MIB, PATIENCE, Pattern, expect, expect_end, finish, is_ready, pair, ping,
    receive_in_chunks, send, send_in_chunks,
};

/// 64 flows at once, in chunks of any size, both ways.
pub fn mixed_flows_arrive_whole(make: MakePlane) {
    let bed = Bed::new(make);
    let kinds = [Kind::Tcp, Kind::Unix, Kind::SmallTcp];
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
    let (client, accepted) = pair(Kind::Tcp);
    let (connected, backend) = pair(Kind::Tcp);
    send(&client, b"early request");
    finish(&client);
    send(&backend, b"early answer");
    finish(&backend);
    for socket in [&accepted, &connected] {
        assert!(is_ready(socket, PollFlags::RDHUP, PATIENCE), "bytes and FIN are there");
    }
    bed.plane.open(Flow { client: accepted.into(), backend: connected.into(), seat: Seat::default() });
    assert_eq!(bed.accounting.totals().flows_total, 1, "counted at once");
    expect(&backend, b"early request");
    expect_end(&backend);
    expect(&client, b"early answer");
    expect_end(&client);
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

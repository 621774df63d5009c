//! Readers that are slow, and what they cost.

use std::thread;
use std::time::Duration;

use rustix::process::{Resource, getrlimit};

use super::fixture::{
    Bed, Endless, KIB, Kind, MIB, Patient, Pattern, SMALL_BUFFER, expect, expect_end, finish, limit_fds,
    pair, pair_with_window, ping, resident_bytes, send, send_until_full,
};
use super::sleepers::send_at_edges;
use super::{MakePlane, WORKERS};

/// A reader that does not read: its sender is stopped, and memory is bounded.
pub fn slow_reader_blocks_the_sender(make: MakePlane) {
    let bed = Bed::new(make);
    let flood = Pattern::bytes(4, 64 * MIB);
    for to_backend in [true, false] {
        let (client, accepted) = pair(Kind::SmallTcp);
        let (connected, backend) = pair(Kind::SmallTcp);
        bed.open(accepted, connected);
        let (sender, reader) = if to_backend { (&client, &backend) } else { (&backend, &client) };
        let resident_before = resident_bytes();
        let sent = send_until_full(sender, &flood);
        let grown = resident_bytes().saturating_sub(resident_before);
        // The kernel doubles each of the four buffers.
        assert!(
            sent < 4 * MIB + 4 * 2 * SMALL_BUFFER,
            "{sent} bytes were taken for a reader that does not read"
        );
        assert!(grown < 4 * MIB, "memory grew by {grown} bytes");
        expect(reader, &flood[..sent]);
        ping(&client, &backend);
    }
}

fn in_turn(make: MakePlane, kind: Kind, rounds: usize) {
    let bed = Bed::new(make);
    let mut random = Pattern(0xc0de);
    let stream = Endless::new(13);
    let (client, backend) = bed.flow(kind, kind);
    for (sender, receiver) in [(&client, &backend), (&backend, &client)] {
        let (mut sent, mut received) = (0, 0);
        for round in 0..rounds {
            // A socket is full when it has had no room for a moment.
            sent = stream.send_until_full_for(sender, sent..usize::MAX, Duration::from_millis(1));
            let under_way = sent - received;
            let count = if round % 2 == 0 { under_way } else { random.below(under_way + 1) };
            stream.expect(receiver, received..received + count);
            received += count;
        }
        stream.expect(receiver, received..sent);
    }
}

/// Hundreds of changes between congested and free.
pub fn congested_and_free_in_turn(make: MakePlane) {
    in_turn(make, Kind::SmallTcp, 300);
    in_turn(make, Kind::Unix, 300);
}

/// The same, with as much under way as the kernel's own buffers hold.
pub fn congested_and_free_in_turn_with_large_buffers(make: MakePlane) {
    in_turn(make, Kind::Tcp, 200);
}

/// A client that can take a few bytes at a time: in a send queue each of them takes much more memory than its bytes. Both
/// sides send as much as they can, and are told once when there is room again.
pub fn tiny_windows_stop_no_edge_triggered_writer(make: MakePlane) {
    const STREAM: usize = 4 * MIB;
    let bed = Bed::new(make);
    let stream = Endless::new(61);
    for message in [1400, 5000, 64 * KIB] {
        for window in [2 * KIB, 4 * KIB, 16 * KIB] {
            let (client, accepted) = pair_with_window(window);
            let (connected, backend) = pair_with_window(window);
            bed.open(accepted, connected);
            (0..8).for_each(|_| ping(&client, &backend));
            let before = bed.accounting.redirected();
            thread::scope(|scope| {
                for socket in [&client, &backend] {
                    scope.spawn(|| {
                        send_at_edges(socket, &stream, STREAM, message);
                        finish(socket);
                    });
                    scope.spawn(|| {
                        stream.expect(socket, 0..STREAM);
                        expect_end(socket);
                    });
                }
            });
            let after = bed.accounting.redirected();
            let moved = after.redirected_to_client - before.redirected_to_client;
            if bed.plane.name() == "sockmap-ends" {
                assert!(moved > 0, "messages of {message}, window {window}: none went the short way");
            }
        }
    }
}

/// No descriptor can be had while bytes move.
pub fn no_descriptor_left_for_pipes(make: MakePlane) {
    let bed = Bed::new(make);
    let bulk = Pattern::bytes(16, 16 * MIB);
    let (client, backend) = bed.tcp();
    ping(&client, &backend);
    let soft = getrlimit(Resource::Nofile).current;
    limit_fds(0);
    assert!(client.try_clone().is_err(), "no descriptor can be had");
    thread::scope(|scope| {
        for socket in [&client, &backend] {
            scope.spawn(|| {
                send(socket, &bulk);
                finish(socket);
            });
        }
        for socket in [&client, &backend] {
            scope.spawn(|| {
                expect(socket, &bulk);
                expect_end(socket);
            });
        }
    });
    limit_fds(soft.unwrap());
    bed.all_closed();
}

/// Small exchanges go on beside flows that are always busy.
pub fn one_busy_flow_does_not_starve_others(make: MakePlane) {
    let bed = Bed::new(make);
    let bulk = vec![7; MIB];
    // Every worker has busy flows in both directions.
    let busy: Vec<_> = (0..WORKERS * 2).map(|_| bed.tcp()).collect();
    let (client, backend) = bed.tcp();
    let done = std::sync::atomic::AtomicBool::new(false);
    let is_done = || done.load(std::sync::atomic::Ordering::Relaxed);
    thread::scope(|scope| {
        for (client, backend) in &busy {
            for (sender, receiver) in [(client, backend), (backend, client)] {
                scope.spawn(|| {
                    while !is_done() {
                        send(sender, &bulk);
                    }
                    finish(sender);
                });
                scope.spawn(|| std::io::copy(&mut Patient(receiver), &mut std::io::sink()).unwrap());
            }
        }
        for _ in 0..50 {
            ping(&client, &backend);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

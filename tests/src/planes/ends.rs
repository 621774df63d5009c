//! Half-close.

use std::thread;

use super::MakePlane;
use super::fixture::{Bed, KIB, Kind, MIB, Pattern, expect, expect_end, finish, send, send_until_full};

fn half_close(kind: Kind, make: MakePlane, client_first: bool) {
    let bed = Bed::new(make);
    let (client, backend) = bed.flow(kind, kind);
    let (first, second) = if client_first { (&client, &backend) } else { (&backend, &client) };
    let request = Pattern::bytes(1, 10 * KIB);
    let reply = Pattern::bytes(2, 3 * MIB);
    send(first, &request);
    finish(first);
    expect(second, &request);
    expect_end(second);
    thread::scope(|scope| {
        scope.spawn(|| {
            send(second, &reply);
            finish(second);
        });
        expect(first, &reply);
        expect_end(first);
    });
    let totals = bed.all_closed();
    assert_eq!(totals.bytes_to_backend + totals.bytes_to_client, (request.len() + reply.len()) as u64);
}

/// The client ends its half, then gets the reply.
pub fn half_close_by_the_client_gets_a_reply(make: MakePlane) {
    half_close(Kind::Tcp, make, true);
    half_close(Kind::Unix, make, true);
}

/// The backend ends its half, then gets what the client still says.
pub fn half_close_by_the_backend_gets_a_reply(make: MakePlane) {
    half_close(Kind::Tcp, make, false);
    half_close(Kind::Unix, make, false);
}

/// Both sides end their halves in the same moment.
pub fn half_close_by_both_at_once(make: MakePlane) {
    let bed = Bed::new(make);
    for round in 0..200 {
        let kind = if round % 2 == 0 { Kind::Tcp } else { Kind::Unix };
        let (client, backend) = bed.flow(kind, kind);
        thread::scope(|scope| {
            for socket in [&client, &backend] {
                scope.spawn(|| {
                    send(socket, b"last words");
                    finish(socket);
                });
            }
        });
        for socket in [&client, &backend] {
            expect(socket, b"last words");
            expect_end(socket);
        }
    }
    assert_eq!(bed.all_closed().flows_total, 200);
}

/// A FIN arrives though the other direction is congested.
pub fn half_close_passes_a_congested_other_direction(make: MakePlane) {
    let bed = Bed::new(make);
    let (client, backend) = bed.flow(Kind::SmallTcp, Kind::SmallTcp);
    let flood = Pattern::bytes(3, 8 * MIB);
    let sent = send_until_full(&backend, &flood);
    assert!(sent < flood.len(), "the direction to the client is congested");
    send(&client, b"enough");
    finish(&client);
    expect(&backend, b"enough");
    expect_end(&backend);
    thread::scope(|scope| {
        scope.spawn(|| {
            send(&backend, &flood[sent..]);
            finish(&backend);
        });
        expect(&client, &flood);
        expect_end(&client);
    });
    bed.all_closed();
}

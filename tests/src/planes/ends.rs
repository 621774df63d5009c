//! Half-close.

use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use drowse::sys::send_queue_bytes;

use super::MakePlane;
use super::fixture::{
    Bed, Endless, KIB, Kind, MIB, Pattern, eventually, expect, expect_end, finish, send, send_until_full,
};

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

/// `closes`: the sender closes its socket, and does not only end its half.
fn end_behind_a_backlog(make: MakePlane, by_client: bool, closes: bool) {
    let bed = Bed::new(make);
    let stream = Endless::new(21);
    let mut expected = 0;
    for kind in [Kind::SmallTcp, Kind::Tcp, Kind::Unix] {
        for limit in [1, 40 * KIB, 200 * KIB, usize::MAX] {
            let (client, backend) = bed.flow(kind, kind);
            let (sender, reader) = if by_client { (client, backend) } else { (backend, client) };
            let sent = stream.send_until_full_for(&sender, 0..limit, Duration::from_millis(50));
            if closes {
                drop(sender);
                stream.expect(&reader, 0..sent);
                expect_end(&reader);
            } else {
                finish(&sender);
                if sent == limit && !matches!(kind, Kind::Unix) {
                    eventually("the plane has the FIN", || send_queue_bytes(sender.as_fd()).unwrap() == 0);
                }
                stream.expect(&reader, 0..sent);
                expect_end(&reader);
                send(&reader, b"got it");
                expect(&sender, b"got it");
                expected += 6;
            }
            expected += sent as u64;
        }
    }
    let totals = bed.all_closed();
    assert_eq!(totals.bytes_to_backend + totals.bytes_to_client, expected);
}

/// The client ends its half behind bytes that the backend has not read.
pub fn half_close_by_the_client_behind_a_backlog(make: MakePlane) {
    end_behind_a_backlog(make, true, false);
}

/// The backend ends its half behind bytes that the client has not read.
pub fn half_close_by_the_backend_behind_a_backlog(make: MakePlane) {
    end_behind_a_backlog(make, false, false);
}

/// The client closes behind bytes that the backend has not read.
pub fn close_by_the_client_behind_a_backlog(make: MakePlane) {
    end_behind_a_backlog(make, true, true);
}

/// The backend closes behind bytes that the client has not read.
pub fn close_by_the_backend_behind_a_backlog(make: MakePlane) {
    end_behind_a_backlog(make, false, true);
}

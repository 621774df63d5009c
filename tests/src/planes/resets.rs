//! Resets and sudden deaths.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use rustix::event::PollFlags;

use super::MakePlane;
use super::fixture::{
    Bed, KIB, Kind, MIB, PATIENCE, Patient, Pattern, eventually, expect, expect_end, finish, is_ready, ping,
    reset, send, send_until_full, until_reset,
};

fn reset_in_mid_stream(make: MakePlane, by_client: bool) {
    let bed = Bed::new(make);
    let bytes = Pattern::bytes(5, 300 * KIB);
    for _ in 0..20 {
        let (client, backend) = bed.tcp();
        ping(&client, &backend);
        let (dying, other) = if by_client { (client, backend) } else { (backend, client) };
        send_until_full(&dying, &bytes);
        reset(dying);
        let received = until_reset(&other);
        assert!(bytes.starts_with(&received), "what arrives is what was sent");
        assert_eq!(bed.all_closed().flows_open, 0);
    }
}

/// A reset by the client, with bytes under way.
pub fn reset_by_the_client_reaches_the_backend(make: MakePlane) {
    reset_in_mid_stream(make, true);
}

/// A reset by the backend, with bytes under way.
pub fn reset_by_the_backend_reaches_the_client(make: MakePlane) {
    reset_in_mid_stream(make, false);
}

/// A reset of a side that had ended its half.
pub fn reset_after_the_fin_is_passed_on(make: MakePlane) {
    let bed = Bed::new(make);
    for by_client in [true, false] {
        let (client, backend) = bed.tcp();
        let (dying, other) = if by_client { (client, backend) } else { (backend, client) };
        finish(&dying);
        expect_end(&other);
        reset(dying);
        // The end of the stream was read already; the reset shows when more is sent.
        eventually("the reset", || (&other).write(b"x").is_err());
        bed.all_closed();
    }
}

/// A backend that answers and closes with an unread request.
pub fn last_answer_before_a_reset_arrives_whole(make: MakePlane) {
    let bed = Bed::new(make);
    let answer = Pattern::bytes(6, 200 * KIB);
    for kind in [Kind::Tcp, Kind::Tcp, Kind::Unix] {
        let (client, backend) = bed.flow(kind, kind);
        send(&client, b"a request that is never read");
        assert!(is_ready(&backend, PollFlags::IN, PATIENCE));
        send(&backend, &answer[..30 * KIB]);
        if matches!(kind, Kind::Tcp) {
            eventually("acknowledged", || drowse::sys::send_queue_bytes(backend.as_fd()).unwrap() == 0);
        }
        drop(backend);
        bed.all_closed();
        // The client looks only now: nothing that was on its way may have been thrown away.
        if matches!(kind, Kind::Tcp) {
            assert!(until_reset(&client) == answer[..30 * KIB]);
        } else {
            expect(&client, &answer[..30 * KIB]);
        }
    }
}

/// The same, while the request is still coming in.
pub fn last_answer_arrives_when_the_request_hits_the_reset(make: MakePlane) {
    let bed = Bed::new(make);
    let request = Pattern::bytes(7, 4 * MIB);
    let answer = Pattern::bytes(8, 20 * KIB);
    for _ in 0..20 {
        let (client, backend) = bed.tcp();
        thread::scope(|scope| {
            scope.spawn(|| {
                // It fails in the middle, sooner or later.
                let _ = (&client).write_all(&request);
            });
            expect(&backend, &request[..KIB]);
            send(&backend, &answer);
            eventually("acknowledged", || drowse::sys::send_queue_bytes(backend.as_fd()).unwrap() == 0);
            drop(backend);
        });
        bed.all_closed();
        let mut received = Vec::new();
        // The failed send may have reported the reset; the bytes are there nevertheless.
        let _ = Patient(&client).read_to_end(&mut received);
        assert!(received == answer, "{} of {} bytes", received.len(), answer.len());
    }
}

fn killed_with_a_stalled_peer(make: MakePlane, backend_dies: bool) {
    let bed = Bed::new(make);
    let flood = Pattern::bytes(9, 64 * MIB);
    let (client, backend) = bed.flow(Kind::SmallTcp, Kind::SmallTcp);
    let (dying, stalled) = if backend_dies { (backend, client) } else { (client, backend) };
    let sent = send_until_full(&dying, &flood);
    assert!(sent < flood.len());
    reset(dying);
    assert!(is_ready(&stalled, PollFlags::RDHUP, Duration::from_secs(1)), "the peer hears within a second");
    assert!(flood.starts_with(&until_reset(&stalled)));
    bed.all_closed();
}

/// A client that does not read hears of its backend's reset.
pub fn killed_backend_with_a_stalled_client(make: MakePlane) {
    killed_with_a_stalled_peer(make, true);
}

/// A backend that does not read hears of its client's reset.
pub fn killed_client_with_a_stalled_backend(make: MakePlane) {
    killed_with_a_stalled_peer(make, false);
}

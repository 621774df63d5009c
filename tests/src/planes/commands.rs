//! What a plane is told to do.

use std::time::Duration;

use drowse::clock;

use super::MakePlane;
use super::fixture::{
    Bed, Kind, MIB, Pattern, elapsed, eventually, expect, expect_end, ping, send, send_until_full,
    until_reset,
};

/// `close_silent` ends the silent flows, FIN first, and no other.
pub fn silent_flows_are_closed_active_ones_stay(make: MakePlane) {
    let silent_for = Duration::from_millis(200);
    let bed = Bed::new(make);
    let silent = [Kind::Tcp, Kind::Unix].map(|kind| bed.flow(kind, kind));
    let active = [Kind::Tcp, Kind::Unix].map(|kind| bed.flow(kind, kind));
    for (client, backend) in silent.iter().chain(&active) {
        ping(client, backend);
    }
    let since = clock::now();
    while elapsed(since) < silent_for {
        for (client, backend) in &active {
            ping(client, backend);
        }
    }
    // Bytes that the worker may not have seen yet count too.
    send(&active[0].0, b"just now");
    bed.plane.close_silent(silent_for);
    for (client, backend) in &silent {
        expect_end(client);
        expect_end(backend);
        // What is said after the FIN goes nowhere and hurts nobody.
        send(client, b"close notify");
    }
    drop(silent);
    expect(&active[0].1, b"just now");
    for (client, backend) in &active {
        ping(client, backend);
    }
    eventually("silent flows end", || bed.accounting.totals().flows_open == 2);
    drop(active);
    bed.all_closed();
}

/// `close_silent` does not wait for ever for the peers' FIN.
pub fn silent_peers_that_do_not_answer_are_closed(make: MakePlane) {
    let bed = Bed::new(make);
    let (client, backend) = bed.tcp();
    ping(&client, &backend);
    let since = clock::now();
    bed.plane.close_silent(Duration::ZERO);
    bed.all_closed();
    let took = elapsed(since);
    assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(5), "{took:?}");
    expect_end(&client);
    expect_end(&backend);
}

/// `close_silent` resets a flow with bytes that nobody reads.
pub fn silent_congested_flow_is_reset(make: MakePlane) {
    let bed = Bed::new(make);
    let flood = Pattern::bytes(17, 16 * MIB);
    let (client, backend) = bed.flow(Kind::SmallTcp, Kind::SmallTcp);
    assert!(send_until_full(&client, &flood) < flood.len());
    // A worker that was kept waiting may have moved a byte just now; then the flow rightly stays.
    eventually("the silent flow ends", || {
        bed.plane.close_silent(Duration::from_millis(10));
        bed.accounting.totals().flows_open == 0
    });
    assert!(flood.starts_with(&until_reset(&backend)), "a stream that was cut short has no clean end");
    until_reset(&client);
}

/// `reset_all`: both peers of every flow see the reset.
pub fn reset_all_resets_both_sides(make: MakePlane) {
    let bed = Bed::new(make);
    let flows: Vec<_> = (0..50).map(|_| bed.tcp()).collect();
    let unix = bed.flow(Kind::Unix, Kind::Unix);
    for (client, backend) in &flows {
        ping(client, backend);
    }
    bed.plane.reset_all();
    assert_eq!(bed.all_closed().flows_total, 51);
    for (client, backend) in &flows {
        assert!(until_reset(client).is_empty());
        assert!(until_reset(backend).is_empty());
    }
    expect_end(&unix.0);
    expect_end(&unix.1);
    let (client, backend) = bed.tcp();
    ping(&client, &backend);
}

/// `reset_all` beside a reader that does not read.
pub fn reset_all_delivers_what_was_taken(make: MakePlane) {
    let bed = Bed::new(make);
    let flood = Pattern::bytes(18, 16 * MIB);
    let (client, backend) = bed.flow(Kind::SmallTcp, Kind::SmallTcp);
    let sent = send_until_full(&client, &flood);
    assert!(sent < flood.len());
    let since = clock::now();
    bed.plane.reset_all();
    bed.all_closed();
    assert!(elapsed(since) < Duration::from_secs(2), "a reader that does not read holds nothing up");
    assert!(flood.starts_with(&until_reset(&backend)));
    until_reset(&client);
}

/// A plane that is dropped has no flow open any more.
pub fn dropped_plane_resets_its_flows(make: MakePlane) {
    let bed = Bed::new(make);
    let (client, backend) = bed.tcp();
    ping(&client, &backend);
    let Bed { plane, accounting } = bed;
    drop(plane);
    assert_eq!(accounting.totals().flows_open, 0, "closed before the drop returns");
    assert!(until_reset(&client).is_empty());
    assert!(until_reset(&backend).is_empty());
}

//! Many flows, and what they leave behind.

use std::thread;
use std::time::Duration;

use drowse::clock;

use super::fixture::{
    Bed, KIB, Kind, Pattern, expect, expect_end, finish, open_fds, ping, raise_fd_limit, send,
    send_until_full_for,
};
use super::{MakePlane, WORKERS};

/// Ten thousand short flows: every byte counted, no descriptor kept.
pub fn short_flows_leave_nothing_behind(make: MakePlane) {
    const FLOWS: usize = 10_000;
    let fds_before = open_fds();
    let bed = Bed::new(make);
    let bytes = Pattern::bytes(10, 70 * KIB);
    let mut expected = 0;
    for flow in 0..FLOWS {
        let kind = if flow % 4 == 0 { Kind::Tcp } else { Kind::Unix };
        let (client, backend) = bed.flow(kind, kind);
        let request = &bytes[..=flow % 100];
        let answer = if flow % 100 == 0 { &bytes[..] } else { &bytes[..flow % 1000] };
        send(&client, request);
        finish(&client);
        expect(&backend, request);
        send(&backend, answer);
        drop(backend);
        expect(&client, answer);
        expect_end(&client);
        expected += (request.len() + answer.len()) as u64;
    }
    let totals = bed.all_closed();
    assert_eq!(totals.flows_total, FLOWS as u64);
    assert_eq!(totals.flows_open, 0);
    assert_eq!(totals.bytes_to_backend + totals.bytes_to_client, expected);
    assert!(totals.last_activity <= clock::now() && totals.last_activity > Duration::ZERO);
    drop(bed);
    assert_eq!(open_fds(), fds_before, "descriptors leak");
}

/// A thousand flows, each with traffic both ways.
pub fn thousand_flows_at_once(make: MakePlane) {
    raise_fd_limit();
    let bed = Bed::new(make);
    let flows: Vec<_> = (0..1000_u64).map(|flow| (flow, bed.tcp())).collect();
    assert_eq!(bed.accounting.totals().flows_open, 1000);
    for round in 0..3 {
        for (flow, (client, backend)) in &flows {
            send(client, &Pattern::bytes(flow + round, 300));
            send(backend, &Pattern::bytes(flow + round + 5000, 4000));
        }
        for (flow, (client, backend)) in &flows {
            expect(backend, &Pattern::bytes(flow + round, 300));
            expect(client, &Pattern::bytes(flow + round + 5000, 4000));
        }
    }
    drop(flows);
    let totals = bed.all_closed();
    assert_eq!((totals.bytes_to_backend, totals.bytes_to_client), (900_000, 12_000_000));
}

/// Flows that were congested and are idle again.
pub fn idle_flows_hold_nothing_but_sockets(make: MakePlane) {
    const FLOWS: usize = 200;
    raise_fd_limit();
    let bed = Bed::new(make);
    let bulk = Pattern::bytes(15, 300 * KIB);
    let fds_before = open_fds();
    let flows: Vec<_> = (0..FLOWS).map(|_| bed.flow(Kind::SmallTcp, Kind::SmallTcp)).collect();
    // All of them congested at the same time, then drained.
    let taken: Vec<_> =
        flows.iter().map(|(client, _)| send_until_full_for(client, &bulk, Duration::ZERO)).collect();
    for ((client, backend), taken) in flows.iter().zip(taken) {
        thread::scope(|scope| {
            scope.spawn(|| send(client, &bulk[taken..]));
            expect(backend, &bulk);
        });
        ping(client, backend);
    }
    let pipes = (open_fds() - fds_before - FLOWS * 4) / 2;
    assert!(pipes <= WORKERS * 16, "{pipes} pipes are kept");
}

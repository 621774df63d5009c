//! Many flows, and what they leave behind.

use std::thread;
use std::time::Duration;

use drowse::clock;

use super::fixture::{
    Bed, KIB, Kind, MIB, Pattern, expect, expect_end, finish, open_fds, ping, raise_fd_limit, reset,
    resident_bytes, send, send_until_full_for, until_reset,
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

/// Ten thousand connections that end in every way: no descriptor is kept, and no memory.
pub fn short_flows_of_every_end_leave_nothing_behind(make: MakePlane) {
    const FLOWS: u64 = 10_000;
    const WARM: u64 = 2000;
    let fds_before = open_fds();
    let bed = Bed::new(make);
    let mut resident = 0;
    for flow in 0..FLOWS {
        if flow == WARM {
            bed.all_closed();
            resident = resident_bytes();
        }
        let (client, backend) = bed.tcp();
        ping(&client, &backend);
        match flow % 6 {
            0 => {
                finish(&client);
                expect_end(&backend);
                send(&backend, b"last words");
                drop(backend);
                expect(&client, b"last words");
                expect_end(&client);
            }
            1 => {
                finish(&backend);
                expect_end(&client);
                send(&client, b"last words");
                drop(client);
                expect(&backend, b"last words");
                expect_end(&backend);
            }
            2 => {
                drop(client);
                expect_end(&backend);
            }
            3 => {
                drop(backend);
                expect_end(&client);
            }
            4 => {
                reset(client);
                assert!(until_reset(&backend).is_empty());
            }
            _ => {
                reset(backend);
                assert!(until_reset(&client).is_empty());
            }
        }
    }
    let totals = bed.all_closed();
    let grown = resident_bytes().saturating_sub(resident);
    assert!(grown < MIB, "memory grew by {grown} bytes");
    assert_eq!((totals.flows_total, totals.flows_open), (FLOWS, 0));
    let last_words = FLOWS.div_ceil(6) * 10;
    assert_eq!(totals.bytes_to_client, FLOWS * 4 + last_words);
    assert_eq!(totals.bytes_to_backend, FLOWS * 4 + last_words);
    drop(bed);
    assert_eq!(open_fds(), fds_before, "descriptors leak");
}

/// Fifteen hundred flows, each with traffic both ways, in an order that changes.
pub fn fifteen_hundred_flows_at_once(make: MakePlane) {
    const FLOWS: usize = 1500;
    raise_fd_limit();
    let bed = Bed::new(make);
    let flows: Vec<_> = (0..FLOWS).map(|_| bed.tcp()).collect();
    assert_eq!(bed.accounting.totals().flows_open, FLOWS as u64);
    let mut random = Pattern(0xbeef);
    let bytes = Pattern::bytes(41, FLOWS + 4000);
    let mut expected = (0, 0);
    for _ in 0..3 {
        let mut under_way: Vec<_> =
            (0..FLOWS).map(|flow| (flow, random.below(300) + 1, random.below(4000) + 1)).collect();
        for receive in [false, true] {
            shuffle(&mut under_way, &mut random);
            for (flow, there, back) in &under_way {
                let (client, backend) = &flows[*flow];
                let (there, back) = (&bytes[*flow..][..*there], &bytes[*flow..][..*back]);
                if receive {
                    expect(client, back);
                    expect(backend, there);
                    expected.0 += there.len() as u64;
                    expected.1 += back.len() as u64;
                } else {
                    send(client, there);
                    send(backend, back);
                }
            }
        }
    }
    drop(flows);
    let totals = bed.all_closed();
    assert_eq!((totals.bytes_to_backend, totals.bytes_to_client), expected);
}

fn shuffle<T>(things: &mut [T], random: &mut Pattern) {
    for last in (1..things.len()).rev() {
        things.swap(last, random.below(last + 1));
    }
}

/// Flows that were congested and are idle again.
pub fn idle_flows_hold_nothing_but_sockets(make: MakePlane) {
    const FLOWS: usize = 200;
    raise_fd_limit();
    let bed = Bed::new(make);
    let bulk = Pattern::bytes(15, 300 * KIB);
    // A worker that has moved bytes has all that it needs for itself.
    let first: Vec<_> = (0..WORKERS).map(|_| bed.tcp()).collect();
    for (client, backend) in &first {
        ping(client, backend);
    }
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

//! What the idle decision reads, and what a flow costs the process.

use std::time::Duration;

use drowse::clock;

use super::MakePlane;
use super::fixture::{Bed, Kind, Pattern, eventually, expect, ping, send, voluntary_switches};
use crate::deadline::pause;

/// Bytes and last activity move with each message, and only then.
pub fn counters_follow_the_bytes(make: MakePlane) {
    let bytes = Pattern::bytes(40, 5000);
    for kind in [Kind::Tcp, Kind::Unix] {
        let bed = Bed::new(make);
        let (client, backend) = bed.flow(kind, kind);
        let (mut to_backend, mut to_client) = (0, 0);
        for (number, count) in (1..=100).enumerate() {
            let message = &bytes[..count * 50];
            let before = clock::now();
            if number % 2 == 0 {
                send(&client, message);
                expect(&backend, message);
                to_backend += message.len() as u64;
            } else {
                send(&backend, message);
                expect(&client, message);
                to_client += message.len() as u64;
            }
            eventually("the message is counted", || {
                let totals = bed.accounting.totals();
                (totals.bytes_to_backend, totals.bytes_to_client) == (to_backend, to_client)
                    && totals.last_activity >= before
            });
        }
        let quiet = bed.accounting.totals();
        assert!(quiet.last_activity <= clock::now());
        pause(Duration::from_millis(50));
        assert_eq!(bed.accounting.totals(), quiet, "nothing moved");
        drop((client, backend));
        let totals = bed.all_closed();
        assert_eq!((totals.bytes_to_backend, totals.bytes_to_client), (to_backend, to_client));
        assert!(totals.last_activity >= quiet.last_activity && totals.last_activity <= clock::now());
    }
}

/// Requests and answers go through while the threads of the plane sleep.
pub fn uncongested_flow_costs_no_switches(make: MakePlane) {
    let is_forwarding = |thread: &str| thread.starts_with("forward-");
    let bed = Bed::new(make);
    let (client, backend) = bed.tcp();
    let exchange = |messages| (0..messages).for_each(|_| ping(&client, &backend));
    exchange(2000);
    for messages in [1000, 10_000] {
        let before = voluntary_switches(is_forwarding);
        exchange(messages);
        let switches = voluntary_switches(is_forwarding) - before;
        assert!(switches < 50, "{switches} switches for {messages} requests and answers");
    }
}

//! What flows leave in the maps of a plane that has the kernel move their bytes: nothing.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::thread;
use std::time::Duration;

use socket2::Socket;

use super::fixture::{
    Bed, Endless, Kind, MIB, PATIENCE, eventually, expect, expect_end, finish, ping, reset, send, until_reset,
};
use super::{MakePlane, torn};
use crate::deadline;
use crate::pinned::entries_held_by;

/// The maps that have an entry for each socket or direction of a flow.
const MAPS: [&str; 5] = ["DIRECTIONS", "ENDS", "SOCKETS", "SOURCES", "TAKEN"];

/// How many entries each of them has.
type Entries = BTreeMap<String, usize>;

fn entries() -> anyhow::Result<Entries> {
    entries_held_by(std::process::id(), |name| MAPS.contains(&name))
}

/// What the maps of `plane` hold of so many flows.
fn entries_of(flows: usize, plane: &str) -> Entries {
    // For each direction its counters and the socket that its bytes go to. Then: the peer whose messages come to a program,
    // and there is no other program for its bytes; or our socket whose bytes do, and what was taken of them.
    let per_direction = if plane == "sockmap-ends" { [1, 1, 1, 0, 0] } else { [1, 0, 1, 1, 1] };
    let maps = MAPS.into_iter().map(str::to_owned).zip(per_direction.map(|entries| 2 * flows * entries));
    // Without the short cut the map of the peers is let go.
    maps.filter(|(map, _)| plane == "sockmap-ends" || map != "ENDS").collect()
}

/// Waits until the maps have these entries and no more. A socket leaves them for good a grace period after it was closed.
fn wait_for(expected: &Entries, what: &str) {
    let last = RefCell::new(Entries::new());
    let found = deadline::eventually(what, PATIENCE, || {
        let now = entries()?;
        let is_so = now == *expected;
        last.replace(now);
        Ok(is_so.then_some(()))
    });
    if let Err(error) = found {
        panic!("{error:#}: expected {expected:?}, found {:?}", last.borrow());
    }
}

/// A flow of which the kernel has moved bytes both ways.
fn in_kernel(bed: &Bed, kind: Kind) -> (Socket, Socket) {
    let (client, backend) = bed.flow(kind, kind);
    let open = bed.accounting.redirected();
    eventually("the kernel moves both directions", || {
        ping(&client, &backend);
        let now = bed.accounting.redirected();
        now.redirected_to_backend > open.redirected_to_backend
            && now.redirected_to_client > open.redirected_to_client
    });
    (client, backend)
}

/// How one side of a flow ends it.
#[derive(Clone, Copy, Debug)]
enum Ending {
    /// It closes, the other side hears of it and closes.
    Close,
    /// It ends its half and gets an answer first.
    HalfClose,
    /// Both end their halves at once.
    BothAtOnce,
    Reset,
    /// It ends its half, and resets then.
    ResetAfterHalfClose,
    /// It resets while it sends and the other side receives.
    ResetInFullFlight,
    /// It closes with bytes unread, while the other side sends.
    CloseInFullFlight,
    /// It resets when the other side, which does not read, takes no more of it.
    ResetBehindBacklog,
    /// It closes when the other side takes no more of it. The other side gets everything then.
    CloseBehindBacklog,
    /// It closes when it has taken no more of the other side for long.
    CloseBeforeBacklog,
    /// It resets when it has taken no more of the other side for long.
    ResetBeforeBacklog,
}

const ENDINGS: [Ending; 11] = [
    Ending::Close,
    Ending::HalfClose,
    Ending::BothAtOnce,
    Ending::Reset,
    Ending::ResetAfterHalfClose,
    Ending::ResetInFullFlight,
    Ending::CloseInFullFlight,
    Ending::ResetBehindBacklog,
    Ending::CloseBehindBacklog,
    Ending::CloseBeforeBacklog,
    Ending::ResetBeforeBacklog,
];

/// Sends until that fails, as it must when the other side is gone.
fn send_until_broken(socket: &Socket, stream: &Endless) {
    let error = torn::send(socket, stream);
    assert!([ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&error.kind()), "{error}");
}

/// Sends until the other side, which does not read, takes no more. Tells how many bytes it took.
fn congest(sender: &Socket, stream: &Endless) -> usize {
    const FLOOD: usize = 64 * MIB;
    let sent = stream.send_until_full_for(sender, 0..FLOOD, Duration::from_millis(20));
    assert!(sent < FLOOD, "it has no end");
    sent
}

impl Ending {
    fn has_backlog(self) -> bool {
        matches!(
            self,
            Self::ResetBehindBacklog
                | Self::CloseBehindBacklog
                | Self::CloseBeforeBacklog
                | Self::ResetBeforeBacklog
        )
    }

    /// `ending` ends a flow with `other` like this. Nothing of the two is left.
    fn carry_out(self, ending: Socket, other: Socket, stream: &Endless) {
        match self {
            Self::Close => {
                drop(ending);
                expect_end(&other);
            }
            Self::HalfClose => {
                send(&ending, b"a question");
                finish(&ending);
                expect(&other, b"a question");
                expect_end(&other);
                send(&other, b"an answer");
                drop(other);
                expect(&ending, b"an answer");
                expect_end(&ending);
            }
            Self::BothAtOnce => {
                finish(&ending);
                finish(&other);
                expect_end(&ending);
                expect_end(&other);
            }
            Self::Reset => {
                reset(ending);
                assert!(until_reset(&other).is_empty());
            }
            Self::ResetAfterHalfClose => {
                finish(&ending);
                expect_end(&other);
                reset(ending);
                eventually("the reset", || (&other).write(b"x").is_err());
            }
            Self::ResetInFullFlight => {
                let received = thread::scope(|scope| {
                    let receiving = scope.spawn(|| torn::receive(&other, stream));
                    stream.send(&ending, 0..4 * MIB);
                    reset(ending);
                    receiving.join().unwrap()
                });
                assert_eq!(received.unwrap_err().kind(), ErrorKind::ConnectionReset);
            }
            Self::CloseInFullFlight => {
                thread::scope(|scope| {
                    scope.spawn(|| send_until_broken(&other, stream));
                    stream.expect(&ending, 0..4 * MIB);
                    drop(ending);
                });
            }
            Self::ResetBehindBacklog => {
                congest(&ending, stream);
                reset(ending);
                until_reset(&other);
            }
            Self::CloseBehindBacklog => {
                let sent = congest(&ending, stream);
                drop(ending);
                assert_eq!(torn::receive(&other, stream).unwrap(), sent);
            }
            Self::CloseBeforeBacklog => {
                congest(&other, stream);
                drop(ending);
                send_until_broken(&other, stream);
            }
            Self::ResetBeforeBacklog => {
                congest(&other, stream);
                reset(ending);
                send_until_broken(&other, stream);
            }
        }
    }
}

/// Flows that end in every way, each while the kernel moves its bytes, or passes them because of a backlog: what is in
/// the maps of it goes, and what is there of a flow that stays open does not.
pub fn flows_of_every_end_leave_no_map_entry(make: MakePlane) {
    const ROUNDS: usize = 20;
    let bed = Bed::new(make);
    let (nothing, of_one_flow) = (entries_of(0, bed.plane.name()), entries_of(1, bed.plane.name()));
    wait_for(&nothing, "maps without entries, before any flow");
    let staying = in_kernel(&bed, Kind::Tcp);
    wait_for(&of_one_flow, "the entries of one flow");

    let stream = Endless::new(70);
    for ending in ENDINGS {
        for round in 0..ROUNDS {
            let kind = if ending.has_backlog() { Kind::SmallTcp } else { Kind::Tcp };
            let (client, backend) = in_kernel(&bed, kind);
            if round % 2 == 0 {
                ending.carry_out(client, backend, &stream);
            } else {
                ending.carry_out(backend, client, &stream);
            }
        }
        ping(&staying.0, &staying.1);
    }
    let flows = (ENDINGS.len() * ROUNDS) as u64 + 1;
    eventually("all others to end", || bed.accounting.totals().flows_open == 1);
    let counted = bed.accounting.redirected();
    assert_eq!((counted.flows_total, counted.flows_open), (flows, 1), "each was one that the kernel moves");
    if bed.plane.name() == "sockmap" {
        assert!(counted.passed_to_backend > 0 && counted.passed_to_client > 0, "no backlog: {counted:?}");
    }
    wait_for(&of_one_flow, "the entries of the one flow that stays");
    drop(staying);
    bed.all_closed();
    wait_for(&nothing, "maps without entries");
}

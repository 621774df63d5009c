//! Ring 2: clients that come at any instant of a stop, while connections are handed off. Needs root and the eBPF object.
//!
//! The offsets are random: a repeatable sequence, shifted by how late this machine is. `DROWSE_TEST_ROUNDS` sets the number of
//! rounds of each test, for longer runs.

use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use drowse::clock;
use drowse_tests::deadline::pause;
use drowse_tests::isolated::isolated;
use drowse_tests::process::Drowse;
use drowse_tests::random;
use drowse_tests::whoami::ask;

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");
const PUBLIC: &str = "127.0.0.1:8080";
const BACKEND: &str = "127.0.0.1:8081";
/// No round takes longer, whatever happens in it.
const ROUND_MAX: Duration = Duration::from_secs(5);

/// How many rounds a test has: what was asked for, else `default`.
fn rounds(default: usize) -> Result<usize> {
    match std::env::var("DROWSE_TEST_ROUNDS") {
        Ok(rounds) => rounds.parse().with_context(|| format!("understand DROWSE_TEST_ROUNDS={rounds}")),
        Err(_) => Ok(default),
    }
}

/// A backend that is stopped 50 ms after its last client.
fn sleepy() -> Result<Drowse> {
    let options = ["--listen", PUBLIC, "--backend", BACKEND, "--plane", "handoff", "--name", "test.service"];
    let command = ["--idle-time", "50ms", "--", ECHO, "--behaviour", "whoami", BACKEND];
    Drowse::run(&[&options[..], &command].concat())
}

/// How often the backend has been stopped up to now.
fn stops(drowse: &mut Drowse) -> usize {
    drowse.all_output().iter().filter(|line| line.contains("is asleep")).count()
}

/// The most by which [`Instants`] are later than on an idle machine.
const LATE_MAX: Duration = Duration::from_millis(500);

/// Instants around the stop: a repeatable sequence that follows the machine. On a busy one the stop comes later.
struct Instants {
    state: u64,
    late: Duration,
    stops: usize,
}

impl Instants {
    fn new(seed: u64) -> Self {
        Self { state: seed, late: Duration::ZERO, stops: 0 }
    }

    fn below(&mut self, limit: u64) -> u64 {
        random::next(&mut self.state) % limit
    }

    /// So long after the last client, and up to `width` more.
    fn after(&mut self, micros: u64, width: u64) -> Duration {
        Duration::from_micros(micros + self.below(width)) + self.late
    }

    /// The decision comes after 50 ms and ends steering, the last look takes up to 25 ms, the stop a few more: mostly in
    /// these, else anything from well before to well after them.
    fn around_the_stop(&mut self) -> Duration {
        match self.below(6) {
            0 => self.after(49_500, 2_000),
            1..5 => self.after(50_000, 40_000),
            _ => self.after(30_000, 100_000),
        }
    }

    /// After a round: later if it had no stop, else earlier by twice as much, so that about every third one has a stop.
    fn follow(&mut self, drowse: &mut Drowse) {
        const STEP: Duration = Duration::from_millis(2);
        let stops = stops(drowse);
        self.late = if stops > self.stops {
            self.late.saturating_sub(STEP * 2)
        } else {
            (self.late + STEP).min(LATE_MAX)
        };
        self.stops = stops;
    }
}

/// One client, bounded in time. Tells whether it was handed off.
fn ask_in_time() -> Result<bool> {
    let began = clock::now();
    let handed_off = ask(PUBLIC)?;
    let lasted = clock::now().saturating_sub(began);
    ensure!(lasted < ROUND_MAX, "it waited for {lasted:?}");
    Ok(handed_off)
}

/// Whoever comes just before the stop must have been handed off in most rounds, or this says nothing about hand-off.
#[expect(clippy::print_stdout, reason = "the figures of a run")]
fn ensure_it_was_a_race(rounds: usize, handed_off: usize, stops: usize) -> Result<()> {
    println!("{rounds} rounds, {handed_off} times handed off before the stop, {stops} stops");
    // On a busy machine the last look takes so long that most of those who come around the stop keep it awake.
    ensure!(handed_off >= rounds / 25, "only {handed_off} of {rounds} were handed off");
    ensure!(stops >= rounds / 25, "only {stops} stops in {rounds} rounds");
    Ok(())
}

#[test]
fn five_hundred_clients_at_any_instant_of_the_stop_are_served() -> Result<()> {
    isolated(|| {
        let rounds = rounds(500)?;
        let mut drowse = sleepy()?;
        let (mut instants, mut handed_off) = (Instants::new(0x9e37_79b9_7f4a_7c15), 0);
        for round in 0..rounds {
            // The first wakes it, perhaps; the last of the others is handed off, so that the stop has to find that out.
            for client in 0..5 {
                let taken = ask_in_time().with_context(|| format!("round {round}, client {client}"))?;
                handed_off += usize::from(taken && client == 4);
            }
            pause(instants.around_the_stop());
            instants.follow(&mut drowse);
        }
        ensure_it_was_a_race(rounds, handed_off, stops(&mut drowse))
    })
}

/// Several clients at slightly different instants, so that some are in the handshake and some in the accept queue.
#[test]
fn crowds_at_any_instant_of_the_stop_are_served() -> Result<()> {
    const CROWD: usize = 6;
    isolated(|| {
        let rounds = rounds(150)?;
        let mut drowse = sleepy()?;
        let (mut instants, mut handed_off) = (Instants::new(0x0123_4567_89ab_cdef), 0);
        for round in 0..rounds {
            for _ in 0..4 {
                ask_in_time().with_context(|| format!("round {round}, before the crowd"))?;
            }
            handed_off += usize::from(ask_in_time()?);
            let offsets: Vec<Duration> = (0..CROWD).map(|_| instants.around_the_stop()).collect();
            thread::scope(|scope| {
                let client = |offset: Duration| {
                    pause(offset);
                    ask_in_time().with_context(|| format!("{offset:?} after the last"))
                };
                let crowd: Vec<_> =
                    offsets.iter().map(|offset| scope.spawn(move || client(*offset))).collect();
                crowd.into_iter().try_for_each(|one| {
                    one.join()
                        .unwrap_or_else(|_| bail!("panicked"))
                        .map(drop)
                        .with_context(|| format!("round {round}"))
                })
            })?;
            pause(instants.around_the_stop());
            instants.follow(&mut drowse);
        }
        ensure_it_was_a_race(rounds, handed_off, stops(&mut drowse))
    })
}

/// Runs rounds until the backend has been stopped so many times. Each tells how many clients were handed off in it.
#[expect(clippy::print_stdout, reason = "the figures of a run")]
fn until_stopped(
    wanted: usize,
    mut instants: Instants,
    mut round: impl FnMut(&mut Instants) -> Result<usize>,
) -> Result<()> {
    let mut drowse = sleepy()?;
    let (mut done, mut handed_off) = (0, 0);
    while instants.stops < wanted {
        ensure!(done < wanted * 50, "only {} stops in {done} rounds", instants.stops);
        handed_off += round(&mut instants).with_context(|| format!("round {done}"))?;
        instants.follow(&mut drowse);
        done += 1;
    }
    println!("{wanted} stops in {done} rounds, {handed_off} clients handed off");
    ensure!(handed_off >= done / 25, "only {handed_off} clients were handed off");
    Ok(())
}

#[test]
fn cycles_of_sleep_and_wake_serve_every_client() -> Result<()> {
    isolated(|| {
        until_stopped(rounds(50)?, Instants::new(0xfeed_beef_dead_cafe), |instants| {
            let mut handed_off = 0;
            for _ in 0..3 {
                handed_off += usize::from(ask_in_time()?);
            }
            pause(instants.around_the_stop());
            Ok(handed_off)
        })
    })
}

/// Bursts of 500 connections a second, with pauses just longer than the idle time, and one more client at a random
/// instant of each pause.
#[test]
fn cycles_under_bursts_of_load_serve_every_client() -> Result<()> {
    const BURST: u32 = 30;
    const GAP: Duration = Duration::from_millis(2);
    isolated(|| {
        until_stopped(rounds(25)?, Instants::new(0x5eed_5eed_5eed_5eed), |instants| {
            let began = clock::now();
            let mut handed_off = thread::scope(|scope| {
                let client = |number: u32| {
                    pause((began + GAP * number).saturating_sub(clock::now()));
                    ask_in_time().with_context(|| format!("client {number} of the burst"))
                };
                let burst: Vec<_> = (0..BURST).map(|number| scope.spawn(move || client(number))).collect();
                let join =
                    |one: ScopedJoinHandle<Result<bool>>| one.join().unwrap_or_else(|_| bail!("panicked"));
                burst.into_iter().map(|one| Ok(usize::from(join(one)?))).sum::<Result<usize>>()
            })?;
            if instants.below(2) == 0 {
                pause(instants.around_the_stop());
                handed_off += usize::from(ask_in_time().context("the one in the pause")?);
            }
            pause(instants.after(55_000, 40_000));
            Ok(handed_off)
        })
    })
}

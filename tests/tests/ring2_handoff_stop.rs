//! Ring 2: clients that come at any instant of a stop, while connections are handed off. Needs root and the eBPF object.
//!
//! The offsets are random and repeatable. `DROWSE_TEST_ROUNDS` sets the number of rounds of each test, for longer runs.

use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use drowse::clock;
use drowse_tests::deadline::pause;
use drowse_tests::isolated::isolated;
use drowse_tests::process::Drowse;
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

/// A repeatable sequence (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    /// The decision comes after 50 ms and ends steering, the last look takes up to 25 ms, the stop a few more: mostly in
    /// these, else anything from well before to well after them.
    fn around_the_stop(&mut self) -> Duration {
        let micros = match self.below(6) {
            0 => 49_500 + self.below(2_000),
            1..5 => 50_000 + self.below(40_000),
            _ => 30_000 + self.below(100_000),
        };
        Duration::from_micros(micros)
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
        let (mut random, mut handed_off) = (Random(0x9e37_79b9_7f4a_7c15), 0);
        for round in 0..rounds {
            // The first wakes it, perhaps; the last of the others is handed off, so that the stop has to find that out.
            for client in 0..5 {
                let taken = ask_in_time().with_context(|| format!("round {round}, client {client}"))?;
                handed_off += usize::from(taken && client == 4);
            }
            pause(random.around_the_stop());
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
        let (mut random, mut handed_off) = (Random(0x0123_4567_89ab_cdef), 0);
        for round in 0..rounds {
            for _ in 0..4 {
                ask_in_time().with_context(|| format!("round {round}, before the crowd"))?;
            }
            handed_off += usize::from(ask_in_time()?);
            let offsets: Vec<Duration> = (0..CROWD).map(|_| random.around_the_stop()).collect();
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
            pause(random.around_the_stop());
        }
        ensure_it_was_a_race(rounds, handed_off, stops(&mut drowse))
    })
}

/// Runs rounds until the backend has been stopped so many times. Each tells how many clients were handed off in it.
#[expect(clippy::print_stdout, reason = "the figures of a run")]
fn until_stopped(wanted: usize, mut round: impl FnMut() -> Result<usize>) -> Result<()> {
    let mut drowse = sleepy()?;
    let (mut done, mut handed_off) = (0, 0);
    while stops(&mut drowse) < wanted {
        ensure!(done < wanted * 50, "only {} stops in {done} rounds", stops(&mut drowse));
        handed_off += round().with_context(|| format!("round {done}"))?;
        done += 1;
    }
    println!("{wanted} stops in {done} rounds, {handed_off} clients handed off");
    ensure!(handed_off >= done / 25, "only {handed_off} clients were handed off");
    Ok(())
}

#[test]
fn cycles_of_sleep_and_wake_serve_every_client() -> Result<()> {
    isolated(|| {
        let mut random = Random(0xfeed_beef_dead_cafe);
        until_stopped(rounds(50)?, || {
            let mut handed_off = 0;
            for _ in 0..3 {
                handed_off += usize::from(ask_in_time()?);
            }
            pause(random.around_the_stop());
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
        let mut random = Random(0x5eed_5eed_5eed_5eed);
        until_stopped(rounds(25)?, || {
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
            if random.below(2) == 0 {
                pause(random.around_the_stop());
                handed_off += usize::from(ask_in_time().context("the one in the pause")?);
            }
            pause(Duration::from_micros(55_000 + random.below(40_000)));
            Ok(handed_off)
        })
    })
}

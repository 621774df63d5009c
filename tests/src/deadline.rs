//! Waiting in tests: the one place that may look again and again, and the one place that may let time pass.
//!
//! Tests wait for an event with a deadline wherever there is one (a socket, a pidfd, a notification). systemd's
//! properties are asked for instead: a question costs 5 ms, and a bus connection of the test's own would be one more
//! thing that can differ from what a user sees with `systemctl`.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use drowse::clock;

/// How long between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Looks until `look` finds something, and no longer than `within`.
///
/// # Errors
/// `look` failed, or it found nothing in time; the message names `what`.
pub fn eventually<T>(what: &str, within: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = clock::now() + within;
    loop {
        if let Some(found) = look().with_context(|| format!("wait for {what}"))? {
            return Ok(found);
        }
        if clock::now() >= deadline {
            bail!("not within {within:?}: {what}");
        }
        pause(LOOK_AGAIN);
    }
}

/// Lets `time` pass because the passing of time is what the test is about, never to wait for something to happen.
pub fn pause(time: Duration) {
    #[expect(clippy::disallowed_methods, reason = "the stimulus of a test, or the gap between two looks")]
    std::thread::sleep(time);
}

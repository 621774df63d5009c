//! What is known of a service beyond the life of one drowse: until the machine is started again.
//!
//! PURE. Owns: what is counted and noted, and by which day. Must never: read a clock or a file by itself.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::Wall;

/// Kept beside the status socket.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Remembered {
    /// Since when wake-ups are counted, in seconds since 1970 UTC.
    pub counted_since_s: i64,
    /// The beginning of the day of the last wake-up, in the same seconds.
    pub day_s: i64,
    /// Wake-ups that succeeded on that day.
    pub activations: u64,
    /// The last of them.
    pub last_activation: Option<PastActivation>,
    /// When the backend fell asleep. `null`: it has not been put to sleep, or it woke since.
    pub asleep_since_s: Option<i64>,
    /// The memory that it used right before, in bytes. `null`: unknown.
    pub saved_bytes: Option<u64>,
}

/// A wake-up that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PastActivation {
    /// From the start of the backend to the first connection that it accepts, in seconds.
    pub took_s: f64,
    /// When it was over, in seconds since 1970 UTC.
    pub at_s: i64,
}

/// Wake-ups of one day.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Today {
    /// How many succeeded.
    pub activations: u64,
    /// Since when they are counted, in seconds since 1970 UTC: the beginning of the day here, or the first start of a
    /// drowse of this name since the machine was started, if that was later.
    pub since_s: i64,
    /// They are counted since the beginning of the day.
    pub whole_day: bool,
}

impl Remembered {
    /// Nothing yet; counted from now on.
    #[must_use]
    pub fn since(wall: Wall) -> Self {
        Self { counted_since_s: wall.unix_s, day_s: wall.midnight_s, ..Self::default() }
    }

    /// The backend accepts connections, which took so long.
    pub fn activated(&mut self, took: Duration, wall: Wall) {
        if self.day_s != wall.midnight_s {
            (self.day_s, self.activations) = (wall.midnight_s, 0);
        }
        self.activations += 1;
        self.last_activation = Some(PastActivation { took_s: took.as_secs_f64(), at_s: wall.unix_s });
    }

    /// The backend runs.
    pub fn woke(&mut self) {
        (self.asleep_since_s, self.saved_bytes) = (None, None);
    }

    /// The backend is asleep; right before it used so much memory.
    pub fn slept(&mut self, memory: Option<u64>, wall: Wall) {
        (self.asleep_since_s, self.saved_bytes) = (Some(wall.unix_s), memory);
    }

    /// The wake-ups of the day that it is.
    #[must_use]
    pub fn today(&self, wall: Wall) -> Today {
        let activations = if self.day_s == wall.midnight_s { self.activations } else { 0 };
        let since_s = self.counted_since_s.max(wall.midnight_s);
        Today { activations, since_s, whole_day: since_s == wall.midnight_s }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 86_400;

    fn at(unix_s: i64) -> Wall {
        Wall { unix_s, midnight_s: unix_s - unix_s % DAY }
    }

    #[test]
    fn a_day_begins_at_midnight_and_counts_what_was_seen() {
        let mut known = Remembered::since(at(DAY + 100));
        known.activated(Duration::from_millis(250), at(DAY + 200));
        known.activated(Duration::from_millis(500), at(DAY + 300));
        let expected = Today { activations: 2, since_s: DAY + 100, whole_day: false };
        assert_eq!(known.today(at(DAY + 400)), expected);
        let next_day = Today { activations: 0, since_s: 2 * DAY, whole_day: true };
        assert_eq!(known.today(at(2 * DAY + 1)), next_day);
        known.activated(Duration::from_secs(1), at(2 * DAY + 2));
        assert_eq!(known.today(at(2 * DAY + 3)).activations, 1);
        assert_eq!(known.last_activation, Some(PastActivation { took_s: 1.0, at_s: 2 * DAY + 2 }));
    }

    #[test]
    fn memory_is_saved_only_while_asleep() {
        let mut known = Remembered::since(at(0));
        known.slept(Some(5 << 20), at(10));
        assert_eq!((known.asleep_since_s, known.saved_bytes), (Some(10), Some(5 << 20)));
        known.woke();
        assert_eq!((known.asleep_since_s, known.saved_bytes), (None, None));
    }
}

//! The one clock of the program: `CLOCK_MONOTONIC`, the clock that `bpf_ktime_get_ns` reads; and the one on the wall.
//!
//! Owns: reading the clocks. Pure code never calls [`now`]; it is given the time.

use std::time::{Duration, SystemTime};

/// A point in time: the monotonic time since an arbitrary fixed point (boot, on Linux).
pub type Monotonic = Duration;

/// The monotonic time now.
#[must_use]
pub fn now() -> Monotonic {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// The time since 1970, as metrics and calendars have it. Zero if the clock is set to an earlier year.
#[must_use]
pub fn unix_time() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// `time` in whole nanoseconds, as counters and eBPF maps hold it.
#[must_use]
pub fn as_nanos(time: Monotonic) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// A moment on the wall clock, `CLOCK_REALTIME`, for what people are told. Nothing is decided by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wall {
    /// Seconds since 1970 UTC.
    pub unix_s: i64,
    /// The beginning of the day here, in the same seconds.
    pub midnight_s: i64,
}

/// The wall clock now, and the day of the local time zone.
#[must_use]
pub fn wall() -> Wall {
    let now = jiff::Zoned::now();
    let unix_s = now.timestamp().as_second();
    Wall { unix_s, midnight_s: now.start_of_day().map_or(unix_s, |day| day.timestamp().as_second()) }
}

/// The hour and minute of `unix_s` here: `14:05`.
#[must_use]
pub fn time_of_day(unix_s: i64) -> String {
    let moment = jiff::Timestamp::from_second(unix_s).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    moment.to_zoned(jiff::tz::TimeZone::system()).strftime("%H:%M").to_string()
}

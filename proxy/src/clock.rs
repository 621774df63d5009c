//! The one clock of the program: `CLOCK_MONOTONIC`, the clock that `bpf_ktime_get_ns` reads.
//!
//! Owns: reading the clock. Pure code never calls [`now`]; it is given the time.

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

//! Fixtures.

pub mod fake_systemd;

//! drowse: an activation proxy for systemd.
//!
//! The flow, in the order in which a connection meets the modules:
//! [`listener`] -> [`activation`] -> [`readiness`] -> [`pairing`] -> [`plane`] -> [`accounting`] -> [`idle`].
//! Stages never call each other; they meet in [`event_loop`], which carries out what [`lifecycle`] decides.

pub mod accounting;
pub mod activation;
pub mod address;
pub mod admission;
pub mod busy;
pub mod clock;
pub mod config;
pub mod ebpf;
pub mod event_loop;
pub mod idle;
pub mod kernel;
pub mod lifecycle;
pub mod listener;
pub mod log;
pub mod pairing;
pub mod plane;
pub mod privileges;
pub mod readiness;
pub mod report;
pub mod setup;
pub mod sockets;
pub mod sys;

//! What people are told: readers of the state only.

pub mod notify;
pub mod status_line;

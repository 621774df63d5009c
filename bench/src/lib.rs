//! The comparison of drowse with its peers, in the order in which a run meets the modules:
//! [`isolation`] -> [`cpus`] -> [`peers`] -> [`cases`] -> [`report`] -> [`plot`] -> [`bars`].
//!
//! [`client`] and [`backend`] are the two ends of every measurement and speak [`wire`]; [`process`] owns all children,
//! [`costs`] what they take of the machine, [`owners`] who holds a connection, [`patient`] a blocking read,
//! [`carriers`] which plane moves its bytes, and [`stats`] the rules by which rounds become figures.

pub mod backend;
pub mod bars;
pub mod carriers;
pub mod cases;
pub mod client;
pub mod costs;
pub mod cpus;
pub mod isolation;
pub mod owners;
pub mod patient;
pub mod peers;
pub mod plot;
pub mod process;
pub mod report;
pub mod run;
pub mod stats;
pub mod wire;

//! How we learn that the backend accepts connections.

pub mod listen_hook;

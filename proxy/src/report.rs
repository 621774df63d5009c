//! What people are told: readers of the state only.

pub mod check;
pub mod control;
pub mod counters;
pub mod metrics;
pub mod notify;
pub mod remembered;
pub mod scrape;
pub mod sleepers;
pub mod snapshot;
pub mod status;
pub mod status_line;
pub mod tell;
pub mod text;
pub mod top;

/// What a command that only looks has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// For stdout.
    pub answer: String,
    /// For stderr, a line each: what stands in the way of a whole answer.
    pub notes: Vec<String>,
    /// Whether the answer is one.
    pub success: bool,
}

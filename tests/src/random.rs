//! Numbers that look random and are the same in every run.

/// The next number of a sequence that its first `state`, which is not 0, determines (xorshift).
pub fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

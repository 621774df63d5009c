//! The program `drowse`.
fn main() {}

//! The VMM's process.

fn main() {}

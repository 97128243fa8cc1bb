//! The machine as a whole.

mod ending;

pub use ending::Ending;

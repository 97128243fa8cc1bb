//! A client of Kubernetes' CRI, as small as the tests need it: unary gRPC calls over one HTTP/2 connection.

mod client;

#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    nonstandard_style,
    unused,
    rustdoc::all
)]
mod messages {
    include!(concat!(env!("OUT_DIR"), "/cri.rs"));
}

pub use client::{Cri, Refusal, is_unanswered};
pub use messages::*;

//! Machines on real KVM, from the shim's side of the control socket.
//!
//! Ignored by default, since they need a host that runs ordinary guests; `scripts/test` runs them in the test host.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod cpio;
mod driver;
mod jail;
mod memory;
mod outcomes;
mod running;

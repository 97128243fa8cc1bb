//! Machines on real KVM, from the shim's side of the control socket.
//!
//! Ignored by default, since they need a host that runs ordinary guests; `scripts/test` runs them in the test host.

mod cpio;
mod driver;
mod outcomes;
mod running;

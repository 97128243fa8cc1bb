//! A shared directory in a real guest.
//!
//! Ignored by default, since they need a host that runs ordinary guests; `scripts/test` runs them in the test host.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../machine/cpio.rs"]
#[allow(dead_code)]
mod cpio;
#[path = "../machine/driver.rs"]
#[allow(dead_code)]
mod driver;
mod rig;
mod sharing;

//! What the end-to-end tests and the benchmark share: a containerd of their own, and a census of what the host holds.
//!
//! Everything here runs as root on a host with KVM that is thrown away afterwards (`scripts/test-host`).

pub mod bench;
pub mod census;
pub mod containerd;
pub mod cri;
pub mod image;
pub mod load;
pub mod timeline;

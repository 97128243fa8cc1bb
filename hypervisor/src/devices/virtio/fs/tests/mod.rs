//! The device driven without KVM: raw FUSE frames in mock guest memory against a temporary directory.

mod driver;
mod hostile;
mod mounts;
mod requests;

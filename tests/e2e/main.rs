//! End-to-end tests: `ctr` against a real containerd, our shim, our VMM and our agent, as root on a host with KVM.
//!
//! `scripts/test` runs them in the test host, with these variables:
//! * `VMSHIM_TEST_CONTAINERD`: the directory of containerd's programs, with runc,
//! * `VMSHIM_TEST_CONTAINERD_OLDER`: those of an older one, where there is one to upgrade from,
//! * `VMSHIM_TEST_IMAGES`: a directory with `busybox.tar`, `debian.tar` and `pause.tar`,
//! * `VMSHIM_TEST_DIR`: a scratch directory on which overlayfs can have its upper directories.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod bad_input;
mod bad_pods;
mod calls;
mod exec;
mod faults;
mod fixture;
mod hooks;
mod host_network;
mod images;
mod isolation;
mod kill;
mod layers;
mod limits;
mod links;
mod network;
mod pods;
mod resize;
mod restart;
mod run;
mod shim;
mod sockets;
mod stdio;
mod terminal;
mod transfer;
mod verbs;
mod volumes;

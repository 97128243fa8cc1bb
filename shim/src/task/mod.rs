//! containerd's Task service: processes, containers and the pod they live in.
//!
//! A pod's state lives in small cells: the phase of each process is a `watch` channel, published at every change, and
//! the tables of containers and execs are behind locks that are held for a lookup, never over an await. So State,
//! Wait, Connect, and Kill's decision never queue behind a boot, a create or a slow guest. What takes time runs in a
//! task of its own, with a deadline, and goes on to a defined end when its caller goes away.

mod container;
mod create;
mod delete;
mod error;
mod exec;
mod exits;
mod hooks;
mod pause;
mod pod;
mod process;
mod resize;
mod rootfs;
mod service;
mod signal;
mod sockets;
mod streams;
#[cfg(test)]
mod tests;

pub use error::TaskError;
pub use pod::{BootError, Pod, Shape, configure, namespaces_of};
pub use service::{METRICS_TYPE, services};

//! The virtual machine monitor of vmshim: one process per pod, one guest per process.

pub mod boot;
pub mod bus;
pub mod devices;
pub mod event_loop;
pub mod jail;
pub mod log;
pub mod machine;
pub mod memory;
pub mod process;
pub mod vcpu;

mod bits;
pub mod clock;
pub mod control;
mod random;
mod sync;

//! The virtual machine monitor of vmshim: one process per pod, one guest per process.

pub mod bus;
pub mod devices;
pub mod event_loop;
pub mod log;
pub mod machine;
pub mod memory;

mod bits;
mod sync;

//! The virtual machine monitor of vmshim: one process per pod, one guest per process.

pub mod devices;
pub mod event_loop;
pub mod memory;

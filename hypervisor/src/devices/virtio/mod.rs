//! virtio devices and what carries them.

mod device;
mod interrupt;
mod mmio;
mod responder;
mod service;
mod throttle;
mod worker;

pub mod balloon;
pub mod blk;
pub mod fs;
pub mod mem;
pub mod net;
pub mod pmem;
pub mod rng;
pub mod vsock;

pub use device::{Activation, ActivationError, VirtioDevice, read_space};
pub use interrupt::Interrupt;
pub use mmio::{MMIO_WINDOW, MmioTransport, QUEUE_NOTIFY};
pub use throttle::{Bucket, Throttle};
pub use worker::{Doorbells, SharedDevice};

/// Device type of a slot with nothing in it (virtio 1.2, sections 4.2.2 and 5).
pub const PLACEHOLDER: u32 = 0;

/// Offered by the transport for every device: it follows virtio 1.0 or later.
pub const VERSION_1: u64 = 1 << 32;

/// Either side may say from which ring index on it wants to be notified.
pub const RING_EVENT_IDX: u64 = 1 << 29;

/// A descriptor may point to a table of descriptors.
pub const RING_INDIRECT_DESC: u64 = 1 << 28;

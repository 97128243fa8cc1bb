//! virtio devices and what carries them.

mod device;
mod interrupt;

pub mod fs;
pub mod vsock;

pub use device::{Activation, ActivationError, VirtioDevice};
pub use interrupt::Interrupt;

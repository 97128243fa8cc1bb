//! virtio-rng (virtio 1.2, section 5.4): the host kernel's random bytes.

use vm_memory::Bytes;

use super::responder::{Responder, Responding};
use super::service::Chain;
use crate::memory::GuestRam;
use crate::random;

/// Bytes given to one request. A device may give less than asked for, and a driver asks for some dozens.
const MAX_BYTES: usize = 256;

/// The entropy device.
pub type Rng = Responding<Entropy>;

/// Where its bytes come from.
pub struct Entropy;

impl Responder for Entropy {
    const DEVICE_TYPE: u32 = 4;
    const NAME: &'static str = "rng";
    const QUEUE_SIZES: [u16; 1] = [64];

    fn config(&self) -> &[u8] {
        &[]
    }

    /// Fills the first writable descriptor. None where there is none, or it lies outside RAM.
    fn answer(&mut self, memory: &GuestRam, chain: Chain) -> Option<u32> {
        let descriptor = chain.writable().next()?;
        let mut bytes = [0; MAX_BYTES];
        let len = usize::try_from(descriptor.len()).ok()?.min(MAX_BYTES);
        let bytes = bytes.get_mut(..len)?;
        random::fill(bytes).ok()?;
        memory.write_slice(bytes, descriptor.addr()).ok()?;
        u32::try_from(len).ok()
    }
}

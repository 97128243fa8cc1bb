//! virtio-mem (virtio 1.2, section 5.15): memory that a guest gets and gives back while it runs.
//!
//! The shim says how much the guest shall have ([`Mem::request`]); the guest's driver then asks for one block after the
//! other, or gives blocks back when it has emptied them. Until more than nothing is asked for the device is a
//! placeholder, so that a guest that never grows does not spend anything on its driver.
//!
//! Hostile: the guest, in every request. It never has more plugged in than was asked for, and what it has not plugged in
//! is out of reach (see [`Growth`]), so all it can win by lies is less memory. It cannot be made to give memory back.
//! Runs on the `io` thread.

mod request;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::Bytes;
use vmshim_protocol::control::DeviceStatistics;

use super::service::{Chain, Service};
use super::{Activation, ActivationError, Interrupt, PLACEHOLDER, RING_EVENT_IDX, VirtioDevice, read_space};
use crate::event_loop::Readiness;
use crate::memory::{Growth, GuestRam};
use request::{Answer, Request};

const DEVICE_TYPE: u32 = 24;
const QUEUE_SIZES: [u16; 1] = [16];

/// Feature bits (section 5.15.3).
mod feature {
    /// The guest shall not even read what is not plugged in.
    pub const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
}

/// Bytes of the configuration space (section 5.15.4), and where in it is what the guest shall have.
const CONFIG_BYTES: usize = 56;
const REQUESTED: usize = 48;

/// The device.
pub struct Mem {
    growth: Arc<Growth>,
    requested: u64,
    /// What was plugged in when the driver last had nothing to do.
    taken_up: AtomicU64,
    /// The driver has been asked to look whether there is anything to do.
    asked: AtomicBool,
    /// Called when the guest can use more memory.
    changed: Box<dyn Fn() + Send>,
    active: Option<Active>,
    statistics: DeviceStatistics,
}

struct Active {
    service: Service,
    interrupt: Interrupt,
}

impl Mem {
    /// A device for `growth` of which the guest shall have nothing. `changed` is called on any thread when there may be
    /// more in [`Mem::taken_up_bytes`].
    pub fn new(growth: Arc<Growth>, changed: impl Fn() + Send + 'static) -> Self {
        let statistics = DeviceStatistics { name: "mem".into(), ..Default::default() };
        Self {
            growth,
            requested: 0,
            taken_up: AtomicU64::new(0),
            asked: AtomicBool::new(false),
            changed: Box::new(changed),
            active: None,
            statistics,
        }
    }

    /// Asks the guest to have `bytes` plugged in, rounded up to whole blocks. False where there is no room for it.
    pub fn request(&mut self, bytes: u64) -> bool {
        let whole = bytes.checked_next_multiple_of(self.growth.block());
        let Some(bytes) = whole.filter(|bytes| *bytes <= self.growth.size()) else { return false };
        self.requested = bytes;
        if let Some(active) = &self.active {
            active.interrupt.signal_config();
        }
        self.ask_whether_taken_up();
        true
    }

    /// Bytes that the guest shall have.
    pub fn requested_bytes(&self) -> u64 {
        self.requested
    }

    /// Bytes that the guest has.
    pub fn plugged_bytes(&self) -> u64 {
        self.growth.plugged_bytes()
    }

    /// Bytes that the guest has, as far as its kernel has taken them up: what is plugged in is not yet what a process can
    /// use. A driver that has all it shall have is told of a change that is none, and when it then looks what it shall
    /// have, which Linux does once it has finished what it was doing, it has taken up all there is.
    pub fn taken_up_bytes(&self) -> u64 {
        self.taken_up.load(Ordering::Acquire).min(self.growth.plugged_bytes())
    }

    fn ask_whether_taken_up(&self) {
        let plugged = self.growth.plugged_bytes();
        if let Some(active) = &self.active
            && plugged >= self.requested
            && plugged > self.taken_up.load(Ordering::Acquire)
        {
            self.asked.store(true, Ordering::Release);
            active.interrupt.signal_config();
        }
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let mut put = |at: usize, value: u64| config[at..at + 8].copy_from_slice(&value.to_le_bytes());
        put(0, self.growth.block());
        put(16, self.growth.start());
        put(24, self.growth.size());
        // All of it is usable at any time: what is requested is the limit.
        put(32, self.growth.size());
        put(40, self.growth.plugged_bytes());
        put(REQUESTED, self.requested);
        config
    }

    fn serve(&mut self) {
        let Self { growth, requested, active: Some(active), statistics, taken_up, .. } = self else { return };
        let before = growth.plugged_bytes();
        active.service.serve(|memory, chain| answer(memory, chain, growth, *requested, statistics));
        let after = growth.plugged_bytes();
        taken_up.fetch_min(after, Ordering::AcqRel);
        if after > before {
            self.ask_whether_taken_up();
        }
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        let is_there = self.requested > 0 || self.active.is_some() || self.growth.plugged_bytes() > 0;
        if is_there { DEVICE_TYPE } else { PLACEHOLDER }
    }

    fn name(&self) -> &str {
        &self.statistics.name
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        feature::UNPLUGGED_INACCESSIBLE | RING_EVENT_IDX
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        read_space(&self.config(), offset, data);
        if usize::try_from(offset) == Ok(REQUESTED) && self.asked.swap(false, Ordering::AcqRel) {
            self.taken_up.store(self.growth.plugged_bytes(), Ordering::Release);
            (self.changed)();
        }
    }

    /// What is plugged in stays so when a driver comes and goes (section 5.15.5).
    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let interrupt = activation.interrupt.clone();
        self.active = Some(Active { service: Service::start(activation)?, interrupt });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.asked.store(false, Ordering::Release);
    }

    fn on_queue(&mut self, _index: usize) {
        self.serve();
    }

    fn on_event(&mut self, _token: u32, _readiness: Readiness) {
        self.serve();
    }

    fn statistics(&self) -> DeviceStatistics {
        self.statistics.clone()
    }
}

/// Answers one request. What it plugs in and unplugs is counted in `read_bytes` and `written_bytes`.
fn answer(
    memory: &GuestRam,
    chain: Chain,
    growth: &Growth,
    requested: u64,
    statistics: &mut DeviceStatistics,
) -> u32 {
    let before = growth.plugged_bytes();
    let written = try_answer(memory, chain, growth, requested);
    let after = growth.plugged_bytes();
    statistics.read_bytes += after.saturating_sub(before);
    statistics.written_bytes += before.saturating_sub(after);
    match written {
        Some(written) => {
            statistics.requests += 1;
            written
        }
        None => {
            statistics.errors += 1;
            0
        }
    }
}

/// None where the chain holds no request, or has no room for an answer: nothing is done then.
fn try_answer(memory: &GuestRam, chain: Chain, growth: &Growth, requested: u64) -> Option<u32> {
    let question = chain.clone().readable().next()?;
    let reply = chain.writable().next()?;
    if u64::from(question.len()) < Request::BYTES as u64 || u64::from(reply.len()) < Answer::BYTES as u64 {
        return None;
    }
    let mut bytes = [0; Request::BYTES];
    memory.read_slice(&mut bytes, question.addr()).ok()?;
    let answer = Request::parse(&bytes).map_or(Answer::Error, |request| request.apply(growth, requested));
    memory.write_slice(&answer.encode(), reply.addr()).ok()?;
    u32::try_from(Answer::BYTES).ok()
}

#[cfg(test)]
#[path = "mem_tests.rs"]
mod tests;

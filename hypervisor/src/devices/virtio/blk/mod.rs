//! virtio-blk (virtio 1.2, section 5.2): a slot that holds a disk, or none.
//!
//! Slots exist from boot on and take disks while the guest runs: an empty one is a placeholder on the bus, where the
//! guest looks again when it is told of a disk. One that its driver has started is a disk of no sectors when it is emptied,
//! and a change of its capacity is announced by a configuration interrupt. Requests are served one by one on the `blk`
//! thread, so that a slow disk holds up no other device. The guest chooses every number in a request, see [`request`].

mod buffers;
mod disk;
mod request;

use std::os::fd::OwnedFd;

use vmshim_protocol::control::DeviceStatistics;

use super::service::{Chain, Service};
use super::{
    Activation, ActivationError, Interrupt, PLACEHOLDER, RING_EVENT_IDX, RING_INDIRECT_DESC, VirtioDevice,
    read_space,
};
use crate::event_loop::Readiness;
use crate::memory::GuestRam;
pub use disk::{Disk, DiskError};
use request::{SERIAL_BYTES, Status, answer};

const DEVICE_TYPE: u32 = 2;
const QUEUE_SIZES: [u16; 1] = [128];

/// Feature bits (section 5.2.3).
mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const READ_ONLY: u64 = 1 << 5;
    pub const FLUSH: u64 = 1 << 9;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Data descriptors of one request. With indirect descriptors a request may be longer than the queue.
const MAX_SEGMENTS: u32 = 254;

/// Bytes of one data descriptor. With [`MAX_SEGMENTS`] it bounds a request to 16 MiB.
const SEGMENT_BYTES: u32 = 64 << 10;

/// Sectors of one range of a discard or write-zeroes request: 1 GiB.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;

/// Ranges of one discard or write-zeroes request.
const MAX_RANGES: u32 = 16;

/// Bytes of the configuration space (section 5.2.4), up to `write_zeroes_may_unmap` and its padding.
const CONFIG_BYTES: usize = 60;

/// One slot.
pub struct Blk {
    serial: [u8; SERIAL_BYTES],
    disk: Option<Disk>,
    service: Option<Service>,
    /// Kept apart from the service: a disk may be attached while the driver has not started the device.
    interrupt: Option<Interrupt>,
    statistics: DeviceStatistics,
}

impl Blk {
    /// An empty slot.
    pub fn new(slot: u8) -> Self {
        let mut serial = [0; SERIAL_BYTES];
        for (byte, letter) in serial.iter_mut().zip(format!("slot{slot}").bytes()) {
            *byte = letter;
        }
        let statistics = DeviceStatistics { name: format!("blk{slot}"), ..Default::default() };
        Self { serial, disk: None, service: None, interrupt: None, statistics }
    }

    /// Puts a disk of one or more pieces into the slot. False when there is one already.
    pub fn attach(&mut self, pieces: Vec<OwnedFd>, read_only: bool) -> Result<bool, DiskError> {
        if self.disk.is_some() {
            return Ok(false);
        }
        self.disk = Some(Disk::new(pieces, read_only)?);
        self.announce();
        Ok(true)
    }

    /// Empties the slot. Requests are served under the device's lock, so none is under way. False when there was no
    /// disk.
    pub fn detach(&mut self) -> bool {
        let detached = self.disk.take().is_some();
        if detached {
            self.announce();
        }
        detached
    }

    fn announce(&self) {
        if let Some(interrupt) = &self.interrupt {
            interrupt.signal_config();
        }
    }

    fn serve(&mut self) {
        let Self { serial, disk, service, statistics, .. } = self;
        if let Some(service) = service {
            service.serve(|memory, chain| serve_one(memory, chain, disk.as_ref(), serial, statistics));
        }
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let mut put =
            |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &self.disk.as_ref().map_or(0, Disk::sectors).to_le_bytes());
        put(8, &SEGMENT_BYTES.to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        // Alignment of a discard, in sectors: that of a page, which every file system can give back.
        put(44, &8u32.to_le_bytes());
        put(48, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }
}

fn serve_one(
    memory: &GuestRam,
    chain: Chain,
    disk: Option<&Disk>,
    serial: &[u8; SERIAL_BYTES],
    statistics: &mut DeviceStatistics,
) -> u32 {
    let answer = answer(memory, chain, disk, serial);
    match answer.status {
        Some(Status::Ok) => statistics.requests += 1,
        _ => statistics.errors += 1,
    }
    statistics.read_bytes += answer.read;
    statistics.written_bytes += answer.written;
    answer.used
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        let is_there = self.disk.is_some() || self.service.is_some();
        if is_there { DEVICE_TYPE } else { PLACEHOLDER }
    }

    fn name(&self) -> &str {
        &self.statistics.name
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let common =
            feature::SIZE_MAX | feature::SEG_MAX | feature::FLUSH | RING_EVENT_IDX | RING_INDIRECT_DESC;
        match &self.disk {
            Some(disk) if disk.is_read_only() => common | feature::READ_ONLY,
            _ => common | feature::DISCARD | feature::WRITE_ZEROES,
        }
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        read_space(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        self.interrupt = Some(activation.interrupt.clone());
        self.service = Some(Service::start(activation)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.service = None;
        self.interrupt = None;
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

#[cfg(test)]
#[path = "blk_tests.rs"]
mod tests;

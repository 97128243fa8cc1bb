//! virtio-net (virtio 1.2, section 5.1): a slot that is connected to a tap, or has no link.
//!
//! Slots exist from boot on, as placeholders on the bus until they are connected; then the guest is told to look again.
//! The address in the configuration only names the slot ([`slot_mac`]); the agent sets address and MTU of the interface.
//! The link of one that its driver has started before is up upon a configuration interrupt.
//!
//! Frames go between guest memory and the tap by one `readv` or `writev` each, with no copy here. The tap carries a
//! virtio header, so checksums and segmentation pass through as the guest and the host's kernel have agreed on them.
//! Hostile: the guest, in every descriptor and in the header of what it sends, see [`header`]. A frame that is malformed
//! or that the tap does not take is dropped and counted, as on a wire. Thread: `net`.

mod header;
mod receive;
mod tap;
mod transmit;
mod used;

use std::os::fd::{AsFd, OwnedFd};

use virtio_queue::Queue;
use vmshim_protocol::control::DeviceStatistics;
use vmshim_protocol::nic::slot_mac;

use super::service::Service;
use super::{
    Activation, ActivationError, Interrupt, PLACEHOLDER, RING_EVENT_IDX, RING_INDIRECT_DESC, VirtioDevice,
};
use crate::event_loop::{Interest, Readiness, Registrar};
use receive::Receiver;
use tap::Tap;
pub use tap::TapError;

const DEVICE_TYPE: u32 = 1;

/// Frames to the guest, frames from the guest.
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// Feature bits (section 5.1.3).
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

const FEATURES: u64 = feature::CSUM
    | feature::GUEST_CSUM
    | feature::MAC
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::GUEST_ECN
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::HOST_ECN
    | feature::MRG_RXBUF
    | feature::STATUS
    | RING_EVENT_IDX
    | RING_INDIRECT_DESC;

/// `VIRTIO_NET_S_LINK_UP` in the configuration's status.
const LINK_UP: u16 = 1;

/// The longest frame: an IP packet of 65535 bytes behind an Ethernet header with two VLAN tags.
const MAX_FRAME: usize = 65535 + 14 + 8;

/// Tokens of the device's descriptors. The first is that of the [`Service`] for the guest's frames.
const CONTINUE_SENDING: u32 = 0;
const CONTINUE_RECEIVING: u32 = 1;
const TAP: u32 = 2;

/// One slot.
pub struct Net {
    mac: [u8; 6],
    tap: Option<Tap>,
    active: Option<Active>,
    statistics: DeviceStatistics,
}

struct Active {
    features: u64,
    receiver: Receiver,
    sender: Service,
    interrupt: Interrupt,
    registrar: Registrar,
}

impl Net {
    /// A slot without a link.
    pub fn new(slot: u8) -> Self {
        let statistics = DeviceStatistics { name: format!("net{slot}"), ..Default::default() };
        Self { mac: slot_mac(slot), tap: None, active: None, statistics }
    }

    /// Connects the slot to a tap. False when it is connected already.
    ///
    /// # Errors
    /// When the descriptor is no tap that can be used.
    pub fn attach(&mut self, fd: OwnedFd) -> Result<bool, TapError> {
        if self.tap.is_some() {
            return Ok(false);
        }
        self.connect(Tap::new(fd)?)?;
        Ok(true)
    }

    fn connect(&mut self, tap: Tap) -> Result<(), TapError> {
        if let Some(active) = &mut self.active {
            tap.offload(active.features)?;
            active.registrar.add(&tap, Interest::READ.once_per_change(), TAP).map_err(TapError::Host)?;
            active.receiver.on_readable();
            active.interrupt.signal_config();
        }
        self.tap = Some(tap);
        Ok(())
    }

    fn receive(&mut self) {
        let (Some(active), Some(tap)) = (&mut self.active, &self.tap) else { return };
        active.receiver.receive(tap, &mut self.statistics);
    }

    fn send(&mut self) {
        let Self { tap, active, statistics, .. } = self;
        let Some(active) = active else { return };
        let features = active.features;
        active.sender.serve(|memory, chain| {
            transmit::send(memory, chain, features, tap.as_ref(), statistics);
            0
        });
    }

    fn config(&self) -> [u8; 8] {
        let [a, b, c, d, e, f] = self.mac;
        let [low, high] = (if self.tap.is_some() { LINK_UP } else { 0 }).to_le_bytes();
        [a, b, c, d, e, f, low, high]
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        let is_there = self.tap.is_some() || self.active.is_some();
        if is_there { DEVICE_TYPE } else { PLACEHOLDER }
    }

    fn name(&self) -> &str {
        &self.statistics.name
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let config = self.config();
        let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or(&[]);
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(rest) {
            *byte = *value;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let Activation { memory, queues, features, interrupt, registrar } = activation;
        let enabled = queues.len();
        let Ok([inbound, outbound]) = <[Queue; 2]>::try_from(queues) else {
            return Err(ActivationError::MissingQueues { enabled, needed: QUEUE_SIZES.len() });
        };
        let mergeable = features & feature::MRG_RXBUF != 0;
        let receiver = Receiver::new(memory.clone(), inbound, mergeable, interrupt.clone(), &registrar)
            .map_err(ActivationError::Host)?;
        let sender = Service::start(Activation {
            memory,
            queues: vec![outbound],
            features,
            interrupt: interrupt.clone(),
            registrar: registrar.clone(),
        })?;
        let mut active = Active { features, receiver, sender, interrupt, registrar };
        if let Some(tap) = &self.tap {
            tap.offload(features).map_err(|error| ActivationError::Host(std::io::Error::other(error)))?;
            active
                .registrar
                .add(tap, Interest::READ.once_per_change(), TAP)
                .map_err(ActivationError::Host)?;
            active.receiver.on_readable();
        }
        self.active = Some(active);
        Ok(())
    }

    fn reset(&mut self) {
        let Some(active) = self.active.take() else { return };
        if let Some(tap) = &self.tap {
            // Only fails when it is not registered.
            let _ = active.registrar.remove(tap.as_fd());
        }
    }

    fn on_queue(&mut self, index: usize) {
        match index {
            0 => self.receive(),
            _ => self.send(),
        }
    }

    fn on_event(&mut self, token: u32, _readiness: Readiness) {
        match token {
            CONTINUE_SENDING => self.send(),
            CONTINUE_RECEIVING => self.receive(),
            TAP => {
                if let Some(active) = &mut self.active {
                    active.receiver.on_readable();
                }
                self.receive();
            }
            _ => {}
        }
    }

    fn statistics(&self) -> DeviceStatistics {
        self.statistics.clone()
    }
}

#[cfg(test)]
mod tests;

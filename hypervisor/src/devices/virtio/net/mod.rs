//! virtio-net (virtio 1.2, section 5.1): a slot that is connected to a tap, or has no link.
//!
//! Slots exist from boot on, as placeholders on the bus until they are connected; then the guest is told to look again.
//! The address in the configuration only names the slot ([`slot_mac`]); the agent sets address and MTU of the interface.
//! The link of one that its driver has started before is up upon a configuration interrupt.
//!
//! Frames go between guest memory and the tap by one `readv` or `writev` each, with no copy here. The tap carries a
//! virtio header, so checksums and segmentation pass through as the guest and the host's kernel have agreed on them.
//! A machine of several vCPUs has as many pairs of queues, and its tap a queue for each; the driver says how many of them
//! it uses, see [`commands`]. What passes in either direction may be limited, for all pairs together.
//!
//! Hostile: the guest, in every descriptor and in the header of what it sends, see [`header`]. A frame that is malformed
//! or that the tap does not take is dropped and counted, as on a wire. Thread: `net`.

mod commands;
mod header;
mod pairs;
mod receive;
mod tap;
mod transmit;
mod used;

use std::io;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;

use vmshim_protocol::control::DeviceStatistics;
use vmshim_protocol::nic::slot_mac;

use super::service::Service;
use super::{
    Activation, ActivationError, Bucket, Interrupt, PLACEHOLDER, RING_EVENT_IDX, RING_INDIRECT_DESC,
    Throttle, VirtioDevice, read_space,
};
use crate::clock;
use crate::event_loop::{Interest, Readiness, Registrar};
use pairs::Pairs;
use tap::Tap;
pub use tap::TapError;

const DEVICE_TYPE: u32 = 1;

/// Entries of a queue of frames to the guest, and of one of frames from the guest.
const PAIR_SIZES: [u16; 2] = [256, 256];

/// Entries of the control queue: the driver waits for each answer.
const CONTROL_SIZE: u16 = 16;

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
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const MQ: u64 = 1 << 22;
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

/// Tokens of a pair's descriptors, to be made the pair's by [`token`].
const SENDING: u32 = 0;
const RECEIVING: u32 = 1;
const TAP: u32 = 2;
const KINDS: u32 = 3;

/// Tokens of the device's other descriptors.
const COMMANDS: u32 = u32::MAX;
const MAY_SEND: u32 = u32::MAX - 1;
const MAY_RECEIVE: u32 = u32::MAX - 2;

/// How often the driver may change how many pairs it uses: some times at once, and then once in a second. The host makes
/// each change with a lock held that all of its network has.
const CHANGES_AT_ONCE: NonZeroU64 = NonZeroU64::MIN.saturating_add(7);
const CHANGES_PER_SECOND: NonZeroU64 = NonZeroU64::MIN;

fn token(pair: usize, kind: u32) -> u32 {
    // There are a few pairs; saturating keeps the conversion total.
    u32::try_from(pair).unwrap_or(u32::MAX / KINDS) * KINDS + kind
}

/// One slot.
pub struct Net {
    mac: [u8; 6],
    queue_sizes: Vec<u16>,
    /// One for each pair, or none without a link.
    taps: Vec<Tap>,
    active: Option<Active>,
    limits: Limits,
    changes: Bucket,
    statistics: DeviceStatistics,
}

/// What may pass.
pub struct Limits {
    /// To the guest.
    pub receive: Throttle,
    /// From the guest.
    pub send: Throttle,
}

impl Limits {
    /// As much as there is.
    pub const NONE: Self = Self { receive: Throttle::none(), send: Throttle::none() };
}

struct Active {
    pairs: Pairs,
    /// The pair that comes first when something may pass again, so that each of them does.
    turn: usize,
    control: Option<Service>,
    interrupt: Interrupt,
    registrar: Registrar,
}

impl Net {
    /// A slot without a link, for so many pairs of queues.
    pub fn new(slot: u8, pairs: u8, limits: Limits) -> Self {
        let mut queue_sizes = PAIR_SIZES.repeat(usize::from(pairs));
        if pairs > 1 {
            queue_sizes.push(CONTROL_SIZE);
        }
        let statistics = DeviceStatistics { name: format!("net{slot}"), ..Default::default() };
        Self {
            mac: slot_mac(slot),
            queue_sizes,
            taps: Vec::new(),
            active: None,
            limits,
            changes: Bucket::new(CHANGES_PER_SECOND, CHANGES_AT_ONCE),
            statistics,
        }
    }

    fn pairs(&self) -> usize {
        self.queue_sizes.len() / 2
    }

    /// Connects the slot to a tap, with one queue of it for each pair. False when it is connected already.
    ///
    /// # Errors
    /// When the descriptors are no tap that can be used.
    pub fn attach(&mut self, fds: Vec<OwnedFd>) -> Result<bool, TapError> {
        if !self.taps.is_empty() {
            return Ok(false);
        }
        let (came, needed) = (fds.len(), self.pairs());
        if came != needed {
            return Err(TapError::Queues { came, needed });
        }
        self.connect(Tap::all(fds)?)?;
        Ok(true)
    }

    fn connect(&mut self, taps: Vec<Tap>) -> Result<(), TapError> {
        if let Some(active) = &mut self.active {
            active.pairs.connect(&taps)?;
            active.interrupt.signal_config();
        }
        self.taps = taps;
        Ok(())
    }

    /// Waits for frames of the tap and for the limits' timers.
    fn begin(&mut self) -> io::Result<()> {
        let Self { taps, active: Some(active), limits, .. } = self else { return Ok(()) };
        active.pairs.connect(taps).map_err(io::Error::other)?;
        for (throttle, token) in [(&limits.send, MAY_SEND), (&limits.receive, MAY_RECEIVE)] {
            if let Some(timer) = throttle.timer() {
                active.registrar.add(timer, Interest::READ, token)?;
            }
        }
        Ok(())
    }

    fn receive(&mut self, pair: usize) {
        let Self { taps, active: Some(active), limits, statistics, .. } = self else { return };
        active.pairs.receive(pair, taps, &mut limits.receive, statistics);
    }

    fn send(&mut self, pair: usize) {
        let Self { taps, active: Some(active), limits, statistics, .. } = self else { return };
        active.pairs.send(pair, taps, &mut limits.send, statistics);
    }

    /// Lets each pair that is in use go on, another one first each time.
    fn take_turns(&mut self, go_on: fn(&mut Self, usize)) {
        let Some(active) = &mut self.active else { return };
        let (first, count) = (active.turn, active.pairs.used());
        active.turn = first.wrapping_add(1);
        for number in 0..count {
            go_on(self, first.wrapping_add(number) % count);
        }
    }

    fn obey(&mut self) {
        let Self { taps, active: Some(active), changes, statistics, .. } = self else { return };
        let Active { pairs, control: Some(control), .. } = active else { return };
        control.serve(|memory, chain| {
            let mut done = false;
            let written = commands::answer(memory, chain, |count| {
                done = set_pairs(pairs, taps, changes, count.into());
                done
            });
            *if done { &mut statistics.requests } else { &mut statistics.errors } += 1;
            written
        });
    }

    fn config(&self) -> [u8; 10] {
        let [a, b, c, d, e, f] = self.mac;
        let [low, high] = (if self.taps.is_empty() { 0 } else { LINK_UP }).to_le_bytes();
        let pairs = if self.pairs() > 1 { u16::try_from(self.pairs()).unwrap_or(1) } else { 0 };
        let [pairs_low, pairs_high] = pairs.to_le_bytes();
        [a, b, c, d, e, f, low, high, pairs_low, pairs_high]
    }
}

/// Has so many pairs in use from now on; false where there are not so many, where it has been changed too often, or where
/// the host refuses.
fn set_pairs(pairs: &mut Pairs, taps: &[Tap], changes: &mut Bucket, count: usize) -> bool {
    if count == pairs.used() {
        return true;
    }
    let possible = 1..=pairs.count().min(taps.len());
    if !possible.contains(&count) || changes.wait(clock::monotonic_ns()).is_some() {
        return false;
    }
    changes.charge(1);
    let set = pairs.use_first(count, taps);
    set.inspect_err(|error| crate::log::host(format_args!("queues of a tap stay as they are: {error}")))
        .is_ok()
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        let is_there = !self.taps.is_empty() || self.active.is_some();
        if is_there { DEVICE_TYPE } else { PLACEHOLDER }
    }

    fn name(&self) -> &str {
        &self.statistics.name
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// Without `MQ` the control queue follows the first pair (section 5.1.2).
    fn queues_needed(&self, features: u64) -> usize {
        let pairs = if features & feature::MQ != 0 { self.pairs() } else { 1 };
        PAIR_SIZES.len() * pairs + usize::from(features & feature::CTRL_VQ != 0)
    }

    fn features(&self) -> u64 {
        if self.pairs() > 1 { FEATURES | feature::CTRL_VQ | feature::MQ } else { FEATURES }
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        read_space(&self.config(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivationError> {
        let (features, needed) = (activation.features, self.queues_needed(activation.features));
        let pairs = Pairs::start(needed / PAIR_SIZES.len(), &mut activation)?;
        let (interrupt, registrar) = (activation.interrupt.clone(), activation.registrar.clone());
        let has_control = features & feature::CTRL_VQ != 0;
        let control = has_control.then(|| Service::start_as(activation, COMMANDS)).transpose()?;
        self.active = Some(Active { pairs, turn: 0, control, interrupt, registrar });
        self.begin().inspect_err(|_| self.reset()).map_err(ActivationError::Host)
    }

    fn reset(&mut self) {
        let Some(mut active) = self.active.take() else { return };
        active.pairs.disconnect(&self.taps);
        for timer in [self.limits.send.timer(), self.limits.receive.timer()].into_iter().flatten() {
            // Only fails when it is not registered.
            let _ = active.registrar.remove(timer);
        }
    }

    fn on_queue(&mut self, index: usize) {
        let Some(active) = &self.active else { return };
        let (pair, is_control) = (index / 2, index == 2 * active.pairs.count());
        match index % 2 {
            _ if is_control => self.obey(),
            0 => self.receive(pair),
            _ => self.send(pair),
        }
    }

    fn on_event(&mut self, token: u32, _readiness: Readiness) {
        match token {
            COMMANDS => return self.obey(),
            MAY_SEND => {
                self.limits.send.on_timer();
                return self.take_turns(Self::send);
            }
            MAY_RECEIVE => {
                self.limits.receive.on_timer();
                return self.take_turns(Self::receive);
            }
            _ => {}
        }
        let Ok(pair) = usize::try_from(token / KINDS) else { return };
        match token % KINDS {
            SENDING => self.send(pair),
            RECEIVING => self.receive(pair),
            _ => {
                if let Some(active) = &mut self.active {
                    active.pairs.on_readable(pair);
                }
                self.receive(pair);
            }
        }
    }

    fn statistics(&self) -> DeviceStatistics {
        self.statistics.clone()
    }
}

#[cfg(test)]
mod tests;

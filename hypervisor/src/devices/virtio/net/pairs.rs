//! The queue pairs of a device that its driver has started, the first of which is always in use.
//!
//! A pair that is not in use has its queue of the tap detached, so that the host puts nothing where nobody looks.

use vmshim_protocol::control::DeviceStatistics;

use super::receive::Receiver;
use super::tap::{Tap, TapError};
use super::{RECEIVING, SENDING, TAP, feature, token, transmit};
use crate::devices::virtio::service::Service;
use crate::devices::virtio::{Activation, ActivationError, Throttle};
use crate::event_loop::{Interest, Registrar};

/// One pair.
struct Pair {
    receiver: Receiver,
    sender: Service,
}

impl Pair {
    /// The pair of the first two queues that are left in `activation`.
    fn start(number: usize, activation: &mut Activation) -> Result<Self, ActivationError> {
        let Activation { memory, queues, features, interrupt, registrar } = activation;
        if queues.len() < 2 {
            return Err(ActivationError::MissingQueues { enabled: queues.len(), needed: 2 });
        }
        let (inbound, outbound) = (queues.remove(0), queues.remove(0));
        let mergeable = *features & feature::MRG_RXBUF != 0;
        let continued = token(number, RECEIVING);
        let receiver =
            Receiver::new(memory.clone(), inbound, mergeable, interrupt.clone(), registrar, continued)
                .map_err(ActivationError::Host)?;
        let outbound = Activation {
            memory: memory.clone(),
            queues: vec![outbound],
            features: *features,
            interrupt: interrupt.clone(),
            registrar: registrar.clone(),
        };
        Ok(Self { receiver, sender: Service::start_as(outbound, token(number, SENDING))? })
    }
}

/// All pairs.
pub struct Pairs {
    all: Vec<Pair>,
    /// The first so many are in use.
    used: usize,
    features: u64,
    registrar: Registrar,
}

impl Pairs {
    /// Takes `count` pairs of queues from `activation`, with the first in use.
    pub fn start(count: usize, activation: &mut Activation) -> Result<Self, ActivationError> {
        let all = (0..count).map(|number| Pair::start(number, activation)).collect::<Result<_, _>>()?;
        let Activation { features, registrar, .. } = activation;
        Ok(Self { all, used: 1, features: *features, registrar: registrar.clone() })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.all.len()
    }

    /// How many are in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Begins to take frames from a tap.
    pub fn connect(&mut self, taps: &[Tap]) -> Result<(), TapError> {
        let Some(first) = taps.first() else { return Ok(()) };
        first.offload(self.features)?;
        self.watch(0, first)
    }

    /// Has the first `count` pairs in use and no others. Where the host refuses, as many as were before.
    pub fn use_first(&mut self, count: usize, taps: &[Tap]) -> Result<(), TapError> {
        let before = self.used;
        while self.used > count {
            self.leave_last(taps);
        }
        while self.used < count {
            if let Err(error) = self.enter_next(taps) {
                while self.used > before {
                    self.leave_last(taps);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn enter_next(&mut self, taps: &[Tap]) -> Result<(), TapError> {
        let (needed, came) = (self.used + 1, taps.len());
        let tap = taps.get(self.used).ok_or(TapError::Queues { came, needed })?;
        tap.attach()?;
        if let Err(error) = self.watch(self.used, tap) {
            // It has just been attached.
            let _ = tap.detach();
            return Err(error);
        }
        // What the driver has put there before has not been looked at.
        self.all.get(self.used).iter().for_each(|pair| pair.sender.wake());
        self.used += 1;
        Ok(())
    }

    fn leave_last(&mut self, taps: &[Tap]) {
        self.used -= 1;
        if let Some(tap) = taps.get(self.used) {
            // Each only fails when it is so already.
            let _ = self.registrar.remove(tap);
            let _ = tap.detach();
        }
    }

    fn watch(&mut self, number: usize, tap: &Tap) -> Result<(), TapError> {
        let Some(pair) = self.all.get_mut(number) else { return Ok(()) };
        let interest = Interest::READ.once_per_change();
        self.registrar.add(tap, interest, token(number, TAP)).map_err(TapError::Host)?;
        pair.receiver.on_readable();
        Ok(())
    }

    /// The tap may have a frame for a pair.
    pub fn on_readable(&mut self, number: usize) {
        if let Some(pair) = self.in_use(number) {
            pair.receiver.on_readable();
        }
    }

    /// Delivers frames of one pair.
    pub fn receive(
        &mut self,
        number: usize,
        taps: &[Tap],
        limit: &mut Throttle,
        statistics: &mut DeviceStatistics,
    ) {
        if let (Some(pair), Some(tap)) = (self.in_use(number), taps.get(number)) {
            pair.receiver.receive(tap, limit, statistics);
        }
    }

    /// Sends frames of one pair.
    pub fn send(
        &mut self,
        number: usize,
        taps: &[Tap],
        limit: &mut Throttle,
        statistics: &mut DeviceStatistics,
    ) {
        let (features, tap) = (self.features, taps.get(number));
        let Some(pair) = self.in_use(number) else { return };
        pair.sender.serve_within(limit, |memory, chain| {
            (0, transmit::send(memory, chain, features, tap, statistics))
        });
    }

    fn in_use(&mut self, number: usize) -> Option<&mut Pair> {
        self.all.get_mut(number).filter(|_| number < self.used)
    }

    /// Lets go of the tap.
    pub fn disconnect(&mut self, taps: &[Tap]) {
        while self.used > 1 {
            self.leave_last(taps);
        }
        if let Some(first) = taps.first() {
            // Only fails when it is not registered.
            let _ = self.registrar.remove(first);
        }
    }
}

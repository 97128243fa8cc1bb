//! Serving a queue of requests, each answered before the next is taken.

use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

use super::{Activation, ActivationError, Interrupt, Throttle};
use crate::event_loop::{Interest, Registrar};
use crate::memory::GuestRam;

/// Requests answered in one go, while the device's lock is held. What is left is taken up by an event of our own, so
/// that a guest which never stops asking cannot keep others from the lock.
const BUDGET: usize = 32;

/// Token of the event by which the service of a device with no other continues.
const CONTINUE: u32 = 0;

/// A queue of requests.
pub struct Service {
    memory: GuestRam,
    queue: Queue,
    interrupt: Interrupt,
    registrar: Registrar,
    unfinished: EventFd,
    broken: bool,
}

impl Service {
    /// Takes over what a one-queue device was activated with.
    ///
    /// # Errors
    /// When there is no queue, or the process has no descriptors left.
    pub fn start(activation: Activation) -> Result<Self, ActivationError> {
        Self::start_as(activation, CONTINUE)
    }

    /// The same for one of several, which continues by an event of the token `continued`.
    ///
    /// # Errors
    /// As [`Service::start`].
    pub fn start_as(activation: Activation, continued: u32) -> Result<Self, ActivationError> {
        let Activation { memory, queues, interrupt, registrar, .. } = activation;
        let enabled = queues.len();
        let Some(queue) = queues.into_iter().next() else {
            return Err(ActivationError::MissingQueues { enabled, needed: 1 });
        };
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let unfinished = EventFd::from_flags(flags).map_err(|errno| ActivationError::Host(errno.into()))?;
        registrar.add(&unfinished, Interest::READ, continued).map_err(ActivationError::Host)?;
        Ok(Self { memory, queue, interrupt, registrar, unfinished, broken: false })
    }

    /// Answers waiting requests with `answer`, which returns how many bytes it has written to the chain.
    pub fn serve(&mut self, mut answer: impl FnMut(&GuestRam, Chain) -> u32) {
        self.serve_within(&mut Throttle::none(), |memory, chain| (answer(memory, chain), 0));
    }

    /// The same as far as `limit` allows; its timer then says when to go on. `answer` also returns how many bytes count.
    pub fn serve_within(&mut self, limit: &mut Throttle, answer: impl FnMut(&GuestRam, Chain) -> (u32, u64)) {
        // Fails when nothing is there to be read, which is the usual case.
        let _ = self.unfinished.read();
        if self.broken {
            return;
        }
        if let Err(error) = self.try_serve(limit, answer) {
            // Rings that cannot be read: no single request can answer for that.
            crate::log::guest(format_args!("a virtqueue is broken: {error}"));
            self.broken = true;
            self.interrupt.signal_needs_reset();
        }
    }

    /// Has the queue looked at, whether or not its doorbell is rung.
    pub fn wake(&self) {
        // The counter cannot be full: it is read before each round.
        let _ = self.unfinished.write(1);
    }

    fn try_serve(
        &mut self,
        limit: &mut Throttle,
        mut answer: impl FnMut(&GuestRam, Chain) -> (u32, u64),
    ) -> Result<(), virtio_queue::Error> {
        let (mut served, mut admitted) = (0, true);
        loop {
            self.queue.disable_notification(&*self.memory)?;
            while served < BUDGET {
                admitted = limit.admits();
                if !admitted {
                    break;
                }
                let Some(chain) = self.next()? else { break };
                let head = chain.head_index();
                let (written, counted) = answer(&self.memory, chain);
                limit.charge(counted);
                self.queue.add_used(&*self.memory, head, written)?;
                served += 1;
            }
            if served == BUDGET {
                self.wake();
                break;
            }
            if !admitted || !self.queue.enable_notification(&*self.memory)? {
                break;
            }
        }
        if served > 0 && self.queue.needs_notification(&*self.memory)? {
            self.interrupt.signal_used_queue();
        }
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Chain>, virtio_queue::Error> {
        Ok(self.queue.iter(self.memory.clone())?.next())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Only fails when it is not registered.
        let _ = self.registrar.remove(&self.unfinished);
    }
}

/// A request's descriptors.
pub type Chain = DescriptorChain<GuestRam>;

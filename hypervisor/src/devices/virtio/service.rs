//! Serving a queue of requests, each answered before the next is taken.

use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

use super::{Activation, ActivationError, Interrupt};
use crate::event_loop::{Interest, Registrar};
use crate::memory::GuestRam;

/// Requests answered in one go, while the device's lock is held. What is left is taken up by an event of our own, so
/// that a guest which never stops asking cannot keep others from the lock.
const BUDGET: usize = 32;

/// Token of the event by which a service continues.
const CONTINUE: u32 = 0;

/// A device with one queue of requests.
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
        let Activation { memory, queues, interrupt, registrar, .. } = activation;
        let enabled = queues.len();
        let Some(queue) = queues.into_iter().next() else {
            return Err(ActivationError::MissingQueues { enabled, needed: 1 });
        };
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let unfinished = EventFd::from_flags(flags).map_err(|errno| ActivationError::Host(errno.into()))?;
        registrar.add(&unfinished, Interest::READ, CONTINUE).map_err(ActivationError::Host)?;
        Ok(Self { memory, queue, interrupt, registrar, unfinished, broken: false })
    }

    /// Answers waiting requests with `answer`, which returns how many bytes it has written to the chain.
    pub fn serve(&mut self, answer: impl FnMut(&GuestRam, Chain) -> u32) {
        // Fails when nothing is there to be read, which is the usual case.
        let _ = self.unfinished.read();
        if self.broken {
            return;
        }
        if let Err(error) = self.try_serve(answer) {
            // Rings that cannot be read: no single request can answer for that.
            crate::log::guest(format_args!("a virtqueue is broken: {error}"));
            self.broken = true;
            self.interrupt.signal_needs_reset();
        }
    }

    fn try_serve(
        &mut self,
        mut answer: impl FnMut(&GuestRam, Chain) -> u32,
    ) -> Result<(), virtio_queue::Error> {
        let mut served = 0;
        loop {
            self.queue.disable_notification(&*self.memory)?;
            while served < BUDGET {
                let Some(chain) = self.next()? else { break };
                let head = chain.head_index();
                let written = answer(&self.memory, chain);
                self.queue.add_used(&*self.memory, head, written)?;
                served += 1;
            }
            if served == BUDGET {
                // The counter cannot be full: it is read before each round.
                let _ = self.unfinished.write(1);
                break;
            }
            if !self.queue.enable_notification(&*self.memory)? {
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

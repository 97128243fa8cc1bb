//! Frames to the guest.
//!
//! How long a frame is shows only when it is read, so buffers for the longest are held ready: chains are taken off the
//! ring, translated once, and used up in their order, as many of them as the frame needs. What a driver that does not
//! merge buffers gets has to fit into one.

use std::collections::VecDeque;
use std::io;

use nix::errno::Errno;
use nix::libc::iovec;
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions};
use vmshim_protocol::control::DeviceStatistics;

use super::MAX_FRAME;
use super::header::{BUFFERS_AT, HEADER};
use super::tap::Tap;
use super::used::Used;
use crate::devices::virtio::service::Chain;
use crate::devices::virtio::{Interrupt, Throttle};
use crate::event_loop::{Interest, Registrar};
use crate::memory::GuestRam;

/// Frames delivered in one go, while the device's lock is held.
const BUDGET: usize = 64;

/// Pieces of one chain of buffers, and of all that are held: what one system call takes.
const MAX_PIECES: usize = 1024;

/// The guest's side of frames on their way in.
pub struct Receiver {
    memory: GuestRam,
    queue: Queue,
    mergeable: bool,
    held: Held,
    used: Used,
    /// The tap may have a frame.
    readable: bool,
    /// The driver has been asked to say when there are buffers.
    starving: bool,
    interrupt: Interrupt,
    registrar: Registrar,
    unfinished: EventFd,
    broken: bool,
}

/// Buffers off the ring that hold nothing yet.
#[derive(Default)]
struct Held {
    chains: VecDeque<Buffer>,
    vectors: Vec<iovec>,
    bytes: usize,
}

// SAFETY: the vectors are ranges of guest RAM, which any thread may use and `Receiver::memory` keeps mapped.
unsafe impl Send for Held {}

/// One chain.
struct Buffer {
    head: u16,
    /// Where the header goes.
    start: GuestAddress,
    bytes: usize,
    vectors: usize,
}

impl Receiver {
    /// A receiver without buffers, which continues by an event of the token `continued`.
    pub fn new(
        memory: GuestRam,
        queue: Queue,
        mergeable: bool,
        interrupt: Interrupt,
        registrar: &Registrar,
        continued: u32,
    ) -> io::Result<Self> {
        let unfinished = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        registrar.add(&unfinished, Interest::READ, continued)?;
        Ok(Self {
            memory,
            queue,
            mergeable,
            held: Held::default(),
            used: Used::default(),
            readable: false,
            starving: true,
            interrupt,
            registrar: registrar.clone(),
            unfinished,
            broken: false,
        })
    }

    /// The tap has something to read.
    pub fn on_readable(&mut self) {
        self.readable = true;
        // The counter cannot be full: it is read before each round.
        let _ = self.unfinished.write(1);
    }

    /// Delivers frames until there are none, no buffers for one, or `limit` is reached.
    pub fn receive(&mut self, tap: &Tap, limit: &mut Throttle, statistics: &mut DeviceStatistics) {
        // Fails when nothing is there to be read, which is the usual case.
        let _ = self.unfinished.read();
        if self.broken || !self.readable {
            return;
        }
        if let Err(error) = self.try_receive(tap, limit, statistics) {
            crate::log::guest(format_args!("{}: a virtqueue is broken: {error}", statistics.name));
            self.broken = true;
            self.interrupt.signal_needs_reset();
        }
    }

    fn try_receive(
        &mut self,
        tap: &Tap,
        limit: &mut Throttle,
        statistics: &mut DeviceStatistics,
    ) -> Result<(), virtio_queue::Error> {
        let mut delivered = 0;
        if self.starving {
            self.queue.disable_notification(&*self.memory)?;
            self.starving = false;
        }
        while self.readable && delivered < BUDGET && limit.admits() && self.fill(statistics)? {
            // SAFETY: the vectors are ranges of RAM that `memory` keeps mapped.
            match unsafe { tap.read(&self.held.vectors) } {
                Ok(bytes) => {
                    self.deliver(bytes)?;
                    let frame = u64::try_from(bytes.saturating_sub(HEADER)).unwrap_or(0);
                    limit.charge(frame);
                    statistics.requests += 1;
                    statistics.read_bytes += frame;
                    delivered += 1;
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.readable = false,
                Err(_) => {
                    statistics.errors += 1;
                    self.readable = false;
                }
            }
        }
        if delivered == BUDGET {
            // The counter cannot be full: it is read before each round.
            let _ = self.unfinished.write(1);
        }
        if self.used.wants_interrupt(&self.memory, &self.queue)? {
            self.interrupt.signal_used_queue();
        }
        Ok(())
    }

    /// Holds buffers for the longest frame; false where the driver has to give more first.
    fn fill(&mut self, statistics: &mut DeviceStatistics) -> Result<bool, virtio_queue::Error> {
        let mut refused = 0;
        while !self.is_full() {
            if refused == BUDGET {
                // A driver that never stops giving such must not keep others from the lock.
                let _ = self.unfinished.write(1);
                return Ok(false);
            }
            if let Some(chain) = self.queue.iter(self.memory.clone())?.next() {
                let head = chain.head_index();
                if self.held.push(&self.memory, chain).is_none() {
                    refused += 1;
                    statistics.errors += 1;
                    self.used.write(&self.memory, &self.queue, head, 0)?;
                    self.used.publish(&self.memory, &mut self.queue)?;
                }
            } else if self.held.chains.len() == usize::from(self.queue.size()) {
                // The driver has no more to give.
                return Ok(true);
            } else if !self.queue.enable_notification(&*self.memory)? {
                self.starving = true;
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn is_full(&self) -> bool {
        match self.mergeable {
            true => self.held.bytes >= MAX_FRAME + HEADER || self.held.vectors.len() >= MAX_PIECES / 2,
            false => !self.held.chains.is_empty(),
        }
    }

    /// Gives the driver the chains that a frame of `bytes` with its header has filled.
    fn deliver(&mut self, bytes: usize) -> Result<(), virtio_queue::Error> {
        let Some(first) = self.held.chains.front() else { return Ok(()) };
        let number = self.held.count(bytes);
        let place = first.start.unchecked_add(BUFFERS_AT);
        // It lies in the first piece of the first chain, which is RAM.
        let _ = self.memory.write_slice(&number.to_le_bytes(), place);
        let mut left = bytes;
        for _ in 0..number {
            let Some(buffer) = self.held.pop() else { break };
            let filled = left.min(buffer.bytes);
            left -= filled;
            let filled = u32::try_from(filled).unwrap_or(u32::MAX);
            self.used.write(&self.memory, &self.queue, buffer.head, filled)?;
        }
        self.used.publish(&self.memory, &mut self.queue)
    }
}

impl Held {
    /// None where the chain is no buffer: not to be written, too short for a header, or not RAM.
    fn push(&mut self, memory: &GuestRam, chain: Chain) -> Option<()> {
        let (head, before) = (chain.head_index(), self.vectors.len());
        let pushed = self.gather(memory, chain);
        match pushed {
            Some((start, bytes)) => {
                let vectors = self.vectors.len() - before;
                self.chains.push_back(Buffer { head, start, bytes, vectors });
                self.bytes += bytes;
                Some(())
            }
            None => {
                self.vectors.truncate(before);
                None
            }
        }
    }

    fn gather(&mut self, memory: &GuestRam, chain: Chain) -> Option<(GuestAddress, usize)> {
        let (mut start, mut bytes) = (None, 0usize);
        for (count, descriptor) in chain.enumerate() {
            let len = usize::try_from(descriptor.len()).ok()?;
            let too_short = start.is_none() && len < HEADER;
            if count == MAX_PIECES / 2 || !descriptor.is_write_only() || too_short {
                return None;
            }
            start.get_or_insert(descriptor.addr());
            bytes = bytes.checked_add(len)?;
            for slice in
                GuestMemory::get_slices(&**memory, descriptor.addr(), len, Permissions::Write).ok()?
            {
                let slice = slice.ok()?;
                let guard = slice.ptr_guard_mut();
                self.vectors.push(iovec { iov_base: guard.as_ptr().cast(), iov_len: slice.len() });
            }
        }
        Some((start?, bytes))
    }

    /// How many chains a frame of `bytes` fills.
    fn count(&self, bytes: usize) -> u16 {
        let (mut room, mut count) = (0, 0);
        for buffer in &self.chains {
            room += buffer.bytes;
            count += 1;
            if room >= bytes {
                break;
            }
        }
        count
    }

    fn pop(&mut self) -> Option<Buffer> {
        let buffer = self.chains.pop_front()?;
        self.vectors.drain(..buffer.vectors);
        self.bytes -= buffer.bytes;
        Some(buffer)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // Only fails when it is not registered.
        let _ = self.registrar.remove(&self.unfinished);
    }
}

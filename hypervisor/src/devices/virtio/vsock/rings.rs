//! Packets in the two virtqueues that carry them.
//!
//! Hostile: ring indices, descriptors, and memory that changes while we look at it. Each index, descriptor and header
//! is read once. A descriptor counts only if all of it lies in one range of RAM; how a driver cuts a packet into
//! descriptors makes no difference (virtio 1.2, section 2.7.4).

use std::io;

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use super::packet::{HEADER_LEN, Header};
use crate::memory::GuestMemory;

/// Pieces of memory handed to one system call at most.
pub const MAX_SLICES: usize = 64;

/// A ring itself is beyond use, not just a packet in it. The device stands still until the driver resets it.
#[derive(Debug, thiserror::Error)]
#[error("the driver has broken a virtqueue")]
pub struct BrokenRing(#[from] virtio_queue::Error);

/// A chain of descriptors that is no packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// There is no whole header in it, so nobody to answer.
    Header,
    /// The payload is not what the header says.
    Payload(Header),
}

/// What has become of an attempt to read into the guest's buffers.
#[derive(Debug)]
pub enum Filled {
    /// The guest has provided none.
    NoBuffer,
    /// Packets with this many bytes in all have been sent; 0 is end of file, and nothing was sent.
    Read {
        /// Bytes read.
        bytes: usize,
        /// Bytes there was room for.
        room: usize,
    },
    /// The source failed; nothing was sent.
    Failed(io::Error),
}

/// The queue with empty buffers, in which packets go to the guest.
pub struct Outbound<'a> {
    queue: &'a mut Queue,
    memory: &'a GuestMemory,
    /// Buffers taken by the fill under way; the slices of all of them, one after the other.
    buffers: Vec<EmptyBuffer>,
    headers: Vec<VolatileSlice<'a>>,
    payloads: Vec<VolatileSlice<'a>>,
    /// Buffers that no packet fits in, returned as they came.
    pub malformed: u64,
    used: bool,
}

struct EmptyBuffer {
    head: u16,
    headers: usize,
    room: usize,
}

impl<'a> Outbound<'a> {
    /// Looks at a queue for as long as one batch lasts.
    pub fn new(queue: &'a mut Queue, memory: &'a GuestMemory) -> Self {
        Self {
            queue,
            memory,
            buffers: Vec::new(),
            headers: Vec::new(),
            payloads: Vec::new(),
            malformed: 0,
            used: false,
        }
    }

    /// Sends a packet without payload; `false` when the guest has no buffer for it.
    ///
    /// # Errors
    /// See [`BrokenRing`].
    pub fn put(&mut self, header: &Header) -> Result<bool, BrokenRing> {
        self.gather(1, 0)?;
        let Some(buffer) = self.buffers.pop() else { return Ok(false) };
        write_header(&self.headers, header);
        self.finish(buffer.head, HEADER_LEN)?;
        Ok(true)
    }

    /// Lets `read` read up to `limit` bytes straight into at most `count` buffers, and sends what it has read.
    ///
    /// # Errors
    /// See [`BrokenRing`].
    pub fn fill(
        &mut self,
        count: usize,
        limit: u32,
        read: impl FnOnce(&[VolatileSlice<'_>]) -> io::Result<usize>,
        mut header: impl FnMut(u32) -> Header,
    ) -> Result<Filled, BrokenRing> {
        self.gather(count, limit)?;
        if self.buffers.is_empty() {
            return Ok(Filled::NoBuffer);
        }
        let room = self.buffers.iter().map(|buffer| buffer.room).sum();
        let bytes = match read(&self.payloads) {
            Ok(bytes) => bytes.min(room),
            Err(error) => {
                self.give_back(self.buffers.len());
                return Ok(Filled::Failed(error));
            }
        };
        let mut left = bytes;
        let mut at = 0;
        for buffer in std::mem::take(&mut self.buffers) {
            let len = left.min(buffer.room);
            if len == 0 {
                self.buffers.push(buffer);
                continue;
            }
            left -= len;
            // One packet is bounded by `MAX_PAYLOAD`, which the conversion cannot exceed.
            write_header(&self.headers[at..buffer.headers], &header(u32::try_from(len).unwrap_or(0)));
            at = buffer.headers;
            self.finish(buffer.head, HEADER_LEN + len)?;
        }
        self.give_back(self.buffers.len());
        Ok(Filled::Read { bytes, room })
    }

    /// Asks for a doorbell when the guest provides buffers; `true` when it already has.
    ///
    /// # Errors
    /// See [`BrokenRing`].
    pub fn wait(&mut self) -> Result<bool, BrokenRing> {
        Ok(self.queue.enable_notification(self.memory)?)
    }

    /// Whether the guest has to be interrupted for what was sent.
    ///
    /// # Errors
    /// See [`BrokenRing`].
    pub fn needs_interrupt(&mut self) -> Result<bool, BrokenRing> {
        Ok(std::mem::take(&mut self.used) && self.queue.needs_notification(self.memory)?)
    }

    /// Takes up to `count` buffers for up to `limit` bytes. Malformed ones in front of them are returned.
    fn gather(&mut self, count: usize, limit: u32) -> Result<(), BrokenRing> {
        while let Some(head) = self.gather_sound(count, limit)? {
            self.malformed += 1;
            self.finish(head, 0)?;
        }
        Ok(())
    }

    /// The same, up to the first malformed buffer: it waits for its turn if others come before it, and is handed out
    /// if none does.
    fn gather_sound(&mut self, count: usize, limit: u32) -> Result<Option<u16>, BrokenRing> {
        let Self { queue, memory, buffers, headers, payloads, .. } = self;
        buffers.clear();
        headers.clear();
        payloads.clear();
        let mut left = usize::try_from(limit).unwrap_or(usize::MAX);
        let mut chains = queue.iter(*memory)?;
        while buffers.len() < count && (left > 0 || limit == 0) && payloads.len() < MAX_SLICES {
            let Some(chain) = chains.next() else { break };
            let head = chain.head_index();
            let before = (headers.len(), payloads.len());
            match add(memory, chain, left, headers, payloads) {
                Some(room) if room > 0 || limit == 0 => {
                    left -= room;
                    buffers.push(EmptyBuffer { head, headers: headers.len(), room });
                }
                _ if buffers.is_empty() => return Ok(Some(head)),
                _ => {
                    headers.truncate(before.0);
                    payloads.truncate(before.1);
                    chains.go_to_previous_position();
                    break;
                }
            }
        }
        Ok(None)
    }

    fn finish(&mut self, head: u16, len: usize) -> Result<(), BrokenRing> {
        self.used = true;
        // Nothing longer than header and payload is ever written.
        Ok(self.queue.add_used(self.memory, head, u32::try_from(len).unwrap_or(0))?)
    }

    fn give_back(&mut self, count: usize) {
        for _ in 0..count {
            self.queue.go_to_previous_position();
        }
    }
}

/// Notes the pieces of one buffer; returns how much payload of at most `limit` goes into it, `None` when it is malformed.
fn add<'a>(
    memory: &'a GuestMemory,
    chain: DescriptorChain<&'a GuestMemory>,
    limit: usize,
    headers: &mut Vec<VolatileSlice<'a>>,
    payloads: &mut Vec<VolatileSlice<'a>>,
) -> Option<usize> {
    let mut header = HEADER_LEN;
    let mut room = 0;
    for descriptor in chain {
        if !descriptor.is_write_only() {
            return None;
        }
        let (first, rest) = split(slice_of(memory, &descriptor)?, header)?;
        header -= first.len();
        if !first.is_empty() {
            headers.push(first);
        }
        let rest = rest.subslice(0, rest.len().min(limit - room)).ok()?;
        if !rest.is_empty() && payloads.len() < MAX_SLICES {
            room += rest.len();
            payloads.push(rest);
        }
    }
    (header == 0).then_some(room)
}

/// The queue with packets from the guest.
pub struct Inbound<'a> {
    queue: &'a mut Queue,
    memory: &'a GuestMemory,
    payload: Vec<VolatileSlice<'a>>,
    used: bool,
}

impl<'a> Inbound<'a> {
    /// Looks at a queue for as long as one batch lasts.
    pub fn new(queue: &'a mut Queue, memory: &'a GuestMemory) -> Self {
        Self { queue, memory, payload: Vec::new(), used: false }
    }

    /// Hands the next packet and its payload to `take`, then returns its buffers to the guest. `false` when there is
    /// none.
    ///
    /// # Errors
    /// See [`BrokenRing`].
    pub fn next(
        &mut self,
        take: impl FnOnce(Result<Header, Malformed>, &[VolatileSlice<'_>]),
    ) -> Result<bool, BrokenRing> {
        let Some(chain) = self.queue.iter(self.memory)?.next() else { return Ok(false) };
        let head = chain.head_index();
        self.payload.clear();
        take(self.parse(chain), &self.payload);
        self.used = true;
        self.queue.add_used(self.memory, head, 0)?;
        Ok(true)
    }

    /// Asks for a doorbell when the guest sends a packet; `true` when it already has.
    ///
    /// # Errors
    /// See [`BrokenRing`].
    pub fn wait(&mut self) -> Result<bool, BrokenRing> {
        Ok(self.queue.enable_notification(self.memory)?)
    }

    /// Whether the guest has to be interrupted for the buffers returned.
    ///
    /// # Errors
    /// See [`BrokenRing`].
    pub fn needs_interrupt(&mut self) -> Result<bool, BrokenRing> {
        Ok(std::mem::take(&mut self.used) && self.queue.needs_notification(self.memory)?)
    }

    fn parse(&mut self, mut chain: DescriptorChain<&'a GuestMemory>) -> Result<Header, Malformed> {
        let mut bytes = [0; HEADER_LEN];
        let mut filled = 0;
        let mut rest = None;
        while filled < HEADER_LEN {
            let descriptor = chain.next().ok_or(Malformed::Header)?;
            let slice = self.readable(&descriptor).ok_or(Malformed::Header)?;
            let (first, second) = split(slice, HEADER_LEN - filled).ok_or(Malformed::Header)?;
            filled += first.copy_to(&mut bytes[filled..]);
            rest = Some(second);
        }
        let header = Header::decode(&bytes);
        self.take_payload(chain, rest, &header).ok_or(Malformed::Payload(header))?;
        Ok(header)
    }

    fn take_payload(
        &mut self,
        chain: DescriptorChain<&'a GuestMemory>,
        mut rest: Option<VolatileSlice<'a>>,
        header: &Header,
    ) -> Option<()> {
        if !header.has_sound_length() {
            return None;
        }
        let mut missing = usize::try_from(header.len).ok()?;
        let mut descriptors = chain;
        while missing > 0 {
            let slice = match rest.take() {
                Some(slice) => slice,
                None => self.readable(&descriptors.next()?)?,
            };
            let piece = slice.subslice(0, slice.len().min(missing)).ok()?;
            missing -= piece.len();
            if !piece.is_empty() {
                self.payload.push(piece);
            }
        }
        Some(())
    }

    fn readable(&self, descriptor: &Descriptor) -> Option<VolatileSlice<'a>> {
        if descriptor.is_write_only() {
            return None;
        }
        slice_of(self.memory, descriptor)
    }
}

fn slice_of<'a>(memory: &'a GuestMemory, descriptor: &Descriptor) -> Option<VolatileSlice<'a>> {
    memory.get_slice(descriptor.addr(), usize::try_from(descriptor.len()).ok()?).ok()
}

fn split<'a>(slice: VolatileSlice<'a>, at: usize) -> Option<(VolatileSlice<'a>, VolatileSlice<'a>)> {
    slice.split_at(at.min(slice.len())).ok()
}

fn write_header(slices: &[VolatileSlice<'_>], header: &Header) {
    let bytes = header.encode();
    let mut rest = &bytes[..];
    for slice in slices {
        let count = slice.len().min(rest.len());
        slice.copy_from(&rest[..count]);
        rest = &rest[count..];
    }
}

//! The driver's side of the queues, and packets as a guest makes them.

use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::devices::virtio::vsock::packet::{HEADER_LEN, Header, Op, Ports, Space};
use crate::memory::GuestMemory;

pub const QUEUE_SIZE: u16 = 128;
pub const BUFFER_LEN: u32 = 4096;
pub const MEMORY: usize = 32 << 20;

const RX_RING: u64 = 0x1_0000;
const TX_RING: u64 = 0x2_0000;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x80_0000;
const TX_BUFFER_LEN: u64 = 0x1_8000;

/// A descriptor: address, length, device-writable.
pub type Piece = (u64, u32, bool);

/// A virtqueue as its driver sees it.
pub struct DriverQueue {
    base: u64,
    available: u16,
    used: u16,
    event_idx: bool,
}

impl DriverQueue {
    fn new(base: u64, event_idx: bool) -> Self {
        Self { base, available: 0, used: 0, event_idx }
    }

    fn table(&self) -> u64 {
        self.base
    }

    fn available_ring(&self) -> u64 {
        self.base + 0x2000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0x3000
    }

    pub fn device_side(&self) -> Queue {
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        let low = |address: u64| Some(u32::try_from(address).unwrap());
        queue.set_desc_table_address(low(self.table()), Some(0));
        queue.set_avail_ring_address(low(self.available_ring()), Some(0));
        queue.set_used_ring_address(low(self.used_ring()), Some(0));
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        queue
    }

    /// Writes a chain to the table from `head` on and makes it available.
    pub fn offer(&mut self, memory: &GuestMemory, head: u16, pieces: &[Piece]) {
        for (at, &(address, len, writable)) in (0u16..).zip(pieces) {
            let more = usize::from(at) + 1 < pieces.len();
            let flags = u32::from(more) * VRING_DESC_F_NEXT + u32::from(writable) * VRING_DESC_F_WRITE;
            self.descriptor(memory, head + at, (address, len), u16::try_from(flags).unwrap(), head + at + 1);
        }
        self.publish(memory, head);
    }

    pub fn descriptor(&self, memory: &GuestMemory, at: u16, area: (u64, u32), flags: u16, next: u16) {
        let place = self.table() + u64::from(at) * 16;
        memory.write_obj(area.0, GuestAddress(place)).unwrap();
        memory.write_obj(area.1, GuestAddress(place + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(place + 12)).unwrap();
        memory.write_obj(next, GuestAddress(place + 14)).unwrap();
    }

    pub fn publish(&mut self, memory: &GuestMemory, head: u16) {
        let place = self.available_ring() + 4 + u64::from(self.available % QUEUE_SIZE) * 2;
        memory.write_obj(head, GuestAddress(place)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available(memory, self.available);
    }

    pub fn set_available(&self, memory: &GuestMemory, index: u16) {
        memory.store(index, GuestAddress(self.available_ring() + 2), Ordering::Release).unwrap();
    }

    /// Heads and lengths that the device has returned since the last call.
    pub fn reclaim(&mut self, memory: &GuestMemory) -> Vec<(u16, u32)> {
        let index: u16 = memory.load(GuestAddress(self.used_ring() + 2), Ordering::Acquire).unwrap();
        let mut returned = Vec::new();
        while self.used != index {
            let place = self.used_ring() + 4 + u64::from(self.used % QUEUE_SIZE) * 8;
            let head: u32 = memory.read_obj(GuestAddress(place)).unwrap();
            let len: u32 = memory.read_obj(GuestAddress(place + 4)).unwrap();
            returned.push((u16::try_from(head).unwrap(), len));
            self.used = self.used.wrapping_add(1);
        }
        // Interrupt me for the next one.
        memory.write_obj(index, GuestAddress(self.available_ring() + 4 + 2 * u64::from(QUEUE_SIZE))).unwrap();
        returned
    }

    /// Buffers made available and not returned yet, as far as the driver has looked.
    pub fn outstanding(&self) -> u16 {
        self.available.wrapping_sub(self.used)
    }
}

/// A guest's memory and its two queues.
pub struct Guest {
    pub memory: GuestMemory,
    pub rx: DriverQueue,
    pub tx: DriverQueue,
    next_tx: u16,
    rx_free: Vec<u16>,
}

impl Guest {
    /// A guest that has filled its receive queue, if `filled`.
    pub fn new(filled: bool) -> Self {
        let memory = crate::memory::at(&[(GuestAddress(0), MEMORY)]);
        let (rx, tx) = (DriverQueue::new(RX_RING, true), DriverQueue::new(TX_RING, true));
        let mut guest = Self { memory, rx, tx, next_tx: 0, rx_free: (0..QUEUE_SIZE).collect() };
        if filled {
            guest.refill(usize::MAX);
        }
        guest
    }

    /// Makes up to `count` more receive buffers available.
    pub fn refill(&mut self, count: usize) {
        for _ in 0..count.min(self.rx_free.len()) {
            let head = self.rx_free.pop().unwrap();
            let address = RX_BUFFERS + u64::from(head) * u64::from(BUFFER_LEN);
            self.rx.offer(&self.memory, head, &[(address, BUFFER_LEN, true)]);
        }
    }

    /// Packets that have arrived. Their buffers stay with the driver until the next [`Guest::refill`].
    pub fn take(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        for (head, len) in self.rx.reclaim(&self.memory) {
            let address = RX_BUFFERS + u64::from(head) * u64::from(BUFFER_LEN);
            let mut bytes = vec![0; usize::try_from(len).unwrap()];
            self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            let header = Header::decode(bytes.first_chunk().unwrap());
            assert_eq!(header.len + 44, len);
            packets.push((header, bytes.split_off(HEADER_LEN)));
            self.rx_free.push(head);
        }
        packets
    }

    /// Whether the transmit queue takes another packet.
    pub fn can_send(&mut self) -> bool {
        self.tx.reclaim(&self.memory);
        self.tx.outstanding() < QUEUE_SIZE / 2
    }

    /// Sends bytes as header and payload descriptors, whatever the header says.
    pub fn send_raw(&mut self, header: &Header, payload: &[u8]) {
        assert!(self.can_send());
        let head = self.next_tx * 2;
        self.next_tx = (self.next_tx + 1) % (QUEUE_SIZE / 2);
        let address = TX_BUFFERS + u64::from(head) * TX_BUFFER_LEN;
        self.memory.write_slice(&header.encode(), GuestAddress(address)).unwrap();
        self.memory.write_slice(payload, GuestAddress(address + 44)).unwrap();
        let len = u32::try_from(payload.len()).unwrap();
        let pieces = [(address, 44, false), (address + 44, len, false)];
        let count = if payload.is_empty() { 1 } else { 2 };
        self.tx.offer(&self.memory, head, &pieces[..count]);
    }

    pub fn send(&mut self, header: Header, payload: &[u8]) {
        let len = u32::try_from(payload.len()).unwrap();
        self.send_raw(&Header { len, ..header }, payload);
    }

    /// Asks for a connection and offers 256 KiB of credit.
    pub fn dial(&mut self, guest: u32, host: u32) {
        self.send(packet(guest, host, Op::Request), &[]);
    }
}

/// A packet of the guest with a receive buffer of 256 KiB, from which nothing was read yet.
pub fn packet(guest: u32, host: u32, op: Op) -> Header {
    let space = Space { capacity: 256 * 1024, forwarded: 0 };
    let header = Header::to_guest(Ports { guest, host }, op, 0, 0, space);
    Header {
        source_cid: header.destination_cid,
        destination_cid: header.source_cid,
        source_port: guest,
        destination_port: host,
        ..header
    }
}

pub fn shutdown(guest: u32, host: u32, flags: u32) -> Header {
    Header { flags, ..packet(guest, host, Op::Shutdown) }
}

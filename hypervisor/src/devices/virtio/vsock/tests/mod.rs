//! A mock guest, mock ends, and the tests that put the device between them.

mod device;
mod guest;
mod hostile;
mod interleavings;
mod streams;

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::rc::Rc;

use vm_memory::VolatileSlice;

use super::ends::{Ends, Opened};
use super::mux::{Host, Mux, Rest, Rings};
use super::slots::SlotId;
use guest::Guest;

/// The outside of a pair of mock ends.
#[derive(Default)]
struct Peer {
    /// What the source will deliver.
    source: RefCell<VecDeque<u8>>,
    source_ended: Cell<bool>,
    source_closed: Cell<bool>,
    /// At most so many bytes per read or write, 0 for any number.
    piece: Cell<usize>,
    /// What the sink has got, and how much more it takes.
    sink: RefCell<Vec<u8>>,
    room: Cell<usize>,
    sink_broken: Cell<bool>,
    sink_closed: Cell<bool>,
    reads: Cell<usize>,
}

impl Peer {
    fn new() -> Rc<Self> {
        Rc::new(Self { room: Cell::new(usize::MAX), ..Self::default() })
    }

    fn limit(&self, count: usize) -> usize {
        match self.piece.get() {
            0 => count,
            piece => count.min(piece),
        }
    }

    fn received(&self) -> Vec<u8> {
        self.sink.borrow().clone()
    }
}

struct MockEnds {
    peer: Rc<Peer>,
    source: bool,
    sink: bool,
}

impl Ends for MockEnds {
    fn has_source(&self) -> bool {
        self.source
    }

    fn has_sink(&self) -> bool {
        self.sink
    }

    fn read(&mut self, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
        assert!(self.source && !self.peer.source_closed.get());
        self.peer.reads.set(self.peer.reads.get() + 1);
        let mut source = self.peer.source.borrow_mut();
        if source.is_empty() {
            let ended = self.peer.source_ended.get();
            return if ended { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        }
        let room: usize = into.iter().map(VolatileSlice::len).sum();
        let count = self.peer.limit(room.min(source.len()));
        let bytes: Vec<u8> = source.drain(..count).collect();
        let mut rest = &bytes[..];
        for slice in into {
            let part = slice.len().min(rest.len());
            slice.copy_from(&rest[..part]);
            rest = &rest[part..];
        }
        Ok(count)
    }

    fn write(&mut self, from: &[VolatileSlice<'_>]) -> io::Result<usize> {
        assert!(self.sink && !self.peer.sink_closed.get());
        if self.peer.sink_broken.get() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let mut bytes = Vec::new();
        for slice in from {
            let start = bytes.len();
            bytes.resize(start + slice.len(), 0);
            slice.copy_to(&mut bytes[start..]);
        }
        let count = self.peer.limit(bytes.len()).min(self.peer.room.get());
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.peer.room.set(self.peer.room.get() - count);
        self.peer.sink.borrow_mut().extend(&bytes[..count]);
        Ok(count)
    }

    fn close_source(&mut self) {
        self.peer.source_closed.set(true);
    }

    fn close_sink(&mut self) {
        self.peer.sink_closed.set(true);
    }
}

#[derive(Default)]
struct MockHost {
    expected: HashMap<u32, MockEnds>,
    ids: HashMap<u32, SlotId>,
    closed: Vec<u32>,
    interrupts: usize,
}

impl Host for MockHost {
    type Ends = MockEnds;

    fn dial(&mut self, port: u32, id: SlotId) -> Option<Opened<MockEnds>> {
        let ends = self.expected.remove(&port)?;
        self.ids.insert(port, id);
        Some(Opened { ends, readable: false })
    }

    fn closed(&mut self, port: u32) {
        self.closed.push(port);
    }

    fn interrupt(&mut self) {
        self.interrupts += 1;
    }
}

/// Guest, device and host together.
struct World {
    guest: Guest,
    mux: Mux<MockEnds>,
    host: MockHost,
    outbound: virtio_queue::Queue,
    inbound: virtio_queue::Queue,
}

impl World {
    fn new() -> Self {
        Self::with(Guest::new(true))
    }

    fn with(guest: Guest) -> Self {
        let (outbound, inbound) = (guest.rx.device_side(), guest.tx.device_side());
        Self { guest, mux: Mux::default(), host: MockHost::default(), outbound, inbound }
    }

    /// Registers ends for `port`.
    fn expect(&mut self, port: u32, source: bool, sink: bool) -> Rc<Peer> {
        let peer = Peer::new();
        self.host.expected.insert(port, MockEnds { peer: peer.clone(), source, sink });
        peer
    }

    fn process(&mut self) {
        while self.try_process().unwrap() == Rest::Work {}
    }

    fn try_process(&mut self) -> Result<Rest, super::rings::BrokenRing> {
        let rings =
            Rings { memory: &self.guest.memory, outbound: &mut self.outbound, inbound: &mut self.inbound };
        self.mux.process(rings, &mut self.host)
    }

    /// The event loop reports the ends of `port`.
    fn ready(&mut self, port: u32, readable: bool, writable: bool) {
        if let Some(&id) = self.host.ids.get(&port) {
            self.mux.on_ready(id, readable, writable, &mut self.host);
        }
        self.process();
    }

    /// A stream with both directions, from the guest's port 5000, established.
    fn connected(&mut self, port: u32) -> Rc<Peer> {
        let peer = self.expect(port, true, true);
        self.guest.dial(5000, port);
        self.process();
        let packets = self.guest.take();
        assert_eq!(packets.len(), 1, "{packets:?}");
        assert_eq!(packets[0].0.op, super::packet::Op::Response);
        peer
    }

    fn feed(&mut self, port: u32, peer: &Peer, bytes: &[u8]) {
        peer.source.borrow_mut().extend(bytes);
        self.ready(port, true, false);
    }
}

//! Any order of events, in which no byte may be lost, doubled or moved, and no credit overrun.

use std::rc::Rc;

use proptest::prelude::*;

use super::guest::{Guest, packet, shutdown};
use super::{Peer, World};
use crate::devices::virtio::vsock::packet::{Header, Op, SHUTDOWN_SEND, Space};

const STREAMS: u32 = 3;

#[derive(Debug, Clone)]
enum Step {
    /// The host's program writes, closes, or makes room for reading.
    Write(usize),
    Close,
    Room(usize),
    /// Reads and writes of the ends come in pieces, or whole.
    Pieces(usize),
    /// The guest sends, ends its direction, or reads.
    Send(usize),
    Finish,
    Read(usize),
    /// The guest provides receive buffers and looks at those that were used.
    Refill(usize),
    Collect,
}

fn any_step() -> impl Strategy<Value = (u32, Step)> {
    let step = prop_oneof![
        4 => (1..40_000usize).prop_map(Step::Write),
        1 => Just(Step::Close),
        4 => (1..60_000usize).prop_map(Step::Room),
        1 => (0..5000usize).prop_map(Step::Pieces),
        6 => (1..65_537usize).prop_map(Step::Send),
        1 => Just(Step::Finish),
        4 => (1..50_000usize).prop_map(Step::Read),
        4 => (1..60usize).prop_map(Step::Refill),
        4 => Just(Step::Collect),
    ];
    (0..STREAMS, step)
}

/// The guest's end of one stream, keeping to the rules as Linux does.
struct Socket {
    peer: Rc<Peer>,
    port: u32,
    capacity: u32,
    /// Bytes that arrived, and how many of them were read.
    received: Vec<u8>,
    read: usize,
    announced: u32,
    sent: Vec<u8>,
    host_space: Space,
    finished: bool,
    host_finished: bool,
    reset: bool,
}

impl Socket {
    fn header(&self, op: Op) -> Header {
        let forwarded = u32::try_from(self.read).unwrap();
        Header { space: Space { capacity: self.capacity, forwarded }, ..packet(5000, self.port, op) }
    }

    fn credit(&self) -> usize {
        let in_flight = u32::try_from(self.sent.len()).unwrap() - self.host_space.forwarded;
        usize::try_from(self.host_space.capacity - in_flight).unwrap()
    }

    fn arrived(&mut self, header: &Header, bytes: &[u8]) {
        // A packet of ours that crossed with the reset was answered with another.
        assert!(!self.reset || header.op == Op::Reset);
        self.host_space = header.space;
        match header.op {
            Op::ReadWrite => {
                assert!(!self.host_finished);
                self.received.extend(bytes);
                let waiting = self.received.len() - usize::try_from(self.announced).unwrap();
                assert!(waiting <= usize::try_from(self.capacity).unwrap(), "credit overrun");
            }
            Op::Shutdown => {
                assert_eq!(header.flags, SHUTDOWN_SEND);
                self.host_finished = true;
            }
            Op::Reset => self.reset = true,
            _ => {}
        }
    }
}

/// Bytes that differ from stream to stream and place to place.
fn bytes(port: u32, from: usize, count: usize) -> Vec<u8> {
    let seed = usize::try_from(port).unwrap() * 31;
    (from..from + count).map(|at| u8::try_from((at + seed) * (at / 256 + 1) % 251).unwrap()).collect()
}

struct Scene {
    world: World,
    sockets: Vec<Socket>,
    written: Vec<usize>,
}

impl Scene {
    fn new(capacities: [u32; 3]) -> Self {
        let mut world = World::with(Guest::new(true));
        let sockets = (0u32..).zip(capacities).map(|(port, capacity)| {
            let peer = world.expect(port, true, true);
            peer.room.set(0);
            let socket = Socket {
                peer,
                port,
                capacity,
                received: Vec::new(),
                read: 0,
                announced: 0,
                sent: Vec::new(),
                host_space: Space::default(),
                finished: false,
                host_finished: false,
                reset: false,
            };
            world.guest.send(socket.header(Op::Request), &[]);
            socket
        });
        let sockets = sockets.collect();
        world.process();
        let mut scene = Self { world, sockets, written: vec![0; 3] };
        scene.collect();
        scene
    }

    fn collect(&mut self) {
        for (header, bytes) in self.world.guest.take() {
            self.sockets[usize::try_from(header.source_port).unwrap()].arrived(&header, &bytes);
        }
    }

    fn send(&mut self, at: usize, header: Header, payload: &[u8]) {
        if self.world.guest.can_send() && !self.sockets[at].reset {
            let forwarded = header.space.forwarded;
            self.world.guest.send(header, payload);
            self.sockets[at].announced = forwarded;
            self.sockets[at].sent.extend(payload);
        }
    }

    fn step(&mut self, port: u32, step: &Step) {
        let at = usize::try_from(port).unwrap();
        let socket = &mut self.sockets[at];
        match *step {
            Step::Write(count) if !socket.peer.source_ended.get() => {
                let from = self.written[at];
                socket.peer.source.borrow_mut().extend(bytes(port, from, count));
                self.written[at] += count;
                self.world.ready(port, true, false);
            }
            Step::Write(_) => {}
            Step::Close => {
                socket.peer.source_ended.set(true);
                self.world.ready(port, true, false);
            }
            Step::Room(count) => {
                socket.peer.room.set(socket.peer.room.get() + count);
                self.world.ready(port, false, true);
            }
            Step::Pieces(size) => socket.peer.piece.set(size),
            Step::Send(count) if !socket.finished => {
                let count = count.min(socket.credit()).min(64 * 1024);
                let payload = bytes(port + 100, socket.sent.len(), count);
                let header = socket.header(Op::ReadWrite);
                self.send(at, header, &payload);
            }
            Step::Send(_) => {}
            Step::Finish if !socket.finished => {
                let header = socket.header(Op::Shutdown);
                if self.world.guest.can_send() {
                    socket.finished = true;
                    self.send(at, Header { flags: SHUTDOWN_SEND, ..header }, &[]);
                }
            }
            Step::Finish => {}
            Step::Read(count) => {
                socket.read = (socket.read + count).min(socket.received.len());
                let header = socket.header(Op::CreditUpdate);
                self.send(at, header, &[]);
            }
            Step::Refill(count) => self.world.guest.refill(count),
            Step::Collect => self.collect(),
        }
        self.world.process();
    }

    /// Lets everything that is still on its way arrive, and both sides close.
    fn finish(&mut self) {
        let all: Vec<u32> = (0..STREAMS).collect();
        let ending = [Step::Close, Step::Pieces(0), Step::Room(1 << 30), Step::Finish];
        for _ in 0..5000 {
            if self.sockets.iter().all(|socket| socket.reset) {
                break;
            }
            for &port in &all {
                for step in &ending {
                    if !matches!(step, Step::Room(_)) || self.sockets[0].peer.room.get() < 1 << 40 {
                        self.step(port, step);
                    }
                }
                self.step(port, &Step::Refill(usize::MAX));
                self.step(port, &Step::Collect);
                self.step(port, &Step::Read(usize::MAX >> 1));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn no_byte_is_lost_doubled_or_moved(
        capacities in [500u32..2000, 4000..70_000u32, 262_144..262_145u32],
        steps in prop::collection::vec(any_step(), 1..200),
    ) {
        let mut scene = Scene::new(capacities);
        for (port, step) in &steps {
            scene.step(*port, step);
        }
        scene.finish();
        for (port, socket) in (0..).zip(&scene.sockets) {
            let written = scene.written[usize::try_from(port).unwrap()];
            prop_assert_eq!(socket.received.len(), written);
            prop_assert!(socket.received == bytes(port, 0, written));
            prop_assert!(socket.peer.received() == socket.sent);
            prop_assert!(socket.sent == bytes(port + 100, 0, socket.sent.len()));
            prop_assert!(socket.finished && socket.reset);
            prop_assert!(socket.peer.source_closed.get() && socket.peer.sink_closed.get());
        }
        let mut closed = scene.world.host.closed.clone();
        closed.sort_unstable();
        prop_assert_eq!(closed, [0, 1, 2]);
        prop_assert_eq!(scene.world.mux.traffic().errors, 0);
    }

    /// The guest may also vanish at any point: what it sent before arrives all the same.
    #[test]
    fn a_guest_that_vanishes_leaves_what_it_sent(
        steps in prop::collection::vec(any_step(), 1..100),
        close: bool,
    ) {
        let mut scene = Scene::new([500, 40_000, 262_144]);
        for (port, step) in &steps {
            scene.step(*port, step);
        }
        for port in 0..STREAMS {
            while !scene.world.guest.can_send() {
                scene.world.guest.refill(usize::MAX);
                scene.world.process();
                scene.world.guest.take();
            }
            let last = if close { shutdown(5000, port, 3) } else { packet(5000, port, Op::Reset) };
            let header = Header { flags: last.flags, ..scene.sockets[usize::try_from(port).unwrap()].header(last.op) };
            scene.world.guest.send(header, &[]);
            scene.world.process();
            let peer = scene.sockets[usize::try_from(port).unwrap()].peer.clone();
            peer.room.set(usize::MAX);
            peer.piece.set(0);
            scene.world.ready(port, true, true);
        }
        for socket in &scene.sockets {
            prop_assert!(socket.peer.received() == socket.sent);
            prop_assert!(socket.peer.source_closed.get() && socket.peer.sink_closed.get());
        }
        prop_assert_eq!(scene.world.host.closed.len(), 3);
    }
}

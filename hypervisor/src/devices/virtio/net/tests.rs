//! Frames through a device whose tap is a socket that keeps the bounds of packets.

use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use nix::sys::epoll::EpollTimeout;
use proptest::prelude::*;
use virtio_queue::Queue;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress};

mod queues;

use super::*;
use crate::devices::virtio::{Doorbells, SharedDevice};
use crate::event_loop::EventLoop;
use crate::memory::GuestRam;
use header::HEADER;

const RAM: u64 = 8 << 20;
/// From one queue's rings to the next one's.
const RINGS: u64 = 0x1_0000;
const RX_RING: u64 = 0;
const TX_RING: u64 = RINGS;
const USED_RING: u64 = 0x8000;
const DATA: u64 = 0x10_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

struct Bench {
    memory: GuestRam,
    net: Arc<Mutex<Net>>,
    doorbells: Arc<Doorbells>,
    event_loop: EventLoop,
    host: UnixDatagram,
    /// The other queues of the tap.
    others: Vec<UnixDatagram>,
    interrupt: Interrupt,
}

/// A descriptor: address, length, flags.
type Piece = (u64, u32, u16);

impl Bench {
    /// A running device of one pair with the chains given.
    fn new(features: u64, receive: &[&[Piece]], send: &[&[Piece]]) -> Self {
        Self::of(1, Limits::NONE, features, &[receive, send])
    }

    /// A running device with the chains given for each of its queues that are needed.
    fn of(pairs: u8, limits: Limits, features: u64, chains: &[&[&[Piece]]]) -> Self {
        let memory = GuestRam::new(RAM).unwrap();
        let event_loop = EventLoop::new().unwrap();
        let net = Arc::new(Mutex::new(Net::new(3, pairs, limits)));
        let shared = SharedDevice::new(net.clone());
        let doorbells = shared.doorbells(&event_loop).unwrap();
        let interrupt = Interrupt::new().unwrap();
        let queue = |(base, chains): (u64, &&[&[Piece]])| {
            let mock = MockSplitQueue::create(&*memory, GuestAddress(base), 128);
            let chains: Vec<RawDescriptor> = descriptors(chains);
            if !chains.is_empty() {
                mock.add_desc_chains(&chains, 0).unwrap();
            }
            let mut queue: Queue = mock.create_queue().unwrap();
            // The mock's own place for it lies in the available ring.
            queue.try_set_used_ring_address(GuestAddress(base + USED_RING)).unwrap();
            queue
        };
        let activation = Activation {
            memory: memory.clone(),
            queues: (0..).step_by(usize::try_from(RINGS).unwrap()).zip(chains).map(queue).collect(),
            features,
            interrupt: interrupt.clone(),
            registrar: shared.registrar(&event_loop),
        };
        let (mut hosts, taps): (Vec<_>, Vec<_>) = (0..pairs).map(|_| played()).unzip();
        lock(&net).activate(activation).unwrap();
        shared.set_active(true);
        lock(&net).connect(taps).unwrap();
        let host = hosts.remove(0);
        Self { memory, net, doorbells, event_loop, host, others: hosts, interrupt }
    }

    fn ring(&self, queue: usize) {
        self.doorbells.events()[queue].write(1).unwrap();
        self.settle();
    }

    fn settle(&self) {
        while self.event_loop.turn(EpollTimeout::ZERO).unwrap() > 0 {}
    }

    /// Writes a frame with its header where the guest's first send chain is.
    fn frame(&self, header: [u8; HEADER], bytes: usize) {
        self.memory.write_slice(&header, GuestAddress(DATA)).unwrap();
        let frame: Vec<u8> = (0..bytes).map(pattern).collect();
        self.memory.write_slice(&frame, GuestAddress(DATA + 12)).unwrap();
    }

    /// What the host's end gets, if anything.
    fn sent(&self) -> Option<Vec<u8>> {
        received(&self.host)
    }

    /// Head and length of each used chain of the receive queue.
    fn used(&self) -> Vec<(u32, u32)> {
        self.used_of(0)
    }

    /// Head and length of each used chain of a queue.
    fn used_of(&self, queue: u64) -> Vec<(u32, u32)> {
        let ring = queue * RINGS + USED_RING;
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let element = |place| self.memory.read_obj::<[u32; 2]>(GuestAddress(ring + 4 + 8 * place)).unwrap();
        (0..u64::from(index)).map(element).map(|[head, bytes]| (head, bytes)).collect()
    }

    fn statistics(&self) -> DeviceStatistics {
        lock(&self.net).statistics()
    }
}

use crate::sync::lock;

/// A queue of a tap that a socket stands in for, and the host's end of it.
fn played() -> (UnixDatagram, Tap) {
    let (host, tap) = UnixDatagram::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    (host, Tap::played(tap))
}

fn received(host: &UnixDatagram) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 70_000];
    let count = host.recv(&mut buffer).ok()?;
    buffer.truncate(count);
    Some(buffer)
}

fn pattern(index: usize) -> u8 {
    u8::try_from(index % 251).unwrap()
}

fn descriptors(chains: &[&[Piece]]) -> Vec<RawDescriptor> {
    let mut index = 0;
    let mut all = Vec::new();
    for chain in chains {
        for (place, &(address, len, flags)) in chain.iter().enumerate() {
            index += 1;
            let linked = if place + 1 < chain.len() { NEXT } else { 0 };
            all.push(Descriptor::new(address, len, flags | linked, index).into());
        }
    }
    all
}

const PLAIN: [u8; HEADER] = [0; HEADER];

#[test]
fn a_slot_shows_its_name_and_its_link() {
    let mut net = Net::new(3, 1, Limits::NONE);
    let config = |net: &Net| {
        let mut data = [0xee; 12];
        net.read_config(0, &mut data);
        data
    };
    assert_eq!(config(&net), [2, b'v', b'm', b's', b'h', 3, 0, 0, 0, 0, 0, 0]);
    let (_host, tap) = played();
    net.connect(vec![tap]).unwrap();
    assert_eq!(config(&net)[6..8], [1, 0]);
    for offset in [8, 4096, u32::MAX] {
        let mut data = [0xee; 4];
        net.read_config(offset, &mut data);
        assert_eq!(data, [0; 4]);
    }
    assert!(!net.attach(vec![tempfile::tempfile().unwrap().into()]).unwrap());
}

#[test]
fn attaching_announces_the_link() {
    let bench = Bench::new(FEATURES, &[], &[]);
    assert_eq!(bench.interrupt.status(), 2);
}

#[test]
fn a_frame_of_many_pieces_is_sent_as_one_packet() {
    let pieces = [(DATA, 5, 0), (DATA + 5, 30, 0), (DATA + 35, 0, 0), (DATA + 35, 77, 0)];
    let bench = Bench::new(FEATURES, &[], &[&pieces]);
    bench.frame(PLAIN, 100);
    bench.ring(1);
    let expected: Vec<u8> = PLAIN.into_iter().chain((0..100).map(pattern)).collect();
    assert_eq!(bench.sent().unwrap(), expected);
    let statistics = bench.statistics();
    assert_eq!((statistics.requests, statistics.written_bytes, statistics.errors), (1, 100, 0));
}

#[test]
fn malformed_frames_are_dropped_and_the_next_one_passes() {
    let long: Vec<Piece> = (0..120).map(|_| (DATA, 600, 0)).collect();
    let good = [(DATA, 72, 0)];
    let bad: [&[Piece]; 6] = [
        &[(DATA, 11, 0)],
        &[(DATA, 25, 0)],
        &[(DATA, 72, WRITE)],
        &[(RAM - 30, 60, 0)],
        &[(u64::MAX - 5, 60, 0)],
        &[(DATA, 72, 0), (RAM, 1, 0)],
    ];
    for chain in bad.into_iter().chain([&long[..]]) {
        let bench = Bench::new(FEATURES, &[], &[chain, &good[..]]);
        bench.frame(PLAIN, 60);
        bench.ring(1);
        assert_eq!(bench.sent().unwrap().len(), 72);
        assert_eq!((bench.sent(), bench.statistics().errors), (None, 1), "{chain:?}");
    }
}

#[test]
fn a_header_that_was_not_negotiated_is_not_passed_on() {
    let bench = Bench::new(FEATURES & !feature::CSUM, &[], &[&[(DATA, 72, 0)]]);
    bench.frame([1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], 60);
    bench.ring(1);
    assert_eq!(bench.sent(), None);
    assert_eq!(bench.statistics().errors, 1);
}

#[test]
fn a_frame_fills_as_many_buffers_as_it_needs() {
    let buffers: Vec<[Piece; 1]> = (0..100).map(|at| [(DATA + at * 2048, 1000, WRITE)]).collect();
    let chains: Vec<&[Piece]> = buffers.iter().map(|chain| &chain[..]).collect();
    let bench = Bench::new(FEATURES, &chains, &[]);
    let frames: [usize; 3] = [60, 2990, 988];
    for bytes in frames {
        let frame: Vec<u8> = PLAIN.into_iter().chain((0..bytes).map(pattern)).collect();
        bench.host.send(&frame).unwrap();
    }
    bench.settle();
    assert_eq!(bench.used(), [(0, 72), (1, 1000), (2, 1000), (3, 1000), (4, 2), (5, 1000)]);
    for (first, number) in [(0, 1u16), (1, 4), (5, 1)] {
        let at = GuestAddress(DATA + first * 2048 + 10);
        assert_eq!(bench.memory.read_obj::<u16>(at).unwrap(), number);
    }
    let mut received = vec![0; 1000];
    bench.memory.read_slice(&mut received, GuestAddress(DATA + 2 * 2048)).unwrap();
    assert!((988..1988).map(pattern).eq(received));
    assert_eq!(bench.interrupt.status() & 1, 1);
    assert_eq!(bench.statistics().read_bytes, 60 + 2990 + 988);
}

#[test]
fn frames_wait_for_buffers() {
    let bench = Bench::new(FEATURES & !feature::MRG_RXBUF, &[], &[]);
    bench.host.send(&[7; 72]).unwrap();
    bench.settle();
    assert!(bench.used().is_empty());
    let mock = MockSplitQueue::create(&*bench.memory, GuestAddress(RX_RING), 128);
    mock.add_desc_chains(&descriptors(&[&[(DATA, 2000, WRITE)]]), 0).unwrap();
    bench.ring(0);
    assert_eq!(bench.used(), [(0, 72)]);
}

/// Otherwise a driver with a short ring would wait for frames, and the device for buffers.
#[test]
fn a_ring_that_is_held_whole_is_enough() {
    let buffers: Vec<[Piece; 1]> = (0..128).map(|at| [(DATA + at * 2048, 100, WRITE)]).collect();
    let chains: Vec<&[Piece]> = buffers.iter().map(|chain| &chain[..]).collect();
    let bench = Bench::new(FEATURES, &chains, &[]);
    bench.host.send(&[7; 72]).unwrap();
    bench.settle();
    assert_eq!(bench.used(), [(0, 72)]);
}

#[test]
fn buffers_that_are_none_come_back_empty() {
    let bad: [&[Piece]; 4] = [
        &[(DATA, 2000, 0)],
        &[(DATA, 11, WRITE), (DATA, 2000, WRITE)],
        &[(RAM, 2000, WRITE)],
        &[(DATA, 2000, WRITE), (u64::MAX - 9, 2000, WRITE)],
    ];
    for chain in bad {
        let bench = Bench::new(FEATURES & !feature::MRG_RXBUF, &[chain, &[(DATA, 2000, WRITE)]], &[]);
        bench.host.send(&[7; 72]).unwrap();
        bench.settle();
        let used = bench.used();
        assert_eq!((used.len(), used[0], used[1].1), (2, (0, 0), 72), "{chain:?}");
        assert_eq!(bench.statistics().errors, 1);
    }
}

/// Otherwise the driver could keep the statistics, and so the shim, waiting.
#[test]
fn a_ring_full_of_nonsense_is_given_back_in_turns() {
    let bad = [(DATA, 2000, 0)];
    let chains: Vec<&[Piece]> = vec![&bad[..]; 127];
    let good = [(DATA, 2000, WRITE)];
    let chains = [chains, vec![&good[..]]].concat();
    let bench = Bench::new(FEATURES & !feature::MRG_RXBUF, &chains, &[]);
    bench.event_loop.turn(EpollTimeout::ZERO).unwrap();
    assert_eq!(bench.used().len(), 64);
    bench.host.send(&[7; 72]).unwrap();
    bench.settle();
    let used = bench.used();
    assert_eq!((used.len(), used.last()), (128, Some(&(127, 72))));
}

#[test]
fn a_reset_lets_go_of_memory_and_tap() {
    let bench = Bench::new(FEATURES, &[&[(DATA, 2000, WRITE)]], &[]);
    lock(&bench.net).reset();
    bench.host.send(&[7; 72]).unwrap();
    assert_eq!(bench.event_loop.turn(EpollTimeout::ZERO).unwrap(), 0);
    assert!(bench.used().is_empty());
}

#[test]
fn broken_rings_stop_the_device_and_no_more() {
    for queue in [0, 1] {
        let bench = Bench::new(FEATURES, &[], &[]);
        let base = if queue == 0 { RX_RING } else { TX_RING };
        let mock = MockSplitQueue::create(&*bench.memory, GuestAddress(base), 128);
        mock.avail().idx().store(u16::to_le(60_000));
        bench.host.send(&[7; 72]).unwrap();
        bench.ring(queue);
        assert!(bench.interrupt.needs_reset());
        bench.ring(queue);
    }
}

proptest! {
    #[test]
    fn any_chains_leave_the_device_alive(
        receive in prop::collection::vec((0u64..RAM + 4096, 0u32..70_000, 0u16..8), 1..20),
        send in prop::collection::vec((0u64..RAM + 4096, 0u32..70_000, 0u16..8), 1..20),
        header: [u8; HEADER],
        features in 0..=FEATURES,
    ) {
        // Away from the rings, which others break.
        let away = |(address, len, flags): Piece| (address.max(DATA), len, flags);
        let receive: Vec<_> = receive.into_iter().map(away).collect();
        let send: Vec<_> = send.into_iter().map(away).collect();
        let bench = Bench::new(features & FEATURES & !RING_INDIRECT_DESC, &[&receive], &[&send]);
        bench.frame(header, 200);
        bench.host.send(&[7; 3000]).unwrap();
        bench.ring(1);
        bench.ring(0);
        if let Some(sent) = bench.sent() {
            prop_assert!((HEADER + 14..=HEADER + MAX_FRAME).contains(&sent.len()));
        }
    }
}

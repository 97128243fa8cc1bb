//! Guests that break the rules. Tests are named after the bugs of others that they would find here.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::World;
use super::guest::{Guest, MEMORY, QUEUE_SIZE, packet, shutdown};
use crate::devices::virtio::vsock::packet::{Header, Op, SHUTDOWN_SEND};

const END: u64 = 32 << 20;

fn ops(world: &mut World) -> Vec<Op> {
    world.guest.take().iter().map(|(header, _)| header.op).collect()
}

/// Puts `header` where no helper writes.
fn write_header(world: &World, at: u64, header: &Header) {
    world.guest.memory.write_slice(&header.encode(), GuestAddress(at)).unwrap();
}

fn data(len: u32) -> Header {
    Header { len, ..packet(5000, 7, Op::ReadWrite) }
}

#[test]
fn cve_2019_18960_payload_descriptor_at_and_over_the_end_of_memory() {
    assert_eq!(u64::try_from(MEMORY).unwrap(), END);
    let mut world = World::new();
    let peer = world.connected(7);
    write_header(&world, 0x5000, &data(100));
    world.guest.memory.write_slice(&[b'x'; 100], GuestAddress(END - 100)).unwrap();
    world.guest.tx.offer(&world.guest.memory, 0, &[(0x5000, 44, false), (END - 100, 100, false)]);
    world.process();
    assert_eq!(peer.received(), [b'x'; 100]);
    // One byte over the end: not even the part inside is taken.
    world.guest.tx.offer(&world.guest.memory, 2, &[(0x5000, 44, false), (END - 99, 100, false)]);
    world.process();
    assert_eq!(peer.received().len(), 100);
    assert_eq!(ops(&mut world), [Op::Reset]);
}

#[test]
fn cve_2019_18960_header_descriptor_at_and_over_the_end_of_memory() {
    let mut world = World::new();
    world.connected(7);
    write_header(&world, END - 44, &packet(5000, 7, Op::CreditRequest));
    world.guest.tx.offer(&world.guest.memory, 0, &[(END - 44, 44, false)]);
    world.process();
    assert_eq!(ops(&mut world), [Op::CreditUpdate]);
    world.guest.tx.offer(&world.guest.memory, 1, &[(END - 43, 44, false)]);
    world.guest.tx.offer(&world.guest.memory, 2, &[(END, 44, false)]);
    world.guest.tx.offer(&world.guest.memory, 3, &[(u64::MAX - 10, 44, false)]);
    let errors = world.mux.traffic().errors;
    world.process();
    assert_eq!(world.mux.traffic().errors, errors + 3);
    assert_eq!(world.guest.tx.reclaim(&world.guest.memory).len(), 5);
}

#[test]
fn cve_2019_18960_receive_buffer_at_and_over_the_end_of_memory() {
    let mut world = World::with(Guest::new(false));
    let peer = world.expect(7, true, true);
    world.guest.rx.offer(&world.guest.memory, 0, &[(END - 43, 44, true)]);
    world.guest.rx.offer(&world.guest.memory, 1, &[(END - 100, 101, true)]);
    world.guest.rx.offer(&world.guest.memory, 2, &[(END - 144, 144, true)]);
    world.guest.rx.offer(&world.guest.memory, 3, &[(END - 144, 144, true)]);
    world.guest.dial(5000, 7);
    world.process();
    world.feed(7, &peer, &[b'y'; 200]);
    let returned = world.guest.rx.reclaim(&world.guest.memory);
    assert_eq!(returned, [(0, 0), (1, 0), (2, 44), (3, 144)]);
    let last: u8 = world.guest.memory.read_obj(GuestAddress(END - 1)).unwrap();
    assert_eq!(last, b'y');
    assert_eq!(world.mux.traffic().errors, 2);
}

#[test]
fn cve_2019_18960_descriptor_across_adjacent_regions() {
    let half = MEMORY / 2;
    let ranges = [(GuestAddress(0), half), (GuestAddress(END / 2), half)];
    let mut guest = Guest::new(false);
    guest.memory = crate::memory::at(&ranges);
    guest.refill(100);
    let mut world = World::with(guest);
    let peer = world.connected(7);
    write_header(&world, 0x5000, &data(100));
    world.guest.tx.offer(&world.guest.memory, 0, &[(0x5000, 44, false), (END / 2 - 50, 100, false)]);
    world.process();
    assert!(peer.received().is_empty());
    assert_eq!(ops(&mut world), [Op::Reset]);
    // Two descriptors may say the same.
    let peer = world.connected(8);
    write_header(&world, 0x5000, &Header { destination_port: 8, ..data(100) });
    let pieces = [(0x5000, 44, false), (END / 2 - 50, 50, false), (END / 2, 50, false)];
    world.guest.tx.offer(&world.guest.memory, 4, &pieces);
    world.process();
    assert_eq!(peer.received().len(), 100);
}

#[test]
fn cve_2016_6490_chain_that_loops_or_has_empty_descriptors() {
    let mut world = World::new();
    world.connected(7);
    let queue = &mut world.guest.tx;
    // A descriptor without bytes that is its own successor.
    queue.descriptor(&world.guest.memory, 9, (0x5000, 0), 1, 9);
    queue.publish(&world.guest.memory, 9);
    queue.descriptor(&world.guest.memory, 10, (0x5000, 1), 1, 11);
    queue.descriptor(&world.guest.memory, 11, (0x5000, 0), 1, 10);
    queue.publish(&world.guest.memory, 10);
    // A successor that does not exist in the table.
    queue.descriptor(&world.guest.memory, 12, (0x5000, 44), 1, QUEUE_SIZE);
    queue.publish(&world.guest.memory, 12);
    world.process();
    assert_eq!(world.guest.tx.reclaim(&world.guest.memory).len(), 4);
    // The first has no header that could be answered; the others have one of zeros, from nobody we know.
    assert_eq!(ops(&mut world), [Op::Reset, Op::Reset]);
    assert_eq!(world.mux.traffic().errors, 3);
    assert!(world.host.closed.is_empty());
}

#[test]
fn a_head_outside_the_table_stops_the_device_without_a_panic() {
    let mut world = World::new();
    world.guest.tx.publish(&world.guest.memory, QUEUE_SIZE);
    assert!(world.try_process().is_err());
}

#[test]
fn an_index_that_jumps_stops_the_device() {
    let mut world = World::new();
    world.guest.tx.set_available(&world.guest.memory, QUEUE_SIZE + 1);
    assert!(world.try_process().is_err());
    let mut world = World::with(Guest::new(false));
    world.guest.rx.set_available(&world.guest.memory, 0x8000);
    world.guest.dial(1, 1);
    assert!(world.try_process().is_err());
}

#[test]
fn payload_that_is_not_what_the_header_says() {
    for (len, sent) in [(101, 100), (64 * 1024 + 1, 64 * 1024 + 1), (u32::MAX, 1), (1, 0)] {
        let mut world = World::new();
        let peer = world.connected(7);
        world.guest.send_raw(&data(len), &vec![0; sent]);
        world.process();
        assert_eq!(ops(&mut world), [Op::Reset], "{len} {sent}");
        assert!(peer.received().is_empty());
        assert_eq!(world.host.closed, [7]);
    }
    // More than it says is no harm: the rest is padding.
    let mut world = World::new();
    let peer = world.connected(7);
    world.guest.send_raw(&data(2), b"abc");
    world.process();
    assert_eq!(peer.received(), b"ab");
}

#[test]
fn payload_on_a_packet_that_has_none() {
    let mut world = World::new();
    world.connected(7);
    world.guest.send(packet(5000, 7, Op::CreditUpdate), b"x");
    world.process();
    assert_eq!(ops(&mut world), [Op::Reset]);
}

#[test]
fn descriptors_of_the_wrong_direction() {
    let mut world = World::new();
    let peer = world.connected(7);
    write_header(&world, 0x5000, &data(4));
    world.guest.tx.offer(&world.guest.memory, 0, &[(0x5000, 44, false), (0x6000, 4, true)]);
    world.guest.tx.offer(&world.guest.memory, 2, &[(0x5000, 44, true)]);
    world.process();
    assert_eq!(ops(&mut world), [Op::Reset]);
    assert!(peer.received().is_empty());
    let mut world = World::with(Guest::new(false));
    world.guest.rx.offer(&world.guest.memory, 0, &[(0x5000, 4096, false)]);
    world.guest.dial(5000, 7);
    world.process();
    assert_eq!(world.guest.rx.reclaim(&world.guest.memory), [(0, 0)]);
}

#[test]
fn packets_cut_in_strange_ways_are_packets() {
    let mut world = World::with(Guest::new(false));
    let peer = world.expect(7, true, true);
    let memory = &world.guest.memory;
    world.guest.rx.offer(memory, 0, &[(0x5000, 44, true)]);
    world.guest.rx.offer(memory, 4, &[(0x6000, 40, true), (0x6100, 10, true), (0x6200, 3, true)]);
    world.guest.rx.offer(memory, 8, &[(0x7000, 44, true), (0x7100, 200, true)]);
    world.guest.dial(5000, 7);
    world.process();
    assert_eq!(world.guest.rx.reclaim(&world.guest.memory), [(0, 44)]);
    world.feed(7, &peer, b"0123456789abc");
    assert_eq!(world.guest.rx.reclaim(&world.guest.memory), [(4, 53), (8, 48)]);
    let mut bytes = [0; 6];
    world.guest.memory.read_slice(&mut bytes, GuestAddress(0x6104)).unwrap();
    assert_eq!(&bytes, b"012345");

    write_header(&world, 0x5000, &data(5));
    world.guest.memory.write_slice(b"hello", GuestAddress(0x5000 + 44)).unwrap();
    let whole = [(0x5000, 49, false)];
    let cut = [(0x5000, 1, false), (0x5001, 0, false), (0x5001, 44, false), (0x502d, 4, false)];
    world.guest.tx.offer(&world.guest.memory, 20, &whole);
    world.guest.tx.offer(&world.guest.memory, 30, &cut);
    world.process();
    assert_eq!(peer.received(), b"hellohello");
}

#[test]
fn a_receive_buffer_without_room_for_payload_is_returned() {
    let mut world = World::with(Guest::new(false));
    let peer = world.expect(7, true, true);
    let memory = &world.guest.memory;
    world.guest.rx.offer(memory, 0, &[(0x5000, 44, true)]);
    world.guest.rx.offer(memory, 1, &[(0x5000, 44, true)]);
    world.guest.rx.offer(memory, 2, &[(0x5000, 45, true)]);
    world.guest.dial(5000, 7);
    world.process();
    world.feed(7, &peer, b"ab");
    assert_eq!(world.guest.rx.reclaim(&world.guest.memory), [(0, 44), (1, 0), (2, 45)]);
}

#[test]
fn nothing_is_read_into_a_malformed_receive_buffer() {
    let mut world = World::with(Guest::new(false));
    let peer = world.expect(7, true, true);
    let memory = &world.guest.memory;
    for head in [0, 2, 6] {
        world.guest.rx.offer(memory, head, &[(0x5000, 44, true), (0x6000, 10, true)]);
    }
    // Its payload starts well, and then is not ours to write.
    world.guest.rx.offer(memory, 10, &[(0x5000, 44, true), (0x7000, 10, true), (0x8000, 10, false)]);
    world.guest.rx.offer(memory, 20, &[(0x5000, 44, true), (0x9000, 100, true)]);
    world.guest.dial(5000, 7);
    world.process();
    world.feed(7, &peer, b"0123456789abcdefghijklmnopqrst");
    let returned = world.guest.rx.reclaim(&world.guest.memory);
    assert_eq!(returned, [(0, 44), (2, 54), (6, 54), (10, 0), (20, 54)]);
    let mut bytes = [0; 10];
    world.guest.memory.read_slice(&mut bytes, GuestAddress(0x7000)).unwrap();
    assert_eq!(bytes, [0; 10]);
    world.guest.memory.read_slice(&mut bytes, GuestAddress(0x9000)).unwrap();
    assert_eq!(&bytes, b"klmnopqrst");
}

#[test]
fn addresses_and_types_that_are_not_ours() {
    let mut world = World::new();
    let good = packet(5000, 7, Op::Request);
    let bad = [
        Header { source_cid: 4, ..good },
        Header { source_cid: 3 | 1 << 40, ..good },
        Header { destination_cid: 1, ..good },
        Header { destination_cid: u64::MAX, ..good },
        Header { socket_type: 2, ..good },
        Header { socket_type: 0, ..good },
    ];
    for header in bad {
        world.expect(7, true, true);
        world.guest.send(header, &[]);
        world.process();
        let packets = world.guest.take();
        assert_eq!(packets.len(), 1);
        assert_eq!(packets[0].0, header.reset_in_answer().unwrap());
    }
    assert_eq!(world.mux.traffic().errors, 6);
}

#[test]
fn packets_out_of_turn_reset_the_connection() {
    for op in [Op::Request, Op::Response, Op::Unknown(0), Op::Unknown(8), Op::Unknown(u16::MAX)] {
        let mut world = World::new();
        world.connected(7);
        world.guest.send(packet(5000, 7, op), &[]);
        world.process();
        assert_eq!(ops(&mut world), [Op::Reset], "{op:?}");
        assert_eq!(world.host.closed, [7]);
    }
    let mut world = World::new();
    let peer = world.connected(7);
    world.guest.send(shutdown(5000, 7, SHUTDOWN_SEND), &[]);
    world.guest.send(packet(5000, 7, Op::ReadWrite), b"after the end");
    world.process();
    assert_eq!(ops(&mut world), [Op::Reset]);
    assert!(peer.received().is_empty());
}

#[test]
fn strays_are_answered_and_resets_are_not() {
    let mut world = World::new();
    world.guest.send(packet(1, 2, Op::ReadWrite), b"stray");
    world.guest.send(packet(1, 2, Op::Reset), &[]);
    world.guest.send(Header { socket_type: 9, ..packet(1, 2, Op::Reset) }, &[]);
    world.process();
    assert_eq!(ops(&mut world), [Op::Reset]);
}

#[test]
fn more_than_the_credit_resets_the_connection() {
    let mut world = World::new();
    let peer = world.connected(7);
    peer.room.set(0);
    for _ in 0..4 {
        world.guest.send(packet(5000, 7, Op::ReadWrite), &[1; 64 * 1024]);
    }
    world.process();
    assert!(world.guest.take().is_empty());
    world.guest.send(packet(5000, 7, Op::ReadWrite), &[2]);
    world.process();
    assert_eq!(ops(&mut world), [Op::Reset]);
    // What was sent within the credit still arrives.
    peer.room.set(usize::MAX);
    world.ready(7, false, true);
    assert_eq!(peer.received().len(), 256 * 1024);
    assert_eq!(world.host.closed, [7]);
}

#[test]
fn a_flood_without_buffers_for_the_answers_waits_in_its_own_queue() {
    let mut world = World::with(Guest::new(false));
    let mut sent = 0;
    while world.guest.can_send() {
        world.guest.dial(1, sent);
        world.process();
        sent += 1;
        assert!(sent < 1000);
    }
    assert!((256..=256 + u32::from(QUEUE_SIZE)).contains(&sent), "{sent}");
    let mut answered = 0;
    while answered < sent {
        world.guest.refill(usize::MAX);
        world.process();
        let packets = world.guest.take();
        assert!(packets.iter().all(|(header, _)| header.op == Op::Reset));
        assert!(!packets.is_empty());
        answered += u32::try_from(packets.len()).unwrap();
    }
    assert!(world.guest.can_send());
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        Just(Op::Request),
        Just(Op::Response),
        Just(Op::Reset),
        Just(Op::Shutdown),
        Just(Op::ReadWrite),
        Just(Op::CreditUpdate),
        Just(Op::CreditRequest),
        any::<u16>().prop_map(Op::Unknown),
    ]
}

type Area = (u64, u32, u16, u16);

/// Addresses and lengths around every limit there is.
fn any_descriptor() -> impl Strategy<Value = Area> {
    let address = prop_oneof![Just(0x5000), END - 100..END + 100, any::<u64>(), 0..END];
    let len = prop_oneof![0..100u32, Just(44), 0x1_0000..0x1_0100u32, any::<u32>()];
    (address, len, 0..4u16, 0..QUEUE_SIZE + 2)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn any_descriptors_are_survived_and_returned(
        table in prop::collection::vec(any_descriptor(), 16),
        heads in prop::collection::vec((any::<bool>(), 0..16u16), 1..60),
        header: [u8; 44],
    ) {
        let mut world = World::with(Guest::new(false));
        let peer = world.expect(7, true, true);
        peer.source.borrow_mut().extend(vec![0; 300_000]);
        write_header(&world, 0x5000, &data(u32::from(header[0])));
        world.guest.memory.write_slice(&header, GuestAddress(0x5000 + 44)).unwrap();
        for (at, &(address, len, flags, next)) in (0u16..).zip(&table) {
            world.guest.tx.descriptor(&world.guest.memory, at, (address, len), flags, next);
            world.guest.rx.descriptor(&world.guest.memory, at, (address, len), flags, next);
        }
        world.guest.tx.offer(&world.guest.memory, 100, &[(0x4000, 44, false)]);
        write_header(&world, 0x4000, &packet(5000, 7, Op::Request));
        let mut sent = 1;
        for (transmit, head) in heads {
            if transmit {
                world.guest.tx.publish(&world.guest.memory, head);
                sent += 1;
            } else {
                world.guest.rx.publish(&world.guest.memory, head);
            }
            if let Some(&id) = world.host.ids.get(&7) {
                world.mux.on_ready(id, true, true, &mut world.host);
            }
            // A receive buffer may lie over a ring, which then breaks.
            if world.try_process().is_err() {
                return Ok(());
            }
        }
        prop_assert_eq!(world.guest.tx.reclaim(&world.guest.memory).len(), sent);
    }

    #[test]
    fn any_headers_are_survived(
        packets in prop::collection::vec(
            (any_op(), 0..3u32, 5..9u32, any::<u32>(), 0..5u32, any::<u32>(), any::<u32>()), 1..80),
    ) {
        let mut world = World::new();
        for port in 5..9 {
            world.expect(port, port & 1 != 0, port & 2 != 0);
        }
        for (op, guest, host, len, flags, capacity, forwarded) in packets {
            let header = packet(guest, host, op);
            let mut header = Header { flags, ..header };
            header.space.capacity = capacity;
            header.space.forwarded = forwarded;
            let len = if len % 3 == 0 { len } else { len % 200 };
            world.guest.send_raw(&Header { len, ..header }, &[0; 150]);
            world.process();
            world.guest.take();
            world.guest.refill(usize::MAX);
        }
        world.mux.clear(&mut world.host);
        let ids = world.host.ids.len();
        prop_assert_eq!(world.host.closed.len(), ids);
    }
}

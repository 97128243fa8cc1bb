//! How streams begin, flow and end.

use std::time::{Duration, Instant};

use super::guest::{Guest, packet, shutdown};
use super::{MockEnds, Peer, World};
use crate::devices::virtio::vsock::ends::Opened;
use crate::devices::virtio::vsock::mux::REQUEST_TIMEOUT;
use crate::devices::virtio::vsock::packet::{
    Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, Space,
};
use crate::devices::virtio::vsock::slots::MAX_SLOTS;

fn ops(packets: &[(Header, Vec<u8>)]) -> Vec<Op> {
    packets.iter().map(|(header, _)| header.op).collect()
}

fn payload(packets: &[(Header, Vec<u8>)]) -> Vec<u8> {
    packets.iter().flat_map(|(_, bytes)| bytes.clone()).collect()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect()
}

#[test]
fn an_expected_port_is_answered_once() {
    let mut world = World::new();
    world.connected(7);
    world.guest.dial(5001, 7);
    world.guest.dial(5002, 8);
    world.process();
    let packets = world.guest.take();
    assert_eq!(ops(&packets), [Op::Reset, Op::Reset]);
    assert_eq!(packets[0].0.destination_port, 5001);
    assert_eq!(packets[1].0.source_port, 8);
    assert!(world.host.interrupts > 0);
}

#[test]
fn bytes_go_both_ways() {
    let mut world = World::new();
    let peer = world.connected(7);
    world.guest.send(packet(5000, 7, Op::ReadWrite), b"from the guest");
    let long = pattern(100_000);
    world.feed(7, &peer, &long);
    assert_eq!(peer.received(), b"from the guest");
    let packets = world.guest.take();
    assert_eq!(payload(&packets), long);
    assert_eq!(packets.len(), 100_000usize.div_ceil(4096 - 44));
}

#[test]
fn half_close_by_the_host_then_the_guest() {
    let mut world = World::new();
    let peer = world.connected(7);
    peer.source_ended.set(true);
    world.feed(7, &peer, b"last words");
    let packets = world.guest.take();
    assert_eq!(ops(&packets), [Op::ReadWrite, Op::Shutdown]);
    assert_eq!(packets[1].0.flags, SHUTDOWN_SEND);
    world.guest.send(packet(5000, 7, Op::ReadWrite), b"answer");
    world.guest.send(shutdown(5000, 7, SHUTDOWN_SEND), &[]);
    world.process();
    assert_eq!(peer.received(), b"answer");
    assert!(peer.sink_closed.get());
    assert_eq!(ops(&world.guest.take()), [Op::Reset]);
    assert_eq!(world.host.closed, [7]);
}

#[test]
fn half_close_by_the_guest_then_the_host() {
    let mut world = World::new();
    let peer = world.connected(7);
    peer.room.set(3);
    world.guest.send(packet(5000, 7, Op::ReadWrite), b"request");
    world.guest.send(shutdown(5000, 7, SHUTDOWN_SEND), &[]);
    world.process();
    // The sink is closed behind the last byte, not before.
    assert!(!peer.sink_closed.get());
    peer.room.set(100);
    world.ready(7, false, true);
    assert_eq!(peer.received(), b"request");
    assert!(peer.sink_closed.get());
    assert!(world.guest.take().is_empty());
    peer.source_ended.set(true);
    world.feed(7, &peer, b"reply");
    let packets = world.guest.take();
    assert_eq!(ops(&packets), [Op::ReadWrite, Op::Reset]);
    assert_eq!(world.host.closed, [7]);
}

#[test]
fn a_guest_that_closes_never_waits_for_the_sink() {
    let mut world = World::new();
    let peer = world.connected(7);
    peer.room.set(0);
    world.guest.send(packet(5000, 7, Op::ReadWrite), b"late");
    world.guest.send(shutdown(5000, 7, SHUTDOWN_BOTH), &[]);
    world.process();
    assert_eq!(ops(&world.guest.take()), [Op::Reset]);
    assert!(peer.source_closed.get());
    assert!(world.host.closed.is_empty());
    peer.room.set(100);
    world.ready(7, false, true);
    assert_eq!(peer.received(), b"late");
    assert_eq!(world.host.closed, [7]);
    assert_eq!(world.mux.room(), MAX_SLOTS);
}

#[test]
fn a_reset_by_the_guest_loses_nothing_and_is_not_answered() {
    let mut world = World::new();
    let peer = world.connected(7);
    peer.room.set(0);
    world.guest.send(packet(5000, 7, Op::ReadWrite), b"late");
    world.guest.send(packet(5000, 7, Op::Reset), &[]);
    world.process();
    assert!(world.guest.take().is_empty());
    peer.room.set(100);
    world.ready(7, false, true);
    assert_eq!(peer.received(), b"late");
    assert_eq!(world.host.closed, [7]);
}

#[test]
fn a_broken_sink_ends_one_direction_only() {
    let mut world = World::new();
    let peer = world.connected(7);
    peer.sink_broken.set(true);
    world.guest.send(packet(5000, 7, Op::ReadWrite), b"nobody reads this");
    world.process();
    let packets = world.guest.take();
    assert_eq!(ops(&packets), [Op::Shutdown]);
    assert_eq!(packets[0].0.flags, SHUTDOWN_RECEIVE);
    assert_eq!(packets[0].0.space.forwarded, 17);
    world.feed(7, &peer, b"still here");
    assert_eq!(payload(&world.guest.take()), b"still here");
    peer.source_ended.set(true);
    world.ready(7, true, false);
    assert_eq!(ops(&world.guest.take()), [Op::Reset]);
    assert_eq!(world.host.closed, [7]);
}

#[test]
fn a_sink_that_breaks_with_bytes_waiting_drops_them() {
    let mut world = World::new();
    let peer = world.connected(7);
    peer.room.set(0);
    world.guest.send(packet(5000, 7, Op::ReadWrite), &pattern(1000));
    world.process();
    peer.sink_broken.set(true);
    world.ready(7, false, true);
    let packets = world.guest.take();
    assert_eq!((packets[0].0.op, packets[0].0.space.forwarded), (Op::Shutdown, 1000));
}

#[test]
fn a_stream_with_only_a_source_ends_with_the_guest() {
    let mut world = World::new();
    let peer = world.expect(7, true, false);
    world.guest.dial(5000, 7);
    world.process();
    peer.source_ended.set(true);
    world.feed(7, &peer, b"stdin");
    let packets = world.guest.take();
    assert_eq!(ops(&packets), [Op::Response, Op::ReadWrite, Op::Shutdown]);
    assert!(world.host.closed.is_empty());
    world.guest.send(packet(5000, 7, Op::ReadWrite), b"misplaced");
    world.process();
    let packets = world.guest.take();
    assert_eq!((packets[0].0.op, packets[0].0.flags), (Op::Shutdown, SHUTDOWN_BOTH));
    world.guest.send(shutdown(5000, 7, SHUTDOWN_BOTH), &[]);
    world.process();
    assert_eq!(world.host.closed, [7]);
}

#[test]
fn a_stream_with_only_a_sink_tells_when_all_is_written() {
    let mut world = World::new();
    let peer = world.expect(7, false, true);
    world.guest.dial(5000, 7);
    world.process();
    assert_eq!(ops(&world.guest.take()), [Op::Response]);
    peer.room.set(0);
    world.guest.send(packet(5000, 7, Op::ReadWrite), b"stdout");
    world.guest.send(shutdown(5000, 7, SHUTDOWN_SEND), &[]);
    world.process();
    assert!(world.guest.take().is_empty());
    peer.room.set(100);
    world.ready(7, false, true);
    assert_eq!(ops(&world.guest.take()), [Op::Reset]);
    assert_eq!(peer.received(), b"stdout");
}

#[test]
fn a_guest_that_stops_reading_closes_the_source() {
    let mut world = World::new();
    let peer = world.connected(7);
    world.guest.send(shutdown(5000, 7, SHUTDOWN_RECEIVE), &[]);
    world.process();
    assert!(peer.source_closed.get());
    world.guest.send(packet(5000, 7, Op::ReadWrite), b"x");
    world.process();
    assert_eq!(peer.received(), b"x");
}

#[test]
fn without_buffers_the_source_is_left_alone() {
    let mut world = World::with(Guest::new(false));
    let peer = world.expect(7, true, true);
    world.guest.dial(5000, 7);
    world.process();
    world.guest.refill(2);
    world.feed(7, &peer, &pattern(10_000));
    let first = world.guest.take();
    assert_eq!(ops(&first), [Op::Response, Op::ReadWrite]);
    let reads = peer.reads.get();
    world.process();
    world.ready(7, true, true);
    assert_eq!(peer.reads.get(), reads);
    world.guest.refill(100);
    world.process();
    let second = world.guest.take();
    assert_eq!([payload(&first), payload(&second)].concat(), pattern(10_000));
}

#[test]
fn without_credit_the_source_is_left_alone() {
    let mut world = World::new();
    let peer = world.expect(7, true, true);
    let narrow = |op, forwarded| Header { space: Space { capacity: 100, forwarded }, ..packet(5000, 7, op) };
    world.guest.send(narrow(Op::Request, 0), &[]);
    world.process();
    world.guest.take();
    world.feed(7, &peer, &pattern(250));
    assert_eq!(payload(&world.guest.take()), &pattern(250)[..100]);
    let reads = peer.reads.get();
    world.ready(7, true, true);
    assert_eq!(peer.reads.get(), reads);
    world.guest.send(narrow(Op::CreditUpdate, 30), &[]);
    world.process();
    assert_eq!(payload(&world.guest.take()), &pattern(250)[100..130]);
}

#[test]
fn a_stalled_sink_takes_one_window_and_resumes_in_order() {
    let mut world = World::new();
    let peer = world.connected(7);
    peer.room.set(1000);
    let window = 256 * 1024;
    let all = pattern(window + 1000);
    // The first 1000 bytes are forwarded but not announced, so the guest may not use their room yet.
    for piece in all[..window].chunks(60_000) {
        world.guest.send(packet(5000, 7, Op::ReadWrite), piece);
        world.process();
    }
    assert!(world.guest.take().is_empty());
    world.guest.send(packet(5000, 7, Op::CreditRequest), &[]);
    world.process();
    let packets = world.guest.take();
    assert_eq!((packets[0].0.op, packets[0].0.space.forwarded), (Op::CreditUpdate, 1000));
    world.guest.send(packet(5000, 7, Op::ReadWrite), &all[window..]);
    world.process();
    peer.room.set(usize::MAX);
    world.ready(7, false, true);
    assert!(peer.received() == all);
    assert_eq!(ops(&world.guest.take()), [Op::CreditUpdate]);
}

#[test]
fn credit_is_announced_by_the_half_window() {
    let mut world = World::new();
    let peer = world.connected(7);
    for _ in 0..20 {
        world.guest.send(packet(5000, 7, Op::ReadWrite), &pattern(64 * 1024));
        world.process();
    }
    assert_eq!(peer.received().len(), 20 * 64 * 1024);
    assert_eq!(world.guest.take().len(), 10);
}

#[test]
fn a_device_reset_closes_everything() {
    let mut world = World::new();
    let peer = world.connected(7);
    peer.room.set(0);
    world.guest.send(packet(5000, 7, Op::ReadWrite), b"abc");
    world.process();
    peer.room.set(2);
    world.mux.on_ready(world.host.ids[&7], false, false, &mut world.host);
    world.mux.clear(&mut world.host);
    assert!(peer.source_closed.get());
    assert_eq!(world.host.closed, [7]);
    assert_eq!(world.mux.room(), MAX_SLOTS);
    world.process();
    assert!(world.guest.take().is_empty());
}

#[test]
fn a_forgotten_stream_is_reset() {
    let mut world = World::new();
    let peer = world.connected(7);
    peer.room.set(0);
    world.guest.send(packet(5000, 7, Op::ReadWrite), b"abc");
    world.process();
    world.mux.forget(7, &mut world.host);
    world.mux.forget(8, &mut world.host);
    world.process();
    assert_eq!(ops(&world.guest.take()), [Op::Reset]);
    assert_eq!(world.host.closed, [7]);
}

fn client(world: &mut World, port: u32) -> std::rc::Rc<Peer> {
    let peer = Peer::new();
    let ends = MockEnds { peer: peer.clone(), source: true, sink: true };
    world.mux.connect(Opened { ends, readable: true }, port, Instant::now());
    world.process();
    peer
}

#[test]
fn a_host_program_is_greeted_and_connected() {
    let mut world = World::new();
    let peer = client(&mut world, 1024);
    peer.source.borrow_mut().extend(b"early");
    let packets = world.guest.take();
    let host = packets[0].0.source_port;
    assert_eq!((ops(&packets), packets[0].0.destination_port), (vec![Op::Request], 1024));
    assert_eq!(host, 1 << 30);
    peer.room.set(4);
    world.guest.send(packet(1024, host, Op::Response), &[]);
    world.guest.send(packet(1024, host, Op::ReadWrite), b"hello");
    world.process();
    assert_eq!(payload(&world.guest.take()), b"early");
    let id = world.mux.vacancy();
    assert!(id.is_some());
    assert_eq!(peer.received(), b"OK 1");
    peer.room.set(100);
    world.guest.send(shutdown(1024, host, SHUTDOWN_BOTH), &[]);
    world.process();
    // Nobody has reported the sink as writable yet.
    assert_eq!(peer.received(), b"OK 1");
    world.mux.clear(&mut world.host);
    assert!(world.host.closed.is_empty());
}

#[test]
fn a_host_program_is_turned_away_by_reset_and_by_time() {
    let mut world = World::new();
    let refused = client(&mut world, 1024);
    let ignored = client(&mut world, 1025);
    let packets = world.guest.take();
    world.guest.send(packet(1024, packets[0].0.source_port, Op::Reset), &[]);
    world.process();
    assert!(refused.sink_closed.get() && refused.received().is_empty());
    let deadline = world.mux.next_deadline().unwrap();
    world.mux.expire(deadline - Duration::from_millis(1), &mut world.host);
    assert!(!ignored.sink_closed.get());
    assert!(deadline <= Instant::now() + REQUEST_TIMEOUT);
    world.mux.expire(deadline, &mut world.host);
    world.process();
    assert!(ignored.sink_closed.get() && ignored.received().is_empty());
    assert_eq!(ops(&world.guest.take()), [Op::Reset]);
    assert_eq!(world.mux.next_deadline(), None);
}

#[test]
fn there_is_a_last_connection() {
    let mut world = World::new();
    let all = u32::try_from(MAX_SLOTS).unwrap();
    for port in 0..=all {
        world.expect(port, true, true);
        world.guest.refill(usize::MAX);
        world.guest.dial(5000, port);
        world.process();
        let packets = world.guest.take();
        let expected = if port < all { Op::Response } else { Op::Reset };
        assert_eq!(ops(&packets), [expected]);
        if port + 1 == all {
            assert!(packets[0].0.space.capacity >= 16 * 1024);
        }
    }
}

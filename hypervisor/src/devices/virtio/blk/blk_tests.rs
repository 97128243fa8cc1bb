//! A slot as its driver sees it.

use std::sync::Mutex;

use nix::sys::epoll::EpollTimeout;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::virtio::SharedDevice;
use crate::event_loop::EventLoop;

fn file(sectors: u64) -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(sectors * 512).unwrap();
    file.into()
}

fn capacity(blk: &Blk) -> u64 {
    let mut data = [0; 8];
    blk.read_config(0, &mut data);
    u64::from_le_bytes(data)
}

#[test]
fn a_slot_takes_one_disk_at_a_time() {
    let mut blk = Blk::new(3);
    assert_eq!(capacity(&blk), 0);
    assert!(!blk.detach());
    assert!(blk.attach(vec![file(8)], false).unwrap());
    assert_eq!(capacity(&blk), 8);
    assert!(!blk.attach(vec![file(9)], false).unwrap());
    assert_eq!(capacity(&blk), 8);
    assert!(blk.detach());
    assert_eq!(capacity(&blk), 0);
}

#[test]
fn only_a_disk_that_is_there_at_boot_is_advertised_as_read_only() {
    let mut blk = Blk::new(0);
    assert_eq!(blk.features() & feature::READ_ONLY, 0);
    assert_ne!(blk.features() & feature::DISCARD, 0);
    blk.attach(vec![file(8)], true).unwrap();
    assert_ne!(blk.features() & feature::READ_ONLY, 0);
    assert_eq!(blk.features() & (feature::DISCARD | feature::WRITE_ZEROES), 0);
}

#[test]
fn the_configuration_space_ends() {
    let blk = Blk::new(0);
    for offset in [57, 60, 4096, u32::MAX] {
        let mut data = [0; 8];
        blk.read_config(offset, &mut data);
        assert_eq!(data, [0; 8]);
    }
}

/// More requests than are answered in one go, then broken rings.
#[test]
fn a_long_queue_is_served_in_turns_and_a_broken_one_stops() {
    const REQUESTS: u16 = 100;
    let memory = GuestRam::new(4 << 20).unwrap();
    let event_loop = EventLoop::new().unwrap();
    let blk = std::sync::Arc::new(Mutex::new(Blk::new(0)));
    let shared = SharedDevice::new(blk.clone());
    let doorbells = shared.doorbells(&event_loop).unwrap();
    let mock = MockSplitQueue::new(&*memory, 128);
    const GET_ID: u32 = 8;
    memory.write_obj(GET_ID, GuestAddress(0x10_0000)).unwrap();
    let chains: Vec<RawDescriptor> = (0..REQUESTS)
        .map(|index| {
            let first = index % 2 == 0;
            let (address, len) = if first { (0x10_0000, 16) } else { (0x20_0000, 21) };
            Descriptor::new(address, len, if first { 1 } else { 2 }, index + 1).into()
        })
        .collect();
    mock.add_desc_chains(&chains, 0).unwrap();
    let interrupt = Interrupt::new().unwrap();
    let activation = Activation {
        memory: memory.clone(),
        queues: vec![mock.create_queue().unwrap()],
        features: 0,
        interrupt: interrupt.clone(),
        registrar: shared.registrar(&event_loop),
    };
    blk.lock().unwrap().activate(activation).unwrap();
    shared.set_active(true);
    doorbells.events()[0].write(1).unwrap();
    event_loop.turn(EpollTimeout::ZERO).unwrap();
    let after_one = blk.lock().unwrap().statistics().requests;
    assert!(after_one < u64::from(REQUESTS / 2), "{after_one}");
    while event_loop.turn(EpollTimeout::ZERO).unwrap() > 0 {}
    assert_eq!(blk.lock().unwrap().statistics().requests, u64::from(REQUESTS / 2));
    assert_eq!(interrupt.status(), 1);

    // An available index that runs ahead of the ring.
    mock.avail().idx().store(u16::to_le(60_000));
    doorbells.events()[0].write(1).unwrap();
    while event_loop.turn(EpollTimeout::ZERO).unwrap() > 0 {}
    assert!(interrupt.needs_reset());
    blk.lock().unwrap().reset();
    assert_eq!(event_loop.turn(EpollTimeout::ZERO).unwrap(), 0);
}

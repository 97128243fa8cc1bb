use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::epoll::EpollTimeout;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::GuestAddress;

use super::*;
use crate::devices::virtio::SharedDevice;
use crate::event_loop::EventLoop;
use crate::memory::BLOCK;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

fn config_of(mem: &Mem, offset: u32) -> u64 {
    let mut data = [0; 8];
    mem.read_config(offset, &mut data);
    u64::from_le_bytes(data)
}

#[test]
fn it_is_a_placeholder_until_memory_is_wanted() {
    let ram = GuestRam::growing(1 << 20, 8 * BLOCK).unwrap();
    let mut mem = Mem::new(ram.growth().unwrap().clone(), || ());
    assert_eq!(mem.device_type(), PLACEHOLDER);
    assert!(!mem.request(8 * BLOCK + 1) && !mem.request(u64::MAX));
    assert!(mem.request(BLOCK + 1));
    assert_eq!((mem.device_type(), mem.requested_bytes()), (DEVICE_TYPE, 2 * BLOCK));
    assert_eq!(config_of(&mem, 0), BLOCK);
    assert_eq!((config_of(&mem, 16), config_of(&mem, 24)), (4 << 30, 8 * BLOCK));
    assert_eq!((config_of(&mem, 32), config_of(&mem, 40), config_of(&mem, 48)), (8 * BLOCK, 0, 2 * BLOCK));
    assert_eq!((config_of(&mem, 56), config_of(&mem, u32::MAX)), (0, 0));
}

/// Two blocks are plugged in; a third would be too much; then requests that are none.
#[test]
fn requests_are_answered_and_changes_are_told() {
    let memory = GuestRam::growing(4 << 20, 8 * BLOCK).unwrap();
    let growth = memory.growth().unwrap().clone();
    let event_loop = EventLoop::new().unwrap();
    let told = Arc::new(AtomicUsize::new(0));
    let counter = told.clone();
    let mut mem = Mem::new(growth.clone(), move || {
        counter.fetch_add(1, Ordering::Relaxed);
    });
    mem.request(2 * BLOCK);
    let mem = Arc::new(Mutex::new(mem));
    let shared = SharedDevice::new(mem.clone());
    let doorbells = shared.doorbells(&event_loop).unwrap();
    let mock = MockSplitQueue::new(&*memory, 16);
    let plug = |place: u64, block: u64, count: u16| {
        let mut bytes = [0; Request::BYTES];
        bytes[8..16].copy_from_slice(&(growth.start() + block * BLOCK).to_le_bytes());
        bytes[16..18].copy_from_slice(&count.to_le_bytes());
        memory.write_slice(&bytes, GuestAddress(place)).unwrap();
    };
    plug(0x10_0000, 1, 2);
    plug(0x10_0100, 5, 1);
    let requests: [(u64, u32, u64, u32); 6] = [
        (0x10_0000, 24, 0x20_0000, 10),
        (0x10_0100, 24, 0x20_0100, 16),
        (0x10_0000, 23, 0x20_0200, 10),
        (0x10_0000, 24, 0x20_0300, 9),
        (u64::MAX - 8, 24, 0x20_0400, 10),
        // Not plugged in, so no place for a request.
        (growth.start(), 24, 0x20_0500, 10),
    ];
    let chains: Vec<RawDescriptor> = (0..)
        .step_by(2)
        .zip(requests)
        .flat_map(|(index, (request, len, answer, room))| {
            memory.write_obj(0xffff_u16, GuestAddress(answer)).unwrap();
            let request = Descriptor::new(request, len, NEXT, index + 1);
            [request.into(), Descriptor::new(answer, room, WRITE, 0).into()]
        })
        .collect();
    mock.add_desc_chains(&chains, 0).unwrap();
    let activation = Activation {
        memory: memory.clone(),
        queues: vec![mock.create_queue().unwrap()],
        features: feature::UNPLUGGED_INACCESSIBLE,
        interrupt: Interrupt::new().unwrap(),
        registrar: shared.registrar(&event_loop),
    };
    let interrupt = activation.interrupt.clone();
    mem.lock().unwrap().activate(activation).unwrap();
    shared.set_active(true);
    doorbells.events()[0].write(1).unwrap();
    while event_loop.turn(EpollTimeout::ZERO).unwrap() > 0 {}
    let answers: Vec<u16> =
        requests.iter().map(|(_, _, place, _)| memory.read_obj(GuestAddress(*place)).unwrap()).collect();
    assert_eq!(answers, [0, 1, 0xffff, 0xffff, 0xffff, 0xffff]);
    let mut mem = mem.lock().unwrap();
    let DeviceStatistics { requests, errors, read_bytes, written_bytes, .. } = mem.statistics();
    assert_eq!((requests, errors, read_bytes, written_bytes), (2, 4, 2 * BLOCK, 0));
    assert_eq!((mem.plugged_bytes(), mem.taken_up_bytes()), (2 * BLOCK, 0));
    // Until the driver, having finished, looks what it shall have.
    config_of(&mem, 40);
    assert_eq!((told.load(Ordering::Relaxed), mem.taken_up_bytes()), (0, 0));
    for _ in 0..2 {
        config_of(&mem, 48);
        assert_eq!((told.load(Ordering::Relaxed), mem.taken_up_bytes()), (1, 2 * BLOCK));
    }

    let generation = interrupt.config_generation();
    assert!(mem.request(0));
    assert_ne!(interrupt.config_generation(), generation);
    // What is plugged in stays, and the device with it, whatever the driver does.
    mem.reset();
    assert_eq!((mem.device_type(), mem.plugged_bytes()), (DEVICE_TYPE, 2 * BLOCK));
}

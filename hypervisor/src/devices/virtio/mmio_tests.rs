//! Conformance of the transport, over a device that records what it is told.

use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::GuestAddress;
use vmshim_protocol::control::DeviceStatistics;

use super::*;
use crate::devices::virtio::VirtioDevice;
use crate::event_loop::EventLoop;

const FEATURE: u64 = 1 << 3;
const SIZES: [u16; 2] = [16, 256];
const RAM: u64 = 1 << 20;

const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESCRIPTORS: u64 = 0x080;
const QUEUE_AVAILABLE: u64 = 0x090;
const QUEUE_USED: u64 = 0x0a0;
const CONFIG_GENERATION: u64 = 0x0fc;

#[derive(Default)]
struct Mock {
    active: Option<Vec<Queue>>,
    features: u64,
    resets: usize,
    refuse: bool,
    written: Vec<(u32, Vec<u8>)>,
}

impl VirtioDevice for Mock {
    fn device_type(&self) -> u32 {
        42
    }

    fn name(&self) -> &str {
        "mock"
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn features(&self) -> u64 {
        FEATURE | RING_EVENT_IDX
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        for (index, byte) in (offset..).zip(data) {
            *byte = u8::try_from(index & 0xff).unwrap();
        }
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        self.written.push((offset, data.to_vec()));
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        assert!(self.active.is_none(), "activated twice without a reset");
        if self.refuse {
            return Err(ActivationError::Host(std::io::Error::other("no")));
        }
        self.features = activation.features;
        self.active = Some(activation.queues);
        Ok(())
    }

    fn reset(&mut self) {
        assert!(self.active.take().is_some(), "reset without activation");
        self.resets += 1;
    }

    fn on_queue(&mut self, _index: usize) {}

    fn statistics(&self) -> DeviceStatistics {
        DeviceStatistics::default()
    }
}

struct Bench {
    transport: MmioTransport,
    device: Arc<Mutex<Mock>>,
    interrupt: Interrupt,
}

impl Bench {
    fn new() -> Self {
        let device = Arc::new(Mutex::new(Mock::default()));
        let interrupt = Interrupt::new().unwrap();
        let shared = SharedDevice::new(device.clone());
        let registrar = shared.registrar(&EventLoop::new().unwrap());
        let memory = GuestRam::new(RAM).unwrap();
        let transport = MmioTransport::new(shared, memory, interrupt.clone(), registrar);
        Self { transport, device, interrupt }
    }

    /// As far as a driver gets that sets these status bits one after the other, features and queues along the way.
    fn at(status: u32) -> Self {
        let bench = Self::new();
        for (bits, step) in [(1, 1), (2, 3), (8, 11), (4, 15)] {
            if status & bits == 0 {
                break;
            }
            match step {
                11 => bench.accept(FEATURE | VERSION_1),
                15 => (0..2).for_each(|index| bench.set_up_queue(index)),
                _ => {}
            }
            bench.write(STATUS, step);
        }
        assert_eq!(bench.read(STATUS), status);
        bench
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn accept(&self, features: u64) {
        for (select, half) in [(0, bits::low(features)), (1, bits::high(features))] {
            self.write(DRIVER_FEATURES_SELECT, select);
            self.write(DRIVER_FEATURES, half);
        }
    }

    fn set_up_queue(&self, index: u32) {
        let base = 0x1_0000 * (index + 1);
        self.write(QUEUE_SELECT, index);
        self.write(QUEUE_SIZE, 16);
        self.write(QUEUE_DESCRIPTORS, base);
        self.write(QUEUE_AVAILABLE, base + 0x1000);
        self.write(QUEUE_USED, base + 0x2000);
        self.write(QUEUE_READY, 1);
    }

    fn is_active(&self) -> bool {
        lock(&self.device).active.is_some()
    }
}

#[test]
fn the_device_introduces_itself() {
    let bench = Bench::new();
    assert_eq!(bench.read(0), u32::from_le_bytes(*b"virt"));
    assert_eq!(bench.read(4), 2);
    assert_eq!(bench.read(8), 42);
    assert_eq!(bench.read(DEVICE_FEATURES), bits::low(FEATURE | RING_EVENT_IDX));
    bench.write(DEVICE_FEATURES_SELECT, 1);
    assert_eq!(bench.read(DEVICE_FEATURES), 1);
    bench.write(DEVICE_FEATURES_SELECT, 2);
    assert_eq!(bench.read(DEVICE_FEATURES), 0);
    for (index, size) in [(0, 16), (1, 256), (2, 0), (u32::MAX, 0)] {
        bench.write(QUEUE_SELECT, index);
        assert_eq!(bench.read(QUEUE_SIZE_MAX), size);
    }
}

#[test]
fn a_well_behaved_driver_starts_the_device() {
    let bench = Bench::at(15);
    let device = lock(&bench.device);
    assert_eq!(device.features, FEATURE | VERSION_1);
    let queues = device.active.as_ref().unwrap();
    assert_eq!(queues.len(), 2);
    assert_eq!(queues[1].desc_table(), 0x2_0000);
    assert_eq!(queues[1].avail_ring(), 0x2_1000);
    assert_eq!(queues[1].used_ring(), 0x2_2000);
    assert_eq!((queues[0].size(), queues[0].max_size()), (16, 16));
    assert!(!queues[0].event_idx_enabled());
}

#[test]
fn the_ring_feature_reaches_the_queues() {
    let bench = Bench::at(3);
    bench.accept(RING_EVENT_IDX | VERSION_1);
    bench.write(STATUS, 11);
    (0..2).for_each(|index| bench.set_up_queue(index));
    bench.write(STATUS, 15);
    assert!(lock(&bench.device).active.as_ref().unwrap().iter().all(QueueT::event_idx_enabled));
}

#[test]
fn steps_cannot_be_left_out() {
    for status in [0, 1, 3, 11] {
        for attempt in 1..16 {
            let bench = Bench::at(status);
            let next = [(0, 1), (1, 3), (3, 11), (11, 15)];
            bench.write(STATUS, attempt);
            let allowed = next.contains(&(status, attempt));
            if !allowed {
                assert_eq!(bench.read(STATUS), status, "{status} -> {attempt}");
                assert!(!bench.is_active());
            }
        }
    }
}

#[test]
fn features_that_are_not_offered_are_not_agreed_on() {
    for features in [0, FEATURE, VERSION_1 | 1, VERSION_1 | 1 << 63] {
        let bench = Bench::at(3);
        bench.accept(features);
        bench.write(STATUS, 11);
        assert_eq!(bench.read(STATUS), 3, "{features:#x}");
    }
}

#[test]
fn features_are_written_in_their_phase_only() {
    for status in [0, 1, 11] {
        let bench = Bench::at(status);
        let before = lock(&bench.transport.registers).driver_features;
        bench.accept(u64::MAX);
        assert_eq!(lock(&bench.transport.registers).driver_features, before, "{status}");
    }
}

/// The class of CVE-2026-5747: a queue's size that changes under an active device.
#[test]
fn nothing_about_queues_changes_outside_their_phase() {
    for status in [0, 1, 3, 15] {
        let bench = Bench::at(status);
        let before: Vec<_> =
            lock(&bench.transport.registers).queues.iter().map(|queue| format!("{queue:?}")).collect();
        for index in 0..3 {
            bench.write(QUEUE_SELECT, index);
            for register in [0x38, 0x44, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
                for value in [0, 1, 0x8000, u32::MAX] {
                    bench.write(register, value);
                }
            }
        }
        let after: Vec<_> =
            lock(&bench.transport.registers).queues.iter().map(|queue| format!("{queue:?}")).collect();
        assert_eq!(before, after, "{status}");
    }
}

#[test]
fn a_ready_queue_is_frozen_until_it_is_taken_back() {
    let bench = Bench::at(11);
    bench.set_up_queue(0);
    bench.write(QUEUE_SIZE, 8);
    assert_eq!(lock(&bench.transport.registers).queues[0].size, 16);
    bench.write(QUEUE_READY, 0);
    assert_eq!(bench.read(QUEUE_READY), 0);
    bench.write(QUEUE_SIZE, 8);
    assert_eq!(lock(&bench.transport.registers).queues[0].size, 8);
}

fn assert_broken(bench: &Bench, what: &str) {
    assert!(!bench.is_active(), "{what}");
    assert_eq!(bench.read(STATUS), 15 | 64, "{what}");
    assert_eq!(bench.read(INTERRUPT_STATUS), 2, "{what}");
    // Only a reset helps.
    bench.write(STATUS, 15);
    assert_eq!(bench.read(STATUS), 15 | 64, "{what}");
    bench.write(STATUS, 0);
    assert_eq!(bench.read(STATUS), 0, "{what}");
    assert_eq!(bench.read(INTERRUPT_STATUS), 0, "{what}");
}

#[test]
fn bad_queues_break_the_device_not_the_process() {
    let past_the_end = u32::try_from(RAM).unwrap() - 0x80;
    let bad = [
        (QUEUE_SIZE, 0),
        (QUEUE_SIZE, 3),
        (QUEUE_SIZE, 32),
        (QUEUE_SIZE, 0x1_0010),
        (QUEUE_DESCRIPTORS, 8),
        (QUEUE_DESCRIPTORS, past_the_end),
        (QUEUE_DESCRIPTORS + 4, u32::MAX),
        (QUEUE_AVAILABLE, 1),
        (QUEUE_AVAILABLE, u32::MAX - 1),
        (QUEUE_USED, 2),
        (QUEUE_USED + 4, 1),
        (QUEUE_READY, 0),
    ];
    for (register, value) in bad {
        let bench = Bench::at(11);
        bench.set_up_queue(1);
        bench.set_up_queue(0);
        bench.write(QUEUE_READY, 0);
        bench.write(register, value);
        if register != QUEUE_READY {
            bench.write(QUEUE_READY, 1);
        }
        bench.write(STATUS, 15);
        assert_broken(&bench, &format!("{register:#x} = {value:#x}"));
    }
}

#[test]
fn a_device_that_refuses_to_start_needs_a_reset() {
    let bench = Bench::at(11);
    (0..2).for_each(|index| bench.set_up_queue(index));
    lock(&bench.device).refuse = true;
    bench.write(STATUS, 15);
    assert_broken(&bench, "refused");
}

#[test]
fn a_device_that_fails_later_says_so() {
    let bench = Bench::at(15);
    bench.interrupt.signal_needs_reset();
    assert_eq!(bench.read(STATUS), 15 | 64);
    bench.write(STATUS, 0);
    assert_eq!(bench.read(STATUS), 0);
    assert_eq!(lock(&bench.device).resets, 1);
}

#[test]
fn a_reset_forgets_everything() {
    let bench = Bench::at(15);
    bench.interrupt.signal_used_queue();
    bench.write(STATUS, 0);
    assert!(!bench.is_active());
    assert_eq!(lock(&bench.device).resets, 1);
    assert_eq!(bench.read(INTERRUPT_STATUS), 0);
    for index in 0..2 {
        bench.write(QUEUE_SELECT, index);
        assert_eq!(bench.read(QUEUE_READY), 0);
    }
    bench.write(STATUS, 0);
    assert_eq!(lock(&bench.device).resets, 1, "a device that is not active is not reset again");
}

#[test]
fn interrupts_are_acknowledged_one_by_one() {
    let bench = Bench::at(15);
    bench.interrupt.signal_used_queue();
    bench.interrupt.signal_config();
    assert_eq!(bench.read(INTERRUPT_STATUS), 3);
    assert_eq!(bench.read(CONFIG_GENERATION), 1);
    bench.write(INTERRUPT_ACK, 1);
    assert_eq!(bench.read(INTERRUPT_STATUS), 2);
}

#[test]
fn the_configuration_space_is_read_at_any_width_and_written_in_its_phases() {
    let bench = Bench::at(15);
    let mut data = [0; 8];
    bench.transport.read(0x101, &mut data);
    assert_eq!(data, [1, 2, 3, 4, 5, 6, 7, 8]);
    bench.transport.write(0x102, &[9]);
    assert_eq!(lock(&bench.device).written, [(2, vec![9])]);
    let bench = Bench::at(3);
    bench.transport.write(0x102, &[9]);
    assert!(lock(&bench.device).written.is_empty());
}

#[test]
fn registers_are_words() {
    let bench = Bench::new();
    for width in [1, 2, 3, 8] {
        let mut data = vec![0; width];
        bench.transport.read(0, &mut data);
        assert!(data.iter().all(|&byte| byte == 0xff));
        bench.transport.write(STATUS, &vec![1; width]);
        assert_eq!(bench.read(STATUS), 0);
    }
    assert_eq!(bench.read(0x1), u32::MAX);
    assert_eq!(bench.read(0xb0), u32::MAX, "no shared memory region");
}

#[derive(Debug, Clone)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

fn access() -> impl Strategy<Value = Access> {
    let register = prop_oneof![
        (0u64..0x40).prop_map(|index| index * 4),
        Just(STATUS),
        Just(QUEUE_SELECT),
        0u64..MMIO_WINDOW,
    ];
    let value = prop_oneof![
        prop::sample::select(vec![0u32, 1, 2, 3, 4, 8, 11, 15, 16, 0x1_0000, 0x2_0000, 64, 128, u32::MAX])
            .prop_map(|value| value.to_le_bytes().to_vec()),
        prop::collection::vec(any::<u8>(), 0..9),
    ];
    prop_oneof![
        (register.clone(), 0usize..9).prop_map(|(offset, len)| Access::Read(offset, len)),
        (register, value).prop_map(|(offset, data)| Access::Write(offset, data)),
    ]
}

proptest! {
    /// Whatever the registers are told: the device is started at most once between resets (the mock asserts it), only
    /// with queues in RAM, and its queues stay as they were when it was started.
    #[test]
    fn any_sequence_of_accesses_keeps_the_rules(start in prop::sample::select(vec![0u32, 1, 3, 11, 15]),
                                               accesses in prop::collection::vec(access(), 0..120)) {
        let bench = Bench::at(start);
        let layout = |queues: &[Queue]| -> Vec<_> {
            queues.iter().map(|queue| (queue.size(), queue.desc_table(), queue.avail_ring(), queue.used_ring())).collect()
        };
        for access in accesses {
            let before = lock(&bench.device).active.as_deref().map(layout);
            match access {
                Access::Read(offset, len) => bench.transport.read(offset, &mut vec![0; len]),
                Access::Write(offset, data) => bench.transport.write(offset, &data),
            }
            let device = lock(&bench.device);
            let after = device.active.as_deref().map(layout);
            if let (Some(before), Some(after)) = (&before, &after) {
                prop_assert_eq!(before, after);
            }
            for queue in device.active.iter().flatten() {
                prop_assert!(queue.is_valid(&*bench.transport.memory));
                prop_assert!(GuestAddress(queue.desc_table()).0 < RAM);
            }
            prop_assert_eq!(device.active.is_some(), bench.transport.device.is_active());
        }
    }
}

//! Requests, well-formed and not, against a disk of some sectors.

use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueOwnedT};

use super::*;

const RAM: u64 = 4 << 20;
const SECTORS: u64 = 64;
const BYTES: usize = 64 * 512;
const HEADER_AT: u64 = 0x10_0000;
const DATA_AT: u64 = 0x20_0000;
const STATUS_AT: u64 = 0x30_0000;
const SERIAL: [u8; SERIAL_BYTES] = *b"slot7\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

const NEXT: u16 = 1;
const WRITE: u16 = 2;

struct Bench {
    memory: GuestRam,
    file: File,
    disk: Disk,
}

impl Bench {
    fn new(read_only: bool) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SECTORS * SECTOR).unwrap();
        let disk = Disk::new(vec![file.try_clone().unwrap().into()], read_only).unwrap();
        Self { memory: GuestRam::new(RAM).unwrap(), file, disk }
    }

    /// Answers a chain of (address, length, flags); NEXT is added where needed.
    fn answer_chain(&self, descriptors: &[(u64, u32, u16)], disk: Option<&Disk>) -> Answer {
        let mock = MockSplitQueue::new(&*self.memory, 512);
        let count = u16::try_from(descriptors.len()).unwrap();
        let chain: Vec<RawDescriptor> = (1u16..)
            .zip(descriptors)
            .map(|(next, &(address, len, flags))| {
                let linked = if next < count { NEXT } else { 0 };
                Descriptor::new(address, len, flags | linked, next).into()
            })
            .collect();
        mock.build_desc_chain(&chain).unwrap();
        let mut queue: Queue = mock.create_queue().unwrap();
        let chain = queue.iter(self.memory.clone()).unwrap().next().unwrap();
        answer(&self.memory, chain, disk, &SERIAL)
    }

    fn header(&self, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(HEADER_AT)).unwrap();
        self.memory.write_obj(sector, GuestAddress(HEADER_AT + 8)).unwrap();
    }

    /// A request with one data descriptor.
    fn ask(&self, kind: u32, sector: u64, bytes: u32, flags: u16) -> Answer {
        self.header(kind, sector);
        self.memory.write_obj(0xeeu8, GuestAddress(STATUS_AT)).unwrap();
        let answer = self.answer_chain(
            &[(HEADER_AT, 16, 0), (DATA_AT, bytes, flags), (STATUS_AT, 1, WRITE)],
            Some(&self.disk),
        );
        if let Some(status) = answer.status {
            assert_eq!(self.memory.read_obj::<u8>(GuestAddress(STATUS_AT)).unwrap(), status as u8);
        }
        answer
    }

    fn ranges(&self, kind: u32, ranges: &[(u64, u32, u32)]) -> Answer {
        for (place, &(sector, sectors, flags)) in (0u64..).zip(ranges) {
            let at = DATA_AT + 16 * place;
            self.memory.write_obj(sector, GuestAddress(at)).unwrap();
            self.memory.write_obj(sectors, GuestAddress(at + 8)).unwrap();
            self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        }
        self.ask(kind, 0, u32::try_from(ranges.len()).unwrap() * 16, 0)
    }
}

fn ok(read: u64, written: u64, used: u32) -> Answer {
    Answer { status: Some(Status::Ok), read, written, used }
}

#[test]
fn data_go_both_ways() {
    let bench = Bench::new(false);
    bench.memory.write_slice(&[7; 1024], GuestAddress(DATA_AT)).unwrap();
    assert_eq!(bench.ask(kind::OUT, 3, 1024, 0), ok(0, 1024, 1));
    let mut written = [0; 1024];
    bench.file.read_exact_at(&mut written, 3 * SECTOR).unwrap();
    assert_eq!(written, [7; 1024]);
    bench.memory.write_slice(&[0; 1024], GuestAddress(DATA_AT)).unwrap();
    assert_eq!(bench.ask(kind::IN, 3, 1024, WRITE), ok(1024, 0, 1025));
    assert_eq!(bench.memory.read_obj::<[u8; 4]>(GuestAddress(DATA_AT + 1020)).unwrap(), [7; 4]);
}

#[test]
fn how_a_request_is_cut_does_not_matter() {
    let bench = Bench::new(false);
    bench.file.write_all_at(&[9; 512], 0).unwrap();
    bench.header(kind::IN, 0);
    // The header in three pieces; the status in the same descriptor as the data's end.
    let chain = [
        (HEADER_AT, 3, 0),
        (HEADER_AT + 3, 0, 0),
        (HEADER_AT + 3, 13, 0),
        (DATA_AT, 100, WRITE),
        (DATA_AT + 100, 413, WRITE),
    ];
    assert_eq!(bench.answer_chain(&chain, Some(&bench.disk)), ok(512, 0, 513));
    let data: [u8; 8] = bench.memory.read_obj(GuestAddress(DATA_AT + 506)).unwrap();
    assert_eq!(data, [9, 9, 9, 9, 9, 9, 0, 0]);
}

#[test]
fn requests_that_leave_the_disk_fail() {
    let bench = Bench::new(false);
    for (sector, bytes) in
        [(SECTORS, 512), (SECTORS - 1, 1024), (u64::MAX, 512), (0, 100), (u64::MAX / 512, 512)]
    {
        assert_eq!(
            bench.ask(kind::IN, sector, bytes, WRITE).status,
            Some(Status::IoError),
            "{sector} {bytes}"
        );
        assert_eq!(bench.ask(kind::OUT, sector, bytes, 0).status, Some(Status::IoError), "{sector} {bytes}");
    }
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let bench = Bench::new(true);
    assert_eq!(bench.ask(kind::OUT, 0, 512, 0).status, Some(Status::IoError));
    assert_eq!(bench.ranges(kind::DISCARD, &[(0, 8, 0)]).status, Some(Status::IoError));
    assert_eq!(bench.ranges(kind::WRITE_ZEROES, &[(0, 8, 0)]).status, Some(Status::IoError));
    assert_eq!(bench.ask(kind::IN, 0, 512, WRITE).status, Some(Status::Ok));
    assert_eq!(bench.ask(kind::FLUSH, 0, 0, 0).status, Some(Status::Ok));
}

#[test]
fn an_empty_slot_answers_with_its_name_only() {
    let bench = Bench::new(false);
    for (kind, expected) in
        [(kind::IN, Status::IoError), (kind::FLUSH, Status::IoError), (kind::GET_ID, Status::Ok)]
    {
        bench.header(kind, 0);
        let chain = [(HEADER_AT, 16, 0), (DATA_AT, 512, WRITE), (STATUS_AT, 1, WRITE)];
        assert_eq!(bench.answer_chain(&chain, None).status, Some(expected));
    }
    assert_eq!(bench.memory.read_obj::<[u8; 6]>(GuestAddress(DATA_AT)).unwrap(), *b"slot7\0");
}

#[test]
fn the_serial_number_is_cut_to_its_buffer() {
    let bench = Bench::new(false);
    assert_eq!(bench.ask(kind::GET_ID, 0, 3, WRITE).status, Some(Status::Ok));
    assert_eq!(bench.memory.read_obj::<[u8; 5]>(GuestAddress(DATA_AT)).unwrap(), *b"slo\0\0");
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let bench = Bench::new(false);
    bench.file.write_all_at(&[1; BYTES], 0).unwrap();
    assert_eq!(bench.ranges(kind::DISCARD, &[(0, 8, 0), (16, 8, 0)]).status, Some(Status::Ok));
    let answer = bench.ranges(kind::WRITE_ZEROES, &[(32, 8, UNMAP)]);
    assert_eq!(answer.status, Some(Status::Ok));
    let mut data = vec![0; BYTES];
    bench.file.read_exact_at(&mut data, 0).unwrap();
    let of = |sector: usize| data[sector * 512];
    assert_eq!([of(0), of(8), of(16), of(24), of(32), of(40)], [0, 1, 0, 1, 0, 1]);
}

/// Overflowing ranges once made a VMM zero what it should not (cloud-hypervisor 8388).
#[test]
fn bad_ranges_change_nothing() {
    let bench = Bench::new(false);
    bench.file.write_all_at(&[1; 512], 0).unwrap();
    let good = (0, 1, 0);
    let bad = [
        (kind::DISCARD, vec![good, (SECTORS, 1, 0)], Status::IoError),
        (kind::DISCARD, vec![good, (u64::MAX, 1, 0)], Status::IoError),
        (kind::DISCARD, vec![good, (0, u32::MAX, 0)], Status::IoError),
        (kind::DISCARD, vec![good, (0, 1, UNMAP)], Status::Unsupported),
        (kind::WRITE_ZEROES, vec![good, (0, 1, 2)], Status::Unsupported),
        (kind::WRITE_ZEROES, vec![], Status::IoError),
        (kind::DISCARD, vec![good; MAX_RANGES as usize + 1], Status::IoError),
    ];
    for (kind, ranges, status) in bad {
        assert_eq!(bench.ranges(kind, &ranges).status, Some(status), "{ranges:?}");
    }
    let mut data = [0; 512];
    bench.file.read_exact_at(&mut data, 0).unwrap();
    assert_eq!(data, [1; 512]);
    assert_eq!(bench.ask(kind::DISCARD, 0, 15, 0).status, Some(Status::IoError));
}

#[test]
fn chains_without_header_or_status_are_not_answered() {
    let bench = Bench::new(false);
    bench.header(kind::IN, 0);
    let chains: [&[(u64, u32, u16)]; 6] = [
        &[(HEADER_AT, 16, 0)],
        &[(HEADER_AT, 15, 0), (STATUS_AT, 1, WRITE)],
        &[(STATUS_AT, 1, WRITE)],
        &[(HEADER_AT, 16, 0), (STATUS_AT, 0, WRITE)],
        &[(HEADER_AT, 16, 0), (RAM, 1, WRITE)],
        // What the device reads comes before what it writes.
        &[(STATUS_AT, 1, WRITE), (HEADER_AT, 16, 0)],
    ];
    for chain in chains {
        assert_eq!(bench.answer_chain(chain, Some(&bench.disk)), Answer::MALFORMED, "{chain:x?}");
    }
}

#[test]
fn buffers_outside_ram_fail_without_a_transfer() {
    let bench = Bench::new(false);
    bench.header(kind::IN, 0);
    // CVE-2019-18960: only the start lies in RAM.
    for (address, len) in [(RAM - 256, 512), (RAM, 512), (u64::MAX - 255, 512), (0xd000_0000, 512)] {
        let chain = [(HEADER_AT, 16, 0), (address, len, WRITE), (STATUS_AT, 1, WRITE)];
        assert_eq!(bench.answer_chain(&chain, Some(&bench.disk)).status, Some(Status::IoError));
    }
}

#[test]
fn chains_are_bounded() {
    let bench = Bench::new(false);
    bench.header(kind::IN, 0);
    let chain = |segments: usize| {
        let mut chain = vec![(HEADER_AT, 16, 0)];
        chain.extend(std::iter::repeat_n((DATA_AT, 0, WRITE), segments - 1));
        chain.extend([(DATA_AT, 512, WRITE), (STATUS_AT, 1, WRITE)]);
        chain
    };
    let longest = MAX_SEGMENTS as usize;
    assert_eq!(bench.answer_chain(&chain(longest), Some(&bench.disk)).status, Some(Status::Ok));
    assert_eq!(bench.answer_chain(&chain(longest + 1), Some(&bench.disk)), Answer::MALFORMED);
}

#[test]
fn unknown_requests_are_unsupported() {
    let bench = Bench::new(false);
    for kind in [2, 3, 5, 12, 14, u32::MAX] {
        assert_eq!(bench.ask(kind, 0, 512, WRITE).status, Some(Status::Unsupported));
    }
}

proptest! {
    /// Any chain over any memory is answered, and nothing beyond the disk is written.
    #[test]
    fn any_chain_is_answered(
        kind in prop_oneof![0u32..16, any::<u32>()],
        sector in prop_oneof![0..2 * SECTORS, any::<u64>()],
        descriptors in prop::collection::vec(
            (prop_oneof![Just(HEADER_AT), 0..2 * RAM, any::<u64>()], prop_oneof![0u32..2048, any::<u32>()], 0u16..8),
            1..8,
        ),
        with_header in any::<bool>(),
    ) {
        let bench = Bench::new(false);
        bench.header(kind, sector);
        let mut chain = Vec::new();
        if with_header {
            chain.push((HEADER_AT, 16, 0));
        }
        chain.extend(descriptors);
        let _ = bench.answer_chain(&chain, Some(&bench.disk));
        prop_assert_eq!(bench.file.metadata().unwrap().len(), SECTORS * SECTOR);
    }
}

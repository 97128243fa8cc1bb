//! Memory that a guest gets and gives back while it runs.
//!
//! Its addresses are set aside when the machine is made, and KVM is told of them then; what is not plugged in cannot be
//! accessed, by the host's page tables. So a guest cannot make the host provide more than it was allowed, whoever it lets
//! do it: a vCPU that touches what is not plugged in ends the machine, and a device refuses to (see [`super::Region`]).
//!
//! A guest that unplugs a block which a device is writing to at that moment breaks its driver's first rule, and at worst
//! ends its own machine by a fault of this process.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use vm_memory::mmap::{MmapRegion, MmapRegionError};

use super::HUGE_PAGE;
use super::reservation::Reservation;

/// The smallest block, and what the size of the range is a multiple of.
pub const BLOCK: u64 = HUGE_PAGE;

/// Blocks of a range, so that a guest which plugs in every other one does not use up the mappings that the host allows a
/// process (65530).
const MOST_BLOCKS: u64 = 1 << 14;

const BITS: usize = u64::BITS as usize;

/// A range of guest addresses in which memory can be plugged in, block by block.
#[derive(Debug)]
pub struct Growth {
    start: u64,
    block: u64,
    blocks: usize,
    /// One bit a block, set while it is plugged in. Only the device that answers the guest changes any.
    plugged: Box<[AtomicU64]>,
    host: Reservation,
}

/// How much of a range is plugged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plugged {
    /// All of it.
    All,
    /// Nothing.
    Nothing,
    /// Something.
    Some,
}

impl Growth {
    /// Sets `bytes` of guest addresses from `start` on aside, both multiples of [`BLOCK`]; what is less than one of the
    /// larger blocks of a large range is left out. Nothing is plugged in.
    ///
    /// # Errors
    /// When this process has not that many addresses, or it is none.
    pub(super) fn new(start: u64, bytes: u64) -> Result<Self, Errno> {
        let block =
            bytes.div_ceil(MOST_BLOCKS).max(BLOCK).checked_next_power_of_two().ok_or(Errno::ENOMEM)?;
        let blocks = usize::try_from(bytes / block).map_err(|_| Errno::ENOMEM)?;
        let host = Reservation::inaccessible(usize::try_from(bytes).map_err(|_| Errno::ENOMEM)?)?;
        let plugged = (0..blocks.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { start, block, blocks, plugged, host })
    }

    pub(super) fn region(&self) -> Result<MmapRegion, MmapRegionError> {
        self.host.region()
    }

    /// The first guest address.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// What is plugged in and unplugged as a whole, and where: a power of two of bytes.
    pub fn block(&self) -> u64 {
        self.block
    }

    /// Bytes of guest addresses.
    pub fn size(&self) -> u64 {
        self.blocks as u64 * self.block
    }

    /// Bytes that are plugged in.
    pub fn plugged_bytes(&self) -> u64 {
        let count: u32 = self.plugged.iter().map(|word| word.load(Ordering::Acquire).count_ones()).sum();
        u64::from(count) * self.block
    }

    /// The blocks of a range of guest addresses. None where it is empty, not one of whole blocks, or not all of it here.
    pub fn blocks(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.start).filter(|offset| offset.is_multiple_of(self.block))?;
        let first = usize::try_from(offset / self.block).ok()?;
        let end = first.checked_add(usize::from(count))?;
        (first < end && end <= self.blocks).then_some(first..end)
    }

    /// How much of `blocks` is plugged in; nothing where there are none.
    pub fn state(&self, mut blocks: Range<usize>) -> Plugged {
        let Some(first) = blocks.next() else { return Plugged::Nothing };
        let first = self.is_plugged(first);
        match blocks.all(|block| self.is_plugged(block) == first) {
            true if first => Plugged::All,
            true => Plugged::Nothing,
            false => Plugged::Some,
        }
    }

    /// Lets the guest have zeroed memory at `blocks`, of which it has none.
    ///
    /// # Errors
    /// When the host refuses; then the guest has none.
    pub fn plug(&self, blocks: Range<usize>) -> Result<(), Errno> {
        let bytes = self.bytes_of(&blocks);
        self.host.set_accessible(bytes.clone(), true).inspect_err(|_| {
            // A part of it may be accessible. What this makes smaller again it made larger, so it does not fail.
            let _ = self.host.set_accessible(bytes, false);
        })?;
        blocks.for_each(|block| self.set(block, true));
        Ok(())
    }

    /// Takes the memory at `blocks`, all of which the guest has, back for the host.
    ///
    /// # Errors
    /// When the host refuses; then the guest has it still.
    pub fn unplug(&self, blocks: Range<usize>) -> Result<(), Errno> {
        // Devices are told first, so that they do not begin to access what they could not.
        blocks.clone().for_each(|block| self.set(block, false));
        let bytes = self.bytes_of(&blocks);
        if let Err(errno) = self.host.set_accessible(bytes.clone(), false) {
            let _ = self.host.set_accessible(bytes, true);
            blocks.for_each(|block| self.set(block, true));
            return Err(errno);
        }
        self.host.take_back(bytes);
        Ok(())
    }

    /// Takes all that the guest has back for the host.
    ///
    /// # Errors
    /// When the host refuses; then the guest still has some.
    pub fn unplug_all(&self) -> Result<(), Errno> {
        let mut next = 0;
        while let Some(first) = (next..self.blocks).find(|block| self.is_plugged(*block)) {
            next = (first..self.blocks).find(|block| !self.is_plugged(*block)).unwrap_or(self.blocks);
            self.unplug(first..next)?;
        }
        Ok(())
    }

    /// Whether `bytes` from `offset` on are all plugged in.
    pub(super) fn covers(&self, offset: u64, bytes: usize) -> bool {
        let Some(end) = offset.checked_add(bytes as u64) else { return false };
        let (first, end) = (offset / self.block, end.div_ceil(self.block));
        let (Ok(first), Ok(end)) = (usize::try_from(first), usize::try_from(end)) else { return false };
        end <= self.blocks && (first..end).all(|block| self.is_plugged(block))
    }

    fn is_plugged(&self, block: usize) -> bool {
        let word = self.plugged.get(block / BITS).map_or(0, |word| word.load(Ordering::Acquire));
        word >> (block % BITS) & 1 == 1
    }

    fn set(&self, block: usize, plugged: bool) {
        let Some(word) = self.plugged.get(block / BITS) else { return };
        let bit = 1 << (block % BITS);
        if plugged {
            word.fetch_or(bit, Ordering::AcqRel);
        } else {
            word.fetch_and(!bit, Ordering::AcqRel);
        }
    }

    /// Where blocks are in the reservation. They are within it, so no product overflows.
    fn bytes_of(&self, blocks: &Range<usize>) -> Range<usize> {
        let block = usize::try_from(self.block).unwrap_or(usize::MAX);
        blocks.start.saturating_mul(block)..blocks.end.saturating_mul(block)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 4 << 30;

    fn growth(blocks: u64) -> Growth {
        Growth::new(START, blocks * BLOCK).unwrap()
    }

    #[test]
    fn blocks_are_whole_and_inside() {
        let growth = growth(100);
        assert_eq!(growth.blocks(START, 100), Some(0..100));
        assert_eq!(growth.blocks(START + 99 * BLOCK, 1), Some(99..100));
        for (address, count) in [
            (START, 0),
            (START, 101),
            (START + 99 * BLOCK, 2),
            (START + 100 * BLOCK, 1),
            (START + 4096, 1),
            (START - BLOCK, 1),
            (0, 1),
            (u64::MAX - BLOCK + 1, u16::MAX),
        ] {
            assert_eq!(growth.blocks(address, count), None, "{address:#x} {count}");
        }
    }

    #[test]
    fn what_is_plugged_in_is_covered() {
        let growth = growth(70);
        growth.plug(62..66).unwrap();
        assert_eq!(growth.plugged_bytes(), 4 * BLOCK);
        assert!(growth.covers(62 * BLOCK, 4 << 21));
        assert!(!growth.covers(62 * BLOCK, (4 << 21) + 1));
        assert!(!growth.covers(62 * BLOCK - 1, 1));
        assert!(!growth.covers(u64::MAX, 1));
        assert_eq!(growth.state(62..66), Plugged::All);
        assert_eq!(growth.state(61..66), Plugged::Some);
        assert_eq!(growth.state(0..62), Plugged::Nothing);
        growth.unplug(63..65).unwrap();
        assert_eq!(growth.state(62..66), Plugged::Some);
        assert_eq!(growth.plugged_bytes(), 2 * BLOCK);
    }

    #[test]
    fn a_large_range_has_large_blocks() {
        let block = |bytes| Growth::new(START, bytes).map(|growth| (growth.block(), growth.size()));
        assert_eq!(block(32 << 30), Ok((2 << 20, 32 << 30)));
        assert_eq!(block((32 << 30) + BLOCK), Ok((4 << 20, 32 << 30)));
        assert_eq!(block(1 << 40), Ok((64 << 20, 1 << 40)));
        assert_eq!(block(0), Err(Errno::EINVAL));
    }

    #[test]
    fn all_is_taken_back_at_once() {
        let growth = growth(70);
        for blocks in [0..1, 3..5, 60..70] {
            growth.plug(blocks).unwrap();
        }
        growth.unplug_all().unwrap();
        assert_eq!((growth.plugged_bytes(), growth.state(0..70)), (0, Plugged::Nothing));
        growth.unplug_all().unwrap();
    }

    proptest! {
        /// Against a list of booleans.
        #[test]
        fn any_changes_add_up(changes in prop::collection::vec((0usize..130, 1usize..8, any::<bool>()), 1..60)) {
            let growth = growth(130);
            let mut model = [false; 130];
            for (first, count, plug) in changes {
                let blocks = first..(first + count).min(130);
                model[blocks.clone()].fill(plug);
                if plug { growth.plug(blocks).unwrap() } else { growth.unplug(blocks).unwrap() }
                let plugged = model.iter().filter(|plugged| **plugged).count() as u64;
                prop_assert_eq!(growth.plugged_bytes(), plugged * BLOCK);
            }
            for (block, plugged) in model.iter().enumerate() {
                prop_assert_eq!(growth.covers(block as u64 * BLOCK, 1), *plugged);
            }
        }
    }
}

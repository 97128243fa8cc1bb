//! A table of bounded size whose entries are named by small numbers that are not used again soon.
//!
//! The event loop knows a descriptor by 32 bits. An event that was fetched before its descriptor was closed still
//! arrives, so a name has to tell the entry it was made for from a later one in the same place.

/// Entries of the largest table.
pub const MAX_SLOTS: usize = 1023;

const INDEX_BITS: u32 = 10;
const GENERATION_BITS: u32 = 20;

/// Names an entry of a [`Slots`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId {
    index: u32,
    generation: u32,
}

/// Which descriptor of which entry an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// The device's own descriptors, by number.
    Device(u32),
    /// A connection's source, or its socket.
    Source(SlotId),
    /// A connection's sink.
    Sink(SlotId),
    /// A host program that has not finished its handshake.
    Client(SlotId),
}

impl Token {
    /// As the event loop keeps it.
    pub fn encode(self) -> u32 {
        let (kind, value) = match self {
            Self::Device(number) => (0, number),
            Self::Source(id) => (1, id.pack()),
            Self::Sink(id) => (2, id.pack()),
            Self::Client(id) => (3, id.pack()),
        };
        kind << (INDEX_BITS + GENERATION_BITS) | value
    }

    /// As it was encoded.
    pub fn decode(token: u32) -> Self {
        let value = token & ((1 << (INDEX_BITS + GENERATION_BITS)) - 1);
        let id = SlotId { index: value & ((1 << INDEX_BITS) - 1), generation: value >> INDEX_BITS };
        match token >> (INDEX_BITS + GENERATION_BITS) {
            0 => Self::Device(value),
            1 => Self::Source(id),
            2 => Self::Sink(id),
            _ => Self::Client(id),
        }
    }
}

impl SlotId {
    fn pack(self) -> u32 {
        self.generation << INDEX_BITS | self.index
    }

    fn place(self) -> usize {
        // Ten bits fit.
        usize::try_from(self.index).unwrap_or(usize::MAX)
    }
}

/// The table. It grows with use up to its limit.
#[derive(Debug)]
pub struct Slots<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    limit: usize,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

impl<T> Slots<T> {
    /// A table of at most `limit` entries, and at most [`MAX_SLOTS`].
    pub fn new(limit: usize) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), limit: limit.min(MAX_SLOTS) }
    }

    /// Entries in use.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Entries that can be added.
    pub fn room(&self) -> usize {
        self.limit - self.len()
    }

    /// The name the next entry will get; `None` when the table is full.
    pub fn vacancy(&mut self) -> Option<SlotId> {
        if let Some(&index) = self.free.last() {
            return Some(self.name(index));
        }
        if self.slots.len() == self.limit {
            return None;
        }
        let index = u32::try_from(self.slots.len()).ok()?;
        self.slots.push(Slot { generation: 0, value: None });
        self.free.push(index);
        Some(self.name(index))
    }

    /// Fills the [`Slots::vacancy`].
    pub fn insert(&mut self, value: T) -> Option<SlotId> {
        let id = self.vacancy()?;
        self.free.pop();
        self.slots.get_mut(id.place())?.value = Some(value);
        Some(id)
    }

    /// The entry of this name.
    pub fn get_mut(&mut self, id: SlotId) -> Option<&mut T> {
        let slot = self.slots.get_mut(id.place()).filter(|slot| slot.generation == id.generation)?;
        slot.value.as_mut()
    }

    /// Takes an entry out; its name means nothing any more.
    pub fn remove(&mut self, id: SlotId) -> Option<T> {
        let slot = self.slots.get_mut(id.place()).filter(|slot| slot.generation == id.generation)?;
        let value = slot.value.take()?;
        slot.generation = (slot.generation + 1) & ((1 << GENERATION_BITS) - 1);
        self.free.push(id.index);
        Some(value)
    }

    /// The names of all entries for which `wanted` holds.
    pub fn find(&self, wanted: impl Fn(&T) -> bool) -> Vec<SlotId> {
        let matches = |slot: &Slot<T>| slot.value.as_ref().is_some_and(&wanted);
        (0u32..)
            .zip(&self.slots)
            .filter(|(_, slot)| matches(slot))
            .map(|(index, _)| self.name(index))
            .collect()
    }

    fn name(&self, index: u32) -> SlotId {
        let place = usize::try_from(index).unwrap_or(usize::MAX);
        SlotId { index, generation: self.slots.get(place).map_or(0, |slot| slot.generation) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_dies_with_its_entry() {
        let mut slots = Slots::new(2);
        let first = slots.insert('a').unwrap();
        assert_eq!(slots.remove(first), Some('a'));
        let second = slots.insert('b').unwrap();
        assert_ne!(first, second);
        assert_eq!(slots.get_mut(first), None);
        assert_eq!(slots.remove(first), None);
        assert_eq!(slots.get_mut(second), Some(&mut 'b'));
    }

    #[test]
    fn the_table_has_a_limit() {
        let mut slots = Slots::new(2);
        let vacancy = slots.vacancy().unwrap();
        assert_eq!(slots.len(), 0);
        assert_eq!(slots.insert(1), Some(vacancy));
        assert!(slots.insert(2).is_some());
        assert_eq!((slots.room(), slots.vacancy(), slots.insert(3)), (0, None, None));
        assert_eq!(slots.find(|&value| value == 1), [vacancy]);
    }

    #[test]
    fn tokens_read_back() {
        let id = SlotId { index: 1022, generation: (1 << GENERATION_BITS) - 1 };
        for token in [Token::Device(5), Token::Source(id), Token::Sink(id), Token::Client(id)] {
            assert_eq!(Token::decode(token.encode()), token);
        }
    }

    #[test]
    fn generations_wrap_within_their_bits() {
        let mut slots = Slots::new(1);
        slots.insert(()).unwrap();
        slots.slots[0].generation = (1 << GENERATION_BITS) - 1;
        let last = slots.name(0);
        slots.remove(last).unwrap();
        assert_eq!(slots.insert(()).unwrap().generation, 0);
    }
}

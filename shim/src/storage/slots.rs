//! The VM's disk slots.

use std::sync::{Arc, Mutex, PoisonError};

use super::StorageError;

/// Which slots are taken.
#[derive(Debug, Clone)]
pub struct Slots(Arc<Mutex<Vec<bool>>>);

/// A taken slot; dropping it gives it back.
#[derive(Debug)]
pub struct Slot {
    number: u8,
    slots: Slots,
}

impl Slots {
    /// `count` empty slots.
    pub fn new(count: u8) -> Self {
        Self(Arc::new(Mutex::new(vec![false; count.into()])))
    }

    /// Takes an empty slot.
    ///
    /// # Errors
    /// When there is none.
    pub fn take(&self) -> Result<Slot, StorageError> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let free = taken.iter_mut().zip(0u8..).find(|(taken, _)| !**taken);
        let (flag, number) = free.ok_or(StorageError::NoSlot)?;
        *flag = true;
        Ok(Slot { number, slots: self.clone() })
    }
}

impl Slot {
    /// Its number.
    pub fn number(&self) -> u8 {
        self.number
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.slots.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flag) = taken.get_mut(usize::from(self.number)) {
            *flag = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_taken_once_and_comes_back() {
        let slots = Slots::new(2);
        let (first, second) = (slots.take().unwrap(), slots.take().unwrap());
        assert_eq!((first.number(), second.number()), (0, 1));
        assert!(matches!(slots.take(), Err(StorageError::NoSlot)));
        drop(first);
        assert_eq!(slots.take().unwrap().number(), 0);
    }
}

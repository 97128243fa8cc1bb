//! Who has to be done by when.

use std::collections::BTreeSet;
use std::time::Instant;

/// Deadlines of entries named by `K`, each with at most one.
#[derive(Debug)]
pub struct Deadlines<K>(BTreeSet<(Instant, K)>);

impl<K> Default for Deadlines<K> {
    fn default() -> Self {
        Self(BTreeSet::new())
    }
}

impl<K: Copy + Ord> Deadlines<K> {
    /// Sets a deadline.
    pub fn insert(&mut self, at: Instant, key: K) {
        self.0.insert((at, key));
    }

    /// Lifts it again.
    pub fn remove(&mut self, at: Instant, key: K) {
        self.0.remove(&(at, key));
    }

    /// The next one.
    pub fn next(&self) -> Option<Instant> {
        self.0.first().map(|&(at, _)| at)
    }

    /// Takes one that has passed.
    pub fn pop(&mut self, now: Instant) -> Option<K> {
        let first = *self.0.first()?;
        (first.0 <= now).then(|| {
            self.0.remove(&first);
            first.1
        })
    }

    /// Lifts all.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn deadlines_pass_in_order() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let mut deadlines = Deadlines::default();
        deadlines.insert(now + 2 * second, 'b');
        deadlines.insert(now + second, 'a');
        deadlines.insert(now + 3 * second, 'c');
        deadlines.remove(now + 3 * second, 'c');
        assert_eq!(deadlines.next(), Some(now + second));
        assert_eq!(deadlines.pop(now), None);
        assert_eq!(deadlines.pop(now + 2 * second), Some('a'));
        assert_eq!(deadlines.pop(now + 2 * second), Some('b'));
        assert_eq!(deadlines.pop(now + 9 * second), None);
    }
}

//! Credit: how much each side may send before the other has made room (virtio 1.2, section 5.10.6.3).
//!
//! Counters are 32 bits wide and wrap. Hostile: what the guest says about its own buffer, and how much it sends.

use super::packet::Space;

/// The guest has sent more than it was allowed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the guest sent more than its credit")]
pub struct CreditViolation;

/// What the guest may still send, and what it must be told about it.
#[derive(Debug)]
pub struct Window {
    capacity: u32,
    received: u32,
    forwarded: u32,
    announced: u32,
}

impl Window {
    /// A window that never lets more than `capacity` bytes wait on our side.
    pub fn new(capacity: u32) -> Self {
        Self { capacity, received: 0, forwarded: 0, announced: 0 }
    }

    /// Bytes that can wait at most.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Counts payload that has arrived.
    ///
    /// # Errors
    /// When it exceeds what the guest has been told it may send.
    pub fn receive(&mut self, len: u32) -> Result<(), CreditViolation> {
        let unacknowledged = self.received.wrapping_sub(self.announced);
        if len > self.capacity.saturating_sub(unacknowledged) {
            return Err(CreditViolation);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// Counts payload that waits no more: it was written or dropped.
    pub fn forward(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// Whether the guest would soon stop for lack of news. Half the window keeps updates rare, and leaves the guest
    /// the other half to send from while the update travels.
    pub fn wants_announcement(&self) -> bool {
        self.forwarded.wrapping_sub(self.announced) >= self.capacity / 2
    }

    /// What the header of a packet to the guest says.
    pub fn space(&self) -> Space {
        Space { capacity: self.capacity, forwarded: self.forwarded }
    }

    /// The packet is on its way; the guest may count on what it says.
    pub fn announce(&mut self) -> Space {
        self.announced = self.forwarded;
        self.space()
    }
}

/// What we may still send to the guest.
#[derive(Debug)]
pub struct Allowance {
    space: Space,
    sent: u32,
}

impl Allowance {
    /// Nothing has been sent yet to a guest with this receive buffer.
    pub fn new(space: Space) -> Self {
        Self { space, sent: space.forwarded }
    }

    /// Takes in what a packet of the guest says; `false` when its count is impossible. Such a count is ignored: it is
    /// old news or a lie, and believing it could only overrun the guest.
    pub fn update(&mut self, space: Space) -> bool {
        self.space.capacity = space.capacity;
        let progress = space.forwarded.wrapping_sub(self.space.forwarded);
        let sound = progress <= self.in_flight();
        if sound {
            self.space.forwarded = space.forwarded;
        }
        sound
    }

    /// Bytes that may be sent now.
    pub fn available(&self) -> u32 {
        self.space.capacity.saturating_sub(self.in_flight())
    }

    /// Counts payload that was sent.
    pub fn send(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.space.forwarded)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_guest_may_fill_the_window_but_not_more() {
        let mut window = Window::new(100);
        assert_eq!(window.receive(60), Ok(()));
        assert_eq!(window.receive(40), Ok(()));
        assert_eq!(window.receive(1), Err(CreditViolation));
    }

    #[test]
    fn room_counts_only_once_it_is_announced() {
        let mut window = Window::new(100);
        window.receive(100).unwrap();
        window.forward(100);
        assert_eq!(window.receive(1), Err(CreditViolation));
        assert!(window.wants_announcement());
        assert_eq!(window.announce(), Space { capacity: 100, forwarded: 100 });
        assert_eq!(window.receive(100), Ok(()));
    }

    #[test]
    fn a_lie_about_progress_gives_no_credit() {
        let mut allowance = Allowance::new(Space { capacity: 10, forwarded: 0 });
        allowance.send(10);
        assert!(!allowance.update(Space { capacity: 10, forwarded: 11 }));
        assert_eq!(allowance.available(), 0);
        assert!(allowance.update(Space { capacity: 10, forwarded: 4 }));
        assert_eq!(allowance.available(), 4);
        assert!(!allowance.update(Space { capacity: 10, forwarded: 3 }));
        assert_eq!(allowance.available(), 4);
    }

    #[test]
    fn a_shrinking_buffer_stops_us() {
        let mut allowance = Allowance::new(Space { capacity: 10, forwarded: 0 });
        allowance.send(8);
        assert!(allowance.update(Space { capacity: 4, forwarded: 0 }));
        assert_eq!(allowance.available(), 0);
    }

    proptest! {
        /// Each side's model of the other agrees over any history, counters wrapping included.
        #[test]
        fn both_sides_agree(
            start: u32,
            steps in prop::collection::vec((0u32..200, 0u32..200, any::<bool>()), 1..200),
        ) {
            let mut window =
                Window { capacity: 128, received: start, forwarded: start, announced: start };
            let mut allowance = Allowance::new(window.announce());
            let mut waiting = 0;
            for (send, forward, announce) in steps {
                let send = send.min(allowance.available());
                prop_assert_eq!(window.receive(send), Ok(()));
                allowance.send(send);
                waiting += send;
                prop_assert!(waiting <= window.capacity());
                let forward = forward.min(waiting);
                window.forward(forward);
                waiting -= forward;
                if announce || window.wants_announcement() {
                    prop_assert!(allowance.update(window.announce()));
                }
                // Nobody stops for good: with nothing waiting there is always something to send.
                if waiting == 0 {
                    prop_assert!(allowance.available() > 0);
                }
            }
        }
    }
}

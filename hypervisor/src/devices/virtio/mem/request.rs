//! What a guest asks of the device, and what it is answered (virtio 1.2, section 5.15.6).

use crate::memory::{Growth, Plugged};

/// A request as the guest has written it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Plug in blocks of which none is.
    Plug(Blocks),
    /// Unplug blocks which all are plugged in.
    Unplug(Blocks),
    /// Unplug whatever is plugged in.
    UnplugAll,
    /// Tell how blocks are.
    State(Blocks),
}

/// A guest address and a number of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// As the guest names it.
    pub address: u64,
    /// As the guest names it.
    pub count: u16,
}

/// What the guest is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Done,
    /// More than the guest shall have.
    Refused,
    /// The host cannot do it now; the driver tries again later.
    Busy,
    /// A request that no driver should make.
    Error,
    /// How the blocks are.
    State(Plugged),
}

impl Request {
    /// Bytes of a request.
    pub const BYTES: usize = 24;

    /// None for a type that there is not.
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let [kind_low, kind_high, _, _, _, _, _, _, a, b, c, d, e, f, g, h, count_low, count_high, ..] =
            *bytes;
        let blocks = Blocks {
            address: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            count: u16::from_le_bytes([count_low, count_high]),
        };
        match u16::from_le_bytes([kind_low, kind_high]) {
            0 => Some(Self::Plug(blocks)),
            1 => Some(Self::Unplug(blocks)),
            2 => Some(Self::UnplugAll),
            3 => Some(Self::State(blocks)),
            _ => None,
        }
    }

    /// Does what is asked, where a driver may ask it of a device of which it shall have `requested` bytes.
    pub fn apply(self, growth: &Growth, requested: u64) -> Answer {
        match self {
            Self::Plug(blocks) => plug(growth, blocks, requested),
            Self::Unplug(blocks) => unplug(growth, blocks),
            Self::UnplugAll => done_or_busy(growth.unplug_all()),
            Self::State(Blocks { address, count }) => match growth.blocks(address, count) {
                Some(blocks) => Answer::State(growth.state(blocks)),
                None => Answer::Error,
            },
        }
    }
}

fn plug(growth: &Growth, Blocks { address, count }: Blocks, requested: u64) -> Answer {
    let Some(blocks) = growth.blocks(address, count) else { return Answer::Error };
    if growth.state(blocks.clone()) != Plugged::Nothing {
        return Answer::Error;
    }
    // Neither can overflow: both are bytes of the range.
    if growth.plugged_bytes() + u64::from(count) * growth.block() > requested {
        return Answer::Refused;
    }
    done_or_busy(growth.plug(blocks))
}

fn unplug(growth: &Growth, Blocks { address, count }: Blocks) -> Answer {
    let Some(blocks) = growth.blocks(address, count) else { return Answer::Error };
    if growth.state(blocks.clone()) != Plugged::All {
        return Answer::Error;
    }
    done_or_busy(growth.unplug(blocks))
}

fn done_or_busy<E>(result: Result<(), E>) -> Answer {
    if result.is_ok() { Answer::Done } else { Answer::Busy }
}

impl Answer {
    /// Bytes of an answer.
    pub const BYTES: usize = 10;

    /// As the guest reads it.
    pub fn encode(self) -> [u8; Self::BYTES] {
        let (kind, state) = match self {
            Self::Done => (0, 0),
            Self::Refused => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
            Self::State(Plugged::All) => (0, 0),
            Self::State(Plugged::Nothing) => (0, 1),
            Self::State(Plugged::Some) => (0, 2),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::{BLOCK, GuestRam};

    const ALL: u64 = 100 * BLOCK;

    fn blocks(growth: &Growth, first: u64, count: u16) -> Blocks {
        Blocks { address: growth.start() + first * BLOCK, count }
    }

    fn ram() -> GuestRam {
        GuestRam::growing(1 << 20, ALL).unwrap()
    }

    #[test]
    fn a_driver_plugs_and_unplugs_what_it_may() {
        let ram = ram();
        let growth = ram.growth().unwrap();
        let ask = |request: Request, requested| request.apply(growth, requested);
        let at = |first, count| blocks(growth, first, count);
        assert_eq!(ask(Request::Plug(at(0, 4)), 3 * BLOCK), Answer::Refused);
        assert_eq!(ask(Request::Plug(at(0, 4)), 4 * BLOCK), Answer::Done);
        assert_eq!(ask(Request::Plug(at(4, 1)), 4 * BLOCK), Answer::Refused);
        assert_eq!(ask(Request::Plug(at(3, 2)), ALL), Answer::Error);
        assert_eq!(ask(Request::State(at(0, 4)), 0), Answer::State(Plugged::All));
        assert_eq!(ask(Request::State(at(3, 2)), 0), Answer::State(Plugged::Some));
        assert_eq!(ask(Request::Unplug(at(3, 2)), 0), Answer::Error);
        assert_eq!(ask(Request::Unplug(at(1, 3)), 0), Answer::Done);
        assert_eq!(growth.plugged_bytes(), BLOCK);
        assert_eq!(ask(Request::UnplugAll, 0), Answer::Done);
        assert_eq!(ask(Request::UnplugAll, 0), Answer::Done);
        assert_eq!(ask(Request::State(at(0, 100)), 0), Answer::State(Plugged::Nothing));
    }

    #[test]
    fn blocks_that_are_not_there_are_errors() {
        let ram = ram();
        let growth = ram.growth().unwrap();
        let start = growth.start();
        for (address, count) in [(start + 1, 1), (start, 0), (start, 101), (start - BLOCK, 1), (0, 1)] {
            let blocks = Blocks { address, count };
            for request in [Request::Plug(blocks), Request::Unplug(blocks), Request::State(blocks)] {
                assert_eq!(request.apply(growth, ALL), Answer::Error, "{request:?}");
            }
        }
    }

    #[test]
    fn answers_are_written_as_the_specification_says() {
        assert_eq!(Answer::Refused.encode(), [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Answer::State(Plugged::Some).encode(), [0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_none(bytes: [u8; Request::BYTES], requested in 0..=ALL) {
            let ram = ram();
            let growth = ram.growth().unwrap();
            if let Some(request) = Request::parse(&bytes) {
                request.apply(growth, requested);
            }
            prop_assert!(growth.plugged_bytes() <= requested);
        }

        /// Whatever a guest asks, it has no more than it shall have had at any time, and what it is told is so.
        #[test]
        fn nothing_is_plugged_in_beyond_what_is_requested(
            asked in prop::collection::vec((0u16..5, -2i64..105, 0u16..9, any::<bool>(), 0..=100u64), 1..60)
        ) {
            let ram = ram();
            let growth = ram.growth().unwrap();
            for (kind, first, count, aligned, requested) in asked {
                let offset = first * BLOCK.cast_signed() + if aligned { 0 } else { 4096 };
                let address = growth.start().wrapping_add_signed(offset);
                let mut bytes = [0; Request::BYTES];
                bytes[..2].copy_from_slice(&kind.to_le_bytes());
                bytes[8..16].copy_from_slice(&address.to_le_bytes());
                bytes[16..18].copy_from_slice(&count.to_le_bytes());
                let before = growth.plugged_bytes();
                let answer = Request::parse(&bytes)
                    .map_or(Answer::Error, |request| request.apply(growth, requested * BLOCK));
                let after = growth.plugged_bytes();
                let whole = aligned && count > 0 && first >= 0 && first + i64::from(count) <= 100;
                match (kind, answer) {
                    (0, Answer::Done) => {
                        prop_assert!(whole);
                        prop_assert_eq!(after, before + u64::from(count) * BLOCK);
                        prop_assert!(after <= requested * BLOCK);
                    }
                    (1, Answer::Done) => prop_assert_eq!(after + u64::from(count) * BLOCK, before),
                    (2, answer) => prop_assert_eq!((answer, after), (Answer::Done, 0)),
                    (_, answer) => {
                        prop_assert_eq!(after, before);
                        prop_assert!(answer != Answer::Done && answer != Answer::Busy);
                    }
                }
            }
        }
    }
}

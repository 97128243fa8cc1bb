//! The header in front of each frame (virtio 1.2, section 5.1.6).
//!
//! The host's kernel makes of it how a checksum is completed and a packet cut into pieces. It checks what it is given,
//! but has been wrong about that before; so nothing reaches it that the guest has not negotiated or that points outside
//! the frame. The header is read once and what is written to the tap is a copy.

use super::feature;

/// Bytes of a header with the number of buffers.
pub const HEADER: usize = 12;

/// Where in the header the number of buffers is.
pub const BUFFERS_AT: u64 = 10;

const NEEDS_CSUM: u8 = 1;

mod gso {
    pub const NONE: u8 = 0;
    pub const TCPV4: u8 = 1;
    pub const TCPV6: u8 = 4;
    pub const ECN: u8 = 0x80;
}

/// The smallest segment that any TCP makes: the least MSS of Linux, less its options. Smaller ones would only make the
/// host cut one frame into thousands.
const MIN_SEGMENT: u16 = 8;

/// The header that goes to the tap in front of a frame of `frame` bytes. None where the guest's is malformed.
pub fn checked(guest: [u8; HEADER], frame: usize, features: u64) -> Option<[u8; HEADER]> {
    let [flags, gso_type, h0, h1, s0, s1, c0, c1, o0, o1, ..] = guest;
    let (header_len, segment) = (u16::from_le_bytes([h0, h1]), u16::from_le_bytes([s0, s1]));
    let (start, offset) = (u16::from_le_bytes([c0, c1]), u16::from_le_bytes([o0, o1]));
    let mut header = [0; HEADER];
    if flags & NEEDS_CSUM != 0 {
        let end = usize::from(start) + usize::from(offset) + 2;
        if features & feature::CSUM == 0 || end > frame {
            return None;
        }
        header[0] = NEEDS_CSUM;
        header[6..8].copy_from_slice(&start.to_le_bytes());
        header[8..10].copy_from_slice(&offset.to_le_bytes());
    }
    if gso_type != gso::NONE {
        let needed = match gso_type & !gso::ECN {
            gso::TCPV4 => feature::HOST_TSO4,
            gso::TCPV6 => feature::HOST_TSO6,
            _ => return None,
        };
        let marked = if gso_type & gso::ECN != 0 { feature::HOST_ECN } else { 0 };
        let sound = features & (needed | marked) == needed | marked
            && header[0] == NEEDS_CSUM
            && segment >= MIN_SEGMENT
            && usize::from(header_len) <= frame;
        if !sound {
            return None;
        }
        header[1] = gso_type;
        header[2..4].copy_from_slice(&header_len.to_le_bytes());
        header[4..6].copy_from_slice(&segment.to_le_bytes());
    }
    Some(header)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 = super::super::FEATURES;

    fn header(
        flags: u8,
        gso_type: u8,
        header_len: u16,
        segment: u16,
        start: u16,
        offset: u16,
    ) -> [u8; HEADER] {
        let mut bytes = [0xee; HEADER];
        (bytes[0], bytes[1]) = (flags, gso_type);
        for (place, value) in [header_len, segment, start, offset].into_iter().enumerate() {
            bytes[2 + 2 * place..4 + 2 * place].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn a_plain_frame_keeps_nothing_of_its_header() {
        assert_eq!(checked(header(0, 0, 7, 7, 7, 7), 60, 0), Some([0; HEADER]));
        // A bit that says something about what the guest receives.
        assert_eq!(checked(header(2, 0, 0, 0, 0, 0), 60, ALL), Some([0; HEADER]));
    }

    #[test]
    fn a_checksum_must_be_negotiated_and_inside_the_frame() {
        let wanted = header(1, 0, 0, 0, 34, 16);
        assert_eq!(checked(wanted, 52, ALL).unwrap()[..10], [1, 0, 0, 0, 0, 0, 34, 0, 16, 0]);
        assert_eq!(checked(wanted, 51, ALL), None);
        assert_eq!(checked(wanted, 52, ALL & !feature::CSUM), None);
        assert_eq!(checked(header(1, 0, 0, 0, u16::MAX, u16::MAX), 65000, ALL), None);
    }

    #[test]
    fn segmentation_must_be_negotiated_and_sensible() {
        let wanted = |kind, segment| header(1, kind, 54, segment, 34, 16);
        for (kind, needed) in [(1, feature::HOST_TSO4), (4, feature::HOST_TSO6), (0x81, feature::HOST_ECN)] {
            assert_eq!(checked(wanted(kind, 1448), 9000, ALL).unwrap()[..10], wanted(kind, 1448)[..10]);
            assert_eq!(checked(wanted(kind, 1448), 9000, ALL & !needed), None);
        }
        for kind in [2, 3, 5, 0x80, 0xff] {
            assert_eq!(checked(wanted(kind, 1448), 9000, ALL), None, "{kind}");
        }
        assert_eq!(checked(wanted(1, 7), 9000, ALL), None);
        assert_eq!(checked(header(1, 1, 9001, 1448, 34, 16), 9000, ALL), None);
        // Without a checksum to complete there is nothing to cut.
        assert_eq!(checked(header(0, 1, 54, 1448, 34, 16), 9000, ALL), None);
    }

    proptest! {
        #[test]
        fn what_passes_points_into_the_frame(guest: [u8; HEADER], frame in 0usize..70_000, features: u64) {
            if let Some(bytes) = checked(guest, frame, features) {
                let word = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
                prop_assert!(bytes[0] <= 1 && word(10) == 0);
                prop_assert!(bytes[0] == 0 || word(6) + word(8) + 2 <= frame);
                prop_assert!(word(2) <= frame);
                prop_assert!(bytes[1] == 0 || bytes[0] == 1 && word(4) >= 8);
            }
        }
    }
}

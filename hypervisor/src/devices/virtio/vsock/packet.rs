//! The header of a vsock packet (virtio 1.2, section 5.10.6) as plain values.
//!
//! Hostile: every field of a header that comes from the guest. It is decoded once, from a private copy, and nothing
//! reads guest memory for it again.

use vmshim_protocol::vsock::{GUEST_CID, HOST_CID};

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;

/// Bytes of payload in the largest packet, either way.
pub const MAX_PAYLOAD: u32 = 64 * 1024;

/// The only socket type offered (`VIRTIO_VSOCK_TYPE_STREAM`).
const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of the packet will read no more.
pub const SHUTDOWN_RECEIVE: u32 = 1 << 0;

/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender of the packet will send no more.
pub const SHUTDOWN_SEND: u32 = 1 << 1;

/// Both directions of a connection.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for. Codes nobody has defined are kept, to be answered with a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Grants it.
    Response,
    /// Refuses it, or ends it in both directions.
    Reset,
    /// Ends one direction or both.
    Shutdown,
    /// Carries payload.
    ReadWrite,
    /// Tells the sender's free space.
    CreditUpdate,
    /// Asks for a credit update.
    CreditRequest,
    /// None of the above.
    Unknown(u16),
}

impl Op {
    fn from_code(code: u16) -> Self {
        match code {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }

    fn code(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::ReadWrite => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
            Self::Unknown(other) => other,
        }
    }
}

/// The two ports that name a connection; the context ids are always the guest's and the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ports {
    /// On the guest's side.
    pub guest: u32,
    /// On the host's side.
    pub host: u32,
}

/// The receive buffer of a packet's sender, as each packet repeats it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Space {
    /// `buf_alloc`: bytes the buffer holds.
    pub capacity: u32,
    /// `fwd_cnt`: bytes ever taken out of the buffer, wrapping.
    pub forwarded: u32,
}

/// A decoded header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Sender's context id.
    pub source_cid: u64,
    /// Receiver's context id.
    pub destination_cid: u64,
    /// Sender's port.
    pub source_port: u32,
    /// Receiver's port.
    pub destination_port: u32,
    /// Bytes of payload that follow.
    pub len: u32,
    /// Socket type.
    pub socket_type: u16,
    /// What the packet is for.
    pub op: Op,
    /// `SHUTDOWN_*`.
    pub flags: u32,
    /// The sender's receive buffer.
    pub space: Space,
}

impl Header {
    /// A packet of `len` bytes from the host to the guest.
    pub fn to_guest(ports: Ports, op: Op, len: u32, flags: u32, space: Space) -> Self {
        Self {
            source_cid: u64::from(HOST_CID),
            destination_cid: u64::from(GUEST_CID),
            source_port: ports.host,
            destination_port: ports.guest,
            len,
            socket_type: TYPE_STREAM,
            op,
            flags,
            space,
        }
    }

    /// The reset that answers a packet of the guest which belongs to no connection; `None` when the packet is a reset
    /// itself, which is never answered. It turns the packet's own addresses and type round, so that the guest's
    /// socket layer finds who sent it.
    pub fn reset_in_answer(&self) -> Option<Self> {
        if self.op == Op::Reset {
            return None;
        }
        Some(Self {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            len: 0,
            socket_type: self.socket_type,
            op: Op::Reset,
            flags: 0,
            space: Space::default(),
        })
    }

    /// The connection a packet of the guest belongs to; `None` unless it is a stream packet from the guest to the
    /// host.
    pub fn connection(&self) -> Option<Ports> {
        let addressed =
            self.source_cid == u64::from(GUEST_CID) && self.destination_cid == u64::from(HOST_CID);
        (addressed && self.socket_type == TYPE_STREAM)
            .then_some(Ports { guest: self.source_port, host: self.destination_port })
    }

    /// Whether `len` is one that a packet of this kind may have.
    pub fn has_sound_length(&self) -> bool {
        match self.op {
            Op::ReadWrite => self.len <= MAX_PAYLOAD,
            _ => self.len == 0,
        }
    }

    /// Reads the wire format.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut fields = Fields(bytes);
        Self {
            source_cid: u64::from_le_bytes(fields.next()),
            destination_cid: u64::from_le_bytes(fields.next()),
            source_port: u32::from_le_bytes(fields.next()),
            destination_port: u32::from_le_bytes(fields.next()),
            len: u32::from_le_bytes(fields.next()),
            socket_type: u16::from_le_bytes(fields.next()),
            op: Op::from_code(u16::from_le_bytes(fields.next())),
            flags: u32::from_le_bytes(fields.next()),
            space: Space {
                capacity: u32::from_le_bytes(fields.next()),
                forwarded: u32::from_le_bytes(fields.next()),
            },
        }
    }

    /// Writes the wire format.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.code().to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.space.capacity.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.space.forwarded.to_le_bytes());
        bytes
    }
}

/// Takes fields of a header one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn next<const N: usize>(&mut self) -> [u8; N] {
        // The fields add up to the array that `decode` starts with; a shortage would read as zeros.
        let Some((field, rest)) = self.0.split_first_chunk() else { return [0; N] };
        self.0 = rest;
        *field
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn wire_format_reads_back(bytes: [u8; HEADER_LEN]) {
            prop_assert_eq!(Header::decode(&bytes).encode(), bytes);
        }
    }

    #[test]
    fn fields_stand_where_the_specification_has_them() {
        let mut bytes = [0; HEADER_LEN];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::try_from(at).unwrap();
        }
        let header = Header::decode(&bytes);
        assert_eq!(header.source_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.destination_port, 0x1716_1514);
        assert_eq!(header.len, 0x1b1a_1918);
        assert_eq!(header.socket_type, 0x1d1c);
        assert_eq!(header.op, Op::Unknown(0x1f1e));
        assert_eq!(header.flags, 0x2322_2120);
        assert_eq!(header.space, Space { capacity: 0x2726_2524, forwarded: 0x2b2a_2928 });
    }

    #[test]
    fn only_streams_between_this_guest_and_the_host_have_a_connection() {
        let ports = Ports { guest: 7, host: 9 };
        let good = Header {
            source_cid: u64::from(GUEST_CID),
            destination_cid: u64::from(HOST_CID),
            source_port: 7,
            destination_port: 9,
            ..Header::to_guest(ports, Op::Request, 0, 0, Space::default())
        };
        assert_eq!(good.connection(), Some(ports));
        assert_eq!(Header { source_cid: 4, ..good }.connection(), None);
        assert_eq!(Header { source_cid: 3 | 1 << 32, ..good }.connection(), None);
        assert_eq!(Header { destination_cid: 1, ..good }.connection(), None);
        assert_eq!(Header { socket_type: 2, ..good }.connection(), None);
    }

    #[test]
    fn a_reset_is_never_answered() {
        let reset = Header::to_guest(Ports { guest: 1, host: 2 }, Op::Reset, 0, 0, Space::default());
        assert_eq!(reset.reset_in_answer(), None);
    }
}

//! What the driver asks of the device through the control queue (virtio 1.2, section 5.1.6.5): how many queue pairs it
//! uses, and nothing else, since nothing else is offered.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use crate::devices::virtio::service::Chain;
use crate::memory::GuestRam;

/// `VIRTIO_NET_CTRL_MQ` and `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`.
const SET_PAIRS: [u8; 2] = [4, 0];

/// Bytes of a command: its class, what it is, and a number.
const COMMAND: usize = 4;

const OK: u8 = 0;
const ERROR: u8 = 1;

/// Descriptors of one command. Linux sends one for what the command is, one for its number, and one for the answer.
const MAX_PIECES: usize = 8;

/// Answers a command; `set_pairs` says whether so many pairs are used from now on. Returns how many bytes were written,
/// which is none where the driver has left no place for an answer. Then nothing is done either.
pub fn answer(memory: &GuestRam, chain: Chain, set_pairs: impl FnOnce(u16) -> bool) -> u32 {
    let Some(request) = Request::parse(memory, chain) else { return 0 };
    let done = request.pairs.is_some_and(set_pairs);
    let answer = if done { OK } else { ERROR };
    u32::from(memory.write_slice(&[answer], request.answer).is_ok())
}

struct Request {
    /// None where something else is asked for.
    pairs: Option<u16>,
    answer: GuestAddress,
}

impl Request {
    fn parse(memory: &GuestRam, chain: Chain) -> Option<Self> {
        let pieces: Vec<Descriptor> = chain.take(MAX_PIECES).collect();
        let answer = pieces.iter().find(|piece| piece.is_write_only() && piece.len() > 0)?.addr();
        let read = pieces.iter().take_while(|piece| !piece.is_write_only());
        Some(Self { pairs: command(memory, read).and_then(pairs), answer })
    }
}

/// The command in these pieces. None where it has another length.
fn command<'a>(memory: &GuestRam, pieces: impl Iterator<Item = &'a Descriptor>) -> Option<[u8; COMMAND]> {
    let mut command = [0; COMMAND];
    let mut rest = &mut command[..];
    for piece in pieces {
        let len = usize::try_from(piece.len()).ok()?;
        let (now, later) = rest.split_at_mut_checked(len)?;
        memory.read_slice(now, piece.addr()).ok()?;
        rest = later;
    }
    rest.is_empty().then_some(command)
}

fn pairs([class, what, low, high]: [u8; COMMAND]) -> Option<u16> {
    ([class, what] == SET_PAIRS).then_some(u16::from_le_bytes([low, high]))
}

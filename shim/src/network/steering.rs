//! Steering connections within a network namespace to one socket, by a BPF program at the kernel's search for a
//! listener (`sk_lookup`).
//!
//! The program is attached by a link that goes away with its descriptor, so nothing is left in the namespace.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use vmshim_protocol::bpf::{self, Hook, MapKind, Program, Register};

/// Offsets in `struct bpf_sk_lookup`.
mod context {
    pub const PROTOCOL: i16 = 12;
    pub const LOCAL_PORT: i16 = 60;
}

const TCP: i32 = 6;
const PASS: i32 = 1;

/// Steers every TCP connection that the network namespace takes in itself, whichever of its addresses it is to, to
/// `listener`, unless it is to one of the ports in `except`, for as long as what is returned is kept. What comes in by an
/// interface that is the guest's never gets that far.
///
/// # Errors
/// When the kernel refuses: it has no BPF, or is older than 5.9.
pub fn steer_all(
    netns: impl AsFd,
    listener: impl AsFd,
    except: impl Iterator<Item = u16>,
) -> io::Result<OwnedFd> {
    let sockets = bpf::create_map(MapKind::Sockets, 1)?;
    bpf::put_socket(&sockets, 0, &listener)?;
    let program = bpf::load(Hook::SocketLookup, &program(&sockets, except))?;
    bpf::attach(&program, netns, Hook::SocketLookup)
}

/// The program. A listener that has gone, or is not of the connection's family, lets the kernel search on.
fn program(sockets: &OwnedFd, except: impl Iterator<Item = u16>) -> Vec<u64> {
    use Register::{R1, R2, R6};
    let mut program = Program::default();
    let pass = program.label();
    program.copy(R6, R1);
    program.load(R2, R1, context::PROTOCOL);
    program.jump_unless(R2, TCP, pass);
    program.load(R2, R6, context::LOCAL_PORT);
    for port in except {
        program.jump_if(R2, port.into(), pass);
    }
    program.keep_number(-4, 0);
    program.assign_socket(sockets, -4, pass);
    program.place(pass);
    program.end(PASS);
    program.instructions()
}

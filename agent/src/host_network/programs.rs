//! The programs by which the guest's kernel finds out what is not the guest's own.
//!
//! Two tables are kept by programs of the containers' cgroup: which port each socket has that was bound, or has sent a
//! datagram, and how many sockets a port has. A program at the search for a socket looks there: what goes to a loopback
//! address and a port that a container has is the guest's, everything else goes to the agent's own two sockets. The
//! agent is outside of that cgroup, so its own sockets never count. When a TCP socket that was bound is closed, a record
//! says so.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use vmshim_protocol::bpf::{self, Function, Hook, MapKind, Program, Register};

use Register::{R0, R1, R2, R3, R4, R6, R7, R8};

/// Sockets that are known at a time. One too many is taken for none.
const MOST_SOCKETS: u32 = 16_384;
/// Ports that have ever been used. The table only grows.
const MOST_PORTS: u32 = 131_072;
/// The size of the ring of closed sockets' numbers, in bytes.
pub const RING_SIZE: u32 = 64 * 1024;

const TCP: i32 = 6;
const UDP: i32 = 17;
const INET: i32 = 2;
const INET6: i32 = 10;
/// `htonl(1)`, the last word of ::1.
const ONE: i32 = 0x0100_0000;
/// What each of these programs answers: go on.
const ON: i32 = 1;
/// `BPF_NOEXIST`
const NEW: i32 = 1;

/// Places on the programs' stacks.
const KEY: i16 = -4;
const COUNT: i16 = -8;
const COOKIE: i16 = -16;

/// Offsets in `struct bpf_sk_lookup`.
mod lookup {
    pub const FAMILY: i16 = 8;
    pub const PROTOCOL: i16 = 12;
    pub const LOCAL_V4: i16 = 40;
    pub const LOCAL_V6: i16 = 44;
    pub const LOCAL_PORT: i16 = 60;
}

/// Offsets in `struct bpf_sock`.
mod socket {
    pub const PROTOCOL: i16 = 12;
    pub const SOURCE_PORT: i16 = 44;
}

/// Offsets in `struct bpf_sock_addr`.
mod sending {
    pub const PROTOCOL: i16 = 36;
    pub const SOCKET: i16 = 64;
}

/// The agent's sockets in their map.
const TCP_SOCKET: u32 = 0;
const UDP_SOCKET: u32 = 1;

/// What the programs share.
struct Maps {
    /// A socket's number to its protocol and port, as one word.
    sockets: OwnedFd,
    /// Protocol and port to how many sockets there are.
    ports: OwnedFd,
    /// The agent's.
    own: OwnedFd,
    /// Numbers of closed sockets.
    closed: OwnedFd,
}

/// The programs in force, until this is dropped.
#[derive(Debug)]
pub struct Programs {
    _links: Vec<OwnedFd>,
}

impl Maps {
    fn new() -> io::Result<Self> {
        Ok(Self {
            sockets: bpf::create_map(MapKind::Hash { key: 8, value: 4 }, MOST_SOCKETS)?,
            ports: bpf::create_map(MapKind::Hash { key: 4, value: 4 }, MOST_PORTS)?,
            own: bpf::create_map(MapKind::Sockets, 2)?,
            closed: bpf::create_map(MapKind::Ring, RING_SIZE)?,
        })
    }

    /// The programs of the containers' cgroup.
    fn of_cgroup(&self) -> [(Hook, Vec<u64>); 5] {
        [
            (Hook::AfterBind4, bound(self)),
            (Hook::AfterBind6, bound(self)),
            (Hook::Send4, sent(self)),
            (Hook::Send6, sent(self)),
            (Hook::SocketRelease, released(self)),
        ]
    }
}

/// Puts the programs into force for processes of `cgroup` and for connections in `netns`: what is not the guest's goes
/// to `tcp` and `udp`. Comes with the ring of the numbers of TCP sockets that have been closed.
pub fn enforce(
    cgroup: impl AsFd,
    netns: impl AsFd,
    tcp: impl AsFd,
    udp: impl AsFd,
) -> io::Result<(Programs, OwnedFd)> {
    let maps = Maps::new()?;
    bpf::put_socket(&maps.own, TCP_SOCKET, tcp)?;
    bpf::put_socket(&maps.own, UDP_SOCKET, udp)?;
    let mut links = Vec::new();
    for (hook, instructions) in maps.of_cgroup() {
        links.push(bpf::attach(&bpf::load(hook, &instructions)?, &cgroup, hook)?);
    }
    let search = bpf::load(Hook::SocketLookup, &searched(&maps))?;
    links.push(bpf::attach(&search, netns, Hook::SocketLookup)?);
    Ok((Programs { _links: links }, maps.closed))
}

/// A socket has been bound.
fn bound(maps: &Maps) -> Vec<u64> {
    let mut program = Program::default();
    program.copy(R6, R1);
    program.load(R7, R6, socket::PROTOCOL);
    program.load(R8, R6, socket::SOURCE_PORT);
    remember(program, maps)
}

/// A socket sends a datagram, and has a port by now.
fn sent(maps: &Maps) -> Vec<u64> {
    let mut program = Program::default();
    program.copy(R6, R1);
    program.load(R7, R6, sending::PROTOCOL);
    program.load_double(R1, R6, sending::SOCKET);
    program.load(R8, R1, socket::SOURCE_PORT);
    remember(program, maps)
}

/// Counts the socket of the context `R6`, of protocol `R7` and port `R8`, unless it has been counted.
fn remember(mut program: Program, maps: &Maps) -> Vec<u64> {
    let (known, counted, done) = (program.label(), program.label(), program.label());
    program.jump_if(R7, TCP, known);
    program.jump_unless(R7, UDP, done);
    program.place(known);
    program.jump_if(R8, 0, done);
    program.shift_left(R7, 16);
    program.or(R7, R8);
    program.keep(KEY, R7);
    program.copy(R1, R6);
    program.call(Function::SocketCookie);
    program.keep_double(COOKIE, R0);
    update(&mut program, &maps.sockets, COOKIE, KEY);
    program.jump_unless(R0, 0, done);
    program.find(&maps.ports, KEY);
    program.jump_unless(R0, 0, counted);
    program.keep_number(COUNT, 1);
    update(&mut program, &maps.ports, KEY, COUNT);
    program.jump_if(R0, 0, done);
    // Another CPU was first.
    program.find(&maps.ports, KEY);
    program.jump_if(R0, 0, done);
    program.place(counted);
    program.set(R1, 1);
    program.add_atomically(R0, R1);
    program.place(done);
    program.end(ON);
    program.instructions()
}

/// A socket is no more.
fn released(maps: &Maps) -> Vec<u64> {
    let mut program = Program::default();
    let (told, done) = (program.label(), program.label());
    program.call(Function::SocketCookie);
    program.keep_double(COOKIE, R0);
    program.find(&maps.sockets, COOKIE);
    program.jump_if(R0, 0, done);
    program.load(R7, R0, 0);
    program.keep(KEY, R7);
    program.map(R1, &maps.sockets);
    program.stack(R2, COOKIE.into());
    program.call(Function::Delete);
    program.find(&maps.ports, KEY);
    program.jump_if(R0, 0, told);
    program.set(R1, -1);
    program.add_atomically(R0, R1);
    program.place(told);
    program.shift_right(R7, 16);
    program.jump_unless(R7, TCP, done);
    program.map(R1, &maps.closed);
    program.stack(R2, COOKIE.into());
    program.set(R3, 8);
    program.set(R4, 0);
    program.call(Function::WriteRing);
    program.place(done);
    program.end(ON);
    program.instructions()
}

/// The kernel searches for the socket of a connection or a datagram.
fn searched(maps: &Maps) -> Vec<u64> {
    let mut program = Program::default();
    let (search, v6, local) = (program.label(), program.label(), program.label());
    let (ours, on) = (program.label(), program.label());
    program.copy(R6, R1);
    program.load(R7, R6, lookup::PROTOCOL);
    program.set(R8, TCP_SOCKET.cast_signed());
    program.jump_if(R7, TCP, search);
    program.set(R8, UDP_SOCKET.cast_signed());
    program.jump_unless(R7, UDP, on);
    program.place(search);
    program.load(R2, R6, lookup::FAMILY);
    program.jump_if(R2, INET6, v6);
    program.jump_unless(R2, INET, on);
    program.load(R2, R6, lookup::LOCAL_V4);
    program.and(R2, 0xff);
    program.jump_if(R2, 127, local);
    program.jump(ours);
    program.place(v6);
    let words = (0..4).map(|word| lookup::LOCAL_V6 + 4 * word).zip([0, 0, 0, ONE]);
    for (offset, word) in words {
        program.load(R2, R6, offset);
        program.jump_unless(R2, word, ours);
    }
    program.place(local);
    program.shift_left(R7, 16);
    program.load(R2, R6, lookup::LOCAL_PORT);
    program.or(R7, R2);
    program.keep(KEY, R7);
    program.find(&maps.ports, KEY);
    program.jump_if(R0, 0, ours);
    program.load(R1, R0, 0);
    program.jump_unless(R1, 0, on);
    program.place(ours);
    program.keep(KEY, R8);
    program.assign_socket(&maps.own, KEY, on);
    program.place(on);
    program.end(ON);
    program.instructions()
}

/// Adds what is not there yet.
fn update(program: &mut Program, map: &OwnedFd, key: i16, value: i16) {
    program.map(R1, map);
    program.stack(R2, key.into());
    program.stack(R3, value.into());
    program.set(R4, NEW);
    program.call(Function::Update);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_the_programs() {
        let maps = match Maps::new() {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => return,
            other => other.unwrap(),
        };
        for (hook, program) in maps.of_cgroup().into_iter().chain([(Hook::SocketLookup, searched(&maps))]) {
            bpf::load(hook, &program).unwrap_or_else(|error| panic!("{hook:?}: {error}"));
        }
    }
}

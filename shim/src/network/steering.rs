//! Steering connections within a network namespace to one socket, by a BPF program at the kernel's search for a
//! listener (`sk_lookup`).
//!
//! The program is attached by a link that goes away with its descriptor, so nothing is left in the namespace.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Commands of bpf(2).
mod command {
    pub const MAP_CREATE: libc::c_int = 0;
    pub const MAP_UPDATE: libc::c_int = 2;
    pub const PROGRAM_LOAD: libc::c_int = 5;
    pub const LINK_CREATE: libc::c_int = 28;
}

const SOCKET_MAP: u32 = 15;
const SK_LOOKUP_PROGRAM: u32 = 30;
const SK_LOOKUP_ATTACH: u32 = 36;

/// Needed by no function that the program calls.
const LICENCE: &CStr = c"Apache-2.0";

/// Steers every TCP connection to 127.0.0.0/8 or ::1 in the network namespace to `listener`, for as long as what is
/// returned is kept.
///
/// # Errors
/// When the kernel refuses: it has no BPF, or is older than 5.9.
pub fn steer_loopback(netns: impl AsFd, listener: impl AsFd) -> io::Result<OwnedFd> {
    let map = create_map()?;
    put(&map, &listener)?;
    let program = load(&program(map.as_raw_fd()))?;
    attach(&program, &netns)
}

#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct MapUpdate {
    map: i32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    kind: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
struct LinkCreate {
    program: i32,
    target: i32,
    attach_type: u32,
    flags: u32,
}

fn create_map() -> io::Result<OwnedFd> {
    bpf_fd(command::MAP_CREATE, &MapCreate { kind: SOCKET_MAP, key_size: 4, value_size: 8, max_entries: 1 })
}

fn put(map: &OwnedFd, socket: &impl AsFd) -> io::Result<()> {
    let (key, value) = (0u32, u64::from(socket.as_fd().as_raw_fd().cast_unsigned()));
    let update = MapUpdate {
        map: map.as_raw_fd(),
        padding: 0,
        key: address(&raw const key),
        value: address(&raw const value),
        flags: 0,
    };
    bpf(command::MAP_UPDATE, &update).map(drop)
}

fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    let load = ProgramLoad {
        kind: SK_LOOKUP_PROGRAM,
        count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: address(instructions.as_ptr()),
        licence: address(LICENCE.as_ptr()),
        attach_type: SK_LOOKUP_ATTACH,
        ..ProgramLoad::default()
    };
    bpf_fd(command::PROGRAM_LOAD, &load)
}

fn attach(program: &OwnedFd, netns: &impl AsFd) -> io::Result<OwnedFd> {
    let link = LinkCreate {
        program: program.as_raw_fd(),
        target: netns.as_fd().as_raw_fd(),
        attach_type: SK_LOOKUP_ATTACH,
        flags: 0,
    };
    bpf_fd(command::LINK_CREATE, &link)
}

fn address<T>(pointer: *const T) -> u64 {
    u64::try_from(pointer.addr()).unwrap_or(0)
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads the attributes, whose length it is told, and what they point to, which outlives the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    Ok(nix::errno::Errno::result(result)?)
}

fn bpf_fd<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    let fd = i32::try_from(bpf(command, attributes)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Offsets in `struct bpf_sk_lookup`.
mod context {
    pub const FAMILY: i16 = 8;
    pub const PROTOCOL: i16 = 12;
    pub const LOCAL_V4: i16 = 40;
    pub const LOCAL_V6: i16 = 44;
}

/// Functions of the kernel.
mod helper {
    pub const MAP_LOOKUP: i32 = 1;
    pub const SOCKET_RELEASE: i32 = 86;
    pub const SOCKET_ASSIGN: i32 = 124;
}

/// Where jumps lead, by the number of the instruction.
const V6: i16 = 10;
const ASSIGN: i16 = 18;
const PASS: i16 = 32;

/// The program; `map` holds the listener. A listener that has gone, or is not of the connection's family, lets the
/// kernel search on.
#[rustfmt::skip]
fn program(map: i32) -> Vec<u64> {
    const TCP: i32 = 6;
    const INET: i32 = 2;
    const INET6: i32 = 10;
    /// `htonl(1)`, the last word of ::1.
    const ONE: i32 = 0x0100_0000;
    let to = |at: i16, target: i16| target - at - 1;
    vec![
        /*  0 */ code(0xbf, 6, 1, 0, 0),                                // r6 = the context
        /*  1 */ code(0x61, 2, 1, context::PROTOCOL, 0),
        /*  2 */ code(0x55, 2, 0, to(2, PASS), TCP),
        /*  3 */ code(0x61, 2, 1, context::FAMILY, 0),
        /*  4 */ code(0x15, 2, 0, to(4, V6), INET6),
        /*  5 */ code(0x55, 2, 0, to(5, PASS), INET),
        /*  6 */ code(0x61, 2, 1, context::LOCAL_V4, 0),
        /*  7 */ code(0x57, 2, 0, 0, 0xff),                             // its first byte
        /*  8 */ code(0x15, 2, 0, to(8, ASSIGN), 127),
        /*  9 */ code(0x05, 0, 0, to(9, PASS), 0),
        /* 10 */ code(0x61, 2, 1, context::LOCAL_V6, 0),
        /* 11 */ code(0x55, 2, 0, to(11, PASS), 0),
        /* 12 */ code(0x61, 2, 1, context::LOCAL_V6 + 4, 0),
        /* 13 */ code(0x55, 2, 0, to(13, PASS), 0),
        /* 14 */ code(0x61, 2, 1, context::LOCAL_V6 + 8, 0),
        /* 15 */ code(0x55, 2, 0, to(15, PASS), 0),
        /* 16 */ code(0x61, 2, 1, context::LOCAL_V6 + 12, 0),
        /* 17 */ code(0x55, 2, 0, to(17, PASS), ONE),
        /* 18 */ code(0x62, 10, 0, -4, 0),                              // the key, on the stack
        /* 19 */ code(0xbf, 2, 10, 0, 0),
        /* 20 */ code(0x07, 2, 0, 0, -4),
        /* 21 */ code(0x18, 1, 1, 0, map),                              // r1 = the map, in two words
        /* 22 */ 0,
        /* 23 */ code(0x85, 0, 0, 0, helper::MAP_LOOKUP),
        /* 24 */ code(0x15, 0, 0, to(24, PASS), 0),
        /* 25 */ code(0xbf, 7, 0, 0, 0),                                // r7 = the listener
        /* 26 */ code(0xbf, 1, 6, 0, 0),
        /* 27 */ code(0xbf, 2, 7, 0, 0),
        /* 28 */ code(0xb7, 3, 0, 0, 0),
        /* 29 */ code(0x85, 0, 0, 0, helper::SOCKET_ASSIGN),
        /* 30 */ code(0xbf, 1, 7, 0, 0),
        /* 31 */ code(0x85, 0, 0, 0, helper::SOCKET_RELEASE),
        /* 32 */ code(0xb7, 0, 0, 0, 1),                                // SK_PASS
        /* 33 */ code(0x95, 0, 0, 0, 0),
    ]
}

/// One instruction: operation, destination, source, offset, immediate.
fn code(operation: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> u64 {
    let registers = u64::from(destination | source << 4);
    u64::from(operation)
        | registers << 8
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(immediate.cast_unsigned()) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_stay_in_the_program_and_lead_where_they_say() {
        let program = program(3);
        assert_eq!(program.len(), 34);
        let is_jump = |word: u64| matches!(word & 0xff, 0x05 | 0x15 | 0x55);
        let targets: Vec<_> = (1u64..)
            .zip(&program)
            .filter(|(_, word)| is_jump(**word))
            .map(|(next, word)| next + (word >> 16 & 0xffff))
            .collect();
        assert!(targets.iter().all(|target| [10, 18, 32].contains(target)), "{targets:?}");
        assert_eq!(program[21] >> 32, 3);
    }
}

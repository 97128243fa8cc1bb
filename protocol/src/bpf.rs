//! eBPF programs that shim and agent put together themselves: a handful of instructions each, so no compiler is needed.
//!
//! [`Program`] assembles, with labels for jumps; [`load`], [`attach`] and [`create_map`] are the commands of bpf(2). A
//! program is attached by a link that goes away with its descriptor, so nothing is ever left behind.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

/// Needed by no function that the programs call.
const LICENCE: &std::ffi::CStr = c"Apache-2.0";

/// Commands of bpf(2).
mod command {
    pub const MAP_CREATE: u32 = 0;
    pub const MAP_UPDATE: u32 = 2;
    pub const PROGRAM_LOAD: u32 = 5;
    pub const LINK_CREATE: u32 = 28;
}

/// Entries of a hash table are allocated as they come.
const NO_PREALLOCATION: u32 = 1;

/// Where the kernel runs a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// At the search for the socket of a new connection or a datagram, in a network namespace.
    SocketLookup,
    /// After a socket has been bound to an IPv4 address by a process of a cgroup.
    AfterBind4,
    /// The same for IPv6.
    AfterBind6,
    /// Before a datagram with an IPv4 destination of its own is sent by a process of a cgroup.
    Send4,
    /// The same for IPv6.
    Send6,
    /// When a socket that a process of a cgroup has made is closed for good.
    SocketRelease,
    /// When a process of a cgroup opens or makes a device.
    Device,
}

impl Hook {
    /// `BPF_PROG_TYPE_*` and `BPF_*` of the attachment.
    const fn numbers(self) -> (u32, u32) {
        match self {
            Self::SocketLookup => (30, 36),
            Self::AfterBind4 => (9, 12),
            Self::AfterBind6 => (9, 13),
            Self::Send4 => (18, 14),
            Self::Send6 => (18, 15),
            Self::SocketRelease => (9, 34),
            Self::Device => (15, 6),
        }
    }

    /// The number by which the kernel knows the place of attachment.
    pub const fn attach_type(self) -> u32 {
        self.numbers().1
    }
}

/// What a map is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapKind {
    /// A table of fixed-size keys and values.
    Hash {
        /// Bytes.
        key: u32,
        /// Bytes.
        value: u32,
    },
    /// Sockets by a number.
    Sockets,
    /// Records for a reader in user space; its size in bytes is the number of entries.
    Ring,
}

#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
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

/// Makes a map.
///
/// # Errors
/// The kernel's.
pub fn create_map(kind: MapKind, max_entries: u32) -> io::Result<OwnedFd> {
    let (kind, key_size, value_size, flags) = match kind {
        MapKind::Hash { key, value } => (1, key, value, NO_PREALLOCATION),
        MapKind::Sockets => (15, 4, 8, 0),
        MapKind::Ring => (27, 0, 0, 0),
    };
    bpf_fd(command::MAP_CREATE, &mut MapCreate { kind, key_size, value_size, max_entries, flags })
}

/// Puts a socket into a map of [`MapKind::Sockets`]. It leaves the map when it is closed.
///
/// # Errors
/// The kernel's.
pub fn put_socket(map: &OwnedFd, number: u32, socket: impl AsFd) -> io::Result<()> {
    let value = u64::from(socket.as_fd().as_raw_fd().cast_unsigned());
    let mut update = MapUpdate {
        map: map.as_raw_fd(),
        padding: 0,
        key: address(&raw const number),
        value: address(&raw const value),
        flags: 0,
    };
    bpf(command::MAP_UPDATE, &mut update).map(drop)
}

/// Has the kernel check a program and take it.
///
/// # Errors
/// The kernel's: `EACCES` or `EINVAL` where it does not accept the program.
pub fn load(hook: Hook, instructions: &[u64]) -> io::Result<OwnedFd> {
    let (kind, attach_type) = hook.numbers();
    let mut load = ProgramLoad {
        kind,
        count: u32::try_from(instructions.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        instructions: address(instructions.as_ptr()),
        licence: address(LICENCE.as_ptr()),
        attach_type,
        ..ProgramLoad::default()
    };
    bpf_fd(command::PROGRAM_LOAD, &mut load)
}

/// Attaches a program to a cgroup or a network namespace, for as long as what is returned is open.
///
/// # Errors
/// The kernel's.
pub fn attach(program: &OwnedFd, target: impl AsFd, hook: Hook) -> io::Result<OwnedFd> {
    let mut link = LinkCreate {
        program: program.as_raw_fd(),
        target: target.as_fd().as_raw_fd(),
        attach_type: hook.attach_type(),
        flags: 0,
    };
    bpf_fd(command::LINK_CREATE, &mut link)
}

fn address<T>(pointer: *const T) -> u64 {
    pointer.addr() as u64
}

/// One command of bpf(2).
///
/// # Errors
/// The kernel's.
pub fn bpf<T>(command: u32, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the attributes are a structure that the kernel's header defines for the command, passed with its size,
    // and the addresses in it are of what lives until after the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    Ok(Errno::result(result)?)
}

/// A command of bpf(2) that makes a descriptor.
///
/// # Errors
/// The kernel's.
pub fn bpf_fd<T>(command: u32, attributes: &mut T) -> io::Result<OwnedFd> {
    let fd = i32::try_from(bpf(command, attributes)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// What a function or the program returns.
    R0,
    /// The context, then first argument; lost with each call, as those up to `R5`.
    R1,
    /// Second argument.
    R2,
    /// Third argument.
    R3,
    /// Fourth argument.
    R4,
    /// Fifth argument.
    R5,
    /// Kept over calls, as those up to `R9`.
    R6,
    /// Kept.
    R7,
    /// Kept.
    R8,
    /// Kept.
    R9,
    /// The end of the stack, which grows down from it.
    Stack,
}

/// Functions of the kernel that programs call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Function {
    /// Map and key to the value's address, or 0.
    Find = 1,
    /// Map, key, value and flags to 0, or an error.
    Update = 2,
    /// Map and key.
    Delete = 3,
    /// Context to the number that the kernel gives a socket.
    SocketCookie = 46,
    /// Lets go of a socket that was found in a map.
    ReleaseSocket = 86,
    /// Context, socket and flags: makes it the one that is searched for.
    AssignSocket = 124,
    /// Ring, data, size and flags.
    WriteRing = 130,
}

/// A place in a program that can be jumped to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label(usize);

/// A program that is being put together. Each method but those for labels adds one instruction.
#[derive(Debug, Default)]
pub struct Program {
    words: Vec<u64>,
    labels: Vec<Option<usize>>,
    jumps: Vec<(usize, Label)>,
}

impl Program {
    /// A label, to be placed once.
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Places a label before the next instruction.
    pub fn place(&mut self, label: Label) {
        if let Some(place) = self.labels.get_mut(label.0) {
            *place = Some(self.words.len());
        }
    }

    /// `to = from`
    pub fn copy(&mut self, to: Register, from: Register) {
        self.push(code(0xbf, to, from, 0, 0));
    }

    /// `to = number`
    pub fn set(&mut self, to: Register, number: i32) {
        self.push(code(0xb7, to, Register::R0, 0, number));
    }

    /// `to += number`
    pub fn add(&mut self, to: Register, number: i32) {
        self.push(code(0x07, to, Register::R0, 0, number));
    }

    /// `to &= number`
    pub fn and(&mut self, to: Register, number: i32) {
        self.push(code(0x57, to, Register::R0, 0, number));
    }

    /// `to |= from`
    pub fn or(&mut self, to: Register, from: Register) {
        self.push(code(0x4f, to, from, 0, 0));
    }

    /// `to <<= bits`
    pub fn shift_left(&mut self, to: Register, bits: i32) {
        self.push(code(0x67, to, Register::R0, 0, bits));
    }

    /// `to >>= bits`
    pub fn shift_right(&mut self, to: Register, bits: i32) {
        self.push(code(0x77, to, Register::R0, 0, bits));
    }

    /// `to = *(u32 *)(from + offset)`
    pub fn load(&mut self, to: Register, from: Register, offset: i16) {
        self.push(code(0x61, to, from, offset, 0));
    }

    /// `to = *(u64 *)(from + offset)`
    pub fn load_double(&mut self, to: Register, from: Register, offset: i16) {
        self.push(code(0x79, to, from, offset, 0));
    }

    /// `*(u32 *)(stack + offset) = number`
    pub fn keep_number(&mut self, offset: i16, number: i32) {
        self.push(code(0x62, Register::Stack, Register::R0, offset, number));
    }

    /// `*(u32 *)(stack + offset) = from`
    pub fn keep(&mut self, offset: i16, from: Register) {
        self.push(code(0x63, Register::Stack, from, offset, 0));
    }

    /// `*(u64 *)(stack + offset) = from`
    pub fn keep_double(&mut self, offset: i16, from: Register) {
        self.push(code(0x7b, Register::Stack, from, offset, 0));
    }

    /// `*(u32 *)to += from`, as one step for all CPUs.
    pub fn add_atomically(&mut self, to: Register, from: Register) {
        self.push(code(0xc3, to, from, 0, 0));
    }

    /// `to` becomes a map.
    pub fn map(&mut self, to: Register, map: &OwnedFd) {
        // The source register says that the number is a descriptor; the instruction takes two words.
        self.push(code(0x18, to, Register::R1, 0, map.as_raw_fd()));
        self.push(0);
    }

    /// `to` becomes an address on the stack.
    pub fn stack(&mut self, to: Register, offset: i32) {
        self.copy(to, Register::Stack);
        self.add(to, offset);
    }

    /// `R0` becomes the address of the value that a map has for the key at an offset of the stack, or 0.
    pub fn find(&mut self, map: &OwnedFd, key: i16) {
        self.map(Register::R1, map);
        self.stack(Register::R2, key.into());
        self.call(Function::Find);
    }

    /// Makes the socket that a map has for the key at an offset of the stack the one that the kernel searches for, in a
    /// program of [`Hook::SocketLookup`] whose context is in `R6`. Where there is no such socket, jumps to `none`. `R7` is
    /// used up.
    pub fn assign_socket(&mut self, sockets: &OwnedFd, key: i16, none: Label) {
        use Register::{R0, R1, R2, R3, R6, R7};
        self.find(sockets, key);
        self.jump_if(R0, 0, none);
        self.copy(R7, R0);
        self.copy(R1, R6);
        self.copy(R2, R7);
        self.set(R3, 0);
        self.call(Function::AssignSocket);
        self.copy(R1, R7);
        self.call(Function::ReleaseSocket);
    }

    /// Calls a function.
    pub fn call(&mut self, function: Function) {
        self.push(code(0x85, Register::R0, Register::R0, 0, function as i32));
    }

    /// Jumps.
    pub fn jump(&mut self, to: Label) {
        self.jump_by(0x05, Register::R0, 0, to);
    }

    /// Jumps where the register is the number.
    pub fn jump_if(&mut self, register: Register, is: i32, to: Label) {
        self.jump_by(0x15, register, is, to);
    }

    /// Jumps where the register is not the number.
    pub fn jump_unless(&mut self, register: Register, is: i32, to: Label) {
        self.jump_by(0x55, register, is, to);
    }

    /// Ends the program with a verdict.
    pub fn end(&mut self, verdict: i32) {
        self.set(Register::R0, verdict);
        self.push(code(0x95, Register::R0, Register::R0, 0, 0));
    }

    /// The instructions. A jump to a label that was never placed leads nowhere, and the kernel refuses the program.
    #[must_use]
    pub fn instructions(mut self) -> Vec<u64> {
        for (at, label) in self.jumps {
            let target = self.labels.get(label.0).copied().flatten();
            let distance = target.and_then(|target| i16::try_from(target.checked_sub(at + 1)?).ok());
            if let Some(word) = self.words.get_mut(at) {
                *word |= u64::from(distance.unwrap_or(-1).cast_unsigned()) << 16;
            }
        }
        self.words
    }

    fn jump_by(&mut self, operation: u8, register: Register, number: i32, to: Label) {
        self.jumps.push((self.words.len(), to));
        self.push(code(operation, register, Register::R0, 0, number));
    }

    fn push(&mut self, word: u64) {
        self.words.push(word);
    }
}

/// One instruction: operation, destination, source, offset, immediate.
fn code(operation: u8, destination: Register, source: Register, offset: i16, immediate: i32) -> u64 {
    encode(operation, destination as u8 | (source as u8) << 4, offset, immediate)
}

/// One instruction: operation, both registers (destination in the low half), offset, immediate.
#[must_use]
pub fn encode(operation: u8, registers: u8, offset: i16, immediate: i32) -> u64 {
    u64::from(operation)
        | u64::from(registers) << 8
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(immediate.cast_unsigned()) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_lead_to_their_labels() {
        let mut program = Program::default();
        let (end, never) = (program.label(), program.label());
        program.jump_if(Register::R1, 7, end);
        program.jump(never);
        program.set(Register::R2, 1);
        program.place(end);
        program.end(1);
        let words = program.instructions();
        assert_eq!(words[0], 0x15 | 1 << 8 | 2 << 16 | 7 << 32);
        assert_eq!(words[1], 0x05 | 0xffff << 16);
        assert_eq!(words.len(), 5);
    }

    #[test]
    fn a_map_takes_two_words() {
        let map = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let mut program = Program::default();
        program.map(Register::R1, &map);
        let words = program.instructions();
        assert_eq!(words, [encode(0x18, 0x11, 0, map.as_raw_fd()), 0]);
    }
}

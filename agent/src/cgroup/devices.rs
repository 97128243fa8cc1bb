//! Which devices a container may open or make nodes of: an eBPF program attached to its cgroup.
//!
//! The kernel asks the program at each open and mknod, for a type, a number and the wished accesses. Rules are looked at
//! from the last to the first, and for each access the first that matches decides: an earlier rule never overrules a
//! later one, and rules for single accesses add up. What no rule speaks of is denied. This is what keeps a container
//! with CAP_MKNOD away from the disks of the guest.

use super::Cgroup;
use crate::engine::error::{Context, Error, Result};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use vmshim_protocol::bpf::{self, Hook};

const MKNOD: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;
const BLOCK: u8 = 1;
const CHARACTER: u8 = 2;
/// The kernel takes a million instructions; a rule is eight.
const MOST_RULES: usize = 4096;

/// One rule; None is any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u8>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u8,
}

const fn allow(kind: u8, major: Option<u32>, minor: Option<u32>, access: u8) -> Rule {
    Rule { allow: true, kind: Some(kind), major, minor, access }
}

/// What the OCI runtime spec promises to every container, whatever its own rules say: nodes may be made (not opened),
/// and the default devices and terminals used.
const DEFAULT: &[Rule] = &[
    allow(CHARACTER, None, None, MKNOD),
    allow(BLOCK, None, None, MKNOD),
    allow(CHARACTER, Some(1), Some(3), ALL),
    allow(CHARACTER, Some(1), Some(5), ALL),
    allow(CHARACTER, Some(1), Some(7), ALL),
    allow(CHARACTER, Some(1), Some(8), ALL),
    allow(CHARACTER, Some(1), Some(9), ALL),
    allow(CHARACTER, Some(5), Some(0), ALL),
    allow(CHARACTER, Some(5), Some(1), ALL),
    allow(CHARACTER, Some(5), Some(2), ALL),
    allow(CHARACTER, Some(136), None, ALL),
];

/// Puts the rules into force, instead of those that were.
pub fn enforce(cgroup: &Cgroup, rules: &[LinuxDeviceCgroup]) -> Result<()> {
    if rules.len() > MOST_RULES {
        return Err(Error::invalid("linux.resources.devices", format!("has more than {MOST_RULES} rules")));
    }
    let mut all = rules.iter().map(Rule::of).collect::<Result<Vec<_>>>()?;
    all.extend_from_slice(DEFAULT);
    let program = load(&compile(&all)).doing(|| "load the device rules")?;
    replace(cgroup, &program).doing(|| "enforce the device rules")
}

impl Rule {
    fn of(rule: &LinuxDeviceCgroup) -> Result<Self> {
        let field = "linux.resources.devices";
        let kind = match rule.typ().unwrap_or(LinuxDeviceType::A) {
            LinuxDeviceType::A => None,
            LinuxDeviceType::B => Some(BLOCK),
            LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
            LinuxDeviceType::P => return Err(Error::invalid(field, "a pipe is no device")),
        };
        let number = |number: Option<i64>| match number {
            None | Some(-1) => Ok(None),
            Some(number) => u32::try_from(number)
                .map(Some)
                .map_err(|_| Error::invalid(field, format!("{number} is not a device number"))),
        };
        let mut access = 0;
        for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
            access |= match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                other => return Err(Error::invalid(field, format!("access \"{other}\" is unknown"))),
            };
        }
        Ok(Self {
            allow: rule.allow(),
            kind,
            major: number(rule.major())?,
            minor: number(rule.minor())?,
            access,
        })
    }
}

/// One eBPF instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_NOT_EQUAL: u8 = 0x55;
/// The 32-bit comparison: an unsigned device number has no sign to extend.
const JUMP_NOT_EQUAL_32: u8 = 0x56;
const JUMP_EQUAL: u8 = 0x15;
const EXIT: u8 = 0x95;

const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
/// Accesses that no rule has allowed yet.
const WANTED: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

fn ins(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: destination | source << 4, offset, immediate }
}

fn verdict(allow: bool) -> [Instruction; 2] {
    [ins(MOVE, RESULT, 0, 0, i32::from(allow)), ins(EXIT, 0, 0, 0, 0)]
}

fn compile(rules: &[Rule]) -> Vec<Instruction> {
    // The context is { access << 16 | type, major, minor }.
    let mut program = vec![
        ins(LOAD_WORD, KIND, CONTEXT, 0, 0),
        ins(MOVE_REGISTER, WANTED, KIND, 0, 0),
        ins(AND, KIND, 0, 0, 0xffff),
        ins(SHIFT_RIGHT, WANTED, 0, 0, 16),
        ins(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        ins(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        program.extend(compile_rule(rule));
    }
    program.extend(verdict(false));
    program
}

fn compile_rule(rule: &Rule) -> Vec<Instruction> {
    let mut action = Vec::new();
    if rule.allow {
        action.push(ins(AND, WANTED, 0, 0, i32::from(ALL & !rule.access)));
        action.push(ins(JUMP_NOT_EQUAL, WANTED, 0, 2, 0));
        action.extend(verdict(true));
    } else {
        action.push(ins(MOVE_REGISTER, SCRATCH, WANTED, 0, 0));
        action.push(ins(AND, SCRATCH, 0, 0, i32::from(rule.access)));
        action.push(ins(JUMP_EQUAL, SCRATCH, 0, 2, 0));
        action.extend(verdict(false));
    }
    // Conditions jump over what is left of the rule, so they are put in front, the last one first.
    let conditions = [(MINOR, rule.minor), (MAJOR, rule.major), (KIND, rule.kind.map(u32::from))];
    for (register, wanted) in conditions {
        if let Some(wanted) = wanted {
            let over = i16::try_from(action.len()).unwrap_or(i16::MAX);
            action.insert(0, ins(JUMP_NOT_EQUAL_32, register, 0, over, wanted.cast_signed()));
        }
    }
    action
}

const BPF_PROG_ATTACH: u32 = 8;
const BPF_PROG_GET_FD_BY_ID: u32 = 13;
const BPF_PROG_QUERY: u32 = 16;
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_F_REPLACE: u32 = 4;

#[repr(C)]
struct AttachRequest {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
    replaced: u32,
}

#[repr(C)]
struct QueryRequest {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    program_count: u32,
}

#[repr(C)]
struct GetRequest {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let words: Vec<u64> =
        program.iter().map(|i| bpf::encode(i.code, i.registers, i.offset, i.immediate)).collect();
    bpf::load(Hook::Device, &words)
}

/// Attaches a program in the place of the one that is attached, so that at no moment there is none.
fn replace(cgroup: &Cgroup, program: &OwnedFd) -> io::Result<()> {
    let target = cgroup.directory().as_raw_fd().cast_unsigned();
    let mut ids = [0u32; 1];
    let mut query = QueryRequest {
        target,
        attach_type: Hook::Device.attach_type(),
        query_flags: 0,
        attach_flags: 0,
        program_ids: ids.as_mut_ptr().addr() as u64,
        program_count: 1,
    };
    bpf::bpf(BPF_PROG_QUERY, &mut query)?;
    let old = match (query.program_count, ids) {
        (0, _) => None,
        (_, [id]) => {
            Some(bpf::bpf_fd(BPF_PROG_GET_FD_BY_ID, &mut GetRequest { id, next_id: 0, open_flags: 0 })?)
        }
    };
    let mut attach = AttachRequest {
        target,
        program: program.as_raw_fd().cast_unsigned(),
        attach_type: Hook::Device.attach_type(),
        flags: BPF_F_ALLOW_MULTI | if old.is_some() { BPF_F_REPLACE } else { 0 },
        replaced: old.as_ref().map_or(0, |old| old.as_raw_fd().cast_unsigned()),
    };
    bpf::bpf(BPF_PROG_ATTACH, &mut attach).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Runs the few instructions the compiler uses.
    fn run(program: &[Instruction], access: u8, kind: u8, major: u32, minor: u32) -> bool {
        let context = [u32::from(access) << 16 | u32::from(kind), major, minor];
        let mut registers = [0u64; 11];
        let mut at = 0usize;
        loop {
            let i = program[at];
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            let immediate = i64::from(i.immediate).cast_unsigned();
            let mut jump = false;
            match i.code {
                LOAD_WORD => registers[to] = u64::from(context[usize::try_from(i.offset / 4).unwrap()]),
                MOVE => registers[to] = immediate,
                MOVE_REGISTER => registers[to] = registers[from],
                AND => registers[to] &= immediate,
                SHIFT_RIGHT => registers[to] >>= immediate,
                JUMP_NOT_EQUAL => jump = registers[to] != immediate,
                JUMP_NOT_EQUAL_32 => jump = registers[to] & 0xffff_ffff != immediate & 0xffff_ffff,
                JUMP_EQUAL => jump = registers[to] == immediate,
                EXIT => return registers[0] == 1,
                other => panic!("unknown instruction {other:#x}"),
            }
            at += 1;
            if jump {
                at += usize::try_from(i.offset).unwrap();
            }
        }
    }

    /// The rules' meaning, bit by bit.
    fn meaning(rules: &[Rule], access: u8, kind: u8, major: u32, minor: u32) -> bool {
        (0..3).map(|bit| 1 << bit).filter(|bit| access & bit != 0).all(|bit| {
            rules
                .iter()
                .rev()
                .find(|rule| {
                    rule.access & bit != 0
                        && rule.kind.is_none_or(|k| k == kind)
                        && rule.major.is_none_or(|m| m == major)
                        && rule.minor.is_none_or(|m| m == minor)
                })
                .is_some_and(|rule| rule.allow)
        })
    }

    #[test]
    fn a_disk_is_out_of_reach_by_default() {
        let program = compile(DEFAULT);
        assert!(!run(&program, READ, BLOCK, 254, 0));
        assert!(!run(&program, WRITE, BLOCK, 254, 0));
        assert!(run(&program, MKNOD, BLOCK, 254, 0));
        assert!(run(&program, READ | WRITE, CHARACTER, 1, 3));
        assert!(run(&program, READ | WRITE, CHARACTER, 136, 7));
    }

    #[test]
    fn accesses_allowed_one_by_one_add_up() {
        let rules =
            [allow(CHARACTER, Some(10), Some(200), READ), allow(CHARACTER, Some(10), Some(200), WRITE)];
        assert!(run(&compile(&rules), READ | WRITE, CHARACTER, 10, 200));
        assert!(!run(&compile(&rules), READ | MKNOD, CHARACTER, 10, 200));
    }

    #[test]
    fn the_kernel_takes_the_program() {
        match load(&compile(DEFAULT)) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}"),
        }
    }

    fn rules() -> impl Strategy<Value = Vec<Rule>> {
        let any_of = |most: u32| prop::option::of(prop_oneof![0..most, Just(u32::MAX), Just(1 << 31)]);
        let rule = (any::<bool>(), prop::option::of(1u8..3), any_of(3), any_of(3), 0u8..8)
            .prop_map(|(allow, kind, major, minor, access)| Rule { allow, kind, major, minor, access });
        prop::collection::vec(rule, 0..10)
    }

    proptest! {
        #[test]
        fn the_program_means_what_the_rules_mean(
            rules in rules(), access in 1u8..8, kind in 1u8..3,
            major in prop_oneof![0u32..3, Just(u32::MAX), Just(1 << 31)], minor in 0u32..3,
        ) {
            let program = compile(&rules);
            prop_assert_eq!(run(&program, access, kind, major, minor), meaning(&rules, access, kind, major, minor));
        }
    }
}

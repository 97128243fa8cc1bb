//! System call filters as BPF programs.
//!
//! A filter is a binary search among the allowed numbers. Other compilers, seccompiler's among them, make a chain of
//! comparisons; the kernel tries a new filter on every number there is, and for a chain that takes longer than all the
//! rest of a jail.

use nix::libc::{self, c_long};
use seccompiler::{BpfProgram, sock_filter};

/// Loads a word of `struct seccomp_data`, at the offset given.
const LOAD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_GREATER: u16 = 0x25;
const JUMP_IF_NOT_LESS: u16 = 0x35;
const RETURN: u16 = 0x06;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// Low half of the second argument, which is the request of an `ioctl`.
const REQUEST: u32 = 24;

/// `AUDIT_ARCH_X86_64`: other architectures have other numbers.
const X86_64: u32 = 0xc000_003e;

const ALLOW: sock_filter = step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0);
const KILL: sock_filter = step(RETURN, libc::SECCOMP_RET_KILL_PROCESS, 0, 0);

/// One instruction; `yes` and `no` are how many to skip.
const fn step(code: u16, k: u32, yes: u8, no: u8) -> sock_filter {
    sock_filter { code, jt: yes, jf: no, k }
}

/// Allows `calls`, and those of `ioctl` that make one of `requests`. Anything else kills the process.
pub fn compile(calls: impl Iterator<Item = c_long>, requests: &[u32]) -> BpfProgram {
    let mut leaves: Vec<Leaf> = ranges(calls).into_iter().map(Leaf::Calls).collect();
    if !requests.is_empty() {
        leaves.push(Leaf::Requests(requests.to_vec()));
    }
    leaves.sort_by_key(Leaf::first);
    let mut program = vec![
        step(LOAD, ARCHITECTURE, 0, 0),
        step(JUMP_IF_EQUAL, X86_64, 1, 0),
        KILL,
        step(LOAD, NUMBER, 0, 0),
    ];
    program.extend(search(&leaves));
    program
}

/// What a search ends with.
enum Leaf {
    /// Numbers from the first to the second.
    Calls((u32, u32)),
    /// `ioctl`, by its request.
    Requests(Vec<u32>),
}

impl Leaf {
    fn first(&self) -> u32 {
        match self {
            Self::Calls((first, _)) => *first,
            Self::Requests(_) => IOCTL,
        }
    }

    fn program(&self) -> BpfProgram {
        match self {
            Self::Calls((first, last)) => {
                vec![step(JUMP_IF_NOT_LESS, *first, 0, 2), step(JUMP_IF_GREATER, *last, 1, 0), ALLOW, KILL]
            }
            Self::Requests(requests) => {
                let mut program = vec![step(JUMP_IF_EQUAL, IOCTL, 1, 0), KILL, step(LOAD, REQUEST, 0, 0)];
                for request in requests {
                    program.extend([step(JUMP_IF_EQUAL, *request, 0, 1), ALLOW]);
                }
                program.push(KILL);
                program
            }
        }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small constant")]
const IOCTL: u32 = libc::SYS_ioctl as u32;

fn search(leaves: &[Leaf]) -> BpfProgram {
    match leaves {
        [] => vec![KILL],
        [leaf] => leaf.program(),
        _ => {
            let (left, right) = leaves.split_at(leaves.len() / 2);
            let (pivot, left, right) = (right[0].first(), search(left), search(right));
            // A jump reaches 255 instructions; the longest half has some hundred, which a test makes sure of.
            let skip = u8::try_from(left.len()).unwrap_or(u8::MAX);
            let mut program = vec![step(JUMP_IF_NOT_LESS, pivot, skip, 0)];
            program.extend(left);
            program.extend(right);
            program
        }
    }
}

/// Numbers as ranges without gaps, in ascending order.
fn ranges(calls: impl Iterator<Item = c_long>) -> Vec<(u32, u32)> {
    let mut numbers: Vec<u32> = calls.filter_map(|call| u32::try_from(call).ok()).collect();
    numbers.sort_unstable();
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some((_, last)) if number <= *last + 1 => *last = number,
            _ => ranges.push((number, number)),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Runs a program as the kernel does; true when the call is allowed.
    fn allows(program: &[sock_filter], architecture: u32, number: u32, request: u32) -> bool {
        let (mut at, mut word) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let jump = |condition: bool| usize::from(if condition { jt } else { jf });
            match code {
                LOAD => {
                    word = match k {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        REQUEST => request,
                        other => panic!("reads {other}"),
                    }
                }
                JUMP_IF_EQUAL => at += jump(word == k),
                JUMP_IF_GREATER => at += jump(word > k),
                JUMP_IF_NOT_LESS => at += jump(word >= k),
                RETURN => return k == libc::SECCOMP_RET_ALLOW,
                other => panic!("executes {other:#x}"),
            }
        }
    }

    #[test]
    fn another_architecture_is_killed() {
        let program = compile([0, 1, 2].into_iter(), &[]);
        assert!(allows(&program, X86_64, 1, 0));
        assert!(!allows(&program, 0x4000_0003, 1, 0));
        // x32 marks its numbers by a bit.
        assert!(!allows(&program, X86_64, 0x4000_0001, 0));
    }

    #[test]
    fn a_request_is_allowed_by_its_value() {
        let program = compile([15, 17].into_iter(), &[7, 9]);
        for (number, request, expected) in
            [(16, 7, true), (16, 9, true), (16, 8, false), (15, 8, true), (17, 8, true), (18, 7, false)]
        {
            assert_eq!(allows(&program, X86_64, number, request), expected, "{number} {request}");
        }
        assert!(!allows(&compile([15, 17].into_iter(), &[]), X86_64, 16, 7));
    }

    proptest! {
        #[test]
        fn what_is_listed_is_allowed_and_nothing_else(calls in prop::collection::btree_set(0..460i64, 0..120)) {
            let calls: Vec<c_long> = calls.into_iter().filter(|&call| call != libc::SYS_ioctl).collect();
            let program = compile(calls.iter().copied(), &[5]);
            prop_assert!(program.len() < 1024);
            for number in 0..470 {
                let allowed = allows(&program, X86_64, number, 5);
                let listed = calls.contains(&c_long::from(number)) || number == IOCTL;
                prop_assert_eq!(allowed, listed, "{}", number);
            }
        }
    }
}

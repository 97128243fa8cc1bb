//! Seccomp filters: the spec's profile compiled by libseccomp, which knows the system calls of each architecture.

use super::error::{Context, Error, Result};
use crate::sys::seccomp::{AUDIT_ARCH_X86_64, step};
use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};

/// What a filter answers for a call that the profile could not know, so that programs fall back to older calls.
const RETURN_ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();

/// A compiled filter.
pub struct Filter {
    program: Vec<libc::sock_filter>,
    flags: libc::c_ulong,
}

impl Filter {
    /// Compiles a profile; none where it asks for nothing.
    pub fn compile(profile: &LinuxSeccomp) -> Result<Option<Self>> {
        if profile.listener_path().is_some() {
            return Err(Error::unsupported(
                "linux.seccomp.listenerPath",
                "its agent would have to run on the host",
            ));
        }
        let default = action(profile.default_action(), profile.default_errno_ret())?;
        let mut context = ScmpFilterContext::new(default).map_err(refused)?;
        // Loaded by this module, which decides on no_new_privs by itself.
        context.set_ctl_nnp(false).map_err(refused)?;
        for arch in profile.architectures().iter().flatten() {
            if let Some(arch) = architecture(*arch) {
                context.add_arch(arch).map_err(refused)?;
            }
        }
        let mut newest = 0;
        for rule in profile.syscalls().iter().flatten() {
            let action = action(rule.action(), rule.errno_ret())?;
            for name in rule.names() {
                // Profiles name calls of many kernels; a call this libseccomp does not know cannot be ruled on.
                let Ok(call) = ScmpSyscall::from_name(name) else { continue };
                newest = newest.max(call.as_raw_syscall());
                if action == default {
                    continue;
                }
                add(&mut context, action, call, rule.args().as_deref().unwrap_or_default())?;
            }
        }
        let mut bytes = Vec::new();
        export(&context, &mut bytes).doing(|| "compile linux.seccomp")?;
        let mut program = unknown_calls(profile, newest);
        program.extend(bytes.chunks_exact(size_of::<libc::sock_filter>()).filter_map(instruction));
        Ok(Some(Self { program, flags: flags(profile) }))
    }

    /// Puts the filter into force for this process.
    pub fn load(&self) -> Result<()> {
        crate::sys::seccomp::load(&self.program, self.flags)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::E2BIG) => {
                    Error::invalid("linux.seccomp", "compiles to more than the kernel takes")
                }
                _ => Error::System { action: "load linux.seccomp".into(), source: error },
            })
            .map(drop)
    }
}

fn refused(error: libseccomp::error::SeccompError) -> Error {
    Error::invalid("linux.seccomp", error.to_string())
}

fn export(context: &ScmpFilterContext, bytes: &mut Vec<u8>) -> std::io::Result<()> {
    use std::io::{Read, Seek};
    let fd = nix::sys::memfd::memfd_create(c"seccomp", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    context.export_bpf(&file).map_err(|error| std::io::Error::other(error.to_string()))?;
    file.rewind()?;
    file.read_to_end(bytes).map(drop)
}

fn instruction(bytes: &[u8]) -> Option<libc::sock_filter> {
    let [c0, c1, jt, jf, k0, k1, k2, k3] = bytes else { return None };
    Some(libc::sock_filter {
        code: u16::from_ne_bytes([*c0, *c1]),
        jt: *jt,
        jf: *jf,
        k: u32::from_ne_bytes([*k0, *k1, *k2, *k3]),
    })
}

/// Calls newer than any the profile names answer ENOSYS instead of its default error: a C library that tries a new
/// call first falls back on ENOSYS only, and would break on EPERM.
fn unknown_calls(profile: &LinuxSeccomp, newest: i32) -> Vec<libc::sock_filter> {
    use step::{ARCHITECTURE, JUMP_EQUAL, JUMP_GREATER, LOAD, NUMBER, RETURN};
    /// x32 calls carry this bit and have rules of their own.
    const X32_BIT: u32 = 0x4000_0000;
    let permissive =
        matches!(profile.default_action(), LinuxSeccompAction::ScmpActAllow | LinuxSeccompAction::ScmpActLog);
    let Some(newest) = u32::try_from(newest).ok().filter(|newest| *newest > 0 && !permissive) else {
        return Vec::new();
    };
    vec![
        step::of(LOAD, 0, 0, ARCHITECTURE),
        step::of(JUMP_EQUAL, 0, 4, AUDIT_ARCH_X86_64),
        step::of(LOAD, 0, 0, NUMBER),
        step::of(JUMP_GREATER, 2, 0, X32_BIT - 1),
        step::of(JUMP_GREATER, 0, 1, newest),
        step::of(RETURN, 0, 0, RETURN_ENOSYS),
    ]
}

fn add(
    context: &mut ScmpFilterContext,
    action: ScmpAction,
    call: ScmpSyscall,
    args: &[LinuxSeccompArg],
) -> Result<()> {
    let mut comparators = Vec::with_capacity(args.len());
    let mut repeated = false;
    for arg in args {
        let comparator = comparator(arg)?;
        repeated |= args.iter().filter(|other| other.index() == arg.index()).count() > 1;
        comparators.push(comparator);
    }
    // libseccomp joins comparators by "and" and takes one per argument; several of one argument mean "or".
    if repeated {
        for comparator in comparators {
            context.add_rule_conditional(action, call, &[comparator]).map_err(refused)?;
        }
        return Ok(());
    }
    context.add_rule_conditional(action, call, &comparators).map(drop).map_err(refused)
}

fn comparator(arg: &LinuxSeccompArg) -> Result<ScmpArgCompare> {
    let index = u32::try_from(arg.index()).ok().filter(|index| *index < 6).ok_or_else(|| {
        Error::invalid("linux.seccomp.syscalls.args.index", "is beyond a system call's six arguments")
    })?;
    let (operator, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            (ScmpCompareOp::MaskedEqual(arg.value()), arg.value_two().unwrap_or(0))
        }
    };
    Ok(ScmpArgCompare::new(index, operator, value))
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction> {
    let errno = errno.map_or(Ok(libc::EPERM), i32::try_from);
    let errno = errno.map_err(|_| Error::invalid("linux.seccomp errnoRet", "is no error number"))?;
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(u16::try_from(errno).unwrap_or(u16::MAX)),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(Error::unsupported(
                "linux.seccomp action SCMP_ACT_NOTIFY",
                "its agent would have to run on the host",
            ));
        }
    })
}

/// The architectures whose programs can run in the guest; profiles list others too.
fn architecture(arch: Arch) -> Option<ScmpArch> {
    match arch {
        Arch::ScmpArchNative => Some(ScmpArch::Native),
        Arch::ScmpArchX86 => Some(ScmpArch::X86),
        Arch::ScmpArchX86_64 => Some(ScmpArch::X8664),
        Arch::ScmpArchX32 => Some(ScmpArch::X32),
        _ => None,
    }
}

fn flags(profile: &LinuxSeccomp) -> libc::c_ulong {
    profile.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
                // One thread has nobody to be in step with, and there is no listener to wait for.
                LinuxSeccompFilterFlag::SeccompFilterFlagTsync
                | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
            }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compile(json: &str) -> Result<Option<Filter>> {
        Filter::compile(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn a_usual_profile_compiles() {
        let filter = compile(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
            "syscalls":[{"names":["read","write","no_such_call"],"action":"SCMP_ACT_ALLOW"},
            {"names":["clone"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":2114060288,"op":"SCMP_CMP_MASKED_EQ"}]},
            {"names":["clone3"],"action":"SCMP_ACT_ERRNO","errnoRet":38}]}"#,
        )
        .unwrap()
        .unwrap();
        assert!(filter.program.len() > 10);
    }

    #[test]
    fn what_needs_the_host_is_refused() {
        assert!(compile(r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#).is_err());
        assert!(compile(r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}"#).is_err());
    }

    #[test]
    fn a_filter_is_enforced() {
        let filter = compile(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["getpriority"],"action":"SCMP_ACT_ERRNO","errnoRet":13}]}"#,
        )
        .unwrap()
        .unwrap();
        // The filter cannot be taken off again, so a thread takes it with it.
        std::thread::spawn(move || {
            filter.load().unwrap();
            // SAFETY: plain integers.
            let result = crate::sys::check(unsafe { libc::syscall(libc::SYS_getpriority, 0, 0) });
            assert_eq!(result.unwrap_err().raw_os_error(), Some(13));
        })
        .join()
        .unwrap();
    }
}

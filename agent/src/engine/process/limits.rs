//! Resource limits, scheduling, priorities and the like of one process.

use crate::engine::error::{Context, Error, Result};
use crate::sys::check;
use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, PosixRlimit, PosixRlimitType, Scheduler,
};

/// Sets the process's resource limits.
pub fn set_rlimits(limits: &[PosixRlimit]) -> Result<()> {
    for limit in limits {
        let value = libc::rlimit { rlim_cur: limit.soft(), rlim_max: limit.hard() };
        let field = || format!("set process.rlimits {}", limit.typ());
        // SAFETY: the structure is initialised and outlives the call.
        check(unsafe { libc::setrlimit(resource(limit.typ()), &raw const value) }.into()).doing(field)?;
    }
    Ok(())
}

fn resource(kind: PosixRlimitType) -> libc::__rlimit_resource_t {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

/// Sets the I/O priority.
pub fn set_io_priority(priority: &LinuxIOPriority) -> Result<()> {
    const WHO_PROCESS: libc::c_int = 1;
    const CLASS_SHIFT: u32 = 13;
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let level = i32::try_from(priority.priority())
        .ok()
        .filter(|level| (0..8).contains(level))
        .ok_or_else(|| Error::invalid("process.ioPriority.priority", "is not between 0 and 7"))?;
    // SAFETY: plain integers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, (class << CLASS_SHIFT) | level) })
        .doing(|| "set process.ioPriority")
        .map(drop)
}

/// Sets the scheduling policy.
pub fn set_scheduler(scheduler: &Scheduler) -> Result<()> {
    // SAFETY: `sched_attr` is a plain structure of integers, all zero is a valid value of it.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    attributes.size = u32::try_from(size_of::<libc::sched_attr>()).unwrap_or(0);
    attributes.sched_policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
        LinuxSchedulerPolicy::SchedIso => {
            return Err(Error::unsupported("process.scheduler.policy SCHED_ISO", "Linux never had it"));
        }
    }
    .cast_unsigned();
    attributes.sched_nice = scheduler.nice().unwrap_or(0);
    attributes.sched_priority = u32::try_from(scheduler.priority().unwrap_or(0))
        .map_err(|_| Error::invalid("process.scheduler.priority", "is negative"))?;
    attributes.sched_runtime = scheduler.runtime().unwrap_or(0);
    attributes.sched_deadline = scheduler.deadline().unwrap_or(0);
    attributes.sched_period = scheduler.period().unwrap_or(0);
    attributes.sched_flags =
        scheduler.flags().iter().flatten().fold(0, |flags, flag| flags | scheduler_flag(*flag));
    // SAFETY: the structure says its own size and outlives the call.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) })
        .doing(|| "set process.scheduler")
        .map(drop)
}

fn scheduler_flag(flag: LinuxSchedulerFlag) -> u64 {
    match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    }
}

/// Sets the execution domain.
pub fn set_personality(personality: &LinuxPersonality) -> Result<()> {
    if personality.flags().as_ref().is_some_and(|flags| !flags.is_empty()) {
        return Err(Error::unsupported("linux.personality.flags", "no flag is defined"));
    }
    let domain: libc::c_ulong = match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    };
    // SAFETY: a plain integer.
    check(unsafe { libc::personality(domain) }.into()).doing(|| "set linux.personality").map(drop)
}

/// Binds the process to CPUs given as a list such as "0-3,7".
pub fn set_affinity(list: &str, field: &str) -> Result<()> {
    let cpus =
        parse_cpus(list).ok_or_else(|| Error::invalid(field, format!("\"{list}\" is no list of CPUs")))?;
    let mut set = nix::sched::CpuSet::new();
    for cpu in cpus {
        set.set(cpu)
            .map_err(|_| Error::invalid(field, format!("CPU {cpu} is beyond what the kernel counts")))?;
    }
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).doing(|| format!("set {field}"))
}

/// The numbers of a list such as "0-3,7".
pub fn parse_cpus(list: &str) -> Option<Vec<usize>> {
    const MOST: usize = 1024;
    let mut cpus = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse::<usize>().ok()?, last.trim().parse::<usize>().ok()?);
        if first > last || last >= MOST {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpus("0-2,7"), Some(vec![0, 1, 2, 7]));
        for bad in ["", "a", "3-1", "0-99999999999", "1-", "5000"] {
            assert_eq!(parse_cpus(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_list_is_survived(list in "[0-9,\\- ]{0,40}") {
            let _ = parse_cpus(&list);
        }
    }
}

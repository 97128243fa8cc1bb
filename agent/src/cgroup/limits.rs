//! The OCI `LinuxResources` as values of cgroup files.
//!
//! What version 2 has no word for is an error that names the field, except for fields that the OCI runtime spec itself
//! calls deprecated (kernel memory), which no kernel of today has.

use super::{Cgroup, devices};
use crate::engine::error::{Context, Error, Result};
use crate::engine::process::parse_cpus;
use crate::log;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};
use std::{fs, io};

/// A value for a file, and the field it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Setting {
    file: String,
    value: String,
    field: String,
}

/// Sets all limits but the devices, which have no file.
pub fn apply(cgroup: &Cgroup, resources: &LinuxResources) -> Result<()> {
    for setting in settings_here(cgroup, resources)? {
        cgroup.write(&setting.file, &setting.value).map_err(|error| refusal(&setting, error))?;
    }
    Ok(())
}

/// Changes the limits of a running container, devices included where given.
pub fn update(cgroup: &Cgroup, resources: &LinuxResources) -> Result<()> {
    // A limit below what is in use makes the kernel kill; it is right to be refused instead.
    if resources.memory().as_ref().and_then(|memory| memory.check_before_update()).unwrap_or(false) {
        check_usage(cgroup, resources)?;
    }
    for setting in ordered_for_update(cgroup, settings_here(cgroup, resources)?) {
        cgroup.write(&setting.file, &setting.value).map_err(|error| refusal(&setting, error))?;
    }
    match resources.devices() {
        Some(rules) if !rules.is_empty() => devices::enforce(cgroup, rules),
        _ => Ok(()),
    }
}

fn settings_here(cgroup: &Cgroup, resources: &LinuxResources) -> Result<Vec<Setting>> {
    let mut settings = settings(resources, |file| cgroup.has(file))?;
    let cpus = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    settings.retain(|setting| names_what_is_here(setting, &cpus));
    Ok(settings)
}

/// Whether a set of CPUs or memory nodes can be meant for this guest. Kubelets pick them from the host's, and a pod must
/// not fail of it.
fn names_what_is_here(setting: &Setting, cpus: &str) -> bool {
    let here = match setting.file.as_str() {
        "cpuset.cpus" => cpus,
        "cpuset.mems" => "0",
        _ => return true,
    };
    let (wanted, here) = (parse_cpus(&setting.value), parse_cpus(here.trim()).unwrap_or_default());
    // What is no list is the kernel's to refuse.
    let fits = wanted.is_none_or(|wanted| wanted.iter().all(|number| here.contains(number)));
    if !fits {
        log::error(&format!(
            "linux.resources.{} = {} means the host's and is not applied in the guest",
            setting.field, setting.value
        ));
    }
    fits
}

fn refusal(setting: &Setting, error: io::Error) -> Error {
    if error.kind() == io::ErrorKind::NotFound {
        return Error::unsupported(&setting.field, format!("its kernel has no {}", setting.file));
    }
    Error::System {
        action: format!("set {} to {} ({})", setting.field, setting.value, setting.file),
        source: error,
    }
}

fn check_usage(cgroup: &Cgroup, resources: &LinuxResources) -> Result<()> {
    let Some(limit) = resources.memory().as_ref().and_then(|memory| memory.limit()) else { return Ok(()) };
    let text = cgroup.read("memory.current").doing(|| "read memory.current")?;
    let used: i64 = text.trim().parse().unwrap_or(0);
    if limit > 0 && limit < used {
        return Err(Error::invalid(
            "linux.resources.memory.limit",
            format!("{limit} is below the {used} bytes in use, and checkBeforeUpdate is set"),
        ));
    }
    Ok(())
}

/// The kernel holds `cpu.max.burst` to be no more than the quota: whichever order keeps that true comes first.
fn ordered_for_update(cgroup: &Cgroup, mut settings: Vec<Setting>) -> Vec<Setting> {
    let burst_now: u64 =
        cgroup.read("cpu.max.burst").ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let Some(burst) = settings.iter().position(|setting| setting.file == "cpu.max.burst") else {
        return settings;
    };
    let wanted: u64 = settings.get(burst).and_then(|setting| setting.value.parse().ok()).unwrap_or(0);
    if wanted < burst_now {
        let setting = settings.remove(burst);
        settings.insert(0, setting);
    }
    settings
}

struct List<F> {
    settings: Vec<Setting>,
    has: F,
}

impl<F: Fn(&str) -> bool> List<F> {
    fn add(&mut self, file: impl Into<String>, value: impl ToString, field: &str) {
        let field = format!("linux.resources.{field}");
        self.settings.push(Setting { file: file.into(), value: value.to_string(), field });
    }
}

fn settings(resources: &LinuxResources, has: impl Fn(&str) -> bool) -> Result<Vec<Setting>> {
    let mut list = List { settings: Vec::new(), has };
    if let Some(memory) = resources.memory() {
        add_memory(&mut list, memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        add_cpu(&mut list, cpu)?;
    }
    if let Some(pids) = resources.pids() {
        match pids.limit() {
            0 => {}
            limit if limit < 0 => list.add("pids.max", "max", "pids.limit"),
            limit => list.add("pids.max", limit, "pids.limit"),
        }
    }
    if let Some(io) = resources.block_io() {
        add_io(&mut list, io)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        // Kubelets forbid every size that their node has, and of one that the guest does not have there is none to use.
        if limit.limit() == 0 && !(list.has)(&format!("hugetlb.{}.max", limit.page_size())) {
            continue;
        }
        let field = format!("hugepageLimits[{}]", limit.page_size());
        let prefix = format!("hugetlb.{}", limit.page_size());
        let value = if limit.limit() < 0 { "max".to_owned() } else { limit.limit().to_string() };
        let reserved = format!("{prefix}.rsvd.max");
        let also_reserved = (list.has)(&reserved);
        list.add(format!("{prefix}.max"), &value, &field);
        if also_reserved {
            list.add(reserved, &value, &field);
        }
    }
    if let Some(network) = resources.network()
        && (network.class_id().is_some_and(|class| class != 0)
            || network.priorities().as_ref().is_some_and(|list| !list.is_empty()))
    {
        return Err(Error::unsupported("linux.resources.network", "cgroup v2 does not have it"));
    }
    if resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()) {
        return Err(Error::unsupported("linux.resources.rdma", "it has no RDMA device"));
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort_unstable();
    for (file, value) in unified {
        let field = format!("unified[{file}]");
        if file.contains('/') || file.starts_with('.') || !file.contains('.') {
            return Err(Error::invalid(format!("linux.resources.{field}"), "is no name of a cgroup file"));
        }
        if file.starts_with("cgroup.") {
            return Err(Error::invalid(format!("linux.resources.{field}"), "is the runtime's own"));
        }
        for line in value.lines() {
            list.add(file.clone(), line, &field);
        }
    }
    Ok(list.settings)
}

fn add_memory<F: Fn(&str) -> bool>(list: &mut List<F>, memory: &LinuxMemory) -> Result<()> {
    if memory.swappiness().is_some() {
        return Err(Error::unsupported("linux.resources.memory.swappiness", "cgroup v2 does not have it"));
    }
    if memory.disable_oom_killer().unwrap_or(false) {
        return Err(Error::unsupported(
            "linux.resources.memory.disableOOMKiller",
            "cgroup v2 does not have it",
        ));
    }
    let limit = memory.limit().unwrap_or(0);
    if let Some(swap) = swap_alone(limit, memory.swap().unwrap_or(0))? {
        // Without swap accounting in the kernel, "no swap" and "all you want" are true anyway.
        if (list.has)("memory.swap.max") || !matches!(swap.as_str(), "0" | "max") {
            list.add("memory.swap.max", swap, "memory.swap");
        }
    }
    match limit {
        0 => {}
        limit if limit < 0 => list.add("memory.max", "max", "memory.limit"),
        limit => list.add("memory.max", limit, "memory.limit"),
    }
    match memory.reservation().unwrap_or(0) {
        0 => {}
        low if low < 0 => list.add("memory.low", "max", "memory.reservation"),
        low => list.add("memory.low", low, "memory.reservation"),
    }
    Ok(())
}

/// The spec counts memory and swap together, version 2 swap alone.
fn swap_alone(limit: i64, both: i64) -> Result<Option<String>> {
    let field = "linux.resources.memory.swap";
    match (limit, both) {
        (-1, 0) | (_, -1) => Ok(Some("max".to_owned())),
        (_, 0) => Ok(None),
        (..=0, _) => Err(Error::invalid(field, "needs memory.limit")),
        (limit, both) if both < limit => {
            Err(Error::invalid(field, "counts memory too and cannot be below memory.limit"))
        }
        (limit, both) => Ok(Some((both - limit).to_string())),
    }
}

fn add_cpu<F: Fn(&str) -> bool>(list: &mut List<F>, cpu: &LinuxCpu) -> Result<()> {
    if cpu.realtime_runtime().is_some_and(|runtime| runtime != 0)
        || cpu.realtime_period().is_some_and(|p| p != 0)
    {
        return Err(Error::unsupported("linux.resources.cpu.realtimeRuntime", "cgroup v2 does not have it"));
    }
    if let Some(idle) = cpu.idle() {
        list.add("cpu.idle", idle, "cpu.idle");
    }
    // An idle cgroup has no weight.
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0)
        && cpu.idle() != Some(1)
    {
        list.add("cpu.weight", weight(shares), "cpu.shares");
    }
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let period = cpu.period().filter(|period| *period != 0);
    if quota.is_some() || period.is_some() {
        let quota = match quota {
            Some(quota) if quota > 0 => quota.to_string(),
            _ => "max".to_owned(),
        };
        // The kernel keeps the period it has where none is given.
        let value = period.map_or(quota.clone(), |period| format!("{quota} {period}"));
        list.add("cpu.max", value, "cpu.quota");
    }
    if let Some(burst) = cpu.burst() {
        list.add("cpu.max.burst", burst, "cpu.burst");
    }
    if let Some(cpus) = cpu.cpus().as_ref().filter(|cpus| !cpus.is_empty()) {
        list.add("cpuset.cpus", cpus, "cpu.cpus");
    }
    if let Some(mems) = cpu.mems().as_ref().filter(|mems| !mems.is_empty()) {
        list.add("cpuset.mems", mems, "cpu.mems");
    }
    Ok(())
}

/// Shares of 2 to 262144 on the weights' scale of 1 to 10000, as every runtime translates them.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn add_io<F: Fn(&str) -> bool>(list: &mut List<F>, io: &LinuxBlockIo) -> Result<()> {
    if io.leaf_weight().is_some_and(|weight| weight != 0) {
        return Err(Error::unsupported("linux.resources.blockIO.leafWeight", "cgroup v2 does not have it"));
    }
    if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
        // 10 to 1000 on a scale of 1 to 10000.
        let weight = 1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9999 / 990;
        list.add("io.weight", format!("default {weight}"), "blockIO.weight");
    }
    for device in io.weight_device().iter().flatten() {
        if let Some(weight) = device.weight() {
            let weight = 1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9999 / 990;
            let value = format!("{}:{} {weight}", device.major(), device.minor());
            list.add("io.weight", value, "blockIO.weightDevice");
        }
    }
    let mut throttle = |devices: &Option<Vec<LinuxThrottleDevice>>, key: &str, field: &str| {
        for device in devices.iter().flatten() {
            let value = format!("{}:{} {key}={}", device.major(), device.minor(), device.rate());
            list.add("io.max", value, field);
        }
    };
    throttle(io.throttle_read_bps_device(), "rbps", "blockIO.throttleReadBpsDevice");
    throttle(io.throttle_write_bps_device(), "wbps", "blockIO.throttleWriteBpsDevice");
    throttle(io.throttle_read_iops_device(), "riops", "blockIO.throttleReadIOPSDevice");
    throttle(io.throttle_write_iops_device(), "wiops", "blockIO.throttleWriteIOPSDevice");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(json: &str) -> Result<Vec<(String, String)>> {
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        Ok(settings(&resources, |_| true)?.into_iter().map(|s| (s.file, s.value)).collect())
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.to_owned(), value.to_owned())
    }

    #[test]
    fn memory_and_swap() {
        assert_eq!(
            of(r#"{"memory":{"limit":1000,"swap":1500,"reservation":10}}"#).unwrap(),
            [pair("memory.swap.max", "500"), pair("memory.max", "1000"), pair("memory.low", "10")]
        );
        assert_eq!(
            of(r#"{"memory":{"limit":-1}}"#).unwrap(),
            [pair("memory.swap.max", "max"), pair("memory.max", "max")]
        );
        assert!(of(r#"{"memory":{"limit":1000,"swap":10}}"#).is_err());
        assert!(of(r#"{"memory":{"swap":10}}"#).is_err());
    }

    #[test]
    fn cpu() {
        assert_eq!(
            of(r#"{"cpu":{"quota":50000,"period":100000}}"#).unwrap(),
            [pair("cpu.max", "50000 100000")]
        );
        assert_eq!(of(r#"{"cpu":{"quota":-1,"period":100000}}"#).unwrap(), [pair("cpu.max", "max 100000")]);
        assert_eq!(of(r#"{"cpu":{"shares":1024}}"#).unwrap(), [pair("cpu.weight", "39")]);
        assert_eq!(
            of(r#"{"cpu":{"cpus":"0-1","mems":"0"}}"#).unwrap(),
            [pair("cpuset.cpus", "0-1"), pair("cpuset.mems", "0")]
        );
    }

    #[test]
    fn sets_of_the_hosts_cpus_and_nodes_are_left_out() {
        let here = |file: &str, value: &str| {
            let setting = Setting { file: file.into(), value: value.into(), field: String::new() };
            names_what_is_here(&setting, "0-1\n")
        };
        assert!(here("cpuset.cpus", "0-1") && here("cpuset.mems", "0") && here("pids.max", "7"));
        assert!(!here("cpuset.cpus", "1-2") && !here("cpuset.mems", "0-1"));
        assert!(here("cpuset.cpus", "none at all"));
    }

    #[test]
    fn huge_pages_that_a_guest_does_not_have_can_be_forbidden() {
        let limits = |limit: u64| {
            let json = format!(r#"{{"hugepageLimits":[{{"pageSize":"1GB","limit":{limit}}}]}}"#);
            settings(&serde_json::from_str(&json).unwrap(), |_| false).unwrap().len()
        };
        assert_eq!((limits(0), limits(1 << 30)), (0, 1));
    }

    #[test]
    fn what_v2_lacks_is_named() {
        for (json, field) in [
            (r#"{"memory":{"swappiness":10}}"#, "swappiness"),
            (r#"{"memory":{"disableOOMKiller":true}}"#, "disableOOMKiller"),
            (r#"{"cpu":{"realtimeRuntime":10}}"#, "realtimeRuntime"),
            (r#"{"network":{"classID":10}}"#, "network"),
        ] {
            assert!(of(json).unwrap_err().to_string().contains(field), "{json}");
        }
    }

    #[test]
    fn unified_keys_are_file_names() {
        assert_eq!(of(r#"{"unified":{"memory.oom.group":"1"}}"#).unwrap(), [pair("memory.oom.group", "1")]);
        for bad in ["../x.y", "cgroup.procs", "x", ".x"] {
            assert!(of(&format!(r#"{{"unified":{{"{bad}":"1"}}}}"#)).is_err(), "{bad}");
        }
    }

    #[test]
    fn pids() {
        assert_eq!(of(r#"{"pids":{"limit":5}}"#).unwrap(), [pair("pids.max", "5")]);
        assert_eq!(of(r#"{"pids":{"limit":-1}}"#).unwrap(), [pair("pids.max", "max")]);
        assert_eq!(of(r#"{"pids":{"limit":0}}"#).unwrap(), []);
    }

    proptest! {
        #[test]
        fn weights_stay_on_their_scale(shares: u64) {
            prop_assert!((1..=10_000).contains(&weight(shares)));
        }

        #[test]
        fn swap_never_overflows(limit: i64, both: i64) {
            let _ = swap_alone(limit, both);
        }
    }
}

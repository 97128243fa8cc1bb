//! A container's use of resources, as containerd's own message.

use super::Cgroup;
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
};
use std::collections::HashMap;
use std::io;

/// Reads everything there is. A controller that the kernel lacks is left out.
pub fn read(cgroup: &Cgroup) -> io::Result<Metrics> {
    let file = |name: &str| cgroup.read(name).unwrap_or_default();
    // The one file that every cgroup has: without it there is no cgroup any more.
    let cpu = cgroup.read("cpu.stat")?;
    let mut metrics = Metrics::new();
    metrics.cpu = Some(cpu_stat(&cpu, &file("cpu.pressure"))).into();
    metrics.pids = Some(PidsStat {
        current: number(&file("pids.current")),
        limit: number(&file("pids.max")),
        ..Default::default()
    })
    .into();
    metrics.memory = Some(memory_stat(file)).into();
    metrics.memory_events = Some(memory_events(&file("memory.events"))).into();
    metrics.io = Some(IOStat {
        usage: io_entries(&file("io.stat")),
        psi: pressure(&file("io.pressure")).into(),
        ..Default::default()
    })
    .into();
    metrics.hugetlb = page_sizes().iter().map(|size| hugetlb(size, file)).collect();
    Ok(metrics)
}

/// "max" is no limit, which containerd writes as the largest number.
fn number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    }
}

/// Lines of "key number".
fn keyed(text: &str) -> HashMap<&str, u64> {
    text.lines().filter_map(|line| line.split_once(' ')).map(|(key, value)| (key, number(value))).collect()
}

fn cpu_stat(stat: &str, pressure_text: &str) -> CPUStat {
    let keyed = keyed(stat);
    let get = |key: &str| keyed.get(key).copied().unwrap_or(0);
    CPUStat {
        usage_usec: get("usage_usec"),
        user_usec: get("user_usec"),
        system_usec: get("system_usec"),
        nr_periods: get("nr_periods"),
        nr_throttled: get("nr_throttled"),
        throttled_usec: get("throttled_usec"),
        nr_bursts: get("nr_bursts"),
        burst_usec: get("burst_usec"),
        psi: pressure(pressure_text).into(),
        ..Default::default()
    }
}

fn memory_stat(file: impl Fn(&str) -> String) -> MemoryStat {
    let text = file("memory.stat");
    let keyed = keyed(&text);
    let get = |key: &str| keyed.get(key).copied().unwrap_or(0);
    MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        // Since Linux 5.9 counted apart for anonymous memory and files.
        workingset_refault: get("workingset_refault_anon").saturating_add(get("workingset_refault_file")),
        workingset_activate: get("workingset_activate_anon").saturating_add(get("workingset_activate_file")),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        usage: number(&file("memory.current")),
        usage_limit: number(&file("memory.max")),
        max_usage: number(&file("memory.peak")),
        swap_usage: number(&file("memory.swap.current")),
        swap_limit: number(&file("memory.swap.max")),
        swap_max_usage: number(&file("memory.swap.peak")),
        psi: pressure(&file("memory.pressure")).into(),
        ..Default::default()
    }
}

fn memory_events(text: &str) -> MemoryEvents {
    let keyed = keyed(text);
    let get = |key: &str| keyed.get(key).copied().unwrap_or(0);
    MemoryEvents {
        low: get("low"),
        high: get("high"),
        max: get("max"),
        oom: get("oom"),
        oom_kill: get("oom_kill"),
        oom_group_kill: get("oom_group_kill"),
        ..Default::default()
    }
}

/// Lines of "major:minor rbytes=1 wbytes=2 rios=3 wios=4 …".
fn io_entries(text: &str) -> Vec<IOEntry> {
    text.lines().filter_map(io_entry).collect()
}

fn io_entry(line: &str) -> Option<IOEntry> {
    let mut words = line.split_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let mut entry = IOEntry { major: major.parse().ok()?, minor: minor.parse().ok()?, ..Default::default() };
    for (key, value) in words.filter_map(|word| word.split_once('=')) {
        let value = value.parse().unwrap_or(0);
        match key {
            "rbytes" => entry.rbytes = value,
            "wbytes" => entry.wbytes = value,
            "rios" => entry.rios = value,
            "wios" => entry.wios = value,
            _ => {}
        }
    }
    Some(entry)
}

/// Lines of "some avg10=0.00 avg60=0.00 avg300=0.00 total=0".
fn pressure(text: &str) -> Option<PSIStats> {
    let data = |kind: &str| -> Option<PSIData> {
        let line = text.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?;
        let mut data = PSIData::new();
        for (key, value) in line.split_whitespace().filter_map(|word| word.split_once('=')) {
            match key {
                "avg10" => data.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => data.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => data.avg300 = value.parse().unwrap_or(0.0),
                "total" => data.total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        Some(data)
    };
    let some = data("some")?;
    Some(PSIStats { some: Some(some).into(), full: data("full").into(), ..Default::default() })
}

fn hugetlb(size: &str, file: impl Fn(&str) -> String) -> HugeTlbStat {
    HugeTlbStat {
        current: number(&file(&format!("hugetlb.{size}.current"))),
        max: number(&file(&format!("hugetlb.{size}.max"))),
        failcnt: super::events::value(&file(&format!("hugetlb.{size}.events")), "max").unwrap_or(0),
        pagesize: size.to_owned(),
        ..Default::default()
    }
}

/// The huge page sizes of the kernel, written as cgroup files have them ("2MB").
fn page_sizes() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/sys/kernel/mm/hugepages") else { return Vec::new() };
    let mut sizes: Vec<u64> = entries
        .flatten()
        .filter_map(|entry| {
            entry.file_name().to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()
        })
        .collect();
    sizes.sort_unstable();
    sizes.into_iter().map(page_size_name).collect()
}

fn page_size_name(kib: u64) -> String {
    match kib {
        kib if kib >= 1 << 20 => format!("{}GB", kib >> 20),
        kib if kib >= 1 << 10 => format!("{}MB", kib >> 10),
        kib => format!("{kib}KB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cpu() {
        let stat = cpu_stat("usage_usec 10\nuser_usec 6\nsystem_usec 4\nnr_periods 2\n", "");
        assert_eq!((stat.usage_usec, stat.user_usec, stat.system_usec, stat.nr_periods), (10, 6, 4, 2));
        assert!(stat.psi.is_none());
    }

    #[test]
    fn io() {
        let entries = io_entries("254:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\nbroken\n8:16 \n");
        assert_eq!(entries.len(), 2);
        assert_eq!((entries[0].major, entries[0].rbytes, entries[0].rios), (254, 4096, 1));
    }

    #[test]
    fn no_limit_is_the_largest_number() {
        assert_eq!(number("max\n"), u64::MAX);
        assert_eq!(number("12\n"), 12);
        assert_eq!(number(""), 0);
    }

    #[test]
    fn pressure_has_two_lines() {
        let text = "some avg10=1.50 avg60=0.00 avg300=0.00 total=7\nfull avg10=0.00 avg60=0.00 avg300=0.25 total=3\n";
        let psi = pressure(text).unwrap();
        assert_eq!((psi.some.avg10, psi.some.total, psi.full.avg300), (1.5, 7, 0.25));
    }

    #[test]
    fn page_sizes_are_named_as_files() {
        assert_eq!(page_size_name(2048), "2MB");
        assert_eq!(page_size_name(1 << 20), "1GB");
        assert_eq!(page_size_name(64), "64KB");
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "[a-z0-9=: .\n]{0,200}") {
            let _ = (keyed(&text), io_entries(&text), pressure(&text), memory_events(&text));
        }
    }
}

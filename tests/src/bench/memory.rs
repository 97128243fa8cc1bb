//! What an idle container costs the host.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::report::{Figure, Limit, Report, Row};
use super::{Plan, run};
use crate::containerd::VMSHIM;

/// Private memory of the VMM and of the shim, and what is resident of the guest's RAM.
pub fn idle(plan: &Plan<'_>, report: &mut Report) -> Result<()> {
    let (id, hung) = run::sleeper(plan, VMSHIM, "idle")?;
    let shim = process("the shim", |process| {
        runs(process, "containerd-shim-vmshim-v2") && has_argument(process, &id)
    })?;
    let vmm = process("its VMM", |process| runs(process, "vmshim-vmm") && is_child_of(process, &shim))?;
    let (shim, vmm) = (usage(&shim)?, usage(&vmm)?);
    run::clear(plan, &id);
    let rows = [
        ("VMM, private besides guest RAM", vmm.private - vmm.guest_private, 3.0),
        ("shim, private", shim.private, 4.0),
        ("guest, resident when idle", vmm.guest_resident, 32.0),
    ];
    report.rows.extend(rows.map(|(name, mib, most)| Row {
        name: name.into(),
        unit: "MiB",
        vmshim: Figure::once(mib),
        runc: None,
        limit: Some(Limit::AtMost(most)),
        hung,
    }));
    Ok(())
}

/// MiB of one process.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Usage {
    private: f64,
    guest_private: f64,
    guest_resident: f64,
}

fn usage(process: &Path) -> Result<Usage> {
    Ok(parse(&fs::read_to_string(process.join("smaps"))?))
}

/// The one that is meant: beside it there may be those of a container that hung.
fn process(name: &str, is_it: impl Fn(&Path) -> bool) -> Result<PathBuf> {
    let entries = fs::read_dir("/proc")?;
    let found = entries.flatten().map(|entry| entry.path()).find(|path| is_it(path));
    found.with_context(|| format!("no process is {name}"))
}

fn runs(process: &Path, program: &str) -> bool {
    fs::read_link(process.join("exe")).is_ok_and(|exe| exe.to_string_lossy().contains(program))
}

fn has_argument(process: &Path, argument: &str) -> bool {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|word| word == argument.as_bytes())
}

fn is_child_of(process: &Path, parent: &Path) -> bool {
    let status = fs::read_to_string(process.join("status")).unwrap_or_default();
    let id = status.lines().find_map(|line| line.strip_prefix("PPid:")).map(str::trim);
    id.is_some_and(|id| parent.ends_with(id))
}

/// Adds up `/proc/PID/smaps`. The guest's RAM is found by what is mapped of the kernel, which stands in its file from
/// 2 MiB on and in the guest from 16 MiB on: from RAM's start on it is everything that lies without a gap.
fn parse(smaps: &str) -> Usage {
    let mut areas: Vec<Area> = Vec::new();
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [key, rest @ ..] = words.as_slice() else { continue };
        if !key.ends_with(':') {
            areas.extend(Area::new(key, rest));
            continue;
        }
        let (Some(area), Some(kib)) = (areas.last_mut(), rest.first()) else { continue };
        let mib = kib.parse::<f64>().unwrap_or(0.0) / 1024.0;
        match *key {
            "Private_Clean:" | "Private_Dirty:" => area.private += mib,
            "Rss:" => area.resident += mib,
            _ => {}
        }
    }
    let mut usage = Usage { private: areas.iter().map(|area| area.private).sum(), ..Usage::default() };
    let mut next = areas.iter().find_map(|area| {
        let guest_address = area.kernel_offset?.checked_add(14 << 20)?;
        area.start.checked_sub(guest_address)
    });
    for area in &areas {
        if next.is_some_and(|next| area.start == next) {
            usage.guest_private += area.private;
            usage.guest_resident += area.resident;
            next = Some(area.end);
        }
    }
    usage
}

/// One mapping; sizes in MiB.
struct Area {
    start: u64,
    end: u64,
    /// Where it stands in the kernel's file, if it does.
    kernel_offset: Option<u64>,
    private: f64,
    resident: f64,
}

impl Area {
    fn new(range: &str, rest: &[&str]) -> Option<Self> {
        let (start, end) = range.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let is_kernel = rest.last().is_some_and(|name| name.ends_with("/vmlinux"));
        let kernel_offset = rest.get(1).filter(|_| is_kernel).and_then(|offset| number(offset));
        Some(Self { start: number(start)?, end: number(end)?, kernel_offset, private: 0.0, resident: 0.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_told_apart() {
        let smaps = "1000-2000 r-xp 0 00:01 7 /vmm\nRss: 1024 kB\nPrivate_Clean: 512 kB\nPrivate_Dirty: 512 kB\n\
                     7000000-8000000 rw-p 0 00:00 0\nRss: 20480 kB\nPrivate_Dirty: 20480 kB\n\
                     8000000-8400000 rw-p 200000 00:01 9 /x/vmlinux\nRss: 2048 kB\nPrivate_Dirty: 1024 kB\n\
                     9000000-a000000 rw-p 0 00:00 0\nRss: 1024 kB\nPrivate_Dirty: 1024 kB\n";
        let expected = Usage { private: 23.0, guest_private: 21.0, guest_resident: 22.0 };
        assert_eq!(parse(smaps), expected);
    }
}

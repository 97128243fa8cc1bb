//! What an idle container costs the host.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::report::{Figure, Limit, Report, Row};
use super::{IMAGE, Plan, run};
use crate::containerd::VMSHIM;

const ID: &str = "idle";

/// Private memory of the VMM and of the shim, and what is resident of the guest's RAM.
pub fn idle(plan: &Plan<'_>, report: &mut Report) -> Result<()> {
    plan.daemon.ctr_ok(["run", "--detach", "--runtime", VMSHIM, IMAGE, ID, "sleep", "100000"])?;
    let shim = usage("containerd-shim-vmshim-v2")?;
    let vmm = usage("vmshim-vmm")?;
    run::clear(plan, ID);
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
        hung: 0,
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

fn usage(program: &str) -> Result<Usage> {
    let process = process(program).with_context(|| format!("no process of {program}"))?;
    Ok(parse(&fs::read_to_string(process.join("smaps"))?))
}

fn process(program: &str) -> Option<PathBuf> {
    let entries = fs::read_dir("/proc").ok()?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| fs::read_link(path.join("exe")).is_ok_and(|exe| exe.to_string_lossy().contains(program)))
}

/// Adds up `/proc/PID/smaps`. The guest's RAM is the largest anonymous mapping, where that is 32 MiB or more.
fn parse(smaps: &str) -> Usage {
    let mut areas: Vec<(f64, f64, f64)> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else { continue };
        let mib = value.parse::<f64>().unwrap_or(0.0) / 1024.0;
        match (key, areas.last_mut()) {
            ("Size:", _) => areas.push((mib, 0.0, 0.0)),
            ("Private_Clean:" | "Private_Dirty:", Some(area)) => area.1 += mib,
            ("Rss:", Some(area)) => area.2 += mib,
            _ => {}
        }
    }
    let private = areas.iter().map(|area| area.1).sum();
    let guest = areas.into_iter().filter(|area| area.0 >= 32.0).max_by(|a, b| a.0.total_cmp(&b.0));
    let (_, guest_private, guest_resident) = guest.unwrap_or_default();
    Usage { private, guest_private, guest_resident }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_told_apart() {
        let smaps = "1000-2000 r-xp\nSize: 2048 kB\nRss: 1024 kB\nPrivate_Clean: 512 kB\nPrivate_Dirty: 512 kB\n\
                     7000-9000 rw-p\nSize: 524288 kB\nRss: 20480 kB\nPrivate_Clean: 0 kB\nPrivate_Dirty: 20480 kB\n";
        let expected = Usage { private: 21.0, guest_private: 20.0, guest_resident: 20.0 };
        assert_eq!(parse(smaps), expected);
    }
}

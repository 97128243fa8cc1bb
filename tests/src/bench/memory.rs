//! What an idle container costs the host.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::report::{Figure, Limit, Report, Row};
use super::{Plan, run};
use crate::containerd::VMSHIM;

/// Private memory of the VMM and of the shim, and what is resident of the guest's RAM.
pub fn idle(plan: &Plan<'_>, report: &mut Report) -> Result<()> {
    let (id, hung) = run::sleeper(plan, VMSHIM, "idle")?;
    let shim = usage("containerd-shim-vmshim-v2")?;
    let vmm = usage("vmshim-vmm")?;
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

/// Adds up `/proc/PID/smaps`. The VMM names its guest's RAM; pieces of it are the kernel's and the initramfs's files.
fn parse(smaps: &str) -> Usage {
    let (mut usage, mut in_guest) = (Usage::default(), false);
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [key, rest @ ..] = words.as_slice() else { continue };
        let mib = rest.first().and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0;
        match *key {
            "Private_Clean:" | "Private_Dirty:" => {
                usage.private += mib;
                usage.guest_private += if in_guest { mib } else { 0.0 };
            }
            "Rss:" if in_guest => usage.guest_resident += mib,
            key if !key.ends_with(':') => in_guest = rest.get(4).is_some_and(|name| is_guest(name)),
            _ => {}
        }
    }
    usage
}

fn is_guest(name: &str) -> bool {
    name == "[anon:guest-ram]" || name.ends_with("/vmlinux") || name.ends_with("/initramfs.cpio")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_told_apart() {
        let smaps = "1000-2000 r-xp 0 00:01 7 /vmm\nSize: 2048 kB\nRss: 1024 kB\nPrivate_Clean: 512 kB\nPrivate_Dirty: 512 kB\n\
                     7000-9000 rw-p 0 00:00 0 [anon:guest-ram]\nRss: 20480 kB\nPrivate_Dirty: 20480 kB\n\
                     9000-a000 rw-p 0 00:01 9 /x/vmlinux\nRss: 2048 kB\nPrivate_Dirty: 1024 kB\n\
                     a000-b000 rw-p 0 00:00 0\nRss: 1024 kB\nPrivate_Dirty: 1024 kB\n";
        let expected = Usage { private: 23.0, guest_private: 21.0, guest_resident: 22.0 };
        assert_eq!(parse(smaps), expected);
    }
}

//! Programs on disk.

use anyhow::Result;

use super::Plan;
use super::report::{Figure, Limit, Report, Row};

/// The VMM, and the guest's root image, which is the agent and a few directory entries.
pub fn programs(plan: &Plan<'_>, report: &mut Report) -> Result<()> {
    let files = [
        ("VMM on disk", "libexec/vmshim/vmshim-vmm"),
        ("agent on disk", "share/vmshim/agent.erofs"),
        ("shim on disk", "bin/containerd-shim-vmshim-v2"),
    ];
    for (name, file) in files {
        let bytes = std::fs::metadata(plan.prefix.join(file))?.len();
        let megabytes = std::time::Duration::from_micros(bytes).as_secs_f64();
        let limit = (name != "shim on disk").then_some(Limit::AtMost(5.0));
        let vmshim = Figure::once(megabytes);
        report.rows.push(Row { name: name.into(), unit: "MB", vmshim, runc: None, limit, hung: 0 });
    }
    Ok(())
}

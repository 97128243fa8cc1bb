//! The marks that a shim logs, at debug level, when its container is deleted.

use serde::Deserialize;

/// Nanoseconds of `CLOCK_MONOTONIC`, in the order in which a container's life passes them.
#[derive(Debug, Clone, Deserialize)]
pub struct Timeline {
    /// `start` was executed.
    pub shim_started: u64,
    /// The VMM was executed.
    pub vmm_started: u64,
    /// The first `KVM_RUN`.
    pub first_instruction: u64,
    /// The agent's first connection.
    pub agent_dialled: u64,
    /// `Create` arrived.
    pub create_called: u64,
    /// `Create` was answered.
    pub created: u64,
    /// `Start` was answered.
    pub task_started: u64,
    /// The exit of the init process was heard of.
    pub exited: u64,
    /// `Delete` was answered.
    pub deleted: u64,
}

impl Timeline {
    /// The last timeline in a log.
    pub fn last_in(log: &str) -> Option<Self> {
        let line = log.lines().rev().find(|line| line.contains("timeline {"))?;
        let start = line.find('{')?;
        let end = line.rfind('}')?;
        serde_json::from_str(&line.get(start..=end)?.replace('\\', "")).ok()
    }

    /// Milliseconds of each phase; none where a shim was gone before it could ask the VMM for its marks, which are 0 then.
    pub fn phases(&self) -> Vec<(&'static str, Option<f64>)> {
        let between = |from: u64, to: u64| {
            let known = from != 0 && to != 0;
            known.then(|| std::time::Duration::from_nanos(to.saturating_sub(from)).as_secs_f64() * 1000.0)
        };
        vec![
            ("shim start to VMM exec", between(self.shim_started, self.vmm_started)),
            ("VMM exec to first instruction", between(self.vmm_started, self.first_instruction)),
            ("kernel entry to agent", between(self.first_instruction, self.agent_dialled)),
            ("Create called to answered", between(self.create_called, self.created)),
            ("agent to container created", between(self.agent_dialled, self.created)),
            ("created to started", between(self.created, self.task_started)),
            ("started to exit", between(self.task_started, self.exited)),
            ("exit to delete", between(self.exited, self.deleted)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeline_is_found_behind_quotes() {
        let log = concat!(
            "time=x level=debug msg=\"other\"\n",
            r#"time=x level=debug msg="timeline {\"shim_started\":1000000,\"vmm_started\":3000000,"#,
            r#"\"first_instruction\":4000000,\"agent_dialled\":5000000,\"create_called\":1,\"created\":6000000,"#,
            r#"\"task_started\":7000000,\"exited\":8000000,\"deleted\":9000000}" id=x"#,
            "\n"
        );
        let phases = Timeline::last_in(log).unwrap().phases();
        assert_eq!(phases[0], ("shim start to VMM exec", Some(2.0)));
        assert!(Timeline::last_in("nothing here").is_none());
    }
}

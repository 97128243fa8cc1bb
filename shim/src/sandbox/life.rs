//! How far a sandbox is. Published at every change, so that nobody who asks waits for a boot.

use std::time::SystemTime;

use tokio::sync::watch;

use crate::task::TaskError;

/// The stages of a sandbox, in their order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Stage {
    /// There is none; in a pod that a first container makes, for ever.
    #[default]
    Absent,
    /// Its VM boots.
    Created,
    /// It is asked to be ready.
    Starting,
    /// Containers can be made.
    Ready {
        /// Since when.
        since: SystemTime,
    },
    /// Its VM has ended.
    Stopped {
        /// When it became ready, if it did.
        since: Option<SystemTime>,
        /// When it ended.
        at: SystemTime,
        /// 0 where it was asked to.
        status: u32,
    },
}

impl Stage {
    /// For the sentence of an error.
    pub fn name(self) -> &'static str {
        match self {
            Self::Absent => "missing",
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Ready { .. } => "running",
            Self::Stopped { .. } => "stopped",
        }
    }
}

/// A sandbox's stage.
#[derive(Debug, Default)]
pub struct Life(watch::Sender<Stage>);

impl Life {
    /// How far it is.
    pub fn stage(&self) -> Stage {
        *self.0.borrow()
    }

    /// Whether the pod is, or was, a sandbox.
    pub fn is_there(&self) -> bool {
        self.stage() != Stage::Absent
    }

    /// Whether it has not been stopped yet.
    pub fn is_running(&self) -> bool {
        !matches!(self.stage(), Stage::Absent | Stage::Stopped { .. })
    }

    /// From nothing to created.
    ///
    /// # Errors
    /// When there is one, also a stopped one.
    pub fn create(&self) -> Result<(), TaskError> {
        let step = |stage| (stage == Stage::Absent).then_some(Stage::Created);
        self.step(step).map_err(|_| TaskError::SandboxExists)
    }

    /// From created to starting.
    ///
    /// # Errors
    /// When it is not created, or started already.
    pub fn begin_start(&self) -> Result<(), TaskError> {
        let step = |stage| (stage == Stage::Created).then_some(Stage::Starting);
        self.step(step).map_err(|stage| match stage {
            Stage::Absent => TaskError::NoSandbox,
            _ => TaskError::WrongStage { verb: "start", stage: stage.name() },
        })
    }

    /// From starting to ready.
    ///
    /// # Errors
    /// When it was stopped in between.
    pub fn ready(&self, since: SystemTime) -> Result<(), TaskError> {
        let step = |stage| (stage == Stage::Starting).then_some(Stage::Ready { since });
        self.step(step).map_err(|stage| TaskError::WrongStage { verb: "start", stage: stage.name() })
    }

    /// To its end. Only the first status counts, and what never was does not end.
    pub fn stop(&self, status: u32, at: SystemTime) {
        let stopped = |since| Some(Stage::Stopped { since, at, status });
        let step = |stage| match stage {
            Stage::Absent | Stage::Stopped { .. } => None,
            Stage::Created | Stage::Starting => stopped(None),
            Stage::Ready { since } => stopped(Some(since)),
        };
        // It has ended already, or never began.
        let _ = self.step(step);
    }

    /// Waits for its end; gives status and time.
    ///
    /// # Errors
    /// When there is none to wait for.
    pub async fn stopped(&self) -> Result<(u32, SystemTime), TaskError> {
        if !self.is_there() {
            return Err(TaskError::NoSandbox);
        }
        let mut stages = self.0.subscribe();
        // The sender lives in `self`, so the channel cannot close.
        let stage = stages.wait_for(|stage| matches!(stage, Stage::Stopped { .. })).await;
        match stage.as_deref() {
            Ok(Stage::Stopped { status, at, .. }) => Ok((*status, *at)),
            _ => Err(TaskError::NoSandbox),
        }
    }

    fn step(&self, next: impl FnOnce(Stage) -> Option<Stage>) -> Result<(), Stage> {
        let mut refused = None;
        self.0.send_if_modified(|stage| match next(*stage) {
            Some(next) => {
                *stage = next;
                true
            }
            None => {
                refused = Some(*stage);
                false
            }
        });
        refused.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_come_in_their_order() {
        let life = Life::default();
        let now = SystemTime::now();
        assert!(matches!(life.begin_start(), Err(TaskError::NoSandbox)));
        life.stop(0, now);
        assert!(!life.is_there());
        life.create().unwrap();
        assert!(matches!(life.create(), Err(TaskError::SandboxExists)));
        assert!(life.ready(now).is_err() && life.is_running());
        life.begin_start().unwrap();
        assert!(life.begin_start().is_err());
        life.ready(now).unwrap();
        life.stop(0, now);
        life.stop(137, now);
        assert_eq!(life.stage(), Stage::Stopped { since: Some(now), at: now, status: 0 });
        assert!(life.ready(now).is_err() && life.create().is_err() && !life.is_running());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn waiting_ends_with_the_sandbox() {
        let life = std::sync::Arc::new(Life::default());
        assert!(life.stopped().await.is_err());
        life.create().unwrap();
        let waiting = tokio::spawn({
            let life = life.clone();
            async move { life.stopped().await.unwrap().0 }
        });
        tokio::task::yield_now().await;
        life.stop(7, SystemTime::now());
        assert_eq!(waiting.await.unwrap(), 7);
    }
}

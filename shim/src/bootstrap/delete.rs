//! `delete`: undoes what a container left behind, also after its shim was killed.
//!
//! containerd runs it after every task, so on the usual path there is nothing left to do and it must say so fast.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};

use super::args::Invocation;
use super::{grouping, socket};
use crate::config::Config;
use crate::ids::{InvalidName, Name};
use crate::state::{Entry, Journal, PodDir, StateError, undo};

/// 128 + SIGKILL, the convention for a container whose own status is lost.
const KILLED: u32 = 137;

/// Why something may be left behind.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// The command line names no usable container.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// A side effect could not be undone.
    #[error(transparent)]
    State(#[from] StateError),
    /// The reply cannot be encoded.
    #[error("the reply to containerd cannot be encoded")]
    Reply(#[from] protobuf::Error),
}

/// Runs `delete` and returns the message for standard output.
///
/// # Errors
/// When something could not be undone; `delete` may be run again.
pub fn delete(invocation: &Invocation) -> Result<Vec<u8>, DeleteError> {
    let namespace = Name::new(&invocation.namespace)?;
    let id = Name::new(&invocation.id)?;
    let bundle = invocation.bundle.clone().unwrap_or_else(|| PathBuf::from("../").join(id.as_str()));
    let group = Name::new(&grouping::group_id(&bundle, id.as_str()))?;
    let pod = PodDir::new(&state_dir(&bundle), &namespace, &group);
    let pid = task_pid(&Journal::read(&pod.journal())?);
    // A member's own traces went with its Delete call; while the pod's shim lives, the rest is still in use.
    if id == group || !shim_lives(&pod)? {
        undo(&pod)?;
        remove_socket(invocation, &bundle, &namespace, &group);
    }
    let response = DeleteResponse {
        pid,
        exit_status: KILLED,
        exited_at: MessageField::some(SystemTime::now().into()),
        ..DeleteResponse::default()
    };
    Ok(response.write_to_bytes()?)
}

/// The serving process left the state directory's path in the bundle where it is not the default one. The
/// configuration is not asked: it may have changed since, or be what kept the pod from starting.
fn state_dir(bundle: &Path) -> PathBuf {
    match std::fs::read_to_string(bundle.join(crate::STATE_DIR_FILE)) {
        Ok(path) => PathBuf::from(path),
        Err(_) => Config::default().runtime.state_dir,
    }
}

/// The process that containerd was told of, which is the VMM; 0 where there never was one, or it is undone already.
fn task_pid(journal: &[Entry]) -> u32 {
    let vmm = journal.iter().find_map(|entry| match entry {
        Entry::Process(vmm) => Some(vmm.pid),
        _ => None,
    });
    vmm.unwrap_or(0)
}

fn shim_lives(pod: &PodDir) -> Result<bool, StateError> {
    let shim = Journal::read(&pod.journal())?.into_iter().find_map(|entry| match entry {
        Entry::Shim(shim) => Some(shim),
        _ => None,
    });
    Ok(shim.is_some_and(|shim| matches!(shim.open(), Ok(Some(_)))))
}

/// Removes the socket of a shim that died before it had a journal.
fn remove_socket(invocation: &Invocation, bundle: &Path, namespace: &Name, group: &Name) {
    let default =
        || socket::path(socket::DEFAULT_DIR, &invocation.address, namespace.as_str(), group.as_str());
    let path = std::fs::read_to_string(bundle.join("address"))
        .ok()
        .and_then(|address| address.trim().strip_prefix("unix://").map(PathBuf::from))
        .unwrap_or_else(default);
    let _ = std::fs::remove_file(path);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::ProcessId;

    #[test]
    fn the_vmms_pid_is_reported() {
        let own = ProcessId::of_self().unwrap();
        let journal = [Entry::Mount("/m".into()), Entry::Process(own), Entry::Shim(own)];
        assert_eq!(task_pid(&journal), std::process::id());
        assert_eq!(task_pid(&journal[2..]), 0);
    }
}

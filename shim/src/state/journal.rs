//! The list of side effects, one JSON document a line, appended before each of them.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::{ProcessId, StateError};
use crate::network::Inode;

/// One side effect on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// The pod's shim. Undone by ending it.
    Shim(ProcessId),
    /// Another process. Undone by killing it.
    Process(ProcessId),
    /// A program that reads a container's output. Undone by ending it, once the VMM has let go of its pipes.
    Logger(ProcessId),
    /// A mount and all below it. Undone by detaching it.
    Mount(PathBuf),
    /// A cgroup directory. Undone by killing what is in it and removing it.
    Cgroup(PathBuf),
    /// A cgroup directory that others may have come to use. Undone by removing it if it is empty.
    CgroupParent(PathBuf),
    /// A socket or other file. Undone by unlinking it.
    File(PathBuf),
    /// A container whose hooks have been run. Undone by running those for its end.
    Hooks(Hooked),
    /// A container whose hooks for its end have been run.
    HooksDone(Hooked),
    /// What hands the traffic of a pod's interface to its tap. Undone by taking it off; the tap goes with the VMM.
    Redirection(Redirection),
}

/// A container that has hooks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hooked {
    /// Its id.
    pub id: String,
    /// Its bundle, with its spec.
    pub bundle: PathBuf,
}

/// An interface in a network namespace whose traffic is handed on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redirection {
    /// Where the namespace is found.
    pub netns: PathBuf,
    /// Which one it is.
    pub inode: Inode,
    /// The interface's index in it.
    pub index: u32,
    /// There was no ingress queueing discipline, so all of it is ours.
    pub whole_qdisc: bool,
}

/// An open journal.
#[derive(Debug, Clone)]
pub struct Journal {
    path: PathBuf,
    file: Arc<Mutex<File>>,
}

impl Journal {
    /// Begins a journal.
    ///
    /// # Errors
    /// When the file exists or cannot be made.
    pub fn create(path: PathBuf) -> Result<Self, StateError> {
        let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&path);
        match file {
            Ok(file) => Ok(Self { path, file: Arc::new(Mutex::new(file)) }),
            Err(source) => Err(StateError { path, source }),
        }
    }

    /// Writes down what is about to be done.
    ///
    /// # Errors
    /// When it cannot be written; then it must not be done.
    pub fn intend(&self, entry: &Entry) -> Result<(), StateError> {
        let failed = |source| StateError { path: self.path.clone(), source };
        let mut line = serde_json::to_vec(entry).map_err(|error| failed(error.into()))?;
        line.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(&line).map_err(failed)
    }

    /// Reads a journal, the last entry first. A last line that was cut off by a crash is left out: what it announces
    /// was not begun. No file is an empty journal.
    ///
    /// # Errors
    /// When the file exists and cannot be read.
    pub fn read(path: &Path) -> Result<Vec<Entry>, StateError> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(StateError { path: path.to_owned(), source }),
        };
        let mut entries: Vec<Entry> =
            text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
        entries.reverse();
        Ok(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_back_in_reverse() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let journal = Journal::create(path.clone()).unwrap();
        let entries = [
            Entry::File("/run/s".into()),
            Entry::Process(ProcessId::of_self().unwrap()),
            Entry::Mount("/m\n\"x".into()),
            Entry::Redirection(Redirection {
                netns: "/run/netns/x".into(),
                inode: serde_json::from_str(r#"{"device":4,"number":9}"#).unwrap(),
                index: 2,
                whole_qdisc: true,
            }),
        ];
        entries.iter().for_each(|entry| journal.intend(entry).unwrap());
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"mou").unwrap();
        let read = Journal::read(&path).unwrap();
        assert_eq!(read, entries.into_iter().rev().collect::<Vec<_>>());
    }

    #[test]
    fn a_missing_journal_is_empty_and_a_second_one_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        assert!(Journal::read(&path).unwrap().is_empty());
        let _journal = Journal::create(path.clone()).unwrap();
        assert!(Journal::create(path).is_err());
    }
}

//! The program: found before the container is said to exist, executed when it is let go.
//!
//! The sentences are runc's, which users and scripts know.

use crate::engine::error::{Context, Error, Result};
use crate::failure::describe;
use crate::sys::c_string;
use nix::unistd::{AccessFlags, access};
use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What will be executed.
pub struct Program {
    path: CString,
    shown: PathBuf,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Program {
    /// Finds the program in this process's root, as its user.
    pub fn find(arguments: &[String], environment: &[String]) -> Result<Self> {
        let name = arguments.first().ok_or_else(|| Error::invalid("process.args", "is empty"))?;
        let path = if name.contains('/') {
            let refusal = executable(Path::new(name)).err();
            if let Some(refusal) = refusal {
                return Err(Error::Program(format!("exec: \"{name}\": {refusal}")));
            }
            PathBuf::from(name)
        } else {
            let search = environment.iter().find_map(|entry| entry.strip_prefix("PATH="));
            in_path(name, search.unwrap_or(DEFAULT_PATH)).ok_or_else(|| {
                Error::Program(format!("exec: \"{name}\": executable file not found in $PATH"))
            })?
        };
        let strings = |list: &[String], field: &str| -> Result<Vec<CString>> {
            list.iter()
                .map(|text| c_string(text).map_err(|error| Error::invalid(field, error.to_string())))
                .collect()
        };
        Ok(Self {
            path: crate::sys::c_path(&path).doing(|| "name the program")?,
            shown: path,
            arguments: strings(arguments, "process.args")?,
            environment: strings(environment, "process.env")?,
        })
    }

    /// Becomes the program. Returns only with the reason why not.
    pub fn execute(&self) -> Error {
        // Rust ignores the signal for itself; programs expect it to end them.
        // SAFETY: sets a default disposition, no handler.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        // The agent's own mask came along.
        if let Err(error) = nix::sys::signal::SigSet::empty().thread_set_mask() {
            return Error::System { action: "unblock signals".into(), source: error.into() };
        }
        let error = match nix::unistd::execve(&self.path, &self.arguments, &self.environment) {
            Err(error) => io::Error::from(error),
            Ok(never) => match never {},
        };
        Error::Program(format!("exec {}: {}", self.shown.display(), describe(&error)))
    }
}

/// The environment as the process gets it: the last of equal names wins, and HOME is always there.
pub fn environment(given: &[String], home: impl FnOnce() -> String) -> Vec<String> {
    let name = |entry: &str| entry.split_once('=').map_or(entry.to_owned(), |(name, _)| name.to_owned());
    let mut kept: Vec<String> = Vec::with_capacity(given.len() + 1);
    let mut places: std::collections::HashMap<String, usize> = std::collections::HashMap::new();
    for entry in given {
        match places.entry(name(entry)) {
            std::collections::hash_map::Entry::Occupied(place) => {
                if let Some(old) = kept.get_mut(*place.get()) {
                    old.clone_from(entry);
                }
            }
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(kept.len());
                kept.push(entry.clone());
            }
        }
    }
    // An empty HOME counts as none.
    match kept.iter_mut().find(|entry| entry.starts_with("HOME=")) {
        Some(entry) if entry == "HOME=" => *entry = format!("HOME={}", home()),
        Some(_) => {}
        None => kept.push(format!("HOME={}", home())),
    }
    kept
}

fn in_path(name: &str, search: &str) -> Option<PathBuf> {
    if name.is_empty() {
        return None;
    }
    search
        .split(':')
        .map(|directory| Path::new(if directory.is_empty() { "." } else { directory }).join(name))
        .find(|candidate| executable(candidate).is_ok())
}

fn executable(path: &Path) -> std::result::Result<(), String> {
    let metadata =
        std::fs::metadata(path).map_err(|error| format!("stat {}: {}", path.display(), describe(&error)))?;
    if metadata.is_dir() {
        return Err("is a directory".to_owned());
    }
    access(path, AccessFlags::X_OK).map_err(|_| "permission denied".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(name: &str) -> String {
        match Program::find(&[name.to_owned()], &["PATH=/usr/bin:/bin".to_owned()]) {
            Ok(program) => program.shown.display().to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn sentences_are_runcs() {
        assert_eq!(find("nope"), "exec: \"nope\": executable file not found in $PATH");
        assert_eq!(find("/nope"), "exec: \"/nope\": stat /nope: no such file or directory");
        assert_eq!(find("/etc/passwd"), "exec: \"/etc/passwd\": permission denied");
        assert_eq!(find("/etc"), "exec: \"/etc\": is a directory");
        assert_eq!(find(""), "exec: \"\": executable file not found in $PATH");
        assert!(find("sh").ends_with("/sh"));
    }

    #[test]
    fn the_environment_is_completed_not_repeated() {
        let given = ["A=1", "B=2", "A=3"].map(str::to_owned);
        assert_eq!(environment(&given, || "/root".into()), ["A=3", "B=2", "HOME=/root"]);
        let given = ["HOME=".to_owned()];
        assert_eq!(environment(&given, || "/x".into()), ["HOME=/x"]);
    }
}

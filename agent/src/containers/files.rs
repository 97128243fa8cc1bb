//! Files into a container and out of it.

use super::Containers;
use super::making::{internal, order};
use crate::engine::wire::{Direction, Document, Plan, Task};
use crate::failure::{Failure, Kind};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use vmshim_protocol::agent::TransferFilesRequest;
use vmshim_protocol::agent::transfer_files_request::Direction as Asked;

/// As the kernel bounds it.
const LONGEST_PATH: usize = 4095;

impl Containers {
    /// Has an engine carry files between the container and a stream of the host's.
    pub async fn carry_files(&self, request: TransferFilesRequest) -> Result<(), Failure> {
        let container = self.get(&request.container_id)?;
        let path = check_path(&request.path)?;
        let direction = match request.direction {
            Some(Asked::Import(import)) => {
                Direction::Import { preserve_ownership: import.preserve_ownership }
            }
            Some(Asked::Export(export)) => Direction::Export { no_walk: export.no_walk },
            _ => return Err(Failure::new(Kind::InvalidArgument, "files go neither in nor out")),
        };
        let first = container.first.pidfd().ok_or_else(|| {
            Failure::new(Kind::FailedPrecondition, "a container that is being made has no files yet")
        })?;
        let plan = Plan {
            container: container.id.clone(),
            cgroup: self.cgroup(&container.id),
            terminal: None,
            shared: self.places.shared.clone(),
            host_network: false,
            task: Task::Files { namespaces: container.namespaces.all(), path, direction },
        };
        let document = Document::write(&plan, b"null").map_err(|error| internal("write the plan", &error))?;
        let stream = self
            .dialer
            .dial(request.stream)
            .await
            .map_err(|error| internal("reach the host for a stream of files", &error))?;
        order(&self.places.engine, &[document.as_fd(), first.as_fd(), stream.as_fd()]).await
    }
}

fn check_path(path: &str) -> Result<PathBuf, Failure> {
    let fine = path.starts_with('/') && path.len() <= LONGEST_PATH && !path.contains('\0');
    if fine {
        return Ok(Path::new(path).to_owned());
    }
    Err(Failure::new(
        Kind::InvalidArgument,
        format!("the path must be absolute and of at most {LONGEST_PATH} bytes without a zero"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_absolute_paths_of_bearable_length_are_taken() {
        assert!(check_path("/tmp/a b").is_ok());
        for bad in ["", "tmp", "/a\0b", &format!("/{}", "x".repeat(5000))] {
            assert!(check_path(bad).is_err(), "{bad}");
        }
    }
}

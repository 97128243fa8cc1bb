//! containerd's Sandbox service: a pod that is there before its containers and outlives them.
//!
//! The pod is the same as the Task service's; here is only what a pod without a container of its own needs: when its VM
//! begins and ends, and namespaces that the guest itself holds. The requests are containerd's and trusted; what they
//! name on the host (a network namespace, placeholders of others) is not opened here.

mod files;
mod life;
mod request;
mod service;
#[cfg(test)]
mod tests;

use std::io::ErrorKind;
use std::path::Path;

use serde::Deserialize;
use serde::de::IgnoredAny;

pub use files::mounts;
pub use life::Life;
pub use service::services;

/// What tells a container's spec from a sandbox's.
#[derive(Deserialize)]
struct Outline {
    process: Option<IgnoredAny>,
}

/// Whether `start` was called for a sandbox: its bundle has no spec, or one without a process.
pub fn is_sandbox(bundle: &Path) -> bool {
    match std::fs::read(bundle.join("config.json")) {
        Ok(bytes) => serde_json::from_slice::<Outline>(&bytes).is_ok_and(|spec| spec.process.is_none()),
        Err(error) => error.kind() == ErrorKind::NotFound,
    }
}

#[cfg(test)]
mod outline_tests {
    use super::*;

    #[test]
    fn a_spec_with_a_process_is_a_containers() {
        let bundle = tempfile::tempdir().unwrap();
        assert!(is_sandbox(bundle.path()));
        for (config, expected) in [
            (r#"{"ociVersion":"1.3.0","annotations":{}}"#, true),
            (r#"{"process":{"args":["a"]}}"#, false),
            ("{", false),
        ] {
            std::fs::write(bundle.path().join("config.json"), config).unwrap();
            assert_eq!(is_sandbox(bundle.path()), expected, "{config}");
        }
    }
}

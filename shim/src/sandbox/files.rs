//! The files that a pod's containers expect below `/etc`, where containerd leaves the sandbox to the shim and so does
//! not write them itself. They lie in the pod's shared directory, in the place that a container of the sandbox's id would
//! have, and go with it.

use std::fs;
use std::io;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use super::request::SandboxConfig;
use crate::storage::IdMap;

/// The files, in the guest's `/etc` and in the directory.
const NAMES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";

/// Writes them into a new directory; without a name or a resolver of the pod's own, they are the host's. They belong to the
/// pod's root.
///
/// # Errors
/// When the host refuses.
pub fn write(directory: &Path, config: &SandboxConfig) -> io::Result<()> {
    fs::create_dir(directory)?;
    let of_host = |name: &str| fs::read_to_string(Path::new("/etc").join(name)).unwrap_or_default();
    let name = match config.hostname.as_str() {
        "" => of_host("hostname"),
        name => format!("{name}\n"),
    };
    let resolver = config.dns.as_ref().map_or_else(|| of_host("resolv.conf"), |dns| dns.resolv_conf());
    let (uid, gid) = config.users.as_ref().map_or((None, None), IdMap::root);
    for (file, text) in NAMES.iter().zip([name.as_str(), HOSTS, &resolver]) {
        fs::write(directory.join(file), text)?;
        chown(directory.join(file), uid, gid)?;
    }
    Ok(())
}

/// Where they are on the host and where they belong in a container; none where the pod has none.
pub fn mounts(directory: &Path) -> Vec<(PathBuf, PathBuf)> {
    let pairs = NAMES.iter().map(|name| (directory.join(name), Path::new("/etc").join(name)));
    pairs.filter(|(source, _)| source.exists()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_has_its_own_name() {
        let shared = tempfile::tempdir().unwrap();
        let pod = shared.path().join("pod");
        assert!(mounts(&pod).is_empty());
        let config = SandboxConfig { hostname: "web".into(), ..SandboxConfig::default() };
        write(&pod, &config).unwrap();
        let mounts = mounts(&pod);
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[0].1, Path::new("/etc/hostname"));
        assert_eq!(fs::read_to_string(&mounts[0].0).unwrap(), "web\n");
    }
}

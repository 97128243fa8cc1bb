//! A guest that runs `examples/shared.rs`, and the directory that it shares.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;
use vmshim_protocol::control::{Command, FdRole, Response};
use vmshim_protocol::shared::ROOTFS_DIRECTORY;
use vmshim_protocol::vsock::AGENT_PORT;

use crate::cpio;
use crate::driver::{Guest, Running, Vmm};

/// How long anything may take, in a host that is itself emulated.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running guest and its shared directory.
pub struct Rig {
    pub running: Running,
    directory: TempDir,
}

impl Rig {
    /// With a root file system `c1/rootfs` and a volume `c1/mounts/v`, both empty.
    pub fn start() -> Self {
        let directory = TempDir::new().unwrap();
        // As the shim does it: a file system of its own, whose mounts reach the VMM.
        let path = directory.path();
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        mount(None::<&str>, path, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        for name in [ROOTFS_DIRECTORY, "mounts/v"] {
            fs::create_dir_all(path.join("c1").join(name)).unwrap();
        }
        let test = std::env::current_exe().unwrap();
        let program = test.parent().and_then(std::path::Path::parent).unwrap().join("examples/shared");
        let mut root_image = tempfile::tempfile().unwrap();
        root_image.write_all(&cpio::initramfs(&program)).unwrap();
        let guest = Guest { root_image, ..Guest::default() };

        let mut vmm = Vmm::start();
        let shared = File::open(directory.path()).unwrap();
        let more = [(FdRole::SharedDirectory, shared.as_fd())];
        assert_eq!(vmm.configure_with(&guest, &more), Ok(Response::Done));
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let expect = Command::Expect { port: AGENT_PORT };
        assert_eq!(vmm.ask(expect, &[(FdRole::StreamSocket, theirs.as_fd())]), Ok(Response::Done));
        drop(theirs);
        vmm.boot(60_000);
        Self { running: Running::attach(vmm, ours), directory }
    }

    /// On the host.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Gives the guest a command that succeeds.
    pub fn tell(&mut self, command: &str) -> String {
        let reply = self.running.tell(command);
        assert!(!reply.is_empty() && !reply.starts_with("error"), "{command}: {reply}");
        reply
    }

    /// Gives the guest a command that fails.
    pub fn refused(&mut self, command: &str) {
        let reply = self.running.tell(command);
        assert!(reply.starts_with("error"), "{command}: {reply}");
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Whatever is mounted below goes with it.
        umount2(self.directory.path(), MntFlags::MNT_DETACH).unwrap();
    }
}

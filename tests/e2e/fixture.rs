//! The daemon that all tests share, one at a time, and the census that each of them ends with.

use std::path::PathBuf;
use std::process::Output;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, Once, OnceLock, PoisonError};
use std::time::Duration;

use vmshim_tests::census::{self, Census};
use vmshim_tests::containerd::{Containerd, tail};

/// The image most tests use.
pub const BUSYBOX: &str = "docker.io/library/busybox:latest";

/// The image of a whole distribution.
pub const DEBIAN: &str = "docker.io/library/debian:latest";

/// How long the host may take to be as it was, once `ctr` has returned.
const SETTLE: Duration = Duration::from_secs(15);

/// The shared daemon for the time of one test.
pub struct Host {
    daemon: MutexGuard<'static, Containerd>,
    before: Census,
    log_length: usize,
    events_length: usize,
}

/// A directory named by the environment.
pub fn directory(variable: &str) -> PathBuf {
    std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} is not set: run scripts/test")).into()
}

/// The shared daemon, with `busybox` imported; waits for the test that holds it.
pub fn host() -> Host {
    static DAEMON: OnceLock<Mutex<Containerd>> = OnceLock::new();
    let daemon = DAEMON.get_or_init(|| {
        be_patient();
        let scratch = directory("VMSHIM_TEST_DIR").join("containerd");
        let daemon = Containerd::start(&directory("VMSHIM_TEST_CONTAINERD"), &scratch).unwrap();
        daemon.import(&directory("VMSHIM_TEST_IMAGES").join("busybox.tar"), "overlayfs").unwrap();
        for image in ["busybox.tar", "pause.tar"] {
            daemon.import_for_pods(&directory("VMSHIM_TEST_IMAGES").join(image)).unwrap();
        }
        Mutex::new(daemon)
    });
    let daemon = daemon.lock().unwrap_or_else(PoisonError::into_inner);
    let (log_length, events_length) = (daemon.log().len(), daemon.events().len());
    Host { before: Census::take(&daemon.kept_for_containers()), daemon, log_length, events_length }
}

/// Lets guests take long to boot, since KVM itself may be emulated here.
fn be_patient() {
    std::fs::create_dir_all("/etc/vmshim/config.d").unwrap();
    std::fs::write("/etc/vmshim/config.d/patience.toml", "[hypervisor]\nboot_timeout_seconds = 180\n")
        .unwrap();
}

impl Host {
    /// An id no other test uses.
    pub fn id(&self) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        format!("t{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// `ctr run --rm` of a shell line in busybox.
    pub fn sh(&self, options: &[&str], line: &str) -> Output {
        self.run(options, BUSYBOX, &["sh", "-c", line])
    }

    /// `ctr run --rm` of a command in an image.
    pub fn run(&self, options: &[&str], image: &str, command: &[&str]) -> Output {
        self.daemon.run(options, image, &self.id(), command).unwrap()
    }

    /// Imports [`DEBIAN`], which takes long enough to be done once.
    pub fn import_debian(&self) {
        static IMPORTED: Once = Once::new();
        let archive = directory("VMSHIM_TEST_IMAGES").join("debian.tar");
        IMPORTED.call_once(|| self.daemon.import(&archive, "overlayfs").unwrap());
    }

    /// A container that runs until it is killed, started in the background.
    pub fn background(&self, options: &[&str]) -> Background<'_> {
        let id = self.id();
        let runtime = vmshim_tests::containerd::VMSHIM;
        let mut arguments = vec!["run", "--detach", "--runtime", runtime];
        arguments.extend(options);
        arguments.extend([BUSYBOX, &id, "sleep", "10000"]);
        self.daemon.ctr_ok(arguments).unwrap();
        Background { daemon: &self.daemon, id }
    }

    /// `ctr run` under an id that is taken.
    pub fn daemon_run(&self, id: &str) -> Output {
        self.daemon.run(&[], BUSYBOX, id, &["true"]).unwrap()
    }

    /// What containerd and the shims have logged during this test.
    pub fn log(&self) -> String {
        self.daemon.log().split_off(self.log_length)
    }

    /// The events that containerd handed on during this test, a line each.
    pub fn events(&self) -> String {
        self.daemon.events().split_off(self.events_length)
    }

    /// Asserts that the host holds nothing that it did not hold when the test began.
    pub fn assert_nothing_left(&self) {
        if let Err(left) = self.left() {
            panic!("left behind: {left:#?}\n{}", tail(&self.log()));
        }
    }

    /// What the host holds that it did not hold when the test began, or when this was last asked.
    pub fn newly_left(&mut self) -> Vec<String> {
        let left = self.left().err().unwrap_or_default();
        if !left.is_empty() {
            self.before = Census::take(&self.daemon.kept_for_containers());
        }
        left
    }

    fn left(&self) -> Result<(), Vec<String>> {
        census::settled(&self.before, SETTLE)
    }
}

impl std::ops::Deref for Host {
    type Target = Containerd;

    fn deref(&self) -> &Containerd {
        &self.daemon
    }
}

impl std::ops::DerefMut for Host {
    fn deref_mut(&mut self) -> &mut Containerd {
        &mut self.daemon
    }
}

/// A running container, removed when dropped.
pub struct Background<'a> {
    daemon: &'a Containerd,
    /// The container's id.
    pub id: String,
}

impl Background<'_> {
    /// `ctr task exec` of a command.
    pub fn exec(&self, exec: &str, command: &[&str]) -> Output {
        let mut arguments = vec!["task", "exec", "--exec-id", exec, &self.id];
        arguments.extend(command);
        self.daemon.ctr(arguments).stdin(std::process::Stdio::null()).output().unwrap()
    }

    /// The task's process id as containerd knows it.
    pub fn pid(&self) -> u32 {
        let table = self.daemon.ctr_ok(["task", "ls"]).unwrap();
        let row = table.lines().find(|row| row.starts_with(&self.id)).expect("the task is listed");
        row.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// The task's state as containerd knows it, such as `RUNNING`.
    pub fn status(&self) -> String {
        let table = self.daemon.ctr_ok(["task", "ls"]).unwrap();
        let row = table.lines().find(|row| row.starts_with(&self.id)).expect("the task is listed");
        row.split_whitespace().nth(2).unwrap().to_owned()
    }
}

impl Drop for Background<'_> {
    fn drop(&mut self) {
        // A test that failed may have left the task in any state; whatever these say, the census has the last word.
        let _ = self.daemon.ctr(["task", "rm", "--force", &self.id]).output();
        let _ = self.daemon.ctr(["container", "rm", &self.id]).output();
    }
}

/// Standard output as text.
pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Standard error as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Asserts that a run ended well, and returns what it printed.
pub fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}: {}{}", output.status, stdout(output), stderr(output));
    stdout(output)
}

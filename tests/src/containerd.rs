//! A containerd of the tests' own, with its root, state and socket in one directory.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::image;

/// The runtime under test.
pub const VMSHIM: &str = "io.containerd.vmshim.v2";

/// The runtime it is held against.
pub const RUNC: &str = "io.containerd.runc.v2";

/// How long the daemon may take to answer after its start.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// A running daemon, killed when dropped.
#[derive(Debug)]
pub struct Containerd {
    directory: PathBuf,
    programs: PathBuf,
    daemon: Child,
    listener: Option<Child>,
}

impl Containerd {
    /// Starts the containerd whose programs lie in `programs`, with everything it keeps below `directory`.
    ///
    /// # Errors
    /// When it can't be started or doesn't answer; with the end of its log.
    pub fn start(programs: &Path, directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory)?;
        let blockfile = directory.join("blockfile");
        fs::create_dir_all(&blockfile)?;
        let scratch = blockfile.join("scratch.ext4");
        if !scratch.exists() {
            image::make_ext4(&scratch, 64 << 20)?;
        }
        fs::write(directory.join("config.toml"), configuration(programs, directory)?)?;
        let networks = directory.join("cni");
        fs::create_dir_all(&networks)?;
        fs::write(networks.join("10-pods.conflist"), PODS_NETWORK)?;
        let unaddressed = directory.join("cni-unaddressed");
        fs::create_dir_all(&unaddressed)?;
        fs::write(unaddressed.join("10-unaddressed.conflist"), unaddressed_network())?;
        let daemon = spawn(programs, directory)?;
        let (directory, programs) = (directory.to_owned(), programs.to_owned());
        let mut this = Self { directory, programs, daemon, listener: None };
        this.wait_until_serving()?;
        let events = fs::File::create(this.directory.join("events"))?;
        this.listener = Some(this.ctr(["events"]).stdin(Stdio::null()).stdout(events).spawn()?);
        Ok(this)
    }

    /// Where the daemon keeps everything.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The daemon's socket.
    pub fn address(&self) -> PathBuf {
        self.directory.join("containerd.sock")
    }

    /// The directory of a container's bundle.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.directory.join("state/io.containerd.runtime.v2.task/default").join(id)
    }

    /// Where it keeps what belongs to single containers and pods and nothing else, in subdirectories by kind.
    pub fn kept_for_containers(&self) -> Vec<PathBuf> {
        let services = ["runtime.v2.task", "grpc.v1.cri", "sandbox.controller.v1.shim"]
            .map(|name| format!("io.containerd.{name}"));
        let beside = |kept: &str| services.clone().map(|service| self.directory.join(kept).join(service));
        [beside("root"), beside("state")].concat()
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.daemon.id()
    }

    /// The daemon's name and version.
    ///
    /// # Errors
    /// When its program can't be run.
    pub fn version(&self) -> Result<String> {
        let text = version_text(&self.programs)?;
        Ok(text
            .split_whitespace()
            .filter(|word| !word.starts_with("github.com"))
            .take(2)
            .collect::<Vec<_>>()
            .join(" "))
    }

    /// What the daemon and, through it, the shims have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// The events that the daemon has handed on, a line each.
    pub fn events(&self) -> String {
        fs::read_to_string(self.directory.join("events")).unwrap_or_default()
    }

    /// `ctr` of the daemon's own version, to be given its arguments.
    pub fn ctr<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&self, arguments: I) -> Command {
        let mut command = Command::new(self.programs.join("ctr"));
        // Many at once on an emulated CPU take longer than ctr's own patience.
        command.args(["--connect-timeout", "60s", "--address"]).arg(self.address()).args(arguments);
        command
    }

    /// Runs `ctr` to its end.
    ///
    /// # Errors
    /// When it can't be started, or exits with other than 0.
    pub fn ctr_ok<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&self, arguments: I) -> Result<String> {
        let output = self.ctr(arguments).stdin(Stdio::null()).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "ctr failed: {}: {text}{errors}", output.status);
        Ok(text)
    }

    /// `ctr run --rm` of an image with a runtime on a snapshotter, without standard input.
    ///
    /// # Errors
    /// When `ctr` can't be started.
    pub fn run(&self, options: &[&str], image: &str, id: &str, command: &[&str]) -> Result<Output> {
        let mut arguments = vec!["run", "--rm", "--runtime", VMSHIM];
        arguments.extend(options);
        arguments.extend([image, id]);
        arguments.extend(command);
        Ok(self.ctr(arguments).stdin(Stdio::null()).output()?)
    }

    /// Imports an OCI archive for a snapshotter, once.
    ///
    /// # Errors
    /// When `ctr` refuses it.
    pub fn import(&self, archive: &Path, snapshotter: &str) -> Result<()> {
        let archive = archive.to_str().context("the archive's path is not UTF-8")?;
        // Since 2.0 the daemon's transfer service imports, which unpacks for its default snapshotter only.
        let local = if self.is_version_2()? { &["--local"][..] } else { &[] };
        let words = ["image", "import", "--snapshotter", snapshotter];
        self.ctr_ok(words.iter().chain(local).chain(&[archive]))?;
        Ok(())
    }

    /// Kills the daemon and starts another version over what it has left.
    ///
    /// # Errors
    /// When it can't be started or doesn't answer; with the end of its log.
    pub fn kill_and_upgrade(&mut self, programs: &Path) -> Result<()> {
        programs.clone_into(&mut self.programs);
        self.kill_and_restart()
    }

    /// Kills the daemon and starts it again over what it has left.
    ///
    /// # Errors
    /// When it can't be started or doesn't answer; with the end of its log.
    pub fn kill_and_restart(&mut self) -> Result<()> {
        self.daemon.kill()?;
        self.daemon.wait()?;
        self.daemon = spawn(&self.programs, &self.directory)?;
        self.wait_until_serving()?;
        if let Some(mut listener) = self.listener.take() {
            // It has lost its daemon, and most likely ended by itself.
            let _ = listener.kill();
            let _ = listener.wait();
        }
        let events = fs::File::options().append(true).open(self.directory.join("events"))?;
        self.listener = Some(self.ctr(["events"]).stdin(Stdio::null()).stdout(events).spawn()?);
        Ok(())
    }

    /// Whether the daemon is of a series after 1.7.
    ///
    /// # Errors
    /// When its program can't be run.
    pub fn is_version_2(&self) -> Result<bool> {
        is_version_2(&self.programs)
    }

    /// Imports an OCI archive for CRI.
    ///
    /// # Errors
    /// When `ctr` refuses it.
    pub fn import_for_pods(&self, archive: &Path) -> Result<()> {
        self.ctr(["--namespace", "k8s.io", "image", "import"])
            .arg(archive)
            .output()
            .map_err(Into::into)
            .and_then(|output| {
                ensure!(output.status.success(), "ctr failed: {}", String::from_utf8_lossy(&output.stderr));
                Ok(())
            })
    }

    /// Whether the daemon can leave a pod's sandbox to the shim.
    pub fn sandboxes_are_the_shims(&self) -> bool {
        is_version_2(&self.programs).unwrap_or(false)
    }

    fn wait_until_serving(&self) -> Result<()> {
        // The daemon tells nobody when it is ready, so this is the one place that has to ask again.
        let started = Instant::now();
        while started.elapsed() < START_DEADLINE {
            if self.address().exists() && self.ctr_ok(["version"]).is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("containerd does not answer: {}", tail(&self.log()))
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // An error means that it is gone already.
        if let Some(listener) = &mut self.listener {
            let _ = listener.kill();
            let _ = listener.wait();
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn spawn(programs: &Path, directory: &Path) -> Result<Child> {
    let log = fs::File::options().create(true).append(true).open(directory.join("log"))?;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(programs.join("containerd"));
    command
        .arg("--config")
        .arg(directory.join("config.toml"))
        .args(["--log-level", "debug"])
        .env("PATH", format!("{}:/usr/local/bin:/usr/local/sbin:{path}", programs.display()))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    command.spawn().with_context(|| format!("cannot start containerd from {}", programs.display()))
}

/// `containerd github.com/containerd/containerd VERSION COMMIT`.
fn version_text(programs: &Path) -> Result<String> {
    let output = Command::new(programs.join("containerd")).arg("--version").output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn is_version_2(programs: &Path) -> Result<bool> {
    let text = version_text(programs)?;
    let version = text.split_whitespace().nth(2).context("containerd tells no version")?;
    let major = version.trim_start_matches('v').split('.').next().unwrap_or_default();
    Ok(major.parse::<u32>().with_context(|| format!("containerd's version is {version}"))? >= 2)
}

/// A cable from each pod to the host, which needs nothing of the host's that would be left behind.
const PODS_NETWORK: &str = r#"{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "ptp",
  "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}]]}}]}
"#;

/// What the interfaces of [`unaddressed_network`] stand on; whoever uses it has to make it.
pub const LINK_BELOW: &str = "unaddressed0";

/// An interface, and nobody to give it an address.
fn unaddressed_network() -> String {
    format!(
        r#"{{"cniVersion": "1.0.0", "name": "unaddressed", "plugins": [{{"type": "macvlan", "master": "{LINK_BELOW}",
  "ipam": {{}}}}]}}
"#
    )
}

fn configuration(programs: &Path, directory: &Path) -> Result<String> {
    let plugins = programs.join("../lib/cni");
    let (directory, plugins) = (directory.display(), plugins.display());
    let common = format!(
        r#"version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = ["io.containerd.nri.v1.nri"]
[grpc]
  address = "{directory}/containerd.sock"
[plugins."io.containerd.snapshotter.v1.blockfile"]
  root_path = "{directory}/blockfile/root"
  scratch_file = "{directory}/blockfile/scratch.ext4"
  fs_type = "ext4"
  mount_options = []
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/library/pause:latest"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{plugins}"
  conf_dir = "{directory}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "{RUNC}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.vmshim]
  runtime_type = "{VMSHIM}"
  privileged_without_host_devices = true
  pod_annotations = ["io.vmshim.*"]
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.vmshim-unaddressed]
  runtime_type = "{VMSHIM}"
  cni_conf_dir = "{directory}/cni-unaddressed"
"#
    );
    // What a containerd before 2 refuses or does not have: layers in erofs, and sandboxes that are the shim's.
    let version_2 = format!(
        r#"[plugins."io.containerd.service.v1.diff-service"]
  default = ["erofs", "walking"]
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.vmshim-sandbox]
  runtime_type = "{VMSHIM}"
  sandboxer = "shim"
  privileged_without_host_devices = true
  pod_annotations = ["io.vmshim.*"]
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.vmshim-streaming]
  runtime_type = "{VMSHIM}"
  sandboxer = "shim"
  io_type = "streaming"
"#
    );
    Ok(if is_version_2(programs)? { common + &version_2 } else { common })
}

/// The last lines of a log.
pub fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

/// Reads a stream to its end and returns its digest and length.
///
/// # Errors
/// When reading fails.
pub fn digest(mut stream: impl Read) -> Result<(String, u64)> {
    use sha2::{Digest, Sha256};
    let mut hasher = Sha256::new();
    let length = std::io::copy(&mut stream, &mut hasher)?;
    Ok((format!("{:x}", hasher.finalize()), length))
}

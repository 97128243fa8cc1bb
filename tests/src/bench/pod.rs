//! Pods of the benchmark, made through CRI as the kubelet makes them.

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use protobuf::Message;

use super::run::MOST_HUNG;
use super::{IMAGE, Plan};
use crate::containerd::tail;
use crate::cri::{
    ContainerConfig, ContainerRequest, CreateContainerRequest, CreateContainerResponse, Cri, Empty,
    ExecSyncRequest, ExecSyncResponse, Mount, PodSandboxConfig, PodSandboxRequest, RunPodSandboxRequest,
    RunPodSandboxResponse, is_unanswered,
};

/// The runtime handlers of CRI: ours, and the one beside it.
pub const HANDLERS: [&str; 2] = ["vmshim", "runc"];

/// A container's command that does nothing until it is killed.
pub const SLEEP: &[&str] = &["sleep", "100000"];

/// Where a container has [`Plan::load`].
pub const LOAD: &str = "/bench-load";

/// How many times longer than a call a load may take that gives no sign of life.
const LOAD_LIMIT: u32 = 4;

/// One bridge for all pods, to which a veth leads from each.
const NETWORK: &str = r#"{"cniVersion": "1.0.0", "name": "bench", "plugins": [{"type": "bridge", "bridge": "bench0",
  "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.89.0.0/16"}]]}}]}
"#;

/// Gives pods the benchmark's network. A daemon that keeps everything below `directory` has to be started afterwards,
/// since it takes the network that comes first by name.
///
/// # Errors
/// When the file can't be written.
pub fn prepare_network(directory: &Path) -> Result<()> {
    let networks = directory.join("cni");
    fs::create_dir_all(&networks)?;
    Ok(fs::write(networks.join("05-bench.conflist"), NETWORK)?)
}

/// Makes pods.
pub struct Pods<'a> {
    plan: &'a Plan<'a>,
    cri: Cri,
    made: Cell<usize>,
}

impl<'a> Pods<'a> {
    /// Of the plan's daemon.
    pub fn connect(plan: &'a Plan<'a>) -> Result<Self> {
        Ok(Self { plan, cri: Cri::connect(&plan.daemon.address())?, made: Cell::new(0) })
    }

    /// A pod without containers.
    pub fn run(&self, handler: &str) -> Result<Pod<'_>> {
        let number = self.made.replace(self.made.get() + 1);
        let mut config = PodSandboxConfig::default();
        config.linux.mut_or_insert_default();
        let metadata = config.metadata.mut_or_insert_default();
        metadata.name = format!("bench-{}-{number}", std::process::id());
        metadata.uid.clone_from(&metadata.name);
        "default".clone_into(&mut metadata.namespace);
        let request = RunPodSandboxRequest {
            config: Some(config.clone()).into(),
            runtime_handler: handler.to_owned(),
            ..Default::default()
        };
        let id = self.call::<RunPodSandboxResponse>("RunPodSandbox", &request)?.pod_sandbox_id;
        Ok(Pod { pods: self, config, id, ended: false })
    }

    /// Does what a guest that hung has kept from being done, again; adds to `hung` how often that was.
    pub fn repeated<T>(&self, hung: &mut usize, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
        for _ in 0..MOST_HUNG {
            match attempt() {
                Err(error) if is_unanswered(&error) => {
                    eprintln!("bench: a pod hung and is repeated: {error:#}");
                    *hung += 1;
                }
                done => return done,
            }
        }
        bail!("{MOST_HUNG} pods hung: {}", tail(&self.plan.daemon.log()))
    }

    fn call<T: Message>(&self, method: &str, request: &impl Message) -> Result<T> {
        self.cri.call_within(self.plan.hang, method, request)
    }
}

/// A pod, removed when dropped.
pub struct Pod<'a> {
    pods: &'a Pods<'a>,
    config: PodSandboxConfig,
    id: String,
    ended: bool,
}

impl Pod<'_> {
    /// A container of busybox, with files and directories of the host's.
    pub fn create(&self, name: &str, command: &[&str], mounts: &[(&Path, &str)]) -> Result<String> {
        let mount = |(from, to): &(&Path, &str)| {
            anyhow::Ok(Mount {
                host_path: from.to_str().context("a mount's path is not UTF-8")?.to_owned(),
                container_path: (*to).to_owned(),
                ..Default::default()
            })
        };
        let mut config = ContainerConfig {
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            mounts: mounts.iter().map(mount).collect::<Result<_>>()?,
            ..Default::default()
        };
        name.clone_into(&mut config.metadata.mut_or_insert_default().name);
        IMAGE.clone_into(&mut config.image.mut_or_insert_default().image);
        config.linux.mut_or_insert_default();
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config).into(),
            sandbox_config: Some(self.config.clone()).into(),
            ..Default::default()
        };
        Ok(self.pods.call::<CreateContainerResponse>("CreateContainer", &request)?.container_id)
    }

    /// Lets a container go.
    pub fn start(&self, container: &str) -> Result<()> {
        let request = ContainerRequest { container_id: container.to_owned(), ..Default::default() };
        self.pods.call::<Empty>("StartContainer", &request).map(drop)
    }

    /// A container that runs, and has [`LOAD`].
    pub fn loaded(&self, name: &str, command: &[&str], mounts: &[(&Path, &str)]) -> Result<String> {
        let mounts = [&[(self.pods.plan.load, LOAD)], mounts].concat();
        let container = self.create(name, command, &mounts)?;
        self.start(&container)?;
        Ok(container)
    }

    /// What a command prints in a container.
    pub fn exec(&self, container: &str, command: &[&str]) -> Result<String> {
        let request = ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            ..Default::default()
        };
        let limit = self.pods.plan.hang * LOAD_LIMIT;
        let done: ExecSyncResponse = self.pods.cri.call_within(limit, "ExecSync", &request)?;
        let errors = String::from_utf8_lossy(&done.stderr);
        ensure!(done.exit_code == 0, "{command:?} failed with {}: {errors}", done.exit_code);
        Ok(String::from_utf8(done.stdout)?)
    }

    /// The figures that [`LOAD`] prints.
    pub fn measure(&self, container: &str, load: &[&str]) -> Result<Vec<f64>> {
        let text = self.exec(container, &[&[LOAD], load].concat())?;
        text.lines().map(|line| line.parse().with_context(|| format!("{line:?} is no figure"))).collect()
    }

    /// Its IPv4 address.
    pub fn address(&self, container: &str) -> Result<String> {
        let text = self.exec(container, &["ip", "-4", "-o", "address", "show", "dev", "eth0"])?;
        address(&text).with_context(|| format!("{text:?} has no address"))
    }

    /// Stops and removes it with its containers.
    pub fn end(mut self) -> Result<()> {
        self.remove(self.pods.plan.hang)?;
        self.ended = true;
        Ok(())
    }

    fn remove(&self, limit: Duration) -> Result<()> {
        let request = PodSandboxRequest { pod_sandbox_id: self.id.clone(), ..Default::default() };
        for method in ["StopPodSandbox", "RemovePodSandbox"] {
            self.pods.cri.call_within::<Empty>(limit, method, &request)?;
        }
        Ok(())
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if !self.ended {
            // A guest that hung is waited for first; what is left after that shows in the next pod.
            let _ = self.remove(Duration::from_secs(180));
        }
    }
}

/// The address of `ip -o address`, without its prefix length.
fn address(text: &str) -> Option<String> {
    let mut words = text.split_whitespace();
    words.find(|word| *word == "inet")?;
    Some(words.next()?.split('/').next()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_found() {
        let text = "2: eth0    inet 10.89.0.7/16 brd 10.89.255.255 scope global eth0\\ valid_lft forever\n";
        assert_eq!(address(text).unwrap(), "10.89.0.7");
        assert_eq!(address("2: eth0    inet"), None);
        assert_eq!(address(""), None);
    }
}

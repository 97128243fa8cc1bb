//! Pods of the benchmark, made through CRI as the kubelet makes them.

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use protobuf::Message;

use super::run::MOST_HUNG;
use super::{IMAGE, Plan};
use crate::containerd::tail;
use crate::cri::{
    ContainerConfig, ContainerRequest, CreateContainerRequest, CreateContainerResponse, Cri, Empty,
    PodSandboxConfig, PodSandboxRequest, RunPodSandboxRequest, RunPodSandboxResponse, is_unanswered,
};

/// The runtime handlers of CRI: ours, and the one beside it.
pub const HANDLERS: [&str; 2] = ["vmshim", "runc"];

/// A container's command that does nothing until it is killed.
pub const SLEEP: &[&str] = &["sleep", "100000"];

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
    /// A container of busybox.
    pub fn create(&self, name: &str, command: &[&str]) -> Result<String> {
        let mut config = ContainerConfig {
            command: command.iter().map(|word| (*word).to_owned()).collect(),
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

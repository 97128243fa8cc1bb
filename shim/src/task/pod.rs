//! The pod: one VM and the containers in it.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;
use vmshim_protocol::agent as api;
use vmshim_protocol::nic::queue_pairs;

use super::TaskError;
use super::container::Container;
use super::pause::Stopped;
use super::sockets::MOST_PENDING;
use crate::agent_client::AgentError;
use crate::bootstrap::Serving;
use crate::cgroup::{Cgroup, InvalidPath};
use crate::config::{Config, ConfigError, OptionsError, RuntimeOptions};
use crate::events::Publisher;
use crate::host_network::HostNetwork;
use crate::ids::Name;
use crate::network::{Nics, Ready};
use crate::oci::{Limits, Spec, SpecError};
use crate::reaper::Reaper;
use crate::sandbox::{self, Life};
use crate::state::{Entry, Journal, PodDir, ProcessId, StateError, undo, undo_predecessor};
use crate::stdio::{Logger, Opened};
use crate::storage::{IdMap, Mapping, SharedError, Slots, mount_shared};
use crate::streaming::Waiting;
use crate::vm::{LaunchError, Launcher, Machine, Size, Vm, host_memory_mib};

/// How long to wait for the reason when the guest's connection breaks.
const REASON_LIMIT: Duration = Duration::from_secs(1);

/// How long to wait for the host's side of the network when the pod ends.
const NETWORK_LIMIT: Duration = Duration::from_secs(5);

/// The longest part of a caller's deadline that is kept for the answer's way back.
const MAX_MARGIN: Duration = Duration::from_millis(500);

/// Why a pod has no VM.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Runtime options.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// Configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// `config.json`.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A container of a pod whose shim is no more, so that containerd has started another.
    #[error("the pod {0} has ended and takes no more containers; run a new one")]
    PodEnded(String),
    /// The cgroup's name.
    #[error(transparent)]
    Cgroup(#[from] InvalidPath),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The VMM or what it needs.
    #[error(transparent)]
    Launch(#[from] LaunchError),
}

impl BootError {
    /// Whether the caller's own input is at fault.
    pub fn is_invalid(&self) -> bool {
        matches!(
            self,
            Self::Options(_) | Self::Spec(_) | Self::Cgroup(_) | Self::Config(ConfigError::Annotation { .. })
        )
    }
}

impl From<SharedError> for LaunchError {
    fn from(error: SharedError) -> Self {
        match error {
            SharedError::State(error) => Self::State(error),
            SharedError::Storage(error) => Self::Host(std::io::Error::other(error)),
        }
    }
}

/// A pod, as the Task service sees it.
pub struct Pod {
    /// containerd's namespace.
    pub namespace: Name,
    /// The pod's id: that of its first container, or of its sandbox.
    pub id: Name,
    /// Where its events go.
    pub events: Publisher,
    /// The VM's disk slots.
    pub slots: Slots,
    /// Its state on the host.
    pub dir: PodDir,
    /// How far its sandbox is, where it was made by the Sandbox service.
    pub sandbox: Life,
    /// Its side effects on the host; none where it can have no VM.
    pub journal: Option<Arc<Journal>>,
    /// Collects the exit statuses of the shim's children.
    pub reaper: Reaper,
    /// Streams that clients have opened.
    pub streams: Arc<Waiting>,
    /// What the guest has of the host's network.
    pub host_network: HostNetwork,
    /// Whether its vCPUs are stopped.
    pub stopped: Stopped,
    /// Connections to the host's sockets that are being made.
    pub pending_sockets: Arc<Semaphore>,
    vm: OnceLock<Result<Arc<Vm>, Arc<BootError>>>,
    /// What the machine has been asked to be; none while it is as it was made.
    pub size: Mutex<Option<Size>>,
    /// None where there is no network namespace.
    network: OnceLock<Option<Ready>>,
    prepared: Mutex<Option<Result<Prepared, BootError>>>,
    request_timeout: Duration,
    containers: Mutex<BTreeMap<Name, Arc<Container>>>,
    shutdown: Notify,
}

impl Pod {
    /// Makes the pod. With a first container its VM is started, and boots when this comes back; with a sandbox it
    /// waits for [`Pod::launch`]. What is wrong is kept for Create to tell.
    pub fn boot(
        serving: &Serving,
        reaper: &Reaper,
        events: Publisher,
        config: Result<Config, BootError>,
    ) -> Arc<Self> {
        let settings = config.as_ref().cloned().unwrap_or_default();
        let dir = PodDir::new(&settings.runtime.state_dir, &serving.namespace, &serving.group);
        let prepared = config.and_then(|config| {
            let journal = Arc::new(begin_journal(serving, &config, &dir)?);
            Ok(Prepared { config, journal, reaper: reaper.clone() })
        });
        let pod = Arc::new(Self {
            namespace: serving.namespace.clone(),
            id: serving.group.clone(),
            events,
            slots: Slots::new(settings.hypervisor.disk_slots),
            dir,
            sandbox: Life::default(),
            journal: prepared.as_ref().ok().map(|prepared| prepared.journal.clone()),
            reaper: reaper.clone(),
            streams: Arc::default(),
            host_network: HostNetwork::new(settings.runtime.host_network),
            stopped: Stopped::default(),
            pending_sockets: Arc::new(Semaphore::new(MOST_PENDING)),
            vm: OnceLock::new(),
            size: Mutex::default(),
            network: OnceLock::new(),
            prepared: Mutex::new(Some(prepared)),
            request_timeout: Duration::from_secs(settings.runtime.request_timeout_seconds.into()),
            containers: Mutex::default(),
            shutdown: Notify::new(),
        });
        if !sandbox::is_sandbox(&serving.bundle) {
            pod.launch(Shape::of_bundle(&serving.bundle));
        }
        pod
    }

    /// Starts the VM, once.
    pub fn launch(self: &Arc<Self>, shape: Result<Shape, BootError>) {
        let prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(prepared) = prepared else { return };
        let launched = prepared.and_then(|prepared| prepared.launch(&self.id, &self.dir, shape?));
        let vm = self.vm.get_or_init(|| match launched {
            Ok((vm, network)) => {
                self.network.get_or_init(|| network);
                Ok(vm)
            }
            Err(error) => {
                log::error!("the VM cannot be started: {error}");
                Err(Arc::new(error))
            }
        });
        if let Ok(vm) = vm {
            super::exits::watch(self, vm);
        }
    }

    /// The VM.
    ///
    /// # Errors
    /// Why there is none, or why it has ended.
    pub fn vm(&self) -> Result<&Arc<Vm>, TaskError> {
        let vm = self.vm.get().ok_or(TaskError::NoSandbox)?;
        let vm = vm.as_ref().map_err(|error| TaskError::Boot(error.clone()))?;
        match vm.end() {
            Some(end) => Err(TaskError::VmEnded(end.sentence())),
            None => Ok(vm),
        }
    }

    /// The VM while it lives.
    pub fn living_vm(&self) -> Option<&Arc<Vm>> {
        self.vm().ok()
    }

    /// The host's process that stands for every process in the guest. The one place that decides it.
    pub fn task_pid(&self) -> u32 {
        self.vm.get().and_then(|vm| vm.as_ref().ok()).map_or(0, |vm| vm.pid())
    }

    /// A container.
    ///
    /// # Errors
    /// When there is none of that id.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        let found = Name::new(id).ok().and_then(|id| self.table().get(&id).cloned());
        found.ok_or_else(|| TaskError::NoContainer(id.chars().take(128).collect()))
    }

    /// All containers.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        self.table().values().cloned().collect()
    }

    /// Adds a container.
    ///
    /// # Errors
    /// When there is one of that id.
    pub fn add(&self, container: &Arc<Container>) -> Result<(), TaskError> {
        let mut table = self.table();
        if table.contains_key(&container.id) {
            return Err(TaskError::ContainerExists(container.id.to_string()));
        }
        table.insert(container.id.clone(), container.clone());
        Ok(())
    }

    /// Forgets a container.
    pub fn remove(&self, id: &Name) {
        self.table().remove(id);
    }

    /// When a call must be done: a little before the caller gives up, so that it gets an answer.
    pub fn deadline(&self, timeout_nano: i64) -> Instant {
        let timeout = match u64::try_from(timeout_nano) {
            Ok(nanos) if nanos > 0 => Duration::from_nanos(nanos),
            _ => self.request_timeout,
        };
        Instant::now() + timeout.saturating_sub(MAX_MARGIN.min(timeout / 10))
    }

    /// Awaits a call to the guest, which the VM's end cuts short.
    ///
    /// # Errors
    /// The call's own, why the VM ended, or that nothing in it runs.
    pub async fn in_guest<T>(
        &self,
        vm: &Vm,
        call: impl Future<Output = Result<T, AgentError>>,
    ) -> Result<T, TaskError> {
        if self.stopped.is_on() {
            return Err(TaskError::PodPaused);
        }
        tokio::select! {
            biased;
            result = call => match result {
                // The VMM tells why, on another socket.
                Err(AgentError::Gone) => match tokio::time::timeout(REASON_LIMIT, vm.ended()).await {
                    Ok(end) => Err(TaskError::VmEnded(end.sentence())),
                    Err(_) => Err(AgentError::Gone.into()),
                },
                other => Ok(other?),
            },
            end = vm.ended() => Err(TaskError::VmEnded(end.sentence())),
        }
    }

    /// Waits until the guest has the pod's network.
    ///
    /// # Errors
    /// Why it has not, or why the VM ended.
    pub async fn network_ready(&self, vm: &Vm) -> Result<(), TaskError> {
        let Some(Some(network)) = self.network.get() else { return Ok(()) };
        match network.wait().await {
            Ok(()) => Ok(()),
            Err(error) if error.guest_is_gone() => {
                // The VMM tells why, on another socket.
                match tokio::time::timeout(REASON_LIMIT, vm.ended()).await {
                    Ok(end) => Err(TaskError::VmEnded(end.sentence())),
                    Err(_) => Err(TaskError::Network(error)),
                }
            }
            Err(error) => Err(TaskError::Network(error)),
        }
    }

    /// Follows a connection or a first datagram of somebody in the guest.
    pub fn dialled(&self, vm: &Arc<Vm>, dialled: &api::HostDialled) {
        let network = self.network.get().and_then(Option::as_ref);
        self.host_network.dialled(vm, dialled, &network.map(Ready::servers).unwrap_or_default());
    }

    /// Whether the pod has a network namespace, which is the guest's network then.
    pub fn has_netns(&self) -> bool {
        matches!(self.network.get(), Some(Some(_)))
    }

    /// Writes down a logger that has been started, so that it does not outlive the pod.
    ///
    /// # Errors
    /// When it cannot be written down.
    pub fn note_logger(&self, opened: &Opened) -> Result<(), TaskError> {
        let logger = opened.kept.logger.as_ref().and_then(Logger::id);
        let (Some(journal), Some(logger)) = (&self.journal, logger) else { return Ok(()) };
        journal.intend(&Entry::Logger(logger)).map_err(TaskError::State)
    }

    /// Asks the process to end.
    pub fn request_shutdown(&self) {
        self.shutdown.notify_one();
    }

    /// Waits until somebody asks.
    pub async fn shutdown_requested(&self) {
        self.shutdown.notified().await;
    }

    /// Ends the VM, if there is one, and tells what that ended.
    pub async fn stop_vm(&self) {
        if let Some(Ok(vm)) = self.vm.get() {
            vm.stop().await;
            super::exits::all_ended(self);
        }
    }

    /// Ends the VM, tells what that ended, and undoes everything on the host.
    pub async fn wind_up(&self) {
        self.stop_vm().await;
        log::debug!("the VM is gone");
        // What is still being made would not be undone. Where it hangs, `delete` ends this process first.
        if let Some(Some(network)) = self.network.get()
            && tokio::time::timeout(NETWORK_LIMIT, network.wait()).await.is_err()
        {
            log::warn!("the pod's network is still being set up");
        }
        self.events.flush(Duration::from_secs(3)).await;
        if let Err(error) = undo(&self.dir) {
            log::error!("something is left for `delete` to undo: {error}");
        }
        log::debug!("everything is undone");
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<Name, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
impl Pod {
    /// A pod around a VM that a test plays.
    pub fn around(vm: Arc<Vm>, events: Publisher, dir: PodDir) -> Arc<Self> {
        let pod = Arc::new(Self {
            namespace: Name::new("ns").unwrap(),
            id: Name::new("pod").unwrap(),
            events,
            slots: Slots::new(1),
            dir,
            sandbox: Life::default(),
            journal: None,
            reaper: Reaper::default(),
            streams: Arc::default(),
            host_network: HostNetwork::new(false),
            stopped: Stopped::default(),
            pending_sockets: Arc::new(Semaphore::new(MOST_PENDING)),
            vm: OnceLock::from(Ok(vm.clone())),
            size: Mutex::default(),
            network: OnceLock::new(),
            prepared: Mutex::default(),
            request_timeout: Duration::from_secs(5),
            containers: Mutex::default(),
            shutdown: Notify::new(),
        });
        super::exits::watch(&pod, &vm);
        pod
    }
}

/// Runtime options and the configuration they lead to.
///
/// # Errors
/// When either is not understood.
pub fn configure(serving: &Serving) -> Result<(RuntimeOptions, Config), BootError> {
    let mut options = RuntimeOptions::default();
    for any in &serving.options {
        let parsed = RuntimeOptions::from_any(any)?;
        if parsed != RuntimeOptions::default() {
            options = parsed;
        }
    }
    let config = Config::load(&options)?;
    Ok((options, config))
}

/// What a VM is to be like.
#[derive(Debug, Default)]
pub struct Shape {
    /// What its size comes from.
    pub limits: Limits,
    /// Where the VMM is accounted.
    pub cgroup: Option<Cgroup>,
    /// The VMM's `oom_score_adj`.
    pub oom_score: Option<i32>,
    /// The network namespace whose interfaces become the guest's.
    pub netns: Option<PathBuf>,
    /// The pod's, of which some may change settings.
    pub annotations: BTreeMap<String, String>,
    /// The pod's own namespaces, where it has users of its own: they belong to those, and so does its network.
    pub namespaces: Option<api::SetUpPodRequest>,
}

impl Shape {
    /// As the pod's first container wants it.
    ///
    /// # Errors
    /// When its spec is not understood, or it cannot be the first.
    fn of_bundle(bundle: &Path) -> Result<Self, BootError> {
        let spec = Spec::read(bundle)?;
        if let Some(pod) = spec.member_of() {
            return Err(BootError::PodEnded(pod.to_owned()));
        }
        let cgroup = spec.cgroups_path().map(Cgroup::locate).transpose()?;
        let netns = spec.network_namespace().map(Path::to_owned);
        let annotations = spec.annotations().clone();
        let namespaces = spec.users().map(|users| namespaces_of(users, String::new(), HashMap::new()));
        let (limits, oom_score) = (Limits::of(&spec), spec.oom_score());
        Ok(Self { limits, cgroup, oom_score, netns, annotations, namespaces })
    }
}

/// What the agent is asked for the namespaces of a pod.
pub fn namespaces_of(
    users: IdMap,
    hostname: String,
    sysctls: HashMap<String, String>,
) -> api::SetUpPodRequest {
    let list = |mappings: Vec<Mapping>| {
        let one = |Mapping { container, host, size }| api::IdMapping {
            container,
            host,
            size,
            ..Default::default()
        };
        mappings.into_iter().map(one).collect()
    };
    let (uids, gids) = (list(users.uids), list(users.gids));
    api::SetUpPodRequest { hostname, sysctls, uids, gids, ..Default::default() }
}

/// Everything that a VM can be started from as soon as its shape is known.
struct Prepared {
    config: Config,
    journal: Arc<Journal>,
    reaper: Reaper,
}

impl Prepared {
    fn launch(&self, id: &Name, dir: &PodDir, shape: Shape) -> Result<(Arc<Vm>, Option<Ready>), BootError> {
        let config = self.config.for_pod(&shape.annotations)?;
        let (hypervisor, runtime) = (&config.hypervisor, &config.runtime);
        let machine = Machine::new(&config, &shape.limits, host_memory_mib());
        let slots = if shape.netns.is_some() { hypervisor.nic_slots } else { 0 };
        let nics = Nics { slots, queues: queue_pairs(machine.all_vcpus()) };
        let launcher = Launcher {
            config: &config,
            machine,
            id: id.as_str(),
            shared: &dir.shared(),
            cgroup: shape.cgroup,
            oom_score: shape.oom_score,
            nic_slots: slots,
            debug: log::log_enabled!(log::Level::Debug),
        };
        let vm = launcher.launch(&self.journal, &self.reaper, || mount_shared(dir, &self.journal))?;
        let network = shape.netns.map(|netns| {
            let limit = hypervisor.boot_timeout_seconds + runtime.request_timeout_seconds;
            let deadline = Instant::now() + Duration::from_secs(limit.into());
            let namespaces = shape.namespaces;
            Ready::begin(netns, nics, namespaces, self.journal.clone(), vm.clone(), deadline)
        });
        Ok((vm, network))
    }
}

fn begin_journal(serving: &Serving, config: &Config, dir: &PodDir) -> Result<Journal, StateError> {
    // The socket is ours, so whoever left this behind is dead or dying.
    if dir.path().exists() {
        undo_predecessor(dir, &serving.socket)?;
    }
    let pointer = serving.bundle.join(crate::STATE_DIR_FILE);
    if config.runtime.state_dir != Config::default().runtime.state_dir {
        let text = config.runtime.state_dir.to_string_lossy();
        std::fs::write(&pointer, text.as_bytes()).map_err(|source| StateError { path: pointer, source })?;
    }
    dir.create()?;
    let journal = Journal::create(dir.journal())?;
    let own =
        ProcessId::of_self().map_err(|source| StateError { path: PathBuf::from("/proc/self"), source })?;
    // Undone last first, so the shim is the last to go.
    journal.intend(&Entry::File(serving.socket.clone()))?;
    journal.intend(&Entry::Shim(own))?;
    Ok(journal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(kind: &str) -> Result<Shape, BootError> {
        let bundle = tempfile::tempdir().unwrap();
        let annotations = format!(
            r#"{{"io.kubernetes.cri.sandbox-id":"web","io.kubernetes.cri.container-type":"{kind}"}}"#
        );
        let spec = format!(r#"{{"process":{{"args":["a"]}},"annotations":{annotations}}}"#);
        std::fs::write(bundle.path().join("config.json"), spec).unwrap();
        Shape::of_bundle(bundle.path())
    }

    #[test]
    fn a_container_of_a_pod_that_has_ended_makes_no_vm() {
        assert!(shape("sandbox").is_ok());
        let error = shape("container").unwrap_err();
        assert_eq!(error.to_string(), "the pod web has ended and takes no more containers; run a new one");
        assert!(!error.is_invalid());
    }
}

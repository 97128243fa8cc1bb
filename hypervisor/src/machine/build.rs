//! Building a machine.
//!
//! The order matters twice: memory is registered before the first vCPU, since later it costs milliseconds; and threads
//! are started last, when nothing can fail any more that they would have to be told of.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::thread;

use vmshim_protocol::control::{FailureKind, Outcome};
use vmshim_protocol::nic::queue_pairs;

use super::kvm::{KvmError, Vm};
use super::platform::{Platform, PlatformError};
use super::{Ending, Machine, Plan};
use crate::boot::{self, BootError, BootSource, CommandLine, CommandLineError, Place, RootImage};
use crate::devices::legacy::Console;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::blk::Blk;
use crate::devices::virtio::fs::{SharedDirectory, SharedDirectoryError, VirtioFs};
use crate::devices::virtio::mem::Mem;
use crate::devices::virtio::net::{Limits, Net};
use crate::devices::virtio::pmem::{Persistent, Pmem};
use crate::devices::virtio::rng::{Entropy, Rng};
use crate::devices::virtio::vsock::{Streams, Vsock};
use crate::devices::virtio::{SharedDevice, Throttle};
use crate::event_loop::EventLoop;
use crate::jail::{self, JailError, Role};
use crate::memory::{GuestRam, MemoryError};
use crate::sync::lock;
use crate::vcpu::{self, Gate, Surroundings, Topology, Vcpu, VcpuError};

/// A device worker's stack.
const STACK_BYTES: usize = 256 << 10;

/// What a machine is made of, beside its [`Plan`].
pub struct Parts {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The kernel's file.
    pub kernel: File,
    /// The root file system's file.
    pub root_image: File,
    /// The directory to share with the guest.
    pub shared: Option<SharedDirectory>,
    /// A listening socket for host programs.
    pub vsock_listener: Option<OwnedFd>,
    /// The ports that the guest may dial.
    pub streams: Streams,
    /// Where the machine's end is declared.
    pub ending: Ending,
    /// Called on any thread when the guest has taken up more memory.
    pub resized: Box<dyn Fn() + Send>,
}

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A device.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// The kernel cannot be started.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Nor be told what it needs to know.
    #[error(transparent)]
    CommandLine(#[from] CommandLineError),
    /// The shared directory.
    #[error(transparent)]
    Shared(#[from] SharedDirectoryError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// Nor can this process be confined.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// A device, a thread or a descriptor.
    #[error("the host lacks a resource for the machine's devices")]
    Host(#[from] io::Error),
}

impl BuildError {
    /// Whose fault it is.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Boot(BootError::Map(_) | BootError::Memory(_) | BootError::Seed(_)) => FailureKind::Host,
            Self::Boot(_) | Self::CommandLine(_) | Self::Shared(_) | Self::Kvm(KvmError::NotKvm(_)) => {
                FailureKind::InvalidArgument
            }
            _ => FailureKind::Host,
        }
    }
}

/// Builds the machine of `plan` from `parts`. Its vCPUs wait; devices that work on the `io` thread use `io`.
///
/// # Errors
/// See [`BuildError`]. What was built so far goes away with the process, which has no use any more.
pub fn build(plan: &Plan, parts: Parts, io: &EventLoop) -> Result<Machine, BuildError> {
    let ram = GuestRam::growing(plan.memory_bytes(), plan.growth_bytes())?;
    let vm = Vm::new(parts.kvm, &ram)?;
    let console = Console::default();
    let mut platform = Platform::default();
    platform.add_legacy(&vm, console.clone(), &parts.ending)?;

    let vsock = Arc::new(Mutex::new(Vsock::new(parts.streams, parts.vsock_listener)?));
    platform.add_virtio(&vm, &ram, io, SharedDevice::new(vsock.clone()))?;
    let fs_loop = EventLoop::new()?;
    let fs = parts.shared.map(VirtioFs::new).transpose()?.map(|fs| Arc::new(Mutex::new(fs)));
    if let Some(fs) = &fs {
        platform.add_virtio(&vm, &ram, &fs_loop, SharedDevice::new(fs.clone()))?;
    }
    let blk_loop = EventLoop::new()?;
    let slots: Vec<_> = (0..plan.disk_slots()).map(|slot| Arc::new(Mutex::new(Blk::new(slot)))).collect();
    for slot in &slots {
        platform.add_virtio(&vm, &ram, &blk_loop, SharedDevice::new(slot.clone()))?;
    }
    platform.add_virtio(&vm, &ram, io, SharedDevice::new(Arc::new(Mutex::new(Rng::new(Entropy)))))?;
    platform.add_virtio(&vm, &ram, io, SharedDevice::new(Arc::new(Mutex::new(Balloon::new()))))?;
    let root_image = RootImage::new(parts.root_image, &ram)?;
    if let Place::Pmem(range) = root_image.place() {
        platform.add_virtio(
            &vm,
            &ram,
            io,
            SharedDevice::new(Arc::new(Mutex::new(Pmem::new(Persistent::new(range))))),
        )?;
    }
    let net_loop = EventLoop::new()?;
    let nics: Vec<_> = (0..plan.nic_slots()).map(|slot| nic(plan, slot)).collect::<io::Result<_>>()?;
    for nic in &nics {
        platform.add_virtio(&vm, &ram, &net_loop, SharedDevice::new(nic.clone()))?;
    }

    let mem = ram.growth().map(|growth| Arc::new(Mutex::new(Mem::new(growth.clone(), parts.resized))));
    if let Some(mem) = &mem {
        platform.add_virtio(&vm, &ram, io, SharedDevice::new(mem.clone()))?;
    }

    let parameters = root_image.kernel_parameters();
    let command_line =
        CommandLine::new(plan.memory_mib(), parameters, &platform.windows, plan.kernel_params())?;
    let source = BootSource {
        kernel: &parts.kernel,
        root_image: &root_image,
        command_line: &command_line,
        vcpus: plan.vcpus(),
    };
    let entry = boot::load(&ram, &source)?;

    let topology = Topology { vcpus: plan.vcpus(), tsc_deadline: vm.tsc_deadline };
    let vcpus: Vec<Vcpu> = (0..plan.vcpus())
        .map(|index| Vcpu::new(&vm.fd, index, &vm.supported_cpuid, topology))
        .collect::<Result<_, _>>()?;
    if let Some(first) = vcpus.first() {
        first.enter_kernel_at(entry)?;
    }

    let surroundings = Surroundings {
        ports: Arc::new(platform.ports),
        registers: Arc::new(platform.registers),
        gate: Arc::new(Gate::default()),
        ending: parts.ending.clone(),
        first_run: Arc::new(AtomicU64::new(0)),
        exits: Arc::new(AtomicU64::new(0)),
    };
    let (gate, first_run, exits) =
        (surroundings.gate.clone(), surroundings.first_run.clone(), surroundings.exits.clone());
    vcpu::install_signal_handler().map_err(io::Error::from)?;
    for vcpu in vcpus {
        let ending = parts.ending.clone();
        vcpu.spawn(surroundings.clone(), move || confine(Role::Vcpu, &ending))?;
    }
    if !slots.is_empty() {
        let ending = parts.ending.clone();
        spawn_worker("blk", blk_loop, parts.ending.clone(), move || confine(Role::Blk, &ending))?;
    }
    if !nics.is_empty() {
        let ending = parts.ending.clone();
        spawn_worker("net", net_loop, parts.ending.clone(), move || confine(Role::Net, &ending))?;
    }
    if let Some(fs) = fs {
        let ending = parts.ending.clone();
        spawn_worker("fs", fs_loop, parts.ending, move || {
            if let Err(error) = lock(&fs).enter_thread() {
                give_up(&ending, &format!("The fs thread cannot prepare itself: {error}."));
            }
            confine(Role::Fs, &ending);
        })?;
    }
    jail::confine(Role::Io)?;
    let devices = platform.devices;
    Ok(Machine { _vm: vm.fd, gate, slots, nics, mem, vsock, devices, console, first_run, exits })
}

fn nic(plan: &Plan, slot: u8) -> io::Result<Arc<Mutex<Net>>> {
    let limits =
        Limits { receive: Throttle::new(plan.receive_limit())?, send: Throttle::new(plan.send_limit())? };
    Ok(Arc::new(Mutex::new(Net::new(slot, queue_pairs(plan.vcpus()), limits))))
}

fn spawn_worker(
    name: &str,
    event_loop: EventLoop,
    ending: Ending,
    prepare: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    let thread = thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES);
    thread.spawn(move || {
        prepare();
        let Err(error) = event_loop.run();
        give_up(&ending, &format!("A device thread cannot wait for events: {error}."));
    })?;
    Ok(())
}

fn confine(role: Role, ending: &Ending) {
    if let Err(error) = jail::confine(role) {
        give_up(ending, &format!("A thread cannot be confined: {error}."));
    }
}

/// Ends the machine; the calling thread does nothing any more.
fn give_up(ending: &Ending, message: &str) -> ! {
    ending.declare(Outcome::Failed { message: message.to_owned() });
    loop {
        thread::park();
    }
}

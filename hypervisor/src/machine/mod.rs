//! The machine as a whole: what it is made of, and what can be done to it.

mod build;
mod config;
mod ending;
mod kvm;
mod platform;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;
use vmshim_protocol::control::Statistics;

pub use build::{BuildError, Parts, build};
pub use config::{ConfigError, MAX_SLOTS, Plan};
pub use ending::Ending;
pub use kvm::KvmError;

use crate::devices::legacy::Console;
use crate::devices::virtio::blk::{Blk, DiskError};
use crate::devices::virtio::mem::Mem;
use crate::devices::virtio::net::{Net, TapError};
use crate::devices::virtio::{SharedDevice, VirtioDevice, vsock};
use crate::sync::lock;
use crate::vcpu::Gate;

/// A machine that can run.
pub struct Machine {
    /// Kept open: KVM disconnects all interrupts when the machine's descriptor is closed.
    _vm: VmFd,
    gate: Arc<Gate>,
    slots: Vec<Arc<Mutex<Blk>>>,
    nics: Vec<Arc<Mutex<Net>>>,
    /// None where the machine's memory cannot grow.
    mem: Option<Arc<Mutex<Mem>>>,
    vsock: Arc<Mutex<vsock::Vsock>>,
    /// All virtio devices, in their order on the bus.
    devices: Vec<SharedDevice>,
    console: Console,
    first_run: Arc<AtomicU64>,
    exits: Arc<AtomicU64>,
}

/// Why a disk cannot be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// Beyond the configured number.
    #[error("there is no disk slot {slot}; this machine has {slots}")]
    NoSuchSlot {
        /// Asked for.
        slot: u8,
        /// How many there are.
        slots: usize,
    },
    /// A disk is in it.
    #[error("disk slot {0} is taken")]
    Taken(u8),
    /// No disk is in it.
    #[error("disk slot {0} is empty")]
    Empty(u8),
    /// Not a disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// Why a tap cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum NicError {
    /// Beyond the configured number.
    #[error("there is no NIC slot {slot}; this machine has {slots}")]
    NoSuchSlot {
        /// Asked for.
        slot: u8,
        /// How many there are.
        slots: usize,
    },
    /// A tap is in it.
    #[error("NIC slot {0} is taken")]
    Taken(u8),
    /// Not a tap.
    #[error(transparent)]
    Tap(#[from] TapError),
}

impl Machine {
    /// Lets the vCPUs run, from the start or from where they were paused.
    pub fn run(&self) {
        self.gate.open();
    }

    /// Returns when no vCPU runs. Devices finish what they have begun.
    pub fn pause(&self) {
        self.gate.close();
    }

    /// Puts a disk, made of one or more pieces, into an empty slot.
    ///
    /// # Errors
    /// See [`SlotError`].
    pub fn attach_disk(&self, slot: u8, pieces: Vec<OwnedFd>, read_only: bool) -> Result<(), SlotError> {
        let attached = lock(self.slot(slot)?).attach(pieces, read_only)?;
        if attached { Ok(()) } else { Err(SlotError::Taken(slot)) }
    }

    /// Empties a slot, once its request under way is answered.
    ///
    /// # Errors
    /// See [`SlotError`].
    pub fn detach_disk(&self, slot: u8) -> Result<(), SlotError> {
        let detached = lock(self.slot(slot)?).detach();
        if detached { Ok(()) } else { Err(SlotError::Empty(slot)) }
    }

    /// Connects an idle NIC slot to the queues of a tap.
    ///
    /// # Errors
    /// See [`NicError`].
    pub fn attach_nic(&self, slot: u8, queues: Vec<OwnedFd>) -> Result<(), NicError> {
        let missing = NicError::NoSuchSlot { slot, slots: self.nics.len() };
        let nic = self.nics.get(usize::from(slot)).ok_or(missing)?;
        let attached = lock(nic).attach(queues)?;
        if attached { Ok(()) } else { Err(NicError::Taken(slot)) }
    }

    /// Asks the guest to have `bytes` of memory beyond what it has booted with. False where there is no room for it.
    pub fn resize_memory(&self, bytes: u64) -> bool {
        self.mem.as_ref().map_or(bytes == 0, |mem| lock(mem).request(bytes))
    }

    /// Bytes of memory that the guest shall have, and that it has taken up, beyond what it has booted with.
    pub fn growth(&self) -> (u64, u64) {
        self.mem.as_ref().map_or((0, 0), |mem| {
            let mem = lock(mem);
            (mem.requested_bytes(), mem.taken_up_bytes())
        })
    }

    fn slot(&self, slot: u8) -> Result<&Mutex<Blk>, SlotError> {
        let missing = SlotError::NoSuchSlot { slot, slots: self.slots.len() };
        self.slots.get(usize::from(slot)).map(Arc::as_ref).ok_or(missing)
    }

    /// Takes over what the guest had put into its streams when it ended. Called on the `io` thread, after which nothing
    /// comes any more.
    pub fn drain_streams(&self) {
        let mut vsock = lock(&self.vsock);
        for index in 0..vsock.queue_sizes().len() {
            vsock.on_queue(index);
        }
    }

    /// The last lines of the guest's console.
    pub fn console(&self) -> Vec<String> {
        self.console.lines()
    }

    /// What is counted here; the rest is left at 0.
    pub fn statistics(&self) -> Statistics {
        Statistics {
            first_instruction_ns: self.first_run.load(Ordering::Acquire),
            grown_bytes: self.mem.as_ref().map_or(0, |mem| lock(mem).plugged_bytes()),
            vcpu_exits: self.exits.load(Ordering::Relaxed),
            devices: self.devices.iter().map(SharedDevice::statistics).collect(),
            ..Default::default()
        }
    }
}

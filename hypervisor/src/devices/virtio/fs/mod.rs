//! virtio-fs: a host directory, served to the guest inside this process (virtio 1.2, section 5.11).
//!
//! The guest is hostile and so is every byte of a request. The device serves what lies below one directory, which the
//! jail has made the root of this process's mount namespace, and what is mounted there; it has no way to name anything
//! else.
//!
//! # Layers
//! [`chain`] collects a request's buffers, [`session`] translates between bytes and requests ([`wire`], [`body`]), and
//! [`tree`] carries them out. Data go between files and guest memory with no copy in between.
//!
//! # Why this is not fuse-backend-rs
//! Its `PassthroughFs` cannot work in the jail and cannot be wrapped so that it does (version 0.14): it makes hard links
//! with `AT_EMPTY_PATH`, which before Linux 6.10 needs a capability that no user namespace gives; it reaches extended
//! attributes by the path `/proc/self/fd`, which the jail has not; it keeps a table entry for each inode that a guest ever
//! made and forgot, or else has numbers for 255 mounts in a VM's life; it drops the capabilities over files while it acts
//! for a user, so that directories writable by a supplementary group (a pod's `fsGroup`) are not; it passes a guest's
//! open flags on as they are. It has neither `O_TMPFILE`, `copy_file_range` nor access control lists. And it pins a
//! second generation of vm-memory and virtio-queue.
//!
//! # Thread and locks
//! All work is done on the thread of the `fs` event loop, under the device's lock. File I/O may wait for a disk there,
//! and holds up nothing but this device. [`VirtioFs::enter_thread`] prepares the thread; [`needs`] says what it needs.
//!
//! # What is kept open, and how it is let go
//! Each inode that the guest's kernel remembers costs an `O_PATH` descriptor, and each open file one. They keep the
//! mount they were opened on, so a plain `umount` on the host answers `EBUSY` while the guest remembers any of it. The
//! shim therefore unmounts with `MNT_DETACH`, which always succeeds and reaches this mount namespace by propagation. The
//! device waits for changes of its mount table and then closes all it held of mounts that are gone, open files
//! included, whatever the guest still remembers; requests about them are answered with `ESTALE`. From then on the file
//! system below is free. `DESTROY`, a device reset and a new `INIT` close everything.
//!
//! # What the guest may remember
//! By the layout of the directory, see [`vmshim_protocol::shared`] and [`tree`]. There is no write-back cache: it would
//! make the guest's kernel the only judge of a file's size and times, for the whole device.
//!
//! # What stays in the guest
//! Locks (`flock`, `fcntl`) and inotify see what happens in this guest only. Device nodes are not made here, and those
//! of an image should not be used (`-o nodev`). All mounts are one file system to the guest; inode numbers are kept
//! apart by their upper bits.

mod body;
mod chain;
mod session;
mod tree;
mod wire;

pub mod needs;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use virtio_queue::{Queue, QueueT};
use vmshim_protocol::control::DeviceStatistics;
use vmshim_protocol::shared::TAG;

use super::{Activation, ActivationError, Interrupt, VirtioDevice, read_space};
use crate::event_loop::{Interest, Readiness};
use crate::memory::{GuestMemory, GuestRam};
use chain::Chain;
use session::Session;
use tree::{Limits, Tree, Worker};

/// Device type (virtio 1.2, section 5).
const DEVICE_TYPE: u32 = 26;

/// Ring features (virtio 1.2, section 6).
const FEATURES: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX
    | 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

/// `hiprio`, which carries `FORGET`, and one request queue. Linux makes requests of at most the queue's size less 4 pages.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// Request queues, as the configuration space says.
const REQUEST_QUEUES: u32 = 1;

/// Bytes of the tag in the configuration space.
const TAG_BYTES: usize = 36;

/// The token of the mount table in the event loop.
const MOUNT_TABLE: u32 = 0;

/// Why a directory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum SharedDirectoryError {
    /// It is not what it should be.
    #[error("the shared directory cannot be used; it must be a directory that the host lets us read")]
    Directory(#[source] Errno),
    /// There is no `/proc`, or not this process in it.
    #[error("/proc must be mounted to share a directory")]
    Proc(#[source] io::Error),
    /// The limit on descriptors is not known.
    #[error("the host does not say how many files may be open")]
    Limit(#[source] Errno),
}

/// The directory to share and what it takes to serve it. [`needs`] says where each descriptor comes from.
#[derive(Debug)]
pub struct SharedDirectory {
    /// The directory, opened with `O_PATH` in this process's own mount namespace, of which it is the root.
    pub root: OwnedFd,
    /// `/proc/self/fd`, as a mount of its own.
    pub proc_self_fd: OwnedFd,
    /// `/proc/self/mountinfo` of this process's mount namespace, waited for and never read. Without it, unmounted file
    /// systems stay in use until the guest forgets them.
    pub mount_table: Option<OwnedFd>,
}

impl SharedDirectory {
    /// The directory that `root` holds, for a process that sees `/proc`.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn open(root: OwnedFd) -> Result<Self, SharedDirectoryError> {
        let open = |path: &str, flags| {
            let file = File::options().read(true).custom_flags(flags).open(path);
            file.map(OwnedFd::from).map_err(SharedDirectoryError::Proc)
        };
        let proc_self_fd = open("/proc/self/fd", nix::libc::O_PATH | nix::libc::O_DIRECTORY)?;
        Ok(Self { root, proc_self_fd, mount_table: Some(open("/proc/self/mountinfo", 0)?) })
    }
}

/// The device.
#[derive(Debug)]
pub struct VirtioFs {
    session: Session,
    proc_self_fd: OwnedFd,
    mount_table: Option<OwnedFd>,
    worker: Option<Thread>,
    active: Option<Active>,
    statistics: DeviceStatistics,
}

/// A worker and the thread that it is: [`VirtioFs::worker`] hands it out there only.
#[derive(Debug)]
struct Thread {
    id: std::thread::ThreadId,
    worker: Worker,
}

/// What the device has between activation and reset.
#[derive(Debug)]
struct Active {
    memory: GuestRam,
    queues: Vec<Queue>,
    interrupt: Interrupt,
    registrar: crate::event_loop::Registrar,
}

impl VirtioFs {
    /// The device that shares `directory`.
    ///
    /// # Errors
    /// See [`SharedDirectoryError`].
    pub fn new(directory: SharedDirectory) -> Result<Self, SharedDirectoryError> {
        let SharedDirectory { root, proc_self_fd, mount_table } = directory;
        let tree = Tree::new(root, limits()?).map_err(SharedDirectoryError::Directory)?;
        let statistics = DeviceStatistics { name: "fs".to_owned(), ..Default::default() };
        Ok(Self {
            session: Session::new(tree),
            proc_self_fd,
            mount_table,
            worker: None,
            active: None,
            statistics,
        })
    }

    /// Prepares the calling thread to serve the directory: to be called first thing on the `fs` thread, before its
    /// seccomp filter is set. A thread that has not called it is prepared when it serves its first request.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn enter_thread(&mut self) -> io::Result<()> {
        Self::worker(&mut self.worker, &self.proc_self_fd)?;
        Ok(())
    }

    fn worker<'a>(current: &'a mut Option<Thread>, proc_self_fd: &OwnedFd) -> Result<&'a mut Worker, Errno> {
        let id = std::thread::current().id();
        match current {
            Some(thread) if thread.id == id => {}
            _ => *current = Some(Thread { id, worker: Worker::enter(proc_self_fd.as_fd())? }),
        }
        current.as_mut().map(|thread| &mut thread.worker).ok_or(Errno::ESRCH)
    }

    /// Serves all requests of a queue.
    fn serve(&mut self, index: usize) {
        let Some(active) = &mut self.active else { return };
        let Some(queue) = active.queues.get_mut(index) else { return };
        let Ok(worker) = Self::worker(&mut self.worker, &self.proc_self_fd) else {
            self.statistics.errors += 1;
            return;
        };
        let memory: &GuestMemory = &active.memory;
        // A ring that makes no sense ends the round; the next doorbell tries again.
        loop {
            if queue.disable_notification(memory).is_err() {
                return;
            }
            while let Some(descriptors) = queue.pop_descriptor_chain(memory) {
                let head = descriptors.head_index();
                let replied = match Chain::collect(memory, descriptors) {
                    Ok(chain) => count(&mut self.statistics, self.session.serve(worker, chain)),
                    Err(_) => {
                        self.statistics.errors += 1;
                        0
                    }
                };
                if queue.add_used(memory, head, replied).is_err() {
                    return;
                }
                // A synchronous caller waits for each reply: tell at once, not at the end of the round.
                if queue.needs_notification(memory).unwrap_or(true) {
                    active.interrupt.signal_used_queue();
                }
            }
            if !queue.enable_notification(memory).unwrap_or(false) {
                return;
            }
        }
    }
}

/// Adds up what a request did; returns the length of its reply.
fn count(statistics: &mut DeviceStatistics, done: session::Done) -> u32 {
    let bytes = |count| u64::try_from(count).unwrap_or(u64::MAX);
    statistics.requests += 1;
    statistics.read_bytes = statistics.read_bytes.saturating_add(bytes(done.read));
    statistics.written_bytes = statistics.written_bytes.saturating_add(bytes(done.written));
    statistics.errors += u64::from(done.malformed);
    done.replied
}

/// What an inode takes in the guest's memory at least. No honest guest remembers more than fit there, so a hostile one
/// cannot make the host remember more either.
const GUEST_BYTES_PER_INODE: u64 = 1024;

/// The guest gets nine tenths of the process's descriptors, most of them for inodes. The rest is for the other devices.
fn limits() -> Result<Limits, SharedDirectoryError> {
    let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        .map_err(SharedDirectoryError::Limit)?;
    let all = usize::try_from(soft.min(needs::OPEN_FILES)).unwrap_or(usize::MAX);
    Ok(Limits { inodes: all / 10 * 8, handles: all / 10 })
}

impl VirtioDevice for VirtioFs {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        &self.statistics.name
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let mut space = [0; TAG_BYTES + size_of::<u32>()];
        space[..TAG.len()].copy_from_slice(TAG.as_bytes());
        space[TAG_BYTES..].copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        read_space(&space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let Activation { memory, mut queues, features, interrupt, registrar } = activation;
        if queues.len() < QUEUE_SIZES.len() {
            return Err(ActivationError::MissingQueues { enabled: queues.len(), needed: QUEUE_SIZES.len() });
        }
        let event_idx = features & 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX != 0;
        for queue in &mut queues {
            queue.set_event_idx(event_idx);
        }
        if let Some(table) = &self.mount_table {
            // A change is reported as an error condition.
            registrar.add(table, Interest::NONE, MOUNT_TABLE).map_err(ActivationError::Host)?;
        }
        let fit = usize::try_from(memory.size() / GUEST_BYTES_PER_INODE).unwrap_or(usize::MAX);
        self.session.tree().limit_inodes(fit);
        self.active = Some(Active { memory, queues, interrupt, registrar });
        Ok(())
    }

    fn reset(&mut self) {
        self.session.clear();
        let Some(active) = self.active.take() else { return };
        if let Some(table) = &self.mount_table {
            // It was added at activation; if it is gone, nothing is left to do.
            let _ = active.registrar.remove(table);
        }
    }

    fn on_queue(&mut self, index: usize) {
        self.serve(index);
    }

    fn on_event(&mut self, token: u32, _readiness: Readiness) {
        // Looking at mount points needs the thread's capabilities.
        if token == MOUNT_TABLE && Self::worker(&mut self.worker, &self.proc_self_fd).is_ok() {
            self.session.tree().release_unmounted();
        }
    }

    fn statistics(&self) -> DeviceStatistics {
        self.statistics.clone()
    }
}

//! A device between its vCPUs' side, the transport, and its worker thread's event loop.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vmshim_protocol::control::DeviceStatistics;

use super::VirtioDevice;
use crate::event_loop::{EventLoop, Handler, Interest, Readiness, Registrar};
use crate::sync::lock;

/// A device that a transport and a worker thread share.
#[derive(Clone)]
pub struct SharedDevice {
    device: Arc<Mutex<dyn VirtioDevice>>,
    active: Arc<AtomicBool>,
    /// Counters as they were when last asked for.
    counted: Arc<Mutex<DeviceStatistics>>,
}

impl SharedDevice {
    /// Shares a device that has not been started.
    pub fn new(device: Arc<Mutex<dyn VirtioDevice>>) -> Self {
        let counted = lock(&device).statistics();
        Self { device, active: Arc::new(AtomicBool::new(false)), counted: Arc::new(Mutex::new(counted)) }
    }

    /// The device, for a bounded amount of work.
    pub fn lock(&self) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
        lock(&self.device)
    }

    /// Whether the device has been started. To be asked and set under [`SharedDevice::lock`].
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    /// See [`SharedDevice::is_active`].
    pub fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Release);
    }

    /// The device's counters. Never waits: of a device that is at work at this moment, which may be a slow disk's, one
    /// gets those of last time.
    pub fn statistics(&self) -> DeviceStatistics {
        let mut counted = lock(&self.counted);
        if let Ok(device) = self.device.try_lock() {
            *counted = device.statistics();
        }
        counted.clone()
    }

    /// A registrar whose events become [`VirtioDevice::on_event`] on the thread of `event_loop`.
    pub fn registrar(&self, event_loop: &EventLoop) -> Registrar {
        event_loop.registrar(Arc::new(Events(self.clone())))
    }

    /// Makes one event per queue, to be rung by the guest, which become [`VirtioDevice::on_queue`] on the thread of
    /// `event_loop`.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn doorbells(&self, event_loop: &EventLoop) -> io::Result<Arc<Doorbells>> {
        let queues = self.lock().queue_sizes().len();
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let events = (0..queues).map(|_| EventFd::from_flags(flags)).collect::<Result<_, _>>()?;
        let doorbells = Arc::new(Doorbells { device: self.clone(), events });
        let registrar = event_loop.registrar(doorbells.clone());
        for (token, event) in (0..).zip(&doorbells.events) {
            registrar.add(event, Interest::READ, token)?;
        }
        Ok(doorbells)
    }
}

/// The doorbells of a device's queues. What comes while the device is not started is dropped.
pub struct Doorbells {
    device: SharedDevice,
    events: Vec<EventFd>,
}

impl Doorbells {
    /// One event per queue.
    pub fn events(&self) -> &[EventFd] {
        &self.events
    }
}

impl Handler for Doorbells {
    fn on_ready(&self, token: u32, _readiness: Readiness) {
        let Ok(index) = usize::try_from(token) else { return };
        // Fails only when nothing is there to be read: the queue is looked at all the same.
        let _ = self.events.get(index).map(EventFd::read);
        let mut device = self.device.lock();
        if self.device.is_active() {
            device.on_queue(index);
        }
    }
}

struct Events(SharedDevice);

impl Handler for Events {
    fn on_ready(&self, token: u32, readiness: Readiness) {
        let mut device = self.0.lock();
        if self.0.is_active() {
            device.on_event(token, readiness);
        }
    }
}

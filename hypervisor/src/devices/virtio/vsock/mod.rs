//! virtio-vsock in user space, with Firecracker's hybrid Unix socket protocol for host programs.
//!
//! The main path is the guest's: the shim says by [`Streams::expect`] which descriptors belong to which host port, the
//! guest dials the port, and from then on bytes go between those descriptors and the guest's buffers without a copy of
//! ours, unless a sink is slower than the guest. The other path is a host program's: it connects to a Unix socket, says
//! `CONNECT <port>\n`, and is told `OK <host port>\n` once the guest has accepted.
//!
//! ```text
//!   Streams ───ends by port───┐
//!                             ▼
//!   event loop ──ready──▶ Vsock ──▶ Mux ──▶ Connection ×N ──▶ Ends: descriptors
//!   Clients ──CONNECT─────────┘      └────▶ rings ──▶ guest memory
//! ```
//!
//! Hostile: the guest, in every ring index, descriptor and header. Host programs are trusted, but not to be correct or
//! present. Thread: the device's worker; only [`Streams`] is used from others. No operation waits: descriptors are
//! non-blocking and reported by the event loop once per change, what is ready is remembered and used up, so that a
//! stream stalled by its peer costs nothing until the peer moves.

mod buffer;
mod clients;
mod connection;
mod credit;
mod deadlines;
mod ends;
mod handshake;
mod mux;
mod packet;
mod rings;
mod slots;
mod streams;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use virtio_queue::Queue;
use vmshim_protocol::control::DeviceStatistics;
use vmshim_protocol::vsock::GUEST_CID;

pub use ends::{EndsError, StreamEnds};
pub use streams::{ExpectError, StreamEvent, Streams};

use super::{Activation, ActivationError, Interrupt, RING_EVENT_IDX, VirtioDevice, read_space};
use crate::event_loop::{Interest, Readiness, Registrar};
use crate::memory::GuestRam;
use clients::Clients;
use ends::{EndTokens, FdEnds, Opened};
use mux::{Host, Mux, Rest, Rings};
use slots::{SlotId, Token};

/// Device type id (virtio 1.2, section 5.10).
const DEVICE_TYPE: u32 = 19;

/// Packets to the guest, packets from the guest, events. Linux fills the first queue with buffers of 4 KiB, which it
/// keeps for good: 64 hold a connection's credit.
const QUEUE_SIZES: [u16; 3] = [64, 128, 8];

const WAKE: Token = Token::Device(0);
const TIMER: Token = Token::Device(1);
const LISTENER: Token = Token::Device(2);

/// The device.
pub struct Vsock {
    streams: Streams,
    mux: Mux<FdEnds>,
    clients: Option<Clients>,
    timer: TimerFd,
    timer_set: Option<Instant>,
    active: Option<Active>,
}

struct Active {
    memory: GuestRam,
    outbound: Queue,
    inbound: Queue,
    /// Kept for `TRANSPORT_RESET`, the only event there is, which a device in use never sends.
    _events: Queue,
    interrupt: Interrupt,
    registrar: Registrar,
    broken: bool,
}

impl Vsock {
    /// A device whose guest can dial what `streams` expects, and which host programs can use through `listener`, a
    /// listening Unix stream socket.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new(streams: Streams, listener: Option<OwnedFd>) -> io::Result<Self> {
        Ok(Self {
            streams,
            mux: Mux::default(),
            clients: listener.map(Clients::new).transpose()?,
            timer: TimerFd::new(
                ClockId::CLOCK_MONOTONIC,
                TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK,
            )?,
            timer_set: None,
            active: None,
        })
    }

    fn process(&mut self) {
        let Some(active) = &mut self.active else { return };
        let mut host =
            DeviceHost { streams: &self.streams, registrar: &active.registrar, interrupt: &active.interrupt };
        if let Some(clients) = self.clients.as_mut().filter(|clients| clients.has_waiting()) {
            clients.accept(self.mux.room(), &active.registrar, Instant::now());
        }
        let rings =
            Rings { memory: &active.memory, outbound: &mut active.outbound, inbound: &mut active.inbound };
        if !active.broken {
            match self.mux.process(rings, &mut host) {
                Ok(Rest::Nothing) => {}
                Ok(Rest::Work) => self.streams.wake(),
                Err(error) => {
                    crate::log::guest(format_args!("the vsock device stands still: {error}"));
                    active.broken = true;
                    active.interrupt.signal_needs_reset();
                }
            }
        }
        self.set_timer();
    }

    fn set_timer(&mut self) {
        let clients = self.clients.as_ref().and_then(Clients::next_deadline);
        let next = [self.mux.next_deadline(), clients].into_iter().flatten().min();
        if next == self.timer_set {
            return;
        }
        // A timer that cannot be set leaves a connection pending for longer, no more.
        let _ = match next {
            // 0 would disarm it.
            Some(at) => {
                let wait = at.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
                self.timer.set(Expiration::OneShot(wait.into()), TimerSetTimeFlags::empty())
            }
            None => self.timer.unset(),
        };
        self.timer_set = next;
    }

    /// Runs `act` with the multiplexer and its host, if the device is active.
    fn with_mux(&mut self, act: impl FnOnce(&mut Mux<FdEnds>, &mut DeviceHost<'_>)) {
        let Some(active) = &self.active else { return };
        let mut host =
            DeviceHost { streams: &self.streams, registrar: &active.registrar, interrupt: &active.interrupt };
        act(&mut self.mux, &mut host);
    }

    fn on_wake(&mut self) {
        self.streams.awake();
        let forgotten = self.streams.take_forgotten();
        self.with_mux(|mux, host| forgotten.iter().for_each(|&port| mux.forget(port, host)));
    }

    fn on_timer(&mut self) {
        // The wait is over, which is all there is to be read.
        let _ = self.timer.wait();
        self.timer_set = None;
        let now = Instant::now();
        self.with_mux(|mux, host| mux.expire(now, host));
        if let Some(clients) = &mut self.clients {
            clients.expire(now);
        }
    }

    fn on_client(&mut self, id: SlotId) {
        let (Some(active), Some(clients)) = (&self.active, &mut self.clients) else { return };
        let Some((port, socket)) = clients.on_client(id, &active.registrar) else { return };
        let Some(id) = self.mux.vacancy() else { return };
        // A client whose socket cannot be watched is hung up on.
        if let Ok(opened) = FdEnds::open(StreamEnds::Socket(socket), &active.registrar, tokens(id)) {
            self.mux.connect(opened, port, Instant::now());
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        "vsock"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_EVENT_IDX
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        read_space(&u64::from(GUEST_CID).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let Activation { memory, queues, interrupt, registrar, .. } = activation;
        let enabled = queues.len();
        let Ok([outbound, inbound, events]) = <[Queue; 3]>::try_from(queues) else {
            return Err(ActivationError::MissingQueues { enabled, needed: QUEUE_SIZES.len() });
        };
        let watch = || {
            registrar.add(self.streams.wake_fd(), Interest::READ, WAKE.encode())?;
            registrar.add(&self.timer, Interest::READ, TIMER.encode())?;
            self.clients.as_ref().map_or(Ok(()), |clients| clients.watch(&registrar, LISTENER))
        };
        watch().map_err(ActivationError::Host)?;
        self.active =
            Some(Active { memory, outbound, inbound, _events: events, interrupt, registrar, broken: false });
        Ok(())
    }

    fn reset(&mut self) {
        self.with_mux(|mux, host| mux.clear(host));
        let Some(active) = self.active.take() else { return };
        if let Some(clients) = &mut self.clients {
            clients.unwatch(&active.registrar);
        }
        // They fail only for what is not registered.
        let _ = active.registrar.remove(self.streams.wake_fd());
        let _ = active.registrar.remove(&self.timer);
        self.set_timer();
    }

    fn on_queue(&mut self, index: usize) {
        if index < 2 {
            self.process();
        }
    }

    fn on_event(&mut self, token: u32, readiness: Readiness) {
        let (readable, writable) = (readiness.readable(), readiness.writable());
        match Token::decode(token) {
            WAKE => self.on_wake(),
            TIMER => self.on_timer(),
            LISTENER => self.clients.iter_mut().for_each(Clients::on_listener),
            Token::Device(_) => {}
            Token::Source(id) => self.with_mux(|mux, host| mux.on_ready(id, readable, writable, host)),
            Token::Sink(id) => self.with_mux(|mux, host| mux.on_ready(id, false, writable, host)),
            Token::Client(id) => self.on_client(id),
        }
        self.process();
    }

    fn statistics(&self) -> DeviceStatistics {
        let traffic = self.mux.traffic();
        DeviceStatistics {
            name: self.name().to_owned(),
            requests: traffic.packets,
            read_bytes: traffic.to_guest,
            written_bytes: traffic.from_guest,
            errors: traffic.errors,
        }
    }
}

fn tokens(id: SlotId) -> EndTokens {
    EndTokens { source: Token::Source(id).encode(), sink: Token::Sink(id).encode() }
}

/// The outside world of a [`Mux`] of descriptors.
struct DeviceHost<'a> {
    streams: &'a Streams,
    registrar: &'a Registrar,
    interrupt: &'a Interrupt,
}

impl Host for DeviceHost<'_> {
    type Ends = FdEnds;

    fn dial(&mut self, port: u32, id: SlotId) -> Option<Opened<FdEnds>> {
        let ends = self.streams.take(port)?;
        // Ends that cannot be watched are lost to the shim as if they had been used.
        let opened = FdEnds::open(ends, self.registrar, tokens(id));
        match opened {
            Ok(opened) => {
                self.streams.notify(StreamEvent::Dialled { port });
                Some(opened)
            }
            Err(_) => {
                self.streams.notify(StreamEvent::Closed { port });
                None
            }
        }
    }

    fn closed(&mut self, port: u32) {
        self.streams.notify(StreamEvent::Closed { port });
    }

    fn interrupt(&mut self) {
        self.interrupt.signal_used_queue();
    }
}

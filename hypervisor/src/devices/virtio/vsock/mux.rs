//! All connections of a guest behind one pair of virtqueues.
//!
//! Pure: it knows queues, memory and [`Host`], not the event loop, so tests drive it with a mock guest and mock ends.
//!
//! Hostile: everything in the queues. What is kept per VM is bounded: connections by [`MAX_SLOTS`], bytes that wait for
//! sinks by [`MAX_BUFFERED`], resets that wait for the guest's buffers by [`MAX_ANSWERS`] (past it, the guest's packets
//! wait in its own queue), work per call by [`ROUNDS`].

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use virtio_queue::Queue;
use vm_memory::VolatileSlice;

use super::connection::{Connection, Traffic, Visit};
use super::deadlines::Deadlines;
use super::ends::{Ends, Opened};
use super::packet::{Header, Op, Ports, Space};
use super::rings::{BrokenRing, Inbound, Malformed, Outbound};
use super::slots::{MAX_SLOTS, SlotId, Slots};
use crate::memory::GuestMemory;

/// How long a guest may take to answer a request for a connection.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// Bytes that may wait for sinks, in all connections together.
pub const MAX_BUFFERED: u32 = 64 * 1024 * 1024;

/// Credit granted to a connection while [`MAX_BUFFERED`] is far, and when it is near: the last connection must still
/// find its share.
const WIDE_WINDOW: u32 = 256 * 1024;
const NARROW_WINDOW: u32 = 16 * 1024;

/// Resets that wait for a buffer of the guest.
const MAX_ANSWERS: usize = 256;

/// Packets of the guest handled before what it is owed is sent.
const BATCH: usize = 32;

/// Batches per call. What is left is done in the next call, so that other devices of the thread have their turn.
const ROUNDS: usize = 8;

/// Ports for connections that host programs ask for, used in turn.
const FIRST_HOST_PORT: u32 = 1 << 30;
const END_HOST_PORT: u32 = 1 << 31;

/// What the multiplexer needs from outside.
pub trait Host {
    /// The host's ends of a connection.
    type Ends: Ends;

    /// The guest dials `port`. The ends that wait for it, if any do, will be known by `id`.
    fn dial(&mut self, port: u32, id: SlotId) -> Option<Opened<Self::Ends>>;

    /// A connection that came from [`Host::dial`] is over, and its ends are closed.
    fn closed(&mut self, port: u32);

    /// The guest has to be interrupted.
    fn interrupt(&mut self);
}

/// The two queues and the memory they are in.
pub struct Rings<'a> {
    /// Guest RAM.
    pub memory: &'a GuestMemory,
    /// Buffers for packets to the guest.
    pub outbound: &'a mut Queue,
    /// Packets from the guest.
    pub inbound: &'a mut Queue,
}

/// Whether there is more to do right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// The next event will tell.
    Nothing,
    /// [`Mux::process`] wants to be called again.
    Work,
}

/// See the module's description.
#[derive(Debug)]
pub struct Mux<E> {
    entries: Slots<Entry<E>>,
    /// Connections that the guest knows of.
    known: HashMap<Ports, SlotId>,
    /// Connections that wait for a visit.
    visits: VecDeque<SlotId>,
    answers: VecDeque<Header>,
    deadlines: Deadlines<SlotId>,
    next_host_port: u32,
    /// The sum of all windows.
    granted: u32,
    traffic: Traffic,
}

#[derive(Debug)]
struct Entry<E> {
    connection: Connection<E>,
    /// Whether [`Host::closed`] has to be told.
    dialled: bool,
    queued: bool,
    deadline: Option<Instant>,
}

impl<E: Ends> Default for Mux<E> {
    fn default() -> Self {
        Self {
            entries: Slots::new(MAX_SLOTS),
            known: HashMap::new(),
            visits: VecDeque::new(),
            answers: VecDeque::new(),
            deadlines: Deadlines::default(),
            next_host_port: FIRST_HOST_PORT,
            granted: 0,
            traffic: Traffic::default(),
        }
    }
}

impl<E: Ends> Mux<E> {
    /// What passed so far.
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// Connections that can be added.
    pub fn room(&self) -> usize {
        self.entries.room()
    }

    /// Moves packets until both sides have to wait for something, or long enough.
    ///
    /// # Errors
    /// See [`BrokenRing`].
    pub fn process<H: Host<Ends = E>>(&mut self, rings: Rings<'_>, host: &mut H) -> Result<Rest, BrokenRing> {
        let mut inbound = Inbound::new(rings.inbound, rings.memory);
        let mut outbound = Outbound::new(rings.outbound, rings.memory);
        let mut rest = Rest::Work;
        for _ in 0..ROUNDS {
            let drained = self.receive(&mut inbound, host)?;
            let flowing = self.transmit(&mut outbound, host)?;
            if inbound.needs_interrupt()? | outbound.needs_interrupt()? {
                host.interrupt();
            }
            // Ask for a doorbell only where there is nothing to do without one, and look again after asking.
            let more_packets = if drained { inbound.wait()? } else { self.answers.len() < MAX_ANSWERS };
            let more_to_send = if flowing {
                !self.visits.is_empty() || !self.answers.is_empty()
            } else {
                outbound.wait()?
            };
            if !more_packets && !more_to_send {
                rest = Rest::Nothing;
                break;
            }
        }
        self.traffic.errors += outbound.malformed;
        Ok(rest)
    }

    /// Takes packets of the guest; `true` when there are no more.
    fn receive<H: Host<Ends = E>>(
        &mut self,
        inbound: &mut Inbound<'_>,
        host: &mut H,
    ) -> Result<bool, BrokenRing> {
        for _ in 0..BATCH {
            if self.answers.len() >= MAX_ANSWERS {
                return Ok(false);
            }
            if !inbound.next(|header, payload| self.take(header, payload, host))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn take<H: Host<Ends = E>>(
        &mut self,
        header: Result<Header, Malformed>,
        payload: &[VolatileSlice<'_>],
        host: &mut H,
    ) {
        self.traffic.packets += 1;
        match header {
            Ok(header) => match header.connection() {
                Some(ports) => self.take_sound(&header, ports, payload, host),
                None => self.refuse(&header),
            },
            Err(Malformed::Header) => self.traffic.errors += 1,
            Err(Malformed::Payload(header)) => {
                let known = header.connection().and_then(|ports| self.known.get(&ports).copied());
                match known {
                    Some(id) => self.violated(id, host),
                    None => self.refuse(&header),
                }
            }
        }
    }

    fn take_sound<H: Host<Ends = E>>(
        &mut self,
        header: &Header,
        ports: Ports,
        payload: &[VolatileSlice<'_>],
        host: &mut H,
    ) {
        match (self.known.get(&ports).copied(), header.op) {
            (None, Op::Request) => self.dial(header, ports, host),
            // Not an error: a packet that crossed with our reset.
            (None, _) => self.answer(header),
            (Some(id), Op::Reset) => self.detach(id, host),
            (Some(id), _) => {
                let Some(entry) = self.entries.get_mut(id) else { return };
                if entry.connection.receive(header, payload, &mut self.traffic).is_err() {
                    self.violated(id, host);
                } else {
                    self.settle(id, host);
                }
            }
        }
    }

    fn refuse(&mut self, header: &Header) {
        self.traffic.errors += 1;
        self.answer(header);
    }

    fn answer(&mut self, header: &Header) {
        self.answers.extend(header.reset_in_answer());
    }

    fn violated<H: Host<Ends = E>>(&mut self, id: SlotId, host: &mut H) {
        self.traffic.errors += 1;
        self.reset(id, host);
    }

    fn dial<H: Host<Ends = E>>(&mut self, header: &Header, ports: Ports, host: &mut H) {
        let opened = self.entries.vacancy().and_then(|id| host.dial(ports.host, id));
        let Some(opened) = opened else { return self.answer(header) };
        let connection = Connection::accepted(opened, ports, self.next_window(), header.space);
        self.insert(connection, true, None);
    }

    /// Name of the connection that [`Mux::connect`] would make, for its ends' registration.
    pub fn vacancy(&mut self) -> Option<SlotId> {
        self.entries.vacancy()
    }

    /// Asks the guest for a connection to its `port` on behalf of a host program.
    pub fn connect(&mut self, opened: Opened<E>, port: u32, now: Instant) {
        let ports = Ports { guest: port, host: self.next_host_port };
        self.next_host_port = if ports.host + 1 == END_HOST_PORT { FIRST_HOST_PORT } else { ports.host + 1 };
        // A stream as old as a whole round of ports keeps its name; the newcomer is turned away.
        if self.known.contains_key(&ports) {
            return;
        }
        let connection = Connection::requested(opened, ports, self.next_window());
        self.insert(connection, false, Some(now + REQUEST_TIMEOUT));
    }

    fn next_window(&self) -> u32 {
        let others = u32::try_from(self.entries.room()).unwrap_or(u32::MAX).saturating_mul(NARROW_WINDOW);
        let wide = self.granted.saturating_add(WIDE_WINDOW).saturating_add(others);
        if wide <= MAX_BUFFERED { WIDE_WINDOW } else { NARROW_WINDOW }
    }

    fn insert(&mut self, connection: Connection<E>, dialled: bool, deadline: Option<Instant>) {
        let (ports, window) = (connection.ports(), connection.window());
        let Some(id) = self.entries.insert(Entry { connection, dialled, queued: true, deadline }) else {
            return;
        };
        self.known.insert(ports, id);
        self.granted += window;
        self.visits.push_back(id);
        if let Some(deadline) = deadline {
            self.deadlines.insert(deadline, id);
        }
    }

    /// The event loop has something to say about a connection's ends.
    pub fn on_ready<H: Host<Ends = E>>(&mut self, id: SlotId, readable: bool, writable: bool, host: &mut H) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        entry.connection.on_ready(readable, writable, &mut self.traffic);
        self.settle(id, host);
    }

    /// When [`Mux::expire`] has to be called next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.next()
    }

    /// Gives up connections that the guest has not answered in time.
    pub fn expire<H: Host<Ends = E>>(&mut self, now: Instant, host: &mut H) {
        while let Some(id) = self.deadlines.pop(now) {
            self.reset(id, host);
        }
    }

    /// Ends what was dialled at `port` at once; bytes that wait for the sink are lost.
    pub fn forget<H: Host<Ends = E>>(&mut self, port: u32, host: &mut H) {
        let ours = self.entries.find(|entry| entry.dialled && entry.connection.ports().host == port);
        for id in ours {
            self.reset(id, host);
            self.remove(id, host);
        }
    }

    /// Ends everything without a word to the guest, whose driver has reset the device. Sinks get what they take at
    /// once.
    pub fn clear<H: Host<Ends = E>>(&mut self, host: &mut H) {
        for id in self.entries.find(|_| true) {
            self.detach(id, host);
            self.remove(id, host);
        }
        self.visits.clear();
        self.answers.clear();
        self.deadlines.clear();
    }

    /// Ends a connection in the guest; what it has sent is still written.
    fn reset<H: Host<Ends = E>>(&mut self, id: SlotId, host: &mut H) {
        self.send_reset(id);
        self.detach(id, host);
    }

    fn send_reset(&mut self, id: SlotId) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        let ports = entry.connection.ports();
        if self.known.get(&ports) == Some(&id) {
            self.known.remove(&ports);
            self.answers.push_back(Header::to_guest(ports, Op::Reset, 0, 0, Space::default()));
        }
    }

    /// The guest knows nothing of a connection any more.
    fn detach<H: Host<Ends = E>>(&mut self, id: SlotId, host: &mut H) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        let ports = entry.connection.ports();
        if self.known.get(&ports) == Some(&id) {
            self.known.remove(&ports);
        }
        entry.connection.detach(&mut self.traffic);
        self.settle(id, host);
    }

    /// Draws the conclusions from whatever has happened to a connection.
    fn settle<H: Host<Ends = E>>(&mut self, id: SlotId, host: &mut H) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        if !entry.connection.is_pending()
            && let Some(deadline) = entry.deadline.take()
        {
            self.deadlines.remove(deadline, id);
        }
        if entry.connection.is_over() {
            self.send_reset(id);
            self.remove(id, host);
        } else if entry.connection.is_closed_by_guest()
            && self.known.get(&entry.connection.ports()) == Some(&id)
        {
            self.reset(id, host);
        } else if entry.connection.wants_visit() && !entry.queued {
            entry.queued = true;
            self.visits.push_back(id);
        }
    }

    fn remove<H: Host<Ends = E>>(&mut self, id: SlotId, host: &mut H) {
        let Some(entry) = self.entries.remove(id) else { return };
        self.granted -= entry.connection.window();
        if entry.queued {
            self.visits.retain(|&queued| queued != id);
        }
        if let Some(deadline) = entry.deadline {
            self.deadlines.remove(deadline, id);
        }
        let port = entry.dialled.then_some(entry.connection.ports().host);
        drop(entry);
        if let Some(port) = port {
            host.closed(port);
        }
    }

    /// Sends what is owed; `false` when the guest is out of buffers.
    fn transmit<H: Host<Ends = E>>(
        &mut self,
        outbound: &mut Outbound<'_>,
        host: &mut H,
    ) -> Result<bool, BrokenRing> {
        while let Some(answer) = self.answers.front() {
            if !outbound.put(answer)? {
                return Ok(false);
            }
            self.answers.pop_front();
            self.traffic.packets += 1;
        }
        for _ in 0..self.visits.len() {
            let Some(id) = self.visits.pop_front() else { break };
            let Some(entry) = self.entries.get_mut(id) else { continue };
            let visit = entry.connection.visit(outbound, &mut self.traffic)?;
            if visit == Visit::NoBuffer {
                self.visits.push_front(id);
                return Ok(false);
            }
            entry.queued = false;
            self.settle(id, host);
        }
        Ok(true)
    }
}

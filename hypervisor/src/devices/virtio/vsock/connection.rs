//! One stream between a port of the guest and the host's ends.
//!
//! The two directions live and end apart from each other. *Out* runs from the source to the guest: read straight into
//! the guest's buffers, as far as the guest has granted credit. *In* runs from the guest to the sink: written straight
//! from the guest's packets, and what the sink does not take at once waits in a buffer as large as the credit that we
//! grant. Nothing is written after it, so order is kept.
//!
//! ```text
//!   out:  Open ──end of source──▶ Ended            (the guest is told: SHUTDOWN, send)
//!          └────guest reads no more──▶ Ended       (the source is closed)
//!   in:   Open ──guest sends no more──▶ Draining ──buffer empty──▶ Ended     (the sink is closed)
//!          └────sink fails──▶ Broken               (the guest is told: SHUTDOWN, receive)
//!         Unwanted: there is no sink; data is dropped, and the end awaited
//! ```
//!
//! The connection is over when *out* is Ended and *in* is Ended or Broken. The guest is then sent a reset, which Linux
//! takes as an orderly end: what it has not read yet stays readable. A guest that has closed its side altogether gets
//! that reset at once, however long the sink needs for the rest, so that nothing in the guest waits for the host.

use std::io;

use vm_memory::VolatileSlice;

use super::buffer::Buffer;
use super::credit::{Allowance, CreditViolation, Window};
use super::ends::{Ends, Opened};
use super::handshake::acceptance;
use super::packet::{Header, MAX_PAYLOAD, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, Space};
use super::rings::{BrokenRing, Filled, Outbound};

/// Bytes sent to the guest for one connection before the others have their turn.
const TURN: usize = 256 * 1024;

/// Guest buffers offered to one read at most. Linux's hold less than 4 KiB each, so this is some 64 KiB, a pipe's
/// capacity.
const MAX_BURST: usize = 18;

/// Room for the line that tells a host program it is connected.
const GREETING: usize = 16;

/// The guest has broken the protocol; the connection cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// More payload than we had room for.
    #[error(transparent)]
    Credit(#[from] CreditViolation),
    /// A packet that has no place in the connection's state.
    #[error("the guest sent a packet out of turn")]
    Sequence,
}

/// What passed through the device.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// Packets, both ways.
    pub packets: u64,
    /// Payload sent to the guest.
    pub to_guest: u64,
    /// Payload sent by the guest.
    pub from_guest: u64,
    /// Packets and buffers that broke the protocol, and host ends that failed.
    pub errors: u64,
}

/// Where a visit to a connection leaves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visit {
    /// Nothing to do until something happens.
    Idle,
    /// Its turn is over, not its work.
    More,
    /// The guest is out of buffers.
    NoBuffer,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The guest has to be asked.
    RequestOwed,
    /// It has been asked.
    Requested,
    /// It has to be answered.
    ResponseOwed,
    Open,
    /// It knows nothing of the connection any more.
    Detached,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Out {
    Open,
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum In {
    Open,
    Unwanted,
    Draining,
    Broken,
    Ended,
}

/// See the module's description.
#[derive(Debug)]
pub struct Connection<E> {
    ends: E,
    ports: Ports,
    phase: Phase,
    outward: Out,
    inward: In,
    window: Window,
    allowance: Allowance,
    buffer: Buffer,
    /// Bytes at the buffer's front that did not come from the guest.
    greeting: usize,
    readable: bool,
    writable: bool,
    /// Guest buffers the next read is offered. It follows the source: little for a terminal, all for a bulk stream.
    burst: usize,
    owes_credit: bool,
    /// `SHUTDOWN_*` flags to tell the guest, and those it has been told.
    shutdown_owed: u32,
    shutdown_told: u32,
    guest_shutdown: u32,
}

impl<E: Ends> Connection<E> {
    /// Asked for by the guest. It may have up to `window` bytes on the way to us.
    pub fn accepted(opened: Opened<E>, ports: Ports, window: u32, space: Space) -> Self {
        Self::new(opened, ports, window, Phase::ResponseOwed, space)
    }

    /// Asked for by a host program.
    pub fn requested(opened: Opened<E>, ports: Ports, window: u32) -> Self {
        Self::new(opened, ports, window, Phase::RequestOwed, Space::default())
    }

    fn new(opened: Opened<E>, ports: Ports, window: u32, phase: Phase, space: Space) -> Self {
        let Opened { ends, readable } = opened;
        Self {
            outward: if ends.has_source() { Out::Open } else { Out::Ended },
            inward: if ends.has_sink() { In::Open } else { In::Unwanted },
            ends,
            ports,
            phase,
            window: Window::new(window),
            allowance: Allowance::new(space),
            buffer: Buffer::new(usize::try_from(window).unwrap_or(0) + GREETING),
            greeting: 0,
            readable,
            // Nobody knows; trying tells.
            writable: true,
            burst: 1,
            owes_credit: false,
            shutdown_owed: 0,
            shutdown_told: 0,
            guest_shutdown: 0,
        }
    }

    /// The ports that name it.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Bytes of credit granted at most.
    pub fn window(&self) -> u32 {
        self.window.capacity()
    }

    /// Whether the guest still has to grant it.
    pub fn is_pending(&self) -> bool {
        matches!(self.phase, Phase::RequestOwed | Phase::Requested)
    }

    /// Whether both directions have come to their end.
    pub fn is_over(&self) -> bool {
        self.outward == Out::Ended && matches!(self.inward, In::Ended | In::Broken)
    }

    /// Whether the guest has closed both directions and waits for nothing but a reset.
    pub fn is_closed_by_guest(&self) -> bool {
        self.guest_shutdown == SHUTDOWN_BOTH
    }

    /// Whether a visit would find something to do.
    pub fn wants_visit(&self) -> bool {
        match self.phase {
            Phase::RequestOwed | Phase::ResponseOwed => true,
            Phase::Requested | Phase::Detached => false,
            Phase::Open => self.can_send() || self.is_credit_due() || self.shutdown_owed != 0,
        }
    }

    fn can_send(&self) -> bool {
        self.outward == Out::Open && self.readable && self.allowance.available() > 0
    }

    /// Credit also travels with every other packet; this is about a packet of its own.
    fn is_credit_due(&self) -> bool {
        let wanted = self.owes_credit || self.window.wants_announcement();
        wanted && self.guest_shutdown & SHUTDOWN_SEND == 0
    }

    /// Takes a packet of the guest, other than a reset.
    ///
    /// # Errors
    /// The guest has to be sent a reset, and the connection [`Connection::detach`]ed.
    pub fn receive(
        &mut self,
        header: &Header,
        payload: &[VolatileSlice<'_>],
        traffic: &mut Traffic,
    ) -> Result<(), Violation> {
        if !self.allowance_update(header.space) {
            traffic.errors += 1;
        }
        match (header.op, self.phase) {
            (Op::Response, Phase::Requested) => {
                self.phase = Phase::Open;
                self.greet(traffic);
            }
            (Op::ReadWrite, Phase::Open | Phase::ResponseOwed) => {
                self.receive_data(header.len, payload, traffic)?
            }
            (Op::Shutdown, Phase::Open | Phase::ResponseOwed) => self.receive_shutdown(header.flags, traffic),
            (Op::CreditUpdate, Phase::Open | Phase::ResponseOwed) => {}
            (Op::CreditRequest, Phase::Open | Phase::ResponseOwed) => self.owes_credit = true,
            _ => return Err(Violation::Sequence),
        }
        Ok(())
    }

    fn allowance_update(&mut self, space: Space) -> bool {
        if self.phase == Phase::Requested {
            self.allowance = Allowance::new(space);
            return true;
        }
        self.allowance.update(space)
    }

    fn greet(&mut self, traffic: &mut Traffic) {
        let mut line = acceptance(self.ports.host).into_bytes();
        self.greeting = line.len();
        // The buffer is empty and has kept room for it.
        if self.buffer.push(&[VolatileSlice::from(&mut line[..])], 0) {
            self.flush(traffic);
        }
    }

    fn receive_data(
        &mut self,
        len: u32,
        payload: &[VolatileSlice<'_>],
        traffic: &mut Traffic,
    ) -> Result<(), Violation> {
        if self.guest_shutdown & SHUTDOWN_SEND != 0 {
            return Err(Violation::Sequence);
        }
        self.window.receive(len)?;
        traffic.from_guest += u64::from(len);
        match self.inward {
            In::Open => self.write_or_keep(payload, traffic),
            In::Unwanted => {
                self.window.forward(len);
                self.tell_shutdown(SHUTDOWN_RECEIVE);
                Ok(())
            }
            In::Draining | In::Broken | In::Ended => {
                self.window.forward(len);
                Ok(())
            }
        }
    }

    fn write_or_keep(
        &mut self,
        payload: &[VolatileSlice<'_>],
        traffic: &mut Traffic,
    ) -> Result<(), Violation> {
        let mut written = 0;
        if self.buffer.is_empty() && self.writable {
            written = self.write_through(payload, traffic);
        }
        if self.inward != In::Open {
            return Ok(());
        }
        // The window has been checked, and the buffer holds a whole window.
        self.buffer.push(payload, written).then_some(()).ok_or(Violation::Credit(CreditViolation))
    }

    /// Writes as much as the sink takes.
    fn write_through(&mut self, payload: &[VolatileSlice<'_>], traffic: &mut Traffic) -> usize {
        let total: usize = payload.iter().map(VolatileSlice::len).sum();
        let mut written = 0;
        while written < total {
            let result = match written {
                0 => self.ends.write(payload),
                _ => self.ends.write(&without_front(payload, written)),
            };
            match result {
                Ok(count) if count > 0 => {
                    written += count;
                    self.forward(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.writable = false;
                    break;
                }
                Ok(_) | Err(_) => {
                    self.forward(total - written);
                    self.break_sink(traffic);
                    break;
                }
            }
        }
        written
    }

    /// Writes what waits in the buffer, as far as the sink takes it.
    fn flush(&mut self, traffic: &mut Traffic) {
        while self.writable && !self.buffer.is_empty() {
            match self.ends.write(&self.buffer.slices()) {
                Ok(count) if count > 0 => {
                    self.buffer.consume(count);
                    let greeting = self.greeting.min(count);
                    self.greeting -= greeting;
                    self.forward(count - greeting);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Ok(_) | Err(_) => self.break_sink(traffic),
            }
        }
        if self.inward == In::Draining && self.buffer.is_empty() {
            self.ends.close_sink();
            self.inward = In::Ended;
        }
    }

    fn forward(&mut self, count: usize) {
        // Never more than a window, which fits.
        self.window.forward(u32::try_from(count).unwrap_or(0));
    }

    /// Nobody will ever read what the guest sends. Its writers are told, as those of a pipe would be.
    fn break_sink(&mut self, traffic: &mut Traffic) {
        traffic.errors += 1;
        self.forward(self.buffer.len() - self.greeting);
        self.greeting = 0;
        self.buffer.clear();
        self.ends.close_sink();
        self.inward = In::Broken;
        self.tell_shutdown(SHUTDOWN_RECEIVE);
    }

    fn tell_shutdown(&mut self, flag: u32) {
        self.shutdown_owed |= flag & !self.shutdown_told;
    }

    fn receive_shutdown(&mut self, flags: u32, traffic: &mut Traffic) {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            self.end_source();
        }
        if self.guest_shutdown & SHUTDOWN_SEND != 0 {
            self.finish_inward(traffic);
        }
    }

    fn end_source(&mut self) {
        self.outward = Out::Ended;
        self.ends.close_source();
    }

    fn finish_inward(&mut self, traffic: &mut Traffic) {
        match self.inward {
            In::Open => self.inward = In::Draining,
            In::Unwanted => self.inward = In::Ended,
            In::Draining | In::Broken | In::Ended => {}
        }
        self.flush(traffic);
    }

    /// The guest knows nothing of the connection any more, for whatever reason. What it sent before is still written.
    pub fn detach(&mut self, traffic: &mut Traffic) {
        self.phase = Phase::Detached;
        self.end_source();
        self.finish_inward(traffic);
    }

    /// The event loop has something to say about the ends.
    pub fn on_ready(&mut self, readable: bool, writable: bool, traffic: &mut Traffic) {
        self.readable |= readable;
        if writable {
            self.writable = true;
            self.flush(traffic);
        }
    }

    /// Sends the guest what it is owed, for one turn.
    ///
    /// # Errors
    /// See [`BrokenRing`].
    pub fn visit(&mut self, out: &mut Outbound<'_>, traffic: &mut Traffic) -> Result<Visit, BrokenRing> {
        match self.phase {
            Phase::RequestOwed => return self.open(out, Op::Request, Phase::Requested, traffic),
            Phase::ResponseOwed => {
                if self.open(out, Op::Response, Phase::Open, traffic)? == Visit::NoBuffer {
                    return Ok(Visit::NoBuffer);
                }
            }
            Phase::Open => {}
            Phase::Requested | Phase::Detached => return Ok(Visit::Idle),
        }
        if self.send_data(out, traffic)? == Visit::NoBuffer {
            return Ok(Visit::NoBuffer);
        }
        if self.is_over() {
            return Ok(Visit::Idle);
        }
        if self.is_credit_due() {
            if !self.put(out, Op::CreditUpdate, 0, traffic)? {
                return Ok(Visit::NoBuffer);
            }
            self.owes_credit = false;
        }
        if self.shutdown_owed != 0 {
            let flags = self.shutdown_told | self.shutdown_owed;
            if !self.put(out, Op::Shutdown, flags, traffic)? {
                return Ok(Visit::NoBuffer);
            }
            self.shutdown_told = flags;
            self.shutdown_owed = 0;
        }
        Ok(if self.can_send() { Visit::More } else { Visit::Idle })
    }

    fn open(
        &mut self,
        out: &mut Outbound<'_>,
        op: Op,
        next: Phase,
        traffic: &mut Traffic,
    ) -> Result<Visit, BrokenRing> {
        if !self.put(out, op, 0, traffic)? {
            return Ok(Visit::NoBuffer);
        }
        self.phase = next;
        Ok(Visit::Idle)
    }

    fn put(
        &mut self,
        out: &mut Outbound<'_>,
        op: Op,
        flags: u32,
        traffic: &mut Traffic,
    ) -> Result<bool, BrokenRing> {
        let sent = out.put(&Header::to_guest(self.ports, op, 0, flags, self.window.space()))?;
        if sent {
            self.window.announce();
            traffic.packets += 1;
        }
        Ok(sent)
    }

    fn send_data(&mut self, out: &mut Outbound<'_>, traffic: &mut Traffic) -> Result<Visit, BrokenRing> {
        let mut sent = 0;
        while self.can_send() && sent < TURN {
            let Self { ends, allowance, window, ports, .. } = self;
            let limit = allowance.available().min(MAX_PAYLOAD);
            let filled = out.fill(
                self.burst,
                limit,
                |buffers| ends.read(buffers),
                |len| {
                    allowance.send(len);
                    traffic.packets += 1;
                    traffic.to_guest += u64::from(len);
                    Header::to_guest(*ports, Op::ReadWrite, len, 0, window.announce())
                },
            )?;
            match filled {
                Filled::NoBuffer => return Ok(Visit::NoBuffer),
                Filled::Read { bytes: 0, .. } => self.source_ended(),
                Filled::Read { bytes, room } => {
                    sent += bytes;
                    let burst = if bytes == room { self.burst * 2 } else { self.burst / 2 };
                    self.burst = burst.clamp(1, MAX_BURST);
                }
                Filled::Failed(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Filled::Failed(_) => {
                    traffic.errors += 1;
                    self.source_ended();
                }
            }
        }
        Ok(Visit::Idle)
    }

    fn source_ended(&mut self) {
        self.end_source();
        self.tell_shutdown(SHUTDOWN_SEND);
    }
}

fn without_front<'a>(slices: &[VolatileSlice<'a>], mut count: usize) -> Vec<VolatileSlice<'a>> {
    let mut rest = Vec::with_capacity(slices.len());
    for slice in slices {
        let passed = count.min(slice.len());
        count -= passed;
        rest.extend(slice.offset(passed).ok().filter(|slice| !slice.is_empty()));
    }
    rest
}

//! The shim's side: requests come, replies and events go.
//!
//! Everything here runs on the `io` thread, from its event loop, and only here is the control socket written, so that
//! what the shim sees is in the order in which it happened. The shim is trusted; its requests are checked all the same,
//! since a mistake should be a sentence and not a crash. Sending waits for the shim, which reads what it is sent.

mod descriptors;
mod memory;
mod outbox;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vmshim_protocol::control::{
    Command, ControlSocket, Event, Failure, FailureKind, FdRole, MAX_DISK_PIECES, MachineConfig, Message,
    Outcome, Request, Response, SocketError, State, Statistics,
};
use vmshim_protocol::nic::MAX_QUEUE_PAIRS;

use crate::devices::virtio::vsock::{StreamEnds, StreamEvent, Streams};
use crate::event_loop::{EventLoop, Handler, Interest, Readiness};
use crate::jail::{self, Identity};
use crate::machine::{self, Ending, Machine, NicError, Parts, Plan, SlotError};
use crate::sync::lock;
use crate::{clock, log};
use descriptors::Descriptors;
use memory::{Awaited, bytes};
use outbox::Outbox;

/// Tokens of the server's descriptors.
const REQUEST: u32 = 0;
const OUTBOX: u32 = 1;
const ENDING: u32 = 2;
const DEADLINE: u32 = 3;
const RESIZED: u32 = 4;

/// Serves the shim at the other end of `socket` until the machine is over, and ends the process.
///
/// # Errors
/// When the process lacks a resource before it has begun, or cannot wait for events.
pub fn serve(socket: ControlSocket, started_ns: u64) -> io::Result<std::convert::Infallible> {
    let event_loop = Arc::new(EventLoop::new()?);
    let server = Arc::new(Server::new(socket, started_ns, Arc::clone(&event_loop))?);
    let registrar = event_loop.registrar(server.clone());
    registrar.add(&server.socket, Interest::READ, REQUEST)?;
    registrar.add(&server.outbox, Interest::READ, OUTBOX)?;
    registrar.add(&server.ending, Interest::READ, ENDING)?;
    registrar.add(&server.deadline, Interest::READ, DEADLINE)?;
    registrar.add(&*server.resized, Interest::READ, RESIZED)?;
    event_loop.run()
}

struct Server {
    socket: ControlSocket,
    event_loop: Arc<EventLoop>,
    outbox: Outbox,
    ending: Ending,
    deadline: TimerFd,
    streams: Streams,
    started_ns: u64,
    first_dial_ns: Arc<AtomicU64>,
    /// Readable when the guest has taken up more memory.
    resized: Arc<EventFd>,
    life: Mutex<Life>,
}

/// How far the VM has come.
#[derive(Default)]
struct Life {
    /// The process is confined, or half confined: there is no second try.
    spent: bool,
    machine: Option<Machine>,
    booted: bool,
    paused: bool,
    awaited: Awaited,
}

impl Server {
    fn new(socket: ControlSocket, started_ns: u64, event_loop: Arc<EventLoop>) -> io::Result<Self> {
        let outbox = Outbox::new()?;
        let first_dial_ns = Arc::new(AtomicU64::new(0));
        let observer = (outbox.clone(), Arc::clone(&first_dial_ns));
        let streams = Streams::new(move |event| observe(&observer.0, &observer.1, event))?;
        Ok(Self {
            socket,
            event_loop,
            outbox,
            ending: Ending::new()?,
            deadline: TimerFd::new(
                ClockId::CLOCK_MONOTONIC,
                TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK,
            )?,
            streams,
            started_ns,
            first_dial_ns,
            resized: Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?),
            life: Mutex::default(),
        })
    }

    fn send(&self, message: &Message) {
        match self.socket.send(message, &[]) {
            Ok(()) => {}
            Err(SocketError::Closed) => self.shim_is_gone(),
            Err(error) => log::host(format_args!("a message to the shim is lost: {error}")),
        }
    }

    /// Nobody is left to work for.
    fn shim_is_gone(&self) -> ! {
        std::process::exit(0)
    }

    fn on_request(&self) {
        match self.socket.recv::<Request>() {
            Ok((request, fds)) => match request.command {
                Command::AwaitMemory { growth_mib } => {
                    lock(&self.life).awaited.add(request.id, growth_mib);
                    self.answer_awaited();
                }
                command => {
                    let result = self.answer(command, &request.fds, fds);
                    self.send(&Message::Reply { id: request.id, result });
                }
            },
            Err(SocketError::WouldBlock) => {}
            Err(SocketError::Closed) => self.shim_is_gone(),
            // There is no id to answer to.
            Err(error) => self.ending.declare(Outcome::Failed { message: format!("{}.", sentence(&error)) }),
        }
    }

    fn answer(&self, command: Command, roles: &[FdRole], fds: Vec<OwnedFd>) -> Result<Response, Failure> {
        let mut fds = Descriptors::new(roles, fds).map_err(invalid)?;
        fds.expect_only(&roles_of(&command)).map_err(invalid)?;
        let mut life = lock(&self.life);
        let response = match command {
            Command::Configure(config) => self.configure(&mut life, config, &mut fds)?,
            Command::Boot { deadline_ms } => self.boot(&mut life, deadline_ms)?,
            Command::Pause => life.pause()?,
            Command::Resume => life.resume()?,
            Command::Stop => self.stop(),
            Command::Status => Response::Status(self.state(&life)),
            Command::Statistics => Response::Statistics(self.statistics(&life)),
            Command::AttachDisk { slot, read_only } => {
                let pieces = fds.take_all(FdRole::Disk);
                life.machine()?.attach_disk(slot, pieces, read_only).map_err(slot_failure)?;
                Response::Done
            }
            Command::DetachDisk { slot } => {
                life.machine()?.detach_disk(slot).map_err(slot_failure)?;
                Response::Done
            }
            Command::AttachNic { slot } => {
                let queues = fds.take_all(FdRole::Tap);
                life.machine()?.attach_nic(slot, queues).map_err(nic_failure)?;
                Response::Done
            }
            Command::ResizeMemory { growth_mib } => {
                let machine = life.machine()?;
                if !machine.resize_memory(bytes(growth_mib)) {
                    return Err(invalid(format!("the machine's memory cannot grow by {growth_mib} MiB")));
                }
                drop(life);
                self.answer_awaited();
                Response::Done
            }
            // Answered later, by `answer_awaited`.
            Command::AwaitMemory { .. } => Response::Done,
            Command::Expect { port } => {
                life.machine()?;
                let ends = StreamEnds::new(fds.take_streams()).map_err(invalid)?;
                self.streams.expect(port, ends).map_err(precondition)?;
                Response::Done
            }
            Command::Forget { port } => {
                self.streams.forget(port);
                Response::Done
            }
        };
        Ok(response)
    }

    /// Answers those that wait for memory which the guest has got, or will not get.
    fn answer_awaited(&self) {
        // Fails when nothing has changed since.
        let _ = self.resized.read();
        let mut life = lock(&self.life);
        let (wanted, has) = life.machine.as_ref().map(Machine::growth).unwrap_or_default();
        let answers = life.awaited.answers(wanted, has);
        drop(life);
        for (id, result) in answers {
            self.send(&Message::Reply { id, result });
        }
    }

    fn configure(
        &self,
        life: &mut Life,
        config: MachineConfig,
        fds: &mut Descriptors,
    ) -> Result<Response, Failure> {
        if life.spent {
            return Err(precondition(
                "the machine is configured already, or could not be; start another VMM",
            ));
        }
        let plan = Plan::try_from(config).map_err(invalid)?;
        let mut take = |role| fds.take(role).map_err(invalid);
        let (kvm, kernel, root_image) = (take(FdRole::Kvm)?, take(FdRole::Kernel)?, take(FdRole::RootImage)?);
        let vsock_listener = fds.take_optional(FdRole::VsockListener);
        life.spent = true;
        let identity = Identity { uid: plan.uid(), gid: plan.gid() };
        let shared = jail::enter(identity, fds.take_optional(FdRole::SharedDirectory))
            .map_err(|error| Failure { kind: FailureKind::Host, message: sentence(&error) })?;
        let resized = Arc::clone(&self.resized);
        let parts = Parts {
            kvm,
            kernel: File::from(kernel),
            root_image: File::from(root_image),
            shared,
            vsock_listener,
            streams: self.streams.clone(),
            ending: self.ending.clone(),
            resized: Box::new(move || {
                // Fails when the counter is full, and then the descriptor is readable.
                let _ = resized.write(1);
            }),
        };
        let built = machine::build(&plan, parts, &self.event_loop);
        life.machine =
            Some(built.map_err(|error| Failure { kind: error.kind(), message: sentence(&error) })?);
        Ok(Response::Done)
    }

    fn boot(&self, life: &mut Life, deadline_ms: u32) -> Result<Response, Failure> {
        if life.booted {
            return Err(precondition("the machine is booted already"));
        }
        let machine = life.machine()?;
        if deadline_ms == 0 {
            return Err(invalid("the deadline of a boot must be longer than 0"));
        }
        let expiration = Expiration::OneShot(Duration::from_millis(u64::from(deadline_ms)).into());
        self.deadline.set(expiration, TimerSetTimeFlags::empty()).map_err(|errno| Failure {
            kind: FailureKind::Host,
            message: format!("The boot's deadline cannot be set: {errno}."),
        })?;
        machine.run();
        life.booted = true;
        Ok(Response::Done)
    }

    fn stop(&self) -> Response {
        self.ending.declare(Outcome::Stopped);
        Response::Done
    }

    fn state(&self, life: &Life) -> State {
        match life {
            Life { machine: None, .. } => State::New,
            Life { booted: false, .. } => State::Configured,
            Life { paused: true, .. } => State::Paused,
            _ if self.first_dial_ns.load(Ordering::Acquire) == 0 => State::Booting,
            _ => State::Running,
        }
    }

    fn statistics(&self, life: &Life) -> Statistics {
        Statistics {
            started_ns: self.started_ns,
            first_dial_ns: self.first_dial_ns.load(Ordering::Acquire),
            ..life.machine.as_ref().map(Machine::statistics).unwrap_or_default()
        }
    }

    fn on_deadline(&self) {
        // The timer is over, which is all there is to be read.
        let _ = self.deadline.wait();
        if self.first_dial_ns.load(Ordering::Acquire) == 0 {
            self.ending.declare(Outcome::BootTimedOut);
        }
    }

    /// Tells the shim and ends the process, without taking anything down: the kernel needs milliseconds to dissolve a
    /// virtual machine, for which nobody should wait.
    fn on_ending(&self) {
        let life = lock(&self.life);
        let machine = life.machine.as_ref();
        if let Some(machine) = machine {
            machine.drain_streams();
        }
        self.send_events();
        if let Some(outcome) = self.ending.outcome() {
            let console = machine.map(Machine::console).unwrap_or_default();
            self.send(&Message::Event(Event::Exited { outcome, console }));
        }
        std::process::exit(0)
    }

    fn send_events(&self) {
        for event in self.outbox.take() {
            self.send(&Message::Event(event));
        }
    }
}

impl Handler for Server {
    fn on_ready(&self, token: u32, _readiness: Readiness) {
        match token {
            REQUEST => self.on_request(),
            OUTBOX => self.send_events(),
            ENDING => self.on_ending(),
            DEADLINE => self.on_deadline(),
            RESIZED => self.answer_awaited(),
            _ => {}
        }
    }
}

impl Life {
    fn machine(&self) -> Result<&Machine, Failure> {
        self.machine.as_ref().ok_or_else(|| precondition("the machine is not configured yet"))
    }

    fn booted(&self) -> Result<&Machine, Failure> {
        let machine = self.machine()?;
        if self.booted { Ok(machine) } else { Err(precondition("the machine is not booted yet")) }
    }

    fn pause(&mut self) -> Result<Response, Failure> {
        self.booted()?.pause();
        self.paused = true;
        Ok(Response::Done)
    }

    fn resume(&mut self) -> Result<Response, Failure> {
        self.booted()?.run();
        self.paused = false;
        Ok(Response::Done)
    }
}

/// What may come with a command, each as often as it is listed.
fn roles_of(command: &Command) -> Vec<FdRole> {
    use FdRole::{
        Disk, Kernel, Kvm, RootImage, SharedDirectory, StreamSink, StreamSocket, StreamSource, Tap,
        VsockListener,
    };
    match command {
        Command::Configure(_) => vec![Kvm, Kernel, RootImage, SharedDirectory, VsockListener],
        Command::AttachDisk { .. } => vec![Disk; MAX_DISK_PIECES],
        Command::AttachNic { .. } => vec![Tap; MAX_QUEUE_PAIRS.into()],
        Command::Expect { .. } => vec![StreamSocket, StreamSource, StreamSink],
        _ => Vec::new(),
    }
}

/// Called by the vsock device, with its lock held.
fn observe(outbox: &Outbox, first_dial_ns: &AtomicU64, event: StreamEvent) {
    match event {
        StreamEvent::Dialled { .. } => {
            let now = clock::monotonic_ns();
            // Only the first one counts.
            let _ = first_dial_ns.compare_exchange(0, now, Ordering::AcqRel, Ordering::Acquire);
        }
        StreamEvent::Closed { port } => outbox.put(Event::StreamClosed { port }),
    }
}

fn invalid(error: impl ToString) -> Failure {
    Failure { kind: FailureKind::InvalidArgument, message: capitalised(&error.to_string()) }
}

fn precondition(error: impl ToString) -> Failure {
    Failure { kind: FailureKind::FailedPrecondition, message: capitalised(&error.to_string()) }
}

fn slot_failure(error: SlotError) -> Failure {
    match error {
        SlotError::Taken(_) | SlotError::Empty(_) => precondition(error),
        SlotError::NoSuchSlot { .. } | SlotError::Disk(_) => {
            Failure { kind: FailureKind::InvalidArgument, message: sentence(&error) }
        }
    }
}

fn nic_failure(error: NicError) -> Failure {
    match error {
        NicError::Taken(_) => precondition(error),
        NicError::NoSuchSlot { .. } | NicError::Tap(_) => {
            Failure { kind: FailureKind::InvalidArgument, message: sentence(&error) }
        }
    }
}

/// An error and what caused it, as one sentence for the user.
fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    capitalised(&text)
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

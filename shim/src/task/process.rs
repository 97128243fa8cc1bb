//! One process of a container: its phase, published at every change, and its standard streams.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::watch;

use crate::stdio::{Kept, Logger, Streams, Writer};
use crate::vm::{Closed, Port};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// As a shell would say it.
    pub status: u32,
    /// By the host's clock; the guest's is not to be trusted.
    pub at: SystemTime,
}

impl Exit {
    /// Of a process that was killed from outside its guest.
    pub fn killed() -> Self {
        Self { status: 137, at: SystemTime::now() }
    }

    /// Of a process that never ran; containerd's number for an exit that nobody knows.
    fn unknown() -> Self {
        Self { status: 255, at: SystemTime::now() }
    }
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The guest is making it.
    Creating,
    /// Waits for Start.
    Created,
    /// Start is under way.
    Starting,
    /// Runs.
    Running,
    /// Frozen with its container.
    Paused,
    /// Has exited.
    Stopped(Exit),
}

impl Phase {
    /// For error messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped(_) => "stopped",
        }
    }

    /// Whether the process is, or is about to be, in the guest's process table.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Paused)
    }
}

/// What happened on a report of an exit.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// The process has exited now.
    Now,
    /// It is still being created or started; the exit comes after that.
    Later,
    /// It had exited already.
    Before,
}

/// One process.
#[derive(Debug)]
pub struct Process {
    /// Empty for a container's init.
    pub exec_id: String,
    /// Where its streams lead.
    pub streams: Streams,
    phase: watch::Sender<Phase>,
    early_exit: Mutex<Option<Exit>>,
    /// Start has failed, and so nobody need wait for an exit.
    never_ran: AtomicBool,
    size: Mutex<Option<Size>>,
    io: Mutex<Io>,
}

/// Columns and rows of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

#[derive(Debug, Default)]
struct Io {
    kept: Kept,
    open: Vec<(Port, Closed)>,
    /// Standard input until the process starts.
    reserved: Option<(Port, Closed)>,
    /// CloseIO may come before there is anything to close.
    stdin_closed: bool,
}

impl Io {
    /// All that carries output or input.
    fn streams(&self) -> impl Iterator<Item = &Closed> {
        self.open.iter().map(|(_, closed)| closed).chain(&self.kept.sent)
    }
}

impl Process {
    /// A process in its first phase.
    pub fn new(exec_id: String, streams: Streams, phase: Phase) -> Self {
        Self {
            exec_id,
            streams,
            phase: watch::Sender::new(phase),
            early_exit: Mutex::default(),
            never_ran: AtomicBool::default(),
            size: Mutex::default(),
            io: Mutex::default(),
        }
    }

    /// Where it is now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Moves from one phase to the next.
    ///
    /// # Errors
    /// The phase it is in instead.
    pub fn advance(&self, from: Phase, to: Phase) -> Result<(), Phase> {
        let mut found = from;
        self.phase.send_if_modified(|phase| {
            found = *phase;
            if *phase == from {
                *phase = to;
            }
            found == from
        });
        if found == from { Ok(()) } else { Err(found) }
    }

    /// Takes the report of its exit.
    pub fn end(&self, exit: Exit) -> Ending {
        let mut ending = Ending::Now;
        self.phase.send_if_modified(|phase| {
            ending = match *phase {
                Phase::Stopped(_) => Ending::Before,
                Phase::Creating | Phase::Starting => Ending::Later,
                Phase::Created | Phase::Running | Phase::Paused => Ending::Now,
            };
            if ending == Ending::Now {
                *phase = Phase::Stopped(exit);
            }
            ending == Ending::Now
        });
        if ending == Ending::Later {
            lock(&self.early_exit).get_or_insert(exit);
        }
        ending
    }

    /// The exit that was reported while the process was being created or started.
    pub fn take_early_exit(&self) -> Option<Exit> {
        lock(&self.early_exit).take()
    }

    /// Says that its start has failed for good: whoever waits for its exit waits in vain.
    pub fn give_up(&self) {
        self.never_ran.store(true, Ordering::Relaxed);
        self.phase.send_modify(|_| {});
    }

    /// Waits for its exit, which a process whose start has failed never has.
    pub async fn exited(&self) -> Exit {
        let mut phase = self.phase.subscribe();
        loop {
            match *phase.borrow_and_update() {
                Phase::Stopped(exit) => return exit,
                Phase::Created if self.never_ran.load(Ordering::Relaxed) => return Exit::unknown(),
                _ => {}
            }
            // The sender lives in `self`, so the channel cannot close.
            let _ = phase.changed().await;
        }
    }

    /// Waits until it is neither being created nor being started.
    pub async fn settled(&self) -> Phase {
        let mut phase = self.phase.subscribe();
        let settled = phase.wait_for(|phase| !matches!(phase, Phase::Creating | Phase::Starting)).await;
        // The sender lives in `self`, so the channel cannot close.
        settled.map_or_else(|_| self.phase(), |phase| *phase)
    }

    /// Notes the size that its terminal is to have.
    pub fn set_size(&self, size: Size) {
        *lock(&self.size) = Some(size);
    }

    /// The size that somebody has given its terminal.
    pub fn size(&self) -> Option<Size> {
        *lock(&self.size)
    }

    /// Takes over what was opened for its streams.
    pub fn connect(&self, kept: Kept, open: Vec<(Port, Closed)>) {
        let mut io = lock(&self.io);
        io.kept = kept;
        io.open = open;
        if io.stdin_closed {
            io.kept.stdin_writer = None;
        }
    }

    /// Notes the port of its standard input, which is opened later.
    pub fn reserve_input(&self, port: Port, closed: Closed) {
        lock(&self.io).reserved = Some((port, closed));
    }

    /// The port that waits for its standard input.
    pub fn reserved_input(&self) -> Option<Port> {
        lock(&self.io).reserved.as_ref().map(|(port, _)| *port)
    }

    /// Takes over what keeps standard input from ending, unless it has been ended already.
    pub fn keep_input(&self, writer: Option<Writer>) {
        let mut io = lock(&self.io);
        io.kept.stdin_writer = writer.filter(|_| !io.stdin_closed);
    }

    /// Standard input is a stream like the others from now on.
    pub fn input_is_open(&self) {
        let mut io = lock(&self.io);
        let input = io.reserved.take();
        io.open.extend(input);
    }

    /// Ends standard input, as far as this side is concerned.
    pub fn close_stdin(&self) {
        let mut io = lock(&self.io);
        io.stdin_closed = true;
        io.kept.stdin_writer = None;
    }

    /// Waits until every stream is over.
    pub async fn drained(&self) {
        let open: Vec<Closed> = lock(&self.io).streams().cloned().collect();
        for mut closed in open {
            closed.wait().await;
        }
    }

    /// Whether every stream is over.
    pub fn is_drained(&self) -> bool {
        lock(&self.io).streams().all(Closed::is_over)
    }

    /// The program that reads the output, where it is one, for somebody to wait for.
    pub fn take_logger(&self) -> Option<Logger> {
        lock(&self.io).kept.logger.take()
    }

    /// Lets go of the streams and says which ports they had.
    pub fn disconnect(&self) -> Vec<Port> {
        let Io { open, reserved, .. } = std::mem::take(&mut *lock(&self.io));
        open.into_iter().chain(reserved).map(|(port, _)| port).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(phase: Phase) -> Process {
        Process::new(String::new(), Streams::default(), phase)
    }

    #[test]
    fn an_exit_is_taken_once() {
        let process = process(Phase::Running);
        assert_eq!(process.end(Exit::killed()), Ending::Now);
        assert_eq!(process.end(Exit { status: 0, ..Exit::killed() }), Ending::Before);
        assert!(matches!(process.phase(), Phase::Stopped(Exit { status: 137, .. })));
    }

    #[test]
    fn an_exit_before_its_start_is_known_comes_after() {
        let process = process(Phase::Starting);
        assert_eq!(process.end(Exit::killed()), Ending::Later);
        assert_eq!(process.phase(), Phase::Starting);
        process.advance(Phase::Starting, Phase::Running).unwrap();
        let exit = process.take_early_exit().unwrap();
        assert_eq!(process.end(exit), Ending::Now);
        assert!(process.take_early_exit().is_none());
    }

    #[test]
    fn phases_follow_each_other_or_tell_what_is() {
        let process = process(Phase::Created);
        assert_eq!(process.advance(Phase::Running, Phase::Paused), Err(Phase::Created));
        assert_eq!(process.advance(Phase::Created, Phase::Starting), Ok(()));
        assert_eq!(process.advance(Phase::Created, Phase::Starting), Err(Phase::Starting));
    }

    #[test]
    fn an_input_that_was_closed_too_early_is_closed_when_it_comes() {
        let process = process(Phase::Starting);
        process.close_stdin();
        process.keep_input(Some(Writer::Fifo(tempfile::tempfile().unwrap())));
        assert!(lock(&process.io).kept.stdin_writer.is_none());
        let mut kept = Kept::default();
        kept.stdin_writer = Some(Writer::Fifo(tempfile::tempfile().unwrap()));
        process.connect(kept, Vec::new());
        assert!(lock(&process.io).kept.stdin_writer.is_none());
    }

    #[tokio::test]
    async fn nobody_waits_for_a_process_that_never_ran() {
        let process = process(Phase::Created);
        let (exit, ()) = tokio::join!(process.exited(), async { process.give_up() });
        assert_eq!(exit.status, 255);
        // It may be started again, and then has an exit.
        process.advance(Phase::Created, Phase::Running).unwrap();
        process.end(Exit::killed());
        assert_eq!(process.exited().await.status, 137);
    }

    #[tokio::test]
    async fn everybody_who_waits_is_told() {
        let process = process(Phase::Running);
        let (first, second, ()) = tokio::join!(process.exited(), process.exited(), async {
            process.end(Exit::killed());
        });
        assert_eq!((first.status, second.status), (137, 137));
        assert_eq!(process.exited().await.status, 137);
    }
}

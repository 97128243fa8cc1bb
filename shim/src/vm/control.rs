//! Requests to the VMM and its replies.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};
use vmshim_protocol::control::{
    Command, ControlSocket, Event, Failure, FailureKind, FdRole, Message, Request, Response, SocketError,
};

/// Why the VMM did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The VMM refused.
    #[error("the VMM refuses: {}", .0.message)]
    Refused(Failure),
    /// No answer in time.
    #[error("the VMM does not answer")]
    TimedOut,
    /// The VMM is gone.
    #[error("the VMM is gone")]
    Gone,
    /// The VM has ended, and why.
    #[error("the pod's VM has ended: {0}")]
    Ended(String),
    /// Every port of this VM has been used.
    #[error("the pod has used up its stream ports; recreate it")]
    OutOfPorts,
    /// The socket failed.
    #[error("the connection to the VMM failed")]
    Socket(#[source] SocketError),
}

impl ControlError {
    /// Whether the request itself was at fault.
    pub fn is_invalid(&self) -> bool {
        matches!(self, Self::Refused(failure) if failure.kind == FailureKind::InvalidArgument)
    }
}

type Reply = Result<Response, Failure>;

/// The shim's end of the control socket.
pub struct Control {
    socket: AsyncFd<ControlSocket>,
    pending: Mutex<Pending>,
}

#[derive(Default)]
struct Pending {
    last_id: u64,
    waiting: HashMap<u64, oneshot::Sender<Reply>>,
    closed: bool,
}

impl Control {
    /// Takes over a non-blocking socket.
    ///
    /// # Errors
    /// When the event loop cannot take it.
    pub fn new(socket: ControlSocket) -> std::io::Result<Self> {
        // SAFETY: the socket owns its descriptor and keeps it until it is dropped.
        let socket = unsafe { AsyncFd::register(socket) }?;
        Ok(Self { socket, pending: Mutex::default() })
    }

    /// Asks for something to be done and waits until it is.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn request(
        &self,
        command: Command,
        fds: &[(FdRole, BorrowedFd<'_>)],
        deadline: Instant,
    ) -> Result<(), ControlError> {
        self.ask(command, fds, deadline).await.map(drop)
    }

    /// Asks for something and waits for the answer.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn ask(
        &self,
        command: Command,
        fds: &[(FdRole, BorrowedFd<'_>)],
        deadline: Instant,
    ) -> Result<Response, ControlError> {
        let (id, reply) = self.register()?;
        let outcome = timeout_at(deadline, async {
            self.send(id, command, fds).await?;
            reply.await.map_err(|_| ControlError::Gone)?.map_err(ControlError::Refused)
        })
        .await;
        self.pending().waiting.remove(&id);
        outcome.map_err(|_| ControlError::TimedOut)?
    }

    async fn send(
        &self,
        id: u64,
        command: Command,
        fds: &[(FdRole, BorrowedFd<'_>)],
    ) -> Result<(), ControlError> {
        let (roles, descriptors): (Vec<_>, Vec<_>) = fds.iter().copied().unzip();
        let request = Request { id, command, fds: roles };
        loop {
            match self.socket.get_ref().send(&request, &descriptors) {
                Ok(()) => return Ok(()),
                Err(SocketError::WouldBlock) => {
                    let mut ready = self.socket.writable().await.map_err(|_| ControlError::Gone)?;
                    ready.clear_ready();
                }
                Err(SocketError::Closed) => return Err(ControlError::Gone),
                Err(error) => return Err(ControlError::Socket(error)),
            }
        }
    }

    /// Hands replies to those who wait and every event to `on_event`, until the VMM's end closes or it breaks the
    /// protocol.
    pub async fn run(&self, mut on_event: impl FnMut(Event)) {
        loop {
            let Ok(mut ready) = self.socket.readable().await else { break };
            match self.socket.get_ref().recv::<Message>() {
                Ok((Message::Reply { id, result }, _)) => self.deliver(id, result),
                Ok((Message::Event(event), _)) => on_event(event),
                Err(SocketError::WouldBlock) => ready.clear_ready(),
                Err(SocketError::Closed) => break,
                Err(error) => {
                    log::error!("the VMM breaks the protocol: {error}");
                    break;
                }
            }
        }
        let mut pending = self.pending();
        pending.closed = true;
        // Dropping the senders tells those who wait.
        pending.waiting.clear();
    }

    fn register(&self) -> Result<(u64, oneshot::Receiver<Reply>), ControlError> {
        let mut pending = self.pending();
        if pending.closed {
            return Err(ControlError::Gone);
        }
        pending.last_id += 1;
        let id = pending.last_id;
        let (sender, receiver) = oneshot::channel();
        pending.waiting.insert(id, sender);
        Ok((id, receiver))
    }

    fn deliver(&self, id: u64, result: Reply) {
        if let Some(waiting) = self.pending().waiting.remove(&id) {
            let _ = waiting.send(result);
        }
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    use super::*;

    fn pair() -> (Arc<Control>, ControlSocket) {
        let (ours, theirs) = ControlSocket::pair().unwrap();
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        (Arc::new(Control::new(ours).unwrap()), theirs)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[tokio::test]
    async fn replies_find_their_requests() {
        let (control, vmm) = pair();
        let runner = control.clone();
        tokio::spawn(async move { runner.run(|_| {}).await });
        std::thread::spawn(move || {
            let mut ids = Vec::new();
            for _ in 0..2 {
                ids.push(vmm.recv::<Request>().unwrap().0.id);
            }
            let failure = Failure { kind: FailureKind::Host, message: "no".into() };
            let refusal = Message::Reply { id: ids[1], result: Err(failure) };
            let strange = Message::Reply { id: 99, result: Ok(Response::Done) };
            let success = Message::Reply { id: ids[0], result: Ok(Response::Done) };
            [refusal, strange, success].iter().for_each(|message| vmm.send(message, &[]).unwrap());
            let _ = vmm.recv::<Request>();
        });
        let (first, second) = tokio::join!(
            control.request(Command::Pause, &[], soon()),
            control.request(Command::Resume, &[], soon())
        );
        first.unwrap();
        assert_eq!(second.unwrap_err().to_string(), "the VMM refuses: no");
    }

    #[tokio::test]
    async fn a_frozen_vmm_costs_no_more_than_the_deadline() {
        let (control, _vmm) = pair();
        let deadline = Instant::now() + Duration::from_millis(10);
        assert!(matches!(control.request(Command::Pause, &[], deadline).await, Err(ControlError::TimedOut)));
        assert!(control.pending().waiting.is_empty());
    }

    #[tokio::test]
    async fn a_vmm_that_goes_or_talks_nonsense_is_gone() {
        for nonsense in [false, true] {
            let (control, vmm) = pair();
            let runner = control.clone();
            let running = tokio::spawn(async move { runner.run(|_| {}).await });
            if nonsense {
                vmm.send(&"what?", &[]).unwrap();
                running.await.unwrap();
            } else {
                drop(vmm);
            }
            assert!(matches!(control.request(Command::Pause, &[], soon()).await, Err(ControlError::Gone)));
        }
    }
}

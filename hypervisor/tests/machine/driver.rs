//! The shim's side of the control socket.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, Stdio};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use vmshim_protocol::control::{
    Command, ControlSocket, Event, Failure, FdRole, MachineConfig, Message, Outcome, Request, Response,
    State, Statistics,
};
use vmshim_protocol::vsock::AGENT_PORT;

use crate::cpio;

/// How long anything may take, in a host that is itself emulated.
const PATIENCE: Duration = Duration::from_secs(60);

/// A VMM and the control socket to it.
pub struct Vmm {
    process: Child,
    socket: ControlSocket,
    next_id: u64,
    events: Vec<Event>,
}

/// What a guest is made of.
pub struct Guest {
    pub config: MachineConfig,
    pub kvm: PathBuf,
    pub kernel: PathBuf,
    pub root_image: File,
}

impl Default for Guest {
    fn default() -> Self {
        let config = MachineConfig {
            id: "test".into(),
            vcpus: 1,
            memory_mib: 128,
            growth_mib: 0,
            // Such as `ignore_loglevel`, to see more.
            kernel_params: std::env::var("VMSHIM_TEST_PARAMS").unwrap_or_default(),
            disk_slots: 0,
            nic_slots: 0,
            receive_limit: None,
            send_limit: None,
            uid: 4_000_001,
            gid: 4_000_001,
        };
        let kernel = std::env::var_os("VMSHIM_TEST_KERNEL");
        let kernel = kernel.map_or_else(|| "/usr/local/share/vmshim/vmlinux".into(), PathBuf::from);
        let mut root_image = tempfile::tempfile().unwrap();
        root_image.write_all(&cpio::initramfs(&guest_program())).unwrap();
        Self { config, kvm: "/dev/kvm".into(), kernel, root_image }
    }
}

/// `examples/guest.rs`, which cargo builds along with the tests.
fn guest_program() -> PathBuf {
    if let Some(program) = std::env::var_os("VMSHIM_TEST_GUEST") {
        return program.into();
    }
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(Path::parent).unwrap().join("examples/guest")
}

impl Guest {
    /// A guest whose first process is told by `parameter` what to do.
    pub fn told(parameter: &str) -> Self {
        let mut guest = Self::default();
        guest.config.kernel_params = parameter.into();
        guest
    }
}

/// A guest that has dialled and takes commands.
pub struct Running {
    pub vmm: Vmm,
    replies: BufReader<UnixStream>,
    commands: UnixStream,
}

impl Vmm {
    /// Starts a VMM that waits for orders: the one built along with the tests, which checks more than a released one.
    pub fn start() -> Self {
        Self::start_program(Path::new(env!("CARGO_BIN_EXE_vmshim-vmm")))
    }

    /// Starts another build of the VMM.
    pub fn start_program(vmm: &Path) -> Self {
        let (socket, theirs) = ControlSocket::pair().unwrap();
        let theirs = OwnedFd::from(theirs);
        let fd = theirs.as_raw_fd();
        let mut program = Program::new(vmm);
        program.arg("--control-fd").arg(fd.to_string()).stdin(Stdio::null());
        // SAFETY: fcntl is async-signal-safe.
        unsafe {
            program.pre_exec(move || {
                nix::libc::fcntl(fd, nix::libc::F_SETFD, 0);
                Ok(())
            });
        }
        let process = program.spawn().unwrap();
        let timeout = TimeVal::new(PATIENCE.as_secs().try_into().unwrap(), 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &timeout).unwrap();
        Self { process, socket, next_id: 1, events: Vec::new() }
    }

    /// Sends a request and waits for its reply; events that come first are kept.
    pub fn ask(&mut self, command: Command, fds: &[(FdRole, BorrowedFd<'_>)]) -> Result<Response, Failure> {
        let id = self.next_id;
        self.next_id += 1;
        let (roles, fds): (Vec<_>, Vec<_>) = fds.iter().copied().unzip();
        self.socket.send(&Request { id, command, fds: roles }, &fds).unwrap();
        loop {
            match self.socket.recv::<Message>().expect("a reply").0 {
                Message::Event(event) => self.events.push(event),
                Message::Reply { id: of, result } => {
                    assert_eq!(of, id);
                    return result;
                }
            }
        }
    }

    pub fn configure(&mut self, guest: &Guest) -> Result<Response, Failure> {
        self.configure_with(guest, &[])
    }

    pub fn configure_with(
        &mut self,
        guest: &Guest,
        more: &[(FdRole, BorrowedFd<'_>)],
    ) -> Result<Response, Failure> {
        let kvm = OpenOptions::new().read(true).write(true).open(&guest.kvm).unwrap();
        let kernel = File::open(&guest.kernel).unwrap();
        let mut fds = vec![
            (FdRole::Kvm, kvm.as_fd()),
            (FdRole::Kernel, kernel.as_fd()),
            (FdRole::RootImage, guest.root_image.as_fd()),
        ];
        fds.extend_from_slice(more);
        self.ask(Command::Configure(guest.config.clone()), &fds)
    }

    pub fn boot(&mut self, deadline_ms: u32) {
        assert_eq!(self.ask(Command::Boot { deadline_ms }, &[]), Ok(Response::Done));
    }

    pub fn state(&mut self) -> State {
        match self.ask(Command::Status, &[]) {
            Ok(Response::Status(state)) => state,
            other => panic!("no status: {other:?}"),
        }
    }

    pub fn statistics(&mut self) -> Statistics {
        match self.ask(Command::Statistics, &[]) {
            Ok(Response::Statistics(statistics)) => statistics,
            other => panic!("no statistics: {other:?}"),
        }
    }

    /// Whether the stream of this port was reported as closed. Reports are read along with replies.
    #[allow(dead_code, reason = "tests/streams uses it")]
    pub fn has_closed(&self, port: u32) -> bool {
        self.events.contains(&Event::StreamClosed { port })
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Waits for the last event and the end of the process.
    pub fn outcome(mut self) -> (Outcome, Vec<String>) {
        loop {
            let event = match self.events.is_empty() {
                true => match self.socket.recv::<Message>().expect("an event").0 {
                    Message::Event(event) => event,
                    reply => panic!("a reply to nothing: {reply:?}"),
                },
                false => self.events.remove(0),
            };
            if let Event::Exited { outcome, console } = event {
                assert!(self.process.wait().unwrap().success());
                return (outcome, console);
            }
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // A process that has ended and was waited for is not killed again.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Running {
    /// Boots `guest` and waits until it has dialled. `before` may attach disks.
    pub fn start(guest: &Guest, before: impl FnOnce(&mut Vmm)) -> Self {
        Self::start_with(guest, &[], before)
    }

    /// As [`Running::start`], with more descriptors for the machine.
    pub fn start_with(
        guest: &Guest,
        more: &[(FdRole, BorrowedFd<'_>)],
        before: impl FnOnce(&mut Vmm),
    ) -> Self {
        Self::start_in(Vmm::start(), guest, more, before)
    }

    /// As [`Running::start`], in a VMM that has been started.
    pub fn start_in(
        mut vmm: Vmm,
        guest: &Guest,
        more: &[(FdRole, BorrowedFd<'_>)],
        before: impl FnOnce(&mut Vmm),
    ) -> Self {
        assert_eq!(vmm.configure_with(guest, more), Ok(Response::Done));
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let expect = Command::Expect { port: AGENT_PORT };
        assert_eq!(vmm.ask(expect, &[(FdRole::StreamSocket, theirs.as_fd())]), Ok(Response::Done));
        drop(theirs);
        before(&mut vmm);
        vmm.boot(60_000);
        Self::attach(vmm, ours)
    }

    /// Waits until a guest that boots has dialled the other end of `ours`.
    pub fn attach(vmm: Vmm, ours: UnixStream) -> Self {
        let commands = ours.try_clone().unwrap();
        let mut running = Self { vmm, replies: BufReader::new(ours), commands };
        let greeting = running.reply();
        if greeting != "ready" {
            panic!("the guest says {greeting:?}; {:?}", running.vmm.outcome());
        }
        running
    }

    /// Gives the guest a command and returns its reply.
    pub fn tell(&mut self, command: &str) -> String {
        self.send(command);
        self.reply()
    }

    /// Gives the guest a command that it does not live to answer.
    pub fn send(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
    }

    /// The next line that the guest says.
    pub fn reply(&mut self) -> String {
        let mut line = String::new();
        self.replies.read_line(&mut line).expect("a reply in time");
        line.trim_end().to_owned()
    }
}

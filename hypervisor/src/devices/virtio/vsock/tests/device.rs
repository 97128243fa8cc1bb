//! The device with real descriptors in a real event loop.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::epoll::EpollTimeout;
use nix::sys::stat::Mode;
use vmshim_protocol::control::FdRole;

use super::guest::{Guest, MEMORY, packet, shutdown};
use crate::devices::virtio::vsock::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND, Space};
use crate::devices::virtio::vsock::{StreamEnds, StreamEvent, Streams, Vsock};
use crate::devices::virtio::{Activation, Interrupt, SharedDevice};
use crate::event_loop::{EventLoop, Registrar};
use crate::memory::GuestRam;

struct Rig {
    event_loop: EventLoop,
    registrar: Registrar,
    device: SharedDevice,
    streams: Streams,
    events: Arc<Mutex<Vec<StreamEvent>>>,
    ram: GuestRam,
    guest: Guest,
    /// Packets that arrived behind one that was waited for.
    inbox: VecDeque<(Header, Vec<u8>)>,
}

impl Rig {
    fn new(listener: Option<UnixListener>) -> Self {
        let events = Arc::new(Mutex::new(Vec::new()));
        let log = events.clone();
        let streams = Streams::new(move |event| log.lock().unwrap().push(event)).unwrap();
        let device = Vsock::new(streams.clone(), listener.map(OwnedFd::from)).unwrap();
        let device = SharedDevice::new(Arc::new(Mutex::new(device)));
        let event_loop = EventLoop::new().unwrap();
        let registrar = device.registrar(&event_loop);
        let ram = GuestRam::new(u64::try_from(MEMORY).unwrap()).unwrap();
        let mut rig = Self {
            event_loop,
            registrar,
            device,
            streams,
            events,
            ram,
            guest: Guest::new(false),
            inbox: VecDeque::new(),
        };
        rig.activate();
        rig
    }

    fn activate(&mut self) {
        self.guest = Guest::new(false);
        self.guest.memory = (*self.ram).clone();
        self.guest.rx.set_available(&self.guest.memory, 0);
        self.guest.tx.set_available(&self.guest.memory, 0);
        self.guest.refill(usize::MAX);
        let events = Guest::new(false).rx.device_side();
        let activation = Activation {
            memory: self.ram.clone(),
            queues: vec![self.guest.rx.device_side(), self.guest.tx.device_side(), events],
            features: 0,
            interrupt: Interrupt::new().unwrap(),
            registrar: self.registrar.clone(),
        };
        self.device.lock().activate(activation).unwrap();
        self.device.set_active(true);
    }

    fn reset(&mut self) {
        self.device.lock().reset();
        self.device.set_active(false);
        // The driver takes its rings back.
        let zeros = vec![0; 0x2_0000];
        vm_memory::Bytes::write_slice(&self.guest.memory, &zeros, vm_memory::GuestAddress(0x1_0000)).unwrap();
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        self.guest.send(header, payload);
        self.device.lock().on_queue(1);
    }

    /// Waits for events, at most for a moment.
    fn turn(&mut self) {
        self.event_loop.turn(EpollTimeout::from(20u8)).unwrap();
    }

    fn take(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.inbox.extend(self.guest.take());
        self.guest.refill(usize::MAX);
        self.device.lock().on_queue(0);
        self.inbox.drain(..).collect()
    }

    /// Turns until a packet of this kind arrives; payload on the way is collected.
    fn until(&mut self, op: Op) -> (Header, Vec<u8>) {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut bytes = Vec::new();
        while Instant::now() < deadline {
            self.inbox = self.take().into();
            while let Some((header, payload)) = self.inbox.pop_front() {
                bytes.extend(payload);
                if header.op == op {
                    return (header, bytes);
                }
            }
            self.turn();
        }
        panic!("no {op:?}");
    }

    fn connect(&mut self, ends: StreamEnds, port: u32) {
        self.streams.expect(port, ends).unwrap();
        self.send(packet(5000, port, Op::Request), &[]);
        self.until(Op::Response);
        assert_eq!(self.events.lock().unwrap().last(), Some(&StreamEvent::Dialled { port }));
    }

    fn closed(&self, port: u32) -> bool {
        self.events.lock().unwrap().contains(&StreamEvent::Closed { port })
    }
}

fn halves(source: Option<OwnedFd>, sink: Option<OwnedFd>) -> StreamEnds {
    let source = source.map(|fd| (FdRole::StreamSource, fd));
    let sink = sink.map(|fd| (FdRole::StreamSink, fd));
    StreamEnds::new(source.into_iter().chain(sink)).unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from((at * 131 + at / 65_536) % 253).unwrap()).collect()
}

#[test]
fn a_pipe_with_a_slow_reader_gets_everything() {
    const TOTAL: usize = 3 << 20;
    let mut rig = Rig::new(None);
    let (mut reader, writer) = std::io::pipe().unwrap();
    rig.connect(halves(None, Some(writer.into())), 7);
    let reading = std::thread::spawn(move || {
        let mut all: Vec<u8> = Vec::new();
        let mut piece = vec![0; 9000];
        loop {
            match reader.read(&mut piece).unwrap() {
                0 => return all,
                count => all.extend(&piece[..count]),
            }
            std::thread::yield_now();
        }
    });
    let all = pattern(TOTAL);
    let mut sent = 0;
    let mut forwarded = 0usize;
    while sent < TOTAL {
        let credit = 256 * 1024 - (sent - forwarded);
        let count = credit.min(65_536).min(TOTAL - sent);
        if count > 0 && rig.guest.can_send() {
            rig.send(packet(5000, 7, Op::ReadWrite), &all[sent..sent + count]);
            sent += count;
        } else {
            rig.turn();
        }
        for (header, _) in rig.take() {
            forwarded = usize::try_from(header.space.forwarded).unwrap();
        }
    }
    rig.send(shutdown(5000, 7, SHUTDOWN_SEND), &[]);
    rig.until(Op::Reset);
    assert!(reading.join().unwrap() == all);
    assert!(rig.closed(7));
}

#[test]
fn a_pipe_is_read_to_its_end() {
    const TOTAL: usize = 3 << 20;
    let mut rig = Rig::new(None);
    let (reader, mut writer) = std::io::pipe().unwrap();
    rig.connect(halves(Some(reader.into()), None), 7);
    let writing = std::thread::spawn(move || writer.write_all(&pattern(TOTAL)).unwrap());
    let mut received = Vec::new();
    loop {
        let mut ended = false;
        for (header, bytes) in rig.take() {
            received.extend(bytes);
            ended |= header.op == Op::Shutdown;
        }
        let space = Space { capacity: 256 * 1024, forwarded: u32::try_from(received.len()).unwrap() };
        rig.send(Header { space, ..packet(5000, 7, Op::CreditUpdate) }, &[]);
        if ended {
            break;
        }
        rig.turn();
    }
    writing.join().unwrap();
    assert!(received == pattern(TOTAL));
    rig.send(shutdown(5000, 7, SHUTDOWN_BOTH), &[]);
    assert!(rig.closed(7));
}

#[test]
fn regular_files_are_always_ready() {
    let mut rig = Rig::new(None);
    let mut source = tempfile::tempfile().unwrap();
    source.write_all(&pattern(200_000)).unwrap();
    source.rewind().unwrap();
    let mut sink = tempfile::tempfile().unwrap();
    rig.connect(halves(Some(source.into()), Some(sink.try_clone().unwrap().into())), 7);
    let (header, bytes) = rig.until(Op::Shutdown);
    assert_eq!(header.flags, SHUTDOWN_SEND);
    assert!(bytes == pattern(200_000));
    rig.send(packet(5000, 7, Op::ReadWrite), &pattern(50_000));
    rig.send(shutdown(5000, 7, SHUTDOWN_BOTH), &[]);
    assert!(rig.closed(7));
    let mut written = Vec::new();
    sink.rewind().unwrap();
    sink.read_to_end(&mut written).unwrap();
    assert!(written == pattern(50_000));
}

#[test]
fn a_fifo_nobody_has_opened_yet_is_not_at_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stdin");
    nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
    let open = |write: bool| {
        let mut options = File::options();
        options.read(!write).write(write).custom_flags(libc::O_NONBLOCK).open(&path).unwrap()
    };
    let mut rig = Rig::new(None);
    rig.connect(halves(Some(open(false).into()), None), 7);
    rig.turn();
    assert!(rig.take().is_empty());
    open(true).write_all(b"late").unwrap();
    let (_, bytes) = rig.until(Op::Shutdown);
    assert_eq!(bytes, b"late");
}

#[test]
fn a_sink_without_a_reader_tells_the_guest() {
    let mut rig = Rig::new(None);
    let (reader, writer) = std::io::pipe().unwrap();
    rig.connect(halves(None, Some(writer.into())), 7);
    drop(reader);
    rig.turn();
    assert!(rig.take().is_empty());
    rig.send(packet(5000, 7, Op::ReadWrite), b"to nobody");
    rig.until(Op::Reset);
    assert!(rig.closed(7));
}

#[test]
fn a_socket_serves_both_directions_and_dies_with_its_peer() {
    let mut rig = Rig::new(None);
    let (mut peer, end) = UnixStream::pair().unwrap();
    rig.connect(StreamEnds::new([(FdRole::StreamSocket, end.into())]).unwrap(), 7);
    peer.write_all(b"question").unwrap();
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(rig.until(Op::Shutdown).1, b"question");
    rig.send(packet(5000, 7, Op::ReadWrite), b"answer");
    rig.send(shutdown(5000, 7, SHUTDOWN_SEND), &[]);
    rig.until(Op::Reset);
    let mut answer = String::new();
    peer.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");

    let (peer, end) = UnixStream::pair().unwrap();
    rig.connect(StreamEnds::new([(FdRole::StreamSocket, end.into())]).unwrap(), 8);
    drop(peer);
    assert_eq!(rig.until(Op::Shutdown).0.flags, SHUTDOWN_SEND);
    rig.send(packet(5000, 8, Op::ReadWrite), b"anybody?");
    rig.until(Op::Reset);
    assert!(rig.closed(8));
}

#[test]
fn a_forgotten_stream_is_closed_by_the_worker() {
    let mut rig = Rig::new(None);
    let (mut peer, end) = UnixStream::pair().unwrap();
    rig.connect(StreamEnds::new([(FdRole::StreamSocket, end.into())]).unwrap(), 7);
    rig.streams.forget(7);
    rig.until(Op::Reset);
    assert!(rig.closed(7));
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
}

#[test]
fn descriptors_that_make_no_stream_are_refused() {
    let fd = || OwnedFd::from(tempfile::tempfile().unwrap());
    use FdRole::{Disk, StreamSink, StreamSocket, StreamSource};
    assert!(StreamEnds::new([]).is_err());
    assert!(StreamEnds::new([(Disk, fd())]).is_err());
    assert!(StreamEnds::new([(StreamSocket, fd()), (StreamSink, fd())]).is_err());
    assert!(StreamEnds::new([(StreamSource, fd()), (StreamSource, fd())]).is_err());
    assert!(StreamEnds::new([(StreamSink, fd()), (StreamSource, fd())]).is_ok());
}

fn listener() -> (tempfile::TempDir, UnixListener) {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
    (directory, listener)
}

#[test]
fn a_host_program_connects() {
    let (directory, listener) = listener();
    let mut rig = Rig::new(Some(listener));
    let mut client = UnixStream::connect(directory.path().join("vsock")).unwrap();
    rig.turn();
    client.write_all(b"conn").unwrap();
    rig.turn();
    client.write_all(b"ect 1024\nand on").unwrap();
    let (request, _) = rig.until(Op::Request);
    assert_eq!(request.destination_port, 1024);
    let host = request.source_port;
    rig.send(packet(1024, host, Op::Response), &[]);
    assert_eq!(rig.until(Op::ReadWrite).1, b"and on");
    rig.send(packet(1024, host, Op::ReadWrite), b"reply");
    rig.send(shutdown(1024, host, SHUTDOWN_BOTH), &[]);
    let mut all = String::new();
    client.read_to_string(&mut all).unwrap();
    assert_eq!(all, format!("OK {host}\nreply"));
}

#[test]
fn host_programs_that_make_no_sense_are_hung_up_on() {
    let (directory, listener) = listener();
    let mut rig = Rig::new(Some(listener));
    let mut clients = Vec::new();
    for line in ["GET / HTTP/1.1\r\n", "CONNECT 99999999999\n", "CONNECT 1234567890123456789012345678"] {
        let mut client = UnixStream::connect(directory.path().join("vsock")).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        clients.push(client);
    }
    let silent = UnixStream::connect(directory.path().join("vsock")).unwrap();
    silent.shutdown(std::net::Shutdown::Write).unwrap();
    clients.push(silent);
    // One is refused by the guest.
    let mut refused = UnixStream::connect(directory.path().join("vsock")).unwrap();
    refused.write_all(b"CONNECT 1\n").unwrap();
    let (request, _) = rig.until(Op::Request);
    rig.send(packet(1, request.source_port, Op::Reset), &[]);
    clients.push(refused);
    for client in &mut clients {
        assert_eq!(client.read(&mut [0]).unwrap_or(0), 0);
    }
}

#[test]
fn a_host_program_that_dawdles_is_hung_up_on() {
    let (directory, listener) = listener();
    let mut rig = Rig::new(Some(listener));
    let mut silent = UnixStream::connect(directory.path().join("vsock")).unwrap();
    let mut unanswered = UnixStream::connect(directory.path().join("vsock")).unwrap();
    unanswered.write_all(b"CONNECT 1\n").unwrap();
    rig.until(Op::Request);
    let start = Instant::now();
    rig.until(Op::Reset);
    assert!(start.elapsed() > Duration::from_secs(1));
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    assert_eq!(unanswered.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_reset_device_starts_again() {
    let (directory, listener) = listener();
    let mut rig = Rig::new(Some(listener));
    let (mut peer, end) = UnixStream::pair().unwrap();
    rig.connect(StreamEnds::new([(FdRole::StreamSocket, end.into())]).unwrap(), 7);
    rig.send(packet(5000, 7, Op::ReadWrite), b"sent");
    rig.reset();
    let mut sent = String::new();
    peer.read_to_string(&mut sent).unwrap();
    assert_eq!(sent, "sent");
    assert!(rig.closed(7));

    rig.activate();
    let (_peer, end) = UnixStream::pair().unwrap();
    rig.connect(StreamEnds::new([(FdRole::StreamSocket, end.into())]).unwrap(), 7);
    let mut client = UnixStream::connect(directory.path().join("vsock")).unwrap();
    client.write_all(b"CONNECT 9\n").unwrap();
    rig.until(Op::Request);
}

#[test]
fn the_configuration_is_the_guests_context_id() {
    let rig = Rig::new(None);
    let device = rig.device.lock();
    let mut bytes = [0xff; 12];
    device.read_config(0, &mut bytes);
    assert_eq!(bytes, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    device.read_config(u32::MAX, &mut bytes);
    assert_eq!(bytes, [0; 12]);
    assert_eq!((device.device_type(), device.name()), (19, "vsock"));
}

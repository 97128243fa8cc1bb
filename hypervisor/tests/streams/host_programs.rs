//! Host programs that come through the Unix socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use vmshim_protocol::control::{Command, FdRole, Response};
use vmshim_protocol::vsock::AGENT_PORT;

use crate::driver::{Running, Vmm};
use crate::rig::{MIB, check, guest, report, write};

/// A guest, and the socket that leads to it.
fn start() -> (tempfile::TempDir, Running) {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
    let mut vmm = Vmm::start();
    assert_eq!(
        vmm.configure_with(&guest(), &[(FdRole::VsockListener, listener.as_fd())]),
        Ok(Response::Done)
    );
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let expect = Command::Expect { port: AGENT_PORT };
    assert_eq!(vmm.ask(expect, &[(FdRole::StreamSocket, theirs.as_fd())]), Ok(Response::Done));
    drop(theirs);
    vmm.boot(60_000);
    (directory, Running::attach(vmm, ours))
}

fn connect(directory: &tempfile::TempDir, port: u32) -> Option<UnixStream> {
    let mut socket = UnixStream::connect(directory.path().join("vsock")).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    writeln!(socket, "CONNECT {port}").unwrap();
    let mut line = String::new();
    BufReader::with_capacity(1, &socket).read_line(&mut line).unwrap();
    line.starts_with("OK ").then_some(socket)
}

#[test]
#[ignore = "needs KVM"]
fn a_program_talks_to_a_port_of_the_guest() {
    let (directory, mut running) = start();
    assert_eq!(running.tell("listen 2000"), "2000 listening");
    let start = Instant::now();
    let clients = (0..20).map(|seed| {
        let socket = connect(&directory, 2000).unwrap();
        thread::spawn(move || {
            let reader = socket.try_clone().unwrap();
            let reading = thread::spawn(move || check(reader, seed, 65_536, Duration::ZERO));
            write(&socket, seed, MIB, 5000);
            socket.shutdown(Shutdown::Write).unwrap();
            assert_eq!(reading.join().unwrap(), MIB);
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.join().unwrap();
    }
    report("20 host programs", 40 * MIB, start);
}

#[test]
#[ignore = "needs KVM"]
fn a_port_where_nobody_listens_is_refused() {
    let (directory, mut running) = start();
    assert!(connect(&directory, 2000).is_none());
    let mut nonsense = UnixStream::connect(directory.path().join("vsock")).unwrap();
    nonsense.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(nonsense.read(&mut [0]).unwrap_or(0), 0);
    assert_eq!(running.tell("listen 2000"), "2000 listening");
    assert!(connect(&directory, 2000).is_some());
}

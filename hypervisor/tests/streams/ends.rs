//! How streams end: in either order, and by violence.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;

use vmshim_protocol::control::{Command, FdRole, Response};
use vmshim_protocol::vsock::AGENT_PORT;

use crate::driver::Running;
use crate::pattern::Pattern;
use crate::rig::{MIB, check, closed, expect, expect_sink, expect_source, start, write};

fn expect_socket(running: &mut Running, port: u32) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    expect(running, port, &[(FdRole::StreamSocket, theirs.as_fd())]);
    ours
}

#[test]
#[ignore = "needs KVM"]
fn the_host_says_first_that_it_is_done() {
    let mut running = start();
    let socket = expect_socket(&mut running, 100);
    running.send("echo 100");
    let reading = thread::spawn({
        let socket = socket.try_clone().unwrap();
        move || check(socket, 100, 65_536, std::time::Duration::ZERO)
    });
    write(&socket, 100, 4 * MIB, 65_536);
    socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!(reading.join().unwrap(), 4 * MIB);
    assert_eq!(running.reply(), format!("100 echoed {}", 4 * MIB));
    closed(&mut running, 100);
}

#[test]
#[ignore = "needs KVM"]
fn the_guest_says_first_that_it_is_done() {
    let mut running = start();
    let mut socket = expect_socket(&mut running, 100);
    running.send(&format!("both 100 {MIB}"));
    assert_eq!(check(&socket, 100, 65_536, std::time::Duration::ZERO), MIB);
    // The guest's direction has ended, ours has not.
    let mut pattern = Pattern::new(100);
    let mut bytes = vec![0; 100_000];
    pattern.fill(&mut bytes);
    socket.write_all(&bytes).unwrap();
    drop(socket);
    assert!(running.reply().contains("received 100000"));
    closed(&mut running, 100);
}

#[test]
#[ignore = "needs KVM"]
fn a_host_program_that_dies_breaks_the_guests_stream() {
    let mut running = start();
    let mut reader = expect_sink(&mut running, 100);
    running.send(&format!("send 100 {}", 64 * MIB));
    reader.read_exact(&mut [0; 10_000]).unwrap();
    drop(reader);
    let reply = running.reply();
    assert!(reply.contains("Broken pipe"), "{reply}");
    closed(&mut running, 100);

    let socket = expect_socket(&mut running, 101);
    running.send("echo 101");
    write(&socket, 101, 1000, 1000);
    drop(socket);
    assert!(running.reply().starts_with("101 "));
    closed(&mut running, 101);
}

#[test]
#[ignore = "needs KVM"]
fn a_guest_process_that_is_killed_ends_its_stream() {
    let mut running = start();
    let reader = expect_sink(&mut running, 100);
    running.send("kill-writer 100");
    assert!(check(reader, 100, 65_536, std::time::Duration::ZERO) > 0);
    assert_eq!(running.reply(), "100 killed");
    closed(&mut running, 100);
}

#[test]
#[ignore = "needs KVM"]
fn a_guest_that_reads_no_more_breaks_the_hosts_pipe() {
    let mut running = start();
    let mut writer = expect_source(&mut running, 100);
    assert_eq!(running.tell("dial 100"), "100 connected");
    closed(&mut running, 100);
    let error = writer.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
#[ignore = "needs KVM"]
fn a_port_is_dialled_once_and_only_when_expected() {
    let mut running = start();
    let reply = running.tell("dial 100");
    assert!(reply.contains("reset"), "{reply}");
    let _reader = expect_sink(&mut running, 100);
    assert_eq!(running.tell("dial 100"), "100 connected");
    let reply = running.tell("dial 100");
    assert!(reply.contains("reset"), "{reply}");
}

#[test]
#[ignore = "needs KVM"]
fn a_forgotten_stream_is_reset() {
    let mut running = start();
    let mut reader = expect_sink(&mut running, 100);
    running.send(&format!("send 100 {}", 64 * MIB));
    reader.read_exact(&mut [0; 10_000]).unwrap();
    assert_eq!(running.vmm.ask(Command::Forget { port: 100 }, &[]), Ok(Response::Done));
    let reply = running.reply();
    assert!(reply.contains("Broken pipe"), "{reply}");
    closed(&mut running, 100);

    let _reader = expect_sink(&mut running, 101);
    assert_eq!(running.vmm.ask(Command::Forget { port: 101 }, &[]), Ok(Response::Done));
    let reply = running.tell("dial 101");
    assert!(reply.contains("reset"), "{reply}");
    // The first stream of all goes on.
    assert_ne!(AGENT_PORT, 101);
}

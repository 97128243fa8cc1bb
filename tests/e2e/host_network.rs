//! Containers of the host's network: what they reach of the host, and what the host reaches of them.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use crate::fixture::{host, succeeded};
use crate::kill::wait_for;

const SHARED: &[&str] = &["--net-host"];

/// How long a server may take to begin, or to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Answers the first connection with a line, once it has read one.
fn serve_once(listener: TcpListener) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let (mut connection, _) = listener.accept().unwrap();
        let mut line = [0; 5];
        connection.read_exact(&mut line).unwrap();
        connection.write_all(b"from the host\n").unwrap();
        String::from_utf8_lossy(&line).into_owned()
    })
}

#[test]
fn servers_of_the_host_and_of_the_container_itself_are_reached() {
    let host = host();
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let listener = TcpListener::bind(address).unwrap();
        let at = listener.local_addr().unwrap();
        let served = serve_once(listener);
        let line = format!("echo ping | nc -w 20 {} {}", at.ip(), at.port());
        assert_eq!(succeeded(&host.sh(SHARED, &line)), "from the host\n");
        assert_eq!(served.join().unwrap(), "ping\n");
    }
    // And what the container itself has.
    let port = free_port();
    let line = format!(
        "echo own > /tmp/file; httpd -p 127.0.0.1:{port} -h /tmp; wget -qO- http://127.0.0.1:{port}/file"
    );
    assert_eq!(succeeded(&host.sh(SHARED, &line)), "own\n");
    host.assert_nothing_left();
}

#[test]
fn datagrams_reach_the_host_and_come_back() {
    let host = host();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    // Just enough of TFTP (RFC 1350): a file of one short block, for a client that asks again and again.
    let served = thread::spawn(move || {
        let mut buffer = [0; 600];
        loop {
            let (length, client) = socket.recv_from(&mut buffer).unwrap();
            match &buffer[..length] {
                request if request.starts_with(b"\0\x01file\0") => {
                    socket.send_to(b"\0\x03\0\x01from the host\n", client).unwrap();
                }
                rest => return assert_eq!(rest, b"\0\x04\0\x01"),
            }
        }
    });
    let line = format!("cd /tmp && tftp -g -r file 127.0.0.1 {port} && cat file");
    assert_eq!(succeeded(&host.sh(SHARED, &line)), "from the host\n");
    served.join().unwrap();
    host.assert_nothing_left();
}

#[test]
fn a_server_is_there_for_the_host_when_it_says_so_and_gone_with_its_socket() {
    let host = host();
    let port = free_port();
    let container = host.background(SHARED);
    let serve = format!("echo hello | nc -l -p {port}");
    thread::scope(|scope| {
        let server = scope.spawn(|| succeeded(&container.exec("e1", &["sh", "-c", &serve])));
        let mut connection = connected(port);
        connection.write_all(b"hi\n").unwrap();
        connection.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        connection.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello\n");
        assert_eq!(server.join().unwrap(), "hi\n");
    });
    // The port is the host's again, and one that the host has is an error of the container's.
    let listener = bound_again(port);
    let refused = container.exec("e2", &["nc", "-l", "-p", &port.to_string()]);
    assert!(!refused.status.success());
    let complaint = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(complaint.contains("Address already in use"), "{complaint}");
    drop(listener);
    drop(container);
    host.assert_nothing_left();
}

#[test]
fn a_node_may_keep_its_network_to_itself() {
    let host = host();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let drop_in = "/etc/vmshim/config.d/host-network.toml";
    fs::write(drop_in, "[runtime]\nhost_network = false\n").unwrap();
    let output = host.sh(SHARED, &format!("ls /sys/class/net; nc -w 5 127.0.0.1 {port} || echo refused"));
    fs::remove_file(drop_in).unwrap();
    assert_eq!(succeeded(&output), "lo\nrefused\n");
    // Nor does a container of its own network have any of it.
    let output = host.sh(&[], &format!("nc -w 5 127.0.0.1 {port} || echo refused"));
    assert_eq!(succeeded(&output), "refused\n");
    host.assert_nothing_left();
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A connection to a server that is about to begin.
fn connected(port: u16) -> TcpStream {
    let mut connection = None;
    wait_for("the server", PATIENCE, || {
        connection = TcpStream::connect(("127.0.0.1", port)).ok();
        connection.is_some()
    });
    connection.unwrap()
}

/// The port, as soon as nobody has it.
fn bound_again(port: u16) -> TcpListener {
    let mut listener = None;
    wait_for("the port", PATIENCE, || {
        listener = TcpListener::bind(("127.0.0.1", port)).ok();
        listener.is_some()
    });
    listener.unwrap()
}

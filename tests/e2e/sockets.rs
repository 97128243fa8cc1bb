//! Unix sockets of the host inside a container.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use crate::fixture::{DEBIAN, host, succeeded};

#[test]
fn a_hosts_socket_is_reached_from_inside() {
    let host = host();
    host.import_debian();
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("host.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        for number in 1..=2 {
            let (mut connection, _) = listener.accept().unwrap();
            let mut asked = String::new();
            // Up to the other side's half-close.
            connection.read_to_string(&mut asked).unwrap();
            write!(connection, "{asked} {number}\n").unwrap();
        }
    });
    let program = "import socket\n\
                   for word in 'first', 'second', 'none':\n\
                   \x20   s = socket.socket(socket.AF_UNIX)\n\
                   \x20   s.connect('/run/test.sock')\n\
                   \x20   try:\n\
                   \x20       s.sendall(word.encode())\n\
                   \x20       s.shutdown(socket.SHUT_WR)\n\
                   \x20       print(s.makefile().read(), end='')\n\
                   \x20   except OSError:\n\
                   \x20       print('nobody')\n";
    let mount = format!("type=uds,src={},dst=/run/test.sock,options=rw", path.display());
    let output = host.run(&["--mount", &mount], DEBIAN, &["python3", "-c", program]);
    server.join().unwrap();
    // The third connection finds nobody on the host, and is closed over what it has said.
    assert_eq!(succeeded(&output), "first 1\nsecond 2\nnobody\n");
    host.assert_nothing_left();
}

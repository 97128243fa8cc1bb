//! `ctr run -t`: a terminal of the size of the user's own, that follows it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Child, Stdio};

use nix::pty::{OpenptyResult, Winsize, openpty};
use vmshim_tests::containerd::VMSHIM;

use crate::fixture::{BUSYBOX, Host, host};

nix::ioctl_write_ptr_bad!(set_window_size, nix::libc::TIOCSWINSZ, Winsize);

const fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

struct Session {
    ctr: Child,
    master: File,
    seen: String,
}

impl Session {
    fn start(host: &Host, rows: u16, columns: u16) -> Self {
        let OpenptyResult { master, slave } = openpty(&size(rows, columns), None).unwrap();
        let id = host.id();
        let mut command = host.ctr(["run", "--rm", "-t", "--runtime", VMSHIM, BUSYBOX, &id, "sh"]);
        command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(Stdio::null());
        let ctr = command.spawn().unwrap();
        Self { ctr, master: File::from(master), seen: String::new() }
    }

    fn type_line(&mut self, line: &str) {
        writeln!(self.master, "{line}").unwrap();
    }

    /// Reads until the text has been printed.
    fn expect(&mut self, text: &str) {
        let mut buffer = [0; 4096];
        while !self.seen.contains(text) {
            let length = self.master.read(&mut buffer).unwrap_or_else(|error| {
                panic!("{error} before {text:?}: {}", self.seen);
            });
            self.seen.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        self.seen.clear();
    }

    fn resize(&mut self, rows: u16, columns: u16) {
        let size = size(rows, columns);
        // SAFETY: the descriptor is a terminal's and the argument a winsize that outlives the call.
        unsafe { set_window_size(self.master.as_fd().as_raw_fd(), &raw const size) }.unwrap();
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.ctr.id().try_into().unwrap()),
            nix::sys::signal::Signal::SIGWINCH,
        )
        .unwrap();
    }
}

#[test]
fn a_shell_session_with_a_resize() {
    let host = host();
    let mut session = Session::start(&host, 30, 100);
    session.expect("# ");
    session.type_line("tty; stty size");
    session.expect("/dev/pts/0");
    session.resize(41, 132);
    session.type_line("until [ \"$(stty size)\" = '41 132' ]; do sleep 0.1; done; echo resi''zed");
    session.expect("resized");
    session.type_line("exit 7");
    assert_eq!(session.ctr.wait().unwrap().code(), Some(7));
    host.assert_nothing_left();
}

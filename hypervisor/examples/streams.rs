//! The first process of the guests in `tests/streams`: moves bytes through vsock.
//!
//! It dials the host's port `AGENT_PORT`, says `ready`, and takes commands, one line each. A command works on the port
//! that is its second word, in a thread or process of its own, and is answered by a line that begins with that port.

#![allow(clippy::expect_used, reason = "it is part of a test")]

#[path = "../tests/streams/pattern.rs"]
mod pattern;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, VsockAddr, accept, bind, connect, listen, shutdown,
    socket,
};
use pattern::Pattern;
use vmshim_protocol::vsock::{AGENT_PORT, HOST_CID};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const PIECE: usize = 64 * 1024;

fn main() {
    if let Err(error) = run() {
        // The only place where anybody may see it.
        let _ = std::fs::write("/dev/kmsg", format!("<0>streams: {error}"));
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    // A copy of ourselves that a test kills.
    let arguments: Vec<String> = std::env::args().collect();
    if let ["writer", port] = *arguments[1..].iter().map(String::as_str).collect::<Vec<_>>() {
        return write_for_ever(port.parse()?);
    }
    for (kind, place) in [("proc", "/proc"), ("devtmpfs", "/dev")] {
        // The kernel may have mounted /dev already.
        let _ = mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>);
    }
    let replies = dial(AGENT_PORT)?;
    let commands = BufReader::new(replies.try_clone()?);
    let replies = Arc::new(Mutex::new(replies));
    writeln!(replies.lock().expect("nobody panics"), "ready")?;
    for command in commands.lines() {
        let (command, replies) = (command?, replies.clone());
        thread::spawn(move || {
            let words: Vec<&str> = command.split_whitespace().collect();
            let reply = obey(&words).unwrap_or_else(|error| format!("error: {error}"));
            let port = words.get(1).copied().unwrap_or_default();
            let _ = writeln!(replies.lock().expect("nobody panics"), "{port} {reply}");
        });
    }
    loop {
        thread::park();
    }
}

fn obey(words: &[&str]) -> Result<String> {
    match *words {
        ["send", port, bytes] => send(dial(port.parse()?)?, port.parse()?, bytes.parse()?),
        ["receive", port, pause] => receive(dial(port.parse()?)?, port.parse()?, pause.parse()?),
        ["both", port, bytes] => {
            let stream = dial(port.parse()?)?;
            let (other, seed) = (stream.try_clone()?, port.parse()?);
            let receiving = thread::spawn(move || receive(other, seed, 0).map_err(|error| error.to_string()));
            write(&stream, seed, bytes.parse()?)?;
            Ok(receiving.join().expect("nobody panics")?)
        }
        ["echo", port] => echo(dial(port.parse()?)?),
        ["listen", port] => serve(port.parse()?),
        ["kill-writer", port] => {
            let mut writer = Command::new("/proc/self/exe").args(["writer", port]).spawn()?;
            thread::sleep(Duration::from_millis(300));
            writer.kill()?;
            writer.wait()?;
            Ok("killed".into())
        }
        ["dial", port] => {
            dial(port.parse()?)?;
            Ok("connected".into())
        }
        _ => Err("unknown command".into()),
    }
}

fn dial(port: u32) -> io::Result<File> {
    let stream = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(stream.as_raw_fd(), &VsockAddr::new(HOST_CID, port))?;
    Ok(File::from(stream))
}

/// Sends the pattern and waits until the host has all of it.
fn send(mut stream: File, seed: u32, bytes: u64) -> Result<String> {
    write(&stream, seed, bytes)?;
    match stream.read(&mut [0])? {
        0 => Ok(format!("sent {bytes}")),
        _ => Err("an answer that nobody expects".into()),
    }
}

/// Sends the pattern and says that it is all.
fn write(mut stream: &File, seed: u32, bytes: u64) -> Result<()> {
    let mut pattern = Pattern::new(seed);
    let mut piece = vec![0; PIECE];
    while pattern.total < bytes {
        let count = PIECE.min(usize::try_from(bytes - pattern.total)?);
        pattern.fill(&mut piece[..count]);
        stream.write_all(&piece[..count])?;
    }
    Ok(shutdown(stream.as_raw_fd(), Shutdown::Write)?)
}

/// Checks the pattern up to its end.
fn receive(mut stream: File, seed: u32, pause_us: u64) -> Result<String> {
    let mut pattern = Pattern::new(seed);
    let mut piece = vec![0; PIECE];
    loop {
        let count = stream.read(&mut piece)?;
        if count == 0 {
            return Ok(format!("received {}", pattern.total));
        }
        if !pattern.check(&piece[..count]) {
            return Ok(format!("wrong after {}", pattern.total));
        }
        if pause_us > 0 {
            thread::sleep(Duration::from_micros(pause_us));
        }
    }
}

fn echo(mut stream: File) -> Result<String> {
    let mut piece = vec![0; PIECE];
    let mut total = 0;
    loop {
        let count = stream.read(&mut piece)?;
        if count == 0 {
            shutdown(stream.as_raw_fd(), Shutdown::Write)?;
            return Ok(format!("echoed {total}"));
        }
        stream.write_all(&piece[..count])?;
        total += count;
    }
}

/// Accepts for good, and echoes.
fn serve(port: u32) -> Result<String> {
    let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &VsockAddr::new(nix::libc::VMADDR_CID_ANY, port))?;
    listen(&listener, Backlog::new(64)?)?;
    thread::spawn(move || {
        while let Ok(fd) = accept(listener.as_raw_fd()) {
            // SAFETY: the kernel has just made it and nobody else knows it.
            let stream = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd) };
            thread::spawn(move || echo(stream).map_err(|error| error.to_string()));
        }
    });
    Ok("listening".into())
}

fn write_for_ever(port: u32) -> Result<()> {
    let mut stream = dial(port)?;
    let mut pattern = Pattern::new(port);
    let mut piece = vec![0; PIECE];
    loop {
        pattern.fill(&mut piece);
        stream.write_all(&piece)?;
    }
}

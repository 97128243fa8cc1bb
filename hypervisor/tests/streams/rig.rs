//! A guest that runs `examples/streams.rs`, and the host's side of its streams.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use vmshim_protocol::control::{Command, FdRole, Response};

use crate::cpio;
use crate::driver::{Guest, Running, Vmm};
use crate::pattern::Pattern;

pub const MIB: u64 = 1 << 20;

/// How long a stream may take to end once it should.
const SOON: Duration = Duration::from_secs(20);

pub fn start() -> Running {
    start_with(|_| ())
}

pub fn start_with(before: impl FnOnce(&mut Vmm)) -> Running {
    Running::start(&guest(), before)
}

pub fn guest() -> Guest {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().and_then(std::path::Path::parent).unwrap().join("examples/streams");
    let mut root_image = tempfile::tempfile().unwrap();
    root_image.write_all(&cpio::initramfs(&program)).unwrap();
    Guest { root_image, ..Guest::default() }
}

pub fn expect(running: &mut Running, port: u32, fds: &[(FdRole, BorrowedFd<'_>)]) {
    assert_eq!(running.vmm.ask(Command::Expect { port }, fds), Ok(Response::Done));
}

/// Gives the host's ends of a pipe to the device: what the guest sends comes out of the reader.
pub fn expect_sink(running: &mut Running, port: u32) -> File {
    let (reader, writer) = std::io::pipe().unwrap();
    expect(running, port, &[(FdRole::StreamSink, writer.as_fd())]);
    File::from(std::os::fd::OwnedFd::from(reader))
}

/// What is written to the writer goes to the guest.
pub fn expect_source(running: &mut Running, port: u32) -> File {
    let (reader, writer) = std::io::pipe().unwrap();
    expect(running, port, &[(FdRole::StreamSource, reader.as_fd())]);
    File::from(std::os::fd::OwnedFd::from(writer))
}

/// Checks the pattern of `seed` to the end of file, in pieces of `piece` bytes.
pub fn check(mut from: impl Read, seed: u32, piece: usize, pause: Duration) -> u64 {
    let mut pattern = Pattern::new(seed);
    let mut bytes = vec![0; piece];
    loop {
        let count = from.read(&mut bytes).unwrap();
        if count == 0 {
            return pattern.total;
        }
        assert!(pattern.check(&bytes[..count]), "wrong after {}", pattern.total);
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
}

/// Writes the pattern of `seed`.
pub fn write(mut to: impl Write, seed: u32, bytes: u64, piece: usize) {
    let mut pattern = Pattern::new(seed);
    let mut buffer = vec![0; piece];
    while pattern.total < bytes {
        let count = piece.min(usize::try_from(bytes - pattern.total).unwrap());
        pattern.fill(&mut buffer[..count]);
        to.write_all(&buffer[..count]).unwrap();
    }
}

/// Waits for the report that a stream is over.
pub fn closed(running: &mut Running, port: u32) {
    let deadline = Instant::now() + SOON;
    while !running.vmm.has_closed(port) {
        assert!(Instant::now() < deadline, "port {port} is still open");
        // Events arrive with replies.
        running.vmm.state();
    }
}

pub fn report(what: &str, bytes: u64, start: Instant) {
    let elapsed = start.elapsed();
    let rate = u128::from(bytes / MIB) * 1000 / elapsed.as_millis().max(1);
    println!("{what}: {} MiB in {:.2} s, {rate} MiB/s", bytes / MIB, elapsed.as_secs_f64());
}

/// What each thread of the VMM has used so far, in milliseconds: in all, the guest's own included, and what of it the
/// VMM's own code is thought to have used.
pub fn report_threads(running: &Running) {
    let tasks = format!("/proc/{}/task", running.vmm.pid());
    for task in std::fs::read_dir(tasks).unwrap() {
        let task = task.unwrap().path();
        let read = |name| std::fs::read_to_string(task.join(name)).unwrap();
        let all: u64 = read("schedstat").split(' ').next().unwrap().parse().unwrap();
        let statistics = read("stat");
        let ticks = statistics.rsplit(") ").next().unwrap().split(' ').nth(11).unwrap();
        println!("  {}: {} ms, {ticks}0 ms its own", read("comm").trim(), all / 1_000_000);
    }
}

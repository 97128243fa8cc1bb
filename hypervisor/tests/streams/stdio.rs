//! Standard streams of a container: pipes and FIFOs, much data, at any pace.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::stat::Mode;
use vmshim_protocol::control::FdRole;

use crate::rig::{
    MIB, check, closed, expect, expect_sink, expect_source, report, report_threads, start, write,
};

const ALL_AT_ONCE: Duration = Duration::ZERO;

/// Dozens of credit windows, and not too long for a host that is itself emulated.
const BULK: u64 = 16 * MIB;

#[test]
#[ignore = "needs KVM"]
fn bulk_leaves_the_guest() {
    let mut running = start();
    let reader = expect_sink(&mut running, 100);
    let start = Instant::now();
    running.send(&format!("send 100 {BULK}"));
    assert_eq!(check(reader, 100, 65_536, ALL_AT_ONCE), BULK);
    report("guest to host", BULK, start);
    assert!(running.reply().starts_with("100 sent"));
    closed(&mut running, 100);
    report_threads(&running);
}

#[test]
#[ignore = "needs KVM"]
fn bulk_enters_the_guest() {
    let mut running = start();
    let writer = expect_source(&mut running, 100);
    let start = Instant::now();
    running.send("receive 100 0");
    write(writer, 100, BULK, 65_536);
    assert_eq!(running.reply(), format!("100 received {BULK}"));
    report("host to guest", BULK, start);
    closed(&mut running, 100);
    report_threads(&running);
}

#[test]
#[ignore = "needs KVM"]
fn fifos_carry_both_directions_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name| directory.path().join(name);
    for name in ["stdin", "stdout"] {
        nix::unistd::mkfifo(&path(name), Mode::S_IRWXU).unwrap();
    }
    let mut running = start();
    // As a shim opens them: without waiting for the other side.
    let source =
        OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path("stdin")).unwrap();
    let sink = OpenOptions::new().read(true).write(true).open(path("stdout")).unwrap();
    let stdin = OpenOptions::new().write(true).open(path("stdin")).unwrap();
    let mut stdout = OpenOptions::new().read(true).open(path("stdout")).unwrap();
    let fds = [(FdRole::StreamSource, source.as_fd()), (FdRole::StreamSink, sink.as_fd())];
    expect(&mut running, 100, &fds);
    let start = Instant::now();
    running.send(&format!("both 100 {BULK}"));
    let writing = thread::spawn(move || write(stdin, 100, BULK, 10_000));
    let mut pattern = crate::pattern::Pattern::new(100);
    let mut bytes = vec![0; 65_536];
    while pattern.total < BULK {
        let count = stdout.read(&mut bytes).unwrap();
        assert!(pattern.check(&bytes[..count]));
    }
    writing.join().unwrap();
    report("both directions", 2 * BULK, start);
    assert_eq!(running.reply(), format!("100 received {BULK}"));
    closed(&mut running, 100);
}

#[test]
#[ignore = "needs KVM"]
fn a_reader_slower_than_the_guest() {
    let mut running = start();
    let reader = expect_sink(&mut running, 100);
    running.send(&format!("send 100 {}", 4 * MIB));
    assert_eq!(check(reader, 100, 4000, Duration::from_micros(200)), 4 * MIB);
    assert!(running.reply().starts_with("100 sent"));
}

#[test]
#[ignore = "needs KVM"]
fn a_guest_slower_than_the_writer() {
    let mut running = start();
    let writer = expect_source(&mut running, 100);
    running.send("receive 100 2000");
    write(writer, 100, 8 * MIB, 65_536);
    assert_eq!(running.reply(), format!("100 received {}", 8 * MIB));
}

#[test]
#[ignore = "needs KVM"]
fn a_hundred_streams_at_a_time() {
    let mut running = start();
    let streams: Vec<_> = (100..200).map(|port| (port, expect_sink(&mut running, port))).collect();
    let start = Instant::now();
    for (port, _) in &streams {
        running.send(&format!("send {port} {}", MIB / 4));
    }
    let readers = streams
        .into_iter()
        .map(|(port, reader)| thread::spawn(move || check(reader, port, 65_536, ALL_AT_ONCE)));
    for reader in readers.collect::<Vec<_>>() {
        assert_eq!(reader.join().unwrap(), MIB / 4);
    }
    report("100 streams", 25 * MIB, start);
    for _ in 0..100 {
        assert!(running.reply().contains("sent"));
    }
    for port in 100..200 {
        closed(&mut running, port);
    }
}

#[test]
#[ignore = "needs KVM"]
fn an_empty_stdin_is_an_end_of_file_every_time() {
    let mut running = start();
    for port in 100..200 {
        drop(expect_source(&mut running, port));
        assert_eq!(running.tell(&format!("receive {port} 0")), format!("{port} received 0"));
    }
    let null = File::open("/dev/null").unwrap();
    expect(&mut running, 99, &[(FdRole::StreamSource, null.as_fd())]);
    assert_eq!(running.tell("receive 99 0"), "99 received 0");
}

#[test]
#[ignore = "needs KVM"]
fn short_streams_are_quick() {
    let mut running = start();
    let start = Instant::now();
    for port in 100..200 {
        let reader = expect_sink(&mut running, port);
        running.send(&format!("send {port} 10"));
        assert_eq!(check(reader, port, 100, ALL_AT_ONCE), 10);
        assert!(running.reply().contains("sent"));
        closed(&mut running, port);
    }
    println!("100 streams of 10 bytes: {:.2} s", start.elapsed().as_secs_f64());
}

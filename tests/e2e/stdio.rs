//! Streams: every byte, in order, at any size, and the end of file where it belongs.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::thread;

use vmshim_tests::containerd::{VMSHIM, digest};

use crate::fixture::{BUSYBOX, host, stdout};

/// Bytes piped through a container, both ways.
const LARGE: u64 = 256 << 20;

/// Writes `length` bytes of a pattern that does not repeat at any power of two.
fn pattern(length: u64) -> impl Read {
    struct Pattern(u64);
    impl Read for Pattern {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            for chunk in buffer.chunks_mut(8) {
                self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
            }
            Ok(buffer.len())
        }
    }
    Pattern(1).take(length)
}

fn run(host: &crate::fixture::Host, command: &[&str]) -> Command {
    let id = host.id();
    let mut arguments = vec!["run", "--rm", "--runtime", VMSHIM, BUSYBOX, &id];
    arguments.extend(command);
    let mut ctr = host.ctr(arguments);
    ctr.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    ctr
}

/// Pipes the pattern through a command and returns the digests of what went in and of what came out.
fn through(mut command: Command, length: u64) -> ((String, u64), (String, u64)) {
    let mut child = command.stderr(Stdio::inherit()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let writer = thread::spawn(move || {
        let mut source = std::io::BufReader::with_capacity(1 << 20, pattern(length));
        std::io::copy(&mut source, &mut stdin)
    });
    let received = digest(child.stdout.take().unwrap()).unwrap();
    let status = child.wait().unwrap();
    let written = writer.join().unwrap();
    assert!(status.success() && written.is_ok(), "{status}; {written:?} written; {} read", received.1);
    let sent = digest(std::io::BufReader::with_capacity(1 << 20, pattern(length))).unwrap();
    (sent, received)
}

#[test]
fn a_large_stream_through_cat_keeps_its_digest_both_ways() {
    let host = host();
    let (sent, received) = through(run(&host, &["cat"]), LARGE);
    assert_eq!(sent, received);
    host.assert_nothing_left();
}

#[test]
fn what_the_container_reads_is_what_was_sent() {
    let host = host();
    let mut child = run(&host, &["sh", "-c", "sha256sum | cut -d' ' -f1"]).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::io::copy(&mut pattern(16 << 20), &mut stdin).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert_eq!(stdout(&output).trim(), digest(pattern(16 << 20)).unwrap().0);
}

#[test]
fn output_just_before_the_exit_is_not_lost() {
    let host = host();
    let output = host.sh(&[], "dd if=/dev/zero bs=1M count=8 2>/dev/null; exit 3");
    assert_eq!((output.stdout.len(), output.status.code()), (8 << 20, Some(3)));
    let output = host.sh(&[], "for i in $(seq 50); do echo line $i; done; exit 9");
    assert_eq!((stdout(&output).lines().count(), output.status.code()), (50, Some(9)));
}

#[test]
fn a_slow_reader_gets_everything() {
    let host = host();
    let mut child = run(&host, &["sh", "-c", "dd if=/dev/zero bs=1M count=16 2>/dev/null"]).spawn().unwrap();
    drop(child.stdin.take());
    let mut stdout = child.stdout.take().unwrap();
    let mut total = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let length = stdout.read(&mut buffer).unwrap();
        if length == 0 {
            break;
        }
        total += length;
        thread::sleep(std::time::Duration::from_millis(2));
    }
    assert_eq!(total, 16 << 20);
    assert!(child.wait().unwrap().success());
}

#[test]
fn dev_stdout_and_dev_stderr_can_be_opened_again() {
    let host = host();
    let output = host.sh(&[], "echo out > /dev/stdout; echo err > /dev/stderr");
    assert_eq!((stdout(&output), crate::fixture::stderr(&output)), ("out\n".into(), "err\n".into()));
}

#[test]
fn a_few_bytes_and_their_end_reach_the_container() {
    let host = host();
    let mut child = run(&host, &["sh", "-c", "cat; echo done"]).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"last words\n").unwrap();
    assert_eq!(stdout(&child.wait_with_output().unwrap()), "last words\ndone\n");
}

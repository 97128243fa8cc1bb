//! Memory that a running guest gets and gives back.

use std::time::{Duration, Instant};

use vmshim_protocol::control::{Command, FailureKind, Outcome, Response};

use crate::driver::{Guest, Running};

const MIB: u64 = 1 << 20;

fn growing(growth_mib: u32) -> Guest {
    let mut guest = Guest::default();
    guest.config.growth_mib = growth_mib;
    guest
}

fn resize(running: &mut Running, growth_mib: u32) {
    assert_eq!(running.vmm.ask(Command::ResizeMemory { growth_mib }, &[]), Ok(Response::Done));
}

fn grow(running: &mut Running, growth_mib: u32) {
    resize(running, growth_mib);
    running.tell("look-again");
    assert_eq!(running.vmm.ask(Command::AwaitMemory { growth_mib }, &[]), Ok(Response::Done));
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn guest_kib(running: &mut Running) -> u64 {
    running.tell("memory").parse().unwrap()
}

fn resident(pid: u32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// What a guest of 128 MiB uses then is more than it has booted with.
#[test]
#[ignore = "needs KVM"]
fn memory_grows_is_used_and_goes_back() {
    let mut running = Running::start(&growing(384), |_| ());
    let before = guest_kib(&mut running);
    assert_eq!(running.vmm.statistics().grown_bytes, 0);
    grow(&mut running, 256);
    assert_eq!(running.vmm.statistics().grown_bytes, 256 * MIB);
    assert_eq!(guest_kib(&mut running), before + (256 << 10));
    assert_eq!(running.tell("touch 160"), "160");
    let peak = resident(running.vmm.pid());
    assert!(peak > 160 * MIB, "{} MiB", peak / MIB);
    resize(&mut running, 0);
    until("the guest gives it back", || running.vmm.statistics().grown_bytes == 0);
    assert_eq!(guest_kib(&mut running), before);
    let left = resident(running.vmm.pid());
    assert!(left < 128 * MIB, "{} MiB", left / MIB);
    grow(&mut running, 384);
    assert_eq!(running.tell("keep 160"), "160");
    running.send("power-off");
    assert_eq!(running.vmm.outcome().0, Outcome::PoweredOff);
}

#[test]
#[ignore = "needs KVM"]
fn what_a_guest_uses_stays_and_the_rest_goes() {
    let mut running = Running::start(&growing(256), |_| ());
    grow(&mut running, 256);
    assert_eq!(running.tell("keep 160"), "160");
    resize(&mut running, 0);
    until("the guest gives back what it can", || running.vmm.statistics().grown_bytes < 240 * MIB);
    assert!(running.vmm.statistics().grown_bytes > 64 * MIB);
    assert_eq!(running.tell("memory").parse::<u64>().map(|kib| kib > 160 << 10), Ok(true));
}

/// Disks read and write memory that has come, and the driver of the memory itself comes and goes.
#[test]
#[ignore = "needs KVM"]
fn devices_reach_memory_that_has_come() {
    use std::os::fd::AsFd;
    use vmshim_protocol::control::FdRole;
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(16 * MIB).unwrap();
    let mut guest = growing(256);
    guest.config.disk_slots = 1;
    let mut running = Running::start(&guest, |vmm| {
        let command = Command::AttachDisk { slot: 0, read_only: false };
        assert_eq!(vmm.ask(command, &[(FdRole::Disk, disk.as_fd())]), Ok(Response::Done));
    });
    grow(&mut running, 256);
    // Fills what the guest has booted with, so that the rest lies above.
    assert_eq!(running.tell("keep 110"), "110");
    assert_eq!(running.tell("write slot0 4096 8388608 7"), "done");
    assert_eq!(running.tell("read slot0 4096 8388608"), "7");
}

#[test]
#[ignore = "needs KVM"]
fn sizes_that_cannot_be_are_refused() {
    let mut running = Running::start(&growing(256), |_| ());
    let refused = running.vmm.ask(Command::ResizeMemory { growth_mib: 257 }, &[]).unwrap_err();
    assert_eq!(
        (refused.kind, refused.message.as_str()),
        (FailureKind::InvalidArgument, "The machine's memory cannot grow by 257 MiB")
    );
    let refused = running.vmm.ask(Command::AwaitMemory { growth_mib: 1 }, &[]).unwrap_err();
    assert_eq!(refused.kind, FailureKind::FailedPrecondition);
    assert_eq!(running.vmm.ask(Command::AwaitMemory { growth_mib: 0 }, &[]), Ok(Response::Done));
    let mut fixed = Running::start(&Guest::default(), |_| ());
    assert!(fixed.vmm.ask(Command::ResizeMemory { growth_mib: 1 }, &[]).is_err());
    assert_eq!(fixed.vmm.ask(Command::ResizeMemory { growth_mib: 0 }, &[]), Ok(Response::Done));
}

//! What a running guest can do, and what can be done to it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use vmshim_protocol::control::{Command, FailureKind, FdRole, Outcome, Response, State};

use crate::driver::{Guest, Running, Vmm};

const MIB: u64 = 1 << 20;

fn attach(vmm: &mut Vmm, slot: u8, disk: &File, read_only: bool) {
    let command = Command::AttachDisk { slot, read_only };
    assert_eq!(vmm.ask(command, &[(FdRole::Disk, disk.as_fd())]), Ok(Response::Done));
}

fn disk(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

fn guest_with_slots(slots: u8) -> Guest {
    let mut guest = Guest::default();
    guest.config.disk_slots = slots;
    guest
}

#[test]
#[ignore = "needs KVM"]
fn all_cpus_come_up_when_they_are_wanted() {
    let mut guest = Guest::default();
    guest.config.vcpus = 4;
    let mut running = Running::start(&guest, |_| ());
    assert_eq!(running.tell("online"), "4");
    running.send("power-off");
    assert_eq!(running.vmm.outcome().0, Outcome::PoweredOff);
}

#[test]
#[ignore = "needs KVM"]
fn memory_above_the_gap_is_used() {
    let mut guest = Guest::default();
    guest.config.memory_mib = 3 * 1024 + 512;
    let mut running = Running::start(&guest, |_| ());
    let kib: u64 = running.tell("memory").parse().unwrap();
    assert!(kib > 3400 * 1024, "{kib} KiB");
}

/// The guest reports what is free two seconds later.
#[test]
#[ignore = "needs KVM"]
fn what_the_guest_frees_goes_back_to_the_host() {
    const TOUCHED_MIB: u64 = 32;
    let mut running = Running::start(&Guest::default(), |_| ());
    let pid = running.vmm.pid();
    assert_eq!(running.tell(&format!("touch {TOUCHED_MIB}")), TOUCHED_MIB.to_string());
    let peak = resident_mib(pid);
    assert!(peak >= TOUCHED_MIB, "{peak} MiB");
    let deadline = Instant::now() + Duration::from_secs(60);
    while resident_mib(pid) + TOUCHED_MIB * 3 / 4 > peak {
        assert!(Instant::now() < deadline, "{} of {peak} MiB are still the guest's", resident_mib(pid));
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(running.tell(&format!("touch {TOUCHED_MIB}")), TOUCHED_MIB.to_string());
}

fn resident_mib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    kib.split_whitespace().next().unwrap().parse::<u64>().unwrap() / 1024
}

#[test]
#[ignore = "needs KVM"]
fn time_and_randomness_come_from_the_host() {
    let mut running = Running::start(&Guest::default(), |_| ());
    assert_eq!(running.tell("clocksource"), "kvm-clock");
    assert_eq!(running.tell("random 1000"), "true");
}

#[test]
#[ignore = "needs KVM"]
fn a_disk_keeps_what_is_written() {
    let mut file = disk(16 * MIB);
    let mut running = Running::start(&guest_with_slots(2), |vmm| attach(vmm, 1, &file, false));
    assert_eq!(running.tell("size slot1"), "32768");
    assert_eq!(running.tell("size slot0"), "error: no disk slot0");
    assert_eq!(running.tell("write slot1 4096 3145728 7"), "done");
    assert_eq!(running.tell("read slot1 4096 3145728"), "7");
    assert_eq!(running.tell("read slot1 0 4096"), "0");
    let mut content = vec![0; 3 << 20];
    file.seek(SeekFrom::Start(4096)).unwrap();
    file.read_exact(&mut content).unwrap();
    assert!(content.iter().all(|&byte| byte == 7));
}

#[test]
#[ignore = "needs KVM"]
fn a_discarded_range_is_given_back() {
    let mut file = disk(16 * MIB);
    file.write_all(&vec![1; 16 << 20]).unwrap();
    let mut running = Running::start(&guest_with_slots(1), |vmm| attach(vmm, 0, &file, false));
    let before = file.metadata().unwrap().blocks();
    assert_eq!(running.tell("discard slot0 1048576 8388608"), "done");
    assert!(file.metadata().unwrap().blocks() <= before - 8 * MIB / 512);
    assert_eq!(running.tell("read slot0 1048576 8388608"), "0");
    assert_eq!(running.tell("read slot0 0 1048576"), "1");
}

#[test]
#[ignore = "needs KVM"]
fn a_read_only_disk_is_not_written() {
    let mut early = disk(MIB);
    let late = disk(MIB);
    let mut running = Running::start(&guest_with_slots(2), |vmm| attach(vmm, 0, &early, true));
    assert_eq!(running.tell("read-only slot0"), "1");
    assert!(running.tell("write slot0 0 4096 7").starts_with("error"));
    attach(&mut running.vmm, 1, &late, true);
    assert_eq!(running.tell("look-again"), "1");
    assert_eq!(running.tell("read-only slot1"), "1");
    assert!(running.tell("write slot1 0 4096 7").starts_with("error"));
    for file in [&mut early, &mut { late }] {
        let mut content = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut content).unwrap();
        assert!(content.iter().all(|&byte| byte == 0));
    }
}

#[test]
#[ignore = "needs KVM"]
fn slots_take_disks_and_give_them_up_while_the_guest_runs() {
    let mut running = Running::start(&guest_with_slots(1), |_| ());
    assert_eq!(running.tell("look-again"), "0");
    let file = disk(2 * MIB);
    attach(&mut running.vmm, 0, &file, false);
    assert_eq!(running.tell("look-again"), "1");
    assert_eq!(running.tell("size slot0"), "4096");
    assert_eq!(running.tell("write slot0 0 65536 9"), "done");
    let again =
        running.vmm.ask(Command::AttachDisk { slot: 0, read_only: false }, &[(FdRole::Disk, file.as_fd())]);
    assert_eq!(again.unwrap_err().kind, FailureKind::FailedPrecondition);
    assert_eq!(running.vmm.ask(Command::DetachDisk { slot: 0 }, &[]), Ok(Response::Done));
    wait_for_size(&mut running, "slot0", "0");
    // Its driver keeps it. Another disk does not look read-only to it then, and its writes fail all the same.
    let other = disk(MIB);
    attach(&mut running.vmm, 0, &other, true);
    wait_for_size(&mut running, "slot0", "2048");
    assert_eq!(running.tell("read slot0 0 65536"), "0");
    assert!(running.tell("write slot0 0 4096 7").starts_with("error"));
    let missing = running.vmm.ask(Command::DetachDisk { slot: 1 }, &[]);
    assert_eq!(missing.unwrap_err().message, "There is no disk slot 1; this machine has 1");
}

/// Devices are reset and started by a vCPU's thread, within its list of system calls.
#[test]
#[ignore = "needs KVM"]
fn devices_can_be_reset_and_started_again() {
    let file = disk(MIB);
    let mut running = Running::start(&guest_with_slots(2), |vmm| attach(vmm, 1, &file, false));
    for _ in 0..2 {
        assert_eq!(running.tell("rebind virtio_blk"), "1");
        assert_eq!(running.tell("rebind virtio_rng"), "1");
        assert_eq!(running.tell("write slot1 0 65536 5"), "done");
        assert_eq!(running.tell("read slot1 0 65536"), "5");
        assert_eq!(running.tell("random 100"), "true");
    }
}

/// The guest learns of a capacity by an interrupt, some time after the command was answered.
fn wait_for_size(running: &mut Running, slot: &str, sectors: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while running.tell(&format!("size {slot}")) != sectors {
        assert!(Instant::now() < deadline, "the guest does not see a size of {sectors}");
    }
}

#[test]
#[ignore = "needs KVM"]
fn a_paused_guest_stands_still() {
    let mut running = Running::start(&Guest::default(), |_| ());
    assert_eq!(running.vmm.ask(Command::Pause, &[]), Ok(Response::Done));
    assert_eq!(running.vmm.state(), State::Paused);
    let exits = running.vmm.statistics().vcpu_exits;
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(running.vmm.statistics().vcpu_exits, exits);
    assert_eq!(running.vmm.ask(Command::Resume, &[]), Ok(Response::Done));
    assert_eq!(running.vmm.state(), State::Running);
    assert!(running.tell("uptime").parse::<String>().is_ok());
    running.send("power-off");
    assert_eq!(running.vmm.outcome().0, Outcome::PoweredOff);
}

#[test]
#[ignore = "needs KVM"]
fn commands_out_of_order_are_refused() {
    let mut vmm = Vmm::start();
    for command in
        [Command::Boot { deadline_ms: 1 }, Command::Pause, Command::Resume, Command::DetachDisk { slot: 0 }]
    {
        assert_eq!(vmm.ask(command, &[]).unwrap_err().kind, FailureKind::FailedPrecondition);
    }
    assert_eq!(vmm.state(), State::New);
    assert_eq!(vmm.configure(&Guest::default()), Ok(Response::Done));
    assert_eq!(vmm.configure(&Guest::default()).unwrap_err().kind, FailureKind::FailedPrecondition);
    assert_eq!(vmm.ask(Command::Pause, &[]).unwrap_err().kind, FailureKind::FailedPrecondition);
    assert_eq!(vmm.state(), State::Configured);
}

/// KiB of private memory of a process, without its guest's RAM: that is found by what is mapped of the kernel, which
/// stands in its file from 2 MiB on and in the guest from 16 MiB on.
fn own_memory(pid: u32, ram_bytes: u64) -> (u64, u64) {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut ram = 0..0;
    let mut regions: Vec<(u64, u64)> = Vec::new();
    for line in maps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let Some((start, _)) = words[0].split_once('-') {
            let start = u64::from_str_radix(start, 16).unwrap();
            regions.push((start, 0));
            if line.ends_with("vmlinux") && ram.is_empty() {
                let offset = u64::from_str_radix(words[2], 16).unwrap();
                let base = start - offset - 14 * MIB;
                ram = base..base + ram_bytes;
            }
        } else if words[0].starts_with("Private_") {
            regions.last_mut().unwrap().1 += words[1].parse::<u64>().unwrap();
        }
    }
    let total: u64 = regions.iter().map(|(_, kib)| kib).sum();
    let guest: u64 = regions.iter().filter(|(start, _)| ram.contains(start)).map(|(_, kib)| kib).sum();
    assert!(guest > 0, "{maps}");
    (total - guest, guest)
}

#[test]
#[ignore = "needs KVM"]
fn the_vmm_itself_stays_small() {
    let mut guest = guest_with_slots(4);
    guest.config.vcpus = 2;
    // As it is installed: the build that goes with the tests carries their checks.
    let vmm = Vmm::start_program(Path::new("/usr/local/libexec/vmshim/vmshim-vmm"));
    let running = Running::start_in(vmm, &guest, &[], |_| ());
    let (own, ram) = own_memory(running.vmm.pid(), u64::from(guest.config.memory_mib) * MIB);
    eprintln!("private memory: {own} KiB of its own, {ram} KiB of the guest's");
    assert!(own <= 3 * 1024, "{own} KiB");
}

#[test]
#[ignore = "needs KVM"]
fn the_timeline_of_a_boot() {
    for _ in 0..3 {
        let mut running = Running::start(&Guest::default(), |_| ());
        let statistics = running.vmm.statistics();
        let us = |from: u64, to: u64| to.saturating_sub(from) / 1000;
        eprintln!(
            "main to first instruction {} us, from there to the first dial {} us, {} exits",
            us(statistics.started_ns, statistics.first_instruction_ns),
            us(statistics.first_instruction_ns, statistics.first_dial_ns),
            statistics.vcpu_exits,
        );
        assert!(statistics.started_ns < statistics.first_instruction_ns);
        assert!(statistics.first_instruction_ns < statistics.first_dial_ns);
        if std::env::var_os("VMSHIM_TEST_KERNEL_LOG").is_some() {
            eprintln!("{}", running.tell("kernel-log").replace('|', "\n"));
        }
    }
}

//! Each way in which a guest ends is told apart, and machines that cannot be built say why.

use std::io::Write;

use vmshim_protocol::control::{Command, FailureKind, Outcome, Response, State};

use crate::driver::{Guest, Running, Vmm};

const LONG: u32 = 60_000;

fn outcome_of(guest: &Guest, deadline_ms: u32) -> (Outcome, Vec<String>) {
    let mut vmm = Vmm::start();
    assert_eq!(vmm.configure(guest), Ok(Response::Done));
    vmm.boot(deadline_ms);
    vmm.outcome()
}

fn said(console: &[String], what: &str) -> bool {
    console.iter().any(|line| line.contains(what))
}

#[test]
#[ignore = "needs KVM"]
fn a_guest_that_powers_off() {
    let (outcome, console) = outcome_of(&Guest::told("guest=power-off"), LONG);
    assert_eq!(outcome, Outcome::PoweredOff, "{console:#?}");
    assert!(said(&console, "guest: init runs"), "{console:#?}");
}

#[test]
#[ignore = "needs KVM"]
fn a_guest_that_panics() {
    let (outcome, console) = outcome_of(&Guest::told("guest=die"), LONG);
    assert_eq!(outcome, Outcome::Panicked, "{console:#?}");
    assert!(said(&console, "Attempted to kill init"), "{console:#?}");
}

#[test]
#[ignore = "needs KVM"]
fn a_guest_that_resets_by_itself_has_crashed() {
    let (outcome, console) = outcome_of(&Guest::told("guest=restart"), LONG);
    assert_eq!(outcome, Outcome::Panicked, "{console:#?}");
}

#[test]
#[ignore = "needs KVM"]
fn a_guest_that_triple_faults() {
    let (outcome, console) = outcome_of(&Guest::told("guest=restart reboot=t"), LONG);
    assert_eq!(outcome, Outcome::TripleFault, "{console:#?}");
}

#[test]
#[ignore = "needs KVM"]
fn a_guest_that_never_dials() {
    let (outcome, console) = outcome_of(&Guest::told("guest=hang"), 25_000);
    assert_eq!(outcome, Outcome::BootTimedOut, "{console:#?}");
    assert!(said(&console, "guest: init runs"), "{console:#?}");
}

#[test]
#[ignore = "needs KVM"]
fn a_guest_that_is_stopped() {
    let mut running = Running::start(&Guest::default(), |_| ());
    assert_eq!(running.vmm.state(), State::Running);
    assert_eq!(running.vmm.ask(Command::Stop, &[]), Ok(Response::Done));
    assert_eq!(running.vmm.outcome().0, Outcome::Stopped);
}

fn refusal(guest: &Guest) -> (FailureKind, String) {
    let failure = Vmm::start().configure(guest).unwrap_err();
    (failure.kind, failure.message)
}

#[test]
#[ignore = "needs KVM"]
fn a_kernel_that_is_none() {
    let mut kernel = tempfile::NamedTempFile::new().unwrap();
    kernel.write_all(&[0; 8192]).unwrap();
    let guest = Guest { kernel: kernel.path().into(), ..Guest::default() };
    let (kind, message) = refusal(&guest);
    assert_eq!(kind, FailureKind::InvalidArgument);
    assert_eq!(message, "The kernel is not an uncompressed x86-64 ELF image (vmlinux)");
}

#[test]
#[ignore = "needs KVM"]
fn too_little_memory() {
    let mut guest = Guest::default();
    guest.config.memory_mib = 32;
    let (kind, message) = refusal(&guest);
    assert_eq!(kind, FailureKind::InvalidArgument);
    assert!(
        message.starts_with("32 MiB of memory are too little for this kernel and root image"),
        "{message}"
    );
}

#[test]
#[ignore = "needs KVM"]
fn a_descriptor_that_is_not_kvm() {
    let guest = Guest { kvm: "/dev/null".into(), ..Guest::default() };
    let (kind, message) = refusal(&guest);
    assert_eq!(kind, FailureKind::InvalidArgument);
    assert!(message.starts_with("The descriptor given as KVM is not /dev/kvm"), "{message}");
}

#[test]
#[ignore = "needs KVM"]
fn a_command_line_that_is_too_long() {
    let (kind, message) = refusal(&Guest::told(&"x".repeat(3000)));
    assert_eq!(kind, FailureKind::InvalidArgument);
    assert!(message.contains("shorten kernel_params"), "{message}");
}

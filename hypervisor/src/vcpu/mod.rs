//! Virtual CPUs, each on a thread of its own.
//!
//! A vCPU thread does nothing but let the guest run and dispatch what it asks for: ports and memory-mapped registers,
//! by tables that need no lock ([`crate::bus`]). It starts parked, and the [`Gate`] lets it pass and calls it back. It
//! never ends: when the guest is over it says so to [`Ending`] and sleeps until the process exits, so that nothing which
//! KVM or another thread refers to is taken away.

mod cpuid;
mod gate;
mod kick;
mod msr;
mod registers;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use kvm_bindings::CpuId;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vm_memory::GuestAddress;
use vmshim_protocol::control::Outcome;

pub use cpuid::Topology;
pub use gate::Gate;
pub use kick::install_signal_handler;

use crate::bus::Bus;
use crate::clock;
use crate::machine::Ending;
use kick::Kick;

/// A vCPU's stack: dispatch goes a few calls deep into a device.
const STACK_BYTES: usize = 128 << 10;

/// Why a vCPU could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// A call to KVM failed.
    #[error("KVM cannot {what} vCPU {index}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// Which vCPU.
        index: u8,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A register was refused.
    #[error("KVM refuses to set model-specific register {0:#x}, without which the guest does not boot")]
    Msr(u32),
    /// No thread.
    #[error("the host cannot start a thread for a vCPU")]
    Thread(#[source] io::Error),
}

/// What a vCPU thread shares with the rest of the machine.
#[derive(Clone)]
pub struct Surroundings {
    /// I/O ports.
    pub ports: Arc<Bus>,
    /// Memory-mapped registers.
    pub registers: Arc<Bus>,
    /// Lets vCPUs run.
    pub gate: Arc<Gate>,
    /// Where a vCPU says that the guest is over.
    pub ending: Ending,
    /// When the first instruction ran, in nanoseconds of the monotonic clock.
    pub first_run: Arc<AtomicU64>,
    /// Returns from the guest to this process.
    pub exits: Arc<AtomicU64>,
}

/// A vCPU that has been set up and does not run yet.
pub struct Vcpu {
    index: u8,
    fd: VcpuFd,
}

impl Vcpu {
    /// Makes vCPU `index`. Memory slots are registered before the first one is made, which is when it is cheap.
    ///
    /// # Errors
    /// See [`VcpuError`].
    pub fn new(vm: &VmFd, index: u8, supported: &CpuId, topology: Topology) -> Result<Self, VcpuError> {
        let failed = |what| move |source| VcpuError::Kvm { what, index, source };
        let fd = vm.create_vcpu(u64::from(index)).map_err(failed("create"))?;
        let cpuid = cpuid::normalised(supported, topology, index);
        fd.set_cpuid2(&cpuid).map_err(failed("set the features of"))?;
        msr::set(&fd, index)?;
        Ok(Self { index, fd })
    }

    /// Makes it the one that enters the kernel; the others wait for it to wake them, inside KVM.
    ///
    /// # Errors
    /// When KVM refuses the registers.
    pub fn enter_kernel_at(&self, entry: GuestAddress) -> Result<(), VcpuError> {
        let failed = |source| VcpuError::Kvm { what: "set the registers of", index: self.index, source };
        registers::set(&self.fd, entry).map_err(failed)
    }

    /// Starts its thread, which waits at the gate. `confine` is called first on that thread.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub fn spawn(
        mut self,
        surroundings: Surroundings,
        confine: impl FnOnce() + Send + 'static,
    ) -> Result<(), VcpuError> {
        let kick = Kick::new(&mut self.fd);
        let gate = Arc::clone(&surroundings.gate);
        let builder = thread::Builder::new().name(format!("vcpu{}", self.index)).stack_size(STACK_BYTES);
        let thread = builder
            .spawn(move || {
                confine();
                self.run(&surroundings)
            })
            .map_err(VcpuError::Thread)?;
        gate.register(kick.of(&thread));
        Ok(())
    }

    fn run(mut self, surroundings: &Surroundings) {
        surroundings.gate.pass();
        if self.index == 0 {
            surroundings.first_run.store(clock::monotonic_ns(), Ordering::Release);
        }
        let outcome = loop {
            match self.step(surroundings) {
                Step::Run => {}
                Step::Called => self.answer_call(&surroundings.gate),
                Step::Over(outcome) => break outcome,
            }
        };
        surroundings.ending.declare(outcome);
        self.sleep(&surroundings.gate)
    }

    /// Waits for the end of the process. A pause that comes now finds this vCPU stopped.
    fn sleep(self, gate: &Gate) {
        gate.leave();
        loop {
            thread::park();
        }
    }

    fn answer_call(&mut self, gate: &Gate) {
        // First take the call back, then look why it came: the other way round one could be lost.
        self.fd.set_kvm_immediate_exit(0);
        if gate.pass() {
            // Tells the guest's watchdogs that time has passed; fails where it does not use the clock.
            let _ = self.fd.kvmclock_ctrl();
        }
    }

    fn step(&mut self, surroundings: &Surroundings) -> Step {
        let exit = self.fd.run();
        surroundings.exits.fetch_add(1, Ordering::Relaxed);
        match exit {
            Ok(VcpuExit::IoIn(port, data)) => surroundings.ports.read(u64::from(port), data),
            Ok(VcpuExit::IoOut(port, data)) => surroundings.ports.write(u64::from(port), data),
            Ok(VcpuExit::MmioRead(address, data)) => surroundings.registers.read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => surroundings.registers.write(address, data),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => return Step::Called,
            Ok(VcpuExit::Shutdown) => return Step::Over(Outcome::TripleFault),
            Ok(VcpuExit::SystemEvent(_, _)) => return Step::Over(Outcome::Panicked),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return self.failed(&format!("could not enter the guest (hardware reason {reason:#x})"));
            }
            Ok(VcpuExit::InternalError) => return self.failed("met an instruction that it cannot emulate"),
            Ok(other) => {
                let what = format!("stopped for a reason that is not handled ({other:?})");
                return self.failed(&what);
            }
            Err(error) => match error.errno() {
                nix::libc::EINTR => return Step::Called,
                // A CPU that was not woken yet: KVM asks to be called again.
                nix::libc::EAGAIN => {}
                nix::libc::EFAULT => {
                    return self.failed("met an access of the guest to memory that it has not plugged in");
                }
                _ => return self.failed(&format!("failed: {error}")),
            },
        }
        // A device may have ended the machine in this very step; the guest shall not run on behind it.
        if surroundings.ending.is_declared() { Step::Over(Outcome::Stopped) } else { Step::Run }
    }

    fn failed(&self, what: &str) -> Step {
        Step::Over(Outcome::Failed { message: format!("KVM {what} on vCPU {}.", self.index) })
    }
}

enum Step {
    Run,
    /// Somebody wants this thread's attention.
    Called,
    Over(Outcome),
}

//! Pods whose parts are killed at random moments. Whatever is hit and when, CRI can remove the pod, nothing is left of
//! it on the host, and the next one runs.
//!
//! * `VMSHIM_TEST_FAULT_PODS`: how many pods, [`PODS`] if not set,
//! * `VMSHIM_TEST_FAULT_SEED`: the seed of a run to be repeated, which each run prints.

use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmshim_tests::cri::{
    Cri, Empty, ListPodSandboxResponse, PodSandbox, PodSandboxConfig, PodSandboxRequest,
};

use crate::bad_pods::{ip, netns_names};
use crate::fixture::{Host, host};
use crate::kill::processes;
use crate::pods::{FOREVER, Pod, exec, named};

/// How many pods an ordinary run of the tests has.
const PODS: u64 = 4;

/// How long it may take until a pod is removed: as long as a guest that does not answer is waited for, and again.
const REMOVED_WITHIN: Duration = Duration::from_secs(150);

/// What the kubelet waits before it tries again to remove a pod.
const SYNC: Duration = Duration::from_secs(1);

/// What is hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Shim,
    Vmm,
    /// A guest that does not answer any more.
    FrozenVmm,
    /// The agent's end is that of the guest's kernel.
    Guest,
    Containerd,
}

const VICTIMS: [Victim; 5] =
    [Victim::Shim, Victim::Vmm, Victim::FrozenVmm, Victim::Guest, Victim::Containerd];

/// What CRI is doing with the pod at that time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    Run,
    Create,
    Start,
    Exec,
    Stop,
}

const MOMENTS: [Moment; 5] = [Moment::Run, Moment::Create, Moment::Start, Moment::Exec, Moment::Stop];

/// A fault, and how long after the beginning of the moment it comes.
#[derive(Debug, Clone, Copy)]
struct Fault {
    victim: Victim,
    moment: Moment,
    after: Duration,
}

impl Fault {
    /// Any fault that can be, at any time within what its moment takes when nothing is wrong.
    fn draw(dice: &mut Dice, calm: &[Duration; MOMENTS.len()]) -> Self {
        loop {
            let victim = VICTIMS[dice.below(VICTIMS.len())];
            let moment = dice.below(MOMENTS.len());
            let micros = usize::try_from(calm[moment].as_micros()).unwrap();
            let after = Duration::from_micros(dice.below(micros).try_into().unwrap());
            let moment = MOMENTS[moment];
            // Only a container that runs can bring its guest down.
            if victim != Victim::Guest || matches!(moment, Moment::Exec | Moment::Stop) {
                return Self { victim, moment, after };
            }
        }
    }

    /// Strikes when its time has come, once the moment has begun; tells how many were hit.
    fn arm(self, host: &Host, container: Option<&str>) -> JoinHandle<usize> {
        let (socket, daemon) = (host.address(), host.pid());
        let container = container.map(str::to_owned);
        std::thread::spawn(move || {
            std::thread::sleep(self.after);
            match self.victim {
                Victim::Shim => strike(&shims(), Signal::SIGKILL),
                Victim::Vmm => strike(&processes("vmshim-vmm"), Signal::SIGKILL),
                Victim::FrozenVmm => strike(&processes("vmshim-vmm"), Signal::SIGSTOP),
                Victim::Containerd => strike(&[Pid::from_raw(daemon.try_into().unwrap())], Signal::SIGKILL),
                Victim::Guest => crash(&socket, &container.unwrap()),
            }
        })
    }
}

/// Those that serve a pod, or are about to; not the `delete` that tidies up after one.
fn shims() -> Vec<Pid> {
    let tidies = processes("delete");
    processes("containerd-shim-vmshim-v2").into_iter().filter(|shim| !tidies.contains(shim)).collect()
}

fn strike(victims: &[Pid], signal: Signal) -> usize {
    // Some may have ended by themselves.
    victims.iter().filter(|victim| kill(**victim, signal).is_ok()).count()
}

fn crash(socket: &Path, container: &str) -> usize {
    // The crash is no exit status of the shell's own.
    let crashed = |cri: Cri| {
        exec(&cri, container, "echo c > /proc/sysrq-trigger").map_or(true, |done| done.exit_code > 127)
    };
    Cri::connect(socket).is_ok_and(crashed).into()
}

/// Numbers from a seed (SplitMix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.roll() % u64::try_from(limit.max(1)).unwrap()).unwrap()
    }
}

/// A pod from its start to its stop, until something fails.
struct Course<'a> {
    host: &'a Host,
    fault: Option<Fault>,
    armed: Option<JoinHandle<usize>>,
    took: [Duration; MOMENTS.len()],
}

impl<'a> Course<'a> {
    fn new(host: &'a Host, fault: Option<Fault>) -> Self {
        Self { host, fault, armed: None, took: Default::default() }
    }

    fn run(&mut self, handler: &str, name: &str) -> Result<()> {
        let mut config = named(PodSandboxConfig::default(), name);
        let linux = config.linux.mut_or_insert_default();
        let crashes = self.fault.is_some_and(|fault| fault.victim == Victim::Guest);
        linux.security_context.mut_or_insert_default().privileged = crashes;

        let host = self.host;
        let pod = self.during(Moment::Run, None, || Pod::attempt(host, handler, config))?;
        let container = self.during(Moment::Create, None, || pod.attempt_create("c", FOREVER, &[]))?;
        self.during(Moment::Start, Some(&container), || pod.attempt_call("StartContainer", &container))?;
        self.during(Moment::Exec, Some(&container), || pod.attempt_exec(&container, "sleep 1"))?;
        self.during(Moment::Stop, Some(&container), || pod.attempt_stop())
    }

    /// Does what belongs to a moment, with the fault on its way if it belongs there too.
    fn during<T>(
        &mut self,
        moment: Moment,
        container: Option<&str>,
        act: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let started = Instant::now();
        if let Some(fault) = self.fault.filter(|fault| fault.moment == moment) {
            self.armed = Some(fault.arm(self.host, container));
        }
        let done = act();
        self.took[moment as usize] = started.elapsed();
        done
    }

    /// How many were hit.
    fn hits(self) -> usize {
        self.armed.map_or(0, |armed| armed.join().unwrap())
    }
}

/// Removes a pod as the kubelet does: again, until it is gone.
fn remove(host: &Host, name: &str) -> Result<()> {
    let started = Instant::now();
    loop {
        match try_to_remove(host, name) {
            Err(error) if started.elapsed() > REMOVED_WITHIN => return Err(error),
            Err(_) => std::thread::sleep(SYNC),
            Ok(()) => return Ok(()),
        }
    }
}

fn try_to_remove(host: &Host, name: &str) -> Result<()> {
    let cri = Cri::connect(&host.address())?;
    for pod in pods(&cri)?.into_iter().filter(|pod| pod.metadata.name == name) {
        let request = PodSandboxRequest { pod_sandbox_id: pod.id, ..Default::default() };
        cri.call::<Empty>("StopPodSandbox", &request)?;
        cri.call::<Empty>("RemovePodSandbox", &request)?;
    }
    Ok(())
}

fn pods(cri: &Cri) -> Result<Vec<PodSandbox>> {
    Ok(cri.call::<ListPodSandboxResponse>("ListPodSandbox", &Empty::default())?.items)
}

/// containerd loses a namespace that it has made while it has not yet written down whose it is, whatever the runtime.
fn delete_lost_namespaces(others: &[String]) {
    for name in netns_names().into_iter().filter(|name| !others.contains(name)) {
        eprintln!("containerd has lost {name}");
        assert!(ip(&["netns", "delete", &name]));
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect(variable))
}

#[test]
fn nothing_is_left_of_pods_whose_parts_are_killed_at_random() {
    let count = number("VMSHIM_TEST_FAULT_PODS").unwrap_or(PODS);
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let seed = number("VMSHIM_TEST_FAULT_SEED").unwrap_or_else(now);
    eprintln!("VMSHIM_TEST_FAULT_SEED={seed}");
    let mut dice = Dice(seed);
    let mut host = host();
    let handlers =
        if host.sandboxes_are_the_shims() { &["vmshim", "vmshim-sandbox"][..] } else { &["vmshim"] };

    let mut calm = Course::new(&host, None);
    let name = host.id();
    calm.run(handlers[0], &name).unwrap();
    let calm = calm.took;
    remove(&host, &name).unwrap();
    host.assert_nothing_left();
    eprintln!("without a fault: {calm:?}");

    let mut findings = Vec::new();
    for round in 0..count {
        let (name, handler) = (host.id(), handlers[dice.below(handlers.len())]);
        let fault = Fault::draw(&mut dice, &calm);
        let (started, others) = (Instant::now(), netns_names());
        let mut course = Course::new(&host, Some(fault));
        let outcome = course.run(handler, &name);
        let hits = course.hits();
        if fault.victim == Victim::Containerd {
            host.kill_and_restart().unwrap();
        }
        let removed = remove(&host, &name);
        if (fault.victim, fault.moment) == (Victim::Containerd, Moment::Run) {
            delete_lost_namespaces(&others);
        }
        let left = host.newly_left();
        let told = outcome.err().map_or_else(|| "ok".to_owned(), |error| format!("{error:#}"));
        let report = format!(
            "{round}: {name} {handler} {fault:?}: {hits} hit, {told}; {removed:?} after {:?}, left: {left:#?}",
            started.elapsed()
        );
        eprintln!("{report}");
        if removed.is_err() || !left.is_empty() {
            findings.push(report);
        }
    }
    assert!(findings.is_empty(), "seed {seed}: {findings:#?}");
}

//! The whole agent but its boot, with the test in the place of the shim: requests over ttrpc, standard streams over
//! sockets, containers made for real from busybox. Needs root; works in a mount namespace of its own. `--ignored` runs
//! the cases that need cgroup controllers, which not every machine has to give.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::type_complexity,
    reason = "this is a test as a whole: what is not as expected ends the case"
)]

mod cases;
mod limits;
mod pod;
mod shim;

use shim::Shim;
use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;
use std::time::{Duration, Instant};

type Case = (&'static str, fn(Shim) -> Pin<Box<dyn Future<Output = ()>>>);

/// No case takes longer, unless something hangs.
const DEADLINE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let ignored = arguments.iter().any(|argument| argument == "--ignored");
    let wanted = |name: &str| {
        (filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str())))
            && (!ignored || limits::NEED_CONTROLLERS.contains(&name))
    };
    if arguments.iter().any(|argument| argument == "--list") {
        cases::ALL.iter().filter(|(name, _)| wanted(name)).for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    if !nix::unistd::Uid::effective().is_root() {
        println!("skipped: containers can only be made by root");
        return ExitCode::SUCCESS;
    }
    vmshim_agent::reaper::block_signal().unwrap();
    shim::separate_mounts();
    let mut failed = 0;
    for (name, case) in cases::ALL {
        if !wanted(name) {
            continue;
        }
        let begin = Instant::now();
        let result = std::panic::catch_unwind(|| run(*case));
        let verdict = match result {
            Ok(true) => "ok",
            Ok(false) => "FAILED (hangs)",
            Err(_) => "FAILED",
        };
        failed += usize::from(verdict != "ok");
        println!("test {name} ... {verdict} ({:?})", begin.elapsed());
    }
    if failed == 0 {
        return ExitCode::SUCCESS;
    }
    println!("{failed} failed");
    ExitCode::FAILURE
}

fn run(case: fn(Shim) -> Pin<Box<dyn Future<Output = ()>>>) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let done = runtime.block_on(async {
        let shim = Shim::new().await;
        let check = shim.leftovers();
        let done = tokio::time::timeout(DEADLINE, case(shim)).await.is_ok();
        check.assert_nothing();
        done
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    done
}

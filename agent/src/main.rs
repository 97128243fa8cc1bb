//! The program: the guest's first process, or the engine that it starts to make a container.

use std::process::ExitCode;
use vmshim_agent::{boot, engine, log};

fn main() -> ExitCode {
    if std::env::args().nth(1).is_some_and(|argument| argument == engine::COMMAND) {
        return engine::main();
    }
    if std::process::id() != 1 {
        eprintln!("vmshim-agent is the first process of a virtual machine and does nothing elsewhere.");
        return ExitCode::FAILURE;
    }
    let Err(error) = boot::run();
    log::error(&format!("{error:#}"));
    // The kernel panics over the end of its first process: the host sees a failure and not a guest that is done, and
    // shows the console's last lines, which say the above.
    ExitCode::FAILURE
}

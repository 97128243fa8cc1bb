//! The agent's words, and the way of the whole log to the host.
//!
//! The agent writes to the kernel's log, so that there is one order of what happened; from there everything goes to the
//! host's log port, and errors to the serial console by the kernel's own rule.

mod forward;

pub use forward::forward;

use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;

/// The kernel cuts longer records off.
const LONGEST: usize = 900;

static KERNEL_LOG: OnceLock<File> = OnceLock::new();

/// Opens the kernel's log, once `/dev` is there.
pub fn open() {
    if let Ok(file) = File::options().write(true).open("/dev/kmsg") {
        // Opened once at boot.
        let _ = KERNEL_LOG.set(file);
    }
}

/// Something that should not be.
pub fn error(text: &str) {
    write(3, text);
}

/// Something worth knowing.
pub fn info(text: &str) {
    write(6, text);
}

fn write(level: u8, text: &str) {
    let end = (0..=LONGEST.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    let line = format!("<{level}>vmshim-agent: {}\n", text.get(..end).unwrap_or_default().replace('\n', " "));
    // There is nobody to tell that nobody can be told.
    let _ = match KERNEL_LOG.get() {
        Some(mut log) => log.write_all(line.as_bytes()),
        None => std::io::stderr().write_all(line.as_bytes()),
    };
}

/// Says why on a panic, which ends the first process and with it the machine: to the kernel's log and, because the
/// host may see nothing else any more, to the console.
pub fn say_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.to_string();
        error(&text);
        if let Ok(mut console) = File::options().write(true).open("/dev/console") {
            let _ = writeln!(console, "vmshim-agent: {}", text.replace('\n', " "));
        }
    }));
}

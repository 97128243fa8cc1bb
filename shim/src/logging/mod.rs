//! Logging into the bundle's `log` fifo, which containerd copies into its own log.
//!
//! containerd holds the fifo open for reading. The shim never waits for it: a line that does not fit is lost. What
//! the guest and the VMM write is hostile text, so every message is quoted and bounded here.

mod guest;
mod line;
mod lines;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::SystemTime;

use log::{LevelFilter, Log, Metadata, Record};

pub use guest::parse_guest_line;
pub use line::printable;
pub use lines::LineBuffer;

/// The most bytes of one message that are logged.
const MAX_MESSAGE: usize = 4096;

struct FifoLogger {
    sink: Mutex<File>,
    fields: String,
}

impl Log for FifoLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut message = record.args().to_string();
        line::truncate(&mut message, MAX_MESSAGE);
        let text = line::format(SystemTime::now(), record.level(), &message, &self.fields);
        if let Ok(mut sink) = self.sink.lock() {
            // A full or closed fifo must not disturb the pod.
            let _ = sink.write_all(text.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Sends the log of this process to the fifo `path`, if there is one with a reader.
pub fn init(path: &Path, level: LevelFilter, namespace: &str, id: &str) {
    let opened = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    let Ok(sink) = opened else { return };
    let fields =
        line::fields(&[("namespace", namespace), ("id", id), ("runtime", "io.containerd.vmshim.v2")]);
    if log::set_boxed_logger(Box::new(FifoLogger { sink: Mutex::new(sink), fields })).is_ok() {
        log::set_max_level(level);
    }
    log::debug!("the shim serves");
    std::panic::set_hook(Box::new(|info| log::error!("the shim has a bug: {info}")));
}

//! Lines on standard error, which the shim reads.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

/// Lines that a guest may cause in its life, so that it can neither fill the host's log nor slow us down by it.
const GUEST_LINES: u32 = 64;

/// Says something that the guest can bring about as often as it likes; after some lines it is not heard any more.
pub fn guest(line: fmt::Arguments<'_>) {
    static SPENT: AtomicU32 = AtomicU32::new(0);
    let spend = |spent: u32| (spent < GUEST_LINES).then(|| spent + 1);
    match SPENT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend) {
        Ok(spent) if spent + 1 < GUEST_LINES => eprintln!("vmshim-vmm: {line}"),
        Ok(_) => eprintln!("vmshim-vmm: {line} (further complaints about this guest are dropped)"),
        Err(_) => {}
    }
}

/// Says something that only the host can bring about.
pub fn host(line: fmt::Arguments<'_>) {
    eprintln!("vmshim-vmm: {line}");
}

//! The CPUs that the kernel was told to leave alone at boot.

use crate::log;
use std::fs;
use std::path::Path;

/// Whether there are more than the first.
pub fn are_several() -> bool {
    Path::new("/sys/devices/system/cpu/cpu1").exists()
}

/// How many are online.
pub fn count() -> u32 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN)
        .ok()
        .flatten()
        .and_then(|count| u32::try_from(count).ok())
        .unwrap_or(1)
}

/// Brings every present CPU online.
pub fn bring_online() {
    let Ok(entries) = fs::read_dir("/sys/devices/system/cpu") else { return };
    for entry in entries.flatten() {
        let numbered = entry
            .file_name()
            .to_str()
            .and_then(|name| name.strip_prefix("cpu"))
            .is_some_and(|number| number.parse::<u32>().is_ok());
        if numbered {
            online(&entry.path().join("online"));
        }
    }
}

/// The first CPU has no such file: it cannot be anything but online.
fn online(switch: &Path) {
    let parked = fs::read_to_string(switch).is_ok_and(|state| state.trim() == "0");
    if parked && let Err(error) = fs::write(switch, "1") {
        log::error(&format!("{} stays 0: {error}", switch.display()));
    }
}

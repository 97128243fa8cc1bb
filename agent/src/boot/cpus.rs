//! The CPUs that the kernel was told to leave alone at boot.

use crate::log;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use vmshim_protocol::cpus::PARAMETER;

const DEVICES: &str = "/sys/devices/system/cpu";

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

/// Brings up as many CPUs as the host wants at first.
pub fn bring_up() {
    let parameters = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    if let Err(error) = keep_up(wanted(&parameters)) {
        log::error(&format!("a CPU stays down: {error}"));
    }
}

/// Brings CPUs up or takes them down, so that it is the first `count` that are up. Goes on where one refuses.
pub fn keep_up(count: u32) -> io::Result<()> {
    let mut result = Ok(());
    for (number, switch) in switches(Path::new(DEVICES))? {
        if let Err(error) = set(&switch, number < count) {
            let what = format!("{}: {error}", switch.display());
            result = Err(io::Error::new(error.kind(), what));
        }
    }
    result
}

/// All where nothing is said.
fn wanted(parameters: &str) -> u32 {
    let value = |word: &str| word.strip_prefix(PARAMETER)?.strip_prefix('=')?.parse().ok();
    parameters.split_whitespace().find_map(value).unwrap_or(u32::MAX)
}

/// The CPUs' numbers and their switches. The first CPU has none: it cannot be anything but up.
fn switches(devices: &Path) -> io::Result<Vec<(u32, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(devices)? {
        let entry = entry?;
        let name = entry.file_name();
        let number =
            name.to_str().and_then(|name| name.strip_prefix("cpu")).and_then(|text| text.parse().ok());
        let switch = entry.path().join("online");
        if let Some(number) = number
            && switch.exists()
        {
            found.push((number, switch));
        }
    }
    Ok(found)
}

fn set(switch: &Path, up: bool) -> io::Result<()> {
    let is_up = fs::read_to_string(switch)?.trim() != "0";
    if is_up == up { Ok(()) } else { fs::write(switch, if up { "1" } else { "0" }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_says_how_many_come_up() {
        assert_eq!(wanted("console=ttyS0 vmshim.cpus=3 quiet"), 3);
        for silent in ["", "vmshim.cpus", "vmshim.cpus=", "vmshim.cpus=x", "vmshim.cpusx=2"] {
            assert_eq!(wanted(silent), u32::MAX, "{silent}");
        }
    }

    #[test]
    fn only_cpus_that_can_be_switched_are_switched() {
        let devices = tempfile::tempdir().unwrap();
        for name in ["cpu0", "cpu1", "cpu12", "cpufreq", "cpuidle"] {
            fs::create_dir(devices.path().join(name)).unwrap();
        }
        for (name, state) in [("cpu1", "0\n"), ("cpu12", "1\n"), ("cpufreq", "1\n")] {
            fs::write(devices.path().join(name).join("online"), state).unwrap();
        }
        let mut found = switches(devices.path()).unwrap();
        found.sort();
        assert_eq!(found.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [1, 12]);
        for (number, switch) in &found {
            set(switch, *number < 2).unwrap();
        }
        let states = found.iter().map(|(_, switch)| fs::read_to_string(switch).unwrap());
        assert_eq!(states.collect::<Vec<_>>(), ["1", "0"]);
    }
}

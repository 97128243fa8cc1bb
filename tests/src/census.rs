//! What the host holds, so that a test can show that nothing is left of a container.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Where containerd's own snapshotter keeps the layers of an image mounted once a container has had it.
const EROFS_LAYERS: &str = "/io.containerd.snapshotter.v1.erofs/snapshots/";

/// Everything on the host that a container's life may have added to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census {
    directories: Vec<PathBuf>,
    found: BTreeSet<String>,
}

impl Census {
    /// Counts processes, mounts, sockets, network interfaces (those of named namespaces too, with what
    /// redirects their traffic), cgroups, loop devices, the runtime's own files and what is in the subdirectories of
    /// `directories`, but not these themselves, which stay.
    pub fn take(directories: &[PathBuf]) -> Self {
        let mut found = BTreeSet::new();
        processes(&mut found);
        mounts(&mut found);
        sockets(&mut found);
        links(&mut found);
        namespaces(&mut found);
        files(&mut found, Path::new("/run/vmshim"), "file", usize::MAX);
        files(&mut found, Path::new("/run/containerd/s"), "file", usize::MAX);
        cgroups(&mut found, Path::new("/sys/fs/cgroup"));
        loops(&mut found);
        for subdirectory in directories.iter().flat_map(fs::read_dir).flatten().flatten() {
            files(&mut found, &subdirectory.path(), "file", usize::MAX);
        }
        Self { directories: directories.to_owned(), found }
    }

    /// What is there now and was not at `before`.
    pub fn since(&self, before: &Self) -> Vec<String> {
        self.found.difference(&before.found).cloned().collect()
    }
}

/// Waits until nothing is left that was not there at `before`; the kernel and containerd finish some of their tidying
/// after `ctr` has returned.
///
/// # Errors
/// After `deadline`, the list of what is left.
pub fn settled(before: &Census, deadline: Duration) -> Result<(), Vec<String>> {
    let started = Instant::now();
    loop {
        let left = Census::take(&before.directories).since(before);
        if left.is_empty() {
            return Ok(());
        }
        if started.elapsed() > deadline {
            return Err(left);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn processes(found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir("/proc") else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.parse::<u32>().is_err() {
            continue;
        }
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        // Kernel threads come and go by themselves and have no command line; the daemon is replaced by some tests.
        let kinds = ["vmshim-vmm", "containerd-shim", "virtiofsd", "/logger "];
        if kinds.iter().any(|ours| command.contains(ours)) {
            found.insert(format!("process {name} {command}"));
        }
    }
}

fn mounts(found: &mut BTreeSet<String>) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in table.lines() {
        let fields: Vec<_> = line.split(' ').collect();
        let (Some(id), Some(place)) = (fields.first(), fields.get(4)) else { continue };
        if !place.contains(EROFS_LAYERS) {
            found.insert(format!("mount {id} {place}"));
        }
    }
}

fn sockets(found: &mut BTreeSet<String>) {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    for path in table.lines().skip(1).filter_map(|line| line.split_whitespace().nth(7)) {
        if path.contains("vmshim") || path.contains("/run/containerd/s/") {
            found.insert(format!("socket {path}"));
        }
    }
}

fn links(found: &mut BTreeSet<String>) {
    files(found, Path::new("/sys/class/net"), "link", 1);
}

/// What `ip netns` knows of.
fn namespaces(found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir("/run/netns") else { return };
    for name in entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()) {
        found.insert(format!("network namespace {name}"));
        for (kind, program, arguments) in
            [("link", "ip", &["-o", "link", "show"][..]), ("qdisc", "tc", &["qdisc", "show"])]
        {
            let output = Command::new(program).args(["-n", &name]).args(arguments).output();
            let text = output.map(|output| output.stdout).unwrap_or_default();
            for line in String::from_utf8_lossy(&text).lines() {
                // The name of the interface, or the kind of the discipline and where it is.
                let words: Vec<_> = line.split_whitespace().take(5).collect();
                let what = if kind == "link" {
                    words.get(1).copied().unwrap_or_default().to_owned()
                } else {
                    words.join(" ")
                };
                found.insert(format!("{kind} {name} {what}"));
            }
        }
    }
}

fn loops(found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir("/sys/block") else { return };
    for entry in entries.flatten() {
        let backing = entry.path().join("loop/backing_file");
        if let Ok(file) = fs::read_to_string(backing) {
            found.insert(format!("loop {} {file}", entry.file_name().to_string_lossy()));
        }
    }
}

fn files(found: &mut BTreeSet<String>, directory: &Path, kind: &str, depth: usize) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        found.insert(format!("{kind} {}", path.display()));
        if depth > 1 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(found, &path, kind, depth - 1);
        }
    }
}

fn cgroups(found: &mut BTreeSet<String>, directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        found.insert(format!("cgroup {}", entry.path().display()));
        cgroups(found, &entry.path());
    }
}

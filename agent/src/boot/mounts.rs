//! The guest's own file systems and settings.

use crate::cgroup;
use crate::log;
use crate::sys::mountfd::{FsContext, attach};
use anyhow::Context;
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use vmshim_protocol::agent::POD_SHARED_MEMORY;

const STRICT: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// Type, place, flags, data; in order.
const ESSENTIAL: &[(&str, &str, MsFlags, &str)] = &[
    ("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755"),
    ("proc", "/proc", STRICT, ""),
    ("sysfs", "/sys", STRICT, ""),
    ("tmpfs", "/run", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), "mode=0755"),
    ("tmpfs", "/tmp", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), "mode=1777"),
    (
        "devpts",
        "/dev/pts",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        "newinstance,ptmxmode=0666,mode=0620,gid=5",
    ),
    // The pod's shared memory, of the size that containerd gives it on a host.
    ("tmpfs", POD_SHARED_MEMORY, STRICT, "mode=1777,size=65536k"),
    ("mqueue", "/dev/mqueue", STRICT, ""),
    ("cgroup2", "/sys/fs/cgroup", STRICT, "nsdelegate,memory_recursiveprot"),
];

const LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// What containers expect of a host, where the kernel's own default is another. The agent's records in the kernel's
/// log must not be thinned out, since they go to the host from there.
const SYSCTLS: &[(&str, &str)] = &[
    // The kernel wants the end of the line for a word.
    ("kernel/printk_devkmsg", "on\n"),
    ("kernel/dmesg_restrict", "1"),
    ("kernel/pid_max", "4194304"),
    ("net/ipv4/ip_unprivileged_port_start", "0"),
    ("net/ipv4/ping_group_range", "0 2147483647"),
    ("vm/overcommit_memory", "1"),
    ("vm/max_map_count", "262144"),
    ("fs/inotify/max_user_instances", "8192"),
    ("fs/inotify/max_user_watches", "524288"),
];

/// Mounts everything that no request can do without.
pub fn essential() -> anyhow::Result<()> {
    for (kind, place, flags, data) in ESSENTIAL {
        let doing = || format!("mount {kind} at {place}");
        make_directory(place).with_context(doing)?;
        mount(Some(*kind), *place, Some(*kind), *flags, Some(*data)).with_context(doing)?;
    }
    for directory in ["/run/vmshim/containers", "/run/vmshim/shared"] {
        fs::create_dir_all(directory).with_context(|| format!("make {directory}"))?;
    }
    cgroup::delegate(&cgroup::root()).context("hand the cgroup controllers down")?;
    fs::create_dir(cgroup::parent()).context("make the containers' cgroup")?;
    cgroup::delegate(&cgroup::parent()).context("hand the cgroup controllers down")
}

/// Settings that make no request fail. What cannot be set is said and left.
pub fn settle() {
    for (target, link) in LINKS {
        complain(link, std::os::unix::fs::symlink(target, link));
    }
    for (name, value) in SYSCTLS {
        complain(name, fs::write(Path::new("/proc/sys").join(name), value));
    }
    // The last process to be killed for want of memory is the one that keeps the others.
    complain("oom_score_adj", fs::write("/proc/self/oom_score_adj", "-1000"));
    complain("hostname", nix::unistd::sethostname("vmshim").map_err(io::Error::from));
    complain("RLIMIT_NOFILE", setrlimit(Resource::RLIMIT_NOFILE, 1 << 20, 1 << 20).map_err(io::Error::from));
}

fn complain(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        log::error(&format!("cannot set {what}: {error}"));
    }
}

/// Mounts the shared directory, if there is such a device.
pub fn shared(place: &Path) -> io::Result<()> {
    if !Path::new("/sys/bus/virtio/drivers/virtiofs").exists() {
        return Ok(());
    }
    let context = FsContext::open("virtiofs")?;
    context.set_string("source", vmshim_protocol::shared::TAG)?;
    let mount = match context.mount(libc::MOUNT_ATTR_NODEV) {
        // A machine without the device has disks alone.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
        other => other?,
    };
    let place = crate::engine::rootfs::mounts::open_location(place)?;
    attach(mount.as_fd(), place.as_fd())
}

fn make_directory(place: &str) -> io::Result<()> {
    match fs::create_dir(place) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

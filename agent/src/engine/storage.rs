//! Root file systems: a shared directory, a disk, or layers of disks, mounted below the container's own directory.
//!
//! A disk's slot may have been filled only a moment ago. One that was empty until then has no device yet, see [`slots`].
//! One that has held another disk has: the kernel says in its log that a disk's size has changed (it sends no uevent for
//! a change from zero), so the log is what is waited on; what counts is the size then read.

use super::error::{Context, Error, Result};
use super::partition::{self, Device, FIRST_PART};
use super::rootfs::mounts::{open_location, open_shared};
use super::rootfs::options::MountOptions;
use super::rootfs::tree::Tree;
use super::wire::{Directory, Disk, Root, Upper};
use crate::sys::mountfd::{self, FsContext};
use crate::sys::slots;
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The directory below a container's own where its root file system is mounted.
pub const ROOT: &str = "rootfs";
const LOWER: &str = "lower";
const UPPER: &str = "upper";
const MOST_LAYERS: usize = 500;
/// The disk is attached before the agent is asked; more than an interrupt's way is never needed.
const DISK_DEADLINE: Duration = Duration::from_secs(5);

/// Mounts a root file system and says where.
pub fn mount(root: &Root, directory: &Path, shared: &Path) -> Result<PathBuf> {
    let goal = directory.join(ROOT);
    match root {
        Root::Shared(relative) => {
            let source = open_shared(shared, relative)
                .doing(|| format!("open the shared root file system {}", relative.display()))?;
            bind(&source, &goal)?;
        }
        Root::Disk(disk) => mount_disk(disk, &goal)?,
        Root::Overlay { lowers, upper, options } => {
            mount_overlay(lowers, upper.as_deref(), options, directory, &goal)?;
        }
    }
    Ok(goal)
}

fn bind(source: &OwnedFd, goal: &Path) -> Result<()> {
    let doing = || "bind the root file system";
    let copy = mountfd::clone_tree(source.as_fd(), Path::new(""), true).doing(doing)?;
    attach(&copy, goal)
}

fn attach(mount: &OwnedFd, goal: &Path) -> Result<()> {
    let doing = || format!("mount {}", goal.display());
    fs::create_dir_all(goal).doing(doing)?;
    let goal = open_location(goal).doing(doing)?;
    mountfd::attach(mount.as_fd(), goal.as_fd()).doing(doing)
}

fn mount_disk(disk: &Disk, goal: &Path) -> Result<()> {
    let device = partition::clear(&wait_for(disk.slot)?)?;
    match disk.part {
        None => mount_device(disk, device.path(), goal),
        Some(part) => mount_device(disk, &device.add(FIRST_PART, part)?, goal),
    }
}

/// Mounts the file system that a device holds.
fn mount_device(disk: &Disk, device: &Path, goal: &Path) -> Result<()> {
    let shown = format!("the disk in slot {}", disk.slot);
    if !matches!(disk.filesystem.as_str(), "ext4" | "erofs") {
        return Err(Error::unsupported(
            format!("rootfs file system \"{}\"", disk.filesystem),
            "it mounts ext4 and erofs",
        ));
    }
    let options = MountOptions::parse(&disk.options, &shown)?;
    if options.bind.is_some() || options.id_map.is_some() || options.copy_up {
        return Err(Error::invalid(shown, "has an option that means nothing for a disk"));
    }
    let doing = || format!("mount {shown} as {}", disk.filesystem);
    let context = FsContext::open(&disk.filesystem).doing(doing)?;
    context.set_string("source", &device.to_string_lossy()).doing(doing)?;
    if options.read_only() {
        context.set_flag("ro").doing(doing)?;
    }
    set_data(&context, &options, &shown)?;
    let mount = context.mount(options.attributes.set).doing(doing)?;
    attach(&mount, goal)
}

fn mount_overlay(
    lowers: &[Disk],
    upper: Option<&Upper>,
    options: &[String],
    directory: &Path,
    goal: &Path,
) -> Result<()> {
    if lowers.is_empty() || lowers.len() > MOST_LAYERS {
        return Err(Error::invalid(
            "rootfs.overlay",
            format!("has {} layers; 1 to {MOST_LAYERS} work", lowers.len()),
        ));
    }
    let options = MountOptions::parse(options, "rootfs.overlay")?;
    let places = mount_lowers(lowers, &directory.join(LOWER))?;
    let place = directory.join(UPPER);
    let (upper, work) = match upper {
        Some(upper) => {
            mount_disk(&upper.disk, &place)?;
            let tree = Tree::new(open_location(&place).doing(|| "open the writable disk")?);
            upper.directories.iter().try_for_each(|directory| make(&tree, directory))?;
            (inside(&tree, &upper.upper)?, inside(&tree, &upper.work)?)
        }
        None => {
            let doing = || "make room for changes to the root file system";
            let context = FsContext::open("tmpfs").doing(doing)?;
            context.set_string("mode", "0755").doing(doing)?;
            attach(&context.mount(0).doing(doing)?, &place)?;
            let tree = Tree::new(open_location(&place).doing(doing)?);
            (inside(&tree, Path::new("fs"))?, inside(&tree, Path::new("work"))?)
        }
    };
    let overlay = stack(&places, &upper, &work, &options)?;
    attach(&overlay, goal)
}

/// Mounts each layer below `directory`, the parts of one device in the order they come.
fn mount_lowers(lowers: &[Disk], directory: &Path) -> Result<Vec<PathBuf>> {
    let mut places = Vec::with_capacity(lowers.len());
    let mut devices: Vec<(u32, Device, u32)> = Vec::new();
    for (number, lower) in lowers.iter().enumerate() {
        let place = directory.join(number.to_string());
        match lower.part {
            None => mount_disk(lower, &place)?,
            Some(part) => {
                if devices.last().is_none_or(|(slot, ..)| *slot != lower.slot) {
                    devices.push((lower.slot, partition::clear(&wait_for(lower.slot)?)?, FIRST_PART));
                }
                let Some((_, device, next)) = devices.last_mut() else { continue };
                mount_device(lower, &device.add(*next, part)?, &place)?;
                *next += 1;
            }
        }
        places.push(place);
    }
    Ok(places)
}

/// An overlay of directories, the topmost first.
fn stack(lowers: &[PathBuf], upper: &OwnedFd, work: &OwnedFd, options: &MountOptions) -> Result<OwnedFd> {
    let doing = || "put the layers of the root file system together";
    let context = FsContext::open("overlay").doing(doing)?;
    context.set_string("source", "overlay").doing(doing)?;
    for lower in lowers {
        context.set_string("lowerdir+", &lower.to_string_lossy()).doing(doing)?;
    }
    // By descriptor, so that nothing in the disk decides where these paths lead.
    for (key, fd) in [("upperdir", upper), ("workdir", work)] {
        context.set_string(key, &format!("/proc/self/fd/{}", fd.as_raw_fd())).doing(doing)?;
    }
    set_data(&context, options, "rootfs.overlay")?;
    context.mount(options.attributes.set).doing(doing)
}

/// The options that are for the file system itself.
fn set_data(context: &FsContext, options: &MountOptions, field: &str) -> Result<()> {
    for (key, value) in &options.data {
        match value {
            Some(value) => context.set_string(key, value),
            None => context.set_flag(key),
        }
        .map_err(|error| {
            Error::invalid(
                format!("{field} option \"{key}\""),
                context.complaint().unwrap_or(error.to_string()),
            )
        })?;
    }
    Ok(())
}

/// Makes a directory of a disk, with the owner and mode that it shall have if it is not there yet.
fn make(tree: &Tree, directory: &Directory) -> Result<()> {
    let doing = || format!("make {} on the writable disk", directory.path.display());
    if tree.open(&directory.path).is_ok() {
        return Ok(());
    }
    let made = tree.directory(&directory.path).doing(doing)?;
    // Through /proc, since a descriptor of a mere location cannot be changed itself.
    let path = format!("/proc/self/fd/{}", made.as_raw_fd());
    std::os::unix::fs::chown(&path, Some(directory.uid), Some(directory.gid)).doing(doing)?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(directory.mode);
    fs::set_permissions(&path, mode).doing(doing)
}

/// A directory in a disk's own tree, made where missing.
fn inside(tree: &Tree, path: &Path) -> Result<OwnedFd> {
    tree.directory(path).doing(|| format!("make {} of the root file system", path.display()))
}

/// The device with the slot's serial number, once it has a size.
pub fn wait_for(slot: u32) -> Result<PathBuf> {
    let doing = || "watch the kernel's log";
    // Opened before the first look: a change after it is then seen.
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let log = open("/dev/kmsg", flags, Mode::empty()).doing(doing)?;
    nix::unistd::lseek(&log, 0, nix::unistd::Whence::SeekEnd).doing(doing)?;
    slots::look_again().doing(|| "start the disk's device")?;
    let end = Instant::now() + DISK_DEADLINE;
    let missing = || Error::TimedOut(format!("no disk has appeared in slot {slot}"));
    loop {
        if let Some(device) = find(Path::new("/sys/block"), slot).doing(|| "look for the disk")? {
            return Ok(device);
        }
        let left = end.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).map_err(|_| missing())?;
        let mut watched = [PollFd::new(log.as_fd(), PollFlags::POLLIN)];
        if poll(&mut watched, timeout).doing(doing)? == 0 {
            return Err(missing());
        }
        // Each read takes one record; an overrun one (EPIPE) is gone, and that is fine.
        let mut record = [0; 8192];
        while matches!(nix::unistd::read(&log, &mut record), Ok(1..) | Err(nix::Error::EPIPE)) {}
    }
}

fn find(block: &Path, slot: u32) -> std::io::Result<Option<PathBuf>> {
    let wanted = format!("slot{slot}");
    for entry in fs::read_dir(block)? {
        let entry = entry?;
        let Ok(serial) = fs::read_to_string(entry.path().join("serial")) else { continue };
        if serial.trim() != wanted {
            continue;
        }
        let size = fs::read_to_string(entry.path().join("size"))?;
        let filled = size.trim() != "0";
        return Ok(filled.then(|| Path::new("/dev").join(entry.file_name())));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_slot_is_found_by_its_serial_number() {
        let dir = tempfile::tempdir().unwrap();
        for (name, serial, size) in
            [("vda", "slot1\n", "0\n"), ("vdb", "slot10\n", "8\n"), ("vdc", "slot2", "8\n")]
        {
            let device = dir.path().join(name);
            fs::create_dir(&device).unwrap();
            fs::write(device.join("serial"), serial).unwrap();
            fs::write(device.join("size"), size).unwrap();
        }
        fs::create_dir(dir.path().join("loop0")).unwrap();
        assert_eq!(find(dir.path(), 1).unwrap(), None);
        assert_eq!(find(dir.path(), 2).unwrap(), Some(PathBuf::from("/dev/vdc")));
        assert_eq!(find(dir.path(), 10).unwrap(), Some(PathBuf::from("/dev/vdb")));
        assert_eq!(find(dir.path(), 3).unwrap(), None);
    }

    #[test]
    fn layers_are_stacked_topmost_first() {
        if !nix::unistd::Uid::effective().is_root() {
            return;
        }
        let tmpfs = FsContext::open("tmpfs").unwrap().mount(0).unwrap();
        let base = PathBuf::from(format!("/proc/self/fd/{}", tmpfs.as_raw_fd()));
        let layers: Vec<PathBuf> = ["top", "middle", "bottom"].map(|name| base.join(name)).to_vec();
        for (layer, file) in layers.iter().zip(["a", "ab", "abc"]) {
            fs::create_dir(layer).unwrap();
            for name in file.chars() {
                fs::write(layer.join(name.to_string()), file).unwrap();
            }
        }
        let tree = Tree::new(open_location(&base).unwrap());
        let directory = Directory { path: "x/fs".into(), mode: 0o750, uid: 3, gid: 4 };
        make(&tree, &directory).unwrap();
        make(&tree, &Directory { mode: 0o700, ..directory }).unwrap();
        let made = fs::metadata(base.join("x/fs")).unwrap();
        assert_eq!((made.mode() & 0o7777, made.uid(), made.gid()), (0o750, 3, 4));
        let (upper, work) =
            (inside(&tree, Path::new("x/fs")).unwrap(), inside(&tree, Path::new("x/work")).unwrap());
        // Older kernels take layers in another way; the guest's is not one of them.
        let Ok(overlay) = stack(&layers, &upper, &work, &MountOptions::default()) else { return };
        let view = PathBuf::from(format!("/proc/self/fd/{}", overlay.as_raw_fd()));
        for (name, from) in [("a", "a"), ("b", "ab"), ("c", "abc")] {
            assert_eq!(fs::read_to_string(view.join(name)).unwrap(), from);
        }
        fs::write(view.join("new"), "").unwrap();
        assert!(base.join("x/fs/new").exists());
    }
}

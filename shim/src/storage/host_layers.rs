//! Layers of disks under a directory of the host: the host's kernel has to put them together.
//!
//! The layers are mounted in a mount namespace that ends with the thread that made it, so that whatever happens none of
//! them stays; the overlay holds what it needs of them.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};

use super::StorageError;
use super::disk::{self, DiskRequest};
use super::loop_device::LoopDevice;
use super::mount::{attach, clone_tree, in_directory, mount};

/// Overlay options that take their value from the layers.
pub struct Changes<'a> {
    /// The upper directory.
    pub upper: &'a Path,
    /// The work directory.
    pub work: &'a Path,
}

/// Mounts the layers with the directories above them on `target`.
///
/// # Errors
/// Nothing stays mounted.
pub fn mount_layers(
    lowers: &[DiskRequest],
    changes: &Changes<'_>,
    options: &[String],
    target: &Path,
) -> Result<(), StorageError> {
    let body = || assemble(lowers, changes, options, target);
    let overlay = std::thread::scope(|scope| scope.spawn(body).join())
        .unwrap_or_else(|_| Err(failed(target, io::Error::other("the mounting thread failed"))))?;
    attach(&overlay, target).map_err(|source| failed(target, source))
}

fn failed(path: &Path, source: io::Error) -> StorageError {
    StorageError::Mount { path: path.to_owned(), source }
}

/// Makes the overlay on a thread of its own, and gives it back without a place.
fn assemble(
    lowers: &[DiskRequest],
    changes: &Changes<'_>,
    options: &[String],
    target: &Path,
) -> Result<OwnedFd, StorageError> {
    let failed = |source| failed(target, source);
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| failed(errno.into()))?;
    let root = Path::new("/");
    mount(None, root, None, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None).map_err(failed)?;
    // Seen in this namespace only.
    mount(Some(Path::new("layers")), target, Some("tmpfs"), MsFlags::empty(), Some("mode=0700"))
        .map_err(failed)?;
    for (number, lower) in lowers.iter().enumerate() {
        mount_layer(lower, &target.join(number.to_string()))?;
    }
    let merged = target.join("merged");
    std::fs::create_dir(&merged).map_err(failed)?;
    let data = overlay_options(lowers.len(), changes, options)?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    in_directory(target, || mount(Some(Path::new("overlay")), &merged, Some("overlay"), flags, Some(&data)))
        .and_then(|()| clone_tree(&merged, false))
        .map_err(failed)
}

fn mount_layer(layer: &DiskRequest, place: &Path) -> Result<(), StorageError> {
    let failed = |error| StorageError::Mount { path: layer.source.clone(), source: error };
    let image = disk::open(&layer.source, true)?;
    std::fs::create_dir(place).map_err(failed)?;
    let device = LoopDevice::over(&image.into()).map_err(failed)?;
    let data: Vec<&str> = layer.options.iter().map(String::as_str).filter(|option| *option != "ro").collect();
    let data = data.join(",");
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mount(Some(&device.path), place, Some(layer.filesystem), flags, Some(&data)).map_err(failed)
}

/// The names of the layers are numbers, relative to where they are, so that many of them fit.
fn overlay_options(layers: usize, changes: &Changes<'_>, options: &[String]) -> Result<String, StorageError> {
    let lowers: Vec<String> = (0..layers).map(|number| number.to_string()).collect();
    let mut all = vec![
        format!("workdir={}", escaped(changes.work)),
        format!("upperdir={}", escaped(changes.upper)),
        format!("lowerdir={}", lowers.join(":")),
    ];
    all.extend(options.iter().filter(|option| !matches!(option.as_str(), "ro" | "rw")).cloned());
    let data = all.join(",");
    if data.len() < super::overlay::PAGE { Ok(data) } else { Err(StorageError::TooManyLayers(data.len())) }
}

/// A comma would end the option.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace('\\', "\\\\").replace(',', "\\,")
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn names_of_layers_are_short_and_those_of_directories_safe() {
        let changes = Changes { upper: Path::new("/s,1/fs"), work: Path::new("/s/work") };
        let data = overlay_options(3, &changes, &["index=off".to_owned(), "rw".to_owned()]).unwrap();
        assert_eq!(data, "workdir=/s/work,upperdir=/s\\,1/fs,lowerdir=0:1:2,index=off");
        assert!(overlay_options(500, &changes, &[]).is_ok());
    }

    /// Needs root and loop devices, as the shim itself does.
    #[test]
    fn layers_are_stacked_and_nothing_else_stays() {
        let directory = tempfile::tempdir().unwrap();
        let [low, upper, work, target] = ["low", "upper", "work", "target"].map(|name| {
            let path = directory.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        });
        std::fs::write(low.join("file"), "layer").unwrap();
        let image = directory.path().join("image");
        File::create(&image).unwrap().set_len(4 << 20).unwrap();
        let made = std::process::Command::new("mkfs.ext4")
            .args(["-qF", "-O", "^has_journal", "-d"])
            .args([&low, &image])
            .status();
        if !nix::unistd::geteuid().is_root() || !made.is_ok_and(|status| status.success()) {
            return;
        }
        let layer = |image: &Path| DiskRequest {
            source: image.to_owned(),
            filesystem: "ext4",
            options: Vec::new(),
            read_only: true,
        };
        let changes = Changes { upper: &upper, work: &work };
        let layers = [layer(&image), layer(&image)];
        match mount_layers(&layers, &changes, &[], &target) {
            // A sandbox may not let even root mount, or have no loop devices.
            Err(StorageError::Mount { source, .. })
                if matches!(source.raw_os_error(), Some(libc::EPERM | libc::ENOENT | libc::EINVAL)) =>
            {
                return;
            }
            result => result.unwrap(),
        }
        assert_eq!(std::fs::read_to_string(target.join("file")).unwrap(), "layer");
        std::fs::write(target.join("new"), "change").unwrap();
        super::super::mount::detach(&target).unwrap();
        assert_eq!(std::fs::read_to_string(upper.join("new")).unwrap(), "change");
        let table = std::fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!table.contains(directory.path().to_str().unwrap()), "{table}");
    }
}

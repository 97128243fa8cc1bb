//! Layers that the host's kernel has to put together: disks under a directory of the host, and directories that get other
//! owners.
//!
//! The layers are mounted in a mount namespace that ends with the thread that made it, so that whatever happens none of
//! them stays; the overlay holds what it needs of them.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};

use super::disk::{self, DiskRequest};
use super::idmap::IdMap;
use super::loop_device::LoopDevice;
use super::mount::{attach, clone_tree, in_directory, map_owners, mount};
use super::{StorageError, overlay};

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
    let place =
        |number: usize, place: &Path| lowers.get(number).map_or(Ok(()), |lower| mount_layer(lower, place));
    let data = overlay_options(lowers.len(), changes, options)?;
    mount_stack(lowers.len(), place, MsFlags::empty(), &data, target)
}

/// Mounts an overlay whose options name directories of the host on `target`, the layers with other owners than they
/// have. The upper directory's are right already: what the container writes is the container's.
///
/// # Errors
/// Nothing stays mounted.
pub fn mount_mapped(
    options: &[String],
    map: &IdMap,
    flags: MsFlags,
    target: &Path,
) -> Result<(), StorageError> {
    let layers = overlay::layers(options)?;
    let refused = |source| StorageError::IdMap { path: target.to_owned(), source };
    let namespace = map.namespace().map_err(refused)?;
    let place = |number: usize, place: &Path| match layers.get(number) {
        Some(layer) => place_mapped(layer, &namespace, place),
        None => Ok(()),
    };
    let others = options.iter().filter(|option| !option.starts_with("lowerdir="));
    let data = with_numbers(layers.len(), others.cloned().collect())?;
    mount_stack(layers.len(), place, flags, &data, target)
}

/// Mounts an overlay of `layers` layers on `target`. Each gets a directory whose name is its number, on which
/// `place_layer` mounts it, and `data` names them so.
fn mount_stack(
    layers: usize,
    place_layer: impl Fn(usize, &Path) -> Result<(), StorageError> + Send,
    flags: MsFlags,
    data: &str,
    target: &Path,
) -> Result<(), StorageError> {
    let body = || assemble(layers, place_layer, flags, data, target);
    let overlay = std::thread::scope(|scope| scope.spawn(body).join())
        .unwrap_or_else(|_| Err(failed(target, io::Error::other("the mounting thread failed"))))?;
    attach(&overlay, target).map_err(|source| failed(target, source))
}

fn failed(path: &Path, source: io::Error) -> StorageError {
    StorageError::Mount { path: path.to_owned(), source }
}

/// Makes the overlay on a thread of its own, and gives it back without a place.
fn assemble(
    layers: usize,
    place_layer: impl Fn(usize, &Path) -> Result<(), StorageError>,
    flags: MsFlags,
    data: &str,
    target: &Path,
) -> Result<OwnedFd, StorageError> {
    let failed = |source| failed(target, source);
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| failed(errno.into()))?;
    let root = Path::new("/");
    mount(None, root, None, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None).map_err(failed)?;
    // Seen in this namespace only.
    mount(Some(Path::new("layers")), target, Some("tmpfs"), MsFlags::empty(), Some("mode=0700"))
        .map_err(failed)?;
    for number in 0..layers {
        let place = target.join(number.to_string());
        std::fs::create_dir(&place).map_err(failed)?;
        place_layer(number, &place)?;
    }
    let merged = target.join("merged");
    std::fs::create_dir(&merged).map_err(failed)?;
    let flags = flags | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    in_directory(target, || mount(Some(Path::new("overlay")), &merged, Some("overlay"), flags, Some(data)))
        .and_then(|()| clone_tree(&merged, false))
        .map_err(failed)
}

fn place_mapped(layer: &Path, namespace: &OwnedFd, place: &Path) -> Result<(), StorageError> {
    let tree = clone_tree(layer, false).map_err(|source| failed(layer, source))?;
    map_owners(&tree, namespace, false)
        .map_err(|source| StorageError::IdMap { path: layer.to_owned(), source })?;
    attach(&tree, place).map_err(|source| failed(place, source))
}

fn mount_layer(layer: &DiskRequest, place: &Path) -> Result<(), StorageError> {
    let failed = |error| StorageError::Mount { path: layer.source.clone(), source: error };
    let image = disk::open(&layer.source, true)?;
    let device = LoopDevice::over(&image.into()).map_err(failed)?;
    let data: Vec<&str> = layer.options.iter().map(String::as_str).filter(|option| *option != "ro").collect();
    let data = data.join(",");
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mount(Some(&device.path), place, Some(layer.filesystem), flags, Some(&data)).map_err(failed)
}

fn overlay_options(layers: usize, changes: &Changes<'_>, options: &[String]) -> Result<String, StorageError> {
    let mut all =
        vec![format!("workdir={}", escaped(changes.work)), format!("upperdir={}", escaped(changes.upper))];
    all.extend(options.iter().filter(|option| !matches!(option.as_str(), "ro" | "rw")).cloned());
    with_numbers(layers, all)
}

/// Adds the names of the layers, which are numbers, relative to where they are, so that many of them fit.
fn with_numbers(layers: usize, mut options: Vec<String>) -> Result<String, StorageError> {
    let names: Vec<String> = (0..layers).map(|number| number.to_string()).collect();
    options.push(format!("lowerdir={}", names.join(":")));
    let data = options.join(",");
    if data.len() < overlay::PAGE { Ok(data) } else { Err(StorageError::TooManyLayers(data.len())) }
}

/// A comma would end the option.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace('\\', "\\\\").replace(',', "\\,")
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{MetadataExt, chown};

    use super::*;
    use crate::storage::Mapping;

    #[test]
    fn names_of_layers_are_short_and_those_of_directories_safe() {
        let changes = Changes { upper: Path::new("/s,1/fs"), work: Path::new("/s/work") };
        let data = overlay_options(3, &changes, &["index=off".to_owned(), "rw".to_owned()]).unwrap();
        assert_eq!(data, "workdir=/s/work,upperdir=/s\\,1/fs,index=off,lowerdir=0:1:2");
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

    /// Needs root and a file system that can be mounted with other owners.
    #[test]
    fn directories_get_other_owners_and_nothing_else_stays() {
        let directory = tempfile::tempdir().unwrap();
        let [top, low, upper, work, target] = ["top", "low", "upper", "work", "target"].map(|name| {
            let path = directory.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        });
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        std::fs::write(low.join("file"), "layer").unwrap();
        std::fs::write(top.join("file"), "above").unwrap();
        chown(low.join("file"), Some(1), Some(1)).unwrap();
        chown(top.join("file"), Some(2), Some(3)).unwrap();
        let path = |path: &Path| path.display().to_string();
        let options = [
            format!("workdir={}", path(&work)),
            format!("upperdir={}", path(&upper)),
            format!("lowerdir={}:{}", path(&top), path(&low)),
        ];
        let map = |host| vec![Mapping { container: 0, host, size: 10 }];
        let map = IdMap { uids: map(1000), gids: map(2000) };
        match mount_mapped(&options, &map, MsFlags::empty(), &target) {
            // A sandbox may not let even root mount, or have such file systems only that cannot.
            Err(StorageError::Mount { source, .. } | StorageError::IdMap { source, .. })
                if matches!(source.raw_os_error(), Some(libc::EPERM | libc::EINVAL)) =>
            {
                return;
            }
            result => result.unwrap(),
        }
        let file = target.join("file");
        let owner = std::fs::metadata(&file).unwrap();
        assert_eq!((owner.uid(), owner.gid()), (1002, 2003));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "above");
        std::fs::write(&file, "changed").unwrap();
        super::super::mount::detach(&target).unwrap();
        let copied = std::fs::metadata(upper.join("file")).unwrap();
        assert_eq!((copied.uid(), copied.gid()), (1002, 2003));
        let table = std::fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!table.contains(directory.path().to_str().unwrap()), "{table}");
    }
}
